"""train() without Ray: alone, or by `torchrun --nproc-per-node N -m pipeline.train RECIPE`."""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline import memory
from pipeline.config import HANG_S, Config, InputError, Preempted, load
from pipeline.manifest import read_manifest
from pipeline.plan import prepare
from pipeline.rundir import Out, hold
from pipeline.train import SAVE_EVERY_S, this_place, train

log = logging.getLogger("gsa")


def main() -> None:
    """Parse, train, and say in one line what the user can mend. Exit codes: 0, 2 bad input, 75 stopped."""
    asked: list[bool] = []
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda *_: asked.append(True))
    try:
        _train(_options(), lambda: bool(asked))
    except (InputError, FloatingPointError) as error:
        _end(f"gsa: {error}", 2)
    except Preempted as error:
        _end(f"gsa: {error}; the same command continues", 75)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m pipeline.train", description=__doc__)
    parser.add_argument("recipe", help="a shipped recipe, or the path of a .yaml file")
    parser.add_argument("overrides", nargs="*", metavar="FIELD=VALUE", help="changes, e.g. optim.lr=0.1")
    parser.add_argument(
        "--out", type=Path, default=os.environ.get("GSA_OUT", "out"), help="root of all output"
    )
    parser.add_argument("--threads", type=int, default=1, help="that read, beside the one that trains")
    parser.add_argument("--save-minutes", type=float, default=SAVE_EVERY_S / 60, help="between checkpoints")
    parser.add_argument(
        "--find-micro-batch",
        action="store_true",
        help="try out first which is the largest that the device holds",
    )
    parser.add_argument("--profile", type=int, default=0, metavar="STEPS", help="to trace, into profile/")
    return parser.parse_intermixed_args()


def _train(options: argparse.Namespace, stop: Callable[[], bool]) -> None:
    world, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0)))
    logging.basicConfig(level=logging.ERROR if rank else logging.INFO, format="%(asctime)s %(message)s")
    out, config = Out(options.out.absolute()), load(Config, "train", options.recipe, options.overrides)
    if options.find_micro_batch:
        classes = len(read_manifest(out.shards(config.data.shards)).classes)
        config = memory.fitted(config, classes, world=world, device=this_place().device)
    if "WORLD_SIZE" in os.environ:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=HANG_S))
        if options.find_micro_batch:
            config = _smallest_micro_batch(config)
    run = prepare(out, config)  # the same on every rank
    with nullcontext() if rank else hold(run.lock, f"run {run.name}"):
        train(
            run,
            lambda _: None,
            loader_threads=options.threads,
            save_every_s=60 * options.save_minutes,
            stop=stop,
            profile=options.profile,
        )
    if not rank:
        print(f"run {run.name}: {run.path}")


def _smallest_micro_batch(config: Config) -> Config:
    """Of all ranks: they may have found different ones."""
    size = torch.tensor(config.optim.micro_batch, device=this_place().device)
    dist.all_reduce(size, dist.ReduceOp.MIN)
    return memory.with_micro_batch(config, int(size))


def _end(text: str, code: int) -> None:
    print(text, file=sys.stderr)
    sys.exit(code)
