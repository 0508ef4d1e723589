"""A state_dict that does not fit is refused whole, in words that say what it is."""

from typing import Any

import pytest
import torch

from gsa_models import create_model
from gsa_models.layout import settings_of, shapes_of
from gsa_models.resnet import ResNet


def network(name: str = "gsa_resnet_tiny", **settings: Any) -> ResNet:
    with torch.device("meta"):
        return create_model(name, **{"image_size": 64, "num_classes": 10} | settings)


def test_a_state_dict_that_fits_is_loaded() -> None:
    torch.manual_seed(0)
    source, target = (create_model("gsa_resnet_tiny", image_size=32, num_classes=3) for _ in range(2))
    assert target.load_state_dict(source.state_dict()) == ([], [])
    assert all(torch.equal(t, source.state_dict()[name]) for name, t in target.state_dict().items())


RESIZE = r", or resize_positions\(state_dict, model\) for tables of the model's image_size$"


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        (
            {"placement": "ccgg"},
            {},
            r"state_dict is of placement='ccgg'; the model is of placement='gggg'; "
            r"next: create_model\(..., placement='ccgg'\)$",
        ),
        ({"name": "resnet_tiny"}, {}, r"is of placement='cccc'; the model is of placement='gggg'"),
        ({}, {"name": "resnet_tiny"}, r"is of placement='gggg'; the model is of placement='cccc'"),
        (
            {"name": "gsa_resnet26", "placement": "c/cg/cggg/g"},
            {"name": "gsa_resnet26"},
            r"is of placement='c/cg/cggg/g'; the model is of placement='gggg'",
        ),
        (
            {"placement": "cccc", "num_classes": 7, "stem": "small"},
            {},
            r"is of placement='cccc', stem='small', num_classes=7; the model is of placement='gggg', "
            r"stem='imagenet', num_classes=10; next: create_model\(..., placement='cccc', stem=",
        ),
        (
            {"num_classes": 100},
            {},
            r"is of num_classes=100; the model is of num_classes=10; next: create_model",
        ),
        ({"in_channels": 1}, {}, r"is of in_channels=1; the model is of in_channels=3"),
        ({"heads": 4}, {}, r"is of heads=4; the model is of heads=8"),
        (
            {"components": "row"},
            {},
            r"is of components='row'; the model is of components='content\+column\+row'",
        ),
        (
            {},
            {"components": "content"},
            r"is of components='content\+column\+row'; .* of components='content'",
        ),
        ({"components": "column+row"}, {}, r"is of components='column\+row'; the model is"),
        (
            {"image_size": 160},
            {"image_size": 224},
            r"is of image_size=160; the model is of image_size=224; next: create_model\(..., image_size=160\)"
            + RESIZE,
        ),
        (
            {"image_size": 176, "placement": "ccgg"},
            {"placement": "ccgg"},
            r"is of image_size=176; .*=64; next:",
        ),
        ({"image_size": 176, "num_classes": 7}, {}, r"image_size=176, num_classes=7; .*, num_classes=7\)$"),
        (
            {"window": 7},
            {},
            r"is of window=7; the model is of window=None; next: create_model\(..., window=7\)$",
        ),
        ({"window": 7}, {"window": 3}, r"is of window=7; the model is of window=3"),
        ({}, {"window": 3}, r"is of window=None; the model is of window=3"),
        (
            {"image_size": 96, "placement": "cccg"},
            {"placement": "cccg"},
            r"is of table_rows=11; the model is of table_rows=7; "
            r"next: a model of the image_size or window of the state_dict" + RESIZE,
        ),
        (
            {"image_size": 96, "placement": "cccg", "num_classes": 7},
            {"placement": "cccg"},
            r"next: create_model\(..., num_classes=7\), or a model of the image_size or window of the state_dict$",
        ),
        (
            {"name": "gsa_resnet26"},
            {"num_classes": 7},
            r"is of blocks=\(1, 2, 4, 1\), width=64; the model is of blocks=\(1, 1, 1, 1\), width=16; "
            r"next: create_model with the name of the network that it was saved from$",
        ),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named_with_the_next_move(
    theirs: dict[str, Any], ours: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        network(**ours).load_state_dict(network(**theirs).state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: {"model": s, "step": 3},
            r"^state_dict does not fit the model: 1\d\d missing \(stem.0.weight\); 2 un",
        ),
        (lambda s: {f"module.{k}": v for k, v in s.items()}, r"unexpected \(module.stem.0.weight\)$"),
        (lambda s: {}, r"missing \(stem.0.weight\)$"),
        (lambda s: {k: v for k, v in s.items() if k != "head.2.bias"}, r"model: 1 missing \(head.2.bias\)$"),
        (lambda s: s | {"ema": torch.zeros(1)}, r"model: 1 unexpected \(ema\)$"),
        (
            lambda s: s | {"head.2.bias": torch.zeros(4)},
            r"model: 1 of another shape \(head.2.bias: expected \(10,\), got \(4,\)\)$",
        ),
        (
            lambda s: s | {"stem.0.weight": 3},
            r"1 of another shape \(stem.0.weight: expected \(16, 3, 7, 7\), got \(\)",
        ),
    ],
)
def test_a_state_dict_of_something_else_is_refused(change: Any, message: str) -> None:
    model = network()
    with pytest.raises(ValueError, match=message):
        model.load_state_dict(change(model.state_dict()))


def test_nothing_is_half_loaded() -> None:
    model = create_model("gsa_resnet_tiny", image_size=32, num_classes=10)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for settings in ({"num_classes": 3}, {"placement": "gggc"}, {"image_size": 64}):
        other = create_model("gsa_resnet_tiny", **{"image_size": 32, "num_classes": 10} | settings)
        with pytest.raises(ValueError, match="next: "):
            model.load_state_dict(other.state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_load_that_is_not_strict_takes_what_is_there() -> None:
    model = create_model("gsa_resnet_tiny", image_size=32, num_classes=10)
    stem = {name: torch.ones_like(t) for name, t in model.state_dict().items() if name.startswith("stem")}
    model.load_state_dict(stem, strict=False)
    assert (model.stem[0].weight == 1).all()


@pytest.mark.parametrize("side", [33, 40, 64, 160, 176, 224])
@pytest.mark.parametrize("placement", ["gggg", "cggg", "gccg", "c/cg/cccc/g"])
@pytest.mark.parametrize("stem", ["small", "imagenet"])
def test_a_network_of_the_settings_that_are_told_takes_the_state_dict(
    side: int, placement: str, stem: str
) -> None:
    settings = {"placement": placement, "stem": stem, "components": "content+row", "heads": 4}
    state_dict = network("gsa_resnet26", image_size=side, **settings).state_dict()
    told = settings_of(shapes_of(state_dict))
    assert {key: told[key] for key in settings} == settings
    del told["blocks"], told["width"]
    network("gsa_resnet26", **told).load_state_dict(state_dict)
