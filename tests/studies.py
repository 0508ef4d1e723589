"""Run folders as training leaves them, without training: settings, facts, a journal; and their outcomes."""

from collections.abc import Sequence
from typing import Any

from pipeline import metrics
from pipeline.config import Config, dump, validate
from pipeline.rundir import Out, write_atomic, write_json
from pipeline.sweep import Outcome

Values = Sequence[float]  # the metric after each epoch


def write_run(
    out: Out,
    values: Values,
    point: dict[str, Any] | None = None,
    *,
    seed: int = 0,
    state: str = "finished",
    metric: str = "val/top1",
    facts: dict[str, Any] | None = None,
    more: dict[str, float] | None = None,
) -> Outcome:
    """A run of the point {field: value}, an epoch of 36 s on 2 workers a value; more: metrics of each epoch."""
    settings: dict[str, Any] = {"seed": seed, "model": {"name": "gsa_resnet_tiny", "placement": "gggg"}}
    for field, value in (point or {}).items():
        section, _, name = field.rpartition(".")
        (settings.setdefault(section, {}) if section else settings)[name] = value
    run = out.run(f"run-{len(list(out.root.glob('runs/*'))):03d}")
    run.logs.mkdir(parents=True)
    write_atomic(run.config, dump(validate(Config, settings, where="test")))
    write_json(run.facts, {"params": 1000, "gflops": 0.5, "classes": ["a", "b"], **(facts or {})})
    pace = {"perf/images_per_s": 100.0, "perf/epoch_s": 36.0, "perf/world": 2}
    last: dict[str, float] = {}
    for epoch, value in enumerate(values, 1):
        metrics.append(run.metrics, step=10 * epoch - 5, epoch=epoch - 0.5, metrics={"train/loss": 1.0})
        last = {metric: value, "val/count": 18.0, **pace, **(more or {})}
        metrics.append(run.metrics, step=10 * epoch, epoch=epoch, metrics=last)
    if state == "finished":
        write_json(run.result, {"metrics": last})
    seconds = 36.0 * len(values)
    return Outcome(run.name, point or {}, seed, (f"seed={seed}",), state, len(values), last, seconds)  # type: ignore[arg-type]
