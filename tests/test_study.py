"""Means, intervals and paired differences are those of scipy and of the hand; what did not finish is left out."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from studies import write_run

from pipeline import metrics
from pipeline.config import Config, InputError, validate
from pipeline.rundir import Out, write_atomic
from pipeline.study import (
    PAPER_TOP1,
    Difference,
    Run,
    Study,
    estimate,
    expected_largest,
    luck,
    outcomes_of,
    paired,
    paper_figure,
    parse_point,
    read_runs,
    study,
)
from pipeline.sweep import Outcome

PLACEMENT, LR = "model.placement", "optim.lr"


@pytest.fixture
def out(tmp_path: Path) -> Out:
    return Out(tmp_path)


def seeds(out: Out, point: dict[str, Any], *finals: float, **more: Any) -> list[Outcome]:
    """A run of one epoch for each figure, with the seeds 0, 1, ..."""
    return [write_run(out, [final], point, seed=seed, **more) for seed, final in enumerate(finals)]


def studied(out: Out, ended: list[Outcome], **settings: Any) -> Study:
    return study(read_runs(out, ended), **settings)


# --- figures -----------------------------------------------------------------------------------------------


def test_an_estimate_of_three_seeds_is_that_of_the_hand_and_of_scipy() -> None:
    found = estimate([90.0, 92.0, 97.0])
    assert (found.n, found.mean) == (3, 93.0)
    assert found.std == pytest.approx(math.sqrt((9 + 1 + 16) / 2), rel=1e-12)
    low, high = stats.t.interval(0.95, df=2, loc=93, scale=stats.sem([90, 92, 97]))
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9)
    assert found.half == pytest.approx(4.302652729911 * math.sqrt(13) / math.sqrt(3), rel=1e-9)


def test_one_seed_has_a_mean_and_no_interval() -> None:
    found = estimate([90.0])
    assert (found.n, found.mean) == (1, 90.0)
    assert all(map(math.isnan, (found.std, found.half, found.low)))
    assert math.isnan(estimate([]).mean)


def test_a_paired_difference_leaves_out_the_seeds_that_one_side_lacks() -> None:
    found = paired({0: 2.0, 1: 4.0, 2: 9.0}, {3: 5.0, 1: 1.0, 0: 1.0})
    assert found.left_out == (2, 3)
    assert (found.score.n, found.score.mean) == (2, 2.0)  # 2 - 1 and 4 - 1
    expected = stats.ttest_rel([2.0, 4.0], [1.0, 1.0]).confidence_interval(0.95)
    assert (found.score.low, found.score.high) == pytest.approx(expected, rel=1e-9)
    assert paired({0: 1.0}, {1: 1.0}).score.n == 0


@pytest.mark.parametrize(
    ("count", "expected"), [(1, 0.0), (2, 1 / math.sqrt(math.pi)), (3, 1.5 / math.sqrt(math.pi))]
)
def test_the_expected_largest_of_a_few_normal_numbers(count: int, expected: float) -> None:
    assert expected_largest(count) == pytest.approx(expected, abs=1e-6)


def test_the_expected_largest_of_many_is_that_of_draws() -> None:
    drawn = np.random.default_rng(0).standard_normal((20_000, 24)).max(axis=1)
    assert expected_largest(24) == pytest.approx(drawn.mean(), abs=4 * drawn.std() / math.sqrt(20_000))


# --- points ------------------------------------------------------------------------------------------------


def test_the_seeds_of_a_point_are_one_row_and_the_best_comes_first(out: Out) -> None:
    ended = seeds(out, {PLACEMENT: "cccc"}, 80.0, 82.0) + seeds(out, {PLACEMENT: "gggg"}, 90.0, 94.0)
    found = studied(out, ended)
    assert [row.point for row in found.rows] == [{PLACEMENT: "gggg"}, {PLACEMENT: "cccc"}]
    assert [(row.score.n, row.score.mean) for row in found.rows] == [(2, 92.0), (2, 81.0)]
    assert (found.fields, found.constant) == ((PLACEMENT,), {})
    assert studied(out, ended, mode="min").rows[0].point == {PLACEMENT: "cccc"}


def test_what_did_not_finish_is_counted_and_not_averaged(out: Out) -> None:
    ended = [
        *seeds(out, {LR: 0.1}, 90.0, 92.0),
        write_run(out, [10.0], {LR: 0.1}, seed=2, state="stopped"),
        write_run(out, [], {LR: 0.1}, seed=3, state="failed"),
        write_run(out, [99.0], {LR: 0.4}, seed=0, state="stopped"),
    ]
    good, bad = studied(out, ended).rows
    assert (good.score.n, good.score.mean) == (2, 91.0)
    assert [good.count(state) for state in ("finished", "stopped", "failed")] == [2, 1, 1]
    assert bad.point == {LR: 0.4}
    assert bad.score.n == 0 and math.isnan(bad.score.mean)


def test_a_run_without_a_finite_metric_is_not_averaged(out: Out) -> None:
    rows = studied(out, seeds(out, {LR: 0.1}, 90.0, math.nan)).rows
    assert (rows[0].score.n, rows[0].score.mean) == (1, 90.0)


def test_a_seed_that_is_a_parameter_is_no_point_of_its_own(out: Out) -> None:
    ended = [write_run(out, [80.0 + seed], {LR: 0.1, "seed": seed}, seed=seed) for seed in range(3)]
    (row,) = studied(out, ended).rows
    assert (row.point, row.score.n) == ({LR: 0.1}, 3)


def test_of_two_runs_of_a_point_and_seed_the_last_counts(out: Out) -> None:
    ended = [write_run(out, [80.0], {LR: 0.1}), write_run(out, [90.0], {LR: 0.1})]
    assert studied(out, ended).rows[0].score.mean == 90.0


def test_fields_that_only_some_points_have_tell_them_apart(out: Out) -> None:
    ended = [write_run(out, [80.0], {LR: 0.1}), write_run(out, [81.0], {LR: 0.1, "optim.momentum": 0.8})]
    found = studied(out, ended)
    assert found.fields == ("optim.momentum",)
    assert found.constant == {LR: 0.1}
    assert [found.name(row.point) for row in found.rows] == ["momentum=0.8", "all runs"]


def test_names_keep_the_section_where_two_fields_end_alike(out: Out) -> None:
    ended = [
        write_run(out, [80.0], {"model.name": "resnet50", "optim.name": "sgd", LR: 0.1}),
        write_run(out, [81.0], {"model.name": "gsa_resnet50", "optim.name": "lamb", LR: 0.2}),
    ]
    found = studied(out, ended)
    assert found.name(found.rows[0].point) == "model.name=gsa_resnet50 optim.name=lamb lr=0.2"


def test_costs_come_from_the_journal_and_the_facts(out: Out) -> None:
    run = write_run(out, [1.0, 2.0, 3.0], facts={"params": 7, "gflops": 1.5})  # 3 epochs of 36 s on 2 workers
    other = write_run(out, [1.0], seed=1, state="failed")
    journal = out.run(run.run).metrics
    text = journal.read_text().replace('"perf/images_per_s": 100.0', '"perf/images_per_s": 10.0', 1)
    journal.write_text(text)
    (row,) = studied(out, [run, other]).rows
    assert (row.params, row.gflops) == (7, 1.5)
    assert row.device_hours == pytest.approx((3 + 1) * 36 * 2 / 3600)
    assert row.images_per_s == 100.0  # not the first epoch's; of the other run there is no second


def test_without_a_number_of_workers_it_is_one(out: Out) -> None:
    run = write_run(out, [1.0])
    out.run(run.run).metrics.write_text(
        out.run(run.run).metrics.read_text().replace('"perf/world": 2', '"x": 2')
    )
    assert studied(out, [run]).rows[0].device_hours == pytest.approx(0.01)


def test_epochs_after_the_outcome_are_not_its_own(out: Out) -> None:
    stopped = write_run(out, [10.0, 20.0, 30.0], state="stopped")._replace(epoch=2)
    (run,) = read_runs(out, [stopped])
    assert [r.metrics["val/top1"] for r in run.records] == [10.0, 20.0]


def test_an_unknown_metric_names_those_that_there_are(out: Out) -> None:
    ended = seeds(out, {}, 80.0)
    with pytest.raises(InputError, match=r"metric val/top9: none of 1 runs .* there are: .*val/top1"):
        studied(out, ended, metric="val/top9")
    with pytest.raises(InputError, match="none has ended an epoch"):
        studied(out, [write_run(out, [], state="failed")])


# --- differences -------------------------------------------------------------------------------------------


def test_points_are_compared_with_the_baseline_seed_by_seed(out: Out) -> None:
    ended = seeds(out, {PLACEMENT: "cccc"}, 80.0, 84.0, 82.0) + seeds(out, {PLACEMENT: "gggg"}, 91.0, 93.0)
    found = studied(out, ended, baseline={PLACEMENT: "cccc"})
    best, base = found.rows
    assert base.difference is None and found.baseline == {PLACEMENT: "cccc"}
    assert best.difference == Difference(estimate([11.0, 9.0]), left_out=(2,))


def test_a_baseline_may_be_named_by_a_setting_that_is_no_field_of_the_points(out: Out) -> None:
    ended = seeds(out, {PLACEMENT: "cccc"}, 80.0) + seeds(out, {PLACEMENT: "gggg"}, 91.0)
    assert studied(out, ended, baseline={PLACEMENT: "gggg", LR: 0.1}).baseline == {PLACEMENT: "gggg"}


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({PLACEMENT: "cggg"}, "got none of 2: .*model.placement=gggg optim.heads=1"),
        ({"optim.heads": True}, "got none of 2"),
        (
            {"optim.heads": 1.0},
            "got 2: model.placement=gggg .*; model.placement=cccc .*; next: name more fields",
        ),
    ],
)
def test_a_baseline_that_is_not_one_point_is_refused(out: Out, wanted: dict[str, Any], message: str) -> None:
    ended = seeds(out, {PLACEMENT: "cccc"}, 80.0) + seeds(out, {PLACEMENT: "gggg"}, 91.0)
    ended = [o._replace(point={**o.point, "optim.heads": 1}) for o in ended]
    with pytest.raises(InputError, match=message):
        studied(out, ended, baseline=wanted)


def test_each_gsa_point_has_the_convolutional_twin_nearest_in_cost(out: Out) -> None:
    def point(placement: str, lr: float, params: int, final: float) -> Outcome:
        facts = {"params": params, "gflops": 1.0}
        return write_run(out, [final], {PLACEMENT: placement, LR: lr}, facts=facts)

    ended = [
        point("cccc", 0.1, 1100, 80.0),
        point("cccc", 0.2, 1100, 82.0),
        point("ccc/cccc/cccccc/ccc", 0.2, 400, 70.0),
        point("gggg", 0.2, 1000, 90.0),
        point("cggg", 0.1, 1000, 85.0),
    ]
    twins = {row.score.mean: row.twin for row in studied(out, ended, iso="params").rows}
    assert {final for final, twin in twins.items() if twin} == {90.0, 85.0}
    for final, lr, difference in (
        (90.0, 0.2, 8.0),
        (85.0, 0.1, 5.0),
    ):  # of equal costs that with the same rate
        twin = twins[final]
        assert twin and twin.point == {PLACEMENT: "cccc", LR: lr}
        assert twin.apart == pytest.approx(0.1)
        assert twin.difference.score.mean == difference


def test_without_a_convolutional_point_there_is_no_twin(out: Out) -> None:
    ended = seeds(out, {PLACEMENT: "gggg"}, 91.0)
    ended += [write_run(out, [80.0], {PLACEMENT: "cccc"}, state="stopped")]
    with pytest.raises(InputError, match=r"--iso gflops: none of 2 points .* next: add one"):
        studied(out, ended, iso="gflops")


def test_luck_is_the_expected_best_of_equal_points(out: Out) -> None:
    ended = [
        *seeds(out, {LR: 0.1}, 90.0, 92.0),
        *seeds(out, {LR: 0.2}, 80.0, 84.0, 82.0),
        write_run(out, [5.0], {LR: 0.4}, state="stopped"),  # compared as well
        write_run(out, [], {LR: 0.8}, state="failed"),
    ]
    found = luck(studied(out, ended))
    std = math.sqrt((1 * 2 + 2 * 4) / 3)
    assert found and (found.points, found.freedom, found.n) == (3, 3, 2)
    assert found.std == pytest.approx(std)
    assert found.error == pytest.approx(std / math.sqrt(2))
    assert found.bias == pytest.approx(1.5 / math.sqrt(math.pi) * std / math.sqrt(2), rel=1e-5)
    assert luck(studied(out, seeds(out, {LR: 0.1}, 90.0))) is None


# --- the paper ---------------------------------------------------------------------------------------------

WNIDS = [f"n{i:08d}" for i in range(1000)]
OWN = {"model.name": "gsa_resnet50", "model.placement": "gggg"}


def imagenet(out: Out, point: dict[str, Any], classes: list[str]) -> Study:
    return studied(out, [write_run(out, [70.0], point, facts={"classes": classes})])


@pytest.mark.parametrize(("model", "expected"), PAPER_TOP1.items())
def test_the_papers_figure_stands_beside_its_networks_with_its_mark(
    out: Out, model: str, expected: str
) -> None:
    placement = "gggg" if model.startswith("gsa_") else "cccc"
    found = imagenet(out, {"model.name": model, PLACEMENT: placement}, WNIDS)
    assert paper_figure(found.rows[0], "val/top1") == expected
    assert re.search(r"\d\d(\.\d)? \[(seen|recalled)", expected)


@pytest.mark.parametrize(
    "change",
    [
        {PLACEMENT: "cggg"},
        {"data.image_size": 192},
        {"data.test_size": 256},
        {"model.window": 7},
        {"model.query_softmax": True},
        {"model.name": "gsa_resnet26"},
    ],
    ids=str,
)
def test_other_settings_have_no_figure_of_the_paper(out: Out, change: dict[str, Any]) -> None:
    assert paper_figure(imagenet(out, OWN, WNIDS).rows[0], "val/top1")
    assert paper_figure(imagenet(out, OWN | change, WNIDS).rows[0], "val/top1") is None


def test_other_pictures_and_metrics_have_no_figure_of_the_paper(out: Out) -> None:
    row = imagenet(out, OWN, WNIDS).rows[0]
    assert paper_figure(row, "val/top5") is None
    for classes in (WNIDS[:100], [f"class {i}" for i in range(1000)]):
        assert paper_figure(imagenet(out, OWN, classes).rows[0], "val/top1") is None


# --- what a study is of ------------------------------------------------------------------------------------


def test_runs_are_points_of_the_settings_in_which_they_differ(out: Out) -> None:
    names = [
        write_run(out, [80.0, 81.0], {LR: 0.1}, seed=0).run,
        write_run(out, [82.0], {LR: 0.1}, seed=1).run,
        write_run(out, [70.0], {LR: 0.4}, seed=0, state="stopped").run,
    ]
    found = outcomes_of(out, [*names, names[0]])
    assert [(o.run, o.point, o.seed, o.state, o.epoch) for o in found] == [
        (names[0], {LR: 0.1}, 0, "finished", 2),
        (names[1], {LR: 0.1}, 1, "finished", 1),
        (names[2], {LR: 0.4}, 0, "stopped", 1),
    ]
    assert found[0].metrics["val/top1"] == 81.0
    assert found[0].seconds == 72.0
    assert [row.score.n for row in studied(out, found).rows] == [2, 0]


def test_a_run_may_lie_elsewhere(out: Out, tmp_path: Path) -> None:
    path = str(out.run(write_run(out, [80.0]).run).path)
    other = Out(tmp_path / "other")
    (found,) = outcomes_of(other, [path])
    assert read_runs(other, [found])[0].last["val/top1"] == 80.0


def test_a_run_that_is_not_there_is_named(out: Out) -> None:
    name = write_run(out, [80.0]).run
    with pytest.raises(InputError, match=f"run nowhere: not found .* there are: {name}"):
        outcomes_of(out, ["nowhere"])


def test_a_network_without_a_module_is_a_convolution(out: Out) -> None:
    expected = {"cccc": True, "ccc/cccg/cccccc/ccc": False, "all": False, "none": True, "gggg": False}
    for placement, convolution in expected.items():
        (run,) = read_runs(out, [write_run(out, [1.0], {PLACEMENT: placement})])
        assert run.is_convolution == convolution, placement
    for name, convolution in (("resnet50", True), ("gsa_resnet50", False)):
        config = validate(Config, {"model": {"name": name}}, where="test")
        assert Run(run.outcome, config, {}, ()).is_convolution == convolution


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optim.lr=1e-1", {LR: 0.1}),
        (" model.placement=cccc  model.window=null", {PLACEMENT: "cccc", "model.window": None}),
        (
            "'data.shards=my set' data.crop_scale='[0.1, 1]'",
            {"data.shards": "my set", "data.crop_scale": [0.1, 1]},
        ),
    ],
)
def test_a_point_is_read_from_text(text: str, expected: dict[str, Any]) -> None:
    assert parse_point(text) == expected


@pytest.mark.parametrize("text", ["", "optim.lr", "=3", "a=1 b", "a='1", "a=[1"])
def test_what_is_no_point_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="point"):
        parse_point(text)


def test_a_torn_journal_line_is_not_read(out: Out) -> None:
    run = write_run(out, [80.0, 81.0])
    journal = out.run(run.run).metrics
    write_atomic(journal, journal.read_bytes()[:-5])
    assert [r.epoch for r in read_runs(out, [run])[0].records] == [1.0]
    assert len(metrics.read(journal)) == 3
