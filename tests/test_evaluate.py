"""Exact evaluation: counts against counting by hand, for any number of ranks; each sample once, and proved."""

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tars import write_set
from torch import Tensor

from gsa_models import create_model
from pipeline.data import Batch, eval_loader, to_device
from pipeline.evaluate import Classifier, Evaluation, evaluate
from pipeline.manifest import read_manifest
from pipeline.order import certify
from pipeline.step import eval_step

CPU = torch.device("cpu")
TEN = certify(np.arange(10), 7)


def table_of(logits: Tensor) -> Any:
    """A forward that looks the logits of a picture up by its first pixel."""
    return lambda images: logits[images[:, 0, 0, 0].long()]


def numbered(labels: Tensor, size: int) -> list[Batch]:
    images = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 2, 2, 3)
    return [
        Batch(
            images[i : i + size],
            labels[i : i + size],
            np.arange(i, min(i + size, len(labels))),
            torch.empty(0),
        )
        for i in range(0, len(labels), size)
    ]


@pytest.mark.parametrize("classes", [3, 10])
def test_evaluation_counts_exactly(classes: int) -> None:
    """Against counting by hand, also with fewer than five classes, and in batches of any size."""
    torch.manual_seed(0)
    logits, labels = torch.randn(50, classes), torch.randint(0, classes, (50,))
    rows = [sorted(range(classes), key=lambda c, row=row: -float(row[c])) for row in logits]
    top1 = sum(order[0] == label for order, label in zip(rows, labels.tolist(), strict=True))
    top5 = sum(label in order[:5] for order, label in zip(rows, labels.tolist(), strict=True))
    right = logits.double().softmax(1)[range(50), labels]
    for size in (1, 7, 50):
        found = evaluate(
            table_of(logits),
            numbered(labels, size),
            classes=classes,
            expected=certify(np.arange(50), 7),
            salt=7,
        )
        assert (found.correct, found.samples) == (top1, 50)
        assert (found.top1, found.top5) == pytest.approx((100 * top1 / 50, 100 * top5 / 50))
        assert found.loss == pytest.approx(float(-right.log().mean()))
        assert [of for _, of in found.by_class] == [int((labels == c).sum()) for c in range(classes)]
        predicted = torch.tensor([order[0] for order in rows])
        by_hand = [int(((labels == c) & (predicted == c)).sum()) for c in range(classes)]
        assert [right for right, _ in found.by_class] == by_hand
    assert found.metrics() == {
        "val/top1": found.top1,
        "val/top5": found.top5,
        "val/loss": found.loss,
        "val/count": 50.0,
    }


def test_log_probabilities_count_like_logits() -> None:
    torch.manual_seed(0)
    logits, batch = torch.randn(8, 7), numbered(torch.randint(0, 7, (8,)), 8)[0]
    plain, normal = (eval_step(table_of(x), batch, 7) for x in (logits, logits.log_softmax(1)))
    assert plain.tolist() == pytest.approx(normal.tolist(), rel=1e-6)


@pytest.mark.parametrize("drop", ["sample", "batch", "all"])
def test_evaluation_refuses_to_report_on_a_part(drop: str) -> None:
    logits, parts = torch.randn(10, 3), numbered(torch.zeros(10, dtype=torch.long), 4)
    images, labels, ids, draws, _ = parts[2]
    lacking = [*parts[:2], Batch(images[1:], labels[1:], ids[1:], draws)]
    parts = {"sample": lacking, "batch": parts[1:], "all": []}[drop]
    seen = {"sample": 9, "batch": 6, "all": 0}[drop]
    with pytest.raises(
        RuntimeError, match=f"evaluation saw {seen} samples, expected each of 10 exactly once"
    ):
        evaluate(table_of(logits), parts, classes=3, expected=TEN, salt=7)


def test_evaluation_refuses_a_sample_too_many() -> None:
    parts = numbered(torch.zeros(10, dtype=torch.long), 4)
    with pytest.raises(RuntimeError, match="evaluation saw 14 samples, expected each of 10"):
        evaluate(table_of(torch.randn(10, 3)), [*parts, parts[0]], classes=3, expected=TEN, salt=7)


def small_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return create_model("gsa_resnet_tiny", num_classes=3, image_size=32, heads=4).eval()


def four_pictures() -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8))


def test_evaluation_refuses_one_sample_twice_in_place_of_another() -> None:
    """The count is right, the certificate is not."""
    parts = numbered(torch.zeros(10, dtype=torch.long), 4)
    parts[2].ids[0] = 3
    with pytest.raises(
        RuntimeError, match=r"saw 10 samples, expected each of 10 exactly once \(certificate 10:"
    ):
        evaluate(table_of(torch.randn(10, 3)), parts, classes=3, expected=TEN, salt=7)


def test_evaluation_takes_no_gradients() -> None:
    model = small_model()
    batch = Batch(four_pictures(), torch.zeros(4, dtype=torch.long), np.arange(4), torch.empty(0))
    sums = eval_step(lambda images: model(to_device(images, CPU)), batch, 3)
    assert not sums.requires_grad


def test_the_classifier_gives_probabilities_of_raw_pictures() -> None:
    model = small_model()
    with torch.no_grad():
        found = Classifier(model)(four_pictures())
        expected = model(to_device(four_pictures(), CPU)).softmax(1)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.sum(1), torch.ones(4))


# --- ranks -------------------------------------------------------------------------------------------------


def right_one_time_in_three(images: Tensor) -> Tensor:
    """Logits for class 0, whatever the picture."""
    return torch.tensor([[1.0, 0.0, 0.0]]).expand(len(images), 3)


def rank_of(world: int, rank: int, meeting: str, folder: str, config: Any) -> None:
    """What a process of its own does: evaluate its part of the split, and write down what it was told."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    samples = read_manifest(Path(folder)).split("val")
    batches = eval_loader(samples, config, rank=rank, world=world, threads=rank % 3)
    found = evaluate(
        right_one_time_in_three, batches, classes=3, expected=samples.certificate, salt=samples.salt
    )
    Path(f"{meeting}-{rank}").write_text(json.dumps(found))
    if world > 1:
        dist.destroy_process_group()


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_real_ranks_see_each_sample_once_and_say_so(
    world: int, forks: Any, tmp_path: Path, mini_config: Any
) -> None:
    """The same figures and certificate on every rank, whatever their number; some have nothing to look at."""
    folder = write_set(tmp_path / "set", {"train": (3,), "val": (5, 1, 0)})
    config, meeting = mini_config(image_size=8, micro_batch=2), str(tmp_path / "meeting")
    job = {"world": world, "meeting": meeting, "folder": str(folder), "config": config}
    ranks = [
        forks.Process(target=runpy.run_path, args=(__file__, {"JOB": {**job, "rank": rank}}, "worker"))
        for rank in range(world)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=100)
    assert [rank.exitcode for rank in ranks] == [0] * world
    told = [Evaluation(*json.loads(Path(f"{meeting}-{rank}").read_text())) for rank in range(world)]
    assert told == [told[0]] * world
    assert (told[0].correct, told[0].samples) == (2, 6)
    assert [list(c) for c in told[0].by_class] == [[2, 2], [0, 2], [0, 2]]
    assert told[0].certificate == str(read_manifest(folder).split("val").certificate)


if __name__ == "worker":
    rank_of(**globals()["JOB"])
