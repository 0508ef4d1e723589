"""What is running, as people see it: MLflow runs that follow the journals, and a count of epochs."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline import tracking
from pipeline.config import Config, InputError, Preempted, digest, flat
from pipeline.facts import system_facts
from pipeline.manifest import Manifest
from pipeline.metrics import Record
from pipeline.progress import Say, Update
from pipeline.rundir import Out, RunDir, SweepDir, read_json, write_json
from pipeline.shipper import Shipper
from pipeline.sweep import Outcome, Sweep, Trial, name_of

log = logging.getLogger("gsa")


SHOWN = {
    "train/loss": "loss",
    "train/top1": "top1",
    "val/top1": "val top1",
    "val_ema/top1": "averaged",
    "perf/images_per_s": "images/s",
}


class Epochs:
    """Progress in epochs over all runs, from the records of their journals."""

    def __init__(self, update: Update, total: int, rows: dict[str, str] | None = None) -> None:
        """rows: of a table of the runs under way, kept up here."""
        self.update, self.total, self.text = update, total, "starting Ray"
        self.rows = {} if rows is None else rows
        self.labels: dict[RunDir, str] = {}
        self.epochs: dict[RunDir, int] = {}
        self.done: dict[RunDir, float] = {}
        self.ended: set[RunDir] = set()
        self._show()

    def start(self, run: RunDir, config: Config, label: str) -> None:
        self.epochs[run], self.done[run], self.labels[run] = config.optim.epochs, 0.0, label
        self.rows[label] = "starting"
        self.ended.discard(run)

    def read(self, run: RunDir, records: list[Record]) -> None:
        """Take in the new records of a run."""
        if run in self.ended:  # the shipper comes to its last records later
            return
        last = records[-1]
        self.done[run] = last.epoch
        values = {SHOWN[key]: value for key, value in last.metrics.items() if key in SHOWN}
        text = " ".join(f"{key} {value:.4g}" for key, value in {"step": last.step, **values}.items())
        self.rows[self.labels[run]] = f"epoch {last.epoch:.3g}/{self.epochs[run]} {text}"
        self.text = f"{run.name} {text}" if len(self.done) > 1 else text
        self._show()

    def end(self, run: RunDir) -> None:
        """Nothing more comes of a run, be it stopped early."""
        self.ended.add(run)
        self.done[run] = self.epochs[run]
        self.rows.pop(self.labels[run], None)
        self._show()

    def skip(self, epochs: int) -> None:
        """Epochs that were trained before."""
        self.total -= epochs
        self._show()

    def _show(self) -> None:
        self.update(sum(self.done.values()), self.total, self.text)


class Mirror:
    """The MLflow side of what is running: one run a training run, one parent a sweep."""

    def __init__(self, client: Any, experiment: str, epochs: Epochs) -> None:
        self.client, self.experiment, self.epochs = client, experiment, epochs
        self.shipper = Shipper(client, epochs.read)
        self.open: set[RunDir] = set()
        self.parent: str | None = None
        self.missing = 0  # points, after the end

    def start(self, run: RunDir, config: Config, *, tags: dict[str, str], label: str = "") -> None:
        """Mirror a run from now on, below the sweep if there is one; without MLflow it goes on unmirrored."""
        self.epochs.start(run, config, label or run.name)
        facts = read_json(run.facts)
        shown = {
            "gsa.shards_digest": facts["shards_digest"],
            "gsa.params": str(facts["params"]),
            "gsa.gflops": f"{facts['gflops']:.4g}",
        }
        try:
            run_id = tracking.start_run(
                self.client,
                self.experiment,
                name=run.name,
                key=facts["fingerprint"],
                params=flat(config),
                tags={**system_facts(), **shown, **tags},
                parent=self.parent,
                description=f"Run folder `{run.path}`",
            )
        except InputError as error:
            log.warning("not mirrored to MLflow run=%s error=%s", run.name, error)
            return
        tracking.log_files(self.client, run_id, [run.config, run.facts])
        self.shipper.follow(run, run_id)
        self.open.add(run)

    def end(self, run: RunDir, status: str) -> None:
        self.epochs.end(run)
        self.let_go(run, status)

    def let_go(self, run: RunDir, status: str) -> None:
        """The same for a run that has not come to its end."""
        if run in self.open:  # else it failed before it started
            self.open.remove(run)
            self.shipper.finish(run, status)

    def start_sweep(self, sweep: Sweep, folder: SweepDir, shards_digest: str) -> None:
        """One parent run for the trials that start from now on; the same one when a sweep goes on."""
        values = sweep.model_dump(mode="json", exclude_none=True)
        fixed = [getattr(sweep, field) for field in ("name", "train", "sampler", "metric")]
        self.parent = tracking.start_run(
            self.client,
            self.experiment,
            name=f"sweep {sweep.name}",
            key=f"sweep-{sweep.name}-{digest([*fixed, shards_digest])}",
            params={**values.pop("parameters"), **values},
            tags={**system_facts(), "gsa.trials": str(sweep.size)},
            description=f"Sweep `{sweep.name}`: up to {sweep.size} trials, best by {sweep.metric}; those that "
            f"ran in another sweep before have the tag `gsa.sweep.{sweep.name}`. Folder `{folder.path}`",
        )
        write_json(folder.tracking, {"run_id": self.parent})

    def list_in(self, sweep: str, run: RunDir) -> None:
        """A run of another sweep belongs to this one too: by tag, since MLflow knows one parent."""
        if run.tracking.exists():
            run_id = read_json(run.tracking)["run_id"]
            tracking.set_tags(self.client, run_id, {f"gsa.sweep.{sweep}": "reused"})

    def end_sweep(self, winner: Outcome | None, files: Sequence[Path]) -> None:
        """The parent shows the best trial's metrics: collapsed, it would have no curve and no figure."""
        assert self.parent
        tracking.log_files(self.client, self.parent, files)
        shown = (winner.metrics, winner.epoch, {"gsa.best_run": winner.run}) if winner else ({}, 0, {})
        tracking.end_run(self.client, self.parent, "FINISHED", shown[0], step=shown[1], tags=shown[2])
        self.parent = None


class Board:
    """The trials of a sweep, on the terminal and in MLflow: what `tune.search` tells of them."""

    def __init__(self, mirror: Mirror, sweep: Sweep, say: Say) -> None:
        self.mirror, self.sweep, self.say = mirror, sweep, say

    def start(self, trial: Trial) -> None:
        tags = {"gsa.sweep": self.sweep.name, f"gsa.sweep.{self.sweep.name}": "run"}
        self.mirror.start(trial.plan.run, trial.plan.config, tags=tags, label=_label(trial))

    def end(self, trial: Trial, outcome: Outcome) -> None:
        self.mirror.end(trial.plan.run, "FAILED" if outcome.state == "failed" else "FINISHED")
        self._told(trial, outcome, outcome.state)

    def reuse(self, trial: Trial, outcome: Outcome, *, recorded: bool) -> None:
        run = trial.plan.run
        self.mirror.epochs.skip(trial.plan.config.optim.epochs)
        status = read_json(run.tracking).get("status") if run.tracking.exists() else None
        if status != "FINISHED":  # its driver was killed, or interrupted after the run's end
            self.start(trial)
            self.mirror.end(run, "FINISHED")
        if not recorded:
            self.mirror.list_in(self.sweep.name, run)
            self._told(trial, outcome, f"{outcome.state} before")

    def _told(self, trial: Trial, outcome: Outcome, state: str) -> None:
        value = outcome.metrics.get(self.sweep.metric)
        reached = "" if value is None else f", {self.sweep.metric} {value:.4f} at epoch {outcome.epoch}"
        self.say(f"{_label(trial)}: {state}{reached}  ({outcome.run})")


def _label(trial: Trial) -> str:
    return f"{name_of(trial.point)} seed={trial.seed}"


@contextmanager
def mirrored(out: Out, manifest: Manifest, epochs: Epochs) -> Iterator[Mirror]:
    """MLflow for as long as the block runs; what is open at its end was killed, or failed."""
    client = tracking.open_store(out.tracking_uri, out.artifacts)
    experiment = tracking.experiment(client, manifest.folder.name, out.artifacts)
    mirror = Mirror(client, experiment, epochs)
    status = "FAILED"
    try:
        yield mirror
    except (KeyboardInterrupt, Preempted):
        status = "KILLED"
        raise
    finally:
        for run in list(mirror.open):
            mirror.let_go(run, status)
        if mirror.parent:
            tracking.end_run(client, mirror.parent, status, {}, step=0, tags={})
        mirror.missing = mirror.shipper.close()
        if mirror.missing:
            log.warning("MLflow lacks %d points of these runs; their journals hold them all", mirror.missing)
