"""A results file is read as it was written, whichever version wrote it, or refused."""

import json
from dataclasses import asdict

import pytest
from conftest import RESULTS, ROOT, naming, results_row

from tnt_hf.results import PublishedResults, Results, format_table, read_results, recorded_training, write_results


CONTENT = RESULTS.to_json()


def content_of_row(**changes):
    row = asdict(results_row("full", "none", 1.0)) | changes
    return {**CONTENT, "rows": [{name: value for name, value in row.items() if name != "others"}]}


def test_results_are_written_whole_and_read_back(tmp_path):
    path = write_results(tmp_path / "new", RESULTS)
    assert [entry.name for entry in path.parent.iterdir()] == ["results.json"]
    assert json.loads(path.read_text()) == CONTENT and read_results(path) == RESULTS
    assert recorded_training(path.parent) is None and recorded_training(tmp_path) is None


def test_committed_results_are_read_and_written_with_all_they_hold():
    path = ROOT / "benchmarks" / "results" / "demo.json"
    content = json.loads(path.read_text())
    results = read_results(path)
    assert [row.schedule for row in results.rows[:3]] == ["full", "1.5x", "1.5x"]
    assert results.to_json()["rows"] == content["rows"]
    assert content.items() <= results.to_json().items() and not results.others


def test_fields_of_another_version_are_carried_over_and_replace_none_of_this(tmp_path):
    rows = [row | {"energy_joules": 3.5} for row in CONTENT["rows"]]
    content = {**CONTENT, "weather": {"sky": "grey"}, "checkpoint": {"class": "old"}, "rows": rows}
    results = Results.from_json(content)
    assert results.to_json() == content
    published = PublishedResults(**vars(results), checkpoint={"class": "new"})
    assert published.to_json() == {**content, "checkpoint": {"class": "new"}, "weights_license": None}


def test_a_row_is_the_schedule_it_was_measured_with():
    schedule = results_row("mine", "relevance", 1.0).to_schedule()
    assert (schedule.name, schedule.prune_layers, schedule.keep_rates, schedule.num_similar_tokens) == (
        *("mine", (2,), (0.6,)),
        8,
    )


def test_table_holds_the_figures_and_what_they_were_measured_on():
    table = format_table(RESULTS)
    for row in RESULTS.rows:
        assert f"{row.top1:.2f}" in table and f"{row.loss:.4f}" in table and f"{row.gflops:.4f}" in table
    assert "64 images of Fashion-MNIST (bundled subset); CPU (test), 3 threads, float32, batch 17" in table


@pytest.mark.parametrize(
    ("content", "named"),
    (
        ([], ["list"]),
        ({"rows": CONTENT["rows"]}, ["dataset, device"]),
        ({**CONTENT, "rows": []}, ["rows", "schedule"]),
        ({**CONTENT, "rows": [{"schedule": "full"}]}, ["rows: gflops", "rows: images_per_second"]),
        (content_of_row(top1=None), ["rows: top1"]),
        (content_of_row(top1=float("nan")), ["full", "top1 nan"]),
        (content_of_row(gflops="1.5"), ["full", "gflops '1.5'"]),
        (content_of_row(selection="best"), ["none, relevance, similarity, random", "selection 'best'"]),
        ({**CONTENT, "training": {"dataset": "photos"}}, ["training: base_model", "training: num_images"]),
    ),
)
def test_poor_results_are_refused(content, named):
    with pytest.raises(ValueError, match=naming("results", *named)):
        Results.from_json(content)
