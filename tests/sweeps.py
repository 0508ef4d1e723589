"""`gsa tune` in a process of its own, to be killed: its trials trivial or real; and what it must leave."""

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from pipeline import metrics, tracking
from pipeline.config import dump
from pipeline.metrics import epoch_records, read_lines
from pipeline.rundir import Out
from pipeline.sweep import Outcome, Sweep, outcomes

# What it runs. A trivial trial sleeps, and its metric is a function of its settings.
DRIVER = """
import itertools, json, os, signal, sys, time
from pathlib import Path
import psutil
from pipeline import metrics, tune, verbs
from pipeline.config import Resources, load
from pipeline.rundir import Out, hold, write_json
from pipeline.sweep import Sweep

job = json.loads(sys.argv[1])

def trial(run, resources, report):
    from pipeline.plan import read_run
    config, _ = read_run(run)
    with hold(run.lock, "it"):
        begun = len(metrics.epoch_records(run))
        started = time.time()
        for epoch in range(begun + 1, config.optim.epochs + 1):
            time.sleep(job["epoch_s"])
            value = 100 - 1e4 * (config.optim.lr - 0.3) ** 2 / epoch + config.seed / 7
            values = {"val/top1": value, "val/count": 18.0, "perf/epoch_s": job["epoch_s"]}
            metrics.append(run.metrics, step=epoch, epoch=epoch, metrics=values)
            report({"epoch": epoch, **values})
        write_json(run.result, {"metrics": values})
        metrics.append_line(Path(job["spans"]), [run.name, begun, started, time.time(), os.getpid()])

if job["epoch_s"] is not None:
    tune.train_run = trial
begun, resources = time.monotonic(), Resources(workers=job["workers"])
out, sweep = Out(Path(job["out"])), load(Sweep, "sweep", job["sweep"])
found, ran = verbs.tune(out, sweep, resources, concurrent=job["concurrent"])
seconds, rss = time.monotonic() - begun, psutil.Process().memory_info().rss
print(json.dumps({"outcomes": len(found), "ran": ran, "rss": rss, "seconds": seconds}))
"""


def _trials(process: psutil.Popen) -> list[psutil.Process]:
    """The processes of a driver's Ray in which something trains."""
    found = []
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any(
                name in " ".join(child.cmdline()) for name in ("ray::ImplicitFunc", "ray::RayTrainWorker")
            ):
                found.append(child)
    return found


class Tuned:
    """`gsa tune`, as often as it is killed. epoch_s: of a trivial trial; None: they are real trainings."""

    def __init__(
        self,
        out: Out,
        sweep: Sweep,
        tmp_path: Path,
        *,
        epoch_s: float | None,
        workers: str = "1",
        concurrent: int = 2,
    ) -> None:
        self.out, self.sweep, self.folder = out, sweep, out.sweep(sweep.name)
        self.spans, self.log, file = tmp_path / "spans.jsonl", tmp_path / "log.txt", tmp_path / "sweep.yaml"
        file.write_text(dump(sweep))
        self.job = {"out": str(out.root), "sweep": str(file), "spans": str(self.spans), "epoch_s": epoch_s}
        self.job |= {"workers": workers, "concurrent": concurrent}

    def start(self) -> psutil.Popen:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        with open(self.log, "a") as said:
            return psutil.Popen(
                [sys.executable, "-c", DRIVER, json.dumps(self.job)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
            )

    def finish(self) -> dict[str, Any]:
        process = self.start()
        said = process.communicate(timeout=3600)[0]
        assert process.returncode == 0, self.log.read_text()[-3000:]
        return json.loads(said.splitlines()[-1])

    def kill_after(self, ended: int) -> None:
        """SIGKILL as soon as so many outcomes are recorded."""
        process = self.start()
        until = time.monotonic() + 600
        while len(outcomes(self.folder)) < ended and time.monotonic() < until:
            assert process.poll() is None, self.log.read_text()[-3000:]
            time.sleep(0.02)
        process.kill()
        process.communicate()

    def torment(self, rng: random.Random, *, trials: int, drivers: int, every_s: float) -> int:
        """SIGKILL so many processes of trials and drivers, at random; whether it had ended before the last."""
        kinds, killed = ["trial"] * trials + ["driver"] * drivers, 0
        rng.shuffle(kinds)
        process = self.start()
        for kind in kinds:
            until = time.monotonic() + rng.expovariate(1 / every_s)
            while process.poll() is None:
                if time.monotonic() > until and (
                    found := [process] if kind == "driver" else _trials(process)
                ):
                    break
                time.sleep(0.05)
            if process.poll() is not None:
                break
            rng.choice(found).kill()
            killed += 1
            if kind == "driver":
                process.communicate()
                process = self.start()
        process.communicate(timeout=3600)
        return killed

    def check_trainings(self) -> None:
        """Of real trainings: each step of each run stands once in its journal, and none ended twice."""
        for outcome in outcomes(self.folder).values():
            steps = [record.step for record in metrics.read(self.out.run(outcome.run).metrics)]
            assert steps == sorted(set(steps))
            assert outcome.state == "finished"
            assert outcome.metrics == {
                key: value
                for key, value in epoch_records(self.out.run(outcome.run))[-1].metrics.items()
                if key in outcome.metrics
            }

    def check(self, trials: int) -> list[Outcome]:
        """Each run has one outcome and was trained to its end once; MLflow says the same to the last digit."""
        rows = read_lines(self.folder.outcomes)
        assert len(rows) == len({row["run"] for row in rows}) == trials
        ended = list(outcomes(self.folder).values())
        if self.job["epoch_s"] is not None:
            done = Counter(row[0] for row in read_lines(self.spans))
            assert {o.run: 1 for o in ended if o.state == "finished"} == dict(done)
        client = tracking.open_store(self.out.tracking_uri, self.out.artifacts)
        (experiment,) = [e for e in client.search_experiments() if e.name != "Default"]
        parent, *others = client.search_runs([experiment.experiment_id], "tags.`gsa.trials` != ''")
        assert not others
        assert parent.info.status == "FINISHED"
        found, token = [], None
        while token != "":
            page = client.search_runs(
                [experiment.experiment_id],
                f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'",
                max_results=500,
                page_token=token,
            )
            found, token = found + list(page), page.token or ""
        mirrored = {run.info.run_name: run for run in found}
        assert len(found) == len(mirrored) == trials
        for outcome in ended:
            run = mirrored[outcome.run]
            assert run.info.status == "FINISHED"
            assert (
                run.data.metrics["val/top1"]
                == epoch_records(self.out.run(outcome.run))[-1].metrics["val/top1"]
            )
        return ended

    def most_at_once(self) -> int:
        times = [(t, sign) for _, _, a, b, _ in read_lines(self.spans) for t, sign in ((a, 1), (b, -1))]
        most = now = 0
        for _, sign in sorted(times):
            now += sign
            most = max(most, now)
        return most
