"""Content attention's summary of all pixels, forward and backward, in plain PyTorch: for a CPU, and to compare.

Letters: B batch   N heads   D key channels, E value channels of a head   H, W map   P = H*W pixels
"""

import torch
from torch import Tensor, einsum

from gsa_models.branches import softmax_in_float32


def content_forward(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The context `softmax over pixels(K)^T V` (B, N, D, E), and what the backward pass wants: the softmax.

    k, v: (B, N, D, H, W).
    """
    weights = softmax_in_float32(k.flatten(3), dim=-1).to(v.dtype)  # (B, N, D, P)
    return einsum("bndp,bnep->bnde", weights, v.flatten(3)), weights


def content_backward(
    d_context: Tensor, k: Tensor, v: Tensor, context: Tensor, weights: Tensor, *, dk: Tensor, dv: Tensor
) -> None:
    """Write the gradient of k into dk and add that of v to dv, (B, N, D, H, W) each, of any strides."""
    dv.add_(einsum("bnde,bndp->bnep", d_context, weights).view(dv.shape))
    d_weights = einsum("bnde,bnep->bndp", d_context, v.flatten(3))
    mean = (d_context * context).sum(-1, keepdim=True)  # of d_weights over the pixels, by their weights
    torch.mul(weights.view(dk.shape), d_weights.sub_(mean).view(dk.shape), out=dk)
