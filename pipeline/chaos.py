"""`gsa train --chaos`: a run whose workers are killed at random, held against one that nothing disturbs."""

import json
import os
import random
import re
import shutil
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from pipeline import checkpoint, metrics
from pipeline.config import ConfigError, Resources
from pipeline.ray_train import fit
from pipeline.rundir import RunDir

UNITS = {"s": 1.0, "m": 60.0}


class Verdict(NamedTuple):
    """What chaos did to a run. `lost_s`: seconds that the run took longer than the undisturbed one."""

    kills: int
    lost_s: float
    same_weights: bool
    same_series: bool

    @property
    def passed(self) -> bool:
        return self.kills > 0 and self.same_weights and self.same_series


def mtbf(text: str) -> float:
    """`mtbf=30s` or `mtbf=2m`, the mean time between failures, in seconds."""
    found = re.fullmatch(r"mtbf=([0-9]+(?:\.[0-9]+)?)([sm])", text)
    if not found or not float(found[1]):
        raise ConfigError(f"--chaos {text}: expected mtbf=N in s or m, above 0; next: --chaos mtbf=30s")
    return float(found[1]) * UNITS[found[2]]


def check(run: RunDir, resources: Resources) -> None:
    """Refuse what could prove nothing: a run that is complete, or one whose world may change. ConfigError."""
    low, high = resources.span
    if low != high:
        raise ConfigError(
            f"--chaos with workers {resources.workers}: another number of workers rounds otherwise; "
            f"next: --workers {high}"
        )
    if run.result.exists():
        raise ConfigError(
            f"run {run.name} is complete: nothing to kill; next: another --out, or another seed"
        )


def judge(run: RunDir, resources: Resources, mtbf_s: float) -> Verdict:
    """Train the run while its workers die, then its twin in peace in a scratch folder, and compare.

    Needs `ray_session.session`. Checkpoints come ten times as often as kills: else no step might be new.
    """
    before, started = len(kills(run)), time.monotonic()
    often = resources.model_copy(update={"save_minutes": min(resources.save_minutes, mtbf_s / 600)})
    fit(run, often, chaos_s=mtbf_s)
    took = time.monotonic() - started
    with tempfile.TemporaryDirectory(prefix=".chaos-", dir=run.path.parent) as folder:
        twin = RunDir(Path(folder) / run.name)
        twin.logs.mkdir(parents=True)
        for file in (run.config, run.facts, run.init):
            if file.exists():
                shutil.copy(file, twin.path)
        started = time.monotonic()
        fit(twin, resources)
        lost = took - (time.monotonic() - started)
        same = _weights(run) == _weights(twin), _series(run) == _series(twin)
    return Verdict(len(kills(run)) - before, lost, *same)


def die_at_random(run: RunDir, rank: int, mean_s: float) -> None:
    """SIGKILL for this process after an exponential time; right before, a line in the run's list of kills."""

    def die() -> None:
        time.sleep(random.SystemRandom().expovariate(1 / mean_s))
        with open(_kill_log(run), "ab", buffering=0) as file:
            file.write(json.dumps({"time": time.time(), "rank": rank}).encode() + b"\n")
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=die, daemon=True).start()


def kills(run: RunDir) -> list[dict[str, float]]:
    """Time and rank of each kill by chaos so far."""
    path = _kill_log(run)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _kill_log(run: RunDir) -> Path:
    return run.logs / "kills.jsonl"


def _weights(run: RunDir) -> dict[str, Any]:
    """All of the newest checkpoint but what is measured, as values that compare by every bit."""
    state = checkpoint.newest(run.checkpoints) or {}
    return {key: _bits(value) for key, value in state.items() if key not in ("metrics", "sums")}


def _bits(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, value.shape, value.reshape(-1).contiguous().numpy().tobytes()
    if isinstance(value, dict | list | tuple):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: _bits(inner) for key, inner in pairs}
    return value


def _series(run: RunDir) -> list[Any]:
    """The journal without what tells the time."""
    return [
        (r.step, r.epoch, {k: v for k, v in r.metrics.items() if not k.startswith("perf/")})
        for r in metrics.read(run.metrics)
    ]
