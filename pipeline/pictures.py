"""What goes into shards: pictures listed by name, each looked at once; then classes and split."""

import errno
import hashlib
import io
import os
import random
import stat
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image
from pydantic import Field, model_validator

from pipeline.config import InputError, Name, Positive, Section, digest
from pipeline.decode import MAX_FILE_BYTES, Pixels, decode
from pipeline.manifest import SPLITS, named

ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
MAGIC = ((b"\xff\xd8", "jpg"), (b"\x89PNG", "png"), (b"RIFF", "webp"))
# What a file itself can be guilty of. Any other error is the disk's: the picture may be fine.
OWN_FAULTS = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG)

DIGITS_SIZE = 32
QUALITY = 90
VAL_FRACTION = 0.2
LAYOUT = "expected CLASS/picture.jpg, or train/CLASS/picture.jpg and val/CLASS/picture.jpg"
INPUTS = {  # what --input is
    "folder": f"a folder of pictures: {LAYOUT}",
    "imagenet": "the folder of the official archives, or of train/ and val/",
    "cifar10": "cifar-10-python.tar.gz, or the folder that holds it",
    "cifar100": "cifar-100-python.tar.gz, or the folder that holds it",
}


class ShardsConfig(Section):
    """What a set of shards is made of."""

    name: Name
    source: Literal["digits", "folder", "imagenet", "cifar10", "cifar100"]
    input: Annotated[str, Field(min_length=1)] | None = None  # as INPUTS says
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = VAL_FRACTION  # of each class, where no split is given
    seed: Annotated[int, Field(ge=0)] = 0
    image_size: Annotated[int, Field(ge=8, le=1024)] = DIGITS_SIZE  # digits only: pixels a side
    shorter_side: Annotated[int, Field(ge=8, le=7071)] | None = None  # pixels: larger ones are made as small
    quality: Annotated[int, Field(ge=1, le=100)] = QUALITY  # of the JPEGs of these, at 4:4:4
    samples_per_shard: Positive = 1000

    @model_validator(mode="after")
    def _fits_the_source(self) -> "ShardsConfig":
        if self.source == "digits":
            if self.input is not None:
                raise ValueError("input is for the other sources; the digits need none")
            if self.shorter_side is not None:
                raise ValueError("shorter_side is for the other sources; the digits have image_size")
        else:
            if self.input is None:
                raise ValueError(f"source {self.source} needs input, {INPUTS[self.source]}")
            if self.image_size != DIGITS_SIZE:
                raise ValueError("image_size is for source digits; others have shorter_side")
        if self.source not in ("digits", "folder") and self.val_fraction != VAL_FRACTION:
            raise ValueError(f"val_fraction: the split of source {self.source} is given")
        if self.shorter_side is None and self.quality != QUALITY:
            raise ValueError("quality is for shorter_side: without it, no picture is encoded again")
        return self


class PictureError(ValueError):
    """These bytes are not worth reading."""


class InputFault(OSError):
    """The disk of the input failed: nothing is known about the picture."""


class Entry(NamedTuple):
    """A picture by its place, before it is read."""

    split: str  # "" where it is still to be drawn
    class_name: str
    origin: str  # for people; never a path to open
    path: str  # of its file, or of the archive that holds it
    offset: int = 0  # bytes in the archive; or its row, where pictures are arrays
    size: int = 0  # bytes in the archive


class Listing(NamedTuple):
    """An input by names, before any picture is opened, and how to read one."""

    given: bool  # the split
    classes: Sequence[str]
    entries: list[Entry]
    left_out: list[dict[str, str]]  # {"file", "reason"}
    ignored: int  # files that are no pictures by their ending
    read: Callable[[Entry], bytes]


class Source(NamedTuple):
    """An input: `digest` tells whether it changed; listing all that is in it may take minutes."""

    root: str
    digest: str
    listing: Callable[[], Listing]


class Checked(NamedTuple):
    """What a picture turned out to be; `fault` says why it is none."""

    ext: str = ""
    width: int = 0
    height: int = 0
    crc32: int = 0
    fault: str = ""


# --- a folder ----------------------------------------------------------------------------------------------


def from_folder(root: Path) -> Source:
    """CLASS/picture.jpg, or the same below train/ and val/. Raises InputError: none of these is there."""
    if not root.is_dir():
        raise InputError(f"input {str(root)!r}: no such folder; {LAYOUT}")
    try:
        listing = _list_folder(root)
    except OSError as error:
        raise InputError(f"input {str(root)!r}: cannot be listed: {error}") from None
    marks = fingerprint((entry.origin, entry.path) for entry in listing.entries)
    return Source(str(root), marks, lambda: listing)


def _list_folder(root: Path) -> Listing:
    top = subfolders(root)
    given = all(s in top and subfolders(top[s]) for s in SPLITS)
    places = {s: top[s] for s in SPLITS} if given else {"": str(root)}
    folders = [(s, name, path) for s, p in places.items() for name, path in subfolders(p).items()]
    if not folders:
        raise InputError(f"input {str(root)!r}: no sub-folders, so no classes; {LAYOUT}")
    strays = [path for name, path in top.items() if given and name not in SPLITS]
    left_out = [_left_out(root, path, "a folder beside train and val") for path in strays]
    loose = [e for p in {str(root), *places.values()} for e in visible(p) if not os.path.isdir(e.path)]
    entries, ignored = [], len(loose)
    for split, name, path in folders:
        files, more, others = list_class(root, split, name, path)
        entries += files
        left_out += more
        ignored += others
    classes = sorted({text(name) for _, name, _ in folders})
    return Listing(given, classes, entries, left_out, ignored, lambda e: read_file(e.path))


def list_class(
    root: Path, split: str, name: str, place: str
) -> tuple[list[Entry], list[dict[str, str]], int]:
    """The pictures of a class folder by their endings, what is left out, and how many files are no pictures."""
    files, left_out, ignored = [], [], 0
    for entry in visible(place):
        if os.path.isdir(entry.path):
            left_out.append(_left_out(root, entry.path, "a folder inside a class folder"))
        elif not entry.name.lower().endswith(ENDINGS):
            ignored += 1
        else:
            origin = text(os.path.relpath(entry.path, root))
            files.append(Entry(split, text(name), origin, entry.path))
    return files, left_out, ignored


def visible(folder: str | Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)


def subfolders(folder: str | Path) -> dict[str, str]:
    """By name. A link to a folder is one, unless it leads back to where it lies."""
    here = Path(folder).resolve()
    paths = {e.name: e.path for e in visible(folder) if os.path.isdir(e.path)}
    return {name: path for name, path in paths.items() if not here.is_relative_to(Path(path).resolve())}


def fingerprint(files: Iterable[tuple[str, str]]) -> str:
    """16 hex digits that change with the files (name, path): by name, size and time of change."""
    marks = hashlib.sha256()
    for name, path in files:
        try:
            found = os.stat(path)
        except OSError:  # a dangling link: reading it will say so
            marks.update(f"{name}\0".encode())
        else:
            marks.update(f"{name}\0{found.st_size}\0{found.st_mtime_ns}\0".encode())
    return marks.hexdigest()[:16]


def text(name: str) -> str:
    """A file name as text that can be printed: bytes that are no UTF-8 become \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _left_out(root: Path, path: str, reason: str) -> dict[str, str]:
    return {"file": text(os.path.relpath(path, root)), "reason": reason}


def read_file(path: str) -> bytes:
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for ever
        raise PictureError("not a regular file")
    check_size(found.st_size)
    with open(path, "rb") as file:
        return file.read()


def check_size(size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise PictureError(f"{size} bytes are above {MAX_FILE_BYTES}")


# --- the digits --------------------------------------------------------------------------------------------


def from_digits(size: int) -> Source:
    """The 1,797 scans of scikit-learn, 8x8 with values 0..16, enlarged to gray PNGs."""
    return Source("digits", digest("digits"), lambda: _list_digits(size))


def _list_digits(size: int) -> Listing:
    from sklearn.datasets import load_digits

    scans, labels = load_digits(return_X_y=True)
    pixels = np.rint(scans.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)

    def read(entry: Entry) -> bytes:
        scan = Image.fromarray(pixels[entry.offset])
        return png(scan.resize((size, size), Image.Resampling.BICUBIC))

    entries = [Entry("", str(label), str(row), "", row) for row, label in enumerate(labels)]
    return Listing(False, [str(n) for n in range(10)], entries, [], 0, read)


def png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


# --- one picture -------------------------------------------------------------------------------------------


def check(listing: Listing, entry: Entry) -> Checked:
    """Decode a picture once. Raises InputFault where the disk, not the picture, is at fault."""
    try:
        data = listing.read(entry)
        height, width, _ = decode(data).shape
    except OSError as error:
        if _is_the_disks(error, entry):
            raise InputFault(error.errno, error.strerror, entry.path) from None
        return Checked(fault=error.strerror or str(error))
    except ValueError as error:
        return Checked(fault=str(error))
    ext = next(e for magic, e in MAGIC if data.startswith(magic))  # whatever the name says
    return Checked(ext, width, height, zlib.crc32(data))


def _is_the_disks(error: OSError, entry: Entry) -> bool:
    """What was listed and is gone: a file system that went away, unless it is a link that leads nowhere."""
    gone = error.errno == errno.ENOENT and not os.path.islink(entry.path)
    return gone or error.errno not in OWN_FAULTS


def read_again(listing: Listing, entry: Entry, crc32: int) -> bytes:
    """The bytes that were checked. Raises InputError: they are others by now."""
    try:
        data = listing.read(entry)
    except (OSError, PictureError) as error:
        if isinstance(error, OSError) and _is_the_disks(error, entry):
            raise InputFault(error.errno, error.strerror, entry.path) from None
        raise InputError(f"{entry.path!r}: was readable, and is no more: {error}") from None
    if zlib.crc32(data) != crc32:
        raise InputError(f"{entry.path!r}: changed while the shards were built; next: build again")
    return data


def shrink(pixels: Pixels, shorter_side: int, quality: int) -> tuple[bytes, int, int]:
    """A JPEG (4:4:4) whose shorter side is `shorter_side` pixels, by Pillow's Lanczos; its width and height."""
    height, width, _ = pixels.shape
    scale = shorter_side / min(width, height)
    size = (max(shorter_side, round(width * scale)), max(shorter_side, round(height * scale)))
    small = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))
    jpeg: bytes = simplejpeg.encode_jpeg(small, quality=quality, colorsubsampling="444", fastdct=False)
    return jpeg, *size


# --- classes and split -------------------------------------------------------------------------------------


def usable_classes(root: str, listing: Listing, good: Sequence[Entry]) -> tuple[list[str], list[str]]:
    """(classes with a train and a val sample, the others with the reason)."""
    counts = Counter((e.class_name, e.split) for e in good)
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
            f"input {root!r}: expected at least 2 classes with readable pictures, found "
            f"{len(classes)}; left out: {named(empty) or 'none'}; {LAYOUT}"
        )
    return classes, empty


def split_pictures(
    entries: Sequence[Entry], good: Iterable[int], classes: Sequence[str], *, val_fraction: float, seed: int
) -> dict[str, list[int]]:
    """Entries of train and val, by number, in an order that mixes the classes: a function of names and seed."""
    groups: dict[tuple[str, str], list[int]] = {}
    for i in good:
        groups.setdefault((entries[i].class_name, entries[i].split), []).append(i)
    splits: dict[str, list[int]] = {s: [] for s in SPLITS}
    for name in classes:
        for split in SPLITS:
            splits[split] += groups.get((name, split), [])
        members = groups.get((name, ""), [])
        if members:
            random.Random(f"{seed} split {name}").shuffle(members)
            held_out = min(max(1, round(len(members) * val_fraction)), len(members) - 1)
            splits["val"] += members[:held_out]
            splits["train"] += members[held_out:]
    for split, members in splits.items():
        random.Random(f"{seed} order {split}").shuffle(members)
    return splits
