"""
Top-1 against executed GFLOPs: TNT and the methods it is compared with, on one backbone, one machine, the same images.

Heads are trained here once for each recipe and seed, or taken from trained folders; the rest is free of training. What
a method leaves open (the schedule of sort-prune-merge) is chosen on training images, by agreement with the unpruned
model.
"""

import math
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from datasets import Dataset, DatasetDict, Image
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import BaseImageProcessor, Trainer, default_data_collator, set_seed

from tnt_hf.conversion import load_classifier, load_image_processor
from tnt_hf.data import DataArguments, decode_image, evaluation_images, load_images, prepare_data
from tnt_hf.examples import BUNDLED_BACKBONE, RECIPES_DIR
from tnt_hf.modeling_tnt import TntDeiTForImageClassification, TntViTForImageClassification
from tnt_hf.results import device_facts
from tnt_hf.schedules_tnt import count_gflops, height_and_width, schedule_for
from tnt_hf.timing import timed
from tnt_hf.training import Recipe, checkpoint_name, images_per_step

from .baselines import METHODS, BaselineSchedule, baseline_logits, baseline_schedules, count_baseline_gflops


MAX_TUNING_IMAGES = 512
OBJECT_COLUMN = "object"
METHOD_NAMES = {
    "cls_attention": "[CLS] attention",
    "merging": "Token Merging",
    "sort_prune_merge": "DiffRate-style (sort, prune, merge)",
}
RANKED_KEEP_RATE = 0.4


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
    methods: list[str] = field(
        default_factory=lambda: list(METHODS),
        metadata={"help": f"Methods without training to compare with, of {', '.join(METHODS)}; none with none."},
    )
    recipes: list[str] = field(
        default_factory=lambda: [str(RECIPES_DIR / f"{name}.yaml") for name in ("reference", "merge")],
        metadata={"help": "Recipes to train heads with, named by their files; none with --recipes none."},
    )
    variants: str | None = field(
        default=None,
        metadata={
            "help": "YAML file of a `recipe` and of `variants` of it, settings by name, to train heads with too: an "
            "ablation."
        },
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
        self.methods, self.recipes = ([] if names == ["none"] else names for names in (self.methods, self.recipes))
        if unknown := [method for method in self.methods if method not in METHODS]:
            raise ValueError(f"--methods must be of {', '.join(METHODS)}, or none, got {unknown[0]}.")
        if missing := [path for path in (*self.recipes, self.variants) if path and not Path(path).is_file()]:
            raise ValueError(f"There is no file {missing[0]}.")
        names = ["unpruned", *self.methods, *self.trainings, *(Path(name).name for name in self.trained)]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"Every method must have a name of its own: {repeated[0]} stands for more than one.")

    @property
    def trainings(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """The recipe of every training and what differs from it, by the name of its rows."""
        trainings = {Path(recipe).stem: (recipe, {}) for recipe in self.recipes}
        if self.variants is not None:
            content = yaml.safe_load(Path(self.variants).read_text())
            if not isinstance(content, dict) or set(content) != {"recipe", "variants"}:
                raise ValueError(f"{self.variants} must hold a `recipe` and `variants`.")
            recipe = str(Path(self.variants).parent / content["recipe"])
            trainings |= {name: (recipe, settings) for name, settings in content["variants"].items()}
        return trainings


@dataclass
class _Entry:
    """A method under one budget and seed, and what has been counted so far."""

    method: str
    budget: float
    seed: int | None
    gflops: float
    schedule: str
    classify: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]
    """Images -> logits, and the patches that remain at the end, None for all of them."""
    is_correct: list[torch.Tensor] = field(default_factory=list)
    seconds: float = 0.0
    on_object: float = 0.0
    on_object_at_best: float = 0.0


def run_accuracy_benchmark(arguments: AccuracyBenchmarkArguments, data_arguments: DataArguments) -> dict[str, Any]:
    """
    Compare all methods at all budgets in one pass over the validation images.

    Returns:
        `dict`: Facts about model, data and device, and `rows`, one for each method and budget: `method`, `budget`
        (share of the unpruned model's executed GFLOPs), `gflops` (executed), `schedule`, `top1` (percent, mean over
        seeds), `standard_error` (of that mean, over seeds; 0 for a method without randomness), `top1_by_seed`, `drop`
        (points of top-1 below the unpruned model) and `drop_standard_error` (over images, each compared with itself),
        `images_per_second` (of the forward passes, eager). If the validation images have masks of the object in a
        column `object`, also `object_share`: how much of the remaining patches lies on the object, over what an oracle
        reaches that knows the object and keeps as many; and `rankings`, the same of the 40 % of patches that the
        scoring head after a layer ranks highest, for every trained head, and for a linear head fitted to the masks
        of training images, `"supervised"`, which bounds what a scoring head can reach.

    Raises:
        ValueError: If data and model do not fit, or a method cannot meet a budget; before any training.
    """
    images = load_images(data_arguments, train=True, validation=True, extra_columns=[OBJECT_COLUMN])
    image_processor = load_image_processor(arguments.model_name_or_path, arguments.model_revision)
    device = Accelerator(cpu=arguments.use_cpu).device
    backbone = load_classifier(arguments.model_name_or_path, revision=arguments.model_revision).to(device).eval()
    prepared = prepare_data(images, backbone, image_processor, data_arguments)
    dataset = {name: evaluation_images(split, image_processor) for name, split in prepared.items()}
    full = count_gflops(backbone.config, as_executed=True)
    options = {
        (method, budget): baseline_schedules(backbone.config, method, budget * full)
        for method in arguments.methods
        for budget in arguments.budgets
    }
    with ExitStack() as stack:
        trainers, model_entries = [], []
        for name, (recipe, settings) in arguments.trainings.items():
            for seed in arguments.seeds:
                folder = stack.enter_context(tempfile.TemporaryDirectory())
                own = {**settings, "seed": seed, "output_dir": folder}
                trainer = _trainer(arguments, data_arguments, images, image_processor, recipe, own)
                trainers.append((name, trainer))
                model_entries += [_model_entry(name, budget, seed, trainer.model) for budget in arguments.budgets]
        for name_or_path in arguments.trained:
            model, name = load_classifier(name_or_path).to(device), Path(name_or_path).name
            model_entries += [_model_entry(name, budget, None, model) for budget in arguments.budgets]
        for _, trainer in trainers:
            set_seed(trainer.args.seed)
            trainer.train()
            trainer.model.to(device).eval()

    entries = [_model_entry("unpruned", 1.0, None, backbone)]
    num_tuning_images = min(arguments.num_train_images, MAX_TUNING_IMAGES)
    tuning = _first_pixel_values(dataset["train"], num_tuning_images, device)
    for (method, budget), schedules in options.items():
        schedule = _closest_to_unpruned(backbone, tuning, schedules)
        for seed in arguments.seeds if method == "random" else [None]:
            entries.append(_baseline_entry(budget, seed, backbone, schedule))
    entries += model_entries

    patch_size, coverage = backbone.config.patch_size, None
    if OBJECT_COLUMN in images["validation"].column_names:
        coverage = object_coverage(images["validation"], image_processor, patch_size)
    loader = DataLoader(dataset["validation"], batch_size=arguments.batch_size, collate_fn=default_data_collator)
    _evaluate(entries, loader, coverage, device)
    results = {
        "model": checkpoint_name(arguments.model_name_or_path),
        "dataset": data_arguments.source,
        **device_facts(device),
        "dtype": "float32",
        "batch_size": arguments.batch_size,
        "num_images": len(dataset["validation"]),
        "num_train_images": arguments.num_train_images,
        "seeds": arguments.seeds,
        "gflops_unpruned": full,
        "rows": _rows(entries),
    }
    if coverage is not None:
        heads = [
            (name, layer, trainer.model.base_model.alpha_heads[layer])
            for name, trainer in trainers
            for layer in range(trainer.model.config.num_learning_layers)
        ]
        tuning_coverage = object_coverage(images["train"].select(range(len(tuning))), image_processor, patch_size)
        supervised = _supervised_heads(backbone, tuning, tuning_coverage.to(device))
        heads += [("supervised", layer, head) for layer, head in enumerate(supervised)]
        results["rankings"] = _rankings(backbone, heads, loader, coverage, device)
    return results


def object_coverage(
    split: Dataset, image_processor: BaseImageProcessor, patch_size: int | Sequence[int]
) -> torch.Tensor:
    """
    How much of each patch the object covers, from 0 to 1, after the resizing of the image processor: shape
    `(num_images, num_patches)`, from the column `object` of masks, which are white on the object.
    """
    masks = split.select_columns([OBJECT_COLUMN]).cast_column(OBJECT_COLUMN, Image(decode=False))
    coverage = []
    for record in masks:
        mask = image_processor(decode_image(record[OBJECT_COLUMN]), do_normalize=False, return_tensors="pt")
        cells = nn.functional.avg_pool2d(mask["pixel_values"].mean(dim=1), height_and_width(patch_size))
        coverage.append(cells.flatten())
    return torch.stack(coverage)


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

    def classify(pixel_values):
        return baseline_logits(model, pixel_values, schedule, generator)

    return _Entry(schedule.method, budget, seed, gflops, text, classify)


def _model_entry(
    name: str,
    budget: float,
    seed: int | None,
    model: TntViTForImageClassification | TntDeiTForImageClassification,
) -> _Entry:
    schedule = schedule_for(model.config, flops_reduction=1 / budget)

    def classify(pixel_values):
        outputs = model(pixel_values, schedule=schedule)
        return outputs.logits, outputs.kept_indices[-1] if outputs.kept_indices else None

    gflops = count_gflops(model.config, schedule=schedule, as_executed=True)
    return _Entry(name, budget, seed, gflops, schedule.name, classify)


def _trainer(
    arguments: AccuracyBenchmarkArguments,
    data_arguments: DataArguments,
    images: DatasetDict,
    image_processor: BaseImageProcessor,
    name_or_path: str,
    settings: dict[str, Any],
) -> Trainer:
    """A training of scoring heads by a recipe with other settings, on the benchmark's own model and images."""
    own = {
        "model_name_or_path": arguments.model_name_or_path,
        "model_revision": arguments.model_revision,
        "image_column_name": None,  # they are the images of the benchmark, whatever the recipe names
        "label_column_name": None,
        "max_train_samples": None,
        "trust_label_order": data_arguments.trust_label_order,
        "max_bad_images": data_arguments.max_bad_images,
        "do_eval": False,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "fp16": False,
        "use_cpu": arguments.use_cpu,
    }
    recipe = Recipe.load(name_or_path, **{**settings, **own})
    if recipe.model.train_backbone:
        raise ValueError(f"All methods are compared on one backbone: {name_or_path} must train scoring heads alone.")
    recipe.training.max_steps = max(1, arguments.num_train_images // images_per_step(recipe.training))
    return recipe.make_trainer(images, image_processor)


@torch.inference_mode()
def _evaluate(
    entries: Sequence[_Entry], loader: DataLoader, coverage: torch.Tensor | None, device: torch.device
) -> None:
    is_first = True
    for pixel_values, labels, covered in _batches(loader, coverage, device):
        for entry in entries:
            if is_first:
                entry.classify(pixel_values[:1])
            (logits, kept), seconds = timed(partial(entry.classify, pixel_values), device)
            entry.is_correct.append((logits.argmax(dim=-1) == labels).cpu())
            entry.seconds += seconds
            if covered is not None and kept is not None:
                entry.on_object += covered.gather(1, kept).sum().item()
                entry.on_object_at_best += covered.topk(kept.shape[1]).values.sum().item()
        is_first = False


def _batches(
    loader: DataLoader, coverage: torch.Tensor | None, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    start = 0
    for batch in tqdm(loader, unit="batch"):
        pixel_values, labels = batch["pixel_values"].to(device), batch["labels"].to(device)
        yield pixel_values, labels, None if coverage is None else coverage[start : start + len(labels)].to(device)
        start += len(labels)


def _rows(entries: Sequence[_Entry]) -> list[dict[str, Any]]:
    unpruned = torch.cat(entries[0].is_correct).float()
    rows = []
    for method, budget in dict.fromkeys((entry.method, entry.budget) for entry in entries):
        group = [entry for entry in entries if (entry.method, entry.budget) == (method, budget)]
        is_correct = torch.stack([torch.cat(entry.is_correct) for entry in group]).float()
        top1 = (100 * is_correct.mean(dim=1)).tolist()
        lost = 100 * (unpruned - is_correct.mean(dim=0))
        row = {
            "method": method,
            "budget": budget,
            "gflops": statistics.mean(entry.gflops for entry in group),
            "schedule": group[0].schedule,
            "top1": statistics.mean(top1),
            "standard_error": _standard_error(top1),
            "top1_by_seed": top1,
            "drop": lost.mean().item(),
            "drop_standard_error": _standard_error(lost.tolist()),
            "images_per_second": lost.numel() * len(group) / sum(entry.seconds for entry in group),
        }
        if at_best := sum(entry.on_object_at_best for entry in group):
            row["object_share"] = sum(entry.on_object for entry in group) / at_best
        rows.append(row)
    return rows


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


@torch.inference_mode()
def _supervised_heads(backbone: nn.Module, pixel_values: torch.Tensor, coverage: torch.Tensor) -> list[nn.Linear]:
    """For each layer but the last, the linear head whose scores come closest to the coverage, by least squares."""
    num_prefix_tokens = backbone.config.num_prefix_tokens
    heads = []
    for hidden_states in backbone.base_model(pixel_values, output_hidden_states=True).hidden_states[1:-1]:
        patch_tokens = hidden_states[:, num_prefix_tokens:].flatten(0, 1)
        inputs = torch.cat((patch_tokens, torch.ones_like(patch_tokens[:, :1])), dim=1)
        weights = torch.linalg.lstsq(inputs, coverage.reshape(-1, 1)).solution
        head = nn.Linear(patch_tokens.shape[1], 1, device=pixel_values.device)
        head.weight.copy_(weights[:-1].T)
        head.bias.copy_(weights[-1])
        heads.append(head)
    return heads


@torch.inference_mode()
def _rankings(
    backbone: nn.Module,
    heads: Sequence[tuple[str, int, nn.Linear]],
    loader: DataLoader,
    coverage: torch.Tensor,
    device: torch.device,
) -> list[dict[str, Any]]:
    """How much of the patches that each head, of a method after a layer, ranks highest lies on the object."""
    num_kept = int(coverage.shape[1] * RANKED_KEEP_RATE)
    on_object, at_best = {}, 0.0
    for pixel_values, _, covered in _batches(loader, coverage, device):
        hidden_states = backbone.base_model(pixel_values, output_hidden_states=True).hidden_states
        at_best += covered.topk(num_kept).values.sum().item()
        for method, layer, head in heads:
            scores = head(hidden_states[layer + 1][:, backbone.config.num_prefix_tokens :]).squeeze(-1)
            sums = on_object.setdefault((method, layer), [])
            sums.append(covered.gather(1, scores.topk(num_kept).indices).sum().item())
    num_heads = Counter((method, layer) for method, layer, _ in heads)
    return [
        {
            "method": method,
            "layer": layer,
            "keep_rate": RANKED_KEEP_RATE,
            "object_share": sum(sums) / num_heads[method, layer] / at_best,
        }
        for (method, layer), sums in on_object.items()
    ]


def plot_accuracy_benchmark(results: dict[str, Any], path: Path) -> None:
    """Plot top-1 against executed GFLOPs, one line for each method, with standard errors."""
    figure = Figure(figsize=(8, 5.5), layout="constrained", dpi=150)
    axes = figure.subplots()
    rows = results["rows"]
    markers = cycle("osD^vPX*")
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
            label=METHOD_NAMES.get(method, method),
        )
    axes.set_xlabel("executed GFLOPs for one image", fontsize=12)
    axes.set_ylabel("top-1 (%)", fontsize=12)
    axes.set_title(f"{results['dataset']}, {results['num_images']} images", fontsize=14)
    axes.grid(color="0.9")
    axes.legend(fontsize=10, loc="lower right")
    figure.savefig(path)


__all__ = [
    "METHOD_NAMES",
    "AccuracyBenchmarkArguments",
    "object_coverage",
    "plot_accuracy_benchmark",
    "run_accuracy_benchmark",
]
