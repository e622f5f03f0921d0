"""Pictures: accuracy against cost from a results file, and the patches that survive each pruned layer of an image."""

import math
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image as PILImage
from transformers import BaseImageProcessor

from .configuration_tnt import height_and_width
from .modeling_tnt import TntDeiTForImageClassification, TntViTForImageClassification
from .schedules import count_gflops


# Okabe and Ito's colours, told apart with every kind of colour vision; the markers differ too.
SELECTION_STYLES = {
    "none": {"color": "black", "marker": "s", "label": "unpruned"},
    "relevance": {"color": "#0072B2", "marker": "o", "label": "learned scores"},
    "random": {"color": "#D55E00", "marker": "^", "label": "random control"},
}
# A bluish grey between the black and white grounds of photographs and drawings, so that dimming shows on both.
DIMMED = np.array((0.55, 0.65, 0.75))
DIMMED_SHARE = 0.85
MAX_HEIGHT = 3  # of a drawn image, in its widths


def plot_accuracy(results: dict[str, Any], path: str | Path) -> None:
    """
    Plot top-1 (percent) against GFLOPs for one image, a point for each row of a results file.

    Args:
        results (`dict`): Content of a results.json; its `rows` are plotted.
        path (`str` or `Path`): The picture to write; its suffix sets the format.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained", dpi=150)
    axes = figure.subplots()
    for selection, style in SELECTION_STYLES.items():
        rows = sorted((row for row in results["rows"] if row["selection"] == selection), key=lambda row: row["gflops"])
        if rows:
            points = [row["gflops"] for row in rows], [row["top1"] for row in rows]
            axes.plot(*points, linestyle="--" if selection == "random" else "-", markersize=8, **style)
    gflops_of_schedules = {row["schedule"]: row["gflops"] for row in results["rows"]}
    for schedule, gflops in gflops_of_schedules.items():
        highest = max(row["top1"] for row in results["rows"] if row["schedule"] == schedule)
        axes.annotate(schedule, (gflops, highest), xytext=(0, 9), textcoords="offset points", ha="center", fontsize=11)
    axes.margins(x=0.12, y=0.18)
    title = f"{results['rows'][0]['num_images']} images of {_literal(results['dataset'])}"
    axes.set_title(title, fontsize=13, wrap=True)
    axes.set_xlabel("GFLOPs for one image (multiply-accumulates)", fontsize=12)
    axes.set_ylabel("top-1 accuracy (%)", fontsize=12)
    axes.tick_params(labelsize=11)
    axes.grid(color="0.9")
    axes.legend(fontsize=11)
    figure.savefig(path)


@torch.inference_mode()
def draw_kept_tokens(
    model: TntViTForImageClassification | TntDeiTForImageClassification,
    image_processor: BaseImageProcessor,
    images: Sequence[PILImage.Image],
    path: str | Path,
) -> None:
    """
    Draw a sheet with a row for each image: what the model sees, then the same with the patches that were dropped, or
    merged into others, dimmed after each pruned layer, and the most probable class with its probability, unpruned and
    pruned.

    Args:
        model: The classifier, under the schedule to show.
        image_processor ([`BaseImageProcessor`]): The checkpoint's.
        images (`Sequence[PIL.Image.Image]`): RGB images of any size, drawn in the shape that the model sees of them.
        path (`str` or `Path`): The picture to write; its suffix sets the format.

    Raises:
        ValueError: If there are no images, or the model prunes no layer.
    """
    config = model.config
    if not images:
        raise ValueError("Kept tokens need at least one image, got none.")
    if not config.prune_layers:
        raise ValueError("Kept tokens need a schedule with at least one pruned layer, got `prune_layers` [].")
    pixel_values = image_processor(list(images), return_tensors="pt")["pixel_values"].to(model.device, model.dtype)
    pruned = model.eval()(pixel_values)
    answers = zip(_answers(model, _unpruned_logits(model, pixel_values)), _answers(model, pruned.logits))
    views = [
        view.resize(_shown_size(view, image, image_processor), PILImage.Resampling.BICUBIC)
        for view, image in zip(seen_images(pixel_values, image_processor), images)
    ]
    kept = [indices.cpu() for indices in pruned.kept_indices]

    num_columns = 1 + len(config.prune_layers)
    heights = [
        2.8 * min(view.height / view.width, MAX_HEIGHT) + 0.55 for view in views
    ]  # inches, those of the title included
    figure = Figure(figsize=(2.9 * num_columns, 0.8 + sum(heights)), layout="constrained", dpi=110)
    axes = figure.subplots(len(views), num_columns, squeeze=False, height_ratios=heights)
    for row, (view, (before, after)) in enumerate(zip(views, answers)):
        axes[row, 0].imshow(view)
        axes[row, 0].set_title(f"unpruned\n{before}", fontsize=11)
        for column, (layer, indices) in enumerate(zip(config.prune_layers, kept), start=1):
            axes[row, column].imshow(dim_dropped(view, indices[row], patch_grid(config)))
            state = f"after layer {layer}: {indices.shape[1]} of {config.num_patches} patches"
            is_last = column == num_columns - 1
            axes[row, column].set_title(f"{state}\n{after if is_last else ''}", fontsize=11)
    for ax in axes.flat:
        ax.set_axis_off()
    layers = ", ".join(map(str, config.prune_layers))
    rates = ", ".join(f"{rate:g}" for rate in config.keep_rates)
    left = "Merged" if config.token_reduction == "merge" else "Dropped"
    figure.suptitle(
        f"{left} after layer {layers} (from 0), keep rate {rates}, {config.num_similar_tokens} similar tokens\n"
        f"{count_gflops(config):.4g} GFLOPs for one image, unpruned {_unpruned_gflops(model):.4g}",
        fontsize=11,
    )
    figure.savefig(path)


def patch_grid(config: Any) -> tuple[int, int]:
    """Rows and columns of patches of an image of `config.image_size`."""
    (height, width), (patch_height, patch_width) = map(height_and_width, (config.image_size, config.patch_size))
    return height // patch_height, width // patch_width


def dim_dropped(image: PILImage.Image, kept_indices: torch.Tensor, grid: tuple[int, int]) -> PILImage.Image:
    """
    The image with the patches that were dropped blended into one tone.

    Args:
        image (`PIL.Image.Image`): RGB image of any size; the grid is laid over the whole of it.
        kept_indices (`torch.LongTensor` of shape `(num_kept,)`): Row-major positions on the grid.
        grid (`tuple[int, int]`): Rows and columns of patches.
    """
    is_dropped = np.ones(grid, dtype=np.uint8)
    is_dropped.flat[kept_indices.numpy()] = 0
    mask = PILImage.fromarray(is_dropped * 255).resize(image.size, PILImage.Resampling.NEAREST)
    pixels = np.asarray(image, dtype=np.float32) / 255
    dimmed = (1 - DIMMED_SHARE) * pixels + DIMMED_SHARE * DIMMED
    blended = np.where(np.asarray(mask)[..., None] > 0, dimmed, pixels)
    return PILImage.fromarray((blended * 255).round().astype(np.uint8))


def seen_images(pixel_values: torch.Tensor, image_processor: BaseImageProcessor) -> list[PILImage.Image]:
    """
    The images as the model sees them, normalisation undone.

    Args:
        pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): Output of the processor.
        image_processor ([`BaseImageProcessor`]): The processor.

    Returns:
        `list[PIL.Image.Image]`: RGB images of `height` times `width` pixels.
    """
    pixels = pixel_values.float().cpu().permute(0, 2, 3, 1).numpy()
    if image_processor.do_normalize:
        pixels = pixels * np.asarray(image_processor.image_std) + np.asarray(image_processor.image_mean)
    scale = 255 if image_processor.do_rescale else 1
    return [PILImage.fromarray((scale * image).round().clip(0, 255).astype(np.uint8)) for image in pixels]


def _shown_size(view: PILImage.Image, image: PILImage.Image, image_processor: BaseImageProcessor) -> tuple[int, int]:
    """Width and height to draw a view in: the shape of the image, unless the model sees a centre crop of it."""
    shape = view if getattr(image_processor, "do_center_crop", False) else image
    scale = 320 / math.sqrt(shape.width * shape.height)
    return max(1, round(scale * shape.width)), max(1, round(scale * shape.height))


def _unpruned(model: torch.nn.Module, measure: Any) -> Any:
    config = model.config
    schedule = (config.prune_layers, config.keep_rates, config.num_similar_tokens, config.selection)
    config.set_schedule([], [])
    try:
        return measure()
    finally:
        config.set_schedule(*schedule)


def _unpruned_logits(model: torch.nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    return _unpruned(model, lambda: model.eval()(pixel_values).logits)


def _unpruned_gflops(model: torch.nn.Module) -> float:
    return _unpruned(model, lambda: count_gflops(model.config))


def _literal(text: str) -> str:
    """Text that Matplotlib does not read as a formula."""
    return text.replace("$", r"\$")


def _answers(model: torch.nn.Module, logits: torch.Tensor) -> list[str]:
    """The most probable class and its probability, for each row of logits `(batch_size, num_labels)`."""
    probabilities, labels = logits.float().softmax(dim=-1).max(dim=-1)
    return [
        f"{_literal(shorten(model.config.id2label[label], 28, placeholder='...'))} {probability:.1%}"
        for probability, label in zip(probabilities.tolist(), labels.tolist())
    ]


__all__ = ["dim_dropped", "draw_kept_tokens", "patch_grid", "plot_accuracy", "seen_images"]
