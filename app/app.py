"""
A page on which token pruning can be tried: an image, a budget, the patches that are kept, the answer, the time.

    python app/app.py
    python app/app.py --model_name_or_path runs/demo runs/deit-small --port 7861

Without a model it takes those in the folder `models` beside this file, or else the two bundled backbones. Where flags
cannot be given, as in a Space, they are read from the variable TNT_APP_FLAGS.
"""

import os
import shlex
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial, wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import shorten
from typing import Any

from tnt_hf.command_line import clear_errors, needing_extra, parse_recipe_and_flags


with needing_extra("app"):
    import gradio as gr
    from example_images import bundled_examples
    from gradio.components import Component
    from gradio.data_classes import ImageData
    from hub_models import load_hub_model
    from looking import REDUCTIONS, Classifier
    from PIL import Image as PILImage
    from rendering import comparison_table, look_page, message
    from request_limits import RequestLimits, is_stored
    from starlette.middleware import Middleware
    from uploads import MAX_BYTES, RefusedInput, read_image

    from tnt_hf.examples import EXAMPLES_DIR


HERE = Path(__file__).parent
COMPARED_REDUCTIONS = (1, 1.5, 2, 3, 4)
# What visitors leave on the disk is deleted when it is this old, or earlier where it is more than this.
STORED_SECONDS = 3600
MAX_STORED_BYTES, MAX_STORED_FILES = 2**30, 2000
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
CHOOSE_IMAGE = message("Choose an image.")
THEME = gr.themes.Default(
    primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
).set(
    body_text_color_subdued="*neutral_600",
    block_label_text_color="*neutral_700",
    block_title_text_color="*neutral_700",
    block_info_text_color="*neutral_600",
)


@dataclass
class AppArguments:
    """What the operator chooses."""

    model_name_or_path: list[str] = field(
        default_factory=list, metadata={"help": "Folders of the models that visitors choose from."}
    )
    host: str | None = field(
        default=None,
        metadata={"help": "Address to listen at, 0.0.0.0 for every one; this machine alone if not given."},
    )
    port: int | None = field(default=None, metadata={"help": "Port; the first free one from 7860 on if not given."})
    allow_hub_ids: bool = field(
        default=False,
        metadata={"help": "Let visitors name any public ViT or distilled DeiT of the Hub; its code is never run."},
    )


def check_uploaded(component: Component, path: str | Path | None) -> None:
    if not is_stored(path or "", component.GRADIO_CACHE):
        raise gr.Error(
            "This image was not uploaded, or it was deleted meanwhile: choose it again.", print_exception=False
        )


async def take_upload(component: Component, url_or_file_path: str | Path | None) -> str | None:
    """
    Of an input component, how it takes files: what was not uploaded is refused.

    A request may name any path or address in the place of any input. Gradio checks those that it takes for files, and
    fetches addresses.
    """
    check_uploaded(component, url_or_file_path)
    return await Component.async_move_resource_to_block_cache(component, url_or_file_path)


class ImageUpload(gr.Image):
    """An image component that hands on the bytes of the uploaded file."""

    is_template = True  # drawn as gr.Image
    async_move_resource_to_block_cache = take_upload

    def preprocess(self, payload: ImageData | None) -> bytes | None:
        if payload is None:
            return None
        check_uploaded(self, payload.path)
        return Path(payload.path).read_bytes()


class ModelChoice(gr.Dropdown):
    """A dropdown of which [`build_page`] checks the choice."""

    is_template = True  # drawn as gr.Dropdown
    async_move_resource_to_block_cache = take_upload

    def preprocess(self, payload: Any) -> Any:
        return payload


class Budget(gr.Slider):
    """A slider that says in words what it takes: a request may send what no slider does."""

    is_template = True  # drawn as gr.Slider
    async_move_resource_to_block_cache = take_upload

    def preprocess(self, payload: Any) -> float:
        if not isinstance(payload, int | float) or not self.minimum <= payload <= self.maximum:
            raise gr.Error(
                f"The budget must be a number from {self.minimum:g} to {self.maximum:g}, got "
                f"{shorten(repr(payload), 40)}.",
                print_exception=False,
            )
        return payload


def build_page(
    classifiers: dict[str, Classifier], examples: dict[str, PILImage.Image], allow_hub_ids: bool = False
) -> gr.Blocks:
    """The page for models by name and example images by title."""

    def classifier_for(name: str) -> Classifier:
        if not isinstance(name, str) or not (name in classifiers or allow_hub_ids):
            raise RefusedInput(f"The model must be one of {', '.join(classifiers)}, got {shorten(repr(name), 40)}.")
        return classifiers[name] if name in classifiers else load_hub_model(name.strip())

    @refusing
    def look(image: PILImage.Image, name: str, reduction: float) -> str:
        classifier = classifier_for(name)
        return look_page(classifier, *classifier.look(image, [1, reduction]), reduction)

    @refusing
    def look_again(upload: bytes | None, name: str, reduction: float) -> str:
        return CHOOSE_IMAGE if upload is None else look(read_image(upload), name, reduction)

    def look_at_upload(upload: bytes, name: str, reduction: float) -> tuple[PILImage.Image | None, str, str, str]:
        try:
            image = read_image(upload)
        except RefusedInput as refusal:
            return None, message(str(refusal), is_refusal=True), "", ""
        return image, "", look(image, name, reduction), ""

    def look_at_example(title: str, name: str, reduction: float) -> tuple[PILImage.Image, str, str, str]:
        return examples[title], "", look(examples[title], name, reduction), ""

    @refusing
    def compare(upload: bytes | None, name: str) -> str:
        if upload is None:
            return CHOOSE_IMAGE
        classifier = classifier_for(name)
        return comparison_table(classifier, *classifier.look(read_image(upload), COMPARED_REDUCTIONS))

    with gr.Blocks(
        title="Token pruning, seen", analytics_enabled=False, delete_cache=(STORED_SECONDS // 6, STORED_SECONDS)
    ) as page:
        gr.Markdown(
            "# What token pruning keeps\n"
            "A vision transformer that drops or merges image patches on its way computes less. Choose an image and a "
            "budget, and see which patches are left, what becomes of the answer, and how long it takes."
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                upload = ImageUpload(
                    label="Image",
                    sources=["upload", "clipboard"],
                    buttons=[],
                    format="png",
                    height=260,
                    elem_classes="upload",
                    alt_text="The chosen image",
                    placeholder="Drop an image here, or select one",
                )
                refusal = gr.HTML(elem_classes="refusal")
                gr.Markdown("Or one of these:")
                with gr.Row(elem_classes="examples"), TemporaryDirectory() as folder:
                    buttons = {
                        title: _example_button(title, image, Path(folder) / f"{index}.png")
                        for index, (title, image) in enumerate(examples.items())
                    }
                name = ModelChoice(
                    list(classifiers),
                    label="Model",
                    info="One of these, or the id of a ViT or distilled DeiT on the Hub." if allow_hub_ids else None,
                    allow_custom_value=allow_hub_ids,
                    filterable=allow_hub_ids,
                )
            with gr.Column(scale=2, min_width=300), gr.Tabs():
                with gr.Tab("One budget"):
                    reduction = Budget(
                        REDUCTIONS[0],
                        REDUCTIONS[-1],
                        2,
                        step=REDUCTIONS[1] - REDUCTIONS[0],
                        label="Budget: how many times less compute",
                        info="1 is the unpruned model, at 2 it executes half of its multiply-accumulates.",
                        buttons=[],
                    )
                    result = gr.HTML(elem_classes="results")
                with gr.Tab("Compare budgets"):
                    start = gr.Button("Compare", variant="primary")
                    comparison = gr.HTML(elem_classes="results")

        settings, outputs = [name, reduction], [upload, refusal, result, comparison]
        upload.upload(look_at_upload, [upload, *settings], outputs, **ONE_AT_A_TIME)
        for title, button in buttons.items():
            button.click(partial(look_at_example, title), settings, outputs, **ONE_AT_A_TIME)
        page.load(partial(look_at_example, next(iter(examples))), settings, outputs, **ONE_AT_A_TIME)
        gr.on(
            [name.change, reduction.change],
            look_again,
            [upload, *settings],
            result,
            trigger_mode="always_last",
            show_progress="minimal",
            **ONE_AT_A_TIME,
        )
        name.change(lambda: "", None, comparison, api_visibility="private")
        upload.clear(lambda: ("", CHOOSE_IMAGE, ""), None, [refusal, result, comparison], api_visibility="private")
        start.click(compare, [upload, name], comparison, **ONE_AT_A_TIME)
    return page


def refusing(function: Callable[..., str]) -> Callable[..., str]:
    """The function, with a refusal shown where its result would be."""

    @wraps(function)
    def answer(*arguments: Any) -> str:
        try:
            return function(*arguments)
        except RefusedInput as refusal:
            return message(str(refusal), is_refusal=True)

    return answer


def _example_button(title: str, image: PILImage.Image, path: Path) -> gr.Button:
    image.save(path)
    button = gr.Button(title, icon=path, size="sm", min_width=60)
    button.keep_in_cache.add(button.icon["path"])
    return button


def launch(page: gr.Blocks, **kwargs: Any) -> tuple[Any, str, str]:
    """Serve a page to visitors who are not trusted; `kwargs` are for Gradio's `launch`."""
    limits = Middleware(
        RequestLimits,
        folder=page.GRADIO_CACHE,
        max_bytes=MAX_BYTES + 2**16,
        max_stored_bytes=MAX_STORED_BYTES,
        max_stored_files=MAX_STORED_FILES,
        max_stored_seconds=STORED_SECONDS,
    )
    return page.queue(max_size=32).launch(
        share=False,
        max_file_size=MAX_BYTES,
        app_kwargs={"middleware": [limits]},
        allowed_paths=[],
        enable_monitoring=False,
        run_history=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        footer_links=[],
        theme=THEME,
        css_paths=HERE / "style.css",
        **kwargs,
    )


def main() -> None:
    for name in ("SIGTERM", "SIGHUP"):  # so that what is stored is deleted then too
        if hasattr(signal, name):  # Windows has no SIGHUP
            signal.signal(getattr(signal, name), lambda *_: sys.exit())
    with clear_errors(), TemporaryDirectory() as stored:
        os.environ["GRADIO_TEMP_DIR"] = stored  # a folder of its own: what is deleted is of nobody else
        flags = [*shlex.split(os.environ.get("TNT_APP_FLAGS", "")), *sys.argv[1:]]
        (arguments,) = parse_recipe_and_flags((AppArguments,), flags)
        folders = [Path(folder) for folder in arguments.model_name_or_path]
        folders = folders or sorted(path.parent for path in HERE.glob("models/*/config.json"))
        folders = folders or [EXAMPLES_DIR / "backbone", EXAMPLES_DIR / "cluttered_backbone"]
        for folder in folders:
            if not (folder / "config.json").is_file():
                raise ValueError(
                    f"--model_name_or_path must name folders of models, got {folder}, without config.json."
                )
        names = [folder.resolve().name for folder in folders]
        if len(set(names)) < len(names):
            raise ValueError(f"The folders of the models must have different names, got {', '.join(names)}.")
        page = build_page(dict(zip(names, map(Classifier, folders))), bundled_examples(), arguments.allow_hub_ids)
        launch(page, server_name=arguments.host, server_port=arguments.port)


if __name__ == "__main__":
    main()
