"""Sets of shards of any shape for tests, written by tarfile alone: uneven, many, or with odd pictures in them."""

import hashlib
import io
import tarfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline.manifest import SCHEMA, SPLITS, Shard, write_manifest

CLASSES = 3


def small_png(number: int) -> bytes:
    """4x4 pixels of one gray level of its own in red and green: number % 256, number // 256."""
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (number % 256, number // 256, 0)).save(file, "PNG", compress_level=1)
    return file.getvalue()


def write_set(
    folder: Path, sizes: dict[str, Sequence[int]], *, picture: Callable[[int], bytes] = small_png
) -> Path:
    """Shards of these sizes for each split. Sample i of a split has the label i % 3 and the picture number i."""
    folder.mkdir(parents=True)
    shards, tables = [], []
    for split in SPLITS:
        first = 0
        for n, size in enumerate(sizes.get(split, ())):
            name, numbers = f"{split}-{n:06d}.tar", range(first, first + size)
            rows = _write_tar(folder / name, split, numbers, picture)
            content = (folder / name).read_bytes()
            shards.append(Shard(name, split, hashlib.sha256(content).hexdigest(), len(content), size))
            columns = list(zip(*rows, strict=True)) if rows else [()] * len(SCHEMA)
            arrays = [pa.array(c, type=f.type) for f, c in zip(SCHEMA, columns, strict=True)]
            tables.append(pa.table(arrays, schema=SCHEMA))
            first += size
    table = pa.concat_tables(tables).unify_dictionaries()
    write_manifest(folder, table, classes=[str(c) for c in range(CLASSES)], shards=shards, made={})
    return folder


def _write_tar(
    path: Path, split: str, numbers: range, picture: Callable[[int], bytes]
) -> list[tuple[str | int, ...]]:
    rows: list[tuple[str | int, ...]] = []
    with tarfile.open(path, "w") as tar:
        for i in numbers:
            key, data = f"{split}-{i:08d}", picture(i)
            for ext, content in (("png", data), ("cls", str(i % CLASSES).encode()), ("json", b"{}")):
                member = tarfile.TarInfo(f"{key}.{ext}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            rows.append((split, path.name, key, i % CLASSES, "png", 0, len(data), zlib.crc32(data), 4, 4))
    with tarfile.open(path) as tar:
        places = [m.offset_data for m in tar if m.name.endswith(".png")]
    return [(*row[:5], place, *row[6:]) for row, place in zip(rows, places, strict=True)]


def numbers_of(images: np.ndarray) -> list[int]:
    """The numbers of the pictures in a batch (B, H, W, 3), read off their pixels."""
    return [int(image[0, 0, 0]) + 256 * int(image[0, 0, 1]) for image in images]
