"""Configurations of ViT and distilled DeiT with Training Noise Token (TNT) pruning (arXiv 2411.18092)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from operator import le
from typing import Any

from transformers import DeiTConfig, ViTConfig

from .schedules_tnt import (
    UNPRUNED,
    Schedule,
    count_patches,
    height_and_width,
    is_integer,
    is_real,
    reduction_steps,
    require,
)
from .token_reduction_tnt import EMBEDDINGS, ReductionStep


CHOICES = {
    "selection": ("relevance", "random"),
    "similarity_partition": ("strided", "random"),
    "token_reduction": ("drop", "merge", "cluster"),
    "noise_gate": ("softmax", "capacity"),
}
# Merged tokens weigh in attention by a bias on the scores, which other implementations do not take.
MERGING_ATTENTION = ("sdpa", "eager")


def _size_alone(size: Any) -> Schedule:
    return replace(UNPRUNED, compute_size=size)


@dataclass(kw_only=True, repr=False)
class TokenPruningFields:
    """
    The settings of TNT pruning, shared by `TntViTConfig` and `TntDeiTConfig`.

    Args:
        prune_layers, keep_rates, num_similar_tokens, compute_size (*optional*, by default nothing leaves):
            The fields of a [`~tnt_hf.schedules_tnt.Schedule`] of images of `image_size`, which is carried out at
            inference. For images of another size, `num_similar_tokens` grows with the number of patches.
        selection (`str`, *optional*, defaults to `"relevance"`):
            `"relevance"` keeps the tokens that the scoring heads rank highest. `"random"` ranks by a random draw
            instead and leaves everything else unchanged: the control that learned scores must beat.
        similarity_partition (`str`, *optional*, defaults to `"strided"`):
            How the similarity step splits the tokens. `"strided"`: every second token, so that equal images give equal
            logits. `"random"`: one random permutation for each batch, as the authors' code does.
        token_reduction (`str`, *optional*, defaults to `"drop"`):
            What becomes of the tokens that leave. `"drop"` deletes the least relevant, as the authors' code does.
            `"merge"` averages them into the remaining tokens, the most similar first, and attention counts each token
            as often as it has patches; needs the `sdpa` or `eager` attention. `"cluster"` merges likewise, but between
            the attention and the MLP of a layer, prefers small tokens, keeps the norm of merged ones and needs no
            scores: the better one, see docs/photographs.md.
        size_bias (`float`, *optional*):
            Where tokens are merged, attention counts a token as often as it has patches, to the power of this; by
            default 1 with `"merge"` and 0.85 with `"cluster"`.
        budget_sizes (`list[list]`, *optional*, defaults to `[]`):
            Pairs of a reduction of the executed multiply-accumulates and the pixels (a side, or height and width) of
            the images on which it is met best, as [`~tnt_hf.evaluation.choose_schedules`] finds them. A budget follows
            the pair whose reduction is nearest in proportion; images keep their size where 1 is as near.
        relevance_weight (`float`, *optional*, defaults to 0.05):
            With `"merge"`, how much relevance holds tokens back: cosine similarity for each standard deviation of the
            scores. 0 merges by similarity alone.
        noise_std (`float`, *optional*, defaults to 0.02):
            Standard deviation of the training noise on a token of no relevance (beta, 0.02 in the authors' code); with
            the gate `"capacity"` in units of the token's own standard deviation over its channels.
        num_noise_layers (`int`, *optional*, defaults to 5):
            Number of first layers after which noise is added in training, all if the model has fewer. Their scoring
            heads are the ones that learn.
        noise_layer_norm (`bool`, *optional*, defaults to `True`):
            Whether a LayerNorm is applied to all tokens where noise is added, in training only, as the authors' code
            does.
        noise_gate (`str`, *optional*, defaults to `"softmax"`):
            How scores become the amount of noise. `"softmax"`: 1 less the softmax over the tokens, as in the authors'
            code. `"capacity"`: a share of the tokens, drawn for each image in training so that one training serves
            all budgets, is nearly spared, and the rest nearly gets the full noise.
        noise_one_layer (`bool`, *optional*, defaults to `False`):
            Whether noise is added after one layer of the first `num_noise_layers`, drawn for each image in training,
            instead of after all of them as in the authors' code.

    Raises:
        ValueError: If a value is not allowed; the message names the field, the value and what is allowed.
    """

    keys_to_ignore_at_inference = ["hidden_states", "attentions", "kept_mask", "patch_groups"]  # by Trainer

    prune_layers: list[int] = field(default_factory=list)
    keep_rates: list[float] = field(default_factory=list)
    num_similar_tokens: int = 0
    compute_size: int | list[int] | None = None
    selection: str = "relevance"
    similarity_partition: str = "strided"
    token_reduction: str = "drop"
    size_bias: float | None = None
    budget_sizes: list[list] = field(default_factory=list)
    relevance_weight: float = 0.05
    noise_std: float = 0.02
    num_noise_layers: int = 5
    noise_layer_norm: bool = True
    noise_gate: str = "softmax"
    noise_one_layer: bool = False

    def __post_init__(self, **kwargs):
        kwargs.pop("model_type", None)  # a plain model's config may be passed on; it must not rename this class
        super().__post_init__(**kwargs)
        self.validate()
        for name, value in self.schedule.settings.items():  # lists and numbers that JSON can hold
            setattr(self, name, value)
        for name in ("relevance_weight", "size_bias", "noise_std"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else float(value))
        pairs = self.budget_sizes
        self.budget_sizes = [[float(budget), _size_alone(size).settings["compute_size"]] for budget, size in pairs]
        self.num_noise_layers = int(self.num_noise_layers)

    def validate(self) -> None:
        """Check every setting; raises ValueError with the field, the value and what is allowed."""
        self.reduction_steps(schedule=self.schedule)
        for name, allowed in CHOICES.items():
            require(getattr(self, name) in allowed, name, f"one of {', '.join(allowed)}", getattr(self, name))
        for name in ("relevance_weight", "size_bias", "noise_std"):
            value = getattr(self, name)
            is_allowed = (is_real(value) and 0 <= value < math.inf) or (name == "size_bias" and value is None)
            require(is_allowed, name, "a finite number of at least 0", value)
        self._check_budget_sizes()
        num_noise_layers = self.num_noise_layers
        require(is_integer(num_noise_layers), "num_noise_layers", "an integer of at least 0", num_noise_layers)
        for name in ("noise_layer_norm", "noise_one_layer"):
            require(isinstance(getattr(self, name), bool), name, "True or False", getattr(self, name))
        super().validate()

    def _check_budget_sizes(self) -> None:
        allowed = "pairs of a finite number above 0 and a size in pixels"
        require(isinstance(self.budget_sizes, list | tuple), "budget_sizes", allowed, self.budget_sizes)
        for pair in self.budget_sizes:
            is_pair = isinstance(pair, list | tuple) and len(pair) == 2 and pair[1] is not None
            is_pair = is_pair and is_real(pair[0]) and 0 < pair[0] < math.inf
            require(is_pair, "budget_sizes", allowed, self.budget_sizes)
            try:
                self.reduction_steps(schedule=_size_alone(pair[1]))
            except ValueError as error:
                raise ValueError(f"`budget_sizes` cannot hold {pair}: {error}") from error

    def check_attention(self, attention_mask: Any = None) -> None:
        """Check that tokens can leave under the attention of the model and a mask of a call; raises ValueError."""
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(
                "`attention_mask` must have shape (batch_size, num_prefix_tokens + num_patches) when tokens are "
                f"pruned, got {tuple(attention_mask.shape)}."
            )
        implementation = self._attn_implementation or MERGING_ATTENTION[0]
        if self.merges and implementation not in MERGING_ATTENTION:
            raise ValueError(
                f"`attn_implementation` must be one of {', '.join(MERGING_ATTENTION)} with `token_reduction` "
                f"{self.token_reduction!r}, which adds to the attention scores, got {implementation!r}."
            )

    @property
    def merges(self) -> bool:
        """Whether tokens that leave are merged into others."""
        return self.token_reduction != "drop"

    @property
    def uses_scores(self) -> bool:
        """Whether scores have a say in which tokens leave: in that of clusters they have none."""
        return self.token_reduction != "cluster"

    @property
    def reduces_before_mlp(self) -> bool:
        """Whether tokens leave between the attention and the MLP of a layer."""
        return self.token_reduction == "cluster"

    @property
    def num_patches(self) -> int:
        """Number of patch tokens of one image of `image_size`."""
        return count_patches(self.image_size, self.patch_size)

    @property
    def num_learning_layers(self) -> int:
        """Number of first layers whose scoring heads learn: noise after the last one reaches no prefix token."""
        learns = self.uses_scores and self.noise_std > 0
        return min(self.num_noise_layers, self.num_hidden_layers - 1) if learns else 0

    def learning_layers(self) -> range:
        """The layers whose scoring heads learn; raises ValueError if there are none."""
        if self.num_learning_layers == 0:
            raise ValueError(
                "No scoring head can learn: `token_reduction` must not be 'cluster', which needs no scores, "
                "`num_noise_layers` and `noise_std` must be above 0 and the model must have at least 2 layers, got "
                f"token_reduction={self.token_reduction!r}, num_noise_layers={self.num_noise_layers}, "
                f"noise_std={self.noise_std}, num_hidden_layers={self.num_hidden_layers}."
            )
        return range(self.num_learning_layers)

    @property
    def schedule(self) -> Schedule:
        """The schedule of the config, of images of `image_size`."""
        return Schedule("", self.prune_layers, self.keep_rates, self.num_similar_tokens, self.compute_size)

    def set_schedule(self, prune_layers: Schedule | Sequence[int], *fields: Any, **named_fields: Any) -> None:
        """
        Change the schedule; one that is refused leaves the old one in place.

        Args:
            prune_layers: A [`Schedule`] alone, or the first of its fields, whose others follow.

        Raises:
            ValueError: If the model cannot carry it out, or a schedule and fields are given.
        """
        schedule = prune_layers
        if not hasattr(schedule, "settings"):  # which a Schedule of the code in a repo has too
            schedule = Schedule("", prune_layers, *fields, **named_fields)
        elif fields or named_fields:
            given = f"{schedule}, {', '.join(map(str, (*fields, *named_fields)))}"
            raise ValueError(f"Either a schedule or its fields must be given, got both: {given}.")
        self.reduction_steps(schedule=schedule)
        for name, value in {"compute_size": None, **schedule.settings}.items():
            setattr(self, name, value)

    def size_for(self, flops_reduction: float) -> tuple[int, int] | None:
        """Height and width of the images on which a budget is met best, by `budget_sizes`; None for their own."""
        pairs = [(1.0, None), *self.budget_sizes]
        _, size = min(pairs, key=lambda pair: abs(math.log(pair[0] / flops_reduction)))
        return None if size is None else tuple(height_and_width(size))

    def num_patches_of(self, schedule: Schedule | None = None) -> int:
        """Patch tokens of an image of `image_size` under a schedule, that of the config if None."""
        return count_patches((schedule or self).compute_size or self.image_size, self.patch_size)

    def reduction_steps(
        self, num_patches: int | None = None, schedule: Schedule | None = None
    ) -> tuple[ReductionStep, ...]:
        """
        What leaves where in an image of `num_patches`; of `image_size` if None.

        Raises:
            ValueError: If the schedule, that of the config if None, cannot be carried out there.
        """
        made_for, size = self.num_patches_of(schedule), (schedule or self).compute_size
        if size is not None:
            is_smaller = all(map(le, height_and_width(size), height_and_width(self.image_size)))
            allowed = f"at least a patch and at most `image_size` {self.image_size}"
            require(made_for > 0 and is_smaller, "compute_size", allowed, height_and_width(size))
        num_patches = made_for if num_patches is None else num_patches
        return reduction_steps(schedule or self, num_patches, self.num_hidden_layers, made_for)

    def patch_token_counts(self, num_patches: int | None = None, schedule: Schedule | None = None) -> list[int]:
        """Patch tokens that enter each layer and, as the last entry, that leave the last one."""
        kept = {step.layer: step.num_kept for step in self.reduction_steps(num_patches, schedule)}
        counts = [kept.get(EMBEDDINGS, self.num_patches_of(schedule) if num_patches is None else num_patches)]
        for layer in range(self.num_hidden_layers):
            counts.append(kept.get(layer, counts[-1]))
        return counts

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        """
        As in Transformers, but the pruning settings among `kwargs` are checked together. New `prune_layers` are a new
        schedule: without `num_similar_tokens` or `compute_size` it has none, as in `set_schedule`.
        """
        names = TokenPruningFields.__dataclass_fields__
        overrides = {name: kwargs.pop(name) for name in names if name in kwargs}
        if "prune_layers" in overrides:
            overrides = {"num_similar_tokens": 0, "compute_size": None, **overrides}
        return super().from_dict({**config_dict, **overrides}, **kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict, dict]:
        """
        As in Transformers, but the config of the plain model is read without a warning and any other is refused.

        Raises:
            ValueError: If `model_type` is another architecture's.
        """
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_type = config_dict.pop("model_type", None)
        if model_type not in (None, cls.plain_model_type, cls.model_type):
            allowed = " or ".join(map(repr, dict.fromkeys((cls.plain_model_type, cls.model_type))))
            raise ValueError(
                f"{cls.__name__} reads checkpoints whose `model_type` is {allowed}, got {model_type!r} in "
                f"{pretrained_model_name_or_path}."
            )
        return config_dict, kwargs


class TntViTConfig(TokenPruningFields, ViTConfig):
    """
    Configuration of a ViT with TNT pruning: the fields of [`ViTConfig`], those of [`TokenPruningFields`], and:

    Args:
        classifier_reads_patches (`bool`, *optional*, defaults to `False`):
            Whether the classifier reads the [CLS] token and the mean over the patches, as that of DINOv2 does, instead
            of the former alone. A token counts by its patches.

    Example:

    ```python
    >>> TntViTConfig(prune_layers=[2], keep_rates=[0.6], num_similar_tokens=25).patch_token_counts()
    [196, 196, 196, 117, 117, 117, 117, 117, 117, 117, 117, 117, 117]
    ```
    """

    model_type = "tnt_vit"
    plain_model_type = ViTConfig.model_type
    num_prefix_tokens = 1

    classifier_reads_patches: bool = False

    def validate(self) -> None:
        """As in [`TokenPruningFields`]."""
        reads = self.classifier_reads_patches
        require(isinstance(reads, bool), "classifier_reads_patches", "True or False", reads)
        super().validate()


class TntDeiTConfig(TokenPruningFields, DeiTConfig):
    """
    Configuration of a distilled DeiT with TNT pruning: the fields of [`DeiTConfig`], those of [`TokenPruningFields`],
    and:

    Args:
        distillation_head_in_loss (`bool`, *optional*, defaults to `False`):
            Whether the training loss is the mean over both heads instead of that of the [CLS] head. Frozen backbones
            do without, as in the authors' code; a distillation head that is to be trained needs it.
    """

    model_type = "tnt_deit"
    plain_model_type = DeiTConfig.model_type
    num_prefix_tokens = 2
    classifier_reads_patches = False
    keys_to_ignore_at_inference = [*TntViTConfig.keys_to_ignore_at_inference, "cls_logits", "distillation_logits"]

    distillation_head_in_loss: bool = False

    def validate(self) -> None:
        """As in [`TokenPruningFields`]."""
        reads = self.classifier_reads_patches
        require(reads is False, "classifier_reads_patches", "False in a distilled DeiT", reads)
        super().validate()


__all__ = ["TntDeiTConfig", "TntViTConfig", "TokenPruningFields"]
