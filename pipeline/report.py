"""What a sweep, some runs, or a workflow came to: written as tables and plots, and told."""

import json
import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline import tables, tracking
from pipeline.config import Config, InputError, digest, read_yaml, validate
from pipeline.rundir import Out, read_json, write_atomic
from pipeline.study import Cost, Study, outcomes_of, read_runs
from pipeline.study import study as make_study
from pipeline.sweep import Outcome, Point, Sweep, outcomes
from pipeline.sweep import read as read_sweep
from pipeline.tables import table

log = logging.getLogger("gsa")


def of_sweep(
    out: Out, name: str, *, metric: str | None = None, baseline: Point | None = None, iso: Cost | None = None
) -> tuple[Study, Path]:
    """The study of a sweep, written into its folder and to its run in MLflow."""
    folder = out.sweep(name)
    sweep, ended = read_sweep(folder), list(outcomes(folder).values())
    if not ended:
        raise InputError(f"sweep {name}: no trial has ended yet; next: gsa tune {name}")
    study, files = write_study(out, sweep, ended, metric=metric, baseline=baseline, iso=iso)
    if folder.tracking.exists():
        try:
            client = tracking.open_store(out.tracking_uri, out.artifacts)
        except InputError as error:
            log.warning("report not copied to MLflow: %s", error)
        else:
            tracking.log_files(client, read_json(folder.tracking)["run_id"], files)
    return study, folder.report


def of_runs(
    out: Out, names: Sequence[str], *, metric: str, baseline: Point | None = None, iso: Cost | None = None
) -> tuple[Study, Path]:
    """The study of some runs, written below OUT/reports."""
    runs = read_runs(out, outcomes_of(out, names))
    study = make_study(runs, metric=metric, baseline=baseline, iso=iso)
    folder = out.root / "reports" / digest(sorted(run.outcome.run for run in runs))
    tables.write(study, folder, title=f"{len(runs)} runs")
    return study, folder


def write_study(
    out: Out,
    sweep: Sweep,
    ended: Sequence[Outcome],
    *,
    metric: str | None = None,
    baseline: Point | None = None,
    iso: Cost | None = None,
) -> tuple[Study, list[Path]]:
    """The study of these trials, in the folder of the sweep: see `current`. InputError: none has the metric."""
    runs = [run for run in read_runs(out, current(out, sweep, ended)) if run.last]
    mode = sweep.mode if metric in (None, sweep.metric) else "min" if "loss" in str(metric) else "max"
    study = make_study(
        runs, metric=metric or sweep.metric, mode=mode, baseline=baseline or sweep.baseline, iso=iso
    )
    return study, tables.write(study, out.sweep(sweep.name).report, title=f"Sweep {sweep.name}")


def current(out: Out, sweep: Sweep, ended: Sequence[Outcome]) -> list[Outcome]:
    """Those on the shards of the last one, and of each point and seed the last: a sweep may go on otherwise."""
    there = [outcome for outcome in ended if out.run(outcome.run).facts.exists()]
    digests = [read_json(out.run(outcome.run).facts)["shards_digest"] for outcome in there]
    there = [outcome for outcome, of in zip(there, digests, strict=True) if of == digests[-1]]
    if sweep.pbt:
        return there
    return list({(json.dumps(o.point, sort_keys=True), o.seed): o for o in there}.values())


def trial_rows(out: Out, ended: Sequence[Outcome]) -> list[dict[str, Any]]:
    """What the trials of a sweep cost and reached, in their order."""
    fields = list(dict.fromkeys(field for outcome in ended for field in outcome.point))
    seeds = {outcome.seed for outcome in ended}
    rows = []
    for outcome in ended:
        run = out.find_run(outcome.run)
        config, facts = validate(Config, read_yaml(run.config), where=str(run.config)), read_json(run.facts)
        rows.append(
            {
                "run": outcome.run,
                **{field: outcome.point.get(field) for field in fields},
                **({"seed": outcome.seed} if len(seeds) > 1 else {}),
                "params": facts["params"],
                "GFLOPs": round(facts["gflops"], 4),
                "epochs": f"{outcome.epoch}/{config.optim.epochs}",
                "state": outcome.state,
                "val top-1 %": round(outcome.metrics["val/top1"], 2)
                if "val/top1" in outcome.metrics
                else None,
                "seconds": round(outcome.seconds, 1),
            }
        )
    return rows


def summary(out: Out, workflow: Any, outputs: dict[str, dict[str, Any]]) -> str:
    """What a workflow made, where it lies, and the command that opens the UI on it; also written to a file."""
    sweep, train, registered = outputs["sweep"], outputs["train"], outputs["register"]
    ended = [Outcome(**row) for row in sweep["outcomes"]]
    predictions = outputs["predict"]["predictions"]
    right = sum(row["label"] == row["truth"] for row in predictions)
    folder = out.workflow(workflow.name)
    lines = [
        "",
        f"sweep {sweep['sweep']}: {len(ended)} trials, best {sweep['best']['run']}",
        table(trial_rows(out, ended)),
        "The champion has the settings of the best trial, trained to the end. The same val pictures chose and",
        "judge it, so its accuracy is a little flattered.",
        "",
        f"champion   {registered['uri']} = version {registered['version']}, run {train['run']}",
        f"val top-1  {registered['top1']:.2f} % ({registered['correct']} of {registered['samples']} images, "
        "each once)",
        f"predicted  {right} of {len(predictions)} held-out pictures right, by a fresh process",
        "",
        f"shards     {out.shards(workflow.shards.name)}",
        f"run        {out.run(train['run']).path}",
        f"tracking   {out.tracking_uri}",
        f"summary    {folder / 'summary.txt'}",
        f"open it    gsa ui --out {shlex.quote(str(out.root))}",
    ]
    text = "\n".join(lines)
    write_atomic(folder / "summary.txt", text + "\n")
    return text
