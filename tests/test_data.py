"""Batches: the same for any ranks, threads and resume points; no sample is lost or damaged without a word."""

import gc
import io
import logging
import random
import shutil
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tars import CLASSES, numbers_of, small_png, write_set

from pipeline.augment import random_box, train_crop
from pipeline.config import DataConfig
from pipeline.data import (
    AHEAD,
    MEAN,
    PICTURE_DRAWS,
    STD,
    Batch,
    eval_loader,
    to_device,
    train_loader,
    train_picture,
)
from pipeline.decode import decode
from pipeline.manifest import Samples, ShardError, read_manifest, read_sample
from pipeline.order import Certificate, EpochOrder, certify, sample_draws

UNEVEN = {"train": (97, 1, 240, 13, 180, 149), "val": (17, 1, 23)}  # 680 and 41 samples
GLOBAL, MICRO = 48, 1  # 14 steps of 48 micro-batches; 8 samples are left out
STEPS, LEFT_OUT = 14, 8
WORLDS = (1, 2, 3, 4, 6, 8, 12, 16, 24)
THREADS = (0, 1, 2, 4)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("uneven") / "set", UNEVEN)


@pytest.fixture(scope="module")
def train_samples(uneven: Path) -> Samples:
    return read_manifest(uneven).split("train")


@pytest.fixture(scope="module")
def val_samples(uneven: Path) -> Samples:
    return read_manifest(uneven).split("val")


@pytest.fixture(scope="module")
def config(mini_config: Any) -> Any:
    """Settings for the pictures of `uneven`, whose few samples are five blocks."""
    small = {"image_size": 8, "global_batch": GLOBAL, "micro_batch": MICRO, "shuffle_block": 120}
    return lambda **changes: mini_config(**{**small, **changes})


def load(
    samples: Samples,
    config: Any,
    *,
    world: int = 1,
    threads: int = 0,
    first_step: int = 0,
    steps: int = STEPS,
) -> Iterator[list[Batch]]:
    """The micro-batches of each global batch of an epoch, from step `first_step` on, from all ranks' loaders."""
    ranks = [
        train_loader(
            samples, config, epoch=1, first_step=first_step, rank=r, world=world, threads=threads, draws=3
        )
        for r in range(world)
    ]
    for _ in range(first_step, min(STEPS, first_step + steps)):
        yield [next(rank) for rank in ranks for _ in range(config.micro_batches // world)]
    if first_step + steps >= STEPS:
        assert not [batch for rank in ranks for batch in rank]  # equal for all ranks, and no more
    for rank in ranks:
        rank.close()


def content(step: list[Batch]) -> tuple[bytes, ...]:
    """All of a global batch."""
    return tuple(
        part.tobytes() for b in step for part in (b.ids, b.images.numpy(), b.labels.numpy(), b.draws.numpy())
    )


@pytest.fixture(scope="module")
def alone(train_samples: Samples, config: Any) -> list[tuple[bytes, ...]]:
    return [content(step) for step in load(train_samples, config())]


# --- R5: one order -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", WORLDS)
def test_global_batches_are_the_same_for_any_ranks_threads_and_resume_point(
    world: int, train_samples: Samples, config: Any, alone: list[tuple[bytes, ...]]
) -> None:
    """126 of the combinations of R5, a step of each."""
    for first in range(STEPS):
        threads = THREADS[(first + world) % 4]
        found = load(train_samples, config(), world=world, threads=threads, first_step=first, steps=1)
        assert [content(step) for step in found] == alone[first : first + 1]


@pytest.mark.slow
@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("world", WORLDS)
def test_epochs_are_the_same_for_any_ranks_threads_and_resume_point(
    world: int, threads: int, train_samples: Samples, config: Any, alone: list[tuple[bytes, ...]]
) -> None:
    """R5: 504 combinations to the end of the epoch: nothing missing, nothing twice, the same bytes."""
    for first in range(STEPS):
        found = load(train_samples, config(), world=world, threads=threads, first_step=first)
        assert [content(step) for step in found] == alone[first:]


@pytest.mark.parametrize(("world", "threads"), [(1, 2), (3, 0), (4, 1), (24, 4)])
def test_an_epoch_has_each_train_sample_once_but_those_left_out(
    world: int, threads: int, train_samples: Samples, config: Any
) -> None:
    batches = list(chain(*load(train_samples, config(), world=world, threads=threads)))
    ids = np.concatenate([b.ids for b in batches])
    order = EpochOrder(train_samples.shard_sizes, seed=0, epoch=1, block=120)
    assert len(ids) == len(set(ids.tolist())) == 680 - LEFT_OUT
    everything = certify(ids, 0) + certify(order.take(680 - LEFT_OUT, 680), 0)
    assert everything == certify(np.arange(680), 0)
    for b in batches:
        assert numbers_of(b.images.numpy()) == b.ids.tolist()
        assert b.labels.tolist() == [i % CLASSES for i in b.ids]


def test_a_batch_holds_the_cropped_pictures_of_the_order(mini: Path, mini_config: Any) -> None:
    samples, config = read_manifest(mini).split("train"), mini_config(seed=5)
    order = EpochOrder(samples.shard_sizes, seed=5, epoch=1, block=config.data.shuffle_block).take(0, 48)
    batches = train_loader(samples, config, epoch=1, first_step=0, rank=0, world=1, threads=2, draws=7)
    for ids, batch in zip(order.reshape(12, 4), batches, strict=True):
        assert batch.ids.tolist() == ids.tolist()
        assert batch.images.shape == (4, 32, 32, 3)
        assert batch.images.dtype == torch.uint8
        assert batch.labels.dtype == torch.int64
        assert batch.labels.tolist() == samples.label[ids].tolist()
        for i, image, draws in zip(ids.tolist(), batch.images, batch.draws, strict=True):
            drawn = sample_draws(np.array([i]), PICTURE_DRAWS + 7, seed=5, epoch=1)[0].tolist()
            box = random_box(32, 32, drawn[1:PICTURE_DRAWS], (0.08, 1.0))
            crop = train_crop(decode(read_sample(samples, i)), box, size=32, mirrored=drawn[0] < 0.5)
            assert torch.equal(image, crop)
            assert draws.tolist() == drawn[PICTURE_DRAWS:]


def test_epochs_and_seeds_draw_other_crops_and_numbers(mini: Path, mini_config: Any) -> None:
    samples, seen = read_manifest(mini).split("train"), []
    for seed in (0, 1):
        for epoch in (0, 1):
            for batch in train_loader(
                samples,
                mini_config(seed=seed),
                epoch=epoch,
                first_step=0,
                rank=0,
                world=1,
                threads=0,
                draws=2,
            ):
                at = batch.ids.tolist().index(7) if 7 in batch.ids else None
                if at is not None:
                    seen.append((batch.images[at].numpy().tobytes(), tuple(batch.draws[at].tolist())))
    assert len(seen) >= 3  # an epoch may leave it out
    assert len({image for image, _ in seen}) == len({draws for _, draws in seen}) == len(seen)


def test_half_of_the_pictures_are_mirrored() -> None:
    ramp = np.tile(np.arange(0, 256, 8, dtype=np.uint8)[None, :, None], (32, 1, 3))
    file = io.BytesIO()
    Image.fromarray(ramp).save(file, "PNG")
    image, settings = torch.empty(8, 8, 3, dtype=torch.uint8), DataConfig(image_size=8)
    mirrored = 0
    for draws in sample_draws(np.arange(600), PICTURE_DRAWS, seed=0, epoch=0).tolist():
        train_picture(file.getvalue(), draws, settings, image)
        mirrored += int(image[0, 0, 0]) > int(image[0, -1, 0])
    assert 240 < mirrored < 360


@pytest.mark.parametrize("threads", [0, 3])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8, 64])
def test_evaluation_reads_each_sample_once_unchanged(
    world: int, threads: int, val_samples: Samples, config: Any
) -> None:
    ranks = [
        list(eval_loader(val_samples, config(), rank=r, world=world, threads=threads)) for r in range(world)
    ]
    batches = list(chain(*ranks))
    assert [i for b in batches for i in b.ids.tolist()] == list(range(41))
    assert [n for b in batches for n in numbers_of(b.images.numpy())] == list(range(41))
    assert [n for b in batches for n in b.labels.tolist()] == [i % CLASSES for i in range(41)]
    seen = sum((certify(b.ids, val_samples.salt) for b in batches), Certificate(0, 0))
    assert seen == val_samples.certificate


def test_evaluation_crops_as_at_test(mini: Path, mini_config: Any, pictures: Path) -> None:
    samples = read_manifest(mini).split("val")
    classes = {
        np.asarray(Image.open(p).convert("RGB")).tobytes(): int(p.parent.name)
        for p in pictures.rglob("*.png")
    }
    seen = set()
    for batch in eval_loader(samples, mini_config(), rank=0, world=1, threads=0):
        for image, label in zip(batch.images.numpy(), batch.labels.tolist(), strict=True):
            assert classes[image.tobytes()] == label
            seen.add(image.tobytes())
    assert len(seen) == len(samples) == 18


def test_a_loader_that_is_given_up_leaves_no_thread(train_samples: Samples, config: Any) -> None:
    import threading

    loader = train_loader(train_samples, config(), epoch=0, first_step=0, rank=0, world=1, threads=3, draws=0)
    next(loader)
    assert any(t.name.startswith("loader") for t in threading.enumerate())
    loader.close()
    assert not any(t.name.startswith("loader") for t in threading.enumerate())


def test_slow_reading_is_done_ahead_by_the_threads(
    train_samples: Samples, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the caller is busy with a batch, the next is read."""
    read: list[int] = []
    monkeypatch.setattr("pipeline.data.read_sample", lambda s, i: (read.append(i), small_png(i))[1])
    loader = train_loader(train_samples, config(), epoch=0, first_step=0, rank=0, world=1, threads=2, draws=0)
    next(loader)
    end = time.monotonic() + 20
    while len(read) < 2 * AHEAD and time.monotonic() < end:
        time.sleep(0.005)
    assert 2 * AHEAD <= len(read) <= 2 * AHEAD + 2
    loader.close()


# --- R6: bad data ------------------------------------------------------------------------------------------

SMALL = {"train": (11, 13), "val": (5,)}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("small") / "set", SMALL)


@pytest.fixture
def own(small: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(small, tmp_path / "own")


def damage(rng: random.Random, data: bytes) -> bytes:
    """One of the ways in which files go bad."""
    at = rng.randrange(len(data))
    kind = rng.choice(("cut", "cut at a block", "flip", "zeros", "no header", "empty", "shifted", "other"))
    return {
        "cut": data[:at],
        "cut at a block": data[: at // 512 * 512],
        "flip": data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :],
        "zeros": data[:at] + bytes(min(900, len(data) - at)) + data[at + 900 :],
        "no header": data[: at // 512 * 512] + bytes(512) + data[at // 512 * 512 + 512 :],
        "empty": b"",
        "shifted": data[:at] + data[at + 1 :],
        "other": rng.randbytes(len(data)),
    }[kind]


def lost_samples(samples: Samples, shard: int, good: bytes, bad: bytes) -> set[int]:
    """Those whose bytes are no longer where they were."""
    mine = np.flatnonzero(samples.shard == shard).tolist()
    places = {i: slice(int(samples.offset[i]), int(samples.offset[i] + samples.size[i])) for i in mine}
    return {i for i, place in places.items() if bad[place] != good[place]}


def damaged_sets(folder: Path, seed: int, n: int) -> Iterator[tuple[Samples, set[int]]]:
    """The train split n times, one of its shards damaged, and the samples that are lost by it."""
    rng, path = random.Random(seed), folder / "train-000001.tar"
    good = path.read_bytes()
    for _ in range(n):
        bad = damage(rng, good)
        path.write_bytes(bad)
        samples = read_manifest(folder).split("train")
        yield samples, lost_samples(samples, 1, good, bad)
    path.write_bytes(good)


def check_damage(folder: Path, config: Any, caplog: pytest.LogCaptureFixture, *, seed: int, n: int) -> int:
    """What is read and what is named as lost are together the manifest, for every damage."""
    harmless = 0
    settings = config(global_batch=12, micro_batch=12, shuffle_block=100)
    for samples, lost in damaged_sets(folder, seed, n):
        caplog.clear()
        batches = epoch_0(samples, settings, threads=seed % 2 * 2)
        assert [shard for b in batches for shard in b.bad] == ["train-000001.tar"] * len(lost)
        used = [i for b in batches for i in b.ids.tolist()]
        assert len(used) == 24
        assert set(used) == set(range(24)) - lost
        assert [n for b in batches for n in numbers_of(b.images.numpy())] == used
        assert [n for b in batches for n in b.labels.tolist()] == [i % CLASSES for i in used]
        for i in lost:
            assert f"bad_sample {samples.where(i)}: " in caplog.text
        assert len(caplog.records) == len(lost)
        harmless += not lost
    return harmless


def test_what_is_damaged_is_named_and_all_else_is_used(
    own: Path, config: Any, caplog: pytest.LogCaptureFixture
) -> None:
    assert 0 < check_damage(own, config, caplog, seed=0, n=100) < 50
    assert 0 < check_damage(own, config, caplog, seed=1, n=100) < 50


@pytest.mark.slow
def test_two_thousand_damages_are_named(own: Path, config: Any, caplog: pytest.LogCaptureFixture) -> None:
    """R6."""
    for seed in range(2, 12):
        assert 0 < check_damage(own, config, caplog, seed=seed, n=200) < 100


def test_a_stand_in_is_the_next_sample_that_can_be_read_whatever_the_world(own: Path, config: Any) -> None:
    path = own / "train-000000.tar"
    samples = read_manifest(own).split("train")
    data = bytearray(path.read_bytes())
    for i in (0, 3, 4):
        data[int(samples.offset[i]) + 50] ^= 1
    path.write_bytes(data)
    settings = config(global_batch=24, micro_batch=6, shuffle_block=100)
    found = [epoch_0(samples, settings, world=world) for world in (1, 2, 4)]
    assert content(found[0]) == content(found[1]) == content(found[2])
    ids = [b.ids for b in found[0]]
    order = EpochOrder(samples.shard_sizes, seed=0, epoch=0, block=100).take(0, 24).reshape(4, 6)
    for wanted, used in zip(order.tolist(), ids, strict=True):
        for j, i in enumerate(wanted):
            cycle = [*wanted[j:], *wanted[:j]]
            assert used[j] == next(c for c in cycle if c not in (0, 3, 4)), i


def epoch_0(samples: Samples, settings: Any, *, world: int = 1, threads: int = 0) -> list[Batch]:
    """All micro-batches of an epoch of one step, in the order of the ranks."""
    ranks = [
        list(
            train_loader(
                samples, settings, epoch=0, first_step=0, rank=r, world=world, threads=threads, draws=3
            )
        )
        for r in range(world)
    ]
    return list(chain(*ranks))


def test_views_of_a_picture_are_cropped_and_augmented_each_by_itself(mini: Path, mini_config: Any) -> None:
    """Repeated augmentation: eight pictures twice in a global batch of 16, the same for two ranks as for one."""
    samples = read_manifest(mini).split("train")
    one, two = (epoch_0(samples, mini_config(repeats=2), world=world) for world in (1, 2))
    assert sorted(content(one)) == sorted(content(two))
    first = one[:4]  # of the first step
    order = EpochOrder(samples.shard_sizes, seed=0, epoch=0, block=32_768).take(0, 8).tolist()
    assert np.concatenate([b.ids for b in first]).tolist() == [*order, *order]
    assert all(b.labels.tolist() == samples.label[b.ids].tolist() for b in first)
    images, draws = (torch.cat([getattr(b, key) for b in first]) for key in ("images", "draws"))
    assert all(not torch.equal(images[i], images[i + 8]) for i in range(8))
    assert all(not torch.equal(draws[i], draws[i + 8]) for i in range(8))


@pytest.mark.parametrize("threads", [0, 2])
def test_a_micro_batch_without_one_sample_ends_in_an_error_that_names_it(
    threads: int, own: Path, config: Any
) -> None:
    (own / "train-000000.tar").unlink()
    (own / "train-000001.tar").unlink()
    samples = read_manifest(own).split("train")
    with pytest.raises(
        ShardError, match=r"^none of the 2 samples .*train-00000\d\.tar, sample train-0.*No such"
    ):
        epoch_0(samples, config(global_batch=24, micro_batch=2), threads=threads)


@pytest.mark.parametrize("threads", [0, 2])
def test_damage_ends_an_evaluation_with_shard_and_key(threads: int, own: Path, config: Any) -> None:
    """The same single line, whoever reads, and at once."""
    samples = read_manifest(own).split("val")
    path = own / "val-000000.tar"
    data = bytearray(path.read_bytes())
    data[int(samples.offset[3]) + 60] ^= 4
    path.write_bytes(data)
    where = rf"^{path}, sample {samples.key(3)}: crc32 differs; next: .*$"
    start = time.monotonic()
    with pytest.raises(ShardError, match=where) as caught:
        list(eval_loader(samples, config(), rank=0, world=1, threads=threads))
    assert "\n" not in str(caught.value)
    del caught
    gc.collect()
    assert time.monotonic() - start < 9


def test_a_picture_that_this_decoder_refuses_is_named_too(tmp_path: Path, config: Any) -> None:
    """Its crc32 is right: it was refused by no one when the shards were made."""
    broken = {3: small_png(3)[:-30], 7: b"no picture", 9: b""}
    folder = write_set(
        tmp_path / "set", {"train": (12,), "val": (12,)}, picture=lambda i: broken.get(i) or small_png(i)
    )
    del broken[9]
    manifest = read_manifest(folder)
    settings = config(global_batch=12, micro_batch=12)
    (batch,) = epoch_0(manifest.split("train"), settings)
    assert batch.bad == ("train-000000.tar",) * 2
    assert set(batch.ids.tolist()) == set(range(12)) - set(broken)
    with pytest.raises(ShardError, match=r"val-000000\.tar, sample val-00000003: .*(PNG|image|truncated)"):
        list(eval_loader(manifest.split("val"), settings, rank=0, world=1, threads=0))


def test_loading_logs_nothing_where_nothing_is_wrong(
    train_samples: Samples, config: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "gsa"):
        for _ in load(train_samples, config(), steps=2):
            pass
    assert not caplog.records


# --- to the device -----------------------------------------------------------------------------------------


def test_to_device_is_the_plain_formula() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), np.uint8)
    found = to_device(torch.from_numpy(images), torch.device("cpu"))
    assert (found.shape, found.dtype) == ((2, 3, 5, 7), torch.float32)
    assert found.is_contiguous(memory_format=torch.channels_last)
    for b, h, w, c in np.ndindex(*images.shape):
        expected = (images[b, h, w, c] / 255 - MEAN[c]) / STD[c]
        assert abs(float(found[b, c, h, w]) - expected) < 1e-6
