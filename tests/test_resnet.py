"""The ResNet skeleton: where strides, pools and GSA modules sit, what starts at zero, which sizes run."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gsa_models.attention import GlobalSelfAttention
from gsa_models.resnet import Bottleneck, ResNet, map_sides

SMALL: dict[str, Any] = {"width": 8, "image_size": 16, "num_classes": 5, "stem": "small", "heads": 2}


def small_net(placement: tuple[str, ...] = ("c", "cg", "g", "g"), **settings: Any) -> ResNet:
    torch.manual_seed(0)
    blocks = [len(letters) for letters in placement]
    return ResNet(blocks, placement=placement, **(SMALL | settings))


def blocks_of(net: ResNet) -> list[list[Any]]:
    """The bottlenecks of each group."""
    return [[m for m in group.modules() if isinstance(m, Bottleneck)] for group in net.groups]


def images(n: int, side: int, channels: int = 3) -> Tensor:
    return torch.randn(n, channels, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("placement", [("c", "cc", "c", "c"), ("g", "gg", "g", "g"), ("g", "cg", "c", "g")])
@pytest.mark.parametrize("stem", ["small", "imagenet"])
def test_gradients_reach_every_parameter(placement: tuple[str, ...], stem: str) -> None:
    net = small_net(placement, stem=stem, image_size=64 if stem == "imagenet" else 16)
    for block in net.modules():
        if isinstance(block, Bottleneck):
            nn.init.ones_(block.expand_norm.weight)  # zero at the start, when it lets no gradient through
    logits = net(images(4, 64 if stem == "imagenet" else 16))
    assert logits.shape == (4, 5)
    names, parameters = zip(*net.named_parameters(), strict=True)
    gradients = torch.autograd.grad(nn.functional.cross_entropy(logits, torch.arange(4)), parameters)
    silent = [name for name, gradient in zip(names, gradients, strict=True) if not gradient.any()]
    assert silent == []


def test_placement_letters_decide_what_each_block_is() -> None:
    net = small_net(("cg", "gc", "g", "c"))
    letters = [
        "".join(
            "g" if any(isinstance(m, GlobalSelfAttention) for m in block.modules()) else "c"
            for block in group
        )
        for group in blocks_of(net)
    ]
    assert letters == ["cg", "gc", "g", "c"]


def test_gsa_runs_on_the_larger_map_and_only_then_the_map_is_halved() -> None:
    net = small_net(("g", "gg", "g", "c"))
    sizes = [
        [m.map_size for m in group.modules() if isinstance(m, GlobalSelfAttention)] for group in net.groups
    ]
    assert sizes == [[(16, 16)], [(16, 16), (8, 8)], [(8, 8)], []]
    gsa, pool = blocks_of(net)[1][0].spatial
    x = torch.randn(2, 16, 16, 16)
    expected = gsa(x).unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(4, 5))  # the mean of each 2x2 square
    torch.testing.assert_close(pool(gsa(x)), expected)


def test_the_3x3_convolution_has_the_stride() -> None:
    first = blocks_of(small_net(("c", "c", "c", "c")))[1][0]
    assert first.reduce.stride == (1, 1)
    assert first.spatial.stride == (2, 2)
    assert first.spatial.kernel_size == (3, 3)
    assert first.shortcut[0].stride == (2, 2)
    assert first.shortcut[0].kernel_size == (1, 1)


def test_a_fresh_block_is_its_shortcut() -> None:
    x = torch.randn(2, 32, 16, 16).relu()
    block = blocks_of(small_net(("gg", "c", "c", "c")))[0][1]
    torch.testing.assert_close(block(x), x)


def test_both_kinds_differ_in_nothing_but_the_spatial_layers() -> None:
    def outside(net: ResNet) -> dict[str, torch.Size]:
        return {name: p.shape for name, p in net.state_dict().items() if ".spatial." not in name}

    assert outside(small_net(("c", "cc", "c", "c"))) == outside(small_net(("g", "gg", "g", "g")))


def test_settings_reach_the_modules() -> None:
    net = small_net(
        ("g", "c", "c", "c"), components=("row", "content"), window=3, query_softmax=True, heads=4
    )
    (gsa,) = (m for m in net.modules() if isinstance(m, GlobalSelfAttention))
    assert (gsa.components, gsa.window, gsa.query_softmax, gsa.heads) == (("content", "row"), 3, True, 4)


def test_in_channels_and_width_are_respected() -> None:
    net = small_net(in_channels=1, width=16)
    assert net(images(2, 16, channels=1)).shape == (2, 5)
    assert net.stem[0].weight.shape == (16, 1, 3, 3)


def test_a_small_gsa_network_learns_eight_images_by_heart() -> None:
    net = small_net(("g", "g", "g", "g"), num_classes=8, image_size=8)
    x, y = images(8, 8), torch.arange(8)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for _ in range(10):
        loss = nn.functional.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert loss.item() < 0.1


def test_exports_with_a_dynamic_batch() -> None:
    net = small_net(("c", "g")).eval()
    batch = {"x": {0: torch.export.Dim("batch", min=1, max=64)}}
    program = torch.export.export(net, (images(2, 16),), dynamic_shapes=batch)
    for n in (1, 3):
        torch.testing.assert_close(program.module()(images(n, 16)), net(images(n, 16)))


# Sizes.


def test_map_sides_are_those_of_the_paper() -> None:
    assert map_sides(224, stem="imagenet", placement=["g"] * 4) == [56, 56, 28, 14]
    assert map_sides(32, stem="small", placement=["g"] * 4) == [32, 32, 16, 8]


@pytest.mark.parametrize(
    ("letter", "stem", "sizes"),
    [
        ("c", "small", [*range(5, 34)]),
        ("c", "imagenet", [*range(17, 34)]),
        ("g", "small", [8, 16, 24, 32]),
        ("g", "imagenet", [29, 30, 31, 32]),
    ],
)
def test_accepted_sizes_run_and_the_others_are_refused_at_the_door(
    letter: str, stem: str, sizes: list[int]
) -> None:
    accepted = []
    for side in range(1, 34):
        with torch.device("meta"):
            try:
                net = small_net((letter, letter, letter, letter), image_size=side, stem=stem)
            except ValueError:
                continue
            assert net(torch.empty(2, 3, side, side)).shape == (2, 5)
            accepted.append(side)
    assert accepted == sizes


@pytest.mark.parametrize(
    ("side", "stem", "placement", "message"),
    [
        (176, "imagenet", "cccg", r"group 4 a map of 11x11 .* even side.*; image_size 160 or 192 would do"),
        (225, "imagenet", "gggg", r"group 2 a map of 57x57 .* even side.*; image_size 224 or 256 would do"),
        (20, "small", "cccg", r"group 4 a map of 5x5 .* even side.*; image_size 16 or 24 would do"),
        (16, "imagenet", "cccc", r"group 4 a map of 1x1 .* at least 2 pixels; image_size 32 would do"),
        (4, "small", "gggg", r"group 4 a map of 1x1 .*; image_size 8 would do"),
        (0, "small", "cccc", r"group 2 a map of 0x0 .*; image_size 8 would do"),
        (32, "tiny", "cccc", r"unknown stem 'tiny'; stems are imagenet, small"),
    ],
)
def test_a_size_that_cannot_be_halved_is_refused(side: int, stem: str, placement: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        map_sides(side, stem=stem, placement=list(placement))


def test_a_convolutional_network_takes_other_sizes_and_a_gsa_network_says_why_not() -> None:
    assert small_net(("c", "c", "c", "c"))(images(2, 24)).shape == (2, 5)
    with pytest.raises(ValueError, match=r"expected an input of \(batch, 8, 16, 16\), got \(2, 8, 24, 24\)"):
        small_net(("g", "c", "c", "c"))(images(2, 24))


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        (("c", "c", "c"), r"placement 'c/c/c' does not fit groups of \[1, 1, 1, 1\] blocks"),
        (("c", "cc", "c", "c"), r"placement 'c/cc/c/c' does not fit"),
        (("c", "c", "x", "c"), r"placement 'c/c/x/c' has 'x'; expected c \(convolution\) or g \(GSA\)"),
    ],
)
def test_a_placement_that_does_not_fit_is_refused(placement: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResNet([1, 1, 1, 1], placement=placement)
