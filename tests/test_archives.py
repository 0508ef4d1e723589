"""Official archives: read in place, the same samples from every form, and no damage or evil passes."""

import errno
import io
import os
import pickle
import random
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from photos import columns, contents, origins, picture
from PIL import Image
from scipy.io import savemat

from pipeline import archives, shards
from pipeline.archives import CIFAR, from_cifar, from_imagenet
from pipeline.config import InputError
from pipeline.decode import decode
from pipeline.manifest import Manifest, read_sample
from pipeline.pictures import ShardsConfig
from pipeline.shards import build
from pipeline.verify import verify

WNIDS = ("n01440764", "n02105855", "n03100240")
TRUTH = [WNIDS[i] for i in (2, 0, 1, 1, 2, 0)]  # of val pictures 1 to 6
IDS = {"n01440764": 7, "n02105855": 3, "n03100240": 9, "n00001740": 1500}  # as in meta.mat; the last: no leaf
TEXT, NUMBERS = archives.TRUTHS


def jpeg(number: int, mode: str = "RGB", **options: Any) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (14, 18, 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(data, "JPEG", quality=95, **options)
    return data.getvalue()


def rotated(number: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: to be turned by a quarter
    return jpeg(number, exif=exif)


def train_pictures() -> dict[str, dict[str, bytes]]:
    """{wnid: {name: bytes}} with the oddities of the true one."""
    pictures = {w: {f"{w}_{i}.JPEG": jpeg(10 * n + i) for i in range(4)} for n, w in enumerate(WNIDS)}
    pictures[WNIDS[0]][f"{WNIDS[0]}_7.JPEG"] = jpeg(70, "CMYK")
    pictures[WNIDS[0]][f"{WNIDS[0]}_8.JPEG"] = jpeg(71, "L")
    pictures[WNIDS[1]][f"{WNIDS[1]}_2933.JPEG"] = picture(72, "PNG")
    pictures[WNIDS[1]][f"{WNIDS[1]}_it's.JPEG"] = rotated(73)
    pictures[WNIDS[2]][f"{WNIDS[2]}_9.JPEG"] = jpeg(74)[:300]
    return pictures


def val_pictures() -> dict[str, bytes]:
    return {f"ILSVRC2012_val_{i:08d}.JPEG": jpeg(100 + i) for i in range(1, 7)}


def tar(files: dict[str, bytes], mode: str = "w") -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return data.getvalue()


def meta_mat() -> bytes:
    """As in the devkit: a struct array of 1 column, its rows in the order of no id."""
    fields = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height")
    synsets = np.zeros((len(IDS), 1), dtype=[(f, "O") for f in fields])
    for row, (wnid, number) in enumerate(IDS.items()):
        synsets[row, 0] = (float(number), wnid, "a word", "what it is", 0, np.zeros((1, 0)), 0)
    data = io.BytesIO()
    savemat(data, {"synsets": synsets})
    return data.getvalue()


def numbers() -> bytes:
    return "".join(f"{IDS[wnid]}\n" for wnid in TRUTH).encode()


def devkit() -> bytes:
    folder = f"{archives.DEVKIT}/data"
    return tar({f"{folder}/meta.mat": meta_mat(), f"{folder}/{NUMBERS}": numbers()}, "w:gz")


def write_files(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def pack_train(root: Path, pictures: dict[str, dict[str, bytes]]) -> None:
    inner = {f"{wnid}.tar": tar(dict(reversed(files.items()))) for wnid, files in pictures.items()}
    write_files(root, {archives.ARCHIVES["train"]: tar(inner)})


def packed(root: Path) -> None:
    pack_train(root, train_pictures())
    write_files(root, {archives.ARCHIVES["val"]: tar(val_pictures()), f"{archives.DEVKIT}.tar.gz": devkit()})


def with_open_devkit(root: Path) -> None:
    packed(root)
    with tarfile.open(root / f"{archives.DEVKIT}.tar.gz") as kit:
        kit.extractall(root, filter="data")
    (root / f"{archives.DEVKIT}.tar.gz").unlink()


def with_wnid_lines(root: Path) -> None:
    packed(root)
    (root / f"{archives.DEVKIT}.tar.gz").unlink()
    write_files(root, {TEXT: "\n".join(TRUTH).encode()})


def unpacked(root: Path) -> None:
    for wnid, files in train_pictures().items():
        write_files(root / "train" / wnid, files)
    for wnid, (name, content) in zip(TRUTH, val_pictures().items(), strict=True):
        write_files(root / "val" / wnid, {name: content})


def with_flat_val(root: Path) -> None:
    unpacked(root)
    shutil.rmtree(root / "val")
    write_files(root / "val", val_pictures())
    write_files(root, {NUMBERS: numbers(), "data/meta.mat": meta_mat()})


def imagenet(root: Path, **others: Any) -> ShardsConfig:
    return ShardsConfig(name="i", source="imagenet", input=str(root), samples_per_shard=6, **others)


def samples(manifest: Manifest) -> dict[str, tuple[str, bytes]]:
    """{origin: (class, bytes)} of both splits."""
    found = {}
    for split in manifest.splits:
        part = manifest.split(split)
        for i, origin in enumerate(origins(manifest, split)):
            found[origin] = (manifest.classes[part.label[i]], read_sample(part, i))
    return found


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archives as they are handed out, of 3 classes. Not to be changed."""
    root = tmp_path_factory.mktemp("imagenet")
    packed(root)
    return root


@pytest.fixture(scope="module")
def made(official: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return build(imagenet(official), tmp_path_factory.mktemp("made") / "set").manifest


@pytest.fixture
def copy(official: Path, tmp_path: Path) -> Path:
    return shutil.copytree(official, tmp_path / "copy")


def test_every_picture_is_there_with_its_class_and_bytes(made: Manifest) -> None:
    expected = {}
    for wnid, files in train_pictures().items():
        expected |= {f"train/{wnid}/{name}": (wnid, content) for name, content in files.items()}
    for wnid, (name, content) in zip(TRUTH, val_pictures().items(), strict=True):
        expected[f"val/{wnid}/{name}"] = (wnid, content)
    del expected[f"train/{WNIDS[2]}/{WNIDS[2]}_9.JPEG"]
    assert samples(made) == expected
    assert made.classes == WNIDS
    cut = {"file": f"train/{WNIDS[2]}/{WNIDS[2]}_9.JPEG", "reason": "Truncated File Read"}
    assert made.broken == (cut,)
    assert verify(made.folder) == []


@pytest.mark.parametrize("form", [with_open_devkit, with_wnid_lines, unpacked, with_flat_val])
def test_every_form_makes_the_same_shards(
    form: Callable[[Path], None], made: Manifest, tmp_path: Path
) -> None:
    form(tmp_path / "in")
    again = build(imagenet(tmp_path / "in"), tmp_path / "set").manifest
    assert again.shards == made.shards
    assert (again.classes, again.digest, again.broken) == (made.classes, made.digest, made.broken)


def test_oddities_are_decoded_as_pillow_has_them(made: Manifest) -> None:
    pictures, exts = {n: c for f in train_pictures().values() for n, c in f.items()}, {}
    rows = columns(made.folder)
    for i, origin in enumerate(origins(made, "train")):
        name = origin.split("/")[-1]
        exts[name] = rows["ext"][i]
        with Image.open(io.BytesIO(pictures[name])) as image:
            expected = np.asarray(image.convert("RGB"))
        found = decode(read_sample(made.split("train"), i))
        assert found.shape == expected.shape
        assert np.abs(found.astype(int) - expected).max() <= 3  # decoders of JPEG differ by rounding
        assert (rows["height"][i], rows["width"][i]) == found.shape[:2]
    assert exts[f"{WNIDS[1]}_2933.JPEG"] == "png"
    assert exts[f"{WNIDS[1]}_it's.JPEG"] == exts[f"{WNIDS[0]}_7.JPEG"] == "jpg"


def test_nothing_is_unpacked(copy: Path, tmp_path: Path) -> None:
    """Evil names in the archives are words, and links are left out."""
    evil = {
        "../../evil.JPEG": jpeg(1),
        "/etc/evil.JPEG": jpeg(2),
        "notes.txt": b"x",
        "a/b/deep.JPEG": jpeg(3),
    }
    inner = io.BytesIO(tar({**train_pictures()[WNIDS[0]], **evil}))
    with tarfile.open(fileobj=inner, mode="a") as archive:
        link = tarfile.TarInfo("link.JPEG")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    others = {f"{wnid}.tar": tar(files) for wnid, files in list(train_pictures().items())[1:]}
    outer = {f"../../{WNIDS[0]}.tar": inner.getvalue(), **others, "README": b"hello"}
    write_files(copy, {archives.ARCHIVES["train"]: tar(outer)})
    manifest = build(imagenet(copy), tmp_path / "set").manifest
    assert f"train/{WNIDS[0]}/evil.JPEG" in samples(manifest)
    assert manifest.ignored == 1
    assert {b["file"] for b in manifest.broken[:2]} == {"README", "link.JPEG"}
    assert sorted(p.name for p in tmp_path.iterdir()) == [".set.lock", "copy", "set"]


def test_changed_archives_are_seen(copy: Path) -> None:
    before = from_imagenet(copy).digest
    assert from_imagenet(copy).digest == before
    for name in (archives.ARCHIVES["train"], f"{archives.DEVKIT}.tar.gz"):
        os.utime(copy / name, ns=(0, 0))
        assert from_imagenet(copy).digest != before
        before = from_imagenet(copy).digest


def refusal(root: Path, folder: Path) -> str:
    with pytest.raises(InputError) as error:
        build(imagenet(root), folder)
    assert sorted(p.name for p in folder.parent.glob("*set*")) in ([], [".set.lock"])
    assert "\n" not in str(error.value)
    return str(error.value)


def without(*names: str) -> Callable[[Path], None]:
    return lambda root: [(root / name).unlink() for name in names] and None


def val_truth(text: str) -> Callable[[Path], None]:
    return lambda root: write_files(root, {TEXT: text.encode()})


def only_numbers(root: Path) -> None:
    (root / f"{archives.DEVKIT}.tar.gz").unlink()
    write_files(root, {NUMBERS: numbers()})


def bad_meta(root: Path) -> None:
    only_numbers(root)
    write_files(root, {"meta.mat": b"no such thing"})


def other_number(root: Path) -> None:
    only_numbers(root)
    write_files(root, {NUMBERS: numbers().replace(b"7", b"4242"), "meta.mat": meta_mat()})


def empty_class(root: Path) -> None:
    pack_train(root, {**train_pictures(), WNIDS[1]: {}})


def class_of_broken(root: Path) -> None:
    pack_train(root, {**train_pictures(), WNIDS[1]: {"x.JPEG": b"broken"}})


def one_split(root: Path) -> None:
    pack_train(root, {**train_pictures(), "n09999999": {"x.JPEG": jpeg(1)}})


def gap(root: Path) -> None:
    files = val_pictures()
    files["ILSVRC2012_val_00000009.JPEG"] = files.pop("ILSVRC2012_val_00000004.JPEG")
    write_files(root, {archives.ARCHIVES["val"]: tar(files)})


def nameless(root: Path) -> None:
    write_files(root, {archives.ARCHIVES["val"]: tar({"x.JPEG": jpeg(1)})})


def no_wnids(root: Path) -> None:
    write_files(root, {archives.ARCHIVES["train"]: tar({"x.JPEG": jpeg(1)})})


def junk(name: str, data: bytes = b"junk" * 300) -> Callable[[Path], None]:
    return lambda root: write_files(root, {name: data})


TRAIN, VAL = archives.ARCHIVES["train"], archives.ARCHIVES["val"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shutil.rmtree, "copy': no such folder; next: name the folder of the ImageNet archives"),
        (without(TRAIN), f"no ImageNet train split there: expected {TRAIN} or train/; next"),
        (without(VAL), f"no ImageNet val split there: expected {VAL} or val/; next"),
        (
            without(f"{archives.DEVKIT}.tar.gz"),
            f"without the ground truth: expected {archives.DEVKIT}.tar.gz or {TEXT} or {NUMBERS}; next: put",
        ),
        (val_truth("\n".join(TRUTH[:-1])), f"{TEXT}: expected a line for each of the 6 val pictures, got 5"),
        (
            val_truth("\n".join([*TRUTH[:-1], "n09999999"])),
            f"{TEXT}: wnids without train pictures: n09999999",
        ),
        (val_truth("\n".join([*TRUTH[:-1], "a tench"])), f"{TEXT}, line 1: expected a wnid or the number of"),
        (only_numbers, f"{NUMBERS}: has numbers, and there is no meta.mat that tells their wnids; next: put"),
        (bad_meta, "meta.mat: no meta.mat of ILSVRC2012: MatReadError("),
        (other_number, f"{NUMBERS}: numbers that "),
        (empty_class, f"{TRAIN}, {WNIDS[1]}.tar: holds no pictures; next: fetch the archive again"),
        (
            class_of_broken,
            f"labels would not be the official ones without {WNIDS[1]} (no readable picture in",
        ),
        (one_split, "classes with pictures in one split only: n09999999"),
        (gap, "line 4 is of a val picture that is not there"),
        (nameless, "val: expected ILSVRC2012_val_NNNNNNNN.JPEG, got 'x.JPEG'"),
        (no_wnids, f"{TRAIN}: no pictures; expected WNID.tar with pictures"),
        (junk(TRAIN), f"{TRAIN}: cut short or no .tar ("),
        (junk(VAL, b""), f"{VAL}: cut short or no .tar (empty file); next: fetch it again"),
        (junk(f"{archives.DEVKIT}.tar.gz"), f"{archives.DEVKIT}.tar.gz: cannot be read: not a gzip file"),
    ],
)
def test_what_is_wrong_is_one_clear_line(
    change: Callable[[Path], None], message: str, copy: Path, tmp_path: Path
) -> None:
    change(copy)
    assert message in refusal(copy, tmp_path / "set")


def test_unpacked_folders_without_pictures_are_refused(tmp_path: Path) -> None:
    unpacked(tmp_path / "in")
    for path in (tmp_path / "in" / "train" / WNIDS[1]).iterdir():
        path.unlink()
    assert f"train/{WNIDS[1]}: holds no pictures; next: unpack" in refusal(tmp_path / "in", tmp_path / "set")
    shutil.rmtree(tmp_path / "in" / "train")
    (tmp_path / "in" / "train" / "birds").mkdir(parents=True)
    assert "train: no pictures; expected WNID/picture.JPEG" in refusal(tmp_path / "in", tmp_path / "set")


def test_a_folder_that_may_not_be_read_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpacked(tmp_path / "in")
    source, real = from_imagenet(tmp_path / "in"), os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith(WNIDS[1]):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for call in (source.listing, lambda: from_imagenet(tmp_path / "in")):
        with pytest.raises(InputError, match=rf"cannot be read: .* Permission denied: .*{WNIDS[1]}'; next"):
            call()


def test_links_that_lead_in_a_circle_end(tmp_path: Path) -> None:
    unpacked(tmp_path / "in")
    (tmp_path / "in" / "train" / "n00000000").symlink_to("..")
    (tmp_path / "in" / "train" / WNIDS[0] / "self").symlink_to(".")
    assert len(from_imagenet(tmp_path / "in").listing().entries) == 23


def test_any_cut_of_an_archive_is_caught(copy: Path) -> None:
    """Also between two members, where a reader of .tar files sees an end: no class is lost in silence."""
    path, rng = copy / TRAIN, random.Random(0)
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        archive.getmembers()
        needed = archive.offset + archives.TAR_BLOCK
    for length in [*range(0, needed, 512), *(rng.randrange(needed) for _ in range(40))]:
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"cut short|holds no pictures"):
            from_imagenet(copy).listing()
    path.write_bytes(whole[:needed])
    assert len(from_imagenet(copy).listing().entries) == 23


def test_a_damaged_header_of_an_inner_archive_is_caught(copy: Path) -> None:
    path = copy / TRAIN
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        inner = archive.getmembers()[1]
    for place in (inner.offset_data + 3, inner.offset_data + 2048 + 120):
        data = bytearray(whole)
        data[place] ^= 1
        path.write_bytes(data)
        with pytest.raises(InputError, match=rf"{inner.name}: cut short or "):
            from_imagenet(copy).listing()


def test_an_archive_that_shrinks_meanwhile_is_the_disks_fault(copy: Path, tmp_path: Path) -> None:
    listing = from_imagenet(copy).listing()
    os.truncate(copy / VAL, 700)
    with pytest.raises(OSError, match=r"expected \d+ bytes at \d+, got") as error:
        listing.read(listing.entries[-1])
    assert error.value.errno == errno.EIO


def test_shorter_side_encodes_larger_pictures_only(official: Path, tmp_path: Path) -> None:
    manifest = build(imagenet(official, shorter_side=10, quality=80), tmp_path / "set").manifest
    found, rows = samples(manifest), columns(manifest.folder)
    odd = f"train/{WNIDS[1]}/{WNIDS[1]}_2933.JPEG"
    assert found[odd][1] == train_pictures()[WNIDS[1]][f"{WNIDS[1]}_2933.JPEG"]  # 12x9: left alone
    assert sorted(set(zip(rows["width"], rows["height"], rows["ext"], strict=True))) == [
        (12, 9, "png"),
        (13, 10, "jpg"),
    ]
    name = f"val/{TRUTH[0]}/ILSVRC2012_val_00000001.JPEG"
    with Image.open(io.BytesIO(found[name][1])) as small:
        assert (small.format, small.size) == ("JPEG", (13, 10))
        assert small.layer[0][1:3] == small.layer[1][1:3]  # 4:4:4
    pixels = decode(val_pictures()["ILSVRC2012_val_00000001.JPEG"])
    expected = np.asarray(Image.fromarray(pixels).resize((13, 10), Image.Resampling.LANCZOS))
    assert np.abs(decode(found[name][1]).astype(int) - expected).mean() < 12  # of noise at quality 80
    assert verify(manifest.folder) == []
    made = manifest.made["settings"]
    assert (made["shorter_side"], made["quality"]) == (10, 80)


@pytest.mark.parametrize("stop", [("checked", 10), ("written", 5), ("written", 19)])
def test_an_interrupted_build_from_archives_goes_on(
    stop: tuple[str, int], official: Path, made: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "CHUNK", 5)

    def interrupt(phase: str, done: int, total: int) -> None:
        assert total == {"checked": 17 + 6, "written": 22}[phase]
        if (phase, done) >= stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(imagenet(official), tmp_path / "set", progress=interrupt)
    assert list(tmp_path.glob(".set.building/.work/checked-*"))
    assert build(imagenet(official), tmp_path / "set").manifest.shards == made.shards
    assert contents(tmp_path / "set") == contents(made.folder)


# --- CIFAR -------------------------------------------------------------------------------------------------


class Python2Pickler(pickle._Pickler):
    """Protocol 2 as Python 2 wrote it: its text is what Python 3 calls bytes."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_text(self, value: Any) -> None:
        data = value if isinstance(value, bytes) else value.encode()
        self.write(pickle.BINSTRING + len(data).to_bytes(4, "little") + data)
        self.memoize(value)

    dispatch[bytes] = dispatch[str] = save_text


def python2(values: Any) -> bytes:
    data = io.BytesIO()
    Python2Pickler(data, protocol=2).dump(values)
    return data.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def cifar_batch(number: int, labels: list[int], key: bytes) -> dict[bytes, Any]:
    pixels = np.random.default_rng(number).integers(0, 256, (len(labels), 3072), np.uint8)
    names = [f"thing_s_{number:03d}{i:03d}.png".encode() for i in range(len(labels))]
    return {b"batch_label": b"a batch", key: labels, b"data": pixels, b"filenames": names}


def cifar_members(name: str) -> dict[str, Any]:
    """{member: values} of an archive of few pictures with all its classes."""
    kind, count = CIFAR[name], 10 if name == "cifar10" else 100
    members = {
        f"{kind.folder}/{batch}": cifar_batch(n, [*range(count)][::-1], kind.labels)
        for n, batch in enumerate(kind.batches)
    }
    names = [f"class {n}".encode() for n in range(count)]
    return {
        **members,
        f"{kind.folder}/{kind.meta}": {kind.class_names: names},
        f"{kind.folder}/readme": b"hi",
    }


def write_cifar(root: Path, name: str, members: dict[str, Any]) -> Path:
    files = {m: values if isinstance(values, bytes) else python2(values) for m, values in members.items()}
    write_files(root, {CIFAR[name].archive: tar(files, "w:gz")})
    return root / CIFAR[name].archive


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_every_cifar_picture_is_there_with_its_pixels(name: str, tmp_path: Path) -> None:
    members = cifar_members(name)
    archive = write_cifar(tmp_path, name, members)
    config = ShardsConfig(name=name, source=name, input=str(tmp_path))
    manifest, kind = build(config, tmp_path / "set").manifest, CIFAR[name]
    assert manifest.classes == tuple(f"class {n}" for n in range(len(manifest.classes)))
    expected = {}
    for batch, split in kind.batches.items():
        values = members[f"{kind.folder}/{batch}"]
        for label, row, file in zip(values[kind.labels], values[b"data"], values[b"filenames"], strict=True):
            expected[f"{batch}/{file.decode()}"] = (split, label, row.reshape(3, 32, 32).transpose(1, 2, 0))
    seen = set()
    for split in manifest.splits:
        part = manifest.split(split)
        assert set(part.ext.to_pylist()) == {"png"}
        for i, origin in enumerate(origins(manifest, split)):
            seen.add(origin)
            of, label, pixels = expected[origin]
            assert (of, label) == (split, part.label[i])
            assert (decode(read_sample(part, i)) == pixels).all()
    assert seen == set(expected)
    assert build(config.model_copy(update={"input": str(archive)}), tmp_path / "set").reused
    assert verify(tmp_path / "set") == []


class Evil:
    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


@pytest.mark.parametrize(
    ("payload", "name"),
    [
        (lambda mark: python2({b"data": Evil(os.system, f"touch {mark}")}), "posix.system"),
        (lambda mark: pickle.dumps(Evil(eval, f"open({str(mark)!r}, 'w')"), 0), "builtins.eval"),
        (lambda mark: pickle.dumps(Evil(os.mkdir, str(mark)), 4), "posix.mkdir"),
        (lambda mark: pickle.dumps([np.float64(1)], 2), "numpy._core.multiarray.scalar"),
        (lambda mark: b"cnumpy\nload\n(Vx\ntR.", "numpy.load"),
        (lambda mark: b"cnumpy.core.multiarray\n_reconstruct.__globals__\n.", "_reconstruct.__globals__"),
        (lambda mark: b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93.", "numpy.ndarray.__init__"),
    ],
)
def test_what_could_run_code_is_refused_by_name(
    payload: Callable[[Path], bytes], name: str, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    members = {**cifar_members("cifar10"), "cifar-10-batches-py/data_batch_3": payload(mark)}
    write_cifar(tmp_path, "cifar10", members)
    with pytest.raises(InputError, match=r"cifar-10-python.tar.gz, data_batch_3: expected arrays") as error:
        from_cifar("cifar10", tmp_path).listing()
    assert name.removeprefix("builtins.") in str(error.value)
    assert str(error.value).endswith(": refused")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("member", "change", "message"),
    [
        ("meta", {b"fine_label_names": b"x"}, "meta: expected a list of names as b'fine_label_names'"),
        ("train", [1], "train: expected a dict, got list"),
        ("train", b"garbage", "train: no pickle of CIFAR: "),
        ("train", {b"fine_labels": [0, 100]}, "train: expected b'fine_labels', a list of numbers below 100"),
        ("train", {b"filenames": [b"x"]}, "train: expected b'filenames', a list of 100 names"),
        ("train", {b"data": np.zeros((99, 3072), np.uint8)}, "b'data', an array of 307200 bytes, got 304128"),
        ("train", {b"data": np.zeros((100, 3072), np.int8)}, "an array of 307200 bytes, got none"),
        ("test", {b"data": np.zeros((100, 3072), object)}, "an array of 307200 bytes, got none"),
        ("test", {b"data": np.asfortranarray(np.zeros((100, 3072), np.uint8))}, "bytes, got none"),
        ("test", {b"data": b"x" * 307200}, "an array of 307200 bytes, got none"),
    ],
)
def test_a_batch_that_is_none_is_one_clear_line(
    member: str, change: Any, message: str, tmp_path: Path
) -> None:
    members = cifar_members("cifar100")
    name = f"cifar-100-python/{member}"
    members[name] = {**members[name], **change} if isinstance(change, dict) else change
    write_cifar(tmp_path, "cifar100", members)
    with pytest.raises(InputError) as error:
        from_cifar("cifar100", tmp_path).listing()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_cifar_archive_that_is_none_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected cifar-10-python.tar.gz there; next: fetch it"):
        from_cifar("cifar10", tmp_path)
    path = write_cifar(tmp_path, "cifar10", cifar_members("cifar10"))
    whole = path.read_bytes()
    for length in (0, 5, len(whole) // 2, len(whole) - 20000):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"cifar-10-python.tar.gz: cannot be read: .*; next: make it"):
            from_cifar("cifar10", tmp_path).listing()
    members = cifar_members("cifar10")
    evil = members.pop("cifar-10-batches-py/test_batch")
    write_cifar(tmp_path, "cifar10", {**members, "../cifar-10-batches-py/test_batch": evil})
    with pytest.raises(InputError, match=r"expected cifar-10-batches-py/test_batch in it; next: fetch cifar"):
        from_cifar("cifar10", tmp_path).listing()


def test_random_damage_to_a_batch_is_refused_or_harmless() -> None:
    whole, rng, refused = python2(cifar_batch(0, [1, 0], b"labels")), random.Random(0), 0
    places = [i for i in range(len(whole)) if not 200 < i < 6000]  # what is not pixels
    for _ in range(1000):
        data = bytearray(whole)
        data[rng.choice(places)] = rng.randrange(256)
        try:
            pixels, labels, names = archives._batch("x", archives._load("x", bytes(data)), b"labels", 10)
        except InputError:
            refused += 1
        else:
            assert (pixels.shape, len(labels), len(names)) == ((2, 3, 32, 32), 2, 2)
    assert refused > 100
