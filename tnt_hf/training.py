"""Settings of a training run, read from a recipe and flags, and the model, data and Trainer made from them."""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from torch import nn
from transformers import (
    AutoImageProcessor,
    BaseImageProcessor,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
    pipeline,
)
from transformers.trainer_utils import TrainOutput
from transformers.utils import ModelOutput

from .configuration_tnt import TokenPruningFields, height_and_width
from .conversion import checkpoint_classes, load_classifier, to_plain_model
from .data import (
    EXAMPLES_DIR,
    DataArguments,
    align_labels,
    card_license,
    check_input_size,
    class_names,
    classes_correspond,
    decode_image,
    describe_dataset,
    evaluation_transform,
    train_transform,
)
from .evaluation import borrowed, check_no_results, compute_metrics, top_classes
from .modeling_tnt import TntDeiTForImageClassification, TntViTForImageClassification
from .schedules import PUBLISHED_SCHEDULES, SCHEDULE_FORMS, parse_schedule, resolve_schedules


BUNDLED_BACKBONE = EXAMPLES_DIR / "backbone"


@dataclass
class ModelArguments:
    """Which checkpoint to start from and what of it to train."""

    model_name_or_path: str = field(
        default=str(BUNDLED_BACKBONE),
        metadata={"help": "Folder or Hub id of a ViT or distilled DeiT, plain or TNT. The bundled ViT by default."},
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a model on the Hub."})
    schedule: str = field(
        default="single",
        metadata={"help": f"Schedule stored in the trained checkpoint: {SCHEDULE_FORMS}."},
    )
    train_backbone: bool = field(
        default=False, metadata={"help": "Train all weights instead of the scoring heads on a frozen backbone."}
    )
    plain_vit: bool = field(
        default=False,
        metadata={"help": "Train all weights without TNT, evaluate unpruned, and save the plain Transformers model."},
    )
    token_reduction: str | None = field(default=None, metadata={"help": "Config field; the checkpoint's by default."})
    relevance_weight: float | None = field(
        default=None, metadata={"help": "Config field; the checkpoint's by default."}
    )
    noise_std: float | None = field(default=None, metadata={"help": "Config field; the checkpoint's by default."})
    num_noise_layers: int | None = field(default=None, metadata={"help": "Config field; the checkpoint's by default."})
    noise_layer_norm: bool | None = field(
        default=None, metadata={"help": "Config field; the checkpoint's by default."}
    )
    noise_gate: str | None = field(default=None, metadata={"help": "Config field; the checkpoint's by default."})
    noise_one_layer: bool | None = field(default=None, metadata={"help": "Config field; the checkpoint's by default."})
    similarity_partition: str | None = field(
        default=None, metadata={"help": "Config field; the checkpoint's by default."}
    )
    attn_implementation: str = field(default="sdpa", metadata={"help": "sdpa, eager or flash_attention_2."})

    def __post_init__(self):
        self.schedule = parse_schedule(self.schedule)
        if self.plain_vit:
            self.num_noise_layers = 0

    @property
    def config_overrides(self) -> dict[str, Any]:
        """The TNT config fields that were given."""
        fields = {name: getattr(self, name, None) for name in TokenPruningFields.__dataclass_fields__}
        return {name: value for name, value in fields.items() if value is not None}


@dataclass
class TntTrainingArguments(TrainingArguments):
    """[`TrainingArguments`] with defaults that fit images and frozen backbones."""

    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay off: the transforms read columns the model does not take."}
    )
    label_names: list[str] | None = field(default_factory=lambda: ["labels"], metadata={"help": "The label keys."})
    self_distillation: bool = field(
        default=False,
        metadata={"help": "Train towards the answers of the model itself without noise instead of the labels."},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Write into an output folder that already holds files."}
    )

    def __post_init__(self):
        super().__post_init__()
        if str(self.resume_from_checkpoint).lower() in ("true", "false"):
            self.resume_from_checkpoint = str(self.resume_from_checkpoint).lower() == "true"
        if self.remove_unused_columns:
            raise ValueError("--remove_unused_columns must be false: the transforms read columns the model does not.")
        if self.self_distillation and self.label_smoothing_factor > 0:
            raise ValueError("--label_smoothing_factor must be 0 with --self_distillation, which reads no labels.")


def check_output_dir(arguments: TntTrainingArguments) -> None:
    """
    Check that the run has something to do and a place of its own to write to.

    Raises:
        ValueError: If there is nothing to do, or the run would overwrite files of another.
    """
    if not arguments.do_train and not arguments.do_eval:
        raise ValueError("Nothing to do: pass --do_train, --do_eval or both.")
    output_dir = Path(arguments.output_dir)
    if arguments.resume_from_checkpoint is True and not any(output_dir.glob("checkpoint-*")):
        raise ValueError(f"There is no checkpoint to resume from in {output_dir}.")
    if isinstance(arguments.resume_from_checkpoint, str) and not Path(arguments.resume_from_checkpoint).is_dir():
        raise ValueError(f"--resume_from_checkpoint must be a folder, got {arguments.resume_from_checkpoint}.")
    may_overwrite = arguments.overwrite_output_dir or bool(arguments.resume_from_checkpoint)
    if not may_overwrite and arguments.do_train and output_dir.is_dir() and any(output_dir.iterdir()):
        raise ValueError(
            f"{output_dir} is not empty: pass --resume_from_checkpoint true to continue that run, "
            "--overwrite_output_dir to write over it, or another --output_dir."
        )
    check_no_results(output_dir, may_overwrite)


def load_image_processor(name_or_path: str, revision: str = "main") -> BaseImageProcessor:
    """The image processor of a checkpoint, with Pillow for resizing whatever else is installed."""
    return AutoImageProcessor.from_pretrained(name_or_path, revision=revision, backend="pil")


def load_model(
    arguments: ModelArguments, dataset: DatasetDict, training_arguments: TntTrainingArguments
) -> TntViTForImageClassification | TntDeiTForImageClassification:
    """
    Load the checkpoint in float32 and as the arguments say: frozen but for its scoring heads, wholly trainable, or
    without TNT.

    If all weights train on other classes than the checkpoint's, the classification heads start at random.

    Raises:
        ValueError: If the checkpoint, its classes or the config fields do not fit; see [`load_classifier`].
    """
    fields = arguments.config_overrides
    trains_all = training_arguments.do_train and (arguments.train_backbone or arguments.plain_vit)
    new_classes = _new_classes(arguments, dataset["train"]) if trains_all else None
    if new_classes is not None:
        fields["id2label"] = dict(enumerate(new_classes))
        fields["label2id"] = {name: index for index, name in enumerate(new_classes)}
    model = load_classifier(
        arguments.model_name_or_path,
        allow_new_head=new_classes is not None,
        revision=arguments.model_revision,
        attn_implementation=arguments.attn_implementation,
        dtype=torch.float32,
        **fields,
    )
    (schedule,) = resolve_schedules(
        model.config, [PUBLISHED_SCHEDULES["full"] if arguments.plain_vit else arguments.schedule]
    )
    model.set_schedule(**schedule.settings)
    if trains_all:
        if training_arguments.self_distillation:
            raise ValueError("--self_distillation trains scoring heads alone: leave out --train_backbone.")
        if hasattr(model.config, "distillation_head_in_loss"):
            model.config.distillation_head_in_loss = True
        model.freeze_idle_heads()
    elif training_arguments.do_train:
        model.freeze_backbone()
    if hasattr(model, "distillation_classifier") and training_arguments.label_smoothing_factor > 0:
        raise ValueError(
            "--label_smoothing_factor must be 0 for a distilled DeiT: Trainer would smooth the loss of their mean "
            "instead of that of the [CLS] head."
        )
    return model


def _new_classes(arguments: ModelArguments, split: Dataset) -> list[str] | None:
    """Names of the classes of a split, unless they are those of the checkpoint."""
    names = class_names(split)
    if names is None:
        return None
    id2label = checkpoint_classes(arguments.model_name_or_path, arguments.model_revision)
    return None if classes_correspond(names, id2label) else names


def prepare_data(
    dataset: DatasetDict, model: PreTrainedModel, image_processor: BaseImageProcessor, arguments: DataArguments
) -> DatasetDict:
    """
    Align the labels with the model's and attach the transforms of training and evaluation.

    Raises:
        ValueError: If labels or image size do not match the model.
    """
    check_input_size(image_processor, height_and_width(model.config.image_size))
    transforms = {
        "train": train_transform(image_processor, arguments.train_augmentation),
        "validation": evaluation_transform(image_processor),
    }
    return DatasetDict(
        {
            name: align_labels(split, model.config.id2label, arguments.trust_label_order).with_transform(
                transforms[name]
            )
            for name, split in dataset.items()
        }
    )


class SelfDistillationTrainer(Trainer):
    """
    Trains towards the answers of the same model without noise, by the KL divergence of each head: images alone teach,
    labels are not read.
    """

    loss_is_scaled_for_ga = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        if not model.training:
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


def _head_logits(outputs: ModelOutput) -> list[torch.Tensor]:
    return [outputs[name] for name in ("cls_logits", "distillation_logits") if name in outputs] or [outputs.logits]


def make_trainer(
    model: PreTrainedModel, dataset: DatasetDict, image_processor: BaseImageProcessor, arguments: TntTrainingArguments
) -> Trainer:
    """
    A Trainer that reports top-1 and top-5, saves the image processor with every checkpoint, and never pushes: its
    pushes would leave out the code and hold pickles, so scripts publish the finished run instead.
    """
    arguments = copy.copy(arguments)
    arguments.push_to_hub = False
    if arguments.ddp_find_unused_parameters is None:
        arguments.ddp_find_unused_parameters = False  # load_model freezes what gets no gradient
    trainer_class = SelfDistillationTrainer if arguments.self_distillation else Trainer
    return trainer_class(
        model=model,
        args=arguments,
        data_collator=default_data_collator,
        train_dataset=dataset.get("train"),
        eval_dataset=dataset.get("validation"),
        processing_class=image_processor,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=top_classes,
    )


def save_trained(trainer: Trainer, *, plain: bool) -> None:
    """Save the model and image processor into the output folder, converted to the plain architecture if `plain`."""
    if plain:
        if trainer.is_world_process_zero():
            to_plain_model(trainer.model).save_pretrained(trainer.args.output_dir)
            trainer.processing_class.save_pretrained(trainer.args.output_dir)
    else:
        trainer.save_model()
    trainer.save_state()


def describe_training(
    trainer: Trainer,
    outcome: TrainOutput,
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
) -> dict[str, Any]:
    """How the weights of a results file were made: its `training` section. None is what is not known."""
    arguments, config = trainer.args, trainer.model.config
    name = model_arguments.model_name_or_path
    is_folder = Path(name).is_dir()
    data = describe_dataset(data_arguments, trainer.train_dataset)
    parameters = list(trainer.model.parameters())
    precision = "bfloat16 autocast" if arguments.bf16 else "float16 autocast" if arguments.fp16 else "float32"
    return {
        "base_model": checkpoint_name(name),
        "base_model_hub_id": None if is_folder else name,
        "base_model_revision": None if is_folder else getattr(config, "_commit_hash", None),
        "base_model_license": card_license(name, revision=None if is_folder else model_arguments.model_revision),
        **data,
        "num_images": len(trainer.train_dataset),
        "augmentation": data_arguments.train_augmentation,
        "trained": "all weights" if model_arguments.train_backbone or model_arguments.plain_vit else "scoring heads",
        "num_trained_parameters": sum(value.numel() for value in parameters if value.requires_grad),
        "num_steps": outcome.global_step,
        "num_epochs": trainer.state.epoch,
        "images_per_step": arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size,
        "optimizer": str(getattr(arguments.optim, "value", arguments.optim)),
        "learning_rate": arguments.learning_rate,
        "lr_scheduler": str(getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type)),
        "warmup_steps": arguments.get_warmup_steps(outcome.global_step),
        "weight_decay": arguments.weight_decay,
        "precision": precision,
        "seed": arguments.seed,
        "noise_std": config.noise_std,
        "num_noise_layers": config.num_noise_layers,
        "noise_layer_norm": config.noise_layer_norm,
        "noise_gate": config.noise_gate,
        "noise_one_layer": config.noise_one_layer,
        "self_distillation": arguments.self_distillation,
        "loss": outcome.training_loss,
    }


def checkpoint_name(name_or_path: str) -> str:
    """What a checkpoint is called away from this machine."""
    path = Path(name_or_path).resolve()
    if path == BUNDLED_BACKBONE.resolve():
        return "tnt-hf/examples/backbone"
    return path.name if path.is_dir() else name_or_path


def classify_first_image(model_dir: str, split: Dataset) -> str:
    """One line on what the saved folder answers for the first image of a split, through `pipeline`."""
    record = split.with_format(None)[0]
    classifier = pipeline("image-classification", model=model_dir, trust_remote_code=True, device="cpu")
    answer = classifier(decode_image(record["image"]), top_k=1)[0]
    expected = classifier.model.config.id2label[record["label"]]
    return f"{model_dir} through pipeline: an image of '{expected}' is '{answer['label']}' ({answer['score']:.1%})"


__all__ = [
    "ModelArguments",
    "TntTrainingArguments",
    "check_output_dir",
    "checkpoint_name",
    "classify_first_image",
    "describe_training",
    "load_image_processor",
    "load_model",
    "make_trainer",
    "prepare_data",
    "save_trained",
]
