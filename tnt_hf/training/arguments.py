"""Settings of a training run: which model, what of it learns, and the arguments of Trainer."""

from dataclasses import dataclass, field, make_dataclass
from typing import Any

from transformers import TrainingArguments

from ..config_fields import TRAINING_SETTINGS, field_summary, field_type
from ..examples import BUNDLED_BACKBONE
from ..named_schedules import SCHEDULE_FORMS, parse_schedule


EVALUATION_METRICS = ("loss", "top1", "top5")


ConfigFieldArguments = make_dataclass(
    "ConfigFieldArguments",
    [
        (
            name,
            field_type(name) | None,
            field(default=None, metadata={"help": f"{field_summary(name)} By default as in the checkpoint."}),
        )
        for name in TRAINING_SETTINGS
    ],
)


@dataclass
class ModelArguments(ConfigFieldArguments):  # type: ignore[misc, valid-type]
    """Which checkpoint to start from, what of it to train, and with which TNT config fields."""

    model_name_or_path: str = field(
        default=str(BUNDLED_BACKBONE),
        metadata={
            "help": "Folder or Hub id of a ViT, distilled DeiT or DINOv2, plain or TNT. By default the bundled ViT."
        },
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a model on the Hub."})
    schedule: str = field(
        default="single",
        metadata={"help": f"Schedule that the trained checkpoint stores: {SCHEDULE_FORMS}."},
    )
    train_backbone: bool = field(
        default=False,
        metadata={"help": "Train all weights. By default the backbone is frozen and only the scoring heads train."},
    )
    attn_implementation: str = field(
        default="sdpa", metadata={"help": "Attention: sdpa, eager or flash_attention_2; merging needs sdpa or eager."}
    )

    def __post_init__(self):
        self.schedule = parse_schedule(self.schedule)

    @property
    def config_overrides(self) -> dict[str, Any]:
        """The TNT config fields that were given."""
        return {name: getattr(self, name) for name in TRAINING_SETTINGS if getattr(self, name) is not None}


@dataclass
class TntTrainingArguments(TrainingArguments):
    """[`TrainingArguments`] with defaults that fit images and frozen backbones."""

    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must be false: the transforms read columns that the model does not take."}
    )
    label_names: list[str] | None = field(
        default_factory=lambda: ["labels"], metadata={"help": "Must be labels, as the transforms call them."}
    )
    self_distillation: bool = field(
        default=False,
        metadata={"help": "Train towards the answers that the model gives without noise, instead of the labels."},
    )
    adaptation_schedules: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Adapt LayerNorms and biases instead of training scoring heads, so that the answers under these "
            "schedules, of which each step draws one, become those of the unpruned model before: "
            f"{SCHEDULE_FORMS}. Needs --self_distillation."
        },
    )
    ema_decay: float = field(
        default=0.0,
        metadata={
            "help": "Decay of a moving average of the trained weights, which the run then saves. 0 turns it off."
        },
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start anew in an output folder that holds files, and overwrite them."}
    )

    def __post_init__(self):
        for name in ("fsdp", "resume_from_checkpoint"):  # text, as they may hold other than these
            if str(getattr(self, name)).lower() in ("true", "false"):
                setattr(self, name, str(getattr(self, name)).lower() == "true")
        super().__post_init__()
        if self.remove_unused_columns:
            raise ValueError("--remove_unused_columns must be false: the transforms read columns the model does not.")
        if self.ema_decay > 0 and self.load_best_model_at_end:
            raise ValueError("--load_best_model_at_end and --ema_decay each choose the final weights: pass only one.")
        for name, lowest in (
            ("per_device_train_batch_size", 1),
            ("per_device_eval_batch_size", 1),
            ("gradient_accumulation_steps", 1),
            ("dataloader_num_workers", 0),
        ):
            if getattr(self, name) < lowest:
                raise ValueError(f"--{name} must be at least {lowest}, got {getattr(self, name)}.")
        for name, needed in (("prediction_loss_only", False), ("eval_do_concat_batches", True)):
            if getattr(self, name) != needed:
                raise ValueError(f"--{name} must be {str(needed).lower()}: the evaluation counts right answers.")
        if self.label_names != ["labels"]:
            raise ValueError(f"--label_names must be labels, as the transforms call them, got {self.label_names}.")
        metric = self.metric_for_best_model
        if metric is not None and metric.removeprefix("eval_") not in EVALUATION_METRICS:
            raise ValueError(
                f"--metric_for_best_model must be one of {', '.join(EVALUATION_METRICS)}, got {metric or 'nothing'}."
            )
        for text in self.adaptation_schedules:
            parse_schedule(text)
        if self.adaptation_schedules and not self.self_distillation:
            raise ValueError("--adaptation_schedules needs --self_distillation: the unpruned model is what teaches.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"--ema_decay must be from 0 to below 1, got {self.ema_decay}.")
        if self.self_distillation and self.label_smoothing_factor > 0:
            raise ValueError("--label_smoothing_factor must be 0 with --self_distillation, which reads no labels.")


__all__ = [
    "ModelArguments",
    "TntTrainingArguments",
]
