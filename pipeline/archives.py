"""Official archives, read in place: ImageNet (ILSVRC2012) and CIFAR. Nothing is unpacked, nothing is executed."""

import errno
import io
import math
import os
import pickle
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from pipeline.config import InputError
from pipeline.decode import Pixels
from pipeline.manifest import Descriptor, named
from pipeline.pictures import (
    ENDINGS,
    Entry,
    Listing,
    Source,
    check_size,
    fingerprint,
    list_class,
    png,
    read_file,
    subfolders,
    text,
    visible,
)

T = TypeVar("T")

# --- ImageNet ----------------------------------------------------------------------------------------------

ARCHIVES = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}
DEVKIT = "ILSVRC2012_devkit_t12"
TRUTHS = ("imagenet_2012_validation_synset_labels.txt", "ILSVRC2012_validation_ground_truth.txt")
META = "meta.mat"
WNID = re.compile(r"n\d{8}")
VAL_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})\.\w+")
TAR_BLOCK = 512  # bytes


class _Found(NamedTuple):
    """The pictures of a split; where only the ground truth knows a wnid, class_name is "", origin a mere name."""

    pictures: list[Entry]
    left_out: list[dict[str, str]]
    ignored: int


def from_imagenet(root: Path) -> Source:
    """ILSVRC2012 as it is handed out, or unpacked; each split in either form.

    train: ILSVRC2012_img_train.tar with its inner .tar files, or train/WNID/*.JPEG.
    val: ILSVRC2012_img_val.tar or val/*.JPEG, both with a ground truth (a wnid a line, or the devkit's
    numbers and meta.mat); or val/WNID/*.JPEG. All forms make the same shards; an archive goes before a
    folder. Classes are sorted wnids.
    Raises InputError, at once or by listing: something is missing, cut short or contradicts the rest.
    """
    if not root.is_dir():
        raise InputError(
            f"input {str(root)!r}: no such folder; next: name the folder of the ImageNet archives"
        )
    places = {split: _place(root, split) for split in ARCHIVES}
    kits = [root / f"{DEVKIT}.tar.gz", *(f / name for f in _kit_folders(root) for name in (*TRUTHS, META))]
    with _reading(root):
        files = [*_files(places.values()), *(str(kit) for kit in kits)]
    marks = fingerprint((text(os.path.relpath(path, root)), path) for path in files)

    def listing() -> Listing:
        with _reading(root):
            return _list_imagenet(root, places)

    return Source(str(root), marks, listing)


def _place(root: Path, split: str) -> Path:
    for path, there in ((root / ARCHIVES[split], Path.is_file), (root / split, Path.is_dir)):
        if there(path):
            return path
    raise InputError(
        f"input {str(root)!r}: no ImageNet {split} split there: expected {ARCHIVES[split]} or {split}/; "
        "next: put the official archive there, or unpack it as torchvision and timm have it"
    )


def _kit_folders(root: Path) -> tuple[Path, ...]:
    return root, root / "data", root / DEVKIT / "data"


def _files(places: Iterable[Path]) -> Iterator[str]:
    """What the places hold: an archive, or pictures in a folder and its sub-folders."""
    for place in places:
        if place.is_file():
            yield str(place)
            continue
        for folder in (str(place), *subfolders(place).values()):
            yield from (e.path for e in visible(folder) if e.name.lower().endswith(ENDINGS))


def _list_imagenet(root: Path, places: dict[str, Path]) -> Listing:
    train, val = _list_train(root, places["train"]), _list_val(root, places["val"])
    classes = sorted({e.class_name for e in train.pictures})
    if not all(e.class_name for e in val.pictures):
        truth = _ground_truth(root, val, set(classes))
        val = val._replace(pictures=[_classed(e, truth[e.origin]) for e in val.pictures])
    entries = train.pictures + val.pictures
    lacking = sorted(set(classes) ^ {e.class_name for e in entries if e.split == "val"})
    if lacking:
        raise InputError(f"input {str(root)!r}: classes with pictures in one split only: {named(lacking)}")
    entries.sort(key=lambda e: e.origin)  # so that all forms make the same shards
    return Listing(
        True,
        classes,
        entries,
        train.left_out + val.left_out,
        train.ignored + val.ignored,
        _reader(path for path in places.values() if path.is_file()),
    )


def _classed(entry: Entry, wnid: str) -> Entry:
    """Named as in folders, whatever form it has."""
    return entry._replace(class_name=wnid, origin=f"{entry.split}/{wnid}/{entry.origin}")


def _reader(archives: Iterable[Path]) -> Callable[[Entry], bytes]:
    """Pictures of these archives by pread, which has no position, so threads share it; others as files."""
    opened = {str(path): Descriptor(os.open(path, os.O_RDONLY)) for path in archives}

    def read(entry: Entry) -> bytes:
        archive = opened.get(entry.path)
        if archive is None:
            return read_file(entry.path)
        check_size(entry.size)
        data = os.pread(archive.number, entry.size, entry.offset)
        if len(data) != entry.size:
            raise OSError(errno.EIO, f"expected {entry.size} bytes at {entry.offset}, got {len(data)}")
        return data

    return read


def _list_train(root: Path, place: Path) -> _Found:
    if place.is_dir():
        return _list_wnids(root, place)
    found = _Found([], [], 0)
    with _reading(place), open(place, "rb") as file:
        for inner in _members(file, str(place), 0, os.fstat(file.fileno()).st_size):
            wnid = PurePosixPath(inner.name).name.removesuffix(".tar")
            where = f"{place}, {text(inner.name)}"
            if not WNID.fullmatch(wnid) or not inner.isreg():
                found.left_out.append({"file": text(inner.name), "reason": "no WNID.tar"})
                continue
            end = inner.offset_data + inner.size
            before = len(found.pictures)
            members = _members(file, where, inner.offset_data, end)
            found = _sorted_out(found, Entry("train", wnid, "", str(place)), members)
            if len(found.pictures) == before:
                raise InputError(f"{where}: holds no pictures; next: fetch the archive again")
    return _not_empty(found, place, "WNID.tar with pictures")


def _list_val(root: Path, place: Path) -> _Found:
    if place.is_file():
        with _reading(place), open(place, "rb") as file:
            members = _members(file, str(place), 0, os.fstat(file.fileno()).st_size)
        found = _sorted_out(_Found([], [], 0), Entry("val", "", "", str(place)), members)
    elif any(WNID.fullmatch(name) for name in subfolders(place)):
        return _list_wnids(root, place)
    else:
        files, left_out, ignored = list_class(root, "val", "", str(place))
        found = _Found([e._replace(origin=_name(e)) for e in files], left_out, ignored)
    return _not_empty(found, place, "ILSVRC2012_val_00000001.JPEG ...")


def _list_wnids(root: Path, place: Path) -> _Found:
    found, ignored = _Found([], [], 0), sum(not os.path.isdir(e.path) for e in visible(place))
    for name, path in subfolders(place).items():
        if not WNID.fullmatch(name):
            found.left_out.append({"file": text(os.path.relpath(path, root)), "reason": "no wnid"})
            continue
        files, left_out, others = list_class(root, place.name, name, path)
        if not files:
            raise InputError(f"{path}: holds no pictures; next: unpack {name}.tar again")
        found.pictures.extend(files)
        found.left_out.extend(left_out)
        ignored += others
    return _not_empty(found._replace(ignored=ignored), place, "WNID/picture.JPEG")


def _name(entry: Entry) -> str:
    return text(os.path.basename(entry.path))


def _not_empty(found: _Found, place: Path, expected: str) -> _Found:
    if not found.pictures:
        raise InputError(f"{place}: no pictures; expected {expected}")
    return found


def _sorted_out(found: _Found, like: Entry, members: list[tarfile.TarInfo]) -> _Found:
    """`found` and the members of a .tar. Their names are words for people: nothing is ever unpacked."""
    ignored = found.ignored
    for member in members:
        name = text(PurePosixPath(member.name).name)
        if member.isdir():
            continue
        if not member.isreg() or member.issparse():
            found.left_out.append({"file": text(member.name), "reason": "not a regular file"})
        elif not name.lower().endswith(ENDINGS):
            ignored += 1
        else:
            entry = like._replace(origin=name, offset=member.offset_data, size=member.size)
            found.pictures.append(_classed(entry, like.class_name) if like.class_name else entry)
    return found._replace(ignored=ignored)


def _members(file: IO[bytes], where: str, start: int, end: int) -> list[tarfile.TarInfo]:
    """The members of a .tar that lies in a file from `start` to `end`, read from its headers alone.

    Raises InputError: cut short, damaged, or no .tar. tarfile takes any damaged header for the end.
    """
    file.seek(start)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            members, stop = tar.getmembers(), tar.offset
    except tarfile.TarError as error:
        raise InputError(f"{where}: cut short or no .tar ({error}); next: fetch it again") from None
    file.seek(stop)
    if stop + TAR_BLOCK > end or file.read(TAR_BLOCK) != bytes(TAR_BLOCK):
        raise InputError(f"{where}: cut short or damaged at byte {stop - start}; next: fetch it again")
    return members


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What an archive's reading can raise, as one line."""
    try:
        yield
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise InputError(
            f"{path}: cannot be read: {error}; next: make it readable, or fetch it again"
        ) from None


def _ground_truth(root: Path, val: _Found, classes: set[str]) -> dict[str, str]:
    """{name of a val picture: its wnid}"""
    where, wnids = _truth_lines(root)
    numbers = {e.origin: VAL_NUMBER.fullmatch(e.origin) for e in val.pictures}
    nameless = [name for name, number in numbers.items() if not number]
    if nameless:
        raise InputError(
            f"input {str(root)!r}: val: expected ILSVRC2012_val_NNNNNNNN.JPEG, got {nameless[0]!r}"
        )
    if len(wnids) != len(val.pictures):
        raise InputError(
            f"{where}: expected a line for each of the {len(val.pictures)} val pictures, got {len(wnids)}"
        )
    unknown = sorted(set(wnids) - classes)
    if unknown:
        raise InputError(f"{where}: wnids without train pictures: {named(unknown)}")
    lines = dict(enumerate(wnids, 1))
    truth = {name: lines.pop(int(number[1]), "") for name, number in numbers.items() if number}
    if lines:
        raise InputError(f"{where}: line {min(lines)} is of a val picture that is not there")
    return truth


def _truth_lines(root: Path) -> tuple[str, list[str]]:
    """(where the ground truth was found, a wnid for each val picture)"""
    found = next((f for f in (_find(root, name) for name in TRUTHS) if f), None)
    if not found:
        raise InputError(
            f"input {str(root)!r}: val pictures have no classes without the ground truth: expected "
            f"{DEVKIT}.tar.gz or {' or '.join(TRUTHS)}; next: put one of them there"
        )
    where, data = found
    lines = [line.strip() for line in data.decode("ascii", "replace").splitlines()]
    if all(WNID.fullmatch(line) for line in lines):
        return where, lines
    for number, line in enumerate(lines, 1):
        if not re.fullmatch(r"[0-9]{1,9}", line):
            raise InputError(
                f"{where}, line {number}: expected a wnid or the number of one, got {line[:40]!r}"
            )
    meta = _find(root, META)
    if not meta:
        raise InputError(
            f"{where}: has numbers, and there is no {META} that tells their wnids; "
            f"next: put {DEVKIT}.tar.gz or its {META} there"
        )
    wnids = _wnids(*meta)
    unknown = [line for line in lines if int(line) not in wnids]
    if unknown:
        raise InputError(f"{where}: numbers that {meta[0]} does not know: {named(unknown)}")
    return where, [wnids[int(line)] for line in lines]


def _find(root: Path, name: str) -> tuple[str, bytes] | None:
    """A file of the devkit, packed or not: (where, its bytes)."""
    for folder in _kit_folders(root):
        path = folder / name
        if path.is_file():
            with _reading(path):
                return str(path), path.read_bytes()
    kit = root / f"{DEVKIT}.tar.gz"
    if kit.is_file():
        with _reading(kit), tarfile.open(kit, "r:gz") as tar:
            for member in tar:
                if member.name == f"{DEVKIT}/data/{name}" and (file := tar.extractfile(member)):
                    return f"{kit}, {member.name}", file.read()
    return None


def _wnids(where: str, mat: bytes) -> dict[int, str]:
    """{ILSVRC id: wnid} of a meta.mat."""
    from scipy.io import loadmat

    try:
        synsets = loadmat(io.BytesIO(mat), squeeze_me=True)["synsets"]
        return {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in np.atleast_1d(synsets)}
    except Exception as error:  # whatever a parser of foreign bytes may raise
        raise InputError(
            f"{where}: no {META} of ILSVRC2012: {error!r}; next: fetch the devkit again"
        ) from None


# --- CIFAR -------------------------------------------------------------------------------------------------

CIFAR_SHAPE = (3, 32, 32)
MAX_MEMBER_BYTES = 400_000_000  # the largest true one has 155 million


class _Cifar(NamedTuple):
    archive: str
    folder: str
    batches: dict[str, str]  # name of a batch: its split
    labels: bytes
    meta: str
    class_names: bytes


CIFAR = {
    "cifar10": _Cifar(
        "cifar-10-python.tar.gz",
        "cifar-10-batches-py",
        {**{f"data_batch_{n}": "train" for n in range(1, 6)}, "test_batch": "val"},
        b"labels",
        "batches.meta",
        b"label_names",
    ),
    "cifar100": _Cifar(
        "cifar-100-python.tar.gz",
        "cifar-100-python",
        {"train": "train", "test": "val"},
        b"fine_labels",
        "meta",
        b"fine_label_names",
    ),
}


class _Inert:
    """Stands for numpy's array and dtype: it keeps what it is given and does nothing."""

    def __init__(self, *given: Any) -> None:
        self.given: Any = given
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


ARRAY_NAMES = (  # how numpy's arrays have been pickled over the years
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
)


class _Unpickler(pickle._Unpickler):
    """Lists, dicts, text and numbers; arrays as _Inert. Any other name is refused: it could run code.

    The one written in Python: that in C makes room for 2**32 values where a damaged byte says so.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ARRAY_NAMES:
            return _Inert
        raise InputError(f"expected arrays and lists, got a pickle that wants {module}.{name}: refused")


def from_cifar(name: str, path: Path) -> Source:
    """The official python archive, or the folder that holds it. The split is the official one.

    Raises InputError, at once or by listing: not there, cut short, or no such archive.
    """
    kind = CIFAR[name]
    archive = path / kind.archive if path.is_dir() else path
    if not archive.is_file():
        raise InputError(f"input {str(path)!r}: expected {kind.archive} there; next: fetch it")
    marks = fingerprint([(kind.archive, str(archive))])
    return Source(str(archive), marks, lambda: _list_cifar(kind, archive))


def _list_cifar(kind: _Cifar, archive: Path) -> Listing:
    found = _unpickled(kind, archive)
    names = found[kind.meta].get(kind.class_names)
    if not isinstance(names, list) or not all(isinstance(n, bytes) for n in names):
        raise InputError(f"{archive}, {kind.meta}: expected a list of names as {kind.class_names!r}")
    classes = [n.decode("utf-8", "backslashreplace") for n in names]
    entries: list[Entry] = []
    images = []
    for batch, split in kind.batches.items():
        pixels, labels, files = _batch(f"{archive}, {batch}", found.pop(batch), kind.labels, len(classes))
        for row, (label, file) in enumerate(zip(labels, files, strict=True), len(entries)):
            origin = f"{batch}/{file.decode('utf-8', 'backslashreplace')}"
            entries.append(Entry(split, classes[label], origin, str(archive), row))
        images.append(pixels)
    rows = np.concatenate(images)

    def read(entry: Entry) -> bytes:
        return png(Image.fromarray(np.ascontiguousarray(rows[entry.offset].transpose(1, 2, 0))))

    return Listing(True, classes, entries, [], 0, read)


def _unpickled(kind: _Cifar, archive: Path) -> dict[str, dict[Any, Any]]:
    """{name of a batch, or of the meta file: its dict}"""
    wanted = {f"{kind.folder}/{name}": name for name in (*kind.batches, kind.meta)}
    found = {}
    with _reading(archive), tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            name = wanted.get(member.name)
            if name is None or not (file := tar.extractfile(member)):
                continue
            if member.size > MAX_MEMBER_BYTES:
                raise InputError(f"{archive}, {name}: {member.size} bytes are above {MAX_MEMBER_BYTES}")
            found[name] = _load(f"{archive}, {name}", file.read())
    lacking = [member for member, name in wanted.items() if name not in found]
    if lacking:
        raise InputError(f"{archive}: expected {named(lacking)} in it; next: fetch {kind.archive} again")
    return found


def _load(where: str, data: bytes) -> dict[Any, Any]:
    try:
        values = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    except Exception as error:  # damaged pickles raise nearly anything
        raise InputError(f"{where}: no pickle of CIFAR: {error!r}; next: fetch the archive again") from None
    if not isinstance(values, dict):
        raise InputError(f"{where}: expected a dict, got {type(values).__name__}")
    return values


def _batch(
    where: str, values: dict[Any, Any], labels_key: bytes, classes: int
) -> tuple[Pixels, list[int], list[bytes]]:
    """(pixels (N, 3, 32, 32), labels, file names) of a batch."""
    labels, files = _list_of(values.get(labels_key), int), _list_of(values.get(b"filenames"), bytes)
    if labels is None or not all(0 <= label < classes for label in labels):
        raise InputError(f"{where}: expected {labels_key!r}, a list of numbers below {classes}")
    if files is None or len(files) != len(labels):
        raise InputError(f"{where}: expected b'filenames', a list of {len(labels)} names")
    raw, expected = _raw_bytes(values.get(b"data")), len(labels) * math.prod(CIFAR_SHAPE)
    if raw is None or len(raw) != expected:
        got = "none" if raw is None else len(raw)
        raise InputError(f"{where}: expected b'data', an array of {expected} bytes, got {got}")
    return np.frombuffer(raw, np.uint8).reshape(-1, *CIFAR_SHAPE), labels, files


def _list_of(values: Any, kind: type[T]) -> list[T] | None:
    return values if isinstance(values, list) and all(type(value) is kind for value in values) else None


def _raw_bytes(array: Any) -> bytes | None:
    """The bytes of a pickled array of uint8 in the order of C, or None if it is no such thing."""
    match array:
        case _Inert(state=(_, (_, 3072), _Inert(given=(b"u1" | "u1", *_)), False | 0, bytes(raw))):
            return raw
    return None
