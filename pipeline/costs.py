"""What the networks cost, as rows beside the paper's figures."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from gsa_models import PAPER_TABLE, create_model, list_models, model_cost
from gsa_models.cost import FIGURES, Cost, StageCost
from pipeline.config import InputError

PAPER_SETTINGS = {  # of the networks whose size the paper reports; the defaults of `gsa models`
    "image_size": 224,
    "num_classes": 1000,
    "stem": "imagenet",
    "placement": None,
    "components": "content+column+row",
    "window": None,
}


def model_rows(name: str | None, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The cost of one network, or of all; `paper` is what its text reports, where the settings are its own.

    settings: of create_model. Raises InputError for those that make no network.
    """
    reported = {}
    if settings == PAPER_SETTINGS:
        marks = {True: " (recalled)", False: ""}
        reported = {row.model: f"{row.reported}{marks[row.recalled]}" for row in PAPER_TABLE if row.reported}
    rows = []
    for model in [name] if name else list_models():
        cost = _cost(model, settings)
        stages = [{"stage": stage.name, **_numbers(stage)} for stage in cost.stages]
        rows.append({"model": model, **_numbers(cost), "paper": reported.get(model), "stages": stages})
    return rows


def checked_figures() -> Iterator[dict[str, Any]]:
    """Every figure of the paper and of its ablations, counted anew: network, expected, got, ok."""
    for figure in FIGURES:
        got = figure.counted()
        settings = (f"{key}={value}" for key, value in figure.settings.items())
        network = " ".join((figure.model, *settings))
        yield {"network": network, "expected": figure.expected, "got": got, "ok": got == figure.expected}


def _cost(model: str, settings: Mapping[str, Any]) -> Cost:
    try:
        with torch.device("meta"):
            network = create_model(model, **settings)
    except ValueError as error:
        raise InputError(f"{model}: {error}") from None
    return model_cost(network, settings["image_size"])


def _numbers(cost: Cost | StageCost) -> dict[str, Any]:
    return {
        "params": cost.params,
        "gflops": round(cost.flops / 1e9, 3),
        "activation_mib": round(cost.activation_bytes / 2**20, 2),
    }
