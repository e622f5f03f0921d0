"""The sub-commands of `tnt-hf`: a module for each, whose `main` does what the flags in `sys.argv` say."""

import ast
import sys
from importlib import import_module
from pathlib import Path

from ..command_line import needing_extra


def run_command(name: str) -> None:
    """
    Run a sub-command. Where packages that it needs are missing, `--help` prints what it does, without its flags.

    Args:
        name (`str`): Name of a module of this folder.
    """
    extra = name if name in ("app", "export") else "train"
    with needing_extra(extra):
        try:
            command = import_module(f"{__name__}.{name}")
        except ModuleNotFoundError:
            if {"-h", "--help"}.isdisjoint(sys.argv):
                raise
            source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
            print(f'{ast.get_docstring(ast.parse(source))}\n\nFor its flags: pip install "tnt-hf[{extra}]"')
            return
    command.main()


__all__ = ["run_command"]
