"""Attention in which a token counts as often as it has patches: the one place where sizes enter attention."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward


FORMS = ("mask", "keys")
# Channels of a head as the fused kernels of GPUs need them: a multiple of this, up to the largest.
HEAD_SIZE_MULTIPLE, LARGEST_HEAD_SIZE = 8, 256
# Below it the copies cost more than the mask, by the figures of FlashBias (arXiv 2505.12044); not measured here.
FLASH_LENGTH = 1024
# Stands for minus infinity in a channel of the keys, whose products must be finite also in float16.
NEVER = -60000.0


def attend_by_sizes(
    attend: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    attention_bias: torch.Tensor | None,
    form: str | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    An attention function of Transformers, with a bias on the scores of each key.

    The bias has two forms, whose results are equal to rounding. As a `"mask"` every implementation adds it, but
    PyTorch then leaves flash attention for another kernel. In channels of the `"keys"`, which the queries multiply by
    1, it needs no mask, but queries, keys and values are copied into wider heads.

    Args:
        attend: The attention function, called with `module` and `options`.
        query, key, value (`torch.Tensor` of shape `(batch_size, num_heads, num_tokens, head_size)`):
            What attends to what; there may be fewer queries.
        attention_mask (`torch.Tensor`, *optional*):
            A boolean or additive one besides, `(batch_size or 1, num_heads or 1, num_queries or 1, num_tokens)`.
        attention_bias (`torch.Tensor` of shape `(batch_size, num_tokens)`, *optional*):
            In float32, minus infinity on tokens that nothing attends to; if None, tokens count equally.
        form (`str`, *optional*):
            One of `FORMS`; that of [`choose_form`] if None.
    """
    if attention_bias is None:
        return attend(module, query, key, value, attention_mask, **options)
    attention_bias = attention_bias.to(query.device)  # layers may lie on several devices
    if form is None:
        form = choose_form(attend, query, key, attention_mask)
    if form == "mask":
        bias = attention_bias[:, None, None].to(query.dtype)
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(
                ~attention_mask, -torch.inf
            )
        attention_mask = bias if attention_mask is None else attention_mask + bias
        return attend(module, query, key, value, attention_mask, **options)
    head_size = query.shape[-1]
    scaling = options.pop("scaling", None) or head_size**-0.5
    query, key, value = _with_bias_in_keys(query, key, value, attention_bias / scaling)
    attended, weights = attend(module, query, key, value, attention_mask, scaling=scaling, **options)
    return attended[..., :head_size], weights


def choose_form(attend: Callable, query: torch.Tensor, key: torch.Tensor, attention_mask: torch.Tensor | None) -> str:
    """The form in which [`attend_by_sizes`] passes a bias on."""
    can_run_flash = (
        query.device.type == "cuda"
        and query.dtype in (torch.bfloat16, torch.float16)
        and attend is sdpa_attention_forward
        and attention_mask is None
        and _wider(query.shape[-1]) <= LARGEST_HEAD_SIZE
    )
    return "keys" if can_run_flash and key.shape[2] >= FLASH_LENGTH else "mask"


def _wider(head_size: int) -> int:
    """Channels of a head with room for two more."""
    return -(-(head_size + 2) // HEAD_SIZE_MULTIPLE) * HEAD_SIZE_MULTIPLE


def _with_bias_in_keys(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Heads whose products are raised by a bias, which takes two channels: half precision alone would round it."""
    num_added = _wider(query.shape[-1]) - query.shape[-1]
    bias = bias.clamp(min=NEVER)
    high = bias.to(key.dtype)
    channels = torch.stack((high, (bias - high.float()).to(key.dtype)), dim=-1)
    channels = nn.functional.pad(channels, (0, num_added - 2))[:, None].expand(-1, key.shape[1], -1, -1)
    query = nn.functional.pad(query, (0, num_added), value=1.0)
    return query, torch.cat((key, channels), dim=-1), nn.functional.pad(value, (0, num_added))


__all__ = ["attend_by_sizes", "choose_form"]
