"""Token Merging (arXiv 2210.09461) on the models of this package: what the page shows beside their own reduction."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..configuration_tnt import TntDeiTConfig, TntViTConfig
from ..modeling_tnt import TntDeiTForImageClassification, TntViTForImageClassification
from ..schedules_tnt import UNPRUNED, Schedule, count_gflops
from ..token_reduction_tnt import match_similar, merge
from ..visualization import PrunedLayer


@dataclass(frozen=True)
class TokenMerging:
    """
    How many patch tokens each layer but the last leaves, and what that costs.

    Args:
        counts (`tuple[int, ...]`): Patch tokens after each of these layers.
        gflops (`float`): 1e9 multiply-accumulates of an image, as executed. Products of keys averaged over the heads
            count as those of whole tokens, less than one percent more.
    """

    counts: tuple[int, ...]
    gflops: float


def token_merging_for(config: TntViTConfig | TntDeiTConfig, flops_reduction: float) -> TokenMerging | None:
    """
    As published, equal numbers of tokens leave all layers: the smallest number that meets a budget, a reduction of the
    executed multiply-accumulates of at least 1. None if none does.
    """
    config = copy.deepcopy(config)
    config.token_reduction = "cluster"  # which executes as much: tokens leave between the attention and the MLP
    limit = count_gflops(config, schedule=UNPRUNED, as_executed=True) / flops_reduction
    for num_merged in range(config.num_patches):
        counts, left = [], config.num_patches
        for _ in range(config.num_hidden_layers - 1):
            left -= min(num_merged, left // 2)
            counts.append(left)
        schedule = Schedule.keeping(counts, tuple(range(len(counts))), config.num_patches)
        gflops = count_gflops(config, schedule=schedule, as_executed=True)
        if gflops <= limit:
            return TokenMerging(tuple(counts), gflops)
    return None


@torch.inference_mode()
def merge_tokens(
    model: TntViTForImageClassification | TntDeiTForImageClassification,
    pixel_values: torch.Tensor,
    counts: Sequence[int],
) -> tuple[torch.Tensor, PrunedLayer]:
    """
    Classify images with Token Merging.

    Args:
        model: In evaluation mode.
        pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): Images of `image_size`.
        counts (`Sequence[int]`): Those of a [`TokenMerging`].

    Returns:
        The logits of shape `(batch_size, num_labels)`, and what became of the patches in the end.
    """
    backbone, num_prefix = model.base_model, model.config.num_prefix_tokens
    tokens = backbone.embeddings(pixel_values)
    sizes = torch.ones(tokens.shape[:2], device=tokens.device)
    places = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
    heirs = places  # of each token that there was, the place of the one that it is part of
    *layers, last_layer = backbone.layers
    for layer, num_kept in zip(layers, counts):
        attention, inputs = layer.attention, layer.layernorm_before(tokens)
        query, key, value = (
            projection(inputs).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        bias = None if tokens.shape[1] == heirs.shape[1] else sizes.log()[:, None, None]
        attended = nn.functional.scaled_dot_product_attention(query, key, value, bias, scale=attention.scaling)
        tokens = tokens + attention.o_proj(attended.transpose(1, 2).flatten(2))
        num_merged = tokens.shape[1] - num_prefix - num_kept
        if num_merged > 0:
            matching = match_similar(key.mean(dim=1), num_merged, num_prefix_tokens=num_prefix)
            leaving, joined = (places.gather(1, each) for each in (matching.leaving, matching.partners))
            after = torch.arange(heirs.shape[1], device=heirs.device).expand(len(heirs), -1)
            heirs = after.scatter(1, leaving, joined).gather(1, heirs)
            tokens, sizes = merge(tokens, sizes, matching)
            places = places.gather(1, matching.left)
        tokens = tokens + layer.mlp(layer.layernorm_after(tokens))
    num_read = None if model.config.classifier_reads_patches else num_prefix
    tokens = last_layer(tokens, attention_bias=sizes.log(), num_output_tokens=num_read)
    inputs = model.head_inputs(backbone.layernorm(tokens), sizes[:, num_prefix:])
    logits = [getattr(model, name)(each) for name, each in zip(model.head_names, inputs)]
    patches, groups = (each[:, num_prefix:] - num_prefix for each in (places, heirs))
    left = PrunedLayer(len(counts) - 1, patches, None, patches, groups)
    return torch.stack(logits).mean(dim=0), left


__all__ = ["TokenMerging", "merge_tokens", "token_merging_for"]
