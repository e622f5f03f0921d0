"""
How a sequence of patch tokens is noised and shortened: tensor functions, and the state of a forward pass.

Nothing here knows a model. A driver, such as the layer loop of a ViT, makes one [`TokenState`] for a forward pass,
runs its layers on `state.tokens`, and lets the state add noise or carry out a [`ReductionStep`] between them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils.generic import maybe_autocast


# The layer of a step that comes before the first one.
EMBEDDINGS = -1
# The share of an image's tokens that the capacity gate spares is drawn from this range: budgets of the pruned model.
# Its slope is for one standard deviation of the scores.
CAPACITY_RANGE = (0.15, 0.9)
CAPACITY_GATE_SLOPE = 4.0
# What a step changes of a state.
CHANGING = (
    *("tokens", "positions", "sizes", "attention_bias", "attention_mask"),
    *("groups", "kept_masks", "step_groups"),
)
# For clusters by measurements on the networks of docs/photographs.md.
SIZE_BIAS = {"merge": 1.0, "cluster": 0.85}


@dataclass(frozen=True)
class ReductionStep:
    """How many patch tokens leave at one place of a network, and why."""

    layer: int  # after which they leave, from 0; EMBEDDINGS before the first one
    num_tokens: int  # that are there
    num_kept: int  # that remain
    num_similar: int  # that leave because another token is similar to them

    @property
    def uses_scores(self) -> bool:
        """Whether scores, where there are any, have a say in which tokens leave."""
        return self.layer != EMBEDDINGS and self.num_kept < self.num_tokens


def randn_like(tensor: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Standard normal numbers of the shape, dtype and device of `tensor`."""
    device = generator.device if generator else tensor.device
    return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype, device=device).to(tensor.device)


def rand(num_draws: int, generator: torch.Generator | None, device: torch.device) -> torch.Tensor:
    """Uniform numbers from 0 to 1, shape `(num_draws,)`, on `device`."""
    return torch.rand(num_draws, generator=generator, device=generator.device if generator else device).to(device)


def standardize(scores: torch.Tensor, is_counted: torch.Tensor) -> torch.Tensor:
    """
    Scores of each image at mean 0 and standard deviation 1; both arguments have shape `(batch_size, num_tokens)`, and
    the tokens that do not count have no influence.
    """
    weights = is_counted / is_counted.sum(dim=-1, keepdim=True).clamp(min=1)
    deviation = scores - (weights * scores).sum(dim=-1, keepdim=True)
    return deviation / (weights * deviation.square()).sum(dim=-1, keepdim=True).sqrt().clamp(min=1e-6)


def capacity_noise_gate(scores: torch.Tensor, capacity: torch.Tensor) -> torch.Tensor:
    """
    Share of the noise that each patch token gets, `(batch_size, num_patch_tokens)` as its scores: 1/2 at the score
    that parts the most relevant `capacity` of an image's tokens, a share from 0 to below 1 of shape `(batch_size,)`,
    from the rest.
    """
    scores = standardize(scores, torch.ones_like(scores))
    rank = (capacity * scores.shape[1]).long().unsqueeze(-1)
    threshold = scores.sort(dim=-1, descending=True).values.gather(1, rank)
    return torch.sigmoid(CAPACITY_GATE_SLOPE * (threshold - scores))


def take_tokens(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """
    The tokens of each image at its positions: `(batch_size, num_tokens, hidden_size)` and `(batch_size, num_taken)` ->
    `(batch_size, num_taken, hidden_size)`. Whole rows are copied, several times faster than an expanded `gather`.
    """
    batch_size, num_tokens, hidden_size = tokens.shape
    first_rows = torch.arange(0, batch_size * num_tokens, num_tokens, device=tokens.device).unsqueeze(-1)
    rows = tokens.reshape(-1, hidden_size).index_select(0, (first_rows + positions).flatten())
    return rows.view(batch_size, positions.shape[1], hidden_size)


def norms(vectors: torch.Tensor) -> torch.Tensor:
    """Euclidean, in float32: `(..., size)` -> `(...)`. Those of vectors that are 0 can be divided by."""
    return torch.linalg.vector_norm(vectors.float(), dim=-1).clamp(min=1e-12)


def random_partition(num_tokens: int, generator: torch.Generator | None, device: torch.device) -> torch.Tensor:
    """A permutation of token positions, shape `(num_tokens,)`, one draw for the whole batch."""
    return torch.randperm(num_tokens, generator=generator, device=generator.device if generator else device).to(device)


@dataclass
class Matching:
    """Which tokens leave a sequence, and which they are most similar to: positions in it, `torch.LongTensor`s."""

    leaving: torch.Tensor  # (batch_size, num_leaving)
    partners: torch.Tensor  # (batch_size, num_leaving): the tokens that they join
    left: torch.Tensor  # (batch_size, num_left): the other tokens, ascending


def match_similar(
    metric: torch.Tensor,
    num_leaving: int,
    partition: torch.Tensor | None = None,
    is_masked: torch.Tensor | None = None,
    penalty: torch.Tensor | None = None,
    sizes: torch.Tensor | None = None,
    num_prefix_tokens: int = 0,
    lengths: torch.Tensor | None = None,
) -> Matching:
    """
    Choose the tokens that are most similar to another one.

    The first half of the partition (rounded down) is compared with the second: the `num_leaving` tokens of the first
    half with the highest cosine similarity to their nearest token of the second half, less their penalty, leave.

    Args:
        metric (`torch.Tensor` of shape `(batch_size, num_tokens, metric_size)`): What is compared.
        num_leaving (`int`): Number of tokens that leave, at most half of those that are compared.
        partition (`torch.Tensor` of shape `(num_compared,)`, *optional*):
            A permutation of the positions behind the prefix tokens, from 0; `1, 3, ...` then `0, 2, ...` if None.
        is_masked (`torch.BoolTensor` of shape `(batch_size, num_tokens)`, *optional*):
            Tokens that nothing attends to: the first to leave, and no token is similar to them.
        penalty (`torch.Tensor` of shape `(batch_size, num_tokens)`, *optional*): Subtracted from the similarity.
        sizes (`torch.Tensor` of shape `(batch_size, num_tokens)`, *optional*):
            Patches in each token. Instead of the similarity, what counts is then the distance, 1 less the cosine,
            times the square root of `a * b / (a + b)` for sizes `a` and `b`. Without the root this is Ward's
            criterion, the growth of the squared distances from the means (Ward, 1963, JASA 58).
        num_prefix_tokens (`int`, *optional*, defaults to 0): Tokens that come first and are not compared.
        lengths (`torch.Tensor` of shape `(batch_size, num_tokens)`, *optional*):
            The [`norms`] of the metric, if they are known.

    Source: https://github.com/mx-ethan-rao/tnt/blob/d095619/models.py#L21-L75, and bipartite soft matching, section 3
    of arXiv 2210.09461, without its distinction of attention keys.
    """
    batch_size, num_tokens, _ = metric.shape
    first = num_prefix_tokens
    if partition is None:
        halves: tuple = (slice(first + 1, None, 2), slice(first, None, 2))
    else:
        num_candidates = (num_tokens - first) // 2
        halves = partition[:num_candidates] + first, partition[num_candidates:] + first
    candidates, references = halves
    # candidates last: along the last dimension PyTorch 2.11 compiles a wrong argmax for CPUs
    metric = metric.float()
    products = torch.bmm(metric[:, references], metric[:, candidates].transpose(1, 2))
    lengths = norms(metric) if lengths is None else lengths
    similarity = products / (lengths[:, references].unsqueeze(-1) * lengths[:, candidates].unsqueeze(1))
    if sizes is not None:
        inverse = sizes.clamp(min=1).reciprocal()
        inverse = inverse[:, references].unsqueeze(-1) + inverse[:, candidates].unsqueeze(1)
        similarity = (similarity - 1) * inverse.rsqrt()
    if is_masked is not None:
        lowest = torch.finfo(similarity.dtype).min  # not minus infinity, which is for tokens that never leave
        similarity = similarity.masked_fill(is_masked[:, references].unsqueeze(-1), lowest)
    willingness, nearest = similarity.max(dim=1)
    if penalty is not None:
        willingness = willingness - penalty[:, candidates]
    if is_masked is not None:
        willingness = willingness.masked_fill(is_masked[:, candidates], torch.inf)
    positions = torch.arange(num_tokens, device=metric.device)
    places = positions[candidates].expand(batch_size, -1)
    everywhere = willingness.new_full((batch_size, num_tokens), -torch.inf).scatter(1, places, willingness)
    partners = positions.expand(batch_size, -1).scatter(1, places, positions[references][nearest])
    order = everywhere.argsort(dim=-1, descending=True)
    leaving, left = order[:, :num_leaving], order[:, num_leaving:].sort(dim=-1).values
    return Matching(leaving, partners.gather(1, leaving), left)


def merge(
    tokens: torch.Tensor, sizes: torch.Tensor, matching: Matching, lengths: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Average the tokens that leave into those they join, each weighted by the patches it stands for.

    Tokens of shape `(batch_size, num_tokens, hidden_size)` and their sizes, the patches in each, of shape
    `(batch_size, num_tokens)` -> the tokens that are left and their sizes, at `matching.left`. Tokens of size 0 leave
    no trace. With the `lengths` of the tokens, their [`norms`], a mean, which is shorter than its members, is scaled
    to the mean of their norms.
    """
    leaving, partners, left = matching.leaving, matching.partners, matching.left
    num_tokens, num_leaving = tokens.shape[1], leaving.shape[1]
    # a mean for each token that leaves, so those of tokens that join the same one are equal
    members = torch.cat((partners, leaving), dim=1)
    own, joining = sizes.gather(1, members).split(num_leaving, dim=1)
    joining = joining.unsqueeze(1)
    share = (partners.unsqueeze(-1) == partners.unsqueeze(1)) * joining
    total = (own + share.sum(dim=-1)).clamp(min=1).unsqueeze(-1)
    share, weight = share / total, own.unsqueeze(-1) / total
    into, joined = take_tokens(tokens, members).float().split(num_leaving, dim=1)
    means = into * weight + torch.bmm(share, joined)
    if lengths is not None:
        into, joined = lengths.gather(1, members).split(num_leaving, dim=1)
        length = into * weight.squeeze(-1) + (share * joined.unsqueeze(1)).sum(dim=-1)
        means = means * (length / norms(means)).unsqueeze(-1)

    # what is left comes from the tokens, or from the means behind them
    meets = left.unsqueeze(-1) == partners.unsqueeze(1)
    behind = torch.arange(num_tokens, num_tokens + num_leaving, device=tokens.device, dtype=torch.int32)
    sources = torch.maximum(left, (meets * behind).amax(dim=-1))
    tokens = take_tokens(torch.cat((tokens, means.to(tokens.dtype)), dim=1), sources)
    return tokens, sizes.gather(1, left) + (meets * joining).sum(dim=-1)


def merge_rounds(step: ReductionStep) -> list[tuple[int, int, bool]]:
    """
    The rounds by which tokens are merged, at most half of them in each: how many there are, how many leave, and
    whether scores hold tokens back.
    """
    rounds, num_tokens = [], step.num_tokens
    for num_left, is_held_back in ((step.num_kept + step.num_similar, True), (step.num_kept, False)):
        while num_tokens > num_left:
            num_leaving = min(num_tokens - num_left, num_tokens // 2)
            rounds.append((num_tokens, num_leaving, is_held_back))
            num_tokens = num_tokens - num_leaving
    return rounds


class TokenState:
    """
    The tokens of one forward pass, and what has become of the patches so far.

    Args:
        tokens (`torch.Tensor` of shape `(batch_size, num_prefix_tokens + num_patches, hidden_size)`): The embeddings.
        settings ([`~tnt_hf.configuration_tnt.TokenPruningFields`]):
            How patch tokens are noised and reduced. The first `num_prefix_tokens` tokens never are.
        attention_mask (`torch.Tensor` of shape `(batch_size, num_prefix_tokens + num_patches)`, *optional*):
            0 on tokens that nothing attends to.
        merges (`bool`): Whether tokens that leave are merged into others instead of being dropped.
        generator (`torch.Generator`, *optional*): Source of noise and random partitions.
        track_groups (`bool`): Whether `groups` are followed.

    Attributes:
        tokens: Prefix tokens, then remaining patch tokens in the order of the image; the driver replaces them.
        positions: Patches of the remaining tokens, ascending: `torch.LongTensor` of `(batch_size, num_patch_tokens)`.
        sizes: Where tokens are merged, how many patches each stands for, 0 if nothing attends to it:
            `torch.FloatTensor` of shape `(batch_size, num_tokens)`; else None.
        attention_bias: Where tokens are merged, what is added to the attention scores so that each token counts as
            often as it has patches, to the power of `size_bias`: `torch.FloatTensor` of shape
            `(batch_size, num_tokens)`; None while every token is a patch.
        attention_mask: Where tokens are dropped, what is left of it: shape `(batch_size, num_tokens)`; else None.
        groups: For each patch the remaining one whose token it is part of, -1 if it was dropped: `torch.LongTensor` of
            shape `(batch_size, num_patches)`; None unless tracked.
        kept_masks: After each step but that of [`EMBEDDINGS`], of the shape of `groups`: 1 for each patch whose token
            remains, else 0.
        step_groups: The groups after each step.
    """

    def __init__(
        self,
        tokens: torch.Tensor,
        settings: Any,
        attention_mask: torch.Tensor | None = None,
        *,
        merges: bool = False,
        generator: torch.Generator | None = None,
        track_groups: bool = False,
    ):
        self.tokens, self.settings, self.generator = tokens, settings, generator
        batch_size, num_tokens, _ = tokens.shape
        self.num_prefix_tokens = settings.num_prefix_tokens
        self.num_patches = int(num_tokens) - self.num_prefix_tokens  # sizes are tensors under torch.jit tracing
        self.positions = torch.arange(self.num_patches, device=tokens.device).expand(batch_size, -1)
        self.groups = self.positions if track_groups else None
        self.attention_mask, self.attention_bias, self.sizes = attention_mask, None, None
        self.has_masked_tokens = attention_mask is not None
        if merges and attention_mask is None:
            self.sizes = torch.ones(batch_size, num_tokens, device=tokens.device, dtype=torch.float32)
        elif merges:
            self.attention_mask, self.sizes = None, attention_mask.float()
            self._update_attention_bias()
        self.kept_masks: tuple[torch.Tensor, ...] = ()
        self.step_groups: tuple[torch.Tensor, ...] = ()

    def snapshot(self) -> dict[str, Any]:
        """What [`reduce`] changes, as it is now, to [`restore`] it where a layer is computed twice."""
        return {name: getattr(self, name) for name in CHANGING}

    def restore(self, snapshot: dict[str, Any]) -> None:
        for name, value in snapshot.items():
            setattr(self, name, value)

    @property
    def patch_tokens(self) -> torch.Tensor:
        return self._patches(self.tokens)

    def _patches(self, sequence: torch.Tensor) -> torch.Tensor:
        return sequence[:, self.num_prefix_tokens :]

    def _update_attention_bias(self) -> None:
        """Source: section 3 of arXiv 2210.09461, with 1 as `size_bias`."""
        size_bias = self.settings.size_bias
        if size_bias is None:
            size_bias = SIZE_BIAS[self.settings.token_reduction]
        bias = size_bias * self.sizes.log()
        self.attention_bias = bias.masked_fill(self.sizes == 0, -torch.inf) if self.has_masked_tokens else bias

    def add_noise(self, layer: int, scores: torch.Tensor) -> None:
        """
        Add normal noise to the patch tokens: `noise_std` times 1 less the softmax of their scores, as in the authors'
        code (https://github.com/mx-ethan-rao/tnt/blob/d095619/models.py#L192-L204), or, with the gate `"capacity"`,
        times [`capacity_noise_gate`] at a drawn capacity and the token's own standard deviation.

        Args:
            layer (`int`): The layer after which it is added, from 0. With `noise_one_layer`, that of each image is
                drawn at the first.
            scores (`torch.Tensor` of shape `(batch_size, num_patch_tokens)`): Higher is more relevant.
        """
        settings, patch_tokens = self.settings, self.patch_tokens
        if settings.noise_one_layer and layer == 0:
            drawn = rand(scores.shape[0], self.generator, scores.device)
            self.noised_layers = drawn.mul(settings.num_noise_layers).long()
        if settings.noise_gate == "softmax" or scores.shape[1] == 0:  # after a last layer of prefix tokens alone
            amount = 1 - scores.softmax(dim=-1)
        else:
            low, high = CAPACITY_RANGE
            capacity = low + (high - low) * rand(scores.shape[0], self.generator, scores.device)
            amount = capacity_noise_gate(scores, capacity) * patch_tokens.float().std(dim=-1)
        if settings.noise_one_layer:
            amount = amount * (self.noised_layers == layer).unsqueeze(-1)
        noise = randn_like(patch_tokens, self.generator)
        noise = settings.noise_std * (noise * amount.to(noise.dtype).unsqueeze(-1))
        # widened, as the gradient of a slice of the tokens would be copied
        self.tokens = self.tokens + nn.functional.pad(noise, (0, 0, self.num_prefix_tokens, 0))

    def reduce(self, step: ReductionStep, scores: torch.Tensor | None = None) -> None:
        """
        Shorten the sequence to the prefix tokens and `step.num_kept` patch tokens.

        Args:
            step ([`ReductionStep`]): How many leave.
            scores (`torch.Tensor` of shape `(batch_size, num_patch_tokens)`, *optional*): Higher is more relevant; if
                None, only similarity decides.

        Raises:
            ValueError: If there are other tokens than the step says, or tokens are to be dropped for another reason
                than similarity and there are no scores.
        """
        if self.patch_tokens.shape[1] != step.num_tokens:
            raise ValueError(f"There are {self.patch_tokens.shape[1]} patch tokens where {step} is to be carried out.")
        if scores is None and self.sizes is None and step.num_tokens - step.num_kept > step.num_similar:
            raise ValueError(f"Scores are needed to drop tokens as {step} says.")
        if step.num_kept < step.num_tokens:
            for name in ("positions", "sizes", "attention_mask", "groups"):  # layers may lie on several devices
                value = getattr(self, name)
                setattr(self, name, None if value is None else value.to(self.tokens.device))
            shorten = self._drop if self.sizes is None else self._merge
            # similarities in float32: autocast would round them and leave many of them equal
            with maybe_autocast(self.tokens.device.type, enabled=False):
                shorten(step, scores)
        if step.layer != EMBEDDINGS:
            nothing = self.positions.new_zeros((self.positions.shape[0], self.num_patches))
            self.kept_masks += (nothing.scatter(1, self.positions, 1),)
        if self.groups is not None:
            self.step_groups += (self.groups,)

    def _drop(self, step: ReductionStep, scores: torch.Tensor | None) -> None:
        """The most relevant tokens are selected; of these, similar ones are dropped."""
        is_masked = None if self.attention_mask is None else self._patches(self.attention_mask) == 0
        kept = torch.arange(step.num_tokens, device=self.tokens.device).expand(self.tokens.shape[0], -1)
        if scores is not None:
            if is_masked is not None:
                scores = scores.masked_fill(is_masked, -torch.inf)
            # a random partition is laid over the tokens in the order of relevance, as in the authors' code
            is_random = self.settings.similarity_partition == "random"
            kept = scores.topk(step.num_kept + step.num_similar, dim=-1, sorted=is_random).indices
            if step.num_similar > 0 and not is_random:
                kept = kept.sort(dim=-1).values
        if step.num_similar > 0:
            matching = match_similar(
                take_tokens(self.patch_tokens, kept),
                step.num_similar,
                self._partition(kept.shape[1]),
                None if is_masked is None else is_masked.gather(1, kept),
            )
            kept = kept.gather(1, matching.left)
        kept = kept.sort(dim=-1).values
        prefix = torch.arange(self.num_prefix_tokens, device=kept.device).expand(kept.shape[0], -1)
        places = torch.cat((prefix, kept + self.num_prefix_tokens), dim=1)
        self.tokens = take_tokens(self.tokens, places)
        self.attention_mask = None if self.attention_mask is None else self.attention_mask.gather(1, places)
        self._keep_positions(kept)

    def _merge(self, step: ReductionStep, scores: torch.Tensor | None) -> None:
        """Scores hold tokens back, but for the last `step.num_similar`."""
        penalty, is_clustering = None, self.settings.token_reduction == "cluster"
        if scores is not None:
            penalty = self.settings.relevance_weight * standardize(scores, self._patches(self.sizes) > 0)
            penalty = nn.functional.pad(penalty, (self.num_prefix_tokens, 0))
        for num_tokens, num_leaving, is_held_back in merge_rounds(step):
            metric = self.tokens.float()
            lengths = norms(metric)
            matching = match_similar(
                metric,
                num_leaving,
                self._partition(num_tokens),
                self.sizes == 0 if self.has_masked_tokens else None,
                penalty if is_held_back else None,
                self.sizes if is_clustering else None,
                self.num_prefix_tokens,
                lengths,
            )
            self.tokens, self.sizes = merge(self.tokens, self.sizes, matching, lengths if is_clustering else None)
            self._keep_positions(self._patches(matching.left) - self.num_prefix_tokens, matching)
            penalty = None if penalty is None else penalty.gather(1, matching.left)
        self._update_attention_bias()

    def _partition(self, num_tokens: int) -> torch.Tensor | None:
        is_random = self.settings.similarity_partition == "random"
        return random_partition(num_tokens, self.generator, self.tokens.device) if is_random else None

    def _keep_positions(self, kept: torch.Tensor, matching: Matching | None = None) -> None:
        """Follow the patches when of all tokens those at `kept` are left, and others joined them."""
        before, self.positions = self.positions, self.positions.gather(1, kept)
        if self.groups is None:
            return
        heirs = torch.full_like(self.groups, -1).scatter(1, self.positions, self.positions)
        if matching is not None:
            partners = matching.partners - self.num_prefix_tokens
            leaving = matching.leaving - self.num_prefix_tokens
            heirs = heirs.scatter(1, before.gather(1, leaving), before.gather(1, partners))
        self.groups = torch.where(self.groups < 0, -1, heirs.gather(1, self.groups.clamp(min=0)))


def reduction_cost(step: ReductionStep, settings: Any) -> int:
    """
    Multiply-accumulates of a step in a model of a config, as [`TokenState`] carries it out: scores, similarity
    products and means of merged tokens.
    """
    hidden_size = settings.hidden_size
    num_scored = step.num_tokens + settings.num_prefix_tokens if step.uses_scores and settings.uses_scores else 0
    total = num_scored * hidden_size
    if not settings.merges:
        num_compared = step.num_kept + step.num_similar if step.num_similar > 0 else 0
        return total + num_compared // 2 * (num_compared - num_compared // 2) * hidden_size
    for num_tokens, num_leaving, _ in merge_rounds(step):
        num_candidates = num_tokens // 2
        total += num_candidates * (num_tokens - num_candidates) * hidden_size + num_leaving**2 * hidden_size
    return total
