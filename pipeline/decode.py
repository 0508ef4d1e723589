"""Encoded image -> RGB pixels; what is broken, foreign or a decompression bomb is refused."""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

Pixels = NDArray[np.uint8]  # (H, W, 3), RGB

JPEG, END = b"\xff\xd8", b"\xff\xd9"  # how such a file begins and ends
FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 50_000_000
MAX_FILE_BYTES = 4 * MAX_PIXELS  # no picture that decode() takes is larger
# What libjpeg says of rows that it was not asked for: they end at a restart or at the end of the image.
LEFT_OVER = re.compile(r"extraneous bytes before marker 0xd[0-79]$")
# Bombs, whose size is checked here, and odd EXIF. Once and for all: catch_warnings() is not for threads.
warnings.filterwarnings("ignore", module="PIL")


class DecodeError(ValueError):
    """These bytes are not an image that we read."""


def size(data: bytes) -> tuple[int, int]:
    """Width and height of an encoded image, by its header. Raises DecodeError as `decode` does."""
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        with _opened(data) as image:
            return image.size
    return width, height


def decode(data: bytes, *, rows: int | None = None) -> Pixels:
    """JPEG, PNG or WebP bytes -> (H, W, 3) uint8. EXIF rotation is not applied (as torchvision does).

    rows: how many of the upper rows are needed; where that saves time, the others are left out.
    Raises DecodeError: another format, cut short, damaged, or above 50 million pixels (seen in the
    header, before any pixel is made).
    """
    if data.startswith(JPEG):
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
            if colours != "CMYK" and height * width <= MAX_PIXELS:
                upper = _upper_rows(data, rows, width, height) if rows else None
                # faster than Pillow, and without the GIL
                return simplejpeg.decode_jpeg(data) if upper is None else upper
        except ValueError:  # also for a harmless warning of libjpeg: Pillow knows which are
            pass
    with _opened(data) as image:
        if image.mode == "I;16":  # a gray PNG of 16 bits: convert() would make 256 and above white
            gray = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return np.array(gray.convert("RGB"))
        return np.array(image.convert("RGB"))


def _upper_rows(data: bytes, rows: int, width: int, height: int) -> Pixels | None:
    """The upper rows of a baseline JPEG, the same to the bit; None where it has to be decoded as a whole.

    No kept Python library decodes a region, but a decoder stops after as many rows as the header promises,
    and most random crops end well above the last.
    """
    rows = -(-rows // 16) * 16 + 16  # whole blocks, and one more: upsampling looks at its neighbours
    frame = _baseline_frame(data)
    if frame is None or rows >= height or not data.endswith(END):  # what is cut short shall be found out
        return None
    pixels, cut = np.empty((rows, width, 3), np.uint8), bytearray(data)
    cut[frame + 5 : frame + 7] = rows.to_bytes(2)
    try:
        simplejpeg.decode_jpeg(cut, buffer=pixels)
    except ValueError as error:
        if not LEFT_OVER.search(str(error)):
            return None
    return pixels


def _baseline_frame(data: bytes) -> int | None:
    """Where the frame header of a sequential JPEG begins."""
    at = len(JPEG)
    while at + 9 <= len(data) and data[at] == 0xFF and data[at + 1] not in (0xC2, 0xDA):
        if data[at + 1] in (0xC0, 0xC1):
            return at
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return None


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """An image whose pixels are not made yet; what Pillow finds wrong with it is a DecodeError."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DecodeError(f"{image.width}x{image.height} is above {MAX_PIXELS} pixels")
            yield image
    except UnidentifiedImageError:
        raise DecodeError(f"not a {', '.join(FORMATS)} image ({len(data)} bytes)") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DecodeError(str(error)) from None
