"""The ResNet skeleton: where strides, pools and GSA modules sit, what starts at zero, which sizes run."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gsa_models.attention import GlobalSelfAttention
from gsa_models.resnet import Bottleneck, ResNet, drop_path_ramp, map_sides, stochastic_depth

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


def test_an_odd_map_is_halved_as_by_the_shortcut_and_its_border_is_the_mean_of_real_pixels() -> None:
    _, pool = blocks_of(small_net(("c", "g")))[1][0].spatial
    x = images(2, 11)
    y = pool(x)
    assert (
        y.shape[2:] == blocks_of(small_net())[1][0].shortcut(torch.randn(2, 32, 11, 11)).shape[2:] == (6, 6)
    )
    torch.testing.assert_close(y[:, :, :5, :5], pool(x[:, :, :10, :10]))
    torch.testing.assert_close(y[:, :, 5, 5], x[:, :, 10, 10])
    torch.testing.assert_close(y[:, :, 5, 0], x[:, :, 10, :2].mean(dim=2))
    torch.testing.assert_close(pool(torch.ones(1, 1, 7, 7)), torch.ones(1, 1, 4, 4))


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


@pytest.mark.parametrize("side", [16, 15])
def test_exports_with_a_dynamic_batch(side: int) -> None:
    net = small_net(("c", "g"), image_size=side, drop_path=0.5).eval()
    batch = {"x": {0: torch.export.Dim("batch", min=1, max=64)}}
    program = torch.export.export(net, (images(2, side),), dynamic_shapes=batch)
    for n in (1, 3):
        torch.testing.assert_close(program.module()(images(n, side)), net(images(n, side)))


# Stochastic depth.


def test_a_dropped_sample_is_zero_the_others_are_scaled_and_the_mean_is_the_branch() -> None:
    torch.manual_seed(0)
    branch = torch.randn(1, 3, 2, 2)
    draws = stochastic_depth(branch.expand(20_000, 3, 2, 2), 0.3)
    dropped = (draws == 0).flatten(1).all(dim=1)
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.02)
    torch.testing.assert_close(draws[~dropped], (branch / 0.7).expand(int((~dropped).sum()), 3, 2, 2))
    torch.testing.assert_close(draws.mean(dim=0), branch[0], rtol=0.03, atol=0)


def test_a_sample_without_its_branch_is_its_shortcut() -> None:
    block = blocks_of(small_net(("c", "cc"), drop_path=0.5))[1][1].train()
    nn.init.ones_(block.expand_norm.weight)
    x = torch.randn(64, 64, 8, 8).relu()
    with torch.random.fork_rng():
        y = block(x)
    dropped = (y == x).flatten(1).all(dim=1)
    assert 16 < int(dropped.sum()) < 48
    block.drop_path = 0.0
    branch = (block.expand_norm(block.expand(hidden(block, x))) * 2 + x).relu()
    torch.testing.assert_close(y[~dropped], branch[~dropped])


def hidden(block: Any, x: Tensor) -> Tensor:
    """What the last convolution of a bottleneck takes in."""
    y = nn.functional.relu(block.reduce_norm(block.reduce(x)))
    return nn.functional.relu(block.spatial_norm(block.spatial(y)))


def test_drop_path_rises_on_a_line_from_the_first_block_to_the_last() -> None:
    net = small_net(("c", "cg", "g", "g"), drop_path=0.4)
    rates = [block.drop_path for group in blocks_of(net) for block in group]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert drop_path_ramp(0.4, 1) == [0]


@pytest.mark.parametrize("drop_path", [-0.1, 1, float("nan")])
def test_a_drop_path_that_is_no_probability_below_1_is_refused(drop_path: float) -> None:
    with pytest.raises(ValueError, match=r"drop_path must be a probability from 0 to below 1, got"):
        small_net(drop_path=drop_path)


def test_drop_path_changes_neither_weights_nor_evaluation() -> None:
    plain, deep = small_net(), small_net(drop_path=0.5)
    assert plain.state_dict().keys() == deep.state_dict().keys()
    assert all(torch.equal(tensor, deep.state_dict()[name]) for name, tensor in plain.state_dict().items())
    assert torch.equal(plain.eval()(images(4, 16)), deep.eval()(images(4, 16)))
    assert [type(m) for m in plain.modules()] == [type(m) for m in deep.modules()]


def test_only_training_with_drop_path_draws_random_numbers() -> None:
    for net, draws in (
        (small_net().train(), False),
        (small_net(drop_path=0.5).eval(), False),
        (small_net(drop_path=0.5).train(), True),
    ):
        before = torch.get_rng_state()
        net(images(4, 16))
        assert torch.equal(torch.get_rng_state(), before) != draws


def test_the_same_seed_drops_the_same_samples() -> None:
    net, outputs = small_net(drop_path=0.5), []
    for seed in (1, 1, 2):
        for block in net.modules():
            if isinstance(block, Bottleneck):
                nn.init.ones_(block.expand_norm.weight)
        torch.manual_seed(seed)
        outputs.append(net(images(16, 16)))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


# Sizes.


def test_map_sides_are_those_of_the_paper() -> None:
    assert map_sides(224, stem="imagenet", placement=["g"] * 4) == [56, 56, 28, 14]
    assert map_sides(32, stem="small", placement=["g"] * 4) == [32, 32, 16, 8]
    assert map_sides(176, stem="imagenet", placement=["g"] * 4) == [44, 44, 22, 11]
    assert map_sides(225, stem="imagenet", placement=["g"] * 4) == [57, 57, 29, 15]
    assert map_sides(1, stem="small", placement=["g"]) == [1]


@pytest.mark.parametrize(
    ("letter", "stem", "sizes"),
    [
        ("c", "small", [*range(5, 34)]),
        ("c", "imagenet", [*range(17, 34)]),
        ("g", "small", [*range(5, 34)]),
        ("g", "imagenet", [*range(17, 34)]),
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
    ("side", "stem", "message"),
    [
        (
            16,
            "imagenet",
            r"image_size 16 is too small: the imagenet stem and 3 groups .* need 17 pixels or more",
        ),
        (4, "small", r"image_size 4 is too small: .* need 5 pixels or more"),
        (0, "small", r"image_size 0 is too small"),
        (32, "tiny", r"unknown stem 'tiny'; stems are imagenet, small"),
    ],
)
def test_a_size_that_cannot_be_halved_is_refused(side: int, stem: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        map_sides(side, stem=stem, placement=["g"] * 4)


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
