"""GSA-ResNets against themselves with `gsa-pytorch` inside, and against convolution ResNets of equal depth.

    python tests/benchmarks/bench_network.py [--depth 50] [--image-size 224] [--batch 8] [--dtype float32]

Needs torch and this package; `gsa-pytorch`, timm and torchvision are peers where they can be imported. Runs
on CUDA if there is a device; all networks in channels_last.
"""

import argparse

import torch
from bench_attention import peer
from measure import Case, hardware, print_ratios
from torch import nn

from gsa_models import create_model
from gsa_models.attention import GlobalSelfAttention


def with_peer_modules(model: nn.Module) -> nn.Module | None:
    """The same network with a `gsa-pytorch` module for each of ours; None where it is not installed."""
    for name, module in list(model.named_modules()):
        if isinstance(module, GlobalSelfAttention):
            theirs = peer(module.dim, module.map_size[0])
            if theirs is None:
                return None
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, theirs)
    return model


def foreign(library: str, depth: int) -> nn.Module | None:
    """The ResNet of timm or torchvision; None where it cannot be imported or has no such depth."""
    try:
        if library == "timm":
            import timm  # type: ignore[import-not-found]

            return timm.create_model(f"resnet{depth}")  # type: ignore[no-any-return]
        from torchvision.models import get_model  # type: ignore[import-not-found]

        return get_model(f"resnet{depth}")  # type: ignore[no-any-return]
    except Exception as error:  # a library built for another torch fails in any way it likes
        print(f"  ({library} left out: {type(error).__name__}: {str(error)[:80]})")
        return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depth", choices=("26", "38", "50", "101"), default="50")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = options.image_size
    print(
        f"forward + backward, {size}x{size}, batch {options.batch}, {options.dtype}, "
        f"{options.rounds} rounds; {hardware()}"
    )
    networks = {
        f"gsa_resnet{options.depth}": create_model(f"gsa_resnet{options.depth}", image_size=size),
        "the same, gsa-pytorch inside": with_peer_modules(
            create_model(f"gsa_resnet{options.depth}", image_size=size)
        ),
        f"resnet{options.depth}": create_model(f"resnet{options.depth}"),
        f"timm resnet{options.depth}": foreign("timm", options.depth),
        f"torchvision resnet{options.depth}": foreign("torchvision", options.depth),
    }
    x = torch.randn(options.batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    cases = []
    for name, network in networks.items():
        if network is not None:
            network = network.to(device, memory_format=torch.channels_last)
            cases.append(Case(name, network, x, getattr(torch, options.dtype)))
    print_ratios(cases, rounds=options.rounds, images=options.batch)


if __name__ == "__main__":
    main()
