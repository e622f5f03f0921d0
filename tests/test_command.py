"""The command `tnt-hf`: what it offers, and how it is called."""

import pkgutil
import subprocess
import sys

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
