"""Pruning schedules and what they cost: the published ones, tokens per layer, analytic GFLOPs."""

from collections.abc import Sequence
from dataclasses import dataclass

from .configuration_tnt import TntDeiTConfig, TntViTConfig, count_patches, height_and_width


# fvcore counts five operations for each element of an affine LayerNorm.
LAYER_NORM_OPERATIONS = 5


@dataclass(frozen=True)
class Schedule:
    """A named pruning schedule; the fields are those of [`TokenPruningFields`]."""

    name: str
    prune_layers: tuple[int, ...]
    keep_rates: tuple[float, ...]
    num_similar_tokens: int = 0


# The schedules of the authors' README: https://github.com/mx-ethan-rao/tnt/blob/d095619/README.md#evaluation.
PUBLISHED_SCHEDULES = {
    schedule.name: schedule
    for schedule in (
        Schedule("full", (), ()),
        Schedule("single", (2,), (0.6,), 25),
        Schedule("multi", (2, 3, 4), (0.8, 0.8, 0.8), 40),
    )
}


def parse_schedule(text: str) -> Schedule:
    """
    A schedule written as the name of a published one or as `LAYERS:RATES[:SIMILAR_TOKENS]`, such as `2,3:0.7,0.7:30`.

    Raises:
        ValueError: If the text is neither.
    """
    if text in PUBLISHED_SCHEDULES:
        return PUBLISHED_SCHEDULES[text]
    try:
        layers, rates, num_similar_tokens = text.split(":") if text.count(":") == 2 else (*text.split(":"), "0")
        return Schedule(
            name=text,
            prune_layers=tuple(int(layer) for layer in layers.split(",")),
            keep_rates=tuple(float(rate) for rate in rates.split(",")),
            num_similar_tokens=int(num_similar_tokens),
        )
    except ValueError:
        raise ValueError(
            f"A schedule must be one of {', '.join(PUBLISHED_SCHEDULES)} or LAYERS:RATES[:SIMILAR_TOKENS] such as "
            f"2,3:0.7,0.7:30, got {text!r}."
        ) from None


def tokens_per_layer(config: TntViTConfig | TntDeiTConfig, image_size: int | Sequence[int] | None = None) -> list[int]:
    """
    Number of patch tokens that enter each layer; prefix tokens ([CLS], [DIST]) come on top.

    Args:
        config ([`TntViTConfig`] or [`TntDeiTConfig`]): Model and schedule.
        image_size (`int` or `(height, width)`, *optional*): Pixels; `config.image_size` if None.

    Raises:
        ValueError: If the schedule cannot be carried out at this number of patches.
    """
    return config.patch_token_counts(_num_patches(config, image_size))[:-1]


def count_gflops(config: TntViTConfig | TntDeiTConfig, image_size: int | Sequence[int] | None = None) -> float:
    """
    Cost of one image at inference in GFLOPs as the literature counts them: 1e9 multiply-accumulates.

    Equal to fvcore's count with the attention products included: convolution, linear layers, both attention products,
    LayerNorm (5 operations per element), scoring heads and the similarity product. Softmax, GELU, biases, sorting and
    gathering are not counted.

    Args:
        config ([`TntViTConfig`] or [`TntDeiTConfig`]): Model and schedule.
        image_size (`int` or `(height, width)`, *optional*): Pixels; `config.image_size` if None.

    Raises:
        ValueError: If the schedule cannot be carried out at this number of patches.
    """
    num_patches = _num_patches(config, image_size)
    counts = config.patch_token_counts(num_patches)
    hidden_size, num_prefix_tokens = config.hidden_size, config.num_prefix_tokens
    patch_height, patch_width = height_and_width(config.patch_size)

    total = num_patches * config.num_channels * patch_height * patch_width * hidden_size
    if len(config.prune_layers) > 1:
        total += _similarity_product(num_patches, config.num_similar_tokens, hidden_size)
    for layer, num_patch_tokens in enumerate(counts[:-1]):
        num_tokens = num_patch_tokens + num_prefix_tokens
        total += 4 * num_tokens * hidden_size**2  # query, key, value and output projections
        total += 2 * num_tokens**2 * hidden_size  # queries times keys, attention times values
        total += 2 * num_tokens * hidden_size * config.intermediate_size
        total += 2 * num_tokens * hidden_size * LAYER_NORM_OPERATIONS
        if counts[layer + 1] < num_patch_tokens:
            total += num_patch_tokens * hidden_size
            if len(config.prune_layers) == 1:
                num_selected = counts[layer + 1] + config.num_similar_tokens
                total += _similarity_product(num_selected, config.num_similar_tokens, hidden_size)
    total += (counts[-1] + num_prefix_tokens) * hidden_size * LAYER_NORM_OPERATIONS
    total += num_prefix_tokens * hidden_size * config.num_labels  # one classifier for each prefix token
    return total / 1e9


def _similarity_product(num_tokens: int, num_similar_tokens: int, hidden_size: int) -> int:
    if num_similar_tokens == 0:
        return 0
    return (num_tokens // 2) * (num_tokens - num_tokens // 2) * hidden_size


def _num_patches(config: TntViTConfig | TntDeiTConfig, image_size: int | Sequence[int] | None) -> int:
    return count_patches(config.image_size if image_size is None else image_size, config.patch_size)


__all__ = ["PUBLISHED_SCHEDULES", "Schedule", "count_gflops", "parse_schedule", "tokens_per_layer"]
