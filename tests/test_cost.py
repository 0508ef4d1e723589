"""The paper's counts, exactly; the counter against PyTorch's own; measured memory against a real pass."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from gsa_models import PAPER_TABLE, create_model, model_cost
from gsa_models.cost import FIGURES, Cost, Figure, PaperRow, StageCost, written_as


@pytest.mark.parametrize("figure", FIGURES, ids=lambda f: f"{f.model}-{f.settings}-{f.expected}")
def test_every_figure_is_what_is_counted(figure: Figure) -> None:
    assert figure.counted() == figure.expected


def test_the_figures_are_those_of_the_paper_and_its_ablations() -> None:
    """Eight depths, six at 32 pixels; seven component sets, eight placements and five windows of depth 50."""
    kinds = [next(iter(figure.settings), "depth") for figure in FIGURES]
    assert [kinds.count(k) for k in ("depth", "image_size", "components", "placement", "window")] == [
        8,
        6,
        7,
        8,
        5,
    ]


@pytest.mark.parametrize("row", [row for row in PAPER_TABLE if row.reported], ids=lambda row: row.model)
def test_what_is_counted_rounds_to_what_the_paper_reports(row: PaperRow) -> None:
    cost = Cost((StageCost("all", row.params, round(row.gflops * 1e9), 0),))
    assert written_as(str(row.reported), cost) == row.reported


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
    model = create_model("gsa_resnet_tiny", image_size=8, stem="small", in_channels=1, drop_path=0.5)
    model.groups[0].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    model_cost(model, 8)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)


def test_a_model_made_for_another_size_is_refused() -> None:
    with torch.device("meta"):
        model = create_model("gsa_resnet_tiny", image_size=32)
    with pytest.raises(ValueError, match=r"expected an input of \(batch, 16, 8, 8\), got \(2, 16, 16, 16\)"):
        model_cost(model, 64)


# Activation memory.


def kept_bytes(model: torch.nn.Module, images: Tensor) -> int:
    """What a real training pass keeps for its backward pass, by the addresses of the memory."""
    parameters = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held: no address is given away twice
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model.train()(images)
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in parameters)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("resnet_tiny", {}),
        ("resnet_tiny", {"drop_path": 0.5}),
        ("gsa_resnet_tiny", {}),
        ("gsa_resnet_tiny", {"stem": "small", "heads": 2, "window": 3}),
        ("gsa_resnet_tiny", {"components": "column+row", "placement": "cggc"}),
        ("gsa_resnet_tiny", {"components": "content", "query_softmax": True}),
        ("gsa_resnet_tiny", {"components": "content+row", "image_size": 40}),
        ("gsa_resnet26", {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_activation_memory_is_that_of_a_real_training_pass(
    name: str, settings: dict[str, Any], dtype: torch.dtype
) -> None:
    side = settings.get("image_size", 32)
    model = create_model(name, num_classes=10, **{"image_size": side} | settings).to(dtype)
    two, six = (kept_bytes(model, torch.randn(n, 3, side, side, dtype=dtype)) for n in (2, 6))
    assert 4 * model_cost(model, side).activation_bytes == six - two


def test_activation_memory_does_not_depend_on_the_mode_of_the_caller() -> None:
    model = create_model("gsa_resnet_tiny", image_size=32)
    expected = model_cost(model, 32)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert model_cost(model, 32) == expected


def test_activation_memory_of_a_stage_is_what_its_layers_need() -> None:
    """By hand: a convolution keeps its input, a batch norm its input, a ReLU its output; a stage once each."""
    model = create_model("resnet_tiny", image_size=32, num_classes=10)
    stages = {stage.name: stage.activation_bytes for stage in model_cost(model, 32).stages}
    image, map16, map8 = 3 * 32 * 32, 16 * 16 * 16, 16 * 8 * 8
    assert stages["stem"] == 4 * (image + 2 * map16) + 8 * map8  # the max-pool keeps its places as int64
    # The input, 16 channels before and after two norms, 64 after the third, the shortcut's, and the sum.
    assert stages["group1"] == 4 * (map8 + 2 * 2 * map8 + 3 * 4 * map8)
    assert stages["head"] == 4 * 512
    assert model_cost(model, 64).stages[1].activation_bytes == 4 * stages["group1"]
