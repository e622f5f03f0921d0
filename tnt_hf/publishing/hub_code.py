"""The code that travels to the Hub with every model."""

from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

from .. import modeling_tnt


# By name: the models and what they import beside them, as Transformers finds and saves it.
CODE_FILES = {
    Path(path).name: Path(path)
    for path in (modeling_tnt.__file__, *sorted(get_relative_import_files(modeling_tnt.__file__)))
}

__all__ = ["CODE_FILES"]
