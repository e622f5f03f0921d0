"""Images and labels for training and evaluation, through `datasets`: the bundled subset, Hub ids and image folders."""

import glob
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    IterableDatasetDict,
    Value,
    load_dataset,
)
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import RepoCard, hf_hub_download
from torch.utils.data import IterableDataset as TorchIterableDataset
from transformers import BaseImageProcessor, PreTrainedModel
from transformers.utils import logging

from ..examples import BUNDLED_DATASET
from ..image_processors import check_input_size
from ..labels import (
    OtherClasses,
    are_the_same_names,
    describe_mismatch,
    is_counting,
    match_classes,
    misplaced_class,
    names_in_order,
    numbers,
)
from ..schedules_tnt import height_and_width
from .image_files import BadData, check_files, check_headers, decode_image


logger = logging.get_logger(__name__)

BUNDLED_DATASET_NAME = "Fashion-MNIST (bundled subset)"
BUNDLED_DATASET_HUB_ID = "zalando-datasets/fashion_mnist"  # what it is a subset of
SHARD_COLUMN = "__url__"  # which archive a record of WebDataset is from
VALIDATION_SPLITS = ("validation", "valid", "val", "test")
TRAIN_AUGMENTATIONS = ("none", "flip", "crop")
AUGMENTATION_FIELDS = ("auto_augment", "color_jitter", "random_erasing", "repeated_augmentation", "mixup", "cutmix")


@dataclass
class DataArguments:
    """Which images to use; without a dataset name or folder, the bundled Fashion-MNIST subset."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Id of a dataset on the Hub, or a folder in the format of one."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that dataset."})
    train_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of training images: one subfolder for each class, or any layout with --self_distillation."
        },
    )
    validation_dir: str | None = field(
        default=None, metadata={"help": "Folder of validation images, with one subfolder for each class."}
    )
    image_column_name: str = field(default="image", metadata={"help": "Column of the dataset that holds the images."})
    label_column_name: str = field(default="label", metadata={"help": "Column of the dataset that holds the labels."})
    max_train_samples: int | None = field(
        default=None,
        metadata={"help": "Use only so many training images, drawn with seed 0. A stream gives its first ones."},
    )
    max_eval_samples: int | None = field(
        default=None,
        metadata={"help": "Use only so many validation images, drawn with seed 0. A stream gives its first ones."},
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read images while they are used, without storing them first. Training then needs --max_steps."
        },
    )
    shuffle_buffer_size: int = field(
        default=2000,
        metadata={"help": "With --streaming: undecoded images that each reading process holds and draws from."},
    )
    trust_label_order: bool = field(
        default=False,
        metadata={
            "help": "Take class n of the data for class n of the model, unless most names say that it is another."
        },
    )
    train_augmentation: str = field(
        default="crop",
        metadata={
            "help": "Augmentation of training images: none, flip (horizontally), or crop (bicubic random resized crop "
            "and flip).",
            "choices": TRAIN_AUGMENTATIONS,
        },
    )
    auto_augment: str | None = field(
        default=None,
        metadata={
            "help": "Policy of timm, such as rand-m9-mstd0.5-inc1 (RandAugment). Needs --train_augmentation crop."
        },
    )
    color_jitter: float = field(
        default=0.0,
        metadata={"help": "Strength of colour jitter. Needs --train_augmentation crop; --auto_augment replaces it."},
    )
    random_erasing: float = field(
        default=0.0,
        metadata={"help": "Probability that noise replaces a rectangle of an image. Needs --train_augmentation crop."},
    )
    repeated_augmentation: int = field(
        default=1, metadata={"help": "How many times in a row each image is used, each time with a new augmentation."}
    )
    mixup: float = field(default=0.0, metadata={"help": "Alpha of mixup; 0 turns it off."})
    cutmix: float = field(
        default=0.0,
        metadata={"help": "Alpha of CutMix; 0 turns it off. If mixup is on too, each batch gets one of the two."},
    )
    max_bad_images: float = field(
        default=0.001,
        metadata={
            "help": "Share of unreadable training images, or of those that a stream gives, above which the training "
            "stops."
        },
    )

    def __post_init__(self):
        if self.dataset_name and (self.train_dir or self.validation_dir):
            raise ValueError("Give either --dataset_name or --train_dir / --validation_dir, not both.")
        for name in ("train_dir", "validation_dir"):
            folder = getattr(self, name)
            if folder is not None and not Path(folder).is_dir():
                raise ValueError(f"--{name} must be a folder of images, got {folder}.")
        if self.train_augmentation not in TRAIN_AUGMENTATIONS:
            raise ValueError(
                f"--train_augmentation must be one of {', '.join(TRAIN_AUGMENTATIONS)}, got {self.train_augmentation}."
            )
        needing_crop = [
            name for name in ("auto_augment", "color_jitter", "random_erasing") if getattr(self, name) not in (None, 0)
        ]
        if needing_crop and self.train_augmentation != "crop":
            raise ValueError(
                f"--{needing_crop[0]} goes with --train_augmentation crop, got {self.train_augmentation}."
            )
        for name in ("color_jitter", "mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} must be at least 0, got {getattr(self, name)}.")
        for name in ("random_erasing", "max_bad_images"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} must be from 0 to 1, got {getattr(self, name)}.")
        if self.repeated_augmentation < 1:
            raise ValueError(f"--repeated_augmentation must be at least 1, got {self.repeated_augmentation}.")
        if self.shuffle_buffer_size < 1:
            raise ValueError(f"--shuffle_buffer_size must be at least 1, got {self.shuffle_buffer_size}.")
        for name in ("max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}.")

    @property
    def augmentation(self) -> str:
        """What is done to the training images, in words."""
        defaults = type(self).__dataclass_fields__
        changed = [name for name in AUGMENTATION_FIELDS if getattr(self, name) != defaults[name].default]
        return ", ".join([self.train_augmentation, *(f"{name} {getattr(self, name)}" for name in changed)])

    @property
    def source(self) -> str:
        """What the images are called in results and cards."""
        if self.dataset_name:
            is_folder = Path(self.dataset_name).is_dir()
            return Path(self.dataset_name).resolve().name if is_folder else self.dataset_name
        if self.folders:
            return Path(self.validation_dir or self.train_dir).resolve().parent.name
        return BUNDLED_DATASET_NAME

    @property
    def folders(self) -> dict[str, str]:
        """The folders of images that were given, by the name of their split."""
        folders = {"train": self.train_dir, "validation": self.validation_dir}
        return {split: folder for split, folder in folders.items() if folder}

    @property
    def hub_id(self) -> str | None:
        """Id of the data set on the Hub, if it is one."""
        if self.dataset_name:
            return None if Path(self.dataset_name).exists() else self.dataset_name
        return None if self.folders else BUNDLED_DATASET_HUB_ID


def load_images(
    arguments: DataArguments,
    *,
    train: bool,
    validation: bool,
    train_labels: bool = True,
    extra_columns: Sequence[str] = (),
    may_stream: bool = False,
) -> DatasetDict | IterableDatasetDict:
    """
    Load the splits asked for, as `train` and `validation`, with undecoded `image` and integer `label` columns, and
    those of `extra_columns` that there are. Without `train_labels` the training images need no labels and get none.

    Raises:
        ValueError: If the data cannot be loaded, a split or column is missing or empty, an image cannot be read, or
            the data is to be streamed to a caller that reads it at random (not `may_stream`).
    """
    if arguments.streaming and not may_stream:
        raise ValueError("--streaming is for training and evaluation: this command reads images at random.")
    _check_folders(arguments.folders, train, validation)
    return select_images(
        _load(arguments, train_labels),
        arguments,
        train=train,
        validation=validation,
        train_labels=train_labels,
        extra_columns=extra_columns,
        source=arguments.source,
        folders=arguments.folders,
    )


def select_images(
    dataset: Mapping[str, Dataset | IterableDataset],
    arguments: DataArguments,
    *,
    train: bool,
    validation: bool,
    train_labels: bool = True,
    extra_columns: Sequence[str] = (),
    source: str = "the dataset",
    folders: Mapping[str, str] | None = None,
) -> DatasetDict | IterableDatasetDict:
    """
    As [`load_images`], of a dataset that is loaded already. Errors call it `source`, and a split that is of one of
    `folders` by the path of that folder.

    Raises:
        ValueError: If a split or column is missing or empty, or an image cannot be read.
    """
    wanted = [name for name, is_wanted in (("train", train), ("validation", validation)) if is_wanted]
    splits = {}
    for name in wanted:
        candidates = ("train",) if name == "train" else VALIDATION_SPLITS
        found = next((candidate for candidate in candidates if candidate in dataset), None)
        if found is None:
            raise ValueError(
                f"There is no {name} split in {source}: expected one of {', '.join(candidates)}, got "
                f"{', '.join(dataset) or 'none'}."
            )
        limit = arguments.max_train_samples if name == "train" else arguments.max_eval_samples
        has_labels = train_labels or name == "validation"
        origin = (folders or {}).get(name, source)
        splits[name] = _checked_split(dataset[found], name, limit, arguments, has_labels, extra_columns, origin)
    is_stream = any(isinstance(split, IterableDataset) for split in splits.values())
    return (IterableDatasetDict if is_stream else DatasetDict)(splits)


def describe_dataset(arguments: DataArguments, split: Dataset | IterableDataset) -> dict[str, Any]:
    """Where the images of a split come from, for results and cards; None is what is not known."""
    is_bundled = arguments.source == BUNDLED_DATASET_NAME
    card = str(BUNDLED_DATASET) if is_bundled else arguments.dataset_name
    return {
        "dataset": arguments.source,
        "dataset_hub_id": arguments.hub_id,
        "dataset_license": None if card is None else card_license(card, repo_type="dataset"),
        "dataset_split": None if split.split is None else str(split.split),
    }


def card_license(name_or_path: str, *, repo_type: str = "model", revision: str | None = None) -> str | None:
    """The licence identifier in the card of a folder or Hub repo; None if there is no card, or it names none."""
    try:
        if Path(name_or_path).is_dir():
            path = Path(name_or_path) / "README.md"
        else:
            path = Path(hf_hub_download(name_or_path, "README.md", repo_type=repo_type, revision=revision))
        license = RepoCard.load(path, ignore_metadata_errors=True).data.get("license")
    except (OSError, ValueError):
        return None
    return license if isinstance(license, str) else None


def _check_folders(folders: Mapping[str, str], train: bool, validation: bool) -> None:
    """
    Raises:
        ValueError: If folders are given, but none for a split that is wanted.
    """
    for name, is_wanted in (("train", train), ("validation", validation)):
        if folders and is_wanted and name not in folders:
            ((other, folder),) = folders.items()
            alone = {"train": "evaluate with --do_train false", "validation": "train with --do_eval false"}[name]
            raise ValueError(
                f"There is no {name} split: --{other}_dir {folder} is the {other} split alone. Pass --{name}_dir too"
                f"{f', or {alone}' if train and validation else ''}."
            )


def _load(arguments: DataArguments, train_labels: bool) -> Mapping[str, Dataset | IterableDataset]:
    folders = arguments.folders
    for folder in folders.values():
        check_files(Path(folder), is_image_folder=True)
    if arguments.dataset_name is not None:
        check_files(Path(arguments.dataset_name), is_image_folder=False)
    try:
        if folders:
            files = {split: f"{glob.escape(str(Path(folder).resolve()))}/**" for split, folder in folders.items()}
            load_folder = partial(load_dataset, "imagefolder", streaming=arguments.streaming)
            if train_labels or "train" not in files:
                return load_folder(data_files=files)
            unlabelled = load_folder(data_files={"train": files.pop("train")}, drop_labels=True)
            return {**unlabelled, **(load_folder(data_files=files) if files else {})}
        return load_dataset(
            arguments.dataset_name or str(BUNDLED_DATASET),
            arguments.dataset_config_name,
            streaming=arguments.streaming,
        )
    except Exception as error:
        reason = error.__cause__ if type(error) is DatasetGenerationError else None  # which itself says nothing
        reason = reason or error
        source = " and ".join(folders.values()) or arguments.source
        raise BadData(f"{source} could not be loaded: {type(reason).__name__}: {reason}") from error


def _checked_split(
    dataset: Dataset | IterableDataset,
    name: str,
    limit: int | None,
    arguments: DataArguments,
    has_labels: bool,
    extra_columns: Sequence[str],
    source: str,
) -> Dataset | IterableDataset:
    column_names = dataset.column_names or list(next(iter(dataset), {}))  # a stream may not know them
    columns = {"image": arguments.image_column_name}
    if has_labels:
        columns["label"] = arguments.label_column_name
    missing = [column for column in columns.values() if column not in column_names]
    if missing:
        remedy = "--image_column_name and --label_column_name name others."
        if column_names == ["image"]:
            remedy = (
                "Images of a folder get labels from one subfolder for each class, two or more, and none lies beside."
            )
            if name == "train":
                remedy += " Scoring heads learn without labels with --self_distillation."
        raise ValueError(
            f"The {name} split of {source} has no column {', '.join(missing)}; its columns are "
            f"{', '.join(column_names)}. {remedy}"
        )
    if isinstance(dataset, Dataset) and limit is not None and limit < len(dataset):
        dataset = dataset.shuffle(seed=0).select(range(limit))
    extra = [column for column in (*extra_columns, SHARD_COLUMN) if column in column_names]
    # before columns are renamed, for which a stream would decode them
    dataset = dataset.cast_column(columns["image"], Image(mode="RGB", decode=False))
    dataset = dataset.select_columns([*columns.values(), *extra])
    dataset = dataset.rename_columns({column: key for key, column in columns.items() if column != key})
    if isinstance(dataset, IterableDataset) and limit is not None:
        # one shard: of a stream of several, each of several readers would take a share of the limit
        taken = {"stream": dataset, "num_records": limit}
        dataset = IterableDataset.from_generator(
            _take, features=dataset.features, gen_kwargs=taken, split=dataset.split
        )
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"The {name} split of {source} is empty.")
    if name == "validation":
        decode_image(first["image"])
        if isinstance(dataset, Dataset):
            check_headers(dataset, source)
    return dataset


def _take(stream: IterableDataset, num_records: int) -> Iterator[dict[str, Any]]:
    yield from stream.take(num_records)


def class_names(dataset: Dataset | IterableDataset) -> list[str] | None:
    """Names of the classes in label order, if the dataset knows them."""
    feature = (dataset.features or {}).get("label")
    return list(feature.names) if isinstance(feature, ClassLabel) else None


def align_labels(
    dataset: Dataset | IterableDataset, id2label: Mapping[int, str], trust_label_order: bool = False
) -> Dataset | IterableDataset:
    """
    Bring the labels into the order of a trained classifier, as [`~tnt_hf.labels.match_classes`] says.

    With `trust_label_order`, as many classes are in the same order, unless most of their names say that it is another.
    Images without labels are returned as they are. The labels of a stream are checked as they come, but for the first.

    Raises:
        OtherClasses: If the classes are not those of the classifier.
        ValueError: If a label is missing or out of range, or `trust_label_order` contradicts the names of the classes.
    """
    is_stream = isinstance(dataset, IterableDataset)
    first = next(iter(dataset))
    if "label" not in first:
        return dataset
    model_names, names = names_in_order(id2label), class_names(dataset)
    num_classes = len(model_names if names is None else names)
    _check_label(first if is_stream else {"label": first["label"]}, num_classes)
    for label in [] if is_stream else sorted(dataset.unique("label"), key=str):
        _check_label({"label": label}, num_classes)
    order = _order_of_classes(names, model_names, trust_label_order)
    if order == [*range(num_classes)] and not is_stream:
        return dataset
    label_type = ClassLabel(names=model_names) if len(set(model_names)) == len(model_names) else Value("int64")
    features = dataset.features
    if features is not None and order != [*range(num_classes)]:
        features = Features({**features, "label": label_type})
    if is_stream:
        return dataset.map(partial(_reorder_label, order), features=features)
    return dataset.map(
        partial(_reorder_labels, order),
        input_columns="label",
        batched=True,
        features=features,
        desc="Aligning the labels",
    )


def present_classes(
    dataset: Dataset | IterableDataset, id2label: Mapping[int, str], trust_label_order: bool = False
) -> list[int]:
    """
    The classes of a classifier that a split has before its labels are aligned: those that it names if they are fewer
    than the classifier's, else those of its labels.

    Raises:
        OtherClasses: If the classes are not those of the classifier.
        ValueError: If the split is a stream that does not tell, or `trust_label_order` contradicts the names.
    """
    names, model_names = class_names(dataset), names_in_order(id2label)
    order = _order_of_classes(names, model_names, trust_label_order)
    if len(order) < len(model_names):
        return sorted(order)
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            "--candidate_classes must be all for a stream that does not name fewer classes than the model has."
        )
    return sorted(order[label] for label in dataset.unique("label"))


def _order_of_classes(names: Sequence[str] | None, model_names: Sequence[str], trust_label_order: bool) -> list[int]:
    """The model's class for each label."""
    in_order = [*range(len(model_names))]
    if names is None:
        if not trust_label_order and not is_counting(model_names):
            _tell_how_matched(names, model_names, "in the same order")
        return in_order
    misplaced, is_whole = misplaced_class(names, model_names), len(names) == len(model_names)
    if trust_label_order and is_whole:
        if misplaced is not None:
            raise ValueError(
                "--trust_label_order does not hold: most classes of the data have names of the model's classes, which "
                f"are in another order. Class {misplaced} is {names[misplaced]} in the data and "
                f"{model_names[misplaced]} in the model. Leave it out."
            )
        return in_order
    order = match_classes(names, model_names)
    if order is None:
        may_trust = "If they are the same classes in the same order, pass --trust_label_order."
        raise OtherClasses(
            f"The labels do not match the model's classifier. {describe_mismatch(names, model_names)} Rename the "
            "classes of the data (its folders), or those of the model in `id2label` of its config.json."
            f"{f' {may_trust}' if is_whole and misplaced is None else ''}"
        )
    if numbers(names) == order and numbers(model_names) is None:
        _tell_how_matched(names, model_names, "those of the same numbers")
    elif order == in_order and not is_counting(model_names) and not are_the_same_names(names, model_names):
        _tell_how_matched(names, model_names, "in the same order")
    return order


def _tell_how_matched(names: Sequence[str] | None, model_names: Sequence[str], how: str) -> None:
    number, shown = (len(model_names), "") if names is None else (len(names), f" ({', '.join(names[:3])}...)")
    logger.warning_once(
        f"The names of the {number} classes of the data{shown} do not say which of the model's they are "
        f"({', '.join(model_names[:3])}...): they are taken to be {how}."
    )


def _check_label(record: Mapping[str, Any], num_labels: int) -> None:
    label, image = record["label"], record.get("image") or {}
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < num_labels:
        name = f" of image {image['path']}" if image.get("path") else ""
        raise BadData(
            f"The labels must be integers from 0 to {num_labels - 1}, one for each class of the model's classifier, "
            f"got {label}{name}{shard_of(record)}."
        )


def _reorder_labels(order: Sequence[int], labels: Sequence[int]) -> dict[str, list[int]]:
    return {"label": [order[label] for label in labels]}


def _reorder_label(order: Sequence[int], record: dict[str, Any]) -> dict[str, int]:
    _check_label(record, len(order))
    return {"label": order[record["label"]]}


def shard_of(record: Mapping[str, Any]) -> str:
    """In which archive a record lies, for messages; empty if that is not known."""
    return f" in {record[SHARD_COLUMN]}" if record.get(SHARD_COLUMN) else ""


def evaluation_images(
    dataset: Dataset | IterableDataset, image_processor: BaseImageProcessor
) -> Dataset | TorchIterableDataset:
    """The examples of a split, `pixel_values` and `labels` if there are, as the image processor makes them."""
    transform = evaluation_transform(image_processor)
    if isinstance(dataset, Dataset):
        return dataset.with_transform(transform)
    return _StreamedEvaluationImages(
        dataset.map(transform, batched=True, batch_size=1, remove_columns=dataset.column_names)
    )


class _StreamedEvaluationImages(TorchIterableDataset):
    def __init__(self, examples: IterableDataset):
        self.examples = examples

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return read_stream(self.examples)


def read_stream(dataset: IterableDataset) -> Iterator[dict[str, Any]]:
    """
    The examples of a stream.

    Raises:
        BadData: If it breaks off.
    """
    try:
        yield from dataset
    except BadData:
        raise
    except Exception as error:  # of whatever library reads the shards
        raise BadData(f"The stream cannot be read to its end: {type(error).__name__}: {error}") from error


def num_evaluation_workers(dataset: Any, num_workers: int, num_processes: int) -> int:
    """
    How many of `num_workers` may read an evaluated split.

    With several processes Accelerate hands out what one of them reads of a stream, and drops the rest of any batch but
    the last that it cannot share out evenly; several workers each end with such a batch.
    """
    if not isinstance(dataset, _StreamedEvaluationImages):
        return num_workers
    return min(num_workers, dataset.examples.num_shards if num_processes == 1 else 1)


def evaluation_transform(image_processor: BaseImageProcessor) -> Callable[[dict], dict]:
    """What the checkpoint's image processor does, as a lazy transform of `datasets`."""
    return partial(_evaluation_examples, image_processor)


def _evaluation_examples(image_processor: BaseImageProcessor, batch: dict[str, Any]) -> dict[str, Any]:
    images = [decode_image(record) for record in batch["image"]]
    labels = {"labels": batch["label"]} if "label" in batch else {}
    return {"pixel_values": image_processor(images, return_tensors="pt")["pixel_values"].float(), **labels}


def prepare_data(
    dataset: DatasetDict | IterableDatasetDict,
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    arguments: DataArguments,
) -> DatasetDict | IterableDatasetDict:
    """
    Align the labels with the model's.

    Raises:
        OtherClasses: If the classes of the data are not those of the model.
        ValueError: If the labels, or what the image processor makes, do not fit the model.
    """
    check_input_size(image_processor, height_and_width(model.config.image_size), model.config.num_channels)
    return type(dataset)(
        {
            name: align_labels(split, model.config.id2label, arguments.trust_label_order)
            for name, split in dataset.items()
        }
    )


__all__ = [
    "DataArguments",
    "align_labels",
    "card_license",
    "class_names",
    "describe_dataset",
    "evaluation_images",
    "evaluation_transform",
    "load_images",
    "num_evaluation_workers",
    "prepare_data",
    "present_classes",
    "read_stream",
    "select_images",
    "shard_of",
]
