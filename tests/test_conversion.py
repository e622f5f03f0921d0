"""Checkpoints in timm's names: the authors', DeiT's and timm's; what `load_classifier` refuses; class names."""

import argparse
import json
import os

import pytest
import timm
import torch
from conftest import FAMILIES, naming
from safetensors.torch import save_file
from transformers import PreTrainedConfig

from tnt_hf import TntDeiTForImageClassification, TntViTForImageClassification, conversion
from tnt_hf.conversion import (
    checkpoint_classes,
    load_classifier,
    load_for_inference,
    load_research_checkpoint,
    to_plain_model,
)


SIZES = {
    "tiny": {"hidden_size": 192, "num_attention_heads": 3},
    "small": {"hidden_size": 384, "num_attention_heads": 6},
    "base": {"hidden_size": 768, "num_attention_heads": 12},
    "large": {"hidden_size": 1024, "num_attention_heads": 16},
}


def timm_model(name, **fields):
    torch.manual_seed(0)
    fields = {"depth": 2, "num_classes": 5, "img_size": 32, "patch_size": 8, **fields}
    return timm.create_model(name, pretrained=False, **fields).eval()


@pytest.fixture
def said(monkeypatch):
    """The warnings of the conversion."""
    messages = []
    monkeypatch.setattr(conversion.logger, "warning", messages.append)
    return messages


@pytest.fixture
def state_dict():
    return timm_model("deit_tiny_distilled_patch16_224").state_dict()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ("deit_distilled", "vit"))
def test_logits_equal_timm(kind, size):
    if kind == "vit":
        timm_name, model_class = "vit_base_patch16_224", TntViTForImageClassification
    else:
        timm_name, model_class = "deit_base_distilled_patch16_224", TntDeiTForImageClassification
    reference = timm_model(
        timm_name, embed_dim=SIZES[size]["hidden_size"], num_heads=SIZES[size]["num_attention_heads"]
    )
    if kind == "deit_distilled":
        reference.set_distilled_training(False)
    model = load_research_checkpoint(reference.state_dict())
    assert type(model) is model_class
    fields = ("num_hidden_layers", "image_size", "patch_size", "num_labels", "layer_norm_eps")
    assert [getattr(model.config, field) for field in fields] == [2, 32, 8, 5, 1e-6]
    assert model.config.num_attention_heads == SIZES[size]["num_attention_heads"]
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(images).logits, reference(images), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("container", ("bare", "model", "state_dict", "with Namespace", "safetensors"))
def test_files_of_every_make_load(state_dict, tmp_path, container):
    path = tmp_path / ("model.safetensors" if container == "safetensors" else "model.pth")
    if container == "safetensors":
        save_file(state_dict, path)
    elif container == "with Namespace":
        torch.save({"model": state_dict, "epoch": 39, "args": argparse.Namespace(lr=5e-4, model="deit")}, path)
    else:
        torch.save(state_dict if container == "bare" else {container: state_dict}, path)
    model = load_research_checkpoint(path, prune_layers=[0], keep_rates=[0.5])
    assert torch.equal(model.deit.embeddings.cls_token, state_dict["cls_token"])
    assert model.config.prune_layers == [0]


class Payload:
    def __reduce__(self):
        return os.mkdir, ("created-by-a-pickle",)


def test_pickle_with_code_is_refused_and_not_run(state_dict, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": state_dict, "args": Payload()}, "model.pth")
    with pytest.raises(ValueError, match=naming("model.pth", "mkdir", "argparse.Namespace")):
        load_research_checkpoint("model.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


@pytest.mark.parametrize("suffix", (".pth", ".safetensors"))
@pytest.mark.parametrize("content", (b"", b"<html>not found</html>", "truncated"))
def test_damaged_file_is_refused(state_dict, tmp_path, suffix, content):
    path = tmp_path / f"model{suffix}"
    if content == "truncated":
        save_file(state_dict, path) if suffix == ".safetensors" else torch.save(state_dict, path)
        content = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=naming(f"model{suffix}", "readable")):
        load_research_checkpoint(path)


def test_absent_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.pth"):
        load_research_checkpoint(tmp_path / "absent.pth")


@pytest.mark.parametrize(
    ("change", "named"),
    (
        (lambda state: state.pop("head.weight"), ["head.weight"]),
        (lambda state: state.pop("blocks.1.norm1.weight"), ["1 tensors", "layers.1.layernorm_before.weight"]),
        (lambda state: state.pop("head_dist.bias"), ["1 tensors", "distillation_classifier.bias"]),
        (lambda state: state.pop("blocks.0.attn.qkv.weight"), ["3 tensors", "layers.0.attention.k_proj.weight"]),
        (lambda state: state.update({"blocks.0.ls1.gamma": torch.ones(192)}), ["1 tensors", "blocks.0.ls1.gamma"]),
        (lambda state: state.update({"norm.bias": torch.full((192,), float("nan"))}), ["finite", "norm.bias"]),
        (lambda state: state.update({"norm.bias": torch.ones(191)}), ["norm.bias", (191,), (192,)]),
        (lambda state: state.update({"alpha_heads.0.weight": torch.ones(1, 192)}), ["missing", "alpha_heads"]),
        (
            lambda state: state.update({"pos_embed": torch.ones(1, 17, 192)}),
            ["`image_size`", "15 position embeddings"],
        ),
    ),
)
def test_incomplete_or_foreign_state_dict_is_refused(state_dict, change, named):
    change(state_dict)
    with pytest.raises(ValueError, match=naming(*named)):
        load_research_checkpoint(state_dict)


def test_unknown_width_needs_the_number_of_heads():
    state_dict = timm_model("vit_tiny_patch16_224", embed_dim=48, num_heads=3).state_dict()
    with pytest.raises(ValueError, match=naming("`num_attention_heads`", "192, 384, 768, 1024", 48)):
        load_research_checkpoint(state_dict)
    for num_heads in (5, 0, -3):
        with pytest.raises(ValueError, match=naming("`num_attention_heads`", 48, num_heads)):
            load_research_checkpoint(state_dict, num_attention_heads=num_heads)
    assert load_research_checkpoint(state_dict, num_attention_heads=3).config.num_attention_heads == 3


def test_images_that_are_not_square_load_with_their_size():
    reference = timm_model("vit_tiny_patch16_224", img_size=(32, 48))
    with pytest.raises(ValueError, match="image_size=\\["):
        load_research_checkpoint(reference.state_dict())
    model = load_research_checkpoint(reference.state_dict(), image_size=[32, 48])
    images = torch.randn(2, 3, 32, 48)
    torch.testing.assert_close(model(images).logits, reference(images), atol=1e-5, rtol=1e-4)


def test_something_else_is_refused(tmp_path):
    torch.save([1, 2, 3], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=naming("list.pth", "state dict")):
        load_research_checkpoint(tmp_path / "list.pth")


@pytest.mark.parametrize(
    ("fields", "got"),
    (({"mlp_ratio": 3}, "192, 576, True"), ({"qkv_bias": False}, "192, 768, False")),
)
def test_heads_are_not_assumed_for_another_geometry_of_a_known_width(fields, got):
    reference = timm_model("vit_tiny_patch16_224", num_heads=4, **fields)
    with pytest.raises(ValueError, match=naming("`num_attention_heads`", "`qkv_bias`", got)):
        load_research_checkpoint(reference.state_dict())
    model = load_research_checkpoint(reference.state_dict(), num_attention_heads=4)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(images).logits, reference(images), atol=1e-5, rtol=1e-4)


def test_what_is_assumed_is_said_and_recorded(state_dict, said, tmp_path):
    model = load_research_checkpoint(state_dict, layer_norm_eps=1e-5)
    assumed = {"num_attention_heads": 3, "hidden_act": "gelu"}
    assert model.config.conversion == {"assumed": assumed, "compared_with": None}
    (message,) = said
    for word in ("num_attention_heads 3, hidden_act gelu", "tnt_hf assumes", "12 heads", "compare_with"):
        assert word in message
    assert "layer_norm_eps" not in message

    model.save_pretrained(tmp_path / "tnt")
    reloaded = load_classifier(tmp_path / "tnt")
    assert reloaded.config.conversion == model.config.conversion
    to_plain_model(reloaded).save_pretrained(tmp_path / "plain")
    assert load_classifier(tmp_path / "plain").config.conversion == model.config.conversion


def test_nothing_is_assumed_of_what_is_given(said):
    reference = timm_model("vit_tiny_patch16_224", num_heads=12, act_layer=torch.nn.ReLU)
    for block in reference.blocks:
        block.norm1.eps = block.norm2.eps = 0.1
    reference.norm.eps = 0.1
    fields = {"num_attention_heads": 12, "layer_norm_eps": 0.1, "hidden_act": "relu"}
    model = load_research_checkpoint(reference.state_dict(), **fields)
    assert not said and model.config.conversion["assumed"] == {}
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(images).logits, reference(images), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "value"),
    (("layer_norm_eps", 0.0), ("layer_norm_eps", -1e-6), ("layer_norm_eps", float("nan")), ("hidden_act", "gelo")),
)
def test_bad_eps_or_activation_is_refused(state_dict, name, value):
    with pytest.raises(ValueError, match=naming(f"`{name}`", value)):
        load_research_checkpoint(state_dict, **{name: value})


def test_checkpoints_of_training_libraries_load(state_dict, said):
    expected = state_dict["blocks.0.attn.qkv.weight"].chunk(3)[0]
    for checkpoint in (
        {"state_dict": {f"model.{key}": value for key, value in state_dict.items()}, "epoch": 3},  # Lightning
        {"module": state_dict, "dp_world_size": 2},  # DeepSpeed
        {"n_averaged": torch.tensor(5), **{f"module.{key}": value for key, value in state_dict.items()}},
    ):
        model = load_research_checkpoint(checkpoint)
        assert torch.equal(model.base_model.layers[0].attention.q_proj.weight, expected)
    assert not any("other weights" in message for message in said)
    load_research_checkpoint({"model": state_dict, "model_ema": state_dict})
    assert any("other weights under 'model_ema'" in message for message in said)
    with pytest.raises(ValueError, match=naming("model, state_dict, module", "['model_ema']")):
        load_research_checkpoint({"model_ema": state_dict})


@pytest.mark.parametrize("wrapping", ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module._orig_mod."))
def test_names_of_wrapped_models_are_unwrapped(state_dict, wrapping):
    wrapped = {f"{wrapping}{key}": value for key, value in state_dict.items()}
    model = load_research_checkpoint(wrapped)
    assert torch.equal(model.deit.embeddings.cls_token, state_dict["cls_token"])


def test_names_of_wrapped_blocks_are_unwrapped(state_dict):
    wrapped = {key.replace("blocks.0.", "blocks.0._orig_mod."): value for key, value in state_dict.items()}
    assert wrapped.keys() != state_dict.keys()
    load_research_checkpoint(wrapped)


def test_two_tensors_of_one_unwrapped_name_are_refused(state_dict):
    state_dict["module.norm.bias"] = torch.ones(192)
    with pytest.raises(ValueError, match=r"norm\.bias and module\.norm\.bias"):
        load_research_checkpoint(state_dict)


@pytest.mark.parametrize("name", ("deit_tiny_distilled_patch16_224", "vit_tiny_patch16_224.augreg_in21k"))
def test_timm_confirms_what_was_assumed(name, said, tmp_path):
    reference = timm_model(name, depth=12, patch_size=16)
    save_file(reference.state_dict(), tmp_path / "model.safetensors")
    model = load_research_checkpoint(
        tmp_path / "model.safetensors", compare_with=name, prune_layers=[0], keep_rates=[0.5]
    )
    assert model.config.conversion["assumed"].keys() == {"num_attention_heads", "layer_norm_eps", "hidden_act"}
    assert model.config.conversion["compared_with"] == f"timm {timm.__version__}: {name}"
    assert all("tnt_hf assumes" not in message for message in said)
    assert model.config.prune_layers == [0] and model.dtype == torch.float32 and not model.training
    assert torch.equal(model.base_model.embeddings.cls_token, reference.cls_token)


def test_scoring_heads_are_left_out_of_the_comparison():
    model = load_research_checkpoint(timm_model("vit_tiny_patch16_224", depth=12, patch_size=16).state_dict())
    state_dict = timm_model("vit_tiny_patch16_224", depth=12, patch_size=16).state_dict()
    state_dict.update(
        {key.removeprefix("vit."): value for key, value in model.state_dict().items() if ".alpha_" in key}
    )
    model = load_research_checkpoint(state_dict, compare_with="vit_tiny_patch16_224")
    assert model.config.conversion["compared_with"] is not None


@pytest.mark.parametrize(
    "fields", ({"num_attention_heads": 12}, {"layer_norm_eps": 1e-12}, {"hidden_act": "gelu_pytorch_tanh"})
)
def test_other_answers_than_timm_are_refused(fields):
    state_dict = timm_model("vit_tiny_patch16_224", depth=12, patch_size=16).state_dict()
    (field,) = fields
    with pytest.raises(
        ValueError, match=naming("timm's vit_tiny", "num_attention_heads 3", f"{field} {fields[field]}", "logits")
    ):
        load_research_checkpoint(state_dict, compare_with="vit_tiny_patch16_224", **fields)


@pytest.mark.parametrize(
    ("name", "named"),
    (
        ("vit_tiny", ("`compare_with`", "vit_small_patch16_224", "'vit_tiny'")),
        ("hf-hub:timm/vit_tiny", ("`compare_with`", "vit_small_patch16_224", "'hf-hub:timm/vit_tiny'")),
        ("resnet18", ("`compare_with`", "32 x 32", "'resnet18'")),
        ("vit_tiny_patch16_224.absent", ("`compare_with`", "32 x 32", "Invalid pretrained tag")),
        ("vit_tiny_patch16_224", ("timm's vit_tiny_patch16_224", "blocks.10.attn.proj.bias", "dist_token")),
    ),
)
def test_model_of_timm_that_does_not_fit_is_refused(state_dict, name, named):
    with pytest.raises(ValueError, match=naming(*named)):
        load_research_checkpoint(state_dict, compare_with=name)


def test_logits_that_tell_nothing_are_not_compared():
    state_dict = timm_model("vit_tiny_patch16_224", depth=12, patch_size=16).state_dict()
    state_dict["head.weight"].zero_()
    with pytest.raises(ValueError, match=naming("timm's vit_tiny_patch16_224", "the same")):
        load_research_checkpoint(state_dict, compare_with="vit_tiny_patch16_224")


def test_classifier_is_found_where_from_pretrained_finds_it(make_model, images, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "ckpt")
    loaded = load_classifier(tmp_path, subfolder="ckpt").eval()
    assert torch.equal(loaded(images).logits, model(images).logits)


@pytest.mark.parametrize("name", ("./absent", "../absent", "/absent/model", "runs/absent/model", "absent/model/"))
def test_path_of_no_folder_is_refused_without_asking_the_hub(monkeypatch, name):
    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", None)  # not reached
    for read in (checkpoint_classes, load_classifier, load_for_inference):
        with pytest.raises(ValueError, match=naming(name, "no such folder")):
            read(name)


@pytest.mark.parametrize("name", ("absent", "absent/model"))
def test_what_may_be_an_id_of_the_hub_and_is_not_found_is_one_line(name):
    with pytest.raises(ValueError, match=f"^{name} could not be loaded: ") as raised:
        load_classifier(name)
    assert "\n" not in str(raised.value) and "no such folder" not in str(raised.value)


def test_config_is_read_with_every_argument_of_the_hub(monkeypatch):
    arguments = {
        "cache_dir": "cache",
        "force_download": True,
        "local_files_only": True,
        "proxies": {"https": "localhost"},
        "revision": "a1b2",
        "subfolder": "ckpt",
        "token": False,
    }

    def read(name, **kwargs):
        assert kwargs == arguments
        raise OSError("read as asked")

    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", read)
    with pytest.raises(ValueError, match="read as asked"):
        load_classifier("org/model", prune_layers=[], **arguments)


@pytest.mark.parametrize(
    ("fields", "named"),
    (
        ({"problem_type": "regression"}, ("`problem_type`", "'single_label_classification'", "'regression'")),
        ({"problem_type": "multi_label_classification"}, ("`problem_type`", "'multi_label_classification'")),
        ({"num_labels": 1}, ("`num_labels`", "at least 2")),
    ),
)
def test_classifier_of_another_problem_is_refused(make_model, tmp_path, fields, named):
    make_model(**fields).save_pretrained(tmp_path)
    problem_type = fields.get("problem_type", "regression")
    assert load_classifier(tmp_path, problem_type=problem_type).config.problem_type == problem_type
    model = load_classifier(tmp_path, allow_new_head=True, id2label={0: "ant", 1: "bee", 2: "cat"})
    assert model.config.problem_type == (None if "num_labels" in fields else "single_label_classification")
    assert model.config.num_labels == 3

    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=naming(tmp_path, *named)):
        load_classifier(tmp_path)
    with pytest.raises(ValueError, match=naming("`num_labels`", "at least 2")):
        load_classifier(tmp_path, allow_new_head=True, id2label={0: "ant"})


@pytest.mark.parametrize("problem_type", (None, "single_label_classification"))
def test_classifier_of_classes_loads(make_model, tmp_path, problem_type):
    make_model(problem_type=problem_type).save_pretrained(tmp_path)
    assert load_classifier(tmp_path).config.problem_type == problem_type


def test_classes_of_a_checkpoint_are_text_by_label(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["id2label"] = {str(label): label or "ant" for label in reversed(range(7))}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert list(checkpoint_classes(tmp_path).items()) == list(enumerate(("ant", "1", "2", "3", "4", "5", "6")))


@pytest.mark.parametrize(
    ("labels", "missing"), ((range(1, 8), 0), ((0, 1, 2, 3, 4, 5, 7), 6), (("a", 1, 2, 3, 4, 5, 6), 0))
)
def test_classes_of_a_checkpoint_that_are_not_numbered_are_refused(make_model, tmp_path, labels, missing):
    make_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["id2label"] = {str(label): "name" for label in labels}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for read in (checkpoint_classes, load_classifier):
        with pytest.raises(ValueError, match=naming(f"`id2label` of {tmp_path}", "0 to 6", f"without {missing}")):
            read(tmp_path)


@pytest.mark.parametrize(
    ("id2label", "named"),
    (
        ({0: "ant", 1: "bee"}, ("5 classes", "2 names")),
        (dict.fromkeys(range(1, 6), "ant"), ("0 to 4", "without 0")),
        (["ant", "bee"], (["ant", "bee"],)),
    ),
)
def test_class_names_must_be_those_of_the_classifier(state_dict, id2label, named):
    with pytest.raises(ValueError, match=naming("`id2label`", *named)):
        load_research_checkpoint(state_dict, id2label=id2label)


def test_subclass_becomes_a_plain_model(family, make_model, images):
    model = make_model()
    expected = to_plain_model(model)
    model.__class__ = type("Mine", (FAMILIES[family][1],), {})
    plain = to_plain_model(model)
    assert type(plain) is type(expected) and torch.equal(plain(images).logits, expected(images).logits)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_plain_model_has_the_precision_of_its_source(make_model, images, dtype):
    model = make_model().to(dtype)
    plain = to_plain_model(model)
    assert plain.dtype == dtype
    assert torch.equal(plain(images.to(dtype)).logits, model(images.to(dtype), output_hidden_states=True).logits)
