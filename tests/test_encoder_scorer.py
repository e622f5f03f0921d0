"""Scoring heads for the vision encoders of Transformers: a model of their own, put on others and trained on them."""

import copy
import pickle

import numpy as np
import pytest
import torch
import transformers
from conftest import count_operations, naming
from datasets import load_dataset
from PIL import Image
from test_encoders import (
    BEFORE_ALL,
    NUM_PATCHES,
    SEVERAL,
    VISION,
    assert_close,
    call,
    is_equal,
    layers_of,
    make_model,
    padded_images,
    pixels,
    tensors_of,
)
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from tnt_hf import TntDeiTConfig, TntDeiTForImageClassification, TntViTConfig, TntViTForImageClassification
from tnt_hf.encoders import TokenScorer, count_layer_gflops, put_back, reduce_tokens, restore_tokens
from tnt_hf.encoders.distillation import ScoreLearning, SelfDistillation
from tnt_hf.encoders.hooks import hooks_of
from tnt_hf.encoders.reduction import first_hook
from tnt_hf.examples import BUNDLED_DATASET, EXAMPLES_DIR
from tnt_hf.examples.cluttered_fashion_mnist.build import clutter
from tnt_hf.schedules_tnt import Schedule


SOME_MODELS = pytest.mark.parametrize(
    "name", ("vit classifier", "deit", "dinov2", "dinov3_vit", "clip vision", "siglip vision", "dpt depth on dinov2")
)
REDUCTIONS = pytest.mark.parametrize("token_reduction", ("drop", "merge"))
ONE = Schedule("one", (1,), (0.5,), 9)
WITHOUT_STATES = {"output_hidden_states": False}


def make_scorer(model, **settings):
    """Heads for the first three of four layers, of larger numbers than untrained ones."""
    torch.manual_seed(1)
    scorer = TokenScorer.for_encoder(model, **{"image_size": 32, "num_noise_layers": 3, **settings})
    with torch.no_grad():
        for value in scorer.parameters():
            value.copy_(torch.randn_like(value))
    return scorer


@SOME_MODELS
@REDUCTIONS
def test_heads_are_put_on_and_taken_off_again(name, token_reduction):
    model, inputs = make_model(name)
    weights, config, plain = copy.deepcopy(model.state_dict()), model.config.to_dict(), call(model, inputs)
    scorer = make_scorer(model, token_reduction=token_reduction, relevance_weight=0.5)
    reduce_tokens(model, "full", scorer=scorer)
    assert is_equal(call(model, inputs), plain)
    restore_tokens(model)
    answers, shapes = [], {key: each.shape for key, each in plain.items()}
    for heads in (scorer, make_scorer(model, relevance_weight=0.0)):
        reduce_tokens(model, BEFORE_ALL, scorer=heads, token_reduction=token_reduction)
        answers.append(call(model, inputs))
        assert {key: each.shape for key, each in answers[-1].items()} == shapes
        assert is_equal(model.state_dict(), weights) and model.config.to_dict() == config
        assert not set(map(id, scorer.parameters())) & set(map(id, model.parameters()))
        restore_tokens(model)
    assert is_equal(*answers) == (token_reduction == "drop")
    assert is_equal(call(model, inputs), plain)
    assert not hooks_of(model)


@pytest.mark.parametrize("schedule", (SEVERAL, BEFORE_ALL, ONE), ids=lambda schedule: schedule.name)
@REDUCTIONS
@pytest.mark.parametrize("family", ("vit", "deit"))
def test_answers_are_those_of_the_native_models_with_the_same_heads(family, token_reduction, schedule):
    config_class, native_class, plain_class = {
        "vit": (TntViTConfig, TntViTForImageClassification, transformers.ViTForImageClassification),
        "deit": (TntDeiTConfig, TntDeiTForImageClassification, transformers.DeiTForImageClassificationWithTeacher),
    }[family]
    torch.manual_seed(0)
    fields = {"token_reduction": token_reduction, "relevance_weight": 0.2}
    native = native_class(config_class(**VISION, **fields, num_labels=7, initializer_range=0.2)).eval()
    native.set_schedule(schedule)
    plain = plain_class(plain_class.config_class(**VISION, num_labels=7)).eval()
    assert not plain.load_state_dict(native.state_dict(), strict=False).missing_keys
    scorer = TokenScorer.for_encoder(plain, **fields, num_noise_layers=3)
    scorer.heads.load_state_dict(native.base_model.alpha_heads[:3].state_dict())
    reduce_tokens(plain, schedule, scorer=scorer, puts_back=False)
    mask = torch.ones(2, native.config.num_prefix_tokens + NUM_PATCHES)
    mask[0, -20:] = 0
    with torch.no_grad():
        torch.testing.assert_close(plain(pixels()).logits, native(pixels()).logits, atol=1e-5, rtol=0)
        for options in ({}, {"attention_mask": mask}):
            tokens, expected = (each.base_model(pixels(), **options).last_hidden_state for each in (plain, native))
            torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=0)


def test_dropped_patches_have_zeros():
    model, inputs = make_model("dinov3_vit")
    scorer = make_scorer(model, token_reduction="drop")
    reduce_tokens(model, SEVERAL, scorer=scorer, puts_back=False)
    short = call(model, inputs)
    last = short[".hidden_states.4"]
    restore_tokens(model)
    reduce_tokens(model, SEVERAL, scorer=scorer)
    whole = call(model, inputs)
    assert torch.equal(put_back(last, last.token_state), whole[".hidden_states.4"])
    patches, kept = whole[".hidden_states.4"][:, 3:], last.token_state.positions
    is_dropped = (patches == 0).all(dim=-1)
    assert is_dropped.sum(dim=1).tolist() == [48, 48]
    assert torch.equal((~is_dropped).nonzero()[:, 1].view(2, -1), kept)
    of_zeros = model.norm(torch.zeros(32))
    assert torch.equal(whole[".last_hidden_state"][:, 3:][is_dropped], of_zeros.expand(96, -1))


@REDUCTIONS
def test_padding_has_no_influence(token_reduction):
    model, _ = make_model("siglip2 vision")
    reduce_tokens(model, SEVERAL, scorer=make_scorer(model, token_reduction=token_reduction))
    grids = ((8, 8), (6, 7), (1, 3))
    inputs = padded_images(grids, 70)
    expected = call(model, inputs)
    for index, (height, width) in enumerate(grids):
        num_patches = height * width
        patches = torch.full((1, num_patches + 5, 48), 5.0)
        patches[:, :num_patches] = inputs["pixel_values"][index, :num_patches]
        mask = (torch.arange(num_patches + 5) < num_patches).long()[None]
        sizes = torch.tensor([grids[index]])
        alone = call(model, {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": sizes})
        for name in (".pooler_output", ".last_hidden_state"):
            own = (alone[name][0], expected[name][index])
            own = own if name == ".pooler_output" else (tokens[:num_patches] for tokens in own)
            torch.testing.assert_close(*own, atol=1e-5, rtol=1e-4)


def test_saved_heads_are_put_on_other_models_with_the_same_encoder(tmp_path):
    model, inputs = make_model("dinov2 classifier")
    scorer = make_scorer(model, token_reduction="drop", image_size=48, noise_std=0.7)
    scorer.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    loaded = TokenScorer.from_pretrained(tmp_path)
    assert {**loaded.config.to_dict(), "_name_or_path": ""} == scorer.config.to_dict()
    assert is_equal(loaded.state_dict(), scorer.state_dict())
    backbone = copy.deepcopy(model.dinov2)
    reduce_tokens(model, "2x", scorer=scorer)
    schedule = reduce_tokens(backbone, "2x", scorer=tmp_path)
    assert call(model, inputs)[".hidden_states.4"].equal(call(backbone, inputs)[".hidden_states.4"])
    whole, reduced = (count_layer_gflops(backbone, each, scorer=tmp_path) for each in (Schedule("", ()), schedule))
    assert 2 <= whole / reduced <= 2 / 0.99
    restore_tokens(backbone)
    reduce_tokens(backbone.half(), "2x", scorer=str(tmp_path))


@pytest.mark.parametrize("means", ("deepcopy", "pickle"))
@REDUCTIONS
def test_copies_have_heads_of_their_own(means, token_reduction):
    model, inputs = make_model("dinov3_vit")
    plain, scorer = call(make_model("dinov3_vit")[0], inputs), make_scorer(model, token_reduction=token_reduction)
    reduce_tokens(model, SEVERAL, scorer=scorer)
    copied = copy.deepcopy(model) if means == "deepcopy" else pickle.loads(pickle.dumps(model))
    reduced = call(model, inputs)
    with torch.no_grad():
        for value in scorer.parameters():
            value.neg_()
    assert is_equal(call(copied, inputs), reduced)
    assert not is_equal(call(model, inputs), reduced)
    restore_tokens(copied)
    assert is_equal(call(copied, inputs), plain)


@pytest.mark.parametrize(("token_reduction", "means"), (("drop", "compile"), ("merge", "export")))
def test_compiled_and_exported_models_reduce_too(token_reduction, means):
    model, inputs = make_model("vit", num_hidden_layers=2)
    scorer = make_scorer(model, num_noise_layers=1, token_reduction=token_reduction)
    reduce_tokens(model, Schedule("", (0,), (0.6,)), scorer=scorer)
    expected = call(model, inputs, **WITHOUT_STATES)
    torch._dynamo.reset()
    with torch.no_grad():
        if means == "compile":
            other = torch.compile(model, backend="eager", fullgraph=True)
        else:
            other = torch.export.export(model, (), inputs, strict=False).module()
        assert_close(tensors_of(other(**inputs)), expected)


def test_heads_score_where_the_tokens_are():
    model, inputs = make_model("dinov2")
    scorer = make_scorer(model)
    reduce_tokens(model, SEVERAL, scorer=scorer)
    shapes = {name: each.shape for name, each in call(model, inputs).items()}
    elsewhere = call(model.to("meta"), {name: each.to("meta") for name, each in inputs.items()})
    assert {name: each.shape for name, each in elsewhere.items()} == shapes
    assert all(each.device.type == "meta" for each in elsewhere.values())
    assert all(value.device.type == "cpu" for value in scorer.parameters())


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@REDUCTIONS
def test_gflops_of_the_layers_equal_fvcore(token_reduction):
    model, _ = make_model("siglip vision")
    scorer = make_scorer(model, token_reduction=token_reduction)
    without_layers = copy.deepcopy(model)
    del layers_of(without_layers)[:]
    gflops = count_layer_gflops(model, BEFORE_ALL, scorer=scorer)
    reduce_tokens(model, BEFORE_ALL, scorer=scorer)
    counted = count_operations(model, pixels(1)) - count_operations(without_layers, pixels(1))
    assert round(1e9 * gflops) == counted


def test_random_selection_is_the_control_that_heads_must_beat():
    model, inputs = make_model("vit")
    scorer = make_scorer(model, token_reduction="drop")
    reduce_tokens(model, SEVERAL, scorer=scorer, selection="random")
    torch.manual_seed(0)
    first, second = call(model, inputs), call(model, inputs)
    torch.manual_seed(0)
    assert is_equal(call(model, inputs), first) and not is_equal(second, first)


@SOME_MODELS
def test_noise_is_added_in_training_calls_alone(name):
    model, inputs = make_model(name)
    plain = call(model.requires_grad_(False), inputs)
    scorer = make_scorer(model, noise_one_layer=False)
    reduce_tokens(model, "2x", scorer=scorer)
    learner = ScoreLearning(model)
    reduced = call(model, inputs)
    if name.startswith("dpt"):
        with pytest.raises(ValueError, match=naming("logits", "pooler_output", "predicted_depth")):
            learner(**inputs)
        assert is_equal(call(model, inputs), reduced)
        return
    model.train()
    learner(**inputs)["loss"].backward()
    assert all(layer.training for layer in layers_of(model))
    gradients = [head.weight.grad.abs().sum() for head in scorer.heads]
    assert len(gradients) == 3 and all(each > 0 for each in gradients)
    assert learner(**inputs)["loss"] != learner(**inputs)["loss"]
    assert all(value.grad is None for value in model.parameters())
    model.eval()
    assert is_equal(call(model, inputs), reduced)
    learner.eval()
    assert learner(**inputs)["loss"] == learner(**inputs)["loss"] > 1e-3
    learner.train()
    with torch.no_grad():
        assert learner(**inputs)["loss"] == learner.eval()(**inputs)["loss"]
    restore_tokens(model)
    assert is_equal(call(model, inputs), plain)


class Pictures(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"pixel_values": pixels(8)[index]}


def test_trainer_trains_heads_and_nothing_else(tmp_path):
    model, _ = make_model("clip vision")
    weights = copy.deepcopy(model.state_dict())
    scorer = make_scorer(model)
    before = copy.deepcopy(scorer.state_dict())
    reduce_tokens(model, "1.5x", scorer=scorer)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, save_strategy="no", report_to="none", use_cpu=True
    )
    trainer = Trainer(ScoreLearning(model), arguments, train_dataset=Pictures())
    trainer.train()
    assert is_equal(model.state_dict(), weights)
    assert not any(torch.equal(value, before[name]) for name, value in scorer.state_dict().items() if "weight" in name)
    scorer.save_pretrained(tmp_path / "scorer")
    restore_tokens(model)
    reduce_tokens(model, "1.5x", scorer=tmp_path / "scorer")
    assert all(value.requires_grad for value in scorer.parameters())
    assert not any(value.requires_grad for value in first_hook(model).scorer.parameters())


def cluttered_images(processor, num_images):
    """Objects among pieces of others, from the bundled test images, in few pixels."""
    rows = load_dataset(str(BUNDLED_DATASET), split=f"test[:{num_images}]")
    objects = np.stack([np.asarray(image.convert("L").resize((40, 40))) for image in rows["image"]])
    scenes, _ = clutter(objects, np.array(rows["label"]), np.random.default_rng(0))
    size = {"height": 28, "width": 28}
    return processor([Image.fromarray(scene).convert("RGB") for scene in scenes], size=size)["pixel_values"]


def test_heads_learn_which_tokens_the_answer_depends_on():
    name, options = EXAMPLES_DIR / "cluttered_backbone", {"interpolate_pos_encoding": True}
    model = transformers.ViTForImageClassification.from_pretrained(name, num_hidden_layers=6)
    processor = transformers.ViTImageProcessorPil.from_pretrained(name)
    seen, others = torch.from_numpy(np.stack(cluttered_images(processor, 256))).split((192, 64))
    torch.manual_seed(4)
    scorer = TokenScorer.for_encoder(model, image_size=28, token_reduction="drop", num_noise_layers=1)

    def distance(**settings):
        """From the answers with all tokens to those when three tenths stay after the first layer."""
        reduce_tokens(model, "0:0.3", scorer=scorer, **settings)
        with torch.no_grad():
            loss = ScoreLearning(model).eval()(pixel_values=others, **options)["loss"].item()
        restore_tokens(model)
        return loss

    untrained, at_random = distance(), distance(selection="random")
    reduce_tokens(model, "0:0.3", scorer=scorer)
    learner = ScoreLearning(model)
    optimizer = torch.optim.Adam(scorer.parameters(), lr=0.05)
    for _ in range(20):
        learner(pixel_values=seen[torch.randint(len(seen), (16,))], **options)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    restore_tokens(model)
    assert distance() < 0.75 * at_random < 0.75 * untrained


def test_layer_norms_adapt_to_what_heads_leave():
    model, inputs = make_model("vit")
    reduce_tokens(model, SEVERAL, scorer=make_scorer(model, token_reduction="drop"))
    learner = SelfDistillation(model, [SEVERAL, "1:0.5"])
    learner(**inputs)["loss"].backward()
    assert all(value.grad is not None for value in learner.parameters() if value.requires_grad)


@pytest.mark.parametrize(
    ("schedule", "options", "named"),
    (
        ("2x", {"token_reduction": "cluster"}, ("token_reduction", "cluster", "drop", "merge", "scorer")),
        ("2x", {"num_noise_layers": 2}, ("num_noise_layers", 2, 3)),
        ("2x", {"noise_layer_norm": True}, ("noise_layer_norm", True, "noise_std")),
        ("2x", {"relevance_weight": -1.0}, ("relevance_weight", -1.0)),
        ("2x", {"noise_std": 0.0}, ("noise_std", 0.0)),
        ("2x", {"image_size": 3}, ("image_size", 3)),
        ("1,3:0.5,0.5", {}, ("1,3:0.5,0.5", "prune_layers", "first 3 layers", "[3]")),
    ),
)
def test_bad_settings_are_named_and_leave_the_model_as_it_was(schedule, options, named):
    model, inputs = make_model("vit")
    plain, scorer = call(model, inputs), make_scorer(model)
    with pytest.raises(ValueError, match=naming(*named)):
        reduce_tokens(model, schedule, scorer=scorer, **options)
    assert not hooks_of(model) and is_equal(call(model, inputs), plain)
    assert all(value.requires_grad for value in scorer.parameters())


@pytest.mark.parametrize(
    ("other", "fields", "named"),
    (
        ("vit", {"hidden_size": 48}, ("hidden_size=32", "hidden_size=48")),
        ("vit", {"num_hidden_layers": 2}, ("num_hidden_layers=4", "num_hidden_layers=2")),
        ("dinov3_vit", {}, ("num_prefix_tokens=1", "num_prefix_tokens=3")),
        ("dinov2", {}, ("other weights",)),
    ),
)
def test_heads_of_another_encoder_are_refused(other, fields, named):
    scorer = make_scorer(make_model("vit")[0])
    model, inputs = make_model(other, **fields)
    plain = call(model, inputs)
    for refused in (reduce_tokens, count_layer_gflops):
        with pytest.raises(ValueError, match=naming(*named)):
            refused(model, SEVERAL, scorer=scorer)
    assert not hooks_of(model) and is_equal(call(model, inputs), plain)


def test_models_that_are_no_scorer_are_refused_by_name(tmp_path):
    model, _ = make_model("vit")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=naming("TokenScorerConfig", "'tnt_scorer', got 'vit'", tmp_path)):
        reduce_tokens(model, "2x", scorer=tmp_path)
    assert not hooks_of(model)


@pytest.mark.parametrize(
    ("settings", "named"),
    (
        ({"noise_std": 0.0}, ("noise_std", 0.0)),
        ({"num_noise_layers": 0}, ("num_noise_layers", 0)),
        ({"num_noise_layers": 4}, ("num_noise_layers", 4)),
        ({"token_reduction": "cluster"}, ("token_reduction", "cluster", "drop")),
        ({"noise_gate": "hard"}, ("noise_gate", "hard", "capacity")),
    ),
)
def test_heads_that_could_not_learn_are_not_made(settings, named):
    with pytest.raises(ValueError, match=naming(*named)):
        make_scorer(make_model("vit")[0], **settings)


def test_models_without_heads_have_none_that_learn():
    model, _ = make_model("vit")
    with pytest.raises(ValueError, match=naming("ViTModel", "does not reduce")):
        ScoreLearning(model)
    reduce_tokens(model, "2x")
    with pytest.raises(ValueError, match=naming("ViTModel", "scorer", "for_encoder")):
        ScoreLearning(model)
    assert all(value.requires_grad for value in model.parameters())
