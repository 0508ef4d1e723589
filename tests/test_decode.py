"""Decoding: any picture format as RGB, or refused; a bomb by its header, before a pixel is made."""

import io
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from pipeline.decode import DecodeError, decode, size

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
    return decode(content).tolist()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_each_format_is_read(kind: str) -> None:
    smooth = NOISE.resize((3, 2)).resize((60, 40), BILINEAR)
    image = decode(encoded(smooth, kind))
    assert (image.dtype, image.shape) == (np.uint8, (40, 60, 3))
    assert np.abs(image.astype(int) - np.asarray(smooth, int)).mean() < 4
    assert decode(encoded(NOISE, kind, **({"lossless": True} if kind == "WEBP" else {}))).shape == (20, 24, 3)


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
    assert np.abs(decode(content).astype(int) - [255, 0, 0]).max() <= 3


def test_one_pixel_is_a_picture() -> None:
    for kind in ("JPEG", "PNG", "WEBP"):
        assert decode(encoded(Image.new("RGB", (1, 1), (9, 9, 9)), kind)).shape == (1, 1, 3)


def test_exif_rotation_is_not_applied() -> None:
    exif = Image.Exif()
    exif[274] = 6
    assert decode(encoded(NOISE, "JPEG", exif=exif)).shape == (20, 24, 3)


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
            assert decode(bytes(content)).ndim == 3
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
    assert decode(content).shape == (20, 24, 3)
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
        import numpy as np
        from pipeline.augment import center_crop
        from pipeline.decode import DecodeError, decode, size
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 300_000_000,) * 2)
        for bomb in Path(sys.argv[1]).glob("*.bomb"):
            try: decode(bomb.read_bytes())
            except DecodeError: print("refused")
        for shape in ((1, 60_000, 3), (60_000, 1, 3)):
            print(center_crop(np.zeros(shape, np.uint8), size=224, pct=0.875).shape)
    """
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n") == ["refused"] * len(BOMBS) + ["(224, 224, 3)"] * 2 + [""]


def test_a_jpeg_with_a_harmless_warning_is_read_as_pillow_reads_it() -> None:
    """Bytes before a marker: libjpeg warns, simplejpeg refuses, Pillow reads on, and so do we."""
    content = encoded(NOISE, "JPEG")
    tables = content.index(b"\xff\xdb")
    content = content[:tables] + b"\0\0\0" + content[tables:]
    with pytest.raises(ValueError, match="extraneous"):
        simplejpeg.decode_jpeg(content)
    assert pixels(content) == np.asarray(Image.open(io.BytesIO(content))).tolist()


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpegs_are_what_pillow_makes_of_them(subsampling: str, progressive: bool) -> None:
    image = NOISE.resize((61, 43), BILINEAR)
    content = encoded(image, "JPEG", subsampling=subsampling, progressive=progressive, quality=90)
    expected = np.asarray(Image.open(io.BytesIO(content)), int)
    assert np.abs(decode(content) - expected).max() <= 1


# --- no more rows than needed ------------------------------------------------------------------------------

PHOTO = np.random.default_rng(5).integers(0, 256, (30, 40, 3), np.uint8)


def photo_like(width: int, height: int) -> Image.Image:
    return Image.fromarray(PHOTO).resize((width, height), BILINEAR)


@pytest.mark.parametrize("restarts", [0, 3], ids=["", "restarts"])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "4:1:1", "gray"])
def test_the_upper_rows_are_those_of_the_whole(subsampling: Any, restarts: int) -> None:
    image = photo_like(203, 331).convert("L" if subsampling == "gray" else "RGB")
    options = {} if subsampling == "gray" else {"subsampling": subsampling}
    content = encoded(image, "JPEG", quality=92, restart_marker_blocks=restarts, **options)
    whole = decode(content)
    for rows in (1, 15, 16, 17, 100, 250, 290, 330, 331):
        upper = decode(content, rows=rows)
        assert len(upper) >= rows
        assert np.array_equal(upper[:rows], whole[:rows])
    assert len(decode(content, rows=100)) < 331


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_what_is_no_sequential_jpeg_is_decoded_as_a_whole(kind: str) -> None:
    content = encoded(photo_like(90, 120), kind, **({"progressive": True} if kind == "JPEG" else {}))
    assert np.array_equal(decode(content, rows=10), decode(content))


@pytest.mark.parametrize("restarts", [0, 3], ids=["", "restarts"])
def test_upper_rows_of_a_jpeg_that_is_cut_short_are_refused(restarts: int) -> None:
    """A picture is good or bad as a whole, whatever the crop; libjpeg tells of a restart, not of the cut."""
    content = encoded(photo_like(200, 300), "JPEG", quality=95, restart_marker_blocks=restarts)
    for length in range(400, len(content) - 2, 501):
        with pytest.raises(DecodeError):
            decode(content[:length], rows=40)


def test_damage_to_a_jpegs_headers_ends_in_pixels_or_a_decode_error() -> None:
    rng, content = random.Random(1), encoded(photo_like(64, 96), "JPEG")
    for _ in range(400):
        damaged = bytearray(content)
        damaged[rng.randrange(700)] ^= 1 << rng.randrange(8)
        try:
            width, height = size(bytes(damaged))
            found = decode(bytes(damaged), rows=min(height, 20))
        except DecodeError:
            continue
        assert found.shape[1:] == (width, 3)
        assert len(found) >= min(height, 20)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_the_size_is_told_by_the_header(kind: str) -> None:
    assert size(encoded(photo_like(31, 17), kind)) == (31, 17)
    with pytest.raises(DecodeError, match="not a JPEG, PNG, WEBP image"):
        size(b"nothing")


def test_size_and_pixels_agree_for_cmyk() -> None:
    content = encoded(photo_like(31, 47).convert("CMYK"), "JPEG")
    assert size(content) == (31, 47)
    assert decode(content, rows=5).shape == (47, 31, 3)
