"""Where the recipes, the small backbones and the images lie that come with the package."""

from pathlib import Path


EXAMPLES_DIR = Path(__file__).parent
RECIPES_DIR = EXAMPLES_DIR / "recipes"
COLLECTIONS_DIR = EXAMPLES_DIR / "collections"
BUNDLED_BACKBONE = EXAMPLES_DIR / "backbone"
BUNDLED_DATASET = EXAMPLES_DIR / "fashion_mnist"
BUNDLED_IMAGE = EXAMPLES_DIR / "ankle_boot.png"
BUNDLED_PHOTOGRAPHS = EXAMPLES_DIR / "photographs"

__all__ = [
    "BUNDLED_BACKBONE",
    "BUNDLED_DATASET",
    "BUNDLED_IMAGE",
    "BUNDLED_PHOTOGRAPHS",
    "COLLECTIONS_DIR",
    "EXAMPLES_DIR",
    "RECIPES_DIR",
]
