"""Settings of a training run, read from a recipe and flags, and the model, data and Trainer made from them."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, DatasetDict
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoImageProcessor,
    BaseImageProcessor,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
    pipeline,
)

from .configuration_tnt import height_and_width
from .conversion import load_classifier, to_plain_model
from .data import (
    EXAMPLES_DIR,
    DataArguments,
    align_labels,
    check_input_size,
    class_names,
    decode_image,
    evaluation_transform,
    train_transform,
)
from .evaluation import check_no_results, compute_metrics, top_classes
from .modeling_tnt import TntDeiTForImageClassification, TntViTForImageClassification
from .schedules import PUBLISHED_SCHEDULES, parse_schedule


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
        metadata={
            "help": "Schedule stored in the trained checkpoint: full, single, multi or LAYERS:RATES[:SIMILAR_TOKENS]."
        },
    )
    train_backbone: bool = field(
        default=False, metadata={"help": "Train all weights instead of the scoring heads on a frozen backbone."}
    )
    plain_vit: bool = field(
        default=False,
        metadata={"help": "Train all weights without TNT, evaluate unpruned, and save the plain Transformers model."},
    )
    noise_std: float | None = field(default=None, metadata={"help": "Config field; the checkpoint's by default."})
    num_noise_layers: int | None = field(default=None, metadata={"help": "Config field; the checkpoint's by default."})
    noise_layer_norm: bool | None = field(
        default=None, metadata={"help": "Config field; the checkpoint's by default."}
    )
    similarity_partition: str | None = field(
        default=None, metadata={"help": "Config field; the checkpoint's by default."}
    )
    attn_implementation: str = field(default="sdpa", metadata={"help": "sdpa, eager or flash_attention_2."})

    def __post_init__(self):
        self.schedule = parse_schedule(self.schedule)
        if self.plain_vit and self.config_overrides:
            raise ValueError(f"--plain_vit trains without TNT: drop {', '.join(self.config_overrides)}.")
        if self.plain_vit:
            self.num_noise_layers = 0

    @property
    def config_overrides(self) -> dict[str, Any]:
        """The TNT config fields that were given."""
        names = ("noise_std", "num_noise_layers", "noise_layer_norm", "similarity_partition")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass
class TntTrainingArguments(TrainingArguments):
    """[`TrainingArguments`] with defaults that fit images and frozen backbones."""

    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay off: the transforms read columns the model does not take."}
    )
    label_names: list[str] | None = field(default_factory=lambda: ["labels"], metadata={"help": "The label keys."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Write into an output folder that already holds files."}
    )

    def __post_init__(self):
        super().__post_init__()
        if str(self.resume_from_checkpoint).lower() in ("true", "false"):
            self.resume_from_checkpoint = str(self.resume_from_checkpoint).lower() == "true"


def parse_recipe_and_flags(dataclass_types: Sequence[type], arguments: Sequence[str]) -> tuple[Any, ...]:
    """
    Parse `[RECIPE.yaml|RECIPE.json] [--flag value ...]`; a flag overrides the recipe.

    Raises:
        ValueError: If the recipe does not exist, is no mapping, or a key or flag is unknown.
    """
    arguments = list(arguments)
    if arguments and not arguments[0].startswith("-"):
        arguments = [*_recipe_flags(Path(arguments[0])), *arguments[1:]]
    return HfArgumentParser(dataclass_types, allow_abbrev=False).parse_args_into_dataclasses(arguments)


def _recipe_flags(path: Path) -> Iterator[str]:
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise ValueError(f"A recipe must be a .yaml, .yml or .json file, got {path}.")
    if not path.is_file():
        raise ValueError(f"There is no recipe {path}.")
    try:
        recipe = yaml.safe_load(path.read_text())  # JSON is YAML
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} must hold a mapping of flags to values, got {type(recipe).__name__}.")
    for name, value in recipe.items():
        if value is None:
            continue
        yield f"--{name}"
        if isinstance(value, list):
            yield from map(str, value)
        else:
            yield json.dumps(value) if isinstance(value, dict) else str(value)


@contextmanager
def clear_errors() -> Iterator[None]:
    """Report bad input as one line and exit with status 1, in scripts, before any work."""
    try:
        yield
    except (ValueError, OSError, StrictDataclassError) as error:
        sys.exit(f"Error: {error}")


def check_output_dir(arguments: TntTrainingArguments) -> None:
    """
    Raises:
        ValueError: If there is nothing to do, or the run would overwrite files of another.
    """
    if not arguments.do_train and not arguments.do_eval:
        raise ValueError("Nothing to do: pass --do_train, --do_eval or both.")
    output_dir = Path(arguments.output_dir)
    if arguments.overwrite_output_dir or arguments.resume_from_checkpoint:
        return
    if arguments.do_train and output_dir.is_dir() and any(output_dir.iterdir()):
        raise ValueError(
            f"{output_dir} is not empty: pass --resume_from_checkpoint true to continue that run, "
            "--overwrite_output_dir to write over it, or another --output_dir."
        )
    check_no_results(output_dir, overwrite=False)


def load_image_processor(name_or_path: str, revision: str = "main") -> BaseImageProcessor:
    """The image processor of a checkpoint, with Pillow for resizing whatever else is installed."""
    return AutoImageProcessor.from_pretrained(name_or_path, revision=revision, backend="pil")


def load_model(
    arguments: ModelArguments, dataset: DatasetDict
) -> TntViTForImageClassification | TntDeiTForImageClassification:
    """
    Load the checkpoint as the arguments say: frozen but for its scoring heads, wholly trainable, or without TNT.

    A classification head for other classes than the checkpoint's starts at random, and only where it is trained.

    Raises:
        ValueError: If the checkpoint, its classes or the config fields do not fit; see [`load_classifier`].
    """
    fields = arguments.config_overrides
    trains_all = arguments.train_backbone or arguments.plain_vit
    names = class_names(dataset["train"]) if trains_all and "train" in dataset else None
    if names is not None:
        fields["id2label"] = dict(enumerate(names))
        fields["label2id"] = {name: index for index, name in enumerate(names)}
    model = load_classifier(
        arguments.model_name_or_path,
        allow_new_head=names is not None,
        revision=arguments.model_revision,
        attn_implementation=arguments.attn_implementation,
        **fields,
    )
    schedule = PUBLISHED_SCHEDULES["full"] if arguments.plain_vit else arguments.schedule
    model.set_schedule(schedule.prune_layers, schedule.keep_rates, schedule.num_similar_tokens)
    if trains_all:
        model.freeze_idle_heads()
    else:
        model.freeze_backbone()
    return model


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
            name: align_labels(split, model.config.label2id).with_transform(transforms[name])
            for name, split in dataset.items()
        }
    )


def make_trainer(
    model: PreTrainedModel, dataset: DatasetDict, image_processor: BaseImageProcessor, arguments: TntTrainingArguments
) -> Trainer:
    """A Trainer that reports top-1 and top-5 and saves the image processor with every checkpoint."""
    if arguments.ddp_find_unused_parameters is None:
        arguments.ddp_find_unused_parameters = False  # every parameter without a gradient is frozen
    return Trainer(
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


def classify_first_image(model_dir: str, split: Dataset) -> str:
    """One line on what the saved folder answers for the first image of a split, through `pipeline`."""
    record = split.with_format(None)[0]
    classifier = pipeline("image-classification", model=model_dir, trust_remote_code=True, device="cpu")
    answer = classifier(decode_image(record["image"]), top_k=1)[0]
    expected = classifier.model.config.id2label[record["label"]]
    return f"{model_dir} through pipeline: an image of '{expected}' is '{answer['label']}' ({answer['score']:.1%})"
