"""The index of foreign tars: what is in them, every damage named, and nothing in them is ever trusted."""

import io
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image
from web import Web, serve

from pipeline import cli, foreign, remote
from pipeline.config import ConfigError, InputError, validate
from pipeline.foreign import IndexConfig, index
from pipeline.manifest import Manifest, ShardError, read_manifest, read_sample
from pipeline.scan import scan

Members = list[tuple[str, bytes]]
FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GSA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(remote, "PAUSES_S", (0.01, 0.01))


@pytest.fixture
def web() -> Iterator[Web]:
    with serve() as web:
        yield web


@cache
def photo(number: int, ending: str = "png") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (7, 9, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, FORMATS[ending.lower()])
    return file.getvalue()


def blank(side: int) -> bytes:
    file = io.BytesIO()
    Image.new("1", (side, side)).save(file, "PNG", compress_level=1)
    return file.getvalue()


def sample(number: int, *, label: int | None = None, ending: str = "png", key: str | None = None) -> Members:
    key = key or f"{number:05d}"
    text = str(number % 3 if label is None else label).encode()
    return [(f"{key}.{ending}", photo(number, ending)), (f"{key}.cls", text)]


def samples(count: int, first: int = 0) -> Members:
    return [member for n in range(first, first + count) for member in sample(n)]


def write_tar(path: Path, members: Members, *, kind: int = tarfile.PAX_FORMAT, **types: bytes) -> Path:
    """`types` {key: member type} for the members of that key."""
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.mtime = 1.5  # not whole: a PAX header before each member, as webdataset writes it
            info.type = types.get(name.partition(".")[0], tarfile.REGTYPE)
            info.linkname = "/etc/passwd" if info.type in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            info.size = len(data) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(data))
    return path


def indexed(*train: str | Path, val: tuple[str, ...] = (), replace: bool = False, **others: Any) -> Manifest:
    values = {"name": "set", "train": [str(t) for t in train], "val": list(val), **others}
    return index(validate(IndexConfig, values, where="test"), Path("out/set"), replace=replace)


def rows(manifest: Manifest, split: str = "train") -> list[tuple[str, int, str]]:
    s = manifest.split(split)
    return [(s.key(i), int(s.label[i]), str(s.ext[i])) for i in range(len(s))]


def pictures(manifest: Manifest, split: str = "train") -> list[bytes]:
    return [read_sample(manifest.split(split), i) for i in range(len(manifest.split(split)))]


# --- what is found -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("checksums", [False, True])
@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_every_sample_is_found_with_its_bytes(checksums: bool, kind: int) -> None:
    endings = ["jpg", "JPEG", "png", "WebP", "jpeg"]
    long = "deep/" * 25 + "00003" if kind != tarfile.USTAR_FORMAT else "deep/00003"
    keys = ["00000", "a/b.c/00001", "00002", long, "zoë 'x'"]
    members = [
        m for n, (e, k) in enumerate(zip(endings, keys, strict=True)) for m in sample(n, ending=e, key=k)
    ]
    write_tar(
        Path("a.tar"),
        [*members, ("notes.txt", b"hello"), ("README", b"x"), ("00000.seg.png", b"x")],
        kind=kind,
    )
    manifest = indexed("a.tar", checksums=checksums)
    assert rows(manifest) == [
        (k, n % 3, e.lower()) for n, (e, k) in enumerate(zip(endings, keys, strict=True))
    ]
    assert pictures(manifest) == [photo(n, e) for n, e in enumerate(endings)]
    assert manifest.classes == ("0", "1", "2")
    assert (manifest.broken, manifest.ignored) == ((), 3)
    (shard,) = manifest.shards
    assert (shard.path, shard.bytes) == (os.path.abspath("a.tar"), os.path.getsize("a.tar"))
    columns = foreign.pa.parquet.read_table("out/set/manifest.parquet").to_pydict()
    assert set(columns["width"]) == ({9} if checksums else {None})
    assert set(columns["height"]) == ({7} if checksums else {None})
    assert (manifest.split("train").crc32 is not None, bool(shard.sha256)) == (checksums, checksums)


def test_webdataset_groups_the_same_samples() -> None:
    import webdataset
    from webdataset.tariterators import group_by_keys, tar_file_iterator

    with webdataset.ShardWriter("%02d.tar", maxcount=4, verbose=0) as writer:
        for n in range(10):
            writer.write(
                {"__key__": f"k.5/{n}", "a.jpg": b"x", "jpg": photo(n, "jpg"), "cls": n, "json": {"n": n}}
            )
    expected = []
    for n in range(3):
        with open(f"{n:02d}.tar", "rb") as file:
            members = ({**member, "__url__": ""} for member in tar_file_iterator(file))
            expected += [(s["__key__"], int(s["cls"]), s["jpg"]) for s in group_by_keys(members)]
    manifest = indexed("{00..02}.tar")
    labels = [row[:2] for row in rows(manifest)]
    assert [(*row, data) for row, data in zip(labels, pictures(manifest), strict=True)] == expected
    assert len(expected) == 10


def test_members_of_a_key_may_stand_apart() -> None:
    members = samples(6)
    write_tar(Path("a.tar"), members[::2] + members[1::2])
    assert rows(indexed("a.tar")) == [(f"{n:05d}", n % 3, "png") for n in range(6)]


@pytest.mark.parametrize(
    ("labels", "classes", "names", "numbers"),
    [
        ([2, 0, 1], None, ("0", "1", "2"), [2, 0, 1]),
        (["cat", "ant", "cat"], None, ("ant", "cat"), [1, 0, 1]),
        (["cat", "ant", 2], "dog\ncat\nant\n", ("dog", "cat", "ant"), [1, 2, 2]),
    ],
)
def test_a_label_may_be_a_field_of_the_json(
    labels: list[Any], classes: str | None, names: tuple[str, ...], numbers: list[int]
) -> None:
    members: Members = []
    for n, label in enumerate(labels):
        members += [(f"{n}.png", photo(n)), (f"{n}.json", json.dumps({"y": label, "x": [1]}).encode())]
    write_tar(Path("a.tar"), members)
    if classes:
        Path("names").write_text(classes)
    manifest = indexed("a.tar", label_field="y", classes="names" if classes else None)
    assert manifest.classes == names
    assert manifest.split("train").label.tolist() == numbers


def test_splits_and_patterns() -> None:
    Path("d [1]").mkdir()
    for n in range(8, 12):
        write_tar(Path(f"t-{n:03d}.tar"), samples(3, n * 3))
        write_tar(Path(f"d [1]/{n}.tar"), samples(3, n * 3))
    manifest = indexed("t-{008..010}.tar", "./t-01[1].tar", val=("d [1]",))
    assert [s.path for s in manifest.shards] == [
        *(os.path.abspath(f"t-{n:03d}.tar") for n in range(8, 12)),
        *(os.path.abspath(f"d [1]/{n}.tar") for n in (10, 11, 8, 9)),
    ]
    assert [k for k, _, _ in rows(manifest)] == [f"{n:05d}" for n in range(24, 36)]
    assert len(manifest.split("val")) == 12
    again = indexed("{t-008,t-009}.tar", replace=True)
    assert [s.name for s in again.shards] == ["t-008.tar", "t-009.tar"]
    assert (len(again.split("val")), again.split("val").shards) == (0, ())
    same_names = indexed("t-008.tar", val=("d [1]/8.tar", "t-009.tar"), replace=True)
    assert same_names.splits == ("train", "val")


def test_tars_of_the_same_name_are_told_apart() -> None:
    for folder in ("a", "b"):
        Path(folder).mkdir()
        write_tar(Path(folder, "0.tar"), samples(3, 3 * (folder == "b")))
    manifest = indexed("a", val=("b",))
    assert len({s.name for s in manifest.shards}) == 2
    assert pictures(manifest, "val") == [photo(n) for n in range(3, 6)]


def test_processes_find_what_one_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(4):
        write_tar(Path(f"{n}.tar"), samples(3, n * 3))
    alone = indexed("{0..3}.tar", checksums=True)
    monkeypatch.setattr(foreign, "_processes", lambda tars, checksums: 2)
    assert indexed("{0..3}.tar", checksums=True, replace=True).digest == alone.digest


# --- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("pipe:cat a.tar", "pipe: is not read"),
        ("file:///a.tar", "file: is not read"),
        ("ftp://h/a.tar", "ftp: is not read"),
        ("HTTP://h/a.tar", "HTTP: is not read"),
        ("http:a.tar", "http: is not read"),
        ("simplecache::http://h/a.tar", "chains"),
        ("https://me:pw@h/a.tar", "'https://h/a.tar': expected a URL without user, password or query"),
        ("https://h/a.tar?token=pw", "'https://h/a.tar': expected a URL without user, password or query"),
        ("https://h/{0..1}.tar?X-Sig=pw@h/", "'https://h/{0..1}.tar': expected a URL without user"),
        ("HTTPS://me:p'w @h/a.tar", "'HTTPS://h/a.tar': expected a URL without user"),
        ("ftp://me:pw@h/a\nb.tar", "expected a URL without user"),
        ("simplecache::https://me:pw@h/a.tar", "'simplecache::https://h/a.tar': expected a URL without user"),
        ("https://h/*.tar", "no globs"),
        ("none.tar", "not there: 'none.tar'"),
        ("none-{00..12}.tar", "'none-00.tar', 'none-01.tar', 'none-02.tar' and 10 more"),
        ("none-*.tar", "no .tar file matches"),
        ("empty", "no .tar file matches"),
        ("{9..1}.tar", "expected a range that rises"),
        ("{0..99999999999}.tar", "expected a range that rises"),
        ("a\nb.tar", "cannot be printed"),
        ("pipe", "no regular files"),
    ],
)
def test_tars_that_are_not_read_are_named(train: str, message: str) -> None:
    Path("empty").mkdir()
    os.mkfifo("pipe")
    with pytest.raises(InputError) as caught:
        indexed(train)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value) and "me:pw" not in str(caught.value)


def test_a_tar_is_given_once() -> None:
    write_tar(Path("a.tar"), samples(3))
    os.symlink("a.tar", "b.tar")
    with pytest.raises(InputError, match=r"named twice: .*a\.tar"):
        indexed("a.tar", val=("b.tar",))


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("x.png", photo(0))], "expected one .cls member, got none"),
        ([("x.cls", b"0")], "expected one picture, got none"),
        ([("x.png", photo(0)), ("x.jpg", photo(0)), ("x.cls", b"0")], "expected one picture, got 2"),
        (sample(0, key="x") * 2, "expected one picture, got 2"),
        ([("x.png", photo(0)), ("x.cls", b"0"), ("x.CLS", b"1")], "expected one .cls member, got 2"),
        ([("x.png", photo(0)), ("x.cls", b"cat")], "label 'cat' is no class number"),
        ([("x.png", photo(0)), ("x.cls", b"-1")], "label '-1' is no class number"),
        ([("x.png", photo(0)), ("x.cls", b"\xd9\xa3")], "is no class number"),
        ([("x.png", photo(0)), ("x.cls", b"9" * 9)], "label 999999999 is not within"),
        ([("x.png", photo(0)), ("x.cls", b"")], "x.cls has 0 bytes"),
        ([("x.png", b""), ("x.cls", b"0")], "x.png has 0 bytes"),
        ([("x.png", b"GIF89a..."), ("x.cls", b"0")], "no JPEG, PNG, WEBP image"),
        ([("x.png", blank(8000)), ("x.cls", b"0")], "8000x8000 is above"),
    ],
)
def test_a_broken_sample_is_left_out_and_named(members: Members, reason: str) -> None:
    write_tar(Path("a.tar"), [*samples(100), *members])
    manifest = indexed("a.tar", checksums=True)
    (row,) = manifest.broken
    assert row["file"] == f"{os.path.abspath('a.tar')}, x"
    assert reason in row["reason"]
    assert pictures(manifest) == [photo(n) for n in range(100)]


@pytest.mark.parametrize(
    "text",
    [
        b"{",
        b"[1]",
        b"3",
        b'{"z": 1}',
        b'{"y": 1.5}',
        b'{"y": true}',
        b'{"y": "a\\nb"}',
        b'{"y": ""}',
        b"[" * 9000,
        b'{"y": ' + b"1" * 5000 + b"}",
        b"\xff",
        b'{"y": -1}',
    ],
)
def test_a_json_without_a_label_is_named(text: bytes) -> None:
    good = [
        (f"{n}.{e}", d) for n in range(100) for e, d in (("png", photo(n)), ("json", b'{"y": %d}' % (n % 2)))
    ]
    write_tar(Path("a.tar"), [*good, ("x.png", photo(0)), ("x.json", text)])
    (row,) = indexed("a.tar", label_field="y").broken
    assert "field 'y'" in row["reason"] or "label" in row["reason"]


def test_labels_outside_of_the_classes_are_named() -> None:
    write_tar(Path("a.tar"), [*samples(300), *sample(300, label=3, key="x")])
    Path("names").write_text("a\nb\nc\n")
    manifest = indexed("a.tar", classes="names")
    assert manifest.broken == (
        {"file": f"{os.path.abspath('a.tar')}, x", "reason": "label 3 is none of the 3 classes"},
    )
    Path("names").write_text("a\nb\n")
    with pytest.raises(
        InputError,
        match=r"--classes: expected a name for every label, got 2 names \(for labels 0\.\.1\); "
        r"101 of 301 samples have others: 2, 3; next: ",
    ):
        indexed("a.tar", classes="names", replace=True)


@pytest.mark.parametrize("text", ["a\n", "a\na\n", "a\n\nb\n", "a\x07\nb\n"])
def test_a_file_of_classes_that_is_none_is_refused(text: str) -> None:
    Path("names").write_text(text)
    with pytest.raises(InputError, match="--classes names: expected at least 2 names"):
        indexed("a.tar", classes="names")


def test_labels_that_make_no_classes_are_refused() -> None:
    write_tar(Path("a.tar"), [m for n in range(3) for m in sample(n, label=0)])
    with pytest.raises(InputError, match="expected at least 2 classes, got 1: '0'"):
        indexed("a.tar")
    mixed = [
        (f"{n}.{e}", d)
        for n, y in enumerate((b'"cat"', b"1"))
        for e, d in (("png", photo(n)), ("json", b'{"y": %s}' % y))
    ]
    write_tar(Path("a.tar"), mixed)
    with pytest.raises(InputError, match="got both: 'cat' and 1; next: --classes"):
        indexed("a.tar", label_field="y")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_named_and_never_followed(kind: bytes) -> None:
    write_tar(
        Path("a.tar"), [*samples(200), ("x.png", b""), ("x.cls", b""), ("link.txt", b"")], x=kind, link=kind
    )
    manifest = indexed("a.tar")
    assert [row["file"].rpartition(", ")[2] for row in manifest.broken] == ["link.txt", "x"]
    assert all(row["reason"].split(" is ")[-1].startswith("a ") for row in manifest.broken)


@pytest.mark.parametrize("key", ["../../x", "/etc/x", "a/../../x", "C:\\x", "a=b", "-rf", "%d", "x" * 900])
def test_a_key_is_only_a_string(key: str, tmp_path: Path) -> None:
    write_tar(Path("a.tar"), [*samples(3), *sample(3, key=key)])
    assert rows(indexed("a.tar", checksums=True))[-1] == (key, 0, "png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar", "out"]


@pytest.mark.parametrize("key", ["a\nb", "a\x1b[2Jb", "a\u202eb", "a\udcffb", "x" * 5000])
def test_a_name_that_cannot_be_printed_is_left_out(key: str) -> None:
    write_tar(Path("a.tar"), [*samples(200), *sample(200, key=key)])
    manifest = indexed("a.tar")
    assert len(manifest.broken) == 2
    for row in manifest.broken:
        assert row["reason"] == "a member's name that cannot be printed"
        assert row["file"].isprintable() and len(row["file"]) < 700


class Canary:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return open, ("canary", "w")


def test_nothing_is_unpickled() -> None:
    evil = [
        (f"00000.{e}", pickle.dumps(Canary())) for e in ("pyd", "pkl", "pickle", "pth", "pt", "npy", "mp")
    ]
    write_tar(Path("a.tar"), samples(3) + evil)
    manifest = indexed("a.tar", checksums=True)
    assert (manifest.ignored, len(pictures(manifest))) == (7, 3)
    assert not Path("canary").exists()


# --- damage ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cut short: it ends at byte 0"),
        (bytes(10240), "no sample in it"),
        (b"\x1f\x8b" + bytes(2000), "compressed: expected a plain .tar"),
        (b"x" * 4096, "damaged header"),
    ],
    ids=["empty", "zeros", "gzip", "noise"],
)
def test_a_file_that_is_no_tar_is_named(data: bytes, message: str) -> None:
    write_tar(Path("a.tar"), samples(3))
    Path("b.tar").write_bytes(data)
    with pytest.raises(ShardError, match=rf"1 of 2 tars cannot be indexed: .*b\.tar: .*{message}"):
        indexed("a.tar", "b.tar")


def members_end(path: Path) -> int:
    """The byte where the two zero blocks begin."""
    with tarfile.open(path) as tar:
        tar.getmembers()
        return tar.offset


def lost(manifest: Manifest, expected: list[bytes]) -> int:
    """How many samples raise, each by its name; all others have their bytes."""
    samples, count = manifest.split("train"), 0
    for i, data in enumerate(expected):
        try:
            assert read_sample(samples, i) == data
        except ShardError as error:
            assert str(error).startswith(f"{os.path.abspath('a.tar')}, sample {samples.key(i)}: ")
            count += 1
    return count


def test_every_cut_is_named() -> None:
    """400 cuts: webdataset loses samples silently in 13 % of such."""
    path = write_tar(Path("a.tar"), samples(12))
    manifest, data, end = indexed(path, checksums=True), path.read_bytes(), members_end(path)
    whole, rng = pictures(manifest), random.Random(0)
    ends = manifest.split("train").offset + manifest.split("train").size
    anywhere = [rng.randrange(end + 1024) for _ in range(200)]
    in_blocks = [512 * rng.randrange(end // 512 + 2) for _ in range(200)]
    for n, cut in enumerate(anywhere + in_blocks):
        path.write_bytes(data[:cut])
        assert scan("a.tar", label_field=None, checksums=bool(n % 2)).fault.startswith(
            "a.tar: cut short: it ends at"
        )
        assert lost(manifest, whole) == (ends > cut).sum()
    with pytest.raises(
        ShardError, match=r"1 of 1 tars cannot be indexed: .*a\.tar: cut short: it ends at byte"
    ):
        indexed(path, replace=True)


def test_no_flipped_bit_passes_unseen() -> None:
    """400 flips: those in a picture fail when it is read; no other changes what an index finds but labels."""
    path = write_tar(Path("a.tar"), samples(12))
    manifest, data = indexed(path, checksums=True), bytearray(path.read_bytes())
    whole, rng, end = pictures(manifest), random.Random(0), members_end(path)
    with tarfile.open(path) as tar:
        places = {m.name: range(m.offset_data, m.offset_data + m.size) for m in tar}
    expected, refused = scan("a.tar", label_field=None, checksums=False), 0
    for n in range(400):
        position, bit = rng.randrange(end + 1024), 1 << rng.randrange(8)
        data[position] ^= bit
        path.write_bytes(data)
        data[position] ^= bit
        hit = next((name for name, place in places.items() if position in place), "")
        assert lost(manifest, whole) == hit.endswith(".png")
        found = scan("a.tar", label_field=None, checksums=bool(n % 2))
        if found.fault:
            assert found.fault.startswith("a.tar: damaged")
            refused += 1
            continue
        assert len(found.samples) + len(found.broken) == 12
        if not hit.endswith(".cls"):
            left = [s._replace(crc32=None, width=None, height=None) for s in found.samples]
            missing = [s for s in expected.samples if s not in left]
            assert len(missing) == len(found.broken) <= hit.endswith(".png")  # a picture's own header
    assert refused > 50


# --- remote ------------------------------------------------------------------------------------------------


def test_remote_tars_are_indexed_in_one_pass_each(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(2):
        web.put(f"{n}.tar", write_tar(Path(f"{n}.tar"), samples(3, 3 * n)).read_bytes())
    monkeypatch.setattr(foreign, "_processes", lambda tars, checksums: 1)
    web.failures = 1
    manifest = indexed(web.url("{0..1}.tar"))
    assert sum(web.gets.values()) == 3
    assert [s.path for s in manifest.shards] == [web.url("0.tar"), web.url("1.tar")]
    assert all(s.sha256 for s in manifest.shards)
    assert pictures(manifest) == [photo(n) for n in range(6)]
    local = indexed("{0..1}.tar", checksums=True, replace=True)
    assert local.digest == manifest.digest


def test_a_remote_tar_that_is_cut_or_not_there_is_named(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_tar(Path("a.tar"), samples(3)).read_bytes()
    monkeypatch.setattr(foreign, "_processes", lambda tars, checksums: 1)
    web.put("a.tar", data[:3000])
    with pytest.raises(
        ShardError, match=r"/a\.tar: cut short: it ends at byte 3000; http.*/b\.tar: not found"
    ):
        indexed(web.url("{a,b}.tar"))
    web.put("a.tar", data)
    web.cuts = 9
    with pytest.raises(ShardError, match=r"/a\.tar: the answer broke off \(3 attempts\)"):
        indexed(web.url("a.tar"))


def test_a_host_that_is_silent_is_asked_for_one_tar_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "_processes", lambda tars, checksums: 1)
    asked, opened = [], remote._open_by_fsspec
    monkeypatch.setattr(remote, "_open_by_fsspec", lambda url: (asked.append(url), opened(url))[1])
    with pytest.raises(
        InputError,
        match=r"^http://127\.0\.0\.1:1/0\.tar: .*\(3 attempts\); next: see whether http://\S* can be reached$",
    ):
        indexed("http://127.0.0.1:1/{0..9}.tar")
    assert asked == ["http://127.0.0.1:1/0.tar"] * 3
    monkeypatch.setattr(foreign, "_processes", lambda tars, checksums: 2)
    with pytest.raises(
        InputError, match=r"\.tar: .* attempts\); next: see whether http://127\.0\.0\.1:1 can"
    ):
        indexed("http://127.0.0.1:1/{0..1}.tar")


# --- written whole or not at all ---------------------------------------------------------------------------


def test_an_index_is_replaced_only_on_demand() -> None:
    write_tar(Path("a.tar"), samples(3))
    old = indexed("a.tar")
    write_tar(Path("a.tar"), samples(4))
    with pytest.raises(InputError, match=r"exists already, made otherwise or of tars .*; next: .*--replace"):
        indexed("a.tar")
    assert read_manifest(Path("out/set")).digest == old.digest
    assert len(rows(indexed("a.tar", replace=True))) == 4


def test_shards_that_were_built_are_never_deleted() -> None:
    write_tar(Path("a.tar"), samples(3))
    indexed("a.tar")
    Path("out/set/train-000000.tar").touch()
    with pytest.raises(InputError, match=r"'train-000000\.tar' is in it; next: move it away"):
        indexed("a.tar", replace=True)
    assert len(list(Path("out/set").iterdir())) == 2


def test_an_interrupted_index_leaves_nothing() -> None:
    write_tar(Path("a.tar"), samples(3))

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    config = validate(IndexConfig, {"name": "set", "train": ["a.tar"]}, where="test")
    with pytest.raises(KeyboardInterrupt):
        index(config, Path("out/set"), progress=interrupt)
    assert not Path("out").exists()


def test_a_folder_that_cannot_be_written_is_named() -> None:
    write_tar(Path("a.tar"), samples(3))
    Path("out").touch()
    with pytest.raises(InputError, match="cannot be written: "):
        indexed("a.tar")


def test_an_ended_index_leaves_no_process(web: Web) -> None:
    for n in range(2):
        web.put(f"{n}.tar", write_tar(Path(f"{n}.tar"), samples(40)).read_bytes())
    web.pause_s = 0.3
    gsa = [
        sys.executable,
        "-m",
        "pipeline.cli",
        "shards",
        "index",
        "--train",
        web.url("{0..1}.tar"),
        "--name",
    ]
    processes = [subprocess.Popen([*gsa, name], stderr=subprocess.PIPE) for name in ("killed", "interrupted")]
    while sum(web.gets.values()) < 2 * min(2, len(os.sched_getaffinity(0))):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)
    children = [c for p in processes for c in psutil.Process(p.pid).children(recursive=True)]
    for process, end in zip(processes, (signal.SIGKILL, signal.SIGINT), strict=True):
        process.send_signal(end)
    errors = [process.communicate(timeout=20)[1] for process in processes]
    assert not psutil.wait_procs(children, timeout=10)[1]
    assert not Path("out").exists()
    assert processes[1].returncode == 130
    assert b"Traceback" not in errors[1]


def test_the_command_tells_what_it_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tar(Path("a.tar"), [m for n in range(3) for m in sample(n, label=n + 1)])

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gsa", "shards", "index", *words])
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        with pytest.raises(SystemExit) as end:
            cli.main()
        printed = capsys.readouterr()
        return int(end.value.code or 0), printed.out, printed.err

    code, out, _ = call("--name", "a", "--train", "a.tar")
    assert (code, out.splitlines()) == (
        0,
        [
            f"indexed: {os.path.abspath('out/shards/a')}",
            "3 train, 0 val samples of 4 classes in 1 tars",
            "1 classes without a train sample: 0",
        ],
    )
    code, _, err = call("--name", "../a", "--train", "a.tar")
    assert (code, err.count("\n")) == (2, 1)
    code, _, err = call("--name", "b", "--train", "pipe:cat a.tar")
    assert (code, err.count("\n")) == (2, 1)


def test_the_same_index_is_reused_and_no_other(
    web: Web, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for n in range(2):
        web.put(f"{n}.tar", write_tar(Path(f"{n}.tar"), samples(3)).read_bytes())

    def call(*words: str) -> tuple[int, str]:
        words = ("gsa", "shards", "index", "--name", "a", *words)
        monkeypatch.setattr(sys, "argv", [*words])
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        with pytest.raises(SystemExit) as end:
            cli.main()
        printed = capsys.readouterr()
        return int(end.value.code or 0), (printed.out + printed.err.rpartition("gsa: ")[2]).split(":")[0]

    folder = os.path.abspath("out/shards/a")
    assert call("--train", "?.tar") == (0, "indexed")
    assert call("--train", "?.tar") == (0, "reused, unchanged")
    assert call("--train", "?.tar", "--replace") == (0, "indexed")
    assert call("--train", "?.tar", "--checksums") == (2, folder)
    write_tar(Path("2.tar"), samples(3))
    assert call("--train", "?.tar") == (2, folder)  # another tar fits the pattern
    Path("2.tar").unlink()
    assert call("--train", "?.tar") == (0, "reused, unchanged")
    os.truncate("1.tar", os.path.getsize("1.tar") + 512)
    os.utime("1.tar", (0, 0))
    assert call("--train", "?.tar") == (2, folder)
    Path("names").write_text("x\ny\nz\n")
    named = ("--train", web.url("{0..1}.tar"), "--classes", "names")
    assert call(*named, "--replace") == (0, "indexed")
    web.files.clear()
    assert call(*named) == (0, "reused, unchanged (no server was asked)")
    Path("names").write_text("z\ny\nx\n")
    assert call(*named) == (2, folder)


def test_a_tar_written_again_in_the_same_size_is_another() -> None:
    write_tar(Path("a.tar"), samples(3))
    config = validate(IndexConfig, {"name": "set", "train": ["a.tar"]}, where="test")
    index(config, Path("out/set"))
    assert foreign.unchanged(config, Path("out/set"))
    size = os.path.getsize("a.tar")
    write_tar(Path("a.tar"), [*samples(2), *sample(2, label=1)])
    later = os.stat("out/set/manifest.parquet").st_mtime_ns + 1
    os.utime("a.tar", ns=(later, later))
    assert os.path.getsize("a.tar") == size
    assert not foreign.unchanged(config, Path("out/set"))


def test_the_name_becomes_no_path() -> None:
    with pytest.raises(ConfigError, match="name"):
        validate(IndexConfig, {"name": "a/b", "train": ["a.tar"]}, where="test")
