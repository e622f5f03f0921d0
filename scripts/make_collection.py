"""`tnt-hf collection`, by path: tnt_hf/commands/collection.py."""

from tnt_hf.commands import run_command


if __name__ == "__main__":
    run_command("collection")
