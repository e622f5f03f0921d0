"""What is distributed: its content, and the demo by an installed copy in an empty folder."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

import tnt_hf
from tnt_hf_cli import COMMANDS


SOURCES = ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.cfg", "tnt_hf_cli.py", "tnt_hf", "tests")
OF_MACHINES = (
    "tnt_hf/__pycache__/x.pyc",
    "tnt_hf/app/components.pyi",
    "tnt_hf/examples/recipes/.DS_Store",
    "tnt_hf/examples/__pycache__/x.pyc",
)
# what the package reads beside its own code
DATA = {
    "tnt_hf/app/style.css",
    "tnt_hf/examples/ankle_boot.png",
    "tnt_hf/examples/collections/imagenet.yaml",
    "tnt_hf/examples/recipes/merge.yaml",
    "tnt_hf/examples/backbone/model.safetensors",
    "tnt_hf/examples/photographs/cat.jpg",
    "tnt_hf/examples/cluttered_backbone/preprocessor_config.json",
    "tnt_hf/examples/cluttered_fashion_mnist/build.py",
    "tnt_hf/examples/fashion_mnist/README.md",
    "tnt_hf/examples/fashion_mnist/test.parquet",
    "tnt_hf/publishing/card_template.md",
    "tnt_hf/py.typed",
}


def run(*command, folder, **environment):
    command = [sys.executable, *map(str, command)]
    outcome = subprocess.run(command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    return outcome.stdout


def build(kind, folder):
    run("-c", f"from setuptools import build_meta; build_meta.{kind}('dist')", folder=folder)
    (built,) = (folder / "dist").iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of the sdist of the working tree, in which a machine has left files of its own."""
    folder = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, folder / name)
    for name in OF_MACHINES:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    with tarfile.open(build("build_sdist", folder)) as sdist:
        sdist.extractall(folder / "sdist", filter="data")
    (unpacked,) = (folder / "sdist").iterdir()
    assert not (unpacked / "tests").exists()
    return build("build_wheel", unpacked)


def install(wheel, folder):
    """Install the wheel under the folder; the environment of processes that are to import it."""
    installed = folder / "installed"
    run("-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", installed, wheel, folder=folder)
    return {"PYTHONPATH": str(installed), "HF_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_wheel_holds_the_package_with_what_its_defaults_name_and_nothing_else(wheel):
    facts = f"tnt_hf-{tnt_hf.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as content:
        names, metadata = set(content.namelist()), content.read(f"{facts}/METADATA").decode()
    code = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tnt_hf").rglob("*.py")}
    assert names >= code | DATA | {"tnt_hf_cli.py"}
    assert {name.split("/")[0] for name in names} == {
        "tnt_hf",
        "tnt_hf_cli.py",
        f"tnt_hf-{tnt_hf.__version__}.dist-info",
    }
    kinds = {name.rpartition(".")[2] for name in names if name.startswith("tnt_hf/")}
    assert kinds == {"css", "jpg", "json", "md", "parquet", "png", "py", "safetensors", "typed", "yaml"}
    assert wheel.stat().st_size < 10e6
    assert all(f"\nProvides-Extra: {extra}\n" in metadata for extra in ("train", "export", "app"))


@pytest.mark.slow
def test_installed_copy_trains_the_demo_in_an_empty_folder(wheel, tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    environment = install(wheel, tmp_path)
    printed = run(Path(environment["PYTHONPATH"]) / "bin" / "tnt-hf", "--help", folder=folder, **environment)
    assert all(name in printed for name in COMMANDS)
    few = ("--max_steps", 2, "--max_train_samples", 16, "--max_eval_samples", 8, "--per_device_train_batch_size", 8)
    flags = ("--output_dir", "runs/demo", *few, "--schedules", "full", "2x", "--use_cpu", "true")
    printed = run("-m", "tnt_hf", "train", "merge", *flags, folder=folder, **environment)
    assert "through pipeline: an image of '" in printed
    assert [path.name for path in folder.iterdir()] == ["runs"]
    results = json.loads((folder / "runs" / "demo" / "results.json").read_text())
    assert [row["schedule"] for row in results["rows"]] == ["full", "2x", "2x"]
    assert results["training"]["base_model"] == "tnt-hf/examples/backbone"


@pytest.mark.slow
def test_python_of_the_readme_runs_by_an_installed_copy_in_an_empty_folder(wheel, tmp_path):
    (code,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    folder = tmp_path / "empty"
    folder.mkdir()
    printed = run("-c", code, folder=folder, **install(wheel, tmp_path))
    assert printed.startswith("[{'label': 'Ankle boot'")
    saved = {path.name for path in (folder / "runs" / "clusters-2x").iterdir()}
    assert saved >= {"model.safetensors", "modeling_tnt.py", "preprocessor_config.json"}
    assert len(code.splitlines()) < 15


def test_version_is_the_one_that_is_cited():
    assert re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1] == tnt_hf.__version__


def test_links_of_the_page_on_pypi_lead_to_the_repository():
    absolute_links = runpy.run_path(str(ROOT / ".github" / "absolute_links.py"))["absolute_links"]
    readme = (ROOT / "README.md").read_text()
    page = absolute_links(readme, "https://github.com/owner/name", "v1.0")
    targets = re.findall(r"\]\(([^)\s]+)\)", page)
    assert len(targets) == len(re.findall(r"\]\(([^)\s]+)\)", readme)) > 20
    assert all(target.startswith("https://") for target in targets)
    assert "](https://github.com/owner/name/raw/v1.0/docs/images/budgets.png)" in page
    assert "](https://github.com/owner/name/blob/v1.0/docs/encoders.md)" in page
    assert "](https://github.com/owner/name/actions/workflows/tests.yml/badge.svg)]" in page
