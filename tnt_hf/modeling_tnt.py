"""
ViT and distilled DeiT with Training Noise Token (TNT) pruning (arXiv 2411.18092).

In training, noise is added to the patch tokens after the first layers, less to the tokens that a scoring head holds
relevant; on frozen weights the classification loss then teaches the heads relevance. At inference, the least relevant
tokens are dropped after the layers that the config names, whatever the budget was in training.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.deit.modeling_deit import (
    DeiTAttention,
    DeiTForImageClassificationWithTeacher,
    DeiTLayer,
    DeiTModel,
    DeiTPreTrainedModel,
)
from transformers.models.vit.modeling_vit import (
    ViTAttention,
    ViTForImageClassification,
    ViTLayer,
    ViTModel,
    ViTPreTrainedModel,
    eager_attention_forward,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, logging
from transformers.utils.generic import can_return_tuple, maybe_autocast, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_tnt import Schedule, TntDeiTConfig, TntViTConfig, schedule_for


logger = logging.get_logger(__name__)

# As in https://github.com/mx-ethan-rao/tnt/blob/d095619/models.py, whose norm_layer is LayerNorm with this eps.
ALPHA_NORM_EPS = 1e-6
# The share of an image's tokens that the capacity gate spares is drawn from this range: budgets of the pruned model.
# Its slope is for one standard deviation of the scores.
CAPACITY_RANGE = (0.15, 0.9)
CAPACITY_GATE_SLOPE = 4.0
# Merged tokens weigh in attention by a bias on the scores, which other implementations do not take.
MERGING_ATTENTION = ("sdpa", "eager")


def draw_partition(
    num_tokens: int, generator: torch.Generator | None = None, device: torch.device | None = None
) -> torch.Tensor:
    """A random permutation of `num_tokens` token positions, shape `(num_tokens,)`, one for the whole batch."""
    return torch.randperm(num_tokens, generator=generator, device=generator.device if generator else device).to(device)


def draw_noise(tokens: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Standard normal noise of the shape, dtype and device of `tokens`."""
    device = generator.device if generator else tokens.device
    return torch.randn(tokens.shape, generator=generator, dtype=tokens.dtype, device=device).to(tokens.device)


def _draw_uniform(num_draws: int, generator: torch.Generator | None, device: torch.device) -> torch.Tensor:
    drawn_on = generator.device if generator else device
    return torch.rand(num_draws, generator=generator, device=drawn_on).to(device)


def partition_positions(
    num_tokens: int, similarity_partition: str, generator: torch.Generator | None, device: torch.device
) -> torch.Tensor:
    """
    The permutation of token positions, shape `(num_tokens,)`, whose first half the similarity step may drop from:
    `1, 3, 5, ...` then `0, 2, 4, ...` if `"strided"`, drawn if `"random"`.
    """
    if similarity_partition == "random":
        return draw_partition(num_tokens, generator, device)
    positions = torch.arange(num_tokens, device=device)
    return torch.cat((positions[1::2], positions[::2]))


def softmax_irrelevance(scores: torch.Tensor) -> torch.Tensor:
    """
    1 less the softmax of the scores over the patch tokens, both of shape `(batch_size, num_patch_tokens)`.

    Source: https://github.com/mx-ethan-rao/tnt/blob/d095619/models.py#L192-L204.
    """
    return 1 - scores.softmax(dim=-1)


def standardize(scores: torch.Tensor, is_counted: torch.Tensor) -> torch.Tensor:
    """
    Scores of each image at mean 0 and standard deviation 1; both arguments have shape `(batch_size, num_tokens)`, and
    the tokens that do not count have no influence.
    """
    weights = is_counted / is_counted.sum(dim=-1, keepdim=True).clamp(min=1)
    deviation = scores - (weights * scores).sum(dim=-1, keepdim=True)
    return deviation / (weights * deviation.square()).sum(dim=-1, keepdim=True).sqrt().clamp(min=1e-6)


def capacity_irrelevance(scores: torch.Tensor, capacity: torch.Tensor) -> torch.Tensor:
    """
    From 0 to 1 and 1/2 at the score that parts the most relevant share of an image's tokens from the rest.

    Args:
        scores (`torch.Tensor` of shape `(batch_size, num_patch_tokens)`): Higher is more relevant.
        capacity (`torch.Tensor` of shape `(batch_size,)`): That share of each image, from 0 to below 1.

    Returns:
        `torch.Tensor` of shape `(batch_size, num_patch_tokens)`.
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
    first_rows = torch.arange(batch_size, device=tokens.device).unsqueeze(-1) * num_tokens
    rows = tokens.reshape(-1, hidden_size).index_select(0, (first_rows + positions).flatten())
    return rows.view(batch_size, positions.shape[1], hidden_size)


def select_dissimilar(
    tokens: torch.Tensor, num_dropped: int, partition: torch.Tensor, is_masked: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Positions of the tokens that remain when those most similar to another token are dropped.

    The first half of the partition (rounded down) is compared with the second: the `num_dropped` tokens of the first
    half with the highest cosine similarity to their nearest token of the second half are dropped.

    Args:
        tokens (`torch.Tensor` of shape `(batch_size, num_tokens, hidden_size)`): Tokens to thin out.
        num_dropped (`int`): Number of tokens to drop, at most `num_tokens // 2`.
        partition (`torch.Tensor` of shape `(num_tokens,)`): A permutation of the positions.
        is_masked (`torch.BoolTensor` of shape `(batch_size, num_tokens)`, *optional*):
            Tokens that nothing attends to: the first to be dropped, and no token is similar to them.

    Returns:
        `torch.LongTensor` of shape `(batch_size, num_tokens - num_dropped)`, in no fixed order.

    Source: https://github.com/mx-ethan-rao/tnt/blob/d095619/models.py#L21-L75.
    """
    batch_size, num_tokens, _ = tokens.shape
    candidates, references = partition[: num_tokens // 2], partition[num_tokens // 2 :]
    unit_tokens = nn.functional.normalize(tokens.float(), dim=-1)
    similarity = unit_tokens[:, candidates] @ unit_tokens[:, references].transpose(1, 2)
    if is_masked is not None:
        similarity = similarity.masked_fill(is_masked[:, None, references], -torch.inf)
        similarity = similarity.masked_fill(is_masked[:, candidates, None], torch.inf)
    nearest_similarity = similarity.amax(dim=-1)
    num_kept = candidates.shape[0] - num_dropped
    kept = nearest_similarity.topk(num_kept, dim=-1, largest=False, sorted=False).indices
    return torch.cat((candidates[kept], references.expand(batch_size, -1)), dim=1)


def merge_similar(
    tokens: torch.Tensor,
    sizes: torch.Tensor,
    num_merged: int,
    partition: torch.Tensor,
    resistance: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Merge tokens into the token that each is most similar to, by the mean over the patches they stand for.

    The first half of the partition (rounded down) is compared with the second: the `num_merged` tokens of the first
    half with the highest cosine similarity to their nearest token of the second half, less their resistance, join it.

    Args:
        tokens (`torch.Tensor` of shape `(batch_size, num_tokens, hidden_size)`): Tokens to merge.
        sizes (`torch.Tensor` of shape `(batch_size, num_tokens)`):
            Number of patches that each token stands for; 0 for tokens that nothing attends to, which merge first and
            leave no trace.
        num_merged (`int`): Number of tokens to merge into others, at most `num_tokens // 2`.
        partition (`torch.Tensor` of shape `(num_tokens,)`): A permutation of the positions.
        resistance (`torch.Tensor` of shape `(batch_size, num_tokens)`, *optional*): Subtracted from the similarity.

    Returns:
        Remaining tokens of shape `(batch_size, num_tokens - num_merged, hidden_size)`, their sizes of shape
        `(batch_size, num_tokens - num_merged)` and their positions before the merge of that shape, ascending.

    Source: bipartite soft matching, section 3 of arXiv 2210.09461, without its distinction of attention keys.
    """
    batch_size, num_tokens, _ = tokens.shape
    candidates, references = partition[: num_tokens // 2], partition[num_tokens // 2 :]
    unit_tokens = nn.functional.normalize(tokens.float(), dim=-1)
    similarity = unit_tokens[:, candidates] @ unit_tokens[:, references].transpose(1, 2)
    similarity = similarity.masked_fill(sizes[:, None, references] == 0, -torch.inf)
    nearest_similarity, nearest = similarity.max(dim=-1)
    willingness = nearest_similarity if resistance is None else nearest_similarity - resistance[:, candidates]
    willingness = willingness.masked_fill(sizes[:, candidates] == 0, torch.inf)
    order = willingness.argsort(dim=-1, descending=True)
    merged, remaining = order[:, :num_merged], candidates[order[:, num_merged:]]

    leaving = candidates[merged]
    references = references.expand(batch_size, -1)
    is_joined = (
        nearest.gather(1, merged).unsqueeze(1) == torch.arange(references.shape[1], device=tokens.device)[:, None]
    )
    share = is_joined * sizes.gather(1, leaving).unsqueeze(1)
    reference_sizes = sizes.gather(1, references)
    joined_sizes = reference_sizes + share.sum(dim=-1)
    sums = take_tokens(tokens, references).float() * reference_sizes.unsqueeze(-1)
    sums = sums + share @ take_tokens(tokens, leaving).float()
    joined = (sums / joined_sizes.clamp(min=1).unsqueeze(-1)).to(tokens.dtype)

    positions, order = torch.cat((remaining, references), dim=1).sort(dim=-1)
    tokens = torch.cat((take_tokens(tokens, remaining), joined), dim=1)
    sizes = torch.cat((sizes.gather(1, remaining), joined_sizes), dim=1)
    return take_tokens(tokens, order), sizes.gather(1, order), positions


def select_tokens(
    patch_tokens: torch.Tensor,
    scores: torch.Tensor | None,
    num_kept: int,
    num_similar_tokens: int,
    similarity_partition: str,
    generator: torch.Generator | None = None,
    is_masked: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Positions of the `num_kept` patch tokens that survive where tokens are dropped.

    The `num_kept + num_similar_tokens` tokens of highest score are selected, all tokens if there are no scores;
    `num_similar_tokens` of them are then dropped by [`select_dissimilar`]. A strided partition is laid over them in
    the order of the image, a random one in the order of relevance, as in the authors' code.

    Args:
        patch_tokens (`torch.Tensor` of shape `(batch_size, num_patch_tokens, hidden_size)`): Tokens to select from.
        scores (`torch.Tensor` of shape `(batch_size, num_patch_tokens)`, *optional*): Higher is more relevant.
        num_kept (`int`): Number of tokens that survive.
        num_similar_tokens (`int`): Number of selected tokens dropped for similarity.
        similarity_partition (`str`): `"strided"` or `"random"`.
        generator (`torch.Generator`, *optional*): Source of the random partition.
        is_masked (`torch.BoolTensor` of shape `(batch_size, num_patch_tokens)`, *optional*): Tokens that rank last.

    Returns:
        `torch.LongTensor` of shape `(batch_size, num_kept)`, ascending.
    """
    if scores is None:
        positions = torch.arange(patch_tokens.shape[1], device=patch_tokens.device).expand(patch_tokens.shape[0], -1)
    else:
        if is_masked is not None:
            scores = scores.masked_fill(is_masked, -torch.inf)
        is_ordered = similarity_partition == "random"
        positions = scores.topk(num_kept + num_similar_tokens, dim=-1, sorted=is_ordered).indices
    if num_similar_tokens > 0:
        if similarity_partition == "strided":
            positions = positions.sort(dim=-1).values
        selected = take_tokens(patch_tokens, positions)
        partition = partition_positions(positions.shape[1], similarity_partition, generator, positions.device)
        selected_is_masked = None if is_masked is None else is_masked.gather(1, positions)
        dissimilar = select_dissimilar(selected, num_similar_tokens, partition, selected_is_masked)
        positions = positions.gather(1, dissimilar)
    return positions.sort(dim=-1).values


def merge_tokens(
    patch_tokens: torch.Tensor,
    sizes: torch.Tensor,
    resistance: torch.Tensor | None,
    num_kept: int,
    num_similar_tokens: int,
    similarity_partition: str,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Shorten to `num_kept` patch tokens by rounds of [`merge_similar`], each of at most half of the tokens.

    The last `num_similar_tokens` that leave, all if there is no resistance, are chosen by similarity alone.

    Args:
        patch_tokens (`torch.Tensor` of shape `(batch_size, num_patch_tokens, hidden_size)`): Tokens to merge.
        sizes (`torch.Tensor` of shape `(batch_size, num_patch_tokens)`): Number of patches in each token.
        resistance (`torch.Tensor` of shape `(batch_size, num_patch_tokens)`, *optional*): Subtracted from similarity.
        num_kept (`int`): Number of tokens that remain.
        num_similar_tokens (`int`): Number of tokens that leave without regard to their resistance.
        similarity_partition (`str`): `"strided"` or `"random"`.
        generator (`torch.Generator`, *optional*): Source of the random partitions.

    Returns:
        As [`merge_similar`], with `num_kept` tokens and their positions among `patch_tokens`.
    """
    num_tokens = patch_tokens.shape[1]
    positions = torch.arange(num_tokens, device=patch_tokens.device).expand(patch_tokens.shape[0], -1)
    num_resisting = num_tokens if resistance is None else num_kept + num_similar_tokens
    for num_remaining, is_resisting in ((num_resisting, True), (num_kept, False)):
        while num_tokens > num_remaining:
            num_merged = min(num_tokens - num_remaining, num_tokens // 2)
            partition = partition_positions(num_tokens, similarity_partition, generator, patch_tokens.device)
            round_resistance = resistance.gather(1, positions) if is_resisting else None
            patch_tokens, sizes, remaining = merge_similar(
                patch_tokens, sizes, num_merged, partition, round_resistance
            )
            positions = positions.gather(1, remaining)
            num_tokens = num_tokens - num_merged
    return patch_tokens, sizes, positions


@dataclass
class KeptPatches:
    """
    What the outputs share: which patches survive each pruned layer.

    Args:
        kept_mask (`torch.LongTensor` of shape `(batch_size, num_pruned_layers, num_patches)`, *optional*):
            For each of `config.prune_layers`, 1 for the patches that survive it, row-major on the grid of the image,
            and 0 for the others. None without pruning and where noise is added.
    """

    kept_mask: torch.Tensor | None = None

    @property
    def kept_indices(self) -> tuple[torch.Tensor, ...] | None:
        """For each pruned layer the surviving patches, ascending: `torch.LongTensor`s of `(batch_size, num_kept)`."""
        if self.kept_mask is None:
            return None
        return tuple(mask.nonzero()[:, 1].view(mask.shape[0], -1) for mask in self.kept_mask.unbind(dim=1))


@dataclass
class TntModelOutput(KeptPatches, BaseModelOutputWithPooling):
    """
    Output of the TNT backbones.

    Args:
        last_hidden_state (`torch.Tensor` of shape `(batch_size, num_remaining_tokens, hidden_size)`):
            Prefix tokens and remaining patch tokens after the last layer and the final LayerNorm; with `prefix_only`
            the prefix tokens alone.
        pooler_output (`torch.Tensor` of shape `(batch_size, pooler_output_size)`, *optional*):
            The pooled [CLS] token, if the model has a pooler.
        hidden_states (`tuple[torch.Tensor]`, *optional*):
            Input of the first layer and output of each layer before noise or pruning is applied to it, each of shape
            `(batch_size, num_tokens_there, hidden_size)`: the sequence shortens after a pruned layer.
        attentions (`tuple[torch.Tensor]`, *optional*):
            Attention weights of each layer, `(batch_size, num_heads, num_tokens_there, num_tokens_there)`. Needs
            `attn_implementation="eager"`.
        kept_mask (`torch.LongTensor` of shape `(batch_size, num_pruned_layers, num_patches)`, *optional*):
            Which patches survive each pruned layer; [`KeptPatches`] also has them as `kept_indices`.
    """


@dataclass
class TntImageClassifierOutput(KeptPatches, ImageClassifierOutput):
    """
    Output of [`TntViTForImageClassification`]: `loss`, `logits` of shape `(batch_size, num_labels)`, and
    `hidden_states`, `attentions`, `kept_mask` as in [`TntModelOutput`].
    """


@dataclass
class TntDeiTImageClassifierOutput(KeptPatches, ImageClassifierOutput):
    """
    Output of [`TntDeiTForImageClassification`]: `loss`, `logits` (mean of the two heads), `cls_logits` and
    `distillation_logits`, each of shape `(batch_size, num_labels)`, and `hidden_states`, `attentions`, `kept_mask`
    as in [`TntModelOutput`].
    """

    cls_logits: torch.Tensor | None = None
    distillation_logits: torch.Tensor | None = None


def _legacy_key_renames() -> list[WeightRenaming]:
    """Names of ViT and DeiT tensors on the Hub -> names in Transformers >= 5.9, as for the plain models."""
    renames = {
        r"encoder\.layer\.": "layers.",
        r"attention\.attention\.query": "attention.q_proj",
        r"attention\.attention\.key": "attention.k_proj",
        r"attention\.attention\.value": "attention.v_proj",
        r"attention\.output\.dense": "attention.o_proj",
        r"intermediate\.dense": "mlp.fc1",
        r"output\.dense": "mlp.fc2",
    }
    return [WeightRenaming(source, target) for source, target in renames.items()]


class TokenPruningMixin:
    """
    What every TNT model adds to `PreTrainedModel`: a schedule that can be changed, a backbone that can be frozen,
    loading that refuses a backbone left at random and saving under the names of `state_dict()`.
    """

    accepts_loss_kwargs = False  # the loss is a plain mean; Trainer then divides by its accumulation steps
    _keep_in_fp32_modules = ["alpha_heads"]  # quantisers leave out what is named here
    _may_start_untrained = {
        "alpha_heads",
        "alpha_norm",
        "classifier",
        "cls_classifier",
        "distillation_classifier",
        "mask_token",
        "pooler",
    }

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        # Transformers renames the tensors of legacy checkpoints by class name, and for custom classes only if they are
        # registered; without this a public checkpoint would load with a random backbone. Transformers 5.9 looks for
        # the names of a backbone's own checkpoint, which lack its prefix, only under the class that is loaded.
        register_checkpoint_conversion_mapping(cls.__name__, _legacy_key_renames(), overwrite=True)

    def _own_config(self) -> None:
        """Give the model and its parts one config of their own: its budget is not that of another model."""
        config = copy.deepcopy(self.config)
        for module in self.modules():
            if isinstance(getattr(module, "config", None), type(config)):
                module.config = config

    @property
    def adds_noise(self) -> bool:
        """Whether a forward pass adds noise instead of pruning: in training mode, in steps that compute gradients."""
        return self.training and torch.is_grad_enabled()

    def set_schedule(
        self,
        prune_layers: list[int],
        keep_rates: list[float],
        num_similar_tokens: int = 0,
        selection: str = "relevance",
    ) -> None:
        """
        Change the compute budget of the model; see [`TokenPruningFields`] for the arguments.

        The schedule is a part of the model's config, so threads that need different budgets at the same time need a
        `copy.deepcopy` of the model each.

        Raises:
            ValueError: If the schedule is not possible; the previous one then stays in place.
        """
        self.config.set_schedule(prune_layers, keep_rates, num_similar_tokens, selection)
        num_learning = self.config.num_learning_layers
        if selection == "relevance" and any(layer >= num_learning for layer in self.config.prune_layers):
            logger.warning_once(
                f"`prune_layers` {self.config.prune_layers} use scoring heads that training does not reach: with this "
                f"config the heads of the first {num_learning} layers learn (`num_noise_layers`)."
            )

    def set_budget(
        self,
        *,
        gflops: float | None = None,
        speedup: float | None = None,
        style: str | None = None,
        cost: Callable[[TntViTConfig | TntDeiTConfig], float] | None = None,
    ) -> Schedule:
        """
        Set the schedule that meets a budget by at most 1 %, ranked by relevance; see [`schedule_for`].

        Args:
            gflops (`float`, *optional*): 1e9 multiply-accumulates for one image, as published figures are counted.
            speedup (`float`, *optional*): Cost of this model unpruned divided by that of the schedule.
            style (`str`, *optional*):
                `"single"`, `"multi"` or `"gradual"`; by default `"gradual"` where tokens are merged, else `"single"`.
            cost (`Callable`, *optional*):
                For `speedup`, what a config costs, such as [`~tnt_hf.throughput.MeasuredCost`] of this device;
                multiply-accumulates if None.

        Returns:
            [`Schedule`]: The schedule that was set.

        Raises:
            ValueError: If the budget cannot be met; the message names the range that can be reached.

        Example:

        ```python
        >>> model.set_budget(gflops=12.3)  # DeiT-B: prune_layers=[2], keep_rates=[0.6], num_similar_tokens=25
        ```
        """
        schedule = schedule_for(self.config, gflops=gflops, speedup=speedup, style=style, cost=cost)
        self.set_schedule(**schedule.settings)
        return schedule

    def freeze_backbone(self) -> None:
        """
        Leave only the scoring heads trainable that can receive a gradient.

        These are the heads of the noised layers. Noise after the last layer no longer reaches a prefix token, so the
        head of that layer stays frozen.

        Raises:
            ValueError: If no head could learn with this config.
        """
        learning_heads = self._learning_heads()
        if len(learning_heads) == 0:
            raise ValueError(
                "No scoring head can learn: `num_noise_layers` and `noise_std` must be above 0 and the model must "
                f"have at least 2 layers, got num_noise_layers={self.config.num_noise_layers}, "
                f"noise_std={self.config.noise_std}, num_hidden_layers={self.config.num_hidden_layers}."
            )
        self.requires_grad_(False)
        learning_heads.requires_grad_(True)

    def freeze_idle_heads(self) -> None:
        """Freeze what no gradient reaches, so that all weights can train without `find_unused_parameters`."""
        self.base_model.alpha_heads.requires_grad_(False)
        self._learning_heads().requires_grad_(True)
        if self.config.num_noise_layers == 0 and self.base_model.alpha_norm is not None:
            self.base_model.alpha_norm.requires_grad_(False)
        if not getattr(self.config, "distillation_head_in_loss", True):
            self.distillation_classifier.requires_grad_(False)

    def _learning_heads(self) -> nn.ModuleList:
        return self.base_model.alpha_heads[: self.config.num_learning_layers]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike,
        *args: Any,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """
        As `PreTrainedModel.from_pretrained`, for checkpoints of the plain model and of the TNT model.

        Raises:
            ValueError: If a backbone tensor is missing from the checkpoint or has another shape there.
        """
        config = kwargs.get("config")
        if getattr(config, "model_type", None) == cls.config_class.plain_model_type:
            kwargs["config"] = cls.config_class(**config.to_dict())
        model, loading_info = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        untrained = set(loading_info["missing_keys"]) | {key for key, *_ in loading_info["mismatched_keys"]}
        random_backbone = sorted(key for key in untrained if not set(key.split(".")) & cls._may_start_untrained)
        if random_backbone:
            raise ValueError(
                f"{pretrained_model_name_or_path} does not hold the whole backbone of {cls.__name__}: "
                f"{len(random_backbone)} tensors would be random, such as {', '.join(random_backbone[:3])}. Expected "
                f"is a checkpoint of '{model.config.plain_model_type}' or '{model.config.model_type}'."
            )
        unscored = [
            layer
            for layer in model.config.prune_layers
            if any(key.endswith(f"alpha_heads.{layer}.weight") for key in untrained)
        ]
        if unscored:
            logger.warning(
                f"The scoring heads of `prune_layers` {unscored} are not in {pretrained_model_name_or_path} and start "
                "at random: train them before relying on the pruned model."
            )
        return (model, loading_info) if output_loading_info else model

    def save_pretrained(
        self, save_directory: str | PathLike, *args: Any, save_original_format: bool = False, **kwargs: Any
    ) -> None:
        """As `PreTrainedModel.save_pretrained`, under the names of `state_dict()`, which Trainer needs to resume."""
        is_defined_here = type(self).__module__ == __name__  # whose file Transformers saves with the model
        self.config.auto_map = dict(AUTO_MAPS[self.config.model_type]) if is_defined_here else {}
        return super().save_pretrained(save_directory, *args, save_original_format=save_original_format, **kwargs)


class TntViTPreTrainedModel(TokenPruningMixin, ViTPreTrainedModel):
    config: TntViTConfig
    config_class = TntViTConfig
    _no_split_modules = [*ViTPreTrainedModel._no_split_modules, "TntViTLastLayer"]


class TntDeiTPreTrainedModel(TokenPruningMixin, DeiTPreTrainedModel):
    config: TntDeiTConfig
    config_class = TntDeiTConfig
    _no_split_modules = [*DeiTPreTrainedModel._no_split_modules, "TntDeiTLastLayer"]


class ScoringHead(nn.Linear):
    """
    A linear head that scores in float32, whatever its own precision: half precision leaves many scores equal.
    """

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(batch_size, num_tokens, hidden_size)` -> float32 of shape `(batch_size, num_tokens, 1)`."""
        bias = None if self.bias is None else self.bias.float()
        with maybe_autocast(tokens.device.type, enabled=False):
            return nn.functional.linear(tokens.float(), self.weight.float(), bias)


class LastAttentionMixin:
    """Attention whose queries may be those of the first tokens alone; keys and values are those of all tokens."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        num_output_tokens: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if num_output_tokens is None:
            return super().forward(hidden_states, attention_mask, **kwargs)
        query, key, value = (
            projection(tokens).view(*tokens.shape[:2], -1, self.head_dim).transpose(1, 2)
            for projection, tokens in (
                (self.q_proj, hidden_states[:, :num_output_tokens]),
                (self.k_proj, hidden_states),
                (self.v_proj, hidden_states),
            )
        )
        if attention_mask is not None and attention_mask.shape[2] > 1:
            attention_mask = attention_mask[:, :, :num_output_tokens]
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attended, weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        # not `flatten(2)`, which older ONNX exporters turn into a reshape to the batch size of the example
        return self.o_proj(attended.reshape(*hidden_states.shape[:1], num_output_tokens, -1)), weights


class TntViTLastAttention(LastAttentionMixin, ViTAttention):
    """[`ViTAttention`] with queries of the first tokens alone, if asked for."""


class TntDeiTLastAttention(LastAttentionMixin, DeiTAttention):
    """[`DeiTAttention`] with queries of the first tokens alone, if asked for."""


class LastLayerMixin:
    """
    A layer that can leave out the output of the patch tokens, which no classifier reads after the last layer.

    Their keys and values are still computed, their queries, output projection and MLP are not. Exact: the output of
    the prefix tokens is that of the whole layer, to rounding.
    """

    attention_class: type[nn.Module]

    def __init__(self, config: TntViTConfig | TntDeiTConfig):
        super().__init__(config)
        self.attention = self.attention_class(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        num_output_tokens: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, num_tokens, hidden_size)`): All tokens.
            attention_mask (`torch.Tensor` of shape `(batch_size, 1, num_tokens, num_tokens)`, *optional*):
                As for the plain layer.
            num_output_tokens (`int`, *optional*): Number of first tokens to compute; all if None.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_output_tokens, hidden_size)`.
        """
        if num_output_tokens is None:
            return super().forward(hidden_states, attention_mask, **kwargs)
        attended, _ = self.attention(
            self.layernorm_before(hidden_states), attention_mask, num_output_tokens=num_output_tokens, **kwargs
        )
        hidden_states = hidden_states[:, :num_output_tokens] + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.layernorm_after(hidden_states)))


class TntViTLastLayer(LastLayerMixin, ViTLayer):
    """[`ViTLayer`] that can compute the prefix tokens alone."""

    attention_class = TntViTLastAttention


class TntDeiTLastLayer(LastLayerMixin, DeiTLayer):
    """[`DeiTLayer`] that can compute the prefix tokens alone."""

    attention_class = TntDeiTLastAttention


class TokenPruningBackboneMixin:
    """
    The layer loop of both backbones: noise in training, selection at inference.

    It replaces the forward pass of the plain backbone, whose embeddings, layers, final LayerNorm and pooler it uses.
    """

    last_layer_class: type[nn.Module]

    def __init__(
        self, config: TntViTConfig | TntDeiTConfig, add_pooling_layer: bool = True, use_mask_token: bool = False
    ):
        super().__init__(config, add_pooling_layer=add_pooling_layer, use_mask_token=use_mask_token)
        self.layers[-1] = self.last_layer_class(config)
        self.alpha_heads = nn.ModuleList([ScoringHead(config.hidden_size, 1) for _ in range(config.num_hidden_layers)])
        self.alpha_norm = nn.LayerNorm(config.hidden_size, eps=ALPHA_NORM_EPS) if config.noise_layer_norm else None
        self._own_config()
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        prefix_only: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TntModelOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): Images.
            bool_masked_pos (`torch.BoolTensor` of shape `(batch_size, num_patches)`, *optional*):
                Patches replaced by the mask token, if the model has one.
            interpolate_pos_encoding (`bool`, *optional*):
                Whether to interpolate the position embeddings to images of another size.
            attention_mask (`torch.Tensor` of shape `(batch_size, num_prefix_tokens + num_patches)`, *optional*):
                0 on tokens that are not to be attended to; such patch tokens are also the first to be dropped.
            generator (`torch.Generator`, *optional*):
                Source of the training noise and of `"random"` settings; the global one if None.
            prefix_only (`bool`, *optional*, defaults to `False`):
                Whether the last layer may leave out the patch tokens, as classifiers do. Without effect if hidden
                states or attentions are asked for, tokens are dropped after the last layer, or the attention mask has
                no dimension of queries (flex attention; flash attention with masked tokens).

        Raises:
            ValueError: If the images have another size and `interpolate_pos_encoding` is not set, or the schedule
                cannot be carried out at their number of patches.
        """
        pixel_values = pixel_values.to(self.embeddings.patch_embeddings.projection.weight.dtype)
        hidden_states = self.embeddings(
            pixel_values, bool_masked_pos=bool_masked_pos, interpolate_pos_encoding=interpolate_pos_encoding
        )
        if self.adds_noise:
            prune_layers, num_noise_layers = [], self.config.num_noise_layers
        else:
            prune_layers, num_noise_layers = self.config.prune_layers, 0
        if prune_layers and attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(
                "`attention_mask` must have shape (batch_size, num_prefix_tokens + num_patches) when tokens are "
                f"pruned, got {tuple(attention_mask.shape)}."
            )

        batch_size, num_tokens, _ = hidden_states.shape
        num_patches = int(num_tokens) - self.config.num_prefix_tokens  # sizes are tensors under torch.jit tracing
        token_counts = self.config.patch_token_counts(num_patches) if prune_layers else []
        num_similar_tokens = self.config.similar_token_count(num_patches)
        # sequence positions before pruning of the remaining tokens, prefix tokens included
        token_indices = torch.arange(num_tokens, device=hidden_states.device).expand(batch_size, -1)
        kept_positions = []
        is_merging = bool(prune_layers) and self.config.token_reduction == "merge"
        if is_merging:
            attention_mask = self._token_sizes(token_indices, attention_mask)

        if len(prune_layers) > 1 and num_similar_tokens > 0:
            hidden_states, attention_mask, token_indices = self._reduce(
                token_counts[0], num_similar_tokens, None, generator, hidden_states, attention_mask, token_indices
            )

        noised_layers = None
        if num_noise_layers > 0 and self.config.noise_one_layer:
            noised_layers = _draw_uniform(batch_size, generator, hidden_states.device).mul(num_noise_layers).long()

        layer_mask = self._layer_mask(hidden_states, attention_mask, is_merging)
        last_index = len(self.layers) - 1
        prefix_only = prefix_only and last_index not in prune_layers and not self._is_recording(kwargs)
        for index, layer in enumerate(self.layers):
            if index == last_index and prefix_only and _is_sliceable(layer_mask):
                kwargs["num_output_tokens"] = self.config.num_prefix_tokens
            hidden_states = layer(hidden_states, layer_mask, **kwargs)

            if index < num_noise_layers:
                is_noised = None if noised_layers is None else noised_layers == index
                hidden_states = self._add_noise(index, hidden_states, is_noised, generator)

            if index in prune_layers:
                if token_counts[index + 1] < token_counts[index]:
                    hidden_states, attention_mask, token_indices = self._reduce(
                        token_counts[index + 1],
                        num_similar_tokens if len(prune_layers) == 1 else 0,
                        self._selection_scores(index, hidden_states, generator),
                        generator,
                        hidden_states,
                        attention_mask,
                        token_indices,
                    )
                    layer_mask = self._layer_mask(hidden_states, attention_mask, is_merging)
                kept_positions.append(self._patch_tokens(token_indices) - self.config.num_prefix_tokens)

        sequence_output = self.layernorm(hidden_states)
        return TntModelOutput(
            last_hidden_state=sequence_output,
            pooler_output=self.pooler(sequence_output) if self.pooler is not None else None,
            kept_mask=_kept_mask(kept_positions, num_patches) if kept_positions else None,
        )

    def _is_recording(self, kwargs: dict[str, Any]) -> bool:
        names = ("output_hidden_states", "output_attentions")
        return any(kwargs.get(name, getattr(self.config, name, False)) for name in names)

    def _patch_tokens(self, sequence: torch.Tensor) -> torch.Tensor:
        return sequence[:, self.config.num_prefix_tokens :]

    def _token_sizes(self, token_indices: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """
        Number of patches that each token stands for before any merge, 0 for masked tokens: shape `(batch_size,
        num_tokens)`, float32. Takes the place of the attention mask.
        """
        if self.config._attn_implementation not in MERGING_ATTENTION:
            raise ValueError(
                f"`attn_implementation` must be one of {', '.join(MERGING_ATTENTION)} with `token_reduction` 'merge', "
                f"which adds to the attention scores, got {self.config._attn_implementation!r}."
            )
        return (torch.ones_like(token_indices) if attention_mask is None else attention_mask).float()

    def _layer_mask(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, is_merging: bool
    ) -> torch.Tensor | None:
        """What the layers get as attention mask; where tokens are merged, the logarithm of their sizes."""
        if is_merging:
            return attention_mask.log().to(hidden_states.dtype)[:, None, None, :]
        return create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask
        )

    def _is_masked(self, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
        return None if attention_mask is None else self._patch_tokens(attention_mask) == 0

    def relevance_scores(self, index: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        Scores of the patch tokens after a layer, higher for the more relevant.

        Args:
            index (`int`): The layer.
            hidden_states (`torch.Tensor` of shape `(batch_size, num_tokens, hidden_size)`): Its output.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, num_patch_tokens)`.
        """
        scores = self.alpha_heads[index](self._patch_tokens(hidden_states))
        return scores.squeeze(-1).float().to(hidden_states.device)  # the head may lie on another device

    def _selection_scores(
        self, index: int, hidden_states: torch.Tensor, generator: torch.Generator | None
    ) -> torch.Tensor:
        scores = self.relevance_scores(index, hidden_states)
        return draw_noise(scores, generator) if self.config.selection == "random" else scores

    def _add_noise(
        self,
        index: int,
        hidden_states: torch.Tensor,
        is_noised: torch.Tensor | None,
        generator: torch.Generator | None,
    ) -> torch.Tensor:
        """Disturb the patch tokens of the images that `is_noised` names, of shape `(batch_size,)`; of all if None."""
        scores = self.relevance_scores(index, hidden_states)
        if self.alpha_norm is not None:
            hidden_states = self.alpha_norm(hidden_states)
        patch_tokens = self._patch_tokens(hidden_states)
        has_patch_tokens = patch_tokens.shape[1] > 0  # not where the last layer computes the prefix tokens alone
        if self.config.noise_gate == "capacity" and has_patch_tokens:
            low, high = CAPACITY_RANGE
            capacity = low + (high - low) * _draw_uniform(scores.shape[0], generator, scores.device)
            amount = capacity_irrelevance(scores, capacity) * patch_tokens.float().std(dim=-1)
        else:
            amount = softmax_irrelevance(scores)
        if is_noised is not None:
            amount = amount * is_noised.unsqueeze(-1)
        noise = draw_noise(patch_tokens, generator)
        patch_tokens = patch_tokens + self.config.noise_std * (noise * amount.to(noise.dtype).unsqueeze(-1))
        return torch.cat((hidden_states[:, : self.config.num_prefix_tokens], patch_tokens), dim=1)

    def _reduce(
        self,
        num_kept: int,
        num_similar_tokens: int,
        scores: torch.Tensor | None,
        generator: torch.Generator | None,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        token_indices: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """
        Shorten the sequence to the prefix tokens and `num_kept` patch tokens; without scores only similarity decides.
        """
        num_prefix_tokens = self.config.num_prefix_tokens
        how = (num_kept, num_similar_tokens, self.config.similarity_partition, generator)
        patch_tokens = self._patch_tokens(hidden_states)
        if self.config.token_reduction == "merge":
            sizes = self._patch_tokens(attention_mask)
            resistance = None if scores is None else self.config.relevance_weight * standardize(scores, sizes > 0)
            with maybe_autocast(sizes.device.type, enabled=False):
                patch_tokens, sizes, positions = merge_tokens(patch_tokens, sizes, resistance, *how)
            hidden_states = torch.cat((hidden_states[:, :num_prefix_tokens], patch_tokens), dim=1)
            attention_mask = torch.cat((attention_mask[:, :num_prefix_tokens], sizes), dim=1)
            positions = self._with_prefix_tokens(positions)
        else:
            with maybe_autocast(patch_tokens.device.type, enabled=False):
                positions = select_tokens(patch_tokens, scores, *how, self._is_masked(attention_mask))
            positions = self._with_prefix_tokens(positions)
            hidden_states = take_tokens(hidden_states, positions)
            attention_mask = None if attention_mask is None else attention_mask.gather(1, positions)
        return hidden_states, attention_mask, token_indices.gather(1, positions)

    def _with_prefix_tokens(self, patch_positions: torch.Tensor) -> torch.Tensor:
        """Positions in the sequence of the prefix tokens and of the patch tokens at `patch_positions`."""
        num_prefix_tokens = self.config.num_prefix_tokens
        prefix = torch.arange(num_prefix_tokens, device=patch_positions.device).expand(patch_positions.shape[0], -1)
        return torch.cat((prefix, patch_positions + num_prefix_tokens), dim=1)


def _kept_mask(kept_positions: list[torch.Tensor], num_patches: int) -> torch.Tensor:
    """
    From the surviving patches of each pruned layer, `(batch_size, num_kept)`, the `kept_mask` of [`KeptPatches`].
    """
    masks = [
        positions.new_zeros((positions.shape[0], num_patches)).scatter(1, positions, 1) for positions in kept_positions
    ]
    return torch.stack(masks, dim=1)


def _is_sliceable(layer_mask: Any) -> bool:
    """Whether a mask is None or has a dimension of queries; the masks of flash and flex attention have none."""
    return layer_mask is None or (isinstance(layer_mask, torch.Tensor) and layer_mask.ndim == 4)


class TntViTModel(TokenPruningBackboneMixin, TntViTPreTrainedModel, ViTModel):
    """
    [`ViTModel`] with TNT pruning. Differences: one scoring head per layer (`alpha_heads`), the LayerNorm of the
    training noise (`alpha_norm`), a shortening sequence at inference, `kept_indices` in the output, and a last layer
    that can compute the prefix tokens alone.
    """

    last_layer_class = TntViTLastLayer


class TntDeiTModel(TokenPruningBackboneMixin, TntDeiTPreTrainedModel, DeiTModel):
    """[`DeiTModel`] with TNT pruning; the differences are those of [`TntViTModel`]."""

    last_layer_class = TntDeiTLastLayer


def classification_loss(logits: torch.Tensor, labels: torch.Tensor, problem_type: str | None) -> torch.Tensor:
    """
    Mean loss over the batch, a scalar.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, num_labels)`): Predictions.
        labels (`torch.Tensor`):
            Class indices of shape `(batch_size,)`, or class probabilities of shape `(batch_size, num_labels)` as mixup
            makes them: cross-entropy. Targets of `"regression"` (the default with one label; mean squared error) or
            `"multi_label_classification"` (binary cross-entropy), if `problem_type` says so.
        problem_type (`str`, *optional*): `config.problem_type`, which is read and never changed.

    Raises:
        ValueError: If `problem_type` is unknown, the labels have another shape, or they are floating-point numbers
            that are no probabilities and `problem_type` does not say what they are.
    """
    if problem_type is None and logits.shape[-1] == 1:
        problem_type = "regression"
    if problem_type == "regression":
        return nn.functional.mse_loss(logits.squeeze(), labels.squeeze())
    if problem_type == "multi_label_classification":
        return nn.functional.binary_cross_entropy_with_logits(logits, labels)
    if problem_type not in (None, "single_label_classification"):
        raise ValueError(
            "`problem_type` must be regression, single_label_classification or multi_label_classification, got "
            f"{problem_type!r}."
        )
    is_soft = labels.is_floating_point()
    if labels.shape != logits.shape if is_soft else labels.numel() != logits.shape[0]:
        raise ValueError(
            f"`labels` must be integers of shape ({logits.shape[0]},) or probabilities of shape "
            f"{tuple(logits.shape)}, got {labels.dtype} of shape {tuple(labels.shape)}."
        )
    if not is_soft:
        return nn.functional.cross_entropy(logits, labels.view(-1))
    if problem_type is None and not ((labels.sum(dim=-1) - 1).abs() < 1e-2).all():
        raise ValueError(
            "`labels` are floating-point numbers whose rows do not sum to 1: set `config.problem_type` to "
            "'multi_label_classification' if an image may have several labels, as the plain model does by itself, or "
            "to 'single_label_classification' if they are probabilities."
        )
    return nn.functional.cross_entropy(logits, labels)


class TntViTForImageClassification(TntViTPreTrainedModel, ViTForImageClassification):
    """
    [`ViTForImageClassification`] on a [`TntViTModel`]. Loads checkpoints of the plain model.

    Example:

    ```python
    >>> model = TntViTForImageClassification.from_pretrained("google/vit-base-patch16-224")
    >>> model.freeze_backbone()  # train the scoring heads, then choose a budget:
    >>> model.set_schedule(prune_layers=[2], keep_rates=[0.6], num_similar_tokens=25)
    ```
    """

    def __init__(self, config: TntViTConfig):
        super(ViTForImageClassification, self).__init__(config)  # the parent's __init__ would build a plain backbone
        self.num_labels = config.num_labels
        self.vit = TntViTModel(config, add_pooling_layer=False)
        self.classifier = _classifier(config)
        self._own_config()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TntImageClassifierOutput:
        """
        Arguments as in [`TntViTModel`]; `labels` as in [`classification_loss`].
        """
        outputs = self.vit(
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            attention_mask=attention_mask,
            prefix_only=True,
            return_dict=True,
            **kwargs,
        )
        logits = self.classifier(outputs.last_hidden_state[:, 0])
        return TntImageClassifierOutput(
            loss=None if labels is None else classification_loss(logits, labels, self.config.problem_type),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            kept_mask=outputs.kept_mask,
        )


class TntDeiTForImageClassification(TntDeiTPreTrainedModel, DeiTForImageClassificationWithTeacher):
    """
    [`DeiTForImageClassificationWithTeacher`] on a [`TntDeiTModel`], with a loss. Loads distilled DeiT checkpoints.

    Where noise is added the loss is that of the [CLS] head, as in the authors' code, or the mean over both heads with
    `config.distillation_head_in_loss`; elsewhere it is that of the averaged logits.
    """

    def __init__(self, config: TntDeiTConfig):
        super(DeiTForImageClassificationWithTeacher, self).__init__(config)  # see TntViTForImageClassification
        self.num_labels = config.num_labels
        self.deit = TntDeiTModel(config, add_pooling_layer=False)
        self.cls_classifier = _classifier(config)
        self.distillation_classifier = _classifier(config)
        self._own_config()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TntDeiTImageClassifierOutput:
        """
        Arguments as in [`TntDeiTModel`]; `labels` as in [`classification_loss`].
        """
        outputs = self.deit(
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            attention_mask=attention_mask,
            prefix_only=True,
            return_dict=True,
            **kwargs,
        )
        cls_logits = self.cls_classifier(outputs.last_hidden_state[:, 0])
        distillation_logits = self.distillation_classifier(outputs.last_hidden_state[:, 1])
        logits = (cls_logits + distillation_logits) / 2
        loss = None
        if labels is not None:
            heads = [logits]
            if self.adds_noise:
                heads = [cls_logits, distillation_logits] if self.config.distillation_head_in_loss else [cls_logits]
            losses = [classification_loss(head, labels, self.config.problem_type) for head in heads]
            loss = sum(losses) / len(losses)
        return TntDeiTImageClassifierOutput(
            loss=loss,
            logits=logits,
            cls_logits=cls_logits,
            distillation_logits=distillation_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            kept_mask=outputs.kept_mask,
        )


def _classifier(config: TntViTConfig | TntDeiTConfig) -> nn.Module:
    return nn.Linear(config.hidden_size, config.num_labels) if config.num_labels > 0 else nn.Identity()


AUTO_MAPS = {}
for _config_class, _backbone_class, _classifier_class in (
    (TntViTConfig, TntViTModel, TntViTForImageClassification),
    (TntDeiTConfig, TntDeiTModel, TntDeiTForImageClassification),
):
    # saved models carry their code
    _config_class.register_for_auto_class("AutoConfig")
    _backbone_class.register_for_auto_class("AutoModel")
    _classifier_class.register_for_auto_class("AutoModelForImageClassification")
    AUTO_MAPS[_config_class.model_type] = {
        _class._auto_class: f"{_class.__module__.split('.')[-1]}.{_class.__name__}"
        for _class in (_config_class, _backbone_class, _classifier_class)
    }

__all__ = [
    "TntDeiTForImageClassification",
    "TntDeiTImageClassifierOutput",
    "TntDeiTModel",
    "TntImageClassifierOutput",
    "TntModelOutput",
    "TntViTForImageClassification",
    "TntViTModel",
]
