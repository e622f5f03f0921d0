"""Classifiers on DINOv2 as TNT models: the same answers, and a head that reads the patches of merged tokens."""

import pytest
import torch
from conftest import naming, noise_split
from fvcore.nn import FlopCountAnalysis
from transformers import (
    AutoModelForImageClassification,
    BitImageProcessorPil,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
)

from tnt_hf import TntDeiTConfig, TntViTConfig, TntViTForImageClassification
from tnt_hf.conversion import load_classifier, load_for_inference, to_plain_model
from tnt_hf.encoders import reduce_tokens
from tnt_hf.evaluation import measure_cost
from tnt_hf.export import export_onnx
from tnt_hf.schedules_tnt import UNPRUNED, Schedule, count_gflops
from tnt_hf.training import Recipe


SIZE = 40
HALF = Schedule("half", (0, 2, 3), (0.8, 0.7, 0.6))


def make_dinov2(model_class=Dinov2ForImageClassification, **fields):
    torch.manual_seed(0)
    geometry = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, "patch_size": 4, "image_size": 32}
    model = model_class(Dinov2Config(**geometry | {"num_labels": 7, "initializer_range": 0.2} | fields)).eval()
    for name, value in model.named_parameters():
        if "layer_scale" in name or name.endswith("bias"):
            torch.nn.init.uniform_(value, 0.5, 1.5)
    return model


def save(model, folder, size=SIZE):
    height, width = (size, size) if isinstance(size, int) else size
    model.save_pretrained(folder)
    crop = {"height": height, "width": width}
    BitImageProcessorPil(size={"shortest_edge": max(height, width) + 8}, crop_size=crop).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    return save(make_dinov2(), tmp_path / "dinov2")


def random_images(height=SIZE, width=SIZE):
    return torch.randn(3, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("size", "fields"),
    [(SIZE, {}), (32, {}), ((24, 36), {}), (SIZE, {"patch_size": 8, "mlp_ratio": 2, "hidden_act": "relu"})],
    ids=["larger images", "images of the config", "not square", "other geometry"],
)
@torch.no_grad()
def test_unpruned_logits_are_those_of_dinov2(tmp_path, size, fields):
    plain = make_dinov2(**fields)
    images = random_images(*((size, size) if isinstance(size, int) else size))
    model = load_classifier(save(plain, tmp_path / "dinov2", size), token_reduction="cluster").eval()
    torch.testing.assert_close(model(images).logits, plain(images).logits, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("token_reduction", ["cluster", "merge"])
@torch.no_grad()
def test_reduced_logits_are_those_of_dinov2_under_the_same_schedule(folder, token_reduction):
    plain, images = make_dinov2(), random_images()
    # with a weight of 0 merging needs no scores
    fields = {"token_reduction": "merge", "relevance_weight": 0.0} if token_reduction == "merge" else {}
    model = load_classifier(folder, **{"token_reduction": "cluster"} | fields).eval()
    reduce_tokens(plain, HALF, image_size=SIZE, token_reduction=token_reduction)
    logits = model(images, schedule=HALF).logits
    torch.testing.assert_close(logits, plain(images).logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits, model(images, schedule=UNPRUNED).logits, atol=1e-2)


@torch.no_grad()
def test_a_saved_model_answers_the_same_from_its_own_code(folder, tmp_path):
    model = load_classifier(folder, token_reduction="cluster").eval()
    model.set_schedule(HALF)
    model.save_pretrained(tmp_path / "saved")
    images = random_images()
    for loaded in (
        AutoModelForImageClassification.from_pretrained(tmp_path / "saved", trust_remote_code=True),
        load_classifier(tmp_path / "saved"),
    ):
        assert torch.equal(loaded.eval()(images).logits, model(images).logits)


@torch.no_grad()
def test_patches_that_are_dropped_or_masked_are_not_read(folder):
    model, images = load_classifier(folder).eval(), random_images()
    read = []
    handle = model.classifier.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    model.vit.layernorm.register_forward_hook(lambda _, __, tokens: read.append(tokens))
    model(images, schedule=Schedule("", (2,), (0.3,)))
    tokens, inputs = read
    assert tokens.shape[1] == 1 + 30 and inputs.shape == (3, 64)
    torch.testing.assert_close(inputs, torch.cat((tokens[:, 0], tokens[:, 1:].mean(dim=1)), dim=1))

    read.clear()
    mask = torch.ones(3, 101, dtype=torch.long)
    mask[:, 41:] = 0
    model(images, attention_mask=mask)
    tokens, inputs = read
    torch.testing.assert_close(inputs[:, 32:], tokens[:, 1:41].mean(dim=1))
    handle.remove()
    mask[:, 1:] = 0
    assert model(images, attention_mask=mask).logits.isfinite().all()


def test_loading_takes_the_arguments_of_other_checkpoints(folder, tmp_path):
    moved = tmp_path / "repo" / "part"
    moved.parent.mkdir()
    folder.rename(moved)
    model = load_for_inference(moved.parent, subfolder="part", device_map="cpu", dtype="auto", use_safetensors=True)
    assert model.config.token_reduction == "cluster" and model.dtype == torch.float32
    assert {"device_map", "subfolder", "use_safetensors"}.isdisjoint(model.config.to_dict())
    with pytest.raises(TypeError, match="keep_rate"):
        load_classifier(moved, keep_rate=[0.5])
    torch.save(make_dinov2().state_dict(), moved / "pytorch_model.bin")
    (moved / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        load_classifier(moved, use_safetensors=True)


def test_it_has_no_equal_among_the_vits_of_transformers(folder):
    with pytest.raises(ValueError, match="classifier_reads_patches"):
        to_plain_model(load_classifier(folder))


@torch.no_grad()
def test_masked_patches_are_not_read_where_tokens_merge(folder):
    model, images = load_classifier(folder, token_reduction="cluster").eval(), random_images()
    mask = torch.ones(3, 101, dtype=torch.long)
    mask[:, 61:] = 0  # the lower rows of ten patches each
    other = images.clone()
    other[:, :, 24:] = torch.randn(other[:, :, 24:].shape, generator=torch.Generator().manual_seed(2))
    for schedule in (UNPRUNED, HALF):
        expected, logits = (model(each, attention_mask=mask, schedule=schedule).logits for each in (images, other))
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_half_precision_rounds_and_no_more(folder):
    expected, model = load_classifier(folder).eval(), load_classifier(folder, dtype=torch.bfloat16).eval()
    images = random_images()
    logits = model(images, schedule=UNPRUNED).logits
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), expected(images, schedule=UNPRUNED).logits, atol=0.5, rtol=0.1)


@pytest.mark.parametrize("schedule", [UNPRUNED, HALF], ids=["full", "half"])
def test_executed_compute_is_counted(folder, schedule):
    model = load_classifier(folder, token_reduction="cluster", attn_implementation="eager").eval()
    model.set_schedule(schedule)
    counted = FlopCountAnalysis(model, random_images()[:1]).unsupported_ops_warnings(False)
    counted.uncalled_modules_warnings(False)
    assert count_gflops(model.config, as_executed=True) == pytest.approx(counted.total() / 1e9, rel=2e-3)
    assert count_gflops(model.config, as_executed=True) == count_gflops(model.config)


def test_the_measured_cost_knows_what_is_read(folder):
    model = load_classifier(folder, token_reduction="cluster")
    cost = measure_cost(model, batch_size=1, num_counts=2, repeats=1)
    assert cost(model.config, HALF) > 0
    with pytest.raises(ValueError, match="classifier_reads_patches"):
        cost(TntViTConfig(**model.config.to_dict() | {"classifier_reads_patches": False}), HALF)


@pytest.mark.slow
def test_the_exported_file_gives_the_logits(folder, tmp_path):
    model = load_classifier(folder, token_reduction="cluster")
    model.set_schedule(HALF)
    assert export_onnx(model, tmp_path / "model.onnx") < 1e-4


def test_training_adapts_it_to_budgets(folder, tmp_path):
    split = noise_split(12, 48, 48, 7)
    recipe = Recipe.load(
        "adapt",
        model_name_or_path=str(folder),
        output_dir=str(tmp_path / "run"),
        adaptation_schedules=["full", "2x"],
        schedules=["full", "2x"],
        schedule="2x",
        max_steps=2,
        per_device_train_batch_size=4,
        warmup_steps=0,
        train_augmentation="flip",
        report_to="none",
        use_cpu=True,
    )
    trainer = recipe.make_trainer({"train": split, "validation": split})
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    changed = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and not any("classifier" in name or "embeddings" in name for name in changed)


def test_what_is_no_vit_and_what_would_be_random_is_refused(tmp_path):
    gated = save(make_dinov2(use_swiglu_ffn=True), tmp_path / "gated")
    with pytest.raises(ValueError, match="use_swiglu_ffn"):
        load_classifier(gated)
    headless = save(make_dinov2(Dinov2Model), tmp_path / "headless")
    with pytest.raises(ValueError, match=naming("headless", "classifier.weight")):
        load_classifier(headless)
    classes = {label: f"class {label}" for label in range(5)}
    model = load_classifier(headless, allow_new_head=True, id2label=classes)
    assert model.classifier.weight.shape == (5, 64)
    model = load_classifier(save(make_dinov2(), tmp_path / "other"), allow_new_head=True, id2label=classes)
    assert model.classifier.weight.shape == (5, 64) and model.config.label2id["class 3"] == 3
    for config_class, value in ((TntViTConfig, 1), (TntDeiTConfig, True)):
        with pytest.raises(ValueError, match="classifier_reads_patches"):
            config_class(classifier_reads_patches=value)
    assert model.name_or_path == str(tmp_path / "other")
    (tmp_path / "other" / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=naming("other", "image_size")):
        load_classifier(tmp_path / "other")
    assert TntDeiTConfig.classifier_reads_patches is False
    assert isinstance(model, TntViTForImageClassification)
