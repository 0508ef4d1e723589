"""Trials under Ray Tune; what has ended is not run again, whoever was killed in between."""

import logging
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pipeline import metrics
from pipeline.config import InputError, Resources, TrainingFailed
from pipeline.metrics import epoch_records
from pipeline.plan import make
from pipeline.ray_session import environment
from pipeline.ray_train import check_room, fit, loader_threads, rank_log
from pipeline.rundir import InUse, RunDir, SweepDir, hold, write_atomic
from pipeline.samplers import Source
from pipeline.sweep import Outcome, State, Sweep, Trial, outcomes, record

RETRIES = 3  # of a trial whose own process has died; its workers are restarted beside that
SEEN_S = 5.0  # until a file that another node has written is seen here
IN_USE_S = 1.0  # between looks at a run that another process trains

log = logging.getLogger("gsa")

Report = Callable[[dict[str, Any]], None]  # metrics of an epoch, "epoch" among them
Work = Callable[[RunDir, Resources, Report], None]


class Hooks(Protocol):
    """What is told, in this process, of each trial: that it starts, that it has ended, that it need not run.

    recorded: that this sweep knew of it already.
    """

    def start(self, trial: Trial) -> None: ...
    def end(self, trial: Trial, outcome: Outcome) -> None: ...
    def reuse(self, trial: Trial, outcome: Outcome, *, recorded: bool) -> None: ...


def search(
    sweep: Sweep,
    folder: SweepDir,
    source: Source,
    *,
    resources: Resources,
    concurrent: int,
    hooks: Hooks,
) -> list[Outcome]:
    """Run all trials of a source under Ray Tune, `concurrent` at a time; each outcome is recorded once.

    Needs `ray_session.session`. A trial that ended in an earlier, interrupted call, or in another sweep, only
    tells the scheduler what it had reported. One worker trains in the process of the trial; several under
    Ray Train.
    """
    from ray import tune

    check_room(resources, concurrent)
    storage = folder.path / "ray"
    shutil.rmtree(storage, ignore_errors=True)  # of a killed driver: our own outcomes are the record
    scheduler = _scheduler(sweep)
    feed = _feed(sweep, folder, source, hooks, scheduler, concurrent)
    work = train_run  # Ray sends it to the trials
    alone = resources.span == (1, 1)
    share = {"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker} if alone else {"CPU": 0.01}
    values = resources.model_dump()
    tuner = tune.Tuner(
        tune.with_resources(lambda settings: _trial(settings, Resources(**values), work), share),
        tune_config=tune.TuneConfig(
            search_alg=feed,
            scheduler=scheduler,
            num_samples=-1,  # the source knows its end
            reuse_actors=alone,  # else the trainer of a trial that was stopped would hold it
        ),
        run_config=tune.RunConfig(
            name=sweep.name,
            storage_path=str(storage),
            verbose=0,
            callbacks=[_recorder(feed)],
        ),
    )
    try:
        # All at once: else a trial that waits for its new process gets that of the one before, and runs alone.
        with environment({"TUNE_MAX_PENDING_TRIALS_PG": str(concurrent)}):
            tuner.fit()
    finally:
        shutil.rmtree(storage, ignore_errors=True)
    if feed.fault:
        raise feed.fault
    if not source.exhausted or feed.open:
        lost = ", ".join(trial.plan.run.name for trial in feed.open.values())
        raise RuntimeError(f"sweep {sweep.name}: Tune returned without an outcome of {lost or 'all points'}")
    return list(feed.found)


class Known(NamedTuple):
    """A trial that need not run; recorded: this sweep knew of it already."""

    trial: Trial
    outcome: Outcome
    recorded: bool


def settled(folder: SweepDir, source: Source) -> list[Known] | None:
    """All trials of a source and their outcomes, recorded; None if one must run: it is used up to there."""
    recorded, found = outcomes(folder), []
    while trial := source.next():
        known = known_outcome(trial, recorded.get(trial.plan.run.name))
        if known is None:
            return None
        if known != recorded.get(known.run):
            record(folder, known)
        found.append(Known(trial, known, known.run in recorded))
        source.tell(trial, known)
    return found


def known_outcome(trial: Trial, recorded: Outcome | None) -> Outcome | None:
    """How a trial has ended already: in this sweep, as recorded, or to its end elsewhere. Not if it failed."""
    if recorded and recorded.state == "stopped" and trial.plan.run.metrics.exists():
        return recorded
    return outcome_of(trial, "finished") if trial.plan.run.result.exists() else None


def outcome_of(trial: Trial, state: State, last_epoch: float = float("inf")) -> Outcome:
    """A trial's outcome as its journal has it, up to that epoch."""
    records = [r for r in epoch_records(trial.plan.run) if r.epoch <= last_epoch]
    last = records[-1] if records else metrics.Record(0.0, 0, 0.0, {})
    values = {k: v for k, v in last.metrics.items() if k.startswith(("train/", "val/", "val_ema/"))}
    seconds = sum(r.metrics.get("perf/epoch_s", 0.0) for r in records)
    name, epoch = trial.plan.run.name, round(last.epoch)
    return Outcome(name, trial.point, trial.seed, trial.overrides, state, epoch, values, seconds)


# --- in the trial's own process ----------------------------------------------------------------------------


def _trial(settings: dict[str, Any], resources: Resources, work: Work) -> None:
    """Train a run, and report its epochs to Tune; those that are behind it first, for the scheduler.

    What no new try would mend is written down and ends the trial; anything else is tried again.
    """
    from ray import tune

    run = RunDir(Path(settings["run"]))
    if not run.facts.exists():
        raise InputError(f"{run.path} is not there on this node; next: --out on a file system of all nodes")
    run.error.unlink(missing_ok=True)
    try:
        while not run.result.exists():
            try:
                with hold(run.lock, f"run {run.name}"):
                    behind = _behind(run)
                for values in behind:
                    tune.report(values)
                work(run, resources, tune.report)
                return
            except InUse:
                time.sleep(IN_USE_S)
        for each in epoch_records(run):
            tune.report({"epoch": round(each.epoch), "behind": True, **each.metrics})
    except (InputError, TrainingFailed, FloatingPointError) as error:
        write_atomic(run.error, f"{type(error).__name__}: {error}\n")
    except Exception as error:
        write_atomic(run.error, f"{type(error).__name__}: {error}\n")
        raise


def train_run(run: RunDir, resources: Resources, report: Report) -> None:
    """Train a run to its end, from its newest checkpoint: here, or on several workers."""
    if resources.span != (1, 1):
        from ray.tune.integration.ray_train import TuneReportCallback

        fit(run, resources, callbacks=[TuneReportCallback()])  # type: ignore[no-untyped-call]
        return
    import torch

    from pipeline.train import train

    torch.compiler.reset()  # of the networks that this process has trained before
    with hold(run.lock, f"run {run.name}"), rank_log(run, 0):
        train(
            run,
            lambda values: report(dict(values)),
            loader_threads=loader_threads(resources),
            save_every_s=60 * resources.save_minutes,
        )


def _behind(run: RunDir) -> list[dict[str, Any]]:
    """The epochs that will not be trained again. "behind": that it goes on after them was decided already."""
    from pipeline import checkpoint

    saved = checkpoint.newest(run.checkpoints)
    records = [r for r in epoch_records(run) if saved and r.epoch <= saved["epochs"]]
    last_step = max((r.step for r in metrics.read(run.metrics)), default=0)
    return [{"epoch": round(r.epoch), "behind": r.step < last_step, **r.metrics} for r in records]


# --- in the driver -----------------------------------------------------------------------------------------


def _scheduler(sweep: Sweep) -> Any:
    """ASHA, that can be told of trials which ended before, and leaves the last epoch alone."""
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

    if sweep.asha is None:
        return FIFOScheduler()  # type: ignore[no-untyped-call]
    asha = sweep.asha
    brackets = [
        ASHAScheduler(
            time_attr="epoch",  # not Tune's own iterations: a continued trial starts those anew
            metric=sweep.metric,
            mode=sweep.mode,
            max_t=10**6,  # no trial ends by it
            grace_period=asha.grace_epochs * asha.reduction**i,
            reduction_factor=asha.reduction,
        )
        for i in range(asha.brackets)
    ]

    class Halving(FIFOScheduler):
        """Knows a trial by its run: tried again, it has its places on the rungs."""

        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.stopped: set[str] = set()

        def __reduce__(self) -> Any:
            return FIFOScheduler, ()

        def on_trial_add(self, controller: Any, trial: Any) -> None:
            self._of(trial).on_trial_add(controller, _ByRun(trial.config))

        def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
            said = str(self._of(trial).on_trial_result(controller, _ByRun(trial.config), result))
            if result.get("behind") or result.get("epoch", 0) >= trial.config["epochs"]:
                return TrialScheduler.CONTINUE
            if said == TrialScheduler.STOP:
                self.stopped.add(trial.config["run"])
            return said

        def on_trial_complete(self, controller: Any, trial: Any, result: dict[str, Any]) -> None:
            self._of(trial).on_trial_complete(controller, _ByRun(trial.config), result)

        def tell(self, trial: Trial, outcome: Outcome) -> None:
            """What a trial had reported that does not run now."""
            stub = _ByRun(_settings(trial))
            self._of(stub).on_trial_add(None, stub)
            for r in epoch_records(trial.plan.run):
                if r.epoch <= outcome.epoch:
                    values = {"epoch": round(r.epoch), **r.metrics}
                    self._of(stub).on_trial_result(None, stub, values)

        def _of(self, trial: Any) -> Any:
            return brackets[int(Path(trial.config["run"]).name[-8:], 16) % len(brackets)]

    return Halving()


class _ByRun:
    """What ASHA asks of a trial."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.trial_id, self.config = str(config["run"]), config


def _settings(trial: Trial) -> dict[str, Any]:
    return {"run": str(trial.plan.run.path), "epochs": trial.plan.config.optim.epochs}


def _feed(
    sweep: Sweep, folder: SweepDir, source: Source, hooks: Hooks, scheduler: Any, concurrent: int
) -> Any:
    from ray.tune.search import Searcher

    class Feed(Searcher):
        """Hands the source's trials to Tune, and their outcomes to the source."""

        def __init__(self) -> None:
            super().__init__()
            self.recorded = outcomes(folder)
            self.open: dict[str, Trial] = {}
            self.again: list[Trial] = []  # whose process has died
            self.deaths: Counter[str] = Counter()
            self.seen: set[str] = set()  # of Tune's trials, those that have ended
            self.found: list[Outcome] = []
            self.fault: InputError | None = None

        def __reduce__(self) -> Any:
            return Searcher, ()  # Tune pickles it to restore itself; we never do, and hold locks

        def suggest(self, trial_id: str) -> Any:
            if self.fault:
                return Searcher.FINISHED
            if self.again:
                return self._start(self.again.pop())
            while len(self.open) < concurrent and (trial := source.next()):
                known = known_outcome(trial, self.recorded.get(trial.plan.run.name))
                if known is None:
                    make(trial.plan)
                    hooks.start(trial)
                    return self._start(trial)
                hooks.reuse(trial, known, recorded=known.run in self.recorded)
                self._record(known)
                if sweep.asha:
                    scheduler.tell(trial, known)
                source.tell(trial, known)
            return Searcher.FINISHED if source.exhausted and not self.open else None

        def ended(self, trial: Any, *, failed: bool) -> None:
            if trial.trial_id in self.seen:
                return
            self.seen.add(trial.trial_id)
            ours = self.open.pop(trial.config["run"])
            run = ours.plan.run
            if failed and not run.result.exists() and self.deaths[run.name] < RETRIES:
                self.deaths[run.name] += 1
                log.warning("trial tried again run=%s deaths=%d", run.name, self.deaths[run.name])
                self.open[str(run.path)] = ours
                self.again.append(ours)
                return
            outcome = self._outcome(ours, trial)
            self._record(outcome)
            source.tell(ours, outcome)
            if outcome.state == "failed":
                reason = (
                    run.error.read_text().strip() if run.error.exists() else "its process died, each time"
                )
                log.error("trial failed run=%s reason=%s", run.name, reason)
            hooks.end(ours, outcome)

        def _start(self, trial: Trial) -> dict[str, Any]:
            self.open[str(trial.plan.run.path)] = trial
            return _settings(trial)

        def _outcome(self, ours: Trial, trial: Any) -> Outcome:
            run, until = ours.plan.run, time.monotonic() + SEEN_S
            if trial.config["run"] in getattr(scheduler, "stopped", ()):
                # What its workers did after that counts in no sweep.
                return outcome_of(ours, "stopped", (trial.last_result or {}).get("epoch", 0))
            while not (run.result.exists() or run.error.exists()) and time.monotonic() < until:
                time.sleep(0.1)  # another node has written it
            return outcome_of(ours, "finished" if run.result.exists() else "failed")

        def _record(self, outcome: Outcome) -> None:
            self.found.append(outcome)
            if self.recorded.get(outcome.run) == outcome:
                return
            self.recorded[outcome.run] = outcome
            try:
                record(folder, outcome)
            except OSError as error:  # the run has its result: another call finds it there
                self.fault = InputError(
                    f"{folder.outcomes}: cannot be written: {error.strerror or error}; next: make room, then "
                    "the same command continues"
                )

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            pass  # the recorder tells, who knows the trial

        def save(self, checkpoint_path: str) -> None:
            pass  # our own files are the record

        def restore(self, checkpoint_path: str) -> None:
            pass

        def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
            pass

    return Feed()


def _recorder(feed: Any) -> Any:
    from ray.tune import Callback

    class Recorder(Callback):
        def __reduce__(self) -> Any:
            return Callback, ()

        def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
            for trial in trials if feed.open else ():
                if trial.status == "ERROR":  # Tune gives some up without a word
                    feed.ended(trial, failed=True)

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            feed.ended(trial, failed=False)

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            feed.ended(trial, failed=True)

    return Recorder()
