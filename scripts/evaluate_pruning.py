"""`tnt-hf evaluate`, by path: tnt_hf/commands/evaluate.py."""

from tnt_hf.commands import run_command


if __name__ == "__main__":
    run_command("evaluate")
