"""`tnt-hf export`, by path: tnt_hf/commands/export.py."""

from tnt_hf.commands import run_command


if __name__ == "__main__":
    run_command("export")
