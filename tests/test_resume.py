"""A run that is killed within an epoch, stopped, or moved: it goes on where it was, with all that it had."""

import errno
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks, assert_close, forget, output, same_weights, series, stop_after, tensors, weights

from pipeline import checkpoint, metrics, train
from pipeline.config import ConfigError, InputError, Preempted, dump
from pipeline.manifest import ShardError, read_manifest
from pipeline.plan import build_model, first_weights, load_trained, prepare, read_run, size_at
from pipeline.rundir import Out, RunDir

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 3  # of an epoch: 54 samples, 16 at a time
# Everything that a checkpoint has to hold, and everything that is drawn.
ALL: dict[str, Any] = {
    "optim.name": "adamw",
    "lr": 0.02,
    "ema": 0.8,
    "clip_norm": 1.0,
    "drop_path": 0.3,
    "mixup": 0.2,
    "erase": 0.3,
    "schedule": "onecycle",
    "warmup_epochs": 0,
    "epochs": 3,
}
# A record at every second step, so that most checkpoints lie between two, and a checkpoint at every step.
OFTEN: dict[str, Any] = {"log_every": 2, "save_every_s": 0.0}


@pytest.fixture(scope="module")
def undisturbed(
    forks: Any, mini: Path, mini_config: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, RunDir]:
    """The run that nothing disturbs, on one rank, on two, and on four: a ring rounds by the order of its sums."""
    found = {}
    for world in (1, 2, 4):
        out = output(mini, tmp_path_factory.mktemp(f"undisturbed{world}"))
        run = prepare(out, mini_config(**ALL))
        found[world] = Ranks(forks, run, world, log_every=2).finish()
    return found


def newest_step(run: RunDir) -> int:
    found = checkpoint.newest(run.checkpoints)
    return found["step"] if found else 0


# --- kills within an epoch ---------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_run_killed_within_its_epochs_ends_with_the_same_bytes(
    world: int, forks: Any, undisturbed: dict[int, RunDir], out: Out, mini_config: Any
) -> None:
    """Each attempt begins where a checkpoint lies, be it between two records, and loses at most two steps."""
    run = prepare(out, mini_config(**ALL))
    for step in (2, 4, 8):
        Ranks(forks, run, world, hang_at=step, **OFTEN).kill_when_they_hang()
        assert step - 2 <= newest_step(run) <= step
    Ranks(forks, run, world, **OFTEN).finish()
    assert same_weights(run, undisturbed[world])
    assert series(run) == series(undisturbed[world])
    assert len(series(run)) == 6  # steps 2, 3, 4, 6, 8, 9


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_run_killed_after_every_step_ends_with_the_same_bytes(
    world: int, forks: Any, undisturbed: dict[int, RunDir], out: Out, mini_config: Any
) -> None:
    """R1: eight kills, one after each step."""
    run = prepare(out, mini_config(**ALL))
    for step in range(1, 9):
        Ranks(forks, run, world, hang_at=step, **OFTEN).kill_when_they_hang()
    Ranks(forks, run, world, **OFTEN).finish()
    assert same_weights(run, undisturbed[world])
    assert series(run) == series(undisturbed[world])


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("world", [1, 2])
def test_a_hundred_deaths_in_chains_of_five_change_nothing(
    world: int, forks: Any, undisturbed: dict[int, RunDir], mini: Path, mini_config: Any, tmp_path: Path
) -> None:
    """R1, without Ray: 20 runs, each of which dies five times, by one signal or another."""
    rng = random.Random(world)
    for chain in range(20):
        run = prepare(output(mini, tmp_path / str(chain)), mini_config(**ALL))
        for step in sorted(rng.sample(range(1, 9), 5)):
            number = rng.choice([signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
            Ranks(forks, run, world, hang_at=step, **OFTEN).kill_when_they_hang(number)
        Ranks(forks, run, world, **OFTEN).finish()
        assert same_weights(run, undisturbed[world])
        assert series(run) == series(undisturbed[world])


@pytest.mark.parametrize("part", ["ema", "sums", "optimizer", "faults"])
def test_each_part_of_a_checkpoint_matters(
    part: str, undisturbed: dict[int, RunDir], out: Out, mini_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the tests above would see if it were forgotten."""
    run = prepare(out, mini_config(**ALL))
    monkeypatch.setattr(train, "LOG_EVERY", 2)
    with pytest.raises(Preempted, match="stopped at step 5, in epoch 2"):  # between two records
        train.train(run, lambda _: None, stop=stop_after(5))
    assert newest_step(run) == 5
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "newest", checkpoint.newest)
        if part == "optimizer":
            patch.setattr(torch.optim.Optimizer, "load_state_dict", lambda *_: None)
        else:
            forget(part)
        train.train(run, lambda _: None)
    same = same_weights(run, undisturbed[1]), series(run) == series(undisturbed[1])
    assert (
        same
        == {
            "ema": (
                False,
                False,
            ),  # the weights themselves do not depend on their averages: the checkpoint does
            "sums": (True, False),
            "optimizer": (False, False),
            "faults": (True, True),  # nothing was left out: as it should be
        }[part]
    )


def test_another_number_of_ranks_goes_on_within_an_epoch(
    forks: Any, out: Out, mini: Path, mini_config: Any, tmp_path: Path
) -> None:
    """Two ranks stopped in mid-epoch, one goes on: the samples, the sums and, to rounding, the weights of one."""
    config = mini_config(epochs=2, max_skips=1)
    spoilt: dict[str, Any] = {"double": True, "log_every": 3, "spoil": {"ranks": [0, 1], "steps": [4]}}
    alone = Ranks(forks, prepare(output(mini, tmp_path / "alone"), config), **spoilt).finish()
    run = prepare(out, config)
    assert Ranks(forks, run, 2, stop_rank=0, stop_at=5, **spoilt).wait() == [75, 75]
    assert newest_step(run) == 5  # its sums tell of a step that was left out, and of one that was not
    Ranks(forks, run, 1, **spoilt).finish()
    assert_close(run, alone)


# --- asked to stop -----------------------------------------------------------------------------------------


def test_a_wish_of_one_rank_stops_all_with_a_checkpoint(
    forks: Any, undisturbed: dict[int, RunDir], out: Out, mini_config: Any
) -> None:
    run = prepare(out, mini_config(**ALL))
    ranks = Ranks(forks, run, 2, stop_rank=1, stop_at=4, log_every=2)
    assert ranks.wait() == [75, 75]
    stopped = newest_step(run)
    assert ranks.log.read_text().count(f"Preempted: stopped at step {stopped}, in epoch 2") == 2
    assert 4 <= stopped <= 5  # a wish is known to all a step later
    Ranks(forks, run, 2, log_every=2).finish()
    assert same_weights(run, undisturbed[2])
    assert series(run) == series(undisturbed[2])


def test_signals_stop_the_program_with_code_75_and_the_same_command_goes_on(
    mini: Path, tmp_path: Path, mini_config: Any
) -> None:
    recipe, config = tmp_path / "recipe.yaml", mini_config(epochs=15)
    recipe.write_text(dump(config))
    out = output(mini, tmp_path / "out")
    run, first = prepare(out, config), 0
    command = [sys.executable, "-m", "pipeline.train", str(recipe), "--out", str(out.root)]
    for number in (signal.SIGTERM, signal.SIGUSR2):
        program = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        until = time.monotonic() + 60
        while len(metrics.read(run.metrics)) <= first and time.monotonic() < until:
            time.sleep(0.02)
        program.send_signal(number)
        _, said = program.communicate(timeout=60)
        assert program.returncode == 75, said
        stopped = newest_step(run)
        assert f"gsa: stopped at step {stopped}, in epoch {stopped // STEPS + 1}; the same command" in said
        assert STEPS * first < stopped < 15 * STEPS
        first = len(metrics.read(run.metrics))
    subprocess.run(command, check=True, capture_output=True)
    assert [r.step for r in metrics.read(run.metrics)] == [STEPS * n for n in range(1, 16)]


def test_bad_input_of_the_program_is_one_line_and_code_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline.train", "digits", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"gsa: {tmp_path}/shards/digits: no shards there")
    assert done.stderr.count("\n") == 1


def test_numbers_that_are_not_finite_end_the_program_with_one_line(
    mini: Path, tmp_path: Path, mini_config: Any
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump(mini_config(lr=1e30)))
    out = output(mini, tmp_path / "out")
    command = [sys.executable, "-m", "pipeline.train", str(recipe), "--out", str(out.root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("gsa: loss or gradient not finite: rank 0 at step 2; ")
    assert "Traceback" not in done.stderr


# --- numbers that are not finite ---------------------------------------------------------------------------


def test_a_step_that_is_not_finite_on_one_rank_stops_all_and_names_it(
    forks: Any, out: Out, mini_config: Any
) -> None:
    """R12: nothing of it reaches a checkpoint."""
    run = prepare(out, mini_config(**ALL))
    ranks = Ranks(forks, run, 2, spoil={"ranks": [1], "steps": [5]}, **OFTEN)
    assert ranks.wait() == [1, 1]
    said = ranks.log.read_text()
    assert (
        said.count("FloatingPointError: loss or gradient not finite: rank 1 at step 5; 1 steps in a row") == 2
    )
    assert newest_step(run) <= 4
    assert all(v.isfinite().all() for v in weights(run)["model"].values())


def test_steps_that_may_be_left_out_leave_the_rest_as_it_was(forks: Any, out: Out, mini_config: Any) -> None:
    """Whichever rank it was: both runs have left out the same batches."""
    config = mini_config(**ALL, max_skips=2)
    runs = []
    for ranks in ([0], [1]):
        place = Out(out.root / f"rank{ranks[0]}")
        run = prepare(output(out.shards("mini"), place.root), config)
        job = {"spoil": {"ranks": ranks, "steps": [1, 5, 6]}, "log_every": 1}
        runs.append(Ranks(forks, run, 2, **job).finish())
    assert same_weights(*runs)
    records = metrics.read(runs[0].metrics)
    assert [r.metrics["train/skipped_steps"] for r in records] == [1, 0, 0, 0, 1, 1, 0, 0, 0]
    assert "train/loss" not in records[0].metrics


# --- disks and val pictures that fail ----------------------------------------------------------------------


def test_a_disk_that_is_full_for_a_while_costs_no_training(
    undisturbed: dict[int, RunDir],
    out: Out,
    mini_config: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run, real = prepare(out, mini_config(**ALL)), checkpoint.save

    def save(folder: Path, step: int, *args: Any, **options: Any) -> Path:
        if step < 9:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        return real(folder, step, *args, **options)

    monkeypatch.setattr(checkpoint, "save", save)
    monkeypatch.setattr(train, "LOG_EVERY", 2)
    with caplog.at_level(logging.WARNING, "gsa"):
        train.train(run, lambda _: None)
    assert caplog.text.count("No space left on device") == 2
    assert "training goes on" in caplog.text
    assert same_weights(run, undisturbed[1])


def test_a_disk_that_stays_full_is_an_error_at_the_end(
    out: Out, mini_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepare(out, mini_config())

    def save(folder: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(InputError, match=r"No space left on device.*; next: make room"):
        train.train(run, lambda _: None)
    assert not run.result.exists()


def test_a_val_picture_that_cannot_be_read_costs_no_training(
    mini: Path,
    undisturbed: dict[int, RunDir],
    mini_config: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Mended, the run goes on with its evaluation: the epoch is not trained again."""
    folder = shutil.copytree(mini, tmp_path / "own")
    out = output(folder, tmp_path / "out")
    samples, tar = read_manifest(folder).split("val"), folder / "val-000000.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole.replace(whole[int(samples.offset[3]) + 60 :][:4], b"\0\0\0\0", 1))
    run = prepare(out, mini_config(**ALL))
    monkeypatch.setattr(train, "LOG_EVERY", 2)
    with pytest.raises(ShardError, match="crc32 differs"):
        train.train(run, lambda _: None)
    assert newest_step(run) == STEPS
    assert [r.step for r in metrics.read(run.metrics)] == [2]
    tar.write_bytes(whole)
    seen: list[int] = []
    real = train.train_step

    def note(state: Any, *args: Any, **options: Any) -> None:
        seen.append(state.step)
        real(state, *args, **options)

    monkeypatch.setattr(train, "train_step", note)
    train.train(run, lambda _: None)
    assert seen == list(range(STEPS, 3 * STEPS))
    assert same_weights(run, undisturbed[1])
    assert series(run) == series(undisturbed[1])


def test_a_val_picture_that_one_rank_cannot_read_ends_all_with_a_checkpoint(
    forks: Any, mini: Path, mini_config: Any, tmp_path: Path
) -> None:
    """And each says which picture it is, also who could read all of its own."""
    folder = shutil.copytree(mini, tmp_path / "own")
    samples, tar = read_manifest(folder).split("val"), folder / "val-000000.tar"
    content = bytearray(tar.read_bytes())
    content[int(samples.offset[17]) + 60] ^= 4  # of the second rank
    tar.write_bytes(content)
    run = prepare(output(folder, tmp_path / "out"), mini_config())
    ranks = Ranks(forks, run, 2)
    assert ranks.wait() == [1, 1]
    named = [line for line in ranks.log.read_text().splitlines() if "ShardError: " in line]
    assert len(named) == 2
    assert all(f"{tar.name}, sample {samples.key(17)}: crc32 differs" in line for line in named)
    assert newest_step(run) == STEPS


# --- sizes and first weights -------------------------------------------------------------------------------


def test_pictures_grow_on_a_line_to_their_size(mini_config: Any) -> None:
    config = mini_config(image_size=224, start_size=128, epochs=12)
    sizes = [size_at(config, epoch) for epoch in range(12)]
    assert sizes == [128, 128, 160, 160, 160, 192, 192, 192, 224, 224, 224, 224]
    assert {size_at(mini_config(image_size=224), epoch) for epoch in range(2)} == {224}


def test_a_run_whose_pictures_grow_is_killed_and_goes_on_with_the_same_bytes(
    forks: Any, out: Out, mini: Path, mini_config: Any, tmp_path: Path
) -> None:
    """Tables, their averages and their momentum are resampled at the same step, disturbed or not."""
    config = mini_config(**ALL | {"image_size": 64, "start_size": 32, "epochs": 4, "test_size": 96})
    assert [size_at(config, epoch) for epoch in range(4)] == [32, 32, 64, 64]
    clean = Ranks(forks, prepare(output(mini, tmp_path / "clean"), config), log_every=2).finish()
    run = prepare(out, config)
    for step in (6, 8):  # the last before they grow is done; within the epoch after
        Ranks(forks, run, hang_at=step, **OFTEN).kill_when_they_hang()
    Ranks(forks, run, **OFTEN).finish()
    assert same_weights(run, clean)
    assert series(run) == series(clean)
    network, *_ = load_trained(run)
    assert network(torch.zeros(1, 3, 96, 96)).shape == (1, 3)


@pytest.fixture(scope="module")
def source(mini: Path, mini_config: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Out, RunDir]:
    """A run that others begin with."""
    out = output(mini, tmp_path_factory.mktemp("source"))
    run = prepare(out, mini_config(epochs=1, ema=0.5, warmup_epochs=0))
    train.train(run, lambda _: None)
    return out, run


def test_a_run_begins_with_the_weights_of_another(source: tuple[Out, RunDir], mini_config: Any) -> None:
    """Its averages, if it has some: they are what is evaluated and registered."""
    out, run = source
    config = mini_config(init=run.name, epochs=1, lr=1e-30, warmup_epochs=0)
    tuned = prepare(out, config)
    expected = load_trained(run)[0].state_dict()
    found = first_weights(tuned)
    assert found is not None
    assert all(torch.equal(value, found[key]) for key, value in expected.items())
    train.train(tuned, lambda _: None)
    after = weights(tuned)["model"]
    assert torch.equal(after["stem.0.weight"], expected["stem.0.weight"])
    assert prepare(out, config) == tuned  # the same weights: the same run
    assert prepare(out, mini_config(epochs=1, lr=1e-30, warmup_epochs=0)) != tuned


def test_another_size_and_other_classes_keep_what_fits(
    source: tuple[Out, RunDir], digits: Any, mini_config: Any
) -> None:
    """Tables are resampled, the head is new, all else is as it was."""
    out, run = source
    (out.root / "shards" / "digits").symlink_to(digits.folder)
    config = mini_config(init=str(run.path), shards="digits", image_size=64)
    tuned = prepare(out, config)
    found, fresh = first_weights(tuned), build_model(read_run(tuned)[0], 10).state_dict()
    expected = load_trained(run)[0].state_dict()
    assert found is not None
    assert found.keys() == fresh.keys()
    for key, value in found.items():
        if key.startswith("head."):
            assert torch.equal(value, fresh[key]), key
        elif key.endswith("_table"):
            assert value.shape == fresh[key].shape, key
            assert not torch.equal(value, fresh[key]), key
        else:
            assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": "none-such"}, "run none-such: not found"),
        ({"placement": "cggg"}, "init .*: state_dict is of placement"),
        ({"start_size": 64}, "start_size 64: expected at most image_size 32"),
    ],
)
def test_what_cannot_begin_is_refused(
    changes: dict[str, Any], message: str, source: tuple[Out, RunDir], mini_config: Any
) -> None:
    out, run = source
    with pytest.raises(InputError, match=message) as caught:
        prepare(out, mini_config(**{"init": run.name, **changes}))
    assert isinstance(caught.value, ConfigError | InputError)


def test_checkpoints_of_the_first_version_still_lead_on(out: Out, mini_config: Any) -> None:
    """They had neither averages nor sums, and optimizers that were not fused."""
    config = mini_config(epochs=2)
    clean, run = prepare(out, config), prepare(output(out.shards("mini"), out.root / "other"), config)
    train.train(clean, lambda _: None)
    with pytest.raises(KeyboardInterrupt):
        train.train(run, stop_after_an_epoch)
    saved = checkpoint.newest(run.checkpoints)
    assert saved is not None
    old = {key: saved[key] for key in ("model", "optimizer", "step", "metrics")}
    for group in old["optimizer"]["param_groups"]:
        group["fused"] = None
    checkpoint.save(run.checkpoints, STEPS, old)
    train.train(run, lambda _: None)
    a, b = (tensors(weights(r)["model"]) for r in (clean, run))
    assert all(a[key].tobytes() == b[key].tobytes() for key in a)


def stop_after_an_epoch(_: dict[str, float]) -> None:
    raise KeyboardInterrupt
