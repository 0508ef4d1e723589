"""What happens to one picture: random resized crop and flip for training, resize and centre crop at test."""

import math

import numpy as np
from PIL import Image

BILINEAR = Image.Resampling.BILINEAR
RATIOS = (3 / 4, 4 / 3)  # width / height of a training crop, as in Inception and every recipe since


def sample_rng(seed: int, epoch: int, sample: int) -> np.random.Generator:
    """The generator of a sample in an epoch: the same picture whatever rank or worker draws it."""
    return np.random.default_rng((seed, epoch, 1, sample))  # 1: not the generator of the epoch's order


def train_crop(
    image: Image.Image,
    rng: np.random.Generator,
    *,
    size: int,
    scale: tuple[float, float],
    flip: float,
) -> Image.Image:
    """A random crop of `scale` of the area, resized to size x size pixels, mirrored with probability `flip`."""
    left, top, width, height = _random_box(image.width, image.height, rng, scale)
    crop = image.crop((left, top, left + width, top + height)).resize((size, size), BILINEAR)
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < flip else crop


def center_crop(image: Image.Image, *, size: int, pct: float) -> Image.Image:
    """The central size x size pixels of the picture whose shorter side is resized to size / pct pixels.

    Only they are made: of a 1x10000 picture the whole would be gigabytes.
    """
    factor = size / pct / min(image.size)
    width, height = (max(size, round(side * factor)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    across, down = image.width / width, image.height / height  # pixels of the picture for a resized one
    box = (left * across, top * down, (left + size) * across, (top + size) * down)
    return image.resize((size, size), BILINEAR, box=box)


def _random_box(
    width: int, height: int, rng: np.random.Generator, scale: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Left, top, width, height of a crop (Szegedy et al., arXiv 1409.4842, as torchvision draws it)."""
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(RATIOS[0]), math.log(RATIOS[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    w = min(width, round(height * RATIOS[1]))
    h = min(height, round(width / RATIOS[0]))
    return (width - w) // 2, (height - h) // 2, w, h
