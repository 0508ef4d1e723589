"""The CUDA kernels of axial attention against plain attention: in Triton's interpreter, and on a GPU."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from oracle import interpreted_kernels, output_and_gradients, random_input, random_module, relative_error
from torch import Tensor, einsum

from gsa_models import fused
from gsa_models.attention import gsa_reference
from gsa_models.branches import axial_attention

NAMES = ("y", "dq", "dv", "dtable", "dcontext")
TOLERANCE = {  # of the root mean square; float16 and bfloat16 round logits and values to 11 and 8 bits
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 2e-2,
}


@dataclass(frozen=True)
class Case:
    D: int
    R: int
    X: int
    rows: int
    layout: str = "channels_last"
    affine: bool = False
    context: bool = False
    B: int = 2
    programs: int = 528


CASES = {
    "one pixel": Case(8, 2, 1, 1, "nchw", affine=True, context=True),
    "a line of one pixel in a larger table": Case(3, 3, 1, 5),
    "column": Case(8, 5, 7, 13, "column"),
    "row with norm and content": Case(8, 5, 7, 13, affine=True, context=True),
    "NCHW": Case(3, 4, 9, 17, "nchw", context=True),
    "NCHW column": Case(3, 4, 9, 17, "nchw column", affine=True),
    "window": Case(24, 3, 9, 5, affine=True, context=True),
    "window of one": Case(8, 3, 7, 1),
    "table larger than the map": Case(8, 3, 7, 21, affine=True),
    "chunk of a fused projection": Case(8, 3, 7, 13, "chunk", affine=True, context=True),
    "NCHW chunk": Case(8, 3, 7, 13, "nchw chunk"),
    "two blocks of pixels": Case(24, 2, 20, 39, context=True, B=1),
    "a last group that is not full": Case(8, 17, 7, 13, affine=True, context=True, B=3, programs=3),
}
STAGES = {  # of GSA-ResNet-50 with 8 heads, at 224 pixels
    f"{X}/{D} {layout}": Case(D, X, X, 2 * X - 1, layout, layout != "column", layout != "column", 4, 64)
    for X, D in ((56, 8), (56, 16), (28, 16), (28, 32), (14, 32), (14, 64), (7, 64))
    for layout in ("column", "channels_last")
}
BOUNDS = {  # the longest lines that `fits` lets through
    f"{X}/{D} {dtype}": (Case(D, X, X, 2 * X - 1, affine=True, context=True), dtype)
    for X, D, dtype in (
        *((X, D, torch.bfloat16) for X, D in ((112, 16), (56, 32), (28, 64), (14, 128))),
        *((X, D, torch.float32) for X, D in ((56, 16), (28, 32), (14, 64))),
    )
}


@pytest.fixture(scope="module")
def interpreted() -> ModuleType:
    return interpreted_kernels("axial_triton")


def laid_out(case: Case, heads: int, dtype: torch.dtype, device: str, generator: torch.Generator) -> Tensor:
    """A random (B, N, D, R, X) in the layout that the case names."""
    lines, pixels = (case.X, case.R) if "column" in case.layout else (case.R, case.X)
    parts = 3 if "chunk" in case.layout else 1
    x = torch.randn(case.B, parts * heads * case.D, lines, pixels, generator=generator).to(device, dtype)
    if "nchw" not in case.layout:
        x = x.contiguous(memory_format=torch.channels_last)
    x = x.chunk(parts, dim=1)[-1].unflatten(1, (heads, case.D))
    return x.mT if "column" in case.layout else x


def inputs(
    case: Case, dtype: torch.dtype, *, device: str, heads: int = 2
) -> tuple[list[Tensor], dict[str, Any]]:
    """grad, q, v, table; affine and context."""
    generator = torch.Generator().manual_seed(0)
    grad, q, v = (laid_out(case, heads, dtype, device, generator) for _ in range(3))
    table = torch.randn(case.rows, case.D, generator=generator).to(device)
    affine = tuple(torch.randn(heads * case.D, generator=generator).to(device) for _ in range(2))
    context = torch.randn(case.B, heads, case.D, case.D, generator=generator).to(device, dtype)
    options = {"affine": affine if case.affine else None, "context": context if case.context else None}
    return [grad, q, v, table], options


def expected(grad: Tensor, q: Tensor, v: Tensor, table: Tensor, *, affine: Any, context: Any) -> list[Tensor]:
    """y and the gradients for q, v after its affine, table and context, by the plain module in float64."""
    if affine is not None:
        scale, shift = (a.double().view(1, *q.shape[1:3], 1, 1) for a in affine)
        v = v.double() * scale + shift
    leaves = [t.detach().double().requires_grad_() for t in (q, v, table, context) if t is not None]
    y = axial_attention(*leaves[:3])
    if context is not None:
        y = y + einsum("bndrx,bnde->bnerx", leaves[0], leaves[3])
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.double())]


def results(module: ModuleType, tensors: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    """y, and the gradients of q, v, table and context; that of q is set in one call and doubled in the next."""
    y = module.axial_forward(*tensors[1:], **options)
    dq, dv = torch.empty_like(tensors[1]), torch.empty_like(tensors[1])
    of_table, of_context = module.axial_backward(*tensors, dq=dq, dv=dv, **options)
    twice = dq.clone()
    module.axial_backward(*tensors, dq=twice, dv=dv, add=True, **options)
    torch.testing.assert_close(twice, 2 * dq)
    return [t for t in (y, dq, dv, of_table, of_context) if t is not None]


def assert_equals_plain(module: ModuleType, case: Case, dtype: torch.dtype, *, device: str) -> None:
    tensors, options = inputs(case, dtype, device=device)
    got, want = results(module, tensors, options), expected(*tensors, **options)
    dtypes = (dtype, dtype, dtype, torch.float32, dtype)  # those of y, q, v, table, context
    for name, g, w, kind in zip(NAMES, got, want, dtypes, strict=False):
        assert (g.shape, g.dtype) == (w.shape, kind), name
        error = float((g.double() - w).norm() / w.norm())
        assert error <= TOLERANCE[dtype], f"{name}: relative error {error:.2g}"
    assert len(got) == len(want), "a context has a gradient, and nothing else has"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_plain_attention(
    interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(interpreted, "PROGRAMS", CASES[name].programs)
    assert_equals_plain(interpreted, CASES[name], dtype, device="cpu")


@pytest.mark.parametrize("layout", ["channels_last", "nchw", "column", "chunk", "nchw chunk"])
def test_results_have_the_memory_format_of_the_input(interpreted: ModuleType, layout: str) -> None:
    tensors, options = inputs(Case(3, 4, 5, 9, layout), torch.float32, device="cpu")
    memory_format = torch.contiguous_format if "nchw" in layout else torch.channels_last
    for name, result in zip(NAMES[:3], results(interpreted, tensors, options), strict=False):
        image = (result.mT if layout == "column" else result).flatten(1, 2)  # (B, N*D, H, W)
        assert image.is_contiguous(memory_format=memory_format), name


def test_an_expanded_gradient_is_read_by_its_strides(interpreted: ModuleType) -> None:
    (_, *tensors), options = inputs(Case(8, 3, 7, 13), torch.float32, device="cpu")
    ones = torch.ones(()).expand(tensors[0].shape)
    got, want = results(interpreted, [ones, *tensors], options), expected(ones, *tensors, **options)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_together_is_refused(interpreted: ModuleType) -> None:
    (_, q, v, table), options = inputs(Case(8, 3, 7, 13, context=True), torch.float32, device="cpu")
    long = torch.empty(1, 1, 32, 1, 100)
    for message, arguments, settings in (
        ("q must be .* got .* in torch.float64", (q.double(), v, table), {}),
        (r"v must be \(2, 2, 8, 3, 7\) in torch.float32, got .* in torch.float16", (q, v.half(), table), {}),
        (r"table must be \(13, 8\) in any dtype, got \(12, 8\)", (q, v, table[1:]), {}),
        (r"scale must be \(16,\)", (q, v, table), {"affine": (table, table)}),
        (r"context must be \(2, 2, 8, 8\)", (q, v, table), {"context": options["context"][:1]}),
        ("100 pixels with 32 channels .*16384 of 4096 bytes.*more heads", (long, long, table), {}),
    ):
        with pytest.raises(ValueError, match=message):
            interpreted.axial_forward(*arguments, **settings)


@pytest.mark.parametrize(
    "components", [("content", "column", "row"), ("column", "row"), ("content", "column")]
)
def test_a_module_on_these_kernels_equals_the_definition(
    interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch, components: tuple[str, ...]
) -> None:
    module, x = random_module(map_size=(5, 4), heads=3, components=components), random_input(2, 12, 5, 4)
    want = output_and_gradients(module, x, lambda x: gsa_reference(module, x))
    monkeypatch.setattr(fused, "_kernels", lambda x: (interpreted, interpreted_kernels("content_triton")))
    got = output_and_gradients(module.float(), x.float(), module)
    for g, w in zip(got, want, strict=True):
        assert relative_error(g.double(), w) < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES | STAGES)
def test_kernels_equal_plain_attention_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    assert_equals_plain(compiled(), (CASES | STAGES)[name], dtype, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("name", BOUNDS)
def test_the_longest_lines_fit_on_a_gpu(name: str) -> None:
    assert_equals_plain(compiled(), *BOUNDS[name], device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("name", STAGES)
def test_two_runs_give_the_same_bits_on_a_gpu(name: str) -> None:
    tensors, options = inputs(STAGES[name], torch.bfloat16, device="cuda", heads=8)
    once, twice = (results(compiled(), tensors, options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def compiled() -> ModuleType:
    from gsa_models import axial_triton

    return axial_triton
