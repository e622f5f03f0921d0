"""
A plain ViT on fewer tokens: one forward pass in which every choice of a token reduction is a setting, what it costs,
and the settings that meet a budget.

The methods of the papers are settings of it, and so are their combinations with smaller images.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise

import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from tnt_hf.schedules_tnt import height_and_width
from tnt_hf.token_reduction_tnt import take_tokens


RULES = ("merge", "merge_energetic", "sort_prune_merge", "drop")
METRICS = ("outputs", "inputs", "queries", "keys", "mean_keys", "values")
SCORES = ("random", "cls_attention", "received_attention", "mlp_shift")
PLACES = ("before_attention", "before_mlp", "after_layer")
NUM_PREFIX_TOKENS = 1
NUM_STRENGTHS = 4096

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
            odd places to even ones; `"merge_energetic"` does so in the order of their energy, how similar they are to
            all others (PiToMe); `"sort_prune_merge"` joins the tokens of lower scores to the most similar of the
            others (DiffRate); `"drop"` deletes those of the lowest scores.
        metric (`str`): What is compared by its cosine: the tokens that are to be merged (`"outputs"`), the normalized
            inputs of the attention, or queries, keys or values of all heads side by side, or keys averaged over heads.
        place (`str`): Where in a layer tokens leave. `"before_attention"` fuses the attention weights of the longer
            sequence along with the tokens (one-step-ahead attention).
        size_bias (`float`): Attention scores are raised by this times the logarithm of a token's patches.
        size_weight (`float`): Tokens are averaged in proportion to their patches to this power.
        shrinks_sizes (`bool`): Whether a token that leaves counts for its patches times its similarity from then on.
        keeps_norm (`bool`): Whether merged tokens are scaled to the mean norm of their members.
        scores (`str`, *optional*): One of `SCORES`, higher is more relevant.
        score_penalty (`float`): What a unit of the scores takes off the similarity of a token that leaves.
        size_penalty (`float`): What a unit of the logarithm of its patches takes off.
        penalizes_both (`bool`): Whether the token that is joined counts in these penalties as well.
        compares_logarithms (`bool`): Whether similarity is the logarithm of (1 + cosine) / 2.
        weighs_distances (`bool`): Whether similarity is instead (cosine - 1) times the square root of a * b / (a + b),
            for sizes a and b of the two tokens.
        score_weight (`float`): Tokens are averaged in proportion to exp(this times their score) as well.
        is_mutual (`bool`): Whether half of those that leave do so in the other direction, even places to the odd ones
            that are left.
        first_margin (`float`): Margin of the energy in the first layer; it falls to 0 at the end of the network.
        protects_from (`float`): Share of the depth from which only the tokens of the highest energy are compared, as
            few as can be.
        pruned_share (`float`): For `"sort_prune_merge"`, the share of the leaving tokens that is deleted.
        fuses_dropped (`bool`): Whether one of the tokens kept is the mean of those dropped.
    """

    counts: tuple[int, ...] = ()
    grid: tuple[int, int] | None = None
    rule: str = "merge"
    metric: str = "keys"
    place: str = "before_mlp"
    size_bias: float = 1.0
    size_weight: float = 1.0
    shrinks_sizes: bool = False
    keeps_norm: bool = False
    scores: str | None = None
    score_penalty: float = 0.0
    size_penalty: float = 0.0
    penalizes_both: bool = False
    compares_logarithms: bool = False
    weighs_distances: bool = False
    score_weight: float = 0.0
    is_mutual: bool = False
    first_margin: float = 0.0
    protects_from: float = 0.0
    pruned_share: float = 0.0
    fuses_dropped: bool = False

    def __post_init__(self):
        for name, value, allowed in (
            ("rule", self.rule, RULES),
            ("metric", self.metric, METRICS),
            ("scores", self.scores, (*SCORES, None)),
            ("place", self.place, PLACES),
        ):
            if value not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(map(str, allowed))}, got {value!r}.")
        for scores, place in (("mlp_shift", "after_layer"), ("received_attention", "before_attention")):
            if self.scores == scores and self.place != place:
                raise ValueError(f"`place` must be {place} for the scores {scores}, got {self.place!r}.")
        if self.metric == "values" and self.place == "before_attention":
            raise ValueError("`metric` cannot be values before the attention: they are of the shorter sequence.")


UNREDUCED = Reduction()


def patch_grid(config: ViTConfig) -> tuple[int, int]:
    """Rows and columns of patches in an image of the usual size."""
    (height, width), (patch_height, patch_width) = map(height_and_width, (config.image_size, config.patch_size))
    return height // patch_height, width // patch_width


def count_products(config: ViTConfig, reduction: Reduction) -> int:
    """
    Multiply-accumulates of one image as executed: the products of convolution, linear layers, attention and
    similarities; tokens are added up without. The last layer computes [CLS] alone.
    """
    hidden_size, num_layers = config.hidden_size, config.num_hidden_layers
    rows, columns = reduction.grid or patch_grid(config)
    patch_height, patch_width = height_and_width(config.patch_size)
    counts = reduction.counts or (rows * columns,) * (num_layers - 1)
    total = rows * columns * config.num_channels * patch_height * patch_width * hidden_size
    for layer, (before, after) in enumerate(pairwise((rows * columns, *counts, counts[-1]))):
        num_tokens, num_left = before + NUM_PREFIX_TOKENS, after + NUM_PREFIX_TOKENS
        num_queries = num_mixed = num_outputs = num_mlp_tokens = num_tokens
        if layer == num_layers - 1:
            num_queries = num_outputs = num_mlp_tokens = NUM_PREFIX_TOKENS
        elif reduction.place == "before_attention":
            num_mixed = num_outputs = num_mlp_tokens = num_left
        elif reduction.place == "before_mlp":
            num_mlp_tokens = num_left
        total += (num_queries + num_tokens + num_mixed + num_outputs) * hidden_size**2
        total += (num_queries * num_tokens + num_outputs * num_mixed) * hidden_size
        total += 2 * num_mlp_tokens * hidden_size * config.intermediate_size
        if after < before:
            total += _count_reduction_products(config, reduction, before, after)
    return total + hidden_size * config.num_labels


def _count_reduction_products(config: ViTConfig, reduction: Reduction, before: int, after: int) -> int:
    hidden_size = config.hidden_size
    metric_size = hidden_size // config.num_attention_heads if reduction.metric == "mean_keys" else hidden_size
    total = (before + NUM_PREFIX_TOKENS) * hidden_size if reduction.scores == "cls_attention" else 0
    if reduction.rule == "sort_prune_merge":
        return total + _num_merged(reduction, before - after) * after * metric_size
    if reduction.rule == "drop":
        return total
    for num_tokens, _ in _rounds(before, after):
        half = num_tokens // 2
        num_compared = num_tokens**2 if reduction.rule == "merge_energetic" else half * (num_tokens - half)
        total += num_compared * metric_size
    return total


def _rounds(num_tokens: int, num_kept: int) -> Iterator[tuple[int, int]]:
    """The rounds in which tokens are merged: how many there are and how many of them leave, at most half."""
    while num_tokens > num_kept:
        num_leaving = min(num_tokens - num_kept, num_tokens // 2)
        yield num_tokens, num_leaving
        num_tokens -= num_leaving


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
    values: torch.Tensor | None
    bias: torch.Tensor | None

    def metric(self, name: str, tokens: torch.Tensor) -> torch.Tensor:
        """`(batch_size, num_patches, metric_size)`, of length 1."""
        vectors = {"outputs": tokens, "inputs": self.inputs}.get(name)
        if name == "mean_keys":
            vectors = self.keys.mean(dim=1)
        if vectors is None:
            vectors = getattr(self, name).transpose(1, 2).flatten(2)
        return nn.functional.normalize(vectors[:, NUM_PREFIX_TOKENS:], dim=-1)

    def attention(self, num_queries: int | None = None) -> torch.Tensor:
        """`(batch_size, num_heads, num_queries, num_tokens)`."""
        products = self.queries[:, :, :num_queries] @ self.keys.transpose(-1, -2) * self.keys.shape[-1] ** -0.5
        return (products if self.bias is None else products + self.bias).softmax(dim=-1)

    @cached_property
    def full_attention(self) -> torch.Tensor:
        return self.attention()


@dataclass
class _Fusion:
    """
    Which tokens of a sequence, [CLS] first, become which of a shorter one.

    Args:
        groups (`torch.LongTensor` of shape `(batch_size, num_tokens)`): For each token its place in the shorter one.
        weights (`torch.Tensor` of shape `(batch_size, num_tokens)`): In proportion to which they are averaged.
        sizes (`torch.Tensor` of shape `(batch_size, num_tokens)`): The patches they are to count for.
        num_groups (`int`): Length of the shorter sequence.
    """

    groups: torch.Tensor
    weights: torch.Tensor
    sizes: torch.Tensor
    num_groups: int

    def add(self, values: torch.Tensor) -> torch.Tensor:
        """`(batch_size, num_tokens, size)` -> `(batch_size, num_groups, size)`."""
        batch_size, _, size = values.shape
        rows = self.groups + torch.arange(batch_size, device=values.device).unsqueeze(-1) * self.num_groups
        sums = values.new_zeros(batch_size * self.num_groups, size)
        return sums.index_add(0, rows.flatten(), values.flatten(0, 1)).view(batch_size, self.num_groups, size)

    def average(self, values: torch.Tensor) -> torch.Tensor:
        weights = self.weights.unsqueeze(-1)
        return self.add(weights * values) / self.add(weights)

    def fuse(self, tokens: torch.Tensor, keeps_norm: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens of the shorter sequence and their sizes."""
        means = self.average(tokens)
        if keeps_norm:
            means = nn.functional.normalize(means, dim=-1) * self.average(tokens.norm(dim=-1, keepdim=True))
        return means, self.add(self.sizes.unsqueeze(-1)).squeeze(-1)

    def fuse_attention(self, attention: torch.Tensor) -> torch.Tensor:
        """Weights of keys that become one are added, those of queries averaged."""
        num_heads, num_queries = attention.shape[1:3]
        by_key = self.add(attention.permute(0, 3, 1, 2).flatten(2)).unflatten(2, (num_heads, num_queries))
        by_query = self.average(by_key.permute(0, 3, 2, 1).flatten(2)).unflatten(2, (num_heads, self.num_groups))
        return by_query.transpose(1, 2)


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
    num_tokens = tokens.shape[1]
    sizes = torch.ones(tokens.shape[:2], device=tokens.device)
    *layers, last_layer = model.vit.layers
    for index, layer in enumerate(layers):
        num_kept = reduction.counts[index] if reduction.counts else num_tokens - NUM_PREFIX_TOKENS
        place = reduction.place if num_kept + NUM_PREFIX_TOKENS < tokens.shape[1] else None
        choose = partial(_choose, reduction, num_kept, index / (len(layers) + 1), generator)
        bias = _attention_bias(reduction, sizes, num_tokens)
        if place == "before_attention":
            tokens, sizes = _attend_one_step_ahead(layer, tokens, sizes, bias, choose, reduction.keeps_norm)
        else:
            tokens, attended = _attend(layer, tokens, bias)
        if place == "before_mlp":
            tokens, sizes = choose(tokens, sizes, attended).fuse(tokens, reduction.keeps_norm)
        branch = layer.mlp(layer.layernorm_after(tokens))
        shift = (branch - tokens).norm(dim=-1) if place == "after_layer" else None
        tokens = tokens + branch
        if place == "after_layer":
            tokens, sizes = choose(tokens, sizes, attended, shift).fuse(tokens, reduction.keeps_norm)
    bias = _attention_bias(reduction, sizes, num_tokens)
    tokens, _ = _attend(last_layer, tokens, bias, num_outputs=NUM_PREFIX_TOKENS)
    tokens = tokens + last_layer.mlp(last_layer.layernorm_after(tokens))
    return model.classifier(model.vit.layernorm(tokens)[:, 0])


def _attention_bias(reduction: Reduction, sizes: torch.Tensor, num_tokens: int) -> torch.Tensor | None:
    if reduction.rule == "drop" or reduction.size_bias == 0 or sizes.shape[1] == num_tokens:
        return None
    return (reduction.size_bias * sizes.log())[:, None, None, :]


def _heads(projection: nn.Linear, vectors: torch.Tensor, head_size: int) -> torch.Tensor:
    return projection(vectors).unflatten(-1, (-1, head_size)).transpose(1, 2)


def _attend(
    layer: nn.Module, tokens: torch.Tensor, bias: torch.Tensor | None, num_outputs: int | None = None
) -> tuple[torch.Tensor, _Attended]:
    attention, inputs = layer.attention, layer.layernorm_before(tokens)
    queries = _heads(attention.q_proj, inputs[:, :num_outputs], attention.head_dim)
    keys = _heads(attention.k_proj, inputs, attention.head_dim)
    values = _heads(attention.v_proj, inputs, attention.head_dim)
    output = nn.functional.scaled_dot_product_attention(queries, keys, values, bias, scale=attention.scaling)
    tokens = tokens[:, :num_outputs] + attention.o_proj(output.transpose(1, 2).flatten(2))
    return tokens, _Attended(inputs, queries, keys, values, bias)


def _attend_one_step_ahead(
    layer: nn.Module,
    tokens: torch.Tensor,
    sizes: torch.Tensor,
    bias: torch.Tensor | None,
    choose: Callable[..., _Fusion],
    keeps_norm: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    attention, inputs = layer.attention, layer.layernorm_before(tokens)
    queries = _heads(attention.q_proj, inputs, attention.head_dim)
    keys = _heads(attention.k_proj, inputs, attention.head_dim)
    attended = _Attended(inputs, queries, keys, None, bias)
    fusion = choose(tokens, sizes, attended)
    tokens, sizes = fusion.fuse(tokens, keeps_norm)
    values = _heads(attention.v_proj, layer.layernorm_before(tokens), attention.head_dim)
    output = fusion.fuse_attention(attended.full_attention) @ values
    return tokens + attention.o_proj(output.transpose(1, 2).flatten(2)), sizes


def _choose(
    reduction: Reduction,
    num_kept: int,
    depth: float,
    generator: torch.Generator | None,
    tokens: torch.Tensor,
    sizes: torch.Tensor,
    attended: _Attended,
    shift: torch.Tensor | None = None,
) -> _Fusion:
    """What becomes of the patches, of which `num_kept` are to be left, in the order of the image."""
    patch_sizes = sizes[:, NUM_PREFIX_TOKENS:]
    scores = _scores(reduction, patch_sizes, attended, shift, generator)
    counted = torch.ones_like(patch_sizes)
    if reduction.rule == "drop":
        targets = _drop(reduction, num_kept, scores)
    else:
        metric = attended.metric(reduction.metric, tokens)
        if reduction.rule == "sort_prune_merge":
            targets, similarity = _sort(reduction, num_kept, metric, scores)
            counted = similarity.clamp(min=0) if reduction.shrinks_sizes else counted
        else:
            targets = _match(reduction, num_kept, depth, metric, patch_sizes, scores)
    is_left = targets >= 0
    weights = patch_sizes**reduction.size_weight * is_left
    if reduction.score_weight:
        weights = weights * (reduction.score_weight * scores).exp()
    is_kept = targets == torch.arange(targets.shape[1], device=targets.device)
    groups = (is_kept.cumsum(dim=-1) - 1).gather(1, targets.clamp(min=0)) + NUM_PREFIX_TOKENS
    prefix = sizes[:, :NUM_PREFIX_TOKENS]
    return _Fusion(
        torch.cat((torch.zeros_like(prefix, dtype=torch.long), groups), dim=1),
        torch.cat((prefix, weights), dim=1),
        torch.cat((prefix, patch_sizes * counted * is_left), dim=1),
        num_kept + NUM_PREFIX_TOKENS,
    )


def _scores(
    reduction: Reduction,
    sizes: torch.Tensor,
    attended: _Attended,
    shift: torch.Tensor | None,
    generator: torch.Generator | None,
) -> torch.Tensor | None:
    """`(batch_size, num_patches)`; those of an attention are its logarithm."""
    if reduction.scores is None:
        return None
    if reduction.scores == "random":
        return torch.rand(sizes.shape, generator=generator).to(sizes.device)
    if reduction.scores == "mlp_shift":
        return shift[:, NUM_PREFIX_TOKENS:]
    is_of_cls = reduction.scores == "cls_attention"
    attention = attended.attention(NUM_PREFIX_TOKENS) if is_of_cls else attended.full_attention
    return attention.mean(dim=(1, 2))[:, NUM_PREFIX_TOKENS:].log()


# What follows tells for each patch the one that it becomes part of: `(batch_size, num_patches)`, itself if it is kept,
# -1 if it is deleted.


def _drop(reduction: Reduction, num_kept: int, scores: torch.Tensor) -> torch.Tensor:
    order = scores.argsort(dim=-1, descending=True)
    kept = order[:, : num_kept - reduction.fuses_dropped]
    targets = torch.full_like(order, -1)
    if reduction.fuses_dropped:
        targets = order[:, num_kept - 1 : num_kept].expand_as(order)
    return targets.scatter(1, kept, kept)


def _sort(
    reduction: Reduction, num_kept: int, metric: torch.Tensor, scores: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Also how similar each patch is to the one that it becomes part of."""
    order = scores.argsort(dim=-1, descending=True)
    num_merged = _num_merged(reduction, metric.shape[1] - num_kept)
    kept, leaving = order[:, :num_kept], order[:, num_kept : num_kept + num_merged]
    similarity, nearest = (take_tokens(metric, leaving) @ take_tokens(metric, kept).transpose(1, 2)).max(dim=-1)
    targets = torch.full_like(order, -1).scatter(1, kept, kept).scatter(1, leaving, kept.gather(1, nearest))
    return targets, torch.ones_like(scores).scatter(1, leaving, similarity)


def _match(
    reduction: Reduction,
    num_kept: int,
    depth: float,
    metric: torch.Tensor,
    sizes: torch.Tensor,
    scores: torch.Tensor | None,
) -> torch.Tensor:
    """Bipartite matching; if more than half leave, in rounds in which merged tokens are compared as before."""
    positions = torch.arange(metric.shape[1], device=metric.device).expand(metric.shape[:2])
    targets = left = positions
    penalty = reduction.size_penalty * sizes.log()
    if scores is not None:
        penalty = penalty + reduction.score_penalty * scores
    for num_tokens, num_leaving in _rounds(metric.shape[1], num_kept):
        vectors = take_tokens(metric, left)
        if reduction.rule == "merge_energetic":
            similarity = vectors @ vectors.transpose(1, 2)
            energy = nn.functional.elu(similarity - reduction.first_margin * (1 - depth)).mean(dim=-1)
            order = energy.argsort(dim=-1, descending=True)
            order = order[:, : 2 * num_leaving] if depth >= reduction.protects_from else order
            columns = order[:, 1::2].unsqueeze(1).expand(-1, order[:, ::2].shape[1], -1)
            similarity = take_tokens(similarity, order[:, ::2]).gather(2, columns)
            candidates, references = left.gather(1, order[:, ::2]), left.gather(1, order[:, 1::2])
        else:
            similarity = vectors[:, 1::2] @ vectors[:, ::2].transpose(1, 2)
            candidates, references = left[:, 1::2], left[:, ::2]
        if reduction.compares_logarithms:
            similarity = ((1 + similarity) / 2).clamp(min=1e-6).log()
        if reduction.weighs_distances:
            size, other = sizes.gather(1, candidates).unsqueeze(2), sizes.gather(1, references).unsqueeze(1)
            similarity = (similarity - 1) * (size * other / (size + other)).sqrt()
        similarity = similarity - penalty.gather(1, candidates).unsqueeze(2)
        if reduction.penalizes_both:
            similarity = similarity - penalty.gather(1, references).unsqueeze(1)
        num_first = num_leaving // 2 if reduction.is_mutual else num_leaving
        leaving, nearest, staying = _most_similar(similarity, num_first)
        targets = targets.scatter(1, candidates.gather(1, leaving), references.gather(1, nearest))
        if reduction.is_mutual:
            candidates = candidates.gather(1, staying)
            leaving, nearest, _ = _most_similar(
                take_tokens(similarity, staying).transpose(1, 2), num_leaving - num_first
            )
            targets = targets.scatter(1, references.gather(1, leaving), candidates.gather(1, nearest))
        targets = targets.gather(1, targets)
        left = (targets != positions).long().argsort(dim=-1, stable=True)[:, : num_tokens - num_leaving]
    return targets


def _most_similar(similarity: torch.Tensor, num_leaving: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The rows with the highest maxima, where these are, and the other rows: `(batch_size, num_rows, num_columns)` ->
    twice `(batch_size, num_leaving)`, `(batch_size, num_rows - num_leaving)`.
    """
    willingness, nearest = similarity.max(dim=-1)
    order = willingness.argsort(dim=-1, descending=True)
    leaving = order[:, :num_leaving]
    return leaving, nearest.gather(1, leaving), order[:, num_leaving:]


__all__ = [
    "METRICS",
    "PLACES",
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
