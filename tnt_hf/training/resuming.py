"""Runs that were interrupted: where they continue, and whether they are still the same runs."""

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from ..results import RESULTS_NAME, TRAINING_NAME, check_no_results, write_json
from .arguments import TntTrainingArguments
from .images import BAD_IMAGES_NAME


RUN_SETTINGS_NAME = "run_settings.json"
TENSORBOARD_FOLDER = "runs"  # where Trainer's callback writes
RUN_FIELDS = (
    "seed",
    "data_seed",
    "learning_rate",
    "weight_decay",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "max_steps",
    "num_train_epochs",
    "world_size",
    "train_batch_size",
    "gradient_accumulation_steps",
    "optim",
    "optim_args",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "dataloader_drop_last",
    "label_smoothing_factor",
    "self_distillation",
    "adaptation_schedules",
    "ema_decay",
    "bf16",
    "fp16",
)
# Fields of the model and the data that no training depends on.
OTHER_FIELDS = ("schedule", "validation_dir", "max_eval_samples", "max_bad_images")

logger = logging.get_logger(__name__)


def checkpoint_to_resume(arguments: TntTrainingArguments) -> Path | None:
    """
    Check that the run has something to do and a place of its own to write to, and find where it was interrupted.

    By default a run continues from the last whole checkpoint of its output folder, and starts if there is none; with
    `--resume_from_checkpoint true` there must be one, with `false` it starts anew. A checkpoint that was being written
    when the run was killed is passed over with a warning.

    Raises:
        ValueError: If there is nothing to do or to resume from, the run would overwrite files of another, or processes
            find different checkpoints.
    """
    if not arguments.do_train and not arguments.do_eval:
        raise ValueError("Nothing to do: pass --do_train, --do_eval or both.")
    output_dir, wanted = Path(arguments.output_dir), arguments.resume_from_checkpoint
    checkpoint = None
    if wanted and arguments.overwrite_output_dir:
        raise ValueError("--resume_from_checkpoint continues, --overwrite_output_dir starts anew: pass only one.")
    if isinstance(wanted, str):
        checkpoint = Path(wanted)
        if missing := _missing_from(checkpoint):
            raise ValueError(f"--resume_from_checkpoint must be a folder with a whole checkpoint: {missing}.")
    elif arguments.do_train and wanted is not False and not arguments.overwrite_output_dir:
        checkpoint = _last_whole_checkpoint(output_dir)
        if wanted and checkpoint is None:
            raise ValueError(f"There is no checkpoint to resume from in {output_dir}.")
    found = gather_object([None if checkpoint is None else checkpoint.name])
    if len(set(found)) > 1:
        raise ValueError(
            f"The processes find different checkpoints in {output_dir}: {', '.join(map(str, found))}. All need the "
            "same folder."
        )
    is_own = checkpoint is not None and checkpoint.resolve().parent == output_dir.resolve()
    may_overwrite = arguments.overwrite_output_dir or is_own
    if not may_overwrite and arguments.do_train and _holds_anything(output_dir, wanted):
        if (output_dir / TRAINING_NAME).is_file() and not (output_dir / RESULTS_NAME).is_file():
            raise ValueError(
                f"The training in {output_dir} is finished, its evaluation is not: `tnt-hf evaluate "
                f"--model_name_or_path {output_dir} --output_dir {output_dir}` evaluates it, --overwrite_output_dir "
                "starts anew."
            )
        raise ValueError(
            f"{output_dir} is not empty: pass --overwrite_output_dir to write over it, or another --output_dir."
        )
    check_no_results(output_dir, may_overwrite)
    return checkpoint


def _holds_anything(output_dir: Path, wanted: bool | None) -> bool:
    """Whether there is more in a folder than a run leaves that was killed before its first checkpoint."""
    if not output_dir.is_dir():
        return False
    if wanted is False or not (output_dir / RUN_SETTINGS_NAME).is_file():
        return any(output_dir.iterdir())
    left = {output_dir / name for name in (RUN_SETTINGS_NAME, BAD_IMAGES_NAME, TENSORBOARD_FOLDER)}
    left |= {path for path in output_dir.glob("checkpoint-*") if not (path / TRAINER_STATE_NAME).exists()}
    return any(path not in left for path in output_dir.iterdir())


def _last_whole_checkpoint(output_dir: Path) -> Path | None:
    steps = {path: path.name.removeprefix("checkpoint-") for path in output_dir.glob("checkpoint-*")}
    numbered = [path for path, step in steps.items() if step.isdigit()]
    for checkpoint in sorted(numbered, key=lambda path: -int(steps[path])):
        if not (missing := _missing_from(checkpoint)):
            return checkpoint
        logger.warning(f"Passing over a checkpoint that is not whole: {missing}.")
    return None


def _missing_from(checkpoint: Path) -> str | None:
    """What a checkpoint lacks to be resumed from; the first process writes the file of the state last."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
        weights = list(checkpoint.glob("*.safetensors"))
        for path in weights:
            with safe_open(path, framework="pt"):
                pass
    except (OSError, ValueError, SafetensorError) as error:
        return f"{checkpoint}: {error}"
    optimizer = "optimizer.bin" if (checkpoint / "optimizer.bin").exists() else "optimizer.pt"  # the former of FSDP
    broken = [name for name in (optimizer, "scheduler.pt") if not zipfile.is_zipfile(checkpoint / name)]
    if broken or not weights:
        return f"{checkpoint} has no readable {', '.join(broken or ['weights'])}"
    return None


def record_run(checkpoint: Path | None, *arguments: Any) -> None:
    """
    Write what a training is made of into its output folder and remove what another run left there; or check that the
    run that is continued is the same one.

    Args:
        checkpoint (`Path`, *optional*): Where the run continues.
        arguments: The dataclasses of arguments; of the last, [`TntTrainingArguments`], only what changes the result.

    Raises:
        ValueError: If the run in the output folder had other settings; the message names them.
    """
    *others, training = arguments
    settings = {name: getattr(training, name) for name in RUN_FIELDS}
    if any(getattr(each, "streaming", False) for each in others):
        settings["dataloader_num_workers"] = training.dataloader_num_workers  # each draws from shards of its own
    for each in others:
        settings |= {name: getattr(each, name) for name in each.__dataclass_fields__ if name not in OTHER_FIELDS}
    settings = json.loads(json.dumps(settings, default=lambda value: str(getattr(value, "name", value))))
    output_dir = Path(training.output_dir)
    before_path = (output_dir if checkpoint is None else checkpoint.parent) / RUN_SETTINGS_NAME
    if checkpoint is not None and before_path.is_file():
        before = json.loads(before_path.read_text())
        changed = [name for name, value in settings.items() if before.get(name) != value]
        if changed:
            values = ", ".join(f"{name} {before.get(name)} -> {settings[name]}" for name in changed)
            raise ValueError(
                f"The run in {checkpoint.parent} had other settings: {values}. Repeat them, pass "
                "--overwrite_output_dir to start anew, or another --output_dir."
            )
    if training.process_index == 0:
        if checkpoint is None:
            for folder in output_dir.glob("checkpoint-*"):
                shutil.rmtree(folder)
            for name in (BAD_IMAGES_NAME, TRAINING_NAME):
                (output_dir / name).unlink(missing_ok=True)
        elif checkpoint.parent.resolve() != output_dir.resolve() and (checkpoint.parent / BAD_IMAGES_NAME).is_file():
            shutil.copy(checkpoint.parent / BAD_IMAGES_NAME, output_dir)  # which images a stream left out so far
        write_json(output_dir / RUN_SETTINGS_NAME, settings)


__all__ = [
    "checkpoint_to_resume",
    "record_run",
]
