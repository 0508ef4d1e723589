"""Order and manifest at ImageNet's size: seconds to open and to resume, memory of 1 and 4, quality of the shuffle.

    python tests/benchmarks/bench_order.py [--rounds 5] [--epochs 5]

1,282 shards of 1,000 samples; a manifest of them is written into a temporary folder. The shuffle is compared with
a perfect one and with webdataset's own (shardshuffle=100, then a buffer), on numbers.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pyarrow as pa
import webdataset
from bench_loader import apart, rss
from measure import hardware, with_spread
from numpy.typing import NDArray

from pipeline import manifest as manifests
from pipeline.config import DataConfig, OptimConfig
from pipeline.manifest import SCHEMA, Shard, read_manifest, write_manifest
from pipeline.order import EpochOrder, micro_batches, steps_per_epoch

SHARDS, PER_SHARD, CLASSES = 1282, 1000, 1000  # ImageNet's
BLOCK = DataConfig().shuffle_block


# --- a manifest of ImageNet's size --------------------------------------------------------------------------


def start(folder: Path, *, rounds: int) -> None:
    rows, shards = imagenet_rows()
    folder.mkdir()
    begun = time.perf_counter()
    write_manifest(folder, rows, classes=[f"n{c:08d}" for c in range(CLASSES)], shards=shards, made={})
    seconds, size = time.perf_counter() - begun, sum(p.stat().st_size for p in folder.iterdir()) / 1e6
    print(
        f"start: {len(rows)} samples, {len(shards)} shards: written in {seconds:.2f} s, {size:.1f} MB on disk"
    )
    (first, _, before), peak = apart(open_and_resume, folder, 0)
    print(
        f"  the first process of a machine opens it in {first:.2f} s and holds at most {peak - before:.0f} MB"
    )
    opened, resumed, most = [], [], []
    for n in range(rounds):
        (open_seconds, resume_seconds, before), peak = apart(open_and_resume, folder, n)
        opened.append(open_seconds)
        resumed += resume_seconds
        most.append(peak - before)
    print(f"  the next open it in {with_spread(opened)} s, n = {rounds} processes")
    print(f"  opening and resuming hold at most {with_spread(most, '.0f')} MB, shared ones included")
    for shared, what in ((True, "shared"), (False, "not shared")):
        for processes in (1, 4):
            held = [together(folder, processes, shared=shared) for _ in range(rounds)]
            print(
                f"  {what}, {processes} process(es) hold together {with_spread(held, '.0f')} MB, n = {rounds}"
            )
    print(
        f"  resume, rank 3 of 8, any step of any epoch, to the numbers of its first batch: "
        f"{with_spread([1e3 * s for s in resumed], '.1f')} ms, n = {len(resumed)}",
        flush=True,
    )


def imagenet_rows() -> tuple[pa.Table, list[Shard]]:
    rng, n = np.random.default_rng(0), SHARDS * PER_SHARD
    size = rng.lognormal(11.4, 0.6, n).astype(np.int64)  # 107 kB on average
    ends = size.reshape(SHARDS, PER_SHARD).cumsum(1)
    names = [f"train-{s:06d}.tar" for s in range(SHARDS)]
    shard_of = np.repeat(np.arange(SHARDS, dtype=np.int32), PER_SHARD)
    columns = {
        "split": pa.DictionaryArray.from_arrays(np.zeros(n, np.int32), ["train"]),
        "shard": pa.DictionaryArray.from_arrays(shard_of, names),
        "key": [f"train-{i:08d}" for i in range(n)],
        "label": rng.integers(0, CLASSES, n, np.int32),
        "ext": pa.DictionaryArray.from_arrays(np.zeros(n, np.int32), ["jpg"]),
        "offset": ends.ravel() - size,
        "size": size,
        "crc32": rng.integers(0, 2**32, n, np.uint32),
        "width": rng.integers(200, 800, n, np.int32),
        "height": rng.integers(200, 800, n, np.int32),
    }
    shards = [
        Shard(name, "train", rng.bytes(32).hex(), int(end), PER_SHARD)
        for name, end in zip(names, ends[:, -1], strict=True)
    ]
    return pa.table(columns, schema=SCHEMA), shards


def together(folder: Path, processes: int, *, shared: bool) -> float:
    """MB that opening the manifest adds to all these processes: PSS, where one page counts once in their sum."""
    spawn = multiprocessing.get_context("spawn")
    pipes = [spawn.Pipe() for _ in range(processes)]
    children = [spawn.Process(target=_hold, args=(far, folder, shared)) for _, far in pipes]
    for child, (_, far) in zip(children, pipes, strict=True):
        child.start()
        far.close()
    held = []
    for _ in range(2):  # before and after
        for near, _ in pipes:
            near.recv()
        held.append(sum(pss(child.pid or 0) for child in children))
        for near, _ in pipes:
            near.send(None)
    for child in children:
        child.join()
    return held[1] - held[0]


def _hold(pipe: Connection, folder: Path, shared: bool) -> None:
    manifests.MAPPED_BYTES = manifests.MAPPED_BYTES if shared else 1 << 62
    pipe.send(None)
    pipe.recv()
    manifest = read_manifest(folder)
    pipe.send(None)
    pipe.recv()
    del manifest


def pss(process: int) -> float:
    """MB of a process; a page that k processes have counts as a k-th."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("Pss:"))


def open_and_resume(folder: Path, seed: int) -> tuple[float, list[float], float]:
    """Seconds to open, seconds of ten resumes, MB before."""
    rng, before = np.random.default_rng(seed), rss(os.getpid())
    begun = time.perf_counter()
    samples = read_manifest(folder).split("train")
    opened, resumed = time.perf_counter() - begun, []
    optim = OptimConfig()
    for _ in range(10):
        step, epoch = rng.integers(steps_per_epoch(len(samples), optim.global_batch)), rng.integers(90)
        begun = time.perf_counter()
        order = EpochOrder(samples.shard_sizes, seed=0, epoch=int(epoch), block=BLOCK)
        batches = micro_batches(
            order,
            global_batch=optim.global_batch,
            micro_batch=optim.micro_batch,
            rank=3,
            world=8,
            first_step=int(step),
        )
        next(batches)
        resumed.append(time.perf_counter() - begun)
    return opened, resumed, before


# --- shuffling ----------------------------------------------------------------------------------------------


def shuffle(*, epochs: int) -> None:
    n, batch = SHARDS * PER_SHARD, 256
    labels = {
        "shards mixed when written": np.random.default_rng(0).permutation(n) * CLASSES // n,
        "shards in the order of classes": np.arange(n) * CLASSES // n,
    }
    orders: dict[str, Callable[[int], NDArray[np.int64]]] = {
        "perfect": lambda epoch: np.random.default_rng(epoch).permutation(n),
        "ours": lambda epoch: EpochOrder([PER_SHARD] * SHARDS, seed=0, epoch=epoch, block=BLOCK).take(0, n),
        "webdataset, 1,000": partial(webdataset_order, buffer=1000),
        "webdataset, 5,000": partial(webdataset_order, buffer=5000),
    }
    print(f"shuffle: batches of {batch}, block {BLOCK}, n = {epochs} epochs: mean +- standard deviation")
    for written, label in labels.items():
        print(
            f"  {written}; r: correlation of a sample with the next, pairs: of one shard or class in a batch"
        )
        print(f"  {'':<20}" + "".join(f"{name:<23}" for name in MIXING))
        for name, order in orders.items():
            found = []
            for epoch in range(epochs):
                ids = order(epoch)[: n // batch * batch].reshape(-1, batch)
                found.append((*mixing(ids // PER_SHARD), *mixing(label[ids])))
            cells = (f"{np.mean(v):.3g} +- {np.std(v, ddof=1):.1g}" for v in zip(*found, strict=True))
            print(f"  {name:<20}" + "".join(f"{cell:<23}" for cell in cells), flush=True)


MIXING = ("r of shards", "shards a batch", "pairs, %", "r of classes", "classes a batch", "pairs, %")


def mixing(batches: NDArray[np.int64]) -> tuple[float, float, float]:
    """Autocorrelation within a batch at lag 1, distinct values of a batch, % of its pairs that are equal."""
    centred = batches - batches.mean()
    r = float((centred[:, 1:] * centred[:, :-1]).mean() / centred.var())
    rows, columns = len(batches), int(batches.max()) + 1
    numbers = (np.arange(rows)[:, None] * columns + batches).ravel()
    counts = np.bincount(numbers, minlength=rows * columns).reshape(rows, columns)
    k = batches.shape[1]
    pairs = (counts * (counts - 1)).sum(1).mean() / (k * (k - 1))
    return r, float((counts > 0).sum(1).mean()), 100 * float(pairs)


def webdataset_order(epoch: int, *, buffer: int) -> NDArray[np.int64]:
    """Its own shuffling, of numbers: shardshuffle=100, then a buffer of samples; one worker."""
    shards = webdataset.filters.shuffle(100, seed=epoch)(iter(range(SHARDS)))
    samples = (i for s in shards for i in range(s * PER_SHARD, (s + 1) * PER_SHARD))
    return np.fromiter(webdataset.filters.shuffle(buffer, seed=epoch)(samples), np.int64)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args()
    print(f"{hardware()}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GSA_CACHE"] = f"{folder}/cache"
        start(Path(folder) / "set", rounds=options.rounds)
    shuffle(epochs=options.epochs)


if __name__ == "__main__":
    main()
