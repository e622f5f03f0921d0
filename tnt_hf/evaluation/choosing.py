"""How a network spends a budget best, chosen by its own answers to a few unlabelled images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..inference import evaluation_mode
from ..modeling_tnt import TntDeiTForImageClassification, TntViTForImageClassification
from ..schedules_tnt import UNPRUNED, Schedule, height_and_width, schedule_for
from ..token_reduction_tnt import SIZE_BIAS


# How much the size of a merged token may count in attention.
SIZE_BIASES = (1.0, 0.85, 0.7)
SMALLEST_SIDE = 0.5
# After as many smaller sizes that are worse than the best one, no smaller one is tried.
PATIENCE = 2


@dataclass(frozen=True)
class Choice:
    """
    What was chosen for a budget.

    Args:
        flops_reduction (`float`): The budget.
        schedule ([`Schedule`]): How it is met, on images of its `compute_size`.
        divergence (`float`): KL divergence of the answers from those of the unpruned model, mean over the images.
        divergence_before (`float`): The same at the size and with the size bias that the model had.
    """

    flops_reduction: float
    schedule: Schedule
    divergence: float
    divergence_before: float


@torch.inference_mode()
def choose_schedules(
    model: TntViTForImageClassification | TntDeiTForImageClassification,
    pixel_values: torch.Tensor,
    flops_reductions: Sequence[float],
    batch_size: int = 32,
) -> list[Choice]:
    """
    Choose for each budget the image size, and for all of them how merged tokens count in attention, by which a model's
    answers to some images change least. The model keeps what was chosen as `config.budget_sizes` and
    `config.size_bias`, so that `set_budget` and texts such as `3x` follow it.

    A budget's sizes are tried from that of the next milder budget down, a patch less at a time where a schedule meets
    it, until two in a row are worse than the best or the images alone meet the budget; size biases then on the
    schedules chosen.

    Args:
        model: The classifier, which merges tokens.
        pixel_values (`torch.Tensor` of shape `(num_images, num_channels, height, width)`):
            Images of its own size, a hundred or more, without labels; not those that it is evaluated on.
        flops_reductions (`Sequence[float]`): Budgets as in [`~tnt_hf.schedules_tnt.schedule_for`].
        batch_size (`int`): Images in a forward pass.

    Returns:
        `list[Choice]`: One for each budget, the mildest first.

    Raises:
        ValueError: If the model drops tokens, or no schedule of images of its own size meets a budget; the model is
            then as before.
    """
    config = model.config
    if not config.merges:
        raise ValueError(
            f"`token_reduction` must be 'merge' or 'cluster' to choose schedules, got {config.token_reduction!r}."
        )
    budgets = sorted(set(flops_reductions))
    candidates = {budget: dict(_schedules(config, budget)) for budget in budgets}
    before = config.size_bias
    in_effect = SIZE_BIAS[config.token_reduction] if before is None else before
    with evaluation_mode(model):
        expected = _answers(model, pixel_values, UNPRUNED, batch_size)

        def divergence(schedule: Schedule) -> float:
            answers = _answers(model, pixel_values, schedule, batch_size)
            return nn.functional.kl_div(answers, expected, reduction="batchmean", log_target=True).item()

        first, found, at_full_size = 0, {}, []
        for budget in budgets:
            at_full_size.append(divergence(candidates[budget][0]))
            tried = {0: at_full_size[-1]}
            for fewer in candidates[budget]:
                if fewer < max(first, 1):
                    continue
                tried[fewer] = divergence(candidates[budget][fewer])
                best = min(tried, key=tried.get)
                if sum(each > max(best, first) for each in tried) >= PATIENCE:
                    break
            first = min(tried, key=tried.get)
            found[budget] = candidates[budget][first], tried[first]
        try:
            divergences = {before: [value for _, value in found.values()]}
            for bias in SIZE_BIASES:
                if bias != in_effect:
                    config.size_bias = bias
                    divergences[bias] = [divergence(schedule) for schedule, _ in found.values()]
        finally:
            config.size_bias = before
    # in proportion, as the harshest budgets diverge a hundred times as much as the mildest
    config.size_bias = min(divergences, key=lambda bias: torch.tensor(divergences[bias]).clamp(min=1e-12).log().sum())
    schedules = [schedule for schedule, _ in found.values()]
    config.budget_sizes = [
        [budget, schedule.settings.get("compute_size", config.image_size)]
        for budget, schedule in zip(budgets, schedules)
    ]
    return [Choice(*each) for each in zip(budgets, schedules, divergences[config.size_bias], at_full_size)]


def _schedules(config: Any, flops_reduction: float) -> Iterator[tuple[int, Schedule]]:
    """
    The schedules of a budget on images of their own size and ever smaller ones, to those that alone meet it, each with
    how many patches its images are less high.
    """
    (height, width), patch = height_and_width(config.image_size), height_and_width(config.patch_size)
    for fewer in range(height // patch[0]):
        size = (height - fewer * patch[0], round((height - fewer * patch[0]) / height * width / patch[1]) * patch[1])
        if min(size[0] / height, size[1] / width) < SMALLEST_SIDE:
            return
        try:
            schedule = schedule_for(
                config, flops_reduction=flops_reduction, compute_size=size if fewer else config.image_size
            )
        except ValueError:
            if fewer:  # one token is more than 1 % of the budget there
                continue
            raise
        yield fewer, schedule
        if not schedule.prune_layers:
            return


def _answers(model: nn.Module, pixel_values: torch.Tensor, schedule: Schedule, batch_size: int) -> torch.Tensor:
    batches = pixel_values.split(batch_size)
    logits = [model(batch.to(model.device, model.dtype), schedule=schedule).logits.float() for batch in batches]
    return torch.cat(logits).log_softmax(dim=-1)


__all__ = ["Choice", "choose_schedules"]
