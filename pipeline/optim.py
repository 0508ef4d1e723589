"""Optimizer and learning-rate schedule, from plain numbers."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from pipeline.config import OptimConfig


def peak_lr(optim: OptimConfig) -> float:
    """The linear rule (Goyal et al., arXiv 1706.02677): optim.lr is meant for 256 samples."""
    return optim.lr * optim.global_batch / 256


def lr_at(step: int, *, peak: float, total: int, warmup: int) -> float:
    """Learning rate of a step: linear warm-up to `peak` over `warmup` steps, then a half cosine to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, or AdamW; the learning rate is set anew at each step."""
    groups = [
        {"params": list(_decayed(model, True)), "weight_decay": optim.weight_decay},
        {"params": list(_decayed(model, False)), "weight_decay": 0.0},
    ]
    if optim.name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=(optim.momentum, 0.999))
    return torch.optim.SGD(groups, lr=0.0, momentum=optim.momentum, nesterov=optim.momentum > 0)


def _decayed(model: nn.Module, wanted: bool) -> Iterable[nn.Parameter]:
    """Weight decay is for the weights of convolutions and matrices, not for norms, biases, position tables."""
    for name, parameter in model.named_parameters():
        if (parameter.ndim > 1 and not name.endswith("_table")) == wanted:
            yield parameter
