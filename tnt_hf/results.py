"""Results files: what a measurement must state, how it is written, checked and printed."""

import hashlib
import json
import math
import os
import platform
import re
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

import torch

from .schedules_tnt import Schedule


RESULTS_NAME = "results.json"
TRAINING_NAME = "training.json"  # the section of results.json, until there is one
SELECTION_NAMES = {"none": "-", "relevance": "learned", "similarity": "similarity", "random": "random"}
FIGURES = ("top1", "top5", "gflops", "images_per_second", "num_images")
TRAINING_FIELDS = ("base_model", "dataset", "num_images", "trained", "num_trained_parameters")
REPORTED_PACKAGES = (
    "torch",
    "torchvision",
    "transformers",
    "datasets",
    "accelerate",
    "timm",
    "onnxruntime",
    "openvino",
    "tnt-hf",
)


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """
    What one schedule achieves with one selection.

    Args:
        schedule (`str`): Its name.
        selection (`str`): `"none"` of the unpruned model, `"relevance"`, `"similarity"` where no score has a say, or
            `"random"` of the control.
        prune_layers, keep_rates, num_similar_tokens, compute_size: The schedule itself, as in the config of a model.
        top1, top5 (`float`): Percent of the images.
        loss (`float`): Mean cross-entropy; infinite if answers are restricted to classes that leave out a label.
        gflops (`float`): For one image, see [`~tnt_hf.schedules_tnt.count_gflops`].
        images_per_second (`float`): Of the forward pass alone, all processes together.
        num_images (`int`): Images evaluated.
        others (`dict`): What a file of another version holds besides.

    Raises:
        ValueError: If a figure other than the loss is no finite number, or the selection unknown.
    """

    schedule: str
    selection: str
    prune_layers: list[int]
    keep_rates: list[float]
    num_similar_tokens: int
    top1: float
    top5: float
    loss: float
    gflops: float
    images_per_second: float
    num_images: int
    compute_size: int | list[int] | None = None
    others: dict[str, Any] = field(default_factory=dict)

    @property
    def is_reduced(self) -> bool:
        """Whether tokens leave as the model means them to, not by chance."""
        return self.selection in ("relevance", "similarity")

    def __post_init__(self):
        values = {name: getattr(self, name) for name in FIGURES}
        wrong = [name for name, value in values.items() if type(value) not in (int, float) or not math.isfinite(value)]
        if self.selection not in SELECTION_NAMES:
            wrong.append("selection")
        if wrong:
            raise ValueError(
                f"Figures of the results must be finite numbers, and selections one of {', '.join(SELECTION_NAMES)}: "
                f"schedule {self.schedule} has {', '.join(f'{name} {getattr(self, name)!r}' for name in wrong)}."
            )

    def to_schedule(self) -> Schedule:
        """The schedule under its name."""
        names = ("prune_layers", "keep_rates", "num_similar_tokens", "compute_size")
        return Schedule(self.schedule, *(getattr(self, name) for name in names))


@dataclass(frozen=True, kw_only=True)
class Results:
    """
    Content of a results file. What is None is not known, or was not done.

    Args:
        model (`str`): Folder or Hub id.
        dataset (`str`): What the images are called; `dataset_hub_id`, `dataset_license`, `dataset_split` say more.
        device (`str`), num_threads (`int`), versions (`dict[str, str]`): See [`device_facts`].
        dtype (`str`): Of weights and activations, or of autocast.
        attention (`str`): Attention implementation of Transformers.
        batch_size (`int`): Images in a batch, for each process.
        num_candidate_classes (`int`): Classes that an answer could be; None if all of the model's.
        num_processes (`int`): Processes that shared the images.
        seed (`int`): Of the random control.
        weights_sha256 (`dict[str, str]`): See [`weights_digests`].
        training (`dict`): How the weights were made, see [`~tnt_hf.training.describe_training`].
        rows (`list[ResultRow]`): One for each schedule and selection.
        others (`dict`): What a file of another version holds besides.
    """

    model: str | None = None
    dataset: str
    device: str
    num_threads: int
    versions: dict[str, str]
    dtype: str
    attention: str | None = None
    batch_size: int
    num_candidate_classes: int | None = None
    num_processes: int | None = None
    seed: int | None = None
    dataset_hub_id: str | None = None
    dataset_license: str | None = None
    dataset_split: str | None = None
    weights_sha256: dict[str, str] | None = None
    training: dict[str, Any] | None = None
    rows: list[ResultRow]
    others: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, content: Any) -> Self:
        """
        The results in the content of a results file.

        Raises:
            ValueError: If a field is missing, a figure is no finite number, or a selection unknown.
        """
        if not isinstance(content, dict):
            raise ValueError(f"The results must be a mapping, got {type(content).__name__}.")
        rows = content.get("rows")
        missing = [name for name in _missing(cls, content) if name != "rows"]
        if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
            missing.append("rows with one schedule each")
        else:
            missing += sorted({f"rows: {name}" for row in rows for name in _missing(ResultRow, row)})
        if training := content.get("training"):
            missing += [f"training: {name}" for name in TRAINING_FIELDS if training.get(name) is None]
        if missing:
            raise ValueError(f"The results lack {', '.join(missing)}: evaluate the model again.")
        return _from_mapping(cls, {**content, "rows": [_from_mapping(ResultRow, row) for row in rows]})

    def to_json(self) -> dict[str, Any]:
        """The content of a results file."""
        content = asdict(self)
        rows = [row.pop("others") | row for row in content.pop("rows")]
        for row in rows:
            if row["compute_size"] is None:
                del row["compute_size"]
        if self.training is None:
            del content["training"]
        return content.pop("others") | content | {"rows": rows}


@dataclass(frozen=True, kw_only=True)
class PublishedResults(Results):
    """
    Results beside a published model.

    Args:
        checkpoint (`dict`): What the model is, see [`~tnt_hf.publishing.stage_run`].
        weights_license (`str`): Its licence, as the Hub writes it.
    """

    checkpoint: dict[str, Any]
    weights_license: str | None = None


def _missing(kind: type, content: dict[str, Any]) -> list[str]:
    needed = [each.name for each in fields(kind) if each.default is MISSING and each.default_factory is MISSING]
    return [name for name in needed if content.get(name) is None]


def _from_mapping(kind: type, content: dict[str, Any]) -> Any:
    names = {each.name for each in fields(kind)} - {"others"}
    known = {name: value for name, value in content.items() if name in names}
    return kind(**known, others={name: value for name, value in content.items() if name not in names})


def read_results(path: str | Path) -> Results:
    """
    Read a results file.

    Raises:
        ValueError: If it cannot be read, or [`Results.from_json`] refuses it.
    """
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"Results {path} cannot be read: {error}") from error
    return Results.from_json(content)


def write_results(output_dir: str | Path, results: Results) -> Path:
    """Write `results` as `results.json`."""
    return write_json(Path(output_dir) / RESULTS_NAME, results.to_json())


def recorded_training(folder: str | Path) -> dict[str, Any] | None:
    """How the weights of a run folder were made, to be carried over to a results file; None where nothing says it."""
    results, training = Path(folder) / RESULTS_NAME, Path(folder) / TRAINING_NAME
    if results.is_file():
        return json.loads(results.read_text()).get("training")
    return json.loads(training.read_text()) if training.is_file() else None


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
    # generations that share a name differ twofold in speed
    numbers = re.findall(r"^(?:cpu family|model)\s*:\s*(\d+)$", text, re.MULTILINE)[:2]
    generation = f", family {numbers[0]} model {numbers[1]}" if len(numbers) == 2 else ""
    # int8 products are several times faster with the VNNI instructions
    has_vnni = re.search(r"\bavx(512)?_vnni\b", text) is not None
    return f"CPU ({name}{generation}, {torch.backends.cpu.get_cpu_capability()}{', VNNI' if has_vnni else ''})"


def _package_versions() -> dict[str, str]:
    versions = {}
    for package in REPORTED_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def check_no_results(output_dir: str | Path | None, overwrite: bool, name: str = RESULTS_NAME) -> None:
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


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_digests(folder: str | Path) -> dict[str, str]:
    """SHA-256 of each weights file of a checkpoint by its name: which weights a results file was measured on."""
    return {path.name: file_digest(path) for path in sorted(Path(folder).glob("model*.safetensors"))}


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, of cells that are text already."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def format_table(results: Results) -> str:
    """The rows of a results file as a table for the console, and on what they were measured."""
    columns = {
        "schedule": "{}",
        "selection": "{}",
        "top1": "{:.2f}",
        "top5": "{:.2f}",
        "loss": "{:.4f}",
        "gflops": "{:.4f}",
        "images_per_second": "{:.1f}",
    }
    rows = [[text.format(getattr(row, name)) for name, text in columns.items()] for row in results.rows]
    lines = [[*columns], *rows]
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    table = "\n".join(" ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines)
    facts = (
        f"{results.rows[0].num_images} images of {results.dataset}; {results.device}, {results.num_threads} threads, "
        f"{results.dtype}, batch {results.batch_size}; torch {results.versions['torch']}, transformers "
        f"{results.versions['transformers']}"
    )
    if results.num_candidate_classes:
        facts += f"; answers among {results.num_candidate_classes} of the model's classes"
    return f"{table}\n{facts}"


__all__ = [
    "RESULTS_NAME",
    "SELECTION_NAMES",
    "TRAINING_NAME",
    "PublishedResults",
    "ResultRow",
    "Results",
    "check_no_results",
    "device_facts",
    "file_digest",
    "format_table",
    "markdown_table",
    "read_results",
    "recorded_training",
    "weights_digests",
    "write_json",
    "write_results",
]
