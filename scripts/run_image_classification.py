"""`tnt-hf train`, by path: tnt_hf/commands/train.py."""

from tnt_hf.commands import run_command


if __name__ == "__main__":
    run_command("train")
