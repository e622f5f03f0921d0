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
from transformers.utils import cached_file

from .encoders.families import is_norm, only_encoder


ADAPTATION_NAME = "adaptation.safetensors"
ADAPTED, ORIGINAL = "adapted.", "original."
# Behind the layers, in the models of Transformers.
FINAL_NORMS = ("layernorm", "norm", "post_layernorm", "rms_norm")
# Of numbers in half precision.
ROUNDING = 0.01


def adaptable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """
    By name, the LayerNorms or RMSNorms of the layers of a model's vision encoder and the one behind them, and the
    biases of the layers.

    Raises:
        ValueError: If the model has no vision encoder, or several.
    """
    encoder = only_encoder(model)
    inside, around = (
        f"{encoder.name}.",
        {encoder.name.rpartition(".")[0], encoder.name.rpartition(".")[0].rpartition(".")[0]},
    )
    adaptable = {}
    for name, module in model.named_modules():
        path, _, last = name.rpartition(".")
        is_final_norm = is_norm(module) and last in FINAL_NORMS and path in around
        for parameter_name, value in module.named_parameters(recurse=False):
            is_in_layers = name.startswith(inside) and (is_norm(module) or parameter_name == "bias")
            if is_in_layers or is_final_norm:
                adaptable[f"{name}.{parameter_name}"] = value
    return adaptable


def save_adaptation(model: nn.Module, original: dict[str, torch.Tensor], path: str | PathLike) -> None:
    """Write the adapted numbers of a model beside those that they replaced, which have the names in the model."""
    names = _names_in_file(model)
    values = {
        ADAPTED + names[name]: value.detach().cpu().clone() for name, value in adaptable_parameters(model).items()
    }
    values |= {ORIGINAL + names[name]: value.cpu().clone() for name, value in original.items()}
    save_file(values, path, metadata={"format": "pt"})


@torch.no_grad()
def set_adaptation(model: nn.Module, name_or_path: str | PathLike, *, adapted: bool) -> None:
    """
    Put an adaptation on a model or take it off.

    Args:
        model (`nn.Module`):
            The model that was adapted, or one with the encoder that it was made from, whatever its head.
        name_or_path (`str` or `PathLike`):
            An `adaptation.safetensors`, the folder of a training that left one, or the repository on the Hub that has
            one.
        adapted (`bool`): Whether to set the adapted numbers or those that they replaced.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is of another network, or of other weights; nothing is changed then.
    """
    path, encoder = _file_of(name_or_path), only_encoder(model)
    parameters, values = adaptable_parameters(model), {}
    names = _names_in_file(model)
    with safe_open(path, framework="pt") as file:
        for kind in (ADAPTED, ORIGINAL):
            stored = [name for name in file.keys() if name.startswith(kind)]
            values[kind] = {name.removeprefix(kind): file.get_tensor(name) for name in stored}
    shapes = {names[name]: value.shape for name, value in parameters.items()}
    if {name: value.shape for name, value in values[ADAPTED].items()} != shapes:
        different = sorted(set(shapes).symmetric_difference(values[ADAPTED]))
        raise ValueError(
            f"{path} is an adaptation of another network than {type(model).__name__} with hidden_size="
            f"{encoder.config.hidden_size} and {encoder.config.num_hidden_layers} layers"
            f"{': it differs in ' + ', '.join(different[:3]) if different else ''}."
        )
    current = {names[name]: value.float().cpu() for name, value in parameters.items()}
    if not any(
        all(torch.allclose(current[name], each[name].float(), rtol=ROUNDING, atol=ROUNDING) for name in current)
        for each in values.values()
    ):
        raise ValueError(
            f"{path} is an adaptation of other weights than those of this {type(model).__name__}: its LayerNorms and "
            "biases are neither those that were adapted nor those before."
        )
    for name, value in parameters.items():
        value.copy_(values[ADAPTED if adapted else ORIGINAL][names[name]])


def _names_in_file(model: nn.Module) -> dict[str, str]:
    """By the name in the model, that inside the encoder, which does not depend on what is around it."""
    paths = {name: name.split(".") for name in adaptable_parameters(model)}
    num_shared = next(depth for depth, parts in enumerate(zip(*paths.values())) if len(set(parts)) > 1)
    return {name: ".".join(path[num_shared:]) for name, path in paths.items()}


def _file_of(name_or_path: str | PathLike) -> Path:
    path = Path(name_or_path)
    path = path / ADAPTATION_NAME if path.is_dir() else path
    if path.is_file():
        return path
    try:
        return Path(cached_file(str(name_or_path), ADAPTATION_NAME))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"There is no adaptation {name_or_path}: {error}") from error


__all__ = ["ADAPTATION_NAME", "adaptable_parameters", "save_adaptation", "set_adaptation"]
