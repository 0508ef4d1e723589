"""Encoded image -> RGB pixels; what is broken, foreign or a decompression bomb is refused."""

import io
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 50_000_000


class DecodeError(ValueError):
    """These bytes are not an image that we read."""


def decode(data: bytes) -> Image.Image:
    """JPEG, PNG or WebP bytes -> an RGB image. EXIF rotation is not applied (as torchvision does).

    Raises DecodeError: another format, cut short, damaged, or above 50 million pixels (seen in the
    header, before any pixel is made).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's own bomb and EXIF warnings: the size is checked here
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise DecodeError(f"{image.width}x{image.height} is above {MAX_PIXELS} pixels")
                if image.mode == "I;16":  # a gray PNG of 16 bits: convert() would make 256 and above white
                    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
                return image.convert("RGB")
    except UnidentifiedImageError:
        raise DecodeError(f"not a {', '.join(FORMATS)} image ({len(data)} bytes)") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DecodeError(str(error)) from None
