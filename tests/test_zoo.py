"""The names, and the grammar of placements and components."""

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from gsa_models import GlobalSelfAttention, create_model, list_models, parse_components, parse_placement
from gsa_models.resnet import Bottleneck, ResNet
from gsa_models.zoo import ARCHITECTURES

RESNET50 = (3, 4, 6, 3)


def meta_model(name: str, **settings: Any) -> ResNet:
    with torch.device("meta"):
        return create_model(name, **settings)


def placement_of(net: ResNet) -> str:
    """The placement in block letters, read off the modules."""

    def letter(block: Bottleneck) -> str:
        return "g" if any(isinstance(m, GlobalSelfAttention) for m in block.modules()) else "c"

    groups = ([m for m in group.modules() if isinstance(m, Bottleneck)] for group in net.groups)
    return "/".join("".join(letter(block) for block in blocks) for blocks in groups)


def test_the_models_are_these() -> None:
    depths = ("26", "38", "50", "101", "_tiny")
    assert list_models() == [f"{family}{d}" for family in ("gsa_resnet", "resnet") for d in depths]


@pytest.mark.parametrize("name", list_models())
def test_every_model_builds_without_weights_and_has_its_default_placement(name: str) -> None:
    net = meta_model(name, num_classes=7)
    assert all(parameter.is_meta for parameter in net.parameters())
    assert net(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 7)
    assert parse_placement(placement_of(net), ARCHITECTURES[name].blocks) == (
        "gggg" if name.startswith("gsa") else "cccc"
    )


@pytest.mark.parametrize("name", ["gsa_resnet_tiny", "resnet_tiny", "gsa_resnet26"])
def test_a_model_trains_a_step(name: str) -> None:
    net = create_model(name, num_classes=5, image_size=32, stem="imagenet")
    loss = nn.functional.cross_entropy(net(torch.randn(2, 3, 32, 32)), torch.tensor([0, 4]))
    gradients = torch.autograd.grad(loss, list(net.parameters()))
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_settings_reach_the_network() -> None:
    net = meta_model(
        "gsa_resnet_tiny",
        num_classes=3,
        image_size=32,
        stem="small",
        in_channels=1,
        placement="cccg",
        components="row+content",
        window=3,
        heads=4,
        query_softmax=True,
        drop_path=0.3,
    )
    assert net.groups[3][0].drop_path == 0.3
    (gsa,) = (m for m in net.modules() if isinstance(m, GlobalSelfAttention))
    assert (gsa.map_size, gsa.heads, gsa.window) == ((8, 8), 4, 3)
    assert (gsa.components, gsa.query_softmax) == (("content", "row"), True)
    assert net(torch.empty(2, 1, 32, 32, device="meta")).shape == (2, 3)


def test_a_gsa_name_without_gsa_is_the_convolutional_network() -> None:
    def shapes(net: ResNet) -> dict[str, torch.Size]:
        return {name: tensor.shape for name, tensor in net.state_dict().items()}

    assert shapes(meta_model("gsa_resnet50", placement="none")) == shapes(meta_model("resnet50"))
    assert shapes(meta_model("gsa_resnet50")) == shapes(meta_model("resnet50", placement="all"))


def test_a_network_without_gsa_warns_of_settings_that_it_cannot_use() -> None:
    with pytest.warns(
        UserWarning, match=r"resnet_tiny has no GSA block here: components=row, window=7 changes"
    ):
        meta_model("resnet_tiny", components="row", window=7)
    with pytest.warns(UserWarning, match=r"query_softmax changes nothing"):
        meta_model("gsa_resnet_tiny", placement="none", query_softmax=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"name": "gsa_resnet5"},
            r"model 'gsa_resnet5' is unknown; did you mean gsa_resnet50\? \(models: gsa_",
        ),
        ({"name": "vit"}, r"model 'vit' is unknown; \(models: gsa_resnet26, .*, resnet_tiny\)"),
        ({"image_size": 16}, r"image_size 16 is too small: .* need 17 pixels or more"),
        ({"stem": "large"}, r"unknown stem 'large'"),
        ({"heads": 3}, r"dim 16 is not divisible by 3 heads; heads of 1, 2, 4, 8, 16 would be right"),
        ({"window": 2}, r"window must be an odd number of pixels, got 2"),
        ({"placement": "cgc"}, r"placement 'cgc': got 3 letters, expected 4"),
        ({"components": "content+rows"}, r"component 'rows' is unknown; did you mean row\?"),
        ({"drop_path": 1.0}, r"drop_path must be a probability from 0 to below 1, got 1.0"),
        ({"num_classes": 0}, r"num_classes 0 and in_channels 3 must be at least 1"),
    ],
    ids=str,
)
def test_a_network_that_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        meta_model(**({"name": "gsa_resnet_tiny"} | settings))


# Placements.


@pytest.mark.parametrize(
    ("text", "canonical", "expanded"),
    [
        ("all", "gggg", "ggg/gggg/gggggg/ggg"),
        ("none", "cccc", "ccc/cccc/cccccc/ccc"),
        ("last:0", "cccc", "ccc/cccc/cccccc/ccc"),
        ("last:2", "ccgg", "ccc/cccc/gggggg/ggg"),
        ("last:4", "gggg", "ggg/gggg/gggggg/ggg"),
        ("cggg", "cggg", "ccc/gggg/gggggg/ggg"),
        ("ccc/gggg/gggggg/ggg", "cggg", "ccc/gggg/gggggg/ggg"),
        ("ccc/cggg/gggggg/ggg", "ccc/cggg/gggggg/ggg", "ccc/cggg/gggggg/ggg"),
    ],
)
def test_a_placement_has_one_shortest_form(text: str, canonical: str, expanded: str) -> None:
    assert parse_placement(text, RESNET50) == canonical
    assert placement_of(meta_model("resnet50", placement=text)) == expanded


def test_equal_placements_and_only_they_give_equal_strings() -> None:
    blocks = (1, 2, 1, 2)
    canonical = set()
    for letters in itertools.product("cg", repeat=sum(blocks)):
        row = iter(letters)
        text = "/".join("".join(itertools.islice(row, count)) for count in blocks)
        short = parse_placement(text, blocks)
        assert parse_placement(short, blocks) == short
        canonical.add(short)
    assert len(canonical) == 2 ** sum(blocks)
    assert sum("/" not in text for text in canonical) == 2 ** len(blocks)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "",
            r"placement '': got 0 letters, expected 4; for example gggg, ggg/gggg/gggggg/ggg, all, none or",
        ),
        ("ggg", r"got 3 letters, expected 4"),
        ("cgxg", r"placement 'cgxg', group 3: got 'x', expected c \(convolution\) or g \(GSA\); for example"),
        ("CGGG", r"group 1: got 'C', expected c"),
        ("ccc/gggg/ggg", r"got 3 groups between slashes, expected 4"),
        ("ccc/cgg/gggggg/ggg", r"group 2: got 3 letters, expected 4"),
        ("ccc/cgyg/gggggg/ggg", r"group 2, block 3: got 'y'"),
        ("ccc//gggggg/ggg", r"group 2: got 0 letters, expected 4"),
        ("last:5", r"placement 'last:5': expected last:0 to last:4, got '5' after the colon"),
        ("last:", r"got '' after the colon"),
        ("last:-1", r"got '-1' after the colon"),
    ],
)
def test_a_placement_that_does_not_fit_is_refused_with_its_position(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_placement(text, RESNET50)


# Components.


def test_components_have_one_order() -> None:
    for names in itertools.permutations(("content", "column", "row")):
        assert parse_components("+".join(names)) == "content+column+row"
    assert parse_components("row+content") == "content+row"
    assert parse_components("row") == "row"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"component '' is unknown; \(components: content, column, row\)"),
        ("content+", r"component '' is unknown"),
        ("columns", r"component 'columns' is unknown; did you mean column\?"),
        ("content, row", r"component 'content, row' is unknown"),
        ("row+row", r"components row\+row name one twice; name each once"),
    ],
)
def test_components_that_cannot_be_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_components(text)
