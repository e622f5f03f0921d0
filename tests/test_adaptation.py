"""LayerNorms and biases adapted to schedules."""

import copy

import pytest
import torch
from conftest import naming, noise_split
from torch import nn
from transformers import ViTImageProcessorPil

from benchmarks.adaptation import AdaptationBenchmarkArguments, run_adaptation_benchmark
from tnt_hf.adaptation import adaptable_parameters, save_adaptation, set_adaptation
from tnt_hf.schedules_tnt import UNPRUNED, Schedule
from tnt_hf.training import Recipe


def test_layernorms_and_biases_of_the_layers_are_adaptable(make_model):
    model = make_model()
    adaptable = adaptable_parameters(model)
    parameters = dict(model.named_parameters())
    assert all(parameters[name] is value for name, value in adaptable.items())
    width, inner, num_layers = 32, 64, 6
    assert sum(value.numel() for value in adaptable.values()) == num_layers * (9 * width + inner) + 2 * width
    assert not any("alpha" in name or "classifier" in name or "embeddings" in name for name in adaptable)


def test_adaptation_is_put_on_and_taken_off_again(make_model, images, tmp_path):
    model = make_model()
    adapted = copy.deepcopy(model)
    for value in adaptable_parameters(adapted).values():
        nn.init.uniform_(value)
    save_adaptation(adapted, adaptable_parameters(model), tmp_path / "adaptation.safetensors")
    before, after = model(images).logits, adapted(images).logits
    assert not torch.allclose(before, after)
    set_adaptation(model, tmp_path, adapted=True)
    assert torch.equal(model(images).logits, after)
    for each in (model, adapted):
        set_adaptation(each, tmp_path, adapted=False)
        assert torch.equal(each(images).logits, before)


def test_adaptation_of_another_network_is_refused(make_model, tmp_path):
    path, model = tmp_path / "other.safetensors", make_model()
    other = make_model(num_hidden_layers=4)
    save_adaptation(other, adaptable_parameters(other), path)
    with pytest.raises(ValueError, match=naming("other.safetensors", "hidden_size=32", "6 layers")):
        set_adaptation(model, path, adapted=True)
    with pytest.raises(FileNotFoundError, match="absent"):
        set_adaptation(model, tmp_path / "absent", adapted=True)


def test_training_adapts_what_it_may_and_keeps_what_it_replaced(make_model, tmp_path):
    base = tmp_path / "base"
    model = make_model(token_reduction="cluster")
    model.save_pretrained(base)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(base)
    split = noise_split(12, 32, 32, 7)
    recipe = Recipe.load(
        "adapt",
        model_name_or_path=str(base),
        output_dir=str(tmp_path / "run"),
        adaptation_schedules=["full", "1,2:0.7,0.5", "1:0.6@20"],
        schedules=["full", "1:0.6@20"],
        schedule="1,2:0.7,0.5",
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        warmup_steps=0,
        report_to="none",
        use_cpu=True,
    )
    trainer = recipe.make_trainer({"train": split, "validation": split})
    teacher = trainer.model.state_dict()
    teacher = {name: value.clone() for name, value in teacher.items()}
    trainer.train()
    trainer.save_model()
    adaptable = adaptable_parameters(trainer.model)
    changed = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, teacher[name])}
    assert changed and changed <= adaptable.keys()
    pixel_values = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    saved = type(model).from_pretrained(tmp_path / "run").eval()
    set_adaptation(saved, tmp_path / "run", adapted=False)
    for schedule in (UNPRUNED, Schedule("", (1,), (0.6,), 0, 20)):
        torch.testing.assert_close(
            saved(pixel_values, schedule=schedule).logits, model(pixel_values, schedule=schedule).logits
        )
    assert [row.schedule for row in trainer.evaluate_schedules()] == ["full", "1:0.6@20"]


def test_an_adaptation_matches_answers_and_what_the_heads_read(make_model, images, tmp_path):
    base, schedule = tmp_path / "base", Schedule("", (1, 2), (0.7, 0.5))
    make_model(token_reduction="cluster").save_pretrained(base)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(base)
    settings = {"model_name_or_path": str(base), "output_dir": str(tmp_path / "run"), "schedules": ["full"]}
    recipe = Recipe.load("adapt", **settings, adaptation_schedules=["1,2:0.7,0.5"], schedule="full", use_cpu=True)
    trainer = recipe.make_trainer({"train": noise_split(4, 32, 32, 7), "validation": noise_split(4, 32, 32, 7)})
    model = trainer.model.train()
    loss = trainer.compute_loss(model, {"pixel_values": images})
    outputs = []
    for each in (UNPRUNED, schedule):
        read = model.base_model(images, schedule=each, prefix_only=True).last_hidden_state
        heads = [getattr(model, name) for name in model.head_names]
        outputs.append([(head(read[:, index]), read[:, index]) for index, head in enumerate(heads)])
    expected = 0.0
    for (target, other), (logits, own) in zip(*outputs):
        target, logits = target.log_softmax(dim=-1), logits.log_softmax(dim=-1)
        divergence = (target.exp() * (target - logits)).sum(dim=-1).mean()
        cosine = (own * other).sum(dim=-1) / own.norm(dim=-1) / other.norm(dim=-1)
        expected += (divergence + 3 * (1 - cosine).mean()) / len(outputs[0])
    torch.testing.assert_close(loss, expected)


def test_adaptation_needs_what_teaches(tmp_path):
    with pytest.raises(ValueError, match=naming("--adaptation_schedules", "--self_distillation")):
        Recipe.load("adapt", output_dir=str(tmp_path), self_distillation=False)
    with pytest.raises(ValueError, match="4y"):
        Recipe.load("adapt", output_dir=str(tmp_path), adaptation_schedules=["4y"])


def test_benchmark_compares_before_and_after(make_model, tmp_path):
    adapted = tmp_path / "adapted"
    classes = {"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}}
    model = make_model(token_reduction="cluster", num_labels=2, **classes)
    original = {name: value.clone() for name, value in adaptable_parameters(model).items()}
    for value in adaptable_parameters(model).values():
        nn.init.uniform_(value)
    model.save_pretrained(adapted)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(adapted)
    save_adaptation(model, original, adapted / "adaptation.safetensors")
    for index, record in enumerate(noise_split(4, 32, 32, 2)):
        path = tmp_path / "images" / ("cat", "dog")[record["label"]] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(record["image"]["bytes"])
    arguments = AdaptationBenchmarkArguments(
        str(adapted), str(tmp_path / "images"), ["full", "1:0.6@20"], batch_size=3
    )
    results = run_adaptation_benchmark(arguments)
    rows = {(row["network"], row["schedule"]): row for row in results["rows"]}
    assert len(rows) == 4 and results["num_images"] == 4
    unpruned = rows["original", "full"]
    assert (unpruned["share"], unpruned["agreement"], unpruned["top1_drop"]) == (1, 100, 0)
    assert unpruned["kl"] == pytest.approx(0, abs=1e-6) and rows["adapted", "full"]["kl"] > 1e-3
    assert rows["original", "1:0.6@20"]["share"] < 1 and rows["original", "1:0.6@20"]["kl_over_original"] == 0
