"""Parameters and operations of a network, stage by stage, and the paper's table to hold them against.

Counted as the paper's reported sizes demand: a multiply-accumulate is 2 FLOPs; convolutions, linear layers
and the matrix products of attention count; batch norm, ReLU, softmax, pooling and sums do not. A window of
L pixels counts min(L, n) taps a pixel, borders not cut: what the method needs, though attention.py
multiplies by the zeros outside.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gsa_models.attention import GlobalSelfAttention
from gsa_models.resnet import ResNet


@dataclass(frozen=True)
class StageCost:
    """One row: stem, group1, group2, ..., head; flops are for one image."""

    name: str
    params: int
    flops: int


@dataclass(frozen=True)
class Cost:
    """A network's parameters and its FLOPs for one image; the stages sum up to both."""

    stages: tuple[StageCost, ...]

    @property
    def params(self) -> int:
        return sum(stage.params for stage in self.stages)

    @property
    def flops(self) -> int:
        return sum(stage.flops for stage in self.stages)


@dataclass(frozen=True)
class PaperRow:
    """A network of the paper at 224x224 with 1000 classes: what we count, and what its text reports."""

    model: str
    params: int
    gflops: float
    reported: str | None = None  # None: no figure is known
    recalled: bool = False  # the reported figure is from memory of the paper: say so wherever it is printed


PAPER_TABLE = (
    PaperRow("resnet26", 13_696_552, 4.685),
    PaperRow("resnet38", 19_626_792, 6.431),
    PaperRow("resnet50", 25_557_032, 8.178),
    PaperRow("resnet101", 44_549_160, 15.603),
    PaperRow("gsa_resnet26", 10_352_600, 4.619),
    PaperRow("gsa_resnet38", 14_202_728, 5.895, "14.2M / 5.9G", recalled=True),
    PaperRow("gsa_resnet50", 18_052_856, 7.170, "18.1M / 7.2G"),
    PaperRow("gsa_resnet101", 30_398_392, 12.179, "30.4M / 12.2G", recalled=True),
)


def model_cost(model: ResNet, image_size: int, in_channels: int = 3) -> Cost:
    """Count parameters, and FLOPs for one image of image_size x image_size.

    The shapes come from a forward pass on the meta device: a model built there needs no weights, and one
    built elsewhere does no arithmetic and keeps its state.

    Raises ValueError when a GSA module of the model was made for another image size.
    """
    stages = _stages(model)
    flops = dict.fromkeys(stages, 0)

    def count(stage: str, module: nn.Module, _inputs: object, output: Tensor) -> None:
        flops[stage] += _flops(module, output)

    hooks = [
        module.register_forward_hook(partial(count, name))
        for name, stage in stages.items()
        for module in stage.modules()
    ]
    try:
        _run_on_meta(model, image_size, in_channels)
    finally:
        for hook in hooks:
            hook.remove()
    return Cost(tuple(StageCost(name, _params(stage), flops[name]) for name, stage in stages.items()))


def _stages(model: ResNet) -> dict[str, nn.Module]:
    groups = {f"group{i}": group for i, group in enumerate(model.groups, start=1)}
    return {"stem": model.stem, **groups, "head": model.head}


def _run_on_meta(model: ResNet, image_size: int, in_channels: int) -> None:
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    on_meta = {name: tensor.detach().to("meta") for name, tensor in tensors.items()}
    # Two images: in training mode a batch norm refuses one image whose map is a single pixel.
    images = torch.empty(
        2, in_channels, image_size, image_size, device="meta", dtype=next(model.parameters()).dtype
    )
    with torch.no_grad():
        functional_call(model, on_meta, images)


def _params(stage: nn.Module) -> int:
    return sum(parameter.numel() for parameter in stage.parameters())


def _flops(module: nn.Module, output: Tensor) -> int:
    """FLOPs of a module itself, without its children, for one image."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        return 2 * output[0].numel() * module.weight[0].numel()
    if isinstance(module, GlobalSelfAttention):
        return _attention_flops(module)
    return 0


def _attention_flops(gsa: GlobalSelfAttention) -> int:
    """The matrix products: a context and its reading for content; logits and a sum of values for an axis."""
    height, width = gsa.map_size
    taps = 0
    if "content" in gsa.components:
        taps += gsa.dim // gsa.heads
    if "column" in gsa.components:
        taps += min(gsa.window or height, height)
    if "row" in gsa.components:
        taps += min(gsa.window or width, width)
    return 2 * 2 * height * width * gsa.dim * taps
