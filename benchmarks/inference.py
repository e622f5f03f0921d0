"""
The speed of one model in every form it is deployed in, measured side by side in one process on the same weights.

Absolute figures are those of one machine on one day; what carries over are the ratios, which are taken round by round
against the unpruned model of Transformers.
"""

import ctypes
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.profiler import ProfilerActivity, profile

from tnt_hf.configuration_tnt import CHOICES
from tnt_hf.conversion import load_research_checkpoint, to_plain_model
from tnt_hf.evaluation import measure_cost
from tnt_hf.export import export_onnx, open_session, quantize_int8, run_session
from tnt_hf.modeling_tnt import TntDeiTForImageClassification, TntViTForImageClassification
from tnt_hf.named_schedules import (
    PUBLISHED_SCHEDULES,
    SCHEDULE_FORMS,
    FlopsReduction,
    parse_schedule,
    resolve_schedules,
)
from tnt_hf.results import device_facts
from tnt_hf.schedules_tnt import UNPRUNED, Schedule, count_gflops, height_and_width
from tnt_hf.timing import peak_memory, timed


REFERENCE = "Transformers eager"
RUNTIMES = ("timm eager", "eager", "compiled", "ONNX Runtime", "ONNX Runtime int8")
PAUSE = 0.25  # seconds in which the threads of the form before fall asleep
MATRIX_SIZE = 2048
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h


@dataclass
class InferenceBenchmarkArguments:
    """What to measure."""

    architecture: str = field(
        default="deit_small_distilled_patch16_224",
        metadata={"help": "timm's name of a ViT or distilled DeiT; its weights are random, which costs the same."},
    )
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8, 32], metadata={"help": "Images in a batch."})
    schedules: list[str] = field(
        default_factory=lambda: list(PUBLISHED_SCHEDULES),
        metadata={"help": f"Schedules to measure: {SCHEDULE_FORMS}."},
    )
    token_reduction: str = field(
        default="drop",
        metadata={"help": f"What becomes of tokens that leave: {' or '.join(CHOICES['token_reduction'])}."},
    )
    runtimes: list[str] = field(
        default_factory=lambda: list(RUNTIMES),
        metadata={"help": f"Measured beside the reference, {REFERENCE}: {', '.join(RUNTIMES)}."},
    )
    image_sizes: list[int] = field(
        default_factory=lambda: [224],
        metadata={
            "help": "Pixels; beyond the first, only the eager model, with interpolated position embeddings, at the "
            "smallest batch size."
        },
    )
    num_rounds: int = field(default=7, metadata={"help": "Interleaved rounds; the median is reported."})
    num_threads: int | None = field(default=None, metadata={"help": "CPU threads; PyTorch's own number by default."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder for inference.json and inference.png."})

    def __post_init__(self):
        for name in ("batch_sizes", "image_sizes"):
            if any(value < 1 for value in getattr(self, name)):
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")
        if unknown := set(self.runtimes) - set(RUNTIMES):
            raise ValueError(f"--runtimes must be among {', '.join(RUNTIMES)}, got {', '.join(sorted(unknown))}.")
        allowed = CHOICES["token_reduction"]
        if self.token_reduction not in allowed:
            raise ValueError(f"--token_reduction must be one of {', '.join(allowed)}, got {self.token_reduction!r}.")
        if self.num_rounds < 3:
            raise ValueError(f"--num_rounds must be at least 3, got {self.num_rounds}.")
        if self.architecture not in timm.list_models("*vit*") + timm.list_models("deit*"):
            raise ValueError(f"--architecture must be timm's name of a ViT or DeiT, got {self.architecture!r}.")
        self.schedules = [parse_schedule(text) for text in self.schedules]


@dataclass
class _Form:
    """One way to run the model, and what was measured of it."""

    runtime: str
    schedule: Schedule
    gflops: Callable[[int], float]
    run: Callable[[torch.Tensor], torch.Tensor]
    session_path: Path | None = None
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    logit_difference: float = 0.0


def run_inference_benchmark(arguments: InferenceBenchmarkArguments) -> dict[str, Any]:
    """
    Measure every form at every batch size.

    Returns:
        `dict`: Device facts and `rows`, one for each image size, batch size, runtime and schedule:
        `images_per_second`, `latency_ms` of a batch, `peak_memory_mb` above what the process held before, `gflops`
        for one image as executed, `share_of_matmul_rate`, `speedup` over the unpruned model of Transformers in the
        same rounds (median, and `speedup_range` over the rounds), `flops_reduction`, the ratio of the
        multiply-accumulates of the two, `speedup_kept`, the former by the latter, and `logit_difference` from the
        eager model, relative to the norm.

    Raises:
        ValueError: If a form in float32 does not give the logits of the eager model with the same schedule to 1e-3 of
            their norm, or one in int8 to 0.3.
    """
    torch.set_num_threads(arguments.num_threads or torch.get_num_threads())
    keep_freed_memory()
    torch._dynamo.config.recompile_limit = max(8, 4 * len(arguments.schedules))
    torch.manual_seed(0)
    first_size, *other_sizes = arguments.image_sizes
    original = timm.create_model(arguments.architecture, img_size=first_size).eval()
    model = load_research_checkpoint(original.state_dict(), token_reduction=arguments.token_reduction)
    model.requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        forms = _make_forms(model, original, arguments.schedules, arguments.runtimes, Path(folder))
        rows = []
        for batch_size in arguments.batch_sizes:
            rows += _measure(forms, model, first_size, batch_size, arguments.num_rounds)
        eager = _make_forms(model, original, arguments.schedules, ["eager"], Path(folder), is_resized=True)
        for image_size in other_sizes:
            rows += _measure(eager, model, image_size, min(arguments.batch_sizes), arguments.num_rounds)
    facts = device_facts(torch.device("cpu"))
    return {
        "architecture": arguments.architecture,
        "token_reduction": arguments.token_reduction,
        **facts,
        "dtype": "float32",
        "num_rounds": arguments.num_rounds,
        "rows": rows,
    }


def keep_freed_memory() -> None:
    """
    Have glibc keep what is freed. By default it gives large blocks back to the system, and the page faults of taking
    them again cost a form a third of its time or nothing, as the heap happens to lie.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _make_forms(
    model: TntViTForImageClassification | TntDeiTForImageClassification,
    original: nn.Module,
    schedules: Sequence[Schedule | FlopsReduction],
    runtimes: Sequence[str],
    folder: Path,
    is_resized: bool = False,
) -> list[_Form]:
    whole = partial(count_gflops, model.config, schedule=UNPRUNED)
    plain = to_plain_model(model).eval().requires_grad_(False)
    forms = [_Form(REFERENCE, UNPRUNED, whole, _logits_of(plain, interpolate_pos_encoding=is_resized))]
    if "timm eager" in runtimes:
        forms.append(_Form("timm eager", UNPRUNED, whole, original))
    for number, schedule in enumerate(resolve_schedules(model.config, schedules)):
        gflops = partial(count_gflops, model.config, schedule=schedule, as_executed=True)
        options = {"schedule": schedule, "interpolate_pos_encoding": is_resized}
        if "eager" in runtimes:
            forms.append(_Form("eager", schedule, gflops, _logits_of(model, **options)))
        if "compiled" in runtimes:
            compiled = torch.compile(model, fullgraph=True)
            forms.append(_Form("compiled", schedule, gflops, _logits_of(compiled, **options)))
        if any(runtime.startswith("ONNX Runtime") for runtime in runtimes):
            path, int8_path = folder / f"{number}.onnx", folder / f"{number}_int8.onnx"
            model.set_schedule(schedule)
            export_onnx(model, path)
            if "ONNX Runtime" in runtimes:
                forms.append(_Form("ONNX Runtime", schedule, gflops, _logits_of_session(path), path))
            if "ONNX Runtime int8" in runtimes:
                quantize_int8(path, int8_path)
                forms.append(_Form("ONNX Runtime int8", schedule, gflops, _logits_of_session(int8_path), int8_path))
    return forms


def _logits_of(model: nn.Module, **options: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda images: model(images, **options).logits


def _logits_of_session(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    session = open_session(path)
    return lambda images: run_session(session, images)


@torch.inference_mode()
def _measure(
    forms: Sequence[_Form],
    model: TntViTForImageClassification | TntDeiTForImageClassification,
    image_size: int,
    batch_size: int,
    num_rounds: int,
) -> list[dict[str, Any]]:
    device = torch.device("cpu")
    images = torch.randn(batch_size, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    _check_logits_and_memory(forms, model, images)
    for form in forms:
        form.seconds = []
    multiply_add_rates = []
    matrix = torch.randn(MATRIX_SIZE, MATRIX_SIZE)
    repeats = max(1, 8 // batch_size)
    for start in range(num_rounds):
        for form in (*forms[start % len(forms) :], *forms[: start % len(forms)]):
            time.sleep(PAUSE)
            form.run(images)
            runs = [timed(partial(form.run, images), device)[1] for _ in range(repeats)]
            form.seconds.append(statistics.median(runs))
        time.sleep(PAUSE)
        seconds = statistics.median(timed(lambda: matrix @ matrix, device)[1] for _ in range(3))
        multiply_add_rates.append(MATRIX_SIZE**3 / seconds / 1e9)
    rate = statistics.median(multiply_add_rates)
    return [_row(form, forms[0], image_size, batch_size, rate) for form in forms]


def _check_logits_and_memory(
    forms: Sequence[_Form],
    model: TntViTForImageClassification | TntDeiTForImageClassification,
    images: torch.Tensor,
) -> None:
    expected = {}
    for form in forms:
        schedule = form.schedule
        if schedule.name not in expected:
            is_resized = images.shape[-2:] != height_and_width(model.config.image_size)
            outputs = model(images, schedule=schedule, interpolate_pos_encoding=is_resized)
            expected[schedule.name] = outputs.logits
        reference = expected[schedule.name]
        if form.runtime == "compiled":
            form.run(images)  # compilation is no part of its memory
        run = form.run if form.session_path is None else _logits_of_session(form.session_path)
        logits, form.peak_bytes = peak_memory(partial(run, images), images.device)
        form.logit_difference = difference = ((logits - reference).norm() / reference.norm()).item()
        allowed = 0.3 if form.runtime.endswith("int8") else 1e-3
        if not difference <= allowed:
            raise ValueError(
                f"{form.runtime} with schedule {schedule.name} gives other logits than the eager model: they differ "
                f"by {difference:.2e} of their norm, allowed is {allowed:g}."
            )


def _row(form: _Form, reference: _Form, image_size: int, batch_size: int, rate: float) -> dict[str, Any]:
    seconds = statistics.median(form.seconds)
    speedups = [theirs / ours for theirs, ours in zip(reference.seconds, form.seconds)]
    speedup = statistics.median(speedups)
    gflops = form.gflops(image_size)
    promised = reference.gflops(image_size) / gflops
    return {
        "image_size": image_size,
        "batch_size": batch_size,
        "runtime": form.runtime,
        "schedule": form.schedule.name,
        "gflops": gflops,
        "images_per_second": batch_size / seconds,
        "latency_ms": 1000 * seconds,
        "peak_memory_mb": None if form.peak_bytes is None else form.peak_bytes / 2**20,
        "share_of_matmul_rate": gflops * batch_size / seconds / rate,
        "matmul_gflops_per_second": rate,
        "logit_difference": form.logit_difference,
        "speedup": speedup,
        "speedup_range": [min(speedups), max(speedups)],
        "flops_reduction": promised,
        "speedup_kept": speedup / promised,
    }


@torch.inference_mode()
def profile_inference(arguments: InferenceBenchmarkArguments) -> dict[str, Any]:
    """
    Where the time of the eager forms goes, at the first image size and every batch size.

    Returns:
        `dict`: Device facts and `rows`, one for each batch size, runtime and schedule: `operations`, the share of the
        time of each of PyTorch's operations that takes 1 % or more; `linear_gflops_per_second`, the
        multiply-accumulates of the linear layers by their time, and `matmul_gflops_per_second`, that of one large
        product; and `selection_share`, what scoring, ranking, similarity and copying take of the forward pass.
    """
    torch.set_num_threads(arguments.num_threads or torch.get_num_threads())
    keep_freed_memory()
    torch.manual_seed(0)
    original = timm.create_model(arguments.architecture, img_size=arguments.image_sizes[0]).eval()
    model = load_research_checkpoint(original.state_dict(), token_reduction=arguments.token_reduction)
    config, device = model.config, torch.device("cpu")
    forms = _make_forms(model, original, arguments.schedules, ["eager"], Path())
    matrix = torch.randn(MATRIX_SIZE, MATRIX_SIZE)
    rows = []
    for batch_size in arguments.batch_sizes:
        cost = measure_cost(model, batch_size)
        images = torch.randn(batch_size, 3, *height_and_width(config.image_size))
        for form in forms:
            for _ in range(3):
                form.run(images)
            # counting keeps the inputs, for which the heap then grows with every call: no call that is timed may count
            with profile(activities=[ProfilerActivity.CPU], with_flops=True) as counter:
                form.run(images)
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                for _ in range(arguments.num_rounds):
                    form.run(images)
            seconds = min(timed(lambda: matrix @ matrix, device)[1] for _ in range(5))
            events = profiler.key_averages()
            total = sum(event.self_cpu_time_total for event in events)
            linear_flops = sum(event.flops for event in counter.key_averages() if event.key == "aten::addmm")
            (linear,) = (event for event in events if event.key == "aten::addmm")
            linear_seconds = linear.self_cpu_time_total / 1e6 / arguments.num_rounds
            steps = config.reduction_steps(schedule=form.schedule)
            shares = {event.key.removeprefix("aten::"): event.self_cpu_time_total / total for event in events}
            rows.append(
                {
                    "batch_size": batch_size,
                    "runtime": form.runtime,
                    "schedule": form.schedule.name,
                    "operations": {name: share for name, share in shares.items() if share >= 0.01},
                    "linear_gflops_per_second": linear_flops / 2 / linear_seconds / 1e9,
                    "matmul_gflops_per_second": MATRIX_SIZE**3 / seconds / 1e9,
                    "selection_share": cost.reduction_seconds(steps) / cost(config, form.schedule),
                }
            )
    return {
        "architecture": arguments.architecture,
        "token_reduction": arguments.token_reduction,
        **device_facts(device),
        "dtype": "float32",
        "rows": rows,
    }


def plot_inference(results: dict[str, Any], path: Path) -> None:
    """Write a picture of the speed-ups at each batch size, one bar for each runtime and schedule."""
    rows = [row for row in results["rows"] if row["image_size"] == results["rows"][0]["image_size"]]
    batch_sizes = list(dict.fromkeys(row["batch_size"] for row in rows))
    labels = list(dict.fromkeys(f"{row['runtime']}, {row['schedule']}" for row in rows))
    figure = Figure(figsize=(9, 0.28 * len(labels) + 1.6), layout="constrained")
    for axes, batch_size in zip(figure.subplots(1, len(batch_sizes), sharey=True, squeeze=False)[0], batch_sizes):
        shown = [row for row in rows if row["batch_size"] == batch_size]
        speedups = [row["speedup"] for row in shown]
        axes.barh(
            labels,
            speedups,
            color=["#999999" if "Tran" in label or "timm" in label else "#0072B2" for label in labels],
        )
        for position, speedup in enumerate(speedups):
            axes.text(speedup, position, f" {speedup:.2f}", va="center", fontsize=8)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set(title=f"batch {batch_size}", xlabel="times Transformers", xlim=(0, 1.2 * max(speedups)))
    axes.invert_yaxis()
    figure.suptitle(
        f"{results['architecture']}, {results['device']}, {results['num_threads']} threads, {results['dtype']}"
    )
    figure.savefig(path, dpi=150)


__all__ = ["InferenceBenchmarkArguments", "plot_inference", "profile_inference", "run_inference_benchmark"]
