"""A model with its schedule as a file, of ONNX, with int8 weights, or compiled, verified against PyTorch."""

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from os import PathLike
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import nn

from .evaluation import TopKAccuracy, top_classes
from .inference import evaluation_mode
from .modeling_tnt import TntDeiTForImageClassification, TntViTForImageClassification
from .named_schedules import SCHEDULE_FORMS, parse_schedule
from .schedules_tnt import height_and_width


INPUT_NAME, OUTPUT_NAME = "pixel_values", "logits"
OPSET = 20  # the first with Gelu
DYNAMIC_BATCH = ({0: torch.export.Dim("batch")},)
MAX_BYTES = 3 * 2**29  # beyond it torch.onnx writes the weights to a file of their own


@dataclass
class ExportArguments:
    """What to export, and where to."""

    model_name_or_path: str = field(
        metadata={
            "help": "Folder or Hub id of a model; a plain checkpoint has no scoring heads, so it merges clusters."
        }
    )
    output_dir: str = field(metadata={"help": "New folder for the exported model."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a model on the Hub."})
    schedule: str | None = field(
        default=None,
        metadata={"help": f"Schedule of the exported model: {SCHEDULE_FORMS}. By default that of the model."},
    )
    int8: bool = field(
        default=False, metadata={"help": "Also write a copy with int8 linear layers, and measure its accuracy."}
    )
    batch_size: int = field(default=32, metadata={"help": "Images in a batch when the int8 copy is measured."})
    tolerance: float = field(
        default=1e-4, metadata={"help": "Largest difference from a logit of PyTorch at which the file is kept."}
    )
    fastest_at: list[int] = field(
        default_factory=list,
        metadata={
            "help": "Images in a batch, such as 1 8: also compile the model, time every form that this machine can "
            "run on such batches, and say which is the fastest that gives PyTorch's logits. Takes minutes."
        },
    )

    def __post_init__(self):
        if any(value < 1 for value in (self.batch_size, *self.fastest_at)):
            raise ValueError(
                f"--batch_size and --fastest_at must be at least 1, got {self.batch_size} and {self.fastest_at}."
            )
        self.fastest_at = list(dict.fromkeys(self.fastest_at))
        if Path(self.output_dir).exists():
            raise ValueError(f"--output_dir {self.output_dir} already exists: pass a new folder.")
        self.schedule = None if self.schedule is None else parse_schedule(self.schedule)


class _Logits(nn.Module):
    """A classifier whose only output is the logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values).logits


def check_exportable(model: TntViTForImageClassification | TntDeiTForImageClassification) -> None:
    """
    Check that a model can be exported.

    Raises:
        ValueError: If its logits depend on random draws, which ONNX files do not make, it is not in float32, or it is
            too large for one file.
    """
    required = {"selection": "relevance"}
    if model.config.num_similar_tokens > 0:
        required["similarity_partition"] = "strided"
    for name, allowed in required.items():
        if model.config.prune_layers and getattr(model.config, name) != allowed:
            raise ValueError(
                f"`{name}` must be {allowed!r} in a model that is exported, got {getattr(model.config, name)!r}: "
                "an ONNX file gives the same logits every time."
            )
    if model.dtype != torch.float32:
        raise ValueError(f"The model must be in float32 to be exported, got {model.dtype}.")
    num_bytes = 4 * model.num_parameters()
    if num_bytes > MAX_BYTES:
        raise ValueError(
            f"The model must have at most {MAX_BYTES // 4:,} parameters to fit one ONNX file, got {num_bytes // 4:,}."
        )


def export_onnx(
    model: TntViTForImageClassification | TntDeiTForImageClassification,
    path: str | PathLike,
    *,
    batch_sizes: Sequence[int] = (1, 2, 5),
    tolerance: float = 1e-4,
) -> float:
    """
    Write a model with the schedule of its config as an ONNX file with a dynamic batch.

    The file takes `pixel_values` of shape `(batch_size, num_channels, height, width)` at `config.image_size` and gives
    `logits` of shape `(batch_size, num_labels)`. It is kept only if ONNX Runtime gives PyTorch's logits on random
    images.

    Args:
        model: The classifier, in float32.
        path (`str` or `PathLike`): The file to write.
        batch_sizes (`Sequence[int]`): Batches to verify.
        tolerance (`float`): Largest difference allowed, absolute and relative to the largest logit above 1.

    Returns:
        `float`: The largest absolute difference of a logit.

    Raises:
        ValueError: If the model cannot be exported (see [`check_exportable`]), the folder does not exist, or the file
            does not give the model's logits.
    """

    def write(unverified: Path) -> Callable[[torch.Tensor], torch.Tensor]:
        attn_implementation = model.config._attn_implementation
        try:
            model.set_attn_implementation("eager")  # ONNX Runtime is faster on plain products than on exported SDPA
            program = torch.onnx.export(
                _Logits(model).eval(),
                (random_images(model, 2),),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=DYNAMIC_BATCH,
                input_names=[INPUT_NAME],
                output_names=[OUTPUT_NAME],
                verbose=False,
            )
        finally:
            model.set_attn_implementation(attn_implementation)
        program.save(unverified)
        return partial(run_session, open_session(unverified))

    return _write_verified(model, Path(path), "ONNX Runtime", write, batch_sizes, tolerance)


def export_compiled(
    model: TntViTForImageClassification | TntDeiTForImageClassification,
    path: str | PathLike,
    *,
    batch_sizes: Sequence[int] = (1, 2, 5),
    tolerance: float = 1e-4,
) -> float:
    """
    Write a model with the schedule of its config as a package of machine code, with packed weights and a dynamic
    batch, which `torch._inductor.aoti_load_package` loads on machines like this one. It takes a C++ compiler and
    minutes; arguments, what is returned and errors as in [`export_onnx`].
    """

    def write(unverified: Path) -> Callable[[torch.Tensor], torch.Tensor]:
        example = (random_images(model, 2),)
        program = torch.export.export(_Logits(model).eval(), example, dynamic_shapes=DYNAMIC_BATCH)
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(unverified), inductor_configs={"freezing": True}
        )
        return open_compiled(unverified)

    return _write_verified(model, Path(path), "AOTInductor", write, batch_sizes, tolerance)


@torch.inference_mode()
def _write_verified(
    model: nn.Module,
    path: Path,
    runtime: str,
    write: Callable[[Path], Callable[[torch.Tensor], torch.Tensor]],
    batch_sizes: Sequence[int],
    tolerance: float,
) -> float:
    """Keep the file that `write` writes, and opens, only if it gives the logits of the model."""
    check_exportable(model)
    if not path.parent.is_dir():
        raise ValueError(f"There is no folder {path.parent} to write {path.name} to.")
    largest = 0.0
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, evaluation_mode(model):
        unverified = Path(folder) / path.name
        run = write(unverified)
        for batch_size in batch_sizes:
            images = random_images(model, batch_size)
            expected = model(images).logits.cpu()
            difference = (run(images) - expected).abs().max().item()
            if not difference <= allowed_difference(expected, tolerance):
                raise ValueError(
                    f"{runtime}'s logits differ from PyTorch's by {difference:.2e} at batch {batch_size}; allowed "
                    f"is {tolerance:g}. {path} was not written."
                )
            largest = max(largest, difference)
        unverified.replace(path)
    return largest


def random_images(model: nn.Module, batch_size: int) -> torch.Tensor:
    """The same noise every time, in the shape, dtype and on the device that a model takes images in."""
    shape = (batch_size, model.config.num_channels, *height_and_width(model.config.image_size))
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(model.device, model.dtype)


def allowed_difference(logits: torch.Tensor, tolerance: float) -> float:
    """By how much a logit may differ from those of PyTorch: absolute, and relative to the largest above 1."""
    return tolerance * max(1.0, logits.abs().max().item())


def quantize_int8(path: str | PathLike, int8_path: str | PathLike) -> None:
    """
    Write a copy of an ONNX file whose linear layers have int8 weights for each output channel and quantise their
    inputs at run time.

    Weights use 7 of the 8 bits, since CPUs without VNNI would overflow. The scoring heads, which cost nothing, stay in
    float32, and so do attention products, patch embedding and classifiers.
    """
    graph = onnx.load(path, load_external_data=False).graph
    single_outputs = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2 and tensor.dims[1] == 1}
    quantize_dynamic(
        path,
        int8_path,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["MatMul"],
        nodes_to_exclude=[node.name for node in graph.node if single_outputs & set(node.input)],
        per_channel=True,
        reduce_range=True,
    )


def open_session(path: str | PathLike, num_threads: int | None = None) -> onnxruntime.InferenceSession:
    """An ONNX file ready to run on the CPU, with as many threads as PyTorch uses if `num_threads` is None."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads() if num_threads is None else num_threads
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def open_compiled(path: str | PathLike) -> Callable[[torch.Tensor], torch.Tensor]:
    """A package of [`export_compiled`]: images to logits, with as many threads as PyTorch uses."""
    return torch._inductor.aoti_load_package(str(path))


def open_openvino(path: str | PathLike, num_threads: int | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
    """
    An ONNX file in OpenVINO: images to logits on the CPU in float32, with as many threads as PyTorch uses if
    `num_threads` is None. It is compiled for each batch size at its first batch, and is faster so.
    """
    import openvino

    core = openvino.Core()
    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads() if num_threads is None else num_threads,
        "INFERENCE_PRECISION_HINT": "f32",  # bfloat16 by default where the CPU has it
        "PERFORMANCE_HINT": "LATENCY",
    }

    @cache
    def request(*shape: int) -> Any:
        model = core.read_model(path)
        model.reshape({INPUT_NAME: shape})
        return core.compile_model(model, "CPU", options).create_infer_request()

    def run(pixel_values: torch.Tensor) -> torch.Tensor:
        outputs = request(*pixel_values.shape).infer({INPUT_NAME: pixel_values.cpu().numpy()})
        return torch.from_numpy(outputs[OUTPUT_NAME].copy())

    return run


def run_session(session: onnxruntime.InferenceSession, pixel_values: torch.Tensor) -> torch.Tensor:
    """Logits of shape `(batch_size, num_labels)` for `pixel_values`."""
    (logits,) = session.run([OUTPUT_NAME], {INPUT_NAME: pixel_values.cpu().numpy()})
    return torch.from_numpy(logits)


def compare_sessions(
    session: onnxruntime.InferenceSession,
    int8_session: onnxruntime.InferenceSession,
    batches: Iterable[dict[str, torch.Tensor]],
) -> dict[str, Any]:
    """
    What quantisation changes, in percent of the images: `top1` and `top1_int8`, and the `agreement` of their classes.

    Args:
        session, int8_session (`InferenceSession`): The same model before and after.
        batches: Batches with `pixel_values` and integer `labels`.
    """
    metrics = {name: TopKAccuracy() for name in ("top1", "top1_int8", "agreement")}
    num_images = 0
    for batch in batches:
        classes, int8_classes = (
            top_classes(run_session(each, batch["pixel_values"])) for each in (session, int8_session)
        )
        for name, predictions, references in (
            ("top1", classes, batch["labels"]),
            ("top1_int8", int8_classes, batch["labels"]),
            ("agreement", int8_classes, classes[:, 0]),
        ):
            metrics[name].add_batch(predictions=predictions.tolist(), references=references.tolist())
        num_images += len(classes)
    return {name: metric.compute()["top1"] for name, metric in metrics.items()} | {"num_images": num_images}


__all__ = [
    "ExportArguments",
    "allowed_difference",
    "check_exportable",
    "compare_sessions",
    "export_compiled",
    "export_onnx",
    "open_compiled",
    "open_openvino",
    "open_session",
    "quantize_int8",
    "random_images",
    "run_session",
]
