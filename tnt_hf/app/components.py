"""Inputs of the page, which take no file of the server and no address, whatever a request names."""

from pathlib import Path
from textwrap import shorten
from typing import Any

import gradio as gr
from gradio.components import Component
from gradio.data_classes import ImageData

from .request_limits import is_stored


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
    """A dropdown of which the page checks the choice."""

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


__all__ = ["Budget", "ImageUpload", "ModelChoice"]
