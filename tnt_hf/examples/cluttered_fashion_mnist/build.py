"""
Make cluttered Fashion-MNIST: the object at a random place, among and over pieces of objects of other classes.

    python examples/cluttered_fashion_mnist/build.py --output_dir data/cluttered
    python examples/cluttered_fashion_mnist/build.py data/fashion_mnist --output_dir data/cluttered   # the full set

The source is a dataset of square greyscale images on black, in a folder that `datasets` reads: the bundled subset if
none is named, or the full set as examples/fashion_mnist/build.py writes it. Images are 56x56 with the object scaled to
40 pixels; the column `object` is a mask of where it lies. The same source and seed give the same images.
"""

import argparse
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Image, load_dataset
from PIL import Image as PILImage


IMAGE_SIZE = 56
OBJECT_SIZE = 40
NUM_PIECES = 16
PIECE_SIZES = (8, 16)  # shortest and longest side, in pixels


def clutter(images: np.ndarray, labels: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """
    Args:
        images (`np.ndarray` of shape `(num_images, OBJECT_SIZE, OBJECT_SIZE)`, uint8): Objects on black.
        labels (`np.ndarray` of shape `(num_images,)`): Their classes, at least two.

    Returns:
        Images and masks of the objects, both of shape `(num_images, IMAGE_SIZE, IMAGE_SIZE)` and uint8; masks are 255
        on the object and 0 elsewhere.
    """
    scenes = np.zeros((len(images), IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    masks = np.zeros_like(scenes)
    border = OBJECT_SIZE // 8  # pieces are cut from where objects usually are
    for scene, mask, image, label in zip(scenes, masks, images, labels):
        others = np.flatnonzero(labels != label)
        for other in generator.choice(others, NUM_PIECES):
            height, width = generator.integers(*PIECE_SIZES, size=2, endpoint=True)
            top, left = (generator.integers(border, OBJECT_SIZE - border - side + 1) for side in (height, width))
            piece = images[other][top : top + height, left : left + width]
            top, left = (generator.integers(IMAGE_SIZE - side + 1) for side in (height, width))
            scene[top : top + height, left : left + width] = piece
        top, left = generator.integers(IMAGE_SIZE - OBJECT_SIZE + 1, size=2)
        place = (slice(top, top + OBJECT_SIZE), slice(left, left + OBJECT_SIZE))
        is_object = image > 0
        scene[place][is_object] = image[is_object]
        mask[place][is_object] = 255
    return scenes, masks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, nargs="?", default=Path(__file__).parents[1] / "fashion_mnist")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    for index, (name, split) in enumerate(load_dataset(str(arguments.source)).items()):
        size = (OBJECT_SIZE, OBJECT_SIZE)
        images = [image.convert("L").resize(size, PILImage.Resampling.BILINEAR) for image in split["image"]]
        labels = np.array(split["label"])
        generator = np.random.default_rng((arguments.seed, index))
        scenes, masks = clutter(np.stack([np.asarray(image) for image in images]), labels, generator)
        features = Features({"image": Image(), "label": split.features["label"], "object": Image()})
        records = {"image": list(scenes), "label": labels.tolist(), "object": list(masks)}
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        Dataset.from_dict(records, features=features).to_parquet(arguments.output_dir / f"{name}.parquet")


if __name__ == "__main__":
    main()
