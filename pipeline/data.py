"""Read: order -> bytes -> decode -> augment -> batch -> device."""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from pipeline import augment
from pipeline.config import Config, DataConfig
from pipeline.decode import DecodeError, Pixels, decode, size
from pipeline.manifest import Samples, ShardError, read_sample
from pipeline.order import Draws, EpochOrder, Ids, eval_batches, micro_batches, sample_draws
from pipeline.remote import is_url

log = logging.getLogger("gsa")

# Per channel, of 0..1: ImageNet's, as every published ResNet uses them.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PICTURE_DRAWS = 1 + augment.BOX_DRAWS  # random numbers that make a train picture: flip, crop
PART = 8  # samples that a thread reads at a time
AHEAD = 2 * PART  # samples that wait for each thread, at least: none runs dry while a batch is handed over


class Batch(NamedTuple):
    """The samples of a micro-batch.

    images (B, H, W, 3) uint8; labels (B,) int64; ids (B,), their numbers in the split; draws (B, n) float32,
    numbers of [0, 1) that belong to the sample in this epoch, for what is done to it on the device.
    bad: the shards of those that could not be read; others of the batch stand in their places.
    """

    images: Tensor
    labels: Tensor
    ids: Ids
    draws: Tensor
    bad: tuple[str, ...] = ()


class Outcome(NamedTuple):
    """What became of a sample on its way into a batch; `fault` says why it cannot be read."""

    id: int
    label: int
    shard: str
    fault: str = ""


S = TypeVar("S")  # what a sample is before it is read: its number, or its bytes
Read = Callable[[S, list[float], Tensor], Outcome]  # with PICTURE_DRAWS numbers, into its row of Batch.images


def train_loader(
    samples: Samples,
    config: Config,
    *,
    epoch: int,
    first_step: int,
    rank: int,
    world: int,
    threads: int,
    draws: int,
) -> Iterator[Batch]:
    """This rank's micro-batches of an epoch, from step `first_step` on, read by that many threads.

    The same for any number of threads, and put together for any number of ranks. A sample that cannot be
    read is logged, and the next of its micro-batch that can stands in for it.
    Raises ShardError where not one sample of a micro-batch can be read.
    """
    data = config.data
    order = EpochOrder(samples.shard_sizes, seed=config.seed, epoch=epoch, block=data.shuffle_block)
    batches: Iterator[list[int]] = (
        ids.tolist()
        for ids in micro_batches(
            order,
            global_batch=config.optim.global_batch,
            micro_batch=config.optim.micro_batch,
            rank=rank,
            world=world,
            first_step=first_step,
            repeats=data.repeats,
        )
    )

    def read(view: int, numbers: list[float], image: Tensor) -> Outcome:
        i = view % len(samples)
        outcome = Outcome(i, int(samples.label[i]), samples.shard_of(i).name)
        try:
            train_picture(read_sample(samples, i), numbers, data, image)
        except ShardError as error:
            return outcome._replace(fault=str(error))
        except DecodeError as error:
            return outcome._replace(fault=f"{samples.where(i)}: {error}")
        return outcome

    if any(is_url(shard.path) for shard in samples.shards):
        batches = _fetching_ahead(samples, order, batches)

    def draw(views: Sequence[int]) -> Draws:
        return sample_draws(np.array(views), PICTURE_DRAWS + draws, seed=config.seed, epoch=epoch)

    return load(batches, read, draw, side=data.image_size, threads=threads)


def _fetching_ahead(samples: Samples, order: EpochOrder, batches: Iterator[list[int]]) -> Iterator[list[int]]:
    """The same batches; the remote shards of a block are fetched while the block before it is read."""
    seen: set[int] = set()
    pool = ThreadPoolExecutor(1, thread_name_prefix="fetch")
    try:
        for ids in batches:
            following = [s for s in order.shards_after(ids[0] % len(samples)) if s not in seen]
            seen.update(following)
            for number in following:
                pool.submit(samples.fetch, number)  # what fails is told when a sample is read
            yield ids
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def train_picture(data: bytes, draws: Sequence[float], config: DataConfig, image: Tensor) -> None:
    """Fill a sample's row of Batch.images, by its PICTURE_DRAWS. DecodeError: no picture that we read."""
    flip, *place = draws
    box = augment.random_box(*size(data), place, config.crop_scale)
    pixels = decode(data, rows=box.top + box.height)
    image.copy_(augment.train_crop(pixels, box, size=config.image_size, mirrored=flip < config.flip))


def eval_loader(samples: Samples, config: Config, *, rank: int, world: int, threads: int) -> Iterator[Batch]:
    """This rank's part of a split: over all ranks each sample exactly once. ShardError if one cannot be read."""
    batches = (
        ids.tolist()
        for ids in eval_batches(len(samples), batch=config.optim.micro_batch, rank=rank, world=world)
    )

    def read(i: int, _: list[float], image: Tensor) -> Outcome:
        image.copy_(torch.from_numpy(eval_picture(samples, i, config.data)))
        return Outcome(i, int(samples.label[i]), "")

    def draw(ids: Sequence[int]) -> Draws:
        return np.empty((len(ids), PICTURE_DRAWS), np.float32)

    return load(batches, read, draw, side=config.data.eval_size, threads=threads)


def eval_picture(samples: Samples, i: int, config: DataConfig) -> Pixels:
    """A sample as it is evaluated: (eval_size, eval_size, 3). ShardError if it cannot be read."""
    try:
        pixels = decode(read_sample(samples, i))
    except DecodeError as error:  # the bytes that were written: another decoder took them
        raise ShardError(f"{samples.where(i)}: {error}") from None
    return augment.center_crop(pixels, size=config.eval_size, pct=config.crop_pct)


def to_device(images: Tensor, device: torch.device) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32, normalised there, channels last in memory."""
    images = images.to(device, non_blocking=True).permute(0, 3, 1, 2)
    # Filled there: copying constants from the host would wait for the device.
    mean, std = (torch.stack([torch.full((1, 1), v, device=device) for v in part]) for part in (MEAN, STD))
    scaled = images.to(torch.float32, copy=True).div_(255).sub_(mean).div_(std)
    return scaled.contiguous(memory_format=torch.channels_last)


def load(
    batches: Iterable[Sequence[S]],
    read: Read[S],
    draw: Callable[[Sequence[S]], Draws],
    *,
    side: int,
    threads: int,
) -> Iterator[Batch]:
    """The batches in their order; threads read the next ones meanwhile. Without threads, the caller does it.

    draw: of a batch, (B, PICTURE_DRAWS + n): the first are for `read`, the others become Batch.draws.
    side: of the pictures, in pixels.
    Raises ShardError where no sample of a batch can be read.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="loader") if threads else None
    waiting: deque[tuple[Tensor, Tensor, Iterator[list[Outcome]]]] = deque()

    def part(samples: Sequence[S], draws: Draws, images: Tensor) -> list[Outcome]:
        return [read(*one) for one in zip(samples, draws.tolist(), images, strict=True)]

    try:
        for batch in batches:
            shape = (len(batch), side, side, 3)
            images = torch.empty(shape, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
            numbers, cuts = draw(batch), range(0, len(batch), PART)
            parts = [(batch[i : i + PART], numbers[i : i + PART, :PICTURE_DRAWS]) for i in cuts]
            work = (pool.map if pool else map)(part, *zip(*parts, strict=True), torch.split(images, PART))
            waiting.append((images, torch.tensor(numbers[:, PICTURE_DRAWS:]), work))
            while waiting and (len(waiting) - 1) * len(batch) >= AHEAD * threads:
                yield _finish(*waiting.popleft())
        while waiting:
            yield _finish(*waiting.popleft())
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)


def _finish(images: Tensor, draws: Tensor, work: Iterator[list[Outcome]]) -> Batch:
    """Wait for a batch. Who cannot be read is logged, and replaced by the next that can."""
    outcomes = list(chain.from_iterable(work))
    n, bad = len(outcomes), [j for j, outcome in enumerate(outcomes) if outcome.fault]
    for j in bad:
        log.warning("bad_sample %s", outcomes[j].fault)
    if len(bad) == n:
        raise ShardError(f"none of the {n} samples of a micro-batch can be read: {outcomes[-1].fault}")
    lost = tuple(outcomes[j].shard for j in bad)
    good = [next(g % n for g in range(j, j + n) if not outcomes[g % n].fault) for j in range(n)]
    for j in bad:
        images[j], draws[j] = images[good[j]], draws[good[j]]
    labels = torch.tensor([outcomes[g].label for g in good])
    ids = np.array([outcomes[g].id for g in good], np.int64)
    return Batch(images, labels.pin_memory() if images.is_pinned() else labels, ids, draws, lost)
