"""Rows -> tables for people: the trials of a sweep, the summary of a workflow."""

import io
import shlex
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.config import Config, read_yaml, validate
from pipeline.rundir import Out, read_json, write_atomic
from pipeline.sweep import Outcome


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows with the same keys as a table of plain text; numbers to the right."""
    if not rows:
        return "(nothing)"
    grid = Table(box=SIMPLE, pad_edge=False)
    for key in rows[0]:
        numeric = all(isinstance(row[key], int | float) for row in rows)
        grid.add_column(key, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(escape(_cell(value)) for value in row.values()))
    text = io.StringIO()
    Console(file=text, width=160).print(grid)
    return text.getvalue().strip("\n")


def trial_rows(out: Out, ended: Sequence[Outcome]) -> list[dict[str, Any]]:
    """What the trials of a sweep cost and reached, in their order."""
    rows = []
    for outcome in ended:
        run = out.find_run(outcome.run)
        config, facts = validate(Config, read_yaml(run.config), where=str(run.config)), read_json(run.facts)
        rows.append(
            {
                "run": outcome.run,
                "placement": config.model.placement,
                "lr": config.optim.lr,
                "params": facts["params"],
                "GFLOPs": round(facts["gflops"], 4),
                "epochs": f"{outcome.epoch}/{config.optim.epochs}",
                "state": outcome.state,
                "val top-1 %": round(outcome.metrics.get("val/top1", float("nan")), 2),
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


def _cell(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "-" if value is None else str(value)
