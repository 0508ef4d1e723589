"""Shards that lie elsewhere: a bounded cache of whole shards on this machine, shared by its processes."""

import asyncio
import hashlib
import os
import random
import re
import time
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from pipeline.rundir import sync

SCHEMES = ("http", "https", "s3", "gs", "az", "abfs", "hf")  # of fsspec; `pipe:` and the like never
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "hf": "huggingface_hub"}

CACHE_GB = 100.0  # 10**9 bytes each
PAUSES_S = (1.0, 4.0, 16.0)  # before each new attempt
ANSWER_S = 60.0  # that a server may be silent
CHUNK = 1 << 20  # bytes
WAIT_S = 0.05  # between two looks for room, while others fetch

T = TypeVar("T")
Read = Callable[[int], bytes]  # at most so many bytes, b"" at the end


class RemoteError(OSError):
    """A shard that cannot be had. Its text names the URL, without what may be secret in it.

    `strerror` is the text without the next move, for a message that has one of its own.
    """

    def __init__(self, fault: str, move: str = "") -> None:
        super().__init__(f"{fault}; next: {move}" if move else fault)
        self.strerror = fault


class Unreachable(RemoteError):
    """No attempt got an answer: asking the same host for another shard would take as long."""


class _Passing(Exception):
    """A failure that may be over at the next attempt."""


class _Silent(_Passing):
    """One in which the server said nothing at all."""


def is_url(place: str) -> bool:
    """Whether a place is a URL that is read; a path is none."""
    scheme, mark, rest = place.partition("://")
    return bool(mark and rest) and scheme in SCHEMES and "::" not in rest


def shown(place: str) -> str:
    """A place for messages: of a URL without user, password and query, where signatures and tokens stand."""
    scheme, mark, rest = place.partition("://")
    if not is_url(place):
        return place
    host, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    return f"{scheme}{mark}{host.rpartition('@')[2]}{slash}{path}"


def host(url: str) -> str:
    """`https://example.org:80`, `s3://bucket`: whose silence concerns all shards there."""
    return "/".join(shown(url).split("/")[:3])


def open_cached(url: str, size: int, sha256: str) -> int:
    """A descriptor of a shard's copy on this machine, fetched first if it is not there; to be closed by you.

    The copy is `size` bytes and, unless `sha256` is "", has that digest. It stays readable when the cache
    drops it. The cache lies in $GSA_CACHE and holds $GSA_CACHE_GB. Raises RemoteError: not to be had after
    some attempts, other bytes than expected, no room.
    """
    if not is_url(url):
        raise RemoteError(f"{without_secrets(url)!r} is no URL that is read", f"one of {', '.join(SCHEMES)}")
    folder, path = cache_folder(), _path(url, size, sha256)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = _open(path, size)
        if found is not None:
            return found
        with FileLock(path.with_suffix(".lock")):  # of several processes one fetches
            found = _open(path, size)
            return _fetch(url, path, size, sha256) if found is None else found
    except RemoteError:
        raise
    except OSError as error:
        raise RemoteError(
            f"{shown(url)}: cannot be kept in {folder}: {error.strerror or error}",
            "make room there, or set GSA_CACHE to another folder",
        ) from None


def has_copy(url: str, size: int, sha256: str) -> bool:
    """Whether `open_cached` would find a shard's copy, and ask no server."""
    with suppress(OSError):
        return _path(url, size, sha256).stat().st_size == size
    return False


def discard(url: str, size: int, sha256: str) -> None:
    """Drop a copy that turned out to be damaged."""
    with suppress(OSError):
        _path(url, size, sha256).unlink()


def _path(url: str, size: int, sha256: str) -> Path:
    """Where a copy is kept: a shard that has changed is another file."""
    return cache_folder() / f"{hashlib.sha256(f'{url} {size} {sha256}'.encode()).hexdigest()}.tar"


def cache_folder() -> Path:
    """$GSA_CACHE, else gsa/shards in $XDG_CACHE_HOME, else in ~/.cache."""
    own = os.environ.get("GSA_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(own or os.path.join(base, "gsa", "shards")).absolute()


def bound() -> int:
    """Bytes that the cache may hold."""
    text = os.environ.get("GSA_CACHE_GB", str(CACHE_GB))
    try:
        most = int(float(text) * 1e9)
    except (ValueError, OverflowError):
        most = 0
    if most <= 0:
        raise RemoteError(
            f"GSA_CACHE_GB: expected a number above 0, got {text!r}", "set it to gigabytes, as in 100"
        )
    return most


def _open(path: Path, size: int) -> int | None:
    """The copy that is there already, if it is whole: it is now the one used last."""
    try:
        number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    if os.fstat(number).st_size != size:
        os.close(number)
        return None
    _touch(number)
    return number


def _touch(number: int) -> None:
    with suppress(PermissionError):  # a cache of another user: readable, its order is theirs
        os.utime(number)


def _fetch(url: str, path: Path, size: int, sha256: str) -> int:
    """Fetch, prove, rename; the caller holds the shard's lock."""
    part = path.with_suffix(".part")
    number = _reserve(url, part, size)
    try:
        got = with_stream(url, lambda read: _copy(url, read, number, size))
        if sha256 and got != sha256:
            raise RemoteError(
                f"{shown(url)}: expected sha256 {sha256[:16]}..., got {got[:16]}...",
                "index the set again (--replace), if the shard was changed on purpose",
            )
        os.fsync(number)  # the name says that the bytes are there, also after a power cut
        with _counting(path.parent):
            os.replace(part, path)
        sync(path.parent)
    except BaseException:
        os.close(number)
        part.unlink(missing_ok=True)
        raise
    return number


def _copy(url: str, read: Read, number: int, size: int) -> str:
    """The sha256 of all bytes, which lie in the file `number` then. Called again after a failure."""
    done, sha256 = 0, hashlib.sha256()
    while chunk := read(CHUNK):
        if done + len(chunk) > size:
            raise RemoteError(
                f"{shown(url)}: expected {size} bytes, got more", "index the set again (--replace)"
            )
        sha256.update(chunk)
        view = memoryview(chunk)
        while view:
            written = os.pwrite(number, view, done)
            done, view = done + written, view[written:]
    if done != size:
        raise _Passing(f"expected {size} bytes, got {done}")
    return sha256.hexdigest()


def _reserve(url: str, part: Path, size: int) -> int:
    """A descriptor of `part`, made anew with `size` bytes, so that all shards and parts together keep to the bound.

    What was used longest ago is dropped. What others are fetching cannot be: then this waits for them.
    """
    most = bound()
    if size > most:
        raise RemoteError(
            f"{shown(url)}: its {size} bytes are above the cache's bound of {most}", "raise GSA_CACHE_GB"
        )
    while True:
        with _counting(part.parent):
            if _make_room(part, most - size):
                number = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
                os.truncate(number, size)  # counted from now on, though nothing is written yet
                return number
        time.sleep(WAIT_S)


def _counting(folder: Path) -> FileLock:
    """Held by the one who counts: neither a new part nor a new name may come in between."""
    return FileLock(folder / "count.lock")


def _make_room(part: Path, room: int) -> bool:
    """Drop shards until all other files take at most `room` bytes; False if they still take more."""
    taken, shards = 0, []
    with os.scandir(part.parent) as entries:
        for entry in entries:
            if entry.name == part.name or not entry.name.endswith((".tar", ".part")):
                continue
            try:
                found = entry.stat()
            except FileNotFoundError:  # renamed or dropped just now
                continue
            if entry.name.endswith(".tar"):
                shards.append((found.st_mtime_ns, found.st_size, entry.path))
            elif _abandoned(Path(entry.path)):
                continue
            taken += found.st_size
    for _, size, path in sorted(shards):
        if taken <= room:
            break
        Path(path).unlink(missing_ok=True)  # who has it open reads on
        taken -= size
    return taken <= room


def _abandoned(part: Path) -> bool:
    """Whether the process that fetched it is gone; then it is deleted."""
    try:
        with FileLock(part.with_suffix(".lock"), timeout=0):
            part.unlink(missing_ok=True)
            return True
    except Timeout:
        return False


# --- the network -------------------------------------------------------------------------------------------


def with_stream(url: str, use: Callable[[Read], T]) -> T:
    """What `use` makes of the bytes at a URL, read once from the first to the last.

    When the network fails it is called again, with a new stream. Raises RemoteError (Unreachable: no answer)
    after the last attempt, or at once where another cannot help; what `use` raises itself passes through.
    """
    reason, kind = "", RemoteError
    for pause in (0.0, *PAUSES_S):
        # Jitter: not all ranks at once. From the system: no generator's state is touched.
        time.sleep(pause * random.SystemRandom().uniform(0.5, 1.5))
        try:
            with closing(_opened(url)) as file:
                return use(partial(_translated, url, file.read))
        except _Passing as failure:
            reason, kind = str(failure), Unreachable if isinstance(failure, _Silent) else RemoteError
    raise kind(
        f"{shown(url)}: {reason} ({1 + len(PAUSES_S)} attempts)", f"see whether {host(url)} can be reached"
    )


def _opened(url: str) -> Any:
    """A file of fsspec that is read forwards."""
    return _translated(url, _open_by_fsspec, url)


def _open_by_fsspec(url: str) -> Any:
    import fsspec

    if url.partition("://")[0] not in ("http", "https"):
        file_system, path = fsspec.url_to_fs(url)
        return file_system.open(path, "rb")
    from aiohttp import ClientTimeout

    # aiohttp's own limit is 5 minutes for all of a file. trust_env: proxies, and passwords from ~/.netrc
    timeout = ClientTimeout(total=None, sock_connect=ANSWER_S, sock_read=ANSWER_S)
    options = {"timeout": timeout, "trust_env": True}
    file_system, path = fsspec.url_to_fs(url, client_kwargs=options)
    # block_size 0: one GET for all. Any size would do: without one a HEAD comes first.
    return file_system.open(path, "rb", block_size=0, size=1)


def _translated(url: str, call: Callable[..., T], *arguments: Any) -> T:
    """`call(*arguments)`; whatever a file system's library raises becomes _Passing or RemoteError."""
    try:
        return call(*arguments)
    except ImportError:
        package = PACKAGES.get(url.partition("://")[0], "fsspec[http]")
        raise RemoteError(f"{shown(url)}: needs a package", f"pip install '{package}'") from None
    except Exception as error:  # each library has its own kinds
        kind, reason = _reason(error)
        if kind is RemoteError:
            raise RemoteError(
                f"{shown(url)}: {reason}", "see the URL, and the credentials of this machine"
            ) from None
        raise kind(reason) from None


def _reason(error: Exception) -> tuple[type[Exception], str]:
    """What becomes of it: a RemoteError, where another attempt is in vain; and why, without what may be secret."""
    from aiohttp import ClientConnectionError, ClientPayloadError, ClientResponseError, InvalidURL

    if isinstance(error, ClientResponseError):
        final = 400 <= error.status < 500 and error.status not in (408, 425, 429)
        return RemoteError if final else _Passing, f"HTTP {error.status} {error.message}"
    if isinstance(error, FileNotFoundError):
        return RemoteError, "not found"
    if isinstance(error, PermissionError):
        return RemoteError, f"no permission ({type(error).__name__})"
    if isinstance(error, InvalidURL):
        return RemoteError, "no valid URL"
    if isinstance(error, ClientPayloadError):
        return _Passing, "the answer broke off"
    if isinstance(error, asyncio.TimeoutError | TimeoutError):
        return _Silent, f"no answer for {ANSWER_S:.0f} s"
    name = type(error).__name__
    # Of botocore, EndpointConnectionError and the like are no OSErrors.
    silent = isinstance(error, OSError | ClientConnectionError) or "Connect" in name
    return _Silent if silent else _Passing, without_secrets(f"{name}: {' '.join(str(error).split())}")


def without_secrets(text: str) -> str:
    """A text whose URLs, of whatever scheme, have neither user, password nor query."""
    text = re.sub(r"(\w://)[^/\s'\"]*@", r"\1", text)
    return re.sub(r"(\w://[^\s?'\"]*)\?[^\s'\"]*", r"\1", text)
