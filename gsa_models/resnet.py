"""Bottleneck ResNets whose 3x3 convolutions are, block by block, convolutions or global self-attention.

Paper: Shen et al., arXiv 2010.03019 (GSA networks); He et al., arXiv 1512.03385 (the bottleneck), with
the stride in the 3x3 ("v1.5") and a block's last batch norm starting at zero (Goyal et al.,
arXiv 1706.02677); Huang et al., arXiv 1603.09382 (stochastic depth).
Status: parameters and operations equal the paper's counts; see cost.py.

Letters: B batch   C channels   S = H = W side of a map
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from gsa_models.attention import COMPONENTS, GlobalSelfAttention
from gsa_models.layout import check_fit

CONVOLUTION, GSA = "c", "g"  # the letters of a placement
STEM_STRIDES = {"imagenet": 4, "small": 1}
EXPANSION = 4


class ResNet(nn.Module):
    """(B, in_channels, image_size, image_size) -> logits (B, num_classes).

    blocks: blocks of each group; from group to group the map halves and the width doubles.
    width: bottleneck channels of the first group; a group puts out EXPANSION times its width.
    placement: for each group one letter a block, `c` a 3x3 convolution, `g` a GSA module.
    stem: `imagenet` (7x7 stride 2, max-pool) or `small` (3x3 stride 1, for images of 32 pixels or so).
    heads, components, window, query_softmax: as in GlobalSelfAttention.
    drop_path: in training the last block's branch is dropped with this probability, the first's never, those
    between on a line; at 0 no random number is drawn. See `stochastic_depth`.

    The state_dict, i and j counting groups and their blocks from 0; these names are kept:
        stem.0.weight                     (width, in_channels, 7, 7), or 3, 3 in the small stem; stem.1.* its norm
        groups.i.j.{reduce,expand}.weight, {reduce,spatial,expand}_norm.*, shortcut.{0,1}.* where there is one
        groups.i.j.spatial.weight         (w, w, 3, 3) of a convolution, w = width * 2**i
        groups.i.j.spatial.[0.]NAME       of a GSA module, `0.` where a pool follows (j = 0 < i): qkv.weight
                                          (3w, w, 1, 1), query, key, value, or (2w, w, 1, 1) without content;
                                          column_table, row_table (2n-1 or window, w / heads); mid_norm.*
        head.2.weight, head.2.bias        (num_classes, channels), (num_classes,)
    It does not tell query_softmax, nor heads where there are no tables.

    Raises ValueError for a placement that does not fit blocks, an unknown stem, an image_size too small to
    be halved so often, a drop_path outside [0, 1), and whatever GlobalSelfAttention refuses.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        *,
        placement: Sequence[str],
        width: int = 64,
        image_size: int = 224,
        num_classes: int = 1000,
        in_channels: int = 3,
        stem: str = "imagenet",
        heads: int = 8,
        components: Sequence[str] = COMPONENTS,
        window: int | None = None,
        query_softmax: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        _check_placement(placement, blocks)
        sides = map_sides(image_size, stem=stem, placement=placement)
        make_gsa = partial(
            GlobalSelfAttention,
            heads=heads,
            components=components,
            window=window,
            query_softmax=query_softmax,
        )
        ramp = iter(drop_path_ramp(drop_path, sum(blocks)))
        self.in_channels = in_channels
        self.stem = _stem(stem, in_channels, width)
        self.groups = nn.Sequential()
        channels = width
        for i, (letters, side) in enumerate(zip(placement, sides, strict=True)):
            group = _group(
                letters,
                channels,
                width << i,
                stride=1 if i == 0 else 2,
                side=side,
                make_gsa=make_gsa,
                drop_paths=list(islice(ramp, len(letters))),
            )
            self.groups.append(group)
            channels = (width << i) * EXPANSION
        self.head = _head(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.groups(self.stem(x)))
        return logits

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As of nn.Module, but a strict load that does not fit is refused before anything is copied.

        Raises ValueError that says what the state_dict is of: placement, components, image_size, num_classes ...
        """
        if strict:
            check_fit(state_dict, self.state_dict())
        return super().load_state_dict(state_dict, strict=strict, assign=assign)


class Bottleneck(nn.Module):
    """1x1 down to width, a spatial layer, 1x1 up to EXPANSION * width, plus the shortcut.

    (B, channels, S, S) -> (B, EXPANSION * width, S/stride, S/stride), rounded up; spatial has the stride in it.
    drop_path: the probability that a sample takes the shortcut alone, in training.
    """

    def __init__(
        self, channels: int, width: int, *, stride: int, spatial: nn.Module, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        out = width * EXPANSION
        self.drop_path = drop_path
        self.reduce = _convolution(channels, width, 1)
        self.reduce_norm = nn.BatchNorm2d(width)
        self.spatial = spatial
        self.spatial_norm = nn.BatchNorm2d(width)
        self.expand = _convolution(width, out, 1)
        self.expand_norm = nn.BatchNorm2d(out)
        nn.init.zeros_(self.expand_norm.weight)  # a block starts as its shortcut: large batches need it
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or channels != out:
            self.shortcut = nn.Sequential(_convolution(channels, out, 1, stride=stride), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.reduce_norm(self.reduce(x)), inplace=True)  # (B, width, S, S)
        y = F.relu(self.spatial_norm(self.spatial(y)), inplace=True)  # (B, width, S/stride, S/stride)
        y = self.expand_norm(self.expand(y))
        if self.training and self.drop_path > 0:
            y = stochastic_depth(y, self.drop_path)
        return F.relu(y + self.shortcut(x), inplace=True)


def stochastic_depth(branch: Tensor, probability: float) -> Tensor:
    """Zero the branch of each sample with a probability below 1, and scale the others up to the same mean.

    branch: (B, ...). Source: Huang et al., arXiv 1603.09382, scaled in training instead of at test. The mask is
    drawn from torch's default generator of the branch's device: to repeat it, seed that before the forward pass.
    """
    ones = branch.new_ones(branch.shape[0], *[1] * (branch.dim() - 1))
    return branch * F.dropout(ones, probability)


def drop_path_ramp(drop_path: float, blocks: int) -> list[float]:
    """The probability of each block, on a line from 0 at the first to drop_path at the last.

    Raises ValueError for a drop_path outside [0, 1).
    """
    if not 0 <= drop_path < 1:
        raise ValueError(f"drop_path must be a probability from 0 to below 1, got {drop_path}")
    return [drop_path * i / max(blocks - 1, 1) for i in range(blocks)]


def _group(
    letters: str,
    channels: int,
    width: int,
    *,
    stride: int,
    side: int,
    make_gsa: Callable[..., GlobalSelfAttention],
    drop_paths: Sequence[float],
) -> nn.Sequential:
    """The blocks of one group; the first alone has the stride, and the side of the map that comes in."""
    group = nn.Sequential()
    for letter, drop_path in zip(letters, drop_paths, strict=True):
        if letter == GSA:
            spatial: nn.Module = _pooled(make_gsa(width, map_size=(side, side)), stride)
        else:
            spatial = _convolution(width, width, 3, stride=stride)
        group.append(Bottleneck(channels, width, stride=stride, spatial=spatial, drop_path=drop_path))
        channels, side, stride = width * EXPANSION, -(-side // stride), 1
    return group


def _pooled(gsa: GlobalSelfAttention, stride: int) -> nn.Module:
    """The module runs on the larger map; only then is the map halved, rounded up as the shortcut's is."""
    if stride == 1:
        return gsa
    return nn.Sequential(gsa, nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False))


def _stem(name: str, in_channels: int, width: int) -> nn.Sequential:
    small = name == "small"
    stem = nn.Sequential(
        _convolution(in_channels, width, 3 if small else 7, stride=1 if small else 2),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    )
    return stem if small else stem.append(nn.MaxPool2d(3, stride=2, padding=1))


def _head(channels: int, num_classes: int) -> nn.Sequential:
    linear = nn.Linear(channels, num_classes)
    nn.init.normal_(linear.weight, std=0.01)  # as Goyal et al.: near-uniform predictions at the start
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)


def _convolution(channels: int, out: int, kernel: int, *, stride: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(channels, out, kernel, stride=stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def map_sides(image_size: int, *, stem: str, placement: Sequence[str]) -> list[int]:
    """The side of the map that enters each group, in pixels.

    Raises ValueError for an unknown stem, and for an image so small that a group has one pixel to halve.
    """
    if stem not in STEM_STRIDES:
        raise ValueError(f"unknown stem {stem!r}; stems are {', '.join(STEM_STRIDES)}")
    halvings = len(placement) - 1  # on entering each group but the first
    # The last halving needs two pixels; sides are rounded up.
    smallest = STEM_STRIDES[stem] * 2 ** (halvings - 1) + 1 if halvings else 1
    if image_size < smallest:
        raise ValueError(
            f"image_size {image_size} is too small: the {stem} stem and {halvings} groups that halve their map "
            f"need {smallest} pixels or more"
        )
    side = -(-image_size // STEM_STRIDES[stem])
    return [side, *(-(-side // 2**i) for i in range(halvings))]


def _check_placement(placement: Sequence[str], blocks: Sequence[int]) -> None:
    if [len(letters) for letters in placement] != list(blocks) or min(blocks, default=0) < 1:
        raise ValueError(f"placement {'/'.join(placement)!r} does not fit groups of {list(blocks)} blocks")
    unknown = set("".join(placement)) - {CONVOLUTION, GSA}
    if unknown:
        raise ValueError(
            f"placement {'/'.join(placement)!r} has {sorted(unknown)[0]!r}; "
            f"expected {CONVOLUTION} (convolution) or {GSA} (GSA) for each block"
        )
