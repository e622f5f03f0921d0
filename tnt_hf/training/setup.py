"""The model and the Trainer that the settings of a training run ask for, and what a results file says of the run."""

import copy
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from transformers import (
    BaseImageProcessor,
    PreTrainedModel,
    Trainer,
    default_data_collator,
    get_scheduler,
    pipeline,
)
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from ..adaptation import adaptable_parameters
from ..config_fields import describe_fields
from ..conversion import checkpoint_classes, load_classifier
from ..data import (
    DataArguments,
    card_license,
    class_names,
    decode_image,
    describe_dataset,
    evaluation_images,
)
from ..evaluation import compute_metrics, top_classes
from ..examples import BUNDLED_BACKBONE
from ..labels import may_keep_head, numbers
from ..modeling_tnt import TntDeiTForImageClassification, TntViTForImageClassification
from ..named_schedules import parse_schedule, resolve_schedules
from .arguments import ModelArguments, TntTrainingArguments
from .images import (
    BAD_IMAGES_NAME,
    BadImages,
    MixingCollator,
    StreamedTrainingImages,
    TrainingImages,
    training_transform,
)
from .trainer import TntTrainer, images_per_step


logger = logging.get_logger(__name__)


def load_model(
    arguments: ModelArguments,
    dataset: DatasetDict | IterableDatasetDict,
    training_arguments: TntTrainingArguments,
    *,
    trust_label_order: bool = False,
) -> TntViTForImageClassification | TntDeiTForImageClassification:
    """
    Load the checkpoint in float32 and as the arguments say: frozen but for its scoring heads, or for LayerNorms and
    biases, or wholly trainable.

    If all weights train on other classes than the checkpoint's, or on classes that the data only numbers, the
    classification heads start at random; with `trust_label_order` as many classes are the checkpoint's.

    Raises:
        ValueError: If the checkpoint, its classes or the config fields do not fit, see [`load_classifier`], or the
            scoring heads of a model that needs no scores were to train.
    """
    fields = arguments.config_overrides
    trains_all = training_arguments.do_train and arguments.train_backbone
    if trains_all and training_arguments.self_distillation:
        raise ValueError("--self_distillation goes without --train_backbone, which would change what teaches.")
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
    (schedule,) = resolve_schedules(model.config, [arguments.schedule])  # type: ignore[list-item]
    model.set_schedule(schedule)
    if trains_all:
        if hasattr(model.config, "distillation_head_in_loss"):
            model.config.distillation_head_in_loss = True
        freeze_idle_heads(model)
    elif training_arguments.do_train and training_arguments.adaptation_schedules:
        model.requires_grad_(False)
        for parameter in adaptable_parameters(model).values():
            parameter.requires_grad_(True)
    elif training_arguments.do_train:
        if not model.config.uses_scores:
            raise ValueError(
                f"Scoring heads learn nothing with token_reduction {model.config.token_reduction!r}, which needs no "
                "scores: --adaptation_schedules adapts such a model to budgets."
            )
        model.freeze_backbone()
    return model


def freeze_idle_heads(model: TntViTForImageClassification | TntDeiTForImageClassification) -> None:
    """Freeze what no gradient reaches, so that all weights can train without `find_unused_parameters`."""
    config, backbone = model.config, model.base_model
    backbone.alpha_heads[config.num_learning_layers :].requires_grad_(False)
    if config.num_noise_layers == 0 and backbone.alpha_norm is not None:
        backbone.alpha_norm.requires_grad_(False)
    if not getattr(config, "distillation_head_in_loss", True):
        model.distillation_classifier.requires_grad_(False)


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


def make_trainer(
    model: PreTrainedModel,
    images: DatasetDict | IterableDatasetDict,
    image_processor: BaseImageProcessor,
    arguments: TntTrainingArguments,
    data_arguments: DataArguments,
    **evaluation: Any,
) -> TntTrainer:
    """
    A Trainer that reports top-1 and top-5, saves the image processor with every checkpoint, and never pushes: its
    pushes would leave out the code and hold pickles, so scripts publish the finished run instead.

    Args:
        model ([`PreTrainedModel`]): What of it learns is what requires gradients.
        images (`DatasetDict`): The splits `train` and `validation`, or one of them, undecoded, with aligned labels.
        image_processor ([`BaseImageProcessor`]): That of the model.
        arguments ([`TntTrainingArguments`]): How to train.
        data_arguments ([`~tnt_hf.data.DataArguments`]): How to augment, and how many images may be bad.
        evaluation: What [`TntTrainer.evaluate_schedules`] evaluates: `schedules`, `random_control`, `candidates`.

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
    if "train" in images:
        train_images = _training_images(images["train"], image_processor, arguments, data_arguments)
    if "validation" in images:
        validation_images = evaluation_images(images["validation"], image_processor)
    return TntTrainer(
        model=model,
        args=arguments,
        data_collator=default_data_collator,
        train_collator=collator,
        repeated_augmentation=data_arguments.repeated_augmentation,
        images=images,
        adaptation_schedules=resolve_schedules(
            model.config, [parse_schedule(text) for text in arguments.adaptation_schedules]
        ),
        **evaluation,
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
    images = trainer.images["train"]
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
        "trained": _trained(model_arguments, arguments),
        "adaptation_schedules": arguments.adaptation_schedules,
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
        **describe_fields(config),
        "self_distillation": arguments.self_distillation,
        "label_smoothing": trainer.train_collator.label_smoothing,
        "max_grad_norm": arguments.max_grad_norm,
        "lr_scheduler_kwargs": arguments.lr_scheduler_kwargs,
        "ema_decay": arguments.ema_decay,
        "loss": sum(losses) / len(losses) if losses else outcome.training_loss or None,
    }


def _trained(model_arguments: ModelArguments, arguments: TntTrainingArguments) -> str:
    if model_arguments.train_backbone:
        return "all weights"
    return "LayerNorms and biases" if arguments.adaptation_schedules else "scoring heads"


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
    "checkpoint_name",
    "classify_first_image",
    "describe_training",
    "freeze_idle_heads",
    "load_model",
    "make_trainer",
]
