"""The order of samples: one sequence of global batches, whatever shares it and wherever it is taken up."""

import hashlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.order import (
    Certificate,
    EpochOrder,
    certify,
    eval_batches,
    micro_batches,
    sample_draws,
    steps_per_epoch,
)

SHARDS = (31, 1, 40, 0, 24, 35)  # uneven; 131 samples
GLOBAL, MICRO, STEPS = 24, 2, 5  # 5 steps of 12 micro-batches; 11 samples are left out
WORLDS = (1, 2, 3, 4, 6, 12)
BLOCK = 30


def order_of(
    seed: int = 0, epoch: int = 0, block: int = BLOCK, sizes: tuple[int, ...] = SHARDS
) -> EpochOrder:
    return EpochOrder(sizes, seed=seed, epoch=epoch, block=block)


def epoch_of(world: int, *, epoch: int = 0, seed: int = 0, first_step: int = 0) -> list[list[int]]:
    """The global batches of an epoch, put together from what each rank gets."""
    ranks = [
        list(
            micro_batches(
                order_of(seed, epoch),
                global_batch=GLOBAL,
                micro_batch=MICRO,
                rank=rank,
                world=world,
                first_step=first_step,
            )
        )
        for rank in range(world)
    ]
    share = GLOBAL // MICRO // world
    assert {len(batches) for batches in ranks} == {(STEPS - first_step) * share}
    assert {len(batch) for batches in ranks for batch in batches} <= {MICRO}
    return [
        [int(i) for batches in ranks for batch in batches[step * share : (step + 1) * share] for i in batch]
        for step in range(STEPS - first_step)
    ]


def slow_order(sizes: tuple[int, ...], *, seed: int, epoch: int, blocks: list[list[int]]) -> list[int]:
    """The definition: the blocks one after the other, each shuffled by a generator of its own."""
    found: list[int] = []
    for number, block in enumerate(blocks):
        samples = [sum(sizes[:s]) + i for s in block for i in range(sizes[s])]
        found += np.random.default_rng((seed, epoch, 2, number)).permutation(samples).tolist()
    return found


def test_an_order_is_its_blocks_of_whole_shards_each_shuffled() -> None:
    shards = np.random.default_rng((7, 3)).permutation(4).tolist()
    blocks = [shards[:2], shards[2:]]
    sizes = (10, 10, 10, 10)
    found = order_of(7, 3, block=20, sizes=sizes).take(0, 40).tolist()
    assert found == slow_order(sizes, seed=7, epoch=3, blocks=blocks)


def test_global_batches_are_slices_of_the_order() -> None:
    order = order_of(7, 3).take(0, 131)
    expected = [order[step * GLOBAL : (step + 1) * GLOBAL].tolist() for step in range(STEPS)]
    assert epoch_of(1, seed=7, epoch=3) == expected


sizes_of_shards = st.lists(st.integers(0, 60), min_size=1, max_size=12).map(tuple)


@given(sizes=sizes_of_shards, block=st.integers(1, 400), seed=st.integers(0, 2**63 - 1), data=st.data())
def test_any_part_of_an_order_is_that_part_of_the_whole(
    sizes: tuple[int, ...], block: int, seed: int, data: st.DataObject
) -> None:
    whole = order_of(seed, 1, block, sizes).take(0, sum(sizes)).tolist()
    assert sorted(whole) == list(range(sum(sizes)))
    start = data.draw(st.integers(0, sum(sizes)))
    stop = data.draw(st.integers(start, sum(sizes)))
    assert order_of(seed, 1, block, sizes).take(start, stop).tolist() == whole[start:stop]


@given(sizes=sizes_of_shards, block=st.integers(1, 200), data=st.data())
def test_the_shards_that_come_next_are_those_of_the_next_block(
    sizes: tuple[int, ...], block: int, data: st.DataObject
) -> None:
    if not sum(sizes):
        return
    order = order_of(block=block, sizes=sizes)
    at = data.draw(st.integers(0, sum(sizes) - 1))
    sample = int(order.take(at, at + 1)[0])
    blocks = [set(block.tolist()) for block in order._blocks]
    shard = next(s for s in range(len(sizes)) if sum(sizes[: s + 1]) > sample)
    here = next(n for n, block in enumerate(blocks) if shard in block)
    assert set(order.shards_after(sample)) == (blocks[here + 1] if here + 1 < len(blocks) else set())


@given(shards=st.integers(1, 60), size=st.integers(1, 50), block=st.integers(1, 500))
def test_a_shard_is_read_within_a_stretch_of_about_the_stated_block(
    shards: int, size: int, block: int
) -> None:
    """So few are open at a time, and no shard is fetched twice."""
    owner = order_of(block=block, sizes=(size,) * shards).take(0, shards * size) // size
    for shard in range(shards):
        places = np.flatnonzero(owner == shard)
        assert places[-1] - places[0] < 2 * block + 2 * size


@given(shards=st.integers(1, 60), size=st.integers(1, 50), block=st.integers(1, 500))
def test_no_small_block_is_left_at_the_end(shards: int, size: int, block: int) -> None:
    """Its batches would be of one shard or two."""
    lengths = np.diff(order_of(block=block, sizes=(size,) * shards)._ends, prepend=0)
    assert lengths.sum() == shards * size
    assert lengths.min() > min(block, shards * size) - size


@pytest.mark.parametrize("first_step", range(STEPS + 1))
@pytest.mark.parametrize("world", WORLDS)
def test_global_batches_are_the_same_for_any_world_and_resume_point(world: int, first_step: int) -> None:
    for epoch in (0, 1, 5):
        assert epoch_of(world, epoch=epoch, first_step=first_step) == epoch_of(1, epoch=epoch)[first_step:]


def test_the_order_is_that_of_earlier_releases() -> None:
    """Golden: another order, be it NumPy's doing, would give a resumed run some samples twice."""
    whole = EpochOrder([1000] * 1281 + [167], seed=2**40, epoch=89, block=32_768).take(0, 1_281_167)
    assert whole[:8].tolist() == [787352, 745401, 1167319, 952208, 289393, 366273, 973957, 1145115]
    assert hashlib.sha256(whole.tobytes()).hexdigest()[:16] == "df2c06f84fd5d32e"


@given(
    samples=st.integers(1, 300),
    micro=st.integers(1, 9),
    k=st.integers(1, 12),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 1000),
)
def test_a_sample_comes_at_most_once_an_epoch(
    samples: int, micro: int, k: int, seed: int, epoch: int
) -> None:
    if samples < micro * k:
        return
    order = order_of(seed, epoch, 50, (samples // 2, samples - samples // 2))
    drawn = [
        i
        for rank in range(k)
        for batch in micro_batches(order, global_batch=micro * k, micro_batch=micro, rank=rank, world=k)
        for i in batch.tolist()
    ]
    assert len(drawn) == len(set(drawn)) == steps_per_epoch(samples, micro * k) * micro * k
    assert set(drawn) <= set(range(samples))


@pytest.mark.parametrize("repeats", [2, 3, 4, 16, 100])
def test_views_of_a_sample_lie_apart_in_one_global_batch(repeats: int) -> None:
    """Repeated augmentation: as many steps an epoch, of fewer samples, the same for any world."""
    order = order_of(0, 3, 50, (70, 63))
    shape = {"global_batch": 16, "micro_batch": 4, "repeats": repeats}

    def drawn(world: int, rank: int) -> list[list[int]]:
        return [ids.tolist() for ids in micro_batches(order, rank=rank, world=world, **shape)]

    steps = [[i for ids in drawn(1, 0)[4 * step : 4 * step + 4] for i in ids] for step in range(8)]
    assert len(drawn(1, 0)) == 4 * steps_per_epoch(133, 16) == 32
    assert drawn(1, 0)[2::4] == drawn(4, 2)
    seen: list[int] = []
    for views in steps:
        assert len(set(views)) == 16
        counts = Counter(view % 133 for view in views)
        assert max(counts.values()) == min(16, repeats)
        assert len(counts) == -(-16 // repeats)
        for sample, count in counts.items():
            assert {sample + 133 * view for view in range(count)} <= set(views)
        seen += counts
    assert len(seen) == len(set(seen))
    if repeats in (2, 4):
        assert all(len({v % 133 for v in batch}) == 4 for batch in drawn(1, 0)), "views in one micro-batch"


def test_epochs_and_seeds_differ_and_what_is_left_out_differs_too() -> None:
    epochs = [epoch_of(1, seed=seed, epoch=epoch) for seed in range(3) for epoch in range(10)]
    assert len({str(batches) for batches in epochs}) == 30
    left_out = [set(range(131)) - {i for batch in batches for i in batch} for batches in epochs]
    assert {len(rest) for rest in left_out} == {11}
    assert not set.intersection(*left_out)


@given(samples=st.integers(0, 200), world=st.integers(1, 12), batch=st.integers(1, 20))
def test_evaluation_sees_each_sample_once_for_any_world(samples: int, world: int, batch: int) -> None:
    ranks = [list(eval_batches(samples, batch=batch, rank=rank, world=world)) for rank in range(world)]
    assert [int(i) for batches in ranks for b in batches for i in b] == list(range(samples))
    assert all(1 <= len(b) <= batch for batches in ranks for b in batches)
    shares = [sum(map(len, batches)) for batches in ranks]
    assert max(shares) - min(shares) <= 1


def test_a_batch_above_the_split_is_refused_with_what_would_do() -> None:
    assert steps_per_epoch(48, 24) == 2
    assert steps_per_epoch(24, 24) == 1
    with pytest.raises(
        ValueError, match="global_batch 24 is above the 23 train samples; at most 23 would do"
    ):
        steps_per_epoch(23, 24)


def test_ranks_that_cannot_share_are_refused() -> None:
    with pytest.raises(AssertionError, match="5 ranks cannot share 12 micro-batches"):
        epoch_of(5)


# --- certificates ------------------------------------------------------------------------------------------


def slow_hash(i: int, salt: int) -> int:
    """SplitMix64's finalizer in whole numbers."""
    x = (i + salt + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


@given(
    ids=st.lists(st.integers(0, 2**40), max_size=40), salt=st.integers(0, 2**64 - 1), cut=st.integers(0, 40)
)
def test_a_certificate_is_the_sum_of_hashes_in_any_order_and_any_parts(
    ids: list[int], salt: int, cut: int
) -> None:
    found = certify(np.array(ids, np.int64), salt)
    assert found == Certificate(len(ids), sum(slow_hash(i, salt) for i in ids) % 2**64)
    assert found == certify(np.array(ids[::-1], np.int64), salt)
    assert found == certify(np.array(ids[:cut], np.int64), salt) + certify(
        np.array(ids[cut:], np.int64), salt
    )


def test_a_certificate_tells_what_is_missing_double_or_of_another_split() -> None:
    whole = np.arange(50_000)
    right = certify(whole, 5)
    assert str(right) == "50000:fd224254665fd0e3"  # golden: it is written into registries
    others = [whole[1:], np.append(whole, 7), np.where(whole == 3, 4, whole), whole + 1]
    assert right not in [certify(other, 5) for other in others]
    assert right != certify(whole, 6)


# --- the numbers of a sample -------------------------------------------------------------------------------


def slow_draws(sample: int, count: int, *, seed: int, epoch: int) -> list[float]:
    """The definition: a SplitMix64 of the sample, whose seed is a number of the SplitMix64 of (seed, epoch)."""
    golden, mask = 0x9E3779B97F4A7C15, 2**64 - 1

    def split_mix(state: int) -> int:
        z = (state + golden) & mask
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
        return z ^ z >> 31

    # The published first numbers of SplitMix64 from 1234567.
    assert [split_mix(1234567), split_mix(1234567 + golden)] == [6457827717110365317, 3203168211198807973]
    key = int(np.random.SeedSequence((seed, epoch, 1)).generate_state(1, np.uint64)[0])
    stream = split_mix(key + sample * golden)
    return [(split_mix(stream + i * golden) >> 40) / 2**24 for i in range(count)]


def test_the_numbers_of_a_sample_belong_to_seed_epoch_and_sample_alone() -> None:
    ids = np.array([5, 0, 1_281_166, 2**32 - 1])
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (2**63 - 1, 300)):
        found = sample_draws(ids, 9, seed=seed, epoch=epoch)
        assert found.dtype == np.float32
        assert found.tolist() == [slow_draws(int(i), 9, seed=seed, epoch=epoch) for i in ids]
        assert sample_draws(ids[1:2], 30, seed=seed, epoch=epoch)[0, :9].tolist() == found[1].tolist()
    firsts = [float(sample_draws(ids, 1, seed=s, epoch=e)[0, 0]) for s in range(9) for e in range(9)]
    assert len(set(firsts)) == 81


def test_the_numbers_of_samples_are_spread_evenly_and_independent() -> None:
    found = sample_draws(np.arange(20_000), 24, seed=0, epoch=0).astype(float)
    assert 0 <= found.min() < 1e-4
    assert 1 > found.max() > 1 - 1e-4
    counts = np.stack([np.bincount((column * 50).astype(int), minlength=50) for column in found.T])
    chi2 = ((counts - 400) ** 2 / 400).sum(1)  # 49 degrees of freedom: 49 +- 10
    assert 30 < chi2.mean() < 68
    assert chi2.max() < 49 + 5 * 10
    columns = np.corrcoef(np.concatenate([found[:-1], found[1:]], axis=1).T)  # with the next sample's, too
    assert np.abs(columns - np.eye(48)).max() < 5 / np.sqrt(20_000)
    other = sample_draws(np.arange(20_000), 24, seed=0, epoch=1).astype(float)
    assert abs(np.corrcoef(found.ravel(), other.ravel())[0, 1]) < 0.01
