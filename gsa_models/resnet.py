"""Bottleneck ResNets whose 3x3 convolutions are, block by block, convolutions or global self-attention.

Paper: Shen et al., arXiv 2010.03019 (GSA networks); He et al., arXiv 1512.03385 (the bottleneck), with
the stride in the 3x3 ("v1.5") and a block's last batch norm starting at zero (Goyal et al.,
arXiv 1706.02677).
Status: parameters and operations equal the paper's counts; see cost.py.

Letters: B batch   C channels   S = H = W side of a map
"""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from gsa_models.attention import COMPONENTS, GlobalSelfAttention

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

    Raises ValueError for a placement that does not fit blocks, an unknown stem, an image_size whose maps
    cannot be halved, and whatever GlobalSelfAttention refuses.
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
        self.stem = _stem(stem, in_channels, width)
        self.groups = nn.Sequential()
        channels = width
        for i, (letters, side) in enumerate(zip(placement, sides, strict=True)):
            stride = 1 if i == 0 else 2
            group = _group(letters, channels, width << i, stride=stride, side=side, make_gsa=make_gsa)
            self.groups.append(group)
            channels = (width << i) * EXPANSION
        self.head = _head(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.groups(self.stem(x)))
        return logits


class Bottleneck(nn.Module):
    """1x1 down to width, a spatial layer, 1x1 up to EXPANSION * width, plus the shortcut.

    (B, channels, S, S) -> (B, EXPANSION * width, S/stride, S/stride); spatial has the stride in it.
    """

    def __init__(self, channels: int, width: int, *, stride: int, spatial: nn.Module) -> None:
        super().__init__()
        out = width * EXPANSION
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
        return F.relu(y + self.shortcut(x), inplace=True)


def _group(
    letters: str,
    channels: int,
    width: int,
    *,
    stride: int,
    side: int,
    make_gsa: Callable[..., GlobalSelfAttention],
) -> nn.Sequential:
    """The blocks of one group; the first alone has the stride, and the side of the map that comes in."""
    group = nn.Sequential()
    for letter in letters:
        if letter == GSA:
            spatial: nn.Module = _pooled(make_gsa(width, map_size=(side, side)), stride)
        else:
            spatial = _convolution(width, width, 3, stride=stride)
        group.append(Bottleneck(channels, width, stride=stride, spatial=spatial))
        channels, side, stride = width * EXPANSION, -(-side // stride), 1
    return group


def _pooled(gsa: GlobalSelfAttention, stride: int) -> nn.Module:
    """The module runs on the larger map; only then is the map halved."""
    return gsa if stride == 1 else nn.Sequential(gsa, nn.AvgPool2d(stride))


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

    Raises ValueError for an unknown stem, and where a group cannot halve its map: one pixel is the end, and
    behind a GSA module the pool rounds an odd side down while the shortcut's convolution rounds it up.
    """
    if stem not in STEM_STRIDES:
        raise ValueError(f"unknown stem {stem!r}; stems are {', '.join(STEM_STRIDES)}")
    side = -(-image_size // STEM_STRIDES[stem])
    sides = [side]
    for group, letters in enumerate(placement[1:], start=2):
        pooled = letters[0] == GSA
        if side < 2 or (pooled and side % 2):
            need = "an even side, because its GSA module is pooled by two" if pooled else "at least 2 pixels"
            multiple = STEM_STRIDES[stem] * 2 ** (len(placement) - 1)
            raise ValueError(
                f"image_size {image_size} with the {stem} stem leaves group {group} a map of {side}x{side} "
                f"to halve, which needs {need}; {_multiples_around(image_size, multiple)} would do"
            )
        sides.append(side)
        side = -(-side // 2)
    return sides


def _multiples_around(number: int, step: int) -> str:
    below = number // step * step
    return f"image_size {below} or {below + step}" if below > 0 else f"image_size {step}"


def _check_placement(placement: Sequence[str], blocks: Sequence[int]) -> None:
    if [len(letters) for letters in placement] != list(blocks) or min(blocks, default=0) < 1:
        raise ValueError(f"placement {'/'.join(placement)!r} does not fit groups of {list(blocks)} blocks")
    unknown = set("".join(placement)) - {CONVOLUTION, GSA}
    if unknown:
        raise ValueError(
            f"placement {'/'.join(placement)!r} has {sorted(unknown)[0]!r}; "
            f"expected {CONVOLUTION} (convolution) or {GSA} (GSA) for each block"
        )
