"""What happens to one picture: random resized crop and flip for training, resize and centre crop at test."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from pipeline.decode import Pixels

BILINEAR = Image.Resampling.BILINEAR
RATIOS = (3 / 4, 4 / 3)  # width / height of a training crop, as in Inception and every recipe since
BOX_DRAWS = 2 + 2 * 10  # numbers that `random_box` is given: its tries are ten


class Box(NamedTuple):
    """A part of a picture, in pixels."""

    left: int
    top: int
    width: int
    height: int


def train_crop(pixels: Pixels, box: Box, *, size: int, mirrored: bool) -> Tensor:
    """The part of a picture in the box, resized to (size, size, 3) uint8, and mirrored if so wished.

    Bilinear with antialiasing, as Pillow does it and faster: of photographs no level is off by more than 1.
    """
    crop = pixels[box.top : box.top + box.height, box.left : box.left + box.width]
    image = torch.from_numpy(crop)[None].permute(0, 3, 1, 2)  # (1, 3, h, w), in torch's eyes channels last
    resized = interpolate(image, (size, size), mode="bilinear", antialias=True).permute(0, 2, 3, 1)[0]
    return resized.flip(1) if mirrored else resized


def center_crop(pixels: Pixels, *, size: int, pct: float) -> Pixels:
    """The central (size, size, 3) of the picture whose shorter side is resized to size / pct pixels.

    Only they are made, by Pillow: of a 1x10000 picture the whole would be gigabytes.
    """
    image = Image.fromarray(pixels)
    factor = size / pct / min(image.size)
    width, height = (max(size, round(side * factor)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    across, down = image.width / width, image.height / height  # pixels of the picture for a resized one
    box = (left * across, top * down, (left + size) * across, (top + size) * down)
    return np.array(image.resize((size, size), BILINEAR, box=box))


def random_box(width: int, height: int, draws: Sequence[float], scale: tuple[float, float]) -> Box:
    """A crop of `scale` of the area of a picture (Szegedy et al., arXiv 1409.4842, as torchvision draws it).

    draws: BOX_DRAWS numbers of [0, 1): the place, then area and ratio of each try.
    """
    (low, high), (wide, tall) = scale, RATIOS
    for i in range(2, BOX_DRAWS, 2):
        area = width * height * (low + (high - low) * draws[i])
        ratio = wide * (tall / wide) ** draws[i + 1]
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Box(int(draws[0] * (width - w + 1)), int(draws[1] * (height - h + 1)), w, h)
    w = min(width, round(height * RATIOS[1]))
    h = min(height, round(width / RATIOS[0]))
    return Box((width - w) // 2, (height - h) // 2, w, h)
