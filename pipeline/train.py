"""train(run, report): builds all once, then the loop. Knows neither Ray nor Slurm nor MLflow."""

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gsa_models import model_cost, probe
from gsa_models.resolution import resize_positions, resized_table
from pipeline import checkpoint, data, metrics, order
from pipeline.batch_augment import DRAWS
from pipeline.config import HANG_S, Config, ConfigError, InputError, Preempted
from pipeline.evaluate import Evaluation, evaluate
from pipeline.faults import CALMER
from pipeline.manifest import Manifest, Samples, ShardError
from pipeline.optim import lr_at, peak_lr
from pipeline.plan import at_size, build_model, first_weights, read_run, size_at, train_samples
from pipeline.profiling import Trace
from pipeline.rundir import RunDir, sync, write_json
from pipeline.step import SUMS, new_state, train_step, world_sums
from pipeline.stream import stream_loader

log = logging.getLogger("gsa")

LOG_EVERY = 50  # steps between two records of the journal; the end of an epoch always has one
SAVE_EVERY_S = 600.0  # between two checkpoints within an epoch; the end of an epoch always has one
# Dense products a second in the precision of training (NVIDIA's data sheets); of other devices no share is told.
PEAK_FLOPS = {
    "A100": {"tf32": 156e12, "bf16": 312e12, "fp16": 312e12},
    "H100": {"tf32": 495e12, "bf16": 989e12, "fp16": 989e12},
    "H200": {"tf32": 495e12, "bf16": 989e12, "fp16": 989e12},
}

PER_STEP = torch.tensor([key in ("grad_norm", "steps", "skipped") for key in SUMS])  # the others: per sample

Report = Callable[[dict[str, float]], None]
T = TypeVar("T")


class TooManyBad(ShardError):
    """More train samples than are allowed cannot be read: all ranks find it out at the same step."""


class Place(NamedTuple):
    """Which rank of how many this process is, and its device."""

    rank: int
    world: int
    device: torch.device


def train(
    run: RunDir,
    report: Report,
    *,
    loader_threads: int = 0,
    save_every_s: float = SAVE_EVERY_S,
    stop: Callable[[], bool] = lambda: False,
    profile: int = 0,
) -> dict[str, float]:
    """Train the run to its end, from its newest checkpoint if it has one; returns the final metrics.

    Runs alone, or on every rank of an initialised process group (torchrun, Ray Train). `report` is called
    by every rank after each epoch, with the metrics of the whole world. Rank 0 writes the run folder.
    stop: asked by every rank at each step; a yes of any of them ends the run with a checkpoint.
    profile: steps of which every rank writes a trace.
    Raises InputError (what the user can mend), FloatingPointError (numbers are no longer finite), Preempted.
    """
    config, manifest = read_run(run)
    place = this_place()
    if place.device.type == "cuda":
        torch.cuda.set_device(place.device)
    set_precision(config.compute.precision)
    trace = Trace(run.trace(place.rank), profile)
    loop = _Loop(config, manifest, run, place, loader_threads, save_every_s, stop, trace)
    try:
        # 1. weights, optimizer, averages and step come from the newest intact checkpoint, the same on every rank
        loop.resume()
        # 2. what the journal says of later steps is forgotten: those steps come again
        if place.rank == 0:
            metrics.cut(run.metrics, loop.state.step)
        # 3. the order of samples and all random numbers are computed from (seed, epoch, step)
        while loop.epochs < config.optim.epochs:
            loop.train_epoch()
            report({"epoch": loop.epochs + 1, **loop.finish_epoch()})
        loop.saver.close(required=True)
    finally:
        trace.close()
        loop.saver.close(required=False)
    if place.rank == 0:
        done = {"epochs": config.optim.epochs, "steps": loop.state.step, "metrics": loop.last}
        write_json(run.result, done)
    return loop.last


class _Loop:
    """What lives between steps."""

    def __init__(
        self,
        config: Config,
        manifest: Manifest,
        run: RunDir,
        place: Place,
        loader_threads: int,
        save_every_s: float,
        stop: Callable[[], bool],
        trace: Trace,
    ) -> None:
        self.config, self.run, self.place, self.loader_threads = config, run, place, loader_threads
        self.samples, self.val = manifest.split("train"), manifest.split("val")
        self.share = config.micro_batches // place.world  # micro-batches of a step on this rank
        if config.micro_batches % place.world:
            raise ConfigError(
                f"{place.world} ranks cannot share {config.micro_batches} micro-batches; "
                "next: a number of ranks that divides them"
            )
        if config.compute.sync_bn and place.device.type != "cuda":
            raise ConfigError("compute.sync_bn needs CUDA devices; next: compute.sync_bn=false")
        self.epoch_samples = train_samples(config, manifest)
        self.steps = order.steps_per_epoch(self.epoch_samples, config.optim.global_batch)
        self.names, self.classes = manifest.classes, len(manifest.classes)
        self.epochs = 0  # trained and evaluated
        self.last: dict[str, float] = {}  # metrics of the last of them
        self.lost = 0.0  # samples of this epoch that could not be read
        self.saver = checkpoint.Saver(run.checkpoints)
        self.wishes = _Wishes(place, stop, save_every_s)
        self.trace = trace
        self._build(size_at(config, 0))

    # --- state -------------------------------------------------------------------------------------------

    def _build(self, size: int) -> None:
        """The network for pictures of `size` pixels, and all that goes with it, as at the start."""
        self.size, self.sized = size, at_size(self.config, size)
        self.state = new_state(build_model(self.sized, self.classes), self.config, self.place.device)
        shape = build_model(self.sized, self.classes, "meta")
        self.flops = 3 * model_cost(shape, size).flops  # an image, forth and back

    def _saved(self) -> dict[str, Any]:
        """What a checkpoint holds. The schedule, the random numbers and the data are functions of the step."""
        state = self.state
        return {
            "model": state.model.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            "ema": state.ema.model.state_dict() if state.ema else None,
            "faults": state.faults.state_dict(),
            "step": state.step,
            "epochs": self.epochs,
            "metrics": self.last,
            "sums": torch.stack(_from_all_ranks(state.sums.cpu(), self.place)),
            "lost": self.lost,
        }

    def resume(self) -> None:
        """From the newest intact checkpoint, else from the initial weights that the config names."""
        saved = checkpoint.newest(self.run.checkpoints) if self.place.rank == 0 else None
        step = _from_rank_0(saved["step"] if saved else -1, self.place)
        if step >= 0 and saved is None:
            saved = checkpoint.load(checkpoint.path(self.run.checkpoints, step))
        if saved:
            self._take(saved, size_at(self.config, saved.get("epochs", step // self.steps)))
        elif weights := first_weights(self.run):
            self.state.model.load_state_dict(resize_positions(weights, self.state.model))
            if self.state.ema:
                self.state.ema.model.load_state_dict(self.state.model.state_dict())
        optim = self.config.optim
        log.info("start step=%d rank=%d world=%d device=%s", self.state.step, *self.place)
        rule = f"{optim.lr:g} * {optim.global_batch} / 256" if optim.lr_rule == "linear" else "optim.lr"
        log.info("peak lr=%g (%s), schedule %s", peak_lr(optim), rule, optim.schedule)

    def _take(self, saved: dict[str, Any], size: int) -> None:
        """Go on from what a checkpoint holds, with pictures of `size` pixels: position tables are resampled."""
        if size != self.size:
            self._build(size)
        state, (rank, world, _) = self.state, self.place
        state.model.load_state_dict(resize_positions(saved["model"], state.model))
        _fit_tables(saved["optimizer"], state.optimizer)
        for group in saved["optimizer"]["param_groups"]:  # checkpoints of version 1 say otherwise
            if "fused" in group:
                group["fused"] = state.optimizer.defaults["fused"]
        state.optimizer.load_state_dict(saved["optimizer"])
        if state.ema:
            state.ema.model.load_state_dict(resize_positions(saved["ema"], state.ema.model))
        state.faults.load_state_dict(saved.get("faults", {}))
        state.step, self.last = saved["step"], saved["metrics"]
        self.epochs, self.lost = saved.get("epochs", state.step // self.steps), saved.get("lost", 0.0)
        sums = saved.get("sums")
        if sums is not None and len(sums) == world:
            state.sums.copy_(sums[rank])
        elif sums is not None:  # another world: steps are each rank's; samples go to one of them, whichever
            state.sums.copy_(torch.where(PER_STEP, sums.mean(0), sums.sum(0) if rank == 0 else 0))

    def _save(self, score: float | None = None) -> None:
        """A checkpoint, written while training goes on; it never knows more than the journal on the disk."""
        self.state.faults.check(self.state.step, now=True)
        self._check_weights()
        state, step = self._saved(), self.state.step
        if self.place.rank == 0:
            self.saver.save(step, state, score=score, before=partial(_sync_if_there, self.run.metrics))

    def _check_weights(self) -> None:
        """A step says nothing of the weights after it: the last one before a checkpoint may spoil them."""
        values = self.state.model.state_dict()
        if self.state.ema:
            values |= {f"average {k}": v for k, v in self.state.ema.model.state_dict().items()}
        finite = torch.stack([value.isfinite().all() for value in values.values()])
        if not finite.all():
            name = next(k for k, ok in zip(values, finite.tolist(), strict=True) if not ok)
            raise FloatingPointError(f"{name} is no longer finite at step {self.state.step}; {CALMER}")

    # --- an epoch ----------------------------------------------------------------------------------------

    def train_epoch(self) -> None:
        """The rest of an epoch: all of it, or, after a resume, what is missing, be it nothing."""
        size = size_at(self.config, self.epochs)
        if size != self.size:
            self._take(self._saved(), size)
        self.started, self.waited, self.shards = time.monotonic(), 0.0, Counter[str]()
        self.paced = self.started, self.state.step
        end = (self.epochs + 1) * self.steps
        loader = self._steps(self.state.step - self.epochs * self.steps)
        while self.state.step < end:
            asked = time.monotonic()
            batches = next(loader)
            self.waited += time.monotonic() - asked
            self.shards.update(shard for batch in batches for shard in batch.bad)
            self._step(batches)
            self.trace.step()
            self.state.faults.check(self.state.step)
            ended = self.state.step == end
            if self.state.step % LOG_EVERY == 0 and not ended:
                self._record(self._take_sums())
            stop, save = self.wishes.granted(now=ended)  # an evaluation may take long
            if stop or (save and not ended):
                self._save()
            if stop:
                self.saver.close(required=True)
                self.wishes.meet()  # who ends first must not end the others before all is on the disk
                raise Preempted(f"stopped at step {self.state.step}, in epoch {self.epochs + 1}")

    def _step(self, batches: list[data.Batch]) -> None:
        state, optim = self.state, self.config.optim
        first = state.step * self.config.micro_batches + self.place.rank * self.share
        lr = lr_at(state.step, optim, steps=self.steps)
        try:
            train_step(state, batches, self.config, first=first, lr=lr, classes=self.classes)
        except torch.OutOfMemoryError:
            raise InputError(_too_large(self.config, self.place.device)) from None

    def finish_epoch(self) -> dict[str, float]:
        """Evaluate, write journal and checkpoint; returns the metrics of the epoch."""
        sums, lost = self.state.sums.clone(), self.lost
        trained = self._take_sums()
        try:
            evaluated = self._evaluate()
        except ShardError:  # of an evaluation no sample is left out, but what was trained is not lost
            self.state.sums, self.lost = sums, lost
            self._save()
            raise
        measured = {"perf/epoch_s": time.monotonic() - self.started, "perf/world": float(self.place.world)}
        result = {**trained, **evaluated, **measured}
        self.last, self.epochs, self.lost = result, self.epochs + 1, 0.0
        self._record({**result, **(self._probe() if self.place.rank == 0 else {})})
        self._save(score=result.get("val_ema/top1", result["val/top1"]))
        return result

    def _steps(self, first: int) -> Iterator[list[data.Batch]]:
        place: dict[str, int] = {
            "epoch": self.epochs,
            "first_step": first,
            "rank": self.place.rank,
            "world": self.place.world,
            "threads": self.loader_threads,
            "draws": DRAWS,
        }
        if self.config.data.stream:
            loader = stream_loader(self.sized, classes=self.classes, **place)
        else:
            loader = data.train_loader(self.samples, self.sized, **place)
        while batches := list(islice(loader, self.share)):
            yield batches

    def _evaluate(self) -> dict[str, float]:
        found = self._evaluate_one(self.state.model, "val")
        return found | (self._evaluate_one(self.state.ema.model, "val_ema") if self.state.ema else {})

    def _evaluate_one(self, model: nn.Module, name: str) -> dict[str, float]:
        size = self.config.data.eval_size
        if size != self.size:
            twin = build_model(at_size(self.config, size), self.classes).to(self.place.device)
            twin.load_state_dict(resize_positions(model.state_dict(), twin))
            model = twin.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        threads = self.loader_threads
        found = evaluate_split(model, self.config, self.val, self.classes, self.place, threads)
        log.info("%s epoch=%d certificate=%s", name, self.epochs + 1, found.certificate)
        if self.place.rank == 0:
            parts = zip(self.names, found.by_class, strict=True)
            top1 = {label: round(100 * right / of, 2) for label, (right, of) in parts if of}
            try:
                write_json(self.run.by_class(name), top1)
            except OSError as error:  # a full disk: see checkpoint.Saver
                log.warning("not written: %s: %s", self.run.by_class(name), error)
        return found.metrics(name)

    def _probe(self) -> dict[str, float]:
        """What each GSA module does with the first val batch, if the config asks."""
        if not self.config.probe:
            return {}
        config = self.config.model_copy(
            update={"data": self.sized.data.model_copy(update={"test_size": None})}
        )
        batch = next(data.eval_loader(self.val, config, rank=0, world=1, threads=0))
        return probe.metrics(probe.probe(self.state.model, data.to_device(batch.images, self.place.device)))

    # --- what is told ------------------------------------------------------------------------------------

    def _take_sums(self) -> dict[str, float]:
        """Means over all ranks since the last call. TooManyBad, on all ranks, above the budget of an epoch."""
        sums, step = self.state.sums, self.state.step
        self.state.faults.check(step, now=True)
        total = dict(zip(SUMS, world_sums(sums.clone()), strict=True))
        sums.zero_()
        self.lost += total["bad"]
        self._check_bad(round(self.lost))
        means = {}
        if total["steps"]:  # where each step was left out there is nothing to tell
            means["train/loss"] = total["loss"] / total["count"]
            means["train/top1"] = 100 * total["correct"] / total["count"]
            means["train/grad_norm"] = total["grad_norm"] / total["steps"]
        return {
            **means,
            "train/lr": lr_at(step - 1, self.config.optim, steps=self.steps),
            "train/bad_samples": total["bad"],
            "train/skipped_steps": total["skipped"] / self.place.world,
            **self._pace(),
        }

    def _pace(self) -> dict[str, float]:
        """How fast it went since the last call, and what it took."""
        (since, step), now = self.paced, time.monotonic()
        self.paced = now, self.state.step
        seconds, images = now - since, (self.state.step - step) * self.config.optim.global_batch
        found = {"perf/images_per_s": images / seconds, "perf/wait_share": self.waited / seconds}
        self.waited = 0.0
        if self.place.device.type == "cuda":
            found["perf/memory_gb"] = torch.cuda.max_memory_allocated(self.place.device) / 1e9
            name = torch.cuda.get_device_name(self.place.device)
            peaks = next((p for key, p in PEAK_FLOPS.items() if key in name), {})
            if peak := peaks.get(self.config.compute.precision):
                found["perf/mfu"] = self.flops * images / seconds / (peak * self.place.world)
        return found

    def _check_bad(self, lost: int) -> None:
        """Refuse to go on without more samples than the config allows: on all ranks at the same step."""
        allowed = int(self.config.data.max_bad * self.epoch_samples)
        if lost <= allowed:
            return
        everywhere = sum(_from_all_ranks(self.shards, self.place), Counter[str]())
        (name, count), *_ = everywhere.most_common(1) or [("seen before the run was resumed", lost)]
        raise TooManyBad(
            f"{lost} of {self.epoch_samples} train samples could not be read by step {self.state.step}; "
            f"data.max_bad {self.config.data.max_bad} allows {allowed} an epoch; worst shard: {name} ({count}); "
            "next: `gsa shards verify`, then make the set again"
        )

    def _record(self, values: dict[str, float]) -> None:
        if self.place.rank:
            return
        epoch = self.state.step / self.steps
        metrics.append(self.run.metrics, step=self.state.step, epoch=epoch, metrics=values)
        log.info(
            "epoch=%.4g step=%d %s",
            epoch,
            self.state.step,
            " ".join(f"{k}={v:.6g}" for k, v in values.items()),
        )


class _Wishes:
    """What the ranks wish between two steps, known to all of them a step later: to stop; of rank 0, to save."""

    def __init__(self, place: Place, stop: Callable[[], bool], save_every_s: float) -> None:
        self.place, self.stop, self.every = place, stop, save_every_s
        # The devices are not asked. Without a time of its own it would wait half an hour for a rank that hangs.
        hang = timedelta(seconds=HANG_S)
        self.group = dist.new_group(backend="gloo", timeout=hang) if place.world > 1 else None
        self.saved, self.asked = time.monotonic(), (torch.zeros(2, dtype=torch.int32), None)

    def granted(self, *, now: bool) -> tuple[bool, bool]:
        """Whether to stop, and whether to save: the same on all ranks. now: as they wish in this moment."""
        if self.place.world == 1:
            return self._mine()
        if now:
            stop, save = self.granted(now=False)
            stop_now, save_now = self.granted(now=False)
            return stop or stop_now, save or save_now
        wishes, work = self.asked
        if work:
            work.wait()
        stop, save = (bool(wish) for wish in wishes)
        mine = torch.tensor(self._mine(), dtype=torch.int32)
        self.asked = mine, dist.all_reduce(mine, dist.ReduceOp.MAX, group=self.group, async_op=True)
        return stop, save

    def _mine(self) -> tuple[bool, bool]:
        due = self.place.rank == 0 and time.monotonic() - self.saved > self.every
        if due:
            self.saved = time.monotonic()
        return self.stop(), due

    def meet(self) -> None:
        """Wait for all ranks."""
        if self.group:
            dist.barrier(group=self.group)


def evaluate_split(
    model: nn.Module, config: Config, samples: Samples, classes: int, place: Place, loader_threads: int = 0
) -> Evaluation:
    """Exact evaluation of the model on all samples of a split, by all ranks together, in float32."""
    model.to(place.device).eval()
    batches = data.eval_loader(samples, config, rank=place.rank, world=place.world, threads=loader_threads)
    return evaluate(
        lambda images: model(data.to_device(images, place.device)),
        batches,
        classes=classes,
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


def set_precision(precision: str) -> None:
    """Of float32 products: only "tf32" may round them to fewer bits. Half precision is up to the step."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


def _fit_tables(saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Resample the optimizer's state of position tables, as they are resampled, where their size has changed."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, state in saved["state"].items():
        rows = len(parameters[i]) if parameters[i].ndim == 2 else 0
        for name, value in state.items():
            if isinstance(value, Tensor) and value.ndim == 2 and rows and len(value) != rows:
                state[name] = resized_table(value, (rows + 1) // 2)


def _too_large(config: Config, device: torch.device) -> str:
    micro, whole = config.optim.micro_batch, config.optim.global_batch
    smaller = next((m for m in range(micro // 2, 1, -1) if whole % m == 0), 1)
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30 if device.type == "cuda" else 0
    return (
        f"optim.micro_batch {micro} with pictures of {config.data.image_size} pixels does not fit into the "
        f"{memory:.0f} GiB of {device}; next: optim.micro_batch={smaller}, with the same optim.global_batch"
    )


def _sync_if_there(journal: Path) -> None:
    if journal.exists():
        sync(journal)


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


if __name__ == "__main__":
    from pipeline.alone import main

    main()
