"""A recipe as a value: what it reads, refuses and makes."""

import pytest
from conftest import ROOT, naming, noise_split
from datasets import ClassLabel, DatasetDict, Image
from transformers import HfArgumentParser, ViTImageProcessorPil

from tnt_hf.command_line import parse_recipe_and_flags
from tnt_hf.config_fields import TRAINING_SETTINGS
from tnt_hf.configuration_tnt import TokenPruningFields
from tnt_hf.data import DataArguments
from tnt_hf.evaluation import EvaluationArguments
from tnt_hf.training import ModelArguments, Recipe, TntTrainingArguments


TYPES = (ModelArguments, DataArguments, EvaluationArguments, TntTrainingArguments)
PATH = ROOT / "examples" / "recipes" / "merge.yaml"


def test_recipe_with_settings_is_what_the_command_line_makes_of_flags(tmp_path):
    settings = {"output_dir": tmp_path, "learning_rate": 1e-3, "schedules": ["full", "3x"], "use_cpu": True}
    settings |= {"noise_layer_norm": True, "lr_scheduler_kwargs": {"min_lr": 1e-5}, "save_strategy": "steps"}
    settings |= {"lr_scheduler_type": "cosine_with_min_lr", "max_train_samples": 9}
    words = ["--output_dir", str(tmp_path), "--learning_rate", "1e-3", "--schedules", "full", "3x", "--use_cpu"]
    words += ["--noise_layer_norm", "true", "--lr_scheduler_kwargs", '{"min_lr": 1e-5}', "--save_strategy", "steps"]
    words += ["--lr_scheduler_type", "cosine_with_min_lr", "--max_train_samples", "9"]
    by_name, by_path = Recipe.load("merge", **settings), Recipe.load(PATH, **settings)
    *expected, training = parse_recipe_and_flags(TYPES, [str(PATH), *words])
    for recipe in (by_name, by_path):
        assert [recipe.model, recipe.data, recipe.evaluation] == expected
        assert recipe.training.to_dict() == training.to_dict()


def test_none_is_the_default_of_a_setting():
    recipe = Recipe.load("merge", noise_std=None, max_steps=None, schedules=None)
    assert (recipe.model.noise_std, recipe.training.max_steps) == (None, TntTrainingArguments().max_steps)
    assert recipe.evaluation == EvaluationArguments()


@pytest.mark.parametrize(
    ("name", "settings", "named"),
    (
        ("mrege", {}, ["merge, quick, reference", "mrege"]),
        ("absent.yaml", {}, ["absent.yaml"]),
        ("merge", {"learning_rate": "fast"}, ["learning_rate", "'fast'"]),
        ("merge", {"train_augmentation": "mosaic"}, ["train_augmentation", "'mosaic'"]),
        ("merge", {"use_cpu": "perhaps"}, ["use_cpu", "perhaps"]),
        ("merge", {"ema_decay": 2}, ["--ema_decay", 2]),
    ),
)
def test_recipe_that_cannot_be_is_one_clear_error(name, settings, named):
    with pytest.raises(ValueError, match=naming(*named)):
        Recipe.load(name, **settings)


def test_a_setting_that_is_none_gets_the_name_close_to_it_if_there_is_one():
    with pytest.raises(ValueError, match="max_steps"):
        Recipe.load("merge", max_step=3)
    with pytest.raises(ValueError, match=r"qqqq\.$"):
        Recipe.load("merge", qqqq=3)


def test_recipe_trains_and_evaluates_on_a_dataset_at_hand(make_model, tmp_path):
    split = noise_split(24, 32, 32, num_classes=7).cast_column("image", Image())
    model = make_model(noise_std=0.5)
    model.freeze_backbone()
    names = [model.config.id2label[label] for label in range(7)]
    other_order = ClassLabel(names=names[::-1])
    test = split.cast_column("label", other_order).rename_columns({"image": "photo", "label": "kind"})
    train = split.remove_columns("label").rename_column("image", "photo")
    recipe = Recipe.load(
        "merge",
        **{"output_dir": tmp_path, "max_steps": 2, "per_device_train_batch_size": 8, "report_to": "none"},
        **{"image_column_name": "photo", "label_column_name": "kind", "schedules": ["full", "2:0.5"]},
        use_cpu=True,
    )
    image_processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    trainer = recipe.make_trainer(DatasetDict(train=train, test=test), image_processor, model)
    assert trainer.model is model and not list(tmp_path.iterdir())
    assert trainer.images["validation"]["label"][:3] == [6, 5, 4]
    assert trainer.train().global_step == 2
    rows = trainer.evaluate_schedules()
    assert [(row.schedule, row.selection) for row in rows] == [
        ("full", "none"),
        ("2:0.5", "relevance"),
        ("2:0.5", "random"),
    ]
    assert all(row.num_images == 24 for row in rows)
    with pytest.raises(ValueError, match="validation split"):
        recipe.make_trainer({"train": train}, image_processor, model)


def test_flags_follow_the_config_fields_and_say_what_they_mean():
    own = {"prune_layers", "keep_rates", "num_similar_tokens", "compute_size", "budget_sizes", "selection"}
    assert set(TRAINING_SETTINGS) == TokenPruningFields.__dataclass_fields__.keys() - own
    fields = ModelArguments.__dataclass_fields__
    for name in TRAINING_SETTINGS:
        assert fields[name].metadata["help"].endswith(". By default as in the checkpoint.")
        assert len(fields[name].metadata["help"]) > 60
    printed = " ".join(HfArgumentParser(TYPES).format_help().split())
    assert "Number of first layers after which noise is added in training" in printed
    given = {"noise_std": 0.5, "noise_layer_norm": False}
    assert ModelArguments(**given).config_overrides == given
