"""
Write the bundled Fashion-MNIST subset: the first images of each split, as Parquet files that `datasets` loads.

The full set in IDX files is Debian's package dataset-fashion-mnist (in /usr/share/datasets/fashion-mnist):

    python examples/fashion_mnist/build.py /usr/share/datasets/fashion-mnist
"""

import argparse
import gzip
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image


CLASSES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]
IDX_HEADER_BYTES = {"images": 16, "labels": 8}


def read_idx(source: Path, split: str, kind: str) -> np.ndarray:
    rank = {"images": 3, "labels": 1}[kind]
    raw = gzip.decompress((source / f"{split}-{kind}-idx{rank}-ubyte.gz").read_bytes())
    values = np.frombuffer(raw, np.uint8, offset=IDX_HEADER_BYTES[kind])
    return values.reshape(-1, 28, 28) if kind == "images" else values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="Folder of the four IDX files.")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent)
    parser.add_argument("--num_train", type=int, default=4000)
    parser.add_argument("--num_test", type=int, default=2000)
    arguments = parser.parse_args()

    features = Features({"image": Image(), "label": ClassLabel(names=CLASSES)})
    for split, idx_split, num_images in (
        ("train", "train", arguments.num_train),
        ("test", "t10k", arguments.num_test),
    ):
        images = read_idx(arguments.source, idx_split, "images")[:num_images]
        labels = read_idx(arguments.source, idx_split, "labels")[:num_images]
        dataset = Dataset.from_dict({"image": list(images), "label": labels.tolist()}, features=features)
        dataset.to_parquet(arguments.output_dir / f"{split}.parquet")


if __name__ == "__main__":
    main()
