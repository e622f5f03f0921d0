"""`tnt-hf choose`, by path: tnt_hf/commands/choose.py."""

from tnt_hf.commands import run_command


if __name__ == "__main__":
    run_command("choose")
