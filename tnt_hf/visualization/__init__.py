"""Pictures of what a model keeps and of what it achieves; needs `[train]`."""

from .arguments import PictureArguments, read_images, schedules_to_draw, sheet_name
from .drawing import (
    CHANGED,
    RELEVANCE_COLORMAP,
    RELEVANCE_SHARE,
    dim_dropped,
    draw_kept_tokens,
    draw_left,
    draw_merged,
    draw_overview,
    draw_relevance,
    draw_schedules,
    patch_grid,
    plot_accuracy,
    relevance_map,
    seen_images,
    shown_images,
)
from .token_trace import PrunedLayer, trace_tokens


__all__ = [
    "CHANGED",
    "RELEVANCE_COLORMAP",
    "RELEVANCE_SHARE",
    "PictureArguments",
    "PrunedLayer",
    "dim_dropped",
    "draw_kept_tokens",
    "draw_left",
    "draw_merged",
    "draw_overview",
    "draw_relevance",
    "draw_schedules",
    "patch_grid",
    "plot_accuracy",
    "read_images",
    "relevance_map",
    "schedules_to_draw",
    "seen_images",
    "sheet_name",
    "shown_images",
    "trace_tokens",
]
