"""Read shards: the Parquet manifest, and any sample by its offset, its checksum proven at every read."""

import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.config import InputError, digest

VERSION = 1
MANIFEST = "manifest.parquet"
SPLITS = ("train", "val")
MAX_OPEN = 256  # descriptors a split keeps: ImageNet has 1,300 shards, a process 1,024 descriptors
# A shard's name comes from a file and becomes a path: nothing else may pass.
SHARD_NAME = re.compile(r"(train|val)-\d{6,}\.tar")
COLUMNS = {
    "split": pa.dictionary(pa.int32(), pa.string()),
    "shard": pa.dictionary(pa.int32(), pa.string()),
    "key": pa.string(),
    "label": pa.int32(),
    "ext": pa.string(),
    "offset": pa.int64(),  # of the picture's bytes in the .tar
    "size": pa.int64(),
    "crc32": pa.uint32(),
    "width": pa.int32(),
    "height": pa.int32(),
}
SCHEMA = pa.schema([pa.field(name, kind, nullable=False) for name, kind in COLUMNS.items()])

Progress = Callable[[int, int], None]  # (done, total)
MAX_NAMED = 3  # names in a list of them, before it counts


class ShardError(InputError):
    """A set of shards that is not there, damaged, or not ours."""


@dataclass(frozen=True)
class Shard:
    """One .tar file."""

    name: str
    split: str
    sha256: str
    bytes: int
    samples: int


class _Files:
    """Open shards of one process. pread has no position, so threads and forked children may share it."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}

    def pread(self, path: Path, size: int, offset: int) -> bytes:
        kept = self._open.get(path)
        if kept is not None:
            return os.pread(kept, size, offset)
        descriptor = os.open(path, os.O_RDONLY)
        if len(self._open) < MAX_OPEN and self._open.setdefault(path, descriptor) == descriptor:
            return os.pread(descriptor, size, offset)
        try:  # no place left, or another thread was faster
            return os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Files, ())

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


@dataclass(frozen=True, eq=False)
class Samples:
    """The samples of a split, one array entry each; `shard` indexes `shard_paths`."""

    split: str
    shard_paths: tuple[Path, ...]
    shard: NDArray[np.int32]
    key: NDArray[np.object_]
    label: NDArray[np.int32]
    ext: NDArray[np.object_]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    crc32: NDArray[np.uint32]
    width: NDArray[np.int32]
    height: NDArray[np.int32]
    files: _Files = field(default_factory=_Files, repr=False)

    def __len__(self) -> int:
        return len(self.label)


@dataclass(frozen=True, eq=False)
class Manifest:
    """A set of shards: what is in it, how it was made, and what was left out."""

    folder: Path
    classes: tuple[str, ...]
    shards: tuple[Shard, ...]
    made: dict[str, Any]
    broken: tuple[dict[str, str], ...]  # {"file", "reason"}
    ignored: int  # files that are no pictures by their ending
    empty_classes: tuple[str, ...]  # "name (reason)"
    samples: dict[str, Samples] = field(repr=False)

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.samples)

    def split(self, name: str) -> Samples:
        if name not in self.samples:
            raise ShardError(f"{self.folder}: no split {name!r}; there are: {', '.join(self.splits)}")
        return self.samples[name]

    @property
    def digest(self) -> str:
        """16 hex digits of the content: classes and shards, wherever they lie."""
        return digest([self.classes, [[s.name, s.sha256] for s in self.shards]])


def read_manifest(folder: Path) -> Manifest:
    """What a set of shards holds. Raises ShardError: none there, damaged, not ours, of a newer version."""
    path = folder / MANIFEST
    try:
        with open(path, "rb") as file:
            # Not read_table(): it takes `a=b` in the path for a column.
            parquet = pq.ParquetFile(file, page_checksum_verification=True)
            values = _values(path, parquet.schema_arrow)
            manifest = _manifest(folder, values, parquet.read())
    except (FileNotFoundError, NotADirectoryError):
        raise ShardError(
            f"{folder}: no shards there (expected {MANIFEST}); next: name another set, or make it "
            "with `gsa shards build`"
        ) from None
    except ShardError:
        raise
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
        raise ShardError(
            f"{path}: cannot be read: {' '.join(str(error).split())}; next: build the set again (--replace)"
        ) from None
    return manifest


def _values(path: Path, schema: pa.Schema) -> dict[str, Any]:
    """Our own part of the file: everything but the rows."""
    text = (schema.metadata or {}).get(b"gsa")
    if text is None:
        raise ShardError(f"{path}: a Parquet file, but no manifest of ours; next: name another set")
    values: dict[str, Any] = json.loads(text)
    if values["version"] != VERSION:
        raise ShardError(
            f"{path}: expected version {VERSION}, got {values['version']}; "
            "next: read it with the release that made it, or build the set again (--replace)"
        )
    if values.pop("digest") != digest(values):
        raise ValueError("its settings do not match their digest")
    if not schema.remove_metadata().equals(SCHEMA):
        raise ValueError(f"expected the columns {', '.join(SCHEMA.names)}, got {', '.join(schema.names)}")
    return values


def _manifest(folder: Path, values: dict[str, Any], table: pa.Table) -> Manifest:
    shards = tuple(Shard(**s) for s in values["shards"])
    for shard in shards:
        if not SHARD_NAME.fullmatch(shard.name) or not shard.name.startswith(f"{shard.split}-"):
            raise ValueError(f"{shard.name!r} is no name for a {shard.split} shard")
    samples = {s: _samples(folder, table, s, [x.name for x in shards if x.split == s]) for s in SPLITS}
    manifest = Manifest(
        folder=folder,
        classes=tuple(values["classes"]),
        shards=shards,
        made=values["made"],
        broken=tuple(values["broken"]),
        ignored=values["ignored"],
        empty_classes=tuple(values["empty_classes"]),
        samples=samples,
    )
    if sum(len(s) for s in samples.values()) != len(table):
        raise ValueError(f"{len(table)} rows, not all of them in {' or '.join(SPLITS)}")
    for split in SPLITS:
        _match_rows(manifest, split)
    return manifest


def _samples(folder: Path, table: pa.Table, split: str, names: list[str]) -> Samples:
    part = table.filter(pc.equal(table["split"].cast(pa.string()), split))
    index = pc.index_in(part["shard"].cast(pa.string()), value_set=pa.array(names, pa.string()))
    ext = part["ext"].combine_chunks().dictionary_encode()
    numbers = ("label", "offset", "size", "crc32", "width", "height")
    return Samples(
        split=split,
        shard_paths=tuple(folder / name for name in names),
        shard=index.fill_null(-1).to_numpy(),
        key=part["key"].to_numpy(),
        ext=np.array(ext.dictionary.to_pylist(), object)[ext.indices.to_numpy()],
        **{name: part[name].to_numpy() for name in numbers},
    )


def _match_rows(manifest: Manifest, split: str) -> None:
    """Rows against the list of shards: what the rest of the code may then rely on."""
    samples, shards = manifest.split(split), [s for s in manifest.shards if s.split == split]
    if (samples.shard < 0).any():
        raise ValueError(f"{split}: rows of a shard that is not listed")
    counts = np.bincount(samples.shard, minlength=len(shards))
    room = np.array([s.bytes for s in shards], np.int64)[samples.shard] - samples.offset
    faults = {
        "a row points outside of the file": (samples.offset < 0)
        | (samples.size <= 0)
        | (samples.size > room),
        "a label without a class": (samples.label < 0) | (samples.label >= len(manifest.classes)),
    }
    for shard, count in zip(shards, counts, strict=True):
        if count != shard.samples:
            raise ValueError(f"{shard.name}: expected {shard.samples} rows, got {count}")
    for fault, rows in faults.items():
        if rows.any():
            first = int(rows.argmax())
            raise ValueError(f"{shards[samples.shard[first]].name}: {fault}: {samples.key[first]}")


def read_sample(samples: Samples, i: int) -> bytes:
    """The encoded picture of a sample, proved by its crc32: one pread, no header is read.

    Raises ShardError, with shard and key: missing, cut short, or other bytes than were written.
    """
    path = samples.shard_paths[samples.shard[i]]
    size = int(samples.size[i])
    try:
        data = samples.files.pread(path, size, int(samples.offset[i]))
    except OSError as error:
        fault = f"cannot be read: {error.strerror}"
    else:
        if len(data) == size and zlib.crc32(data) == int(samples.crc32[i]):
            return data
        fault = "crc32 differs" if len(data) == size else f"expected {size} bytes, got {len(data)}"
    raise ShardError(
        f"{path}, sample {samples.key[i]}: {fault}; next: `gsa shards verify`, then build the set again"
    )


def cut_short(path: Path, shard: Shard) -> str:
    """What its size alone says against a shard, or nothing."""
    if not path.is_file():
        return f"{shard.name}: missing"
    size = path.stat().st_size
    return f"{shard.name}: expected {shard.bytes} bytes, got {size}" if size != shard.bytes else ""


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def named(names: list[str]) -> str:
    """`a, b, c and 12 more`"""
    more = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
