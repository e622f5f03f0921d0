"""`tnt-hf convert`, by path: tnt_hf/commands/convert.py."""

from tnt_hf.commands import run_command


if __name__ == "__main__":
    run_command("convert")
