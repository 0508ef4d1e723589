"""Read one foreign tar to its very end: samples by key, and whatever is missing, odd or damaged in it."""

import hashlib
import io
import json
import re
import tarfile
import zlib
from collections.abc import Iterator
from typing import IO, Any, NamedTuple, cast

from PIL import Image

from pipeline.decode import FORMATS, MAX_FILE_BYTES, MAX_PIXELS
from pipeline.remote import Read, RemoteError, Unreachable, is_url, shown, with_stream

PICTURES = ("jpg", "jpeg", "png", "webp")  # a member's ending, in any case
MAX_CLASSES = 1_000_000
MAX_NAME = 1024  # characters
MAX_HEADER_BYTES = 1 << 20  # PAX: names and the like
MAX_LABEL_BYTES = 1 << 20  # a .json may hold more than the label
CHUNK = 1 << 20

# As webdataset has it: the key ends before the first dot of the file's name.
MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)
# Control characters, line and paragraph separators, changes of direction, bytes that are no UTF-8.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
KINDS = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
}
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"(\xb5/\xfd")  # gzip, bzip2, xz, zstd
# What the standard library's parser raises at bytes that are no archive.
DAMAGE = (tarfile.TarError, ValueError, ArithmeticError, LookupError, TypeError, RecursionError)


class Sample(NamedTuple):
    """A picture and its label; what only the bytes tell is None where headers alone were read."""

    key: str
    label: int | str
    ext: str
    offset: int
    size: int
    crc32: int | None
    width: int | None
    height: int | None


class Scan(NamedTuple):
    """What is in a tar; or its fault, then all else is empty."""

    bytes: int
    sha256: str
    samples: list[Sample]
    broken: list[dict[str, str]]  # {"file", "reason"}
    ignored: int  # members that are neither picture nor label
    fault: str = ""


class _Damaged(Exception):
    """Why a file is no whole .tar archive."""


class _Fault(Exception):
    """What is wrong with one member."""


def scan(place: str, *, label_field: str | None, checksums: bool) -> Scan:
    """Read a tar, local or remote. Nothing of it is ever written, unpickled, or taken for a path.

    Raises Unreachable: its host does not answer.
    """
    try:
        if is_url(place):
            return with_stream(place, lambda read: _scan_tape(_Tape(read), place, label_field, True))
        with open(place, "rb") as file:
            tape = _Tape(file.read, None if checksums else file)
            return _scan_tape(tape, place, label_field, checksums)
    except _Damaged as fault:
        return _failed(f"{shown(place)}: {fault}")
    except Unreachable:
        raise
    except RemoteError as error:
        return _failed(str(error.strerror))
    except OSError as error:
        return _failed(f"{place}: cannot be read: {error.strerror or error}")


def _failed(fault: str) -> Scan:
    return Scan(0, "", [], [], 0, fault)


class _Tape:
    """A file that is read forwards; what tarfile skips is read and hashed too, unless the file can seek."""

    def __init__(self, read: Read, seekable: IO[bytes] | None = None) -> None:
        self._read, self._seekable = read, seekable
        self._sha256 = hashlib.sha256()
        self._position = 0
        self.last = b""  # what tarfile read last: at the end, the block where the archive ends
        self.ended = False  # fewer bytes were there than asked for

    @property
    def sha256(self) -> str:
        """Of all bytes; "" where some were skipped."""
        return "" if self._seekable else self._sha256.hexdigest()

    def tell(self) -> int:
        return self._position

    def read(self, size: int) -> bytes:
        """For tarfile, which reads headers alone."""
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        self.last = self.take(size)
        return self.last

    def seek(self, position: int) -> None:
        if position < self._position:
            raise tarfile.ReadError("a member that ends before it begins")
        if self._seekable:
            self._position = self._seekable.seek(position)
        while self._position < position and self.take(min(CHUNK, position - self._position)):
            pass

    def take(self, size: int) -> bytes:
        """`size` bytes, or fewer at the end of the file."""
        parts, rest = [], size
        while rest and (part := self._read(rest)):
            parts.append(part)
            rest -= len(part)
        self.ended = rest > 0
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        self._position += len(data)
        if not self._seekable:
            self._sha256.update(data)
        return data


def _scan_tape(tape: _Tape, place: str, label_field: str | None, checksums: bool) -> Scan:
    """Raises _Damaged if any byte is missing or any header is not whole."""
    groups: dict[str, _Group] = {}
    broken: list[dict[str, str]] = []
    ignored = 0
    for member in _members(tape):
        name = MEMBER.fullmatch(member.name)
        ending = name[2].lower() if name else ""
        wanted = ending in PICTURES or ending == ("json" if label_field else "cls")
        if odd(member.name):
            broken.append(left_out(place, repr(member.name[:80]), "a member's name that cannot be printed"))
        elif name and wanted:
            _add(groups.setdefault(name[1], _Group([], [])), tape, member, ending, label_field, checksums)
        elif not member.isreg() and not member.isdir():
            broken.append(left_out(place, member.name, _kind(member)))
        else:
            ignored += member.isreg()
    samples = []
    for key, group in groups.items():
        try:
            samples.append(_sample(key, group, "json" if label_field else "cls"))
        except _Fault as fault:
            broken.append(left_out(place, key, str(fault)))
    if not groups:
        raise _Damaged(f"no sample in it: expected {', '.join(PICTURES)} and their labels")
    return Scan(tape.tell(), tape.sha256, samples, broken, ignored)


def _members(tape: _Tape) -> Iterator[tarfile.TarInfo]:
    """The members of an archive that is whole, to its very end: tarfile alone takes a bad header for the end."""
    tar: tarfile.TarFile | None = None
    while True:
        try:
            if tar is None:  # reads the first header
                # Not the locale's encoding.
                tar = tarfile.TarFile(
                    fileobj=cast(IO[bytes], tape), encoding="utf-8", errors="surrogateescape"
                )
            member = tar.next()
        except DAMAGE as error:
            if tar is None and tape.last.startswith(COMPRESSED):
                raise _Damaged("compressed: expected a plain .tar, whose members have places") from None
            if tape.ended:
                raise _Damaged(f"cut short: it ends at byte {tape.tell()}") from None
            raise _Damaged(f"damaged header before byte {tape.tell()}: {error}") from None
        if member is None:
            break
        yield member
    _check_end(tape)


def _check_end(tape: _Tape) -> None:
    """Two blocks of zeros end an archive, nothing but zeros follows, in whole blocks."""
    where = tape.tell() - len(tape.last)
    if tape.ended:
        raise _Damaged(f"cut short: it ends at byte {tape.tell()}, without an end of the archive")
    if tape.last.strip(b"\0"):
        raise _Damaged(f"damaged header at byte {where}")
    while chunk := tape.take(CHUNK):
        if chunk.strip(b"\0"):
            raise _Damaged(f"damaged: the archive ends at byte {where}, but more than zeros follow")
    zeros = tape.tell() - where
    if zeros < 2 * tarfile.BLOCKSIZE or zeros % tarfile.BLOCKSIZE:
        raise _Damaged(f"cut short: it ends at byte {tape.tell()}, inside of the end of the archive")


_Picture = tuple[str, int, int, int | None, int | None, int | None]  # a Sample from `ext` on


class _Group(NamedTuple):
    """The members of a key that count, wherever in the tar they stand."""

    pictures: list[_Picture | _Fault]
    labels: list[int | str | _Fault]


def _add(
    group: _Group, tape: _Tape, member: tarfile.TarInfo, ending: str, label_field: str | None, checksums: bool
) -> None:
    """Read a member as far as needed. Its faults wait until the sample is whole."""
    try:
        if ending in PICTURES:
            group.pictures.append(_picture(tape, member, ending, checksums))
        else:
            _check_member(member, MAX_LABEL_BYTES)
            group.labels.append(_label(_whole(tape, member), label_field))
    except _Fault as fault:
        faults: list[Any] = group.pictures if ending in PICTURES else group.labels
        faults.append(fault)


def _picture(tape: _Tape, member: tarfile.TarInfo, ending: str, checksums: bool) -> _Picture:
    _check_member(member, MAX_FILE_BYTES)
    facts = _facts(_whole(tape, member)) if checksums else (None, None, None)
    return (ending, member.offset_data, member.size, *facts)


def _check_member(member: tarfile.TarInfo, most: int) -> None:
    if not member.isreg() or member.issparse():
        raise _Fault(f"{member.name} is {_kind(member)}")
    if not 0 < member.size <= most:
        raise _Fault(f"{member.name} has {member.size} bytes, expected 1 to {most}")


def _kind(member: tarfile.TarInfo) -> str:
    return "a sparse file" if member.issparse() else KINDS.get(member.type, f"of type {member.type!r}")


def _whole(tape: _Tape, member: tarfile.TarInfo) -> bytes:
    data = tape.take(member.size)
    if tape.ended:
        raise _Damaged(f"cut short: it ends at byte {tape.tell()}, inside of {member.name}")
    return data


def _facts(data: bytes) -> tuple[int, int, int]:
    """crc32, width and height of a picture, the latter two from its own header."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise _Fault(f"no {', '.join(FORMATS)} image that can be read") from None
    if width * height > MAX_PIXELS:
        raise _Fault(f"{width}x{height} is above {MAX_PIXELS} pixels")
    return zlib.crc32(data), width, height


def _label(data: bytes, field: str | None) -> int | str:
    """The class's number or, from JSON alone, its name."""
    if field is None:
        text = data.strip()
        if not re.fullmatch(rb"\d{1,9}", text):
            raise _Fault(f"label {text[:20].decode('ascii', 'backslashreplace')!r} is no class number")
        return _number(int(text))
    try:
        label = json.loads(data)[field]
    except (ValueError, TypeError, LookupError, RecursionError):
        raise _Fault(f"no field {field!r} in its .json") from None
    if isinstance(label, str) and label and not odd(label):
        return label
    if isinstance(label, int) and not isinstance(label, bool):
        return _number(label)
    raise _Fault(f"label {repr(label)[:40]} is no class number and no class name")


def _number(label: int) -> int:
    if not 0 <= label < MAX_CLASSES:
        raise _Fault(f"label {label} is not within 0..{MAX_CLASSES - 1}")
    return label


def odd(name: str) -> bool:
    """Whether a name is too long to print, or moves the cursor, or is no text at all."""
    return len(name) > MAX_NAME or UNPRINTABLE.search(name) is not None


def left_out(place: str, name: str, reason: str) -> dict[str, str]:
    return {"file": f"{shown(place)}, {name}", "reason": reason}


def _sample(key: str, group: _Group, label_ending: str) -> Sample:
    """Raises _Fault unless there is one picture and one label, both as they should be."""
    for count, what in ((len(group.pictures), "picture"), (len(group.labels), f".{label_ending} member")):
        if count != 1:
            raise _Fault(f"expected one {what}, got {count or 'none'}")
    (picture,), (label,) = group
    for part in (picture, label):
        if isinstance(part, _Fault):
            raise part
    assert not isinstance(picture, _Fault) and not isinstance(label, _Fault)
    return Sample(key, label, *picture)
