"""
Token reduction without learned scores, written from the papers, on the layers of a TNT model: what TNT is compared
with.

All methods see the same frozen weights, leave the patch tokens out of the last layer as the TNT classifiers do, and
get the schedule that comes closest to a budget of executed GFLOPs from below.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise, product

import torch
from torch import nn

from tnt_hf.configuration_tnt import TntDeiTConfig, TntViTConfig
from tnt_hf.modeling_tnt import TntDeiTForImageClassification, TntViTForImageClassification
from tnt_hf.schedules_tnt import LAYER_NORM_OPERATIONS, height_and_width
from tnt_hf.token_reduction_tnt import Matching, match_similar, merge, take_tokens


METHODS = ("random", "cls_attention", "merging", "sort_prune_merge")

# Random and [CLS]-attention selection cut once, after the layer where the published TNT schedules start.
CUT_LAYER = 2
# Sort-prune-merge leaves its schedule to a search, which is offered these and two shapes.
PRUNED_SHARES = (0.0, 0.25, 0.5)
NUM_STRENGTHS = 1000


@dataclass(frozen=True)
class BaselineSchedule:
    """
    How many tokens a method leaves, layer by layer.

    Args:
        method (`str`): One of `METHODS`.
        counts (`tuple[int, ...]`): Patch tokens that leave each layer.
        pruned_share (`float`): For `"sort_prune_merge"`, the share of the leaving tokens that is deleted.
    """

    method: str
    counts: tuple[int, ...]
    pruned_share: float = 0.0

    @property
    def reduces_before_mlp(self) -> bool:
        """Whether tokens leave between attention and MLP, as merging methods do, instead of after the layer."""
        return self.method in ("merging", "sort_prune_merge")

    @property
    def ranks_by_attention(self) -> bool:
        """Whether the attention of [CLS] decides which tokens leave."""
        return self.method in ("cls_attention", "sort_prune_merge")


def count_baseline_gflops(config: TntViTConfig | TntDeiTConfig, schedule: BaselineSchedule) -> float:
    """
    Executed 1e9 multiply-accumulates of one image, counted as [`~tnt_hf.schedules_tnt.count_gflops`] counts, but for
    the means of merged tokens: the methods add tokens up without products.

    Source of what is compared with what: section 3 of arXiv 2210.09461 (keys averaged over heads) for merging,
    section 3.2 of arXiv 2305.17997 for sort-prune-merge.
    """
    hidden_size, num_prefix_tokens = config.hidden_size, config.num_prefix_tokens
    patch_height, patch_width = height_and_width(config.patch_size)
    head_size = hidden_size // config.num_attention_heads
    last_layer = config.num_hidden_layers - 1
    total = config.num_patches * config.num_channels * patch_height * patch_width * hidden_size
    for layer, (before, after) in enumerate(pairwise((config.num_patches, *schedule.counts))):
        num_tokens = before + num_prefix_tokens
        num_outputs = num_prefix_tokens if layer == last_layer else num_tokens
        num_mlp_tokens = num_outputs
        if schedule.reduces_before_mlp and layer != last_layer:
            num_mlp_tokens = after + num_prefix_tokens
        total += 2 * (num_tokens + num_outputs) * hidden_size**2
        total += 2 * num_tokens * num_outputs * hidden_size
        total += 2 * num_mlp_tokens * hidden_size * config.intermediate_size
        total += (num_tokens + num_mlp_tokens) * hidden_size * LAYER_NORM_OPERATIONS
        if after < before and schedule.ranks_by_attention:
            total += num_tokens * hidden_size
        if after < before and schedule.method == "merging":
            total += (before // 2) * (before - before // 2) * head_size
        if after < before and schedule.method == "sort_prune_merge":
            total += _num_merged(schedule, before - after) * after * head_size
    total += num_prefix_tokens * hidden_size * (LAYER_NORM_OPERATIONS + config.num_labels)
    return total / 1e9


def _num_merged(schedule: BaselineSchedule, num_leaving: int) -> int:
    return num_leaving - int(schedule.pruned_share * num_leaving)


def baseline_schedules(config: TntViTConfig | TntDeiTConfig, method: str, gflops: float) -> list[BaselineSchedule]:
    """
    The schedules of a method that come closest to a budget of executed GFLOPs from below: one, or for
    `"sort_prune_merge"` one for each shape and pruned share.

    Raises:
        ValueError: If the method is unknown or cannot meet the budget.
    """
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {', '.join(METHODS)}, got {method!r}.")
    variants = [(_cut_once, 0.0)]
    if method == "merging":
        variants = [(_equal_numbers, 0.0)]
    if method == "sort_prune_merge":
        variants = list(product((_equal_numbers, _equal_rates), PRUNED_SHARES))
    return [_fitted(config, method, gflops, shape, pruned_share) for shape, pruned_share in variants]


def _fitted(
    config: TntViTConfig | TntDeiTConfig,
    method: str,
    gflops: float,
    shape: Callable[[TntViTConfig | TntDeiTConfig, float], list[int]],
    pruned_share: float,
) -> BaselineSchedule:
    def schedule(strength):
        return BaselineSchedule(method, tuple(shape(config, strength / NUM_STRENGTHS)), pruned_share)

    strengths = range(NUM_STRENGTHS + 1)
    first = bisect_left(
        strengths, True, key=lambda strength: count_baseline_gflops(config, schedule(strength)) <= gflops
    )
    if first == len(strengths):
        lowest = count_baseline_gflops(config, schedule(NUM_STRENGTHS))
        raise ValueError(f"{method} needs at least {lowest:.6g} GFLOPs for an image of this model, got {gflops:.6g}.")
    return schedule(strengths[first])


def _cut_once(config: TntViTConfig | TntDeiTConfig, strength: float) -> list[int]:
    num_whole = min(CUT_LAYER, config.num_hidden_layers - 2)
    num_kept = max(1, round(config.num_patches * (1 - strength)))
    return [config.num_patches] * num_whole + [num_kept] * (config.num_hidden_layers - num_whole)


def _equal_numbers(config: TntViTConfig | TntDeiTConfig, strength: float) -> list[int]:
    """The same number of tokens leaves every layer but the last, at most half of them."""
    counts, num_leaving = [], strength * config.num_patches / 2
    for layer in range(config.num_hidden_layers - 1):
        before = counts[-1] if counts else config.num_patches
        counts.append(max(round(config.num_patches - num_leaving * (layer + 1)), before - before // 2))
    return [*counts, counts[-1]]


def _equal_rates(config: TntViTConfig | TntDeiTConfig, strength: float) -> list[int]:
    """The same share of tokens leaves every layer of the first half."""
    num_reduced = config.num_hidden_layers // 2
    kept = [
        config.num_patches * (1 - strength) ** min(layer + 1, num_reduced) for layer in range(config.num_hidden_layers)
    ]
    return [max(1, round(count)) for count in kept]


@torch.inference_mode()
def baseline_logits(
    model: TntViTForImageClassification | TntDeiTForImageClassification,
    pixel_values: torch.Tensor,
    schedule: BaselineSchedule,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Classify images under a baseline.

    Args:
        model: The classifier in evaluation mode; its own schedule and scoring heads have no effect.
        pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): Images of
            `config.image_size`.
        schedule ([`BaselineSchedule`]): What to keep.
        generator (`torch.Generator`, *optional*): Source of the random selection.

    Returns:
        Logits of shape `(batch_size, num_labels)` and the patches that remain at the end, row-major positions of shape
        `(batch_size, num_remaining)`.
    """
    backbone = model.base_model
    num_prefix_tokens = model.config.num_prefix_tokens
    tokens = backbone.embeddings(pixel_values)
    batch_size, num_tokens, _ = tokens.shape
    positions = torch.arange(num_tokens - num_prefix_tokens, device=tokens.device).expand(batch_size, -1)
    sizes = torch.ones(batch_size, num_tokens, device=tokens.device)
    for index, layer in enumerate(backbone.layers[:-1]):
        bias = _attention_bias(schedule, sizes, tokens.dtype)
        if schedule.counts[index] == positions.shape[1]:
            tokens = layer(tokens, bias)
            continue
        attended, keys, cls_attention = _attend(schedule, layer, tokens, bias, num_prefix_tokens)
        if not schedule.reduces_before_mlp:
            attended = attended + layer.mlp(layer.layernorm_after(attended))
        reduced = _reduce(
            schedule,
            schedule.counts[index],
            attended[:, num_prefix_tokens:],
            sizes[:, num_prefix_tokens:],
            keys,
            cls_attention,
            generator,
        )
        patch_tokens, patch_sizes, remaining = reduced
        tokens = torch.cat((attended[:, :num_prefix_tokens], patch_tokens), dim=1)
        sizes = torch.cat((sizes[:, :num_prefix_tokens], patch_sizes), dim=1)
        positions = positions.gather(1, remaining)
        if schedule.reduces_before_mlp:
            tokens = tokens + layer.mlp(layer.layernorm_after(tokens))
    bias = _attention_bias(schedule, sizes, tokens.dtype)
    tokens = backbone.layernorm(backbone.layers[-1](tokens, bias, num_output_tokens=num_prefix_tokens))
    if isinstance(model, TntViTForImageClassification):
        return model.classifier(tokens[:, 0]), positions
    return (model.cls_classifier(tokens[:, 0]) + model.distillation_classifier(tokens[:, 1])) / 2, positions


def _attention_bias(schedule: BaselineSchedule, sizes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    return sizes.log().to(dtype)[:, None, None, :] if schedule.reduces_before_mlp else None


def _attend(
    schedule: BaselineSchedule,
    layer: nn.Module,
    tokens: torch.Tensor,
    bias: torch.Tensor | None,
    num_prefix_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The attention half of a layer; also the keys of the patch tokens, `(batch_size, num_patches, head_size)`, and the
    attention that [CLS] pays to each patch token, `(batch_size, num_patches)`, both averaged over heads; None if the
    method does not rank by it.
    """
    normalized, attention = layer.layernorm_before(tokens), layer.attention
    query, key, value = (
        projection(normalized).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    attended = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=attention.scaling)
    cls_attention = None
    if schedule.ranks_by_attention:
        scores = (query[:, :, :1] @ key.transpose(-1, -2)) * attention.scaling
        weights = (scores if bias is None else scores + bias).softmax(dim=-1)
        cls_attention = weights.mean(dim=1).squeeze(1)[:, num_prefix_tokens:]
    tokens = tokens + attention.o_proj(attended.transpose(1, 2).flatten(2))
    return tokens, key.mean(dim=1)[:, num_prefix_tokens:], cls_attention


def _reduce(
    schedule: BaselineSchedule,
    num_kept: int,
    tokens: torch.Tensor,
    sizes: torch.Tensor,
    keys: torch.Tensor,
    cls_attention: torch.Tensor | None,
    generator: torch.Generator | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The `num_kept` patch tokens that remain, their sizes and their positions among `tokens`, ascending."""
    num_tokens = tokens.shape[1]
    num_leaving = num_tokens - num_kept
    if schedule.method == "merging":
        matching = match_similar(keys, num_leaving)
        return *merge(tokens, sizes, matching), matching.left
    relevance = cls_attention
    if schedule.method == "random":
        relevance = torch.rand(sizes.shape, generator=generator).to(tokens.device)
    order = relevance.argsort(dim=-1, descending=True, stable=True)
    num_merged = _num_merged(schedule, num_leaving) if schedule.method == "sort_prune_merge" else 0
    kept, leaving = order[:, :num_kept], order[:, num_kept : num_kept + num_merged]
    left = kept.sort(dim=-1).values
    if num_merged == 0:
        return take_tokens(tokens, left), sizes.gather(1, left), left
    keys = nn.functional.normalize(keys, dim=-1)
    nearest = (take_tokens(keys, leaving) @ take_tokens(keys, kept).transpose(1, 2)).argmax(dim=-1)
    return *merge(tokens, sizes, Matching(leaving, kept.gather(1, nearest), left)), left


__all__ = [
    "METHODS",
    "BaselineSchedule",
    "baseline_logits",
    "baseline_schedules",
    "count_baseline_gflops",
]
