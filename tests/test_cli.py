"""The command line as a user meets it: what it prints, its exit codes, one line for each mistake."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline import cli
from pipeline.config import dump
from pipeline.metrics import read_lines
from pipeline.rundir import Out


@pytest.fixture
def gsa(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """gsa(*words) -> (exit code, standard output, standard error), in this process."""

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gsa", *map(str, words)])
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as end:
            cli.main()
        printed = capsys.readouterr()
        return int(end.value.code or 0), printed.out, printed.err

    return call


def test_models_prints_the_papers_sizes(gsa) -> None:
    code, out, _ = gsa("models", "--json")
    rows = {row["model"]: row for row in json.loads(out)}
    assert code == 0
    sizes = {name: (row["params"], row["gflops"], row["paper"]) for name, row in rows.items()}
    assert sizes["gsa_resnet50"] == (18_052_856, 7.170, "18.1M / 7.2G")
    assert sizes["gsa_resnet38"] == (14_202_728, 5.895, "14.2M / 5.9G (recalled)")
    assert sizes["resnet50"] == (25_557_032, 8.178, None)
    assert rows["resnet50"]["activation_mib"] == 81.93


def test_models_shows_what_an_ablation_costs_stage_by_stage(gsa) -> None:
    ablation = (
        "models",
        "gsa_resnet50",
        "--placement",
        "cggg",
        "--window",
        "7",
        "--components",
        "row+column",
    )
    code, out, _ = gsa(*ablation, "--by-stage", "--json")
    (row,) = json.loads(out)
    assert code == 0
    assert row["paper"] is None
    assert [stage["stage"] for stage in row["stages"]] == [
        "stem",
        *(f"group{i}" for i in range(1, 5)),
        "head",
    ]
    assert sum(stage["params"] for stage in row["stages"]) == row["params"]
    assert sum(stage["activation_mib"] for stage in row["stages"]) == pytest.approx(
        row["activation_mib"], abs=0.1
    )
    code, out, _ = gsa(*ablation, "--by-stage")
    assert out.startswith("gsa_resnet50\n")
    assert f"{row['params']:,}" in out
    code, _, err = gsa("models", "resnet_tiny", "--window", "7")
    assert (code, err) == (0, "gsa: resnet_tiny has no GSA block here: window=7 changes nothing\n")


def test_models_check_counts_the_papers_figures_anew(gsa, monkeypatch: pytest.MonkeyPatch) -> None:
    from gsa_models.cost import FIGURES, Figure

    figures = (FIGURES[4], Figure("gsa_resnet50", "16.0M", {"components": "row"}))
    monkeypatch.setattr("pipeline.costs.FIGURES", figures)
    code, out, _ = gsa("models", "--check")
    assert (code, out.splitlines()) == (
        1,
        [
            "ok        gsa_resnet26: 10,352,600 / 4.619G",
            "MISMATCH  gsa_resnet50 components=row: expected 16.0M, got 16.8M",
            "1 of 2 figures are as expected",
        ],
    )
    monkeypatch.setattr("pipeline.costs.FIGURES", figures[:1])
    code, out, _ = gsa("models", "--check", "--json")
    written = "10,352,600 / 4.619G"
    assert code == 0
    assert json.loads(out) == [{"network": "gsa_resnet26", "expected": written, "got": written, "ok": True}]


def test_shards_are_built_verified_shown_and_reused(gsa, pictures: Path, tmp_path: Path) -> None:
    build = ("shards", "build", "--source", "folder", "--input", str(pictures), "--name", "mine")
    code, out, err = gsa(*build)
    assert (code, out.splitlines()[0].split(":")[0]) == (0, "written")
    lines = err.splitlines()
    ends = [
        n for n, line in enumerate(lines) if re.fullmatch(r"  shards (checked|written) 72/72 pictures", line)
    ]
    assert [lines[n].split()[1] for n in ends] == ["checked", "written"]
    assert gsa(*build)[1].startswith("reused")
    assert gsa("shards", "verify", "mine")[0] == 0
    code, out, _ = gsa("shards", "show", "mine", "--sheet", str(tmp_path / "sheet.png"))
    assert code == 0
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
    code, _, err = gsa(*build, "--seed", "5")
    assert code == 2
    assert "seed" in err


def test_verify_names_the_damaged_shard_and_exits_with_1(gsa, mini: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(mini, damaged)
    shard = next(damaged.glob("val-*.tar"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    code, out, _ = gsa("shards", "verify", str(damaged))
    assert code == 1
    assert shard.name in out


def test_left_out_pictures_are_listed_and_counted(gsa, pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "spoiled"
    shutil.copytree(pictures, folder)
    first = next(p for p in sorted(folder.rglob("*.png")))
    first.write_bytes(first.read_bytes()[:60])
    (first.parent / "note.jpg").write_text("not a picture")
    (folder / "nothing").mkdir()
    code, out, _ = gsa("shards", "build", "--source", "folder", "--input", str(folder))
    assert code == 0
    assert first.name in out
    assert "note.jpg" in out
    assert "class left out: nothing" in out
    assert "2 broken pictures, 1 empty classes" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["models", "gsa_resnet5"], "did you mean gsa_resnet50?"),
        (["models", "--placement", "cgx"], "gsa_resnet26: placement 'cgx': got 3 letters, expected 4"),
        (["models", "--image-size", "16"], "image_size 16 is too small"),
        (["models", "--check", "--window", "7"], "leave out all but --json"),
        (["train", "digitz"], "did you mean digits?"),
        (["train", "digits", "optim.lrr=1"], "did you mean optim.lr?"),
        (["train", "digits", "optim.lr=fast"], "optim.lr: expected a valid number, got 'fast'"),
        (["train", "digits", "--workers", "4..2"], "lower bound is above"),
        (
            ["train", "digits", "--workers", "two"],
            "workers: expected N or MIN..MAX, from 1 on, got 'two'; next: ",
        ),
        (["train", "digits"], "digits"),  # no shards built yet
        (["tune", "nothing"], "sweep recipe nothing is unknown"),
        (["report", "nothing"], "sweep nothing: not found in "),
        (["report", "one", "two"], "run one: not found in "),
        (["report", "digits", "--baseline", "gggg"], "expected field=value"),
        (["run", "dem"], "did you mean demo?"),
        (["run", "folder"], "needs input"),
        (["evaluate", "no-such-run"], "run no-such-run: not found"),
        (["evaluate", "models:/gsa-digits@champion", "--shards", "digits"], "there is no registry"),
        (["register", "--name", "x"], "expected one of --run and --sweep"),
        (["register", "--name", "x", "--sweep", "digits"], "sweep digits: not found"),
        (["predict", "models:/nothing@champion", "a.png"], "there is no registry"),
        (["shards", "verify", "nothing"], "nothing"),
        (["shards", "build", "--source", "folder"], "needs input"),
        (
            ["shards", "build", "--source", "digits", "--name", "a b"],
            "a letter or digit first, got 'a b'; next: ",
        ),
        (
            ["shards", "index", "--name", "x", "--train", "0.tar", "1.tar", "2.tar"],
            "got 2 more, the first '1.tar': a pattern that the shell has expanded? next: quote it",
        ),
        (
            ["shards", "build", "--source", "imagenet", "--input", "."],
            "no ImageNet train split there: expected",
        ),
        (["shards", "build", "--source", "cifar10", "--input", "."], "expected cifar-10-python.tar.gz there"),
        (["shards", "build", "--source", "digits", "--quality", "5"], "quality is for shorter_side"),
        (
            ["shards", "build", "--source", "imagenet22k"],
            "expected 'digits', 'folder', 'imagenet', 'cifar10' or 'cifar100'",
        ),
        (["ui", "--host", "0.0.0.0"], "MLFLOW_AUTH_ADMIN_PASSWORD"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(gsa, words: list[str], said: str, tmp_path: Path) -> None:
    code, out, err = gsa(*words)
    assert code == 2
    assert said in err
    assert err.startswith("gsa: ")
    assert "Traceback" not in out + err
    assert len(err.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_study_is_previewed_run_reported_and_found_done(gsa, out: Out, mini_config, tmp_path: Path) -> None:
    """In the process of each trial; with a wrong point first, a budget, a report, and a changed file."""
    recipe, file = tmp_path / "recipe.yaml", tmp_path / "study.yaml"
    recipe.write_text(dump(mini_config(epochs=1)))
    placements = ["cccc", "gggg"]
    study = {"name": "mine", "train": str(recipe), "seeds": 2, "baseline": {"model.placement": "cccc"}}

    def tune(*words: str, **changes: object) -> tuple[int, str, str]:
        parameters = {"parameters": {"model.placement": placements}}
        file.write_text(json.dumps({**study, **parameters, **changes}))
        return gsa("tune", file, "--out", out.root, *words)

    code, printed, err = tune(parameters={"model.placement": [*placements, "ggggg", "x"]}, seeds=1)
    assert code == 2
    assert "2 points cannot be, 2 trials could:\n  model.placement=ggggg: " in err
    assert "\n  model.placement=x: " in err
    assert "parameters.model.plcement" not in err
    code, _, err = tune(parameters={"model.plcement": ["gggg"]})
    assert (code, "did you mean model.placement?" in err) == (2, True)
    code, printed, _ = tune("--dry-run")
    assert code == 0
    assert "total: 4 trials, 4 of them to run: an unknown number of device-hours" in printed
    code, _, err = tune("--budget", "1")
    assert (code, "got none, since no run tells how fast a device is; next: --tflops" in err) == (2, True)
    assert not (out.root / "runs").exists()
    code, printed, err = tune("--concurrent", "2", "--tflops", "0.01", "--budget", "1")
    assert code == 0, err
    assert printed.count("finished") == 4
    code, printed, _ = tune()
    assert "sweep mine (complete already, reused)" in printed
    code, printed, _ = gsa("report", "mine", "--json", "--out", out.root)
    rows = json.loads(printed)
    assert sorted(row["model.placement"] for row in rows) == placements
    assert all(row["n"] == 2 for row in rows)
    code, _, err = tune(metric="val/loss")
    assert code == 2
    assert "sweep mine was begun with another metric (metric: 'val/top1' then, 'val/loss' now)" in err
    runs = sorted(path.name for path in (out.root / "runs").iterdir())
    code, printed, err = tune("--rerun", seeds=1)
    assert code == 0, err
    assert printed.count("finished") == 2
    assert len(list((out.root / "runs").glob("*.until-*"))) == len(runs) == 4
    assert len([run for run in tracked(out, "mini").values() if run.info.status == "FINISHED"]) == 7


def test_unknown_options_exit_with_2(gsa) -> None:
    assert gsa("train", "digits", "--wrokers", "2")[0] == 2
    assert gsa("frobnicate")[0] == 2


def test_doctor_tells_what_is_there(gsa) -> None:
    code, out, _ = gsa("doctor", "--json")
    rows = {row["what"]: row for row in json.loads(out)}
    assert code in (0, 1)
    assert rows["torch"]["state"] == "ok"
    assert rows["MLflow store"]["state"] == "absent"
    assert {"machine", "GPUs", "Slurm", "disk"} <= set(rows)
    assert not Path("out").exists()


DEMO = [
    "run",
    "demo",
    'sweep.overrides=["optim.epochs=1", "optim.warmup_epochs=0.5"]',
    'train.overrides=["optim.epochs=2", "optim.warmup_epochs=0.5"]',
]


def start(words: list[str], out: Path) -> subprocess.Popen[str]:
    """The command in a process of its own, which has nothing to do with the Ray of other tests."""
    command = [sys.executable, "-m", "pipeline.cli", *words, "--out", str(out)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    pipe = subprocess.PIPE
    # What a shell starts in the background ignores SIGINT, and so would the child that is interrupted here.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_demo_is_interrupted_continued_and_reused(tmp_path: Path, gsa) -> None:
    """`make demo` with few epochs: Ctrl-C in the sweep leaves no process, the next call does the rest."""
    out = Out(tmp_path / "a folder")
    first = start(DEMO, out.root)
    outcomes, until = out.sweep("digits").outcomes, time.monotonic() + 180
    while not outcomes.exists() and first.poll() is None and time.monotonic() < until:
        time.sleep(0.3)
    family = psutil.Process(first.pid).children(recursive=True)
    first.send_signal(signal.SIGINT)
    _, err = first.communicate(timeout=90)
    assert outcomes.exists(), err
    assert first.returncode == 130, err
    assert "the same command continues" in err
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    ended = read_lines(outcomes)
    statuses = {name: run.info.status for name, run in tracked(out).items()}
    assert statuses["sweep digits"] == "KILLED"
    assert set(statuses.values()) <= {"KILLED", "FINISHED"}

    second = start(DEMO, out.root)
    printed, err = second.communicate(timeout=280)
    assert second.returncode == 0, err
    assert "shards: unchanged, reused" in printed
    assert "champion   models:/gsa-digits@champion = version 1" in printed
    assert "of 359 images, each once" in printed
    assert f"gsa ui --out '{out.root}'" in printed
    again = read_lines(outcomes)
    assert [row for row in again if row["run"] in {e["run"] for e in ended}] == ended  # not run twice

    code, printed, _ = gsa(*DEMO, "--out", str(out.root))
    assert code == 0
    assert printed.count("unchanged, reused") == 6
    check_tracking(out, trials=len(again))
    held_out = sorted(str(p) for p in (out.workflow("demo") / "held_out").iterdir())
    code, printed, err = gsa("predict", "models:/gsa-digits@champion", *held_out, __file__, "--out", out.root)
    assert code == 2
    assert len(printed.splitlines()) == len(held_out)
    assert "1 of 13 files could not be read" in err
    model = gsa("evaluate", "models:/gsa-digits@champion", "--shards", "digits", "--json", "--out", out.root)
    run = json.loads((out.workflow("demo") / "state.json").read_text())["train"]["outputs"]["run"]
    trained = gsa("evaluate", run, "--json", "--out", out.root)
    assert json.loads(model[1])["correct"] == json.loads(trained[1])["correct"]
    assert json.loads(model[1])["samples"] == 359


def tracked(out: Out, experiment_name: str = "digits") -> dict:
    """The MLflow runs of an experiment by name, those set aside by their id too."""
    from pipeline.tracking import open_store

    client = open_store(out.tracking_uri, out.artifacts)
    experiment = client.get_experiment_by_name(experiment_name)
    runs = client.search_runs([experiment.experiment_id])
    return {r.info.run_name + r.data.tags["gsa.key"].partition(".until")[2]: r for r in runs}


def check_tracking(out: Out, *, trials: int) -> None:
    """One parent, a nested run for each trial, the final run; all with curves, settings and a true status."""
    from pipeline.tracking import open_store

    client, runs = open_store(out.tracking_uri, out.artifacts), tracked(out)
    assert len(runs) == trials + 2
    parent = runs["sweep digits"]
    children = [r for r in runs.values() if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == trials
    assert {r.info.status for r in runs.values()} == {"FINISHED"}
    for run in runs.values():
        assert "val/top1" in run.data.metrics
        if run is not parent:
            assert run.data.params["model.name"] == "gsa_resnet_tiny"
            journal = out.run(run.info.run_name).metrics.read_text().splitlines()
            history = client.get_metric_history(run.info.run_id, "val/top1")
            assert [m.value for m in sorted(history, key=lambda m: m.step)] == [
                json.loads(line)["metrics"]["val/top1"] for line in journal
            ]


def test_the_photographs_go_the_same_way(gsa, tmp_path: Path) -> None:
    """Real photographs from a folder to shards, read back as the network gets them."""
    photos = os.environ.get("GSA_PHOTOS")
    if not photos:
        pytest.skip("GSA_PHOTOS is not set: no real photographs")
    code, out, _ = gsa("shards", "build", "--source", "folder", "--input", photos, "--name", "photos")
    assert code == 0
    assert "classes" in out
    assert gsa("shards", "verify", "photos")[0] == 0
