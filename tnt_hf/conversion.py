"""Every way in: checkpoints of Transformers, of the authors' code, of DeiT and of timm -> models with TNT pruning."""

import argparse
import math
import re
import reprlib
import tempfile
from collections.abc import Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    BaseImageProcessor,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    PreTrainedConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)
from transformers.activations import ACT2FN
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    PILImageResampling,
)
from transformers.utils import logging

from .configuration_tnt import TntDeiTConfig, TntViTConfig
from .dinov2 import read_dinov2_classifier
from .image_processors import input_size
from .labels import names_in_order
from .modeling_tnt import TntDeiTForImageClassification, TntViTForImageClassification
from .schedules_tnt import UNPRUNED, height_and_width, is_integer


logger = logging.get_logger(__name__)

# What a state dict does not show, as it is in the authors' code, in DeiT-Ti/S/B and in ViT-S/B/L of DeiT's geometry:
# attention heads by hidden size, and the other two. Transformers' default for LayerNorm is 1e-12.
NUM_ATTENTION_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16}
LAYER_NORM_EPS = 1e-6
HIDDEN_ACT = "gelu"
UNSEEN_FIELDS = ("num_attention_heads", "layer_norm_eps", "hidden_act")

# Of the largest logit, in float64, where rounding is 1e-15. Another eps of LayerNorm or the tanh form of gelu makes
# 1e-4, too close to what other kernels make in float32.
COMPARISON_TOLERANCE = 1e-9

# What wrappers put before the names of the tensors: DataParallel and DDP, torch.compile, FSDP, checkpointing and
# Lightning.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "model"}
# Where training scripts put the weights, and the counter that an average of weights keeps beside them.
CONTAINERS, COUNTER = ("model", "state_dict", "module"), "n_averaged"

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
    checkpoint: str | PathLike | Mapping[str, torch.Tensor],
    *,
    compare_with: str | None = None,
    **config_overrides: Any,
) -> TntViTForImageClassification | TntDeiTForImageClassification:
    """
    Load a checkpoint in the parameter names of timm: the authors' TNT models, plain DeiT and ViT.

    A checkpoint with a distillation token becomes a [`TntDeiTForImageClassification`], any other a
    [`TntViTForImageClassification`]. Without scoring heads in the checkpoint they start at random, to be trained.

    A state dict does not show the number of attention heads, the eps of LayerNorm and the activation. Those that are
    not given are assumed to be DeiT's, with a warning unless `compare_with` confirms them. The field `conversion` of
    the config records both: `{"assumed": {field: value}, "compared_with": None or the model and version of timm}`.

    Args:
        checkpoint (`str`, `PathLike` or `Mapping[str, torch.Tensor]`):
            A `.pth` file, or a state dict. Files are read with `weights_only=True`; besides tensors only the
            `argparse.Namespace` of the authors' training script is accepted.
        compare_with (`str`, *optional*):
            Name of the timm model that the checkpoint is of, such as `"vit_small_patch16_224"`. It is loaded with the
            same tensors and must give the logits of the unpruned converted model.
        config_overrides:
            Config fields, such as `prune_layers`. `num_attention_heads` is needed unless the hidden size is 192, 384,
            768 or 1024, `intermediate_size` four times that, and `qkv_bias` True; `image_size` for images that are
            not square.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: If tensors are missing, unknown or of a shape that does not fit, the file is not a checkpoint, a
            config field cannot be read off it or does not fit, or the model of timm is unknown or answers otherwise.
        FileNotFoundError: If there is no such file.
        ModuleNotFoundError: If timm is to be compared with and is not installed.
    """
    source = "the state dict" if isinstance(checkpoint, Mapping) else str(checkpoint)
    state_dict = _find_state_dict(checkpoint if isinstance(checkpoint, Mapping) else _read_file(checkpoint), source)
    model_class = TntDeiTForImageClassification if "dist_token" in state_dict else TntViTForImageClassification
    converted = _convert(state_dict, model_class.base_model_prefix, source)
    fields = _config_fields(state_dict, source, config_overrides)
    assumed = {name: fields[name] for name in UNSEEN_FIELDS if name not in config_overrides}
    model = model_class(model_class.config_class(**fields, conversion={"assumed": assumed, "compared_with": None}))
    if model.base_model.alpha_norm is None:
        converted = {key: value for key, value in converted.items() if ".alpha_norm." not in key}
    _load_strictly(model, converted, source, f"a {model_class.__name__}")
    if compare_with is not None:
        model.config.conversion["compared_with"] = _compare_with_timm(model, state_dict, source, compare_with)
    elif assumed:
        logger.warning(
            f"{source} is converted with {_listed(assumed)}, and with a classifier that reads the [CLS] token, which "
            "tnt_hf assumes: a state dict does not show them, and a checkpoint that differs (the ViT-S of MoCo v3 has "
            "12 heads) would load and answer wrongly. Pass what you know of it, such as num_attention_heads=12; to "
            "check, name its model in timm by compare_with, or evaluate it and compare with the accuracy that its "
            "authors report."
        )
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

    A classifier on DINOv2 becomes a [`TntViTForImageClassification`] that gives its logits, to rounding, for images of
    the size that its image processor makes, unless `image_size` is given.

    Args:
        model_name_or_path (`str` or `PathLike`): Folder or Hub id of a ViT, a distilled DeiT or a DINOv2.
        allow_new_head (`bool`): Whether a classification head that is missing, or of another number of classes, may
            start at random.
        kwargs: For `from_pretrained`, config fields among them. A `problem_type` stands for that of the checkpoint; a
            new head with `id2label` is one of single-label classification.

    Raises:
        ValueError: If the architecture is another, the checkpoint was trained for another problem than single-label
            classification, the keys of its `id2label` are not 0 to n - 1, the file is damaged, or weights other than
            the scoring heads of a plain checkpoint would be left at random.
    """
    config_dict = _read_config(model_name_or_path, **_hub_arguments(kwargs))
    model_types = {
        model_type: model_class
        for model_class in (TntViTForImageClassification, TntDeiTForImageClassification)
        for model_type in (model_class.config_class.plain_model_type, model_class.config_class.model_type)
    }
    model_types[Dinov2Config.model_type] = TntViTForImageClassification
    if config_dict.get("model_type") not in model_types:
        raise ValueError(
            f"{model_name_or_path} must have a `model_type` of {', '.join(model_types)}, got "
            f"{config_dict.get('model_type')!r}."
        )
    classes = names_in_order(config_dict.get("id2label") or {}, f"`id2label` of {model_name_or_path}")
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
    options = {"output_loading_info": True, "ignore_mismatched_sizes": allow_new_head}
    try:
        if config_dict["model_type"] == Dinov2Config.model_type:
            model, loading_info = _load_dinov2(model_name_or_path, options, kwargs)
        else:
            model_class = model_types[config_dict["model_type"]]
            model, loading_info = model_class.from_pretrained(model_name_or_path, **options, **kwargs)
    except SafetensorError as error:
        raise ValueError(f"{model_name_or_path} holds a damaged safetensors file: {error}") from error
    untrained = sorted(key for key in loading_info["missing_keys"] if "classifier" in key)
    if untrained and not allow_new_head:
        raise ValueError(
            f"{model_name_or_path} holds no trained classification head for a {type(model).__name__}: "
            f"{', '.join(untrained)} would be random."
        )
    return model


def load_for_inference(
    model_name_or_path: str | PathLike, **kwargs: Any
) -> TntViTForImageClassification | TntDeiTForImageClassification:
    """
    [`load_classifier`] of a model that is not to be trained: a plain checkpoint, whose scoring heads would be random,
    merges clusters, which need none, unless `token_reduction` is given.
    """
    if is_plain_checkpoint(model_name_or_path, **_hub_arguments(kwargs)):
        kwargs.setdefault("token_reduction", "cluster")
    return load_classifier(model_name_or_path, **kwargs)


def _load_dinov2(
    name_or_path: str | PathLike, options: dict[str, Any], kwargs: dict[str, Any]
) -> tuple[TntViTForImageClassification, dict[str, Any]]:
    size = kwargs.get("image_size")
    if size is None:
        try:
            size = input_size(load_image_processor(name_or_path, **_hub_arguments(kwargs)))
        except OSError as error:
            raise ValueError(
                f"{name_or_path} has no image processor that says how large its images are: pass `image_size`."
            ) from error
    of_files = (*HUB_ARGUMENTS, "use_safetensors", "variant")
    reading = {name: kwargs[name] for name in of_files if name in kwargs}
    plain_config, fields, state_dict = read_dinov2_classifier(name_or_path, size, **reading)
    overrides = {name: value for name, value in kwargs.items() if name not in reading}
    if "id2label" in overrides:
        overrides.setdefault("label2id", {name: label for label, name in overrides["id2label"].items()})
    dtype = overrides.pop("dtype", None)
    config, others = TntViTConfig.from_dict(fields, return_unused_kwargs=True, **overrides)
    model, loading_info = TntViTForImageClassification.from_pretrained(
        None, config=config, state_dict=state_dict, dtype=dtype, **options, **others
    )
    model.name_or_path = model.config._name_or_path = str(name_or_path)
    model.config._commit_hash = getattr(plain_config, "_commit_hash", None)
    return model, loading_info


def is_plain_checkpoint(model_name_or_path: str | PathLike, **hub_arguments: Any) -> bool:
    """
    Whether a checkpoint is of Transformers' own classes, without scoring heads.

    Raises:
        ValueError: If there is no config of that name.
    """
    model_type = _read_config(model_name_or_path, **hub_arguments).get("model_type")
    return model_type not in (TntViTConfig.model_type, TntDeiTConfig.model_type)


def checkpoint_classes(model_name_or_path: str | PathLike, revision: str = "main") -> dict[int, str]:
    """
    Class names by label in the config of a checkpoint; empty if it names none.

    Raises:
        ValueError: If there is no such config, or the keys of its `id2label` are not 0 to n - 1.
    """
    id2label = _read_config(model_name_or_path, revision=revision).get("id2label") or {}
    return dict(enumerate(names_in_order(id2label, f"`id2label` of {model_name_or_path}")))


def _hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}


def _read_config(model_name_or_path: str | PathLike, **kwargs: Any) -> dict[str, Any]:
    name = fspath(model_name_or_path)
    may_be_hub_id = not name.startswith((".", "/")) and name.count("/") <= 1
    if not may_be_hub_id and not Path(name).exists():
        raise ValueError(f"{name} could not be loaded: there is no such folder, and no id of the Hub is written so.")
    try:
        return PreTrainedConfig.get_config_dict(model_name_or_path, **kwargs)[0]
    except OSError as error:
        reason = " ".join(str(error).split())  # on one line
        raise ValueError(f"{model_name_or_path} could not be loaded: {reason}") from error


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
    """
    The Transformers model with the same weights and without TNT; its logits are those of the unpruned model.

    Raises:
        ValueError: If the classifier reads the patches, which those of Transformers' ViTs do not.
    """
    if model.config.classifier_reads_patches:
        raise ValueError("A classifier with `classifier_reads_patches` has no equal among Transformers' ViTs.")
    if isinstance(model, TntDeiTForImageClassification):
        config_class, model_class = DeiTConfig, DeiTForImageClassificationWithTeacher
    else:
        config_class, model_class = ViTConfig, ViTForImageClassification
    own = model.config.__dataclass_fields__.keys() - config_class.__dataclass_fields__.keys()
    tnt_fields = {*own, "model_type", "auto_map", "architectures"}
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
    """The tensors by name, without wrappers, found at the top of the checkpoint or under the key of DeiT or timm."""
    for container in CONTAINERS:
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(container), Mapping):
            averages = [key for key, value in checkpoint.items() if "ema" in str(key) and isinstance(value, Mapping)]
            if averages:
                logger.warning(
                    f"{source} holds other weights under {', '.join(map(repr, averages))}, which are passed over for "
                    f"those under {container!r}: pass them as a state dict if they are the ones to be evaluated."
                )
            checkpoint = checkpoint[container]
            break
    if not isinstance(checkpoint, Mapping) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in checkpoint.items()
    ):
        found = (
            f"keys {reprlib.repr(list(checkpoint))}" if isinstance(checkpoint, Mapping) else type(checkpoint).__name__
        )
        raise ValueError(
            f"{source} holds no state dict: expected are tensors by name, at the top or under one of "
            f"{', '.join(CONTAINERS)}, got {found}."
        )
    checkpoint = {key: value for key, value in checkpoint.items() if key != COUNTER}
    not_finite = [key for key, value in checkpoint.items() if not torch.isfinite(value).all()]
    if not_finite:
        raise ValueError(f"{source} holds values that are not finite in {', '.join(not_finite[:3])}.")
    names = {}
    for key in checkpoint:
        name = ".".join(part for part in key.split(".") if part not in WRAPPERS)
        if name in names:
            raise ValueError(f"{source} holds two tensors for {name}: {names[name]} and {key}.")
        names[name] = key
    return {name: checkpoint[key] for name, key in names.items()}


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
        "num_attention_heads": None,
        "intermediate_size": state_dict["blocks.0.mlp.fc1.weight"].shape[0],
        "layer_norm_eps": LAYER_NORM_EPS,
        "hidden_act": HIDDEN_ACT,
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
        num_names, num_classes = len(names_in_order(overrides["id2label"], "`id2label`")), fields.pop("num_labels")
        if num_names != num_classes:
            raise ValueError(
                f"`id2label` must name the {num_classes} classes of the classifier of {source}, got {num_names} names."
            )
    if fields["intermediate_size"] == 4 * hidden_size and fields["qkv_bias"]:
        fields["num_attention_heads"] = NUM_ATTENTION_HEADS.get(hidden_size)
    geometry = hidden_size, fields["intermediate_size"], fields["qkv_bias"]
    fields.update(overrides)

    num_heads, eps, hidden_act = (fields[name] for name in UNSEEN_FIELDS)
    if num_heads is None:
        raise ValueError(
            f"`num_attention_heads` cannot be read off {source}, nor assumed unless it is of DeiT's geometry: hidden "
            f"size {', '.join(map(str, NUM_ATTENTION_HEADS))}, `intermediate_size` four times that, `qkv_bias` True; "
            f"got {', '.join(map(str, geometry))}. Pass num_attention_heads=..."
        )
    if not is_integer(num_heads) or num_heads < 1 or hidden_size % num_heads:
        raise ValueError(f"`num_attention_heads` must divide the hidden size {hidden_size}, got {num_heads!r}.")
    if not 0 < eps < math.inf:
        raise ValueError(f"`layer_norm_eps` must be a finite number above 0, got {eps}.")
    if hidden_act not in ACT2FN:
        raise ValueError(
            "`hidden_act` must be an activation of Transformers, such as gelu, gelu_pytorch_tanh, quick_gelu or relu, "
            f"got {hidden_act!r}."
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


def _load_strictly(model: torch.nn.Module, converted: dict[str, torch.Tensor], source: str, what: str) -> None:
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
        raise ValueError(f"{source} does not fill {what}: {'; '.join(problems)}.")
    model.load_state_dict(converted, strict=False)


def _compare_with_timm(
    model: TntViTForImageClassification | TntDeiTForImageClassification,
    state_dict: dict[str, torch.Tensor],
    source: str,
    timm_model: str,
) -> str:
    """
    Check the logits of the unpruned model, in float64, against those of a timm model with the same tensors.

    Args:
        model: What the state dict was converted to.
        state_dict (`dict[str, torch.Tensor]`): In timm's names.
        source (`str`): What the state dict is called in errors.
        timm_model (`str`): Name of the model in timm.

    Returns:
        `str`: What was compared with, to be recorded.

    Raises:
        ValueError: If timm does not know the model, the tensors do not fit it, or its logits differ.
    """
    import timm

    if not timm.is_model(timm_model):
        raise ValueError(
            f"`compare_with` must name a model of timm {timm.__version__}, such as vit_small_patch16_224, got "
            f"{timm_model!r}."
        )
    config, dtype = model.config, model.dtype
    height, width = height_and_width(config.image_size)
    try:
        reference = timm.create_model(
            timm_model,
            pretrained=False,
            img_size=(height, width),
            in_chans=config.num_channels,
            num_classes=config.num_labels,
        ).eval()
    except Exception as error:  # timm's models refuse arguments in many ways
        raise ValueError(
            f"`compare_with` must name a ViT or DeiT of timm for images of {height} x {width}, got {timm_model!r}: "
            f"{error}"
        ) from error
    tensors = {name: value for name, value in state_dict.items() if not name.startswith("alpha_")}
    _load_strictly(reference, tensors, source, f"timm's {timm_model}")

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, config.num_channels, height, width, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        expected, logits = reference.double()(images), model.eval().double()(images, schedule=UNPRUNED).logits
    model.to(dtype)
    if torch.equal(*expected):
        raise ValueError(
            f"{source} cannot be compared with timm's {timm_model}: its logits are the same for different images."
        )
    difference = ((logits - expected).abs().max() / expected.abs().max()).item()
    if not difference <= COMPARISON_TOLERANCE:
        block = reference.blocks[0]
        ours = {name: getattr(config, name) for name in UNSEEN_FIELDS}
        theirs = dict(zip(UNSEEN_FIELDS, (block.attn.num_heads, block.norm1.eps, type(block.mlp.act).__name__)))
        raise ValueError(
            f"{source} does not answer as timm's {timm_model}, which has {_listed(theirs)}: converted with "
            f"{_listed(ours)}, its logits differ by {difference:.1g} of the largest."
        )
    return f"timm {timm.__version__}: {timm_model}"


def _listed(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in fields.items())


def load_image_processor(
    name_or_path: str | PathLike, revision: str = "main", **hub_arguments: Any
) -> BaseImageProcessor:
    """The image processor of a checkpoint, with Pillow for resizing whatever else is installed."""
    return AutoImageProcessor.from_pretrained(name_or_path, revision=revision, backend="pil", **hub_arguments)


__all__ = [
    "checkpoint_classes",
    "evaluation_image_processor",
    "is_plain_checkpoint",
    "load_classifier",
    "load_for_inference",
    "load_research_checkpoint",
    "save_verified",
    "to_plain_model",
]
