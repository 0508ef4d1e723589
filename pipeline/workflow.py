"""shards -> sweep -> train -> evaluate -> register -> predict: each stage skipped when its inputs are unchanged."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import registry, verbs
from pipeline.config import Config, InputError, Name, Positive, Resources, Section, digest, load
from pipeline.manifest import read_manifest, read_sample
from pipeline.pictures import ShardsConfig
from pipeline.plan import prepare, read_run
from pipeline.rundir import Out, RunDir, hold, read_json, write_atomic, write_json
from pipeline.shards import listing
from pipeline.sweep import Sweep, best

Outputs = dict[str, Any]


class SweepStage(Section):
    """The sweep recipe; `overrides` are for each of its trials."""

    recipe: str
    overrides: list[str] = []
    concurrent: Positive = 1


class TrainStage(Section):
    """What the final run changes of the best trial's settings."""

    overrides: list[str] = []


class RegisterStage(Section):
    """The registered model's name and the alias that moves to the new version."""

    model: Name
    alias: Name = "champion"


class Workflow(Section):
    """From a source of pictures to a registered model."""

    name: Name
    shards: ShardsConfig
    sweep: SweepStage
    train: TrainStage = TrainStage()
    registry: RegisterStage
    predict: Positive = 12  # held-out pictures
    resources: Resources = Resources()


class Stage(NamedTuple):
    """A node of the graph. `run` gets the outputs of all earlier stages, `intact` proves that its own still are."""

    name: str
    settings: Any
    needs: tuple[str, ...]
    run: Callable[[dict[str, Outputs]], Outputs]
    intact: Callable[[Outputs], bool]


def run_workflow(out: Out, workflow: Workflow, say: Callable[[str], None]) -> dict[str, Outputs]:
    """Run what has changed since the last call, stage by stage; the outputs of every stage.

    State lies in OUT/workflows/NAME/state.json, written after each stage: a killed call is continued by
    the next. `say` gets one line a stage.
    """
    folder = out.workflow(workflow.name)
    with hold(folder / ".lock", f"workflow {workflow.name}"):
        state = read_state(out, workflow)
        outputs: dict[str, Outputs] = {}
        for stage in stages(out, workflow):
            inputs = digest([stage.settings, {need: outputs[need] for need in stage.needs}])
            old = state.get(stage.name)
            if old and old["inputs"] == inputs and stage.intact(old["outputs"]):
                say(f"{stage.name}: unchanged, reused")
                outputs[stage.name] = old["outputs"]
                continue
            start = time.monotonic()
            outputs[stage.name] = stage.run(outputs)
            seconds = time.monotonic() - start
            state[stage.name] = {"inputs": inputs, "outputs": outputs[stage.name], "seconds": seconds}
            write_json(folder / "state.json", state)
            say(f"{stage.name}: done in {seconds:.0f} s")
        return outputs


def read_state(out: Out, workflow: Workflow) -> dict[str, Any]:
    """What earlier calls have finished: {stage: {inputs, outputs, seconds}}."""
    path = out.workflow(workflow.name) / "state.json"
    return dict(read_json(path)) if path.exists() else {}


def stages(out: Out, workflow: Workflow) -> list[Stage]:
    """The graph, in an order in which it can run."""
    sweep = load(Sweep, "sweep", workflow.sweep.recipe)
    shards = workflow.shards
    overrides = [f"data.shards={shards.name}", *workflow.sweep.overrides]

    def build_shards(_: dict[str, Outputs]) -> Outputs:
        manifest = verbs.build_shards(out, shards, replace="shards" in read_state(out, workflow)).manifest
        return {
            "digest": manifest.digest,
            "train": len(manifest.split("train")),
            "val": len(manifest.split("val")),
            "broken": len(manifest.broken),
        }

    def run_sweep(_: dict[str, Outputs]) -> Outputs:
        ended, _ran = verbs.tune(
            out,
            sweep,
            workflow.resources,
            overrides=overrides,
            concurrent=workflow.sweep.concurrent,
            replace=True,  # the workflow says what its sweep is
        )
        winner = best(sweep, ended)
        return {"outcomes": [o._asdict() for o in ended], "best": winner._asdict(), "sweep": sweep.name}

    def final_run(outputs: dict[str, Outputs]) -> RunDir:
        settings = [*outputs["sweep"]["best"]["overrides"], *workflow.train.overrides]
        return prepare(out, load(Config, "train", sweep.train, settings))

    def run_train(outputs: dict[str, Outputs]) -> Outputs:
        run = final_run(outputs)
        verbs.train(out, run, workflow.resources, tags={"gsa.best_of": sweep.name})
        return {"run": run.name, "metrics": read_json(run.result)["metrics"]}

    def run_evaluate(outputs: dict[str, Outputs]) -> Outputs:
        return verbs.evaluate_model(out, outputs["train"]["run"], None)._asdict()

    def run_register(outputs: dict[str, Outputs]) -> Outputs:
        name, alias = workflow.registry.model, workflow.registry.alias
        run = out.find_run(outputs["train"]["run"])
        made = verbs.register(out, run, name=name, alias=alias, sweep=sweep.name)
        return {"uri": f"{registry.SCHEME}{name}@{alias}", "model": name, **made}

    def run_predict(outputs: dict[str, Outputs]) -> Outputs:
        run = out.find_run(outputs["train"]["run"])
        pictures = held_out(run, out.workflow(workflow.name) / "held_out", workflow.predict)
        return {"predictions": predict_afresh(out, outputs["register"]["uri"], pictures)}

    return [
        Stage(
            "shards",
            [shards.model_dump(), listing(shards)],
            (),
            build_shards,
            lambda o: _has_shards(out, shards.name, o["digest"]),
        ),
        Stage(
            "sweep",
            [sweep.model_dump(), overrides],
            ("shards",),
            run_sweep,
            lambda o: all(out.run(row["run"]).metrics.exists() for row in o["outcomes"]),
        ),
        Stage(
            "train",
            workflow.train.model_dump(),
            ("shards", "sweep"),
            run_train,
            lambda o: out.run(o["run"]).result.exists(),
        ),
        Stage("evaluate", None, ("train",), run_evaluate, lambda o: True),
        Stage(
            "register",
            workflow.registry.model_dump(),
            ("train", "evaluate"),
            run_register,
            lambda o: registry.has_version(
                out.tracking_uri, o["model"], o["version"], workflow.registry.alias
            ),
        ),
        Stage("predict", workflow.predict, ("register",), run_predict, lambda o: True),
    ]


def held_out(run: RunDir, folder: Path, count: int) -> list[tuple[Path, str]]:
    """Val pictures of a run as files, each with the name of its true class."""
    _, manifest = read_run(run)
    samples = manifest.split("val")
    chosen = [i * len(samples) // count for i in range(min(count, len(samples)))]
    pictures = []
    for number, i in enumerate(chosen):
        path = folder / f"{number:03d}.{samples.ext[i]}"
        write_atomic(path, read_sample(samples, i))
        pictures.append((path, manifest.classes[samples.label[i]]))
    return pictures


def predict_afresh(out: Out, uri: str, pictures: list[tuple[Path, str]]) -> list[dict[str, Any]]:
    """`gsa predict` in a new process, as a user of the registry would: one row a picture."""
    command = [sys.executable, "-m", "pipeline.cli", "predict", uri, "--json", "--out", str(out.root)]
    done = subprocess.run(
        [*command, *(str(path) for path, _ in pictures)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise InputError(f"gsa predict {uri} failed ({done.returncode}): {done.stderr.strip()[-500:]}")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return [
        {
            "file": row["file"],
            "label": row["labels"][0],
            "probability": row["probabilities"][0],
            "truth": truth,
        }
        for row, (_, truth) in zip(rows, pictures, strict=True)
    ]


def _has_shards(out: Out, name: str, expected: str) -> bool:
    try:
        return read_manifest(out.shards(name)).digest == expected
    except InputError:
        return False
