"""Everything behind the projection as one operator, `gsa::attend`, that keeps no logits for the backward pass.

Kept are its input, the column output and that output's statistics; softmax, context, normed column output
and logits are made again. The branches are summed where the last of them is made. A CPU goes through blocks of
images, a CUDA device has Triton kernels.

Letters: B batch   N heads   D, E channels a head   C = N*D   H, W map   P = H*W pixels
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from gsa_models import axial_cpu, content_cpu

_HAS_TRITON = find_spec("triton") is not None  # here, where torch.compile does not trace it


def supports(q: Tensor) -> bool:
    """Whether the operator can take queries (B, N, D, H, W): their device has a pass for such lines.

    Never where a graph is exported: that holds PyTorch's own operators alone, to be read without this package.
    Never below torch.func or forward-mode AD: of an operator they make an error, or a tangent of zeros.
    Nor can it take no images: the native batch norm that it uses divides by their number.
    """
    if torch.compiler.is_exporting() or q.numel() == 0:
        return False
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    if q.device.type == "cuda":
        return _HAS_TRITON and q.dtype != torch.float64 and all(_kernels(q)[0].fits(t) for t in (q, q.mT))
    return q.device.type in ("cpu", "meta")


def axial_attention(q: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """`branches.axial_attention` through the operator; q, v and the result: (B, N, D, R, X)."""
    heads = q.shape[1]
    projected = torch.cat([q.flatten(1, 2), v.flatten(1, 2)], dim=1)
    out: Tensor = attend(projected, None, table, None, None, None, None, heads, 0.0)[0]
    return torch.unflatten(out, 1, (heads, -1))


@torch.library.custom_op("gsa::attend", mutates_args=())
def attend(
    projected: Tensor,
    column: Tensor | None,
    row: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    heads: int,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum the positional branch and, where there is a key, the content branch.

    projected: (B, 3C, H, W), query, key and value; or (B, 2C, H, W), query and value.
    column, row: tables (offsets, D), at least one of them.
    weight, bias: of the batch norm between column and row, (C,) each; None with one axis alone.
    mean, variance: its running statistics, (C,) each; None to take those of the batch.

    Returns the output (B, C, H, W); and, empty with one axis alone, the column output (B, C, H, W) and the
    mean and biased variance (C,) that it was normed by.
    """
    q, k, v = _split(projected, heads, column if row is None else row)
    axial, content = _kernels(projected)
    context = None if k is None else content.content_forward(k, v)[0]
    if weight is None:
        turned, table = (True, column) if row is None else (False, row)
        out = axial.axial_forward(_turn(q, turned), _turn(v, turned), table, context=context)
        nothing = projected.new_empty(0), projected.new_empty(0), projected.new_empty(0)
        return _image(_turn(out, turned)), *nothing
    y = _image(axial.axial_forward(q.mT, v.mT, column).mT)  # (B, C, H, W)
    if mean is None or variance is None:
        mean, variance = _batch_statistics(y)
    else:
        # In float32 at least, whatever the norm's; copies, for an operator may not return what it was given.
        exact = torch.promote_types(y.dtype, torch.float32)
        mean, variance = mean.to(exact, copy=True), variance.to(exact, copy=True)
    affine = _affine(weight, bias, mean, variance, epsilon)
    y_heads = torch.unflatten(y, 1, (heads, -1))
    out = _image(axial.axial_forward(q, y_heads, row, affine=affine, context=context))
    return out, y, mean, variance


@torch.library.custom_op("gsa::attend_backward", mutates_args=())
def attend_backward(
    grad: Tensor,
    projected: Tensor,
    column: Tensor | None,
    row: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    mean: Tensor,
    variance: Tensor,
    heads: int,
    epsilon: float,
    batch_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of projected, column, row, weight and bias; empty for those that are None."""
    q, k, v = _split(projected, heads, column if row is None else row)
    g = torch.unflatten(grad, 1, (heads, -1))
    axial, content = _kernels(projected)
    context, weights = (None, None) if k is None else content.content_forward(k, v)
    d_projected = torch.empty_like(projected)
    dq, dk, dv = _split(d_projected, heads, column if row is None else row)
    d_column, d_row, d_weight, d_bias = (projected.new_empty(0) for _ in range(4))
    if weight is None:
        turned, table = (True, column) if row is None else (False, row)
        d_table, d_context = axial.axial_backward(
            *(_turn(t, turned) for t in (g, q, v)),
            table,
            dq=_turn(dq, turned),
            dv=_turn(dv, turned),
            context=context,
        )
        d_column, d_row = (d_table, d_row) if turned else (d_column, d_table)
    else:
        affine = _affine(weight, bias, mean, variance, epsilon)
        y_heads = torch.unflatten(y, 1, (heads, -1))
        d_normed = torch.empty_like(y_heads)
        d_row, d_context = axial.axial_backward(
            g, q, y_heads, row, dq=dq, dv=d_normed, affine=affine, context=context
        )
        dy, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
            d_normed.flatten(1, 2), y, weight.to(mean.dtype), mean, variance, mean, (variance + epsilon).rsqrt(),
            batch_statistics, epsilon, [True, True, True],
        )  # fmt: skip
        d_weight, d_bias = d_weight.to(weight.dtype), d_bias.to(weight.dtype)
        dy = torch.unflatten(dy, 1, (heads, -1))
        d_column, _ = axial.axial_backward(dy.mT, q.mT, v.mT, column, dq=dq.mT, dv=dv.mT, add=True)
    if k is not None:
        content.content_backward(d_context, k, v, context, weights, dk=dk, dv=dv)
    return d_projected, d_column, d_row, d_weight, d_bias


def _kernels(x: Tensor) -> tuple[Any, Any]:
    """The modules for x's device: one with `axial_forward` and `axial_backward`, one with `content_...`."""
    if x.device.type == "cuda":
        from gsa_models import axial_triton, content_triton  # only now: triton is not everywhere

        return axial_triton, content_triton
    return axial_cpu, content_cpu


def _split(projected: Tensor, heads: int, table: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """Query, key or None, and value, (B, N, D, H, W) each."""
    assert table is not None, "a positional branch has a table"
    parts = torch.unflatten(projected, 1, (-1, heads, table.shape[1])).unbind(1)
    return parts[0], parts[1] if len(parts) == 3 else None, parts[-1]


def _image(x: Tensor) -> Tensor:
    """(B, N, D, H, W) -> (B, C, H, W), a view."""
    x = x.flatten(1, 2)
    if len(x) > 1:
        return x
    # What is like a chunk has any stride from image to image if there is but one image; by that stride CUDA's
    # batch norm takes channels_last for NCHW, and puts gradients in the wrong places.
    return x.as_strided(x.shape, (x.numel(), *x.stride()[1:]))


def _turn(x: Tensor, turned: bool) -> Tensor:
    return x.mT if turned else x


def _batch_statistics(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, (C,), in float32 at least; y: (B, C, H, W)."""
    # Scratch statistics in float32 make this sum up in float32, also what is bfloat16.
    scratch = torch.zeros(2, y.shape[1], device=y.device, dtype=torch.promote_types(y.dtype, torch.float32))
    mean, variance = torch.batch_norm_update_stats(y, scratch[0], scratch[1], 0.0)
    return mean, variance


def _affine(
    weight: Tensor, bias: Tensor | None, mean: Tensor, variance: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """The batch norm as scale and shift of each channel, (C,)."""
    assert bias is not None, "a batch norm with a weight has a bias"
    scale = weight * (variance + epsilon).rsqrt()
    return scale, bias - mean * scale


# What PyTorch has to know of the operators: shapes and strides, gradients, FLOPs.


@attend.register_fake
def _(
    projected: Tensor,
    column: Tensor | None,
    row: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    heads: int,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q = _split(projected, heads, column if row is None else row)[0]
    out = torch.empty_like(q).flatten(1, 2)
    if weight is None:
        return out, projected.new_empty(0), projected.new_empty(0), projected.new_empty(0)
    statistics = projected.new_empty(
        2, out.shape[1], dtype=torch.promote_types(projected.dtype, torch.float32)
    )
    return out, torch.empty_like(out), statistics[0].clone(), statistics[1].clone()


@attend_backward.register_fake
def _(
    grad: Tensor,
    projected: Tensor,
    column: Tensor | None,
    row: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    mean: Tensor,
    variance: Tensor,
    heads: int,
    epsilon: float,
    batch_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def like(parameter: Tensor | None) -> Tensor:
        return projected.new_empty(0) if parameter is None else torch.empty_like(parameter)

    return torch.empty_like(projected), like(column), like(row), like(weight), like(bias)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    projected, column, row, weight, bias, mean, _, heads, epsilon = inputs
    _, y, used_mean, used_variance = output
    ctx.mark_non_differentiable(y, used_mean, used_variance)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(projected, column, row, weight, bias, y, used_mean, used_variance)
    ctx.settings = heads, epsilon, mean is None


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    projected, *parameters, y, mean, variance = ctx.saved_tensors
    d_projected, *gradients = attend_backward(grad, projected, *parameters, y, mean, variance, *ctx.settings)
    present = (None if p is None else d for p, d in zip(parameters, gradients, strict=True))
    return d_projected, *present, None, None, None, None


def _refuse_second_derivative(_: Any, *__: Any) -> None:
    raise RuntimeError(
        "gsa::attend has a first derivative alone; take second ones with torch.func, which goes by plain PyTorch"
    )


torch.library.register_autograd("gsa::attend", _backward, setup_context=_keep_for_backward)
torch.library.register_autograd("gsa::attend_backward", _refuse_second_derivative)


@register_flop_formula(torch.ops.gsa.attend)
def _attend_flops(projected: Any, column: Any, row: Any, *args: Any, **_: Any) -> int:
    """Of content, logits and sums of values, dense: a window saves nothing."""
    batch, channels, height, width = projected
    table = column if row is None else row
    heads = args[4]
    dim = heads * table[1]
    taps: int = (height if column else 0) + (width if row else 0) + (table[1] if channels == 3 * dim else 0)
    return 4 * int(batch * height * width * dim) * taps  # two products, a multiply-accumulate being two


@register_flop_formula(torch.ops.gsa.attend_backward)
def _attend_backward_flops(grad: Any, projected: Any, column: Any, row: Any, *args: Any, **_: Any) -> int:
    """Of four products of the forward pass, each has two gradients; logits and context are made once more."""
    of_forward: int = _attend_flops(projected, column, row, None, None, None, None, args[5])
    return of_forward * 5 // 2
