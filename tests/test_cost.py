"""The paper's counts, exactly, and the counter against PyTorch's own."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gsa_models import PAPER_TABLE, Cost, create_model, model_cost
from gsa_models.cost import PaperRow


def cost_of(name: str, *, image_size: int = 224, **settings: Any) -> Cost:
    with torch.device("meta"):
        model = create_model(name, image_size=image_size, **settings)
    return model_cost(model, image_size)


def in_units(cost: Cost, digits: int = 3) -> tuple[float, float]:
    """(million parameters, GFLOPs), rounded as the paper's tables are."""
    return round(cost.params / 1e6, digits), round(cost.flops / 1e9, digits)


# The gate. Every figure is counted by the convention that fits what the paper reports; see PAPER_TABLE.


@pytest.mark.parametrize("row", PAPER_TABLE, ids=lambda row: row.model)
def test_depths_at_224_cost_what_the_paper_says(row: PaperRow) -> None:
    cost = cost_of(row.model)
    assert (cost.params, round(cost.flops / 1e9, 3)) == (row.params, row.gflops)
    if row.reported is not None:
        assert "{}M / {}G".format(*in_units(cost, 1)) == row.reported


@pytest.mark.parametrize(
    ("name", "params", "gflops"),
    [
        ("resnet26", 11_844_772, 1.455),
        ("gsa_resnet26", 8_492_372, 1.383),
        ("resnet38", 17_775_012, 2.026),
        ("gsa_resnet38", 12_339_428, 1.783),
        ("resnet50", 23_705_252, 2.596),
        ("gsa_resnet50", 16_186_484, 2.182),
    ],
)
def test_depths_at_32_with_the_small_stem_cost_what_was_counted(
    name: str, params: int, gflops: float
) -> None:
    cost = cost_of(name, image_size=32, num_classes=100, stem="small")
    assert (cost.params, round(cost.flops / 1e9, 3)) == (params, gflops)


@pytest.mark.parametrize(
    ("components", "expected"),
    [
        ("content+column+row", (18.053, 7.170)),
        ("content+column", (18.029, 6.868)),
        ("content+row", (18.029, 6.868)),
        ("column+row", (16.795, 6.368)),
        ("content", (18.012, 6.566)),
        ("column", (16.771, 6.066)),
        ("row", (16.771, 6.066)),
    ],
)
def test_component_ablation_costs_what_was_counted(components: str, expected: tuple[float, float]) -> None:
    assert in_units(cost_of("gsa_resnet50", components=components)) == expected


@pytest.mark.parametrize(
    ("placement", "expected"),
    [
        ("none", (25.557, 8.178)),
        ("cccg", (20.848, 8.000)),
        ("ccgg", (18.504, 7.437)),
        ("cggg", (18.121, 7.344)),
        ("gggg", (18.053, 7.170)),
        ("gccc", (25.489, 8.005)),
        ("ggcc", (25.106, 7.912)),
        ("gggc", (22.762, 7.349)),
    ],
)
def test_group_ablation_costs_what_was_counted(placement: str, expected: tuple[float, float]) -> None:
    assert in_units(cost_of("gsa_resnet50", placement=placement)) == expected


@pytest.mark.parametrize(("window", "gflops"), [(3, 6.61), (7, 6.67), (15, 6.79), (31, 6.97), (None, 7.17)])
def test_window_ablation_costs_what_was_counted(window: int | None, gflops: float) -> None:
    assert round(cost_of("gsa_resnet50", window=window).flops / 1e9, 2) == gflops


# The counter itself.


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("resnet_tiny", {}),
        ("gsa_resnet_tiny", {}),
        ("gsa_resnet_tiny", {"stem": "small", "heads": 2}),
        ("gsa_resnet_tiny", {"components": "column+row", "placement": "cggc"}),
        ("gsa_resnet_tiny", {"components": "content+row"}),
        ("gsa_resnet26", {"components": "content"}),
    ],
    ids=str,
)
def test_flops_equal_those_of_a_real_forward_pass(name: str, settings: dict[str, Any]) -> None:
    model = create_model(name, image_size=32, num_classes=10, **settings).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.randn(3, 3, 32, 32))
    assert 3 * model_cost(model, 32).flops == counter.get_total_flops()


def test_params_equal_the_model_s_and_stages_name_its_parts() -> None:
    model = create_model("gsa_resnet_tiny", image_size=32)
    cost = model_cost(model, 32)
    assert cost.params == sum(parameter.numel() for parameter in model.parameters())
    assert [stage.name for stage in cost.stages] == ["stem", "group1", "group2", "group3", "group4", "head"]
    head = cost.stages[-1]
    assert (head.params, head.flops) == (512 * 1000 + 1000, 2 * 512 * 1000)


def test_counting_leaves_a_real_model_as_it_was() -> None:
    model = create_model("gsa_resnet_tiny", image_size=8, stem="small", in_channels=1).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model_cost(model, 8, in_channels=1)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_made_for_another_size_is_refused_and_left_clean() -> None:
    with torch.device("meta"):
        model = create_model("gsa_resnet_tiny", image_size=32)
    with pytest.raises(ValueError, match=r"expected an input of \(batch, 16, 8, 8\), got \(2, 16, 16, 16\)"):
        model_cost(model, 64)
    assert not any(module._forward_hooks for module in model.modules())
