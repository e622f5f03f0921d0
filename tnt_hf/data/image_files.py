"""Image files: what is found in a folder, what is refused, and how one is decoded."""

import os
import tarfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Image
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from PIL import Image as PILImage
from PIL import TiffImagePlugin, UnidentifiedImageError
from tqdm.auto import tqdm
from transformers.utils import logging


logger = logging.get_logger(__name__)

READ_SUFFIXES = {*ImageFolder.EXTENSIONS, ".zip"}
METADATA_NAMES = ImageFolder.METADATA_FILENAMES
NUM_CHECKING_THREADS = 16  # which wait for storage most of the time
END_OF_TAR = 2 * tarfile.BLOCKSIZE * b"\0"
FORMATS_OF_16_BITS = ("PNG", "PPM")  # where Pillow's 32-bit integers hold 16 bits


class BadData(ValueError):
    """Images or labels that a run meets and cannot use."""

    def __str__(self) -> str:
        """On one line, without the traceback that PyTorch puts before what a worker raised."""
        message = super().__str__().rpartition(f"{__name__}.{type(self).__name__}: ")[2]
        return " ".join(line.strip() for line in message.splitlines() if line.strip())


def find_images(source: str | Path, flag: str) -> list[Path]:
    """
    The image files of a folder, at any depth and in the order of their paths, or the one file that `source` is.

    Args:
        source (`str` or `Path`): The folder, or an image file.
        flag (`str`): Name of the flag that named the source, without dashes, for errors.

    Raises:
        ValueError: If there are none.
    """
    if Path(source).is_file():
        return [Path(source)]
    if not Path(source).is_dir():
        raise ValueError(f"--{flag} must be an image or a folder of images, got {source}, which does not exist.")
    suffixes = {suffix for suffix, name in PILImage.registered_extensions().items() if name in PILImage.OPEN}
    paths = sorted(path for path in Path(source).rglob("*") if path.suffix.lower() in suffixes)
    if not paths:
        raise ValueError(f"--{flag} {source} holds no images.")
    return paths


def check_files(folder: Path, is_image_folder: bool) -> None:
    """
    Look for what readers of folders and archives pass over without a word.

    Args:
        folder (`Path`): What is to be read; nothing is looked at if it is none.
        is_image_folder (`bool`): Whether its files are to be images. Those that are not by their names are told.

    Raises:
        BadData: If a link leads to no file, a tar archive is damaged, or there are no images where all should be.
    """
    archives, others, num_files = [], [], 0
    for parent, folders, names in os.walk(folder):
        folders[:] = filter(_is_shown, folders)
        paths = [Path(parent, name) for name in filter(_is_shown, names)]
        for path in (*paths, *(Path(parent, name) for name in folders)):
            if path.is_symlink() and not path.is_file():
                what = "which is not followed" if path.is_dir() else "which is not there"
                raise BadData(f"{path} is a link to {path.readlink()}, {what}.")
        num_files += len(paths)
        archives += [path for path in paths if path.suffix.lower() == ".tar"]
        if is_image_folder:
            others += [path for path in paths if path.suffix.lower() not in READ_SUFFIXES]
    if is_image_folder and num_files == len(others):
        raise BadData(f"{folder} holds no images.")
    others = [path for path in others if path.name not in METADATA_NAMES]
    if others:
        logger.warning(f"{len(others)} files are passed over, as no images have names like {others[0]}.")
    with ThreadPoolExecutor(NUM_CHECKING_THREADS) as threads:
        for _ in tqdm(threads.map(_check_archive, archives), "checking archives", len(archives), disable=not archives):
            pass


def _check_archive(path: Path) -> None:
    """
    Raises:
        BadData: If not all of a tar archive can be read. Readers take a damaged header for the end of the archive.
    """
    end, rest = 0, b""
    with suppress(tarfile.TarError, EOFError), tarfile.open(path, "r:") as archive:
        for _ in archive:
            end = archive.offset
        archive.fileobj.seek(archive.offset)
        rest = archive.fileobj.read(2**20)
    padding = rest[: len(END_OF_TAR)]
    if padding != END_OF_TAR or len(rest.strip(b"\0")) >= tarfile.BLOCKSIZE:
        raise BadData(
            f"{path} is cut short or damaged: what is behind byte {end} cannot be read, nor is it the end of a tar "
            "archive, two blocks of zeros. Copy it again."
        )


def _is_shown(name: str) -> bool:
    """As `datasets` tells what it reads of a folder."""
    return not name.startswith((".", "__"))


def check_headers(images: Dataset, source: str) -> None:
    """
    Name the images of an evaluation that are none before it, or a training, begins: all of them count.

    Args:
        images (`Dataset`): Records with an undecoded `image`, of which the headers alone are read.
        source (`str`): What the data are called.

    Raises:
        BadData: If there are any; the message names ten.
    """
    errors = []
    for example in images.select_columns("image"):
        record = example["image"]
        try:
            PILImage.open(record["path"] if record["bytes"] is None else BytesIO(record["bytes"])).close()
        except Exception:  # or it is a file that `datasets` alone can open
            try:
                decode_image(record)
            except BadData as error:
                errors.append(str(error))
    if errors:
        raise BadData(
            f"{len(errors)} of {len(images)} validation images of {source} cannot be read: {'; '.join(errors[:10])}"
        )


def decode_image(record: dict[str, Any] | None) -> PILImage.Image:
    """
    The RGB image of a record of an undecoded `datasets` image column; 16-bit greyscale is scaled to 8 bits.

    Raises:
        BadData: If the image cannot be read; the message names the file if the record does.
    """
    if record is None:
        raise BadData("An image is missing: its column is empty.")
    try:
        image = Image().decode_example(record)
        if image.mode == "F" or (image.mode == "I" and image.format not in FORMATS_OF_16_BITS):
            raise ValueError("its pixels are floating-point numbers or 32-bit integers, of no known range")
        if image.format == "FITS" or _is_unusual(getattr(image, "tag_v2", {}), image.mode):
            raise ValueError("its pixels are signed or inverted in a way that Pillow does not read")
        if image.mode.startswith("I"):
            # Pillow would clip 16 bits to 8 and leave the image white
            image = PILImage.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return image.convert("RGB")
    except Exception as error:
        reason = "it is in no known format" if isinstance(error, UnidentifiedImageError) else error
        raise BadData(f"Image {record.get('path') or 'without a file name'} cannot be read: {reason}") from error


def _is_unusual(tags: Mapping[int, Any], mode: str) -> bool:
    """Whether pixels of a TIFF are signed, or of 16 bits with 0 for white, which Pillow takes for the usual."""
    is_signed = 2 in np.atleast_1d(tags.get(TiffImagePlugin.SAMPLEFORMAT, 1))
    return is_signed or (mode.startswith("I") and tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0)


__all__ = ["BadData", "check_files", "check_headers", "decode_image", "find_images"]
