"""What a model answers, costs and takes in time under its schedules; needs `[train]`."""

from .accuracy import (
    EvaluationArguments,
    SavedModelArguments,
    TopKAccuracy,
    compute_metrics,
    describe_run,
    evaluate_schedules,
    top_classes,
)
from .measured_cost import measure_cost, measure_seconds
from .search import (
    SearchArguments,
    apply_schedule,
    check_destinations,
    format_search,
    pareto_rows,
    read_images,
    search_schedules,
    write_search,
)
from .search_space import find_target


__all__ = [
    "EvaluationArguments",
    "SavedModelArguments",
    "SearchArguments",
    "TopKAccuracy",
    "apply_schedule",
    "check_destinations",
    "compute_metrics",
    "describe_run",
    "evaluate_schedules",
    "find_target",
    "format_search",
    "measure_cost",
    "measure_seconds",
    "pareto_rows",
    "read_images",
    "search_schedules",
    "top_classes",
    "write_search",
]
