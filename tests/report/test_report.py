"""Numbers with their intervals, the long table, what a reader sees of it, figures, and files that can be repeated."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from scipy.stats import t as student_t

from kdiga_nb import paths, report
from kdiga_nb.artifacts import ARTIFACTS
from kdiga_nb.artifacts.table import Cell, Experiment, Row
from kdiga_nb.measures import Bounds, Measure, TestAccuracy
from kdiga_nb.methods import KDIGA, ST
from kdiga_nb.metrics import proportion
from kdiga_nb.params import Params, at_scale
from kdiga_nb.report.figures import plot_dots, plot_loops, plot_plane
from kdiga_nb.report.files import ReproductionError, save
from kdiga_nb.report.numbers import COLUMNS, frame, interval, show
from kdiga_nb.runs.graph import Job
from kdiga_nb.runs.run import Run, run_key
from kdiga_nb.runs.store import measured
from kdiga_nb.training import Schedule

QUICK = Schedule(1, batch_size=256, learning_rate=0.05, policy="constant", augment=False)
CLEAN = TestAccuracy(None, 50)


def runs(seeds: int, **changes: Any) -> tuple[Run, ...]:
    return tuple(Run("digits", "digits_small", ST(), QUICK, seed, **changes) for seed in range(seeds))


def cell(metric: str, nets: tuple[Run, ...], measure: Measure = CLEAN, key: str = "percent") -> Cell:
    reference = nets[0] if isinstance(measure, Bounds) else None
    return Cell(metric, tuple(Job(run, measure, reference) for run in nets), key)


def small_experiment() -> Experiment:
    """Two nets of two seeds, one of them with a weight; a row and a metric that are not run."""
    plain = runs(2)
    aligned = tuple(Run("digits", "digits_small", KDIGA(lambda_iga=2.0), QUICK, run.seed, teacher=run) for run in plain)
    rows = (
        Row("st", "student (ST)", plain, (cell("clean", plain),), {"clean": 91.82, "pgd20": 0.0}),
        Row(
            "kdiga", "ST → KDIGA → student", aligned, (cell("clean", aligned), cell("pgd3", aligned[:1])), note="a note"
        ),
        Row("vit", "ViT → KDIGA → student", reported={"clean": 60.0}),
    )
    return Experiment("table0", "Table 0", rows, at_scale(Params, "smoke", {"seeds": [0, 1]}))


@pytest.fixture(scope="module")
def trained_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("store") / "runs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDIGA_RUNS", str(store))
        report.reproduce(small_experiment())
    return store


@pytest.fixture
def experiment(trained_store: Path) -> Experiment:
    """The small experiment, its results in the test's own store."""
    shutil.copytree(trained_store, paths.runs())
    return small_experiment()


@pytest.fixture(autouse=True)
def own_figures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("KDIGA_FIGURES", str(tmp_path / "figures"))
    return tmp_path / "figures" / "smoke"


@pytest.fixture(autouse=True)
def closed_figures() -> Any:
    yield
    plt.close("all")


# ---- intervals ----


@pytest.mark.parametrize(("percent", "n"), [(0.0, 20), (5.0, 20), (50.0, 200), (99.0, 500), (100.0, 20)])
def test_one_seed_has_wilsons_interval(percent: float, n: int):
    known = proportion(round(percent / 100 * n), n)
    assert interval([percent], n) == pytest.approx((percent, known.low, known.high))


SEVERAL = [[90.0, 92.0, 94.0], [50.0, 50.0], [0.0, 2.0, 0.0], [100.0, 100.0, 99.0], [10.0, 90.0]]


@pytest.mark.parametrize("values", SEVERAL)
@pytest.mark.parametrize("n", [20, 500])
def test_several_seeds_have_at_least_each_part(values: list[float], n: int):
    mean, low, high = interval(values, n)
    count = len(values)
    half = student_t.ppf(0.975, count - 1) * np.std(values, ddof=1) / math.sqrt(count)
    wilson = proportion(round(mean / 100 * n), n)
    assert mean == pytest.approx(np.mean(values))
    assert low <= max(0.0, mean - half) + 1e-9
    assert high >= min(100.0, mean + half) - 1e-9
    assert low <= max(0.0, mean - (wilson.percent - wilson.low)) + 1e-9
    assert high >= min(100.0, mean + (wilson.high - wilson.percent)) - 1e-9
    assert 0 <= low <= mean <= high <= 100


def test_the_two_parts_are_added_in_quadrature():
    values, n = [49.0, 50.0, 51.0], 400
    half = student_t.ppf(0.975, 2) / math.sqrt(3)
    wilson = proportion(200, n)
    assert interval(values, n)[2] - 50 == pytest.approx(math.hypot(half, wilson.high - 50))


@pytest.mark.parametrize("values", [[1.5, 2.5], [-3.0, 0.0, 3.0], [200.0, 300.0]])
def test_other_metrics_have_students_interval_alone(values: list[float]):
    count = len(values)
    half = student_t.ppf(0.975, count - 1) * np.std(values, ddof=1) / math.sqrt(count)
    assert interval(values) == pytest.approx((np.mean(values), np.mean(values) - half, np.mean(values) + half))


def test_one_value_of_another_metric_has_no_interval():
    mean, low, high = interval([3.0])
    assert mean == 3.0
    assert math.isnan(low)
    assert math.isnan(high)


# ---- the long table ----


def test_frame_before_anything_was_run():
    table = frame(small_experiment())
    assert list(table.columns) == COLUMNS
    measured = table[~table["metric"].str.startswith("lambda")]
    assert measured["value"].isna().all()
    assert (measured["runs"] == "").all()
    assert table["reported"].notna().sum() == 3


def test_frame_holds_what_the_store_has(experiment: Experiment):
    table = frame(experiment)
    line = table[(table["row"] == "st") & (table["metric"] == "clean")].iloc[0]
    results = [measured(run, CLEAN) for run in experiment.rows[0].runs]
    values = [result["percent"] for result in results if result]
    assert (line["value"], line["low"], line["high"]) == interval(values, 50)
    assert (line["n"], line["seeds"], line["reported"]) == (50, 2, 91.82)
    assert line["runs"].split() == [run_key(run) for run in experiment.rows[0].runs]
    assert report.value(table, "st", "clean") == line["value"]


def test_frame_keeps_what_was_not_run(experiment: Experiment):
    table = frame(experiment)
    for row, metric, number in (("vit", "clean", 60.0), ("st", "pgd20", 0.0)):
        line = table[(table["row"] == row) & (table["metric"] == metric)].iloc[0]
        assert line["reported"] == number
        assert math.isnan(line["value"])
        assert (line["n"], line["seeds"], line["runs"]) == (0, 0, "")
    assert math.isnan(report.value(table, "vit", "clean"))
    assert math.isnan(report.value(table, "nonsense", "clean"))


def test_a_number_of_some_of_the_seeds_is_none(experiment: Experiment):
    _, second = experiment.rows[0].runs
    (paths.runs() / run_key(second) / "measures.json").unlink()
    assert math.isnan(report.value(frame(experiment), "st", "clean"))
    report.reproduce(experiment)
    assert not math.isnan(report.value(frame(experiment), "st", "clean"))


def test_nominal_and_effective_weight_are_lines_of_their_own(experiment: Experiment):
    table = frame(experiment)
    assert report.value(table, "kdiga", "lambda_iga") == 2.0
    assert report.value(table, "kdiga", "lambda_iga_effective") == 2.0
    assert math.isnan(report.value(table, "st", "lambda_iga"))


def test_best_row():
    table = pd.DataFrame({"row": ["a", "b", "c"], "metric": "clean", "value": [1.0, 3.0, 2.0]})
    assert report.best(table, ["a", "b", "c"], "clean") == "b"
    assert report.best(table, ["a", "c"], "clean") == "c"


@pytest.mark.parametrize(
    ("holds", "says"), [(True, "holds: it"), (False, "does not hold: it"), (None, "not measured: it")]
)
def test_claim(holds: bool | None, says: str, capsys: pytest.CaptureFixture[str]):
    report.claim("it", holds)
    assert capsys.readouterr().out == f"{says}\n"


def test_a_job_that_fails_is_reported():
    hopeless = (Run("digits", "digits_small", ST(), Schedule(1, batch_size=256, learning_rate=1e30)),)
    rows = (Row("st", "", hopeless, (cell("clean", hopeless),)),)
    failing = Experiment("table0", "", rows, at_scale(Params, "smoke"))
    with pytest.raises(ReproductionError, match="the term cross_entropy is"):
        report.reproduce(failing)


# ---- what a reader sees ----


def test_show(experiment: Experiment):
    shown = show(frame(experiment))
    assert list(shown.index) == ["student (ST)", "ST → KDIGA → student", "ViT → KDIGA → student"]
    ours, paper = shown["clean, ours"], shown["clean, paper"]
    assert re.fullmatch(r"\d+\.\d \[\d+\.\d, \d+\.\d\]", str(ours["student (ST)"]))
    assert ours["ViT → KDIGA → student"] == "not run"
    assert list(paper) == ["91.8", "–", "60.0"]
    assert list(shown["λ_IGA nominal (effective)"]) == ["–", "2 (2)", "–"]
    assert "pgd3, paper" not in shown.columns


def test_show_of_some_metrics(experiment: Experiment):
    shown = show(frame(experiment), ["pgd3"], digits=3)
    assert shown["pgd3, ours"].iloc[0] == "not run"
    assert re.match(r"\d+\.\d{3} ", str(shown["pgd3, ours"].iloc[1]))
    assert "clean, ours" not in shown.columns


# ---- figures: of tables with nothing, with something, with everything ----


def fill(table: pd.DataFrame, every: int) -> pd.DataFrame:
    """Values for every so many lines of a table that nothing was run of."""
    filled = table.copy()
    chosen = np.arange(len(filled)) % every == 0
    numbers = np.linspace(20, 90, len(filled))
    filled.loc[chosen, "value"] = numbers[chosen]
    filled.loc[chosen, "low"] = numbers[chosen] - 3
    filled.loc[chosen, "high"] = numbers[chosen] + 3
    return filled


def at_smoke(name: str) -> Experiment:
    artifact = ARTIFACTS[name]
    return artifact.build(at_scale(artifact.params, "smoke"))


def metrics(table: pd.DataFrame) -> list[str]:
    return [name for name in dict.fromkeys(table["metric"]) if "lambda" not in name]


def loops(table: pd.DataFrame) -> Figure:
    return plot_loops(table, {"WoT": ["st", "isd_wot_1", "isd_wot_2", "isd_wot_9"]}, ["clean", "pgd3"], "title")


def epsilon(table: pd.DataFrame) -> Figure:
    return report.plot_epsilon(table, "autoattack", list(dict.fromkeys(table["row"])), "title")


PLOTS: dict[str, tuple[str, Callable[[pd.DataFrame], Figure]]] = {
    "plane": ("figure1", lambda table: plot_plane(table, ["pgd3", "autoattack"], "title")),
    "dots": ("table2", lambda table: plot_dots(table, metrics(table), "title")),
    "loops": ("table1", loops),
    "epsilon": ("table6", epsilon),
    "bounds": ("table3", lambda table: report.plot_bounds(table, "title")),
}


@pytest.mark.parametrize("every", [1, 2, 3, 10_000], ids=["full", "half", "third", "empty"])
@pytest.mark.parametrize("plot", PLOTS)
def test_plots_bear_missing_values(plot: str, every: int, tmp_path: Path):
    name, draw = PLOTS[plot]
    figure = draw(fill(frame(at_smoke(name)), every))
    assert isinstance(figure, Figure)
    # Layout and fonts are only worked out when it is drawn; a warning there is an error here.
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_a_plot_draws_a_point_for_every_value():
    table = fill(frame(at_smoke("figure1")), 1)
    (axes,) = plot_plane(table, ["pgd3"], "title").axes
    assert len(axes.containers) == len(set(table["row"]))


def test_the_terms_of_the_bound_are_drawn_for_measured_rows_alone():
    table = fill(frame(at_smoke("table3")), 1)
    first, *others = dict.fromkeys(table["row"])
    (axes,) = report.plot_bounds(table[table["row"] == first], "title").axes
    table.loc[table["row"].isin(others), "value"] = float("nan")
    (same,) = report.plot_bounds(table, "title").axes
    assert [text.get_text() for text in same.get_yticklabels()] == [text.get_text() for text in axes.get_yticklabels()]
    assert len(same.patches) == len(axes.patches) == 4


@pytest.mark.parametrize(("factor", "panels"), [(1.0, 1), (4.9, 1), (5.1, 2), (1000.0, 2)])
def test_short_bars_beside_a_long_one_are_enlarged(factor: float, panels: int):
    table = frame(at_smoke("table3"))
    table["value"] = 1.0
    table.loc[(table["row"] == "st") & (table["metric"] == "bound"), "value"] = 4 * factor
    table.loc[(table["row"] != "st") & (table["metric"] == "bound"), "value"] = 4.0
    drawn = report.plot_bounds(table, "title").axes
    assert len(drawn) == panels
    if panels == 2:
        low, high = drawn[1].get_xlim()
        assert low == 0 and 4 < high < 5


@pytest.mark.parametrize(
    ("label", "brief"),
    [
        ("student (ST)", "student (ST)"),
        ("TRADES teacher → KD → student", "KD"),
        ("TRADES teacher → ISD-WiT-1", "ISD-WiT-1"),
    ],
)
def test_short_label(label: str, brief: str):
    assert report.short(label) == brief


# ---- files ----


def saved(experiment: Experiment, **more: Figure) -> pd.DataFrame:
    table = frame(experiment)
    save(experiment, table, plot_dots(table, ["clean"], "title"), **more)
    return table


def test_save_writes_table_figure_and_provenance(experiment: Experiment, own_figures: Path):
    table = saved(experiment, second=plot_dots(frame(experiment), ["clean"], "second"))
    names = {"table0.csv", "table0.json", "table0.png", "table0.svg", "table0_second.png", "table0_second.svg"}
    assert {path.name for path in own_figures.iterdir()} == names
    read_back = pd.read_csv(own_figures / "table0.csv", dtype={"runs": str}).fillna({"runs": ""})
    pd.testing.assert_frame_equal(read_back, table, check_dtype=False, rtol=1e-5)


def test_provenance(experiment: Experiment, own_figures: Path):
    saved(experiment)
    record = json.loads((own_figures / "table0.json").read_text())
    assert record["parameters"] == experiment.params.model_dump()
    assert record["runs"] == {row.id: [run_key(run) for run in row.runs] for row in experiment.rows}
    assert record["notes"] == {"kdiga": "a note"}
    assert {"python", "torch", "numpy"} <= set(record["versions"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", record["created"])
    assert record["hardware"]
    assert record["threads"] >= 1
    assert record["seconds"]["training"] > 0
    assert record["seconds"]["measuring"] >= 0
    assert (record["artefact"], record["interval"]) == ("table0", report.INTERVAL)


def test_the_same_table_gives_the_same_files(experiment: Experiment, own_figures: Path):
    saved(experiment)
    first = {name: (own_figures / name).read_bytes() for name in ("table0.csv", "table0.svg", "table0.png")}
    saved(experiment)
    assert {name: (own_figures / name).read_bytes() for name in first} == first


def test_the_commit_is_a_hash_or_said_to_be_unknown():
    assert re.fullmatch(r"[0-9a-f]{40}\+?|unknown", report.commit())


def test_flags_of_what_has_no_ensemble(experiment: Experiment):
    assert report.flags(experiment).empty
