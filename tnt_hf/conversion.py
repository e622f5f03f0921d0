"""Every way in: checkpoints of Transformers, of the authors' code, of DeiT and of timm -> models with TNT pruning."""

import argparse
import math
import re
import reprlib
import tempfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    BaseImageProcessor,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    PreTrainedConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    PILImageResampling,
)
from transformers.utils import logging

from .configuration_tnt import TokenPruningFields, height_and_width
from .modeling_tnt import TntDeiTForImageClassification, TntViTForImageClassification


logger = logging.get_logger(__name__)

# Attention heads by hidden size: the one figure of DeiT-Ti/S/B, ViT-S/B/L that a state dict does not show.
NUM_ATTENTION_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16}

# The authors' code, DeiT and timm set 1e-6; Transformers' default is 1e-12.
LAYER_NORM_EPS = 1e-6

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")

_RENAMES = {
    r"cls_token": "embeddings.cls_token",
    r"dist_token": "embeddings.distillation_token",
    r"pos_embed": "embeddings.position_embeddings",
    r"patch_embed\.proj\.(weight|bias)": r"embeddings.patch_embeddings.projection.\1",
    r"blocks\.(\d+)\.norm1\.(weight|bias)": r"layers.\1.layernorm_before.\2",
    r"blocks\.(\d+)\.attn\.proj\.(weight|bias)": r"layers.\1.attention.o_proj.\2",
    r"blocks\.(\d+)\.norm2\.(weight|bias)": r"layers.\1.layernorm_after.\2",
    r"blocks\.(\d+)\.mlp\.(fc1|fc2)\.(weight|bias)": r"layers.\1.mlp.\2.\3",
    r"norm\.(weight|bias)": r"layernorm.\1",
    r"alpha_heads\.(\d+)\.(weight|bias)": r"alpha_heads.\1.\2",
    r"alpha_norm\.(weight|bias)": r"alpha_norm.\1",
}
_DISTILLED_CLASSIFIERS = {"head": "cls_classifier", "head_dist": "distillation_classifier"}
_QKV = re.compile(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)")


def load_research_checkpoint(
    checkpoint: str | PathLike | Mapping[str, torch.Tensor], **config_overrides: Any
) -> TntViTForImageClassification | TntDeiTForImageClassification:
    """
    Load a checkpoint in the parameter names of timm: the authors' TNT models, plain DeiT and ViT.

    A checkpoint with a distillation token becomes a [`TntDeiTForImageClassification`], any other a
    [`TntViTForImageClassification`]. Without scoring heads in the checkpoint they start at random, to be trained.

    Args:
        checkpoint (`str`, `PathLike` or `Mapping[str, torch.Tensor]`):
            A `.pth` file, or a state dict. Files are read with `weights_only=True`; besides tensors only the
            `argparse.Namespace` of the authors' training script is accepted.
        config_overrides:
            Config fields, such as `prune_layers`. `num_attention_heads` is needed for hidden sizes other than 192,
            384, 768 and 1024; `image_size` for images that are not square.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: If tensors are missing, unknown or of a shape that does not fit, or the file is not a checkpoint.
        FileNotFoundError: If there is no such file.
    """
    source = "the state dict" if isinstance(checkpoint, Mapping) else str(checkpoint)
    state_dict = _find_state_dict(checkpoint if isinstance(checkpoint, Mapping) else _read_file(checkpoint), source)
    model_class = TntDeiTForImageClassification if "dist_token" in state_dict else TntViTForImageClassification
    converted = _convert(state_dict, model_class.base_model_prefix, source)
    model = model_class(model_class.config_class(**_config_fields(state_dict, source, config_overrides)))
    if model.base_model.alpha_norm is None:
        converted = {key: value for key, value in converted.items() if ".alpha_norm." not in key}
    _load_strictly(model, converted, source)
    if model.config.prune_layers and not any(".alpha_heads." in key for key in converted):
        logger.warning(
            f"{source} holds no scoring heads: those of `prune_layers` {model.config.prune_layers} start at random; "
            "train them before relying on the pruned model."
        )
    return model.eval()


def load_classifier(
    model_name_or_path: str | PathLike, *, allow_new_head: bool = False, **kwargs: Any
) -> TntViTForImageClassification | TntDeiTForImageClassification:
    """
    Load a checkpoint in Transformers' format, plain or TNT, as the TNT class of its architecture.

    Args:
        model_name_or_path (`str` or `PathLike`): Folder or Hub id of a ViT or distilled DeiT.
        allow_new_head (`bool`): Whether a classification head that is missing, or of another number of classes, may
            start at random.
        kwargs: For `from_pretrained`, config fields among them. A `problem_type` stands for that of the checkpoint; a
            new head with `id2label` is one of single-label classification.

    Raises:
        ValueError: If the architecture is another, the checkpoint was trained for another problem than single-label
            classification, the keys of its `id2label` are not 0 to n - 1, the file is damaged, or weights other than
            the scoring heads of a plain checkpoint would be left at random.
    """
    config_dict = _read_config(model_name_or_path, **{name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs})
    model_types = {
        model_type: model_class
        for model_class in (TntViTForImageClassification, TntDeiTForImageClassification)
        for model_type in (model_class.config_class.plain_model_type, model_class.config_class.model_type)
    }
    if config_dict.get("model_type") not in model_types:
        raise ValueError(
            f"{model_name_or_path} must have a `model_type` of {', '.join(model_types)}, got "
            f"{config_dict.get('model_type')!r}."
        )
    classes = _classes(config_dict, model_name_or_path)
    if "problem_type" not in kwargs:
        problem_type = config_dict.get("problem_type")
        if problem_type not in (None, "single_label_classification"):
            if not (allow_new_head and kwargs.get("id2label")):
                raise ValueError(
                    f"{model_name_or_path} was trained for another problem: `problem_type` must be None or "
                    f"'single_label_classification', got {problem_type!r}."
                )
            kwargs["problem_type"] = "single_label_classification"
        num_labels = len(kwargs.get("id2label") or ()) or kwargs.get("num_labels")
        if (num_labels or len(classes) or config_dict.get("num_labels")) == 1:
            raise ValueError(
                f"{model_name_or_path} was trained for another problem: `num_labels` must be at least 2, got 1."
            )
    try:
        model, loading_info = model_types[config_dict["model_type"]].from_pretrained(
            model_name_or_path, output_loading_info=True, ignore_mismatched_sizes=allow_new_head, **kwargs
        )
    except SafetensorError as error:
        raise ValueError(f"{model_name_or_path} holds a damaged safetensors file: {error}") from error
    untrained = sorted(key for key in loading_info["missing_keys"] if "classifier" in key)
    if untrained and not allow_new_head:
        raise ValueError(
            f"{model_name_or_path} holds no trained classification head for a {type(model).__name__}: "
            f"{', '.join(untrained)} would be random."
        )
    return model


def checkpoint_classes(model_name_or_path: str | PathLike, revision: str = "main") -> dict[int, str]:
    """
    Class names by label in the config of a checkpoint; empty if it names none.

    Raises:
        ValueError: If there is no such config, or the keys of its `id2label` are not 0 to n - 1.
    """
    return _classes(_read_config(model_name_or_path, revision=revision), model_name_or_path)


def _classes(config_dict: Mapping[str, Any], source: str | PathLike) -> dict[int, str]:
    names = _in_order(config_dict.get("id2label") or {}, f"`id2label` of {source}")
    return {label: str(name) for label, name in enumerate(names)}


def _in_order(names: Mapping[Any, Any], what: str) -> list[Any]:
    """The values in the order of their keys, which must be the integers from 0, or their digits as text."""
    if not isinstance(names, Mapping):
        raise ValueError(f"{what} must map the labels 0 to n - 1 to names, got {reprlib.repr(names)}.")
    labels = {str(label) for label in names}
    missing = [label for label in range(len(names)) if str(label) not in labels]
    if missing:
        raise ValueError(
            f"{what} must have the keys 0 to {len(names) - 1} for its {len(names)} names, got "
            f"{reprlib.repr(list(names))} without {missing[0]}."
        )
    return [names[label] for label in sorted(names, key=int)]


def _read_config(model_name_or_path: str | PathLike, **kwargs: Any) -> dict[str, Any]:
    try:
        return PreTrainedConfig.get_config_dict(model_name_or_path, **kwargs)[0]
    except OSError as error:
        raise ValueError(f"{model_name_or_path} could not be loaded: {error}") from error


def evaluation_image_processor(
    image_size: tuple[int, int], normalization: str = "imagenet", crop_ratio: float = 0.875
) -> ViTImageProcessorPil:
    """
    The evaluation transform of DeiT and the authors: bicubic resize of the shorter side, then a centre crop.

    Args:
        image_size (`tuple[int, int]`): Height and width of the model's input in pixels.
        normalization (`str`): `"imagenet"` for the mean and standard deviation of ImageNet (DeiT, the authors' TNT
            models), `"inception"` for 0.5 and 0.5 (timm's ViT-B/16 and L/16 of Google's AugReg weights).
        crop_ratio (`float`): Share of the resized image that the crop keeps, in (0, 1]: 224 of 256 pixels for DeiT.
            timm evaluates some models at 0.9 or 1.0.

    Raises:
        ValueError: If `crop_ratio` is out of range.
    """
    if not 0 < crop_ratio <= 1:
        raise ValueError(f"`crop_ratio` must be in (0, 1], got {crop_ratio}.")
    mean, std = {
        "imagenet": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
        "inception": (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD),
    }[normalization]
    return ViTImageProcessorPil(
        size={"shortest_edge": int(min(image_size) / crop_ratio)},
        do_center_crop=True,
        crop_size={"height": image_size[0], "width": image_size[1]},
        resample=PILImageResampling.BICUBIC,
        do_convert_rgb=True,
        image_mean=mean,
        image_std=std,
    )


def save_verified(
    model: TntViTForImageClassification | TntDeiTForImageClassification,
    image_processor: BaseImageProcessor,
    output_dir: str | PathLike,
) -> None:
    """
    Save a model with its image processor; keep the folder only if it loads again with equal tensors and finite logits.

    Raises:
        ValueError: If the folder is not empty, or the saved model does not equal the one in memory. Nothing is then
            written.
    """
    output_dir = Path(output_dir)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"{output_dir} already exists and is not empty.")
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent) as staging:
        staged = Path(staging) / output_dir.name
        model.save_pretrained(staged)
        image_processor.save_pretrained(staged)
        height, width = height_and_width(model.config.image_size)
        images = torch.randn(2, model.config.num_channels, height, width, generator=torch.Generator().manual_seed(0))
        reloaded = type(model).from_pretrained(staged).eval()
        saved = reloaded.state_dict()
        changed = [key for key, value in model.state_dict().items() if not torch.equal(value, saved[key])]
        if changed:
            raise ValueError(f"The saved model differs from the one in memory in {', '.join(changed[:3])}.")
        with torch.no_grad():
            logits = reloaded(images).logits
        if not torch.isfinite(logits).all():
            raise ValueError("The saved model gives logits that are not finite.")
        if output_dir.exists():
            output_dir.rmdir()
        staged.rename(output_dir)


def to_plain_model(
    model: TntViTForImageClassification | TntDeiTForImageClassification,
) -> ViTForImageClassification | DeiTForImageClassificationWithTeacher:
    """The Transformers model with the same weights and without TNT; its logits are those of the unpruned model."""
    if isinstance(model, TntDeiTForImageClassification):
        config_class, model_class = DeiTConfig, DeiTForImageClassificationWithTeacher
    else:
        config_class, model_class = ViTConfig, ViTForImageClassification
    tnt_fields = {*TokenPruningFields.__dataclass_fields__, "model_type", "auto_map", "architectures"}
    fields = {name: value for name, value in model.config.to_dict().items() if name not in tnt_fields}
    plain = model_class(config_class(**fields)).to(model.dtype)
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if ".alpha_" not in key})
    return plain.eval()


def _read_file(path: str | PathLike) -> Any:
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # damaged files raise a dozen kinds
        refused = re.search(r"(?:GLOBAL|Unsupported class|global:?) ([\w.]+)", str(error))
        reason = (
            f"it refers to {refused[1]}" if refused else f"it is damaged or of another kind ({type(error).__name__})"
        )
        raise ValueError(
            f"{path} is not a readable checkpoint: {reason}. Allowed are safetensors and PyTorch files of tensors "
            "and argparse.Namespace, nothing else."
        ) from error


def _find_state_dict(checkpoint: Any, source: str) -> dict[str, torch.Tensor]:
    """The tensors by name, found at the top of the checkpoint or under the key of DeiT or timm."""
    for key in ("model", "state_dict"):
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
            break
    if not isinstance(checkpoint, Mapping) or not all(
        isinstance(value, torch.Tensor) for value in checkpoint.values()
    ):
        raise ValueError(f"{source} holds no state dict: expected are tensors by name, at the top or under 'model'.")
    not_finite = [key for key, value in checkpoint.items() if not torch.isfinite(value).all()]
    if not_finite:
        raise ValueError(f"{source} holds values that are not finite in {', '.join(not_finite[:3])}.")
    return {key.removeprefix("module."): value for key, value in checkpoint.items()}


def _config_fields(state_dict: dict[str, torch.Tensor], source: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """Config fields read off the shapes of the tensors, then the overrides."""
    required = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight", "head.weight")
    missing = [key for key in required if key not in state_dict]
    if missing:
        raise ValueError(f"{source} is no ViT or DeiT classifier in timm's names: it lacks {', '.join(missing)}.")

    hidden_size, num_channels, *patch_size = state_dict["patch_embed.proj.weight"].shape
    num_prefix_tokens = 2 if "dist_token" in state_dict else 1
    num_patches = state_dict["pos_embed"].shape[1] - num_prefix_tokens
    grid_size = math.isqrt(num_patches)
    fields = {
        "hidden_size": hidden_size,
        "num_hidden_layers": 1 + max(int(key.split(".")[1]) for key in state_dict if key.startswith("blocks.")),
        "num_attention_heads": NUM_ATTENTION_HEADS.get(hidden_size),
        "intermediate_size": state_dict["blocks.0.mlp.fc1.weight"].shape[0],
        "layer_norm_eps": LAYER_NORM_EPS,
        "image_size": [grid_size * size for size in patch_size],
        "patch_size": list(patch_size),
        "num_channels": num_channels,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state_dict,
        "num_labels": state_dict["head.weight"].shape[0],
    }
    for name in ("image_size", "patch_size"):
        if len(set(fields[name])) == 1:
            fields[name] = fields[name][0]
    if "id2label" in overrides:
        del fields["num_labels"]
    fields.update(overrides)

    if fields["num_attention_heads"] is None:
        raise ValueError(
            f"`num_attention_heads` cannot be read off {source}: it is known for hidden sizes "
            f"{sorted(NUM_ATTENTION_HEADS)}, got {hidden_size}. Pass num_attention_heads=..."
        )
    if hidden_size % fields["num_attention_heads"]:
        raise ValueError(
            f"`num_attention_heads` must divide the hidden size {hidden_size}, got {fields['num_attention_heads']}."
        )
    if "image_size" not in overrides and grid_size**2 != num_patches:
        raise ValueError(
            f"`image_size` cannot be read off {source}: its {num_patches} position embeddings of patches are no "
            "square grid. Pass image_size=[height, width]."
        )
    return fields


def _convert(state_dict: dict[str, torch.Tensor], prefix: str, source: str) -> dict[str, torch.Tensor]:
    """Rename every tensor and split the fused query, key and value projections."""
    classifiers = {"head": "classifier"} if prefix == "vit" else _DISTILLED_CLASSIFIERS
    converted, unknown = {}, []
    for key, value in state_dict.items():
        module, _, parameter = key.partition(".")
        if match := _QKV.fullmatch(key):
            for name, part in zip(("q_proj", "k_proj", "v_proj"), value.chunk(3), strict=True):
                converted[f"{prefix}.layers.{match[1]}.attention.{name}.{match[2]}"] = part
        elif module in classifiers:
            converted[f"{classifiers[module]}.{parameter}"] = value
        else:
            pattern = next((pattern for pattern in _RENAMES if re.fullmatch(pattern, key)), None)
            if pattern is None:
                unknown.append(key)
            else:
                converted[f"{prefix}.{re.sub(pattern, _RENAMES[pattern], key)}"] = value
    if unknown:
        raise ValueError(
            f"{source} is of another architecture: {len(unknown)} tensors have no place in a ViT or DeiT, such as "
            f"{', '.join(unknown[:3])}."
        )
    return converted


def _load_strictly(model: torch.nn.Module, converted: dict[str, torch.Tensor], source: str) -> None:
    """Every tensor must be there and fit; the scoring heads and their LayerNorm may be absent, but only together."""
    expected = {key: value.shape for key, value in model.state_dict().items()}
    if not any(".alpha_" in key for key in converted):
        expected = {key: shape for key, shape in expected.items() if ".alpha_" not in key}
    missing = sorted(expected.keys() - converted.keys())
    unexpected = sorted(converted.keys() - expected.keys())
    misfits = [
        f"{key} {tuple(value.shape)} instead of {tuple(expected[key])}"
        for key, value in converted.items()
        if key in expected and value.shape != expected[key]
    ]
    problems = [
        f"{len(keys)} tensors {what}, such as {', '.join(keys[:3])}"
        for what, keys in (("are missing", missing), ("are unexpected", unexpected), ("do not fit", misfits))
        if keys
    ]
    if problems:
        raise ValueError(f"{source} does not fill a {type(model).__name__}: {'; '.join(problems)}.")
    model.load_state_dict(converted, strict=False)


__all__ = [
    "checkpoint_classes",
    "evaluation_image_processor",
    "load_classifier",
    "load_research_checkpoint",
    "save_verified",
    "to_plain_model",
]
