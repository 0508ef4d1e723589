"""The manifest: what is there, and no damage passes unseen on reading."""

import errno
import hashlib
import os
import random
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from photos import columns, flip, rewrite, set_row

from pipeline import manifest as manifests
from pipeline.manifest import ShardError, read_manifest, read_sample
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
