"""What a step of the scoring heads costs beside fine-tuning and a forward pass, and whether the images keep up."""

import copy
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from datasets import Dataset, Image
from PIL import Image as PILImage
from torch import nn
from torch.utils.data import DataLoader

from tnt_hf.conversion import evaluation_image_processor, load_research_checkpoint, to_plain_model
from tnt_hf.data import DataArguments
from tnt_hf.results import device_facts
from tnt_hf.schedules_tnt import height_and_width
from tnt_hf.timing import peak_memory, timed
from tnt_hf.training import BadImages, MixingCollator, SeededDraws, TrainingImages, training_transform

from .inference import keep_freed_memory, return_freed_memory


IMAGE_SIZE = (500, 375)  # the typical size of ImageNet's files
AUGMENTATIONS = {
    "random resized crop": {},
    "the authors' recipe": {
        "auto_augment": "rand-m9-mstd0.5-inc1",
        "color_jitter": 0.3,
        "random_erasing": 0.25,
        "repeated_augmentation": 3,
        "mixup": 0.8,
        "cutmix": 1.0,
    },
}


@dataclass
class TrainingBenchmarkArguments:
    """What to measure."""

    architecture: str = field(
        default="deit_small_distilled_patch16_224",
        metadata={"help": "timm's name of a ViT or distilled DeiT; its weights are random, which costs the same."},
    )
    batch_size: int = field(default=16, metadata={"help": "Images in a step."})
    num_rounds: int = field(default=5, metadata={"help": "Interleaved rounds; the median is reported."})
    num_images: int = field(default=256, metadata={"help": "Images read for the rate of the input pipeline."})
    num_workers: int = field(default=0, metadata={"help": "Processes that read images."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder for training.json."})

    def __post_init__(self):
        for name in ("batch_size", "num_rounds", "num_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")
        if self.architecture not in timm.list_models("*vit*") + timm.list_models("deit*"):
            raise ValueError(f"--architecture must be timm's name of a ViT or DeiT, got {self.architecture!r}.")


def run_training_benchmark(arguments: TrainingBenchmarkArguments) -> dict[str, Any]:
    """
    Measure, on the CPU and in interleaved rounds, a step on the same images: of the scoring heads on frozen weights
    (`"heads"`), the same with activations computed again instead of kept (`"heads, checkpointing"`) or with the
    answers of the network as target (`"heads, self-distillation"`), of all weights of the plain model
    (`"fine-tuning"`), each with AdamW; and its forward pass alone (`"forward"`).

    Returns:
        `dict`: Device facts; `rows`, one for each kind of step, with `seconds`, `images_per_second`, `peak_memory_mb`
        above the model, optimizer state included, `num_trained_parameters`, and `time_ratio` and `memory_ratio` to
        fine-tuning in the same rounds; and `input_rows`, one for each augmentation, with the `images_per_second` that
        the input pipeline reads from JPEG files of ImageNet's size with `num_workers`.
    """
    torch.manual_seed(0)
    device = torch.device("cpu")
    original = timm.create_model(arguments.architecture)
    heads = load_research_checkpoint(original.state_dict())
    config = heads.config
    images = torch.randn(arguments.batch_size, 3, *height_and_width(config.image_size))
    labels = torch.randint(config.num_labels, (arguments.batch_size,))
    plain = to_plain_model(heads)
    heads.freeze_backbone()
    return_freed_memory()
    for step in _steps(heads, plain, images[:1], labels[:1]).values():
        step()  # what the process loads once is of no step
    steps, peaks = _steps(heads, plain, images, labels), {}
    for name, step in steps.items():
        _, peaks[name] = peak_memory(partial(_twice, step), device)
    keep_freed_memory()  # for the times; memory that is kept would hide the peaks
    seconds = {name: [] for name in steps}
    for _ in range(arguments.num_rounds):
        for name, step in steps.items():
            seconds[name].append(timed(step, device)[1])
    trained = {"fine-tuning": plain, "forward": None}
    rows = []
    for name in steps:
        ratios = [own / full for own, full in zip(seconds[name], seconds["fine-tuning"])]
        model = trained.get(name, heads)
        rows.append(
            {
                "step": name,
                "seconds": statistics.median(seconds[name]),
                "images_per_second": arguments.batch_size / statistics.median(seconds[name]),
                "peak_memory_mb": None if peaks[name] is None else peaks[name] / 2**20,
                "num_trained_parameters": 0 if model is None else _num_trained(model),
                "time_ratio": statistics.median(ratios),
                "memory_ratio": None if peaks[name] is None else peaks[name] / peaks["fine-tuning"],
            }
        )
    return {
        "architecture": arguments.architecture,
        **device_facts(device),
        "dtype": "float32",
        "batch_size": arguments.batch_size,
        "num_rounds": arguments.num_rounds,
        "num_workers": arguments.num_workers,
        "rows": rows,
        "input_rows": [_input_row(name, arguments, config) for name in AUGMENTATIONS],
    }


def _steps(
    heads: nn.Module, plain: nn.Module, images: torch.Tensor, labels: torch.Tensor
) -> dict[str, Callable[[], None]]:
    heads_step = _step(heads, partial(_label_loss, heads, images, labels))
    return {
        "heads": heads_step,
        "heads, checkpointing": partial(_with_checkpointing, heads, heads_step),
        "heads, self-distillation": _step(heads, partial(_distillation_loss, heads, images)),
        "fine-tuning": _step(plain, partial(_plain_loss, plain, images, labels)),
        "forward": partial(_forward, plain, images),
    }


def _step(model: nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-6)

    def step():
        model.train()
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _with_checkpointing(model: nn.Module, step: Callable[[], None]) -> None:
    model.gradient_checkpointing_enable()
    step()
    model.gradient_checkpointing_disable()


def _twice(step: Callable[[], None]) -> None:
    """The first step makes the state of the optimizer, the second has it beside gradients and activations."""
    step()
    step()


def _label_loss(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return model(images, labels=labels).loss


def _distillation_loss(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        expected = model(images).logits.log_softmax(dim=-1)
    answer = model.train()(images).logits.log_softmax(dim=-1)
    return nn.functional.kl_div(answer, expected, reduction="batchmean", log_target=True)


def _plain_loss(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(images).logits, labels)


@torch.no_grad()
def _forward(model: nn.Module, images: torch.Tensor) -> None:
    model.eval()(images)


def _num_trained(model: nn.Module) -> int:
    return sum(value.numel() for value in model.parameters() if value.requires_grad)


def _input_row(name: str, arguments: TrainingBenchmarkArguments, config: Any) -> dict[str, Any]:
    data_arguments = DataArguments(**AUGMENTATIONS[name])
    image_processor = evaluation_image_processor(height_and_width(config.image_size))
    split = _jpeg_images(arguments.num_images)
    with tempfile.TemporaryDirectory() as folder:
        images = TrainingImages(
            split,
            training_transform(image_processor, data_arguments),
            BadImages(Path(folder) / "bad_images.jsonl", len(split), 0.0),
        )
        loader = DataLoader(
            images,
            batch_size=arguments.batch_size,
            sampler=SeededDraws(len(images), 0, data_arguments.repeated_augmentation),
            collate_fn=MixingCollator(data_arguments, 0.1, config.num_labels),
            num_workers=arguments.num_workers,
        )
        start = time.perf_counter()
        for _ in loader:
            pass
        seconds = time.perf_counter() - start
    return {"augmentation": name, "images_per_second": arguments.num_images / seconds}


def _jpeg_images(num_images: int) -> Dataset:
    """Files of ImageNet's usual size in pixels, smooth enough to take as many bytes as photographs."""
    generator = torch.Generator().manual_seed(0)
    width, height = IMAGE_SIZE
    coarse = torch.randn(8, 3, height // 8, width // 8, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")
    records = []
    for picture in (smooth * 50 + 128).clamp(0, 255).byte():
        file = io.BytesIO()
        PILImage.fromarray(picture.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=90)
        records.append({"bytes": file.getvalue(), "path": None})
    records = [copy.copy(records[index % len(records)]) for index in range(num_images)]
    dataset = Dataset.from_dict({"image": records, "label": [0] * num_images})
    return dataset.cast_column("image", Image(decode=False))


__all__ = ["TrainingBenchmarkArguments", "run_training_benchmark"]
