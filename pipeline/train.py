"""train(run, report): builds all once, then the loop. Knows neither Ray nor Slurm nor MLflow."""

import logging
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gsa_models import probe
from pipeline import checkpoint, data, metrics, order
from pipeline.batch_augment import DRAWS
from pipeline.config import Config, ConfigError
from pipeline.evaluate import Evaluation, evaluate
from pipeline.manifest import Manifest, Samples, ShardError
from pipeline.optim import lr_at, optimizer, peak_lr
from pipeline.plan import build_model, read_run, train_samples
from pipeline.rundir import RunDir, sync, write_json
from pipeline.step import TrainState, train_step, world_sums
from pipeline.stream import stream_loader

log = logging.getLogger("gsa")

LOG_EVERY = 50  # steps between two records of the journal; the end of an epoch always has one
CALMER = "next: a lower optim.lr or more optim.warmup_epochs"

Report = Callable[[dict[str, float]], None]
T = TypeVar("T")


class TooManyBad(ShardError):
    """More train samples than are allowed cannot be read: all ranks find it out at the same step."""


class Place(NamedTuple):
    """Which rank of how many this process is, and its device."""

    rank: int
    world: int
    device: torch.device


def train(run: RunDir, report: Report, *, loader_threads: int = 0) -> dict[str, float]:
    """Train the run to its end, from its newest checkpoint if it has one; returns the final metrics.

    Runs alone, or on every rank of an initialised process group (torchrun, Ray Train). `report` is called
    by every rank after each epoch, with the metrics of the whole world. Rank 0 writes the run folder.
    Raises InputError (what the user can mend) and FloatingPointError (the loss is no longer finite).
    """
    config, manifest = read_run(run)
    place = this_place()
    if place.device.type == "cuda":
        torch.cuda.set_device(place.device)
    loop = _Loop(config, manifest, run, place, loader_threads)
    # 1. weights, optimizer and step come from the newest intact checkpoint, the same on every rank
    loop.resume()
    # 2. what the journal says of later steps is forgotten: those steps come again
    if place.rank == 0:
        metrics.cut(run.metrics, loop.state.step)
    # 3. the order of samples is computed from (seed, epoch); the position is the step number
    result = loop.last
    while loop.epoch < config.optim.epochs:
        result = loop.run_epoch()
        report({"epoch": loop.epoch, **result})
    if place.rank == 0:
        write_json(run.result, {"epochs": config.optim.epochs, "steps": loop.state.step, "metrics": result})
    return result


class _Loop:
    """What lives between epochs."""

    def __init__(
        self, config: Config, manifest: Manifest, run: RunDir, place: Place, loader_threads: int
    ) -> None:
        self.config, self.run, self.place, self.loader_threads = config, run, place, loader_threads
        self.samples, self.val = manifest.split("train"), manifest.split("val")
        optim = config.optim
        self.share = config.micro_batches // place.world  # micro-batches of a step on this rank
        if config.micro_batches % place.world:
            raise ConfigError(f"{place.world} ranks cannot share {config.micro_batches} micro-batches")
        self.epoch_samples = train_samples(config, manifest)
        self.steps = order.steps_per_epoch(self.epoch_samples, optim.global_batch)
        self.last: dict[str, float] = {}
        self.classes = len(manifest.classes)
        model = build_model(config, self.classes)
        model = model.to(place.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.state = TrainState(model, model, optimizer(model, optim), place.device)

    @property
    def epoch(self) -> int:
        """Completed epochs."""
        return self.state.step // self.steps

    def resume(self) -> None:
        saved = checkpoint.newest(self.run.checkpoints) if self.place.rank == 0 else None
        step = _from_rank_0(saved["step"] if saved else 0, self.place)
        if step and saved is None:
            saved = checkpoint.load(checkpoint.path(self.run.checkpoints, step))
        if saved:
            self.state.model.load_state_dict(saved["model"])
            self.state.optimizer.load_state_dict(saved["optimizer"])
            self.state.step, self.last = saved["step"], saved["metrics"]
        log.info("start step=%d rank=%d world=%d device=%s", self.state.step, *self.place)
        if self.place.world > 1:  # broadcast_buffers: our step keeps the running statistics equal
            ids = [self.place.device.index] if self.place.device.type == "cuda" else None
            self.state.replica = DistributedDataParallel(
                self.state.model, device_ids=ids, broadcast_buffers=False
            )

    def run_epoch(self) -> dict[str, float]:
        """Train an epoch, evaluate, write journal and checkpoint; returns the metrics of the epoch."""
        start = time.monotonic()
        trained = self._train_epoch()
        self._check_weights()
        evaluation = self._evaluate()
        result = {**trained, **evaluation.metrics(), "time/epoch_s": time.monotonic() - start}
        self.last = result
        log.info(
            "epoch=%d step=%d certificate=%s %s",
            self.epoch,
            self.state.step,
            evaluation.certificate,
            " ".join(f"{key}={value:.6g}" for key, value in result.items()),
        )
        if self.place.rank == 0:
            self._record({**result, **self._probe()})
            self._save()
        return result

    def _train_epoch(self) -> dict[str, float]:
        optim, first = self.config.optim, self.state.step % self.steps
        total, warmup = optim.epochs * self.steps, round(optim.warmup_epochs * self.steps)
        sums, due, lost, shards = _Sums(self.place.device), {}, 0.0, Counter[str]()
        for batches in self._steps(first):
            shards.update(shard for batch in batches for shard in batch.bad)
            lr = lr_at(self.state.step, peak=peak_lr(optim), total=total, warmup=warmup)
            sums.add(
                train_step(
                    self.state,
                    batches,
                    first=self.state.step * self.config.micro_batches + self.place.rank * self.share,
                    seed=self.config.seed,
                    lr=lr,
                    label_smoothing=optim.label_smoothing,
                    augment=self.config.augment,
                    classes=self.classes,
                )
            )
            step_in_epoch = self.state.step % self.steps
            if step_in_epoch == 0 or step_in_epoch % LOG_EVERY == 0:
                due = {**sums.take(self.state.step), "train/lr": lr}
                lost += due["train/bad_samples"]
                self._check_bad(round(lost), shards)
                if step_in_epoch and self.place.rank == 0:  # the last of an epoch goes with its evaluation
                    self._record(due)
        return due

    def _check_bad(self, lost: int, shards: Counter[str]) -> None:
        """Refuse to go on without more samples than the config allows: on all ranks at the same step."""
        allowed = int(self.config.data.max_bad * self.epoch_samples)
        if lost <= allowed:
            return
        everywhere = sum(_from_all_ranks(shards, self.place), Counter[str]())
        name, count = everywhere.most_common(1)[0]
        raise TooManyBad(
            f"{lost} of {self.epoch_samples} train samples could not be read by step {self.state.step}; "
            f"data.max_bad {self.config.data.max_bad} allows {allowed} an epoch; worst shard: {name} ({count}); "
            "next: `gsa shards verify`, then make the set again"
        )

    def _steps(self, first: int) -> Iterator[list[data.Batch]]:
        place: dict[str, int] = {
            "epoch": self.epoch,
            "first_step": first,
            "rank": self.place.rank,
            "world": self.place.world,
            "threads": self.loader_threads,
            "draws": DRAWS,
        }
        if self.config.data.stream:
            loader = stream_loader(self.config, classes=self.classes, **place)
        else:
            loader = data.train_loader(self.samples, self.config, **place)
        while batches := list(islice(loader, self.share)):
            yield batches

    def _check_weights(self) -> None:
        """A loss says nothing of the weights after its step: the last one before a checkpoint may spoil them."""
        for name, value in self.state.model.state_dict().items():
            if not value.isfinite().all():
                raise FloatingPointError(f"{name} is no longer finite at step {self.state.step}; {CALMER}")

    def _evaluate(self) -> Evaluation:
        return evaluate_split(self.state.model, self.config, self.val, self.place, self.loader_threads)

    def _probe(self) -> dict[str, float]:
        """What each GSA module does with the first val batch, if the config asks."""
        if not self.config.probe:
            return {}
        batch = next(data.eval_loader(self.val, self.config, rank=0, world=1, threads=0))
        return probe.metrics(probe.probe(self.state.model, data.to_device(batch.images, self.place.device)))

    def _record(self, values: dict[str, float]) -> None:
        metrics.append(
            self.run.metrics,
            step=self.state.step,
            epoch=self.state.step / self.steps,
            metrics=values,
        )

    def _save(self) -> None:
        sync(self.run.metrics)  # a checkpoint on disk never knows more than the journal there
        checkpoint.save(
            self.run.checkpoints,
            self.state.step,
            {
                "model": self.state.model.state_dict(),
                "optimizer": self.state.optimizer.state_dict(),
                "step": self.state.step,
                "metrics": self.last,
            },
        )


class _Sums:
    """Sums on the device since the last record; they reach the host only when taken."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._reset()

    def _reset(self) -> None:
        self.start = time.monotonic()
        self.sums: dict[str, torch.Tensor] = {}

    def add(self, sums: dict[str, torch.Tensor]) -> None:
        self.sums = {k: v + self.sums[k] for k, v in sums.items()} if self.sums else sums

    def take(self, step: int) -> dict[str, float]:
        """Means over all ranks since the last call. FloatingPointError where they are not finite."""
        total = world_sums(self.sums)
        seconds, count = time.monotonic() - self.start, total["count"]
        if not math.isfinite(total["loss"]):
            raise FloatingPointError(
                f"train/loss became {total['loss']} within the {round(count)} samples before step {step}; {CALMER}"
            )
        self._reset()
        return {
            "train/loss": total["loss"] / count,
            "train/top1": 100 * total["correct"] / count,
            "train/images_per_s": count / seconds,
            "train/bad_samples": total["bad"],
        }


def evaluate_split(
    model: nn.Module, config: Config, samples: Samples, place: Place, loader_threads: int = 0
) -> Evaluation:
    """Exact evaluation of the model on all samples of a split, by all ranks together."""
    model.to(place.device).eval()
    batches = data.eval_loader(samples, config, rank=place.rank, world=place.world, threads=loader_threads)
    return evaluate(
        lambda images: model(data.to_device(images, place.device)),
        batches,
        expected=samples.certificate,
        salt=samples.salt,
        device=place.device,
    )


def this_place() -> Place:
    """Rank, world size and device of this process."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if not torch.cuda.is_available():
        return Place(rank, world, torch.device("cpu"))
    local = int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()
    return Place(rank, world, torch.device("cuda", local))


def _from_rank_0(value: int, place: Place) -> int:
    if place.world == 1:
        return value
    tensor = torch.tensor(value, device=place.device)
    dist.broadcast(tensor, 0)
    return int(tensor)


def _from_all_ranks(value: T, place: Place) -> list[T]:
    if place.world == 1:
        return [value]
    values: list[Any] = [None] * place.world
    dist.all_gather_object(values, value)
    return values
