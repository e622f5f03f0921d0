"""What goes on beside the steps of a training: seeds of the noise, the moving average, what the heads have learned."""

from pathlib import Path

import torch
from numpy.random import SeedSequence
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import PreTrainedModel, TrainerCallback

from ..inference import evaluation_mode
from ..modeling_tnt import TntDeiTForImageClassification, TntViTForImageClassification
from ..schedules_tnt import UNPRUNED


AVERAGE_NAME = "average.safetensors"


class SeededNoise(TrainerCallback):
    """Seeds the noise by the step and the process, so that a continued run draws the same."""

    def on_step_begin(self, args, state, control, **kwargs):
        torch.manual_seed(int(SeedSequence((args.seed, state.global_step, args.process_index)).generate_state(1)[0]))


class MovingAverage(TrainerCallback):
    """
    The exponential moving average of what learns, updated after every step.

    Args:
        decay (`float`): From 0 to below 1.
    """

    def __init__(self, decay: float):
        self.decay = decay
        self.average: AveragedModel | None = None

    def start(self, model: PreTrainedModel, checkpoint: str | None) -> None:
        """
        Begin anew, or with the average that a checkpoint holds.

        Raises:
            ValueError: If the checkpoint holds none.
        """
        self.average = AveragedModel(learning_parameters(model), multi_avg_fn=get_ema_multi_avg_fn(self.decay))
        if checkpoint is not None:
            path = Path(checkpoint) / AVERAGE_NAME
            if not path.is_file():
                raise ValueError(f"{path} is missing: the checkpoint was trained without --ema_decay.")
            self.average.load_state_dict(load_file(path))

    def on_step_end(self, args, state, control, model, **kwargs):
        self.average.update_parameters(learning_parameters(model))

    def save(self, folder: str) -> None:
        """Write the average into a checkpoint."""
        save_file(self.average.state_dict(), Path(folder) / AVERAGE_NAME)

    def replace_learned(self, model: PreTrainedModel) -> None:
        """Put the average in the place of what was learned."""
        learning = (value for value in model.parameters() if value.requires_grad)
        for learned, average in zip(learning, self.average.module, strict=True):
            learned.data.copy_(_sharded_like(learned, average.data))


def learning_parameters(model: PreTrainedModel) -> nn.ParameterList:
    """What requires gradients; whole, if FSDP has sharded it."""
    learning = (value for value in model.parameters() if value.requires_grad)
    return nn.ParameterList(value.full_tensor() if isinstance(value, DTensor) else value for value in learning)


def _sharded_like(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    if not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


@torch.no_grad()
def relevance_statistics(
    model: TntViTForImageClassification | TntDeiTForImageClassification, pixel_values: torch.Tensor
) -> dict[str, float]:
    """
    What the heads have learned so far.

    Args:
        model: A model with heads that learn.
        pixel_values (`torch.Tensor`): Images of shape `(batch_size, num_channels, height, width)`.

    Returns:
        `dict`: `relevance_entropy`, from 0 (one token) to 1 (all alike), and `relevance_kept`, the share of the
        relevance on as many of the highest tokens as the schedule leaves in the end, each the mean over images and
        learning heads.
    """
    with evaluation_mode(model):
        hidden_states = model(pixel_values, schedule=UNPRUNED, output_hidden_states=True).hidden_states
    config = model.config
    num_kept = config.patch_token_counts()[-1]
    entropies, kept = [], []
    for index in range(config.num_learning_layers):
        relevance = model.base_model.relevance_scores(index, hidden_states[index + 1]).softmax(dim=-1)
        entropies.append(torch.special.entr(relevance).sum(dim=-1).mean())
        kept.append(relevance.topk(num_kept).values.sum(dim=-1).mean())
    uniform = torch.tensor(float(config.num_patches)).log()
    return {
        "relevance_entropy": (torch.stack(entropies).mean() / uniform).item(),
        "relevance_kept": torch.stack(kept).mean().item(),
    }


__all__ = ["AVERAGE_NAME", "MovingAverage", "SeededNoise", "learning_parameters", "relevance_statistics"]
