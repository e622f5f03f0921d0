"""What a model takes in time under any schedule, from a few timings of its parts."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from statistics import median

import numpy as np
import torch

from ..configuration_tnt import TntDeiTConfig, TntViTConfig
from ..inference import evaluation_mode
from ..modeling_tnt import TntDeiTForImageClassification, TntViTForImageClassification
from ..schedules_tnt import Schedule, count_patches, height_and_width
from ..timing import timed
from ..token_reduction_tnt import EMBEDDINGS, ReductionStep, TokenState


MEASURED_GEOMETRY = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_prefix_tokens"),
    *("token_reduction", "classifier_reads_patches"),
)


@dataclass(frozen=True)
class MeasuredCost:
    """
    Seconds that an image takes on one device under any schedule, from tables that [`measure_cost`] fills.

    Called with a config and a schedule, that of the config if None, it adds up every layer at its number of tokens and
    every reduction. It fits the `cost` of [`~tnt_hf.schedules_tnt.schedule_for`] and `set_budget`.

    Args:
        geometry (`dict[str, int | str]`): What the config of a model must have in common with the measured one.
        layer (`tuple[float, ...]`):
            Seconds for one image of one layer at 0, 1, 2, ... patch tokens, prefix tokens on top.
        mlp (`tuple[float, ...]`): Likewise of the part of it that follows the attention.
        last_layer (`tuple[float, ...]`): Likewise of the last layer, which computes only what the classifier reads.
        selection (`tuple[float, ...]`): Likewise of one selection by relevance, without similar tokens.
        similarity (`tuple[float, ...]`): Likewise of one similarity step.
        other (`float`): Seconds for one image of embeddings, final LayerNorm and classifiers.

    Example:

    ```python
    >>> model.set_budget(speedup=1.5, cost=measure_cost(model, batch_size=32))
    ```
    """

    geometry: dict[str, int | str]
    layer: tuple[float, ...]
    mlp: tuple[float, ...]
    last_layer: tuple[float, ...]
    selection: tuple[float, ...]
    similarity: tuple[float, ...]
    other: float

    def __call__(self, config: TntViTConfig | TntDeiTConfig, schedule: Schedule | None = None) -> float:
        """
        Predicted seconds for one image.

        Raises:
            ValueError: If the model of the config is not the measured one in width, attention heads, prefix tokens,
                token reduction, what its classifier reads or number of patches.
        """
        for name, measured in self.geometry.items():
            if getattr(config, name) != measured:
                raise ValueError(
                    f"The cost was measured with {name}={measured}, got a config with {name}={getattr(config, name)}: "
                    "measure it with that model and image size."
                )
        last_layer = config.num_hidden_layers - 1
        steps = config.reduction_steps(schedule=schedule)
        total = self.other + self.reduction_seconds(steps)
        counts = config.patch_token_counts(schedule=schedule)
        for layer, (entering, left) in enumerate(pairwise(counts)):
            is_cut = layer == last_layer and all(step.layer != last_layer for step in steps)
            total += (self.last_layer if is_cut else self.layer)[entering]
            if config.reduces_before_mlp:
                total += self.mlp[left] - self.mlp[entering]
        return total

    def reduction_seconds(self, steps: Sequence[ReductionStep]) -> float:
        """The part of the seconds that goes into scoring, ranking, similarities and copying what is kept."""
        total = 0.0
        for step in steps:
            if step.uses_scores:
                total += self.selection[step.num_tokens]
            if step.num_similar > 0:
                total += self.similarity[step.num_kept + step.num_similar]
        return total


@torch.inference_mode()
def measure_cost(
    model: TntViTForImageClassification | TntDeiTForImageClassification,
    batch_size: int,
    image_size: int | Sequence[int] | None = None,
    num_counts: int = 8,
    repeats: int = 10,
) -> MeasuredCost:
    """
    Time the parts of a model on its device, in its dtype.

    One layer, the last layer, the selection and the similarity step are timed at `num_counts` numbers of tokens from
    one patch token to all. Medians are taken, more tokens never take less time than fewer, and between the measured
    numbers the time is linear.

    Args:
        model: The classifier; its schedule does not matter, and it is left as it is.
        batch_size (`int`): Images in a batch.
        image_size (`int` or `(height, width)`, *optional*): Pixels; `config.image_size` if None.
        num_counts (`int`): Numbers of tokens to time, at least 2.
        repeats (`int`): Timings of each part, after one that is dropped.

    Raises:
        ValueError: If `batch_size`, `num_counts` or `repeats` is too small.
    """
    for name, value, lowest in (("batch_size", batch_size, 1), ("num_counts", num_counts, 2), ("repeats", repeats, 1)):
        if value < lowest:
            raise ValueError(f"`{name}` must be at least {lowest}, got {value}.")
    config = model.config
    height, width = height_and_width(config.image_size if image_size is None else image_size)
    num_patches, num_prefix_tokens = count_patches((height, width), config.patch_size), config.num_prefix_tokens
    counts = sorted({round(count) for count in np.linspace(1, num_patches, num_counts)})
    pixel_values = torch.zeros(batch_size, config.num_channels, height, width, dtype=model.dtype, device=model.device)
    shape = (batch_size, num_prefix_tokens + num_patches, config.hidden_size)
    tokens = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(model.device, model.dtype)

    backbone = model.base_model
    num_read = None if config.classifier_reads_patches else num_prefix_tokens
    parts = {("other", 0): partial(_run_other, model, pixel_values, tokens)}
    for count in counts:
        first_tokens = tokens[:, : num_prefix_tokens + count].contiguous()
        bias = torch.zeros(first_tokens.shape[:2], device=model.device) if config.merges else None
        parts["layer", count] = partial(backbone.layers[0], first_tokens, attention_bias=bias)
        parts["mlp", count] = partial(_run_mlp, backbone.layers[0], first_tokens)
        parts["last_layer", count] = partial(
            backbone.layers[-1], first_tokens, attention_bias=bias, num_output_tokens=num_read
        )
        parts["selection", count] = partial(_run_reduction, backbone, first_tokens, by_relevance=True)
        parts["similarity", count] = partial(_run_reduction, backbone, first_tokens, by_relevance=False)
    with evaluation_mode(model):
        rounds = [{part: timed(run, model.device)[1] for part, run in parts.items()} for _ in range(repeats + 1)]
    seconds = {part: median(times[part] for times in rounds[1:]) / batch_size for part in parts}

    def table(name):
        measured = [*accumulate((seconds[name, count] for count in counts), max)]
        return tuple(np.interp(range(num_patches + 1), counts, measured).tolist())

    return MeasuredCost(
        geometry={name: getattr(config, name) for name in MEASURED_GEOMETRY} | {"num_patches": num_patches},
        layer=table("layer"),
        mlp=table("mlp"),
        last_layer=table("last_layer"),
        selection=table("selection"),
        similarity=table("similarity"),
        other=seconds["other", 0],
    )


def _run_other(model: torch.nn.Module, pixel_values: torch.Tensor, tokens: torch.Tensor) -> None:
    is_resized = pixel_values.shape[-2:] != height_and_width(model.config.image_size)
    model.base_model.embeddings(pixel_values, interpolate_pos_encoding=is_resized)
    read = tokens if model.config.classifier_reads_patches else tokens[:, : model.config.num_prefix_tokens]
    for name, inputs in zip(model.head_names, model.head_inputs(model.base_model.layernorm(read))):
        getattr(model, name)(inputs)


def _run_mlp(layer: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return tokens + layer.mlp(layer.layernorm_after(tokens))


def _run_reduction(backbone: torch.nn.Module, tokens: torch.Tensor, *, by_relevance: bool) -> None:
    config = backbone.config
    state = TokenState(tokens, config, merges=config.merges)
    count = tokens.shape[1] - config.num_prefix_tokens
    if by_relevance:
        scores = backbone.relevance_scores(0, tokens) if config.uses_scores else None
        num_leaving = count // (8 if config.merges else 2)  # merging takes longer the more tokens leave
        state.reduce(ReductionStep(0, count, count - num_leaving, 0), scores)
    else:
        state.reduce(ReductionStep(EMBEDDINGS, count, count - count // 4, count // 4))


__all__ = ["MeasuredCost", "measure_cost"]
