"""Read shards: the Parquet manifest, and any sample by its offset, its checksum proven at every read."""

import hashlib
import json
import math
import os
import re
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.config import InputError, digest
from pipeline.mapped import mapped_rows
from pipeline.order import Certificate, certify
from pipeline.remote import Unreachable, discard, has_copy, host, is_url, open_cached, shown
from pipeline.rundir import sync

VERSION = 2
MANIFEST = "manifest.parquet"
SPLITS = ("train", "val")
MAPPED_BYTES = 1_000_000  # of Parquet, from which on a machine's processes share the rows
MAX_OPEN = 64  # descriptors that a split keeps
RETRY_S = 300.0  # before a remote shard that could not be had is asked for again
# A shard's name comes from a file and becomes a path: nothing else may pass.
SHARD_NAME = re.compile(r"(train|val)-\d{6,}\.tar")
NAMES = pa.dictionary(pa.int32(), pa.string())
SCHEMA = pa.schema(
    [
        pa.field("split", NAMES, nullable=False),
        pa.field("shard", NAMES, nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("label", pa.int32(), nullable=False),
        pa.field("ext", NAMES, nullable=False),
        pa.field("offset", pa.int64(), nullable=False),  # of the picture's bytes in the .tar
        pa.field("size", pa.int64(), nullable=False),
        pa.field("crc32", pa.uint32()),  # null, as the next two, where only headers were read
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
    ]
)

Progress = Callable[[int, int], None]  # (done, total)
MAX_NAMED = 3  # names in a list of them, before it counts


class ShardError(InputError):
    """A set of shards that is not there, damaged, or not ours."""


@dataclass(frozen=True)
class Shard:
    """One .tar file: beside the manifest by its name, or at `path`, an absolute path or a URL."""

    name: str
    split: str
    sha256: str  # "" where only headers were read
    bytes: int
    samples: int
    path: str = ""

    def place(self, folder: Path) -> str:
        return self.path or str(folder / self.name)


class Descriptor:
    """An open file that closes when nobody reads it any more."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


class _Files:
    """The shards read last, open. pread has no position, so threads share them."""

    def __init__(self) -> None:
        self._open: dict[str, Descriptor] = {}
        self._failed: dict[str, tuple[float, OSError]] = {}  # remote shards and silent hosts: when, why
        self._lock = threading.Lock()

    def pread(self, place: str, shard: Shard, size: int, offset: int) -> bytes:
        if shard.path and is_url(
            place
        ):  # not kept open: a copy that the cache drops would go on taking its room
            copy = self._remote(place, shard)
            return os.pread(copy.number, size, offset)
        with self._lock:
            file = self._open.pop(place, None)
            if file:
                self._open[place] = file  # the last to be dropped
        if file is None:
            file = Descriptor(os.open(place, os.O_RDONLY))
            _check_size(file, shard)
            with self._lock:
                self._open[place] = file
                while len(self._open) > MAX_OPEN:
                    del self._open[next(iter(self._open))]
        return os.pread(file.number, size, offset)

    def forget(self, place: str, shard: Shard) -> None:
        """What was read is not right: the next reading opens the file anew, or fetches it."""
        with self._lock:
            self._open.pop(place, None)
        if is_url(place):
            discard(place, shard.bytes, shard.sha256)

    def _remote(self, url: str, shard: Shard) -> Descriptor:
        """A shard's copy. A shard that cannot be had is not asked for again for each sample, nor a silent host."""
        silent = () if has_copy(url, shard.bytes, shard.sha256) else (host(url),)
        for place in (url, *silent):
            when, error = self._failed.get(place, (-math.inf, OSError()))
            if time.monotonic() - when < RETRY_S:
                raise error
        try:
            return Descriptor(open_cached(url, shard.bytes, shard.sha256))
        except OSError as error:
            self._failed[host(url) if isinstance(error, Unreachable) else url] = time.monotonic(), error
            raise


def _check_size(file: Descriptor, shard: Shard) -> None:
    """Where there are no checksums, another size says that it is another file."""
    size = os.fstat(file.number).st_size
    if not shard.sha256 and size != shard.bytes:
        raise OSError(f"expected a file of {shard.bytes} bytes, got {size}")


@dataclass(frozen=True, eq=False)
class Samples:
    """The samples of a split in the order of its shards, one entry of each array for each.

    Columns, not objects, so that ImageNet's 1.28 million fit into tens of megabytes.
    """

    split: str
    folder: Path
    shards: tuple[Shard, ...]
    shard: NDArray[np.int32]  # which of `shards`
    keys: pa.StringArray
    label: NDArray[np.int32]
    ext: pa.DictionaryArray
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    crc32: NDArray[np.uint32] | None
    salt: int  # of the certificates of this split of these shards
    files: _Files = field(default_factory=_Files, repr=False)

    def __len__(self) -> int:
        return len(self.label)

    @property
    def shard_sizes(self) -> list[int]:
        """Samples in each shard."""
        return [s.samples for s in self.shards]

    @property
    def certificate(self) -> Certificate:
        """Of each sample exactly once."""
        return certify(np.arange(len(self)), self.salt)

    @cached_property
    def places(self) -> list[str]:
        """The path or URL of each shard."""
        return [shard.place(self.folder) for shard in self.shards]

    def key(self, i: int) -> str:
        return str(self.keys[int(i)])

    def fetch(self, shard: int) -> None:
        """Bring a remote shard into the cache of this machine. RemoteError if it cannot be had."""
        one = self.shards[shard]
        if is_url(one.path):
            os.close(open_cached(one.path, one.bytes, one.sha256))

    def shard_of(self, i: int) -> Shard:
        return self.shards[int(self.shard[i])]

    def where(self, i: int) -> str:
        """Shard and key, for messages."""
        return f"{shown(self.shard_of(i).place(self.folder))}, sample {self.key(i)}"


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
    digest: str  # 16 hex digits of the content: classes and shards, wherever they lie
    samples: dict[str, Samples] = field(repr=False)

    @property
    def foreign(self) -> bool:
        """Whether others wrote the shards."""
        return any(shard.path for shard in self.shards)

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.samples)

    def split(self, name: str) -> Samples:
        if name not in self.samples:
            raise ShardError(f"{self.folder}: no split {name!r}; there are: {', '.join(self.splits)}")
        return self.samples[name]


def write_manifest(
    folder: Path,
    rows: pa.Table,
    *,
    classes: Sequence[str],
    shards: Sequence[Shard],
    made: dict[str, Any],
    broken: Sequence[dict[str, str]] = (),
    ignored: int = 0,
    empty_classes: Sequence[str] = (),
) -> None:
    """Write MANIFEST into `folder`, under its final name. `rows` has SCHEMA and stands in the order of `shards`."""
    values = {
        "version": VERSION,
        "classes": list(classes),
        "shards": [asdict(s) for s in shards],
        "made": made,
        "broken": list(broken),
        "ignored": ignored,
        "empty_classes": list(empty_classes),
    }
    text = json.dumps({**values, "digest": digest(values)})
    table = rows.replace_schema_metadata({b"gsa": text.encode()})
    pq.write_table(table, folder / MANIFEST, compression="zstd", write_page_checksum=True)
    sync(folder / MANIFEST)
    sync(folder)


def open_parquet(path: Path) -> pq.ParquetFile:
    """A Parquet file, read whole; its checksums are proved on reading."""
    return _parquet(path.read_bytes())


def _parquet(data: bytes) -> pq.ParquetFile:
    """A Parquet file in Arrow's own memory.

    Not by its path, in which Arrow takes `a=b` for a column. Not through a Python file: a thread of Arrow
    may be the last to let go of it, and aborts the process where Python is ending meanwhile.
    """
    memory = pa.BufferOutputStream()
    memory.write(data)
    return pq.ParquetFile(pa.BufferReader(memory.getvalue()), page_checksum_verification=True)


def read_manifest(folder: Path) -> Manifest:
    """What a set of shards holds. Raises ShardError: none there, damaged, not ours, of another version."""
    path = folder / MANIFEST
    try:
        manifest = _read(folder, path)
        pa.default_memory_pool().release_unused()
    except (FileNotFoundError, NotADirectoryError):
        raise ShardError(
            f"{folder}: no shards there (expected {MANIFEST}); next: name another set, or make it "
            "with `gsa shards build` or, of tars that you have, `gsa shards index`"
        ) from None
    except ShardError:
        raise
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
        raise ShardError(
            f"{path}: cannot be read: {' '.join(str(error).split())}; next: build the set again (--replace)"
        ) from None
    return manifest


def _read(folder: Path, path: Path) -> Manifest:
    data = path.read_bytes()
    parquet = _parquet(data)
    values = _values(path, parquet.schema_arrow)

    def parse() -> pa.Table:
        rows = parquet.read()
        _manifest(folder, values, rows)  # what is kept for others has passed all checks
        return rows

    key = f"{hashlib.sha256(data).hexdigest()}-v{VERSION}"
    rows = parquet.read() if len(data) < MAPPED_BYTES else mapped_rows(key, parse)
    return _manifest(folder, values, rows)


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
    shards, classes = tuple(Shard(**s) for s in values["shards"]), tuple(values["classes"])
    _check_names(shards)
    _check_runs(table["shard"], [(s.name, s.samples) for s in shards if s.samples])
    totals = {split: sum(s.samples for s in shards if s.split == split) for split in SPLITS}
    _check_runs(table["split"], [(split, total) for split, total in totals.items() if total])
    content = _content(classes, shards, table)
    start, samples = 0, {}
    for split, total in totals.items():
        rows, mine = table.slice(start, total), tuple(s for s in shards if s.split == split)
        samples[split] = _samples(folder, split, mine, rows, salt=int(digest([content, split]), 16))
        _check_rows(samples[split], len(classes))
        start += total
    return Manifest(
        folder=folder,
        classes=classes,
        shards=shards,
        made=values["made"],
        broken=tuple(values["broken"]),
        ignored=values["ignored"],
        empty_classes=tuple(values["empty_classes"]),
        digest=content,
        samples=samples,
    )


def _content(classes: tuple[str, ...], shards: tuple[Shard, ...], table: pa.Table) -> str:
    if all(s.sha256 for s in shards):
        return digest([classes, [[s.name, s.sha256] for s in shards]])
    columns = [zlib.crc32(_numbers(table[name]).data) for name in ("label", "offset", "size")]
    return digest([classes, [[s.name, s.bytes, s.samples] for s in shards], columns])


def _check_names(shards: tuple[Shard, ...]) -> None:
    for shard in shards:
        if shard.path:
            if not (os.path.isabs(shard.path) or is_url(shard.path)):
                raise ValueError(f"{shard.path!r} is no absolute path and no URL that is read")
        elif not SHARD_NAME.fullmatch(shard.name) or not shard.name.startswith(f"{shard.split}-"):
            raise ValueError(f"{shard.name!r} is no name for a {shard.split} shard")
    if len({s.name for s in shards}) != len(shards):
        raise ValueError("two shards have the same name")
    if [s.split for s in shards] != sorted((s.split for s in shards), key=SPLITS.index):
        raise ValueError(f"its shards are not in the order of {', '.join(SPLITS)}")


def _check_runs(column: pa.ChunkedArray, expected: list[tuple[str, int]]) -> None:
    """The rows of each shard and split stand together, as many as are listed."""
    array = _whole(column)
    codes, names = np.from_dlpack(array.indices), array.dictionary.to_pylist()
    starts = np.flatnonzero(np.diff(codes, prepend=-1))
    lengths = np.diff(starts, append=len(codes)).tolist()
    runs = [(names[code], length) for code, length in zip(codes[starts].tolist(), lengths, strict=True)]
    for (name, rows), (wanted, wanted_rows) in zip(runs, expected, strict=False):
        if (name, rows) != (wanted, wanted_rows):
            raise ValueError(f"expected {wanted_rows} rows of {wanted}, got {rows} of {name}")
    if len(runs) != len(expected):
        raise ValueError(f"expected rows of {len(expected)} shards or splits, got {len(runs)}")


def _whole(column: pa.ChunkedArray) -> pa.Array:
    """A column as one array: a single piece as it lies, several copied together."""
    column = column.unify_dictionaries()
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _numbers(column: pa.ChunkedArray) -> NDArray[Any]:
    """A column without nulls. Not by to_numpy, which imports pandas: 26 MB and 0.16 s for each process."""
    return np.from_dlpack(_whole(column))


def _samples(folder: Path, split: str, shards: tuple[Shard, ...], rows: pa.Table, *, salt: int) -> Samples:
    crc32 = rows["crc32"]
    return Samples(
        split=split,
        folder=folder,
        shards=shards,
        shard=np.repeat(np.arange(len(shards), dtype=np.int32), [s.samples for s in shards]),
        keys=_whole(rows["key"]),
        label=_numbers(rows["label"]),
        ext=_whole(rows["ext"]),
        offset=_numbers(rows["offset"]),
        size=_numbers(rows["size"]),
        crc32=None if crc32.null_count else _numbers(crc32),
        salt=salt,
    )


def _check_rows(samples: Samples, classes: int) -> None:
    """What the rest of the code may then rely on."""
    room = np.array([s.bytes for s in samples.shards], np.int64)[samples.shard] - samples.offset
    outside = (samples.offset < 0) | (samples.size <= 0) | (samples.size > room)
    unknown = (samples.label < 0) | (samples.label >= classes)
    for fault, rows in {
        "a row points outside of the file": outside,
        "a label without a class": unknown,
    }.items():
        if rows.any():
            first = int(rows.argmax())
            raise ValueError(f"{samples.shards[samples.shard[first]].name}: {fault}: {samples.key(first)}")


def read_sample(samples: Samples, i: int) -> bytes:
    """The encoded picture of a sample, proved by its crc32 if that is known: one pread, no header is read.

    Raises ShardError, with shard and key: missing, cut short, or other bytes than were written.
    """
    shard, size, fault = samples.shard_of(i), int(samples.size[i]), ""
    place = samples.places[int(samples.shard[i])]
    for _ in range(2):  # a stale handle of a network file system, a damaged copy in the cache: once more
        try:
            data = samples.files.pread(place, shard, size, int(samples.offset[i]))
        except OSError as error:
            fault = f"cannot be read: {error.strerror or error}"
        else:
            if len(data) != size:
                fault = f"expected {size} bytes, got {len(data)}"
            elif samples.crc32 is None or zlib.crc32(data) == int(samples.crc32[i]):
                return data
            else:
                fault = "crc32 differs"
        samples.files.forget(place, shard)
    raise ShardError(f"{samples.where(i)}: {fault}; next: `gsa shards verify`, then make the set again")


def cut_short(path: Path, shard: Shard) -> str:
    """What its size alone says against a shard, or nothing."""
    if not path.is_file():
        return f"{shard.name}: missing"
    size = path.stat().st_size
    return f"{shard.name}: expected {shard.bytes} bytes, got {size}" if size != shard.bytes else ""


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def named(names: Sequence[str]) -> str:
    """`a, b, c and 12 more`"""
    more = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
