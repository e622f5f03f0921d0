"""DINOv2 as a ViT: the same tokens, as the scale behind each branch of a layer is a factor of the branch's weights."""

from collections.abc import Sequence
from os import PathLike
from typing import Any

import torch
from transformers import Dinov2Config, Dinov2ForImageClassification, Dinov2Model

from .schedules_tnt import count_patches, height_and_width


# Names of DINOv2's modules in older Transformers and checkpoints -> today's, and these -> those of ViT.
OLD_NAMES = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
VIT_NAMES = {
    "dinov2.": "vit.",
    "encoder.layer.": "layers.",
    ".norm1.": ".layernorm_before.",
    ".norm2.": ".layernorm_after.",
}


def vit_fields(config: Dinov2Config, image_size: int | Sequence[int]) -> dict[str, Any]:
    """
    The fields of a [`ViTConfig`] for the tokens of a DINOv2.

    Args:
        config ([`Dinov2Config`]): That of the DINOv2.
        image_size (`int` or `(height, width)`): Pixels of the images that the ViT is for.

    Raises:
        ValueError: If no ViT has such layers.
    """
    if config.use_swiglu_ffn:
        raise ValueError("A DINOv2 with a gated MLP (`use_swiglu_ffn`) has no equal among ViTs.")
    shared = (
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "hidden_dropout_prob"),
        *("attention_probs_dropout_prob", "initializer_range", "layer_norm_eps", "patch_size", "num_channels"),
        *("qkv_bias", "id2label", "label2id", "problem_type"),
    )
    return {
        **{name: getattr(config, name) for name in shared},
        "intermediate_size": int(config.hidden_size * config.mlp_ratio),
        "image_size": image_size if isinstance(image_size, int) else [*image_size],
    }


@torch.no_grad()
def vit_state_dict(
    model: Dinov2Model | Dinov2ForImageClassification, image_size: int | Sequence[int]
) -> dict[str, torch.Tensor]:
    """The weights of a ViT that computes the tokens of a DINOv2 for images of `image_size`, as in [`vit_fields`]."""
    state_dict = renamed(model.state_dict(), OLD_NAMES | VIT_NAMES)
    prefix = "" if isinstance(model, Dinov2Model) else "vit."
    state_dict.pop(f"{prefix}embeddings.mask_token", None)
    for index in range(model.config.num_hidden_layers):
        layer = f"{prefix}layers.{index}"
        for branch, projection in ((1, "attention.o_proj"), (2, "mlp.fc2")):
            scale = state_dict.pop(f"{layer}.layer_scale{branch}.lambda1")
            weight, bias = (f"{layer}.{projection}.{part}" for part in ("weight", "bias"))
            state_dict[weight] = state_dict[weight] * scale.unsqueeze(-1)
            state_dict[bias] = state_dict[bias] * scale
    tokens = torch.empty(1, 1 + count_patches(image_size, model.config.patch_size), model.config.hidden_size)
    embeddings = model.base_model.embeddings.interpolate_pos_encoding(tokens, *height_and_width(image_size))
    state_dict[f"{prefix}embeddings.position_embeddings"] = embeddings.clone()
    return state_dict


def renamed(state_dict: dict[str, torch.Tensor], names: dict[str, str]) -> dict[str, torch.Tensor]:
    """The tensors under their names with each of `names` replaced."""
    result = {}
    for name, value in state_dict.items():
        for old, new in names.items():
            name = name.replace(old, new)
        result[name] = value
    return result


def read_dinov2_classifier(
    name_or_path: str | PathLike, image_size: int | Sequence[int], **hub_arguments: Any
) -> tuple[Dinov2Config, dict[str, Any], dict[str, torch.Tensor]]:
    """
    A classifier on DINOv2, as Transformers has it, as one on a ViT that reads the [CLS] token and the patches.

    Args:
        name_or_path (`str` or `PathLike`): Folder or Hub id, such as `facebook/dinov2-small-imagenet1k-1-layer`.
        image_size (`int` or `(height, width)`): Pixels of its images.
        hub_arguments: For `from_pretrained`, such as `revision`.

    Returns:
        Its config, the fields of a [`TntViTConfig`], and the state dict of that classifier, without the head if the
        checkpoint has none.

    Raises:
        ValueError: If no ViT has such layers, or weights of the backbone are missing.
    """
    model, loading_info = Dinov2ForImageClassification.from_pretrained(
        name_or_path, output_loading_info=True, dtype=torch.float32, **hub_arguments
    )
    fields, state_dict = vit_fields(model.config, image_size), vit_state_dict(model, image_size)
    for key in loading_info["missing_keys"]:
        if key.startswith("dinov2.") and not key.endswith(".mask_token"):
            raise ValueError(f"{name_or_path} does not hold the whole backbone of a DINOv2, such as {key}.")
        state_dict.pop(key, None)
    return model.config, fields | {"classifier_reads_patches": True}, state_dict


__all__ = ["OLD_NAMES", "read_dinov2_classifier", "renamed", "vit_fields", "vit_state_dict"]
