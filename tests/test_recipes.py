"""Every recipe trains; several processes and machines train what one does."""

import json
import socket

import numpy as np
import pytest
import torch
import transformers
import yaml
from conftest import FAMILIES, ROOT, run_script, run_script_in_processes
from packaging.version import parse
from PIL import Image
from safetensors.torch import load_file
from transformers import ViTImageProcessorPil

from tnt_hf.data import DataArguments, load_images
from tnt_hf.publishing import CODE_FILES


RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
SCRIPT = str(ROOT / "scripts" / "run_image_classification.py")
EVALUATION_SCRIPT = str(ROOT / "scripts" / "evaluate_pruning.py")


@pytest.fixture
def small_imagenet(tmp_path):
    """ImageNet's layout with three classes, and a small ViT and DeiT of as many patches as ImageNet's or more."""
    generator = np.random.default_rng(0)
    names = ("n01440764", "n01443537", "n01484850")
    for split in ("train", "val"):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(4):
                image = Image.fromarray(generator.integers(256, size=(70, 90, 3), dtype=np.uint8))
                image.save(tmp_path / split / name / f"{name}_{index}.JPEG")
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 7}
    classes = {"id2label": dict(enumerate(names)), "label2id": {name: label for label, name in enumerate(names)}}
    for family, (config_class, model_class) in FAMILIES.items():
        torch.manual_seed(0)
        config = config_class(**sizes, **classes, image_size=64, patch_size=4)
        model_class(config).save_pretrained(tmp_path / family)
        ViTImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(tmp_path / family)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs_on_a_folder_in_imagenets_layout(recipe, small_imagenet):
    model = small_imagenet / ("deit" if "deit" in recipe.stem else "vit")
    flags = ["--model_name_or_path", model, "--output_dir", small_imagenet / "run"]
    flags += ["--train_dir", small_imagenet / "train", "--validation_dir", small_imagenet / "val"]
    flags += ["--max_steps", 2, "--per_device_train_batch_size", 4, "--fp16", "false", "--bf16", "false"]
    outcome = run_script(SCRIPT, recipe, *flags, "--dataloader_num_workers", 0, "--use_cpu", "true")
    assert outcome.returncode == 0, outcome.stderr
    results = json.loads((small_imagenet / "run" / "results.json").read_text())
    content = yaml.safe_load(recipe.read_text())
    training = results["training"]
    assert [training["num_steps"], training["images_per_step"]] == [2, 4]
    for name in ("learning_rate", "weight_decay", "noise_std", "self_distillation"):
        assert training[name] == content.get(name, training[name])
    assert training["lr_scheduler"] == content["lr_scheduler_type"]
    for name in ("auto_augment", "mixup", "cutmix", "random_erasing", "repeated_augmentation"):
        assert (name in content) == (name in training["augmentation"])
    schedules = [row["schedule"] for row in results["rows"] if row["selection"] != "random"]
    assert schedules == content.get("schedules", ["full", "single", "multi"])
    assert all(row["num_images"] == 12 for row in results["rows"])


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def run(*command):
    outcome = run_script(*command, "--use_cpu", "true")
    assert outcome.returncode == 0, outcome.stderr


def run_in_two(*command, num_machines=1):
    """Two processes with the variables that torchrun and `accelerate launch` set."""
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": str(2 // num_machines)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank % (2 // num_machines)), **common} for rank in range(2)]
    for outcome in run_script_in_processes(ranks, *command, "--use_cpu", "true"):
        assert outcome.returncode == 0, outcome.stderr


RECIPE = ROOT / "examples" / "recipes" / "merge.yaml"


def run_flags(folder, per_device):
    return [
        *("--output_dir", folder, "--per_device_train_batch_size", per_device, "--ema_decay", 0.5),
        *("--train_backbone", "true", "--num_noise_layers", 0, "--self_distillation", "false"),
        *("--max_steps", 3, "--optim", "sgd", "--learning_rate", 0.1, "--max_train_samples", 64),
        *("--train_augmentation", "crop", "--schedule", "full", "--schedules", "full", "--max_eval_samples", 21),
    ]


@pytest.fixture(scope="module")
def trained_by_one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    run(SCRIPT, RECIPE, *run_flags(folder, 16))
    return folder


def assert_trained_alike(folders, num_processes):
    """That runs of so many processes ended like the first, which is of one, and counted each image once."""
    weights = [load_file(folder / "model.safetensors") for folder in folders]
    results = [json.loads((folder / "results.json").read_text()) for folder in folders]
    assert [result["num_processes"] for result in results] == num_processes
    assert all(result["rows"][0]["num_images"] == 21 for result in results)
    assert all(result["training"]["images_per_step"] == 16 for result in results)
    before = load_file(ROOT / "examples" / "backbone" / "model.safetensors")
    moved = max((weights[0][name] - before[name]).abs().max() for name in before if name in weights[0])
    assert moved > 1e-3
    for other in weights[1:]:
        for key, value in weights[0].items():
            torch.testing.assert_close(other[key], value, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_two_processes_and_two_machines_train_what_one_process_does(trained_by_one, tmp_path):
    run_in_two(SCRIPT, RECIPE, *run_flags(tmp_path / "two", 8))
    run_in_two(SCRIPT, RECIPE, *run_flags(tmp_path / "machines", 8), num_machines=2)
    assert_trained_alike([trained_by_one, tmp_path / "two", tmp_path / "machines"], [1, 2, 2])


@pytest.mark.slow
def test_two_processes_count_every_streamed_image_once(tmp_path):
    images = load_images(DataArguments(max_train_samples=64, max_eval_samples=21), train=True, validation=True)
    for split, dataset in images.items():
        for index in range(3):
            dataset.shard(3, index).to_parquet(tmp_path / "data" / f"{split}-{index}.parquet")
    data = ["--dataset_name", tmp_path / "data", "--streaming", "true", "--schedules", "full", "2x"]
    trained = ["--output_dir", tmp_path / "trained", "--max_steps", 1, "--max_train_samples", 64]
    trained += ["--dataloader_num_workers", 2, "--per_device_eval_batch_size", 5]
    run_in_two(SCRIPT, RECIPE, *data, *trained)
    evaluated = ["--model_name_or_path", tmp_path / "trained", "--batch_size", 4, "--num_workers", 2, "--output_dir"]
    run_in_two(EVALUATION_SCRIPT, *data, *evaluated, tmp_path / "two")
    run(EVALUATION_SCRIPT, *data, *evaluated, tmp_path / "one")
    names = ("trained", "two", "one")
    rows = {name: json.loads((tmp_path / name / "results.json").read_text())["rows"] for name in names}
    assert all(row["num_images"] == 21 for each in rows.values() for row in each)
    for name in ("top1", "top5", "loss"):
        values = [[row[name] for row in each if row["selection"] != "random"] for each in rows.values()]
        assert values[0] == pytest.approx(values[2]) and values[1] == pytest.approx(values[2])


@pytest.mark.slow
@pytest.mark.skipif(parse(transformers.__version__) < parse("5.23"), reason="--fsdp true is FSDP1 there")
def test_two_processes_that_share_the_weights_train_what_one_process_does(trained_by_one, tmp_path):
    run_in_two("tests/fsdp_on_cpu.py", SCRIPT, RECIPE, *run_flags(tmp_path / "sharded", 8), "--fsdp", "true")
    assert_trained_alike([trained_by_one, tmp_path / "sharded"], [1, 2])
    assert {path.name for path in (tmp_path / "sharded").glob("*.py")} == set(CODE_FILES)
