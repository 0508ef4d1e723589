"""The rows of a manifest in a file that all processes of a machine map: its memory is theirs together."""

import logging
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pyarrow as pa
from filelock import FileLock

from pipeline.remote import cache_folder
from pipeline.rundir import write_atomic

log = logging.getLogger("gsa")

MAX_KEPT = 8  # files, of the manifests that were opened last
WAIT_S = 60.0  # for the process that writes the file
CRC32_BYTES = 4  # behind the rows


def mapped_rows(key: str, parse: Callable[[], pa.Table]) -> pa.Table:
    """The rows that `parse` makes, each column in one piece that lies in the file of that key.

    `key` says which rows these are, in letters that a file name may have. Of several processes one parses and
    writes; it has the file from then on too. Without a file that can be written and proved, the rows are as parsed.
    """
    path = cache_folder() / "manifests" / f"{key}.arrow"
    rows = _map(path)
    if rows is None:
        with _alone(path.parent):
            rows = _map(path)
            if rows is None:
                rows = _kept(path, parse())
    return rows


def _map(path: Path) -> pa.Table | None:
    """The rows in a file, if it is there and every byte of it proved. It may be dropped while it is mapped."""
    try:
        # As bytes: any name will do. Never through a Python file or mmap: see manifest._parquet.
        with pa.memory_map(os.fsencode(path)) as file:
            content = file.read_buffer()
        end = len(content) - CRC32_BYTES
        if _crc32(path, content[:end]) != content[end:].to_pybytes():
            return None
        rows = pa.ipc.open_stream(content).read_all()
    except (OSError, ValueError, pa.ArrowException):
        return None
    with suppress(OSError):  # on a disk that is only read, nothing is dropped
        os.utime(path)
    return rows


def _kept(path: Path, rows: pa.Table) -> pa.Table:
    """The rows in the file, written now; if that fails, as they are."""
    memory = pa.BufferOutputStream()
    with pa.ipc.new_stream(memory, rows.schema) as stream:
        stream.write_table(rows.unify_dictionaries().combine_chunks())
    content = memory.getvalue()
    try:
        _drop_oldest(path.parent)
        write_atomic(path, b"".join((content, _crc32(path, content))))
    except OSError as error:
        log.warning(
            "manifest_not_shared folder=%s: %s; each process holds it; next: make room there, or set GSA_CACHE",
            path.parent,
            error.strerror or error,
        )
        return rows
    found = _map(path)
    return rows if found is None else found


def _crc32(path: Path, content: pa.Buffer) -> bytes:
    """Of the name too: the file of another manifest is none of this. 37 ms for ImageNet's; sha256 takes 55."""
    return zlib.crc32(content, zlib.crc32(path.name.encode())).to_bytes(CRC32_BYTES, "big")


def _drop_oldest(folder: Path) -> None:
    """Leave room for one more, whatever else lies there: temporary files of the killed count too."""
    files = [p for p in folder.iterdir() if p.name != "lock"]
    for path in sorted(files, key=lambda p: p.stat().st_mtime_ns, reverse=True)[MAX_KEPT - 1 :]:
        path.unlink(missing_ok=True)  # who has it mapped reads on


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process after the other; all at once where no lock can be had in time, which costs only work."""
    with ExitStack() as stack:
        with suppress(OSError, NotImplementedError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            stack.enter_context(FileLock(folder / "lock", timeout=WAIT_S))
        yield
