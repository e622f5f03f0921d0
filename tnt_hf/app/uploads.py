"""What a visitor sends -> an upright RGB image, or a sentence that says why not."""

from io import BytesIO

from PIL import Image as PILImage
from PIL import UnidentifiedImageError

from ..data import decode_image


FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_BYTES = 20 * 2**20
MAX_PIXELS = 50_000_000
# Of all scans of a progressive JPEG, each of which goes over the whole image; a usual one has about 10 of them.
MAX_SCANNED_PIXELS = 5_000_000_000
MAX_ASPECT_RATIO = 50  # an image processor that scales the shorter side makes the longer one as many times as long
SHOWN_SIDE = 1024  # pixels; more than any model here sees


class RefusedInput(ValueError):
    """A picture or model id that is not accepted; the message is written for the visitor."""


def read_image(data: bytes) -> PILImage.Image:
    """
    The RGB image in an uploaded file, upright, its first frame if it is animated, at most `SHOWN_SIDE` pixels long.

    Raises:
        RefusedInput: If it is no whole image of `FORMATS`, or larger than allowed. Pixels are decoded only when kind
            and size have passed.
    """
    if not data:
        raise RefusedInput("The file is empty.")
    if len(data) > MAX_BYTES:
        raise RefusedInput(f"The file has {len(data) / 2**20:.0f} MB; at most {MAX_BYTES >> 20} MB are accepted.")
    largest = f"at most {MAX_PIXELS // 10**6} megapixels are accepted"
    try:
        with PILImage.open(BytesIO(data), formats=FORMATS) as image:
            (width, height), kind = image.size, image.format
    except PILImage.DecompressionBombError:
        raise RefusedInput(f"The image is far too large; {largest}.") from None
    except UnidentifiedImageError:
        raise RefusedInput("This is not an image that can be read: use PNG, JPEG, WebP, GIF or BMP.") from None
    except Exception:
        raise RefusedInput("The image is damaged: its header cannot be read.") from None
    if width * height > MAX_PIXELS:
        raise RefusedInput(f"The image has {width} x {height} = {width * height / 1e6:.0f} megapixels; {largest}.")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise RefusedInput(
            f"The image is {width} x {height} pixels; the longer side may be at most {MAX_ASPECT_RATIO} times the "
            "shorter one."
        )
    num_scans = data.count(b"\xff\xda") if kind in ("JPEG", "MPO") else 1
    if num_scans * width * height > MAX_SCANNED_PIXELS:
        raise RefusedInput(f"The JPEG has {num_scans} scans, which would take too long to decode: save it anew.")
    try:
        image = decode_image({"bytes": data, "path": None})
    except ValueError:
        raise RefusedInput("The image is damaged or cut short: its pixels cannot be read.") from None
    image.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    return image


__all__ = ["FORMATS", "MAX_BYTES", "MAX_PIXELS", "RefusedInput", "read_image"]
