"""Augmentation on the device: Pillow's pictures, torchvision's distributions; a sample is the same in any batch."""

import itertools
import math
import os
import random
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from scipy import stats
from torch import Tensor

from pipeline import batch_augment
from pipeline.batch_augment import BINS, DRAWS, MAX_OPS, NAMES, OPERATIONS, SIGNED, augment_batch
from pipeline.config import AugmentConfig
from pipeline.data import MEAN, STD, to_device

CPU = torch.device("cpu")
BILINEAR = Image.Resampling.BILINEAR
GEOMETRY = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
COLOURS = tuple(name for name in NAMES[1:] if name not in GEOMETRY)
ON = {  # every setting whose pictures do not depend on the batch
    "jitter": AugmentConfig(color_jitter=0.4),
    "randaugment": AugmentConfig(policy="randaugment", ops=3, magnitude=12),
    "trivialaugment": AugmentConfig(policy="trivialaugment"),
    "erase": AugmentConfig(erase=0.5),
    "all": AugmentConfig(policy="randaugment", color_jitter=0.3, erase=0.5),
}
each_setting = pytest.mark.parametrize("config", ON.values(), ids=ON)


def draws(count: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random((count, DRAWS), np.float32))


def pictures(count: int = 12, height: int = 40, width: int = 56) -> Tensor:
    """(count, H, W, 3) uint8 of all sorts: noise of several spreads, a slope, few colours, one colour."""
    rng = np.random.default_rng(1)
    slope = np.linspace(20, 180, height * width * 3).reshape(height, width, 3)
    sorts = [
        rng.integers(0, 256, slope.shape),
        rng.normal(128, 30, slope.shape),
        slope + rng.normal(0, 8, slope.shape),
        slope,
        rng.integers(0, 2, slope.shape) * 100 + 50,
        np.full(slope.shape, 77),
    ]
    some = [sorts[i % len(sorts)] for i in range(count)]
    return torch.from_numpy(np.stack(some).clip(0, 255).astype(np.uint8))


def labels(count: int) -> Tensor:
    return torch.arange(count) % 5


def augmented(images: Tensor, numbers: Tensor, config: AugmentConfig) -> Tensor:
    return augment_batch(images, labels(len(images)), numbers, config, classes=5)[0]


# --- operations against Pillow -----------------------------------------------------------------------------


def affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, BILINEAR)


PILLOW: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "identity": lambda image, _: image,
    "shear_x": lambda image, slope: affine(image, 1, slope, 0, 0, 1, 0),
    "shear_y": lambda image, slope: affine(image, 1, 0, 0, slope, 1, 0),
    "translate_x": lambda image, pixels: affine(image, 1, 0, -pixels, 0, 1, 0),
    "translate_y": lambda image, pixels: affine(image, 1, 0, 0, 0, 1, -pixels),
    "rotate": lambda image, degrees: image.rotate(degrees, BILINEAR),
    "brightness": lambda image, more: ImageEnhance.Brightness(image).enhance(1 + more),
    "color": lambda image, more: ImageEnhance.Color(image).enhance(1 + more),
    "contrast": lambda image, more: ImageEnhance.Contrast(image).enhance(1 + more),
    "sharpness": lambda image, more: ImageEnhance.Sharpness(image).enhance(1 + more),
    "posterize": lambda image, bits: ImageOps.posterize(image, int(bits)),
    "solarize": lambda image, level: ImageOps.solarize(image, level),  # type: ignore[arg-type]
    "autocontrast": lambda image, _: ImageOps.autocontrast(image),
    "equalize": lambda image, _: ImageOps.equalize(image),
}


def by_pillow(pixels: Tensor, name: str, strength: float) -> Tensor:
    """One picture, (H, W, 3)."""
    return torch.from_numpy(np.array(PILLOW[name](Image.fromarray(pixels.numpy()), strength)))


def strengths_of(name: str) -> Tensor:
    """Every strength that a policy can ask for, at 40 x 56 pixels; both signs where it has them."""
    both = (batch_augment._randaugment_strengths(40, 56), batch_augment._trivialaugment_strengths())
    found = torch.cat([table[NAMES.index(name)] for table in both]).float().unique()
    return torch.cat([-found, found]) if name in SIGNED else found


def difference(name: str, images: Tensor) -> Tensor:
    """|ours - Pillow's| in levels, every strength on every picture in turn."""
    operation = OPERATIONS[name]
    assert operation is not None
    strengths = strengths_of(name)
    some = images[torch.arange(len(strengths) * 2) % len(images)]
    strengths = strengths.repeat_interleave(2)
    ours = operation(some, strengths)
    theirs = [by_pillow(one, name, s) for one, s in zip(some, strengths.tolist(), strict=True)]
    return (ours.int() - torch.stack(theirs).int()).abs()


@pytest.mark.parametrize("name", COLOURS)
def test_colours_are_pillows_bit_for_bit(name: str) -> None:
    assert not difference(name, pictures(11)).any()


@pytest.mark.parametrize("name", GEOMETRY)
def test_geometry_is_pillows_but_for_one_level_in_few_values(name: str) -> None:
    off = difference(name, pictures(11))
    assert (
        off > 0
    ).double().mean() < 0.02  # 0.066 of the picture of few colours: many exact ties; 0.01 of others
    assert (off > 1).double().mean() < 1e-4  # pixels whose source lies on the rim, in or out by rounding


@pytest.mark.parametrize("name", ["autocontrast", "equalize"])
@pytest.mark.parametrize("side", [1, 2, 16, 17, 40])
def test_the_smallest_pictures_have_pillows_levels(name: str, side: int) -> None:
    assert not difference(name, pictures(12, side, side)).any()


@pytest.mark.skipif("GSA_PHOTOS" not in os.environ, reason="GSA_PHOTOS names no class-per-folder pictures")
def test_photographs_become_what_pillow_makes_of_them() -> None:
    paths = sorted(
        p for p in Path(os.environ["GSA_PHOTOS"]).rglob("*") if p.suffix.lower() in (".jpeg", ".jpg")
    )
    some = random.Random(0).sample(paths, min(16, len(paths)))
    photos = [Image.open(p).convert("RGB").resize((96, 96), BILINEAR) for p in some]
    images = torch.from_numpy(np.stack([np.asarray(photo) for photo in photos]))
    for name in COLOURS:
        assert not difference(name, images).any(), name
    for name in GEOMETRY:
        off = difference(name, images).double()
        assert off.mean() < 0.02, name  # 0.010 in the mean at most on ImageNet's
        assert (off > 0).double().mean() < 0.01, name


@pytest.mark.parametrize("name", ["jitter", "randaugment", "trivialaugment"])
def test_a_batch_is_what_pillow_makes_of_it_sample_by_sample(name: str) -> None:
    images, numbers = pictures(48), draws(48)
    ours = augmented(images, numbers, ON[name])
    rounds = batch_augment._rounds(numbers.double(), ON[name], height=40, width=56)
    assert len(rounds) == {"jitter": 3, "randaugment": 3, "trivialaugment": 1}[name]
    theirs = images.clone()
    for i, one in itertools.product(range(48), rounds):
        theirs[i] = by_pillow(theirs[i], NAMES[one.operations[i]], one.strengths[i].item())
    levels = (ours * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)).permute(
        0, 2, 3, 1
    ) * 255
    off = (levels - theirs).abs() > 0.01
    assert off.double().mean() < 0.02  # in three rounds
    untouched = [i for i in range(48) if not {NAMES[r.operations[i]] for r in rounds} & set(GEOMETRY)]
    assert not off[untouched].any()


# --- what is drawn -----------------------------------------------------------------------------------------


def evenly(found: Counter[Any], kinds: int) -> bool:
    """A chi-squared test that fails once in 10,000."""
    return len(found) == kinds and stats.chisquare(list(found.values())).pvalue > 1e-4


def rounds_of(config: AugmentConfig, count: int = 14_000, side: int = 224) -> list[batch_augment.Round]:
    return batch_augment._rounds(draws(count).double(), config, height=side, width=side)


def test_randaugment_draws_each_operation_and_sign_evenly_at_torchvisions_strengths() -> None:
    expected = {  # torchvision.transforms.RandAugment(magnitude=9) at 224 pixels
        **dict.fromkeys(("identity", "autocontrast", "equalize"), 0.0),
        **dict.fromkeys(("shear_x", "shear_y"), 0.09),
        **dict.fromkeys(("translate_x", "translate_y"), 30.0),
        "rotate": 9.0,
        **dict.fromkeys(("brightness", "color", "contrast", "sharpness"), 0.27),
        "posterize": 7.0,
        "solarize": 178.5,
    }
    rounds = rounds_of(AugmentConfig(policy="randaugment", ops=MAX_OPS, magnitude=9))
    assert len(rounds) == MAX_OPS
    for one in rounds:
        assert evenly(Counter(one.operations.tolist()), len(NAMES))
        for i, name in enumerate(NAMES):
            found = one.strengths[one.operations == i]
            assert found.abs().allclose(torch.tensor(expected[name]), atol=1e-6)
            positive = (found > 0).double().mean()
            assert 0.4 < positive < 0.6 if name in SIGNED else (found >= 0).all()
    pairs = Counter(zip(rounds[0].operations.tolist(), rounds[1].operations.tolist(), strict=True))
    assert evenly(pairs, len(NAMES) ** 2)


def test_trivialaugment_draws_operation_strength_and_sign_evenly() -> None:
    greatest = {  # torchvision.transforms.TrivialAugmentWide
        **dict.fromkeys(("shear_x", "shear_y", "brightness", "color", "contrast", "sharpness"), 0.99),
        **dict.fromkeys(("translate_x", "translate_y"), 32.0),
        "rotate": 135.0,
    }
    (one,) = rounds_of(AugmentConfig(policy="trivialaugment"), 60_000)
    assert evenly(Counter(one.operations.tolist()), len(NAMES))
    for i, name in enumerate(NAMES):
        found = one.strengths[one.operations == i]
        if name in greatest:
            ramp = np.arange(BINS) * greatest[name] / (BINS - 1)
            ramp = np.trunc(ramp) if name.startswith("translate") else ramp
            assert np.allclose(np.unique(found.abs()), np.unique(ramp), atol=1e-5)
            assert evenly(Counter((found[found != 0] > 0).tolist()), 2)
        if name in ("rotate", "solarize"):
            assert evenly(Counter(found.abs().tolist()), BINS)
    bits = one.strengths[one.operations == NAMES.index("posterize")]
    assert sorted(bits.unique().tolist()) == [2, 3, 4, 5, 6, 7, 8]
    assert one.strengths[one.operations == NAMES.index("solarize")].unique()[[0, -1]].tolist() == [0, 255]


def test_colour_jitter_takes_each_operation_once_in_any_order_at_even_strengths() -> None:
    rounds = rounds_of(AugmentConfig(color_jitter=0.4))
    orders = torch.stack([one.operations for one in rounds], dim=1)
    assert evenly(Counter(tuple(NAMES[i] for i in row) for row in orders.tolist()), 6)
    assert {NAMES[i] for i in orders[0].tolist()} == {"brightness", "contrast", "color"}
    strengths = torch.stack([one.strengths for one in rounds], dim=1)
    for i in orders[0].tolist():
        assert stats.kstest(strengths[orders == i], stats.uniform(-0.4, 0.8).cdf).pvalue > 1e-4


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.5, 1.0, 4.0])
def test_shares_are_drawn_from_the_beta_distribution(alpha: float) -> None:
    numbers = np.random.default_rng(2).random((4000, 2))
    found = [batch_augment._beta(alpha, u, v) for u, v in numbers]
    assert stats.kstest(found, stats.beta(alpha, alpha).cdf).pvalue > 1e-3


@pytest.mark.parametrize("alpha", [1e-3, 0.2, 1.0, 50.0])
def test_a_share_is_within_0_and_1_at_the_ends_of_its_numbers(alpha: float) -> None:
    ends = (0.0, 1e-30, 0.25, 0.5, 0.75, 1 - 2**-53)
    assert all(0 <= batch_augment._beta(alpha, u, v) <= 1 for u, v in itertools.product(ends, ends))


# --- what a picture depends on -----------------------------------------------------------------------------


def test_nothing_on_is_plain_normalisation_whatever_the_draws() -> None:
    images = pictures()
    for numbers in (draws(12), torch.empty(12, 0)):
        found, targets = augment_batch(images, labels(12), numbers, AugmentConfig(), classes=5)
        assert found.equal(to_device(images, CPU))
        assert targets.equal(labels(12))
    idle = AugmentConfig(ops=3, magnitude=30)
    assert augmented(images, draws(12), idle).equal(to_device(images, CPU))


@each_setting
def test_a_sample_looks_the_same_in_any_batch(config: AugmentConfig) -> None:
    images, numbers = pictures(24), draws(24)
    together = augmented(images, numbers, config)
    assert not together.equal(to_device(images, CPU))
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    assert augmented(images[order], numbers[order], config).equal(together[order])
    for part in (slice(0, 1), slice(5, 16), slice(23, 24)):
        assert augmented(images[part], numbers[part], config).equal(together[part])


@each_setting
def test_labels_and_the_loaders_batch_stay_as_they_are(config: AugmentConfig) -> None:
    images, numbers = pictures(), draws(12)
    before = images.clone(), numbers.clone()
    found, targets = augment_batch(images, labels(12), numbers, config, classes=5)
    assert targets.equal(labels(12))
    assert images.equal(before[0])
    assert numbers.equal(before[1])
    assert found.shape == (12, 3, 40, 56)
    assert found.dtype == torch.float32
    assert found.is_contiguous(memory_format=torch.channels_last)


@each_setting
def test_autocast_changes_nothing(config: AugmentConfig) -> None:
    mixing = config.model_copy(update={"mixup": 0.4})
    plain = augment_batch(pictures(), labels(12), draws(12), mixing, classes=5)
    with torch.autocast("cpu", torch.bfloat16):
        cast = augment_batch(pictures(), labels(12), draws(12), mixing, classes=5)
    for a, b in zip(plain, cast, strict=True):
        assert a.dtype == torch.float32
        assert a.equal(b)


def test_draws_of_another_shape_are_refused() -> None:
    with pytest.raises(AssertionError, match=r"expected draws \(12, \d+\), got .*\[11, \d+\]"):
        augmented(pictures(), draws(11), AugmentConfig(erase=1))


# --- erasing -----------------------------------------------------------------------------------------------


def erase_boxes(count: int, probability: float, height: int, width: int) -> Tensor:
    numbers = draws(count).double()[:, batch_augment._ERASE]
    return batch_augment._erase_boxes(numbers, probability=probability, height=height, width=width)


def test_erased_rectangles_have_torchvisions_areas_ratios_and_places() -> None:
    top, bottom, left, right = erase_boxes(20_000, 1.0, 1000, 800).double()
    tall, wide = bottom - top, right - left
    assert (tall > 0).all()
    assert ((top >= 0) & (bottom <= 1000) & (left >= 0) & (right <= 800)).all()
    area, ratio = tall * wide / 800_000, (tall / wide).log()
    assert 0.0199 < area.min() < 0.021
    assert 0.325 < area.max() < 0.3305
    assert math.log(0.295) < ratio.min() < math.log(0.31)
    assert math.log(3.2) < ratio.max() < math.log(3.35)
    assert stats.kstest(top / (1000 - tall), "uniform").statistic < 0.015
    assert stats.kstest(left / (800 - wide), "uniform").statistic < 0.015
    easy = area < 0.2  # larger ones are sometimes drawn again: too long for the picture
    assert stats.kstest(area[easy], stats.uniform(0.02, 0.18).cdf).statistic < 0.015
    assert stats.kstest(ratio[easy], stats.uniform(math.log(0.3), math.log(11)).cdf).statistic < 0.015


@pytest.mark.parametrize(("probability", "low", "high"), [(0.0, 0, 0), (0.25, 950, 1050), (1.0, 4000, 4000)])
def test_as_many_are_erased_as_asked(probability: float, low: int, high: int) -> None:
    top, bottom, *_ = erase_boxes(4000, probability, 224, 224)
    assert low <= (bottom > top).sum() <= high


def test_a_rectangle_that_never_fits_is_not_erased() -> None:
    top, bottom, left, right = erase_boxes(100, 1.0, 1, 1)
    assert top.equal(bottom)
    assert left.equal(right)


def test_the_rectangle_and_nothing_else_is_the_mean_colour() -> None:
    images, numbers = pictures(), draws(12)
    found = augmented(images, numbers, AugmentConfig(erase=0.6))
    boxes = erase_boxes(12, 0.6, 40, 56).t().tolist()
    expected = to_device(images, CPU)
    for i, (top, bottom, left, right) in enumerate(boxes):
        expected[i, :, top:bottom, left:right] = 0
    assert 0 < sum(bottom > top for top, bottom, *_ in boxes) < 12
    assert found.equal(expected)


# --- mixing ------------------------------------------------------------------------------------------------


def mixed(config: AugmentConfig, seed: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Plain images; augmented ones and targets; each sample of its own class and of one even colour."""
    images = (torch.arange(count, dtype=torch.uint8) * 30).view(-1, 1, 1, 1).expand(-1, 24, 32, 3)
    found, targets = augment_batch(images, torch.arange(count), draws(count, seed), config, classes=count + 1)
    assert targets.shape == (count, count + 1)
    assert targets.dtype == found.dtype == torch.float32
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(targets.sum(1), torch.ones(()), atol=1e-6)
    return to_device(images, CPU), found, targets


@pytest.mark.parametrize("count", [1, 2, 7, 8])
def test_mixup_is_the_weighted_mean_of_pictures_and_of_labels(count: int) -> None:
    for seed in range(20):
        plain, found, targets = mixed(AugmentConfig(mixup=1.0), seed, count)
        u, v = draws(count, seed)[0, batch_augment._MIX][1:3].tolist()
        share = batch_augment._beta(1.0, u, v)
        for i in range(count):
            other = count - 1 - i
            assert found[i].allclose(share * plain[i] + (1 - share) * plain[other], atol=1e-5)
            weights = torch.zeros(count + 1)
            weights[i] += share
            weights[other] += 1 - share
            assert targets[i].allclose(weights, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 7, 8])
def test_cutmix_targets_are_the_share_of_pixels(count: int) -> None:
    shares = []
    for seed in range(40):
        plain, found, targets = mixed(AugmentConfig(cutmix=1.0), seed, count)
        for i in range(count):
            other = count - 1 - i
            own, foreign = (found[i] == plain[i])[0], (found[i] == plain[other])[0]
            assert (own | foreign).all()
            if i != other:
                assert targets[i, i].item() == pytest.approx(own.double().mean().item(), abs=1e-6)
                assert targets[i, other].item() == pytest.approx(foreign.double().mean().item(), abs=1e-6)
                rows, columns = foreign.any(1), foreign.any(0)
                assert foreign.equal(rows[:, None] & columns[None, :])  # one rectangle
        shares.append(targets[0, 0].item())
    assert count == 1 or len(set(shares)) > 20


def test_a_cut_box_has_its_area_in_the_middle_and_is_cut_at_the_rim() -> None:
    assert batch_augment._cut_box(0.75, 0.5, 0.5, 100, 80) == (25, 75, 20, 60)
    assert batch_augment._cut_box(0.75, 0.0, 0.999, 100, 80) == (0, 25, 59, 80)
    assert batch_augment._cut_box(1.0, 0.3, 0.3, 100, 80) == (30, 30, 24, 24)
    assert batch_augment._cut_box(0.0, 0.5, 0.5, 100, 80) == (0, 100, 0, 80)


def test_with_both_on_each_takes_half_of_the_batches() -> None:
    both = AugmentConfig(mixup=1.0, cutmix=1.0)
    seen: Counter[bool] = Counter()
    for seed in range(200):
        plain, found, _ = mixed(both, seed, 2)
        cut = ((found == plain) | (found == plain.flip(0))).all().item()
        alone = AugmentConfig(cutmix=1.0) if cut else AugmentConfig(mixup=1.0)
        assert found.equal(mixed(alone, seed, 2)[1])
        seen[bool(cut)] += 1
    assert 70 < seen[True] < 130


# --- on a device --------------------------------------------------------------------------------------


ALL = AugmentConfig(policy="randaugment", ops=4, color_jitter=0.3, erase=0.5, mixup=0.5)


@pytest.mark.parametrize("config", [*ON.values(), ALL, AugmentConfig(cutmix=1.0)])
def test_no_value_on_the_device_is_read(config: AugmentConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device has none: what a CUDA device would be waited for fails on it."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it does not know that device
    images, classes = pictures(96).to("meta"), labels(96).to("meta")
    found, targets = augment_batch(images, classes, draws(96), config, classes=5)
    assert found.device.type == targets.device.type == "meta"
    assert found.shape == (96, 3, 40, 56)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "config", [ALL, AugmentConfig(policy="trivialaugment", cutmix=1.0)], ids=["all", "cut"]
)
def test_a_cuda_device_is_never_waited_for(config: AugmentConfig) -> None:
    images, classes = pictures(96).cuda(), labels(96).cuda()
    augment_batch(images, classes, draws(96), config, classes=5)  # pinned memory, kernels: got once
    torch.cuda.set_sync_debug_mode("error")
    try:
        augment_batch(images, classes, draws(96, seed=1), config, classes=5)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@each_setting
def test_a_cuda_device_makes_the_same_pictures(config: AugmentConfig) -> None:
    images, numbers = pictures(96), draws(96)
    torch.backends.cuda.matmul.allow_tf32 = True  # a policy must not be touched by it
    try:
        found = augmented(images.cuda(), numbers, config).cpu()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    off = (found - augmented(images, numbers, config)).abs()
    assert (off > 1e-5).double().mean() < 0.01
