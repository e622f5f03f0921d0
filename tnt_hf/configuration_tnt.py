"""Configurations of ViT and distilled DeiT with Training Noise Token (TNT) pruning (arXiv 2411.18092)."""

import copy
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count, pairwise
from numbers import Integral, Real
from os import PathLike
from typing import Any

from transformers import DeiTConfig, ViTConfig


SELECTIONS = ("relevance", "random")
SIMILARITY_PARTITIONS = ("strided", "random")
TOKEN_REDUCTIONS = ("drop", "merge")
NOISE_GATES = ("softmax", "capacity")
SCHEDULE_STYLES = ("single", "multi", "gradual")

# fvcore counts five operations for each element of an affine LayerNorm.
LAYER_NORM_OPERATIONS = 5
# Of the 79 tokens that the authors' single schedule drops at 196, 25 are dropped for similarity.
SIMILAR_SHARE = 25 / 79


def patch_token_counts(
    num_patches: int,
    num_hidden_layers: int,
    prune_layers: Sequence[int],
    keep_rates: Sequence[float],
    num_similar_tokens: int = 0,
) -> list[int]:
    """
    Number of patch tokens that enter each layer and, as the last entry, that leave the last one.

    With one pruned layer, `int(num_patches * keep_rate) + num_similar_tokens` tokens are selected after that layer and
    `num_similar_tokens` of them are dropped for similarity. With several, `num_similar_tokens` embeddings are dropped
    before the first layer and every pruned layer keeps `int(current * keep_rate)`, as in the authors' code:
    https://github.com/mx-ethan-rao/tnt/blob/d095619/models.py#L206-L227.

    Args:
        num_patches (`int`): Patch tokens of the image, prefix tokens not counted.
        num_hidden_layers (`int`): Layers of the encoder.
        prune_layers (`Sequence[int]`): Zero-based layers after which tokens are dropped, strictly increasing.
        keep_rates (`Sequence[float]`): For each pruned layer, the share of the current patch tokens kept, in (0, 1].
        num_similar_tokens (`int`): Tokens dropped because another token is similar to them.

    Returns:
        `list[int]`: `num_hidden_layers + 1` counts.

    Raises:
        ValueError: If the schedule cannot be carried out on `num_patches` tokens.
    """
    for name, values in (("prune_layers", prune_layers), ("keep_rates", keep_rates)):
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise ValueError(f"`{name}` must be a list, got {values!r}.")
    for layer in prune_layers:
        if not _is_integer(layer) or not 0 <= layer < num_hidden_layers:
            raise ValueError(
                f"`prune_layers` must hold integers from 0 to {num_hidden_layers - 1} (the model has "
                f"{num_hidden_layers} layers), got {layer!r} in {list(prune_layers)}."
            )
    if any(later <= earlier for earlier, later in pairwise(prune_layers)):
        raise ValueError(f"`prune_layers` must be strictly increasing, got {list(prune_layers)}.")
    if len(prune_layers) != len(keep_rates):
        raise ValueError(
            f"`keep_rates` must hold one rate for each of `prune_layers`, got {len(keep_rates)} rates "
            f"{list(keep_rates)} for {len(prune_layers)} layers {list(prune_layers)}."
        )
    for rate in keep_rates:
        if not _is_real(rate) or not 0 < rate <= 1:
            raise ValueError(f"`keep_rates` must hold numbers in (0, 1], got {rate!r} in {list(keep_rates)}.")
    if not _is_integer(num_similar_tokens) or num_similar_tokens < 0:
        raise ValueError(f"`num_similar_tokens` must be an integer of at least 0, got {num_similar_tokens!r}.")

    current = num_patches
    if len(prune_layers) > 1:
        if num_similar_tokens > current // 2:
            raise ValueError(
                f"`num_similar_tokens` must be at most {current // 2}, half of the {current} patch tokens that the "
                f"similarity step splits in two, got {num_similar_tokens}."
            )
        current = current - num_similar_tokens
    counts = [current]
    for layer in range(num_hidden_layers):
        if layer in prune_layers:
            rate = keep_rates[list(prune_layers).index(layer)]
            num_kept = int(current * rate)
            if num_kept < 1:
                raise ValueError(
                    f"`keep_rates` {list(keep_rates)} leave no patch token after layer {layer}: {rate} of {current}; "
                    f"the rate must be more than 1/{current} there."
                )
            if len(prune_layers) == 1 and num_similar_tokens > min(num_kept, current - num_kept):
                raise ValueError(
                    f"`num_similar_tokens` must be at most {min(num_kept, current - num_kept)} with `keep_rates` "
                    f"{list(keep_rates)}: {num_kept} of {current} patch tokens are kept after layer {layer}, and the "
                    f"similarity step drops at most half of those selected before it. Got {num_similar_tokens}."
                )
            current = num_kept
        counts.append(current)
    return counts


def height_and_width(size: int | Sequence[int]) -> tuple[int, int]:
    """Both sides of an image or patch whose config field may hold one number for a square."""
    return tuple(size) if isinstance(size, Iterable) else (size, size)


def count_patches(image_size: int | Sequence[int], patch_size: int | Sequence[int]) -> int:
    """Number of whole patches in an image; both sizes in pixels."""
    (height, width), (patch_height, patch_width) = height_and_width(image_size), height_and_width(patch_size)
    return (height // patch_height) * (width // patch_width)


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


@dataclass(kw_only=True, repr=False)
class TokenPruningFields:
    """
    The settings of TNT pruning, shared by `TntViTConfig` and `TntDeiTConfig`.

    Args:
        prune_layers (`list[int]`, *optional*, defaults to `[]`):
            Zero-based layers after which patch tokens are dropped at inference; 2 means after the third layer. Empty
            is the unpruned model.
        keep_rates (`list[float]`, *optional*, defaults to `[]`):
            For each of `prune_layers`, the share of the current patch tokens that is kept, in (0, 1].
        num_similar_tokens (`int`, *optional*, defaults to 0):
            Tokens dropped because another token is similar to them: after the pruned layer if there is one, before the
            first layer if there are several. For images of another size than `image_size`, it grows with the number of
            patches, so that a schedule carries over. Without effect if `prune_layers` is empty.
        selection (`str`, *optional*, defaults to `"relevance"`):
            `"relevance"` keeps the tokens that the scoring heads rank highest. `"random"` ranks by a random draw
            instead and leaves everything else unchanged: the control that learned scores must beat.
        similarity_partition (`str`, *optional*, defaults to `"strided"`):
            How the similarity step splits the tokens. `"strided"`: every second token, so that equal images give equal
            logits. `"random"`: one random permutation for each batch, as the authors' code does.
        token_reduction (`str`, *optional*, defaults to `"drop"`):
            What becomes of the tokens that leave. `"drop"` deletes the least relevant, as the authors' code does.
            `"merge"` averages them into the remaining tokens, the most similar first, and attention counts each token
            as often as it has patches; needs the `sdpa` or `eager` attention.
        relevance_weight (`float`, *optional*, defaults to 0.05):
            With `"merge"`, how much relevance holds tokens back: cosine similarity for each standard deviation of the
            scores. 0 merges by similarity alone.
        noise_std (`float`, *optional*, defaults to 0.02):
            Standard deviation of the training noise on a token of no relevance (beta, 0.02 in the authors' code); with
            the gate `"capacity"` in units of the token's own standard deviation over its channels.
        num_noise_layers (`int`, *optional*, defaults to 5):
            Number of first layers after which noise is added in training, all if the model has fewer. Their scoring
            heads are the ones that learn.
        noise_layer_norm (`bool`, *optional*, defaults to `True`):
            Whether a LayerNorm is applied to all tokens where noise is added, in training only, as the authors' code
            does.
        noise_gate (`str`, *optional*, defaults to `"softmax"`):
            How scores become the amount of noise. `"softmax"`: 1 less the softmax over the tokens, as in the authors'
            code. `"capacity"`: a share of the tokens, drawn for each image in training so that one training serves
            all budgets, is nearly spared, and the rest nearly gets the full noise.
        noise_one_layer (`bool`, *optional*, defaults to `False`):
            Whether noise is added after one layer of the first `num_noise_layers`, drawn for each image in training,
            instead of after all of them as in the authors' code.

    Raises:
        ValueError: If a value is not allowed; the message names the field, the value and what is allowed.
    """

    prune_layers: list[int] = field(default_factory=list)
    keep_rates: list[float] = field(default_factory=list)
    num_similar_tokens: int = 0
    selection: str = "relevance"
    similarity_partition: str = "strided"
    token_reduction: str = "drop"
    relevance_weight: float = 0.05
    noise_std: float = 0.02
    num_noise_layers: int = 5
    noise_layer_norm: bool = True
    noise_gate: str = "softmax"
    noise_one_layer: bool = False

    def __post_init__(self, **kwargs):
        kwargs.pop("model_type", None)  # a plain model's config may be passed on; it must not rename this class
        super().__post_init__(**kwargs)
        self.validate()
        self._use_plain_numbers()

    def _use_plain_numbers(self) -> None:
        """Own lists of plain numbers, which JSON can hold and the caller cannot change unnoticed."""
        self.prune_layers = [int(layer) for layer in self.prune_layers]
        self.keep_rates = [float(rate) for rate in self.keep_rates]
        self.num_similar_tokens = int(self.num_similar_tokens)
        self.relevance_weight = float(self.relevance_weight)
        self.noise_std = float(self.noise_std)
        self.num_noise_layers = int(self.num_noise_layers)

    def validate_token_pruning(self) -> None:
        """Check every TNT setting; raises ValueError with the field, the value and what is allowed."""
        self.patch_token_counts()
        for name, allowed in (
            ("selection", SELECTIONS),
            ("similarity_partition", SIMILARITY_PARTITIONS),
            ("token_reduction", TOKEN_REDUCTIONS),
            ("noise_gate", NOISE_GATES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        for name in ("relevance_weight", "noise_std"):
            value = getattr(self, name)
            if not _is_real(value) or not 0 <= value < math.inf:
                raise ValueError(f"`{name}` must be a finite number of at least 0, got {value!r}.")
        if not _is_integer(self.num_noise_layers) or self.num_noise_layers < 0:
            raise ValueError(f"`num_noise_layers` must be an integer of at least 0, got {self.num_noise_layers!r}.")
        for name in ("noise_layer_norm", "noise_one_layer"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be True or False, got {getattr(self, name)!r}.")

    def validate(self) -> None:
        self.validate_token_pruning()
        super().validate()

    @property
    def num_patches(self) -> int:
        """Number of patch tokens of one image of `image_size`."""
        return count_patches(self.image_size, self.patch_size)

    @property
    def num_learning_layers(self) -> int:
        """Number of first layers whose scoring heads learn: noise after the last one reaches no prefix token."""
        return min(self.num_noise_layers, self.num_hidden_layers - 1) if self.noise_std > 0 else 0

    def patch_token_counts(self, num_patches: int | None = None) -> list[int]:
        """Patch tokens entering each layer and leaving the last one; see the function `patch_token_counts`."""
        num_patches = self.num_patches if num_patches is None else num_patches
        return patch_token_counts(
            num_patches,
            self.num_hidden_layers,
            self.prune_layers,
            self.keep_rates,
            self.similar_token_count(num_patches),
        )

    def similar_token_count(self, num_patches: int) -> int:
        """Tokens dropped for similarity in an image of `num_patches`: `num_similar_tokens`, scaled to its size."""
        if num_patches == self.num_patches:
            return self.num_similar_tokens
        scaled = self.num_similar_tokens * num_patches // self.num_patches
        if len(self.prune_layers) != 1:
            return scaled
        num_kept = int(num_patches * self.keep_rates[0])  # which may be rounded to fewer dropped tokens than these
        return min(scaled, num_kept, num_patches - num_kept)

    def set_schedule(
        self,
        prune_layers: Sequence[int],
        keep_rates: Sequence[float],
        num_similar_tokens: int = 0,
        selection: str = "relevance",
    ) -> None:
        """
        Change the pruning schedule; a schedule that is refused leaves the old one in place.

        Raises:
            ValueError: As at construction.
        """
        schedule = {
            "prune_layers": prune_layers,
            "keep_rates": keep_rates,
            "num_similar_tokens": num_similar_tokens,
            "selection": selection,
        }
        previous = {name: getattr(self, name) for name in schedule}
        try:
            for name, value in schedule.items():
                setattr(self, name, value)
            self.validate_token_pruning()
            self._use_plain_numbers()
        except ValueError:
            for name, value in previous.items():
                setattr(self, name, value)
            raise

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        """
        As in Transformers, but the pruning settings among `kwargs` are checked together. New `prune_layers` are a new
        schedule: without `num_similar_tokens` it has none, as in `set_schedule`.
        """
        names = TokenPruningFields.__dataclass_fields__
        overrides = {name: kwargs.pop(name) for name in names if name in kwargs}
        if "prune_layers" in overrides:
            overrides = {"num_similar_tokens": 0, **overrides}
        return super().from_dict({**config_dict, **overrides}, **kwargs)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """
        As in Transformers, but the config of the plain model is read without a warning and any other is refused.

        Raises:
            ValueError: If `model_type` is another architecture's.
        """
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_type = config_dict.pop("model_type", None)
        if model_type not in (None, cls.plain_model_type, cls.model_type):
            raise ValueError(
                f"{cls.__name__} reads checkpoints whose `model_type` is '{cls.plain_model_type}' or "
                f"'{cls.model_type}', got {model_type!r} in {pretrained_model_name_or_path}."
            )
        return config_dict, kwargs


class TntViTConfig(TokenPruningFields, ViTConfig):
    """
    Configuration of a ViT with TNT pruning: the fields of [`ViTConfig`] and those of [`TokenPruningFields`].

    Example:

    ```python
    >>> TntViTConfig(prune_layers=[2], keep_rates=[0.6], num_similar_tokens=25).patch_token_counts()
    [196, 196, 196, 117, 117, 117, 117, 117, 117, 117, 117, 117, 117]
    ```
    """

    model_type = "tnt_vit"
    plain_model_type = ViTConfig.model_type
    num_prefix_tokens = 1
    keys_to_ignore_at_inference = ["hidden_states", "attentions", "kept_mask"]


class TntDeiTConfig(TokenPruningFields, DeiTConfig):
    """
    Configuration of a distilled DeiT with TNT pruning: the fields of [`DeiTConfig`], those of [`TokenPruningFields`],
    and:

    Args:
        distillation_head_in_loss (`bool`, *optional*, defaults to `False`):
            Whether the training loss is the mean over both heads instead of that of the [CLS] head. Frozen backbones
            do without, as in the authors' code; a distillation head that is to be trained needs it.
    """

    model_type = "tnt_deit"
    plain_model_type = DeiTConfig.model_type
    num_prefix_tokens = 2
    keys_to_ignore_at_inference = [
        "cls_logits",
        "distillation_logits",
        "hidden_states",
        "attentions",
        "kept_mask",
    ]

    distillation_head_in_loss: bool = False


@dataclass(frozen=True)
class Schedule:
    """A named pruning schedule; the fields are those of [`TokenPruningFields`]."""

    name: str
    prune_layers: tuple[int, ...]
    keep_rates: tuple[float, ...]
    num_similar_tokens: int = 0

    @classmethod
    def keeping(
        cls, counts: Sequence[int], prune_layers: Sequence[int], num_patches: int, num_similar_tokens: int = 0
    ) -> "Schedule":
        """
        The schedule that keeps `counts` of `num_patches` patch tokens after `prune_layers`, named by its text form
        `LAYERS:RATES[:SIMILAR_TOKENS]`.

        Raises:
            ValueError: If a count is not from 1 to the one before it.
        """
        first = num_patches - (num_similar_tokens if len(prune_layers) > 1 else 0)
        keep_rates = tuple(keep_rate_for(kept, current) for current, kept in pairwise([first, *counts]))
        text = f"{','.join(map(str, prune_layers))}:{','.join(map(str, keep_rates))}"
        text += f":{num_similar_tokens}" if num_similar_tokens else ""
        return cls(text, tuple(prune_layers), keep_rates, num_similar_tokens)

    @property
    def settings(self) -> dict[str, Any]:
        """What `set_schedule` and the configs take, as JSON holds it: `model.set_schedule(**schedule.settings)`."""
        return {
            "prune_layers": list(self.prune_layers),
            "keep_rates": list(self.keep_rates),
            "num_similar_tokens": self.num_similar_tokens,
        }


def count_gflops(
    config: TntViTConfig | TntDeiTConfig,
    image_size: int | Sequence[int] | None = None,
    *,
    as_executed: bool = False,
) -> float:
    """
    Cost of one image at inference in GFLOPs as the literature counts them: 1e9 multiply-accumulates.

    Equal to fvcore's count with the attention products included: convolution, linear layers, both attention products,
    LayerNorm (5 operations per element), scoring heads, similarity products and the means of merged tokens. Softmax,
    GELU, biases, sorting and gathering are not counted.

    Args:
        config ([`TntViTConfig`] or [`TntDeiTConfig`]): Model and schedule.
        image_size (`int` or `(height, width)`, *optional*): Pixels; `config.image_size` if None.
        as_executed (`bool`, *optional*, defaults to `False`):
            Count what the classifiers here execute, whose last layer leaves out the patch tokens (with flex attention
            it does not), instead of every layer on all of its tokens, as published figures do.

    Raises:
        ValueError: If the schedule cannot be carried out at this number of patches.
    """
    num_patches = count_patches(config.image_size if image_size is None else image_size, config.patch_size)
    counts = config.patch_token_counts(num_patches)
    num_similar_tokens = config.similar_token_count(num_patches)
    hidden_size, num_prefix_tokens = config.hidden_size, config.num_prefix_tokens
    patch_height, patch_width = height_and_width(config.patch_size)
    last_layer = config.num_hidden_layers - 1

    total = num_patches * config.num_channels * patch_height * patch_width * hidden_size
    if counts[0] < num_patches:
        total += _reduction_cost(config, num_patches, counts[0], num_similar_tokens)
    for layer, num_patch_tokens in enumerate(counts[:-1]):
        num_tokens = num_outputs = num_patch_tokens + num_prefix_tokens
        if as_executed and layer == last_layer and last_layer not in config.prune_layers:
            num_outputs = num_prefix_tokens
        total += 2 * (num_tokens + num_outputs) * hidden_size**2  # key and value, query and output projections
        total += 2 * num_tokens * num_outputs * hidden_size  # queries times keys, attention times values
        total += 2 * num_outputs * hidden_size * config.intermediate_size
        total += (num_tokens + num_outputs) * hidden_size * LAYER_NORM_OPERATIONS
        if counts[layer + 1] < num_patch_tokens:
            num_dissimilar = num_similar_tokens if len(config.prune_layers) == 1 else 0
            total += num_patch_tokens * hidden_size
            total += _reduction_cost(config, num_patch_tokens, counts[layer + 1], num_dissimilar)
    num_normalized = num_outputs if last_layer not in config.prune_layers else counts[-1] + num_prefix_tokens
    total += num_normalized * hidden_size * LAYER_NORM_OPERATIONS
    total += num_prefix_tokens * hidden_size * config.num_labels  # one classifier for each prefix token
    return total / 1e9


def _reduction_cost(
    config: TntViTConfig | TntDeiTConfig, num_tokens: int, num_kept: int, num_similar_tokens: int
) -> int:
    """Multiply-accumulates of the similarity products and weighted means that leave `num_kept` of `num_tokens`."""
    if config.token_reduction == "drop":
        num_selected = num_kept + num_similar_tokens
        num_pairs = (num_selected // 2) * (num_selected - num_selected // 2) if num_similar_tokens > 0 else 0
        return num_pairs * config.hidden_size
    total = 0
    for num_remaining in (num_kept + num_similar_tokens, num_kept):
        while num_tokens > num_remaining:
            num_references = num_tokens - num_tokens // 2
            num_merged = min(num_tokens - num_remaining, num_tokens // 2)
            total += (num_tokens // 2 + num_merged) * num_references * config.hidden_size
            num_tokens = num_tokens - num_merged
    return total


def schedule_for(
    config: TntViTConfig | TntDeiTConfig,
    *,
    gflops: float | None = None,
    speedup: float | None = None,
    style: str | None = None,
    prune_layers: Sequence[int] | None = None,
    cost: Callable[[TntViTConfig | TntDeiTConfig], float] | None = None,
) -> Schedule:
    """
    The schedule of images of `config.image_size` that meets a budget by at most 1 %.

    The styles prune only after layers whose scoring heads learn (`num_noise_layers`).

    Args:
        config ([`TntViTConfig`] or [`TntDeiTConfig`]): Model; its own schedule does not matter and is not changed.
        gflops (`float`, *optional*): Budget as [`count_gflops`] counts it for published figures.
        speedup (`float`, *optional*):
            Budget as the cost of this model unpruned, whose last layer is cut too, divided by that of the schedule.
        style (`str`, *optional*):
            `"single"` prunes after the third layer, or the nearest one that meets the budget, with the authors' share
            of similar tokens. `"multi"` prunes after the third to fifth layer, `"gradual"` after every layer (from the
            second on where tokens are dropped), at equal rates and without the similarity step. If neither this nor
            `prune_layers` is given, `"gradual"` where tokens are merged, else `"single"`.
        prune_layers (`Sequence[int]`, *optional*): Layers to prune, instead of a style.
        cost (`Callable`, *optional*):
            For `speedup`, the cost of a config with its schedule, such as
            [`~tnt_hf.throughput.MeasuredCost`]; GFLOPs as executed if None.

    Raises:
        ValueError: If not exactly one budget is given, both `style` and `prune_layers` are, or no such schedule meets
            the budget; the message names the range that can be reached.
    """
    if (gflops is None) == (speedup is None):
        raise ValueError(f"Exactly one of `gflops` and `speedup` must be given, got {gflops} and {speedup}.")
    name, budget = ("gflops", gflops) if speedup is None else ("speedup", speedup)
    if not _is_real(budget) or not 0 < budget < math.inf:
        raise ValueError(f"`{name}` must be a finite number above 0, got {budget!r}.")
    if cost is not None and speedup is None:
        raise ValueError("`cost` goes with `speedup`: `gflops` has a cost of its own.")
    if style is not None and prune_layers is not None:
        raise ValueError(
            f"At most one of `style` and `prune_layers` may be given, got {style!r} and {list(prune_layers)}."
        )
    if style is None:
        style = "gradual" if config.token_reduction == "merge" else "single"
    trial = copy.copy(config)
    if cost is None:

        def cost(trial):
            return count_gflops(trial, as_executed=speedup is not None)

    def price(schedule):
        for name, value in schedule.settings.items():
            setattr(trial, name, value)  # `set_schedule` checks, which takes longer than most costs
        return cost(trial)

    unpruned = Schedule("full", (), ())
    full = price(unpruned)
    limit = gflops if speedup is None else full / speedup
    costs = [full]
    if limit * 0.99 <= full <= limit:
        return unpruned
    for layers in [tuple(prune_layers)] if prune_layers is not None else _layers_of_style(config, style):
        if len(layers) == 1:
            options = _single_layer_options(trial.num_patches, layers)
        else:
            options = _multi_layer_options(trial.num_patches, layers, price, limit)
        for schedule in options:
            costs.append(price(schedule))
            if limit * 0.99 <= costs[-1] <= limit:
                return schedule

    reached = sorted(costs if speedup is None else (full / each for each in costs))
    nearest = [
        f"{value:.6g}"
        for value in (
            max((value for value in reached if value <= budget), default=None),
            min((value for value in reached if value > budget), default=None),
        )
        if value is not None
    ]
    layers = f"`prune_layers` {list(prune_layers)}" if prune_layers is not None else f"style '{style}'"
    raise ValueError(
        f"No schedule of {layers} has a cost of up to 1 % under `{name}` {budget:g} at {trial.num_patches} patch "
        f"tokens: reachable are {reached[0]:.6g} to {reached[-1]:.6g}; nearest is {' or '.join(nearest)}."
    )


def _layers_of_style(config: TntViTConfig | TntDeiTConfig, style: str) -> list[tuple[int, ...]]:
    """The layers that a style may prune, best first, among those whose scoring heads learn."""
    if style not in SCHEDULE_STYLES:
        raise ValueError(f"`style` must be one of {', '.join(SCHEDULE_STYLES)}, got {style!r}.")
    learning = range(config.num_learning_layers)
    if len(learning) == 0:
        raise ValueError(
            f"No scoring head learns with num_noise_layers={config.num_noise_layers}, noise_std={config.noise_std} "
            f"and num_hidden_layers={config.num_hidden_layers}, so no budget but the full one can be met."
        )
    if style == "single":
        return [(layer,) for layer in sorted(learning, key=lambda layer: abs(layer - 2))]
    if style == "multi":
        return [tuple(learning[:5][-3:])]
    return [tuple(learning if config.token_reduction == "merge" else learning[1:] or learning)]


def _single_layer_options(num_patches: int, layers: tuple[int, ...]) -> Iterator[Schedule]:
    """Schedules with the authors' share of similar tokens, most tokens first."""
    for kept in range(num_patches - 1, 0, -1):
        num_similar_tokens = min(round(SIMILAR_SHARE * (num_patches - kept)), kept)
        yield Schedule.keeping((kept,), layers, num_patches, num_similar_tokens)


def _multi_layer_options(
    num_patches: int, layers: tuple[int, ...], price: Callable[[Schedule], float], limit: float
) -> Iterator[Schedule]:
    """
    Schedules without similar tokens: equal rates, with the last count moved to where the cost
    comes closest to the limit, the least moved first; then with another count moved too, which matters where a single
    token is more than 1 % of the budget.
    """

    num_layers = len(layers)
    keeping = partial(Schedule.keeping, prune_layers=layers, num_patches=num_patches)

    def with_last_moved(counts: Sequence[int]) -> tuple[float, tuple[int, ...]]:
        *counts, last = counts
        choices = range(1, counts[-1] + 1)
        num_affordable = bisect_right(choices, limit, key=lambda moved: price(keeping((*counts, moved))))
        moved = choices[max(num_affordable - 1, 0)]
        return abs(moved - last) / last, (*counts, moved)

    fewest, most = keeping((1,) * num_layers), keeping((num_patches - 1,) * num_layers)
    yield from (fewest, most)
    if not price(fewest) <= limit <= price(most) / 0.99:
        return
    equal_rates = []
    for first in range(num_patches - 1, 0, -1):
        counts = [first]
        while len(counts) < num_layers:
            counts.append(max(1, counts[-1] * first // num_patches))
        equal_rates.append(counts)
    options = sorted(with_last_moved(counts) for counts in equal_rates)
    yield from (keeping(counts) for _, counts in options)
    for _, counts in options[:20]:
        for index in range(num_layers - 1):
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
    if num_kept == num_tokens:
        return 1.0
    for digits in count(1):
        units = math.ceil(num_kept / num_tokens * 10**digits)
        for rate in (units / 10**digits, (units + 1) / 10**digits):  # 200 * 0.145 is a little less than 29
            if rate <= 1 and int(num_tokens * rate) == num_kept:
                return rate


__all__ = [
    "Schedule",
    "TntDeiTConfig",
    "TntViTConfig",
    "TokenPruningFields",
    "count_gflops",
    "count_patches",
    "height_and_width",
    "keep_rate_for",
    "patch_token_counts",
    "schedule_for",
]
