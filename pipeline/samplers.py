"""Where the trials of a sweep come from: a list, Optuna, a population; each from the outcomes so far alone."""

import json
import logging
import math
import warnings
from collections import deque
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np

from pipeline.config import InputError
from pipeline.metrics import append_line, read_lines
from pipeline.rundir import SweepDir
from pipeline.sweep import (
    Outcome,
    Parameter,
    Point,
    Sweep,
    Trial,
    draw,
    name_of,
    pick_random,
    within,
)

log = logging.getLogger("gsa")

SHRINK, GROW = 0.8, 1.25  # what PBT multiplies a number with


class MakeTrials(Protocol):
    """sweep.trials_of for one sweep, with all that can be refused about a point. Raises InputError."""

    def __call__(self, point: Point, extra: Sequence[str] = (), *, later: int = 0) -> list[Trial]: ...


class Source(Protocol):
    """Trials, one by one; whoever takes one tells its outcome, be it known already."""

    def next(self) -> Trial | None:
        """The next trial; None while there is none, be it until another has ended."""

    def tell(self, trial: Trial, outcome: Outcome) -> None:
        """A trial that `next` gave has ended."""

    @property
    def exhausted(self) -> bool:
        """Whether no trial will come any more, whatever is told."""


class Listed:
    """Trials that are known before: grid and random."""

    def __init__(self, trials: Sequence[Trial]) -> None:
        self._left = deque(trials)

    def next(self) -> Trial | None:
        return self._left.popleft() if self._left else None

    def tell(self, trial: Trial, outcome: Outcome) -> None:
        pass

    @property
    def exhausted(self) -> bool:
        return not self._left


class Suggested:
    """Points that Optuna's TPE thinks of (tree-structured Parzen estimator; arXiv 2304.11127).

    Each is written down before it is tried. So another process thinks of the same ones in the same order,
    and goes on from there.
    """

    def __init__(self, sweep: Sweep, folder: SweepDir, trials: MakeTrials) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._sweep, self._folder, self._trials = sweep, folder, trials
        self._written = read_lines(folder.points)
        sampler = optuna.samplers.TPESampler(seed=sweep.sampler_seed + len(self._written))
        aims: list[Literal["maximize", "minimize"]] = ["maximize" if sweep.mode == "max" else "minimize"]
        if sweep.trade_off:
            aims.append("minimize")
        self._study = optuna.create_study(directions=aims, sampler=sampler)
        for point in self._written:
            self._study.enqueue_trial({f: _category(sweep.parameters[f], v) for f, v in point.items()})
        self._asked = 0
        self._queue: deque[Trial] = deque()
        self._waiting: dict[str, list[_Asked]] = {}  # by run
        self._known: dict[str, Outcome] = {}

    def next(self) -> Trial | None:
        while not self._queue and self._asked < (self._sweep.points or 0):
            self._ask()
        return self._queue.popleft() if self._queue else None

    def tell(self, trial: Trial, outcome: Outcome) -> None:
        self._known[outcome.run] = outcome
        for asked in self._waiting.pop(outcome.run, []):
            self._hear(asked, trial, outcome)

    @property
    def exhausted(self) -> bool:
        return not self._queue and self._asked >= (self._sweep.points or 0)

    def _ask(self) -> None:
        suggestion = self._study.ask()
        point = draw(self._sweep, lambda field, parameter: _suggest(suggestion, field, parameter))
        self._asked += 1
        if self._asked > len(self._written):
            append_line(self._folder.points, point)
        try:
            trials = self._trials(point)
        except InputError as error:
            log.warning("point left out %s: %s", name_of(point), error)
            self._tell_study(suggestion, None)
            return
        asked = _Asked(suggestion, len(trials))
        for trial in trials:
            name = trial.plan.run.name
            if name in self._known:
                self._hear(asked, trial, self._known[name])
            else:
                if name not in self._waiting:
                    self._queue.append(trial)
                self._waiting.setdefault(name, []).append(asked)

    def _hear(self, asked: "_Asked", trial: Trial, outcome: Outcome) -> None:
        asked.values.append(value_of(self._sweep, outcome))
        if len(asked.values) == asked.expected:
            mean = sum(asked.values) / len(asked.values)
            cost = {"gflops": trial.plan.cost.flops / 1e9, "params": float(trial.plan.cost.params)}
            costs = [cost[self._sweep.trade_off]] if self._sweep.trade_off else []
            self._tell_study(asked.suggestion, [mean, *costs] if math.isfinite(mean) else None)

    def _tell_study(self, suggestion: Any, values: list[float] | None) -> None:
        from optuna.trial import TrialState

        if values is None:
            self._study.tell(suggestion, state=TrialState.FAIL)
        else:
            self._study.tell(suggestion, values)


class _Asked:
    """A point on its way: Optuna's trial, and what its seeds have reached so far."""

    def __init__(self, suggestion: Any, expected: int) -> None:
        self.suggestion, self.expected = suggestion, expected
        self.values: list[float] = []


class Evolved:
    """Generations of a population: see Pbt. All that it does follows from the outcomes."""

    def __init__(self, sweep: Sweep, trials: MakeTrials) -> None:
        assert sweep.pbt
        self._sweep, self._pbt, self._trials, self._generation = sweep, sweep.pbt, trials, 0
        rng = np.random.default_rng(sweep.sampler_seed)
        points = [draw(sweep, lambda _, p: pick_random(p, rng)) for _ in range(sweep.pbt.population)]
        self._outcomes: dict[str, Outcome] = {}
        self._members: list[Trial] = []
        self._queue: deque[Trial] = deque()
        self._begin([(point, None) for point in points])

    def next(self) -> Trial | None:
        return self._queue.popleft() if self._queue else None

    def tell(self, trial: Trial, outcome: Outcome) -> None:
        self._outcomes[outcome.run] = outcome
        ended = all(member.plan.run.name in self._outcomes for member in self._members)
        if ended and self._generation < self._pbt.generations - 1:
            parents = self._breed()
            self._generation += 1
            self._begin(parents)

    @property
    def exhausted(self) -> bool:
        return not self._queue and (self._generation == self._pbt.generations - 1 or not self._members)

    def _begin(self, parents: Sequence[tuple[Point, str | None]]) -> None:
        self._members, self._outcomes = [], {}
        for point, parent in parents:
            extra = [f"init={parent}"] if parent else []
            # Another seed: the next epochs of the same order of samples, as it were.
            try:
                self._members += self._trials(point, extra, later=self._generation)
            except InputError as error:
                log.warning("point left out %s: %s", name_of(point), error)
        self._queue = deque({member.plan.run.name: member for member in self._members}.values())

    def _breed(self) -> list[tuple[Point, str | None]]:
        """The next generation: points, and the runs whose weights they begin with."""
        rng = np.random.default_rng((self._sweep.sampler_seed, self._generation + 1))
        ended = [self._outcomes[member.plan.run.name] for member in self._members]
        sign = 1 if self._sweep.mode == "max" else -1
        values = [sign * value_of(self._sweep, outcome) for outcome in ended]
        order = sorted(range(len(ended)), key=lambda i: -values[i] if math.isfinite(values[i]) else math.inf)
        quarter = len(order) // 4
        able = [i for i in order[:quarter] if math.isfinite(values[i])]
        found: list[tuple[Point, str | None]] = []
        for i, outcome in enumerate(ended):
            if able and (i in order[-quarter:] or not math.isfinite(values[i])):
                parent = ended[able[int(rng.integers(len(able)))]]
                point = draw(self._sweep, lambda f, p, of=parent: _moved(f, p, of.point, rng))  # type: ignore[misc]
                log.info("member %d follows run=%s with %s", i, parent.run, name_of(point))
                found.append((point, parent.run))
            else:
                found.append((outcome.point, outcome.run if math.isfinite(values[i]) else None))
        return found


def value_of(sweep: Sweep, outcome: Outcome) -> float:
    """The metric of a sweep that a trial reached; not a number if it failed."""
    return math.nan if outcome.state == "failed" else outcome.metrics.get(sweep.metric, math.nan)


def _moved(field: str, parameter: Parameter, point: Point, rng: np.random.Generator) -> Any:
    """A value near a point's: a number times 0.8 or 1.25 within its range, of choices the same or a neighbour."""
    if field not in point:
        return pick_random(parameter, rng)
    value = point[field]
    if parameter.choice is not None:
        place = parameter.choice.index(value) + int(rng.integers(-1, 2))
        return parameter.choice[min(max(place, 0), len(parameter.choice) - 1)]
    moved = value * (SHRINK, GROW)[int(rng.integers(2))]
    if parameter.integer:
        low, high = parameter.integer
        return min(max(math.floor(moved) if moved < value else math.ceil(moved), low), high)  # 2 moves, too
    return within(parameter.uniform or parameter.log_uniform or (value, value), moved)


def _suggest(suggestion: Any, field: str, parameter: Parameter) -> Any:
    if parameter.choice is not None:
        kinds = [_category(parameter, value) for value in parameter.choice]
        return parameter.choice[kinds.index(suggestion.suggest_categorical(field, kinds))]
    if parameter.integer:
        return suggestion.suggest_int(field, *parameter.integer)
    low, high = parameter.uniform or parameter.log_uniform or (0.0, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an enqueued value on the edge of its range, rounded
        value = suggestion.suggest_float(field, low, high, log=parameter.log_uniform is not None)
    return within((low, high), float(value))


def _category(parameter: Parameter, value: Any) -> Any:
    """What Optuna takes for a choice: it knows no lists."""
    return json.dumps(value) if parameter.choice is not None else value
