"""
Images as a training draws them: shuffled, augmented, mixed, and the broken ones left out.

Every draw has a seed of its own, so that what a step sees does not depend on whether the run was interrupted. Nor does
it depend on the number of workers, unless the images are a stream, nor, before images are mixed within the batch of a
process, on the number of processes.
"""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from PIL import Image as PILImage
from timm.data import Mixup, create_transform
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset as TorchIterableDataset
from torch.utils.data import Sampler, get_worker_info
from torchvision.transforms import Compose, Normalize, RandomHorizontalFlip
from transformers import BaseImageProcessor, default_data_collator

from ..data import BadData, DataArguments, decode_image, input_size, pixel_values_of, read_stream, shard_of


BAD_IMAGES_NAME = "bad_images.jsonl"
PROBED_COLOURS = ((40, 120, 200), (220, 90, 10))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python's, NumPy's and PyTorch's generators of the CPU start from `seed`; afterwards they are as they were."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


class SeededDraws(Sampler[tuple[int, int]]):
    """
    Which image comes when, and the seed of its augmentation: pairs of both, a new order every epoch.

    With repeated augmentation (arXiv 1901.09335) an image comes `num_repeats` times in a row, and an epoch has as many
    draws as without, as in the authors' recipe.
    """

    def __init__(self, num_images: int, seed: int, num_repeats: int = 1):
        self.num_images = num_images
        self.seed = seed
        self.num_repeats = num_repeats
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_images

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = np.random.default_rng((self.seed, self.epoch))
        order = generator.permutation(self.num_images).repeat(self.num_repeats)[: self.num_images]
        seeds = generator.integers(2**32, size=self.num_images)
        return zip(order.tolist(), seeds.tolist())


class BadImages:
    """
    The images of a training set that cannot be read, named in a file that all processes and workers append to.

    Args:
        path (`Path`): The file, one JSON object for each image with `image`, its name, and `error`.
        num_images (`int`): Size of the training set, or how many images of a stream a run draws.
        max_share (`float`): The share of it that may be bad.
    """

    def __init__(self, path: Path, num_images: int, max_share: float):
        self.path = path
        self.num_images = num_images
        self.max_share = max_share

    def add(self, name: int | str, error: BadData) -> None:
        """
        Args:
            name (`int` or `str`): The index in the training set, or where it came in a stream.
            error (`BadData`): Why it cannot be read.

        Raises:
            BadData: If this one is one too many.
        """
        known = self.names()
        if name not in known:
            known.add(name)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write("\n" + json.dumps({"image": name, "error": str(error)}))
        if len(known) > self.max_share * self.num_images:
            raise BadData(
                f"{len(known)} of {self.num_images} training images cannot be read, more than --max_bad_images "
                f"{self.max_share:g} allows; {self.path} names them. The last one: {error}"
            )

    def names(self) -> set[int | str]:
        """The bad images so far."""
        known = set()
        for line in self.path.read_text().splitlines() if self.path.is_file() else []:
            with suppress(ValueError):  # an empty line, or one that was being written when a run was killed
                known.add(json.loads(line)["image"])
        return known


class TrainingImages(TorchDataset):
    """
    The examples of the draws of [`SeededDraws`]: `pixel_values`, `labels` if there are, and the `seed` of the draw.

    In the place of an image that cannot be read stands the next one that can.
    """

    def __init__(self, images: Dataset, transform: Callable[[Any], torch.Tensor], bad_images: BadImages):
        self.images = images
        self.transform = transform
        self.bad_images = bad_images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, draw: tuple[int, int]) -> dict[str, Any]:
        index, seed = draw
        record, image = self._read(index)
        return _example(record, image, seed, self.transform)

    def _read(self, index: int) -> tuple[dict[str, Any], Any]:
        for shift in range(len(self)):
            position = (index + shift) % len(self)
            record = self.images[position]
            try:
                return record, decode_image(record["image"])
            except BadData as error:
                self.bad_images.add(position, error)
        raise BadData(f"None of the {len(self)} training images can be read: see {self.bad_images.path}.")


class StreamedTrainingImages(TorchIterableDataset):
    """
    The examples of an endless stream: epoch after epoch, each in another order.

    Every process and worker reads shards of its own through a shuffle buffer of its own; what they draw depends on how
    many there are, and on nothing else. Images that cannot be read are left out, and counted each time they come. The
    first `num_skipped_batches` of a process, those before the point where a run continues, come undecoded, as empty
    examples.

    Args:
        images (`IterableDataset`): Records with `image` and perhaps `label`.
        transform (`Callable`): PIL image -> tensor.
        bad_images ([`BadImages`]): Where images that cannot be read are named.
        seed (`int`): Seed of the order and of the augmentation.
        batch_size (`int`): Examples in a batch of the loader.
        buffer_size (`int`): Records that a worker draws from.
        num_repeats (`int`): How often an image comes in a row.
        process_index, num_processes (`int`): Which share of the stream this one reads.
    """

    def __init__(
        self,
        images: IterableDataset,
        transform: Callable[[Any], torch.Tensor],
        bad_images: BadImages,
        *,
        seed: int,
        batch_size: int,
        buffer_size: int,
        num_repeats: int = 1,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        self.images = split_dataset_by_node(images, rank=process_index, world_size=num_processes)
        self.transform = transform
        self.bad_images = bad_images
        self.seed = seed
        self.batch_size = batch_size
        self.buffer_size = buffer_size
        self.num_repeats = num_repeats
        self.process_index = process_index
        self.num_skipped_batches = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """
        Raises:
            BadData: If too many images cannot be read, or none of an epoch, or a shard is broken.
        """
        worker = get_worker_info()
        index, num_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        num_skipped = self.batch_size * len(range(index, self.num_skipped_batches, num_workers))
        known = self.bad_images.names()
        num_drawn = 0
        for epoch in count():
            num_before = num_drawn
            for number, record in enumerate(self._records(epoch)):
                name = f"record {number} of epoch {epoch} in worker {index} of process {self.process_index}"
                if name in known:
                    continue
                image = None
                if num_drawn + self.num_repeats > num_skipped:
                    try:
                        image = decode_image(record["image"])
                    except BadData as error:
                        self.bad_images.add(name, BadData(f"{error}{shard_of(record)}"))
                        continue
                for position in range(num_drawn, num_drawn + self.num_repeats):
                    seed = _seed(self.seed, self.process_index, index, position)
                    yield {} if position < num_skipped else _example(record, image, seed, self.transform)
                num_drawn += self.num_repeats
            if num_drawn == num_before:
                raise BadData(
                    "A process that reads the stream found no image in its share that can be read: lower "
                    f"--dataloader_num_workers, or mend the images that {self.bad_images.path} names, if any."
                )

    def _records(self, epoch: int) -> Iterator[dict[str, Any]]:
        # not set_epoch, which reaches all workers at once, wherever they are
        return read_stream(self.images.shuffle(seed=_seed(self.seed, epoch), buffer_size=self.buffer_size))


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _example(
    record: dict[str, Any], image: Any, seed: int, transform: Callable[[Any], torch.Tensor]
) -> dict[str, Any]:
    with seeded(seed):
        example = {"pixel_values": transform(image), "seed": seed}
    if "label" in record:
        example["labels"] = record["label"]
    return example


def training_transform(image_processor: BaseImageProcessor, arguments: DataArguments) -> Callable[[Any], torch.Tensor]:
    """
    PIL image -> tensor of shape `(num_channels, height, width)`, as `--train_augmentation` says: as the image
    processor makes it, after a flip, or by timm's random resized crop, flip, AutoAugment policy, colour jitter and
    random erasing.

    Raises:
        ValueError: If timm does not know the AutoAugment policy, or crops would have other values than the image
            processor gives them.
    """
    if arguments.train_augmentation != "crop":
        flip = RandomHorizontalFlip(0.5 if arguments.train_augmentation == "flip" else 0.0)
        return partial(_flip_and_process, flip, image_processor)
    if not all(_crops_like(image_processor, colour) for colour in PROBED_COLOURS):
        raise ValueError(
            f"--train_augmentation must be flip or none with this {type(image_processor).__name__}, got crop: crops "
            "get their values by do_rescale, rescale_factor, do_normalize, image_mean and image_std alone, and the "
            "image processor makes others."
        )
    try:
        return _crop(image_processor, arguments)
    except (AssertionError, KeyError, ValueError) as error:
        if arguments.auto_augment is None:
            raise
        raise ValueError(
            f"--auto_augment must be a policy of timm such as rand-m9-mstd0.5-inc1, got {arguments.auto_augment}."
        ) from error


def _crop(image_processor: BaseImageProcessor, arguments: DataArguments) -> Compose:
    white = 255 * (image_processor.rescale_factor if image_processor.do_rescale else 1)
    is_normalized = image_processor.do_normalize
    mean = np.broadcast_to(image_processor.image_mean if is_normalized else 0.0, 3) / white
    std = np.broadcast_to(image_processor.image_std if is_normalized else 1.0, 3) / white
    # random erasing draws noise of mean 0 and deviation 1, AutoAugment fills with the mean: not in units of any kind
    is_usual = np.all((0 <= mean) & (mean <= 1) & (0.1 <= std) & (std < 1))
    transform = create_transform(
        input_size(image_processor),
        is_training=True,
        auto_augment=arguments.auto_augment,
        color_jitter=arguments.color_jitter,
        re_prob=arguments.random_erasing,
        re_mode="pixel",
        interpolation="bicubic",
        mean=tuple(mean.tolist()) if is_usual else (0.5,) * 3,
        std=tuple(std.tolist()) if is_usual else (0.5,) * 3,
    )
    return transform if is_usual else Compose([*transform.transforms, Normalize(2 * mean - 1, 2 * std)])


def _crops_like(image_processor: BaseImageProcessor, colour: tuple[int, int, int]) -> bool:
    """Whether crops of a picture of one colour have the values that the image processor gives it."""
    height, width = input_size(image_processor)
    image = PILImage.new("RGB", (2 * width, 2 * height), colour)  # a smaller one may be padded
    expected = pixel_values_of(image_processor, image)[0].double()
    try:
        with seeded(0), np.errstate(all="ignore"):
            made = _crop(image_processor, DataArguments())(image).double()
    except (AttributeError, TypeError, ValueError, ZeroDivisionError):  # it lacks these fields, or has others in them
        return False
    tolerance = 1e-5 * expected.abs().max().item()
    return made.shape == expected.shape and torch.allclose(made, expected, rtol=1e-4, atol=tolerance)


def _flip_and_process(
    flip: RandomHorizontalFlip, image_processor: BaseImageProcessor, image: PILImage.Image
) -> torch.Tensor:
    return image_processor(flip(image), return_tensors="pt")["pixel_values"][0].float()


class MixingCollator:
    """
    Examples -> batch; with mixup (arXiv 1710.09412), CutMix (arXiv 1905.04899) or label smoothing the labels become
    class probabilities of shape `(batch_size, num_labels)`.
    """

    def __init__(self, arguments: DataArguments, label_smoothing: float, num_labels: int):
        self.label_smoothing = label_smoothing
        is_mixing = arguments.mixup > 0 or arguments.cutmix > 0
        self.mix = None
        if is_mixing or label_smoothing > 0:
            self.mix = Mixup(
                mixup_alpha=arguments.mixup,
                cutmix_alpha=arguments.cutmix,
                prob=1.0 if is_mixing else 0.0,
                label_smoothing=label_smoothing,
                num_classes=num_labels,
            )

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if not examples[0]:
            return {}  # a batch that a continued run skips
        seed, num_examples = examples[0]["seed"], len(examples)
        if self.mix is not None and num_examples % 2:
            examples = [*examples, examples[0]]  # mixing pairs them
        batch = default_data_collator([{**example, "seed": None} for example in examples])
        if self.mix is None:
            return batch
        labels = batch.get("labels", torch.zeros(len(examples), dtype=torch.long))
        with seeded(seed):
            mixed = dict(zip(("pixel_values", "labels"), self.mix(batch["pixel_values"], labels)))
        return {name: mixed[name][:num_examples] for name in batch}


__all__ = [
    "BAD_IMAGES_NAME",
    "BadImages",
    "MixingCollator",
    "SeededDraws",
    "StreamedTrainingImages",
    "TrainingImages",
    "training_transform",
]
