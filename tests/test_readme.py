from conftest import ROOT, run_script


def test_tables_are_those_of_the_results_files():
    outcome = run_script(ROOT / "benchmarks" / "write_tables.py", "--check")
    assert outcome.returncode == 0, outcome.stderr
