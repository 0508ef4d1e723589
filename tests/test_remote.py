"""The cache of remote shards: fetched once, whole or not at all, within its bound, for many processes."""

import errno
import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tars import write_set
from web import Web, serve

from pipeline import manifest as manifests
from pipeline import plan, remote, verbs
from pipeline.config import InputError, Resources
from pipeline.data import train_loader
from pipeline.manifest import Manifest, ShardError, read_manifest, read_sample, write_manifest
from pipeline.remote import RemoteError, cache_folder, is_url, open_cached, shown
from pipeline.rundir import Out
from pipeline.verify import verify

SIZE = 50_000  # bytes of each shard here


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GSA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GSA_CACHE_GB", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(remote, "PAUSES_S", (0.01, 0.01))
    return tmp_path / "cache"


@pytest.fixture
def web() -> Iterator[Web]:
    with serve() as web:
        yield web


def noise(number: int, size: int = SIZE) -> bytes:
    return np.random.default_rng(number).bytes(size)


def fetch(url: str, data: bytes, *, sha256: bool = True) -> bytes:
    """What open_cached gives, where `data` is expected."""
    number = open_cached(url, len(data), hashlib.sha256(data).hexdigest() if sha256 else "")
    try:
        return os.pread(number, len(data) + 1, 0)
    finally:
        os.close(number)


def kept(cache: Path) -> list[Path]:
    return sorted(p for p in cache.iterdir() if p.suffix in (".tar", ".part"))


FETCHER = """
import hashlib, os, random, sys
from pipeline.remote import open_cached
address, seed, *shards = sys.argv[1:]
random.Random(seed).shuffle(shards)
sys.stdin.readline()
for shard in shards:
    name, size, sha256 = shard.split(":")
    number = open_cached(f"{address}/{name}", int(size), sha256)
    assert hashlib.sha256(os.pread(number, int(size) + 1, 0)).hexdigest() == sha256, name
    os.close(number)
print("done")
"""


def start(web: Web, seed: int) -> "subprocess.Popen[str]":
    """A process that fetches all files in an order of its own once a line comes in."""
    shards = [f"{n[1:]}:{len(d)}:{hashlib.sha256(d).hexdigest()}" for n, d in web.files.items()]
    command = [sys.executable, "-c", FETCHER, web.address, str(seed), *shards]
    return subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def finish(processes: "list[subprocess.Popen[str]]") -> list[str]:
    for process in processes:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    return [process.communicate(timeout=60)[0].strip() for process in processes]


# --- fetched once, and right -------------------------------------------------------------------------------


def test_a_shard_is_fetched_once_and_kept(web: Web, cache: Path) -> None:
    url, data = web.put("a.tar", noise(1)), noise(1)
    assert fetch(url, data) == data
    assert fetch(url, data) == data
    assert web.gets["/a.tar"] == 1
    assert [p.stat().st_size for p in kept(cache)] == [SIZE]
    assert (cache.stat().st_mode & 0o777, kept(cache)[0].stat().st_mode & 0o777) == (0o700, 0o600)


def test_a_changed_shard_is_another_file(web: Web) -> None:
    url = web.put("a.tar", noise(1))
    fetch(url, noise(1))
    web.put("a.tar", noise(2))
    assert fetch(url, noise(2)) == noise(2)


def test_a_copy_of_the_wrong_size_is_fetched_again(web: Web, cache: Path) -> None:
    url, data = web.put("a.tar", noise(1)), noise(1)
    fetch(url, data)
    os.truncate(kept(cache)[0], 100)
    assert fetch(url, data) == data
    assert web.gets["/a.tar"] == 2


def test_processes_that_ask_at_once_fetch_once(web: Web, cache: Path) -> None:
    for n in range(2):
        web.put(f"{n}.tar", noise(n))
    web.pause_s = 0.01
    assert finish([start(web, seed) for seed in range(4)]) == ["done"] * 4
    assert set(web.gets.values()) == {1}
    assert [p.suffix for p in kept(cache)] == [".tar"] * 2


@pytest.mark.parametrize("trouble", ["failures", "cuts"])
def test_a_passing_failure_is_tried_again(web: Web, trouble: str) -> None:
    url, data = web.put("a.tar", noise(1)), noise(1)
    setattr(web, trouble, 2)
    assert fetch(url, data) == data
    assert web.gets["/a.tar"] == 3


# --- its bound ---------------------------------------------------------------------------------------------


def test_the_shard_used_longest_ago_is_dropped(
    web: Web, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GSA_CACHE_GB", str(2.5 * SIZE / 1e9))
    urls = [web.put(f"{n}.tar", noise(n)) for n in range(3)]
    for n in (0, 1, 0, 2, 0):  # 1 is dropped for 2
        fetch(urls[n], noise(n))
        time.sleep(0.01)  # the clock of a file system is coarse
    assert [web.gets[f"/{n}.tar"] for n in range(3)] == [1, 1, 1]
    fetch(urls[1], noise(1))
    assert web.gets["/1.tar"] == 2
    assert len(kept(cache)) == 2


def test_a_dropped_shard_stays_readable_where_it_is_open(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GSA_CACHE_GB", str(SIZE / 1e9))
    number = open_cached(web.put("0.tar", noise(0)), SIZE, "")
    fetch(web.put("1.tar", noise(1)), noise(1))
    assert os.pread(number, SIZE, 0) == noise(0)
    os.close(number)


def test_many_processes_keep_to_the_bound(web: Web, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GSA_CACHE_GB", str(2.2 * SIZE / 1e9))
    for n in range(6):
        web.put(f"{n}.tar", noise(n))
    web.pause_s = 0.002
    processes = [start(web, seed) for seed in range(4)]
    for process in processes:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    most = 0
    while any(process.poll() is None for process in processes):
        most = max(most, sum(sizes(cache)))
        time.sleep(0.005)
    assert [process.communicate()[0].strip() for process in processes] == ["done"] * 4
    assert 0 < most <= 2.2 * SIZE


def sizes(cache: Path) -> Iterator[int]:
    for path in cache.glob("*"):
        with suppress(FileNotFoundError):
            yield path.stat().st_size if path.suffix in (".tar", ".part") else 0


def test_a_killed_fetch_leaves_nothing_that_is_taken_for_a_shard(web: Web, cache: Path) -> None:
    url = web.put("a.tar", noise(1))
    web.pause_s = 0.2
    process = start(web, 0)
    assert process.stdin
    process.stdin.write("go\n")
    process.stdin.flush()
    while not (cache.is_dir() and kept(cache)) or web.gets["/a.tar"] == 0:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert [p.suffix for p in kept(cache)] == [".part"]
    web.pause_s = 0
    fetch(web.put("b.tar", noise(2)), noise(2))  # clears what the killed process left
    assert [p.suffix for p in kept(cache)] == [".tar"]
    assert fetch(url, noise(1)) == noise(1)


# --- what cannot be had ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("serves", "sha256", "message"),
    [
        (noise(1, SIZE + 1), False, f"expected {SIZE} bytes, got more"),
        (noise(1, SIZE - 1), False, f"expected {SIZE} bytes, got {SIZE - 1} (3 attempts)"),
        (noise(2), True, "expected sha256"),
        (None, False, "not found"),
    ],
)
def test_other_bytes_than_expected_are_an_error(
    web: Web, cache: Path, serves: bytes | None, sha256: bool, message: str
) -> None:
    url = web.put("a.tar", serves) if serves else web.url("a.tar")
    with pytest.raises(RemoteError) as caught:
        fetch(url, noise(1), sha256=sha256)
    assert message in str(caught.value)
    assert url in str(caught.value)
    assert kept(cache) == []


def test_a_server_that_fails_always_is_named(web: Web) -> None:
    web.failures = 99
    with pytest.raises(RemoteError, match=r"a\.tar: HTTP 503 .* \(3 attempts\); next: "):
        fetch(web.put("a.tar", noise(1)), noise(1))


def test_a_server_that_is_not_there_is_named() -> None:
    with pytest.raises(RemoteError, match=r"http://127\.0\.0\.1:1/a\.tar: .*127\.0\.0\.1:1.*3 attempts"):
        open_cached("http://127.0.0.1:1/a.tar", 1, "")


def test_credentials_are_never_shown(web: Web) -> None:
    secret = f"{web.address.replace('//', '//me:hunter2@')}/a.tar?token=hunter2"
    assert shown(secret) == f"{web.address}/a.tar"
    for failures in (0, 99):  # 404, 503
        web.failures = failures
        with pytest.raises(RemoteError) as caught:
            open_cached(secret, 1, "")
        assert "hunter2" not in str(caught.value)
    with pytest.raises(RemoteError) as caught:
        open_cached("http://me:hunter2@127.0.0.1:1/a.tar?token=hunter2", 1, "")
    assert "hunter2" not in str(caught.value)


def test_a_shard_above_the_bound_is_refused(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GSA_CACHE_GB", "0.00001")
    with pytest.raises(RemoteError, match="above the cache's bound of 10000; next: raise GSA_CACHE_GB"):
        fetch(web.put("a.tar", noise(1)), noise(1))
    assert not web.gets


@pytest.mark.parametrize("text", ["many", "0", "-1", "nan", "inf"])
def test_a_bound_that_is_no_number_is_refused(web: Web, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("GSA_CACHE_GB", text)
    with pytest.raises(RemoteError, match=f"GSA_CACHE_GB: expected a number above 0, got '{text}'"):
        fetch(web.put("a.tar", noise(1)), noise(1))


def test_a_full_disk_is_named(web: Web, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(
        RemoteError, match=r"a\.tar: cannot be kept in .*: No space left on device; next: make"
    ):
        fetch(web.put("a.tar", noise(1)), noise(1))
    assert kept(cache) == []


def test_a_cache_that_cannot_be_made_is_named(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GSA_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(RemoteError, match=r"Not a directory; next: .*GSA_CACHE"):
        fetch(web.put("a.tar", noise(1)), noise(1))


@pytest.mark.parametrize(
    "place",
    [
        "pipe:cat x",
        "file:///etc/passwd",
        "simplecache::http://h/a.tar",
        "http://h/a::file://b",
        "/a.tar",
        "http://",
    ],
)
def test_only_known_schemes_are_opened(place: str) -> None:
    assert not is_url(place)
    with pytest.raises(RemoteError, match="is no URL that is read"):
        open_cached(place, 1, "")


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("az", "adlfs")])
def test_a_missing_package_is_named(scheme: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RemoteError, match=f"needs a package; next: pip install '{package}'"):
        open_cached(f"{scheme}://bucket/a.tar", 1, "")


def test_the_cache_lies_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("GSA_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "gsa" / "shards"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "gsa" / "shards"


# --- through the manifest ----------------------------------------------------------------------------------


def far_set(web: Web, folder: Path, sizes: dict[str, list[int]]) -> tuple[Manifest, Manifest]:
    """A set on this machine, and the same on the server."""
    local = read_manifest(write_set(folder / "set", sizes))
    urls = {s.name: web.put(s.name, (local.folder / s.name).read_bytes()) for s in local.shards}
    table = manifests.pq.read_table(local.folder / manifests.MANIFEST)
    shards = [manifests.Shard(**{**vars(s), "path": urls[s.name]}) for s in local.shards]
    (folder / "far").mkdir()
    write_manifest(folder / "far", table, classes=local.classes, shards=shards, made={})
    return local, read_manifest(folder / "far")


def test_an_epoch_fetches_each_shard_once_and_the_next_ones_ahead(
    web: Web, tmp_path: Path, mini_config: Any
) -> None:
    local, far = far_set(web, tmp_path, {"train": [36] * 8, "val": [2]})
    config = mini_config(image_size=8, global_batch=8, micro_batch=4, shuffle_block=72)
    place = {"epoch": 0, "first_step": 0, "world": 2, "threads": 1, "draws": 0}
    ranks = [train_loader(far.split("train"), config, rank=rank, **place) for rank in (0, 1)]
    first = [next(rank) for rank in ranks]
    end = time.monotonic() + 30
    while len(web.gets) < 4 and time.monotonic() < end:
        time.sleep(0.01)
    assert len(web.gets) == 4  # two blocks of two shards
    rest = [[batch.images for batch in rank] for rank in ranks]
    assert web.gets == {f"/train-{n:06d}.tar": 1 for n in range(8)}
    near = [list(train_loader(local.split("train"), config, rank=rank, **place)) for rank in (0, 1)]
    for one, images, batches in zip(first, rest, near, strict=True):
        expected = [batch.images for batch in batches]
        assert all(a.equal(b) for a, b in zip([one.images, *images], expected, strict=True))


def test_a_host_that_is_silent_is_asked_for_one_shard_alone(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has a copy, and what is elsewhere, is proved all the same."""
    _, far = far_set(web, tmp_path, {"train": [2] * 4, "val": [2]})
    read_sample(far.split("train"), 6)  # of the last shard
    shards = [replace(s, path=s.path.replace(web.address, "http://127.0.0.1:1")) for s in far.shards[:3]]
    (tmp_path / "mixed").mkdir()
    table = manifests.pq.read_table(far.folder / manifests.MANIFEST)
    shards += far.shards[3:]
    write_manifest(tmp_path / "mixed", table, classes=far.classes, shards=shards, made={})
    asked, notes, opened = [], [], remote._open_by_fsspec
    monkeypatch.setattr(remote, "_open_by_fsspec", lambda url: (asked.append(url), opened(url))[1])
    (fault,) = verify(tmp_path / "mixed", say=notes.append)
    assert fault.startswith("http://127.0.0.1:1/train-000000.tar: ClientConnector")
    assert fault.endswith(
        "(3 attempts); not asked for there: train-000001.tar, train-000002.tar; "
        "next: see whether http://127.0.0.1:1 can be reached, then verify again"
    )
    assert asked == ["http://127.0.0.1:1/train-000000.tar"] * 3 + [web.url("val-000000.tar")]
    assert notes == [f"remote shards: 1 read from their copies in {cache_folder()}, 1 fetched now"]


def test_a_server_that_answers_is_asked_for_every_shard(web: Web, tmp_path: Path) -> None:
    _, far = far_set(web, tmp_path, {"train": [2] * 2, "val": [2]})
    web.failures = 3 + 2  # the first shard's attempts, and a hiccup at the second
    notes: list[str] = []
    (fault,) = verify(far.folder, say=notes.append)
    assert fault.startswith(f"{web.address}/train-000000.tar: HTTP 503 ")
    assert fault.count("next: ") == 1
    assert notes[0].endswith(", 2 fetched now")
    assert verify(far.folder, say=notes.append) == []
    assert notes[1].startswith("remote shards: 2 read from their copies in ")
    assert notes[1].endswith(", 1 fetched now")


def test_a_remote_fault_has_one_next_move(web: Web, tmp_path: Path) -> None:
    _, far = far_set(web, tmp_path, {"train": [2], "val": [2]})
    for web.failures in (99, 0):  # 503, 404
        web.files.clear()
        with pytest.raises(ShardError) as caught:
            read_sample(read_manifest(far.folder).split("train"), 0)
        assert str(caught.value).count("next: ") == 1
    assert all(fault.count("next: ") == 1 for fault in verify(far.folder))


def test_a_cache_below_two_blocks_is_warned_of_and_the_bound_named_would_do(
    web: Web,
    tmp_path: Path,
    mini_config: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, far = far_set(web, tmp_path, {"train": [12] * 8, "val": [2]})
    config = mini_config(image_size=8, global_batch=8, micro_batch=4, shuffle_block=24)
    monkeypatch.setattr(plan.math, "ceil", lambda x: x)  # to the byte
    (size,) = {shard.bytes for shard in far.split("train").shards}
    monkeypatch.setenv("GSA_CACHE_GB", str(3 * size / 1e9))
    plan.check_cache(config, far)
    (warning,) = caplog.messages
    named = re.search(r"^small_cache GSA_CACHE_GB=.*; next: GSA_CACHE_GB=(\S+), which", warning)
    assert named
    monkeypatch.setenv("GSA_CACHE_GB", str(float(named[1]) * 1.001))
    plan.check_cache(config, far)
    assert len(caplog.messages) == 1
    place = {"epoch": 0, "first_step": 0, "rank": 0, "world": 1, "threads": 0, "draws": 0}
    list(train_loader(far.split("train"), config, **place))
    assert set(web.gets.values()) == {1}
    monkeypatch.setenv("GSA_CACHE_GB", "many")
    config = mini_config(shards=str(far.folder), **{"optim.global_batch": 8})
    run = plan.prepare(Out(tmp_path), config)
    with pytest.raises(InputError, match=r"^GSA_CACHE_GB: expected a number above 0, got 'many'; next: "):
        verbs.train(Out(tmp_path), run, Resources())


def test_samples_are_read_from_remote_shards(web: Web, tmp_path: Path) -> None:
    local, far = far_set(web, tmp_path, {"train": [3, 2], "val": [2]})
    for split in local.splits:
        for i in range(len(local.split(split))):
            assert read_sample(far.split(split), i) == read_sample(local.split(split), i)
    assert set(web.gets.values()) == {1}
    del web.files["/val-000000.tar"]
    for path in kept(cache_folder()):
        path.unlink()
    again = read_manifest(tmp_path / "far")
    with pytest.raises(
        ShardError, match=r"val-000000\.tar, sample val-00000001: cannot be read: .*not found"
    ):
        read_sample(again.split("val"), 1)


def test_a_shard_that_cannot_be_had_is_not_asked_for_again_for_each_sample(web: Web, tmp_path: Path) -> None:
    _, far = far_set(web, tmp_path, {"train": [9, 9], "val": [2]})
    samples, web.failures = far.split("train"), 10**6
    for i in range(9):
        with pytest.raises(ShardError, match=rf"train-000000\.tar, sample train-0000000{i}: cannot be read"):
            read_sample(samples, i)
    assert web.gets == {"/train-000000.tar": 3}  # the attempts for the first sample


def test_a_silent_host_is_not_asked_for_each_shard(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy that is here is read all the same."""
    _, far = far_set(web, tmp_path, {"train": [3] * 4, "val": [2]})
    samples, asked = far.split("train"), []
    read_sample(samples, 9)
    monkeypatch.setattr(
        remote, "_open_by_fsspec", lambda url: asked.append(url) or (_ for _ in ()).throw(OSError())
    )
    monkeypatch.setattr(remote, "_translated", silent)
    for i in (0, 1, 4, 7):
        with pytest.raises(ShardError, match="cannot be read: "):
            read_sample(samples, i)
    assert len(asked) == 3  # the attempts for the first sample
    assert len(read_sample(samples, 10)) > 0


def silent(url: str, call: Any, *args: Any) -> Any:
    with suppress(OSError):
        call(*args)
    raise remote._Silent("no answer")


def test_verify_drops_a_damaged_copy_so_that_the_next_call_fetches_it(
    web: Web, cache: Path, tmp_path: Path
) -> None:
    _, far = far_set(web, tmp_path, {"train": [9], "val": [2]})
    read_sample(far.split("train"), 0)
    (copy,) = kept(cache)
    content = bytearray(copy.read_bytes())
    content[int(far.split("train").offset[3]) + 40] ^= 1
    copy.write_bytes(content)
    (fault,) = verify(far.folder)
    assert "sha256 differs; damaged pictures: " in fault
    assert not verify(far.folder)


def test_a_copy_damaged_in_the_cache_is_fetched_again(web: Web, cache: Path, tmp_path: Path) -> None:
    local, far = far_set(web, tmp_path, {"train": [9], "val": [2]})
    samples = far.split("train")
    read_sample(samples, 0)
    (copy,) = kept(cache)
    content = bytearray(copy.read_bytes())
    content[int(samples.offset[3]) + 40] ^= 1
    copy.write_bytes(content)
    assert read_sample(samples, 3) == read_sample(local.split("train"), 3)
    assert web.gets == {"/train-000000.tar": 2}


def test_no_descriptor_of_a_remote_shard_is_kept(web: Web, tmp_path: Path) -> None:
    """What the cache drops shall give its room back."""
    _, far = far_set(web, tmp_path, {"train": [2] * 4, "val": [2]})
    samples = far.split("train")
    for i in range(8):
        read_sample(samples, i)
    assert not [p for p in Path("/proc/self/fd").iterdir() if str(cache_folder()) in os.path.realpath(p)]


def test_closing_a_loader_does_not_wait_for_a_fetch(web: Web, tmp_path: Path, mini_config: Any) -> None:
    _, far = far_set(web, tmp_path, {"train": [12] * 4, "val": [2]})
    config = mini_config(image_size=8, global_batch=8, micro_batch=4, shuffle_block=12)
    place = {"epoch": 0, "first_step": 0, "rank": 0, "world": 1, "threads": 0, "draws": 0}
    loader = train_loader(far.split("train"), config, **place)
    next(loader)
    web.pause_s = 0.3  # for each 4 KiB, of which a shard has several
    next(loader)
    start = time.monotonic()
    loader.close()
    assert time.monotonic() - start < 1
