"""(seed, epoch, manifest) -> the order of samples: the same for every world size; position in it = resume."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]  # sample numbers: rows of a split in the manifest
Draws = NDArray[np.float32]  # (samples, n) random numbers of [0, 1)
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # between two states of SplitMix64


def steps_per_epoch(samples: int, global_batch: int) -> int:
    """Whole global batches in an epoch; the rest, other samples each epoch, is left out.

    Raises ValueError if there is not even one.
    """
    steps = samples // global_batch
    if not steps:
        raise ValueError(
            f"optim.global_batch {global_batch} is above the {samples} train samples; "
            f"at most {samples} would do"
        )
    return steps


class EpochOrder:
    """The order of a split's samples in one epoch: each once, and any part of it without the rest.

    The shards are shuffled and laid out in blocks of about `block` samples; within a block all samples
    are shuffled. So a reader has the shards of one block open, and is done with each of them after it.
    """

    def __init__(self, shard_sizes: Sequence[int], *, seed: int, epoch: int, block: int) -> None:
        sizes = np.asarray(shard_sizes, np.int64)
        self._key, self._sizes, self._firsts = (seed, epoch), sizes, np.cumsum(sizes) - sizes
        shards = np.random.default_rng(self._key).permutation(len(sizes))
        ends = np.cumsum(sizes[shards])
        total = int(sizes.sum())
        # In whole shards, as equal as these allow: a small block at the end would be shuffled poorly.
        block_of = (ends - 1) * max(1, total // block) // max(1, total)
        last = np.flatnonzero(np.diff(block_of, append=-1))  # shard of each block
        self._blocks, self._ends = np.split(shards, last[:-1] + 1), ends[last]
        self._kept: tuple[int, Ids] = (-1, np.empty(0, np.int64))

    def __len__(self) -> int:
        return int(self._sizes.sum())

    def take(self, start: int, stop: int) -> Ids:
        """The sample numbers at the positions start..stop of the epoch."""
        parts = []
        while start < stop:
            block = self._block_at(start)
            first = int(self._ends[block - 1]) if block else 0
            parts.append(self._shuffled(block)[start - first : stop - first])
            start += len(parts[-1])
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def shards_after(self, sample: int) -> list[int]:
        """The shards of the block that follows the one with that sample; none after the last."""
        shard = int(np.searchsorted(self._firsts + self._sizes, sample, side="right"))
        block = next(n for n, shards in enumerate(self._blocks) if shard in shards)
        return [int(s) for shards in self._blocks[block + 1 : block + 2] for s in shards]

    def _block_at(self, position: int) -> int:
        return int(np.searchsorted(self._ends, position, side="right"))

    def _shuffled(self, block: int) -> Ids:
        if self._kept[0] != block:
            samples = [np.arange(self._sizes[s]) + self._firsts[s] for s in self._blocks[block]]
            rng = np.random.default_rng((*self._key, 2, block))  # 1: the generators of the samples
            self._kept = block, rng.permutation(np.concatenate(samples))
        return self._kept[1]


def micro_batches(
    order: EpochOrder,
    *,
    global_batch: int,
    micro_batch: int,
    rank: int,
    world: int,
    first_step: int = 0,
    repeats: int = 1,
) -> Iterator[Ids]:
    """Sample numbers of this rank's micro-batches of an epoch, from step `first_step` on.

    A global batch is k micro-batches at fixed places; rank r of w takes the r-th w-th of them. So global
    batch and micro-batches are the same for every world size that divides k, and a resume is a slice.
    repeats: views of each sample in a global batch, as far from one another as can be (repeated augmentation,
    arXiv 1901.09335): an epoch has as many steps, of fewer samples. The number of view v of sample s is
    s + v * len(order).
    """
    k = global_batch // micro_batch
    assert k % world == 0, f"{world} ranks cannot share {k} micro-batches"
    share, distinct = global_batch // world, -(-global_batch // repeats)
    views, places = np.divmod(np.arange(rank * share, (rank + 1) * share), distinct)
    for step in range(first_step, steps_per_epoch(len(order), global_batch)):
        samples = order.take(step * distinct, (step + 1) * distinct)
        yield from np.split(samples[places] + views * len(order), share // micro_batch)


def eval_batches(samples: int, *, batch: int, rank: int, world: int) -> Iterator[Ids]:
    """Sample numbers of this rank's evaluation batches, a stretch of the split: over all ranks each once."""
    start, stop = samples * rank // world, samples * (rank + 1) // world
    for first in range(start, stop, batch):
        yield np.arange(first, min(first + batch, stop), dtype=np.int64)


class Certificate(NamedTuple):
    """Which samples were seen, in whatever order: how many, and the sum of their 64-bit hashes."""

    samples: int
    sum: int

    def __str__(self) -> str:
        return f"{self.samples}:{self.sum:016x}"

    def __add__(self, other: object) -> "Certificate":
        assert isinstance(other, Certificate), other
        return Certificate(self.samples + other.samples, (self.sum + other.sum) % 2**64)


def certify(ids: Ids, salt: int) -> Certificate:
    """The certificate of these samples; `salt` is that of the split (Samples.salt).

    A sample that is missing, or there twice, gives another one: a sum, unlike an exclusive or, does not
    cancel.
    """
    hashes = _split_mix(ids.astype(np.uint64) + np.uint64(salt % 2**64))
    return Certificate(len(ids), int(hashes.sum(dtype=np.uint64)))


def sample_draws(samples: Ids, count: int, *, seed: int, epoch: int) -> Draws:
    """(samples, count) numbers of [0, 1), of 24 bits: those of a sample in an epoch, whoever draws them."""
    # 1: not the generator of the epoch's order. A generator a sample would take longer than what it decides.
    key = np.random.SeedSequence((seed, epoch, 1)).generate_state(1, np.uint64)
    streams = _split_mix(samples.astype(np.uint64) * GOLDEN + key)
    bits = _split_mix(streams[:, None] + np.arange(count, dtype=np.uint64) * GOLDEN)
    return (bits >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def _split_mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64 (Steele, Lea, Flood 2014): the number that follows each state. Unsigned arrays wrap around."""
    x = x + GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
