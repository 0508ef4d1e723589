"""What is running, as people see it: MLflow runs that follow the journals, and a count of epochs."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipeline import tracking
from pipeline.config import Config, InputError, Preempted, digest, flat
from pipeline.facts import system_facts
from pipeline.manifest import Manifest
from pipeline.metrics import Record
from pipeline.progress import Update
from pipeline.rundir import Out, RunDir, read_json
from pipeline.shipper import Shipper
from pipeline.sweep import Outcome, Sweep

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

    def __init__(self, configs: dict[RunDir, Config], update: Update) -> None:
        self.epochs = {run: c.optim.epochs for run, c in configs.items()}
        self.update, self.total, self.text = update, sum(self.epochs.values()), "starting Ray"
        self.done = dict.fromkeys(configs, 0.0)
        self.ended: set[RunDir] = set()
        self._show()

    def read(self, run: RunDir, records: list[Record]) -> None:
        """Take in the new records of a run."""
        if run in self.ended:  # the shipper comes to its last records later
            return
        last = records[-1]
        self.done[run] = last.epoch
        shown = {SHOWN[key]: value for key, value in last.metrics.items() if key in SHOWN}
        text = " ".join(f"{key} {value:.4g}" for key, value in {"step": last.step, **shown}.items())
        self.text = f"{run.name} {text}" if len(self.done) > 1 else text
        self._show()

    def end(self, run: RunDir) -> None:
        """Nothing more comes of a run, be it stopped early."""
        self.ended.add(run)
        self.done[run] = self.epochs[run]
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

    def start(self, run: RunDir, config: Config, *, tags: dict[str, str]) -> None:
        """Mirror a run from now on, below the sweep if there is one; without MLflow it goes on unmirrored."""
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

    def start_sweep(self, sweep: Sweep, names: list[str]) -> None:
        """One parent run for the trials that start from now on."""
        values = {k: v for k, v in sweep.model_dump(mode="json").items() if k != "parameters"}
        self.parent = tracking.start_run(
            self.client,
            self.experiment,
            name=f"sweep {sweep.name}",
            key=f"sweep-{sweep.name}-{digest(sorted(names))}",
            params={**values, **sweep.parameters},
            tags={**system_facts(), "gsa.trials": str(len(names))},
            description=f"Sweep `{sweep.name}`: {len(names)} trials, best by {sweep.metric}",
        )

    def end_sweep(self, winner: Outcome) -> None:
        """The parent shows the best trial's metrics: collapsed, it would have no curve and no figure."""
        assert self.parent
        tags = {"gsa.best_run": winner.run}
        tracking.end_run(self.client, self.parent, "FINISHED", winner.metrics, step=winner.epoch, tags=tags)
        self.parent = None


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
        missing = mirror.shipper.close()
        if missing:
            log.warning("MLflow lacks %d points of these runs; their journals hold them all", missing)
