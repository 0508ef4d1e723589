"""A study in pictures: accuracy against cost, learning curves, placements, what matters; as PNG and SVG."""

import io
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from pipeline.rundir import write_atomic
from pipeline.study import Row, Run, Study, label, value_text
from pipeline.sweep import Point, name_of

STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: it can be searched and copied
    "svg.hashsalt": "gsa",  # the same study, the same bytes
    "text.parse_math": False,  # a name may hold a $
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999")
ATTENTION, CONVOLUTION, QUIET = COLOURS[0], COLOURS[5], "#888888"
FAMILIES = {False: ("GSA", "o", ATTENTION), True: ("convolution", "s", CONVOLUTION)}
LABELLED, CURVES, COLUMNS = 12, len(COLOURS), 12  # at most: named points, lines, columns of a matrix
IMPORTANCE = 8  # points at least
FAR, LEADER = (
    14,
    {"arrowstyle": "-", "color": QUIET, "lw": 0.5},
)  # from so many points on a line leads to a name


def write(study: Study, folder: Path) -> list[Path]:
    """Every plot that the study has data for, as NAME.png (150 dpi) and NAME.svg; those written.

    Of a plot without data an earlier file is taken away: it would be of another study.
    """
    written = []
    with matplotlib.rc_context(STYLE):
        for name, draw in PLOTS.items():
            drawn = draw(study)
            for kind in ("png", "svg"):
                path = folder / f"{name}.{kind}"
                if drawn:
                    write_atomic(path, _bytes(drawn, kind))
                    written.append(path)
                else:
                    path.unlink(missing_ok=True)
    return written


# --- accuracy against cost ---------------------------------------------------------------------------------


def pareto(study: Study) -> Figure | None:
    """The metric against GFLOPs, bars its 95 % interval, and the points that none beats in both."""
    rows = [row for row in study.rows if row.score.n]
    if len(rows) < 2:
        return None
    front = pareto_front([(row.gflops, row.score.mean) for row in rows], study.mode)
    corners = [(rows[i].gflops, rows[i].score.mean) for i in front]
    corners.append((max(row.gflops for row in rows), corners[-1][1]))
    plot, axes = _blank(7.5, 5)
    for i, row in enumerate(rows):
        _, form, colour = FAMILIES[row.runs[0].is_convolution]
        pale = 1.0 if i in front or len(rows) <= LABELLED else 0.4
        axes.errorbar(row.gflops, row.score.mean, _half(row), ecolor=(colour, pale), capsize=2, lw=1)
        axes.plot(row.gflops, row.score.mean, form, color=colour, markersize=5)
    axes.step(*zip(*corners, strict=True), where="post", color=QUIET, lw=1, ls="--", zorder=1)
    bars = "bars: 95 % interval (t)" if any(row.score.n > 1 for row in rows) else "n = 1"
    axes.set_title(f"{label(study.metric)} against GFLOPs; {bars}")
    axes.set_xlabel("GFLOPs for one image")
    axes.set_ylabel(label(study.metric))
    axes.margins(0.15)
    for family in sorted({row.runs[0].is_convolution for row in rows}):
        name, form, colour = FAMILIES[family]
        axes.plot([], [], form, color=colour, markersize=5, label=name)
    axes.plot([], [], color=QUIET, lw=1, ls="--", label="Pareto front")
    plot.legend(loc="outside lower left", ncols=3)
    named = range(len(rows)) if len(rows) <= LABELLED else front[:LABELLED]
    _name_points(axes, {study.name(rows[i].point): i for i in named}, rows, corners)
    return plot


def pareto_front(points: Sequence[tuple[float, float]], mode: str) -> list[int]:
    """Which of (cost, value) no other beats in one and equals in the other at least; the cheapest first."""
    sign = 1 if mode == "max" else -1
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -sign * points[i][1])):
        if not front or sign * points[i][1] > sign * points[front[-1]][1]:
            front.append(i)
    return front


def _name_points(
    axes: Axes, names: dict[str, int], rows: Sequence[Row], corners: Sequence[tuple[float, float]]
) -> None:
    """A name beside its point, where nothing else is; with a thin line where that is further away."""
    plot = cast(Figure, axes.figure)
    canvas, scale = FigureCanvasAgg(plot), plot.dpi / 72
    plot.draw_without_rendering()  # before that no place is known
    taken = []
    for row in rows:
        x, y, half = row.gflops, row.score.mean, _half(row)
        taken += [_box(axes, (x, y - half), (x, y + half)), _box(axes, (x, y), (x, y), 6)]
    for (x0, y0), (x1, y1) in pairwise(corners):
        taken += [_box(axes, (x0, y0), (x1, y0)), _box(axes, (x1, y0), (x1, y1))]
    for name, i in names.items():
        at = (rows[i].gflops, rows[i].score.mean)
        text = axes.annotate(name, at, (0, 0), textcoords="offset points", ha="center", va="center", size=8)
        text.set(in_layout=False, zorder=4, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})
        size = text.get_window_extent(canvas.get_renderer())  # type: ignore[no-untyped-call]
        away, place = _free_place(axes, at, (size.width, size.height), taken)
        middle = axes.transData.transform(at)
        text.set_position(tuple((place.get_points().mean(0) - middle) / scale))
        taken.append(place)
        if away > FAR:
            end = (np.clip(middle, place.min, place.max) - middle) / scale
            axes.annotate("", at, tuple(end), textcoords="offset points", arrowprops=LEADER)


def _free_place(
    axes: Axes, at: tuple[float, float], size: tuple[float, float], taken: Sequence[Bbox]
) -> tuple[int, Bbox]:
    """The box of a text of that size (pixels) nearest to a point, inside of the axes, and how far away it is.

    The last place tried where none is free: a plot that is so full needs fewer names.
    """
    frame, scale, middle = axes.get_window_extent(), axes.figure.dpi / 72, axes.transData.transform(at)
    for away in range(8, 240, 6):
        for angle in np.linspace(0, 2 * math.pi, 24, endpoint=False):
            centre = middle + np.array([math.cos(angle), math.sin(angle)]) * (
                away * scale + np.array(size) / 2
            )
            place = Bbox([centre - np.array(size) / 2 - 1, centre + np.array(size) / 2 + 1])
            inside = frame.contains(*place.min) and frame.contains(*place.max)
            if inside and not place.count_overlaps(taken):
                return away, place
    return away, place


def _box(axes: Axes, start: tuple[float, float], end: tuple[float, float], pixels: float = 2) -> Bbox:
    """What a line between two points covers, in pixels."""
    corners = axes.transData.transform([start, end])
    return Bbox([corners.min(0) - pixels, corners.max(0) + pixels])


def _half(row: Row) -> float:
    return 0.0 if math.isnan(row.score.half) else row.score.half


# --- learning curves ---------------------------------------------------------------------------------------


def curves(study: Study) -> Figure | None:
    """The metric over epochs: mean and least to most over the finished runs of a point; the best points."""
    rows = [row for row in study.rows if _series(study, row)]
    if not rows:
        return None
    shown = rows[:CURVES]
    names = [f"{study.name(row.point)}: {_score_text(study, row)}" for row in shown]
    columns = 2 if max(map(len, names)) <= 50 else 1
    plot, axes = _blank(7.5, 4.2 + 0.2 * math.ceil(len(shown) / columns))
    late: list[float] = []  # after a quarter of the epochs: the steep begin would flatten all that differs
    for row, name, colour in zip(shown, names, COLOURS, strict=False):
        series = _series(study, row)
        epochs, low, high = list(series), [min(v) for v in series.values()], [max(v) for v in series.values()]
        line = "-o" if row.score.n else "--o"  # of unfinished runs
        means = [np.mean(values) for values in series.values()]
        axes.plot(epochs, means, line, color=colour, lw=1.4, markersize=2.5, label=name)
        axes.fill_between(epochs, low, high, color=colour, alpha=0.15, lw=0)
        late += [v for epoch, values in series.items() if epoch > epochs[-1] / 4 for v in values]
    few = f"; the best {CURVES} of {len(rows)} points" if len(rows) > CURVES else ""
    axes.set_title(f"{label(study.metric)} by epoch: mean over seeds, band from least to most{few}")
    axes.set_xlabel("epoch")
    axes.set_ylabel(label(study.metric))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    margin = 0.05 * (max(late) - min(late)) or 0.05
    axes.set_ylim(min(late) - margin, max(late) + margin)
    plot.legend(loc="outside lower left", fontsize=8, ncols=columns)
    return plot


def _series(study: Study, row: Row) -> dict[int, list[float]]:
    """Epoch -> the metric of each run; of a point without a finished run, of what there is."""
    runs: Sequence[Run] = row.finished if row.score.n else row.runs
    found: dict[int, list[float]] = {}
    for run in runs:
        for record in run.records:
            value = record.metrics.get(study.metric, math.nan)
            if math.isfinite(value):
                found.setdefault(round(record.epoch), []).append(value)
    return dict(sorted(found.items()))


# --- placements --------------------------------------------------------------------------------------------


def placement(study: Study) -> Figure | None:
    """Where GSA stands, group by group, beside the mean metric; by a second field if that is all that varies."""
    groups: dict[str, list[Row]] = {}
    for row in study.rows:
        pattern = row.runs[0].config.model.placement
        if row.score.n and pattern:
            groups.setdefault(pattern, []).append(row)
    if len(groups) < 2:
        return None
    letters = sorted(groups, key=lambda text: (_share(text), text))
    field, columns = _second_field(study, groups)
    cells = [
        [[r for r in groups[text] if not field or _value(r.point, field) == column] for column in columns]
        for text in letters
    ]
    wide = 0.9 if field else 2.0
    plot = Figure(figsize=(3.6 + wide * len(columns), 1.7 + 0.34 * len(letters)), layout="constrained")
    left, right = plot.subplots(1, 2, width_ratios=[2, wide * len(columns)], sharey=True)
    _draw_patterns(left, letters)
    _draw_matrix(right, study, cells)
    right.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=30 if max(map(len, columns)) > 7 else 0)
    right.set_xlabel(study.short(field) if field else "mean of its points (runs)")
    plot.suptitle(f"{label(study.metric)} by placement", x=0.01, ha="left", fontsize=10)
    return plot


def _share(letters: str) -> float:
    """Of GSA in a placement: mean over the groups, which are a letter each or as many as blocks."""
    groups = letters.split("/") if "/" in letters else list(letters)
    return sum(group.count("g") / len(group) for group in groups) / len(groups)


def _second_field(study: Study, groups: dict[str, list[Row]]) -> tuple[str | None, list[str]]:
    """The one other field in which the points differ, and its values, if a matrix can show them."""
    others = [field for field in study.fields if field != "model.placement"]
    rows = [row for some in groups.values() for row in some]
    if len(others) != 1 or len(rows) == len(groups):
        return None, [""]
    values = sorted(
        {_value(row.point, others[0]): row.point.get(others[0]) for row in rows}.items(), key=_order
    )
    return (others[0], [text for text, _ in values]) if len(values) <= COLUMNS else (None, [""])


def _order(item: tuple[str, Any]) -> tuple[bool, float, str]:
    """Numbers by their size, then texts."""
    text, value = item
    return (False, value, text) if isinstance(value, int | float) else (True, 0.0, text)


def _draw_patterns(axes: Axes, letters: Sequence[str]) -> None:
    """A line a placement, a cell a group, cut into its blocks where they differ."""
    for y, text in enumerate(letters):
        for x, group in enumerate(text.split("/") if "/" in text else text):
            for i, letter in enumerate(group):
                colour = ATTENTION if letter == "g" else CONVOLUTION
                at = (x + 0.04 + 0.92 * i / len(group), y + 0.08)
                axes.add_patch(
                    Rectangle(at, 0.92 / len(group), 0.84, facecolor=colour, edgecolor="white", lw=0.4)
                )
    groups = max(len(text.split("/") if "/" in text else text) for text in letters)
    axes.set(xlim=(0, groups), ylim=(len(letters), 0), xlabel="group")
    axes.set_xticks(np.arange(groups) + 0.5, [str(i + 1) for i in range(groups)])
    axes.set_yticks(np.arange(len(letters)) + 0.5, letters, family="monospace")
    axes.legend(
        handles=[Patch(color=colour, label=name) for name, _, colour in FAMILIES.values()],
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        ncols=2,
        handlelength=1,
        columnspacing=1,
        fontsize=8,
    )
    _bare(axes)


def _draw_matrix(axes: Axes, study: Study, cells: Sequence[Sequence[Sequence[Row]]]) -> None:
    """The mean of each cell's points as colour and as text; of the whole line if there is one column."""
    means = np.array(
        [[np.mean([r.score.mean for r in cell]) if cell else math.nan for cell in line] for line in cells]
    )
    scale = Normalize(np.nanmin(means), np.nanmax(means))
    colours = matplotlib.colormaps["viridis" if study.mode == "max" else "viridis_r"]
    axes.pcolormesh(np.ma.masked_invalid(means), cmap=colours, norm=scale, edgecolors="white", lw=1)
    for (y, x), mean in np.ndenumerate(means):
        runs = sum(row.score.n for row in cells[y][x])
        text = value_text(study.metric, mean) or "-"
        if means.shape[1] == 1:
            text += f" ({runs})"
        red, green, blue, _ = colours(scale(mean) if math.isfinite(mean) else 1.0)
        dark = math.isfinite(mean) and 0.3 * red + 0.59 * green + 0.11 * blue < 0.42
        axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", color="white" if dark else "black")
    _bare(axes)


def _bare(axes: Axes) -> None:
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


# --- what matters ------------------------------------------------------------------------------------------


def importance(study: Study) -> Figure | None:
    """How much of the metric's variance over the points each field explains, by fANOVA (Hutter et al. 2014)."""
    rows = [row for row in study.rows if row.score.n]
    fields = [field for field in study.fields if len({_value(row.point, field) for row in rows}) > 1]
    always = [field for field in fields if all(field in row.point for row in rows)]
    if len(rows) < IMPORTANCE or len(always) < 2 or len({row.score.mean for row in rows}) == 1:
        return None
    shares = _shares(rows, always)
    names = sorted(shares, key=lambda field: shares[field])
    plot, axes = _blank(7, 1.4 + 0.32 * len(names))
    bars = axes.barh([study.short(name) for name in names], [shares[name] for name in names], color=ATTENTION)
    axes.bar_label(bars, [f"{100 * shares[name]:.0f} %" for name in names], padding=3)
    left_out = (
        f"\nwithout {', '.join(sorted(set(fields) - set(always)))}: not in every point"
        if fields != always
        else ""
    )
    axes.set_title(f"Hyperparameter importance by fANOVA, {len(rows)} points{left_out}")
    axes.set_xlabel(f"share of the variance of {label(study.metric)} that its forest explains, be it chance")
    axes.set_xlim(0, 1.15 * max(shares.values()))
    return plot


def _shares(rows: Sequence[Row], fields: Sequence[str]) -> dict[str, float]:
    import optuna  # it imports for a second
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it tells of every study
    values = {field: [_number_or_text(row.point[field]) for row in rows] for field in fields}
    spans: dict[str, optuna.distributions.BaseDistribution] = {}
    for field, some in values.items():
        if all(isinstance(value, float) for value in some):
            spans[field] = optuna.distributions.FloatDistribution(min(some), max(some))
        else:
            values[field] = [str(value) for value in some]
            spans[field] = optuna.distributions.CategoricalDistribution(sorted(set(values[field])))
    trials = [
        optuna.trial.create_trial(
            params={field: values[field][i] for field in fields}, distributions=spans, value=row.score.mean
        )
        for i, row in enumerate(rows)
    ]
    searched = optuna.create_study()
    searched.add_trials(trials)
    return get_param_importances(searched, evaluator=FanovaImportanceEvaluator(seed=0))


def _number_or_text(value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number else name_of({"": value})


# --- what they share ---------------------------------------------------------------------------------------


def _value(point: Point, field: str) -> str:
    return name_of({"": point[field]})[1:] if field in point else "-"


def _score_text(study: Study, row: Row) -> str:
    if not row.score.n:
        return "not finished"
    spread = f" ± {value_text(study.metric, row.score.std)}" if row.score.n > 1 else ""
    return f"{value_text(study.metric, row.score.mean)}{spread} (n = {row.score.n})"


def _blank(width: float, height: float) -> tuple[Figure, Axes]:
    """Sizes in inches."""
    plot = Figure(figsize=(width, height), layout="constrained")
    return plot, plot.subplots()


def _bytes(plot: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    plot.savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


PLOTS: dict[str, Callable[[Study], Figure | None]] = {
    "pareto": pareto,
    "curves": curves,
    "placement": placement,
    "importance": importance,
}
