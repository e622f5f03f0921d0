"""Token reduction in a model that is already loaded: put on by one call, taken off by another."""

from collections.abc import Sequence
from functools import partial
from os import PathLike
from typing import Any

from torch import nn

from ..named_schedules import FlopsReduction, parse_schedule, resolve_schedules
from ..schedules_tnt import LAYER_NORM_OPERATIONS, UNPRUNED, Schedule
from ..token_reduction_tnt import EMBEDDINGS, reduction_cost
from .configuration import EncoderReductionConfig
from .families import Encoder, Family, known_encoder
from .hooks import BeforeLayer, add_hooks, hooks_of, remove_hooks, require_attention_with_bias
from .scorer import TokenScorer


def reduce_tokens(
    model: nn.Module,
    schedule: str | Schedule | FlopsReduction,
    *,
    scorer: TokenScorer | str | PathLike | None = None,
    image_size: int | Sequence[int] | None = None,
    puts_back: bool = True,
    family: Family | None = None,
    **settings: Any,
) -> Schedule:
    """
    Let the vision encoder of a model merge similar tokens from now on, until [`restore_tokens`], or drop the least
    relevant if there is a scorer.

    Outputs keep their shapes: after the last layer, and in hidden states that are returned, every patch has the token
    that it became part of, or zeros if it was dropped. Weights, classes, config and state dict stay what they are.

    Args:
        model (`nn.Module`): A model of Transformers with one encoder of [`~tnt_hf.encoders.FAMILIES`] in it.
        schedule (`str`, [`Schedule`] or [`FlopsReduction`]):
            What leaves where; a text such as `"2x"`, half of the multiply-accumulates of the layers, is read by
            [`~tnt_hf.named_schedules.parse_schedule`].
        scorer ([`~tnt_hf.encoders.TokenScorer`], `str` or `PathLike`, *optional*):
            Trained heads for this encoder, or the folder or the repository on the Hub that has them. They hold the
            relevant tokens back where tokens are merged, and decide where they are dropped; they are frozen, and are
            no part of the model.
        image_size (`int` or `(height, width)`, *optional*):
            Pixels of the images that the budget is for; those of the scorer or of the encoder's config by default.
            Others may come: the shares that leave stay the same.
        puts_back (`bool`, *optional*, defaults to `True`):
            Whether the output has all tokens. If not, it is as short as the sequence in the end, and the hidden states
            among it have the `token_state` that [`~tnt_hf.encoders.put_back`] needs.
        family ([`~tnt_hf.encoders.Family`], *optional*): How the layers are built, if they are not in the table.
        settings:
            Without a scorer `token_reduction`, by default `"cluster"`, `size_bias` and `similarity_partition`; with
            one those of its config that are to differ: see [`~tnt_hf.configuration_tnt.TokenPruningFields`].

    Returns:
        [`Schedule`]: What leaves where.

    Raises:
        ValueError: If the model has no such encoder, has several, or reduces tokens already, its attention
            implementation takes no bias, the scorer is of another encoder, a setting is not allowed, or its depth or
            its scorer cannot carry out the schedule; the model is as before then.
        TypeError: If the model is none of PyTorch, as a pipeline or a name.
        OSError: If there is no scorer in that folder or repository.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a model, such as `pipeline.model`, got {type(model).__name__}.")
    if hooks_of(model):
        raise ValueError(f"{type(model).__name__} reduces tokens already: call `restore_tokens` first.")
    encoder, family = known_encoder(model, family)
    require_attention_with_bias(encoder.config)
    scorer, config = _settings_of(encoder, family, scorer, image_size, settings)
    schedule = _resolve(encoder, family, config, schedule)
    if scorer is not None:
        scorer.requires_grad_(False)
    add_hooks(encoder, family, config, schedule, puts_back, scorer)
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


def _settings_of(
    encoder: Encoder,
    family: Family,
    scorer: TokenScorer | str | PathLike | None,
    image_size: int | Sequence[int] | None,
    settings: dict[str, Any],
) -> tuple[TokenScorer | None, EncoderReductionConfig]:
    if scorer is None:
        return None, EncoderReductionConfig.of(encoder, family, image_size, **settings)
    if not isinstance(scorer, TokenScorer):
        scorer = TokenScorer.from_pretrained(scorer)
    return scorer, scorer.config_on(encoder, family, image_size, **settings)


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
    scorer: TokenScorer | str | PathLike | None = None,
    image_size: int | Sequence[int] | None = None,
    family: Family | None = None,
    **settings: Any,
) -> float:
    """
    Cost of one image in the layers of a model's encoder, in GFLOPs as the literature counts them: 1e9
    multiply-accumulates; counted from their modules as [`~tnt_hf.schedules_tnt.count_gflops`] counts a ViT. Arguments
    are those of [`reduce_tokens`].

    Raises:
        ValueError: If the model has no encoder of a known family, the scorer is of another encoder, a setting is not
            allowed, or the schedule cannot be carried out.
    """
    encoder, family = known_encoder(model, family)
    _, config = _settings_of(encoder, family, scorer, image_size, settings)
    return _gflops(encoder, family, config, schedule)


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


__all__ = ["count_layer_gflops", "reduce_tokens", "restore_tokens"]
