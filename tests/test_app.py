"""The page of `tnt-hf app` without a browser: what it accepts, what it answers, what a request cannot do."""

import json
import math
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path

import gradio as gr
import httpx
import numpy as np
import pytest
import torch
from conftest import TINY, naming
from hub_stand_in import HubStandIn
from huggingface_hub import HfApi, SpaceCard, constants
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from tnt_hf import TntViTConfig, TntViTForImageClassification
from tnt_hf.app.example_images import bundled_examples
from tnt_hf.app.hub_models import MAX_BYTES as MAX_BYTES_OF_MODELS
from tnt_hf.app.hub_models import check_fields, check_processor, load_hub_model
from tnt_hf.app.looking import SMALLER_IMAGE, TOKEN_MERGING, Classifier
from tnt_hf.app.page import STORED_SECONDS, build_page, launch
from tnt_hf.app.rendering import comparison_table, look_page
from tnt_hf.app.uploads import MAX_BYTES, RefusedInput, read_image
from tnt_hf.commands import app as app_command
from tnt_hf.conversion import evaluation_image_processor
from tnt_hf.data import input_size
from tnt_hf.schedules_tnt import Schedule, count_gflops
from tnt_hf.visualization import dim_dropped, draw_merged, trace_tokens


ROOT = Path(__file__).parents[1]


def encoded(image, kind="PNG", **options):
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A TNT model that drops, one that merges, and a plain ViT, with random weights."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    models = {
        "drop": TntViTForImageClassification(TntViTConfig(**TINY)),
        "merge": TntViTForImageClassification(TntViTConfig(**TINY, token_reduction="merge")),
        "plain": ViTForImageClassification(ViTConfig(**TINY)),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def classifiers(folders):
    return {name: Classifier(folders / name) for name in ("drop", "merge", "plain")}


def two_hundred_megapixels():
    return encoded(Image.new("1", (20_000, 10_000)))


BAD_UPLOADS = {
    "empty": (b"", "empty"),
    "text": (b"This is no picture. " * 100, "PNG, JPEG"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "PNG, JPEG"),
    "tiff": (encoded(noise(8, 8), "TIFF"), "PNG, JPEG"),
    "truncated": (encoded(noise(64, 64))[:4000], "damaged"),
    "truncated jpeg": (encoded(noise(64, 64), "JPEG")[:1500], "damaged"),
    "large file": (bytes(MAX_BYTES + 2**20), "21 MB"),
    "long": (encoded(Image.new("L", (10_000, 10))), "10000 x 10"),
}


@pytest.mark.parametrize(("data", "words"), BAD_UPLOADS.values(), ids=BAD_UPLOADS)
def test_bad_uploads_are_refused_in_words_for_a_visitor(data, words):
    with pytest.raises(RefusedInput, match=re.escape(words)) as refused:
        read_image(data)
    assert not re.search(r"/|0x|Error|object", str(refused.value))


@pytest.mark.parametrize(
    ("width", "height", "words"), ((20_000, 10_000, "megapixels"), (10_000, 6_000, "60 megapixels"))
)
def test_too_many_pixels_are_refused_before_they_are_decoded(width, height, words, monkeypatch):
    data = encoded(Image.new("1", (width, height)))
    assert len(data) < 200_000
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: pytest.fail("decoded"))
    with pytest.raises(RefusedInput, match=words):
        read_image(data)


def test_jpegs_of_scans_without_end_are_refused_and_those_of_phones_are_not(monkeypatch):
    progressive = encoded(Image.new("RGB", (3000, 3000), "red"), "JPEG", progressive=True)
    film = b"\xff\xda" * 60  # after the photograph, as phones append one
    assert read_image(progressive + film).size == (1024, 1024)
    last_scan = progressive[progressive.rindex(b"\xff\xda") : -2]
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: pytest.fail("decoded"))
    with pytest.raises(RefusedInput, match="scans"):
        read_image(progressive[:-2] + last_scan * 1000 + progressive[-2:])


def test_images_of_every_accepted_kind_become_rgb():
    red = Image.new("RGB", (30, 20), (255, 0, 0))
    frames = {"save_all": True, "append_images": [Image.new("RGB", (30, 20), (0, 0, 255))]}
    kinds = {
        "gif": encoded(red, "GIF", **frames),
        "animated webp": encoded(red, "WEBP", lossless=True, **frames),
        "animated png": encoded(red, "PNG", **frames),
        "bmp": encoded(red, "BMP"),
        "jpeg": encoded(red, "JPEG", quality=95),
        "cmyk": encoded(red.convert("CMYK"), "JPEG", quality=95),
        "palette": encoded(red.convert("P")),
        "alpha": encoded(red.convert("RGBA")),
    }
    for kind, data in kinds.items():
        image = read_image(data)
        assert (image.mode, image.size) == ("RGB", (30, 20)), kind
        assert np.abs(np.asarray(image, dtype=int) - (255, 0, 0)).max() < 4, kind


def test_one_pixel_sixteen_bits_and_large_photographs_are_read():
    assert read_image(encoded(Image.new("RGB", (1, 1)))).size == (1, 1)
    grey = read_image(encoded(Image.fromarray(np.full((4, 4), 0x8000, dtype=np.uint16))))
    assert np.asarray(grey).tolist() == [[[128, 128, 128]] * 4] * 4
    assert read_image(encoded(Image.new("L", (4000, 2000)))).size == (1024, 512)


def test_photograph_of_a_turned_phone_is_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image = Image.new("RGB", (40, 20), (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, 20, 20))
    upright = read_image(encoded(image, "JPEG", exif=exif, quality=95))
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 5))[0] > 200 and upright.getpixel((10, 35))[2] > 200


@pytest.mark.parametrize("name", ("drop", "merge"))
def test_every_position_of_the_slider_is_a_schedule_of_that_reduction(classifiers, name):
    classifier = classifiers[name]
    config = TntViTConfig(**TINY, token_reduction=name)
    full = count_gflops(config, as_executed=True)
    assert len(classifier.schedules) > 8
    for reduction, schedule in classifier.schedules.items():
        config.set_schedule(**schedule.settings)
        assert 1 <= full / count_gflops(config, as_executed=True) / reduction <= 1 / 0.99
    assert classifier.nearest(1e9) == max(classifier.schedules)


@pytest.mark.parametrize("name", ("drop", "merge"))
def test_pictures_and_answers_are_those_of_the_model(classifiers, folders, name):
    classifier, image = classifiers[name], noise(60, 40)
    view, looks = classifier.look(image, [1, 2.25])
    full, pruned = looks[1], looks[2.25]
    assert view.width / view.height == pytest.approx(1.5, rel=0.01)
    model = TntViTForImageClassification.from_pretrained(folders / name).eval()
    pixel_values = classifier.image_processor(image, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        unpruned = model(pixel_values).logits[0].softmax(-1).tolist()
        model.set_schedule(**classifier.schedules[2.25].settings)
        outputs = model(pixel_values)
    assert full.probabilities == pytest.approx(unpruned, abs=1e-6) and not full.kept
    assert pruned.probabilities == pytest.approx(outputs.logits[0].softmax(-1).tolist(), abs=1e-6)
    assert [kept.layer for kept in pruned.kept] == model.config.prune_layers
    _, layers = trace_tokens(model, pixel_values)
    for kept, layer, (indices,) in zip(pruned.kept, layers, outputs.kept_indices, strict=True):
        assert kept.num_tokens == len(indices)
        if name == "drop":
            assert np.array_equal(kept.picture, dim_dropped(view, indices, (8, 8)))
        else:
            assert np.array_equal(kept.picture, draw_merged(view, layer.groups[0], (8, 8)))
    assert full.batch_milliseconds > 0 and pruned.milliseconds > 0
    executed = [count_gflops(config, as_executed=True) for config in (TntViTConfig(**TINY), model.config)]
    assert [full.gflops, pruned.gflops] == executed
    assert full.gflops / pruned.gflops == pytest.approx(2.25, rel=0.01)


def test_a_plain_checkpoint_is_not_pruned_by_random_relevance(classifiers):
    classifier = classifiers["plain"]
    for head in classifier.model.base_model.alpha_heads:
        head.register_forward_hook(lambda *_: pytest.fail("a score was asked for"))
    assert classifier.model.config.token_reduction == "cluster" and len(classifier.schedules) > 8
    (look,) = classifier.look(noise(60, 40), [2])[1].values()
    assert [kept.layer for kept in look.kept] == [0, 1, 2, 3]
    assert {name: classifiers[name].model.config.token_reduction for name in ("drop", "merge")} == {
        "drop": "drop",
        "merge": "merge",
    }


def test_visitors_at_once_get_the_answers_of_their_own_budgets(classifiers):
    classifier, image = classifiers["drop"], noise(32, 32)
    reductions = (1, 1.5, 2.25, 3)

    def ask(reduction):
        look = classifier.look(image, [reduction])[1][reduction]
        return look.gflops, look.probabilities, [kept.picture.tobytes().hex() for kept in look.kept]

    alone = [ask(reduction) for reduction in reductions]
    assert len({json.dumps(answer) for answer in alone}) == 4
    barrier = threading.Barrier(4)

    def ask_at_once(reduction):
        barrier.wait()
        return [ask(reduction) for _ in range(5)]

    with ThreadPoolExecutor(4) as visitors:
        for answers, expected in zip(visitors.map(ask_at_once, reductions), alone):
            assert all(answer == expected for answer in answers)


def test_smaller_images_and_token_merging_stand_beside_the_same_budget(classifiers):
    classifier, image = classifiers["drop"], noise(32, 32)
    view, looks = classifier.compare(image, [1, 1.75, 3])
    methods = ["", SMALLER_IMAGE, TOKEN_MERGING]
    assert list(looks) == [(1, ""), *((reduction, method) for reduction in (1.75, 3) for method in methods)]
    model, full = classifier.model, looks[1, ""].gflops
    pixel_values = classifier.image_processor(image, return_tensors="pt")["pixel_values"]
    for (reduction, method), look in looks.items():
        assert look.gflops <= full / reduction * 1.01
        if method == SMALLER_IMAGE:
            assert look.size < (32, 32) and look.size[0] % 4 == 0 and not look.kept
            larger = Schedule("", (), (), 0, (look.size[0] + 4, look.size[1] + 4))
            assert look.gflops <= full / reduction < count_gflops(model.config, schedule=larger, as_executed=True)
            schedule = Schedule("", (), (), 0, look.size)
            with torch.inference_mode():
                logits = model(pixel_values, schedule=schedule).logits
            assert look.probabilities == pytest.approx(logits[0].softmax(dim=-1).tolist(), abs=1e-6)
    html = comparison_table(classifier, view, looks)
    for (_, method), look in looks.items():
        if method == SMALLER_IMAGE:
            assert f"The image at {look.size[1]}x{look.size[0]} pixels" in html
    assert html.count("<tr>") == 1 + len(looks) and html.count("Token Merging<br>") == 2


def test_class_names_are_text_and_not_markup(classifiers, monkeypatch):
    classifier = classifiers["drop"]
    names = dict.fromkeys(range(7), "<img src=x onerror=alert(1)>")
    monkeypatch.setattr(classifier.model.config, "id2label", names)
    page = look_page(classifier, *classifier.look(noise(32, 32), [1, 2]), 2)
    for html in (page, comparison_table(classifier, *classifier.compare(noise(32, 32), [1, 2]))):
        assert "<img src=x" not in html and "&lt;img src=x" in html
        assert html.count("<img ") == html.count('alt="')


def test_page_says_when_it_shows_another_budget_than_the_chosen_one(tmp_path):
    coarse = ViTForImageClassification(ViTConfig(**{**TINY, "patch_size": 16}))
    coarse.save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    classifier = Classifier(tmp_path)
    assert 4 not in classifier.schedules
    nearest = f"{classifier.nearest(4):g}"
    for budget, words in ((4, f"has no budget 4: shown is the nearest, {nearest}."), (classifier.nearest(4), "")):
        html = look_page(classifier, *classifier.look(noise(32, 32), [1, budget]), budget)
        assert f"Cost at budget {nearest}" in html and words in html and ("shown is" in html) == bool(words)


def test_long_class_names_are_abbreviated_where_they_differ_last(classifiers, monkeypatch):
    classifier = classifiers["drop"]
    monkeypatch.setattr(classifier.model.config, "id2label", {label: f"{label}{'x' * 60}" for label in range(7)})
    html = look_page(classifier, *classifier.look(noise(32, 32), [1, 2]), 2)
    assert len(set(re.findall(r"(\d)x{30,40}\.\.\.</th>", html))) >= 5


def test_examples_are_of_what_the_models_know_and_the_same_at_every_start():
    clothes, dogs = ["Ankle boot", "Trouser", "Shirt", "Sandal", "Bag"], ["beagle", "Shirt"]
    first, second = bundled_examples([clothes, dogs]), bundled_examples([dogs, clothes])
    assert [*first][:4] == ["Ankle boot", "Trouser", "Shirt", "Sandal"]
    assert [*second][:4] == ["Astronaut", "Cat", "Coffee", "Rocket"]
    assert len(first) == 12 and {image.mode for image in first.values()} == {"RGB"}
    assert all(np.array_equal(first[title], second[title]) for title in first)
    assert [*bundled_examples([clothes])] == [*first][:8] and [*bundled_examples([dogs])] == [*first][8:]


@contextmanager
def serving(classifier, folder):
    """A client of a page whose uploads and pictures lie in a folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        page = build_page({"drop": classifier}, {"Noise": noise(32, 32)})
        _, url, _ = launch(page, prevent_thread_lock=True, quiet=True)
        with httpx.Client(base_url=url, timeout=60) as client:
            yield client
        page.close()


@pytest.fixture(scope="module")
def served(classifiers, tmp_path_factory):
    with serving(classifiers["drop"], tmp_path_factory.mktemp("stored")) as client:
        yield client


def ask_page(client, function, data):
    """What the page answers to a request as its own script sends it."""
    dependencies = client.get("/config").json()["dependencies"]
    (index,) = (each["id"] for each in dependencies if each["api_name"] == function)
    body = {"data": data, "fn_index": index, "session_hash": "test"}
    headers = {"content-type": "application/json"}  # httpx would not send NaN
    client.post("/gradio_api/queue/join", content=json.dumps(body), headers=headers).raise_for_status()
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": "test"}) as events:
        for line in events.iter_lines():
            if line.startswith("data:") and json.loads(line[5:])["msg"] == "process_completed":
                return json.loads(line[5:])


def upload(client, name, data):
    (path,) = client.post("/gradio_api/upload", files={"files": (name, data)}).raise_for_status().json()
    return {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}


def test_an_upload_is_answered_and_a_bad_one_explained(served):
    good = ask_page(served, "look_at_upload", [upload(served, "photo.png", encoded(noise(50, 40))), "drop", 2])
    picture, _, html, _ = good["output"]["data"]
    assert picture["path"] and "GFLOPs" in html
    again = ask_page(served, "look_again", [picture, "drop", 3])
    assert "GFLOPs" in again["output"]["data"][0] and again["output"]["data"][0] != html
    for name, data, words in (
        ("notes.png", b"plain text", "not an image"),
        ("huge.png", two_hundred_megapixels(), "large"),
    ):
        refused = ask_page(served, "look_at_upload", [upload(served, name, data), "drop", 2])
        assert refused["success"] and refused["output"]["data"][0] is None and words in refused["output"]["data"][1]


@pytest.mark.parametrize("budget", (None, "two", [2], {"value": 2}, 0.5, 5, math.nan, math.inf))
def test_a_budget_that_is_none_is_refused_in_words(served, budget):
    answer = ask_page(served, "look_again", [upload(served, "photo.png", encoded(noise(50, 40))), "drop", budget])
    assert not answer["success"] and "from 1 to 4" in answer["output"]["error"]


@pytest.mark.parametrize("model", (None, "merge", "/etc", ["drop"], {"name": "drop"}, 3))
def test_a_model_that_is_none_is_refused_in_words(served, model):
    answer = ask_page(served, "look_again", [upload(served, "photo.png", encoded(noise(50, 40))), model, 2])
    assert answer["success"] and "must be one of drop" in answer["output"]["data"][0]


@pytest.mark.parametrize(("most_bytes", "most_files"), ((100_000, 1000), (10**9, 5)))
def test_what_visitors_send_takes_bounded_room(classifiers, tmp_path, monkeypatch, most_bytes, most_files):
    def stored():
        return [path for path in tmp_path.rglob("*") if path.is_file()]

    monkeypatch.setattr("tnt_hf.app.page.MAX_STORED_BYTES", most_bytes)
    monkeypatch.setattr("tnt_hf.app.page.MAX_STORED_FILES", most_files)
    with serving(classifiers["drop"], tmp_path) as client:
        own = stored()
        first = upload(client, "photo.png", encoded(noise(50, 40)))
        assert ask_page(client, "look_again", [first, "drop", 2])["success"]
        for index in range(20):
            upload(client, "junk.png", index.to_bytes(1, "big") * 20_000)
            sent = set(stored()) - set(own)
            assert len(sent) <= most_files + 1 and sum(path.stat().st_size for path in sent) <= most_bytes + 20_000
        assert own and set(own) <= set(stored())
        assert len(list(tmp_path.iterdir())) <= len(own) + most_files + 1
        assert "choose it again" in ask_page(client, "look_again", [first, "drop", 2])["output"]["error"]
        last = upload(client, "photo.png", encoded(noise(50, 40, seed=1)))
        assert "GFLOPs" in ask_page(client, "look_again", [last, "drop", 2])["output"]["data"][0]


def test_no_request_makes_the_page_read_a_file_that_was_not_uploaded(served, tmp_path):
    secret = tmp_path / "secret.png"
    noise(20, 20).save(secret)
    meta = {"meta": {"_type": "gradio.FileData"}}
    inside = upload(served, "own.png", encoded(noise(20, 20)))["path"]
    payloads = [
        {"path": str(secret), **meta},
        {"path": str(secret)},
        {"path": f"{inside}/../../../../../../{secret}"},
        {"path": str(secret), "url": "data:image/png;base64,AAAA"},
        {"url": f"file://{secret}", **meta},
        {"path": f"file://{secret}", **meta},
        str(secret),
        [str(secret)],
        {"path": "x" * 5000},
        {"path": "\0"},
    ]
    for payload in payloads:
        for function in ("look_at_upload", "look_again"):
            answer = ask_page(served, function, [payload, "drop", 2])
            assert not answer["success"], payload
            assert not re.search(r"Traceback|site-packages", json.dumps(answer))
    for path in (secret, ROOT / "app" / "app.py", "/etc/passwd", tmp_path, "x" * 5000, "%00"):
        assert served.get(f"/gradio_api/file={path}").status_code == 403


@pytest.fixture
def fetched(monkeypatch):
    """Addresses that Gradio would fetch; without this it refuses those of this machine by itself."""
    addresses = []

    async def fetch(url, *arguments, **fields):
        addresses.append(url)
        raise ConnectionError("no network in tests")

    monkeypatch.setattr("gradio.processing_utils.async_ssrf_protected_download", fetch)
    monkeypatch.setattr("gradio.routes.secure_url_stream_response", fetch)
    return addresses


def test_no_request_makes_the_page_fetch_an_address(served, fetched):
    address = "http://example.com/a.png"
    good = [upload(served, "photo.png", encoded(noise(50, 40))), "drop", 2]
    for function, position in (("look_at_upload", 0), *(("look_again", index) for index in range(3)), ("compare", 1)):
        for payload in ({"path": address, "meta": {"_type": "gradio.FileData"}}, {"path": address}, address):
            data = [payload if index == position else value for index, value in enumerate(good)]
            answer = ask_page(served, function, data[:2] if function == "compare" else data)
            assert not answer["success"] or "must be one of drop" in answer["output"]["data"][0]
    for path in ("file=", "file/", "proxy=", "file=https://x/file="):
        assert served.get(f"/gradio_api/{path}{address}").status_code == 403
    assert fetched == []


def test_what_the_page_has_no_use_for_is_off(served):
    assert served.get("/gradio_api/deep_link", params={"session_hash": "test"}).status_code == 403
    assert served.post("/gradio_api/process_recording").status_code == 403
    for way in ("run", "api", "call", "call/v2"):  # past the queue, or without its order
        assert served.post(f"/gradio_api/{way}/look_again", json={"data": []}).status_code == 403


def test_a_request_is_not_longer_than_an_upload(served):
    files = [("files", (f"{index}.png", bytes(MAX_BYTES // 2))) for index in range(3)]
    assert served.post("/gradio_api/upload", files=files).status_code == 413


def test_what_is_left_of_a_refused_upload_goes_when_it_is_old(served, tmp_path_factory):
    folder = Path(upload(served, "a.png", b"a")["path"]).parents[1]
    test_a_request_is_not_longer_than_an_upload(served)
    (left, *_) = [path for path in folder.iterdir() if path.is_file()]
    os.utime(left, (0, time.time() - STORED_SECONDS - 1))
    upload(served, "b.png", b"b")
    assert not left.exists()


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    hub = HubStandIn()
    monkeypatch.setattr("tnt_hf.app.hub_models.HfApi", partial(HfApi, endpoint=hub.url))
    load_hub_model.cache_clear()
    yield hub
    hub.close()


def publish(hub, folder, repo_id):
    api = HfApi(endpoint=hub.url, token="secret")
    api.create_repo(repo_id)
    api.upload_folder(repo_id=repo_id, folder_path=folder)


def test_a_model_of_the_hub_is_loaded_without_its_code(hub, folders, tmp_path):
    ran = tmp_path / "ran"
    code = f"from pathlib import Path\nPath({str(ran)!r}).touch()\n"
    folder = tmp_path / "model"
    shutil.copytree(folders / "drop", folder)
    for name in ("modeling_tnt.py", "configuration_tnt.py", "schedules_tnt.py", "token_reduction_tnt.py"):
        (folder / name).write_text(code + Path(ROOT / "tnt_hf" / name).read_text())
    publish(hub, folder, "org/model")
    hub.requests.clear()
    classifier = load_hub_model("org/model")
    assert classifier.look(noise(32, 32), [3])[1][3].kept
    assert not ran.exists() and not any(path.endswith(".py") for _, path in hub.requests)


@pytest.mark.parametrize("model_id", ("../etc", "/etc/passwd", "folder", "org/model/config.json", "file:///etc"))
def test_what_is_no_id_of_the_hub_is_refused(model_id):
    with pytest.raises(RefusedInput, match="owner/name"):
        load_hub_model(model_id)


def test_a_folder_of_the_server_is_no_model_of_the_hub(hub, folders, monkeypatch):
    monkeypatch.chdir(folders.parent)
    with pytest.raises(RefusedInput, match="public model"):
        load_hub_model(f"{folders.name}/drop")


def test_pickled_weights_and_other_architectures_are_refused(hub, folders, tmp_path):
    for name, change, words in (
        ("pickled", None, "safetensors"),
        ("bert", "bert", "ViT"),
    ):
        folder = tmp_path / name
        shutil.copytree(folders / "plain", folder)
        if change:
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, "model_type": change}))
        else:
            (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        publish(hub, folder, f"org/{name}")
        with pytest.raises(RefusedInput, match=words):
            load_hub_model(f"org/{name}")


def test_weights_in_subfolders_count_too(hub, folders, tmp_path, monkeypatch):
    monkeypatch.setitem(MAX_BYTES_OF_MODELS, "*.safetensors", 1_000_000)
    folder = tmp_path / "nested"
    shutil.copytree(folders / "drop", folder)
    (folder / "more").mkdir()
    (folder / "more" / "weights.safetensors").write_bytes(bytes(10**6))
    publish(hub, folder, "org/nested")
    with pytest.raises(RefusedInput, match=naming("safetensors", "1 MB")):
        load_hub_model("org/nested")


@pytest.mark.parametrize(
    ("fields", "named"),
    (
        ({"hidden_size": 10**6}, "`hidden_size`"),
        ({"num_hidden_layers": 100}, "`num_hidden_layers`"),
        ({"image_size": [512, 10**6]}, "`image_size`"),
        ({"image_size": 512, "patch_size": 2}, "patches"),
        ({"patch_size": 0}, "`patch_size`"),
        ({"num_labels": 10**9}, "`num_labels`"),
        ({"num_labels": 10**9, "id2label": {"0": "a"}}, "`num_labels`"),
        ({"id2label": dict.fromkeys(range(30_000), "a")}, "`num_labels`"),
        ({"intermediate_size": "4096"}, "`intermediate_size`"),
        ({"model_type": "dinov2"}, "DINOv2"),
    ),
)
def test_a_config_that_would_need_much_memory_is_refused(fields, named):
    check_fields({"image_size": 224, "patch_size": 16})
    with pytest.raises(RefusedInput, match=named):
        check_fields(fields)


def test_an_image_processor_that_makes_huge_images_is_refused():
    check_processor(evaluation_image_processor((512, 512)).to_dict())
    for size in ({"height": 10**5, "width": 10**5}, {"shortest_edge": 10**5}, 10**5):
        with pytest.raises(RefusedInput, match=naming("`size`", 1024)):
            check_processor({"size": size})
    for settings in ({"do_pad": True, "pad_size": {"height": 5000, "width": 5000}}, {"size_divisor": 5000}):
        with pytest.raises(RefusedInput, match=f"`{next(iter(settings))}`"):
            check_processor(settings)
    with pytest.raises(RefusedInput, match=naming("ViT, DeiT, Bit, CLIP", "Mask2Former")):
        check_processor({"image_processor_type": "Mask2FormerImageProcessorFast"})


@pytest.mark.parametrize(
    "settings",
    (
        {"size": 32},
        {"feature_extractor_type": "ViTFeatureExtractor", "size": 32},
        {"image_processor_type": "DeiTImageProcessor", "size": {"height": 40, "width": 40}, "crop_size": 32},
        {"image_processor_type": "BitImageProcessorFast", "size": {"shortest_edge": 40}, "crop_size": 32},
        {"image_processor_type": "ViTImageProcessor", "size": 32, "do_pad": None, "pad_size": None},
    ),
)
def test_image_processors_of_the_checkpoints_that_people_use_are_accepted(hub, folders, tmp_path, settings):
    folder = tmp_path / "model"
    shutil.copytree(folders / "plain", folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    publish(hub, folder, "org/model")
    classifier = load_hub_model("org/model")
    expected = settings.get("image_processor_type", "ViT").replace("ImageProcessor", "").replace("Fast", "")
    assert type(classifier.image_processor).__name__.startswith(expected)
    assert input_size(classifier.image_processor) == (32, 32)


def test_a_model_of_other_than_colour_images_is_refused():
    with pytest.raises(RefusedInput, match="channels"):
        check_fields({"num_channels": 1})


def test_what_is_read_of_the_hub_is_what_was_looked_at(hub, folders, monkeypatch):
    publish(hub, folders / "drop", "org/swapped")

    def look_and_swap(api, *arguments, **fields):
        entries = list(HfApi.list_repo_tree(api, *arguments, **fields))
        HfApi(endpoint=hub.url, token="secret").upload_file(
            repo_id="org/swapped", path_in_repo="config.json", path_or_fileobj=b"{}"
        )
        return entries

    monkeypatch.setattr(
        "tnt_hf.app.hub_models.HfApi",
        partial(type("Swapped", (HfApi,), {"list_repo_tree": look_and_swap}), endpoint=hub.url),
    )
    assert load_hub_model("org/swapped").model.config.num_labels == 7


def test_metadata_of_the_space_is_complete_and_its_packages_are_those_of_the_extra():
    metadata = SpaceCard.load(ROOT / "app" / "README.md").data.to_dict()
    assert metadata["sdk"] == "gradio" and (ROOT / "app" / metadata["app_file"]).is_file()
    assert len(metadata["short_description"]) <= 60
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = project["optional-dependencies"]["app"]
    (gradio,) = (requirement for requirement in extra if requirement.startswith("gradio"))
    assert re.search(r"gradio>=(\d+)", gradio)[1] == metadata["sdk_version"].split(".")[0]
    required = (ROOT / "app" / "requirements.txt").read_text().split()
    assert sorted(required) == sorted([*extra, *project["dependencies"]])


def test_a_space_shows_the_models_beside_it_under_the_flags_of_its_variable(tmp_path, monkeypatch):
    shutil.copy(ROOT / "app" / "app.py", tmp_path)
    for name in ("small", "base"):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "config.json").touch()
    started = []
    monkeypatch.setattr("tnt_hf.commands.run_command", lambda name: started.append([name, *sys.argv[1:]]))
    monkeypatch.setenv("TNT_APP_FLAGS", "--allow_hub_ids true")
    monkeypatch.setattr(sys, "argv", ["app.py", "--port", "7861"])
    runpy.run_path(str(tmp_path / "app.py"), run_name="__main__")
    models = ["--model_name_or_path", *(str(tmp_path / "models" / name) for name in ("base", "small"))]
    assert started == [["app", *models, "--allow_hub_ids", "true", "--port", "7861"]]


@pytest.mark.parametrize(
    ("files", "named"), (((), ["config.json"]), (("config.json", "model.onnx"), ["safetensors", "exported"]))
)
def test_folder_of_no_model_is_refused_in_one_line(folders, tmp_path, monkeypatch, files, named):
    for name in files:
        (tmp_path / name).write_bytes((folders / "plain" / "config.json").read_bytes())
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # which the command sets
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["app", "--model_name_or_path", str(folders / "plain"), str(tmp_path)])
    with pytest.raises(SystemExit, match=naming("--model_name_or_path", tmp_path, *named)) as raised:
        app_command.main()
    assert "\n" not in str(raised.value)


def refusal_of_port(monkeypatch, port):
    monkeypatch.setattr(sys, "argv", ["tnt-hf app", "--port", str(port)])
    with pytest.raises(SystemExit) as exit_info:
        app_command.main()
    return exit_info.value.code


@pytest.mark.parametrize("port", (-1, 0, 65536, 99999))
def test_a_port_that_is_none_is_refused_before_anything_starts(monkeypatch, port):
    assert refusal_of_port(monkeypatch, port) == f"Error: --port must be from 1 to 65535, got {port}."


def test_a_port_that_is_taken_is_refused_before_anything_starts(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        expected = f"Error: Port {port} is taken: pass another --port, or none for the first free one."
        assert refusal_of_port(monkeypatch, port) == expected


def test_all_that_the_command_prints_is_the_address(folders, monkeypatch, capsys):
    def visit_and_end(page):
        httpx.get(page.local_url, timeout=60).raise_for_status()
        page.close(verbose=False)

    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # the command sets it, and handlers of signals
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(gr.Blocks, "block_thread", visit_and_end)
    monkeypatch.setattr(sys, "argv", ["tnt-hf app", "--model_name_or_path", str(folders / "drop")])
    app_command.main()
    assert re.fullmatch(r"The page is at http://127\.0\.0\.1:\d+/\n", capsys.readouterr().out)


def test_page_needs_none_of_the_other_packages_of_a_training():
    """A Space installs app/requirements.txt alone."""
    absent = ("accelerate", "evaluate", "timm", "torchvision")
    code = f"import sys; sys.modules |= dict.fromkeys({absent}); import tnt_hf.commands.app"
    outcome = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
