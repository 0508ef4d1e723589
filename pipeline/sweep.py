"""Sweep YAML -> points -> trials: each a recipe plus a list of overrides, so that one command line reruns it."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import BeforeValidator, Field, JsonValue, model_validator

from pipeline.config import (
    Config,
    ConfigError,
    InputError,
    Name,
    Positive,
    Section,
    dump,
    load,
    read_yaml,
    suggest,
    validate,
)
from pipeline.metrics import append_line, read_lines
from pipeline.rundir import Out, SweepDir, write_atomic

if TYPE_CHECKING:
    from pipeline.plan import Plan

METRICS = (  # of an epoch, by which trials can be compared
    *("val/top1", "val/top5", "val/loss", "val_ema/top1", "val_ema/top5", "val_ema/loss"),
    *("train/top1", "train/loss", "train/grad_norm", "train/lr"),
)
State = Literal["finished", "stopped", "failed"]
Point = dict[str, Any]  # a field of the recipe -> its value
Span = Annotated[tuple[float, float], Field(strict=False)]  # YAML knows lists, not tuples


class Parameter(Section):
    """What to try for a field: choices (a plain list is short for them), or numbers of a range."""

    choice: Annotated[list[JsonValue], Field(min_length=1)] | None = None
    uniform: Span | None = None
    log_uniform: Span | None = None
    integer: Annotated[tuple[int, int], Field(strict=False)] | None = None  # both ends among them
    when: dict[str, list[Any]] = {}  # only in points where an earlier parameter has one of these values

    @model_validator(mode="after")
    def _one_kind(self) -> "Parameter":
        spans = [s for s in (self.uniform, self.log_uniform, self.integer) if s]
        if len(spans) + (self.choice is not None) != 1:
            raise ValueError("expected a list, or one of choice, uniform, log_uniform, integer")
        for low, high in spans:
            if not low < high <= 2**53 or low < -(2**53) or (self.log_uniform and low <= 0):
                raise ValueError(f"[{low:g}, {high:g}]: expected two rising numbers, of log_uniform above 0")
        return self

    def holds(self, point: Point) -> bool:
        return all(field in point and point[field] in values for field, values in self.when.items())


def _short(value: Any) -> Any:
    if isinstance(value, list):
        return {"choice": value}
    if not isinstance(value, dict | Parameter):
        raise ValueError(f"expected a list of values, or a range such as {{uniform: [0, 1]}}, got {value!r}")
    return value


class Asha(Section):
    """Early stopping: at epochs grace, grace * reduction, ... the best 1/reduction go on (arXiv 1810.05934).

    brackets above 1: as asynchronous HyperBand, a trial falls into one of that many, each with a grace
    `reduction` times as long as the one before.
    """

    grace_epochs: Positive = 1
    reduction: Annotated[int, Field(ge=2)] = 2
    brackets: Annotated[int, Field(ge=1, le=8)] = 1


class Pbt(Section):
    """Population based training (arXiv 1711.09846), in generations over our checkpoints.

    In each every member is a run of the recipe's epochs. It begins with the weights of its parent: itself,
    or for the worst quarter one of the best quarter, whose numbers it takes times 0.8 or 1.25. Optimizer
    and schedule begin anew.
    """

    population: Annotated[int, Field(ge=4)] = 8
    generations: Annotated[int, Field(ge=2)] = 4


class Sweep(Section):
    """A base recipe, and for some of its fields what to try."""

    name: Name
    train: str
    overrides: list[str] = []
    parameters: Annotated[dict[str, Annotated[Parameter, BeforeValidator(_short)]], Field(min_length=1)]
    sampler: Literal["grid", "random", "tpe", "pbt"] = "grid"
    points: Positive | None = None  # of random and tpe
    sampler_seed: Annotated[int, Field(ge=0)] = 0
    seeds: Positive = 1  # runs of each point: with the recipe's seed, and the next ones
    metric: str = "val/top1"
    mode: Literal["max", "min"] = "max"
    trade_off: Literal["params", "gflops"] | None = None  # of tpe: a second aim, the smaller the better
    asha: Asha | None = None
    pbt: Pbt | None = None
    baseline: Point | None = None  # the point that a report compares the others with

    @model_validator(mode="after")
    def _fits_together(self) -> "Sweep":
        if (self.sampler in ("random", "tpe")) != (self.points is not None):
            raise ValueError(
                f"points: sampler {self.sampler} needs " + ("none" if self.points else "a number")
            )
        if self.metric not in METRICS:
            there_are = ", ".join(METRICS)
            raise ValueError(f"metric {self.metric} is unknown{suggest(self.metric, METRICS)} ({there_are})")
        if self.asha and self.asha.grace_epochs * self.asha.reduction ** (self.asha.brackets - 1) > 10**5:
            raise ValueError("asha: the last bracket's grace is above 100,000 epochs")
        if (self.sampler == "pbt") != (self.pbt is not None):
            raise ValueError("pbt: expected with sampler pbt, and only there")
        if self.sampler == "pbt" and (self.asha or self.seeds > 1):
            raise ValueError("sampler pbt takes neither asha nor seeds: a member is replaced, not stopped")
        if self.trade_off and self.sampler != "tpe":
            raise ValueError("trade_off: expected with sampler tpe")
        if self.seeds > 1 and "seed" in self.parameters:
            raise ValueError("seeds: expected 1 where seed itself is a parameter")
        known: set[str] = set()
        for field, parameter in self.parameters.items():
            if self.sampler == "grid" and parameter.choice is None:
                raise ValueError(f"parameters: {field} is a range; sampler grid needs a list of values")
            if missing := set(parameter.when) - known:
                raise ValueError(
                    f"parameters: {field} is tied to {', '.join(sorted(missing))}, which must stand before it"
                )
            for other, values in parameter.when.items():
                choices = self.parameters[other].choice
                if choices is not None and (strange := [v for v in values if v not in choices]):
                    raise ValueError(
                        f"parameters: {field} is tied to {other}={strange[0]!r}, which it never is"
                    )
            known.add(field)
        return self

    @property
    def size(self) -> int:
        """Trials at most."""
        if self.pbt:
            return self.pbt.population * self.pbt.generations
        return self.seeds * (self.points or sum(1 for _ in grid(self)))


class Trial(NamedTuple):
    """A point with a seed, and the run that it stands for, which need not be there yet."""

    point: Point
    seed: int
    overrides: tuple[str, ...]
    plan: "Plan"


class Outcome(NamedTuple):
    """How a trial ended: state, completed epochs, the metrics of the last, seconds trained."""

    run: str
    point: Point
    seed: int
    overrides: tuple[str, ...]
    state: State
    epoch: int
    metrics: dict[str, float]
    seconds: float


# --- points ------------------------------------------------------------------------------------------------


def draw(sweep: Sweep, pick: Callable[[str, Parameter], Any]) -> Point:
    """A point of the space, its values picked in turn."""
    point: Point = {}
    for field, parameter in sweep.parameters.items():
        if parameter.holds(point):
            point[field] = pick(field, parameter)
    return point


def grid(sweep: Sweep) -> Iterator[Point]:
    """Every point of a space of choices; the last parameter changes fastest."""

    def extend(point: Point, rest: Sequence[tuple[str, Parameter]]) -> Iterator[Point]:
        if not rest:
            yield point
            return
        (field, parameter), *others = rest
        if not parameter.holds(point):
            yield from extend(point, others)
            return
        for value in parameter.choice or ():
            yield from extend({**point, field: value}, others)

    yield from extend({}, list(sweep.parameters.items()))


def random_points(sweep: Sweep, count: int) -> list[Point]:
    """Points drawn evenly, the same for the same sampler_seed; of more the first are those of fewer."""
    rng = np.random.default_rng(sweep.sampler_seed)
    return [draw(sweep, lambda _, parameter: pick_random(parameter, rng)) for _ in range(count)]


def pick_random(parameter: Parameter, rng: np.random.Generator) -> Any:
    if parameter.choice is not None:
        return parameter.choice[int(rng.integers(len(parameter.choice)))]
    if parameter.integer:
        return int(rng.integers(parameter.integer[0], parameter.integer[1] + 1))
    if parameter.uniform:
        return within(parameter.uniform, float(rng.uniform(*parameter.uniform)))
    low, high = parameter.log_uniform or (1.0, 1.0)
    return within((low, high), math.exp(float(rng.uniform(math.log(low), math.log(high)))))


def within(span: Span, value: float) -> float:
    """Four digits: enough for a setting, and readable in a table; rounding does not leave the range."""
    return min(max(float(f"{value:.4g}"), span[0]), span[1])


# --- trials ------------------------------------------------------------------------------------------------


def trials_of(
    out: Out, sweep: Sweep, point: Point, extra: Sequence[str] = (), *, later: int = 0
) -> list[Trial]:
    """The trials of a point, one a seed; the seeds are `later` ones. ConfigError if it cannot be."""
    from pipeline.plan import plan  # torch, which a report needs not

    first = load(Config, "train", sweep.train, sweep.overrides).seed + later
    found = []
    for seed in [first + i for i in range(sweep.seeds)] if "seed" not in point else [point["seed"]]:
        fields = {field: json.dumps(value, ensure_ascii=False) for field, value in point.items()}
        values = [f"{field}={text}" for field, text in fields.items() if field != "seed"]
        settings = (*sweep.overrides, *values, *extra, f"seed={seed}")
        planned = plan(out, load(Config, "train", sweep.train, settings))
        found.append(Trial(point, seed, settings, planned))
    return found


def lay_out(points: Sequence[Point], trials: Callable[[Point], list[Trial]]) -> tuple[list[Trial], list[str]]:
    """The trials of these points, equal ones once; and what is wrong with the points that cannot be."""
    found: dict[str, Trial] = {}
    faults: list[str] = []
    for point in points:
        try:
            for trial in trials(point):
                found.setdefault(trial.plan.run.name, trial)
        except ConfigError as error:
            faults.append(f"{name_of(point)}: {error}")
    return list(found.values()), faults


def stated_points(sweep: Sweep) -> list[Point]:
    """The points that are known before anything runs; of tpe and pbt as many random ones in their place."""
    if sweep.sampler == "grid":
        return list(grid(sweep))
    return random_points(sweep, sweep.points or (sweep.pbt.population if sweep.pbt else 0))


def name_of(point: Point) -> str:
    """A point in one line."""
    return " ".join(f"{field}={_plain(value)}" for field, value in point.items())


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# --- outcomes ----------------------------------------------------------------------------------------------

FIXED = ("train", "overrides", "sampler", "sampler_seed", "metric", "mode", "trade_off", "asha", "pbt")


def begin(folder: SweepDir, sweep: Sweep, *, replace: bool = False) -> None:
    """Write the sweep down. InputError where it has begun otherwise: its outcomes would not be comparable.

    What may change: points and seeds (more or fewer), the choices of grid and random, the baseline.
    replace: forget the outcomes of a sweep that was another one; their runs stay.
    """
    if folder.config.exists():
        old = read(folder)
        fixed = (*FIXED, "parameters") if sweep.sampler in ("tpe", "pbt") else FIXED
        changed = [field for field in fixed if getattr(old, field) != getattr(sweep, field)]
        if changed and not replace:
            field = changed[0]
            raise InputError(
                f"sweep {sweep.name} was begun with another {', '.join(changed)} ({field}: "
                f"{getattr(old, field)!r} then, {getattr(sweep, field)!r} now); what may change: points, seeds, "
                "the lists of grid and random, baseline; next: another name, or --replace, which forgets its "
                "outcomes and keeps the runs"
            )
        if changed:
            folder.outcomes.unlink(missing_ok=True)
            folder.points.unlink(missing_ok=True)
    write_atomic(folder.config, dump(sweep))
    for lines in (folder.outcomes, folder.points):
        _cut_torn(lines)


def _cut_torn(lines: Path) -> None:
    """Cut off half a last line, of a power loss or a full disk: the next one would be glued to it."""
    data = lines.read_bytes() if lines.exists() else b""
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        write_atomic(lines, whole)


def read(folder: SweepDir) -> Sweep:
    """The settings of a sweep that has begun. InputError if there is none."""
    if not folder.config.exists():
        known = sorted(p.parent.name for p in folder.path.parent.glob("*/sweep.yaml"))
        raise InputError(
            f"sweep {folder.name}: not found in {folder.path.parent}; there are: {', '.join(known) or 'none'}"
        )
    return validate(Sweep, read_yaml(folder.config), where=str(folder.config))


def record(folder: SweepDir, outcome: Outcome) -> None:
    """Write an outcome down, for good."""
    append_line(folder.outcomes, outcome._asdict())


def outcomes(folder: SweepDir) -> dict[str, Outcome]:
    """The last outcome of each run, in the order in which they first ended."""
    found = {}
    for row in read_lines(folder.outcomes):
        found[row["run"]] = Outcome(**{**row, "overrides": tuple(row["overrides"])})
    return found


def best(sweep: Sweep, ended: Sequence[Outcome]) -> Outcome:
    """The first run of the point whose seeds have the best mean of the metric. ConfigError if none has it.

    A point counts with all of its seeds, or not at all, and behind all others if one of them was stopped
    early; of pbt each run by itself, for a point that lives on has one in each generation.
    """
    sign = 1 if sweep.mode == "max" else -1
    groups: dict[str, list[Outcome]] = {}
    for outcome in ended:
        point = {field: value for field, value in outcome.point.items() if field != "seed"}
        key = outcome.run if sweep.pbt else json.dumps(point, sort_keys=True)
        groups.setdefault(key, []).append(outcome)
    means = []
    for group in groups.values():
        values = [o.metrics.get(sweep.metric, math.nan) for o in group if o.state != "failed"]
        if len(values) == len(group) >= sweep.seeds and all(map(math.isfinite, values)):
            finished = all(o.state == "finished" for o in group)
            means.append(((finished, sign * sum(values) / len(values)), group[0]))
    if not means:
        raise ConfigError(
            f"sweep {sweep.name}: no point has a finite {sweep.metric} in all of its seeds; "
            "see the error.log of its runs"
        )
    return max(means, key=lambda pair: pair[0])[1]
