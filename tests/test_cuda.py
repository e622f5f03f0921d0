"""
What only a GPU shows. Imports nothing of the other tests, so that it runs where their packages are missing:

    python -m pytest --noconftest tests/test_cuda.py
"""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Dinov2Config, Dinov2Model
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tnt_hf import TntViTConfig, TntViTForImageClassification
from tnt_hf.attention_tnt import FLASH_LENGTH, FORMS, attend_by_sizes
from tnt_hf.encoders import reduce_tokens


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

TINY = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 64, "patch_size": 4}
REDUCTIONS = pytest.mark.parametrize("token_reduction", ("drop", "merge", "cluster"))
HALF = pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
# Of the norm of the logits; in half precision a kernel that rounds elsewhere may merge other tokens.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """By default PyTorch lets cuDNN round the inputs of convolutions, which can make other tokens merge."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


class Attention(nn.Module):
    is_causal = False


def drawn(num_tokens, head_size, dtype, num_masked=0):
    """Queries, keys, values of 2 images and 3 heads, and the bias of random sizes."""
    generator = torch.Generator("cuda").manual_seed(num_tokens)
    parts = torch.randn(3, 2, 3, num_tokens, head_size, generator=generator, device="cuda").to(dtype)
    sizes = torch.randint(1, 60, (2, num_tokens), generator=generator, device="cuda").float()
    sizes[1, num_tokens - num_masked :] = 0
    return [*parts, 0.85 * sizes.log()]


def make_model(token_reduction, **settings):
    torch.manual_seed(0)
    schedule = {"prune_layers": [0, 2], "keep_rates": [0.6, 0.5]}
    config = TntViTConfig(**TINY, **schedule, **settings, initializer_range=0.1, token_reduction=token_reduction)
    return TntViTForImageClassification(config).eval().requires_grad_(False).cuda()


def images(batch_size=4):
    shape = (batch_size, 3, TINY["image_size"], TINY["image_size"])
    return torch.randn(shape, generator=torch.Generator().manual_seed(batch_size)).cuda()


def assert_near(ours, theirs, dtype=torch.float32):
    difference = (ours.float() - theirs.float()).norm() / theirs.float().norm()
    assert difference <= TOLERANCE[dtype]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_tokens", (7, 100, 197, 1030))
@pytest.mark.parametrize("head_size", (32, 64, 72))
@pytest.mark.parametrize(
    ("dtype", "tolerance"), ((torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)), ids=str
)
def test_forms_give_the_same_answers(form, num_tokens, head_size, dtype, tolerance):
    query, key, value, bias = drawn(num_tokens, head_size, dtype, num_masked=3)
    attended, _ = attend_by_sizes(sdpa_attention_forward, Attention(), query, key, value, None, bias, form)
    scores = query.double() @ key.double().transpose(2, 3) * head_size**-0.5 + bias.double()[:, None, None]
    expected = (scores.softmax(dim=-1) @ value.double()).transpose(1, 2)
    torch.testing.assert_close(attended.double(), expected, atol=tolerance, rtol=tolerance)


@HALF
@pytest.mark.parametrize("head_size", (32, 64, 72, 80))
def test_flash_attention_runs_on_long_sequences_of_merged_tokens(dtype, head_size):
    *parts, bias = drawn(FLASH_LENGTH, head_size, dtype)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # an error where it cannot
        attend_by_sizes(sdpa_attention_forward, Attention(), *parts, None, bias)
        with pytest.raises(RuntimeError):
            attend_by_sizes(sdpa_attention_forward, Attention(), *parts, None, bias, form="mask")


@REDUCTIONS
def test_logits_are_those_of_the_cpu(token_reduction):
    model = make_model(token_reduction)
    ours = model(images()).logits
    assert_near(ours.cpu(), model.cpu()(images().cpu()).logits)


@HALF
@REDUCTIONS
def test_half_precision_runs_under_autocast_and_as_a_dtype(token_reduction, dtype):
    model = make_model(token_reduction)
    with torch.autocast("cuda", dtype):
        assert model(images()).logits.isfinite().all()
    assert model.to(dtype)(images().to(dtype)).logits.isfinite().all()


@pytest.mark.parametrize(
    ("token_reduction", "dtype", "mode"),
    (
        ("cluster", torch.float32, "default"),
        ("cluster", torch.float32, "reduce-overhead"),
        ("cluster", torch.bfloat16, "reduce-overhead"),
        ("merge", torch.float32, "reduce-overhead"),
        ("drop", torch.float32, "reduce-overhead"),
    ),
)
def test_compiled_model_and_cuda_graphs_give_the_same_logits(token_reduction, dtype, mode):
    torch.compiler.reset()
    model = make_model(token_reduction).to(dtype)
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    for seed in range(4):  # warm-up, capture, replays
        pixel_values = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)
        with torch.inference_mode():
            assert_near(compiled(pixel_values).logits, model(pixel_values).logits, dtype)


def test_reduced_encoder_gives_the_features_of_the_cpu():
    torch.manual_seed(0)
    model = Dinov2Model(Dinov2Config(**TINY, initializer_range=0.1)).eval().requires_grad_(False)
    reduce_tokens(model, "2x")
    expected = model(images().cpu()).last_hidden_state
    assert_near(model.cuda()(images()).last_hidden_state.cpu(), expected)
