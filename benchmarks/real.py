"""
Compare token reductions on a network of real size and photographs, at equal executed compute.

    python -m benchmarks.real --model models/dinov2_small --images data/photos/validation \
        --unlabelled data/photos/unlabelled --output_dir benchmarks/results/real

The network is a plain ViT, such as `python -m benchmarks.real_network` makes. Every method sees the same weights and
images; what a method leaves open is chosen by the divergence on unlabelled images. `results.json` in the output folder
has one row for each method and budget: top-1, how often the answer is that of the unreduced network, the KL divergence
of the answers from those of the unreduced network, and the rate. Methods run in turn on each batch, so that a load on
the machine falls on all of them alike.
"""

import json
import math
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import BaseImageProcessor, PreTrainedModel, ViTForImageClassification

from tnt_hf.command_line import clear_errors, parse_recipe_and_flags
from tnt_hf.conversion import load_image_processor
from tnt_hf.data import DataArguments, class_names, decode_image, find_images, load_images, pixel_values_of
from tnt_hf.labels import match_classes, names_in_order
from tnt_hf.results import RESULTS_NAME, check_no_results, device_facts, markdown_table, weights_digests, write_json
from tnt_hf.timing import timed

from .reduced_vit import UNREDUCED, Reduction, count_products, reduced_logits
from .rivals import METHODS, ON_SMALLER_IMAGES, candidates


BUDGETS = [0.7, 0.5, 0.35, 0.3, 0.25]
DEFAULT_METHODS = [*METHODS, f"token_merging{ON_SMALLER_IMAGES}", f"clusters{ON_SMALLER_IMAGES}"]


@dataclass
class RealBenchmarkArguments:
    """Which methods to compare on which network and photographs."""

    model: str = field(metadata={"help": "Folder or Hub id of a ViT for image classification."})
    images: str = field(metadata={"help": "Validation photographs, one subfolder for each class."})
    unlabelled: str | None = field(
        default=None, metadata={"help": "Other photographs, of which settings that a method leaves open are chosen."}
    )
    output_dir: str | None = field(default=None, metadata={"help": "Folder for results.json."})
    methods: list[str] = field(
        default_factory=lambda: list(DEFAULT_METHODS),
        metadata={"help": f"Of {', '.join(METHODS)}, those that reduce tokens also with {ON_SMALLER_IMAGES}."},
    )
    budgets: list[float] = field(
        default_factory=lambda: list(BUDGETS), metadata={"help": "Shares of the multiply-accumulates to execute."}
    )
    reference: str = field(
        default="clusters", metadata={"help": "Method from which the divergences of the others are told."}
    )
    max_images: int | None = field(default=None, metadata={"help": "Use as many validation photographs, drawn."})
    num_unlabelled: int = field(default=64, metadata={"help": "Use as many of the other photographs."})
    batch_size: int = field(default=8, metadata={"help": "Photographs in a forward pass."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace results in the output folder."})

    def __post_init__(self):
        for budget in self.budgets:
            if not 0 < budget < 1:
                raise ValueError(f"--budgets must be between 0 and 1, got {budget}.")
        if self.reference not in self.methods:
            raise ValueError(f"--reference must be one of --methods, {', '.join(self.methods)}, got {self.reference}.")


@dataclass
class _Entry:
    method: str
    budget: float
    reduction: Reduction
    num_candidates: int = 1
    logits: list[torch.Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def divergences(logits: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """KL divergence of each answer from the expected one: twice `(num_images, num_labels)` -> `(num_images,)`."""
    expected, logits = expected.log_softmax(dim=-1), logits.log_softmax(dim=-1)
    return nn.functional.kl_div(logits, expected, reduction="none", log_target=True).sum(dim=-1)


def run_real_benchmark(arguments: RealBenchmarkArguments) -> dict[str, Any]:
    """
    Evaluate all methods at all budgets.

    Raises:
        ValueError: If the photographs are not of classes of the model, a method is unknown, cannot meet a budget or
            needs unlabelled images; before any evaluation.
    """
    check_no_results(arguments.output_dir, arguments.overwrite_output_dir)
    model = ViTForImageClassification.from_pretrained(arguments.model).eval()
    image_processor = load_image_processor(arguments.model)
    offered = {
        (method, budget): candidates(model.config, method, budget)
        for budget in arguments.budgets
        for method in arguments.methods
    }
    needing_choice = sorted({method for (method, _), options in offered.items() if len(options) > 1})
    if needing_choice and arguments.unlabelled is None:
        raise ValueError(f"--unlabelled is needed to choose settings of {', '.join(needing_choice)}.")
    data = DataArguments(validation_dir=arguments.images, max_eval_samples=arguments.max_images)
    pixel_values, labels = read_photographs(data, model, image_processor)

    entries = [_Entry("unreduced", 1.0, UNREDUCED)]
    unlabelled = expected = None
    if needing_choice:
        paths = find_images(arguments.unlabelled, "unlabelled")
        paths = random.Random(0).sample(paths, min(arguments.num_unlabelled, len(paths)))
        unlabelled = decode_photographs(image_processor, [{"path": str(path), "bytes": None} for path in paths])
        expected = _classify(model, unlabelled, UNREDUCED, arguments.batch_size)
    for (method, budget), options in tqdm(offered.items(), "choosing"):
        chosen = options[0]
        if len(options) > 1:
            chosen = _choose(model, unlabelled, expected, options, arguments.batch_size)
        entries.append(_Entry(method, budget, chosen, len(options)))
    _evaluate(model, pixel_values, entries, arguments.batch_size)
    return {
        "model": Path(arguments.model).name,
        "weights": weights_digests(arguments.model),
        "dataset": data.source,
        "num_images": len(labels),
        "num_unlabelled": 0 if unlabelled is None else len(unlabelled),
        **device_facts(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch_size": arguments.batch_size,
        "reference": arguments.reference,
        "gmacs_unreduced": count_products(model.config, UNREDUCED) / 1e9,
        "rows": _rows(model, entries, labels, arguments.reference),
    }


def read_photographs(
    data: DataArguments, model: PreTrainedModel, image_processor: BaseImageProcessor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The validation photographs as a model sees them, `(num_images, num_channels, height, width)`, and their classes in
    its order, `(num_images,)`.

    Raises:
        ValueError: If they are of other classes than the model's.
    """
    images = load_images(data, train=False, validation=True)["validation"]
    order = match_classes(class_names(images), names_in_order(model.config.id2label))
    if order is None:
        raise ValueError(f"The classes of --images {data.validation_dir} are not those of the model.")
    labels = torch.tensor([order[label] for label in images["label"]])
    return decode_photographs(image_processor, images["image"]), labels


def decode_photographs(image_processor: BaseImageProcessor, records: Sequence[dict[str, Any]]) -> torch.Tensor:
    """Undecoded images as a model sees them, `(num_images, num_channels, height, width)`."""
    return torch.cat([pixel_values_of(image_processor, decode_image(record)) for record in tqdm(records, "decoding")])


@torch.inference_mode()
def _classify(
    model: ViTForImageClassification, pixel_values: torch.Tensor, reduction: Reduction, batch_size: int
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.cat([reduced_logits(model, batch, reduction, generator) for batch in pixel_values.split(batch_size)])


def _choose(
    model: ViTForImageClassification,
    pixel_values: torch.Tensor,
    expected: torch.Tensor,
    options: Sequence[Reduction],
    batch_size: int,
) -> Reduction:
    """
    The option whose answers diverge least from the expected ones, by successive halving: all options answer an eighth
    of the images, the better half of them three eighths, the better half of those all.
    """
    answers: list[torch.Tensor] = [expected[:0]] * len(options)
    ranked = list(range(len(options)))
    for eighths in (1, 3, 8):
        num_images = math.ceil(len(pixel_values) * eighths / 8)
        found = {}
        for option in ranked:
            new = pixel_values[len(answers[option]) : num_images]
            new_answers = _classify(model, new, options[option], batch_size)
            answers[option] = torch.cat((answers[option], new_answers))
            found[option] = divergences(answers[option], expected[:num_images]).mean().item()
        ranked = sorted(found, key=found.get)[: math.ceil(len(found) / 2)]
    return options[ranked[0]]


@torch.inference_mode()
def _evaluate(
    model: ViTForImageClassification, pixel_values: torch.Tensor, entries: Sequence[_Entry], batch_size: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    for entry in entries:
        reduced_logits(model, pixel_values[:1], entry.reduction, generator)
    for batch in tqdm(pixel_values.split(batch_size), "evaluating", unit="batch"):
        for entry in entries:
            logits, seconds = timed(partial(reduced_logits, model, batch, entry.reduction, generator), model.device)
            entry.logits.append(logits)
            entry.seconds.append(seconds / len(batch))


def _rows(
    model: ViTForImageClassification, entries: Sequence[_Entry], labels: torch.Tensor, reference: str
) -> list[dict[str, Any]]:
    unreduced, full = torch.cat(entries[0].logits), count_products(model.config, UNREDUCED)
    divergence = {
        (entry.method, entry.budget): divergences(torch.cat(entry.logits), unreduced).double() for entry in entries
    }
    rows = []
    for entry in entries:
        own = divergence[entry.method, entry.budget]
        answers = torch.cat(entry.logits).argmax(dim=-1)
        row = {
            "method": entry.method,
            "budget": entry.budget,
            "share": count_products(model.config, entry.reduction) / full,
            "top1": percent(answers == labels),
            "agreement": percent(answers == unreduced.argmax(dim=-1)),
            "kl": own.mean().item(),
            "kl_standard_error": standard_error(own),
        }
        if (other := divergence.get((reference, entry.budget))) is not None:
            row["kl_over_reference"] = (own - other).mean().item()
            row["kl_over_reference_standard_error"] = standard_error(own - other)
        row["images_per_second"] = 1 / statistics.median(entry.seconds)
        row["speedup"] = statistics.median(entries[0].seconds) / statistics.median(entry.seconds)
        row["num_candidates"] = entry.num_candidates
        row["settings"] = {
            name: value for name, value in asdict(entry.reduction).items() if value != getattr(UNREDUCED, name)
        }
        rows.append(row)
    return rows


def percent(is_right: torch.Tensor) -> float:
    return 100 * is_right.double().mean().item()


def standard_error(values: torch.Tensor) -> float:
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else 0.0


def format_real_table(results: dict[str, Any]) -> str:
    """The rows as a table for the console."""
    columns = {
        "budget": "{:.2f}",
        "method": "{}",
        "share": "{:.3f}",
        "top1": "{:.1f}",
        "agreement": "{:.1f}",
        "kl": "{:.4f}",
        "kl_standard_error": "{:.4f}",
        "speedup": "{:.2f}",
    }
    return format_rows(results, columns)


def format_rows(results: dict[str, Any], columns: dict[str, str]) -> str:
    """The columns of the rows, each in its format such as `"{:.2f}"`, and what they were measured on."""
    rows = [[text.format(row[name]) for name, text in columns.items()] for row in results["rows"]]
    versions = results["versions"]
    return markdown_table([*columns], rows) + (
        f"{results['num_images']} images of {results['dataset']}; {results['device']}, {results['num_threads']} "
        f"threads, {results['dtype']}, batch {results['batch_size']}; torch {versions['torch']}, transformers "
        f"{versions['transformers']}"
    )


def main() -> None:
    with clear_errors():
        (arguments,) = parse_recipe_and_flags((RealBenchmarkArguments,), sys.argv[1:])
        results = run_real_benchmark(arguments)
    print(format_real_table(results))
    if arguments.output_dir is not None:
        write_json(Path(arguments.output_dir) / RESULTS_NAME, results)
    else:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
