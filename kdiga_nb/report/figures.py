"""Figures of the tables and of Figure 1; ``study_figures`` draws those of the studies."""

import math
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kdiga_nb.artifacts.recipes import isd_chain
from kdiga_nb.report.colors import method_color, method_styles, metric_colors
from kdiga_nb.report.names import metric_name
from kdiga_nb.report.numbers import short, value

PALETTE = sns.color_palette("colorblind")
ENLARGED = 5  # a bar that many times as long as the next one leaves the others too short to read


def one_panel(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of that size in inches with one panel."""
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    plain_axes(axes)
    return figure, axes


def plain_axes(axes: Axes) -> None:
    """A light grid, and no frame at the top and right."""
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def label_points(axes: Axes, labels: Sequence[tuple[str, float, float, Any]], size: float = 8) -> None:
    """Write a text beside each point, where it hides no line, marker or other text, as far as there is such a place.

    Nor may it stand nearer to another point of its colour.

    Args:
        labels: text, x, y and colour of each; call this when everything else is drawn.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # the layout is known now
    to_pixels, unit = axes.transData.transform, figure.dpi / 72
    drawn = [to_pixels(np.column_stack(line.get_data()).astype(float)) for line in axes.lines]
    drawn = [path for path in drawn if len(path)]
    drawn += [to_pixels(np.asarray(dots.get_offsets(), float)) for dots in axes.collections]
    hidden = [path[~np.isnan(path).any(1)] for path in drawn]
    steps = np.linspace(0, 1, 100)[:, None, None]
    obstacles = np.concatenate([(path[:-1] + steps * np.diff(path, axis=0)).reshape(-1, 2) for path in hidden] + hidden)
    frame, taken = axes.get_window_extent(), []
    directions = [(1, 1), (1, -1), (-1, 1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1)]
    sides = {1: ("left", "bottom"), -1: ("right", "top"), 0: ("center", "center")}
    for label in sorted(labels, key=lambda label: -len(label[0])):  # long ones have the fewest places
        text, x, y, color = label
        alike = [other for other in labels if other[3] == color]
        choices = []
        for distance in (5, 10, 16):
            for right, up in directions:
                alone = 1.4 if not (right and up) else 1.0  # straight to a side the marker is as near as at a corner
                written = axes.annotate(
                    text,
                    (x, y),
                    (right * distance * alone, up * distance * alone),
                    textcoords="offset points",
                    ha=sides[right][0],
                    va=sides[up][1],
                    fontsize=size,
                    color=color,
                )
                box = written.get_window_extent()
                over = (
                    (obstacles > (box.x0 - unit, box.y0 - unit)) & (obstacles < (box.x1 + unit, box.y1 + unit))
                ).all(1)
                outside = box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1
                centre = np.array([box.x0 + box.x1, box.y0 + box.y1]) / 2
                away = [float(np.linalg.norm(to_pixels(other[1:3]) - centre)) for other in alike]
                cost = (
                    over.sum()
                    + 100 * sum(other < away[alike.index(label)] for other in away)
                    + 1000 * sum(box.padded(3 * unit).overlaps(other) for other in taken)
                    + 1000 * outside
                    + distance / 100
                )
                choices.append((float(cost), len(choices), written, box))
        best = min(choices)
        taken.append(best[3])
        for choice in choices:
            if choice is not best:
                choice[2].remove()


def _whiskers(entry: Any) -> tuple[list[float], list[float]]:
    return [max(entry["value"] - entry["low"], 0)], [max(entry["high"] - entry["value"], 0)]


def _series(table: pd.DataFrame) -> dict[str, list[str]]:
    """Row ids by the name in the legend: all loops of one self-distillation share an entry."""
    series: dict[str, list[str]] = {}
    for row in dict.fromkeys(str(row) for row in table["row"]):
        label = short(str(table.loc[table["row"] == row, "label"].iloc[0]))
        series.setdefault(label.removesuffix(f"-{row.rpartition('_')[2]}") if isd_chain(row) else label, []).append(row)
    return series


def _plane_points(table: pd.DataFrame, rows: Sequence[str], metric: str) -> list[tuple[str, Any, Any]]:
    """Row id, clean entry and robust entry of each row that has both."""
    points: list[tuple[str, Any, Any]] = []
    for row in rows:
        part = table[table["row"] == row].set_index("metric")
        if {"clean", metric} <= set(part.index) and not part.loc[["clean", metric], "value"].isna().any():
            points.append((row, part.loc["clean"], part.loc[metric]))
    return points


def plot_plane(table: pd.DataFrame, robust: Sequence[str], title: str) -> Figure:
    """Robust against clean accuracy as in Figure 1: one panel per robust metric, one point per row with its 95 % cross.

    The loops of one self-distillation are joined by a line; the first and the last loop are numbered.
    """
    figure, panels = plt.subplots(
        1, len(robust), figsize=(4.2 * len(robust) + 2.6, 4.8), layout="constrained", sharey=True, squeeze=False
    )
    handles: dict[str, Any] = {}
    series = _series(table)
    # Rows without numbers come last, so that none takes the marker of a row that is drawn.
    chosen = sorted(series, key=lambda name: not any(_plane_points(table, series[name], metric) for metric in robust))
    styles = dict(zip(chosen, method_styles([series[name][-1] for name in chosen]), strict=True))
    for axes, metric in zip(panels[0], robust, strict=True):
        plain_axes(axes)
        for name, rows in series.items():
            style, points = styles[name], _plane_points(table, rows, metric)
            if not points:
                continue
            for _, x, y in points:
                cross = {"xerr": _whiskers(x), "yerr": _whiskers(y), "fmt": "none", "ecolor": style["color"]}
                axes.errorbar(x["value"], y["value"], elinewidth=0.9, alpha=0.35, **cross)
            xs, ys = [x["value"] for _, x, _ in points], [y["value"] for _, _, y in points]
            (handles[name],) = axes.plot(xs, ys, linewidth=1.2, zorder=3, **style)
            for end in (0, -1) if len(points) > 1 else ():  # the numbers of the others would overlap
                loop, beside = points[end][0].rpartition("_")[2], 1 if end == 0 else -2
                away = (7 if xs[end] >= xs[beside] else -7, 7 if ys[end] >= ys[beside] else -7)
                options = {"ha": "center", "va": "center", "fontsize": 8, "zorder": 4, "color": style["color"]}
                axes.annotate(loop, (xs[end], ys[end]), away, textcoords="offset points", **options)
        axes.set_xlabel("clean accuracy (%)")
        axes.set_title(metric_name(metric), fontsize=10)
    panels[0][0].set_ylabel("robust accuracy (%)")
    if any(len(rows) > 1 for rows in _series(table).values()):
        panels[0][0].annotate(
            "numbers: first and last loop", (0.02, 0.02), xycoords="axes fraction", fontsize=8, color="0.35"
        )
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8, frameon=False)
    figure.suptitle(title)
    return figure


def plot_dots(table: pd.DataFrame, metrics: Sequence[str], title: str, xlabel: str = "accuracy (%)") -> Figure:
    """One line per row, one dot with its 95 % interval per metric; a hollow diamond is the number in the paper."""
    rows = list(dict.fromkeys(table["row"]))
    figure, axes = one_panel(8.2, 1.25 + 0.24 * len(rows))
    axes.grid(visible=False, axis="y")
    handles: dict[str, Any] = {}
    paper: dict[str, Any] = {"marker": "D", "linestyle": "none", "markersize": 4.5, "markerfacecolor": "white"}
    labels = {row: str(table.loc[table["row"] == row, "label"].iloc[0]) for row in rows}
    measured = set(table.loc[table["metric"].isin(metrics) & table["value"].notna(), "row"])
    for position in range(0, len(rows), 2):
        axes.axhspan(position - 0.5, position + 0.5, color="0.96", zorder=0)
    for index, (metric, color) in enumerate(zip(metrics, metric_colors(metrics), strict=True)):
        part = table[table["metric"] == metric].set_index("row").reindex(rows)
        y = np.arange(len(rows)) + (index - (len(metrics) - 1) / 2) * 0.5 / len(metrics)  # intervals side by side
        axes.hlines(y, part["low"], part["high"], color=color, linewidth=1.2, alpha=0.5)
        (handles[metric_name(metric)],) = axes.plot(part["value"], y, "o", color=color, markersize=4.5)
        axes.plot(part["reported"], y, markeredgecolor=color, zorder=3, **paper)
    if table["reported"].notna().any():
        handles["paper (its own data and nets)"] = plt.Line2D([], [], markeredgecolor="0.3", **paper)
    axes.set_yticks(range(len(rows)), [labels[row] + ("" if row in measured else " (not run)") for row in rows])
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(xlabel)
    axes.set_title(title, loc="right", pad=6 + 14 * math.ceil(len(handles) / 4))
    above = {"loc": "lower right", "bbox_to_anchor": (1.01, 0.997), "ncols": 4, "columnspacing": 1.2}
    axes.legend(handles.values(), handles.keys(), fontsize=8, frameon=False, handletextpad=0.1, **above)
    return figure


def plot_loops(table: pd.DataFrame, series: dict[str, Sequence[str]], metrics: Sequence[str], title: str) -> Figure:
    """Accuracy per loop: one panel per metric, one line per series of row ids; dashed: the paper."""
    figure, panels = plt.subplots(
        1, len(metrics), figsize=(4.0 * len(metrics), 3.8), layout="constrained", squeeze=False
    )
    shown = table[table["metric"].isin(metrics) & table["row"].isin([row for rows in series.values() for row in rows])]
    ours = ", ours" if shown["reported"].notna().any() else ""
    for axes, metric in zip(panels[0], metrics, strict=True):
        plain_axes(axes)
        for index, (name, rows) in enumerate(series.items()):
            # The series are shifted sideways, because whiskers at the same place hide each other.
            shift = 0.06 * (index - (len(series) - 1) / 2)
            part = table[(table["metric"] == metric) & table["row"].isin(rows)].set_index("row")
            points: list[tuple[int, Any]] = [
                (loop, part.loc[row]) for loop, row in enumerate(rows) if row in part.index
            ]
            drawn = [(loop, entry) for loop, entry in points if not math.isnan(float(entry["value"]))]
            color = method_color(rows[-1], index)
            if drawn:
                errors = np.hstack([np.array(_whiskers(entry)) for _, entry in drawn])
                loops = [loop + shift for loop, _ in drawn]
                values = [entry["value"] for _, entry in drawn]
                style: dict[str, Any] = {"marker": "o", "color": color, "capsize": 2, "elinewidth": 0.9}
                axes.errorbar(loops, values, yerr=errors, label=f"{name}{ours}", **style)
            reports = [(loop, float(entry["reported"])) for loop, entry in points]
            paper = [(loop, number) for loop, number in reports if not math.isnan(number)]
            if paper:
                axes.plot(
                    *zip(*paper, strict=True), "--D", color=color, markersize=4, alpha=0.6, label=f"{name}, paper"
                )
        axes.set_xlabel("loop (0: standard training)")
        axes.set_ylabel(f"{metric_name(metric)} accuracy (%)")
        axes.xaxis.get_major_locator().set_params(integer=True)
    handles: dict[str, Any] = {}
    for axes in panels[0]:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle(title)
    return figure


def plot_epsilon(table: pd.DataFrame, attack: str, rows: Sequence[str], title: str) -> Figure:
    """Accuracy against ε, from the metrics ``attack@ε`` and from ``clean`` at ε = 0."""
    figure, axes = one_panel(7.6, 4.6)
    for index, row in enumerate(rows):
        part = table[table["row"] == row]
        points = [(0.0, entry) for _, entry in part[part["metric"] == "clean"].iterrows()]
        points += [
            (float(str(entry["metric"]).partition("@")[2]), entry)
            for _, entry in part[part["metric"].str.startswith(f"{attack}@")].iterrows()
        ]
        points = [(radius, entry) for radius, entry in points if not pd.isna(entry["value"])]
        if not points:
            continue
        errors = np.hstack([np.array(_whiskers(entry)) for _, entry in points])
        axes.errorbar(
            [radius for radius, _ in points],
            [entry["value"] for _, entry in points],
            yerr=errors,
            marker="o",
            capsize=2,
            color=PALETTE[index % len(PALETTE)],
            label=part["label"].iloc[0],
        )
    axes.set_xlabel("ε (ℓ∞ radius, pixels in [0, 1])")
    axes.set_ylabel(f"accuracy under {metric_name(attack)} (%)")
    axes.set_ylim(0, 101)
    axes.set_title(title)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def plot_bounds(table: pd.DataFrame, title: str) -> Figure:
    """Table 3 as a figure: the terms of Proposition 2's mean bound as stacked bars, and the mean measured gap.

    Where one bar is far longer than all others, a second panel enlarges the others.
    """
    rows = list(dict.fromkeys(table["row"][(table["metric"] == "bound") & table["value"].notna()]))
    total = np.array([value(table, row, "bound") for row in rows])
    longest = sorted(total)[-2:]
    enlarged = len(longest) == 2 and longest[1] > ENLARGED * longest[0]
    size = (10.4 if enlarged else 7.6, 1.6 + 0.42 * len(rows))
    figure, grid = plt.subplots(1, 1 + enlarged, figsize=size, layout="constrained", sharey=True, squeeze=False)
    parts = {
        "γ_s, student's LLM": ["llm_eps"],
        "γ_t, teacher's LLM": ["llm_eps_teacher"],
        "CE_s + CE_t": ["cross_entropy", "cross_entropy_teacher"],
    }
    lengths = {name: np.array([sum(value(table, row, m) for m in ms) for row in rows]) for name, ms in parts.items()}
    lengths["ε‖g_s − g_t‖₁"] = total - sum(lengths.values())
    gaps = [value(table, row, "gap") for row in rows]
    places = range(len(rows))
    for axes in grid[0]:
        plain_axes(axes)
        base = np.zeros(len(rows))
        for color, (name, length) in zip(PALETTE, lengths.items(), strict=False):
            axes.barh(places, length, 0.6, left=base, color=color, label=name)
            base += length
        axes.plot(gaps, places, "k|", markersize=16, markeredgewidth=2, label="measured gap")
        axes.set_xlabel("nats, mean over the test images")
    labels = [short(str(table[table["row"] == row]["label"].iloc[0])) for row in rows]
    grid[0, 0].set_yticks(places, labels, fontsize=9)
    grid[0, 0].invert_yaxis()
    if enlarged:
        grid[0, 1].set_xlim(0, 1.08 * longest[0])
        grid[0, 1].set_title("enlarged", fontsize=10)
    figure.suptitle(title)
    figure.legend(
        *grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9, frameon=False
    )
    return figure
