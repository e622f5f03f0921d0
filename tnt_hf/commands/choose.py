r"""
Choose how a model spends each budget best, on tokens and on pixels, by its answers to a few unlabelled images.

    tnt-hf choose --model_name_or_path models/dinov2_small --images_dir photos/unlabelled \
        --flops_reductions 1.5 2 3 4 --output_dir models/dinov2_small_tnt

Any ViT, distilled DeiT or DINOv2 will do, plain or TNT; no training takes place. The output folder holds the model,
which merges clusters, with the sizes that were chosen for budgets, which `set_budget` and schedules such as `3x`
follow, and the schedule of the first budget.
"""

import random
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..command_line import clear_errors, parse_flags
from ..conversion import load_classifier, load_image_processor
from ..data import decode_image, find_images, pixel_values_of
from ..evaluation import choose_schedules
from ..results import markdown_table
from ..token_reduction_tnt import SIZE_BIAS


@dataclass
class ChoiceArguments:
    """Which model, which images and which budgets."""

    model_name_or_path: str = field(metadata={"help": "Folder or Hub id of a ViT, distilled DeiT or DINOv2."})
    images_dir: str = field(metadata={"help": "Folder of images, in any layout; no labels are read."})
    output_dir: str | None = field(default=None, metadata={"help": "New folder for the model; none by default."})
    flops_reductions: list[float] = field(
        default_factory=lambda: [1.5, 2.0, 3.0, 4.0],
        metadata={"help": "Budgets: how many times fewer multiply-accumulates are executed."},
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a model on the Hub."})
    num_images: int = field(default=400, metadata={"help": "How many images are drawn from the folder."})
    batch_size: int = field(default=16, metadata={"help": "Images in a batch."})
    seed: int = field(default=0, metadata={"help": "Seed of the draw of images."})

    def __post_init__(self):
        for name in ("num_images", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")
        if self.output_dir is not None and Path(self.output_dir).exists():
            raise ValueError(f"--output_dir {self.output_dir} already exists: pass a new folder.")


def main() -> None:
    with clear_errors():
        (arguments,) = parse_flags((ChoiceArguments,), sys.argv[1:], __doc__)
        paths = find_images(arguments.images_dir, "images_dir")
        drawn = random.Random(arguments.seed).sample(paths, min(arguments.num_images, len(paths)))
        model = load_classifier(
            arguments.model_name_or_path,
            revision=arguments.model_revision,
            token_reduction="cluster",
        )
        image_processor = load_image_processor(arguments.model_name_or_path, arguments.model_revision)
        pixel_values = torch.cat(
            [pixel_values_of(image_processor, decode_image({"path": str(path), "bytes": None})) for path in drawn]
        )
        choices = choose_schedules(model, pixel_values, arguments.flops_reductions, arguments.batch_size)
    header = ["budget", "image size", "KL divergence from the unpruned model", "at its own image size and size_bias"]
    rows = [
        [f"{each.flops_reduction:g}x", str(size), f"{each.divergence:.4f}", f"{each.divergence_before:.4f}"]
        for each, (_, size) in zip(choices, model.config.budget_sizes)
    ]
    size_bias = SIZE_BIAS["cluster"] if model.config.size_bias is None else model.config.size_bias
    print(f"{markdown_table(header, rows)}\n{len(drawn)} images of {arguments.images_dir}; size_bias {size_bias}")
    if arguments.output_dir is not None:
        model.set_budget(flops_reduction=arguments.flops_reductions[0])
        model.save_pretrained(arguments.output_dir)
        image_processor.save_pretrained(arguments.output_dir)
        print(f"written to {arguments.output_dir}")
