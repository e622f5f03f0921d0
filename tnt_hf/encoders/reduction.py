"""Token reduction in a model that is already loaded: put on by one call, taken off by another."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from ..configuration_tnt import TokenPruningFields
from ..named_schedules import FlopsReduction, parse_schedule, resolve_schedules
from ..schedules_tnt import LAYER_NORM_OPERATIONS, UNPRUNED, Schedule
from ..token_reduction_tnt import reduction_cost
from .families import FAMILIES, Encoder, Family, find_encoders
from .hooks import ATTENTION, add_hooks, hooks_of


class EncoderReductionConfig(TokenPruningFields, PreTrainedConfig):
    """How an encoder reduces its tokens: the fields of [`TokenPruningFields`] and the shape of the encoder."""

    model_type = "tnt_encoder"

    num_prefix_tokens: int = 1
    num_hidden_layers: int = 12
    hidden_size: int = 768
    image_size: int | list[int] = 224
    patch_size: int | list[int] = 16
    token_reduction: str = "cluster"

    @classmethod
    def of(cls, encoder: Encoder, family: Family, **settings: Any) -> "EncoderReductionConfig":
        """The config of an encoder, whose images have `image_size` if that is among the settings."""
        shape = {name: getattr(encoder.config, name) for name in ("num_hidden_layers", "hidden_size", "patch_size")}
        shape["num_prefix_tokens"] = family.num_prefix_tokens + getattr(encoder.config, "num_register_tokens", 0)
        return cls(**{"image_size": getattr(encoder.config, "image_size", None), **shape, **settings})


def reduce_tokens(
    model: nn.Module,
    schedule: str | Schedule | FlopsReduction,
    *,
    image_size: int | Sequence[int] | None = None,
    puts_back: bool = True,
    family: Family | None = None,
    **settings: Any,
) -> Schedule:
    """
    Let the vision encoder of a model merge similar tokens from now on, until [`restore_tokens`].

    Outputs keep their shapes: after the last layer, and in hidden states that are returned, every patch has the token
    that it became part of. Weights, classes and state dict stay what they are.

    Args:
        model (`nn.Module`): A model of Transformers with one encoder of [`~tnt_hf.encoders.FAMILIES`] in it.
        schedule (`str`, [`Schedule`] or [`FlopsReduction`]):
            What leaves where; a text such as `"2x"`, half of the multiply-accumulates of the layers, is read by
            [`~tnt_hf.named_schedules.parse_schedule`].
        image_size (`int` or `(height, width)`, *optional*):
            Pixels of the images that the budget is for; those of the encoder's config by default. Others may come: the
            shares that leave stay the same.
        puts_back (`bool`, *optional*, defaults to `True`):
            Whether the output has all tokens; if not, it is as short as the sequence in the end.
        family ([`~tnt_hf.encoders.Family`], *optional*): How the layers are built, if they are not in the table.
        settings: Fields of [`~tnt_hf.configuration_tnt.TokenPruningFields`], such as `size_bias`.

    Returns:
        [`Schedule`]: What leaves where.

    Raises:
        ValueError: If the model has no such encoder, has several, or reduces tokens already, its attention
            implementation takes no bias, or its depth cannot carry out the schedule; the model is as before then.
    """
    encoder, family = _encoder_to_reduce(model, family)
    implementation = encoder.config._attn_implementation
    if implementation not in ATTENTION:
        raise ValueError(
            f"Tokens can be merged under the attention implementations {', '.join(ATTENTION)}, got "
            f"{implementation!r}: call `model.set_attn_implementation('sdpa')` first."
        )
    if image_size is not None:
        settings["image_size"] = image_size
    config = EncoderReductionConfig.of(encoder, family, **settings)
    if not config.merges:
        raise ValueError(f"`token_reduction` must be one of cluster, merge here, got {config.token_reduction!r}.")
    schedule = parse_schedule(schedule) if isinstance(schedule, str) else schedule
    if schedule.compute_size is not None:
        raise ValueError(
            f"Schedule '{schedule.name}' makes images smaller, which is to be done before the model here."
        )
    (schedule,) = resolve_schedules(config, [schedule], partial(_gflops, encoder, family))
    config.set_schedule(schedule)
    add_hooks(encoder, family, config, puts_back)
    _set_attention(encoder, ATTENTION[implementation])
    return schedule


def restore_tokens(model: nn.Module) -> None:
    """
    Undo [`reduce_tokens`].

    Raises:
        ValueError: If the model does not reduce tokens.
    """
    hooks = hooks_of(model)
    if not hooks:
        raise ValueError(f"{type(model).__name__} does not reduce tokens.")
    for hook in hooks:
        hook.handle.remove()
    plain = {name: implementation for implementation, name in ATTENTION.items()}
    for encoder in find_encoders(model):
        if encoder.config._attn_implementation in plain:
            _set_attention(encoder, plain[encoder.config._attn_implementation])


def config_of(model: nn.Module) -> EncoderReductionConfig:
    """What the encoder of a model follows under [`reduce_tokens`]; raises ValueError if it reduces no tokens."""
    for hook in hooks_of(model):
        if hasattr(hook, "settings"):
            return hook.settings
    raise ValueError(f"{type(model).__name__} does not reduce tokens.")


def resolve_for(model: nn.Module, schedule: str | Schedule | FlopsReduction) -> Schedule:
    """A schedule as a model under [`reduce_tokens`] carries it out; raises ValueError if it cannot."""
    return _resolve(*known_encoder(model), config_of(model), schedule)


def _resolve(
    encoder: Encoder, family: Family, config: EncoderReductionConfig, schedule: str | Schedule | FlopsReduction
) -> Schedule:
    schedule = parse_schedule(schedule) if isinstance(schedule, str) else schedule
    if schedule.compute_size is not None:
        raise ValueError(f"Schedule '{schedule.name}' makes images smaller: pass smaller images instead.")
    (schedule,) = resolve_schedules(config, [schedule], partial(_gflops, encoder, family))
    return schedule


def count_layer_gflops(
    model: nn.Module,
    schedule: Schedule = UNPRUNED,
    *,
    image_size: int | Sequence[int] | None = None,
    family: Family | None = None,
) -> float:
    """
    Cost of one image in the layers of a model's encoder, in GFLOPs as the literature counts them: 1e9
    multiply-accumulates; counted from their modules as [`~tnt_hf.schedules_tnt.count_gflops`] counts a ViT.

    Raises:
        ValueError: If the model has no encoder of a known family, or its depth cannot carry out the schedule.
    """
    encoder, family = known_encoder(model, family)
    settings = {} if image_size is None else {"image_size": image_size}
    return _gflops(encoder, family, EncoderReductionConfig.of(encoder, family, **settings), schedule)


def _gflops(encoder: Encoder, family: Family, config: EncoderReductionConfig, schedule: Schedule) -> float:
    steps = {step.layer: step for step in config.reduction_steps(schedule=schedule)}
    num_left, total = config.num_patches + config.num_prefix_tokens, 0
    for index, layer in enumerate(encoder.layers):
        num_tokens = num_in_mlp = num_left
        if index in steps:
            num_left = steps[index].num_kept + config.num_prefix_tokens
            num_in_mlp = num_tokens if family.mlp is None else num_left
            total += reduction_cost(steps[index], config)
        attention = getattr(layer, family.attention)
        in_attention = [module for module in attention.modules() if isinstance(module, nn.Linear)]
        in_mlp = [module for module in layer.modules() if isinstance(module, nn.Linear) and module not in in_attention]
        total += num_tokens * sum(module.weight.numel() for module in in_attention)
        total += num_in_mlp * sum(module.weight.numel() for module in in_mlp)
        total += 2 * num_tokens**2 * in_attention[0].out_features  # queries times keys, attention times values
        total += (num_tokens + num_in_mlp) * config.hidden_size * LAYER_NORM_OPERATIONS
    return total / 1e9


def known_encoder(model: nn.Module, family: Family | None = None) -> tuple[Encoder, Family]:
    """
    The one encoder in a model whose layers are of a family of the table, or of the given one.

    Raises:
        ValueError: If there is none, or several.
    """
    found = list(find_encoders(model))
    known = [encoder for encoder in found if family is not None or encoder.layer_class in FAMILIES]
    if not known:
        layers = ", ".join(sorted({encoder.layer_class for encoder in found})) or "no list of layers with patches"
        raise ValueError(
            f"{type(model).__name__} has no vision encoder whose tokens can be reduced: it has {layers}; known are "
            f"{', '.join(FAMILIES)}."
        )
    if len(known) > 1:
        names = ", ".join(encoder.name for encoder in known)
        raise ValueError(f"{type(model).__name__} has several encoders, {names}: pass the one whose tokens are meant.")
    (encoder,) = known
    return encoder, family or FAMILIES[encoder.layer_class]


def _encoder_to_reduce(model: nn.Module, family: Family | None) -> tuple[Encoder, Family]:
    if hooks_of(model):
        raise ValueError(f"{type(model).__name__} reduces tokens already: call `restore_tokens` first.")
    return known_encoder(model, family)


def _set_attention(encoder: Encoder, implementation: str) -> None:
    for layer in encoder.layers:
        for module in layer.modules():
            if hasattr(module, "config"):
                module.config._attn_implementation = implementation


__all__ = ["EncoderReductionConfig", "count_layer_gflops", "known_encoder", "reduce_tokens", "restore_tokens"]
