"""train() under Ray Train: workers, their reports and restarts."""

import contextlib
import faulthandler
import json
import logging
import os
import re
import shutil
import signal
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import HANG_S, Config, InputError, Preempted, Resources, TrainingFailed
from pipeline.rundir import RunDir, hold, read_json

RESTARTS = 3  # of the workers, after the death of one, without a newer checkpoint in between
PLACINGS = 30  # times a minute without room for the workers: a node that is lost may come back
RESIZE_EVERY_S = 60.0  # of an elastic run: a look whether there is room for more workers
STOPPED = "stopped"
ASK_EVERY_S = 0.5  # whether the run shall stop: a look at a file, which may be on another machine

BROKEN = re.compile("gloo|nccl|connection", re.IGNORECASE)  # in what a rank says whose partner has died

log = logging.getLogger("gsa")


def fit(
    run: RunDir, resources: Resources, callbacks: Sequence[Any] = (), *, chaos_s: float | None = None
) -> dict[str, float]:
    """Train a prepared run on Ray workers, from its newest checkpoint; returns its final metrics.

    Needs `ray_session.session`. The death of a worker or of its node restarts all of them from the newest
    checkpoint: at most RESTARTS times without a newer one, else as often as need be.
    chaos_s: mean seconds after which some worker kills itself, again and again (`gsa train --chaos`).
    Raises InputError (what the user can mend, also when a worker met it), Preempted (after SIGTERM or SIGUSR2,
    with a checkpoint of that moment), TrainingFailed.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    if run.result.exists():
        return dict(read_json(run.result)["metrics"])
    low, high = resources.span
    gpus = resources.gpus_per_worker
    per_worker = {"CPU": resources.cpus_per_worker, **({"GPU": gpus} if gpus else {})}
    check_room(resources)
    storage = run.path / "ray"

    def trainer() -> Any:
        # A new name each time: we restore from our own verified checkpoints, never from Ray's record.
        name = f"{run.name}-{uuid.uuid4().hex[:8]}"
        return TorchTrainer(
            _work,  # type: ignore[arg-type]
            train_loop_config={
                "run": str(run.path),
                "claim": str(storage / name),
                "loader_threads": loader_threads(resources),
                "save_every_s": 60 * resources.save_minutes,
                "profile": resources.profile,
                "chaos_s": chaos_s,
            },
            scaling_config=ScalingConfig(  # type: ignore[call-arg]
                num_workers=low if low == high else (low, high),  # type: ignore[arg-type]
                use_gpu=gpus > 0,
                resources_per_worker=per_worker,
                elastic_resize_monitor_interval_s=RESIZE_EVERY_S,
            ),
            run_config=RunConfig(
                name=name,
                storage_path=str(storage),
                failure_config=FailureConfig(  # type: ignore[call-arg]
                    max_failures=-1 if chaos_s else RESTARTS,
                    max_preemption_failures=-1,
                    controller_failure_limit=PLACINGS,
                ),
                callbacks=[*callbacks, _death_log(run, HANG_S)],
            ),
            torch_config=TorchConfig(backend="nccl" if gpus else "gloo", timeout_s=HANG_S),
        )

    with hold(run.lock, f"run {run.name}"):
        shutil.rmtree(storage, ignore_errors=True)  # of a driver that was killed
        run.stop.unlink(missing_ok=True)
        try:
            with _interruptible(), _stoppable(run):
                ended = _persist(run, trainer)
        finally:
            shutil.rmtree(storage, ignore_errors=True)
    if ended:
        kind, said = ended
        raise (Preempted if kind == STOPPED else InputError)(f"run {run.name}: {said}")
    return dict(read_json(run.result)["metrics"])


def fit_micro_batch(config: Config, classes: int, resources: Resources) -> Config:
    """The config with the largest micro-batch that fits, tried out on one GPU. Needs `ray_session.session`."""
    import ray
    import torch

    from pipeline.memory import fitted

    if not resources.gpus_per_worker:
        raise InputError(
            "a micro-batch is found on a GPU; next: --gpus-per-worker 1, or state optim.micro_batch"
        )
    check_room(resources)
    on_gpu: Any = ray.remote(num_gpus=resources.gpus_per_worker, num_cpus=resources.cpus_per_worker)
    world, device = resources.span[1], torch.device("cuda")
    found: Config = ray.get(on_gpu(fitted).remote(config, classes, world=world, device=device))
    return found


def loader_threads(resources: Resources) -> int:
    """One CPU of a worker trains, the others read; beside a GPU one reads at least."""
    return max(resources.cpus_per_worker - 1, 1 if resources.gpus_per_worker else 0)


def check_room(resources: Resources, trials: int = 1) -> None:
    """Refuse what the Ray cluster does not have: it would be waited for. InputError.

    trials: at a time, of a sweep; each has a process of its own beside its workers.
    """
    import ray

    low, high = resources.span
    if trials > 1 and low < high:
        raise InputError(
            f"workers {resources.workers} and {trials} trials at a time: the first would take all there is; "
            f"next: --workers {high}, or --concurrent 1"
        )
    workers = low * trials
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    wanted = {"GPU": resources.gpus_per_worker, "CPU": float(resources.cpus_per_worker)}
    wanted = {kind: each for kind, each in wanted.items() if each}
    for kind, each in wanted.items():
        have = sum(node.get(kind, 0) for node in nodes)
        if workers * each > have:
            raise InputError(
                f"{workers} workers with {each:g} {kind}s each: the Ray cluster has {have:g}; "
                f"next: fewer workers, or fewer {kind}s a worker"
            )
    room = sum(min(int(node.get(kind, 0) / each) for kind, each in wanted.items()) for node in nodes)
    if room < workers:  # a worker is on one node
        each_wanted = " and ".join(f"{each:g} {kind}s" for kind, each in wanted.items())
        raise InputError(
            f"{workers} workers with {each_wanted} each: the {len(nodes)} nodes of the Ray cluster have room "
            f"for {room}; next: fewer workers, or less for each"
        )


def _persist(run: RunDir, trainer: Callable[[], Any]) -> tuple[str, str] | None:
    """What the workers return. A Ray run that has failed is followed by another if it got any further."""
    import ray.exceptions
    from ray.train import TrainingFailedError

    started = time.time()
    while True:
        before = _newest(run)
        try:
            ended: tuple[str, str] | None = trainer().fit().return_value
            return ended
        except (TrainingFailedError, ray.exceptions.RayActorError) as error:  # the latter: Ray's controller
            if mendable := _mendable(error):
                raise mendable from None
            if _newest(run) == before:
                raise TrainingFailed(_told(run, error, since=started)) from None
            reason, _ = _reason(run, error, since=started)
            log.warning("ray run lost, another follows run=%s newest=%s: %s", run.name, before, reason)


def _newest(run: RunDir) -> str:
    """The name of the newest checkpoint."""
    return max((path.name for path in run.checkpoints.glob("step-*")), default="none")


def _told(run: RunDir, error: Any, *, since: float) -> str:
    """Why training has failed, in one message."""
    reason, rank = _reason(run, error, since=since)
    head = f"run {run.name}: training failed at checkpoint {_newest(run)}"
    if rank is None:
        return (
            f"{head}: {reason}; logs: {run.logs}; "
            "next: the same command continues once the cluster has room for its workers"
        )
    log_file = run.logs / _log_name(rank)
    return f"{head} {reason}; log: {log_file}; next: see its end; the same command continues"


def _reason(run: RunDir, error: Any, *, since: float) -> tuple[str, int | None]:
    """One line on why a Ray run has ended, and the rank that died last, if one did."""
    deaths = [death for death in _deaths(run) if death["time"] >= since]
    if not deaths:
        said = str(getattr(error, "controller_failure", error)).strip()
        return (said.splitlines()[0] if said else type(error).__name__), None
    times = Counter(f"rank {death['rank']} on {death['node']}" for death in deaths)
    who = ", ".join(f"{name} {n} time{'s' if n > 1 else ''}" for name, n in times.most_common())
    last = deaths[-1]
    return f"after the death of {who}; the last, of rank {last['rank']}: {last['cause']}", last["rank"]


# --- deaths ------------------------------------------------------------------------------------------------


def _deaths(run: RunDir) -> list[dict[str, Any]]:
    path = run.logs / "deaths.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _death_log(run: RunDir, hang_s: int) -> Any:
    """What Ray's controller calls when workers have died: it writes down who, where, and why."""
    from ray.train import UserCallback

    class DeathLog(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            for error in worker_exceptions.values():
                if mendable := _mendable_one(error):
                    raise mendable  # no restart mends it: this ends the run at once
            with open(run.logs / "deaths.jsonl", "a") as file:
                for death in _blamed(run, worker_exceptions, hang_s):
                    file.write(json.dumps({"time": time.time(), **death}) + "\n")

    return DeathLog()


def _blamed(run: RunDir, errors: dict[int, Any], hang_s: int) -> list[dict[str, Any]]:
    """Rank, node and cause of each death. One death breaks the others' calls too: those are not told."""
    world = max(_place(run, min(errors))[1], max(errors) + 1)
    causes = {rank: _cause(error) for rank, error in errors.items()}
    dead = [rank for rank, error in errors.items() if "HealthCheck" in type(error).__name__]
    dead = dead or [rank for rank, error in errors.items() if not BROKEN.search(str(error))]
    if not dead:  # all that are heard of were broken off by another
        dead = [rank for rank in range(world) if rank not in errors]
        hung = any("timed out" in str(error).lower() for error in errors.values())
        cause = f"it hung: the others waited {hang_s} s for it" if hung else "the others lost it: it died"
        causes |= dict.fromkeys(dead, cause)
    return [{"rank": r, "node": _place(run, r)[0], "cause": causes[r]} for r in dead or errors]


def _cause(error: Any) -> str:
    text, name = str(error).strip(), type(error).__name__
    if name == "WorkerHealthCheckTimeoutError":
        return "it did not answer: frozen, or cut off from the network"
    if name == "WorkerHealthCheckFailedError":
        node = re.search(r"node (has )?died|node.*(was|is) (dead|terminated)", text)
        return "its node died" if node else "its process died: killed, out of memory, or crashed"
    return f"{name}: {text.splitlines()[0][:200] if text else ''}"


def _place(run: RunDir, rank: int) -> tuple[str, int]:
    """The node of a rank and the size of its world, as it said last."""
    path = run.logs / _log_name(rank)
    found = re.findall(r"worker rank=\d+ world=(\d+) node=(\S+)", path.read_text()) if path.exists() else []
    return (found[-1][1], int(found[-1][0])) if found else ("?", 0)


def _log_name(rank: int) -> str:
    return f"rank{rank}.log"


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C is a KeyboardInterrupt: Ray's own handler for it ends the process with 0, as if all were done."""
    if threading.current_thread() is not threading.main_thread():  # in a trial of Tune: Ray leaves it alone
        yield
        return
    ours = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, ours)


@contextlib.contextmanager
def _stoppable(run: RunDir) -> Iterator[None]:
    """SIGTERM and SIGUSR2 ask the workers to save and to end; a second one interrupts.

    By a file, since the workers may be on other machines, and Ray ends a worker that gets a signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(*_: Any) -> None:
        if run.stop.exists():
            raise KeyboardInterrupt
        run.stop.touch()

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGUSR2)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        run.stop.unlink(missing_ok=True)


def _work(settings: dict[str, Any]) -> tuple[str, str] | None:
    """What each worker runs; returns why every rank has ended early, where no restart would mend it."""
    import ray
    import ray.train

    from pipeline.train import TooManyBad, train

    run, context = RunDir(Path(settings["run"])), ray.train.get_context()
    rank, asked = context.get_world_rank(), time.monotonic()
    node = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    if not run.facts.exists():
        raise InputError(f"{run.path} is not there on node {node}; next: --out on a file system of all nodes")

    def stop() -> bool:
        nonlocal asked
        if rank or time.monotonic() - asked < ASK_EVERY_S:
            return False
        asked = time.monotonic()
        if not os.path.exists(settings["claim"]):  # the driver was killed, and its successor has begun
            os._exit(1)
        return run.stop.exists()

    with rank_log(run, rank):
        log.info(
            "worker rank=%d world=%d node=%s pid=%d",
            *(rank, context.get_world_size(), node, os.getpid()),
        )
        if settings["chaos_s"]:
            from pipeline.chaos import die_at_random

            die_at_random(run, rank, settings["chaos_s"] * context.get_world_size())
        try:
            train(
                run,
                report=lambda metrics: ray.train.report(dict(metrics)),
                loader_threads=settings["loader_threads"],
                save_every_s=settings["save_every_s"],
                profile=settings["profile"],
                stop=stop,
            )
        except Preempted as error:
            return STOPPED, str(error)
        except (FloatingPointError, TooManyBad) as error:
            return "failed", str(error)
        except Exception:
            log.exception("worker failed rank=%d", rank)
            raise
    return None


@contextlib.contextmanager
def rank_log(run: RunDir, rank: int) -> Iterator[None]:
    """What a rank says goes to a file of the run, and the stack of a crash in C too."""
    handler = logging.FileHandler(run.logs / _log_name(rank))
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    assert handler.stream
    faulthandler.enable(handler.stream)
    try:
        yield
    finally:
        faulthandler.disable()
        log.setLevel(level)
        log.removeHandler(handler)
        handler.close()


def _mendable(error: Any) -> InputError | None:
    """The worker's fault that the user can mend, if that is what ended the training."""
    failures = [*getattr(error, "worker_failures", {}).values(), getattr(error, "controller_failure", None)]
    return next((found for failure in failures if (found := _mendable_one(failure))), None)


def _mendable_one(failure: Any) -> InputError | None:
    cause = getattr(failure, "cause", failure)
    if not isinstance(cause, InputError):
        return None
    return InputError(str(cause).splitlines()[-1] if str(cause) else repr(cause))
