"""How a network spends a budget, chosen on unlabelled images."""

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script
from PIL import Image as PILImage
from transformers import AutoModelForImageClassification, ViTImageProcessorPil

from tnt_hf.evaluation import choose_schedules
from tnt_hf.named_schedules import parse_schedule, resolve_schedules
from tnt_hf.schedules_tnt import UNPRUNED, count_gflops


FIELDS = {"token_reduction": "merge", "merge_before_mlp": True, "relevance_weight": 0.0, "image_size": 48}


def divergence(model, pixel_values, schedule):
    with torch.inference_mode():
        expected, answers = (
            model(pixel_values, schedule=each).logits.log_softmax(dim=-1) for each in (UNPRUNED, schedule)
        )
    return (expected.exp() * (expected - answers)).sum(dim=-1).mean().item()


def test_choices_are_the_schedules_that_change_answers_least(make_model):
    model = make_model(**FIELDS).train()
    pixel_values = torch.randn(6, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    choices = choose_schedules(model, pixel_values, (1.5, 2.5), batch_size=4)
    assert model.training
    model.eval()
    config, full = model.config, count_gflops(model.config, schedule=UNPRUNED, as_executed=True)
    for choice, reduction in zip(choices, (1.5, 2.5)):
        assert {name: getattr(config, name) for name in choice.settings} == choice.settings == choices[0].settings
        cost = count_gflops(config, schedule=choice.schedule, as_executed=True)
        assert reduction <= full / cost and (not choice.schedule.prune_layers or full / cost <= reduction / 0.99)
        assert divergence(model, pixel_values, choice.schedule) == pytest.approx(choice.divergence, rel=1e-3)
        (again,) = resolve_schedules(config, [parse_schedule(choice.schedule.name)])
        assert again == choice.schedule
        for size in ("", "@44", "@40", "@36"):
            try:
                (other,) = resolve_schedules(config, [parse_schedule(f"{reduction:g}x{size}")])
            except ValueError:
                continue
            assert divergence(model, pixel_values, other) >= choice.divergence * 0.999


def test_a_model_that_drops_tokens_and_impossible_budgets_are_refused(make_model):
    pixel_values = torch.randn(2, 3, 48, 48)
    with pytest.raises(ValueError, match="token_reduction"):
        choose_schedules(make_model(image_size=48), pixel_values, [2])
    model = make_model(**FIELDS)
    with pytest.raises(ValueError, match="flops_reduction"):
        choose_schedules(model, pixel_values, [2, 1000])
    assert model.config.size_bias == 1.0 and not model.config.keep_norm


def test_script_writes_a_model_that_is_used_as_it_is(make_model, tmp_path):
    make_model(image_size=48).save_pretrained(tmp_path / "base")
    ViTImageProcessorPil(size={"height": 48, "width": 48}).save_pretrained(tmp_path / "base")
    (tmp_path / "images").mkdir()
    noise = np.random.default_rng(0)
    for index in range(3):
        pixels = noise.integers(256, size=(50, 60, 3), dtype=np.uint8)
        PILImage.fromarray(pixels).save(tmp_path / "images" / f"{index}.png")
    script, folders = ROOT / "scripts" / "choose_schedules.py", ("--images_dir", tmp_path / "images")
    flags = ("--model_name_or_path", tmp_path / "base", *folders, "--flops_reductions", "2", "2.5")
    outcome = run_script(script, *flags, "--output_dir", tmp_path / "chosen")
    assert outcome.returncode == 0, outcome.stderr
    assert "| 2.5x |" in outcome.stdout and "3 images of" in outcome.stdout
    chosen = AutoModelForImageClassification.from_pretrained(tmp_path / "chosen")
    whole = count_gflops(chosen.config, schedule=UNPRUNED, as_executed=True)
    assert whole / count_gflops(chosen.config, as_executed=True) == pytest.approx(2, rel=0.01)
    outcome = run_script(script, *flags, "--output_dir", tmp_path / "chosen")
    assert outcome.returncode == 1 and "--output_dir" in outcome.stderr
