"""Numbers that are not finite: seen on the device, left out on every rank, told at most ten steps later."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

READ_EVERY = 5  # steps; what is read was copied to the host as many steps before, so nothing waits for it
REMEMBERED = 64  # steps back for which a rank knows whether it was the one
FIRST_SCALE, GROWS_AFTER = 2.0**16, 2000  # of fp16, as in torch's GradScaler
CALMER = "next: a lower optim.lr, more optim.warmup_epochs, or optim.clip_norm"


class Faults:
    """Which steps were left out, in a row and by which rank's doing; and the loss scale of fp16.

    With fp16 the loss is scaled so that small gradients are not lost, half as much after each overflow: such a
    step is left out but not held against the run, unless the scale is down to 1.
    """

    def __init__(self, device: torch.device, *, fp16: bool = False, max_skips: int = 0) -> None:
        self.device, self.fp16, self.max_skips = device, fp16, max_skips
        self.scale = torch.full((), FIRST_SCALE if fp16 else 1.0, device=device)
        self.good = torch.zeros((), dtype=torch.int32, device=device)  # steps since the scale was changed
        self.row = torch.zeros(
            (), dtype=torch.int32, device=device
        )  # steps left out, without a break up to now
        self.worst = torch.zeros((), dtype=torch.int32, device=device)  # the longest of such rows
        self.local = torch.zeros((), dtype=torch.bool, device=device)  # of this step: a gradient of this rank
        self.mine = torch.zeros(REMEMBERED, dtype=torch.bool, device=device)
        self._copy: Tensor | None = None

    def watch(self, replica: DistributedDataParallel) -> None:
        """Look at this rank's gradients before they are averaged: afterwards all ranks have the same."""
        replica.register_comm_hook(self, _note_and_average)

    def scaled(self, loss: Tensor) -> Tensor:
        return loss * self.scale if self.fp16 else loss

    def unscale(self, gradients: Sequence[Tensor]) -> Tensor:
        """Undo the scale of the loss; returns the norm of all gradients together."""
        if self.fp16:
            torch._foreach_mul_(list(gradients), 1 / self.scale)
        return nn.utils.get_total_norm(gradients)

    def judge(self, step: int, *, norm: Tensor, loss: Tensor, merged: Tensor) -> Tensor:
        """Whether this step may change anything, bool () on the device: the same on all ranks.

        norm: of the averaged gradient; loss: of this rank; merged: what the ranks have summed up, the loss and
        the running statistics among it.
        """
        ok = norm.isfinite() & merged.isfinite().all()
        counts = ~ok & (self.scale <= 1)
        mine = self.local | ~loss.isfinite() if dist.is_initialized() else counts
        self.mine[step % REMEMBERED] = mine & counts
        self.local.zero_()
        self.row += 1
        self.row *= counts
        torch.maximum(self.worst, self.row, out=self.worst)
        if self.fp16:
            grown = self.good + 1 >= GROWS_AFTER
            self.scale *= torch.where(ok, torch.where(grown, 2.0, 1.0), 0.5)
            self.scale.clamp_(min=1.0)
            self.good = torch.where(ok & ~grown, self.good + 1, 0).int()
        return ok

    def check(self, step: int, *, now: bool = False) -> None:
        """Raise FloatingPointError, on all ranks at the same step, once more are left out in a row than allowed.

        step: how many are done. It is found out at most 2 * READ_EVERY steps late, unless `now` waits for it.
        """
        if self.device.type == "cpu" or now:
            worst = int(self.worst)
        elif step % READ_EVERY:
            return
        else:
            worst = int(self._copied())
        if worst > self.max_skips:
            raise FloatingPointError(self._blame(step, worst))

    def _copied(self) -> Tensor:
        """The value of READ_EVERY steps ago, on the host; and a new copy is under way."""
        if self._copy is None:
            self._copy = torch.zeros((), dtype=torch.int32).pin_memory()
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        else:
            self._event.synchronize()
        found = self._copy.clone()
        self._copy.copy_(self.worst, non_blocking=True)
        self._event.record()
        return found

    def _blame(self, step: int, worst: int) -> str:
        mine = self.mine.tolist()
        steps = [s + 1 for s in range(max(0, step - REMEMBERED), step) if mine[s % REMEMBERED]]
        ranks: list[Any] = [steps]
        if dist.is_initialized():
            ranks = [None] * dist.get_world_size()
            dist.all_gather_object(ranks, steps)
        named = [f"rank {rank} at step {', '.join(map(str, s))}" for rank, s in enumerate(ranks) if s]
        return (
            f"loss or gradient not finite: {'; '.join(named) or f'up to step {step}'}; {worst} steps in a row were "
            f"left out, optim.max_skips allows {self.max_skips}; {CALMER}"
        )

    def state_dict(self) -> dict[str, Tensor]:
        return {"scale": self.scale, "good": self.good, "row": self.row}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, value in state.items():
            getattr(self, name).copy_(value)


def _note_and_average(
    faults: Faults,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    faults.local |= ~bucket.buffer().isfinite().all()
    return allreduce_hook(None, bucket)  # type: ignore[arg-type]
