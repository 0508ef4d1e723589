"""What Ray costs: the same training alone, by torchrun and under Ray Train; checkpoints and reports.

    python tests/benchmarks/bench_orchestration.py [--pairs 10]

A round trains one config (its seed is the round's) four times, one command after another: alone and by `gsa
train` with one worker, by torchrun and by `gsa train` with two. These are two pairs; which of a pair comes first
changes from round to round. OMP_NUM_THREADS=1 and no loader thread for all. The first epoch of a run is left out.

images/s: the median over a run's epochs of the journal's perf/images_per_s, which has neither evaluation, nor
checkpoint, nor report in it. core-ms an image: of the processes that train, on any core, from the record of the
first epoch to that of the last, with all that comes between; it suffers less from what else the machine does.
Others: the share of a core that the other processes of the command take meanwhile. Seconds to the first step: from
the start of the command until the loop asks for its first batch, which is the time of the first epoch's record less
its perf/epoch_s. Seconds between epochs: from an epoch's record to the start of the next: the checkpoint's copy and
the report. Ratios are geometric means over pairs, with the 95 % interval of Student's t for their mean logarithm.

The machine should have nothing else to do: where cores are short, images/s tells who is given them, not the cost.

Checkpoint: weights and momentum by checkpoint.Saver with nothing else running; "held" is until save() returns, "on
the disk" until wait() does. Report: ray.train.report() of two workers that come to it at the same random moments.
"""

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from measure import hardware, with_spread
from PIL import Image
from scipy import stats

from gsa_models import create_model
from pipeline.checkpoint import Saver
from pipeline.config import Config, DataConfig, ModelConfig, OptimConfig, dump
from pipeline.metrics import Record, read
from pipeline.pictures import ShardsConfig
from pipeline.ray_session import session
from pipeline.shards import build

SIZE, EPOCHS, STEPS = 64, 4, 12  # below train.LOG_EVERY steps in all: each record is of an epoch
OPTIM = OptimConfig(lr=0.01, epochs=EPOCHS, warmup_epochs=1, global_batch=32, micro_batch=16)
MODEL = ModelConfig(name="gsa_resnet_tiny", stem="imagenet", heads=4)
REPORTS = 20


# --- training -----------------------------------------------------------------------------------------------


class Run(NamedTuple):
    speed: float  # images/s
    cores: float  # core-ms an image, of what trains
    others: float  # % of a core
    to_first_step: float  # seconds
    between_epochs: float  # seconds


ALONE, RAY_1, TORCHRUN, RAY_2 = (
    "alone",
    "gsa train, 1 worker",
    "torchrun, 2 processes",
    "gsa train, 2 workers",
)
PLAIN = ("pipeline.train", "--threads", "0")
COMMANDS: dict[str, tuple[str, ...]] = {
    ALONE: PLAIN,
    RAY_1: ("pipeline.cli", "train", "--workers", "1"),
    TORCHRUN: ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", *PLAIN),
    RAY_2: ("pipeline.cli", "train", "--workers", "2"),
}
PAIRS = ((RAY_1, ALONE), (RAY_2, TORCHRUN))
COLUMNS = {  # of a Run, and how wide
    "images/s": 21,
    "core-ms an image": 21,
    "others, %": 18,
    "s to first step": 18,
    "s between epochs": 0,
}
SCALING = ((TORCHRUN, ALONE), (RAY_2, RAY_1))


def write_pictures(folder: Path) -> None:
    """Noise of two classes: STEPS global batches to train on, one to evaluate."""
    rng = np.random.default_rng(0)
    for split, count in (("train", STEPS * OPTIM.global_batch), ("val", OPTIM.global_batch)):
        for i in range(count):
            path = folder / split / f"class{i % 2}" / f"{i:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)).save(path)


def prepare(work: Path) -> None:
    """The shards, a recipe, and an output root for each way to train."""
    write_pictures(work / "pictures")
    build(ShardsConfig(name="noise", source="folder", input=str(work / "pictures")), work / "noise")
    config = Config(model=MODEL, data=DataConfig(shards="noise", image_size=SIZE), optim=OPTIM)
    (work / "recipe.yaml").write_text(dump(config))
    for name in COMMANDS:
        (work / name / "shards").mkdir(parents=True)
        (work / name / "shards" / "noise").symlink_to(work / "noise")


def trained(name: str, work: Path, seed: int) -> Run:
    module, *options = COMMANDS[name]
    out, log = work / name, work / name / "log.txt"
    before, used = set(out.glob("runs/*")), []
    words = [sys.executable, "-m", module, *options, str(work / "recipe.yaml"), f"seed={seed}"]
    with open(log, "w") as file:
        begun = time.time()
        # Linux shares cores by session first (sched_autogroup), and Ray's processes have sessions of their own.
        command = subprocess.Popen(
            [*words, "--out", str(out)], stdout=file, stderr=file, start_new_session=True
        )
        while command.poll() is None:
            for journal in set(out.glob("runs/*/metrics.jsonl")) - {r / "metrics.jsonl" for r in before}:
                if len(read(journal)) == (EPOCHS if used else 1) and len(used) < 2:
                    used.append(core_seconds(command.pid))
            time.sleep(0.02)
    if command.returncode:
        raise SystemExit(f"{name}: exit code {command.returncode}; {log.read_text()[-2000:]}")
    (run,) = set(out.glob("runs/*")) - before
    return measured(begun, read(run / "metrics.jsonl"), *used)


class Used(NamedTuple):
    """Core-seconds of a command's processes so far, and when that was."""

    time: float
    training: dict[int, float]
    others: dict[int, float]


def core_seconds(pid: int) -> Used:
    used, process = Used(time.time(), {}, {}), psutil.Process(pid)
    for one in (process, *process.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            words = " ".join(one.cmdline())
            trains = "RayTrainWorker" in words or "pipeline.train" in words  # also torchrun itself: it sleeps
            (used.training if trains else used.others)[one.pid] = sum(one.cpu_times()[:2])
    return used


def measured(begun: float, epochs: list[Record], first: Used, last: Used) -> Run:
    assert len(epochs) == EPOCHS, f"expected a record of {EPOCHS} epochs, got {len(epochs)}"
    starts = [r.time - r.metrics["perf/epoch_s"] for r in epochs]
    training, others = (
        sum(seconds - before.get(pid, 0) for pid, seconds in after.items())
        for before, after in zip(first[1:], last[1:], strict=True)
    )
    return Run(
        statistics.median(r.metrics["perf/images_per_s"] for r in epochs[1:]),
        1e3 * training / ((EPOCHS - 1) * STEPS * OPTIM.global_batch),
        100 * others / (last.time - first.time),
        starts[0] - begun,
        statistics.median(start - r.time for start, r in zip(starts[1:], epochs[:-1], strict=True)),
    )


def compare(work: Path, *, pairs: int) -> None:
    found: dict[str, list[Run]] = {name: [] for name in COMMANDS}
    for i in range(pairs):
        for pair in PAIRS:
            for name in pair if i % 2 else reversed(pair):
                found[name].append(run := trained(name, work, seed=i))
                load = os.getloadavg()[0]
                print(f"  {i + 1} of {pairs}, load {load:.1f}, {name}: {run}", file=sys.stderr, flush=True)
    print(
        f"training: {MODEL.name}, {SIZE} pixels, global batch {OPTIM.global_batch}, {EPOCHS} epochs of {STEPS} "
        f"steps; n = {pairs} rounds: median (least-most)"
    )
    print(f"  {'':<24}" + "".join(f"{column:<{width}}" for column, width in COLUMNS.items()))
    for name, runs in found.items():
        cells = (with_spread(list(values), ".3g") for values in zip(*runs, strict=True))
        print(f"  {name:<24}" + "".join(f"{c:<{w}}" for c, w in zip(cells, COLUMNS.values(), strict=True)))
    for key, title, of in (
        ("speed", "images/s", (*PAIRS, *SCALING)),
        ("cores", "core-ms an image", PAIRS),
    ):
        print(f"{title}: ratio (95 % interval), n = {pairs} pairs")
        for name, base in of:
            pairwise = [
                getattr(a, key) / getattr(b, key) for a, b in zip(found[name], found[base], strict=True)
            ]
            print(f"  {name + ' / ' + base:<48}{with_interval(pairwise)}", flush=True)


def with_interval(ratios: list[float]) -> str:
    """Geometric mean (95 % t interval of the mean log-ratio)."""
    logs, n = np.log(ratios), len(ratios)
    half = float(stats.t.ppf(0.975, n - 1)) * logs.std(ddof=1) / n**0.5
    low, middle, high = np.exp([logs.mean() - half, logs.mean(), logs.mean() + half])
    return f"{middle:.3f} ({low:.3f}-{high:.3f})"


# --- checkpoints and reports --------------------------------------------------------------------------------


def checkpoints(folder: Path, *, saves: int) -> None:
    print(f"checkpoint: n = {saves} saves: median (least-most)")
    print(f"  {'':<24}{'MB':<8}{'held, ms':<25}on the disk, ms")
    for name in ("gsa_resnet_tiny", "gsa_resnet50"):
        state, saver, held, written = trained_state(name), Saver(folder / name), [], []
        for step in range(saves + 1):
            begun = time.perf_counter()
            saver.save(step, state)
            returned = time.perf_counter()
            saver.wait()
            held.append(1e3 * (returned - begun))
            written.append(1e3 * (time.perf_counter() - begun))
        saver.close()
        size = next(folder.glob(f"{name}/*/state.pt")).stat().st_size / 1e6
        print(
            f"  {name:<24}{size:<8.1f}{with_spread(held[1:], '.1f'):<25}{with_spread(written[1:], '.0f')}",
            flush=True,
        )


def trained_state(name: str) -> dict[str, Any]:
    """What a checkpoint is of: weights, and momentum after a step."""
    model = create_model(name, image_size=224 if name == "gsa_resnet50" else SIZE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def reports(folder: Path, *, workers: int) -> None:
    with session(cpus=workers + 1):  # Ray must not be imported before
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        health = os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"]
        trainer = TorchTrainer(
            report_seconds,
            scaling_config=ScalingConfig(num_workers=workers),
            run_config=RunConfig(storage_path=str(folder)),
        )
        seconds: Any = trainer.fit().return_value  # type: ignore[attr-defined, unused-ignore]
    found = with_spread([1e3 * s for s in seconds], ".0f")
    print(
        f"report: {workers} workers, polled every {health} s, n = {REPORTS}: held {found} ms, median (least-most)"
    )


def report_seconds() -> list[float]:
    """In a worker: how long each report holds it."""
    import ray.train

    rng, seconds = random.Random(0), []
    for _ in range(REPORTS):
        time.sleep(rng.uniform(0.5, 1.5))
        begun = time.perf_counter()
        ray.train.report({"loss": 1.0})
        seconds.append(time.perf_counter() - begun)
    return seconds


@contextmanager
def timed() -> Iterator[None]:
    begun, load = time.time(), os.getloadavg()[0]
    yield
    minutes, loads = (time.time() - begun) / 60, os.getloadavg()
    print(
        f"{minutes:.0f} min; load average {load:.1f} at first, {loads[0]:.1f} at last, {loads[2]:.1f} of 15 min"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pairs", type=int, default=10, help="rounds: each has a pair of one worker, a pair of two"
    )
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    day = time.strftime("%d %B %Y")
    print(f"{hardware()}, {os.cpu_count()} cores, ray {version('ray')}, {day}", flush=True)
    with tempfile.TemporaryDirectory() as folder, timed():
        work = Path(folder)
        prepare(work)
        compare(work, pairs=options.pairs)
        checkpoints(work / "checkpoints", saves=10)
        reports(work / "reports", workers=2)


if __name__ == "__main__":
    main()
