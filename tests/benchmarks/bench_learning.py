"""GSA against its convolution twin: what both learn of the digits and of photographs by the same recipe.

    python tests/benchmarks/bench_learning.py --photos DIR [--seeds 3] [--at-once 2] [--out DIR]

DIR (or $GSA_PHOTOS): photographs, a sub-folder per class, or train/ and val/ with such; Imagenette for one. Without
it the digits alone are learnt. Each run is a process, `python -m pipeline.train RECIPE ...` on one thread that
computes and one that loads, --at-once of them at a time; asked again with the same --out, it is not trained again.
Networks of equal depth: gsa_resnet_tiny, and the same with model.placement=none. The recipes are those of
pipeline/recipes/train, made for GSA, with fewer epochs, and tuned for neither here; photographs at 64 pixels. Top-1
is of the val samples after the last epoch, mean and standard deviation over seeds; a difference is within a seed.
"""

import argparse
import contextlib
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from measure import hardware

from pipeline.pictures import ShardsConfig
from pipeline.rundir import Out, RunDir, read_json
from pipeline.shards import build

PLACEMENTS = {"GSA": "all", "convolution": "none"}


class Subject(NamedTuple):
    """What is learnt: a recipe, and what is changed in it."""

    recipe: str
    changes: tuple[str, ...]


SUBJECTS = {
    "digits": Subject("digits", ("optim.epochs=10",)),
    "photos": Subject("folder", ("data.shards=photos", "data.image_size=64", "optim.epochs=20")),
}


class Result(NamedTuple):
    top1: float
    correct: int
    samples: int
    params: int
    gflops: float
    seconds: float  # of an epoch, evaluation included


def learn(out: Path, subject: Subject, network: str, seed: int, more: list[str]) -> Result:
    changes = [*subject.changes, f"model.placement={PLACEMENTS[network]}", f"seed={seed}", *more]
    command = [sys.executable, "-m", "pipeline.train", subject.recipe, *changes, "--out", str(out)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    found = re.search(r"^run \S+: (.*)$", done.stdout, re.MULTILINE)
    if done.returncode or not found:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr[-2000:]}")
    run = RunDir(Path(found[1]))
    facts, metrics = read_json(run.facts), read_json(run.result)["metrics"]
    samples = round(metrics["val/count"])
    return Result(
        metrics["val/top1"],
        round(metrics["val/top1"] * samples / 100),
        samples,
        facts["params"],
        facts["gflops"],
        metrics["perf/epoch_s"],
    )


def compare(out: Path, name: str, *, seeds: int, at_once: int, more: list[str]) -> None:
    """Print a table of what both networks learn of one subject."""
    subject = SUBJECTS[name]
    with ThreadPoolExecutor(at_once) as pool:
        runs = {
            network: [pool.submit(learn, out, subject, network, seed, more) for seed in range(seeds)]
            for network in PLACEMENTS
        }
        results = {network: [run.result() for run in its] for network, its in runs.items()}
    samples = results["GSA"][0].samples
    recipe = " ".join([subject.recipe, *subject.changes, *more])
    print(f"\n{name}: recipe {recipe}; n = {seeds} seeds; {samples} val samples")
    print("| network | params | GFLOPs | s an epoch | val top-1 %, mean and spread | each seed |")
    print("|---|---|---|---|---|---|")
    for network, its in results.items():
        each = ", ".join(f"{r.top1:.2f} ({r.correct})" for r in its)
        seconds = statistics.median(r.seconds for r in its)
        print(
            f"| {network} | {its[0].params:,} | {its[0].gflops:.4f} | {seconds:.1f} "
            f"| {spread([r.top1 for r in its])} | {each} |"
        )
    pairs = zip(results["GSA"], results["convolution"], strict=True)
    print(f"GSA minus convolution, within a seed: {spread([gsa.top1 - conv.top1 for gsa, conv in pairs])}")
    sys.stdout.flush()


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    if len(values) < 2:
        return f"{values[0]:.2f} (one seed)"
    return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}"


def subjects(out: Path, photos: str | None) -> Iterator[str]:
    """The sets of shards that are there or can be made, each by its name in SUBJECTS."""
    for name in SUBJECTS:
        if name == "photos" and photos is None:
            print("photos: left out, for neither --photos nor GSA_PHOTOS names a folder")
            continue
        source = {"source": "digits"} if name == "digits" else {"source": "folder", "input": photos}
        build(ShardsConfig.model_validate({"name": name, **source}), Out(out).shards(name))
        yield name


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", default=os.environ.get("GSA_PHOTOS"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--at-once", type=int, default=2, help="processes, of a core each")
    parser.add_argument("--out", type=Path, help="kept; without it a temporary folder")
    parser.add_argument("more", nargs="*", metavar="FIELD=VALUE", help="changes for all runs")
    options = parser.parse_args()
    print(f"{hardware()}; {options.at_once} runs at a time, each on one thread and one that loads")
    kept = contextlib.nullcontext(options.out) if options.out else tempfile.TemporaryDirectory()
    with kept as folder:
        out = Path(folder).absolute()
        for name in subjects(out, options.photos):
            compare(out, name, seeds=options.seeds, at_once=options.at_once, more=options.more)


if __name__ == "__main__":
    main()
