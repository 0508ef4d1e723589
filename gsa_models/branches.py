"""The two branches in plain PyTorch: what is exported, what runs on devices without a kernel, and an oracle.

Paper: Shen, Bello, Vemulapalli, Jia, Chen, "Global Self-Attention Networks for Image Recognition",
arXiv 2010.03019, Figure 1 and Appendix B (equations 5 to 8, by the numbers that `gsa-pytorch` cites).

Letters:
    B batch   N heads   D channels a head, the same for query, key and value   H, W map   P = H*W pixels
    on one axis: X query pixels, I key pixels (X = I = H or W), R the lines, that is pixels of the other axis
"""

import torch
from torch import Tensor, einsum
from torch.nn import functional as F


def content_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Let every pixel read a summary of all pixels: `Q (softmax over pixels(K)^T V)`, at cost O(P).

    q, k, v and the result: (B, N, D, H, W). q is taken as it comes, neither normalised nor scaled.
    Source: Figure 1, upper branch.
    """
    weights = softmax_in_float32(k.flatten(3), dim=-1).to(v.dtype)  # (B, N, D, P)
    context = einsum("bndp,bnep->bnde", weights, v.flatten(3))
    return einsum("bndhw,bnde->bnehw", q, context)


def axial_attention(q: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """Sum the values of a pixel's row, each times `<query, embedding of its offset>`: no softmax, no scale.

    q, v and the result: (B, N, D, R, X); for the column pass hand over, and take back, `.mT`.
    table: (offsets, D), an odd number of them with offset 0 in the middle; pixels beyond it count nothing.
    Source: Appendix B, equations 5 to 8, in the absolute form: X logits a pixel, never 2X-1.
    """
    relative = relative_embeddings(table, q.shape[-1])  # (X, D, I)
    logits = einsum("bndrx,xdi->bnrxi", q, relative)
    return einsum("bnrxi,bneri->bnerx", logits, v)


def relative_embeddings(table: Tensor, pixels: int) -> Tensor:
    """Lay a table of offsets out as (X, D, I): for query x and key i the embedding of i - x.

    table: (offsets, D), offset 0 in the middle; fewer than 2X-1 rows are a window, with zeros outside of it;
    rows for offsets that the map does not have are left out.
    """
    missing = pixels - 1 - table.shape[0] // 2
    offsets = F.pad(table, (0, 0, missing, missing))  # (2X-1, D); pad cuts where `missing` is negative
    # Window number a holds the offsets from a - (X-1) on, which are those of query x = X-1 - a.
    return offsets.unfold(0, pixels, 1).flip(0)


def table_gradient(relative_gradient: Tensor, rows: int) -> Tensor:
    """Turn the gradient of `relative_embeddings`, (X, D, I), into that of its table, (rows, D)."""
    pixels, dim, _ = relative_gradient.shape
    missing = pixels - 1 - rows // 2
    sizes = (2 * pixels - 1, dim)
    offsets = torch.ops.aten.unfold_backward(relative_gradient.flip(0), sizes, 0, pixels, 1)
    return F.pad(offsets, (0, 0, -missing, -missing))


def softmax_in_float32(logits: Tensor, *, dim: int) -> Tensor:
    """Softmax in float32 at least: over 3136 pixels the weights and their sum outrun bfloat16's 3 digits."""
    return logits.softmax(dim, dtype=torch.promote_types(logits.dtype, torch.float32))
