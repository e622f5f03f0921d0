import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

from tnt_hf import (
    TntDeiTConfig,
    TntDeiTForImageClassification,
    TntViTConfig,
    TntViTForImageClassification,
)


TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 4,
    "num_labels": 7,
    # the default 0.02 leaves random models almost linear, and their scores almost equal
    "initializer_range": 0.2,
}
FAMILIES = {
    "vit": (TntViTConfig, TntViTForImageClassification),
    "deit": (TntDeiTConfig, TntDeiTForImageClassification),
}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def make_model(family):
    """A tiny model with random weights of one family, in evaluation mode; config fields may be given."""

    def make(**fields):
        config_class, model_class = FAMILIES[family]
        torch.manual_seed(0)
        return model_class(config_class(**{**TINY, **fields})).eval()

    return make


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
