"""Optimizer, masked step, learning-rate schedule and averaged weights, from plain numbers."""

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import ConfigError, OptimConfig

BETA2 = 0.999  # of AdamW and LAMB: the decay of the second moment
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


# --- learning rate -----------------------------------------------------------------------------------------


def peak_lr(optim: OptimConfig) -> float:
    """The highest learning rate; lr_rule linear: optim.lr is meant for 256 samples (arXiv 1706.02677)."""
    return optim.lr * optim.global_batch / 256 if optim.lr_rule == "linear" else optim.lr


def lr_at(step: int, optim: OptimConfig, *, steps: int) -> float:
    """Learning rate of optimizer step `step`, from 0; steps: of an epoch. A function of the step alone.

    cosine, step: warmup_epochs of a linear rise, to the peak at its last step (arXiv 1706.02677); then
    - cosine: a half cosine, zero at the step after the last (arXiv 1608.03983, without restarts);
    - step: a tenth each step_epochs, counted from the start of training, warm-up included (arXiv 1512.03385).
    onecycle (arXiv 1708.07120; momentum stays): a half cosine from peak/25 up to the peak, over warmup_epochs
    or, if that is 0, 30 % of the steps; another down to peak/250,000 at the last step.
    """
    peak, total, warmup = peak_lr(optim), optim.epochs * steps, round(optim.warmup_epochs * steps)
    if optim.schedule == "onecycle":
        top = (warmup if optim.warmup_epochs > 0 else 0.3 * total) - 1
        if step < top:
            return _half_cosine(peak / 25, peak, step / top)
        return _half_cosine(peak, peak / 25e4, (step - top) / max(1, total - 1 - top))
    if step < warmup:
        return peak * (step + 1) / warmup
    if optim.schedule == "step":
        return peak / 10.0 ** (step // max(1, round(optim.step_epochs * steps)))
    return _half_cosine(peak, 0.0, (step - warmup) / max(1, total - warmup))


def _half_cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * share))


# --- optimizer ---------------------------------------------------------------------------------------------


def optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """Nesterov SGD, AdamW or LAMB for `masked_step`, its state on the weights' device; lr is set each step.

    Gradients, and a state that is loaded, must have the memory format of their weights, as autograd gives
    them: torch's fused kernels take others for it on a CPU, without a word.
    Raises ConfigError: LAMB without its package.
    """
    groups: list[dict[str, Any]] = [
        {"params": list(_decayed(model, True)), "weight_decay": optim.weight_decay},
        {"params": list(_decayed(model, False)), "weight_decay": 0.0},
    ]
    if optim.name == "lamb":
        return _lamb(groups, optim.momentum)
    if optim.name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=(optim.momentum, BETA2), fused=True)
    sgd = torch.optim.SGD(groups, lr=0.0, momentum=optim.momentum, nesterov=optim.momentum > 0, fused=True)
    if optim.momentum > 0:
        # Made here, not by the first step: that one leaves them uninitialised where it is masked.
        for parameter in model.parameters():
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


def _decayed(model: nn.Module, wanted: bool) -> Iterable[nn.Parameter]:
    """Weight decay is for the weights of convolutions and matrices, not for norms, biases, position tables."""
    for name, parameter in model.named_parameters():
        if (parameter.ndim > 1 and not name.endswith("_table")) == wanted:
            yield parameter


def _lamb(groups: list[dict[str, Any]], momentum: float) -> torch.optim.Optimizer:
    """LAMB (arXiv 1904.00962, algorithm 2; arXiv 2110.00476): no clipping, of gradients nor of trust ratios.

    As timm has it: decay inside of the trust ratio; weights without decay take Adam's steps. Status: where there
    is a trust ratio the library corrects no bias. The ratio cancels that but for the decay, which counts
    sqrt(1 - 0.999^t) / (1 - momentum^t) times (a seventh at the tenth step, 0.8 at the thousandth), and for
    the first step of a weight that is all zero, which is up to three times as long.
    """
    try:
        from pytorch_optimizer import Lamb
    except ModuleNotFoundError:
        raise ConfigError(
            "optim.name lamb needs the package pytorch_optimizer, which is not installed; "
            "next: pip install 'pytorch_optimizer>=4.1,<4.2', or optim.name=adamw"
        ) from None
    for group, trusted in zip(groups, (True, False), strict=True):
        group |= {"adam": not trusted, "adam_debias": trusted}
    lamb = Lamb(
        groups,
        lr=0.0,
        betas=(momentum, BETA2),
        eps=1e-6,
        weight_decouple=False,
        max_grad_norm=0.0,
        foreach=True,
    )
    lamb.clamp = math.inf  # of the weights' norm
    lamb.debias = _adam_bias  # type: ignore[assignment]
    for group in lamb.param_groups:
        device = group["params"][0].device if group["params"] else None
        group["step"] = torch.zeros((), device=device)  # a Python number would also count the masked steps
        for parameter in group["params"]:
            moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            lamb.state[parameter].update(moments)
    return lamb


def _adam_bias(beta1: float, step: Tensor) -> Tensor:
    """What divides lr: the bias of both moments (arXiv 1412.6980, section 2), of the first alone in the library."""
    t = step.double()
    return ((1 - beta1**t) / (1 - BETA2**t).sqrt()).to(step.dtype)


# --- masked step -------------------------------------------------------------------------------------------


@torch.no_grad()
def masked_step(optimizer: torch.optim.Optimizer, ok: Tensor) -> None:
    """optimizer.step() where `ok` is True; else nothing changes, bit for bit: weights, moments, counters.

    ok: bool, 0-dim, on the weights' device, for which it never waits. Where it is False, the gradients may
    hold anything. The optimizer is one of `optimizer`.
    """
    if optimizer.defaults.get("fused"):  # torch's own protocol, that of torch.amp.GradScaler
        optimizer.found_inf = ok.logical_not().float()  # type: ignore[attr-defined]
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf  # type: ignore[attr-defined]
        return
    for group in optimizer.param_groups:
        group["step"] = group["step"].to(ok.device)  # a loaded one is where it was loaded
    tensors = [p for group in optimizer.param_groups for p in (*group["params"], group["step"])]
    tensors += [tensor for state in optimizer.state.values() for tensor in state.values()]
    before = [torch.empty_like(tensor) for tensor in tensors]
    torch._foreach_copy_(before, tensors)
    optimizer.step()
    _replace(tensors, before, ok.logical_not())
    for state in optimizer.state.values():  # what the library notes and never reads
        for key in ("weight_norm", "adam_norm", "trust_ratio"):
            state.pop(key, None)


def _replace(tensors: Sequence[Tensor], others: Sequence[Tensor], where: Tensor) -> None:
    """tensors[i] becomes others[i], bit for bit, where the 0-dim bool `where` is True.

    As integers, whose sums wrap around: nan and inf times zero are not zero, and torch.where has no foreach.
    """
    if not tensors:
        return
    mine = [t.detach().view(INTEGERS[t.itemsize]) for t in tensors]
    change = torch._foreach_sub([t.detach().view(INTEGERS[t.itemsize]) for t in others], mine)
    torch._foreach_mul_(change, where.to(mine[0].dtype))
    torch._foreach_add_(mine, change)


# --- averaged weights --------------------------------------------------------------------------------------


class Ema:
    """Exponential moving average of a model's weights, in `model`: a copy for evaluation, without gradients.

    After each step that counts: average += (1 - decay) * (model - average), from the model as it was given
    (arXiv 1412.6980, section 7.2, without its correction: the average starts at the model, not at zero).
    decay: in [0, 1), the same at every step; the average is over about 1 / (1 - decay) steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, ok: Tensor) -> None:
        """Move parameters and floating buffers, copy integer ones; where `ok` is False nothing changes a bit.

        ok: bool, 0-dim, on the weights' device, for which it never waits. Where it is False, `model` may
        hold nan. Takes twice the model's memory while it runs.
        """
        pairs = list(zip(_tensors(self.model), _tensors(model), strict=True))
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        others = [pair for pair in pairs if not pair[0].is_floating_point()]
        average, current = [mine for mine, _ in floats], [theirs for _, theirs in floats]
        _replace(average, torch._foreach_lerp(average, current, 1 - self.decay), ok)
        _replace([mine for mine, _ in others], [theirs for _, theirs in others], ok)


def _tensors(model: nn.Module) -> Iterable[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
