"""What tests of attention share: modules with nothing at its default, held against the definition."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gsa_models
from gsa_models.attention import GlobalSelfAttention, gsa_reference


def random_module(dim: int = 12, *, seed: int = 0, **settings: Any) -> GlobalSelfAttention:
    """A float64 module with every parameter and statistic drawn, so that nothing hides behind a 0 or a 1."""
    module = GlobalSelfAttention(dim, **settings).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
            if name == "mid_norm.running_var":
                tensor.abs_().add_(0.1)
    return module


def norm_of(module: GlobalSelfAttention) -> nn.BatchNorm2d:
    assert module.mid_norm is not None, "only with both axes"
    return module.mid_norm


def random_input(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of what is expected."""
    return float(((got - expected).norm() / expected.norm()).detach())


def output_and_gradients(module: nn.Module, x: Tensor, y_of: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """What y_of(x) gives, and the gradients of a random weighting of it for x and every parameter."""
    x = x.clone().requires_grad_()
    y = y_of(x)
    cotangent = random_input(*y.shape, seed=2).to(y)
    return [y, *torch.autograd.grad((y * cotangent).sum(), [x, *module.parameters()])]


def assert_equals_reference(module: GlobalSelfAttention, x: Tensor) -> None:
    expected = output_and_gradients(module, x, lambda x: gsa_reference(module, x))
    got = output_and_gradients(module, x, module)
    for e, g in zip(expected, got, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-10)


def interpreted_kernels(name: str) -> ModuleType:
    """A copy of a module of kernels that Triton's interpreter runs: `triton.jit` asks which, once, when applied."""
    spec = importlib.util.spec_from_file_location(
        f"interpreted_{name}", Path(gsa_models.__file__).with_name(f"{name}.py")
    )
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:  # and no longer: kernels for a GPU may be loaded next
        patch.setenv("TRITON_INTERPRET", "1")
        spec.loader.exec_module(module)
    return module
