"""Ray of several nodes: workers, nodes and drivers that die or freeze, and the same bytes at the end."""

import contextlib
import inspect
import itertools
import json
import os
import random
import re
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ranks import MUTANTS, Ranks, assert_close, compute_in_float64, output, same_weights, series

from pipeline import metrics
from pipeline.plan import prepare
from pipeline.rundir import Out, RunDir

RAY = str(Path(sys.executable).with_name("ray"))
HEAD = 2  # the last number of its address: Ray takes 127.0.0.1 for the host's address on the network
EPOCHS, STEPS = 5, 3
CHANGED = {**MUTANTS, "double": compute_in_float64}  # workers that forget, or round otherwise
STEP_S = 0.15  # a step at least: else a run is over before the kill comes

# --- nodes -------------------------------------------------------------------------------------------------


class Nodes:
    """A Ray of several nodes on this machine, each with an address of its own; the head has no worker."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="gsa-nodes-"))
        token = self.folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        self.address = f"127.0.0.{HEAD}:{free_port()}"
        self.environment = {
            **without_ray(),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_TMPDIR": str(self.folder),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        }
        self.processes: dict[int, psutil.Process] = {}

    def start(self, workers: int) -> None:
        port = self.address.partition(":")[2]
        self._start(HEAD, "--head", f"--port={port}", "--num-cpus=0", "--dashboard-port=0")
        wait_for(lambda: answers(self.address), 60, "the head")
        for number in [self.add() for _ in range(workers)]:
            wait_for(lambda n=number: self._has_started(n), 60, f"node {number}")

    def add(self) -> int:
        """Another node, with a CPU; its number is the last of its address."""
        number = max(self.processes) + 1
        self._start(number, f"--address={self.address}", "--num-cpus=1")
        return number

    def kill(self, number: int) -> None:
        """SIGKILL for all that runs on a node."""
        process = self.processes.pop(number)
        for each in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait()

    def close(self) -> None:
        """End all, and see to it that nothing is left."""
        family = [c for p in self.processes.values() for c in (p, *p.children(recursive=True))]
        for number in list(self.processes):
            self.kill(number)
        left = psutil.wait_procs(family, timeout=20)[1]
        users = [
            p.pid for p in psutil.process_iter(["cmdline"]) if str(self.folder) in str(p.info["cmdline"])
        ]
        shutil.rmtree(self.folder, ignore_errors=True)
        assert not [p for p in left if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        assert not users

    def _has_started(self, number: int) -> bool:
        return "Ray runtime started" in (self.folder / f"node-{number}.txt").read_text()

    def _start(self, number: int, *options: str) -> None:
        with open(self.folder / f"node-{number}.txt", "w") as said:
            self.processes[number] = psutil.Popen(
                [
                    *(RAY, "start", "--block", "--disable-usage-stats"),
                    *(f"--node-ip-address=127.0.0.{number}", f"--temp-dir={self.folder}/{number}"),
                    *("--object-store-memory=80000000", "--min-worker-port=0", "--max-worker-port=0"),
                    *("--node-manager-port=0", "--object-manager-port=0", "--dashboard-agent-listen-port=0"),
                    *options,
                ],
                env=self.environment,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )


def without_ray() -> dict[str, str]:
    """The environment of a process that is to have nothing to do with the Ray of other tests."""
    return {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(address: str) -> bool:
    host, _, port = address.partition(":")
    try:
        socket.create_connection((host, int(port)), 1).close()
    except OSError:
        return False
    return True


def wait_for(true: Any, seconds: float, what: str) -> Any:
    until = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < until, f"waited {seconds} s for {what}"
        time.sleep(0.01)
    return found


# --- drivers -----------------------------------------------------------------------------------------------

# What runs in a process of its own: `fit`, whose workers take their time, and forget something if they shall.
DRIVER = "\n".join(
    [
        "import hashlib, json, logging, sys, time, torch",
        "from pathlib import Path",
        "from typing import Any",
        "from pipeline import batch_augment, checkpoint, data, metrics, ray_train, train",
        "from pipeline.config import InputError, Resources, TrainingFailed",
        "from pipeline.ray_session import session",
        "from pipeline.rundir import RunDir",
        *(inspect.getsource(mutant) for mutant in CHANGED.values()),
        "job = json.loads(sys.argv[1])",
        f"mutants = {{{', '.join(f'{k!r}: {m.__name__}' for k, m in CHANGED.items())}}}",
        "mutant = mutants.get(job['mutant'], lambda: None)",
        """
def work(settings):
    from pipeline import train
    real = train.train_step
    def step(state, batches, *args, **options):
        time.sleep(job["step_s"])
        digests = [hashlib.sha256(batch.images.numpy().tobytes()).hexdigest() for batch in batches]
        with open(Path(job["run"]) / "logs" / "batches.txt", "a") as file:
            file.write("".join(f"{state.step} {digest}\\n" for digest in digests))
        if state.step == job["hang_at"] and torch.distributed.get_rank() == 1:
            time.sleep(600)
        return real(state, batches, *args, **options)
    train.train_step, train.LOG_EVERY = step, 1
    mutant()
    return inner(settings)

logging.basicConfig(format="%(message)s")
inner, ray_train._work = ray_train._work, work
for name, value in job["set"].items():
    setattr(ray_train, name, value)
try:
    with session(cpus=3):
        print("joined", flush=True)
        ray_train.fit(RunDir(Path(job["run"])), Resources(**job["resources"]))
except (InputError, TrainingFailed) as error:
    print(type(error).__name__, error, flush=True)
    sys.exit(1)
""",
    ]
)


class Driver:
    """A process that trains a run on the nodes."""

    def __init__(
        self,
        nodes: Nodes,
        run: RunDir,
        *,
        workers: str = "2",
        cpus: int = 1,
        mutant: str | None = None,
        hang_at: int = -1,
        step_s: float = STEP_S,
        environment: dict[str, str] | None = None,
        **settings: Any,
    ) -> None:
        self.run, self.log = run, run.logs / "driver.txt"
        resources = {"workers": workers, "cpus_per_worker": cpus, "save_minutes": 0.0}
        job = {"run": str(run.path), "mutant": mutant, "hang_at": hang_at, "step_s": step_s}
        with open(self.log, "a") as said:
            self.process = psutil.Popen(
                [sys.executable, "-c", DRIVER, json.dumps({**job, "resources": resources, "set": settings})],
                env={**nodes.environment, "RAY_ADDRESS": nodes.address, **(environment or {})},
                stdout=said,
                stderr=said,
            )

    def __enter__(self) -> "Driver":
        return self

    def __exit__(self, *_: Any) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            self.process.kill()
        self.process.wait()

    def finish(self, code: int = 0) -> str:
        """What the process said, once it has ended as expected."""
        assert self.process.wait(240) == code, self.log.read_text()[-3000:]
        return self.log.read_text()

    def reach(self, step: int, seconds: float = 120) -> None:
        """Wait until this step is in the journal."""
        wait_for(lambda: steps(self.run) >= step or self.process.poll() is not None, seconds, f"step {step}")
        assert self.process.poll() is None, self.log.read_text()[-3000:]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def steps(run: RunDir) -> int:
    return max((r.step for r in metrics.read(run.metrics)), default=0)


def places(run: RunDir) -> list[tuple[int, str, int]]:
    """World, node and process of each rank, as it wrote down last."""
    found = []
    for log in sorted(run.logs.glob("rank*.log")):
        lines = re.findall(r"worker rank=\d+ world=(\d+) node=(\S+) pid=(\d+)", log.read_text())
        found.append((int(lines[-1][0]), lines[-1][1], int(lines[-1][2])))
    return found


def starts(run: RunDir) -> int:
    """How often rank 0 has begun."""
    return (run.logs / "rank0.log").read_text().count("worker rank=0")


def deaths(run: RunDir) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.logs / "deaths.jsonl").read_text().splitlines()]


# --- tests -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """A head and two nodes of one CPU each. A test that kills one adds another."""
    nodes = Nodes()
    try:
        nodes.start(2)
        yield nodes
    finally:
        nodes.close()


@pytest.fixture(scope="module")
def undisturbed(forks: Any, mini: Path, mini_config: Any, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run on two ranks that nothing disturbs, and without any Ray."""
    run = prepare(output(mini, tmp_path_factory.mktemp("undisturbed")), mini_config(epochs=EPOCHS))
    return Ranks(forks, run, 2).finish()


@pytest.fixture(scope="module")
def chained(
    nodes: Nodes, undisturbed: RunDir, mini: Path, mini_config: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunDir, RunDir]:
    """A run through a frozen worker, a lost node and a killed driver; and as the last of these left it."""
    rng = random.Random(5)
    root = tmp_path_factory.mktemp("chained")
    run = prepare(output(mini, root), mini_config(epochs=EPOCHS))
    settings = {"RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "5"}
    with Driver(nodes, run, environment=settings) as driver:
        driver.reach(rng.randint(1, 4))
        assert {node for _, node, _ in places(run)} == {"127.0.0.3", "127.0.0.4"}
        frozen = psutil.Process(places(run)[rng.randrange(2)][2])
        frozen.suspend()
        wait_for(lambda: starts(run) == 2, 120, "a new start after the freeze")
        assert not frozen.is_running() or frozen.status() == psutil.STATUS_ZOMBIE
        driver.reach(rng.randint(5, 8))
        rank = rng.randrange(2)
        node = places(run)[rank][1]
        nodes.kill(int(node.rpartition(".")[2]))
        nodes.add()
        (run.logs / "lost.txt").write_text(f"{rank} {node}")
        wait_for(lambda: starts(run) == 3, 120, "a new start after the loss of a node")
        driver.reach(rng.randint(9, 11))
        driver.kill()
    # Its workers die within seconds. Who copies meanwhile copies files that come and go.
    wait_for(lambda: not any(psutil.pid_exists(pid) for _, _, pid in places(run)), 60, "the workers' end")
    left = RunDir(shutil.copytree(run.path, root / "left"))
    for file in (run.path / "ray").rglob("*"):  # what Ray keeps: half of it gone, the rest cut
        if file.is_file():
            file.write_bytes(b"") if rng.random() < 0.5 else file.unlink()
    with Driver(nodes, run) as driver:
        driver.finish()
    return run, left


def test_a_run_through_freeze_node_loss_and_driver_death_ends_as_if_undisturbed(
    undisturbed: RunDir, chained: tuple[RunDir, RunDir]
) -> None:
    run, _ = chained
    assert same_weights(run, undisturbed)
    assert series(run) == series(undisturbed)
    assert series(run)[-1][0] == EPOCHS * STEPS
    frozen, *lost = deaths(run)
    assert frozen["cause"].startswith("it did not answer")
    assert "died" in lost[0]["cause"]
    assert f"{lost[0]['rank']} {lost[0]['node']}" == (run.logs / "lost.txt").read_text()
    assert not (run.path / "ray").exists()


@pytest.mark.parametrize("mutant", [None, "optimizer"])
def test_workers_that_forget_something_would_be_seen(
    mutant: str | None, forks: Any, undisturbed: RunDir, chained: tuple[RunDir, RunDir], tmp_path: Path
) -> None:
    """The proof that the test above can fail: what the killed driver left, continued by broken workers."""
    run = RunDir(shutil.copytree(chained[1].path, tmp_path / "copy"))
    Ranks(forks, run, 2, mutant=mutant).finish()
    assert same_weights(run, undisturbed) is (mutant is None)
    assert (series(run) == series(undisturbed)) is (mutant is None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "1 workers with 2 CPUs each: the 3 nodes of the Ray cluster have room for 0"),
        ({"RAY_AUTH_TOKEN_PATH": "/dev/null"}, "cannot join that Ray: "),
        (
            {"RAY_ADDRESS": "127.0.0.1:1"},
            "cannot join that Ray: [Errno 111] Connection refused; next: the addr",
        ),
        ({"RAY_ADDRESS": "auto"}, "RAY_ADDRESS=auto: expected HOST:PORT of a head"),
    ],
    ids=["room", "token", "address", "auto"],
)
def test_a_cluster_that_cannot_be_used_is_told_in_one_line(
    changes: dict[str, str], said: str, nodes: Nodes, out: Any, mini_config: Any
) -> None:
    with Driver(nodes, prepare(out, mini_config()), workers="1", cpus=2, environment=changes) as driver:
        printed = driver.finish(1)
    assert f"InputError {'' if not changes else 'RAY_ADDRESS='}" in printed
    assert said in printed
    assert "Traceback" not in printed


@pytest.mark.slow
@pytest.mark.parametrize("mutant", ["optimizer", "journal"])
def test_workers_under_ray_that_forget_something_would_be_seen(
    mutant: str, nodes: Nodes, undisturbed: RunDir, chained: tuple[RunDir, RunDir], tmp_path: Path
) -> None:
    run = RunDir(shutil.copytree(chained[1].path, tmp_path / "copy"))
    with Driver(nodes, run, mutant=mutant) as driver:
        driver.reach(11)
        os.kill(places(run)[1][2], signal.SIGKILL)  # else the journal's end was on the disk
        driver.finish()
    same = same_weights(run, undisturbed), series(run) == series(undisturbed)
    assert same == ((True, False) if mutant == "journal" else (False, False))


# --- longer ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_hang_becomes_an_error_that_names_the_rank(nodes: Nodes, out: Any, mini_config: Any) -> None:
    run = prepare(out, mini_config(epochs=EPOCHS))
    with Driver(nodes, run, hang_at=4, HANG_S=8, RESTARTS=0) as driver:
        printed = driver.finish(1)
    assert [death["rank"] for death in deaths(run)] == [1, 1]  # of two starts, maybe on two nodes
    assert all(f"rank 1 on {death['node']} " in printed for death in deaths(run))
    assert (
        f"TrainingFailed run {run.name}: training failed at checkpoint step-000000004 after the death of "
        in printed
    )
    assert "; the last, of rank 1: it hung: the others waited 8 s for it; log: " in printed
    assert str(run.logs / "rank1.log") in printed
    assert "Traceback" not in printed


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_twenty_kills_at_random_moments_change_nothing(
    nodes: Nodes, forks: Any, out: Out, mini: Path, mini_config: Any, tmp_path: Path
) -> None:
    config, rng = mini_config(epochs=80), random.Random(20)
    calm = Ranks(forks, prepare(output(mini, tmp_path / "calm"), config), 2).finish()
    kinds = ["KILL"] * 8 + ["SEGV"] * 4 + ["STOP"] * 2 + ["node"] * 3 + ["driver"] * 3
    run, lost = prepare(out, config), []
    settings = {"RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "10"}
    with contextlib.ExitStack() as drivers:
        driver = drivers.enter_context(Driver(nodes, run, environment=settings))
        driver.reach(1)
        for kind in rng.sample(kinds, len(kinds)):
            time.sleep(rng.uniform(0, 3))
            rank, before, begun, killed = rng.randrange(2), steps(run), starts(run), time.monotonic()
            if kind == "driver":
                driver.kill()
                driver = drivers.enter_context(Driver(nodes, run, environment=settings))
            elif kind == "node":
                nodes.kill(int(places(run)[rank][1].rpartition(".")[2]))
                nodes.add()
            else:
                os.kill(places(run)[rank][2], getattr(signal, f"SIG{kind}"))
            wait_for(lambda begun=begun: starts(run) > begun, 120, f"a new start after {kind}")
            driver.reach(before + 1)
            lost.append((round(time.monotonic() - killed, 1), kind))
        driver.finish()
    print(f"kills={len(lost)} starts={starts(run)} seconds to the next new step: {sorted(lost)}")
    assert starts(run) > len(kinds)
    assert same_weights(run, calm)
    assert series(run) == series(calm)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_node_that_leaves_and_comes_back_changes_no_batch(
    nodes: Nodes, out: Out, mini: Path, mini_config: Any, tmp_path: Path
) -> None:
    """One worker goes on where two were, and two again: the same samples in each step, the same loss.

    In float64 and at a low learning rate: batch norm over four samples magnifies rounding, at lr 0.1 to 1e-2
    after twelve steps.
    """
    config = mini_config(epochs=24, lr=0.001)
    constant, elastic = prepare(output(mini, tmp_path / "constant"), config), prepare(out, config)
    with Driver(nodes, constant, mutant="double", step_s=0.0) as driver:
        driver.finish()
    settings = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10"}
    elastic_job = {"workers": "1..2", "mutant": "double", "environment": settings, "RESIZE_EVERY_S": 3.0}
    elastic_job["step_s"] = 0.5  # the node is back before the run is over
    with Driver(nodes, elastic, **elastic_job) as driver:
        driver.reach(
            2, seconds=240
        )  # Ray has been seen to take two minutes to count the nodes that are there
        nodes.kill(int(places(elastic)[1][1].rpartition(".")[2]))
        wait_for(lambda: worlds(elastic) == [2, 1], 120, "a start with one worker")
        nodes.add()
        wait_for(lambda: worlds(elastic) == [2, 1, 2], 120, "a start with two workers")
        driver.finish()
    assert batches(elastic) == batches(constant)
    assert len(batches(constant)) == 24 * STEPS
    assert_close(constant, elastic)


def worlds(run: RunDir) -> list[int]:
    """The number of workers of each start, in turn."""
    found = re.findall(r"worker rank=0 world=(\d+)", (run.logs / "rank0.log").read_text())
    return [int(world) for world, _ in itertools.groupby(found)]


def batches(run: RunDir) -> dict[int, set[str]]:
    """The micro-batches of each step, as hashes of their pictures, from all ranks and all starts."""
    found: dict[int, set[str]] = {}
    for line in (run.logs / "batches.txt").read_text().splitlines():
        step, digest = line.split()
        found.setdefault(int(step), set()).add(digest)
    return found
