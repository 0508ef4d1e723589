"""Streaming: less is promised than with a manifest, and that much is kept."""

import gzip
import os
import shutil
import tarfile
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tars import CLASSES, numbers_of, write_set

from pipeline import metrics, train
from pipeline.config import Config, ConfigError, InputError
from pipeline.data import Batch
from pipeline.manifest import ShardError
from pipeline.plan import prepare
from pipeline.rundir import Out
from pipeline.stream import _samples_of, stream_loader

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # by webdataset


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set whose train shards serve as tars without a manifest."""
    return write_set(tmp_path_factory.mktemp("tars") / "set", {"train": (30, 30, 36, 24), "val": (9,)})


@pytest.fixture(scope="module")
def config(tars: Path, mini_config: Any) -> Any:
    values = {"image_size": 8, "global_batch": 24, "micro_batch": 4, "stream_samples": 120}
    return lambda **changes: mini_config(
        **{**values, "stream": f"{tars}/train-{{000000..000003}}.tar", **changes}
    )


def read(
    config: Config, *, world: int = 1, threads: int = 0, epoch: int = 0, first_step: int = 0
) -> list[list[Batch]]:
    """Each rank's batches."""
    place = {"epoch": epoch, "first_step": first_step, "threads": threads, "draws": 2}
    return [list(stream_loader(config, classes=CLASSES, rank=r, world=world, **place)) for r in range(world)]


def numbers(batches: list[Batch]) -> list[int]:
    return [n for b in batches for n in numbers_of(b.images.numpy())]


@pytest.mark.parametrize("threads", [0, 2])
def test_one_rank_sees_each_sample_of_its_shards_once_in_a_shuffled_order(threads: int, config: Any) -> None:
    (batches,) = read(config(), threads=threads)
    assert [len(b.labels) for b in batches] == [4] * 30
    assert sorted(numbers(batches)) == list(range(120))
    assert numbers(batches) != list(range(120))
    assert [n for b in batches for n in b.labels.tolist()] == [n % CLASSES for n in numbers(batches)]
    assert not any(b.bad for b in batches)


def test_the_same_seed_and_epoch_are_the_same_batches_and_others_are_not(config: Any) -> None:
    def content(**changes: Any) -> list[bytes]:
        return [b.images.numpy().tobytes() for b in read(config(**changes.pop("config", {})), **changes)[0]]

    assert content() == content() == content(threads=2)
    assert content() != content(epoch=1)
    assert content() != content(config={"seed": 1})


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_read_shards_of_their_own_and_equally_many_samples(world: int, config: Any) -> None:
    """A rank whose shards are used up begins them again: all ranks take part in every step."""
    ranks = read(config(), world=world)
    assert {len(batches) for batches in ranks} == {30 // world}
    seen = [set(numbers(batches)) for batches in ranks]
    assert not set.intersection(*seen)
    assert len(set.union(*seen)) > 90


def test_a_resume_has_the_rest_of_the_steps(config: Any) -> None:
    assert len(read(config(), first_step=3)[0]) == 2 * 6


def test_what_is_bad_is_logged_and_replaced(
    tars: Path, config: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A sample without a label, one with another's picture, a tar that is none; `.pyd` is not looked into."""
    whole, path = tars / "train-000000.tar", tmp_path / "a.tar"
    with tarfile.open(whole) as old, tarfile.open(path, "w") as new:
        for member in old:
            file = old.extractfile(member)
            if member.name != "train-00000005.cls":
                new.addfile(member, file)
        evil = tarfile.TarInfo("train-00000029.pyd")
        new.addfile(evil)
    (tmp_path / "b.tar").write_bytes(b"no tar" * 1000)
    (batches,) = read(config(stream=str(tmp_path), stream_samples=24))
    assert 5 not in set(numbers(batches))
    assert {shard for b in batches for shard in b.bad} <= {"a.tar", "b.tar"}  # 24 of 30 samples are seen
    ((*batches, rest),) = read(config(stream=str(tmp_path), stream_samples=48))
    assert {shard for b in batches for shard in b.bad} == {"a.tar", "b.tar"}
    assert f"bad_sample {tmp_path}/b.tar: invalid header" in caplog.text
    assert (
        "a.tar, sample train-00000005: expected a label from 0 to 2 in its .cls member, got ''" in caplog.text
    )
    assert len(rest.labels) == 4


def test_a_shard_that_is_cut_anywhere_is_one_bad_sample(tars: Path, tmp_path: Path) -> None:
    """Where a header would begin, webdataset takes a cut for the end of the archive."""
    whole = (tars / "train-000000.tar").read_bytes()
    end = whole.rindex(b"{}") + 512  # of the last member
    for cut in [0, 100, end, end + 512, *range(512, end, 512 * 7), *range(700, end, 512 * 11)]:
        (tmp_path / "b.tar").write_bytes(whole[:cut])
        found = list(_samples_of(str(tmp_path / "b.tar")))
        assert ["__lost__" in sample for sample in found] == [False] * (len(found) - 1) + [True], cut
    for data in (whole[: end + 1024], gzip.compress(whole)):
        (tmp_path / "b.tar").write_bytes(data)
        assert ["__lost__" in sample for sample in _samples_of(str(tmp_path / "b.tar"))] == [False] * 30


def test_lost_shards_count_towards_the_budget(tars: Path, config: Any, tmp_path: Path) -> None:
    """One that is cut, and one that is gone after the listing; all others are read."""
    for name in ("a.tar", "b.tar", "c.tar"):
        shutil.copy(tars / "train-000000.tar", tmp_path / name)
    os.truncate(tmp_path / "b.tar", 512 * 30)
    loader = stream_loader(
        config(stream=str(tmp_path), stream_samples=72),
        classes=CLASSES,
        epoch=0,
        first_step=0,
        rank=0,
        world=1,
        threads=0,
        draws=2,
    )
    (tmp_path / "c.tar").unlink()
    assert {shard for b in loader for shard in b.bad} == {"b.tar", "c.tar"}


@pytest.mark.parametrize("folder", ["a#b", "a?b", "100% x=y", "a:b"])
def test_a_path_may_hold_any_sign(folder: str, tars: Path, config: Any, tmp_path: Path) -> None:
    (tmp_path / folder).mkdir()
    shutil.copy(tars / "train-000000.tar", tmp_path / folder / "a#1?x.tar")
    (batches,) = read(config(stream=str(tmp_path / folder), stream_samples=24))
    assert set(numbers(batches)) <= set(range(30))
    assert not any(b.bad for b in batches)


def test_a_stream_that_begins_again_says_so_once(config: Any, caplog: pytest.LogCaptureFixture) -> None:
    read(config())
    assert "stream_begins_again" not in caplog.text
    read(config(stream_samples=480))
    assert caplog.text.count("stream_begins_again") == 1
    assert "rank=0 samples=120: " in caplog.text
    assert "next: data.stream_samples of at most about 120" in caplog.text


def test_bad_input_is_one_clear_line(tars: Path, config: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="4 shards cannot be shared by 6 ranks; next: fewer workers"):
        read(config(), world=6)
    with pytest.raises(ConfigError, match="stream and stream_samples: expected both or none"):
        config(stream_samples=None)
    with pytest.raises(InputError, match=r"no \.tar file matches|not there"):
        read(config(stream=str(tmp_path / "none-*.tar")))
    for url in ("pipe:touch canary", "https://example.org/{0..3}.tar", "s3://bucket/a.tar"):
        with pytest.raises(InputError, match="expected a path"):
            read(config(stream=url))
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(ShardError, match=r"data.stream: not one sample in '.*empty\.tar'"):
        read(config(stream=str(tmp_path / "empty.tar"), stream_samples=24))


def test_a_run_trains_on_a_stream_and_is_evaluated_on_the_set(
    tars: Path, config: Any, tmp_path: Path
) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "mini").symlink_to(tars)
    run = prepare(Out(tmp_path), config(image_size=32, epochs=1, warmup_epochs=0.0))
    result = train.train(run, lambda report: None)
    assert result["val/count"] == 9
    assert metrics.read(run.metrics)[-1].step == 5
    assert np.isfinite(result["train/loss"])


def test_ranks_together_have_whole_global_batches(config: Any) -> None:
    ranks = read(config(), world=2)
    assert len(list(chain(*ranks))) * 4 == 120
