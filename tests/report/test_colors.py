"""One name, colour and marker per method, in every table and in the explorer."""

import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from kdiga_nb import paths
from kdiga_nb.params import EXPLORED
from kdiga_nb.report.colors import (
    METHODS,
    METRICS,
    label_color,
    method_color,
    method_markers,
    method_of_row,
    metric_color,
    metric_colors,
)


@pytest.mark.parametrize("colors", [[color for _, color, _ in METHODS.values()], list(METRICS.values())])
def test_colors_can_be_told_apart(colors: list[str]) -> None:
    distances = [
        sum((a - b) ** 2 for a, b in zip(to_rgb(one), to_rgb(other), strict=True)) ** 0.5
        for place, one in enumerate(colors)
        for other in colors[:place]
    ]
    assert min(distances) > 0.15


@pytest.mark.parametrize("scale", ["digits", "cifar10_cpu", "cifar10_short"])
def test_every_row_of_table_1_has_the_color_of_its_method(scale: str) -> None:
    table = pd.read_csv(paths.published(scale) / "table1.csv").drop_duplicates("row")
    for row in table["row"]:
        method = method_of_row(str(row))
        assert method is not None and method_color(str(row)) == METHODS[method][1]
    colors = {row: method_color(row) for row in table["row"]}
    assert colors["trades_teacher"] == colors["trades_student"]
    assert len({colors[row] for row in colors if row.startswith("isd_wot") and row != "isd_wot_1_zero"}) == 1
    assert colors["penalty"] != colors["kdiga_zero"] != colors["kd"]


@pytest.mark.parametrize("artefact", ["figure1", "baselines", "pareto"])
def test_markers_are_those_of_the_methods_and_tell_rows_apart(artefact: str) -> None:
    table = pd.read_csv(paths.published("digits") / f"{artefact}.csv")
    rows = [row for row in dict.fromkeys(map(str, table["row"])) if not row.startswith("isd_") or row.endswith("_1")]
    markers = dict(zip(rows, method_markers(rows), strict=True))
    assert len({(method_of_row(row), marker) for row, marker in markers.items()}) == len(rows)
    assert all(markers[row] == METHODS[row][2] for row in set(rows) & set(METHODS))


def test_a_marker_that_is_taken_is_replaced_by_a_free_one() -> None:
    first, second, third, no_method = method_markers(["st", "st_long", "kd", "fgsm_at"])
    assert (first, third) == (METHODS["st"][2], METHODS["kd"][2])
    assert len({first, second, third, no_method}) == 4
    assert len(set(method_markers(["st"] * 15))) == 15 and len(method_markers(["st"] * 40)) == 40


def test_the_explorer_uses_the_same_names() -> None:
    assert {key: METHODS[method_of_row(key) or ""][0] for key in EXPLORED} == EXPLORED


def test_labels_and_metrics() -> None:
    assert label_color("student (ST)") == METHODS["st"][1]
    assert label_color("KDIGA, λ = 1.5") == METHODS["kdiga"][1]
    assert label_color("digits_small (TRADES)") == METHODS["trades"][1]
    assert metric_color("pgd20@0.05") == metric_color("pgd40") == METRICS["pgd"]
    assert len(set(metric_colors(["clean", "pgd40@0.05", "pgd40@0.1"]))) == 3
