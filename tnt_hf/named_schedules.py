"""Schedules by name: the published ones, their text form, and what a text means for a model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .configuration_tnt import TntDeiTConfig, TntViTConfig
from .schedules_tnt import UNPRUNED, Schedule, height_and_width, schedule_for


# The schedules of the authors' README: https://github.com/mx-ethan-rao/tnt/blob/d095619/README.md#evaluation.
PUBLISHED_SCHEDULES = {
    schedule.name: schedule
    for schedule in (
        UNPRUNED,
        Schedule("single", (2,), (0.6,), 25),
        Schedule("multi", (2, 3, 4), (0.8, 0.8, 0.8), 40),
    )
}


SCHEDULE_FORMS = (
    f"{', '.join(PUBLISHED_SCHEDULES)}, a reduction of the executed FLOPs (2x) or LAYERS:RATES[:SIMILAR_TOKENS] "
    "(2,3:0.7,0.7:30), each also on images made smaller: to pixels (2x@160) or, with full and 2x, to a share of the "
    "side up to 1 (2x@0.7)"
)


@dataclass(frozen=True)
class FlopsReduction:
    """
    A budget, named as it was written, that becomes a schedule once the model is known: [`resolve_schedules`].

    Args:
        name (`str`): As it was written.
        factor (`float`): How many times fewer multiply-accumulates are executed; 1 leaves all tokens.
        compute_size (*optional*): Pixels of the smaller images, or a `float`, the share of the usual side.
    """

    name: str
    factor: float
    compute_size: tuple[int, ...] | float | None = None


def parse_schedule(text: str) -> Schedule | FlopsReduction:
    """
    A schedule written as the name of a published one, as a reduction such as `2x`, which executes half of the
    multiply-accumulates, or as `LAYERS:RATES[:SIMILAR_TOKENS]`, such as `2,3:0.7,0.7:30`; with `@SIZE` behind it
    images are made smaller first: `2x@160`, `full@160x96`, or `full@0.7` and `2x@0.7` for 0.7 of the usual side.

    Raises:
        ValueError: If the text is none of these.
    """
    if text in PUBLISHED_SCHEDULES:
        return PUBLISHED_SCHEDULES[text]
    tokens, at, size = text.partition("@")
    try:
        if "." in size and (tokens == UNPRUNED.name or tokens.endswith("x")):
            factor, share = 1.0 if tokens == UNPRUNED.name else float(tokens.removesuffix("x")), float(size)
            if not 0 < share <= 1:
                raise ValueError
            return FlopsReduction(text, factor, share)
        size = tuple(map(int, size.split("x"))) * (1 if "x" in size else 2) if at else None
        if tokens in PUBLISHED_SCHEDULES:
            return replace(PUBLISHED_SCHEDULES[tokens], name=text, compute_size=size)  # type: ignore[arg-type]
        if tokens.endswith("x"):
            return FlopsReduction(text, float(tokens.removesuffix("x")), size)
        layers, rates, num_similar_tokens = tokens.split(":") if tokens.count(":") == 2 else (*tokens.split(":"), "0")
        fields = [int(layer) for layer in layers.split(",")], [float(rate) for rate in rates.split(",")]
        fields = *fields, int(num_similar_tokens), size
    except ValueError:
        raise ValueError(f"A schedule must be one of {SCHEDULE_FORMS}, got {text!r}.") from None
    return Schedule(text, *fields)  # type: ignore[arg-type]


def resolve_schedules(
    config: TntViTConfig | TntDeiTConfig,
    schedules: Sequence[Schedule | FlopsReduction],
    cost: Callable[[Any, Schedule], float] | None = None,
) -> list[Schedule]:
    """
    The schedules as a model carries them out at its own image size: a reduction becomes that of [`schedule_for`],
    under the name it was written as, of the `cost` that is given, or of the executed multiply-accumulates.

    Raises:
        ValueError: If the model cannot carry out one of them, or two have the same name.
    """
    names = [schedule.name for schedule in schedules]
    if len(set(names)) < len(names):
        raise ValueError(f"The schedules must differ, got {', '.join(names)}.")
    resolved = []
    for schedule in schedules:
        try:
            if isinstance(schedule, FlopsReduction):
                size = schedule.compute_size
                if isinstance(size, float):
                    size = share_in_pixels(size, config.image_size, config.patch_size)
                found = schedule_for(config, flops_reduction=schedule.factor, cost=cost, compute_size=size)
                schedule = replace(found, name=schedule.name)
            if config.reduction_steps(schedule=schedule):
                config.check_attention()
        except ValueError as error:
            raise ValueError(f"Schedule '{schedule.name}' does not fit this model: {error}") from error
        resolved.append(schedule)
    return resolved


def share_in_pixels(share: float, image_size: int | Sequence[int], patch_size: int | Sequence[int]) -> tuple[int, ...]:
    """Height and width of images whose sides are a share of `image_size`, to the nearest whole patch."""
    sides = zip(height_and_width(image_size), height_and_width(patch_size))
    return tuple(max(1, round(share * side / patch)) * patch for side, patch in sides)


__all__ = [
    "PUBLISHED_SCHEDULES",
    "SCHEDULE_FORMS",
    "FlopsReduction",
    "parse_schedule",
    "resolve_schedules",
    "share_in_pixels",
]
