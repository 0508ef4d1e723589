"""Training on CUDA devices: no step waits for one, every precision learns, NCCL ranks agree."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks, output, series, weights

from pipeline import metrics, train
from pipeline.config import Preempted
from pipeline.plan import prepare
from pipeline.rundir import Out

pytestmark = pytest.mark.gpu
TWO = "two CUDA devices (marker gpu): run on a machine that has them"


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_no_step_waits_for_the_device(
    precision: str, out: Out, mini_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all that a step can do; what it sums up is read between two steps, when a record is due."""
    config = mini_config(
        epochs=3,
        ema=0.9,
        clip_norm=1.0,
        mixup=0.2,
        cutmix=1.0,
        erase=0.3,
        drop_path=0.1,
        **{"compute.precision": precision},
    )
    real, done = train.train_step, []

    def step(*args: Any, **options: Any) -> None:
        if len(done) >= 3:  # until then kernels are chosen and memory is asked for
            torch.cuda.set_sync_debug_mode("error")
        try:
            real(*args, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        done.append(1)

    monkeypatch.setattr(train, "train_step", step)
    run = prepare(out, config)
    result = train.train(run, lambda _: None, loader_threads=2)
    assert len(done) == 9
    assert result["val/count"] == 18
    assert {r.metrics["train/skipped_steps"] for r in metrics.read(run.metrics)} <= {0.0, 1.0, 2.0, 3.0}
    assert result["perf/memory_gb"] > 0


@pytest.mark.parametrize("changes", [{}, {"compute.compile": True}, {"compute.precision": "bf16"}], ids=str)
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor's own imports
def test_it_learns_as_on_a_cpu(changes: dict[str, Any], out: Out, mini_config: Any) -> None:
    calm = {"micro_batch": 16, "crop_scale": (0.7, 1.0), "flip": 0.0}
    run = prepare(out, mini_config(epochs=14, lr=0.5, **calm, **changes))
    assert train.train(run, lambda _: None, loader_threads=2)["val/top1"] > 80


def test_a_stopped_run_goes_on(out: Out, mini_config: Any) -> None:
    """Kernels of CUDA are not all deterministic: the same samples and steps, and nearly the same losses."""
    config, asked = mini_config(ema=0.9, epochs=3), []
    clean, run = prepare(out, config), prepare(output(out.shards("mini"), out.root / "other"), config)
    train.train(clean, lambda _: None)
    with pytest.raises(Preempted, match="stopped at step 5"):
        train.train(run, lambda _: None, stop=lambda: asked.append(1) or len(asked) >= 4)  # type: ignore[func-returns-value]
    train.train(run, lambda _: None)
    for (step, epoch, found), (same_step, same_epoch, wanted) in zip(series(run), series(clean), strict=True):
        assert (step, epoch, list(found)) == (same_step, same_epoch, list(wanted))
        assert found["train/loss"] == pytest.approx(wanted["train/loss"], rel=0.05)


@pytest.mark.parametrize("world", [1, 2])
def test_ranks_over_nccl_train_like_one(
    world: int, forks: Any, out: Out, mini: Path, mini_config: Any, tmp_path: Path
) -> None:
    if torch.cuda.device_count() < world:
        pytest.skip(TWO)
    config = mini_config(epochs=2, micro_batch=8)
    alone = prepare(output(mini, tmp_path / "alone"), config)
    train.train(alone, lambda _: None)
    run = Ranks(forks, prepare(out, config), world, backend="nccl", log_every=50).finish()
    assert [step for step, *_ in series(run)] == [step for step, *_ in series(alone)]
    for key, value in weights(alone)["model"].items():
        torch.testing.assert_close(weights(run)["model"][key], value, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("world", [2])
def test_batch_norm_over_the_ranks(world: int, forks: Any, out: Out, mini_config: Any) -> None:
    if torch.cuda.device_count() < world:
        pytest.skip(TWO)
    run = prepare(out, mini_config(**{"compute.sync_bn": True}))
    Ranks(forks, run, world, backend="nccl", log_every=50).finish()
    assert all(value.isfinite().all() for value in weights(run)["model"].values())
