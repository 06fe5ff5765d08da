"""One colour and one name per method, in every table and in the explorer."""

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
    method_of_row,
    metric_color,
    metric_colors,
)


@pytest.mark.parametrize("colors", [[color for _, color in METHODS.values()], list(METRICS.values())])
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


def test_the_explorer_uses_the_same_names() -> None:
    assert {key: METHODS[method_of_row(key) or ""][0] for key in EXPLORED} == EXPLORED


def test_labels_and_metrics() -> None:
    assert label_color("student (ST)") == METHODS["st"][1]
    assert label_color("KDIGA, λ = 1.5") == METHODS["kdiga"][1]
    assert label_color("digits_small (TRADES)") == METHODS["trades"][1]
    assert metric_color("pgd20@0.05") == metric_color("pgd40") == METRICS["pgd"]
    assert len(set(metric_colors(["clean", "pgd40@0.05", "pgd40@0.1"]))) == 3
