"""The page that `tnt-hf app` serves; needs `[app]`."""

from .example_images import bundled_examples
from .looking import Classifier
from .page import build_page, launch


__all__ = ["Classifier", "build_page", "bundled_examples", "launch"]
