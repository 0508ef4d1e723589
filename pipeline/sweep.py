"""Sweep YAML -> trials: each a recipe plus a list of overrides, so that one command line reruns it."""

import itertools
import json
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from pipeline.config import Config, ConfigError, Name, Positive, Section, load
from pipeline.plan import prepare
from pipeline.rundir import Out, RunDir, SweepDir, read_json

State = Literal["finished", "stopped", "failed"]


class Asha(Section):
    """Early stopping: at epochs grace, grace * reduction, ... the best 1/reduction go on (arXiv 1810.05934)."""

    grace_epochs: Positive = 1
    reduction: Annotated[int, Field(ge=2)] = 2


class Sweep(Section):
    """A base recipe, and for some of its fields the values to try: every combination is a trial."""

    name: Name
    train: str
    overrides: list[str] = []
    parameters: Annotated[dict[str, Annotated[list[Any], Field(min_length=1)]], Field(min_length=1)]
    metric: str = "val/top1"
    mode: Literal["max", "min"] = "max"
    asha: Asha | None = None


class Trial(NamedTuple):
    """A point of the sweep and the run that it stands for."""

    overrides: tuple[str, ...]
    run: RunDir
    config: Config


class Outcome(NamedTuple):
    """How a trial ended: state, completed epochs, the metrics of the last, seconds trained."""

    run: str
    overrides: tuple[str, ...]
    state: State
    epoch: int
    metrics: dict[str, float]
    seconds: float


def trials(out: Out, sweep: Sweep, overrides: Sequence[str] = ()) -> list[Trial]:
    """The trials, each checked and with its run folder; equal points are one trial.

    overrides: for every trial, stronger than the sweep's own, weaker than its parameters.

    Raises ConfigError naming the point that cannot be.
    """
    found: dict[str, Trial] = {}
    for values in itertools.product(*sweep.parameters.values()):
        point = [f"{key}={json.dumps(value)}" for key, value in zip(sweep.parameters, values, strict=True)]
        settings = (*sweep.overrides, *overrides, *point)
        try:
            config = load(Config, "train", sweep.train, settings)
            run = prepare(out, config)
        except ConfigError as error:
            raise ConfigError(f"sweep {sweep.name}, point {' '.join(point)}: {error}") from None
        found.setdefault(run.name, Trial(settings, run, config))
    return list(found.values())


def ended_trials(folder: SweepDir) -> dict[str, Outcome]:
    """The outcomes so far, by run name; a failed trial has not ended: it is tried again."""
    if not folder.outcomes.exists():
        return {}
    rows = [Outcome(**{**row, "overrides": tuple(row["overrides"])}) for row in read_json(folder.outcomes)]
    return {row.run: row for row in rows if row.state != "failed"}


def best(sweep: Sweep, ended: Sequence[Outcome]) -> Outcome:
    """The outcome with the best final metric; the first of equals. ConfigError if none has it."""
    sign = 1 if sweep.mode == "max" else -1
    able = [o for o in ended if o.state != "failed" and math.isfinite(o.metrics.get(sweep.metric, math.nan))]
    if not able:
        raise ConfigError(
            f"sweep {sweep.name}: no trial has a finite {sweep.metric}; see the error.log of its runs"
        )
    return max(able, key=lambda o: sign * o.metrics[sweep.metric])
