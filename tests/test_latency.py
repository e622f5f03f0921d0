"""Times of a whole model under several schedules, and the command that measures them."""

import json
import runpy
import sys

import pytest
from conftest import ROOT, naming, run_script

from tnt_hf import timing
from tnt_hf.evaluation import measure_latency
from tnt_hf.examples import BUNDLED_BACKBONE, BUNDLED_DATASET
from tnt_hf.results import Results
from tnt_hf.schedules_tnt import UNPRUNED, Schedule, count_gflops


SCRIPT = ROOT / "scripts" / "benchmark_model.py"
HALF = Schedule("half", (2,), (0.5,))


@pytest.fixture
def calls(monkeypatch):
    """What was timed, on a clock on which a call takes as many seconds as it executes GFLOPs."""
    calls = []

    def fake_timed(function, device):
        (images,), schedule = function.args, function.keywords["schedule"]
        calls.append(schedule.name)
        gflops = count_gflops(function.func.config, schedule=schedule, as_executed=True)
        return function(), len(images) * gflops

    monkeypatch.setattr(timing, "timed", fake_timed)
    return calls


def test_rows_are_ratios_of_the_same_rounds_on_whole_forward_passes(make_model, calls):
    model = make_model().train()
    schedules = [UNPRUNED, HALF]
    rows = measure_latency(model, schedules, batch_sizes=(2, 16), num_rounds=3)
    assert [(row.batch_size, row.schedule) for row in rows] == [(2, "full"), (2, "half"), (16, "full"), (16, "half")]
    gflops = [count_gflops(model.config, schedule=schedule, as_executed=True) for schedule in schedules]
    for row, executed in zip(rows, gflops * 2):
        assert (row.gflops, row.share) == (executed, executed / gflops[0])
        assert row.latency_ms == pytest.approx(1000 * row.batch_size * executed)
        assert row.images_per_second == pytest.approx(1000 * row.batch_size / row.latency_ms)
        assert row.speedup == pytest.approx(1 / row.share) and row.speedup_range == (row.speedup,) * 2
    assert calls[:8] == ["full"] * 4 + ["half"] * 4 and calls[8:16] == ["half"] * 4 + ["full"] * 4
    assert model.training


@pytest.mark.parametrize("fields", ({"batch_sizes": (0,)}, {"batch_sizes": ()}, {"num_rounds": 2}))
def test_too_few_rounds_or_images_are_refused(make_model, fields):
    with pytest.raises(ValueError, match=naming("`num_rounds`", 3, "`batch_sizes`", 1)):
        measure_latency(make_model(), [UNPRUNED], **fields)


def test_command_prints_a_table_and_writes_what_it_measured(tmp_path):
    flags = ("--model_name_or_path", BUNDLED_BACKBONE, "--schedules", "full", "2x", "--batch_sizes", "1", "2")
    images = ("--dataset_name", BUNDLED_DATASET, "--max_eval_samples", "12")
    command = (SCRIPT, *flags, *images, "--num_rounds", "3", "--use_cpu", "true", "--output_dir", tmp_path)
    outcome = run_script(*command)
    assert outcome.returncode == 0, outcome.stderr
    content = json.loads((tmp_path / "benchmark.json").read_text())
    assert [(row["batch_size"], row["schedule"]) for row in content["rows"]] == [
        (batch_size, schedule) for batch_size in (1, 2) for schedule in ("full", "2x")
    ]
    assert [row["share"] for row in content["rows"][:2]] == [1, pytest.approx(0.5, rel=0.01)]
    accuracy = Results.from_json(content["accuracy"])
    assert [(row.schedule, row.selection) for row in accuracy.rows] == [("full", "none"), ("2x", "similarity")]
    assert content["token_reduction"] == "cluster" and content["weights_sha256"] == accuracy.weights_sha256
    table = [line.split(" | ") for line in outcome.stdout.splitlines() if line.startswith("| ")]
    assert table[0][3:5] == ["top-1", "batch 1: ms"] and [line[0] for line in table[2:]] == ["| full", "| 2x"]
    assert [line[3] for line in table[2:]] == [f"{row.top1:.2f}" for row in accuracy.rows]
    again = run_script(*command)
    assert again.returncode == 1 and "benchmark.json already exists" in again.stderr


@pytest.mark.parametrize(
    ("flags", "named"),
    (
        (("--batch_sizes", "0"), ["--batch_sizes", 1, "[0]"]),
        (("--num_rounds", "1"), ["--num_rounds", 3, 1]),
        (("--schedules", "dual"), ["full, single, multi", "'dual'"]),
        (("--schedules", "17:0.5"), ["'17:0.5'", "`prune_layers`", "0 to 11"]),
        (("--validation_dir", "absent"), ["--validation_dir", "absent"]),
        (("--model_name_or_path", "absent/model"), ["absent/model"]),
    ),
    ids=lambda value: "_".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_clear_error_before_anything_is_written(tmp_path, monkeypatch, flags, named):
    output_dir = tmp_path / "out"
    model = ("--model_name_or_path", str(BUNDLED_BACKBONE))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *model, "--output_dir", str(output_dir), *flags])
    with pytest.raises(SystemExit, match=naming("Error: ", *named)):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert not output_dir.exists()


def test_without_images_nothing_is_said_of_accuracy(tmp_path):
    flags = ("--schedules", "2x", "--batch_sizes", "1", "--num_rounds", "3", "--output_dir", tmp_path)
    outcome = run_script(SCRIPT, "--model_name_or_path", BUNDLED_BACKBONE, *flags)
    assert outcome.returncode == 0, outcome.stderr
    assert json.loads((tmp_path / "benchmark.json").read_text())["accuracy"] is None
    assert "top-1" not in outcome.stdout
