import numpy as np
import pytest
import torch
from conftest import RESULTS, TINY
from PIL import Image
from transformers import ViTImageProcessorPil

from tnt_hf import TntViTConfig, TntViTForImageClassification
from tnt_hf.conversion import evaluation_image_processor
from tnt_hf.visualization import dim_dropped, draw_kept_tokens, patch_grid, plot_accuracy, seen_images


def tiny_vit(**fields):
    torch.manual_seed(0)
    return TntViTForImageClassification(TntViTConfig(**{**TINY, **fields})).eval()


@pytest.fixture
def gradient():
    pixels = np.linspace(0, 255, 60 * 90 * 3).reshape(60, 90, 3)
    return Image.fromarray(pixels.astype(np.uint8))


def test_exactly_the_dropped_patches_are_dimmed(gradient):
    kept = torch.tensor([0, 4, 5])
    before, after = np.asarray(gradient), np.asarray(dim_dropped(gradient, kept, (2, 3)))
    changed = (before != after).any(-1)
    patches = changed.reshape(2, 30, 3, 30).mean((1, 3)).flatten()
    assert after.shape == before.shape
    assert (patches[kept] == 0).all() and (np.delete(patches, kept) > 0.95).all()


@pytest.mark.parametrize("grey", (0, 127, 255))
def test_dimming_shows_on_black_grey_and_white(grey):
    image = Image.new("RGB", (8, 8), (grey,) * 3)
    dimmed = np.asarray(dim_dropped(image, torch.tensor([0]), (1, 2)).convert("L"), dtype=int)
    assert abs(dimmed[0, 7] - dimmed[0, 0]) > 25


def test_seen_images_undo_the_processor(gradient):
    processor = ViTImageProcessorPil(size={"height": 60, "width": 90})
    (seen,) = seen_images(processor(gradient, return_tensors="pt")["pixel_values"], processor)
    assert np.abs(np.asarray(seen, dtype=int) - np.asarray(gradient, dtype=int)).max() <= 1


@pytest.mark.parametrize("schedule", (([2], [0.6], 8), ([1, 2, 4], [0.8, 0.8, 0.8], 10)))
def test_sheet_is_drawn_alike_and_leaves_the_schedule(gradient, tmp_path, schedule):
    model = tiny_vit()
    model.set_schedule(*schedule)
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    for name in ("first.png", "second.png"):
        draw_kept_tokens(model, processor, [gradient, gradient.rotate(90, expand=True)], tmp_path / name)
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()
    assert (model.config.prune_layers, model.config.keep_rates) == schedule[:2]
    width, height = Image.open(tmp_path / "first.png").size
    assert width > 500 and height > 300


def test_images_that_are_not_square_are_drawn_as_they_are(gradient, tmp_path):
    """A square model sees a squashed image; the sheet of a wide one is lower than that of a tall one."""
    model = tiny_vit(prune_layers=[2], keep_rates=[0.6])
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    heights = []
    for image in (gradient, gradient.rotate(90, expand=True)):
        draw_kept_tokens(model, processor, [image], tmp_path / "sheet.png")
        heights.append(Image.open(tmp_path / "sheet.png").height)
    assert heights[1] > 1.3 * heights[0]
    draw_kept_tokens(model, evaluation_image_processor((32, 32)), [gradient], tmp_path / "sheet.png")
    assert heights[0] < Image.open(tmp_path / "sheet.png").height < heights[1]  # a square crop of it


def test_grid_of_a_model_that_is_not_square():
    assert patch_grid(tiny_vit(image_size=[32, 48]).config) == (8, 12)


def test_sheet_needs_images_and_a_pruned_layer(gradient, tmp_path):
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    with pytest.raises(ValueError, match="at least one image"):
        draw_kept_tokens(tiny_vit(prune_layers=[2], keep_rates=[0.6]), processor, [], tmp_path / "sheet.png")
    with pytest.raises(ValueError, match="at least one pruned layer"):
        draw_kept_tokens(tiny_vit(), processor, [gradient], tmp_path / "sheet.png")


def test_plot_is_written_for_any_rows(tmp_path):
    for index, rows in enumerate((RESULTS["rows"], RESULTS["rows"][:1])):
        plot_accuracy({**RESULTS, "rows": rows}, tmp_path / f"{index}.png")
        assert Image.open(tmp_path / f"{index}.png").size == (1050, 675)
