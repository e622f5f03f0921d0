"""Schedules: which tokens leave where, what that costs in GFLOPs, and which schedule meets a budget."""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count, pairwise
from numbers import Integral, Real
from typing import Any

from .token_reduction_tnt import EMBEDDINGS, ReductionStep, reduction_cost


# fvcore counts five operations for each element of an affine LayerNorm.
LAYER_NORM_OPERATIONS = 5
# Of the 79 tokens that the authors' single schedule drops at 196, 25 are dropped for similarity.
SIMILAR_SHARE = 25 / 79


def is_integer(value: Any) -> bool:
    """Whether a value is an integer of any library, and no truth value."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_real(value: Any) -> bool:
    """Whether a value is a real number of any library, and no truth value."""
    return isinstance(value, Real) and not isinstance(value, bool)


def height_and_width(size: int | Sequence[int]) -> tuple[int, int]:
    """Both sides of an image or patch whose config field may hold one number for a square."""
    return tuple(size) if isinstance(size, Iterable) else (size, size)


def count_patches(image_size: int | Sequence[int], patch_size: int | Sequence[int]) -> int:
    """Number of whole patches in an image; both sizes in pixels."""
    (height, width), (patch_height, patch_width) = height_and_width(image_size), height_and_width(patch_size)
    return (height // patch_height) * (width // patch_width)


@dataclass(frozen=True)
class Schedule:
    """
    How many tokens leave where; a value that any model with enough layers can be called with.

    Args:
        name (`str`): What it is called; any text.
        prune_layers (`tuple[int, ...]`): Zero-based layers after which tokens leave, strictly increasing.
        keep_rates (`tuple[float, ...]`): For each of them the share of the current patch tokens kept, in (0, 1].
        num_similar_tokens (`int`, *optional*, defaults to 0):
            Tokens that leave because another token is similar to them: after the pruned layer if there is one, before
            the first layer if there are several.
        compute_size (`int` or `(height, width)`, *optional*):
            Pixels that images are made smaller to, before they are cut into patches.

    Raises:
        ValueError: If a field holds something else; the message names it, the value and what is allowed.
    """

    name: str
    prune_layers: tuple[int, ...]
    keep_rates: tuple[float, ...] = ()
    num_similar_tokens: int = 0
    compute_size: int | tuple[int, int] | None = None
    _text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        layers, rates, num_similar_tokens = self.prune_layers, self.keep_rates, self.num_similar_tokens
        for name, values in (("prune_layers", layers), ("keep_rates", rates)):
            if isinstance(values, str) or not isinstance(values, Sequence):
                raise ValueError(f"`{name}` must be a list, got {values!r}.")
        for layer in layers:
            if not is_integer(layer) or layer < 0:
                raise ValueError(f"`prune_layers` must hold integers from 0 on, got {layer!r} in {list(layers)}.")
        if any(later <= earlier for earlier, later in pairwise(layers)):
            raise ValueError(f"`prune_layers` must be strictly increasing, got {list(layers)}.")
        if len(layers) != len(rates):
            raise ValueError(
                f"`keep_rates` must hold one rate for each of `prune_layers`, got {len(rates)} rates {list(rates)} "
                f"for {len(layers)} layers {list(layers)}."
            )
        for rate in rates:
            if not is_real(rate) or not 0 < rate <= 1:
                raise ValueError(f"`keep_rates` must hold numbers in (0, 1], got {rate!r} in {list(rates)}.")
        if not is_integer(num_similar_tokens) or num_similar_tokens < 0:
            raise ValueError(f"`num_similar_tokens` must be an integer of at least 0, got {num_similar_tokens!r}.")
        size = self.compute_size
        if size is not None:
            size = height_and_width(size)
            if len(size) != 2 or not all(is_integer(side) and side > 0 for side in size):
                raise ValueError(f"`compute_size` must be one or two integers above 0, got {self.compute_size!r}.")
            size = int(size[0]) if size[0] == size[1] else tuple(map(int, size))
        object.__setattr__(self, "compute_size", size)
        object.__setattr__(self, "prune_layers", tuple(int(layer) for layer in layers))
        object.__setattr__(self, "keep_rates", tuple(float(rate) for rate in rates))
        object.__setattr__(self, "num_similar_tokens", int(num_similar_tokens))
        numbers = (*self.prune_layers, *self.keep_rates, self.num_similar_tokens)
        object.__setattr__(self, "_text", " ".join(map(repr, numbers)))

    @classmethod
    def keeping(
        cls,
        counts: Sequence[int],
        prune_layers: Sequence[int],
        num_patches: int,
        num_similar_tokens: int = 0,
        compute_size: int | Sequence[int] | None = None,
    ) -> "Schedule":
        """
        The schedule that keeps `counts` of `num_patches` patch tokens after `prune_layers`, named by its text form
        `LAYERS:RATES[:SIMILAR_TOKENS][@SIZE]`.

        Raises:
            ValueError: If a count is not from 1 to the one before it.
        """
        first = num_patches - (num_similar_tokens if len(prune_layers) > 1 else 0)
        keep_rates = tuple(keep_rate_for(kept, current) for current, kept in pairwise([first, *counts]))
        text = f"{','.join(map(str, prune_layers))}:{','.join(map(str, keep_rates))}"
        text += f":{num_similar_tokens}" if num_similar_tokens else ""
        text += "" if compute_size is None else f"@{'x'.join(map(str, dict.fromkeys(height_and_width(compute_size))))}"
        return cls(text, tuple(prune_layers), keep_rates, num_similar_tokens, compute_size)

    @property
    def settings(self) -> dict[str, Any]:
        """The config fields of the schedule, as JSON holds them."""
        settings = {
            "prune_layers": list(self.prune_layers),
            "keep_rates": list(self.keep_rates),
            "num_similar_tokens": self.num_similar_tokens,
        }
        if self.compute_size is not None:
            size = self.compute_size
            settings["compute_size"] = list(size) if isinstance(size, tuple) else size
        return settings

    def steps(self, num_patches: int, num_layers: int, made_for: int | None = None) -> tuple[ReductionStep, ...]:
        """The reductions of this schedule in a network; see [`reduction_steps`]."""
        # To torch.compile a text is a constant, while numbers that differ from those of the call before become
        # symbols, with which it compiles for minutes.
        *words, num_similar = self._text.split(" ")
        layers, rates = words[: len(words) // 2], words[len(words) // 2 :]
        fields = [int(layer) for layer in layers], [float(rate) for rate in rates], int(num_similar)
        return reduction_steps(*fields, num_patches, num_layers, made_for)


def reduction_steps(
    layers: Sequence[int],
    rates: Sequence[float],
    num_similar: int,
    num_patches: int,
    num_layers: int,
    made_for: int | None = None,
) -> tuple[ReductionStep, ...]:
    """
    The reductions of a schedule in a network, in their order: the one place that says what leaves where.

    With one pruned layer, `int(num_patches * rate) + num_similar` tokens are selected after that layer and
    `num_similar` of them leave for similarity. With several, `num_similar` embeddings leave before the first layer and
    every pruned layer keeps `int(current * rate)`, as in the authors' code:
    https://github.com/mx-ethan-rao/tnt/blob/d095619/models.py#L206-L227.

    `layers`, `rates` and `num_similar` are the fields of a [`Schedule`], `num_patches` are the patch tokens of the
    image and `made_for` those of the images that the schedule was made for: for others its similar tokens grow with
    the patches, and at least one token stays.

    Raises:
        ValueError: If the schedule cannot be carried out there.
    """
    fewest = 0
    if made_for is not None and made_for != num_patches:
        fewest, num_similar = 1, num_similar * num_patches // made_for
        if len(rates) == 1:  # the rate may be rounded to fewer tokens that leave than these
            num_kept = max(fewest, int(num_patches * rates[0]))
            num_similar = min(num_similar, num_kept, num_patches - num_kept)
    for layer in layers:
        if layer >= num_layers:
            raise ValueError(
                f"`prune_layers` must hold integers from 0 to {num_layers - 1} (the model has {num_layers} "
                f"layers), got {layer} in {layers}."
            )
    current, steps = num_patches, []
    if len(rates) > 1 and num_similar > 0:
        if num_similar > current // 2:
            raise ValueError(
                f"`num_similar_tokens` must be at most {current // 2}, half of the {current} patch tokens that "
                f"the similarity step splits in two, got {num_similar}."
            )
        steps.append(ReductionStep(EMBEDDINGS, current, current - num_similar, num_similar))
        current = current - num_similar
    for layer, rate in zip(layers, rates):
        num_kept = max(fewest, int(current * rate))
        if num_kept < 1:
            raise ValueError(
                f"`keep_rates` {rates} leave no patch token after layer {layer}: {rate} of {current}; the rate "
                f"must be more than 1/{current} there."
            )
        if len(rates) == 1 and num_similar > min(num_kept, current - num_kept):
            raise ValueError(
                f"`num_similar_tokens` must be at most {min(num_kept, current - num_kept)} with `keep_rates` "
                f"{rates}: {num_kept} of {current} patch tokens are kept after layer {layer}, and the similarity "
                f"step drops at most half of those selected before it. Got {num_similar}."
            )
        steps.append(ReductionStep(layer, current, num_kept, num_similar if len(rates) == 1 else 0))
        current = num_kept
    return tuple(steps)


UNPRUNED = Schedule("full", (), ())


def patch_token_counts(steps: Sequence[ReductionStep], num_patches: int, num_layers: int) -> list[int]:
    """Number of patch tokens that enter each layer and, as the last entry, that leave the last one."""
    kept = {step.layer: step.num_kept for step in steps}
    counts = [kept.get(EMBEDDINGS, num_patches)]
    for layer in range(num_layers):
        counts.append(kept.get(layer, counts[-1]))
    return counts


def count_gflops(
    config: Any,
    image_size: int | Sequence[int] | None = None,
    *,
    schedule: Schedule | None = None,
    as_executed: bool = False,
) -> float:
    """
    Cost of one image at inference in GFLOPs as the literature counts them: 1e9 multiply-accumulates.

    Equal to fvcore's count with the attention products included: convolution, linear layers, both attention products,
    LayerNorm (5 operations per element), scoring heads, similarity products and the means of merged tokens. Softmax,
    GELU, biases, sorting and gathering are not counted.

    Args:
        config ([`TntViTConfig`] or [`TntDeiTConfig`]): The model, whose `image_size` (pixels) and schedule count where
            none is given.
        as_executed (`bool`, *optional*, defaults to `False`):
            Count what the classifiers here execute, whose last layer leaves out the patch tokens (with flex attention
            it does not), instead of every layer on all of its tokens, as published figures do.

    Raises:
        ValueError: If the schedule cannot be carried out at this number of patches.
    """
    size = config.smaller_size(schedule) or (config.image_size if image_size is None else image_size)
    num_patches = count_patches(size, config.patch_size)
    steps = config.reduction_steps(num_patches, schedule)
    counts = patch_token_counts(steps, num_patches, config.num_hidden_layers)
    hidden_size, num_prefix_tokens = config.hidden_size, config.num_prefix_tokens
    patch_height, patch_width = height_and_width(config.patch_size)
    last_layer = config.num_hidden_layers - 1
    is_last_whole = not as_executed or any(step.layer == last_layer for step in steps)

    total = num_patches * config.num_channels * patch_height * patch_width * hidden_size
    for step in steps:
        total += reduction_cost(step, config.token_reduction) * hidden_size
    for layer, (num_patch_tokens, num_left) in enumerate(pairwise(counts)):
        num_tokens = num_outputs = num_in_mlp = num_patch_tokens + num_prefix_tokens
        if layer == last_layer and not is_last_whole:
            num_outputs = num_in_mlp = num_prefix_tokens
        elif config.reduces_before_mlp:
            num_in_mlp = num_left + num_prefix_tokens
        total += 2 * (num_tokens + num_outputs) * hidden_size**2  # key and value, query and output projections
        total += 2 * num_tokens * num_outputs * hidden_size  # queries times keys, attention times values
        total += 2 * num_in_mlp * hidden_size * config.intermediate_size
        total += (num_tokens + num_in_mlp) * hidden_size * LAYER_NORM_OPERATIONS
    num_normalized = num_prefix_tokens + (counts[-1] if is_last_whole else 0)
    total += num_normalized * hidden_size * LAYER_NORM_OPERATIONS
    total += num_prefix_tokens * hidden_size * config.num_labels  # one classifier for each prefix token
    return total / 1e9


def schedule_for(
    config: Any,
    *,
    gflops: float | None = None,
    flops_reduction: float | None = None,
    speedup: float | None = None,
    cost: Callable[[Any, Schedule], float] | None = None,
    prune_layers: Sequence[int] | None = None,
    compute_size: int | Sequence[int] | None = None,
) -> Schedule:
    """
    The schedule of images of `config.image_size` that meets a budget by at most 1 %.

    Where tokens are merged it reduces after all layers whose scoring heads learn (`num_noise_layers`), at equal rates;
    where they are dropped, after the third of these or the nearest one that meets the budget, with the authors' share
    of similar tokens.

    Args:
        config ([`TntViTConfig`] or [`TntDeiTConfig`]): The model; its own schedule does not matter.
        gflops (`float`, *optional*): Budget as [`count_gflops`] counts it for published figures.
        flops_reduction (`float`, *optional*):
            Multiply-accumulates that this model executes unpruned, divided by those under the schedule; the time saved
            is less.
        speedup (`float`, *optional*): Likewise of the `cost` that must go with it.
        cost (`Callable`, *optional*):
            What a config costs under a schedule, such as the seconds of [`~tnt_hf.evaluation.MeasuredCost`].
        prune_layers (`Sequence[int]`, *optional*): Layers to prune instead, at equal rates if there are several.
        compute_size (`int` or `(height, width)`, *optional*):
            Pixels that images are made smaller to. If these alone cost less than the budget, no token leaves.

    Raises:
        ValueError: If not exactly one budget is given, or no such schedule meets it; the message names the range that
            can be reached.
    """
    budgets = {"gflops": gflops, "flops_reduction": flops_reduction, "speedup": speedup}
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"Exactly one of {', '.join(f'`{name}`' for name in budgets)} must be given, got {given}.")
    ((name, budget),) = given.items()
    if not is_real(budget) or not 0 < budget < math.inf:
        raise ValueError(f"`{name}` must be a finite number above 0, got {budget!r}.")
    if (name == "speedup") != (cost is not None):
        raise ValueError(f"`speedup` and `cost` go together, got `{name}` {budget} and cost={cost}.")

    def price(schedule: Schedule) -> float:
        if cost is not None:
            return cost(config, schedule)
        return count_gflops(config, schedule=schedule, as_executed=name == "flops_reduction")

    full = price(UNPRUNED)
    limit = budget if name == "gflops" else full / budget
    size = None if compute_size is None else tuple(height_and_width(compute_size))
    whole = replace(UNPRUNED, compute_size=size)
    costs = [price(whole)]
    if costs[0] <= limit and (size is not None or costs[0] >= limit * 0.99):
        return whole
    num_patches = config.num_patches_of(whole)
    for layers in [tuple(prune_layers)] if prune_layers is not None else _usual_layers(config):
        keeping = partial(Schedule.keeping, prune_layers=layers, num_patches=num_patches, compute_size=size)
        for schedule in _options(keeping, num_patches, layers, price, limit):
            costs.append(price(schedule))
            if limit * 0.99 <= costs[-1] <= limit:
                return schedule
    reached = sorted(costs if name == "gflops" else (full / each for each in costs))
    nearest = [value for value in reached if value <= budget][-1:] + [value for value in reached if value > budget][:1]
    which = "" if prune_layers is None else f" of `prune_layers` {list(prune_layers)}"
    raise ValueError(
        f"No schedule{which} has a cost of up to 1 % under `{name}` {budget:g} at {num_patches} patch tokens: "
        f"reachable are {reached[0]:.6g} to {reached[-1]:.6g}; nearest is "
        f"{' or '.join(f'{value:.6g}' for value in nearest)}."
    )


def _usual_layers(config: Any) -> list[tuple[int, ...]]:
    """Sets of layers to reduce after, best first, among those whose scoring heads learn."""
    learning = range(config.num_learning_layers)
    if len(learning) == 0:
        raise ValueError(
            f"No scoring head learns with num_noise_layers={config.num_noise_layers}, noise_std={config.noise_std} "
            f"and num_hidden_layers={config.num_hidden_layers}, so no budget but the full one can be met."
        )
    if config.merges:
        return [tuple(learning)]
    return [(layer,) for layer in sorted(learning, key=lambda layer: abs(layer - 2))]


def _options(
    keeping: Callable[..., Schedule],
    num_patches: int,
    layers: tuple[int, ...],
    price: Callable[[Schedule], float],
    limit: float,
) -> Iterator[Schedule]:
    """
    Schedules of these layers, the best of those that cost the same first.

    After one layer: with the authors' share of similar tokens, most tokens first. After several, without similar
    tokens: equal rates, with the last count moved to where the cost comes closest to the limit, the least moved first;
    then with another count moved too, which matters where a single token is more than 1 % of the budget.
    """
    if len(layers) == 1:
        for kept in range(num_patches - 1, 0, -1):
            yield keeping((kept,), num_similar_tokens=min(round(SIMILAR_SHARE * (num_patches - kept)), kept))
        return

    def with_last_moved(counts: Sequence[int]) -> tuple[float, tuple[int, ...]]:
        *counts, last = counts
        choices = range(1, counts[-1] + 1)
        num_affordable = bisect_right(choices, limit, key=lambda moved: price(keeping((*counts, moved))))
        moved = choices[max(num_affordable - 1, 0)]
        return abs(moved - last) / last, (*counts, moved)

    fewest, most = keeping((1,) * len(layers)), keeping((num_patches - 1,) * len(layers))
    yield from (fewest, most)
    if not price(fewest) <= limit <= price(most) / 0.99:
        return
    equal_rates = []
    for first in range(num_patches - 1, 0, -1):
        counts = [first]
        while len(counts) < len(layers):
            counts.append(max(1, counts[-1] * first // num_patches))
        equal_rates.append(counts)
    options = sorted(with_last_moved(counts) for counts in equal_rates)
    yield from (keeping(counts) for _, counts in options)
    for _, counts in options[:20]:
        for index in range(len(layers) - 1):
            upper = counts[index - 1] if index else num_patches
            for moved in range(counts[index + 1], upper + 1):
                yield keeping(with_last_moved((*counts[:index], moved, *counts[index + 1 :]))[1])


def keep_rate_for(num_kept: int, num_tokens: int) -> float:
    """
    The shortest decimal rate that keeps `num_kept` of `num_tokens`.

    Raises:
        ValueError: If `num_kept` is not from 1 to `num_tokens`.
    """
    if not 1 <= num_kept <= num_tokens:
        raise ValueError(f"`num_kept` must be from 1 to {num_tokens}, got {num_kept}.")
    for digits in count(0):
        units = math.ceil(num_kept / num_tokens * 10**digits)
        for rate in (units / 10**digits, (units + 1) / 10**digits):  # 200 * 0.145 is a little less than 29
            if rate <= 1 and int(num_tokens * rate) == num_kept:
                return rate


__all__ = [
    "UNPRUNED",
    "Schedule",
    "count_gflops",
    "count_patches",
    "height_and_width",
    "keep_rate_for",
    "patch_token_counts",
    "reduction_steps",
    "schedule_for",
]
