"""The stored notebook, and a short run of it."""

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient


PATH = Path(__file__).parents[1] / "notebooks" / "tnt_demo.ipynb"
SHORT = "NUM_STEPS = 10\nNUM_EVAL_IMAGES = 8"
REPORT = """
import json
rows = [vars(row) for row in rows]
print(json.dumps({"rows": rows, "answers": answers, "num_trained": num_trained, "steps": trainer.state.global_step}))
"""


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_stored_notebook_was_run_to_its_end_without_errors_and_shows_pictures():
    notebook = nbformat.read(PATH, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert all(output.name == "stdout" for output in outputs if output.output_type == "stream")
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    text = "".join(str({**output.get("data", {}), "image/png": ""}) + output.get("text", "") for output in outputs)
    assert str(Path.home()) not in text and "/tmp" not in text and ".py" not in text
    assert PATH.stat().st_size < 1_000_000


@pytest.mark.slow
def test_notebook_trains_prunes_compares_and_classifies(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(PATH, as_version=4)
    (parameters,) = (cell for cell in code_cells(notebook) if "parameters" in cell.metadata.get("tags", []))
    parameters.source = SHORT
    notebook.cells.append(nbformat.v4.new_code_cell(REPORT))
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": tmp_path}}).execute()
    report = json.loads(notebook.cells[-1].outputs[0].text)
    rows = {(row["schedule"], row["selection"]): row for row in report["rows"]}
    pruned = {(schedule, selection) for schedule in ("2x", "3x", "4x") for selection in ("relevance", "random")}
    assert rows.keys() == {("full", "none"), *pruned}
    assert all(row["num_images"] == 8 and 0 <= row["top1"] <= row["top5"] <= 100 for row in rows.values())
    costs = [rows[schedule, "relevance"]["gflops"] for schedule in ("2x", "3x", "4x")]
    assert rows["full", "none"]["gflops"] > 2 * costs[0] > 2 * costs[1] > 2 * costs[2]
    assert report["num_trained"] == 6 * 65 and report["steps"] == 10
    scores = [answer["score"] for answer in report["answers"]]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True) and 0 < sum(scores) <= 1
