"""Read: order -> bytes -> decode -> augment -> batch -> device."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline import augment, order
from pipeline.config import Config
from pipeline.decode import DecodeError, decode
from pipeline.manifest import Samples, ShardError, read_sample

# Per channel, of 0..1: ImageNet's, as every published ResNet uses them.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Batch(NamedTuple):
    """images (B, H, W, 3) uint8, labels (B,) int64."""

    images: Tensor
    labels: Tensor


class Pictures(Dataset[tuple[np.ndarray, int]]):
    """Cropped samples of a split by number; with an epoch augmented, without one as at test."""

    def __init__(self, samples: Samples, config: Config, epoch: int | None) -> None:
        self.samples, self.config, self.epoch = samples, config, epoch

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        data = self.config.data
        try:
            image = decode(read_sample(self.samples, index))
        except DecodeError as error:  # the bytes that were written: another decoder took them
            path = self.samples.shard_paths[self.samples.shard[index]]
            raise ShardError(f"{path}, sample {self.samples.key[index]}: {error}") from None
        if self.epoch is None:
            image = augment.center_crop(image, size=data.image_size, pct=data.crop_pct)
        else:
            rng = augment.sample_rng(self.config.seed, self.epoch, index)
            image = augment.train_crop(
                image, rng, size=data.image_size, scale=data.crop_scale, flip=data.flip
            )
        return np.asarray(image), int(self.samples.label[index])


def train_loader(
    samples: Samples, config: Config, *, epoch: int, first_step: int, rank: int, world: int, workers: int
) -> Iterator[Batch]:
    """This rank's micro-batches of an epoch, from step `first_step` on."""
    batches = order.micro_batches(
        len(samples),
        seed=config.seed,
        epoch=epoch,
        global_batch=config.optim.global_batch,
        micro_batch=config.optim.micro_batch,
        rank=rank,
        world=world,
        first_step=first_step,
    )
    return _load(Pictures(samples, config, epoch), batches, workers)


def eval_loader(samples: Samples, config: Config, *, rank: int, world: int, workers: int) -> Iterator[Batch]:
    """This rank's part of a split: over all ranks each sample exactly once."""
    batches = order.eval_batches(len(samples), batch=config.optim.micro_batch, rank=rank, world=world)
    return _load(Pictures(samples, config, None), batches, workers)


def to_device(images: Tensor, device: torch.device) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32, normalised there, channels last in memory."""
    images = images.to(device, non_blocking=True).permute(0, 3, 1, 2)
    mean = torch.tensor(MEAN, device=device).view(1, 3, 1, 1)
    std = torch.tensor(STD, device=device).view(1, 3, 1, 1)
    return ((images.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def _load(pictures: Pictures, batches: Iterator[np.ndarray], workers: int) -> Iterator[Batch]:
    loader: DataLoader[tuple[np.ndarray, int]] = DataLoader(
        pictures,
        batch_sampler=[b.tolist() for b in batches],
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
    )
    try:
        yield from loader
        return
    except ShardError as error:
        lines = str(error).splitlines()
        error.__traceback__ = None  # it holds the loader, which would wait 5 seconds for each worker
    # Of a loader worker's error the last line is ours; the others tell how torch brought it here.
    raise ShardError(lines[-1].removeprefix(f"{ShardError.__module__}.{ShardError.__name__}: "))


def _collate(samples: list[tuple[np.ndarray, int]]) -> Batch:
    images, labels = zip(*samples, strict=True)
    return Batch(torch.from_numpy(np.stack(images)), torch.tensor(labels))
