"""`tnt-hf publish`, by path: tnt_hf/commands/publish.py."""

from tnt_hf.commands import run_command


if __name__ == "__main__":
    run_command("publish")
