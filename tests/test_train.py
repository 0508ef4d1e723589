"""Training: the same bytes after any kill, the same result for any number of ranks, the same run for a config."""

import json
import math
import random
import re
import resource
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import MUTANTS, Ranks, assert_close, output, same_weights, series, tensors, weights

from pipeline import checkpoint, metrics, train
from pipeline.config import ConfigError, InputError
from pipeline.manifest import ShardError, read_manifest
from pipeline.pictures import ShardsConfig
from pipeline.plan import build_model, load_trained, prepare, read_run
from pipeline.rundir import Out, RunDir, read_json
from pipeline.shards import build

pytestmark = pytest.mark.usefixtures("one_thread")

EPOCHS, STEPS = 3, 3  # of the runs in processes of their own; 54 samples make 3 steps of 16
# Of the runs of two ranks: nothing that is drawn may depend on the ranks.
DRAWN = {"drop_path": 0.5, "policy": "randaugment", "erase": 0.3, "mixup": 0.2, "cutmix": 1.0}
FILE, CHECKPOINT = 3, 12  # how many of them make a file; what an epoch ends with: a file, and a checkpoint


# --- kills -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(forks: Any, mini: Path, mini_config: Any, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run that nothing disturbed, on one rank."""
    out = output(mini, tmp_path_factory.mktemp("alone"))
    return Ranks(forks, prepare(out, mini_config(epochs=EPOCHS))).finish()


def test_a_run_killed_at_random_moments_ends_as_if_undisturbed(
    forks: Any, alone: RunDir, out: Out, mini_config: Any
) -> None:
    run, rng = prepare(out, mini_config(epochs=EPOCHS)), random.Random(0)
    for _ in range(3):
        attempt = Ranks(forks, run, hang_at=EPOCHS * STEPS - 1)
        time.sleep(rng.random())
        attempt.kill()  # anywhere
        saved = checkpoint.newest(run.checkpoints)
        inside = (saved["step"] if saved else 0) + rng.randint(1, STEPS - 1)
        Ranks(forks, run, hang_at=inside).kill_when_they_hang()  # within an epoch
        assert metrics.read(run.metrics)[-1].step == inside
    Ranks(forks, run).finish()
    assert same_weights(run, alone)
    assert series(run) == series(alone)
    assert series(run)[-1][0] == EPOCHS * STEPS


def test_a_run_killed_at_every_kind_of_write_ends_as_if_undisturbed(
    forks: Any, alone: RunDir, out: Out, mini_config: Any
) -> None:
    """A run that goes on cuts its journal, writes a checkpoint an epoch, then the result."""
    run, left = prepare(out, mini_config(epochs=EPOCHS)), []
    first, second = FILE, FILE + CHECKPOINT  # calls before the first and the second checkpoint of such a run
    for call in (4, first + 5, first + CHECKPOINT, second + 8, 1, second + 2):
        assert Ranks(forks, run, die_at=call).wait() == [-signal.SIGKILL]
        saved = checkpoint.newest(run.checkpoints)
        left.append(saved["step"] // STEPS if saved else 0)
        assert not run.result.exists()
    assert left == [0, 0, 1, 2, 2, 3]  # epochs that the kill spared
    Ranks(forks, run).finish()
    assert same_weights(run, alone)
    assert series(run) == series(alone)
    assert read_json(run.result)["steps"] == EPOCHS * STEPS


@pytest.mark.parametrize("mutant", [None, *MUTANTS])
def test_a_resume_that_forgets_something_would_be_seen(
    mutant: str | None, forks: Any, alone: RunDir, killed: RunDir, tmp_path: Path
) -> None:
    """The proof that the tests above can fail; without a mutant, that the difference is the mutant's."""
    run = RunDir(shutil.copytree(killed.path, tmp_path / "copy"))
    Ranks(forks, run, mutant=mutant).finish()
    unchanged = {
        None: (True, True),
        "optimizer": (False, False),
        "journal": (True, False),
        "step": (False, False),
    }
    assert (same_weights(run, alone), series(run) == series(alone)) == unchanged[mutant]


@pytest.fixture(scope="module")
def killed(forks: Any, mini: Path, mini_config: Any, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run killed in its third epoch."""
    run = prepare(output(mini, tmp_path_factory.mktemp("killed")), mini_config(epochs=EPOCHS))
    Ranks(forks, run, hang_at=2 * STEPS + 1).kill_when_they_hang()
    return run


def test_loader_threads_change_nothing(forks: Any, alone: RunDir, out: Out, mini_config: Any) -> None:
    run = Ranks(forks, prepare(out, mini_config(epochs=EPOCHS)), loader_threads=2).finish()
    assert same_weights(run, alone)
    assert series(run) == series(alone)


# --- ranks -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def worlds(
    forks: Any, mini: Path, mini_config: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, RunDir]:
    """The same run of two epochs on one rank and on two, each noting the samples that it reads."""
    runs = {}
    for world in (1, 2):
        run = prepare(output(mini, tmp_path_factory.mktemp(f"world-{world}")), mini_config(**DRAWN))
        (run.path / "seen").mkdir()
        seen = str(run.path / "seen")
        runs[world] = Ranks(forks, run, world, double=True, seen=seen).finish()
    return runs


def test_two_ranks_train_like_one(worlds: dict[int, RunDir]) -> None:
    assert_close(worlds[1], worlds[2])
    for run in worlds.values():
        assert [values.get("val/count") for _, _, values in series(run)] == [None, None, 18.0] * 2


def test_every_rank_reports_every_epoch_with_the_metrics_of_the_whole_world(
    worlds: dict[int, RunDir],
) -> None:
    """Ray Train waits for all of them."""
    first, second = (read_json(worlds[2].logs / f"reports-{rank}.json") for rank in (0, 1))
    assert [r["epoch"] for r in first] == [r["epoch"] for r in second] == [1, 2]
    for one, other, record in zip(first, second, metrics.read(worlds[2].metrics)[2::3], strict=True):
        assert {"epoch": record.epoch, **record.metrics} == one
        for key in ("train/loss", "train/top1", "val/top1", "val/loss", "val/count"):
            assert one[key] == other[key]


@pytest.mark.parametrize("world", [1, 2])
def test_all_ranks_together_see_every_sample_once_an_epoch(world: int, worlds: dict[int, RunDir]) -> None:
    ranks = [path.read_text().splitlines() for path in sorted((worlds[world].path / "seen").iterdir())]
    assert [len(lines) for lines in ranks] == [2 * (16 * STEPS + 18) // world] * world
    counts = Counter(line for lines in ranks for line in lines)
    assert [counts[f"val {i}"] for i in range(18)] == [2] * 18
    train_counts = [counts[f"train {i}"] for i in range(54)]
    assert sum(train_counts) == 2 * 16 * STEPS
    assert max(train_counts) == 2
    assert sum(count < 2 for count in train_counts) > 54 - 16 * STEPS  # the second epoch leaves out others


def test_two_killed_ranks_go_on_as_two_or_as_one(
    forks: Any, worlds: dict[int, RunDir], out: Out, mini_config: Any, tmp_path: Path
) -> None:
    run = prepare(out, mini_config(**DRAWN))
    Ranks(forks, run, 2, double=True, hang_at=STEPS + 1).kill_when_they_hang()
    other = RunDir(shutil.copytree(run.path, tmp_path / "copy"))
    Ranks(forks, run, 2, double=True).finish()
    assert same_weights(run, worlds[2])
    assert series(run) == series(worlds[2])
    Ranks(forks, other, 1, double=True).finish()
    assert_close(other, worlds[1])


# --- bad samples -------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(mini: Path, tmp_path: Path) -> Out:
    """An output root whose shards `mini` have a flipped bit in six of the 54 train samples."""
    samples = read_manifest(shutil.copytree(mini, tmp_path / "damaged")).split("train")
    content = bytearray((tmp_path / "damaged" / "train-000000.tar").read_bytes())
    for i in range(6):
        content[int(samples.offset[i * 9]) + 60] ^= 4
    (tmp_path / "damaged" / "train-000000.tar").write_bytes(content)
    return output(tmp_path / "damaged", tmp_path / "out")


def test_too_many_bad_samples_stop_all_ranks_at_the_same_step(
    forks: Any, damaged: Out, mini_config: Any
) -> None:
    """Each rank knows of its own; the budget is of all of them."""
    ranks = Ranks(forks, prepare(damaged, mini_config(max_bad=0.05)), 2)
    assert ranks.wait() == [1, 1]
    pattern = r"TooManyBad: ((\d+) of 54 train samples could not be read by step (\d).*)"
    found = re.findall(pattern, ranks.log.read_text())
    assert len(found) == 2
    assert found[0] == found[1]
    assert 3 <= int(found[0][1]) <= 6
    assert (
        f"max_bad 0.05 allows 2 an epoch; worst shard: train-000000.tar ({found[0][1]}); next: "
        in found[0][0]
    )


def test_few_bad_samples_are_counted_for_all_ranks_and_training_goes_on(
    forks: Any, damaged: Out, mini_config: Any
) -> None:
    run = Ranks(forks, prepare(damaged, mini_config(max_bad=0.12)), 2).finish()
    counts = [r.metrics["train/bad_samples"] for r in metrics.read(run.metrics)]
    assert len(counts) == 2 * STEPS
    assert all(4 <= sum(counts[epoch : epoch + STEPS]) <= 6 for epoch in (0, STEPS))  # 48 of 54 are seen


# --- train, in this process --------------------------------------------------------------------------------


def test_a_run_trains_alone_and_its_loss_falls(out: Out, mini_config: Any) -> None:
    calm = {"micro_batch": 16, "crop_scale": (0.7, 1.0), "flip": 0.0}
    run, reports = prepare(out, mini_config(epochs=14, lr=0.5, **calm)), []
    result = train.train(run, reports.append)
    assert [r["epoch"] for r in reports] == list(range(1, 15))
    assert result == {k: v for k, v in reports[-1].items() if k != "epoch"}
    losses = [r["train/loss"] for r in reports]
    assert losses[0] == pytest.approx(math.log(3), abs=0.3)
    assert losses[-1] < 0.7 * losses[0]
    assert result["val/top1"] > 80  # before 14 epochs the running statistics are too young
    assert result["val/count"] == 18
    # The journal holds what was reported; the rates are those of the schedule: 42 steps, 2 of them warm-up.
    records = metrics.read(run.metrics)
    assert [(r.step, r.epoch) for r in records] == [(3 * n, n) for n in range(1, 15)]
    assert [{"epoch": r.epoch, **r.metrics} for r in records] == reports
    rates = [0.5 * 16 / 256 * 0.5 * (1 + math.cos(math.pi * (3 * n - 3) / 40)) for n in range(1, 15)]
    assert [r["train/lr"] for r in reports] == pytest.approx(rates)
    assert read_json(run.result) == {"epochs": 14, "steps": 42, "metrics": result}
    kept = sorted(p.name for p in run.checkpoints.iterdir())
    assert kept[-2:] == ["step-000000039", "step-000000042"]
    best = max(reports, key=lambda r: (r["val/top1"], -r["epoch"]))
    assert kept[0] == f"step-{STEPS * min(int(best['epoch']), 13):09d}"


def test_probing_records_what_the_modules_do_and_changes_nothing_else(out: Out, mini_config: Any) -> None:
    plain = mini_config(epochs=2)
    runs = [prepare(out, plain), prepare(out, plain.model_copy(update={"probe": True}))]
    reports: list[list[Any]] = [[], []]
    for run, its_reports in zip(runs, reports, strict=True):
        train.train(run, its_reports.append)
    assert same_weights(*runs)
    assert [set(r) for r in reports[0]] == [set(r) for r in reports[1]]
    for without, probed in zip(*(metrics.read(run.metrics) for run in runs), strict=True):
        more = probed.metrics.keys() - without.metrics.keys()
        facts = {"content_rms", "positional_rms", "key_entropy", "time_share"}
        assert {key.rpartition("/")[0] for key in more} == {f"gsa/{fact}" for fact in facts}


def test_a_complete_run_is_not_trained_again(out: Out, mini_config: Any) -> None:
    run, reports = prepare(out, mini_config(epochs=1)), []
    result = train.train(run, reports.append)
    before = weights(run)
    run.result.unlink()  # killed before it was written
    assert train.train(run, reports.append) == result
    assert len(reports) == 1
    assert read_json(run.result)["metrics"] == result
    assert len(metrics.read(run.metrics)) == 1
    assert tensors(weights(run)).keys() == tensors(before).keys()


def test_a_loss_that_is_not_finite_ends_the_run_before_a_checkpoint(out: Out, mini_config: Any) -> None:
    run = prepare(out, mini_config(lr=1e30))
    expected = r"not finite: rank 0 at step 2; 1 steps in a row were left out, .*; next: a lower optim\.lr"
    with pytest.raises(FloatingPointError, match=expected):
        train.train(run, lambda _: None)
    assert checkpoint.newest(run.checkpoints) is None
    assert not run.result.exists()
    assert not metrics.read(run.metrics)


@pytest.mark.parametrize("name", ["stem.0.weight", "stem.1.running_var"])
def test_weights_that_the_last_step_spoils_reach_no_checkpoint(
    name: str, out: Out, mini_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All losses were finite: they are those of the weights before the step."""
    run, real = prepare(out, mini_config()), train.train_step

    def spoil(state: Any, *args: Any, **options: Any) -> Any:
        sums = real(state, *args, **options)
        if state.step == 2 * STEPS:
            state.model.state_dict()[name][0] = math.inf
        return sums

    monkeypatch.setattr(train, "train_step", spoil)
    expected = rf"{re.escape(name)} is no longer finite at step 6; next: a lower optim\.lr"
    with pytest.raises(FloatingPointError, match=expected):
        train.train(run, lambda _: None)
    saved = checkpoint.newest(run.checkpoints)
    assert saved is not None
    assert saved["step"] == STEPS
    assert not run.result.exists()


def test_changed_shards_are_refused(out: Out, mini_config: Any, pictures: Path) -> None:
    run = prepare(out, mini_config())
    (out.root / "shards" / "mini").unlink()
    build(ShardsConfig(name="mini", source="folder", input=str(pictures), seed=1), out.shards("mini"))
    with pytest.raises(InputError, match=rf"run {run.name}: the shards in .* are not those that the run was"):
        train.train(run, lambda _: None)
    assert not run.metrics.exists()


def test_ranks_that_cannot_share_a_batch_are_refused(
    out: Out, mini_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepare(out, mini_config())
    monkeypatch.setattr(train, "this_place", lambda: train.Place(0, 3, torch.device("cpu")))
    with pytest.raises(ConfigError, match="3 ranks cannot share 4 micro-batches; next: "):
        train.train(run, lambda _: None)


# --- plan --------------------------------------------------------------------------------------------------


def test_a_config_stands_for_one_run(out: Out, mini_config: Any) -> None:
    run = prepare(out, mini_config())
    facts, before = read_json(run.facts), run.facts.stat().st_mtime_ns
    assert run.path.parent == out.root / "runs"
    assert run.name == f"gsa_resnet_tiny-{facts['fingerprint'][:10]}"
    assert facts["classes"] == ["0", "1", "2"]
    assert prepare(out, mini_config()) == run
    assert run.facts.stat().st_mtime_ns == before
    config, manifest = read_run(run)
    assert config == mini_config(placement="gggg")
    assert manifest.digest == facts["shards_digest"]
    network = build_model(config, 3)
    assert facts["params"] == sum(p.numel() for p in network.parameters())
    assert 0 < facts["gflops"] < 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch": 56}, "optim.global_batch 56 is above the 54 train samples; at most 54 would do"),
        ({"model.name": "gsa_resnet51"}, "model: model 'gsa_resnet51' is unknown; did you mean"),
        ({"placement": "ggxg"}, "model: placement 'ggxg', group 3: got 'x'"),
        ({"components": "content+content"}, "model: components content[+]content name one twice"),
        ({"heads": 5}, "model: dim 16 is not divisible by 5 heads"),
        ({"window": 4}, "model: window must be an odd number of pixels, got 4"),
        ({"image_size": 16}, "model: image_size 16 is too small"),
        ({"micro_batch": 1}, "optim.micro_batch 1 is too small: Expected more than 1 value per channel"),
        ({"shards": "nothing"}, "nothing: no shards there"),
    ],
    ids=str,
)
def test_what_cannot_be_trained_is_refused_before_a_run_is_made(
    changes: dict[str, Any], message: str, out: Out, mini_config: Any
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        prepare(out, mini_config(**changes))
    assert isinstance(caught.value, ConfigError | ShardError)
    assert not (out.root / "runs").exists()


def test_shards_may_move(out: Out, mini_config: Any) -> None:
    """Under another name they are still the same pictures: the same run, that finds them."""
    run = prepare(out, mini_config())
    (out.root / "shards" / "mini").rename(out.root / "shards" / "moved")
    with pytest.raises(ShardError, match="no shards there"):
        read_run(run)
    assert prepare(out, mini_config(shards="moved")) == run
    assert read_run(run)[1].folder == out.root / "shards" / "moved"


def test_the_first_weights_depend_on_the_seed_alone(mini_config: Any) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build_model(mini_config(), 3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = (
        build_model(mini_config(), 3).state_dict(),
        build_model(mini_config(seed=1), 3).state_dict(),
    )
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["stem.0.weight"], other["stem.0.weight"])


def test_the_trained_network_is_the_newest_one(out: Out, mini_config: Any) -> None:
    run = prepare(out, mini_config(epochs=1))
    with pytest.raises(InputError, match=f"run {run.name} has no checkpoint; next: train it"):
        load_trained(run)
    train.train(run, lambda _: None)
    network, config, _ = load_trained(run)
    assert not network.training
    assert config == read_run(run)[0]
    saved = weights(run)["model"]
    assert all(torch.equal(value, saved[key]) for key, value in network.state_dict().items())


# --- the journal -------------------------------------------------------------------------------------------


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """Steps 1, 2 and 3."""
    path = tmp_path / "metrics.jsonl"
    for n in (1, 2, 3):
        metrics.append(path, step=n, epoch=n / 3, metrics={"train/loss": 1 / n, "val/count": 18.0})
    return path


def test_a_record_is_one_line_and_comes_back_the_same(journal: Path) -> None:
    lines = journal.read_text().split("\n")
    assert [sorted(json.loads(line)) for line in lines[:3]] == [["epoch", "metrics", "step", "time"]] * 3
    assert lines[3:] == [""]
    records = metrics.read(journal)
    assert [(r.step, r.epoch, r.metrics["train/loss"]) for r in records] == [
        (i, i / 3, 1 / i) for i in (1, 2, 3)
    ]
    assert time.time() - 60 < records[0].time <= records[2].time <= time.time()


def test_a_torn_last_line_is_left_out_wherever_it_is_torn(journal: Path) -> None:
    whole, records = journal.read_bytes(), metrics.read(journal)
    start = whole[:-1].rindex(b"\n") + 1
    for length in range(start, len(whole)):
        journal.write_bytes(whole[:length])
        assert metrics.read(journal) == records[:2]
    journal.write_bytes(whole + b"\0" * 100)  # what some file systems leave of an append
    assert metrics.read(journal) == records


def test_a_cut_forgets_later_steps_and_a_torn_line(journal: Path) -> None:
    records = metrics.read(journal)
    journal.write_bytes(journal.read_bytes() + b'{"time": 1, "st')
    metrics.cut(journal, 2)
    assert metrics.read(journal) == records[:2]
    metrics.append(journal, step=3, epoch=1.0, metrics={})
    assert [r.step for r in metrics.read(journal)] == [1, 2, 3]
    metrics.cut(journal, 0)
    assert journal.read_bytes() == b""


def test_a_journal_that_is_not_there_is_empty(tmp_path: Path) -> None:
    metrics.cut(tmp_path / "none", 5)
    assert metrics.read(tmp_path / "none") == []
    assert metrics.age(tmp_path / "none") == (0, 0)
    assert not (tmp_path / "none").exists()


def test_the_age_of_a_journal_changes_with_it(journal: Path) -> None:
    ages = [metrics.age(journal)]
    metrics.append(journal, step=4, epoch=2.0, metrics={})
    ages.append(metrics.age(journal))
    metrics.cut(journal, 3)
    ages.append(metrics.age(journal))
    assert len(set(ages)) == 3


def test_a_record_that_does_not_fit_on_the_disk_is_an_error(journal: Path) -> None:
    """And never half a line, to which the next record would be glued."""
    records, limits = metrics.read(journal), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (journal.stat().st_size + 10, limits[1]))
    try:
        with pytest.raises(InputError, match="step 4 cannot be recorded: No space left on device; next"):
            metrics.append(journal, step=4, epoch=2.0, metrics={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert metrics.read(journal) == records
