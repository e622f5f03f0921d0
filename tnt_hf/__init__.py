"""Training Noise Token (TNT) pruning for vision transformers, native to Hugging Face Transformers."""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from .configuration_tnt import TntDeiTConfig, TntViTConfig
from .modeling_tnt import (
    FAMILIES,
    TntDeiTForImageClassification,
    TntDeiTModel,
    TntViTForImageClassification,
    TntViTModel,
)


__version__ = "0.1.0"

for _config, _backbone, _classifier in FAMILIES:
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _backbone)
    AutoModelForImageClassification.register(_config, _classifier)

__all__ = [
    "TntDeiTConfig",
    "TntDeiTForImageClassification",
    "TntDeiTModel",
    "TntViTConfig",
    "TntViTForImageClassification",
    "TntViTModel",
]
