"""
LayerNorms and biases adapted to reduced budgets: some ten thousand numbers in a file of their own, put on a model and
taken off again.
"""

from os import PathLike
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from .modeling_tnt import TntDeiTForImageClassification, TntViTForImageClassification


ADAPTATION_NAME = "adaptation.safetensors"
ADAPTED, ORIGINAL = "adapted.", "original."


def adaptable_parameters(
    model: TntViTForImageClassification | TntDeiTForImageClassification,
) -> dict[str, nn.Parameter]:
    """By name, the LayerNorms of the layers and the last one, and the biases of the layers."""
    backbone = model.base_model
    prefix = f"{model.base_model_prefix}."
    adaptable = {f"{prefix}layernorm.{name}": value for name, value in backbone.layernorm.named_parameters()}
    for name, module in backbone.layers.named_modules():
        for parameter_name, value in module.named_parameters(recurse=False):
            if isinstance(module, nn.LayerNorm) or parameter_name == "bias":
                adaptable[f"{prefix}layers.{name}.{parameter_name}"] = value
    return adaptable


def save_adaptation(
    model: TntViTForImageClassification | TntDeiTForImageClassification,
    original: dict[str, torch.Tensor],
    path: str | PathLike,
) -> None:
    """Write the adapted numbers of a model beside those that they replaced."""
    values = {ADAPTED + name: value.detach().cpu().clone() for name, value in adaptable_parameters(model).items()}
    values |= {ORIGINAL + name: value.cpu().clone() for name, value in original.items()}
    save_file(values, path, metadata={"format": "pt"})


@torch.no_grad()
def set_adaptation(
    model: TntViTForImageClassification | TntDeiTForImageClassification, path: str | PathLike, *, adapted: bool
) -> None:
    """
    Put an adaptation on a model or take it off.

    Args:
        model: The model that was adapted, or the one that it was made from.
        path (`str` or `PathLike`): An `adaptation.safetensors`, or the folder of a training that left one.
        adapted (`bool`): Whether to set the adapted numbers or those that they replaced.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is of another network; nothing is changed then.
    """
    path = Path(path) / ADAPTATION_NAME if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no adaptation {path}.")
    kind, parameters = ADAPTED if adapted else ORIGINAL, adaptable_parameters(model)
    with safe_open(path, framework="pt") as file:
        values = {name.removeprefix(kind): file.get_tensor(name) for name in file.keys() if name.startswith(kind)}
    shapes = {name: value.shape for name, value in parameters.items()}
    if {name: value.shape for name, value in values.items()} != shapes:
        different = sorted(name for name in {*values, *shapes} if name not in values or name not in shapes)
        raise ValueError(
            f"{path} is an adaptation of another network than {type(model).__name__} with hidden_size="
            f"{model.config.hidden_size} and {model.config.num_hidden_layers} layers"
            f"{': it differs in ' + ', '.join(different[:3]) if different else ''}."
        )
    for name, value in values.items():
        parameters[name].copy_(value)


__all__ = ["ADAPTATION_NAME", "adaptable_parameters", "save_adaptation", "set_adaptation"]
