"""Attention by sizes: its forms give the same answers, and the one that is chosen lets the fastest kernel run."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.vit.modeling_vit import eager_attention_forward

from tnt_hf import attention_tnt
from tnt_hf.attention_tnt import FLASH_LENGTH, FORMS, attend_by_sizes, choose_form


class Attention(nn.Module):
    is_causal = False


def drawn(num_queries, num_tokens, head_size, dtype=torch.float32, num_masked=0, device="cpu"):
    """Queries, keys, values of 2 images and 3 heads, and the bias of random sizes."""
    generator = torch.Generator().manual_seed(num_tokens)
    shapes = ((2, 3, num_queries, head_size), *[(2, 3, num_tokens, head_size)] * 2)
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    sizes = torch.randint(1, 60, (2, num_tokens), generator=generator).float()
    sizes[1, num_tokens - num_masked :] = 0
    return [*(each.to(device, dtype) for each in (2 * query, key, value)), (0.85 * sizes.log()).to(device)]


def expected(query, key, value, bias, mask=None, scaling=None):
    """In float64, from the definition."""
    query, key, value = (each.double() for each in (query, key, value))
    scores = query @ key.transpose(2, 3) * (scaling or query.shape[-1] ** -0.5) + bias.double()[:, None, None]
    scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(dim=-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)), ids=str
)
@pytest.mark.parametrize(
    ("num_queries", "num_tokens", "head_size", "num_masked"),
    ((7, 7, 8, 0), (2, 50, 16, 5), (198, 198, 64, 30), (33, 33, 20, 1), (1, 130, 72, 0)),
)
def test_forms_give_the_same_answers(form, dtype, tolerance, num_queries, num_tokens, head_size, num_masked):
    query, key, value, bias = drawn(num_queries, num_tokens, head_size, dtype, num_masked)
    attended, _ = attend_by_sizes(sdpa_attention_forward, Attention(), query, key, value, None, bias, form)
    assert attended.dtype == dtype
    torch.testing.assert_close(attended.double(), expected(query, key, value, bias), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("attend", (sdpa_attention_forward, eager_attention_forward), ids=("sdpa", "eager"))
def test_forms_keep_masks_and_scaling(form, attend):
    query, key, value, bias = drawn(40, 40, 16, num_masked=3)
    mask = torch.rand(2, 1, 40, 40, generator=torch.Generator().manual_seed(1)) < 0.7
    mask[..., 0] = True
    answer = expected(query, key, value, bias, mask, scaling=0.5)
    additive = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    for each in (additive, mask) if form == "mask" else (additive,):
        attended, _ = attend_by_sizes(attend, Attention(), query, key, value, each, bias, form, scaling=0.5)
        torch.testing.assert_close(attended.double(), answer, atol=1e-5, rtol=1e-5)


def test_large_biases_are_not_rounded_in_the_keys():
    """The weights of bfloat16 sizes differ by up to 1 % from theirs in a mask, which half precision rounds."""
    query, key, _, _ = drawn(4, 64, 64, torch.bfloat16)
    query, bias = 0 * query, torch.linspace(2, 4, 64).expand(2, -1)
    values = torch.eye(64).expand(2, 3, -1, -1).to(torch.bfloat16)
    errors = {}
    for form in FORMS:
        weights, _ = attend_by_sizes(sdpa_attention_forward, Attention(), query, key, values, None, bias, form)
        errors[form] = (weights.double() / expected(query, key, values, bias) - 1).abs().max()
    assert errors["keys"] < 2**-7 and errors["keys"] < errors["mask"]


@pytest.mark.parametrize("form", FORMS)
def test_forms_compile_and_export_whole(form):
    class Attend(nn.Module):
        is_causal = False

        def forward(self, query, key, value, bias):
            return attend_by_sizes(sdpa_attention_forward, self, query, key, value, None, bias, form)[0]

    inputs = drawn(30, 30, 16, num_masked=2)
    answer = Attend()(*inputs)
    torch.testing.assert_close(torch.compile(Attend(), fullgraph=True)(*inputs), answer)
    tokens = torch.export.Dim("tokens", min=2, max=200)
    dynamic = {name: {2: tokens} for name in ("query", "key", "value")} | {"bias": {1: tokens}}
    program = torch.export.export(Attend(), tuple(inputs), dynamic_shapes=dynamic)
    longer = drawn(45, 45, 16)
    torch.testing.assert_close(program.module()(*longer), Attend()(*longer))


@pytest.mark.parametrize(
    ("device", "dtype", "num_tokens", "head_size", "has_mask", "form"),
    (
        ("cuda", torch.bfloat16, FLASH_LENGTH, 64, False, "keys"),
        ("cuda", torch.float16, FLASH_LENGTH, 64, False, "keys"),
        ("cuda", torch.bfloat16, FLASH_LENGTH - 1, 64, False, "mask"),
        ("cuda", torch.float32, FLASH_LENGTH, 64, False, "mask"),
        ("cuda", torch.bfloat16, FLASH_LENGTH, 256, False, "mask"),
        ("cuda", torch.bfloat16, FLASH_LENGTH, 64, True, "mask"),
        ("cpu", torch.bfloat16, FLASH_LENGTH, 64, False, "mask"),
    ),
)
def test_the_keys_carry_sizes_where_flash_attention_pays(device, dtype, num_tokens, head_size, has_mask, form):
    """Without a GPU: tensors that have a device but no data."""
    with FakeTensorMode():
        query = torch.empty(2, 3, num_tokens, head_size, dtype=dtype, device=device)
        bias = torch.empty(2, num_tokens, device=device)
        mask = torch.empty(1, 3, num_tokens, num_tokens, dtype=dtype, device=device) if has_mask else None
        assert choose_form(sdpa_attention_forward, query, query, mask) == form
        assert choose_form(eager_attention_forward, query, query, mask) == "mask"
        wider, longer, values = attention_tnt._with_bias_in_keys(query, query, query, bias)
    assert {each.shape for each in (wider, longer, values)} == {torch.Size((2, 3, num_tokens, head_size + 8))}


@pytest.mark.parametrize("token_reduction", ("merge", "cluster"))
def test_models_give_the_same_logits_by_every_form(make_model, images, monkeypatch, token_reduction):
    model = make_model(token_reduction=token_reduction, prune_layers=[0, 2], keep_rates=[0.6, 0.5])
    mask = torch.ones(len(images), 64 + model.config.num_prefix_tokens)
    mask[0, -9:] = 0
    with torch.no_grad():
        answers = [model(images).logits, model(images, attention_mask=mask).logits]
        used = []
        monkeypatch.setattr(attention_tnt, "choose_form", lambda *arguments: used.append(True) or "keys")
        by_keys = [model(images).logits, model(images, attention_mask=mask).logits]
    assert used
    for ours, theirs in zip(by_keys, answers, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
