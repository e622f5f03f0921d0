"""Token reduction in a model that is already loaded: put on by one call, taken off by another."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from ..configuration_tnt import TokenPruningFields
from ..named_schedules import FlopsReduction, parse_schedule, resolve_schedules
from ..schedules_tnt import (
    LAYER_NORM_OPERATIONS,
    UNPRUNED,
    Schedule,
    count_patches,
    height_and_width,
    is_integer,
    require,
)
from ..token_reduction_tnt import EMBEDDINGS, reduction_cost
from .families import FAMILIES, Encoder, Family, find_encoders
from .hooks import BeforeLayer, add_hooks, hooks_of, remove_hooks, require_attention_with_bias


# The fields that have an effect on an encoder, besides those of its schedule.
SETTINGS = ("token_reduction", "size_bias", "similarity_partition")


class EncoderReductionConfig(TokenPruningFields, PreTrainedConfig):
    """How an encoder reduces its tokens: the fields of [`TokenPruningFields`] and the shape of the encoder."""

    model_type = "tnt_encoder"

    num_prefix_tokens: int = 1
    num_hidden_layers: int = 12
    hidden_size: int = 768
    image_size: int | list[int] = 224
    patch_size: int | list[int] = 16
    token_reduction: str = "cluster"

    @property
    def uses_scores(self) -> bool:
        """Encoders have no scoring heads."""
        return False

    def learning_layers(self) -> range:
        """The first layers, after which `"merge"` lets tokens leave under a budget, as where heads are trained."""
        return range(min(self.num_noise_layers, self.num_hidden_layers - 1))

    @classmethod
    def of(
        cls, encoder: Encoder, family: Family, image_size: int | Sequence[int] | None = None, **settings: Any
    ) -> "EncoderReductionConfig":
        """
        The config of an encoder for images of `image_size`, by default those of the encoder's own config.

        Raises:
            ValueError: If there is no image size or it gives no patch, or a setting is none of [`SETTINGS`] or is not
                allowed.
        """
        for name, value in settings.items():
            require(name in SETTINGS, name, f"left out, as settings are {', '.join(SETTINGS)}", value)
        image_size = getattr(encoder.config, "image_size", None) if image_size is None else image_size
        sides, patch_sides = height_and_width(image_size), height_and_width(encoder.config.patch_size)
        are_pixels = len(sides) == 2 and all(is_integer(side, 1) for side in sides)
        allowed = f"one or two integers, of pixels, with at least one patch of {patch_sides} pixels"
        require(are_pixels and count_patches(sides, patch_sides) > 0, "image_size", allowed, image_size)
        config = cls(
            num_prefix_tokens=family.num_prefix_tokens + getattr(encoder.config, "num_register_tokens", 0),
            num_hidden_layers=len(encoder.layers),
            hidden_size=encoder.config.hidden_size,
            image_size=list(sides),
            patch_size=list(patch_sides),
            **settings,
        )
        require(config.merges, "token_reduction", "one of cluster, merge here", config.token_reduction)
        return config


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
    that it became part of. Weights, classes, config and state dict stay what they are.

    Args:
        model (`nn.Module`): A model of Transformers with one encoder of [`~tnt_hf.encoders.FAMILIES`] in it.
        schedule (`str`, [`Schedule`] or [`FlopsReduction`]):
            What leaves where; a text such as `"2x"`, half of the multiply-accumulates of the layers, is read by
            [`~tnt_hf.named_schedules.parse_schedule`].
        image_size (`int` or `(height, width)`, *optional*):
            Pixels of the images that the budget is for; those of the encoder's config by default. Others may come: the
            shares that leave stay the same.
        puts_back (`bool`, *optional*, defaults to `True`):
            Whether the output has all tokens. If not, it is as short as the sequence in the end, and the hidden states
            among it have the `token_state` that [`~tnt_hf.encoders.put_back`] needs.
        family ([`~tnt_hf.encoders.Family`], *optional*): How the layers are built, if they are not in the table.
        settings:
            `token_reduction`, by default `"cluster"`, `size_bias` and `similarity_partition`: see
            [`~tnt_hf.configuration_tnt.TokenPruningFields`].

    Returns:
        [`Schedule`]: What leaves where.

    Raises:
        ValueError: If the model has no such encoder, has several, or reduces tokens already, its attention
            implementation takes no bias, a setting is not allowed, or its depth cannot carry out the schedule; the
            model is as before then.
    """
    if hooks_of(model):
        raise ValueError(f"{type(model).__name__} reduces tokens already: call `restore_tokens` first.")
    encoder, family = known_encoder(model, family)
    require_attention_with_bias(encoder.config)
    config = EncoderReductionConfig.of(encoder, family, image_size, **settings)
    schedule = _resolve(encoder, family, config, schedule)
    add_hooks(encoder, family, config, schedule, puts_back)
    return schedule


def restore_tokens(model: nn.Module) -> None:
    """
    Undo [`reduce_tokens`].

    Raises:
        ValueError: If the model does not reduce tokens.
    """
    first_hook(model)
    remove_hooks(model)


def first_hook(model: nn.Module) -> BeforeLayer:
    """Where a model under [`reduce_tokens`] has its settings and schedule; raises ValueError if it is not."""
    for hook in hooks_of(model):
        if isinstance(hook, BeforeLayer) and hook.index == 0:
            return hook
    raise ValueError(f"{type(model).__name__} does not reduce tokens.")


def resolve_for(model: nn.Module, schedule: str | Schedule | FlopsReduction) -> Schedule:
    """A schedule as a model under [`reduce_tokens`] carries it out; raises ValueError if it cannot."""
    hook = first_hook(model)
    return _resolve(*known_encoder(model, hook.family), hook.settings, schedule)


def _resolve(
    encoder: Encoder, family: Family, config: EncoderReductionConfig, schedule: str | Schedule | FlopsReduction
) -> Schedule:
    schedule = schedule if isinstance(schedule, Schedule | FlopsReduction) else parse_schedule(str(schedule))
    if schedule.compute_size is not None:
        raise ValueError(
            f"Schedule '{schedule.name}' makes images smaller, which is to be done before the model here."
        )
    (schedule,) = resolve_schedules(config, [schedule], partial(_gflops, encoder, family))
    return schedule


def count_layer_gflops(
    model: nn.Module,
    schedule: Schedule = UNPRUNED,
    *,
    image_size: int | Sequence[int] | None = None,
    family: Family | None = None,
    **settings: Any,
) -> float:
    """
    Cost of one image in the layers of a model's encoder, in GFLOPs as the literature counts them: 1e9
    multiply-accumulates; counted from their modules as [`~tnt_hf.schedules_tnt.count_gflops`] counts a ViT. Arguments
    are those of [`reduce_tokens`].

    Raises:
        ValueError: If the model has no encoder of a known family, a setting is not allowed, or the depth cannot carry
            out the schedule.
    """
    encoder, family = known_encoder(model, family)
    return _gflops(encoder, family, EncoderReductionConfig.of(encoder, family, image_size, **settings), schedule)


def _gflops(encoder: Encoder, family: Family, config: EncoderReductionConfig, schedule: Schedule) -> float:
    steps = {step.layer: step for step in config.reduction_steps(schedule=schedule)}
    num_left, total = config.num_patches, sum(reduction_cost(step, config) for step in steps.values())
    if EMBEDDINGS in steps:
        num_left = steps[EMBEDDINGS].num_kept
    num_left += config.num_prefix_tokens
    for index, layer in enumerate(encoder.layers):
        num_tokens = num_in_mlp = num_left
        if index in steps:
            num_left = steps[index].num_kept + config.num_prefix_tokens
            num_in_mlp = num_left if family.reduces_before_mlp(config) else num_tokens
        attention = layer.get_submodule(family.attention)
        in_attention = [module for module in attention.modules() if isinstance(module, nn.Linear)]
        in_mlp = [module for module in layer.modules() if isinstance(module, nn.Linear) and module not in in_attention]
        total += num_tokens * sum(module.in_features * module.out_features for module in in_attention)
        total += num_in_mlp * sum(module.in_features * module.out_features for module in in_mlp)
        total += 2 * num_tokens**2 * in_attention[0].out_features  # queries times keys, attention times values
        total += (num_tokens + num_in_mlp) * config.hidden_size * LAYER_NORM_OPERATIONS
    return total / 1e9


def known_encoder(model: nn.Module, family: Family | None = None) -> tuple[Encoder, Family]:
    """
    The one encoder in a model whose layers are of a family of the table, or of the given one.

    Raises:
        ValueError: If there is none, or several.
    """
    candidates = ((encoder, family or FAMILIES.get(encoder.layer_class)) for encoder in find_encoders(model))
    known = [(encoder, each) for encoder, each in candidates if each is not None and each.fits(encoder.layers[0])]
    if not known:
        lists = (module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 0)
        names = ", ".join(sorted({type(modules[0]).__name__ for modules in lists})) or "no list of modules"
        raise ValueError(
            f"{type(model).__name__} has no vision encoder whose tokens can be reduced: its lists of modules are of "
            f"{names}; layers can be {', '.join(FAMILIES) if family is None else f'those that fit {family}'}."
        )
    if len(known) > 1:
        names = ", ".join(encoder.name for encoder, _ in known)
        raise ValueError(f"{type(model).__name__} has several encoders, {names}: pass the one whose tokens are meant.")
    return known[0]


__all__ = ["EncoderReductionConfig", "count_layer_gflops", "known_encoder", "reduce_tokens", "restore_tokens"]
