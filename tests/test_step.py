"""One step against a slow obvious reference; who gets weight decay; the schedule; exact evaluation."""

import copy
import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gsa_models import create_model
from pipeline.batch_augment import DRAWS
from pipeline.config import AugmentConfig, OptimConfig
from pipeline.data import Batch, to_device
from pipeline.optim import lr_at, optimizer, peak_lr
from pipeline.step import TrainState, train_step, world_sums

CPU = torch.device("cpu")
LR, MOMENTUM, DECAY, SMOOTHING = 0.3, 0.9, 0.05, 0.1
PLAIN: dict[str, Any] = {"augment": AugmentConfig(), "classes": 3}
OPTIM = OptimConfig(momentum=MOMENTUM, weight_decay=DECAY)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These sums are small: a second thread only waits, long where the machine is shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


def new_state(model: nn.Module, optim: OptimConfig = OPTIM) -> TrainState:
    return TrainState(model, model, optimizer(model, optim), CPU)


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
    return after, {"loss": sum(losses) / len(losses) * count, "correct": correct, "count": count, "bad": 0.0}


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
        found = train_step(state, parts, first=0, seed=0, lr=LR, label_smoothing=SMOOTHING, **PLAIN)
        assert {k: float(v) for k, v in found.items()} == pytest.approx(sums, rel=1e-5)
        assert state.step == turn + 1
        for (name, one), other in zip(
            state.model.state_dict().items(), expected.state_dict().values(), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_running_statistics_move_once_a_step_whatever_the_micro_batches() -> None:
    """Three equal micro-batches move them exactly as far as one of them."""
    part = batches(1)[0]
    once, thrice = new_state(small_model()), new_state(small_model())
    train_step(once, [part], first=0, seed=0, lr=0.0, label_smoothing=0.0, **PLAIN)
    train_step(thrice, [part] * 3, first=0, seed=0, lr=0.0, label_smoothing=0.0, **PLAIN)
    start = small_model().state_dict()
    for name, value in once.model.state_dict().items():
        if "running" in name or "tracked" in name:
            assert not torch.equal(value, start[name]), name
            torch.testing.assert_close(thrice.model.state_dict()[name], value)


def test_a_step_trains_also_after_an_evaluation() -> None:
    state = new_state(small_model())
    state.model.eval()
    before = state.model.state_dict()["stem.1.running_mean"].clone()
    train_step(state, batches(1), first=0, seed=0, lr=0.0, label_smoothing=0.0, **PLAIN)
    assert state.model.training
    assert not torch.equal(state.model.state_dict()["stem.1.running_mean"], before)


def test_what_a_network_draws_depends_on_seed_and_micro_batch_alone() -> None:
    """So a step is the same for one rank with two micro-batches, for two ranks with one, and after a restart."""

    def loss(parts: list[Batch], *, first: int, seed: int = 0) -> float:
        state = new_state(small_model(drop_path=0.9))
        return float(
            train_step(state, parts, first=first, seed=seed, lr=0.0, label_smoothing=0.0, **PLAIN)["loss"]
        )

    one, two = batches(2)
    assert loss([one, two], first=6) == pytest.approx(loss([one], first=6) + loss([two], first=7))
    assert loss([one], first=6) != loss([one], first=7)
    assert loss([one], first=6) != loss([one], first=6, seed=1)


def test_a_step_leaves_the_global_random_generator_alone() -> None:
    state = new_state(small_model(drop_path=0.5))
    before = torch.get_rng_state()
    train_step(state, batches(1), first=0, seed=0, lr=0.1, label_smoothing=0.0, **PLAIN)
    assert torch.equal(torch.get_rng_state(), before)


# --- optimizer ---------------------------------------------------------------------------------------------


def test_weight_decay_is_for_the_weights_of_convolutions_and_matrices() -> None:
    model = small_model()
    layers = (m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    weights = {id(layer.weight) for layer in layers}
    decayed, others = optimizer(model, OPTIM).param_groups
    assert {id(p) for p in decayed["params"]} == weights
    assert {id(p) for p in others["params"]} == {id(p) for p in model.parameters()} - weights
    assert (decayed["weight_decay"], others["weight_decay"]) == (DECAY, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    free = [names[id(p)] for p in others["params"]]
    assert sum(name.endswith("_table") for name in free) == 4  # the tables of the two GSA modules
    assert "head.2.bias" in free


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_without_a_gradient_only_decayed_weights_shrink(name: Any) -> None:
    model = small_model()
    before = {k: v.clone() for k, v in model.named_parameters()}
    optim = optimizer(model, OptimConfig(name=name, weight_decay=DECAY, momentum=0.0))
    for group in optim.param_groups:
        group["lr"] = 0.5
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optim.step()
    for key, value in model.named_parameters():
        shrunk = value.ndim > 1 and not key.endswith("_table")
        torch.testing.assert_close(value.detach(), before[key] * (1 - 0.5 * DECAY if shrunk else 1))


def test_the_optimizer_is_the_one_of_the_recipe() -> None:
    sgd = optimizer(small_model(), OptimConfig(momentum=0.8)).defaults
    assert (sgd["momentum"], sgd["nesterov"]) == (0.8, True)
    assert optimizer(small_model(), OptimConfig(momentum=0.0)).defaults["nesterov"] is False
    adamw = optimizer(small_model(), OptimConfig(name="adamw", momentum=0.8))
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.defaults["betas"] == (0.8, 0.999)


def test_the_learning_rate_rises_linearly_and_falls_as_a_half_cosine() -> None:
    rates = [lr_at(step, peak=2.0, total=110, warmup=10) for step in range(110)]
    assert rates[:11] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.0])
    assert rates[35] == pytest.approx(1 + math.sqrt(0.5))  # a quarter of the way down
    assert rates[60] == pytest.approx(1.0)
    assert rates[85] == pytest.approx(1 - math.sqrt(0.5))
    assert rates[109] == pytest.approx(1 - math.cos(math.pi / 100))  # one step before zero
    assert all(a >= b > 0 for a, b in pairwise(rates[10:]))


def test_the_schedule_has_no_holes_at_its_edges() -> None:
    assert lr_at(0, peak=2.0, total=4, warmup=0) == 2.0
    assert [lr_at(s, peak=2.0, total=2, warmup=2) for s in (0, 1, 2)] == [1.0, 2.0, 2.0]
    assert lr_at(4, peak=2.0, total=4, warmup=0) == 0.0


def test_the_peak_grows_with_the_global_batch() -> None:
    assert peak_lr(OptimConfig(lr=0.1, global_batch=256)) == pytest.approx(0.1)
    assert peak_lr(OptimConfig(lr=0.1, global_batch=2048)) == pytest.approx(0.8)
    assert peak_lr(OptimConfig(lr=0.2, global_batch=64)) == pytest.approx(0.05)


def test_sums_of_one_rank_are_its_own() -> None:
    assert world_sums({"a": torch.tensor(1.5), "b": torch.tensor(2, dtype=torch.int64)}) == {
        "a": 1.5,
        "b": 2.0,
    }
