"""Top-1, top-5, loss, GFLOPs and images per second of one model under several pruning schedules."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import datasets
import evaluate
import torch
from accelerate import Accelerator
from torch import nn
from tqdm.auto import tqdm

from ..data import DataArguments, describe_dataset
from ..inference import evaluation_mode
from ..modeling_tnt import TntDeiTForImageClassification, TntViTForImageClassification
from ..named_schedules import SCHEDULE_FORMS, FlopsReduction, parse_schedule, resolve_schedules
from ..results import ResultRow, Results, device_facts, weights_digests
from ..schedules_tnt import Schedule, count_gflops
from ..timing import timed


CANDIDATE_CLASSES = ("all", "present")


class TopKAccuracy(evaluate.Metric):
    """
    Top-1 and top-5 accuracy in percent.

    Predictions are the most probable classes of each image in descending order, so that no logits need be gathered;
    see [`top_classes`].
    """

    def __init__(self):
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        features = {
            "predictions": datasets.Sequence(datasets.Value("int64")),
            "references": datasets.Value("int64"),
        }
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="",
            inputs_description="predictions: class indices, most probable first; references: the labels.",
            features=datasets.Features(features),
        )

    def _compute(self, predictions: Sequence[Sequence[int]], references: Sequence[int]) -> dict[str, float]:
        return _top_k_accuracy(torch.tensor(predictions) == torch.tensor(references)[:, None])


def _top_k_accuracy(is_label: torch.Tensor) -> dict[str, float]:
    """Percentages, from whether each of the most probable classes is the label: shape `(num_images, num_classes)`."""
    num_images = len(is_label)
    return {
        "top1": 100 * is_label[:, 0].sum().item() / num_images,
        "top5": 100 * is_label[:, :5].any(dim=1).sum().item() / num_images,
    }


def top_classes(logits: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
    """
    The five most probable classes, shape `(batch_size, min(5, num_labels))`. Fits Trainer's
    `preprocess_logits_for_metrics`, which also passes the labels.
    """
    return logits.topk(min(5, logits.shape[-1]), dim=-1).indices


def compute_metrics(prediction: Any) -> dict[str, float]:
    """`compute_metrics` of Trainer, for predictions made by [`top_classes`]."""
    return TopKAccuracy().compute(predictions=prediction.predictions, references=prediction.label_ids)


@dataclass
class EvaluationArguments:
    """Under which budgets to evaluate."""

    schedules: list[str] = field(
        default_factory=lambda: ["full", "single", "multi"],
        metadata={"help": f"Schedules to evaluate: {SCHEDULE_FORMS}."},
    )
    random_control: bool = field(
        default=True,
        metadata={"help": "Also evaluate each schedule that prunes with random scores in place of the learned ones."},
    )
    candidate_classes: str = field(
        default="all",
        metadata={
            "help": "Classes among which the model chooses: all of its own, or only those that are present in the "
            "validation data, for data that has a part of them, such as ImageNet-100.",
            "choices": CANDIDATE_CLASSES,
        },
    )

    def __post_init__(self):
        if self.candidate_classes not in CANDIDATE_CLASSES:
            raise ValueError(
                f"--candidate_classes must be one of {', '.join(CANDIDATE_CLASSES)}, got {self.candidate_classes}."
            )
        self.schedules = [parse_schedule(text) for text in self.schedules]


@dataclass
class SavedModelArguments:
    """Which model to evaluate, and how."""

    model_name_or_path: str = field(
        metadata={
            "help": "Folder or Hub id of a model; a plain checkpoint has no scoring heads, so it merges clusters."
        }
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a model on the Hub."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for results.json. By default the results are only printed."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace the results.json of the output folder."}
    )
    batch_size: int = field(default=32, metadata={"help": "Images in a batch of one process."})
    num_workers: int = field(default=0, metadata={"help": "Workers that read images for one process."})
    dtype: str = field(
        default="float32",
        metadata={"help": "Type of weights and activations.", "choices": ("float32", "float16", "bfloat16")},
    )
    attn_implementation: str = field(
        default="sdpa", metadata={"help": "Attention: sdpa, eager or flash_attention_2; merging needs sdpa or eager."}
    )
    use_cpu: bool = field(default=False, metadata={"help": "Use the CPU even if there is a GPU."})
    seed: int = field(default=0, metadata={"help": "Seed of the scores of the random control."})

    def __post_init__(self):
        for name, lowest in (("batch_size", 1), ("num_workers", 0)):
            if getattr(self, name) < lowest:
                raise ValueError(f"--{name} must be at least {lowest}, got {getattr(self, name)}.")


class _Tally:
    """One schedule under evaluation: what identifies it and what has been counted so far."""

    def __init__(self, schedule: Schedule, selection: str, seed: int, device: torch.device):
        self.schedule, self.selection = schedule, selection
        self.generator = torch.Generator(device).manual_seed(seed)
        self.is_label, self.loss, self.num_timed, self.seconds = [], 0.0, 0, 0.0


@torch.inference_mode()
def evaluate_schedules(
    model: TntViTForImageClassification | TntDeiTForImageClassification,
    batches: Iterable[dict[str, torch.Tensor]],
    schedules: Sequence[Schedule | FlopsReduction],
    *,
    random_control: bool = True,
    seed: int = 0,
    accelerator: Accelerator | None = None,
    candidates: Sequence[int] | None = None,
) -> list[ResultRow]:
    """
    Evaluate a model under several schedules in one pass over the data.

    Images per second count the forward pass alone, in this pass, each schedule warmed up on the first batch. The
    random control draws from a generator seeded with `seed`.

    Args:
        model: The classifier; its own schedule does not matter.
        batches: Batches with `pixel_values` and integer `labels`; a dataloader prepared by `accelerator` if given.
        schedules (`Sequence[Schedule | FlopsReduction]`): What to evaluate.
        random_control (`bool`): Whether each pruned schedule is repeated with `selection="random"`, if scores matter.
        seed (`int`): Seed of the random control.
        accelerator ([`~accelerate.Accelerator`], *optional*): To share the images between processes.
        candidates (`Sequence[int]`, *optional*): Classes that an answer may be; all of the model's if None.

    Returns:
        `list[ResultRow]`: One row for each schedule and selection.

    Raises:
        ValueError: If the model cannot carry out a schedule; before any image is read.
    """
    schedules = resolve_schedules(model.config, schedules)
    accelerator = accelerator or Accelerator()
    tallies = []
    for schedule in schedules:
        selections = ("none",)
        if schedule.prune_layers:
            selections = ("relevance", "random")[: 1 + random_control] if model.config.uses_scores else ("similarity",)
        for selection in selections:
            tallies.append(_Tally(schedule, selection, seed + accelerator.process_index, model.device))
    is_excluded = torch.full((model.config.num_labels,), candidates is not None, device=model.device)
    is_excluded[list(candidates or ())] = False
    with evaluation_mode(model):
        for index, batch in enumerate(
            tqdm(batches, desc="Evaluating", disable=not accelerator.is_local_main_process, unit="batch")
        ):
            pixel_values, labels = batch["pixel_values"].to(model.device), batch["labels"].to(model.device)
            for tally in tallies:
                if index == 0:
                    _logits(model, pixel_values, tally, accelerator)
                logits, seconds = timed(partial(_logits, model, pixel_values, tally, accelerator), model.device)
                tally.seconds += seconds
                tally.num_timed += len(labels)
                logits = logits.masked_fill(is_excluded, -torch.inf)
                losses = nn.functional.cross_entropy(logits.float(), labels, reduction="none")
                is_label = top_classes(logits) == labels[:, None]
                is_label, losses = accelerator.gather_for_metrics((is_label, losses))
                tally.is_label.append(is_label)
                tally.loss += losses.double().sum().item()
    return [_finish(model, tally, accelerator) for tally in tallies]


def _logits(model: nn.Module, pixel_values: torch.Tensor, tally: _Tally, accelerator: Accelerator) -> torch.Tensor:
    selection = "random" if tally.selection == "random" else "relevance"
    with accelerator.autocast():
        return model(pixel_values, schedule=tally.schedule, selection=selection, generator=tally.generator).logits


def _finish(model: nn.Module, tally: _Tally, accelerator: Accelerator) -> ResultRow:
    is_label = torch.cat(tally.is_label)
    rate = torch.tensor(tally.num_timed / tally.seconds, device=model.device)
    return ResultRow(
        schedule=tally.schedule.name,
        selection=tally.selection,
        **tally.schedule.settings,
        **_top_k_accuracy(is_label),  # type: ignore[arg-type]
        loss=tally.loss / len(is_label),
        gflops=count_gflops(model.config, schedule=tally.schedule),
        images_per_second=accelerator.reduce(rate, "sum").item(),
        num_images=len(is_label),
    )


def describe_run(
    rows: Sequence[ResultRow],
    model: nn.Module,
    *,
    name: str,
    data_arguments: DataArguments,
    split: datasets.Dataset | datasets.IterableDataset,
    training: dict[str, Any] | None,
    batch_size: int,
    accelerator: Accelerator,
    seed: int,
    candidates: Sequence[int] | None = None,
) -> Results:
    """
    The rows of [`evaluate_schedules`] with what they were measured on.

    Args:
        rows: The rows.
        model: The classifier.
        name (`str`): Its folder or Hub id; of a folder, the weights are recorded.
        data_arguments ([`DataArguments`]): Where the images are from.
        split: The images.
        training (`dict`, *optional*): How the weights were made, if that is known.
        batch_size (`int`): Images in a batch, for each process.
        accelerator ([`~accelerate.Accelerator`]): That of the evaluation.
        seed (`int`): Of the random control.
        candidates (`Sequence[int]`, *optional*): Classes that an answer could be; all of the model's if None.
    """
    precision = {
        "no": str(model.dtype).removeprefix("torch."),
        "fp16": "float16 autocast",
        "bf16": "bfloat16 autocast",
    }
    return Results(
        model=name,
        **describe_dataset(data_arguments, split),
        **device_facts(model.device),
        dtype=precision.get(accelerator.mixed_precision, accelerator.mixed_precision),
        attention=model.config._attn_implementation,
        batch_size=batch_size,
        num_candidate_classes=None if candidates is None else len(candidates),
        num_processes=accelerator.num_processes,
        seed=seed,
        weights_sha256=weights_digests(name),
        training=training,
        rows=[*rows],
    )


__all__ = [
    "EvaluationArguments",
    "SavedModelArguments",
    "TopKAccuracy",
    "compute_metrics",
    "describe_run",
    "evaluate_schedules",
    "top_classes",
]
