"""The journals of runs -> MLflow, from a thread: late if need be, never lost, never twice."""

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeline.metrics import Record, age, read
from pipeline.rundir import RunDir, write_json
from pipeline.tracking import one_line

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger("gsa")

BATCH = 1000  # metrics a call, MLflow's limit


class Point(NamedTuple):
    """One value of one metric, as MLflow's Metric takes it; time in milliseconds since 1970."""

    key: str
    value: float
    timestamp: int
    step: int


@dataclass
class _Followed:
    run: RunDir
    run_id: str
    mark: tuple[int, int] = (-1, -1)  # of the journal when it was read
    seen: list[tuple[float, int]] = field(default_factory=list)  # (time, step) of the records shown
    points: list[Point] = field(default_factory=list)  # read and not shipped
    watermark: dict[str, int] = field(default_factory=dict)  # highest step in the store, by metric
    asked: bool = False  # whether the watermark is the store's own word
    saved: dict[str, int] | None = None  # what the file holds
    ending: tuple[str, int] | None = None  # final status and its time
    pause: float = 0.0  # after the last failure
    retry_at: float = 0.0

    @property
    def behind(self) -> int:
        """What MLflow lacks: points, the final status, and one for a journal that could not be read."""
        return len(self.points) + (self.ending is not None) + (self.mark != age(self.run.metrics))


class Shipper:
    """Mirrors journals to MLflow from a thread of its own: the one sender of a driver process.

    MLflow may be slow, down or broken: the caller never waits for it and never sees its errors. What is in
    the store already is asked of the store itself, so no step is sent twice, however often a journal is
    cut and written again and wherever a predecessor was killed. `on_records` is called from the thread with
    the records that are new in a journal.
    """

    def __init__(
        self,
        client: "MlflowClient",
        on_records: Callable[[RunDir, list[Record]], None] | None = None,
        *,
        poll_s: float = 1.0,
        retry_s: tuple[float, float] = (1.0, 30.0),
    ) -> None:
        self._client = client
        self._on_records = on_records
        self._poll_s = poll_s
        self._retry_s = retry_s  # first and longest pause after a failure
        self._warned = False
        self._deadline: float | None = None  # set by close()
        self._followed: dict[Path, _Followed] = {}
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._work, name="gsa-shipper", daemon=True)
        self._thread.start()

    def follow(self, run: RunDir, run_id: str) -> None:
        """Mirror the journal of a run from now on."""
        with self._lock:
            self._followed[run.path] = _Followed(run, run_id)

    def finish(self, run: RunDir, status: str) -> None:
        """Ship the rest of a journal, then end the run as FINISHED, FAILED or KILLED; does not wait."""
        assert status in ("FINISHED", "FAILED", "KILLED"), status
        with self._lock:
            self._followed[run.path].ending = (status, int(time.time() * 1000))
        self._wake.set()

    def close(self, timeout_s: float = 20.0) -> int:
        """Ship what is left, for at most `timeout_s`. Returns how many points and final statuses are missing
        in MLflow; the journals still hold them."""
        self._deadline = time.monotonic() + timeout_s
        self._wake.set()
        self._thread.join(timeout_s + 0.5)
        with self._lock:
            return sum(each.behind for each in self._followed.values())

    def _work(self) -> None:
        done = False
        while not done:
            # The deadline is read before the journals: a last pass sees all that was written before close().
            closing = self._deadline is not None
            with self._lock:
                followed = list(self._followed.values())
            for each in followed:
                self._advance(each)
            late = time.monotonic() > (self._deadline or 0)
            done = closing and (late or not any(each.behind for each in followed))
            if not done:
                self._wake.wait(min(self._poll_s, 0.2) if closing else self._poll_s)
                self._wake.clear()

    def _advance(self, followed: _Followed) -> None:
        ending = followed.ending  # before the journal: finish() may come while this pass ships
        try:
            mark = age(followed.run.metrics)
            if mark != followed.mark:
                records = read(followed.run.metrics)
                followed.points = _above(_points(records), followed.watermark)
                followed.mark = mark
                self._show(followed, records)
            if time.monotonic() >= followed.retry_at:
                self._ship(followed, ending)
                followed.pause = 0.0
        except Exception as error:  # whatever a mirror raises is a delay, never a reason to stop a training
            followed.asked = False  # did the store take the batch? Ask it
            followed.pause = min(max(self._retry_s[0], 2 * followed.pause), self._retry_s[1])
            followed.retry_at = time.monotonic() + followed.pause
            if not self._warned:
                log.warning(
                    "tracking is behind run=%s error=%s; the journal keeps all, retrying",
                    followed.run.name,
                    one_line(error),
                )
            self._warned = True

    def _ship(self, followed: _Followed, ending: tuple[str, int] | None) -> None:
        from mlflow.entities import Metric

        if not followed.asked:
            run = self._client.get_run(followed.run_id)
            followed.watermark = {m.key: m.step for m in run.data.to_proto().metrics}
            followed.points = _above(followed.points, followed.watermark)
            followed.asked = True
        while batch := followed.points[:BATCH]:
            self._client.log_batch(followed.run_id, metrics=[Metric(*point) for point in batch])
            followed.watermark |= {point.key: point.step for point in batch}
            followed.points = followed.points[BATCH:]
        if followed.saved != followed.watermark:
            state = {"run_id": followed.run_id, "watermark": followed.watermark}
            write_json(followed.run.tracking, state)
            followed.saved = dict(followed.watermark)
        if ending:
            self._client.set_terminated(followed.run_id, *ending)
            state = {"run_id": followed.run_id, "watermark": followed.watermark, "status": ending[0]}
            write_json(followed.run.tracking, state)
            followed.ending = None
            with self._lock:
                if self._followed.get(followed.run.path) is followed:
                    del self._followed[followed.run.path]

    def _show(self, followed: _Followed, records: list[Record]) -> None:
        marks = [(r.time, r.step) for r in records]
        pairs = zip(marks, followed.seen, strict=False)
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        followed.seen = marks
        if self._on_records and records[same:]:
            self._on_records(followed.run, records[same:])


def _points(records: Sequence[Record]) -> Iterator[Point]:
    for r in records:
        for key, value in r.metrics.items():
            yield Point(key, value, int(r.time * 1000), r.step)


def _above(points: Iterable[Point], watermark: Mapping[str, int]) -> list[Point]:
    """The points above the watermark, each step of a metric once, in ascending order."""
    top, kept = dict(watermark), []
    for point in points:
        if point.step > top.get(point.key, -1):
            top[point.key] = point.step
            kept.append(point)
    return kept
