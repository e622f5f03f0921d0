"""The sub-commands of `tnt-hf`: a module for each, whose `main` does what the flags in `sys.argv` say."""

from importlib import import_module

from ..command_line import needing_extra


def run_command(name: str) -> None:
    """
    Args:
        name (`str`): Name of a module of this folder.
    """
    with needing_extra(name if name in ("app", "export") else "train"):
        command = import_module(f"{__name__}.{name}")
    command.main()


__all__ = ["run_command"]
