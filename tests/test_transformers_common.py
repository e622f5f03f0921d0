"""
Transformers' own checks of a model, `ModelTesterMixin`, on the four classes of this package unpruned, and on those of
DeiT pruned.

The mixin is in `tests/test_modeling_common.py` of Transformers, which the wheel leaves out. `make test` downloads the
sdist of the installed version and names its folder:

```bash
TRANSFORMERS_TESTS=.venv/transformers .venv/bin/python -m pytest tests/test_transformers_common.py
```
"""

import os
import sys
import tempfile
import unittest
from functools import partialmethod
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import pytest
from safetensors.torch import load_file
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from tnt_hf import (
    TntDeiTConfig,
    TntDeiTForImageClassification,
    TntDeiTModel,
    TntViTConfig,
    TntViTForImageClassification,
    TntViTModel,
)
from tnt_hf.modeling_tnt import TokenPruningMixin


if "TRANSFORMERS_TESTS" not in os.environ:
    pytest.skip(
        "TRANSFORMERS_TESTS does not name the root of an extracted sdist of Transformers", allow_module_level=True
    )
TRANSFORMERS_ROOT = Path(os.environ["TRANSFORMERS_TESTS"]).resolve()
sys.path.insert(0, str(TRANSFORMERS_ROOT))

# Mixins in subpackages that the sdist leaves out: empty ones make `tests.test_modeling_common` importable.
for _module_name, _mixin_name in (
    ("tests.exporters.test_export", "ExportTesterMixin"),
    ("tests.generation.test_utils", "GenerationTesterMixin"),
):
    if not TRANSFORMERS_ROOT.joinpath(*_module_name.split(".")).with_suffix(".py").exists():
        _module = ModuleType(_module_name)
        setattr(_module, _mixin_name, type(_mixin_name, (), {}))
        sys.modules[_module_name] = _module

with patch.object(pytest.mark, "_config", None):  # the mixin's own marks are not registered here
    from tests.test_modeling_common import ModelTesterMixin, floats_tensor


class TinyModelTester:
    """What `ModelTesterMixin` asks of a `model_tester`, with the sizes of Transformers' own tests of ViT and DeiT."""

    is_training = True
    batch_size = 13
    num_channels = 3
    image_size = 30
    patch_size = 2
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4

    def __init__(self, config_class, num_prefix_tokens, schedule):
        self.config_class = config_class
        self.schedule = schedule
        self.mask_length = (self.image_size // self.patch_size) ** 2
        self.num_masks = self.mask_length // 2
        self.seq_length = self.mask_length + num_prefix_tokens  # of an attention mask
        self.encoder_seq_length = self.get_config().patch_token_counts()[0] + num_prefix_tokens  # of the first layer

    def get_config(self):
        return self.config_class(
            image_size=self.image_size,
            patch_size=self.patch_size,
            num_channels=self.num_channels,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=37,
            hidden_dropout_prob=0.1,
            attention_probs_dropout_prob=0.1,
            attn_implementation="eager",
            **self.schedule,
        )

    def prepare_config_and_inputs_for_common(self):
        shape = [self.batch_size, self.num_channels, self.image_size, self.image_size]
        return self.get_config(), {"pixel_values": floats_tensor(shape)}


class CommonTests(ModelTesterMixin):
    config_class = None
    num_prefix_tokens = None
    schedule = {}
    skips = {
        "test_model_weights_reload_no_missing_tied_weights": "a file without a backbone is refused, on purpose",
    }
    test_resize_embeddings = False

    def setUp(self):
        if self._testMethodName in self.skips:
            self.skipTest(self.skips[self._testMethodName])
        # The mixin tells by these tables of class names which classes have a loss.
        for names, model_class in zip(
            (MODEL_MAPPING_NAMES, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES), self.all_model_classes
        ):
            names_with_ours = patch.dict(names, {self.config_class.model_type: model_class.__name__})
            names_with_ours.start()
            self.addCleanup(names_with_ours.stop)
        self.model_tester = TinyModelTester(self.config_class, self.num_prefix_tokens, self.schedule)

    def test_model_get_set_embeddings(self):
        """The mixin's version expects an `nn.Embedding`, which no vision model has."""
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.get_config())
            self.assertIs(model.get_input_embeddings(), model.base_model.embeddings.patch_embeddings)
            self.assertIsNone(model.get_output_embeddings())

    def test_reverse_loading_mapping(self):
        """The mixin's version expects that files hold the original names; ours do so on request."""
        save_pretrained = TokenPruningMixin.save_pretrained
        save_original = partialmethod(save_pretrained, save_original_format=True)
        with patch.object(TokenPruningMixin, "save_pretrained", save_original):
            super().test_reverse_loading_mapping()
        model = self.all_model_classes[0](self.model_tester.get_config())
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder, save_original_format=True)
            names = set(load_file(Path(folder) / "model.safetensors"))
        self.assertTrue(any(name.startswith("encoder.layer.0.attention.attention.query") for name in names))
        self.assertFalse(any("q_proj" in name for name in names))


class TntViTTest(CommonTests, unittest.TestCase):
    all_model_classes = (TntViTModel, TntViTForImageClassification)
    config_class = TntViTConfig
    num_prefix_tokens = 1


class TntDeiTTest(CommonTests, unittest.TestCase):
    all_model_classes = (TntDeiTModel, TntDeiTForImageClassification)
    config_class = TntDeiTConfig
    num_prefix_tokens = 2
    test_all_params_have_gradient = False  # the distillation head does not enter the loss


class TntDeiTPrunedTest(TntDeiTTest):
    schedule = {"prune_layers": [0, 1], "keep_rates": [0.7, 0.7], "num_similar_tokens": 20}
