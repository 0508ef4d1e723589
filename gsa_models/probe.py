"""Look inside a network: what each GSA module's branches put out, how its keys attend, what time it takes.

Nothing of this is in the forward pass: hooks are there while `probe` runs, and cost nothing after.
Letters: B batch   N heads   D channels a head   H, W map   P = H*W pixels
"""

import math
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from gsa_models.attention import GlobalSelfAttention
from gsa_models.branches import softmax_in_float32


@dataclass(frozen=True)
class ModuleFacts:
    """Facts of one GSA module over a batch; None where the module has no such branch.

    content_rms, positional_rms: root mean square of what the branch puts out, before the two are summed.
    key_entropy: of the softmax over the pixels, mean over images and key channels, divided by log(P): from 0
    (every channel reads one pixel) to 1 (all pixels alike, as in a map of a single pixel).
    time_share: from 0 to 1, of the wall time of the network's forward pass.
    """

    content_rms: float | None
    positional_rms: float | None
    key_entropy: float | None
    time_share: float


def probe(model: nn.Module, images: Tensor) -> dict[str, ModuleFacts]:
    """Measure every GSA module that takes part in `model(images)`, by its name in `model.named_modules()`.

    images: as the model takes them, on its device; autocast is the caller's. Two passes in eval mode, that is
    with the running statistics, and uncompiled: one for the branches, computed once more, one by one, from
    each module's input, then one for the time alone, warmed up by the first. Weights, statistics, modes and
    hooks are as before, also after an error. A module called twice has its last branches and all its time.
    A network without GSA modules has no facts. Raises what the model raises for such images.
    """
    parts = {name: m for name, m in model.named_modules() if isinstance(m, GlobalSelfAttention)}
    found: dict[str, ModuleFacts] = {}
    seconds = dict.fromkeys(parts, 0.0)

    def note(name: str, _module: nn.Module, inputs: tuple[Tensor], _output: Tensor) -> None:
        found[name] = branch_facts(parts[name], inputs[0])

    def add_time(name: str, sign: int, *_: object) -> None:
        seconds[name] += sign * _now(images.device)

    with _undisturbed(model) as hooks:
        for name, part in parts.items():
            hooks.enter_context(part.register_forward_hook(partial(note, name)))
        model(images)
        hooks.close()
        for name, part in parts.items():
            hooks.enter_context(part.register_forward_pre_hook(partial(add_time, name, -1)))
            hooks.enter_context(part.register_forward_hook(partial(add_time, name, 1)))
        start = _now(images.device)
        model(images)
        total = _now(images.device) - start
    return {name: replace(facts, time_share=seconds[name] / total) for name, facts in found.items()}


def metrics(facts: dict[str, ModuleFacts]) -> dict[str, float]:
    """Flatten facts for a tracker: `gsa/key_entropy/groups.0.0.spatial`, of `a-zA-Z0-9_./-`, without None."""
    flat: dict[str, float] = {}
    for module, its in facts.items():
        name = re.sub("[^a-zA-Z0-9_.-]", "_", module)
        # The fact first: a tracker puts what stands before the last slash into one section of charts.
        flat |= {
            f"gsa/{f}/{name}".rstrip("/"): value for f, value in asdict(its).items() if value is not None
        }
    return flat


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[ExitStack]:
    """Eval mode without gradients, and uncompiled, for then hooks are called; takes hooks that end with it."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), ExitStack() as hooks:
            yield hooks
    finally:
        for module, training in modes:
            module.training = training


def branch_facts(gsa: GlobalSelfAttention, x: Tensor) -> ModuleFacts:
    """The facts of one module for its input (B, dim, H, W), in the mode it is in; its time is unknown (nan)."""
    q, k, v = gsa.split(gsa.qkv(x))
    content, positional = gsa.branches(q, k, v)
    return ModuleFacts(
        None if content is None else _rms(content),
        None if positional is None else _rms(positional),
        None if k is None else _key_entropy(k),
        time_share=math.nan,
    )


def _rms(x: Tensor) -> float:
    return float(x.float().square().mean().sqrt())


def _key_entropy(k: Tensor) -> float:
    weights = softmax_in_float32(k.flatten(3), dim=-1)  # (B, N, D, P)
    largest = math.log(weights.shape[-1])
    entropy = torch.special.entr(weights).sum(-1).mean()
    return min(float(entropy) / largest, 1.0) if largest else 1.0  # rounding may pass 1


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)  # else the time of the launches alone
    return time.perf_counter()
