"""Equality with the authors' code, on vectors that it computed; see tests/reference/README.md."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tnt_hf import token_reduction_tnt
from tnt_hf.conversion import load_research_checkpoint


REFERENCE = Path(__file__).parent / "reference"
CASES = json.loads((REFERENCE / "reference_cases.json").read_text())
KINDS = ("distilled", "plain")


@pytest.fixture(scope="module")
def vectors():
    return load_file(REFERENCE / "reference_vectors.safetensors")


def load(vectors, kind, **fields):
    prefix = f"{kind}.weights."
    weights = {key.removeprefix(prefix): value for key, value in vectors.items() if key.startswith(prefix)}
    num_heads = CASES["geometry"]["num_attention_heads"]
    return load_research_checkpoint(weights, num_attention_heads=num_heads, **fields)


@pytest.mark.parametrize("case", CASES["cases"], ids=lambda case: f"{case['model']}-{case['case']}")
def test_pruned_logits_equal_the_authors(vectors, case, monkeypatch):
    kind = case["model"]
    model = load(
        vectors,
        kind,
        prune_layers=case["prune_layers"],
        keep_rates=case["keep_rates"],
        num_similar_tokens=case["similarity_pruned"],
        similarity_partition="random",
    )
    key = f"{kind}.eval.{case['case']}"
    monkeypatch.setattr(token_reduction_tnt, "random_partition", lambda *_: vectors[f"{key}.partition"])
    with torch.no_grad():
        logits = model(vectors[f"{kind}.pixel_values"]).logits
    torch.testing.assert_close(logits, vectors[f"{key}.logits"], atol=1e-5, rtol=0)
    assert model.config.patch_token_counts()[:-1] == case["patch_tokens_after_each_layer_input"]


@pytest.mark.parametrize("kind", KINDS)
def test_training_step_equals_the_authors(vectors, kind, monkeypatch):
    model = load(vectors, kind).train()
    model.freeze_backbone()
    noise = iter([vectors[f"{kind}.train.noise.{layer}"] for layer in range(5)])
    monkeypatch.setattr(token_reduction_tnt, "randn_like", lambda *_: next(noise))
    outputs = model(vectors[f"{kind}.pixel_values"], labels=vectors[f"{kind}.labels"])
    outputs.loss.backward()

    cls_logits = outputs.cls_logits if kind == "distilled" else outputs.logits
    torch.testing.assert_close(cls_logits, vectors[f"{kind}.train.cls_logits"], atol=1e-5, rtol=0)
    torch.testing.assert_close(outputs.loss, vectors[f"{kind}.train.loss"], atol=1e-5, rtol=0)
    for layer in range(5):
        expected = vectors[f"{kind}.train.grad.alpha_heads.{layer}.weight"]
        gradient = model.base_model.alpha_heads[layer].weight.grad
        assert (gradient - expected).norm() <= 1e-3 * expected.norm()
    if kind == "distilled":
        torch.testing.assert_close(
            outputs.distillation_logits, vectors[f"{kind}.train.distillation_logits"], atol=1e-5, rtol=0
        )
