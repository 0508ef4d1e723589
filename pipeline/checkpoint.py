"""Checkpoints: a new folder each, checksum written last, renamed whole; verified before they are loaded."""

import copy
import errno
import hashlib
import io
import json
import logging
import math
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config import InputError
from pipeline.faults import CALMER
from pipeline.rundir import read_json, sync, write_json

log = logging.getLogger("gsa")

VERSION = 2  # 1 had neither score nor seal; each later one keeps version and seal, so that we can tell it
KEEP = 2  # the newest, and the one before in case that the newest is damaged; beside them the best
DISK = {  # full, read-only, or away: the next save may succeed
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES),
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN),
}


class NewerVersion(InputError):
    """A checkpoint of later code. To go on from one before it would throw away what that code did."""


# --- the store ---------------------------------------------------------------------------------------------


def save(folder: Path, step: int, state: dict[str, Any], *, score: float | None = None) -> Path:
    """Write `state` (tensors and plain values) as folder/step-N; the newest KEEP stay, and the best by `score`.

    A higher score is better; of equal ones the earlier stays. Later steps were left by a run that went
    back, so they go. A crash at any moment leaves the earlier checkpoints as they were. Raises
    FloatingPointError where "model" or "ema" is not finite, before anything is written; OSError.
    """
    _check_finite(step, state, score)
    _clear_up(folder)  # first, because the disk may be full of it
    target = path(folder, step)
    temporary = folder / f".{target.name}.{os.getpid()}.tmp"
    try:
        sha256 = _write_state(temporary / "state.pt", state)
        facts = {"version": VERSION, "step": step, "score": score, "sha256": sha256}
        write_json(temporary / "checksum.json", {**facts, "seal": _seal(facts)})
        if target.exists():  # the same step again: it may be the only one, so it stands by until the end
            os.rename(target, _aside(target))
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # a full disk is needed for the journal
    sync(folder)
    shutil.rmtree(_aside(target), ignore_errors=True)
    _prune(folder, step)
    return target


def path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step:09d}"


def newest(folder: Path) -> dict[str, Any] | None:
    """The state of the newest intact checkpoint, None if there is none; damaged ones are warned of.

    InputError: the folder cannot be read, or a checkpoint is of later code.
    """
    for step in reversed(_steps(folder)):
        try:
            return load(path(folder, step))
        except NewerVersion:
            raise
        except InputError as error:
            log.warning("checkpoint left out: %s", error)
    return None


def best(folder: Path) -> Path | None:
    """The checkpoint of the highest score, of equal ones the earliest; load() finds whether it is intact."""
    scores = {step: _score(path(folder, step)) for step in _steps(folder)}
    ranked = [(score, -step) for step, score in scores.items() if score is not None]
    return path(folder, -max(ranked)[1]) if ranked else None


def load(source: Path) -> dict[str, Any]:
    """The state of a checkpoint, on the CPU. InputError: damaged, incomplete, or of another version."""
    facts = _facts(source)
    try:
        data = (_standing(source) / "state.pt").read_bytes()
    except OSError as error:
        raise InputError(f"{source}: cannot be read: {error}") from None
    if hashlib.sha256(data).hexdigest() != facts.get("sha256"):
        raise InputError(f"{source}: damaged: state.pt does not match checksum.json")
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError):  # torch's text recommends to run what it refused
        raise InputError(f"{source}: not loaded: expected tensors and plain values alone") from None
    return state


def _facts(source: Path) -> dict[str, Any]:
    """What checksum.json says of a checkpoint, once it is known to be what was written."""
    found = read_json(_standing(source) / "checksum.json")
    facts: dict[str, Any] = found if isinstance(found, dict) else {}
    version = facts.get("version")
    if not isinstance(version, int) or version < 1:
        raise InputError(f"{source}: expected a checkpoint of version 1 to {VERSION}, got {found!r:.80}")
    if version > 1 and facts.pop("seal", None) != _seal(facts):
        raise InputError(f"{source}: damaged: checksum.json does not match its own seal")
    if version > VERSION:
        raise NewerVersion(
            f"{source}: expected a checkpoint of version 1 to {VERSION}, got version {version}, of later code; "
            "next: update gsa-networks, or move the checkpoint away to go on from the one before"
        )
    if source.name != f"step-{facts.get('step')!s:0>9}":
        raise InputError(f"{source}: damaged: the folder's name does not match checksum.json")
    return facts


def _score(source: Path) -> float | None:
    try:
        score: float | None = _facts(source).get("score")
    except InputError:
        return None
    return score


def _seal(facts: dict[str, Any]) -> str:
    """sha256 of all that checksum.json says: a damaged score would keep, or register, another checkpoint."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class _Hashed(io.BufferedWriter):
    """A file that is hashed as it is written, so that a state is never in memory twice."""

    def __init__(self, target: Path) -> None:
        super().__init__(io.FileIO(target, "w"))
        self.sha256 = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Never raises: torch would report an error of ours as "unexpected pos 64 vs 0"."""
        self.sha256.update(data)
        try:
            if self.error is None:
                super().write(data)
        except OSError as error:
            self.error = error
        return len(data)


def _write_state(target: Path, state: dict[str, Any]) -> str:
    """Write a state through to the disk, under its name when it is whole; returns its sha256."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(".part")
    with _Hashed(part) as file:
        torch.save(state, file)
        if file.error is not None:
            raise file.error
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, target)
    sync(target.parent)
    return file.sha256.hexdigest()


def _steps(folder: Path) -> list[int]:
    """The steps of which there are checkpoints, in order. InputError: the folder is there, but unreadable."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:  # not "none": the run would start anew, over those that it did not see
        raise InputError(f"{folder}: cannot be read: {error}") from None
    return sorted({int(found[1]) for name in names if (found := re.fullmatch(r"step-(\d{9,})~?", name))})


def _aside(target: Path) -> Path:
    """Where a checkpoint stands while another of the same step takes its place."""
    return target.with_name(f"{target.name}~")


def _standing(source: Path) -> Path:
    """Where a checkpoint lies: aside, if the crash came when it had left and the other had not arrived."""
    return _aside(source) if _aside(source).is_dir() and not source.is_dir() else source


def _clear_up(folder: Path) -> None:
    """Remove what a crash left; what stood aside then takes its place again if no other has."""
    for torn in folder.glob(".step-*.tmp"):
        shutil.rmtree(torn, ignore_errors=True)
    for aside in folder.glob("step-*~"):
        if (target := aside.with_name(aside.name[:-1])).exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.rename(aside, target)


def _prune(folder: Path, newest: int) -> None:
    steps = _steps(folder)
    for later in [step for step in steps if step > newest]:
        shutil.rmtree(path(folder, later), ignore_errors=True)
    highest = best(folder)  # of those that are left
    for earlier in [step for step in steps if step <= newest][:-KEEP]:
        if path(folder, earlier) != highest:
            shutil.rmtree(path(folder, earlier), ignore_errors=True)


def _check_finite(step: int, state: dict[str, Any], score: float | None) -> None:
    if score is not None and not math.isfinite(score):
        raise FloatingPointError(f"the score of step {step} is {score}; expected a finite number or None")
    for part in ("model", "ema"):
        for name, value in _tensors(state.get(part), part):
            if value.is_floating_point() and not value.isfinite().all():
                raise FloatingPointError(f"{name} is no longer finite at step {step}; {CALMER}")


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict | list | tuple):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _tensors(inner, f"{name}.{key}")


# --- meanwhile ---------------------------------------------------------------------------------------------


class Saver:
    """Writes checkpoints in one background thread, one at a time, while training goes on.

    `failure` says why the last save failed, "" if it did not: a disk that is full or away ends no training,
    because the next save may succeed. Not a daemon: a process that ends finishes the save in flight, and an
    idle thread keeps none alive.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.failure = ""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._flight: Future[None] | None = None

    def save(
        self,
        step: int,
        state: dict[str, Any],
        *,
        score: float | None = None,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        """Copy `state` to host memory and return; the thread calls `before()`, then the function save().

        Waits for the save before. Raises what that raised, but for the errors of a disk (DISK).
        """
        self.wait()  # first: two copies in host memory are one too many
        copied, events = _snapshot(state)
        self._flight = self._thread.submit(self._write, step, copied, score, before, events)

    def wait(self) -> None:
        """Until all is on the disk, or has failed. Raises what the thread raised, once."""
        if self._flight is not None:
            wait_for([self._flight])  # interrupted here, it is still in flight
            flight, self._flight = self._flight, None
            flight.result()

    def close(self, *, required: bool = True) -> None:
        """Wait, and end the thread. InputError if the last save failed.

        `required=False` is for a `finally`: it raises nothing, which would hide why training ended.
        """
        self._thread.shutdown()
        if required:
            self.wait()
            if self.failure:
                raise InputError(
                    f"{self.folder}: expected the run's last checkpoint, got a failed save: {self.failure}; "
                    "next: make room, or mend the disk or its rights, then run the same command again: "
                    f"it goes on from {_last_name(self.folder)}"
                )
        elif self._flight is not None and (error := self._flight.exception()) is not None:
            log.error("checkpoint not written: %s", error, exc_info=error)

    def _write(
        self,
        step: int,
        state: dict[str, Any],
        score: float | None,
        before: Callable[[], None],
        events: list[torch.cuda.Event],
    ) -> None:
        try:
            for event in events:
                event.synchronize()
            before()
            save(self.folder, step, state, score=score)
        except OSError as error:
            if error.errno not in DISK:
                raise
            self.failure = f"step {step}: {error}"
            log.warning(
                "checkpoint of step %d not written to %s: %s; training goes on; the newest there is %s",
                *(step, self.folder, error, _last_name(self.folder)),
            )
        else:
            self.failure = ""


def _snapshot(state: dict[str, Any]) -> tuple[dict[str, Any], list[torch.cuda.Event]]:
    """A copy in host memory, and the events after which it is complete; later changes do not reach it."""
    tensors = [tensor for _, tensor in _tensors(state, "")]
    copies: dict[int, Any] = {id(tensor): _to_host(tensor) for tensor in tensors}
    events = []
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        # blocking: the thread sleeps until then, instead of spinning
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        events.append(event)
    return copy.deepcopy(state, copies), events


def _to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory; of a CUDA tensor it is complete when the current stream has come so far."""
    if not tensor.is_cuda:
        return tensor.detach().to("cpu", copy=True)
    host = torch.empty_like(tensor, device="cpu", pin_memory=True, requires_grad=False)
    return host.copy_(tensor.detach(), non_blocking=True)


def _last_name(folder: Path) -> str:
    """For a message: the newest checkpoint that is there, by its name alone."""
    try:
        steps = _steps(folder)
    except InputError:
        return "not known: the folder cannot be read"
    return path(folder, steps[-1]).name if steps else "none: the start"
