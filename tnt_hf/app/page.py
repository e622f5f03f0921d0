"""The page: an image, a budget, the patches that are kept, the answer, the time."""

from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import shorten
from typing import Any

import gradio as gr
from PIL import Image as PILImage
from starlette.middleware import Middleware

from .components import Budget, ImageUpload, ModelChoice
from .hub_models import load_hub_model
from .looking import REDUCTIONS, Classifier
from .rendering import comparison_table, look_page, message
from .request_limits import RequestLimits
from .uploads import MAX_BYTES, RefusedInput, read_image


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
        view, looks = classifier.look(image, [1, reduction])
        return look_page(classifier, view, looks, reduction)

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
        return comparison_table(classifier, *classifier.compare(read_image(upload), COMPARED_REDUCTIONS))

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
        css_paths=Path(__file__).with_name("style.css"),
        **kwargs,
    )


__all__ = ["build_page", "launch"]
