"""The journal of a run: one JSON record a line, appended by rank 0, mirrored to MLflow by the driver."""

import errno
import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config import InputError
from pipeline.rundir import RunDir, write_atomic


class Record(NamedTuple):
    """Metrics at a step. `time` is in seconds since 1970, `epoch` counts completed epochs."""

    time: float
    step: int
    epoch: float
    metrics: dict[str, float]


def append(journal: Path, *, step: int, epoch: float, metrics: dict[str, float]) -> None:
    """One record by one write(): a killed process leaves it whole or not at all. InputError: the disk is full."""
    try:
        append_line(journal, Record(time.time(), step, epoch, metrics)._asdict())
    except OSError as error:
        raise InputError(
            f"{journal}: step {step} cannot be recorded: {error.strerror or error}; next: make room, then run "
            "the same command again: it goes on from the newest checkpoint"
        ) from None


def append_line(path: Path, values: Any) -> None:
    """One line of JSON by one write(). OSError: it is not there, or not whole."""
    line = (json.dumps(values) + "\n").encode()
    with open(path, "ab", buffering=0) as file:
        if file.write(line) < len(line):  # the next line would be glued to half of this one
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read(journal: Path) -> list[Record]:
    """All whole records; the torn last line of a power loss is left out."""
    return [Record(**values) for values in read_lines(journal)]


def epoch_records(run: RunDir) -> list[Record]:
    """The records of a run's journal that end an epoch: those with an evaluation."""
    return [r for r in read(run.metrics) if "val/count" in r.metrics]


def read_lines(path: Path) -> list[Any]:
    """The values of all whole lines; of none where there is no file."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []


def cut(journal: Path, step: int) -> None:
    """Forget the records after `step`: a resumed run writes them again."""
    kept = [r for r in read(journal) if r.step <= step]
    if journal.exists():
        write_atomic(journal, "".join(json.dumps(r._asdict()) + "\n" for r in kept))


def age(journal: Path) -> tuple[int, int]:
    """A mark that changes whenever the journal does."""
    try:
        stat = os.stat(journal)
    except FileNotFoundError:
        return (0, 0)
    return (stat.st_mtime_ns, stat.st_size)
