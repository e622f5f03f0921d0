r"""
Measure what a model takes in time, and answers, under several schedules, beside its unpruned self.

    tnt-hf benchmark --model_name_or_path runs/demo
    tnt-hf benchmark --model_name_or_path google/vit-base-patch16-224 --schedules 1.5x 2x 3x --batch_sizes 1 8 32 \
        --validation_dir imagenet/val --output_dir runs/benchmark

Times are of the forward pass alone, in turns on the same weights. With `--validation_dir` or `--dataset_name` the
table has top-1 too. A plain checkpoint has no trained scoring heads, so it merges clusters. With `--output_dir`,
benchmark.json holds every figure.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import default_data_collator

from ..command_line import clear_errors, parse_flags
from ..conversion import load_for_inference, load_image_processor
from ..data import BadData, DataArguments, evaluation_images, load_images, prepare_data
from ..evaluation import LatencyRow, describe_run, evaluate_schedules, measure_latency
from ..named_schedules import SCHEDULE_FORMS, parse_schedule, resolve_schedules
from ..results import (
    Results,
    check_no_results,
    device_facts,
    markdown_table,
    recorded_training,
    weights_digests,
    write_json,
)
from ..schedules_tnt import UNPRUNED


BENCHMARK_NAME = "benchmark.json"


@dataclass
class BenchmarkArguments:
    """Which model to measure, and how."""

    model_name_or_path: str = field(
        metadata={"help": "Folder or Hub id of a ViT, distilled DeiT or DINOv2, plain or TNT."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a model on the Hub."})
    schedules: list[str] = field(
        default_factory=lambda: ["1.5x", "2x", "3x"],
        metadata={"help": f"Schedules to measure beside full: {SCHEDULE_FORMS}."},
    )
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8], metadata={"help": "Images in a batch."})
    num_rounds: int = field(default=7, metadata={"help": "Rounds in which all schedules run; the median is reported."})
    dtype: str = field(
        default="float32",
        metadata={"help": "Type of weights and activations.", "choices": ("float32", "float16", "bfloat16")},
    )
    use_cpu: bool = field(default=False, metadata={"help": "Use the CPU even if there is a GPU."})
    output_dir: str | None = field(
        default=None, metadata={"help": f"Folder for {BENCHMARK_NAME}. By default the table is only printed."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": f"Replace the {BENCHMARK_NAME} of the output folder."}
    )

    def __post_init__(self):
        if any(value < 1 for value in self.batch_sizes):
            raise ValueError(f"--batch_sizes must be at least 1, got {self.batch_sizes}.")
        if self.num_rounds < 3:
            raise ValueError(f"--num_rounds must be at least 3, got {self.num_rounds}.")
        self.schedules = [parse_schedule(text) for text in self.schedules]


def main() -> None:
    with clear_errors():
        arguments, data_arguments = parse_flags((BenchmarkArguments, DataArguments), sys.argv[1:], __doc__)
        check_no_results(arguments.output_dir, arguments.overwrite_output_dir, BENCHMARK_NAME)
        name, revision = arguments.model_name_or_path, arguments.model_revision
        model = load_for_inference(name, revision=revision, dtype=getattr(torch, arguments.dtype))
        schedules = list(dict.fromkeys([UNPRUNED, *resolve_schedules(model.config, arguments.schedules)]))
        split = None
        if data_arguments.validation_dir or data_arguments.dataset_name:
            image_processor = load_image_processor(name, revision)
            images = load_images(data_arguments, train=False, validation=True)
            split = prepare_data(images, model, image_processor, data_arguments)["validation"]

    accelerator = Accelerator(cpu=arguments.use_cpu)
    model.to(accelerator.device)
    rows = measure_latency(model, schedules, arguments.batch_sizes, arguments.num_rounds)
    results = None
    if split is not None:
        batch_size = max(arguments.batch_sizes)
        examples = evaluation_images(split, image_processor)
        batches = DataLoader(examples, batch_size=batch_size, collate_fn=default_data_collator)
        with clear_errors((BadData,)):
            accuracy = evaluate_schedules(model, batches, schedules, random_control=False)
        results = describe_run(
            accuracy,
            model,
            name=name,
            data_arguments=data_arguments,
            split=split,
            training=recorded_training(name),
            batch_size=batch_size,
            accelerator=accelerator,
            seed=0,
        )
    content = {
        "model": name,
        "weights_sha256": weights_digests(name),
        "token_reduction": model.config.token_reduction,
        **device_facts(model.device),
        "dtype": arguments.dtype,
        "num_rounds": arguments.num_rounds,
        "rows": [asdict(row) for row in rows],
        "accuracy": None if results is None else results.to_json(),
    }
    print(format_benchmark(content, rows, results))
    if arguments.output_dir is not None:
        print(f"written to {write_json(Path(arguments.output_dir) / BENCHMARK_NAME, content)}")


def format_benchmark(content: dict[str, Any], rows: Sequence[LatencyRow], results: Results | None) -> str:
    """A line for each schedule in a table in Markdown, and on what it was measured."""
    by_schedule: dict[str, list[LatencyRow]] = {}
    for row in rows:
        by_schedule.setdefault(row.schedule, []).append(row)
    top1 = {} if results is None else {row.schedule: f"{row.top1:.2f}" for row in results.rows}
    header = ["schedule", "GFLOPs as executed", "share", *(["top-1"] if top1 else [])]
    for row in by_schedule[UNPRUNED.name]:
        header += [f"batch {row.batch_size}: ms", "images/s", "speed-up"]
    lines = []
    for name, each in by_schedule.items():
        cells = [name, f"{each[0].gflops:.4g}", f"{each[0].share:.3f}", *([top1[name]] if top1 else [])]
        for row in each:
            cells += [f"{row.latency_ms:.1f}", f"{row.images_per_second:.1f}", f"{row.speedup:.2f}"]
        lines.append(cells)
    versions = content["versions"]
    facts = (
        f"{content['model']}, {content['token_reduction']}; {content['device']}, {content['num_threads']} threads, "
        f"{content['dtype']}, {content['num_rounds']} rounds; torch {versions['torch']}, transformers "
        f"{versions['transformers']}"
    )
    if results is not None:
        facts += f"; top-1 of {results.rows[0].num_images} images of {results.dataset}"
    return f"{markdown_table(header, lines)}\n{facts}"
