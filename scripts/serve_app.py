"""`tnt-hf app`, by path: tnt_hf/commands/app.py."""

from tnt_hf.commands import run_command


if __name__ == "__main__":
    run_command("app")
