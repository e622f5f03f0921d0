"""
The driver of token reduction for layers that are not ours: hooks on each layer, and an attention function.

No module is replaced. What became of the tokens travels from layer to layer as an attribute of the hidden states, and
within a layer in a variable of the thread, so that a model can be called from several threads, be compiled, exported,
and recompute its layers in the backward pass.
"""

import copy
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput

from ..token_reduction_tnt import TokenState, take_tokens
from .families import Encoder, Family


# Attention by sizes under the name of each implementation that takes a mask.
ATTENTION = {"sdpa": "tnt_sdpa", "eager": "tnt_eager"}


@dataclass(eq=False)
class _Pass:
    """One call of one layer."""

    state: TokenState
    reduced: TokenState | None = None  # after its reduction
    kept: torch.Tensor | None = None  # of the tokens that enter, those that remain
    correction: torch.Tensor | None = None  # what merging adds to them


class _Current(threading.local):
    layer: _Pass | None = None
    attending: TokenState | None = None


_current = _Current()


class Hook:
    """What is called on a module of a reduced encoder, with the handle that takes it off."""

    handle: RemovableHandle


@dataclass(eq=False)
class Enter(Hook):
    """On the first norm, which is called with the hidden states themselves, also when a layer is recomputed."""

    index: int
    settings: Any

    def __call__(self, module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        (tokens,) = inputs
        if self.index == 0:
            state = TokenState(tokens, self.settings, merges=True, track_groups=True)
            state.tokens = None
        else:
            state = getattr(tokens, "token_state", None)
        if state is None:
            raise RuntimeError(
                f"What became of the tokens is lost before layer {self.index}: something between the layers makes new "
                "hidden states, such as an offload to several devices or checkpointing with `use_reentrant=True`."
            )
        _current.layer = _Pass(state)


@dataclass(eq=False)
class BeforeAttention(Hook):
    """The attention function is told of the sizes; rotary embeddings of the patches follow the remaining tokens."""

    def __call__(self, module: nn.Module, inputs: tuple, named_inputs: dict) -> tuple[tuple, dict] | None:
        state = _current.attending = _current.layer.state
        rotary = named_inputs.get("position_embeddings")
        if rotary is None or not _has_shrunk(state):
            return None
        rotary = tuple(
            take_tokens(each.expand(state.positions.shape[0], *each.shape[-2:]), state.positions).unsqueeze(1)
            for each in rotary
        )
        return inputs, {**named_inputs, "position_embeddings": rotary}


@dataclass(eq=False)
class AfterAttention(Hook):
    def __call__(self, module: nn.Module, inputs: tuple, outputs: Any) -> None:
        _current.attending = None


@dataclass(eq=False)
class BeforeMlp(Hook):
    """On the second norm: the MLP is computed for the remaining tokens alone."""

    index: int
    settings: Any

    def __call__(self, module: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor | None:
        (tokens,), layer = inputs, _current.layer
        layer.reduced = reduced = _reduce(layer.state, tokens, self.index, self.settings)
        if reduced is None:
            return None
        layer.kept = _with_prefix(_places(layer.state).gather(1, reduced.positions), reduced.num_prefix_tokens)
        remaining, reduced.tokens = reduced.tokens, None
        layer.correction = remaining - take_tokens(tokens, layer.kept)
        return remaining


@dataclass(eq=False)
class AfterMlp(Hook):
    """Its output is laid out for all tokens again, as that is what the layer adds to them."""

    def __call__(self, module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        before, after = _current.layer.state, _current.layer.reduced
        if after is None:
            return output
        heirs = after.groups.gather(1, before.positions).clamp(min=0)
        return take_tokens(output, _with_prefix(_places(after).gather(1, heirs), after.num_prefix_tokens))


@dataclass(eq=False)
class Leave(Hook):
    """On the layer: of its output the remaining tokens, or all tokens again after the last layer."""

    index: int
    settings: Any
    reduces: bool
    puts_back: bool

    def __call__(self, module: nn.Module, inputs: tuple, tokens: torch.Tensor) -> torch.Tensor:
        layer, _current.layer = _current.layer, None
        state = layer.state
        if layer.reduced is not None:
            tokens, state = take_tokens(tokens, layer.kept) + layer.correction, layer.reduced
        elif self.reduces:
            reduced = _reduce(state, tokens, self.index, self.settings)
            if reduced is not None:
                tokens, state, reduced.tokens = reduced.tokens, reduced, None
        if self.puts_back:
            return put_back(tokens, state)
        tokens.token_state = state
        return tokens


@dataclass(eq=False)
class PutBackHiddenStates(Hook):
    """On what is around the layers: the hidden states that it returns have all tokens."""

    def __call__(self, module: nn.Module, inputs: tuple, output: Any) -> Any:
        if isinstance(output, ModelOutput) and output.get("hidden_states") is not None:
            output["hidden_states"] = tuple(
                put_back(tokens, tokens.token_state) if hasattr(tokens, "token_state") else tokens
                for tokens in output["hidden_states"]
            )
        return output


def add_hooks(encoder: Encoder, family: Family, settings: Any, puts_back: bool) -> None:
    """Let the layers of an encoder reduce tokens as settings, an [`EncoderReductionConfig`], say."""
    last = len(encoder.layers) - 1
    for index, layer in enumerate(encoder.layers):
        first_norm, second_norm = (getattr(layer, name) for name in family.norms)
        attention = getattr(layer, family.attention)
        _add(first_norm.register_forward_pre_hook, Enter(index, settings))
        _add(attention.register_forward_pre_hook, BeforeAttention(), with_kwargs=True)
        _add(attention.register_forward_hook, AfterAttention(), always_call=True)
        if family.mlp is not None:
            _add(second_norm.register_forward_pre_hook, BeforeMlp(index, settings))
            _add(getattr(layer, family.mlp).register_forward_hook, AfterMlp())
        leave = Leave(index, settings, family.mlp is None, puts_back and index == last)
        # before hooks that record hidden states, which are to see what the next layer gets
        _add(layer.register_forward_hook, leave, prepend=True)
    if puts_back:
        for module in encoder.around:
            _add(module.register_forward_hook, PutBackHiddenStates(), prepend=True)


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


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *arguments: Any,
    implementation: str,
    **named_arguments: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    The attention of an implementation, in which tokens count by their sizes.

    Queries, keys and values have shape `(batch_size, num_heads, num_tokens, head_size)`; a mask is that of all tokens,
    `(batch_size or 1, num_heads or 1, num_tokens or 1, num_tokens)`.
    """
    state = _current.attending
    if state is not None:
        attention_mask = _mask_of_remaining(state, attention_mask, query.dtype)
    if implementation == "eager":  # of which every model file has its own
        function = sys.modules[type(module).__module__].eager_attention_forward
    else:
        function = ALL_ATTENTION_FUNCTIONS[implementation]
    return function(module, query, key, value, attention_mask, *arguments, **named_arguments)


for _implementation, _name in ATTENTION.items():
    AttentionInterface.register(_name, partial(attend, implementation=_implementation))
    AttentionMaskInterface.register(_name, ALL_MASK_ATTENTION_FUNCTIONS[_implementation])


def put_back(tokens: torch.Tensor, state: TokenState) -> torch.Tensor:
    """
    The remaining tokens on the whole grid, `(batch_size, num_prefix_tokens + num_patches, hidden_size)`: every patch
    gets the token it is part of.
    """
    if not _has_shrunk(state):
        return tokens
    places = _places(state).gather(1, state.groups.clamp(min=0))
    return take_tokens(tokens, _with_prefix(places, state.num_prefix_tokens))


def _reduce(state: TokenState, tokens: torch.Tensor, layer: int, settings: Any) -> TokenState | None:
    """The state after the reduction of a layer, if it has one; the one before is left as it is."""
    steps = [step for step in settings.reduction_steps(state.num_patches) if step.layer == layer]
    if not steps:
        return None
    reduced = copy.copy(state)
    reduced.tokens = tokens
    reduced.reduce(steps[0])
    return reduced


def _has_shrunk(state: TokenState) -> bool:
    return state.positions.shape[1] < state.num_patches


def _places(state: TokenState) -> torch.Tensor:
    """Among the remaining patch tokens the place of each remaining patch: `(batch_size, num_patches)`."""
    is_kept = torch.zeros_like(state.groups).scatter(1, state.positions, 1)
    return (is_kept.cumsum(dim=-1) - 1).clamp(min=0)


def _with_prefix(places: torch.Tensor, num_prefix_tokens: int) -> torch.Tensor:
    """Places of patch tokens in the whole sequence, after those of the prefix tokens."""
    prefix = torch.arange(num_prefix_tokens, device=places.device).expand(places.shape[0], -1)
    return torch.cat((prefix, places + num_prefix_tokens), dim=1)


def _mask_of_remaining(state: TokenState, mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A mask or bias of all tokens for the remaining ones, with the bias of their sizes."""
    if not _has_shrunk(state):
        if mask is not None:  # as padding has no part in merged tokens
            seen = mask[:, 0, 0]
            seen = seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min / 2
            state.sizes = seen.float().expand_as(state.sizes)
        return mask
    bias = state.attention_bias(dtype)
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)
    places = _with_prefix(state.positions, state.num_prefix_tokens)
    for dim in (2, 3):
        if mask.shape[dim] > 1:
            index = places[:, None, :, None] if dim == 2 else places[:, None, None, :]
            shape = [places.shape[0], *mask.shape[1:]]
            index_shape = [*shape]
            index_shape[dim] = places.shape[1]
            mask = mask.expand(shape).gather(dim, index.expand(index_shape))
    return mask + bias


__all__ = ["ATTENTION", "add_hooks", "hooks_of", "put_back"]
