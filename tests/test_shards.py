"""Shards: built whole or not at all, the same bytes every time, however often the build is killed."""

import errno
import os
import random
import resource
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from photos import columns, contents, flip, origins, picture, refusal, settings, write_photos

from pipeline import pictures, shards
from pipeline.config import InputError
from pipeline.manifest import read_manifest, read_sample
from pipeline.pictures import ShardsConfig
from pipeline.rundir import hold
from pipeline.shards import build, listing
from pipeline.verify import contact_sheet, verify


def test_two_builds_are_the_same_bytes(photos: Path, built: Path, tmp_path: Path) -> None:
    build(settings(photos), tmp_path / "set")
    assert contents(tmp_path / "set") == contents(built)
    assert len(contents(built)) > 4


def test_another_seed_is_another_split_and_order(photos: Path, built: Path, tmp_path: Path) -> None:
    first, second = read_manifest(built), build(settings(photos, seed=1), tmp_path / "set").manifest
    assert set(origins(first, "val")) != set(origins(second, "val"))
    assert first.digest != second.digest
    assert Counter(first.split("val").label.tolist()) == Counter(second.split("val").label.tolist())


def test_classes_are_mixed_in_the_shards(built: Path) -> None:
    samples = read_manifest(built).split("train")
    assert len(set(samples.label[samples.shard == 0].tolist())) == 3
    assert sorted(samples.label.tolist()) != samples.label.tolist()


def test_pictures_of_a_folder_are_kept_byte_for_byte(photos: Path, built: Path) -> None:
    manifest, seen = read_manifest(built), []
    for split in manifest.splits:
        samples = manifest.split(split)
        for i, origin in enumerate(origins(manifest, split)):
            seen.append(origin)
            assert read_sample(samples, i) == (photos / origin).read_bytes()
            assert manifest.classes[samples.label[i]] == origin.split("/")[0]
    assert (set(columns(built)["width"]), set(columns(built)["height"])) == ({12}, {9})
    assert sorted(seen) == sorted(str(p.relative_to(photos)) for p in photos.glob("*/*"))


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # by webdataset
def test_webdataset_reads_what_we_wrote(built: Path) -> None:
    import webdataset

    manifest = read_manifest(built)
    for split in manifest.splits:
        samples = manifest.split(split)
        urls = [s.place(built) for s in samples.shards]
        found = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
        assert [s["__key__"] for s in found] == samples.keys.to_pylist()
        assert [int(s["cls"]) for s in found] == samples.label.tolist()
        assert [s[e] for s, e in zip(found, samples.ext.to_pylist(), strict=True)] == [
            read_sample(samples, i) for i in range(len(samples))
        ]


SHARDS = (("train", 0), ("train", 1), ("train", 2), ("val", 0), ("val", 1))
NAMES = ["it's; echo foo", 'say "x" $(id)', "ünï 猫", "new\nline", "-rf", "a%06d=b", "..x", "CON.", " "]


def test_odd_names_change_nothing(tmp_path: Path) -> None:
    root = tmp_path / "100% a=b 'in'"
    for name in NAMES:
        (root / name).mkdir(parents=True)
        for i in range(3):
            (root / name / f"{name}{i}.JPG").write_bytes(picture(i))
    raw = os.fsencode(root) + b"/raw\xff"
    os.mkdir(raw)
    for ending in (b"0.jpg", b"1.jpg"):
        Path(os.fsdecode(raw + b"/\xfe" + ending)).write_bytes(picture(9))
    Path(os.fsdecode(raw + b"/\xfe.png")).write_text("broken")
    folder = tmp_path / "set %d x=1 'q' [a]*"
    manifest = build(settings(root), folder).manifest
    assert manifest.classes == tuple(sorted([n for n in NAMES if not n.startswith(".")] + ["raw\\xff"]))
    assert manifest.broken[0]["file"] == "raw\\xff/\\xfe.png"
    names = {p.name for p in folder.iterdir()}
    assert names == {"manifest.parquet", *(f"{s}-{n:06d}.tar" for s, n in SHARDS)}
    assert verify(folder) == []
    assert build(settings(root), folder).reused
    contact_sheet(manifest, tmp_path / "sheet.png")


def test_progress_rises_to_its_total(photos: Path, tmp_path: Path) -> None:
    (bad := shutil.copytree(photos, tmp_path / "in") / "ant" / "bad.jpg").touch()
    seen: list[tuple[Any, ...]] = []
    build(settings(bad.parent.parent), tmp_path / "set", progress=lambda *now: seen.append(now))
    assert seen == [("checked", n, 33) for n in range(1, 34)] + [("written", n, 32) for n in range(1, 33)]
    seen.clear()
    verify(tmp_path / "set", lambda *now: seen.append(now))
    assert seen[-1] == (5, 5)


def test_the_same_build_is_returned_as_it_is(photos: Path, own: Path, tmp_path: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in own.iterdir()}
    manifest, reused = build(settings(photos), own)
    assert reused
    assert manifest.digest == read_manifest(own).digest
    moved = shutil.copytree(photos, tmp_path / "moved")
    assert build(settings(moved, name="other"), own).reused  # the same pictures by another path
    assert {p: p.stat().st_mtime_ns for p in own.iterdir()} == before


def test_a_set_made_otherwise_is_refused_until_replaced(photos: Path, own: Path, tmp_path: Path) -> None:
    other = settings(photos, seed=3, val_fraction=0.4)
    message = refusal(other, own)
    assert "exists already, made otherwise: val_fraction 0.2, now 0.4; seed 0, now 3; next: choose" in message
    assert "or replace it (--replace)" in message
    assert build(other, own, replace=True).manifest.made["settings"]["seed"] == 3
    assert build(other, own).reused
    assert verify(own) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == [".own.lock", "own"]


def test_changed_pictures_are_seen(photos: Path, tmp_path: Path) -> None:
    root, folder = shutil.copytree(photos, tmp_path / "in"), tmp_path / "set"
    mark = listing(settings(root))
    build(settings(root), folder)
    (root / "ant" / "notes.txt").touch()
    assert build(settings(root), folder).reused
    assert listing(settings(root)) == mark
    (root / "ant" / "new.jpg").write_bytes(picture(5))
    assert "made otherwise: other pictures in the input (by name, size and time" in refusal(
        settings(root), folder
    )
    (root / "ant" / "new.jpg").unlink()
    os.utime(root / "ant" / "000.jpg", ns=(0, 0))
    assert "other pictures in the input" in refusal(settings(root), folder)
    assert listing(settings(root)) != mark


def test_replace_deletes_nothing_that_is_not_ours(photos: Path, own: Path, tmp_path: Path) -> None:
    (own / "notes.txt").write_text("mine")
    assert "not replaced, because 'notes.txt' in it is no shard" in refusal(
        settings(photos, seed=1), own, replace=True
    )
    home = write_photos(tmp_path / "home", {"ant": 2})
    assert "no shards there (expected manifest.parquet)" in refusal(settings(photos), home)
    assert "because 'ant' in it is no shard" in refusal(settings(photos), home, replace=True)
    assert len(list(home.glob("*/*"))) == 2
    (tmp_path / "file").touch()
    assert "expected a folder, found a file" in refusal(settings(photos), tmp_path / "file", replace=True)


def test_a_damaged_set_is_not_reused_and_is_repaired_by_replace(photos: Path, own: Path) -> None:
    (own / "val-000000.tar").unlink()
    assert "exists already, damaged: val-000000.tar: missing; next: replace" in refusal(settings(photos), own)
    (own / "manifest.parquet").write_bytes(b"PAR1")
    assert "manifest.parquet: cannot be read" in refusal(settings(photos), own)
    build(settings(photos), own, replace=True)
    flip(own / "train-000000.tar", 700)  # the size does not tell
    assert build(settings(photos), own).reused
    build(settings(photos), own, replace=True)
    assert verify(own) == []


def test_an_empty_folder_is_a_free_place_and_a_link_is_followed(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "fast disk").mkdir()
    (tmp_path / "set").symlink_to("fast disk")
    build(settings(photos), tmp_path / "set")
    build(settings(photos, seed=1), tmp_path / "set", replace=True)
    assert (tmp_path / "set").is_symlink()
    assert verify(tmp_path / "fast disk") == []


def test_two_builds_at_once_are_refused(photos: Path, tmp_path: Path) -> None:
    with hold(tmp_path / ".set.lock", "test"):
        assert f"{tmp_path / 'set'} is in use by another process" in refusal(
            settings(photos), tmp_path / "set"
        )
    build(settings(photos), tmp_path / "set")


def test_folders_without_a_picture_are_one_clear_line(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        (tmp_path / "in" / name).mkdir(parents=True)
    assert "expected at least 2 classes with readable pictures, found 0" in refusal(
        settings(tmp_path / "in"), tmp_path / "set"
    )


def test_a_picture_that_changes_during_the_build_is_seen(photos: Path, tmp_path: Path) -> None:
    root = shutil.copytree(photos, tmp_path / "in")
    victim = root / "bee" / "003.jpg"

    def change(phase: str, done: int, total: int) -> None:
        if (phase, done) == ("checked", 32):
            victim.write_bytes(picture(77))

    message = refusal(settings(root), tmp_path / "set", progress=change)
    assert f"{str(victim)!r}: changed while the shards were built" in message

    def remove(phase: str, done: int, total: int) -> None:
        if (phase, done) == ("checked", 32):
            victim.unlink()

    with pytest.raises(
        InputError, match=r"003\.jpg': cannot be read: No such file or directory; what is fin"
    ):
        build(settings(root), tmp_path / "set", progress=remove)


@pytest.mark.parametrize("limit", [0, 4_000, 30_000])
def test_no_room_is_said(limit: int, photos: Path, tmp_path: Path) -> None:
    """The system refuses to write past `limit` bytes a file, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    config = settings(photos, samples_per_shard=1000)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(InputError) as error:
            build(config, tmp_path / "set")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "set: cannot be written: File too large (" in str(error.value)
    kept = tmp_path / ".set.building"
    assert f"bytes are free); what is finished is kept in {kept}; next: make room there" in str(error.value)
    assert not [*tmp_path.rglob("*.tar"), *tmp_path.rglob("*.tar.tmp")]
    assert verify(build(config, tmp_path / "set").manifest.folder) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == [".set.lock", "set"]


class Work:
    """Counts pictures that are decoded and shards that are written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.decoded = self.written = 0
        decode, write = pictures.decode, shards._write_shard

        def counted_decode(data: bytes) -> Any:
            self.decoded += 1
            return decode(data)

        def counted_write(*arguments: Any) -> Any:
            self.written += 1
            return write(*arguments)

        monkeypatch.setattr(pictures, "decode", counted_decode)
        monkeypatch.setattr(shards, "_write_shard", counted_write)


@pytest.mark.parametrize(  # fsyncs: 2 for the plan, 2 for each of 4 chunks, 4 for each of 5 shards, 2
    ("nth", "code", "checked_at_least", "written_at_least"),
    [
        (1, errno.EROFS, 0, 0),
        (5, errno.EDQUOT, 0, 0),
        (8, errno.EIO, 1, 0),
        (12, errno.ENOSPC, 4, 0),
        (20, errno.EDQUOT, 4, 1),
        (31, errno.ENOSPC, 4, 5),
    ],
)
def test_a_disk_that_fills_up_keeps_what_is_finished(
    nth: int,
    code: int,
    checked_at_least: int,
    written_at_least: int,
    photos: Path,
    built: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shards, "CHUNK", 8)
    calls, real, kept = [], os.fsync, tmp_path / ".set.building"

    def fail(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) >= nth:
            raise OSError(code, os.strerror(code))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(InputError) as error:
            build(settings(photos), tmp_path / "set")
    assert f"set: cannot be written: {os.strerror(code)} (" in str(error.value)
    assert f"what is finished is kept in {kept}; next" in str(error.value)
    assert not (tmp_path / "set").exists()
    checked, written = (len(list(kept.glob(f".work/{kind}*.parquet"))) for kind in ("checked", "*.tar"))
    assert checked >= checked_at_least
    assert written >= written_at_least
    with monkeypatch.context() as patch:
        work, seen = Work(patch), []
        build(settings(photos), tmp_path / "set", progress=lambda *now: seen.append(now))
    assert (work.decoded, work.written) == (32 - 8 * checked, 5 - written)
    assert seen == sorted(set(seen))
    assert seen[-1:] in ([], [("written", 32, 32)])  # none where only the manifest was to be proved
    assert contents(tmp_path / "set") == contents(built)


def test_an_input_that_fails_is_no_broken_picture(
    photos: Path, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk's error is not the picture's: nothing is left out, and the next call goes on."""
    monkeypatch.setattr(shards, "CHUNK", 8)
    real, victim = pictures.read_file, str(photos / "cat" / "006.jpg")

    def fail(path: str) -> bytes:
        if path == victim:
            raise OSError(errno.EIO, "Input/output error")
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(pictures, "read_file", fail)
        with pytest.raises(
            InputError, match=r"cat/006.jpg': cannot be read: Input/output error; what is fin"
        ):
            build(settings(photos), tmp_path / "set")
    assert build(settings(photos), tmp_path / "set").manifest.broken == ()
    assert contents(tmp_path / "set") == contents(built)


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"val_fraction": 0.4}, {"samples_per_shard": 9}, {"input": ""}]
)
def test_work_for_another_plan_is_not_used(
    change: dict[str, Any], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = shutil.copytree(photos, tmp_path / "other")
    (other / "ant" / "new.jpg").write_bytes(picture(99))
    first, folder = settings(photos), tmp_path / "set"
    second = settings(other) if "input" in change else settings(photos, **change)

    def stop(phase: str, done: int, total: int) -> None:
        if (phase, done) == ("written", 28):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(first, folder, progress=stop)
    assert list(tmp_path.glob(".set.building/.work/checked*"))
    work = Work(monkeypatch)
    built = build(second, folder)
    assert work.decoded == 32 + ("input" in change)
    assert work.written == len(built.manifest.shards)
    assert contents(folder) == contents(build(second, tmp_path / "fresh").manifest.folder)


@pytest.mark.parametrize("fault", ["cut", "flipped", "shard cut", "shard gone"])
def test_damaged_work_is_not_used(
    fault: str, photos: Path, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_manifest", stop)
        with pytest.raises(InputError, match="cannot be written"):
            build(settings(photos), tmp_path / "set")
    building = tmp_path / ".set.building"
    note, tar = building / ".work" / "train-000001.tar.parquet", building / "train-000001.tar"
    if fault == "cut":
        note.write_bytes(note.read_bytes()[:-9])
    elif fault == "flipped":
        flip(note, 40, 255)
    elif fault == "shard cut":
        os.truncate(tar, 700)
    else:
        tar.unlink()
    (building / ".train-000001.tar.tmp").write_bytes(b"half")
    work = Work(monkeypatch)
    build(settings(photos), tmp_path / "set")
    assert (work.decoded, work.written) == (0, 1)
    assert contents(tmp_path / "set") == contents(built)


@pytest.mark.parametrize("call", ["fsync", "rename", "open"])
def test_a_failing_disk_leaves_the_old_set(
    call: str, photos: Path, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, real = contents(own), getattr(os, call)

    def fail(first: Any, *rest: Any, **options: Any) -> Any:
        if call == "rename" and not str(first).endswith(".building"):
            return real(first, *rest, **options)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(
        InputError, match=r"own: cannot be written: No space left on device \(\d+ bytes are free\)"
    ):
        build(settings(photos, seed=1), own, replace=True)
    monkeypatch.undo()
    assert contents(own) == before
    assert build(settings(photos), own).reused


def test_a_place_that_cannot_be_is_said(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        InputError, match=r"cannot be written: (Not a directory|File exists) \(\d+ bytes are f"
    ):
        build(settings(photos), tmp_path / "file" / "a" / "set")


# --- killed ------------------------------------------------------------------------------------------------

KILLER = textwrap.dedent("""
    # Builds in forked children and kills them: at a random moment, or at the nth call that changes the disk.
    import os, random, shutil, signal, sys, time
    from pathlib import Path
    import webdataset
    from pipeline import pictures, shards
    from pipeline.pictures import ShardsConfig
    from pipeline.shards import build

    photos, place, clock = sys.argv[1], Path(sys.argv[2]), random.Random(int(sys.argv[3]))
    read = lambda folder: {p.name: p.read_bytes() for p in folder.iterdir()}
    os.fsync = lambda descriptor: None  # a kill, unlike a power cut, loses nothing that was written
    shards.CHUNK = 8
    fixed = dict(name="s", source="folder", input=photos, samples_per_shard=12)
    config = [ShardsConfig(**fixed, seed=seed) for seed in (0, 1)]
    build(config[0], place / "good0")
    started = time.perf_counter()
    build(config[1], place / "good1")
    seconds = time.perf_counter() - started
    good = [read(place / "good0"), read(place / "good1")]
    work = []  # what is done, by name: decode, _write_shard

    def noted(module, name):
        real = getattr(module, name)
        def call(*args):
            work.append(name)
            return real(*args)
        setattr(module, name, call)
    noted(pictures, "decode")
    noted(shards, "_write_shard")

    def kill_at(n):
        count = 0
        def counted(real):
            def call(*args, **options):
                nonlocal count
                count += 1
                if count == n:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **options)
            return call
        for name in ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink"):
            setattr(os, name, counted(getattr(os, name)))

    def leftovers():
        return [p.name for p in place.glob(".set.*") if p.name != ".set.lock"]

    def expected_work(folder, replace):
        building = folder.with_name(".set.building")
        if folder.exists() and not replace or shards._is_complete(building, made):
            return 0, 0
        kept = [p.name for p in building.glob(".work/*.parquet") if not p.name.startswith(".")]
        return 32 - 8 * sum(k.startswith("checked") for k in kept), 4 - sum(".tar." in k for k in kept)

    def trial(mode, replace, n):
        folder = place / "set"
        if replace:
            shutil.copytree(place / "good0", folder)
        child = os.fork()
        if not child:
            if mode == "call":
                kill_at(n)
            build(config[1], folder, replace=replace)
            os._exit(0)
        if mode == "time":
            time.sleep(clock.uniform(0, 1.1 * seconds))
            os.kill(child, signal.SIGKILL)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        half, there = bool(leftovers()), folder.exists()
        if there:
            assert read(folder) in (good if replace else good[1:]), (mode, replace, n)
        else:
            assert half or not replace, (mode, replace, n)
        work.clear()
        expected = expected_work(folder, replace)
        build(config[1], folder, replace=replace)
        assert (work.count("decode"), work.count("_write_shard")) == expected, (mode, replace, n, expected)
        assert read(folder) == good[1], (mode, replace, n)
        assert not leftovers(), (mode, replace, n)
        shutil.rmtree(folder)
        return killed, half, there, expected not in ((0, 0), (32, 4))

    made = shards.read_manifest(place / "good1").made
    for replace in (False, True):
        timed = [trial("time", replace, n) for n in range(8)]
        called, n = [], clock.randrange(1, 5)
        while not called or called[-1][0]:
            called.append(trial("call", replace, n))
            n += 4 if len(called) < 8 else 1 + 2 * replace
        for outcomes in (timed, called):
            print(len(outcomes), *(sum(column) for column in zip(*outcomes)))
""")


def test_a_killed_build_goes_on_to_the_same_bytes(photos: Path, tmp_path: Path) -> None:
    seed = str(random.randrange(10**6))
    command = [sys.executable, "-c", KILLER, str(photos), str(tmp_path), seed]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"seed {seed}: {done.stderr[-2000:]}"
    timed, called, timed_again, replaced = (tuple(map(int, r.split())) for r in done.stdout.splitlines())
    assert (timed[0], timed_again[0]) == (8, 8)  # where these end depends on the machine
    for trials, killed, half, _, resumed in (called, replaced):
        assert killed == trials - 1
        assert half >= 5, "no build was killed half way, so nothing was tested"
        assert resumed >= 5, "nothing was left to go on from"
    assert called[3] >= 2  # killed after the rename, and not at all


def test_a_replacement_killed_between_its_renames_gives_the_old_set_back(photos: Path, own: Path) -> None:
    before = contents(own)
    own.rename(own.with_name(".own.old"))
    assert build(settings(photos), own).reused
    assert contents(own) == before


# --- real photographs --------------------------------------------------------------------------------------


@pytest.mark.skipif("GSA_PHOTOS" not in os.environ, reason="GSA_PHOTOS names no class-per-folder pictures")
def test_real_photographs_are_built_and_proved(tmp_path: Path) -> None:
    root = Path(os.environ["GSA_PHOTOS"])
    config = ShardsConfig(name="photos", source="folder", input=str(root))
    manifest = build(config, tmp_path / "a").manifest
    build(config, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert verify(tmp_path / "a") == []
    for split in manifest.splits:
        samples = manifest.split(split)
        for i, origin in enumerate(origins(manifest, split)[:200]):
            data = read_sample(samples, i)
            assert data == (root / origin).read_bytes()
