"""TrainState, train_step, eval_step: the only place where gradients flow. No I/O, no waiting for the device."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from pipeline.batch_augment import augment_batch
from pipeline.config import AugmentConfig
from pipeline.data import Batch


@dataclass
class TrainState:
    """What a step changes. `model` is the bare network, `replica` the one that averages gradients."""

    model: nn.Module
    replica: nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device
    step: int = 0


def train_step(
    state: TrainState,
    batches: Sequence[Batch],
    *,
    first: int,
    seed: int,
    lr: float,
    label_smoothing: float,
    augment: AugmentConfig,
    classes: int,
) -> dict[str, Tensor]:
    """One optimizer step on this rank's micro-batches of a global batch, augmented on the device.

    first: the number of the first of them, counted over all ranks since training began. What the network
    draws at random (stochastic depth) depends on seed and that number: not on the world, nor on a restart.

    The gradient is the mean over all micro-batches of all ranks. Batch norm normalises each micro-batch by
    itself; its running statistics move once, by the mean over all of them: so neither depends on the
    number of ranks. Returns device sums over this rank's samples: loss, correct, count, bad.
    """
    state.model.train()
    state.optimizer.zero_grad(set_to_none=True)
    sums = {key: torch.zeros((), device=state.device) for key in ("loss", "correct", "count", "bad")}
    statistics = _Statistics(state.model)
    for i, batch in enumerate(batches):
        last = i == len(batches) - 1
        random = _random_numbers(seed, first + i, state.device)
        with nullcontext() if last else _no_sync(state.replica), statistics.apart(), random:
            labels = batch.labels.to(state.device, non_blocking=True)
            images, targets = augment_batch(
                batch.images.to(state.device, non_blocking=True),
                labels,
                batch.draws,
                augment,
                classes=classes,
            )
            logits = state.replica(images)
            loss = cross_entropy(logits, targets, label_smoothing=label_smoothing)
            (loss / len(batches)).backward()  # type: ignore[no-untyped-call]
        sums["loss"] += loss.detach() * len(labels)
        sums["correct"] += (logits.detach().argmax(1) == labels).sum()
        sums["count"] += len(labels)
        sums["bad"] += len(batch.bad)
    statistics.move()
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.optimizer.step()
    state.step += 1
    return sums


@torch.no_grad()
def eval_step(forward: Callable[[Tensor], Tensor], batch: Batch) -> dict[str, Tensor]:
    """Sums over a batch: loss (no smoothing), correct (top-1), correct5 (top-5), count.

    forward: uint8 images (B, H, W, 3) -> logits or log-probabilities (B, classes), on any device.
    """
    logits = forward(batch.images).double()
    labels = batch.labels.to(logits.device)
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return {
        "loss": cross_entropy(logits, labels, reduction="sum"),
        "correct": top[:, 0].sum().double(),
        "correct5": top.any(1).sum().double(),
        "count": torch.tensor(float(len(labels)), device=logits.device, dtype=torch.float64),
    }


def world_sums(sums: dict[str, Tensor]) -> dict[str, float]:
    """The sums over all ranks, on the host: waits for the device, so only when due."""
    stacked = torch.stack([value.double() for value in sums.values()])
    if dist.is_initialized():
        dist.all_reduce(stacked)
    return dict(zip(sums, stacked.tolist(), strict=True))


class _Statistics:
    """Running statistics of the batch norms: each micro-batch starts from the old ones; the mean is kept.

    The update is linear in the batch's statistics, so the mean of the new values over micro-batches and
    ranks is one update by the mean statistics. A step counts as one batch, however many ranks share it.
    """

    def __init__(self, model: nn.Module) -> None:
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.buffers = [b for m in norms for b in (m.running_mean, m.running_var) if b is not None]
        self.tracked = [m.num_batches_tracked for m in norms if m.num_batches_tracked is not None]
        self.old = [b.clone() for b in self.buffers]
        self.total = [torch.zeros_like(b) for b in self.buffers]
        self.batches = 0

    @contextmanager
    def apart(self) -> Iterator[None]:
        """One micro-batch: its update is taken up, and undone in the model."""
        yield
        self.batches += 1
        if self.buffers:
            torch._foreach_add_(self.total, self.buffers)
            torch._foreach_copy_(self.buffers, self.old)

    def move(self) -> None:
        """Set the running statistics to the mean over all micro-batches of all ranks."""
        if not self.buffers:
            return
        flat = torch.cat([t.flatten() for t in self.total])
        ranks = 1
        if dist.is_initialized():
            dist.all_reduce(flat)
            ranks = dist.get_world_size()
        flat /= self.batches * ranks
        sizes = [b.numel() for b in self.buffers]
        for buffer, new in zip(self.buffers, torch.split(flat, sizes), strict=True):
            buffer.copy_(new.view_as(buffer))
        torch._foreach_sub_(self.tracked, self.batches - 1)


@contextmanager
def _random_numbers(seed: int, micro_batch: int, device: torch.device) -> Iterator[None]:
    """Seed torch's generators for one micro-batch; afterwards they are as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence((seed, micro_batch)).generate_state(1)[0]))
        yield


@contextmanager
def _no_sync(replica: nn.Module) -> Iterator[None]:
    if isinstance(replica, DistributedDataParallel):
        with replica.no_sync():
            yield
    else:
        yield
