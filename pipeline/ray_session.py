"""A private Ray on loopback: for as long as a block runs, and not a process or file of it longer."""

import contextlib
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from pipeline.config import InputError

TEMPORARY = "gsa-ray-"  # short: unix socket paths hold 107 bytes
JOIN_S = 10.0  # for the head of others to answer
GRACE_S = 5.0  # for Ray's processes to end by themselves

_TOKEN = secrets.token_hex(32)  # of this process: Ray reads it once, so later sessions have to use it too

# How we use Train and Tune, on any cluster; what the user has set otherwise stays.
_USE = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a report waits for the next check
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "30",  # 600 by default: too long for a frozen worker
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",  # 30 by default: a frozen worker never answers
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # Of a trial that was stopped: its last checkpoint is being written. Past it Tune gives up the next trial.
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "3600",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",  # Tune's own state, of all trials each time: we never read it
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Tune would end the sweep at Ctrl-C as if it were complete
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one prints a banner whatever `verbose` says
}
# What the processes of our own Ray inherit. A second Ray on the host must not be taken for ours (RAY_ADDRESS,
# RAY_TMPDIR), and nobody on the network or on the host may use ours without the token.
_PRIVATE = {
    "RAY_AUTH_MODE": "token",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's own switch for 127.0.0.1 instead of the host's address
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # 15 by default: beside other work a worker would hardly run
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@contextlib.contextmanager
def session(*, cpus: int) -> Iterator[None]:
    """Ray for as long as the block runs, with `cpus` logical CPUs: the cluster at $RAY_ADDRESS, else our own.

    Our own listens on loopback only, asks for a token, and lies in a private folder that goes with it.
    Inside of another session it is that one. Raises InputError: no Ray answers there, or refuses us.
    """
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        yield
        return
    if address := os.environ.get("RAY_ADDRESS"):
        with _joined(address):
            yield
        return
    folder = Path(tempfile.mkdtemp(prefix=TEMPORARY))
    with _reaper(folder), environment(_private_environment(folder)):
        import ray  # not before: it reads the environment once

        try:
            with _our_sigterm():
                ray.init(
                    address="local",
                    num_cpus=cpus,
                    include_dashboard=True,  # Tune frees an early-stopped trial's workers through it
                    dashboard_host="127.0.0.1",
                    _temp_dir=str(folder / "r"),  # Ray opens this one to all: it lies in our 0700 folder
                    object_store_memory=200_000_000,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
            yield
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _joined(address: str) -> Iterator[None]:
    """The cluster of others, at HOST:PORT of its head, with the token of $RAY_AUTH_TOKEN or its _PATH."""
    host, _, port = address.rpartition(":")
    if not re.fullmatch(r"[^/]+:[0-9]{1,5}", address):
        raise InputError(
            f"RAY_ADDRESS={address}: expected HOST:PORT of a head; next: run on a node of that cluster"
        )
    use = _use()
    # Its processes inherit the environment of whoever started it: each worker of ours gets these by itself.
    # The address with them: Ray's clean-up would else ask whichever Ray it finds on its host, and hear that
    # our run is dead.
    settings = {"env_vars": {**use, "RAY_ADDRESS": address}}
    token = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ)
    with environment({**use, **({"RAY_AUTH_MODE": "token"} if token else {})}):
        import ray  # not before: it reads the environment once

        try:
            socket.create_connection((host, int(port)), JOIN_S).close()  # Ray would try for minutes
            with _our_sigterm():
                ray.init(log_to_driver=False, logging_level=logging.ERROR, runtime_env=settings)
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise InputError(
                f"RAY_ADDRESS={address}: cannot join that Ray: {str(error).strip().splitlines()[0]}; next: the "
                "address of a running head, RAY_AUTH_TOKEN_PATH=FILE if it asks for a token, the same Ray on "
                "all nodes, and this command on one of them; or no RAY_ADDRESS, for a Ray of our own"
            ) from None
        try:
            yield
        finally:
            ray.shutdown()


def _use() -> dict[str, str]:
    return {name: os.environ.get(name, value) for name, value in _USE.items()}


def _private_environment(folder: Path) -> dict[str, str]:
    token = folder / "token"
    descriptor = os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(_TOKEN)
    port = _free_port()
    return {
        **_use(),
        **_PRIVATE,
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_TMPDIR": str(folder),
        "RAY_GCS_SERVER_PORT": str(port),
        "RAY_ADDRESS": f"127.0.0.1:{port}",
    }


@contextlib.contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Variables of this process, for as long as the block runs."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _our_sigterm() -> Iterator[None]:
    """Ray's own handler would end the process with 15, and MLflow would read of a failure."""
    main = threading.current_thread() is threading.main_thread()
    ours = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if main and ours is not None:
            signal.signal(signal.SIGTERM, ours)


@contextlib.contextmanager
def _reaper(folder: Path) -> Iterator[None]:
    """A process that outlives this one, be it killed: it ends what is left of Ray and removes the folder.

    It sees the end of the block, or of this process, as the end of its standard input.
    """
    command = [sys.executable, "-P", "-m", "pipeline.ray_session", str(folder)]
    # A session of its own: Ctrl-C is for us, and we tell it.
    process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    assert process.stdin
    try:
        yield
    finally:
        process.stdin.close()
        process.wait()


def reap(folder: Path, *, spare: set[int]) -> None:
    """End every process that has a file of the folder open, but those spared; then remove the folder."""
    until = time.monotonic() + GRACE_S
    while left := [p for p in psutil.process_iter() if p.pid not in spare and _uses(p, folder)]:
        if time.monotonic() > until:
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        time.sleep(0.2)
    shutil.rmtree(folder, ignore_errors=True)


def _uses(process: psutil.Process, folder: Path) -> bool:
    """By open files and command line: Ray's processes overwrite their environment with their title."""
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        used = [*process.cmdline(), *(file.path for file in process.open_files())]
    except (psutil.Error, OSError):
        return False
    return any(str(folder) in word for word in used)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    driver = os.getppid()
    sys.stdin.buffer.read()
    reap(Path(sys.argv[1]), spare={driver, os.getpid()})
