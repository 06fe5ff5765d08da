"""Tables for readers: no key of the code, families in order, the best value bold, signs that need no colour."""

import re

import pandas as pd
import pytest

from kdiga_nb import paths
from kdiga_nb.audit import Verdict
from kdiga_nb.report import audit_grid, heading, show
from kdiga_nb.report.colors import METHODS
from kdiga_nb.report.tables import FAMILIES

TABLE = pd.read_csv(paths.published("digits") / "table1.csv")


def page_of(table: pd.DataFrame, *metrics: str) -> str:
    return show(table, metrics)._repr_html_()  # pyright: ignore[reportCallIssue]


def plain(page: str) -> str:
    """The words of a table, as a viewer shows it that strips styles and marks."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))


def test_every_method_has_a_family() -> None:
    assert set(FAMILIES) == set(METHODS)


@pytest.mark.parametrize("name", sorted(path.stem for path in paths.published("digits").glob("*.csv")))
def test_headings_are_words(name: str) -> None:
    """Every metric of every published table, also where no notebook shows it."""
    metrics = set(pd.read_csv(paths.published("digits") / f"{name}.csv")["metric"])
    shown = {metric for metric in metrics if "lambda" not in metric}
    assert [one for one in shown if "_" in re.sub(r"[‖|]?(g|CE)_[st]", "", heading(one))] == []


def test_a_table_has_groups_small_intervals_and_bold_best_values() -> None:
    page = page_of(TABLE, "clean", "pgd20", "autoattack")
    words = plain(page)
    assert words.index("standard training") < words.index("KDIGA") < words.index("self-distillation")
    assert "pgd20" not in words and "PGD-20" in words and "ours paper" in words
    best = TABLE[TABLE["metric"] == "pgd20"].set_index("row")["value"].max()
    assert re.findall(r"<b>([\d.]+)</b>", page).count(f"{best:.1f}") >= 1 and page.count("<b>") == 3
    assert '<small style="color:gray">[' in page


def test_without_the_papers_numbers_there_is_one_row_of_headings() -> None:
    table = TABLE.assign(reported=float("nan"))
    page = page_of(table, "clean")
    assert "paper" not in page and page.count("<thead><tr>") == 1 and "</tr><tr>" not in page.split("</thead>")[0]


def test_rows_that_are_no_methods_have_no_groups() -> None:
    table = pd.read_csv(paths.published("digits") / "ablations.csv")
    assert "<em>" not in page_of(table, "clean")


def test_the_frame_stays_a_frame() -> None:
    shown = show(TABLE, ["clean", "pgd20"])
    assert list(shown.columns)[:4] == ["clean, ours", "clean, paper", "pgd20, ours", "pgd20, paper"]
    assert type(shown[["clean, ours"]]) is pd.DataFrame


def test_the_grid_says_the_rules_with_signs_and_colours() -> None:
    numbers = {"clean": 98.0, "plain": 40.0, "worst": 31.0, "n": 200}
    nets = {
        "good": Verdict({}, {}, {}, **numbers),
        "weak": Verdict({}, {}, {"unconverged": "…"}, **numbers),
        "masked": Verdict({}, {"zero_gradients": "…"}, {}, **numbers),
    }
    grid = audit_grid(nets)
    lines = dict(grid.lines)
    assert lines["unconverged"] == ["✓", "!", "✓"] and lines["zero_gradients"] == ["✓", "✓", "✗"]
    assert lines["verdict"] == ["sound", "overstated", "masked"]
    assert "unconverged              ✓  !  ✓" in repr(grid)
    assert grid._repr_html_().count("#fbe6b5") == 2 and "zero gradients" in plain(grid._repr_html_())
