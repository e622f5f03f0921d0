"""Zero-shot classification in the bench of encoders, by tiny models with a tokenizer of a few words."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from conftest import naming
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionModel,
    MetaClip2Config,
    MetaClip2Model,
    PreTrainedTokenizerFast,
    Siglip2Config,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
    pipeline,
)

from benchmarks.encoder_adaptation import EncoderAdaptationArguments, adapt_encoder
from benchmarks.encoders import EncoderBenchmarkArguments, encode, load_encoder, run_encoder_benchmark
from benchmarks.zero_shot import ZeroShotClassifier, class_prompts, load_tokenizer


LAYERS = {"hidden_size": 24, "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 48}
VISION = {**LAYERS, "image_size": 32, "patch_size": 4}
WORDS = ("<pad>", "<bos>", "<unk>", "a", "photo", "of", ".", "red", "dark", "cat", "pale", "dog", "<eos>")
TEXT = {**LAYERS, "num_hidden_layers": 2, "vocab_size": len(WORDS), "max_position_embeddings": 64}
TEXT |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": WORDS.index("<eos>")}
FAMILIES = {
    "clip": (CLIPModel, CLIPConfig),
    "siglip": (SiglipModel, SiglipConfig),
    "metaclip_2": (MetaClip2Model, MetaClip2Config),
}
FOLDERS = ["dark_cat", "pale_dog", "red"]
PROMPTS = ["a photo of a dark cat.", "a photo of a pale dog.", "a photo of a red."]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Noise around one colour for each class."""
    folder = tmp_path_factory.mktemp("photographs")
    generator = np.random.default_rng(0)
    for name, colour in zip(FOLDERS, ((40, 40, 40), (210, 220, 200), (200, 40, 30))):
        (folder / name).mkdir()
        for index in range(5):
            pixels = generator.normal(colour, 40, (36, 40, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"{index}.png")
    return folder


def save_tokenizer(folder):
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    ends = [(word, WORDS.index(word)) for word in ("<bos>", "<eos>")]
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A <eos>", special_tokens=ends)
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def save_model(folder, family):
    model_class, config_class = FAMILIES[family]
    torch.manual_seed(0)
    model = model_class(config_class(text_config=TEXT, vision_config={**VISION, "projection_dim": 24}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * (0.2 if parameter.ndim > 1 else 0.1)
    model.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size=size, do_center_crop=False).save_pretrained(folder)
    save_tokenizer(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders with a tiny model of each family, its tokenizer and image processor."""
    folders = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, folder in folders.items():
        save_model(folder, family)
    return folders


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_the_logits_of_the_model_and_the_order_of_its_pipeline(models, family, photographs):
    model = load_encoder(str(models[family]))
    tokenizer = load_tokenizer(str(models[family]))
    classifier = ZeroShotClassifier.of(model, tokenizer, PROMPTS)
    padding = {"padding": "max_length", "max_length": 64} if family == "siglip" else {"padding": True}
    tokens = tokenizer(PROMPTS, return_tensors="pt", **padding)
    image_processor, names = CLIPImageProcessorPil.from_pretrained(models[family]), ["dark cat", "pale dog", "red"]
    classify = pipeline(
        "zero-shot-image-classification", model=model, tokenizer=tokenizer, image_processor=image_processor
    )
    for path in sorted(photographs.glob("*/0.png")):
        image = Image.open(path)
        pixel_values = image_processor(image, return_tensors="pt").pixel_values
        with torch.inference_mode():
            features, _ = encode(model, None, pixel_values, classifier=classifier)
            expected = model(pixel_values=pixel_values, **tokens)
        torch.testing.assert_close(features.logits, expected.logits_per_image)
        torch.testing.assert_close(nn.functional.normalize(features.embeddings, dim=-1), expected.image_embeds)
        answers = classify(image, candidate_labels=names, hypothesis_template="a photo of a {}.")
        order = [names[label] for label in features.logits[0].argsort(descending=True)]
        assert [answer["label"] for answer in answers] == order


@pytest.mark.parametrize("name", ("ChineseCLIP", "AltCLIP", "Aimv2"))
def test_answers_of_other_families_are_the_logits_of_the_model(models, name):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(text_config={**TEXT, "project_dim": 24}, vision_config=VISION)
    model, tokenizer = getattr(transformers, f"{name}Model")(config).eval(), load_tokenizer(str(models["clip"]))
    classifier, pixel_values = ZeroShotClassifier.of(model, tokenizer, PROMPTS), torch.randn(4, 3, 32, 32)
    tokens = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    with torch.inference_mode():
        features, _ = encode(model, None, pixel_values, classifier=classifier)
        expected = model(pixel_values=pixel_values, **tokens)
    torch.testing.assert_close(features.logits, expected.logits_per_image)


@pytest.mark.parametrize("family", FAMILIES)
def test_zero_shot_is_measured_beside_the_other_figures(models, family, photographs, monkeypatch):
    model_class, calls = FAMILIES[family][0], []
    get_text_features = model_class.get_text_features
    monkeypatch.setattr(
        model_class, "get_text_features", lambda *args, **named: calls.append(0) or get_text_features(*args, **named)
    )
    schedules = ["full", "2x", "4x", "full@0.5"]
    results = run_encoder_benchmark(EncoderBenchmarkArguments(str(models[family]), str(photographs), schedules))
    assert len(calls) == 1
    assert results["prompts"] == PROMPTS and results["num_images"] == 15
    unreduced, full, *reduced = results["rows"]
    timing = {"schedule", "images_per_second", "speedup"}
    assert {name for name in full if full[name] != unreduced[name]} <= timing
    for row in (unreduced, full):
        assert row["zero_shot_agreement"] == 100 and row["zero_shot_kl"] == 0 and row["zero_shot_top1_drop"] == 0
        assert row["embedding_cosine"] == pytest.approx(1, abs=1e-12)
    for row in reduced:
        assert row["zero_shot_kl"] > 0 and row["embedding_cosine"] < 1 and row["patch_cosine"] < 1
        assert row["zero_shot_top1_drop"] == pytest.approx(unreduced["zero_shot_top1"] - row["zero_shot_top1"])
        assert 0 <= row["zero_shot_agreement"] <= 100
    assert reduced[1]["zero_shot_kl"] > reduced[0]["zero_shot_kl"]


def test_the_encoder_of_images_is_adapted_and_evaluated_in_the_whole_model(models, photographs, tmp_path):
    name, images = str(models["clip"]), str(photographs)
    adapted = adapt_encoder(
        EncoderAdaptationArguments(name, images, str(tmp_path), ["2x"], num_steps=8, batch_size=5, learning_rate=3e-3)
    )
    assert adapted["training"]["num_images"] == 15
    results = run_encoder_benchmark(EncoderBenchmarkArguments(name, images, ["2x"], adaptation=str(tmp_path)))
    _, original, row = results["rows"]
    assert [original["network"], row["network"]] == ["original", "adapted"]
    assert row["zero_shot_kl"] != original["zero_shot_kl"]


def test_classes_are_named_by_their_folders_or_by_a_file(tmp_path):
    assert class_prompts(FOLDERS, "a photo of a {}.") == PROMPTS
    path = tmp_path / "names.json"
    path.write_text(json.dumps({"n01440764": "tench", "n02102040": "English springer", "more": "cat"}))
    assert class_prompts(["n02102040", "n01440764"], "{}", str(path)) == ["English springer", "tench"]


def test_bad_input_is_refused_before_any_evaluation(models, photographs, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.encoders.encode", None)  # not reached
    clip, output_dir = models["clip"], tmp_path / "results"
    arguments = EncoderBenchmarkArguments(str(clip), str(photographs), ["2x"], output_dir=str(output_dir))
    for name in ("no tokenizer", "vision"):
        CLIPImageProcessorPil.from_pretrained(clip).save_pretrained(tmp_path / name)
    CLIPModel.from_pretrained(clip).save_pretrained(tmp_path / "no tokenizer")
    CLIPVisionModel.from_pretrained(clip).save_pretrained(tmp_path / "vision")
    ids = tmp_path / "ids"
    for number, folder in enumerate(FOLDERS):
        shutil.copytree(photographs / folder, ids / f"n0000000{number}")
    names = {"lacking": {"n00000000": "cat", "n00000002": "dog"}, "list": ["cat", "dog"], "empty": {"n00000000": ""}}
    for name, content in names.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "broken.json").write_text("{")
    for changes, parts in (
        ({"model": str(tmp_path / "no tokenizer")}, ("--model", "no tokenizer")),
        ({"prompt": "a photo"}, ("--prompt", "{}", "'a photo'")),
        ({"images": str(photographs / "red")}, ("no column label", "subfolder for each class")),
        ({"images": str(ids)}, ("n00000000", "--class_names")),
        ({"images": str(ids), "class_names": str(tmp_path / "lacking.json")}, ("lacking.json", "n00000001")),
        ({"class_names": str(tmp_path / "list.json")}, ("list.json", "map folders")),
        ({"class_names": str(tmp_path / "empty.json")}, ("empty.json", "map folders")),
        ({"class_names": str(tmp_path / "broken.json")}, ("broken.json", "cannot be read")),
        ({"class_names": str(tmp_path / "nowhere.json")}, ("nowhere.json", "cannot be read")),
        ({"model": str(tmp_path / "vision"), "class_names": "names.json"}, ("--class_names", "CLIPVisionModel")),
    ):
        with pytest.raises(ValueError, match=naming(*parts)):
            run_encoder_benchmark(replace(arguments, **changes))
    with pytest.raises(FileNotFoundError, match=naming("no adaptation", "nowhere")):
        run_encoder_benchmark(replace(arguments, adaptation=str(tmp_path / "nowhere")))
    assert not output_dir.exists()


def test_images_of_several_sizes_are_refused_by_name(photographs, tmp_path):
    vision = {**LAYERS, "patch_size": 4, "num_patches": 64}
    Siglip2Model(Siglip2Config(text_config=TEXT, vision_config=vision)).save_pretrained(tmp_path)
    Siglip2ImageProcessorPil(patch_size=4, max_num_patches=64).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=naming("Siglip2Model", "several sizes")):
        run_encoder_benchmark(EncoderBenchmarkArguments(str(tmp_path), str(photographs), ["2x"]))
