"""`gsa <verb>`: parses, calls, prints. Imports nothing heavy until a verb needs it."""

import importlib
import json
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from pipeline.config import InputError, Preempted, TrainingFailed

app = typer.Typer(
    name="gsa",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Global Self-Attention networks: from a folder of images to a registered model.",
    epilog="Exit codes: 0 done, 1 failed, 2 bad input, 75 stopped with a checkpoint, 130 interrupted.",
)
shards_app = typer.Typer(no_args_is_help=True, help="Write, index, prove and show WebDataset shards.")
app.add_typer(shards_app, name="shards")

OutOption = Annotated[
    Path, typer.Option("--out", envvar="GSA_OUT", help="Root of all output.", show_default=True)
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[FIELD=VALUE]...", help="Changes, e.g. optim.lr=0.1")
]
Workers = Annotated[str, typer.Option(help="Workers: N, or MIN..MAX for an elastic run.")]
Cpus = Annotated[int, typer.Option(help="CPUs a worker: one trains, the others load data.")]
Gpus = Annotated[float, typer.Option(help="GPUs a worker.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
DEFAULT_OUT = Path("out")


@app.command()
def models(
    name: Annotated[str | None, typer.Argument(help="One network; default: all.")] = None,
    image_size: Annotated[int, typer.Option(min=1, max=10_000, help="Pixels a side.")] = 224,
    classes: Annotated[int, typer.Option(min=1, max=10_000_000, help="Classes.")] = 1000,
    stem: Annotated[str, typer.Option(help="imagenet or small.")] = "imagenet",
    placement: Annotated[str | None, typer.Option(help="Where GSA goes: cggg, all, last:2 ...")] = None,
    components: Annotated[str, typer.Option(help="Branches of GSA.")] = "content+column+row",
    window: Annotated[int | None, typer.Option(max=20_001, help="Pixels that an axis sees; odd.")] = None,
    by_stage: Annotated[bool, typer.Option("--by-stage", help="The stages of each network.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Recompute the paper's figures; 1 if any differs.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List the networks with their parameters, GFLOPs and activation memory (float32) for one image."""
    from pipeline.costs import PAPER_SETTINGS

    settings = {
        "image_size": image_size,
        "num_classes": classes,
        "stem": stem,
        "placement": placement,
        "components": components,
        "window": window,
    }
    if check:
        if name or by_stage or settings != PAPER_SETTINGS:
            raise InputError("gsa models --check has settings of its own: leave out all but --json")
        _check_figures(as_json)
        return
    rows = _model_rows(name, settings)
    if by_stage and not as_json:
        for row in rows:
            _print_stages(row)
        return
    if not as_json:
        rows = [{key: value for key, value in row.items() if key != "stages"} for row in rows]
    title = (
        f"{classes} classes, {image_size}x{image_size}, stem {stem}; gflops and activation_mib for one image"
    )
    _print_rows(rows, as_json, title=title)


@shards_app.command("build")
def shards_build(
    source: Annotated[
        str, typer.Option(help="digits, folder (a sub-folder per class), imagenet, cifar10 or cifar100.")
    ],
    name: Annotated[str | None, typer.Option(help="Name below OUT/shards; default: the source.")] = None,
    input_: Annotated[Path | None, typer.Option("--input", help="Folder of pictures or archives.")] = None,
    val_fraction: Annotated[
        float, typer.Option(help="Share of each class for validation, where no split is given.")
    ] = 0.2,
    seed: Annotated[int, typer.Option(help="Of the split and of the order.")] = 0,
    shorter_side: Annotated[
        int | None,
        typer.Option(
            help="Pixels: larger pictures are made as small (Lanczos, JPEG 4:4:4). Default: bytes kept."
        ),
    ] = None,
    quality: Annotated[int, typer.Option(help="Of the JPEGs that --shorter-side makes.")] = 90,
    samples_per_shard: Annotated[int, typer.Option(help="Samples in each .tar file.")] = 1000,
    replace: Annotated[bool, typer.Option(help="Replace a set made otherwise.")] = False,
    out: OutOption = DEFAULT_OUT,
) -> None:
    """Write .tar shards and their manifest. Broken pictures are left out, counted and listed (exit code 0).

    folder: CLASS/picture.jpg, alone or below train/ and val/.
    imagenet: the official archives as they are, or train/ and val/.
    cifar10, cifar100: the official python archive, or its folder.
    Killed at any point, the same command continues.
    """
    from pipeline.config import validate
    from pipeline.pictures import ShardsConfig
    from pipeline.verbs import build_shards

    values = {
        "name": name or source,
        "source": source,
        "input": str(input_) if input_ else None,
        "val_fraction": val_fraction,
        "seed": seed,
        "shorter_side": shorter_side,
        "quality": quality,
        "samples_per_shard": samples_per_shard,
    }
    built = build_shards(_out(out), validate(ShardsConfig, values, where="gsa shards build"), replace=replace)
    manifest = built.manifest
    counts = ", ".join(f"{len(manifest.split(s))} {s}" for s in manifest.splits)
    print(f"{'reused' if built.reused else 'written'}: {manifest.folder}")
    print(f"{counts} samples of {len(manifest.classes)} classes in {len(manifest.shards)} shards")
    _print_left_out(manifest)


@shards_app.command("index", context_settings={"allow_extra_args": True})
def shards_index(
    context: typer.Context,
    name: Annotated[str, typer.Option(help="Name below OUT/shards.")],
    train: Annotated[
        list[str],
        typer.Option(help="Tars: paths, folders, globs, train-{000000..001023}.tar, URLs. Repeatable."),
    ],
    val: Annotated[list[str] | None, typer.Option(help="Tars of the val split. Repeatable.")] = None,
    label_field: Annotated[
        str | None, typer.Option(help="The .json member's field with the label; default: the .cls member.")
    ] = None,
    classes: Annotated[
        Path | None, typer.Option(help="Class names, one a line, in the labels' order.")
    ] = None,
    checksums: Annotated[
        bool, typer.Option("--checksums", help="Read every byte, not headers alone; always so for URLs.")
    ] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Replace an index of this name.")] = False,
    out: OutOption = DEFAULT_OUT,
) -> None:
    """Make the manifest of WebDataset tars that others wrote; they stay where they are.

    A damaged or cut tar is an error. Samples without exactly one picture and one label are left out and
    listed; above 1 % of all that is an error too.
    """
    from pipeline.config import validate
    from pipeline.foreign import IndexConfig, index, unchanged
    from pipeline.progress import bar
    from pipeline.remote import is_url

    if context.args:
        raise InputError(
            f"shards index: expected each tar behind --train or --val, got {len(context.args)} more, the first "
            f"{context.args[0]!r}: a pattern that the shell has expanded? next: quote it, --train 'train-*.tar'"
        )
    values = {
        "name": name,
        "train": train,
        "val": val or [],
        "label_field": label_field,
        "classes": str(classes) if classes else None,
        "checksums": checksums,
    }
    config, folder = validate(IndexConfig, values, where="gsa shards index"), _out(out).shards(name)
    manifest = None if replace else unchanged(config, folder)
    if manifest:
        far = any(is_url(shard.path) for shard in manifest.shards)
        print(f"reused, unchanged{' (no server was asked)' if far else ''}: {folder}")
    else:
        with bar("index", "tars") as update:
            manifest = index(config, folder, progress=lambda done, of: update(done, of, ""), replace=replace)
        print(f"indexed: {manifest.folder}")
    counts = ", ".join(f"{len(manifest.split(s))} {s}" for s in manifest.splits)
    print(f"{counts} samples of {len(manifest.classes)} classes in {len(manifest.shards)} tars")
    unseen = set(range(len(manifest.classes))) - set(manifest.split("train").label.tolist())
    if unseen:  # labels that count from 1, perhaps
        names = ", ".join(manifest.classes[i] for i in sorted(unseen)[:3])
        print(f"{len(unseen)} classes without a train sample: {names}{', ...' if len(unseen) > 3 else ''}")
    _print_left_out(manifest)


@shards_app.command("verify")
def shards_verify(
    shards: Annotated[str, typer.Argument(help="Name below OUT/shards, or a folder.")],
    out: OutOption = DEFAULT_OUT,
) -> None:
    """Prove every byte of every shard against the manifest. Exit code 1 if anything is wrong."""
    from pipeline.manifest import read_manifest
    from pipeline.progress import bar
    from pipeline.verify import verify

    folder = _out(out).shards(shards)
    if not folder.is_dir():
        raise InputError(f"{folder}: no shards there; next: gsa shards build")
    notes: list[str] = []
    with bar("verify", "shards") as update:
        faults = verify(folder, progress=lambda done, total: update(done, total, ""), say=notes.append)
    for line in faults + notes:
        print(line)
    if faults:
        print(f"{folder}: {len(faults)} faults")
        raise typer.Exit(1)
    manifest = read_manifest(folder)
    samples = sum(len(manifest.split(s)) for s in manifest.splits)
    print(f"{folder}: {len(manifest.shards)} shards, {samples} samples, all as the manifest says")
    if not all(shard.sha256 for shard in manifest.shards):
        print("sizes and headers alone: it has no checksums; next: gsa shards index --checksums --replace")


@shards_app.command("show")
def shards_show(
    shards: Annotated[str, typer.Argument(help="Name below OUT/shards, or a folder.")],
    sheet: Annotated[Path | None, typer.Option(help="Write a contact sheet (PNG) here.")] = None,
    as_json: Json = False,
    out: OutOption = DEFAULT_OUT,
) -> None:
    """Show what a set of shards holds."""
    from pipeline.manifest import read_manifest
    from pipeline.verify import contact_sheet, table

    manifest = read_manifest(_out(out).shards(shards))
    rows = table(manifest)
    if not as_json:
        for row in rows:
            counts = row["classes"].values()
            row["classes"] = f"{len(counts)}, of {min(counts)} to {max(counts)} samples"
    _print_rows(rows, as_json, title=str(manifest.folder))
    if not as_json:
        _print_left_out(manifest)
    if sheet:
        contact_sheet(manifest, sheet)
        print(f"contact sheet: {sheet}", file=sys.stderr)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe, or the path of a .yaml file.")],
    overrides: Overrides = None,
    workers: Workers = "1",
    cpus_per_worker: Cpus = 1,
    gpus_per_worker: Gpus = 0,
    save_minutes: Annotated[float, typer.Option(help="Between checkpoints within an epoch.")] = 10.0,
    find_micro_batch: Annotated[
        bool, typer.Option("--find-micro-batch", help="Try out first which is the largest that a GPU holds.")
    ] = False,
    profile: Annotated[
        int, typer.Option(metavar="STEPS", min=0, help="Steps of which each worker writes a trace.")
    ] = 0,
    chaos: Annotated[
        str | None,
        typer.Option(
            metavar="mtbf=N[s|m]",
            help="Kill workers at random, N apart on average; then prove that it changed nothing.",
        ),
    ] = None,
    out: OutOption = DEFAULT_OUT,
) -> None:
    """Train a recipe under Ray Train, mirrored to MLflow. The same settings again: the same run, continued.

    SIGTERM or SIGUSR2: a checkpoint at the next step, then exit code 75. With --chaos exit code 1 if the
    weights or the metrics differ from those of an undisturbed run, which is trained after it.
    """
    from pipeline import verbs
    from pipeline.chaos import mtbf
    from pipeline.config import Config, load
    from pipeline.metrics import read
    from pipeline.plan import prepare
    from pipeline.rundir import read_json

    where, config = _out(out), load(Config, "train", recipe, overrides or [])
    resources = _resources(
        workers, cpus_per_worker, gpus_per_worker, save_minutes=save_minutes, profile=profile
    )
    if find_micro_batch:
        config = verbs.find_micro_batch(where, config, resources)
        print(f"found optim.micro_batch={config.optim.micro_batch}")
    resources.check(config)
    kill_every_s = None if chaos is None else mtbf(chaos)
    run = prepare(where, config)
    if kill_every_s:
        _print_verdict(verbs.torment(where, run, resources, kill_every_s), run)
        return
    ran = verbs.train(where, run, resources)
    metrics = read_json(run.result)["metrics"]
    print(f"run {run.name}{'' if ran else ' (complete already, reused)'}: {run.path}")
    print(f"val top-1 {metrics['val/top1']:.2f} % of {metrics['val/count']:.0f} samples")
    bad = sum(record.metrics.get("train/bad_samples", 0) for record in read(run.metrics))
    if bad:
        print(f"{bad:.0f} times a train sample could not be read: see bad_sample in {run.logs}")


@app.command()
def tune(
    sweep: Annotated[str, typer.Argument(help="A shipped sweep, or the path of a .yaml file.")],
    overrides: Overrides = None,
    workers: Workers = "1",
    cpus_per_worker: Cpus = 1,
    gpus_per_worker: Gpus = 0,
    concurrent: Annotated[int, typer.Option(min=1, help="Trials at a time.")] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the points and what they cost; run nothing.")
    ] = False,
    tflops: Annotated[
        float | None, typer.Option(metavar="X", help="TFLOP/s that a device reaches, for the estimate.")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(metavar="HOURS", help="Refuse a sweep of more device-hours.")
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Forget the outcomes of a sweep that was another one.")
    ] = False,
    rerun: Annotated[
        bool, typer.Option("--rerun", help="Run all trials anew; their old runs are set aside.")
    ] = False,
    as_json: Json = False,
    out: OutOption = DEFAULT_OUT,
) -> None:
    """Run a sweep or a study under Ray Tune. Called again, it continues; what has ended does not run twice.

    A trial with one worker trains in a process of its own, with several it is a Ray Train run. Overrides are
    for every trial (fields of the train recipe).
    """
    from pipeline.config import load
    from pipeline.report import trial_rows
    from pipeline.sweep import Sweep
    from pipeline.verbs import tune as tune_sweep

    where, settings = _out(out), load(Sweep, "sweep", sweep)
    resources = _resources(workers, cpus_per_worker, gpus_per_worker)
    if dry_run or budget is not None:
        _preview(where, settings, resources, overrides or [], tflops, budget, as_json, show=dry_run)
    if dry_run:
        return
    ended, ran = tune_sweep(
        where,
        settings,
        resources,
        overrides=overrides or [],
        concurrent=concurrent,
        replace=replace,
        rerun=rerun,
    )
    title = f"sweep {settings.name}{'' if ran else ' (complete already, reused)'}"
    _print_rows(trial_rows(where, ended), as_json, title=title)
    print(f"report: {where.sweep(settings.name).report}", file=sys.stderr)
    if any(o.state == "failed" for o in ended):
        raise typer.Exit(1)


@app.command()
def report(
    names: Annotated[list[str], typer.Argument(metavar="SWEEP|RUN...", help="A sweep, or some runs.")],
    metric: Annotated[str | None, typer.Option(help="By default that of the sweep, or val/top1.")] = None,
    baseline: Annotated[
        str | None, typer.Option(metavar="'FIELD=VALUE ...'", help="The point to compare the others with.")
    ] = None,
    iso: Annotated[
        Literal["params", "gflops"] | None,
        typer.Option(
            metavar="params|gflops", help="Compare each with the convolution net of about equal cost."
        ),
    ] = None,
    as_json: Json = False,
    out: OutOption = DEFAULT_OUT,
) -> None:
    """Mean, spread, 95 % interval, differences and cost of each point: as tables, for papers too, and plots."""
    from pipeline.report import of_runs, of_sweep
    from pipeline.study import parse_point
    from pipeline.tables import plain, point_rows

    where, point = _out(out), parse_point(baseline) if baseline else None
    if len(names) == 1 and not where.run(names[0]).config.exists():
        study, folder = of_sweep(where, names[0], metric=metric, baseline=point, iso=iso)
    else:
        study, folder = of_runs(where, names, metric=metric or "val/top1", baseline=point, iso=iso)
    print(json.dumps(point_rows(study)) if as_json else plain(study, title=" ".join(names)))
    print(f"report: {folder}", file=sys.stderr)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run, or models:/NAME@ALIAS.")],
    shards: Annotated[str | None, typer.Option(help="Name below OUT/shards, or a folder.")] = None,
    as_json: Json = False,
    out: OutOption = DEFAULT_OUT,
) -> None:
    """Exact accuracy on the val split: each sample once, and counted."""
    from pipeline.verbs import evaluate_model

    result = evaluate_model(_out(out), model, shards)
    if as_json:
        print(json.dumps(result._asdict()))
        return
    print(
        f"{model}: top-1 {result.top1:.2f} % ({result.correct} of {result.samples} samples, each once), "
        f"top-5 {result.top5:.2f} %, loss {result.loss:.4f}; certificate {result.certificate}"
    )


@app.command()
def register(
    name: Annotated[str, typer.Option(help="Name of the registered model.")],
    run: Annotated[str | None, typer.Option(help="A complete run.")] = None,
    sweep: Annotated[str | None, typer.Option(help="A sweep: its best complete run.")] = None,
    alias: Annotated[str, typer.Option(help="Alias that moves to the new version.")] = "champion",
    out: OutOption = DEFAULT_OUT,
) -> None:
    """Evaluate a complete run exactly and put it into the MLflow registry."""
    from pipeline.verbs import best_run
    from pipeline.verbs import register as register_run

    if (run is None) == (sweep is None):
        raise InputError("gsa register: expected one of --run and --sweep")
    where = _out(out)
    chosen = where.find_run(run) if run else best_run(where, str(sweep))
    made = register_run(where, chosen, name=name, alias=alias, sweep=sweep)
    print(
        f"models:/{name}@{alias} is version {made['version']}{' (reused)' if made['reused'] else ''}: "
        f"run {chosen.name}, val top-1 {made['top1']:.2f} % ({made['correct']} of {made['samples']})"
    )


@app.command()
def predict(
    model: Annotated[str, typer.Argument(help="models:/NAME@ALIAS, models:/NAME/VERSION, or a run.")],
    images: Annotated[list[Path], typer.Argument(help="Pictures: JPEG, PNG, WebP.")],
    top: Annotated[int, typer.Option(min=1, help="Labels a picture.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    out: OutOption = DEFAULT_OUT,
) -> None:
    """Classify pictures. Files that cannot be read are reported and left out; then the exit code is 2."""
    from pipeline.verbs import predict as predict_files

    unreadable = 0
    for row in predict_files(_out(out), model, images, top=top):
        if row.error:
            unreadable += 1
            print(f"gsa: {row.file}: {row.error}", file=sys.stderr)
        elif as_json:
            print(json.dumps(row._asdict()))
        else:
            labels = zip(row.labels, row.probabilities, strict=True)
            print(f"{row.file}  " + "  ".join(f"{label} {p:.1%}" for label, p in labels))
    if unreadable:
        raise InputError(f"{unreadable} of {len(images)} files could not be read")


@app.command()
def ui(
    host: Annotated[str, typer.Option(help="Beyond loopback: with basic-auth only.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 5000,
    out: OutOption = DEFAULT_OUT,
) -> None:
    """Open the MLflow UI on the runs and the registry, until Ctrl-C."""
    from pipeline.verbs import ui_command

    command, environment, address = ui_command(_out(out), host, port)
    print(f"MLflow UI: {address}  (Ctrl-C ends it)", flush=True)
    os.execvpe(command[0], command, environment)  # becomes the server: one process to end


@app.command()
def run(
    workflow: Annotated[str, typer.Argument(help="demo, folder, or the path of a .yaml file.")],
    overrides: Overrides = None,
    out: OutOption = DEFAULT_OUT,
) -> None:
    """Run a workflow: shards, sweep, train, evaluate, register, predict. What is unchanged is reused."""
    from pipeline.config import load
    from pipeline.report import summary
    from pipeline.workflow import Workflow, run_workflow

    where, settings = _out(out), load(Workflow, "workflow", workflow, overrides or [])
    outputs = run_workflow(where, settings, say=lambda line: print(line, flush=True))
    print(summary(where, settings, outputs))


def _doctor(as_json: Json = False, out: OutOption = DEFAULT_OUT) -> None:
    """What is here, what is missing, what to do: versions, GPUs, Ray, Slurm, MLflow store, disk."""
    rows = importlib.import_module("cluster.doctor").examine(_out(out))
    _print_rows(rows, as_json, title="gsa doctor")
    if any(row["state"] == "missing" for row in rows):
        raise typer.Exit(1)


app.command("doctor")(_doctor)


def main() -> None:
    """Entry point: what the user can mend is one line and exit code 2, without a traceback."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        app()
    except InputError as error:
        print(f"gsa: {error}", file=sys.stderr)
        sys.exit(2)
    except TrainingFailed as error:
        print(f"gsa: {error}", file=sys.stderr)
        sys.exit(1)
    except Preempted as stopped:
        print(f"gsa: {stopped}; the same command continues", file=sys.stderr)
        sys.exit(75)
    except SystemExit as end:
        if end.code == 130:
            print("gsa: interrupted; the same command continues", file=sys.stderr)
        raise


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _out(root: Path) -> Any:
    from pipeline.rundir import Out

    return Out(root.absolute())


def _resources(workers: str, cpus_per_worker: int, gpus_per_worker: float, **others: float) -> Any:
    from pipeline.config import Resources, validate

    values = {
        "workers": workers,
        "cpus_per_worker": cpus_per_worker,
        "gpus_per_worker": gpus_per_worker,
        **others,
    }
    return validate(Resources, values, where="resources")


def _print_rows(rows: Sequence[dict[str, Any]], as_json: bool, *, title: str) -> None:
    if as_json:
        print(json.dumps(rows))
        return
    from pipeline.tables import table

    print(title)
    print(table(rows))


def _preview(
    out: Any,
    sweep: Any,
    resources: Any,
    overrides: list[str],
    tflops: float | None,
    budget: float | None,
    as_json: bool,
    *,
    show: bool,
) -> None:
    """Print what a sweep would run and cost; refuse wrong points, and more than the budget."""
    from pipeline.preview import check_budget, preview, text
    from pipeline.verbs import lay_out_sweep

    layout = lay_out_sweep(out, sweep, resources, overrides)
    found = preview(layout.sweep, layout.trials, out=out, resources=resources, tflops=tflops)
    if show and as_json:
        print(json.dumps({"points": found.rows, "total": found.total._asdict(), "faults": layout.faults}))
    elif show:
        print(text(found))
    layout.check()
    if budget is not None:
        check_budget(found.total, budget)


def _model_rows(name: str | None, settings: dict[str, Any]) -> list[dict[str, Any]]:
    from pipeline.costs import model_rows

    with warnings.catch_warnings(record=True, action="always") as warned:
        rows = model_rows(name, settings)
    for warning in warned:
        print(f"gsa: {warning.message}", file=sys.stderr)
    return rows


def _print_stages(row: dict[str, Any]) -> None:
    total = {key: row[key] for key in ("params", "gflops", "activation_mib")}
    _print_rows([*row["stages"], {"stage": "all", **total}], False, title=row["model"])


def _check_figures(as_json: bool) -> None:
    """Print every figure of the paper, counted anew; exit code 1 if one differs."""
    from pipeline.costs import checked_figures

    rows = []
    for row in checked_figures():
        rows.append(row)
        if not as_json:
            differs = "" if row["ok"] else f"expected {row['expected']}, got "
            print(
                f"{'ok' if row['ok'] else 'MISMATCH':<9} {row['network']}: {differs}{row['got']}", flush=True
            )
    right = sum(row["ok"] for row in rows)
    print(json.dumps(rows) if as_json else f"{right} of {len(rows)} figures are as expected")
    if right < len(rows):
        raise typer.Exit(1)


def _print_verdict(verdict: Any, run: Any) -> None:
    """What chaos did; exit code 1 if it changed anything, or if there was none."""
    n, lost = verdict.kills, verdict.lost_s
    each = f", {lost / n:.0f} s each" if n > 1 else ""
    print(f"run {run.name}: {run.path}")
    print(f"chaos: {n} kill{'' if n == 1 else 's'}, {lost:.0f} s longer than the undisturbed run{each}")
    if not verdict.kills:
        print("nothing was killed, so nothing is proven; next: a shorter mtbf, and another --out")
    else:
        weights, series = ("equal" if same else "NOT EQUAL" for same in verdict[-2:])
        print(f"weights {weights}, metrics {series} to those of the undisturbed run, by every bit")
    if not verdict.passed:
        raise typer.Exit(1)


def _print_left_out(manifest: Any) -> None:
    for row in manifest.broken:
        print(f"left out: {row['file']}: {row['reason']}")
    for name in manifest.empty_classes:
        print(f"class left out: {name}")
    if manifest.broken or manifest.empty_classes:
        print(
            f"left out: {len(manifest.broken)} broken pictures, {len(manifest.empty_classes)} empty classes"
        )
    if manifest.ignored and not manifest.foreign:  # tars of others hold all kinds of members
        print(f"not looked at: {manifest.ignored} files that are no .jpg, .jpeg, .png or .webp")


if __name__ == "__main__":
    main()
