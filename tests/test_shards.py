"""Shards: built whole or not at all, the same bytes every time, and no damage passes unseen."""

import errno
import hashlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
import tarfile
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import manifest as manifests
from pipeline import verify as proofs
from pipeline.config import ConfigError, InputError, digest, validate
from pipeline.decode import decode
from pipeline.manifest import Manifest, ShardError, read_manifest, read_sample
from pipeline.pictures import ShardsConfig
from pipeline.rundir import hold
from pipeline.shards import build, listing
from pipeline.verify import contact_sheet, table, verify


def picture(number: int, kind: str = "JPEG", size: tuple[int, int] = (12, 9)) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, kind)
    return data.getvalue()


def write_photos(root: Path, classes: dict[str, int]) -> Path:
    number = 0
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            number += 1
            kind, ending = (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"))[i % 3]
            (root / name / f"{i:03d}.{ending}").write_bytes(picture(number, kind))
    return root


def settings(photos: Path, **others: Any) -> ShardsConfig:
    values = {"name": "set", "source": "folder", "input": str(photos), "samples_per_shard": 8, **others}
    return ShardsConfig(**values)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"), {"ant": 10, "bee": 15, "cat": 7})


@pytest.fixture(scope="module")
def built(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "set"
    build(settings(photos), folder)
    return folder


@pytest.fixture
def own(built: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(built, tmp_path / "own")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    config = ShardsConfig(name="digits", source="digits", image_size=8)
    return build(config, tmp_path_factory.mktemp("digits") / "digits").manifest


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def origins(manifest: Manifest, split: str) -> list[str]:
    """The original file of each sample, read by tarfile alone."""
    found = {}
    for path in manifest.split(split).shard_paths:
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    file = tar.extractfile(member)
                    assert file is not None
                    found[member.name.removesuffix(".json")] = json.load(file)["file"]
    return [found[key] for key in manifest.split(split).key]


def rewrite(folder: Path, change: Callable[[dict[str, Any], dict[str, list[Any]]], None]) -> None:
    """Change a manifest as a forger would: with a digest that fits."""
    old = pq.ParquetFile(folder / "manifest.parquet").read()
    values = json.loads(old.schema.metadata[b"gsa"])
    del values["digest"]
    columns = old.to_pydict()
    change(values, columns)
    new = pa.table(columns, schema=manifests.SCHEMA)
    text = json.dumps({**values, "digest": digest(values)})
    pq.write_table(new.replace_schema_metadata({b"gsa": text.encode()}), folder / "manifest.parquet")


def flip(path: Path, position: int, mask: int = 1) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ mask]))


# --- what is built -----------------------------------------------------------------------------------------


def test_every_digit_is_there_once_with_its_pixels_and_label(digits: Manifest) -> None:
    from sklearn.datasets import load_digits

    scans, labels = load_digits(return_X_y=True)
    seen = []
    for split in digits.splits:
        samples = digits.split(split)
        for i, origin in enumerate(origins(digits, split)):
            seen.append(int(origin))
            pixels = np.asarray(decode(read_sample(samples, i)))
            expected = np.rint(scans[int(origin)].reshape(8, 8) * 255 / 16)  # enlarged from 8 to 8
            assert (pixels == expected[:, :, None]).all()
            assert digits.classes[samples.label[i]] == str(labels[int(origin)])
            assert (samples.width[i], samples.height[i]) == (8, 8)
    assert sorted(seen) == list(range(1797))
    assert verify(digits.folder) == []


def test_split_takes_the_same_fraction_of_each_class(digits: Manifest) -> None:
    train, val = (Counter(digits.split(s).label.tolist()) for s in ("train", "val"))
    assert all(val[c] == round(0.2 * (train[c] + val[c])) for c in range(10))


def test_digits_are_enlarged_to_image_size(tmp_path: Path) -> None:
    manifest = build(ShardsConfig(name="d", source="digits"), tmp_path / "d").manifest
    samples = manifest.split("val")
    assert decode(read_sample(samples, 0)).size == (32, 32)
    assert samples.width.tolist() == [32] * len(samples)


@pytest.mark.parametrize("fraction", [0.001, 0.2, 0.5, 0.999])
def test_each_class_keeps_a_train_and_a_val_sample(fraction: float, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "in", {"two": 2, "three": 3, "nine": 9})
    manifest = build(settings(photos, val_fraction=fraction), tmp_path / "set").manifest
    for split in manifest.splits:
        assert set(manifest.split(split).label.tolist()) == {0, 1, 2}
    assert sum(len(manifest.split(s)) for s in manifest.splits) == 14


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
            assert (samples.width[i], samples.height[i]) == (12, 9)
    assert sorted(seen) == sorted(str(p.relative_to(photos)) for p in photos.glob("*/*"))


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # by webdataset
def test_webdataset_reads_what_we_wrote(built: Path) -> None:
    import webdataset

    manifest = read_manifest(built)
    for split in manifest.splits:
        samples = manifest.split(split)
        urls = [str(p) for p in samples.shard_paths]
        found = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
        assert [s["__key__"] for s in found] == samples.key.tolist()
        assert [int(s["cls"]) for s in found] == samples.label.tolist()
        assert [s[e] for s, e in zip(found, samples.ext, strict=True)] == [
            read_sample(samples, i) for i in range(len(samples))
        ]


def test_a_given_split_is_kept(tmp_path: Path) -> None:
    write_photos(tmp_path / "in" / "train", {"ant": 4, "bee": 3, "only train": 2})
    write_photos(tmp_path / "in" / "val", {"ant": 1, "bee": 2, "only val": 2})
    write_photos(tmp_path / "in" / "test", {"ant": 1})
    manifest = build(settings(tmp_path / "in"), tmp_path / "set").manifest
    assert manifest.classes == ("ant", "bee")
    assert manifest.empty_classes == (
        "only train (no readable picture in val)",
        "only val (no readable picture in train)",
    )
    assert manifest.broken == ({"file": "test", "reason": "a folder beside train and val"},)
    for split, counts in (("train", [4, 3]), ("val", [1, 2])):
        assert np.bincount(manifest.split(split).label).tolist() == counts
        assert all(o.startswith(f"{split}/") for o in origins(manifest, split))


def test_a_class_named_train_is_a_class(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "in", {"train": 3, "plane": 3})
    assert build(settings(photos), tmp_path / "set").manifest.classes == ("plane", "train")


def test_what_is_no_picture_is_left_out_and_told(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "in", {"ant": 4, "bee": 4, "dust": 0, "lone": 1, "bad": 0})
    ant = photos / "ant"
    (ant / "text.jpg").write_text("no picture")
    (ant / "empty.png").touch()
    (ant / "cut.JPEG").write_bytes(picture(90, size=(60, 60))[:-400])
    (ant / "gif.jpg").write_bytes(picture(91, "GIF"))
    (ant / "is really.png").write_bytes(picture(92, "JPEG"))
    (ant / "LOUD.JPG").write_bytes(picture(93, "PNG"))
    (ant / "nowhere.jpg").symlink_to("nowhere")
    (ant / "linked.jpg").symlink_to(photos / "bee" / "000.jpg")
    os.mkfifo(ant / "pipe.jpg")
    (ant / "folder.jpg").mkdir()
    (ant / "more").mkdir()
    (ant / "more" / "deep.jpg").write_bytes(picture(94))
    (ant / "notes.txt").touch()
    (ant / ".hidden.jpg").touch()
    (photos / "README").touch()
    (photos / ".git").mkdir()
    (photos / "bad" / "x.jpg").touch()
    (photos / "loop").symlink_to(photos)
    (photos / "self").symlink_to("self")
    manifest = build(settings(photos), tmp_path / "set").manifest
    assert manifest.classes == ("ant", "bee")
    assert manifest.empty_classes == (
        "bad (no readable picture)",
        "dust (no readable picture)",
        "lone (1 readable picture cannot be split)",
    )
    reasons = {b["file"]: b["reason"] for b in manifest.broken}
    assert reasons.pop("ant/cut.JPEG").startswith("image file is truncated")
    assert reasons == {
        "ant/text.jpg": "not a JPEG, PNG, WEBP image (10 bytes)",
        "ant/empty.png": "not a JPEG, PNG, WEBP image (0 bytes)",
        "ant/gif.jpg": f"not a JPEG, PNG, WEBP image ({len(picture(91, 'GIF'))} bytes)",
        "ant/nowhere.jpg": "No such file or directory",
        "ant/pipe.jpg": "not a regular file",
        "ant/folder.jpg": "a folder inside a class folder",
        "ant/more": "a folder inside a class folder",
        "bad/x.jpg": "not a JPEG, PNG, WEBP image (0 bytes)",
    }
    assert manifest.ignored == 3  # notes.txt, README, and the link to itself
    kinds: dict[str, str] = {}
    for split in manifest.splits:
        kinds |= dict(zip(origins(manifest, split), manifest.split(split).ext, strict=True))
    assert len(kinds) == 4 + 3 + 4
    assert (kinds["ant/is really.png"], kinds["ant/LOUD.JPG"], kinds["ant/linked.jpg"]) == (
        "jpg",
        "png",
        "jpg",
    )
    assert verify(manifest.folder) == []


def test_a_file_too_large_for_a_picture_is_not_read(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "in", {"ant": 3, "bee": 3})
    with open(photos / "ant" / "vast.jpg", "wb") as file:
        file.truncate(10**12)  # sparse
    manifest = build(settings(photos), tmp_path / "set").manifest
    assert manifest.broken == ({"file": "ant/vast.jpg", "reason": "1000000000000 bytes are above 200000000"},)


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
    seen: list[tuple[int, int]] = []
    build(settings(bad.parent.parent), tmp_path / "set", progress=lambda *now: seen.append(now))
    assert seen == sorted(set(seen))
    assert seen[0] == (1, 66)
    assert seen[-1] == (66, 66)
    seen.clear()
    verify(tmp_path / "set", lambda *now: seen.append(now))
    assert seen[-1] == (5, 5)


# --- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source": "folder"}, "source folder needs input, a folder of pictures: expected CLASS/picture.jpg"),
        ({"source": "digits", "input": "x"}, "input is for source folder; the digits need none"),
        ({"source": "folder", "input": "x", "image_size": 64}, "image_size is for source digits"),
        ({"source": "folder", "input": ""}, "input: String should have at least 1 character"),
        ({"source": "digits", "val_fraction": 1.0}, "val_fraction: expected less than 1, got 1.0"),
        ({"source": "digits", "val_fraction": 0.0}, "val_fraction: expected greater than 0, got 0.0"),
        ({"source": "digits", "samples_per_shard": 0}, "samples_per_shard: expected greater than 0"),
        ({"source": "digits", "image_size": 4}, "image_size: expected greater than or equal to 8"),
        ({"source": "digits", "name": "../x"}, "name: "),
        ({"source": "imagenet"}, "source: expected 'digits' or 'folder', got 'imagenet'"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate(ShardsConfig, {"name": "x", **values}, where="shards")
    assert message in str(error.value)


def test_settings_survive_their_own_dump(photos: Path) -> None:
    for config in (settings(photos), ShardsConfig(name="d", source="digits", image_size=64)):
        assert ShardsConfig.model_validate(config.model_dump(mode="json")) == config


def refusal(config: ShardsConfig, folder: Path, **options: Any) -> str:
    """The message of a refused build, which leaves nothing behind."""
    before = sorted(p.name for p in folder.parent.glob("*"))
    with pytest.raises(InputError) as error:
        build(config, folder, **options)
    left = sorted(p.name for p in folder.parent.glob("*") if not p.name.endswith(".lock"))
    assert left == [b for b in before if not b.endswith(".lock")]
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_without_classes_is_refused(tmp_path: Path) -> None:
    root, folder = tmp_path / "in", tmp_path / "set"
    assert "no such folder; expected CLASS/picture.jpg, or train/CLASS" in refusal(settings(root), folder)
    root.mkdir()
    assert "no sub-folders, so no classes; expected CLASS/picture.jpg" in refusal(settings(root), folder)
    write_photos(root, {"ant": 3, "bee": 1})
    assert (
        "expected at least 2 classes with readable pictures, found 1; left out: "
        "bee (1 readable picture cannot be split); expected CLASS/" in refusal(settings(root), folder)
    )
    write_photos(root / "train", {"ant": 3, "bee": 3})  # and no val/
    assert "found 1; left out: bee (1" in refusal(settings(root), folder)


def test_a_folder_that_may_not_be_listed_is_refused(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert "cannot be listed: [Errno 13] Permission denied" in refusal(settings(photos), tmp_path / "set")


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


def test_a_picture_that_changes_during_the_build_is_seen(photos: Path, tmp_path: Path) -> None:
    root = shutil.copytree(photos, tmp_path / "in")
    victim = root / "bee" / "003.jpg"

    def change(done: int, total: int) -> None:
        if done == 32:
            victim.write_bytes(picture(77))

    message = refusal(settings(root), tmp_path / "set", progress=change)
    assert f"{str(victim)!r}: changed while the shards were built" in message

    def remove(done: int, total: int) -> None:
        if done == 32:
            victim.unlink()

    message = refusal(settings(root), tmp_path / "set", progress=remove)
    assert f"{str(victim)!r}: was readable, and is no more: [Errno 2]" in message


@pytest.mark.parametrize("limit", [0, 4_000, 30_000])
def test_no_room_is_said_and_leaves_nothing(limit: int, photos: Path, tmp_path: Path) -> None:
    """The system refuses to write past `limit` bytes a file, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    config = settings(photos, samples_per_shard=1000)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        message = refusal(config, tmp_path / "set")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "set: cannot be written: File too large (" in message
    assert "bytes are free without it); next: make room there" in message
    assert verify(build(config, tmp_path / "set").manifest.folder) == []


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
        InputError, match=r"own: cannot be written: No space left on device \(\d+ bytes are f"
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
    from pipeline.pictures import ShardsConfig
    from pipeline.shards import build

    photos, place, clock = sys.argv[1], Path(sys.argv[2]), random.Random(int(sys.argv[3]))
    read = lambda folder: {p.name: p.read_bytes() for p in folder.iterdir()}
    os.fsync = lambda descriptor: None  # a kill, unlike a power cut, loses nothing that was written
    fixed = dict(name="s", source="folder", input=photos, samples_per_shard=20)
    config = [ShardsConfig(**fixed, seed=seed) for seed in (0, 1)]
    build(config[0], place / "good0")
    started = time.perf_counter()
    build(config[1], place / "good1")
    seconds = time.perf_counter() - started
    good = [read(place / "good0"), read(place / "good1")]

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
        for name in ("fsync", "rename", "mkdir", "rmdir", "unlink"):
            setattr(os, name, counted(getattr(os, name)))

    def leftovers():
        return [p.name for p in place.glob(".set.*") if p.name != ".set.lock"]

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
        build(config[1], folder, replace=replace)
        assert read(folder) == good[1], (mode, replace, n)
        assert not leftovers(), (mode, replace, n)
        shutil.rmtree(folder)
        return killed, half, there

    for replace in (False, True):
        timed = [trial("time", replace, n) for n in range(12)]
        called = [trial("call", replace, 1)]
        while called[-1][0]:
            called.append(trial("call", replace, len(called) + 1))
        for outcomes in (timed, called):
            print(len(outcomes), *(sum(column) for column in zip(*outcomes)))
""")


def test_a_killed_build_leaves_no_half_set(photos: Path, tmp_path: Path) -> None:
    seed = str(random.randrange(10**6))
    command = [sys.executable, "-c", KILLER, str(photos), str(tmp_path), seed]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"seed {seed}: {done.stderr[-2000:]}"
    timed, called, timed_again, replaced = (tuple(map(int, r.split())) for r in done.stdout.splitlines())
    assert (timed[0], timed_again[0]) == (12, 12)  # where these end depends on the machine
    for trials, killed, half, _ in (called, replaced):
        assert killed == trials - 1
        assert half >= 5, "no build was killed half way, so nothing was tested"
    assert called[-1] >= 2  # killed after the rename, and not at all
    assert replaced[-1] == replaced[0] - 1  # all but the one between the two renames


def test_a_replacement_killed_between_its_renames_gives_the_old_set_back(photos: Path, own: Path) -> None:
    before = contents(own)
    own.rename(own.with_name(".own.old"))
    shutil.copytree(own.with_name(".own.old"), own.with_name(".own.building"))
    assert build(settings(photos), own).reused
    assert contents(own) == before
    assert not own.with_name(".own.building").exists()


# --- read --------------------------------------------------------------------------------------------------


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
        lambda p: rewrite(p.parent, lambda values, rows: values.update(version=2)),
        r"expected version 1, got 2; next: read it with the release that made it",
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


def set_row(column: str, value: Any) -> Callable[[dict[str, Any], dict[str, list[Any]]], None]:
    return lambda values, rows: rows[column].__setitem__(0, value)


def drop_row(values: dict[str, Any], rows: dict[str, list[Any]]) -> None:
    for column in rows.values():
        column.pop(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_row, "train-000000.tar: expected 8 rows, got 7"),
        (set_row("label", 3), "train-000000.tar: a label without a class: train-00000000"),
        (set_row("label", -1), "train-000000.tar: a label without a class: train-00000000"),
        (set_row("offset", -1), "train-000000.tar: a row points outside of the file: train-00000000"),
        (set_row("size", 2**62), "train-000000.tar: a row points outside of the file: train-00000000"),
        (set_row("offset", 2**63 - 1), "train-000000.tar: a row points outside of the file"),
        (set_row("shard", "train-000009.tar"), "train: rows of a shard that is not listed"),
        (set_row("split", "test"), "32 rows, not all of them in train or val"),
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
    good, whole, refused = read_manifest(built), path.read_bytes(), 0
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
        for split in good.splits:
            for column in manifests.SCHEMA.names[2:]:
                expected = getattr(good.split(split), column).tolist()
                assert getattr(found.split(split), column).tolist() == expected
    assert refused > 100


def test_read_sample_tells_damage_by_shard_and_key(own: Path) -> None:
    samples = read_manifest(own).split("train")
    path = samples.shard_paths[0]
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
    assert pickle.loads(pickle.dumps(samples)).key.tolist() == samples.key.tolist()


def test_every_flipped_bit_of_a_picture_is_caught_on_reading(own: Path) -> None:
    samples = read_manifest(own).split("val")
    for i in range(len(samples)):
        for position in range(0, int(samples.size[i]), 37):
            where = int(samples.offset[i]) + position
            flip(samples.shard_paths[0], where, 1 << position % 8)
            with pytest.raises(ShardError, match=str(samples.key[i])):
                read_sample(samples, i)
            flip(samples.shard_paths[0], where, 1 << position % 8)
        read_sample(samples, i)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_samples_are_read_from_threads_forks_and_copies(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = read_manifest(built).split("train")
    expected = [read_sample(samples, i) for i in range(len(samples))]
    copy = pickle.loads(pickle.dumps(samples))
    assert [read_sample(copy, i) for i in range(len(copy))] == expected
    order = list(range(len(samples))) * 40
    random.Random(0).shuffle(order)
    for most in (256, 2, 0):  # descriptors kept
        monkeypatch.setattr(manifests, "MAX_OPEN", most)
        fresh = pickle.loads(pickle.dumps(samples))
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda i, s=fresh: read_sample(s, i), order))
        assert found == [expected[i] for i in order]
        assert len(fresh.files._open) <= most + 8
    child = os.fork()
    if not child:
        os._exit(0 if [read_sample(samples, i) for i in range(len(samples))] == expected else 1)
    assert os.waitpid(child, 0)[1] == 0


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


# --- prove -------------------------------------------------------------------------------------------------


def test_any_flipped_byte_of_a_shard_is_caught(own: Path) -> None:
    assert verify(own) == []
    rng = random.Random(1)
    for _ in range(200):
        path = rng.choice(sorted(own.glob("*.tar")))
        where, mask = rng.randrange(path.stat().st_size), rng.randrange(1, 256)
        flip(path, where, mask)
        faults = verify(own)
        assert len(faults) == 1
        assert faults[0].startswith(f"{path.name}: sha256 differs; damaged pictures: ")
        flip(path, where, mask)
    assert verify(own) == []


def test_verify_names_the_pictures_that_are_damaged(own: Path) -> None:
    samples = read_manifest(own).split("train")
    path = samples.shard_paths[1]
    here = np.flatnonzero(samples.shard == 1)
    flip(path, int(samples.offset[here[2]]))
    assert verify(own) == [f"{path.name}: sha256 differs; damaged pictures: {samples.key[here[2]]}"]
    for i in here:
        if i != here[2]:
            flip(path, int(samples.offset[i]))
    keys = ", ".join(samples.key[here[:3]])
    assert verify(own) == [f"{path.name}: sha256 differs; damaged pictures: {keys} and 5 more"]


def test_a_flip_outside_of_the_pictures_says_so(own: Path) -> None:
    flip(own / "val-000000.tar", 3)
    assert verify(own) == [
        "val-000000.tar: sha256 differs; damaged pictures: none, but headers, labels or padding"
    ]


def test_any_cut_of_a_shard_is_caught(own: Path) -> None:
    path = own / "train-000001.tar"
    whole, rng = path.read_bytes(), random.Random(2)
    lengths = [0, 1, 511, 512, 513, len(whole) - 1, len(whole) - 512, len(whole) - 10240, len(whole) + 512]
    lengths += [512 * rng.randrange(len(whole) // 512) for _ in range(40)]
    lengths += [rng.randrange(len(whole)) for _ in range(40)]
    for length in lengths:
        path.write_bytes(whole[:length] + b"\0" * (length - len(whole)))
        faults = verify(own)
        assert len(faults) == 1
        assert faults[0].startswith(f"train-000001.tar: expected {len(whole)} bytes, got {length}; damaged")


def test_missing_and_surplus_shards_are_caught(own: Path) -> None:
    (own / "train-000002.tar").rename(own / "train-000007.tar")
    (own / "val-000000.tar").unlink()
    (own / "val-000000.tar").mkdir()
    assert verify(own) == [
        "'train-000007.tar': not in the manifest",
        "train-000002.tar: missing",
        "val-000000.tar: missing",
    ]


def test_swapped_shards_are_caught(own: Path) -> None:
    (own / "train-000000.tar").rename(own / "x")
    (own / "train-000001.tar").rename(own / "train-000000.tar")
    (own / "x").rename(own / "train-000001.tar")
    assert [f.split(":")[0] for f in verify(own)] == ["train-000000.tar", "train-000001.tar"]


@pytest.mark.parametrize(
    ("column", "value", "fault"),
    [
        ("label", None, "label differs from the manifest's: train-00000000"),
        ("crc32", 5, "crc32 differs from the manifest's: train-00000000"),
        ("offset", 1024, "no picture where the manifest says: train-00000000"),
        ("size", 9, "no picture where the manifest says: train-00000000"),
        ("ext", "gif", "no picture where the manifest says: train-00000000"),
        ("key", "../../evil", "no picture where the manifest says: ../../evil"),
    ],
)
def test_a_row_that_does_not_match_its_members_is_caught(
    column: str, value: Any, fault: str, own: Path, built: Path
) -> None:
    if column == "label":
        value = (int(read_manifest(built).split("train").label[0]) + 1) % 3
    rewrite(own, set_row(column, value))
    assert f"train-000000.tar: {fault}" in verify(own)


def forge(
    folder: Path, change: Callable[[tarfile.TarInfo, bytes], list[tuple[tarfile.TarInfo, bytes]]]
) -> None:
    """Rewrite the members of val-000000.tar, and the manifest's sha256, size and offsets with them."""
    path, data, places = folder / "val-000000.tar", io.BytesIO(), {}
    with tarfile.open(path) as old, tarfile.open(fileobj=data, mode="w") as new:
        for member in old.getmembers():
            file = old.extractfile(member)
            assert file is not None
            for info, content in change(member, file.read()):
                info.size = len(content)
                new.addfile(info, io.BytesIO(content))
    path.write_bytes(data.getvalue())
    with tarfile.open(path) as tar:
        places = {m.name.rpartition(".")[0]: m.offset_data for m in tar if m.name[-3:] not in ("cls", "son")}

    def seal(values: dict[str, Any], rows: dict[str, list[Any]]) -> None:
        values["shards"][-1].update(
            sha256=hashlib.sha256(data.getvalue()).hexdigest(), bytes=len(data.getvalue())
        )
        rows["offset"] = [places.get(k, o) for k, o in zip(rows["key"], rows["offset"], strict=True)]

    rewrite(folder, seal)


def test_a_forged_shard_is_caught_by_its_members(own: Path) -> None:
    forge(own, lambda info, data: [(info, data)])
    assert verify(own) == []
    forge(own, lambda info, data: [(info, b"01" if info.name.endswith("2.cls") else data)])
    assert verify(own) == ["val-000000.tar: label differs from the manifest's: val-00000002"]


def test_lacking_and_surplus_members_are_caught(own: Path) -> None:
    evil = [
        tarfile.TarInfo("../../evil.jpg"),
        tarfile.TarInfo("/etc/evil"),
        tarfile.TarInfo("val-00000009.pyd"),
    ]
    links = tarfile.TarInfo("link")
    links.type, links.linkname = tarfile.SYMTYPE, "/etc/passwd"

    def change(info: tarfile.TarInfo, data: bytes) -> list[tuple[tarfile.TarInfo, bytes]]:
        if info.name == "val-00000000.json" or info.name == "val-00000003.cls":
            return []
        if info.name == "val-00000004.cls":
            return [(info, data), (info, data), *((e, b"x") for e in evil), (links, b"")]
        return [(info, data)]

    forge(own, change)
    assert verify(own) == [
        "val-000000.tar: no .cls or no .json member: val-00000000, val-00000003",
        "val-000000.tar: members that the manifest does not know: "
        "'val-00000004.cls', '../../evil.jpg', '/etc/evil' and 2 more",
    ]
    assert sorted(p.name for p in own.parent.iterdir()) == ["own"]  # and nothing was written anywhere


def test_what_is_no_tar_is_caught_even_with_its_sha256(own: Path) -> None:
    path = own / "val-000000.tar"
    for junk in (b"x" * path.stat().st_size, b"\0" * path.stat().st_size):
        path.write_bytes(junk)
        sha256 = hashlib.sha256(junk).hexdigest()
        rewrite(own, lambda values, rows, sha256=sha256: values["shards"][-1].update(sha256=sha256))
        faults = verify(own)
        assert faults
        assert all(f.startswith("val-000000.tar: ") for f in faults)


def test_a_shard_that_cannot_be_read_is_a_fault(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    assert verify(own)[0] == "train-000000.tar: cannot be read: Input/output error"


def test_reading_and_proving_need_no_torch(built: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from pipeline.verify import verify\n"
        "assert verify(Path(sys.argv[1])) == []\n"
        "print([m for m in ('torch', 'webdataset', 'sklearn') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(built)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- show --------------------------------------------------------------------------------------------------


def test_contact_sheet_spreads_over_the_classes(digits: Manifest, tmp_path: Path) -> None:
    labels = digits.split("train").label
    chosen = proofs._round_robin(labels)
    assert labels[chosen[:30]].tolist() == list(range(10)) * 3
    assert sorted(chosen) == list(range(len(labels)))
    contact_sheet(digits, tmp_path / "sheet.png", n=10)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert (sheet.format, sheet.size) == ("PNG", (4 * 96, 3 * 110))
        assert len(sheet.getcolors(1 << 20) or []) > 20
    assert [p.name for p in tmp_path.iterdir()] == ["sheet.png"]
    with pytest.raises(InputError, match="expected at least 1 sample on the sheet, got 0"):
        contact_sheet(digits, tmp_path / "none.png", n=0)


def test_contact_sheet_takes_any_shape(tmp_path: Path) -> None:
    for name, size in {"tall": (1, 300), "wide": (700, 2), "one": (1, 1)}.items():
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(2):
            (tmp_path / "in" / name / f"{i}.png").write_bytes(picture(i, "PNG", size))
    contact_sheet(build(settings(tmp_path / "in"), tmp_path / "set").manifest, tmp_path / "sheet.png")


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
            assert decode(data).size == (samples.width[i], samples.height[i])
