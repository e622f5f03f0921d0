"""What the Trainer is made to learn."""

import json

import pytest
import torch
from conftest import TINY, naming, noise_split
from datasets import Dataset, DatasetDict, Image
from safetensors.torch import load_file
from torch import nn
from transformers import EvalPrediction, TrainerCallback, ViTImageProcessorPil

from tnt_hf import TntDeiTConfig, TntDeiTForImageClassification, token_reduction_tnt
from tnt_hf.data import DataArguments, prepare_data
from tnt_hf.evaluation import compute_metrics
from tnt_hf.training import (
    AVERAGE_NAME,
    EVALUATION_METRICS,
    ModelArguments,
    Recipe,
    TntTrainingArguments,
    TrainingStopped,
    checkpoint_to_resume,
    record_run,
    relevance_statistics,
)


IMAGE_PROCESSOR = ViTImageProcessorPil(size={"height": 32, "width": 32})


@pytest.fixture
def make_distilling_trainer(make_model, tmp_path):
    def make(**fields):
        model = make_model(noise_std=0.5, **fields)
        model.freeze_backbone()
        arguments = TntTrainingArguments(
            output_dir=str(tmp_path), self_distillation=True, use_cpu=True, report_to="none", save_strategy="no"
        )
        return Recipe(training=arguments).make_trainer({}, IMAGE_PROCESSOR, model)

    return make


@pytest.fixture
def noise_images():
    return noise_split(64, 32, 32, num_classes=7)


@pytest.fixture
def make_run(noise_images, tmp_path):
    """A trainer of the scoring heads of a DeiT, which has two classifiers, in `tmp_path / name`, on 64 images."""

    def make(name, model_fields=(), data_fields=(), split=noise_images, **fields):
        torch.manual_seed(0)
        config = TntDeiTConfig(**TINY | {"noise_std": 0.5, "num_hidden_layers": 3, **dict(model_fields)})
        model = TntDeiTForImageClassification(config)
        model.freeze_backbone()
        data_arguments = DataArguments(**{"train_augmentation": "crop", **dict(data_fields)})
        defaults = {"do_train": True, "max_steps": 4, "per_device_train_batch_size": 8, "save_strategy": "no"}
        defaults |= {"use_cpu": True, "report_to": "none", "learning_rate": 1e-2, "logging_steps": 1}
        arguments = TntTrainingArguments(output_dir=str(tmp_path / name), **{**defaults, **fields})
        if data_arguments.streaming:
            split = split.to_iterable_dataset(num_shards=3)
        return Recipe(data=data_arguments, training=arguments).make_trainer({"train": split}, IMAGE_PROCESSOR, model)

    return make


def learned(trainer):
    return [value.detach().clone() for value in trainer.model.parameters() if value.requires_grad]


class Stop(TrainerCallback):
    """Ends the training after some steps, as if it were killed."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


MIXED = {"mixup": 0.8, "cutmix": 1.0, "auto_augment": "rand-m9-mstd0.5-inc1", "random_erasing": 0.25}


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


@pytest.mark.parametrize("label_smoothing_factor", (0.0, 0.1))
def test_accumulated_gradients_are_those_of_the_whole_batch(make_run, monkeypatch, label_smoothing_factor):
    def same_noise(tokens, generator=None):
        return torch.randn(tokens.shape[1:], generator=torch.Generator().manual_seed(0)).expand_as(tokens)

    monkeypatch.setattr(token_reduction_tnt, "randn_like", same_noise)
    steps = {}
    for per_device, accumulation in ((32, 1), (8, 4)):
        trainer = make_run(
            f"batch_{per_device}",
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
            max_steps=1,
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=accumulation,
            label_smoothing_factor=label_smoothing_factor,
        )
        before = learned(trainer)
        trainer.train()
        steps[per_device] = [after - first for after, first in zip(learned(trainer), before)]
    for whole, accumulated in zip(steps[32], steps[8]):
        torch.testing.assert_close(accumulated, whole, rtol=1e-3, atol=1e-7)
    assert max(step.abs().max() for step in steps[32]) > 1e-5


@pytest.mark.parametrize(
    ("stop", "more"),
    (
        (9, {}),  # the checkpoint is at the end of an epoch of 8 steps
        (5, {"gradient_accumulation_steps": 3}),
        (5, {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}),
        (13, {"self_distillation": True}),
    ),
)
def test_resumed_run_ends_with_the_same_weights_bit_for_bit(make_run, tmp_path, stop, more):
    fields = {"max_steps": 13, "save_strategy": "steps", "save_steps": 2, "ema_decay": 0.9, **more}
    whole = make_run("whole", data_fields=MIXED, **fields)
    whole.train()
    killed = make_run("killed", data_fields=MIXED, **fields)
    killed.add_callback(Stop(stop))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    arguments = TntTrainingArguments(str(tmp_path / "killed"), do_train=True, use_cpu=True)
    checkpoint = checkpoint_to_resume(arguments)
    assert checkpoint.name == f"checkpoint-{(stop - 1) // 2 * 2}"
    torch.manual_seed(99)
    resumed = make_run("killed", data_fields=MIXED, **fields)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert all(torch.equal(*pair) for pair in zip(learned(resumed), learned(whole), strict=True))


def test_streamed_run_continues_beyond_an_epoch_with_the_same_weights(make_run, tmp_path):
    fields = {"max_steps": 12, "save_strategy": "steps", "save_steps": 4, "self_distillation": True}
    fields |= {"gradient_accumulation_steps": 2, "dataloader_num_workers": 2}
    data_fields = {"streaming": True, "shuffle_buffer_size": 8}
    whole = make_run("whole", data_fields=data_fields, **fields)
    whole.train()
    killed = make_run("killed", data_fields=data_fields, **fields)
    killed.add_callback(Stop(10))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = make_run("killed", data_fields=data_fields, **fields)
    resumed.train(resume_from_checkpoint=str(tmp_path / "killed" / "checkpoint-8"))
    assert all(torch.equal(*pair) for pair in zip(learned(resumed), learned(whole), strict=True))


def test_streamed_run_that_goes_on_elsewhere_leaves_out_the_same_images(make_run, noise_images, tmp_path):
    records = noise_images["image"][:]
    for position in range(0, 64, 5):
        records[position] = {"bytes": b"no image", "path": None}
    noise_images = Dataset.from_dict({"image": records, "label": noise_images["label"][:]})
    noise_images = noise_images.cast_column("image", Image(decode=False))
    fields = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "self_distillation": True}
    data_fields = {"streaming": True, "shuffle_buffer_size": 8, "max_bad_images": 1.0}
    whole = make_run("whole", data_fields=data_fields, split=noise_images, **fields)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    resumed = make_run("elsewhere", data_fields=data_fields, split=noise_images, **fields)
    record_run(checkpoint, ModelArguments(), DataArguments(**data_fields), resumed.args)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert all(torch.equal(*pair) for pair in zip(learned(resumed), learned(whole), strict=True))


def test_stream_needs_a_number_of_steps(make_run):
    with pytest.raises(ValueError, match=naming("--streaming", "--max_steps")):
        make_run("run", data_fields={"streaming": True}, max_steps=-1)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("streaming", (False, True))
def test_run_that_was_killed_after_its_last_step_takes_no_other_and_ends(make_run, tmp_path, streaming):
    fields = {"max_steps": 5, "save_strategy": "steps", "save_steps": 5, "data_fields": {"streaming": streaming}}
    whole = make_run("run", **fields)
    whole.train()
    resumed = make_run("run", **fields)
    outcome = resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-5"))
    assert outcome.global_step == 5
    assert all(torch.equal(*pair) for pair in zip(learned(resumed), learned(whole), strict=True))


def test_half_written_checkpoints_are_passed_over(make_run, tmp_path, caplog):
    make_run("run", max_steps=8, save_strategy="steps", save_steps=2).train()
    run = tmp_path / "run"
    (run / "checkpoint-8" / "trainer_state.json").unlink()
    weights = run / "checkpoint-6" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    optimizer = run / "checkpoint-4" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-100])
    arguments = TntTrainingArguments(str(run), do_train=True, use_cpu=True)
    assert checkpoint_to_resume(arguments) == run / "checkpoint-2"
    arguments.resume_from_checkpoint = str(run / "checkpoint-4")
    with pytest.raises(ValueError, match=naming("--resume_from_checkpoint", "checkpoint-4", "optimizer.pt")):
        checkpoint_to_resume(arguments)
    arguments.resume_from_checkpoint = False
    with pytest.raises(ValueError, match="--overwrite_output_dir"):
        checkpoint_to_resume(arguments)


def test_checkpoints_without_optimizer_are_neither_continued_nor_removed_unasked(make_run, tmp_path):
    make_run("run", max_steps=2, save_strategy="steps", save_steps=1, save_only_model=True).train()
    arguments = TntTrainingArguments(str(tmp_path / "run"), do_train=True, use_cpu=True)
    record_run(tmp_path / "run" / "checkpoint-2", ModelArguments(), DataArguments(), arguments)
    with pytest.raises(ValueError, match="--overwrite_output_dir"):
        checkpoint_to_resume(arguments)
    for number in (1, 2):
        (tmp_path / "run" / f"checkpoint-{number}" / "trainer_state.json").unlink()
    (tmp_path / "run" / "runs").mkdir()
    assert checkpoint_to_resume(arguments) is None  # killed while it wrote them
    (tmp_path / "run" / "photos").mkdir()
    with pytest.raises(ValueError, match="--overwrite_output_dir"):
        checkpoint_to_resume(arguments)


def test_only_the_same_run_is_continued(tmp_path):
    def arguments(**fields):
        return TntTrainingArguments(str(tmp_path / "run"), do_train=True, use_cpu=True, **fields)

    record_run(None, ModelArguments(), DataArguments(), arguments())
    assert checkpoint_to_resume(arguments()) is None  # killed before its first checkpoint
    checkpoint = tmp_path / "run" / "checkpoint-1"
    more_allowed = DataArguments(max_bad_images=0.5)
    record_run(checkpoint, ModelArguments(schedule="multi"), more_allowed, arguments(logging_steps=3))
    with pytest.raises(
        ValueError, match=naming("learning_rate 5e-05 -> 0.1", "mixup 0.0 -> 0.5", "--overwrite_output_dir")
    ):
        record_run(checkpoint, ModelArguments(), DataArguments(mixup=0.5), arguments(learning_rate=0.1))
    checkpoint.mkdir()
    (tmp_path / "run" / "bad_images.jsonl").touch()
    record_run(None, ModelArguments(), DataArguments(), arguments(learning_rate=0.1))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run_settings.json"]
    assert json.loads((tmp_path / "run" / "run_settings.json").read_text())["learning_rate"] == 0.1
    (tmp_path / "run" / "model.safetensors").touch()
    with pytest.raises(ValueError, match="--overwrite_output_dir"):
        checkpoint_to_resume(arguments())


def test_average_of_the_weights_is_kept_saved_and_left_in_the_model(make_run, tmp_path):
    history = []

    class Remember(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            history.append(learned(trainer))

    trainer = make_run("run", ema_decay=0.75, save_strategy="steps", save_steps=2)
    trainer.add_callback(Remember())
    trainer.train()
    expected = history[0]
    for values in history[1:]:
        expected = [0.75 * average + 0.25 * value for average, value in zip(expected, values)]
    for average, value in zip(learned(trainer), expected, strict=True):
        torch.testing.assert_close(average, value)
    saved = load_file(tmp_path / "run" / "checkpoint-2" / AVERAGE_NAME)
    assert saved["n_averaged"] == 2
    torch.testing.assert_close(saved["module.0"], 0.75 * history[0][0] + 0.25 * history[1][0])


def test_loss_that_is_not_finite_stops_the_run_and_leaves_its_checkpoint(make_run, tmp_path):
    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                trainer.model.base_model.embeddings.cls_token.data.fill_(torch.nan)

    trainer = make_run("run", max_steps=9, save_strategy="steps", save_steps=2)
    trainer.add_callback(Spoil())
    with pytest.raises(TrainingStopped, match=naming("loss is nan", "step 4")):
        trainer.train()
    assert checkpoint_to_resume(TntTrainingArguments(str(tmp_path / "run"), do_train=True)).name == "checkpoint-2"
    weights = load_file(tmp_path / "run" / "checkpoint-2" / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())


def test_weights_that_are_not_finite_are_not_saved(make_run, tmp_path):
    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                learned_head = trainer.model.base_model.alpha_heads[0]
                learned_head.bias.data.fill_(torch.inf)

    trainer = make_run("run", max_steps=9, save_strategy="steps", save_steps=2)
    trainer.add_callback(Spoil())
    with pytest.raises(TrainingStopped, match=naming("finite", "step 4")):
        trainer.train()
    assert checkpoint_to_resume(TntTrainingArguments(str(tmp_path / "run"), do_train=True)).name == "checkpoint-2"


def test_model_runs_in_its_own_precision_after_training_in_another(make_run):
    trainer = make_run("run", {"prune_layers": [1], "keep_rates": [0.5]}, bf16=True, max_steps=1)
    trainer.train()
    outputs = trainer.model.eval()(torch.randn(2, 3, 32, 32))
    assert outputs.logits.dtype == torch.float32 and len(outputs.kept_indices) == 1
    projection = trainer.model.base_model.layers[0].mlp.fc1
    dtypes = []
    projection.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    trainer.model(torch.randn(2, 3, 32, 32))
    assert dtypes == [torch.float32]


def test_logs_tell_speed_and_what_the_heads_have_learned(make_run):
    trainer = make_run("run", {"prune_layers": [1], "keep_rates": [0.5]})
    heads = trainer.model.base_model.alpha_heads
    for head in heads:
        nn.init.zeros_(head.weight)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 4 and all(entry["images_per_second"] > 0 for entry in logs)
    for head in heads:
        nn.init.zeros_(head.weight)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert relevance_statistics(trainer.model, images) == pytest.approx(
        {"relevance_entropy": 1.0, "relevance_kept": 0.5}
    )
    for head in heads:
        nn.init.normal_(head.weight, std=30.0, generator=torch.Generator().manual_seed(0))
    statistics = relevance_statistics(trainer.model, images)
    assert 0 <= statistics["relevance_entropy"] < 0.3 and statistics["relevance_kept"] > 0.95
    assert trainer.model.config.prune_layers == [1]


def test_a_checkpoint_of_another_folder_does_not_open_that_of_a_finished_run(make_run, tmp_path):
    make_run("first", max_steps=2, save_strategy="steps", save_steps=2).train()
    checkpoint = str(tmp_path / "first" / "checkpoint-2")
    other = tmp_path / "other"
    arguments = TntTrainingArguments(str(other), do_train=True, use_cpu=True, resume_from_checkpoint=checkpoint)
    assert str(checkpoint_to_resume(arguments)) == checkpoint
    (other / "checkpoint-9").mkdir(parents=True)
    with pytest.raises(ValueError, match="--overwrite_output_dir"):
        checkpoint_to_resume(arguments)
    record_run(tmp_path / "first" / "checkpoint-2", ModelArguments(), DataArguments(), arguments)
    assert (other / "checkpoint-9").exists() and (tmp_path / "first" / "checkpoint-2").exists()
    arguments.overwrite_output_dir = True
    with pytest.raises(ValueError, match=naming("--resume_from_checkpoint", "--overwrite_output_dir")):
        checkpoint_to_resume(arguments)
    with pytest.raises(ValueError, match=naming("--load_best_model_at_end", "--ema_decay")):
        TntTrainingArguments(
            str(other), ema_decay=0.9, load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps"
        )


@pytest.mark.parametrize(
    ("fields", "size"), (({"num_channels": 1}, {"height": 32, "width": 32}), ({}, {"shortest_edge": 32}))
)
def test_image_processor_that_does_not_fit_the_model_is_refused(make_model, noise_images, fields, size):
    with pytest.raises(ValueError, match=naming("`pixel_values`", (1, fields.get("num_channels", 3), 32, 32))):
        prepare_data(
            DatasetDict(train=noise_images), make_model(**fields), ViTImageProcessorPil(size=size), DataArguments()
        )


def test_metric_that_no_evaluation_has_is_refused_before_the_run(tmp_path):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}
    for metric in ("accuracy", "eval_accuracy", "top3", "eval_eval_top1", ""):
        for fields in (best, plateau, {}):
            with pytest.raises(ValueError, match=naming("--metric_for_best_model", "loss, top1, top5", metric)):
                TntTrainingArguments(str(tmp_path), metric_for_best_model=metric, **fields)
    for metric in ("loss", "top1", "eval_top5"):
        assert TntTrainingArguments(str(tmp_path), metric_for_best_model=metric).metric_for_best_model == metric
    assert TntTrainingArguments(str(tmp_path)).metric_for_best_model is None
    assert TntTrainingArguments(str(tmp_path), **best).metric_for_best_model == "loss"
    measured = compute_metrics(EvalPrediction(predictions=torch.zeros(3, 1, dtype=torch.long), label_ids=[0, 0, 1]))
    assert {"loss", *measured} == set(EVALUATION_METRICS)


@pytest.mark.parametrize(
    ("fields", "named"),
    (
        ({"per_device_eval_batch_size": 0}, ("--per_device_eval_batch_size", 0)),
        ({"gradient_accumulation_steps": 0}, ("--gradient_accumulation_steps", 0)),
        ({"dataloader_num_workers": -1}, ("--dataloader_num_workers", -1)),
        ({"prediction_loss_only": True}, ("--prediction_loss_only", "false")),
        ({"eval_do_concat_batches": False}, ("--eval_do_concat_batches", "true")),
        ({"label_names": ["classes"]}, ("--label_names", ["classes"])),
    ),
)
def test_settings_that_would_end_a_run_later_are_refused(tmp_path, fields, named):
    with pytest.raises(ValueError, match=naming(*named)):
        TntTrainingArguments(str(tmp_path), **fields)


@pytest.mark.parametrize(
    ("fields", "named"),
    (
        ({"optim": "adamw_bnb_8bit"}, ("--optim adamw_bnb_8bit", "bitsandbytes")),
        (
            {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"bad": 1}},
            ("--lr_scheduler_type cosine_with_restarts", "'bad'"),
        ),
        ({"dataloader_drop_last": True, "per_device_train_batch_size": 99}, ("--dataloader_drop_last", 64, 99)),
    ),
)
def test_training_that_cannot_begin_is_refused_when_it_is_made(make_run, fields, named):
    with pytest.raises(ValueError, match=naming(*named)):
        make_run("run", max_steps=1, do_train=True, **fields)


def test_scoring_heads_of_a_model_without_scores_are_not_trained(make_model, noise_images, tmp_path):
    model = make_model(token_reduction="cluster")
    with pytest.raises(ValueError, match=naming("No scoring head", "`token_reduction`", "'cluster'")):
        model.freeze_backbone()
    model.save_pretrained(tmp_path / "base")
    IMAGE_PROCESSOR.save_pretrained(tmp_path / "base")
    images = {"train": noise_images, "validation": noise_images}
    base = {"model_name_or_path": str(tmp_path / "base"), "output_dir": str(tmp_path / "run"), "use_cpu": True}
    settings = {**base, "schedule": "full", "schedules": ["full"], "report_to": "none"}
    with pytest.raises(ValueError, match=naming("token_reduction", "'cluster'", "--adaptation_schedules")):
        Recipe.load("merge", token_reduction=None, **settings).make_trainer(images)
    assert not (tmp_path / "run").exists()
    Recipe.load("merge", token_reduction=None, do_train=False, **settings).make_trainer(images)
    whole = {"train_backbone": True, "self_distillation": False}
    trainer = Recipe.load("merge", token_reduction=None, **settings, **whole).make_trainer(images)
    assert all(value.requires_grad for value in trainer.model.base_model.layers.parameters())


def test_noise_that_leaves_only_guesses_is_told(make_run, monkeypatch):
    told = []
    monkeypatch.setattr("tnt_hf.training.trainer.logger.warning", told.append)
    run = {"max_steps": 1, "logging_steps": 1, "self_distillation": True}
    make_run("quiet", **run, model_fields={"noise_std": 0.0001}).train()
    assert told == []
    make_run("loud", **run, model_fields={"noise_std": 1000.0, "initializer_range": 2.0}).train()
    assert len(told) == 1 and "--noise_std (1000)" in told[0]
