"""The card of a published model and its machine-readable results, every figure copied from its results file."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml

from ..config_fields import TRAINING_SETTINGS
from ..results import SELECTION_NAMES, PublishedResults, ResultRow, markdown_table
from .hub_code import CODE_FILES


TEMPLATE = Path(__file__).with_name("card_template.md")
ACCURACY_PICTURE = "figures/accuracy.png"
KEPT_TOKENS_PICTURE = "figures/kept_tokens.png"
ARCHITECTURES = {
    "TntViTForImageClassification": "A vision transformer (ViT)",
    "TntDeiTForImageClassification": "A distilled DeiT",
}


def make_card(results: PublishedResults, repo_id: str, revision: str, pictures: Sequence[str]) -> ModelCard:
    """
    The model card of published results.

    Args:
        results ([`PublishedResults`]): Those that are published; what they do not hold is left out of the card.
        repo_id (`str`): Where the model is published.
        revision (`str`): Tag that the lines to copy pin.
        pictures (`Sequence[str]`): Paths in the repo of the pictures there are.
    """
    checkpoint, rows = results.checkpoint, results.rows
    default = next((row for row in rows if _is_stored(row, checkpoint["schedule"])), None)
    pruned = [row for row in rows if row.is_reduced]
    return ModelCard.from_template(
        _metadata(results, repo_id),
        template_path=str(TEMPLATE),
        name=repo_id.split("/")[-1],
        repo_id=repo_id,
        revision=revision,
        architecture=ARCHITECTURES[checkpoint["class"]],
        model_class=checkpoint["class"],
        code_files=_listed([f"`{name}`" for name in CODE_FILES]),
        size=_size(checkpoint),
        scope=_scope(checkpoint["classes"]),
        reduction=_reduction(checkpoint),
        is_merging=_is_merging(results),
        uses_scores=checkpoint["token_reduction"] != "cluster",
        relevance_weight=checkpoint["relevance_weight"],
        table=_table(results),
        measured=_measured(results),
        seed=results.seed,
        default_schedule=None if default is None else default.schedule,
        control_wins=" and ".join(row.schedule for row in pruned if _loses_to_control(row, rows)),
        accuracy_picture=ACCURACY_PICTURE,
        kept_picture=KEPT_TOKENS_PICTURE if KEPT_TOKENS_PICTURE in pictures else None,
        example=(pruned or rows)[0],
        training=_training(results.training) if results.training else None,
        limits=_limits(results),
        weights_license=_license(
            results.weights_license, "neither the publisher nor the card of the base checkpoint names one"
        ),
        data_license=_license(results.dataset_license, "neither the publisher nor the card of the data set names one"),
    )


def eval_results_files(results: PublishedResults) -> dict[str, str]:
    """
    Content of the `.eval_results/*.yaml` files by path, one for each schedule; empty if the images are not known to be
    a data set of the Hub, which the format asks for. Values are top-1 in percent.
    """
    dataset_id = results.dataset_hub_id
    if dataset_id is None:
        return {}
    files = {}
    for row in _rows_of_model(results):
        entry = EvalResultEntry(
            dataset_id=dataset_id,
            task_id="default",
            value=row.top1,
            notes=(
                f"Top-1 accuracy in percent on {row.num_images} images"
                f"{_of_split(results.dataset_split)} of {results.dataset}; schedule {row.schedule}: "
                f"{_tokens(row, _is_merging(results))}; "
                f"{row.gflops:.4f} GFLOPs"
            ),
        )
        name = "".join(letter if letter.isalnum() else "-" for letter in row.schedule)
        text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, width=1000)
        files[f".eval_results/tnt-hf-{name}.yaml"] = text
    return files


def _metadata(results: PublishedResults, repo_id: str) -> ModelCardData:
    training = results.training or {}
    dataset_ids = [training.get("dataset_hub_id"), results.dataset_hub_id]
    base_model = training.get("base_model_hub_id")
    eval_results = [
        EvalResult(
            task_type="image-classification",
            task_name="Image classification",
            dataset_type=results.dataset_hub_id or "imagefolder",
            dataset_name=results.dataset,
            dataset_split=results.dataset_split,
            metric_type="accuracy",
            metric_name=f"Top-{k} accuracy (%), schedule {row.schedule}",
            metric_value=getattr(row, f"top{k}"),
        )
        for row in _rows_of_model(results)
        for k in (1, 5)
    ]
    return ModelCardData(
        license=results.weights_license or "unknown",
        library_name="transformers",
        pipeline_tag="image-classification",
        base_model=base_model,
        datasets=list(dict.fromkeys(name for name in dataset_ids if name)) or None,
        metrics=["accuracy"],
        tags=["vision", "custom_code", "token-pruning", "arxiv:2411.18092"],
        model_name=repo_id.split("/")[-1],
        eval_results=eval_results,
        **({} if base_model is None else {"base_model_relation": "finetune"}),
    )


def _rows_of_model(results: PublishedResults) -> list[ResultRow]:
    """The rows of the model itself, those of the random control left out; the stored schedule comes first."""
    rows = [row for row in results.rows if row.selection != "random"]
    return sorted(rows, key=lambda row: not _is_stored(row, results.checkpoint["schedule"]))


def _is_stored(row: ResultRow, schedule: dict[str, Any]) -> bool:
    is_unpruned = not row.prune_layers and not schedule["prune_layers"]
    return row.selection != "random" and (is_unpruned or row.to_schedule().settings == schedule)


def _loses_to_control(row: ResultRow, rows: Sequence[ResultRow]) -> bool:
    return any(
        other.selection == "random" and other.schedule == row.schedule and other.top1 >= row.top1 for other in rows
    )


def _reduction(checkpoint: dict[str, Any]) -> str:
    if checkpoint["token_reduction"] == "drop":
        return "drops the patch tokens that its scoring heads rank lowest"
    merges = "merges patch tokens into those that they resemble most"
    if checkpoint["token_reduction"] == "cluster":
        return merges
    return f"{merges}, the sooner the lower its scoring heads rank them" if checkpoint["relevance_weight"] else merges


def _size(checkpoint: dict[str, Any]) -> str:
    height, width = checkpoint["image_size"]
    return (
        f"It has {checkpoint['num_parameters']:,} parameters and takes images of {height}x{width} pixels as "
        f"{checkpoint['num_patches']} patches."
    )


def _scope(classes: list[str]) -> str:
    if len(classes) > 20:
        return f"its {len(classes)} classes, listed in `config.json`"
    return f"these {len(classes)} classes: {', '.join(map(_plain, classes))}"


def _is_merging(results: PublishedResults) -> bool:
    return results.checkpoint["token_reduction"] != "drop"


def _table(results: PublishedResults) -> str:
    rows = [
        [
            f"{row.schedule} (unpruned)" if row.selection == "none" else row.schedule,
            _tokens(row, _is_merging(results)),
            SELECTION_NAMES[row.selection],
            f"{row.top1:.2f}",
            f"{row.top5:.2f}",
            f"{row.gflops:.4f}",
            f"{row.images_per_second:.1f}",
        ]
        for row in results.rows
    ]
    header = ["schedule", "tokens", "selection", "top-1 %", "top-5 %", "GFLOPs", "images/s"]
    return markdown_table(header, ([_plain(cell) for cell in cells] for cells in rows))


def _tokens(row: ResultRow, is_merging: bool) -> str:
    if not row.prune_layers:
        return "all kept"
    layers = [f"{rate:g} kept after layer {layer}" for layer, rate in zip(row.prune_layers, row.keep_rates)]
    merged = ["the others merged"] if is_merging else []
    by_similarity = "by similarity alone" if is_merging else "similar dropped"
    similar = [f"{row.num_similar_tokens} {by_similarity}"] if row.num_similar_tokens else []
    return ", ".join(layers + merged + similar)


def _measured(results: PublishedResults) -> str:
    versions = results.versions
    facts = [
        f"{results.rows[0].num_images} images{_of_split(results.dataset_split)} of {_plain(results.dataset)}",
        f"{results.device}, {results.num_threads} CPU threads",
        results.dtype,
        f"batch {results.batch_size}",
        *(f"{name} {versions[name]}" for name in ("torch", "transformers", "tnt-hf") if name in versions),
    ]
    return f"Measured: {', '.join(facts)}. Images per second count the forward pass alone."


def _of_split(split: str | None) -> str:
    return f" of the {split} split" if split else ""


def _training(training: dict[str, Any]) -> str:
    """The training section as a paragraph and a list; what a results file does not hold is left out."""
    base = training.get("base_model_hub_id")
    name = f"[{base}](https://huggingface.co/{base})" if base else f"the local checkpoint `{training['base_model']}`"
    if training.get("base_model_revision"):
        name += f" at commit `{training['base_model_revision']}`"
    trained, adapted_to = training["trained"], training.get("adaptation_schedules")
    what = {"scoring heads": "The scoring heads", "all weights": "All weights"}.get(trained, trained)
    how = f"on the frozen weights of {name}" if trained == "scoring heads" else f"starting from {name}"
    first = f"{what} ({training['num_trained_parameters']} parameters) were trained {how}"
    if adapted_to:
        first += f" to give its unpruned answers under {', '.join(adapted_to)}, no labels read"
    elif training.get("self_distillation"):
        first += " to match its own answers without noise, no labels read"
    split = _of_split(training.get("dataset_split"))
    images = f"{training['num_images']} images{split} of {_plain(training['dataset'])}"
    recipe = {
        "steps": training.get("num_steps"),
        "epochs": training.get("num_epochs") and f"{training['num_epochs']:.2f}",
        "images in a step": training.get("images_per_step"),
        "augmentation": training.get("augmentation"),
        "optimiser": training.get("optimizer"),
        "learning rate": training.get("learning_rate"),
        "schedule of the learning rate": training.get("lr_scheduler"),
        "warm-up steps": training.get("warmup_steps"),
        "weight decay": training.get("weight_decay"),
        "label smoothing": training.get("label_smoothing") or None,
        "moving average of what learns (`ema_decay`)": training.get("ema_decay") or None,
        "precision": training.get("precision"),
        "seed": training.get("seed"),
        **{f"`{name}`": training.get(name) for name in TRAINING_SETTINGS if not (adapted_to and "noise" in name)},
        f"mean training loss{'' if adapted_to else ' of the noisy network'}": training.get("loss")
        and f"{training['loss']:.4f}",
    }
    lines = "".join(f"- {what}: {value}\n" for what, value in recipe.items() if value is not None)
    return f"{first}, on {images}.\n\n{lines}".rstrip()


def _limits(results: PublishedResults) -> str:
    classes, rows = results.checkpoint["classes"], results.rows
    candidates = results.num_candidate_classes
    lines = [
        f"Every image gets one of the {len(classes)} classes, whatever it shows.",
        *([f"Accuracy was measured with answers among {candidates} of these classes alone."] if candidates else []),
        f"Accuracy was measured on {rows[0].num_images} images of {_plain(results.dataset)} and nowhere else; "
        "on images that differ from these it may be lower.",
        "Pruning can cost some classes and some kinds of images more than the average in the table shows.",
        "It inherits the biases of its base checkpoint and of the data. No evaluation by group of people, place or "
        "origin of the images was made: make one before any use that affects people.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _license(identifier: str | None, reason: str) -> str:
    if identifier in (None, "unknown"):
        return f"unknown; {reason}. Ask the publisher before you use them."
    return f"`{identifier}`."


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _plain(text: str) -> str:
    """Text as it is written: no line break, and nothing that Markdown or HTML would take for its own."""
    return " ".join(re.sub(r"([\\`*\[\]<>|$])", r"\\\1", str(text)).split())


__all__ = ["ACCURACY_PICTURE", "KEPT_TOKENS_PICTURE", "eval_results_files", "make_card"]
