"""An image and budgets -> what a classifier answers at each, which patches it keeps, and how long it takes."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median

import torch
from PIL import Image as PILImage
from transformers import AutoImageProcessor, PreTrainedConfig

from tnt_hf import TntDeiTConfig, TntViTConfig
from tnt_hf.configuration_tnt import height_and_width
from tnt_hf.conversion import load_classifier
from tnt_hf.data import check_input_size
from tnt_hf.schedules import Schedule, count_gflops, schedule_for
from tnt_hf.throughput import timed
from tnt_hf.visualization import dim_dropped, patch_grid, seen_images


SPEEDUPS = [1 + 0.25 * step for step in range(13)]
SHOWN_AREA = 320**2  # pixels of a picture of kept patches
TIMED_SECONDS, TIMED_ROUNDS = 1.0, range(3, 12)

# One model runs at a time: its schedule is part of it, and a second one would spoil the time of the first.
_running = threading.Lock()


@dataclass(frozen=True)
class Kept:
    """The image with the patches dimmed that are gone after a layer, and how many are left."""

    layer: int
    indices: torch.Tensor
    picture: PILImage.Image


@dataclass(frozen=True)
class Look:
    """A classifier's answer under one schedule, and its cost; `probabilities` are by label."""

    schedule: Schedule
    gflops: float
    milliseconds: float
    probabilities: list[float]
    kept: list[Kept]


class Classifier:
    """
    A model, its image processor, and the schedule that each speed-up of `SPEEDUPS` stands for.

    A plain checkpoint has no scoring heads that were trained, so it merges tokens by similarity alone.

    Args:
        folder (`str` or `Path`): Folder of a ViT or distilled DeiT, plain or TNT; of its code nothing is run.

    Raises:
        ValueError: If it cannot be loaded, or its image processor makes images of another size.
    """

    def __init__(self, folder: str | Path):
        model_type = PreTrainedConfig.get_config_dict(folder)[0].get("model_type")
        self.is_trained = model_type in (TntViTConfig.model_type, TntDeiTConfig.model_type)
        fields = {} if self.is_trained else {"token_reduction": "merge", "relevance_weight": 0.0}
        self.model = load_classifier(folder, attn_implementation="sdpa", use_safetensors=True, **fields).eval()
        self.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
        check_input_size(self.image_processor, height_and_width(self.model.config.image_size))
        self.schedules = dict(_reachable(self.model.config))

    def schedule_at(self, speedup: float) -> Schedule:
        """The schedule of the nearest speed-up that can be reached."""
        return self.schedules[min(self.schedules, key=lambda reachable: abs(reachable - speedup))]

    @torch.inference_mode()
    def look(self, image: PILImage.Image, schedules: Sequence[Schedule]) -> tuple[PILImage.Image, list[Look]]:
        """
        The image as the model sees it, and what the model answers under each schedule.

        The time is the median of a few runs with this image alone, the schedules in turn, after one run of each.
        """
        pixel_values = self.image_processor(image, return_tensors="pt")["pixel_values"]
        with _running:
            outputs, seconds = self._run(pixel_values, schedules)
            gflops = []
            for schedule in schedules:
                self.model.set_schedule(**schedule.settings)
                gflops.append(count_gflops(self.model.config))
        view = self._view(pixel_values, image)
        grid = patch_grid(self.model.config)
        return view, [
            Look(
                schedule,
                cost,
                1000 * time,
                output.logits[0].softmax(dim=-1).tolist(),
                [
                    Kept(layer, indices[0], dim_dropped(view, indices[0], grid))
                    for layer, indices in zip(schedule.prune_layers, output.kept_indices or ())
                ],
            )
            for schedule, cost, time, output in zip(schedules, gflops, seconds, outputs)
        ]

    def _run(self, pixel_values: torch.Tensor, schedules: Sequence[Schedule]) -> tuple[list, list[float]]:
        def run_once():
            for schedule in schedules:
                self.model.set_schedule(**schedule.settings)
                yield timed(partial(self.model, pixel_values), self.model.device)

        outputs = [output for output, _ in run_once()]
        rounds = []
        for number in count(1):
            rounds.append([time for _, time in run_once()])
            is_enough = sum(map(sum, rounds)) > TIMED_SECONDS and number >= TIMED_ROUNDS.start
            if is_enough or number == TIMED_ROUNDS.stop:
                return outputs, [median(times) for times in zip(*rounds)]

    def _view(self, pixel_values: torch.Tensor, image: PILImage.Image) -> PILImage.Image:
        """What the model sees, in the shape of the image unless it sees a centre crop of it."""
        (view,) = seen_images(pixel_values, self.image_processor)
        width, height = view.size if getattr(self.image_processor, "do_center_crop", False) else image.size
        scale = (SHOWN_AREA / (width * height)) ** 0.5
        size = max(1, round(scale * width)), max(1, round(scale * height))
        return view.resize(size, PILImage.Resampling.BICUBIC)


def _reachable(config):
    for speedup in SPEEDUPS:
        try:
            yield speedup, schedule_for(config, speedup=speedup)
        except ValueError:
            continue


__all__ = ["SPEEDUPS", "Classifier", "Kept", "Look"]
