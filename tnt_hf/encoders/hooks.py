"""
The driver of token reduction for layers that are not ours: hooks on each layer, and an attention function.

No module is replaced. What became of the tokens travels from layer to layer as an attribute of the hidden states, and
within a layer in a variable of the thread, so that a model can be called from several threads, be compiled, exported,
and recompute its layers in the backward pass.
"""

import copy
import inspect
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..attention_tnt import attend_by_sizes
from ..configuration_tnt import MERGING_ATTENTION
from ..schedules_tnt import Schedule
from ..token_reduction_tnt import EMBEDDINGS, TokenState, take_tokens
from .families import Encoder, Family
from .token_states import (
    PaddedTokenState,
    has_shrunk,
    mask_of_remaining,
    put_back,
    remaining_places,
    state_after,
    state_of,
    with_prefix,
)


# The name of `attend` among the attention functions of Transformers.
ATTENTION_BY_SIZES = "tnt_by_sizes"


@dataclass(eq=False)
class _Pass:
    """One call of one layer."""

    state: TokenState
    has_attended: bool = False  # by sizes
    reduced: TokenState | None = None  # the state after its reduction
    kept: torch.Tensor | None = None  # of the tokens that enter, those that remain
    correction: torch.Tensor | None = None  # what merging adds to them


@dataclass(eq=False)
class _Current:
    layer: _Pass | None = None
    attention: _Pass | None = None  # while the attention is called


class _Thread(threading.local):
    def __init__(self):
        # an object that stays: torch.compile loses what is assigned to a threading.local itself where its graph breaks
        self.current = _Current()


_thread = _Thread()


class Hook:
    """What is called on a module of a reduced encoder, with the handle that takes it off."""

    handle: RemovableHandle


@dataclass(eq=False)
class BeforeLayer(Hook):
    """On the layer: the first one starts the record of what becomes of the tokens."""

    index: int
    settings: Any
    schedule: Schedule
    family: Family
    config: PreTrainedConfig
    scorer: nn.Module | None
    is_mask_second: bool  # among the inputs of the layer
    adds_noise: bool = False

    def __call__(self, module: nn.Module, inputs: tuple, named_inputs: dict) -> tuple[tuple, dict] | None:
        tokens, *others = inputs
        if self.index == 0:
            mask = others[0] if others and self.is_mask_second else named_inputs.get("attention_mask")
            state = self._start(tokens, mask)
            tokens, state = state_after(EMBEDDINGS, tokens, state)
            tokens.token_state = state
        state = state_of(tokens, self.index)
        if has_shrunk(state) and named_inputs.get("interpolate_pos_encoding"):
            # of BEiT, whose biases are made for all patches; this would make them as many as there are tokens
            named_inputs = {**named_inputs, "interpolate_pos_encoding": False}
        return (tokens, *others), named_inputs

    def _start(self, tokens: torch.Tensor, mask: torch.Tensor | None) -> TokenState:
        """The state before the first layer, under the mask of the layers, an additive or boolean one, or none."""
        require_attention_with_bias(self.config)  # with others the mask is of another form
        is_seen = None
        if mask is not None:
            mask = mask[:, 0, 0].expand(tokens.shape[0], -1)
            is_seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        state_class = PaddedTokenState if self.family.is_padded and is_seen is not None else TokenState
        state = state_class(tokens, self.settings, is_seen, merges=self.settings.merges, track_groups=True)
        state.tokens, state.schedule = None, self.schedule
        state.scorer, state.adds_noise = self.scorer, self.adds_noise
        return state


@dataclass(eq=False)
class Enter(Hook):
    """On the first norm, which is called with the hidden states themselves, also when a layer is recomputed."""

    index: int

    def __call__(self, module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        _thread.current.layer = _Pass(state_of(inputs[0], self.index))


@dataclass(eq=False)
class BeforeAttention(Hook):
    """The attention function is told of the sizes; rotary embeddings of the patches follow the remaining tokens."""

    def __call__(self, module: nn.Module, inputs: tuple, named_inputs: dict) -> tuple[tuple, dict] | None:
        _thread.current.attention = _thread.current.layer
        state, rotary = _thread.current.layer.state, named_inputs.get("position_embeddings")
        if rotary is None or not has_shrunk(state):
            return None
        rotary = tuple(
            take_tokens(each.expand(state.positions.shape[0], *each.shape[-2:]), state.positions).unsqueeze(1)
            for each in rotary
        )
        return inputs, {**named_inputs, "position_embeddings": rotary}


@dataclass(eq=False)
class AfterAttention(Hook):
    def __call__(self, module: nn.Module, inputs: tuple, outputs: Any) -> None:
        layer, _thread.current.attention = _thread.current.attention, None
        if outputs is not None and not layer.has_attended:  # None after an exception
            raise RuntimeError(
                f"{type(module).__name__} does not call the attention functions of Transformers by the config of its "
                "modules, so that merged tokens cannot count by their sizes."
            )


@dataclass(eq=False)
class BeforeMlp(Hook):
    """On the second norm: the MLP is computed for the remaining tokens alone."""

    index: int

    def __call__(self, module: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor | None:
        (tokens,), layer = inputs, _thread.current.layer
        remaining, reduced = state_after(self.index, tokens, layer.state)
        if reduced is layer.state:
            return None
        layer.reduced = reduced
        layer.kept = with_prefix(remaining_places(layer.state).gather(1, reduced.positions), reduced.num_prefix_tokens)
        layer.correction = remaining - take_tokens(tokens, layer.kept)
        return remaining


@dataclass(eq=False)
class AfterMlp(Hook):
    """Its output is laid out for all tokens again, as that is what the layer adds to them."""

    def __call__(self, module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        before, after = _thread.current.layer.state, _thread.current.layer.reduced
        if after is None:
            return output
        heirs = after.groups.gather(1, before.positions).clamp(min=0)
        return take_tokens(output, with_prefix(remaining_places(after).gather(1, heirs), after.num_prefix_tokens))


@dataclass(eq=False)
class AfterLayer(Hook):
    """On the layer: of its output the remaining tokens, or all tokens again after the last layer."""

    index: int
    reduces: bool
    puts_back: bool

    def __call__(self, module: nn.Module, inputs: tuple, tokens: torch.Tensor) -> torch.Tensor:
        layer, _thread.current.layer = _thread.current.layer, None
        state = layer.state
        if layer.reduced is not None:
            tokens, state = take_tokens(tokens, layer.kept) + layer.correction, layer.reduced
        elif self.reduces:
            tokens, state = state_after(self.index, tokens, state)
        if self.puts_back:
            return put_back(tokens, state)
        tokens.token_state = state
        return tokens


@dataclass(eq=False)
class PutBackHiddenStates(Hook):
    """On what is around the layers: the hidden states that it returns have all tokens."""

    def __call__(self, module: nn.Module, inputs: tuple, output: Any) -> Any:
        if isinstance(output, torch.Tensor) and getattr(output, "token_state", None) is not None:
            tokens = put_back(output, output.token_state)
            if tokens is output:
                output.token_state = None
            return tokens
        if isinstance(output, dict):
            for name, value in output.items():
                output[name] = self(module, inputs, value)
        elif type(output) in (tuple, list):
            return type(output)(self(module, inputs, value) for value in output)
        return output


def add_hooks(
    encoder: Encoder, family: Family, settings: Any, schedule: Schedule, puts_back: bool, scorer: nn.Module | None
) -> None:
    """
    Let the layers of an encoder reduce tokens as settings, an [`EncoderReductionConfig`], and a schedule say, by the
    scores of a [`TokenScorer`] if there is one.
    """
    last, before_mlp = len(encoder.layers) - 1, family.reduces_before_mlp(settings)
    for index, layer in enumerate(encoder.layers):
        first_norm, second_norm = map(layer.get_submodule, family.norms)
        attention = layer.get_submodule(family.attention)
        is_mask_second = list(inspect.signature(layer.forward).parameters)[1:2] == ["attention_mask"]
        before_layer = BeforeLayer(index, settings, schedule, family, encoder.config, scorer, is_mask_second)
        _add(layer.register_forward_pre_hook, before_layer, with_kwargs=True)
        _add(first_norm.register_forward_pre_hook, Enter(index))
        _add(attention.register_forward_pre_hook, BeforeAttention(), with_kwargs=True)
        _add(attention.register_forward_hook, AfterAttention(), always_call=True)
        if before_mlp:
            _add(second_norm.register_forward_pre_hook, BeforeMlp(index))
            _add(layer.get_submodule(family.mlp).register_forward_hook, AfterMlp())
        # before hooks that record hidden states, which are to see what the next layer gets
        after_layer = AfterLayer(index, not before_mlp, puts_back and index == last)
        _add(layer.register_forward_hook, after_layer, prepend=True)
        for module in attention.modules():
            if isinstance(getattr(module, "config", None), PreTrainedConfig):
                module.config = _by_sizes(module.config)
    if puts_back:
        for module in encoder.around:
            _add(module.register_forward_hook, PutBackHiddenStates(), prepend=True)


def remove_hooks(model: nn.Module) -> None:
    """Undo [`add_hooks`] wherever it was called in a model."""
    for hook in hooks_of(model):
        hook.handle.remove()
    for module in model.modules():
        plain = getattr(getattr(module, "config", None), "plain", None)
        if plain is not None:
            module.config = plain


def _add(register: Callable[..., RemovableHandle], hook: Hook, **options: Any) -> None:
    hook.handle = register(hook, **options)


def hooks_of(model: nn.Module) -> list[Hook]:
    """The hooks of this file on a model."""
    hooks = (
        hook
        for module in model.modules()
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    )
    return [hook for hook in hooks if isinstance(hook, Hook)]


def _by_sizes(config: PreTrainedConfig) -> PreTrainedConfig:
    """
    The config of an attention whose tokens count by their sizes: a copy, as the config itself may be shared with other
    models, and is saved with this one.
    """
    copied = copy.copy(config)
    copied._attn_implementation_internal = ATTENTION_BY_SIZES  # that of configs inside it stays
    copied.plain = config
    return copied


def require_attention_with_bias(config: PreTrainedConfig) -> str:
    """The attention implementation of a config; raises ValueError if it cannot add to the attention scores."""
    implementation = config._attn_implementation
    if implementation not in MERGING_ATTENTION:
        raise ValueError(
            f"Tokens can be merged under the attention implementations {', '.join(MERGING_ATTENTION)}, got "
            f"{implementation!r}: call `model.set_attn_implementation('sdpa')` first."
        )
    return implementation


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    The attention of the implementation that the model is set to, in which tokens count by their sizes.

    Queries, keys and values have shape `(batch_size, num_heads, num_tokens, head_size)`; a mask is that of all tokens,
    `(batch_size or 1, num_heads or 1, num_tokens or 1, num_tokens)`.
    """
    implementation, bias = require_attention_with_bias(module.config.plain), None
    if _thread.current.attention is not None:
        _thread.current.attention.has_attended = True
        state = _thread.current.attention.state
        if has_shrunk(state):
            attention_mask, bias = mask_of_remaining(state, attention_mask), state.attention_bias
    if implementation == "eager":  # of which every model file has its own
        files = (sys.modules[each.__module__] for each in type(module).__mro__)
        function = next(file.eager_attention_forward for file in files if hasattr(file, "eager_attention_forward"))
    else:
        function = ALL_ATTENTION_FUNCTIONS[implementation]
    return attend_by_sizes(function, module, query, key, value, attention_mask, bias, **options)


AttentionInterface.register(ATTENTION_BY_SIZES, attend)


__all__ = ["BeforeLayer", "add_hooks", "hooks_of", "remove_hooks", "require_attention_with_bias"]
