"""What each pruned layer does to the patches of given images: how it ranks them, which it keeps, what it merges."""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch

from ..inference import evaluation_mode
from ..modeling_tnt import TntDeiTForImageClassification, TntViTForImageClassification
from ..schedules_tnt import Schedule
from ..token_reduction_tnt import EMBEDDINGS


@dataclass(frozen=True)
class PrunedLayer:
    """
    What one pruned layer did to the patches of a batch of images; positions are row-major on the patch grid.

    Args:
        layer (`int`): The layer, from 0.
        ranked (`torch.LongTensor` of shape `(batch_size, num_ranked)`): Positions of the tokens that entered.
        relevance (`torch.DoubleTensor` of shape `(batch_size, num_ranked)`, *optional*):
            Softmax of their learned scores, where these have a say.
        kept (`torch.LongTensor` of shape `(batch_size, num_kept)`): Positions that remain, as in `kept_indices`.
        groups (`torch.LongTensor` of shape `(batch_size, num_patches)`, *optional*):
            Where tokens are merged, the kept position whose token each patch is part of.
    """

    layer: int
    ranked: torch.Tensor
    relevance: torch.Tensor | None
    kept: torch.Tensor
    groups: torch.Tensor | None = None


@torch.inference_mode()
def trace_tokens(
    model: TntViTForImageClassification | TntDeiTForImageClassification,
    pixel_values: torch.Tensor,
    schedule: Schedule | None = None,
    seed: int = 0,
) -> tuple[torch.Tensor, list[PrunedLayer]]:
    """
    Run a model and tell what its pruned layers did.

    Args:
        model: The classifier.
        pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): Images of `image_size`.
        schedule ([`Schedule`], *optional*): What leaves where; the config's schedule if None.
        seed (`int`): Seed of `"random"` settings.

    Returns:
        The logits of shape `(batch_size, num_labels)` and a [`PrunedLayer`], on the CPU, for each pruned layer.
    """
    config, scores = model.config, {}
    with evaluation_mode(model), ExitStack() as hooks:
        for layer, head in enumerate(model.base_model.alpha_heads):
            keep = partial(lambda layer, head, args, output: scores.update({layer: output}), layer)
            hooks.callback(head.register_forward_hook(keep).remove)
        outputs = model(
            pixel_values.to(model.device, model.dtype),
            schedule=schedule,
            generator=torch.Generator().manual_seed(seed),
            output_hidden_states=True,
            output_groups=True,
        )
    patches = torch.arange(config.num_patches_of(schedule), device=model.device)
    ranked, layers = patches.expand(len(pixel_values), -1), []
    for index, step in enumerate(config.reduction_steps(schedule=schedule)):
        groups = outputs.patch_groups[:, index]
        kept = (groups == patches).nonzero()[:, 1].view(len(pixel_values), -1)
        if step.layer != EMBEDDINGS:
            relevance = None
            if config.uses_scores:
                if step.layer in scores:
                    ranking = scores[step.layer].squeeze(-1)[:, config.num_prefix_tokens :]
                else:  # nothing leaves, so that the model did not ask
                    ranking = model.base_model.relevance_scores(step.layer, outputs.hidden_states[step.layer + 1])
                relevance = ranking.cpu().double().softmax(dim=-1)
            merged = groups.cpu() if config.merges else None
            layers.append(PrunedLayer(step.layer, ranked.cpu(), relevance, kept.cpu(), merged))
        ranked = kept
    return outputs.logits, layers


__all__ = ["PrunedLayer", "trace_tokens"]
