"""Results files: what a measurement must state, how it is written, checked and printed."""

import hashlib
import json
import math
import os
import platform
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


RESULTS_NAME = "results.json"
SELECTION_NAMES = {"none": "-", "relevance": "learned", "random": "random"}
ROW_FIELDS = (
    "schedule",
    "selection",
    "prune_layers",
    "keep_rates",
    "num_similar_tokens",
    "top1",
    "top5",
    "gflops",
    "images_per_second",
    "num_images",
)
TRAINING_FIELDS = ("base_model", "dataset", "num_images", "trained", "num_trained_parameters")
FIGURES = ("top1", "top5", "gflops", "images_per_second", "num_images")
RUN_FIELDS = ("dataset", "device", "num_threads", "dtype", "batch_size", "versions", "rows")
REPORTED_PACKAGES = (
    "torch",
    "torchvision",
    "transformers",
    "datasets",
    "accelerate",
    "timm",
    "onnxruntime",
    "tnt-hf",
)


def device_facts(device: torch.device) -> dict[str, Any]:
    """Name of the device, number of CPU threads that PyTorch uses, and versions: what a measurement must state."""
    return {
        "device": _device_name(device),
        "num_threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | _package_versions(),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    cpu_info = Path("/proc/cpuinfo")
    text = cpu_info.read_text() if cpu_info.exists() else ""
    names = re.findall(r"^model name\s*:\s*(.+?)\s*$", text, re.MULTILINE)
    name = [*names, platform.processor(), platform.machine()][0]
    # int8 products are several times faster with the VNNI instructions
    has_vnni = re.search(r"\bavx(512)?_vnni\b", text) is not None
    return f"CPU ({name}, {torch.backends.cpu.get_cpu_capability()}{', VNNI' if has_vnni else ''})"


def _package_versions() -> dict[str, str]:
    versions = {}
    for package in REPORTED_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def check_no_results(output_dir: str | None, overwrite: bool, name: str = RESULTS_NAME) -> None:
    """
    Check that a results file called `name` can be written and would not replace that of another run.

    Raises:
        ValueError: If the folder cannot be made or written to, or holds a results file that may not be replaced.
    """
    if output_dir is None:
        return
    existing = next(path for path in (Path(output_dir), *Path(output_dir).absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"--output_dir {output_dir} cannot be written to: {existing} is no folder, or read-only.")
    path = Path(output_dir) / name
    if not overwrite and path.exists():
        raise ValueError(f"{path} already exists: pass --overwrite_output_dir to replace it or another --output_dir.")


def write_json(path: Path, content: dict[str, Any]) -> Path:
    """Write a JSON file, replacing a previous one only when the new one is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".json.partial")
    unfinished.write_text(json.dumps(content, indent=2) + "\n")
    return unfinished.replace(path)


def write_results(output_dir: str | Path, results: dict[str, Any]) -> Path:
    """Write `results` as `results.json`."""
    return write_json(Path(output_dir) / RESULTS_NAME, results)


def recorded_training(folder: str | Path) -> dict[str, Any]:
    """The `training` section of the results file in a run folder, to be carried over to another; empty without."""
    path = Path(folder) / RESULTS_NAME
    training = json.loads(path.read_text()).get("training") if path.is_file() else None
    return {} if training is None else {"training": training}


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_digests(folder: str | Path) -> dict[str, str]:
    """SHA-256 of each weights file of a checkpoint by its name: which weights a results file was measured on."""
    return {path.name: file_digest(path) for path in sorted(Path(folder).glob("model*.safetensors"))}


def check_results(results: Any) -> None:
    """
    Check that a results file holds what a card states.

    Raises:
        ValueError: If a field is missing, a figure is no finite number, or a selection unknown.
    """
    if not isinstance(results, dict):
        raise ValueError(f"The results must be a mapping, got {type(results).__name__}.")
    missing = _missing(results, RUN_FIELDS)
    rows = results.get("rows")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        missing.append("rows with one schedule each")
    else:
        missing += sorted({f"rows: {name}" for row in rows for name in _missing(row, ROW_FIELDS)})
    if results.get("training"):
        missing += [f"training: {name}" for name in _missing(results["training"], TRAINING_FIELDS)]
    if missing:
        raise ValueError(f"The results lack {', '.join(missing)}: evaluate the model again.")
    for row in rows:
        wrong = [name for name in FIGURES if type(row[name]) not in (int, float) or not math.isfinite(row[name])]
        if row["selection"] not in SELECTION_NAMES:
            wrong.append("selection")
        if wrong:
            raise ValueError(
                f"Figures of the results must be finite numbers, and selections one of {', '.join(SELECTION_NAMES)}: "
                f"schedule {row['schedule']} has {', '.join(f'{name} {row[name]!r}' for name in wrong)}."
            )


def _missing(facts: dict[str, Any], names: Sequence[str]) -> list[str]:
    return [name for name in names if facts.get(name) is None]


def format_rows(rows: Sequence[dict[str, Any]], columns: dict[str, str]) -> str:
    """The columns of rows as a table for the console, each in its format such as `"{:.2f}"`."""
    lines = [list(columns), *([text.format(row[name]) for name, text in columns.items()] for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    return "\n".join(" ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines)


def format_facts(results: dict[str, Any], num_images: int) -> str:
    """On what the rows of a results file were measured, in one line."""
    versions = results["versions"]
    return (
        f"{num_images} images of {results['dataset']}; {results['device']}, {results['num_threads']} threads, "
        f"{results['dtype']}, batch {results['batch_size']}; torch {versions['torch']}, transformers "
        f"{versions['transformers']}"
    )


def format_table(results: dict[str, Any]) -> str:
    """The rows of a results file as a table for the console."""
    columns = {
        "schedule": "{}",
        "selection": "{}",
        "top1": "{:.2f}",
        "top5": "{:.2f}",
        "loss": "{:.4f}",
        "gflops": "{:.4f}",
        "images_per_second": "{:.1f}",
    }
    rows = results["rows"]
    facts = format_facts(results, rows[0]["num_images"])
    if results.get("num_candidate_classes"):
        facts += f"; answers among {results['num_candidate_classes']} of the model's classes"
    return f"{format_rows(rows, columns)}\n{facts}"


__all__ = [
    "RESULTS_NAME",
    "SELECTION_NAMES",
    "check_no_results",
    "check_results",
    "device_facts",
    "file_digest",
    "format_facts",
    "format_rows",
    "format_table",
    "recorded_training",
    "weights_digests",
    "write_json",
    "write_results",
]
