"""Write shards: pictures -> WebDataset .tar files + Parquet manifest, whole or not at all."""

import itertools
import json
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import InputError, digest
from pipeline.manifest import (
    MANIFEST,
    SCHEMA,
    SHARD_NAME,
    VERSION,
    Manifest,
    Progress,
    Shard,
    ShardError,
    cut_short,
    read_manifest,
    sha256_of,
)
from pipeline.pictures import (
    Listing,
    Picture,
    ShardsConfig,
    check_pictures,
    digits,
    list_input,
    read_picture,
    split_pictures,
    usable_classes,
)
from pipeline.rundir import hold, sync


class Built(NamedTuple):
    """What `build` returns; `reused` says that the set was there already."""

    manifest: Manifest
    reused: bool


def build(
    config: ShardsConfig, folder: Path, *, progress: Progress | None = None, replace: bool = False
) -> Built:
    """Make the set of shards in `folder`: whole or not at all, whatever kills the build.

    A set made with the same settings of the same input is returned as it is; `replace` builds it again, and
    in place of any other set. `progress` counts pictures, those of a folder twice: checked, then written.
    Raises InputError: no such input, fewer than two classes, `folder` made otherwise, no room.
    """
    folder = folder.resolve()
    listing = list_input(config)
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
    return list_input(config).digest


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
        fault = cut_short(folder / shard.name, shard)
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
    folder: Path, config: ShardsConfig, listing: "Listing", made: dict[str, Any], progress: Progress
) -> None:
    building, old = _temporary(folder)
    try:
        building.mkdir()
        pictures, broken = (
            check_pictures(listing, progress) if config.input else (digits(config.image_size), [])
        )
        classes, empty = usable_classes(listing, pictures)
        splits = split_pictures(pictures, classes, config)
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
        sync(folder.parent)
    finally:
        _recover(folder)


def _write(
    folder: Path,
    splits: dict[str, list[Picture]],
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
            shards.append(Shard(path.name, split, sha256_of(path), path.stat().st_size, len(rows)))
            columns = zip(SCHEMA, zip(*rows, strict=True), strict=True)
            tables.append(pa.table([pa.array(c, type=f.type) for f, c in columns], schema=SCHEMA))
    return shards, pa.concat_tables(tables).unify_dictionaries()


def _encoded(
    split: str, pictures: list[Picture], labels: dict[str, int], source: str, count: Callable[[], None]
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


def _bytes(picture: Picture) -> bytes:
    if isinstance(picture.source, bytes):
        return picture.source
    try:
        data = read_picture(picture.source)
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
            sync(Path(name))

        pattern = f"{folder}/".replace("%", "%%") + f"{split}-%06d.tar"
        options = {"opener": open_shard, "post": close_shard, "encoder": False}
        # mtime=0: the same pictures make the same bytes. verbose=0: it would print.
        with webdataset.ShardWriter(pattern, maxcount=per_shard, mtime=0, verbose=0, **options) as writer:
            for sample in samples:
                writer.write(sample)


def _rows(
    path: Path, split: str, pictures: list[Picture], labels: dict[str, int]
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
    sync(folder / MANIFEST)
    sync(folder)
