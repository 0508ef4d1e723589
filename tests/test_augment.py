"""Crops: inside of the picture, spread as they should be, and to the level what Pillow would make."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.augment import BOX_DRAWS, RATIOS, Box, center_crop, random_box, train_crop
from pipeline.decode import decode

BILINEAR = Image.Resampling.BILINEAR
NOISE = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
SQUARE = NOISE[:20, :20]

sides = st.integers(1, 3000)


def numbers(seed: int) -> list[float]:
    found: list[float] = np.random.default_rng(seed).random(BOX_DRAWS).tolist()
    return found


@given(width=sides, height=sides, low=st.floats(1e-6, 1), seed=st.integers(0, 2**32))
def test_a_training_crop_stays_inside(width: int, height: int, low: float, seed: int) -> None:
    left, top, w, h = random_box(width, height, numbers(seed), (low, 1.0))
    assert 0 <= left <= left + w <= width
    assert 0 <= top <= top + h <= height
    assert w >= 1
    assert h >= 1


def test_training_crops_are_spread_over_area_ratio_and_place() -> None:
    boxes = [random_box(1000, 1000, numbers(i), (0.2, 0.5)) for i in range(4000)]
    area = np.array([w * h / 1e6 for _, _, w, h in boxes])
    ratio = np.array([math.log(w / h) for _, _, w, h in boxes])
    across = np.array([left / (1000 - w) for left, _, w, _ in boxes])
    down = np.array([top / (1000 - h) for _, top, _, h in boxes])
    for found, low, high in ((area, 0.2, 0.5), (ratio, *np.log(RATIOS)), (across, 0, 1), (down, 0, 1)):
        assert low - 0.003 <= found.min() < low + 0.01 * (high - low) + 0.003
        assert high + 0.003 >= found.max() > high - 0.01 * (high - low) - 0.003
        assert abs(found.mean() - (low + high) / 2) < 0.02 * (high - low)
        assert abs(found.std() - (high - low) / math.sqrt(12)) < 0.02 * (high - low)
    assert abs(np.corrcoef([area, ratio, across, down]) - np.eye(4)).max() < 0.06


@pytest.mark.parametrize(
    ("size", "box"), [((1000, 1), (499, 0, 1, 1)), ((30, 900), (0, 430, 30, 40)), ((90, 9), (39, 0, 12, 9))]
)
def test_a_picture_too_long_for_any_crop_gives_its_middle(
    size: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    assert random_box(*size, numbers(0), (1.0, 1.0)) == box


def test_whole_crops_without_flip_are_the_picture_and_with_flip_its_mirror() -> None:
    for mirrored, expected in ((False, SQUARE), (True, SQUARE[:, ::-1])):
        found = train_crop(SQUARE, Box(0, 0, 20, 20), size=20, mirrored=mirrored)
        assert np.array_equal(np.asarray(found), expected)


@given(
    width=st.integers(1, 400),
    height=st.integers(1, 400),
    size=st.integers(1, 64),
    pct=st.sampled_from([0.25, 0.5, 0.875, 0.95, 1.0]),
)
def test_a_center_crop_is_the_middle_of_the_resized_picture(
    width: int, height: int, size: int, pct: float
) -> None:
    """Against the slow way, that makes the whole resized picture first; rounding may differ by a few levels."""
    image = Image.fromarray(NOISE).resize((width, height), Image.Resampling.NEAREST)
    found = center_crop(np.asarray(image), size=size, pct=pct)
    assert found.shape == (size, size, 3)
    factor = size / pct / min(width, height)
    whole = (max(size, round(width * factor)), max(size, round(height * factor)))
    if max(whole) > 3000:
        return
    left, top = (whole[0] - size) // 2, (whole[1] - size) // 2
    expected = image.resize(whole, BILINEAR).crop((left, top, left + size, top + size))
    assert np.abs(found.astype(int) - np.asarray(expected, int)).max() <= 3


@pytest.mark.parametrize("shape", [(1, 1), (1, 10_000), (10_000, 1), (2, 3), (65_535, 3), (31, 33)])
@pytest.mark.parametrize("pct", [1.0, 0.875, 0.01])
def test_a_center_crop_has_its_size_whatever_the_shape(shape: tuple[int, int], pct: float) -> None:
    assert center_crop(np.zeros((*shape, 3), np.uint8), size=32, pct=pct).shape == (32, 32, 3)


def test_a_picture_of_the_right_size_is_left_as_it_is() -> None:
    assert np.array_equal(center_crop(SQUARE, size=20, pct=1.0), SQUARE)


# --- pixel truth -------------------------------------------------------------------------------------------


def by_pillow(pixels: np.ndarray, box: Box, *, size: int, mirrored: bool) -> np.ndarray:
    """The user's default: Pillow's crop, its antialiased bilinear resize, its flip."""
    left, top, w, h = box
    image = Image.fromarray(pixels).crop((left, top, left + w, top + h)).resize((size, size), BILINEAR)
    return np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image, int)


def differences(pixels: np.ndarray, truth: np.ndarray, i: int) -> np.ndarray:
    height, width, _ = pixels.shape
    box, mirrored = random_box(width, height, numbers(i), (0.08, 1.0)), i % 2 == 0
    found = train_crop(pixels, box, size=160, mirrored=mirrored)
    return np.abs(found.numpy() - by_pillow(truth, box, size=160, mirrored=mirrored))


@pytest.mark.parametrize("shape", [(400, 300), (90, 700), (31, 33), (1, 9), (160, 160)])
def test_a_training_crop_is_pillows_to_two_levels(shape: tuple[int, int]) -> None:
    """Of noise, the worst case."""
    pixels = np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)
    found = np.stack([differences(pixels, pixels, i) for i in range(20)])
    assert found.max() <= 2
    assert found.mean() < 0.1


@pytest.mark.skipif("GSA_PHOTOS" not in os.environ, reason="GSA_PHOTOS names no class-per-folder pictures")
def test_training_crops_of_photographs_differ_from_pillows_by_less_than_a_tenth_of_a_level() -> None:
    photos = sorted(p for p in Path(os.environ["GSA_PHOTOS"]).rglob("*") if p.is_file())[::20]
    found = [
        differences(decode(p.read_bytes()), np.asarray(Image.open(p).convert("RGB")), i)
        for i, p in enumerate(photos)
    ]
    assert len(found) > 20
    assert max(d.max() for d in found) <= 1
    assert np.mean([d.mean() for d in found]) < 0.1
