"""Figures of the artefacts, drawn with matplotlib and seaborn."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kdiga_nb.artifacts.recipes import isd_chain
from kdiga_nb.artifacts.studies import Effect
from kdiga_nb.artifacts.table import Experiment
from kdiga_nb.audit.verdict import Found
from kdiga_nb.report.numbers import _pretty, results, short, value

PALETTE = sns.color_palette("colorblind")


def _axes(width: float = 7.0, height: float = 4.6) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    _plain_axes(axes)
    return figure, axes


def _plain_axes(axes: Axes) -> None:
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _whiskers(entry: Any) -> tuple[list[float], list[float]]:
    return [max(entry["value"] - entry["low"], 0)], [max(entry["high"] - entry["value"], 0)]


def _series(table: pd.DataFrame) -> dict[str, list[str]]:
    """The rows of a table by what a reader follows: the loops of one self-distillation together, others alone."""
    series: dict[str, list[str]] = {}
    for row in dict.fromkeys(str(row) for row in table["row"]):
        label = short(str(table.loc[table["row"] == row, "label"].iloc[0]))
        series.setdefault(re.sub(r"-\d+$", "", label) if isd_chain(row) else label, []).append(row)
    return series


def _plane_points(table: pd.DataFrame, rows: Sequence[str], metric: str) -> list[tuple[str, Any, Any]]:
    """Row id, clean and robust entry of the rows that have both."""
    points: list[tuple[str, Any, Any]] = []
    for row in rows:
        part = table[table["row"] == row].set_index("metric")
        if {"clean", metric} <= set(part.index) and not part.loc[["clean", metric], "value"].isna().any():
            points.append((row, part.loc["clean"], part.loc[metric]))
    return points


def plot_plane(table: pd.DataFrame, robust: Sequence[str], title: str) -> Figure:
    """Clean against robust accuracy, a point a row with its 95 % cross, one panel a robust metric (Figure 1).

    The loops of a self-distillation are points on one line, the first and the last one numbered.
    """
    figure, panels = plt.subplots(
        1, len(robust), figsize=(4.2 * len(robust) + 2.6, 4.8), layout="constrained", sharey=True, squeeze=False
    )
    markers = "osD^vP*Xph<>8d"
    handles: dict[str, Any] = {}
    series = _series(table)
    for axes, metric in zip(panels[0], robust, strict=True):
        _plain_axes(axes)
        for index, (name, rows) in enumerate(series.items()):
            points = _plane_points(table, rows, metric)
            if not points:
                continue
            # Beyond the palette's length a colour comes back lighter, so that no two look the same.
            color = sns.light_palette(PALETTE[index % len(PALETTE)], 4)[3 - index // len(PALETTE)]
            for _, x, y in points:
                cross = {"xerr": _whiskers(x), "yerr": _whiskers(y), "fmt": "none", "ecolor": color}
                axes.errorbar(x["value"], y["value"], elinewidth=0.9, alpha=0.35, **cross)
            xs, ys = [x["value"] for _, x, _ in points], [y["value"] for _, _, y in points]
            (handles[name],) = axes.plot(
                xs, ys, marker=markers[index % len(markers)], color=color, markersize=7, linewidth=1.2, zorder=3
            )
            for end in (0, -1) if len(points) > 1 else ():  # in between they would overlap
                loop = points[end][0].rpartition("_")[2]
                axes.annotate(loop, (xs[end], ys[end]), (5, 4), textcoords="offset points", fontsize=8, zorder=4)
        axes.set_xlabel("clean accuracy (%)")
        axes.set_title(f"{_pretty(metric)}", fontsize=10)
    panels[0][0].set_ylabel("robust accuracy (%)")
    if any(len(rows) > 1 for rows in _series(table).values()):
        panels[0][0].annotate(
            "numbers: first and last loop", (0.02, 0.02), xycoords="axes fraction", fontsize=8, color="0.35"
        )
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8, frameon=False)
    figure.suptitle(title)
    return figure


def plot_bars(table: pd.DataFrame, metrics: Sequence[str], title: str, ylabel: str = "accuracy (%)") -> Figure:
    """Horizontal bars with 95 % whiskers, a group a row, a colour a metric; the paper's number as a hollow diamond."""
    rows = [row for row in dict.fromkeys(table["row"])]
    figure, axes = _axes(8.2, 0.9 + 0.2 * len(metrics) * len(rows) + 0.12 * len(rows))
    step = 0.8 / len(metrics)
    labels = []
    for position, row in enumerate(rows):
        part = table[table["row"] == row].set_index("metric")
        label = str(part["label"].iloc[0])
        ran = False
        for offset, metric in enumerate(metrics):
            if metric not in part.index:
                continue
            entry, y = part.loc[metric], position + (offset - (len(metrics) - 1) / 2) * step
            if not pd.isna(entry["value"]):
                ran = True
                error = None if pd.isna(entry["low"]) else np.array(_whiskers(entry))
                axes.barh(y, entry["value"], step * 0.92, color=PALETTE[offset], xerr=error, error_kw={"lw": 0.8})
            if not pd.isna(entry["reported"]):
                axes.plot(entry["reported"], y, "D", markersize=4, markerfacecolor="white", markeredgecolor="black")
        labels.append(label if ran else f"{label} (not run)")
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(ylabel)
    axes.set_title(title)
    handles: list[Any] = [plt.Rectangle((0, 0), 1, 1, color=PALETTE[i]) for i in range(len(metrics))]
    names = [_pretty(metric) for metric in metrics]
    if table["reported"].notna().any():
        handles.append(plt.Line2D([], [], marker="D", color="white", markeredgecolor="black", markersize=5))
        names.append("reported by the paper (its own data and nets)")
    axes.legend(handles, names, fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.4, -0.06), ncols=2)
    return figure


def plot_loops(table: pd.DataFrame, series: dict[str, Sequence[str]], metrics: Sequence[str], title: str) -> Figure:
    """Accuracy loop by loop: one panel a metric, one line a series of row ids; dashed where the paper reports it."""
    figure, panels = plt.subplots(
        1, len(metrics), figsize=(4.0 * len(metrics), 3.8), layout="constrained", squeeze=False
    )
    shown = table[table["metric"].isin(metrics) & table["row"].isin([row for rows in series.values() for row in rows])]
    ours = ", ours" if shown["reported"].notna().any() else ""
    for axes, metric in zip(panels[0], metrics, strict=True):
        _plain_axes(axes)
        for index, (name, rows) in enumerate(series.items()):
            # Side by side: on one spot the whiskers of several lines hide each other.
            shift = 0.06 * (index - (len(series) - 1) / 2)
            part = table[(table["metric"] == metric) & table["row"].isin(rows)].set_index("row")
            points: list[tuple[int, Any]] = [
                (loop, part.loc[row]) for loop, row in enumerate(rows) if row in part.index
            ]
            drawn = [(loop, entry) for loop, entry in points if not math.isnan(float(entry["value"]))]
            color = PALETTE[index]
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
        axes.set_ylabel(f"{_pretty(metric)} accuracy (%)")
        axes.xaxis.get_major_locator().set_params(integer=True)
    handles: dict[str, Any] = {}
    for axes in panels[0]:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle(title)
    return figure


def plot_epsilon(table: pd.DataFrame, attack: str, rows: Sequence[str], title: str) -> Figure:
    """Robust accuracy against ε for the metrics ``attack@ε``, with ``clean`` at ε = 0."""
    figure, axes = _axes(7.6, 4.6)
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
    axes.set_xlabel("radius ε of the ℓ∞ ball (pixels in [0, 1])")
    axes.set_ylabel(f"accuracy under {_pretty(attack)} (%)")
    axes.set_ylim(0, 101)
    axes.set_title(title)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def plot_bounds(table: pd.DataFrame, title: str) -> Figure:
    """Table 3 as a picture: the mean bound of Proposition 2 as stacked terms, against the mean measured gap."""
    figure, axes = _axes(7.6, 4.4)
    rows = list(dict.fromkeys(table["row"]))
    parts = {
        "γ_s, student's LLM": lambda row: value(table, row, "llm_eps"),
        "γ_t, teacher's LLM": lambda row: value(table, row, "llm_eps_teacher"),
        "CE_s + CE_t": lambda row: value(table, row, "cross_entropy") + value(table, row, "cross_entropy_teacher"),
    }
    base = np.zeros(len(rows))
    for index, (name, term) in enumerate(parts.items()):
        heights = np.array([term(row) for row in rows])
        axes.bar(range(len(rows)), heights, 0.6, bottom=base, color=PALETTE[index], label=name)
        base += heights
    total = np.array([value(table, row, "bound") for row in rows])
    axes.bar(range(len(rows)), total - base, 0.6, bottom=base, color=PALETTE[3], label="ε‖g_s − g_t‖₁")
    gaps = [value(table, row, "gap") for row in rows]
    axes.plot(range(len(rows)), gaps, "k_", markersize=26, markeredgewidth=2, label="measured gap")
    labels = [short(str(table[table["row"] == row]["label"].iloc[0])) for row in rows]
    axes.set_xticks(range(len(rows)), labels, fontsize=8)
    axes.set_ylabel("nats, mean over the test images")
    axes.set_title(title)
    axes.legend(fontsize=8, frameon=False)
    return figure


def plot_audit(found: Mapping[str, Found], title: str) -> Figure:
    """Accuracy against the radius and against the step size, the loss against the steps; a line a net."""
    figure, panels = plt.subplots(1, 3, figsize=(12.0, 4.2), layout="constrained")
    for index, (net, one) in enumerate(found.items()):
        style: dict[str, Any] = {"color": PALETTE[index], "marker": "o", "markersize": 4}
        label = short(net)
        radii = [*_sweep(one, "pgd@"), (0.0, one["clean"]["percent"]), (1.0, one["pgd"]["percent"])]
        panels[0].plot(*zip(*sorted(radii), strict=True), label=label, **style)
        panels[1].plot(*zip(*_sweep(one, "step@"), strict=True), **style)
        panels[2].plot(one["gradients"]["steps"], one["gradients"]["loss"], **style)
    for axes, words in zip(panels, ("radius in multiples of ε", "step size in multiples of ε", "steps"), strict=True):
        _plain_axes(axes)
        axes.set_xlabel(words)
    panels[0].set_ylabel("accuracy under PGD (%)")
    panels[1].set_ylabel("accuracy under PGD (%)")
    panels[1].set_xscale("log")
    panels[1].set_xticks([0.02, 0.05, 0.1, 0.2, 0.5], ["0.02", "0.05", "0.1", "0.2", "0.5"])
    panels[1].minorticks_off()
    panels[2].set_xscale("symlog", linthresh=1)
    panels[2].set_xticks([0, 1, 10, 100], ["0", "1", "10", "100"])
    panels[2].set_ylabel("mean cross-entropy (nats)")
    figure.legend(loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    figure.suptitle(title)
    return figure


def _sweep(one: Found, prefix: str) -> list[tuple[float, float]]:
    chosen = [name for name in one if name.startswith(prefix)]
    return sorted((float(name.removeprefix(prefix)), float(one[name]["percent"])) for name in chosen)


def plot_surfaces(found: Mapping[str, Found], title: str) -> Figure:
    """The cross-entropy round one image, out to 2ε along the gradient's signs and a random direction; a panel a net."""
    figure, panels = plt.subplots(
        1, len(found), figsize=(2.5 * len(found) + 0.8, 3.0), layout="constrained", squeeze=False
    )
    highest = max(np.max(one["gradients"]["surface"]) for one in found.values())
    image: Any = None
    for axes, (net, one) in zip(panels[0], found.items(), strict=True):
        surface, radius = np.array(one["gradients"]["surface"]), one["gradients"]["surface_radius"]
        reach, half = (-radius, radius, -radius, radius), radius / 2
        image = axes.imshow(surface.T, extent=reach, origin="lower", cmap="viridis", vmin=0, vmax=highest)
        axes.add_patch(plt.Rectangle((-half, -half), radius, radius, fill=False, edgecolor="white", linestyle="--"))
        axes.set_title(short(net), fontsize=9)
        axes.set_xlabel("along sign(g)")
    panels[0][0].set_ylabel("along random signs")
    figure.colorbar(image, ax=panels[0], label="nats", pad=0.01)
    figure.suptitle(title)
    return figure


def plot_radii(experiment: Experiment, names: Sequence[str], title: str) -> Figure:
    """Certified radius of the student against its teacher's, a dot an image and seed; below the diagonal it shrank."""
    figure, panels = plt.subplots(1, len(names), figsize=(4.1 * len(names), 4.4), layout="constrained", sharey=True)
    for index, (axes, name) in enumerate(zip(np.atleast_1d(panels), names, strict=True)):
        found = results(experiment.row(name), "radius_crown")
        teacher = [radius for result in found for radius in result["teacher_radii"]]
        student = [radius for result in found for radius in result["radii"]]
        limit = 1.05 * max([*teacher, *student, 1e-3])
        axes.plot([0, limit], [0, limit], color="black", linewidth=0.8)
        axes.scatter(teacher, student, s=8, alpha=0.35, color=PALETTE[index], linewidths=0)
        kept = 100 * float(np.mean(np.array(student) >= np.array(teacher)))
        axes.set_title(f"{short(experiment.row(name).label)}\n{kept:.0f} % at or above the teacher", fontsize=9)
        axes.set_xlabel("teacher's certified radius")
        _plain_axes(axes)
    np.atleast_1d(panels)[0].set_ylabel("student's certified radius (pixels in [0, 1])")
    figure.suptitle(title)
    return figure


def plot_tightness(experiment: Experiment, title: str) -> Figure:
    """Measured gap against three forms of Proposition 2's bound, a dot an image; above the diagonal it is violated."""
    forms = {
        "bound": "dual norm, CE_s + CE_t",
        "bound_tight": "dual norm, |CE_s − CE_t|",
        "bound_l2": "ℓ2 norm, as Table 3 prints it",
    }
    figure, panels = plt.subplots(1, 3, figsize=(12.0, 4.6), layout="constrained", sharey=True)
    for axes, (form, words) in zip(panels, forms.items(), strict=True):
        broken, total = 0, 0
        for index, row in enumerate(experiment.rows):
            (images,) = [result["images"] for result in results(row, "gap")]
            gap, bound = np.array(images["gap"]), np.array(images[form])
            broken, total = broken + int((gap > bound).sum()), total + len(gap)
            axes.scatter(bound, gap, s=7, alpha=0.4, color=PALETTE[index], linewidths=0, label=short(row.label))
        axes.axline((1, 1), (10, 10), color="black", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel="bound (nats)")
        axes.set_title(f"{words}\n{broken} of {total} images above the diagonal", fontsize=9)
        _plain_axes(axes)
    panels[0].set_ylabel("measured gap (nats)")
    handles, labels = panels[0].get_legend_handles_labels()
    legend = figure.legend(
        handles, labels, loc="outside lower center", ncols=4, fontsize=9, frameon=False, markerscale=2
    )
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1)
    figure.suptitle(title)
    return figure


def plot_effects(effects: Mapping[str, Sequence[Effect]], title: str) -> Figure:
    """Main effects with their 95 % intervals, a line a choice, a colour a metric; an interval off zero is an effect."""
    first = next(iter(effects.values()))
    figure, axes = _axes(8.6, 1.2 + 0.5 * len(first))
    step = 0.6 / len(effects)
    for index, (metric, chosen) in enumerate(effects.items()):
        places = np.arange(len(chosen)) + (index - (len(effects) - 1) / 2) * step
        points = np.array([effect.points for effect in chosen])
        error = np.array([[effect.points - effect.low, effect.high - effect.points] for effect in chosen]).T
        axes.errorbar(points, places, xerr=error, fmt="o", capsize=3, color=PALETTE[index], label=_pretty(metric))
    axes.axvline(0, color="black", linewidth=0.8)
    words = [f"{effect.factor.name}: {effect.factor.low} → {effect.factor.high}" for effect in first]
    axes.set_yticks(range(len(first)), words, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("change of accuracy (points)")
    axes.set_title(title)
    axes.legend(fontsize=9, frameon=False)
    return figure
