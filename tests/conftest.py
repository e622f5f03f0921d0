import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import multiprocessing
import re
import runpy
import subprocess
import sys
import tempfile
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Image
from fvcore.nn import FlopCountAnalysis
from PIL import Image as PILImage

from tnt_hf import (
    TntDeiTConfig,
    TntDeiTForImageClassification,
    TntViTConfig,
    TntViTForImageClassification,
)
from tnt_hf.results import ResultRow, Results


TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 4,
    "num_labels": 7,
    # the default 0.02 leaves random models almost linear, and their scores almost equal
    "initializer_range": 0.2,
}
FAMILIES = {
    "vit": (TntViTConfig, TntViTForImageClassification),
    "deit": (TntDeiTConfig, TntDeiTForImageClassification),
}

ROOT = Path(__file__).parents[1]
# Processes for scripts are forked from one that has imported what all of them take seconds to import.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["benchmarks.accuracy", "tnt_hf.publishing.staging", "tnt_hf.training.setup"])


def run_script(path, *arguments):
    """A script of the repository in a process of its own, as `subprocess.run` would report it."""
    (outcome,) = run_script_in_processes([{}], path, *arguments)
    return outcome


def run_script_in_processes(environments, path, *arguments, timeout=300):
    """A script in several processes at once, each with variables of its environment, as a launcher sets them."""
    arguments = [*map(str, arguments)]
    outcomes, processes = [], []
    with tempfile.TemporaryDirectory() as folder:
        for index, environment in enumerate(environments):
            outputs = [Path(folder) / f"stdout-{index}", Path(folder) / f"stderr-{index}"]
            process = FORKSERVER.Process(target=_run_script, args=(str(path), arguments, outputs, environment))
            process.start()
            processes.append((process, outputs))
        for process, outputs in processes:
            process.join(timeout)
            if process.is_alive():
                process.kill()
                process.join()
            printed = [output.read_text() if output.exists() else "" for output in outputs]
            outcomes.append(subprocess.CompletedProcess([path, *arguments], process.exitcode, *printed))
    return outcomes


def _run_script(path, arguments, outputs, environment):
    os.environ.update(environment)
    for descriptor, output in zip((1, 2), outputs):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), descriptor)
    # line by line, as the streams of a new process
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1) for descriptor in (1, 2))
    os.chdir(ROOT)
    sys.argv = [path, *arguments]
    torch.set_num_threads(1)
    runpy.run_path(path, run_name="__main__")


def results_row(schedule, selection, top1):
    """A row of a results file, of a schedule that is unpruned or that of `finished_run`."""
    is_pruned = selection != "none"
    return ResultRow(
        schedule=schedule,
        selection=selection,
        prune_layers=[2] if is_pruned else [],
        keep_rates=[0.6] if is_pruned else [],
        num_similar_tokens=8 if is_pruned else 0,
        top1=top1,
        top5=96.875,
        loss=0.5,
        gflops=0.01234 if is_pruned else 0.04321,
        images_per_second=4321.06 if is_pruned else 1234.56,
        num_images=64,
    )


RESULTS = Results(
    model="/home/someone/runs/tiny",
    dataset="Fashion-MNIST (bundled subset)",
    dataset_hub_id="zalando-datasets/fashion_mnist",
    dataset_license="mit",
    dataset_split="test",
    device="CPU (test)",
    num_threads=3,
    versions={"torch": "2.0", "transformers": "5.9"},
    dtype="float32",
    batch_size=17,
    seed=0,
    rows=[
        results_row("full", "none", 90.625),
        results_row("2:0.6:8", "relevance", 84.375),
        results_row("2:0.6:8", "random", 71.875),
    ],
)


def naming(*parts):
    """For `pytest.raises(match=...)`: errors that name all of these, in any order and whatever their words."""
    return "(?s)" + "".join(f"(?=.*{re.escape(str(part))})" for part in parts)


def noise_split(num_images, height, width, num_classes):
    """A split of undecoded images, each of its own noise, with labels in turn."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(256, size=(num_images, height, width, 3), dtype=np.uint8)
    labels = [index % num_classes for index in range(num_images)]
    dataset = Dataset.from_dict({"image": [PILImage.fromarray(image) for image in pixels], "label": labels})
    return dataset.cast_column("image", Image()).cast_column("image", Image(decode=False))


def count_operations(module, inputs):
    """What fvcore counts, with the products of fused attention, which it leaves out."""

    def attention_operations(inputs, outputs):
        query, key, value = (tensor.type().sizes() for tensor in inputs[:3])
        return prod(query[:-1]) * key[-2] * (query[-1] + value[-1])

    count = FlopCountAnalysis(module, inputs)
    count.set_op_handle("aten::scaled_dot_product_attention", attention_operations)
    return count.unsupported_ops_warnings(False).uncalled_modules_warnings(False).total()


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def make_model(family):
    """A tiny model with random weights of one family, in evaluation mode; config fields may be given."""

    def make(**fields):
        config_class, model_class = FAMILIES[family]
        torch.manual_seed(0)
        return model_class(config_class(**{**TINY, **fields})).eval()

    return make


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
