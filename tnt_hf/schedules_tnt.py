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
# Clusters are merged after as many of the first layers. The share of the tokens that leaves rises from layer to layer,
# evenly, and the more the milder the budget is; by measurements on the networks of docs/photographs.md.
CLUSTERING_LAYERS = 2 / 3
SLOPE_FROM, SLOPE_GROWTH, LARGEST_SLOPE = 0.35, 4.0, 0.8


def is_integer(value: Any, lowest: int = 0) -> bool:
    """Whether a value is an integer of any library from `lowest` on, and no truth value."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= lowest


def is_real(value: Any) -> bool:
    """Whether a value is a real number of any library, and no truth value."""
    return isinstance(value, Real) and not isinstance(value, bool)


def require(is_allowed: bool, name: str, allowed: str, value: Any) -> None:
    """Raise ValueError with the name of a setting, what is allowed and its value, unless that is."""
    if not is_allowed:
        raise ValueError(f"`{name}` must be {allowed}, got {value!r}.")


def height_and_width(size: int | Sequence[int]) -> tuple[int, int]:
    """Both sides of an image or patch whose config field may hold one number for a square."""
    return tuple(size) if isinstance(size, Iterable) else (size, size)  # type: ignore[return-value]


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
        for name in ("prune_layers", "keep_rates"):
            values = getattr(self, name)
            require(isinstance(values, Sequence) and not isinstance(values, str), name, "a list", values)
        layers, rates = list(self.prune_layers), list(self.keep_rates)
        num_similar, size = self.num_similar_tokens, self.compute_size
        require(all(map(is_integer, layers)), "prune_layers", "a list of integers from 0 on", layers)
        require(layers == sorted(set(layers)), "prune_layers", "strictly increasing", layers)
        require(all(is_real(rate) and 0 < rate <= 1 for rate in rates), "keep_rates", "numbers in (0, 1]", rates)
        require(len(rates) == len(layers), "keep_rates", f"one rate for each of `prune_layers` {layers}", rates)
        require(is_integer(num_similar), "num_similar_tokens", "an integer of at least 0", num_similar)
        if size is not None:
            sides = height_and_width(size)
            are_pixels = len(sides) == 2 and all(is_integer(side, 1) for side in sides)
            require(are_pixels, "compute_size", "one or two integers above 0", size)
            size = int(sides[0]) if sides[0] == sides[1] else tuple(map(int, sides))
        numbers = (*map(int, layers), *map(float, rates), int(num_similar))
        vars(self).update(
            prune_layers=numbers[: len(layers)],
            keep_rates=numbers[len(layers) : -1],
            num_similar_tokens=numbers[-1],
            compute_size=size,
            _text=" ".join(map(repr, numbers)),
        )

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
        size = None if compute_size is None else height_and_width(compute_size)
        return cls(text, tuple(prune_layers), keep_rates, num_similar_tokens, size)

    @property
    def settings(self) -> dict[str, Any]:
        """The config fields of the schedule that are set, as JSON holds them."""
        names = ("prune_layers", "keep_rates", "num_similar_tokens", "compute_size")
        fields = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


def reduction_steps(
    schedule: Any, num_patches: int, num_layers: int, made_for: int | None = None
) -> tuple[ReductionStep, ...]:
    """
    The reductions of a schedule in a network, in their order: the one place that says what leaves where.

    With one pruned layer, `int(num_patches * rate) + num_similar` tokens are selected after that layer and
    `num_similar` of them leave for similarity. With several, `num_similar` embeddings leave before the first layer and
    every pruned layer keeps `int(current * rate)`, as in the authors' code:
    https://github.com/mx-ethan-rao/tnt/blob/d095619/models.py#L206-L227.

    Args:
        schedule: A [`Schedule`] or a config, which has the same fields.
        num_patches (`int`): Patch tokens of the image.
        num_layers (`int`): Layers of the network.
        made_for (`int`, *optional*):
            Patch tokens of the images that the schedule was made for: for others its similar tokens grow with the
            patches, and at least one token stays.

    Raises:
        ValueError: If the schedule cannot be carried out there.
    """
    if hasattr(schedule, "_text"):
        # To torch.compile a text is a constant, while numbers that differ from those of the call before become
        # symbols, with which it compiles for minutes.
        *words, num_similar = schedule._text.split(" ")
        half = len(words) // 2
        layers, rates, num_similar = list(map(int, words[:half])), list(map(float, words[half:])), int(num_similar)
    else:
        layers, rates, num_similar = schedule.prune_layers, schedule.keep_rates, schedule.num_similar_tokens
    is_scaled = made_for is not None and made_for != num_patches
    if is_scaled:
        num_similar = num_similar * num_patches // made_for
    if len(layers) > 1 and num_similar > 0:
        layers, rates = (EMBEDDINGS, *layers), (1.0, *rates)
    current, steps = num_patches, []
    for layer, rate in zip(layers, rates):
        require(layer < num_layers, "prune_layers", f"integers from 0 to {num_layers - 1}, the last layer", layer)
        num_kept = max(int(current * rate), int(is_scaled))
        if num_kept < 1:
            raise ValueError(f"`keep_rates` leave no patch token after layer {layer}: {rate} of {current}.")
        most = current // 2 if layer == EMBEDDINGS else min(num_kept, current - num_kept)
        similar = 0 if steps else num_similar
        if is_scaled:  # there the rate may be rounded to fewer tokens that leave
            similar = min(similar, most)
        if similar > most:
            raise ValueError(
                f"`num_similar_tokens` must be at most {most} where {num_kept} of {current} patch tokens are kept, as "
                f"at most half of the tokens compared can leave, got {similar}."
            )
        if layer == EMBEDDINGS:
            num_kept -= similar
        steps.append(ReductionStep(layer, current, num_kept, similar))
        current = num_kept
    return tuple(steps)


UNPRUNED = Schedule("full", (), ())


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
            Count what the classifiers here execute, whose last layer leaves out the patch tokens unless they are read
            (with flex or flash attention and masked tokens it does not), instead of every layer on all of its tokens,
            as published figures do.

    Raises:
        ValueError: If the schedule cannot be carried out at this number of patches.
    """
    size = (schedule or config).compute_size or image_size or config.image_size
    num_patches = count_patches(size, config.patch_size)
    steps = config.reduction_steps(num_patches, schedule)
    hidden_size, num_prefix_tokens = config.hidden_size, config.num_prefix_tokens
    patch_height, patch_width = height_and_width(config.patch_size)
    left_after = {step.layer: step.num_kept + num_prefix_tokens for step in steps}
    last_layer = config.num_hidden_layers - 1
    is_last_whole = not as_executed or last_layer in left_after or config.classifier_reads_patches

    total = num_patches * config.num_channels * patch_height * patch_width * hidden_size
    for step in steps:
        total += reduction_cost(step, config)
    num_left = left_after.get(EMBEDDINGS, num_patches + num_prefix_tokens)
    for layer in range(config.num_hidden_layers):
        num_tokens = num_outputs = num_in_mlp = num_left
        num_left = left_after.get(layer, num_tokens)
        if layer == last_layer and not is_last_whole:
            num_outputs = num_in_mlp = num_prefix_tokens
        elif config.reduces_before_mlp:
            num_in_mlp = num_left
        total += 2 * (num_tokens + num_outputs) * hidden_size**2  # key and value, query and output projections
        total += 2 * num_tokens * num_outputs * hidden_size  # queries times keys, attention times values
        total += 2 * num_in_mlp * hidden_size * config.intermediate_size
        total += (num_tokens + num_in_mlp) * hidden_size * LAYER_NORM_OPERATIONS
    total += (num_left if is_last_whole else num_prefix_tokens) * hidden_size * LAYER_NORM_OPERATIONS
    num_read = num_prefix_tokens + config.classifier_reads_patches
    total += num_read * hidden_size * config.num_labels  # one classifier for each prefix token
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
    The schedule of images of `config.image_size` that costs at most a budget, and no more than 1 % less.

    Clusters are merged in the first two thirds of the layers, at rates that rise from layer to layer. With `"merge"`
    tokens leave after all layers whose scoring heads learn (`num_noise_layers`), at equal rates; with `"drop"` after
    the third of these or the nearest one that meets the budget, with the authors' share of similar tokens.

    Args:
        config ([`TntViTConfig`] or [`TntDeiTConfig`]): The model; its own schedule does not matter.
        gflops (`float`, *optional*): Budget as [`count_gflops`] counts it for published figures.
        flops_reduction (`float`, *optional*):
            Multiply-accumulates that this model executes unpruned, divided by those under the schedule; the time saved
            is less.
        speedup (`float`, *optional*): Likewise of the `cost` that must go with it.
        cost (`Callable`, *optional*):
            What a config costs under a schedule, such as the seconds of [`~tnt_hf.evaluation.MeasuredCost`], or the
            multiply-accumulates of another model.
        prune_layers (`Sequence[int]`, *optional*): Layers to prune instead.
        compute_size (`int` or `(height, width)`, *optional*):
            Pixels that images are made smaller to; those of the nearest of `config.budget_sizes` by default. If these
            alone cost less than the budget, no token leaves.

    Raises:
        ValueError: If not exactly one budget is given, or no such schedule meets it; the message names the range that
            can be reached.
    """
    budgets = {"gflops": gflops, "flops_reduction": flops_reduction, "speedup": speedup}
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"Exactly one of {', '.join(f'`{name}`' for name in budgets)} must be given, got {given}.")
    ((name, budget),) = given.items()
    require(is_real(budget) and 0 < budget < math.inf, name, "a finite number above 0", budget)
    if name == ("gflops" if cost is not None else "speedup"):
        raise ValueError(f"`speedup` needs a `cost` and `gflops` takes none, got `{name}` {budget} and cost={cost}.")

    def price(schedule: Schedule) -> float:
        if cost is not None:
            return cost(config, schedule)
        return count_gflops(config, schedule=schedule, as_executed=name == "flops_reduction")

    full = price(UNPRUNED)
    limit = budget if name == "gflops" else full / budget
    size = config.size_for(full / limit) if compute_size is None else height_and_width(compute_size)
    size = None if size == height_and_width(config.image_size) else size
    whole = replace(UNPRUNED, compute_size=size)
    costs = [price(whole)]
    if costs[0] <= limit and (size is not None or costs[0] >= limit * 0.99):
        return whole
    num_patches = config.num_patches_of(whole)
    if prune_layers is not None:
        options = [tuple(prune_layers)]
    elif config.token_reduction == "cluster":
        options = [tuple(range(max(1, round(CLUSTERING_LAYERS * config.num_hidden_layers))))]
    elif config.merges:
        options = [tuple(config.learning_layers())]
    else:
        options = [(layer,) for layer in sorted(config.learning_layers(), key=lambda layer: abs(layer - 2))]
    slope = 0.0
    if config.token_reduction == "cluster":
        slope = min(max(SLOPE_GROWTH * (limit / costs[0] - SLOPE_FROM), 0.0), LARGEST_SLOPE)
    for layers in options:
        keeping = partial(Schedule.keeping, prune_layers=layers, num_patches=num_patches, compute_size=size)
        for schedule in _options(keeping, num_patches, layers, price, limit, slope):
            costs.append(price(schedule))
            if limit * 0.99 <= costs[-1] <= limit:
                return schedule
    reached = sorted(costs if name == "gflops" else (full / each for each in costs))
    nearest = [value for value in reached if value <= budget][-1:] + [value for value in reached if value > budget][:1]
    between = f", the nearest being {nearest[0]:.6g} and {nearest[1]:.6g}" if len(nearest) == 2 else ""
    which = "" if prune_layers is None else f" of `prune_layers` {list(prune_layers)}"
    raise ValueError(
        f"No schedule{which} comes within 1 % of `{name}` {budget:g}: at {num_patches} patch tokens this model "
        f"reaches {reached[0]:.4g} to {reached[-1]:.4g}{between}."
    )


def _options(
    keeping: Callable[..., Schedule],
    num_patches: int,
    layers: tuple[int, ...],
    price: Callable[[Schedule], float],
    limit: float,
    slope: float,
) -> Iterator[Schedule]:
    """
    Schedules of these layers, the best of those that cost the same first.

    After one layer: with the authors' share of similar tokens, most tokens first. After several, without similar
    tokens: with shares that leave equal but for a slope, from 1 less it times a share to 1 plus it times the share;
    the last count moved to where the cost comes closest to the limit, the least moved first; then with another count
    moved too, which matters where a single token is more than 1 % of the budget; then with every last count, which
    matters in narrow networks, where merging more tokens may cost more than it saves.
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
    weights = [1 + slope * (2 * index / (len(layers) - 1) - 1) for index in range(len(layers))]
    sloped = []
    for num_leaving in range(1, num_patches):
        counts = [num_patches]
        for weight in weights:
            counts.append(max(1, counts[-1] - math.ceil(counts[-1] * num_leaving * weight / num_patches)))
        sloped.append(counts[1:])
    options = sorted(with_last_moved(counts) for counts in sloped)
    yield from (keeping(counts) for _, counts in options)
    for _, counts in options[:20]:
        for index in range(len(layers) - 1):
            upper = counts[index - 1] if index else num_patches
            for moved in range(counts[index + 1], upper + 1):
                yield keeping(with_last_moved((*counts[:index], moved, *counts[index + 1 :]))[1])
    for *counts, _ in sloped:
        yield from (keeping((*counts, last)) for last in range(1, counts[-1] + 1))


def keep_rate_for(num_kept: int, num_tokens: int) -> float:  # type: ignore[return]
    """
    The shortest decimal rate that keeps `num_kept` of `num_tokens`.

    Raises:
        ValueError: If `num_kept` is not from 1 to `num_tokens`.
    """
    require(1 <= num_kept <= num_tokens, "num_kept", f"from 1 to {num_tokens}", num_kept)
    for digits in count(0):
        units = math.ceil(num_kept / num_tokens * 10**digits)
        for rate in (units / 10**digits, (units + 1) / 10**digits):  # 200 * 0.145 is a little less than 29
            if rate <= 1 and int(num_tokens * rate) == num_kept:
                return rate
