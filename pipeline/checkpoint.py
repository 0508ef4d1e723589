"""Checkpoints: a new folder each, checksum written last, renamed whole; verified before they are loaded."""

import hashlib
import io
import logging
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch

from pipeline.config import InputError
from pipeline.rundir import read_json, sync, write_atomic, write_json

log = logging.getLogger("gsa")

VERSION = 1
KEEP = 2  # the newest, and the one before in case that the newest is damaged


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write `state` (tensors and plain values) as folder/step-N; of the earlier ones the last is kept.

    Later ones were damaged when this run went on from before them, so they go. A crash at any moment
    leaves the earlier checkpoints as they were.
    """
    for torn in folder.glob(".step-*.tmp"):  # of a crash: first, because the disk may be full of them
        shutil.rmtree(torn, ignore_errors=True)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    target = path(folder, step)
    temporary = folder / f".{target.name}.{os.getpid()}.tmp"
    write_atomic(temporary / "state.pt", buffer.getvalue())
    sha256 = hashlib.sha256(buffer.getvalue()).hexdigest()
    write_json(temporary / "checksum.json", {"version": VERSION, "step": step, "sha256": sha256})
    shutil.rmtree(target, ignore_errors=True)  # the same step again, after a resume from before it
    os.rename(temporary, target)
    sync(folder)
    _prune(folder, target)
    return target


def path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step:09d}"


def newest(folder: Path) -> dict[str, Any] | None:
    """The state of the newest intact checkpoint, None if there is none; damaged ones are warned of."""
    for found in sorted(folder.glob("step-*"), reverse=True):
        try:
            return load(found)
        except InputError as error:
            log.warning("checkpoint left out: %s", error)
    return None


def load(source: Path) -> dict[str, Any]:
    """The state of a checkpoint, on the CPU. InputError: damaged, incomplete, or of another version."""
    checksum = read_json(source / "checksum.json")
    try:
        data = (source / "state.pt").read_bytes()
    except OSError as error:
        raise InputError(f"{source}: cannot be read: {error}") from None
    if not isinstance(checksum, dict) or checksum.get("version") != VERSION:
        raise InputError(f"{source}: expected a checkpoint of version {VERSION}, got {checksum!r:.80}")
    step = checksum.get("step")
    expected = {"version": VERSION, "step": step, "sha256": hashlib.sha256(data).hexdigest()}
    if checksum != expected or source.name != f"step-{step!s:0>9}":
        raise InputError(f"{source}: damaged: state.pt or the folder's name does not match checksum.json")
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError):  # torch's text recommends to run what it refused
        raise InputError(f"{source}: not loaded: expected tensors and plain values alone") from None
    return state


def _prune(folder: Path, newest: Path) -> None:
    found = sorted(folder.glob("step-*"))
    kept = found.index(newest) + 1
    for other in found[: max(0, kept - KEEP)] + found[kept:]:
        shutil.rmtree(other, ignore_errors=True)
