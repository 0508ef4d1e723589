"""A trace of some training steps: what runs when, on CPU and device (chrome://tracing, ui.perfetto.dev)."""

import logging
import os
from pathlib import Path

import torch

from pipeline.config import ConfigError

log = logging.getLogger("gsa")

WARM_UP = 3  # steps before the trace: the first ones are slower, and the profiler takes some to start


class Trace:
    """Writes `target`, a gzipped chrome trace of `steps` steps after WARM_UP others; nothing where steps is 0.

    A step is a `ProfilerStep#N` of the trace, with the loading of its batches and whatever else comes before
    it: evaluation too, in the first of an epoch. What training computes stays as it is, to the bit.
    """

    def __init__(self, target: Path, steps: int) -> None:
        if steps < 0:
            raise ConfigError(f"profile: expected 0 steps or more, got {steps}")
        self.target, self.steps = target, steps
        self.missing = WARM_UP + steps if steps else 0
        self._profile: torch.profiler.profile | None = None

    def step(self) -> None:
        """After each training step."""
        if not self.missing:
            return
        self.missing -= 1
        if self._profile is None:  # after the first step, which is the first of the warm-up
            when = torch.profiler.schedule(wait=0, warmup=WARM_UP - 1, active=self.steps, repeat=1)
            self._profile = torch.profiler.profile(schedule=when, on_trace_ready=self._write)
            self._profile.start()
        else:
            self._profile.step()
            if not self.missing:
                self.close()

    def close(self) -> None:
        """The end of training: a trace that lacks steps is written with those that it has, and what came after."""
        if self.missing:
            log.warning("profile: training ended %d steps before the end of %s", self.missing, self.target)
        ended, self._profile, self.missing = self._profile, None, 0
        if ended:
            ended.stop()

    def _write(self, ended: torch.profiler.profile) -> None:
        temporary = self.target.with_name(f".{self.target.name}")  # torch compresses what ends with .gz
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            ended.export_chrome_trace(str(temporary))
            os.replace(temporary, self.target)
        except OSError as error:
            log.warning("profile: %s not written: %s", self.target, error)
        else:
            log.info("profile steps=%d file=%s", self.steps - self.missing, self.target)
