"""Little pictures as files and shards made of them, and the ways to look at these and to damage them."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.config import InputError, digest
from pipeline.manifest import SCHEMA, Manifest
from pipeline.pictures import ShardsConfig
from pipeline.shards import build


def picture(number: int, kind: str = "JPEG", size: tuple[int, int] = (12, 9)) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, kind)
    return data.getvalue()


def write_photos(root: Path, classes: dict[str, int]) -> Path:
    number = 0
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            number += 1
            kind, ending = (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"))[i % 3]
            (root / name / f"{i:03d}.{ending}").write_bytes(picture(number, kind))
    return root


def settings(photos: Path, **others: Any) -> ShardsConfig:
    values = {"name": "set", "source": "folder", "input": str(photos), "samples_per_shard": 8, **others}
    return ShardsConfig(**values)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def origins(manifest: Manifest, split: str) -> list[str]:
    """The original file of each sample, read by tarfile alone."""
    found = {}
    for shard in manifest.split(split).shards:
        with tarfile.open(shard.place(manifest.folder)) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    file = tar.extractfile(member)
                    assert file is not None
                    found[member.name.removesuffix(".json")] = json.load(file)["file"]
    return [found[key] for key in manifest.split(split).keys.to_pylist()]


def rewrite(folder: Path, change: Callable[[dict[str, Any], dict[str, list[Any]]], None]) -> None:
    """Change a manifest as a forger would: with a digest that fits."""
    old = pq.ParquetFile(folder / "manifest.parquet").read()
    values = json.loads(old.schema.metadata[b"gsa"])
    del values["digest"]
    columns = old.to_pydict()
    change(values, columns)
    new = pa.table(columns, schema=SCHEMA)
    text = json.dumps({**values, "digest": digest(values)})
    pq.write_table(new.replace_schema_metadata({b"gsa": text.encode()}), folder / "manifest.parquet")


def set_row(column: str, value: Any) -> Callable[[dict[str, Any], dict[str, list[Any]]], None]:
    """A change for `rewrite`: the first row's value."""
    return lambda values, rows: rows[column].__setitem__(0, value)


def flip(path: Path, position: int, mask: int = 1) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ mask]))


def columns(folder: Path) -> dict[str, list[Any]]:
    """The rows of a manifest, by column, read by pyarrow alone."""
    found: dict[str, list[Any]] = pq.ParquetFile(folder / "manifest.parquet").read().to_pydict()
    return found


def refusal(config: ShardsConfig, folder: Path, **options: Any) -> str:
    """The message of a refused build, which leaves nothing behind."""
    before = sorted(p.name for p in folder.parent.glob("*"))
    with pytest.raises(InputError) as error:
        build(config, folder, **options)
    left = sorted(p.name for p in folder.parent.glob("*") if not p.name.endswith(".lock"))
    assert left == [b for b in before if not b.endswith(".lock")]
    assert "\n" not in str(error.value)
    return str(error.value)
