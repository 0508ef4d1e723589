"""TrainState, train_step, eval_step: the only place where gradients flow. No I/O, no waiting for the device."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot
from torch.nn.parallel import DistributedDataParallel

from pipeline.batch_augment import augment_batch
from pipeline.config import ComputeConfig, Config, OptimConfig
from pipeline.data import Batch
from pipeline.faults import Faults
from pipeline.optim import Ema, masked_step, optimizer

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
PRESENT = 0.2  # share of a class in a mixed picture from which on bce takes it for there (timm)
# What steps sum up: over the samples; over the steps that changed something; over all.
SUMS = ("loss", "correct", "count", "grad_norm", "steps", "bad", "skipped")


@dataclass
class TrainState:
    """What a step changes. `model` is the bare network, `replica` the one that averages gradients."""

    model: nn.Module
    replica: nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device
    faults: Faults
    ema: Ema | None = None
    step: int = 0
    sums: Tensor = field(init=False)  # (SUMS,) float64, of this rank, since they were last taken

    def __post_init__(self) -> None:
        self.sums = torch.zeros(len(SUMS), device=self.device, dtype=torch.float64)


def new_state(model: nn.Module, config: Config, device: torch.device) -> TrainState:
    """All that a step needs, for a network with its first weights; over all ranks of the process group, if any."""
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.compute.sync_bn and dist.is_initialized():
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    ema = Ema(model, config.optim.ema) if config.optim.ema else None
    faults = Faults(device, fp16=config.compute.precision == "fp16", max_skips=config.optim.max_skips)
    # dynamic: a run whose pictures grow has to compute the same when it is resumed with the larger ones.
    replica: Any = torch.compile(model, dynamic=False) if config.compute.compile else model
    if dist.is_initialized():
        cpu = device.type == "cpu"
        with warnings.catch_warnings():  # of the name of broadcast_buffers, from torch 2.13 on
            warnings.simplefilter("ignore", FutureWarning)
            replica = DistributedDataParallel(
                replica,
                device_ids=None if cpu else [device.index],
                broadcast_buffers=False,  # our step keeps the running statistics equal
                find_unused_parameters=cpu,  # else its buckets change after a step: a resume would round otherwise
            )
        faults.watch(replica)
    return TrainState(model, replica, optimizer(model, config.optim), device, faults, ema)


def train_step(
    state: TrainState, batches: Sequence[Batch], config: Config, *, first: int, lr: float, classes: int
) -> None:
    """One optimizer step on this rank's micro-batches of a global batch, augmented on the device.

    first: the number of the first of them, counted over all ranks since training began. What the network
    draws at random (stochastic depth) depends on config.seed and that number: not on the world, nor on a restart.

    The gradient is the mean over all micro-batches of all ranks. Batch norm normalises each micro-batch by
    itself; its running statistics move once, by the mean over all of them: so neither depends on the
    number of ranks. Where the loss, the gradient or a statistic of any rank is not finite, nothing changes on
    any rank but state.step: weights, optimizer, averages and statistics stay as they are, to the bit.
    """
    optim, zero = config.optim, torch.zeros((), device=state.device, dtype=torch.float64)
    loss_sum, correct, count, bad = zero, zero, 0, 0
    state.model.train()
    state.optimizer.zero_grad(set_to_none=True)
    statistics = _Statistics(state.model)
    for i, batch in enumerate(batches):
        last = i == len(batches) - 1
        random = _random_numbers(config.seed, first + i, state.device)
        with nullcontext() if last else _no_sync(state.replica), statistics.apart(), random:
            labels = batch.labels.to(state.device, non_blocking=True)
            pixels = batch.images.to(state.device, non_blocking=True)
            images, targets = augment_batch(pixels, labels, batch.draws, config.augment, classes=classes)
            with _autocast(config.compute, state.device):
                logits = state.replica(images)
            loss = loss_of(logits, targets, optim)
            state.faults.scaled(loss / len(batches)).backward()  # type: ignore[no-untyped-call]
        loss_sum = loss_sum + loss.detach() * len(labels)
        correct = correct + (logits.detach().argmax(1) == labels).sum()
        count, bad = count + len(labels), bad + len(batch.bad)
    norm = state.faults.unscale([p.grad for p in state.model.parameters() if p.grad is not None])
    merged = statistics.merge(loss_sum)
    ok = state.faults.judge(state.step, norm=norm, loss=loss_sum, merged=merged)
    if optim.clip_norm:
        nn.utils.clip_grads_with_norm_(state.model.parameters(), optim.clip_norm, norm)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    masked_step(state.optimizer, ok)
    statistics.move(ok)
    if state.ema:
        state.ema.update(state.model, ok)
    used = torch.stack([loss_sum, correct, zero + count, norm.double(), zero + 1])
    state.sums += torch.cat([torch.where(ok, used, 0), torch.stack([zero + bad, (~ok).double()])])
    state.step += 1


def loss_of(logits: Tensor, targets: Tensor, optim: OptimConfig) -> Tensor:
    """The mean loss, in float32 at least. targets: (B,) int64 labels, or (B, classes) shares of mixed pictures.

    "bce" asks of each class by itself whether it is in the picture, and takes the mean over classes, too
    (Wightman, Touvron, Jegou, arXiv 2110.00476, and timm).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if optim.loss == "cross_entropy":
        return cross_entropy(
            logits, targets.to(logits) if targets.ndim > 1 else targets, label_smoothing=optim.label_smoothing
        )
    shares = targets if targets.ndim > 1 else one_hot(targets, logits.shape[1])
    smoothing = optim.label_smoothing
    present = (shares > PRESENT).to(logits) * (1 - smoothing) + smoothing / logits.shape[1]
    return binary_cross_entropy_with_logits(logits, present)


@torch.no_grad()
def eval_step(forward: Callable[[Tensor], Tensor], batch: Batch, classes: int) -> Tensor:
    """Sums over a batch, float64: loss (no smoothing); top-5 right; of each class top-1 right; of each class seen.

    forward: uint8 images (B, H, W, 3) -> logits or log-probabilities (B, classes), on any device.
    """
    logits = forward(batch.images).double()
    labels = batch.labels.to(logits.device)
    top = logits.topk(min(5, classes), dim=1).indices == labels[:, None]
    found = torch.zeros(2, classes, device=logits.device, dtype=torch.float64)
    found[0].index_add_(0, labels, top[:, 0].double())
    found[1].index_add_(0, labels, torch.ones_like(labels, dtype=torch.float64))
    loss = cross_entropy(logits, labels, reduction="sum")
    return torch.cat([torch.stack([loss, top.any(1).sum().double()]), found.flatten()])


def world_sums(sums: Tensor) -> list[float]:
    """The sums over all ranks, on the host, in float64: waits for the device, so only when due."""
    sums = sums.double()
    if dist.is_initialized():
        dist.all_reduce(sums)
    found: list[float] = sums.tolist()
    return found


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

    def merge(self, loss: Tensor) -> Tensor:
        """Take the mean over all micro-batches of all ranks; it goes with the ranks' losses, summed."""
        parts = [t.flatten() for t in self.total]
        dtype = parts[0].dtype if parts else loss.dtype
        merged = torch.cat([*parts, loss.to(dtype).reshape(1)])
        ranks = 1
        if dist.is_initialized():
            dist.all_reduce(merged)
            ranks = dist.get_world_size()
        self.means = merged[:-1] / (self.batches * ranks)
        return merged

    def move(self, ok: Tensor) -> None:
        """Set the running statistics to what `merge` found; where not `ok`, they stay."""
        if self.buffers:
            new = torch.where(ok, self.means, torch.cat([b.flatten() for b in self.old]))
            parts = torch.split(new, [b.numel() for b in self.buffers])
            torch._foreach_copy_(
                self.buffers, [n.view_as(b) for n, b in zip(parts, self.buffers, strict=True)]
            )
        for count in self.tracked:
            count -= self.batches - ok.long()


@contextmanager
def _random_numbers(seed: int, micro_batch: int, device: torch.device) -> Iterator[None]:
    """Seed torch's generators for one micro-batch; afterwards they are as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence((seed, micro_batch)).generate_state(1)[0]))
        yield


def _autocast(compute: ComputeConfig, device: torch.device) -> torch.autocast:
    dtype = HALVES.get(compute.precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


@contextmanager
def _no_sync(replica: nn.Module) -> Iterator[None]:
    if isinstance(replica, DistributedDataParallel):
        with replica.no_sync():
            yield
    else:
        yield
