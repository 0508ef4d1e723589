"""Axial attention on CUDA: one pass of it, the norm before and the content branch beside it, in one kernel.

Paper: Shen, Bello, Vemulapalli, Jia, Chen, "Global Self-Attention Networks for Image Recognition",
arXiv 2010.03019, Appendix B (equations 5 to 8).
Status: equal to `axial_attention` up to rounding in Triton's interpreter; not yet run on a GPU.
It imports Triton, which takes a quarter of a second and which CPU builds of torch lack: import it on first
use with CUDA.

The logits never leave the chip, and all products are products of matrices, in batches: the logits of one query
position in 16 lines are q[r, d] table[d, i], a batch of positions x; the sums over keys are logits[x, i] v[i, e],
a batch of lines r. Between the two, the logits change places from (x, r, i) to (r, x, i), rounded to the dtype
of v. A program owns one head and a block of pixels of every line; the embeddings of that block stay with it
while it goes through the lines of many samples. The backward pass computes the logits anew, in two kernels, as
dq sums over keys and dv over queries.

Letters:
    B batch   N heads   D channels a head, the same for query, key and value   E those of the value, E = D
    R lines   X query pixels = I key pixels of a line
"""
# Triton has no types, and the body of a kernel is its language rather than Python:
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from typing import Any, NamedTuple

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor
from torch.nn import functional as F

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LEAST = 16  # a matrix product takes no side that is smaller; also the lines of a tile
PROGRAMS = 528  # at least, where there is work for them: 4 for each of 132 multiprocessors
LINE_BYTES = 4096  # of X * D values, padded: with more, 16 lines do not fit in shared memory

Affine = tuple[Tensor, Tensor]


def fits(q: Tensor) -> bool:
    """Whether a line of q, (B, N, D, R, X), is short enough for the kernels: X * D, each padded to a power of 2.

    In float16 and bfloat16 56/32, 28/64, 14/128 and 112/16 (X/D) do; in float32 56/16, 28/32 and 14/64.
    """
    return _line_bytes(q) <= LINE_BYTES


def axial_forward(
    q: Tensor, v: Tensor, table: Tensor, *, affine: Affine | None = None, context: Tensor | None = None
) -> Tensor:
    """Sum the values of a pixel's line, each times `<query, embedding of its offset>`; add the content branch.

    q, v and the result: (B, N, D, R, X) of one dtype, float32, float16 or bfloat16, with any strides; for the
    column pass hand over `.mT`. The result is laid out as q is, densely.
    table: (offsets, D), an odd number of them with offset 0 in the middle; pixels beyond it count nothing.
    affine: scale and shift of each channel, (N*D,) in float32, that v takes on its way in: a batch norm.
    context: (B, N, D, E), read by each query and added to its sum.

    Raises ValueError for tensors that do not fit together, and for lines that are too long: see `fits`.
    Source: Appendix B, equations 5 to 8.
    """
    _check(q, v, table, affine, context)
    plan = _plan(q)
    scale, shift = affine or (None, None)
    y = torch.empty_like(q)  # dense, in the order of q's strides even if q is a chunk: the same memory format
    with torch.cuda.device_of(q):
        _forward[plan.grid](
            *(q, v, table, scale, shift, context, y, q.shape[0]),
            *(_strides(q), _strides(v), _strides(table), _strides(context), _strides(y)),
            ROWS=len(table),
            **plan.constants,
        )
    return y


def axial_backward(
    grad: Tensor,
    q: Tensor,
    v: Tensor,
    table: Tensor,
    *,
    dq: Tensor,
    dv: Tensor,
    add: bool = False,
    affine: Affine | None = None,
    context: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `axial_forward` for table and context, each in its dtype; those of q and v go into dq and dv.

    grad, dq, dv: (B, N, D, R, X) as q is, with any strides; add: to what dq holds. dv is the gradient of v after
    its affine. Other arguments and errors are those of `axial_forward`.
    Two calls give the same bits: each program has a place of its own for its part of a sum.
    """
    _check(q, v, table, affine, context)
    for name, tensor in (("grad", grad), ("dq", dq), ("dv", dv)):
        _expect(name, tensor, q.shape, q.dtype)
    plan = _plan(q)
    scale, shift = affine or (None, None)
    heads, blocks, groups = plan.grid
    pixels = q.shape[-1]
    dtables = q.new_empty(groups, heads, pixels, pixels, q.shape[2], dtype=torch.float32)  # (..., X, I, D)
    dcontexts = None if context is None else _parts_of(context, plan.tiles * blocks)
    with torch.cuda.device_of(q):
        _backward_queries[plan.grid](
            *(grad, q, v, table, scale, shift, context, dq, dtables, dcontexts, q.shape[0]),
            *(_strides(grad), _strides(q), _strides(v), _strides(table), _strides(context), _strides(dq)),
            ADD=add,
            ROWS=len(table),
            **plan.constants,
        )
        _backward_keys[plan.grid](
            *(grad, q, table, dv, q.shape[0]),
            *(_strides(grad), _strides(q), _strides(table), _strides(dv)),
            ROWS=len(table),
            **plan.constants,
        )
    dtable = _sum_by_offset(dtables.sum((0, 1)), len(table)).to(table.dtype)
    if context is None or dcontexts is None:
        return dtable, None
    return dtable, dcontexts.sum(0).to(context.dtype) if len(dcontexts) > 1 else dcontexts[0]


def _parts_of(total: Tensor, parts: int) -> Tensor:
    """Room for the parts of a sum, in float32; a single part is the sum and may be rounded at once."""
    return total.new_empty(parts, *total.shape, dtype=torch.float32 if parts > 1 else total.dtype)


def _sum_by_offset(pairs: Tensor, rows: int) -> Tensor:
    """Sum the gradients of all pairs (X, I, D) with the same i - x into the rows of a table, (rows, D)."""
    pixels = len(pairs)
    # Rows of 2X, read as rows of 2X-1, move to the right by one more each: column o holds one offset alone.
    padded = F.pad(pairs.flip(0), (0, 0, 0, pixels)).flatten(0, 1)  # (X * 2X, D)
    skewed = padded[: pixels * (2 * pixels - 1)].unflatten(0, (pixels, 2 * pixels - 1))  # (X, 2X-1, D)
    missing = rows // 2 - (pixels - 1)  # rows for offsets that the map does not have; pad cuts where negative
    return F.pad(skewed.sum(0), (0, 0, missing, missing))


class _Plan(NamedTuple):
    grid: tuple[int, int, int]  # (N, blocks of pixels, groups of tiles)
    tiles: int  # of LINES lines in a sample
    constants: dict[str, Any]


def _plan(q: Tensor) -> _Plan:
    """Divide the work: the one place to tune. Chosen by what the compiler reports for sm_90, not by a clock."""
    batch, heads, channels, lines, pixels = q.shape
    # 2 KiB a line, as in every stage of GSA-ResNet-50 with 8 heads in bfloat16, takes 16 pixels a program and
    # two tiles in shared memory, the next one loading. Longer lines take fewer pixels, and one tile.
    block = min(LEAST, max(1, LEAST * 2048 // _line_bytes(q)))
    tiles, blocks = triton.cdiv(lines, LEAST), triton.cdiv(pixels, block)
    steps = max(1, batch * tiles * heads * blocks // PROGRAMS)
    steps = 1 << steps.bit_length() - 1  # powers of 2: batches of other sizes seldom ask for another kernel
    constants = {
        **{"R": lines, "X": pixels, "D": channels},
        **{"X_PADDED": _padded(pixels), "D_PADDED": _padded(channels)},
        **{"LINES": LEAST, "BLOCK": block, "STEPS": steps},
        # The getter of allow_tf32 raises once somebody has used the newer setting; this one reads both.
        "PRECISION": "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
        "num_warps": 8,  # with 4, the accumulators of the backward pass spill; with 16, too
        "num_stages": 2 if _line_bytes(q) <= 2048 else 1,
        "enable_fp_fusion": True,  # Triton 3.9 warns where this is left open
    }
    return _Plan((heads, blocks, triton.cdiv(batch * tiles, steps)), tiles, constants)


def _padded(side: int) -> int:
    return max(LEAST, int(triton.next_power_of_2(side)))


def _line_bytes(q: Tensor) -> int:
    return _padded(q.shape[4]) * _padded(q.shape[2]) * q.element_size()


def _strides(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tensor.stride()


def _check(q: Tensor, v: Tensor, table: Tensor, affine: Affine | None, context: Tensor | None) -> None:
    if q.ndim != 5 or q.dtype not in DTYPES:
        raise ValueError(
            f"q must be (B, N, D, R, X) in float32, float16 or bfloat16, got {tuple(q.shape)} in {q.dtype}"
        )
    if not fits(q):
        raise ValueError(
            f"a line of {q.shape[4]} pixels with {q.shape[2]} channels a head in {q.dtype} is too long for these "
            f"kernels ({_line_bytes(q)} of {LINE_BYTES} bytes); use axial_attention, or more heads"
        )
    batch, heads, channels = q.shape[:3]
    _expect("v", v, q.shape, q.dtype)
    _expect("table", table, (table.shape[0] | 1, channels))
    if affine is not None:
        _expect("scale", affine[0], (heads * channels,), torch.float32)
        _expect("shift", affine[1], (heads * channels,), torch.float32)
    if context is not None:
        _expect("context", context, (batch, heads, channels, channels))


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
    if tensor.shape != shape or (dtype or tensor.dtype) != tensor.dtype:
        raise ValueError(
            f"{name} must be {tuple(shape)} in {dtype or 'any dtype'}, "
            f"got {tuple(tensor.shape)} in {tensor.dtype}"
        )


@triton.jit(do_not_specialize=["B"])  # else each kind of batch size is another kernel
def _forward(
    q_ptr, v_ptr, table_ptr, scale_ptr, shift_ptr, context_ptr, y_ptr, B,
    Q: tl.constexpr, V: tl.constexpr, TABLE: tl.constexpr, CONTEXT: tl.constexpr, Y: tl.constexpr,  # strides
    ROWS: tl.constexpr, R: tl.constexpr, X: tl.constexpr, D: tl.constexpr,
    LINES: tl.constexpr, BLOCK: tl.constexpr, X_PADDED: tl.constexpr, D_PADDED: tl.constexpr,
    STEPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y of BLOCK queries of each line."""
    n, x = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    i, d = tl.arange(0, X_PADDED), tl.arange(0, D_PADDED)
    table = _embeddings(table_ptr, TABLE, x[:, None, None], i[None, None, :], d[None, :, None], ROWS, X, D)
    table = table.to(q_ptr.dtype.element_ty)  # (x, d, i)
    for step in range(STEPS):
        b, r = _lines(tl.program_id(2) * STEPS + step, B, R, LINES)
        q = _load(q_ptr, Q, b, n, r[None, :, None], x[:, None, None], d[None, None, :], R, X, D)
        v = _load(v_ptr, V, b, n, r[:, None, None], i[None, :, None], d[None, None, :], R, X, D)
        v = _normed(v, scale_ptr, shift_ptr, n, D, D_PADDED)
        s = tl.dot(q, table, input_precision=PRECISION).to(q.dtype)  # (x, r, i)
        y = tl.dot(tl.permute(s, (1, 0, 2)), v, input_precision=PRECISION)  # (r, x, e)
        if context_ptr is not None:
            context = _context(context_ptr, CONTEXT, b, n, b < B, D, D_PADDED).to(q.dtype)
            q = tl.reshape(tl.permute(q, (1, 0, 2)), (LINES * BLOCK, D_PADDED))
            y += tl.reshape(tl.dot(q, context, input_precision=PRECISION), (LINES, BLOCK, D_PADDED))
        _store(y_ptr, Y, b, n, r[:, None, None], x[None, :, None], d[None, None, :], R, X, D, y)


@triton.jit(do_not_specialize=["B"])  # else each kind of batch size is another kernel
def _backward_queries(
    grad_ptr, q_ptr, v_ptr, table_ptr, scale_ptr, shift_ptr, context_ptr,
    dq_ptr, dtables_ptr, dcontexts_ptr, B,
    GRAD: tl.constexpr, Q: tl.constexpr, V: tl.constexpr, TABLE: tl.constexpr, CONTEXT: tl.constexpr,
    DQ: tl.constexpr,  # strides
    ADD: tl.constexpr, ROWS: tl.constexpr, R: tl.constexpr, X: tl.constexpr, D: tl.constexpr,
    LINES: tl.constexpr, BLOCK: tl.constexpr, X_PADDED: tl.constexpr, D_PADDED: tl.constexpr,
    STEPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK queries of each line; their part of the gradients of table and context."""
    n, x = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    i, d = tl.arange(0, X_PADDED), tl.arange(0, D_PADDED)
    table = _embeddings(table_ptr, TABLE, x[:, None, None], i[None, :, None], d[None, None, :], ROWS, X, D)
    table = table.to(q_ptr.dtype.element_ty)  # (x, i, d)
    dtable = tl.full((BLOCK, X_PADDED, D_PADDED), 0.0, tl.float32)
    for step in range(STEPS):
        tile = tl.program_id(2) * STEPS + step
        b, r = _lines(tile, B, R, LINES)
        q = _load(q_ptr, Q, b, n, r[None, :, None], x[:, None, None], d[None, None, :], R, X, D)
        v = _load(v_ptr, V, b, n, r[:, None, None], i[None, :, None], d[None, None, :], R, X, D)
        dy = _load(grad_ptr, GRAD, b, n, r[:, None, None], x[None, :, None], d[None, None, :], R, X, D)
        v = _normed(v, scale_ptr, shift_ptr, n, D, D_PADDED)
        ds = tl.dot(dy, tl.permute(v, (0, 2, 1)), input_precision=PRECISION).to(q.dtype)  # (r, x, i)
        ds = tl.permute(ds, (1, 0, 2))  # (x, r, i)
        dtable = tl.dot(tl.permute(ds, (0, 2, 1)), q, dtable, input_precision=PRECISION)
        dq = tl.dot(ds, table, input_precision=PRECISION)  # (x, r, d)
        if context_ptr is not None:
            context = _context(context_ptr, CONTEXT, b, n, b < B, D, D_PADDED).to(q.dtype)
            dy = tl.reshape(tl.permute(dy, (1, 0, 2)), (BLOCK * LINES, D_PADDED))
            dq_read = tl.dot(dy, tl.trans(context), input_precision=PRECISION)
            dq += tl.reshape(dq_read, (BLOCK, LINES, D_PADDED))
            q = tl.reshape(q, (BLOCK * LINES, D_PADDED))
            dcontext = tl.dot(tl.trans(q), dy, input_precision=PRECISION)
            part = (tile % ((R + LINES - 1) // LINES)) * tl.num_programs(1) + tl.program_id(1)
            part = ((part * B + b) * tl.num_programs(0) + n) * D * D
            end = tl.where(b < B, D, 0)
            known = (d < end)[:, None] & (d < end)[None, :]
            tl.store(dcontexts_ptr + part + d[:, None] * D + d[None, :], dcontext, mask=known)
        if ADD:
            held = _load(dq_ptr, DQ, b, n, r[:, None, None], x[None, :, None], d[None, None, :], R, X, D)
            # Added in another order, or the compiler takes it for a start of the product, and float32 spills.
            dq = tl.permute(tl.permute(dq, (1, 0, 2)) + held.to(tl.float32), (1, 0, 2))
        _store(dq_ptr, DQ, b, n, r[None, :, None], x[:, None, None], d[None, None, :], R, X, D, dq)
    part = (tl.program_id(2) * tl.num_programs(0) + n) * X * X * D
    known = (x < X)[:, None, None] & (i < X)[None, :, None] & (d < D)[None, None, :]
    place = (x[:, None, None] * X + i[None, :, None]) * D + d[None, None, :]
    tl.store(dtables_ptr + part + place, dtable, mask=known)


@triton.jit(do_not_specialize=["B"])  # else each kind of batch size is another kernel
def _backward_keys(
    grad_ptr, q_ptr, table_ptr, dv_ptr, B,
    GRAD: tl.constexpr, Q: tl.constexpr, TABLE: tl.constexpr, DV: tl.constexpr,  # strides
    ROWS: tl.constexpr, R: tl.constexpr, X: tl.constexpr, D: tl.constexpr,
    LINES: tl.constexpr, BLOCK: tl.constexpr, X_PADDED: tl.constexpr, D_PADDED: tl.constexpr,
    STEPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv of BLOCK keys of each line."""
    n, i = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x, d = tl.arange(0, X_PADDED), tl.arange(0, D_PADDED)
    table = _embeddings(table_ptr, TABLE, x[:, None, None], i[None, None, :], d[None, :, None], ROWS, X, D)
    table = table.to(q_ptr.dtype.element_ty)  # (x, d, i)
    for step in range(STEPS):
        b, r = _lines(tl.program_id(2) * STEPS + step, B, R, LINES)
        q = _load(q_ptr, Q, b, n, r[None, :, None], x[:, None, None], d[None, None, :], R, X, D)
        dy = _load(grad_ptr, GRAD, b, n, r[:, None, None], x[None, :, None], d[None, None, :], R, X, D)
        s = tl.dot(q, table, input_precision=PRECISION).to(q.dtype)  # (x, r, i)
        dv = tl.dot(tl.permute(s, (1, 2, 0)), dy, input_precision=PRECISION)  # (r, i, e)
        _store(dv_ptr, DV, b, n, r[:, None, None], i[None, :, None], d[None, None, :], R, X, D, dv)


@triton.jit
def _lines(tile, B, R: tl.constexpr, LINES: tl.constexpr):
    """Sample and lines of a tile; lines from R on do not exist."""
    tiles: tl.constexpr = (R + LINES - 1) // LINES
    b = tile // tiles
    r = tile % tiles * LINES + tl.arange(0, LINES)
    return b.to(tl.int64), tl.where(b < B, r, R)


@triton.jit
def _embeddings(
    pointer, STRIDES: tl.constexpr, x, i, d, ROWS: tl.constexpr, X: tl.constexpr, D: tl.constexpr
):
    """The embedding of i - x, zero where the table or the map ends."""
    offset = i - x + ROWS // 2
    known = (offset >= 0) & (offset < ROWS) & (x < X) & (i < X) & (d < D)
    return tl.load(pointer + offset * STRIDES[0] + d * STRIDES[1], mask=known, other=0.0)


@triton.jit
def _normed(v, scale_ptr, shift_ptr, n, D: tl.constexpr, D_PADDED: tl.constexpr):
    if scale_ptr is not None:
        d = tl.arange(0, D_PADDED)[None, None, :]
        scale = tl.load(scale_ptr + n * D + d, mask=d < D, other=0.0)
        shift = tl.load(shift_ptr + n * D + d, mask=d < D, other=0.0)
        return (v.to(tl.float32) * scale + shift).to(v.dtype)
    else:
        return v


@triton.jit
def _context(pointer, STRIDES: tl.constexpr, b, n, exists, D: tl.constexpr, D_PADDED: tl.constexpr):
    d, e = tl.arange(0, D_PADDED)[:, None], tl.arange(0, D_PADDED)[None, :]
    place = b * STRIDES[0] + n * STRIDES[1] + (d * STRIDES[2] + e * STRIDES[3])
    end = tl.where(exists, D, 0)
    return tl.load(pointer + place, mask=(d < end) & (e < end), other=0.0)


@triton.jit
def _load(
    pointer, STRIDES: tl.constexpr, b, n, r, x, d, R: tl.constexpr, X: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    pointer += b * STRIDES[0] + n * STRIDES[1]  # 64 bits, as b has: within a sample, 32 are enough
    place = r * STRIDES[3] + x * STRIDES[4] + d * STRIDES[2]
    return tl.load(pointer + place, mask=(r < R) & (x < X) & (d < D), other=0.0)


@triton.jit
def _store(
    pointer, STRIDES: tl.constexpr, b, n, r, x, d, R: tl.constexpr, X: tl.constexpr, D: tl.constexpr, values
):  # fmt: skip
    pointer += b * STRIDES[0] + n * STRIDES[1]
    place = r * STRIDES[3] + x * STRIDES[4] + d * STRIDES[2]
    tl.store(pointer + place, values.to(pointer.dtype.element_ty), mask=(r < R) & (x < X) & (d < D))
