r"""
Train, evaluate and publish every checkpoint of a list, and write one table of them.

    tnt-hf collection imagenet --namespace org --output_dir runs/imagenet --dry_run true \
        --train_dir /data/imagenet/train --validation_dir /data/imagenet/val
    tnt-hf collection mine.yaml --namespace org --output_dir runs/mine --launcher "accelerate launch --multi_gpu"

A list names a recipe, settings and checkpoints, as tnt_hf/examples/collections/imagenet.yaml does. Each checkpoint
goes through `tnt-hf train` and `tnt-hf publish`, with a folder of its name in the output folder and a repo of its name
in the namespace; all other flags go to `tnt-hf train`. A repeated command leaves alone what is trained, continues what
was interrupted, and publishes what is not. table.md in the output folder has a line for each checkpoint and schedule.
"""

import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..command_line import FlagParser, as_flags, clear_errors, parse_recipe_and_flags, read_settings
from ..examples import COLLECTIONS_DIR
from ..publishing import Destination, connect
from ..results import RESULTS_NAME, check_no_results, markdown_table, read_results, recorded_training
from .train import ARGUMENT_TYPES


TABLE_NAME = "table.md"


@dataclass
class CollectionArguments:
    """Where the checkpoints go, and which of them."""

    namespace: str = field(metadata={"help": "User or organisation on the Hub whose repos they are."})
    output_dir: str = field(metadata={"help": "Folder with a run folder for each checkpoint, and the table."})
    only: list[str] = field(default_factory=list, metadata={"help": "Names of checkpoints; all of the list if none."})
    private: bool = field(default=False, metadata={"help": "Create private repos; refuse those that are public."})
    dry_run: bool = field(
        default=False, metadata={"help": "Train and evaluate, stage and verify, but upload nothing."}
    )
    launcher: str = field(
        default="", metadata={"help": "What starts a training in place of Python, such as 'accelerate launch'."}
    )

    def __post_init__(self):
        if self.launcher and shutil.which(shlex.split(self.launcher)[0]) is None:
            raise ValueError(f"--launcher must begin with a program that is installed, got {self.launcher!r}.")


def main() -> None:
    with clear_errors():
        parser = FlagParser(CollectionArguments, __doc__)
        parser.add_argument("collection", help="A list that comes with the package, or the path of a YAML file.")
        arguments, positional, others = parser.parse_args_into_dataclasses(return_remaining_strings=True)
        checkpoints = read_collection(positional.collection)
        if unknown := [name for name in arguments.only if name not in checkpoints]:
            raise ValueError(f"--only must be among {', '.join(checkpoints)}, got {', '.join(unknown)}.")
        wanted = arguments.only or list(checkpoints)
        folders = {name: Path(arguments.output_dir) / name for name in checkpoints}
        flags = {name: [*checkpoints[name], *others, "--output_dir", str(folders[name])] for name in wanted}
        check_no_results(arguments.output_dir, overwrite=True)
        for name in wanted:
            parse_recipe_and_flags(ARGUMENT_TYPES, flags[name])
            destination = Destination(f"{arguments.namespace}/{name}", arguments.private)
            if not arguments.dry_run:
                connect(destination)

    launcher = shlex.split(arguments.launcher) or [sys.executable]
    options = [f"--{name}" for name in ("private", "dry_run") if getattr(arguments, name)]
    failed = []
    for name in wanted:
        folder = folders[name]
        is_trained = (folder / RESULTS_NAME).is_file() and recorded_training(folder) is not None
        if is_trained:
            print(f"{name} is trained: {folder / RESULTS_NAME}", flush=True)
        else:
            is_trained = run([*launcher, "-m", "tnt_hf", "train", *flags[name]])
        published = ["publish", str(folder), "--repo_id", f"{arguments.namespace}/{name}", *options]
        if not (is_trained and run([sys.executable, "-m", "tnt_hf", *published])):
            failed.append(name)
        if table := format_collection(folders):
            (Path(arguments.output_dir) / TABLE_NAME).write_text(table)
    print(table)
    if failed:
        sys.exit(f"Error: Of {', '.join(failed)} a command above failed. Repeat this one when its cause is gone.")


def read_collection(name_or_path: str) -> dict[str, list[str]]:
    """
    The recipe and flags of `tnt-hf train` for each checkpoint of a list, by its name.

    Raises:
        ValueError: If there is no such list, or it does not hold what it must.
    """
    content = read_settings(name_or_path, COLLECTIONS_DIR, "collection")
    checkpoints, shared = content.get("checkpoints"), content.get("settings", {})
    own = checkpoints.values() if isinstance(checkpoints, dict) else [None]
    is_complete = set(content) | {"settings"} == {"recipe", "settings", "checkpoints"}
    if not is_complete or not all(isinstance(each, dict) for each in (shared, *own)):
        raise ValueError(
            f"A collection must hold `recipe`, `settings` for all checkpoints, and `checkpoints`, each with its own "
            f"settings by its name; {name_or_path} holds {', '.join(content)}."
        )
    return {name: [content["recipe"], *as_flags({**shared, **checkpoints[name]})] for name in checkpoints}


def run(command: Sequence[str]) -> bool:
    """Show a command and run it; whether it succeeded."""
    print(f"$ {shlex.join(command)}", flush=True)
    return subprocess.run(command, check=False).returncode == 0


def format_collection(folders: Mapping[str, Path]) -> str:
    """A table in Markdown of the rows of all results files, but those of random control; empty if there are none."""
    lines, measured = [], []
    for name, folder in folders.items():
        if not (folder / RESULTS_NAME).is_file():
            continue
        results = read_results(folder / RESULTS_NAME)
        rows = [row for row in results.rows if row.selection != "random"]
        for row in rows:
            figures = f"{row.gflops:.3f}", f"{row.top1:.2f}", f"{row.top5:.2f}", f"{row.images_per_second:.0f}"
            lines.append([name, row.schedule, *figures])
        measured.append(
            f"{name}: {rows[0].num_images} images of {results.dataset}, {results.device}, {results.dtype}, batch "
            f"{results.batch_size}, torch {results.versions['torch']}, transformers {results.versions['transformers']}"
        )
    if not lines:
        return ""
    table = markdown_table(["checkpoint", "schedule", "GFLOPs", "top-1", "top-5", "images/s"], lines)
    return "\n".join([table, "Measured:", "", *(f"- {each}" for each in measured), ""])
