"""The Hub id that a visitor types -> a classifier, or a sentence that says why not."""

import re
from collections.abc import Mapping
from fnmatch import fnmatch
from functools import lru_cache
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi
from transformers import Dinov2Config, ImageProcessingMixin, PreTrainedConfig

from ..schedules_tnt import count_patches, height_and_width
from .looking import Classifier
from .uploads import RefusedInput


# Bytes of a file, by its name: others are not downloaded, so no code is.
MAX_BYTES = {"config.json": 5_000_000, "preprocessor_config.json": 100_000, "*.safetensors": 1_300_000_000}
# ViT-L at 512 pixels; these fields are memory and time, whatever the size of the files.
MAX_FIELDS = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "image_size": 512,
    "patch_size": 32,
    "num_labels": 22_000,
}
IMAGE_PROCESSORS = ("ViT", "DeiT", "Bit", "CLIP")
# Of these settings `size` and `crop_size` alone say how large an image becomes; no others may be set.
PROCESSOR_SETTINGS = {
    *("image_processor_type", "feature_extractor_type", "processor_class", "size", "crop_size", "resample"),
    *("do_convert_rgb", "do_resize", "do_center_crop", "do_rescale", "do_normalize", "default_to_square"),
    *("rescale_factor", "image_mean", "image_std", "data_format", "_valid_processor_keys"),
}
MAX_PATCHES = 1024
MAX_PROCESSED_SIDE = 1024  # pixels


@lru_cache(maxsize=2)
def load_hub_model(model_id: str) -> Classifier:
    """
    A public model of the Hub. It leaves the disk when it is read; no code of it is run.

    Raises:
        RefusedInput: If there is no such model, or it is of another kind or larger than allowed.
    """
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model_id):
        raise RefusedInput("A model id of the Hub has the form owner/name.")
    api = HfApi(token=False)
    unreachable = RefusedInput(f"{model_id} is no public model of the Hub, or the Hub cannot be reached.")
    try:
        commit = api.model_info(model_id).sha  # what is looked at is what is read
        entries = api.list_repo_tree(model_id, recursive=True, revision=commit)
        sizes = {entry.path: getattr(entry, "size", 0) for entry in entries}
    except Exception:
        raise unreachable from None
    for pattern, most in MAX_BYTES.items():
        total = sum(size for path, size in sizes.items() if fnmatch(path, pattern))
        if not 0 < total <= most:
            raise RefusedInput(
                f"A model must hold {pattern}, of at most {most / 1e6:g} MB; {model_id} has {total / 1e6:g} MB of it."
            )
    with TemporaryDirectory() as folder:
        try:
            api.snapshot_download(model_id, revision=commit, local_dir=folder, allow_patterns=list(MAX_BYTES))
        except Exception:
            raise unreachable from None
        try:
            check_fields(PreTrainedConfig.get_config_dict(folder)[0])
            check_processor(ImageProcessingMixin.get_image_processor_dict(folder)[0])
            return Classifier(folder)
        except RefusedInput:
            raise
        except Exception:
            raise RefusedInput(
                f"{model_id} cannot be loaded as a ViT or distilled DeiT for image classification."
            ) from None


def check_fields(config: Mapping[str, Any]) -> None:
    """Raise [`RefusedInput`] if a model of this config may be larger than allowed; absent fields have defaults."""
    if config.get("model_type") == Dinov2Config.model_type:  # whose image processor says how many patches there are
        raise RefusedInput("A model must be a ViT or distilled DeiT here, got a DINOv2.")
    values = [(name, config.get(name, 1)) for name in MAX_FIELDS] + [
        ("num_labels", len(config.get("id2label") or "1"))
    ]
    for name, value in values:
        most = MAX_FIELDS[name]
        if not all(isinstance(side, int) and 1 <= side <= most for side in height_and_width(value)):
            raise RefusedInput(f"`{name}` of a model may be at most {most} here, got {value}.")
    if config.get("num_channels", 3) != 3:
        raise RefusedInput(f"A model must see images of 3 channels here, got {config['num_channels']}.")
    num_patches = count_patches(config.get("image_size", 224), config.get("patch_size", 16))
    if num_patches > MAX_PATCHES:
        raise RefusedInput(f"A model may see at most {MAX_PATCHES} patches here, got {num_patches}.")


def check_processor(processor: Mapping[str, Any]) -> None:
    """Raise [`RefusedInput`] if an image processor may make larger images than allowed."""
    kind = processor.get("image_processor_type") or processor.get("feature_extractor_type") or IMAGE_PROCESSORS[0]
    kind = re.sub(r"(ImageProcessor(Fast|Pil)?|FeatureExtractor)$", "", str(kind))
    if kind not in IMAGE_PROCESSORS:
        raise RefusedInput(f"The image processor must be of {', '.join(IMAGE_PROCESSORS)} here, got {kind[:40]}.")
    unknown = [name for name, value in processor.items() if value and name not in PROCESSOR_SETTINGS]
    if unknown:
        raise RefusedInput(f"`{unknown[0][:40]}` of an image processor cannot be set here.")
    for name in ("size", "crop_size"):
        size = processor.get(name) or {}
        sides = size.values() if isinstance(size, Mapping) else [size]
        if not all(isinstance(side, int) and side <= MAX_PROCESSED_SIDE for side in sides):
            raise RefusedInput(f"`{name}` of an image processor may be at most {MAX_PROCESSED_SIDE} here, got {size}.")


__all__ = ["MAX_BYTES", "MAX_FIELDS", "check_fields", "check_processor", "load_hub_model"]
