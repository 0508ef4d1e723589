"""(seed, epoch, size) -> the order of samples: the same for every world size; position in it = resume."""

from collections.abc import Iterator

import numpy as np


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


def micro_batches(
    samples: int,
    *,
    seed: int,
    epoch: int,
    global_batch: int,
    micro_batch: int,
    rank: int,
    world: int,
    first_step: int = 0,
) -> Iterator[np.ndarray]:
    """Sample numbers of this rank's micro-batches of an epoch, from step `first_step` on.

    A global batch is k micro-batches at fixed places; rank r of w takes the r-th w-th of them. So global
    batch and micro-batches are the same for every world size that divides k, and a resume is a slice.
    """
    k = global_batch // micro_batch
    assert k % world == 0, f"{world} ranks cannot share {k} micro-batches"
    share = k // world
    order = np.random.default_rng((seed, epoch)).permutation(samples)
    for step in range(first_step, steps_per_epoch(samples, global_batch)):
        start = step * global_batch + rank * share * micro_batch
        for i in range(share):
            yield order[start + i * micro_batch : start + (i + 1) * micro_batch]


def eval_batches(samples: int, *, batch: int, rank: int, world: int) -> Iterator[np.ndarray]:
    """Sample numbers of this rank's evaluation batches: over all ranks each sample exactly once."""
    mine = np.arange(rank, samples, world)
    for start in range(0, len(mine), batch):
        yield mine[start : start + batch]
