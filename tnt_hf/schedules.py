"""Pruning schedules and what they cost: the published ones, their text form, tokens per layer, GFLOPs, budgets."""

from collections.abc import Sequence

from .configuration_tnt import Schedule, TntDeiTConfig, TntViTConfig, count_gflops, count_patches, schedule_for


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
    num_patches = count_patches(config.image_size if image_size is None else image_size, config.patch_size)
    return config.patch_token_counts(num_patches)[:-1]


__all__ = ["PUBLISHED_SCHEDULES", "Schedule", "count_gflops", "parse_schedule", "schedule_for", "tokens_per_layer"]
