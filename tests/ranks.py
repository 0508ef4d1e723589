"""Runs in processes of their own, to be killed: what they do, what they leave, and how two of them compare."""

import itertools
import json
import os
import runpy
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from pipeline import batch_augment, checkpoint, data, metrics, train
from pipeline.config import Preempted
from pipeline.rundir import Out, RunDir

CALLS = ("fsync", "replace", "rename")  # of os: the moments at which something becomes visible, or lasting


def work(job: dict[str, Any]) -> None:
    """What such a process does: train as one rank of job["world"], with a journal record for each step."""
    sys.stderr = open(job["log"], "a", buffering=1)  # noqa: SIM115
    torch.set_num_threads(1)
    rank, world = job["rank"], job["world"]
    backend = job.get("backend", "gloo")
    if world > 1 or backend == "nccl":
        os.environ["LOCAL_RANK"] = str(rank)
        dist.init_process_group(backend, init_method=f"file://{job['meeting']}", rank=rank, world_size=world)
    train.LOG_EVERY = job.get("log_every", 1)
    if job.get("double"):
        compute_in_float64()
    if job.get("hang_at"):
        hang_at_step(job["hang_at"], Path(f"{job['meeting']}-{rank}"))
    if job.get("die_at"):
        die_at_call(job["die_at"])
    if job.get("mutant"):
        MUTANTS[job["mutant"]]()
    if job.get("seen"):
        note_samples(Path(job["seen"]) / f"rank-{rank}")
    if job.get("spoil") and rank in job["spoil"]["ranks"]:
        spoil_loss(job["spoil"]["steps"])
    run, reports = RunDir(Path(job["run"])), []
    options = {key: job[key] for key in ("loader_threads", "save_every_s") if key in job}
    if rank == job.get("stop_rank"):
        options["stop"] = stop_after(job["stop_at"])
    try:
        train.train(run, reports.append, **options)
    except Preempted as stopped:
        print(f"Preempted: {stopped}", file=sys.stderr)
        sys.exit(75)
    (run.logs / f"reports-{rank}.json").write_text(json.dumps(reports))
    if dist.is_initialized():
        dist.destroy_process_group()


def compute_in_float64() -> None:
    """Batch norm over four samples magnifies rounding tenfold a step: in float32 six steps would not compare."""
    make, move = train.build_model, data.to_device
    train.build_model = lambda *args: make(*args).double()  # type: ignore[assignment,misc]
    data.to_device = batch_augment.to_device = lambda *args: move(*args).double()  # type: ignore[attr-defined,assignment]


def hang_at_step(number: int, sign: Path) -> None:
    """Wait for the kill after that step, and say so: however slow the machine is, it comes in time."""
    real = train.train_step

    def hang(state: Any, *args: Any, **options: Any) -> Any:
        if state.step == number:
            sign.touch()
            time.sleep(600)
        return real(state, *args, **options)

    train.train_step = hang


def die_at_call(number: int) -> None:
    """SIGKILL instead of the call of that number that makes something visible or lasting."""
    made = itertools.count(1)

    def watch(name: str) -> None:
        real = getattr(os, name)

        def call(*args: Any, **options: Any) -> Any:
            if next(made) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        setattr(os, name, call)

    for name in CALLS:
        watch(name)
    save = checkpoint.Saver.save  # which otherwise writes while training goes on, so that no number is sure

    def save_and_wait(saver: Any, *args: Any, **options: Any) -> None:
        save(saver, *args, **options)
        saver.wait()

    checkpoint.Saver.save = save_and_wait  # type: ignore[method-assign]


def spoil_loss(steps: list[int]) -> None:
    """A loss that is not a number at these steps."""
    real = train.train_step

    def step(state: Any, *args: Any, **options: Any) -> None:
        bad = state.step + 1 in steps
        hook = state.model.register_forward_hook(lambda m, i, logits: logits * float("nan")) if bad else None
        real(state, *args, **options)
        if hook:
            hook.remove()

    train.train_step = step


def stop_after(number: int) -> Any:
    """A wish to stop, from that many questions on; one is asked after each step but the last of an epoch."""
    asked = itertools.count(1)
    return lambda: next(asked) >= number


def forget_optimizer() -> None:
    torch.optim.Optimizer.load_state_dict = lambda *_: None  # type: ignore[assignment,method-assign]


def keep_journal() -> None:
    metrics.cut = lambda *_: None  # type: ignore[assignment]


def forget_step() -> None:
    newest = checkpoint.newest

    def from_step_0(folder: Path) -> dict[str, Any] | None:
        found = newest(folder)
        return found and {**found, "step": 0, "epochs": 0}

    checkpoint.newest = from_step_0  # type: ignore[assignment]


def forget(part: str) -> None:
    """A resume without a part of the checkpoint that may be missing in old ones."""
    newest = checkpoint.newest

    def without(folder: Path) -> dict[str, Any] | None:
        found = newest(folder)
        if found and part == "ema":
            return {**found, "ema": found["model"]}
        return found and {key: value for key, value in found.items() if key != part}

    checkpoint.newest = without  # type: ignore[assignment]


# What a broken resume would do: the tests of resuming have to see each of them.
MUTANTS = {"optimizer": forget_optimizer, "journal": keep_journal, "step": forget_step}


def note_samples(path: Path) -> None:
    read = data.read_sample

    def note(samples: Any, i: int) -> bytes:
        with open(path, "a") as file:
            file.write(f"{samples.split} {i}\n")
        return read(samples, i)

    data.read_sample = note  # type: ignore[assignment]


class Ranks:
    """The processes of one attempt at a run."""

    def __init__(self, forks: Any, run: RunDir, world: int = 1, **job: Any) -> None:
        self.run, self.log = run, run.logs / "test.txt"
        self.meeting = str(run.logs / f"meeting-{os.urandom(4).hex()}")
        common = {"run": str(run.path), "world": world, "meeting": self.meeting, "log": str(self.log), **job}
        self.processes: list[BaseProcess] = [
            forks.Process(target=runpy.run_path, args=(__file__, {"JOB": {**common, "rank": rank}}, "worker"))
            for rank in range(world)
        ]
        for process in self.processes:
            process.start()

    def wait(self) -> list[int]:
        """The exit codes; who has not ended by itself is killed."""
        for process in self.processes:
            process.join(timeout=120)
            process.kill()
            process.join()
        return [int(process.exitcode or 0) for process in self.processes]

    def finish(self) -> RunDir:
        codes = self.wait()
        assert not any(codes), f"exit codes {codes}; {self.log.read_text()[-2000:]}"
        return self.run

    def kill_when_they_hang(self, number: int = signal.SIGKILL) -> None:
        """A signal for all as soon as each is where `hang_at` makes it wait."""
        end, hung = time.monotonic() + 120, [Path(f"{self.meeting}-{i}") for i in range(len(self.processes))]
        while not all(p.exists() for p in hung) and time.monotonic() < end:
            if not any(p.is_alive() for p in self.processes):
                break
            time.sleep(0.002)
        self.kill(number)
        assert all(p.exists() for p in hung), self.log.read_text()[-2000:]

    def kill(self, number: int = signal.SIGKILL) -> None:
        for process in self.processes:
            os.kill(int(process.pid or 0), number)
        assert self.wait() == [-number] * len(self.processes)


def weights(run: RunDir) -> dict[str, Any]:
    """All that the newest checkpoint of a run holds, but what is measured and what is summed up for that."""
    found = checkpoint.newest(run.checkpoints)
    assert found is not None
    return {key: value for key, value in found.items() if key not in ("metrics", "sums")}


def tensors(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested values as one level, tensors as arrays."""
    if isinstance(values, dict | list):
        pairs = values.items() if isinstance(values, dict) else enumerate(values)
        return {k: v for key, value in pairs for k, v in tensors(value, f"{prefix}/{key}").items()}
    return {prefix: values.numpy() if isinstance(values, torch.Tensor) else values}


def same_weights(one: RunDir, other: RunDir) -> bool:
    """To the bit."""
    a, b = tensors(weights(one)), tensors(weights(other))
    assert list(a) == list(b)
    return all(
        x.tobytes() == b[key].tobytes() if isinstance(x, np.ndarray) else x == b[key] for key, x in a.items()
    )


def series(run: RunDir) -> list[tuple[int, float, dict[str, float]]]:
    """The journal, without what tells the time."""

    def timed(key: str) -> bool:
        return key.startswith("perf/")

    records = metrics.read(run.metrics)
    return [(r.step, r.epoch, {k: v for k, v in r.metrics.items() if not timed(k)}) for r in records]


def assert_close(one: RunDir, other: RunDir) -> None:
    """Weights and metrics within 1e-6, and whatever is counted exactly."""
    for (n, epoch, a), (m, epoch_b, b) in zip(series(one), series(other), strict=True):
        assert (n, epoch, list(a)) == (m, epoch_b, list(b))
        for key in a:
            assert a[key] == pytest.approx(b[key], abs=1e-6, rel=1e-6), f"{key} at step {n}"
    found = tensors(weights(other))
    for key, value in tensors(weights(one)).items():
        if isinstance(value, np.ndarray) and value.dtype.kind == "f":
            np.testing.assert_allclose(found[key], value, rtol=1e-6, atol=1e-6, err_msg=key)
        else:
            assert found[key] == value, key


def output(mini: Path, root: Path) -> Out:
    """An output root with the shards `mini` in it."""
    (root / "shards").mkdir(parents=True)
    (root / "shards" / "mini").symlink_to(mini)
    return Out(root)


if __name__ == "worker":
    work(globals()["JOB"])
