"""Token reduction in the vision encoders of Transformers, put on models that are already loaded."""

import copy
import pickle
import random
import re
import shutil
import threading

import pytest
import torch
import transformers
from accelerate import disk_offload
from conftest import count_operations, naming
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn

from tnt_hf import TntDeiTConfig, TntDeiTForImageClassification, TntViTConfig, TntViTForImageClassification
from tnt_hf.encoders import Family, count_layer_gflops, put_back, reduce_tokens, restore_tokens
from tnt_hf.encoders.families import known_encoder
from tnt_hf.encoders.hooks import hooks_of
from tnt_hf.encoders.token_states import PaddedTokenState, copied
from tnt_hf.schedules_tnt import Schedule
from tnt_hf.token_reduction_tnt import TokenState


LAYERS = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
VISION = {**LAYERS, "image_size": 32, "patch_size": 4}
TEXT = {**LAYERS, "num_hidden_layers": 2, "vocab_size": 60, "max_position_embeddings": 16}
TEXT = {**TEXT, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LARGE = {**LAYERS, "image_size": [64, 64], "patch_size": [8, 8]}
STAGES = {"out_indices": [1, 2, 3, 4]}
NECK = {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8}
NUM_PATCHES = 64

SEVERAL = Schedule("several", (0, 1, 2), (0.75, 0.7, 0.5))
BEFORE_ALL = Schedule("before all layers", (0, 2), (0.8, 0.6), 9)


def pixels(num_images=2, height=32, width=32):
    return torch.randn(num_images, 3, height, width, generator=torch.Generator().manual_seed(1))


def images():
    return {"pixel_values": pixels()}


def large_images():
    return {"pixel_values": pixels(2, 64, 64)}


def images_of_data_sets():
    return {**large_images(), "dataset_index": torch.tensor([0, 1])}


def masked_images():
    return {"pixel_values": pixels(), "noise": torch.rand(2, NUM_PATCHES, generator=torch.Generator().manual_seed(2))}


def padded_images(grids=((8, 8), (6, 7)), num_tokens=70):
    """Images of several sizes, cut into patches and padded, as SigLIP 2 takes them."""
    generator = torch.Generator().manual_seed(3)
    patches, mask = torch.zeros(len(grids), num_tokens, 48), torch.zeros(len(grids), num_tokens, dtype=torch.long)
    for index, (height, width) in enumerate(grids):
        patches[index, : height * width] = torch.randn(height * width, 48, generator=generator)
        patches[index, height * width :] = 9.0
        mask[index, : height * width] = 1
    return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor(grids)}


def texts_and_images():
    return {"input_ids": torch.tensor([[1, 7, 8, 2], [1, 9, 5, 2]]), **images()}


def questions_and_images():
    ids = torch.tensor([[1, *[59] * NUM_PATCHES, 7, 8]] * 2)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images()}


def llava():
    text = transformers.LlamaConfig(**{**TEXT, "num_key_value_heads": 4, "max_position_embeddings": 128})
    vision = transformers.CLIPVisionConfig(**VISION)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=59, image_seq_length=NUM_PATCHES
    )
    return transformers.LlavaForConditionalGeneration(config)


def made(model, config, inputs=images, **fields):
    def make(**others):
        if not hasattr(transformers, model):
            pytest.skip(f"this version of Transformers has no {model}")
        return getattr(transformers, model)(getattr(transformers, config)(**{**fields, **others}))

    return make, inputs


def in_two_towers(name):
    towers = {"text_config": TEXT, "vision_config": {**VISION, "projection_dim": 24}}
    return made(f"{name}Model", f"{name}Config", texts_and_images, **towers)


def on_backbone(model, config, backbone, **fields):
    def make():
        backbone_config = getattr(transformers, backbone)(**VISION, **STAGES, reshape_hidden_states=False)
        return getattr(transformers, model)(
            getattr(transformers, config)(backbone_config=backbone_config, **NECK, **fields)
        )

    return make, images


MODELS = {
    "vit": made("ViTModel", "ViTConfig", **VISION),
    "vit classifier": made("ViTForImageClassification", "ViTConfig", **VISION, num_labels=7),
    "deit": made("DeiTModel", "DeiTConfig", **VISION),
    "deit distilled": made("DeiTForImageClassificationWithTeacher", "DeiTConfig", **VISION),
    "vit_mae": made("ViTMAEModel", "ViTMAEConfig", masked_images, **VISION, mask_ratio=0.25),
    "vit_mae pretraining": made(
        "ViTMAEForPreTraining",
        "ViTMAEConfig",
        masked_images,
        **VISION,
        **{f"decoder_{name}": value for name, value in LAYERS.items()},
        mask_ratio=0.25,
    ),
    "vit_msn": made("ViTMSNModel", "ViTMSNConfig", **VISION),
    "ijepa": made("IJepaModel", "IJepaConfig", **VISION),
    "beit": made("BeitModel", "BeitConfig", **VISION),
    "beit biases": made("BeitForImageClassification", "BeitConfig", **VISION, use_relative_position_bias=True),
    "beit shared bias": made("BeitModel", "BeitConfig", **VISION, use_shared_relative_position_bias=True),
    "beit backbone": made("BeitBackbone", "BeitConfig", **VISION, **STAGES, use_relative_position_bias=True),
    "dinov2": made("Dinov2Model", "Dinov2Config", **VISION),
    "dinov2 gated": made("Dinov2Model", "Dinov2Config", **VISION, use_swiglu_ffn=True),
    "dinov2 classifier": made("Dinov2ForImageClassification", "Dinov2Config", **VISION),
    "dinov2 backbone": made("Dinov2Backbone", "Dinov2Config", **VISION, **STAGES),
    "dinov2_with_registers": made(
        "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", **VISION, num_register_tokens=3
    ),
    "dinov3_vit": made("DINOv3ViTModel", "DINOv3ViTConfig", **VISION, num_register_tokens=2),
    "dinov3_vit gated": made("DINOv3ViTModel", "DINOv3ViTConfig", **VISION, use_gated_mlp=True),
    "dinov3_vit backbone": made("DINOv3ViTBackbone", "DINOv3ViTConfig", **VISION, **STAGES),
    "tipsv2 vision": made("Tipsv2VisionModel", "Tipsv2VisionConfig", **VISION, num_register_tokens=1),
    "internvl vision": made(
        "InternVLVisionModel", "InternVLVisionConfig", **{**VISION, "image_size": [32, 32], "patch_size": [4, 4]}
    ),
    "clip vision": made("CLIPVisionModel", "CLIPVisionConfig", **VISION),
    "siglip vision": made("SiglipVisionModel", "SiglipVisionConfig", **VISION),
    "siglip classifier": made("SiglipForImageClassification", "SiglipConfig", vision_config=VISION),
    "siglip2 vision": made(
        "Siglip2VisionModel", "Siglip2VisionConfig", padded_images, **LAYERS, patch_size=4, num_patches=NUM_PATCHES
    ),
    "dpt": made("DPTModel", "DPTConfig", **VISION),
    "dpt depth": made(
        "DPTForDepthEstimation", "DPTConfig", **VISION, **NECK, backbone_out_indices=[0, 1, 2, 3], readout_type="add"
    ),
    "dpt depth on dinov2": on_backbone("DPTForDepthEstimation", "DPTConfig", "Dinov2Config", hidden_size=32),
    "dpt depth on beit": on_backbone("DPTForDepthEstimation", "DPTConfig", "BeitConfig", hidden_size=32),
    "depth_anything": on_backbone(
        "DepthAnythingForDepthEstimation",
        "DepthAnythingConfig",
        "Dinov2Config",
        patch_size=4,
        reassemble_hidden_size=32,
        head_hidden_size=4,
    ),
    "clip": in_two_towers("CLIP"),
    "siglip": in_two_towers("Siglip"),
    "metaclip_2": in_two_towers("MetaClip2"),
    "altclip vision": made("AltCLIPVisionModel", "AltCLIPVisionConfig", **VISION),
    "chinese_clip vision": made("ChineseCLIPVisionModel", "ChineseCLIPVisionConfig", **VISION),
    "clipseg vision": made("CLIPSegVisionModel", "CLIPSegVisionConfig", **VISION),
    "owlvit vision": made("OwlViTVisionModel", "OwlViTVisionConfig", **VISION),
    "owlv2 vision": made("Owlv2VisionModel", "Owlv2VisionConfig", **VISION),
    "git vision": made("GitVisionModel", "GitVisionConfig", **VISION),
    "janus vision": made("JanusVisionModel", "JanusVisionConfig", **VISION),
    "aimv2 vision": made("Aimv2VisionModel", "Aimv2VisionConfig", **VISION),
    "idefics3 vision": made("Idefics3VisionTransformer", "Idefics3VisionConfig", **VISION),
    "smolvlm vision": made("SmolVLMVisionTransformer", "SmolVLMVisionConfig", **VISION),
    "vitpose backbone": made("VitPoseBackbone", "VitPoseBackboneConfig", large_images, **LARGE, **STAGES),
    "vitpose experts": made(
        "VitPoseBackbone", "VitPoseBackboneConfig", images_of_data_sets, **LARGE, num_experts=2, part_features=8
    ),
    "llava": (llava, questions_and_images),
}
EVERY_MODEL = pytest.mark.parametrize("name", MODELS)


def make_model(name, **fields):
    """A tiny model of MODELS in evaluation mode, all of whose parameters are random, and inputs of it."""
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    model = make(**fields)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * (0.2 if parameter.ndim > 1 else 0.1)
    return model.eval(), inputs()


def reduce(model, schedule, **options):
    """`reduce_tokens` for images of 32 pixels where the config names no size, as that of SigLIP 2."""
    sizes = {} if hasattr(known_encoder(model)[0].config, "image_size") else {"image_size": 32}
    return reduce_tokens(model, schedule, **sizes | options)


def tensors_of(output, name=""):
    """All tensors in an output by where they are."""
    if isinstance(output, torch.Tensor):
        return {name: output}
    parts = output.items() if isinstance(output, dict) else enumerate(output) if isinstance(output, tuple) else ()
    return {key: each for part, value in parts for key, each in tensors_of(value, f"{name}.{part}").items()}


@torch.no_grad()
def call(model, inputs, **options):
    return tensors_of(model(**inputs, **{"output_hidden_states": True, **options}))


def layers_of(model):
    return known_encoder(model)[0].layers


def is_equal(outputs, others):
    return outputs.keys() == others.keys() and all(torch.equal(outputs[name], others[name]) for name in outputs)


def assert_close(outputs, others, tolerance=1e-5):
    """Equal to a share of the largest value of each tensor, or of 1."""
    assert outputs.keys() == others.keys()
    for name, other in others.items():
        scale = other.nan_to_num().abs().max().clamp(min=1).item()
        torch.testing.assert_close(outputs[name], other, atol=tolerance * scale, rtol=0, equal_nan=True)


@EVERY_MODEL
def test_reduction_keeps_the_shapes_and_can_be_undone(name):
    model, inputs = make_model(name)
    weights, config, plain = copy.deepcopy(model.state_dict()), model.config.to_dict(), call(model, inputs)
    shapes = {key: each.shape for key, each in plain.items()}
    reduce(model, "full")
    assert is_equal(call(model, inputs), plain)
    restore_tokens(model)
    reduce(model, BEFORE_ALL)
    assert {key: each.shape for key, each in call(model, inputs).items()} == shapes
    restore_tokens(model)
    reduce(model, "2x")
    reduced = call(model, inputs)
    assert {key: each.shape for key, each in reduced.items()} == shapes
    assert not is_equal(reduced, plain)
    assert all(torch.equal(reduced[key], plain[key]) for key in plain if key.startswith(".text"))
    assert all(getattr(each, "token_state", None) is None for each in reduced.values())
    in_tuples = call(model, inputs, return_dict=False)
    assert all(torch.equal(*pair) for pair in zip(in_tuples.values(), reduced.values(), strict=True))
    assert is_equal(model.state_dict(), weights) and model.config.to_dict() == config
    restore_tokens(model)
    assert is_equal(call(model, inputs), plain)
    assert not hooks_of(model)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "name",
    (
        *("vit", "deit", "vit_msn", "ijepa", "beit", "beit biases", "beit shared bias", "dinov2", "dinov2 gated"),
        *("dinov2_with_registers", "dinov3_vit", "tipsv2 vision", "clip vision", "altclip vision", "git vision"),
        *(
            "siglip vision",
            "janus vision",
            "aimv2 vision",
            "idefics3 vision",
            "smolvlm vision",
            "owlvit vision",
            "dpt",
        ),
    ),
)
def test_other_shapes_and_odd_grids(name, seed):
    draw = random.Random(f"{name} {seed}")
    num_heads, num_layers, grid, patch_size = (
        draw.choice(each) for each in ((1, 2, 3), (2, 3, 5), (3, 5, 7), (2, 3, 5))
    )
    shape = {"num_attention_heads": num_heads, "hidden_size": 8 * num_heads, "num_hidden_layers": num_layers}
    patches = {"image_size": grid * patch_size, "patch_size": patch_size}
    model, _ = make_model(name, **shape, **patches, intermediate_size=draw.choice((16, 40)))
    inputs = {"pixel_values": pixels(3, grid * patch_size, grid * patch_size)}
    plain = call(model, inputs)
    reduce_tokens(model, "full")
    assert is_equal(call(model, inputs), plain)
    restore_tokens(model)
    layers = tuple(range(min(num_layers - 1, 3)))
    schedule = Schedule("", layers, (0.6,) * len(layers))
    reduce_tokens(model, schedule, token_reduction=draw.choice(("cluster", "merge")))
    reduced = call(model, inputs)
    assert {key: each.shape for key, each in reduced.items()} == {key: each.shape for key, each in plain.items()}
    assert not is_equal(reduced, plain)
    restore_tokens(model)
    assert is_equal(call(model, inputs), plain)


@EVERY_MODEL
@pytest.mark.parametrize("token_reduction", ("merge", "cluster"))
def test_merging_equal_tokens_changes_no_answer(name, token_reduction):
    model, inputs = make_model(name)
    with torch.no_grad():
        for key, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "text" not in key and re.search("position.*embed|position_bias|inv_freq", key):
                tensor.zero_()
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == module.stride:
            module.padding = (0, 0)  # that of ViTPose gives a border to the outer patches
    colours = torch.randn(2, 3, 8, 2, generator=torch.Generator().manual_seed(4))
    colours[:, :, 1] = colours[:, :, 0]  # so that sizes differ
    size = inputs["pixel_values"].shape[-1]
    inputs["pixel_values"] = colours.repeat_interleave(size // 8, 2).repeat_interleave(size // 2, 3)
    if "noise" in inputs:
        model.config.mask_ratio, inputs["noise"] = 0.0, torch.linspace(0, 1, NUM_PATCHES).expand(2, -1)
    if "spatial_shapes" in inputs:
        patches = colours.flatten(2).transpose(1, 2).repeat_interleave(4, 1).repeat(1, 1, 16)
        inputs = {**padded_images(((8, 8), (8, 8)), 64), "pixel_values": patches}
    plain = call(model, inputs)
    reduce(model, Schedule("", (0, 1), (0.5, 0.5)), token_reduction=token_reduction, size_bias=1.0)
    assert_close(call(model, inputs), plain)


@pytest.mark.parametrize("schedule", (SEVERAL, BEFORE_ALL), ids=lambda schedule: schedule.name)
@pytest.mark.parametrize("token_reduction", ("merge", "cluster"))
@pytest.mark.parametrize("family", ("vit", "deit"))
def test_answers_are_those_of_the_native_models(family, token_reduction, schedule):
    config_class, native_class, plain_class = {
        "vit": (TntViTConfig, TntViTForImageClassification, transformers.ViTForImageClassification),
        "deit": (TntDeiTConfig, TntDeiTForImageClassification, transformers.DeiTForImageClassificationWithTeacher),
    }[family]
    torch.manual_seed(0)
    fields = {"token_reduction": token_reduction, "relevance_weight": 0.0, "initializer_range": 0.2}
    native = native_class(config_class(**VISION, **fields, num_labels=7)).eval()
    native.set_schedule(schedule)
    plain = plain_class(plain_class.config_class(**VISION, num_labels=7)).eval()
    assert not plain.load_state_dict(native.state_dict(), strict=False).missing_keys
    reduce_tokens(plain, schedule, token_reduction=token_reduction)
    mask = torch.ones(2, native.config.num_prefix_tokens + NUM_PATCHES)
    mask[0, -20:] = 0
    with torch.no_grad():
        torch.testing.assert_close(plain(pixels()).logits, native(pixels()).logits, atol=1e-5, rtol=1e-4)
        tokens = plain.base_model(pixels()).last_hidden_state
        expected = native.base_model(pixels(), output_groups=True)
        left = native.base_model(pixels(), attention_mask=mask).last_hidden_state[:, 0]
        torch.testing.assert_close(plain.base_model(pixels(), attention_mask=mask).last_hidden_state[:, 0], left)
    groups, num_prefix = expected.patch_groups[:, -1], native.config.num_prefix_tokens
    for index, image in enumerate(expected.last_hidden_state):
        _, places = groups[index].unique(return_inverse=True)
        on_grid = torch.cat((image[:num_prefix], image[num_prefix:][places]))
        torch.testing.assert_close(tokens[index], on_grid, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("is_padded", (False, True), ids=("plain", "padded"))
def test_copied_state_holds_all_that_the_state_does(is_padded):
    tokens, settings = torch.randn(2, 5, 8), TntViTConfig(hidden_size=8, num_attention_heads=1, noise_one_layer=True)
    is_seen = torch.ones(2, 5, dtype=torch.bool)
    state = PaddedTokenState(tokens, settings, is_seen) if is_padded else TokenState(tokens, settings, is_seen)
    state.schedule = state.scorer = state.adds_noise = None
    state.add_noise(0, torch.zeros(2, 4))
    other = copied(state)
    assert type(other) is type(state) and vars(other) == vars(state) and other is not state


@pytest.mark.parametrize("schedule", (SEVERAL, BEFORE_ALL), ids=lambda schedule: schedule.name)
def test_padding_has_no_influence(schedule):
    model, _ = make_model("siglip2 vision")
    reduce(model, schedule)
    grids = ((8, 8), (6, 7), (1, 3), (7, 6))
    inputs = padded_images(grids, 70)
    expected = call(model, inputs)
    for index, (height, width) in enumerate(grids):
        num_patches = height * width
        for num_padding in (0, 1, 40):
            patches = torch.full((1, num_patches + num_padding, 48), 5.0)
            patches[:, :num_patches] = inputs["pixel_values"][index, :num_patches]
            mask = (torch.arange(num_patches + num_padding) < num_patches).long()[None]
            alone = {
                "pixel_values": patches,
                "pixel_attention_mask": mask,
                "spatial_shapes": torch.tensor([grids[index]]),
            }
            for name, tensor in call(model, alone).items():
                own = (tensor[0], expected[name][index])
                own = own if name == ".pooler_output" else (tokens[:num_patches] for tokens in own)
                torch.testing.assert_close(*own, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "options"),
    (
        ("vit classifier", {"interpolate_pos_encoding": True}),
        ("beit biases", {"interpolate_pos_encoding": True}),
        ("beit shared bias", {}),
        ("dinov2", {}),
        ("dinov3_vit", {}),
        ("clip vision", {"interpolate_pos_encoding": True}),
        ("dpt depth on dinov2", {}),
    ),
)
def test_images_of_another_size_lose_the_same_shares(name, options):
    model, _ = make_model(name)
    inputs, options = {"pixel_values": pixels(1, 48, 40)}, {**options, "output_hidden_states": False}
    plain = call(model, inputs, **options)
    reduce(model, "2x")
    lengths = []
    for layer in layers_of(model):
        layer.register_forward_hook(lambda module, inputs, output: lengths.append(inputs[0].shape[1]))
    reduced = call(model, inputs, **options)
    assert {key: each.shape for key, each in reduced.items()} == {key: each.shape for key, each in plain.items()}
    assert all(each.isfinite().all() for each in reduced.values())
    assert lengths[0] > 120 and 2 * lengths[-1] < lengths[0]


COMPILES = (pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"))
SOME_MODELS = pytest.mark.parametrize("name", ("vit classifier", "beit biases", "dinov3_vit", "siglip2 vision", "dpt"))


def in_a_new_process(path, **options):
    """As if no hook had been registered in this process, and others are before the model is used."""
    registered, torch.utils.hooks.RemovableHandle.next_id = torch.utils.hooks.RemovableHandle.next_id, 0
    try:
        model = torch.load(path, **options)
        for module in model.modules():
            module.register_forward_pre_hook(lambda module, inputs: None)
            module.register_forward_hook(lambda module, inputs, output: None)
    finally:
        torch.utils.hooks.RemovableHandle.next_id = max(registered, torch.utils.hooks.RemovableHandle.next_id)
    return model


@SOME_MODELS
@pytest.mark.parametrize("means", ("deepcopy", "pickle", "file"))
def test_copies_reduce_as_the_model_does_and_are_restored_apart_from_it(name, means, tmp_path):
    model, inputs = make_model(name)
    plain = call(model, inputs)
    reduce(model, SEVERAL)
    if means == "deepcopy":
        copied = copy.deepcopy(model)
    elif means == "pickle":
        copied = pickle.loads(pickle.dumps(make_reduced(name)))
    else:
        torch.save(make_reduced(name), tmp_path / "model.pt")
        copied = in_a_new_process(tmp_path / "model.pt", weights_only=False)
    reduced = call(model, inputs)
    assert is_equal(call(copied, inputs), reduced)
    assert len(hooks_of(copied)) == len(hooks_of(model))
    restore_tokens(copied)
    assert is_equal(call(copied, inputs), plain)
    assert is_equal(call(model, inputs), reduced)
    reduce(copied, SEVERAL)
    restore_tokens(model)
    assert is_equal(call(model, inputs), plain)
    assert is_equal(call(copied, inputs), reduced)


def make_reduced(name):
    """A model that has not recorded hidden states yet, as with the hooks for that no model can be pickled."""
    model, _ = make_model(name)
    reduce(model, SEVERAL)
    return model


def test_saved_model_loads_as_the_plain_one(tmp_path):
    model, inputs = make_model("clip")
    plain = call(model, inputs)
    reduce_tokens(model, "2x")
    model.save_pretrained(tmp_path)
    assert "tnt" not in (tmp_path / "config.json").read_text()
    assert is_equal(call(transformers.CLIPModel.from_pretrained(tmp_path).eval(), inputs), plain)


def test_models_that_share_a_config_are_reduced_apart():
    model, inputs = make_model("vit")
    other = transformers.ViTModel(model.config).eval()
    other.load_state_dict(model.state_dict())
    plain = call(model, inputs)
    reduce_tokens(model, "2x")
    assert is_equal(call(other, inputs), plain)
    reduced = call(model, inputs)
    reduce_tokens(other, SEVERAL)
    assert is_equal(call(model, inputs), reduced)
    restore_tokens(model)
    assert is_equal(call(model, inputs), plain)
    assert not is_equal(call(other, inputs), plain)


def test_threads_reduce_each_their_own():
    reduced = [make_model("vit")[0], make_model("vit")[0], make_model("dinov3_vit")[0]]
    for model, schedule in zip(reduced, (SEVERAL, BEFORE_ALL, SEVERAL)):
        reduce_tokens(model, schedule)
    inputs = [{"pixel_values": pixels(num_images)} for num_images in (1, 2, 3)]
    options = {"output_hidden_states": False}
    expected = [[call(model, each, **options) for each in inputs] for model in reduced]
    wrong, barrier = [], threading.Barrier(4)

    def run(thread):
        barrier.wait()
        for turn in range(8):
            index, image = (thread + turn) % 3, (thread + turn // 3) % 3
            if not is_equal(call(reduced[index], inputs[image], **options), expected[index][image]):
                wrong.append((thread, turn))

    threads = [threading.Thread(target=run, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("place", ("attention.q_proj", "mlp.fc1", "layernorm_after", "attention", ""))
def test_exception_within_a_layer_leaves_nothing_behind(place):
    model, inputs = make_model("vit")
    plain, other = call(model, inputs), copy.deepcopy(model)
    reduce_tokens(model, SEVERAL)
    expected = call(model, inputs)

    def fail(*_):
        raise KeyboardInterrupt

    handle = layers_of(model)[1].get_submodule(place).register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model(**inputs)
    handle.remove()
    assert is_equal(call(other, inputs), plain)
    assert is_equal(call(model, inputs), expected)


@SOME_MODELS
def test_gradients_reach_all_parameters_and_are_those_of_recomputed_layers(name):
    model, inputs = make_model(name)
    reduce(model, SEVERAL)
    model.train()

    def gradients():
        model.zero_grad()
        torch.manual_seed(0)  # of stochastic depth and shaken positions
        sum(each.square().sum() for each in tensors_of(model(**inputs)).values()).backward()
        return {key: each.grad for key, each in model.named_parameters() if each.grad is not None}

    expected = gradients()
    unused = {key for key, _ in model.named_parameters()} - set(expected)
    assert all("mask_token" in key for key in unused)
    assert all(each.isfinite().all() and each.abs().sum() > 0 for each in expected.values())
    model.gradient_checkpointing_enable()
    assert_close(gradients(), expected)
    model.eval()
    assert call(model, inputs)


def test_finite_differences_are_the_gradients():
    model, inputs = make_model("dinov2")
    model.double()
    reduce_tokens(model, SEVERAL)
    image = inputs["pixel_values"].double().requires_grad_()
    loss = model(image).last_hidden_state[:, 0].square().sum()
    (gradient,) = torch.autograd.grad(loss, image)
    direction, step = torch.randn(image.shape, dtype=torch.double, generator=torch.Generator().manual_seed(5)), 1e-3
    with torch.no_grad():
        ends = [model(image + sign * step * direction).last_hidden_state[:, 0].square().sum() for sign in (1, -1)]
    torch.testing.assert_close((ends[0] - ends[1]) / (2 * step), (gradient * direction).sum(), rtol=1e-2, atol=0)


def test_reentrant_checkpointing_is_refused():
    model, inputs = make_model("vit")
    reduce_tokens(model, SEVERAL)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    inputs["pixel_values"].requires_grad_()
    with pytest.raises(RuntimeError, match="use_reentrant"):
        model(**inputs).last_hidden_state.sum().backward()


@SOME_MODELS
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_stays_close(name, dtype):
    model, inputs = make_model(name)
    reduce(model, SEVERAL)
    options = {"output_hidden_states": False}
    expected = call(model, inputs, **options)
    with torch.autocast("cpu", dtype):
        automatic = call(model, inputs, **options)
    model.to(dtype)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    for outputs in (automatic, call(model, inputs, **options)):
        for key, each in outputs.items():
            assert each.isfinite().all() and each.shape == expected[key].shape
            assert nn.functional.cosine_similarity(each.float().flatten(), expected[key].flatten(), dim=0) > 0.9


@pytest.mark.parametrize(
    ("name", "num_layers", "backend"),
    (("beit biases", 2, "eager"), pytest.param("vit", 1, "inductor", marks=COMPILES)),
)
def test_compiled_models_reduce_too(name, num_layers, backend):
    model, inputs = make_model(name, num_hidden_layers=num_layers)
    torch._dynamo.reset()
    compiled, options = torch.compile(model, backend=backend, fullgraph=True), {"output_hidden_states": False}
    plain = call(compiled, inputs, **options)
    reduce_tokens(model, Schedule("", (0, 1)[:num_layers], (0.6, 0.5)[:num_layers]))
    assert_close(call(compiled, inputs, **options), call(model, inputs, **options))
    restore_tokens(model)
    assert is_equal(call(compiled, inputs, **options), plain)


def test_breaks_of_the_graph_lose_nothing():
    model, inputs = make_model("vit", num_hidden_layers=1)
    reduce_tokens(model, Schedule("", (0,), (0.5,)))
    expected = call(model, inputs)
    for place in ("attention.q_proj", "mlp.fc1"):
        layers_of(model)[0].get_submodule(place).register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    torch._dynamo.reset()
    assert_close(call(torch.compile(model, backend="eager"), inputs), expected)


@pytest.mark.parametrize("strict", (False, True))
def test_exported_models_reduce_too(strict):
    model, inputs = make_model("dinov3_vit", num_hidden_layers=1)
    reduce_tokens(model, Schedule("", (0,), (0.5,)))
    sizes = {"pixel_values": {0: torch.export.Dim("batch_size", min=1, max=64)}}
    with torch.no_grad():
        exported = torch.export.export(model, (), inputs, strict=strict, dynamic_shapes=sizes).module()
        others = {"pixel_values": pixels(5)}
        assert_close(tensors_of(exported(**others)), tensors_of(model(**others)))


@pytest.mark.filterwarnings("ignore")
def test_traced_model_reduces_too():
    model, inputs = make_model("dinov2")
    reduce_tokens(model, SEVERAL)
    with torch.no_grad():
        traced = torch.jit.trace(model, example_kwarg_inputs=inputs, strict=False)
        assert_close(traced(**inputs), dict(model(**inputs)))


def test_distributed_training_and_offloaded_weights(tmp_path):
    model, inputs = make_model("dinov2")
    reduce_tokens(model, SEVERAL)
    expected = call(model, inputs)

    def gradients(model):
        model.zero_grad()
        model(**inputs).pooler_output.square().sum().backward()
        return [each.grad.clone() for each in model.parameters() if each.grad is not None]

    own = gradients(model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        assert all(torch.equal(*pair) for pair in zip(gradients(parallel), own, strict=True))
        del parallel
    finally:
        torch.distributed.destroy_process_group()
    disk_offload(model, tmp_path, execution_device="cpu")
    assert layers_of(model)[0].mlp.fc1.weight.device.type == "meta"
    assert is_equal(call(model, inputs), expected)


@pytest.mark.parametrize(
    ("name", "num_tokens"),
    (
        ("vit classifier", (65, 49, 34, 17)),
        ("beit biases", (65, 49, 34, 17)),
        ("dinov3_vit", (67, 51, 36, 19)),
        ("dpt", (65, 49, 34, 17)),
        ("siglip2 vision", (70, 52, 36, 18)),
    ),
)
def test_eager_attention_gives_the_same_answers_and_its_weights(name, num_tokens):
    model, inputs = make_model(name)
    reduce(model, SEVERAL)
    expected = call(model, inputs)
    model.set_attn_implementation("eager")  # after it was reduced
    outputs = call(model, inputs, output_attentions=True)
    attentions = [outputs.pop(f".attentions.{layer}") for layer in range(4)]
    assert [attention.shape[-1] for attention in attentions] == [*num_tokens]
    for attention in attentions:
        torch.testing.assert_close(attention.sum(dim=-1), torch.ones(attention.shape[:-1]))
    assert_close(outputs, expected)


def test_output_may_stay_short():
    model, inputs = make_model("dinov3_vit")
    reduce_tokens(model, SEVERAL, puts_back=False)
    outputs = call(model, inputs)
    lengths = [outputs[f".hidden_states.{index}"].shape[1] for index in range(5)]
    assert lengths == [67, 51, 36, 19, 19]
    assert outputs[".last_hidden_state"].shape[1] == 19
    restore_tokens(model)
    reduce_tokens(model, SEVERAL)
    whole, last = call(model, inputs), outputs[".hidden_states.4"]
    assert torch.equal(put_back(last, last.token_state), whole[".hidden_states.4"])


def test_layers_that_are_not_in_the_table_take_a_family():
    class OtherLayer(type(layers_of(make_model("vit")[0])[0])):
        pass

    model, inputs = make_model("vit")
    reduce_tokens(model, SEVERAL)
    expected = call(model, inputs)
    restore_tokens(model)
    for layer in model.layers:
        layer.__class__ = OtherLayer
    with pytest.raises(ValueError, match=naming("ViTModel", "OtherLayer", "Dinov2Layer")):
        reduce_tokens(model, SEVERAL)
    with pytest.raises(ValueError, match=naming("ViTModel", "OtherLayer", "norm1")):
        reduce_tokens(model, SEVERAL, family=Family(1, ("norm1", "norm2")))
    reduce_tokens(model, SEVERAL, family=Family(1))
    assert is_equal(call(model, inputs), expected)


def test_attention_that_does_not_count_sizes_is_refused():
    model, inputs = make_model("vit")
    plain = call(model, inputs)
    reduce_tokens(model, SEVERAL)
    for layer in model.layers:
        layer.attention.config = model.config
    with pytest.raises(RuntimeError, match="ViTAttention"):
        model(**inputs)
    restore_tokens(model)
    assert is_equal(call(model, inputs), plain)


def pictures(num_images):
    generator = torch.Generator().manual_seed(6)
    colours = torch.randint(256, (num_images, 40, 48, 3), dtype=torch.uint8, generator=generator)
    return [Image.fromarray(each.numpy()) for each in colours]


def tokenizer():
    words = {word: index for index, word in enumerate(("<pad>", "<bos>", "<eos>", "a", "photo", "of", "cat", "dog"))}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


@pytest.mark.parametrize(
    ("task", "name", "processor", "options"),
    (
        ("image-classification", "vit classifier", "ViT", {}),
        ("image-feature-extraction", "dinov2", "ViT", {}),
        ("zero-shot-image-classification", "clip", "CLIP", {"candidate_labels": ["cat", "dog"]}),
        ("depth-estimation", "depth_anything", "DPT", {}),
    ),
)
def test_pipelines_run(task, name, processor, options):
    model, _ = make_model(name)
    sizes = {"size": {"height": 32, "width": 32}, **({"do_center_crop": False} if processor == "CLIP" else {})}
    processor = getattr(transformers, f"{processor}ImageProcessorPil")(**sizes)
    parts = {"tokenizer": tokenizer()} if task.startswith("zero-shot") else {}
    run = transformers.pipeline(task, model=model, image_processor=processor, device="cpu", **parts)

    def answer():
        answers = run(pictures(3), **options)
        return [str(answer["predicted_depth"] if task == "depth-estimation" else answer) for answer in answers]

    plain = answer()
    reduce_tokens(model, "full")
    assert answer() == plain
    restore_tokens(model)
    reduce_tokens(model, "2x")
    assert len(answer()) == 3 and answer() != plain


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "schedule"),
    (
        ("vit", None),
        ("vit", BEFORE_ALL),
        ("dinov2 gated", SEVERAL),
        ("dinov3_vit gated", None),
        ("dinov3_vit gated", SEVERAL),
        ("siglip vision", None),
        ("siglip vision", SEVERAL),
        ("dpt", SEVERAL),
    ),
)
@pytest.mark.parametrize("token_reduction", ("cluster", "merge"))
def test_gflops_of_the_layers_equal_fvcore(name, schedule, token_reduction):
    model, _ = make_model(name)
    without_layers = copy.deepcopy(model)
    del layers_of(without_layers)[:]
    if schedule is None:
        gflops = count_layer_gflops(model)
    else:
        gflops = count_layer_gflops(model, schedule, token_reduction=token_reduction)
        reduce_tokens(model, schedule, token_reduction=token_reduction)
    counted = count_operations(model, pixels(1)) - count_operations(without_layers, pixels(1))
    assert round(1e9 * gflops) == counted


@pytest.mark.parametrize("token_reduction", ("cluster", "merge"))
def test_budgets_are_met_and_follow_the_image_size(token_reduction):
    model, _ = make_model("dinov2")
    for image_size in (32, (48, 64)):
        options = {"image_size": image_size, "token_reduction": token_reduction}
        schedule = reduce_tokens(model, "1.5x", **options)
        reduction = count_layer_gflops(model, **options) / count_layer_gflops(model, schedule, **options)
        assert 1.5 <= reduction <= 1.5 / 0.99
        restore_tokens(model)


def other_model(name):
    """A tiny model without an encoder that can be reduced."""
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    stages = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]}
    if name == "bert":
        return transformers.BertModel(transformers.BertConfig(**small, vocab_size=20))
    if name == "swin":
        return transformers.SwinModel(transformers.SwinConfig(**stages, window_size=2))
    if name == "hiera":
        hiera = {"image_size": [32, 32], "patch_size": [3, 3], "patch_stride": [4, 4], "patch_padding": [1, 1]}
        hiera = {**stages, **hiera, "masked_unit_size": [2, 2], "query_stride": [2, 2], "num_query_pool": 1}
        return transformers.HieraModel(transformers.HieraConfig(**hiera))
    if name == "yolos":  # tokens of detection stand behind those of the patches
        return transformers.YolosModel(transformers.YolosConfig(**small, image_size=[32, 32], patch_size=4))
    if name == "two towers":
        return nn.ModuleDict({"first": make_model("vit")[0], "second": make_model("dinov2")[0]})
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

    config = transformers.Qwen2_5_VLConfig(
        vision_config={"depth": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 64, "out_hidden_size": 32}
    ).vision_config
    return qwen.Qwen2_5_VisionTransformerPretrainedModel(config)


@pytest.mark.parametrize(
    ("name", "named"),
    (
        ("bert", ("BertModel", "BertLayer", "Dinov2Layer")),
        ("swin", ("SwinModel", "SwinStage")),
        ("yolos", ("YolosModel", "YolosLayer")),
        ("hiera", ("HieraModel", "HieraStage")),
        ("qwen", ("Qwen2_5_VL", "VisionBlock")),
        ("two towers", ("first.layers", "second.encoder.layer")),
    ),
)
def test_models_without_one_known_encoder_are_refused_by_name(name, named):
    model = other_model(name)
    with pytest.raises(ValueError, match=naming(*named)):
        reduce_tokens(model, "2x")
    assert not hooks_of(model)


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match=naming("`model`", "str")):
        reduce_tokens("facebook/dinov2-small", "2x")
    with pytest.raises(ValueError, match=naming("Linear", "no list of modules", "Dinov2Layer")):
        reduce_tokens(nn.Linear(3, 3), "2x")


def test_one_of_two_encoders_is_reduced_by_itself():
    model = other_model("two towers")
    plain = [call(tower, images()) for tower in model.values()]
    reduce_tokens(model["second"], SEVERAL)
    assert is_equal(call(model["first"], images()), plain[0])
    assert not is_equal(call(model["second"], images()), plain[1])
    restore_tokens(model)
    assert is_equal(call(model["second"], images()), plain[1])


@pytest.mark.parametrize(
    ("name", "schedule", "options", "named"),
    (
        ("vit", Schedule("deep", (1, 4), (0.5, 0.5)), {}, ("deep", "prune_layers", 3, 4)),
        ("vit", Schedule("long", (1,), (0.9,), 20), {}, ("long", "num_similar_tokens", 20)),
        ("vit", "100x", {}, ("100x", "flops_reduction")),
        ("vit", "2x@16", {}, ("2x@16", "smaller")),
        ("vit", "2x@0.5", {}, ("2x@0.5", "smaller")),
        ("vit", "fast", {}, ("fast", "2x")),
        ("vit", 2.0, {}, ("2.0", "2x")),
        ("vit", "2x", {"token_reduction": "drop"}, ("token_reduction", "drop", "merge", "cluster")),
        ("vit", "2x", {"token_reduction": "average"}, ("token_reduction", "average", "cluster")),
        ("vit", "2x", {"size_bias": -1.0}, ("size_bias", -1.0)),
        ("vit", "2x", {"relevance_weight": 0.1}, ("relevance_weight", 0.1, "size_bias")),
        ("vit", "2x", {"speed": 2}, ("speed", 2, "size_bias")),
        ("vit", "2x", {"image_size": 3}, ("image_size", 3)),
        ("vit", "2x", {"image_size": (32, 0)}, ("image_size", "(32, 0)")),
        ("vit", "2x", {"image_size": (32, 32, 3)}, ("image_size", "(32, 32, 3)")),
        ("vit", "2x", {"image_size": "32"}, ("image_size", "'32'")),
        ("siglip2 vision", "2x", {}, ("image_size", None)),
    ),
)
def test_bad_input_is_named_and_leaves_the_model_as_it_was(name, schedule, options, named):
    model, inputs = make_model(name)
    plain = call(model, inputs)
    with pytest.raises(ValueError, match=naming(*named)):
        reduce_tokens(model, schedule, **options)
    assert not hooks_of(model)
    assert is_equal(call(model, inputs), plain)


@pytest.mark.parametrize("implementation", ("flash_attention_2", "flex_attention"))
def test_attention_that_takes_no_bias_is_refused(implementation):
    model, inputs = make_model("vit")
    plain = call(model, inputs)
    model.config._attn_implementation = implementation
    with pytest.raises(ValueError, match=naming(implementation, "sdpa", "eager")):
        reduce_tokens(model, "2x")
    model.config._attn_implementation = "sdpa"
    assert is_equal(call(model, inputs), plain)


def test_attention_that_takes_no_bias_is_refused_after_the_reduction_too():
    model, inputs = make_model("vit")
    reduce_tokens(model, "2x")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=naming("flash_attention_2", "sdpa", "eager")):
        model(**inputs)


def test_reducing_twice_and_restoring_a_plain_model_are_refused():
    model, inputs = make_model("vit classifier")
    with pytest.raises(ValueError, match=naming("ViTForImageClassification", "does not reduce")):
        restore_tokens(model)
    reduce_tokens(model, SEVERAL)
    reduced = call(model, inputs)
    with pytest.raises(ValueError, match=naming("ViTForImageClassification", "already", "restore_tokens")):
        reduce_tokens(model, "2x")
    assert is_equal(call(model, inputs), reduced)
