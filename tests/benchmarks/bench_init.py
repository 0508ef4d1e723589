"""Initial values of the GSA module: N(0, 1) tables as in `gsa-pytorch`, against ours.

    python tests/benchmarks/bench_init.py [--seeds 5] [--steps 200] [--lr 0.1 0.4]

Two tables. The start: in each module of GSA-ResNet-50 at 224 pixels, the root mean square of the positional
branch over that of the content branch, and the norm of the first gradient, on random images. Training: short
runs of a small GSA-ResNet on scikit-learn's digits, the same batches for all; the mean loss of the last 20
steps and the top-1 on the test images, mean and standard deviation over seeds, and the paired difference to
ours. SGD with Nesterov momentum, 20 steps of warm-up, cosine. Needs torch, scikit-learn and this package.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from measure import hardware
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from gsa_models import create_model
from gsa_models.attention import GlobalSelfAttention
from gsa_models.probe import branch_facts

SIDE, BATCH = 64, 32


def as_gsa_pytorch(module: GlobalSelfAttention) -> None:
    """N(0, 1) tables, and the default of nn.Conv2d for the projection."""
    module.qkv.reset_parameters()
    for table in (module.column_table, module.row_table):
        if table is not None:
            nn.init.normal_(table)


def ours(module: GlobalSelfAttention) -> None:
    module.reset_parameters()


def smaller(module: GlobalSelfAttention) -> None:
    """Ours, the positional branch at a quarter of the scale."""
    module.reset_parameters()
    with torch.no_grad():
        for table in (module.column_table, module.row_table):
            if table is not None:
                table.mul_(0.25)


INITS: dict[str, Callable[[GlobalSelfAttention], None]] = {
    "ours": ours,
    "N(0, 1) tables": as_gsa_pytorch,
    "ours, tables / 4": smaller,
}


def network(init: Callable[[GlobalSelfAttention], None], seed: int, **settings: object) -> nn.Module:
    torch.manual_seed(seed)
    model = create_model(**settings)  # type: ignore[arg-type]
    for module in model.modules():
        if isinstance(module, GlobalSelfAttention):
            init(module)
    return model


def start(seeds: int) -> None:
    """Print the ratio of the branches and the first gradient norm."""
    print(f"the start: gsa_resnet50 at 224, 4 random images, last norms at 0.2, {seeds} seeds")
    for name, init in INITS.items():
        ratios, norms = [], []
        for seed in range(seeds):
            model = network(init, seed, name="gsa_resnet50", image_size=224)
            for key, parameter in model.named_parameters():
                if key.endswith("expand_norm.weight"):
                    nn.init.constant_(parameter, 0.2)  # at 0 no gradient reaches the modules
            ratios += branch_ratios(model, torch.randn(4, 3, 224, 224))
            F.cross_entropy(model(torch.randn(4, 3, 224, 224)), torch.arange(4)).backward()
            squares = [p.grad.square().sum() for p in model.parameters() if p.grad is not None]
            norms.append(float(torch.stack(squares).sum().sqrt()))
        print(
            f"  {name:<18} positional / content {min(ratios):.2f} to {max(ratios):.2f} (median "
            f"{statistics.median(ratios):.2f}), gradient norm {spread(norms)}",
            flush=True,
        )


def branch_ratios(model: nn.Module, x: Tensor) -> list[float]:
    """Of every module, in training mode: fresh running statistics say nothing yet."""
    ratios = []

    def compare(module: GlobalSelfAttention, inputs: tuple[Tensor], _: Tensor) -> None:
        facts = branch_facts(module, inputs[0])
        assert facts.content_rms is not None and facts.positional_rms is not None, "both branches are there"
        ratios.append(facts.positional_rms / facts.content_rms)

    hooks = [m.register_forward_hook(compare) for m in model.modules() if isinstance(m, GlobalSelfAttention)]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return ratios


class Result(NamedTuple):
    loss: float
    top1: float


def digits() -> tuple[Tensor, Tensor]:
    pictures, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(pictures).float().view(-1, 1, 8, 8) / 8 - 1
    return F.interpolate(x, SIDE, mode="bilinear").expand(-1, 3, -1, -1), torch.from_numpy(labels)


def train(init: Callable[[GlobalSelfAttention], None], seed: int, *, lr: float, steps: int) -> Result:
    x, y = digits()
    model = network(init, seed, name="gsa_resnet_tiny", image_size=SIDE, num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=20 / steps, cycle_momentum=False
    )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    held_out, rest = order[:359], order[359:]
    losses = []
    for _ in range(steps):
        batch = rest[torch.randint(len(rest), (BATCH,), generator=generator)]
        loss = F.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    model.eval()
    with torch.no_grad():
        top1 = (model(x[held_out]).argmax(1) == y[held_out]).double().mean()
    return Result(statistics.fmean(losses[-20:]), 100 * float(top1))


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.fmean(values):.3g} +- {statistics.stdev(values):.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, nargs="+", default=[0.1, 0.4])
    options = parser.parse_args()
    print(hardware())
    start(3)
    for lr in options.lr:
        print(
            f"training: gsa_resnet_tiny on digits, {options.steps} steps, lr {lr}, n = {options.seeds} seeds"
        )
        results: dict[str, list[Result]] = {name: [] for name in INITS}
        for seed in range(options.seeds):
            for name, init in INITS.items():
                results[name].append(train(init, seed, lr=lr, steps=options.steps))
        for name, runs in results.items():
            differences = [
                theirs.loss - mine.loss for theirs, mine in zip(runs, results["ours"], strict=True)
            ]
            print(
                f"  {name:<18} loss {spread([r.loss for r in runs])}, paired with ours {spread(differences)}; "
                f"top-1 {spread([r.top1 for r in runs])} %",
                flush=True,
            )


if __name__ == "__main__":
    main()
