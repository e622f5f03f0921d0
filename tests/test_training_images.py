"""Images as a training draws them."""

import json
import pickle
from itertools import islice

import pytest
import torch
from conftest import naming, noise_split
from datasets import Dataset, Image, IterableDataset
from PIL import Image as PILImage
from timm.data import create_transform
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    EfficientNetImageProcessorPil,
    MobileViTImageProcessorPil,
    ViTImageProcessor,
    ViTImageProcessorPil,
)

from tnt_hf.data import BadData, DataArguments, decode_image, evaluation_images
from tnt_hf.training import (
    BadImages,
    MixingCollator,
    SeededDraws,
    StreamedTrainingImages,
    TrainingImages,
    seeded,
    training_transform,
)


IMAGENET_RECIPE = {
    "train_augmentation": "crop",
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "color_jitter": 0.3,
    "random_erasing": 0.25,
    "mixup": 0.8,
    "cutmix": 1.0,
}


@pytest.fixture
def image_processor():
    return ViTImageProcessorPil(size={"height": 32, "width": 24})


@pytest.fixture
def noise_images():
    return noise_split(40, 40, 50, num_classes=10)


def training_images(split, image_processor, tmp_path, max_share=0.001, **fields):
    bad_images = BadImages(tmp_path / "bad_images.jsonl", len(split), max_share)
    return TrainingImages(split, training_transform(image_processor, DataArguments(**fields)), bad_images)


def broken(split, positions):
    records = split["image"][:]
    for position in positions:
        records[position] = {"bytes": b"no image", "path": f"photos/{position}.jpg"}
    return Dataset.from_dict({"image": records, "label": split["label"][:]}).cast_column("image", Image(decode=False))


def batches(split, image_processor, tmp_path, *, num_workers=0, epoch=0):
    images = training_images(split, image_processor, tmp_path, **IMAGENET_RECIPE)
    draws = SeededDraws(len(images), seed=3)
    draws.set_epoch(epoch)
    collator = MixingCollator(DataArguments(**IMAGENET_RECIPE), 0.1, 10)
    loader = DataLoader(images, batch_size=8, sampler=draws, collate_fn=collator, num_workers=num_workers)
    return list(loader)


def test_draws_are_the_same_whatever_the_workers_and_global_generators(noise_images, image_processor, tmp_path):
    torch.manual_seed(0)
    first = batches(noise_images, image_processor, tmp_path)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    with_workers = batches(noise_images, image_processor, tmp_path, num_workers=2)
    again = batches(noise_images, image_processor, tmp_path)
    for batch, *others in zip(first, with_workers, again, strict=True):
        for other in others:
            assert all(torch.equal(batch[name], other[name]) for name in ("pixel_values", "labels"))
    next_epoch = batches(noise_images, image_processor, tmp_path, epoch=1)
    assert not torch.equal(first[0]["pixel_values"], next_epoch[0]["pixel_values"])
    torch.set_rng_state(before)
    images = training_images(noise_images, image_processor, tmp_path, **IMAGENET_RECIPE)
    images[0, 1], MixingCollator(DataArguments(**IMAGENET_RECIPE), 0.1, 10)([images[1, 2], images[2, 3]])
    assert torch.equal(torch.get_rng_state(), before)


def test_an_epoch_draws_every_image_once_and_repeats_them_in_a_row():
    draws = list(SeededDraws(100, seed=0))
    assert sorted(index for index, _ in draws) == list(range(100)) and len({seed for _, seed in draws}) == 100
    repeated = SeededDraws(100, seed=0, num_repeats=3)
    assert len(repeated) == len(list(repeated)) == 100
    indices = [index for index, _ in repeated]
    assert indices[:99:3] == indices[1:99:3] == indices[2:99:3] and len(set(indices)) == 34
    assert len({seed for _, seed in repeated}) == 100


@pytest.mark.parametrize("augmentation", ("none", "flip", "crop"))
def test_training_images_have_the_models_size(noise_images, image_processor, augmentation, tmp_path):
    images = training_images(noise_images, image_processor, tmp_path, train_augmentation=augmentation)
    example = images[0, 0]
    assert (example["pixel_values"].shape, example["labels"]) == ((3, 32, 24), 0)
    values = example["pixel_values"]
    assert values.dtype == torch.float32 and -1.01 <= values.min() < -0.3 and 0.3 < values.max() <= 1.01
    unlabelled = training_images(noise_images.remove_columns("label"), image_processor, tmp_path)
    assert set(unlabelled[0, 0]) == {"pixel_values", "seed"}


def test_flip_mirrors_about_half_of_the_images(image_processor, tmp_path):
    image = PILImage.new("RGB", (24, 32))
    image.paste((255, 255, 255), (0, 0, 12, 32))
    split = Dataset.from_dict({"image": [image], "label": [0]}).cast_column("image", Image(decode=False))
    images = training_images(split, image_processor, tmp_path, train_augmentation="flip")
    pixel_values = torch.stack([images[0, seed]["pixel_values"] for seed in range(64)])
    is_mirrored = pixel_values[:, 0, 0, 0] < 0
    assert 16 < is_mirrored.sum() < 48
    assert torch.equal(pixel_values[is_mirrored][0], pixel_values[~is_mirrored][0].flip(-1))


def test_bad_images_are_named_counted_once_and_replaced(noise_images, image_processor, tmp_path):
    split = broken(noise_images, [3, 4, 39])
    images = training_images(split, image_processor, tmp_path, max_share=0.1, train_augmentation="none")
    good = training_images(noise_images, image_processor, tmp_path, train_augmentation="none")
    for _ in range(2):
        assert torch.equal(images[3, 0]["pixel_values"], good[5, 0]["pixel_values"]) and images[3, 0]["labels"] == 5
        assert torch.equal(images[39, 0]["pixel_values"], good[0, 0]["pixel_values"])
    lines = (tmp_path / "bad_images.jsonl").read_text().splitlines()
    named = [json.loads(line) for line in lines if line]
    assert [entry["image"] for entry in named] == [3, 4, 39]
    assert "Image photos/39.jpg cannot be read" in named[2]["error"]


def test_more_bad_images_than_allowed_stop_the_training(noise_images, image_processor, tmp_path):
    split = broken(noise_images, [3, 7])
    images = training_images(split, image_processor, tmp_path, max_share=0.025)
    assert images[3, 0]["labels"] == 4
    for _ in range(2):
        with pytest.raises(BadData, match=naming("2 of 40 training images", "--max_bad_images 0.025")):
            images[7, 0]
    loader = DataLoader(images, batch_size=4, sampler=[(7, 0)], num_workers=1)
    (tmp_path / "bad_images.jsonl").write_text('{"image": 1, "error": ""}\n{"image": 2, "er')  # killed while writing
    with pytest.raises(BadData, match="2 of 40 training images"):
        list(loader)
    images = training_images(broken(noise_images, range(40)), image_processor, tmp_path, max_share=1.0)
    with pytest.raises(BadData, match=naming("40 training images", "bad_images.jsonl")):
        images[0, 0]


@pytest.mark.parametrize("num_examples", (8, 7, 1))
def test_mixed_labels_are_probabilities_and_odd_batches_keep_their_size(num_examples):
    generator = torch.Generator().manual_seed(0)
    examples = [
        {"pixel_values": torch.rand(3, 16, 16, generator=generator), "labels": index, "seed": index}
        for index in range(num_examples)
    ]
    for fields in ({"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}, {}):
        batch = MixingCollator(DataArguments(**fields), 0.1, 10)(examples)
        assert batch["labels"].shape == (num_examples, 10) and set(batch) == {"pixel_values", "labels"}
        torch.testing.assert_close(batch["labels"].sum(dim=-1), torch.ones(num_examples))
        assert batch["pixel_values"].shape == (num_examples, 3, 16, 16)
    plain = MixingCollator(DataArguments(), 0.0, 10)(examples)
    assert plain["labels"].tolist() == list(range(num_examples))
    unlabelled = [{name: value for name, value in example.items() if name != "labels"} for example in examples]
    assert set(MixingCollator(DataArguments(mixup=0.8), 0.0, 10)(unlabelled)) == {"pixel_values"}


def test_smoothed_labels_give_the_loss_of_label_smoothing():
    examples = [{"pixel_values": torch.rand(3, 8, 8), "labels": index % 5, "seed": 0} for index in range(6)]
    labels = MixingCollator(DataArguments(), 0.1, 5)(examples)["labels"]
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    expected = nn.functional.cross_entropy(logits, torch.arange(6) % 5, label_smoothing=0.1)
    torch.testing.assert_close(nn.functional.cross_entropy(logits, labels), expected)


@pytest.mark.parametrize("fields", ({"train_augmentation": "none"}, {"train_augmentation": "flip"}, IMAGENET_RECIPE))
def test_training_images_reach_workers_that_are_spawned(noise_images, image_processor, tmp_path, fields):
    arguments = DataArguments(**fields)
    stored = training_images(noise_images, image_processor, tmp_path, **fields)
    transform, stream = stored.transform, noise_images.to_iterable_dataset(num_shards=4)
    streamed = StreamedTrainingImages(stream, transform, stored.bad_images, seed=3, batch_size=4, buffer_size=6)
    collator = MixingCollator(arguments, 0.1, 10)
    sent_stored, sent_streamed, sent_collator = pickle.loads(pickle.dumps((stored, streamed, collator)))
    for examples, sent in (
        ([stored[index, 3 * index] for index in range(8)], [sent_stored[index, 3 * index] for index in range(8)]),
        (list(islice(streamed, 8)), list(islice(sent_streamed, 8))),
    ):
        batch, expected = sent_collator(sent), collator(examples)
        assert all(torch.equal(batch[name], expected[name]) for name in ("pixel_values", "labels"))


def test_workers_need_not_be_forked(noise_images, image_processor, tmp_path):
    images = training_images(noise_images, image_processor, tmp_path, train_augmentation="flip")
    collator, draws = MixingCollator(DataArguments(mixup=0.8), 0.0, 10), SeededDraws(16, seed=3)
    options = {"batch_size": 8, "sampler": draws, "collate_fn": collator}
    spawned = DataLoader(images, num_workers=1, multiprocessing_context="forkserver", **options)
    for batch, expected in zip(spawned, DataLoader(images, **options), strict=True):
        assert all(torch.equal(batch[name], expected[name]) for name in ("pixel_values", "labels"))


def test_every_image_survives_the_imagenet_augmentation(noise_images, image_processor, tmp_path):
    images = training_images(noise_images, image_processor, tmp_path, **IMAGENET_RECIPE)
    for seed in range(300):
        assert torch.isfinite(images[seed % 40, seed]["pixel_values"]).all()


def test_unknown_policies_are_refused(image_processor):
    for policy in ("mosaic", "rand-x9"):
        with pytest.raises(ValueError, match=naming("--auto_augment", policy)):
            training_transform(image_processor, DataArguments(auto_augment=policy))


IMAGENET_UNITS = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
FIELDS_OF_VALUES = (
    {},
    IMAGENET_UNITS,
    {"image_mean": 0.5, "image_std": 0.25},
    {"do_normalize": False, "image_mean": None, "image_std": None},
    {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [127.5] * 3},
    {"do_rescale": False, "image_mean": [0.0] * 3, "image_std": [1.0] * 3},
    {"do_rescale": False, "image_mean": [123.7, 116.3, 103.5], "image_std": [58.4, 57.1, 57.4]},
    {"do_rescale": False, **IMAGENET_UNITS},
    {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
    {"rescale_factor": 1 / 256, "do_normalize": False},
)


@pytest.mark.parametrize("fields", FIELDS_OF_VALUES)
@pytest.mark.parametrize("processor_class", (ViTImageProcessor, ViTImageProcessorPil))
def test_crops_have_the_values_of_the_image_processor(processor_class, fields):
    image_processor = processor_class(size={"height": 32, "width": 24}, **fields)
    for colour in ((0, 0, 0), (255, 255, 255), (10, 130, 250), (200, 60, 90)):
        image = PILImage.new("RGB", (48, 48), colour)
        expected = image_processor(image, return_tensors="pt")["pixel_values"][0]
        for augmentation in ("none", "flip", "crop"):
            transform = training_transform(image_processor, DataArguments(train_augmentation=augmentation))
            torch.testing.assert_close(transform(image), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("fields", FIELDS_OF_VALUES)
def test_noise_and_filled_corners_of_crops_are_of_usual_strength(noise_images, fields):
    image_processor = ViTImageProcessorPil(size={"height": 32, "width": 24}, **fields)
    black, white = (
        image_processor(PILImage.new("RGB", (32, 32), 3 * (value,)), return_tensors="pt")["pixel_values"][0]
        for value in (0, 255)
    )
    arguments = DataArguments(auto_augment="rand-m9-n4", random_erasing=1.0)
    transform, image = training_transform(image_processor, arguments), decode_image(noise_images[0]["image"])
    for seed in range(8):
        with seeded(seed):
            shares = (transform(image) - black) / (white - black)
        assert 0.1 < shares.std() < 0.5 and shares.min() < 0 and shares.max() > 1


def test_usual_crops_are_those_of_timm(noise_images, tmp_path):
    for fields in ({}, IMAGENET_UNITS):
        image_processor = ViTImageProcessorPil(size={"height": 32, "width": 24}, **fields)
        images = training_images(noise_images, image_processor, tmp_path, auto_augment="rand-m9", random_erasing=0.5)
        expected = create_transform(
            (32, 24),
            is_training=True,
            auto_augment="rand-m9",
            re_prob=0.5,
            re_mode="pixel",
            interpolation="bicubic",
            mean=tuple(image_processor.image_mean),
            std=tuple(image_processor.image_std),
        )
        for seed in range(8):
            with seeded(seed):
                pixel_values = expected(decode_image(noise_images[seed]["image"]))
            assert torch.equal(images[seed, seed]["pixel_values"], pixel_values)


@pytest.mark.parametrize(
    "image_processor",
    (
        EfficientNetImageProcessorPil(size={"height": 32, "width": 32}),
        EfficientNetImageProcessorPil(size={"height": 32, "width": 32}, include_top=False, rescale_offset=True),
        MobileViTImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}),
        ViTImageProcessorPil(size={"height": 32, "width": 32}, image_std=[0.0, 0.5, 0.5]),
        lambda image, return_tensors: {"pixel_values": torch.zeros(1, 3, 32, 32)},
    ),
)
def test_crops_of_other_values_than_the_image_processor_makes_are_refused(image_processor):
    with pytest.raises(ValueError, match=r"--train_augmentation must be flip or none with .*, got crop"):
        training_transform(image_processor, DataArguments(train_augmentation="crop"))
    training_transform(image_processor, DataArguments(train_augmentation="flip"))


def streamed_images(split, image_processor, tmp_path, num_shards=4, max_share=0.1, **fields):
    arguments = DataArguments(train_augmentation=fields.pop("train_augmentation", "none"))
    bad_images = BadImages(tmp_path / "bad_images.jsonl", len(split), max_share)
    fields = {"seed": 3, "batch_size": 4, "buffer_size": 6, **fields}
    stream = split.to_iterable_dataset(num_shards=num_shards)
    return StreamedTrainingImages(stream, training_transform(image_processor, arguments), bad_images, **fields)


def positions(examples):
    return [example["labels"] for example in examples]


@pytest.fixture
def numbered_images():
    """40 images whose labels are their numbers."""
    return noise_split(40, 40, 50, num_classes=40)


def test_stream_brings_every_image_once_an_epoch_in_an_order_of_its_own(numbered_images, image_processor, tmp_path):
    drawn = positions(islice(streamed_images(numbered_images, image_processor, tmp_path), 80))
    assert sorted(drawn[:40]) == sorted(drawn[40:]) == list(range(40))
    assert drawn[:40] != drawn[40:] and drawn[:40] != list(range(40))
    repeated = streamed_images(numbered_images, image_processor, tmp_path, num_repeats=2, train_augmentation="crop")
    first, second = islice(repeated, 2)
    assert first["labels"] == second["labels"] and not torch.equal(first["pixel_values"], second["pixel_values"])


@pytest.mark.parametrize(("num_shards", "num_workers"), ((4, 2), (2, 0), (3, 0)))
def test_processes_and_workers_share_a_stream(numbered_images, image_processor, tmp_path, num_shards, num_workers):
    drawn = []
    for index in range(2):
        share = {"process_index": index, "num_processes": 2, "num_shards": num_shards}
        images = streamed_images(numbered_images, image_processor, tmp_path, **share)
        loader = DataLoader(images, batch_size=5, num_workers=num_workers)
        drawn += torch.cat([batch["labels"] for batch in islice(loader, 4)]).tolist()
    assert sorted(drawn) == list(range(40))


@pytest.mark.parametrize("num_workers", (0, 2, 3))
def test_stream_continues_where_it_was_whatever_it_left_out(numbered_images, image_processor, tmp_path, num_workers):
    split = broken(numbered_images, [5, 30])
    collator = MixingCollator(DataArguments(), 0.0, 40)

    def draw(num_skipped):
        images = streamed_images(split, image_processor, tmp_path, num_shards=6, train_augmentation="crop")
        images.num_skipped_batches = num_skipped
        loader = DataLoader(images, batch_size=4, collate_fn=collator, num_workers=num_workers)
        return list(islice(loader, 16))

    whole = draw(0)
    for num_skipped in (1, 4, 11):
        continued = draw(num_skipped)
        assert continued[:num_skipped] == [{}] * num_skipped
        for batch, expected in zip(continued[num_skipped:], whole[num_skipped:]):
            assert all(torch.equal(batch[name], expected[name]) for name in ("pixel_values", "labels"))


def test_bad_images_of_a_stream_are_left_out_and_each_is_counted(numbered_images, image_processor, tmp_path):
    records = numbered_images["image"][:]
    records[3] = records[4] = {"bytes": b"<html>404</html>", "path": "photo.jpg"}  # as a download leaves them
    records[9] = records[10] = None
    split = Dataset.from_dict({"image": records, "label": numbered_images["label"][:]})
    split = split.cast_column("image", Image(decode=False))
    for _ in range(2):  # the second time as a run that is continued, which counts none again
        drawn = positions(islice(streamed_images(split, image_processor, tmp_path), 36))
        assert sorted(drawn) == [number for number in range(40) if number not in (3, 4, 9, 10)]
        named = [json.loads(line) for line in (tmp_path / "bad_images.jsonl").read_text().splitlines() if line]
        assert len(named) == len({entry["image"] for entry in named}) == 4
    (tmp_path / "bad_images.jsonl").unlink()
    with pytest.raises(BadData, match="3 of 40 training images"):
        list(islice(streamed_images(split, image_processor, tmp_path, max_share=0.05), 40))
    with pytest.raises(BadData, match=naming("--dataloader_num_workers", "bad_images.jsonl")):
        none = streamed_images(broken(split, range(40)), image_processor, tmp_path, max_share=1.0)
        list(islice(none, 1))


def test_error_of_a_worker_is_one_line(numbered_images, image_processor, tmp_path):
    images = streamed_images(broken(numbered_images, range(40)), image_processor, tmp_path, max_share=0.0)
    with pytest.raises(BadData) as raised:
        next(iter(DataLoader(images, num_workers=1)))
    assert str(raised.value).startswith("1 of 40 training images") and "\n" not in str(raised.value)


def test_shard_that_breaks_off_is_one_clear_error(numbered_images, image_processor, tmp_path):
    def shards(names):
        for name in names:
            yield from numbered_images
            raise OSError(f"{name} is cut short")

    stream = IterableDataset.from_generator(shards, features=numbered_images.features, gen_kwargs={"names": ["shard"]})
    transform = training_transform(image_processor, DataArguments(train_augmentation="none"))
    bad_images = BadImages(tmp_path / "bad_images.jsonl", 40, 0.1)
    images = StreamedTrainingImages(stream, transform, bad_images, seed=3, batch_size=4, buffer_size=6)
    with pytest.raises(BadData, match="OSError: shard is cut short"):
        list(images)
    evaluated = DataLoader(evaluation_images(stream, image_processor), num_workers=1)
    with pytest.raises(BadData) as raised:
        list(evaluated)
    assert str(raised.value).endswith("OSError: shard is cut short") and "\n" not in str(raised.value)


def test_every_line_of_an_error_is_told_on_one():
    assert (
        str(BadData("OSError: 403 Forbidden\n\n  Is your token right?\n"))
        == "OSError: 403 Forbidden Is your token right?"
    )
    assert str(BadData("")) == ""
