"""A trace of training: the steps that were asked for, and the same weights to the bit."""

import gzip
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline import checkpoint, metrics, train
from pipeline.config import ConfigError
from pipeline.plan import prepare
from pipeline.profiling import WARM_UP, Trace
from pipeline.rundir import Out, RunDir


def traced(run: RunDir, rank: int = 0) -> list[str]:
    """The steps that the trace of a rank holds, in order; and there is something within them."""
    with gzip.open(run.path / "profile" / f"rank{rank}.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    assert any(e.get("name") == "aten::convolution" for e in events)
    assert any("ConvolutionBackward" in e.get("name", "") for e in events)
    steps = [e for e in events if e.get("cat") == "user_annotation" and e["name"].startswith("ProfilerStep")]
    return [e["name"] for e in sorted(steps, key=lambda e: e["ts"])]


def weights(run: RunDir) -> dict[str, bytes]:
    saved = checkpoint.newest(run.checkpoints)
    assert saved is not None
    momentum = {f"momentum {i}": s["momentum_buffer"] for i, s in saved["optimizer"]["state"].items()}
    return {name: value.numpy().tobytes() for name, value in {**saved["model"], **momentum}.items()}


def series(run: RunDir) -> list[Any]:
    """The journal, without what tells the time."""
    records = metrics.read(run.metrics)
    return [(r.step, {k: v for k, v in r.metrics.items() if not k.startswith("perf/")}) for r in records]


def other_root(mini: Path, root: Path) -> Out:
    (root / "shards").mkdir(parents=True)
    (root / "shards" / "mini").symlink_to(mini)
    return Out(root)


def test_a_traced_run_ends_as_one_without_a_trace(
    out: Out, mini: Path, mini_config: Any, tmp_path: Path
) -> None:
    """54 samples make 3 steps of 16 an epoch: the trace goes over the end of one."""
    plain, profiled = (prepare(o, mini_config(epochs=4)) for o in (out, other_root(mini, tmp_path / "other")))
    train.train(plain, lambda _: None)
    train.train(profiled, lambda _: None, profile=5)
    assert traced(profiled) == [f"ProfilerStep#{WARM_UP - 1 + i}" for i in range(5)]
    assert [p.name for p in (profiled.path / "profile").iterdir()] == ["rank0.json.gz"]
    assert not (plain.path / "profile").exists()
    assert weights(profiled) == weights(plain)
    assert series(profiled) == series(plain)


def test_each_rank_writes_a_trace_of_its_own(out: Out, mini_config: Any, tmp_path: Path) -> None:
    from pipeline.config import dump

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump(mini_config()))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "pipeline.train", str(recipe), "--out", str(out.root), "--profile", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    run = prepare(out, mini_config())
    for rank in (0, 1):
        assert len(traced(run, rank)) == 2


def test_a_trace_longer_than_the_run_holds_what_there_was_and_says_so(
    out: Out, mini_config: Any, caplog: pytest.LogCaptureFixture
) -> None:
    run = prepare(out, mini_config())
    with caplog.at_level(logging.WARNING, logger="gsa"):
        train.train(run, lambda _: None, profile=50)
    assert "profile: training ended 47 steps before the end of" in caplog.text  # 6 steps, 3 of them warm-up
    assert len(traced(run)) == 3 + 1  # and what came after the last of them


def test_a_trace_that_cannot_be_written_ends_no_training(
    out: Out, mini_config: Any, caplog: pytest.LogCaptureFixture
) -> None:
    run = prepare(out, mini_config())
    (run.path / "profile").write_text("in the way")
    with caplog.at_level(logging.WARNING, logger="gsa"):
        train.train(run, lambda _: None, profile=1)
    assert "rank0.json.gz not written: " in caplog.text
    assert run.result.exists()


def test_fewer_than_no_steps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="profile: expected 0 steps or more, got -1"):
        Trace(tmp_path / "rank0.json.gz", -1)
