"""Tables for another map: what they compute there, what stays, and what is refused."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gsa_models.attention import GlobalSelfAttention
from gsa_models.branches import axial_attention
from gsa_models.resnet import ResNet
from gsa_models.resolution import resize_positions, resized_table
from gsa_models.zoo import create_model


def tiny(image_size: int, **settings: Any) -> ResNet:
    defaults: dict[str, Any] = {"stem": "small"}
    return create_model("gsa_resnet_tiny", num_classes=3, image_size=image_size, **(defaults | settings))


def smooth(pixels: int, *, seed: int, channels: int = 4) -> Tensor:
    """A fixed smooth picture at the centres of a map's pixels, (1, 1, channels, pixels, pixels)."""
    weights = torch.randn(channels, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    centres = (torch.arange(pixels, dtype=torch.float64) + 0.5) / pixels
    waves = torch.stack([torch.cos(math.pi * f * centres) for f in range(3)])  # (3, pixels)
    return torch.einsum("cfg,fy,gx->cyx", weights, waves, waves)[None, None]


def smooth_table(pixels: int) -> Tensor:
    t = torch.arange(1 - pixels, pixels, dtype=torch.float64) / pixels
    return torch.stack([torch.cos(3 * t) + t, torch.sin(2 * t), 0.5 - t, torch.exp(-t * t)], dim=1) / pixels


def row_output(table: Tensor, pixels: int) -> Tensor:
    return axial_attention(smooth(pixels, seed=1), smooth(pixels, seed=2), table)[0, 0]


def disagreement(n: int, m: int, table: Tensor) -> float:
    """Of the outputs on maps of n and of m pixels, averaged over the cells of the finest map within both."""
    cells = math.gcd(n, m)
    trained = F.avg_pool2d(row_output(smooth_table(n), n)[None], n // cells)
    served = F.avg_pool2d(row_output(table, m)[None], m // cells)
    return float((served - trained).norm() / trained.norm())


def grown_or_cut(table: Tensor, pixels: int) -> Tensor:
    missing = pixels - (len(table) + 1) // 2
    return F.pad(table, (0, 0, missing, missing))


@pytest.mark.parametrize(("n", "m"), [(16, 24), (16, 32), (14, 21), (24, 16), (32, 16), (16, 12)])
def test_a_smooth_picture_gives_the_same_output_at_both_sizes(n: int, m: int) -> None:
    table = smooth_table(n)
    assert disagreement(n, m, resized_table(table, m)) < 0.01
    assert disagreement(n, m, resized_table(table, m) * m / n) > 0.2, "the factor n/m matters"
    assert disagreement(n, m, grown_or_cut(table, m)) > 0.2, "interpolation matters"


def test_the_difference_falls_with_the_square_of_the_pixel() -> None:
    """As it does not with the offsets stretched by (n-1)/(m-1), which errs by a part of a pixel."""
    coarse = disagreement(8, 16, resized_table(smooth_table(8), 16))
    fine = disagreement(32, 64, resized_table(smooth_table(32), 64))
    assert fine < coarse / 12


@pytest.mark.parametrize(("m", "ratio"), [(1, 4), (2, 2), (3, 2), (4, 3)])
def test_a_smaller_map_is_exact_for_pictures_of_whole_cells(m: int, ratio: int) -> None:
    """With any table: outputs averaged over a cell are those of the map that has a pixel for each cell."""
    n = m * ratio
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(2 * n - 1, 4, generator=generator, dtype=torch.float64)
    q, v = torch.randn(2, 1, 1, 4, m, m, generator=generator, dtype=torch.float64)
    fine_q, fine_v = (x[0].repeat_interleave(ratio, -1)[None] for x in (q, v))
    expected = axial_attention(fine_q, fine_v, table)[0]
    got = axial_attention(q, v, resized_table(table, m))[0]
    torch.testing.assert_close(got, F.avg_pool2d(expected, (1, ratio)))


def test_a_doubled_map_has_the_old_rows_halved_and_their_means_between() -> None:
    table = torch.tensor([[8.0], [16.0], [32.0]])  # n = 2, offsets -1, 0, 1
    expected = [[4.0], [4.0], [6.0], [8.0], [12.0], [16.0], [16.0]]  # offsets -3 .. 3; the ends are held
    assert resized_table(table, 4).tolist() == expected


def test_one_pixel_grows_to_a_constant_and_back() -> None:
    grown = resized_table(torch.tensor([[3.0, 6.0]]), 3)
    assert grown.tolist() == [[1.0, 2.0]] * 5
    torch.testing.assert_close(resized_table(grown, 1), torch.tensor([[3.0, 6.0]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_table_keeps_its_dtype_and_is_rounded_once(dtype: torch.dtype) -> None:
    table = torch.randn(13, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    got = resized_table(table, 10)
    assert got.dtype == dtype
    finer = torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(got, resized_table(table.to(finer), 10).to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("image_size", [8, 16, 48])
def test_all_but_the_tables_is_handed_on_and_nothing_changes(image_size: int) -> None:
    trained = tiny(32).state_dict()
    before = {name: tensor.clone() for name, tensor in trained.items()}
    with torch.device("meta"):
        shape_only = tiny(image_size)
    resized = resize_positions(trained, shape_only)
    assert list(resized) == list(trained)
    for name, tensor in resized.items():
        assert tensor is trained[name] or name.endswith("_table"), name
        assert torch.equal(trained[name], before[name]), name
    model = tiny(image_size)
    model.load_state_dict(resized)
    assert model(torch.zeros(2, 3, image_size, image_size)).shape == (2, 3)


def test_the_same_size_is_the_same_weights() -> None:
    trained = tiny(32).state_dict()
    assert all(tensor is trained[name] for name, tensor in resize_positions(trained, tiny(32)).items())


def test_each_axis_of_a_single_module_is_resized_by_itself() -> None:
    trained = GlobalSelfAttention(8, map_size=(4, 6))
    served = GlobalSelfAttention(8, map_size=(8, 6))
    resized = resize_positions(trained.state_dict(), served)
    assert resized["column_table"].shape == (15, 1)
    assert torch.equal(resized["row_table"], trained.row_table)  # type: ignore[arg-type]


def test_a_window_is_in_pixels_and_stays() -> None:
    trained = tiny(32, window=5).state_dict()
    assert all(
        tensor is trained[name] for name, tensor in resize_positions(trained, tiny(48, window=5)).items()
    )


def test_a_convolution_network_fits_every_size() -> None:
    trained = tiny(32, placement="none").state_dict()
    assert resize_positions(trained, tiny(48, placement="none")) == trained


@pytest.mark.parametrize(
    ("trained", "served", "message"),
    [
        (
            {"placement": "cggg"},
            {},
            "of placement='cggg'; the model is of placement='gggg'; next: create_model",
        ),
        ({}, {"placement": "cggg"}, "of placement='gggg'"),
        ({"components": "row"}, {"components": "column"}, "of components='row'"),
        ({}, {"components": "row"}, r"of components='content\+column\+row'"),
        ({"window": 3}, {"window": 5}, "of window=3; the model is of window=5"),
        ({}, {"window": 5}, "of window=None; the model is of window=5"),
        ({"window": 5}, {}, "of window=5; the model is of window=None"),
        ({"heads": 4}, {"heads": 2}, "of heads=4; the model is of heads=2"),
        ({"in_channels": 1}, {}, "of in_channels=1; the model is of in_channels=3"),
    ],
)
def test_weights_of_another_network_are_refused(
    trained: dict[str, Any], served: dict[str, Any], message: str
) -> None:
    weights = tiny(32, **({"heads": 4} | trained)).state_dict()
    with pytest.raises(ValueError, match=message):
        resize_positions(weights, tiny(48, **({"heads": 4} | served)))


def test_a_missing_table_is_named() -> None:
    trained = GlobalSelfAttention(8, map_size=(4, 4)).state_dict()
    del trained["row_table"]
    with pytest.raises(ValueError, match=r"1 missing \(row_table\)"):
        resize_positions(trained, GlobalSelfAttention(8, map_size=(6, 6)))


@pytest.mark.parametrize("shape", [(4, 2), (5,)])
def test_a_table_without_a_middle_row_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"a table must be \(2n-1, channels\), got"):
        resized_table(torch.zeros(shape), 3)
