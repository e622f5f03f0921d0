"""What the Trainer is made to learn."""

import pytest
import torch
from datasets import Dataset, DatasetDict
from torch import nn

from tnt_hf.training import TntTrainingArguments, make_trainer


@pytest.fixture
def make_distilling_trainer(make_model, tmp_path):
    def make(**fields):
        model = make_model(noise_std=0.5, **fields)
        model.freeze_backbone()
        arguments = TntTrainingArguments(
            output_dir=str(tmp_path), self_distillation=True, use_cpu=True, report_to="none", save_strategy="no"
        )
        return make_trainer(model, DatasetDict(train=Dataset.from_dict({})), None, arguments)

    return make


def test_self_distillation_is_the_divergence_from_the_model_without_noise(make_distilling_trainer, images):
    trainer = make_distilling_trainer(prune_layers=[2], keep_rates=[0.5])
    model = trainer.model.train()
    torch.manual_seed(0)
    loss = trainer.compute_loss(model, {"pixel_values": images})
    assert model.training and model.config.prune_layers == [2]

    torch.manual_seed(0)
    noisy = model(images)
    model.eval()
    model.set_schedule([], [])
    clean = model(images)
    names = ("cls_logits", "distillation_logits") if "cls_logits" in clean else ("logits",)
    divergences = []
    for name in names:
        expected, answer = clean[name].softmax(dim=-1), noisy[name].softmax(dim=-1)
        divergences.append((expected * (expected / answer).log()).sum(dim=-1).mean())
    torch.testing.assert_close(loss, sum(divergences) / len(divergences), atol=1e-6, rtol=1e-4)
    assert loss > 0


def test_self_distillation_reads_no_labels_and_reaches_every_learning_head(make_distilling_trainer, images):
    trainer = make_distilling_trainer()
    model = trainer.model.train()
    losses = []
    for inputs in ({}, {"labels": torch.zeros(4, dtype=torch.long)}):
        torch.manual_seed(0)
        losses.append(trainer.compute_loss(model, {"pixel_values": images, **inputs}))
    assert torch.equal(*losses)
    losses[0].backward()
    heads = model.base_model.alpha_heads
    assert all(head.weight.grad.abs().sum() > 0 for head in heads[: model.config.num_learning_layers])
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    assert all(parameter.grad is None for parameter in frozen)


def test_evaluation_of_a_distilling_trainer_is_that_of_the_labels(make_distilling_trainer, images):
    trainer = make_distilling_trainer()
    labels = torch.tensor([0, 1, 2, 3])
    loss = trainer.compute_loss(trainer.model.eval(), {"pixel_values": images, "labels": labels})
    torch.testing.assert_close(loss, nn.functional.cross_entropy(trainer.model(images).logits, labels))
