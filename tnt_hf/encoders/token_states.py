"""What became of the tokens of each image, from layer to layer, whatever the layers are."""

from typing import Any

import torch
from torch import nn

from ..token_reduction_tnt import CHANGING, EMBEDDINGS, ReductionStep, TokenState, randn_like, take_tokens


# All that a state may hold: older compilers of PyTorch trace no other copy of an object than by name.
ATTRIBUTES = (
    *CHANGING,
    *("settings", "generator", "num_prefix_tokens", "num_patches", "has_masked_tokens", "noised_layers"),
    *("schedule", "scorer", "adds_noise", "lengths"),
)


class PaddedTokenState(TokenState):
    """The tokens of images of several sizes, padded at the end, each reduced as if it were alone and not padded."""

    def __init__(self, tokens: torch.Tensor, settings: Any, is_seen: torch.Tensor, **options: Any):
        super().__init__(tokens, settings, is_seen, **options)
        self.lengths = [max(length - self.num_prefix_tokens, 1) for length in is_seen.sum(dim=1).tolist()]

    def reduce(self, step: ReductionStep, scores: torch.Tensor | None = None) -> None:
        rows, parts = [], []
        for length in sorted(set(self.lengths)):
            rows += (same := [row for row, other in enumerate(self.lengths) if other == length])
            # small images may lose nothing before the first layer
            alone = _step_of(self, length, step.layer) or ReductionStep(step.layer, length, length, 0)
            same = torch.tensor(same, device=self.tokens.device)
            parts.append(self._reduce_alone(same, alone, step.num_kept, scores))
        order = torch.tensor(rows, device=self.tokens.device).argsort()
        for name in (*self._num_before, "groups"):
            setattr(self, name, torch.cat([getattr(part, name) for part in parts])[order])
        if self.sizes is not None:
            self._update_attention_bias()

    @property
    def _num_before(self) -> dict[str, int]:
        """What there is of each token, and of how many before those of the patches."""
        seen = "attention_mask" if self.sizes is None else "sizes"
        return {"tokens": self.num_prefix_tokens, seen: self.num_prefix_tokens, "positions": 0}

    def _reduce_alone(
        self, rows: torch.Tensor, alone: ReductionStep, num_kept: int, scores: torch.Tensor | None
    ) -> TokenState:
        """The images of these rows, all of one length, after their step; then padded again."""
        part = copied(self)
        part.groups, num_before = self.groups[rows], self._num_before
        for name, num in num_before.items():
            setattr(part, name, getattr(self, name)[rows, : num + alone.num_tokens])
        TokenState.reduce(part, alone, None if scores is None else scores[rows, : alone.num_tokens])
        for name, num in num_before.items():
            end = num + alone.num_tokens
            padding = getattr(self, name)[rows, end : end + num_kept - alone.num_kept]
            setattr(part, name, torch.cat((getattr(part, name), padding), dim=1))
        return part


def put_back(tokens: torch.Tensor, state: TokenState) -> torch.Tensor:
    """
    The remaining tokens on the whole grid, `(batch_size, num_prefix_tokens + num_patches, hidden_size)`: every patch
    gets the token it is part of, or zeros if it was dropped.
    """
    if not has_shrunk(state):
        return tokens
    places = remaining_places(state).gather(1, state.groups.clamp(min=0))
    tokens = take_tokens(tokens, with_prefix(places, state.num_prefix_tokens))
    if state.sizes is not None:
        return tokens
    is_dropped = nn.functional.pad(state.groups < 0, (state.num_prefix_tokens, 0))
    return tokens.masked_fill(is_dropped.unsqueeze(-1), 0)


def copied(state: TokenState) -> TokenState:
    """A state of its own that holds the same."""
    other = object.__new__(type(state))
    for name in ATTRIBUTES:
        if hasattr(state, name):
            setattr(other, name, getattr(state, name))
    return other


def state_of(tokens: torch.Tensor, layer: int) -> TokenState:
    """What travels with the hidden states that enter a layer; raises RuntimeError if it is lost."""
    state = getattr(tokens, "token_state", None)
    if state is None:
        raise RuntimeError(
            f"What became of the tokens is lost before layer {layer}: something between the layers makes new hidden "
            "states, such as an offload to several devices or checkpointing with `use_reentrant=True`."
        )
    return state


def _step_of(state: TokenState, num_patches: int, layer: int) -> ReductionStep | None:
    steps = state.settings.reduction_steps(num_patches, state.schedule)
    return next((step for step in steps if step.layer == layer), None)


def state_after(layer: int, tokens: torch.Tensor, state: TokenState) -> tuple[torch.Tensor, TokenState]:
    """Tokens and state after the noise or the step of a layer, if it has one; the state before is left as it is."""
    step = _step_of(state, state.num_patches, layer)
    is_noised = state.adds_noise and EMBEDDINGS < layer < state.settings.num_noise_layers
    if step is None and not is_noised:
        return tokens, state
    after = copied(state)
    after.tokens, scores = tokens, None
    if state.scorer is not None and (is_noised or step.uses_scores):
        scores = state.scorer(tokens, layer)[:, state.num_prefix_tokens :]
    if is_noised:
        after.add_noise(layer, scores)
    else:
        is_random = scores is not None and state.settings.selection == "random"
        after.reduce(step, randn_like(scores) if is_random else scores)
    tokens, after.tokens = after.tokens, None
    return tokens, after


def has_shrunk(state: TokenState) -> bool:
    """Whether tokens have left."""
    return state.positions.shape[1] < state.num_patches


def remaining_places(state: TokenState) -> torch.Tensor:
    """Among the remaining patch tokens the place of each remaining patch: `(batch_size, num_patches)`."""
    is_kept = torch.zeros_like(state.groups).scatter(1, state.positions, 1)
    return (is_kept.cumsum(dim=-1) - 1).clamp(min=0)


def with_prefix(places: torch.Tensor, num_prefix_tokens: int) -> torch.Tensor:
    """Places of patch tokens in the whole sequence, after those of the prefix tokens."""
    prefix = torch.arange(num_prefix_tokens, device=places.device).expand(places.shape[0], -1)
    return torch.cat((prefix, places + num_prefix_tokens), dim=1)


def mask_of_remaining(state: TokenState, mask: torch.Tensor | None) -> torch.Tensor | None:
    """A mask or bias of all tokens for the remaining ones."""
    if mask is None:
        return None
    places = with_prefix(state.positions, state.num_prefix_tokens)
    mask = mask.expand(places.shape[0], *mask.shape[1:])
    for dim, index in ((2, places[:, None, :, None]), (3, places[:, None, None, :])):
        if mask.shape[dim] > 1:
            shape = [*mask.shape]
            shape[dim] = places.shape[1]
            mask = mask.gather(dim, index.expand(shape))
    return mask


__all__ = [
    "PaddedTokenState",
    "has_shrunk",
    "mask_of_remaining",
    "put_back",
    "remaining_places",
    "state_after",
    "state_of",
    "with_prefix",
]
