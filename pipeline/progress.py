"""Progress of long work: a bar on a terminal, a plain line every few seconds in a log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Eta
from rich.table import Table
from rich.text import Text

PLAIN_EVERY_S = 10.0

# done, total, a short text: may be called often and from any thread
Update = Callable[[float, int, str], None]
Say = Callable[[str], None]  # a line


@contextmanager
def bar(title: str, unit: str) -> Iterator[Update]:
    """Show how far `title` has come, in `unit`, on standard error."""
    if sys.stderr.isatty():
        with _terminal(title, unit) as update:
            yield update
    else:
        yield _plain(title, unit)


@contextmanager
def board(title: str, unit: str) -> Iterator[tuple[Update, Say, dict[str, str]]]:
    """A bar, above it a table of what is under way, and lines above that. The caller keeps up {name: text}."""
    if not sys.stderr.isatty():
        yield _plain(title, unit), lambda line: print(f"  {line}", file=sys.stderr, flush=True), {}
        return
    rows: dict[str, str] = {}
    console = Console(stderr=True)
    progress = _progress(unit, console)
    task = progress.add_task(title, total=None, text="")

    def render() -> Group:
        grid = Table.grid(padding=(0, 2))
        for name, text in list(rows.items()):
            grid.add_row(Text(f"  {name}"), Text(text))
        return Group(grid, progress)

    def update(done: float, total: int, _: str) -> None:
        progress.update(task, completed=done, total=total)

    with Live(get_renderable=render, console=console, transient=True, refresh_per_second=2):
        yield update, lambda line: console.print(f"  {line}", highlight=False, markup=False), rows


@contextmanager
def _terminal(title: str, unit: str) -> Iterator[Update]:
    with _progress(unit, Console(stderr=True)) as progress:
        task = progress.add_task(title, total=None, text="")

        def update(done: float, total: int, text: str) -> None:
            progress.update(task, completed=done, total=total, text=text)

        yield update


def _progress(unit: str, console: Console) -> Progress:
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn(f"{unit}  {{task.fields[text]}}"),
        TimeElapsedColumn(),
        TextColumn("eta"),
        Eta(),
    )
    return Progress(*columns, console=console, transient=True)


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
