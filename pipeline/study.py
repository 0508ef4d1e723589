"""Runs -> a study: its points with mean, 95 % interval, difference from a baseline, cost, the paper's figure.

A point is what the runs of several seeds have in common. All figures come from the journals of the runs.
"""

import json
import math
import re
import shlex
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy.special import ndtr, stdtrit  # not scipy.stats, which takes a second to import

from pipeline import metrics
from pipeline.config import Config, InputError, ModelConfig, flat, parse_yaml, read_yaml, validate
from pipeline.metrics import Record
from pipeline.rundir import Out, RunDir, read_json
from pipeline.sweep import Outcome, Point, State, name_of

CONFIDENCE = 0.95
Cost = Literal["params", "gflops"]

PAPER_TOP1 = {  # one crop of 224 pixels, the paper's own recipe: how each is known, as shared/PAPER.md marks it
    "gsa_resnet38": "about 78 [recalled, weak]",
    "gsa_resnet50": "78.5 [seen]",
    "gsa_resnet101": "79.6 [recalled]",
    "resnet38": "76.0 [seen, other paper]",
    "resnet50": "76.9 [seen]",
    "resnet101": "77.9 [seen, other paper]",
}
WORDNET = re.compile(r"n\d{8}")  # what ImageNet's classes are called


class Run(NamedTuple):
    """A run of a study, and what its folder tells of it."""

    outcome: Outcome
    config: Config
    facts: dict[str, Any]
    records: tuple[Record, ...]  # one an epoch, up to the outcome's

    @property
    def last(self) -> dict[str, float]:
        return self.records[-1].metrics if self.records else {}

    @property
    def images_per_s(self) -> float:
        """Mean over the epochs after the first, which warms up; NaN without any."""
        found = [r.metrics["perf/images_per_s"] for r in self.records if "perf/images_per_s" in r.metrics]
        return _mean(found[1:] or found)

    @property
    def device_hours(self) -> float:
        """Of all workers, over the recorded epochs."""
        seconds = (r.metrics.get("perf/epoch_s", 0.0) * r.metrics.get("perf/world", 1) for r in self.records)
        return sum(seconds) / 3600

    @property
    def is_convolution(self) -> bool:
        """Whether the network has no GSA module."""
        placement = self.config.model.placement
        if placement is None:
            return not self.config.model.name.startswith("gsa_")
        return placement == "none" or set(placement) <= set("c/")


class Estimate(NamedTuple):
    """Of n values: mean, sample standard deviation, half of the interval. NaN where n is too small for one."""

    n: int
    mean: float
    std: float
    half: float

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half


class Difference(NamedTuple):
    """Of two points, paired by seed; the seeds that only one of them has are left out."""

    score: Estimate
    left_out: tuple[int, ...]


class Twin(NamedTuple):
    """The point without GSA that costs most nearly the same. apart: how much more it costs, as a share."""

    point: Point
    apart: float
    difference: Difference


class Row(NamedTuple):
    """A point: all of its runs, and the metric of those that finished, by seed."""

    point: Point
    runs: tuple[Run, ...]
    scores: dict[int, float]
    score: Estimate
    difference: Difference | None = None
    twin: Twin | None = None

    @property
    def params(self) -> int:
        return int(self.runs[0].facts["params"])

    @property
    def gflops(self) -> float:
        return float(self.runs[0].facts["gflops"])

    @property
    def images_per_s(self) -> float:
        return _mean([run.images_per_s for run in self.runs if not math.isnan(run.images_per_s)])

    @property
    def device_hours(self) -> float:
        """Of all of its runs, those that did not finish among them."""
        return sum(run.device_hours for run in self.runs)

    def count(self, state: State) -> int:
        return sum(run.outcome.state == state for run in self.runs)

    @property
    def finished(self) -> tuple[Run, ...]:
        return tuple(run for run in self.runs if run.outcome.state == "finished")


class Study(NamedTuple):
    """Points, the best first; those without a finished run last."""

    metric: str
    mode: Literal["max", "min"]
    fields: tuple[str, ...]  # in which the points differ
    constant: Point  # what all of them have
    rows: tuple[Row, ...]
    baseline: Point | None
    iso: Cost | None

    def name(self, point: Point) -> str:
        """A point in one short line, by the fields in which the points differ."""
        return name_of({self.short(f): point[f] for f in self.fields if f in point}) or "all runs"

    def short(self, field: str) -> str:
        """A field without its section, where no other field is called so."""
        end = field.rpartition(".")[2]
        return end if [f.rpartition(".")[2] for f in self.fields].count(end) == 1 else field


class Luck(NamedTuple):
    """By how much the best of equally good points beats their mean by chance, and what that was reckoned from."""

    points: int
    bias: float
    error: float  # standard error of the mean of a point of n seeds
    n: int
    std: float  # pooled over the points
    freedom: int  # its degrees of freedom


# --- runs --------------------------------------------------------------------------------------------------


def outcomes_of(out: Out, names: Sequence[str]) -> list[Outcome]:
    """Runs as the outcomes of a study: a point is the settings in which they differ, seed apart.

    names: of runs, or their paths; one given twice counts once. InputError: no such run.
    """
    folders = list({run.path: run for run in map(out.find_run, names)}.values())
    configs = [_config(run) for run in folders]
    settings = [flat(config) for config in configs]
    fields = [field for field in flat(Config()) if field != "seed" and _differ(settings, field)]
    found = []
    for run, config, values in zip(folders, configs, settings, strict=True):
        records = metrics.epoch_records(run)
        found.append(
            Outcome(
                run=str(run.path) if run != out.run(run.name) else run.name,
                point={field: values[field] for field in fields},
                seed=config.seed,
                overrides=(),
                state="finished" if run.result.exists() else "stopped",
                epoch=round(records[-1].epoch) if records else 0,
                metrics=records[-1].metrics if records else {},
                seconds=sum(r.metrics.get("perf/epoch_s", 0.0) for r in records),
            )
        )
    return found


def read_runs(out: Out, ended: Iterable[Outcome]) -> list[Run]:
    """What the folders of these runs tell. InputError: one is not there, or cannot be read."""
    found = []
    for outcome in ended:
        run = out.find_run(outcome.run)
        records = (r for r in metrics.epoch_records(run) if round(r.epoch) <= outcome.epoch)
        found.append(Run(outcome, _config(run), read_json(run.facts), tuple(records)))
    return found


def _config(run: RunDir) -> Config:
    return validate(Config, read_yaml(run.config), where=str(run.config))


# --- the study ---------------------------------------------------------------------------------------------


def study(
    runs: Sequence[Run],
    *,
    metric: str = "val/top1",
    mode: Literal["max", "min"] = "max",
    baseline: Point | None = None,
    iso: Cost | None = None,
) -> Study:
    """The points of these runs, and how they compare.

    Means are over finished runs: one that was stopped has trained for fewer epochs. Of several runs of a
    point with the same seed (PBT has such) the last counts.
    baseline: fields that fit one point alone, which each other point is compared with.
    iso: compare each GSA point with the convolutional one that costs most nearly the same.
    Raises InputError: no run has the metric; no or several points fit the baseline; none is convolutional.
    """
    known = sorted({key for run in runs for key in run.last})
    if metric not in known:
        raise InputError(
            f"metric {metric}: none of {len(runs)} runs has it; "
            + (f"there are: {', '.join(known)}" if known else "none has ended an epoch; next: train on")
        )
    rows = _rows(runs, metric)
    sign = -1 if mode == "max" else 1
    rows.sort(key=lambda row: math.inf if math.isnan(row.score.mean) else sign * row.score.mean)
    chosen = _baseline(rows, baseline) if baseline else None
    if chosen:
        rows = [_less(row, chosen) for row in rows]
    if iso:
        rows = _with_twins(rows, iso)
    points = [row.point for row in rows]
    fields = list(dict.fromkeys(field for point in points for field in point))
    varying = tuple(field for field in fields if _differ(points, field))
    constant = {field: points[0][field] for field in fields if field not in varying}
    return Study(metric, mode, varying, constant, tuple(rows), chosen.point if chosen else None, iso)


def estimate(values: Sequence[float]) -> Estimate:
    """Mean, sample standard deviation, and half of the 95 % interval of the mean by Student's t."""
    n, x = len(values), np.asarray(values, dtype=float)
    std = float(x.std(ddof=1)) if n > 1 else math.nan
    half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * std / math.sqrt(n) if n > 1 else math.nan
    return Estimate(n, _mean(values), std, half)


def paired(ours: dict[int, float], theirs: dict[int, float]) -> Difference:
    """Ours minus theirs, seed by seed: what a seed does to both of them cancels."""
    common = sorted(ours.keys() & theirs.keys())
    return Difference(
        estimate([ours[seed] - theirs[seed] for seed in common]), tuple(sorted(ours.keys() ^ theirs.keys()))
    )


def parse_point(text: str) -> Point:
    """`field=value field=value` as a point. InputError if it is none."""
    try:
        parts = [part.partition("=") for part in shlex.split(text)]
    except ValueError as error:
        raise InputError(f"point {text!r}: {error}") from None
    if not parts or not all(field and equals for field, equals, _ in parts):
        raise InputError(f"point {text!r}: expected field=value, and more of them behind a space")
    return {field: parse_yaml(value, f"point {field}") for field, _, value in parts}


def luck(study: Study) -> Luck | None:
    """What chance alone gives the best of the compared points; None where no seed was repeated."""
    groups = [row for row in study.rows if row.score.n > 1]
    compared = [row for row in study.rows if any(study.metric in run.last for run in row.runs)]
    freedom = sum(row.score.n - 1 for row in groups)
    if not freedom or len(compared) < 2:
        return None
    std = math.sqrt(sum((row.score.n - 1) * row.score.std**2 for row in groups) / freedom)
    n = study.rows[0].score.n
    error = std / math.sqrt(n)
    return Luck(len(compared), expected_largest(len(compared)) * error, error, n, std, freedom)


def expected_largest(count: int) -> float:
    """Mean of the largest of `count` independent standard normal numbers, to 1e-6."""
    x = np.linspace(-10, 10, 20_001)
    density = count * np.exp(-x * x / 2) / math.sqrt(2 * math.pi) * ndtr(x) ** (count - 1)
    return float(np.trapezoid(x * density, x))


def paper_figure(row: Row, metric: str) -> str | None:
    """What the paper reports of this network on ImageNet at 224 pixels, and how surely that is known."""
    config, classes = row.runs[0].config, row.runs[0].facts.get("classes", [])
    model = config.model
    default = ModelConfig(name=model.name)
    own = "gggg" if model.name.startswith("gsa_") else "cccc"
    if (
        metric != "val/top1"
        or len(classes) != 1000
        or not all(map(WORDNET.fullmatch, classes))
        or not config.data.image_size == config.data.eval_size == 224
        or model.placement not in (None, own)
        or model.model_copy(update={"placement": None}) != default
    ):
        return None
    return PAPER_TOP1.get(model.name)


def label(metric: str) -> str:
    """A metric as people write it: val/top1 is val top-1 %."""
    return re.sub(r"/top(\d)$", r" top-\1 %", metric)


def value_text(metric: str, value: float, sign: str = "") -> str:
    """A value of a metric: percentages with two decimals, others with four digits; nothing of NaN."""
    if not math.isfinite(value):
        return ""
    return format(value, f"{sign}.2f" if "/top" in metric else f"{sign}.4g")


def _rows(runs: Sequence[Run], metric: str) -> list[Row]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(_key(_apart_from_seed(run.outcome.point)), []).append(run)
    rows = []
    for group in groups.values():
        scores = {
            run.outcome.seed: run.last[metric]
            for run in group
            if run.outcome.state == "finished" and math.isfinite(run.last.get(metric, math.nan))
        }
        score = estimate(list(scores.values()))
        rows.append(Row(_apart_from_seed(group[0].outcome.point), tuple(group), scores, score))
    return rows


def _baseline(rows: Sequence[Row], wanted: Point) -> Row:
    """The one row that fits. A field that is none of its point is looked up in its settings."""

    def fits(row: Row, field: str, value: Any) -> bool:
        known = [flat(row.runs[0].config), row.point]
        return any(field in values and _key(values[field]) == _key(value) for values in known)

    found = [row for row in rows if all(fits(row, *item) for item in wanted.items())]
    if len(found) != 1:
        listed = "; ".join(name_of(row.point) or "all runs" for row in (found or rows)[:20])
        raise InputError(
            f"baseline {name_of(wanted)}: expected it to fit one point, got "
            + (
                f"{len(found)}: {listed}; next: name more fields"
                if found
                else f"none of {len(rows)}: {listed}"
            )
        )
    return found[0]


def _less(row: Row, baseline: Row) -> Row:
    return row if row is baseline else row._replace(difference=paired(row.scores, baseline.scores))


def _with_twins(rows: Sequence[Row], iso: Cost) -> list[Row]:
    others = [row for row in rows if row.runs[0].is_convolution and row.score.n]
    if not others:
        raise InputError(
            f"--iso {iso}: none of {len(rows)} points is a finished convolutional network "
            "(model.placement=none, or model.name without gsa_); next: add one to the sweep, or leave --iso out"
        )
    return [
        row if row.runs[0].is_convolution else row._replace(twin=_nearest(row, others, iso)) for row in rows
    ]


def _nearest(row: Row, others: Sequence[Row], iso: Cost) -> Twin:
    def distance(other: Row) -> tuple[float, int]:
        same = sum(_key(row.point.get(field)) == _key(value) for field, value in other.point.items())
        return abs(getattr(other, iso) - getattr(row, iso)), -same  # of equal costs: the most alike

    nearest = min(others, key=distance)
    apart = getattr(nearest, iso) / getattr(row, iso) - 1
    return Twin(nearest.point, apart, paired(row.scores, nearest.scores))


def _apart_from_seed(point: Point) -> Point:
    return {field: value for field, value in point.items() if field != "seed"}


def _differ(points: Sequence[Point], field: str) -> bool:
    return len({_key(point[field]) if field in point else None for point in points}) > 1


def _key(value: Any) -> str:
    """Equal for equal values: 1 and 1.0 are, 1 and true are not."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, dict):
        return json.dumps({field: _key(item) for field, item in value.items()}, sort_keys=True)
    return json.dumps(value)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else math.nan
