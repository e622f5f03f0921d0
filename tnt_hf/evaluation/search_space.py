"""Which schedules a search tries: those that come closest to a cost from below, on many sets of layers."""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from ..configuration_tnt import TntDeiTConfig, TntViTConfig
from ..modeling_tnt import TntDeiTForImageClassification, TntViTForImageClassification
from ..schedules_tnt import SIMILAR_SHARE, UNPRUNED, Schedule, count_gflops, schedule_for
from ..token_reduction_tnt import EMBEDDINGS
from .measured_cost import measure_cost


# Tokens dropped for similarity, in multiples of the authors' share.
SIMILAR_MULTIPLES = (1, 2)
# Pairs and triples are taken from at most this many layers, evenly spread over those whose heads learn.
MAX_COMBINED_LAYERS = 6


@dataclass(frozen=True)
class Target:
    """
    What schedules may cost, and how that is counted.

    Args:
        unit (`str`): `"gflops"` or `"milliseconds_per_image"`.
        limit (`float`): What a schedule may cost, in `unit`.
        cost (`Callable`): Cost of a config under a schedule, in `unit`; it grows with the tokens kept.
        config ([`TntViTConfig`] or [`TntDeiTConfig`]): The model; its own schedule does not matter.
    """

    unit: str
    limit: float
    cost: Callable[[TntViTConfig | TntDeiTConfig, Schedule], float]
    config: TntViTConfig | TntDeiTConfig

    def price(self, schedule: Schedule) -> float:
        """Cost of a schedule in `unit`."""
        return self.cost(self.config, schedule)

    def counts(self, schedule: Schedule) -> list[int]:
        """Patch tokens kept after each pruned layer."""
        return [step.num_kept for step in self.config.reduction_steps(schedule=schedule) if step.layer != EMBEDDINGS]

    def budget(self) -> dict[str, Any]:
        """The target as arguments of [`schedule_for`]."""
        if self.unit == "gflops":
            return {"gflops": self.limit}
        return {"speedup": self.price(UNPRUNED) / self.limit, "cost": self.cost}


def find_target(
    model: TntViTForImageClassification | TntDeiTForImageClassification,
    *,
    gflops: float | None = None,
    milliseconds: float | None = None,
    batch_size: int = 32,
) -> Target:
    """
    The target of a search; milliseconds are those that [`~tnt_hf.evaluation.MeasuredCost`] of this device predicts.

    Args:
        model: The classifier, on the device of interest.
        gflops (`float`, *optional*): GFLOPs for one image, as [`count_gflops`] counts them for published figures.
        milliseconds (`float`, *optional*): Milliseconds for one image in batches of `batch_size`.
        batch_size (`int`): Images in a batch, for `milliseconds`.

    Raises:
        ValueError: If not exactly one is given, no scoring head learns, or no schedule can meet the target; the
            message names the range that can be reached.
    """
    if (gflops is None) == (milliseconds is None):
        raise ValueError(f"Exactly one of `gflops` and `milliseconds` must be given, got {gflops} and {milliseconds}.")
    config = model.config
    if config.num_learning_layers == 0:
        raise ValueError(
            f"No scoring head learns with num_noise_layers={config.num_noise_layers} and "
            f"num_hidden_layers={config.num_hidden_layers}: there is no layer to prune after."
        )
    if gflops is not None:
        name, target = "gflops", Target("gflops", gflops, _gflops, config)
    else:
        measured = measure_cost(model, batch_size)
        name = "milliseconds"
        target = Target("milliseconds_per_image", milliseconds, lambda *of: 1000 * measured(*of), config)
    lowest = target.price(Schedule.keeping((1,), (0,), config.num_patches))
    full = target.price(UNPRUNED)
    if not lowest <= target.limit <= full:
        raise ValueError(
            f"`{name}` must be from {lowest:.6g}, one patch token after the first layer, to {full:.6g}, the unpruned "
            f"model, got {target.limit:.6g}."
        )
    return target


def _gflops(config: TntViTConfig | TntDeiTConfig, schedule: Schedule) -> float:
    return count_gflops(config, schedule=schedule)


def _layer_sets(config: TntViTConfig | TntDeiTConfig) -> list[tuple[int, ...]]:
    """Layers to prune after: one, two, three, or all that learn but the first."""
    learning = range(config.num_learning_layers)
    num_combined = min(len(learning), MAX_COMBINED_LAYERS)
    spread = [round(index * (len(learning) - 1) / max(1, num_combined - 1)) for index in range(num_combined)]
    sets = [(layer,) for layer in learning]
    sets += [*combinations(spread, 2), *combinations(spread, 3), tuple(learning[1:] or learning)]
    return list(dict.fromkeys(sets))


def first_schedules(target: Target) -> list[Schedule]:
    """Schedules that come closest to the target from below: for each set of layers with and without similar tokens."""
    num_patches, found = target.config.num_patches, []
    for layers in _layer_sets(target.config):
        if len(layers) == 1:
            found.append(_fitted(target, layers, (1,), 0))
        try:
            schedule = schedule_for(target.config, prune_layers=layers, **target.budget())
        except ValueError:  # these layers cannot meet the target
            continue
        found.append(schedule)
        if counts := target.counts(schedule):  # none if the whole model meets the target
            num_similar_tokens = round(SIMILAR_SHARE * (num_patches - counts[-1]))
            found += [_with_similar(target, layers, counts, num_similar_tokens * n) for n in SIMILAR_MULTIPLES]
    return [schedule for schedule in found if schedule is not None and target.price(schedule) <= target.limit]


def _with_similar(
    target: Target, layers: Sequence[int], counts: Sequence[int], num_similar_tokens: int
) -> Schedule | None:
    """The schedule at the target that drops similar tokens too and so keeps more after `layers` than `counts`."""
    share_left = 1 - num_similar_tokens / target.config.num_patches
    shrunk = [max(1, int(count * share_left)) for count in counts]
    schedule = _fitted(target, layers, shrunk, num_similar_tokens)
    if schedule is None:
        return None
    counts = target.counts(schedule)
    return _fitted(target, layers, counts, num_similar_tokens, index=len(layers) - 1)


def _fitted(
    target: Target, layers: Sequence[int], counts: Sequence[int], num_similar_tokens: int, index: int | None = None
) -> Schedule | None:
    """
    The schedule that comes closest to the target from below when the count at `index` is changed, or all counts by
    the same number of tokens; None if there is none.
    """
    num_patches = target.config.num_patches
    if not 0 <= num_similar_tokens <= num_patches // 2:
        return None
    lowest, highest = 1, num_patches - num_similar_tokens - 1
    if len(layers) == 1 and num_similar_tokens > 0:
        lowest, highest = num_similar_tokens, num_patches - num_similar_tokens
    below, above = lowest - counts[-1], highest - counts[0]
    if index is not None:
        neighbours = [highest, *counts, lowest]
        below, above = neighbours[index + 2] - counts[index], neighbours[index] - counts[index]

    def moved(offset):
        changed = [count + offset * (index in (None, position)) for position, count in enumerate(counts)]
        return Schedule.keeping(changed, layers, num_patches, num_similar_tokens)

    offsets = range(below, above + 1)
    num_affordable = bisect_right(offsets, target.limit, key=lambda offset: target.price(moved(offset)))
    return moved(offsets[num_affordable - 1]) if num_affordable else None


def neighbouring_schedules(schedule: Schedule, target: Target, step: int) -> Iterator[Schedule]:
    """Variants of a schedule at the target: they prune one layer earlier or later, or `step` tokens elsewhere."""
    layers, counts, num_similar_tokens = schedule.prune_layers, target.counts(schedule), schedule.num_similar_tokens
    trials = []
    for index, layer in enumerate(layers):
        for other in (layer - 1, layer + 1):
            if 0 <= other < target.config.num_learning_layers and other not in layers:
                moved = (*layers[:index], other, *layers[index + 1 :])
                trials += [(moved, counts, num_similar_tokens, index), (moved, counts, num_similar_tokens, None)]
        lowest, highest = [*counts, 1][index + 1], [target.config.num_patches - num_similar_tokens, *counts][index]
        for count in (counts[index] - step, counts[index] + step):
            changed = [*counts[:index], min(max(count, lowest), highest), *counts[index + 1 :]]
            trials += [(layers, changed, num_similar_tokens, other) for other in range(len(layers)) if other != index]
    if layers:
        trials += [(layers, counts, num_similar_tokens + change, None) for change in (-step, step)]
    fitted = (_fitted(target, *trial) for trial in trials)
    return (schedule for schedule in fitted if schedule is not None)


__all__ = ["Target", "find_target", "first_schedules", "neighbouring_schedules"]
