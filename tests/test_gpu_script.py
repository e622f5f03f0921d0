"""benchmarks/gpu.sh without a GPU: what it runs must be what the benchmark takes."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.inference import InferenceBenchmarkArguments
from tnt_hf.command_line import parse_recipe_and_flags


ROOT = Path(__file__).parent.parent
# Writes its arguments into a file of OUT and prints them as the results.
STUB = """#!{python}
import json, os, sys
with open(os.environ["OUT"] + "/calls.jsonl", "a") as file:
    print(json.dumps(sys.argv[1:]), file=file)
if "pytest" in sys.argv:
    sys.exit(int(os.environ["TESTS_STATUS"]))
print("words of a library")
print(json.dumps({{"arguments": sys.argv[1:]}}))
"""


def run(out, **environment):
    stub = out / "python"
    stub.write_text(STUB.format(python=sys.executable))
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    environment = os.environ | {"OUT": str(out), "PYTHON": str(stub), "TESTS_STATUS": "0"} | environment
    script = subprocess.run([ROOT / "benchmarks/gpu.sh"], env=environment, capture_output=True, text=True, check=False)
    calls = [json.loads(line) for line in (out / "calls.jsonl").read_text().splitlines()]
    return script, calls


def test_every_run_of_the_script_is_one_that_the_benchmark_takes(monkeypatch, tmp_path):
    script, (tests, *runs) = run(tmp_path)
    assert script.returncode == 0 and "tests/test_cuda.py" in tests
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    parsed = []
    for module, name, *flags in (arguments[1:] for arguments in runs):
        assert (module, name) == ("benchmarks", "inference")
        (arguments,) = parse_recipe_and_flags((InferenceBenchmarkArguments,), flags)
        parsed.append(arguments)
    assert {each.device for each in parsed} == {"cuda"} and {each.dtype for each in parsed} == {"bfloat16", "float16"}
    results = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert len(results) == len(runs) and all(result["arguments"] in runs for result in results)


@pytest.mark.parametrize("status", (0, 1))
def test_status_is_that_of_the_tests_and_runs_without_time_are_named(tmp_path, status):
    script, calls = run(tmp_path, TESTS_STATUS=str(status), SECONDS_IN_ALL="0")
    assert script.returncode == status and len(calls) == 1  # a limit of 0 is none to the tests
    assert "deit_base_256: not measured" in script.stdout and not list(tmp_path.glob("*.json"))
