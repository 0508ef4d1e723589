"""Sweeps under Ray Tune: each trial once, whoever is killed, and MLflow as the outcomes say."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from sweeps import Tuned

from pipeline import metrics, tune
from pipeline.config import InputError, Resources, dump
from pipeline.metrics import epoch_records
from pipeline.plan import make, prepare
from pipeline.rundir import Out, hold, write_json
from pipeline.samplers import Listed
from pipeline.sweep import Asha, Outcome, Sweep, Trial, outcomes, stated_points, trials_of
from pipeline.tune import search, settled

ONE, TWO = Resources(), Resources(workers="2")


def mini_sweep(tmp_path: Path, mini_config: Any, *, epochs: int = 4, **changes: Any) -> Sweep:
    """Of a recipe that trains in seconds. Its metric is the learning rate: which trial is better is no accident."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump(mini_config(epochs=epochs)))
    values = {"parameters": {"optim.lr": [0.1, 1e-9]}, "metric": "train/lr", **changes}
    return Sweep.model_validate({"name": "mini", "train": str(recipe), **values})


def planned(out: Out, sweep: Sweep) -> list[Trial]:
    return [trial for point in stated_points(sweep) for trial in trials_of(out, sweep, point)]


class Seen:
    """Hooks that note what they are told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def start(self, trial: Trial) -> None:
        self.told.append("start")

    def end(self, trial: Trial, outcome: Outcome) -> None:
        self.told.append(outcome.state)

    def reuse(self, trial: Trial, outcome: Outcome, *, recorded: bool) -> None:
        self.told.append(f"{outcome.state} before")


def run_sweep(
    out: Out, sweep: Sweep, resources: Resources = ONE, concurrent: int = 1
) -> tuple[list[Outcome], list[str]]:
    seen, source = Seen(), Listed(planned(out, sweep))
    found = search(
        sweep, out.sweep(sweep.name), source, resources=resources, concurrent=concurrent, hooks=seen
    )
    return found, seen.told


# --- what trials do ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("resources", [ONE, TWO], ids=["in process", "Ray Train"])
def test_a_sweep_stops_bad_trials_and_is_not_run_again(
    resources: Resources, ray: None, out: Out, mini_config: Any, tmp_path: Path
) -> None:
    sweep = mini_sweep(
        tmp_path, mini_config, asha=Asha(grace_epochs=2), parameters={"optim.lr": [0.1, 1e-9, 1e12]}
    )
    folder, trials = out.sweep("mini"), planned(out, sweep)
    ended, told = run_sweep(out, sweep, resources)
    assert [o.state for o in ended] == ["finished", "stopped", "failed"]
    assert told == ["start", "finished", "start", "stopped", "start", "failed"]
    assert ended[1].epoch == 2
    assert epoch_records(trials[0].plan.run)[-1].metrics.items() >= ended[0].metrics.items()
    assert "next: a lower optim.lr" in trials[2].plan.run.error.read_text()
    assert list(outcomes(folder).values()) == ended
    assert not (folder.path / "ray").exists()
    assert settled(folder, Listed(trials)) is None, "a failed one is tried again"
    assert [each.outcome for each in settled(folder, Listed(trials[:2])) or ()] == ended[:2]


def test_a_trial_of_another_sweep_is_not_trained_again_and_a_stopped_one_goes_on_there(
    ray: None, out: Out, mini_config: Any, tmp_path: Path
) -> None:
    first = mini_sweep(tmp_path, mini_config, asha=Asha(grace_epochs=2))
    (finished, stopped), _ = run_sweep(out, first)
    assert (finished.state, stopped.state, stopped.epoch) == ("finished", "stopped", 2)
    pids = [(out.run(o.run).logs / "rank0.log").read_text() for o in (finished, stopped)]
    second = first.model_copy(update={"name": "second", "asha": None})
    found, told = run_sweep(out, second)
    assert told == ["finished before", "start", "finished"]
    assert [o.epoch for o in found] == [4, 4]
    assert (out.run(finished.run).logs / "rank0.log").read_text() == pids[0]
    assert outcomes(out.sweep("mini"))[stopped.run] == stopped
    known = settled(out.sweep("mini"), Listed(planned(out, first))) or ()
    assert [each.outcome for each in known] == [finished, stopped]
    alone = prepare(out, planned(out, second)[1].plan.config)
    assert [r.epoch for r in epoch_records(alone)] == [1, 2, 3, 4]


def test_an_interrupted_trial_tells_the_scheduler_what_it_had_reached(
    ray: None, out: Out, mini_config: Any, tmp_path: Path
) -> None:
    """Ended ones are the measure for those that come: the rungs hold."""
    sweep = mini_sweep(tmp_path, mini_config, asha=Asha(grace_epochs=2), parameters={"optim.lr": [0.1, 1e-9]})
    run_sweep(
        out, mini_sweep(tmp_path, mini_config, asha=Asha(grace_epochs=2), parameters={"optim.lr": [0.1]})
    )
    found, told = run_sweep(out, sweep)
    assert told == ["finished before", "start", "stopped"]
    assert found[1].epoch == 2


def test_a_trial_that_another_process_trains_is_waited_for(
    ray: None, out: Out, mini_config: Any, tmp_path: Path
) -> None:
    sweep = mini_sweep(tmp_path, mini_config, parameters={"optim.lr": [0.1]})
    (trial,) = planned(out, sweep)
    run = make(trial.plan)
    code = (
        "import sys, time, json; from pathlib import Path; from pipeline import metrics;"
        "from pipeline.rundir import RunDir, hold, write_json; run = RunDir(Path(sys.argv[1]))\n"
        "with hold(run.lock, 'it'):\n"
        "    print('held', flush=True); time.sleep(8)\n"
        "    metrics.append(run.metrics, step=12, epoch=4, metrics={'val/count': 18.0, 'train/lr': 7.0})\n"
        "    write_json(run.result, {'metrics': {}})\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(run.path)], stdout=subprocess.PIPE) as other:
        assert other.stdout and other.stdout.readline() == b"held\n"
        (found,), _ = run_sweep(out, sweep)
    assert (found.state, found.metrics["train/lr"]) == ("finished", 7.0), "it was trained here"


@pytest.mark.parametrize("fault", ["dies", "raises"])
def test_a_trial_whose_process_dies_is_tried_again_and_then_reported(
    fault: str, ray: None, out: Out, mini_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the others run; the process of the trial before may be its own."""
    sweep = mini_sweep(tmp_path, mini_config, epochs=1, parameters={"optim.lr": [0.1, 0.2, 0.3]})

    def work(run: Any, resources: Any, report: Any) -> None:
        from pipeline.plan import read_run

        (run.logs / "tries.txt").open("a").write("x")
        if read_run(run)[0].optim.lr == 0.2:
            if fault == "dies":
                os._exit(3)
            raise OSError("no luck")
        metrics.append(run.metrics, step=1, epoch=1, metrics={"val/count": 1.0, "train/lr": 0.1})
        report({"epoch": 1, "train/lr": 0.1})
        write_json(run.result, {"metrics": {}})

    monkeypatch.setattr(tune, "train_run", work)
    found, told = run_sweep(out, sweep, concurrent=2)
    assert sorted(o.state for o in found) == ["failed", "finished", "finished"]
    assert sorted(told) == ["failed", "finished", "finished", "start", "start", "start"]
    tries = [(out.run(t.plan.run.name).logs / "tries.txt").read_text() for t in planned(out, sweep)]
    assert tries == ["x", "xxxx", "x"]


def test_a_stopped_trial_may_take_its_time_to_end(
    ray: None, out: Out, mini_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint that is written slowly: Tune would give up the trial that comes after it."""
    sweep = mini_sweep(tmp_path, mini_config, asha=Asha(), parameters={"optim.lr": [0.3, 0.1, 0.2, 0.05]})

    def work(run: Any, resources: Any, report: Any) -> None:
        from pipeline.plan import read_run

        try:
            for epoch in range(1, 5):
                values = {"val/count": 1.0, "train/lr": read_run(run)[0].optim.lr}
                metrics.append(run.metrics, step=epoch, epoch=epoch, metrics=values)
                report({"epoch": epoch, **values})
            write_json(run.result, {"metrics": {}})
        finally:
            time.sleep(4)

    monkeypatch.setattr(tune, "train_run", work)
    found, _ = run_sweep(out, sweep)
    assert [o.state for o in found] == ["finished", "stopped", "stopped", "stopped"]


def test_room_is_needed_for_all_trials_at_a_time(
    ray: None, out: Out, mini_config: Any, tmp_path: Path
) -> None:
    sweep = mini_sweep(tmp_path, mini_config)
    with pytest.raises(InputError, match="6 workers with 1 CPUs each: the Ray cluster has 5"):
        run_sweep(out, sweep, TWO, concurrent=3)
    with pytest.raises(
        InputError, match="the first would take all there is; next: --workers 2, or --concurrent 1"
    ):
        run_sweep(out, sweep, Resources(workers="1..2"), concurrent=2)


def test_a_run_has_one_driver(ray: None, out: Out, mini_config: Any) -> None:
    from pipeline.ray_train import fit

    run = prepare(out, mini_config(seed=11))
    with hold(run.lock, "it"), pytest.raises(InputError, match="in use by another process"):
        fit(run, TWO)


# --- many little trials, and kills -------------------------------------------------------------------------


def grid_of(n: int) -> dict[str, Any]:
    return {"optim.lr": [round(0.001 * (i + 1), 4) for i in range(n)]}


def test_a_hundred_trials_through_two_kills_of_the_driver(out: Out, mini_config: Any, tmp_path: Path) -> None:
    """R9, the short form."""
    sweep = mini_sweep(tmp_path, mini_config, epochs=1, parameters=grid_of(100), metric="val/top1")
    tuned = Tuned(out, sweep, tmp_path, epoch_s=0.05)
    rng = random.Random(9)
    for ended in (rng.randrange(10, 90), 100):  # the second: all have ended, and MLflow does not know it yet
        tuned.kill_after(ended)
    tuned.finish()
    ended = tuned.check(100)
    assert {o.state for o in ended} == {"finished"}
    assert max(ended, key=lambda o: o.metrics["val/top1"]).point == {"optim.lr": 0.1}
    assert tuned.most_at_once() <= 2
    assert tuned.finish()["ran"] is False


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_thousand_trials_through_ten_kills_of_the_driver(
    out: Out, mini_config: Any, tmp_path: Path
) -> None:
    """R9. What it costs undisturbed: tests/benchmarks/bench_sweep.py."""
    sweep = mini_sweep(tmp_path, mini_config, epochs=1, parameters=grid_of(1000), metric="val/top1")
    tuned = Tuned(out, sweep, tmp_path, epoch_s=0.2)
    for ended in sorted(random.Random(10).sample(range(10, 990), 10)):
        tuned.kill_after(ended)
    last = tuned.finish()
    ended = tuned.check(1000)
    assert max(ended, key=lambda o: o.metrics["val/top1"]).point == {"optim.lr": 0.3}
    assert tuned.most_at_once() <= 2
    assert last["rss"] < 1.5e9


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    ("points", "workers", "every_s"), [(200, "1", 4.0), (12, "2", 12.0)], ids=["in process", "Ray Train"]
)
def test_trainings_through_twenty_kills_of_trials_and_three_of_the_driver(
    points: int, workers: str, every_s: float, out: Out, mini_config: Any, tmp_path: Path
) -> None:
    sweep = mini_sweep(tmp_path, mini_config, epochs=2, parameters=grid_of(points), metric="val/top1")
    tuned = Tuned(out, sweep, tmp_path, epoch_s=None, workers=workers)
    killed = tuned.torment(random.Random(points), trials=20, drivers=3, every_s=every_s)
    tuned.finish()
    tuned.check(points)
    tuned.check_trainings()
    print(f"kills={killed}")
    assert killed == 23
