import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import naming
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from torch.utils.data import DataLoader
from transformers import (
    CLIPImageProcessorPil,
    DetrImageProcessorPil,
    LlavaNextImageProcessorPil,
    Pix2StructImageProcessorPil,
    Siglip2ImageProcessorPil,
    ViTImageProcessorPil,
)

from tnt_hf.data import (
    BadData,
    DataArguments,
    align_labels,
    check_input_size,
    class_names,
    decode_image,
    evaluation_images,
    evaluation_transform,
    load_images,
    num_evaluation_workers,
    present_classes,
)
from tnt_hf.labels import OtherClasses


@pytest.fixture
def image_folders(tmp_path):
    """ImageNet's layout: train/<class>/*.png and val/<class>/*.png, in several image modes."""
    for split in ("train", "val"):
        for label, name in enumerate(("ant", "bee", "cat")):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for index, mode in enumerate(("RGB", "L", "RGBA", "CMYK")):
                suffix = "jpg" if mode == "CMYK" else "png"
                PILImage.new(mode, (20 + index, 30)).save(folder / f"{label}_{index}.{suffix}")
    return tmp_path


@pytest.fixture
def image_processor():
    return ViTImageProcessorPil(size={"height": 32, "width": 24})


def dataset_with(labels, feature):
    images = [PILImage.new("RGB", (8, 8))] * len(labels)
    return Dataset.from_dict({"image": images, "label": labels}, features=Features(image=Image(), label=feature))


def test_bundled_data_loads_by_default():
    images = load_images(DataArguments(), train=True, validation=True)
    assert {name: len(split) for name, split in images.items()} == {"train": 4000, "validation": 2000}
    assert decode_image(images["train"][0]["image"]).mode == "RGB"


def test_image_folders_load_with_every_image_mode(image_folders, image_processor):
    arguments = DataArguments(train_dir=str(image_folders / "train"), validation_dir=str(image_folders / "val"))
    images = load_images(arguments, train=True, validation=True)
    assert images["train"].features["label"].names == ["ant", "bee", "cat"]
    batch = images["validation"].with_transform(evaluation_transform(image_processor))[:]
    assert batch["pixel_values"].shape == (12, 3, 32, 24)
    assert sorted(batch["labels"]) == [0] * 4 + [1] * 4 + [2] * 4


def test_training_images_need_no_labels_in_any_layout(image_folders, image_processor):
    PILImage.new("RGB", (9, 9)).save(image_folders / "train" / "loose.png")
    (image_folders / "train" / "deep" / "er").mkdir(parents=True)
    PILImage.new("RGB", (9, 9)).save(image_folders / "train" / "deep" / "er" / "x.png")
    arguments = DataArguments(train_dir=str(image_folders / "train"), validation_dir=str(image_folders / "val"))
    images = load_images(arguments, train=True, validation=True, train_labels=False)
    assert (len(images["train"]), images["train"].column_names) == (14, ["image"])
    assert images["validation"].features["label"].names == ["ant", "bee", "cat"]
    train = align_labels(images["train"], {0: "ant", 1: "bee", 2: "cat"})
    batch = train.with_transform(evaluation_transform(image_processor))[:3]
    assert list(batch) == ["pixel_values"] and batch["pixel_values"].shape == (3, 3, 32, 24)
    only_train = DataArguments(train_dir=str(image_folders / "train"))
    assert len(load_images(only_train, train=True, validation=False, train_labels=False)["train"]) == 14
    with pytest.raises(
        ValueError, match=naming("validation split", only_train.train_dir, "--validation_dir")
    ) as error:
        load_images(only_train, train=True, validation=True, train_labels=False)
    assert "--do_eval false" in str(error.value)
    with pytest.raises(ValueError, match="--validation_dir") as error:
        load_images(only_train, train=False, validation=True)
    assert "--do_eval" not in str(error.value)


def test_limits_draw_the_same_images_every_time_from_all_classes():
    arguments = DataArguments(max_train_samples=200, max_eval_samples=10**6)
    first, again = (load_images(arguments, train=True, validation=True) for _ in range(2))
    assert first["train"]["image"][:] == again["train"]["image"][:]
    assert len(first["train"]) == 200 and len(set(first["train"]["label"])) == 10
    assert len(first["validation"]) == 2000


@pytest.mark.parametrize(
    ("arguments", "named"),
    (
        ({"dataset_name": "x", "train_dir": "."}, ("--dataset_name", "--train_dir", "--validation_dir")),
        ({"train_dir": "absent"}, ("--train_dir", "absent")),
        ({"train_augmentation": "mosaic"}, ("--train_augmentation", "none, flip, crop", "mosaic")),
        (
            {"auto_augment": "rand-m9", "train_augmentation": "flip"},
            ("--auto_augment", "--train_augmentation crop", "flip"),
        ),
        ({"mixup": -1.0}, ("--mixup", -1.0)),
        ({"max_bad_images": 2.0}, ("--max_bad_images", 2.0)),
        ({"repeated_augmentation": 0}, ("--repeated_augmentation", 0)),
        ({"shuffle_buffer_size": 0}, ("--shuffle_buffer_size", 0)),
        ({"max_train_samples": 0}, ("--max_train_samples", 0)),
    ),
)
def test_bad_data_arguments_are_refused(arguments, named):
    with pytest.raises(ValueError, match=naming(*named)):
        DataArguments(**arguments)


def test_16_bit_images_are_scaled_not_clipped(tmp_path):
    values = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (8, 1))
    PILImage.fromarray(values).save(tmp_path / "deep.png")
    image = decode_image({"path": str(tmp_path / "deep.png"), "bytes": None})
    assert np.array_equal(np.asarray(image)[..., 0], values >> 8)


def test_absent_dataset_column_and_split_are_named(tmp_path):
    with pytest.raises(ValueError, match="absent could not"):
        load_images(DataArguments(dataset_name=str(tmp_path / "absent")), train=True, validation=True)
    with pytest.raises(ValueError, match=naming("picture", "image, label")):
        load_images(DataArguments(image_column_name="picture"), train=True, validation=True)
    dataset_with([0], Value("int64")).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=naming("validation split", "train")):
        load_images(DataArguments(dataset_name=str(tmp_path)), train=True, validation=True)


def test_reason_why_a_shard_cannot_be_loaded_is_named(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"no Parquet file")
    with pytest.raises(ValueError, match=naming(tmp_path.name, "ArrowInvalid", "Parquet magic bytes")):
        load_images(DataArguments(dataset_name=str(tmp_path)), train=True, validation=False)
    dataset_with([0], Value("int64")).to_parquet(tmp_path / "train.parquet")
    dataset_with([0], Value("int64")).rename_column("label", "class").to_parquet(tmp_path / "train-1.parquet")
    with pytest.raises(ValueError, match=naming(tmp_path.name, "CastError")) as raised:
        load_images(DataArguments(dataset_name=str(tmp_path)), train=True, validation=False)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("split", ("train", "validation"))
def test_folder_without_images_and_folder_without_classes_are_refused_by_name(tmp_path, split):
    arguments = DataArguments(**{f"{split}_dir": str(tmp_path)})
    wanted = {"train": split == "train", "validation": split == "validation"}
    for name in (None, "notes.txt"):
        if name is not None:
            (tmp_path / name).write_text("no image")
        with pytest.raises(ValueError, match=naming(tmp_path, "no images")):
            load_images(arguments, **wanted)
    PILImage.new("RGB", (8, 8)).save(tmp_path / "image.png")
    with pytest.raises(
        ValueError, match=naming(f"{split} split of {tmp_path} has", "column label", "subfolder")
    ) as error:
        load_images(arguments, **wanted)
    assert ("--self_distillation" in str(error.value)) == (split == "train")


def test_unreadable_first_image_is_named_before_any_work(image_folders):
    broken = image_folders / "val" / "ant" / "0_0.png"
    broken.write_bytes(broken.read_bytes()[:40])
    with pytest.raises(ValueError, match=f"Image {broken}"):
        load_images(DataArguments(validation_dir=str(image_folders / "val")), train=False, validation=True)


@pytest.mark.parametrize(
    ("id2label", "aligned"),
    (
        ({0: "ant", 1: "bee", 2: "cat"}, [0, 1, 2, 2]),
        ({0: "cat", 1: "bee", 2: "ant"}, [2, 1, 0, 0]),
        ({0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}, [0, 1, 2, 2]),
        ({0: "n01440764", 1: "n01443537", 2: "n01484850"}, [0, 1, 2, 2]),
    ),
)
def test_labels_are_matched_by_name_or_by_order_if_names_say_nothing(id2label, aligned):
    dataset = dataset_with([0, 1, 2, 2], ClassLabel(names=["ant", "bee", "cat"]))
    assert align_labels(dataset, id2label)["label"][:] == aligned
    without_names = dataset_with([0, 2], Value("int64"))
    assert align_labels(without_names, id2label) is without_names


def test_classes_that_are_taken_in_order_are_told(monkeypatch):
    told = []
    monkeypatch.setattr("tnt_hf.data.datasets.logger.warning_once", told.append)
    named, numbered = {0: "ant", 1: "bee"}, {0: "LABEL_0", 1: "LABEL_1"}
    by_name = dataset_with([0, 1], ClassLabel(names=["bee", "ant"]))
    others = {0: "cat", 1: "dog"}
    for dataset, id2label, trusted in ((by_name, named, False), (by_name, numbered, False), (by_name, others, True)):
        align_labels(dataset, id2label, trusted)
    in_folders = dataset_with([0, 1], ClassLabel(names=["T-shirt_top", "boot"]))
    align_labels(in_folders, {0: "T-shirt/top", 1: "boot"})
    assert told == []
    align_labels(dataset_with([0, 1], Value("int64")), named)
    assert len(told) == 1 and "2 classes" in told[0] and "same order" in told[0]


def test_class_names_may_repeat_as_the_crane_in_imagenet():
    id2label = {label: f"name {label}" for label in range(1000)} | {134: "crane", 517: "crane"}
    for names in (list(id2label.values()), [f"n{label:08d}" for label in range(1000)]):
        dataset = dataset_with(
            [0, 134, 517, 999], ClassLabel(names=names) if len(set(names)) == 1000 else Value("int64")
        )
        assert align_labels(dataset, id2label)["label"][:] == [0, 134, 517, 999]


@pytest.mark.parametrize(
    ("labels", "feature", "id2label", "named"),
    (
        ([0, 1], ClassLabel(names=["ant", "wasp"]), {0: "ant", 1: "bee", 2: "cat"}, ["2 classes", "wasp", "bee, cat"]),
        ([[0, 1], [1]], List(Value("int64")), {0: "ant", 1: "bee"}, ["0 to 1", [0, 1]]),
        ([0.0, 1.0], Value("float32"), {0: "ant", 1: "bee"}, ["0 to 1", 0.0]),
        ([0, 1], ClassLabel(names=["ant", "bee"]), {1: "ant", 2: "bee"}, ["`id2label`", "0 to 1", [1, 2]]),
        (
            [0, 1],
            ClassLabel(names=["ant", "bee"]),
            {0: ["n0", "ant"], 1: ["n1", "bee"]},
            ["`id2label`", ["n0", "ant"]],
        ),
        ([0, 1], ClassLabel(names=["ant", "bee"]), {0: "ant", 1: "wasp"}, ["know bee,", "lack wasp."]),
        ([0, 1], ClassLabel(names=["ant", "bee"]), {0: "cat", 1: "dog"}, ["--trust_label_order", "cat, dog"]),
        ([0, 2], Value("int64"), {0: "ant", 1: "bee"}, ["0 to 1", 2]),
        ([False, True], Value("bool"), {0: "ant", 1: "bee"}, ["0 to 1", False]),
        ([0, -1], Value("int64"), {0: "ant", 1: "bee"}, ["0 to 1", -1]),
        (["0", "1"], Value("string"), {0: "ant", 1: "bee"}, ["integers", "0 to 1"]),
        ([0, -1], ClassLabel(names=["ant", "bee"]), {0: "ant", 1: "bee"}, ["0 to 1", -1]),
    ),
)
def test_labels_that_do_not_match_the_head_are_refused(labels, feature, id2label, named):
    with pytest.raises(ValueError, match=naming(*named)):
        align_labels(dataset_with(labels, feature), id2label)


def test_numbered_folders_are_the_classes_of_their_numbers(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr("tnt_hf.data.datasets.logger.warning_once", told.append)
    for number in range(12):
        (tmp_path / str(number)).mkdir()
        PILImage.new("L", (8, 8), 20 * number).save(tmp_path / str(number) / f"{number}.png")
    arguments = {"validation_dir": str(tmp_path)}
    for streaming in (False, True):
        images = load_images(
            DataArguments(**arguments, streaming=streaming), train=False, validation=True, may_stream=1
        )
        for id2label in ({k: f"LABEL_{k}" for k in range(12)}, {k: f"grey {k} of 12" for k in range(12)}):
            for record in align_labels(images["validation"], id2label):
                assert record["label"] == int(Path(record["image"]["path"]).stem)
    assert len(told) == 2 and all("of the same numbers" in each for each in told)
    with pytest.raises(ValueError, match=naming("13 classes (LABEL_0", "12 of the data (0, 1, 10")):
        align_labels(images["validation"], {k: f"LABEL_{k}" for k in range(13)})


def test_a_part_of_the_classes_is_matched_by_name():
    animals = dict(enumerate(("ant", "bee", "cat", "dog", "elk")))
    dataset = dataset_with([0, 1, 0], ClassLabel(names=["dog", "bee"]))
    for split in (dataset, dataset.to_iterable_dataset()):
        assert [record["label"] for record in align_labels(split, animals)] == [3, 1, 3]
        assert present_classes(split, animals) == [1, 3]
    whole = dataset_with([4, 2, 4], ClassLabel(names=list(animals.values())))
    assert present_classes(whole, animals) == [2, 4]
    assert present_classes(dataset_with([1, 0], Value("int64")), animals) == [0, 1]
    with pytest.raises(ValueError, match="--candidate_classes"):
        present_classes(whole.to_iterable_dataset(), animals)


def test_label_order_may_be_trusted():
    dataset = dataset_with([0, 1], ClassLabel(names=["ant", "bee"]))
    assert align_labels(dataset, {0: "cat", 1: "dog"}, trust_label_order=True) is dataset


def test_label_order_that_names_contradict_is_neither_trusted_nor_proposed():
    dataset = dataset_with([0, 1, 2], ClassLabel(names=["T-shirt", "ant", "bee"]))
    model_names = {0: "bee", 1: "T-shirt/top", 2: "ant"}
    with pytest.raises(ValueError, match=naming("--trust_label_order", "ant in the data", "T-shirt/top in the model")):
        align_labels(dataset, model_names, trust_label_order=True)
    with pytest.raises(OtherClasses, match=naming("know T-shirt,", "lack T-shirt/top.", "`id2label`")) as raised:
        align_labels(dataset, model_names)
    assert "--trust_label_order" not in str(raised.value) and "--train_backbone" not in str(raised.value)


SQUARE = {"height": 32, "width": 32}
EDGE = {"shortest_edge": 32}


@pytest.mark.parametrize(
    "image_processor",
    (
        ViTImageProcessorPil(size=SQUARE),
        ViTImageProcessorPil(size=SQUARE, do_rescale=False, image_mean=[127.5] * 3, image_std=[127.5] * 3),
        ViTImageProcessorPil(do_resize=False, do_center_crop=True, crop_size=SQUARE),
        ViTImageProcessorPil(size=SQUARE, do_rescale=False, do_normalize=False),
        CLIPImageProcessorPil(size=EDGE, crop_size=SQUARE),
        DetrImageProcessorPil(size=SQUARE),
    ),
)
def test_image_processor_that_makes_what_the_model_takes_is_used(image_processor):
    check_input_size(image_processor, (32, 32))
    split = dataset_with([0, 1], Value("int64")).cast_column("image", Image(decode=False))
    batch = evaluation_images(split, image_processor)[:]
    assert set(batch) == {"pixel_values", "labels"} and batch["pixel_values"].shape == (2, 3, 32, 32)


@pytest.mark.parametrize(
    ("image_processor", "named"),
    (
        (ViTImageProcessorPil(size={"height": 32, "width": 24}), [(1, 3, 32, 24), (1, 3, 32, 32)]),
        (ViTImageProcessorPil(size=EDGE), [(1, 3, 32, 64), "32x64", (1, 3, 32, 32)]),
        (ViTImageProcessorPil(do_resize=False), ["`pixel_values`", (1, 3, 32, 32)]),
        (ViTImageProcessorPil(do_resize=False, do_pad=True, pad_size=SQUARE), ["ValueError: Padding"]),
        (CLIPImageProcessorPil(size=EDGE, crop_size={"height": 28, "width": 28}), [(1, 3, 28, 28)]),
        (ViTImageProcessorPil(size=SQUARE, image_mean=[0.5]), ["ValueError: mean"]),
        (ViTImageProcessorPil(size=SQUARE, image_mean=None), ["ValueError", "image_mean"]),
        (ViTImageProcessorPil(size=SQUARE, image_std=[0.0, 0.5, 0.5]), ["`pixel_values`", "-inf to inf"]),
        (Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16), ["`pixel_values`", (1, 16, 192)]),
        (
            LlavaNextImageProcessorPil(size=EDGE, crop_size=SQUARE, image_grid_pinpoints=[[32, 64], [64, 32]]),
            ["`pixel_values`", (1, 3, 3, 32, 32)],
        ),
        (Pix2StructImageProcessorPil(), ["`pixel_values`", "flattened_patches"]),
        (None, ["image processor", "TypeError"]),
    ),
)
def test_image_processor_that_makes_other_images_than_the_model_takes_is_refused(image_processor, named, recwarn):
    with pytest.raises(ValueError, match=naming(*named)) as raised:
        check_input_size(image_processor, (32, 32))
    assert "\n" not in str(raised.value) and not recwarn.list


@pytest.mark.parametrize(
    "is_left",
    (
        lambda width, height: width > height,
        lambda width, height: width < height,
        lambda width, height: width == height,
        lambda width, height: min(width, height) > 32,
        lambda width, height: max(width, height) < 32,
        lambda width, height: width > height and max(width, height) < 32,
        lambda width, height: width < height and max(width, height) < 32,
    ),
)
def test_image_processor_that_leaves_some_images_as_they_are_is_refused(is_left):
    class LeavesSome(ViTImageProcessorPil):
        def preprocess(self, images, **kwargs):
            return super().preprocess(images, **{**kwargs, "do_resize": not is_left(*images.size)})

    with pytest.raises(ValueError, match=naming("`pixel_values`", (1, 3, 32, 32))):
        check_input_size(LeavesSome(size=SQUARE), (32, 32))


def test_image_processor_of_three_channels_does_not_fit_a_model_of_one():
    with pytest.raises(ValueError, match=naming((1, 3, 32, 32), (1, 1, 32, 32))):
        check_input_size(ViTImageProcessorPil(size=SQUARE), (32, 32), num_channels=1)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


NOISE = np.random.default_rng(0).integers(256, size=(40, 60, 3), dtype=np.uint8)
PICTURE = PILImage.fromarray(NOISE)
READABLE = {
    "JPEG": encoded(PICTURE, "JPEG"),
    "CMYK JPEG": encoded(PICTURE.convert("CMYK"), "JPEG"),
    "black and white": encoded(PICTURE.convert("1"), "PNG"),
    "grey and alpha": encoded(PICTURE.convert("LA"), "PNG"),
    "RGBA": encoded(PICTURE.convert("RGBA"), "PNG"),
    "palette with transparency": encoded(PICTURE.convert("P"), "PNG", transparency=0),
    "16-bit PNG": encoded(PILImage.fromarray(NOISE[..., 0].astype(np.uint16) * 257), "PNG"),
    "16-bit big-endian TIFF": encoded(PILImage.fromarray((NOISE[..., 0].astype(">u2") * 257).astype(">u2")), "TIFF"),
    "16-bit PGM": b"P5 60 40 65535 " + (NOISE[..., 0].astype(">u2") * 257).tobytes(),
    "animated GIF": encoded(PICTURE.convert("P"), "GIF", save_all=True, append_images=[PICTURE.convert("P")]),
    "animated WebP": encoded(PICTURE, "WEBP", save_all=True, append_images=[PICTURE]),
    "animated PNG": encoded(PICTURE, "PNG", save_all=True, append_images=[PICTURE]),
    "LAB TIFF": encoded(PICTURE.convert("LAB"), "TIFF"),
    "BMP": encoded(PICTURE, "BMP"),
}
UNREADABLE = {
    "empty": b"",
    "text": b"not an image",
    "web page": b"<html>404</html>",
    "truncated JPEG": READABLE["JPEG"][:900],
    "truncated PNG": encoded(PICTURE, "PNG")[:-200],
    "header alone": encoded(PICTURE, "PNG")[:40],
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "floating-point TIFF": encoded(PILImage.fromarray(NOISE[..., 0].astype(np.float32) / 255), "TIFF"),
    "32-bit TIFF": encoded(PILImage.fromarray(NOISE[..., 0].astype(np.int32)), "TIFF"),
    "16-bit TIFF with 0 for white": encoded(
        PILImage.fromarray(NOISE[..., 0].astype(np.uint16) * 257), "TIFF", tiffinfo={262: 0}
    ),
    "signed TIFF": encoded(PILImage.fromarray(NOISE[..., 0]), "TIFF", tiffinfo={339: 2}),
}


@pytest.mark.parametrize("kind", READABLE)
def test_images_of_every_kind_are_read_in_full_range(kind):
    image = decode_image({"bytes": READABLE[kind], "path": None})
    pixels = np.asarray(image)
    assert (image.mode, image.size) == ("RGB", (60, 40))
    assert 110 < pixels.mean() < 140 and pixels.std() > 40


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_is_no_image_is_refused_by_name(kind):
    with pytest.raises(ValueError, match=naming("Image photos/x.jpg")):
        decode_image({"bytes": UNREADABLE[kind], "path": "photos/x.jpg"})


def test_decompression_bombs_are_refused(monkeypatch):
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="2400 pixels"):
        decode_image({"bytes": READABLE["BMP"], "path": None})


@pytest.fixture
def shards(tmp_path):
    """Shards of 14 images of 3 classes as Parquet, and as WebDataset with columns png and cls."""
    pixels = np.random.default_rng(0).integers(256, size=(14, 20, 30, 3), dtype=np.uint8)
    images, labels = [PILImage.fromarray(image) for image in pixels], [index % 3 for index in range(14)]
    features = Features(image=Image(), label=ClassLabel(names=["ant", "bee", "cat"]))
    dataset = Dataset.from_dict({"image": images, "label": labels}, features=features)
    for name in ("parquet", "webdataset"):
        (tmp_path / name).mkdir()
    for split, num_shards in (("train", 2), ("test", 3)):
        for index in range(num_shards):
            shard = dataset.shard(num_shards, index)
            shard.to_parquet(tmp_path / "parquet" / f"{split}-{index}.parquet")
            with tarfile.open(tmp_path / "webdataset" / f"{split}-{index}.tar", "w") as file:
                for key, example in enumerate(shard.cast_column("image", Image(decode=False))):
                    parts = {"png": example["image"]["bytes"], "cls": str(example["label"]).encode()}
                    for suffix, content in parts.items():
                        entry = tarfile.TarInfo(f"{key:03d}.{suffix}")
                        entry.size = len(content)
                        file.addfile(entry, io.BytesIO(content))
    return tmp_path


WEBDATASET_COLUMNS = {"image_column_name": "png", "label_column_name": "cls"}


@pytest.mark.parametrize(("kind", "columns"), (("parquet", {}), ("webdataset", WEBDATASET_COLUMNS)))
def test_stream_of_shards_holds_the_examples_of_the_stored_data(shards, image_processor, kind, columns):
    examples = []
    for streaming in (True, False):
        arguments = DataArguments(dataset_name=str(shards / kind), streaming=streaming, **columns)
        images = load_images(arguments, train=True, validation=True, may_stream=True)
        aligned = align_labels(images["validation"], {0: "cat", 1: "ant", 2: "bee"})
        assert class_names(aligned) == (["cat", "ant", "bee"] if kind == "parquet" else None)
        examples.append(list(evaluation_images(aligned, image_processor)))
        assert isinstance(next(iter(images["train"]))["image"], dict)  # undecoded
    assert len(examples[0]) == len(examples[1]) == 14
    for streamed, stored in zip(*examples):
        assert torch.equal(streamed["pixel_values"], stored["pixel_values"])
        assert streamed["labels"] == stored["labels"]
    # names are known to Parquet alone; the numbers of WebDataset are taken in the order of the model
    assert examples[0][0]["labels"] == (1 if kind == "parquet" else 0)


@pytest.mark.parametrize(("kind", "columns"), (("parquet", {}), ("webdataset", WEBDATASET_COLUMNS)))
@pytest.mark.parametrize("fields", ({}, {"streaming": True}, {"streaming": True, "max_eval_samples": 5}))
def test_evaluation_images_reach_workers_that_are_spawned(shards, image_processor, kind, columns, fields):
    arguments = DataArguments(dataset_name=str(shards / kind), **fields, **columns)
    split = load_images(arguments, train=False, validation=True, may_stream=True)["validation"]
    images = evaluation_images(align_labels(split, {0: "cat", 1: "ant", 2: "bee"}), image_processor)
    sent = list(pickle.loads(pickle.dumps(images)))
    assert len(sent) == (arguments.max_eval_samples or 14)
    for example, expected in zip(sent, images, strict=True):
        assert torch.equal(example["pixel_values"], expected["pixel_values"])
        assert example["labels"] == expected["labels"]


def test_stream_may_be_limited_and_unlabelled(shards, image_folders):
    arguments = DataArguments(dataset_name=str(shards / "parquet"), streaming=True, max_eval_samples=5)
    images = load_images(arguments, train=True, validation=True, train_labels=False, may_stream=True)
    assert len(list(images["validation"])) == 5 and set(next(iter(images["train"]))) == {"image"}
    folders = {"train_dir": str(image_folders / "train"), "validation_dir": str(image_folders / "val")}
    images = load_images(DataArguments(streaming=True, **folders), train=True, validation=True, may_stream=True)
    assert [example["label"] for example in images["train"]] == [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.parametrize("split", ("train", "val"))
def test_link_to_nothing_is_named(image_folders, split):
    (image_folders / split / "ant" / ".cache").mkdir()
    (image_folders / split / "ant" / ".cache" / "lock").symlink_to("absent")
    (image_folders / split / "ant" / ".#0_0.png").symlink_to("someone@somewhere")  # an editor's lock
    (image_folders / split / "._ant.tar").write_bytes(b"what another system left")
    (image_folders / split / "ant" / "linked.png").symlink_to("0_0.png")
    arguments = DataArguments(train_dir=str(image_folders / "train"), validation_dir=str(image_folders / "val"))
    assert (
        len(load_images(arguments, train=True, validation=True)["train" if split == "train" else "validation"]) == 13
    )
    (image_folders / "more").mkdir()
    (image_folders / split / "cat" / "more").symlink_to(image_folders / "more")
    with pytest.raises(ValueError, match=naming("cat/more", image_folders / "more")):
        load_images(arguments, train=True, validation=True)
    (image_folders / split / "cat" / "more").unlink()
    (image_folders / split / "bee" / "gone.png").symlink_to(image_folders / "absent.png")
    with pytest.raises(ValueError, match=naming("bee/gone.png", image_folders / "absent.png")):
        load_images(arguments, train=True, validation=True)


def test_files_that_are_passed_over_are_counted(image_folders, monkeypatch):
    told = []
    monkeypatch.setattr("tnt_hf.data.image_files.logger.warning", told.append)
    arguments = DataArguments(validation_dir=str(image_folders / "val"))
    load_images(arguments, train=False, validation=True)
    assert told == []
    for name in ("photo.avif", "no_suffix"):
        (image_folders / "val" / "ant" / name).touch()
    assert len(load_images(arguments, train=False, validation=True)["validation"]) == 12
    assert len(told) == 1 and told[0].startswith("2 files are passed over")


def test_validation_images_that_are_none_are_all_named_before_the_evaluation(image_folders):
    arguments = DataArguments(validation_dir=str(image_folders / "val"))
    (image_folders / "val" / "bee" / "page.jpg").write_bytes(b"<html>404</html>")
    (image_folders / "val" / "cat" / "empty.png").write_bytes(b"")
    with pytest.raises(BadData, match=naming("2 of 14 validation images", "page.jpg", "empty.png")):
        load_images(arguments, train=False, validation=True)
    records = [{"bytes": encoded(PICTURE, "PNG"), "path": None}, None, {"bytes": b"text", "path": "a.png"}]
    split = Dataset.from_dict({"image": records, "label": [0, 1, 2]}).cast_column("image", Image(decode=False))
    (image_folders / "shards").mkdir()
    split.to_parquet(image_folders / "shards" / "test.parquet")
    arguments = DataArguments(dataset_name=str(image_folders / "shards"))
    with pytest.raises(BadData, match=naming("2 of 3 validation images", "missing", "a.png")):
        load_images(arguments, train=False, validation=True)


@pytest.mark.parametrize("num_bytes", (0, 512, 2048, -1024))
@pytest.mark.parametrize("streaming", (False, True))
def test_archive_that_is_cut_short_is_named(shards, num_bytes, streaming):
    path = shards / "webdataset" / "train-1.tar"
    members = path.read_bytes().rstrip(b"\0")
    path.write_bytes(members + bytes(-len(members) % 512 + 1024))  # without the padding of tarfile
    arguments = DataArguments(dataset_name=str(path.parent), streaming=streaming, image_column_name="png")
    options = {"train": True, "validation": False, "train_labels": False, "may_stream": True}
    assert "train" in load_images(arguments, **options)
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(ValueError, match=naming("webdataset/train-1.tar")):
        load_images(arguments, **options)


@pytest.mark.parametrize("streaming", (False, True))
def test_archive_that_is_damaged_or_holds_another_is_named(shards, streaming):
    path = shards / "webdataset" / "train-1.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        start = archive.getmembers()[5].offset
    flipped = bytes([whole[start + 150] ^ 1])
    arguments = DataArguments(dataset_name=str(path.parent), streaming=streaming, **WEBDATASET_COLUMNS)
    for content in (
        whole[: start + 150] + flipped + whole[start + 151 :],
        whole[:start] + bytes(512) + whole[start + 512 :],
        whole[:start] + bytes(4096) + whole[start + 4096 :],
        whole + whole,
        b"no archive",
    ):
        path.write_bytes(content)
        with pytest.raises(BadData, match=r"train-1.tar .* byte \d+"):
            load_images(arguments, train=True, validation=False, may_stream=True)
    path.write_bytes(whole + b"\n")
    assert len(list(load_images(arguments, train=True, validation=False, may_stream=True)["train"])) == 14


@pytest.mark.parametrize("num_workers", (0, 1, 3))
@pytest.mark.parametrize("kind", ("parquet", "webdataset"))
def test_limit_of_a_stream_holds_for_any_number_of_workers(shards, image_processor, kind, num_workers):
    columns = WEBDATASET_COLUMNS if kind == "webdataset" else {}
    arguments = DataArguments(dataset_name=str(shards / kind), streaming=True, max_eval_samples=11, **columns)
    split = load_images(arguments, train=False, validation=True, may_stream=True)["validation"]
    examples = evaluation_images(split, image_processor)
    num_workers = num_evaluation_workers(examples, num_workers, num_processes=1)
    first = [example["pixel_values"] for example in examples]
    read = [pixels for batch in DataLoader(examples, 4, num_workers=num_workers) for pixels in batch["pixel_values"]]
    assert len(read) == 11 and torch.equal(torch.stack(read), torch.stack(first))


def test_stream_that_cannot_be_used_is_refused(shards, image_folders):
    arguments = DataArguments(dataset_name=str(shards / "webdataset"), streaming=True, **WEBDATASET_COLUMNS)
    with pytest.raises(ValueError, match="--streaming"):
        load_images(arguments, train=False, validation=True)
    with pytest.raises(ValueError, match=naming("image, label", "png, cls")):
        load_images(
            DataArguments(dataset_name=arguments.dataset_name, streaming=True),
            train=True,
            validation=False,
            may_stream=True,
        )
    images = load_images(arguments, train=True, validation=False, may_stream=True)
    with pytest.raises(BadData, match=naming("0 to 1", "002.png", "train-0.tar")):
        list(align_labels(images["train"], {0: "ant", 1: "bee"}))
