"""Pruning schedules and what they cost: the published ones, their text form, tokens per layer, GFLOPs, budgets."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from .configuration_tnt import (
    Schedule,
    TntDeiTConfig,
    TntViTConfig,
    count_gflops,
    count_patches,
    patch_token_counts,
    schedule_for,
)
from .modeling_tnt import TntDeiTForImageClassification, TntViTForImageClassification


# The schedules of the authors' README: https://github.com/mx-ethan-rao/tnt/blob/d095619/README.md#evaluation.
PUBLISHED_SCHEDULES = {
    schedule.name: schedule
    for schedule in (
        Schedule("full", (), ()),
        Schedule("single", (2,), (0.6,), 25),
        Schedule("multi", (2, 3, 4), (0.8, 0.8, 0.8), 40),
    )
}


SCHEDULE_FORMS = f"{', '.join(PUBLISHED_SCHEDULES)}, a speed-up such as 2x, or LAYERS:RATES[:SIMILAR_TOKENS]"


@dataclass(frozen=True)
class Speedup:
    """A budget, named as it was written, that becomes a schedule once the model is known: [`resolve_schedules`]."""

    name: str
    factor: float


def parse_schedule(text: str) -> Schedule | Speedup:
    """
    A schedule written as the name of a published one, as a speed-up such as `2x`, or as
    `LAYERS:RATES[:SIMILAR_TOKENS]`, such as `2,3:0.7,0.7:30`.

    Raises:
        ValueError: If the text is none of these.
    """
    if text in PUBLISHED_SCHEDULES:
        return PUBLISHED_SCHEDULES[text]
    try:
        if text.endswith("x"):
            return Speedup(text, float(text.removesuffix("x")))
        layers, rates, num_similar_tokens = text.split(":") if text.count(":") == 2 else (*text.split(":"), "0")
        return Schedule(
            name=text,
            prune_layers=tuple(int(layer) for layer in layers.split(",")),
            keep_rates=tuple(float(rate) for rate in rates.split(",")),
            num_similar_tokens=int(num_similar_tokens),
        )
    except ValueError:
        raise ValueError(f"A schedule must be one of {SCHEDULE_FORMS} such as 2,3:0.7,0.7:30, got {text!r}.") from None


def resolve_schedules(config: TntViTConfig | TntDeiTConfig, schedules: Sequence[Schedule | Speedup]) -> list[Schedule]:
    """
    The schedules as a model carries them out at its own image size: a speed-up becomes that of [`schedule_for`], by
    multiply-accumulates, under the name it was written as.

    Raises:
        ValueError: If the model cannot carry out one of them, or two have the same name.
    """
    names = [schedule.name for schedule in schedules]
    if len(set(names)) < len(names):
        raise ValueError(f"The schedules must differ, got {', '.join(names)}.")
    resolved = []
    for schedule in schedules:
        try:
            if isinstance(schedule, Speedup):
                schedule = replace(schedule_for(config, speedup=schedule.factor), name=schedule.name)
            patch_token_counts(config.num_patches, config.num_hidden_layers, **schedule.settings)
        except ValueError as error:
            raise ValueError(f"Schedule '{schedule.name}' does not fit this model: {error}") from error
        resolved.append(schedule)
    return resolved


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


@contextmanager
def borrowed(model: TntViTForImageClassification | TntDeiTForImageClassification) -> Iterator[None]:
    """The model in evaluation mode, to be run under any schedule; afterwards it has its mode and schedule again."""
    config, was_training = model.config, model.training
    own_schedule = (config.prune_layers, config.keep_rates, config.num_similar_tokens, config.selection)
    try:
        model.eval()
        yield
    finally:
        model.train(was_training)
        model.set_schedule(*own_schedule)


__all__ = [
    "PUBLISHED_SCHEDULES",
    "SCHEDULE_FORMS",
    "Schedule",
    "Speedup",
    "borrowed",
    "count_gflops",
    "parse_schedule",
    "resolve_schedules",
    "schedule_for",
    "tokens_per_layer",
]
