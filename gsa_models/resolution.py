"""Another image size for trained weights: the tables of relative positions, resampled for the new maps.

Source: none is known; the rule is ours.
Letters: n pixels a side of the trained map   m of the new one   D channels a head
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from gsa_models.attention import GlobalSelfAttention
from gsa_models.layout import check_fit, settings_of, shapes_of


def resize_positions(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Fit the relative-position tables of trained weights to `model`, built for another image_size.

    A table of 2n-1 rows holds samples, at the offsets -(n-1)..(n-1), of a function of the distance in sides of
    the map: both maps show the whole picture. `resized_table` samples it for m pixels, each axis by itself.
    A table that fits already, and all that is no table, is handed on: the very same tensors.
    Dtype and device of a table stay, state_dict is not changed, and model may lie on the meta device.

    Tables of a module with a window count in pixels and stay: on a larger map a window sees less of it.
    The statistics of batch norms stay too, and suit the trained size: a network that was trained briefly, on
    one size, loses most of its accuracy elsewhere, with these tables or with convolutions. Collected anew on
    a larger size they brought much of it back, a few steps of fine-tuning more, at smaller sizes too. Start
    the optimizer anew then: its state of the tables would not fit.

    Raises ValueError where the weights do not fit otherwise: another placement, components, heads, window ...
    Where all tables are of maps of one side, those of a window are taken for those of a small map, whose look
    they have.
    """
    wanted = model.state_dict()
    sides = {name: side for name, side in _table_sides(model) if name in state_dict}
    if sides and settings_of(shapes_of(state_dict)).get("window") is not None:
        check_fit(state_dict, wanted)  # refuses them: tables of a window would pass for those of a small map
    resized = {**state_dict, **{name: resized_table(state_dict[name], side) for name, side in sides.items()}}
    check_fit(resized, wanted)
    return resized


def resized_table(table: Tensor, pixels: int) -> Tensor:
    """Resample a table (2n-1, D) for a map of m = `pixels` a side: (2m-1, D); the table itself where m = n.

    The new row at offset p is n/m times the function at the old offset p*n/m. Where the map grows, that is
    linear interpolation, with the end rows held beyond the ends; where it shrinks, a mean weighted by a
    triangle of n/m old pixels to each side, so that no row is passed over.
    n/m, because the positional branch is a plain sum over the m keys of a line, that no softmax divides:
    a Riemann sum, whose terms shrink as their number grows. p*n/m and not p*(n-1)/(m-1), because the
    centres of pixels that are p apart are p/m of the side apart. Computes in float32 at least.

    Raises ValueError for a table without a middle row.
    """
    if table.dim() != 2 or len(table) % 2 == 0:
        raise ValueError(f"a table must be (2n-1, channels), got {tuple(table.shape)}")
    n, m = (len(table) + 1) // 2, pixels
    if n == m:
        return table
    old, new = (torch.arange(1 - side, side, device=table.device) for side in (n, m))
    distances = (old * m - new[:, None] * n).abs()  # (2m-1, 2n-1), in 1/m of an old pixel: exact
    dtype = torch.promote_types(table.dtype, torch.float32)
    weights = (1 - distances.to(dtype) / max(n, m)).relu()
    weights = weights / weights.sum(dim=1, keepdim=True) * (n / m)
    products = weights[:, :, None] * table.detach().to(dtype)  # no matmul: TF32 or autocast would round it
    return products.sum(dim=1).to(table.dtype)


def _table_sides(model: nn.Module) -> Iterator[tuple[str, int]]:
    """The name of each table that goes with its map's size, and the pixels of that map on the table's axis."""
    for name, module in model.named_modules():
        if isinstance(module, GlobalSelfAttention) and module.window is None:
            for axis, side in zip(("column", "row"), module.map_size, strict=True):
                if axis in module.components:
                    yield f"{name}.{axis}_table".removeprefix("."), side
