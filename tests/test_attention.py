"""Global self-attention against its definition, against `gsa-pytorch`, and by its invariants."""

import itertools
from typing import Any

import pytest
import torch
from gsa_pytorch import GSA  # type: ignore[import-untyped]
from oracle import (
    assert_equals_reference,
    norm_of,
    output_and_gradients,
    random_input,
    random_module,
    relative_error,
)
from torch import Tensor, nn
from torch.func import functional_call

from gsa_models.attention import COMPONENTS, GlobalSelfAttention
from gsa_models.branches import relative_embeddings, softmax_in_float32

SUBSETS = [subset for n in (1, 2, 3) for subset in itertools.combinations(COMPONENTS, n)]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("components", SUBSETS, ids="+".join)
@pytest.mark.parametrize("map_size", [(5, 7), (6, 3), (1, 4), (5, 1), (1, 1)], ids=str)
def test_fast_path_equals_the_definition(
    map_size: tuple[int, int], components: tuple[str, ...], training: bool
) -> None:
    module = random_module(map_size=map_size, heads=3, components=components).train(training)
    assert_equals_reference(module, random_input(2, 12, *map_size))


@pytest.mark.parametrize("heads", [1, 2, 5, 10])
def test_fast_path_equals_the_definition_for_any_heads(heads: int) -> None:
    assert_equals_reference(random_module(10, map_size=(4, 6), heads=heads), random_input(3, 10, 4, 6))


@pytest.mark.parametrize("components", [s for s in SUBSETS if s != ("content",)], ids="+".join)
@pytest.mark.parametrize("window", [1, 3, 5, 9, 15])
def test_fast_path_equals_the_definition_in_a_window(window: int, components: tuple[str, ...]) -> None:
    module = random_module(map_size=(5, 7), heads=3, components=components, window=window)
    assert_equals_reference(module, random_input(2, 12, 5, 7))


@pytest.mark.parametrize("components", [s for s in SUBSETS if "content" in s], ids="+".join)
def test_fast_path_equals_the_definition_with_query_softmax(components: tuple[str, ...]) -> None:
    module = random_module(map_size=(4, 5), heads=2, components=components, query_softmax=True)
    assert_equals_reference(module, random_input(2, 12, 4, 5))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradients_equal_finite_differences(training: bool) -> None:
    module = random_module(4, map_size=(2, 3), heads=2).train(training)
    names = [name for name, _ in module.named_parameters()]
    # A fresh copy of the norm's statistics a call: finite differences need a pure function.
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        state = dict(zip(names, parameters, strict=True)) | {k: v.clone() for k, v in buffers.items()}
        y: Tensor = functional_call(module, state, x)
        return y

    parameters = [parameter.detach().clone().requires_grad_() for parameter in module.parameters()]
    assert torch.autograd.gradcheck(run, (random_input(2, 4, 2, 3).requires_grad_(), *parameters))


# gsa-pytorch 0.2.2. Its `rel_rows` feeds the column pass; its masks are float32, so this stays in float32.


class NormOfEveryChannel(nn.Module):
    """A norm of all N * D channels, where gsa-pytorch has one of the D channels of a head for all heads."""

    def __init__(self, norm: nn.BatchNorm2d, heads: int) -> None:
        super().__init__()
        self.norm, self.heads = norm, heads

    def forward(self, y: Tensor) -> Tensor:  # (B * N, D, H, W)
        joined = y.reshape(-1, self.heads * y.shape[1], *y.shape[2:])
        normed: Tensor = self.norm(joined)
        return normed.reshape(y.shape)


def public_twin(module: GlobalSelfAttention) -> GSA:
    """The gsa-pytorch module with the weights of ours, its output projection being the identity."""
    dim, heads = module.dim, module.heads
    twin = GSA(dim, rel_pos_length=module.map_size[0], heads=heads, dim_key=dim // heads)
    with torch.no_grad():
        twin.to_qkv.weight.copy_(module.qkv.weight)
        twin.to_out.weight.copy_(torch.eye(dim)[:, :, None, None])
        twin.to_out.bias.zero_()
        twin.rel_rows.copy_(module.column_table)
        twin.rel_columns.copy_(module.row_table)
    return twin


@pytest.mark.parametrize("query_softmax", [False, True], ids=["plain", "query_softmax"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("heads", [1, 4])
def test_equals_the_public_module_but_for_its_norm(heads: int, training: bool, query_softmax: bool) -> None:
    ours = (
        random_module(16, map_size=(6, 6), heads=heads, query_softmax=query_softmax).float().train(training)
    )
    theirs = public_twin(ours).train(training)
    theirs.norm_queries = query_softmax
    norm = nn.BatchNorm2d(16).train(training)
    norm.load_state_dict(norm_of(ours).state_dict())
    theirs.norm = NormOfEveryChannel(norm, heads)
    x = random_input(3, 16, 6, 6).float()
    assert relative_error(ours(x), theirs(x)) < 1e-5


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_equals_the_public_module_with_one_head(training: bool) -> None:
    ours = random_module(8, map_size=(5, 5), heads=1).float().train(training)
    theirs = public_twin(ours).train(training)
    theirs.norm.load_state_dict(norm_of(ours).state_dict())
    x = random_input(3, 8, 5, 5).float()
    assert relative_error(ours(x), theirs(x)) < 1e-5


def test_equals_the_public_module_in_eval_when_heads_share_statistics() -> None:
    ours = random_module(16, map_size=(5, 5), heads=4).float().eval()
    theirs = public_twin(ours).eval()
    with torch.no_grad():
        for name, tensor in theirs.norm.state_dict().items():
            if tensor.dim():
                tensor.copy_(norm_of(ours).state_dict()[name][:4])
                norm_of(ours).state_dict()[name].copy_(tensor.repeat(4))
    x = random_input(3, 16, 5, 5).float()
    assert relative_error(ours(x), theirs(x)) < 1e-5


# Invariants.


def test_content_attention_does_not_care_where_pixels_are() -> None:
    module = random_module(map_size=(3, 4), heads=2, components=("content",))
    x, order = random_input(2, 12, 3, 4), torch.randperm(12, generator=torch.Generator().manual_seed(3))
    shuffled = x.flatten(2)[..., order].view_as(x)
    torch.testing.assert_close(module(shuffled).flatten(2), module(x).flatten(2)[..., order])


def test_axial_attention_moves_with_its_input() -> None:
    module = random_module(map_size=(6, 7), heads=2, components=("column", "row")).eval()
    norm = norm_of(module)
    norm.load_state_dict(norm.state_dict() | {name: torch.zeros(12) for name in ("running_mean", "bias")})
    x = torch.zeros(1, 12, 6, 7, dtype=torch.float64)
    x[..., :3, :4] = random_input(1, 12, 3, 4)
    moved = module(x.roll((2, 3), dims=(2, 3)))
    torch.testing.assert_close(moved[..., 2:5, 3:], module(x)[..., :3, :4])


def test_every_pixel_sees_every_pixel_and_a_window_cuts_that() -> None:
    x = random_input(1, 12, 5, 5).requires_grad_()
    for window, reach in ((None, 5), (3, 2)):
        module = random_module(map_size=(5, 5), heads=2, components=("column", "row"), window=window).eval()
        (gradient,) = torch.autograd.grad(module(x)[0, :, 0, 0].sum(), x)
        seen = gradient[0].abs().sum(0) > 0
        assert seen[:reach, :reach].all()
        assert not seen[reach:].any()
        assert not seen[:, reach:].any()


def test_a_table_is_read_by_key_minus_query() -> None:
    table = torch.arange(-3.0, 4.0)[:, None]  # row i - x + 3 holds i - x
    expected = torch.arange(4.0)[None, :] - torch.arange(4.0)[:, None]  # (X, I)
    assert torch.equal(relative_embeddings(table, 4)[:, 0], expected)


def test_parts_that_components_leave_out_are_not_built() -> None:
    module = GlobalSelfAttention(16, map_size=(4, 6), components=("row",))
    assert [name for name, _ in module.named_parameters()] == ["row_table", "qkv.weight"]


def test_a_table_has_a_row_for_every_offset_of_its_axis_or_of_the_window() -> None:
    whole = GlobalSelfAttention(16, map_size=(4, 6)).state_dict()
    assert (whole["column_table"].shape, whole["row_table"].shape) == ((7, 2), (11, 2))
    window = GlobalSelfAttention(16, map_size=(4, 6), window=31).state_dict()
    assert (window["column_table"].shape, window["row_table"].shape) == ((31, 2), (31, 2))


def test_memory_layout_does_not_change_the_result() -> None:
    module, x = random_module(map_size=(5, 6), heads=3), random_input(2, 12, 5, 6)
    torch.testing.assert_close(module(x.to(memory_format=torch.channels_last)), module(x))


# Initial values.


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(("dim", "side"), [(64, 28), (128, 14), (256, 7)])
def test_both_branches_start_at_the_same_scale(dim: int, side: int, window: int | None) -> None:
    torch.manual_seed(0)
    full = GlobalSelfAttention(dim, map_size=(side, side), window=window)
    content = GlobalSelfAttention(dim, map_size=(side, side), components=("content",))
    content.load_state_dict({k: v for k, v in full.state_dict().items() if "weight" in k and "mid" not in k})
    x = torch.randn(4, dim, side, side).relu()  # what the norm and ReLU before the module give at the start
    position = full(x) - content(x)
    ratio = position.square().mean().sqrt() / content(x).square().mean().sqrt()
    assert 0.5 < ratio < 2


def test_reset_parameters_draws_every_parameter_anew() -> None:
    module = GlobalSelfAttention(16, map_size=(4, 4))
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    nn.init.constant_(norm_of(module).weight, 3.0)
    module.reset_parameters()
    same = {name for name, parameter in module.named_parameters() if torch.equal(parameter, before[name])}
    assert same == {"mid_norm.weight", "mid_norm.bias"}  # back at 1 and 0


# Precision, export, compilation.


def test_softmax_is_float32_at_least() -> None:
    for given, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        assert softmax_in_float32(torch.randn(2, 3136).to(given), dim=-1).dtype == expected


def test_bfloat16_autocast_is_close_to_float32() -> None:
    torch.manual_seed(0)
    module, x = GlobalSelfAttention(32, map_size=(14, 14)), torch.randn(4, 32, 14, 14).relu()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = module(x)
    assert low.dtype == torch.bfloat16
    gradients = torch.autograd.grad(low.float().square().mean(), list(module.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert relative_error(low.float(), module(x)) < 0.02


def test_exports_with_a_dynamic_batch() -> None:
    module = GlobalSelfAttention(16, map_size=(4, 6)).eval()
    batch = {"x": {0: torch.export.Dim("batch", min=1, max=64)}}
    program = torch.export.export(module, (torch.randn(2, 16, 4, 6),), dynamic_shapes=batch)
    for n in (1, 5):
        x = torch.randn(n, 16, 4, 6)
        torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor's own imports
def test_compiles_as_one_graph_with_the_same_gradients() -> None:
    module = random_module(map_size=(4, 6), heads=3)
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for n in (2, 5):
        x = random_input(n, 12, 4, 6)
        expected = output_and_gradients(module, x, module)
        got = output_and_gradients(module, x, compiled)
        for e, g in zip(expected, got, strict=True):
            torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-9)


# Errors.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 5}, r"dim 12 is not divisible by 5 heads; heads of 1, 2, 3, 4, 6, 12 would be right"),
        ({"heads": 0}, r"dim 12 is not divisible by 0 heads"),
        ({"dim": 0}, r"dim must be at least 1 channel, got 0"),
        ({"map_size": (0, 4)}, r"map_size must be .* at least 1 pixel each, got \(0, 4\)"),
        ({"components": ()}, r"one or more of content, column, row; got \(\)"),
        ({"components": "row"}, r"must be a tuple .*; got 'row'"),
        ({"components": ("rows",)}, r"component 'rows' is unknown; did you mean row\?"),
        ({"components": ("xyz",)}, r"component 'xyz' is unknown; \(components: content, column, row\)"),
        ({"components": ("row", "row")}, r"components row\+row name one twice"),
        ({"window": 4}, r"odd number of pixels, got 4; 3 or 5 would be right"),
        ({"window": 0}, r"odd number of pixels, got 0; 1 or 3 would be right"),
        (
            {"window": 3, "components": ("content",)},
            r"window 3 needs column or row attention, but .* content;",
        ),
        (
            {"query_softmax": True, "components": ("row",)},
            r"query_softmax needs content .* components are row;",
        ),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    arguments = {"dim": 12, "map_size": (4, 4), "heads": 4, **settings}
    with pytest.raises(ValueError, match=message):
        GlobalSelfAttention(**arguments)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(
    "shape", [(2, 12, 5, 4), (2, 12, 4, 3), (2, 12, 8, 8), (2, 6, 4, 4), (12, 4, 4)], ids=str
)
def test_an_input_of_another_size_is_refused(shape: tuple[int, ...], window: int | None) -> None:
    module = GlobalSelfAttention(12, map_size=(4, 4), heads=4, window=window)
    with pytest.raises(
        ValueError, match=r"expected an input of \(batch, 12, 4, 4\), got .*; its tables serve"
    ):
        module(torch.zeros(shape))
