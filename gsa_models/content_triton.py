"""Content attention's summary of all pixels on CUDA: one pass over keys and values, no weights in memory.

Paper: Shen, Bello, Vemulapalli, Jia, Chen, "Global Self-Attention Networks for Image Recognition",
arXiv 2010.03019, Figure 1, upper branch. The running maximum is that of Milakov and Gimelshein, arXiv
1805.02867.
Status: equal to content_cpu.py up to rounding in Triton's interpreter; not yet run on a GPU. Imports Triton.

A program owns the pixels of one head of one image, and goes through them in blocks. The backward pass computes
the weights anew from the logarithm of their sum.

Letters: B batch   N heads   D key channels, E value channels of a head, E = D   H, W map   P = H*W pixels
"""
# Triton has no types, and the body of a kernel is its language rather than Python:
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor


def content_forward(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The context `softmax over pixels(K)^T V` (B, N, D, E), and the log of the sum of exp(K), (B, N, D).

    k, v: (B, N, D, H, W) of float32, float16 or bfloat16; the sums are in float32.
    """
    k, v = k.flatten(3), v.flatten(3)  # views, for every memory format of an image
    batch, heads, channels = k.shape[:3]
    context = k.new_empty(batch, heads, channels, channels)
    log_sum = k.new_empty(batch, heads, channels, dtype=torch.float32)
    with torch.cuda.device_of(k):
        _summarise[heads, batch](*(k, v, context, log_sum, k.stride(), v.stride()), **_constants(k))
    return context, log_sum


def content_backward(
    d_context: Tensor, k: Tensor, v: Tensor, context: Tensor, log_sum: Tensor, *, dk: Tensor, dv: Tensor
) -> None:
    """Write the gradient of k into dk and add that of v to dv, (B, N, D, H, W) each."""
    k, v = k.flatten(3), v.flatten(3)
    dk, dv = (t.view(k.shape) for t in (dk, dv))
    batch, heads = k.shape[:2]
    constants = _constants(k)
    with torch.cuda.device_of(k):
        _backward[heads, batch, triton.cdiv(k.shape[3], constants["BLOCK"])](
            *(k, v, context.contiguous(), d_context.contiguous(), log_sum, dk, dv),
            *(k.stride(), v.stride(), dk.stride(), dv.stride()),
            **constants,
        )


def _constants(k: Tensor) -> dict[str, Any]:
    """Sizes, and the one place to tune. Chosen by what the compiler reports for sm_90, not by a clock."""
    channels, pixels = k.shape[2:]
    padded = max(16, int(triton.next_power_of_2(channels)))  # a matrix product takes no side below 16
    values = 1024 if k.dtype == torch.float32 else 4096  # of a block; float32 has no tensor cores, and spills
    return {
        **{"P": pixels, "D": channels, "D_PADDED": padded},
        "BLOCK": max(16, min(128, values // padded, int(triton.next_power_of_2(pixels)))),
        "PRECISION": "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
        "num_warps": 4 if padded < 64 else 8,
        "enable_fp_fusion": True,
    }


@triton.jit
def _summarise(
    k_ptr, v_ptr, context_ptr, log_sum_ptr, K: tl.constexpr, V: tl.constexpr,
    P: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    d = tl.arange(0, D_PADDED)
    largest = tl.full((D_PADDED,), float("-inf"), tl.float32)
    total = tl.full((D_PADDED,), 0.0, tl.float32)
    context = tl.full((D_PADDED, D_PADDED), 0.0, tl.float32)
    for start in range(0, P, BLOCK):
        p = start + tl.arange(0, BLOCK)
        k = _load(k_ptr, K, b, n, p[:, None], d[None, :], P, D).to(tl.float32)
        v = _load(v_ptr, V, b, n, p[:, None], d[None, :], P, D)
        k = tl.where((p < P)[:, None], k, float("-inf"))
        larger = tl.maximum(largest, tl.reduce(k, 0, _larger))
        weights = tl.exp(k - larger[None, :])  # (p, d)
        shrink = tl.exp(largest - larger)
        total = total * shrink + tl.reduce(weights, 0, _add)
        summed = tl.dot(tl.trans(weights.to(v.dtype)), v, input_precision=PRECISION)
        context = context * shrink[:, None] + summed
        largest = larger
    place = (b * tl.num_programs(0) + n) * D + d
    tl.store(log_sum_ptr + place, largest + tl.log(total), mask=d < D)
    square = place[:, None] * D + d[None, :]
    values = (context / total[:, None]).to(context_ptr.dtype.element_ty)
    tl.store(context_ptr + square, values, mask=(d < D)[:, None] & (d < D)[None, :])


@triton.jit
def _backward(
    k_ptr, v_ptr, context_ptr, d_context_ptr, log_sum_ptr, dk_ptr, dv_ptr,
    K: tl.constexpr, V: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    P: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    p, d = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, D_PADDED)
    place = (b * tl.num_programs(0) + n) * D + d
    square, known = place[:, None] * D + d[None, :], (d < D)[:, None] & (d < D)[None, :]
    context = tl.load(context_ptr + square, mask=known, other=0.0).to(tl.float32)
    d_context = tl.load(d_context_ptr + square, mask=known, other=0.0)  # (d, e)
    log_sum = tl.load(log_sum_ptr + place, mask=d < D, other=0.0)
    k = _load(k_ptr, K, b, n, p[:, None], d[None, :], P, D).to(tl.float32)
    v = _load(v_ptr, V, b, n, p[:, None], d[None, :], P, D)
    weights = tl.exp(k - log_sum[None, :])  # (p, d)
    d_weights = tl.dot(v, tl.trans(d_context), input_precision=PRECISION)
    mean = tl.reduce(
        d_context.to(tl.float32) * context, 1, _add
    )  # of d_weights over the pixels, by their weights
    _store(dk_ptr, DK, b, n, p[:, None], d[None, :], P, D, weights * (d_weights - mean[None, :]))
    dv = tl.dot(weights.to(v.dtype), d_context, input_precision=PRECISION)
    dv += _load(dv_ptr, DV, b, n, p[:, None], d[None, :], P, D).to(tl.float32)
    _store(dv_ptr, DV, b, n, p[:, None], d[None, :], P, D, dv)


# Not tl.max and tl.sum: those are made for GPU or interpreter when triton is imported, these when this file is.


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _load(pointer, STRIDES: tl.constexpr, b, n, p, d, P: tl.constexpr, D: tl.constexpr):
    pointer += b * STRIDES[0] + n * STRIDES[1]  # 64 bits, as b has: within an image, 32 are enough
    return tl.load(pointer + p * STRIDES[3] + d * STRIDES[2], mask=(p < P) & (d < D), other=0.0)


@triton.jit
def _store(pointer, STRIDES: tl.constexpr, b, n, p, d, P: tl.constexpr, D: tl.constexpr, values):
    pointer += b * STRIDES[0] + n * STRIDES[1]
    values = values.to(pointer.dtype.element_ty)
    tl.store(pointer + p * STRIDES[3] + d * STRIDES[2], values, mask=(p < P) & (d < D))
