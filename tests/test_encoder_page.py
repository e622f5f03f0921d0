"""What docs/encoders.md says of models is so."""

import re

import pytest
import torch
import transformers
from conftest import ROOT

from tnt_hf.encoders import FAMILIES, reduce_tokens, restore_tokens
from tnt_hf.encoders.families import find_encoders
from tnt_hf.encoders.reduction import first_hook


PAGE = (ROOT / "docs" / "encoders.md").read_text()
ROWS = re.findall(r"^\| `(\w+)` \| `(\w+)` \|", PAGE, re.M)
SHAPE = {"hidden_size": 48, "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 96, "patch_size": 4}


def make_model(name, image_size):
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    images = {"num_patches": (image_size // 4) ** 2} if name == "Siglip2VisionModel" else {"image_size": image_size}
    if name in ("InternVLVisionModel", "VitPoseBackbone"):
        patch_size = 4 if name == "InternVLVisionModel" else 8  # ViTPose needs more than 4
        images = {"image_size": [image_size, image_size], "patch_size": [patch_size, patch_size]}
    masks = {"mask_ratio": 0.0} if name == "ViTMAEModel" else {}
    return model_class(model_class.config_class(**SHAPE | images, **masks)).eval()


def inputs_of(name):
    generator = torch.Generator().manual_seed(1)
    if name != "Siglip2VisionModel":
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    return {
        "pixel_values": torch.randn(2, 64, 48, generator=generator),
        "pixel_attention_mask": torch.ones(2, 64, dtype=torch.long),
        "spatial_shapes": torch.full((2, 2), 8),
    }


def test_the_table_has_the_known_families():
    assert sorted(layers for layers, _ in ROWS) == sorted(FAMILIES)


@pytest.mark.parametrize("layers, name", ROWS)
def test_a_model_of_the_table_is_reduced_and_restored(layers, name):
    if not hasattr(transformers, name):
        pytest.skip(f"this Transformers has no {name}")
    model, inputs = make_model(name, 32), inputs_of(name)

    @torch.inference_mode()
    def encoded():
        torch.manual_seed(2)  # MAE shuffles its patches
        output = model(**inputs)
        return output.feature_maps[-1] if "feature_maps" in output else output.last_hidden_state

    (encoder,) = find_encoders(model)
    assert encoder.layer_class == layers
    plain = encoded()
    reduce_tokens(model, "full", image_size=32)
    assert torch.equal(encoded(), plain)
    restore_tokens(model)
    reduce_tokens(model, "2x", image_size=32)
    reduced = encoded()
    assert reduced.shape == plain.shape and not torch.equal(reduced, plain)
    restore_tokens(model)
    assert torch.equal(encoded(), plain)


def test_the_code_of_the_page_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = transformers.Dinov2Config(hidden_size=24, num_hidden_layers=6, num_attention_heads=3, image_size=518)
    transformers.Dinov2Model(config).save_pretrained(tmp_path)
    code = "".join(re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S))
    left = {}
    exec(code.replace("facebook/dinov2-small", str(tmp_path)), left)
    assert left["reduced"].shape == left["plain"].shape and not torch.equal(left["reduced"], left["plain"])
    adapted, plain = left["other"].state_dict(), transformers.Dinov2Model.from_pretrained(tmp_path).state_dict()
    changed = {name for name in plain if not torch.equal(adapted[name], plain[name])}
    assert changed and changed <= set(left["learner"].original)
    put_on = first_hook(left["other"]).scorer.state_dict()
    assert all(torch.equal(value, put_on[name]) for name, value in left["scorer"].state_dict().items())
