"""Where trials come from: each source against outcomes that are a function of the point; nothing is trained."""

import itertools
import logging
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gsa_models.cost import Cost, StageCost
from pipeline.config import InputError, digest
from pipeline.metrics import read_lines
from pipeline.plan import Plan
from pipeline.rundir import RunDir, SweepDir
from pipeline.samplers import GROW, SHRINK, Evolved, Listed, Source, Suggested
from pipeline.sweep import Outcome, Point, Sweep, Trial, random_points, within

Value = Callable[[Trial], float | None]  # what a trial reaches; None: it fails

BOWL = {"x": {"uniform": [-5, 5]}, "y": {"log_uniform": [1e-4, 1]}}
SMALL = {"a": [1, 2], "b": ["x", None]}


def bowl(point: Point) -> float:
    """How far from its optimum (1, 0.01) a point is: 0 there, about 0.6 at the farthest."""
    return float(((point["x"] - 1) / 10) ** 2 + ((math.log10(point["y"]) + 2) / 4) ** 2)


def tpe(points: int = 12, **changes: Any) -> Sweep:
    values = {"name": "x", "train": "digits", "sampler": "tpe", "points": points, "parameters": BOWL}
    return Sweep.model_validate({**values, **changes})


def pbt(population: int = 8, generations: int = 4, **changes: Any) -> Sweep:
    sizes = {"population": population, "generations": generations}
    values = {"name": "x", "train": "digits", "sampler": "pbt", "pbt": sizes, "parameters": BOWL}
    return Sweep.model_validate({**values, **changes})


def trials_of(sweep: Sweep, bad: Callable[[Point], bool] = lambda point: False) -> Callable[..., list[Trial]]:
    """What verbs.tune hands to a source, without networks: the cost is a*1e9 FLOPs and a parameters."""

    def make(point: Point, extra: Sequence[str] = (), *, later: int = 0) -> list[Trial]:
        if bad(point):
            raise InputError("no such network")
        seeds = [point["seed"]] if "seed" in point else [later + i for i in range(sweep.seeds)]
        return [planned(point, seed, extra) for seed in seeds]

    return make


def planned(point: Point, seed: int, extra: Sequence[str] = ()) -> Trial:
    run = RunDir(Path("runs") / digest([point, seed, list(extra)]))
    a = point.get("a", 0)
    cost = Cost((StageCost("all", params=a, flops=a * 10**9, activation_bytes=0),))
    unused: Any = None
    return Trial(point, seed, tuple(extra), Plan(run, unused, unused, cost, "", None))


def ends(trial: Trial, value: float | None) -> Outcome:
    state = "failed" if value is None else "finished"
    metrics = {"val/top1": 99.0 if value is None else value}
    return Outcome(trial.plan.run.name, trial.point, trial.seed, trial.overrides, state, 1, metrics, 1.0)


def drive(
    source: Source,
    value: Value,
    *,
    concurrent: int = 1,
    shuffled: random.Random | None = None,
    known: dict[str, Outcome] | None = None,
    tells: float = math.inf,
) -> list[Trial]:
    """Take trials, `concurrent` at a time, tell what they reach, and give back all that were taken, in turn.

    shuffled: trials end in that order, else in their own. known: what ended before and need not run; filled
    up. tells: so many, then the driver is killed.
    """
    taken: list[Trial] = []
    open_: list[Trial] = []
    known = {} if known is None else known
    while tells > 0:
        while len(open_) < concurrent and (trial := source.next()):
            name = trial.plan.run.name
            assert name not in {t.plan.run.name for t in open_}, "handed out twice at a time"
            taken.append(trial)
            if name in known and known[name].state != "failed":
                source.tell(trial, known[name])
            else:
                open_.append(trial)
        if not open_:
            assert source.exhausted
            assert source.next() is None
            break
        trial = open_.pop(shuffled.randrange(len(open_)) if shuffled else 0)
        known[trial.plan.run.name] = ends(trial, value(trial))
        source.tell(trial, known[trial.plan.run.name])
        tells -= 1
    return taken


def names(trials: Sequence[Trial]) -> list[str]:
    return [trial.plan.run.name for trial in trials]


def told(source: Suggested) -> list[Any]:
    """What Optuna has been told, a trial each: its values, or None of a failed one."""
    return [t.values if t.state.name == "COMPLETE" else t.state.name for t in source._study.trials]


@pytest.fixture
def folder(tmp_path: Path) -> SweepDir:
    return new_folder(tmp_path)


def new_folder(path: Path) -> SweepDir:
    (path / "x").mkdir()
    return SweepDir(path / "x")


# --- listed ------------------------------------------------------------------------------------------------


def test_a_list_is_handed_out_in_its_order() -> None:
    trials = [planned({"a": a}, 0) for a in (3, 1, 2)]
    assert drive(Listed(trials), lambda trial: 1.0, concurrent=2) == trials
    assert Listed([]).exhausted
    source = Listed(trials)
    for _ in trials:
        assert not source.exhausted
        source.next()
    assert source.exhausted  # whatever is still to be told


# --- suggested: what it is for -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["max", "min"])
def test_suggestions_beat_random_points(mode: str, tmp_path: Path) -> None:
    """Median over 5 seeds of the best of 40 points: at most a third as far from the optimum."""
    sign = -1 if mode == "max" else 1
    suggested, drawn = [], []
    for seed in range(5):
        (tmp_path / str(seed)).mkdir()
        sweep = tpe(40, sampler_seed=seed, mode=mode)
        source = Suggested(sweep, new_folder(tmp_path / str(seed)), trials_of(sweep))
        taken = drive(source, lambda trial: sign * bowl(trial.point))
        assert len(taken) == 40
        suggested.append(min(bowl(trial.point) for trial in taken))
        drawn.append(min(map(bowl, random_points(sweep, 40))))
    assert np.median(suggested) <= np.median(drawn) / 3


def test_a_tied_parameter_is_suggested_only_where_it_holds(folder: SweepDir) -> None:
    parameters = {"a": [1, 2], "z": {"uniform": [0, 1], "when": {"a": [2]}}}
    sweep = tpe(20, parameters=parameters)
    taken = drive(Suggested(sweep, folder, trials_of(sweep)), lambda t: t.point["a"] + t.point.get("z", 0))
    assert {("z" in t.point) == (t.point["a"] == 2) for t in taken} == {True}
    assert {t.point["a"] for t in taken} == {1, 2}
    again = drive(Suggested(sweep, folder, trials_of(sweep)), lambda t: 0.0)
    assert again == taken


def test_choices_keep_their_types(folder: SweepDir) -> None:
    choices = [None, True, 1.5, "x", [1, "y"], {"z": 1}, 3]
    sweep = tpe(60, parameters={"c": choices})
    taken = drive(Suggested(sweep, folder, trials_of(sweep)), lambda t: 0.0)
    assert sorted(repr(t.point["c"]) for t in taken) == sorted(map(repr, choices))
    assert names(drive(Suggested(sweep, folder, trials_of(sweep)), lambda t: 0.0)) == names(taken)


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(["uniform", "log_uniform"]),
    low=st.floats(1e-6, 1e6),
    width=st.floats(1e-6, 10),
    start=st.integers(-3, 3),
    seed=st.integers(0, 99),
)
def test_suggestions_stay_in_range_and_are_read_back_the_same(
    kind: str, low: float, width: float, start: int, seed: int
) -> None:
    """Also where the range has no number of four digits in it: a point that is read back warns of nothing."""
    high = low * (1 + width)
    sweep = tpe(
        4, parameters={"x": {kind: [low, high]}, "n": {"integer": [start, start + 2]}}, sampler_seed=seed
    )
    with TemporaryDirectory() as path:
        folder = new_folder(Path(path))
        taken = drive(Suggested(sweep, folder, trials_of(sweep)), lambda t: 0.0, concurrent=4)
        written = folder.points.read_bytes()
        again = drive(Suggested(sweep, folder, trials_of(sweep)), lambda t: 0.0, concurrent=4)
        assert folder.points.read_bytes() == written
    assert again == taken
    for trial in taken:
        assert low <= trial.point["x"] <= high
        assert trial.point["n"] in range(start, start + 3)
        assert type(trial.point["n"]) is int
        assert trial.point["x"] in (low, high) or float(f"{trial.point['x']:.4g}") == trial.point["x"]


# --- suggested: killed and begun again ---------------------------------------------------------------------


@pytest.mark.parametrize("concurrent", [1, 3])
def test_a_killed_search_goes_on_with_the_same_points(concurrent: int, tmp_path: Path) -> None:
    """After each number of outcomes: no point is lost, none comes twice, all in all there are as many as asked."""
    sweep = tpe(13)  # the first ten are random, the others by what is known
    for tells in range(14):
        (tmp_path / str(tells)).mkdir()
        folder, known = new_folder(tmp_path / str(tells)), dict[str, Outcome]()

        def value(trial: Trial) -> float:
            return -bowl(trial.point)

        first = drive(
            Suggested(sweep, folder, trials_of(sweep)),
            value,
            concurrent=concurrent,
            known=known,
            tells=tells,
        )
        assert len(known) == tells
        assert read_lines(folder.points) == [trial.point for trial in first]
        second = drive(Suggested(sweep, folder, trials_of(sweep)), value, concurrent=concurrent, known=known)
        assert names(second)[: len(first)] == names(first)
        assert len(set(names(second))) == len(second) == 13
        assert read_lines(folder.points) == [trial.point for trial in second]
        assert set(known) == set(names(second))


@settings(max_examples=25, deadline=None)
@given(
    actions=st.lists(st.sampled_from(["next", "tell", "kill"]), max_size=30),
    chance=st.randoms(use_true_random=False),
    small=st.booleans(),
    seeds=st.integers(1, 2),
)
def test_no_order_of_kills_and_outcomes_loses_a_point(
    actions: list[str], chance: random.Random, small: bool, seeds: int
) -> None:
    sweep = tpe(8, parameters=SMALL if small else BOWL, seeds=seeds)
    known: dict[str, Outcome] = {}
    with TemporaryDirectory() as path:
        folder = new_folder(Path(path))
        source, open_ = Suggested(sweep, folder, trials_of(sweep)), dict[str, Trial]()
        for action in actions:
            before = read_lines(folder.points)
            if action == "kill":
                source, open_ = Suggested(sweep, folder, trials_of(sweep)), {}
            elif action == "next" and (trial := source.next()):
                name = trial.plan.run.name
                assert name not in open_
                if name in known:
                    source.tell(trial, known[name])
                else:
                    open_[name] = trial
            elif action == "tell" and open_:
                trial = open_.pop(chance.choice(sorted(open_)))
                known[trial.plan.run.name] = ends(trial, chance.choice([None, 1.0, 2.0]))
                source.tell(trial, known[trial.plan.run.name])
            assert read_lines(folder.points)[: len(before)] == before
        written = read_lines(folder.points)
        source = Suggested(sweep, folder, trials_of(sweep))
        taken = drive(source, lambda trial: 1.0, known=known, concurrent=2)
        points = read_lines(folder.points)
    assert points[: len(written)] == written
    assert len(points) == len(told(source)) == 8
    assert "RUNNING" not in told(source)
    wanted = {run for point in points for run in names(trials_of(sweep)(point))}
    assert Counter(names(taken)) == Counter(wanted)  # each once
    assert wanted <= set(known)


def test_fewer_points_and_then_more(folder: SweepDir) -> None:
    taken = {}
    for points in (5, 3, 8):
        sweep = tpe(points)
        taken[points] = drive(Suggested(sweep, folder, trials_of(sweep)), lambda t: -bowl(t.point))
        assert len(taken[points]) == points
    assert taken[5][:3] == taken[3]
    assert taken[8][:5] == taken[5]


def test_the_points_follow_from_the_sampler_seed(tmp_path: Path) -> None:
    found = []
    for i, seed in enumerate((0, 0, 1)):
        (tmp_path / str(i)).mkdir()
        sweep = tpe(14, sampler_seed=seed)
        source = Suggested(sweep, new_folder(tmp_path / str(i)), trials_of(sweep))
        found.append(names(drive(source, lambda t: -bowl(t.point))))
    assert found[0] == found[1]
    assert not set(found[0]) & set(found[2])


def test_a_point_is_written_before_it_is_handed_out(folder: SweepDir) -> None:
    sweep = tpe(3)
    source = Suggested(sweep, folder, trials_of(sweep))
    assert read_lines(folder.points) == []
    trial = source.next()
    assert trial is not None
    assert read_lines(folder.points) == [trial.point]


# --- suggested: what it is told ----------------------------------------------------------------------------


@pytest.mark.parametrize("concurrent", [1, 3, 9])
def test_a_suggestion_that_comes_again_does_not_run_again_but_counts(
    concurrent: int, folder: SweepDir
) -> None:
    sweep = tpe(30, parameters=SMALL)  # 4 points in all
    source = Suggested(sweep, folder, trials_of(sweep))
    taken = drive(source, lambda t: float(t.point["a"]), concurrent=concurrent)
    assert len(set(names(taken))) == len(taken) <= 4
    points = read_lines(folder.points)
    assert len(points) == 30
    assert told(source) == [[float(point["a"])] for point in points]
    assert {str(p) for p in points} == {str(t.point) for t in taken}


def test_two_points_of_one_network_are_one_run(folder: SweepDir) -> None:
    """Two spellings: what tells them apart is not in the run's name."""
    sweep = tpe(20, parameters={"b": ["gggg", "g/g/g/g"]})
    source = Suggested(sweep, folder, lambda point, extra=(), *, later=0: [planned({}, 0)])
    assert len(drive(source, lambda t: 5.0)) == 1
    assert len({str(p) for p in read_lines(folder.points)}) == 2
    assert told(source) == [[5.0]] * 20


def test_optuna_is_told_the_mean_over_seeds_once_all_have_ended(folder: SweepDir) -> None:
    sweep = tpe(2, seeds=3)
    source = Suggested(sweep, folder, trials_of(sweep))
    trials = [source.next() for _ in range(3)]
    assert [(t.point, t.seed) for t in trials if t] == [(trials[0].point, seed) for seed in range(3)]  # type: ignore[union-attr]
    for i, value in [(2, 6.0), (0, 1.0), (1, 2.0)]:
        assert told(source) == ["RUNNING"]
        trial = trials[i]
        assert trial
        source.tell(trial, ends(trial, value))
    assert told(source) == [[3.0]]


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
def test_a_point_with_a_failed_seed_has_failed(value: float | None, folder: SweepDir) -> None:
    sweep = tpe(2, seeds=2)
    source = Suggested(sweep, folder, trials_of(sweep))
    drive(source, lambda t: value if t.seed else 1.0)
    assert told(source) == ["FAIL", "FAIL"]


def test_failing_points_do_not_end_the_search(folder: SweepDir) -> None:
    sweep = tpe(30)
    source = Suggested(sweep, folder, trials_of(sweep))
    taken = drive(source, lambda t: None if t.point["x"] < 0 else -bowl(t.point), concurrent=2)
    assert len(taken) == 30
    assert [v == "FAIL" for v in told(source)] == [t.point["x"] < 0 for t in taken]
    assert min(bowl(t.point) for t in taken if t.point["x"] >= 0) < 0.02


def test_where_all_fails_the_search_ends(folder: SweepDir) -> None:
    sweep = tpe(15)
    source = Suggested(sweep, folder, trials_of(sweep))
    assert len(drive(source, lambda t: None, concurrent=4)) == 15
    assert told(source) == ["FAIL"] * 15


def test_an_outcome_without_the_metric_has_failed(folder: SweepDir) -> None:
    sweep = tpe(1, metric="val/loss")
    source = Suggested(sweep, folder, trials_of(sweep))
    drive(source, lambda t: 1.0)
    assert told(source) == ["FAIL"]


def test_a_stopped_trial_counts_with_what_it_had_reached(folder: SweepDir) -> None:
    sweep = tpe(1)
    source = Suggested(sweep, folder, trials_of(sweep))
    trial = source.next()
    assert trial
    source.tell(trial, ends(trial, 4.0)._replace(state="stopped"))
    assert told(source) == [[4.0]]


@pytest.mark.parametrize("cost", ["gflops", "params"])
@pytest.mark.parametrize("mode", ["max", "min"])
def test_a_trade_off_is_a_second_aim(mode: str, cost: str, folder: SweepDir) -> None:
    sweep = tpe(15, parameters={"a": {"integer": [1, 50]}}, trade_off=cost, mode=mode, seeds=2)
    source = Suggested(sweep, folder, trials_of(sweep))
    drive(source, lambda t: 2.0 * t.point["a"] + t.seed, concurrent=3)
    aim = {"max": "MAXIMIZE", "min": "MINIMIZE"}[mode]
    assert [direction.name for direction in source._study.directions] == [aim, "MINIMIZE"]
    assert told(source) == [[2 * p["a"] + 0.5, p["a"]] for p in read_lines(folder.points)]


def test_a_point_that_cannot_be_is_left_out_with_a_warning_and_counted(
    folder: SweepDir, caplog: pytest.LogCaptureFixture
) -> None:
    sweep = tpe(20)
    make = trials_of(sweep, bad=lambda point: point["x"] < 0)
    source = Suggested(sweep, folder, make)
    with caplog.at_level(logging.WARNING, logger="gsa"):
        taken = drive(source, lambda t: -bowl(t.point), concurrent=2)
    points = read_lines(folder.points)
    assert len(points) == 20
    good = [point for point in points if point["x"] >= 0]
    assert 0 < len(good) < 20
    assert [t.point for t in taken] == good
    assert [v == "FAIL" for v in told(source)] == [point["x"] < 0 for point in points]
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [f"point left out x={p['x']} y={p['y']}: no such network" for p in points if p["x"] < 0]
    assert names(drive(Suggested(sweep, folder, make), lambda t: 0.0)) == names(taken)


def test_where_no_point_can_be_the_search_ends(folder: SweepDir) -> None:
    sweep = tpe(5)
    assert drive(Suggested(sweep, folder, trials_of(sweep, bad=lambda point: True)), lambda t: 0.0) == []
    assert len(read_lines(folder.points)) == 5


# --- evolved -----------------------------------------------------------------------------------------------


def generations(taken: Sequence[Trial]) -> list[list[Trial]]:
    """The seed tells the generation."""
    return [list(group) for _, group in itertools.groupby(taken, key=lambda trial: trial.seed)]


def parent(trial: Trial) -> str | None:
    (source,) = trial.overrides or (None,)
    return source.removeprefix("init=") if source else None


@pytest.mark.parametrize(("population", "count"), [(4, 2), (8, 4), (9, 3)])
@pytest.mark.parametrize("concurrent", [1, 3, 99])
def test_a_population_has_so_many_members_and_generations(
    population: int, count: int, concurrent: int
) -> None:
    sweep = pbt(population, count)
    taken = drive(Evolved(sweep, trials_of(sweep)), lambda t: -bowl(t.point), concurrent=concurrent)
    assert [len(group) for group in generations(taken)] == [population] * count
    assert [group[0].seed for group in generations(taken)] == list(range(count))
    assert len(set(names(taken))) == population * count == sweep.size
    assert [trial.point for trial in taken[:population]] == random_points(sweep, population)
    assert {trial.overrides for trial in taken[:population]} == {()}


def test_a_generation_begins_when_the_last_one_has_ended() -> None:
    sweep = pbt(4, 2)
    source = Evolved(sweep, trials_of(sweep))
    first = [trial for _ in range(4) if (trial := source.next())]
    assert source.next() is None
    for value, trial in enumerate(first[::-1]):
        assert (source.next(), source.exhausted) == (None, False)
        source.tell(trial, ends(trial, float(value)))
    second = [trial for _ in range(4) if (trial := source.next())]
    assert (source.next(), source.exhausted) == (None, True)
    assert [parent(trial) for trial in second] == names([*first[:3], first[0]])  # the last was the worst
    assert not set(names(first)) & set(names(second))


@pytest.mark.parametrize("mode", ["max", "min"])
def test_the_worst_quarter_follows_one_of_the_best(mode: str) -> None:
    sign = -1 if mode == "max" else 1
    parameters = {**BOWL, "n": {"integer": [1, 40]}, "c": [None, "p", "q", "r"]}
    moves = Counter[Any]()
    for seed in range(4):
        sweep = pbt(12, 4, mode=mode, parameters=parameters, sampler_seed=seed)
        source = Evolved(sweep, trials_of(sweep))
        groups = generations(drive(source, lambda t: sign * bowl(t.point), concurrent=5))
        for old, new in itertools.pairwise(groups):
            if len(new) < 12:  # two members became equal, and are one run
                break
            ranked = sorted(old, key=lambda trial: bowl(trial.point))
            best, worst = names(ranked[:3]), names(ranked[-3:])
            by_name = dict(zip(names(old), old, strict=True))
            for before, after in zip(old, new, strict=True):
                followed = by_name[str(parent(after))]
                if before.plan.run.name not in worst:
                    assert (followed, after.point) == (before, before.point)
                    continue
                assert followed.plan.run.name in best
                moves.update(_moves(followed.point, after.point))
    assert len(moves) == 9, moves  # each number is seen to shrink and to grow, and a choice to go both ways
    assert sum(moves.values()) >= 4 * 4 * 3


def _moves(was: Point, now: Point) -> list[tuple[str, int]]:
    """What became of each value of a point; asserts that it is allowed."""
    found = []
    for field, span in (("x", (-5.0, 5.0)), ("y", (1e-4, 1.0))):
        steps = [within(span, was[field] * factor) for factor in (SHRINK, GROW)]
        found.append((field, steps.index(now[field])))
    steps = [max(math.floor(was["n"] * SHRINK), 1), min(math.ceil(was["n"] * GROW), 40)]
    found.append(("n", steps.index(now["n"])))
    places = [[None, "p", "q", "r"].index(point["c"]) for point in (was, now)]
    found.append(("c", places[1] - places[0]))
    assert abs(found[-1][1]) <= 1
    return found


def test_a_small_integer_is_not_stuck() -> None:
    """2 times 0.8 and 1.25 both round to 2."""
    sweep = pbt(8, 12, parameters={"n": {"integer": [1, 3]}, "x": {"uniform": [0, 1]}})
    taken = drive(Evolved(sweep, trials_of(sweep)), lambda t: float(t.point["n"] == 2))
    followers = [t.point["n"] for group in generations(taken)[1:] for t in group]
    assert set(followers) == {1, 2, 3}
    assert {type(n) for n in followers} == {int}


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(["uniform", "log_uniform"]),
    low=st.floats(1e-6, 1e6),
    width=st.floats(1e-6, 1),
    seed=st.integers(0, 99),
)
def test_no_member_leaves_the_range(kind: str, low: float, width: float, seed: int) -> None:
    high = low * (1 + width)
    sweep = pbt(8, 4, parameters={"x": {kind: [low, high]}}, sampler_seed=seed)
    taken = drive(Evolved(sweep, trials_of(sweep)), lambda t: t.point["x"])
    assert all(low <= trial.point["x"] <= high for trial in taken)


def test_a_tied_parameter_of_a_member_is_drawn_anew_where_it_begins_to_hold() -> None:
    parameters = {"a": [1, 2], "z": {"uniform": [3, 4], "when": {"a": [2]}}, "x": {"uniform": [0, 1]}}
    sweep = pbt(12, 8, parameters=parameters)
    taken = drive(Evolved(sweep, trials_of(sweep)), lambda t: t.point["x"] - t.point["a"])
    assert {("z" in t.point) == (t.point["a"] == 2) for t in taken} == {True}
    assert all(3 <= t.point["z"] <= 4 for t in taken if "z" in t.point)
    groups = generations(taken)
    parents = {t.plan.run.name: t.point["a"] for t in taken}
    assert any(t.point["a"] == 2 and parents[str(parent(t))] == 1 for group in groups[1:] for t in group)


@settings(max_examples=40, deadline=None)
@given(
    chance=st.randoms(use_true_random=False),
    concurrent=st.integers(1, 8),
    failing=st.integers(0, 3),
    killed=st.integers(0, 24),
)
def test_a_population_follows_from_its_outcomes_in_whatever_order(
    chance: random.Random, concurrent: int, failing: int, killed: int
) -> None:
    """Also of a driver that was killed in between, and of outcomes that are known from before."""

    def value(trial: Trial) -> float | None:
        return None if int(trial.plan.run.name, 16) % 4 < failing else -bowl(trial.point)

    sweep = pbt(8, 3)
    reference = drive(Evolved(sweep, trials_of(sweep)), value)
    known: dict[str, Outcome] = {}
    options: dict[str, Any] = {"concurrent": concurrent, "shuffled": chance, "known": known}
    first = drive(Evolved(sweep, trials_of(sweep)), value, tells=killed, **options)
    assert first == reference[: len(first)]
    assert drive(Evolved(sweep, trials_of(sweep)), value, **options) == reference


@pytest.mark.parametrize("seed_is_a_parameter", [False, True])
def test_a_population_of_which_all_fail_still_ends(seed_is_a_parameter: bool) -> None:
    """With a seed of their own all generations are the same runs: none is at work twice at a time."""
    parameters = {**BOWL, "seed": [3]} if seed_is_a_parameter else BOWL
    sweep = pbt(4, 3, parameters=parameters)
    taken = drive(Evolved(sweep, trials_of(sweep)), lambda t: None, concurrent=3)
    assert [trial.point for trial in taken] == 3 * random_points(sweep, 4)
    assert {trial.overrides for trial in taken} == {()}
    assert len(set(names(taken))) == (4 if seed_is_a_parameter else 12)


def test_all_that_failed_follow_the_best() -> None:
    sweep = pbt(8, 2)
    first, second = generations(
        drive(Evolved(sweep, trials_of(sweep)), lambda t: None if t.point["x"] < 2 else t.point["x"])
    )
    failed = [trial.point["x"] < 2 for trial in first]
    assert 2 < sum(failed) < 6  # more than the worst quarter
    best = names(sorted(first, key=lambda t: t.point["x"])[-2:])
    for before, after, lost in zip(first, second, failed, strict=True):
        assert parent(after) in (best if lost else names([before]))


def test_equal_members_are_one_run() -> None:
    sweep = pbt(8, 3, parameters={"a": [1]})
    taken = drive(Evolved(sweep, trials_of(sweep)), lambda t: 1.0, concurrent=4)
    assert [len(group) for group in generations(taken)] == [1, 1, 1]


def test_members_that_cannot_be_are_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    sweep = pbt(8, 3)
    points = random_points(sweep, 8)
    bad = [point for point in points if point["x"] < 0]
    assert 0 < len(bad) < 4
    with caplog.at_level(logging.WARNING, logger="gsa"):
        source = Evolved(sweep, trials_of(sweep, bad=lambda point: point in bad))
    assert [r.getMessage() for r in caplog.records] == [
        f"point left out x={p['x']} y={p['y']}: no such network" for p in bad
    ]
    taken = drive(source, lambda t: -bowl(t.point))
    assert [len(group) for group in generations(taken)] == [8 - len(bad)] * 3


def test_where_no_member_can_be_the_search_ends() -> None:
    sweep = pbt(4, 3)
    assert drive(Evolved(sweep, trials_of(sweep, bad=lambda point: True)), lambda t: 1.0) == []


def test_a_population_gets_better() -> None:
    """Its numbers, not its weights: median of 5 seeds, the last generation against the first."""
    first, last = [], []
    for seed in range(5):
        sweep = pbt(12, 8, sampler_seed=seed)
        groups = generations(drive(Evolved(sweep, trials_of(sweep)), lambda t: -bowl(t.point)))
        first.append(np.mean([bowl(t.point) for t in groups[0]]))
        last.append(np.mean([bowl(t.point) for t in groups[-1]]))
    assert np.median(last) < np.median(first) / 3
