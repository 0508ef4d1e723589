"""What a sweep would cost: points, hours and disk by hand, and against a run that was made."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from gsa_models import create_model, model_cost
from pipeline import checkpoint, metrics
from pipeline.config import Config, InputError, Resources, dump, validate
from pipeline.plan import build_model, plan, prepare
from pipeline.preview import Preview, Total, check_budget, disk_bytes, measured_speed, preview, text
from pipeline.rundir import Out, RunDir, write_json
from pipeline.step import new_state
from pipeline.sweep import Outcome, Sweep, begin, lay_out, record, stated_points, trials_of
from pipeline.train import train

pytestmark = pytest.mark.usefixtures("one_thread")

# Of `mini`: 54 train samples make 3 steps of 16, forth and back; 18 val samples go forth alone.
PASSES = 3 * 3 * 16 + 18  # forward passes of an epoch
PARAMS, FLOPS = 378_619, 5_196_800  # of the tiny network for 3 classes, an image of 32 pixels
ONE = Resources()


@pytest.fixture
def sweep_of(mini_config: Any, tmp_path: Path) -> Callable[..., Sweep]:
    """sweep_of(parameters=..., ...): a sweep over mini_config()."""
    recipe = tmp_path / "mini.yaml"
    recipe.write_text(dump(mini_config()))

    def make(**values: Any) -> Sweep:
        return validate(Sweep, {"name": "s", "train": str(recipe), **values}, where="sweep_of")

    return make


def look(out: Out, sweep: Sweep, resources: Resources = ONE, tflops: float | None = None) -> Preview:
    trials, faults = lay_out(stated_points(sweep), partial(trials_of, out, sweep))
    assert not faults
    return preview(sweep, trials, out=out, resources=resources, tflops=tflops)


def runs(out: Out, sweep: Sweep) -> list[RunDir]:
    trials, _ = lay_out(stated_points(sweep), partial(trials_of, out, sweep))
    return [trial.plan.run for trial in trials]


def journal(run: RunDir, *records: dict[str, float]) -> None:
    for i, values in enumerate(records, start=1):
        metrics.append(run.metrics, step=3 * i, epoch=float(i), metrics=values)


def epoch(pace: float, **more: float) -> dict[str, float]:
    return {"val/count": 18.0, "perf/images_per_s": pace, **{f"perf/{k}": v for k, v in more.items()}}


# --- rows --------------------------------------------------------------------------------------------------


def test_a_point_is_one_row_in_its_canonical_spelling_with_what_its_network_costs(
    out: Out, sweep_of: Any
) -> None:
    choices = {"model.components": ["row+column+content", "content"], "optim.lr": [0.1]}
    found = look(out, sweep_of(parameters=choices, seeds=3), tflops=1e-6)
    first, second = found.rows
    with torch.device("meta"):
        network = create_model("gsa_resnet_tiny", num_classes=3, image_size=32, heads=4)
    cost = model_cost(network, 32)
    assert (cost.params, cost.flops) == (PARAMS, FLOPS)
    hours = 3 * PASSES * 2 * FLOPS / 1e6 / 3600  # three seeds, two epochs, a million FLOP a second
    assert first == {
        "model.components": "content+column+row",
        "optim.lr": 0.1,
        "seeds": 3,
        "input": "3x32x32",
        "params": PARAMS,
        "GFLOPs": 0.0052,
        "activation MiB": round(4 * cost.activation_bytes / 2**20, 1),  # micro-batches of 4
        "epochs": 2,
        "state": "new",
        "device-hours": pytest.approx(hours, rel=1e-3),
        "disk MB": round(3 * 2 * 2 * 4 * PARAMS / 1e6, 1),  # seeds, checkpoints, weights and momentum
    }
    assert second["model.components"] == "content" and second["params"] < first["params"]


def test_equal_points_are_one(out: Out, sweep_of: Any) -> None:
    found = look(out, sweep_of(parameters={"model.placement": ["all", "gggg", "last:4", "none"]}))
    assert [row["model.placement"] for row in found.rows] == ["gggg", "cccc"]
    assert found.total.trials == 2


def test_null_is_told_from_a_parameter_that_is_not_in_a_point(out: Out, sweep_of: Any) -> None:
    tied = {"choice": [3, None], "when": {"model.placement": ["gggg"]}}
    found = look(out, sweep_of(parameters={"model.placement": ["cccc", "gggg"], "model.window": tied}))
    assert [row["model.window"] for row in found.rows] == [None, 3, "null"]


def test_nothing_is_written(out: Out, sweep_of: Any) -> None:
    before = sorted(out.root.rglob("*"))
    look(out, sweep_of(parameters={"optim.lr": [0.1, 0.2]}), tflops=1.0)
    assert sorted(out.root.rglob("*")) == before


# --- what is left ------------------------------------------------------------------------------------------


def test_what_has_ended_costs_nothing_and_what_goes_on_costs_its_other_epochs(
    out: Out, sweep_of: Any
) -> None:
    sweep = sweep_of(parameters={"optim.lr": [0.1, 0.2, 0.3, 0.4]})
    done, stopped, goes_on, _ = runs(out, sweep)
    for run in (done, stopped, goes_on):
        run.path.mkdir(parents=True)
        journal(run, epoch(10.0))
    write_json(done.result, {})
    begin(out.sweep("s"), sweep)
    record(out.sweep("s"), Outcome(stopped.name, {}, 0, (), "stopped", 1, {}, 1.0))
    (goes_on.checkpoints / "step-000000003").mkdir(parents=True)
    found = look(out, sweep, tflops=1e-6)
    assert [row["state"] for row in found.rows] == ["done", "done", "goes on", "new"]
    one = PASSES * FLOPS / 1e6 / 3600  # an epoch
    assert [row["device-hours"] for row in found.rows] == pytest.approx([0, 0, one, 2 * one], rel=1e-3)
    assert (found.total.trials, found.total.to_run) == (4, 2)
    assert found.total.device_hours == pytest.approx(3 * one)
    assert found.total.disk_mb == pytest.approx(2 * 2 * 2 * 4 * PARAMS / 1e6)


def test_the_seeds_of_a_point_may_be_in_several_states(out: Out, sweep_of: Any) -> None:
    sweep = sweep_of(parameters={"optim.lr": [0.1]}, seeds=3)
    write_json(runs(out, sweep)[1].result, {})
    found = look(out, sweep, tflops=1e-6)
    assert found.rows[0]["state"] == "2 new, 1 done"
    assert found.total.device_hours == pytest.approx(2 * 2 * PASSES * FLOPS / 1e6 / 3600)


def test_a_finished_sweep_costs_nothing_even_where_nothing_tells_how_fast_a_device_is(
    out: Out, sweep_of: Any
) -> None:
    sweep = sweep_of(parameters={"optim.lr": [0.1]})
    write_json(runs(out, sweep)[0].result, {})
    assert look(out, sweep).total == Total(1, 0, 0.0, 0.0)


def test_averaged_weights_are_evaluated_and_kept_too(out: Out, sweep_of: Any) -> None:
    sweep = sweep_of(parameters={"optim.lr": [0.1]}, overrides=["optim.ema=0.9", "optim.name=adamw"])
    total = look(out, sweep, tflops=1e-6).total
    assert total.device_hours == pytest.approx(2 * (PASSES + 18) * FLOPS / 1e6 / 3600)
    assert total.disk_mb == pytest.approx(2 * 4 * 4 * PARAMS / 1e6)  # weights, two moments, averages


# --- samplers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "trials"),
    [
        ({"sampler": "tpe", "points": 5, "seeds": 2}, 10),
        ({"sampler": "pbt", "pbt": {"population": 4, "generations": 3}}, 12),
    ],
)
def test_points_that_are_not_known_yet_are_estimated_by_random_ones(
    out: Out, sweep_of: Any, settings: dict[str, Any], trials: int
) -> None:
    sweep = sweep_of(parameters={"optim.lr": {"uniform": [0.1, 0.5]}}, **settings)
    one = 2 * PASSES * FLOPS / 1e6 / 3600
    found = look(out, sweep, tflops=1e-6)
    assert {row["state"] for row in found.rows} == {"stand-in"}
    assert (found.total.trials, found.total.to_run) == (trials, trials)
    assert found.total.device_hours == pytest.approx(trials * one)
    assert f"the total is {trials} times their mean, less what has ended" in found.notes[0]
    begin(out.sweep("s"), sweep)
    states = {"a": "finished", "b": "stopped", "c": "failed"}
    for run, state in states.items():
        record(out.sweep("s"), Outcome(run, {}, 0, (), state, 1, {}, 1.0))  # type: ignore[arg-type]
    found = look(out, sweep, tflops=1e-6)
    assert found.total.to_run == trials - 2
    assert found.total.device_hours == pytest.approx((trials - 2) * one)


def test_with_early_stopping_the_estimate_is_the_most(out: Out, sweep_of: Any) -> None:
    sweep = sweep_of(parameters={"optim.lr": [0.1, 0.2]}, asha={})
    assert "ASHA ends trials early: hours and disk are the most that it may take" in look(out, sweep).notes


# --- how fast a device is ----------------------------------------------------------------------------------


def test_a_run_tells_the_pace_of_one_device(out: Out, sweep_of: Any, mini_config: Any) -> None:
    """24 and 40 images a second of two workers: 16 of each; two passes forth, one back."""
    run = prepare(out, mini_config(seed=7))
    journal(run, epoch(24.0, world=2.0), epoch(40.0, world=2.0))
    found = look(out, sweep_of(parameters={"optim.lr": [0.1]}))
    assert found.total.device_hours == pytest.approx(2 * PASSES / 3 / 16 / 3600)
    speed = 3 * 16 * FLOPS / 1e12
    assert found.notes == [
        f"hours at {speed:.3g} TFLOP/s a device, measured on run {run.name} (gsa_resnet_tiny, 32 pixels)"
    ]


def test_the_pace_is_the_mean_of_all_records_each_with_the_workers_of_its_epoch(
    out: Out, mini_config: Any
) -> None:
    """The last record of an epoch may be of its last few steps alone."""
    run = prepare(out, mini_config())
    within = {"perf/images_per_s": 60.0}
    journal(run, within, epoch(30.0, world=3.0), within, epoch(90.0, world=2.0), {"perf/images_per_s": 1e9})
    speed = measured_speed(run, cuda=False)
    assert speed and speed.flops == pytest.approx(3 * FLOPS * (20 + 10 + 30 + 45) / 4)
    assert speed.network == ("gsa_resnet_tiny", 32)


def test_workers_that_were_not_recorded_were_one(out: Out, mini_config: Any) -> None:
    run = prepare(out, mini_config())
    journal(run, epoch(30.0))
    speed = measured_speed(run, cuda=False)
    assert speed and speed.flops == pytest.approx(3 * FLOPS * 30)


def test_a_run_of_the_same_network_and_size_tells_more_than_a_newer_one(
    out: Out, sweep_of: Any, mini_config: Any
) -> None:
    same = prepare(out, mini_config(seed=7))
    journal(same, epoch(10.0))
    found = look(out, sweep_of(parameters={"model.name": ["gsa_resnet_tiny", "resnet_tiny"]}))
    assert [f"measured on run {same.name}" in note for note in found.notes] == [True]
    newer = prepare(out, mini_config(image_size=64))
    journal(newer, epoch(20.0))
    found = look(out, sweep_of(parameters={"model.name": ["gsa_resnet_tiny", "resnet_tiny"]}))
    ours, other = found.notes
    assert f"run {same.name} (gsa_resnet_tiny, 32 pixels)" in ours
    assert f"run {newer.name} (gsa_resnet_tiny, 64 pixels)" in other  # of no resnet_tiny: the newest


def test_what_is_given_is_stronger_than_what_was_measured(out: Out, sweep_of: Any, mini_config: Any) -> None:
    journal(prepare(out, mini_config(seed=7)), epoch(24.0))
    found = look(out, sweep_of(parameters={"optim.lr": [0.1]}), tflops=2.0)
    assert found.total.device_hours == pytest.approx(2 * PASSES * FLOPS / 2e12 / 3600)
    assert found.notes == ["hours at 2 TFLOP/s a device, as given by --tflops"]


def test_a_run_on_a_cpu_tells_nothing_of_a_gpu(out: Out, sweep_of: Any, mini_config: Any) -> None:
    sweep, gpu = sweep_of(parameters={"optim.lr": [0.1]}), Resources(gpus_per_worker=1)
    journal(prepare(out, mini_config(seed=7)), epoch(24.0))
    found = look(out, sweep, gpu)
    assert found.total.device_hours is None and found.rows[0]["device-hours"] is None
    assert found.notes[0].startswith(
        "hours are not known: no run here has trained an epoch on GPUs; next: --tflops X"
    )
    journal(prepare(out, mini_config(seed=8)), epoch(2400.0, memory_gb=1.0))
    for resources, pace in ((gpu, 2400), (ONE, 24)):
        hours = look(out, sweep, resources).total.device_hours
        assert hours == pytest.approx(2 * PASSES / 3 / pace / 3600)


def test_runs_that_cannot_be_read_or_have_no_epoch_tell_nothing(
    out: Out, sweep_of: Any, mini_config: Any
) -> None:
    journal(prepare(out, mini_config(seed=7)), {"perf/images_per_s": 10.0})  # of how many workers?
    broken = prepare(out, mini_config(seed=8))
    journal(broken, epoch(10.0))
    broken.config.write_text("of: [other code")
    assert look(out, sweep_of(parameters={"optim.lr": [0.1]})).total.device_hours is None


@pytest.mark.parametrize("tflops", [0.0, -1.0, math.inf, math.nan])
def test_a_speed_above_nought_is_expected(out: Out, sweep_of: Any, tflops: float) -> None:
    with pytest.raises(InputError, match=r"--tflops \S+: expected a number above 0; next: 150"):
        look(out, sweep_of(parameters={"optim.lr": [0.1]}), tflops=tflops)


# --- the budget --------------------------------------------------------------------------------------------


def test_a_budget_refuses_what_takes_longer() -> None:
    check_budget(Total(3, 2, 2.5, 1.0), 2.5)
    with pytest.raises(
        InputError,
        match=r"--budget 2: expected at most 2 device-hours, got 2.5 for the 2 trials to run; next: fewer "
        r"points, seeds or epochs, or --budget 3",
    ):
        check_budget(Total(3, 2, 2.5, 1.0), 2.0)
    with pytest.raises(InputError):
        check_budget(Total(3, 2, 2.5, 1.0), math.nan)


def test_a_budget_refuses_what_nobody_can_estimate() -> None:
    with pytest.raises(InputError, match=r"--budget 2: expected an estimate .* got none.*; next: --tflops X"):
        check_budget(Total(3, 2, None, 1.0), 2.0)


def test_the_text_shows_all_of_it(out: Out, sweep_of: Any) -> None:
    sweep = sweep_of(parameters={"model.heads": [3, 4], "optim.lr": [0.1, 0.2]})
    trials, faults = lay_out(stated_points(sweep), partial(trials_of, out, sweep))
    lines = text(preview(sweep, trials, out=out, resources=ONE), faults).splitlines()
    assert "2 points cannot be:" in lines
    assert any(line.startswith("  model.heads=3 optim.lr=0.1: model: dim 16 is not div") for line in lines)
    assert sum("3x32x32" in line for line in lines) == 2
    assert lines[-1] == (
        "total: 2 trials, 2 of them to run: an unknown number of device-hours, 12.1 MB of checkpoints"
    )


# --- disk --------------------------------------------------------------------------------------------------


def bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 2},
        {"epochs": 2, "momentum": 0.0},
        {"epochs": 1, "optim.name": "adamw", "ema": 0.9},
        {"epochs": 1, "optim.name": "lamb"},
    ],
    ids=str,
)
def test_a_finished_run_takes_the_disk_that_was_estimated(
    out: Out, mini_config: Any, changes: dict[str, Any]
) -> None:
    config = mini_config(**changes)
    run = prepare(out, config)
    train(run, lambda values: None)
    assert disk_bytes(plan(out, config)) == pytest.approx(bytes_below(run.checkpoints), rel=0.1)


def test_the_best_checkpoint_is_a_third_one(out: Out, mini_config: Any, tmp_path: Path) -> None:
    config: Config = mini_config(epochs=5)
    state = new_state(build_model(config, 3), config, torch.device("cpu"))
    saved = {"model": state.model.state_dict(), "optimizer": state.optimizer.state_dict()}
    for step, score in enumerate((90.0, 50.0, 60.0, 70.0, 80.0)):
        checkpoint.save(tmp_path / "checkpoints", step, saved, score=score)
    assert disk_bytes(plan(out, config)) == pytest.approx(bytes_below(tmp_path / "checkpoints"), rel=0.1)
