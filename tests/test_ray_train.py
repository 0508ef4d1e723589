"""Ray: private and on loopback, workers that die and come back."""

import http.client
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from pipeline import checkpoint, ray_train
from pipeline.config import InputError, Resources, TrainingFailed
from pipeline.manifest import read_manifest
from pipeline.metrics import epoch_records
from pipeline.plan import prepare
from pipeline.ray_train import fit, loader_threads
from pipeline.rundir import Out, RunDir, read_json

TWO = Resources(workers="2")


def listening() -> list[tuple[str, int]]:
    """Address and port of every socket on which this process or a descendant listens."""
    me = psutil.Process()
    found = []
    for process in [me, *me.children(recursive=True)]:
        try:
            found += [tuple(c.laddr) for c in process.net_connections("inet") if c.status == "LISTEN"]
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def test_every_socket_is_on_loopback(ray: None) -> None:
    sockets = listening()
    assert len(sockets) > 5
    assert {host for host, _ in sockets} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_no_request_without_the_token_is_answered(ray: None) -> None:
    """Ports that speak HTTP refuse to list or to run anything."""
    refused = 0
    for _, port in listening():
        for path, body in (("/api/version", None), ("/api/jobs/", b'{"entrypoint": "true"}')):
            request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data=body)
            request.add_header("Content-Type", "application/json")
            try:
                with urllib.request.urlopen(request, timeout=5) as answer:
                    assert path == "/api/version", f"port {port} answered {path}: {answer.read()[:80]!r}"
            except urllib.error.HTTPError as error:
                refused += error.code in (401, 403) and path == "/api/jobs/"
            except (OSError, http.client.HTTPException):
                continue  # not HTTP
    assert refused, "no dashboard was found"


def test_who_has_no_token_cannot_reach_the_cluster(ray: None) -> None:
    import ray as library

    address = library.get_runtime_context().gcs_address
    code = f"from ray._raylet import GcsClient; print(GcsClient(address={address!r}).cluster_id)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=without_ray(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0, done.stdout
    assert "AuthenticationError" in done.stderr


def without_ray() -> dict[str, str]:
    """The environment of a process that is to have nothing to do with the Ray of these tests."""
    return {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}


def test_the_private_folder_is_private(ray: None) -> None:
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert stat.S_IMODE(token.parent.stat().st_mode) == 0o700
    assert not (Path.home() / ".ray").exists()


def test_two_workers_train_and_report(ray: None, out: Out, mini_config) -> None:
    run = prepare(out, mini_config())
    metrics = fit(run, TWO)
    assert metrics == read_json(run.result)["metrics"]
    assert [r.epoch for r in epoch_records(run)] == [1, 2]
    assert metrics["val/count"] == 18
    assert not (run.path / "ray").exists()


def test_a_complete_run_is_not_trained_again(out: Out, mini_config) -> None:
    run = prepare(out, mini_config(seed=3))
    run.result.write_text(json.dumps({"metrics": {"val/top1": 1.0}}))
    assert fit(run, TWO) == {"val/top1": 1.0}  # without any Ray


def test_too_many_bad_samples_end_a_run_without_a_restart(
    ray: None, mini: Path, out: Out, tmp_path: Path, mini_config
) -> None:
    """No restart would mend them."""
    folder = shutil.copytree(mini, out.root / "shards" / "damaged")
    samples = read_manifest(folder).split("train")
    content = bytearray((folder / "train-000000.tar").read_bytes())
    for i in range(0, 54, 9):
        content[int(samples.offset[i]) + 60] ^= 4
    (folder / "train-000000.tar").write_bytes(content)
    run = prepare(out, mini_config(shards="damaged", max_bad=0.01))
    with pytest.raises(
        InputError, match=r"\d of 54 train samples could not be read by step 3; data.max_bad 0.01"
    ):
        fit(run, TWO)
    assert (run.logs / "rank0.log").read_text().count("start step=") == 1


@pytest.mark.parametrize(("cpus", "gpus", "threads"), [(1, 0, 0), (4, 0, 3), (1, 1, 1), (8, 1, 7)])
def test_a_worker_beside_a_gpu_reads_ahead(cpus: int, gpus: float, threads: int) -> None:
    assert loader_threads(Resources(cpus_per_worker=cpus, gpus_per_worker=gpus)) == threads


def test_a_killed_worker_changes_nothing(ray: None, out: Out, mini_config) -> None:
    """SIGKILL of a worker in mid-run: the run goes on from its checkpoint to the same bytes."""
    undisturbed = prepare(out, mini_config(seed=7, epochs=6))
    fit(undisturbed, TWO)
    other = Out(out.root / "other")
    (other.root / "shards").mkdir(parents=True)
    (other.root / "shards" / "mini").symlink_to(out.shards("mini"))
    killed = prepare(other, mini_config(seed=7, epochs=6))
    killer = subprocess.Popen([sys.executable, "-c", KILLER, str(killed.metrics), str(os.getpid())])
    fit(killed, TWO)
    assert killer.wait(60) == 0, "no worker was killed"
    assert weights(killed) == weights(undisturbed)
    assert series(killed) == series(undisturbed)


KILLER = """
import pathlib, psutil, sys, time
journal, driver = pathlib.Path(sys.argv[1]), psutil.Process(int(sys.argv[2]))
while not (journal.exists() and journal.read_text().count("\\n") >= 2):
    time.sleep(0.05)
for child in driver.children(recursive=True):
    try:
        busy = child.cmdline()[0].startswith("ray::") and "TrainWorker" in child.cmdline()[0]
    except (psutil.Error, IndexError):
        continue
    if busy:
        child.kill()
        sys.exit(0)
sys.exit(1)
"""


def test_a_fault_that_no_restart_mends_ends_the_run_at_once(ray: None, out: Out, mini_config) -> None:
    run = prepare(out, mini_config(seed=17))
    run.checkpoints.write_text("not a folder")
    with pytest.raises(InputError, match=r"checkpoints: cannot be read: .*Not a directory"):
        fit(run, TWO)
    assert (run.logs / "rank0.log").read_text().count("worker rank=0") == 1


def test_a_run_that_fails_again_and_again_is_told_in_one_message(
    ray: None, out: Out, mini_config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who failed how often, where the log is, what to do; and the log has the traceback."""
    monkeypatch.setattr(ray_train, "RESTARTS", 1)
    run = prepare(out, mini_config(seed=19))
    run.metrics.mkdir()
    with pytest.raises(TrainingFailed) as caught:
        fit(run, TWO)
    log = run.logs / "rank0.log"
    assert str(caught.value) == (
        f"run {run.name}: training failed at checkpoint none after the death of rank 0 on 127.0.0.1 2 times; the "
        f"last, of rank 0: IsADirectoryError: [Errno 21] Is a directory: '{run.metrics}'; "
        f"log: {log}; next: see its end; the same command continues"
    )
    assert log.read_text().count("worker rank=0") == log.read_text().count("Traceback") == 2


def test_a_run_that_gets_further_between_its_deaths_is_never_given_up(
    out: Out, mini_config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's own count has no end but RESTARTS: another Ray run follows, until there is no newer checkpoint."""
    from ray.train import WorkerGroupError

    run, tried = prepare(out, mini_config()), []

    def trainer() -> Any:
        tried.append(1)
        if len(tried) < 4:
            (run.checkpoints / f"step-{len(tried):09d}").mkdir(parents=True)
        return SimpleNamespace(fit=fail)

    def fail() -> None:
        raise WorkerGroupError("lost", {0: RuntimeError("lost")})

    with pytest.raises(TrainingFailed, match="training failed at checkpoint step-000000003: "):
        ray_train._persist(run, trainer)
    assert len(tried) == 4


class WorkerHealthCheckFailedError(Exception):
    """As Ray's is called."""


class WorkerHealthCheckTimeoutError(Exception):
    """As Ray's is called."""


GLOO = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1")


@pytest.mark.parametrize(
    ("errors", "blamed"),
    [
        ({0: GLOO, 1: WorkerHealthCheckFailedError("x")}, {1: "its process died: killed, out of memory"}),
        ({1: WorkerHealthCheckFailedError("The node has died")}, {1: "its node died"}),
        ({1: WorkerHealthCheckTimeoutError("x")}, {1: "it did not answer: frozen"}),
        ({0: GLOO, 2: GLOO}, {1: "the others lost it"}),
        ({0: RuntimeError("gloo: Timed out waiting 600000ms")}, {1: "it hung: the others waited 600 s"}),
        ({0: GLOO, 1: MemoryError("too much\nof it"), 2: GLOO}, {1: "MemoryError: too much"}),
    ],
)
def test_who_died_is_blamed_and_not_who_noticed(
    errors: dict[int, Exception], blamed: dict[int, str], tmp_path: Path
) -> None:
    run = RunDir(tmp_path)
    run.logs.mkdir()
    world = max(2, len(errors) + (2 in errors and 1 not in errors))
    for rank in range(world):
        (run.logs / f"rank{rank}.log").write_text(
            f"worker rank={rank} world={world} node=10.0.0.{rank} pid=1\n"
        )
    found = ray_train._blamed(run, errors, 600)
    assert {death["rank"]: death["node"] for death in found} == {rank: f"10.0.0.{rank}" for rank in blamed}
    for death in found:
        assert death["cause"].startswith(blamed[death["rank"]])


def weights(run) -> dict[str, object]:
    """The last weights, as values that compare by every bit."""
    state = checkpoint.newest(run.checkpoints)
    return {name: tensor.numpy().tobytes() for name, tensor in state["model"].items()}


def series(run) -> list[tuple[int, dict[str, float]]]:
    records = epoch_records(run)
    return [(r.step, {k: v for k, v in r.metrics.items() if not k.startswith("perf/")}) for r in records]


def test_what_the_cluster_does_not_have_is_refused(ray: None, out: Out, mini_config) -> None:
    run = prepare(out, mini_config(seed=13))
    for resources, said in (
        (Resources(workers="2", gpus_per_worker=1), "2 workers with 1 GPUs each: the Ray cluster has 0"),
        (Resources(workers="2", cpus_per_worker=64), "2 workers with 64 CPUs each: the Ray cluster has 5"),
    ):
        with pytest.raises(InputError, match=said):
            fit(run, resources)


DRIVER = """
import sys
from pathlib import Path
from pipeline.config import Resources
from pipeline.ray_session import session
from pipeline.ray_train import fit
from pipeline.rundir import RunDir
with session(cpus=3):
    print("up", flush=True)
    fit(RunDir(Path(sys.argv[1])), Resources(workers="2"))
"""


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL], ids=["SIGINT", "SIGKILL"])
def test_a_driver_that_ends_leaves_nothing_running(kill: signal.Signals, out: Out, mini_config) -> None:
    run = prepare(out, mini_config(seed=5, epochs=500))
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(run.path)],
        env=without_ray(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert driver.stdout and driver.stdout.readline() == b"up\n"
        family = psutil.Process(driver.pid).children(recursive=True)
        assert len(family) > 5
        until = time.monotonic() + 90
        while not epoch_records(run) and time.monotonic() < until:
            time.sleep(0.2)
        assert epoch_records(run), "training did not start"
        family = {*family, *psutil.Process(driver.pid).children(recursive=True)}
        driver.send_signal(kill)
        assert driver.wait(60) != 0
    finally:
        driver.kill()
        driver.communicate()
    _, alive = psutil.wait_procs(family, timeout=30)
    alive = [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert not alive, alive
