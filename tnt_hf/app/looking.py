"""An image and budgets -> what a classifier answers at each, which patches it keeps, and how long it takes."""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image as PILImage
from transformers import AutoImageProcessor

from .. import TntDeiTConfig, TntViTConfig
from ..conversion import is_plain_checkpoint, load_for_inference
from ..data import check_input_size
from ..schedules_tnt import UNPRUNED, Schedule, count_gflops, height_and_width, schedule_for
from ..timing import timed
from ..visualization import PrunedLayer, draw_left, patch_grid, shown_images, trace_tokens
from .token_merging import TokenMerging, merge_tokens, token_merging_for


REDUCTIONS = [1 + 0.25 * step for step in range(13)]
TIMED_SECONDS, MIN_ROUNDS, MAX_ROUNDS = 0.2, 3, 11
# One image alone leaves a processor idle in the layers of a small model; such a model is timed on a batch too.
BATCH_SIZE, SMALL_GFLOPS = 8, 1.0

# What is compared.
OWN, SMALLER_IMAGE, TOKEN_MERGING = "", "smaller image", "Token Merging"

# One model runs at a time: a second one would spoil the time of the first.
_running = threading.Lock()


@dataclass(frozen=True)
class Kept:
    """What a pruned layer leaves of the image, see [`draw_left`], and how many tokens are left."""

    layer: int
    num_tokens: int
    picture: PILImage.Image


@dataclass(frozen=True)
class Look:
    """
    A classifier's answer under one schedule, and its cost.

    `size` is the height and width of what the model computes on, in pixels, `gflops` are as executed, `probabilities`
    by label; `milliseconds` are for this image alone, and `batch_milliseconds` for each image in a batch of
    `BATCH_SIZE`, None for a large model.
    """

    size: tuple[int, int]
    gflops: float
    milliseconds: float
    batch_milliseconds: float | None
    probabilities: list[float]
    kept: list[Kept]


@dataclass(frozen=True)
class _Run:
    """A way to classify images: what it computes on, in pixels and patches, what it costs, and how it is called."""

    size: tuple[int, int]
    grid: tuple[int, int]
    gflops: float
    classify: Callable[[torch.Tensor], Any]
    trace: Callable[[torch.Tensor], tuple[torch.Tensor, list[PrunedLayer]]]


class Classifier:
    """
    A model, its image processor, and the schedule that each reduction of `REDUCTIONS` stands for.

    A plain checkpoint has no scoring heads that were trained, so it merges tokens by similarity alone.

    Args:
        folder (`str` or `Path`): Folder of a ViT, distilled DeiT or DINOv2, plain or TNT; none of its code is run.

    Raises:
        ValueError: If it cannot be loaded, or its image processor makes other images than it takes.
    """

    def __init__(self, folder: str | Path):
        self.is_trained = not is_plain_checkpoint(folder)
        self.model = load_for_inference(folder, attn_implementation="sdpa", use_safetensors=True).eval()
        self.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
        config = self.model.config
        check_input_size(self.image_processor, height_and_width(config.image_size), config.num_channels)
        self.schedules = dict(_reachable(self.model.config))
        self.is_small = count_gflops(self.model.config, schedule=UNPRUNED) < SMALL_GFLOPS

    def nearest(self, reduction: float) -> float:
        """The reduction closest to this one that can be reached: a key of `schedules`."""
        return min(self.schedules, key=lambda reachable: abs(reachable - reduction))

    def look(self, image: PILImage.Image, reductions: Sequence[float]) -> tuple[PILImage.Image, dict[float, Look]]:
        """
        The image as the model sees it, and what the model answers at each of `reductions`, or the nearest there is.

        Times are the fastest of a few runs on copies of this image, the schedules in turn, after one run of each.
        """
        reductions = list(dict.fromkeys(map(self.nearest, reductions)))
        view, looks = self._look(image, [self._run(self.schedules[reduction]) for reduction in reductions])
        return view, dict(zip(reductions, looks))

    def compare(
        self, image: PILImage.Image, reductions: Sequence[float]
    ) -> tuple[PILImage.Image, dict[tuple[float, str], Look]]:
        """
        As [`Classifier.look`], by budget and method: `OWN`, and `SMALLER_IMAGE` and `TOKEN_MERGING`, which execute at
        most as much, where they can.
        """
        runs = {}
        for reduction in dict.fromkeys(map(self.nearest, reductions)):
            runs[reduction, OWN] = self._run(self.schedules[reduction])
            if reduction == 1:
                continue
            if size := _smaller_image(self.model.config, reduction):
                runs[reduction, SMALLER_IMAGE] = self._run(size)
            if merging := token_merging_for(self.model.config, reduction):
                runs[reduction, TOKEN_MERGING] = self._run_of(merging)
        view, looks = self._look(image, [*runs.values()])
        return view, dict(zip(runs, looks))

    def _run(self, schedule: Schedule) -> _Run:
        config = self.model.config
        return _Run(
            height_and_width(schedule.compute_size or config.image_size),
            patch_grid(config, schedule),
            count_gflops(config, schedule=schedule, as_executed=True),
            partial(self.model, schedule=schedule),
            partial(trace_tokens, self.model, schedule=schedule),
        )

    def _run_of(self, merging: TokenMerging) -> _Run:
        def trace(pixel_values: torch.Tensor) -> tuple[torch.Tensor, list[PrunedLayer]]:
            logits, left = classify(pixel_values)
            return logits, [left]

        config, classify = self.model.config, partial(merge_tokens, self.model, counts=merging.counts)
        return _Run(height_and_width(config.image_size), patch_grid(config), merging.gflops, classify, trace)

    @torch.inference_mode()
    def _look(self, image: PILImage.Image, runs: Sequence[_Run]) -> tuple[PILImage.Image, list[Look]]:
        pixel_values = self.image_processor(image, return_tensors="pt")["pixel_values"]
        (view,) = shown_images(pixel_values, self.image_processor, [image])
        with _running:
            alone = self._time(pixel_values, runs)
            in_batch: list[float | None] = [None] * len(runs)
            if self.is_small:
                seconds = self._time(pixel_values.repeat(BATCH_SIZE, 1, 1, 1), runs)
                in_batch = [each / BATCH_SIZE for each in seconds]
            looks = []
            for run, milliseconds, batch_milliseconds in zip(runs, alone, in_batch):
                logits, layers = run.trace(pixel_values)
                kept = [
                    Kept(layer.layer, layer.kept.shape[1], picture)
                    for layer in layers
                    for picture in draw_left([view], layer, run.grid)
                ]
                probabilities = logits[0].softmax(dim=-1).tolist()
                looks.append(Look(run.size, run.gflops, milliseconds, batch_milliseconds, probabilities, kept))
        return view, looks

    def _time(self, pixel_values: torch.Tensor, runs: Sequence[_Run]) -> list[float]:
        """Milliseconds of each run."""

        def run_once() -> Iterator[float]:
            for run in runs:
                yield timed(partial(run.classify, pixel_values), self.model.device)[1]

        list(run_once())
        rounds: list[list[float]] = []
        seconds = 0.0
        while len(rounds) < MIN_ROUNDS or (len(rounds) < MAX_ROUNDS and seconds < TIMED_SECONDS):
            rounds.append(list(run_once()))
            seconds += sum(rounds[-1])
        return [1000 * min(each) for each in zip(*rounds)]


def _reachable(config: TntViTConfig | TntDeiTConfig) -> Iterator[tuple[float, Schedule]]:
    for reduction in REDUCTIONS:
        try:
            yield reduction, schedule_for(config, flops_reduction=reduction)
        except ValueError:
            continue


def _smaller_image(config: TntViTConfig | TntDeiTConfig, reduction: float) -> Schedule | None:
    """The largest image, smaller than usual, of which all patches cost no more than this budget; None if none does."""
    sides, patch = height_and_width(config.image_size), height_and_width(config.patch_size)
    limit = count_gflops(config, schedule=UNPRUNED, as_executed=True) / reduction
    for num_patches in range(sides[0] // patch[0] - 1, 0, -1):
        size = num_patches * patch[0], max(1, num_patches * sides[1] // sides[0]) * patch[1]
        schedule = replace(UNPRUNED, name="x".join(map(str, size)), compute_size=size)
        if count_gflops(config, schedule=schedule, as_executed=True) <= limit:
            return schedule
    return None


__all__ = ["OWN", "REDUCTIONS", "SMALLER_IMAGE", "TOKEN_MERGING", "Classifier", "Kept", "Look"]
