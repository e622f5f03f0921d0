"""How a network spends a budget, chosen on unlabelled images."""

import math
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, naming, run_script
from PIL import Image as PILImage
from transformers import AutoModelForImageClassification, ViTImageProcessorPil

from tnt_hf.commands import choose
from tnt_hf.evaluation import choose_schedules, choosing
from tnt_hf.named_schedules import parse_schedule, resolve_schedules
from tnt_hf.schedules_tnt import UNPRUNED, count_gflops


FIELDS = {"token_reduction": "cluster", "image_size": 48}


@pytest.fixture
def pixel_values():
    return torch.randn(6, 3, 48, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def tried(monkeypatch):
    """
    The image sizes of the answers that were asked for, None of the unpruned model. Answers at size 40 are the nearest
    to those, then at 36, 44, 32 and 48; at 28 they would be nearer still.
    """
    sizes = []
    distances = {None: 0, 40: 1, 36: 2, 44: 3, 32: 4, 48: 5, 28: 0.5}

    def answers(model, pixel_values, schedule, batch_size):
        size = None if schedule == UNPRUNED else schedule.compute_size or 48
        sizes.append(size)
        return torch.tensor([[float(distances[size]), 0.0]]).log_softmax(dim=-1)

    monkeypatch.setattr(choosing, "_answers", answers)
    return sizes


def divergence(model, pixel_values, schedule):
    with torch.inference_mode():
        expected, answers = (
            model(pixel_values, schedule=each).logits.log_softmax(dim=-1) for each in (UNPRUNED, schedule)
        )
    return (expected.exp() * (expected - answers)).sum(dim=-1).mean().item()


@pytest.mark.parametrize(("family", "token_reduction"), (("vit", "merge"), ("deit", "cluster")), indirect=["family"])
def test_what_changes_answers_least_is_chosen_and_kept_by_the_model(make_model, pixel_values, token_reduction):
    model = make_model(**FIELDS | {"token_reduction": token_reduction})
    config, full = model.config, count_gflops(model.config, schedule=UNPRUNED, as_executed=True)
    at_full_size = resolve_schedules(config, [parse_schedule(text) for text in ("1.5x@48", "2.5x@48")])
    divergences_before = [divergence(model, pixel_values, schedule) for schedule in at_full_size]
    choices = choose_schedules(model.train(), pixel_values, (2.5, 1.5, 2.5), batch_size=4)
    assert model.training
    model.eval()
    assert [choice.flops_reduction for choice in choices] == [1.5, 2.5]
    assert [choice.divergence_before for choice in choices] == pytest.approx(divergences_before, rel=1e-3)
    assert math.prod(choice.divergence for choice in choices) <= math.prod(divergences_before) * 1.001
    assert config.size_bias in (None, 1.0, 0.85, 0.7)
    assert config.budget_sizes == [[each.flops_reduction, each.schedule.compute_size or 48] for each in choices]
    for choice, text in zip(choices, ("1.5x", "2.5x")):
        reduction = full / count_gflops(config, schedule=choice.schedule, as_executed=True)
        assert choice.flops_reduction <= reduction
        assert not choice.schedule.prune_layers or reduction <= choice.flops_reduction / 0.99
        assert divergence(model, pixel_values, choice.schedule) == pytest.approx(choice.divergence, rel=1e-3)
        (followed,) = resolve_schedules(config, [parse_schedule(text)])
        assert followed.settings == choice.schedule.settings
        assert model.set_budget(flops_reduction=choice.flops_reduction) == choice.schedule


@pytest.mark.parametrize("family", ("vit",), indirect=True)
def test_sizes_are_tried_from_that_of_the_milder_budget_until_two_in_a_row_are_worse(make_model, pixel_values, tried):
    model = make_model(**FIELDS)
    choices = choose_schedules(model, pixel_values, [4.5, 4])
    milder, harsher = [48, 44, 40, 36, 32], [48, 40, 36, 32]
    biases = [40] * 2 * 2  # with each of the two others, both schedules
    assert tried == [None, *milder, *harsher, *biases]
    assert model.config.budget_sizes == [[4, 40], [4.5, 40]]
    assert choices[0].divergence < choices[0].divergence_before


@pytest.mark.parametrize("family", ("vit",), indirect=True)
def test_a_size_at_which_no_schedule_meets_a_budget_is_passed_over(make_model, pixel_values, tried, monkeypatch):
    def schedule_for(config, compute_size, **budget):
        if compute_size == (44, 44):
            raise ValueError("No schedule")
        return choosing.Schedule("", (1,), (0.5,), 0, None if compute_size == 48 else compute_size)

    monkeypatch.setattr(choosing, "schedule_for", schedule_for)
    model = make_model(**FIELDS)
    choose_schedules(model, pixel_values, [3])
    assert tried[1:5] == [48, 40, 36, 32] and model.config.budget_sizes == [[3, 40]]


def test_a_model_that_drops_tokens_and_impossible_budgets_are_refused(make_model, pixel_values):
    with pytest.raises(ValueError, match=naming("`token_reduction`", "merge", "cluster", "'drop'")):
        choose_schedules(make_model(image_size=48), pixel_values, [2])
    model = make_model(**FIELDS)
    with pytest.raises(ValueError, match=naming("`flops_reduction` 1000")):
        choose_schedules(model, pixel_values, [2, 1000])
    assert (model.config.size_bias, model.config.budget_sizes) == (None, [])


@pytest.mark.parametrize("family", ("vit",), indirect=True)
def test_a_model_whose_choice_was_interrupted_is_as_before(make_model, pixel_values, tried, monkeypatch):
    fields = {"size_bias": 0.9, "budget_sizes": [[2, 44]]}
    model = make_model(**FIELDS | fields).train()
    answers = choosing._answers

    def interrupted(*arguments):
        if model.config.size_bias == 0.85:
            raise KeyboardInterrupt
        return answers(*arguments)

    monkeypatch.setattr(choosing, "_answers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        choose_schedules(model, pixel_values, [3])
    assert {name: getattr(model.config, name) for name in fields} == fields and model.training


@pytest.mark.parametrize("family", ("vit",), indirect=True)
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
    assert chosen.config.token_reduction == "cluster"
    assert [budget for budget, _ in chosen.config.budget_sizes] == [2, 2.5]
    assert chosen.config.compute_size in (None, chosen.config.budget_sizes[0][1])
    whole = count_gflops(chosen.config, schedule=UNPRUNED, as_executed=True)
    assert whole / count_gflops(chosen.config, as_executed=True) == pytest.approx(2, rel=0.01)
    outcome = run_script(script, *flags, "--output_dir", tmp_path / "chosen")
    assert outcome.returncode == 1 and "--output_dir" in outcome.stderr


def test_absent_and_empty_folder_of_images_are_named_by_the_flag(tmp_path, monkeypatch):
    for folder, named in ((tmp_path / "absent", "does not exist"), (tmp_path, "holds no images")):
        monkeypatch.setattr(sys, "argv", ["choose", "--model_name_or_path", "x", "--images_dir", str(folder)])
        with pytest.raises(SystemExit, match=naming(folder, named)) as raised:
            choose.main()
        assert str(raised.value).startswith("Error: --images_dir ")
