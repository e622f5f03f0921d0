"""Token reduction in the vision encoders of Transformers: one call on a model that is already loaded."""

from .configuration import EncoderReductionConfig, TokenScorerConfig
from .families import FAMILIES, Family
from .reduction import count_layer_gflops, reduce_tokens, restore_tokens
from .scorer import TokenScorer
from .token_states import put_back


__all__ = [
    "FAMILIES",
    "EncoderReductionConfig",
    "Family",
    "TokenScorer",
    "TokenScorerConfig",
    "count_layer_gflops",
    "put_back",
    "reduce_tokens",
    "restore_tokens",
]
