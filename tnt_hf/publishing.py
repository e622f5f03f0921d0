"""A finished run -> a clean folder -> verified as a stranger would load it -> one commit on the Hub."""

import fnmatch
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import load_dataset
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    get_token,
    parse_eval_result_entries,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id
from PIL import Image as PILImage
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import logging

from . import configuration_tnt, modeling_tnt
from .configuration_tnt import height_and_width
from .conversion import load_classifier
from .data import BUNDLED_DATASET, BUNDLED_DATASET_NAME, decode_image
from .evaluation import RESULTS_NAME, weights_digests
from .model_card import ACCURACY_PICTURE, KEPT_TOKENS_PICTURE, check_results, eval_results_files, make_card
from .modeling_tnt import AUTO_MAPS, TntDeiTForImageClassification, TntViTForImageClassification
from .training import ModelArguments, TntTrainingArguments, load_image_processor


logger = logging.get_logger(__name__)

MODEL_CLASSES = {
    model_class.config_class.model_type: model_class
    for model_class in (TntViTForImageClassification, TntDeiTForImageClassification)
}
CODE_FILES = {Path(module.__file__).name: Path(module.__file__) for module in (configuration_tnt, modeling_tnt)}
WEIGHTS_PATTERNS = ("model*.safetensors", "model.safetensors.index.json")
COPIED_PATTERNS = ("config.json", "preprocessor_config.json", *WEIGHTS_PATTERNS)
WRITTEN_PATTERNS = ("README.md", RESULTS_NAME, ACCURACY_PICTURE, KEPT_TOKENS_PICTURE, ".eval_results/tnt-hf-*.yaml")
ALLOWED_PATTERNS = (*COPIED_PATTERNS, *CODE_FILES, *WRITTEN_PATTERNS)
# What Trainer and Accelerate leave in a run folder to resume from; never staged.
TRAINING_STATE = ("training_args.bin", "optimizer*", "scheduler*", "scaler*", "rng_state*", "random_states*")
PICKLE_SUFFIXES = (".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth")
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
NUM_CARD_IMAGES = 4
FRESH_PROCESS = Path(__file__).with_name("load_as_stranger.py")
LOGIT_TOLERANCE = 1e-4
RETRY_WAITS = (1, 2, 4)  # seconds
LONGEST_WAIT = 60
PASSING_ERRORS = (None, 408, 409, 412, 429, 500, 502, 503, 504)  # None: no answer; 412: the branch moved on
# https://huggingface.co/docs/hub/repositories-licenses
LICENSES = """
    afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0 bigscience-openrail-m bsd
    bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0
    cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0
    cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0
    creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 gemma gfdl gpl
    gpl-2.0 gpl-3.0 isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1
    openrail openrail++ osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib
""".split()


@dataclass
class CardArguments:
    """What the card of a published model says beyond its results file."""

    weights_license: str | None = field(
        default=None,
        metadata={
            "help": "Licence of the weights, as the Hub writes it; by default that of the base checkpoint's card."
        },
    )
    data_license: str | None = field(
        default=None, metadata={"help": "Licence of the images, likewise; by default that of the data set's card."}
    )
    card_images_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of images that may be published: the first four are drawn with their kept tokens. Bundled "
            "images if the run was measured on those, otherwise none."
        },
    )

    def __post_init__(self):
        for name in ("weights_license", "data_license"):
            value = getattr(self, name)
            if value is not None and value not in LICENSES:
                raise ValueError(f"--{name} must be one of {', '.join(LICENSES)}, got {value!r}.")
        if self.card_images_dir is not None and not _image_files(self.card_images_dir):
            raise ValueError(f"--card_images_dir must be a folder with images, got {self.card_images_dir}.")


@dataclass(frozen=True)
class Destination:
    """
    Where on the Hub a model goes.

    Args:
        repo_id (`str`): `org/name`; created if missing.
        private (`bool`): Whether the repo must be private.
        revision (`str`): Branch to commit to; created if missing.
        create_pr (`bool`): Whether to open a pull request instead of committing.

    Raises:
        ValueError: If the id or the branch is impossible.
    """

    repo_id: str
    private: bool = False
    revision: str = "main"
    create_pr: bool = False

    def __post_init__(self):
        try:
            validate_repo_id(self.repo_id)
        except HFValidationError as error:
            raise ValueError(f"The repo id must be org/name, got {self.repo_id!r}: {error}") from error
        if self.repo_id.count("/") != 1:
            raise ValueError(f"The repo id must be org/name, got {self.repo_id!r}.")
        if not re.fullmatch(r"[\w.][\w./-]*", self.revision) or re.fullmatch(r"[0-9a-f]{40}", self.revision):
            raise ValueError(f"The revision must be the name of a branch, got {self.revision!r}.")
        if self.create_pr and self.revision != "main":
            raise ValueError(f"--create_pr opens a pull request against main, got --revision {self.revision} too.")


@dataclass(frozen=True)
class StagedModel:
    """A folder that is ready to be published, its files, and the tag that its card pins."""

    path: Path
    tag: str

    @property
    def files(self) -> dict[str, Path]:
        """Files by their path in the repo, sorted."""
        paths = sorted(path for path in self.path.rglob("*") if path.is_file())
        return {path.relative_to(self.path).as_posix(): path for path in paths}

    @property
    def card(self) -> str:
        return (self.path / "README.md").read_text()


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

    results = _read_json(run_dir / RESULTS_NAME)
    check_results(results)
    measured = results.get("weights_sha256")
    if measured and measured != weights_digests(folder):
        raise ValueError(
            f"{run_dir / RESULTS_NAME} was measured on other weights than those in {run_dir}: evaluate them with "
            f"`python scripts/evaluate_pruning.py --model_name_or_path {run_dir} --output_dir {run_dir} "
            "--overwrite_output_dir`."
        )
    model = load_classifier(folder).eval()
    results = {**results, "model": repo_id, "checkpoint": _describe_checkpoint(model)}
    results["weights_license"] = arguments.weights_license or results.get("training", {}).get("base_model_license")
    results["dataset_license"] = arguments.data_license or results.get("dataset_license")
    (folder / RESULTS_NAME).write_text(json.dumps(results, indent=2) + "\n")

    pictures = _draw_pictures(model, results, folder, _card_images(arguments, results))
    tag = content_tag(folder)
    make_card(results, repo_id, tag, pictures).save(folder / "README.md")
    for name, text in eval_results_files(results).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return StagedModel(folder, tag)


def _check_run(run_dir: Path) -> None:
    if not run_dir.is_dir():
        raise ValueError(f"The run folder must exist, got {run_dir}.")
    required = ("config.json", "preprocessor_config.json", RESULTS_NAME)
    missing = [name for name in required if not (run_dir / name).is_file()]
    if not any(run_dir.glob("model*.safetensors")):
        missing.append("model.safetensors")
    if missing:
        raise ValueError(
            f"{run_dir} is not a run of scripts/run_image_classification.py with --do_train and --do_eval: it lacks "
            f"{', '.join(missing)}."
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
    for path in sorted(run_dir.iterdir()):
        if path.is_file() and not _matches(path.name, TRAINING_STATE) and is_pickle(path):
            raise ValueError(
                f"{path} is a pickle, which can run any code where it is loaded. Weights are published as safetensors "
                "alone: move it out of the run folder."
            )
    for name, path in CODE_FILES.items():
        if (run_dir / name).exists() and (run_dir / name).read_bytes() != path.read_bytes():
            raise ValueError(
                f"{run_dir / name} differs from the {name} of the installed tnt-hf: it was changed, or saved by "
                "another version. To publish the run with the installed code, remove it there and evaluate again with "
                f"`python scripts/evaluate_pruning.py --model_name_or_path {run_dir} --output_dir {run_dir} "
                "--overwrite_output_dir`."
            )


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
        "schedule": {name: getattr(config, name) for name in ("prune_layers", "keep_rates", "num_similar_tokens")},
    }


def _image_files(folder: str | Path) -> list[Path]:
    if not Path(folder).is_dir():
        return []
    return sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)


def _card_images(arguments: CardArguments, results: dict[str, Any]) -> list[PILImage.Image]:
    if arguments.card_images_dir is not None:
        return [
            decode_image({"path": str(path), "bytes": None})
            for path in _image_files(arguments.card_images_dir)[:NUM_CARD_IMAGES]
        ]
    if results["dataset"] == BUNDLED_DATASET_NAME:
        images = load_dataset(str(BUNDLED_DATASET), split="test")["image"]
        return [images[index].convert("RGB") for index in range(NUM_CARD_IMAGES)]
    return []


def _draw_pictures(
    model: TntViTForImageClassification | TntDeiTForImageClassification,
    results: dict[str, Any],
    folder: Path,
    images: list[PILImage.Image],
) -> list[str]:
    """Draw what the results allow; the kept tokens are those of the stored schedule, else of the first pruned row."""
    from .visualization import draw_kept_tokens, plot_accuracy  # Matplotlib: training without publishing needs none

    (folder / ACCURACY_PICTURE).parent.mkdir()
    plot_accuracy(results, folder / ACCURACY_PICTURE)
    pruned = [row for row in results["rows"] if row["selection"] == "relevance"]
    if not images or not (model.config.prune_layers or pruned):
        return [ACCURACY_PICTURE]
    if not model.config.prune_layers:
        model.set_schedule(*(pruned[0][name] for name in ("prune_layers", "keep_rates", "num_similar_tokens")))
    draw_kept_tokens(model, load_image_processor(str(folder)), images, folder / KEPT_TOKENS_PICTURE)
    return [ACCURACY_PICTURE, KEPT_TOKENS_PICTURE]


def content_tag(folder: Path) -> str:
    """A name for weights, code and configuration, whatever the card says."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if _matches(path.name, (*COPIED_PATTERNS, *CODE_FILES)):
            digest.update(f"{path.name} {_sha256(path)}\n".encode())
    return f"tnt-{digest.hexdigest()[:12]}"


def verify_staged(staged: StagedModel, run_dir: str | Path) -> None:
    """
    Check what is about to be published.

    Only known files, no pickle; code equal to the package's; weights as [`check_weights`] says; a card and results
    that parse; and in a fresh process, which cannot import tnt_hf: the folder loads with `trust_remote_code=True`,
    gives the logits of the run, and classifies an image through `pipeline`.

    Raises:
        ValueError: If a check fails.
    """
    for name, path in staged.files.items():
        if not _matches(name, ALLOWED_PATTERNS) or is_pickle(path):
            raise ValueError(f"{name} must not be published: it is a pickle, or no file of a TNT model.")
    for name, source in CODE_FILES.items():
        if not (staged.path / name).is_file() or (staged.path / name).read_bytes() != source.read_bytes():
            raise ValueError(f"{name} must equal that of the installed tnt-hf.")
    check_weights(staged.path)
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


def training_destination(arguments: TntTrainingArguments, model_arguments: ModelArguments) -> Destination | None:
    """
    Where a training run is to be published, by `--push_to_hub` and the `--hub_*` flags; None if nowhere.

    Raises:
        ValueError: If the run would not leave what is published, or the destination is impossible.
    """
    if not arguments.push_to_hub:
        return None
    if not (arguments.do_train and arguments.do_eval) or model_arguments.plain_vit:
        raise ValueError("--push_to_hub needs --do_train and --do_eval, and a model with TNT, not --plain_vit.")
    if arguments.hub_model_id is None:
        raise ValueError("--push_to_hub needs --hub_model_id org/name.")
    return Destination(
        arguments.hub_model_id, private=bool(arguments.hub_private_repo), revision=arguments.hub_revision or "main"
    )


def connect(destination: Destination, token: str | None = None) -> HfApi:
    """
    A client of the Hub that `HF_ENDPOINT` names, once it has answered and the destination is known to be possible.

    Raises:
        ValueError: If nobody is logged in, or the repo that exists does not fit `private` or `create_pr`.
        ConnectionError: If the Hub cannot be reached.
        PermissionError: If it does not accept the token.
    """
    token = token or get_token()
    if token is None:
        raise ValueError("Nobody is logged in: run `hf auth login`, or set HF_TOKEN to a token that may write.")
    api = HfApi(token=token, library_name="tnt-hf")
    _retried(lambda: _existing_repo(api, destination), api, destination)
    return api


def _existing_repo(api: HfApi, destination: Destination) -> Any | None:
    """Facts of the repo on the Hub, None if there is none."""
    try:
        repo = api.repo_info(destination.repo_id)
    except HfHubHTTPError as error:
        if _status(error) == 401:
            api.whoami()  # a missing repo is answered like a bad token; this refuses the latter alone
        elif _status(error) != 404:
            raise
        if destination.create_pr:
            raise ValueError(f"--create_pr needs a repo that exists, and {destination.repo_id} does not.") from error
        return None
    if destination.private and not repo.private:
        raise ValueError(f"A private repo was asked for, but {destination.repo_id} exists and is public.")
    return repo


def upload(api: HfApi, staged: StagedModel, destination: Destination) -> dict[str, Any]:
    """
    Bring a repo to the state of a staged folder in one commit, and tag it.

    Only files that differ are sent, so an interrupted upload is completed by another call, and without a difference
    there is no commit. Files in the repo of another kind than those staged are left alone. What fails in passing (rate
    limits, server errors, lost connections) is tried again.

    Returns:
        `dict`: `repo_id`, `revision` (branch or pull request), `commit` (the hash), `tag` (None if it could not be
        set), `pull_request` (URL or None), `changed` (paths), `deleted` (paths).

    Raises:
        ConnectionError: If the Hub cannot be reached or keeps failing.
        PermissionError: If the token is not accepted or may not write to the repo.
        OSError: If the Hub refuses otherwise.
    """
    return _retried(lambda: _upload_once(api, staged, destination), api, destination)


def _upload_once(api: HfApi, staged: StagedModel, destination: Destination) -> dict[str, Any]:
    repo_id = destination.repo_id
    if _existing_repo(api, destination) is None:
        api.create_repo(repo_id, private=destination.private or None, exist_ok=True)  # None: the default of the owner
    title = f"Publish {staged.tag} with tnt-hf"
    revision, pull_request = destination.revision, None
    if destination.create_pr:
        pull_request = _open_pull_request(api, repo_id, title)
        revision = pull_request.git_reference if pull_request else "main"
    head = _branch_head(api, repo_id, revision)
    remote = _remote_files(api, repo_id, head)
    changed = {name: path for name, path in staged.files.items() if not _is_equal(path, remote.get(name))}
    deleted = [name for name in remote if _matches(name, ALLOWED_PATTERNS) and name not in staged.files]
    pull_request_url = pull_request.url if pull_request else None
    if changed or deleted:
        opens_pull_request = destination.create_pr and pull_request is None
        additions = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in changed.items()]
        try:
            api.preupload_lfs_files(repo_id, additions, revision=revision, create_pr=opens_pull_request)
        except (HTTPError, RuntimeError) as error:
            cause = error.__cause__ if isinstance(error, RuntimeError) else error
            if not isinstance(cause, HTTPError):
                raise
            raise _explained(cause, api, destination) from error  # huggingface_hub has tried again often enough
        commit = api.create_commit(
            repo_id,
            [*additions, *(CommitOperationDelete(path_in_repo=name) for name in deleted)],
            commit_message=title,
            revision=revision,
            create_pr=opens_pull_request,
            parent_commit=head,  # what was committed by a call whose answer was lost is not committed again
        )
        head, pull_request_url = commit.oid, commit.pr_url or pull_request_url
        if pull_request_url and pull_request is None:
            revision = commit.pr_revision
        sizes = {name: entry.size for name, entry in _remote_files(api, repo_id, head).items()}
        missing = [name for name, path in staged.files.items() if sizes.get(name) != path.stat().st_size]
        if missing:
            raise OSError(f"{repo_id} lacks {', '.join(missing)} after the commit: push again.")
    return {
        "repo_id": repo_id,
        "revision": revision,
        "commit": head,
        "tag": staged.tag if _tag(api, repo_id, staged.tag, head, destination) else None,
        "pull_request": pull_request_url,
        "changed": sorted(changed),
        "deleted": sorted(deleted),
    }


def _branch_head(api: HfApi, repo_id: str, revision: str) -> str:
    """The commit that a branch points to; a missing branch is made from main."""
    try:
        return api.repo_info(repo_id, revision=revision).sha
    except HfHubHTTPError as error:
        if _status(error) != 404:
            raise
        api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.repo_info(repo_id, revision=revision).sha


def _open_pull_request(api: HfApi, repo_id: str, title: str) -> Any | None:
    """The open pull request of an earlier call, if the Hub has discussions at all."""
    try:
        discussions = list(api.get_repo_discussions(repo_id, discussion_type="pull_request", discussion_status="open"))
    except HfHubHTTPError as error:
        if _status(error) != 404:
            raise
        return None
    return next((discussion for discussion in discussions if discussion.title == title), None)


def _remote_files(api: HfApi, repo_id: str, commit: str) -> dict[str, RepoFile]:
    entries = api.list_repo_tree(repo_id, revision=commit, recursive=True)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _is_equal(path: Path, remote: RepoFile | None) -> bool:
    if remote is None:
        return False
    if remote.lfs is not None:
        return remote.lfs.sha256 == _sha256(path)
    content = path.read_bytes()
    return remote.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _tag(api: HfApi, repo_id: str, tag: str, commit: str, destination: Destination) -> bool:
    """Tag a commit unless the tag is there; whether it is. Who may only open pull requests cannot tag."""
    try:
        api.create_tag(repo_id, tag=tag, revision=commit, exist_ok=True)
    except HfHubHTTPError as error:
        if destination.create_pr and _status(error) == 403:
            return False
        raise
    return True


def _retried(call: Callable[[], Any], api: HfApi, destination: Destination) -> Any:
    """
    Call, and call again after errors that may pass. huggingface_hub does so for file contents, not for making repos
    and commits.
    """
    for wait in (*RETRY_WAITS, None):
        try:
            return call()
        except (HTTPError, json.JSONDecodeError) as error:  # huggingface_hub may parse the page of a failed request
            if wait is None or _status(error) not in PASSING_ERRORS:
                raise _explained(error, api, destination) from error
            asked = error.response.headers.get("Retry-After", "") if _status(error) else ""
            wait = min(int(asked), LONGEST_WAIT) if asked.isdigit() else wait
            logger.warning(f"{api.endpoint}: {_first_line(error)} Trying again in {wait} s.")
            time.sleep(wait)


def _status(error: HTTPError | json.JSONDecodeError) -> int | None:
    """Status code of an HTTP error, None if there was no answer."""
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def _explained(error: HTTPError | json.JSONDecodeError, api: HfApi, destination: Destination) -> OSError:
    status, repo_id = _status(error), destination.repo_id
    again = "Run the same command again: what was sent is not sent twice."
    if status is None:
        return ConnectionError(
            f"{api.endpoint} cannot be reached, or is no Hub: {_first_line(error)} Check the network and HF_ENDPOINT. "
            f"{again}"
        )
    if status == 401:
        return PermissionError(
            f"{api.endpoint} does not accept the token: run `hf auth login`, or set HF_TOKEN to one that may write."
        )
    if status == 403:
        return PermissionError(
            f"The token may not write to {repo_id}: it needs the write role, and its owner a place in "
            f"{repo_id.split('/')[0]}. Who may not write can open a pull request with --create_pr."
        )
    if status == 404:
        return FileNotFoundError(f"{repo_id}, or its revision {destination.revision}, is not on {api.endpoint}.")
    if status == 429:
        return ConnectionError(f"{api.endpoint} limits the rate of requests. Wait some minutes. {again}")
    if status >= 500:
        return ConnectionError(f"{api.endpoint} keeps failing with status {status}. {again}")
    return OSError(f"{api.endpoint} refused: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".") + "."


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping, got {type(content).__name__}.")
    return content


def describe_staged(staged: StagedModel, destination: Destination) -> str:
    """What would be published where: every file with its size in bytes."""
    lines = [f"{path.stat().st_size:>12,}  {name}" for name, path in staged.files.items()]
    total = sum(path.stat().st_size for path in staged.files.values())
    where = "a pull request to main" if destination.create_pr else f"branch {destination.revision}"
    visibility = "private " if destination.private else ""
    return "\n".join(
        [
            f"Verified for {visibility}{destination.repo_id}, {where}, as one commit with the tag {staged.tag}:",
            *lines,
            f"{total:>12,}  bytes in {len(lines)} files",
        ]
    )


def describe_upload(published: dict[str, Any]) -> str:
    """What was published, and the line that loads it pinned."""
    changed, deleted = len(published["changed"]), len(published["deleted"])
    what = f"{changed} files sent, {deleted} deleted" if changed or deleted else "up to date"
    lines = [f"{published['repo_id']}, {published['revision']}: {what}; commit {published['commit']}"]
    if published["pull_request"]:
        lines.append(f"pull request: {published['pull_request']}")
    if published["tag"] is None:
        lines.append("The card pins a tag that you may not set: the owner of the repo sets it after merging.")
    lines.append(
        f'AutoModelForImageClassification.from_pretrained("{published["repo_id"]}", '
        f'revision="{published["commit"]}", trust_remote_code=True)'
    )
    return "\n".join(lines)


__all__ = [
    "CardArguments",
    "Destination",
    "StagedModel",
    "check_weights",
    "connect",
    "content_tag",
    "describe_staged",
    "describe_upload",
    "is_pickle",
    "stage_run",
    "training_destination",
    "upload",
    "verified_stage",
    "verify_staged",
]
