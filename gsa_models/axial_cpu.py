"""One pass of axial attention on a CPU, forward and backward, a few images at a time.

The logits of a batch are 7 times as large as its feature map at 56x56 pixels. Stored, they would be most of
what training keeps, and every use of them would run at the speed of memory. Here they are made, used and
dropped in blocks that stay in a cache, and made again for the backward pass.

Letters:
    B batch   N heads   D channels a head   R lines   X query pixels, I key pixels of a line
    L = lines of a block, of all its images and heads
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from gsa_models.branches import relative_embeddings, table_gradient

BLOCK_BYTES = 2**20  # of logits; an image is never cut: smaller blocks than that only cost calls

Affine = tuple[Tensor, Tensor]


def axial_forward(
    q: Tensor, v: Tensor, table: Tensor, *, affine: Affine | None = None, context: Tensor | None = None
) -> Tensor:
    """`y_x = sum over i of <q_x, table[i - x]> v_i`, and `q_x context` on top.

    q, v and y: (B, N, D, R, X), of any strides.   table: (offsets, D), offset 0 in the middle.
    affine: scale and shift of v's channels, (N*D,) each, applied on the way.   context: (B, N, D, D).
    """
    relative = relative_embeddings(table, q.shape[-1]).contiguous()  # (X, D, I)
    y = torch.empty_like(q)
    for block in _blocks(q):
        q_lines, v_lines = _lines(q[block]), _lines(v[block], affine)  # (L, X, D)
        logits = torch.bmm(q_lines.transpose(0, 1), relative)  # (X, L, I)
        y_lines = torch.bmm(logits.transpose(0, 1), v_lines)  # (L, X, D)
        if context is not None:
            of_block = context[block].flatten(0, 1)
            _by_head(y_lines, of_block).baddbmm_(_by_head(q_lines, of_block), of_block)
        _rows(y[block]).copy_(_as_rows(y_lines, y[block]))
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
    """The gradients of the table and of the context, for `grad` of y; those of q and v go into dq and dv.

    dq, dv: (B, N, D, R, X), of any strides; add: to what dq holds. dv is that of v behind its affine.
    """
    relative = relative_embeddings(table, q.shape[-1])
    by_query, by_key = relative.contiguous(), relative.mT.contiguous()  # (X, D, I), (X, I, D)
    # In float32 at least: it sums over all blocks.
    d_relative = torch.zeros_like(by_key, dtype=torch.promote_types(q.dtype, torch.float32))
    d_context = None if context is None else torch.empty_like(context)
    for block in _blocks(q):
        q_lines, v_lines, g_lines = _lines(q[block]), _lines(v[block], affine), _lines(grad[block])
        queries = q_lines.transpose(0, 1)  # (X, L, D)
        logits = torch.bmm(queries, by_query)  # (X, L, I)
        _rows(dv[block]).copy_(_as_rows(torch.bmm(logits.permute(1, 2, 0), g_lines), dv[block]))
        d_logits = torch.bmm(g_lines, v_lines.mT).transpose(0, 1)  # (X, L, I)
        d_relative += torch.bmm(d_logits.mT, queries)
        if context is None or d_context is None:
            dq_lines = torch.bmm(d_logits, by_key).transpose(0, 1)  # (L, X, D)
        else:
            of_block = context[block].flatten(0, 1)
            read = torch.bmm(_by_head(g_lines, of_block), of_block.mT).view_as(g_lines)
            dq_lines = torch.baddbmm(read.transpose(0, 1), d_logits, by_key).transpose(0, 1)
            of_queries = torch.bmm(_by_head(q_lines, of_block).mT, _by_head(g_lines, of_block))
            d_context[block] = of_queries.view_as(d_context[block])
        rows, new = _rows(dq[block]), _as_rows(dq_lines, dq[block])
        _ = rows.add_(new) if add else rows.copy_(new)
    return table_gradient(d_relative.mT, len(table)).to(table.dtype), d_context


def _blocks(q: Tensor) -> Iterator[slice]:
    """Images whose logits take BLOCK_BYTES together, at least one of them."""
    images, heads, _, lines, pixels = q.shape
    of_image = heads * lines * pixels * pixels * q.element_size()
    step = max(1, BLOCK_BYTES // of_image)
    return (slice(start, start + step) for start in range(0, images, step))


def _rows(x: Tensor) -> Tensor:
    """(B, N, D, R, X) -> (B, N, R, X, D), a view."""
    return x.permute(0, 1, 3, 4, 2)


def _lines(x: Tensor, affine: Affine | None = None) -> Tensor:
    """(B, N, D, R, X) -> (L, X, D), contiguous, behind the affine."""
    rows = _rows(x)
    if affine is not None:
        scale, shift = (vector.view(x.shape[1], 1, 1, x.shape[2]) for vector in affine)
        rows = torch.addcmul(shift, rows, scale, out=x.new_empty(rows.shape))
    return rows.reshape(-1, x.shape[4], x.shape[2]).contiguous()


def _as_rows(lines: Tensor, like: Tensor) -> Tensor:
    """(L, X, D) -> (B, N, R, X, D) of `like`, (B, N, D, R, X); a view."""
    return lines.unflatten(0, (like.shape[0], like.shape[1], like.shape[3]))  # type: ignore[no-untyped-call, no-any-return]


def _by_head(lines: Tensor, context: Tensor) -> Tensor:
    """(L, X, D) -> (B*N, R*X, D), a view."""
    return lines.view(len(context), -1, lines.shape[2])
