"""
Methods that make a ViT cheaper without training, as settings of [`Reduction`], each at a budget; written from the
papers and from what the authors' code does besides.

A method that leaves something open offers several, of which unlabelled images decide.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import product

from transformers import ViTConfig

from tnt_hf.configuration_tnt import TntViTConfig
from tnt_hf.schedules_tnt import height_and_width, schedule_for
from tnt_hf.token_reduction_tnt import SIZE_BIAS

from .reduced_vit import (
    UNREDUCED,
    Reduction,
    Shape,
    count_products,
    equal_numbers,
    equal_rates,
    fit_budget,
    patch_grid,
)


ON_SMALLER_IMAGES = "+smaller_images"
PRUNED_SHARES = (0.0, 0.25, 0.5)
# The fewest rows of smaller images, as a share of the usual ones.
SMALLEST_GRID = 0.4
# Methods that drop tokens do so at as many places.
NUM_CUTS = 3

# Two simplifications for all methods: merged tokens stay in the order of the image, and the last layer, which computes
# [CLS] alone, is not reduced.

# arXiv 2210.09461, section 3.
TOKEN_MERGING = Reduction(metric="mean_keys")
# arXiv 2405.16148, section 3.2, protects tokens in all layers; the authors' code for images in the second half of them
# alone, at a lower margin and, in its last version, without a bias for sizes. Energy is ELU(cosine - margin) as there.
PITOME = [
    Reduction(
        rule="merge_energetic",
        metric="mean_keys",
        first_margin=first_margin,
        protects_from=protects_from,
        size_bias=size_bias,
    )
    for first_margin, protects_from, size_bias in ((0.9, 0.0, 1.0), (0.75, 0.5, 1.0), (0.75, 0.5, 0.0))
]
# arXiv 2403.10030, section 3, at the temperatures of the authors' code: exponents of similarity, informativeness and
# size of 1, 1/20 and 1/40. The authors fine-tune as well.
MULTI_CRITERIA = Reduction(
    metric="outputs",
    place="before_attention",
    scores="received_attention",
    compares_logarithms=True,
    score_penalty=1 / 20,
    size_penalty=1 / 40,
    penalizes_both=True,
    score_weight=1.0,
    is_mutual=True,
)
# arXiv 2305.17997, section 3.2, and the authors' code. A search among few schedules stands in for learned rates.
SORT_PRUNE_MERGE = Reduction(
    rule="sort_prune_merge", metric="outputs", scores="cls_attention", size_weight=0.0, shrinks_sizes=True
)
# arXiv 2202.07800, section 3. The fused token is the weighted mean of those dropped; there, where networks are trained
# for it, it is their weighted sum.
CLS_ATTENTION = Reduction(rule="drop", scores="cls_attention", fuses_dropped=True, size_weight=0.0, score_weight=1.0)
# arXiv 2508.00367, sections 3.3 and 4.2: the distance of the MLP's output from its input before the residual sum.
MLP_SHIFT = Reduction(rule="drop", scores="mlp_shift", place="after_layer")
RANDOM = Reduction(rule="drop", scores="random")
CLUSTERS = Reduction(metric="outputs", size_bias=SIZE_BIAS["cluster"], keeps_norm=True, weighs_distances=True)

# Of a network, a share of its products and a grid of smaller images: what the method offers.
Method = Callable[[ViTConfig, float, tuple[int, int] | None], Iterable[Reduction]]


def smaller_grids(config: ViTConfig) -> list[tuple[int, int]]:
    """Grids of fewer patches than usual, of the same shape or one column narrower, the finest first."""
    rows, columns = patch_grid(config)
    grids = [
        (row, column)
        for row in range(rows, int(SMALLEST_GRID * rows), -1)
        for column in (round(row * columns / rows), round(row * columns / rows) - 1)
    ]
    return grids[1:]


def candidates(config: ViTConfig, method: str, share: float) -> list[Reduction]:
    """
    What a method offers for a share of the executed products, one or several.

    Args:
        config (`ViTConfig`): The network.
        method (`str`): One of `METHODS`; one that reduces tokens may have `"+smaller_images"` behind it, and then
            offers smaller images on which it reduces further as well.
        share (`float`): Of the products of the network as it is.

    Raises:
        ValueError: If the method is unknown, or none of its settings meets the budget.
    """
    name = method.removesuffix(ON_SMALLER_IMAGES)
    if name not in METHODS or (name != method and name == "smaller_images"):
        raise ValueError(
            f"A method must be one of {', '.join(METHODS)}, or one of them that reduces tokens with "
            f"{ON_SMALLER_IMAGES} behind it, got {method!r}."
        )
    offered = [*METHODS[name](config, share, None)]
    if name != method:
        budget = share * count_products(config, UNREDUCED)
        for grid in smaller_grids(config):
            if grid[0] == grid[1] and count_products(config, Reduction(grid=grid)) > budget:
                offered += METHODS[name](config, share, grid)
    if not offered:
        raise ValueError(f"{method} cannot meet {share:g} of the network's products.")
    return offered


def _fitting(reductions: Sequence[Reduction], shapes: Callable[[int], Iterable[Shape]]) -> Method:
    """The method that offers each reduction with the counts of each shape that can meet the budget."""

    def offer(config, share, grid):
        for reduction, shape in product(reductions, shapes(config.num_hidden_layers)):
            with suppress(ValueError):
                yield fit_budget(config, replace(reduction, grid=grid), shape, share)

    return offer


def _equal_numbers_everywhere(num_layers: int) -> list[Shape]:
    return [partial(equal_numbers, range(num_layers - 1))]


def _equal_rates_everywhere(num_layers: int) -> list[Shape]:
    return [partial(equal_rates, range(num_layers - 1))]


def _equal_numbers_but_at_first(num_layers: int) -> list[Shape]:
    return [partial(equal_numbers, range(1, num_layers - 1))]


def _few_cuts(num_layers: int) -> list[Shape]:
    """A quarter of the depth apart, from the place that EViT starts at or earlier ones."""
    distance = num_layers // (NUM_CUTS + 1)
    places = [range(first, first + NUM_CUTS * distance, distance) for first in range(distance, -1, -1)]
    return [partial(equal_rates, layers) for layers in places]


def _searched(num_layers: int) -> list[Shape]:
    return [*_equal_numbers_but_at_first(num_layers), partial(equal_rates, range(1, num_layers * 2 // 3))]


def _smaller_images(config: ViTConfig, share: float, grid: None) -> Iterator[Reduction]:
    """The finest grid within the budget; sides are whole patches, so that it may stay below."""
    budget = share * count_products(config, UNREDUCED)
    options = [Reduction(grid=grid) for grid in smaller_grids(config)]
    yield from [option for option in options if count_products(config, option) <= budget][:1]


def _clusters(config: ViTConfig, share: float, grid: tuple[int, int] | None) -> Iterator[Reduction]:
    """What `TntViTForImageClassification` does with clusters."""
    settings = config.to_dict() | {"token_reduction": "cluster"}
    del settings["model_type"]
    tnt_config = TntViTConfig(**settings)
    patch_size = height_and_width(config.patch_size)
    size = None if grid is None else tuple(count * side for count, side in zip(grid, patch_size))

    def as_reduction(schedule):
        return replace(CLUSTERS, counts=tuple(tnt_config.patch_token_counts(schedule=schedule)[1:-1]), grid=grid)

    def cost(_, schedule):
        return count_products(config, as_reduction(schedule) if schedule.compute_size or grid is None else UNREDUCED)

    yield as_reduction(schedule_for(tnt_config, speedup=1 / share, cost=cost, compute_size=size))


METHODS = {
    "clusters": _clusters,
    "smaller_images": _smaller_images,
    "random": _fitting([RANDOM], _few_cuts),
    "cls_attention": _fitting([CLS_ATTENTION], _few_cuts),
    "mlp_shift": _fitting([MLP_SHIFT], _few_cuts),
    "token_merging": _fitting([TOKEN_MERGING], _equal_numbers_everywhere),
    "pitome": _fitting(PITOME, _equal_rates_everywhere),
    "multi_criteria": _fitting([MULTI_CRITERIA], _equal_numbers_but_at_first),
    "sort_prune_merge": _fitting(
        [replace(SORT_PRUNE_MERGE, pruned_share=pruned_share) for pruned_share in PRUNED_SHARES], _searched
    ),
}


__all__ = ["METHODS", "ON_SMALLER_IMAGES", "candidates", "smaller_grids"]
