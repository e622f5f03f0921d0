"""The command `tnt-hf`: what it offers, and how it is called."""

import pkgutil
import subprocess
import sys
from importlib import import_module

import pytest
from conftest import ROOT, naming

import tnt_hf.commands
import tnt_hf_cli
from tnt_hf_cli import COMMANDS


MODULES = {module.name for module in pkgutil.iter_modules(tnt_hf.commands.__path__)}


@pytest.mark.parametrize("arguments", ([], ["--help"]))
def test_help_names_every_command_and_needs_no_torch(arguments):
    code = "import sys, tnt_hf_cli; tnt_hf_cli.main(); sys.exit('torch' in sys.modules or 'tnt_hf' in sys.modules)"
    outcome = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    for name, sentence in COMMANDS.items():
        assert name in outcome.stdout and sentence in outcome.stdout


def test_every_command_is_a_module_and_has_one_script():
    scripts = [path.read_text() for path in (ROOT / "scripts").glob("*.py")]
    assert set(COMMANDS) == MODULES
    for name in COMMANDS:
        assert [f'run_command("{name}")' in script for script in scripts].count(True) == 1
    assert len(scripts) == len(COMMANDS)


@pytest.mark.parametrize("name", ("trian", "commands", "--version"))
def test_unknown_command_is_one_clear_error(monkeypatch, name):
    monkeypatch.setattr(sys, "argv", ["tnt-hf", name])
    with pytest.raises(SystemExit, match=naming("Error: ", *COMMANDS, name)):
        tnt_hf_cli.main()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_says_what_it_does_and_is_called_by_its_name(monkeypatch, capsys, name):
    monkeypatch.setattr(sys, "argv", ["tnt-hf", name, "--help"])
    with pytest.raises(SystemExit) as exit_info:
        tnt_hf_cli.main()
    printed = capsys.readouterr().out
    assert exit_info.value.code == 0 and f"    tnt-hf {name} " in printed and "--help" in printed


def error_of(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["tnt-hf", *words])
    with pytest.raises(SystemExit) as exit_info:
        tnt_hf_cli.main()
    return exit_info.value.code


@pytest.mark.parametrize(
    ("words", "close"),
    (
        (["evaluate", "--schedule", "2x"], "--schedules"),
        (["evaluate", "--model_name_or_path", "runs/demo", "--schedule=2x"], "--schedules"),
        (["export", "--schedules", "2x"], "--schedule"),
        (["benchmark", "--batch_size", "8"], "--batch_sizes"),
        (["app", "--model", "runs/demo"], "--model_name_or_path"),
        (["choose", "--images", "photos"], "--images_dir"),
        (["publish", "--repo", "org/name"], "--repo_id"),
        (["train", "merge", "--learning-rat", "1"], "--learning-rate"),
    ),
)
def test_unknown_flag_is_named_with_the_one_that_was_meant(monkeypatch, words, close):
    unknown = [word for word in words if word.startswith("-")][-1].partition("=")[0]
    expected = f"Error: Unknown flag {unknown} of tnt-hf {words[0]}: did you mean {close}?"
    assert error_of(monkeypatch, *words) == expected


def test_unknown_flag_like_no_other_refers_to_the_help(monkeypatch):
    expected = "Error: Unknown flag --quux of tnt-hf app: --help lists those it has."
    assert error_of(monkeypatch, "app", "--quux") == expected


@pytest.mark.parametrize("name", ("evaluate", "benchmark", "choose", "export", "app", "visualize"))
def test_model_without_its_flag_is_told_the_flag(monkeypatch, name):
    error = error_of(monkeypatch, name, "runs/demo")
    assert error == (
        f"Error: tnt-hf {name} does not expect runs/demo without a flag: a model is named with --model_name_or_path."
    )


def help_of(monkeypatch, capsys, *words):
    assert error_of(monkeypatch, *words, "--help") == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_tells_the_flags_that_are_required_and_comes_before_an_error(monkeypatch, capsys):
    printed = help_of(monkeypatch, capsys, "choose", "--images", "photos")
    assert "usage: tnt-hf choose [-h] --model_name_or_path MODEL_NAME_OR_PATH --images_dir IMAGES_DIR [" in printed


def test_help_states_defaults_that_there_are_and_calls_opposites_by_that_word(monkeypatch, capsys):
    for name in ("train", "evaluate", "visualize", "collection"):
        printed = help_of(monkeypatch, capsys, name)
        assert "(default: None)" not in printed and "(default: [])" not in printed
    printed = help_of(monkeypatch, capsys, "visualize")
    assert (
        "the images of schedules.png. (default: True) --no_show_answers, --no-show-answers The opposite of" in printed
    )


@pytest.mark.parametrize("name", ("evaluate", "export", "visualize"))
def test_help_says_that_plain_checkpoints_will_do(monkeypatch, capsys, name):
    assert "a plain checkpoint has no scoring heads, so it merges clusters" in help_of(monkeypatch, capsys, name)


def test_help_of_train_names_both_kinds_of_training(monkeypatch, capsys):
    printed = help_of(monkeypatch, capsys, "train")
    assert "Train the scoring heads of" in printed and "adapt its LayerNorms and biases" in printed


@pytest.mark.parametrize("name", COMMANDS)
def test_help_without_the_extra_says_what_the_command_does_and_what_to_install(monkeypatch, capsys, name):
    described = import_module(f"tnt_hf.commands.{name}").__doc__
    monkeypatch.setitem(sys.modules, f"tnt_hf.commands.{name}", None)
    monkeypatch.setattr(sys, "argv", ["tnt-hf", name, "--help"])
    tnt_hf_cli.main()
    extra = name if name in ("app", "export") else "train"
    printed = capsys.readouterr().out
    assert printed == f'{described.strip()}\n\nFor its flags: pip install "tnt-hf[{extra}]"\n'
    assert error_of(monkeypatch, name).endswith(f'It comes with: pip install "tnt-hf[{extra}]"')


def test_help_of_an_installation_without_extras():
    code = "import sys; sys.modules |= dict.fromkeys(('accelerate', 'datasets')); import tnt_hf_cli; tnt_hf_cli.main()"
    command = [sys.executable, "-c", code, "evaluate", "-h"]
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert "    tnt-hf evaluate " in outcome.stdout and 'pip install "tnt-hf[train]"' in outcome.stdout


def test_flag_that_is_missing_is_named_where_all_others_are_known(monkeypatch, capsys):
    assert error_of(monkeypatch, "evaluate", "--schedules", "2x") == 2
    assert "required: --model_name_or_path" in capsys.readouterr().err
