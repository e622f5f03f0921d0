"""
The speed of one model in every form it is deployed in, measured side by side in one process on the same weights.

Absolute figures are those of one machine on one day; what carries over are the ratios, which are taken round by round
against the unpruned model of Transformers.
"""

import ctypes
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import Dinov2Config, Dinov2ForImageClassification

from benchmarks.baselines import BaselineSchedule, baseline_logits, baseline_schedules, count_baseline_gflops
from tnt_hf import attention_tnt
from tnt_hf.attention_tnt import FORMS
from tnt_hf.configuration_tnt import CHOICES, TntViTConfig
from tnt_hf.conversion import load_research_checkpoint, to_plain_model
from tnt_hf.dinov2 import vit_fields, vit_state_dict
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
# Not of timm: DINOv2 with a linear classifier, hidden size and layers of each.
DINOV2 = {"dinov2-small": (384, 12), "dinov2-base": (768, 12), "dinov2-large": (1024, 24)}
HEAD_SIZE = 64
NUM_CLASSES = 1000
ONNX_RUNTIMES = ("ONNX Runtime", "OpenVINO", "ONNX Runtime int8")
DEPLOYED_RUNTIMES = ("AOTInductor", *ONNX_RUNTIMES)
COMPILE_OPTIONS: dict[str, dict[str, Any]] = {
    "compiled": {"fullgraph": True},
    "CUDA graphs": {"fullgraph": True, "mode": "reduce-overhead"},
}
BY_FORM = {f"eager, sizes in {form}": form for form in FORMS}
CUDA_GRAPHS = ("CUDA graphs", "Transformers CUDA graphs")
RUNTIMES = (
    "timm eager",
    "eager",
    "compiled",
    *BY_FORM,
    "Token Merging eager",
    "Transformers compiled",
    *CUDA_GRAPHS,
    *DEPLOYED_RUNTIMES,
)
DEFAULT_RUNTIMES = ("timm eager", "eager", "compiled", "ONNX Runtime", "ONNX Runtime int8")
# By dtype, how far logits may lie from those of the eager model, relative to their norm: in half precision a compiled
# model, which rounds less often, may also merge other tokens.
ALLOWED_DIFFERENCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.1}
ALLOWED_DIFFERENCE_INT8 = 0.3
# What the operations and kernels of each attention are called in a profile.
ATTENTION_KERNELS = {
    "flash": ("flash_attention", "flash_fwd"),
    "memory-efficient": ("efficient_attention", "fmha_cutlass"),
    "cuDNN": ("cudnn_attention", "cudnn_generated", "sm90_flash_fprop", "sdpa_fprop"),
    "math": ("attention_math",),
}
PAUSE = 0.25  # seconds in which the CPU threads of the form before fall asleep
DEVICES = ("cpu", "cuda")
MATRIX_SIZE, CUDA_MATRIX_SIZE = 2048, 8192
ENERGY_SECONDS = 1.0  # of running, many times what the counter of a GPU takes to move on
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # glibc's malloc.h


@dataclass
class InferenceBenchmarkArguments:
    """What to measure."""

    architecture: str = field(
        default="deit_small_distilled_patch16_224",
        metadata={
            "help": f"timm's name of a ViT or distilled DeiT, or {', '.join(DINOV2)}; the weights are random, which "
            "costs the same."
        },
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
        default_factory=lambda: list(DEFAULT_RUNTIMES),
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
    device: str = field(default="cpu", metadata={"help": f"{' or '.join(DEVICES)}."})
    dtype: str = field(default="float32", metadata={"help": f"{', '.join(ALLOWED_DIFFERENCE)}."})
    num_threads: int | None = field(default=None, metadata={"help": "CPU threads; PyTorch's own number by default."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder for inference.json and inference.png."})

    def __post_init__(self):
        for name in ("batch_sizes", "image_sizes"):
            if any(value < 1 for value in getattr(self, name)):
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")
        if unknown := set(self.runtimes) - set(RUNTIMES):
            raise ValueError(f"--runtimes must be among {', '.join(RUNTIMES)}, got {', '.join(sorted(unknown))}.")
        choices = {
            "token_reduction": CHOICES["token_reduction"],
            "device": DEVICES,
            "dtype": tuple(ALLOWED_DIFFERENCE),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"--{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda needs a GPU, and PyTorch finds none.")
        deployed = set(self.runtimes).intersection(DEPLOYED_RUNTIMES)
        if deployed and (self.device, self.dtype) != ("cpu", "float32"):
            raise ValueError(
                f"--runtimes {', '.join(sorted(deployed))} run on the CPU in float32, got --device {self.device} "
                f"--dtype {self.dtype}."
            )
        if "OpenVINO" in deployed and find_spec("openvino") is None:
            raise ValueError('--runtimes OpenVINO needs: pip install "tnt-hf[openvino]".')
        graphs = set(self.runtimes).intersection(CUDA_GRAPHS)
        if graphs and self.device != "cuda":
            raise ValueError(f"--runtimes {', '.join(sorted(graphs))} need --device cuda, got {self.device}.")
        if self.num_rounds < 3:
            raise ValueError(f"--num_rounds must be at least 3, got {self.num_rounds}.")
        if self.architecture not in [*timm.list_models("*vit*"), *timm.list_models("deit*"), *DINOV2]:
            raise ValueError(
                f"--architecture must be timm's name of a ViT or DeiT, or {', '.join(DINOV2)}, got "
                f"{self.architecture!r}."
            )
        of_timm = {"timm eager", "Token Merging eager"}.intersection(self.runtimes)
        if self.architecture in DINOV2 and of_timm:
            raise ValueError(
                f"--runtimes {', '.join(sorted(of_timm))} need --architecture of timm, got {self.architecture}."
            )
        self.schedules = [parse_schedule(text) for text in self.schedules]


@dataclass
class _Models:
    """The same weights three times."""

    ours: TntViTForImageClassification | TntDeiTForImageClassification
    plain: nn.Module  # of Transformers
    of_timm: nn.Module | None


@dataclass
class _Form:
    """One way to run the model, the eager one whose logits it must give, and what was measured of it."""

    runtime: str
    schedule: Schedule
    gflops: Callable[[int], float]
    run: Callable[[torch.Tensor], torch.Tensor]
    expected: Callable[[torch.Tensor], torch.Tensor]
    open_session: Callable[[], Callable[[torch.Tensor], torch.Tensor]] | None = None
    seconds: list[list[float]] = field(default_factory=list)  # of each round
    peak_bytes: int | None = None
    logit_difference: float = 0.0
    joules_per_image: float | None = None
    attention_kernels: list[str] = field(default_factory=list)


def run_inference_benchmark(arguments: InferenceBenchmarkArguments) -> dict[str, Any]:
    """
    Measure every form at every batch size.

    Returns:
        `dict`: Device facts and `rows`, one for each image size, batch size, runtime and schedule:
        `images_per_second`, `latency_ms` of a batch and its 95th percentile `latency_p95_ms`, `peak_memory_mb` above
        what was held before (None of OpenVINO, which packs weights in the first pass), `joules_per_image` (None where
        no driver tells), `gflops` for one image as executed, `share_of_matmul_rate`, `speedup` over the unpruned model
        of Transformers in the same rounds (median, and `speedup_range` over the rounds), `flops_reduction`, the ratio
        of the multiply-accumulates of the two, `speedup_kept`, the former by the latter, `logit_difference` from the
        eager model in the same dtype, relative to the norm, and the `attention_kernels` that ran.

    Raises:
        ValueError: If a form does not give the logits of the eager model with the same schedule and dtype to 1e-3 of
            their norm in float32, 0.1 in half precision, 0.3 in int8.
    """
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    torch.set_num_threads(arguments.num_threads or torch.get_num_threads())
    keep_freed_memory()
    torch._dynamo.config.recompile_limit = 8 * (1 + len(arguments.schedules))
    first_size, *other_sizes = arguments.image_sizes
    models = _make_models(arguments, device, dtype)
    with tempfile.TemporaryDirectory() as folder:
        forms = _make_forms(models, arguments.schedules, arguments.runtimes, Path(folder))
        rows = []
        for batch_size in arguments.batch_sizes:
            rows += _measure(forms, models.ours, first_size, batch_size, arguments.num_rounds)
        eager = _make_forms(models, arguments.schedules, ["eager"], Path(folder), is_resized=True)
        for image_size in other_sizes:
            rows += _measure(eager, models.ours, image_size, min(arguments.batch_sizes), arguments.num_rounds)
    return {
        "architecture": arguments.architecture,
        "token_reduction": arguments.token_reduction,
        **device_facts(device),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "dtype": arguments.dtype,
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


def return_freed_memory() -> None:
    """
    Have glibc give what is freed back to the system, so that resident memory is memory in use. By default it keeps
    blocks of up to 32 MiB, once one was freed, in a heap whose gaps depend on the order of the calls.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 2**20)


def _make_models(arguments: InferenceBenchmarkArguments, device: torch.device, dtype: torch.dtype) -> _Models:
    torch.manual_seed(0)
    image_size, fields = arguments.image_sizes[0], {"token_reduction": arguments.token_reduction}
    of_timm = None
    if arguments.architecture in DINOV2:
        hidden_size, num_layers = DINOV2[arguments.architecture]
        config = Dinov2Config(
            hidden_size=hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=hidden_size // HEAD_SIZE,
            image_size=image_size,
            num_labels=NUM_CLASSES,
        )
        plain = Dinov2ForImageClassification(config)
        fields |= vit_fields(config, image_size) | {"classifier_reads_patches": True}
        model = TntViTForImageClassification(TntViTConfig(**fields))
        model.load_state_dict(vit_state_dict(plain, image_size), strict=False)  # which has no scoring heads
    else:
        of_timm = timm.create_model(arguments.architecture, img_size=image_size)
        model = load_research_checkpoint(of_timm.state_dict(), **fields)
        plain = to_plain_model(model)
    for module in (model, plain, of_timm):
        if module is not None:
            module.eval().requires_grad_(False).to(device, dtype)
    return _Models(model, plain, of_timm)


def _make_forms(
    models: _Models,
    schedules: Sequence[Schedule | FlopsReduction],
    runtimes: Sequence[str],
    folder: Path,
    is_resized: bool = False,
) -> list[_Form]:
    model, config, is_whole = models.ours, models.ours.config, {"interpolate_pos_encoding": is_resized}
    of_plain = {} if isinstance(models.plain, Dinov2ForImageClassification) else is_whole  # that always does so
    whole = partial(count_gflops, config, schedule=UNPRUNED)
    full = _logits_of(model, schedule=UNPRUNED, **is_whole)
    forms = [_Form(REFERENCE, UNPRUNED, whole, _logits_of(models.plain, **of_plain), full)]
    if "timm eager" in runtimes and models.of_timm is not None:
        forms.append(_Form("timm eager", UNPRUNED, whole, models.of_timm, full))
    for runtime, options in COMPILE_OPTIONS.items():
        if f"Transformers {runtime}" in runtimes:
            run = _logits_of(torch.compile(models.plain, **options), **of_plain)
            forms.append(_Form(f"Transformers {runtime}", UNPRUNED, whole, run, full))
    for number, schedule in enumerate(resolve_schedules(config, schedules)):
        gflops = partial(count_gflops, config, schedule=schedule, as_executed=True)
        run = _logits_of(model, schedule=schedule, **is_whole)
        make_form = partial(_Form, schedule=schedule, gflops=gflops, expected=run)
        if "eager" in runtimes:
            forms.append(make_form("eager", run=run))
        for runtime in sorted(set(runtimes).intersection(BY_FORM)):
            forms.append(make_form(runtime, run=_in_form(run, BY_FORM[runtime])))
        for runtime, options in COMPILE_OPTIONS.items():
            if runtime in runtimes:
                compiled = torch.compile(model, **options)
                forms.append(make_form(runtime, run=_logits_of(compiled, schedule=schedule, **is_whole)))
        if "Token Merging eager" in runtimes and schedule.prune_layers:
            (merging,) = baseline_schedules(config, "merging", gflops())
            cost = count_baseline_gflops(config, merging)
            run = _logits_by_token_merging(model, merging)
            forms.append(_Form("Token Merging eager", schedule, lambda _, cost=cost: cost, run, run))
        deployed = set(runtimes).intersection(DEPLOYED_RUNTIMES)
        if deployed:
            model.set_schedule(schedule)
            sessions = _deployed(model, deployed, folder / str(number))
            forms += [
                make_form(runtime, run=open_session(), open_session=open_session) for runtime, open_session in sessions
            ]
    return forms


def _logits_of(model: nn.Module, **options: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda images: model(images, **options).logits


def _in_form(run: Callable[[torch.Tensor], torch.Tensor], form: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same, with the sizes of tokens in one form wherever they enter attention."""

    def run_in_form(images: torch.Tensor) -> torch.Tensor:
        with patch.object(attention_tnt, "choose_form", lambda *_: form):
            return run(images)

    return run_in_form


def _logits_by_token_merging(
    model: TntViTForImageClassification | TntDeiTForImageClassification, schedule: BaselineSchedule
) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda images: baseline_logits(model, images, schedule)[0]


def _deployed(
    model: TntViTForImageClassification | TntDeiTForImageClassification, runtimes: set[str], folder: Path
) -> list[tuple[str, Callable[[], Callable[[torch.Tensor], torch.Tensor]]]]:
    """What opens the model in each of `DEPLOYED_RUNTIMES` that is asked for, from files in a new folder."""
    # need packages that machines with GPUs may lack
    from tnt_hf import export
    from tnt_hf.deployed_forms import COMPILED, FILES, INT8, ONNX_FILE, open_form

    folder.mkdir()
    if runtimes.intersection(ONNX_RUNTIMES):
        export.export_onnx(model, folder / ONNX_FILE)
    if INT8 in runtimes:
        export.quantize_int8(folder / ONNX_FILE, folder / FILES[INT8])
    if COMPILED in runtimes:
        export.export_compiled(model, folder / FILES[COMPILED])
    return [(runtime, partial(open_form, runtime, folder)) for runtime in DEPLOYED_RUNTIMES if runtime in runtimes]


@torch.inference_mode()
def _measure(
    forms: Sequence[_Form],
    model: TntViTForImageClassification | TntDeiTForImageClassification,
    image_size: int,
    batch_size: int,
    num_rounds: int,
) -> list[dict[str, Any]]:
    device, dtype = model.device, model.dtype
    images = torch.randn(batch_size, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    images = images.to(device, dtype)
    for form in forms:
        _check_logits_and_memory(form, images)
        form.seconds = []
    multiply_add_rates = []
    matrix_size, pause = (MATRIX_SIZE, PAUSE) if device.type == "cpu" else (CUDA_MATRIX_SIZE, 0)
    matrix = torch.randn(matrix_size, matrix_size).to(device, dtype)
    repeats = max(1, 8 // batch_size)
    for start in range(num_rounds):
        for form in (*forms[start % len(forms) :], *forms[: start % len(forms)]):
            time.sleep(pause)
            form.run(images)
            form.seconds.append([timed(partial(form.run, images), device)[1] for _ in range(repeats)])
        time.sleep(pause)
        seconds = statistics.median(timed(lambda: matrix @ matrix, device)[1] for _ in range(3))
        multiply_add_rates.append(matrix_size**3 / seconds / 1e9)
    if (counter := _energy_counter(device)) is not None:
        for form in forms:
            form.joules_per_image = _joules_per_image(form.run, images, counter)
    rate = statistics.median(multiply_add_rates)
    return [_row(form, forms[0], image_size, batch_size, rate) for form in forms]


def _check_logits_and_memory(form: _Form, images: torch.Tensor) -> None:
    expected = form.expected(images)
    if form.runtime in (*CUDA_GRAPHS, "compiled", "Transformers compiled") or images.device.type == "cuda":
        for _ in range(3):  # compilation, capture and workspaces are no part of its memory
            form.run(images)
    run = form.run if form.open_session is None else form.open_session()
    logits, peak_bytes = peak_memory(partial(run, images), images.device)
    form.peak_bytes = None if form.runtime == "OpenVINO" else peak_bytes
    form.logit_difference = difference = ((logits - expected).float().norm() / expected.float().norm()).item()
    is_int8 = form.runtime.endswith("int8")
    allowed = ALLOWED_DIFFERENCE_INT8 if is_int8 else ALLOWED_DIFFERENCE[str(images.dtype).removeprefix("torch.")]
    if not difference <= allowed:
        raise ValueError(
            f"{form.runtime} with schedule {form.schedule.name} gives other logits than the eager model: they differ "
            f"by {difference:.2e} of their norm, allowed is {allowed:g}."
        )
    form.attention_kernels = _attention_kernels(partial(form.run, images), images.device)


def _energy_counter(device: torch.device) -> Callable[[], float] | None:
    """What reads the joules that a GPU has used since its driver was loaded."""
    if device.type != "cuda" or find_spec("pynvml") is None:
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000


def _joules_per_image(
    run: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, counter: Callable[[], float]
) -> float:
    num_runs, start, before = 0, time.perf_counter(), counter()
    while time.perf_counter() - start < ENERGY_SECONDS:
        timed(partial(run, images), images.device)
        num_runs += 1
    return (counter() - before) / (num_runs * len(images))


def _attention_kernels(function: Callable[[], Any], device: torch.device) -> list[str]:
    """The kinds of attention, keys of `ATTENTION_KERNELS`, that the profile of a call names."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        timed(function, device)
    names = [event.key for event in profiler.key_averages()]
    return [kind for kind, parts in ATTENTION_KERNELS.items() if any(part in name for part in parts for name in names)]


def _row(form: _Form, reference: _Form, image_size: int, batch_size: int, rate: float) -> dict[str, Any]:
    ours, theirs = ([statistics.median(seconds) for seconds in each.seconds] for each in (form, reference))
    runs, seconds = sorted(chain.from_iterable(form.seconds)), statistics.median(ours)
    speedups = [each / our for each, our in zip(theirs, ours)]
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
        "latency_p95_ms": 1000 * runs[math.ceil(0.95 * len(runs)) - 1],
        "joules_per_image": form.joules_per_image,
        "peak_memory_mb": None if form.peak_bytes is None else form.peak_bytes / 2**20,
        "share_of_matmul_rate": gflops * batch_size / seconds / rate,
        "matmul_gflops_per_second": rate,
        "logit_difference": form.logit_difference,
        "attention_kernels": form.attention_kernels,
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
    from tnt_hf.evaluation import measure_cost  # needs packages that machines with GPUs may lack

    torch.set_num_threads(arguments.num_threads or torch.get_num_threads())
    keep_freed_memory()
    device = torch.device("cpu")
    models = _make_models(arguments, device, torch.float32)
    model, config = models.ours, models.ours.config
    forms = _make_forms(models, arguments.schedules, ["eager"], Path())
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
