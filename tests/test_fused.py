"""The operator behind the module: the same figures by every path, what it keeps, what PyTorch knows of it."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from measure import Case
from oracle import (
    assert_equals_reference,
    norm_of,
    output_and_gradients,
    random_input,
    random_module,
    relative_error,
)
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from gsa_models import axial_cpu, fused
from gsa_models.attention import GlobalSelfAttention

AXES = [("column", "row"), ("content", "column", "row"), ("content", "column"), ("row",)]


class OtherNorm(nn.BatchNorm2d):
    """Any norm but the plain one, such as SyncBatchNorm: the operator must not take it over."""


@pytest.fixture(params=["plain", "another norm", "image by image"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The ways through the module that the tests of test_attention.py do not take."""
    if request.param == "plain":
        monkeypatch.setattr(fused, "supports", lambda x: False)
    if request.param == "image by image":
        monkeypatch.setattr(axial_cpu, "BLOCK_BYTES", 1)
    return str(request.param)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("components", AXES, ids="+".join)
@pytest.mark.parametrize("heads", [1, 3])
def test_every_path_equals_the_definition(
    path: str, heads: int, components: tuple[str, ...], training: bool
) -> None:
    module = random_module(map_size=(5, 4), heads=heads, components=components)
    if path == "another norm" and module.mid_norm is not None:
        norm = OtherNorm(12).double()
        norm.load_state_dict(module.mid_norm.state_dict())
        module.mid_norm = norm
    assert_equals_reference(module.train(training), random_input(3, 12, 5, 4))


def test_paths_leave_the_same_running_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, plain = (random_module(map_size=(5, 4), heads=3) for _ in range(2))
    x = random_input(3, 12, 5, 4)
    for _ in range(3):
        ours(x)
    monkeypatch.setattr(fused, "supports", lambda x: False)
    for _ in range(3):
        plain(x)
    torch.testing.assert_close(ours.state_dict(), plain.state_dict(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "norm",
    [{"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"momentum": 0.5}],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_any_batch_norm_may_stand_in_the_middle(
    norm: dict[str, Any], training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`update_bn` of torch.optim.swa_utils, for one, takes away the momentum."""
    ours, plain = (random_module(map_size=(5, 4), heads=3) for _ in range(2))
    x, results = random_input(3, 12, 5, 4), []
    for module, supports in ((ours, fused.supports), (plain, lambda x: False)):
        monkeypatch.setattr(fused, "supports", supports)
        module.mid_norm = nn.BatchNorm2d(12, **norm).double()
        module.train()(x)
        results.append(output_and_gradients(module, x, module.train(training)))
    torch.testing.assert_close(*results)
    torch.testing.assert_close(ours.state_dict(), plain.state_dict())


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_no_images_give_no_output_and_gradients_of_zero(training: bool) -> None:
    module = random_module(map_size=(5, 4), heads=3).train(training)
    y, *gradients = output_and_gradients(module, torch.zeros(0, 12, 5, 4, dtype=torch.float64), module)
    assert y.shape == (0, 12, 5, 4)
    assert not any(gradient.any() for gradient in gradients)


def test_one_value_a_channel_is_refused_in_training_as_by_any_batch_norm() -> None:
    module = GlobalSelfAttention(8, map_size=(1, 1))
    with pytest.raises(ValueError, match="more than one pixel a channel to train on, got 1"):
        module(torch.randn(1, 8, 1, 1))
    module.eval()(torch.randn(1, 8, 1, 1))


def test_an_evaluation_can_be_differentiated_after_the_statistics_changed() -> None:
    """DDP copies buffers in place between two forward passes; what a backward pass needs must survive."""
    module = random_module(map_size=(4, 4), heads=3).eval()
    x = random_input(2, 12, 4, 4).requires_grad_()
    (expected,) = torch.autograd.grad(module(x).sum(), x)
    y = module(x).sum()
    running = norm_of(module).running_var
    assert running is not None
    running.mul_(2)
    (got,) = torch.autograd.grad(y, x)
    torch.testing.assert_close(got, expected)


# Derivatives that the operator does not have.


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch.func's own
def test_torch_func_goes_by_plain_pytorch() -> None:
    module, x, step = random_module(map_size=(4, 3), heads=3).eval(), *random_input(2, 2, 12, 4, 3)
    _, tangent = torch.func.jvp(module, (x,), (step,))
    (gradient,) = torch.func.vjp(module, x)[1](tangent)
    torch.testing.assert_close((gradient * step).sum(), tangent.square().sum())
    torch.testing.assert_close(tangent, (module(x + 1e-5 * step) - module(x - 1e-5 * step)) / 2e-5)
    torch.testing.assert_close(torch.func.vmap(lambda image: module(image[None])[0])(x), module(x))
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.unpack_dual(module(forward_ad.make_dual(x, step)))
    torch.testing.assert_close(dual.tangent, tangent)


def test_a_second_derivative_is_refused_and_torch_func_has_it() -> None:
    module, x = random_module(map_size=(2, 2), heads=3).eval(), random_input(1, 12, 2, 2).requires_grad_()
    (gradient,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"a first derivative alone; take second ones with torch\.func"):
        gradient.sum().backward()
    first = torch.func.grad(lambda x: module(x).square().sum())
    torch.testing.assert_close(first(x), gradient)
    by_step = (first(x.detach() + 1e-5) - first(x.detach() - 1e-5)) / 2e-5
    second = torch.func.grad(lambda x: first(x).sum())(x.detach())
    torch.testing.assert_close(second, by_step, rtol=1e-5, atol=1e-3)


# Memory.


def test_no_logits_are_kept() -> None:
    module, x = GlobalSelfAttention(16, map_size=(28, 28), heads=8), torch.randn(4, 16, 28, 28)
    statistics = 2 * 16 * 4
    assert (
        Case("", module, x, torch.float32).kept_bytes() == 5 * x.nbytes + statistics
    )  # x, q, k, v, the column output


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_output_has_the_memory_format_of_the_input(memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 16, 6, 5).contiguous(memory_format=memory_format).requires_grad_()
    module = GlobalSelfAttention(16, map_size=(6, 5)).to(memory_format=memory_format)
    y = module(x)
    assert y.is_contiguous(memory_format=memory_format)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    assert gradient.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_strides_are_those_of_a_fresh_image(memory_format: torch.memory_format, images: int) -> None:
    """Also of one image alone, where PyTorch's own checks of the memory format accept what its kernels do not."""
    projected = torch.randn(images, 18, 4, 3).contiguous(memory_format=memory_format)
    tables, vector = (torch.randn(7, 3), torch.randn(5, 3)), torch.ones(6)
    out, y, *_ = fused.attend(projected, *tables, vector, vector, None, None, 2, 1e-5)
    fresh = torch.empty(images, 6, 4, 3, memory_format=memory_format)
    column_alone = fused.attend(projected, tables[0], None, None, None, None, None, 2, 0.0)[0]
    assert out.stride() == y.stride() == column_alone.stride() == fresh.stride()


def test_gradients_do_not_depend_on_strides() -> None:
    """Where a map lies in memory by columns, its pixels cannot be viewed as one axis."""
    projected, row = random_input(2, 18, 4, 3), random_input(5, 3).requires_grad_()
    results = []
    for x in (projected, projected.mT.contiguous().mT):
        y = fused.attend(x.requires_grad_(), None, row, None, None, None, None, 2, 0.0)[0]
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, row])])
    torch.testing.assert_close(*results)


# What PyTorch has to know.


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("case", ["train", "eval", "bfloat16", "no content", "row", "column"])
def test_pytorch_accepts_the_operator(case: str, channels_last: bool) -> None:
    """Schema, shapes and strides without data, autograd, and the traced backward pass, all by `opcheck`."""
    heads, dim, height, width = 2, 6, 4, 3
    parts = 2 if case == "no content" else 3
    x = torch.randn(2, parts * dim, height, width)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    column, row = (torch.randn(2 * n - 1, dim // heads, requires_grad=True) for n in (height, width))
    weight, bias = torch.rand(dim, requires_grad=True), torch.rand(dim, requires_grad=True)
    statistics = (torch.rand(dim), torch.rand(dim)) if case in ("eval", "bfloat16") else (None, None)
    tensors: tuple[Any, ...] = (x, column, row, weight, bias, *statistics)
    if case == "bfloat16":
        tensors = tuple(t if t is None else t.detach().bfloat16().requires_grad_() for t in tensors)
    x, arguments = tensors[0], [*tensors[1:], heads, 1e-5]
    if case in ("row", "column"):
        tables = (None, row) if case == "row" else (column, None)
        arguments = [*tables, None, None, None, None, heads, 1e-5]
    opcheck(fused.attend, (x.requires_grad_(), *arguments))


@pytest.mark.parametrize("components", AXES, ids="+".join)
def test_flops_are_those_of_the_products_inside(components: tuple[str, ...]) -> None:
    module = random_module(map_size=(5, 4), heads=3, components=components)
    norm = module.mid_norm
    parameters = (module.column_table, module.row_table, norm and norm.weight, norm and norm.bias)
    projected, grad = module.qkv(random_input(2, 12, 5, 4)), random_input(2, 12, 5, 4)
    with torch.no_grad():
        _, *kept = fused.attend(projected, *parameters, None, None, 3, 1e-5)
    calls = {
        fused.attend: (projected, *parameters, None, None, 3, 1e-5),
        fused.attend_backward: (grad, projected, *parameters, *kept, 3, 1e-5, True),
    }
    for operator, arguments in calls.items():
        with torch.no_grad(), FlopCounterMode(display=False) as stated:
            operator(*arguments)
        # The function itself, whose products the counter sees; it lacks the one that works in place.
        in_place = {torch.ops.aten.baddbmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * a[2] * b[2]}
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=in_place) as counted:
            operator._init_fn(*arguments)
        assert stated.get_total_flops() == counted.get_total_flops() > 0


# Precision.


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0.03), (torch.float16, 0.005)], ids=str)
def test_autocast_gradients_are_close_to_float32(dtype: torch.dtype, limit: float) -> None:
    torch.manual_seed(0)
    module, x = GlobalSelfAttention(32, map_size=(14, 14)), torch.randn(8, 32, 14, 14).relu()
    parameters = list(module.parameters())

    def gradients(low: bool) -> list[Tensor]:
        with torch.autocast("cpu", dtype=dtype, enabled=low):
            y = module(x)
        assert y.dtype == (dtype if low else torch.float32)
        # A mean would leave gradients below the smallest float16.
        return list(torch.autograd.grad(y.float().square().sum() / 100, parameters))

    for low, full in zip(gradients(True), gradients(False), strict=True):
        assert low.dtype == full.dtype == torch.float32
        assert relative_error(low, full) < limit


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0.03), (torch.float16, 0.005)], ids=str)
def test_weights_of_low_precision_train(dtype: torch.dtype, limit: float, training: bool) -> None:
    torch.manual_seed(0)
    module, x = GlobalSelfAttention(32, map_size=(14, 14)).train(training), torch.randn(8, 32, 14, 14).relu()
    full = output_and_gradients(module, x, module)
    low = output_and_gradients(module.to(dtype), x.to(dtype), module)
    for got, expected in zip(low, full, strict=True):
        assert got.dtype == dtype
        assert relative_error(got.float(), expected) < limit


def test_statistics_are_summed_up_in_float32() -> None:
    projected, table = torch.randn(4, 16, 56, 56).bfloat16(), torch.randn(111, 8).bfloat16()
    weight, bias = torch.ones(8), torch.zeros(8)
    _, y, *got = fused.attend(projected, table, table, weight, bias, None, None, 1, 1e-5)
    assert y.dtype == torch.bfloat16
    expected = torch.var_mean(y.double(), dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(got, [t.float() for t in reversed(expected)], rtol=1e-4, atol=1e-4)
