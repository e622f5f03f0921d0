import json
import runpy
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, TINY, naming
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageClassification

from tnt_hf.conversion import evaluation_image_processor
from tnt_hf.evaluation import (
    find_target,
    format_search,
    measure_cost,
    measure_seconds,
    measured_cost,
    pareto_rows,
    search_schedules,
    search_space,
)
from tnt_hf.named_schedules import parse_schedule
from tnt_hf.schedules_tnt import count_gflops, schedule_for


ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "search_schedule.py"
# three layers to prune after, so that there are few candidates
SMALL = {"num_hidden_layers": 5, "num_noise_layers": 3}
SCHEDULE_FIELDS = ("prune_layers", "keep_rates", "num_similar_tokens")


def fake_timed(function, device):
    """A clock on which a call takes as many seconds as it does floating point operations."""
    with FlopCounterMode(display=False) as counter:
        result = function()
    return result, float(counter.get_total_flops())


@pytest.fixture
def fake_clock(monkeypatch):
    monkeypatch.setattr(measured_cost, "timed", fake_timed)


@pytest.fixture
def small_model():
    torch.manual_seed(0)
    config_class, model_class = FAMILIES["deit"]
    return model_class(config_class(**TINY | SMALL)).eval()


@pytest.fixture
def pixel_values():
    return torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def test_measured_cost_predicts_the_whole_model_from_its_parts(make_model, images, fake_clock):
    model = make_model()
    cost = measure_cost(model, batch_size=2, repeats=1)
    for schedule in (((), ()), ((2,), (0.6,), 8), ((1, 3), (0.7, 0.5), 9), ((5,), (0.5,), 3), ((0,), (0.1,))):
        model.set_schedule(*schedule)
        with torch.inference_mode():
            _, seconds = fake_timed(lambda: model(images), model.device)
        assert cost(model.config) == pytest.approx(seconds / len(images), rel=0.01)


def test_measured_cost_of_another_image_size(make_model, fake_clock):
    model = make_model()
    cost = measure_cost(model, batch_size=1, image_size=(32, 48), repeats=1)
    with pytest.raises(ValueError, match=naming("num_patches=96", "num_patches=64")):
        cost(model.config)
    model.config.image_size = (32, 48)
    with torch.inference_mode():
        _, seconds = fake_timed(lambda: model(torch.zeros(1, 3, 32, 48), interpolate_pos_encoding=True), model.device)
    assert cost(model.config) == pytest.approx(seconds, rel=0.01)


def test_measured_cost_grows_with_the_tokens_whatever_the_clock_says(make_model, monkeypatch):
    noise = torch.Generator().manual_seed(0)
    monkeypatch.setattr(
        measured_cost, "timed", lambda function, device: (function(), torch.rand(1, generator=noise).item())
    )
    model = make_model()
    cost = measure_cost(model, batch_size=1, num_counts=5, repeats=3)
    costs = []
    for kept in range(1, 64):
        model.set_schedule([1], [(kept + 0.5) / 64])
        costs.append(cost(model.config))
    assert costs == sorted(costs) and costs[0] > 0


def test_median_of_the_timings_counts_and_the_first_is_dropped(make_model, monkeypatch):
    durations = iter([100.0, 3.0, 5.0, 4.0])
    clock = {"now": 0.0, "part": 0}

    def timed(function, device):
        if clock["part"] == 0:
            clock["now"] = next(durations)
        clock["part"] = (clock["part"] + 1) % (1 + 2 * 4)  # the rest once, four parts at two counts
        return None, clock["now"]

    monkeypatch.setattr(measured_cost, "timed", timed)
    cost = measure_cost(make_model(), batch_size=2, num_counts=2, repeats=3)
    assert cost.other == 2.0 and set(cost.layer) == set(cost.selection) == {2.0}


def test_seconds_of_a_model_are_the_median_of_the_batches_after_the_first(make_model, monkeypatch):
    seconds = iter((100.0, 3.0, 8.0, 4.0))
    monkeypatch.setattr(measured_cost, "timed", lambda function, device: (function(), next(seconds)))
    assert measure_seconds(make_model(), batch_size=2, repeats=3) == 2.0


def test_measuring_leaves_the_model_as_it_is(make_model, fake_clock):
    model = make_model(prune_layers=[4], keep_rates=[0.5], num_similar_tokens=3).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = model.config.to_dict()
    random_state = torch.random.get_rng_state()
    measure_cost(model, batch_size=1, num_counts=2, repeats=1)
    measure_seconds(model, batch_size=1, repeats=1)
    assert model.training and model.config.to_dict() == config
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), random_state)


def test_impossible_measurements_and_other_models_are_refused(make_model, fake_clock):
    for name, value in (("batch_size", 0), ("num_counts", 1), ("repeats", 0)):
        with pytest.raises(ValueError, match=naming(f"`{name}`", f"at least {value + 1}")):
            measure_cost(make_model(), **{"batch_size": 1, name: value})
    cost = measure_cost(make_model(), batch_size=1, num_counts=2, repeats=1)
    with pytest.raises(ValueError, match=naming("hidden_size=32", "hidden_size=64")):
        cost(make_model(hidden_size=64).config)


def test_measured_speedup_is_a_budget(make_model, fake_clock):
    model = make_model()
    cost = measure_cost(model, batch_size=1, repeats=1)
    full = cost(model.config)
    schedule = model.set_budget(speedup=1.5, cost=cost)
    assert schedule == schedule_for(model.config, speedup=1.5, cost=cost)
    assert 1.5 <= full / cost(model.config) <= 1.5 / 0.99


def is_dominated(row, rows, unit):
    return any(
        other[unit] <= row[unit] and other["kl"] <= row["kl"] and (other[unit], other["kl"]) != (row[unit], row["kl"])
        for other in rows
    )


def check_results(model, results):
    unit, limit = results["target"]["unit"], results["target"]["limit"]
    rows, chosen = results["finalists"], results["chosen"]
    assert results["pareto"] == sorted(
        (row for row in rows if not is_dominated(row, rows, unit)), key=lambda row: row[unit]
    )
    assert chosen[unit] <= limit
    assert not any(row["kl"] < chosen["kl"] for row in rows if row[unit] <= limit)
    assert results["baseline"] in rows and results["baseline"][unit] <= limit
    assert len({row["schedule"] for row in rows}) == len(rows)
    for row in rows:
        assert parse_schedule(row["schedule"]).settings.items() <= row.items()
        assert all(layer < model.config.num_noise_layers for layer in row["prune_layers"])


def test_search_in_gflops_with_labels(make_model, pixel_values):
    model = make_model(**SMALL, prune_layers=[4], keep_rates=[0.5]).train()
    target = find_target(model, gflops=0.0025)
    labels = torch.arange(24) % 7
    results = search_schedules(model, pixel_values, labels, target, batch_size=10)
    assert model.training and (model.config.prune_layers, model.config.keep_rates) == ([4], [0.5])
    check_results(model, results)
    assert results["num_images"] == 24 and results["used_labels"]
    assert results.keys() >= {"device", "num_threads", "versions", "dtype", "batch_size", "seed"}
    assert results["baseline"]["schedule"] == schedule_for(model.config, gflops=0.0025).name
    assert results["chosen"]["measured_milliseconds_per_image"] is None

    model.eval()
    model.set_schedule([], [])
    with torch.no_grad():
        expected = model(pixel_values).logits
    for row in (results["chosen"], results["finalists"][-1], results["finalists"][0]):
        model.set_schedule(*(row[name] for name in SCHEDULE_FIELDS))
        with torch.no_grad():
            logits = model(pixel_values).logits
        divergence = (expected.softmax(-1) * (expected.log_softmax(-1) - logits.log_softmax(-1))).sum(-1).mean()
        assert row["kl"] == pytest.approx(divergence.item(), rel=1e-3, abs=1e-5)
        assert row["agreement"] == pytest.approx(100 * (logits.argmax(-1) == expected.argmax(-1)).float().mean())
        assert row["top1"] == pytest.approx(100 * (logits.argmax(-1) == labels).float().mean())
        assert row["gflops"] == count_gflops(model.config)
        assert row["gflops_executed"] == count_gflops(model.config, as_executed=True)
        assert row["milliseconds_per_image"] is None


def test_search_in_milliseconds_without_labels_repeats(small_model, pixel_values, fake_clock, monkeypatch):
    monkeypatch.setattr(search_space, "measure_cost", partial(measure_cost, num_counts=4, repeats=1))
    full = 1000 * search_space.measure_cost(small_model, batch_size=4)(small_model.config)
    target = find_target(small_model, milliseconds=0.6 * full, batch_size=4)
    first, second = (search_schedules(small_model, pixel_values[:9], None, target, batch_size=4) for _ in range(2))
    assert first == second
    check_results(small_model, first)
    assert not first["used_labels"] and {row["top1"] for row in first["finalists"]} == {None}
    assert first["target"] == {"unit": "milliseconds_per_image", "limit": 0.6 * full}
    small_model.set_schedule(*(first["chosen"][name] for name in SCHEDULE_FIELDS))
    measured = first["chosen"]["measured_milliseconds_per_image"]
    assert measured == 1000 * measure_seconds(small_model, batch_size=4)
    assert measured == pytest.approx(first["chosen"]["milliseconds_per_image"], rel=0.02)
    assert f"chosen measured at {measured:.6g}; 9 images of noise" in format_search({**first, "dataset": "noise"})


def test_rows_of_equal_cost_or_divergence_leave_one_on_the_front():
    rows = [
        {"schedule": name, "gflops": gflops, "kl": kl}
        for name, gflops, kl in (("a", 3, 0.1), ("b", 1, 0.5), ("c", 1, 0.4), ("d", 2, 0.4), ("e", 2.5, 0.2))
    ]
    assert [row["schedule"] for row in pareto_rows(rows, "gflops")] == ["c", "e", "a"]


def test_any_target_that_can_be_reached_is_met(small_model, pixel_values):
    model = small_model
    with pytest.raises(ValueError, match=naming("`gflops`", "nan")) as error:
        find_target(model, gflops=float("nan"))
    lowest, full = (float(text.split(",")[0].split()[0]) for text in str(error.value).split(" from ")[1].split(" to "))
    for gflops in (1.0001 * lowest, 0.9999 * full, count_gflops(model.config)):
        results = search_schedules(model, pixel_values[:4], None, find_target(model, gflops=gflops))
        assert results["chosen"]["gflops"] <= gflops
    assert results["chosen"]["schedule"] == "full" and results["chosen"]["agreement"] == 100
    for gflops in (0.99 * lowest, 1.01 * full, -1):
        with pytest.raises(ValueError, match=naming("`gflops`", f"{gflops:.6g}")):
            find_target(model, gflops=gflops)
    with pytest.raises(ValueError, match=naming("`gflops`", "`milliseconds`")):
        find_target(model)


def test_models_without_learning_heads_or_classes_are_refused(make_model, pixel_values):
    with pytest.raises(ValueError, match="num_noise_layers=0"):
        find_target(make_model(num_noise_layers=0), gflops=0.01)
    model = make_model(num_labels=1)
    with pytest.raises(ValueError, match=naming("`num_labels`", "at least 2")):
        search_schedules(model, pixel_values, None, find_target(model, gflops=0.0025))
    with pytest.raises(ValueError, match="`pixel_values`"):
        search_schedules(model, pixel_values[:0], None, find_target(model, gflops=0.0025))


@pytest.fixture
def model_dir(small_model, tmp_path):
    """A saved model with a schedule and an image processor, next to a folder of images without labels."""
    small_model.set_schedule([1], [0.9])
    small_model.save_pretrained(tmp_path / "model")
    evaluation_image_processor((32, 32)).save_pretrained(tmp_path / "model")
    for index in range(8):
        folder = tmp_path / "images" / f"{index % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (40, 50, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(index))
        Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
    (tmp_path / "images" / "notes.txt").write_text("no image")
    return tmp_path / "model"


def call_script(monkeypatch, *flags):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, flags)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_chosen_schedule_is_stored_and_then_used(model_dir, tmp_path, monkeypatch, capsys):
    before = json.loads((model_dir / "config.json").read_text())
    flags = (
        *("--model_name_or_path", model_dir, "--images_dir", tmp_path / "images", "--gflops", "0.0025"),
        *("--output_dir", tmp_path / "out", "--num_images", "6", "--use_cpu"),
    )
    call_script(monkeypatch, *flags, "--apply")
    results = json.loads((tmp_path / "out" / "search.json").read_text())
    chosen = results["chosen"]
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == chosen
    assert (results["num_images"], results["dataset"], results["used_labels"]) == (6, "images", False)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"search.json", "search.png"}
    with Image.open(tmp_path / "out" / "search.png") as plot:
        assert plot.width > 800

    after = json.loads((model_dir / "config.json").read_text())
    assert after == {**before, **{name: chosen[name] for name in SCHEDULE_FIELDS}} != before
    assert list(after) == list(before) and not list(model_dir.glob("*.partial"))
    model = AutoModelForImageClassification.from_pretrained(model_dir, trust_remote_code=True).eval()
    assert {name: getattr(model.config, name) for name in SCHEDULE_FIELDS}.items() <= chosen.items()
    with torch.no_grad():
        kept = model(torch.zeros(1, 3, 32, 32)).kept_indices
    assert [indices.shape[1] for indices in kept] == [
        model.config.patch_token_counts()[layer + 1] for layer in chosen["prune_layers"]
    ]

    with pytest.raises(SystemExit, match=naming("search.json", "--overwrite_output_dir")):
        call_script(monkeypatch, *flags)


@pytest.mark.parametrize(
    ("flags", "named"),
    (
        (("--gflops", "17"), ["`gflops`", 17]),
        (("--milliseconds", "1e9"), ["`milliseconds`", "1e+09"]),
        ((), ["--gflops", "--milliseconds", "None and None"]),
        (("--gflops", "1", "--milliseconds", "2"), ["--gflops", "--milliseconds", "1.0 and 2.0"]),
        (("--gflops", "0.0025", "--num_images", "0"), ["--num_images", 0]),
        (("--gflops", "0.0025", "--images_dir", "absent"), ["--images_dir", "absent"]),
        (("--gflops", "0.0025", "--images_dir", "tests/reference"), ["--images_dir", "tests/reference"]),
        (
            ("--gflops", "0.0025", "--images_dir", "tests", "--validation_dir", "tests"),
            ["--images_dir", "--dataset_name", "--validation_dir"],
        ),
        (("--gflops", "0.0025"), ["labels", "10 classes", "--trust_label_order"]),
        (("--gflops", "0.1", "--apply", "--model_name_or_path", "some/model"), ["--apply", "some/model"]),
        (
            ("--gflops", "0.1", "--apply", "--model_name_or_path", "examples/backbone"),
            ["--apply", "`model_type`", "tnt_vit, tnt_deit", "'vit'"],
        ),
        (("--gflops", "0.1", "--output_dir", "README.md/out"), ["--output_dir", "README.md/out"]),
    ),
    ids=lambda value: "_".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_refused_before_anything_is_written(model_dir, tmp_path, monkeypatch, flags, named):
    config = (model_dir / "config.json").read_bytes()
    output_dir = tmp_path / "out"
    with pytest.raises(SystemExit, match=naming(*named)):
        call_script(monkeypatch, "--model_name_or_path", model_dir, "--output_dir", output_dir, *flags)
    assert not output_dir.exists() and (model_dir / "config.json").read_bytes() == config


def test_search_on_the_bundled_images_by_their_labels(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    config_class, model_class = FAMILIES["deit"]
    model_class(config_class(**TINY | SMALL | {"num_labels": 10})).save_pretrained(tmp_path / "model")
    evaluation_image_processor((32, 32)).save_pretrained(tmp_path / "model")
    flags = ("--gflops", "0.0025", "--num_images", "4", "--batch_size", "4", "--use_cpu")
    call_script(monkeypatch, "--model_name_or_path", tmp_path / "model", "--output_dir", tmp_path / "out", *flags)
    results = json.loads((tmp_path / "out" / "search.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == results["chosen"]
    assert results["chosen"]["gflops"] <= 0.0025 and results["chosen"]["top1"] is not None
    assert results["used_labels"] and results["num_images"] == 4
    assert results["chosen"]["prune_layers"] and max(results["chosen"]["prune_layers"]) < SMALL["num_noise_layers"]
