"""Write shards: pictures -> WebDataset .tar files + manifest, whole or not at all; what is killed goes on."""

import json
import os
import shutil
import sys
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, ThreadPoolExecutor, wait
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.archives import from_cifar, from_imagenet
from pipeline.config import InputError, digest
from pipeline.decode import decode
from pipeline.manifest import (
    MANIFEST,
    SCHEMA,
    SHARD_NAME,
    VERSION,
    Manifest,
    Shard,
    ShardError,
    cut_short,
    named,
    open_parquet,
    read_manifest,
    sha256_of,
    write_manifest,
)
from pipeline.pictures import (
    Checked,
    Entry,
    InputFault,
    Listing,
    ShardsConfig,
    Source,
    check,
    from_digits,
    from_folder,
    read_again,
    shrink,
    split_pictures,
    usable_classes,
)
from pipeline.rundir import hold, read_json, sync, write_atomic, write_json

WORK = ".work"  # inside of a set that is being built: what an earlier, killed call has finished
CHUNK = 500  # pictures that are checked before that is written down
MAX_JPEG_SIDE = 65_500  # pixels
CHECKED = pa.schema(
    [
        pa.field("ext", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("crc32", pa.uint32()),
        pa.field("fault", pa.string()),
    ]
)


class Built(NamedTuple):
    """What `build` returns; `reused` says that the set was there already."""

    manifest: Manifest
    reused: bool


class _Plan(NamedTuple):
    """Which picture goes where, once all have been looked at."""

    config: ShardsConfig
    listing: Listing
    checked: pa.Table  # of CHECKED, a row for each entry of the listing
    labels: dict[str, int]
    splits: dict[str, list[int]]  # numbers of entries


Progress = Callable[[str, int, int], None]  # (phase: checked or written, pictures done, total)


class _Count:
    """Pictures that are done, told to `progress` from any thread; after `stop` each thread ends at its next."""

    def __init__(self, progress: Progress, phase: str, total: int) -> None:
        self._progress, self._phase, self._total, self._done = progress, phase, total, 0
        self._stopped, self._lock = False, threading.Lock()

    def add(self, pictures: int = 1) -> None:
        with self._lock:
            if self._stopped:
                raise CancelledError
            if pictures:
                self._done += pictures
                self._progress(self._phase, self._done, self._total)

    def stop(self) -> None:
        with self._lock:
            self._stopped = True


def build(
    config: ShardsConfig, folder: Path, *, progress: Progress | None = None, replace: bool = False
) -> Built:
    """Make the set of shards in `folder`: whole or not at all, whatever kills the build.

    A killed build, or one without room, keeps what it has finished in .NAME.building; the next call with
    the same settings and input goes on from there, and the set has the same bytes as if made in one go.
    A set made with the same settings of the same input is returned as it is; `replace` builds it again, and
    in place of any other set. `progress` counts pictures: those checked, then those written.
    Raises InputError: no such input, fewer than two classes, `folder` made otherwise, no room.
    """
    folder = folder.resolve()
    source = find_source(config)
    made = {"settings": config.model_dump(mode="json"), "input_digest": source.digest}
    manifest = _existing(folder, made, replace=replace)  # without the lock: a shared set may be read-only
    if manifest:
        return Built(manifest, reused=True)
    try:
        with hold(folder.with_name(f".{folder.name}.lock"), str(folder)):
            _recover(folder)
            manifest = _existing(folder, made, replace=replace)
            if manifest:
                return Built(manifest, reused=True)
            _build(folder, config, source, made, progress or (lambda phase, done, total: None))
    except InputFault as error:
        raise InputError(
            f"input {error.filename!r}: cannot be read: {error.strerror}; what is finished is kept; "
            "next: the same command, once it can be read"
        ) from None
    except OSError as error:
        raise InputError(_no_room(folder, error)) from None
    return Built(read_manifest(folder), reused=False)


def listing(config: ShardsConfig) -> str:
    """16 hex digits that change with the input: names, sizes and times of change of its files."""
    return find_source(config).digest


def find_source(config: ShardsConfig) -> Source:
    root = Path(os.path.expanduser(config.input or ""))
    match config.source:
        case "digits":
            return from_digits(config.image_size)
        case "folder":
            return from_folder(root)
        case "imagenet":
            return from_imagenet(root)
        case _:
            return from_cifar(config.source, root)


def _no_room(folder: Path, error: OSError) -> str:
    place = next(p for p in folder.parents if p.exists())
    building, _ = _temporary(folder)
    kept = f"; what is finished is kept in {building}" if building.exists() else ""
    reason = os.strerror(error.errno) if error.errno else str(error)
    return (
        f"{folder}: cannot be written: {reason} ({shutil.disk_usage(place).free} bytes are free){kept}; "
        "next: make room there and call again, or choose another --out"
    )


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
    if "settings" not in old:
        return ["not by `gsa shards build`"]
    was, now = old["settings"], new["settings"]
    fields = [f for f in now if f not in ("name", "input") and was.get(f) != now[f]]
    lines = [f"{f} {was.get(f)}, now {now[f]}" for f in fields]
    if not fields and old["input_digest"] != new["input_digest"]:
        lines.append("other pictures in the input (by name, size and time of change)")
    return lines


# --- from a free place to a set, through every kill --------------------------------------------------------


def _temporary(folder: Path) -> tuple[Path, Path]:
    """Where a set is built, and where an old one waits to be deleted."""
    return folder.with_name(f".{folder.name}.building"), folder.with_name(f".{folder.name}.old")


def _recover(folder: Path) -> None:
    """Mend what a replacement left that was killed; the lock proves that no other is at work."""
    _, old = _temporary(folder)
    if old.exists() and not folder.exists():
        old.rename(folder)  # killed between the two renames
    shutil.rmtree(old, ignore_errors=True)  # NFS keeps what a reader has open; the next build clears it


def _build(
    folder: Path, config: ShardsConfig, source: Source, made: dict[str, Any], progress: Progress
) -> None:
    building, old = _temporary(folder)
    if not _is_complete(building, made):
        _claim(building, _plan_digest(made))
        try:
            _fill(building, config, source, made, progress)
        except InputError:  # of no use to the next call: the input must change first
            shutil.rmtree(building, ignore_errors=True)
            raise
    if (building / WORK).exists():  # from here on, the manifest says that all is finished
        shutil.rmtree(building / WORK)
    try:
        if folder.exists() and any(folder.iterdir()):
            folder.rename(old)
        building.rename(folder)
        sync(folder.parent)
    finally:
        _recover(folder)


def _plan_digest(made: dict[str, Any]) -> str:
    """What decides every byte of the set: another digest, and the work of an earlier call is of no use."""
    settings = {k: v for k, v in made["settings"].items() if k not in ("name", "input")}
    libraries = [version(name) for name in ("pillow", "simplejpeg", "webdataset", "pyarrow")]
    return digest([VERSION, CHUNK, settings, made["input_digest"], libraries])


def _is_complete(building: Path, made: dict[str, Any]) -> bool:
    try:
        return read_manifest(building).made == made
    except ShardError:
        return False


def _claim(building: Path, plan: str) -> None:
    """Keep what an earlier call of this plan has finished, and nothing else."""
    note = building / WORK / "plan.json"
    try:
        same = read_json(note) == plan
    except InputError:
        same = False
    if not same and building.exists():
        shutil.rmtree(building)
    (building / WORK).mkdir(parents=True, exist_ok=True)
    for temporary in building.glob(".*.tmp"):
        temporary.unlink()
    write_json(note, plan)


def _fill(
    building: Path, config: ShardsConfig, source: Source, made: dict[str, Any], progress: Progress
) -> None:
    """List, check, plan, write: all of the set, its manifest last."""
    listing = source.listing()
    entries = listing.entries
    checked = _check(building / WORK, listing, _Count(progress, "checked", len(entries)))
    faults = checked["fault"].to_pylist()
    good = [i for i, fault in enumerate(faults) if not fault]
    classes, empty = usable_classes(source.root, listing, [entries[i] for i in good])
    if empty and config.source != "folder":
        raise InputError(
            f"input {source.root!r}: labels would not be the official ones without {named(empty)}"
        )
    splits = split_pictures(entries, good, classes, val_fraction=config.val_fraction, seed=config.seed)
    plan = _Plan(config, listing, checked, {name: n for n, name in enumerate(classes)}, splits)
    count = _Count(progress, "written", sum(len(members) for members in splits.values()))
    shards, rows = _write(building, plan, count)
    broken = [{"file": entries[i].origin, "reason": fault} for i, fault in enumerate(faults) if fault]
    write_manifest(
        building,
        rows,
        classes=classes,
        shards=shards,
        made=made,
        broken=listing.left_out + broken,
        ignored=listing.ignored,
        empty_classes=empty,
    )


def _check(work: Path, listing: Listing, count: _Count) -> pa.Table:
    """Decode every picture once: a table of CHECKED."""
    chunks = [listing.entries[start : start + CHUNK] for start in range(0, len(listing.entries), CHUNK)]

    def check_chunk(number: int) -> pa.Table:
        found = []
        for entry in chunks[number]:
            found.append(check(listing, entry))
            count.add()
        return _table(found, CHECKED)

    paths = [work / f"checked-{number:06d}.parquet" for number in range(len(chunks))]
    parts = _parts(paths, check_chunk, count)
    return pa.concat_tables([CHECKED.empty_table(), *parts], promote_options="none")


def _write(building: Path, plan: _Plan, count: _Count) -> tuple[list[Shard], pa.Table]:
    """Write every shard that is not there yet: (the shards, the rows of the manifest)."""
    import webdataset  # noqa: F401  it imports torch: once, before there are threads

    size, jobs = plan.config.samples_per_shard, []
    for split, members in plan.splits.items():
        jobs += [
            (split, start // size, members[start : start + size]) for start in range(0, len(members), size)
        ]
    names = [f"{split}-{number:06d}.tar" for split, number, _ in jobs]
    notes = [building / WORK / f"{name}.parquet" for name in names]
    for name, note in zip(names, notes, strict=True):
        part = _read_part(note)
        if part and cut_short(building / name, _shard(part)):
            note.unlink()  # somebody has touched the shard

    def write_shard(job: int) -> pa.Table:
        return _write_shard(building / names[job], plan, *jobs[job], count)

    parts = _parts(notes, write_shard, count)
    rows = pa.concat_tables([p.replace_schema_metadata() for p in parts]).unify_dictionaries()
    return [_shard(part) for part in parts], rows.combine_chunks()


def _parts(paths: Sequence[Path], make: Callable[[int], pa.Table], count: _Count) -> list[pa.Table]:
    """The table that each path holds. Those that no earlier call has left are made: make(i), in parallel."""
    parts = [_read_part(path) for path in paths]
    count.add(sum(part.num_rows for part in parts if part))

    def make_part(i: int) -> None:
        data = pa.BufferOutputStream()
        pq.write_table(make(i), data, write_page_checksum=True)
        write_atomic(paths[i], data.getvalue().to_pybytes())
        parts[i] = _read_part(paths[i])  # the same table as the next call would find

    cpus = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    with ThreadPoolExecutor(cpus) as pool:
        try:
            futures = [pool.submit(make_part, i) for i, part in enumerate(parts) if part is None]
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
        except BaseException:
            count.stop()
            pool.shutdown(cancel_futures=True)
            raise
    return parts


def _read_part(path: Path) -> pa.Table | None:
    """None if it is not there, or damaged."""
    try:
        return open_parquet(path).read()
    except (OSError, pa.ArrowException):
        return None


def _table(rows: Sequence[tuple[Any, ...]], schema: pa.Schema) -> pa.Table:
    columns = zip(schema, zip(*rows, strict=True), strict=True)
    return pa.table([pa.array(values, type=field.type) for field, values in columns], schema=schema)


def _shard(part: pa.Table) -> Shard:
    return Shard(**json.loads(part.schema.metadata[b"shard"]))


# --- one shard ---------------------------------------------------------------------------------------------


class _Written(NamedTuple):
    """What of a sample its own headers do not tell."""

    label: int
    crc32: int
    width: int
    height: int


def _write_shard(
    path: Path, plan: _Plan, split: str, number: int, members: list[int], count: _Count
) -> pa.Table:
    """Write one .tar file, whole or not at all: its rows of the manifest, with its Shard as metadata."""
    import webdataset

    temporary, written = path.with_name(f".{path.name}.tmp"), dict[str, _Written]()
    first = number * plan.config.samples_per_shard
    try:
        with open(temporary, "wb") as file:
            # mtime=0: the same pictures make the same bytes. verbose=0: it would print.
            options = {"start_shard": number, "maxcount": len(members), "maxsize": float("inf"), "mtime": 0}
            with webdataset.ShardWriter(
                f"{split}-%06d.tar", opener=lambda name: file, encoder=False, verbose=0, **options
            ) as writer:
                for sample, facts in _samples(plan, split, first, members):
                    writer.write(sample)
                    written[str(sample["__key__"])] = facts
                    count.add()
            file.flush()
            os.fsync(file.fileno())
        rows = list(_rows(temporary, split, path.name, written))
        shard = Shard(path.name, split, sha256_of(temporary), temporary.stat().st_size, len(rows))
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
    return _table(rows, SCHEMA).replace_schema_metadata({"shard": json.dumps(asdict(shard))})


def _samples(
    plan: _Plan, split: str, first: int, members: list[int]
) -> Iterator[tuple[dict[str, str | bytes], _Written]]:
    """Samples in WebDataset's words. Keys are numbers: a file name never becomes a member's name."""
    checked = plan.checked.take(np.array(members)).to_pylist()
    for number, (member, row) in enumerate(zip(members, checked, strict=True), first):
        entry = plan.listing.entries[member]
        label = plan.labels[entry.class_name]
        ext, data, width, height = _encoded(plan, entry, Checked(**row))
        sample: dict[str, str | bytes] = {
            "__key__": f"{split}-{number:08d}",
            ext: data,
            "cls": str(label).encode(),
            "json": json.dumps({"source": plan.config.source, "file": entry.origin}).encode(),
        }
        yield sample, _Written(label, zlib.crc32(data), width, height)


def _encoded(plan: _Plan, entry: Entry, checked: Checked) -> tuple[str, bytes, int, int]:
    """(ext, bytes, width, height) as they are written: untouched, unless settings ask for smaller pictures."""
    data, config = read_again(plan.listing, entry, checked.crc32), plan.config
    sides = sorted((checked.width, checked.height))
    if config.shorter_side is None or sides[0] <= config.shorter_side:
        return checked.ext, data, checked.width, checked.height
    if sides[1] * config.shorter_side > MAX_JPEG_SIDE * sides[0]:  # a strip that no JPEG can hold
        return checked.ext, data, checked.width, checked.height
    return "jpg", *shrink(decode(data), config.shorter_side, config.quality)


def _rows(path: Path, split: str, name: str, written: dict[str, _Written]) -> Iterator[tuple[str | int, ...]]:
    """The manifest's rows of a shard, in SCHEMA's order, found by its own headers."""
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            key, _, ext = member.name.rpartition(".")
            if ext in ("cls", "json"):
                continue
            w = written[key]
            place = (member.offset_data, member.size)
            yield (split, name, key, w.label, ext, *place, w.crc32, w.width, w.height)
