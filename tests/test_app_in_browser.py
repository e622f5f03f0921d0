"""
The page of `tnt-hf app` as a visitor sees it: in Chromium, on a phone and a desktop, with a pointer and by keyboard.

`make test-browser` runs it. Screenshots are left in runs/browser, or in the folder that TNT_ARTEFACTS names.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil


sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect

ROOT = Path(__file__).parents[1]
ARTEFACTS = Path(os.environ.get("TNT_ARTEFACTS", ROOT / "runs" / "browser"))
SIZES = {"phone": {"width": 390, "height": 844}, "desktop": {"width": 1280, "height": 900}}

pytestmark = [pytest.mark.browser, pytest.mark.timeout(180)]


@pytest.fixture(scope="session")
def url(tmp_path_factory):
    """The page as one command starts it, with the two bundled backbones and a tiny model of random weights."""
    tiny = tmp_path_factory.mktemp("models") / "tiny"
    ViTForImageClassification(ViTConfig(**TINY)).save_pretrained(tiny)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tiny)
    models = [ROOT / "examples" / "backbone", ROOT / "examples" / "cluttered_backbone", tiny]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    stored = tmp_path_factory.mktemp("stored")
    command = [sys.executable, str(ROOT / "app" / "app.py"), "--port", str(port), "--model_name_or_path"]
    with (ARTEFACTS / "server.log").open("w") as log:
        server = subprocess.Popen(
            [*command, *map(str, models)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(stored)},
        )
        try:
            address = f"http://127.0.0.1:{port}"
            for _ in range(600):
                assert server.poll() is None, (ARTEFACTS / "server.log").read_text()
                try:
                    urllib.request.urlopen(address).close()
                    break
                except OSError:
                    time.sleep(0.1)
            yield address
        finally:
            server.terminate()
            server.wait()
    assert "Traceback" not in (ARTEFACTS / "server.log").read_text()
    assert [path for path in stored.rglob("*") if path.is_file()] == []


@pytest.fixture(scope="session")
def browser():
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.fail("These tests need chromium on the PATH: apt-get install chromium")
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(params=SIZES)
def size(request):
    return request.param


@pytest.fixture
def open_page(browser, url):
    """
    Opens the page for one more visitor; requests that leave the machine or are refused, and errors of scripts, fail
    the test.
    """
    contexts, strangers, errors = [], [], []

    def open_for_visitor(size="desktop"):
        contexts.append(browser.new_context(viewport=SIZES[size]))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("request", lambda request: strangers.append(request.url) if is_elsewhere(request.url) else None)
        page.on("response", lambda answer: errors.append(answer.url) if answer.status >= 400 else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        expect(page.locator(".figures img").first).to_be_visible(timeout=20_000)
        return page

    def is_elsewhere(address):
        return not address.startswith((url, "data:", "blob:"))

    yield open_for_visitor
    for context in contexts:
        context.close()
    assert strangers == [] and errors == []


@pytest.fixture
def page(open_page, size):
    return open_page(size)


def photograph(seed=0, size=(300, 200)):
    pixels = np.random.default_rng(seed).integers(256, size=(size[1] // 20, size[0] // 20, 3), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return {"name": "photo.jpg", "mimeType": "image/jpeg", "buffer": buffer.getvalue()}


def send(page, file):
    page.locator("input[type=file]").first.set_input_files(file)


def results(page):
    return page.locator(".results").first


def pictures(page):
    return page.locator(".figures img").evaluate_all("images => images.map(image => image.src)")


def numbers(page):
    return page.locator(".numbers dd").all_inner_texts()


def set_budget(page, value):
    """Choose a budget with the arrow keys, and wait for what belongs to it."""
    slider = page.get_by_role("slider")
    step = "ArrowRight" if value > float(slider.input_value()) else "ArrowLeft"
    while float(slider.input_value()) != value:
        slider.press(step)
    expect(page.get_by_role("heading", name=f"Cost at budget {value}", exact=True)).to_be_visible()


def keep_screenshot(page, name):
    page.screenshot(path=ARTEFACTS / f"{name}.png", full_page=True)


def test_an_upload_shows_its_kept_patches_and_the_slider_changes_them(page, size):
    example = pictures(page)
    send(page, photograph())
    expect(page.locator(".figures img").first).not_to_have_attribute("src", example[0])
    before, before_numbers = pictures(page), numbers(page)
    keep_screenshot(page, f"upload-{size}")
    set_budget(page, 3)
    after, after_numbers = pictures(page), numbers(page)
    keep_screenshot(page, f"budget-3-{size}")
    assert after[0] == before[0] and after[-1] != before[-1] and after_numbers[:2] != before_numbers[:2]
    assert float(re.match(r"[\d.]+", after_numbers[1])[0]) > 2.5
    width, height = page.locator(".figures img").first.evaluate("image => [image.naturalWidth, image.naturalHeight]")
    assert width / height == pytest.approx(1.5, rel=0.02)


def test_bad_uploads_are_explained_on_the_page(page, size):
    buffer = BytesIO()
    Image.new("1", (20_000, 10_000)).save(buffer, "PNG")
    for name, data, words in (
        ("notes.png", b"This is plain text.", "not an image that can be read"),
        ("huge.png", buffer.getvalue(), "at most 50 megapixels"),
    ):
        send(page, {"name": name, "mimeType": "image/png", "buffer": data})
        alert = page.get_by_role("alert")
        expect(alert).to_contain_text(words)
        expect(alert).to_be_in_viewport()
        expect(page.locator(".figures")).to_have_count(0)
        keep_screenshot(page, f"{name.removesuffix('.png')}-{size}")
    send(page, photograph())
    expect(page.locator(".figures img").first).to_be_visible()


def test_a_text_file_by_its_name_is_refused_by_the_page(open_page):
    page = open_page()
    page.get_by_label("Remove Image").click()
    expect(results(page)).to_contain_text("Choose an image")
    page.locator("input[type=file]").first.set_input_files(
        {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"This is plain text."}
    )
    expect(page.get_by_text(re.compile("file type|not an image", re.IGNORECASE)).first).to_be_visible()


def test_budgets_are_compared_on_the_same_image(page, size):
    page.get_by_role("tab", name="Compare budgets").click()
    page.get_by_role("button", name="Compare", exact=True).click()
    rows = page.locator(".comparison tbody tr")
    expect(rows).to_have_count(13)  # each budget but 1 with smaller images and Token Merging too
    names, gflops = zip(*(text.splitlines() for text in page.locator(".comparison tbody th").all_inner_texts()))
    assert list(names[:5]) == ["1", "1.5", "1.5, smaller image", "1.5, Token Merging", "2"]
    costs = {}
    for name, cost in zip(names, gflops):
        costs.setdefault(name.partition(", ")[2], []).append(float(cost.split()[0]))
    assert {method: len(each) for method, each in costs.items()} == {"": 5, "smaller image": 4, "Token Merging": 4}
    assert all(own == sorted(set(own), reverse=True) for own in costs.values())
    keep_screenshot(page, f"compare-{size}")
    assert fits(page)


def fits(page):
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_nothing_is_wider_than_the_screen(page, size):
    keep_screenshot(page, f"start-{size}")
    assert fits(page)
    cut = page.evaluate(
        """[...document.querySelectorAll('.gradio-container *')].filter(element => {
            const box = element.getBoundingClientRect();
            return box.width > 1 && box.height > 1 && element.checkVisibility({visibilityProperty: true}) &&
                (box.right > innerWidth + 1 || box.left < -1);
        }).map(element => element.outerHTML.slice(0, 200))"""
    )
    assert cut == []


def test_text_is_large_enough_to_read(page):
    sizes = page.evaluate(
        """[...document.querySelectorAll('.gradio-container *')].filter(element => element.checkVisibility() &&
            [...element.childNodes].some(node => node.nodeType == 3 && node.data.trim())
        ).map(element => [parseFloat(getComputedStyle(element).fontSize), element.innerText])"""
    )
    assert [text for pixels, text in sizes if pixels < 11] == []


def test_every_control_and_picture_has_a_name(page):
    assert page.locator("html").get_attribute("lang") == "en"
    for tab in ("One budget", "Compare budgets"):
        page.get_by_role("tab", name=tab).click()
        unnamed = page.evaluate(
            """[...document.querySelectorAll('input, select, textarea, button, a, [role=button], [role=tab]')].filter(
                element => element.checkVisibility({visibilityProperty: true}) && !(
                    element.getAttribute('aria-label') || element.getAttribute('title') || element.innerText?.trim() ||
                    [...(element.getAttribute('aria-labelledby') ?? '').split(' ')].some(
                        id => document.getElementById(id)?.innerText.trim()) ||
                    [...(element.labels ?? [])].some(label => label.innerText.trim()))
            ).map(element => element.outerHTML.slice(0, 300))"""
        )
        assert unnamed == []
    missing = page.evaluate(
        "[...document.images].filter(image => !image.hasAttribute('alt')).map(image => image.outerHTML.slice(0, 200))"
    )
    assert missing == []
    assert all(alt for alt in page.locator(".figures img").evaluate_all("images => images.map(image => image.alt)"))


def test_headings_are_in_order(open_page):
    page = open_page()
    levels = page.evaluate(
        "[...document.querySelectorAll('h1, h2, h3, h4, h5, h6')].filter(each => each.checkVisibility())"
        ".map(heading => Number(heading.tagName[1]))"
    )
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(later <= earlier + 1 for earlier, later in pairwise(levels))


def test_all_of_it_works_by_keyboard(open_page):
    page = open_page()
    focused = []
    for _ in range(40):
        page.keyboard.press("Tab")
        focused.append(
            page.evaluate("document.activeElement.getAttribute('aria-label') ?? document.activeElement.innerText")
        )
    joined = " | ".join(str(each) for each in focused)
    for name in ("Ankle boot", "Coat, cluttered", "Model", "One budget", "Compare", "slider|range|[Bb]udget"):
        assert re.search(name, joined), joined
    before = pictures(page)
    page.get_by_role("button", name="Trouser").focus()
    page.keyboard.press("Enter")
    expect(page.locator(".figures img").first).not_to_have_attribute("src", before[0])
    expect(page.locator(".answers tbody th").first).to_have_text("Trouser")
    set_budget(page, 4)
    assert page.locator(".numbers dd").nth(1).inner_text().startswith(("3.", "4."))


def choose_model(page, name):
    page.get_by_label("Model").click()
    page.get_by_role("option", name=name, exact=True).click()


def test_the_model_can_be_changed(open_page):
    page = open_page()
    page.get_by_role("button", name="Bag, cluttered").click()
    expect(page.locator(".answers tbody th").first).not_to_have_text("Ankle boot")
    answers = page.locator(".answers").inner_text()
    choose_model(page, "cluttered_backbone")
    expect(page.locator(".answers")).not_to_have_text(answers, use_inner_text=True)
    expect(page.locator(".answers tbody th").first).to_have_text("Bag")


def test_two_visitors_at_once_see_their_own_images(open_page):
    pages = [open_page(), open_page()]
    shown = []
    examples = [pictures(page)[0] for page in pages]
    for seed, page in enumerate(pages):
        send(page, photograph(seed))
    for page, example, value in zip(pages, examples, (4, 1.5)):
        expect(page.locator(".figures img").first).not_to_have_attribute("src", example)
        set_budget(page, value)
    for page, lowest in zip(pages, (3.8, 1.4)):
        assert lowest < float(re.match(r"[\d.]+", numbers(page)[1])[0]) < lowest + 0.8
        shown.append(pictures(page)[0])
    assert shown[0] != shown[1]


def test_fifty_requests_in_a_row_are_answered(open_page):
    page = open_page()
    choose_model(page, "tiny")
    expect(page.locator(".figures figcaption").first).to_have_text("All 64 patches")
    titles = ("Trouser", "Ankle boot")
    for number in range(50):
        before = pictures(page)[0]
        page.get_by_role("button", name=titles[number % 2]).click()
        # unlike `expect`, this looks at every frame
        page.wait_for_function("before => document.querySelector('.figures img').src != before", arg=before)
