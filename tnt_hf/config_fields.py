"""The TNT config fields that a training sets: their type, what they mean, and their values as facts of a run."""

import inspect
import re
from typing import Any, get_type_hints

from .configuration_tnt import TntDeiTConfig, TntViTConfig, TokenPruningFields
from .schedules_tnt import Schedule


# The others are those that a schedule stands for, what is chosen for budgets, and the random control of an evaluation.
TRAINING_SETTINGS = tuple(
    name
    for name in TokenPruningFields.__dataclass_fields__
    if name not in (*Schedule.__dataclass_fields__, "budget_sizes", "selection")
)


def field_type(name: str) -> Any:
    """The type of a config field, such as `float`."""
    return get_type_hints(TokenPruningFields)[name]


def field_summary(name: str) -> str:
    """The first sentence on a config field in the docstring of [`TokenPruningFields`]."""
    described = re.search(rf"^ *{name} \(.*\):\n((?: {{8}}.*\n)+)", f"{inspect.getdoc(TokenPruningFields)}\n", re.M)
    text = " ".join(described[1].replace("`", "").split()) if described else ""
    return re.split(r"(?<=\.) ", text)[0]


def describe_fields(config: TntViTConfig | TntDeiTConfig) -> dict[str, Any]:
    """The values of [`TRAINING_SETTINGS`] by name, as a results file records them."""
    return {name: getattr(config, name) for name in TRAINING_SETTINGS}


__all__ = ["TRAINING_SETTINGS", "describe_fields", "field_summary", "field_type"]
