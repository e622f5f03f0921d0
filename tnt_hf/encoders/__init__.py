"""Token reduction in the vision encoders of Transformers: one call on a model that is already loaded."""

from .families import FAMILIES, Family
from .hooks import put_back
from .reduction import EncoderReductionConfig, count_layer_gflops, reduce_tokens, restore_tokens


__all__ = [
    "FAMILIES",
    "EncoderReductionConfig",
    "Family",
    "count_layer_gflops",
    "put_back",
    "reduce_tokens",
    "restore_tokens",
]
