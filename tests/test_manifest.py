"""The manifest: what is there, and no damage passes unseen on reading."""

import errno
import hashlib
import os
import random
import runpy
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from photos import columns, flip, rewrite, set_row

from pipeline import manifest as manifests
from pipeline import mapped, remote
from pipeline.manifest import Manifest, ShardError, read_manifest, read_sample
from pipeline.verify import table, verify


def test_manifest_tells_what_is_there(built: Path) -> None:
    manifest = read_manifest(built)
    assert manifest.splits == ("train", "val")
    assert [s.name for s in manifest.shards] == [
        *(f"train-{n:06d}.tar" for n in range(4)),
        "val-000000.tar",
    ]
    assert [s.samples for s in manifest.shards] == [8, 8, 8, 2, 6]
    for shard in manifest.shards:
        data = (built / shard.name).read_bytes()
        assert (shard.bytes, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    with pytest.raises(ShardError, match=r"no split 'test'; there are: train, val"):
        manifest.split("test")
    rows = table(manifest)
    assert [r["split"] for r in rows] == ["train", "val"]
    assert [(r["shards"], r["samples"]) for r in rows] == [(4, 26), (1, 6)]
    assert rows[1]["classes"] == {"ant": 2, "bee": 3, "cat": 1}
    assert sum(r["bytes"] for r in rows) == sum(p.stat().st_size for p in built.glob("*.tar"))


def test_digest_is_of_classes_and_shards_alone(own: Path) -> None:
    before = read_manifest(own).digest
    rewrite(own, lambda values, rows: values["made"].update(note=1))
    assert read_manifest(own).digest == before
    rewrite(own, lambda values, rows: values["classes"].reverse())
    assert read_manifest(own).digest != before


def broken_manifests() -> Iterator[tuple[str, Callable[[Path], object], str]]:
    yield "none", lambda p: p.unlink(), r"no shards there \(expected manifest.parquet\); next: name another"
    yield "folder", lambda p: (p.unlink(), p.mkdir()), r"manifest.parquet: cannot be read: "
    yield (
        "empty",
        lambda p: p.write_bytes(b""),
        r"manifest.parquet: cannot be read: .*; next: build the set again",
    )
    yield "garbage", lambda p: p.write_bytes(os.urandom(3000)), r"manifest.parquet: cannot be read: "
    yield "cut", lambda p: p.write_bytes(p.read_bytes()[:-100]), r"manifest.parquet: cannot be read: "
    yield (
        "foreign",
        lambda p: pq.write_table(pa.table({"a": [1]}), p),
        r"a Parquet file, but no manifest of ours",
    )
    yield (
        "newer",
        lambda p: rewrite(p.parent, lambda values, rows: values.update(version=1)),
        r"expected version 2, got 1; next: read it with the release that made it",
    )


@pytest.mark.parametrize(("fault", "damage", "message"), [*broken_manifests()], ids=lambda v: str(v)[:8])
def test_a_bad_manifest_is_one_clear_line(
    fault: str, damage: Callable[[Path], object], message: str, own: Path
) -> None:
    damage(own / "manifest.parquet")
    with pytest.raises(ShardError, match=message) as error:
        read_manifest(own)
    assert str(own) in str(error.value)
    assert "\n" not in str(error.value)
    assert verify(own) == [str(error.value)]


def test_no_folder_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "none", tmp_path / "file"):
        with pytest.raises(ShardError, match=r"no shards there"):
            read_manifest(folder)


def drop_row(values: dict[str, Any], rows: dict[str, list[Any]]) -> None:
    for column in rows.values():
        column.pop(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_row, "expected 8 rows of train-000000.tar, got 7 of train-000000.tar"),
        (set_row("label", 3), "train-000000.tar: a label without a class: train-00000000"),
        (set_row("label", -1), "train-000000.tar: a label without a class: train-00000000"),
        (set_row("offset", -1), "train-000000.tar: a row points outside of the file: train-00000000"),
        (set_row("size", 2**62), "train-000000.tar: a row points outside of the file: train-00000000"),
        (set_row("offset", 2**63 - 1), "train-000000.tar: a row points outside of the file"),
        (
            set_row("shard", "train-000009.tar"),
            "expected 8 rows of train-000000.tar, got 1 of train-000009.tar",
        ),
        (set_row("split", "test"), "expected 26 rows of train, got 1 of test"),
        (lambda v, r: v["shards"][0].update(name="../train-000000.tar"), "'../train-000000.tar' is no name"),
        (
            lambda v, r: v["shards"][0].update(name="val-000007.tar"),
            "'val-000007.tar' is no name for a train",
        ),
        (lambda v, r: v["shards"][0].update(name="/train-000000.tar"), "'/train-000000.tar' is no name"),
        (lambda v, r: v["shards"][0].update(name="train-/../../0.tar"), "'train-/../../0.tar' is no name"),
        (lambda v, r: v["shards"][0].update(more=1), "unexpected keyword argument 'more'"),
        (lambda v, r: v.pop("classes"), "'classes'"),
        (lambda v, r: v.update(shards=7), "not iterable"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(
    change: Callable[[dict[str, Any], dict[str, list[Any]]], None], message: str, own: Path
) -> None:
    rewrite(own, change)
    with pytest.raises(ShardError) as error:
        read_manifest(own)
    assert "manifest.parquet: cannot be read: " in str(error.value)
    assert message in str(error.value)


def test_other_columns_are_refused(own: Path) -> None:
    path = own / "manifest.parquet"
    old = pq.ParquetFile(path).read()
    pq.write_table(old.drop_columns(["crc32"]), path)
    with pytest.raises(ShardError, match=r"expected the columns split, shard, .* got split, shard"):
        read_manifest(own)


def test_random_damage_to_the_manifest_is_refused_or_harmless(built: Path, own: Path) -> None:
    rng, path = random.Random(0), own / "manifest.parquet"
    good, rows, whole, refused = read_manifest(built), columns(built), path.read_bytes(), 0
    for _ in range(300):
        path.write_bytes(whole)
        flip(path, rng.randrange(len(whole)), 1 << rng.randrange(8))
        try:
            found = read_manifest(own)
        except ShardError:
            refused += 1
            continue
        for name in ("classes", "shards", "made", "broken", "ignored", "empty_classes"):
            assert getattr(found, name) == getattr(good, name)
        assert columns(own) == rows
        assert found.digest == good.digest
    assert refused > 100


def test_read_sample_tells_damage_by_shard_and_key(own: Path) -> None:
    samples = read_manifest(own).split("train")
    path = samples.folder / samples.shards[0].name
    where = int(samples.offset[3]) + int(samples.size[3]) // 2
    flip(path, where)
    with pytest.raises(
        ShardError, match=rf"{path}, sample train-00000003: crc32 differs; next: `gsa shards v"
    ):
        read_sample(samples, 3)
    assert len(read_sample(samples, 2)) == samples.size[2]
    os.truncate(path, where)
    with pytest.raises(ShardError, match=r"sample train-00000003: expected \d+ bytes, got \d+"):
        read_sample(samples, 3)
    path.unlink()
    again = read_manifest(own).split("train")  # other descriptors
    with pytest.raises(ShardError, match=r"sample train-00000003: cannot be read: No such file"):
        read_sample(again, 3)


def test_every_flipped_bit_of_a_picture_is_caught_on_reading(own: Path) -> None:
    samples = read_manifest(own).split("val")
    for i in range(len(samples)):
        for position in range(0, int(samples.size[i]), 37):
            where = int(samples.offset[i]) + position
            flip((samples.folder / samples.shards[0].name), where, 1 << position % 8)
            with pytest.raises(ShardError, match=str(samples.key(i))):
                read_sample(samples, i)
            flip((samples.folder / samples.shards[0].name), where, 1 << position % 8)
        read_sample(samples, i)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_samples_are_read_from_threads_and_forks(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = read_manifest(built).split("train")
    expected = [read_sample(samples, i) for i in range(len(samples))]
    order = list(range(len(samples))) * 40
    random.Random(0).shuffle(order)
    for most in (256, 2, 0):  # descriptors kept
        monkeypatch.setattr(manifests, "MAX_OPEN", most)
        fresh = read_manifest(built).split("train")
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda i, s=fresh: read_sample(s, i), order))
        assert found == [expected[i] for i in order]
        assert len(fresh.files._open) <= most + 8
    child = os.fork()
    if not child:
        os._exit(0 if [read_sample(samples, i) for i in range(len(samples))] == expected else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_stale_handle_is_opened_again(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a network file system whose server has started anew."""
    samples = read_manifest(own).split("train")
    expected, pread, stale = (
        read_sample(samples, 0),
        os.pread,
        [next(iter(samples.files._open.values())).number],
    )

    def fail_once(number: int, size: int, offset: int) -> bytes:
        if stale:
            assert number == stale.pop()
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return pread(number, size, offset)

    monkeypatch.setattr(os, "pread", fail_once)
    assert read_sample(samples, 0) == expected
    assert not stale


def test_without_checksums_another_size_is_another_file(own: Path, tmp_path: Path) -> None:
    folder = tmp_path / "indexed"
    folder.mkdir()
    shutil.copy(own / "manifest.parquet", folder)

    def strip(values: dict[str, Any], rows: dict[str, list[Any]]) -> None:
        for shard in values["shards"]:
            shard.update(sha256="", path=str(own / shard["name"]))
        rows["crc32"] = [None] * len(rows["crc32"])

    rewrite(folder, strip)
    assert read_sample(read_manifest(folder).split("val"), 0)
    with open(own / "val-000000.tar", "ab") as file:
        file.write(bytes(512))
    with pytest.raises(ShardError, match=r"cannot be read: expected a file of \d+ bytes, got \d+; next"):
        read_sample(read_manifest(folder).split("val"), 0)


def test_descriptors_are_given_back(built: Path) -> None:
    def count() -> int:
        return len(os.listdir("/dev/fd"))

    before = count()
    for _ in range(20):
        samples = read_manifest(built).split("train")
        for i in range(len(samples)):
            read_sample(samples, i)
    del samples
    assert count() <= before


# --- memory that processes share ---------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where mapped manifests lie; from now on little ones are mapped too."""
    monkeypatch.setenv("GSA_CACHE", str(tmp_path / "day=1 \udcff"))  # which Arrow might parse, or not encode
    monkeypatch.setattr(manifests, "MAPPED_BYTES", 0)
    return remote.cache_folder() / "manifests"


def told(manifest: Manifest) -> str:
    """All that a manifest tells, its folder apart."""
    names = ("classes", "shards", "made", "broken", "ignored", "empty_classes", "digest")
    parts: list[Any] = [getattr(manifest, name) for name in names]
    for samples in manifest.samples.values():
        crc32 = None if samples.crc32 is None else samples.crc32.tolist()
        numbers = [samples.shard, samples.label, samples.offset, samples.size]
        parts += [samples.split, samples.shards, str(samples.certificate), samples.salt, crc32]
        parts += [(str(values.dtype), values.tolist()) for values in numbers]
        parts += [samples.keys.to_pylist(), samples.ext.to_pylist()]
        parts += [[samples.key(i) for i in range(len(samples))], samples.shard_sizes]
    return repr(parts)


def parsed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    with monkeypatch.context() as patch:
        patch.setattr(manifests, "MAPPED_BYTES", 1 << 62)
        return read_manifest(folder)


def mappings(name: str) -> list[range]:
    """The addresses at which this process has mapped a file."""
    lines = [
        line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text(errors="replace").splitlines()
    ]
    spans = [fields[0].split("-") for fields in lines if len(fields) == 6 and name in fields[5]]
    return [range(int(start, 16), int(end, 16)) for start, end in spans]


def without_crc32(values: dict[str, Any], rows: dict[str, list[Any]]) -> None:
    rows["crc32"] = [None] * 26 + rows["crc32"][26:]


def in_little_groups(folder: Path) -> None:
    rows = pq.ParquetFile(folder / "manifest.parquet").read()
    pq.write_table(rows, folder / "manifest.parquet", row_group_size=5)


@pytest.mark.parametrize(
    "change", [lambda _: None, in_little_groups, lambda own: rewrite(own, without_crc32)], ids=range(3)
)
def test_a_mapped_manifest_is_the_parsed_one(
    change: Callable[[Path], None], own: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(own)
    expected = told(parsed(own, monkeypatch))
    assert not cache.exists()
    assert told(read_manifest(own)) == expected  # by the one who writes it
    sha256 = hashlib.sha256((own / "manifest.parquet").read_bytes()).hexdigest()
    assert {p.name for p in cache.iterdir()} == {"lock", f"{sha256}-v2.arrow"}
    monkeypatch.setattr(pq.ParquetFile, "read", None)  # nobody parses any more
    assert told(read_manifest(own)) == expected


@pytest.mark.parametrize("change", [lambda _: None, in_little_groups], ids=range(2))
def test_columns_are_mapped_and_not_copied(
    change: Callable[[Path], None], own: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(own)
    for _ in range(2):  # who writes it has it mapped too
        manifest = read_manifest(own)
        spans = mappings(f"{hashlib.sha256((own / 'manifest.parquet').read_bytes()).hexdigest()}-v2.arrow")
        assert len(spans) == 1
        for samples in manifest.samples.values():
            assert samples.crc32 is not None
            for values in (samples.label, samples.offset, samples.size, samples.crc32):
                assert values.ctypes.data in spans[0]
                assert not values.flags.writeable
            buffers = [*samples.keys.buffers(), *samples.ext.indices.buffers()]
            assert [b.address in spans[0] for b in buffers if b] == [True] * 3
        del manifest, samples, values, buffers
        assert mappings(cache.name) == []
    parsed(own, monkeypatch)
    assert mappings(cache.name) == []


def forged(path: Path, content: bytes) -> bytes:
    """Any content, with the checksum that fits."""
    return content + mapped._crc32(path, pa.py_buffer(content))


def test_damage_to_the_mapped_file_never_shows(
    built: Path, own: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(0)
    rewrite(own, lambda values, rows: rows["label"].reverse())
    read_manifest(own)
    other = next(cache.glob("*.arrow")).read_bytes()  # fits all but its name
    shutil.copy(built / "manifest.parquet", own)
    expected = told(read_manifest(own))
    path = cache / f"{hashlib.sha256((own / 'manifest.parquet').read_bytes()).hexdigest()}-v2.arrow"
    whole = path.read_bytes()
    places = [*range(0, 64), *rng.sample(range(len(whole)), 200), *range(len(whole) - 12, len(whole))]
    flipped = [whole[:n] + bytes([whole[n] ^ 1 << rng.randrange(8)]) + whole[n + 1 :] for n in places]
    others = [
        b"",
        b"abc",
        bytes(4),
        whole[:-1],
        whole + b"a",
        other,
        forged(path, b""),
        forged(path, b"a" * 999),
    ]
    assert forged(path, whole[:-4]) == whole
    for content in [*flipped, *others]:
        path.unlink()  # never written into: who has it mapped would read that
        path.write_bytes(content)
        assert told(read_manifest(own)) == expected
        assert path.read_bytes() == whole  # made anew, for the next


def a_file(cache: Path, _: pytest.MonkeyPatch) -> None:
    cache.parent.write_bytes(b"")


def a_folder_of_that_name(cache: Path, _: pytest.MonkeyPatch) -> None:
    data = (cache.parents[1] / "own" / "manifest.parquet").read_bytes()
    (cache / f"{hashlib.sha256(data).hexdigest()}-v2.arrow" / "x").mkdir(parents=True)


def nothing_may_be_written(cache: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("GSA_CACHE", "/proc/none")


def a_full_disk(cache: Path, patch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr(os, "fsync", full)


@pytest.mark.parametrize("fault", [a_file, a_folder_of_that_name, nothing_may_be_written, a_full_disk])
def test_without_a_cache_each_process_parses(
    fault: Callable[[Path, pytest.MonkeyPatch], None],
    own: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = told(parsed(own, monkeypatch))
    fault(cache, monkeypatch)
    assert told(read_manifest(own)) == expected
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "each process holds it; next: make room there, or set GSA_CACHE" in caplog.text
    assert not list(cache.parent.rglob(".*.tmp"))


def test_a_lock_that_is_not_to_be_had_delays_only(
    own: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped, "WAIT_S", 0.1)
    expected = told(parsed(own, monkeypatch))
    with mapped._alone(cache):
        assert told(read_manifest(own)) == expected


def test_what_contradicts_itself_is_not_kept_for_others(own: Path, cache: Path) -> None:
    read_manifest(own)
    before = sorted(cache.iterdir())
    rewrite(own, set_row("label", 3))
    for _ in range(2):
        with pytest.raises(ShardError, match=r"a label without a class: train-00000000"):
            read_manifest(own)
    assert sorted(cache.iterdir()) == before


def test_of_eight_processes_one_parses_and_all_have_the_same(
    own: Path, cache: Path, forks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipes = [forks.Pipe() for _ in range(8)]
    job = {"folder": own, "cache": str(cache.parent)}
    processes = [
        forks.Process(target=runpy.run_path, args=(__file__, {"JOB": {**job, "pipe": far}}, "worker"))
        for _, far in pipes
    ]
    for process, (_, far) in zip(processes, pipes, strict=True):
        process.start()
        far.close()  # who fails is heard
    for step in ("imported", "go"):
        for near, _ in pipes:
            near.send(step) if step == "go" else near.recv()
    found = [near.recv() for near, _ in pipes]
    for process in processes:
        process.join()
    assert {text for text, _, _ in found} == {told(parsed(own, monkeypatch))}
    assert sorted(parses for _, parses, _ in found) == [0] * 7 + [1]
    assert [spans for _, _, spans in found] == [1] * 8


def open_at_once(folder: Path, cache: str, pipe: Connection) -> None:
    """In a process of its own: what the manifest tells, how often it was parsed, how often it is mapped."""
    parses, read = [], pq.ParquetFile.read

    def slow_read(self: pq.ParquetFile) -> pa.Table:
        parses.append(1)
        time.sleep(0.3)  # the others come meanwhile
        return read(self)

    os.environ["GSA_CACHE"], manifests.MAPPED_BYTES, pq.ParquetFile.read = cache, 0, slow_read
    pipe.send("imported")
    pipe.recv()
    manifest = read_manifest(folder)
    pipe.send((told(manifest), len(parses), len(mappings("-v2.arrow"))))


def test_the_manifests_opened_last_are_kept(own: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "MAX_KEPT", 3)
    versions, opened = [], []
    for n in range(4):
        rewrite(own, lambda values, rows, n=n: values["made"].update(note=n))
        versions.append((own / "manifest.parquet").read_bytes())
    names = [f"{hashlib.sha256(data).hexdigest()}-v2.arrow" for data in versions]
    cache.mkdir(parents=True)
    (cache / ".abc.arrow.01234567.tmp").write_bytes(b"of a process that was killed")
    os.utime(cache / ".abc.arrow.01234567.tmp", (0, 0))
    for n in (0, 1, 2, 0, 3):
        time.sleep(0.01)  # a tick of the file system's clock
        (own / "manifest.parquet").write_bytes(versions[n])
        opened.append((n, read_manifest(own)))
        kept = [p for p in cache.iterdir() if p.name != "lock"]
        assert len(kept) <= 3
    assert {p.name for p in kept} == {names[n] for n in (2, 0, 3)}
    for n, manifest in opened:  # also of those that were dropped
        (own / "manifest.parquet").write_bytes(versions[n])
        assert told(manifest) == told(parsed(own, monkeypatch))


def test_remote_shards_leave_mapped_manifests_alone(own: Path, cache: Path) -> None:
    manifest = read_manifest(own)
    before = sorted(cache.iterdir())
    assert remote._make_room(cache.parent / "a.part", 0)
    assert sorted(cache.iterdir()) == before
    assert told(manifest) == told(read_manifest(own))


if __name__ == "worker":
    open_at_once(**globals()["JOB"])
