"""Sweeps before anything runs: schema, points, trials; and their records: what may change, what is best."""

import itertools
import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import Config, ConfigError, InputError, dump, load, override, read_yaml, validate
from pipeline.metrics import append_line
from pipeline.plan import plan
from pipeline.rundir import Out, SweepDir
from pipeline.sweep import (
    Outcome,
    Parameter,
    Point,
    Sweep,
    Trial,
    begin,
    best,
    grid,
    lay_out,
    name_of,
    outcomes,
    pick_random,
    random_points,
    read,
    record,
    stated_points,
    trials_of,
)

PLAIN = {"name": "x", "train": "digits", "parameters": {"optim.lr": [0.1, 0.2]}}
RANGE = {"sampler": "random", "points": 3}


def made(**changes: Any) -> Sweep:
    return validate(Sweep, {**PLAIN, **changes}, where="here")


def fault(action: Callable[[], Any]) -> str:
    """The message of the InputError that the action ends in: one line, as a user reads it."""
    with pytest.raises(InputError) as caught:
        action()
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    return message


def refused(**changes: Any) -> str:
    message = fault(lambda: made(**changes))
    assert message.startswith("here: ")
    return message.removeprefix("here: ")


# --- schema ------------------------------------------------------------------------------------------------


def test_a_list_is_short_for_choice() -> None:
    assert made(parameters={"optim.lr": [0.1, 0.2]}) == made(parameters={"optim.lr": {"choice": [0.1, 0.2]}})


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        (3, ": expected a list of values, or a range such as {uniform: [0, 1]}, got 3"),
        ([], ".choice: expected at least 1 item"),
        ({}, ": expected a list, or one of choice, uniform, log_uniform, integer"),
        ({"when": {}}, ": expected a list, or one of"),
        ({"choice": [1], "uniform": [0, 1]}, ": expected a list, or one of"),
        ({"uniform": [0, 1], "integer": [0, 1]}, ": expected a list, or one of"),
        ({"uniform": [1, 1]}, ": [1, 1]: expected two rising numbers"),
        ({"uniform": [2, 1]}, ": [2, 1]: expected two rising numbers"),
        ({"integer": [3, 3]}, ": [3, 3]: expected two rising numbers"),
        ({"log_uniform": [0, 1]}, ": [0, 1]: expected two rising numbers, of log_uniform above 0"),
        ({"log_uniform": [-1, 1]}, ": [-1, 1]: expected two rising numbers, of log_uniform above 0"),
        ({"uniform": [1]}, ".uniform.1: Field required"),
        ({"uniform": [1, 2, 3]}, ".uniform: "),
        ({"uniform": ["0", 1]}, ".uniform.0: expected a valid number, got '0'"),
        ({"uniform": [0, math.inf]}, ".uniform.1: expected a finite number, got inf"),
        ({"log_uniform": [math.nan, 1]}, ".log_uniform.0: expected a finite number, got nan"),
        ({"integer": [0, 1.5]}, ".integer.1: expected a valid integer, got 1.5"),
        ({"integer": [False, True]}, ".integer.0: expected a valid integer, got False"),
    ],
    ids=str,
)
def test_a_bad_parameter_is_named(parameter: Any, message: str) -> None:
    assert refused(**RANGE, parameters={"optim.lr": parameter}).startswith(f"parameters.optim.lr{message}")


def test_a_choice_that_no_override_could_state_is_refused() -> None:
    """YAML reads 2020-01-01 as a date."""
    import datetime

    message = refused(parameters={"data.shards": ["a", datetime.date(2020, 1, 1)]})
    assert message.startswith("parameters.data.shards.choice.1: ")


def test_a_range_that_starts_at_zero_or_below_is_fine_unless_logarithmic() -> None:
    for kind, low in (("uniform", 0), ("uniform", -1.5), ("integer", -2)):
        assert made(**RANGE, parameters={"a.b": {kind: [low, 3]}}).parameters["a.b"].model_dump()[kind] == (
            low,
            3,
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parameters": {}}, "parameters: expected at least 1 item"),
        ({"parameters": {"a": {"uniform": [0, 1]}}}, "parameters: a is a range; sampler grid needs a list"),
        ({"parameters": {"a": {"log_uniform": [1, 2]}}}, "parameters: a is a range; sampler grid"),
        ({"parameters": {"a": {"integer": [0, 1]}}}, "parameters: a is a range; sampler grid"),
        ({"sampler": "random"}, "points: sampler random needs a number"),
        ({"sampler": "tpe"}, "points: sampler tpe needs a number"),
        ({"points": 3}, "points: sampler grid needs none"),
        ({"sampler": "pbt", "pbt": {}, "points": 3}, "points: sampler pbt needs none"),
        ({"sampler": "random", "points": 0}, "points: expected greater than 0, got 0"),
        ({"sampler": "pbt"}, "pbt: expected with sampler pbt, and only there"),
        ({"pbt": {}}, "pbt: expected with sampler pbt, and only there"),
        ({**RANGE, "pbt": {}}, "pbt: expected with sampler pbt, and only there"),
        ({"sampler": "pbt", "pbt": {}, "asha": {}}, "sampler pbt takes neither asha nor seeds"),
        ({"sampler": "pbt", "pbt": {}, "seeds": 2}, "sampler pbt takes neither asha nor seeds"),
        ({"sampler": "pbt", "pbt": {"population": 3}}, "pbt.population: expected greater than or equal to 4"),
        (
            {"sampler": "pbt", "pbt": {"generations": 1}},
            "pbt.generations: expected greater than or equal to 2",
        ),
        ({"trade_off": "gflops"}, "trade_off: expected with sampler tpe"),
        ({**RANGE, "trade_off": "params"}, "trade_off: expected with sampler tpe"),
        ({"sampler": "tpe", "points": 3, "trade_off": "time"}, "trade_off: expected 'params' or 'gflops'"),
        ({"seeds": 2, "parameters": {"seed": [1]}}, "seeds: expected 1 where seed itself is a parameter"),
        ({"seeds": 0}, "seeds: expected greater than 0, got 0"),
        ({"sampler": "bayes"}, "sampler: expected 'grid', 'random', 'tpe' or 'pbt', got 'bayes'"),
        ({"sampler_seed": -1}, "sampler_seed: expected greater than or equal to 0, got -1"),
        ({"asha": {"brackets": 0}}, "asha.brackets: expected greater than or equal to 1, got 0"),
    ],
    ids=str,
)
def test_what_does_not_fit_together_is_named(changes: dict[str, Any], message: str) -> None:
    assert refused(**changes).removeprefix("settings: ").startswith(message)


@pytest.mark.parametrize("first", ["b", "c"], ids=["later", "unknown"])
def test_a_parameter_is_tied_to_an_earlier_one(first: str) -> None:
    parameters = {"a": {"choice": [1], "when": {first: [1]}}, "b": [1]}
    assert f"parameters: a is tied to {first}, which must stand before it" in refused(parameters=parameters)
    made(parameters={first: [1], **parameters})  # so it stands before


def test_a_parameter_is_not_tied_to_itself() -> None:
    assert "a is tied to a, which" in refused(parameters={"a": {"choice": [1], "when": {"a": [1]}}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"smapler": "grid"}, "smapler is unknown; did you mean sampler? (fields: name, train, overrides, "),
        ({"point": 3}, "point is unknown; did you mean points? "),
        ({"asha": {"graze_epochs": 3}}, "asha.graze_epochs is unknown; did you mean asha.grace_epochs? "),
        (
            {"sampler": "pbt", "pbt": {"populaton": 8}},
            "pbt.populaton is unknown; did you mean pbt.population",
        ),
    ],
    ids=str,
)
def test_an_unknown_field_has_a_nearest_one(changes: dict[str, Any], message: str) -> None:
    assert refused(**changes).startswith(message)


def test_a_tie_to_a_value_that_never_comes_is_refused() -> None:
    tied = {"choice": [3], "when": {"model.placement": ["cccg"]}}
    message = refused(parameters={"model.placement": ["gggg"], "model.window": tied})
    assert message.endswith("model.window is tied to model.placement='cccg', which it never is")


def test_an_unknown_field_of_a_parameter_has_a_nearest_one() -> None:
    message = refused(parameters={"optim.lr": {"unifrom": [0, 1]}})
    assert message.startswith("parameters.optim.lr.unifrom is unknown; did you mean ")
    assert "uniform? (fields: choice, uniform, log_uniform, integer, when)" in message


def test_what_is_dumped_is_read_back_the_same(tmp_path: Path) -> None:
    parameters = {
        "model.placement": ["gggg", None, [1, "x"]],
        "optim.lr": {"log_uniform": [1e-5, 1], "when": {"model.placement": [None, "gggg"]}},
        "optim.momentum": {"uniform": [0, 0.9]},
        "optim.epochs": {"integer": [1, 3]},
    }
    sweep = made(**RANGE, parameters=parameters, baseline={"optim.lr": 0.1}, asha={})
    begin(SweepDir(tmp_path / "x"), sweep)
    assert read(SweepDir(tmp_path / "x")) == sweep


# --- grid --------------------------------------------------------------------------------------------------


def test_the_last_parameter_of_a_grid_changes_fastest() -> None:
    points = list(grid(made(parameters={"a": [1, 2], "b": ["x", "y", "z"]})))
    assert points == [{"a": a, "b": b} for a in (1, 2) for b in "xyz"]


def test_a_tied_parameter_is_only_where_it_holds() -> None:
    tied = {"choice": [0.1, 0.2], "when": {"optim.name": ["sgd"]}}
    further = {"choice": [1, 2], "when": {"optim.momentum": [0.2], "optim.name": ["sgd"]}}
    sweep = made(parameters={"optim.name": ["adamw", "sgd"], "optim.momentum": tied, "c": further})
    assert list(grid(sweep)) == [
        {"optim.name": "adamw"},
        {"optim.name": "sgd", "optim.momentum": 0.1},
        {"optim.name": "sgd", "optim.momentum": 0.2, "c": 1},
        {"optim.name": "sgd", "optim.momentum": 0.2, "c": 2},
    ]


@st.composite
def spaces(draw: st.DrawFn) -> dict[str, Any]:
    """Up to four parameters of up to three values, each tied to some values of earlier ones, or not."""
    found: dict[str, Any] = {}
    for field in "abcd"[: draw(st.integers(1, 4))]:
        values = draw(st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True))
        others = st.sampled_from(list(found)) if found else st.nothing()
        tied = draw(st.sets(others))
        ties = {other: draw(st.lists(st.sampled_from(found[other]["choice"]))) for other in sorted(tied)}
        found[field] = {"choice": values, "when": ties}
    return found


@settings(max_examples=60, deadline=None)
@given(parameters=spaces(), seeds=st.integers(1, 3))
def test_a_grid_is_the_product_without_what_does_not_hold(parameters: dict[str, Any], seeds: int) -> None:
    """Against a slow reference: of each combination what does not hold is struck out; what is left, once."""
    wanted: list[Point] = []
    for values in itertools.product(*(p["choice"] for p in parameters.values())):
        point: Point = {}
        for (field, parameter), value in zip(parameters.items(), values, strict=True):
            if all(point.get(other) in good for other, good in parameter["when"].items()):
                point[field] = value
        if point not in wanted:
            wanted.append(point)
    sweep = made(parameters=parameters, seeds=seeds)
    assert list(grid(sweep)) == stated_points(sweep) == wanted
    assert sweep.size == len(wanted) * seeds


def test_the_size_of_other_samplers_is_known_before() -> None:
    assert made(sampler="tpe", points=7, seeds=3).size == 21
    assert made(sampler="pbt", pbt={"population": 5, "generations": 3}).size == 15


# --- random points -----------------------------------------------------------------------------------------

MIXED = {
    "choice": ["x", "y"],
    "tied": {"uniform": [-1, 2], "when": {"choice": ["y"]}},
    "log": {"log_uniform": [1e-5, 1e-1]},
    "int": {"integer": [3, 6]},
}


def test_random_points_are_the_same_for_the_same_seed_and_others_for_another() -> None:
    sweep = made(**RANGE, parameters=MIXED, sampler_seed=5)
    assert random_points(sweep, 20) == random_points(sweep, 20) != random_points(made(**RANGE), 20)
    other = made(**RANGE, parameters=MIXED, sampler_seed=6)
    assert not [p for p in random_points(sweep, 20) if p in random_points(other, 20)]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), few=st.integers(0, 15), more=st.integers(0, 15))
def test_of_more_random_points_the_first_are_those_of_fewer(seed: int, few: int, more: int) -> None:
    sweep = made(**RANGE, parameters=MIXED, sampler_seed=seed)
    assert random_points(sweep, few + more)[:few] == random_points(sweep, few)


def test_a_tied_parameter_is_drawn_only_where_it_holds() -> None:
    points = random_points(made(**RANGE, parameters=MIXED), 100)
    assert {("tied" in p) == (p["choice"] == "y") for p in points} == {True}
    assert 30 < sum("tied" in p for p in points) < 70


@settings(max_examples=200, deadline=None)
@given(
    kind=st.sampled_from(["uniform", "log_uniform"]),
    low=st.floats(1e-6, 1e6),
    width=st.floats(1e-6, 10),
    seed=st.integers(0, 99),
)
def test_no_rounding_leaves_the_range(kind: str, low: float, width: float, seed: int) -> None:
    """[0.12345, 0.123456] has no number of four digits in it."""
    high = low * (1 + width)
    parameter = Parameter.model_validate({kind: [low, high]})
    rng = np.random.default_rng(seed)
    assert all(low <= pick_random(parameter, rng) <= high for _ in range(20))


def drawn(count: int = 2000, **kind: Any) -> Any:
    sweep = made(**RANGE, parameters={"a": kind})
    return np.array([point["a"] for point in random_points(sweep, count)])


def test_uniform_is_uniform_and_log_uniform_is_so_in_the_logarithm() -> None:
    wanted = np.array([0.25, 0.5, 0.75])
    assert np.quantile(drawn(uniform=[2, 4]), wanted) == pytest.approx(2 + 2 * wanted, abs=0.08)
    found = np.log10(np.quantile(drawn(log_uniform=[1e-5, 1e-1]), wanted))
    assert found == pytest.approx(-5 + 4 * wanted, abs=0.16)


def test_integers_reach_both_ends_evenly() -> None:
    values, counts = np.unique(drawn(integer=[3, 6]), return_counts=True)
    assert values.tolist() == [3, 4, 5, 6]
    assert counts.min() > 430  # of 2000: 500 each, four sigma are 77
    assert {type(p["a"]) for p in random_points(made(**RANGE, parameters={"a": {"integer": [1, 2]}}), 9)} == {
        int
    }


def test_choices_are_drawn_evenly() -> None:
    values, counts = np.unique(drawn(choice=["x", "y", "z"]), return_counts=True)
    assert values.tolist() == ["x", "y", "z"]
    assert counts.min() > 580  # of 667, four sigma


# --- trials ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def shared(mini: Path, mini_config: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Out, str]:
    """An output root with the shards `mini`, and a recipe; no test trains there."""
    root = tmp_path_factory.mktemp("sweeps")
    (root / "shards").mkdir()
    (root / "shards" / "mini").symlink_to(mini)
    (root / "recipe.yaml").write_text(dump(mini_config(seed=7)))
    return Out(root), str(root / "recipe.yaml")


def laid_out(shared: tuple[Out, str], **changes: Any) -> tuple[list[Trial], list[str]]:
    sweep = made(train=shared[1], **changes)
    return lay_out(stated_points(sweep), lambda point: trials_of(shared[0], sweep, point))


def test_seeds_are_the_recipes_and_the_next_ones(shared: tuple[Out, str]) -> None:
    found, _ = laid_out(shared, seeds=3)
    assert [(t.point["optim.lr"], t.seed) for t in found] == [(lr, s) for lr in (0.1, 0.2) for s in (7, 8, 9)]
    assert [t.plan.config.seed for t in found] == [t.seed for t in found]
    assert [t.plan.config.optim.lr for t in found] == [t.point["optim.lr"] for t in found]
    assert len({t.plan.run.name for t in found}) == 6


def test_an_override_moves_the_first_seed(shared: tuple[Out, str]) -> None:
    found, _ = laid_out(shared, seeds=2, overrides=["seed=100"], parameters={"optim.lr": [0.1]})
    assert [t.plan.config.seed for t in found] == [100, 101]


def test_more_seeds_begin_with_the_fewer(shared: tuple[Out, str]) -> None:
    few, more = laid_out(shared, seeds=1)[0], laid_out(shared, seeds=2)[0]
    assert [(t.seed, t.plan.run) for t in more[::2]] == [(t.seed, t.plan.run) for t in few]


def test_a_seed_may_be_a_parameter(shared: tuple[Out, str]) -> None:
    found, _ = laid_out(shared, parameters={"seed": [3, 1], "optim.lr": [0.1]})
    assert [(t.seed, t.plan.config.seed, t.point["seed"]) for t in found] == [(3, 3, 3), (1, 1, 1)]
    assert sum(text.startswith("seed=") for text in found[0].overrides) == 1


def test_later_seeds_and_extra_settings(shared: tuple[Out, str]) -> None:
    sweep = made(train=shared[1])
    (trial,) = trials_of(shared[0], sweep, {"optim.lr": 0.1}, ["optim.momentum=0.5"], later=2)
    assert (trial.seed, trial.plan.config.seed, trial.plan.config.optim.momentum) == (9, 9, 0.5)


def test_a_point_beats_the_overrides_and_extra_beats_the_point(shared: tuple[Out, str]) -> None:
    sweep = made(train=shared[1], overrides=["optim.lr=9", "optim.momentum=0.5", "optim.weight_decay=0.5"])
    point = {"optim.lr": 0.25, "optim.momentum": 0.25}
    (trial,) = trials_of(shared[0], sweep, point, ["optim.momentum=0.125"])
    optim = trial.plan.config.optim
    assert (optim.lr, optim.momentum, optim.weight_decay) == (0.25, 0.125, 0.5)
    assert trial.overrides[-1] == "seed=7"


@pytest.mark.parametrize(
    "point",
    [
        {"optim.lr": 1e-05},
        {"optim.lr": 1e16, "model.query_softmax": True},
        {"model.placement": None},
        {"model.placement": "g/g/g/g", "optim.name": "adamw"},
        {"data.crop_scale": [0.3, 1.0]},
        {"optim": {"lr": 0.5, "epochs": 3, "warmup_epochs": 0, "global_batch": 16, "micro_batch": 8}},
        {"seed": 12},
    ],
    ids=str,
)
def test_the_printed_command_line_is_the_same_run(shared: tuple[Out, str], point: Point) -> None:
    out, recipe = shared
    sweep = made(train=recipe, overrides=["optim.epochs=3"])
    for trial in trials_of(out, sweep, point):
        printed = shlex.split(shlex.join(trial.overrides))  # through a shell
        again = plan(out, load(Config, "train", recipe, printed))
        assert again.run == trial.plan.run
        assert again.config == trial.plan.config
    reference = override(load(Config, "train", recipe, sweep.overrides), [])
    for field, value in point.items():  # and it is the run that was meant
        reference = override(reference, [f"{field}={json.dumps(value)}"])
    assert plan(out, reference).run == trial.plan.run


def test_nothing_is_written_to_lay_a_sweep_out(out: Out, mini_config: Any, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(dump(mini_config()))
    before = sorted(out.root.rglob("*"))
    assert len(laid_out((out, str(tmp_path / "recipe.yaml")))[0]) == 2
    assert sorted(out.root.rglob("*")) == before


def test_two_spellings_of_a_network_are_one_trial(shared: tuple[Out, str]) -> None:
    spellings = ["gggg", "g/g/g/g", "all", None, "last:4", "cggg"]
    found, faults = laid_out(shared, parameters={"model.placement": spellings}, seeds=2)
    assert faults == []
    assert [(t.point["model.placement"], t.seed) for t in found] == [
        ("gggg", 7),
        ("gggg", 8),
        ("cggg", 7),
        ("cggg", 8),
    ]


def test_all_wrong_points_are_named_at_once_and_the_good_ones_come_back(shared: tuple[Out, str]) -> None:
    found, faults = laid_out(shared, parameters={"model.placement": ["ggg", "gggg", "ggggg"], "seed": [1, 2]})
    assert [(t.point["model.placement"], t.seed) for t in found] == [("gggg", 1), ("gggg", 2)]
    assert len(faults) == 4
    for text, start in zip(faults, itertools.product(["ggg", "ggggg"], [1, 2]), strict=True):
        assert text.startswith("model.placement={} seed={}: model: ".format(*start))
        assert len(text.splitlines()) == 1


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            {"optim.lrr": [0.1]},
            "optim.lrr=0.1: train recipe recipe: optim.lrr is unknown; did you mean optim.lr?",
        ),
        ({"optim.lr": [0]}, "optim.lr=0: train recipe recipe: optim.lr: expected greater than 0, got 0"),
        ({"seed": [1.5]}, "seed=1.5: train recipe recipe: seed: expected a valid integer, got 1.5"),
        ({"seed.x": [1]}, "seed.x=1: override 'seed.x=1': seed is a value, not a section"),
        (
            {"optim.micro_batch": [3]},
            "optim.micro_batch=3: train recipe recipe: optim: global_batch 16 is not",
        ),
        ({"optim.micro_batch": [16, 64], "optim.global_batch": [64]}, "optim.micro_batch="),
    ],
    ids=str,
)
def test_a_point_that_cannot_be_is_named(
    parameters: dict[str, Any], message: str, shared: tuple[Out, str]
) -> None:
    found, faults = laid_out(shared, parameters=parameters)
    assert not found
    assert len(faults) == len(next(iter(parameters.values())))
    assert all(text.startswith(message) for text in faults)


def test_a_trial_of_its_own_is_refused_too(shared: tuple[Out, str]) -> None:
    sweep = made(train=shared[1])
    message = fault(lambda: trials_of(shared[0], sweep, {"optim.lrr": 1}))
    assert "optim.lrr is unknown; did you mean optim.lr?" in message


def test_an_unknown_recipe_is_refused(shared: tuple[Out, str]) -> None:
    message = fault(lambda: trials_of(shared[0], made(train="digit"), {}))
    assert message.startswith("train recipe digit is unknown; did you mean digits?")


def test_the_name_of_a_point() -> None:
    point = {"a": "word", "b": 0.1, "c": None, "d": True, "e": [1, "x"]}
    assert name_of(point) == 'a=word b=0.1 c=null d=true e=[1, "x"]'


# --- what a sweep was begun with ---------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> SweepDir:
    return SweepDir(tmp_path / "sweeps" / "x")


def outcome(run: str = "run", point: Point | None = None, **changes: Any) -> Outcome:
    values: dict[str, Any] = {"seed": 0, "overrides": ("a=1",), "state": "finished", "epoch": 2}
    values |= {"metrics": {"val/top1": 50.0}, "seconds": 1.5}
    return Outcome(run, point or {"optim.lr": 0.1}, **{**values, **changes})


RANDOM = {"sampler": "random", "points": 3, "parameters": {"optim.lr": {"uniform": [0.1, 1]}}}
TPE = {**RANDOM, "sampler": "tpe"}
PBT = {"sampler": "pbt", "pbt": {}, "parameters": {"optim.lr": {"uniform": [0.1, 1]}}}


@pytest.mark.parametrize(
    ("first", "changes"),
    [
        ({}, {}),
        (TPE, {}),
        (PBT, {}),
        ({}, {"seeds": 3}),
        ({"seeds": 3}, {"seeds": 1}),
        ({}, {"parameters": {"optim.lr": [0.3]}}),
        ({}, {"parameters": {"optim.lr": [0.1, 0.2], "optim.momentum": [0.1]}}),
        (RANDOM, {"points": 30}),
        (RANDOM, {"parameters": {"optim.lr": {"uniform": [0.2, 1]}}}),
        (TPE, {"points": 30}),
        (TPE, {"points": 2, "seeds": 2}),
        ({}, {"baseline": {"optim.lr": 0.1}}),
    ],
    ids=str,
)
def test_what_may_change(folder: SweepDir, first: dict[str, Any], changes: dict[str, Any]) -> None:
    begin(folder, made(**first))
    record(folder, outcome())
    append_line(folder.points, {"optim.lr": 0.1})
    second = made(**{**first, **changes})
    begin(folder, second)
    assert read(folder) == second
    assert outcomes(folder) == {"run": outcome()}
    assert folder.points.read_text() == '{"optim.lr": 0.1}\n'


@pytest.mark.parametrize(
    ("first", "changes"),
    [
        ({}, {"train": "folder"}),
        ({}, {"overrides": ["optim.epochs=3"]}),
        ({}, {"mode": "min"}),
        ({}, {"metric": "val/loss"}),
        ({}, {"asha": {}}),
        ({"asha": {}}, {"asha": {"grace_epochs": 2}}),
        ({}, {"sampler_seed": 1}),
        ({}, {"sampler": "random", "points": 3}),
        (TPE, {"trade_off": "params"}),
        (TPE, {"parameters": {"optim.lr": {"uniform": [0.2, 1]}}}),
        (PBT, {"parameters": {"optim.lr": {"uniform": [0.2, 1]}}}),
        (PBT, {"pbt": {"population": 9}}),
    ],
    ids=str,
)
def test_what_may_not_change_but_be_replaced(
    folder: SweepDir, first: dict[str, Any], changes: dict[str, Any]
) -> None:
    begin(folder, made(**first))
    record(folder, outcome())
    append_line(folder.points, {"optim.lr": 0.1})
    second, files = made(**{**first, **changes}), sorted(folder.path.iterdir())
    before = [file.read_bytes() for file in files]
    message = fault(lambda: begin(folder, second))
    assert message.startswith(
        "sweep x was begun with another " + ", ".join(c for c in changes if c != "points")
    )
    assert "what may change: points, seeds, " in message
    assert message.endswith("next: another name, or --replace, which forgets its outcomes and keeps the runs")
    assert [file.read_bytes() for file in files] == before
    begin(folder, second, replace=True)
    assert read(folder) == second
    assert outcomes(folder) == {}
    assert not folder.points.exists()


def test_the_message_says_what_was_and_what_is(folder: SweepDir) -> None:
    begin(folder, made())
    message = fault(lambda: begin(folder, made(mode="min", metric="val/loss")))
    assert "another metric, mode (metric: 'val/top1' then, 'val/loss' now)" in message


def test_replacing_a_sweep_by_itself_forgets_nothing(folder: SweepDir) -> None:
    begin(folder, made())
    record(folder, outcome())
    begin(folder, made(), replace=True)
    assert outcomes(folder) == {"run": outcome()}


def test_an_unknown_sweep_lists_the_known_ones(folder: SweepDir) -> None:
    place = folder.path.parent
    assert fault(lambda: read(folder)) == f"sweep x: not found in {place}; there are: none"
    for name in ("zebra", "ant"):
        begin(SweepDir(place / name), made(name=name))
    (place / "no sweep").mkdir()
    assert fault(lambda: read(folder)) == f"sweep x: not found in {place}; there are: ant, zebra"


def test_a_sweep_file_is_written_whole(folder: SweepDir) -> None:
    begin(folder, made())
    assert [p.name for p in folder.path.iterdir()] == ["sweep.yaml"]
    assert read_yaml(folder.config)["parameters"]["optim.lr"]["choice"] == [0.1, 0.2]


# --- outcomes ----------------------------------------------------------------------------------------------


def test_the_last_outcome_of_a_run_counts_in_the_order_of_the_first(folder: SweepDir) -> None:
    begin(folder, made())
    assert outcomes(folder) == {}
    for run, state in [("b", "failed"), ("a", "stopped"), ("c", "finished"), ("b", "finished")]:
        record(folder, outcome(run, state=state))
    found = outcomes(folder)
    assert [(run, o.state) for run, o in found.items()] == [
        ("b", "finished"),
        ("a", "stopped"),
        ("c", "finished"),
    ]
    assert found["a"] == outcome("a", state="stopped")


def test_half_a_last_line_counts_for_nothing_and_spoils_nothing(folder: SweepDir) -> None:
    """At every byte at which power might have been lost; the next outcome is not glued to the rest."""
    begin(folder, made())
    record(folder, outcome("a"))
    first = folder.outcomes.read_bytes()
    record(folder, outcome("b"))
    whole = folder.outcomes.read_bytes()
    for end in range(len(first), len(whole)):
        folder.outcomes.write_bytes(whole[:end])
        assert list(outcomes(folder)) == ["a"]
        if end % 10 == 0 or end == len(whole) - 1:
            begin(folder, made())
            record(folder, outcome("c"))
            assert list(outcomes(folder)) == ["a", "c"]


def test_half_a_written_point_spoils_nothing(folder: SweepDir) -> None:
    from pipeline.metrics import read_lines

    begin(folder, made(**TPE))
    folder.points.write_text('{"optim.lr": 0.25}\n{"optim.')
    begin(folder, made(**TPE))
    append_line(folder.points, {"optim.lr": 0.5})
    assert read_lines(folder.points) == [{"optim.lr": 0.25}, {"optim.lr": 0.5}]


def test_a_metric_that_is_no_number_is_recorded(folder: SweepDir) -> None:
    begin(folder, made())
    record(folder, outcome(metrics={"val/top1": math.nan, "train/loss": math.inf}))
    found = outcomes(folder)["run"].metrics
    assert math.isnan(found["val/top1"])
    assert found["train/loss"] == math.inf


# --- the best ----------------------------------------------------------------------------------------------


def ended(values: dict[float, list[float | None]], **changes: Any) -> list[Outcome]:
    """Outcomes of points (optim.lr) by the metrics of their seeds; None: it failed."""
    return [
        outcome(
            f"{lr}-{seed}",
            {"optim.lr": lr},
            seed=seed,
            state="failed" if value is None else "finished",
            metrics={"val/top1": 99.0 if value is None else value},
            **changes,
        )
        for lr, all_values in values.items()
        for seed, value in enumerate(all_values)
    ]


@pytest.mark.parametrize(
    ("values", "mode", "run"),
    [
        ({0.1: [50.0], 0.2: [60.0], 0.3: [40.0]}, "max", "0.2-0"),
        ({0.1: [50.0], 0.2: [60.0], 0.3: [40.0]}, "min", "0.3-0"),
        ({0.1: [90.0, 10.0], 0.2: [60.0, 60.0]}, "max", "0.2-0"),  # the mean, not the best seed
        ({0.1: [90.0, 10.0], 0.2: [60.0, 60.0]}, "min", "0.1-0"),
        ({0.1: [90.0, None], 0.2: [60.0, 60.0]}, "max", "0.2-0"),
        ({0.1: [None, 90.0], 0.2: [60.0, 60.0]}, "max", "0.2-0"),
        ({0.1: [90.0, math.nan], 0.2: [60.0, 60.0]}, "max", "0.2-0"),
        ({0.1: [math.inf, 1.0], 0.2: [60.0, 60.0]}, "max", "0.2-0"),
        ({0.1: [-math.inf, 1.0], 0.2: [60.0, 60.0]}, "min", "0.2-0"),
        ({0.1: [90.0], 0.2: [60.0, 60.0]}, "max", "0.2-0"),  # the other seed has not ended yet
        ({0.1: [50.0], 0.2: [50.0]}, "max", "0.1-0"),  # a tie: the first
        ({0.1: [50.0], 0.2: [50.0]}, "min", "0.1-0"),
    ],
    ids=str,
)
def test_the_best_point_is_that_of_the_best_mean(
    values: dict[float, list[float | None]], mode: str, run: str
) -> None:
    seeds = max(map(len, values.values()))
    assert best(made(mode=mode, seeds=seeds), ended(values)).run == run


def test_a_point_that_was_trained_to_the_end_is_better_than_one_that_was_stopped() -> None:
    stopped = outcome("stopped", {"optim.lr": 0.2}, state="stopped", metrics={"val/top1": 61.0})
    finished = outcome("finished", metrics={"val/top1": 60.0})
    assert best(made(), [stopped, finished]).run == "finished"
    assert best(made(), [stopped]).run == "stopped"


def test_a_seed_that_is_a_parameter_is_not_what_is_best() -> None:
    ended_ = [
        outcome(f"{lr}-{seed}", {"optim.lr": lr, "seed": seed}, seed=seed, metrics={"val/top1": value})
        for lr, seed, value in [(0.1, 0, 90.0), (0.1, 1, 50.0), (0.2, 0, 80.0), (0.2, 1, 82.0)]
    ]
    parameters = {"optim.lr": [0.1, 0.2], "seed": [0, 1]}
    assert best(made(parameters=parameters), ended_).run == "0.2-0"


@given(order=st.permutations(range(6)))
@settings(max_examples=30, deadline=None)
def test_the_order_in_which_seeds_end_does_not_matter(order: list[int]) -> None:
    found = ended({0.1: [90.0, 10.0], 0.2: [60.0, 61.0], 0.3: [59.0, 59.0]})
    chosen = best(made(seeds=2), [found[i] for i in order])
    assert chosen.point == {"optim.lr": 0.2}


def test_points_are_the_same_whatever_the_order_of_their_fields() -> None:
    a, b = {"x": 1, "y": 2}, {"y": 2, "x": 1}
    found = [outcome("r0", a, metrics={"val/top1": 90.0}), outcome("r1", b, metrics={"val/top1": 80.0})]
    found += [outcome(f"s{i}", {"x": 2, "y": 2}, metrics={"val/top1": 60.0}) for i in range(2)]
    assert best(made(seeds=2), found).run == "r0"


def test_a_failed_seed_counts_also_where_fewer_are_asked_for_now() -> None:
    assert best(made(seeds=1), ended({0.1: [90.0, None], 0.2: [60.0, 60.0]})).run == "0.2-0"


def test_of_a_population_each_run_counts_by_itself() -> None:
    """A member that lives on has the same point in each generation."""
    found = [
        outcome("old", {"optim.lr": 0.5}, metrics={"val/top1": 10.0}),
        outcome("other", {"optim.lr": 0.6}, metrics={"val/top1": 60.0}),
        outcome("new", {"optim.lr": 0.5}, metrics={"val/top1": 90.0}),
    ]
    assert best(made(**PBT), found).run == "new"


@pytest.mark.parametrize(
    "values",
    [{}, {0.1: [None], 0.2: [math.nan]}, {0.1: [50.0, None], 0.2: [None, 50.0]}],
    ids=["none", "not finite", "no point whole"],
)
def test_without_a_finite_metric_there_is_no_best(values: dict[float, list[float | None]]) -> None:
    seeds = max(map(len, values.values()), default=1)
    with pytest.raises(
        ConfigError, match=r"^sweep x: no point has a finite val/top1 .*error.log of its runs$"
    ):
        best(made(seeds=seeds), ended(values))
    with pytest.raises(ConfigError, match="no point has a finite val/loss"):
        best(made(metric="val/loss"), ended({0.1: [50.0]}))
