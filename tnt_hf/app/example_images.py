"""The images that the page offers: photographs, and objects of Fashion-MNIST, alone and in clutter."""

import importlib.util
from collections.abc import Collection, Iterable

import numpy as np
from PIL import Image as PILImage

from ..data import DataArguments, decode_image, load_images
from ..examples import BUNDLED_PHOTOGRAPHS, EXAMPLES_DIR


NUM_IMAGES = 60  # read, so that the pieces of clutter are of many objects
ALONE = ("Ankle boot", "Trouser", "Shirt", "Sandal")
IN_CLUTTER = ("Bag", "Dress", "Sneaker", "Coat")


def bundled_examples(labels_of_models: Iterable[Collection[str]]) -> dict[str, PILImage.Image]:
    """RGB images by title, of the kinds that models know by their labels, first those of the first model's kind."""
    kinds = dict.fromkeys(_clothes if set(ALONE) <= set(labels) else _photographs for labels in labels_of_models)
    return {title: image for images in kinds for title, image in images().items()}


def _photographs() -> dict[str, PILImage.Image]:
    paths = sorted(BUNDLED_PHOTOGRAPHS.glob("*.jpg"))
    return {path.stem.capitalize(): PILImage.open(path).convert("RGB") for path in paths}


def _clothes() -> dict[str, PILImage.Image]:
    arguments = DataArguments(max_eval_samples=NUM_IMAGES)
    split = load_images(arguments, train=False, validation=True)["validation"]
    labels, names = np.array(split["label"]), split.features["label"].names
    images = [decode_image(record) for record in split["image"]]

    specification = importlib.util.spec_from_file_location(
        "clutter", EXAMPLES_DIR / "cluttered_fashion_mnist" / "build.py"
    )
    build = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(build)
    size = (build.OBJECT_SIZE, build.OBJECT_SIZE)
    objects = np.stack([image.convert("L").resize(size, PILImage.Resampling.BILINEAR) for image in images])
    scenes, _ = build.clutter(objects, labels, np.random.default_rng(0))

    first = {name: int(np.argmax(labels == label)) for label, name in enumerate(names)}
    alone = {name: images[first[name]] for name in ALONE}
    in_clutter = {f"{name}, cluttered": PILImage.fromarray(scenes[first[name]]).convert("RGB") for name in IN_CLUTTER}
    return alone | in_clutter


__all__ = ["bundled_examples"]
