"""Recipes, settings and flags -> dataclasses of arguments; bad input of a script is reported in one line."""

import json
import re
import sys
from argparse import Action, ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import fields
from difflib import get_close_matches
from io import StringIO
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser

from .examples import RECIPES_DIR


def parse_recipe_and_flags(
    dataclass_types: Sequence[type], arguments: Sequence[str], description: str | None = None
) -> tuple[Any, ...]:
    """
    Parse `[RECIPE] [--flag value ...]`; a flag overrides the recipe, which is as in [`read_recipe`].

    Args:
        description (`str`, *optional*): What the help says above the flags.

    Raises:
        ValueError: If the recipe does not exist, is no mapping, or a key or flag is unknown.
    """
    arguments = list(arguments)
    if arguments and not arguments[0].startswith("-"):
        arguments = [*as_flags(read_recipe(arguments[0])), *arguments[1:]]
    return parse_flags(dataclass_types, arguments, description)


def parse_flags(
    dataclass_types: Sequence[type], arguments: Sequence[str], description: str | None = None
) -> tuple[Any, ...]:
    """
    Parse `[--flag value ...]`.

    Args:
        description (`str`, *optional*): What the help says above the flags.

    Raises:
        ValueError: If a flag is unknown, or a value has none.
    """
    return FlagParser(dataclass_types, description).parse_args_into_dataclasses(list(arguments))


class FlagParser(HfArgumentParser):
    """A parser of flags, whose names are never abbreviated; it reports unknown ones before those that are missing."""

    def __init__(self, dataclass_types: type | Sequence[type], description: str | None = None) -> None:
        super().__init__(dataclass_types, description=description, formatter_class=_HelpFormatter, allow_abbrev=False)

    def parse_args_into_dataclasses(
        self, args: Sequence[str] | None = None, return_remaining_strings: bool = False, **kwargs: Any
    ) -> tuple[Any, ...]:
        if not return_remaining_strings and (unknown := self._unknown(args)):
            raise ValueError(self._describe_unknown(unknown[0]))
        return super().parse_args_into_dataclasses(args, return_remaining_strings, **kwargs)

    def _unknown(self, args: Sequence[str] | None) -> list[str]:
        """What is left over if nothing is required. Whatever else is wrong or asked for is left to the real parse."""
        required = [action for action in self._actions if action.required]
        for action in required:
            action.required = False
        try:
            with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                return self.parse_known_args(args)[1]
        except SystemExit:
            return []
        finally:
            for action in required:
                action.required = True

    def _describe_unknown(self, word: str) -> str:
        flags = list(self._option_string_actions)
        if not word.startswith("-"):
            takes_model = "--model_name_or_path" in flags
            hint = "a model is named with --model_name_or_path." if takes_model else "--help lists what it takes."
            return f"{self.prog} does not expect {word} without a flag: {hint}"
        flag = word.partition("=")[0]
        close = [name for name in flags if name.startswith(flag)] or get_close_matches(flag, flags, n=1)
        hint = f"did you mean {close[0]}?" if close else "--help lists those it has."
        return f"Unknown flag {flag} of {self.prog}: {hint}"


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Descriptions as they are written, and the default of each flag that has one."""

    def _get_help_string(self, action: Action) -> str | None:
        if action.const is False:  # the --no_ form that HfArgumentParser adds, with the help of the flag it negates
            return f"The opposite of --{action.dest}."
        return action.help if action.default in (None, []) else super()._get_help_string(action)


def parse_settings(dataclass_types: Sequence[type], settings: Mapping[str, Any]) -> tuple[Any, ...]:
    """
    Make the dataclasses from values by the name of their field, each read and checked as the flag of that name.

    None stands for the default of a field, as a flag that is not passed.

    Raises:
        ValueError: If there is no field of a name, or a value is not allowed.
    """
    known = [field.name for each in dataclass_types for field in fields(each) if field.init]
    if unknown := [name for name in settings if name not in known]:
        close = get_close_matches(unknown[0], known)
        hint = f" Close to it: {', '.join(close)}." if close else ""
        raise ValueError(f"There is no setting {', '.join(unknown)}.{hint}")
    parser = _RaisingParser(dataclass_types, allow_abbrev=False)
    return parser.parse_args_into_dataclasses([*as_flags(settings)], look_for_args_file=False)


class _RaisingParser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(re.sub(r"^argument --(\w+)[^:]*", r"Setting \1", message))


def read_recipe(name_or_path: str | PathLike) -> dict[str, Any]:
    """
    The settings of a recipe, by name.

    Args:
        name_or_path (`str` or `PathLike`):
            A recipe that comes with the package, such as `"merge"`, or the path of a YAML or JSON file.

    Raises:
        ValueError: If there is no such recipe, or it holds no mapping.
    """
    return read_settings(name_or_path, RECIPES_DIR, "recipe")


def read_settings(name_or_path: str | PathLike, folder: Path, kind: str) -> dict[str, Any]:
    """
    The mapping in a file of settings.

    Args:
        name_or_path (`str` or `PathLike`): Name of a YAML file in `folder`, or the path of a YAML or JSON file.
        folder (`Path`): Where those lie that come with the package.
        kind (`str`): What errors call such a file.

    Raises:
        ValueError: If there is no such file, or it holds no mapping.
    """
    path = Path(name_or_path)
    if not path.suffix and not path.is_file():
        names = sorted(each.stem for each in folder.glob("*.yaml"))
        if str(name_or_path) not in names:
            raise ValueError(
                f"A {kind} must be one of {', '.join(names)}, or the path of a YAML or JSON file, got {name_or_path}."
            )
        path = folder / f"{name_or_path}.yaml"
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise ValueError(f"A {kind} must be a .yaml, .yml or .json file, got {path}.")
    if not path.is_file():
        raise ValueError(f"There is no {kind} {path}.")
    try:
        settings = yaml.safe_load(path.read_text())  # JSON is YAML
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold a mapping of flags to values, got {type(settings).__name__}.")
    return settings


def as_flags(settings: Mapping[str, Any]) -> Iterator[str]:
    """Settings as the flags of a command; those that are None are left out."""
    for name, value in settings.items():
        if value is None:
            continue
        yield f"--{name}"
        if isinstance(value, (list, tuple)):
            yield from map(str, value)
        else:
            yield json.dumps(value) if isinstance(value, dict) else str(getattr(value, "value", value))  # of an Enum


@contextmanager
def needing_extra(name: str) -> Iterator[None]:
    """Imports of packages that the extra `name` installs; one that is missing is reported in one line."""
    try:
        yield
    except ModuleNotFoundError as error:
        sys.exit(f'Error: {error}. It comes with: pip install "tnt-hf[{name}]"')


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


__all__ = [
    "FlagParser",
    "as_flags",
    "clear_errors",
    "needing_extra",
    "parse_flags",
    "parse_recipe_and_flags",
    "parse_settings",
    "read_recipe",
    "read_settings",
]
