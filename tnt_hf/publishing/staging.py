"""A finished run -> a clean folder -> verified as a stranger would load it."""

import fnmatch
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import load_dataset
from huggingface_hub import ModelCard, parse_eval_result_entries
from PIL import Image as PILImage
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..config_fields import describe_fields
from ..conversion import load_classifier, load_image_processor
from ..data import BUNDLED_DATASET_NAME, decode_image
from ..examples import BUNDLED_DATASET
from ..modeling_tnt import AUTO_MAPS, TntDeiTForImageClassification, TntViTForImageClassification
from ..results import RESULTS_NAME, PublishedResults, Results, file_digest, write_results
from ..schedules_tnt import height_and_width
from .card import ACCURACY_PICTURE, KEPT_TOKENS_PICTURE, eval_results_files, make_card
from .hub_code import CODE_FILES


MODEL_CLASSES = {
    model_class.config_class.model_type: model_class
    for model_class in (TntViTForImageClassification, TntDeiTForImageClassification)
}
WEIGHTS_PATTERNS = ("model*.safetensors", "model.safetensors.index.json")
COPIED_PATTERNS = ("config.json", "preprocessor_config.json", *WEIGHTS_PATTERNS)
WRITTEN_PATTERNS = ("README.md", RESULTS_NAME, ACCURACY_PICTURE, KEPT_TOKENS_PICTURE, ".eval_results/tnt-hf-*.yaml")
ALLOWED_PATTERNS = (*COPIED_PATTERNS, *CODE_FILES, *WRITTEN_PATTERNS)
# What Trainer and Accelerate leave in a run folder to resume from; never staged.
TRAINING_STATE = ("training_args.bin", "optimizer*", "scheduler*", "scaler*", "rng_state*", "random_states*")
PICKLE_SUFFIXES = (".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth")
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
NUM_CARD_IMAGES = 4
FRESH_PROCESS = Path(__file__).with_name("load_standalone.py")
LOGIT_TOLERANCE = 1e-4
# "unknown" and "other" are of this form too. Which names it knows, the Hub says when the card is uploaded.
LICENSE_NAME = re.compile(r"[a-z0-9][a-z0-9.+-]*")


@dataclass
class CardArguments:
    """What the card of a published model says beyond its results file."""

    weights_license: str | None = field(
        default=None,
        metadata={
            "help": "Licence of the weights, by its name on the Hub. By default that of the base checkpoint's card."
        },
    )
    data_license: str | None = field(
        default=None,
        metadata={"help": "Licence of the images, by its name on the Hub. By default that of the data set's card."},
    )
    card_images_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of images that you may publish. The card shows the first four with their kept patches. By "
            "default it shows bundled images if the run was measured on them, and otherwise none."
        },
    )

    def __post_init__(self):
        for name in ("weights_license", "data_license"):
            value = getattr(self, name)
            if value is not None and not LICENSE_NAME.fullmatch(value):
                raise ValueError(
                    f"--{name} must be a name of https://huggingface.co/docs/hub/repositories-licenses in lower case, "
                    f"such as apache-2.0, got {value!r}."
                )
        if self.card_images_dir is not None and not _image_files(self.card_images_dir):
            raise ValueError(f"--card_images_dir must be a folder with images, got {self.card_images_dir}.")


@dataclass(frozen=True)
class StagedModel:
    """A folder that is ready to be published, and the SHA-256 of its weights, code and configuration by file."""

    path: Path
    digests: dict[str, str]

    @property
    def tag(self) -> str:
        """A name for weights, code and configuration, whatever the card says; the card pins it."""
        lines = "".join(f"{name} {digest}\n" for name, digest in self.digests.items())
        return f"tnt-{hashlib.sha256(lines.encode()).hexdigest()[:12]}"

    @property
    def files(self) -> dict[str, Path]:
        """Files by their path in the repo, sorted."""
        paths = sorted(path for path in self.path.rglob("*") if path.is_file())
        return {path.relative_to(self.path).as_posix(): path for path in paths}

    @property
    def card(self) -> str:
        return (self.path / "README.md").read_text(encoding="utf-8")


def is_published(name: str) -> bool:
    """Whether a path in a repo is that of a file that is published of a run."""
    return _matches(name, ALLOWED_PATTERNS)


@contextmanager
def verified_stage(run_dir: str | Path, repo_id: str, arguments: CardArguments) -> Iterator[StagedModel]:
    """
    Stage a run in a temporary folder and verify it.

    Raises:
        ValueError: If the folder is not a run, or a check fails; see [`stage_run`] and [`verify_staged`].
    """
    with tempfile.TemporaryDirectory(prefix="tnt-hf ") as folder:
        staged = stage_run(run_dir, folder, repo_id, arguments)
        verify_staged(staged, run_dir)
        yield staged


def stage_run(run_dir: str | Path, folder: str | Path, repo_id: str, arguments: CardArguments) -> StagedModel:
    """
    Fill an empty folder with what is published of a run, and nothing else: config, code, safetensors, image processor,
    results, card, pictures.

    Raises:
        ValueError: If the folder is not a run of a TNT model, holds a pickle that is no training state, its code
            differs from this package's, or its results were measured on other weights.
    """
    run_dir, folder = Path(run_dir), Path(folder)
    _check_run(run_dir)
    for path in sorted(run_dir.iterdir()):
        if _matches(path.name, COPIED_PATTERNS):
            shutil.copyfile(path, folder / path.name)
    for name, path in CODE_FILES.items():
        shutil.copyfile(path, folder / name)
    check_weights(folder)

    digests = content_digests(folder)
    results = Results.from_json(_read_json(run_dir / RESULTS_NAME))
    weights = {name: digest for name, digest in digests.items() if name.endswith(".safetensors")}
    if results.weights_sha256 and results.weights_sha256 != weights:
        raise ValueError(
            f"{run_dir / RESULTS_NAME} was measured on other weights than those in {run_dir}: evaluate them with "
            f"`tnt-hf evaluate --model_name_or_path {run_dir} --output_dir {run_dir} "
            "--overwrite_output_dir`."
        )
    model = load_classifier(folder).eval()
    changes = {
        "model": repo_id,
        "checkpoint": _describe_checkpoint(model),
        "weights_license": arguments.weights_license or (results.training or {}).get("base_model_license"),
        "dataset_license": arguments.data_license or results.dataset_license,
    }
    results = PublishedResults(**{**vars(results), **changes})
    write_results(folder, results)

    pictures = _draw_pictures(model, results, folder, _card_images(arguments, results))
    staged = StagedModel(folder, digests)
    make_card(results, repo_id, staged.tag, pictures).save(folder / "README.md")
    for name, text in eval_results_files(results).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return staged


def _check_run(run_dir: Path) -> None:
    if not run_dir.is_dir():
        raise ValueError(f"The run folder must exist, got {run_dir}.")
    required = ("config.json", "preprocessor_config.json", RESULTS_NAME)
    missing = [name for name in required if not (run_dir / name).is_file()]
    if not any(run_dir.glob("model*.safetensors")):
        missing.append("model.safetensors")
    if missing:
        raise ValueError(
            f"{run_dir} lacks {', '.join(missing)}. `tnt-hf train` writes all that is published; into the folder of "
            f"another TNT model `tnt-hf evaluate --output_dir` writes {RESULTS_NAME}."
        )
    config = _read_json(run_dir / "config.json")
    if config.get("model_type") not in MODEL_CLASSES:
        raise ValueError(
            f"{run_dir} must hold a TNT model, of `model_type` {' or '.join(MODEL_CLASSES)}, got "
            f"{config.get('model_type')!r}."
        )
    expected = AUTO_MAPS[config["model_type"]]
    if config.get("auto_map") != expected:
        raise ValueError(f"`auto_map` in {run_dir / 'config.json'} must be {expected}, got {config.get('auto_map')}.")
    for name, field_name in (("config.json", "custom_pipelines"), ("preprocessor_config.json", "auto_map")):
        if field_name in _read_json(run_dir / name):
            raise ValueError(f"`{field_name}` in {run_dir / name} would run code of its own: remove it.")
    for path in sorted(run_dir.rglob("*")):
        if path.is_file() and not _is_training_state(path.relative_to(run_dir)) and is_pickle(path):
            raise ValueError(
                f"{path} is a pickle, which can run any code where it is loaded. Weights are published as safetensors "
                "alone: move it out of the run folder."
            )
    for name, path in CODE_FILES.items():
        if (run_dir / name).exists() and (run_dir / name).read_bytes() != path.read_bytes():
            raise ValueError(
                f"{run_dir / name} differs from the {name} of the installed tnt-hf: it was changed, or saved by "
                "another version. To publish the run with the installed code, remove it there and evaluate again with "
                f"`tnt-hf evaluate --model_name_or_path {run_dir} --output_dir {run_dir} "
                "--overwrite_output_dir`."
            )


def _is_training_state(path: Path) -> bool:
    return path.match("checkpoint-*/*") or _matches(path.name, TRAINING_STATE)


def is_pickle(path: Path) -> bool:
    """Whether a file is a pickle or a PyTorch file, by its content or, if that does not tell, by its suffix."""
    with path.open("rb") as file:
        start = file.read(2)
    if start[:1] == b"\x80" and start[1:] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return True
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".pkl") for name in archive.namelist())
    return path.suffix.lower() in PICKLE_SUFFIXES


def check_weights(folder: str | Path) -> None:
    """
    Check the weights of a checkpoint without running it: every tensor of the model is there under the name and in the
    shape of `state_dict()`, once, and finite.

    Raises:
        ValueError: If not, or a file is damaged.
    """
    folder = Path(folder)
    model_class = MODEL_CLASSES[_read_json(folder / "config.json").get("model_type")]
    with torch.device("meta"):
        expected = model_class(model_class.config_class.from_pretrained(folder)).state_dict()
    found, not_finite = {}, []
    for path in sorted(folder.glob("model*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    if name in found:
                        raise ValueError(f"{name} is in more than one safetensors file of {folder}.")
                    tensor = file.get_tensor(name)
                    found[name] = tensor.shape
                    if not torch.isfinite(tensor).all():
                        not_finite.append(name)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path.name} is damaged or no safetensors file: {error}") from error
    if not_finite:
        raise ValueError(f"The weights hold values that are not finite in {', '.join(not_finite[:3])}.")
    for what, names in (
        ("lack", expected.keys() - found.keys()),
        ("hold unknown", found.keys() - expected.keys()),
        ("misshape", {key for key in expected.keys() & found.keys() if expected[key].shape != found[key]}),
    ):
        if names:
            raise ValueError(f"The weights {what} {len(names)} tensors, such as {', '.join(sorted(names)[:3])}.")


def _describe_checkpoint(model: TntViTForImageClassification | TntDeiTForImageClassification) -> dict[str, Any]:
    config = model.config
    return {
        "class": type(model).__name__,
        "image_size": height_and_width(config.image_size),
        "num_patches": config.num_patches,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "classes": [config.id2label[label] for label in sorted(config.id2label)],
        "schedule": config.schedule.settings,
        **describe_fields(config),
    }


def _image_files(folder: str | Path) -> list[Path]:
    if not Path(folder).is_dir():
        return []
    return sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)


def _card_images(arguments: CardArguments, results: Results) -> list[PILImage.Image]:
    if arguments.card_images_dir is not None:
        return [
            decode_image({"path": str(path), "bytes": None})
            for path in _image_files(arguments.card_images_dir)[:NUM_CARD_IMAGES]
        ]
    if results.dataset == BUNDLED_DATASET_NAME:
        images = load_dataset(str(BUNDLED_DATASET), split="test")["image"]
        return [images[index].convert("RGB") for index in range(NUM_CARD_IMAGES)]
    return []


def _draw_pictures(
    model: TntViTForImageClassification | TntDeiTForImageClassification,
    results: Results,
    folder: Path,
    images: list[PILImage.Image],
) -> list[str]:
    """Draw what the results allow; the kept tokens are those of the stored schedule, else of the first pruned row."""
    from ..visualization import draw_kept_tokens, plot_accuracy

    (folder / ACCURACY_PICTURE).parent.mkdir()
    plot_accuracy(results.rows, results.dataset, folder / ACCURACY_PICTURE)
    pruned = [row for row in results.rows if row.is_reduced]
    if not images or not (model.config.prune_layers or pruned):
        return [ACCURACY_PICTURE]
    schedule = model.config.schedule if model.config.prune_layers else pruned[0].to_schedule()
    draw_kept_tokens(model, load_image_processor(str(folder)), images, folder / KEPT_TOKENS_PICTURE, schedule)
    return [ACCURACY_PICTURE, KEPT_TOKENS_PICTURE]


def content_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of weights, code and configuration by its name."""
    paths = (path for path in sorted(folder.iterdir()) if _matches(path.name, (*COPIED_PATTERNS, *CODE_FILES)))
    return {path.name: file_digest(path) for path in paths}


def verify_staged(staged: StagedModel, run_dir: str | Path) -> None:
    """
    Check what is about to be published.

    Only known files, no pickle; weights, code and configuration as [`stage_run`] checked them; a card that parses; and
    in a fresh process, which cannot import tnt_hf: the folder loads with `trust_remote_code=True`, gives the logits of
    the run, and classifies an image through `pipeline`.

    Raises:
        ValueError: If a check fails.
    """
    for name, path in staged.files.items():
        if not is_published(name) or is_pickle(path):
            raise ValueError(f"{name} must not be published: it is a pickle, or no file of a TNT model.")
    changed = [name for name, _ in content_digests(staged.path).items() ^ staged.digests.items()]
    if changed:
        raise ValueError(f"{min(changed)} was changed after it was staged and checked.")
    _check_card(staged)
    _check_loads(staged, Path(run_dir))


def _check_card(staged: StagedModel) -> None:
    try:
        card = ModelCard.load(staged.path / "README.md")
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"The metadata of the card cannot be read: {error}") from error
    if not card.data.eval_results or card.data.pipeline_tag != "image-classification":
        raise ValueError("The metadata of the card must hold a pipeline_tag and a model-index.")
    for link in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", card.text):
        if link not in staged.files:
            raise ValueError(f"The card shows {link}, which is not published.")
    for name, path in staged.files.items():
        if name.endswith(".yaml"):
            parse_eval_result_entries(yaml.safe_load(path.read_text()))


def _check_loads(staged: StagedModel, run_dir: Path) -> None:
    model = load_classifier(run_dir).eval()
    height, width = height_and_width(model.config.image_size)
    generator = torch.Generator().manual_seed(0)
    pixel_values = torch.randn(2, model.config.num_channels, height, width, generator=generator)
    with torch.inference_mode():
        expected = model(pixel_values, generator=torch.Generator().manual_seed(0)).logits.float()
    with tempfile.TemporaryDirectory() as folder:
        inputs, image = Path(folder) / "pixel_values.safetensors", Path(folder) / "image.png"
        save_file({"pixel_values": pixel_values}, inputs)
        seen = (128 + 40 * pixel_values[0, 0]).clamp(0, 255).byte().numpy()
        PILImage.fromarray(seen).convert("RGB").save(image)
        process = subprocess.run(
            [sys.executable, "-P", str(FRESH_PROCESS), str(staged.path), str(inputs), str(image)],
            env={**os.environ, "HF_HOME": folder, "HF_MODULES_CACHE": f"{folder}/modules", "HF_HUB_OFFLINE": "1"},
            cwd=folder,
            capture_output=True,
            text=True,
        )
    if process.returncode != 0:
        reason = process.stderr.strip().splitlines() or ["no reason given"]
        raise ValueError(f"The staged folder does not load in a fresh process: {reason[-1]}")
    answer = json.loads(process.stdout.splitlines()[-1])
    difference = (torch.tensor(answer["logits"]) - expected).abs().max().item()
    if not difference <= LOGIT_TOLERANCE * max(1.0, expected.abs().max().item()):
        raise ValueError(f"The staged folder gives other logits than the run in a fresh process, by {difference:.3g}.")
    if answer["label"] not in model.config.id2label.values():
        raise ValueError(
            f"The staged folder classifies an image as {answer['label']!r}, which is no class of the run."
        )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it holds {name}, which is no number there.")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping, got {type(content).__name__}.")
    return content


__all__ = [
    "CardArguments",
    "StagedModel",
    "check_weights",
    "content_digests",
    "is_pickle",
    "is_published",
    "stage_run",
    "verified_stage",
    "verify_staged",
]
