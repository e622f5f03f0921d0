"""Tokens merged between attention and MLP, images made smaller, and both under a schedule of a call."""

import copy

import pytest
import torch
from conftest import TINY, count_operations
from torch import nn
from transformers import ViTForImageClassification

from tnt_hf import TntViTConfig, TntViTForImageClassification
from tnt_hf.conversion import to_plain_model
from tnt_hf.named_schedules import parse_schedule, resolve_schedules
from tnt_hf.schedules_tnt import UNPRUNED, Schedule, count_gflops, schedule_for
from tnt_hf.token_reduction_tnt import ReductionStep, TokenState, match_similar, merge, partition_positions


IN_LAYER = {"token_reduction": "merge", "merge_before_mlp": True, "size_bias": 0.5, "keep_norm": True}
STEPS = Schedule("", (0, 1, 3), (0.7, 0.8, 0.6))
SMALLER = Schedule("", (1, 2), (0.7, 0.5), 0, 20)


def by_hand(model, pixel_values, schedule):
    """The classifier of a ViT whose tokens are merged inside its layers, half by half."""
    config, backbone = model.config, model.base_model
    steps = {step.layer: step for step in config.reduction_steps(schedule=schedule)}
    tokens = backbone.embeddings(pixel_values)
    sizes = torch.ones(tokens.shape[:2])
    for index, layer in enumerate(backbone.layers):
        bias = config.size_bias * sizes.log()[:, None, None, :]
        tokens = tokens + layer.attention(layer.layernorm_before(tokens), bias)[0]
        if index in steps:
            patches, patch_sizes = tokens[:, 1:], sizes[:, 1:]
            num_leaving = patches.shape[1] - steps[index].num_kept
            matching = match_similar(patches, num_leaving, partition_positions(patches.shape[1], "strided"))
            means, left, _ = merge(patches, patch_sizes, matching)
            norms, _, _ = merge(patches.norm(dim=-1, keepdim=True), patch_sizes, matching)
            means = nn.functional.normalize(means, dim=-1) * norms
            tokens, sizes = torch.cat((tokens[:, :1], means), dim=1), torch.cat((sizes[:, :1], left), dim=1)
        tokens = tokens + layer.mlp(layer.layernorm_after(tokens))
    return model.classifier(backbone.layernorm(tokens)[:, 0])


def test_tokens_leave_between_attention_and_mlp(make_vit, images):
    model = make_vit(relevance_weight=0.0, **IN_LAYER)
    torch.testing.assert_close(
        model(images, schedule=STEPS).logits, by_hand(model, images, STEPS), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("schedule", (STEPS, SMALLER, Schedule("", (), (), 0, 16)), ids=("tokens", "both", "pixels"))
def test_gflops_are_those_that_are_executed(make_model, images, schedule):
    model = make_model(**IN_LAYER)
    counted = count_operations(_Under(model, schedule), (images[:1],)) / 1e9
    assert count_gflops(model.config, schedule=schedule, as_executed=True) == pytest.approx(counted, rel=2e-3)


class _Under(nn.Module):
    def __init__(self, model, schedule):
        super().__init__()
        self.model, self.schedule = model, schedule

    def forward(self, pixel_values):
        return self.model(pixel_values, schedule=self.schedule).logits


def test_smaller_images_are_those_that_the_plain_model_sees(make_vit, images):
    model = make_vit()
    plain = to_plain_model(model)
    assert isinstance(plain, ViTForImageClassification)
    smaller = nn.functional.interpolate(images, (20, 20), mode="bicubic", antialias=True)
    expected = plain(smaller, interpolate_pos_encoding=True).logits
    outputs = model(images, schedule=Schedule("", (), (), 0, 20))
    torch.testing.assert_close(outputs.logits, expected, atol=1e-5, rtol=1e-4)
    model.set_schedule(Schedule("", (), (), 0, (20, 20)))
    torch.testing.assert_close(model(images).logits, outputs.logits)
    assert model(images, schedule=SMALLER).kept_mask.shape == (4, 2, 25)
    assert model(images, schedule=UNPRUNED, output_hidden_states=True).hidden_states[0].shape[1] == 65


def test_a_smaller_size_is_part_of_the_saved_schedule(make_vit, images, tmp_path):
    model = make_vit(**IN_LAYER)
    model.set_schedule(SMALLER)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.schedule.settings == SMALLER.settings
    torch.testing.assert_close(loaded(images).logits, model(images).logits)
    loaded.set_schedule([1], [0.5])
    assert loaded.config.compute_size is None


@pytest.mark.parametrize("size", (0, -4, 2.5, "20", (20, 20, 20), 3))
def test_impossible_sizes_are_refused(size):
    with pytest.raises(ValueError, match="compute_size"):
        TntViTConfig(image_size=32, patch_size=4, compute_size=size)


def test_a_budget_may_be_spent_on_smaller_images():
    config = TntViTConfig(num_noise_layers=8, **IN_LAYER)
    full = count_gflops(config, schedule=UNPRUNED, as_executed=True)
    (schedule,) = resolve_schedules(config, [parse_schedule("3x@160")])
    assert schedule.compute_size == 160 and len(schedule.prune_layers) == 8
    assert 0.99 / 3 <= count_gflops(config, schedule=schedule, as_executed=True) / full <= 1 / 3
    assert schedule_for(config, flops_reduction=3, compute_size=(160, 160)).settings == schedule.settings
    for text in ("full@160", "0,1:0.9,0.8@160x96", "2:0.5:10@96"):
        (written,) = resolve_schedules(config, [parse_schedule(text)])
        assert written.name == text and written.compute_size is not None
    kept = Schedule.keeping((50, 20), (1, 2), 60, compute_size=(96, 160))
    assert parse_schedule(kept.name) == kept
    with pytest.raises(ValueError, match="flops_reduction"):
        schedule_for(config, flops_reduction=1.1, compute_size=64)


def test_training_steps_can_carry_out_a_schedule(make_model, images):
    """Gradient checkpointing changes no gradient, and no noise is added."""
    model = make_model(**IN_LAYER)
    gradients = []
    for checkpointing in (False, True):
        trained = copy.deepcopy(model).train()
        if checkpointing:
            trained.gradient_checkpointing_enable()
        loss = trained(images, labels=torch.arange(4), schedule=SMALLER).loss
        loss.backward()
        gradients.append(trained.base_model.layers[0].mlp.fc1.weight.grad)
        if not hasattr(model.config, "distillation_head_in_loss"):
            torch.testing.assert_close(loss, model(images, labels=torch.arange(4), schedule=SMALLER).loss)
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().sum() > 0


def test_attention_counts_sizes_to_a_power():
    state = TokenState(torch.randn(1, 9, 4), 1, torch.tensor([[1] * 8 + [0]]), merges=True, size_bias=0.5)
    state.reduce(ReductionStep(0, 8, 4, 0))
    bias = state.attention_bias()[0, 0, 0]
    assert bias[0] == 0 and bias.exp().square().sum() == pytest.approx(8)


@pytest.mark.slow
def test_a_compiled_model_takes_both_kinds_of_schedules(make_vit, images):
    model = make_vit(**IN_LAYER)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for schedule in (STEPS, SMALLER):
        torch.testing.assert_close(compiled(images, schedule=schedule).logits, model(images, schedule=schedule).logits)


@pytest.fixture
def make_vit():

    def make(**fields):
        torch.manual_seed(0)
        return TntViTForImageClassification(TntViTConfig(**{**TINY, **fields})).eval()

    return make
