import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parents[1]


def test_tables_are_those_of_the_results_files():
    command = [sys.executable, str(ROOT / "scripts" / "write_tables.py"), "--check"]
    outcome = subprocess.run(command, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
