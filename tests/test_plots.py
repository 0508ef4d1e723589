"""The plots are whole PNGs and SVGs that show their points by name; without data there is none."""

import itertools
import math
import random
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from studies import write_run

from pipeline import plots
from pipeline.rundir import Out
from pipeline.study import Study, read_runs, study
from pipeline.sweep import Outcome

PLACEMENT, LR = "model.placement", "optim.lr"
PATTERNS = ("cccc", "gccc", "ggcc", "gggg", "ccc/cccg/gggggg/ggg")


@pytest.fixture
def out(tmp_path: Path) -> Out:
    return Out(tmp_path)


@pytest.fixture(autouse=True)
def style() -> Iterator[None]:
    with matplotlib.rc_context(plots.STYLE):
        yield


def studied(out: Out, ended: list[Outcome], **settings: Any) -> Study:
    return study(read_runs(out, ended), **settings)


def grid(out: Out, rates: tuple[float, ...] = (0.1, 0.4), seeds: int = 2) -> list[Outcome]:
    """Each placement with each rate: 3 epochs, GFLOPs and figures of their own."""
    return [
        write_run(
            out,
            [50.0, 70.0, 80.0 + 2 * i - 10 * abs(rate - 0.2) + seed],
            {PLACEMENT: pattern, LR: rate},
            seed=seed,
            facts={"gflops": 1 + 0.1 * i},
        )
        for i, pattern in enumerate(PATTERNS)
        for rate in rates
        for seed in range(seeds)
    ]


def texts(plot: Figure) -> list[Text]:
    """The texts of a plot that are seen, drawn once so that each has its place."""
    plot.draw_without_rendering()
    unseen = set()  # the labels of ticks beyond the ends of an axis
    for axis in (axis for axes in plot.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        unseen |= {
            text
            for tick in axis.get_major_ticks()
            if not low <= tick.get_loc() <= high
            for text in (tick.label1, tick.label2)
        }
    found = plot.findobj(Text)
    return [text for text in found if text.get_text() and text.get_visible() and text not in unseen]


def words(path: Path) -> str:
    root = ElementTree.parse(path).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    return "\n".join("".join(text.itertext()) for text in root.iter("{http://www.w3.org/2000/svg}text"))


def test_all_plots_are_whole_and_name_their_points(out: Out, tmp_path: Path) -> None:
    written = plots.write(studied(out, grid(out)), tmp_path / "report")
    assert [path.name for path in written] == [
        f"{name}.{kind}"
        for name in ("pareto", "curves", "placement", "importance")
        for kind in ("png", "svg")
    ]
    for path in written:
        if path.suffix == ".png":
            with Image.open(path) as picture:
                assert picture.format == "PNG" and round(picture.info["dpi"][0]) == 150
                picture.load()
                assert len(picture.convert("RGB").getcolors(1 << 24)) > 5  # more than a white sheet
    shown = {path.stem: words(path) for path in written if path.suffix == ".svg"}
    for pattern, rate in itertools.product(PATTERNS, (0.1, 0.4)):
        assert f"placement={pattern} lr={rate}" in shown["pareto"]
    assert "placement=ccc/cccg/gggggg/ggg lr=0.1: 87.50 ± 0.71 (n = 2)" in shown["curves"]
    assert "the best 8 of 10 points" in shown["curves"]
    assert {*PATTERNS, "lr", "87.50", "GSA", "convolution"} <= set(shown["placement"].splitlines())
    assert "Hyperparameter importance by fANOVA, 10 points" in shown["importance"]
    assert {"placement", "lr"} <= set(shown["importance"].splitlines())


def test_the_same_study_gives_the_same_bytes(out: Out, tmp_path: Path) -> None:
    found = studied(out, grid(out, rates=(0.2,), seeds=1))
    first, again = (plots.write(found, tmp_path / name) for name in ("a", "b"))
    assert len(first) == 6
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]


def test_a_plot_without_data_is_not_drawn_and_an_old_one_goes(out: Out, tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "pareto.png").write_bytes(b"of another study")
    few = studied(out, [write_run(out, [80.0], {LR: 0.1}), write_run(out, [1.0], {LR: 0.4}, state="stopped")])
    written = plots.write(few, tmp_path / "report")
    assert (
        sorted((tmp_path / "report").iterdir())
        == written
        == [tmp_path / "report" / f"curves.{k}" for k in ("png", "svg")]
    )
    shown = words(tmp_path / "report" / "curves.svg")
    assert "lr=0.1: 80.00 (n = 1)" in shown and "lr=0.4: not finished" in shown


@pytest.mark.parametrize("mode", ["max", "min"])
def test_the_front_holds_what_nothing_beats(mode: str) -> None:
    rng = random.Random(0)
    sign = 1 if mode == "max" else -1
    for _ in range(200):
        points = [(float(rng.randrange(5)), float(rng.randrange(5))) for _ in range(rng.randrange(1, 9))]

        def beaten(cost: float, value: float, points: Any = points) -> bool:
            return any(c <= cost and sign * v >= sign * value and (c, v) != (cost, value) for c, v in points)

        front = [points[i] for i in plots.pareto_front(points, mode)]
        assert front == sorted({point for point in points if not beaten(*point)})


def test_names_lie_neither_on_each_other_nor_outside(out: Out) -> None:
    def point(i: int) -> Outcome:
        settings = {LR: round(0.01 * i, 2), "optim.weight_decay": 1e-4 * i}
        return write_run(out, [80 + 0.1 * i + 10 * (i == 12)], settings, facts={"gflops": 1.0})

    ended = [point(i) for i in range(1, 13)]  # one high above the others, which lie close together
    plot = plots.pareto(studied(out, ended))
    assert plot
    found = texts(plot)
    assert sum("weight_decay" in text.get_text() for text in found) == 12
    boxes = [text.get_window_extent() for text in found]
    assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]
    assert all(plot.bbox.containsx(x) for box in boxes for x in box.intervalx)


def test_no_text_of_any_plot_lies_on_another(out: Out) -> None:
    found = studied(out, grid(out))
    for name, draw in plots.PLOTS.items():
        plot = draw(found)
        assert plot
        boxes = [(text.get_text(), text.get_window_extent()) for text in texts(plot)]
        over = [(a, b) for (a, x), (b, y) in itertools.combinations(boxes, 2) if x.overlaps(y)]
        assert not over, name
        assert all(box.x0 >= 0 and box.x1 <= plot.bbox.width for _, box in boxes), name


def test_of_many_points_the_front_alone_is_named(out: Out) -> None:
    plot = plots.pareto(studied(out, grid(out, rates=(0.1, 0.2, 0.4), seeds=1)))
    assert plot
    names = [text.get_text() for text in texts(plot) if text.get_text().startswith("placement=")]
    assert sorted(names) == sorted(f"placement={pattern} lr=0.2" for pattern in PATTERNS)


def test_the_bars_are_the_interval(out: Out) -> None:
    ended = [write_run(out, [v], {LR: 0.1}, seed=s) for s, v in enumerate((90.0, 92.0, 97.0))]
    plot = plots.pareto(studied(out, [*ended, write_run(out, [80.0], {LR: 0.2})]))
    assert plot
    ends = [bars.lines[2][0].get_segments()[0][:, 1].tolist() for bars in plot.axes[0].containers]
    assert ends[0] == pytest.approx([93 - 8.9567, 93 + 8.9567], abs=1e-3)  # 4.30265 * sqrt(13 / 3)
    assert ends[1] == [80.0, 80.0]


def test_a_placement_alone_is_one_column_and_a_second_field_a_matrix(out: Out) -> None:
    both = plots.placement(studied(out, grid(out)))
    alone = plots.placement(studied(out, grid(out, rates=(0.2,))))
    assert both and alone
    assert [text.get_text() for text in both.axes[1].texts][:4] == ["79.50", "78.50", "81.50", "80.50"]
    assert [text.get_text() for text in alone.axes[1].texts][:2] == ["80.50 (2)", "82.50 (2)"]
    cells = [patch.get_width() for patch in both.axes[0].patches]
    assert len(cells) == 4 * 4 + 3 + 4 + 6 + 3  # a cell a group, but a cell a block where they differ
    assert min(cells) == pytest.approx(0.92 / 6)


def test_the_field_that_matters_is_found(out: Out) -> None:
    rng = random.Random(0)
    ended = [
        write_run(out, [80 + 10 * x + 0.1 * rng.random()], {"optim.momentum": x, LR: 0.1 + rng.random()})
        for x in (round(rng.random() * 0.9, 3) for _ in range(16))
    ]
    plot = plots.importance(studied(out, ended))
    assert plot
    names = [text.get_text() for text in plot.axes[0].get_yticklabels()]
    widths = [patch.get_width() for patch in plot.axes[0].patches]
    assert names == ["lr", "momentum"]
    assert sum(widths) == pytest.approx(1) and widths[1] > 0.8
    assert plots.importance(studied(out, ended[:7])) is None


def test_a_field_that_not_every_point_has_is_left_out_of_the_importance(out: Out) -> None:
    ended = [
        write_run(
            out,
            [80.0 + i],
            {LR: 0.1 * i, "model.heads": 2 ** (i % 3), **({"optim.momentum": 0.1 * i} if i > 3 else {})},
        )
        for i in range(1, 10)
    ]
    plot = plots.importance(studied(out, ended))
    assert plot
    assert plot.axes[0].get_title(loc="left").endswith("9 points\nwithout optim.momentum: not in every point")


def test_names_may_hold_any_character(out: Out, tmp_path: Path) -> None:
    names = [r"$\frac_x$", "a<b>&c", "100 %", "π_1"]
    ended = [write_run(out, [80.0 + i])._replace(point={"data.shards": name}) for i, name in enumerate(names)]
    plots.write(studied(out, ended), tmp_path / "report")
    shown = words(tmp_path / "report" / "pareto.svg")
    assert all(f"shards={name}" in shown for name in names)


def test_an_epoch_that_is_not_finite_leaves_a_gap(out: Out) -> None:
    plot = plots.curves(studied(out, [write_run(out, [10.0, math.nan, 30.0], {LR: 0.1})]))
    assert plot
    assert plot.axes[0].lines[0].get_xydata().tolist() == [[1.0, 10.0], [3.0, 30.0]]
