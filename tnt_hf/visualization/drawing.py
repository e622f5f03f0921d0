"""Pictures: accuracy against cost, how relevant the patches of an image are, and what each pruned layer leaves."""

import math
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from PIL import Image as PILImage
from transformers import BaseImageProcessor

from ..modeling_tnt import TntDeiTForImageClassification, TntViTForImageClassification
from ..results import ResultRow
from ..schedules_tnt import UNPRUNED, Schedule, count_gflops, height_and_width
from ..token_reduction_tnt import capacity_noise_gate
from .token_trace import PrunedLayer, trace_tokens


# Okabe and Ito's colours, told apart with every kind of colour vision; the markers differ too.
SELECTION_STYLES: dict[str, dict[str, Any]] = {
    "none": {"color": "black", "marker": "s", "label": "unpruned"},
    "relevance": {"color": "#0072B2", "marker": "o", "label": "learned scores"},
    "similarity": {"color": "#0072B2", "marker": "o", "label": "merged by similarity"},
    "random": {"color": "#D55E00", "marker": "^", "label": "random control"},
}
# A bluish grey between the black and white grounds of photographs and drawings, so that dimming shows on both.
DIMMED = np.array((0.55, 0.65, 0.75))
DIMMED_SHARE = 0.85
SHOWN_AREA = 320**2  # pixels of an image in a sheet or on a page
# Perceptually uniform, and told apart with every kind of colour vision.
RELEVANCE_COLORMAP = matplotlib.colormaps["viridis"]
RELEVANCE_SHARE = 0.65
CHANGED = "#D55E00"
MERGED_EDGE = (86, 180, 233)
# Inches. Placed by hand: Matplotlib's layouts squeeze all columns where one image is tall.
COLUMN, MAX_HEIGHT, GAP, LINE = 2.5, 5.0, 0.15, 0.24


class Answer(NamedTuple):
    """What is written below a picture, and whether it is another class than that of the unpruned model."""

    caption: str
    is_changed: bool


# Of a sheet: a header, a picture for each image, and the answer below each, if any.
Column = tuple[str, list[PILImage.Image], list[Answer] | None]


def plot_accuracy(rows: Sequence[ResultRow], dataset: str, path: str | Path) -> None:
    """
    Plot top-1 (percent) against GFLOPs for one image, a point for each row.

    Args:
        rows (`Sequence[ResultRow]`): Of a results file, or of [`~tnt_hf.evaluation.evaluate_schedules`].
        dataset (`str`): What the images are called, for the title.
        path (`str` or `Path`): The picture to write; its suffix sets the format.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained", dpi=150)
    axes = figure.subplots()
    for selection, style in SELECTION_STYLES.items():
        own = sorted((row for row in rows if row.selection == selection), key=lambda row: row.gflops)
        if own:
            points = [row.gflops for row in own], [row.top1 for row in own]
            axes.plot(*points, linestyle="--" if selection == "random" else "-", markersize=8, **style)
    for schedule, gflops in {row.schedule: row.gflops for row in rows}.items():
        highest = max(row.top1 for row in rows if row.schedule == schedule)
        axes.annotate(schedule, (gflops, highest), xytext=(0, 9), textcoords="offset points", ha="center", fontsize=11)
    axes.margins(x=0.12, y=0.18)
    title = f"{rows[0].num_images} images of {_literal(dataset)}"
    axes.set_title(title, fontsize=13, wrap=True)
    axes.set_xlabel("GFLOPs for one image (multiply-accumulates)", fontsize=12)
    axes.set_ylabel("top-1 accuracy (%)", fontsize=12)
    axes.tick_params(labelsize=11)
    axes.grid(color="0.9")
    axes.legend(fontsize=11)
    figure.savefig(path)


def draw_kept_tokens(
    model: TntViTForImageClassification | TntDeiTForImageClassification,
    image_processor: BaseImageProcessor,
    images: Sequence[PILImage.Image],
    path: str | Path,
    schedule: Schedule | None = None,
    max_layers: int = 3,
) -> None:
    """
    Draw a sheet with a row for each image: what the model sees, the relevance of the patches by which the first pruned
    layer selects, if it does, and what is left after each pruned layer; below them the most probable class with its
    probability, unpruned and pruned.

    Args:
        model: The classifier.
        image_processor ([`BaseImageProcessor`]): The checkpoint's.
        images (`Sequence[PIL.Image.Image]`): Images of any size and mode, drawn in the shape that the model sees of
            them.
        path (`str` or `Path`): The picture to write; its suffix sets the format.
        schedule (`Schedule`, *optional*): What to show, by its name; the model's own schedule if None.
        max_layers (`int`): How many pruned layers to show, the last and others evenly between; with 3 a sheet is
            legible on a page that shows it some 900 pixels wide.

    Raises:
        ValueError: If there are no images, or the schedule prunes no layer.
    """
    config = model.config
    schedule = config.schedule if schedule is None else schedule
    if not schedule.prune_layers:
        raise ValueError("Kept tokens need a schedule with at least one pruned layer, got `prune_layers` [].")
    pixel_values, views = _views(image_processor, images)
    unpruned, _ = trace_tokens(model, pixel_values, UNPRUNED)
    logits, layers = trace_tokens(model, pixel_values, schedule)
    title = f"{schedule.name + ': ' if schedule.name else ''}{_describe(config, schedule)}"
    answers = _answers(model, logits, unpruned)
    grid, num_patches = patch_grid(config, schedule), config.num_patches_of(schedule)

    columns = [(f"unpruned\n{config.num_patches} patches", views, _answers(model, unpruned, unpruned))]
    is_ranked = (
        config.uses_scores and config.selection == "relevance" and (not config.merges or config.relevance_weight > 0)
    )
    if is_ranked:
        maps = [relevance_map(*of_image, grid) for of_image in zip(layers[0].relevance, layers[0].ranked)]
        pictures = [draw_relevance(view, values) for view, values in zip(views, maps)]
        columns.append((f"relevance (log scale)\nafter layer {layers[0].layer}", pictures, None))
    shown = np.linspace(len(layers) - 1, 0, min(len(layers), max_layers)).round().astype(int)
    for layer in (layers[index] for index in reversed(shown)):
        header = f"after layer {layer.layer}\n{layer.kept.shape[1]} of {num_patches} {_unit(config)}"
        columns.append((header, draw_left(views, layer, grid), answers if layer is layers[-1] else None))

    figure, axes = _draw_sheet(views, columns, title)
    if is_ranked:
        for ax, view, values in zip(axes[:, 1], views, maps):
            _add_colour_bar(ax, values, _drawn_height(view))
    figure.savefig(path)


def draw_schedules(
    model: TntViTForImageClassification | TntDeiTForImageClassification,
    image_processor: BaseImageProcessor,
    images: Sequence[PILImage.Image],
    schedules: Sequence[Schedule],
    path: str | Path,
    show_answers: bool = True,
) -> None:
    """
    Draw schedules side by side: a row for each image, a column for each schedule with what is left in the end.

    Args:
        model: The classifier; its own schedule does not matter and is not changed.
        image_processor ([`BaseImageProcessor`]): The checkpoint's.
        images (`Sequence[PIL.Image.Image]`): As in [`draw_kept_tokens`].
        schedules (`Sequence[Schedule]`): Schedules of this model.
        path (`str` or `Path`): The picture to write; its suffix sets the format.
        show_answers (`bool`): Whether the answers stand below the images.

    Raises:
        ValueError: If there are no images, or the model cannot carry out a schedule.
    """
    pixel_values, views = _views(image_processor, images)
    columns: list[Column] = _schedule_columns(model, pixel_values, views, schedules)
    columns = columns if show_answers else [(header, pictures, None) for header, pictures, _ in columns]
    figure, _ = _draw_sheet(views, columns, f"Patches {_past_tense(model.config)} at {len(schedules)} budgets")
    figure.savefig(path)


def draw_overview(
    model: TntViTForImageClassification | TntDeiTForImageClassification,
    image_processor: BaseImageProcessor,
    image: PILImage.Image,
    schedules: Sequence[Schedule],
    path: str | Path,
) -> None:
    """
    Draw the method on one image: above, how noise teaches relevance in training, at the first layer with noise; below,
    what is left of the image under some schedules.

    Args:
        model: The classifier; its own schedule does not matter and is not changed.
        image_processor ([`BaseImageProcessor`]): The checkpoint's.
        image (`PIL.Image.Image`): As in [`draw_kept_tokens`].
        schedules (`Sequence[Schedule]`): Schedules of this model.
        path (`str` or `Path`): The picture to write; its suffix sets the format.

    Raises:
        ValueError: If no scoring head of the model learns, or it cannot carry out a schedule.
    """
    config = model.config
    if config.num_learning_layers == 0:
        raise ValueError(
            "An overview needs a model whose scoring heads learn from noise, got "
            f"token_reduction={config.token_reduction!r}, num_noise_layers={config.num_noise_layers} and "
            f"noise_std={config.noise_std}."
        )
    pixel_values, (view,) = _views(image_processor, [image])
    logits, (scored,) = trace_tokens(model, pixel_values, Schedule("nothing dropped", (0,), (1.0,)))
    relevance = relevance_map(scored.relevance[0], scored.ranked[0], patch_grid(config, UNPRUNED))
    amount = 1 - relevance
    if config.noise_gate == "capacity":
        amount = capacity_noise_gate(scored.relevance.log(), torch.tensor([0.5])).numpy().reshape(relevance.shape)
    noisy = _noisy_logits(model, pixel_values)
    steps = [
        (f"{config.num_patches} patches\nwithout noise", [view], _answers(model, logits, logits)),
        ("relevance by\na scoring head", [draw_relevance(view, relevance)], None),
        ("noise, less where\nrelevance is high", [_draw_noise(view, amount)], _answers(model, noisy, logits)),
    ]

    budgets = _schedule_columns(model, pixel_values, [view], schedules)
    title = 3 * LINE  # inches of one, with the space around it
    middle = title + _height([view], steps)
    figure = Figure(figsize=(max(4, len(budgets)) * (COLUMN + GAP), middle + title + _height([view], budgets)), dpi=85)
    for top, text in (
        (0, "Training: scoring heads learn where noise does not matter, the network is frozen"),
        (middle, f"Inference: one checkpoint at any budget, tokens are {_past_tense(config)}"),
    ):
        y = 1 - (top + LINE / 2) / figure.get_figheight()
        figure.text(0.5, y, text, fontsize=15, weight="bold", ha="center", va="top")
    (axes,) = _draw_columns(figure, [view], steps, title, pitch=1.4 * COLUMN)
    for ax in axes[1:]:
        ax.annotate("", (-0.06, 0.5), (-0.34, 0.5), "axes fraction", arrowprops={"arrowstyle": "-|>", "linewidth": 2})
    _draw_columns(figure, [view], budgets, middle + title)
    figure.savefig(path)


def _schedule_columns(
    model: torch.nn.Module, pixel_values: torch.Tensor, views: list[PILImage.Image], schedules: Sequence[Schedule]
) -> list[Column]:
    """For each schedule: its name and cost, what is left in the end, and the answers."""
    config, columns = model.config, []
    unpruned, _ = trace_tokens(model, pixel_values, UNPRUNED)
    for schedule in schedules:
        logits, layers = trace_tokens(model, pixel_values, schedule)
        gflops = count_gflops(config, schedule=schedule)
        num_patches = config.num_patches_of(schedule)
        num_left = layers[-1].kept.shape[1] if layers else num_patches
        header = f"{fill(schedule.name, 24)}\n{gflops:.4g} GFLOPs\n{num_left} of {num_patches} {_unit(config)}"
        pictures = draw_left(views, layers[-1], patch_grid(config, schedule)) if layers else views
        columns.append((header, pictures, _answers(model, logits, unpruned)))
    return columns


def patch_grid(config: Any, schedule: Schedule | None = None) -> tuple[int, int]:
    """Rows and columns of patches of an image of `config.image_size` under a schedule, that of the config if None."""
    size = (schedule or config).compute_size or config.image_size
    (height, width), (patch_height, patch_width) = map(height_and_width, (size, config.patch_size))
    return height // patch_height, width // patch_width


def dim_dropped(image: PILImage.Image, kept_indices: torch.Tensor, grid: tuple[int, int]) -> PILImage.Image:
    """
    The image with the patches that were dropped blended into one tone.

    Args:
        image (`PIL.Image.Image`): RGB image of any size; the grid is laid over the whole of it.
        kept_indices (`torch.LongTensor` of shape `(num_kept,)`): Row-major positions on the grid.
        grid (`tuple[int, int]`): Rows and columns of patches.
    """
    is_dropped = np.ones(grid, dtype=bool)
    is_dropped.flat[kept_indices.numpy()] = False
    pixels = np.asarray(image, dtype=np.float32)
    dimmed = (1 - DIMMED_SHARE) * pixels + DIMMED_SHARE * 255 * DIMMED
    pixels = np.where(_enlarge(is_dropped, image.size)[..., None], dimmed, pixels)
    return PILImage.fromarray(pixels.round().astype(np.uint8))


def relevance_map(relevance: torch.Tensor, positions: torch.Tensor, grid: tuple[int, int]) -> np.ndarray:
    """
    Relevance of tokens on the patch grid.

    Args:
        relevance (`torch.Tensor` of shape `(num_tokens,)`): Of each token; see [`PrunedLayer`].
        positions (`torch.LongTensor` of shape `(num_tokens,)`): Row-major positions on the grid.
        grid (`tuple[int, int]`): Rows and columns of patches.

    Returns:
        `np.ndarray` of shape `grid`, float64: NaN where there is no token.
    """
    values = np.full(grid, np.nan)
    values.flat[positions.numpy()] = relevance.numpy()
    return values


def draw_relevance(image: PILImage.Image, values: np.ndarray) -> PILImage.Image:
    """
    The image in grey under a heat map of the relevance of its patches: on a logarithmic scale, dark blue is the lowest
    and yellow the highest of the image.

    Args:
        image (`PIL.Image.Image`): RGB image of any size; the map is laid over the whole of it.
        values (`np.ndarray` of shape `(rows, columns)`): Relevance above 0, NaN where there is none; such patches are
            dimmed as in [`dim_dropped`].
    """
    colours = RELEVANCE_COLORMAP(_relevance_norm(values)(values))[..., :3]
    colours = np.where(np.isnan(values)[..., None], DIMMED, colours)
    heat = _enlarge((255 * colours).round().astype(np.uint8), image.size)
    return PILImage.blend(image.convert("L").convert("RGB"), PILImage.fromarray(heat), RELEVANCE_SHARE)


def draw_merged(image: PILImage.Image, groups: torch.Tensor, grid: tuple[int, int]) -> PILImage.Image:
    """
    The image with the patches that share a token filled with their mean colour, and a line around them.

    Args:
        image (`PIL.Image.Image`): RGB image of any size; the grid is laid over the whole of it.
        groups (`torch.LongTensor` of shape `(num_patches,)`): Equal where patches share a token, row-major.
        grid (`tuple[int, int]`): Rows and columns of patches.
    """
    means = np.asarray(image.resize(grid[::-1], PILImage.Resampling.BOX), dtype=np.float32).reshape(-1, 3)
    _, tokens, sizes = np.unique(groups.numpy(), return_inverse=True, return_counts=True)
    colours = np.stack([np.bincount(tokens, channel) for channel in means.T], axis=-1) / sizes[:, None]
    is_merged = _enlarge((sizes[tokens] > 1).reshape(grid), image.size)
    pixels = np.where(is_merged[..., None], _enlarge(colours[tokens].reshape(*grid, 3), image.size), np.asarray(image))
    token_of_pixel = np.pad(_enlarge(tokens.reshape(grid), image.size), 1, mode="edge")
    inner = token_of_pixel[1:-1, 1:-1]
    is_edge = (inner != token_of_pixel[2:, 1:-1]) | (inner != token_of_pixel[1:-1, 2:])
    is_edge |= (inner != token_of_pixel[:-2, 1:-1]) | (inner != token_of_pixel[1:-1, :-2])
    pixels[is_edge & is_merged] = MERGED_EDGE
    return PILImage.fromarray(pixels.round().astype(np.uint8))


def seen_images(pixel_values: torch.Tensor, image_processor: BaseImageProcessor) -> list[PILImage.Image]:
    """
    The images as the model sees them, in the colours that the image processor had before it rescaled them.

    Args:
        pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): Output of the processor.
        image_processor ([`BaseImageProcessor`]): The processor.

    Returns:
        `list[PIL.Image.Image]`: RGB images of `height` times `width` pixels.
    """
    size = pixel_values.shape[-1], pixel_values.shape[-2]
    black, white = (
        image_processor(PILImage.new("RGB", size, colour), return_tensors="pt")["pixel_values"][0].double()
        for colour in ("black", "white")
    )
    pixels = 255 * (pixel_values.double().cpu() - black) / (white - black)
    return [PILImage.fromarray(image.round().clamp(0, 255).byte().permute(1, 2, 0).numpy()) for image in pixels]


def shown_images(
    pixel_values: torch.Tensor, image_processor: BaseImageProcessor, images: Sequence[PILImage.Image]
) -> list[PILImage.Image]:
    """
    What the model sees, enlarged or reduced to be looked at: in the shapes of the images, unless it sees centre crops.

    Args:
        pixel_values, image_processor: As in [`seen_images`].
        images (`Sequence[PIL.Image.Image]`): Where the pixel values come from.

    Returns:
        `list[PIL.Image.Image]`: RGB images of about `SHOWN_AREA` pixels.
    """
    shown = []
    for view, image in zip(seen_images(pixel_values, image_processor), images):
        shape = view if getattr(image_processor, "do_center_crop", False) else image
        scale = math.sqrt(SHOWN_AREA / (shape.width * shape.height))
        size = [max(1, round(scale * side)) for side in shape.size]
        shown.append(view.resize(size, PILImage.Resampling.BICUBIC))
    return shown


def _draw_noise(image: PILImage.Image, amount: np.ndarray) -> PILImage.Image:
    """Noise on the pixels of an image, by the amount from 0 to 1 of each patch."""
    noise = np.random.default_rng(0).normal(0, 80, (image.height, image.width, 1))
    pixels = np.asarray(image) + noise * _enlarge(amount, image.size)[..., None]
    return PILImage.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def _views(
    image_processor: BaseImageProcessor, images: Sequence[PILImage.Image]
) -> tuple[torch.Tensor, list[PILImage.Image]]:
    """Pixel values, and the images as the model sees them, in the shape to draw them in."""
    if not images:
        raise ValueError("Kept tokens need at least one image, got none.")
    images = [image.convert("RGB") for image in images]
    pixel_values = image_processor(images, return_tensors="pt")["pixel_values"]
    return pixel_values, shown_images(pixel_values, image_processor, images)


def draw_left(views: Sequence[PILImage.Image], layer: PrunedLayer, grid: tuple[int, int]) -> list[PILImage.Image]:
    """
    What a pruned layer leaves of images: dropped patches dimmed, or patches that share a token filled.

    Args:
        views (`Sequence[PIL.Image.Image]`): RGB images of any size; the grid is laid over the whole of each.
        layer ([`PrunedLayer`]): What the layer did to them.
        grid (`tuple[int, int]`): Rows and columns of patches.
    """
    if layer.groups is None:
        return [dim_dropped(view, kept, grid) for view, kept in zip(views, layer.kept)]
    return [draw_merged(view, groups, grid) for view, groups in zip(views, layer.groups)]


def _draw_sheet(views: list[PILImage.Image], columns: list[Column], title: str) -> tuple[Figure, np.ndarray]:
    """A titled figure and its axes; see [`_draw_columns`]."""
    title = "\n".join(fill(line, 25 * len(columns)) for line in title.split("\n"))
    top = LINE * (1 + title.count("\n")) + 2 * GAP
    figure = Figure(figsize=((COLUMN + GAP) * len(columns) + GAP, top + _height(views, columns)), dpi=100)
    figure.suptitle(title, fontsize=14, y=1 - GAP / figure.get_figheight(), va="top")
    return figure, _draw_columns(figure, views, columns, top)


def _draw_columns(
    figure: Figure, views: list[PILImage.Image], columns: list[Column], top: float, pitch: float = COLUMN + GAP
) -> np.ndarray:
    """
    A row for each view, a column for each of `columns`, from `top` inches below the upper edge, `pitch` inches apart;
    answers that differ from those of the unpruned model stand out.
    """
    width, height = figure.get_size_inches()
    left = (width - pitch * (len(columns) - 1) - COLUMN) / 2
    top += LINE * _num_header_lines(columns)
    axes = np.empty((len(views), len(columns)), dtype=object)
    for row, view in enumerate(views):
        for column, (header, pictures, answers) in enumerate(columns):
            box = (left + pitch * column, height - top - _drawn_height(view), COLUMN, _drawn_height(view))
            ax = axes[row, column] = figure.add_axes(np.divide(box, (width, height, width, height)))
            ax.imshow(pictures[row])
            ax.set(xticks=[], yticks=[], title=header if row == 0 else "")
            ax.spines[:].set_visible(False)
            if answers is not None:
                ax.set_xlabel(answers[row].caption, color=CHANGED if answers[row].is_changed else "black")
            ax.title.set_fontsize(14)
            ax.xaxis.label.set_fontsize(14)
        top += _drawn_height(view) + 2 * LINE
    return axes


def _height(views: list[PILImage.Image], columns: list[Column]) -> float:
    return LINE * _num_header_lines(columns) + sum(_drawn_height(view) + 2 * LINE for view in views)


def _num_header_lines(columns: list[Column]) -> int:
    return 1 + max(header.count("\n") for header, *_ in columns)


def _drawn_height(view: PILImage.Image) -> float:
    return min(COLUMN * view.height / view.width, MAX_HEIGHT)


def _relevance_norm(values: np.ndarray) -> LogNorm:
    return LogNorm(np.nanmin(values), np.nanmax(values))


def _add_colour_bar(ax: Axes, values: np.ndarray, height: float) -> None:
    """A bar below a heat map of some height in inches, with the lowest and the highest relevance."""
    norm = _relevance_norm(values)
    bar = ax.figure.colorbar(
        ScalarMappable(norm, RELEVANCE_COLORMAP),
        cax=ax.inset_axes((0.22, -0.25 / height, 0.56, 0.12 / height)),
        orientation="horizontal",
    )
    bar.set_ticks([])
    bar.minorticks_off()
    for x, value, side in ((-0.04, norm.vmin, "right"), (1.04, norm.vmax, "left")):
        bar.ax.text(x, 0.5, f"{value:.1g}", ha=side, va="center", transform=bar.ax.transAxes, fontsize=14)


def _enlarge(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Values on the patch grid for each pixel of an image of a width and a height."""
    columns, rows = (
        (np.arange(pixels) + 0.5) * patches // pixels for pixels, patches in zip(size, values.shape[1::-1])
    )
    return values[rows.astype(int)[:, None], columns.astype(int)]


def _noisy_logits(model: torch.nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """The answers of a step of training; dropout, if there is any, is off."""
    was_training, model.base_model.training = model.base_model.training, True
    try:
        generator = torch.Generator().manual_seed(0)
        with torch.enable_grad():  # without gradients there is no noise
            return model(pixel_values.to(model.device, model.dtype), generator=generator).logits.detach()
    finally:
        model.base_model.training = was_training


def _describe(config: Any, schedule: Schedule) -> str:
    """Cost and schedule."""
    layers, rates = list(schedule.prune_layers), schedule.keep_rates
    if len(layers) > 4:
        is_run = layers == list(range(layers[0], layers[-1] + 1))
        layers = f"{layers[0]} to {layers[-1]}" if is_run else ", ".join(map(str, layers))
        rates = f"{min(rates):.3g} to {max(rates):.3g}"
    else:
        layers, rates = (", ".join(f"{value:.3g}" for value in values) for values in (layers, rates))
    similar = f", {schedule.num_similar_tokens} similar tokens" if schedule.num_similar_tokens else ""
    selection = ", random selection" if config.selection == "random" else ""
    return (
        f"{count_gflops(config, schedule=schedule):.4g} GFLOPs for one image, unpruned "
        f"{count_gflops(config, schedule=UNPRUNED):.4g}\n"
        f"{_past_tense(config)} after layer {layers} (from 0), keep rate {rates}{similar}{selection}"
    )


def _past_tense(config: Any) -> str:
    return "merged" if config.merges else "dropped"


def _unit(config: Any) -> str:
    return "tokens" if config.merges else "patches"


def _literal(text: str) -> str:
    """Text that Matplotlib does not read as a formula."""
    return text.replace("$", r"\$")


def _answers(model: torch.nn.Module, logits: torch.Tensor, unpruned: torch.Tensor) -> list[Answer]:
    """The most probable class and its probability, for each row of logits `(batch_size, num_labels)`."""
    probabilities, labels = logits.float().softmax(dim=-1).max(dim=-1)
    is_changed = labels != unpruned.argmax(dim=-1)
    answers = []
    for label, probability, changed in zip(labels.tolist(), probabilities.tolist(), is_changed.tolist()):
        name = model.config.id2label[label]
        name = name if len(name) <= 18 else f"{name[:16].rstrip(' ,')}..."
        answers.append(Answer(f"{_literal(name)} {probability:.1%}", changed))
    return answers


__all__ = [
    "dim_dropped",
    "draw_kept_tokens",
    "draw_left",
    "draw_merged",
    "draw_overview",
    "draw_relevance",
    "draw_schedules",
    "patch_grid",
    "plot_accuracy",
    "relevance_map",
    "seen_images",
    "shown_images",
]
