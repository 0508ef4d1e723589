"""Checkpoints: what was saved comes back to the bit, damage is seen, and a crash costs no earlier one."""

import errno
import hashlib
import json
import logging
import os
import pickle
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline import checkpoint
from pipeline.checkpoint import KEEP, load, newest, save
from pipeline.config import InputError

FILES = ("state.pt", "checksum.json")


@cache
def state(step: int) -> dict[str, Any]:
    """What a run saves, small: weights in several layouts and types, an optimizer with momentum, metrics."""
    torch.manual_seed(step)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    odd = {"half": torch.randn(3).half(), "nan": torch.tensor([float("nan"), -0.0]), "none": None}
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "metrics": {"val/top1": 12.5, "train/loss": 0.1 + 0.2},
        "odd": odd,
    }


def same(one: Any, other: Any) -> bool:
    """Equal to the bit, with types, key order and the layout of tensors in memory."""
    if isinstance(one, Tensor):
        return (
            isinstance(other, Tensor)
            and (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
            and one.numpy().tobytes() == other.numpy().tobytes()
        )
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of steps 1 and 2."""
    for step in (1, 2):
        save(tmp_path / "checkpoints", step, state(step))
    return tmp_path / "checkpoints"


# --- round trip --------------------------------------------------------------------------------------------


def test_what_is_saved_comes_back_to_the_bit(tmp_path: Path) -> None:
    saved = save(tmp_path / "new" / "folder", 7, state(7))
    assert saved == tmp_path / "new" / "folder" / "step-000000007"
    assert same(load(saved), state(7))
    assert not same(load(saved), state(8))
    found = newest(tmp_path / "new" / "folder")
    assert same(found, state(7))


def test_a_loaded_state_gives_the_model_and_optimizer_back(tmp_path: Path) -> None:
    """Also the layout: a channels-last weight that came back otherwise would be summed in another order."""
    found = load(save(tmp_path, 7, state(7)))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    model.load_state_dict(found["model"])
    optimizer.load_state_dict(found["optimizer"])
    assert same(dict(model.state_dict()), dict(state(7)["model"]))
    assert same(optimizer.state_dict(), state(7)["optimizer"])


def test_only_the_newest_and_the_one_before_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        save(tmp_path, step, state(step))
    assert KEEP == 2
    assert names(tmp_path) == ["step-000000015", "step-000000020"]
    assert same(newest(tmp_path), state(20))


def test_order_is_by_number_also_where_the_digits_grow(tmp_path: Path) -> None:
    for step in (9, 10, 99, 100):
        save(tmp_path, step, state(step))
    assert names(tmp_path) == ["step-000000099", "step-000000100"]


def test_the_same_step_may_be_saved_again(folder: Path) -> None:
    save(folder, 2, state(3))
    assert names(folder) == ["step-000000001", "step-000000002"]
    assert same(newest(folder), state(3))


def test_a_checkpoint_survives_later_ones_that_are_damaged(folder: Path) -> None:
    """All were damaged, the run started anew: the first checkpoint it writes must not count as an old one."""
    save(folder, 3, state(3))
    for later in folder.iterdir():
        (later / "state.pt").unlink()
    save(folder, 1, state(1))
    assert names(folder) == ["step-000000001"]
    assert same(newest(folder), state(1))


# --- damage ------------------------------------------------------------------------------------------------


@contextmanager
def changed(path: Path, content: bytes) -> Iterator[None]:
    good = path.read_bytes()
    path.write_bytes(content)
    yield
    path.write_bytes(good)


def test_every_flipped_bit_is_seen(folder: Path) -> None:
    source, rng = folder / "step-000000002", random.Random(0)
    for name in [rng.choice(FILES) for _ in range(200)]:
        content = bytearray((source / name).read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        with changed(source / name, bytes(content)), pytest.raises(InputError, match=str(source)):
            load(source)
    assert same(load(source), state(2))


def test_every_bit_of_the_checksum_file_counts(folder: Path) -> None:
    path = folder / "step-000000002" / "checksum.json"
    good = path.read_bytes()
    for i in range(8 * len(good)):
        content = bytearray(good)
        content[i // 8] ^= 1 << i % 8
        path.write_bytes(content)
        with pytest.raises(InputError):
            load(path.parent)


def test_every_truncation_is_seen(folder: Path) -> None:
    source, rng = folder / "step-000000002", random.Random(0)
    for name in [rng.choice(FILES) for _ in range(100)]:
        content = (source / name).read_bytes()
        length = rng.randrange(len(content.rstrip(b"\n")))  # the last line break of the JSON says nothing
        with changed(source / name, content[:length]), pytest.raises(InputError, match=str(source)):
            load(source)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(name: str, folder: Path) -> None:
    source = folder / "step-000000002"
    (source / name).unlink()
    with pytest.raises(InputError, match=rf"{source}.*cannot be read: .*No such file"):
        load(source)
    (source / name).mkdir()
    with pytest.raises(InputError, match=rf"{source}.*cannot be read: .*Is a directory"):
        load(source)


def test_a_checkpoint_under_another_step_is_refused(folder: Path) -> None:
    shutil.copytree(folder / "step-000000002", folder / "step-000000003")
    with pytest.raises(InputError, match=r"step-000000003: damaged: state.pt or the folder's name"):
        load(folder / "step-000000003")


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_version_is_refused(version: Any, folder: Path) -> None:
    path = folder / "step-000000002" / "checksum.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": version}))
    with pytest.raises(InputError, match="expected a checkpoint of version 1, got"):
        load(path.parent)
    path.write_text("[1]")
    with pytest.raises(InputError, match=r"expected a checkpoint of version 1, got \[1\]"):
        load(path.parent)


def test_the_newest_intact_one_is_taken_and_the_damaged_one_is_named(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert same(newest(folder), state(2))
    assert not caplog.records
    content = bytearray((folder / "step-000000002" / "state.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "step-000000002" / "state.pt").write_bytes(content)
    assert same(newest(folder), state(1))
    assert [(r.levelno, str(folder / "step-000000002") in r.getMessage()) for r in caplog.records] == [
        (logging.WARNING, True)
    ]
    (folder / "step-000000001" / "state.pt").unlink()
    assert newest(folder) is None
    assert len(caplog.records) == 3


def test_without_checkpoints_there_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert newest(tmp_path) is None
    assert newest(tmp_path / "none") is None
    assert not caplog.records


# --- crashes -----------------------------------------------------------------------------------------------

CALLS = ("fsync", "replace", "rename")  # of os: the moments at which something becomes visible, or lasting
WRITES = 8  # such calls in a save


def at_call(number: int, action: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let `action` happen instead of the call of that number; returns the list in which calls are noted."""
    made: list[str] = []

    def watch(name: str) -> None:
        real = getattr(os, name)

        def call(*args: Any, **options: Any) -> Any:
            made.append(name)
            if len(made) == number:
                action()
            return real(*args, **options)

        monkeypatch.setattr(os, name, call)

    for name in CALLS:
        watch(name)
    return made


def no_space() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def check_after_crash(folder: Path) -> None:
    """The checkpoint before, or already the new one, is whole; the next save leaves nothing behind."""
    found = newest(folder)
    assert found is not None
    assert same(found, state(found["step"]))
    assert found["step"] in (2, 3)
    assert {"step-000000002"} <= set(names(folder))
    save(folder, 3, state(3))
    assert names(folder) == ["step-000000002", "step-000000003"]
    assert names(folder / "step-000000003") == ["checksum.json", "state.pt"]
    assert same(newest(folder), state(3))


def test_a_save_makes_these_calls(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file reaches the disk before its name, both before the folder's name, and that before the end."""
    made = at_call(0, no_space, monkeypatch)
    save(folder, 3, state(3))
    assert made == ["fsync", "replace", "fsync", "fsync", "replace", "fsync", "rename", "fsync"]
    assert len(made) == WRITES


@pytest.mark.parametrize("number", range(1, WRITES + 1))
def test_a_full_disk_at_any_write_costs_no_earlier_checkpoint(
    number: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        at_call(number, no_space, patch)
        with pytest.raises(OSError, match="No space left"):
            save(folder, 3, state(3))
    check_after_crash(folder)


@pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)  # the fork is meant
@pytest.mark.parametrize("number", range(1, WRITES + 1))
def test_a_kill_at_any_write_costs_no_earlier_checkpoint(
    number: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = state(3)
    child = os.fork()
    if not child:
        at_call(number, lambda: os._exit(9), monkeypatch)
        save(folder, 3, values)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    check_after_crash(folder)


@pytest.mark.parametrize("size", [0, 100, 2000])
def test_a_write_that_is_cut_short_costs_no_earlier_checkpoint(size: int, folder: Path) -> None:
    """A quota: the system itself writes `size` bytes and refuses the rest."""
    values, limits = state(3), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save(folder, 3, values)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    check_after_crash(folder)


def test_what_earlier_crashes_left_is_cleared_before_anything_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk may be full of it."""
    torn = folder / ".step-000000003.4711.tmp"
    torn.mkdir()
    (torn / "state.pt").write_bytes(b"x" * 1000)
    at_call(1, no_space, monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        save(folder, 3, state(3))
    assert not torn.exists()


# --- foreign code ------------------------------------------------------------------------------------------


class Evil:
    """Unpickled, it touches a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.canary),))


def test_code_in_a_checkpoint_is_never_run(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    canary, source = folder.parent / "canary", folder / "step-000000002"
    torch.save({**state(2), "metrics": Evil(canary)}, source / "state.pt")
    in_archive = (source / "state.pt").read_bytes()
    for content in (in_archive, pickle.dumps(Evil(canary), 2), pickle.dumps(Evil(canary), 0)):
        (source / "state.pt").write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()  # whoever plants it can count
        values = {"version": checkpoint.VERSION, "step": 2, "sha256": sha256}
        (source / "checksum.json").write_text(json.dumps(values))
        with pytest.raises(
            InputError, match="step-000000002: not loaded: expected tensors and plain values alone"
        ):
            load(source)
        assert same(newest(folder), state(1))
    assert "expected tensors and plain values alone" in caplog.text
    assert not canary.exists()
    (source / "state.pt").write_bytes(in_archive)
    torch.load(source / "state.pt", weights_only=False)  # the proof that the canary sings
    assert canary.exists()
