"""The stored notebooks, and short runs of them."""

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tnt_hf.examples import BUNDLED_BACKBONE


FOLDER = Path(__file__).parents[1] / "notebooks"
NUM_PICTURES = {"start": 1, "tnt_demo": 3, "choose_budget": 1, "any_encoder": 0}


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def run_notebook(name, folder, monkeypatch, parameters, report):
    """What the code `report` prints, as JSON, at the end of a notebook with other `parameters`."""
    monkeypatch.setenv("TMPDIR", str(folder))
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    (cell,) = (cell for cell in code_cells(notebook) if "parameters" in cell.metadata.get("tags", []))
    cell.source += f"\n{parameters}"
    notebook.cells.append(nbformat.v4.new_code_cell(f"import json\nprint(json.dumps({report}))"))
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": folder}}).execute()
    return json.loads(notebook.cells[-1].outputs[0].text)


def test_every_notebook_is_tested():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(NUM_PICTURES)


@pytest.mark.parametrize("name", NUM_PICTURES)
def test_stored_notebook_was_run_to_its_end_without_errors_and_shows_pictures(name):
    path = FOLDER / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert all(output.name == "stdout" for output in outputs if output.output_type == "stream")
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= NUM_PICTURES[name]
    text = "".join(str({**output.get("data", {}), "image/png": ""}) + output.get("text", "") for output in outputs)
    assert str(Path.home()) not in text and "/tmp" not in text and ".py" not in text
    assert path.stat().st_size < 1_000_000


@pytest.mark.slow
def test_start_draws_compares_times_and_saves(tmp_path, monkeypatch):
    parameters = (
        f"MODEL = {str(BUNDLED_BACKBONE)!r}\nBUDGETS = ['full', '2x', '3x@42']\nBATCH_SIZES = [1]\nNUM_ROUNDS = 3"
    )
    report = """{
        "rows": rows,
        "shares": [row.share for row in latencies],
        "answer": answer,
        "is_reduced": bool(classifier.model.config.prune_layers),
    }"""
    report = run_notebook("start", tmp_path, monkeypatch, parameters, report)
    assert [row["budget"] for row in report["rows"]] == ["full", "2x", "3x@42"]
    assert all(
        row.keys() == {"budget", "divergence", "astronaut", "cat", "coffee", "rocket"} for row in report["rows"]
    )
    whole, *reduced = (row["divergence"] for row in report["rows"])
    assert whole == 0 and all(divergence > 0 for divergence in reduced)
    assert report["shares"] == pytest.approx([1, 1 / 2, 1 / 3], rel=0.011)
    assert len(report["answer"]) == 1 and report["is_reduced"]


@pytest.mark.slow
def test_demo_trains_prunes_compares_and_classifies(tmp_path, monkeypatch):
    parameters = "NUM_STEPS = 10\nNUM_EVAL_IMAGES = 8"
    report = """{
        "rows": [vars(row) for row in rows],
        "answers": answers,
        "num_trained": num_trained,
        "steps": trainer.state.global_step,
    }"""
    report = run_notebook("tnt_demo", tmp_path, monkeypatch, parameters, report)
    rows = {(row["schedule"], row["selection"]): row for row in report["rows"]}
    pruned = {(schedule, selection) for schedule in ("2x", "3x", "4x") for selection in ("relevance", "random")}
    assert rows.keys() == {("full", "none"), *pruned}
    assert all(row["num_images"] == 8 and 0 <= row["top1"] <= row["top5"] <= 100 for row in rows.values())
    costs = [rows[schedule, "relevance"]["gflops"] for schedule in ("2x", "3x", "4x")]
    assert rows["full", "none"]["gflops"] > 2 * costs[0] > 2 * costs[1] > 2 * costs[2]
    assert report["num_trained"] == 6 * 65 and report["steps"] == 10
    scores = [answer["score"] for answer in report["answers"]]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True) and 0 < sum(scores) <= 1


@pytest.mark.slow
def test_budget_is_chosen_measured_and_saved(tmp_path, monkeypatch):
    parameters = "NUM_IMAGES = 4\nFLOPS_REDUCTIONS = [2, 3]\nBATCH_SIZES = [1]\nNUM_ROUNDS = 3"
    report = """{
        "choices": [[choice.flops_reduction, choice.divergence] for choice in choices],
        "kept": kept,
        "shares": [row.share for row in latencies],
        "answers": answers,
        "is_reduced": bool(classifier.model.config.prune_layers),
    }"""
    report = run_notebook("choose_budget", tmp_path, monkeypatch, parameters, report)
    assert [budget for budget, _ in report["choices"]] == [2, 3]
    assert all(divergence >= 0 for _, divergence in report["choices"])
    assert all(0 <= count <= 4 for count in report["kept"])
    assert report["shares"] == pytest.approx([1, 1 / 2, 1 / 3], rel=0.011)
    assert len(report["answers"]) == 3 and report["is_reduced"]


@pytest.mark.slow
def test_encoder_is_reduced_compared_and_adapted(tmp_path, monkeypatch):
    parameters = "NUM_IMAGES = 6\nNUM_STEPS = 2\nSCHEDULES = ['2x', '3x']"
    report = """{
        "share": share,
        "shapes": [list(plain.shape), list(reduced.shape)],
        "tables": [before.reset_index().to_dict("list"), after.reset_index().to_dict("list")],
        "steps": len(losses),
    }"""
    report = run_notebook("any_encoder", tmp_path, monkeypatch, parameters, report)
    assert report["share"] == pytest.approx(1 / 2, rel=0.011) and report["steps"] == 2
    assert report["shapes"] == [[6, 197, 64]] * 2
    before, after = report["tables"]
    assert before["schedule"] == after["schedule"] == ["2x", "3x"] and before != after
    assert all(0 < value < 1 for value in before["embeddings: cosine"] + before["patches: cosine"])
