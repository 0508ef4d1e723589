"""Progress of long work: a bar on a terminal, a plain line every few seconds in a log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Eta

PLAIN_EVERY_S = 10.0

# done, total, a short text: may be called often and from any thread
Update = Callable[[float, int, str], None]


@contextmanager
def bar(title: str, unit: str) -> Iterator[Update]:
    """Show how far `title` has come, in `unit`, on standard error."""
    if sys.stderr.isatty():
        with _terminal(title, unit) as update:
            yield update
    else:
        yield _plain(title, unit)


@contextmanager
def _terminal(title: str, unit: str) -> Iterator[Update]:
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn(f"{unit}  {{task.fields[text]}}"),
        TimeElapsedColumn(),
        TextColumn("eta"),
        Eta(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=None, text="")

        def update(done: float, total: int, text: str) -> None:
            progress.update(task, completed=done, total=total, text=text)

        yield update


def _plain(title: str, unit: str) -> Update:
    last, first, ended = 0.0, None, False

    def update(done: float, total: int, text: str) -> None:
        nonlocal last, first, ended
        now = time.monotonic()
        first = first or (now, done)  # what an earlier call has done took no time of this one
        if now - last >= PLAIN_EVERY_S or (done == total and not ended):
            last, ended = now, done == total
            left = _left(now - first[0], done - first[1], total - done)
            words = (f"  {title} {round(done, 2):.10g}/{total} {unit}", left, text)
            print(" ".join(word for word in words if word), file=sys.stderr, flush=True)

    return update


def _left(seconds: float, done: float, to_do: float) -> str:
    """`eta 1:02:03`, of what was done in these seconds; nothing where that tells nothing."""
    if not (done and to_do):
        return ""
    eta = round(seconds / done * to_do)
    return f"eta {eta // 3600}:{eta // 60 % 60:02d}:{eta % 60:02d}"
