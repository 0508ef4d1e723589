"""What a sweep would train, before anything runs: its points, what they cost, device-hours, disk."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, NamedTuple

from pipeline import checkpoint, metrics
from pipeline.config import Config, InputError, Resources, flat, read_yaml, validate
from pipeline.order import steps_per_epoch
from pipeline.plan import Plan, train_samples
from pipeline.rundir import Out, RunDir, read_json
from pipeline.sweep import Outcome, Sweep, Trial, outcomes
from pipeline.tables import table
from pipeline.tune import known_outcome

LOOK_AT = 30  # runs, the newest, among which one that was measured is looked for
SLOTS = {"sgd": 1, "adamw": 2, "lamb": 2}  # numbers that an optimizer keeps for each weight
TO_KNOW = "--tflops X (TFLOP/s that one device reaches in training), or train one run for an epoch"


class Total(NamedTuple):
    """What is left of a sweep; device_hours None: nothing tells how fast a device is."""

    trials: int
    to_run: int
    device_hours: float | None
    disk_mb: float


class Preview(NamedTuple):
    """A row a point, their total, and what has to be known of both."""

    rows: list[dict[str, Any]]
    total: Total
    notes: list[str]


class Speed(NamedTuple):
    """Training FLOP/s that one device reaches, who says so, and of which network at which size."""

    flops: float
    source: str
    network: tuple[str, int] | None = None


class _Left(NamedTuple):
    """What is left to do of a trial."""

    trial: Trial
    state: str
    device_hours: float | None
    disk_mb: float


def preview(
    sweep: Sweep, trials: Sequence[Trial], *, out: Out, resources: Resources, tflops: float | None = None
) -> Preview:
    """What these trials of a sweep cost, one row a point; nothing is written.

    tflops: TFLOP/s that one device reaches in training; without it a run below `out` tells. A device is what
    one worker trains on: `resources.gpus_per_worker`, or its CPUs.

    Hours and disk are of what is left: nothing where a trial has ended. An estimate counts what a network
    computes, 3 forward passes for a train image and 1 for a val image, all at data.image_size. So it tells
    nothing of a loader that is too slow, is too high for pictures that grow (data.start_size), and leaves
    out what a larger data.test_size costs. Activation memory is that of float32 (see gsa_models/cost.py).
    Raises InputError: tflops not above 0.
    """
    known, recorded = _known_speeds(out, resources, tflops), outcomes(out.sweep(sweep.name))
    speeds = [_speed(trial.plan, known) for trial in trials]
    pairs = list(zip(trials, speeds, strict=True))
    if sweep.sampler in ("tpe", "pbt"):
        left = [_all_of(trial, "stand-in", speed) for trial, speed in pairs]
        total = _scaled(left, sweep.size, sum(o.state != "failed" for o in recorded.values()))
    else:
        left = [_left_of(trial, recorded.get(trial.plan.run.name), speed) for trial, speed in pairs]
        total = _total(left)
    points: dict[str, list[_Left]] = {}
    for one in left:
        points.setdefault(json.dumps(one.trial.point, sort_keys=True), []).append(one)
    notes = [*_notes_of_sampler(sweep), *_notes_of_speed(speeds, total, resources)]
    return Preview([_row(sweep, group) for group in points.values()], total, notes)


def text(found: Preview, faults: Sequence[str] = ()) -> str:
    """All of it for people: the table, what cannot be, the notes, the total."""
    total = found.total
    hours = "an unknown number of" if total.device_hours is None else f"{total.device_hours:.4g}"
    wrong = [f"{len(faults)} points cannot be:", *(f"  {fault}" for fault in faults)] if faults else []
    last = (
        f"total: {total.trials} trials, {total.to_run} of them to run: {hours} device-hours, "
        f"{total.disk_mb:,.1f} MB of checkpoints"
    )
    return "\n".join([table(found.rows), *wrong, *found.notes, last])


def check_budget(total: Total, hours: float) -> None:
    """InputError where what is left takes more device-hours than these, or nobody knows how many."""
    if total.device_hours is None:
        raise InputError(
            f"--budget {hours:g}: expected an estimate to compare it with, got none, since no run tells how "
            f"fast a device is; next: {TO_KNOW}"
        )
    if not total.device_hours <= hours:
        raise InputError(
            f"--budget {hours:g}: expected at most {hours:g} device-hours, got {total.device_hours:.4g} "
            f"for the {total.to_run} trials to run; next: fewer points, seeds or epochs, or "
            f"--budget {math.ceil(total.device_hours)}"
        )


# --- a trial -----------------------------------------------------------------------------------------------


def _left_of(trial: Trial, recorded: Outcome | None, speed: Speed | None) -> _Left:
    if known_outcome(trial, recorded):
        return _Left(trial, "done", 0.0, 0.0)
    run = trial.plan.run
    if not any(run.checkpoints.glob("step-*")):
        return _all_of(trial, "new", speed)
    records = metrics.epoch_records(run)
    return _all_of(trial, "goes on", speed, behind=round(records[-1].epoch) if records else 0)


def _all_of(trial: Trial, state: str, speed: Speed | None, *, behind: int = 0) -> _Left:
    """A trial but for the epochs that are behind it."""
    epochs = trial.plan.config.optim.epochs - behind
    hours = epochs * flops_per_epoch(trial.plan) / speed.flops / 3600 if speed else None
    return _Left(trial, state, hours, disk_bytes(trial.plan) / 1e6)


def flops_per_epoch(plan: Plan) -> float:
    """Of training, forth and back, and of the evaluation after it, which averaged weights double."""
    optim, samples = plan.config.optim, train_samples(plan.config, plan.manifest)
    trained = steps_per_epoch(samples, optim.global_batch) * optim.global_batch
    evaluated = len(plan.manifest.split("val")) * (2 if optim.ema else 1)
    return plan.cost.flops * (3.0 * trained + evaluated)


def disk_bytes(plan: Plan) -> int:
    """Of the checkpoints that a finished run keeps, at most: the newest two, and the best where it is older."""
    optim, weights = plan.config.optim, 4 * plan.cost.params
    slots = 0 if optim.name == "sgd" and not optim.momentum else SLOTS[optim.name]
    kept = min(optim.epochs, checkpoint.KEEP + 1)
    first = 1 if plan.config.init else 0  # the weights that it begins with lie in its folder
    return weights * (kept * (1 + slots + bool(optim.ema)) + first)


# --- points and totals -------------------------------------------------------------------------------------


def _row(sweep: Sweep, group: Sequence[_Left]) -> dict[str, Any]:
    """One point, in its canonical spelling; null as in YAML, None where a parameter is not in it."""
    point, plan = group[0].trial.point, group[0].trial.plan
    settings, side = flat(plan.config), plan.config.data.image_size
    activations = plan.cost.activation_bytes * plan.config.optim.micro_batch / 2**20
    hours = _sum(one.device_hours for one in group)
    return {
        **{f: _word(settings.get(f, point[f])) if f in point else None for f in sweep.parameters},
        "seeds": len(group),
        "input": f"3x{side}x{side}",
        "params": plan.cost.params,
        "GFLOPs": round(plan.cost.flops / 1e9, 4),
        "activation MiB": round(activations, 1),
        "epochs": plan.config.optim.epochs,
        "state": _states(group),
        "device-hours": None if hours is None else float(f"{hours:.4g}"),
        "disk MB": round(sum(one.disk_mb for one in group), 1),
    }


def _word(value: Any) -> Any:
    return "null" if value is None else value


def _states(group: Sequence[_Left]) -> str:
    counts = Counter(one.state for one in group)
    return ", ".join(state if len(counts) == 1 else f"{n} {state}" for state, n in counts.items())


def _total(left: Sequence[_Left]) -> Total:
    to_run = sum(one.state != "done" for one in left)
    return Total(len(left), to_run, _sum(x.device_hours for x in left), sum(x.disk_mb for x in left))


def _scaled(left: Sequence[_Left], trials: int, ended: int) -> Total:
    """The mean of trials that stand for others, times the number of those that have not ended."""
    to_run = max(0, trials - ended)
    one, share = _total(left), to_run / max(1, len(left))
    hours = None if one.device_hours is None else one.device_hours * share
    return Total(trials, to_run, hours, one.disk_mb * share)


def _sum(values: Iterable[float | None]) -> float | None:
    total = 0.0
    for value in values:
        if value is None:
            return None
        total += value
    return total


def _notes_of_sampler(sweep: Sweep) -> Iterator[str]:
    if sweep.sampler in ("tpe", "pbt"):
        yield (
            f"sampler {sweep.sampler} finds its points as it goes: these are random ones in their place, and "
            f"the total is {sweep.size} times their mean, less what has ended"
        )
    if sweep.asha:
        yield "ASHA ends trials early: hours and disk are the most that it may take"


def _notes_of_speed(speeds: Sequence[Speed | None], total: Total, resources: Resources) -> Iterator[str]:
    for speed in dict.fromkeys(speeds):
        if speed:
            yield f"hours at {speed.flops / 1e12:.3g} TFLOP/s a device, {speed.source}"
    if total.device_hours is None:
        kind = "GPUs" if resources.gpus_per_worker else "CPUs"
        yield f"hours are not known: no run here has trained an epoch on {kind}; next: {TO_KNOW}"


# --- how fast a device is ----------------------------------------------------------------------------------


def _speed(plan: Plan, known: Sequence[Speed]) -> Speed | None:
    """Of the same network at the same size if that is known, else of any."""
    network = plan.config.model.name, plan.config.data.image_size
    return next((speed for speed in known if speed.network == network), known[0] if known else None)


def _known_speeds(out: Out, resources: Resources, tflops: float | None) -> list[Speed]:
    """As given; else as measured by runs of the same kind of device, the newest first."""
    if tflops is None:
        cuda = resources.gpus_per_worker > 0
        return [speed for run in _newest_runs(out) if (speed := measured_speed(run, cuda=cuda))]
    if not 0 < tflops < math.inf:
        raise InputError(f"--tflops {tflops:g}: expected a number above 0; next: 150, say, for a large GPU")
    return [Speed(tflops * 1e12, "as given by --tflops")]


def _newest_runs(out: Out) -> Iterable[RunDir]:
    journals = (out.root / "runs").glob("*/metrics.jsonl")
    newest = sorted(journals, key=lambda path: path.stat().st_mtime, reverse=True)
    return (RunDir(path.parent) for path in islice(newest, LOOK_AT))


def measured_speed(run: RunDir, *, cuda: bool) -> Speed | None:
    """What a device reached in a run, by the mean pace of its journal; None: no epoch yet, or another device."""
    with suppress(InputError):  # a folder that is damaged, or of other code: the next one may tell
        records = metrics.read(run.metrics)
        if any("perf/memory_gb" in r.metrics for r in records) != cuda:  # recorded on CUDA alone
            return None
        paces = list(_paces(records))
        if paces:
            config = validate(Config, read_yaml(run.config), where=str(run.config))
            name, side = config.model.name, config.data.image_size
            flops = 3e9 * read_json(run.facts)["gflops"] * sum(paces) / len(paces)
            return Speed(flops, f"measured on run {run.name} ({name}, {side} pixels)", (name, side))
    return None


def _paces(records: Sequence[metrics.Record]) -> Iterator[float]:
    """Images a second and device; the workers of an epoch are told at its end."""
    world = None  # of an epoch that has not ended
    for record in reversed(records):
        world = record.metrics.get("perf/world", 1.0 if "val/count" in record.metrics else world)
        if world and (pace := record.metrics.get("perf/images_per_s")):
            yield pace / world
