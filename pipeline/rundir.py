"""Names every file that the system writes; how files are written: temporary name, flush, rename."""

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipeline.config import InputError


@dataclass(frozen=True)
class RunDir:
    """One training run: all there is to know of it."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def facts(self) -> Path:
        """Fingerprint, shards, cost, system: what identifies and explains the run."""
        return self.path / "facts.json"

    @property
    def init(self) -> Path:
        """The first weights, where the config names a run or a model for them."""
        return self.path / "init.pt"

    @property
    def stop(self) -> Path:
        """While it is there, the run is asked to save a checkpoint and to end."""
        return self.path / ".stop"

    def by_class(self, name: str) -> Path:
        """Top-1 in percent of each class, by the last evaluation of weights (val) or their averages (val_ema)."""
        return self.path / f"{name}_by_class.json"

    @property
    def metrics(self) -> Path:
        """The journal: one JSON record a line, the truth that MLflow mirrors."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def trace(self, rank: int) -> Path:
        """What a rank did in some steps, if that was asked: a chrome trace."""
        return self.path / "profile" / f"rank{rank}.json.gz"

    @property
    def error(self) -> Path:
        """Why the run failed, the last time that it did."""
        return self.logs / "error.log"

    @property
    def tracking(self) -> Path:
        """The MLflow run id, and how far the journal has been shipped."""
        return self.path / "mlflow.json"

    @property
    def result(self) -> Path:
        """The final metrics; its presence says that the run is complete."""
        return self.path / "result.json"

    @property
    def lock(self) -> Path:
        """Held by the process that drives the run."""
        return self.path / ".lock"


@dataclass(frozen=True)
class SweepDir:
    """One sweep: its settings and the outcome of each of its trials."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config(self) -> Path:
        return self.path / "sweep.yaml"

    @property
    def points(self) -> Path:
        """The points that a sampler has thought of, in turn: a JSON record a line."""
        return self.path / "points.jsonl"

    @property
    def outcomes(self) -> Path:
        """A JSON record a line, whenever a trial ends; of several of a run the last counts."""
        return self.path / "outcomes.jsonl"

    @property
    def report(self) -> Path:
        """Tables and plots."""
        return self.path / "report"

    @property
    def tracking(self) -> Path:
        """The MLflow run id of the parent run."""
        return self.path / "mlflow.json"

    @property
    def lock(self) -> Path:
        return self.path / ".lock"


@dataclass(frozen=True)
class Out:
    """The root of all output: `--out`, else `$GSA_OUT`, else `./out`."""

    root: Path

    @property
    def tracking_uri(self) -> str:
        """`$MLFLOW_TRACKING_URI`, else the SQLite file below the root."""
        return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self.root / 'mlflow.db'}"

    @property
    def artifacts(self) -> Path:
        return self.root / "artifacts"

    def shards(self, name: str) -> Path:
        """A set of shards by name, or by path where `name` holds a separator."""
        return Path(name).absolute() if os.sep in name or name in (".", "..") else self.root / "shards" / name

    def run(self, name: str) -> RunDir:
        """A run by name, or by path where `name` holds a separator."""
        return RunDir(Path(name).absolute() if os.sep in name else self.root / "runs" / name)

    def find_run(self, name: str) -> RunDir:
        """A run that exists; otherwise an error that lists those that do."""
        run = self.run(name)
        if not run.config.is_file():
            raise InputError(
                f"run {name}: not found in {run.path.parent}; there are: {_names(run.path.parent)}"
            )
        return run

    def sweep(self, name: str) -> SweepDir:
        return SweepDir(self.root / "sweeps" / name)

    def workflow(self, name: str) -> Path:
        return self.root / "workflows" / name


def write_atomic(path: Path, data: str | bytes) -> None:
    """All of `data` under its name, or nothing: a temporary file is flushed to disk, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, values: Any) -> None:
    """Plain values as indented JSON, atomically."""
    write_atomic(path, json.dumps(values, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """The values of a JSON file; InputError if it is not there or not JSON."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None


class InUse(InputError):
    """Another process writes there."""


@contextmanager
def hold(lock: Path, what: str) -> Iterator[None]:
    """Hold a lock file: two processes would write over each other. InUse if another has it."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock, timeout=0):
            yield
    except Timeout:
        raise InUse(f"{what} is in use by another process (lock {lock}); next: wait for it") from None


def _names(folder: Path) -> str:
    found = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    return ", ".join(found[:20]) or "none"
