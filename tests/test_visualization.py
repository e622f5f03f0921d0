import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import RESULTS, TINY, naming
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from transformers import ViTImageProcessorPil

from tnt_hf import TntViTConfig, TntViTForImageClassification
from tnt_hf.conversion import evaluation_image_processor
from tnt_hf.named_schedules import parse_schedule, resolve_schedules
from tnt_hf.results import read_results
from tnt_hf.schedules_tnt import Schedule, count_gflops
from tnt_hf.visualization import (
    CHANGED,
    RELEVANCE_COLORMAP,
    RELEVANCE_SHARE,
    dim_dropped,
    draw_kept_tokens,
    draw_merged,
    draw_overview,
    draw_relevance,
    draw_schedules,
    patch_grid,
    plot_accuracy,
    relevance_map,
    schedules_to_draw,
    seen_images,
    sheet_name,
    trace_tokens,
)


PROCESSOR = ViTImageProcessorPil(size={"height": 32, "width": 32})


def tiny_vit(**fields):
    torch.manual_seed(0)
    return TntViTForImageClassification(TntViTConfig(**{**TINY, **fields})).eval()


@pytest.fixture
def gradient():
    pixels = np.linspace(0, 255, 60 * 90 * 3).reshape(60, 90, 3)
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture
def drawn(monkeypatch):
    """The pictures of a sheet, row by row."""
    pictures = []
    imshow = Axes.imshow

    def record(axes, picture, *args, **kwargs):
        if isinstance(picture, Image.Image):
            pictures.append(picture)
        return imshow(axes, picture, *args, **kwargs)

    monkeypatch.setattr(Axes, "imshow", record)
    return pictures


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


def test_exactly_the_patches_that_share_a_token_have_their_mean_colour(gradient):
    groups = torch.tensor([0, 1, 1, 3, 4, 1])
    before, after = np.asarray(gradient), np.asarray(draw_merged(gradient, groups, (2, 3)))
    patches = [pixels.reshape(2, 30, 3, 30, 3).swapaxes(1, 2).reshape(6, 30, 30, 3) for pixels in (before, after)]
    mean = patches[0][[1, 2, 5]].mean((0, 1, 2))
    for patch, (original, merged) in enumerate(zip(*patches)):
        if patch in (1, 2, 5):
            assert np.abs(merged[1:-1, 1:-1] - mean).max() < 1
        else:
            assert (merged == original).all()
    assert np.abs(patches[1][1][1:-1, -1] - mean).max() < 1  # no line inside a token


def test_relevance_lies_where_the_tokens_are():
    values = relevance_map(torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64), torch.tensor([5, 0, 3]), (2, 3))
    np.testing.assert_equal(values, [[0.2, np.nan, np.nan], [0.3, np.nan, 0.5]])


def test_heat_map_has_the_colours_of_the_relevance_on_a_log_scale():
    image = Image.new("RGB", (60, 20), (100, 100, 100))
    heat = np.asarray(draw_relevance(image, np.array([[1e-6, 1e-3, 1.0]])), dtype=float)
    for patch, share in enumerate((0.0, 0.5, 1.0)):
        expected = (1 - RELEVANCE_SHARE) * 100 + RELEVANCE_SHARE * 255 * np.array(RELEVANCE_COLORMAP(share)[:3])
        assert np.abs(heat[:, 20 * patch : 20 * (patch + 1)] - expected).max() <= 2


def test_heat_map_of_equal_relevance_is_of_one_colour():
    heat = np.asarray(draw_relevance(Image.new("RGB", (8, 8)), np.full((2, 2), 0.25)))
    assert (heat == heat[0, 0]).all()


@pytest.mark.parametrize(
    "fields",
    (
        {},
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0, 2.0, 3.0]},
        {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [127.5] * 3},
        {"do_rescale": False, "do_normalize": False},
        {"do_resize": False},
        {"do_resize": False, "do_center_crop": True, "crop_size": {"height": 60, "width": 90}},
    ),
)
def test_seen_images_undo_the_processor(gradient, fields):
    processor = ViTImageProcessorPil(size={"height": 60, "width": 90}, **fields)
    (seen,) = seen_images(processor(gradient, return_tensors="pt")["pixel_values"], processor)
    assert np.abs(np.asarray(seen, dtype=int) - np.asarray(gradient, dtype=int)).max() <= 1


@pytest.mark.parametrize("token_reduction", ("drop", "merge"))
@pytest.mark.parametrize(
    "schedule", (([2], [0.6], 8), ([1, 2, 4], [0.8, 0.8, 0.8], 10), ([0, 1, 2, 3, 4, 5], [0.9] * 6))
)
def test_sheet_shows_the_relevance_and_what_the_model_keeps(gradient, tmp_path, drawn, token_reduction, schedule):
    model = tiny_vit(token_reduction=token_reduction, num_noise_layers=6)
    model.set_schedule(*schedule)
    images = [gradient, gradient.rotate(90, expand=True)]
    draw_kept_tokens(model, PROCESSOR, images, tmp_path / "sheet.png")

    pixel_values = PROCESSOR(images, return_tensors="pt")["pixel_values"]
    kept_indices = model(pixel_values).kept_indices
    _, layers = trace_tokens(model, pixel_values)
    shown = (0, 2, 5) if len(layers) == 6 else range(len(layers))
    rows = [drawn[: 2 + len(shown)], drawn[2 + len(shown) :]]
    for row, (view, relevance, *left) in enumerate(rows):
        values = relevance_map(layers[0].relevance[row], layers[0].ranked[row], (8, 8))
        assert relevance == draw_relevance(view, values)
        for index, picture in zip(shown, left, strict=True):
            if token_reduction == "drop":
                assert picture == dim_dropped(view, kept_indices[index][row], (8, 8))
            else:
                assert picture == draw_merged(view, layers[index].groups[row], (8, 8))


@pytest.mark.parametrize(
    ("max_layers", "shown"), ((1, [5]), (2, [0, 5]), (4, [0, 2, 3, 5]), (6, range(6)), (9, range(6)))
)
def test_sheet_shows_as_many_layers_as_asked(gradient, tmp_path, monkeypatch, max_layers, shown):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure))
    schedule = Schedule("each", tuple(range(6)), (0.9,) * 6)
    draw_kept_tokens(tiny_vit(), PROCESSOR, [gradient], tmp_path / "sheet.png", schedule, max_layers)
    titles = [ax.get_title().split("\n")[0] for ax in figures[0].axes[2:] if ax.get_title()]
    assert titles == [f"after layer {layer}" for layer in shown]


def test_sheet_states_schedule_cost_and_both_answers(gradient, tmp_path, monkeypatch):
    model = tiny_vit(id2label={label: f"class_{label}_of_a_long_name" for label in range(7)})
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure))
    schedule = Schedule("mine", (0, 1, 2, 3, 5), (0.9, 0.8, 0.8, 0.7, 0.8))
    draw_kept_tokens(model, PROCESSOR, [gradient], tmp_path / "sheet.png", schedule)
    unpruned = count_gflops(model.config)
    pixel_values = PROCESSOR(gradient, return_tensors="pt")["pixel_values"]
    before = model(pixel_values).logits.softmax(dim=-1).max().item()
    model.set_schedule(**schedule.settings)
    after = model(pixel_values).logits.softmax(dim=-1).max().item()
    assert figures[0].get_suptitle() == (
        f"mine: {count_gflops(model.config):.4g} GFLOPs for one image, unpruned {unpruned:.4g}\n"
        "dropped after layer 0, 1, 2, 3, 5 (from 0), keep rate 0.7 to 0.9"
    )
    captions = [ax.get_xlabel() for ax in figures[0].axes if ax.get_xlabel()]
    assert [caption.split()[-1] for caption in captions] == [f"{before:.1%}", f"{after:.1%}"]
    assert all(caption.startswith("class_") and "..." in caption for caption in captions)


def test_changed_answers_stand_out_though_long_names_begin_alike(tmp_path, monkeypatch):
    model = tiny_vit(id2label={label: f"a class of a long name {label}" for label in range(7)})
    torch.nn.init.normal_(model.classifier.weight)
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure))
    noise = np.random.default_rng(0)
    images = [Image.fromarray(noise.integers(256, size=(32, 32, 3), dtype=np.uint8)) for _ in range(8)]
    schedules = [Schedule("little", (0,), (0.1,)), Schedule("full", (), ())]
    draw_schedules(model, PROCESSOR, images, schedules, tmp_path / "sheet.png")
    pixel_values = PROCESSOR(images, return_tensors="pt")["pixel_values"]
    before = model(pixel_values).logits.argmax(dim=-1)
    model.set_schedule(**schedules[0].settings)
    is_changed = (model(pixel_values).logits.argmax(dim=-1) != before).tolist()
    assert len(set(is_changed)) == 2
    colours = [ax.xaxis.label.get_color() for ax in figures[0].axes]
    assert colours[1::2] == ["black"] * 8
    assert colours[::2] == [CHANGED if changed else "black" for changed in is_changed]


def test_sheet_is_drawn_alike_and_leaves_the_schedule(gradient, tmp_path):
    model = tiny_vit(prune_layers=[2], keep_rates=[0.6])
    for name in ("first.png", "second.png"):
        draw_kept_tokens(model, PROCESSOR, [gradient], tmp_path / name, Schedule("half", (1,), (0.5,)))
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()
    assert (model.config.prune_layers, model.config.keep_rates) == ([2], [0.6])


@pytest.mark.parametrize(
    "fields",
    ({"token_reduction": "merge", "relevance_weight": 0}, {"selection": "random"}, {"token_reduction": "cluster"}),
    ids=("merge", "random", "cluster"),
)
def test_sheet_has_no_relevance_where_none_decides(gradient, tmp_path, drawn, fields):
    model = tiny_vit(prune_layers=[2], keep_rates=[0.6], **fields)
    draw_kept_tokens(model, PROCESSOR, [gradient], tmp_path / "sheet.png")
    view, left = drawn
    if fields.get("token_reduction") == "cluster":
        groups = model(PROCESSOR(gradient, return_tensors="pt")["pixel_values"], output_groups=True).patch_groups
        assert left == draw_merged(view, groups[0, -1], (8, 8))


@pytest.mark.parametrize(
    ("mode", "image_size"),
    (("RGB", (32, 48)), ("RGBA", (32, 32)), ("L", (384, 384)), ("P", (32, 32)), ("1", (32, 32))),
)
def test_images_of_any_mode_and_size_are_drawn_in_their_shape(gradient, tmp_path, drawn, image_size, mode):
    height, width = image_size
    model = tiny_vit(image_size=list(image_size), patch_size=height // 8, prune_layers=[2], keep_rates=[0.6])
    processor = ViTImageProcessorPil(size={"height": height, "width": width})
    images = [gradient.resize(size).convert(mode) for size in ((28, 28), (512, 512), (300, 60), (40, 400))]
    draw_kept_tokens(model, processor, images, tmp_path / "sheet.png")
    for index, picture in enumerate(drawn):
        original = images[index // 3]
        assert picture.width / picture.height == pytest.approx(original.width / original.height, rel=0.02)
    assert Image.open(tmp_path / "sheet.png").width > 3 * 250


def test_images_that_are_not_square_are_drawn_as_they_are(gradient, tmp_path):
    """A square model sees a squashed image; the sheet of a wide one is lower than that of a tall one."""
    model = tiny_vit(prune_layers=[2], keep_rates=[0.6])
    heights = []
    for image in (gradient, gradient.rotate(90, expand=True)):
        draw_kept_tokens(model, PROCESSOR, [image], tmp_path / "sheet.png")
        heights.append(Image.open(tmp_path / "sheet.png").height)
    assert heights[1] > 1.3 * heights[0]
    draw_kept_tokens(model, evaluation_image_processor((32, 32)), [gradient], tmp_path / "sheet.png")
    assert heights[0] < Image.open(tmp_path / "sheet.png").height < heights[1]  # a square crop of it


def test_grid_of_a_model_that_is_not_square():
    assert patch_grid(tiny_vit(image_size=[32, 48]).config) == (8, 12)


def test_sheet_needs_images_and_a_pruned_layer(gradient, tmp_path):
    with pytest.raises(ValueError, match="one image"):
        draw_kept_tokens(tiny_vit(prune_layers=[2], keep_rates=[0.6]), PROCESSOR, [], tmp_path / "sheet.png")
    with pytest.raises(ValueError, match="`prune_layers`"):
        draw_kept_tokens(tiny_vit(), PROCESSOR, [gradient], tmp_path / "sheet.png")


@pytest.mark.parametrize("token_reduction", ("drop", "cluster"))
def test_schedules_side_by_side_show_what_each_leaves(gradient, tmp_path, drawn, token_reduction):
    model = tiny_vit(prune_layers=[2], keep_rates=[0.6], token_reduction=token_reduction)
    schedules = resolve_schedules(model.config, [parse_schedule(text) for text in ("full", "1.5x", "1,2:0.5,0.5:6")])
    draw_schedules(model, PROCESSOR, [gradient], schedules, tmp_path / "sheet.png")
    view, *left = drawn
    pixel_values = PROCESSOR(gradient, return_tensors="pt")["pixel_values"]
    for picture, schedule in zip(left, schedules[1:], strict=True):
        outputs = model(pixel_values, schedule=schedule, output_groups=True)
        if token_reduction == "drop":
            assert picture == dim_dropped(view, outputs.kept_indices[-1][0], (8, 8))
        else:
            assert picture == draw_merged(view, outputs.patch_groups[0, -1], (8, 8))


@pytest.mark.parametrize("noise_gate", ("softmax", "capacity"))
def test_overview_shows_noise_only_on_what_is_not_relevant(gradient, tmp_path, drawn, noise_gate):
    model = tiny_vit(noise_gate=noise_gate).train()
    head = model.vit.alpha_heads[0]
    torch.nn.init.normal_(head.weight, std=3.0)
    schedules = resolve_schedules(model.config, [parse_schedule("full"), parse_schedule("1.5x")])
    draw_overview(model, PROCESSOR, gradient, schedules, tmp_path / "overview.png")
    assert model.training and len(drawn) == 5
    view, _, noisy = (np.asarray(picture, dtype=float) for picture in drawn[:3])
    noise = np.abs(noisy - view).mean(-1)
    model.set_schedule([0], [1.0])
    _, (layer,) = trace_tokens(model, PROCESSOR(gradient, return_tensors="pt")["pixel_values"])
    rows, columns = (np.arange(length) * 8 // length for length in noise.shape)
    patches = 8 * rows[:, None] + columns
    order = layer.relevance[0].argsort()
    assert noise[patches == order[-1].item()].mean() < 0.7 * noise[patches == order[0].item()].mean()


def test_overview_needs_heads_that_learn(gradient, tmp_path):
    for fields, named in (
        ({"num_noise_layers": 0}, "num_noise_layers=0"),
        ({"token_reduction": "cluster"}, "token_reduction='cluster'"),
    ):
        with pytest.raises(ValueError, match=named):
            draw_overview(tiny_vit(**fields), PROCESSOR, gradient, [], tmp_path / "overview.png")
    assert not list(tmp_path.iterdir())


def test_default_schedules_are_those_that_the_model_can_carry_out():
    def names(config, texts=None):
        schedules = None if texts is None else [parse_schedule(text) for text in texts]
        return [schedule.name for schedule in schedules_to_draw(config, schedules)]

    assert names(TntViTConfig()) == ["full", "1.5x", "2x", "3x"]
    coarse = TntViTConfig(**TINY)
    assert names(coarse) == ["full", "1.5x", "3x"]
    assert names(coarse, ["full", "1:0.5"]) == ["full", "1:0.5"]
    with pytest.raises(ValueError, match=naming("'2x'", "`flops_reduction`")):
        names(coarse, ["2x"])
    with pytest.raises(ValueError, match=naming("--schedules", "full")):
        names(coarse, ["full"])
    with pytest.raises(ValueError, match="2x, full, 2x"):
        names(coarse, ["2x", "full", "2x"])


def test_file_names_of_sheets_hold_no_separators():
    assert sheet_name(parse_schedule("2,3:0.7,0.7:30")) == "kept_tokens_2-3-0.7-0.7-30.png"


def test_plot_is_written_for_any_rows(tmp_path):
    clusters = [RESULTS.rows[0], replace(RESULTS.rows[1], selection="similarity")]
    for index, rows in enumerate((RESULTS.rows, RESULTS.rows[:1], clusters)):
        plot_accuracy(rows, RESULTS.dataset, tmp_path / f"{index}.png")
        assert Image.open(tmp_path / f"{index}.png").size == (1050, 675)


def test_results_that_are_none_are_refused(tmp_path):
    path = tmp_path / "results.json"
    with pytest.raises(ValueError, match=f"Results {path}"):
        read_results(path)
    path.write_text("[")
    with pytest.raises(ValueError, match=f"Results {path}"):
        read_results(path)
    path.write_text(json.dumps({**RESULTS.to_json(), "rows": []}))
    with pytest.raises(ValueError, match="rows"):
        read_results(path)
    path.write_text(json.dumps(RESULTS.to_json()))
    assert read_results(path) == RESULTS
