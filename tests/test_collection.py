"""A list of checkpoints becomes run folders, repos and a table, and a repeated command does what is left of it."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from conftest import RESULTS, ROOT, naming, run_script
from hub_stand_in import HubStandIn
from transformers import ViTForImageClassification, ViTImageProcessorPil

from tnt_hf import TntViTConfig
from tnt_hf.command_line import parse_recipe_and_flags
from tnt_hf.commands import collection
from tnt_hf.commands.collection import read_collection
from tnt_hf.commands.train import ARGUMENT_TYPES
from tnt_hf.examples import BUNDLED_BACKBONE, COLLECTIONS_DIR
from tnt_hf.named_schedules import parse_schedule, resolve_schedules
from tnt_hf.results import TRAINING_FIELDS, write_results


SCRIPT = ROOT / "scripts" / "make_collection.py"
SETTINGS = {"adaptation_schedules": ["full", "2x"], "schedules": ["full", "2x"], "max_steps": 1, "use_cpu": True}


@pytest.fixture
def two(tmp_path):
    """A list of two checkpoints of small networks on the bundled images, in a file."""
    torch.manual_seed(0)
    for name in ("first", "second"):
        model = ViTForImageClassification.from_pretrained(BUNDLED_BACKBONE, num_hidden_layers=6)
        model.save_pretrained(tmp_path / name)
        ViTImageProcessorPil.from_pretrained(BUNDLED_BACKBONE).save_pretrained(tmp_path / name)
    few = {"max_train_samples": 8, "max_eval_samples": 10, "per_device_train_batch_size": 4}
    checkpoints = {f"tnt-{name}": {"model_name_or_path": str(tmp_path / name)} for name in ("first", "second")}
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump({"recipe": "adapt", "settings": SETTINGS | few, "checkpoints": checkpoints}))
    return path


@pytest.fixture
def commands(monkeypatch):
    """The commands that are run, of which a training leaves results, unless its checkpoint is among `failing`."""
    commands, failing = [], []

    def run(command, check):
        name = command[command.index("-m") + 2]
        path = command[command.index("--output_dir") + 1] if name == "train" else command[command.index("publish") + 1]
        commands.append((name, path.rpartition("/")[2], command))
        if path.rpartition("/")[2] in failing:
            return subprocess.CompletedProcess(command, 1)
        if name == "train":
            write_results(path, replace(RESULTS, training=dict.fromkeys(TRAINING_FIELDS, "known")))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(collection.subprocess, "run", run)
    run.commands, run.failing = commands, failing
    return run


def main(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["tnt-hf collection", *map(str, flags)])
    collection.main()


def test_list_that_comes_with_the_package_is_one_of_valid_trainings(tmp_path):
    for path in COLLECTIONS_DIR.glob("*.yaml"):
        checkpoints = read_collection(path.stem)
        for flags in checkpoints.values():
            on_cpu = ("--bf16", "false", "--use_cpu", "true", "--output_dir", str(tmp_path))
            model, _, evaluation, _, training = parse_recipe_and_flags(ARGUMENT_TYPES, [*flags, *on_cpu])
            assert model.token_reduction == "cluster"
            patch_size, depth = (14, 12) if "dinov2" in model.model_name_or_path else (16, 12)
            config = TntViTConfig(token_reduction="cluster", patch_size=patch_size, num_hidden_layers=depth)
            resolve_schedules(config, [parse_schedule(text) for text in training.adaptation_schedules])
            resolve_schedules(config, evaluation.schedules)
    names = [flags[flags.index("--model_name_or_path") + 1] for flags in checkpoints.values()]
    assert len(names) == len(set(names)) == 9


def test_what_is_done_is_left_alone_and_what_failed_is_repeated(two, commands, monkeypatch, tmp_path, capsys):
    flags = (two, "--namespace", "org", "--output_dir", tmp_path / "out", "--dry_run", "--private", "--seed", "3")
    commands.failing.append("tnt-first")
    with pytest.raises(SystemExit, match=naming("Error: ", "tnt-first")):
        main(monkeypatch, *flags)
    assert [(name, folder) for name, folder, _ in commands.commands] == [
        ("train", "tnt-first"),
        ("train", "tnt-second"),
        ("publish", "tnt-second"),
    ]
    assert commands.commands[1][2][-4:-2] == ["--seed", "3"]
    assert commands.commands[2][2][-4:] == ["--repo_id", "org/tnt-second", "--private", "--dry_run"]
    assert "tnt-first" not in (tmp_path / "out" / "table.md").read_text()
    commands.failing.clear()
    commands.commands.clear()
    main(monkeypatch, *flags, "--launcher", "env RANKS=2 python")
    assert [(name, folder) for name, folder, _ in commands.commands] == [
        ("train", "tnt-first"),
        ("publish", "tnt-first"),
        ("publish", "tnt-second"),
    ]
    assert commands.commands[0][2][:5] == ["env", "RANKS=2", "python", "-m", "tnt_hf"]
    table = (tmp_path / "out" / "table.md").read_text()
    assert table in capsys.readouterr().out
    lines = [line.split(" | ")[:4] for line in table.splitlines() if line.startswith("| tnt-")]
    assert lines == [
        [f"| tnt-{name}", schedule, f"{gflops:.3f}", f"{top1:.2f}"]
        for name in ("first", "second")
        for schedule, gflops, top1 in (("full", 0.04321, 90.625), ("2:0.6:8", 0.01234, 84.375))
    ]


def test_part_of_a_list(two, commands, monkeypatch, tmp_path):
    flags = (two, "--namespace", "org", "--output_dir", tmp_path / "out", "--dry_run", "--only")
    for name in ("tnt-second", "tnt-first"):
        main(monkeypatch, *flags, name)
    assert [folder for _, folder, _ in commands.commands] == ["tnt-second"] * 2 + ["tnt-first"] * 2
    table = (tmp_path / "out" / "table.md").read_text()
    assert 0 < table.index("| tnt-first |") < table.index("| tnt-second |")


@pytest.mark.parametrize(
    ("change", "flags", "named"),
    (
        (lambda content: content.pop("recipe"), (), ["`recipe`", "`checkpoints`", "two.yaml"]),
        (lambda content: content.update(more=1), (), ["`recipe`", "`checkpoints`", "more"]),
        (lambda content: content.update(checkpoints=["a"]), (), ["`checkpoints`", "two.yaml"]),
        (lambda content: content.update(recipe="absent"), (), ["recipe", "adapt", "absent"]),
        (lambda content: content["settings"].update(schedules=["dual"]), (), ["full, single, multi", "'dual'"]),
        (dict, ("--only", "tnt-third"), ["--only", "tnt-first, tnt-second", "tnt-third"]),
        (dict, ("--launcher", "no-such-program x"), ["--launcher", "no-such-program x"]),
        (dict, ("--train_dir", "absent"), ["--train_dir", "absent"]),
        (dict, ("--namespace", "a/b"), ["org/name", "a/b"]),
    ),
)
def test_bad_input_is_one_clear_error_before_anything_is_written(
    two, commands, monkeypatch, tmp_path, change, flags, named
):
    content = yaml.safe_load(two.read_text())
    change(content)
    two.write_text(yaml.safe_dump(content))
    with pytest.raises(SystemExit, match=naming("Error: ", *named)):
        main(monkeypatch, two, "--namespace", "org", "--output_dir", tmp_path / "out", "--dry_run", *flags)
    assert not commands.commands and not (tmp_path / "out").exists()


def test_nobody_logged_in_is_told_before_the_first_training(two, commands, monkeypatch, tmp_path):
    monkeypatch.setattr("tnt_hf.publishing.hub_upload.get_token", lambda: None)
    with pytest.raises(SystemExit, match="hf auth login"):
        main(monkeypatch, two, "--namespace", "org", "--output_dir", tmp_path / "out")
    assert not commands.commands


@pytest.mark.slow
def test_checkpoints_are_trained_verified_and_published(two, tmp_path, monkeypatch):
    hub = HubStandIn()
    variables = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "secret", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    out = tmp_path / "out"
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    outcome = subprocess.run(
        [sys.executable, SCRIPT, two, "--namespace", "org", "--output_dir", out, "--only", "tnt-first"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    hub.close()
    assert outcome.returncode == 0, outcome.stderr
    assert list(hub.repos) == ["org/tnt-first"]
    results = json.loads((out / "tnt-first" / "results.json").read_text())
    assert [row["schedule"] for row in results["rows"]] == ["full", "2x"]
    assert (out / "table.md").read_text().count("| tnt-first |") == 2
    command = (SCRIPT, two, "--namespace", "org", "--output_dir", out, "--only", "tnt-first", "--dry_run")
    outcome = run_script(*command)
    assert outcome.returncode == 0, outcome.stderr
    assert "tnt-first is trained" in outcome.stdout and "Dry run: nothing was uploaded." in outcome.stdout
