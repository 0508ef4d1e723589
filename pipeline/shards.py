"""Write, read and prove shards: digits, folders of pictures -> WebDataset .tar files + Parquet manifest."""

import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import stat
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Annotated, Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pydantic import Field, model_validator

from pipeline.config import InputError, Name, Positive, Section, digest
from pipeline.decode import MAX_PIXELS, decode
from pipeline.rundir import hold, write_atomic

VERSION = 1
MANIFEST = "manifest.parquet"
SPLITS = ("train", "val")
ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
DIGITS_SIZE = 32
MAX_FILE_BYTES = 4 * MAX_PIXELS  # no picture that decode() takes is larger
MAX_NAMED = 3  # samples that a fault names before it counts
MAX_OPEN = 256  # descriptors a split keeps: ImageNet has 1,300 shards, a process 1,024 descriptors
LAYOUT = "expected CLASS/picture.jpg, or train/CLASS/picture.jpg and val/CLASS/picture.jpg"
# A shard's name comes from a file and becomes a path: nothing else may pass.
SHARD_NAME = re.compile(r"(train|val)-\d{6,}\.tar")
MAGIC = ((b"\xff\xd8", "jpg"), (b"\x89PNG", "png"), (b"RIFF", "webp"))
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


class ShardError(InputError):
    """A set of shards that is not there, damaged, or not ours."""


class ShardsConfig(Section):
    """What a set of shards is made of."""

    name: Name
    source: Literal["digits", "folder"]
    input: Annotated[str, Field(min_length=1)] | None = None  # CLASS/picture.jpg, or train/ and val/ of such
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2  # of each class, where none is given
    seed: Annotated[int, Field(ge=0)] = 0
    image_size: Annotated[int, Field(ge=8, le=1024)] = DIGITS_SIZE  # digits only: pixels a side
    samples_per_shard: Positive = 1000

    @model_validator(mode="after")
    def _fits_the_source(self) -> "ShardsConfig":
        if self.source == "digits" and self.input is not None:
            raise ValueError("input is for source folder; the digits need none")
        if self.source == "folder" and self.input is None:
            raise ValueError(f"source folder needs input, a folder of pictures: {LAYOUT}")
        if self.source == "folder" and self.image_size != DIGITS_SIZE:
            raise ValueError("image_size is for source digits: the pictures of a folder are kept as they are")
        return self


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


class Built(NamedTuple):
    """What `build` returns; `reused` says that the set was there already."""

    manifest: Manifest
    reused: bool


# --- build -------------------------------------------------------------------------------------------------


def build(
    config: ShardsConfig, folder: Path, *, progress: Progress | None = None, replace: bool = False
) -> Built:
    """Make the set of shards in `folder`: whole or not at all, whatever kills the build.

    A set made with the same settings of the same input is returned as it is; `replace` builds it again, and
    in place of any other set. `progress` counts pictures, those of a folder twice: checked, then written.
    Raises InputError: no such input, fewer than two classes, `folder` made otherwise, no room.
    """
    folder = folder.resolve()
    listing = _list_input(config)
    made = {"settings": config.model_dump(mode="json"), "input_digest": listing.digest}
    manifest = _existing(folder, made, replace=replace)  # without the lock: a shared set may be read-only
    if manifest:
        return Built(manifest, reused=True)
    try:
        with hold(folder.with_name(f".{folder.name}.lock"), str(folder)):
            _recover(folder)
            manifest = _existing(folder, made, replace=replace)
            if manifest:
                return Built(manifest, reused=True)
            _build(folder, config, listing, made, progress or (lambda done, total: None))
    except OSError as error:
        place = next(p for p in folder.parents if p.exists())
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise InputError(
            f"{folder}: cannot be written: {reason} ({shutil.disk_usage(place).free} bytes are free "
            "without it); next: make room there, or choose another --out"
        ) from None
    return Built(read_manifest(folder), reused=False)


def listing(config: ShardsConfig) -> str:
    """16 hex digits that change with the input: names, sizes and times of change of its pictures."""
    return _list_input(config).digest


def _existing(folder: Path, made: dict[str, Any], *, replace: bool) -> Manifest | None:
    """The set that is there already, if it is the one that is wanted; None if the place is free."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: expected a folder, found a file; next: choose another name")
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    if replace or not names:
        foreign = [n for n in names if n != MANIFEST and not SHARD_NAME.fullmatch(n)]
        if foreign:  # it would be deleted with the set
            raise InputError(
                f"{folder}: not replaced, because {foreign[0]!r} in it is no shard; "
                "next: move it away, or choose another name"
            )
        return None
    manifest = read_manifest(folder)
    differences = _differences(manifest.made, made)
    if differences:
        raise InputError(
            f"{folder}: exists already, made otherwise: {'; '.join(differences)}; "
            "next: choose another name, or replace it (--replace)"
        )
    for shard in manifest.shards:
        fault = _cut_short(folder / shard.name, shard)
        if fault:
            raise ShardError(f"{folder}: exists already, damaged: {fault}; next: replace it (--replace)")
    return manifest


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What else than the names of set and input differs: a folder of pictures may have moved."""
    was, now = old["settings"], new["settings"]
    fields = [f for f in now if f not in ("name", "input") and was.get(f) != now[f]]
    lines = [f"{f} {was.get(f)}, now {now[f]}" for f in fields]
    if not fields and old["input_digest"] != new["input_digest"]:
        lines.append("other pictures in the input (by name, size and time of change)")
    return lines


def _temporary(folder: Path) -> tuple[Path, Path]:
    """Where a set is built, and where an old one waits to be deleted."""
    return folder.with_name(f".{folder.name}.building"), folder.with_name(f".{folder.name}.old")


def _recover(folder: Path) -> None:
    """Clear what an ended build left; the lock proves that no other is at work."""
    building, old = _temporary(folder)
    shutil.rmtree(building, ignore_errors=True)
    if old.exists() and not folder.exists():
        old.rename(folder)  # killed between the two renames of a replacement
    shutil.rmtree(old, ignore_errors=True)  # NFS keeps what a reader has open; the next build clears it


def _build(
    folder: Path, config: ShardsConfig, listing: "_Listing", made: dict[str, Any], progress: Progress
) -> None:
    building, old = _temporary(folder)
    try:
        building.mkdir()
        pictures, broken = _check(listing, progress) if config.input else (_digits(config.image_size), [])
        classes, empty = _usable_classes(listing, pictures)
        splits = _split(pictures, classes, config)
        written = sum(len(pictures) for pictures in splits.values())
        total = 2 * len(listing.files) or written
        numbers = itertools.count(total - written + 1)  # what is left out counts as written
        shards, table = _write(building, splits, classes, config, lambda: progress(next(numbers), total))
        values = {
            "version": VERSION,
            "classes": classes,
            "shards": [vars(s) for s in shards],
            "made": made,
            "broken": listing.left_out + broken,
            "ignored": listing.ignored,
            "empty_classes": empty,
        }
        _write_manifest(building, table, values)
        if folder.exists() and any(folder.iterdir()):
            folder.rename(old)
        building.rename(folder)
        _sync(folder.parent)
    finally:
        _recover(folder)


# --- what goes in ------------------------------------------------------------------------------------------


class _File(NamedTuple):
    """A file that is a picture by its ending. `split` is "" where the split is still to be drawn."""

    split: str
    class_name: str
    path: str


class _Listing(NamedTuple):
    """An input folder by name, size and time of change, before any picture is opened."""

    root: str
    given: bool  # the split, by the folders train/ and val/
    classes: list[str]
    files: list[_File]
    left_out: list[dict[str, str]]  # {"file", "reason"}
    ignored: int
    digest: str


class _Picture(NamedTuple):
    """A picture proved readable; `source` is its path, or its bytes where it has none."""

    split: str
    class_name: str
    origin: str
    source: str | bytes
    ext: str
    width: int
    height: int
    crc32: int


DIGITS = _Listing("digits", False, [str(n) for n in range(10)], [], [], 0, digest("digits"))


def _list_input(config: ShardsConfig) -> _Listing:
    return _list_folder(Path(os.path.expanduser(config.input))) if config.input else DIGITS


def _list_folder(root: Path) -> _Listing:
    if not root.is_dir():
        raise InputError(f"input {str(root)!r}: no such folder; {LAYOUT}")
    try:
        top = _subfolders(root)
        given = all(s in top and _subfolders(top[s]) for s in SPLITS)
        places = {s: top[s] for s in SPLITS} if given else {"": str(root)}
        folders = {(s, name): path for s, p in places.items() for name, path in _subfolders(p).items()}
        entries = [(s, name, e) for (s, name), path in folders.items() for e in _visible(path)]
        loose = [e for p in {str(root), *places.values()} for e in _visible(p) if not os.path.isdir(e.path)]
    except OSError as error:
        raise InputError(f"input {str(root)!r}: cannot be listed: {error}") from None
    if not folders:
        raise InputError(f"input {str(root)!r}: no sub-folders, so no classes; {LAYOUT}")
    strays = [path for name, path in top.items() if given and name not in SPLITS]
    left_out = [_left_out(root, path, "a folder beside train and val") for path in strays]
    files, marks, ignored = [], [], len(loose)
    for split, name, entry in entries:
        if os.path.isdir(entry.path):
            left_out.append(_left_out(root, entry.path, "a folder inside a class folder"))
        elif not entry.name.lower().endswith(ENDINGS):
            ignored += 1
        else:
            files.append(_File(split, _text(name), entry.path))
            marks.append((os.path.relpath(entry.path, root), *_size_and_time(entry.path)))
    classes = sorted({_text(name) for _, name in folders})
    return _Listing(str(root), given, classes, files, left_out, ignored, digest(marks))


def _visible(folder: str | Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)


def _subfolders(folder: str | Path) -> dict[str, str]:
    """By name. A link to a folder is one, unless it leads back to where it lies."""
    here = Path(folder).resolve()
    paths = {e.name: e.path for e in _visible(folder) if os.path.isdir(e.path)}
    return {name: path for name, path in paths.items() if not here.is_relative_to(Path(path).resolve())}


def _size_and_time(path: str) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except OSError:  # a dangling link: reading it will say so
        return -1, 0
    return found.st_size, found.st_mtime_ns


def _text(name: str) -> str:
    """A file name as text that can be printed: bytes that are no UTF-8 become \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _left_out(root: str | Path, path: str, reason: str) -> dict[str, str]:
    return {"file": _text(os.path.relpath(path, root)), "reason": reason}


def _check(listing: _Listing, progress: Progress) -> tuple[list[_Picture], list[dict[str, str]]]:
    """Decode every picture once: (those that are pictures, those that are not)."""
    pictures, broken = [], []
    for done, file in enumerate(listing.files, 1):
        try:
            data = _read(file.path)
            image = decode(data)
        except (OSError, ValueError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
            broken.append(_left_out(listing.root, file.path, reason))
        else:
            ext = next(e for magic, e in MAGIC if data.startswith(magic))  # whatever the name says
            origin = _text(os.path.relpath(file.path, listing.root))
            pictures.append(
                _Picture(file.split, file.class_name, origin, file.path, ext, *image.size, zlib.crc32(data))
            )
        progress(done, 2 * len(listing.files))
    return pictures, broken


def _read(path: str) -> bytes:
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for ever
        raise OSError("not a regular file")
    if found.st_size > MAX_FILE_BYTES:
        raise OSError(f"{found.st_size} bytes are above {MAX_FILE_BYTES}")
    with open(path, "rb") as file:
        return file.read()


def _digits(size: int) -> list[_Picture]:
    """The 1,797 scans of scikit-learn, 8x8 with values 0..16, enlarged to gray PNGs."""
    from sklearn.datasets import load_digits

    scans, labels = load_digits(return_X_y=True)
    pixels = np.rint(scans.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    pictures = []
    for number, (scan, label) in enumerate(zip(pixels, labels, strict=True)):
        png = io.BytesIO()
        Image.fromarray(scan).resize((size, size), Image.Resampling.BICUBIC).save(png, "PNG")
        data = png.getvalue()
        pictures.append(_Picture("", str(label), str(number), data, "png", size, size, zlib.crc32(data)))
    return pictures


def _usable_classes(listing: _Listing, pictures: list[_Picture]) -> tuple[list[str], list[str]]:
    """(classes with a train and a val sample, the others with the reason)."""
    counts = Counter((p.class_name, p.split) for p in pictures)
    classes, empty = [], []
    for name in listing.classes:
        reason = ""
        lacking = [s for s in SPLITS if listing.given and not counts[name, s]]
        if lacking:
            reason = f"no readable picture in {' and '.join(lacking)}"
        elif not listing.given and counts[name, ""] < 2:
            reason = "1 readable picture cannot be split" if counts[name, ""] else "no readable picture"
        if reason:
            empty.append(f"{name} ({reason})")
        else:
            classes.append(name)
    if len(classes) < 2:
        raise InputError(
            f"input {listing.root!r}: expected at least 2 classes with readable pictures, found "
            f"{len(classes)}; left out: {_named(empty) or 'none'}; {LAYOUT}"
        )
    return classes, empty


def _split(pictures: list[_Picture], classes: list[str], config: ShardsConfig) -> dict[str, list[_Picture]]:
    """Train and val, each in an order that mixes the classes: a function of settings and file names."""
    groups: dict[tuple[str, str], list[_Picture]] = {}
    for picture in pictures:
        groups.setdefault((picture.class_name, picture.split), []).append(picture)
    splits: dict[str, list[_Picture]] = {s: [] for s in SPLITS}
    for name in classes:
        for split in SPLITS:
            splits[split] += groups.get((name, split), [])
        members = groups.get((name, ""), [])
        if members:
            random.Random(f"{config.seed} split {name}").shuffle(members)
            held_out = min(max(1, round(len(members) * config.val_fraction)), len(members) - 1)
            splits["val"] += members[:held_out]
            splits["train"] += members[held_out:]
    for split, members in splits.items():
        random.Random(f"{config.seed} order {split}").shuffle(members)
    return splits


# --- write -------------------------------------------------------------------------------------------------


def _write(
    folder: Path,
    splits: dict[str, list[_Picture]],
    classes: list[str],
    config: ShardsConfig,
    count: Callable[[], None],
) -> tuple[list[Shard], pa.Table]:
    labels = {name: label for label, name in enumerate(classes)}
    shards, tables = [], []
    for split, pictures in splits.items():
        samples = _encoded(split, pictures, labels, config.source, count)
        _write_tars(folder, split, samples, config.samples_per_shard)
        for path in sorted(folder.glob(f"{split}-*.tar")):
            rows = list(_rows(path, split, pictures, labels))
            shards.append(Shard(path.name, split, _sha256(path), path.stat().st_size, len(rows)))
            columns = zip(SCHEMA, zip(*rows, strict=True), strict=True)
            tables.append(pa.table([pa.array(c, type=f.type) for f, c in columns], schema=SCHEMA))
    return shards, pa.concat_tables(tables).unify_dictionaries()


def _encoded(
    split: str, pictures: list[_Picture], labels: dict[str, int], source: str, count: Callable[[], None]
) -> Iterator[dict[str, str | bytes]]:
    """Samples in WebDataset's words. Keys are numbers: a file name never becomes a member's name."""
    for number, picture in enumerate(pictures):
        yield {
            "__key__": f"{split}-{number:08d}",
            picture.ext: _bytes(picture),
            "cls": str(labels[picture.class_name]).encode(),
            "json": json.dumps({"source": source, "file": picture.origin}).encode(),
        }
        count()


def _bytes(picture: _Picture) -> bytes:
    if isinstance(picture.source, bytes):
        return picture.source
    try:
        data = _read(picture.source)
    except OSError as error:
        raise InputError(f"{picture.source!r}: was readable, and is no more: {error}") from None
    if zlib.crc32(data) != picture.crc32:
        raise InputError(f"{picture.source!r}: changed while the shards were built; next: build again")
    return data


def _write_tars(folder: Path, split: str, samples: Iterable[dict[str, str | bytes]], per_shard: int) -> None:
    import webdataset  # it imports torch, which nothing else here needs

    files: list[IO[bytes]] = []
    with ExitStack() as stack:

        def open_shard(name: str) -> IO[bytes]:
            files.append(stack.enter_context(open(name, "wb")))
            return files[-1]

        def close_shard(name: str) -> None:
            files[-1].close()
            _sync(Path(name))

        pattern = f"{folder}/".replace("%", "%%") + f"{split}-%06d.tar"
        options = {"opener": open_shard, "post": close_shard, "encoder": False}
        # mtime=0: the same pictures make the same bytes. verbose=0: it would print.
        with webdataset.ShardWriter(pattern, maxcount=per_shard, mtime=0, verbose=0, **options) as writer:
            for sample in samples:
                writer.write(sample)


def _rows(
    path: Path, split: str, pictures: list[_Picture], labels: dict[str, int]
) -> Iterator[tuple[str | int, ...]]:
    """The manifest's rows of a shard, in SCHEMA's order, found by its own headers."""
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            key, _, ext = member.name.rpartition(".")
            if ext in ("cls", "json"):
                continue
            p = pictures[int(key.rpartition("-")[2])]
            place = (member.offset_data, member.size)
            yield (split, path.name, key, labels[p.class_name], ext, *place, p.crc32, p.width, p.height)


def _write_manifest(folder: Path, table: pa.Table, values: dict[str, Any]) -> None:
    text = json.dumps({**values, "digest": digest(values)})
    table = table.replace_schema_metadata({b"gsa": text.encode()})
    pq.write_table(table, folder / MANIFEST, compression="zstd", write_page_checksum=True)
    _sync(folder / MANIFEST)
    _sync(folder)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- read --------------------------------------------------------------------------------------------------


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


# --- prove -------------------------------------------------------------------------------------------------


def verify(folder: Path, progress: Progress | None = None) -> list[str]:
    """Every fault, each with its shard's name; an empty list says that all bytes and rows are as written.

    Not looked at again: width and height, which the manifest's own checksums guard. `progress` counts shards.
    """
    try:
        manifest = read_manifest(folder)
    except ShardError as error:
        return [str(error)]
    known = {s.name for s in manifest.shards}
    surplus = sorted(p.name for p in folder.glob("*.tar") if p.name not in known)
    faults = [f"{name!r}: not in the manifest" for name in surplus]
    for done, shard in enumerate(manifest.shards, 1):
        faults += _shard_faults(manifest, shard)
        if progress:
            progress(done, len(manifest.shards))
    return faults


def _cut_short(path: Path, shard: Shard) -> str:
    """What its size alone says against a shard, or nothing."""
    if not path.is_file():
        return f"{shard.name}: missing"
    size = path.stat().st_size
    return f"{shard.name}: expected {shard.bytes} bytes, got {size}" if size != shard.bytes else ""


def _shard_faults(manifest: Manifest, shard: Shard) -> list[str]:
    path, samples = manifest.folder / shard.name, manifest.split(shard.split)
    rows = np.flatnonzero(samples.shard == samples.shard_paths.index(path)).tolist()
    cut = _cut_short(path, shard)
    if not path.is_file():
        return [cut]
    try:
        fault = cut or (f"{shard.name}: sha256 differs" if _sha256(path) != shard.sha256 else "")
        if not fault:
            return [f"{shard.name}: {f}" for f in _row_faults(path, samples, rows)]
        with open(path, "rb") as file:
            damaged = [samples.key[i] for i in rows if not _same_bytes(file, samples, i)]
    except OSError as error:
        return [f"{shard.name}: cannot be read: {error.strerror or error}"]
    return [f"{fault}; damaged pictures: {_named(damaged) or 'none, but headers, labels or padding'}"]


def _same_bytes(file: IO[bytes], samples: Samples, i: int) -> bool:
    data = os.pread(file.fileno(), int(samples.size[i]), int(samples.offset[i]))
    return zlib.crc32(data) == int(samples.crc32[i])


def _row_faults(path: Path, samples: Samples, rows: list[int]) -> list[str]:
    """A shard's rows against its members, which its own headers tell."""
    faults: dict[str, list[str]] = {}
    with open(path, "rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                members = tar.getmembers()
        except (tarfile.TarError, ValueError) as error:
            return [f"no .tar archive: {error}"]
        found = {m.name: m for m in members if m.isreg()}
        for i in rows:
            fault = _row_fault(file, found, samples, i)
            if fault:
                faults.setdefault(fault, []).append(samples.key[i])
    known = Counter(f"{samples.key[i]}.{e}" for i in rows for e in (samples.ext[i], "cls", "json"))
    surplus = [repr(name) for name in (Counter(m.name for m in members) - known).elements()]
    if surplus:
        faults["members that the manifest does not know"] = surplus
    return [f"{fault}: {_named(names)}" for fault, names in faults.items()]


def _row_fault(file: IO[bytes], found: dict[str, tarfile.TarInfo], samples: Samples, i: int) -> str:
    key = samples.key[i]
    picture, label = found.get(f"{key}.{samples.ext[i]}"), found.get(f"{key}.cls")
    if not picture or (picture.offset_data, picture.size) != (samples.offset[i], samples.size[i]):
        return "no picture where the manifest says"
    if not _same_bytes(file, samples, i):
        return "crc32 differs from the manifest's"
    if not label or f"{key}.json" not in found:
        return "no .cls or no .json member"
    text = os.pread(file.fileno(), min(label.size, 20), label.offset_data)
    return "" if text == str(samples.label[i]).encode() else "label differs from the manifest's"


def _named(names: list[str]) -> str:
    """`a, b, c and 12 more`"""
    more = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


# --- show --------------------------------------------------------------------------------------------------


def table(manifest: Manifest) -> list[dict[str, Any]]:
    """A row a split: split, shards, samples, bytes, and classes {name: samples}."""
    rows = []
    for split in manifest.splits:
        shards = [s for s in manifest.shards if s.split == split]
        counts = np.bincount(manifest.split(split).label, minlength=len(manifest.classes))
        rows.append(
            {
                "split": split,
                "shards": len(shards),
                "samples": sum(s.samples for s in shards),
                "bytes": sum(s.bytes for s in shards),
                "classes": dict(zip(manifest.classes, counts.tolist(), strict=True)),
            }
        )
    return rows


def contact_sheet(manifest: Manifest, path: Path, n: int = 64) -> None:
    """A PNG of `n` train samples, as many of each class as can be, each above its class."""
    if n < 1:
        raise InputError(f"expected at least 1 sample on the sheet, got {n}")
    samples, tile, caption = manifest.split("train"), 96, 14  # pixels
    chosen = _round_robin(samples.label)[:n]
    columns = math.ceil(math.sqrt(len(chosen)))
    size = (columns * tile, math.ceil(len(chosen) / columns) * (tile + caption))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for place, i in enumerate(chosen):
        x, y = place % columns * tile, place // columns * (tile + caption)
        image = decode(read_sample(samples, i))
        scale = (tile - 4) / max(image.size)
        image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
        sheet.paste(image, (x + (tile - image.width) // 2, y + (tile - image.height) // 2))
        name = manifest.classes[samples.label[i]].encode("ascii", "replace").decode()
        draw.text((x + 2, y + tile), " ".join(name.split())[:16], fill="black")
    png = io.BytesIO()
    sheet.save(png, "PNG")
    write_atomic(path, png.getvalue())


def _round_robin(labels: NDArray[np.int32]) -> list[int]:
    """Sample numbers: the first of each class, then the second of each, ..."""
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], labels[order])  # where each one's class begins
    turn = np.arange(len(order)) - starts
    chosen: list[int] = order[np.lexsort((labels[order], turn))].tolist()
    return chosen
