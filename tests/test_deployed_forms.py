"""The forms of an exported model: opened, verified, timed in turns, and the fastest named."""

from dataclasses import replace

import pytest
import torch
from conftest import naming

from tnt_hf import deployed_forms, timing
from tnt_hf.deployed_forms import fastest, format_forms, measure_forms, missing_forms
from tnt_hf.export import ExportArguments, export_compiled, export_onnx, open_compiled, open_openvino, random_images


REDUCED = {"num_hidden_layers": 3, "token_reduction": "cluster", "prune_layers": [0, 1], "keep_rates": [0.9, 0.55]}
FACTS = {
    "device": "CPU (a processor)",
    "num_threads": 2,
    "int8": {"agreement": 97.5, "num_images": 40, "top1": 80.0, "top1_int8": 77.5},
    "missing_forms": {"OpenVINO": "it needs a package"},
}


@pytest.fixture
def clock(monkeypatch):
    """Seconds of a call, by the name of its function; and the names of the calls in their order."""
    calls = []

    def fake_timed(function, device):
        name = function.func.__name__
        calls.append((name, len(function.args[0])))
        return function(), SECONDS[name]

    monkeypatch.setattr(timing, "timed", fake_timed)
    monkeypatch.setattr(deployed_forms, "PAUSE", 0.0)
    return calls


SECONDS = {"eager": 4.0, "exact": 2.0, "wrong": 1.0, "int8": 0.5}


def forms_of(model):
    def eager(images):
        return model(images).logits

    def exact(images):
        return model(images).logits + 1e-6

    def wrong(images):
        return model(images).logits + 1e-2

    def int8(images):
        return model(images).logits

    return {
        "eager": (None, eager),
        "AOTInductor": ("model.pt2", exact),
        "ONNX Runtime": ("model.onnx", wrong),
        "ONNX Runtime int8": ("model_int8.onnx", int8),
    }


def test_fastest_form_is_one_that_gives_the_logits_and_never_int8(make_model, clock, monkeypatch, tmp_path):
    monkeypatch.setattr(deployed_forms, "open_forms", lambda model, folder: forms_of(model))
    model = make_model().train()
    rows = measure_forms(model, tmp_path, batch_sizes=(1, 8))
    assert [(row.batch_size, row.form) for row in rows] == [
        (size, form) for size in (1, 8) for form in forms_of(model)
    ]
    assert [row.is_exact for row in rows] == [True, True, False, False] * 2
    assert [row.speedup for row in rows] == [1, 2, 4, 8] * 2 and rows[0].latency_ms == 4000
    assert rows[2].largest_difference == pytest.approx(1e-2, rel=1e-3) and rows[2].speedup_range == (4, 4)
    assert [fastest(rows, batch_size).form for batch_size in (1, 8)] == ["AOTInductor"] * 2
    assert clock[:8] == [("eager", 1)] * 8 and clock[32:40] == [("exact", 1)] * 8  # the second round starts with it
    assert model.training
    text = format_forms(rows, FACTS)
    assert len([line for line in text.splitlines() if line.startswith("| ")]) == 2 + len(rows)
    for part in ("At batch 8 on CPU (a processor) with 2 threads", "AOTInductor on model.pt2, 2.00 times as fast"):
        assert part in text
    for part in (
        "int8 answers differently",
        "97.50 % of 40 images",
        "77.50 in place of 80.00",
        "OpenVINO was left out",
    ):
        assert part in text


def test_eager_model_is_the_fastest_where_no_other_gives_its_logits(make_model, clock, monkeypatch, tmp_path):
    def open_forms(model, folder):
        return {form: each for form, each in forms_of(model).items() if form != "AOTInductor"}

    monkeypatch.setattr(deployed_forms, "open_forms", open_forms)
    rows = measure_forms(make_model(), tmp_path, batch_sizes=(8,))
    assert fastest(rows, 8).form == "eager"
    assert "PyTorch's logits is eager, 1.00 times" in format_forms(rows, {**FACTS, "missing_forms": {}})


def test_forms_that_the_rounds_do_not_tell_apart_are_named(make_model, clock, monkeypatch, tmp_path):
    monkeypatch.setattr(deployed_forms, "open_forms", lambda model, folder: forms_of(model))
    rows = measure_forms(make_model(), tmp_path, batch_sizes=(8,))
    assert "Within the spread" not in format_forms(rows, FACTS)
    rows[1] = replace(rows[1], speedup_range=(0.9, 2.1))
    assert "Within the spread of the rounds eager may be as fast." in format_forms(rows, FACTS)


def test_missing_forms_are_named_with_what_they_need(monkeypatch):
    monkeypatch.setattr(deployed_forms, "find_spec", lambda name: None)
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        assert missing_forms() == {
            "AOTInductor": "it needs a C++ compiler, no-such-compiler",
            "OpenVINO": 'it needs pip install "tnt-hf[openvino]"',
        }


@pytest.mark.slow
@pytest.mark.skipif("AOTInductor" in missing_forms(), reason="needs a C++ compiler")
@pytest.mark.parametrize("family", ("deit",), indirect=True)
def test_compiled_package_gives_the_logits_at_every_batch_size(make_model, tmp_path):
    model = make_model(**REDUCED)
    assert export_compiled(model, tmp_path / "model.pt2") <= 1e-4
    run = open_compiled(tmp_path / "model.pt2")
    for batch_size in (1, 3, 8):
        images = random_images(model, batch_size)
        with torch.no_grad():
            torch.testing.assert_close(run(images), model(images).logits, atol=1e-4, rtol=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ("vit",), indirect=True)
def test_openvino_gives_the_logits_at_every_batch_size(make_model, tmp_path):
    pytest.importorskip("openvino")
    model = make_model(**REDUCED)
    export_onnx(model, tmp_path / "model.onnx")
    run = open_openvino(tmp_path / "model.onnx")
    for batch_size in (1, 3, 1):
        images = random_images(model, batch_size)
        with torch.no_grad():
            torch.testing.assert_close(run(images), model(images).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fields", ({"fastest_at": [1, 0]}, {"batch_size": 0}))
def test_batches_without_images_are_refused(fields, tmp_path):
    with pytest.raises(ValueError, match=naming("--batch_size", "--fastest_at", 1)):
        ExportArguments(model_name_or_path="model", output_dir=str(tmp_path / "new"), **fields)
