"""How a network spends a budget best, chosen by its own answers to a few unlabelled images."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..inference import evaluation_mode
from ..modeling_tnt import TntDeiTForImageClassification, TntViTForImageClassification
from ..schedules_tnt import UNPRUNED, Schedule, height_and_width, schedule_for


# How merged tokens count in attention, and whether they keep their norm: what suits a network differs, see
# docs/method.md.
SETTINGS = ({"size_bias": 1.0, "keep_norm": False}, {"size_bias": 0.5, "keep_norm": True})
SMALLEST_SIDE = 0.5


@dataclass(frozen=True)
class Choice:
    """
    A schedule that was tried.

    Args:
        flops_reduction (`float`): The budget that it meets.
        settings (`dict`): Config fields of the model that go with it.
        schedule ([`Schedule`]): Named as a text that gives it back, such as `3x@154`.
        divergence (`float`): KL divergence of the answers from those of the unpruned model, mean over the images.
    """

    flops_reduction: float
    settings: dict[str, Any]
    schedule: Schedule
    divergence: float


@torch.inference_mode()
def choose_schedules(
    model: TntViTForImageClassification | TntDeiTForImageClassification,
    pixel_values: torch.Tensor,
    flops_reductions: Sequence[float],
    batch_size: int = 32,
) -> list[Choice]:
    """
    Choose for each budget the image size, and for all of them how merged tokens count, by which a model's answers to
    some images change least; the settings are set on the model.

    Every size is tried from that of the model down to half of it, in steps of a patch, or to the first that meets the
    budget with all of its tokens.

    Args:
        model: The classifier, of `token_reduction="merge"`.
        pixel_values (`torch.Tensor` of shape `(num_images, num_channels, height, width)`):
            Images of its own size, a hundred or more, without labels; not those that it is evaluated on.
        flops_reductions (`Sequence[float]`): Budgets as in [`~tnt_hf.schedules_tnt.schedule_for`].
        batch_size (`int`): Images in a forward pass.

    Returns:
        `list[Choice]`: The best of each budget, in their order.

    Raises:
        ValueError: If the model drops tokens, or no schedule meets a budget.
    """
    config = model.config
    if not config.merges:
        raise ValueError(f"`token_reduction` must be 'merge' to choose schedules, got {config.token_reduction!r}.")
    candidates = {reduction: _schedules(config, reduction) for reduction in flops_reductions}
    before = {name: getattr(config, name) for name in SETTINGS[0]}
    best: list[tuple[float, list[Choice]]] = []
    try:
        with evaluation_mode(model):
            expected = _answers(model, pixel_values, UNPRUNED, batch_size)
            for settings in SETTINGS:
                _set(config, settings)
                chosen = []
                for reduction, schedules in candidates.items():
                    tried = []
                    for schedule in schedules:
                        answers = _answers(model, pixel_values, schedule, batch_size)
                        divergence = nn.functional.kl_div(answers, expected, reduction="batchmean", log_target=True)
                        tried.append(Choice(reduction, settings, schedule, divergence.item()))
                    chosen.append(min(tried, key=lambda choice: choice.divergence))
                # in proportion: the largest budgets diverge by a hundredth of the smallest
                total = sum(math.log(max(choice.divergence, 1e-12)) for choice in chosen)
                best.append((total, chosen))
    except BaseException:
        _set(config, before)
        raise
    _, chosen = min(best, key=lambda each: each[0])
    _set(config, chosen[0].settings)
    return chosen


def _schedules(config: Any, flops_reduction: float) -> list[Schedule]:
    (height, width), patch = height_and_width(config.image_size), height_and_width(config.patch_size)
    found, refused = [], None
    for fewer in range(height // patch[0]):
        size = (height - fewer * patch[0], round((height - fewer * patch[0]) / height * width / patch[1]) * patch[1])
        if min(size[0] / height, size[1] / width) < SMALLEST_SIDE:
            break
        name = f"{flops_reduction:g}x" + (f"@{'x'.join(map(str, dict.fromkeys(size)))}" if fewer else "")
        try:
            schedule = schedule_for(config, flops_reduction=flops_reduction, compute_size=size if fewer else None)
        except ValueError as error:
            refused = refused or error
            continue
        found.append(replace(schedule, name=name))
        if not schedule.prune_layers:
            break
    if not found:
        raise refused
    return found


def _set(config: Any, settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        setattr(config, name, value)


def _answers(model: nn.Module, pixel_values: torch.Tensor, schedule: Schedule, batch_size: int) -> torch.Tensor:
    batches = pixel_values.split(batch_size)
    logits = [model(batch.to(model.device, model.dtype), schedule=schedule).logits.float() for batch in batches]
    return torch.cat(logits).log_softmax(dim=-1)


__all__ = ["Choice", "choose_schedules"]
