import json
from itertools import count

import pytest
import torch
from conftest import naming

from benchmarks import inference as inference_benchmark
from benchmarks.inference import (
    DEPLOYED_RUNTIMES,
    InferenceBenchmarkArguments,
    plot_inference,
    run_inference_benchmark,
)
from tnt_hf import timing
from tnt_hf.deployed_forms import missing_forms


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(inference_benchmark, "PAUSE", 0.0)
    monkeypatch.setattr(inference_benchmark, "MATRIX_SIZE", 64)


def small_run(**fields):
    return InferenceBenchmarkArguments(
        architecture="deit_tiny_distilled_patch16_224",
        image_sizes=[48, 64],
        batch_sizes=[8, 4],
        schedules=["full", "2:0.5:3"],
        runtimes=["timm eager", "eager"],
        num_rounds=3,
        **fields,
    )


@pytest.mark.slow
def test_rows_state_ratios_of_one_run_on_the_same_weights(monkeypatch, tmp_path):
    clock = count()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))  # every call takes one second
    results = run_inference_benchmark(small_run(num_threads=torch.get_num_threads()))
    rows = results["rows"]
    assert [(row["image_size"], row["batch_size"], row["runtime"], row["schedule"]) for row in rows] == [
        *(
            (48, batch_size, *form)
            for batch_size in (8, 4)
            for form in (
                ("Transformers eager", "full"),
                ("timm eager", "full"),
                ("eager", "full"),
                ("eager", "2:0.5:3"),
            )
        ),
        *((64, 4, *form) for form in (("Transformers eager", "full"), ("eager", "full"), ("eager", "2:0.5:3"))),
    ]
    for row in rows:
        assert row["images_per_second"] == row["batch_size"] and row["latency_ms"] == 1000
        assert row["speedup"] == 1 and row["speedup_kept"] == pytest.approx(1 / row["flops_reduction"])
        assert row["share_of_matmul_rate"] == pytest.approx(row["gflops"] * row["batch_size"] * 1e9 / 64**3)
    assert rows[8]["flops_reduction"] == 1 < rows[9]["flops_reduction"] < rows[10]["flops_reduction"]
    assert rows[0]["flops_reduction"] == 1 < rows[2]["flops_reduction"] < rows[3]["flops_reduction"]
    plot_inference(json.loads(json.dumps(results)), tmp_path / "inference.png")
    assert (tmp_path / "inference.png").stat().st_size > 10_000


def test_joules_are_those_of_the_images_that_ran(monkeypatch):
    clock, joules = count(), count(0, 6)  # two readings of the clock are one run apart
    monkeypatch.setattr(inference_benchmark, "timed", lambda call, device: call())
    monkeypatch.setattr(inference_benchmark.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(inference_benchmark, "ENERGY_SECONDS", 4)
    ran = []
    per_image = inference_benchmark._joules_per_image(ran.append, torch.zeros(2, 3, 4, 4), lambda: float(next(joules)))
    assert len(ran) == 3 and per_image == 6 / (3 * 2)


def test_energy_is_unknown_where_no_driver_tells():
    assert inference_benchmark._energy_counter(torch.device("cpu")) is None


@pytest.mark.slow
def test_a_dinov2_is_measured_beside_that_of_transformers():
    arguments = InferenceBenchmarkArguments(
        architecture="dinov2-small",
        token_reduction="cluster",
        image_sizes=[56, 70],
        batch_sizes=[2],
        schedules=["full", "2x"],
        runtimes=["eager"],
        num_rounds=3,
    )
    rows = run_inference_benchmark(arguments)["rows"]
    assert [(row["image_size"], row["runtime"], row["schedule"]) for row in rows] == [
        (size, *form)
        for size in (56, 70)
        for form in (("Transformers eager", "full"), ("eager", "full"), ("eager", "2x"))
    ]
    assert max(row["logit_difference"] for row in rows) < 1e-5
    assert rows[1]["flops_reduction"] == 1 and rows[2]["flops_reduction"] == pytest.approx(2, rel=0.02)


@pytest.mark.slow
def test_merging_models_are_measured_at_what_merging_costs():
    fields = {
        "architecture": "deit_tiny_distilled_patch16_224",
        "image_sizes": [112],
        "batch_sizes": [1],
        "schedules": ["2x", "2:0.5"],
        "runtimes": ["eager"],
        "num_rounds": 3,
    }
    rows = {}
    for token_reduction in ("drop", "merge"):
        arguments = InferenceBenchmarkArguments(token_reduction=token_reduction, **fields)
        results = run_inference_benchmark(arguments)
        assert results["token_reduction"] == token_reduction
        _, twice, half = rows[token_reduction] = results["rows"]
        assert twice["schedule"] == "2x" and max(row["logit_difference"] for row in (twice, half)) < 1e-5
    assert rows["merge"][2]["gflops"] > rows["drop"][2]["gflops"]  # similarity and means of merged tokens
    assert rows["merge"][1]["gflops"] == pytest.approx(rows["drop"][1]["gflops"], rel=0.02)


@pytest.mark.slow
def test_rows_tell_kernels_and_slow_calls_of_every_form_of_attention(monkeypatch):
    arguments = InferenceBenchmarkArguments(
        architecture="deit_tiny_distilled_patch16_224",
        token_reduction="cluster",
        image_sizes=[112],
        batch_sizes=[2],
        schedules=["full", "2x"],
        runtimes=["eager", "eager, sizes in mask", "eager, sizes in keys", "Token Merging eager"],
        num_rounds=3,
        device="cpu",
        dtype="float32",
    )
    results = run_inference_benchmark(arguments)
    assert (results["dtype"], results["cuda"], results["cudnn"]) == ("float32", None, None)
    by_form = {(row["runtime"], row["schedule"]): row for row in results["rows"]}
    assert {runtime for runtime, _ in by_form} == {"Transformers eager", *arguments.runtimes}
    assert ("Token Merging eager", "full") not in by_form
    for row in by_form.values():
        assert row["attention_kernels"] == ["flash"] and row["logit_difference"] < 1e-4
        assert row["latency_p95_ms"] >= row["latency_ms"] > 0
    reduced = by_form["Token Merging eager", "2x"]
    assert reduced["gflops"] == pytest.approx(by_form["eager", "2x"]["gflops"], rel=0.05)


@pytest.mark.slow
@pytest.mark.skipif("AOTInductor" in missing_forms(), reason="needs a C++ compiler")
def test_deployed_forms_are_measured_beside_the_eager_model():
    left_out = {*missing_forms(), "AOTInductor"}  # minutes; other tests compile
    runtimes = ["eager", *(form for form in DEPLOYED_RUNTIMES if form not in left_out)]
    arguments = InferenceBenchmarkArguments(
        architecture="deit_tiny_distilled_patch16_224",
        token_reduction="cluster",
        image_sizes=[48],
        batch_sizes=[2],
        schedules=["2:0.5"],
        runtimes=runtimes,
        num_rounds=3,
    )
    _, *rows = run_inference_benchmark(arguments)["rows"]
    assert [row["runtime"] for row in rows] == runtimes
    assert all(row["logit_difference"] < 1e-4 for row in rows if row["runtime"] != "ONNX Runtime int8")


def test_openvino_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(inference_benchmark, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=naming("--runtimes", "OpenVINO", "tnt-hf[openvino]")):
        InferenceBenchmarkArguments(runtimes=["OpenVINO"])


@pytest.mark.slow
def test_form_with_other_logits_is_refused(monkeypatch):
    monkeypatch.setattr(inference_benchmark, "to_plain_model", lambda model: model.__class__(model.config))
    with pytest.raises(ValueError, match=naming("Transformers eager", "schedule full", "logits")):
        run_inference_benchmark(small_run())


def test_peak_memory_is_that_of_the_call():
    megabyte = 2**20
    result, peak = timing.peak_memory(lambda: torch.ones(64 * megabyte // 4).sum().item(), torch.device("cpu"))
    assert result == 64 * megabyte / 4
    assert peak is None or 60 * megabyte <= peak <= 90 * megabyte


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_gpu_that_is_missing_is_named():
    with pytest.raises(ValueError, match=naming("--device cuda", "GPU")):
        InferenceBenchmarkArguments(device="cuda")


@pytest.mark.parametrize(
    ("fields", "named"),
    (
        ({"architecture": "resnet50"}, ("--architecture", "dinov2-base", "'resnet50'")),
        ({"architecture": "dinov2-base"}, ("timm eager", "--architecture", "dinov2-base")),
        ({"runtimes": ["tensorrt"]}, ("--runtimes", "timm eager, eager, compiled", "tensorrt")),
        ({"batch_sizes": [0]}, ("--batch_sizes", [0])),
        ({"num_rounds": 1}, ("--num_rounds", 3, 1)),
        ({"token_reduction": "fuse"}, ("--token_reduction", "drop, merge", "'fuse'")),
        ({"device": "tpu"}, ("--device", "cpu, cuda", "'tpu'")),
        ({"dtype": "int8"}, ("--dtype", "float32, bfloat16, float16", "'int8'")),
        ({"dtype": "float16"}, ("ONNX Runtime", "float32", "float16")),
        ({"runtimes": ["CUDA graphs"]}, ("CUDA graphs", "--device cuda", "cpu")),
        ({"schedules": ["half"]}, ("full, single, multi", "'half'")),
    ),
)
def test_bad_settings_are_refused(fields, named):
    with pytest.raises(ValueError, match=naming(*named)):
        InferenceBenchmarkArguments(**fields)
