"""Stream: train shards without a manifest, each read from end to end by webdataset. Less is promised: see below."""

import logging
import os
import random
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import numpy as np
from torch import Tensor

from pipeline.config import Config, ConfigError
from pipeline.data import PICTURE_DRAWS, Batch, Outcome, load, train_picture
from pipeline.foreign import local_tars
from pipeline.manifest import ShardError, named
from pipeline.order import Draws, sample_draws, steps_per_epoch
from pipeline.scan import COMPRESSED, PICTURES

log = logging.getLogger("gsa")

SHUFFLE = 5_000  # samples that are drawn from at a time
END = 2 * tarfile.BLOCKSIZE  # zeros behind the last member


def stream_loader(
    config: Config,
    *,
    classes: int,
    epoch: int,
    first_step: int,
    rank: int,
    world: int,
    threads: int,
    draws: int,
) -> Iterator[Batch]:
    """This rank's micro-batches of an epoch of `data.stream_samples` samples, from step `first_step` on.

    What is promised: all ranks get equally many, from shards in an order of (seed, epoch), in a pass over them
    each by one rank, shuffled through a buffer of 5,000. What is not, unlike with a manifest: that a sample is
    seen just once in an epoch (a rank whose shards are used up begins again, which is logged); that batches are the
    same for another number of ranks; that a resume goes on with the samples not yet seen (it begins the shards
    again); that each sample of a damaged shard counts: how many it had is not known, so that a shard that is cut or
    cannot be read counts as one bad sample. Only pictures, `cls` and no other members are decoded.
    Raises InputError: no such shards, fewer than ranks, not one sample in them.
    """
    tars = local_tars(str(config.data.stream))
    if len(tars) < world:
        raise ConfigError(
            f"data.stream: {len(tars)} shards cannot be shared by {world} ranks; next: fewer workers"
        )
    optim = config.optim
    share = config.micro_batches // world
    steps = steps_per_epoch(config.data.stream_samples or 0, optim.global_batch) - first_step
    samples = _samples(tars, random.Random(f"{config.seed} {epoch}"), rank, world)
    batches = (list(islice(samples, optim.micro_batch)) for _ in range(steps * share))

    def number(sample: dict[str, Any]) -> int:
        return zlib.crc32(sample["__key__"].encode())

    def draw(batch: Sequence[dict[str, Any]]) -> Draws:
        ids = np.array([number(sample) for sample in batch])
        return sample_draws(ids, PICTURE_DRAWS + draws, seed=config.seed, epoch=epoch)

    def read(sample: dict[str, Any], numbers: list[float], image: Tensor) -> Outcome:
        key, shard = sample["__key__"], Path(sample["__url__"]).name
        if "__lost__" in sample:
            return Outcome(number(sample), 0, shard, f"{sample['__url__']}: {sample['__lost__']}")
        try:
            label = _label(sample, classes)
            train_picture(_picture(sample), numbers, config.data, image)
        except ValueError as error:  # DecodeError is one
            return Outcome(number(sample), 0, shard, f"{sample['__url__']}, sample {key}: {error}")
        return Outcome(number(sample), label, shard)

    return load(batches, read, draw, side=config.data.image_size, threads=threads)


def _samples(tars: list[str], rng: random.Random, rank: int, world: int) -> Iterator[dict[str, Any]]:
    """The undecoded samples of this rank's shards, without end; and a `__lost__` for what is damaged."""
    import webdataset

    told = False
    while True:
        mine = rng.sample(tars, len(tars))[rank::world]
        shuffled = webdataset.shuffle(SHUFFLE, rng=random.Random(rng.random()))
        count = 0
        for sample in shuffled(chain.from_iterable(map(_samples_of, mine))):
            count += "__lost__" not in sample
            yield sample
        if not count:
            raise ShardError(f"data.stream: not one sample in {named([repr(tar) for tar in mine])}")
        if not told:
            told = True
            log.warning(
                "stream_begins_again rank=%d samples=%d: its shards are below its part of data.stream_samples, "
                "and come again in this epoch; next: data.stream_samples of at most about %d",
                rank,
                count,
                count * world,
            )


def _samples_of(tar: str) -> Iterator[dict[str, Any]]:
    """The samples of a shard; at its end, a `__lost__` for each fault. Opened here: webdataset takes URLs."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    lost: list[str] = []

    def go_on(error: Exception) -> bool:
        known = isinstance(error, OSError) and error.strerror
        lost.append(str(known or error.args[0]).partition(" @ ")[0])  # behind it, webdataset's own
        return True

    try:
        with open(tar, "rb") as file:
            members = tar_file_expander([{"url": tar, "stream": file}], handler=go_on)
            yield from group_by_keys(members, handler=go_on)
            if not lost and not _whole(file):
                lost.append("cut short: no end of the archive")
    except OSError as error:
        lost.append(f"cannot be read: {error.strerror}")
    for reason in dict.fromkeys(lost):  # an end that comes too early is met twice
        yield {"__key__": "", "__url__": tar, "__lost__": reason}


def _whole(file: IO[bytes]) -> bool:
    """Whether an archive ends in its two blocks of zeros. Of a compressed one, the decompressor says it."""
    file.seek(0)
    if file.read(4).startswith(COMPRESSED):
        return True
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - END))
    return file.read() == bytes(END)


def _picture(sample: dict[str, Any]) -> bytes:
    found = [data for ext, data in sample.items() if ext.lower() in PICTURES]
    if len(found) != 1:
        raise ValueError(f"expected one picture, got {len(found)}")
    return bytes(found[0])


def _label(sample: dict[str, Any], classes: int) -> int:
    text = sample.get("cls", b"").decode("ascii", "replace").strip()
    if not text.isdigit() or int(text) >= classes:
        raise ValueError(f"expected a label from 0 to {classes - 1} in its .cls member, got {text!r}")
    return int(text)
