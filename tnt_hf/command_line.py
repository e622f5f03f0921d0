"""What all scripts share: recipes with flags that override them, and bad input reported in one line."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser


def parse_recipe_and_flags(dataclass_types: Sequence[type], arguments: Sequence[str]) -> tuple[Any, ...]:
    """
    Parse `[RECIPE.yaml|RECIPE.json] [--flag value ...]`; a flag overrides the recipe.

    Raises:
        ValueError: If the recipe does not exist, is no mapping, or a key or flag is unknown.
    """
    arguments = list(arguments)
    if arguments and not arguments[0].startswith("-"):
        arguments = [*_recipe_flags(Path(arguments[0])), *arguments[1:]]
    return HfArgumentParser(dataclass_types, allow_abbrev=False).parse_args_into_dataclasses(arguments)


def _recipe_flags(path: Path) -> Iterator[str]:
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise ValueError(f"A recipe must be a .yaml, .yml or .json file, got {path}.")
    if not path.is_file():
        raise ValueError(f"There is no recipe {path}.")
    try:
        recipe = yaml.safe_load(path.read_text())  # JSON is YAML
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} must hold a mapping of flags to values, got {type(recipe).__name__}.")
    for name, value in recipe.items():
        if value is None:
            continue
        yield f"--{name}"
        if isinstance(value, list):
            yield from map(str, value)
        else:
            yield json.dumps(value) if isinstance(value, dict) else str(value)


@contextmanager
def needing_extra(name: str) -> Iterator[None]:
    """Imports of packages that the extra `name` installs; one that is missing is reported in one line."""
    try:
        yield
    except ModuleNotFoundError as error:
        sys.exit(f'Error: {error}. It comes with: pip install -e ".[{name}]"')


BEFORE_ANY_WORK = (ImportError, OSError, RuntimeError, StrictDataclassError, ValueError)


@contextmanager
def clear_errors(kinds: tuple[type[Exception], ...] = BEFORE_ANY_WORK) -> Iterator[None]:
    """
    Report errors as one line and exit with status 1.

    Args:
        kinds (`tuple`): Which errors; by default those of bad input, which mean something else during the work.
    """
    try:
        yield
    except kinds as error:
        new_line = "" if kinds is BEFORE_ANY_WORK else "\n"  # after a progress bar
        sys.exit(f"{new_line}Error: {error}")


__all__ = ["clear_errors", "needing_extra", "parse_recipe_and_flags"]
