"""Exact top-1/top-5 over a split, any number of ranks: each sample exactly once, and counted."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.data import Batch, to_device
from pipeline.manifest import ShardError
from pipeline.order import Certificate, certify
from pipeline.step import eval_step, world_sums

CPU = torch.device("cpu")


class Evaluation(NamedTuple):
    """Accuracies in percent, the mean cross-entropy, how many samples were right, how many seen, and which."""

    top1: float
    top5: float
    loss: float
    correct: int
    samples: int
    certificate: str  # of the samples seen: the same for any number of ranks
    by_class: tuple[tuple[int, int], ...]  # of each class how many were right, how many seen

    def metrics(self, name: str = "val") -> dict[str, float]:
        return {
            f"{name}/top1": self.top1,
            f"{name}/top5": self.top5,
            f"{name}/loss": self.loss,
            f"{name}/count": float(self.samples),
        }


class Classifier(nn.Module):
    """A trained network as it is registered: uint8 (N, H, W, 3) pictures in, (N, classes) probabilities out."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        probabilities: Tensor = self.network(to_device(images, images.device)).softmax(1)
        return probabilities


def evaluate(
    forward: Callable[[Tensor], Tensor],
    batches: Iterable[Batch],
    *,
    classes: int,
    expected: Certificate,
    salt: int,
    device: torch.device = CPU,
) -> Evaluation:
    """Evaluate on all ranks together; each passes its own part of the split.

    forward: uint8 images (B, H, W, 3) -> logits or log-probabilities (B, classes), in eval mode.
    classes: how many.
    expected, salt: the certificate of the whole split, and its salt.
    device: where a rank without batches, of a split smaller than the world, takes part in the sum.
    Raises ShardError, on all ranks, where one of them cannot read a sample; RuntimeError unless the parts together
    hold each sample exactly once.
    """
    sums = torch.zeros(2 + 2 * classes, device=device, dtype=torch.float64)
    seen, fault = Certificate(0, 0), ""
    try:
        for batch in batches:
            sums = sums + eval_step(forward, batch, classes)
            seen += certify(batch.ids, salt)
    except ShardError as error:  # the other ranks wait for this one's sums
        fault = str(error)
    # In halves, whose sums over the ranks are exact in float64.
    told = [seen.samples, seen.sum % 2**32, seen.sum >> 32, bool(fault)]
    count, low, high, faults = world_sums(torch.tensor(told, dtype=torch.float64, device=device))
    loss, correct5, *by_class = world_sums(sums)
    if faults:
        raise ShardError(_first_of_all_ranks(fault))
    count = round(count)
    found = Certificate(count, (round(low) + (round(high) << 32)) % 2**64)
    right, of = ([round(n) for n in part] for part in (by_class[:classes], by_class[classes:]))
    if found != expected:
        raise RuntimeError(
            f"evaluation saw {count} samples, expected each of {expected.samples} exactly once "
            f"(certificate {found}, expected {expected})"
        )
    return Evaluation(
        top1=100 * sum(right) / count,
        top5=100 * correct5 / count,
        loss=loss / count,
        correct=sum(right),
        samples=count,
        certificate=str(found),
        by_class=tuple(zip(right, of, strict=True)),
    )


def _first_of_all_ranks(text: str) -> str:
    """The first text that is not empty."""
    texts: list[str] = [text]
    if dist.is_initialized():
        texts = [""] * dist.get_world_size()
        dist.all_gather_object(texts, text)
    return next(filter(None, texts))
