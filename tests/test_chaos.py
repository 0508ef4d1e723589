"""Chaos: what `--chaos` means, that it kills, and that its verdict can be a bad one."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import chaos, checkpoint, cli, train
from pipeline.chaos import Verdict, check, die_at_random, judge, kills, mtbf
from pipeline.config import ConfigError, Resources, dump
from pipeline.plan import prepare
from pipeline.rundir import Out, RunDir


@pytest.mark.parametrize(
    ("text", "seconds"), [("mtbf=30s", 30), ("mtbf=2m", 120), ("mtbf=0.5m", 30), ("mtbf=1.25s", 1.25)]
)
def test_a_mean_time_has_a_unit(text: str, seconds: float) -> None:
    assert mtbf(text) == seconds


@pytest.mark.parametrize(
    "text",
    ["", "30s", "mtbf=30", "mtbf=s", "mtbf=-3s", "mtbf=0s", "mtbf=1h", "mtbf=1e3s", "mtbf=3 s", "MTBF=3s"],
)
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match="expected mtbf=N in s or m, above 0; next: --chaos mtbf=30s"):
        mtbf(text)


def test_what_could_prove_nothing_is_refused(out: Out, mini_config: Any) -> None:
    run = prepare(out, mini_config())
    check(run, Resources(workers="2"))
    with pytest.raises(ConfigError, match=r"--chaos with workers 1..2: .*; next: --workers 2"):
        check(run, Resources(workers="1..2"))
    run.result.write_text("{}")
    with pytest.raises(ConfigError, match="is complete: nothing to kill"):
        check(run, Resources())


def test_a_worker_kills_itself_and_leaves_a_line(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.logs.mkdir()
    code = (
        "import sys, time; from pathlib import Path; from pipeline.chaos import die_at_random;"
        "from pipeline.rundir import RunDir; die_at_random(RunDir(Path(sys.argv[1])), 3, 0.01); time.sleep(60)"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, timeout=60)
    assert ended.returncode == -signal.SIGKILL
    assert [kill["rank"] for kill in kills(run)] == [3]


def test_times_to_death_are_exponential(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(chaos.time, "sleep", slept.append)
    monkeypatch.setattr(chaos.os, "kill", lambda pid, number: None)
    monkeypatch.setattr(chaos.threading, "Thread", Now)
    (tmp_path / "logs").mkdir()
    for _ in range(2000):
        die_at_random(RunDir(tmp_path), 0, 30.0)
    assert 27 < sum(slept) / 2000 < 33
    assert 0.58 < sum(seconds < 30 for seconds in slept) / 2000 < 0.68  # 1 - 1/e


class Now:
    """A thread that runs at once."""

    def __init__(self, target: Any, daemon: bool) -> None:
        self.start = target


@pytest.mark.parametrize("broken", [None, "weights", "metrics", "calm"])
def test_the_verdict_is_good_only_if_nothing_differs(
    broken: str | None, out: Out, mini_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a `fit` that trains here, and writes down a kill."""
    seen = []

    def fit(run: RunDir, resources: Resources, *, chaos_s: float | None = None) -> None:
        seen.append((chaos_s, resources.save_minutes))
        train.train(run, lambda _: None)
        if chaos_s and broken != "calm":
            (run.logs / "kills.jsonl").write_text('{"time": 0, "rank": 1}\n')
        if chaos_s and broken == "metrics":
            run.metrics.write_text(run.metrics.read_text().replace('"train/loss": 1', '"train/loss": 2'))
        if chaos_s and broken == "weights":
            state = checkpoint.newest(run.checkpoints)
            assert state is not None
            weight = next(iter(state["model"].values()))
            weight.copy_(torch.nextafter(weight, torch.tensor(9.0)))
            checkpoint.save(run.checkpoints, state["step"], state)

    monkeypatch.setattr(chaos, "fit", fit)
    run = prepare(out, mini_config())
    verdict = judge(run, Resources(workers="2"), 30.0)
    assert verdict[:1] + verdict[2:] == (int(broken != "calm"), broken != "weights", broken != "metrics")
    assert verdict.passed is (broken is None)
    assert seen == [(30.0, 0.05), (None, 10.0)]
    assert os.listdir(run.path.parent) == [run.name]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_user_torments_a_run_and_gets_the_proof(out: Out, mini_config: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump(mini_config(epochs=200)))
    command = ["train", str(recipe), "--workers", "2", "--chaos", "mtbf=8s", "--out", str(out.root)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *command],
        capture_output=True,
        text=True,
        check=False,
        timeout=800,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"^chaos: [1-9]\d* kills?, \d+ s longer", done.stdout, re.MULTILINE), done.stdout
    assert "weights equal, metrics equal to those of the undisturbed run, by every bit" in done.stdout


def test_the_command_prints_the_verdict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], out: Out
) -> None:
    run = out.run("it")
    cli._print_verdict(Verdict(3, 42.0, True, True), run)
    assert capsys.readouterr().out.splitlines() == [
        f"run it: {run.path}",
        "chaos: 3 kills, 42 s longer than the undisturbed run, 14 s each",
        "weights equal, metrics equal to those of the undisturbed run, by every bit",
    ]
    for verdict, said in (
        (Verdict(3, 42.0, True, False), "weights equal, metrics NOT EQUAL"),
        (Verdict(3, 42.0, False, True), "weights NOT EQUAL, metrics equal"),
        (Verdict(0, 1.0, True, True), "nothing was killed, so nothing is proven"),
    ):
        with pytest.raises(cli.typer.Exit) as end:
            cli._print_verdict(verdict, run)
        assert end.value.exit_code == 1
        assert said in capsys.readouterr().out
