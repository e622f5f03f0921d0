import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import naming
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    Dinov2Config,
    Dinov2Model,
    IJepaConfig,
    IJepaModel,
    ResNetConfig,
    ResNetModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)

from benchmarks import write_tables
from benchmarks.encoder_adaptation import EncoderAdaptationArguments, adapt_encoder
from benchmarks.encoders import (
    EncoderBenchmarkArguments,
    encode,
    load_encoder,
    nearest_images,
    run_encoder_benchmark,
)
from benchmarks.saliency_network import DECODER_NAME, SaliencyDecoder, dinov2_image_processor


SHAPE = {"hidden_size": 24, "num_hidden_layers": 6, "num_attention_heads": 3}
PATCHES = {"image_size": 32, "patch_size": 4, "intermediate_size": 48}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Stripes of 40x60 pixels, upright in one class and lying in the other, on noise."""
    folder = tmp_path_factory.mktemp("photographs")
    generator = np.random.default_rng(0)
    for name, stripes in (("upright", np.s_[:, ::8]), ("lying", np.s_[::8])):
        (folder / name).mkdir()
        for index in range(7):
            pixels = generator.normal(90, 30, (40, 60, 3))
            pixels[stripes] += 150
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A folder with a tiny DINOv2 for images of 56 pixels and a decoder on top of it."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(2)
    # the default 0.02 leaves random models almost linear
    model = Dinov2Model(Dinov2Config(**SHAPE, image_size=56, patch_size=7, initializer_range=0.2))
    model.save_pretrained(folder)
    dinov2_image_processor(56).save_pretrained(folder)
    save_file(SaliencyDecoder((24, 8, 8, 8)).state_dict(), folder / DECODER_NAME)
    return folder


@pytest.fixture(scope="module")
def results(encoder, photographs):
    arguments = EncoderBenchmarkArguments(str(encoder), str(photographs), schedules=["full", "2x"])
    return run_encoder_benchmark(arguments)


def test_with_nothing_reduced_all_is_as_before(results):
    unreduced, full, _ = results["rows"]
    for row in (unreduced, full):
        assert row["share"] == 1
        for name in ("embedding_cosine", "embedding_cosine_5th_percentile", "patch_cosine", "saliency_correlation"):
            assert row[name] == pytest.approx(1, abs=1e-12)
        for name in ("saliency_error", "recall_at_1_drop", "recall_at_5_drop", "recall_at_1_drop_standard_error"):
            assert row[name] == 0
        assert row["neighbour_overlap"] == 100
    assert full["recall_at_1"] == unreduced["recall_at_1"] == 100


def test_a_reduction_is_measured_against_the_encoder_unreduced(results):
    unreduced, _, row = results["rows"]
    assert results["num_images"] == 14 and results["image_size"] == [56, 56] and results["dtype"] == "float32"
    assert row["schedule"] == "2x" and 0.49 < row["share"] <= 0.5 and row["images_per_second"] > 0
    assert row["embedding_cosine_5th_percentile"] < row["embedding_cosine_median"] < 1
    assert row["patch_cosine"] < 1 and row["saliency_error"] > 0 and row["saliency_correlation"] < 1
    assert 0 < row["neighbour_overlap"] < 100 and row["neighbour_overlap_standard_error"] > 0
    assert row["recall_at_1_drop"] == unreduced["recall_at_1"] - row["recall_at_1"]
    assert row["recall_at_1"] <= row["recall_at_5"] <= 100


@pytest.mark.parametrize("kind", ["position embeddings that follow", "interpolated when asked"])
def test_a_budget_may_be_spent_on_smaller_images(kind, encoder, photographs, tmp_path):
    if kind == "interpolated when asked":
        torch.manual_seed(0)
        ViTModel(ViTConfig(**SHAPE, **PATCHES, initializer_range=0.2), add_pooling_layer=False).save_pretrained(
            tmp_path
        )
        dinov2_image_processor(32).save_pretrained(tmp_path)
        encoder, sizes = tmp_path, (32, 24)
    else:
        sizes = 56, 42
    texts = [f"full@{sizes[0]}", "full@0.75", f"1x@{sizes[1]}", f"4x@{sizes[1]}"]
    results = run_encoder_benchmark(EncoderBenchmarkArguments(str(encoder), str(photographs), schedules=texts))
    unreduced, whole, smaller, within, quarter = results["rows"]
    assert whole["share"] == 1 and whole["patch_cosine"] == pytest.approx(1, abs=1e-12)
    assert 0.45 < smaller["share"] == within["share"] < 0.6 and 0.24 < quarter["share"] <= 0.25
    assert [row["image_size"] for row in (unreduced, smaller)] == [[size, size] for size in sizes]
    assert smaller["patch_cosine"] < 1 and within["patch_cosine"] == smaller["patch_cosine"] != quarter["patch_cosine"]


def test_smaller_patches_are_laid_out_on_the_whole_grid(encoder):
    model, pixel_values = load_encoder(encoder), torch.randn(2, 3, 56, 56)
    smaller = nn.functional.interpolate(pixel_values, (28, 28), mode="bicubic", antialias=True)
    with torch.inference_mode():
        tokens, (features, _) = model(smaller).last_hidden_state, encode(model, None, pixel_values, (28, 28))
    grid = features.patches.unflatten(1, (8, 8))
    own = tokens[:, 1:].unflatten(1, (4, 4))
    torch.testing.assert_close(grid[:, ::7, ::7], own[:, ::3, ::3])  # corners
    torch.testing.assert_close(
        grid[:, 1, 1], (9 * own[:, 0, 0] + 3 * (own[:, 0, 1] + own[:, 1, 0]) + own[:, 1, 1]) / 16
    )


def test_the_results_become_tables(results, adapted_results, tmp_path, monkeypatch):
    monkeypatch.setattr(write_tables, "RESULTS", tmp_path)
    (tmp_path / "encoders" / "adapted").mkdir(parents=True)
    (tmp_path / "encoders" / "results.json").write_text(json.dumps(results))
    (tmp_path / "encoders" / "adapted" / "results.json").write_text(json.dumps(adapted_results))
    header, _, full, half, *facts = write_tables.encoders_table().splitlines()
    assert full.startswith("| full | 1.000 | ") and half.startswith("| 2x | 0.49")
    assert header.count("|") == full.count("|") == half.count("|")
    assert "14 validation images of" in facts[-1]
    header, _, *rows, _, facts = write_tables.adapted_encoder_table().splitlines()
    assert [row.split(" | ")[0] for row in rows] == 2 * ["| original"] + 2 * ["| adapted"]
    assert "speed-up" not in header and {row.count("|") for row in (header, *rows)} == {header.count("|")}
    assert "40 steps of 7 of 14 unlabelled images, schedules 2x" in facts


@pytest.fixture(scope="module")
def adaptation(encoder, photographs, tmp_path_factory):
    """A folder with an adaptation of the tiny encoder to half of the compute."""
    folder = tmp_path_factory.mktemp("adaptation")
    arguments = EncoderAdaptationArguments(
        str(encoder), str(photographs), str(folder), ["2x"], num_steps=40, batch_size=7, learning_rate=3e-3
    )
    return folder, adapt_encoder(arguments)


@pytest.fixture(scope="module")
def adapted_results(encoder, photographs, adaptation):
    schedules, folder = ["full", "2x"], str(adaptation[0])
    return run_encoder_benchmark(
        EncoderBenchmarkArguments(str(encoder), str(photographs), schedules, adaptation=folder)
    )


def test_an_adapted_encoder_is_compared_with_the_original_unreduced(adaptation, results, adapted_results):
    _, adapted = adaptation
    assert adapted_results["training"] == adapted["training"]
    assert adapted_results["adaptation_sha256"] == adapted["adaptation_sha256"]
    rows = adapted_results["rows"]
    timing = {"images_per_second", "speedup"}
    for row, alone in zip(rows, results["rows"]):
        assert row["network"] == "original"
        assert all(row[name] == alone[name] for name in alone if name not in timing)
    original, full, half = rows[2:]
    assert [full["network"], half["network"]] == ["adapted", "adapted"]
    assert full["share"] == 1 and 0 < full["embedding_cosine"] < 1 and full["saliency_error"] > 0
    assert half["share"] == original["share"]
    assert half["embedding_cosine"] + half["patch_cosine"] > original["embedding_cosine"] + original["patch_cosine"]


def test_an_adaptation_is_the_same_from_the_same_seed(encoder, photographs, adaptation, tmp_path):
    _, adapted = adaptation
    assert adapted["training"]["losses"][-1] < adapted["training"]["losses"][0]
    assert adapted["training"]["schedules"] == ["2x"] and adapted["training"]["num_images"] == 14
    arguments = EncoderAdaptationArguments(str(encoder), str(photographs), str(tmp_path), num_steps=2, batch_size=7)
    digests = [
        adapt_encoder(replace(arguments, seed=seed, overwrite_output_dir=True))["adaptation_sha256"]
        for seed in (1, 1, 2)
    ]
    assert digests[0] == digests[1] != digests[2]
    with pytest.raises(ValueError, match=naming("results.json", "--overwrite_output_dir")):
        adapt_encoder(arguments)
    for name in ("num_steps", "batch_size", "learning_rate"):
        with pytest.raises(ValueError, match=naming(f"--{name}", 0)):
            replace(arguments, **{name: 0})


def test_without_a_decoder_there_are_no_maps(encoder, photographs, tmp_path):
    Dinov2Model.from_pretrained(encoder).save_pretrained(tmp_path)
    dinov2_image_processor(56).save_pretrained(tmp_path)
    results = run_encoder_benchmark(EncoderBenchmarkArguments(str(tmp_path), str(photographs), schedules=["full"]))
    assert results["saliency_decoder_sha256"] is None
    assert not any("saliency" in name for row in results["rows"] for name in row)


def test_an_image_is_no_neighbour_of_itself():
    index = torch.tensor([[1.0, 0], [3, 0.1], [0, 1], [-1, -0.5]])
    assert nearest_images(index, index, 2).tolist() == [[1, 2], [0, 2], [1, 0], [2, 0]]
    moved = torch.tensor([[0.1, 1], [1, 0], [1, 0], [0, 1]])
    assert nearest_images(moved, index, 1).squeeze(1).tolist() == [2, 0, 0, 2]


@pytest.mark.parametrize(
    "model_class, config_class, num_prefix_tokens, expected",
    (
        (ViTModel, ViTConfig, 1, lambda output: output.pooler_output),
        (SiglipVisionModel, SiglipVisionConfig, 0, lambda output: output.pooler_output),
        (IJepaModel, IJepaConfig, 0, lambda output: output.last_hidden_state.mean(dim=1)),
    ),
)
def test_the_embedding_is_what_the_encoder_pools_or_the_mean_of_its_patches(
    model_class, config_class, num_prefix_tokens, expected
):
    torch.manual_seed(0)
    model = model_class(config_class(**SHAPE, **PATCHES)).eval()
    pixel_values = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        output, (features, _) = model(pixel_values), encode(model, None, pixel_values)
    torch.testing.assert_close(features.embeddings, expected(output))
    torch.testing.assert_close(features.patches, output.last_hidden_state[:, num_prefix_tokens:])


def test_a_pooler_without_weights_is_left_out(tmp_path):
    ViTForImageClassification(ViTConfig(**SHAPE, **PATCHES)).save_pretrained(tmp_path)
    model = load_encoder(str(tmp_path))
    pixel_values = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        output, (features, _) = model(pixel_values), encode(model, None, pixel_values)
    torch.testing.assert_close(features.embeddings, output.last_hidden_state[:, 0])


def test_encoders_that_cannot_be_compared_are_refused(tmp_path):
    BertModel(BertConfig(**SHAPE, intermediate_size=48, vocab_size=9)).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=naming("--model", "BertModel", "CLIPVisionModel")):
        load_encoder(str(tmp_path / "bert"))

    model = Dinov2Model(Dinov2Config(**SHAPE, image_size=56, patch_size=7))
    weights = model.state_dict()
    del weights["encoder.layer.0.norm1.bias"]
    model.save_pretrained(tmp_path / "part", state_dict=weights)
    with pytest.raises(ValueError, match=naming("--model", "Dinov2Model", "encoder.layer.0.norm1.bias")):
        load_encoder(str(tmp_path / "part"))

    masking = ViTMAEModel(ViTMAEConfig(**SHAPE, **PATCHES)).eval()
    with pytest.raises(ValueError, match=naming(17, 64)):
        encode(masking, None, torch.randn(1, 3, 32, 32))


def test_bad_input_is_refused_before_anything_is_written(encoder, photographs, tmp_path):
    arguments = EncoderBenchmarkArguments(str(encoder), str(photographs), output_dir=str(tmp_path / "results"))
    resnet = ResNetModel(ResNetConfig(embedding_size=4, hidden_sizes=[4, 4], depths=[1, 1]))
    resnet.save_pretrained(tmp_path / "resnet")
    dinov2_image_processor(56).save_pretrained(tmp_path / "resnet")
    for changes, parts in (
        ({"max_images": 10}, ("--images", 10)),
        ({"images": str(tmp_path / "nowhere")}, ("nowhere",)),
        ({"schedules": ["2x", "twice"]}, ("'twice'",)),
        ({"schedules": ["2x@70"]}, ("'2x@70'", "larger", "56")),
        ({"schedules": ["100x"]}, ("'100x'",)),
        ({"model": str(tmp_path / "resnet")}, ("ResNetModel",)),
    ):
        with pytest.raises(ValueError, match=naming(*parts)):
            run_encoder_benchmark(replace(arguments, **changes))
    assert not (tmp_path / "results").exists()
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "results.json").write_text("{}")
    with pytest.raises(ValueError, match=naming("results.json", "--overwrite_output_dir")):
        run_encoder_benchmark(arguments)
