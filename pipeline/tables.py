"""Rows -> tables: for a terminal, a page, a paper, a spreadsheet; a study as all of them."""

import csv
import io
import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.rundir import write_atomic
from pipeline.study import Difference, Estimate, Row, Study, label, luck, paper_figure, value_text
from pipeline.sweep import Point, name_of

Rows = Sequence[dict[str, Any]]
NUMBER = re.compile(r"-|nan|baseline|[-+]?(inf|\d[\d,]*(\.\d+)?(e[-+]?\d+)?)( to .*| \(.*)?")
LATEX = {char: f"\\{char}" for char in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}
LISTED = 10  # points named in one note
SPARSE = ("images/s", "device-hours", "paper", "state")  # columns left out where they would be empty


def table(rows: Rows) -> str:
    """Rows with the same keys as a table of plain text; numbers to the right."""
    if not rows:
        return "(nothing)"
    grid = Table(box=SIMPLE, pad_edge=False)
    for key, numeric in _numeric(rows).items():
        grid.add_column(key, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(escape(_cell(value)) for value in row.values()))
    text = io.StringIO()
    Console(file=text, width=160).print(grid)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()).strip("\n")


# --- a study -----------------------------------------------------------------------------------------------


def write(study: Study, folder: Path, *, title: str) -> list[Path]:
    """The tables and plots of a study into a folder, each file whole; returns those written."""
    from pipeline import plots  # matplotlib takes a second to import

    drawn = plots.write(study, folder)
    tables = files(study, title=title, plots=[p.name for p in drawn if p.suffix == ".png"])
    for name, data in tables.items():
        write_atomic(folder / name, data)
    return [*(folder / name for name in tables), *drawn]


def files(study: Study, *, title: str, plots: Sequence[str] = ()) -> dict[str, str | bytes]:
    """The study by file name: report.* has a row a point, runs.* a row a run; CSV and Parquet every digit.

    plots: files beside them for the Markdown page to show.
    """
    points, runs = point_rows(study), run_rows(study)
    return {
        "report.md": markdown(study, title=title, plots=plots),
        "report.tex": latex(study, title=title),
        "report.csv": _csv(points),
        "report.parquet": _parquet(points),
        "runs.csv": _csv(runs),
        "runs.parquet": _parquet(runs),
    }


def plain(study: Study, *, title: str) -> str:
    """The study for a terminal."""
    return "\n".join([title, *_head(study), table(shown_rows(study)), *notes(study)])


def markdown(study: Study, *, title: str, plots: Sequence[str] = ()) -> str:
    """The study as a Markdown page. plots: files beside it to show."""
    rows = shown_rows(study)
    rule = ["---:" if numeric else "---" for numeric in _numeric(rows).values()]
    lines = [
        f"# {_markdown(title)}",
        "",
        *map(_markdown, _head(study)),
        "",
        _bar(map(_markdown, rows[0])),
        _bar(rule),
        *(_bar(map(_markdown, row.values())) for row in rows),
        "",
        *(f"- {_markdown(note)}" for note in notes(study)),
        "",
        *(f"![{Path(name).stem}]({name})\n" for name in plots),
    ]
    return "\n".join(lines).rstrip() + "\n"


def latex(study: Study, *, title: str) -> str:
    r"""The study as a plain tabular with its notes below it, to be \input."""
    rows = shown_rows(study)
    columns = "".join("r" if numeric else "l" for numeric in _numeric(rows).values())
    lines = [
        f"% {' '.join(title.split())}",
        *(f"% {' '.join(line.split())}" for line in _head(study)),
        rf"\begin{{tabular}}{{{columns}}}",
        r"\hline",
        _ampersands(rows[0]),
        r"\hline",
        *(_ampersands(row.values()) for row in rows),
        r"\hline",
        r"\end{tabular}",
        *(rf"\par{{\footnotesize {_latex(note)}}}" for note in notes(study)),
    ]
    return "\n".join(lines) + "\n"


def point_rows(study: Study) -> list[dict[str, Any]]:
    """A row a point, in full precision; None for what is not known. Shares and differences are no percent."""
    return [
        {
            **{field: row.point.get(field) for field in study.fields},
            **{state: row.count(state) for state in ("finished", "stopped", "failed")},
            **_estimate(row.score),
            **({"is_baseline": row.point == study.baseline} if study.baseline is not None else {}),
            **(_difference("difference", row.difference) if study.baseline is not None else {}),
            **(_twin(study, row) if study.iso else {}),
            "params": row.params,
            "gflops": row.gflops,
            "images_per_s": _known(row.images_per_s),
            "device_hours": row.device_hours,
            "paper": paper_figure(row, study.metric),
        }
        for row in study.rows
    ]


def run_rows(study: Study) -> list[dict[str, Any]]:
    """A row a run: its point, how it ended, and every metric of its last epoch as the journal has it."""
    runs = [run for row in study.rows for run in row.runs]
    names = sorted({name for run in runs for name in run.last})
    return [
        {
            "run": run.outcome.run,
            **{field: run.outcome.point.get(field) for field in study.fields},
            "seed": run.outcome.seed,
            "state": run.outcome.state,
            "epoch": run.outcome.epoch,
            "params": run.facts["params"],
            "gflops": run.facts["gflops"],
            "device_hours": run.device_hours,
            **{name: run.last.get(name) for name in names},
            "overrides": shlex.join(run.outcome.overrides),
        }
        for run in runs
    ]


def shown_rows(study: Study) -> list[dict[str, str]]:
    """The same as point_rows, as people read it."""
    rows = []
    for row in study.rows:
        cells = {
            **{study.short(field): _shown(row.point, field) for field in study.fields},
            "n": str(row.score.n),
            label(study.metric): value_text(study.metric, row.score.mean),
            "std": value_text(study.metric, row.score.std),
            "95 % interval": _interval(study, row.score),
        }
        if study.baseline is not None:
            is_it = row.point == study.baseline
            cells["minus baseline"] = "baseline" if is_it else _minus(study, row.difference)
        if study.iso:
            twin = row.twin
            cells[f"twin (its {study.iso})"] = (
                f"{study.name(twin.point)} ({100 * twin.apart:+z.1f} %)" if twin else ""
            )
            cells["minus twin"] = _minus(study, twin.difference if twin else None)
        cells |= {
            "params": f"{row.params:,}",
            "GFLOPs": f"{row.gflops:.4g}",
            "images/s": _number(row.images_per_s, 4),
            "device-hours": _number(row.device_hours, 3),
            "paper": paper_figure(row, study.metric) or "",
            "state": _states(study, row),
        }
        rows.append(cells)
    filled = [key for key in rows[0] if key not in SPARSE or any(row[key] for row in rows)]
    return [{key: row[key] or "-" for key in filled} for row in rows]


def notes(study: Study) -> list[str]:
    """What has to be known to read the table: one statement a line."""
    found = [
        f"{label(study.metric)}: mean over n seeds after the last epoch; std: of a sample (n - 1); 95 % interval: "
        "of the mean, by Student's t (n = 1 has none); params and GFLOPs (2 a multiply-add): of one image; "
        "device-hours: recorded epochs of all runs of a point times their workers."
    ]
    return found + _unfinished(study) + _comparisons(study) + _doubts(study) + _flattered(study)


def _head(study: Study) -> list[str]:
    runs = sum(len(row.runs) for row in study.rows)
    hours = _number(sum(row.device_hours for row in study.rows), 3)
    better = "larger" if study.mode == "max" else "smaller"
    lines = [
        f"{label(study.metric)}, the {better} the better: {_count(runs, 'run')} at "
        f"{_count(len(study.rows), 'point')}, {hours} device-hours; the best mean first."
    ]
    if study.baseline is not None:
        lines.append(f"Baseline: {study.name(study.baseline)}.")
    if study.constant:
        lines.append(f"The same in all: {name_of(study.constant)}.")
    return lines


# --- notes -------------------------------------------------------------------------------------------------


def _unfinished(study: Study) -> list[str]:
    """Runs that the means do not hold, and why."""
    stopped, failed = (sum(row.count(state) for row in study.rows) for state in ("stopped", "failed"))
    finished = [run for row in study.rows for run in row.finished]
    lost = sum(not math.isfinite(run.last.get(study.metric, math.nan)) for run in finished)
    again = len(finished) - lost - sum(row.score.n for row in study.rows)
    counts = {
        "stopped before the end (it has trained for fewer epochs)": stopped,
        "failed": failed,
        f"finished without a finite {study.metric}": lost,
        "followed by another of the same point and seed (the last counts)": again,
    }
    told = [f"{count} {what}" for what, count in counts.items() if count]
    found = [f"Runs that no mean holds: {'; '.join(told)}."] if told else []
    if survivors := [study.name(row.point) for row in study.rows if row.score.n and row.count("stopped")]:
        found.append(
            "Early stopping takes the worst: the mean of what is left of a point is flattered where some of its "
            f"seeds were stopped ({_listed(survivors)})."
        )
    return found


def _comparisons(study: Study) -> list[str]:
    """How the differences were made, and which seeds they lack."""
    found = []
    pairs = [(row, row.difference) for row in study.rows if row.difference]
    if study.baseline is not None:
        found.append(
            f"Minus baseline: the mean difference from {study.name(study.baseline)}, paired by seed, and its 95 % "
            "interval (t); not corrected for the number of comparisons."
        )
    if study.iso:
        found.append(
            f"Twin: the point without GSA nearest in {study.iso}, and how much more or less of it that has. Minus "
            "twin: the mean difference from it, paired by seed, and its 95 % interval (t)."
        )
        pairs += [(row, row.twin.difference) for row in study.rows if row.twin]
    left_out = [
        f"{study.name(row.point)} (seed {', '.join(map(str, difference.left_out))})"
        for row, difference in pairs
        if difference.left_out
    ]
    if left_out:
        found.append(f"Left out of a difference, since one of the two has no figure: {_listed(left_out)}.")
    return found


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return "; ".join(names[:LISTED]) + more


def _doubts(study: Study) -> list[str]:
    """Why the points may not be comparable at all."""
    found = []
    runs = [run for row in study.rows for run in row.runs]
    if len({run.facts.get("shards_digest") for run in runs}) > 1:
        found.append("The runs are of different shards: their figures are of different pictures.")
    if "init" not in study.fields and len({run.config.init for run in runs}) > 1:
        found.append(
            "Runs began with the weights of others (PBT): they are not independent, and have trained for "
            "different times in all."
        )
    return found


def _flattered(study: Study) -> list[str]:
    """The best of many is not as good as it looks: by how much, where that can be said."""
    best = study.rows[0]
    compared = sum(any(study.metric in run.last for run in row.runs) for row in study.rows)
    if compared < 2 or not best.score.n:
        return []
    text = (
        f"Best of {compared} points on the same val split: the figure of {study.name(best.point)} is flattered, "
        "and so is its difference"
    )
    found = luck(study)
    if not found:
        return [f"{text}; no point has two seeds, so by how much cannot be said."]
    side = "above" if study.mode == "max" else "below"
    bias, error, std = (value_text(study.metric, value) for value in (found.bias, found.error, found.std))
    return [
        f"{text}. Were all {found.points} equally good, the best would lie {bias} {side} their mean by chance: "
        f"the expected largest of {found.points} normal numbers times the standard error {error} of a mean of "
        f"n = {found.n} (standard deviation {std}, pooled, {found.freedom} degrees of freedom)."
    ]


# --- cells -------------------------------------------------------------------------------------------------


def _estimate(score: Estimate, prefix: str = "") -> dict[str, Any]:
    values = {"mean": score.mean, "std": score.std, "low": score.low, "high": score.high}
    return {f"{prefix}n": score.n} | {prefix + key: _known(value) for key, value in values.items()}


def _difference(name: str, difference: Difference | None) -> dict[str, Any]:
    score = difference.score if difference else Estimate(0, math.nan, math.nan, math.nan)
    values = _estimate(score, f"{name}_")
    return {name: values.pop(f"{name}_mean"), **values}


def _twin(study: Study, row: Row) -> dict[str, Any]:
    twin = row.twin
    return {
        "twin": study.name(twin.point) if twin else None,
        f"twin_{study.iso}_apart": twin.apart if twin else None,
        **_difference("twin_difference", twin.difference if twin else None),
    }


def _minus(study: Study, difference: Difference | None) -> str:
    """A difference with its interval, as in +1.20 (+0.40 to +2.00)."""
    if not difference or not difference.score.n:
        return ""
    interval = _interval(study, difference.score, "+z")
    return value_text(study.metric, difference.score.mean, "+z") + (f" ({interval})" if interval else "")


def _states(study: Study, row: Row) -> str:
    """How its runs ended, where not all of them finished; of a point without a mean, with its figures."""
    if len(row.finished) == len(row.runs):
        return "" if row.score.n else f"no finite {study.metric}"
    if row.score.n:
        counts = {state: row.count(state) for state in ("finished", "stopped", "failed")}
        return ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    ends = []
    for run in row.runs:
        value = value_text(study.metric, run.last.get(study.metric, math.nan))
        ends.append(f"{run.outcome.state}, epoch {run.outcome.epoch}" + (f": {value}" if value else ""))
    return "; ".join(ends)


def _interval(study: Study, score: Estimate, sign: str = "") -> str:
    low, high = value_text(study.metric, score.low, sign), value_text(study.metric, score.high, sign)
    return f"{low} to {high}" if low else ""


def _number(value: float, digits: int) -> str:
    """Without an exponent, which people misread."""
    if not math.isfinite(value):
        return ""
    before = max(0, math.floor(math.log10(abs(value))) + 1) if value else 1
    return f"{value:,.{max(0, digits - before)}f}" if abs(value) >= 1e-3 or not value else f"{value:.2g}"


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _shown(point: Point, field: str) -> str:
    return name_of({field: point[field]}).partition("=")[2] if field in point else ""


def _cell(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "-" if value is None else str(value)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _numeric(rows: Rows) -> dict[str, bool]:
    """Which columns hold numbers, be they text."""
    return {key: all(NUMBER.fullmatch(_cell(row[key])) for row in rows) for key in rows[0]}


# --- formats -----------------------------------------------------------------------------------------------


def _markdown(text: str) -> str:
    return re.sub(r"([\\|*`<])", r"\\\1", " ".join(text.split()))


def _bar(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def _latex(text: str) -> str:
    return "".join(LATEX.get(char, char) for char in " ".join(text.split()))


def _ampersands(cells: Any) -> str:
    return " & ".join(map(_latex, cells)) + r" \\"


def _csv(rows: Rows) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _parquet(rows: Rows) -> bytes:
    columns = {key: _column([row[key] for row in rows]) for key in rows[0]}
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def _column(values: list[Any]) -> Any:
    """A column of one type: numbers, texts or truths; of lists and of mixed values their text."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float}:
        return pa.array(values, pa.float64() if float in kinds else pa.int64() if kinds else pa.null())
    if kinds in ({str}, {bool}):
        return pa.array(values)
    return pa.array([None if value is None else name_of({"": value})[1:] for value in values])
