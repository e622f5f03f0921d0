"""Token reduction in the vision encoders of Transformers, put on models that are already loaded."""

import copy
import gc
import pickle
import threading
from functools import partial

import pytest
import torch
import transformers
from accelerate import disk_offload
from conftest import count_operations, naming
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from tnt_hf import TntDeiTConfig, TntDeiTForImageClassification, TntViTConfig, TntViTForImageClassification
from tnt_hf.encoders import Family, count_layer_gflops, reduce_tokens, restore_tokens
from tnt_hf.encoders.hooks import hooks_of
from tnt_hf.schedules_tnt import Schedule


LAYERS = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
VISION = {**LAYERS, "image_size": 32, "patch_size": 4}
TEXT = {**LAYERS, "num_hidden_layers": 2, "vocab_size": 60, "max_position_embeddings": 16}
TEXT = {**TEXT, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
STAGES = {"out_indices": [1, 2, 3, 4]}
NECK = {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8}
NUM_PATCHES = 64

SEVERAL = Schedule("several", (0, 1, 2), (0.75, 0.7, 0.5))
BEFORE_ALL = Schedule("before all layers", (0, 2), (0.8, 0.6), 9)


def pixels(num_images=2, height=32, width=32):
    return torch.randn(num_images, 3, height, width, generator=torch.Generator().manual_seed(1))


def images():
    return {"pixel_values": pixels()}


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
    def make():
        return getattr(transformers, model)(getattr(transformers, config)(**fields))

    return make, inputs


def in_two_towers(name, **text):
    towers = {"text_config": {**TEXT, **text}, "vision_config": {**VISION, "projection_dim": 24}}
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
    "siglip": in_two_towers("Siglip", projection_size=32),
    "llava": (llava, questions_and_images),
}
EVERY_MODEL = pytest.mark.parametrize("name", MODELS)


def make_model(name):
    """A tiny model of MODELS in evaluation mode, all of whose parameters are random, and inputs of it."""
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * (0.2 if parameter.ndim > 1 else 0.1)
    return model.eval(), inputs()


def reduce(model, schedule, **options):
    """`reduce_tokens` for images of 32 pixels, which the config of SigLIP 2 does not name."""
    return reduce_tokens(model, schedule, **{"image_size": 32, **options})


def tensors_of(output, name=""):
    """All tensors in an output by where they are."""
    if isinstance(output, torch.Tensor):
        return {name: output}
    parts = output.items() if isinstance(output, dict) else enumerate(output) if isinstance(output, tuple) else ()
    return {key: each for part, value in parts for key, each in tensors_of(value, f"{name}.{part}").items()}


@torch.no_grad()
def call(model, inputs, **options):
    return tensors_of(model(**inputs, **{"output_hidden_states": True, **options}))


def is_equal(outputs, others):
    return outputs.keys() == others.keys() and all(torch.equal(outputs[name], others[name]) for name in outputs)


def assert_close(outputs, others, tolerance=1e-5):
    assert outputs.keys() == others.keys()
    for name in outputs:
        torch.testing.assert_close(outputs[name], others[name], atol=tolerance, rtol=10 * tolerance)


@EVERY_MODEL
def test_reduced_model_puts_out_what_the_plain_one_does_in_shape_and_unreduced_and_restored_in_value(name):
    model, inputs = make_model(name)
    weights, config, plain = copy.deepcopy(model.state_dict()), model.config.to_dict(), call(model, inputs)
    reduce(model, "full")
    assert is_equal(call(model, inputs), plain)
    restore_tokens(model)
    schedule = reduce(model, "2x")
    assert schedule.prune_layers
    reduced = call(model, inputs)
    assert {key: each.shape for key, each in reduced.items()} == {key: each.shape for key, each in plain.items()}
    assert not any(hasattr(each, "token_state") for each in reduced.values())
    assert not is_equal(reduced, plain)
    assert all(torch.equal(reduced[key], plain[key]) for key in plain if key.startswith(".text"))
    in_tuples = call(model, inputs, return_dict=False)
    assert all(torch.equal(*pair) for pair in zip(in_tuples.values(), reduced.values(), strict=True))
    assert is_equal(model.state_dict(), weights) and model.config.to_dict() == config
    restore_tokens(model)
    assert is_equal(call(model, inputs), plain)
    assert not hooks_of(model)


@EVERY_MODEL
@pytest.mark.parametrize("token_reduction", ("merge", "cluster"))
def test_merging_equal_tokens_changes_no_answer(name, token_reduction):
    model, inputs = make_model(name)
    with torch.no_grad():
        for key, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "position" in key and "embed" in key and "text" not in key or "position_bias" in key or "freq" in key:
                tensor.zero_()
    colours = torch.randn(2, 3, 8, 2, generator=torch.Generator().manual_seed(4))
    inputs["pixel_values"] = colours.repeat_interleave(4, 2).repeat_interleave(16, 3)
    if "noise" in inputs:
        model.config.mask_ratio, inputs["noise"] = 0.0, torch.linspace(0, 1, NUM_PATCHES).expand(2, -1)
    if "spatial_shapes" in inputs:
        patches = colours.flatten(2).transpose(1, 2).repeat_interleave(4, 1).repeat(1, 1, 16)
        inputs = {**padded_images(((8, 8), (8, 8)), 64), "pixel_values": patches}
    plain = call(model, inputs)
    reduce(model, Schedule("", (0, 1), (0.5, 0.5)), token_reduction=token_reduction, size_bias=1.0)
    assert_close(call(model, inputs), plain)
