"""Parameters, operations and activation memory of a network, stage by stage, and the paper's figures.

FLOPs are counted as the paper's reported sizes demand: a multiply-accumulate is 2 FLOPs; convolutions, linear
layers and the matrix products of attention count; batch norm, ReLU, softmax, pooling and sums do not. A window
of L pixels counts min(L, n) taps a pixel, borders not cut: what the method needs, though the plain form
multiplies by the zeros outside.

Activation memory is measured: the bytes that a training step keeps for its backward pass for each further
image, the image itself among them, in the model's dtype. Not in it: parameters, gradients, the optimizer, and
what lives within one operation only. Autocast does not know the meta device, so there is no figure for it.
"""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch.autograd.graph import saved_tensors_hooks

from gsa_models.attention import GlobalSelfAttention
from gsa_models.resnet import ResNet
from gsa_models.zoo import create_model


@dataclass(frozen=True)
class StageCost:
    """One row: stem, group1, group2, ..., head; flops and activation_bytes are for one image."""

    name: str
    params: int
    flops: int
    activation_bytes: int


@dataclass(frozen=True)
class Cost:
    """A network's parameters, and its FLOPs and activation memory for one image: the sums of its stages."""

    stages: tuple[StageCost, ...]

    @property
    def params(self) -> int:
        return sum(stage.params for stage in self.stages)

    @property
    def flops(self) -> int:
        return sum(stage.flops for stage in self.stages)

    @property
    def activation_bytes(self) -> int:
        return sum(stage.activation_bytes for stage in self.stages)


@torch.inference_mode(False)  # below it nothing would be kept
def model_cost(model: ResNet, image_size: int) -> Cost:
    """Count parameters, FLOPs and activation memory for images of image_size x image_size.

    The shapes come from training passes of a copy on the meta device: a model built there needs no weights,
    and one built elsewhere does no arithmetic and keeps its state.

    Raises ValueError when a GSA module of the model was made for another image size.
    """
    stages = _stages(_meta_copy(model).train())
    channels, dtype = model.in_channels, next(model.parameters()).dtype
    # Two images at least: in training mode a batch norm refuses one image whose map is a single pixel.
    two, four = (
        _training_pass(stages, torch.empty(n, channels, image_size, image_size, device="meta", dtype=dtype))
        for n in (2, 4)
    )
    return Cost(
        tuple(
            StageCost(name, _params(stages[name]), flops // 2, (more - kept) // 2)
            for name, (flops, kept), (_, more) in zip(stages, two, four, strict=True)
        )
    )


def _stages(model: ResNet) -> dict[str, nn.Module]:
    groups = {f"group{i}": group for i, group in enumerate(model.groups, start=1)}
    return {"stem": model.stem, **groups, "head": model.head}


def _meta_copy(model: ResNet) -> ResNet:
    """The model with tensors that have shapes alone; deepcopy takes them from its memo and copies no weights."""
    memo: dict[int, Any] = {id(b): torch.empty_like(b, device="meta") for b in model.buffers()}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
    return deepcopy(model, memo)


def _params(stage: nn.Module) -> int:
    return sum(parameter.numel() for parameter in stage.parameters())


def _training_pass(stages: Mapping[str, nn.Module], x: Tensor) -> list[tuple[int, int]]:
    """For each stage the FLOPs of a batch, and the bytes that it is the first to keep for the backward pass."""
    counts = []
    known = {t.untyped_storage() for s in stages.values() for t in (*s.parameters(), *s.buffers())}
    for stage in stages.values():
        x, flops, kept = _run(stage, x)
        counts.append((flops, sum(storage.nbytes() for storage in kept - known)))
        known |= kept
    return counts


def _run(stage: nn.Module, x: Tensor) -> tuple[Tensor, int, set[UntypedStorage]]:
    """The output of a stage, its FLOPs, and every storage that autograd keeps a tensor of.

    A storage is one Python object as long as that is referred to, here by the set: so views and tensors that
    are kept several times count once, on any device.
    """
    flops: list[int] = []
    kept: set[UntypedStorage] = set()

    def count(module: nn.Module, _inputs: object, output: Tensor) -> None:
        flops.append(_flops(module, output))

    def keep(tensor: Tensor) -> Tensor:
        kept.add(tensor.untyped_storage())
        return tensor

    hooks = [module.register_forward_hook(count) for module in stage.modules()]
    with torch.enable_grad(), saved_tensors_hooks(keep, lambda tensor: tensor):
        y = stage(x)
    for hook in hooks:
        hook.remove()
    return y, sum(flops), kept


def _flops(module: nn.Module, output: Tensor) -> int:
    """FLOPs of a module itself, without its children, for a batch."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        return 2 * output.numel() * module.weight[0].numel()
    if isinstance(module, GlobalSelfAttention):
        return output.shape[0] * _attention_flops(module)
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


@dataclass(frozen=True)
class Figure:
    """What a network must cost by the convention above, written with the digits that are known.

    settings: of create_model, whose defaults are the paper's: 224x224, 1000 classes, imagenet stem.
    expected: parameters, exact or in millions (M), and GFLOPs (G); or one of the two.
    """

    model: str
    expected: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def counted(self) -> str:
        """What the network costs now, written as `expected` is."""
        settings = {"image_size": 224, **self.settings}
        with torch.device("meta"):
            model = create_model(self.model, **settings)
        return written_as(self.expected, model_cost(model, settings["image_size"]))


def written_as(pattern: str, cost: Cost) -> str:
    """A cost in the units and digits of a pattern such as 18.1M / 7.2G or 18,052,856 / 7.170G."""

    def number(text: str) -> str:
        if text[-1] not in "MG":
            return f"{cost.params:,}"
        value = cost.params / 1e6 if text[-1] == "M" else cost.flops / 1e9
        return f"{value:.{len(text[:-1].partition('.')[2])}f}{text[-1]}"

    return " / ".join(number(text) for text in pattern.split(" / "))


_AT_32 = {"image_size": 32, "num_classes": 100, "stem": "small"}


def _ablation(setting: str, figures: Mapping[Any, str]) -> Iterable[Figure]:
    return (Figure("gsa_resnet50", expected, {setting: value}) for value, expected in figures.items())


FIGURES = (
    *(Figure(row.model, f"{row.params:,} / {row.gflops:.3f}G") for row in PAPER_TABLE),
    Figure("resnet26", "11,844,772 / 1.455G", _AT_32),
    Figure("resnet38", "17,775,012 / 2.026G", _AT_32),
    Figure("resnet50", "23,705,252 / 2.596G", _AT_32),
    Figure("gsa_resnet26", "8,492,372 / 1.383G", _AT_32),
    Figure("gsa_resnet38", "12,339,428 / 1.783G", _AT_32),
    Figure("gsa_resnet50", "16,186,484 / 2.182G", _AT_32),
    *_ablation(
        "components",
        {
            "content+column+row": "18.053M / 7.170G",
            "content+column": "18.029M / 6.868G",
            "content+row": "18.029M / 6.868G",
            "column+row": "16.795M / 6.368G",
            "content": "18.012M / 6.566G",
            "column": "16.771M / 6.066G",
            "row": "16.771M / 6.066G",
        },
    ),
    *_ablation(
        "placement",
        {
            "none": "25.557M / 8.178G",
            "cccg": "20.848M / 8.000G",
            "ccgg": "18.504M / 7.437G",
            "cggg": "18.121M / 7.344G",
            "gggg": "18.053M / 7.170G",
            "gccc": "25.489M / 8.005G",
            "ggcc": "25.106M / 7.912G",
            "gggc": "22.762M / 7.349G",
        },
    ),
    *_ablation("window", {3: "6.61G", 7: "6.67G", 15: "6.79G", 31: "6.97G", None: "7.17G"}),
)
