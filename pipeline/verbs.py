"""What each verb does, assembled from the rooms: the command line and the workflows both call these."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline import augment, chaos, data, registry, server, tracking
from pipeline.config import Config, ConfigError, InputError, Resources
from pipeline.decode import DecodeError, decode
from pipeline.evaluate import Classifier, Evaluation, evaluate
from pipeline.manifest import Manifest, Samples, read_manifest
from pipeline.mirror import Board, Epochs, mirrored
from pipeline.pictures import ShardsConfig
from pipeline.plan import check_cache, load_trained, read_run
from pipeline.progress import Update, bar, board
from pipeline.ray_session import session
from pipeline.ray_train import fit, fit_micro_batch
from pipeline.report import current, write_study
from pipeline.rundir import Out, RunDir, SweepDir, hold, read_json, write_json
from pipeline.samplers import Evolved, Listed, MakeTrials, Source, Suggested
from pipeline.shards import Built, build
from pipeline.sweep import (
    Outcome,
    Point,
    Sweep,
    Trial,
    begin,
    best,
    lay_out,
    outcomes,
    stated_points,
    trials_of,
)
from pipeline.sweep import read as read_sweep
from pipeline.train import evaluate_split, this_place
from pipeline.tune import Known, search, settled

log = logging.getLogger("gsa")

PREDICT_BATCH = 64


def build_shards(out: Out, config: ShardsConfig, *, replace: bool = False) -> Built:
    """Write the shards of a source, or find them made already."""
    with ExitStack() as shown:
        bars: dict[str, Update] = {}

        def progress(phase: str, done: int, of: int) -> None:
            if phase not in bars:  # a bar and an estimate of its own: checking and writing differ in speed
                shown.close()
                bars[phase] = shown.enter_context(bar(f"shards {phase}", "pictures"))
            bars[phase](done, of, "")

        return build(config, out.shards(config.name), progress=progress, replace=replace)


def train(out: Out, run: RunDir, resources: Resources, *, tags: dict[str, str] | None = None) -> bool:
    """Train a prepared run to its end under Ray, mirrored to MLflow; False if it was complete already."""
    config, _ = read_run(run)
    resources.check(config)
    if run.result.exists():
        return False
    with _under_ray(out, run, resources, tags or {}):
        fit(run, resources)
    return True


def find_micro_batch(out: Out, config: Config, resources: Resources) -> Config:
    """The config with the largest micro-batch that a worker's GPU holds: tried out on one of the cluster."""
    classes = len(read_manifest(out.shards(config.data.shards)).classes)
    with session(cpus=_cpus(resources, 1)):
        return fit_micro_batch(config, classes, resources)


def torment(out: Out, run: RunDir, resources: Resources, mtbf_s: float) -> chaos.Verdict:
    """train(), while workers are killed every mtbf_s seconds on average; then whether that changed anything."""
    config, _ = read_run(run)
    resources.check(config)
    chaos.check(run, resources)
    with _under_ray(out, run, resources, {"gsa.chaos": f"{mtbf_s:g}"}):
        return chaos.judge(run, resources, mtbf_s)


@contextmanager
def _under_ray(out: Out, run: RunDir, resources: Resources, tags: dict[str, str]) -> Iterator[None]:
    """A Ray, a bar, and MLflow, while a run is trained; finished if the block is."""
    config, manifest = read_run(run)
    check_cache(config, manifest)
    epochs = config.optim.epochs
    with bar("train", "epochs") as update, mirrored(out, manifest, Epochs(update, epochs)) as mirror:
        mirror.start(run, config, tags=tags)
        with session(cpus=_cpus(resources, 1)):
            yield
        mirror.end(run, "FINISHED")


class Layout(NamedTuple):
    """A sweep before it runs: trials of the points that are known, what is wrong with others, how to make more."""

    sweep: Sweep
    trials: list[Trial]
    faults: list[str]
    make: MakeTrials

    def source(self, folder: SweepDir) -> Source:
        """All trials anew, from the first one on."""
        if self.sweep.sampler == "tpe":
            return Suggested(self.sweep, folder, self.make)
        return Evolved(self.sweep, self.make) if self.sweep.pbt else Listed(self.trials)

    def check(self) -> None:
        """ConfigError where points that are sure to come cannot be."""
        if self.faults and (not self.trials or self.sweep.sampler in ("grid", "random")):
            head = f"sweep {self.sweep.name}: {len(self.faults)} points cannot be, {len(self.trials)} trials could:"
            raise ConfigError("\n  ".join([head, *self.faults]))


def lay_out_sweep(out: Out, sweep: Sweep, resources: Resources, overrides: Sequence[str] = ()) -> Layout:
    """Check every point of a sweep that is known before it runs; nothing is written.

    overrides: for every trial, stronger than the sweep's own, weaker than its parameters.
    """
    sweep = sweep.model_copy(update={"overrides": [*sweep.overrides, *overrides]})

    def make_trials(point: Point, extra: Sequence[str] = (), *, later: int = 0) -> list[Trial]:
        found = trials_of(out, sweep, point, extra, later=later)
        for trial in found:
            resources.check(trial.plan.config)
        return found

    return Layout(sweep, *lay_out(stated_points(sweep), make_trials), make_trials)


def tune(
    out: Out,
    sweep: Sweep,
    resources: Resources,
    *,
    overrides: Sequence[str] = (),
    concurrent: int = 1,
    replace: bool = False,
    rerun: bool = False,
) -> tuple[list[Outcome], bool]:
    """Run the trials of a sweep that have not ended yet: the outcomes of all, and whether any was run.

    replace: see sweep.begin. rerun: all of them anew, what they left before is set aside.
    """
    layout = lay_out_sweep(out, sweep, resources, overrides)
    layout.check()
    sweep, folder = layout.sweep, out.sweep(sweep.name)
    with hold(folder.lock, f"sweep {sweep.name}"):
        begin(folder, sweep, replace=replace)
        if rerun:
            _set_aside(out, folder, layout)
        known = settled(folder, layout.source(folder))
        if known is not None and _is_shown(folder, known):
            return [each.outcome for each in known], False
        found = _search(out, layout, known, resources, concurrent)
    places = {trial.plan.run.name: i for i, trial in enumerate(layout.trials)}
    return sorted(found, key=lambda o: places.get(o.run, len(places))), known is None


def _set_aside(out: Out, folder: SweepDir, layout: Layout) -> None:
    """The runs of a sweep under other names, here and in MLflow; its outcomes are forgotten."""
    names = set(outcomes(folder))
    if layout.sweep.sampler in ("grid", "random"):
        names |= {trial.plan.run.name for trial in layout.trials}
    client, until = (
        tracking.open_store(out.tracking_uri, out.artifacts),
        time.strftime(".until-%Y%m%d-%H%M%S"),
    )
    for run in filter(lambda run: run.config.exists(), map(out.run, names)):
        with hold(run.lock, f"run {run.name}"):
            if run.tracking.exists():
                tags = {"gsa.key": read_json(run.facts)["fingerprint"] + until, "mlflow.parentRunId": ""}
                tracking.set_tags(client, read_json(run.tracking)["run_id"], tags)
            run.path.rename(run.path.with_name(run.name + until))
    folder.outcomes.unlink(missing_ok=True)
    folder.points.unlink(missing_ok=True)


def _search(
    out: Out, layout: Layout, known: list[Known] | None, resources: Resources, concurrent: int
) -> list[Outcome]:
    """Run what has not ended; then report, here and in MLflow. known: all trials, where none must run."""
    sweep, first = layout.sweep, layout.trials[0].plan
    folder, epochs = out.sweep(sweep.name), first.config.optim.epochs
    check_cache(first.config, first.manifest)
    with (
        board("sweep", "epochs") as (update, say, rows),
        mirrored(out, first.manifest, Epochs(update, sweep.size * epochs, rows)) as mirror,
    ):
        mirror.start_sweep(sweep, folder, first.manifest.digest)
        hooks = Board(mirror, sweep, say)
        for each in known or ():
            hooks.reuse(each.trial, each.outcome, recorded=each.recorded)
        found = [each.outcome for each in known or ()]
        if known is None:
            with session(cpus=_cpus(resources, concurrent)):
                found = search(
                    sweep,
                    folder,
                    layout.source(folder),
                    resources=resources,
                    concurrent=concurrent,
                    hooks=hooks,
                )
        try:
            winner, (_, files) = best(sweep, found), write_study(out, sweep, found)
        except InputError as error:
            log.error("no report: %s", error)
            winner, files = None, []
        mirror.end_sweep(winner, [folder.config, *files])
    if not mirror.missing:
        write_json(folder.tracking, {**read_json(folder.tracking), "shown": _names(found)})
    return found


def _is_shown(folder: SweepDir, known: list[Known]) -> bool:
    """Whether MLflow and the report have all of these trials already."""
    names = _names([each.outcome for each in known])
    return folder.tracking.exists() and read_json(folder.tracking).get("shown") == names


def _names(found: Sequence[Outcome]) -> list[str]:
    return sorted(f"{o.run} {o.state} {o.epoch}" for o in found)


def evaluate_model(out: Out, source: str, shards: str | None) -> Evaluation:
    """Exact accuracy on the val split of a run (on its own shards by default) or of a registered model."""
    if not source.startswith(registry.SCHEME):
        model, config, manifest = load_trained(out.find_run(source))
        if shards:
            manifest = _same_classes(read_manifest(out.shards(shards)), manifest.classes)
        classes = len(manifest.classes)
        return evaluate_split(model, config, _val(manifest), classes, this_place(), _threads())
    if not shards:
        raise InputError(f"{source}: which pictures? next: --shards NAME or --shards DIR")
    loaded = registry.load(source, out.tracking_uri)
    manifest = _same_classes(read_manifest(out.shards(shards)), loaded.classes)
    values = {"image_size": loaded.image_size, "crop_pct": loaded.crop_pct}
    config = Config(data=Config().data.model_copy(update=values))
    samples = _val(manifest)

    def forward(images: Tensor) -> Tensor:
        return torch.from_numpy(loaded.predict(images.numpy())).double().clamp_min(1e-38).log()

    batches = data.eval_loader(samples, config, rank=0, world=1, threads=_threads())
    classes = len(loaded.classes)
    return evaluate(forward, batches, classes=classes, expected=samples.certificate, salt=samples.salt)


def register(
    out: Out, run: RunDir, *, name: str, alias: str | None, sweep: str | None = None
) -> dict[str, Any]:
    """Evaluate a complete run exactly and put it into the registry; its version and accuracy."""
    if not run.result.exists():
        raise InputError(f"run {run.name} is not complete; next: train it to its end")
    network, config, manifest = load_trained(run)
    facts, samples = read_json(run.facts), manifest.split("val")
    result = evaluate_split(network, config, samples, len(manifest.classes), this_place(), _threads())
    tags = {
        "gsa.run": run.name,
        "gsa.fingerprint": facts["fingerprint"],
        "gsa.shards_digest": manifest.digest,
        "gsa.val_top1": f"{result.top1:.4f}",
        "gsa.val_count": str(result.samples),
        "gsa.val_certificate": result.certificate,
        **({"gsa.sweep": sweep} if sweep else {}),
    }
    registered = registry.register(
        tracking.open_store(out.tracking_uri, out.artifacts),
        model_name=name,
        classifier=Classifier(network.cpu()).eval(),
        # Of one, the batch would be fixed.
        example=np.stack([data.eval_picture(samples, i, config.data) for i in (0, len(samples) - 1)]),
        metadata={
            "classes": list(manifest.classes),
            "image_size": config.data.eval_size,
            "crop_pct": config.data.crop_pct,
        },
        tags=tags,
        alias=alias,
        run_id=read_json(run.tracking)["run_id"],
        metrics={"val/top1": result.top1},
    )
    return {"version": str(registered.version), "reused": registered.reused, **result._asdict()}


def best_run(out: Out, sweep: str) -> RunDir:
    """The complete run of a sweep with the best final metric."""
    folder = out.sweep(sweep)
    settings = read_sweep(folder)
    complete = [o for o in current(out, settings, list(outcomes(folder).values())) if o.state == "finished"]
    return out.find_run(best(settings, complete).run)


def ui_command(out: Out, host: str, port: int) -> tuple[list[str], dict[str, str], str]:
    """Command, environment and address of the MLflow UI on what lies below `out`."""
    command, environment = server.serve(out.tracking_uri, out.artifacts, host, port)
    client = tracking.open_store(out.tracking_uri, out.artifacts)
    newest = max((int(e.experiment_id) for e in client.search_experiments()), default=0)
    return command, environment, server.ui_url(host, port, str(newest))


class Prediction(NamedTuple):
    """What a model says of a picture: its labels and probabilities, best first; or why it could not."""

    file: str
    labels: list[str]
    probabilities: list[float]
    error: str | None = None


def predict(out: Out, source: str, files: Sequence[Path], *, top: int = 3) -> Iterator[Prediction]:
    """Classify picture files with a registered model (models:/NAME@ALIAS) or a run, in their order."""
    classify, classes, size, pct = _classifier(out, source)
    for start in range(0, len(files), PREDICT_BATCH):
        chosen = files[start : start + PREDICT_BATCH]
        pictures = [_picture(file, size, pct) for file in chosen]
        good = [p for p in pictures if isinstance(p, np.ndarray)]
        rows = iter(classify(np.stack(good)) if good else ())
        for file, picture in zip(chosen, pictures, strict=True):
            if isinstance(picture, str):
                yield Prediction(str(file), [], [], error=picture)
            else:
                row = next(rows)
                order = np.argsort(-row)[:top]
                yield Prediction(str(file), [classes[i] for i in order], [float(row[i]) for i in order])


def _classifier(out: Out, source: str) -> tuple[Callable[[Any], Any], Sequence[str], int, float]:
    if source.startswith(registry.SCHEME):
        loaded = registry.load(source, out.tracking_uri)
        return loaded.predict, loaded.classes, loaded.image_size, loaded.crop_pct
    network, config, manifest = load_trained(out.find_run(source))
    classifier = Classifier(network).eval()

    def classify(images: Any) -> Any:
        with torch.no_grad():
            return classifier(torch.from_numpy(images)).numpy()

    return classify, manifest.classes, config.data.eval_size, config.data.crop_pct


def _picture(file: Path, size: int, pct: float) -> Any:
    """uint8 (size, size, 3), or why the file cannot be read."""
    try:
        return augment.center_crop(decode(file.read_bytes()), size=size, pct=pct)
    except (OSError, DecodeError) as error:
        return str(error)


def _val(manifest: Manifest) -> Samples:
    samples = manifest.split("val")
    if not len(samples):
        raise InputError(
            f"{manifest.folder}: no val samples to evaluate on; next: name another set (--shards)"
        )
    return samples


def _threads() -> int:
    """Of the loader, where one process evaluates: some of the machine, which others may use too."""
    return min(8, os.cpu_count() or 1)


def _same_classes(manifest: Manifest, classes: Sequence[str]) -> Manifest:
    if tuple(manifest.classes) != tuple(classes):
        raise InputError(
            f"{manifest.folder}: its {len(manifest.classes)} classes are not the model's {len(classes)} "
            f"({', '.join(classes[:5])}, ...)"
        )
    return manifest


def _cpus(resources: Resources, concurrent: int) -> int:
    """Logical CPUs for Ray: enough for every worker, one of head-room for the drivers of trials."""
    return max(os.cpu_count() or 1, resources.span[1] * resources.cpus_per_worker * concurrent) + 1
