"""Class names of data and of classifiers: which class of the one is which of the other."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any


# ImageNet's own ids, in whose order its classes are numbered
WORDNET_ID = re.compile(r"n\d{8}")


def names_in_order(id2label: Mapping[Any, Any], source: str = "the model") -> list[str]:
    """
    The names of `id2label` by class, as text.

    Args:
        id2label (`Mapping`): Names by class; the classes may be text, as in JSON.
        source (`str`): What it belongs to, for messages.

    Raises:
        ValueError: If its keys are not the integers from 0 on, or a name is no text and no integer.
    """
    by_class = {str(label): name for label, name in id2label.items()}
    expected = [str(label) for label in range(len(id2label))]
    if set(by_class) != set(expected):
        odd = sorted(set(by_class) - set(expected)) or sorted(set(expected) - set(by_class))
        raise ValueError(
            f"The keys of `id2label` of {source} must be the integers from 0 to {len(id2label) - 1}, one for each "
            f"class, got {len(by_class)} keys with {', '.join(odd[:3])} among them."
        )
    for label, name in by_class.items():
        if not isinstance(name, str | int):
            raise ValueError(f"`id2label` of {source} must hold a name for each class, got {name!r} for {label}.")
    return [str(by_class[label]) for label in expected]


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

    - Equal names are equal classes, and numbers are compared by value. The data may have a part of the model's
      classes, unless their names only count them: `0` to `99` may be other classes of a model that counts to `999`.
    - As many classes that the data counts from 0 are the model's by value: `10` is class 10 wherever it is sorted.
    - As many classes are in the same order if the names of one side are WordNet ids, or if the model only counts its.

    Args:
        names (`Sequence[str]`): Names of the classes of the data set, by label.
        model_names (`Sequence[str]`): Names of the model's classes, by label.
    """
    order, counted, model_counted = [*range(len(names))], numbers(names), numbers(model_names)
    is_whole, model_counts_from_0 = len(names) == len(model_names), is_counting(model_names)
    keys, model_keys = list(names), list(model_names)
    if counted is not None and model_counted is not None:
        keys, model_keys = counted, model_counted
    occurrences = Counter(model_keys)
    places = {key: place for place, key in enumerate(model_keys) if occurrences[key] == 1}
    if all(key in places for key in keys) and (is_whole or not model_counts_from_0):
        return [places[key] for key in keys]
    if not is_whole:
        return None
    if keys == model_keys:  # of which some are equal, as the crane in ImageNet
        return order
    if counted is not None and sorted(counted) == order and (model_counted is None or _are_wordnet_ids(model_names)):
        return counted
    is_told_by_order = counted is None and (model_counts_from_0 or _are_wordnet_ids(model_names))
    return order if is_told_by_order or _are_wordnet_ids(names) else None


def is_counting(names: Sequence[str]) -> bool:
    """Whether names say nothing but which class they are of: `LABEL_0`, `LABEL_1` and so on."""
    return numbers(names) == [*range(len(names))]


def _are_wordnet_ids(names: Sequence[str]) -> bool:
    return all(WORDNET_ID.fullmatch(name) for name in names)


def may_keep_head(names: Sequence[str], model_names: Sequence[str]) -> bool:
    """
    Whether a classifier whose weights all train on these classes keeps its head and names: if they are the same
    classes, and names are not put to classes that the data only numbers.
    """
    if len(names) != len(model_names) or match_classes(names, model_names) is None:
        return False
    only_numbered = numbers(names) is not None and not _are_wordnet_ids(names)
    return not only_numbered or numbers(model_names) is not None


__all__ = ["is_counting", "match_classes", "may_keep_head", "names_in_order", "numbers"]
