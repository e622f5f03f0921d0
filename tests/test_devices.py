"""What a GPU asks of a forward pass, without one: tensors that have a device but no data; mixed devices are errors."""

from contextlib import contextmanager

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Dinov2Config, Dinov2Model
from transformers.initialization import no_init_weights

from tnt_hf import TntViTConfig
from tnt_hf.encoders import reduce_tokens
from tnt_hf.token_reduction_tnt import ReductionStep, TokenState


DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
SCHEDULE = {"prune_layers": [0, 2], "keep_rates": [0.6, 0.5]}


@contextmanager
def gpu_without_data(dtype):
    """Within it a new model has its weights on a GPU, and nothing draws them."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with FakeTensorMode(), no_init_weights():
            yield
    finally:
        torch.set_default_dtype(default)


@DTYPES
@pytest.mark.parametrize("has_mask", (False, True), ids=("all", "masked"))
@pytest.mark.parametrize("partition", ("strided", "random"))
@pytest.mark.parametrize("token_reduction", ("drop", "merge", "cluster"))
@torch.no_grad()
def test_a_model_keeps_to_the_device_of_its_images(make_model, token_reduction, partition, has_mask, dtype):
    fields = {"token_reduction": token_reduction, "similarity_partition": partition}
    with gpu_without_data(dtype):
        with torch.device("cuda"):
            model = make_model(**SCHEDULE, **fields, num_similar_tokens=0 if token_reduction == "cluster" else 2)
            images = torch.empty(2, 3, 32, 32)
            mask = torch.ones(2, 64 + model.config.num_prefix_tokens) if has_mask else None
        logits = model(images, attention_mask=mask).logits
    assert (logits.device.type, logits.dtype) == ("cuda", dtype)


@DTYPES
@torch.no_grad()
def test_a_reduced_encoder_keeps_to_the_device_of_its_images(dtype):
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 32, "patch_size": 4}
    with gpu_without_data(dtype):
        with torch.device("cuda"):
            model, images = Dinov2Model(Dinov2Config(**sizes)).eval(), torch.empty(2, 3, 32, 32)
        reduce_tokens(model, "2x")
        features = model(images).last_hidden_state
    assert (features.shape, features.device.type, features.dtype) == ((2, 65, 32), "cuda", dtype)


class Traffic(TorchDispatchMode):
    """Operations, and the bytes that they read and write; those that make a view of a tensor are none."""

    num_operations = num_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        if not any(argument.alias_info for argument in function._schema.arguments):
            tensors = [leaf for leaf in tree_leaves((args, kwargs, results)) if isinstance(leaf, torch.Tensor)]
            self.num_operations += 1
            self.num_bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return results


@pytest.mark.parametrize(("dtype", "num_passes"), ((torch.float32, 11), (torch.bfloat16, 18)), ids=str)
@torch.no_grad()
def test_merging_takes_few_operations_and_passes_over_the_tokens(dtype, num_passes):
    """A layer of a ViT passes over them some forty times. At batch 1 a GPU waits for the operations."""
    config = TntViTConfig(hidden_size=768, token_reduction="cluster")
    tokens = torch.randn(8, 197, 768, generator=torch.Generator().manual_seed(0)).to(dtype)
    state = TokenState(tokens, config, merges=True)
    with Traffic() as traffic:
        state.reduce(ReductionStep(0, num_tokens=196, num_kept=176, num_similar=20))
    assert traffic.num_bytes <= num_passes * tokens.numel() * tokens.element_size()
    assert traffic.num_operations <= 66
