"""Images and labels for training and evaluation, through `datasets`: the bundled subset, Hub ids and image folders."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Image, load_dataset
from PIL import Image as PILImage
from transformers import BaseImageProcessor


EXAMPLES_DIR = Path(__file__).parents[1] / "examples"
BUNDLED_DATASET = EXAMPLES_DIR / "fashion_mnist"
VALIDATION_SPLITS = ("validation", "valid", "val", "test")
TRAIN_AUGMENTATIONS = ("none", "flip", "crop")


@dataclass
class DataArguments:
    """Which images to use; without a dataset name or folder, the bundled Fashion-MNIST subset."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Dataset id on the Hub, or a folder in its format."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that dataset."})
    train_dir: str | None = field(default=None, metadata={"help": "Training images, one subfolder for each class."})
    validation_dir: str | None = field(default=None, metadata={"help": "Validation images, in the same layout."})
    image_column_name: str = field(default="image", metadata={"help": "Column of the images."})
    label_column_name: str = field(default="label", metadata={"help": "Column of the labels."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only this many first training images."})
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Use only this many first validation images."}
    )
    train_augmentation: str = field(
        default="crop",
        metadata={
            "help": "Augmentation of training images: none, flip (horizontally), or crop (random resized crop and "
            "flip).",
            "choices": TRAIN_AUGMENTATIONS,
        },
    )

    def __post_init__(self):
        if self.dataset_name and (self.train_dir or self.validation_dir):
            raise ValueError("Give either --dataset_name or --train_dir / --validation_dir, not both.")
        for name in ("train_dir", "validation_dir"):
            folder = getattr(self, name)
            if folder is not None and not Path(folder).is_dir():
                raise ValueError(f"--{name} must be a folder with one subfolder for each class, got {folder}.")
        for name in ("max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}.")

    @property
    def source(self) -> str:
        """What the images are called in results and cards."""
        if self.dataset_name:
            return self.dataset_name
        if self.train_dir or self.validation_dir:
            return Path(self.validation_dir or self.train_dir).resolve().parent.name
        return "Fashion-MNIST (bundled subset)"


def load_images(arguments: DataArguments, *, train: bool, validation: bool) -> DatasetDict:
    """
    Load the splits asked for, as `train` and `validation`, with undecoded `image` and integer `label` columns.

    Raises:
        ValueError: If the data cannot be loaded, a split or column is missing or empty, or an image cannot be read.
    """
    wanted = [name for name, is_wanted in (("train", train), ("validation", validation)) if is_wanted]
    dataset = _load(arguments)
    splits = {}
    for name in wanted:
        candidates = ("train",) if name == "train" else VALIDATION_SPLITS
        found = next((candidate for candidate in candidates if candidate in dataset), None)
        if found is None:
            raise ValueError(
                f"{arguments.source} has no {name} split: expected one of {', '.join(candidates)}, got "
                f"{', '.join(dataset) or 'none'}."
            )
        limit = arguments.max_train_samples if name == "train" else arguments.max_eval_samples
        splits[name] = _checked_split(dataset[found], name, limit, arguments)
    return DatasetDict(splits)


def _load(arguments: DataArguments) -> DatasetDict:
    folders = {"train": arguments.train_dir, "validation": arguments.validation_dir}
    try:
        if any(folders.values()):
            files = {split: f"{Path(folder).resolve()}/**" for split, folder in folders.items() if folder}
            return load_dataset("imagefolder", data_files=files)
        return load_dataset(arguments.dataset_name or str(BUNDLED_DATASET), arguments.dataset_config_name)
    except Exception as error:
        raise ValueError(f"{arguments.source} could not be loaded: {type(error).__name__}: {error}") from error


def _checked_split(dataset: Dataset, name: str, limit: int | None, arguments: DataArguments) -> Dataset:
    columns = {"image": arguments.image_column_name, "label": arguments.label_column_name}
    missing = [column for column in columns.values() if column not in dataset.column_names]
    if missing:
        raise ValueError(
            f"The {name} split of {arguments.source} has no column {', '.join(missing)}; its columns are "
            f"{', '.join(dataset.column_names)}. Images of a folder get labels from one subfolder for each class."
        )
    if len(dataset) == 0:
        raise ValueError(f"The {name} split of {arguments.source} is empty.")
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    dataset = dataset.select_columns(list(columns.values()))
    dataset = dataset.rename_columns({column: key for key, column in columns.items() if column != key})
    dataset = dataset.cast_column("image", Image(mode="RGB", decode=False))
    decode_image(dataset[0]["image"])
    return dataset


def decode_image(record: dict[str, Any]) -> PILImage.Image:
    """
    The RGB image of a record of an undecoded `datasets` image column.

    Raises:
        ValueError: If the image cannot be read; the message names the file if the record does.
    """
    try:
        return Image(mode="RGB").decode_example(record)
    except Exception as error:
        raise ValueError(f"Image {record.get('path') or 'without a file name'} cannot be read: {error}") from error


def class_names(dataset: Dataset) -> list[str] | None:
    """Names of the classes in label order, if the dataset knows them."""
    feature = dataset.features["label"]
    return list(feature.names) if isinstance(feature, ClassLabel) else None


def align_labels(dataset: Dataset, label2id: dict[str, int]) -> Dataset:
    """
    Bring the labels into the order of a trained classifier.

    If dataset and classifier know the same class names, labels are matched by name. If they have no name in common
    (WordNet ids against words, say) the order is taken to be the same.

    Raises:
        ValueError: If the number of classes differs, the names only overlap, or a label is out of range.
    """
    num_labels = len(label2id)
    names = class_names(dataset)
    labels = dataset.unique("label")
    if names is None:
        if not all(isinstance(label, int) and 0 <= label < num_labels for label in labels):
            raise ValueError(
                f"The labels must be integers from 0 to {num_labels - 1}, one for each class of the model's "
                f"classifier, got {sorted(labels, key=str)[:3]}..."
            )
        return dataset
    if len(names) != num_labels:
        raise ValueError(
            f"The labels do not match the model's classifier: {len(names)} classes ({', '.join(names[:3])}...) "
            f"against {num_labels} ({', '.join(list(label2id)[:3])}...)."
        )
    if any(label is None or label < 0 for label in labels):
        raise ValueError("The split holds images without a label.")
    if names == sorted(label2id, key=label2id.get):
        return dataset
    common = set(names) & set(label2id)
    if common == set(names):
        return dataset.align_labels_with_mapping(label2id, "label")
    if common:
        raise ValueError(
            "The labels do not match the model's classifier: only part of the class names agree. In the data alone: "
            f"{', '.join(sorted(set(names) - common)[:3])}; in the model alone: "
            f"{', '.join(sorted(set(label2id) - common)[:3])}."
        )
    return dataset


def evaluation_transform(image_processor: BaseImageProcessor) -> Callable[[dict], dict]:
    """What the checkpoint's image processor does, as a lazy transform of `datasets`."""

    def transform(batch: dict) -> dict:
        images = [decode_image(record) for record in batch["image"]]
        return {**image_processor(images, return_tensors="pt"), "labels": batch["label"]}

    return transform


def train_transform(image_processor: BaseImageProcessor, augmentation: str) -> Callable[[dict], dict]:
    """
    Augment with torchvision, then resize and normalise as the image processor does.

    Args:
        image_processor: The checkpoint's.
        augmentation (`str`): `"none"`, `"flip"` (horizontal), or `"crop"` (bicubic random resized crop and flip).
    """
    if augmentation == "none":
        return evaluation_transform(image_processor)
    from torchvision.transforms import Compose, InterpolationMode, RandomHorizontalFlip, RandomResizedCrop

    augment, resize = RandomHorizontalFlip(), {}
    if augmentation == "crop":
        crop = RandomResizedCrop(_input_size(image_processor), interpolation=InterpolationMode.BICUBIC)
        augment, resize = Compose([crop, augment]), {"do_resize": False, "do_center_crop": False}

    def transform(batch: dict) -> dict:
        images = [augment(decode_image(record)) for record in batch["image"]]
        return {**image_processor(images, return_tensors="pt", **resize), "labels": batch["label"]}

    return transform


def _input_size(image_processor: BaseImageProcessor) -> tuple[int, int]:
    height, width = image_processor(PILImage.new("RGB", (64, 64)), return_tensors="pt")["pixel_values"].shape[-2:]
    return height, width


def check_input_size(image_processor: BaseImageProcessor, image_size: tuple[int, int]) -> None:
    """
    Raises:
        ValueError: If the image processor makes images of another height and width than the model takes.
    """
    size = _input_size(image_processor)
    if size != tuple(image_size):
        raise ValueError(
            f"The image processor makes images of {size[0]}x{size[1]} pixels, the model takes "
            f"{image_size[0]}x{image_size[1]}."
        )
