"""The largest micro-batch that a device holds: found by steps on noise, before any training."""

import gc

import numpy as np
import torch

from pipeline.batch_augment import DRAWS
from pipeline.config import Config, ConfigError
from pipeline.data import Batch
from pipeline.plan import build_model
from pipeline.step import new_state, train_step

MOST = 1024  # samples a forward pass: beyond, nothing is gained


def with_micro_batch(config: Config, size: int) -> Config:
    """The same for micro-batches of that size; optim.global_batch stays."""
    optim = config.optim.model_copy(update={"micro_batch": size})
    return config.model_copy(update={"optim": optim})


def fitted(config: Config, classes: int, *, world: int, device: torch.device) -> Config:
    """The config with the largest micro-batch that this device holds.

    Not within a process group: a rank out of memory would leave the others waiting. Raises ConfigError: no GPU.
    """
    if device.type != "cuda":
        raise ConfigError(f"a micro-batch is found on a GPU, not on {device}; next: state optim.micro_batch")
    return with_micro_batch(config, largest_micro_batch(config, classes, world=world, device=device))


def largest_micro_batch(config: Config, classes: int, *, world: int, device: torch.device) -> int:
    """The largest one with which steps go through on `device`, at most 1024; it shares the global batch equally.

    Batch norm sees micro-batches, so results depend on it: it is found once, then stated in the config.
    Raises ConfigError: not even two samples fit.
    """
    whole, best = config.optim.global_batch, 0
    for size in (n for n in range(2, MOST + 1) if whole % (n * world) == 0):
        try:
            _steps(with_micro_batch(config, size), classes, device)
        except torch.OutOfMemoryError:
            break
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        best = size
    if not best:
        raise ConfigError(
            f"not even a micro-batch of two pictures of {config.data.image_size} pixels fits into the memory of "
            f"{device}; next: a smaller data.image_size or model.name"
        )
    return best


def _steps(config: Config, classes: int, device: torch.device) -> None:
    """Two steps of two micro-batches: the second finds the optimizer's state and a gradient to add to."""
    state = new_state(build_model(config, classes), config, device)
    size, side = config.optim.micro_batch, config.data.image_size
    images = torch.randint(0, 256, (size, side, side, 3), dtype=torch.uint8)
    batch = Batch(images, torch.arange(size) % classes, np.arange(size), torch.rand(size, DRAWS))
    for _ in range(2):
        train_step(state, [batch, batch], config, first=0, lr=0.0, classes=classes)
    state.sums.tolist()  # what a device lacks it says when it comes to it
