"""What describes this machine and this code; no heavy import."""

import functools
import importlib.metadata
import importlib.util
import logging
import os
import platform
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    pass

log = logging.getLogger("gsa")


def system_facts() -> dict[str, str]:
    """What a result depends on beside its settings: machine, versions, code; imports no library for it."""
    cpus = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    facts = {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu": _cpu_model(),
        "cpus": str(cpus),
        "memory_gib": f"{psutil.virtual_memory().total / 2**30:.1f}",
        "gpus": _output("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader") or "none",
    }
    for package in ("torch", "ray", "mlflow", "pyarrow"):
        facts[package] = importlib.metadata.version(package)
    if code := code_state():
        facts["git_commit"], facts["git_dirty"] = code[0], str(code[1]).lower()
    return facts


@functools.cache
def code_state() -> tuple[str, bool] | None:
    """Commit of the checkout that this code runs from, and whether it was changed; None for a copy."""
    here = Path(__file__).resolve()
    git = ("git", "-C", str(here.parent))
    if not _output(*git, "ls-files", here.name):  # installed below someone else's checkout
        return None
    commit = _output(*git, "rev-parse", "HEAD")
    return (commit, bool(_output(*git, "status", "--porcelain", "--untracked-files=no"))) if commit else None


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _output(*command: str) -> str:
    """What a command prints, on one line; nothing where it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "; ".join(done.stdout.strip().splitlines()) if done.returncode == 0 else ""
