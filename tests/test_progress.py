"""Progress in a log: few plain lines, each with what is left to wait for."""

import pytest

from pipeline import progress


class Clock:
    """A time that tests move."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


def test_a_log_gets_a_line_every_ten_seconds_with_an_estimate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    with progress.bar("shards", "samples") as update:
        update(500, 2000, "")  # what an earlier call has done: no time of this one
        for done in range(501, 2001):
            clock.now += 5
            update(done, 2000, "fast" if done == 502 else "")
    lines = capsys.readouterr().err.splitlines()
    assert lines[:3] == [
        "  shards 500/2000 samples",
        "  shards 502/2000 samples eta 2:04:50 fast",
        "  shards 504/2000 samples eta 2:04:40",
    ]
    assert lines[-1] == "  shards 2000/2000 samples"
    assert len(lines) == 751
