"""Prove and show shards: every byte against the manifest; counts; a contact sheet."""

import hashlib
import io
import math
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pipeline.config import InputError
from pipeline.decode import DecodeError, decode
from pipeline.manifest import (
    Manifest,
    Progress,
    Samples,
    Shard,
    ShardError,
    named,
    read_manifest,
    read_sample,
)
from pipeline.remote import (
    RemoteError,
    Unreachable,
    cache_folder,
    discard,
    has_copy,
    host,
    is_url,
    open_cached,
)
from pipeline.rundir import write_atomic

NOT_THERE = "no picture where the manifest says"
OTHER_BYTES = "crc32 differs from the manifest's"


def verify(
    folder: Path, progress: Progress | None = None, *, say: Callable[[str], None] | None = None
) -> list[str]:
    """Every fault, each with its shard's name; an empty list says that all bytes and rows are as written.

    Of a foreign set, whose manifest has no checksums, this proves its shards' sizes and that each picture
    is a member where the manifest says. A remote shard is proved by its copy in the cache, fetched if need be;
    `say` is told how many of each. A host that does not answer is asked for one shard, and is one fault.
    `progress` counts shards.
    """
    try:
        manifest = read_manifest(folder)
    except ShardError as error:
        return [str(error)]
    known = {s.name for s in manifest.shards}
    surplus = sorted(p.name for p in folder.glob("*.tar") if p.name not in known)
    faults = [f"{name!r}: not in the manifest" for name in surplus]
    copies, fetched = 0, 0
    silent: dict[str, list[str]] = {}  # by host: what its first shard met, then the shards not asked for
    for done, shard in enumerate(manifest.shards, 1):
        at = host(shard.path) if is_url(shard.path) else ""
        copy = has_copy(shard.path, shard.bytes, shard.sha256)
        if copy or at not in silent:
            try:
                faults += _shard_faults(manifest, shard)
            except Unreachable as error:
                silent[at] = [str(error.strerror)]
            copies += copy
            fetched += not copy and has_copy(shard.path, shard.bytes, shard.sha256)
        else:
            silent[at].append(shard.name)
        if progress:
            progress(done, len(manifest.shards))
    for at, (fault, *others) in silent.items():
        rest = f"; not asked for there: {named(others)}" if others else ""
        faults.append(f"{fault}{rest}; next: see whether {at} can be reached, then verify again")
    if say and any(is_url(shard.path) for shard in manifest.shards):
        say(f"remote shards: {copies} read from their copies in {cache_folder()}, {fetched} fetched now")
    return faults


def _shard_faults(manifest: Manifest, shard: Shard) -> list[str]:
    place, samples = shard.place(manifest.folder), manifest.split(shard.split)
    rows = np.flatnonzero(samples.shard == samples.shards.index(shard)).tolist()
    if not is_url(place) and not os.path.isfile(place):
        return [f"{shard.name}: missing"]
    try:
        with _open(place, shard) as file:
            size = os.fstat(file.fileno()).st_size
            fault = "" if size == shard.bytes else f"expected {shard.bytes} bytes, got {size}"
            if not fault and shard.sha256 and hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                fault = "sha256 differs"
            if not fault:
                return [f"{shard.name}: {f}" for f in _row_faults(file, samples, rows)]
            if is_url(place):  # the copy here: the next call fetches it
                discard(place, shard.bytes, shard.sha256)
            damaged = [samples.key(i) for i in rows if not _same_bytes(file, samples, i)]
    except Unreachable:
        raise
    except RemoteError as error:  # names the shard, and the next move
        return [str(error)]
    except OSError as error:
        return [f"{shard.name}: cannot be read: {error.strerror or error}"]
    return [
        f"{shard.name}: {fault}; damaged pictures: {named(damaged) or 'none, but headers, labels or padding'}"
    ]


def _open(place: str, shard: Shard) -> io.BufferedReader:
    """A shard where it lies, or its copy in the cache."""
    if is_url(place):
        return os.fdopen(open_cached(place, shard.bytes, shard.sha256), "rb")
    return open(place, "rb")


def _same_bytes(file: io.BufferedReader, samples: Samples, i: int) -> bool:
    data = os.pread(file.fileno(), int(samples.size[i]), int(samples.offset[i]))
    if samples.crc32 is None:
        return len(data) == int(samples.size[i])
    return zlib.crc32(data) == int(samples.crc32[i])


def _row_faults(file: io.BufferedReader, samples: Samples, rows: list[int]) -> list[str]:
    """A shard's rows against its members, which its own headers tell."""
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            members = tar.getmembers()
    except (tarfile.TarError, ValueError) as error:
        return [f"no .tar archive: {error}"]
    if samples.shards[0].path:
        return _foreign_faults(file, members, samples, rows)
    faults: dict[str, list[str]] = {}
    found = {m.name: m for m in members if m.isreg()}
    for i in rows:
        fault = _row_fault(file, found, samples, i)
        if fault:
            faults.setdefault(fault, []).append(samples.key(i))
    known = Counter(f"{samples.key(i)}.{e}" for i in rows for e in (samples.ext[i], "cls", "json"))
    surplus = [repr(name) for name in (Counter(m.name for m in members) - known).elements()]
    if surplus:
        faults["members that the manifest does not know"] = surplus
    return [f"{fault}: {named(names)}" for fault, names in faults.items()]


def _row_fault(file: io.BufferedReader, found: dict[str, tarfile.TarInfo], samples: Samples, i: int) -> str:
    key = samples.key(i)
    picture, label = found.get(f"{key}.{samples.ext[i]}"), found.get(f"{key}.cls")
    if not picture or (picture.offset_data, picture.size) != (samples.offset[i], samples.size[i]):
        return NOT_THERE
    if not _same_bytes(file, samples, i):
        return OTHER_BYTES
    if not label or f"{key}.json" not in found:
        return "no .cls or no .json member"
    text = os.pread(file.fileno(), min(label.size, 20), label.offset_data)
    return "" if text == str(samples.label[i]).encode() else "label differs from the manifest's"


def _foreign_faults(
    file: io.BufferedReader, members: list[tarfile.TarInfo], samples: Samples, rows: list[int]
) -> list[str]:
    """The same of a foreign shard, whose names and labels follow other customs."""
    places = {(m.offset_data, m.size) for m in members if m.isreg()}
    lost = [i for i in rows if (samples.offset[i], samples.size[i]) not in places]
    faults = {NOT_THERE: lost}
    if samples.crc32 is not None:
        faults[OTHER_BYTES] = [i for i in rows if i not in lost and not _same_bytes(file, samples, i)]
    return [f"{fault}: {named([samples.key(i) for i in at])}" for fault, at in faults.items() if at]


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
        try:
            image = Image.fromarray(decode(read_sample(samples, i)))
        except (ShardError, DecodeError):
            image = Image.new("RGB", (1, 1), "red")  # there is one, and nothing of it to be seen
        scale = (tile - 4) / max(image.size)
        image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
        sheet.paste(image, (x + (tile - image.width) // 2, y + (tile - image.height) // 2))
        name = manifest.classes[samples.label[i]].encode("ascii", "replace").decode()
        draw.text((x + 2, y + tile), " ".join(name.split())[:16], fill="black")
    png = io.BytesIO()
    sheet.save(png, "PNG")
    try:
        write_atomic(path, png.getvalue())
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}; next: name a .png file") from None


def _round_robin(labels: NDArray[np.int32]) -> list[int]:
    """Sample numbers: the first of each class, then the second of each, ..."""
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], labels[order])  # where each one's class begins
    turn = np.arange(len(order)) - starts
    chosen: list[int] = order[np.lexsort((labels[order], turn))].tolist()
    return chosen
