"""Proof and show: any damage is found, by shard and key; a contact sheet."""

import errno
import hashlib
import io
import os
import random
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from photos import flip, picture, rewrite, set_row, settings
from PIL import Image

from pipeline import verify as proofs
from pipeline.config import InputError
from pipeline.foreign import IndexConfig, index
from pipeline.manifest import Manifest, read_manifest
from pipeline.shards import build
from pipeline.verify import contact_sheet, verify


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
    path = samples.folder / samples.shards[1].name
    here = np.flatnonzero(samples.shard == 1)
    flip(path, int(samples.offset[here[2]]))
    assert verify(own) == [f"{path.name}: sha256 differs; damaged pictures: {samples.key(here[2])}"]
    for i in here:
        if i != here[2]:
            flip(path, int(samples.offset[i]))
    keys = ", ".join(samples.key(i) for i in here[:3])
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


def foreign(folder: Path, shards: Path) -> Path:
    """A manifest alone, as made from headers: no checksums, and the shards elsewhere."""
    folder.mkdir()
    shutil.copy(shards / "manifest.parquet", folder)

    def strip(values: dict[str, Any], rows: dict[str, list[Any]]) -> None:
        for shard in values["shards"]:
            shard.update(sha256="", path=str(shards / shard["name"]))
        for column in ("crc32", "width", "height"):
            rows[column] = [None] * len(rows[column])

    rewrite(folder, strip)
    return folder


def test_a_foreign_set_is_proved_by_its_headers(own: Path, tmp_path: Path) -> None:
    folder = foreign(tmp_path / "foreign", own)
    assert verify(folder) == []
    rewrite(folder, set_row("offset", 1024))
    assert verify(folder) == ["train-000000.tar: no picture where the manifest says: train-00000000"]
    shutil.rmtree(folder)
    foreign(folder, own)
    os.truncate(own / "train-000001.tar", 700)
    (own / "train-000002.tar").unlink()
    (own / "val-000000.tar").write_bytes(bytes((own / "val-000000.tar").stat().st_size))
    first, second, *last = verify(folder)
    assert first.startswith("train-000001.tar: expected ")
    assert second == "train-000002.tar: missing"
    assert last[0].startswith("val-000000.tar: no picture where the manifest says: val-00000000")


def test_a_foreign_set_with_checksums_is_proved_whatever_its_members_are_called(tmp_path: Path) -> None:
    """Others have no .json, endings in capitals, and samples that the index has left out."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in [
            *((f"{i}.{'PNG' if i % 2 else 'png'}", picture(i, "PNG")) for i in range(200)),
            *((f"{i}.cls", str(i % 2).encode()) for i in range(199)),  # the last picture has no label
        ]:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    config = IndexConfig(name="a", train=[str(path)], checksums=True)
    manifest = index(config, tmp_path / "set")
    assert (len(manifest.split("train")), len(manifest.broken)) == (199, 1)
    assert verify(tmp_path / "set") == []
    contact_sheet(manifest, tmp_path / "sheet.png")
    samples = manifest.split("train")
    flip(path, int(samples.offset[7]) + 30)
    assert verify(tmp_path / "set") == [
        f"{manifest.shards[0].name}: sha256 differs; damaged pictures: {samples.key(7)}"
    ]


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


def test_a_sheet_shows_where_a_picture_is_unreadable_and_refuses_a_folder(own: Path, tmp_path: Path) -> None:
    manifest = read_manifest(own)
    flip(own / "train-000000.tar", int(manifest.split("train").offset[0]) + 30)
    contact_sheet(manifest, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert (255, 0, 0) in {color for _, color in sheet.getcolors(1 << 20) or []}
    with pytest.raises(InputError, match=r"cannot be written: Is a directory; next: name a \.png file"):
        contact_sheet(manifest, own)


def test_contact_sheet_takes_any_shape(tmp_path: Path) -> None:
    for name, size in {"tall": (1, 300), "wide": (700, 2), "one": (1, 1)}.items():
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(2):
            (tmp_path / "in" / name / f"{i}.png").write_bytes(picture(i, "PNG", size))
    contact_sheet(build(settings(tmp_path / "in"), tmp_path / "set").manifest, tmp_path / "sheet.png")
