"""Checkpoints: what was saved comes back to the bit, damage is seen, and a crash costs no earlier one."""

import ctypes
import errno
import hashlib
import io
import json
import logging
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline import checkpoint
from pipeline.checkpoint import DISK, KEEP, NewerVersion, Saver, best, load, newest, save
from pipeline.config import InputError

FILES = ("state.pt", "checksum.json")
DATA = Path(__file__).parent / "data"
FORKS = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)  # it is meant


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


def test_the_best_is_kept_beside_the_newest(tmp_path: Path) -> None:
    for step, score in [(1, 10.0), (2, 30.0), (3, None), (4, 20.0), (5, 30.0), (6, 25.0)]:
        save(tmp_path, step, state(step), score=score)
    assert names(tmp_path) == ["step-000000002", "step-000000005", "step-000000006"]  # 5 is no better than 2
    assert best(tmp_path) == tmp_path / "step-000000002"
    assert same(load(tmp_path / "step-000000002"), state(2))
    save(tmp_path, 7, state(7), score=30.5)
    assert names(tmp_path) == ["step-000000006", "step-000000007"]
    assert best(tmp_path) == tmp_path / "step-000000007"


def test_what_stays_is_what_the_rule_says_over_random_saves(tmp_path: Path) -> None:
    """Also where a run goes back, and where it saves a step again. The reference has the rule in its words."""
    rng, here, little = random.Random(0), dict[int, float | None](), {"model": {}}
    for _ in range(60):
        step, score = rng.randint(1, 30), rng.choice([None, -1.5, 0.0, 1.0, 2.0])
        save(tmp_path, step, little, score=score)
        here = {s: here[s] for s in sorted(here) if s < step} | {step: score}
        scores = [value for value in here.values() if value is not None]
        first = next((s for s in here if scores and here[s] == max(scores)), None)
        here = {s: here[s] for s in here if s in list(here)[-2:] or s == first}
        assert names(tmp_path) == [f"step-{s:09d}" for s in here]
        assert best(tmp_path) == (None if first is None else tmp_path / f"step-{first:09d}")


def test_without_scores_there_is_no_best(folder: Path) -> None:
    assert best(folder) is None
    assert best(folder / "none") is None


def test_a_damaged_score_counts_for_nothing(folder: Path) -> None:
    """Otherwise a flipped digit would keep, and register, another checkpoint than the best."""
    save(folder, 3, state(3), score=10.0)
    save(folder, 4, state(4), score=20.0)
    facts = folder / "step-000000003" / "checksum.json"
    facts.write_text(facts.read_text().replace("10.0", "90.0"))
    assert best(folder) == folder / "step-000000004"
    with pytest.raises(
        InputError, match=r"step-000000003: damaged: checksum\.json does not match its own seal"
    ):
        load(folder / "step-000000003")


def golden() -> dict[str, Any]:
    """What tests/data holds, as the code of its version saved it: from arithmetic alone, without a seed."""
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3)).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.arange(value.numel()).reshape(value.shape) / 8 - 1)
            value.grad = torch.ones_like(value)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.125, momentum=0.9)
    optimizer.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": 42,
        "metrics": {"val/top1": 12.5, "train/loss": 0.1 + 0.2},
    }


@pytest.mark.parametrize("version", range(1, checkpoint.VERSION + 1))
def test_checkpoints_of_every_version_load(version: int, tmp_path: Path) -> None:
    """A new VERSION adds a folder to tests/data, written by its code, and changes none."""
    stored = DATA / f"checkpoint-v{version}"
    assert json.loads((stored / "step-000000042" / "checksum.json").read_text())["version"] == version
    assert same(newest(stored), golden())
    assert best(stored) == (stored / "step-000000042" if version > 1 else None)
    folder = Path(shutil.copytree(stored, tmp_path / "copy"))
    save(folder, 43, state(3), score=10.0)
    assert same(newest(folder), state(3))
    assert same(load(folder / "step-000000042"), golden())


# --- not finite --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", ["model", "ema"])
@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_weights_that_are_not_finite_are_never_written(
    bad: float, part: str, kind: torch.dtype, folder: Path
) -> None:
    weights = {"fine": torch.zeros(3), "sub": [{"weight": torch.zeros(2, 2, dtype=kind)}]}
    values: dict[str, Any] = {"model": {}, "optimizer": {}, part: weights}
    save(folder, 2, values)
    values[part]["sub"][0]["weight"][1, 0] = bad
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    expected = rf"{part}\.sub\.0\.weight is no longer finite at step 3; next: a lower optim\.lr"
    with pytest.raises(FloatingPointError, match=expected):
        save(folder, 3, values)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_is_refused(score: float, folder: Path) -> None:
    with pytest.raises(
        FloatingPointError, match=r"the score of step 3 is (nan|inf); expected a finite number"
    ):
        save(folder, 3, state(3), score=score)
    assert names(folder) == ["step-000000001", "step-000000002"]


# --- damage ------------------------------------------------------------------------------------------------


@contextmanager
def changed(path: Path, content: bytes) -> Iterator[None]:
    good = path.read_bytes()
    path.write_bytes(content)
    yield
    path.write_bytes(good)


def few_and(many: int, *, few: int) -> Any:
    return pytest.mark.parametrize("cases", [few, pytest.param(many, marks=pytest.mark.slow)])


@few_and(1000, few=100)
def test_every_flipped_bit_is_seen_and_the_checkpoint_before_is_taken(cases: int, folder: Path) -> None:
    source, rng = folder / "step-000000002", random.Random(0)
    for name in [rng.choice(FILES) for _ in range(cases)]:
        content = bytearray((source / name).read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        with changed(source / name, bytes(content)):
            with pytest.raises(InputError, match=str(source)):
                load(source)
            assert same(newest(folder), state(1))
    assert same(load(source), state(2))


def test_every_bit_of_the_checksum_file_counts(folder: Path) -> None:
    path = folder / "step-000000002" / "checksum.json"
    good = path.read_bytes()
    for i in range(8 * len(good)):
        content = bytearray(good)
        content[i // 8] ^= 1 << i % 8
        path.write_bytes(content)
        with pytest.raises(InputError) as refused:
            load(path.parent)
        assert not isinstance(refused.value, NewerVersion)  # newest() would stop at that one


@few_and(500, few=60)
def test_every_truncation_is_seen(cases: int, folder: Path) -> None:
    source, rng = folder / "step-000000002", random.Random(0)
    for name in [rng.choice(FILES) for _ in range(cases)]:
        content = (source / name).read_bytes()
        length = rng.randrange(len(content.rstrip(b"\n")))  # the last line break of the JSON says nothing
        with changed(source / name, content[:length]):
            with pytest.raises(InputError, match=str(source)):
                load(source)
            assert same(newest(folder), state(1))


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(name: str, folder: Path) -> None:
    source = folder / "step-000000002"
    (source / name).unlink()
    with pytest.raises(InputError, match=rf"{source}.*cannot be read: .*No such file"):
        load(source)
    assert same(newest(folder), state(1))
    (source / name).mkdir()
    with pytest.raises(InputError, match=rf"{source}.*cannot be read: .*Is a directory"):
        load(source)


def test_a_checkpoint_under_another_step_is_refused(folder: Path) -> None:
    shutil.copytree(folder / "step-000000002", folder / "step-000000003")
    with pytest.raises(InputError, match=r"step-000000003: damaged: the folder's name does not match"):
        load(folder / "step-000000003")


@pytest.mark.parametrize("version", [0, -1, "2", None, 2.0])
def test_what_is_no_version_is_refused(version: Any, folder: Path) -> None:
    path = folder / "step-000000002" / "checksum.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": version}))
    with pytest.raises(InputError, match="step-000000002: expected a checkpoint of version 1 to 2, got"):
        load(path.parent)
    path.write_text("[1]")
    with pytest.raises(InputError, match=r"expected a checkpoint of version 1 to 2, got \[1\]"):
        load(path.parent)
    assert same(newest(folder), state(1))


def test_a_checkpoint_of_later_code_stops_the_run_instead_of_sending_it_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """To go on from the one before would prune it as a later step."""
    with monkeypatch.context() as later:
        later.setattr(checkpoint, "VERSION", 3)
        save(folder, 3, state(3), score=1.0)
    expected = (
        r"step-000000003: expected a checkpoint of version 1 to 2, got version 3, of later code; "
        r"next: update gsa-networks, or move the checkpoint away .*$"
    )
    for read in (lambda: load(folder / "step-000000003"), lambda: newest(folder)):
        with pytest.raises(InputError, match=expected):
            read()
    assert not caplog.records
    assert best(folder) is None


def test_a_folder_that_cannot_be_read_is_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    """The run would start anew, and then prune what it did not see."""
    (tmp_path / "checkpoints").write_text("no folder")
    with pytest.raises(InputError, match=r"checkpoints: cannot be read: .*Not a directory"):
        newest(tmp_path / "checkpoints")


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
CHANGES = (*CALLS, "mkdir", "unlink", "rmdir")  # all that change the disk, but for the writing of data


def at_call(
    number: int, action: Callable[[], None], monkeypatch: pytest.MonkeyPatch, calls: tuple[str, ...] = CALLS
) -> list[str]:
    """Let `action` happen before the call of that number; returns the list in which calls are noted."""
    made: list[str] = []

    def watch(name: str) -> None:
        real = getattr(os, name)

        def call(*args: Any, **options: Any) -> Any:
            made.append(name)
            if len(made) == number:
                action()
            return real(*args, **options)

        monkeypatch.setattr(os, name, call)

    for name in calls:
        watch(name)
    return made


def failing(number: int) -> Callable[[], None]:
    """What a disk does that is full, or away."""

    def fail() -> None:
        raise OSError(number, os.strerror(number))

    return fail


no_space = failing(errno.ENOSPC)


def in_child(work: Callable[[], None]) -> int:
    """Do `work` in a fork of this process; returns its exit code, -9 if it was killed."""
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


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


@FORKS
@pytest.mark.parametrize("again", [False, True])
def test_a_kill_at_any_change_of_the_disk_costs_no_earlier_checkpoint(
    again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`again`: the only checkpoint there is, saved once more, as a stop right after a resume does."""
    values, codes = state(3), list[int]()

    def work() -> None:
        at_call(len(codes), die, monkeypatch, CHANGES)
        save(folder, 3, values)

    while not codes or codes[-1]:
        folder = tmp_path / str(len(codes))
        for step in (3,) if again else (1, 2):
            save(folder, step, state(step))
        codes.append(in_child(work) if codes else 1)  # calls are counted from 1
        if again:
            assert same(newest(folder), values)
            assert same(load(checkpoint.path(folder, 3)), values)  # as the other ranks read it
            save(folder, 4, state(4), score=1.0)
            assert names(folder) == ["step-000000003", "step-000000004"]
        else:
            check_after_crash(folder)
    assert codes == [1, *[-signal.SIGKILL] * (len(codes) - 2), 0]
    assert len(codes) - 2 > WRITES + 3  # the kills; that the disk is changed more often than it is flushed


def numbered(step: int) -> dict[str, Any]:
    """A state of 400 kB that takes a while to write, and says in every number which step it is of."""
    # Little tensors: torch would fill large ones by threads, which a fork does not have.
    return {"model": {f"weight{i}": torch.full((10_000,), float(step)) for i in range(10)}, "step": step}


def intact(found: dict[str, Any] | None) -> int:
    """The step of a state that is known to be what was saved."""
    assert found is not None
    assert same(found, numbered(found["step"]))
    step: int = found["step"]
    return step


@FORKS
@few_and(200, few=15)
def test_kills_at_random_moments_cost_no_checkpoint_that_was_saved(cases: int, tmp_path: Path) -> None:
    """A child saves step after step and notes each; of the steps that it noted none may be lost."""
    rng, folder, step = random.Random(0), tmp_path / "checkpoints", 0
    noted = tmp_path / "noted"
    noted.write_text("0")
    save(folder, 0, numbered(0), score=100.0)
    for case in range(cases):
        child = os.fork()
        if not child:
            for later in count(step + 1):
                save(folder, later, numbered(later), score=later % 7)
                noted.write_text(f"{later:9d}")
        while case % 2 and int(noted.read_text() or 0) <= step:  # every other kill is not in the first save
            time.sleep(0.001)
        time.sleep(rng.random() / 20)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        step = intact(newest(folder))
        assert step >= int(noted.read_text() or 0)
        assert best(folder) == folder / "step-000000000"
        assert intact(load(folder / "step-000000000")) == 0
    save(folder, step + 1, numbered(step + 1))
    assert names(folder) == [f"step-{s:09d}" for s in (0, step, step + 1)]


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


def test_a_write_that_fails_once_is_not_forgotten(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writes after it succeed, so nothing but our own note of it says that there is a hole."""
    for number in count(1):
        made = list[int]()

        class Once(io.FileIO):
            def write(self, data: Any, number: int = number, made: list[int] = made) -> int:
                made.append(len(data))
                if len(made) == number:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                return super().write(data)

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.io, "FileIO", Once)
            failed = False
            try:
                save(folder, 30, numbered(30))
            except OSError:
                failed = True
        assert failed == (len(made) >= number)
        found = newest(folder)
        assert found is not None
        assert found["step"] == (2 if failed else 30)
        if not failed:
            break
    assert number > 5


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


# --- real disks: mounted in a namespace of a child -----------------------------------------------------------

NEWUSER, NEWNS, READ_ONLY, REMOUNT = 0x10000000, 0x00020000, 1, 32
REFUSED = 77


def on_disk(folder: Path, work: Callable[[], None], *, owner: bool = True) -> None:
    """Do `work` in a child that may mount at `folder`; skips where the kernel lets nobody.

    Not the `owner`: as a user whom the rights of files bind, which they do not bind root.
    """
    user, group = os.getuid(), os.getgid()

    def alone() -> None:
        if ctypes.CDLL(None, use_errno=True).unshare(NEWUSER | NEWNS):
            os._exit(REFUSED)
        if owner:
            try:
                Path("/proc/self/setgroups").write_text("deny")
                Path("/proc/self/uid_map").write_text(f"0 {user} 1")
                Path("/proc/self/gid_map").write_text(f"0 {group} 1")
                mount(folder, "size=10m")
            except OSError:
                os._exit(REFUSED)
        work()

    folder.mkdir(exist_ok=True)
    code = in_child(alone)
    if code == REFUSED:
        pytest.skip("no tmpfs may be mounted here (no user namespaces): full and read-only disks")
    assert code == 0


def mount(folder: Path, options: str, flags: int = 0) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"none", os.fsencode(folder), b"tmpfs", ctypes.c_ulong(flags), options.encode()):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings since the last call; each must be one line."""
    found = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(found) == len(caplog.records)
    assert not [line for line in found if "\n" in line]
    caplog.clear()
    return found


def one_line(folder: Path, step: int, number: int, there: str) -> list[str]:
    why = f"[Errno {number}] {os.strerror(number)}"
    return [
        f"checkpoint of step {step} not written to {folder}: {why}; training goes on; the newest there is {there}"
    ]


@FORKS
def test_a_disk_that_is_full_at_any_size_costs_no_checkpoint_and_no_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """20 sizes, from no room at all to room enough, on a real one."""
    disk, values = tmp_path / "disk", [numbered(step) for step in range(4)]

    def work() -> None:
        outcomes = []
        for case in range(20):
            folder = disk / str(case)
            save(folder, 1, values[1])
            used = os.statvfs(disk)
            size = (used.f_blocks - used.f_bfree) * used.f_frsize
            mount(disk, f"size={size + 24 * 1024 * case}", REMOUNT)
            saver = Saver(folder)
            saver.save(2, values[2])
            saver.wait()
            failed = bool(saver.failure)
            outcomes.append(failed)
            assert warnings(caplog) == failed * one_line(folder, 2, errno.ENOSPC, "step-000000001")
            assert intact(newest(folder)) == (1 if failed else 2)
            room = os.statvfs(disk).f_bfree * used.f_frsize
            assert not failed or room >= 20 * 1024 * case  # what was begun is gone: the journal needs it
            mount(disk, "size=10m", REMOUNT)
            saver.save(3, values[3])
            saver.close()
            assert names(folder) == ["step-000000001" if failed else "step-000000002", "step-000000003"]
            assert intact(newest(folder)) == 3
            shutil.rmtree(folder)
        assert outcomes == sorted(outcomes, reverse=True)
        assert 10 < sum(outcomes) < 20, outcomes

    on_disk(disk, work)


@FORKS
def test_a_read_only_disk_ends_no_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    disk = tmp_path / "disk"

    def work() -> None:
        folder = disk / "checkpoints"
        save(folder, 1, state(1))
        mount(disk, "", REMOUNT | READ_ONLY)
        saver = Saver(folder)
        saver.save(2, state(2))
        saver.wait()
        (line,) = warnings(caplog)
        assert re.search("step 2 not written .*Read-only file system.*newest there is step-000000001$", line)
        assert same(newest(folder), state(1))
        mount(disk, "", REMOUNT)
        saver.save(3, state(3))
        saver.close()
        assert names(folder) == ["step-000000001", "step-000000003"]

    on_disk(disk, work)


@FORKS
def test_a_folder_without_the_right_to_write_ends_no_training(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def work() -> None:
        folder.chmod(0o500)
        saver = Saver(folder)
        saver.save(3, state(3))
        saver.wait()
        (line,) = warnings(caplog)
        assert re.search("step 3 not written .*Permission denied.*newest there is step-000000002$", line)
        assert same(newest(folder), state(2))
        folder.chmod(0o700)
        saver.save(3, state(3))
        saver.close()
        assert names(folder) == ["step-000000002", "step-000000003"]

    on_disk(folder, work, owner=False)


# --- meanwhile: the saver ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shift", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, len(DISK)))]
)
def test_a_disk_that_fails_at_any_call_ends_no_training(
    shift: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each kind of failure in turn; over all shifts, each at each call."""
    failures, made = 0, list[str]()
    for call in count(1):
        number = sorted(DISK)[(call + shift) % len(DISK)]
        folder = tmp_path / str(call)
        for step in (1, 2):
            save(folder, step, state(step))
        saver = Saver(folder)
        with monkeypatch.context() as patch:
            made = at_call(call, failing(number), patch, CHANGES)
            saver.save(3, state(3))
            saver.wait()
        found = newest(folder)
        assert found is not None
        assert same(found, state(found["step"]))
        lines = one_line(folder, 3, number, f"step-{found['step']:09d}")
        assert warnings(caplog) == bool(saver.failure) * lines
        failures += bool(saver.failure)
        assert not list(folder.glob(".*"))  # at once: a full disk is needed for the journal
        saver.save(3, state(3), score=1.0)
        saver.close()
        assert saver.failure == ""
        assert names(folder) == ["step-000000002", "step-000000003"]
        assert same(newest(folder), state(3))
        if len(made) < call:
            break
    assert failures >= WRITES + 1  # and mkdir; not what only clears away


@pytest.fixture
def saver(folder: Path) -> Iterator[Saver]:
    saver = Saver(folder)
    yield saver
    saver.close(required=False)


def weights(found: dict[str, Any] | None) -> Any:
    assert found is not None
    return found["model"]["weight"].tolist()


def test_training_goes_on_while_a_disk_hangs_and_the_next_save_waits(folder: Path, saver: Saver) -> None:
    """Also that a snapshot is one: what training does to the tensors meanwhile is not in it."""
    goes, values = threading.Event(), {"model": {"weight": torch.zeros(3)}, "sub": [{"list": [1]}]}
    start = time.monotonic()
    saver.save(3, values, before=lambda: goes.wait(20) and None)  # a failing test hangs no longer than that
    assert time.monotonic() - start < 10  # it would hang for 20
    values["model"]["weight"] += 1  # type: ignore[call-overload]
    values["sub"][0]["list"].append(2)  # type: ignore[index]
    second = threading.Thread(target=saver.save, args=(4, values))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    assert names(folder) == ["step-000000001", "step-000000002"]
    goes.set()
    second.join(60)
    assert not second.is_alive()
    saver.close()
    assert names(folder) == ["step-000000003", "step-000000004"]
    found = load(folder / "step-000000003")
    assert (weights(found), found["sub"]) == ([0, 0, 0], [{"list": [1]}])
    found = load(folder / "step-000000004")
    assert (weights(found), found["sub"]) == ([1, 1, 1], [{"list": [1, 2]}])


def test_a_snapshot_is_what_a_plain_save_writes(tmp_path: Path, saver: Saver) -> None:
    """Layouts, key order, and the versions of modules that a state_dict carries beside its keys."""
    saver.save(3, state(3), score=5.0)
    saver.close()
    by_thread, plain = load(saver.folder / "step-000000003"), load(save(tmp_path, 3, state(3), score=5.0))
    assert same(by_thread, plain)
    assert type(by_thread["model"]) is OrderedDict
    assert by_thread["model"]._metadata == plain["model"]._metadata == state(3)["model"]._metadata
    assert best(saver.folder) == saver.folder / "step-000000003"


def test_before_comes_before_anything_is_written(
    saver: Saver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A checkpoint never knows more than the journal on the disk."""
    with monkeypatch.context() as patch:
        made = at_call(0, no_space, patch, CHANGES)
        saver.save(3, state(3), before=lambda: made.append("journal"))
        saver.wait()
    assert made.index("journal") == 0
    assert made.count("journal") == 1
    saver.save(4, state(4), before=no_space)
    saver.wait()
    assert warnings(caplog) == one_line(saver.folder, 4, errno.ENOSPC, "step-000000003")
    assert names(saver.folder) == ["step-000000002", "step-000000003"]


def test_a_failure_is_kept_until_a_save_succeeds(saver: Saver, caplog: pytest.LogCaptureFixture) -> None:
    assert saver.failure == ""
    saver.save(3, state(3), before=failing(errno.EDQUOT))
    saver.wait()
    assert saver.failure == f"step 3: [Errno {errno.EDQUOT}] {os.strerror(errno.EDQUOT)}"
    assert len(warnings(caplog)) == 1
    saver.save(4, state(4))
    saver.close()
    assert saver.failure == ""
    assert not caplog.records


def test_a_run_whose_last_save_failed_says_so_and_what_to_do(folder: Path) -> None:
    saver = Saver(folder)
    saver.save(3, state(3))
    saver.save(4, state(4), before=no_space)
    expected = (
        rf"^{re.escape(str(folder))}: expected the run's last checkpoint, got a failed save: step 4: .*"
        r"No space left on device; next: make room, .*: it goes on from step-000000003$"
    )
    with pytest.raises(InputError, match=expected):
        saver.close()
    saver.close(required=False)
    assert saver.failure


def test_a_run_without_any_checkpoint_says_that_it_starts_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saver = Saver(tmp_path / "checkpoints")
    saver.save(4, state(4), before=no_space)
    with pytest.raises(InputError, match=r"it goes on from none: the start$"):
        saver.close()
    assert warnings(caplog) == one_line(saver.folder, 4, errno.ENOSPC, "none: the start")


def bug() -> None:
    raise FileNotFoundError(errno.ENOENT, "a bug, not a disk")


@pytest.mark.parametrize("call", ["save", "wait", "close"])
def test_what_is_no_failure_of_a_disk_is_raised_once_by_the_next_call(call: str, saver: Saver) -> None:
    saver.save(3, state(3), before=bug)
    following: dict[str, Callable[[], None]] = {
        "save": lambda: saver.save(4, state(4)),
        "wait": saver.wait,
        "close": saver.close,
    }
    with pytest.raises(FileNotFoundError, match="a bug"):
        following[call]()
    saver.wait()
    assert names(saver.folder) == ["step-000000001", "step-000000002"]


def test_weights_that_are_not_finite_are_not_written_by_the_thread_either(saver: Saver) -> None:
    saver.save(3, {"model": {"weight": torch.tensor([1.0, float("nan")])}})
    with pytest.raises(FloatingPointError, match=r"model\.weight is no longer finite at step 3"):
        saver.wait()
    assert names(saver.folder) == ["step-000000001", "step-000000002"]


def test_a_close_in_a_finally_does_not_hide_why_training_ended(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saver = Saver(folder)

    def train() -> None:
        try:
            saver.save(3, state(3), before=bug)
            raise KeyboardInterrupt
        finally:
            saver.close(required=False)

    with pytest.raises(KeyboardInterrupt):
        train()
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (logging.ERROR, "checkpoint not written: [Errno 2] a bug, not a disk")
    ]


def test_a_closed_saver_leaves_no_thread(folder: Path) -> None:
    """Nor one per save."""
    before, saver = threading.active_count(), Saver(folder)
    for step in range(3, 8):
        saver.save(step, state(3))
        assert threading.active_count() == before + 1
    saver.close()
    assert threading.active_count() == before


INTERRUPTED = """
import os, signal, sys, time, torch
from pathlib import Path
from pipeline.checkpoint import Saver
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
saver = Saver(Path(sys.argv[1]))
saver.save(1, {"model": {"weight": torch.ones(3)}})
saver.wait()
saver.save(2, {"model": {"weight": torch.ones(3)}}, before=lambda: time.sleep(1))
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
finally:
    if sys.argv[2] == "finally":
        saver.close(required=False)
        assert len(list(Path(sys.argv[1]).iterdir())) == 2
"""


@pytest.mark.parametrize("when", ["finally", "forgotten"])
def test_an_interrupted_process_finishes_the_save_in_flight_and_ends(when: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path), when],
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )
    assert done.returncode == -signal.SIGINT, done.stderr
    assert done.stderr.endswith("KeyboardInterrupt\n")
    assert names(tmp_path) == ["step-000000001", "step-000000002"]
    assert weights(newest(tmp_path)) == [1, 1, 1]


@pytest.mark.gpu
def test_a_snapshot_of_a_gpu_is_of_the_moment_and_waits_for_nothing(saver: Saver) -> None:
    """The copy is queued behind a long kernel: save() returns before it, and later kernels do not reach it."""
    device = torch.device("cuda")
    weight = torch.zeros(1000, 1000, device=device).to(torch.bfloat16)
    large = torch.randn(8192, 8192, device=device)
    events, values = list[Any](), {"model": {"weight": weight, "layout": torch.ones(2, 3, device=device).t()}}
    for step in (3, 4):  # the first allocates pinned memory, for which the device is waited for
        for _ in range(40):
            large = (large @ large).clamp(-1, 1)
        weight += 1
        saver.save(step, values)
        event = torch.cuda.Event()
        event.record()
        events.append(event.query())
        weight += 100
        saver.wait()
        found = load(saver.folder / f"step-{step:09d}")
        assert found["model"]["weight"].device.type == "cpu"
        assert found["model"]["weight"].unique().tolist() == [1 if step == 3 else 102]
        assert found["model"]["layout"].stride() == (1, 3)
    assert events[1] is False


# --- foreign code ------------------------------------------------------------------------------------------


class Evil:
    """Unpickled, it touches a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.canary),))


@pytest.mark.parametrize("version", [1, 2])
def test_code_in_a_checkpoint_is_never_run(
    version: int, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    canary, source = folder.parent / "canary", folder / "step-000000002"
    torch.save({**state(2), "metrics": Evil(canary)}, source / "state.pt")
    in_archive = (source / "state.pt").read_bytes()
    for content in (in_archive, pickle.dumps(Evil(canary), 2), pickle.dumps(Evil(canary), 0)):
        (source / "state.pt").write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()  # whoever plants it can count
        values = {"version": version, "step": 2, "sha256": sha256}
        seal = {"seal": checkpoint._seal(values)} if version > 1 else {}
        (source / "checksum.json").write_text(json.dumps(values | seal))
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
