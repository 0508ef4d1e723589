"""What a state_dict is of, read off its names and shapes: one that does not fit is refused in plain words."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]

_SPATIAL = re.compile(r"groups\.(\d+)\.(\d+)\.spatial\.(?:0\.)?(.+)")  # 0: the module before a pool
_DEPTH = ("blocks", "width")  # what belongs to a model's name


def check_fit(state_dict: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Compare the names and shapes of a state_dict with those of a model's own.

    Raises ValueError that says what the state_dict is of, what the model is, and the next move.
    """
    given, expected = shapes_of(state_dict), shapes_of(own)
    if given == expected:
        return
    theirs, ours = settings_of(given), settings_of(expected)
    differing = [key for key in theirs if key in ours and theirs[key] != ours[key]]
    differing = [key for key in differing if key in _DEPTH] or differing
    if not differing:
        raise ValueError(f"state_dict does not fit the model: {_differences(given, expected)}")
    raise ValueError(
        f"state_dict is of {_listed(theirs, differing)}; the model is of {_listed(ours, differing)}; "
        f"next: {_advice(theirs, differing)}"
    )


def shapes_of(state_dict: Mapping[str, Any]) -> Shapes:
    """The shapes by name; () for what is no tensor."""
    return {n: tuple(value.shape) if isinstance(value, Tensor) else () for n, value in state_dict.items()}


def settings_of(shapes: Shapes) -> dict[str, Any]:
    """The settings of a network that its state_dict tells; none for a foreign state_dict.

    Image sizes with the same maps share their tables: the largest of them is given. Where all tables are of
    maps of one side, a window cannot be told from a size: then there is `table_rows` instead of both.
    """
    stem, head, groups = shapes.get("stem.0.weight", ()), shapes.get("head.2.weight", ()), _groups(shapes)
    if len(stem) != 4 or len(head) != 2 or not groups:
        return {}
    small = stem[2] == 3
    letters = ["".join("c" if block.keys() == {"weight"} else "g" for block in blocks) for blocks in groups]
    return {
        "blocks": tuple(len(blocks) for blocks in groups),
        "width": stem[0],
        "placement": shortest_placement(letters),
        **_attention_settings(groups),
        **_table_settings(groups, stem_stride=1 if small else 4),
        "stem": "small" if small else "imagenet",
        "in_channels": stem[1],
        "num_classes": head[0],
    }


def shortest_placement(letters: Sequence[str]) -> str:
    """Letters of the blocks of each group, as letters by group if every group is uniform, else by block."""
    if all(len(set(group)) == 1 for group in letters):
        return "".join(group[0] for group in letters)
    return "/".join(letters)


def _groups(shapes: Shapes) -> list[list[dict[str, tuple[int, ...]]]]:
    """For each block of each group the shapes below its spatial layer: a lone `weight` is a convolution."""
    found: dict[int, dict[int, dict[str, tuple[int, ...]]]] = {}
    for name, shape in shapes.items():
        if match := _SPATIAL.fullmatch(name):
            group, block, rest = int(match[1]), int(match[2]), match[3]
            found.setdefault(group, {}).setdefault(block, {})[rest] = shape
    return [[blocks[i] for i in sorted(blocks)] for _, blocks in sorted(found.items())]


def _attention_settings(groups: list[list[dict[str, tuple[int, ...]]]]) -> dict[str, Any]:
    """components, and heads where there is a table to tell them."""
    module = next((block for blocks in groups for block in blocks if "qkv.weight" in block), None)
    if module is None:
        return {}
    channels, dim = module["qkv.weight"][:2]
    tables = {axis: module[f"{axis}_table"] for axis in ("column", "row") if f"{axis}_table" in module}
    components = "+".join([*(["content"] if channels == 3 * dim else []), *tables])
    if not tables:
        return {"components": components}
    return {"components": components, "heads": dim // next(iter(tables.values()))[1]}


def _table_settings(groups: list[list[dict[str, tuple[int, ...]]]], *, stem_stride: int) -> dict[str, Any]:
    """window and image_size, or table_rows where they cannot be told apart."""
    tables = {  # (how often the stem's map was halved, rows)
        (i if j else max(i - 1, 0), block[name][0])
        for i, blocks in enumerate(groups)
        for j, block in enumerate(blocks)
        for name in ("column_table", "row_table")
        if name in block
    }
    if not tables:
        return {}
    halved, rows = min(tables)
    if len({rows for _, rows in tables}) > 1:
        return {"window": None, "image_size": ((rows + 1) // 2 << halved) * stem_stride}
    return {"window": rows} if len(tables) > 1 else {"table_rows": rows}


def _listed(settings: Mapping[str, Any], names: Iterable[str]) -> str:
    return ", ".join(f"{name}={settings[name]!r}" for name in names)


def _advice(theirs: Mapping[str, Any], differing: Sequence[str]) -> str:
    if set(differing) <= set(_DEPTH):
        return "create_model with the name of the network that it was saved from"
    arguments = _listed(theirs, (key for key in differing if key != "table_rows"))
    steps = [f"create_model(..., {arguments})"] if arguments else []
    if "table_rows" in differing:
        steps.append("a model of the image_size or window of the state_dict")
    if set(differing) <= {"image_size", "table_rows"}:
        steps.append("resize_positions(state_dict, model) for tables of the model's image_size")
    return ", or ".join(steps)


def _differences(given: Shapes, expected: Shapes) -> str:
    """How many names are missing, unexpected or of another shape, and the first of each."""
    missing = [name for name in expected if name not in given]
    unexpected = [name for name in given if name not in expected]
    reshaped = [
        f"{name}: expected {shape}, got {given[name]}"
        for name, shape in expected.items()
        if name in given and given[name] != shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    return "; ".join(f"{len(names)} {kind} ({names[0]})" for kind, names in kinds.items() if names)
