"""The Trainer of scoring heads: draws, mixing, self-distillation, evaluation under schedules, what stops a run."""

import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict, IterableDatasetDict
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.func import functional_call
from torch.utils.data import DataLoader, IterableDataset, Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import ModelOutput, logging

from ..adaptation import ADAPTATION_NAME, adaptable_parameters, save_adaptation
from ..data import num_evaluation_workers
from ..evaluation import evaluate_schedules
from ..inference import evaluation_mode
from ..results import ResultRow
from ..schedules_tnt import UNPRUNED, Schedule
from .callbacks import MovingAverage, SeededNoise, learning_parameters, relevance_statistics
from .images import MixingCollator, SeededDraws


NUM_MONITORED_IMAGES = 32
# In an adaptation, of the distance of the features against the divergence of the answers.
FEATURE_WEIGHT = 3.0

logger = logging.get_logger(__name__)


class TrainingStopped(RuntimeError):
    """The run cannot go on; what it saved so far is whole."""


class TntTrainer(Trainer):
    """
    [`~transformers.Trainer`] with what the recipes need.

    - Training images come in seeded draws, or as an endless stream that every process reads a share of, and go
      through a collator of their own ([`SeededDraws`], [`~tnt_hf.training.images.StreamedTrainingImages`],
      [`~tnt_hf.training.images.MixingCollator`]).
    - With `self_distillation` the target is the answer of the same model without noise, by the KL divergence of each
      head: images alone teach, labels are not read.
    - With `adaptation_schedules` the model answers under one of them, drawn for each step, and the target is its
      answer unpruned before it was adapted, and what its heads read then, by the cosine: answers of few classes say
      little. What was adapted is saved in a file of its own ([`~tnt_hf.adaptation`]).
    - With `ema_decay` the exponential moving average of what learns is kept beside it, is saved with every checkpoint,
      and takes its place when training ends.
    - Logs gain images per second, the entropy of the relevance and the share of it on the tokens that are kept.
    - The noise of a step is drawn from a seed of the step and the process, so that it does not depend on whether the
      run was interrupted. A loss or a weight that is not finite stops the run.
    """

    loss_is_scaled_for_ga = False

    def __init__(
        self,
        *arguments: Any,
        images: DatasetDict | IterableDatasetDict,
        train_collator: MixingCollator,
        repeated_augmentation: int = 1,
        adaptation_schedules: Sequence[Schedule] = (),
        schedules: Sequence[Schedule] = (),
        random_control: bool = True,
        candidates: Sequence[int] | None = None,
        **kwargs: Any,
    ):
        super().__init__(*arguments, **kwargs)
        self.images = images
        self.schedules, self.random_control, self.candidates = schedules, random_control, candidates
        self.adaptation_schedules, self.original = adaptation_schedules, {}
        if adaptation_schedules:
            self.original = {name: value.detach().clone() for name, value in adaptable_parameters(self.model).items()}
        self.train_collator = train_collator
        self.repeated_augmentation = repeated_augmentation
        self.average = MovingAverage(self.args.ema_decay) if self.args.ema_decay > 0 else None
        self.draws: SeededDraws | None = None
        for callback in (SeededNoise(), _Beginnings(self), self.average):
            if callback is not None:
                self.add_callback(callback)
        self._monitored: torch.Tensor | None = None
        self._logged_at = (0, 0.0)

    def train(self, resume_from_checkpoint: str | PathLike | bool | None = None, **kwargs: Any) -> Any:
        """
        As in [`~transformers.Trainer`]; afterwards the model runs in the precision of its weights again.

        Raises:
            ValueError: If the run is to continue from a checkpoint that lacks the moving average.
            TrainingStopped: If the loss or a weight is not finite.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)
        resume_from_checkpoint = str(resume_from_checkpoint) if resume_from_checkpoint else None
        if self.average is not None:
            self.average.start(self.model, resume_from_checkpoint)
        outcome = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        self.accelerator.unwrap_model(self.model_wrapped, keep_fp32_wrapper=False)
        if self.average is not None:
            self.average.replace_learned(self.model)
        return outcome

    def evaluate_schedules(self) -> list[ResultRow]:
        """
        Evaluate the model on the validation images under the schedules that the recipe names.

        Returns:
            `list[ResultRow]`: The rows of [`~tnt_hf.evaluation.evaluate_schedules`].

        Raises:
            ValueError: If the recipe does not evaluate, so that there are no validation images.
        """
        return evaluate_schedules(
            self.model,
            self.get_eval_dataloader(),
            self.schedules,
            random_control=self.random_control,
            seed=self.args.seed,
            accelerator=self.accelerator,
            candidates=self.candidates,
        )

    def get_train_dataloader(self) -> DataLoader:
        if isinstance(self.train_dataset, IterableDataset):
            return self._stream_dataloader()
        evaluation_collator = self.data_collator  # type: ignore[has-type]
        self.data_collator = self.train_collator
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = evaluation_collator

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        num_workers = self.args.dataloader_num_workers
        self.args.dataloader_num_workers = num_evaluation_workers(dataset, num_workers, self.args.world_size)
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_num_workers = num_workers

    def _stream_dataloader(self) -> DataLoader:
        """Every process reads its own share; Accelerate would read all in the first process and send them around."""
        num_workers = min(self.args.dataloader_num_workers, self.train_dataset.images.num_shards)
        return DataLoader(
            self.train_dataset,
            batch_size=self._train_batch_size,
            collate_fn=self.train_collator,
            num_workers=num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor if num_workers else None,
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self.draws = SeededDraws(len(dataset), seed, self.repeated_augmentation)
        return self.draws

    def _run_epoch(self, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            # from the last checkpoint Trainer would take one more step, and go on through the epochs of a stream
            self.control.should_training_stop = True
            return
        if isinstance(self.train_dataset, IterableDataset):
            self.train_dataset.num_skipped_batches = kwargs["steps_trained_in_current_epoch"]
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
        teaching = {"pixel_values": pixel_values, "schedule": UNPRUNED}
        with _read_by_heads(original) as expected_features, torch.no_grad(), evaluation_mode(original):
            expected = _head_logits(functional_call(original, self.original, kwargs=teaching))
        with _read_by_heads(original) as features:
            outputs = model(pixel_values=pixel_values, schedule=self._drawn_schedule())
        losses = [
            nn.functional.kl_div(
                logits.float().log_softmax(dim=-1),
                target.float().log_softmax(dim=-1),
                reduction="batchmean",
                log_target=True,
            )
            for logits, target in zip(_head_logits(outputs), expected)
        ]
        if self.adaptation_schedules:
            losses = [
                loss + FEATURE_WEIGHT * (1 - nn.functional.cosine_similarity(own, other, dim=-1)).mean()
                for loss, own, other in zip(losses, features, expected_features)
            ]
        loss = sum(losses) / len(losses)
        return (loss, outputs) if return_outputs else loss

    def _drawn_schedule(self) -> Schedule | None:
        """That of the step to adapt to, the same in all processes and whether or not the run was interrupted."""
        if not self.adaptation_schedules:
            return None
        return random.Random(f"{self.args.seed} {self.state.global_step}").choice(self.adaptation_schedules)

    def training_step(self, model: nn.Module, inputs: dict[str, torch.Tensor], *arguments: Any) -> torch.Tensor:
        self._monitored = inputs["pixel_values"][:NUM_MONITORED_IMAGES].clone()
        loss = super().training_step(model, inputs, *arguments)
        if not torch.isfinite(loss):
            raise TrainingStopped(
                f"The loss is {loss.item()} at step {self.state.global_step + 1}: lower the learning rate or the "
                "noise, or train in float32 or bfloat16. The last checkpoint, if there is one, is whole."
            )
        return loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        As in [`~transformers.Trainer`]; a checkpoint holds the moving average too.

        Raises:
            TrainingStopped: If a weight that learns is not finite.
        """
        if not all(torch.isfinite(value).all() for value in learning_parameters(self.model)):
            raise TrainingStopped(
                f"What learns is not finite after step {self.state.global_step}, and is not saved: lower the learning "
                "rate or the noise, or train in float32 or bfloat16."
            )
        if isinstance(self.model, FSDPModule):
            # whose class is made by FSDP, and Transformers would save its code and name
            made = type(self.model)
            _, own = made.__bases__
            made.__name__, made.__module__ = own.__name__, own.__module__
        super().save_model(output_dir, _internal_call)
        if self.original and self.args.should_save:
            save_adaptation(self.model, self.original, Path(output_dir or self.args.output_dir) / ADAPTATION_NAME)
        if _internal_call and self.average is not None and self.args.should_save:
            self.average.save(output_dir)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            step, seconds = self._logged_at
            self._logged_at = self.state.global_step, time.perf_counter()
            num_images = (self.state.global_step - step) * images_per_step(self.args)
            logs["images_per_second"] = round(num_images / (self._logged_at[1] - seconds), 1)
            if self.model.config.num_learning_layers > 0 and not self.adaptation_schedules:
                with self.accelerator.autocast():
                    logs.update(relevance_statistics(self.accelerator.unwrap_model(self.model), self._monitored))
                self._warn_of_noise(logs["loss"])
        super().log(logs, start_time)

    def _warn_of_noise(self, loss: float) -> None:
        """A head learns which noise matters from answers that are better than guesses."""
        config = self.model.config
        guessing = math.log(max(2, config.num_labels))
        is_frozen = not any(value.requires_grad for value in self.model.base_model.layers.parameters())
        if is_frozen and loss >= guessing:
            logger.warning(
                f"The loss is {loss:.2f} at step {self.state.global_step}, and {guessing:.2f} is that of guesses: "
                "under the noise the network answers no better, so that the scoring heads cannot learn. Lower "
                f"--noise_std ({config.noise_std:g}) or --num_noise_layers ({config.num_noise_layers}), or pass "
                "--noise_gate capacity, whose noise is in units of each token's own deviation."
            )


def images_per_step(arguments: TrainingArguments) -> int:
    """How many images the optimizer sees in a step, of all processes together."""
    return arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size


@contextmanager
def _read_by_heads(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """What the classification heads of a model read meanwhile, in float32, each `(batch_size, in_features)`."""
    read = []
    with ExitStack() as hooks:
        for name in model.head_names:
            head = getattr(model, name)
            hooks.callback(head.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].float())).remove)
        yield read


class _Beginnings(TrainerCallback):
    """Starts the clock of the logs, and tells the draws which epoch begins."""

    def __init__(self, trainer: TntTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._logged_at = state.global_step, time.perf_counter()

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.trainer.draws is not None:
            self.trainer.draws.set_epoch(int(state.epoch or 0))  # Accelerate does not reach it in a resumed epoch


def _head_logits(outputs: ModelOutput) -> Sequence[torch.Tensor]:
    return [outputs[name] for name in ("cls_logits", "distillation_logits") if name in outputs] or [outputs.logits]


__all__ = ["TntTrainer", "TrainingStopped", "images_per_step"]
