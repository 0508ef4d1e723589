"""What goes into shards: the digits, or a folder of pictures, each looked at once; classes and split."""

import io
import os
import random
import stat
import zlib
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from pipeline.config import InputError, Name, Positive, Section, digest
from pipeline.decode import MAX_PIXELS, decode
from pipeline.manifest import SPLITS, Progress, named

ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
DIGITS_SIZE = 32
MAX_FILE_BYTES = 4 * MAX_PIXELS  # no picture that decode() takes is larger
LAYOUT = "expected CLASS/picture.jpg, or train/CLASS/picture.jpg and val/CLASS/picture.jpg"
MAGIC = ((b"\xff\xd8", "jpg"), (b"\x89PNG", "png"), (b"RIFF", "webp"))


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


class _File(NamedTuple):
    """A file that is a picture by its ending. `split` is "" where the split is still to be drawn."""

    split: str
    class_name: str
    path: str


class Listing(NamedTuple):
    """An input folder by name, size and time of change, before any picture is opened."""

    root: str
    given: bool  # the split, by the folders train/ and val/
    classes: list[str]
    files: list[_File]
    left_out: list[dict[str, str]]  # {"file", "reason"}
    ignored: int
    digest: str


class Picture(NamedTuple):
    """A picture proved readable; `source` is its path, or its bytes where it has none."""

    split: str
    class_name: str
    origin: str
    source: str | bytes
    ext: str
    width: int
    height: int
    crc32: int


DIGITS = Listing("digits", False, [str(n) for n in range(10)], [], [], 0, digest("digits"))


def list_input(config: ShardsConfig) -> Listing:
    return _list_folder(Path(os.path.expanduser(config.input))) if config.input else DIGITS


def _list_folder(root: Path) -> Listing:
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
    return Listing(str(root), given, classes, files, left_out, ignored, digest(marks))


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


def check_pictures(listing: Listing, progress: Progress) -> tuple[list[Picture], list[dict[str, str]]]:
    """Decode every picture once: (those that are pictures, those that are not)."""
    pictures, broken = [], []
    for done, file in enumerate(listing.files, 1):
        try:
            data = read_picture(file.path)
            image = decode(data)
        except (OSError, ValueError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
            broken.append(_left_out(listing.root, file.path, reason))
        else:
            ext = next(e for magic, e in MAGIC if data.startswith(magic))  # whatever the name says
            origin = _text(os.path.relpath(file.path, listing.root))
            pictures.append(
                Picture(file.split, file.class_name, origin, file.path, ext, *image.size, zlib.crc32(data))
            )
        progress(done, 2 * len(listing.files))
    return pictures, broken


def read_picture(path: str) -> bytes:
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for ever
        raise OSError("not a regular file")
    if found.st_size > MAX_FILE_BYTES:
        raise OSError(f"{found.st_size} bytes are above {MAX_FILE_BYTES}")
    with open(path, "rb") as file:
        return file.read()


def digits(size: int) -> list[Picture]:
    """The 1,797 scans of scikit-learn, 8x8 with values 0..16, enlarged to gray PNGs."""
    from sklearn.datasets import load_digits

    scans, labels = load_digits(return_X_y=True)
    pixels = np.rint(scans.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    pictures = []
    for number, (scan, label) in enumerate(zip(pixels, labels, strict=True)):
        png = io.BytesIO()
        Image.fromarray(scan).resize((size, size), Image.Resampling.BICUBIC).save(png, "PNG")
        data = png.getvalue()
        pictures.append(Picture("", str(label), str(number), data, "png", size, size, zlib.crc32(data)))
    return pictures


def usable_classes(listing: Listing, pictures: list[Picture]) -> tuple[list[str], list[str]]:
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
            f"{len(classes)}; left out: {named(empty) or 'none'}; {LAYOUT}"
        )
    return classes, empty


def split_pictures(
    pictures: list[Picture], classes: list[str], config: ShardsConfig
) -> dict[str, list[Picture]]:
    """Train and val, each in an order that mixes the classes: a function of settings and file names."""
    groups: dict[tuple[str, str], list[Picture]] = {}
    for picture in pictures:
        groups.setdefault((picture.class_name, picture.split), []).append(picture)
    splits: dict[str, list[Picture]] = {s: [] for s in SPLITS}
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
