"""`tnt-hf benchmark`, by path: tnt_hf/commands/benchmark.py."""

from tnt_hf.commands import run_command


if __name__ == "__main__":
    run_command("benchmark")
