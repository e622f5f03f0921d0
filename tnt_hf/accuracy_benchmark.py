"""
Top-1 against executed GFLOPs: TNT and the methods it is compared with, on one backbone, one machine, the same images.

Heads are trained here once for each recipe and seed, or taken from trained folders; the rest is free of training. What
a method leaves open (the schedule of sort-prune-merge) is chosen on training images, by agreement with the unpruned
model.
"""

import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset, DatasetDict
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import default_data_collator

from .baselines import METHODS, BaselineSchedule, baseline_logits, baseline_schedules, count_baseline_gflops
from .command_line import parse_recipe_and_flags
from .conversion import load_classifier
from .data import EXAMPLES_DIR, DataArguments, load_images
from .evaluation import EvaluationArguments
from .modeling_tnt import TntDeiTForImageClassification, TntViTForImageClassification
from .schedules import count_gflops, schedule_for
from .throughput import device_facts, timed
from .training import (
    BUNDLED_BACKBONE,
    ModelArguments,
    TntTrainingArguments,
    checkpoint_name,
    load_image_processor,
    load_model,
    make_trainer,
    prepare_data,
)


RECIPES = (EXAMPLES_DIR / "recipes" / "reference.yaml", EXAMPLES_DIR / "recipes" / "merge.yaml")
MAX_TUNING_IMAGES = 512


@dataclass
class AccuracyBenchmarkArguments:
    """Which backbone to compare on, at which budgets, and how much training the heads get."""

    model_name_or_path: str = field(
        default=str(BUNDLED_BACKBONE), metadata={"help": "Folder or Hub id of a trained ViT or distilled DeiT."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a model on the Hub."})
    budgets: list[float] = field(
        default_factory=lambda: [0.85, 0.7, 0.55, 0.4, 0.3],
        metadata={"help": "Executed GFLOPs as shares of those of the unpruned model."},
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of the training of heads and of random selection."}
    )
    recipes: list[str] = field(
        default_factory=lambda: [str(recipe) for recipe in RECIPES],
        metadata={"help": "Recipes to train heads with, named by their files; none with --recipes none."},
    )
    num_train_images: int = field(default=6400, metadata={"help": "Images that every training sees."})
    trained: list[str] = field(
        default_factory=list, metadata={"help": "Folders or Hub ids of models with trained heads to compare too."}
    )
    batch_size: int = field(default=100, metadata={"help": "Images in a batch of evaluation."})
    use_cpu: bool = field(default=False, metadata={"help": "Run on the CPU although there is a GPU."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder for accuracy.json and accuracy.png."})

    def __post_init__(self):
        if not self.budgets or any(not 0 < budget <= 1 for budget in self.budgets):
            raise ValueError(f"--budgets must be shares above 0 and up to 1, got {self.budgets}.")
        for name in ("num_train_images", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")
        if not self.seeds:
            raise ValueError("--seeds must name at least one seed.")
        if self.recipes == ["none"]:
            self.recipes = []
        if missing := [recipe for recipe in self.recipes if not Path(recipe).is_file()]:
            raise ValueError(f"There is no recipe {missing[0]}.")


@dataclass
class _Entry:
    """A method under one budget and seed, and what has been counted so far."""

    method: str
    budget: float
    seed: int | None
    gflops: float
    schedule: str
    logits: Callable[[torch.Tensor], torch.Tensor]
    num_correct: int = 0
    seconds: float = 0.0


def run_accuracy_benchmark(arguments: AccuracyBenchmarkArguments, data_arguments: DataArguments) -> dict[str, Any]:
    """
    Compare all methods at all budgets in one pass over the validation images.

    Returns:
        `dict`: Facts about model, data and device, and `rows`, one for each method and budget: `method`, `budget`
        (share of the unpruned model's executed GFLOPs), `gflops` (executed), `schedule`, `top1` (percent, mean over
        seeds), `standard_error` (of that mean, over seeds; 0 for a method without randomness), `top1_by_seed`,
        `images_per_second` (of the forward passes, eager).

    Raises:
        ValueError: If data and model do not fit, or a method cannot meet a budget; before any training.
    """
    images = load_images(data_arguments, train=True, validation=True)
    image_processor = load_image_processor(arguments.model_name_or_path, arguments.model_revision)
    device = Accelerator(cpu=arguments.use_cpu).device
    backbone = load_classifier(arguments.model_name_or_path, revision=arguments.model_revision).to(device).eval()
    dataset = prepare_data(images, backbone, image_processor, data_arguments)
    full = count_gflops(backbone.config, as_executed=True)
    options = {
        (method, budget): baseline_schedules(backbone.config, method, budget * full)
        for method in METHODS
        for budget in arguments.budgets
    }

    entries = [_model_entry("unpruned", 1.0, None, backbone)]
    num_tuning_images = min(arguments.num_train_images, MAX_TUNING_IMAGES)
    tuning = _first_pixel_values(dataset["train"], num_tuning_images, device)
    for (method, budget), schedules in options.items():
        schedule = _closest_to_unpruned(backbone, tuning, schedules)
        for seed in arguments.seeds if method == "random" else [None]:
            entries.append(_baseline_entry(budget, seed, backbone, schedule))
    for recipe in arguments.recipes:
        for seed in arguments.seeds:
            model = _train(arguments, images, recipe, seed).to(device).eval()
            entries += [_model_entry(Path(recipe).stem, budget, seed, model) for budget in arguments.budgets]
    for name in arguments.trained:
        model = load_classifier(name).to(device).eval()
        entries += [_model_entry(Path(name).name, budget, None, model) for budget in arguments.budgets]

    num_images = _evaluate(entries, dataset["validation"], arguments.batch_size, device)
    return {
        "model": checkpoint_name(arguments.model_name_or_path),
        "dataset": data_arguments.source,
        **device_facts(device),
        "dtype": "float32",
        "batch_size": arguments.batch_size,
        "num_images": num_images,
        "num_train_images": arguments.num_train_images,
        "seeds": arguments.seeds,
        "gflops_unpruned": full,
        "rows": _rows(entries, num_images),
    }


def _first_pixel_values(split: Dataset, num_images: int, device: torch.device) -> torch.Tensor:
    examples = [split[index]["pixel_values"] for index in range(min(num_images, len(split)))]
    return torch.stack(examples).to(device)


@torch.inference_mode()
def _closest_to_unpruned(
    model: TntViTForImageClassification | TntDeiTForImageClassification,
    pixel_values: torch.Tensor,
    schedules: Sequence[BaselineSchedule],
) -> BaselineSchedule:
    if len(schedules) == 1:
        return schedules[0]
    expected = model(pixel_values).logits.log_softmax(dim=-1)

    def divergence(schedule):
        log_probabilities = baseline_logits(model, pixel_values, schedule)[0].log_softmax(dim=-1)
        return nn.functional.kl_div(log_probabilities, expected, reduction="batchmean", log_target=True).item()

    return min(schedules, key=divergence)


def _baseline_entry(budget: float, seed: int | None, model: nn.Module, schedule: BaselineSchedule) -> _Entry:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    counts = ",".join(map(str, schedule.counts))
    text = f"{counts} pruned {schedule.pruned_share:g}" if schedule.pruned_share else counts
    gflops = count_baseline_gflops(model.config, schedule)

    def logits(pixel_values):
        return baseline_logits(model, pixel_values, schedule, generator)[0]

    return _Entry(schedule.method, budget, seed, gflops, text, logits)


def _model_entry(
    name: str,
    budget: float,
    seed: int | None,
    model: TntViTForImageClassification | TntDeiTForImageClassification,
) -> _Entry:
    schedule = schedule_for(model.config, speedup=1 / budget)

    def logits(pixel_values):
        model.set_schedule(**schedule.settings)
        return model(pixel_values).logits

    model.set_schedule(**schedule.settings)
    return _Entry(name, budget, seed, count_gflops(model.config, as_executed=True), schedule.name, logits)


def _train(arguments: AccuracyBenchmarkArguments, images: DatasetDict, recipe: str, seed: int) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        flags = {
            "model_name_or_path": arguments.model_name_or_path,
            "model_revision": arguments.model_revision,
            "output_dir": folder,
            "do_eval": False,
            "seed": seed,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": arguments.use_cpu,
        }
        argument_types = (ModelArguments, DataArguments, EvaluationArguments, TntTrainingArguments)
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        model_arguments, data_arguments, _, training_arguments = parse_recipe_and_flags(
            argument_types, [recipe, *words]
        )
        training_arguments.max_steps = max(1, arguments.num_train_images // training_arguments.train_batch_size)
        model = load_model(model_arguments, images, training_arguments)
        image_processor = load_image_processor(arguments.model_name_or_path, arguments.model_revision)
        dataset = prepare_data(DatasetDict(train=images["train"]), model, image_processor, data_arguments)
        make_trainer(model, dataset, image_processor, training_arguments).train()
    return model


@torch.inference_mode()
def _evaluate(entries: Sequence[_Entry], split: Dataset, batch_size: int, device: torch.device) -> int:
    num_images = 0
    for index, batch in enumerate(
        tqdm(DataLoader(split, batch_size=batch_size, collate_fn=default_data_collator), unit="batch")
    ):
        pixel_values, labels = batch["pixel_values"].to(device), batch["labels"].to(device)
        for entry in entries:
            if index == 0:
                entry.logits(pixel_values[:1])
            logits, seconds = timed(partial(entry.logits, pixel_values), device)
            entry.num_correct += (logits.argmax(dim=-1) == labels).sum().item()
            entry.seconds += seconds
        num_images += len(labels)
    return num_images


def _rows(entries: Sequence[_Entry], num_images: int) -> list[dict[str, Any]]:
    rows = []
    for method, budget in dict.fromkeys((entry.method, entry.budget) for entry in entries):
        group = [entry for entry in entries if (entry.method, entry.budget) == (method, budget)]
        top1 = [100 * entry.num_correct / num_images for entry in group]
        rows.append(
            {
                "method": method,
                "budget": budget,
                "gflops": statistics.mean(entry.gflops for entry in group),
                "schedule": group[0].schedule,
                "top1": statistics.mean(top1),
                "standard_error": statistics.stdev(top1) / len(top1) ** 0.5 if len(top1) > 1 else 0.0,
                "top1_by_seed": top1,
                "images_per_second": num_images * len(group) / sum(entry.seconds for entry in group),
            }
        )
    return rows


def plot_accuracy_benchmark(results: dict[str, Any], path: Path) -> None:
    """Plot top-1 against executed GFLOPs, one line for each method, with standard errors."""
    figure = Figure(figsize=(8, 5.5), layout="constrained", dpi=150)
    axes = figure.subplots()
    rows = results["rows"]
    markers = iter("osD^vPX*")
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        if method == "unpruned":
            axes.axhline(own[0]["top1"], color="black", linestyle="--", linewidth=1, label=method)
            continue
        axes.errorbar(
            [row["gflops"] for row in own],
            [row["top1"] for row in own],
            [row["standard_error"] for row in own],
            marker=next(markers),
            capsize=3,
            label=method.replace("_", " "),
        )
    axes.set_xlabel("executed GFLOPs for one image", fontsize=12)
    axes.set_ylabel("top-1 (%)", fontsize=12)
    axes.set_title(f"{results['dataset']}, {results['num_images']} images", fontsize=14)
    axes.grid(color="0.9")
    axes.legend(fontsize=10, loc="lower right")
    figure.savefig(path)


__all__ = ["AccuracyBenchmarkArguments", "plot_accuracy_benchmark", "run_accuracy_benchmark"]
