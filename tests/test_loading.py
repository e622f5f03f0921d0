"""Every way in and out of the models: checkpoints of Transformers in both namings, saving, refusing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, TINY, naming
from datasets import load_dataset
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from tnt_hf import TntDeiTForImageClassification, TntViTForImageClassification, TntViTModel
from tnt_hf.conversion import load_classifier, to_plain_model
from tnt_hf.examples import BUNDLED_BACKBONE, BUNDLED_DATASET
from tnt_hf.publishing import CODE_FILES
from tnt_hf.training import freeze_idle_heads


PLAIN = {
    "vit": (ViTConfig, ViTForImageClassification),
    "deit": (DeiTConfig, DeiTForImageClassificationWithTeacher),
}
# new name -> the name that public checkpoints hold
LEGACY_NAMES = {
    ".layers.": ".encoder.layer.",
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


@pytest.fixture
def plain_model(family):
    config_class, model_class = PLAIN[family]
    torch.manual_seed(0)
    return model_class(config_class(**TINY)).eval()


def write_checkpoint(model, folder, naming):
    model.config.save_pretrained(folder)
    state_dict = {key: value.contiguous() for key, value in model.state_dict().items()}
    if naming == "legacy":
        for new, legacy in LEGACY_NAMES.items():
            state_dict = {key.replace(new, legacy): value for key, value in state_dict.items()}
    save_file(state_dict, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("naming", ("legacy", "new", "save_pretrained"))
def test_plain_checkpoints_load_whole_and_give_equal_logits(plain_model, family, images, tmp_path, naming):
    if naming == "save_pretrained":
        plain_model.save_pretrained(tmp_path)
    else:
        write_checkpoint(plain_model, tmp_path, naming)
    model, info = FAMILIES[family][1].from_pretrained(tmp_path, output_loading_info=True)
    assert all(".alpha_" in key for key in info["missing_keys"])
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    torch.testing.assert_close(model.eval()(images).logits, plain_model(images).logits, atol=1e-5, rtol=1e-4)
    assert (model.config.model_type, model.config.num_labels) == (f"tnt_{family}", 7)


def test_config_of_the_plain_model_may_be_given(plain_model, family, images, tmp_path):
    plain_model.save_pretrained(tmp_path)
    config = type(plain_model.config).from_pretrained(tmp_path)
    model = FAMILIES[family][1].from_pretrained(tmp_path, config=config).eval()
    torch.testing.assert_close(model(images).logits, plain_model(images).logits, atol=1e-5, rtol=1e-4)


def test_config_of_the_plain_model_keeps_its_attention(plain_model, family, tmp_path):
    plain_model.save_pretrained(tmp_path)
    config = type(plain_model.config).from_pretrained(tmp_path, attn_implementation="eager")
    assert FAMILIES[family][1].from_pretrained(tmp_path, config=config).config._attn_implementation == "eager"


def test_bundled_backbone_loads_whole():
    model, info = TntViTForImageClassification.from_pretrained(BUNDLED_BACKBONE, output_loading_info=True)
    assert all(".alpha_" in key for key in info["missing_keys"])
    plain = ViTForImageClassification.from_pretrained(BUNDLED_BACKBONE)
    pixel_values = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        model.eval()(pixel_values).logits, plain.eval()(pixel_values).logits, atol=1e-5, rtol=1e-4
    )


def test_backbone_without_a_head_loads_with_a_new_head(images, tmp_path):
    torch.manual_seed(0)
    plain = ViTModel(ViTConfig(**TINY)).eval()
    plain.save_pretrained(tmp_path)
    backbone = TntViTModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(backbone(images).pooler_output, plain(images).pooler_output, atol=1e-5, rtol=1e-4)
    classifier = TntViTForImageClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(
        classifier.vit(images).last_hidden_state, plain(images).last_hidden_state, atol=1e-5, rtol=1e-4
    )
    with pytest.raises(ValueError, match=naming(tmp_path, "TntViTForImageClassification", "classifier.bias")):
        load_classifier(tmp_path)


@pytest.mark.parametrize("lost", ("layers.3.mlp.fc1.weight", "embeddings.cls_token", "layernorm.bias"))
def test_missing_backbone_tensor_is_refused(make_model, tmp_path, lost):
    model = make_model()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state_dict = load_file(file)
    del state_dict[f"{model.base_model_prefix}.{lost}"]
    save_file(state_dict, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=naming(tmp_path, "backbone", "1 tensors", lost)):
        type(model).from_pretrained(tmp_path)


def test_backbone_of_another_shape_is_refused_even_if_mismatches_are_ignored(make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    with pytest.raises((ValueError, RuntimeError), match=r"backbone|[Ss]ize|mismatch"):
        type(model).from_pretrained(tmp_path, intermediate_size=80)
    with pytest.raises(ValueError, match=naming("backbone", "mlp.fc1.")):
        type(model).from_pretrained(tmp_path, intermediate_size=80, ignore_mismatched_sizes=True)


def test_checkpoint_of_the_other_family_is_refused(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    refused = 0
    for model_class in (TntViTForImageClassification, TntDeiTForImageClassification):
        try:
            model_class.from_pretrained(tmp_path)
        except ValueError as error:
            assert "`model_type`" in str(error)
            refused += 1
    assert refused == 1


@pytest.mark.parametrize("damage", ("truncated", "not safetensors"))
def test_damaged_file_is_refused_by_name(make_model, tmp_path, damage):
    make_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100] if damage == "truncated" else b"<html>not found</html>")
    with pytest.raises(ValueError, match=naming(tmp_path, "safetensors")):
        load_classifier(tmp_path)


def test_other_architecture_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "resnet"}))
    with pytest.raises(ValueError, match=naming("`model_type`", "vit, tnt_vit, deit, tnt_deit", "'resnet'")):
        load_classifier(tmp_path)


def test_saved_checkpoint_holds_the_names_of_state_dict_the_code_and_the_auto_map(make_model, images, tmp_path):
    model = make_model(prune_layers=[2], keep_rates=[0.6], num_similar_tokens=8)
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict())
    config = json.loads((tmp_path / "config.json").read_text())
    name = type(model).__name__.removesuffix("ForImageClassification")
    assert config["auto_map"] == {
        "AutoConfig": f"configuration_tnt.{name}Config",
        "AutoModel": f"modeling_tnt.{name}Model",
        "AutoModelForImageClassification": f"modeling_tnt.{name}ForImageClassification",
    }
    package = Path(sys.modules["tnt_hf"].__file__).parent
    for file in CODE_FILES:
        assert (tmp_path / file).read_bytes() == (package / file).read_bytes()
    reloaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert type(reloaded) is type(model)
    torch.testing.assert_close(reloaded(images).logits, model(images).logits, atol=1e-5, rtol=1e-4)
    assert type(AutoModel.from_pretrained(tmp_path)) is type(model.base_model)


def test_schedule_may_be_overridden_at_loading(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    model = AutoModelForImageClassification.from_pretrained(
        tmp_path, prune_layers=[2], keep_rates=[0.5], num_similar_tokens=4
    )
    assert model.config.patch_token_counts()[-1] == 32
    with pytest.raises(ValueError, match="`prune_layers`"):
        AutoModelForImageClassification.from_pretrained(tmp_path, prune_layers=[6], keep_rates=[0.5])


def test_to_plain_model_saves_a_transformers_checkpoint(make_model, family, images, tmp_path):
    model = make_model(prune_layers=[2], keep_rates=[0.6])
    to_plain_model(model).save_pretrained(tmp_path)
    plain = PLAIN[family][1].from_pretrained(tmp_path).eval()
    model.set_schedule([], [])
    torch.testing.assert_close(plain(images).logits, model(images).logits, atol=1e-5, rtol=1e-4)
    assert plain.config.model_type == family


def test_trainer_resumes_with_every_tensor(make_model, images, tmp_path):
    """Four steps at once end where two, a new process state and two more do."""
    dataset = [{"pixel_values": image, "labels": index % 7} for index, image in enumerate(images.repeat(4, 1, 1, 1))]

    def trainer(folder, steps):
        model = make_model(noise_std=0.5, noise_layer_norm=False)
        freeze_idle_heads(model)
        arguments = TrainingArguments(
            folder,
            max_steps=4,
            save_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            use_cpu=True,
            disable_tqdm=True,
            seed=0,
        )
        arguments.max_steps = steps
        return Trainer(model, arguments, train_dataset=dataset)

    straight = trainer(tmp_path / "straight", 4)
    straight.train()
    interrupted = trainer(tmp_path / "interrupted", 2)
    interrupted.train()
    resumed = trainer(tmp_path / "interrupted", 4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "interrupted" / "checkpoint-2"))
    expected = straight.model.state_dict()
    for key, value in resumed.model.state_dict().items():
        assert torch.equal(value, expected[key]), key


REMOTE = """
import sys, torch
sys.modules["tnt_hf"] = None  # any import of the package now fails
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, pipeline
folder, image = sys.argv[1:]
model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
backbone = AutoModel.from_pretrained(folder, trust_remote_code=True)
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
assert type(backbone).__name__ == "TntViTModel" and config.prune_layers == [2]
torch.save(model(torch.load(image)).logits.detach(), image)
answers = pipeline("image-classification", model=folder, trust_remote_code=True)(sys.argv[1] + "/image.png")
assert len(answers) == 5 and abs(sum(answer["score"] for answer in answers) - 1) < 0.5
model.set_schedule([1, 2], [0.5, 0.5])
model.save_pretrained(folder + "/again")
assert AutoModel.from_pretrained(folder + "/again", trust_remote_code=True).config.prune_layers == [1, 2]
print("answered", answers[0]["label"])
"""


def test_saved_folder_works_in_a_process_without_the_package(tmp_path):
    folder = tmp_path / "my model-v1.0"
    model = TntViTForImageClassification.from_pretrained(
        BUNDLED_BACKBONE, prune_layers=[2], keep_rates=[0.6], num_similar_tokens=25
    ).eval()
    model.save_pretrained(folder)
    image_processor = AutoImageProcessor.from_pretrained(BUNDLED_BACKBONE, backend="pil")
    image_processor.save_pretrained(folder)
    image = load_dataset(str(BUNDLED_DATASET), split="test")[0]["image"]
    image.save(folder / "image.png")
    pixel_values = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    torch.save(pixel_values, tmp_path / "tensor.pt")

    script = tmp_path / "elsewhere" / "use.py"
    script.parent.mkdir()
    script.write_text(REMOTE)
    answer = subprocess.run(
        [sys.executable, str(script), str(folder), str(tmp_path / "tensor.pt")],
        env={"HF_HOME": str(tmp_path / "hf_home"), "HF_HUB_OFFLINE": "1"},
        cwd=script.parent,
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr
    inputs = image_processor(image.convert("RGB"), return_tensors="pt")
    expected = model(**inputs).logits.argmax().item()
    assert f"answered {model.config.id2label[expected]}" in answer.stdout
    logits = torch.load(tmp_path / "tensor.pt")
    torch.testing.assert_close(logits, model(pixel_values).logits, atol=1e-5, rtol=1e-4)
