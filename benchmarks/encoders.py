"""
What token reduction changes in tasks other than classification: an encoder under schedules, beside itself unreduced.

    python -m benchmarks.encoders --model models/dinov2_encoder --images data/photos/validation \
        --output_dir benchmarks/results/encoders

The encoder is one of Transformers that `tnt_hf.encoders` reduces. Its embedding of an image is what it pools, else its
[CLS] token, else the mean over its patches. Compared are embeddings, retrieval from an index of unreduced ones, the
features of patches after they are put back on the grid and, if a decoder lies beside the encoder as `python -m
benchmarks.saliency_network` writes it, saliency maps. `full@0.7` is smaller images alone, `2x@0.875` half of the
compute spent on smaller images: their patches are laid out on the grid of the whole ones, linearly between their
centres. A model that reads texts too, such as CLIP, also classifies the photographs zero-shot. With `--adaptation` the
schedules come a second time, of the encoder that `python -m benchmarks.encoder_adaptation` adapted, compared with the
original unreduced as well. Schedules run in turn on each batch, so that a load on the machine falls on all of them
alike.
"""

import inspect
import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from operator import gt
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModel, PreTrainedModel

from tnt_hf.adaptation import ADAPTATION_NAME, set_adaptation
from tnt_hf.command_line import clear_errors, parse_recipe_and_flags
from tnt_hf.conversion import load_image_processor
from tnt_hf.data import DataArguments, class_names, input_size, load_images
from tnt_hf.encoders import count_layer_gflops, reduce_tokens, restore_tokens
from tnt_hf.encoders.families import known_encoder
from tnt_hf.named_schedules import FlopsReduction, parse_schedule, share_in_pixels
from tnt_hf.results import (
    RESULTS_NAME,
    check_no_results,
    device_facts,
    file_digest,
    recorded_training,
    weights_digests,
    write_json,
)
from tnt_hf.schedules_tnt import UNPRUNED, Schedule, height_and_width
from tnt_hf.timing import timed

from .real import decode_photographs, divergences, format_rows, percent, standard_error
from .saliency_network import DECODER_NAME, SaliencyDecoder, load_saliency_decoder
from .zero_shot import ZeroShotClassifier, class_prompts, load_tokenizer, reads_texts


SCHEDULES = ["full", "1.4286x", "2x", "2x@0.875", "full@0.7", "2.8572x", "2.8572x@0.75", "full@0.6"]
NUM_NEIGHBOURS = 10
RECALL_AT = (1, 5)


@dataclass
class EncoderBenchmarkArguments:
    """Which encoder to evaluate on which photographs."""

    model: str = field(metadata={"help": "Folder or Hub id of a vision encoder of Transformers."})
    images: str = field(metadata={"help": "Photographs, one subfolder for each class."})
    schedules: list[str] = field(
        default_factory=lambda: list(SCHEDULES),
        metadata={
            "help": "Schedules to evaluate: full, a reduction of the layers' compute such as 2x, or LAYERS:RATES; "
            "with @SIZE behind it on smaller images, of so many pixels or such a share of the side."
        },
    )
    adaptation: str | None = field(
        default=None,
        metadata={"help": f"An {ADAPTATION_NAME}, or the folder of one: evaluate the adapted encoder as well."},
    )
    prompt: str = field(
        default="a photo of a {}.",
        metadata={"help": "What a model that reads texts is told of each class, with {} for its name."},
    )
    class_names: str | None = field(
        default=None,
        metadata={"help": "JSON file that maps folders to the names of their classes; by default they are the names."},
    )
    output_dir: str | None = field(default=None, metadata={"help": "Folder for results.json."})
    max_images: int | None = field(default=None, metadata={"help": "Use as many photographs, drawn."})
    batch_size: int = field(default=8, metadata={"help": "Photographs in a forward pass."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace results in the output folder."})

    def __post_init__(self):
        if "{}" not in self.prompt:
            raise ValueError(f"--prompt must have {{}} where the name of the class is, got {self.prompt!r}.")


@dataclass(frozen=True)
class Features:
    """
    What an encoder makes of images.

    Args:
        embeddings (`torch.Tensor` of shape `(batch_size, embedding_size)`): Of the images.
        patches (`torch.Tensor` of shape `(batch_size, num_patches, hidden_size)`): Of all patches, row by row.
        maps (`torch.Tensor` of shape `(batch_size, height * width)`, *optional*): Saliency of the pixels.
        logits (`torch.Tensor` of shape `(batch_size, num_classes)`, *optional*): Of zero-shot classification.
    """

    embeddings: torch.Tensor
    patches: torch.Tensor
    maps: torch.Tensor | None = None
    logits: torch.Tensor | None = None


@dataclass
class _Entry:
    name: str
    schedule: Schedule | None  # None is the model as it was loaded
    image_size: tuple[int, int]
    adaptation: Path | None = None
    embeddings: list[torch.Tensor] = field(default_factory=list)
    answers: list[torch.Tensor] = field(default_factory=list)
    figures: list[dict[str, torch.Tensor]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def run_encoder_benchmark(arguments: EncoderBenchmarkArguments) -> dict[str, Any]:
    """
    Evaluate the encoder under all schedules.

    Raises:
        ValueError: If the model is no encoder whose tokens can be reduced, or reads texts without a tokenizer, a
            schedule or the adaptation does not fit it, or the photographs have no classes, none that a text can name,
            or are too few; before any evaluation.
        FileNotFoundError: If there is no such adaptation.
    """
    check_no_results(arguments.output_dir, arguments.overwrite_output_dir)
    model, decoder = load_encoder(arguments.model), load_saliency_decoder(arguments.model)
    if arguments.class_names is not None and not reads_texts(model):
        raise ValueError(f"--class_names is for models that read texts, which {type(model).__name__} does not.")
    tokenizer = load_tokenizer(arguments.model) if reads_texts(model) else None
    image_processor = load_image_processor(arguments.model)
    image_size = input_size(image_processor)
    entries = [_Entry("unreduced", None, image_size)]
    entries += [_entry(model, text, image_size) for text in arguments.schedules]
    adaptation = None
    if arguments.adaptation is not None:
        adaptation = Path(arguments.adaptation)
        adaptation = adaptation / ADAPTATION_NAME if adaptation.is_dir() else adaptation
        set_adaptation(model, adaptation, adapted=False)  # which checks that it fits
        entries += [_Entry(each.name, each.schedule, each.image_size, adaptation) for each in entries[1:]]
    data = DataArguments(validation_dir=arguments.images, max_eval_samples=arguments.max_images)
    images = load_images(data, train=False, validation=True)["validation"]
    if len(images) <= NUM_NEIGHBOURS:
        raise ValueError(f"--images must hold more than {NUM_NEIGHBOURS} photographs, got {len(images)}.")
    prompts = classifier = None
    if tokenizer is not None:
        prompts = class_prompts(class_names(images), arguments.prompt, arguments.class_names)
        classifier = ZeroShotClassifier.of(model, tokenizer, prompts)
    pixel_values = decode_photographs(image_processor, images["image"])
    _evaluate(model, decoder, classifier, pixel_values, entries, arguments.batch_size)
    full = count_layer_gflops(model, image_size=image_size)
    shares = [
        count_layer_gflops(model, each.schedule or UNPRUNED, image_size=each.image_size) / full for each in entries
    ]
    return {
        "model": Path(arguments.model).name,
        "weights": weights_digests(arguments.model),
        "saliency_decoder_sha256": decoder and file_digest(Path(arguments.model) / DECODER_NAME),
        "adaptation_sha256": adaptation and file_digest(adaptation),
        "training": adaptation and recorded_training(adaptation.parent),
        "prompts": prompts,
        "dataset": data.source,
        "num_images": len(images),
        "image_size": [*image_size],
        **device_facts(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch_size": arguments.batch_size,
        "layer_gflops_unreduced": full,
        "rows": _rows(entries, shares, torch.tensor(images["label"])),
    }


def load_encoder(name_or_path: str) -> PreTrainedModel:
    """
    An encoder of images, or of images and texts in one space, in evaluation mode, without its pooler if the checkpoint
    has no weights of one.

    Raises:
        ValueError: If other weights are missing, or the model reads something else or has no encoder whose tokens can
            be reduced.
    """
    model, loading = AutoModel.from_pretrained(name_or_path, output_loading_info=True)
    if model.main_input_name != "pixel_values" and not reads_texts(model):
        raise ValueError(
            f"--model {name_or_path} is a {type(model).__name__}, which embeds neither images alone nor images and "
            "texts in one space: save its vision encoder, such as a `CLIPVisionModel`, to a folder of its own."
        )
    if known_encoder(model)[1].is_padded:
        raise ValueError(
            f"--model {name_or_path} is a {type(model).__name__}, which takes images of several sizes padded to one "
            "length: here all images are of one size."
        )
    missing = sorted(loading["missing_keys"])
    if missing and all(name.startswith("pooler.") for name in missing):
        model.pooler = None
    elif missing:
        raise ValueError(f"--model {name_or_path} lacks weights of {type(model).__name__}: {', '.join(missing[:3])}.")
    return model.eval()


def _entry(model: PreTrainedModel, text: str, image_size: tuple[int, int]) -> _Entry:
    """A schedule of images of `image_size`, of which it may make smaller ones."""
    schedule = parse_schedule(text)
    size = image_size if schedule.compute_size is None else schedule.compute_size
    if isinstance(size, float):
        size = share_in_pixels(size, image_size, known_encoder(model)[0].config.patch_size)
    size, schedule = height_and_width(size), replace(schedule, compute_size=None)
    if any(map(gt, size, image_size)):
        raise ValueError(f"Schedule '{text}' must not make images larger, which are of {image_size} pixels.")
    if isinstance(schedule, FlopsReduction):
        whole, smaller = (count_layer_gflops(model, image_size=each) for each in (image_size, size))
        schedule = replace(schedule, factor=max(1.0, schedule.factor * smaller / whole))
    with reduced_tokens(model, schedule, size) as resolved:
        return _Entry(text, resolved, size)


@contextmanager
def reduced_tokens(
    model: PreTrainedModel, schedule: Schedule | FlopsReduction, image_size: tuple[int, int]
) -> Iterator[Schedule]:
    """A model that reduces its tokens for a `with` block; gives what leaves where."""
    schedule = reduce_tokens(model, schedule, image_size=image_size)
    try:
        yield schedule
    finally:
        restore_tokens(model)


@contextmanager
def _as_meant(model: PreTrainedModel, entry: _Entry) -> Iterator[None]:
    """The model as an entry wants it for a `with` block."""
    if entry.adaptation is not None:
        set_adaptation(model, entry.adaptation, adapted=True)
    try:
        is_plain = entry.schedule is None
        with nullcontext() if is_plain else reduced_tokens(model, entry.schedule, entry.image_size):
            yield
    finally:
        if entry.adaptation is not None:
            set_adaptation(model, entry.adaptation, adapted=False)


@torch.inference_mode()
def _evaluate(
    model: PreTrainedModel,
    decoder: SaliencyDecoder | None,
    classifier: ZeroShotClassifier | None,
    pixel_values: torch.Tensor,
    entries: Sequence[_Entry],
    batch_size: int,
) -> None:
    encode(model, decoder, pixel_values[:1])  # to warm up
    for batch in tqdm(pixel_values.split(batch_size), "evaluating", unit="batch"):
        expected = None
        for entry in entries:
            with _as_meant(model, entry):
                features, seconds = encode(model, decoder, batch, entry.image_size, classifier)
            expected = expected or features
            entry.embeddings.append(features.embeddings)
            if features.logits is not None:
                entry.answers.append(features.logits.argmax(dim=-1))
            entry.figures.append(compare(features, expected))
            entry.seconds.append(seconds / len(batch))


def encode(
    model: PreTrainedModel,
    decoder: SaliencyDecoder | None,
    pixel_values: torch.Tensor,
    computed_size: tuple[int, int] | None = None,
    classifier: ZeroShotClassifier | None = None,
) -> tuple[Features, float]:
    """
    Features of images, `(batch_size, num_channels, height, width)`, which the encoder sees at `computed_size` pixels,
    their own if None, and the seconds that it took, without decoder and classifier.

    Raises:
        ValueError: If the encoder gives no token for each patch, as one that masks its images.
    """
    image_size = tuple(pixel_values.shape[-2:])
    computed_size = computed_size or image_size
    patch_size = height_and_width(known_encoder(model)[0].config.patch_size)
    whole_grid, grid = (
        tuple(side // patch for side, patch in zip(size, patch_size)) for size in (image_size, computed_size)
    )
    read_images = model.get_image_features if reads_texts(model) else model.forward
    inputs = {"pixel_values": pixel_values}
    if computed_size != image_size:
        inputs["pixel_values"] = nn.functional.interpolate(pixel_values, computed_size, mode="bicubic", antialias=True)
        if "interpolate_pos_encoding" in inspect.signature(read_images).parameters:
            inputs["interpolate_pos_encoding"] = True
    output, seconds = timed(partial(read_images, **inputs), model.device)
    tokens, embeddings = output.last_hidden_state, output.get("pooler_output")
    num_prefix_tokens = tokens.shape[1] - math.prod(grid)
    if num_prefix_tokens < 0:
        raise ValueError(f"The encoder gives {tokens.shape[1]} tokens of images of {math.prod(grid)} patches.")
    patches = tokens[:, num_prefix_tokens:]
    if embeddings is None:
        embeddings = tokens[:, 0] if num_prefix_tokens > 0 else patches.mean(dim=1)
    if grid != whole_grid:
        maps_of_channels = patches.transpose(1, 2).unflatten(2, grid)
        patches = nn.functional.interpolate(maps_of_channels, whole_grid, mode="bilinear").flatten(2).transpose(1, 2)
    maps = None if decoder is None else decoder(patches, whole_grid, image_size).flatten(1)
    return Features(embeddings, patches, maps, classifier and classifier(embeddings)), seconds


def compare(features: Features, expected: Features) -> dict[str, torch.Tensor]:
    """How near features are to the expected ones: figures for each image, by name."""
    figures = {
        "embedding_cosine": _cosine(features.embeddings, expected.embeddings),
        "patch_cosine": _cosine(features.patches, expected.patches).mean(dim=1),
    }
    if features.maps is not None:
        centred = (each.maps - each.maps.mean(dim=1, keepdim=True) for each in (features, expected))
        figures["saliency_error"] = (features.maps - expected.maps).abs().mean(dim=1)
        figures["saliency_correlation"] = _cosine(*centred)
        figures["saliency_deviation"] = features.maps.std(dim=1)
    if features.logits is not None:
        is_same = features.logits.argmax(dim=-1) == expected.logits.argmax(dim=-1)
        figures["zero_shot_agreement"] = 100 * is_same.double()
        figures["zero_shot_kl"] = divergences(features.logits.double(), expected.logits.double())
    return figures


def _cosine(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return nn.functional.cosine_similarity(left.double(), right.double(), dim=-1)


def nearest_images(queries: torch.Tensor, index: torch.Tensor, number: int) -> torch.Tensor:
    """
    The images of the index that are nearest by cosine to each query, itself left out: twice `(num_images,
    embedding_size)`, of the same images -> `(num_images, number)`, the nearest first.
    """
    queries, index = (nn.functional.normalize(each.double(), dim=-1) for each in (queries, index))
    return (queries @ index.T).fill_diagonal_(-math.inf).topk(number).indices


def _rows(entries: Sequence[_Entry], shares: Sequence[float], labels: torch.Tensor) -> list[dict[str, Any]]:
    index = torch.cat(entries[0].embeddings)
    neighbours = [nearest_images(torch.cat(entry.embeddings), index, NUM_NEIGHBOURS) for entry in entries]
    is_right = [labels[each] == labels.unsqueeze(1) for each in neighbours]
    has_adapted, has_answers = entries[-1].adaptation is not None, len(entries[0].answers) > 0
    rows = []
    for number, (entry, share) in enumerate(zip(entries, shares)):
        row = {"network": "original" if entry.adaptation is None else "adapted"} if has_adapted else {}
        row |= {"schedule": entry.name, **(entry.schedule or UNPRUNED).settings, "share": share}
        row["image_size"] = [*entry.image_size]
        figures = {name: torch.cat([batch[name] for batch in entry.figures]).double() for name in entry.figures[0]}
        for name, share_below in (("median", 0.5), ("5th_percentile", 0.05)):
            row[f"embedding_cosine_{name}"] = figures["embedding_cosine"].quantile(share_below).item()
        for count in RECALL_AT:
            found, expected = (each[:, :count].any(dim=1) for each in (is_right[number], is_right[0]))
            row |= _percent_and_drop(f"recall_at_{count}", found, expected)
        if has_answers:
            found, expected = (torch.cat(each.answers) == labels for each in (entry, entries[0]))
            row |= _percent_and_drop("zero_shot_top1", found, expected)
        is_shared = (neighbours[number].unsqueeze(2) == neighbours[0].unsqueeze(1)).any(dim=2)
        figures["neighbour_overlap"] = 100 * is_shared.double().mean(dim=1)
        for name, values in figures.items():
            row |= {name: values.mean().item(), f"{name}_standard_error": standard_error(values)}
        row["images_per_second"] = 1 / statistics.median(entry.seconds)
        row["speedup"] = statistics.median(entries[0].seconds) / statistics.median(entry.seconds)
        rows.append(row)
    return rows


def _percent_and_drop(name: str, found: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    """How often what was found is right, and by how many points less often than what was expected."""
    drop = 100 * (expected.double() - found.double())
    return {
        name: percent(found),
        f"{name}_drop": drop.mean().item(),
        f"{name}_drop_standard_error": standard_error(drop),
    }


# Of those that the rows have.
COLUMNS = {
    "network": "{}",
    "schedule": "{}",
    "share": "{:.3f}",
    "speedup": "{:.2f}",
    "embedding_cosine": "{:.4f}",
    "embedding_cosine_5th_percentile": "{:.4f}",
    "recall_at_1": "{:.1f}",
    "recall_at_5": "{:.1f}",
    "neighbour_overlap": "{:.1f}",
    "patch_cosine": "{:.4f}",
    "saliency_error": "{:.4f}",
    "saliency_correlation": "{:.4f}",
    "zero_shot_top1": "{:.1f}",
    "zero_shot_top1_drop": "{:.1f}",
    "zero_shot_agreement": "{:.1f}",
    "zero_shot_kl": "{:.4f}",
}


def main() -> None:
    with clear_errors():
        (arguments,) = parse_recipe_and_flags((EncoderBenchmarkArguments,), sys.argv[1:])
        results = run_encoder_benchmark(arguments)
    print(format_rows(results, {name: text for name, text in COLUMNS.items() if name in results["rows"][0]}))
    if arguments.output_dir is None:
        print(json.dumps(results))
    else:
        write_json(Path(arguments.output_dir) / RESULTS_NAME, results)


if __name__ == "__main__":
    main()
