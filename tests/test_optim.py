"""Schedules at their ends and against torch's; optimizers against formulas; a masked step changes no bit."""

import copy
import io
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gsa_models import create_model
from pipeline.config import ConfigError, OptimConfig
from pipeline.optim import Ema, lr_at, masked_step, optimizer, peak_lr

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("sgd", "adamw", "lamb")
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
DECAY = 0.05


def small_model(device: str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = create_model("gsa_resnet_tiny", num_classes=3, image_size=32, heads=4, placement="gcgc")
    return model.to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]


def config(name: Any = "sgd", **values: Any) -> OptimConfig:
    return OptimConfig(**{"name": name, "weight_decay": DECAY, **values})


def set_gradients(model: nn.Module, seed: int, scale: float = 1.0) -> None:
    """Of the weights' memory format, as autograd gives them."""
    random = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        value = torch.randn(parameter.shape, generator=random) * scale
        parameter.grad = torch.empty_like(parameter).copy_(value)


def set_lr(optim: torch.optim.Optimizer, lr: float) -> None:
    for group in optim.param_groups:
        group["lr"] = lr


def flag(value: bool, model: nn.Module) -> Tensor:
    return torch.tensor(value, device=next(model.parameters()).device)


def bits(tensor: Tensor) -> bytes:
    """Nan is equal to nan, and zero is not to minus zero."""
    return tensor.detach().cpu().contiguous().numpy().tobytes()


def same_bits(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape and one.stride() == other.stride()
        return same and bits(one) == bits(other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_bits(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same_bits, one, other))
    return bool(one == other)


def everything(model: nn.Module, optim: torch.optim.Optimizer) -> dict[str, Any]:
    """Weights, moments, counters, settings: without what the library notes of a step and never reads."""
    state = copy.deepcopy(optim.state_dict())
    for values in state["state"].values():
        for note in ("weight_norm", "adam_norm", "trust_ratio"):
            values.pop(note, None)
    return {"model": copy.deepcopy(model.state_dict()), **state}


# --- learning rate -----------------------------------------------------------------------------------------


def test_the_peak_grows_with_the_global_batch_by_the_linear_rule() -> None:
    assert peak_lr(OptimConfig(lr=0.1, global_batch=256)) == pytest.approx(0.1)
    assert peak_lr(OptimConfig(lr=0.1, global_batch=2048)) == pytest.approx(0.8)
    assert peak_lr(OptimConfig(lr=0.2, global_batch=64)) == pytest.approx(0.05)
    assert peak_lr(OptimConfig(lr=0.1, lr_rule="none", global_batch=2048)) == 0.1


def rates(steps: int, **values: Any) -> list[float]:
    optim = OptimConfig(**{"lr": 2.0, "lr_rule": "none", **values})
    return [lr_at(step, optim, steps=steps) for step in range(optim.epochs * steps + 1)]


def test_the_learning_rate_rises_linearly_and_falls_as_a_half_cosine() -> None:
    found = rates(10, epochs=11, warmup_epochs=1.0)
    assert found[:11] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.0])
    assert found[35] == pytest.approx(1 + math.sqrt(0.5))  # a quarter of the way down
    assert found[60] == pytest.approx(1.0)
    assert found[85] == pytest.approx(1 - math.sqrt(0.5))
    assert found[109] == pytest.approx(1 - math.cos(math.pi / 100))  # one step before zero
    assert found[110] == 0.0
    assert all(a >= b > 0 for a, b in pairwise(found[10:110]))


def test_the_schedules_have_no_holes_at_their_edges() -> None:
    assert rates(4, epochs=1, warmup_epochs=0.0)[0] == 2.0
    assert rates(1, epochs=2, warmup_epochs=1.9) == [1.0, 2.0, 2.0]  # the warm-up is rounded to all steps
    assert rates(1, epochs=2, warmup_epochs=1.9, schedule="step", step_epochs=0.1) == [1.0, 2.0, 0.02]
    assert rates(1, epochs=2, warmup_epochs=1.9, schedule="onecycle")[:2] == pytest.approx([0.08, 2.0])
    assert rates(1, epochs=2, warmup_epochs=0.1, schedule="onecycle")[1] == pytest.approx(8e-6)


def test_the_step_schedule_falls_to_a_tenth_counted_from_the_start_of_training() -> None:
    found = rates(10, epochs=90, warmup_epochs=5.0, schedule="step", step_epochs=30.0)
    assert found[:50] == pytest.approx([2.0 * (step + 1) / 50 for step in range(50)])
    falls = [step for step in range(50, 900) if found[step] != found[step - 1]]
    assert falls == [300, 600]
    assert [found[step] for step in (50, 299, 300, 599, 600, 899)] == pytest.approx(
        [2.0, 2.0, 0.2, 0.2, 0.02, 0.02]
    )


def test_a_step_schedule_takes_parts_of_epochs() -> None:
    found = rates(10, epochs=1, warmup_epochs=0.0, schedule="step", step_epochs=0.3)
    assert found[:10] == pytest.approx([2.0] * 3 + [0.2] * 3 + [0.02] * 3 + [0.002])


@pytest.mark.parametrize(
    ("epochs", "steps", "warmup"), [(10, 7, 0.0), (10, 7, 2.5), (3, 1, 0.0), (90, 10, 5.0)]
)
def test_one_cycle_is_that_of_torch(epochs: int, steps: int, warmup: float) -> None:
    total = epochs * steps
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    torchs = torch.optim.lr_scheduler.OneCycleLR(
        sgd,
        2.0,
        total_steps=total,
        pct_start=round(warmup * steps) / total or 0.3,
        cycle_momentum=False,
        div_factor=25,
        final_div_factor=1e4,
    )
    expected = []
    for _ in range(total):
        expected.append(sgd.param_groups[0]["lr"])
        sgd.step()
        if len(expected) < total:
            torchs.step()
    found = rates(steps, epochs=epochs, warmup_epochs=warmup, schedule="onecycle")
    assert found[:total] == pytest.approx(expected, rel=1e-9)
    assert found[total - 1] == pytest.approx(2.0 / 250_000)
    if warmup:
        assert found[0] == pytest.approx(2.0 / 25)
        assert found[round(warmup * steps) - 1] == max(found) == pytest.approx(2.0)


# --- optimizer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_weight_decay_is_for_the_weights_of_convolutions_and_matrices(name: str) -> None:
    model = small_model()
    layers = (m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    weights = {id(layer.weight) for layer in layers}
    decayed, others = optimizer(model, config(name)).param_groups
    assert {id(p) for p in decayed["params"]} == weights
    assert {id(p) for p in others["params"]} == {id(p) for p in model.parameters()} - weights
    assert (decayed["weight_decay"], others["weight_decay"]) == (DECAY, 0.0)
    names = {id(p): key for key, p in model.named_parameters()}
    free = [names[id(p)] for p in others["params"]]
    assert sum(key.endswith("_table") for key in free) == 4  # the tables of the two GSA modules
    assert "head.2.bias" in free


@pytest.mark.parametrize("name", NAMES)
def test_without_a_gradient_only_decayed_weights_shrink(name: str) -> None:
    model = small_model()
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    optim = optimizer(model, config(name, momentum=0.0))
    set_gradients(model, 0, scale=0.0)
    set_lr(optim, 0.5)
    masked_step(optim, flag(True, model))
    share = {"sgd": DECAY, "adamw": DECAY, "lamb": 1.0}[name]  # LAMB: the update is as long as the weight
    for key, value in model.named_parameters():
        shrunk = value.ndim > 1 and not key.endswith("_table")
        torch.testing.assert_close(value.detach(), before[key] * (1 - 0.5 * share if shrunk else 1))


def test_the_optimizer_is_the_one_of_the_recipe() -> None:
    sgd = optimizer(small_model(), config(momentum=0.8)).defaults
    assert (sgd["momentum"], sgd["nesterov"], sgd["fused"]) == (0.8, True, True)
    assert optimizer(small_model(), config(momentum=0.0)).defaults["nesterov"] is False
    adamw = optimizer(small_model(), config("adamw", momentum=0.8))
    assert isinstance(adamw, torch.optim.AdamW)
    assert (adamw.defaults["betas"], adamw.defaults["fused"]) == ((0.8, 0.999), True)
    lamb = optimizer(small_model(), config("lamb", momentum=0.8))
    assert type(lamb).__module__.startswith("pytorch_optimizer")
    assert lamb.defaults["betas"] == (0.8, 0.999)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_fused_step_on_channels_last_weights_is_the_plain_one(
    name: str, dtype: torch.dtype, device: str
) -> None:
    model, twin = small_model(device, dtype), small_model(device, dtype)
    fused = optimizer(model, config(name))
    groups = optimizer(twin, config(name)).param_groups
    plain = (
        torch.optim.SGD([{**group, "fused": False} for group in groups], lr=0.0)
        if name == "sgd"
        else torch.optim.AdamW([{**group, "fused": False} for group in groups])
    )
    for step in range(4):
        set_gradients(model, step)
        set_gradients(twin, step)
        set_lr(fused, 0.1 / (step + 1))
        set_lr(plain, 0.1 / (step + 1))
        masked_step(fused, flag(True, model))
        plain.step()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def lamb_plainly(
    weight: Tensor, gradients: Sequence[Tensor], rates: Sequence[float], *, decay: float, trust: bool
) -> Tensor:
    """Algorithm 2 of arXiv 1904.00962 with phi(z) = z, but for the two differences that the Status line states.

    Epsilon stands where section 2 of arXiv 1412.6980 has it after its reordering.
    """
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for t, (gradient, lr) in enumerate(zip(gradients, rates, strict=True), 1):
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        bias1, bias2 = 1 - 0.9**t, 1 - 0.999**t
        update = first / bias1 / ((second / bias2).sqrt() + 1e-6 / math.sqrt(bias2))
        ratio: Tensor | float = 1.0
        if trust:
            update = update + math.sqrt(bias2) / bias1 * decay * weight  # published: decay * weight
            zero = bias1 / math.sqrt(bias2)  # published: 1
            ratio = weight.norm() / update.norm() if weight.norm() > 0 else zero
        weight = weight - lr * ratio * update
    return weight


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_lamb_is_the_published_one(decay: float) -> None:
    """With weights of norm 0 and above 10, gradients of norm above 1, biases; only steps that count."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 5), nn.Linear(5, 4)).double()
    nn.init.normal_(model[0].weight, std=2.0)
    nn.init.zeros_(model[1].weight)
    start = {key: value.detach().clone() for key, value in model.named_parameters()}
    gradients: dict[str, list[Tensor]] = {key: [] for key in start}
    optim = optimizer(model, config("lamb", weight_decay=decay))
    lrs = [0.01, 0.02, 0.05, 0.04, 0.03, 0.02]
    for step, lr in enumerate(lrs):
        set_gradients(model, step, scale=10.0 ** (step - 3))
        for key, value in model.named_parameters():
            gradients[key].append(value.grad.clone())  # type: ignore[union-attr]
        set_lr(optim, lr)
        masked_step(optim, flag(True, model))
    for key, value in model.named_parameters():
        expected = lamb_plainly(start[key], gradients[key], lrs, decay=decay, trust=value.ndim > 1)
        torch.testing.assert_close(
            value.detach(), expected, rtol=1e-5, atol=1e-8, msg=lambda m, k=key: f"{k}: {m}"
        )


def test_lamb_without_its_package_is_an_error_that_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(ConfigError, match=r"optim.name lamb needs .* next: pip install 'pytorch_optimizer>="):
        optimizer(small_model(), config("lamb"))


# --- masked step -------------------------------------------------------------------------------------------


def spoil(model: nn.Module, kind: str) -> None:
    """Gradients of a step that must not count."""
    set_gradients(model, 99)
    for parameter in model.parameters():
        gradient = parameter.grad
        assert gradient is not None
        if kind == "huge":
            gradient.mul_(torch.finfo(gradient.dtype).max / 10)
        else:
            gradient[0] = float(kind)


def run(
    name: str,
    *,
    bad: int | None,
    kind: str = "nan",
    skip: int | None = None,
    device: str = "cpu",
    **values: Any,
) -> dict[str, Any]:
    """Six steps; that of batch `bad` is masked, that of batch `skip` does not happen."""
    model = small_model(device, values.pop("dtype", torch.float32))
    optim = optimizer(model, config(name, **values))
    for batch in range(6):
        if batch == skip:
            continue
        set_gradients(model, batch)
        if batch == bad:
            spoil(model, kind)
        set_lr(optim, 0.1)
        masked_step(optim, flag(batch != bad, model))
    return everything(model, optim)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["nan", "inf", "huge"])
@pytest.mark.parametrize("bad", [0, 3, 5])
@pytest.mark.parametrize("name", NAMES)
def test_a_masked_step_is_as_if_it_had_not_been(name: str, bad: int, kind: str, device: str) -> None:
    """First, in the middle, last: weights, moments and counters, bit for bit."""
    found = run(name, bad=bad, kind=kind, device=device)
    assert same_bits(found, run(name, bad=None, skip=bad, device=device))
    assert not same_bits(found, run(name, bad=None, device=device))  # a batch less is not the same


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("values", [{"momentum": 0.0}, {"dtype": torch.float64}], ids=str)
def test_a_masked_step_changes_nothing_without_momentum_nor_in_float64(
    name: str, values: dict[str, Any]
) -> None:
    assert same_bits(run(name, bad=0, **values), run(name, bad=None, skip=0, **values))


@pytest.mark.parametrize("name", NAMES)
def test_a_masked_step_changes_no_bit_of_what_is_there(name: str) -> None:
    """Minus zero, and what stands in a weight by chance, included."""
    model = small_model()
    optim = optimizer(model, config(name))
    set_gradients(model, 0)
    set_lr(optim, 0.1)
    masked_step(optim, flag(True, model))
    for parameter in model.parameters():
        parameter.data[0] = -0.0
    before = everything(model, optim)
    spoil(model, "nan")
    masked_step(optim, flag(False, model))
    assert same_bits(everything(model, optim), before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_a_masked_step_that_counts_is_a_plain_step(name: str, device: str) -> None:
    ends = []
    for step in (lambda optim, model: masked_step(optim, flag(True, model)), lambda optim, _: optim.step()):
        model = small_model(device)
        optim = optimizer(model, config(name))
        for batch in range(3):
            set_gradients(model, batch)
            set_lr(optim, 0.1)
            step(optim, model)
        ends.append(everything(model, optim))
    assert same_bits(*ends)


@pytest.mark.parametrize("name", NAMES)
def test_a_plain_step_after_a_masked_one_counts(name: str) -> None:
    model = small_model()
    optim = optimizer(model, config(name))
    set_gradients(model, 0)
    set_lr(optim, 0.1)
    masked_step(optim, flag(False, model))
    before = everything(model, optim)
    optim.step()
    assert not same_bits(everything(model, optim), before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_a_run_goes_on_from_its_saved_state_bit_for_bit(name: str, device: str) -> None:
    """Saved after three of six steps, the first of them masked; loaded as a checkpoint is, on the CPU."""

    def train(model: nn.Module, optim: torch.optim.Optimizer, batches: range) -> None:
        for batch in batches:
            set_gradients(model, batch)
            if batch in (0, 4):
                spoil(model, "nan")
            set_lr(optim, 0.1)
            masked_step(optim, flag(batch not in (0, 4), model))

    model = small_model(device)
    optim = optimizer(model, config(name))
    train(model, optim, range(3))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optim.state_dict()}, file)
    train(model, optim, range(3, 6))

    file.seek(0)
    saved = torch.load(file, map_location="cpu", weights_only=True)
    again = small_model(device)
    resumed = optimizer(again, config(name))
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(again, resumed, range(3, 6))
    assert same_bits(everything(again, resumed), everything(model, optim))


class Waits(TorchDispatchMode):
    """Raises where a number is asked of the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "waits for the device"
        return func(*args, **(kwargs or {}))


@contextmanager
def without_waiting(device: str) -> Iterator[None]:
    with Waits():
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")


def test_waiting_for_the_device_would_be_seen() -> None:
    with pytest.raises(AssertionError, match="waits"), without_waiting("cpu"):
        bool(torch.tensor(True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_neither_a_masked_step_nor_the_average_waits_for_the_device(name: str, device: str) -> None:
    model = small_model(device)
    optim, ema = optimizer(model, config(name)), Ema(model, 0.9)
    set_gradients(model, 0)
    set_lr(optim, 0.1)
    for ok in (flag(False, model), flag(True, model)):
        with without_waiting(device):
            masked_step(optim, ok)
            ema.update(model, ok)


# --- averaged weights --------------------------------------------------------------------------------------


def move(model: nn.Module, seed: int) -> None:
    """As a step does: new weights, running statistics and counts."""
    random = torch.Generator().manual_seed(seed)
    for tensor in (*model.parameters(), *model.buffers()):
        noise = torch.randn(tensor.shape, generator=random)
        tensor.data.add_(noise if tensor.is_floating_point() else 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.99])
def test_the_average_moves_by_its_formula(decay: float, device: str) -> None:
    model = small_model(device, torch.float64)
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    ema = Ema(model, decay)
    for step in range(4):
        move(model, step)
        ema.update(model, flag(step != 2, model))
        if step == 2:
            continue
        for key, value in model.state_dict().items():
            expected[key] = (
                expected[key] * decay + value * (1 - decay) if value.is_floating_point() else value.clone()
            )
    found = ema.model.state_dict()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(
            found[key], value, rtol=1e-12, atol=1e-12, msg=lambda m, k=key: f"{k}: {m}"
        )
    assert any(not value.is_floating_point() for value in expected.values())


def poison(model: nn.Module, kind: float) -> None:
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(kind if tensor.is_floating_point() else 7)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [math.nan, math.inf, -3e38, 1.0])
def test_the_average_changes_no_bit_where_a_step_does_not_count(kind: float, device: str) -> None:
    model = small_model(device)
    for parameter in model.parameters():
        parameter.data[0] = -0.0
    ema = Ema(model, 0.9)
    before = copy.deepcopy(ema.model.state_dict())
    poison(model, kind)
    ema.update(model, flag(False, model))
    assert same_bits(ema.model.state_dict(), before)
    ema.update(model, flag(True, model))
    assert not same_bits(ema.model.state_dict(), before)


def test_the_average_is_a_copy_for_evaluation() -> None:
    model = small_model().train()
    set_gradients(model, 0)
    ema = Ema(model, 0.9)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert not any(module.training for module in ema.model.modules())
    assert same_bits(ema.model.state_dict(), copy.deepcopy(model.state_dict()))  # strides as well
    memory = {tensor.data_ptr() for tensor in model.state_dict().values()}
    places = {key: tensor.data_ptr() for key, tensor in ema.model.state_dict().items()}
    assert not memory & set(places.values())
    before = copy.deepcopy(model.state_dict())
    for _ in range(3):
        ema.update(model, flag(True, model))
    assert same_bits(model.state_dict(), before)
    assert {key: tensor.data_ptr() for key, tensor in ema.model.state_dict().items()} == places
    assert all(p.grad is None and not p.requires_grad for p in ema.model.parameters())


def test_the_average_follows_weights_that_are_exchanged() -> None:
    """Position tables are others after the image size has changed; in both models alike."""
    model = nn.Sequential(nn.Linear(2, 2))
    ema = Ema(model, 0.5)
    for one in (model, ema.model):
        one[0].weight = nn.Parameter(torch.zeros(3, 2), requires_grad=one is model)  # type: ignore[index]
    model[0].weight.data.fill_(4.0)
    ema.update(model, flag(True, model))
    assert torch.equal(ema.model[0].weight, torch.full((3, 2), 2.0))  # type: ignore[index]
