"""
ViT and distilled DeiT with Training Noise Token (TNT) pruning (arXiv 2411.18092).

In training, noise is added to the patch tokens after the first layers, less to the tokens that a scoring head holds
relevant; on frozen weights the classification loss then teaches the heads relevance. At inference, the least relevant
tokens leave after the layers that the schedule names, whatever the budget was in training.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.deit import modeling_deit
from transformers.models.vit import modeling_vit
from transformers.models.vit.modeling_vit import eager_attention_forward
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, logging
from transformers.utils.generic import can_return_tuple, maybe_autocast, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_tnt import attend_by_sizes
from .configuration_tnt import CHOICES, TntDeiTConfig, TntViTConfig
from .schedules_tnt import Schedule, height_and_width, require, schedule_for
from .token_reduction_tnt import EMBEDDINGS, ReductionStep, TokenState, randn_like


logger = logging.get_logger(__name__)

# As in https://github.com/mx-ethan-rao/tnt/blob/d095619/models.py, whose norm_layer is LayerNorm with this eps.
ALPHA_NORM_EPS = 1e-6


@dataclass
class ReducedPatches:
    """
    What became of the patches, which are row-major on the grid of the image; part of all outputs.

    Args:
        kept_mask (`torch.LongTensor` of shape `(batch_size, num_pruned_layers, num_patches)`, *optional*):
            For each pruned layer, 1 for the patches that survive it. None without pruning and where noise is added.
        patch_groups (`torch.LongTensor` of shape `(batch_size, num_steps, num_patches)`, *optional*):
            With `output_groups`, for each of `config.reduction_steps()` the surviving patch whose token each patch is
            part of; -1 if it was dropped. [`~tnt_hf.inference.unmerge`] puts tokens back on the grid.
    """

    kept_mask: torch.Tensor | None = None
    patch_groups: torch.Tensor | None = None

    @property
    def kept_indices(self) -> tuple[torch.Tensor, ...] | None:
        """For each pruned layer the surviving patches, ascending: `torch.LongTensor`s of `(batch_size, num_kept)`."""
        if self.kept_mask is None:
            return None
        return tuple(mask.nonzero()[:, 1].view(mask.shape[0], -1) for mask in self.kept_mask.unbind(dim=1))


@dataclass
class TntModelOutput(ReducedPatches, BaseModelOutputWithPooling):
    """
    Output of the backbones. `last_hidden_state` holds the prefix tokens and the remaining patch tokens, with
    `prefix_only` the former alone; `hidden_states` the input of the first layer and the output of each layer before
    noise or pruning, so that the sequence shortens after a pruned layer, or within it where clusters are merged.

    Args:
        patch_weights (`torch.Tensor` of shape `(batch_size, num_patch_tokens)`, *optional*):
            With `classifier_reads_patches`, how many patches each remaining patch token stands for, without those
            that are masked; one if None.
    """

    patch_weights: torch.Tensor | None = None


@dataclass
class TntImageClassifierOutput(ReducedPatches, ImageClassifierOutput):
    """
    Output of the classifiers. A distilled DeiT also gives the `cls_logits` and `distillation_logits`, of shape
    `(batch_size, num_labels)`, whose mean are its `logits`.
    """

    cls_logits: torch.Tensor | None = None
    distillation_logits: torch.Tensor | None = None


class ScoringHead(nn.Linear):
    """
    A linear head that scores in float32, whatever its own precision, as half precision leaves many scores equal, and
    where the tokens are.
    """

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(batch_size, num_tokens, hidden_size)` -> float32 of shape `(batch_size, num_tokens, 1)`."""
        bias = None if self.bias is None else self.bias.to(tokens.device, torch.float32)
        with maybe_autocast(tokens.device.type, enabled=False):
            return nn.functional.linear(tokens.float(), self.weight.to(tokens.device, torch.float32), bias)


class TntAttention(modeling_vit.ViTAttention):
    """Attention of ViT and DeiT, whose queries may be those of the first tokens alone, with a bias on the keys."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        num_output_tokens: int | None = None,
        attention_bias: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if num_output_tokens is None and attention_bias is None:
            return super().forward(hidden_states, attention_mask, **kwargs)
        outputs = hidden_states if num_output_tokens is None else hidden_states[:, :num_output_tokens]
        projected = (self.q_proj(outputs), self.k_proj(hidden_states), self.v_proj(hidden_states))
        query, key, value = (each.view(*each.shape[:2], -1, self.head_dim).transpose(1, 2) for each in projected)
        if attention_mask is not None and attention_mask.shape[2] > 1:
            attention_mask = attention_mask[:, :, :num_output_tokens]
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        options = {"dropout": self.attention_dropout if self.training else 0.0, "scaling": self.scaling, **kwargs}
        attended, weights = attend_by_sizes(attend, self, query, key, value, attention_mask, attention_bias, **options)
        # not `flatten(2)`, which older ONNX exporters turn into a reshape to the batch size of the example
        return self.o_proj(attended.reshape(*outputs.shape[:2], -1)), weights


class TntLayer(modeling_vit.ViTLayer):
    """
    A layer of ViT and DeiT that can compute the first tokens alone, and in which tokens can leave before the MLP.

    Most classifiers do not read the patch tokens after the last layer. Their keys and values are still computed there,
    their queries, output projection and MLP are not; the prefix tokens are those of the whole layer, to rounding.
    """

    def __init__(self, config: TntViTConfig | TntDeiTConfig):
        super().__init__(config)
        self.attention = TntAttention(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        num_output_tokens: int | None = None,
        reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """
        `(batch_size, num_tokens, hidden_size)` -> the first `num_output_tokens` of them, all if None, or those that
        `reduce` leaves. The mask of shape `(batch_size, 1, num_tokens, num_tokens)` is that of the plain layer; an
        `attention_bias` of shape `(batch_size, num_tokens)` is added to the scores of each key.
        """
        if num_output_tokens is None and reduce is None:
            return super().forward(hidden_states, attention_mask, **kwargs)
        attended, _ = self.attention(
            self.layernorm_before(hidden_states), attention_mask, num_output_tokens=num_output_tokens, **kwargs
        )
        hidden_states = hidden_states[:, :num_output_tokens] + self.dropout(attended)
        if reduce is not None:
            hidden_states = reduce(hidden_states)
        return hidden_states + self.dropout(self.mlp(self.layernorm_after(hidden_states)))


class TokenPruningMixin:
    """
    What every TNT model adds to `PreTrainedModel`: a schedule that can be changed, a backbone that can be frozen,
    loading that refuses a backbone left at random and saving under the names of `state_dict()`.
    """

    _no_split_modules = ["TntLayer"]
    _can_record_outputs = {"hidden_states": TntLayer, "attentions": TntAttention}
    accepts_loss_kwargs = False  # the loss is a plain mean; Trainer then divides by its accumulation steps
    _keep_in_fp32_modules = ["alpha_heads"]  # quantisers leave out what is named here
    # what a checkpoint may lack, besides the classification heads and the pooler
    _may_start_untrained = {"alpha_heads", "alpha_norm", "mask_token", "pooler"}

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        # Transformers renames the tensors of legacy checkpoints by class name, and for custom classes only if they are
        # registered; without this a public checkpoint would load with a random backbone.
        register_checkpoint_conversion_mapping(
            cls.__name__, get_checkpoint_conversion_mapping("ViTModel"), overwrite=True
        )

    def post_init(self) -> None:
        """As in Transformers, with a config that is the model's own, as its budget is, and that of its parts."""
        config = copy.deepcopy(self.config)
        for module in self.modules():
            if isinstance(getattr(module, "config", None), type(config)):
                module.config = config
        super().post_init()

    @property
    def adds_noise(self) -> bool:
        """Whether a forward pass adds noise instead of pruning: in training mode, in steps that compute gradients."""
        return self.training and torch.is_grad_enabled()

    def set_schedule(self, prune_layers: Schedule | Sequence[int], *fields: Any, **named_fields: Any) -> None:
        """
        Change the schedule of the model, a part of its config that calls without a `schedule` follow: a [`Schedule`]
        alone, or its fields.

        Raises:
            ValueError: If the model cannot carry it out; the previous one then stays in place.
        """
        for part in (self.base_model, self):  # a backbone that was put in later has a config of its own
            part.config.set_schedule(prune_layers, *fields, **named_fields)
        layers, num_learning = self.config.prune_layers, self.config.num_learning_layers
        ranks = self.config.uses_scores and self.config.selection == "relevance"
        if ranks and any(layer >= num_learning for layer in layers):
            logger.warning_once(
                f"`prune_layers` {layers} use scoring heads that training does not reach: with this config the heads "
                f"of the first {num_learning} layers learn (`num_noise_layers`)."
            )

    def set_budget(self, **budget: Any) -> Schedule:
        """
        Set the schedule that costs at most a budget, and no more than 1 % less, and return it: `flops_reduction=2` is
        half of the multiply-accumulates; arguments as in [`schedule_for`].

        Raises:
            ValueError: If the budget cannot be met; the message names the range that can be reached.
        """
        schedule = schedule_for(self.config, **budget)
        self.set_schedule(schedule)
        return schedule

    def freeze_backbone(self) -> None:
        """
        Leave only the scoring heads trainable that can receive a gradient: those of the noised layers, but not of the
        last layer, after which noise reaches no prefix token.

        Raises:
            ValueError: If no head could learn with this config.
        """
        learning = self.config.learning_layers()
        self.requires_grad_(False)
        self.base_model.alpha_heads[: len(learning)].requires_grad_(True)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """
        As `PreTrainedModel.from_pretrained`, for checkpoints of the plain model and of the TNT model.

        Raises:
            ValueError: If a backbone tensor is missing from the checkpoint or has another shape there.
        """
        config, source = kwargs.get("config"), pretrained_model_name_or_path or "the state dict"
        if getattr(config, "model_type", None) == cls.config_class.plain_model_type:
            kwargs["config"] = cls.config_class(**config.to_dict(), attn_implementation=config._attn_implementation)
        model, loading_info = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        untrained = set(loading_info["missing_keys"]) | {key for key, *_ in loading_info["mismatched_keys"]}
        may_start_untrained = cls._may_start_untrained.union(getattr(cls, "head_names", ()))
        random_backbone = sorted(key for key in untrained if may_start_untrained.isdisjoint(key.split(".")))
        if random_backbone:
            raise ValueError(
                f"{source} does not hold the whole backbone of {cls.__name__}: "
                f"{len(random_backbone)} tensors would be random, such as {', '.join(random_backbone[:3])}. Expected "
                f"is a checkpoint of '{model.config.plain_model_type}' or '{model.config.model_type}'."
            )
        heads = {key.split("alpha_heads.")[-1].split(".")[0] for key in untrained if "alpha_heads." in key}
        unscored = [layer for layer in model.config.prune_layers if str(layer) in heads]
        if unscored and model.config.uses_scores:
            logger.warning(
                f"The scoring heads of `prune_layers` {unscored} are not in {source} and start at random: "
                "train them before relying on the pruned model."
            )
        return (model, loading_info) if output_loading_info else model

    def save_pretrained(self, *args: Any, save_original_format: bool = False, **kwargs: Any) -> None:
        """As `PreTrainedModel.save_pretrained`, under the names of `state_dict()`, which Trainer needs to resume."""
        is_defined_here = type(self).__module__ == __name__  # whose file Transformers saves with the model
        self.config.auto_map = dict(AUTO_MAPS[self.config.model_type]) if is_defined_here else {}
        return super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)


class TokenPruningBackboneMixin(TokenPruningMixin):
    """
    The layer loop of both backbones: noise in training, reduction at inference.

    It replaces the forward pass of the plain backbone, whose embeddings, layers, final LayerNorm and pooler it uses.
    """

    def post_init(self) -> None:
        """What the constructor of the plain backbone calls in the end, on layers of this file and scoring heads."""
        config = self.config
        self.layers = nn.ModuleList([TntLayer(config) for _ in range(config.num_hidden_layers)])
        self.alpha_heads = nn.ModuleList([ScoringHead(config.hidden_size, 1) for _ in range(config.num_hidden_layers)])
        self.alpha_norm = nn.LayerNorm(config.hidden_size, eps=ALPHA_NORM_EPS) if config.noise_layer_norm else None
        super().post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: torch.Tensor | None = None,
        schedule: Schedule | None = None,
        selection: str | None = None,
        generator: torch.Generator | None = None,
        prefix_only: bool = False,
        output_groups: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TntModelOutput:
        """
        Images of shape `(batch_size, num_channels, height, width)`, the other arguments of the plain backbone, and:

        Args:
            attention_mask (`torch.Tensor` of shape `(batch_size, num_prefix_tokens + num_patches)`, *optional*):
                0 on tokens that are not to be attended to; such patch tokens are also the first to leave.
            schedule ([`Schedule`], *optional*):
                What leaves where in this call, in training too; if None, noise is added in training steps, and
                elsewhere the config's schedule is carried out.
            selection (`str`, *optional*): `"relevance"` or `"random"` in this call; the config's if None.
            generator (`torch.Generator`, *optional*):
                Source of the training noise and of `"random"` settings; the global one if None.
            prefix_only (`bool`, *optional*, defaults to `False`):
                Whether the last layer may leave out the patch tokens, as classifiers do. Without effect if hidden
                states or attentions are asked for, tokens leave after the last layer, or the attention mask has no
                dimension of queries (flex or flash attention with masked tokens).
            output_groups (`bool`, *optional*, defaults to `False`): Whether to return `patch_groups`.

        Raises:
            ValueError: If the images have another size and `interpolate_pos_encoding` is not set, or the schedule
                cannot be carried out at their number of patches.
        """
        config = self.config
        selection = config.selection if selection is None else selection
        require(selection in CHOICES["selection"], "selection", f"one of {', '.join(CHOICES['selection'])}", selection)
        adds_noise = self.adds_noise and schedule is None
        compute_size = None if adds_noise else (schedule or config).compute_size
        pixel_values = pixel_values.to(self.embeddings.patch_embeddings.projection.weight.dtype)
        if compute_size is not None:
            size, interpolate_pos_encoding = height_and_width(compute_size), True
            pixel_values = nn.functional.interpolate(pixel_values, size, mode="bicubic", antialias=True)
        tokens = self.embeddings(
            pixel_values, bool_masked_pos=bool_masked_pos, interpolate_pos_encoding=interpolate_pos_encoding
        )

        num_noise_layers, steps = config.num_noise_layers if adds_noise else 0, {}
        if not adds_noise:
            num_patches = int(tokens.shape[1]) - config.num_prefix_tokens  # a tensor under torch.jit tracing
            steps = {step.layer: step for step in config.reduction_steps(num_patches, schedule)}
        if steps:
            config.check_attention(attention_mask)
        merges = len(steps) > 0 and config.merges
        state = TokenState(
            tokens, config, attention_mask, merges=merges, generator=generator, track_groups=output_groups
        )

        def reduce(step: ReductionStep, before: dict[str, Any], tokens: torch.Tensor) -> torch.Tensor:
            state.restore(before)
            state.tokens = tokens
            scores = None
            if step.uses_scores and config.uses_scores:
                scores = self.relevance_scores(step.layer, tokens)
                scores = randn_like(scores, generator) if selection == "random" else scores
            state.reduce(step, scores)
            return state.tokens

        if EMBEDDINGS in steps:
            reduce(steps[EMBEDDINGS], {}, tokens)
        layer_mask = self._layer_mask(state)
        last = len(self.layers) - 1
        recordings = ("output_hidden_states", "output_attentions")
        records = any(kwargs.get(name, getattr(config, name, False)) for name in recordings)
        has_queries = layer_mask is None or (isinstance(layer_mask, torch.Tensor) and layer_mask.ndim == 4)
        cuts_last = prefix_only and not records and last not in steps and has_queries
        for index, layer in enumerate(self.layers):
            step, mask, options = steps.get(index), layer_mask, {}
            is_own = isinstance(layer, TntLayer)  # and no wrapper of one, which takes what plain layers take
            if index == last and cuts_last and is_own:
                options["num_output_tokens"] = config.num_prefix_tokens
            if state.attention_bias is not None and is_own:
                options["attention_bias"] = state.attention_bias
            elif state.attention_bias is not None:
                mask = state.attention_bias[:, None, None].to(state.tokens.dtype)
            if step is not None and config.reduces_before_mlp:  # twice under gradient checkpointing
                options["reduce"] = partial(reduce, step, state.snapshot())
            state.tokens = layer(state.tokens, mask, **options, **kwargs)
            if index < num_noise_layers:
                scores = self.relevance_scores(index, state.tokens)
                state.tokens = state.tokens if self.alpha_norm is None else self.alpha_norm(state.tokens)
                state.add_noise(index, scores)
            if step is not None:
                if not config.reduces_before_mlp:
                    reduce(step, {}, state.tokens)
                layer_mask = self._layer_mask(state)

        sequence_output = self.layernorm(state.tokens)
        weights = None
        if config.classifier_reads_patches:
            weights = state.attention_mask if state.sizes is None else state.sizes
        return TntModelOutput(
            last_hidden_state=sequence_output,
            pooler_output=self.pooler(sequence_output) if self.pooler is not None else None,
            kept_mask=_stack(state.kept_masks, sequence_output.device),
            patch_groups=_stack(state.step_groups, sequence_output.device),
            patch_weights=None if weights is None else weights[:, config.num_prefix_tokens :],
        )

    def _layer_mask(self, state: TokenState) -> torch.Tensor | None:
        """What the layers get as attention mask: none without masked tokens; exporters would trace one of zeros."""
        if state.attention_mask is None:
            return None
        return create_bidirectional_mask(
            config=self.config, inputs_embeds=state.tokens, attention_mask=state.attention_mask
        )

    def relevance_scores(self, index: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        Scores of the patch tokens after layer `index`, higher for the more relevant: its output of shape
        `(batch_size, num_tokens, hidden_size)` -> float32 of shape `(batch_size, num_patch_tokens)`.
        """
        # of all tokens, as those of a slice would be copied, and the copy kept for the gradient
        scores = self.alpha_heads[index](hidden_states)[:, self.config.num_prefix_tokens :]
        return scores.squeeze(-1).float().to(hidden_states.device)  # the head may lie on another device


def _stack(reports: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor | None:
    """What pruned layers, which may lie on several devices, report of each image."""
    return torch.stack([report.to(device) for report in reports], dim=1) if reports else None


class TntViTModel(TokenPruningBackboneMixin, modeling_vit.ViTModel):
    """
    [`ViTModel`] with TNT pruning. Differences: one scoring head per layer (`alpha_heads`), the LayerNorm of the
    training noise (`alpha_norm`), a shortening sequence at inference, what became of the patches in the output, and a
    last layer that can compute the prefix tokens alone.
    """

    config: TntViTConfig
    _no_split_modules = ["ViTEmbeddings", "TntLayer"]


class TntDeiTModel(TokenPruningBackboneMixin, modeling_deit.DeiTModel):
    """[`DeiTModel`] with TNT pruning; the differences are those of [`TntViTModel`]."""

    config: TntDeiTConfig
    _no_split_modules = ["DeiTEmbeddings", "TntLayer"]


class TokenPruningClassifierMixin(TokenPruningMixin):
    """The forward pass of both classifiers: one head for each prefix token, which may read the patches too."""

    head_names: tuple[str, ...]

    def __init__(self, config: TntViTConfig | TntDeiTConfig):
        # that of the parent would build a plain backbone
        super(self.plain_class, self).__init__(config)
        self.num_labels = config.num_labels
        setattr(self, self.base_model_prefix, self.backbone_class(config, add_pooling_layer=False))
        for name in self.head_names:
            num_inputs = (1 + config.classifier_reads_patches) * config.hidden_size
            head = nn.Linear(num_inputs, config.num_labels) if config.num_labels > 0 else nn.Identity()
            setattr(self, name, head)
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
        Arguments as in the backbone, [`TntViTModel`]: `schedule`, `selection`, `generator` and `output_groups` among
        them.

        Args:
            labels (`torch.Tensor`, *optional*):
                Classes of shape `(batch_size,)`, or probabilities of shape `(batch_size, num_labels)` as mixup makes
                them: cross-entropy. Other targets as in the plain model, if `config.problem_type` names them.

        Raises:
            ValueError: Besides those of the backbone, if the labels have another shape, or are floating-point numbers
                of which neither they nor `config.problem_type` say what they are.
        """
        outputs = self.base_model(
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            attention_mask=attention_mask,
            prefix_only=not self.config.classifier_reads_patches,
            return_dict=True,
            **kwargs,
        )
        inputs = self.head_inputs(outputs.last_hidden_state, outputs.patch_weights)
        head_logits = [getattr(self, name)(each) for name, each in zip(self.head_names, inputs)]
        logits = head_logits[0] if len(head_logits) == 1 else sum(head_logits) / len(head_logits)
        loss = None
        if labels is not None:
            learning = [logits]
            if self.adds_noise:
                learning = head_logits if getattr(self.config, "distillation_head_in_loss", True) else head_logits[:1]
            loss = sum(self._loss(each, labels.to(each.device)) for each in learning) / len(learning)
        cls_logits, distillation_logits = head_logits if len(head_logits) == 2 else (None, None)
        return TntImageClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            kept_mask=outputs.kept_mask,
            patch_groups=outputs.patch_groups,
            cls_logits=cls_logits,
            distillation_logits=distillation_logits,
        )

    def head_inputs(self, tokens: torch.Tensor, patch_weights: torch.Tensor | None = None) -> list[torch.Tensor]:
        """
        What each head reads: tokens after the final LayerNorm, `(batch_size, num_tokens, hidden_size)`, and the
        `patch_weights` of a [`TntModelOutput`] -> for each head its prefix token, with `classifier_reads_patches`
        beside the mean over the patches, of shape `(batch_size, head.in_features)`.
        """
        inputs = [tokens[:, index] for index in range(len(self.head_names))]
        if not self.config.classifier_reads_patches:
            return inputs
        patches = tokens[:, self.config.num_prefix_tokens :]
        if patch_weights is None:
            mean = patches.mean(dim=1)
        else:
            weights = (patch_weights / patch_weights.sum(dim=1, keepdim=True).clamp(min=1)).unsqueeze(-1)
            mean = (weights * patches.float()).sum(dim=1).to(patches.dtype)
        return [torch.cat((each, mean), dim=-1) for each in inputs]

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean over the batch; `config.problem_type` is read, and set by no labels of classes."""
        problem_type, is_soft = self.config.problem_type, labels.is_floating_point()
        if problem_type not in (None, "single_label_classification") or logits.shape[-1] == 1:
            return self.loss_function(labels, logits, self.config)
        if labels.shape != logits.shape if is_soft else labels.numel() != logits.shape[0]:
            raise ValueError(
                f"`labels` must be integers of shape ({logits.shape[0]},) or probabilities of shape "
                f"{tuple(logits.shape)}, got {labels.dtype} of shape {tuple(labels.shape)}."
            )
        if is_soft and problem_type is None and not _are_probabilities(labels):
            raise ValueError(
                "`labels` are floating-point numbers that do not show whether they are probabilities of classes: set "
                "`config.problem_type` to 'single_label_classification' if they are, or to "
                "'multi_label_classification' if an image may have several labels, as the plain model does by itself."
            )
        return nn.functional.cross_entropy(logits, labels if is_soft else labels.view(-1))


def _are_probabilities(labels: torch.Tensor) -> bool:
    """Whether each row sums to 1 and some number is neither 0 nor 1, which labels of several classes may all be."""
    if labels.is_meta or torch.compiler.is_compiling():
        return False
    sums_to_one = (labels.sum(dim=-1) - 1).abs() < 1e-2
    return bool(sums_to_one.all() and ((labels != 0) & (labels != 1)).any())


class TntViTForImageClassification(TokenPruningClassifierMixin, modeling_vit.ViTForImageClassification):
    """
    [`ViTForImageClassification`] on a [`TntViTModel`]. Loads checkpoints of the plain model.

    Example:

    ```python
    >>> model = TntViTForImageClassification.from_pretrained("google/vit-base-patch16-224")
    >>> model.freeze_backbone()  # train the scoring heads, then choose a budget:
    >>> model.set_schedule(prune_layers=[2], keep_rates=[0.6], num_similar_tokens=25)
    ```
    """

    config: TntViTConfig
    backbone_class, plain_class = TntViTModel, modeling_vit.ViTForImageClassification
    head_names = ("classifier",)


class TntDeiTForImageClassification(TokenPruningClassifierMixin, modeling_deit.DeiTForImageClassificationWithTeacher):
    """
    [`DeiTForImageClassificationWithTeacher`] on a [`TntDeiTModel`], with a loss. Loads distilled DeiT checkpoints.

    Where noise is added the loss is that of the [CLS] head, as in the authors' code, or the mean over both heads with
    `config.distillation_head_in_loss`; elsewhere it is that of the averaged logits.
    """

    config: TntDeiTConfig
    backbone_class, plain_class = TntDeiTModel, modeling_deit.DeiTForImageClassificationWithTeacher
    head_names = ("cls_classifier", "distillation_classifier")


FAMILIES = (
    (TntViTConfig, TntViTModel, TntViTForImageClassification),
    (TntDeiTConfig, TntDeiTModel, TntDeiTForImageClassification),
)
AUTO_MAPS = {}
for _family in FAMILIES:
    _auto_map = AUTO_MAPS[_family[0].model_type] = {}
    for _class, _auto_class in zip(_family, ("AutoConfig", "AutoModel", "AutoModelForImageClassification")):
        _class.register_for_auto_class(_auto_class)  # saved models carry their code
        _auto_map[_auto_class] = f"{_class.__module__.split('.')[-1]}.{_class.__name__}"

__all__ = [
    "TntDeiTForImageClassification",
    "TntDeiTModel",
    "TntImageClassifierOutput",
    "TntModelOutput",
    "TntViTForImageClassification",
    "TntViTModel",
]
