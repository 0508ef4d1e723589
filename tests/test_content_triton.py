"""The CUDA kernels of content attention against plain PyTorch: in Triton's interpreter, and on a GPU."""

from types import ModuleType

import pytest
import torch
from oracle import interpreted_kernels, relative_error
from torch import Tensor

from gsa_models import content_cpu

# (B, D, H, W); those of GSA-ResNet-50 last
SHAPES = [(2, 3, 1, 1), (2, 8, 5, 7), (1, 24, 4, 4), (2, 8, 17, 31)]
STAGES = [(4, 8, 56, 56), (4, 16, 28, 28), (4, 32, 14, 14), (4, 64, 7, 7)]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@pytest.fixture(scope="module")
def interpreted() -> ModuleType:
    return interpreted_kernels("content_triton")


def results(module: ModuleType, grad: Tensor, projected: Tensor) -> list[Tensor]:
    """Context and gradients of k and v; the gradient of v comes on top of what is there, here v itself."""
    _, k, v = projected.unbind(1)
    d_projected = torch.empty_like(projected)
    _, dk, dv = d_projected.unbind(1)
    dv.copy_(v)
    context, kept = module.content_forward(k, v)
    module.content_backward(grad.to(v.dtype), k, v, context, kept, dk=dk, dv=dv)
    return [context, dk, dv]


def assert_equals_plain(
    module: ModuleType,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    *,
    device: str,
    heads: int = 2,
) -> None:
    batch, channels, height, width = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3 * heads * channels, height, width, generator=generator) * 3
    grad = torch.randn(batch, heads, channels, channels, generator=generator).to(device, dtype)
    x = x.contiguous(memory_format=memory_format).to(device, dtype)
    projected = x.unflatten(1, (3, heads, channels))
    got, want = results(module, grad, projected), results(content_cpu, grad.double(), projected.double())
    for g, w in zip(got, want, strict=True):
        assert g.dtype == dtype
        # The gradient of keys that see one pixel alone is 0, and the kernel's a rounding error.
        assert float((g.double() - w).norm()) <= TOLERANCE[dtype] * float(
            w.norm() + projected.double().norm() / 9
        )


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_equal_plain_content_attention(
    interpreted: ModuleType,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> None:
    assert_equals_plain(interpreted, shape, dtype, memory_format, device="cpu")


def test_large_keys_do_not_overflow(interpreted: ModuleType) -> None:
    k, v = torch.randn(1, 1, 8, 4, 40) * 1e4, torch.randn(1, 1, 8, 4, 40)
    context, _ = interpreted.content_forward(k, v)
    assert relative_error(context, content_cpu.content_forward(k, v)[0]) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES + STAGES, ids=str)
def test_kernels_equal_plain_content_attention_on_a_gpu(
    shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    from gsa_models import content_triton

    assert_equals_plain(content_triton, shape, dtype, torch.channels_last, device="cuda", heads=8)
