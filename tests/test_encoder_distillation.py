"""Encoders that learn from their own output with all tokens."""

import copy

import pytest
import torch
from conftest import naming
from torch.utils.data import Dataset
from transformers import (
    Aimv2VisionConfig,
    Aimv2VisionModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from tnt_hf.adaptation import adaptable_parameters, save_adaptation, set_adaptation
from tnt_hf.encoders import reduce_tokens, restore_tokens
from tnt_hf.encoders.distillation import SelfDistillation


SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 24, "patch_size": 4}


def dinov2(num_hidden_layers=3):
    torch.manual_seed(0)
    return Dinov2Model(Dinov2Config(**SHAPE | {"num_hidden_layers": num_hidden_layers}, mlp_ratio=2)).eval()


def images(num_images=4):
    return torch.randn(num_images, 3, 24, 24, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "make",
    (
        lambda: Dinov2Model(Dinov2Config(**SHAPE, mlp_ratio=2)),
        lambda: SiglipVisionModel(SiglipVisionConfig(**SHAPE, intermediate_size=64)),
        lambda: CLIPVisionModel(CLIPVisionConfig(**SHAPE, intermediate_size=64)),
        lambda: ViTForImageClassification(ViTConfig(**SHAPE, intermediate_size=64)),
        lambda: Aimv2VisionModel(Aimv2VisionConfig(**SHAPE, intermediate_size=64)),
    ),
    ids=("dinov2", "siglip", "clip", "vit", "aimv2"),
)
def test_norms_and_biases_learn_and_all_else_stays(make):
    torch.manual_seed(0)
    model = make()
    before = copy.deepcopy(model.state_dict())
    reduce_tokens(model, "2x")
    learner = SelfDistillation(model, ["2x"])
    learned = [value for value in learner.parameters() if value.requires_grad]
    optimizer = torch.optim.Adam(learned, lr=3e-3)
    losses = []
    for _ in range(12):
        losses.append(learner(pixel_values=images())["loss"])
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    restore_tokens(model)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and changed <= set(learner.original)
    final_norms = {name for name in learner.original if not {"layer", "layers"} & set(name.split("."))}
    is_rms_norm = isinstance(model, Aimv2VisionModel)  # which has no bias
    assert len(final_norms) == (1 if is_rms_norm else 2) and len(learned) == len(learner.original)
    assert all(torch.equal(value, before[name]) for name, value in learner.original.items())


def test_with_all_tokens_there_is_nothing_to_learn():
    model = dinov2()
    reduce_tokens(model, "2x")
    learner = SelfDistillation(model, ["full"])
    assert abs(learner(pixel_values=images())["loss"].item()) < 1e-6
    restore_tokens(model)


def test_what_teaches_is_the_model_before_it_learned():
    model, plain = dinov2(), dinov2()
    reduce_tokens(model, "2x")
    learner = SelfDistillation(model, ["full"])
    with torch.no_grad():
        model.layernorm.weight.mul_(torch.linspace(0.1, 2, 32))
    loss = learner(pixel_values=images())["loss"].item()  # which leaves the model with all tokens
    distances = [
        1 - torch.nn.functional.cosine_similarity(model(images())[name], plain(images())[name], dim=-1).mean()
        for name in ("pooler_output", "last_hidden_state")
    ]
    assert loss > 0.01 and loss == pytest.approx(sum(distances).item(), abs=1e-5)


def test_schedules_are_drawn_alike_from_the_same_seed():
    learners = []
    for _ in range(2):
        model = dinov2()
        reduce_tokens(model, "2x")
        learners.append(SelfDistillation(model, ["full", "1.5x", "2x"], seed=3))
    first, second = ([learner(pixel_values=images())["loss"].item() for _ in range(8)] for learner in learners)
    assert first == second and len(set(first)) == 3


def test_an_adaptation_is_put_on_other_copies_and_on_no_other_weights(tmp_path):
    model, path = dinov2(), tmp_path / "adaptation.safetensors"
    reduce_tokens(model, "2x")
    learner = SelfDistillation(model, ["2x"])
    optimizer = torch.optim.SGD([value for value in learner.parameters() if value.requires_grad], lr=1.0)
    learner(pixel_values=images())["loss"].backward()
    optimizer.step()
    save_adaptation(model, learner.original, path)
    other = dinov2()
    set_adaptation(other, path, adapted=True)
    assert all(map(torch.equal, other.state_dict().values(), model.state_dict().values()))
    set_adaptation(other, path, adapted=False)
    assert all(map(torch.equal, other.state_dict().values(), dinov2().state_dict().values()))
    classifier = Dinov2ForImageClassification(model.config)
    classifier.dinov2.load_state_dict(dinov2().state_dict())
    set_adaptation(classifier, path, adapted=True)
    assert all(map(torch.equal, classifier.dinov2.state_dict().values(), model.state_dict().values()))

    with torch.no_grad():
        other.layernorm.weight.fill_(3.0)
    before = copy.deepcopy(other.state_dict())
    for each, named in ((other, "other weights"), (dinov2(num_hidden_layers=2), "another network")):
        with pytest.raises(ValueError, match=naming("adaptation.safetensors", named)):
            set_adaptation(each, path, adapted=True)
    assert all(map(torch.equal, other.state_dict().values(), before.values()))


def test_trainer_trains_it(tmp_path):
    class Pictures(Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return {"pixel_values": images(8)[index]}

    model = dinov2()
    reduce_tokens(model, "2x")
    learner = SelfDistillation(model, ["1.5x", "2x"])
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, save_strategy="no", report_to="none", use_cpu=True
    )
    Trainer(learner, arguments, train_dataset=Pictures()).train()
    assert any(not torch.equal(adaptable_parameters(model)[name], value) for name, value in learner.original.items())


def test_what_cannot_learn_is_refused():
    model = dinov2()
    with pytest.raises(ValueError, match=naming("Dinov2Model", "does not reduce tokens")):
        SelfDistillation(model, ["2x"])
    reduce_tokens(model, "2x")
    with pytest.raises(ValueError, match="`schedules`"):
        SelfDistillation(model, [])
    with pytest.raises(ValueError, match=naming("9:0.5", "prune_layers")):
        SelfDistillation(model, ["9:0.5"])
    assert all(value.requires_grad for value in model.parameters())
