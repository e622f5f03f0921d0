"""The Trainer of scoring heads: draws, mixing, self-distillation, the average of the weights, and what stops a run."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainerCallback
from transformers.utils import ModelOutput

from .evaluation import borrowed
from .training_images import SeededDraws


AVERAGE_NAME = "average.safetensors"
NUM_MONITORED_IMAGES = 32


class TrainingStopped(RuntimeError):
    """The run cannot go on; what it saved so far is whole."""


class TntTrainer(Trainer):
    """
    [`~transformers.Trainer`] with what the recipes need.

    - Training images come in seeded draws and go through a collator of their own ([`SeededDraws`],
      [`~tnt_hf.training_images.MixingCollator`]).
    - With `self_distillation` the target is the answer of the same model without noise, by the KL divergence of each
      head: images alone teach, labels are not read.
    - With `ema_decay` the exponential moving average of what learns is kept beside it, is saved with every checkpoint,
      and takes its place when training ends.
    - Logs gain images per second, the entropy of the relevance and the share of it on the tokens that are kept.
    - Every process draws noise of its own. A loss that is not finite stops the run.
    """

    loss_is_scaled_for_ga = False

    def __init__(
        self, *arguments: Any, train_collator: Callable | None = None, repeated_augmentation: int = 1, **kwargs: Any
    ):
        super().__init__(*arguments, **kwargs)
        self.train_collator = train_collator
        self.repeated_augmentation = repeated_augmentation
        self.average: AveragedModel | None = None
        self.add_callback(_Bookkeeping(self))
        self._monitored: torch.Tensor | None = None
        self._logged_at = (0, 0.0)
        self.first_step = 0

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        if self.args.ema_decay > 0:
            self.average = AveragedModel(self._learning(), multi_avg_fn=get_ema_multi_avg_fn(self.args.ema_decay))
            if isinstance(resume_from_checkpoint, str):
                self.average.load_state_dict(load_file(Path(resume_from_checkpoint) / AVERAGE_NAME))
        outcome = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        if self.average is not None:
            for learned, average in zip(self._learning(), self.average.module, strict=True):
                learned.data.copy_(average.data)
        return outcome

    def _learning(self) -> nn.ParameterList:
        return nn.ParameterList(value for value in self.model.parameters() if value.requires_grad)

    def get_train_dataloader(self) -> DataLoader:
        evaluation_collator = self.data_collator
        self.data_collator = self.train_collator or evaluation_collator
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = evaluation_collator

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        self.draws = SeededDraws(len(dataset), self.args.data_seed or self.args.seed, self.repeated_augmentation)
        return self.draws

    def _run_epoch(self, **kwargs: Any) -> None:
        if self.state.global_step < self.state.max_steps:  # Trainer would take one more step from the last checkpoint
            super()._run_epoch(**kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        if not model.training or not self.args.self_distillation:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        pixel_values = inputs["pixel_values"]
        original = self.accelerator.unwrap_model(model)
        with torch.no_grad(), borrowed(original):
            original.set_schedule([], [])
            expected = _head_logits(original(pixel_values=pixel_values))
        outputs = model(pixel_values=pixel_values)
        losses = [
            nn.functional.kl_div(
                logits.float().log_softmax(dim=-1),
                target.float().log_softmax(dim=-1),
                reduction="batchmean",
                log_target=True,
            )
            for logits, target in zip(_head_logits(outputs), expected)
        ]
        loss = sum(losses) / len(losses)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, torch.Tensor], *arguments: Any) -> torch.Tensor:
        self._monitored = inputs["pixel_values"][:NUM_MONITORED_IMAGES]
        loss = super().training_step(model, inputs, *arguments)
        if not torch.isfinite(loss):
            raise TrainingStopped(
                f"The loss is {loss.item()} at step {self.state.global_step + 1}: lower the learning rate or the "
                "noise, or train in float32 or bfloat16. The last checkpoint, if there is one, is from before."
            )
        return loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if _internal_call and self.average is not None and self.args.should_save:
            save_file(self.average.state_dict(), Path(output_dir) / AVERAGE_NAME)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            step, seconds = self._logged_at
            self._logged_at = self.state.global_step, time.perf_counter()
            images_per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            num_images = (self.state.global_step - step) * images_per_step
            logs["images_per_second"] = round(num_images / (self._logged_at[1] - seconds), 1)
            if self.model.config.num_learning_layers > 0:
                logs.update(self.relevance_statistics(self._monitored))
        super().log(logs, start_time)

    @torch.no_grad()
    def relevance_statistics(self, pixel_values: torch.Tensor) -> dict[str, float]:
        """
        What the heads have learned so far: `relevance_entropy`, from 0 (one token) to 1 (all alike), and
        `relevance_kept`, the share of the relevance on as many of the highest tokens as the schedule leaves in the
        end, each the mean over images and learning heads.
        """
        model = self.accelerator.unwrap_model(self.model)
        with borrowed(model):
            model.set_schedule([], [])
            hidden_states = model.base_model(pixel_values, output_hidden_states=True).hidden_states
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


class _Bookkeeping(TrainerCallback):
    """What [`TntTrainer`] does between steps."""

    def __init__(self, trainer: TntTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.first_step = state.global_step
        self.trainer._logged_at = state.global_step, time.perf_counter()
        if args.world_size > 1:
            set_seed(args.seed, device_specific=True)  # Trainer seeds all processes alike

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer.draws.set_epoch(int(state.epoch or 0))  # Accelerate does not reach it in a resumed epoch

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.average is not None:
            self.trainer.average.update_parameters(self.trainer._learning())


def _head_logits(outputs: ModelOutput) -> Sequence[torch.Tensor]:
    return [outputs[name] for name in ("cls_logits", "distillation_logits") if name in outputs] or [outputs.logits]


__all__ = ["AVERAGE_NAME", "TntTrainer", "TrainingStopped"]
