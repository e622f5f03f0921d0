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
from .choosing import Choice, choose_schedules
from .latency import LatencyRow, measure_latency
from .measured_cost import measure_cost


__all__ = [
    "Choice",
    "EvaluationArguments",
    "LatencyRow",
    "SavedModelArguments",
    "TopKAccuracy",
    "choose_schedules",
    "compute_metrics",
    "describe_run",
    "evaluate_schedules",
    "measure_cost",
    "measure_latency",
    "top_classes",
]
