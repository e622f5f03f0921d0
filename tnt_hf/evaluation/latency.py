"""Latency and throughput of a whole model under several schedules, side by side in the same rounds."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import cast

import torch
from torch import nn

from ..inference import evaluation_mode
from ..modeling_tnt import TntDeiTForImageClassification, TntViTForImageClassification
from ..named_schedules import FlopsReduction, resolve_schedules
from ..schedules_tnt import Schedule, count_gflops, height_and_width
from ..timing import timed_in_turns


# A round is the median of as many passes over as many images, so that small batches are not left to chance.
IMAGES_IN_A_ROUND = 8


@dataclass(frozen=True, kw_only=True)
class LatencyRow:
    """
    What a batch takes under one schedule.

    Args:
        schedule (`str`): Its name.
        batch_size (`int`): Images in the batch.
        gflops (`float`): Billions of multiply-accumulates for one image, as executed.
        share (`float`): The same as a share of what the first schedule executes.
        latency_ms (`float`): Milliseconds of a batch, median over the rounds.
        images_per_second (`float`): Images in a second, at this latency.
        speedup (`float`): Over the first schedule in the same round, median over the rounds.
        speedup_range (`tuple[float, float]`): The lowest and the highest of them.
    """

    schedule: str
    batch_size: int
    gflops: float
    share: float
    latency_ms: float
    images_per_second: float
    speedup: float
    speedup_range: tuple[float, float]


@torch.inference_mode()
def measure_latency(
    model: TntViTForImageClassification | TntDeiTForImageClassification,
    schedules: Sequence[Schedule | FlopsReduction],
    batch_sizes: Sequence[int] = (1, 8),
    num_rounds: int = 7,
) -> list[LatencyRow]:
    """
    Time the forward pass of a model under several schedules, on its device and in its dtype.

    All schedules run once in each round. Images are noise of the model's own size: what they show does not change the
    time.

    Args:
        model: The classifier; its own schedule does not matter, and it is left as it is.
        schedules (`Sequence[Schedule | FlopsReduction]`): What to measure; the first is what others are compared with.
        batch_sizes (`Sequence[int]`): Images in a batch.
        num_rounds (`int`): Rounds, at least 3.

    Returns:
        `list[LatencyRow]`: One for each batch size and schedule.

    Raises:
        ValueError: If the model cannot carry out a schedule, or a batch size or `num_rounds` is too small.
    """
    if num_rounds < 3 or min(batch_sizes, default=0) < 1:
        raise ValueError(
            f"`num_rounds` must be at least 3 and `batch_sizes` at least 1, got {num_rounds} and {[*batch_sizes]}."
        )
    config, classify = model.config, cast(nn.Module, model)
    schedules = resolve_schedules(config, schedules)
    gflops = [count_gflops(config, schedule=schedule, as_executed=True) for schedule in schedules]
    rows = []
    with evaluation_mode(model):
        for batch_size in batch_sizes:
            shape = (batch_size, config.num_channels, *height_and_width(config.image_size))
            images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(model.device, model.dtype)
            repeats = max(1, IMAGES_IN_A_ROUND // batch_size)
            passes = [partial(classify, images, schedule=schedule) for schedule in schedules]
            seconds = timed_in_turns(passes, model.device, num_rounds, repeats)
            for schedule, executed, each in zip(schedules, gflops, seconds):
                speedups = [first / own for first, own in zip(seconds[0], each)]
                latency = median(each)
                rows.append(
                    LatencyRow(
                        schedule=schedule.name,
                        batch_size=batch_size,
                        gflops=executed,
                        share=executed / gflops[0],
                        latency_ms=1000 * latency,
                        images_per_second=batch_size / latency,
                        speedup=median(speedups),
                        speedup_range=(min(speedups), max(speedups)),
                    )
                )
    return rows


__all__ = ["LatencyRow", "measure_latency"]
