"""What is set when an encoder reduces its tokens: by similarity alone, or by scoring heads that are trained."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from ..configuration_tnt import TokenPruningFields
from ..schedules_tnt import Schedule, count_patches, height_and_width, is_integer, require
from ..token_reduction_tnt import ReductionStep
from .families import Encoder, Family


def shape_of(encoder: Encoder, family: Family) -> dict[str, int]:
    """The config fields on which it depends whether scoring heads fit an encoder."""
    return {
        "num_prefix_tokens": family.num_prefix_tokens + getattr(encoder.config, "num_register_tokens", 0),
        "num_hidden_layers": len(encoder.layers),
        "hidden_size": encoder.config.hidden_size,
    }


class EncoderReductionConfig(TokenPruningFields, PreTrainedConfig):
    """
    How an encoder without scoring heads reduces its tokens: the fields of [`TokenPruningFields`] and the shape of the
    encoder.
    """

    model_type = plain_model_type = "tnt_encoder"
    # The fields that have an effect, besides those of the schedule.
    setting_names = ("token_reduction", "size_bias", "similarity_partition")
    allowed_reductions, heads = ("cluster", "merge"), "without a scorer"

    num_prefix_tokens: int = 1
    num_hidden_layers: int = 12
    hidden_size: int = 768
    image_size: int | list[int] = 224
    patch_size: int | list[int] = 16
    token_reduction: str = "cluster"

    def validate(self) -> None:
        """Check every setting; raises ValueError with the field, the value and what is allowed."""
        super().validate()
        allowed = f"one of {', '.join(self.allowed_reductions)} {self.heads}"
        require(self.token_reduction in self.allowed_reductions, "token_reduction", allowed, self.token_reduction)

    @property
    def uses_scores(self) -> bool:
        """There are no heads."""
        return False

    def learning_layers(self) -> range:
        """The first layers, after which `"merge"` lets tokens leave under a budget, as where heads are trained."""
        return range(min(self.num_noise_layers, self.num_hidden_layers - 1))

    @classmethod
    def of(
        cls, encoder: Encoder, family: Family, image_size: int | Sequence[int] | None = None, **settings: Any
    ) -> "EncoderReductionConfig":
        """
        The config of an encoder for images of `image_size`, by default those of the encoder's own config.

        Raises:
            ValueError: If there is no image size or it gives no patch, or a setting is none of `setting_names` or is
                not allowed.
        """
        for name, value in settings.items():
            allowed = f"left out, as settings {cls.heads} are {', '.join(cls.setting_names)}"
            require(name in cls.setting_names, name, allowed, value)
        image_size = getattr(encoder.config, "image_size", None) if image_size is None else image_size
        sides, patch_sides = height_and_width(image_size), height_and_width(encoder.config.patch_size)
        are_pixels = len(sides) == 2 and all(is_integer(side, 1) for side in sides)
        allowed = f"one or two integers, of pixels, with at least one patch of {patch_sides} pixels"
        require(are_pixels and count_patches(sides, patch_sides) > 0, "image_size", allowed, image_size)
        sizes = {"image_size": list(sides), "patch_size": list(patch_sides)}
        return cls(**shape_of(encoder, family), **sizes, **settings)


class TokenScorerConfig(EncoderReductionConfig):
    """
    How an encoder reduces its tokens by scoring heads, and how these are trained: the fields of
    [`TokenPruningFields`], of which the noise is in units of each token's own deviation by default and after one layer
    at a time, as a frozen network of real size answers under no other; the shape of the encoder; and:

    Args:
        encoder_fingerprint (`str`, *optional*):
            Of the weights of the encoder, by [`~tnt_hf.encoders.scorer.fingerprint`]; None if they could not be read.
    """

    model_type = plain_model_type = "tnt_scorer"
    setting_names = (
        *EncoderReductionConfig.setting_names,
        *("relevance_weight", "selection", "noise_std", "num_noise_layers", "noise_gate", "noise_one_layer"),
    )
    allowed_reductions, heads = ("drop", "merge"), "with a scorer"

    token_reduction: str = "merge"
    noise_std: float = 1.0
    noise_gate: str = "capacity"
    noise_one_layer: bool = True
    noise_layer_norm: bool = False
    encoder_fingerprint: str | None = None

    # as in models with heads
    uses_scores = TokenPruningFields.uses_scores
    learning_layers = TokenPruningFields.learning_layers

    def validate(self) -> None:
        super().validate()
        allowed = f"below the number of layers, {self.num_hidden_layers}"
        require(self.num_noise_layers < self.num_hidden_layers, "num_noise_layers", allowed, self.num_noise_layers)

    def reduction_steps(
        self, num_patches: int | None = None, schedule: Schedule | None = None
    ) -> tuple[ReductionStep, ...]:
        steps = super().reduction_steps(num_patches, schedule)
        layers = [step.layer for step in steps if step.uses_scores and step.layer >= self.num_noise_layers]
        allowed = f"of the first {self.num_noise_layers} layers, which have scoring heads"
        require(not layers, "prune_layers", allowed, layers)
        return steps


__all__ = ["EncoderReductionConfig", "TokenScorerConfig", "shape_of"]
