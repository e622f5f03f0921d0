"""A model in evaluation mode for a while, and its remaining tokens put back on the whole grid."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .token_reduction_tnt import take_tokens


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards each of its parts in the mode that it was in."""
    were_training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in were_training:
            module.training = True


def unmerge(patch_tokens: torch.Tensor, patch_groups: torch.Tensor) -> torch.Tensor:
    """
    Put remaining tokens back on the whole grid: every patch gets the token it is part of, 0 if it was dropped.

    Tokens of shape `(batch_size, num_patch_tokens, hidden_size)` and `patch_groups[:, -1]` of a model's output, of
    shape `(batch_size, num_patches)` -> `(batch_size, num_patches, hidden_size)`.
    """
    is_kept = patch_groups == torch.arange(patch_groups.shape[1], device=patch_groups.device)
    places = (is_kept.cumsum(dim=-1) - 1).gather(1, patch_groups.clamp(min=0)).clamp(min=0)
    return take_tokens(patch_tokens, places) * (patch_groups >= 0).unsqueeze(-1)


__all__ = ["evaluation_mode", "unmerge"]
