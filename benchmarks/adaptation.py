"""
What an adaptation of LayerNorms and biases gains on photographs: a network under its schedules, before and after.

    python -m benchmarks.adaptation --adapted runs/adapted --images data/photos/validation \
        --output_dir benchmarks/results/adaptation

Divergences are from the answers of the network unpruned before it was adapted. A schedule such as `full@154` is
smaller images alone.
"""

import json
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from tnt_hf.adaptation import ADAPTATION_NAME, set_adaptation
from tnt_hf.command_line import clear_errors, parse_recipe_and_flags
from tnt_hf.conversion import load_classifier, load_image_processor
from tnt_hf.data import DataArguments
from tnt_hf.inference import evaluation_mode
from tnt_hf.named_schedules import SCHEDULE_FORMS, parse_schedule, resolve_schedules
from tnt_hf.results import (
    RESULTS_NAME,
    check_no_results,
    device_facts,
    file_digest,
    recorded_training,
    write_json,
)
from tnt_hf.schedules_tnt import UNPRUNED, count_gflops

from .real import divergences, format_rows, percent, read_photographs, standard_error


@dataclass
class AdaptationBenchmarkArguments:
    """Which adapted model to evaluate on which photographs."""

    adapted: str = field(metadata={"help": f"Folder of a training that left {ADAPTATION_NAME}."})
    images: str = field(metadata={"help": "Validation photographs, one subfolder for each class."})
    schedules: list[str] = field(
        default_factory=lambda: [
            *("full", "1.4286x", "2x", "full@154", "2.8572x@168"),
            *("full@126", "4x@154", "4x@140", "full@112", "5.5556x@126"),
        ],
        metadata={"help": f"Schedules to evaluate: {SCHEDULE_FORMS}."},
    )
    output_dir: str | None = field(default=None, metadata={"help": "Folder for results.json."})
    max_images: int | None = field(default=None, metadata={"help": "Use as many validation photographs, drawn."})
    batch_size: int = field(default=8, metadata={"help": "Photographs in a forward pass."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace results in the output folder."})


def run_adaptation_benchmark(arguments: AdaptationBenchmarkArguments) -> dict[str, Any]:
    """
    Evaluate the network under all schedules, before and after its adaptation, on the same batches.

    Raises:
        ValueError: If the photographs are not of classes of the model, or it cannot carry out a schedule; before any
            evaluation.
    """
    check_no_results(arguments.output_dir, arguments.overwrite_output_dir)
    model = load_classifier(arguments.adapted)
    schedules = resolve_schedules(model.config, [parse_schedule(text) for text in arguments.schedules])
    data = DataArguments(validation_dir=arguments.images, max_eval_samples=arguments.max_images)
    pixel_values, labels = read_photographs(data, model, load_image_processor(arguments.adapted))

    answers = {}
    with torch.inference_mode(), evaluation_mode(model):
        for is_adapted in (False, True):
            set_adaptation(model, arguments.adapted, adapted=is_adapted)
            for schedule in tqdm(schedules, "adapted" if is_adapted else "original"):
                classify = partial(model, schedule=schedule)
                batches = [classify(batch).logits for batch in pixel_values.split(arguments.batch_size)]
                answers[is_adapted, schedule.name] = torch.cat(batches)
            if not is_adapted:
                batches = [
                    model(batch, schedule=UNPRUNED).logits for batch in pixel_values.split(arguments.batch_size)
                ]
                expected = torch.cat(batches)
    full = count_gflops(model.config, schedule=UNPRUNED, as_executed=True)
    rows = []
    for is_adapted in (False, True):
        for schedule in schedules:
            logits = answers[is_adapted, schedule.name]
            divergence = divergences(logits, expected).double()
            before = divergences(answers[False, schedule.name], expected).double()
            is_right = logits.argmax(dim=-1) == labels
            rows.append(
                {
                    "network": "adapted" if is_adapted else "original",
                    "schedule": schedule.name,
                    **schedule.settings,
                    "share": count_gflops(model.config, schedule=schedule, as_executed=True) / full,
                    "top1": percent(is_right),
                    "top1_drop": percent(expected.argmax(dim=-1) == labels) - percent(is_right),
                    "agreement": percent(logits.argmax(dim=-1) == expected.argmax(dim=-1)),
                    "kl": divergence.mean().item(),
                    "kl_standard_error": standard_error(divergence),
                    "kl_over_original": (divergence - before).mean().item(),
                    "kl_over_original_standard_error": standard_error(divergence - before),
                }
            )
    return {
        "model": Path(arguments.adapted).name,
        "adaptation_sha256": file_digest(Path(arguments.adapted) / ADAPTATION_NAME),
        "training": recorded_training(arguments.adapted),
        "dataset": data.source,
        "num_images": len(labels),
        **device_facts(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch_size": arguments.batch_size,
        "rows": rows,
    }


COLUMNS = {
    "network": "{}",
    "schedule": "{}",
    "share": "{:.3f}",
    "top1": "{:.1f}",
    "top1_drop": "{:.1f}",
    "agreement": "{:.1f}",
    "kl": "{:.4f}",
    "kl_standard_error": "{:.4f}",
}


def main() -> None:
    with clear_errors():
        (arguments,) = parse_recipe_and_flags((AdaptationBenchmarkArguments,), sys.argv[1:])
        results = run_adaptation_benchmark(arguments)
    print(format_rows(results, COLUMNS))
    if arguments.output_dir is None:
        print(json.dumps(results))
    else:
        write_json(Path(arguments.output_dir) / RESULTS_NAME, results)


if __name__ == "__main__":
    main()
