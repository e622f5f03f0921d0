"""Images and labels: what is found, refused, decoded and aligned with a model's classes; needs `[train]`."""

from ..image_processors import check_input_size, input_size, pixel_values_of
from .datasets import (
    AUGMENTATION_FIELDS,
    BUNDLED_DATASET_NAME,
    DataArguments,
    align_labels,
    card_license,
    class_names,
    describe_dataset,
    evaluation_images,
    evaluation_transform,
    load_images,
    num_evaluation_workers,
    prepare_data,
    present_classes,
    read_stream,
    select_images,
    shard_of,
)
from .image_files import BadData, decode_image, find_images


__all__ = [
    "AUGMENTATION_FIELDS",
    "BUNDLED_DATASET_NAME",
    "BadData",
    "DataArguments",
    "align_labels",
    "card_license",
    "check_input_size",
    "class_names",
    "decode_image",
    "describe_dataset",
    "evaluation_images",
    "evaluation_transform",
    "find_images",
    "input_size",
    "load_images",
    "num_evaluation_workers",
    "pixel_values_of",
    "prepare_data",
    "present_classes",
    "read_stream",
    "select_images",
    "shard_of",
]
