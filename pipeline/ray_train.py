"""train() under Ray Train: workers, their reports and restarts."""

import contextlib
import logging
import shutil
import signal
import threading
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import InputError, Resources
from pipeline.rundir import RunDir, hold, read_json

RESTARTS = 3  # of the worker group, after the death of a worker


def fit(run: RunDir, resources: Resources, callbacks: Sequence[Any] = ()) -> dict[str, float]:
    """Train a prepared run on Ray workers, from its newest checkpoint; returns its final metrics.

    Needs `ray_session.session`. The death of a worker restarts all of them from the newest checkpoint, at
    most RESTARTS times.
    Raises InputError (what the user can mend, also when a worker met it), else Ray's TrainingFailedError.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    if run.result.exists():
        return dict(read_json(run.result)["metrics"])
    low, high = resources.span
    gpus = resources.gpus_per_worker
    per_worker = {"CPU": resources.cpus_per_worker, **({"GPU": gpus} if gpus else {})}
    check_room(resources)
    storage = run.path / "ray"
    with hold(run.lock, f"run {run.name}"):
        trainer = TorchTrainer(
            _work,  # type: ignore[arg-type]
            train_loop_config={"run": str(run.path), "loader_threads": loader_threads(resources)},
            scaling_config=ScalingConfig(
                num_workers=low if low == high else (low, high),  # type: ignore[arg-type]
                use_gpu=gpus > 0,
                resources_per_worker=per_worker,
            ),
            # A new name each time: we restore from our own verified checkpoints, never from Ray's record.
            run_config=RunConfig(
                name=f"{run.name}-{uuid.uuid4().hex[:8]}",
                storage_path=str(storage),
                failure_config=FailureConfig(max_failures=RESTARTS),
                callbacks=list(callbacks),
            ),
            torch_config=TorchConfig(backend="nccl" if gpus else "gloo", timeout_s=600),
        )
        try:
            with _interruptible():
                fault = trainer.fit().return_value  # type: ignore[attr-defined]
        except TrainingFailedError as error:
            raise _mendable(error) or error from None
        finally:
            shutil.rmtree(storage, ignore_errors=True)
    if fault:
        raise InputError(f"run {run.name}: {fault}")
    return dict(read_json(run.result)["metrics"])


def loader_threads(resources: Resources) -> int:
    """One CPU of a worker trains, the others read; beside a GPU one reads at least."""
    return max(resources.cpus_per_worker - 1, 1 if resources.gpus_per_worker else 0)


def check_room(resources: Resources) -> None:
    """Refuse what the Ray cluster does not have: it would be waited for. InputError."""
    import ray

    have = ray.cluster_resources()  # type: ignore[no-untyped-call]
    workers, _ = resources.span
    for kind, each in (("GPU", resources.gpus_per_worker), ("CPU", float(resources.cpus_per_worker))):
        if workers * each > have.get(kind, 0):
            raise InputError(
                f"{workers} workers with {each:g} {kind}s each: the Ray cluster has {have.get(kind, 0):g}; "
                f"next: fewer workers, or fewer {kind}s a worker"
            )


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


def _work(settings: dict[str, Any]) -> str | None:
    """What each worker runs; returns the fault that every rank has met, since no restart would mend it."""
    import ray.train

    from pipeline.train import TooManyBad, train

    run = RunDir(Path(settings["run"]))
    rank = ray.train.get_context().get_world_rank()
    handler = logging.FileHandler(run.logs / f"rank{rank}.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger("gsa").addHandler(handler)
    logging.getLogger("gsa").setLevel(logging.INFO)
    try:
        train(
            run,
            report=lambda metrics: ray.train.report(dict(metrics)),
            loader_threads=settings["loader_threads"],
        )
    except (FloatingPointError, TooManyBad) as error:
        return str(error)
    return None


def _mendable(error: Any) -> InputError | None:
    """The worker's fault that the user can mend, if that is what ended the training."""
    for failure in getattr(error, "worker_failures", {}).values():
        cause = getattr(failure, "cause", failure)
        if isinstance(cause, InputError):
            return InputError(str(cause).splitlines()[-1] if str(cause) else repr(cause))
    return None
