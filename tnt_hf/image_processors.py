"""What image processors make of images, and whether a model takes it."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image as PILImage
from transformers import BaseImageProcessor


def pixel_values_of(image_processor: BaseImageProcessor, image: PILImage.Image) -> torch.Tensor:
    """
    What an image processor makes of one RGB image, as floating-point numbers of shape `(1, num_channels, height,
    width)` if it is one that a ViT takes.

    Raises:
        ValueError: If the image processor fails, or makes no `pixel_values`.
    """
    try:
        with np.errstate(all="ignore"):
            made = dict(image_processor(image, return_tensors="pt"))
    except Exception as error:  # of whatever class the checkpoint names
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"The image processor fails at an RGB image of {image.height}x{image.width} pixels: {reason}"
        ) from error
    if not isinstance(made.get("pixel_values"), torch.Tensor):
        names = ", ".join(f"{name} ({type(value).__name__})" for name, value in made.items())
        raise ValueError(f"The image processor must make `pixel_values`, a tensor, got {names or 'nothing'}.")
    return made["pixel_values"].float()


def input_size(image_processor: BaseImageProcessor) -> tuple[int, int]:
    """Height and width of the images that an image processor makes."""
    height, width = pixel_values_of(image_processor, PILImage.new("RGB", (64, 64))).shape[-2:]
    return height, width


def check_input_size(image_processor: BaseImageProcessor, image_size: Sequence[int], num_channels: int = 3) -> None:
    """
    Check that RGB images of any size leave the image processor as the model takes them.

    Args:
        image_processor ([`BaseImageProcessor`]): The image processor.
        image_size (`Sequence[int]`): Height and width of the model's images.
        num_channels (`int`): Their channels.

    Raises:
        ValueError: If the image processor fails, or makes pixel values of another shape than the model takes, or such
            that are not finite.
    """
    expected, side = (1, num_channels, *image_size), max(image_size)
    short, long = side // 3 + 1, 2 * side
    for size in ((long, long), (long, side), (side, long), (side // 2 + 1, short), (short, side // 2 + 1)):
        image = PILImage.linear_gradient("L").resize(size).convert("RGB")
        pixel_values = pixel_values_of(image_processor, image)
        if pixel_values.shape != expected:
            raise ValueError(
                f"The image processor makes `pixel_values` of shape {tuple(pixel_values.shape)} of an image of "
                f"{image.height}x{image.width} pixels, the model takes {expected}."
            )
        if not pixel_values.isfinite().all():
            raise ValueError(
                "The image processor must make `pixel_values` that are finite, got numbers from "
                f"{pixel_values.min():g} to {pixel_values.max():g}."
            )


__all__ = ["check_input_size", "input_size", "pixel_values_of"]
