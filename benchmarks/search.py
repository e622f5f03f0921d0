"""What a search for schedules on training images gains over the rule, on validation images at equal compute."""

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import default_data_collator

from tnt_hf.conversion import load_classifier, load_image_processor
from tnt_hf.data import DataArguments, evaluation_images, load_images, prepare_data
from tnt_hf.evaluation import search_schedules
from tnt_hf.evaluation.search_space import Target
from tnt_hf.results import device_facts
from tnt_hf.schedules_tnt import UNPRUNED, Schedule, count_gflops, schedule_for


@dataclass
class SearchBenchmarkArguments:
    """Which model with trained heads to search schedules for, at which budgets, on how many images."""

    model_name_or_path: str = field(metadata={"help": "Folder or Hub id of a model with trained scoring heads."})
    budgets: list[float] = field(
        default_factory=lambda: [0.5, 0.4, 0.3],
        metadata={"help": "Executed GFLOPs as shares of those of the unpruned model."},
    )
    num_images: int = field(default=256, metadata={"help": "Training images to search on, drawn with --seed."})
    batch_size: int = field(default=32, metadata={"help": "Images in a batch."})
    seed: int = field(default=0, metadata={"help": "Seed of the draw of images."})
    use_cpu: bool = field(default=False, metadata={"help": "Run on the CPU although there is a GPU."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder for search.json."})


def _executed_gflops(config: Any, schedule: Schedule) -> float:
    return count_gflops(config, schedule=schedule, as_executed=True)


def run_search_benchmark(arguments: SearchBenchmarkArguments, data_arguments: DataArguments) -> dict[str, Any]:
    """
    Search on training images, evaluate on validation images.

    Returns:
        `dict`: Facts about model, data and device, and `rows`, the unpruned model and for each budget the schedule of
        the rule ([`schedule_for`]) and of the search: `schedule`, `gflops` (executed), `top1` (percent), `loss`
        (cross-entropy), `kl` (mean KL divergence from the unpruned model, nats). Rows of the search also hold what it
        changes over the rule on the same images, `top1_change`, `loss_change` and `kl_change`, each with a
        `_standard_error` over images.
    """
    images = load_images(data_arguments, train=True, validation=True)
    images["train"] = images["train"].shuffle(seed=arguments.seed).select(range(arguments.num_images))
    model = load_classifier(arguments.model_name_or_path).to(Accelerator(cpu=arguments.use_cpu).device).eval()
    image_processor = load_image_processor(arguments.model_name_or_path, "main")
    prepared = prepare_data(images, model, image_processor, data_arguments)
    splits = {name: evaluation_images(split, image_processor) for name, split in prepared.items()}
    pixel_values = torch.stack([example["pixel_values"] for example in splits["train"]])
    full = _executed_gflops(model.config, UNPRUNED)

    schedules = {("unpruned", 1.0): UNPRUNED}
    for budget in arguments.budgets:
        schedules["rule", budget] = schedule_for(model.config, speedup=1 / budget)
        target = Target("gflops_executed", budget * full, _executed_gflops, model.config)
        found = search_schedules(model, pixel_values, None, target, batch_size=arguments.batch_size, budget_shares=())[
            "chosen"
        ]
        fields = (found[name] for name in ("schedule", *UNPRUNED.settings))
        schedules["search", budget] = Schedule(*fields)
    answers = _answers(model, splits["validation"], schedules, arguments.batch_size)

    rows = []
    for (method, budget), schedule in schedules.items():
        row = {
            "method": method,
            "budget": budget,
            "schedule": schedule.name,
            "gflops": _executed_gflops(model.config, schedule),
        }
        for name, values in answers[method, budget].items():
            row[name] = values.mean().item()
            if method == "search":
                changes = (values - answers["rule", budget][name]).tolist()
                row[f"{name}_change"] = statistics.mean(changes)
                row[f"{name}_change_standard_error"] = statistics.stdev(changes) / math.sqrt(len(changes))
        rows.append(row)
    return {
        "model": arguments.model_name_or_path,
        "dataset": data_arguments.source,
        **device_facts(model.device),
        "dtype": "float32",
        "batch_size": arguments.batch_size,
        "seed": arguments.seed,
        "num_search_images": arguments.num_images,
        "num_images": len(splits["validation"]),
        "rows": rows,
    }


@torch.inference_mode()
def _answers(
    model: nn.Module, split: Any, schedules: dict[tuple[str, float], Schedule], batch_size: int
) -> dict[tuple[str, float], dict[str, torch.Tensor]]:
    """What each image contributes to top-1 (percent), loss and KL divergence, by schedule."""
    collected = {key: {"top1": [], "loss": [], "kl": []} for key in schedules}
    for batch in tqdm(DataLoader(split, batch_size=batch_size, collate_fn=default_data_collator), unit="batch"):
        pixel_values, labels = batch["pixel_values"].to(model.device), batch["labels"].to(model.device)
        expected = None
        for key, schedule in schedules.items():
            log_probabilities = model(pixel_values, schedule=schedule).logits.float().log_softmax(dim=-1)
            expected = log_probabilities if expected is None else expected
            divergences = nn.functional.kl_div(log_probabilities, expected, reduction="none", log_target=True)
            collected[key]["top1"].append(100.0 * (log_probabilities.argmax(dim=-1) == labels))
            collected[key]["loss"].append(nn.functional.nll_loss(log_probabilities, labels, reduction="none"))
            collected[key]["kl"].append(divergences.sum(dim=-1))
    return {
        key: {name: torch.cat(parts).double() for name, parts in by_name.items()} for key, by_name in collected.items()
    }


__all__ = ["SearchBenchmarkArguments", "run_search_benchmark"]
