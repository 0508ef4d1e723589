"""Trials under Ray Tune: each trial a Ray Train run; what has ended is not run again."""

import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline import metrics
from pipeline.config import Resources
from pipeline.ray_train import check_room, fit
from pipeline.rundir import RunDir, SweepDir, write_atomic, write_json
from pipeline.sweep import Outcome, State, Sweep, Trial, ended_trials

log = logging.getLogger("gsa")

OnStart = Callable[[Trial], None]
OnEnd = Callable[[Trial, Outcome], None]


def search(
    sweep: Sweep,
    folder: SweepDir,
    trials: Sequence[Trial],
    *,
    resources: Resources,
    concurrent: int,
    on_start: OnStart,
    on_end: OnEnd,
) -> list[Outcome]:
    """Run all trials under Ray Tune, `concurrent` at a time; returns their outcomes in the trials' order.

    Needs `ray_session.session`. Ended trials of an earlier, interrupted call only tell the scheduler what
    they had reported. The hooks are called in this process.
    """
    from ray import tune

    check_room(resources)
    names = {t.run.name for t in trials}  # outcomes on other shards or of another sweep file are forgotten
    ended = {name: o for name, o in ended_trials(folder).items() if name in names}
    storage = folder.path / "ray"
    shutil.rmtree(storage, ignore_errors=True)  # of a killed driver: our own outcomes are the record
    space = {
        "run": tune.grid_search([str(t.run.path) for t in trials]),
        "ended": {str(t.run.path): ended[t.run.name].epoch for t in trials if t.run.name in ended},
        "resources": resources.model_dump(),
    }
    recorder = _recorder(folder, trials, ended, on_start, on_end)
    tuner = tune.Tuner(
        tune.with_resources(_trial, {"CPU": 0.01}),  # the workers hold the real ones
        param_space=space,
        tune_config=tune.TuneConfig(scheduler=_scheduler(sweep, trials), max_concurrent_trials=concurrent),
        run_config=tune.RunConfig(
            name=sweep.name,
            storage_path=str(storage),
            verbose=0,
            callbacks=[recorder],
        ),
    )
    try:
        tuner.fit()
    finally:
        shutil.rmtree(storage, ignore_errors=True)
    for trial in trials:
        if trial.run.name in recorder.ended and recorder.ended[trial.run.name].state == "failed":
            log.error("trial failed run=%s reason=%s", trial.run.name, trial.run.error)
    lost = [t.run.name for t in trials if t.run.name not in recorder.ended]
    if lost:
        raise RuntimeError(f"sweep {sweep.name}: Tune returned without an outcome of {', '.join(lost)}")
    return [recorder.ended[t.run.name] for t in trials]


def _scheduler(sweep: Sweep, trials: Sequence[Trial]) -> Any:
    from ray.tune.schedulers import ASHAScheduler

    if sweep.asha is None:
        return None
    return ASHAScheduler(
        time_attr="epoch",  # not Tune's own iterations: a continued trial starts those anew
        metric=sweep.metric,
        mode=sweep.mode,
        max_t=max(t.config.optim.epochs for t in trials) + 1,  # the last epoch ends by itself
        grace_period=sweep.asha.grace_epochs,
        reduction_factor=sweep.asha.reduction,
    )


def _trial(settings: dict[str, Any]) -> None:
    """What a trial's own process runs: it reports to Tune, its Train workers do the work."""
    from ray import tune
    from ray.tune.integration.ray_train import TuneReportCallback

    run = RunDir(Path(settings["run"]))
    last = settings["ended"].get(str(run.path))
    for record in epoch_records(run):
        if last is None or record.epoch <= last:
            tune.report({"epoch": round(record.epoch), **record.metrics})
    if last is None:
        report = TuneReportCallback()  # type: ignore[no-untyped-call]
        try:
            fit(run, Resources(**settings["resources"]), callbacks=[report])
        except Exception as error:
            write_atomic(run.error, f"{type(error).__name__}: {error}\n")
            raise


def epoch_records(run: RunDir) -> list[metrics.Record]:
    """The records of the journal that end an epoch: those with an evaluation."""
    return [r for r in metrics.read(run.metrics) if "val/count" in r.metrics]


def _recorder(
    folder: SweepDir, trials: Sequence[Trial], ended: dict[str, Outcome], on_start: OnStart, on_end: OnEnd
) -> Any:
    from ray.tune import Callback

    by_path = {str(t.run.path): t for t in trials}

    class Recorder(Callback):
        """Writes each outcome down when its trial ends, and tells the hooks."""

        def __init__(self) -> None:
            self.ended = dict(ended)

        def __reduce__(self) -> Any:
            return Callback, ()  # Tune pickles its callbacks to restore itself; we never do, and hold locks

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            on_start(by_path[trial.config["run"]])

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            self._end(trial, failed=False)

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            self._end(trial, failed=True)

        def _end(self, trial: Any, *, failed: bool) -> None:
            ours = by_path[trial.config["run"]]
            if ours.run.name not in self.ended:
                self.ended[ours.run.name] = _outcome(ours, trial.last_result or {}, failed=failed)
                write_json(folder.outcomes, [o._asdict() for o in self.ended.values()])
            on_end(ours, self.ended[ours.run.name])

    return Recorder()


def _outcome(trial: Trial, last: dict[str, Any], *, failed: bool) -> Outcome:
    epoch = int(last.get("epoch", 0))
    state: State = "failed" if failed else "finished" if trial.run.result.exists() else "stopped"
    values = {k: float(v) for k, v in last.items() if k.startswith(("train/", "val/"))}
    seconds = sum(r.metrics["perf/epoch_s"] for r in epoch_records(trial.run) if r.epoch <= epoch)
    return Outcome(trial.run.name, trial.overrides, state, epoch, values, seconds)
