"""A study as tables: the figures of the journal to the last digit, and under them what must not be overlooked."""

import csv
import io
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from studies import write_run

from pipeline import metrics, report, tables
from pipeline.rundir import Out
from pipeline.study import Study, read_runs, study
from pipeline.sweep import Outcome, Sweep, begin, record
from pipeline.verbs import best_run

PLACEMENT, LR = "model.placement", "optim.lr"
ODD = [91.36490250696379, 94.70752089136491, 89.69359331476323]  # figures with all of their digits


@pytest.fixture
def out(tmp_path: Path) -> Out:
    return Out(tmp_path)


@pytest.fixture
def ended(out: Out) -> list[Outcome]:
    """Three seeds of a convolution and of GSA, one of these stopped; a point that failed."""
    facts = {"params": 2_000_000, "gflops": 0.00625}
    return [
        *(
            write_run(out, [v], {PLACEMENT: "cccc"}, seed=s, facts=facts)
            for s, v in enumerate((80.0, 81.0, 85.0))
        ),
        *(write_run(out, [20.0, v], {PLACEMENT: "gggg"}, seed=s) for s, v in enumerate(ODD[:2])),
        write_run(out, [ODD[2]], {PLACEMENT: "gggg"}, seed=2, state="stopped"),
        write_run(out, [], {PLACEMENT: "cggg"}, state="failed"),
    ]


def studied(out: Out, ended: list[Outcome], **settings: Any) -> Study:
    return study(read_runs(out, ended), **settings)


def rows_of(found: Study, name: str, **settings: Any) -> list[dict[str, Any]]:
    """What a CSV or Parquet file of the study holds."""
    data = tables.files(found, title="t", **settings)[name]
    if isinstance(data, str):
        return list(csv.DictReader(io.StringIO(data)))
    return list(pq.read_table(io.BytesIO(data)).to_pylist())


def test_the_table_shows_mean_spread_interval_difference_and_cost(out: Out, ended: list[Outcome]) -> None:
    best, base, failed = tables.shown_rows(studied(out, ended, baseline={PLACEMENT: "cccc"}, iso="params"))
    assert base == {
        "placement": "cccc",
        "n": "3",
        "val top-1 %": "82.00",
        "std": "2.65",
        "95 % interval": "75.43 to 88.57",  # 4.3027 * 2.6458 / sqrt(3) = 6.57
        "minus baseline": "baseline",
        "twin (its params)": "-",
        "minus twin": "-",
        "params": "2,000,000",
        "GFLOPs": "0.00625",
        "images/s": "100.0",
        "device-hours": "0.060",
        "state": "-",
    }
    assert best["minus baseline"] == "+12.54 (-2.35 to +27.42)"  # 11.36 and 13.71: 12.706 * 1.171
    assert best["twin (its params)"] == "placement=cccc (+199900.0 %)"
    assert best["state"] == "2 finished, 1 stopped"
    assert (failed["val top-1 %"], failed["state"], failed["minus baseline"]) == ("-", "failed, epoch 0", "-")


def test_a_point_without_a_finished_run_shows_how_far_it_came(out: Out) -> None:
    ended = [write_run(out, [90.0], {LR: 0.1}), write_run(out, [5.0, 12.5], {LR: 0.4}, state="stopped")]
    row = tables.shown_rows(studied(out, ended))[1]
    assert (row["n"], row["val top-1 %"], row["state"]) == ("0", "-", "stopped, epoch 2: 12.50")


def test_the_notes_say_what_must_not_be_overlooked(out: Out, ended: list[Outcome]) -> None:
    text = "\n".join(tables.notes(studied(out, ended, baseline={PLACEMENT: "cccc"}, iso="gflops")))
    assert "by Student's t (n = 1 has none)" in text
    assert "1 stopped before the end (it has trained for fewer epochs); 1 failed." in text
    assert "flattered where some of its seeds were stopped (placement=gggg)." in text
    assert "difference from placement=cccc, paired by seed" in text
    assert "one of the two has no figure: placement=gggg (seed 2); placement=cggg (seed 0, 1, 2)" in text
    assert "Twin: the point without GSA nearest in gflops" in text
    # Two points have figures: pooled std sqrt((2 * 7 + 5.586) / 3) = 2.555, over sqrt(2), times 0.5642.
    assert "Best of 2 points on the same val split: the figure of placement=gggg is flattered" in text
    assert "the best would lie 1.02 above their mean by chance" in text
    assert "standard error 1.81 of a mean of n = 2 (standard deviation 2.56, pooled, 3 degrees" in text


def test_of_single_seeds_no_luck_is_estimated(out: Out) -> None:
    ended = [write_run(out, [90.0], {LR: 0.1}), write_run(out, [91.0], {LR: 0.2})]
    text = " ".join(tables.notes(studied(out, ended)))
    assert "the figure of lr=0.2 is flattered, and so is its difference; no point has two seeds" in text
    assert "flattered" not in " ".join(tables.notes(studied(out, ended[:1])))


def test_runs_that_cannot_be_compared_are_told(out: Out) -> None:
    ended = [
        write_run(out, [90.0], {LR: 0.1}, facts={"shards_digest": "a"}),
        write_run(out, [90.0], {LR: 0.1, "init": "x"}, seed=1, facts={"shards_digest": "b"}),
    ]
    ended[1] = ended[1]._replace(point={LR: 0.1})
    text = " ".join(tables.notes(studied(out, ended)))
    assert "different shards" in text and "they are not independent" in text
    text = " ".join(tables.notes(studied(out, ended[:1])))
    assert "different shards" not in text and "independent" not in text


def test_runs_that_no_mean_holds_are_counted(out: Out) -> None:
    ended = [
        write_run(out, [90.0], {LR: 0.1}),
        write_run(out, [91.0], {LR: 0.1}),
        write_run(out, [math.nan], {LR: 0.1}, seed=1),
    ]
    text = " ".join(tables.notes(studied(out, ended)))
    assert "1 finished without a finite val/top1" in text
    assert "1 followed by another of the same point and seed" in text


def test_parquet_and_csv_have_every_digit_of_the_journal(out: Out, ended: list[Outcome]) -> None:
    found = studied(out, ended)
    rows, texts = ({r["run"]: r for r in rows_of(found, f"runs.{kind}")} for kind in ("parquet", "csv"))
    assert len(rows) == len(texts) == len(ended)
    for outcome in ended:
        journal = metrics.read(out.run(outcome.run).metrics)
        row, text = rows[outcome.run], texts[outcome.run]
        assert (row["seed"], row["state"], row["epoch"]) == (outcome.seed, outcome.state, outcome.epoch)
        assert row[PLACEMENT] == text[PLACEMENT] == outcome.point[PLACEMENT]
        for name, value in (journal[-1].metrics if journal else {"val/top1": None}).items():
            assert row[name] == value
            assert text[name] == ("" if value is None else repr(value))


def test_the_points_are_written_in_full_precision(out: Out, ended: list[Outcome]) -> None:
    found = studied(out, ended, baseline={PLACEMENT: "cccc"}, iso="params")
    rows = rows_of(found, "report.parquet")
    assert rows == tables.point_rows(found)
    best, base, failed = rows
    assert best["mean"] == (ODD[0] + ODD[1]) / 2
    assert (best["finished"], best["stopped"], best["difference_n"]) == (2, 1, 2)
    assert best["difference"] == pytest.approx(best["mean"] - 80.5)
    assert best["twin"] == "placement=cccc" and best["twin_params_apart"] == pytest.approx(1999)
    assert (base["is_baseline"], base["difference"]) == (True, None)
    assert (failed["n"], failed["mean"], failed["low"], failed["failed"]) == (0, None, None, 1)
    texts = rows_of(found, "report.csv")
    assert [text["mean"] for text in texts] == [repr(best["mean"]), repr(base["mean"]), ""]


def test_a_field_of_mixed_values_is_written_as_text(out: Out) -> None:
    values = [0.1, 1, "all", None, [1, 2], True]
    ended = [write_run(out, [80.0 + i])._replace(point={"f.g": value}) for i, value in enumerate(values)]
    rows = rows_of(studied(out, ended), "report.parquet")
    assert [row["f.g"] for row in rows] == ["true", "[1, 2]", None, "all", "1", "0.1"]
    rows = rows_of(studied(out, ended[:2]), "report.parquet")
    assert [row["f.g"] for row in rows] == [1.0, 0.1]


def test_latex_is_escaped(out: Out) -> None:
    names = [r"a_b & 5% $x^2$ #{1}", r"C:\x~<y>|z"]
    ended = [write_run(out, [80.0 + i])._replace(point={"data.shards": name}) for i, name in enumerate(names)]
    text = tables.latex(studied(out, ended), title="100 % of\nit")
    assert r"a\_b \& 5\% \$x\textasciicircum{}2\$ \#\{1\} & 1 & 80.00 & - & - &" in text
    assert r"C:\textbackslash{}x\textasciitilde{}\textless{}y\textgreater{}\textbar{}z & 1 &" in text
    assert r"val top-1 \%" in text and r"95 \% interval" in text
    assert text.splitlines()[0] == "% 100 % of it"
    table = text[text.index(r"\begin{tabular}{") : text.index(r"\end{tabular}")]
    columns = table.splitlines()[0].removeprefix(r"\begin{tabular}{").rstrip("}")
    rows = [line for line in table.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 3
    assert {row.replace(r"\&", "").count("&") for row in rows} == {len(columns) - 1}
    assert columns.startswith("lrr")  # a name, then numbers


def test_markdown_has_a_table_with_its_notes_and_plots(out: Out) -> None:
    ended = [
        write_run(out, [80.0 + i])._replace(point={"data.shards": name})
        for i, name in enumerate(["a|b", "c*d"])
    ]
    text = tables.markdown(studied(out, ended), title="sweep x", plots=["pareto.png"])
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| shards"))
    assert lines[0] == "# sweep x"
    assert lines[start + 1].startswith("| --- | ---: | ---: |")
    assert lines[start + 2].startswith(r"| c\*d | 1 | 81.00 | - | - |")
    assert lines[start + 3].startswith(r"| a\|b | 1 | 80.00 |")
    assert "- Best of 2 points on the same val split" in text
    assert lines[-1] == "![pareto](pareto.png)"


def test_the_head_states_what_all_points_have(out: Out) -> None:
    ended = [write_run(out, [80.0], {LR: lr, PLACEMENT: "gggg"}) for lr in (0.1, 0.2)]
    text = tables.plain(studied(out, ended, baseline={LR: 0.1}), title="sweep x")
    assert text.startswith(
        "sweep x\nval top-1 %, the larger the better: 2 runs at 2 points, 0.040 device-hours"
    )
    assert "\nBaseline: lr=0.1.\nThe same in all: model.placement=gggg.\n" in text


def test_a_figure_of_the_paper_bears_its_mark(out: Out) -> None:
    facts = {"classes": [f"n{i:08d}" for i in range(1000)]}
    point = {"model.name": "gsa_resnet101", PLACEMENT: "gggg"}
    found = studied(out, [write_run(out, [77.0], point, facts=facts)])
    assert tables.shown_rows(found)[0]["paper"] == "79.6 [recalled]"
    assert "| 79.6 [recalled] |" in tables.markdown(found, title="t")


def test_metrics_that_are_no_percentage_have_four_digits(out: Out) -> None:
    ended = [
        write_run(out, [loss], {LR: 0.1}, seed=i, metric="val/loss") for i, loss in enumerate((0.12345, 0.2))
    ]
    (row,) = tables.shown_rows(studied(out, ended, metric="val/loss", mode="min"))
    assert (row["val/loss"], row["std"]) == ("0.1617", "0.05413")


def test_all_files_are_written_and_named(out: Out, ended: list[Outcome]) -> None:
    folder = out.root / "report"
    written = tables.write(studied(out, ended), folder, title="t")
    assert sorted(written) == sorted(folder.iterdir())
    assert {"report.md", "report.tex", "report.csv", "report.parquet", "runs.csv", "runs.parquet"} <= {
        path.name for path in written
    }
    for path in written:
        if path.suffix == ".png":
            assert f"({path.name})" in (folder / "report.md").read_text()


def test_trials_show_the_fields_of_their_own_sweep(out: Out) -> None:
    ended = [
        write_run(out, [80.0], {"optim.name": "sgd", LR: 0.5}),
        write_run(out, [81.234, 82.345], {"optim.name": "lamb"}, state="stopped"),
    ]
    first, second = report.trial_rows(out, ended)
    assert list(first) == [
        *("run", "optim.name", LR, "params", "GFLOPs", "epochs", "state", "val top-1 %", "seconds")
    ]
    assert (first[LR], second[LR], second["epochs"], second["val top-1 %"]) == (0.5, None, "2/90", 82.34)
    assert "seed" in report.trial_rows(out, [ended[0], ended[1]._replace(seed=3)])[0]
    text = tables.table([first, second])
    assert text.splitlines()[-1].split()[:3] == [ended[1].run, "lamb", "-"]


def test_numbers_stand_to_the_right() -> None:
    text = tables.table([{"a": 1, "b": "x"}, {"a": 1000, "b": None}])
    assert text.splitlines()[-2:] == ["     1   x", " 1,000   -"]
    assert tables.table([]) == "(nothing)"


def test_of_a_sweep_that_went_on_otherwise_the_last_runs_count(out: Out) -> None:
    """Other shards, or another train recipe behind the same name: the runs before were of other settings."""
    facts = [{"shards_digest": name} for name in ("old", "new")]
    ended = [
        write_run(out, [99.0], {LR: 0.1}, facts=facts[0]),
        write_run(out, [60.0], {LR: 0.1}, facts=facts[1]),
        write_run(out, [70.0], {LR: 0.2}, facts=facts[1]),
        write_run(out, [65.0], {LR: 0.1}, facts=facts[1]),
    ]
    gone = ended[0]._replace(run="run-that-was-deleted")
    sweep = Sweep.model_validate({"name": "x", "train": "digits", "parameters": {LR: [0.1, 0.2]}})
    assert report.current(out, sweep, [gone, *ended]) == [ended[3], ended[2]]
    folder = out.sweep("x")
    begin(folder, sweep)
    for outcome in [gone, *ended]:
        record(folder, outcome)
    assert best_run(out, "x").name == ended[2].run
    found, _ = report.write_study(out, sweep, [gone, *ended])
    assert [row.score.mean for row in found.rows] == [70.0, 65.0]
