"""Named models, `create_model` and `list_models`, and the grammar of placements and components."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from gsa_models.attention import COMPONENTS, ordered_components
from gsa_models.layout import shortest_placement
from gsa_models.resnet import CONVOLUTION, GSA, ResNet


@dataclass(frozen=True)
class Architecture:
    """What a name stands for: blocks of each group, width of the first, and where GSA goes by default."""

    blocks: tuple[int, ...]
    width: int
    placement: str


_DEPTHS = {
    "26": ((1, 2, 4, 1), 64),
    "38": ((2, 3, 5, 2), 64),
    "50": ((3, 4, 6, 3), 64),
    "101": ((3, 4, 23, 3), 64),
    "_tiny": ((1, 1, 1, 1), 16),  # for tests and images of 32 pixels
}
ARCHITECTURES = {
    f"{family}{depth}": Architecture(blocks, width, placement)
    for family, placement in (("gsa_resnet", "all"), ("resnet", "none"))
    for depth, (blocks, width) in _DEPTHS.items()
}


def list_models() -> list[str]:
    """The names that `create_model` knows."""
    return list(ARCHITECTURES)


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    image_size: int = 224,
    stem: str = "imagenet",
    in_channels: int = 3,
    placement: str | None = None,
    components: str = "content+column+row",
    window: int | None = None,
    heads: int = 8,
    query_softmax: bool = False,
    drop_path: float = 0.0,
) -> ResNet:
    """Build a network with fresh weights, on torch's current default device.

    placement: see `parse_placement`; None is the name's own, `all` for gsa_* and `none` for the others.
    components: see `parse_components`. The rest: see `ResNet` and `GlobalSelfAttention`.
    A network without a GSA block warns of GSA settings that it cannot use.

    Raises ValueError for an unknown name, and for values that cannot be built.
    """
    architecture = _architecture(name)
    if min(num_classes, in_channels) < 1:
        raise ValueError(f"num_classes {num_classes} and in_channels {in_channels} must be at least 1")
    letters = _letters(architecture.placement if placement is None else placement, architecture.blocks)
    if GSA not in "".join(letters):
        _warn_of_unused(name, components=components, window=window, query_softmax=query_softmax)
    return ResNet(
        architecture.blocks,
        placement=letters,
        width=architecture.width,
        image_size=image_size,
        num_classes=num_classes,
        in_channels=in_channels,
        stem=stem,
        heads=heads,
        components=parse_components(components).split("+"),
        window=window,
        query_softmax=query_softmax,
        drop_path=drop_path,
    )


def _architecture(name: str) -> Architecture:
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    close = get_close_matches(name, ARCHITECTURES, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise ValueError(f"model {name!r} is unknown; {hint}(models: {', '.join(ARCHITECTURES)})")


def _warn_of_unused(name: str, *, components: str, window: int | None, query_softmax: bool) -> None:
    unused = []
    if parse_components(components) != "+".join(COMPONENTS):
        unused.append(f"components={components}")
    if window is not None:
        unused.append(f"window={window}")
    if query_softmax:
        unused.append("query_softmax")
    if unused:
        warnings.warn(f"{name} has no GSA block here: {', '.join(unused)} changes nothing", stacklevel=3)


def parse_placement(text: str, blocks: Sequence[int]) -> str:
    """Bring a placement into its shortest form: equal placements of a network give equal strings.

    text: a letter a group (`cggg`), or a letter a block with slashes between groups (`ccc/cggg/gggggg/ggg`),
    c for a 3x3 convolution and g for GSA; or `all`, `none`, `last:2` (GSA in the last two groups).
    blocks: blocks of each group. Returns letters by group if every group is uniform, else by block.

    Raises ValueError with the position of what does not fit.
    """
    return shortest_placement(_letters(text, blocks))


def _letters(text: str, blocks: Sequence[int]) -> tuple[str, ...]:
    """A placement as one string of letters for each group, one letter a block."""
    if "/" in text:
        groups, counts, unit = text.split("/"), list(blocks), "groups between slashes"
    else:
        groups, counts, unit = list(_preset(text, len(blocks))), [1] * len(blocks), "letters"
    if len(groups) != len(blocks):
        raise ValueError(
            f"placement {text!r}: got {len(groups)} {unit}, expected {len(blocks)}; {_usage(blocks)}"
        )
    for position, (group, count) in enumerate(zip(groups, counts, strict=True), start=1):
        _check_group(text, group, position, count=count, blocks=blocks)
    return tuple(
        group * (block_count // len(group)) for group, block_count in zip(groups, blocks, strict=True)
    )


def _preset(text: str, groups: int) -> str:
    """`all`, `none` and `last:N` in letters; any other text as it is."""
    last = {"all": str(groups), "none": "0"}.get(text, text.removeprefix("last:"))
    if last == text:
        return text
    if not last.isdecimal() or int(last) > groups:
        raise ValueError(
            f"placement {text!r}: expected last:0 to last:{groups}, got {last!r} after the colon"
        )
    return CONVOLUTION * (groups - int(last)) + GSA * int(last)


def _check_group(text: str, group: str, position: int, *, count: int, blocks: Sequence[int]) -> None:
    for block, letter in enumerate(group, start=1):
        if letter not in (CONVOLUTION, GSA):
            where = f"group {position}, block {block}" if "/" in text else f"group {position}"
            raise ValueError(
                f"placement {text!r}, {where}: got {letter!r}, "
                f"expected {CONVOLUTION} (convolution) or {GSA} (GSA); {_usage(blocks)}"
            )
    if len(group) != count:
        raise ValueError(
            f"placement {text!r}, group {position}: got {len(group)} letters, expected {count}; "
            f"{_usage(blocks)}"
        )


def _usage(blocks: Sequence[int]) -> str:
    by_block = "/".join(GSA * count for count in blocks)
    return f"for example {GSA * len(blocks)}, {by_block}, all, none or last:2"


def parse_components(text: str) -> str:
    """Bring component names, joined by `+` in any order, into the order content+column+row.

    Raises ValueError for an unknown, repeated or missing name.
    """
    return "+".join(ordered_components(text.split("+")))
