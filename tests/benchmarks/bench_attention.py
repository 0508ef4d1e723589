"""The GSA module against `gsa-pytorch` at the four stage shapes of ResNet-50: time and memory of training.

    python tests/benchmarks/bench_attention.py [--batch 16] [--dtype float32|bfloat16] [--rounds 15]

Needs torch and this package; the peer is left out where it is not installed. Its output projection, which
the paper's module does not have, is taken out of it; what remains does the same work. Runs on CUDA if there
is a device. Memory is the peak of a step on CUDA, and what the forward pass keeps elsewhere.
"""

import argparse

import torch
from measure import Case, hardware, print_ratios
from torch import nn

from gsa_models.attention import GlobalSelfAttention

STAGES = ((56, 64), (28, 128), (14, 256), (7, 512))  # pixels a side, channels
HEADS = 8


def peer(dim: int, side: int) -> nn.Module | None:
    """The public module with our sizes, or None where it is not installed."""
    try:
        from gsa_pytorch import GSA  # type: ignore[import-untyped]
    except ImportError:
        return None
    module: nn.Module = GSA(dim, rel_pos_length=side, heads=HEADS, dim_key=dim // HEADS)
    module.to_out = nn.Identity()
    return module


def cases_of(side: int, dim: int, *, batch: int, dtype: torch.dtype, device: str) -> list[Case]:
    ours = GlobalSelfAttention(dim, map_size=(side, side), heads=HEADS).to(device)
    x = torch.randn(batch, dim, side, side, device=device)
    last = x.contiguous(memory_format=torch.channels_last)
    cases = [Case("ours", ours, last, dtype), Case("ours, NCHW", ours, x, dtype)]
    theirs = peer(dim, side)
    if theirs is not None:  # in NCHW, which its reshapes are made for
        cases.append(Case("gsa-pytorch", theirs.to(device), x, dtype))
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(
        f"forward + backward, batch {options.batch}, {options.dtype}, {options.rounds} rounds; {hardware()}"
    )
    for side, dim in STAGES:
        print(f"{side}x{side}, {dim} channels")
        dtype = getattr(torch, options.dtype)
        cases = cases_of(side, dim, batch=options.batch, dtype=dtype, device=device)
        print_ratios(cases, rounds=options.rounds, images=options.batch)


if __name__ == "__main__":
    main()
