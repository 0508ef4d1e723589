"""What goes into shards: every picture looked at once, what is none left out and told, an even split."""

import errno
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from photos import columns, origins, picture, refusal, settings, write_photos

from pipeline.config import ConfigError, validate
from pipeline.decode import decode
from pipeline.manifest import Manifest, read_sample
from pipeline.pictures import Entry, InputFault, ShardsConfig, check, from_folder, shrink
from pipeline.shards import build
from pipeline.verify import verify


def test_every_digit_is_there_once_with_its_pixels_and_label(digits: Manifest) -> None:
    from sklearn.datasets import load_digits

    scans, labels = load_digits(return_X_y=True)
    seen = []
    for split in digits.splits:
        samples = digits.split(split)
        for i, origin in enumerate(origins(digits, split)):
            seen.append(int(origin))
            pixels = decode(read_sample(samples, i))
            expected = np.rint(scans[int(origin)].reshape(8, 8) * 255 / 16)  # enlarged from 8 to 8
            assert (pixels == expected[:, :, None]).all()
            assert digits.classes[samples.label[i]] == str(labels[int(origin)])
    assert sorted(seen) == list(range(1797))
    assert {*columns(digits.folder)["width"], *columns(digits.folder)["height"]} == {8}
    assert verify(digits.folder) == []


def test_split_takes_the_same_fraction_of_each_class(digits: Manifest) -> None:
    train, val = (Counter(digits.split(s).label.tolist()) for s in ("train", "val"))
    assert all(val[c] == round(0.2 * (train[c] + val[c])) for c in range(10))


def test_digits_are_enlarged_to_image_size(tmp_path: Path) -> None:
    manifest = build(ShardsConfig(name="d", source="digits"), tmp_path / "d").manifest
    samples = manifest.split("val")
    assert decode(read_sample(samples, 0)).shape == (32, 32, 3)
    assert set(columns(manifest.folder)["width"]) == {32}


@pytest.mark.parametrize("fraction", [0.001, 0.2, 0.5, 0.999])
def test_each_class_keeps_a_train_and_a_val_sample(fraction: float, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "in", {"two": 2, "three": 3, "nine": 9})
    manifest = build(settings(photos, val_fraction=fraction), tmp_path / "set").manifest
    for split in manifest.splits:
        assert set(manifest.split(split).label.tolist()) == {0, 1, 2}
    assert sum(len(manifest.split(s)) for s in manifest.splits) == 14


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
        kinds |= dict(zip(origins(manifest, split), manifest.split(split).ext.to_pylist(), strict=True))
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


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source": "folder"}, "source folder needs input, a folder of pictures: expected CLASS/picture.jpg"),
        (
            {"source": "imagenet"},
            "source imagenet needs input, the folder of the official archives, or of train/",
        ),
        ({"source": "cifar100"}, "source cifar100 needs input, cifar-100-python.tar.gz, or the folder that"),
        ({"source": "digits", "input": "x"}, "input is for the other sources; the digits need none"),
        ({"source": "digits", "shorter_side": 8}, "shorter_side is for the other sources; the digits have"),
        ({"source": "folder", "input": "x", "image_size": 64}, "image_size is for source digits"),
        ({"source": "folder", "input": "x", "quality": 80}, "quality is for shorter_side: without it"),
        ({"source": "folder", "input": "x", "shorter_side": 4}, "shorter_side: expected greater than or"),
        (
            {"source": "imagenet", "input": "x", "val_fraction": 0.1},
            "val_fraction: the split of source image",
        ),
        ({"source": "folder", "input": ""}, "input: expected at least 1 character"),
        ({"source": "digits", "val_fraction": 1.0}, "val_fraction: expected less than 1, got 1.0"),
        ({"source": "digits", "val_fraction": 0.0}, "val_fraction: expected greater than 0, got 0.0"),
        ({"source": "digits", "samples_per_shard": 0}, "samples_per_shard: expected greater than 0"),
        ({"source": "digits", "image_size": 4}, "image_size: expected greater than or equal to 8"),
        ({"source": "digits", "name": "../x"}, "name: "),
        ({"source": "svhn"}, "source: expected 'digits', 'folder', 'imagenet', 'cifar10' or 'cifar100', got"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate(ShardsConfig, {"name": "x", **values}, where="shards")
    assert message in str(error.value)


def test_settings_survive_their_own_dump(photos: Path) -> None:
    for config in (settings(photos), ShardsConfig(name="d", source="digits", image_size=64)):
        assert ShardsConfig.model_validate(config.model_dump(mode="json")) == config


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


# --- one picture -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EMFILE])
def test_a_disk_that_fails_is_told_from_a_broken_picture(code: int, photos: Path) -> None:
    listing = from_folder(photos).listing()
    assert check(listing, listing.entries[0]).fault == ""

    def fail(entry: Entry) -> bytes:
        raise OSError(code, os.strerror(code))

    with pytest.raises(InputFault, match=os.strerror(code)) as error:
        check(listing._replace(read=fail), listing.entries[0])
    assert error.value.filename == listing.entries[0].path


def test_a_file_that_went_away_is_the_disks_fault_and_a_link_to_nowhere_its_own(
    photos: Path, tmp_path: Path
) -> None:
    listing = from_folder(photos).listing()
    gone = listing.entries[0]._replace(path=str(tmp_path / "gone"))
    with pytest.raises(InputFault, match="No such file or directory"):
        check(listing, gone)
    (tmp_path / "gone").symlink_to("nowhere")
    assert check(listing, gone).fault == "No such file or directory"


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (31, 30), (1000, 30), (30, 30)])
def test_shrunk_pictures_have_the_shorter_side_and_the_shape(size: tuple[int, int]) -> None:
    data, width, height = shrink(decode(picture(1, "PNG", size)), 20, 90)
    assert decode(data).shape == (height, width, 3)
    assert min(width, height) == 20
    assert abs(width / height - size[0] / size[1]) <= 0.04 * size[0] / size[1]


def test_quality_is_that_of_the_jpeg() -> None:
    pixels = decode(picture(1, "PNG", (64, 64)))
    sizes = [len(shrink(pixels, 48, quality)[0]) for quality in (10, 50, 90, 100)]
    assert sizes == sorted(set(sizes))


def test_smaller_pictures_and_strips_that_no_jpeg_holds_are_kept(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "in", {"ant": 3, "bee": 3})
    strip, larger = picture(8, "PNG", (80_000, 9)), picture(9, "WEBP", (30, 20))
    (photos / "ant" / "strip.png").write_bytes(strip)
    (photos / "ant" / "larger.webp").write_bytes(larger)
    manifest = build(settings(photos, shorter_side=8), tmp_path / "set").manifest
    assert set(columns(manifest.folder)["height"]) == {8, 9}
    manifest = build(settings(photos, shorter_side=9), tmp_path / "other").manifest
    found = {}
    for split in manifest.splits:
        part = manifest.split(split)
        for i, origin in enumerate(origins(manifest, split)):
            found[origin] = (part.ext[i].as_py(), read_sample(part, i))
    assert found.pop("ant/larger.webp")[0] == "jpg"
    assert all(data == (photos / origin).read_bytes() for origin, (_, data) in found.items())
    assert verify(manifest.folder) == []
