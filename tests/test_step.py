"""One step against a slow obvious reference; who gets weight decay; the schedule; exact evaluation."""

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gsa_models import create_model
from pipeline.batch_augment import DRAWS
from pipeline.config import AugmentConfig, ComputeConfig, Config, OptimConfig
from pipeline.data import Batch, to_device
from pipeline.faults import Faults
from pipeline.optim import Ema, optimizer
from pipeline.step import SUMS, TrainState, loss_of, train_step, world_sums

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
LR, MOMENTUM, DECAY, SMOOTHING = 0.3, 0.9, 0.05, 0.1
COMPUTE = ComputeConfig()
OPTIM = OptimConfig(momentum=MOMENTUM, weight_decay=DECAY, label_smoothing=SMOOTHING)


def small_model(drop_path: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    model = create_model(
        "gsa_resnet_tiny", num_classes=3, image_size=32, heads=4, placement="gcgc", drop_path=drop_path
    )
    for name, parameter in model.named_parameters():  # a block starts as its shortcut: make it take part
        if name.endswith("expand_norm.weight"):
            nn.init.constant_(parameter, 0.5)
    return model


def batches(number: int, *, size: int = 4, seed: int = 0) -> list[Batch]:
    rng = np.random.default_rng(seed)
    return [
        Batch(
            torch.from_numpy(rng.integers(0, 256, (size, 32, 32, 3), np.uint8)),
            torch.from_numpy(rng.integers(0, 3, size)),
            np.arange(size),
            torch.rand(size, DRAWS, generator=torch.Generator().manual_seed(seed)),
        )
        for _ in range(number)
    ]


def new_state(model: nn.Module, optim: OptimConfig = OPTIM, **faults: Any) -> TrainState:
    ema = Ema(model, optim.ema) if optim.ema else None
    return TrainState(model, model, optimizer(model, optim), CPU, Faults(CPU, **faults), ema)


def step(
    state: TrainState,
    parts: list[Batch],
    *,
    first: int = 0,
    seed: int = 0,
    lr: float = LR,
    optim: OptimConfig = OPTIM,
    compute: ComputeConfig = COMPUTE,
) -> dict[str, float]:
    """A step, and what it summed up."""
    train_step(state, parts, Config(seed=seed, optim=optim, compute=compute), first=first, lr=lr, classes=3)
    found = dict(zip(SUMS, state.sums.tolist(), strict=True))
    state.sums.zero_()
    return found


# --- one step ----------------------------------------------------------------------------------------------


def forward_plainly(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits, and the loss written out: cross-entropy against 1 - s on the label and s spread over all."""
    logits = model(to_device(batch.images, CPU).to(next(model.parameters()).dtype))
    target = torch.full_like(logits, SMOOTHING / logits.shape[1])
    target[range(len(batch.labels)), batch.labels] += 1 - SMOOTHING
    return logits, -(target * logits.log_softmax(1)).sum(1).mean()


def step_plainly(
    model: nn.Module, velocity: dict[str, Tensor], parts: list[Batch]
) -> tuple[nn.Module, dict[str, float]]:
    """The model after a step: each micro-batch on a copy of its own, means of the results, Nesterov's rule."""
    copies, losses, correct = [], [], 0
    for part in parts:
        twin = copy.deepcopy(model).train()
        logits, loss = forward_plainly(twin, part)
        loss.backward()
        copies.append(twin)
        losses.append(loss.item())
        correct += int((logits.argmax(1) == part.labels).sum())
    after = copy.deepcopy(model)
    gradients = [dict(twin.named_parameters()) for twin in copies]
    for name, parameter in after.named_parameters():
        gradient = torch.stack([g[name].grad for g in gradients]).mean(0)  # type: ignore[arg-type]
        decayed = parameter.ndim > 1 and "table" not in name
        gradient = gradient + (DECAY * parameter.detach() if decayed else 0)
        velocity[name] = MOMENTUM * velocity[name] + gradient if name in velocity else gradient
        parameter.data -= LR * (gradient + MOMENTUM * velocity[name])
    for name, buffer in after.named_buffers():
        buffer.copy_(torch.stack([dict(twin.named_buffers())[name] for twin in copies]).double().mean(0))
    count = sum(len(part.labels) for part in parts)
    means = [torch.stack([g[n].grad for g in gradients]).mean(0) for n in gradients[0]]  # type: ignore[misc]
    sums = {"loss": sum(losses) / len(losses) * count, "correct": correct, "count": count}
    return after, {
        **sums,
        "grad_norm": float(torch.cat([m.flatten() for m in means]).norm()),
        "steps": 1,
        "bad": 0,
        "skipped": 0,
    }


@pytest.mark.parametrize("number", [1, 3])
def test_a_step_is_the_mean_over_its_micro_batches(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps, so that momentum counts: weights, running statistics and sums are the reference's.

    In float64, because batch norm over four samples magnifies the rounding of float32.
    """
    monkeypatch.setattr(
        "pipeline.batch_augment.to_device", lambda images, device: to_device(images, device).double()
    )
    expected, velocity = small_model().double(), {}
    state = new_state(copy.deepcopy(expected))
    for turn in range(2):
        parts = batches(number, seed=turn)
        expected, sums = step_plainly(expected, velocity, parts)
        assert step(state, parts) == pytest.approx(sums, rel=1e-5)
        assert state.step == turn + 1
        for (name, one), other in zip(
            state.model.state_dict().items(), expected.state_dict().values(), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_running_statistics_move_once_a_step_whatever_the_micro_batches() -> None:
    """Three equal micro-batches move them exactly as far as one of them."""
    part = batches(1)[0]
    once, thrice = new_state(small_model()), new_state(small_model())
    step(once, [part], lr=0.0)
    step(thrice, [part] * 3, lr=0.0)
    start = small_model().state_dict()
    for name, value in once.model.state_dict().items():
        if "running" in name or "tracked" in name:
            assert not torch.equal(value, start[name]), name
            torch.testing.assert_close(thrice.model.state_dict()[name], value)


def test_a_step_trains_also_after_an_evaluation() -> None:
    state = new_state(small_model())
    state.model.eval()
    before = state.model.state_dict()["stem.1.running_mean"].clone()
    step(state, batches(1), lr=0.0)
    assert state.model.training
    assert not torch.equal(state.model.state_dict()["stem.1.running_mean"], before)


def test_what_a_network_draws_depends_on_seed_and_micro_batch_alone() -> None:
    """So a step is the same for one rank with two micro-batches, for two ranks with one, and after a restart."""

    def loss(parts: list[Batch], *, first: int, seed: int = 0) -> float:
        state = new_state(small_model(drop_path=0.9))
        return step(state, parts, first=first, seed=seed, lr=0.0)["loss"]

    one, two = batches(2)
    assert loss([one, two], first=6) == pytest.approx(loss([one], first=6) + loss([two], first=7))
    assert loss([one], first=6) != loss([one], first=7)
    assert loss([one], first=6) != loss([one], first=6, seed=1)


def test_a_step_leaves_the_global_random_generator_alone() -> None:
    state = new_state(small_model(drop_path=0.5))
    before = torch.get_rng_state()
    step(state, batches(1))
    assert torch.equal(torch.get_rng_state(), before)


def test_sums_of_one_rank_are_its_own() -> None:
    assert world_sums(torch.tensor([1.5, 2.0])) == [1.5, 2.0]


# --- steps that are left out -------------------------------------------------------------------------------


def content(state: TrainState) -> dict[str, Tensor]:
    """All that a step may change."""
    found = dict(state.model.state_dict())
    for i, values in state.optimizer.state_dict()["state"].items():
        found |= {f"optimizer {i} {key}": value for key, value in values.items()}
    if state.ema:
        found |= {f"ema {key}": value for key, value in state.ema.model.state_dict().items()}
    return {key: value.clone() for key, value in found.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(
        torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
        for a, b in zip(one.values(), other.values(), strict=True)
    )


def spoil_loss(state: TrainState, value: float) -> Any:
    return state.model.register_forward_hook(lambda m, i, logits: logits * value)


def spoil_gradient(state: TrainState, value: float) -> Any:
    """Of one weight in the middle, behind a loss that is finite."""
    return dict(state.model.named_parameters())["stem.0.weight"].register_hook(lambda g: g * value)


def spoil_statistics(state: TrainState, value: float) -> Any:
    """Running statistics of one norm, behind a loss and a gradient that are finite."""
    norm = next(m for m in state.model.modules() if isinstance(m, nn.BatchNorm2d))

    def spoil(gradient: Tensor) -> None:
        norm.running_var.mul_(value)  # type: ignore[union-attr, operator]

    return norm.weight.register_hook(spoil)


SPOILERS = {"loss": spoil_loss, "gradient": spoil_gradient, "statistics": spoil_statistics}


NOT_FINITE = [float(word) for word in ("nan", "inf", "-inf")]
OFTEN = [(name, at, "gradient", NOT_FINITE[1]) for name in ("sgd", "adamw", "lamb") for at in (0, 2)] + [
    ("sgd", 1, where, value) for where in SPOILERS for value in NOT_FINITE[:2]
]
ALL = itertools.product(("sgd", "adamw", "lamb"), range(4), SPOILERS, NOT_FINITE)  # R12: 108 cases
REST = [pytest.param(*case, marks=pytest.mark.slow) for case in ALL if str(case) not in map(str, OFTEN)]


@pytest.mark.parametrize(("name", "at", "where", "value"), [*OFTEN, *REST])
def test_a_step_that_is_not_finite_changes_nothing(name: Any, at: int, where: str, value: float) -> None:
    """Bit for bit a run without that batch: weights, optimizer, averages, statistics, sums."""
    optim = OptimConfig(name=name, ema=0.9, clip_norm=1.0)
    spoiled, clean = (new_state(small_model(), optim, max_skips=9) for _ in range(2))
    for turn in range(5):
        parts = batches(2, seed=turn)
        if turn == at:
            before, hook = content(spoiled), SPOILERS[where](spoiled, value)
            sums = step(spoiled, parts, first=2 * turn, optim=optim)
            hook.remove()
            after = content(spoiled)  # AdamW has made its moments of zeros, if it is the first
            assert same({key: after[key] for key in before}, before)
            assert sums == dict.fromkeys(SUMS, 0.0) | {"skipped": 1.0}
            clean.step += 1
        else:
            found = [step(state, parts, first=2 * turn, optim=optim) for state in (spoiled, clean)]
            assert found[0] == found[1]
            assert found[0]["skipped"] == 0
    assert spoiled.step == clean.step == 5
    assert same(content(spoiled), content(clean))
    assert not same(content(clean), before)


def test_too_many_steps_in_a_row_end_a_run_and_are_named() -> None:
    state = new_state(small_model(), max_skips=2)
    for turn, bad in enumerate([True, True, False, True, True, True]):
        hook = spoil_loss(state, float("nan")) if bad else None
        step(state, batches(1, seed=turn))
        if hook:
            hook.remove()
        if turn < 5:
            state.faults.check(state.step)
    expected = (
        "rank 0 at step 1, 2, 4, 5, 6; 3 steps in a row were left out, optim.max_skips allows 2; next: "
    )
    with pytest.raises(FloatingPointError, match=expected):
        state.faults.check(state.step)


def test_steps_left_out_are_counted_on_from_a_checkpoint() -> None:
    state, resumed = (new_state(small_model(), max_skips=2) for _ in range(2))
    for one in (state, resumed):
        spoil_loss(one, float("nan"))
    for turn in range(2):
        step(state, batches(1, seed=turn))
    resumed.faults.load_state_dict(state.faults.state_dict())
    resumed.step = state.step
    step(resumed, batches(1))
    with pytest.raises(FloatingPointError, match="rank 0 at step 3; 3 steps in a row were left out"):
        resumed.faults.check(resumed.step)


def test_without_any_allowed_the_first_step_left_out_ends_a_run() -> None:
    state = new_state(small_model())
    step(state, batches(1))
    state.faults.check(state.step)
    spoil_loss(state, float("inf"))
    step(state, batches(1))
    with pytest.raises(FloatingPointError, match="rank 0 at step 2; 1 steps in a row"):
        state.faults.check(state.step)


# --- precision, clipping, losses, averages -----------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_nearly_like_float32(precision: Any) -> None:
    """float16 on a CPU: slow, but the scale of the loss and what undoes it are those of a GPU."""
    plain, half = new_state(small_model()), new_state(small_model(), fp16=precision == "fp16", max_skips=9)
    half.faults.scale.clamp_(max=256.0)
    one, other = step(plain, batches(2)), step(half, batches(2), compute=ComputeConfig(precision=precision))
    assert other["loss"] == pytest.approx(one["loss"], rel=0.03)
    assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=0.5)  # batch norm over four samples
    assert other["skipped"] == 0
    assert other["loss"] != one["loss"], "nothing was computed in half precision"
    assert all(p.dtype == torch.float32 for p in half.model.parameters())


def test_an_overflow_of_float16_halves_the_scale_and_is_not_held_against_the_run() -> None:
    state = new_state(small_model(), fp16=True)
    first, before = float(state.faults.scale), content(state)
    hook = spoil_gradient(state, 1e30)
    compute = ComputeConfig(precision="fp16")
    for _ in range(3):
        step(state, batches(1), compute=compute)
        state.faults.check(state.step)
    hook.remove()
    assert float(state.faults.scale) == first / 8
    assert same(content(state), before)
    state.faults.scale.fill_(64.0)
    state.faults.good.fill_(1999)
    step(state, batches(1), compute=compute)
    assert not same(content(state), before)
    assert float(state.faults.scale) == 128
    state.faults.scale.fill_(1.0)
    spoil_loss(state, float("nan"))
    step(state, batches(1), compute=compute)
    with pytest.raises(FloatingPointError, match="at step"):  # no scale is to blame
        state.faults.check(state.step)


def test_clipping_bounds_the_gradient_of_the_step_and_tells_the_norm_before() -> None:
    plain, clipped, sgd = new_state(small_model()), new_state(small_model()), OptimConfig(momentum=0.0)
    norm = step(plain, batches(1), lr=0.0, optim=sgd)["grad_norm"]
    start = {k: v.clone() for k, v in clipped.model.named_parameters()}
    half = OptimConfig(momentum=0.0, weight_decay=0.0, clip_norm=norm / 2)
    clipped.optimizer = optimizer(clipped.model, half)
    assert step(clipped, batches(1), lr=1.0, optim=half)["grad_norm"] == pytest.approx(norm)
    moved = torch.cat([(v - start[k]).detach().flatten() for k, v in clipped.model.named_parameters()])
    assert float(moved.norm()) == pytest.approx(norm / 2, rel=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_losses_are_what_their_papers_say(smoothing: float) -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.1, 0.2, -3.0]])
    shares = torch.tensor([[0.7, 0.0, 0.3], [0.1, 0.9, 0.0]])  # a tenth counts as not there
    optim = OptimConfig(loss="bce", label_smoothing=smoothing)
    there = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]) * (1 - smoothing) + smoothing / 3
    p = logits.sigmoid()
    expected = -(there * p.log() + (1 - there) * (1 - p).log()).mean()
    torch.testing.assert_close(loss_of(logits, shares, optim), expected)
    labels = torch.tensor([2, 1])
    one_hot = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    torch.testing.assert_close(loss_of(logits, labels, optim), loss_of(logits, one_hot, optim))
    plain = OptimConfig(label_smoothing=smoothing)
    target = one_hot * (1 - smoothing) + smoothing / 3
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loss_of(logits, labels, plain), expected)
    torch.testing.assert_close(loss_of(logits, one_hot, plain), expected)


def test_averages_follow_the_weights_and_the_statistics() -> None:
    state = new_state(small_model(), OptimConfig(ema=0.75))
    assert state.ema is not None
    expected = {k: v.clone() for k, v in state.model.state_dict().items()}
    for turn in range(2):
        step(state, batches(1, seed=turn))
        for key, value in state.model.state_dict().items():
            if value.is_floating_point():
                expected[key] = 0.75 * expected[key] + 0.25 * value
    for key, value in state.ema.model.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, expected[key], msg=lambda m, k=key: f"{k}: {m}")


# --- nothing waits -----------------------------------------------------------------------------------------


class Waits(TorchDispatchMode):
    """Notes the operations for whose results the host would wait for a device."""

    NAMES = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in self.NAMES:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb"])
def test_a_step_asks_the_device_nothing(name: Any) -> None:
    """On a CPU no question is seen by its time, but each is an operation."""
    optim = OptimConfig(name=name, ema=0.9, clip_norm=1.0, loss="bce")
    augment = AugmentConfig(mixup=0.2, cutmix=1.0, erase=0.5, policy="randaugment", color_jitter=0.3)
    config = Config(optim=optim, augment=augment, compute=ComputeConfig(precision="fp16"))
    state = new_state(small_model(drop_path=0.2), optim, fp16=True)
    with Waits() as waits:
        for turn in range(2):
            train_step(state, batches(2, seed=turn), config, first=0, lr=0.1, classes=3)
    assert not waits.seen
    with Waits() as waits:
        state.faults.check(state.step)  # as this does, which is asked between two steps
    assert waits.seen
