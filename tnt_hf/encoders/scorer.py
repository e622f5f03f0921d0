"""Scoring heads for an encoder: a small model of their own, saved, pushed and loaded apart from it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..modeling_tnt import ScoringHead
from ..schedules_tnt import require
from .configuration import TokenScorerConfig, shape_of
from .families import Encoder, Family, known_encoder


NUM_SIGNS = 16  # of each layer
LARGEST_DIFFERENCE = 1 / 8  # a share of the signs; of other weights half differ


class TokenScorer(PreTrainedModel):
    """
    Scoring heads for the first layers of an encoder, which rank its patch tokens: a linear one for each layer, of some
    hundred numbers. [`~tnt_hf.encoders.reduce_tokens`] puts them on a model,
    [`~tnt_hf.encoders.distillation.ScoreLearning`] trains them, and they are saved, pushed to the Hub and loaded as
    any model of Transformers, without the encoder.

    They score wherever the tokens are; `scorer.to(device)` saves the copying of their weights.
    """

    config_class = TokenScorerConfig
    config: TokenScorerConfig
    base_model_prefix = "scorer"
    _no_split_modules = ["ScoringHead"]

    def __init__(self, config: TokenScorerConfig):
        super().__init__(config)
        self.heads = nn.ModuleList([ScoringHead(config.hidden_size, 1) for _ in config.learning_layers()])
        self.post_init()

    @classmethod
    def for_encoder(
        cls,
        model: nn.Module,
        *,
        image_size: int | Sequence[int] | None = None,
        family: Family | None = None,
        **settings: Any,
    ) -> "TokenScorer":
        """
        Untrained heads for the vision encoder of a model, from torch's random numbers.

        Args:
            model, image_size, family: As in [`~tnt_hf.encoders.reduce_tokens`].
            settings:
                Fields of [`TokenScorerConfig`]: `token_reduction`, `"merge"` by default or `"drop"`; how many of the
                first layers have heads, `num_noise_layers`, by default half of them; what else noise and reduction
                depend on.

        Raises:
            ValueError: If the model has no encoder of a known family, or several, a setting is not allowed, or no head
                could learn.
        """
        encoder, family = known_encoder(model, family)
        settings = {"num_noise_layers": len(encoder.layers) // 2, **settings}
        config = TokenScorerConfig.of(encoder, family, image_size, **settings)
        config.encoder_fingerprint = fingerprint(encoder)
        return cls(config)

    def config_on(
        self, encoder: Encoder, family: Family, image_size: int | Sequence[int] | None = None, **settings: Any
    ) -> TokenScorerConfig:
        """
        How an encoder reduces its tokens by these heads: their config, with other settings where they are given.

        Raises:
            ValueError: If the heads are of another encoder or of other weights, or a setting is not allowed.
        """
        shape, found = shape_of(encoder, family), fingerprint(encoder)
        own, expected = {name: getattr(self.config, name) for name in shape}, self.config.encoder_fingerprint
        if own != shape:
            raise ValueError(f"The scorer is of an encoder of {_listed(own)}, got one of {_listed(shape)}.")
        if found is not None and expected is not None and _difference(found, expected) > LARGEST_DIFFERENCE:
            raise ValueError(
                f"The scorer is of an encoder of other weights: {_difference(found, expected):.0%} of the compared "
                f"signs differ, of which {LARGEST_DIFFERENCE:.1%} may."
            )
        own = {name: getattr(self.config, name) for name in TokenScorerConfig.setting_names}
        image_size = self.config.image_size if image_size is None else image_size
        config = TokenScorerConfig.of(encoder, family, image_size, **own | settings)
        allowed = f"{len(self.heads)}, as many as the scorer has heads"
        require(config.num_noise_layers == len(self.heads), "num_noise_layers", allowed, config.num_noise_layers)
        return config

    def forward(self, tokens: torch.Tensor, layer: int) -> torch.Tensor:
        """
        Scores of tokens after a layer, higher for the more relevant: `(batch_size, num_tokens, hidden_size)` ->
        float32 of shape `(batch_size, num_tokens)`.
        """
        return self.heads[layer](tokens).squeeze(-1)


@torch.no_grad()
def fingerprint(encoder: Encoder) -> str | None:
    """
    Signs of a few weights of each layer, as hexadecimal digits, by which other weights are recognised: half precision
    and adapted LayerNorms leave them as they are. None if they cannot be read, as on the meta device or quantised.
    """
    digits = ""
    for layer in encoder.layers:
        matrix = next((value for value in layer.parameters() if value.ndim == 2), None)
        if matrix is None or matrix.is_meta or not matrix.is_floating_point():
            return None
        weights = matrix.flatten()
        signs = (weights[:: max(len(weights) // NUM_SIGNS, 1)][:NUM_SIGNS] > 0).tolist()
        digits += f"{int(''.join(str(int(sign)) for sign in signs), 2):0{NUM_SIGNS // 4}x}"
    return digits


def _difference(fingerprint: str, other: str) -> float:
    """The share of the signs that differ."""
    return (int(fingerprint, 16) ^ int(other, 16)).bit_count() / (4 * len(fingerprint))


def _listed(shape: dict[str, int]) -> str:
    return ", ".join(f"{name}={value}" for name, value in shape.items())


__all__ = ["TokenScorer", "TokenScorerConfig", "fingerprint"]
