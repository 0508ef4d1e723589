"""The largest micro-batch: what fits is tried out, what does not is an error that says what would."""

from typing import Any

import pytest
import torch

from pipeline import memory, train
from pipeline.config import ConfigError, InputError
from pipeline.memory import largest_micro_batch
from pipeline.plan import prepare
from pipeline.rundir import Out

CPU = torch.device("cpu")


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A device that holds so many samples; the steps are real."""
    has, real = {"room": 10**9}, memory.train_step

    def step(state: Any, batches: Any, *args: Any, **options: Any) -> None:
        if len(batches[0].images) > has["room"]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        real(state, batches, *args, **options)

    monkeypatch.setattr(memory, "train_step", step)
    monkeypatch.setattr(train, "train_step", step)
    return has


@pytest.mark.parametrize(
    ("holds", "world", "expected"), [(7, 1, 6), (8, 1, 8), (10**9, 1, 24), (10**9, 2, 12), (5, 3, 4)]
)
def test_the_largest_that_fits_and_shares_the_batch_is_found(
    holds: int, world: int, expected: int, room: dict[str, int], mini_config: Any
) -> None:
    room["room"] = holds
    config = mini_config(global_batch=24, micro_batch=2, ema=0.9, mixup=0.2)
    assert largest_micro_batch(config, 3, world=world, device=CPU) == expected


def test_what_holds_not_even_two_is_refused(room: dict[str, int], mini_config: Any) -> None:
    room["room"] = 1
    with pytest.raises(ConfigError, match="not even a micro-batch of two pictures of 32 pixels fits"):
        largest_micro_batch(mini_config(), 3, world=1, device=CPU)


def test_a_run_out_of_memory_says_which_micro_batch_to_use(
    room: dict[str, int], out: Out, mini_config: Any
) -> None:
    room["room"] = 3
    run = prepare(out, mini_config(global_batch=24, micro_batch=8))
    with pytest.raises(InputError, match=r"micro_batch 8 with pictures of 32 .*; next: optim\.micro_batch=4"):
        train.train(run, lambda _: None)


@pytest.mark.gpu
def test_a_real_device_says_where_its_memory_ends(mini_config: Any) -> None:
    """A device of which only a part is left: what is found fits, and the next would not."""
    torch.cuda.set_per_process_memory_fraction(2e9 / torch.cuda.get_device_properties(0).total_memory)
    try:
        config = mini_config(
            image_size=224, global_batch=1024, micro_batch=2, **{"model.name": "gsa_resnet26"}
        )
        found = largest_micro_batch(config, 3, world=1, device=torch.device("cuda"))
        assert 2 <= found < 512
        with pytest.raises(torch.OutOfMemoryError):
            memory._steps(memory.with_micro_batch(config, 4 * found), 3, torch.device("cuda"))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
