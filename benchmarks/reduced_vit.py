"""
A plain ViT on fewer tokens: one forward pass in which every choice of a token reduction is a setting, what it costs,
and the settings that meet a budget.

The methods of the papers are settings of it, and so are their combinations with smaller images.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from tnt_hf.schedules_tnt import height_and_width
from tnt_hf.token_reduction_tnt import Matching, standardize, take_tokens


RULES = ("merge", "merge_energetic", "sort_prune_merge", "drop")
METRICS = ("outputs", "inputs", "queries", "keys", "mean_keys", "values")
SCORES = ("random", "cls_attention", "received_attention", "mlp_shift")
NUM_PREFIX_TOKENS = 1
NUM_STRENGTHS = 4096
# Energy of a token whose cosine to another is below a margin that falls from layer to layer: equation 4 of PiToMe.
FIRST_MARGIN = 0.9

# The share of its tokens that a network keeps, layer by layer, from a strength of 0 (all) to 1.
Shape = Callable[[int, int, float], list[int]]


@dataclass(frozen=True)
class Reduction:
    """
    How patch tokens leave a ViT.

    Args:
        counts (`tuple[int, ...]`): Patch tokens that each layer but the last leaves; empty if all stay.
        grid (`tuple[int, int]`, *optional*): Rows and columns of patches that the images are made smaller to.
        rule (`str`): `"merge"` joins the tokens that leave to the most similar ones of the other half of the sequence,
            odd places to even ones; `"merge_energetic"` does so among those that are similar to many (PiToMe);
            `"sort_prune_merge"` joins the tokens of lower scores to the most similar of the others (DiffRate);
            `"drop"` deletes those of the lowest scores.
        metric (`str`): What is compared by its cosine: the tokens that are to be merged (`"outputs"`), the normalized
            inputs of the attention, or queries, keys or values of all heads side by side, or keys averaged over heads.
        is_before_mlp (`bool`): Whether tokens leave between attention and MLP instead of after the layer.
        size_bias (`float`): Attention scores are raised by this times the logarithm of a token's patches.
        keeps_norm (`bool`): Whether merged tokens are scaled to the mean norm of their members.
        scores (`str`, *optional*): One of `SCORES`, higher is more relevant.
        score_penalty (`float`): What a unit of the scores takes off the similarity of a token that leaves.
        size_penalty (`float`): What a unit of the logarithm of its patches takes off.
        penalizes_both (`bool`): Whether the token that is joined counts in these penalties as well.
        compares_logarithms (`bool`): Whether similarity is the logarithm of (1 + cosine) / 2.
        score_weight (`float`): Tokens are averaged in proportion to patches times exp(this times their score).
        is_mutual (`bool`): Whether half of those that leave do so in the other direction, even places to odd ones.
        pruned_share (`float`): For `"sort_prune_merge"`, the share of the leaving tokens that is deleted.
        fuses_dropped (`bool`): Whether one of the tokens kept is the mean of those dropped, weighted by their scores.
    """

    counts: tuple[int, ...] = ()
    grid: tuple[int, int] | None = None
    rule: str = "merge"
    metric: str = "keys"
    is_before_mlp: bool = True
    size_bias: float = 1.0
    keeps_norm: bool = False
    scores: str | None = None
    score_penalty: float = 0.0
    size_penalty: float = 0.0
    penalizes_both: bool = False
    compares_logarithms: bool = False
    score_weight: float = 0.0
    is_mutual: bool = False
    pruned_share: float = 0.0
    fuses_dropped: bool = False

    def __post_init__(self):
        for name, value, allowed in (
            ("rule", self.rule, RULES),
            ("metric", self.metric, METRICS),
            ("scores", self.scores, (*SCORES, None)),
        ):
            if value not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(map(str, allowed))}, got {value!r}.")
        if self.scores == "mlp_shift" and self.is_before_mlp:
            raise ValueError("The shift of the MLP is known after the layer: `is_before_mlp` must be False.")

    def rounds(self, num_tokens: int, num_kept: int) -> list[tuple[int, bool]]:
        """The rounds in which tokens are merged: how many leave, at most half, and whether even ones join odd ones."""
        rounds = []
        if self.is_mutual and num_tokens - num_kept > 1:
            half = min((num_tokens - num_kept) // 2, num_tokens // 2)
            rounds, num_tokens = [(half, True)], num_tokens - half
        while num_tokens > num_kept:
            num_leaving = min(num_tokens - num_kept, num_tokens // 2)
            rounds.append((num_leaving, False))
            num_tokens -= num_leaving
        return rounds


UNREDUCED = Reduction()


def patch_grid(config: ViTConfig) -> tuple[int, int]:
    """Rows and columns of patches in an image of the usual size."""
    (height, width), (patch_height, patch_width) = map(height_and_width, (config.image_size, config.patch_size))
    return height // patch_height, width // patch_width


def count_products(config: ViTConfig, reduction: Reduction) -> int:
    """
    Multiply-accumulates of one image as executed: the products of convolution, linear layers, attention, similarities
    and means of merged tokens. The last layer computes [CLS] alone.
    """
    hidden_size, num_layers = config.hidden_size, config.num_hidden_layers
    rows, columns = reduction.grid or patch_grid(config)
    patch_height, patch_width = height_and_width(config.patch_size)
    counts = reduction.counts or (rows * columns,) * (num_layers - 1)
    total = rows * columns * config.num_channels * patch_height * patch_width * hidden_size
    for layer, (before, after) in enumerate(pairwise((rows * columns, *counts, counts[-1]))):
        is_last = layer == num_layers - 1
        num_tokens = before + NUM_PREFIX_TOKENS
        num_outputs = NUM_PREFIX_TOKENS if is_last else num_tokens
        num_mlp_tokens = after + NUM_PREFIX_TOKENS if reduction.is_before_mlp and not is_last else num_outputs
        total += 2 * (num_tokens + num_outputs) * hidden_size**2
        total += 2 * num_tokens * num_outputs * hidden_size
        total += 2 * num_mlp_tokens * hidden_size * config.intermediate_size
        if after < before:
            total += _count_reduction_products(config, reduction, before, after)
    return total + hidden_size * config.num_labels


def _count_reduction_products(config: ViTConfig, reduction: Reduction, before: int, after: int) -> int:
    hidden_size, num_tokens = config.hidden_size, before + NUM_PREFIX_TOKENS
    metric_size = hidden_size // config.num_attention_heads if reduction.metric == "mean_keys" else hidden_size
    total = 0
    if reduction.scores == "cls_attention":
        total += num_tokens * hidden_size
    if reduction.scores == "received_attention":
        total += num_tokens**2 * hidden_size
    if reduction.rule == "drop":
        return total + (before - after + 1) * hidden_size * reduction.fuses_dropped
    if reduction.rule == "sort_prune_merge":
        num_merged = _num_merged(reduction, before - after)
        return total + num_merged * after * (metric_size + hidden_size)
    for num_leaving, is_turned in reduction.rounds(before, after):
        num_references = before // 2 if is_turned else before - before // 2
        num_compared = (before - num_references) * num_references
        if reduction.rule == "merge_energetic":
            num_compared, num_references = before**2, num_leaving
        total += num_compared * metric_size + num_leaving * num_references * hidden_size
        before -= num_leaving
    return total


def _num_merged(reduction: Reduction, num_leaving: int) -> int:
    return num_leaving - int(reduction.pruned_share * num_leaving)


def equal_rates(layers: Sequence[int], num_patches: int, num_layers: int, strength: float) -> list[int]:
    """The same share of the tokens leaves each of `layers`."""
    counts, left = [], float(num_patches)
    for layer in range(num_layers - 1):
        left *= 1 - strength if layer in layers else 1
        counts.append(max(1, round(left)))
    return counts


def equal_numbers(layers: Sequence[int], num_patches: int, num_layers: int, strength: float) -> list[int]:
    """The same number of tokens leaves each of `layers`, at most half of those there."""
    counts, left = [], float(num_patches)
    for layer in range(num_layers - 1):
        if layer in layers:
            left = max(left - strength * num_patches / 2, left / 2, 1.0)
        counts.append(round(left))
    return counts


def fit_budget(config: ViTConfig, reduction: Reduction, shape: Shape, share: float) -> Reduction:
    """
    The reduction with the counts of a shape that come closest to a share of the unreduced network's products from
    below; with those it has if they are fewer.

    Raises:
        ValueError: If no strength of the shape meets the budget.
    """
    budget, num_layers = share * count_products(config, UNREDUCED), config.num_hidden_layers
    rows, columns = reduction.grid or patch_grid(config)

    def reduced(strength):
        return replace(reduction, counts=tuple(shape(rows * columns, num_layers, strength / NUM_STRENGTHS)))

    first = bisect_left(
        range(NUM_STRENGTHS), True, key=lambda strength: count_products(config, reduced(strength)) <= budget
    )
    if first == NUM_STRENGTHS:
        raise ValueError(f"No strength of this shape takes {reduction} to {share:g} of the network's products.")
    return reduced(first)


def resized_embeddings(
    model: ViTForImageClassification, pixel_values: torch.Tensor, grid: tuple[int, int] | None
) -> torch.Tensor:
    """
    Embeddings `(batch_size, 1 + num_patches, hidden_size)` of images of the usual size
    `(batch_size, num_channels, height, width)`, made smaller to a grid of patches if one is given.
    """
    embeddings = model.vit.embeddings
    if grid is None:
        return embeddings(pixel_values)
    size = [count * side for count, side in zip(grid, height_and_width(model.config.patch_size))]
    pixel_values = nn.functional.interpolate(pixel_values, size, mode="bicubic", antialias=True)
    return embeddings(pixel_values, interpolate_pos_encoding=True)


@dataclass
class _Attended:
    """What a layer's attention half computed; `(batch_size, num_heads, num_tokens, head_size)` but for the first."""

    inputs: torch.Tensor
    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor | None

    def metric(self, name: str, tokens: torch.Tensor) -> torch.Tensor:
        """`(batch_size, num_patches, metric_size)`."""
        vectors = {"outputs": tokens, "inputs": self.inputs}.get(name)
        if name == "mean_keys":
            vectors = self.keys.mean(dim=1)
        if vectors is None:
            vectors = getattr(self, name).transpose(1, 2).flatten(2)
        return vectors[:, NUM_PREFIX_TOKENS:]

    def attention(self, num_queries: int | None = None) -> torch.Tensor:
        """Averaged over heads, `(batch_size, num_queries, num_tokens)`."""
        products = self.queries[:, :, :num_queries] @ self.keys.transpose(-1, -2) * self.keys.shape[-1] ** -0.5
        return (products if self.bias is None else products + self.bias).softmax(dim=-1).mean(dim=1)


def reduced_logits(
    model: ViTForImageClassification,
    pixel_values: torch.Tensor,
    reduction: Reduction,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """
    Classify images on fewer tokens.

    Args:
        model (`ViTForImageClassification`): In evaluation mode.
        pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): Images of the usual size.
        reduction ([`Reduction`]): What leaves where.
        generator (`torch.Generator`, *optional*): Source of random scores.

    Returns:
        `torch.Tensor` of shape `(batch_size, num_labels)`.
    """
    tokens = resized_embeddings(model, pixel_values, reduction.grid)
    num_patches = tokens.shape[1] - NUM_PREFIX_TOKENS
    sizes = torch.ones(tokens.shape[0], num_patches, device=tokens.device)
    *layers, last_layer = model.vit.layers
    for index, layer in enumerate(layers):
        num_kept = reduction.counts[index] if reduction.counts else num_patches
        is_reduced = num_kept < sizes.shape[1]
        tokens, attended = _attend(layer, tokens, _attention_bias(reduction, sizes, num_patches))
        if is_reduced and reduction.is_before_mlp:
            tokens, sizes = _reduce(reduction, num_kept, index / len(layers), tokens, sizes, attended, None, generator)
        branch = layer.mlp(layer.layernorm_after(tokens))
        tokens = tokens + branch
        if is_reduced and not reduction.is_before_mlp:
            tokens, sizes = _reduce(
                reduction, num_kept, index / len(layers), tokens, sizes, attended, branch, generator
            )
    bias = _attention_bias(reduction, sizes, num_patches)
    tokens, _ = _attend(last_layer, tokens, bias, num_outputs=NUM_PREFIX_TOKENS)
    tokens = tokens + last_layer.mlp(last_layer.layernorm_after(tokens))
    return model.classifier(model.vit.layernorm(tokens)[:, 0])


def _attention_bias(reduction: Reduction, sizes: torch.Tensor, num_patches: int) -> torch.Tensor | None:
    if reduction.rule == "drop" or reduction.size_bias == 0 or sizes.shape[1] == num_patches:
        return None
    return nn.functional.pad(reduction.size_bias * sizes.log(), (NUM_PREFIX_TOKENS, 0))[:, None, None, :]


def _attend(
    layer: nn.Module, tokens: torch.Tensor, bias: torch.Tensor | None, num_outputs: int | None = None
) -> tuple[torch.Tensor, _Attended]:
    attention = layer.attention
    inputs = layer.layernorm_before(tokens)
    queries, keys, values = (
        projection(vectors).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for projection, vectors in (
            (attention.q_proj, inputs[:, :num_outputs]),
            (attention.k_proj, inputs),
            (attention.v_proj, inputs),
        )
    )
    output = nn.functional.scaled_dot_product_attention(queries, keys, values, bias, scale=attention.scaling)
    tokens = tokens[:, :num_outputs] + attention.o_proj(output.transpose(1, 2).flatten(2))
    return tokens, _Attended(inputs, queries, keys, values, bias)


def _reduce(
    reduction: Reduction,
    num_kept: int,
    depth: float,
    tokens: torch.Tensor,
    sizes: torch.Tensor,
    attended: _Attended,
    branch: torch.Tensor | None,
    generator: torch.Generator | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    prefix, patches = tokens[:, :NUM_PREFIX_TOKENS], tokens[:, NUM_PREFIX_TOKENS:]
    scores = _scores(reduction, sizes, attended, branch, generator)
    if reduction.rule == "drop":
        patches, sizes = _drop(reduction, num_kept, patches, sizes, scores)
        return torch.cat((prefix, patches), dim=1), sizes
    metric = nn.functional.normalize(attended.metric(reduction.metric, tokens), dim=-1)
    if reduction.rule == "sort_prune_merge":
        matchings = [(num_kept, False)]
    else:
        matchings = reduction.rounds(patches.shape[1], num_kept)
    for number, is_turned in matchings:
        if reduction.rule == "sort_prune_merge":
            matching = _match_sorted(reduction, number, metric, scores)
        elif reduction.rule == "merge_energetic":
            matching = _match_energetic(number, metric, FIRST_MARGIN * (1 - depth))
        else:
            matching = _match_pairs(reduction, number, is_turned, metric, sizes, scores)
        patches, sizes, positions = _merge(reduction, patches, sizes, scores, matching)
        metric = take_tokens(metric, positions)
        scores = None if scores is None else scores.gather(1, positions)
    return torch.cat((prefix, patches), dim=1), sizes


def _scores(
    reduction: Reduction,
    sizes: torch.Tensor,
    attended: _Attended,
    branch: torch.Tensor | None,
    generator: torch.Generator | None,
) -> torch.Tensor | None:
    """`(batch_size, num_patches)`; those of an attention are its logarithm."""
    if reduction.scores is None:
        return None
    if reduction.scores == "random":
        return torch.rand(sizes.shape, generator=generator).to(sizes.device)
    if reduction.scores == "mlp_shift":
        return standardize(branch[:, NUM_PREFIX_TOKENS:].norm(dim=-1), torch.ones_like(sizes))
    num_queries = NUM_PREFIX_TOKENS if reduction.scores == "cls_attention" else None
    return attended.attention(num_queries).mean(dim=1)[:, NUM_PREFIX_TOKENS:].log()


def _drop(
    reduction: Reduction, num_kept: int, patches: torch.Tensor, sizes: torch.Tensor, scores: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    order = scores.argsort(dim=-1, descending=True)
    num_whole = num_kept - reduction.fuses_dropped
    kept = order[:, :num_whole].sort(dim=-1).values
    kept_patches, sizes = take_tokens(patches, kept), sizes[:, :num_kept]
    if reduction.fuses_dropped:
        dropped = order[:, num_whole:]
        weights = scores.gather(1, dropped).softmax(dim=-1).unsqueeze(1)
        kept_patches = torch.cat((kept_patches, weights @ take_tokens(patches, dropped)), dim=1)
    return kept_patches, sizes


def _match_pairs(
    reduction: Reduction,
    num_leaving: int,
    is_turned: bool,
    metric: torch.Tensor,
    sizes: torch.Tensor,
    scores: torch.Tensor | None,
) -> Matching:
    """Bipartite matching by similarity less the penalties of one or both tokens."""
    positions = torch.arange(metric.shape[1], device=metric.device)
    candidates, references = positions[1 - is_turned :: 2], positions[int(is_turned) :: 2]
    similarity = metric[:, candidates] @ metric[:, references].transpose(1, 2)
    if reduction.compares_logarithms:
        similarity = ((1 + similarity) / 2).clamp(min=1e-6).log()
    penalty = reduction.size_penalty * sizes.log()
    if scores is not None:
        penalty = penalty + reduction.score_penalty * scores
    if reduction.penalizes_both:
        similarity = similarity - penalty[:, None, references]
    willingness, nearest = similarity.max(dim=-1)
    order = (willingness - penalty[:, candidates]).argsort(dim=-1, descending=True)
    leaving = order[:, :num_leaving]
    return Matching(
        candidates[leaving],
        nearest.gather(1, leaving),
        references.expand(len(metric), -1),
        candidates[order[:, num_leaving:]],
    )


def _match_energetic(num_leaving: int, metric: torch.Tensor, margin: float) -> Matching:
    """Every second of the tokens that are similar to many joins the most similar of those between them."""
    similarity = metric @ metric.transpose(1, 2)
    energy = torch.where(similarity >= margin, similarity, (similarity - margin).exp() - 1).mean(dim=-1)
    order = energy.argsort(dim=-1, descending=True)
    leaving, references = order[:, 0 : 2 * num_leaving : 2], order[:, 1 : 2 * num_leaving : 2]
    columns = references.unsqueeze(1).expand(-1, num_leaving, -1)
    nearest = take_tokens(similarity, leaving).gather(2, columns).argmax(dim=-1)
    return Matching(leaving, nearest, references, order[:, 2 * num_leaving :])


def _match_sorted(reduction: Reduction, num_kept: int, metric: torch.Tensor, scores: torch.Tensor) -> Matching:
    order = scores.argsort(dim=-1, descending=True)
    num_merged = _num_merged(reduction, metric.shape[1] - num_kept)
    kept, leaving = order[:, :num_kept], order[:, num_kept : num_kept + num_merged]
    nearest = (take_tokens(metric, leaving) @ take_tokens(metric, kept).transpose(1, 2)).argmax(dim=-1)
    return Matching(leaving, nearest, kept, order[:, :0])


def _merge(
    reduction: Reduction, patches: torch.Tensor, sizes: torch.Tensor, scores: torch.Tensor | None, matching: Matching
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The tokens that are left, their sizes and their positions before, ascending."""
    references, leaving = matching.references, matching.leaving
    is_joined = matching.joined.unsqueeze(1) == torch.arange(references.shape[1], device=patches.device)[:, None]

    def joined(values):
        return values.gather(1, references) + (is_joined * values.gather(1, leaving).unsqueeze(1)).sum(dim=-1)

    weights = (
        sizes if scores is None or not reduction.score_weight else sizes * (reduction.score_weight * scores).exp()
    )
    sums = take_tokens(patches, references) * weights.gather(1, references).unsqueeze(-1)
    sums = sums + (is_joined * weights.gather(1, leaving).unsqueeze(1)) @ take_tokens(patches, leaving)
    means, joined_sizes = sums / joined(weights).unsqueeze(-1), joined(sizes)
    if reduction.keeps_norm:
        norms = joined(sizes * patches.norm(dim=-1)) / joined_sizes
        means = means * (norms / means.norm(dim=-1)).unsqueeze(-1)
    positions, order = torch.cat((matching.remaining, references), dim=1).sort(dim=-1)
    patches = torch.cat((take_tokens(patches, matching.remaining), means), dim=1)
    sizes = torch.cat((sizes.gather(1, matching.remaining), joined_sizes), dim=1)
    return take_tokens(patches, order), sizes.gather(1, order), positions


__all__ = [
    "METRICS",
    "RULES",
    "SCORES",
    "UNREDUCED",
    "Reduction",
    "count_products",
    "equal_numbers",
    "equal_rates",
    "fit_budget",
    "patch_grid",
    "reduced_logits",
    "resized_embeddings",
]
