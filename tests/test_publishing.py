"""A run becomes a repo that strangers can load, or nothing leaves the machine."""

import json
import os
import pickle
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import RESULTS, TINY, naming, noise_split
from hub_stand_in import Fault, HubStandIn
from huggingface_hub import HfApi, ModelCard, constants, hf_api
from PIL import Image
from safetensors.torch import load, save_file
from transformers import ViTImageProcessorPil

from tnt_hf import TntDeiTConfig, TntDeiTForImageClassification, TntViTConfig, TntViTForImageClassification
from tnt_hf.evaluation import EvaluationArguments
from tnt_hf.publishing import (
    CODE_FILES,
    CardArguments,
    Destination,
    StagedModel,
    connect,
    content_digests,
    describe_upload,
    stage_run,
    training_destination,
    upload,
    verify_staged,
)
from tnt_hf.training import Recipe, TntTrainingArguments


ROOT = Path(__file__).parents[1]
WEIGHTS = "model.safetensors"
KEPT_PICTURE = "figures/kept_tokens.png"
STAGED_FILES = {
    "README.md",
    "attention_tnt.py",
    "config.json",
    "configuration_tnt.py",
    "figures/accuracy.png",
    "figures/kept_tokens.png",
    "model.safetensors",
    "modeling_tnt.py",
    "preprocessor_config.json",
    "results.json",
    "schedules_tnt.py",
    "token_reduction_tnt.py",
    ".eval_results/tnt-hf-2-0-6-8.yaml",
    ".eval_results/tnt-hf-full.yaml",
}


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A run folder as the training script leaves it, of a tiny model."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    torch.manual_seed(0)
    config = TntViTConfig(**TINY, prune_layers=[2], keep_rates=[0.6], num_similar_tokens=8)
    TntViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    (folder / "results.json").write_text(json.dumps(RESULTS.to_json()))
    (folder / "training_args.bin").write_bytes(pickle.dumps({}))
    (folder / "optimizer.pt").write_bytes(b"PK")
    (folder / "data.bin").write_bytes(b"no pickle")
    (folder / "trainer_state.json").write_text("{}")
    (folder / "checkpoint-2").mkdir()
    (folder / "checkpoint-2" / "optimizer.pt").write_bytes(b"PK")
    return folder


@pytest.fixture
def run_dir(finished_run, tmp_path):
    return shutil.copytree(finished_run, tmp_path / "run")


@pytest.fixture(scope="module")
def staged_once(finished_run, tmp_path_factory):
    return stage_run(finished_run, tmp_path_factory.mktemp("staged"), "org/tiny", CardArguments())


@pytest.fixture
def staged(staged_once, tmp_path):
    return StagedModel(shutil.copytree(staged_once.path, tmp_path / "staged"), staged_once.digests)


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hub = HubStandIn({"secret": "org", "others": "someone-else"})
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    yield hub
    hub.close()


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.url, token="secret")


def contents(staged):
    return {name: path.read_bytes() for name, path in staged.files.items()}


def stage(run_dir, tmp_path, **arguments):
    folder = tmp_path / "new"
    folder.mkdir()
    return stage_run(run_dir, folder, "org/tiny", CardArguments(**arguments))


def edit_json(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def read_weights(path):
    return load(path.read_bytes())  # a mapped file must not be written to


def edit_weights(path, name, value):
    tensors = read_weights(path)
    tensors[name].flatten()[0] = value
    save_file(tensors, path, metadata={"format": "pt"})


# ---------------------------------------------------------------- staging


def test_only_known_files_are_staged(staged_once, finished_run):
    assert set(staged_once.files) == STAGED_FILES
    for name in ("config.json", WEIGHTS, "modeling_tnt.py", "configuration_tnt.py", "preprocessor_config.json"):
        assert (staged_once.path / name).read_bytes() == (finished_run / name).read_bytes()


def test_staged_results_hold_the_rows_of_the_run_and_no_path_of_this_machine(staged_once):
    results = json.loads((staged_once.path / "results.json").read_text())
    assert results["rows"] == RESULTS.to_json()["rows"] and results["model"] == "org/tiny"
    assert results["checkpoint"]["schedule"] == {"prune_layers": [2], "keep_rates": [0.6], "num_similar_tokens": 8}
    assert not any(b"/home/someone" in content for content in contents(staged_once).values())


def test_the_same_run_is_staged_alike_also_without_its_code(staged_once, run_dir, tmp_path):
    (run_dir / "modeling_tnt.py").unlink()
    again = stage(run_dir, tmp_path)
    assert contents(again) == contents(staged_once) and again.tag == staged_once.tag


def test_tag_names_weights_and_code_but_not_the_card(staged_once, run_dir, tmp_path):
    edit_json(run_dir / "results.json", device="another")
    again = stage(run_dir, tmp_path)
    assert again.tag == staged_once.tag and again.card != staged_once.card
    edit_weights(again.path / WEIGHTS, "classifier.bias", 1.0)
    assert StagedModel(again.path, content_digests(again.path)).tag != staged_once.tag


DAMAGES = {
    "tampered code": (
        lambda run: (run / "modeling_tnt.py").write_text((run / "modeling_tnt.py").read_text() + "\nimport os\n"),
        ["modeling_tnt.py", "tnt-hf"],
    ),
    "NaN": (
        lambda run: edit_weights(run / WEIGHTS, "vit.layers.3.mlp.fc1.weight", float("nan")),
        ["finite", "vit.layers.3.mlp.fc1.weight"],
    ),
    "truncated weights": (
        lambda run: (run / WEIGHTS).write_bytes((run / WEIGHTS).read_bytes()[:-100]),
        ["model.safetensors", "damaged"],
    ),
    "pickled weights": (
        lambda run: torch.save(read_weights(run / WEIGHTS), run / WEIGHTS),
        ["model.safetensors", "pickle"],
    ),
    "pickle": (lambda run: (run / "notes").write_bytes(pickle.dumps([1])), ["run/notes", "pickle"]),
    "pickle in a folder": (
        lambda run: ((run / "old").mkdir(), torch.save({}, run / "old" / "model.bin")),
        ["old/model.bin", "pickle"],
    ),
    "pickled copy": (lambda run: torch.save({}, run / "pytorch_model.bin"), ["pytorch_model.bin", "pickle"]),
    "code of another repo": (
        lambda run: edit_json(run / "config.json", auto_map={"AutoConfig": "other/repo--configuration_tnt.Config"}),
        ["`auto_map`", "run/config.json", "other/repo--configuration_tnt.Config"],
    ),
    "code of the image processor": (
        lambda run: edit_json(run / "preprocessor_config.json", auto_map={"AutoImageProcessor": "other/repo--x.Y"}),
        ["`auto_map`", "preprocessor_config.json", "code"],
    ),
    "code of a pipeline": (
        lambda run: edit_json(run / "config.json", custom_pipelines={"image-classification": {"impl": "o/r--x.Y"}}),
        ["`custom_pipelines`", "run/config.json", "code"],
    ),
    "tensor missing": (
        lambda run: save_file({"classifier.bias": torch.zeros(7)}, run / WEIGHTS),
        ["lack", "classifier.weight"],
    ),
    "tensor unknown": (
        lambda run: save_file({**read_weights(run / WEIGHTS), "more": torch.zeros(1)}, run / WEIGHTS),
        ["1 tensors", "more"],
    ),
    "tensor twice": (
        lambda run: shutil.copy(run / WEIGHTS, run / "model-2.safetensors"),
        ["more than one", "safetensors"],
    ),
    "other weights": (
        lambda run: edit_json(run / "results.json", weights_sha256={WEIGHTS: "0" * 64}),
        ["results.json", "other weights", "tnt-hf evaluate"],
    ),
    "no results": (lambda run: (run / "results.json").unlink(), ["lacks", "results.json"]),
    "broken results": (lambda run: (run / "results.json").write_text('{"rows": ['), ["results.json", "JSON"]),
    "NaN in the results": (
        lambda run: edit_json(run / "results.json", seed=float("nan")),
        ["results.json", "NaN"],
    ),
    "poor results": (
        lambda run: edit_json(run / "results.json", rows=[{"schedule": "full"}]),
        ["results", "gflops"],
    ),
    "plain model": (lambda run: edit_json(run / "config.json", model_type="vit"), ["`model_type`", "'vit'"]),
    "no folder": (lambda run: shutil.rmtree(run), ["run folder", "exist"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_run_is_refused_by_name(run_dir, tmp_path, damage):
    make, named = DAMAGES[damage]
    make(run_dir)
    with pytest.raises(ValueError, match=naming(*named)):
        stage(run_dir, tmp_path)


def test_run_under_names_that_mean_something_to_markdown_and_formulas_is_staged(run_dir, tmp_path):
    config = json.loads((run_dir / "config.json").read_text())
    names = {label: f"<b>|ü {label}$\\frac$" for label in config["id2label"]}
    edit_json(run_dir / "config.json", id2label=names, label2id={name: int(label) for label, name in names.items()})
    edit_json(run_dir / "results.json", dataset="a | $\\frac$ <i>", dataset_hub_id=None)
    Image.new("RGB", (1, 3000)).save(tmp_path / "narrow.png")
    staged = stage(run_dir, tmp_path, card_images_dir=str(tmp_path))
    assert "\\<b\\>\\|ü 0\\$\\\\frac\\$" in staged.card and "a \\| \\$\\\\frac\\$ \\<i\\>" in staged.card
    assert Image.open(staged.path / KEPT_PICTURE).height < 2000


def test_images_of_the_publisher_are_drawn(run_dir, tmp_path):
    edit_json(run_dir / "results.json", dataset="photos")
    for index in range(6):
        Image.new("RGB", (50, 40), (40 * index,) * 3).save(tmp_path / f"{index}.png")
    assert KEPT_PICTURE in stage(run_dir, tmp_path, card_images_dir=str(tmp_path)).files


# ---------------------------------------------------------------- verification


@pytest.mark.parametrize(
    ("change", "named"),
    (
        (lambda folder: (folder / "modeling_tnt.py").write_text("import os"), ["modeling_tnt.py", "staged"]),
        (lambda folder: (folder / "configuration_tnt.py").unlink(), ["configuration_tnt.py", "staged"]),
        (lambda folder: (folder / "optimizer.pt").write_bytes(b""), ["optimizer.pt", "published"]),
        (lambda folder: (folder / "extra.py").write_text(""), ["extra.py", "published"]),
        (lambda folder: (folder / "config.json").write_bytes(pickle.dumps({})), ["config.json", "pickle"]),
        (lambda folder: edit_weights(folder / WEIGHTS, "classifier.bias", 1.0), [WEIGHTS, "staged"]),
        (lambda folder: edit_json(folder / "config.json", num_similar_tokens=7), ["config.json", "staged"]),
        (lambda folder: (folder / "README.md").write_text("---\na: [\n---\n"), ["card", "metadata", "line 1"]),
        (lambda folder: (folder / "README.md").write_text("# nothing"), ["card", "pipeline_tag", "model-index"]),
        (lambda folder: (folder / "figures" / "accuracy.png").unlink(), ["card", "figures/accuracy.png"]),
    ),
)
def test_spoilt_stage_is_refused(staged, finished_run, change, named):
    change(staged.path)
    with pytest.raises(ValueError, match=naming(*named)):
        verify_staged(staged, finished_run)


@pytest.mark.parametrize(
    ("answer", "named"),
    (
        ({"logits": [[9.0] * 7] * 2, "label": "LABEL_0"}, ("logits", "fresh process")),
        ({"logits": [[float("nan")] * 7] * 2, "label": "LABEL_0"}, ("logits", "fresh process", "nan")),
        (None, ("fresh process", "ImportError: no torch")),
    ),
)
def test_stage_that_answers_otherwise_than_the_run_is_refused(staged, finished_run, monkeypatch, answer, named):
    outcome = subprocess.CompletedProcess(
        [], int(answer is None), json.dumps(answer), "Traceback\nImportError: no torch"
    )
    monkeypatch.setattr("tnt_hf.publishing.staging.subprocess.run", lambda *arguments, **options: outcome)
    with pytest.raises(ValueError, match=naming(*named)):
        verify_staged(staged, finished_run)


# ---------------------------------------------------------------- upload


def test_upload_is_one_commit_with_a_tag_and_repeats_nothing(hub, api, staged):
    published = upload(api, staged, Destination("org/tiny"))
    assert hub.files("org/tiny", published["commit"]) == hub.files("org/tiny", staged.tag) == contents(staged)
    assert published["changed"] == sorted(staged.files) and published["tag"] == staged.tag
    assert f'revision="{published["commit"]}"' in describe_upload(published)
    again = upload(api, staged, Destination("org/tiny"))
    assert again["commit"] == published["commit"] and again["changed"] == []
    assert len(hub.repos["org/tiny"].history) == 2  # the empty first one, and this


def test_second_push_sends_only_what_differs(hub, api, staged):
    first = upload(api, staged, Destination("org/tiny"))
    (staged.path / "README.md").write_text(staged.card + "\nMore.\n")
    num_requests = len(hub.requests)
    second = upload(api, staged, Destination("org/tiny"))
    assert second["changed"] == ["README.md"] and second["commit"] != first["commit"]
    assert hub.files("org/tiny") == contents(staged)
    assert not any(method == "PUT" for method, _ in hub.requests[num_requests:])
    assert hub.repos["org/tiny"].tags == {staged.tag: first["commit"]}


def test_files_that_are_no_longer_staged_are_deleted_and_others_left_alone(hub, api, staged):
    api.create_repo("org/tiny")
    for name in ("model-00001-of-00002.safetensors", ".eval_results/tnt-hf-old.yaml", "onnx/model.onnx", "LICENSE"):
        api.upload_file(path_or_fileobj=b"old", path_in_repo=name, repo_id="org/tiny")
    published = upload(api, staged, Destination("org/tiny"))
    assert published["deleted"] == [".eval_results/tnt-hf-old.yaml", "model-00001-of-00002.safetensors"]
    assert set(hub.files("org/tiny")) == set(staged.files) | {"onnx/model.onnx", "LICENSE"}


def test_branch_is_made_if_missing_and_main_left_alone(hub, api, staged):
    for _ in range(2):
        published = upload(api, staged, Destination("org/tiny", revision="trial"))
    repo = hub.repos["org/tiny"]
    assert repo.branches["trial"] == published["commit"] and hub.files("org/tiny", "trial") == contents(staged)
    assert hub.files("org/tiny") == {} and len(repo.history) == 2
    assert hub.requests.count(("POST", "/api/models/org/tiny/branch/trial")) == 1


def test_pull_request_is_opened_once_also_by_who_may_not_write(hub, api, staged):
    api.create_repo("org/tiny")
    guest = HfApi(endpoint=hub.url, token="others")
    published = upload(guest, staged, Destination("org/tiny", create_pr=True))
    assert published["revision"] == "refs/pr/1" and published["tag"] is None
    assert "sets it after merging" in describe_upload(published)
    assert upload(api, staged, Destination("org/tiny", create_pr=True))["revision"] == "refs/pr/1"
    assert len(hub.repos["org/tiny"].pull_requests) == 1 and hub.files("org/tiny") == {}
    assert hub.files("org/tiny", "refs/pr/1") == contents(staged)
    assert hub.repos["org/tiny"].tags == {staged.tag: hub.repos["org/tiny"].branches["refs/pr/1"]}


@pytest.mark.parametrize(
    "fault",
    (
        Fault("repos/create", 500, times=2),
        Fault("repos/create", "lost answer"),
        Fault("PUT /lfs", "dropped", times=2),
        Fault("PUT /lfs", 500, times=2),
        Fault("preupload", 429, retry_after=0),
        Fault("objects/batch", 503),
        Fault("validate-yaml", 500, times=2),
        Fault("POST .*/commit", 429, retry_after=0),
        Fault("POST .*/commit", 500, times=2),
        Fault("POST .*/commit", "dropped"),
        Fault("POST .*/commit", "lost answer"),
        Fault("POST .*/tag", "lost answer"),
        Fault("GET .*/tree", 502),
    ),
    ids=lambda fault: f"{fault.kind} {fault.pattern.split('/')[-1]}",
)
def test_passing_failure_is_outlived_with_one_commit(hub, api, staged, fault):
    hub.faults = [fault]
    published = upload(api, staged, Destination("org/tiny"))
    assert fault.times == 0
    assert hub.files("org/tiny", published["commit"]) == contents(staged)
    assert len(hub.repos["org/tiny"].history) == 2


def test_push_cut_at_any_request_is_completed_by_a_second_one(hub, api, staged):
    """From one request on, the Hub is gone; every second time, it still carries that request out."""
    for repo_id in ("org/first", "org/whole"):  # the first upload of a process makes one request more
        hub.contents.clear()
        hub.requests.clear()
        upload(api, staged, Destination(repo_id))
    num_requests = len(hub.requests)
    for cut in range(num_requests):
        repo_id = f"org/cut-{cut}"
        hub.contents.clear()
        hub.faults = [
            Fault(".", "none", times=cut),
            Fault(".", "lost answer", times=cut % 2),
            Fault(".", "dropped", times=10**6),
        ]
        with pytest.raises(ConnectionError, match="Push again"):
            upload(api, staged, Destination(repo_id))
        hub.faults = []
        published = upload(api, staged, Destination(repo_id))
        assert hub.files(repo_id, published["commit"]) == contents(staged), cut
        assert hub.files(repo_id, staged.tag) == contents(staged), cut
        assert len(hub.repos[repo_id].history) == 2, cut


# ---------------------------------------------------------------- refusals of the Hub


@pytest.mark.parametrize(
    ("token", "repo_id", "fault", "error", "named"),
    (
        ("wrong", "org/tiny", None, PermissionError, ["token", "`hf auth login`"]),
        ("others", "org/tiny", None, PermissionError, ["org/tiny", "--create_pr"]),
        ("others", "org/new", None, PermissionError, ["org/new", "write"]),
        ("secret", "org/tiny", Fault(".", 429, times=99), ConnectionError, ["limit", "requests"]),
        ("secret", "org/tiny", Fault("POST .*/commit", 500, times=99), ConnectionError, [500]),
        ("secret", "org/tiny", Fault("validate-yaml", 404), FileNotFoundError, [404, "/api/validate-yaml"]),
        ("secret", "org/tiny", Fault("PUT", "dropped", times=99), ConnectionError, ["reached", "Push again"]),
    ),
)
def test_refusal_is_explained_and_commits_nothing(hub, api, staged, token, repo_id, fault, error, named):
    api.create_repo("org/tiny")
    hub.faults = [fault] if fault else []
    with pytest.raises(error, match=naming(*named)):
        upload(HfApi(endpoint=hub.url, token=token), staged, Destination(repo_id))
    assert all(len(repo.history) == 1 for repo in hub.repos.values())


def test_connecting_tells_what_is_impossible_before_any_work(hub, api, monkeypatch):
    monkeypatch.setattr("tnt_hf.publishing.hub_upload.get_token", lambda: None)
    with pytest.raises(ValueError, match=naming("`hf auth login`", "HF_TOKEN")):
        connect(Destination("org/tiny"))
    api.create_repo("org/public")
    with pytest.raises(ValueError, match=naming("private", "org/public")):
        connect(Destination("org/public", private=True), "secret")
    with pytest.raises(ValueError, match=naming("--create_pr", "org/absent")):
        connect(Destination("org/absent", create_pr=True), "secret")
    with pytest.raises(PermissionError, match=naming("token", "`hf auth login`")):
        connect(Destination("org/public"), "wrong")
    assert connect(Destination("org/absent"), "secret").endpoint == hub.url
    assert list(hub.repos) == ["org/public"]


def test_unreachable_hub_is_named(hub):
    hub.close()
    with pytest.raises(ConnectionError, match=naming(hub.url, "HF_ENDPOINT")):
        connect(Destination("org/tiny"), "secret")


@pytest.mark.parametrize(
    ("fields", "named"),
    (
        ({"repo_id": "tiny"}, ("org/name", "'tiny'")),
        ({"repo_id": "org/na me"}, ("org/name", "'org/na me'")),
        ({"repo_id": "a/b/c"}, ("org/name", "'a/b/c'")),
        ({"repo_id": "org/tiny", "revision": "0" * 40}, ("revision", "0" * 40)),
        ({"repo_id": "org/tiny", "revision": "a", "create_pr": True}, ("--create_pr", "--revision a")),
    ),
)
def test_impossible_destination_is_refused(fields, named):
    with pytest.raises(ValueError, match=naming(*named)):
        Destination(**fields)


def test_card_arguments_are_checked(tmp_path):
    with pytest.raises(ValueError, match=naming("--weights_license", "'Apache 2'")):
        CardArguments(weights_license="Apache 2")
    with pytest.raises(ValueError, match=naming("--card_images_dir", tmp_path)):
        CardArguments(card_images_dir=str(tmp_path))


# ---------------------------------------------------------------- as a user runs it

STRANGER = """
import sys
sys.modules["tnt_hf"] = None
import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForImageClassification, pipeline
commit, tag, image = sys.argv[1:]
folder = snapshot_download("org/tiny", revision=commit)
assert commit in folder
for revision in (commit, tag):
    model = AutoModelForImageClassification.from_pretrained("org/tiny", trust_remote_code=True, revision=revision)
torch.save(model.eval()(torch.zeros(1, 3, 32, 32)).logits.detach(), "logits.pt")
answers = pipeline("image-classification", model="org/tiny", revision=commit, trust_remote_code=True)(image)
assert len(answers) == 5
for repo_id, token in (("org/tiny", False), ("org/tiny", "wrong"), ("org/absent", None)):
    try:
        snapshot_download(repo_id, token=token, local_dir="other", force_download=True)
    except Exception as error:
        print(repo_id, token, getattr(error, "response", getattr(error.__cause__, "response", None)).status_code)
"""


def run_script(monkeypatch, name, *arguments):
    script = ROOT / "scripts" / name
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
    runpy.run_path(str(script), run_name="__main__")


def test_pushed_run_loads_in_a_process_of_a_stranger(hub, finished_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "secret")
    run_script(monkeypatch, "push_to_hub.py", finished_run, "--repo_id", "org/tiny", "--private")
    printed = capsys.readouterr().out
    published = json.loads(printed.splitlines()[-1])
    assert f'revision="{published["commit"]}"' in printed
    assert set(hub.files("org/tiny")) == STAGED_FILES and hub.repos["org/tiny"].private

    elsewhere = tmp_path / "some where-else v1.0"
    elsewhere.mkdir()
    (elsewhere / "use it.py").write_text(STRANGER)
    image = ROOT / "benchmarks" / "results" / "inference.png"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    stranger = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "secret", "HF_HOME": str(elsewhere / "hf-home")}
    outcome = subprocess.run(
        [sys.executable, elsewhere / "use it.py", published["commit"], published["tag"], image],
        env={**environment, **stranger, "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"},
        cwd=elsewhere,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.splitlines()[-3:] == ["org/tiny False 401", "org/tiny wrong 401", "org/absent None 404"]
    model = TntViTForImageClassification.from_pretrained(finished_run).eval()
    expected = model(torch.zeros(1, 3, 32, 32)).logits
    torch.testing.assert_close(torch.load(elsewhere / "logits.pt"), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("flags", "named"),
    (
        (("--repo_id", "no namespace"), ("org/name", "no namespace")),
        (("--repo_id", "org/tiny", "--data_license", "Free"), ("--data_license", "Free")),
        (("--repo_id", "org/tiny", "--dry_run"), ("run folder", "nowhere")),
    ),
)
def test_script_reports_bad_input_in_one_line(monkeypatch, flags, named):
    with pytest.raises(SystemExit, match=naming("Error: ", *named)):
        run_script(monkeypatch, "push_to_hub.py", "nowhere", *flags)


def test_dry_run_of_a_distilled_model_in_several_files_needs_no_token(run_dir, monkeypatch, capsys):
    torch.manual_seed(0)
    (run_dir / WEIGHTS).unlink()
    TntDeiTForImageClassification(TntDeiTConfig(**TINY)).save_pretrained(run_dir, max_shard_size="200KB")
    edit_json(run_dir / "results.json", dataset="photos", dataset_hub_id=None)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    run_script(monkeypatch, "push_to_hub.py", run_dir, "--repo_id", "org/tiny", "--dry_run")
    printed = capsys.readouterr().out
    assert "# tiny" in printed and "Dry run: nothing was uploaded." in printed
    assert "A distilled DeiT" in printed and "TntDeiTForImageClassification.from_pretrained" in printed
    shards = {f"model-0000{index}-of-00002.safetensors" for index in (1, 2)}
    assert all(f"{(run_dir / shard).stat().st_size:,}  {shard}" in printed for shard in shards)
    unneeded = {KEPT_PICTURE, WEIGHTS, ".eval_results/tnt-hf-full.yaml", ".eval_results/tnt-hf-2-0-6-8.yaml"}
    expected = (STAGED_FILES - unneeded) | shards | {"model.safetensors.index.json"}
    assert set(json.loads(printed.splitlines()[-1])["files"]) == expected


# ---------------------------------------------------------------- after training


@pytest.mark.parametrize(
    ("flags", "named"),
    (
        ({"do_eval": False, "hub_model_id": "org/tiny"}, ("--push_to_hub", "--do_train", "--do_eval")),
        ({"hub_model_id": None}, ("--push_to_hub", "--hub_model_id")),
        ({"hub_model_id": "tiny"}, ("org/name", "'tiny'")),
    ),
)
def test_training_that_cannot_be_published_is_refused_before_it_starts(tmp_path, flags, named):
    flags = {"do_train": True, "do_eval": True, "push_to_hub": True, "use_cpu": True, **flags}
    with pytest.raises(ValueError, match=naming(*named)):
        training_destination(TntTrainingArguments(str(tmp_path), **flags))


def test_trainer_itself_never_pushes(make_model, tmp_path):
    flags = {"do_train": True, "do_eval": True, "push_to_hub": True, "use_cpu": True}
    arguments = TntTrainingArguments(str(tmp_path), hub_model_id="org/tiny", hub_private_repo=True, **flags)
    assert training_destination(arguments) == Destination("org/tiny", private=True)
    dataset = dict.fromkeys(("train", "validation"), noise_split(4, 32, 32, num_classes=7))
    image_processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    recipe = Recipe(evaluation=EvaluationArguments(schedules=["full"]), training=arguments)
    trainer = recipe.make_trainer(dataset, image_processor, make_model())
    assert not trainer.args.push_to_hub and arguments.push_to_hub


def test_a_model_that_transformers_pushes_carries_its_code(hub, finished_run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)  # these two read it once
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
    TntViTForImageClassification.from_pretrained(finished_run).push_to_hub("org/tiny", private=True)
    files = hub.files("org/tiny")
    assert hub.repos["org/tiny"].private and {"config.json", WEIGHTS} <= set(files)
    assert all(files.get(name) == path.read_bytes() for name, path in CODE_FILES.items())
    assert json.loads(files["config.json"])["auto_map"]["AutoModelForImageClassification"].startswith("modeling_tnt.")


@pytest.mark.slow
def test_training_with_push_to_hub_ends_in_the_same_repo(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "secret")
    run_script(
        monkeypatch,
        *("run_image_classification.py", ROOT / "examples/recipes/merge.yaml", "--output_dir", tmp_path / "run"),
        *("--max_train_samples", "64", "--max_eval_samples", "20", "--max_steps", "3"),
        *("--schedules", "full", "single"),
        *("--save_strategy", "steps", "--save_steps", "1", "--push_to_hub", "--hub_model_id", "org/demo"),
    )
    published = json.loads(capsys.readouterr().out.splitlines()[-1])
    repo, files = hub.repos["org/demo"], hub.files("org/demo")
    assert len(repo.history) == 2 and repo.tags == {published["tag"]: published["commit"]}
    assert {"README.md", "modeling_tnt.py", "configuration_tnt.py", WEIGHTS} <= set(files)
    assert not any(name.endswith((".bin", ".pt")) for name in files)
    training = json.loads(files["results.json"])["training"]
    assert (training["num_images"], training["num_steps"], training["base_model_license"]) == (64, 3, "mit")
    assert ModelCard(files["README.md"].decode()).data.license == "mit"
    assert yaml.safe_load(files[".eval_results/tnt-hf-single.yaml"])[0]["dataset"]["task_id"] == "default"
