"""Configurations of ViT and distilled DeiT with Training Noise Token (TNT) pruning (arXiv 2411.18092)."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from numbers import Integral, Real
from os import PathLike
from typing import Any

from transformers import DeiTConfig, ViTConfig


SELECTIONS = ("relevance", "random")
SIMILARITY_PARTITIONS = ("strided", "random")


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
            first layer if there are several. Without effect if `prune_layers` is empty.
        selection (`str`, *optional*, defaults to `"relevance"`):
            `"relevance"` keeps the tokens that the scoring heads rank highest. `"random"` ranks by a random draw
            instead and leaves everything else unchanged: the control that learned scores must beat.
        similarity_partition (`str`, *optional*, defaults to `"strided"`):
            How the similarity step splits the tokens. `"strided"`: every second token, so that equal images give equal
            logits. `"random"`: one random permutation for each batch, as the authors' code does.
        noise_std (`float`, *optional*, defaults to 0.02):
            Standard deviation of the training noise on a token of no relevance (beta, 0.02 in the authors' code).
        num_noise_layers (`int`, *optional*, defaults to 5):
            Number of first layers after which noise is added in training, all if the model has fewer. Their scoring
            heads are the ones that learn.
        noise_layer_norm (`bool`, *optional*, defaults to `True`):
            Whether a LayerNorm is applied to all tokens where noise is added, in training only, as the authors' code
            does.

    Raises:
        ValueError: If a value is not allowed; the message names the field, the value and what is allowed.
    """

    prune_layers: list[int] = field(default_factory=list)
    keep_rates: list[float] = field(default_factory=list)
    num_similar_tokens: int = 0
    selection: str = "relevance"
    similarity_partition: str = "strided"
    noise_std: float = 0.02
    num_noise_layers: int = 5
    noise_layer_norm: bool = True

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
        self.noise_std = float(self.noise_std)
        self.num_noise_layers = int(self.num_noise_layers)

    def validate_token_pruning(self) -> None:
        """Check every TNT setting; raises ValueError with the field, the value and what is allowed."""
        self.patch_token_counts()
        for name, allowed in (("selection", SELECTIONS), ("similarity_partition", SIMILARITY_PARTITIONS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        if not _is_real(self.noise_std) or not 0 <= self.noise_std < math.inf:
            raise ValueError(f"`noise_std` must be a finite number of at least 0, got {self.noise_std!r}.")
        if not _is_integer(self.num_noise_layers) or self.num_noise_layers < 0:
            raise ValueError(f"`num_noise_layers` must be an integer of at least 0, got {self.num_noise_layers!r}.")
        if not isinstance(self.noise_layer_norm, bool):
            raise ValueError(f"`noise_layer_norm` must be True or False, got {self.noise_layer_norm!r}.")

    def validate(self) -> None:
        self.validate_token_pruning()
        super().validate()

    @property
    def num_patches(self) -> int:
        """Number of patch tokens of one image of `image_size`."""
        return count_patches(self.image_size, self.patch_size)

    def patch_token_counts(self, num_patches: int | None = None) -> list[int]:
        """Patch tokens entering each layer and leaving the last one; see the function `patch_token_counts`."""
        return patch_token_counts(
            self.num_patches if num_patches is None else num_patches,
            self.num_hidden_layers,
            self.prune_layers,
            self.keep_rates,
            self.num_similar_tokens,
        )

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
    keys_to_ignore_at_inference = ["hidden_states", "attentions", "kept_indices"]


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
        "kept_indices",
    ]

    distillation_head_in_loss: bool = False


__all__ = [
    "TntDeiTConfig",
    "TntViTConfig",
    "TokenPruningFields",
    "count_patches",
    "height_and_width",
    "patch_token_counts",
]
