"""Prove and show shards: every byte against the manifest; counts; a contact sheet."""

import io
import math
import os
import tarfile
import zlib
from collections import Counter
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pipeline.config import InputError
from pipeline.decode import decode
from pipeline.manifest import (
    Manifest,
    Progress,
    Samples,
    Shard,
    ShardError,
    cut_short,
    named,
    read_manifest,
    read_sample,
    sha256_of,
)
from pipeline.rundir import write_atomic


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


def _shard_faults(manifest: Manifest, shard: Shard) -> list[str]:
    path, samples = manifest.folder / shard.name, manifest.split(shard.split)
    rows = np.flatnonzero(samples.shard == samples.shard_paths.index(path)).tolist()
    cut = cut_short(path, shard)
    if not path.is_file():
        return [cut]
    try:
        fault = cut or (f"{shard.name}: sha256 differs" if sha256_of(path) != shard.sha256 else "")
        if not fault:
            return [f"{shard.name}: {f}" for f in _row_faults(path, samples, rows)]
        with open(path, "rb") as file:
            damaged = [samples.key[i] for i in rows if not _same_bytes(file, samples, i)]
    except OSError as error:
        return [f"{shard.name}: cannot be read: {error.strerror or error}"]
    return [f"{fault}; damaged pictures: {named(damaged) or 'none, but headers, labels or padding'}"]


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
    return [f"{fault}: {named(names)}" for fault, names in faults.items()]


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
