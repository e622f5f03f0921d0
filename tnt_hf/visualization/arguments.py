"""Which pictures of a model and its results to draw, and of which images: flags for [`visualization`]."""

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from PIL import Image as PILImage

from ..configuration_tnt import TntDeiTConfig, TntViTConfig
from ..data import DataArguments, decode_image, find_images, load_images
from ..named_schedules import SCHEDULE_FORMS, FlopsReduction, parse_schedule, resolve_schedules
from ..schedules_tnt import Schedule


DEFAULT_SCHEDULES = ("full", "1.5x", "2x", "3x")


@dataclass
class PictureArguments:
    """What to draw, of which model and images."""

    output_dir: str = field(metadata={"help": "Folder for the pictures."})
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of a model; a plain checkpoint has no scoring heads, so it merges clusters."
        },
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a model on the Hub."})
    images: str | None = field(
        default=None,
        metadata={"help": "Image to draw, or folder of images at any depth, instead of a dataset with labels."},
    )
    max_images: int = field(default=4, metadata={"help": "Draw at most so many images, the first ones by path."})
    schedules: list[str] | None = field(
        default=None,
        metadata={
            "help": f"Schedules to draw: {SCHEDULE_FORMS}. By default "
            f"{', '.join(DEFAULT_SCHEDULES)}, without those for which the model has too few patches."
        },
    )
    max_layers: int = field(
        default=3,
        metadata={"help": "Show at most so many pruned layers of a schedule: the last, and others evenly before it."},
    )
    show_answers: bool = field(default=True, metadata={"help": "Write the answers below the images of schedules.png."})
    overview: int | None = field(
        default=None, metadata={"help": "Also draw the method, on the image with this number; the first image is 0."}
    )
    results: str | None = field(
        default=None,
        metadata={"help": "Plot the accuracy in this results.json. It may be given with or without a model."},
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace the pictures of the output folder."})

    def __post_init__(self):
        if self.model_name_or_path is None and self.results is None:
            raise ValueError("Give --model_name_or_path for kept tokens, --results for a plot, or both.")
        for name in ("max_images", "max_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")
        if self.schedules is not None:
            self.schedules = [parse_schedule(text) for text in self.schedules]


def schedules_to_draw(
    config: TntViTConfig | TntDeiTConfig, schedules: Sequence[Schedule | FlopsReduction] | None
) -> list[Schedule]:
    """
    The schedules as [`resolve_schedules`] makes them; the default ones that the model can carry out if None.

    Raises:
        ValueError: If the model cannot carry out one of them, or none of them prunes.
    """
    if schedules is not None:
        resolved = resolve_schedules(config, schedules)
    else:
        resolved = []
        for text in DEFAULT_SCHEDULES:
            with suppress(ValueError):
                resolved += resolve_schedules(config, [parse_schedule(text)])
    if not any(schedule.prune_layers for schedule in resolved):
        names = ", ".join(schedule.name for schedule in resolved)
        raise ValueError(f"--schedules must name one that prunes and that the model can carry out, got {names}.")
    return resolved


def sheet_name(schedule: Schedule) -> str:
    """File name of the kept tokens under a schedule."""
    return f"kept_tokens_{re.sub(r'[^0-9A-Za-z.]+', '-', schedule.name)}.png"


def read_images(arguments: PictureArguments, data_arguments: DataArguments) -> list[PILImage.Image]:
    """
    The first images to draw, in RGB.

    Raises:
        ValueError: If there are none, fewer than `overview` names, or one cannot be read.
    """
    if arguments.images is None:
        split = load_images(data_arguments, train=False, validation=True)["validation"]
        records = [split[index]["image"] for index in range(min(arguments.max_images, len(split)))]
    elif data_arguments.dataset_name or data_arguments.validation_dir:
        raise ValueError("Give either --images or --dataset_name / --validation_dir, not both.")
    else:
        paths = find_images(arguments.images, "images")[: arguments.max_images]
        records = [{"path": str(path), "bytes": None} for path in paths]
    if arguments.overview is not None and not 0 <= arguments.overview < len(records):
        raise ValueError(f"--overview must be from 0 to {len(records) - 1}, got {arguments.overview}.")
    return [decode_image(record) for record in records]


__all__ = ["PictureArguments", "read_images", "schedules_to_draw", "sheet_name"]
