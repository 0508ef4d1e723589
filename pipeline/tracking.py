"""Journal in the run folder -> shipper -> MLflow; one MLflow run a training run, through every restart."""

import contextlib
import functools
import importlib.metadata
import importlib.util
import ipaddress
import itertools
import json
import logging
import os
import platform
import re
import secrets
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

import psutil
from filelock import FileLock, Timeout

from pipeline.config import InputError
from pipeline.metrics import Record, age, read
from pipeline.rundir import RunDir, write_atomic, write_json

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger("gsa")

MLFLOW_FLOOR = (3, 17, 2)  # below it: published holes
BATCH = 1000  # metrics a call, MLflow's limit
BUSY_S = 10.0  # SQLite's writers wait for one another
LOCK_S = 180.0  # making a database takes 2 s, on a busy machine 10; a killed process lets go of the lock
QUIET = {  # for this process; what the user has set stays
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",  # INFO tells of tables and of every migration
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # the default of 7 blocks one call for 247 s
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


def open_store(uri: str, artifacts: Path) -> "MlflowClient":
    """A client of a store (`sqlite:///FILE` or a server's address); a missing database is made first.

    Raises InputError: another kind of store, an MLflow with known holes, a database that is damaged, locked
    or of another schema, a server that does not answer.
    """
    found = importlib.metadata.version("mlflow")
    if tuple(map(int, re.findall(r"\d+", found)[:3])) < MLFLOW_FLOOR:
        raise InputError(f"mlflow {found} has known security holes; expected 3.17.2 or newer")
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    database = database_path(uri)
    from mlflow import MlflowClient

    if database:
        uri = f"sqlite:///{database}"
        with _locked(database):
            if not database.exists() or database.stat().st_size == 0:
                _create(database, artifacts)
            _check(database)
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    with _explained(f"tracking store {_redacted(uri)}"):
        client.search_experiments(max_results=1)
    return client


def database_path(uri: str) -> Path | None:
    """The file of an SQLite store; None where the store is a server. InputError: any other URI."""
    if uri.startswith(("http://", "https://")):
        return None
    name = uri.removeprefix("sqlite:///")
    if name == uri or not name or name.startswith(":"):
        raise InputError(
            f"tracking store {_redacted(uri)}: expected sqlite:///FILE or http(s)://HOST:PORT"
            + ("; MLflow's file store is not safe" if "://" not in uri or uri.startswith("file:") else "")
        )
    if "%" in name or "?" in name:  # SQLAlchemy would open another file
        raise InputError(f"tracking store {uri}: % and ? cannot stand in its path")
    return Path(name).absolute()


def experiment(client: "MlflowClient", name: str, artifacts: Path) -> str:
    """The id of an experiment, made if it is not there; a local store keeps its files below `artifacts`."""
    from mlflow.exceptions import MlflowException

    with _explained(f"experiment {name}"):
        found = client.get_experiment_by_name(name)
        if found is None:
            location = artifacts.absolute().as_uri() if database_path(client.tracking_uri) else None
            try:
                return str(client.create_experiment(name, artifact_location=location))
            except MlflowException:
                found = client.get_experiment_by_name(name)  # another process was faster
                if found is None:
                    raise
    if found.lifecycle_stage != "active":
        raise InputError(f"experiment {name} is deleted in MLflow; restore it there, or choose another name")
    return str(found.experiment_id)


def start_run(
    client: "MlflowClient",
    experiment_id: str,
    *,
    name: str,
    key: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    parent: str | None = None,
    description: str | None = None,
) -> str:
    """The id of the run with tag `gsa.key` = `key`: made if there is none, else continued.

    Parameters are logged once: a continued run keeps those that it has.
    """
    from mlflow.entities import Param, RunTag

    assert "'" not in key, key
    owner = {"gsa.key": key, "gsa.host": socket.gethostname(), "gsa.pid": str(os.getpid())}
    all_tags = {**tags, **owner, "mlflow.user": psutil.Process().username(), "mlflow.source.name": "gsa"}
    if parent:
        all_tags["mlflow.parentRunId"] = parent
    if description:
        all_tags["mlflow.note.content"] = description
    if code := code_state():
        all_tags["mlflow.source.git.commit"] = code[0]
    database = database_path(client.tracking_uri)
    # On a server no lock is ours; there the lock of the run folder keeps a second process away.
    with _locked(database) if database else contextlib.nullcontext(), _explained(f"MLflow run {name}"):
        found = client.search_runs([experiment_id], f"tags.`gsa.key` = '{key}'", max_results=1)
        run = found[0] if found else client.create_run(experiment_id, run_name=name, tags=all_tags)
        run_id = str(run.info.run_id)
        if found:
            client.update_run(run_id, status="RUNNING")
            client.log_batch(run_id, tags=[RunTag(k, v) for k, v in all_tags.items()])
        missing = [Param(k, _text(v)) for k, v in params.items() if k not in run.data.params]
        for i in range(0, len(missing), 100):
            client.log_batch(run_id, params=missing[i : i + 100])
    return run_id


def log_files(client: "MlflowClient", run_id: str, paths: Iterable[Path]) -> None:
    """Copy files to the artifacts of a run; one that cannot be copied is a warning."""
    for path in paths:
        try:
            client.log_artifact(run_id, str(path))
        except Exception as error:  # the run is done and its folder has the file: a mirror may fail
            log.warning("file not copied to MLflow path=%s error=%s", path, _line(error))


class Point(NamedTuple):
    """One value of one metric, as MLflow's Metric takes it; time in milliseconds since 1970."""

    key: str
    value: float
    timestamp: int
    step: int


@dataclass
class _Followed:
    run: RunDir
    run_id: str
    mark: tuple[int, int] = (-1, -1)  # of the journal when it was read
    seen: list[tuple[float, int]] = field(default_factory=list)  # (time, step) of the records shown
    points: list[Point] = field(default_factory=list)  # read and not shipped
    watermark: dict[str, int] = field(default_factory=dict)  # highest step in the store, by metric
    asked: bool = False  # whether the watermark is the store's own word
    saved: dict[str, int] | None = None  # what the file holds
    ending: tuple[str, int] | None = None  # final status and its time
    pause: float = 0.0  # after the last failure
    retry_at: float = 0.0

    @property
    def behind(self) -> int:
        """What MLflow lacks: points, the final status, and one for a journal that could not be read."""
        return len(self.points) + (self.ending is not None) + (self.mark != age(self.run.metrics))


class Shipper:
    """Mirrors journals to MLflow from a thread of its own: the one sender of a driver process.

    MLflow may be slow, down or broken: the caller never waits for it and never sees its errors. What is in
    the store already is asked of the store itself, so no step is sent twice, however often a journal is
    cut and written again and wherever a predecessor was killed. `on_records` is called from the thread with
    the records that are new in a journal.
    """

    def __init__(
        self,
        client: "MlflowClient",
        on_records: Callable[[RunDir, list[Record]], None] | None = None,
        *,
        poll_s: float = 1.0,
        retry_s: tuple[float, float] = (1.0, 30.0),
    ) -> None:
        self._client = client
        self._on_records = on_records
        self._poll_s = poll_s
        self._retry_s = retry_s  # first and longest pause after a failure
        self._warned = False
        self._deadline: float | None = None  # set by close()
        self._followed: dict[Path, _Followed] = {}
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._work, name="gsa-shipper", daemon=True)
        self._thread.start()

    def follow(self, run: RunDir, run_id: str) -> None:
        """Mirror the journal of a run from now on."""
        with self._lock:
            self._followed[run.path] = _Followed(run, run_id)

    def finish(self, run: RunDir, status: str) -> None:
        """Ship the rest of a journal, then end the run as FINISHED, FAILED or KILLED; does not wait."""
        assert status in ("FINISHED", "FAILED", "KILLED"), status
        with self._lock:
            self._followed[run.path].ending = (status, int(time.time() * 1000))
        self._wake.set()

    def close(self, timeout_s: float = 20.0) -> int:
        """Ship what is left, for at most `timeout_s`. Returns how many points and final statuses are missing
        in MLflow; the journals still hold them."""
        self._deadline = time.monotonic() + timeout_s
        self._wake.set()
        self._thread.join(timeout_s + 0.5)
        with self._lock:
            return sum(each.behind for each in self._followed.values())

    def _work(self) -> None:
        done = False
        while not done:
            # The deadline is read before the journals: a last pass sees all that was written before close().
            closing = self._deadline is not None
            with self._lock:
                followed = list(self._followed.values())
            for each in followed:
                self._advance(each)
            late = time.monotonic() > (self._deadline or 0)
            done = closing and (late or not any(each.behind for each in followed))
            if not done:
                self._wake.wait(min(self._poll_s, 0.2) if closing else self._poll_s)
                self._wake.clear()

    def _advance(self, followed: _Followed) -> None:
        ending = followed.ending  # before the journal: finish() may come while this pass ships
        try:
            mark = age(followed.run.metrics)
            if mark != followed.mark:
                records = read(followed.run.metrics)
                followed.points = _above(_points(records), followed.watermark)
                followed.mark = mark
                self._show(followed, records)
            if time.monotonic() >= followed.retry_at:
                self._ship(followed, ending)
                followed.pause = 0.0
        except Exception as error:  # whatever a mirror raises is a delay, never a reason to stop a training
            followed.asked = False  # did the store take the batch? Ask it
            followed.pause = min(max(self._retry_s[0], 2 * followed.pause), self._retry_s[1])
            followed.retry_at = time.monotonic() + followed.pause
            if not self._warned:
                log.warning(
                    "tracking is behind run=%s error=%s; the journal keeps all, retrying",
                    followed.run.name,
                    _line(error),
                )
            self._warned = True

    def _ship(self, followed: _Followed, ending: tuple[str, int] | None) -> None:
        from mlflow.entities import Metric

        if not followed.asked:
            run = self._client.get_run(followed.run_id)
            followed.watermark = {m.key: m.step for m in run.data.to_proto().metrics}
            followed.points = _above(followed.points, followed.watermark)
            followed.asked = True
        while batch := followed.points[:BATCH]:
            self._client.log_batch(followed.run_id, metrics=[Metric(*point) for point in batch])
            followed.watermark |= {point.key: point.step for point in batch}
            followed.points = followed.points[BATCH:]
        if followed.saved != followed.watermark:
            state = {"run_id": followed.run_id, "watermark": followed.watermark}
            write_json(followed.run.tracking, state)
            followed.saved = dict(followed.watermark)
        if ending:
            self._client.set_terminated(followed.run_id, *ending)
            followed.ending = None
            with self._lock:
                if self._followed.get(followed.run.path) is followed:
                    del self._followed[followed.run.path]

    def _show(self, followed: _Followed, records: list[Record]) -> None:
        marks = [(r.time, r.step) for r in records]
        pairs = zip(marks, followed.seen, strict=False)
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        followed.seen = marks
        if self._on_records and records[same:]:
            self._on_records(followed.run, records[same:])


def _points(records: Sequence[Record]) -> Iterator[Point]:
    for r in records:
        for key, value in r.metrics.items():
            yield Point(key, value, int(r.time * 1000), r.step)


def _above(points: Iterable[Point], watermark: Mapping[str, int]) -> list[Point]:
    """The points above the watermark, each step of a metric once, in ascending order."""
    top, kept = dict(watermark), []
    for point in points:
        if point.step > top.get(point.key, -1):
            top[point.key] = point.step
            kept.append(point)
    return kept


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


def serve(
    uri: str, artifacts: Path, host: str = "127.0.0.1", port: int = 5000
) -> tuple[list[str], dict[str, str]]:
    """Command and environment of an MLflow server with its web pages on a local store.

    An address that others reach needs accounts: the extra `auth` and MLFLOW_AUTH_ADMIN_PASSWORD, which is
    the password of `admin` when the server first starts. Raises InputError: without them; a remote store.
    """
    database = database_path(uri)
    if database is None:
        raise InputError(f"{_redacted(uri)} is a server already: open it in a browser")
    accounts = None if _is_loopback(host) else _accounts(database)
    open_store(uri, artifacts)  # its errors are one line; the server's are pages
    # What the user has exported for clients must not reach the server (security off, other stores).
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "_MLFLOW_"))}
    environment |= {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_MODEL_CATALOG_URI": "",  # else it asks the internet for a list of language models
        "MLFLOW_SQLALCHEMYSTORE_POOL_SIZE": "40",  # with 5 + 10 about 15 requests at once lock it up
        "MLFLOW_SQLALCHEMYSTORE_MAX_OVERFLOW": "60",
        "PYTHONSAFEPATH": "1",  # a folder named mlflow where the user stands is not MLflow
    }
    store = f"sqlite:///{database}"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store]
    command += ["--registry-store-uri", store, "--artifacts-destination", artifacts.absolute().as_uri()]
    command += ["--host", host, "--port", str(port), "--workers", "1"]
    names = ["localhost", "127.0.0.1", "[[]::1]"]  # any port: an SSH tunnel may end at another one
    if accounts is not None:
        environment |= accounts
        others = sorted({_shown(host), socket.gethostname(), socket.getfqdn()})
        names += others
        command += ["--app-name", "basic-auth"]
        command += ["--cors-allowed-origins", ",".join(f"http://{name}:*" for name in others)]
    command += ["--allowed-hosts", ",".join(f"{name}:*" for name in names)]
    return command, environment


def ui_url(host: str, port: int, experiment_id: str) -> str:
    """The address of an experiment's table of runs (MLflow's own landing page is about language models)."""
    return f"http://{_shown(host)}:{port}/#/experiments/{experiment_id}/runs?workflowType=machine_learning"


def _accounts(database: Path) -> dict[str, str]:
    password = os.environ.get("MLFLOW_AUTH_ADMIN_PASSWORD", "")
    if len(password) < 12 or importlib.util.find_spec("flask_wtf") is None:
        raise InputError(
            "an address that others reach needs accounts: pip install 'gsa-networks[auth]', and export "
            "MLFLOW_AUTH_ADMIN_PASSWORD with 12 characters or more; or stay on 127.0.0.1 with an SSH tunnel"
        )
    accounts, settings = database.with_name("mlflow_auth.db"), database.with_name("mlflow_auth.ini")
    accounts.touch(mode=0o600)
    uri = f"sqlite:///{accounts}".replace("%", "%%")  # an ini file
    write_atomic(settings, f"[mlflow]\ndefault_permission=READ\ndatabase_uri={uri}\nadmin_username=admin\n")
    settings.chmod(0o600)
    return {
        "MLFLOW_AUTH_CONFIG_PATH": str(settings),
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
    }


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _shown(host: str) -> str:
    """A host as it stands in an address; the name of this machine for 'all interfaces'."""
    name = socket.gethostname() if host in ("0.0.0.0", "::") else host
    return f"[{name}]" if ":" in name else name


@contextlib.contextmanager
def _locked(database: Path) -> Iterator[None]:
    lock = FileLock(f"{database}.lock", timeout=LOCK_S)
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise InputError(f"tracking store {database}: locked by another process for {LOCK_S:.0f} s") from None
    except OSError as error:
        raise InputError(f"tracking store {database}: cannot be written: {error}") from None
    try:
        yield
    finally:
        lock.release()


def _create(database: Path, artifacts: Path) -> None:
    """A new database under its name, or none: a process killed half-way must not leave a half-made one."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    temporary = database.with_name(f".{database.name}.new")
    temporary.unlink(missing_ok=True)
    with _explained(f"tracking store {database}"):
        store: Any = SqlAlchemyStore
        store(f"sqlite:///{temporary}", artifacts.absolute().as_uri()).engine.dispose()
    os.replace(temporary, database)


def _check(database: Path) -> None:
    """InputError unless this is a sound MLflow database of the installed version that can be written.

    MLflow itself would retry a damaged file for 100 s, and change an older schema unasked.
    """
    import mlflow
    from alembic.script import ScriptDirectory

    where = f"tracking store {database}"
    try:
        connection = sqlite3.connect(f"file:{quote(str(database))}?mode=rw", uri=True, timeout=BUSY_S)
        with contextlib.closing(connection):
            connection.execute("BEGIN IMMEDIATE")
            (revision,) = connection.execute("SELECT version_num FROM alembic_version").fetchone()
            connection.rollback()
    except (sqlite3.Error, TypeError) as error:
        raise InputError(f"{where}: not usable as an MLflow database: {error}") from None
    scripts = ScriptDirectory(str(Path(mlflow.__file__).parent / "store" / "db_migrations"))
    if revision != scripts.get_current_head():
        older = any(script.revision == revision for script in scripts.walk_revisions())
        cure = f"copy the file, then: mlflow db upgrade sqlite:///{database}" if older else "upgrade mlflow"
        kind = "an older" if older else "a newer"
        raise InputError(f"{where}: it is of {kind} MLflow (schema {revision}); {cure}")


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """MLflow's own errors as one line."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        raise InputError(f"{what}: {_line(error)}") from None


def _line(error: Exception) -> str:
    return _redacted(" ".join(str(error).split()))[:300] or type(error).__name__


def _redacted(uri: str) -> str:
    return re.sub(r"//[^/@\s]*@", "//***@", uri)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


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
