"""Whole networks on a CUDA device: the same figures as on a CPU, by every path that only a GPU has."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from oracle import output_and_gradients, random_input, random_module, relative_error
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gsa_models import create_model, fused
from gsa_models.attention import GlobalSelfAttention, gsa_reference

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """No TF32: the comparison is with a CPU."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def network(placement: str = "cggg") -> nn.Module:
    torch.manual_seed(0)
    model = create_model("gsa_resnet26", image_size=64, num_classes=5, placement=placement)
    for name, parameter in model.named_parameters():
        if name.endswith("expand_norm.weight"):
            nn.init.constant_(parameter, 0.05)  # zero hides the attention, much magnifies rounding
    return model


def images() -> Tensor:
    return torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    loss = cross_entropy(model(x).float(), torch.arange(8, device=x.device) % 5)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def assert_close(got: list[Tensor], want: list[Tensor]) -> None:
    """Within 2 %: 26 layers of float32 with ReLUs magnify rounding to 0.2 %, what is wrong is off by 100 %."""
    for g, w in zip(got, want, strict=True):
        error = relative_error(g.cpu().double(), w.cpu().double())
        assert error < 0.02


def test_a_network_takes_the_kernels_and_trains_as_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    want = gradients(network().double(), images().double())
    seen = []
    kernels = fused._kernels
    monkeypatch.setattr(fused, "_kernels", lambda x: seen.append(x.device.type) or kernels(x))
    model = network().to("cuda", memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = images().cuda().contiguous(memory_format=torch.channels_last)
    assert_close(gradients(model, x), want)
    assert set(seen) == {"cuda"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_close_to_float32(dtype: torch.dtype) -> None:
    module = GlobalSelfAttention(64, map_size=(28, 28)).cuda()
    x = torch.randn(8, 64, 28, 28, device="cuda").relu()
    full = module(x)
    with torch.autocast("cuda", dtype):
        low = module(x)
    assert low.dtype == dtype
    assert relative_error(low.float(), full) < 0.03


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("images", [1, 3])
def test_a_module_trains_as_on_a_cpu(
    images: int, memory_format: torch.memory_format, dtype: torch.dtype, training: bool
) -> None:
    """Weights of any precision too; and one image, whose strides leave its memory format open."""
    module = random_module(24, map_size=(6, 5), heads=3).train(training)
    x = random_input(images, 24, 6, 5).contiguous(memory_format=memory_format)
    with torch.no_grad():
        module.qkv.weight.mul_(0.2)  # else values of thousands
    want = output_and_gradients(module, x, lambda x: gsa_reference(module, x))
    module = module.to("cuda", dtype)
    got = output_and_gradients(module, x.to("cuda", dtype), module)
    limit = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    for g, w in zip(got, want, strict=True):
        assert relative_error(g.cpu().double(), w) < limit


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor's own imports
def test_compiles_as_one_graph() -> None:
    model, x = network().cuda(), images().cuda()
    assert_close(gradients(torch.compile(model, fullgraph=True), x), gradients(model, x))


@pytest.fixture
def nccl(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_sync_batch_norm_and_ddp_leave_the_figures_as_they_are(nccl: None) -> None:
    want = gradients(network().cuda(), images().cuda())
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(network().cuda())
    assert not any(type(m) is nn.BatchNorm2d for m in synchronised.modules())
    replica = nn.parallel.DistributedDataParallel(synchronised, device_ids=[0])
    loss = cross_entropy(replica(images().cuda()), torch.arange(8, device="cuda") % 5)
    loss.backward()
    got = [loss.detach(), *(p.grad for p in synchronised.parameters() if p.grad is not None)]
    assert_close(got, want)
