"""The commands as a user runs them."""

import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import timm
import torch
from conftest import ROOT, naming, run_script
from PIL import Image
from safetensors.torch import load_file
from transformers import ViTForImageClassification, pipeline

from benchmarks import inference
from tnt_hf import TntViTConfig, TntViTForImageClassification
from tnt_hf.command_line import parse_recipe_and_flags
from tnt_hf.examples import BUNDLED_BACKBONE
from tnt_hf.results import read_results
from tnt_hf.schedules_tnt import schedule_for
from tnt_hf.training import ModelArguments, TntTrainingArguments


RECIPE = "examples/recipes/merge.yaml"
FEW_IMAGES = ("--max_train_samples", "64", "--max_eval_samples", "20", "--per_device_train_batch_size", "8")


def train(output_dir, *flags):
    return run_script("scripts/run_image_classification.py", RECIPE, "--output_dir", output_dir, *FEW_IMAGES, *flags)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("runs") / "demo"
    outcome = train(output_dir, "--max_steps", "3")
    assert outcome.returncode == 0, outcome.stderr
    return output_dir, outcome.stdout


def test_demo_recipe_trains_evaluates_saves_and_classifies(trained):
    output_dir, printed = trained
    results = json.loads((output_dir / "results.json").read_text())
    pruned = [(schedule, selection) for schedule in ("1.5x", "2x", "3x") for selection in ("relevance", "random")]
    assert [(row["schedule"], row["selection"]) for row in results["rows"]] == [("full", "none"), *pruned]
    assert all(row["num_images"] == 20 for row in results["rows"])
    assert read_results(output_dir / "results.json").to_json() == results
    assert results["weights_sha256"] and results["seed"] == 0
    assert (results["dataset_license"], results["dataset_split"]) == ("mit", "test")
    training = results["training"]
    assert (training["num_images"], training["num_steps"], training["images_per_step"]) == (64, 3, 8)
    assert training["dataset_split"] == "train" and training["loss"] > 0
    assert (training["trained"], training["num_trained_parameters"]) == ("scoring heads", 6 * 65)
    assert "through pipeline: an image of '" in printed
    assert printed.index("schedule") > printed.index("through pipeline")
    names = {path.name for path in output_dir.iterdir()}
    assert names >= {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "configuration_tnt.py",
        "modeling_tnt.py",
    }


def test_training_changes_exactly_the_learning_heads(trained):
    output_dir, _ = trained
    before = ViTForImageClassification.from_pretrained(BUNDLED_BACKBONE).state_dict()
    after = load_file(output_dir / "model.safetensors")
    assert {key for key in after if ".alpha_" not in key} == set(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    config = json.loads((output_dir / "config.json").read_text())
    schedule = schedule_for(TntViTConfig.from_pretrained(output_dir), flops_reduction=2)
    assert {name: config[name] for name in schedule.settings} == schedule.settings
    assert (config["token_reduction"], config["noise_std"], config["noise_layer_norm"]) == ("merge", 0.5, False)


def test_saved_model_is_evaluated_like_the_run(trained, tmp_path):
    output_dir, _ = trained
    outcome = run_script(
        "scripts/evaluate_pruning.py",
        *("--model_name_or_path", output_dir, "--max_eval_samples", "20", "--output_dir", tmp_path),
        *("--batch_size", "7", "--schedules", "full", "2x", "3:0.5:10", "--random_control", "false"),
    )
    assert outcome.returncode == 0, outcome.stderr
    evaluated = json.loads((tmp_path / "results.json").read_text())
    rows = evaluated["rows"]
    assert [row["schedule"] for row in rows] == ["full", "2x", "3:0.5:10"]
    results = json.loads((output_dir / "results.json").read_text())
    assert all(evaluated[name] == results[name] for name in ("training", "weights_sha256"))
    of_run = {row["schedule"]: row for row in results["rows"] if row["selection"] != "random"}
    for row in rows[:2]:
        for key in ("top1", "top5", "gflops"):
            assert row[key] == of_run[row["schedule"]][key]
        assert row["loss"] == pytest.approx(of_run[row["schedule"]]["loss"], rel=1e-4)


def test_heads_train_on_a_folder_of_images_without_labels(tmp_path):
    (tmp_path / "photos").mkdir()
    for shade in range(16):
        Image.new("L", (40, 50), 15 * shade).save(tmp_path / "photos" / f"{shade}.png")
    flags = ("--train_dir", tmp_path / "photos", "--max_steps", "2", "--do_eval", "false")
    outcome = train(tmp_path / "out", *flags)
    assert outcome.returncode == 0, outcome.stderr
    before = ViTForImageClassification.from_pretrained(BUNDLED_BACKBONE).state_dict()
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(after[key], before[key]) for key in before)
    outcome = train(tmp_path / "labelled", *flags, "--self_distillation", "false")
    assert outcome.returncode == 1 and "learn without labels with --self_distillation" in outcome.stderr


def test_all_weights_train_with_a_new_head_for_other_classes(tmp_path):
    for split in ("train", "val"):
        for index, name in enumerate(("dark", "light", "grey")):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("L", (28, 28), 100 * index).save(tmp_path / split / name / "0.png")
    output_dir = tmp_path / "out"
    folders = ("--train_dir", tmp_path / "train", "--validation_dir", tmp_path / "val")
    outcome = train(output_dir, *folders, "--max_steps", "2", "--train_backbone", "--self_distillation", "false")
    assert outcome.returncode == 0, outcome.stderr
    config = json.loads((output_dir / "config.json").read_text())
    assert config["id2label"] == {"0": "dark", "1": "grey", "2": "light"}
    refused = train(tmp_path / "frozen", *folders, "--max_steps", "2")
    assert refused.returncode == 1 and "--train_backbone" in refused.stderr
    assert "3 classes" in refused.stderr and "its own 10" in refused.stderr


@pytest.mark.parametrize(
    ("flags", "named"),
    (
        (("--schedule", "2:1.5"), ["`keep_rates`", 1.5]),
        (("--schedules", "full", "17:0.5"), ["'17:0.5'", "`prune_layers`", "0 to 11"]),
        (("--schedules", "dual"), ["full, single, multi", "'dual'"]),
        (("--noise_std", "-1"), ["`noise_std`", -1.0]),
        (("--model_name_or_path", "absent/model"), ["absent/model"]),
        (("--dataset_name", "absent-data"), ["absent-data"]),
        (("--train_augmentation", "mosaic"), ["mosaic"]),
        (("--no_such_flag", "1"), ["--no_such_flag"]),
        (("--resume_from_checkpoint", "true"), ["no checkpoint", "out"]),
        (("--output_dir", "README.md/out"), ["--output_dir", "README.md/out"]),
        (("--remove_unused_columns", "true"), ["--remove_unused_columns", "false"]),
        (("--token_reduction", "pool"), ["`token_reduction`", "drop, merge", "'pool'"]),
        (("--self_distillation", "true", "--label_smoothing_factor", "0.1"), ["--label_smoothing_factor"]),
        (("--self_distillation", "true", "--train_backbone", "true"), ["--self_distillation", "--train_backbone"]),
    ),
    ids=lambda value: "_".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_clear_error_before_anything_is_written(tmp_path, monkeypatch, capsys, flags, named):
    script = ROOT / "scripts" / "run_image_classification.py"
    output_dir = tmp_path / "out"
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [str(script), str(ROOT / RECIPE), "--output_dir", str(output_dir), *flags])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(script), run_name="__main__")
    assert exit_info.value.code != 0
    assert re.search(naming(*named), f"{exit_info.value.code} {capsys.readouterr().err}")
    assert not output_dir.exists()


@pytest.mark.slow
def test_model_is_exported_verified_and_quantised(tmp_path):
    torch.manual_seed(0)
    model = TntViTForImageClassification.from_pretrained(BUNDLED_BACKBONE, num_hidden_layers=3)
    model.save_pretrained(tmp_path / "model")
    shutil.copy(Path(BUNDLED_BACKBONE) / "preprocessor_config.json", tmp_path / "model")
    flags = ("--schedule", "1:0.6:25", "--int8", "--max_eval_samples", "40", "--fastest_at", "1")
    command = ("scripts/export_onnx.py", "--model_name_or_path", tmp_path / "model", *flags)
    command += ("--output_dir", tmp_path / "onnx")
    outcome = run_script(*command)
    assert outcome.returncode == 0, outcome.stderr
    facts = json.loads(outcome.stdout.splitlines()[-1])
    assert facts == json.loads((tmp_path / "onnx" / "export.json").read_text())
    assert facts["largest_difference"] <= 1e-4 and facts["int8"]["num_images"] == 40
    assert facts["int8"]["agreement"] >= 90
    exact = {row["form"]: row["is_exact"] for row in facts["forms"]}
    assert not exact.pop("ONNX Runtime int8") and all(exact.values())
    assert exact.keys() == {"eager", "AOTInductor", "ONNX Runtime", "OpenVINO"} - facts["missing_forms"].keys()
    assert f"fastest form that gives PyTorch's logits is {facts['fastest']['1']}" in outcome.stdout
    assert (tmp_path / "onnx" / "model.pt2").exists() == ("AOTInductor" in exact)
    assert {path.name for path in tmp_path.glob("onnx/*.onnx")} == {"model.onnx", "model_int8.onnx"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "onnx"]
    outcome = run_script(*command)
    assert outcome.returncode == 1 and "already exists: pass a new folder" in outcome.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ("inference", "profile"))
def test_benchmark_writes_what_it_prints_last(name, tmp_path, monkeypatch, capsys):
    script = str(ROOT / "benchmarks" / "__main__.py")
    sizes = ("--image_sizes", "96", "--batch_sizes", "1", "--schedules", "full", "2:0.5", "--num_rounds", "3")
    architecture = ("--architecture", "deit_tiny_distilled_patch16_224", "--runtimes", "eager")
    monkeypatch.setattr(inference, "MATRIX_SIZE", 64)
    monkeypatch.setattr(sys, "argv", [script, name, *architecture, *sizes, "--output_dir", str(tmp_path)])
    runpy.run_path(script, run_name="__main__")
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert results == json.loads((tmp_path / f"{name}.json").read_text())
    assert [(row["runtime"], row["schedule"]) for row in results["rows"]] == [
        ("Transformers eager", "full"),
        ("eager", "full"),
        ("eager", "2:0.5"),
    ]
    if name == "profile":
        assert all("addmm" in row["operations"] for row in results["rows"])
        assert all(sum(row["operations"].values()) <= 1 for row in results["rows"])
        assert results["rows"][1]["selection_share"] == 0 < results["rows"][2]["selection_share"] < 1


@pytest.mark.slow
def test_accuracy_benchmark_compares_all_methods_at_all_budgets(tmp_path):
    flags = ("--budgets", "0.7", "0.4", "--seeds", "0", "1", "--num_train_images", "32", "--max_eval_samples", "10")
    outcome = run_script("benchmarks/__main__.py", "accuracy", *flags, "--output_dir", tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    results = json.loads(outcome.stdout.splitlines()[-1])
    assert results == json.loads((tmp_path / "accuracy.json").read_text())
    assert (tmp_path / "accuracy.png").stat().st_size > 0
    rows = {(row["method"], row["budget"]): row for row in results["rows"]}
    methods = ("random", "cls_attention", "merging", "sort_prune_merge", "reference", "merge")
    assert set(rows) == {("unpruned", 1.0), *((method, budget) for method in methods for budget in (0.7, 0.4))}
    for (method, budget), row in rows.items():
        assert 0.98 * budget <= row["gflops"] / results["gflops_unpruned"] <= budget * (1 + 1e-9)
        assert row["top1"] == pytest.approx(sum(row["top1_by_seed"]) / len(row["top1_by_seed"]))
        assert len(row["top1_by_seed"]) == (2 if method in ("random", "reference", "merge") else 1)


def test_pictures_of_a_trained_model_and_its_results_are_drawn_once(trained, tmp_path, monkeypatch):
    output_dir, _ = trained
    Image.new("L", (30, 20), 90).save(tmp_path / "a.png")
    (tmp_path / "deep").mkdir()
    Image.new("RGB", (20, 50), "red").save(tmp_path / "deep" / "b.jpg")
    command = (
        *("scripts/visualize_tokens.py", "--model_name_or_path", output_dir, "--images", tmp_path, "--overview", "1"),
        *("--schedules", "full", "2x", "1,2:0.5,0.5", "--results", output_dir / "results.json"),
        *("--output_dir", tmp_path / "out"),
    )
    outcome = run_script(*command)
    assert outcome.returncode == 0, outcome.stderr
    names = ["accuracy", "kept_tokens_2x", "kept_tokens_1-2-0.5-0.5", "schedules", "overview"]
    pictures = [f"{name}.png" for name in names]
    assert json.loads(outcome.stdout.splitlines()[-1]) == {"pictures": pictures}
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(pictures)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir() if Image.open(path).width > 500}
    assert len(times) == len(pictures)
    monkeypatch.setattr(sys, "argv", [*map(str, command)])
    with pytest.raises(SystemExit, match=naming("accuracy.png", "--overwrite_output_dir")):
        runpy.run_path(str(ROOT / command[0]), run_name="__main__")
    assert times == {path: path.stat().st_mtime_ns for path in times}


@pytest.mark.parametrize(
    ("flags", "named"),
    (
        ((), ["--model_name_or_path", "--results"]),
        (("--model_name_or_path", "absent/model"), ["absent/model"]),
        (("--results", "README.md"), ["Results README.md"]),
        (("--images", "absent"), ["--images", "absent"]),
        (("--images", "docs/images", "--validation_dir", "docs"), ["--images", "--dataset_name", "--validation_dir"]),
        (("--images", "README.md"), ["Image README.md"]),
        (("--schedules", "17:0.5"), ["'17:0.5'", "`prune_layers`", "0 to 11"]),
        (("--schedules", "full"), ["--schedules", "full"]),
        (("--overview", "4"), ["--overview", "0 to 3", 4]),
        (("--max_images", "0"), ["--max_images", 0]),
    ),
    ids=lambda value: "_".join(value) if isinstance(value, tuple) else "",
)
def test_pictures_that_cannot_be_drawn_are_one_clear_error(tmp_path, monkeypatch, flags, named):
    script = ROOT / "scripts" / "visualize_tokens.py"
    needs_model = flags and flags[0] not in ("--model_name_or_path", "--results")
    model = ("--model_name_or_path", str(BUNDLED_BACKBONE)) if needs_model else ()
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [str(script), "--output_dir", str(tmp_path / "out"), *model, *flags])
    with pytest.raises(SystemExit, match=naming(*named)) as exit_info:
        runpy.run_path(str(script), run_name="__main__")
    assert str(exit_info.value.code).startswith("Error: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("script", "importers", "package", "extra"),
    (
        ("scripts/evaluate_pruning.py", ("tnt_hf.commands.evaluate",), "accelerate", "train"),
        ("scripts/export_onnx.py", ("tnt_hf.commands.export", "tnt_hf.export"), "onnx", "export"),
        ("benchmarks/__main__.py", ("benchmarks.inference",), "timm", "benchmark"),
        (
            "app/app.py",
            ("tnt_hf.commands.app", "tnt_hf.app", "tnt_hf.app.page", "tnt_hf.app.components"),
            "gradio",
            "app",
        ),
    ),
)
def test_package_of_an_extra_that_is_missing_is_named_with_the_extra(monkeypatch, script, importers, package, extra):
    for importer in importers:
        monkeypatch.delitem(sys.modules, importer, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(sys, "argv", [script])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert package in exit_info.value.code and exit_info.value.code.endswith(f'pip install "tnt-hf[{extra}]"')


def test_unknown_benchmark_is_refused():
    outcome = run_script("benchmarks/__main__.py", "training-speed")
    assert outcome.returncode == 1
    assert (
        "Error: The first argument must be one of accuracy, inference, profile, training, got training-speed."
        in outcome.stderr
    )


def test_repeated_command_says_what_it_continues_from(tmp_path):
    flags = ("--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1", "--do_eval", "false")
    assert "continuing from" not in train(tmp_path, *flags).stdout
    again = train(tmp_path, *flags)
    assert again.returncode == 0 and f"continuing from {tmp_path / 'checkpoint-2'}" in again.stdout, again.stderr


def test_finished_run_is_not_overwritten_unasked(trained):
    output_dir, _ = trained
    before = {path: path.stat().st_mtime_ns for path in output_dir.iterdir()}
    outcome = train(output_dir, "--max_steps", "1")
    assert outcome.returncode == 1
    assert "is not empty" in outcome.stderr and "--overwrite_output_dir" in outcome.stderr
    assert {path: path.stat().st_mtime_ns for path in output_dir.iterdir()} == before


def test_training_whose_evaluation_was_interrupted_is_evaluated_later(tmp_path):
    assert train(tmp_path, "--max_steps", "1", "--do_eval", "false").returncode == 0
    again = train(tmp_path, "--max_steps", "1")
    assert again.returncode == 1
    command = f"tnt-hf evaluate --model_name_or_path {tmp_path} --output_dir {tmp_path}"
    assert f"The training in {tmp_path} is finished, its evaluation is not: `{command}` evaluates it" in again.stderr
    evaluated = run_script(
        "scripts/evaluate_pruning.py", *command.split()[2:], *("--schedules", "2x", "--max_eval_samples", "4")
    )
    assert evaluated.returncode == 0, evaluated.stderr
    training = json.loads((tmp_path / "results.json").read_text())["training"]
    assert training["num_steps"] == 1 and training["num_trained_parameters"] > 0


def test_flags_override_the_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rate: 1e-3\nmax_steps: 7\nlr_scheduler_kwargs: {min_lr: 1.0e-5}\nrun_name: null\n")
    flags = [str(recipe), "--max_steps", "9", "--output_dir", str(tmp_path)]
    _, arguments = parse_recipe_and_flags((ModelArguments, TntTrainingArguments), flags)
    assert (arguments.learning_rate, arguments.max_steps) == (1e-3, 9)
    assert arguments.lr_scheduler_kwargs == {"min_lr": 1e-5}
    as_json = tmp_path / "recipe.json"
    as_json.write_text(json.dumps({"max_steps": 7}))
    assert parse_recipe_and_flags((TntTrainingArguments,), [str(as_json)])[0].max_steps == 7


@pytest.mark.parametrize(
    ("name", "content", "named"),
    (
        ("absent.yaml", None, ["absent.yaml"]),
        ("recipe.txt", "a: 1", [".yaml, .yml or .json", "recipe.txt"]),
        ("list.yaml", "- a", ["list.yaml", "mapping"]),
        ("broken.yaml", "a: [", ["broken.yaml", "line 1"]),
        ("unknown.yaml", "no_such_flag: 1", ["no_such_flag"]),
    ),
)
def test_bad_recipe_is_refused(tmp_path, name, content, named):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=naming(*named)):
        parse_recipe_and_flags((TntTrainingArguments,), [str(tmp_path / name)])


def test_converted_checkpoint_is_verified_saved_and_classifies_through_pipeline(tmp_path):
    torch.manual_seed(0)
    source = timm.create_model("deit_tiny_distilled_patch16_224", depth=3, num_classes=3, img_size=32, patch_size=8)
    torch.save({"model": source.state_dict()}, tmp_path / "deit.pth")
    (tmp_path / "names.json").write_text(json.dumps({"0": "ant", "1": "bee", "2": "cat"}))
    command = (
        *("scripts/convert_checkpoint.py", tmp_path / "deit.pth", tmp_path / "new" / "deit"),
        *("--schedule", "1:0.5", "--id2label", tmp_path / "names.json"),
    )
    outcome = run_script(*command)
    assert outcome.returncode == 0, outcome.stderr
    last_line = outcome.stdout.splitlines()[-1]
    assert "assumed: num_attention_heads 3, layer_norm_eps 1e-06, hidden_act gelu; compared with no" in last_line
    classifier = pipeline("image-classification", model=str(tmp_path / "new" / "deit"))
    image = Image.new("L", (90, 60), 70)
    answers = classifier(image)
    assert {answer["label"] for answer in answers} == {"ant", "bee", "cat"}
    batched = classifier([image, image.rotate(90), image], batch_size=3)
    assert [answer["label"] for answer in batched[0]] == [answer["label"] for answer in answers]
    assert classifier.model.config.prune_layers == [1]
    processor = classifier.image_processor
    assert processor.size["shortest_edge"] == 36 and list(processor.image_mean) == [0.485, 0.456, 0.406]

    again = run_script(*command)
    assert again.returncode == 1 and "already exists and is not empty" in again.stderr
    (tmp_path / "deit.pth").write_bytes(b"")
    refused = run_script("scripts/convert_checkpoint.py", tmp_path / "deit.pth", tmp_path / "other")
    assert refused.returncode == 1 and "Error: " in refused.stderr and "Traceback" not in refused.stderr
    assert not (tmp_path / "other").exists()


def test_conversion_is_compared_with_timm_and_refused_if_it_answers_otherwise(tmp_path):
    torch.manual_seed(0)
    source = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=32)
    torch.save(source.state_dict(), tmp_path / "vit.pth")
    command = ("scripts/convert_checkpoint.py", tmp_path / "vit.pth", tmp_path / "vit")
    compared = (*command, "--compare_with", "vit_tiny_patch16_224", "--hidden_act", "gelu")
    refused = run_script(*compared, "--num_attention_heads", "12", "--layer_norm_eps", "1e-5")
    assert (refused.returncode, refused.stdout) == (1, "") and not (tmp_path / "vit").exists()
    assert len(refused.stderr.splitlines()) == 1
    assert "converted with num_attention_heads 12, layer_norm_eps 1e-05, hidden_act gelu" in refused.stderr
    outcome = run_script(*compared)
    assert outcome.returncode == 0, outcome.stderr
    last_line = outcome.stdout.splitlines()[-1]
    assert "assumed: num_attention_heads 3, layer_norm_eps 1e-06; equal logits in timm" in last_line
    conversion = json.loads((tmp_path / "vit" / "config.json").read_text())["conversion"]
    assert conversion["compared_with"].endswith("vit_tiny_patch16_224")


def test_comparison_without_timm_names_the_extra(tmp_path, monkeypatch):
    source = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=3, img_size=32)
    torch.save(source.state_dict(), tmp_path / "vit.pth")
    script = str(ROOT / "scripts" / "convert_checkpoint.py")
    flags = (str(tmp_path / "vit.pth"), str(tmp_path / "new"), "--compare_with", "vit_tiny_patch16_224")
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setattr(sys, "argv", [script, *flags])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(script, run_name="__main__")
    assert "timm" in exit_info.value.code and exit_info.value.code.endswith('pip install "tnt-hf[train]"')
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("names", "message"),
    (
        ('{"0": ["n01", "ant"], "1": ["n02", "bee"], "2": ["n03", "cat"]}', "by a text or an integer"),
        ('{"1": "ant", "2": "bee", "3": "cat"}', "must have the keys 0 to 2"),
        ('["ant", "bee"]', "`id2label` must name the 3 classes"),
        ("ant, bee, cat", "must be a JSON file of class names"),
    ),
)
def test_conversion_refuses_other_class_names_in_one_line(tmp_path, names, message):
    source = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=3, img_size=32)
    torch.save(source.state_dict(), tmp_path / "vit.pth")
    (tmp_path / "names.json").write_text(names)
    command = ("scripts/convert_checkpoint.py", tmp_path / "vit.pth", tmp_path / "new" / "vit")
    refused = run_script(*command, "--id2label", tmp_path / "names.json")
    assert refused.returncode == 1 and len(refused.stderr.splitlines()) == 1
    assert refused.stderr.startswith("Error: ") and message in refused.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_training_benchmark_compares_the_steps_on_the_same_images(tmp_path):
    sizes = ("--architecture", "deit_tiny_distilled_patch16_224", "--batch_size", "2", "--num_images", "8")
    outcome = run_script("benchmarks/__main__.py", "training", *sizes, "--num_rounds", "2", "--output_dir", tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    results = json.loads((tmp_path / "training.json").read_text())
    rows = {row["step"]: row for row in results["rows"]}
    assert list(rows) == ["heads", "heads, checkpointing", "heads, self-distillation", "fine-tuning", "forward"]
    trained = [row["num_trained_parameters"] for row in rows.values()]
    assert trained == [5 * 193, 5 * 193, 5 * 193, trained[3], 0] and trained[3] > 5e6
    assert rows["fine-tuning"]["time_ratio"] == rows["fine-tuning"]["memory_ratio"] == 1
    assert rows["heads"]["memory_ratio"] < 1 and all(row["images_per_second"] > 0 for row in rows.values())
    assert [row["augmentation"] for row in results["input_rows"]] == ["random resized crop", "the authors' recipe"]
    assert all(row["images_per_second"] > 0 for row in results["input_rows"])
