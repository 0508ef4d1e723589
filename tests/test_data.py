"""Reading: any picture format as RGB or refused, crops that stay inside, the same batches for every loader."""

import dataclasses
import gc
import io
import math
import random
import shutil
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline import data
from pipeline.augment import RATIOS, _random_box, center_crop, sample_rng, train_crop
from pipeline.data import MEAN, STD, Batch, eval_loader, to_device, train_loader
from pipeline.decode import DecodeError, decode
from pipeline.manifest import Samples, ShardError, read_manifest, read_sample

BILINEAR = Image.Resampling.BILINEAR
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, depth: int, color: int, rows: bytes) -> bytes:
    """A PNG chunk by chunk: Pillow does not write all that it reads."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, content) for kind, content in chunks)


def pixels(content: bytes) -> list[list[list[int]]]:
    image = decode(content)
    assert image.mode == "RGB"
    return np.asarray(image).tolist()


# --- decode ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_each_format_is_read(kind: str) -> None:
    smooth = NOISE.resize((3, 2)).resize((60, 40), BILINEAR)
    image = decode(encoded(smooth, kind))
    assert (image.mode, image.size) == ("RGB", (60, 40))
    assert np.abs(np.asarray(image, int) - np.asarray(smooth, int)).mean() < 4
    assert decode(encoded(NOISE, kind, **({"lossless": True} if kind == "WEBP" else {}))).size == (24, 20)


def test_lossless_formats_are_read_to_the_pixel() -> None:
    for content in (encoded(NOISE, "PNG"), encoded(NOISE, "WEBP", lossless=True)):
        assert pixels(content) == np.asarray(NOISE).tolist()


def test_gray_becomes_three_equal_channels() -> None:
    gray = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3) * 50)
    assert pixels(encoded(gray, "PNG")) == [[[0] * 3, [50] * 3, [100] * 3], [[150] * 3, [200] * 3, [250] * 3]]
    assert pixels(encoded(Image.new("L", (2, 2), 77), "JPEG", quality=100)) == [[[77] * 3] * 2] * 2
    assert pixels(encoded(Image.new("1", (2, 1), 1), "PNG")) == [[[255] * 3] * 2]


@pytest.mark.parametrize(("depth", "byte", "level"), [(1, 0xFF, 255), (2, 0x55, 85), (4, 0x77, 119)])
def test_few_bits_are_spread_over_all_levels(depth: int, byte: int, level: int) -> None:
    assert pixels(png(2, 1, depth, 0, bytes([0, byte]))) == [[[level] * 3] * 2]


@pytest.mark.parametrize(
    ("color", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)], ids=["gray", "rgb", "gray+alpha", "rgb+alpha"]
)
@pytest.mark.parametrize("value", [0, 255, 256, 0x8007, 0xFFFF])
def test_sixteen_bits_are_cut_to_the_upper_eight(color: int, channels: int, value: int) -> None:
    rows = b"\0" + struct.pack(">H", value) * channels * 2
    assert pixels(png(2, 1, 16, color, rows)) == [[[value >> 8] * 3] * 2]


def test_a_palette_with_transparency_keeps_its_colours() -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 200, 100, 50, 7, 8, 9])
    image.putdata([0, 1, 2])
    for transparency in (b"\x00\x80\xff", 1):
        content = encoded(image, "PNG", transparency=transparency)
        assert pixels(content) == [[[10, 20, 30], [200, 100, 50], [7, 8, 9]]]


def test_alpha_is_dropped() -> None:
    image = Image.new("RGBA", (1, 1), (10, 20, 30, 0))
    assert pixels(encoded(image, "PNG")) == [[[10, 20, 30]]]
    assert pixels(encoded(image, "WEBP", lossless=True, exact=True)) == [[[10, 20, 30]]]


def test_cmyk_becomes_the_colours_that_were_meant() -> None:
    content = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95)
    assert Image.open(io.BytesIO(content)).mode == "CMYK"
    assert np.abs(np.asarray(decode(content), int) - [255, 0, 0]).max() <= 3


def test_one_pixel_is_a_picture() -> None:
    for kind in ("JPEG", "PNG", "WEBP"):
        assert decode(encoded(Image.new("RGB", (1, 1), (9, 9, 9)), kind)).size == (1, 1)


def test_exif_rotation_is_not_applied() -> None:
    exif = Image.Exif()
    exif[274] = 6
    assert decode(encoded(NOISE, "JPEG", exif=exif)).size == NOISE.size


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_picture_that_is_cut_short_is_refused(kind: str) -> None:
    content = encoded(NOISE, kind)
    for length in range(0, len(content) - 30, 7):
        with pytest.raises(DecodeError):
            decode(content[:length])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 1000,
        b"no picture at all",
        b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>',
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(touch canary) run\n",
        *(encoded(NOISE, kind) for kind in ("GIF", "BMP", "TIFF", "PPM", "ICO", "PDF", "TGA", "JPEG2000")),
    ],
    ids=lambda content: repr(content[:8]),
)
def test_what_is_no_jpeg_png_or_webp_is_refused(content: bytes) -> None:
    with pytest.raises(DecodeError, match=rf"^not a JPEG, PNG, WEBP image \({len(content)} bytes\)$"):
        decode(content)


def test_random_damage_ends_in_a_picture_or_a_decode_error() -> None:
    rng = random.Random(0)
    good = [encoded(NOISE, "JPEG"), encoded(NOISE, "PNG"), encoded(NOISE, "WEBP"), encoded(NOISE, "JPEG")]
    good[3] = encoded(NOISE.quantize(8), "PNG", transparency=b"\0\xff")
    refused = 0
    for _ in range(600):
        content = bytearray(rng.choice(good))
        for _ in range(rng.randrange(1, 4)):
            content[rng.randrange(rng.choice([60, len(content)]))] ^= 1 << rng.randrange(8)
        try:
            assert decode(bytes(content)).mode == "RGB"
        except DecodeError:
            refused += 1
    assert refused > 100


def jpeg_header(width: int, height: int) -> bytes:
    content = bytearray(encoded(NOISE, "JPEG"))
    at = content.index(b"\xff\xc0") + 5
    content[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(content)


def webp_header(width: int, height: int) -> bytes:
    content = bytearray(encoded(NOISE, "WEBP", lossless=True))
    at = content.index(b"VP8L") + 9
    (bits,) = struct.unpack_from("<I", content, at)
    struct.pack_into("<I", content, at, bits >> 28 << 28 | (height - 1) << 14 | (width - 1))
    return bytes(content)


BOMBS = [
    png(20_000, 20_000, 8, 2, b""),
    png(8_000, 8_000, 8, 2, b""),  # below Pillow's own limit
    png(2**31 - 1, 2**31 - 1, 8, 2, b""),
    png(1, 50_000_001, 1, 0, b""),
    jpeg_header(20_000, 20_000),
    jpeg_header(7_072, 7_072),
    webp_header(16_383, 16_383),
    webp_header(8_000, 8_000),
]


def test_bombs_are_refused_by_their_header() -> None:
    for bomb in BOMBS:
        with pytest.raises(DecodeError, match=r"above 50000000 pixels|exceeds limit"):
            decode(bomb)


def test_the_limit_of_pixels_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(NOISE, "PNG")
    monkeypatch.setattr("pipeline.decode.MAX_PIXELS", 480)
    assert decode(content).size == (24, 20)
    monkeypatch.setattr("pipeline.decode.MAX_PIXELS", 479)
    with pytest.raises(DecodeError, match=r"^24x20 is above 479 pixels$"):
        decode(content)


def test_bombs_and_slivers_need_little_memory(tmp_path: Path) -> None:
    """Refusing a bomb, and cropping a picture of extreme shape, each within 300 MB of address space."""
    for i, bomb in enumerate(BOMBS):
        (tmp_path / f"{i}.bomb").write_bytes(bomb)
    code = """if True:
        import resource, sys
        from pathlib import Path
        from PIL import Image
        from pipeline.augment import center_crop
        from pipeline.decode import DecodeError, decode
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 300_000_000,) * 2)
        for bomb in Path(sys.argv[1]).glob("*.bomb"):
            try: decode(bomb.read_bytes())
            except DecodeError: print("refused")
        for size in ((1, 60_000), (60_000, 1)):
            print(center_crop(Image.new("RGB", size), size=224, pct=0.875).size)
    """
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n") == ["refused"] * len(BOMBS) + ["(224, 224)"] * 2 + [""]


# --- augment -----------------------------------------------------------------------------------------------

sides = st.integers(1, 3000)


@given(width=sides, height=sides, low=st.floats(1e-6, 1), seed=st.integers(0, 2**32))
def test_a_training_crop_stays_inside(width: int, height: int, low: float, seed: int) -> None:
    left, top, w, h = _random_box(width, height, np.random.default_rng(seed), (low, 1.0))
    assert 0 <= left <= left + w <= width
    assert 0 <= top <= top + h <= height
    assert w >= 1
    assert h >= 1


def test_training_crops_are_spread_over_area_ratio_and_place() -> None:
    boxes = [_random_box(1000, 1000, np.random.default_rng(i), (0.2, 0.5)) for i in range(4000)]
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
    assert _random_box(*size, np.random.default_rng(0), (1.0, 1.0)) == box


def test_whole_crops_without_flip_are_the_picture_and_with_flip_its_mirror() -> None:
    square = NOISE.crop((0, 0, 20, 20))
    for flip, expected in ((0.0, np.asarray(square)), (1.0, np.asarray(square)[:, ::-1])):
        found = train_crop(square, np.random.default_rng(3), size=20, scale=(1.0, 1.0), flip=flip)
        assert np.array_equal(np.asarray(found), expected)


def test_half_of_the_crops_are_mirrored() -> None:
    ramp = Image.fromarray(np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1)))
    crops = [
        np.asarray(train_crop(ramp, sample_rng(0, 0, i), size=8, scale=(0.5, 1), flip=0.5))
        for i in range(600)
    ]
    mirrored = sum(int(crop[0, 0]) > int(crop[0, -1]) for crop in crops)
    assert 240 < mirrored < 360


def test_the_generator_of_a_sample_depends_on_seed_epoch_and_sample_alone() -> None:
    keys = [(s, e, i) for s in range(3) for e in range(3) for i in range(3)]
    first = [sample_rng(*key).integers(2**62) for key in keys]
    assert len(set(first)) == len(keys)
    assert first == [sample_rng(*key).integers(2**62) for key in keys]


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
    image = NOISE.resize((width, height), Image.Resampling.NEAREST)
    found = center_crop(image, size=size, pct=pct)
    assert found.size == (size, size)
    factor = size / pct / min(width, height)
    whole = (max(size, round(width * factor)), max(size, round(height * factor)))
    if max(whole) > 3000:
        return
    left, top = (whole[0] - size) // 2, (whole[1] - size) // 2
    expected = image.resize(whole, BILINEAR).crop((left, top, left + size, top + size))
    assert np.abs(np.asarray(found, int) - np.asarray(expected, int)).max() <= 3


@pytest.mark.parametrize("shape", [(1, 1), (1, 10_000), (10_000, 1), (2, 3), (65_535, 3), (31, 33)])
@pytest.mark.parametrize("pct", [1.0, 0.875, 0.01])
def test_a_center_crop_has_its_size_whatever_the_shape(shape: tuple[int, int], pct: float) -> None:
    assert center_crop(Image.new("RGB", shape), size=32, pct=pct).size == (32, 32)


def test_a_picture_of_the_right_size_is_left_as_it_is() -> None:
    square = NOISE.crop((0, 0, 20, 20))
    assert np.array_equal(np.asarray(center_crop(square, size=20, pct=1.0)), np.asarray(square))


# --- batches -----------------------------------------------------------------------------------------------

# Loader workers are forked, also where a machine has fewer cores than workers: both are meant here.
loads = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create:UserWarning",
    "ignore:This process .* is multi-threaded:DeprecationWarning",
)


@pytest.fixture(scope="module")
def train_samples(mini: Path) -> Samples:
    return read_manifest(mini).split("train")


@pytest.fixture(scope="module")
def val_samples(mini: Path) -> Samples:
    return read_manifest(mini).split("val")


def global_batches(samples: Samples, config: Any, *, world: int, workers: int, first_step: int = 0) -> Batch:
    """All micro-batches of an epoch in the order of the global batches, from all ranks' loaders."""
    ranks = [
        list(
            train_loader(
                samples, config, epoch=1, first_step=first_step, rank=rank, world=world, workers=workers
            )
        )
        for rank in range(world)
    ]
    share = config.micro_batches // world
    steps = len(ranks[0]) // share
    batches = [b for step in range(steps) for rank in ranks for b in rank[step * share : (step + 1) * share]]
    return Batch(torch.stack([b.images for b in batches]), torch.stack([b.labels for b in batches]))


def equal(one: Batch, other: Batch) -> bool:
    return torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)


def test_a_batch_holds_the_cropped_pictures_of_the_order(train_samples: Samples, mini_config: Any) -> None:
    config = mini_config(seed=5)
    found = global_batches(train_samples, config, world=1, workers=0)
    assert found.images.dtype == torch.uint8
    assert found.images.shape == (12, 4, 32, 32, 3)
    assert found.labels.dtype == torch.int64
    order = np.random.default_rng((5, 1)).permutation(54)[:48]
    for i, image, label in zip(
        order, found.images.flatten(0, 1).numpy(), found.labels.flatten().tolist(), strict=True
    ):
        picture = decode(read_sample(train_samples, int(i)))
        crop = train_crop(picture, sample_rng(5, 1, int(i)), size=32, scale=(0.08, 1.0), flip=0.5)
        assert np.array_equal(image, np.asarray(crop))
        assert label == train_samples.label[i]


@loads
@pytest.mark.parametrize(("world", "workers"), [(1, 2), (2, 0), (2, 2), (4, 0)])
def test_batches_are_the_same_for_any_number_of_ranks_and_loader_workers(
    world: int, workers: int, train_samples: Samples, mini_config: Any
) -> None:
    alone = global_batches(train_samples, mini_config(), world=1, workers=0)
    assert equal(global_batches(train_samples, mini_config(), world=world, workers=workers), alone)


def test_a_loader_goes_on_where_a_run_stopped(train_samples: Samples, mini_config: Any) -> None:
    whole = global_batches(train_samples, mini_config(), world=1, workers=0)
    rest = global_batches(train_samples, mini_config(), world=2, workers=0, first_step=2)
    assert equal(rest, Batch(whole.images[8:], whole.labels[8:]))


def test_epochs_and_seeds_draw_other_crops_of_a_picture(train_samples: Samples, mini_config: Any) -> None:
    crops = [
        data.Pictures(train_samples, mini_config(seed=seed), epoch)[7][0].tobytes()
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert len(set(crops)) == 4


@loads
@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (3, 0)])
def test_evaluation_reads_each_picture_once_unchanged_and_with_its_class(
    world: int, workers: int, val_samples: Samples, mini_config: Any, pictures: Path
) -> None:
    classes = {
        np.asarray(Image.open(p).convert("RGB")).tobytes(): int(p.parent.name)
        for p in pictures.rglob("*.png")
    }
    seen = []
    for rank in range(world):
        for batch in eval_loader(val_samples, mini_config(), rank=rank, world=world, workers=workers):
            for image, label in zip(batch.images.numpy(), batch.labels.tolist(), strict=True):
                assert classes[image.tobytes()] == label
                seen.append(image.tobytes())
    assert len(seen) == len(val_samples) == 18
    assert len(set(seen)) == 18


@pytest.fixture
def damaged(mini: Path, tmp_path: Path) -> Samples:
    """A copy of the val split whose sample 5 has a bit flipped in its picture."""
    samples = read_manifest(shutil.copytree(mini, tmp_path / "damaged")).split("val")
    path = samples.shard_paths[samples.shard[5]]
    content = bytearray(path.read_bytes())
    content[int(samples.offset[5]) + 60] ^= 4
    path.write_bytes(content)
    return samples


@loads
@pytest.mark.parametrize("workers", [0, 2])
def test_damage_ends_in_an_error_with_shard_and_key(workers: int, damaged: Samples, mini_config: Any) -> None:
    """The same single line, whoever reads, and at once: no loader is waited for."""
    where = rf"^{damaged.shard_paths[0]}, sample {damaged.key[5]}: crc32 differs; next: .*$"
    start = time.monotonic()
    with pytest.raises(ShardError, match=where) as caught:
        list(eval_loader(damaged, mini_config(), rank=0, world=1, workers=workers))
    assert "\n" not in str(caught.value)
    del caught
    gc.collect()
    assert time.monotonic() - start < 9


def test_a_picture_that_this_decoder_refuses_is_named_too(damaged: Samples, mini_config: Any) -> None:
    """Its crc32 is right: it was refused by no one when the shards were made."""
    path, offset, size = damaged.shard_paths[0], int(damaged.offset[5]), int(damaged.size[5])
    content = path.read_bytes()[offset : offset + size]
    crc32 = damaged.crc32.copy()
    crc32[5] = zlib.crc32(content)
    with pytest.raises(ShardError, match=rf"val-000000\.tar, sample {damaged.key[5]}: .*(PNG|image)"):
        list(
            eval_loader(dataclasses.replace(damaged, crc32=crc32), mini_config(), rank=0, world=1, workers=0)
        )


def test_to_device_is_the_plain_formula() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), np.uint8)
    found = to_device(torch.from_numpy(images), torch.device("cpu"))
    assert (found.shape, found.dtype) == ((2, 3, 5, 7), torch.float32)
    assert found.is_contiguous(memory_format=torch.channels_last)
    for b, h, w, c in np.ndindex(*images.shape):
        expected = (images[b, h, w, c] / 255 - MEAN[c]) / STD[c]
        assert abs(float(found[b, c, h, w]) - expected) < 1e-6
