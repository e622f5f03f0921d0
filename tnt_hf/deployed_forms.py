"""The forms in which a model runs on a CPU: opened, checked against PyTorch, and timed in turns."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from .evaluation.latency import IMAGES_IN_A_ROUND
from .export import allowed_difference, open_compiled, open_openvino, open_session, random_images, run_session
from .inference import evaluation_mode
from .results import markdown_table
from .timing import timed_in_turns


EAGER, COMPILED, ONNX_RUNTIME, OPENVINO, INT8 = "eager", "AOTInductor", "ONNX Runtime", "OpenVINO", "ONNX Runtime int8"
ONNX_FILE, INT8_FILE, COMPILED_FILE = "model.onnx", "model_int8.onnx", "model.pt2"
FILES = {COMPILED: COMPILED_FILE, ONNX_RUNTIME: ONNX_FILE, OPENVINO: ONNX_FILE, INT8: INT8_FILE}
NUM_ROUNDS = 7
PAUSE = 0.25


@dataclass(frozen=True, kw_only=True)
class FormRow:
    """
    What a batch takes in one form.

    Args:
        form (`str`): Its name.
        file (`str` or `None`): What it runs; None for the eager model.
        batch_size (`int`): Images in the batch.
        latency_ms (`float`): Milliseconds of a batch, median over the rounds.
        speedup (`float`): Over the eager model with the same schedule in the same round, median over the rounds.
        speedup_range (`tuple[float, float]`): The lowest and the highest of them.
        largest_difference (`float`): Of a logit from the eager model's, absolute.
        is_exact (`bool`): Whether that is within the tolerance, of a form in float32.
    """

    form: str
    file: str | None
    batch_size: int
    latency_ms: float
    speedup: float
    speedup_range: tuple[float, float]
    largest_difference: float
    is_exact: bool


def missing_forms() -> dict[str, str]:
    """The forms that this machine cannot run, and why."""
    missing, compiler = {}, torch._inductor.config.cpp.cxx[-1]
    if shutil.which(compiler) is None:
        missing[COMPILED] = f"it needs a C++ compiler, {compiler}"
    if find_spec("openvino") is None:
        missing[OPENVINO] = 'it needs pip install "tnt-hf[openvino]"'
    return missing


def open_form(form: str, folder: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """What makes logits of images, from the file of a form in a folder."""
    path = folder / FILES[form]
    if form == COMPILED:
        return open_compiled(path)
    if form == OPENVINO:
        return open_openvino(path)
    return partial(run_session, open_session(path))


def open_forms(model: nn.Module, folder: Path) -> dict[str, tuple[str | None, Callable[[torch.Tensor], torch.Tensor]]]:
    """By form, `eager` first: its file in a folder, and what makes logits of images; without those missing here."""
    forms: dict[str, tuple[str | None, Callable]] = {EAGER: (None, lambda images: model(images).logits)}
    for form, file in FILES.items():
        if (folder / file).exists() and form not in missing_forms():
            forms[form] = file, open_form(form, folder)
    return forms


@torch.inference_mode()
def measure_forms(
    model: nn.Module, folder: str | Path, batch_sizes: Sequence[int], tolerance: float = 1e-4
) -> list[FormRow]:
    """
    Time every form of a model in a folder that `tnt-hf export` wrote, in turns, on the CPU.

    Args:
        model: The classifier of which the files are, on the CPU in float32.
        folder (`str` or `Path`): The folder.
        batch_sizes (`Sequence[int]`): Images in a batch.
        tolerance (`float`): As in [`~tnt_hf.export.export_onnx`].

    Returns:
        `list[FormRow]`: One for each batch size and form.
    """
    rows = []
    forms = open_forms(model, Path(folder))
    with evaluation_mode(model):
        for batch_size in batch_sizes:
            images = random_images(model, batch_size)
            expected = model(images).logits
            differences = [(run(images) - expected).abs().max().item() for _, run in forms.values()]
            calls = [partial(run, images) for _, run in forms.values()]
            repeats = max(1, IMAGES_IN_A_ROUND // batch_size)
            seconds = timed_in_turns(calls, model.device, NUM_ROUNDS, repeats, PAUSE)
            for (form, (file, _)), difference, each in zip(forms.items(), differences, seconds):
                speedups = [eager / own for eager, own in zip(seconds[0], each)]
                is_exact = form != INT8 and difference <= allowed_difference(expected, tolerance)
                rows.append(
                    FormRow(
                        form=form,
                        file=file,
                        batch_size=batch_size,
                        latency_ms=1000 * median(each),
                        speedup=median(speedups),
                        speedup_range=(min(speedups), max(speedups)),
                        largest_difference=difference,
                        is_exact=is_exact,
                    )
                )
    return rows


def fastest(rows: Sequence[FormRow], batch_size: int) -> FormRow:
    """The fastest form at a batch size of those that give PyTorch's logits."""
    return max((row for row in rows if row.batch_size == batch_size and row.is_exact), key=lambda row: row.speedup)


def format_forms(rows: Sequence[FormRow], facts: dict[str, Any]) -> str:
    """
    A table in Markdown, and for each batch size the fastest form, and those that the spread of the rounds does not
    tell from it.

    Args:
        rows (`Sequence[FormRow]`): What was measured.
        facts (`dict`): What export.json holds besides: the device, the missing forms and what int8 changes.
    """
    header = ["form", "file", "batch", "ms", "images/s", "times eager", "largest difference of a logit"]
    lines = [
        [
            row.form,
            row.file or "-",
            str(row.batch_size),
            f"{row.latency_ms:.1f}",
            f"{1000 * row.batch_size / row.latency_ms:.1f}",
            f"{row.speedup:.2f}",
            f"{row.largest_difference:.1e}",
        ]
        for row in rows
    ]
    text = [markdown_table(header, lines)]
    for batch_size in dict.fromkeys(row.batch_size for row in rows):
        best = fastest(rows, batch_size)
        level = [
            row.form
            for row in rows
            if row.batch_size == batch_size and row.is_exact and row.speedup_range[1] >= best.speedup_range[0]
        ]
        level.remove(best.form)
        text.append(
            f"At batch {batch_size} on {facts['device']} with {facts['num_threads']} threads the fastest form that "
            f"gives PyTorch's logits is {best.form}{f' on {best.file}' if best.file else ''}, {best.speedup:.2f} "
            "times as fast as the eager model on this schedule."
            + (f" Within the spread of the rounds {', '.join(level)} may be as fast." if level else "")
        )
    if "int8" in facts:
        changed = facts["int8"]
        text.append(
            f"{INT8} answers differently: it gives the class of {ONNX_FILE} on {changed['agreement']:.2f} % of "
            f"{changed['num_images']} images, and its top-1 there is {changed['top1_int8']:.2f} in place of "
            f"{changed['top1']:.2f}."
        )
    text += [f"{form} was left out: {why}." for form, why in facts["missing_forms"].items()]
    return "\n".join(text)


__all__ = ["FormRow", "fastest", "format_forms", "measure_forms", "missing_forms", "open_form", "open_forms"]
