"""`gsa doctor`: what is here, what is missing, what to do."""

import os
import shutil
import subprocess
import sys
from importlib import metadata
from typing import Any

import psutil

from pipeline import tracking
from pipeline.config import InputError
from pipeline.rundir import Out

LIBRARIES = ("torch", "ray", "mlflow", "webdataset", "pyarrow", "pillow", "scikit-learn")
MIN_FREE_GB = 5


def examine(out: Out) -> list[dict[str, Any]]:
    """Rows of what, state (ok, absent: can be done without, missing: has to be mended), found, next."""
    return [_python(), *map(_library, LIBRARIES), _machine(), _gpus(), _slurm(), _store(out), _disk(out)]


def _row(what: str, state: str, found: str, next_: str = "") -> dict[str, Any]:
    return {"what": what, "state": state, "found": found, "next": next_}


def _python() -> dict[str, Any]:
    return _row("python", "ok", sys.version.split()[0])


def _library(name: str) -> dict[str, Any]:
    try:
        return _row(name, "ok", metadata.version(name))
    except metadata.PackageNotFoundError:
        return _row(name, "missing", "not installed", "pip install gsa-networks")


def _machine() -> dict[str, Any]:
    memory = psutil.virtual_memory()
    found = f"{os.cpu_count()} CPUs, {memory.available / 2**30:.0f} of {memory.total / 2**30:.0f} GiB free"
    return _row("machine", "ok", found)


def _gpus() -> dict[str, Any]:
    found = _output("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
    if found is None:
        return _row("GPUs", "absent", "no nvidia-smi", "training runs on the CPU")
    import torch

    if not torch.cuda.is_available():
        return _row(
            "GPUs", "missing", found, f"torch {torch.__version__} is a CPU build: install a CUDA build"
        )
    return _row("GPUs", "ok", found)


def _slurm() -> dict[str, Any]:
    found = _output("sinfo", "--noheader", "--format=%P %D nodes %G")
    if found is None:
        return _row("Slurm", "absent", "no sinfo here", "local runs need none")
    return _row("Slurm", "ok", found) if found else _row("Slurm", "missing", "sinfo shows no partition")


def _store(out: Out) -> dict[str, Any]:
    uri = out.tracking_uri
    database = tracking.database_path(uri)
    if database and not database.exists():
        return _row("MLflow store", "absent", f"{database} not made yet", "the first run makes it")
    try:
        client = tracking.open_store(uri, out.artifacts)
        experiments, models = client.search_experiments(), client.search_registered_models()
    except InputError as error:
        return _row("MLflow store", "missing", str(error))
    return _row("MLflow store", "ok", f"{uri}: {len(experiments)} experiments, {len(models)} models")


def _disk(out: Out) -> dict[str, Any]:
    place = next(p for p in (out.root, *out.root.parents) if p.exists())
    free = shutil.disk_usage(place).free / 1e9
    if free < MIN_FREE_GB:
        return _row("disk", "missing", f"{free:.1f} GB free at {place}", f"at least {MIN_FREE_GB} GB")
    return _row("disk", "ok", f"{free:.0f} GB free at {place}")


def _output(*command: str) -> str | None:
    """What a command prints; None where there is no such command or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return "; ".join(done.stdout.split("\n")).strip("; ")
