"""Settings of a training run, read from a recipe and flags, and the model, data and Trainer made from them."""

import copy
import json
import shutil
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoImageProcessor,
    BaseImageProcessor,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
    get_scheduler,
    pipeline,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from .configuration_tnt import TokenPruningFields
from .conversion import checkpoint_classes, load_classifier, to_plain_model
from .data import (
    EXAMPLES_DIR,
    DataArguments,
    align_labels,
    card_license,
    check_input_size,
    class_names,
    describe_dataset,
    evaluation_images,
)
from .evaluation import check_no_results, compute_metrics, top_classes, write_json
from .image_files import decode_image
from .labels import may_keep_head, numbers
from .modeling_tnt import TntDeiTForImageClassification, TntViTForImageClassification
from .schedules import SCHEDULE_FORMS, parse_schedule, resolve_schedules
from .schedules_tnt import UNPRUNED, height_and_width
from .trainer import TntTrainer, images_per_step
from .training_images import (
    BAD_IMAGES_NAME,
    BadImages,
    MixingCollator,
    StreamedTrainingImages,
    TrainingImages,
    training_transform,
)


BUNDLED_BACKBONE = EXAMPLES_DIR / "backbone"
RUN_SETTINGS_NAME = "run_settings.json"
TENSORBOARD_FOLDER = "runs"  # where Trainer's callback writes
EVALUATION_METRICS = ("loss", "top1", "top5")
RUN_FIELDS = (
    "seed",
    "data_seed",
    "learning_rate",
    "weight_decay",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "max_steps",
    "num_train_epochs",
    "world_size",
    "train_batch_size",
    "gradient_accumulation_steps",
    "optim",
    "optim_args",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "dataloader_drop_last",
    "label_smoothing_factor",
    "self_distillation",
    "ema_decay",
    "bf16",
    "fp16",
)

# Fields of the model and the data that no training depends on.
OTHER_FIELDS = ("schedule", "validation_dir", "max_eval_samples", "max_bad_images")

logger = logging.get_logger(__name__)


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
    ema_decay: float = field(
        default=0.0,
        metadata={"help": "Decay of an exponential moving average of what learns, which is saved; 0 is without."},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Write into an output folder that already holds files."}
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
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"--ema_decay must be from 0 to below 1, got {self.ema_decay}.")
        if self.self_distillation and self.label_smoothing_factor > 0:
            raise ValueError("--label_smoothing_factor must be 0 with --self_distillation, which reads no labels.")


def checkpoint_to_resume(arguments: TntTrainingArguments) -> Path | None:
    """
    Check that the run has something to do and a place of its own to write to, and find where it was interrupted.

    By default a run continues from the last whole checkpoint of its output folder, and starts if there is none; with
    `--resume_from_checkpoint true` there must be one, with `false` it starts anew. A checkpoint that was being written
    when the run was killed is passed over with a warning.

    Raises:
        ValueError: If there is nothing to do or to resume from, the run would overwrite files of another, or processes
            find different checkpoints.
    """
    if not arguments.do_train and not arguments.do_eval:
        raise ValueError("Nothing to do: pass --do_train, --do_eval or both.")
    output_dir, wanted = Path(arguments.output_dir), arguments.resume_from_checkpoint
    checkpoint = None
    if wanted and arguments.overwrite_output_dir:
        raise ValueError("--resume_from_checkpoint continues, --overwrite_output_dir starts anew: pass only one.")
    if isinstance(wanted, str):
        checkpoint = Path(wanted)
        if missing := _missing_from(checkpoint):
            raise ValueError(f"--resume_from_checkpoint must be a folder with a whole checkpoint: {missing}.")
    elif arguments.do_train and wanted is not False and not arguments.overwrite_output_dir:
        checkpoint = _last_whole_checkpoint(output_dir)
        if wanted and checkpoint is None:
            raise ValueError(f"There is no checkpoint to resume from in {output_dir}.")
    found = gather_object([None if checkpoint is None else checkpoint.name])
    if len(set(found)) > 1:
        raise ValueError(
            f"The processes find different checkpoints in {output_dir}: {', '.join(map(str, found))}. All need the "
            "same folder."
        )
    is_own = checkpoint is not None and checkpoint.resolve().parent == output_dir.resolve()
    may_overwrite = arguments.overwrite_output_dir or is_own
    if not may_overwrite and arguments.do_train and _holds_anything(output_dir, wanted):
        raise ValueError(
            f"{output_dir} is not empty: pass --overwrite_output_dir to write over it, or another --output_dir."
        )
    check_no_results(output_dir, may_overwrite)
    return checkpoint


def _holds_anything(output_dir: Path, wanted: bool | None) -> bool:
    """Whether there is more in a folder than a run leaves that was killed before its first checkpoint."""
    if not output_dir.is_dir():
        return False
    if wanted is False or not (output_dir / RUN_SETTINGS_NAME).is_file():
        return any(output_dir.iterdir())
    left = {output_dir / name for name in (RUN_SETTINGS_NAME, BAD_IMAGES_NAME, TENSORBOARD_FOLDER)}
    left |= {path for path in output_dir.glob("checkpoint-*") if not (path / TRAINER_STATE_NAME).exists()}
    return any(path not in left for path in output_dir.iterdir())


def _last_whole_checkpoint(output_dir: Path) -> Path | None:
    steps = {path: path.name.removeprefix("checkpoint-") for path in output_dir.glob("checkpoint-*")}
    numbered = [path for path, step in steps.items() if step.isdigit()]
    for checkpoint in sorted(numbered, key=lambda path: -int(steps[path])):
        if not (missing := _missing_from(checkpoint)):
            return checkpoint
        logger.warning(f"Passing over a checkpoint that is not whole: {missing}.")
    return None


def _missing_from(checkpoint: Path) -> str | None:
    """What a checkpoint lacks to be resumed from; the first process writes the file of the state last."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
        weights = list(checkpoint.glob("*.safetensors"))
        for path in weights:
            with safe_open(path, framework="pt"):
                pass
    except (OSError, ValueError, SafetensorError) as error:
        return f"{checkpoint}: {error}"
    optimizer = "optimizer.bin" if (checkpoint / "optimizer.bin").exists() else "optimizer.pt"  # the former of FSDP
    broken = [name for name in (optimizer, "scheduler.pt") if not zipfile.is_zipfile(checkpoint / name)]
    if broken or not weights:
        return f"{checkpoint} has no readable {', '.join(broken or ['weights'])}"
    return None


def record_run(checkpoint: Path | None, *arguments: Any) -> None:
    """
    Write what a training is made of into its output folder and remove what another run left there; or check that the
    run that is continued is the same one.

    Args:
        checkpoint (`Path`, *optional*): Where the run continues.
        arguments: The dataclasses of arguments; of the last, [`TntTrainingArguments`], only what changes the result.

    Raises:
        ValueError: If the run in the output folder had other settings; the message names them.
    """
    *others, training = arguments
    settings = {name: getattr(training, name) for name in RUN_FIELDS}
    if any(getattr(each, "streaming", False) for each in others):
        settings["dataloader_num_workers"] = training.dataloader_num_workers  # each draws from shards of its own
    for each in others:
        settings |= {name: getattr(each, name) for name in each.__dataclass_fields__ if name not in OTHER_FIELDS}
    settings = json.loads(json.dumps(settings, default=lambda value: str(getattr(value, "name", value))))
    output_dir = Path(training.output_dir)
    before_path = (output_dir if checkpoint is None else checkpoint.parent) / RUN_SETTINGS_NAME
    if checkpoint is not None and before_path.is_file():
        before = json.loads(before_path.read_text())
        changed = [name for name, value in settings.items() if before.get(name) != value]
        if changed:
            values = ", ".join(f"{name} {before.get(name)} -> {settings[name]}" for name in changed)
            raise ValueError(
                f"The run in {checkpoint.parent} had other settings: {values}. Repeat them, pass "
                "--overwrite_output_dir to start anew, or another --output_dir."
            )
    if training.process_index == 0:
        if checkpoint is None:
            for folder in output_dir.glob("checkpoint-*"):
                shutil.rmtree(folder)
            (output_dir / BAD_IMAGES_NAME).unlink(missing_ok=True)
        elif checkpoint.parent.resolve() != output_dir.resolve() and (checkpoint.parent / BAD_IMAGES_NAME).is_file():
            shutil.copy(checkpoint.parent / BAD_IMAGES_NAME, output_dir)  # which images a stream left out so far
        write_json(output_dir / RUN_SETTINGS_NAME, settings)


def load_image_processor(name_or_path: str, revision: str = "main") -> BaseImageProcessor:
    """The image processor of a checkpoint, with Pillow for resizing whatever else is installed."""
    return AutoImageProcessor.from_pretrained(name_or_path, revision=revision, backend="pil")


def load_model(
    arguments: ModelArguments,
    dataset: DatasetDict | IterableDatasetDict,
    training_arguments: TntTrainingArguments,
    *,
    trust_label_order: bool = False,
) -> TntViTForImageClassification | TntDeiTForImageClassification:
    """
    Load the checkpoint in float32 and as the arguments say: frozen but for its scoring heads, wholly trainable, or
    without TNT.

    If all weights train on other classes than the checkpoint's, or on classes that the data only numbers, the
    classification heads start at random; with `trust_label_order` as many classes are the checkpoint's.

    Raises:
        ValueError: If the checkpoint, its classes or the config fields do not fit; see [`load_classifier`].
    """
    fields = arguments.config_overrides
    trains_all = training_arguments.do_train and (arguments.train_backbone or arguments.plain_vit)
    if arguments.plain_vit and training_arguments.fsdp:
        raise ValueError("--plain_vit goes without --fsdp: only TNT models are gathered when they are saved.")
    if trains_all and training_arguments.self_distillation:
        raise ValueError("--self_distillation trains scoring heads alone: leave out --train_backbone and --plain_vit.")
    new_classes = _new_classes(arguments, dataset["train"], trust_label_order) if trains_all else None
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
    (schedule,) = resolve_schedules(model.config, [UNPRUNED if arguments.plain_vit else arguments.schedule])
    model.set_schedule(schedule)
    if trains_all:
        if hasattr(model.config, "distillation_head_in_loss"):
            model.config.distillation_head_in_loss = True
        model.freeze_idle_heads()
    elif training_arguments.do_train:
        model.freeze_backbone()
    return model


def _new_classes(
    arguments: ModelArguments, split: Dataset | IterableDataset, trust_label_order: bool
) -> list[str] | None:
    """Names of the classes of a split, numbers by value, unless the checkpoint keeps its own."""
    names = class_names(split)
    if names is None:
        return None
    model_names = [*checkpoint_classes(arguments.model_name_or_path, arguments.model_revision).values()]
    is_trusted = trust_label_order and len(names) == len(model_names)
    if is_trusted or may_keep_head(names, model_names):
        return None
    values = numbers(names)
    return names if values is None else [name for _, name in sorted(zip(values, names))]


def prepare_data(
    dataset: DatasetDict | IterableDatasetDict,
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    arguments: DataArguments,
) -> DatasetDict | IterableDatasetDict:
    """
    Align the labels with the model's.

    Raises:
        ValueError: If the labels, or what the image processor makes, do not match the model.
    """
    check_input_size(image_processor, height_and_width(model.config.image_size), model.config.num_channels)
    return type(dataset)(
        {
            name: align_labels(split, model.config.id2label, arguments.trust_label_order)
            for name, split in dataset.items()
        }
    )


def make_trainer(
    model: PreTrainedModel,
    dataset: DatasetDict | IterableDatasetDict,
    image_processor: BaseImageProcessor,
    arguments: TntTrainingArguments,
    data_arguments: DataArguments,
) -> TntTrainer:
    """
    A Trainer that reports top-1 and top-5, saves the image processor with every checkpoint, and never pushes: its
    pushes would leave out the code and hold pickles, so scripts publish the finished run instead.

    Raises:
        ValueError: If the augmentation is unknown or does not suit the image processor, or a stream is to be trained
            on without `max_steps`.
    """
    arguments = copy.copy(arguments)
    arguments.push_to_hub = False
    if arguments.do_train:
        _check_optimization(arguments)
    if arguments.fsdp:  # Accelerate would shard the patch embedding twice
        layers = sorted({type(layer).__name__ for layer in model.base_model.layers})
        arguments.fsdp_plugin_args.setdefault("transformer_cls_names_to_wrap", ",".join(layers))
    if arguments.ddp_find_unused_parameters is None:
        arguments.ddp_find_unused_parameters = False  # load_model freezes what gets no gradient
    collator = MixingCollator(data_arguments, arguments.label_smoothing_factor, model.config.num_labels)
    arguments.label_smoothing_factor = 0.0  # Trainer would smooth the mean of a DeiT's heads, and the evaluation
    train_images = validation_images = None
    if "train" in dataset:
        train_images = _training_images(dataset["train"], image_processor, arguments, data_arguments)
    if "validation" in dataset:
        validation_images = evaluation_images(dataset["validation"], image_processor)
    return TntTrainer(
        model=model,
        args=arguments,
        data_collator=default_data_collator,
        train_collator=collator,
        repeated_augmentation=data_arguments.repeated_augmentation,
        train_dataset=train_images,
        eval_dataset=validation_images,
        processing_class=image_processor,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=top_classes,
    )


def _check_optimization(arguments: TntTrainingArguments) -> None:
    """
    Check that there are the optimizer and the schedule of the learning rate, which Trainer makes when it begins.

    Raises:
        ValueError: If they are unknown, not installed, or have other settings.
    """
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments)
        get_scheduler(
            arguments.lr_scheduler_type,
            torch.optim.SGD([torch.zeros(1)], lr=0.1),
            num_warmup_steps=1,
            num_training_steps=2,
            scheduler_specific_kwargs=dict(arguments.lr_scheduler_kwargs or {}),
        )
    except (ImportError, TypeError, ValueError) as error:
        raise ValueError(
            f"--optim {getattr(arguments.optim, 'value', arguments.optim)!s} or --lr_scheduler_type "
            f"{getattr(arguments.lr_scheduler_type, 'value', arguments.lr_scheduler_type)!s} cannot be used: {error}"
        ) from error


def _training_images(
    split: Dataset | IterableDataset,
    image_processor: BaseImageProcessor,
    arguments: TntTrainingArguments,
    data_arguments: DataArguments,
) -> TrainingImages | StreamedTrainingImages:
    transform = training_transform(image_processor, data_arguments)
    path, max_share = Path(arguments.output_dir) / BAD_IMAGES_NAME, data_arguments.max_bad_images
    if isinstance(split, Dataset):
        num_drawn = arguments.train_batch_size * arguments.world_size
        if arguments.dataloader_drop_last and len(split) < num_drawn:
            raise ValueError(
                f"--dataloader_drop_last leaves nothing to train on: {len(split)} images are fewer than the "
                f"{num_drawn} of one batch of all processes."
            )
        return TrainingImages(split, transform, BadImages(path, len(split), max_share))
    if arguments.max_steps <= 0:
        raise ValueError("--streaming needs --max_steps: how many images a stream has is not known.")
    num_repeats = data_arguments.repeated_augmentation
    return StreamedTrainingImages(
        split,
        transform,
        BadImages(path, arguments.max_steps * images_per_step(arguments) // num_repeats, max_share),
        seed=arguments.seed if arguments.data_seed is None else arguments.data_seed,
        batch_size=arguments.train_batch_size,
        buffer_size=data_arguments.shuffle_buffer_size,
        num_repeats=num_repeats,
        process_index=arguments.process_index,
        num_processes=arguments.world_size,
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
    trainer: TntTrainer,
    outcome: TrainOutput,
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
) -> dict[str, Any]:
    """How the weights of a results file were made: its `training` section. None is what is not known."""
    arguments, config = trainer.args, trainer.model.config
    name = model_arguments.model_name_or_path
    is_folder = Path(name).is_dir()
    images = trainer.train_dataset.images
    is_stream = isinstance(images, IterableDataset)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    parameters = list(trainer.model.parameters())
    precision = "bfloat16 autocast" if arguments.bf16 else "float16 autocast" if arguments.fp16 else "float32"
    return {
        "base_model": checkpoint_name(name),
        "base_model_hub_id": None if is_folder else name,
        "base_model_revision": None if is_folder else getattr(config, "_commit_hash", None),
        "base_model_license": card_license(name, revision=None if is_folder else model_arguments.model_revision),
        **describe_dataset(data_arguments, images),
        "num_images": None if is_stream else len(images),
        "augmentation": data_arguments.augmentation,
        "trained": "all weights" if model_arguments.train_backbone or model_arguments.plain_vit else "scoring heads",
        "num_trained_parameters": sum(value.numel() for value in parameters if value.requires_grad),
        "num_steps": outcome.global_step,
        "num_epochs": None if is_stream else trainer.state.epoch,
        "images_per_step": images_per_step(arguments),
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
        "label_smoothing": trainer.train_collator.label_smoothing,
        "max_grad_norm": arguments.max_grad_norm,
        "lr_scheduler_kwargs": arguments.lr_scheduler_kwargs,
        "ema_decay": arguments.ema_decay,
        "loss": sum(losses) / len(losses) if losses else outcome.training_loss or None,
    }


def checkpoint_name(name_or_path: str) -> str:
    """What a checkpoint is called away from this machine."""
    path = Path(name_or_path).resolve()
    if path == BUNDLED_BACKBONE.resolve():
        return "tnt-hf/examples/backbone"
    return path.name if path.is_dir() else name_or_path


def classify_first_image(model_dir: str, split: Dataset | IterableDataset) -> str:
    """One line on what the saved folder answers for the first image of a split, through `pipeline`."""
    record = next(iter(split))
    classifier = pipeline("image-classification", model=model_dir, trust_remote_code=True, device="cpu")
    answer = classifier(decode_image(record["image"]), top_k=1)[0]
    expected = classifier.model.config.id2label[record["label"]]
    return f"{model_dir} through pipeline: an image of '{expected}' is '{answer['label']}' ({answer['score']:.1%})"


__all__ = [
    "ModelArguments",
    "TntTrainingArguments",
    "checkpoint_name",
    "checkpoint_to_resume",
    "classify_first_image",
    "describe_training",
    "load_image_processor",
    "load_model",
    "make_trainer",
    "prepare_data",
    "record_run",
    "save_trained",
]
