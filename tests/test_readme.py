"""README.md and its neighbours: their tables, links and Python."""

import re
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, noise_split, run_script
from datasets import Image
from transformers import Trainer, ViTImageProcessorPil

from benchmarks.write_tables import PAGES as WRITTEN_PAGES
from benchmarks.write_tables import TABLES
from tnt_hf import TntViTConfig, TntViTForImageClassification, evaluation
from tnt_hf.deployed_forms import missing_forms
from tnt_hf.export import export_compiled, export_onnx
from tnt_hf.training import Recipe


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *(ROOT / "docs").rglob("*.md")]


def test_tables_are_those_of_the_results_files():
    outcome = run_script(ROOT / "benchmarks" / "write_tables.py", "--check")
    assert outcome.returncode == 0, outcome.stderr


def test_every_table_stands_on_one_page_that_is_written():
    where = {page: re.findall(r"<!-- table (\w+) -->", page.read_text()) for page in PAGES}
    assert sorted(name for names in where.values() for name in names) == sorted(TABLES)
    assert {page.relative_to(ROOT).as_posix() for page, names in where.items() if names} == set(WRITTEN_PAGES)


def test_links_lead_to_files_and_headings():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            path, _, anchor = target.partition("#")
            if path.startswith("../../actions/workflows/"):  # an address of the repository, where badges are
                workflow = path.removeprefix("../../actions/workflows/").removesuffix("/badge.svg")
                assert (ROOT / ".github" / "workflows" / workflow).is_file(), target
            elif not path.startswith("http"):
                linked = page.parent / path if path else page
                assert linked.exists(), f"{page.name}: {target}"
                headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.M) if anchor else []
                assert not anchor or anchor in map(heading_anchor, headings), f"{page.name}: {target}"


def heading_anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def python_blocks(page):
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.M | re.S)


def test_python_of_the_pages_compiles():
    blocks = [(page.name, block) for page in PAGES for block in python_blocks(page)]
    assert len(blocks) > 9
    for name, block in blocks:
        compile(block, name, "exec")


def classifier_and_image():
    """What docs/deployment.md leaves to the reader: a classifier, of the size of DeiT-S, also in runs/demo; images."""
    config = TntViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_labels=10)
    model = TntViTForImageClassification(config).eval()
    model.save_pretrained("runs/demo")
    ViTImageProcessorPil().save_pretrained("runs/demo")
    noise_split(1, 224, 224, 1).cast_column("image", Image())[0]["image"].save("image.png")
    return {"model": model, "pixel_values": torch.randn(1, 3, 224, 224)}


def exported_model():
    """What the command of docs/serving.md writes, of a small model."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = TntViTForImageClassification(TntViTConfig(**sizes, token_reduction="cluster", num_labels=10)).eval()
    model.set_schedule([0], [0.6])
    served = Path("runs/served")
    served.mkdir(parents=True)
    export_onnx(model, served / "model.onnx")
    export_compiled(model, served / "model.pt2")
    return {"expected": model(torch.zeros(8, 3, 224, 224)).logits.detach().numpy()}


def gives_the_logits(left):
    logits = [left[name] for name in ("logits", "compiled_logits", "openvino_logits") if name in left]
    return len(logits) >= 2 and all(np.allclose(each, left["expected"], atol=1e-4) for each in logits)


def can_run(block):
    """Whether every package that a block imports is installed: docs/serving.md shows two that the tests do without."""
    return all(find_spec(name) for name in re.findall(r"^(?:import|from) (\w+)", block, re.M))


@pytest.mark.parametrize(
    ("name", "prepare", "is_as_the_page_says"),
    (
        (
            "docs/training.md",
            dict,
            lambda left: (
                Path("runs/heads/model.safetensors").is_file()
                and {row.schedule for row in left["rows"]} == {"full", "2x"}
                and left["row"].schedule == "3x"
                and left["model"].training
            ),
        ),
        (
            "docs/deployment.md",
            classifier_and_image,
            lambda left: (
                left["outputs"].kept_indices[0].shape == (1, 98)
                and left["config"].patch_token_counts()[:4] == [196, 196, 196, 117]
                and left["model"].config.prune_layers == [2, 3, 4]
            ),
        ),
        pytest.param(
            "docs/serving.md",
            exported_model,
            gives_the_logits,
            marks=pytest.mark.skipif("AOTInductor" in missing_forms(), reason="needs a C++ compiler"),
        ),
    ),
)
def test_python_of_a_page_runs_as_written(name, prepare, is_as_the_page_says, tmp_path, monkeypatch):
    """In a copy of the repository, but for the length of trainings, evaluations and measurements."""
    load, train, measure_cost = Recipe.load, Trainer.train, evaluation.measure_cost

    def train_shortly(trainer, *args, **kwargs):
        trainer.args.max_steps = 2
        return train(trainer, *args, **kwargs)

    monkeypatch.setattr(Recipe, "load", partial(load, max_eval_samples=16))
    monkeypatch.setattr(Trainer, "train", train_shortly)
    monkeypatch.setattr(evaluation, "measure_cost", partial(measure_cost, num_counts=2, repeats=1))
    for each in ROOT.iterdir():
        if each.name != "runs":
            (tmp_path / each.name).symlink_to(each)
    monkeypatch.chdir(tmp_path)
    namespace = prepare()
    for block in filter(can_run, python_blocks(ROOT / name)):
        exec(block, namespace)
    assert is_as_the_page_says(namespace)
