"""What each pruned layer does to the patches of given images: how it ranks them, which it keeps, what it merges."""

from dataclasses import dataclass
from typing import Any

import torch

from .modeling_tnt import (
    TntDeiTForImageClassification,
    TntViTForImageClassification,
    draw_noise,
    merge_tokens,
    select_tokens,
    standardize,
)
from .schedules import borrowed


# Small enough to leave every similarity of tokens as it is, large enough for float32 to hold a share of it.
LABEL_SCALE = 1e-12


@dataclass(frozen=True)
class PrunedLayer:
    """
    What one pruned layer did to the patches of a batch of images; positions are row-major on the patch grid.

    Args:
        layer (`int`): The layer, from 0.
        ranked (`torch.LongTensor` of shape `(batch_size, num_ranked)`): Positions of the tokens that entered.
        relevance (`torch.DoubleTensor` of shape `(batch_size, num_ranked)`): Softmax of their learned scores.
        kept (`torch.LongTensor` of shape `(batch_size, num_kept)`): Positions that remain, as in `kept_indices`.
        groups (`torch.LongTensor` of shape `(batch_size, num_patches)`, *optional*):
            Where tokens are merged, the kept position whose token each patch is part of.
    """

    layer: int
    ranked: torch.Tensor
    relevance: torch.Tensor
    kept: torch.Tensor
    groups: torch.Tensor | None = None


@torch.inference_mode()
def trace_tokens(
    model: TntViTForImageClassification | TntDeiTForImageClassification, pixel_values: torch.Tensor, seed: int = 0
) -> tuple[torch.Tensor, list[PrunedLayer]]:
    """
    Run a model under its schedule and tell what its pruned layers did.

    The model does not say what it merges into what: its selections are made again, from its hidden states.

    Args:
        model: The classifier.
        pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): Images of `image_size`.
        seed (`int`): Seed of `"random"` settings.

    Returns:
        The logits of shape `(batch_size, num_labels)` and a [`PrunedLayer`], on the CPU, for each of `prune_layers`.
    """
    config, backbone = model.config, model.base_model
    pixel_values = pixel_values.to(model.device, model.dtype)
    with borrowed(model):
        generator = torch.Generator().manual_seed(seed)
        outputs = model(pixel_values, output_hidden_states=True, generator=generator)
        embedded = backbone.embeddings(pixel_values)

    generator.manual_seed(seed)  # the same draws once more
    is_merging = config.token_reduction == "merge"
    counts, num_similar_tokens = config.patch_token_counts(), config.num_similar_tokens
    positions = torch.arange(config.num_patches, device=model.device).expand(len(pixel_values), -1)
    owners, sizes = positions, torch.ones_like(positions, dtype=torch.float32)
    steps = [(layer, outputs.hidden_states[layer + 1], counts[layer + 1]) for layer in config.prune_layers]
    if len(steps) > 1 and num_similar_tokens > 0:
        steps.insert(0, (None, embedded, counts[0]))
    kept_indices, layers = iter(outputs.kept_indices or ()), []
    for layer, states, num_kept in steps:
        tokens = states[:, config.num_prefix_tokens :].float()
        ranked, scores = positions, None if layer is None else backbone.relevance_scores(layer, states)
        if num_kept < tokens.shape[1]:
            is_random = scores is not None and config.selection == "random"
            ranking = draw_noise(scores, generator) if is_random else scores
            num_similar = num_similar_tokens if layer is None or len(steps) == 1 else 0
            how = (num_kept, num_similar, config.similarity_partition, generator)
            if is_merging:
                resistance = None if scores is None else config.relevance_weight * standardize(ranking, sizes > 0)
                new_owners, sizes, remaining = _merge(tokens, sizes, resistance, *how)
                owners = new_owners.gather(1, owners)
            else:
                remaining = select_tokens(tokens, ranking, *how)
            positions = positions.gather(1, remaining)
        if layer is not None:
            positions = next(kept_indices)
            relevance = scores.cpu().double().softmax(dim=-1)
            groups = positions.gather(1, owners).cpu() if is_merging else None
            layers.append(PrunedLayer(layer, ranked.cpu(), relevance, positions.cpu(), groups))
    return outputs.logits, layers


def _merge(
    tokens: torch.Tensor, sizes: torch.Tensor, resistance: torch.Tensor | None, *how: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As [`merge_tokens`], with the index of the token that each token became part of instead of the tokens."""
    batch_size, num_tokens, hidden_size = tokens.shape
    labels = LABEL_SCALE * torch.eye(num_tokens, device=tokens.device).expand(batch_size, -1, -1)
    merged, sizes, positions = merge_tokens(torch.cat((tokens, labels), dim=-1), sizes, resistance, *how)
    return merged[..., hidden_size:].argmax(dim=1), sizes, positions


__all__ = ["PrunedLayer", "trace_tokens"]
