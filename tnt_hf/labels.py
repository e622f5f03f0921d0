"""Class names of data and of classifiers: which class of the one is which of the other."""

import json
import re
import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any


# ImageNet's own ids, in whose order its classes are numbered
WORDNET_ID = re.compile(r"n\d{8}")
IMAGENET_CLASSES = 1000
MAX_NAMES_SHOWN = 3


class OtherClasses(ValueError):
    """The classes of data and model are not the same, or not known to be."""


def names_in_order(id2label: Mapping[Any, Any], what: str = "`id2label`") -> list[str]:
    """
    The names of a mapping by class, as text.

    Args:
        id2label (`Mapping`): Names by class; the classes may be text, as in JSON.
        what (`str`): What it is, for messages.

    Raises:
        ValueError: If its keys are not the integers from 0 on, or a name is no text and no integer.
    """
    if not isinstance(id2label, Mapping):
        raise ValueError(f"{what} must map the classes 0 to n - 1 to names, got {reprlib.repr(id2label)}.")
    by_class = {str(label): name for label, name in id2label.items()}
    classes = [str(label) for label in range(len(id2label))]
    missing = [label for label in classes if label not in by_class]
    if missing:
        raise ValueError(
            f"{what} must have the keys 0 to {len(id2label) - 1} for its {len(id2label)} names, got "
            f"{reprlib.repr(list(id2label))} without {missing[0]}."
        )
    return _checked_names([by_class[label] for label in classes], what)


def _checked_names(names: Sequence[Any], what: str) -> list[str]:
    """
    Names of classes as text.

    Raises:
        ValueError: If one is no text and no integer.
    """
    for label, name in enumerate(names):
        if not isinstance(name, str | int) or isinstance(name, bool):
            raise ValueError(
                f"{what} must name each class by a text or an integer, got {reprlib.repr(name)} for class {label}."
            )
    return [str(name) for name in names]


def read_class_names(path: str | PathLike) -> list[str]:
    """
    Class names in the order of their labels, from a JSON file.

    Args:
        path (`str` or `PathLike`): A list of names, or a mapping of the classes 0 to n - 1 to names. Integers may be
            names.

    Raises:
        ValueError: If the file holds something else.
        OSError: If it cannot be read.
    """
    try:
        content = json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} must be a JSON file of class names, got something else: {error}.") from error
    return _checked_names(content, str(path)) if isinstance(content, list) else names_in_order(content, str(path))


def numbers(names: Sequence[str]) -> list[int] | None:
    """
    The numbers in names that differ in nothing else, such as `7`, `007`, `LABEL_7`, `class 7`; None if they are not
    such names or two have the same number.
    """
    parts = [re.fullmatch(r"(\D*)(\d+)", name) for name in names]
    if not all(parts) or len({part[1] for part in parts}) != 1:
        return None
    values = [int(part[2]) for part in parts]
    return values if len(set(values)) == len(values) else None


def match_classes(names: Sequence[str], model_names: Sequence[str]) -> list[int] | None:
    """
    For each class of a data set the class of a model that it is; None if the names do not say so.

    - Equal names are equal classes, and numbers are compared by value. As no folder can have a `/` in its name, `_`
      and `-` are equal to it where that leaves each class one partner. The data may have a part of the model's
      classes, unless their names only count them: `0` to `99` may be other classes of a model that counts to `999`.
    - As many classes that the data counts from 0 are the model's by value: `10` is class 10 wherever it is sorted.
    - As many classes are in the same order if the model only counts its, or if one side has words and the other
      WordNet ids in their order.

    Args:
        names (`Sequence[str]`): Names of the classes of the data set, by label.
        model_names (`Sequence[str]`): Names of the model's classes, by label.
    """
    order, counted, model_counted = [*range(len(names))], numbers(names), numbers(model_names)
    is_whole, model_only_counts = len(names) == len(model_names), is_counting(model_names)
    known = [place for place in _places(names, model_names) if place is not None]
    if len(known) == len(names) and (is_whole or not model_only_counts):
        return known
    if not is_whole:
        return None
    if [*names] == [*model_names]:  # of which some are equal, as the crane in ImageNet
        return order
    are_ids, model_are_ids = _are_wordnet_ids(names), _are_wordnet_ids(model_names)
    if are_ids:
        is_told_by_order = counted == sorted(counted) and not model_are_ids
        return order if is_told_by_order else None
    if counted:
        return counted if sorted(counted) == order and (model_counted is None or model_are_ids) else None
    return order if model_only_counts or (model_are_ids and model_counted == sorted(model_counted)) else None


def _places(names: Sequence[str], model_names: Sequence[str]) -> list[int | None]:
    """For each class of the data the model's class of the same name; None where there is none, or several."""
    counted, model_counted = numbers(names), numbers(model_names)
    if counted and model_counted and _number_the_same(names[0], model_names[0]):
        return _places_of_equals(counted, model_counted)
    exact = _places_of_equals(names, model_names)
    as_folders = _places_of_equals(*([re.sub("[/-]", "_", name) for name in each] for each in (names, model_names)))
    return [as_folder if place is None else place for place, as_folder in zip(exact, as_folders)]


def _places_of_equals(keys: Sequence[Any], model_keys: Sequence[Any]) -> list[int | None]:
    """For each key the place of the one equal key; None where there is none, or either stands several times."""
    counts, model_counts = Counter(keys), Counter(model_keys)
    places = {key: place for place, key in enumerate(model_keys) if model_counts[key] == 1}
    return [places.get(key) if counts[key] == 1 else None for key in keys]


def are_the_same_names(names: Sequence[str], model_names: Sequence[str]) -> bool:
    """Whether both sides have the same names in any order, numbers compared by value."""
    if len(names) != len(model_names):
        return False
    return set(names) == set(model_names) or None not in _places(names, model_names)


def describe_mismatch(names: Sequence[str], model_names: Sequence[str]) -> str:
    """
    Why [`match_classes`] finds no match, as a sentence: which classes have no partner, on both sides.

    Args:
        names (`Sequence[str]`): Names of the classes of the data set, by label.
        model_names (`Sequence[str]`): Names of the model's classes, by label.
    """
    places = _places(names, model_names)
    if None not in places:
        return (
            f"The model only counts its {len(model_names)} classes ({_few(model_names)}), of which the {len(names)} "
            f"of the data ({_few(names)}) may be any."
        )
    unknown = [name for name, place in zip(names, places) if place is None]
    lacking = [name for place, name in enumerate(model_names) if place not in places]
    of_the_model = f", and of its own {len(model_names)} the data lack {_few(lacking)}" if lacking else ""
    return f"Of the {len(names)} classes of the data the model does not know {_few(unknown)}{of_the_model}."


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(names[:MAX_NAMES_SHOWN])
    return shown if len(names) <= MAX_NAMES_SHOWN else f"{shown} and {len(names) - MAX_NAMES_SHOWN} more"


def misplaced_class(names: Sequence[str], model_names: Sequence[str]) -> int | None:
    """
    The first class of the data that has another place among the model's, where most have a partner by their names,
    which so say that the order is another; None if they do not say so, or the model only counts its classes.
    """
    places = _places(names, model_names)
    if is_counting(model_names) or 2 * places.count(None) >= len(places):
        return None
    return next((label for label, place in enumerate(places) if place not in (None, label)), None)


def is_counting(names: Sequence[str]) -> bool:
    """Whether names say nothing but which class they are of: `LABEL_0`, `LABEL_1` and so on."""
    return numbers(names) == [*range(len(names))]


def _number_the_same(name: str, model_name: str) -> bool:
    """Whether what stands before the numbers is the same, or says nothing on one side."""
    prefix, model_prefix = (re.match(r"\D*", each)[0] for each in (name, model_name))
    return prefix == model_prefix or not {prefix, model_prefix}.isdisjoint(("", "LABEL_"))


def _are_wordnet_ids(names: Sequence[str]) -> bool:
    return all(WORDNET_ID.fullmatch(name) for name in names)


def may_keep_head(names: Sequence[str], model_names: Sequence[str]) -> bool:
    """
    Whether a classifier whose weights all train on these classes keeps its head and names: if the names say that they
    are the same classes, if the model only counts its, or if they are the thousand of ImageNet.
    """
    if len(names) != len(model_names) or match_classes(names, model_names) is None:
        return False
    is_imagenet = len(names) == IMAGENET_CLASSES and (_are_wordnet_ids(names) or _are_wordnet_ids(model_names))
    return are_the_same_names(names, model_names) or is_counting(model_names) or is_imagenet


__all__ = [
    "OtherClasses",
    "are_the_same_names",
    "describe_mismatch",
    "is_counting",
    "match_classes",
    "may_keep_head",
    "misplaced_class",
    "names_in_order",
    "numbers",
    "read_class_names",
]
