"""What Ray Tune and MLflow add to a trial, and how that grows with their number.

    python tests/benchmarks/bench_sweep.py [--trials 10 100 1000] [--seconds 1.0]

Trials that sleep, two at a time, mirrored to an MLflow of their own (SQLite); then trainings on digits of 32
pixels, in the process of the trial, and as Ray Train runs of two workers.
"""

import argparse
import statistics
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sweeps import Tuned

from pipeline.config import Config, DataConfig, ModelConfig, OptimConfig, dump
from pipeline.metrics import read_lines
from pipeline.pictures import ShardsConfig
from pipeline.rundir import Out
from pipeline.shards import build
from pipeline.sweep import Sweep, outcomes

TINY = Config(
    model=ModelConfig(name="gsa_resnet_tiny", stem="imagenet", heads=4),
    data=DataConfig(shards="digits", image_size=32, crop_pct=1.0),
    optim=OptimConfig(lr=0.1, epochs=1, warmup_epochs=0.0, global_batch=64, micro_batch=32),
)


def sweep_of(work: Path, trials: int) -> Sweep:
    recipe = work / "recipe.yaml"
    recipe.write_text(dump(TINY))
    parameters = {"optim.lr": [round(0.001 * (i + 1), 4) for i in range(trials)]}
    return Sweep.model_validate({"name": f"of-{trials}", "train": str(recipe), "parameters": parameters})


def measured(
    shards: Path, trials: int, seconds: float | None, workers: str = "1"
) -> tuple[float, float, float]:
    """Seconds from the first trial's begin to the last one's end, seconds before that, and the driver's GB."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "out" / "shards").mkdir(parents=True)
        (work / "out" / "shards" / "digits").symlink_to(shards)
        tuned = Tuned(Out(work / "out"), sweep_of(work, trials), work, epoch_s=seconds, workers=workers)
        said = tuned.finish()
        spans = [row[2:4] for row in read_lines(tuned.spans)]
        whole = max(b for _, b in spans) - min(a for a, _ in spans) if spans else said["seconds"]
        return whole, said["seconds"] - whole, said["rss"] / 1e9


def trained(shards: Path, trials: int, workers: str) -> tuple[float, float]:
    """Of real trainings, one after the other: seconds from the end of one to that of the next; seconds trained."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "out" / "shards").mkdir(parents=True)
        (work / "out" / "shards" / "digits").symlink_to(shards)
        out = Out(work / "out")
        Tuned(out, sweep_of(work, trials), work, epoch_s=None, workers=workers, concurrent=1).finish()
        ended = list(outcomes(out.sweep(f"of-{trials}")).values())
        times = sorted(out.run(outcome.run).result.stat().st_mtime for outcome in ended)
        steps = [after - before for before, after in pairwise(times)]
        return statistics.median(steps), statistics.median(outcome.seconds for outcome in ended)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--seconds", type=float, default=1.0, help="of a trial that sleeps")
    parser.add_argument("--real", type=int, default=6, help="trainings of each kind, one after the other")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder) / "digits"
        build(ShardsConfig(name="digits", source="digits", image_size=32), shards)
        print(f"trials of {options.seconds:g} s, 2 at a time; MLflow in SQLite")
        print("  trials   s from first to last   of ideal   ms a trial   s around   driver, GB")
        for trials in options.trials:
            whole, around, gigabytes = measured(shards, trials, options.seconds)
            ideal = options.seconds * trials / 2
            each = (whole - ideal) / trials * 1000
            row = f"{whole:20.1f}   {whole / ideal:8.3f}   {each:10.0f}   {around:8.1f}   {gigabytes:10.2f}"
            print(f"  {trials:6d}   {row}", flush=True)
        print(f"trainings of {TINY.model.name} for an epoch, {options.real} one after the other: medians")
        print("  workers                     s a trial   of them trained")
        for workers, name in (("1", "1, in the trial's process"), ("2", "2, a Ray Train run")):
            each, seconds = trained(shards, options.real, workers)
            print(f"  {name:26s}   {each:8.1f}   {seconds:15.1f}", flush=True)


if __name__ == "__main__":
    main()
