"""Global self-attention: content branch + axial positional branch, summed; and the slow reference of both.

Paper: Shen, Bello, Vemulapalli, Jia, Chen, "Global Self-Attention Networks for Image Recognition",
arXiv 2010.03019, Figure 1 and Appendix B (equations 5 to 8, by the numbers that `gsa-pytorch` cites).
Status: equal to `gsa-pytorch` 0.2.2 up to float rounding, once that package's output projection is the
identity and its two tables are exchanged. The middle batch norm keeps statistics for every channel, which
the paper's parameter counts demand; that package shares them between the heads. The initial values are ours.

Letters:
    B batch   N heads   D channels a head, the same for query, key and value   H, W map   P = H*W pixels
    on one axis: X query pixels, I key pixels (X = I = H or W), R the lines, that is pixels of the other axis
"""

from collections.abc import Sequence
from difflib import get_close_matches

import torch
from torch import Tensor, einsum, nn

from gsa_models import fused
from gsa_models.branches import axial_attention, content_attention, softmax_in_float32

COMPONENTS = ("content", "column", "row")


class GlobalSelfAttention(nn.Module):
    """The GSA module: (B, dim, H, W) -> (B, dim, H, W), every pixel attending to all.

    The branches are summed, without output projection, gate or residual; a batch norm should follow.
    heads divide dim; the embedding tables are shared by the heads.
    components: which of content, column and row to build, in any order. Without content there is no key;
    the batch norm between column and row is there only when both are.
    window: None for the whole map, or an odd number of pixels that column and row attention see.
    query_softmax: softmax over a head's query channels, in the content branch alone (an ablation; it loses).
    Hooks on mid_norm are not called where an operator stands in for it: see fused.py.

    Raises ValueError for settings that cannot be, and for an input of another size than (dim, *map_size):
    the tables belong to one map size, and reading them on another would be a window that nobody asked for.
    """

    column_table: nn.Parameter | None
    row_table: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        *,
        map_size: tuple[int, int],
        heads: int = 8,
        components: Sequence[str] = COMPONENTS,
        window: int | None = None,
        query_softmax: bool = False,
    ) -> None:
        super().__init__()
        self.components = ordered_components(components)
        _check_sizes(dim, map_size, heads)
        _check_ablations(self.components, window, query_softmax)
        self.dim, self.map_size, self.heads = dim, map_size, heads
        self.window, self.query_softmax = window, query_softmax

        parts = 3 if "content" in self.components else 2
        self.qkv = nn.Conv2d(dim, parts * dim, 1, bias=False)  # query, key, value; without content no key
        self.column_table = self._table("column", map_size[0])
        self.row_table = self._table("row", map_size[1])
        both_axes = {"column", "row"} <= set(self.components)
        self.mid_norm = nn.BatchNorm2d(dim) if both_axes else None
        self.reset_parameters()

    def _table(self, component: str, pixels: int) -> nn.Parameter | None:
        if component not in self.components:
            return None
        rows = self.window or 2 * pixels - 1
        return nn.Parameter(torch.empty(rows, self.dim // self.heads))

    def reset_parameters(self) -> None:
        """Draw the initial values anew, so that both branches start at the same scale."""
        # Inputs come out of a ReLU, so their mean over pixels is 0.4 of their scale before it. That mean is
        # what content attention averages to, while n axial logits of random sign add up as sqrt(n): hence
        # 0.4 / sqrt(n) for the tables; the N(0, 1) of gsa-pytorch drowns the content branch at the start. The
        # query takes the 1/sqrt(D) that the forward pass lacks. Measured by tests/benchmarks/bench_init.py.
        nn.init.normal_(self.qkv.weight, std=self.dim**-0.5)
        with torch.no_grad():
            self.qkv.weight[: self.dim].mul_((self.dim // self.heads) ** -0.5)
        for table, pixels in zip((self.column_table, self.row_table), self.map_size, strict=True):
            if table is not None:
                nn.init.normal_(table, std=0.4 * min(len(table), pixels) ** -0.5)
        if self.mid_norm is not None:
            self.mid_norm.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        self._check_input(x)
        projected = self.qkv(x)  # (B, 3 * dim, H, W)
        plain_norm = self.mid_norm is None or _is_plain(self.mid_norm)
        has_table = self.column_table is not None or self.row_table is not None
        q, k, v = self.split(projected)
        if plain_norm and has_table and not self.query_softmax and fused.supports(q):
            return self._fused(projected)
        content, positional = self.branches(q, k, v)
        both = [branch for branch in (content, positional) if branch is not None]
        return sum(both[1:], both[0]).flatten(1, 2)  # (B, dim, H, W)

    def split(self, projected: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Query, key or None, and value, (B, N, D, H, W) each, of what `qkv` puts out."""
        q, *key, v = torch.unflatten(projected, 1, (-1, self.heads, self.dim // self.heads)).unbind(1)
        return q, key[0] if key else None, v

    def _fused(self, projected: Tensor) -> Tensor:
        norm = self.mid_norm
        column, row = (
            None if t is None else t.to(projected.dtype) for t in (self.column_table, self.row_table)
        )
        if norm is None:
            out: Tensor = fused.attend(projected, column, row, None, None, None, None, self.heads, 0.0)[0]
            return out
        statistics = (None, None) if norm.training else (norm.running_mean, norm.running_var)
        out, _, mean, variance = fused.attend(
            projected, column, row, norm.weight, norm.bias, *statistics, self.heads, norm.eps
        )
        if norm.training:
            _track(norm, mean, variance, count=out.numel() // self.dim)
        return out

    def branches(self, q: Tensor, k: Tensor | None, v: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Content and positional branch, (B, N, D, H, W) each, or None for one that is not there.

        The forward pass is their sum. It takes them one by one where a graph is exported, for other norms than
        the plain one, and for a query softmax.
        """
        content = positional = None
        if k is not None:
            content_q = softmax_in_float32(q, dim=2).to(q.dtype) if self.query_softmax else q
            content = content_attention(content_q, k, v)
        if self.column_table is not None or self.row_table is not None:
            positional = self._positional(q, v)
        return content, positional

    def _positional(self, q: Tensor, v: Tensor) -> Tensor:
        """Column attention, batch norm, row attention, all with the same query; (B, N, D, H, W)."""
        axial = fused.axial_attention if fused.supports(q) else axial_attention
        if self.column_table is not None:
            v = axial(q.mT, v.mT, self.column_table.to(q.dtype)).mT
        if self.mid_norm is not None:
            v = torch.unflatten(self.mid_norm(v.flatten(1, 2)), 1, (self.heads, -1))
        if self.row_table is not None:
            v = axial(q, v, self.row_table.to(q.dtype))
        return v

    def _check_input(self, x: Tensor) -> None:
        if x.shape[1:] != (self.dim, *self.map_size):
            raise ValueError(
                f"GSA expected an input of (batch, {self.dim}, {self.map_size[0]}, {self.map_size[1]}), "
                f"got {tuple(x.shape)}; its tables serve one map size: build the model for this image_size"
            )

    def extra_repr(self) -> str:
        names = "+".join(self.components)
        settings = f"heads={self.heads}, {names}, window={self.window}, query_softmax={self.query_softmax}"
        return f"{self.dim}, map_size={self.map_size}, {settings}"


def _is_plain(norm: nn.BatchNorm2d) -> bool:
    """Whether the operator can stand in for it: a SyncBatchNorm, say, has statistics of its own."""
    # momentum is None while `update_bn` of torch.optim.swa_utils collects statistics anew.
    parts = (norm.weight, norm.bias, norm.running_mean, norm.momentum)
    return type(norm) is nn.BatchNorm2d and norm.track_running_stats and all(p is not None for p in parts)


def _track(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, *, count: int) -> None:
    """Take a batch's statistics into the running ones, as `nn.BatchNorm2d` does."""
    if count < 2:
        raise ValueError(f"batch norm needs more than one pixel a channel to train on, got {count}")
    assert norm.running_mean is not None and norm.running_var is not None, "the norm keeps statistics"
    assert norm.num_batches_tracked is not None and norm.momentum is not None, "the norm keeps statistics"
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
        unbiased = variance * (count / (count - 1))
        norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), norm.momentum)


def ordered_components(names: Sequence[str]) -> tuple[str, ...]:
    """Check component names and bring them into the order of COMPONENTS.

    Raises ValueError for a name that is unknown or comes twice, and for none at all.
    """
    if isinstance(names, str) or not names:
        raise ValueError(
            f"components must be a tuple of one or more of {', '.join(COMPONENTS)}; got {names!r}"
        )
    for name in names:
        if name not in COMPONENTS:
            close = get_close_matches(name, COMPONENTS, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ValueError(f"component {name!r} is unknown; {hint}(components: {', '.join(COMPONENTS)})")
    if len(set(names)) < len(names):
        raise ValueError(f"components {'+'.join(names)} name one twice; name each once")
    return tuple(name for name in COMPONENTS if name in names)


def _check_sizes(dim: int, map_size: tuple[int, int], heads: int) -> None:
    if min(map_size) < 1:
        raise ValueError(f"map_size must be (H, W) of at least 1 pixel each, got {map_size}")
    if dim < 1:
        raise ValueError(f"dim must be at least 1 channel, got {dim}")
    if heads < 1 or dim % heads:
        right = ", ".join(str(n) for n in range(1, dim + 1) if dim % n == 0)
        raise ValueError(f"dim {dim} is not divisible by {heads} heads; heads of {right} would be right")


def _check_ablations(components: tuple[str, ...], window: int | None, query_softmax: bool) -> None:
    built = f"components are {'+'.join(components)}"
    if window is not None and (window < 1 or window % 2 == 0):
        right = f"{window - 1} or {window + 1}" if window > 1 else "1 or 3"
        raise ValueError(f"window must be an odd number of pixels, got {window}; {right} would be right")
    if window is not None and components == ("content",):
        raise ValueError(f"window {window} needs column or row attention, but {built}; leave window out")
    if query_softmax and "content" not in components:
        raise ValueError(f"query_softmax needs content attention, but {built}; leave query_softmax out")


def gsa_reference(module: GlobalSelfAttention, x: Tensor) -> Tensor:
    """Compute what `module(x)` must be, pixel by pixel from the definitions: slow, and the tests' oracle.

    It reads the module's parameters and settings, shares no code with it and leaves its statistics alone.
    Source: Figure 1 and Appendix B.
    """
    q, *key, v = torch.split(einsum("oc,bchw->bohw", module.qkv.weight[:, :, 0, 0], x), module.dim, dim=1)
    out = torch.zeros_like(x)
    if key:
        out = out + _reference_content(q, key[0], v, module)
    if "column" not in module.components and "row" not in module.components:
        return out
    y = v
    if module.column_table is not None:
        y = _reference_column(q, y, module.column_table, module)
    if module.mid_norm is not None:
        y = _reference_norm(y, module.mid_norm)
    if module.row_table is not None:
        y = _reference_row(q, y, module.row_table, module)
    return out + y


def _reference_content(q: Tensor, k: Tensor, v: Tensor, module: GlobalSelfAttention) -> Tensor:
    """For each head: softmax of each key channel over the pixels, the context, its reading by each query."""
    heads = []
    for q_head, k_head, v_head in zip(*(t.chunk(module.heads, dim=1) for t in (q, k, v)), strict=True):
        if module.query_softmax:
            q_head = q_head.exp() / q_head.exp().sum(dim=1, keepdim=True)
        weights = k_head.exp() / k_head.exp().sum(dim=(2, 3), keepdim=True)
        context = einsum("bdhw,behw->bde", weights, v_head)
        heads.append(einsum("bdhw,bde->behw", q_head, context))
    return torch.cat(heads, dim=1)


def _reference_row(q: Tensor, v: Tensor, table: Tensor, module: GlobalSelfAttention) -> Tensor:
    """`y_x = sum over i of <q_x, R[i - x]> v_i`, for each head, in every row."""
    heads = []
    for q_head, v_head in zip(q.chunk(module.heads, dim=1), v.chunk(module.heads, dim=1), strict=True):
        pixels = range(q.shape[3])
        y = [_reference_pixel(q_head[..., x], v_head, table, x, module.window) for x in pixels]
        heads.append(torch.stack(y, dim=3))
    return torch.cat(heads, dim=1)


def _reference_pixel(q_x: Tensor, v: Tensor, table: Tensor, x: int, window: int | None) -> Tensor:
    """The sum at column x; q_x: (B, D, H), v: (B, D, H, W), result: (B, D, H)."""
    y_x = torch.zeros_like(v[..., x])
    for i in range(v.shape[3]):
        if window is None or abs(i - x) <= (window - 1) // 2:
            embedding = table[i - x + (len(table) - 1) // 2]  # (D,)
            y_x = y_x + einsum("bdh,d->bh", q_x, embedding).unsqueeze(1) * v[..., i]
    return y_x


def _reference_column(q: Tensor, v: Tensor, table: Tensor, module: GlobalSelfAttention) -> Tensor:
    return _reference_row(q.transpose(2, 3), v.transpose(2, 3), table, module).transpose(2, 3)


def _reference_norm(y: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    if norm.training:
        mean, variance = y.mean(dim=(0, 2, 3)), y.var(dim=(0, 2, 3), correction=0)
    else:
        assert norm.running_mean is not None and norm.running_var is not None, "the norm keeps statistics"
        mean, variance = norm.running_mean, norm.running_var
    scale = norm.weight / (variance + norm.eps).sqrt()
    return (y - mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]
