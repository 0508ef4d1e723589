"""The store is made once, the run is made once, every point arrives once; a failing store hurts nobody."""

import base64
import contextlib
import http.client
import json
import logging
import math
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline import facts, metrics, tracking
from pipeline.config import InputError
from pipeline.facts import system_facts
from pipeline.metrics import Record
from pipeline.rundir import RunDir, read_json
from pipeline.server import serve, ui_url
from pipeline.shipper import Shipper
from pipeline.tracking import database_path, experiment, open_store, start_run

pytestmark = [
    # MLflow 3.17.2 with SQLAlchemy 2.1: theirs to mend, and it says so once a process.
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning"),
]

FAST: Any = {"poll_s": 0.01, "retry_s": (0.02, 0.1)}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    root = tmp_path_factory.mktemp("store") / "with a space"
    return f"sqlite:///{root / 'mlflow.db'}", root / "artifacts"


@pytest.fixture(scope="module")
def client(store: tuple[str, Path]) -> Any:
    import warnings

    with warnings.catch_warnings():  # the marks of a module do not reach its fixtures
        warnings.filterwarnings("ignore", "The ``noload`` loader", DeprecationWarning)
        return open_store(*store)


@pytest.fixture(scope="module")
def home(client: Any, store: tuple[str, Path]) -> str:
    return experiment(client, "tests", store[1])


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    wait_for(lambda: not any(thread.name == "gsa-shipper" for thread in threading.enumerate()))


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    (tmp_path / "run-1").mkdir()
    return RunDir(tmp_path / "run-1")


@pytest.fixture
def run_id(client: Any, home: str, request: pytest.FixtureRequest) -> str:
    return start_run(client, home, name="run-1", key=request.node.name, params={}, tags={})


def write(run: RunDir, *steps: int, key: str = "train/loss") -> None:
    for step in steps:
        metrics.append(run.metrics, step=step, epoch=step / 10, metrics={key: step + 0.5})


def ship(client: Any, run: RunDir, run_id: str, status: str | None = None) -> int:
    shipper = Shipper(client, **FAST)
    shipper.follow(run, run_id)
    if status:
        shipper.finish(run, status)
    return shipper.close()


def steps(client: Any, run_id: str, key: str = "train/loss") -> list[int]:
    return [point.step for point in client.get_metric_history(run_id, key)]


class Failing:
    """The client, with a method that fails `times` times, before or after the real one did its work."""

    def __init__(self, client: Any, method: str, times: int, *, after: bool = False) -> None:
        self._client, self._method, self._after = client, method, after
        self.left = times

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._client, name)
        if name != self._method or not self.left:
            return real

        def fail(*args: Any, **kwargs: Any) -> None:
            self.left -= 1
            if self._after:
                real(*args, **kwargs)
            raise ConnectionError(f"{name}: the store is away, token://me:hunter2@host")

        return fail


# --- the store


def python(code: str, *args: str, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *args],
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_eight_processes_that_come_at_once_share_one_store_and_one_run(tmp_path: Path) -> None:
    code = """if True:
        import pathlib, sys, time
        from pipeline.tracking import experiment, open_store, start_run
        root, barrier, name = map(pathlib.Path, sys.argv[1:])
        client = open_store(f"sqlite:///{root / 'new' / 'mlflow.db'}", root / "artifacts")
        (barrier / name).touch()
        while len(list(barrier.iterdir())) < 8:
            time.sleep(0.001)
        id = experiment(client, "same", root / "artifacts")
        print(id, [start_run(client, id, name="same", key=f"k{i}", params={"i": i}, tags={}) for i in range(3)])
    """
    out, barrier = tmp_path / "out", tmp_path / "barrier"
    out.mkdir()
    barrier.mkdir()
    children = [python(code, str(out), str(barrier), str(i), cwd=out) for i in range(8)]
    results = [(*child.communicate(timeout=240), child.returncode) for child in children]
    assert {(err, rc) for _, err, rc in results} == {("", 0)}, results  # and not a word on the terminal
    assert len({text for text, _, _ in results}) == 1, results
    with contextlib.closing(sqlite3.connect(out / "new" / "mlflow.db")) as db:
        assert db.execute("select count(*) from runs").fetchone() == (3,)
        assert db.execute("select artifact_location from experiments where name = 'Default'").fetchone() == (
            (out / "artifacts" / "0").as_uri(),
        )
    assert sorted(p.name for p in out.iterdir()) == ["new"]  # nothing where the processes stood


def test_a_database_half_made_by_a_killed_process_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = tmp_path / "mlflow.db"

    def killed_half_way(uri: str, artifacts: str) -> None:
        with contextlib.closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as db:
            db.execute("CREATE TABLE experiments (id)")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mlflow.store.tracking.sqlalchemy_store.SqlAlchemyStore", killed_half_way)
        with pytest.raises(KeyboardInterrupt):
            open_store(f"sqlite:///{database}", tmp_path)
    assert not database.exists()
    assert open_store(f"sqlite:///{database}", tmp_path).search_experiments()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mlflow.db", "mlflow.db.lock"]


@pytest.mark.parametrize(
    "uri", ["mlruns", "/tmp/mlruns", "file:///tmp/mlruns", "file:mlruns", "sqlite://", ""]
)
def test_other_kinds_of_store_are_refused(uri: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected sqlite:///FILE or http\(s\)://HOST:PORT"):
        open_store(uri, tmp_path)


def test_a_password_in_a_refused_uri_is_not_shown(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        open_store("postgresql://me:hunter2@host/db", tmp_path)
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize("name", ["a%20b", "a?b"])
def test_a_path_that_sqlalchemy_would_misread_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"% and \? cannot stand in its path"):
        open_store(f"sqlite:///{tmp_path / name}/mlflow.db", tmp_path)


def test_an_old_mlflow_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda _: "3.9.12")
    with pytest.raises(InputError, match=r"mlflow 3\.9\.12 has known security holes; expected 3\.17\.2"):
        open_store(f"sqlite:///{tmp_path}/mlflow.db", tmp_path)


def damage(database: Path, how: str) -> Any:
    """What can be wrong with a database file. Returns what must stay open."""
    if how == "noise":
        database.write_bytes(b"no database" * 500)
    elif how == "cut":
        os.truncate(database, database.stat().st_size // 3)
    elif how == "folder":
        database.unlink()
        database.mkdir()
    else:
        db = sqlite3.connect(database)
        if how == "foreign":
            db.execute("DROP TABLE alembic_version")
        if how == "newer":
            db.execute("UPDATE alembic_version SET version_num = 'ffff0000ffff'")
        if how == "older":
            db.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")  # MLflow's first
        if how == "locked":
            db.execute("BEGIN EXCLUSIVE")
            return db
        db.commit()
        db.close()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("noise", "not usable as an MLflow database: file is not a database"),
        ("cut", "not usable as an MLflow database: database disk image is malformed"),
        ("folder", "not usable as an MLflow database: unable to open database file"),
        ("foreign", "not usable as an MLflow database: no such table: alembic_version"),
        ("locked", "not usable as an MLflow database: database is locked"),
        ("newer", r"it is of a newer MLflow \(schema ffff0000ffff\); upgrade mlflow"),
        (
            "older",
            r"it is of an older MLflow \(schema 451aebb31d03\); copy the file, then: mlflow db upgrade",
        ),
    ],
)
def test_a_bad_database_is_one_clear_error(
    how: str,
    message: str,
    client: Any,
    store: tuple[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tracking, "BUSY_S", 0.1)
    database = tmp_path / "mlflow.db"
    database.write_bytes(Path(store[0].removeprefix("sqlite:///")).read_bytes())
    opened = damage(database, how)
    before = database.read_bytes() if database.is_file() else b""
    start = time.monotonic()
    with pytest.raises(InputError, match=message) as error:
        open_store(f"sqlite:///{database}", tmp_path)
    assert "\n" not in str(error.value) and str(database) in str(error.value)
    assert time.monotonic() - start < 5  # MLflow by itself tries for 100 s
    if opened:
        opened.close()
    assert before == (database.read_bytes() if database.is_file() else b"")


def test_a_server_that_is_not_there_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(InputError, match=r"^tracking store http://\*\*\*@127\.0\.0\.1:9: ") as error:
        open_store("http://me:hunter2@127.0.0.1:9", tmp_path)
    assert "\n" not in str(error.value) and "hunter2" not in str(error.value)


# --- the run


def test_a_run_is_made_once_and_continued(client: Any, home: str) -> None:
    params = {"optim.lr": 0.1, "data.crop_scale": [0.08, 1.0], "model.placement": None, "data.shards": "here"}
    parent = start_run(client, home, name="sweep", key="s1", params={}, tags={})

    def start(shards: str) -> str:
        return start_run(
            client,
            home,
            name="trial",
            key="f00d",
            params={**params, "data.shards": shards},
            tags={"gsa.sweep": "s"},
            parent=parent,
            description="why",
        )

    first = start("here")
    client.set_terminated(first, "FAILED")
    assert start("moved") == first
    run = client.get_run(first)
    assert run.info.status == "RUNNING" and run.info.run_name == "trial"
    assert run.data.params == {
        "optim.lr": "0.1",
        "data.crop_scale": "[0.08,1.0]",
        "model.placement": "null",
        "data.shards": "here",
    }
    tags = run.data.tags
    assert tags["mlflow.parentRunId"] == parent and tags["mlflow.note.content"] == "why"
    assert tags["gsa.sweep"] == "s" and tags["gsa.key"] == "f00d" and tags["gsa.pid"] == str(os.getpid())
    assert tags["gsa.host"] == socket.gethostname() and tags["mlflow.user"]


def test_a_run_killed_before_its_parameters_gets_them_when_continued(client: Any, home: str) -> None:
    half = client.create_run(home, tags={"gsa.key": "half"}).info.run_id
    many = {f"p{i:03d}": i for i in range(150)}  # MLflow takes 100 a call
    assert start_run(client, home, name="half", key="half", params=many, tags={}) == half
    assert client.get_run(half).data.params == {key: str(value) for key, value in many.items()}


def test_the_commit_is_logged_where_the_code_is_in_a_checkout(
    client: Any, home: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (tracking, facts):
        monkeypatch.setattr(module, "code_state", lambda: ("c0ffee", True))
    run_id = start_run(client, home, name="c", key="commit", params={}, tags={})
    assert client.get_run(run_id).data.tags["mlflow.source.git.commit"] == "c0ffee"
    assert system_facts()["git_dirty"] == "true"


def test_a_deleted_experiment_is_one_clear_error(client: Any, store: tuple[str, Path]) -> None:
    client.delete_experiment(experiment(client, "gone", store[1]))
    with pytest.raises(InputError, match="experiment gone is deleted in MLflow"):
        experiment(client, "gone", store[1])


def test_files_of_a_run_lie_below_the_artifacts(
    client: Any, run: RunDir, run_id: str, store: tuple[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    run.config.write_text("seed: 0\n")
    tracking.log_files(client, run_id, [run.config, run.result])
    assert [p.read_text() for p in store[1].rglob(f"{run_id}/artifacts/config.yaml")] == ["seed: 0\n"]
    assert "file not copied to MLflow path=" in caplog.text and "result.json" in caplog.text


# --- the shipper


def test_every_point_arrives_once_with_its_own_time_and_step(
    client: Any, run: RunDir, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in range(1, 1002):  # 2,002 points: three batches
        line = Record(1.7e9 + step / 8, step, step / 10, {"train/loss": step / 3, "time/data_s": 0.25})
        with open(run.metrics, "a") as journal:
            journal.write(json.dumps(line._asdict()) + "\n")
    sizes: list[int] = []
    real = client.log_batch

    def spy(run_id: str, metrics: list[Any]) -> None:
        sizes.append(len(metrics))
        real(run_id, metrics=metrics)

    monkeypatch.setattr(client, "log_batch", spy)
    assert ship(client, run, run_id, "FINISHED") == 0
    assert sizes == [1000, 1000, 2]  # MLflow's limit
    for key, value in (("train/loss", lambda s: s / 3), ("time/data_s", lambda _: 0.25)):
        history = client.get_metric_history(run_id, key)
        expected = [(s, value(s), int((1.7e9 + s / 8) * 1000)) for s in range(1, 1002)]
        assert [(p.step, p.value, p.timestamp) for p in history] == expected
    info = client.get_run(run_id).info
    assert info.status == "FINISHED" and abs(info.end_time / 1000 - time.time()) < 60
    assert read_json(run.tracking) == {
        "run_id": run_id,
        "watermark": {"train/loss": 1001, "time/data_s": 1001},
        "status": "FINISHED",
    }


def test_values_that_are_not_finite_arrive_as_mlflow_keeps_them(
    client: Any, run: RunDir, run_id: str
) -> None:
    for step, value in enumerate([math.nan, math.inf, -math.inf]):
        metrics.append(run.metrics, step=step, epoch=0, metrics={"train/loss": value})
    assert ship(client, run, run_id) == 0
    first, *rest = [p.value for p in client.get_metric_history(run_id, "train/loss")]
    assert math.isnan(first) and rest == [sys.float_info.max, -sys.float_info.max]


def test_points_arrive_while_the_run_goes_on_and_are_shown_once(
    client: Any, run: RunDir, run_id: str
) -> None:
    shown: list[int] = []
    shipper = Shipper(client, lambda who, new: shown.extend(r.step for r in new if who == run), **FAST)
    shipper.follow(run, run_id)
    for step in (1, 2, 3):
        write(run, step)
        wait_for(lambda step=step: steps(client, run_id) == list(range(1, step + 1)))
    assert shown == [1, 2, 3]
    metrics.cut(run.metrics, 1)  # the run resumes from step 1
    write(run, 2, 3, 4)
    assert shipper.close() == 0
    assert shown == [1, 2, 3, 2, 3, 4]
    assert steps(client, run_id) == [1, 2, 3, 4]
    assert client.get_run(run_id).info.status == "RUNNING"  # not finished: the next process continues it


def wait_for(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_journal_cut_and_written_again_sends_no_step_twice(client: Any, run: RunDir, run_id: str) -> None:
    write(run, 1, 2, 3, 4, 5)
    assert ship(client, run, run_id) == 0
    metrics.cut(run.metrics, 3)
    write(run, 4, 5, 6)  # again, at another time
    assert ship(client, run, run_id) == 0
    for _ in range(2):
        write(run, 5, 6, 7)  # replayed without a cut, and again
        write(run, 7, key="val/top1")
        time.sleep(0.01)  # or it is the same point to MLflow
    assert ship(client, run, run_id) == 0
    assert steps(client, run_id) == [1, 2, 3, 4, 5, 6, 7]
    assert steps(client, run_id, "val/top1") == [7]


def test_a_shipper_killed_between_store_and_watermark_sends_no_step_twice(
    client: Any, run: RunDir, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(run, 1, 2)
    assert ship(client, run, run_id) == 0
    with monkeypatch.context() as patch:  # the points reach the store, the watermark does not reach the file
        patch.setattr(
            "pipeline.shipper.write_json", lambda *_: (_ for _ in ()).throw(OSError("no space left"))
        )
        write(run, 3, 4)
        shipper = Shipper(client, **FAST)
        shipper.follow(run, run_id)
        wait_for(lambda: steps(client, run_id) == [1, 2, 3, 4])
        shipper.close(0.1)
    assert read_json(run.tracking)["watermark"] == {"train/loss": 2}
    metrics.cut(run.metrics, 2)
    write(run, 3, 4, 5)
    assert ship(client, run, run_id) == 0
    assert steps(client, run_id) == [1, 2, 3, 4, 5]
    assert read_json(run.tracking)["watermark"] == {"train/loss": 5}


def test_an_answer_that_was_lost_sends_no_step_twice(client: Any, run: RunDir, run_id: str) -> None:
    failing = Failing(client, "log_batch", 1, after=True)
    shipper = Shipper(failing, **FAST)  # type: ignore[arg-type]
    write(run, 1, 2, 3)
    shipper.follow(run, run_id)
    wait_for(lambda: failing.left == 0)
    metrics.cut(run.metrics, 1)
    write(run, 2, 3)
    assert shipper.close() == 0
    assert steps(client, run_id) == [1, 2, 3]


def test_another_database_gets_everything(
    client: Any, home: str, run: RunDir, run_id: str, store: tuple[str, Path], tmp_path: Path
) -> None:
    write(run, 1, 2, 3)
    assert ship(client, run, run_id) == 0
    other = start_run(client, home, name="other", key="other database", params={}, tags={})
    write(run, 4)
    assert ship(client, run, other) == 0
    assert steps(client, other) == [1, 2, 3, 4] and steps(client, run_id) == [1, 2, 3]
    assert read_json(run.tracking)["run_id"] == other


@pytest.mark.parametrize("method", ["log_batch", "get_run", "set_terminated"])
def test_a_failing_store_loses_nothing_and_raises_nothing(
    method: str, client: Any, run: RunDir, run_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    failing = Failing(client, method, 4)
    shipper = Shipper(failing, **FAST)  # type: ignore[arg-type]
    shipper.follow(run, run_id)
    for step in range(1, 6):
        write(run, step)
    shipper.finish(run, "KILLED")
    assert shipper.close() == 0
    assert failing.left == 0
    assert steps(client, run_id) == [1, 2, 3, 4, 5]
    assert client.get_run(run_id).info.status == "KILLED"
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == 1 and "tracking is behind run=run-1" in warnings[0], warnings
    assert "hunter2" not in warnings[0]


def test_what_is_written_while_a_batch_is_sent_comes_before_the_end(
    client: Any, run: RunDir, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipper = Shipper(client, **FAST)
    real = client.log_batch

    def end_meanwhile(run_id: str, metrics: list[Any]) -> None:
        real(run_id, metrics=metrics)
        if metrics[-1].step == 1:
            write(run, 2, 3)
            shipper.finish(run, "FINISHED")

    monkeypatch.setattr(client, "log_batch", end_meanwhile)
    write(run, 1)
    shipper.follow(run, run_id)
    wait_for(lambda: client.get_run(run_id).info.status == "FINISHED")
    assert shipper.close() == 0
    assert steps(client, run_id) == [1, 2, 3]


def test_a_broken_display_does_not_stop_the_shipping(
    client: Any, run: RunDir, run_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    shipper = Shipper(client, lambda *_: [][0], **FAST)
    shipper.follow(run, run_id)
    write(run, 1, 2)
    assert shipper.close() == 0
    assert steps(client, run_id) == [1, 2] and "list index out of range" in caplog.text


def test_close_says_in_time_what_is_missing(client: Any, run: RunDir, run_id: str) -> None:
    write(run, 1)
    assert ship(client, run, run_id) == 0
    failing = Failing(client, "log_batch", 10**6)
    shipper = Shipper(failing, poll_s=0.01, retry_s=(0.05, 1.0))  # type: ignore[arg-type]
    shipper.follow(run, run_id)
    write(run, 2, 3)
    wait_for(lambda: failing.left < 10**6)
    failing._method = "get_run"
    write(run, 4)
    shipper.finish(run, "FINISHED")
    start = time.monotonic()
    assert shipper.close(2) == 4  # three points and the final status
    assert not any(thread.name == "gsa-shipper" for thread in threading.enumerate())
    assert time.monotonic() - start < 5
    assert 10**6 - failing.left < 15  # it waits longer and longer, it does not hammer
    assert ship(client, run, run_id, "FINISHED") == 0  # the journal still had them
    assert steps(client, run_id) == [1, 2, 3, 4]


def test_close_does_not_wait_for_a_store_that_hangs(client: Any, run: RunDir, run_id: str) -> None:
    hangs, over = threading.Event(), threading.Event()

    class Hanging:
        def __getattr__(self, name: str) -> Any:
            hangs.set()
            return lambda *_, **__: over.wait(60)

    shipper = Shipper(Hanging(), **FAST)  # type: ignore[arg-type]
    write(run, 1)
    shipper.follow(run, run_id)
    assert hangs.wait(60)
    start = time.monotonic()
    assert shipper.close(0.1) >= 1
    assert time.monotonic() - start < 10
    over.set()


def test_one_broken_run_does_not_hold_up_the_others(
    client: Any, home: str, run: RunDir, tmp_path: Path
) -> None:
    gone = start_run(client, home, name="gone", key="gone", params={}, tags={})
    client.delete_run(gone)  # in MLflow's pages, while it runs
    good = start_run(client, home, name="good", key="good", params={}, tags={})
    (tmp_path / "run-2").mkdir()
    other = RunDir(tmp_path / "run-2")
    shipper = Shipper(client, **FAST)
    shipper.follow(run, gone)
    shipper.follow(other, good)
    write(run, 1)
    write(other, 1, 2)
    shipper.finish(other, "FINISHED")
    wait_for(lambda: client.get_run(good).info.status == "FINISHED")
    assert steps(client, good) == [1, 2]
    assert shipper.close(0.2) == 1


def test_many_runs_of_one_driver_are_all_shipped(client: Any, home: str, tmp_path: Path) -> None:
    shipper = Shipper(client, **FAST)
    runs = []
    for i in range(6):
        (tmp_path / f"trial-{i}").mkdir()
        run = RunDir(tmp_path / f"trial-{i}")
        run_id = start_run(client, home, name=run.name, key=run.name, params={"i": i}, tags={})
        shipper.follow(run, run_id)
        write(run, *range(1, i + 2))
        shipper.finish(run, "FAILED" if i == 3 else "FINISHED")
        runs.append(run_id)
    assert shipper.close() == 0
    assert [len(steps(client, run_id)) for run_id in runs] == [1, 2, 3, 4, 5, 6]
    assert Counter(client.get_run(r).info.status for r in runs) == {"FINISHED": 5, "FAILED": 1}


def test_importing_tracking_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys, pipeline.tracking; print([m for m in ('mlflow', 'torch', 'pandas') if m in sys.modules])"
    )
    out, err = python(code, cwd=tmp_path).communicate(timeout=60)
    assert (out, err) == ("[]\n", "")


# --- the server


def ask(
    port: int, path: str, *, host: str = "localhost", body: Any = None, **headers: str
) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        headers = {"Host": f"{host}:{port}", "Content-Type": "application/json", **headers}
        connection.request("POST" if body else "GET", path, json.dumps(body) if body else None, headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


@contextlib.contextmanager
def running(
    command: list[str], environment: dict[str, str], port: int, cwd: Path
) -> Iterator[psutil.Process]:
    log = cwd / "server.log"
    with open(log, "w") as output:
        server = psutil.Popen(command, env=environment, cwd=cwd, stdout=output, stderr=output)
    try:
        end = time.monotonic() + 120
        while True:
            assert server.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            with contextlib.suppress(OSError):
                if ask(port, "/health")[0] == 200:
                    break
            time.sleep(0.2)
        yield server
    finally:
        family = [server, *server.children(recursive=True)] if server.is_running() else []
        for process in family[:1]:
            process.send_signal(signal.SIGTERM)
        _, left = psutil.wait_procs(family, timeout=20)
        for process in left:
            process.kill()
    assert not left, left


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def listening(server: psutil.Process, port: int) -> set[str]:
    family = [server, *server.children(recursive=True)]
    return {
        c.laddr.ip
        for process in family
        for c in process.net_connections("tcp")
        if c.status == psutil.CONN_LISTEN and c.laddr.port == port
    }


def test_the_server_shows_runs_and_files_to_this_machine_alone(
    client: Any, home: str, store: tuple[str, Path], run: RunDir, run_id: str, tmp_path: Path
) -> None:
    run.config.write_text("seed: 7\n")
    tracking.log_files(client, run_id, [run.config])
    write(run, 1, 2)
    metrics.append(run.metrics, step=3, epoch=0, metrics={"train/loss": math.nan})
    port = free_port()
    command, environment = serve(*store, port=port)
    with running(command, environment, port, tmp_path) as server:
        assert listening(server, port) == {"127.0.0.1"}
        api = "/api/2.0/mlflow"
        status, text = ask(port, f"{api}/runs/search", body={"experiment_ids": [home]})
        assert status == 200 and run_id in text
        page = "/" + ui_url("127.0.0.1", port, home).split("/", 3)[3].split("#")[0]
        assert "<html" in ask(port, page)[1]
        assert ask(port, f"/get-artifact?path=config.yaml&run_uuid={run_id}") == (200, "seed: 7\n")
        for tunnel in ("localhost:8080", "127.0.0.1:1"):  # an SSH tunnel that ends at another port
            assert ask(port, f"{api}/runs/get?run_id={run_id}", Host=tunnel)[0] == 200
        for foreign in ("evil.example", "10.0.0.1", "localhost.evil.example"):
            assert ask(port, f"{api}/runs/get?run_id={run_id}", host=foreign)[0] == 403
        origin = {"Origin": "http://evil.example"}
        assert ask(port, f"{api}/runs/search", body={"experiment_ids": [home]}, **origin)[0] == 403
        remote = open_store(f"http://127.0.0.1:{port}", tmp_path)
        assert (
            start_run(remote, home, name="run-1", key=run_key(client, run_id), params={}, tags={}) == run_id
        )
        assert ship(remote, run, run_id, "FINISHED") == 0
        away = experiment(remote, "made through the server", tmp_path)
        other = start_run(remote, away, name="r", key="r", params={}, tags={})
        tracking.log_files(remote, other, [run.config])
    assert steps(client, run_id) == [1, 2, 3]
    assert client.get_run(run_id).info.status == "FINISHED"
    assert list(store[1].rglob(f"{other}/artifacts/config.yaml"))
    assert not any(tmp_path.glob("ml*")), "the server wrote where it stood"


def run_key(client: Any, run_id: str) -> str:
    return str(client.get_run(run_id).data.tags["gsa.key"])


@pytest.mark.parametrize("password", [None, "short"])
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "node001"])
def test_an_address_that_others_reach_needs_a_password(
    host: str, password: str | None, store: tuple[str, Path], client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_AUTH_ADMIN_PASSWORD", raising=False)
    if password:
        monkeypatch.setenv("MLFLOW_AUTH_ADMIN_PASSWORD", password)
    with pytest.raises(InputError, match="MLFLOW_AUTH_ADMIN_PASSWORD with 12 characters or more"):
        serve(*store, host=host)


def test_an_address_that_others_reach_needs_the_extra(
    store: tuple[str, Path], client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_AUTH_ADMIN_PASSWORD", "long enough for all")
    monkeypatch.setitem(sys.modules, "flask_wtf", None)
    with pytest.raises(InputError, match=r"pip install 'gsa-networks\[auth\]'"):
        serve(*store, host="0.0.0.0")


def test_a_server_for_others_asks_who_they_are(
    store: tuple[str, Path], client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("flask_wtf", reason="the extra `auth` is not installed")
    monkeypatch.setenv("MLFLOW_AUTH_ADMIN_PASSWORD", "long enough for all")
    monkeypatch.setenv("MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE", "true")  # must not reach the server
    port = free_port()
    command, environment = serve(*store, host="0.0.0.0", port=port)
    assert "--app-name" in command and "0.0.0.0" in command
    assert "long enough for all" not in " ".join(command)
    command[command.index("0.0.0.0")] = "127.0.0.1"  # a test opens nothing to others
    root = store[1].parent
    with running(command, environment, port, tmp_path) as server:
        assert listening(server, port) == {"127.0.0.1"}
        search = "/api/2.0/mlflow/experiments/search?max_results=1"
        assert ask(port, search)[0] == 401
        for word, expected in (("long enough for all", 200), ("wrong", 401)):
            secret = base64.b64encode(f"admin:{word}".encode()).decode()
            assert ask(port, search, Authorization=f"Basic {secret}")[0] == expected
        secret = base64.b64encode(b"admin:long enough for all").decode()
        assert ask(port, search, host="evil.example", Authorization=f"Basic {secret}")[0] == 403
        assert ask(port, search, host=socket.gethostname(), Authorization=f"Basic {secret}")[0] == 200
        own = f"http://{socket.gethostname()}:{port}"
        for origin, expected in ((own, 200), ("http://evil.example", 403)):
            headers = {"Authorization": f"Basic {secret}", "Origin": origin}
            assert ask(port, search.split("?")[0], body={"max_results": 1}, **headers)[0] == expected
    for name in ("mlflow_auth.db", "mlflow_auth.ini"):
        assert (root / name).stat().st_mode & 0o077 == 0
    assert "long enough" not in (root / "mlflow_auth.ini").read_text()
    assert not any(tmp_path.glob("*.db")), "the accounts lie where the server stood"


def test_a_server_is_not_served_again(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"http://host:5000 is a server already"):
        serve("http://host:5000", tmp_path)


def test_the_address_of_the_runs_table() -> None:
    path = "#/experiments/3/runs?workflowType=machine_learning"
    assert ui_url("127.0.0.1", 5000, "3") == f"http://127.0.0.1:5000/{path}"
    assert ui_url("::1", 5000, "3") == f"http://[::1]:5000/{path}"
    assert ui_url("0.0.0.0", 5000, "3") == f"http://{socket.gethostname()}:5000/{path}"


def test_system_facts_are_plain_strings() -> None:
    found = system_facts()
    assert all(isinstance(value, str) and value for value in found.values())
    assert found["mlflow"].startswith("3.") and int(found["cpus"]) >= 1 and float(found["memory_gib"]) > 0


def test_relative_databases_are_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert database_path("sqlite:///out/mlflow.db") == tmp_path / "out" / "mlflow.db"
    assert database_path("https://host") is None
