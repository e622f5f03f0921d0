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

from ..inference import evaluation_mode
from ..modeling_tnt import TntDeiTForImageClassification, TntViTForImageClassification
from ..named_schedules import SCHEDULE_FORMS, FlopsReduction, parse_schedule, resolve_schedules
from ..results import device_facts
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
        pairs = list(zip(predictions, references, strict=True))
        return {
            "top1": 100 * sum(label == classes[0] for classes, label in pairs) / len(pairs),
            "top5": 100 * sum(label in classes[:5] for classes, label in pairs) / len(pairs),
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
        metadata={
            "help": f"Schedules to evaluate: {SCHEDULE_FORMS} such as 2,3:0.7,0.7:30; names are published schedules."
        },
    )
    random_control: bool = field(
        default=True, metadata={"help": "Also evaluate each pruned schedule with random instead of learned scores."}
    )
    candidate_classes: str = field(
        default="all",
        metadata={
            "help": "Which classes an answer may be: all of the model's, or present, those that the validation data "
            "has, where it has a part of them as ImageNet-100 does.",
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

    model_name_or_path: str = field(metadata={"help": "Folder or Hub id of a model with trained scoring heads."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a model on the Hub."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for results.json; only printed by default."}
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace a results.json that is there."})
    batch_size: int = field(default=32, metadata={"help": "Images in a batch, for each process."})
    num_workers: int = field(default=0, metadata={"help": "Processes that read images, for each process."})
    dtype: str = field(
        default="float32", metadata={"help": "Weights and activations.", "choices": ("float32", "float16", "bfloat16")}
    )
    attn_implementation: str = field(default="sdpa", metadata={"help": "sdpa, eager or flash_attention_2."})
    use_cpu: bool = field(default=False, metadata={"help": "Evaluate on the CPU although there is a GPU."})
    seed: int = field(default=0, metadata={"help": "Seed of the random control."})

    def __post_init__(self):
        for name, lowest in (("batch_size", 1), ("num_workers", 0)):
            if getattr(self, name) < lowest:
                raise ValueError(f"--{name} must be at least {lowest}, got {getattr(self, name)}.")


class _Row:
    """One schedule under evaluation: what identifies it and what has been counted so far."""

    def __init__(self, schedule: Schedule, selection: str, seed: int, device: torch.device):
        self.schedule, self.selection = schedule, selection
        self.metric = TopKAccuracy()
        self.generator = torch.Generator(device).manual_seed(seed)
        self.loss, self.num_images, self.num_timed, self.seconds = 0.0, 0, 0, 0.0


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
) -> list[dict[str, Any]]:
    """
    Evaluate a model under several schedules in one pass over the data.

    Images per second count the forward pass alone, in this pass, each schedule warmed up on the first batch. The
    random control draws from a generator seeded with `seed`.

    Args:
        model: The classifier; its own schedule does not matter.
        batches: Batches with `pixel_values` and integer `labels`; a dataloader prepared by `accelerator` if given.
        schedules (`Sequence[Schedule | FlopsReduction]`): What to evaluate.
        random_control (`bool`): Whether each pruned schedule is repeated with `selection="random"`.
        seed (`int`): Seed of the random control.
        accelerator ([`~accelerate.Accelerator`], *optional*): To share the images between processes.
        candidates (`Sequence[int]`, *optional*): Classes that an answer may be; all of the model's if None.

    Returns:
        `list[dict]`: One row for each schedule and selection: `schedule`, `selection` ("none", "relevance",
        "random"), `prune_layers`, `keep_rates`, `num_similar_tokens`, `top1` and `top5` (percent), `loss`
        (cross-entropy), `gflops` (see [`count_gflops`]), `images_per_second`, `num_images`.

    Raises:
        ValueError: If the model cannot carry out a schedule; before any image is read.
    """
    schedules = resolve_schedules(model.config, schedules)
    accelerator = accelerator or Accelerator()
    rows = []
    for schedule in schedules:
        selections = ("none",) if not schedule.prune_layers else ("relevance", "random")[: 1 + random_control]
        rows += [_Row(schedule, selection, seed + accelerator.process_index, model.device) for selection in selections]
    is_excluded = torch.full((model.config.num_labels,), candidates is not None, device=model.device)
    is_excluded[list(candidates or ())] = False
    with evaluation_mode(model):
        for index, batch in enumerate(
            tqdm(batches, desc="Evaluating", disable=not accelerator.is_local_main_process, unit="batch")
        ):
            pixel_values, labels = batch["pixel_values"].to(model.device), batch["labels"].to(model.device)
            for row in rows:
                if index == 0:
                    _logits(model, pixel_values, row, accelerator)
                logits, seconds = timed(partial(_logits, model, pixel_values, row, accelerator), model.device)
                row.seconds += seconds
                row.num_timed += len(labels)
                logits = logits.masked_fill(is_excluded, -torch.inf)
                losses = nn.functional.cross_entropy(logits.float(), labels, reduction="none")
                classes, losses, references = accelerator.gather_for_metrics((top_classes(logits), losses, labels))
                row.metric.add_batch(predictions=classes.tolist(), references=references.tolist())
                row.loss += losses.double().sum().item()
                row.num_images += len(references)
    return [_finish(model, row, accelerator) for row in rows]


def _logits(model: nn.Module, pixel_values: torch.Tensor, row: _Row, accelerator: Accelerator) -> torch.Tensor:
    selection = "random" if row.selection == "random" else "relevance"
    with accelerator.autocast():
        return model(pixel_values, schedule=row.schedule, selection=selection, generator=row.generator).logits


def _finish(model: nn.Module, row: _Row, accelerator: Accelerator) -> dict[str, Any]:
    rate = torch.tensor(row.num_timed / row.seconds, device=model.device)
    return {
        "schedule": row.schedule.name,
        "selection": row.selection,
        **row.schedule.settings,
        **row.metric.compute(),
        "loss": row.loss / row.num_images,
        "gflops": count_gflops(model.config, schedule=row.schedule),
        "images_per_second": accelerator.reduce(rate, "sum").item(),
        "num_images": row.num_images,
    }


def describe_run(
    model: nn.Module,
    *,
    name: str,
    dataset: str,
    batch_size: int,
    accelerator: Accelerator,
    seed: int,
    candidates: Sequence[int] | None = None,
) -> dict[str, Any]:
    """
    What the rows of [`evaluate_schedules`] were measured with: the other fields of a results file. Its
    `num_candidate_classes` is None where an answer may be any of the model's classes.
    """
    precision = {
        "no": str(model.dtype).removeprefix("torch."),
        "fp16": "float16 autocast",
        "bf16": "bfloat16 autocast",
    }
    return {
        "model": name,
        "dataset": dataset,
        **device_facts(model.device),
        "dtype": precision.get(accelerator.mixed_precision, accelerator.mixed_precision),
        "attention": model.config._attn_implementation,
        "batch_size": batch_size,
        "num_candidate_classes": None if candidates is None else len(candidates),
        "num_processes": accelerator.num_processes,
        "seed": seed,
    }


__all__ = [
    "EvaluationArguments",
    "SavedModelArguments",
    "TopKAccuracy",
    "compute_metrics",
    "describe_run",
    "evaluate_schedules",
    "top_classes",
]
