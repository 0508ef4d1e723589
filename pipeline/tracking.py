"""MLflow: the store, made once under a lock; one MLflow run a training run, through every restart."""

import contextlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import re
import socket
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import psutil
from filelock import FileLock, Timeout

from pipeline.config import InputError
from pipeline.facts import code_state

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger("gsa")

MLFLOW_FLOOR = (3, 17, 2)  # below it: published holes
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
    with _explained(f"tracking store {redacted(uri)}"):
        client.search_experiments(max_results=1)
    return client


def database_path(uri: str) -> Path | None:
    """The file of an SQLite store; None where the store is a server. InputError: any other URI."""
    if uri.startswith(("http://", "https://")):
        return None
    name = uri.removeprefix("sqlite:///")
    if name == uri or not name or name.startswith(":"):
        raise InputError(
            f"tracking store {redacted(uri)}: expected sqlite:///FILE or http(s)://HOST:PORT"
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
    if description:
        all_tags["mlflow.note.content"] = description
    if code := code_state():
        all_tags["mlflow.source.git.commit"] = code[0]
    database = database_path(client.tracking_uri)
    # On a server no lock is ours; there the lock of the run folder keeps a second process away.
    with _locked(database) if database else contextlib.nullcontext(), _explained(f"MLflow run {name}"):
        found = client.search_runs([experiment_id], f"tags.`gsa.key` = '{key}'", max_results=1)
        if parent and not (
            found and "mlflow.parentRunId" in found[0].data.tags
        ):  # a run keeps its first parent
            all_tags["mlflow.parentRunId"] = parent
        run = found[0] if found else client.create_run(experiment_id, run_name=name, tags=all_tags)
        run_id = str(run.info.run_id)
        if found:
            client.update_run(run_id, status="RUNNING")
            client.log_batch(run_id, tags=[RunTag(k, v) for k, v in all_tags.items()])
        missing = [Param(k, _text(v)) for k, v in params.items() if k not in run.data.params]
        for i in range(0, len(missing), 100):
            client.log_batch(run_id, params=missing[i : i + 100])
    return run_id


def end_run(
    client: "MlflowClient",
    run_id: str,
    status: str,
    metrics: Mapping[str, float],
    *,
    step: int,
    tags: Mapping[str, str],
) -> None:
    """Give a run its last metrics and its status; where MLflow cannot take them, warn."""
    from mlflow.entities import Metric, RunTag

    now = int(time.time() * 1000)
    values = [Metric(key, value, now, step) for key, value in metrics.items()]
    try:
        client.log_batch(run_id, metrics=values, tags=[RunTag(k, v) for k, v in tags.items()])
        client.set_terminated(run_id, status)
    except Exception as error:  # what is mirrored here lies in our own files: a mirror may fail
        log.warning("MLflow run not ended run_id=%s error=%s", run_id, one_line(error))


def set_tags(client: "MlflowClient", run_id: str, tags: Mapping[str, str]) -> None:
    """Set tags of a run; an empty one is taken away. Where MLflow cannot, warn."""
    try:
        for key, value in tags.items():
            if value:
                client.set_tag(run_id, key, value)
            elif key in client.get_run(run_id).data.tags:
                client.delete_tag(run_id, key)
    except Exception as error:  # a mirror may fail
        log.warning("tags not set in MLflow run_id=%s error=%s", run_id, one_line(error))


def log_files(client: "MlflowClient", run_id: str, paths: Iterable[Path]) -> None:
    """Copy files to the artifacts of a run; one that cannot be copied is a warning."""
    for path in paths:
        try:
            client.log_artifact(run_id, str(path))
        except Exception as error:  # the run is done and its folder has the file: a mirror may fail
            log.warning("file not copied to MLflow path=%s error=%s", path, one_line(error))


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
        raise InputError(f"{what}: {one_line(error)}") from None


def one_line(error: Exception) -> str:
    return redacted(" ".join(str(error).split()))[:300] or type(error).__name__


def redacted(uri: str) -> str:
    return re.sub(r"//[^/@\s]*@", "//***@", uri)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
