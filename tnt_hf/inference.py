"""A model in evaluation mode for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


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


__all__ = ["evaluation_mode"]
