"""`tnt-hf visualize`, by path: tnt_hf/commands/visualize.py."""

from tnt_hf.commands import run_command


if __name__ == "__main__":
    run_command("visualize")
