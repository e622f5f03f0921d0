"""Search for the schedules that change a model's answers least at a given cost, on a few hundred images."""

import json
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn
from tqdm.auto import tqdm
from transformers import BaseImageProcessor

from ..configuration_tnt import TntDeiTConfig, TntViTConfig
from ..data import (
    DataArguments,
    check_input_size,
    evaluation_images,
    load_images,
    prepare_data,
    read_unlabelled_images,
)
from ..inference import evaluation_mode
from ..modeling_tnt import TntDeiTForImageClassification, TntViTForImageClassification
from ..results import check_no_results, device_facts, format_facts, format_rows, write_json
from ..schedules_tnt import UNPRUNED, Schedule, count_gflops, height_and_width, schedule_for
from .measured_cost import measure_seconds
from .search_space import Target, first_schedules, neighbouring_schedules


SEARCH_NAME = "search.json"
PLOT_NAME = "search.png"

# Besides the target, budgets as shares of the unpruned model's cost.
BUDGET_SHARES = (0.8, 0.6, 0.45)
# The first round sees this share of the images, and each later one twice as many.
FIRST_SHARE = 1 / 32
MIN_FIRST_IMAGES = 4
MIN_SURVIVORS = 3
# Tokens moved in each round of the refinement, as shares of the patch tokens.
REFINEMENT_STEPS = (1 / 8, 1 / 16, 1 / 32, 1 / 64)

COST_LABELS = {
    "gflops": "cost (GFLOPs for one image)",
    "milliseconds_per_image": "cost (milliseconds for one image, predicted)",
}


@dataclass
class SearchArguments:
    """Which model to search schedules for, at which cost, and what to do with them."""

    model_name_or_path: str = field(metadata={"help": "Folder or Hub id of a model with trained scoring heads."})
    output_dir: str = field(metadata={"help": f"Folder for {SEARCH_NAME} and {PLOT_NAME}."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a model on the Hub."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": f"Replace a {SEARCH_NAME} that is there."})
    gflops: float | None = field(
        default=None, metadata={"help": "What the chosen schedule may cost: GFLOPs for one image, as published."}
    )
    milliseconds: float | None = field(
        default=None,
        metadata={
            "help": "Instead of --gflops: milliseconds for one image on this device, in batches of --batch_size."
        },
    )
    images_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of images at any depth, used without labels, instead of a dataset with labels."},
    )
    num_images: int = field(default=256, metadata={"help": "Images to search on, drawn with --seed."})
    batch_size: int = field(default=32, metadata={"help": "Images in a batch."})
    apply: bool = field(
        default=False,
        metadata={"help": "Store the chosen schedule in the config.json of --model_name_or_path, a local TNT folder."},
    )
    dtype: str = field(
        default="float32", metadata={"help": "Weights and activations.", "choices": ("float32", "float16", "bfloat16")}
    )
    attn_implementation: str = field(default="sdpa", metadata={"help": "sdpa, eager or flash_attention_2."})
    use_cpu: bool = field(default=False, metadata={"help": "Search on the CPU although there is a GPU."})
    seed: int = field(default=0, metadata={"help": "Seed of the draw of images and of whatever else is random."})

    def __post_init__(self):
        for name in ("num_images", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")
        if (self.gflops is None) == (self.milliseconds is None):
            raise ValueError(
                f"Exactly one of --gflops and --milliseconds must be given, got {self.gflops} and {self.milliseconds}."
            )
        if self.images_dir is not None and not Path(self.images_dir).is_dir():
            raise ValueError(f"--images_dir must be a folder of images, got {self.images_dir}.")


def check_destinations(arguments: SearchArguments) -> None:
    """
    Check that the results can be written, would replace no others, and that the schedule can be applied if asked for.

    Raises:
        ValueError: If the output folder cannot be written to or holds results that may not be replaced, or the model
            is no local TNT folder whose config can be written.
    """
    check_no_results(arguments.output_dir, arguments.overwrite_output_dir, SEARCH_NAME)
    if not arguments.apply:
        return
    folder = arguments.model_name_or_path
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"--apply needs a local folder with a config.json as --model_name_or_path, got {folder}.")
    allowed = (TntViTConfig.model_type, TntDeiTConfig.model_type)
    model_type = json.loads(path.read_text()).get("model_type")
    if model_type not in allowed:
        raise ValueError(
            f"--apply needs a TNT checkpoint: the `model_type` of {path} must be one of {', '.join(allowed)}, got "
            f"{model_type!r}."
        )
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--apply cannot write to {folder}.")


def apply_schedule(folder: str | Path, row: dict[str, Any]) -> Path:
    """Store the schedule of a row in the config of a saved TNT model; every other field stays as it is."""
    path = Path(folder) / "config.json"
    settings = {name: row[name] for name in ("prune_layers", "keep_rates", "num_similar_tokens")}
    return write_json(path, {**json.loads(path.read_text()), **settings, "selection": "relevance"})


def read_images(
    arguments: SearchArguments,
    data_arguments: DataArguments,
    model: TntViTForImageClassification | TntDeiTForImageClassification,
    image_processor: BaseImageProcessor,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Draw and preprocess the images to search on.

    Returns:
        `pixel_values` of shape `(num_images, num_channels, height, width)`, and `labels` of shape `(num_images,)` or
        None with `images_dir`.

    Raises:
        ValueError: If there are no images, one cannot be read, or images or labels do not fit the model.
    """
    if arguments.images_dir is None:
        images = load_images(data_arguments, train=False, validation=True)
        split = images["validation"].shuffle(seed=arguments.seed)
        images["validation"] = split.select(range(min(arguments.num_images, len(split))))
        split = prepare_data(images, model, image_processor, data_arguments)["validation"]
        split = evaluation_images(split, image_processor)
        examples = [split[index] for index in range(len(split))]  # one at a time: photos are large until resized
        pixel_values = torch.stack([example["pixel_values"] for example in examples])
        return pixel_values, torch.tensor([example["labels"] for example in examples])
    if data_arguments.dataset_name or data_arguments.validation_dir:
        raise ValueError("Give either --images_dir or --dataset_name / --validation_dir, not both.")
    check_input_size(image_processor, height_and_width(model.config.image_size), model.config.num_channels)
    return read_unlabelled_images(arguments.images_dir, image_processor, arguments.num_images, arguments.seed), None


@dataclass
class Candidate:
    """A schedule, its cost in the unit of the target, and what has been counted on the images seen so far."""

    schedule: Schedule
    cost: float
    num_images: int = 0
    divergence: float = 0.0
    num_agreeing: int = 0
    num_correct: int = 0

    @property
    def kl(self) -> float:
        """Mean KL divergence from the unpruned model in nats."""
        return self.divergence / self.num_images


class _Scorer:
    """Compares a model under any schedule with itself unpruned."""

    def __init__(
        self,
        model: nn.Module,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None,
        batch_size: int,
        seed: int,
        progress: tqdm,
    ):
        self.model, self.pixel_values, self.batch_size, self.seed = model, pixel_values, batch_size, seed
        self.labels = None if labels is None else labels.to(model.device)
        self.progress = progress
        starts = range(0, len(pixel_values), batch_size)
        batches = (slice(start, start + batch_size) for start in starts)
        self.expected = torch.cat([self._log_probabilities(part, UNPRUNED) for part in batches])
        if not self.expected.isfinite().all():
            raise ValueError(f"The unpruned model gives logits that are not finite in {model.dtype}.")

    def score(self, candidate: Candidate, num_images: int) -> None:
        """Add those of the first `num_images` images that the candidate has not seen."""
        while candidate.num_images < num_images:
            part = slice(candidate.num_images, min(candidate.num_images + self.batch_size, num_images))
            log_probabilities = self._log_probabilities(part, candidate.schedule)
            expected = self.expected[part]
            classes = log_probabilities.argmax(dim=-1)
            divergence = nn.functional.kl_div(log_probabilities, expected, reduction="sum", log_target=True)
            candidate.divergence += divergence.item()
            candidate.num_agreeing += (classes == expected.argmax(dim=-1)).sum().item()
            if self.labels is not None:
                candidate.num_correct += (classes == self.labels[part]).sum().item()
            candidate.num_images = part.stop

    def _log_probabilities(self, part: slice, schedule: Schedule) -> torch.Tensor:
        pixel_values = self.pixel_values[part].to(self.model.device)
        generator = torch.Generator(self.model.device).manual_seed(self.seed)
        self.progress.update(len(pixel_values))
        outputs = self.model(pixel_values, schedule=schedule, generator=generator)
        return outputs.logits.float().log_softmax(dim=-1)


@torch.inference_mode()
def search_schedules(
    model: TntViTForImageClassification | TntDeiTForImageClassification,
    pixel_values: torch.Tensor,
    labels: torch.Tensor | None,
    target: Target,
    *,
    batch_size: int = 32,
    seed: int = 0,
    budget_shares: Sequence[float] = BUDGET_SHARES,
) -> dict[str, Any]:
    """
    Search for the schedules whose answers differ least from those of the unpruned model.

    At the target and at a few other budgets, one, two, three or nearly all layers whose scoring heads learn are
    pruned, with and without similar tokens. All candidates see a few images, the better half of each budget twice as
    many, and so on; the best within the target is then varied at the cost of the target. Schedules are ranked by the
    mean KL divergence from the unpruned model, which needs no labels and is smoother than accuracy. The best of many
    is flattered by the images it was chosen on: measure it on others.

    Args:
        model: The classifier; its own schedule does not matter.
        pixel_values (`torch.Tensor` of shape `(num_images, num_channels, height, width)`): Preprocessed images.
        labels (`torch.LongTensor` of shape `(num_images,)`, *optional*): For `top1`, which ranks nothing.
        target ([`~tnt_hf.evaluation.search_space.Target`]): From [`~tnt_hf.evaluation.search_space.find_target`].
        batch_size (`int`): Images in a batch.
        seed (`int`): Seed of random partitions, if the config asks for them.
        budget_shares (`Sequence[float]`):
            What the other budgets cost, as shares of the unpruned model's cost; they fill the Pareto set.

    Returns:
        `dict`: Facts of device and run, and `target` (`unit`, `limit`), `finalists`, `pareto`, `chosen`, `baseline`.
        Finalists are the rows that saw all images: `schedule`, `prune_layers`, `keep_rates`, `num_similar_tokens`,
        `gflops` and `gflops_executed` (see [`count_gflops`]), `milliseconds_per_image` (predicted; None if the target
        is in GFLOPs), `agreement` with the unpruned model's top-1 (percent), `kl` (nats), `top1` (percent; None
        without labels). `pareto` are those with no other as cheap and as close, by cost; `chosen` is the closest
        within the target, however much cheaper, with its `measured_milliseconds_per_image` beside the prediction (None
        likewise); `baseline` is what [`schedule_for`] makes of the target, None if
        nothing meets it.

    Raises:
        ValueError: If there are no images, or the model has fewer than two classes.
    """
    if len(pixel_values) == 0:
        raise ValueError("`pixel_values` must hold at least one image, got none.")
    if model.config.num_labels < 2:
        raise ValueError(f"`num_labels` must be at least 2 to compare answers, got {model.config.num_labels}.")
    with evaluation_mode(model):
        with tqdm(desc="Scoring", unit="image") as progress:
            scorer = _Scorer(model, pixel_values, labels, batch_size, seed, progress)
            finalists, baseline = _search(scorer, target, budget_shares)
        chosen = next(candidate for candidate in finalists if candidate.cost <= target.limit)
        is_timed = target.unit == "milliseconds_per_image"
        milliseconds = 1000 * measure_seconds(model, batch_size, chosen.schedule) if is_timed else None
    rows = [_row(candidate, target, labels is not None) for candidate in finalists]
    return {
        **device_facts(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
        "batch_size": batch_size,
        "seed": seed,
        "num_images": len(pixel_values),
        "used_labels": labels is not None,
        "target": {"unit": target.unit, "limit": target.limit},
        "finalists": rows,
        "pareto": pareto_rows(rows, target.unit),
        "chosen": {**rows[finalists.index(chosen)], "measured_milliseconds_per_image": milliseconds},
        "baseline": next((row for row in rows if row["schedule"] == baseline), None),
    }


def _search(scorer: _Scorer, target: Target, budget_shares: Sequence[float]) -> tuple[list[Candidate], str | None]:
    """Candidates that saw all images, best first, and the name of the baseline among them."""
    num_images = len(scorer.pixel_values)
    first_images = max(MIN_FIRST_IMAGES, round(FIRST_SHARE * num_images))
    finalists, seen = [], set()

    def add_best(schedules, first_images):
        new = dict.fromkeys(schedule for schedule in schedules if schedule not in seen)
        seen.update(new)
        candidates = [Candidate(schedule, target.price(schedule)) for schedule in new]
        finalists.extend(_halve(candidates, scorer, first_images))

    add_best([UNPRUNED], num_images)
    full_cost = finalists[0].cost
    for budget in (target, *(replace(target, limit=share * full_cost) for share in budget_shares)):
        add_best(first_schedules(budget), first_images)
    for share in REFINEMENT_STEPS:
        best = min((candidate for candidate in finalists if candidate.cost <= target.limit), key=_rank)
        step = max(1, round(share * target.config.num_patches))
        add_best(neighbouring_schedules(best.schedule, target, step), max(first_images, num_images // 4))
    baseline = None
    with suppress(ValueError):
        schedule = schedule_for(target.config, **target.budget())
        baseline = schedule.name
        if schedule not in (candidate.schedule for candidate in finalists):
            finalists.append(Candidate(schedule, target.price(schedule)))
            scorer.score(finalists[-1], num_images)
    return sorted(finalists, key=_rank), baseline


def _rank(candidate: Candidate) -> tuple[float, float, str]:
    """Sorts the best first."""
    return candidate.kl if math.isfinite(candidate.kl) else math.inf, candidate.cost, candidate.schedule.name


def _halve(candidates: list[Candidate], scorer: _Scorer, num_images: int) -> list[Candidate]:
    """Those left of the candidates, best first, when every round drops half of them and doubles the images."""
    while candidates:
        num_images = min(num_images, len(scorer.pixel_values))
        for candidate in candidates:
            scorer.score(candidate, num_images)
        candidates.sort(key=_rank)
        if num_images == len(scorer.pixel_values):
            break
        candidates = candidates[: max(MIN_SURVIVORS, math.ceil(len(candidates) / 2))]
        num_images *= 2
    return candidates


def _row(candidate: Candidate, target: Target, used_labels: bool) -> dict[str, Any]:
    schedule = candidate.schedule
    return {
        "schedule": schedule.name,
        **schedule.settings,
        "gflops": count_gflops(target.config, schedule=schedule),
        "gflops_executed": count_gflops(target.config, schedule=schedule, as_executed=True),
        "milliseconds_per_image": candidate.cost if target.unit == "milliseconds_per_image" else None,
        "agreement": 100 * candidate.num_agreeing / candidate.num_images,
        "kl": candidate.kl,
        "top1": 100 * candidate.num_correct / candidate.num_images if used_labels else None,
    }


def pareto_rows(rows: Sequence[dict[str, Any]], unit: str) -> list[dict[str, Any]]:
    """The rows that no other matches in both cost and KL divergence, by cost."""
    front = []
    for row in sorted(rows, key=lambda row: (row[unit], row["kl"])):
        if not front or row["kl"] < front[-1]["kl"]:
            front.append(row)
    return front


def write_search(output_dir: str | Path, results: dict[str, Any]) -> Path:
    """Write `results` as `search.json` and their plot as `search.png`."""
    path = write_json(Path(output_dir) / SEARCH_NAME, results)
    plot_pareto(results, path.with_name(PLOT_NAME))
    return path


def plot_pareto(results: dict[str, Any], path: str | Path) -> None:
    """Plot agreement with the unpruned model against cost: all finalists, the Pareto set and the chosen schedule."""
    unit, limit = results["target"]["unit"], results["target"]["limit"]
    figure = Figure(figsize=(8, 5.5), layout="constrained", dpi=150)
    axes = figure.subplots()

    def plot(rows, marker, label, **style):
        axes.plot([row[unit] for row in rows], [row["agreement"] for row in rows], marker, label=label, **style)

    baseline, chosen = results["baseline"], results["chosen"]
    plot(results["finalists"], "o", "finalists", color="0.7", markersize=5)
    plot(results["pareto"], "o", "least divergence at its cost (Pareto set)", color="#0072B2")
    if baseline is not None:
        label = f"not searched: {baseline['schedule']}"
        plot([baseline], "s", label, color="black", markerfacecolor="none", markersize=11)
    plot([chosen], "*", f"chosen: {chosen['schedule']}", color="#D55E00", markersize=17)
    axes.axvline(limit, color="#D55E00", linestyle="--", linewidth=1, label=f"target: {limit:.4g}")
    axes.set_title(f"Pruning schedules of {results['model']}", fontsize=14, wrap=True)
    axes.set_xlabel(COST_LABELS[unit], fontsize=12)
    axes.set_ylabel("same top-1 class as unpruned (% of images)", fontsize=12)
    axes.tick_params(labelsize=11)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.legend(fontsize=10, loc="lower right")
    figure.savefig(path)


def format_search(results: dict[str, Any]) -> str:
    """The Pareto set, the chosen schedule and the baseline as a table for the console."""
    columns = {
        "": "{}",
        "schedule": "{}",
        "gflops": "{:.4f}",
        "milliseconds_per_image": "{:.3f}",
        "agreement": "{:.2f}",
        "kl": "{:.5f}",
        "top1": "{:.2f}",
    }
    if not results["used_labels"]:
        del columns["top1"]
    if results["target"]["unit"] == "gflops":
        del columns["milliseconds_per_image"]
    rows = {row["schedule"]: {"": "", **row} for row in results["pareto"]}
    for mark in ("baseline", "chosen"):
        if results[mark] is not None:
            rows[results[mark]["schedule"]] = {**results[mark], "": mark}
    target, measured = results["target"], results["chosen"]["measured_milliseconds_per_image"]
    facts = [
        f"target {target['limit']:.6g} {target['unit']}",
        *([] if measured is None else [f"chosen measured at {measured:.6g}"]),
        format_facts(results, results["num_images"]),
    ]
    return f"{format_rows(list(rows.values()), columns)}\n{'; '.join(facts)}"


__all__ = [
    "SearchArguments",
    "apply_schedule",
    "check_destinations",
    "format_search",
    "pareto_rows",
    "plot_pareto",
    "read_images",
    "search_schedules",
    "write_search",
]
