"""Figures of the studies: robustness audit, certified radii, tightness of Proposition 2, main effects."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kdiga_nb.artifacts.recipes import isd_row
from kdiga_nb.artifacts.reported import TABLE1
from kdiga_nb.artifacts.studies import (
    SINGLE,
    TAUGHT,
    WEIGHTED,
    Effect,
    combination_row,
    isd_factors,
    loop_rows,
    nearest_row,
    taught_row,
    weighted_row,
    weights_of,
)
from kdiga_nb.artifacts.table import Experiment
from kdiga_nb.audit.verdict import Found, sweep
from kdiga_nb.params import AlignmentParams, IsdSearchParams
from kdiga_nb.report.colors import label_color, method_color, method_styles, metric_color
from kdiga_nb.report.figures import label_points, one_panel, plain_axes
from kdiga_nb.report.names import metric_name
from kdiga_nb.report.numbers import results, short, values

CHANCE = 10.0  # per cent, of the ten classes of digits and CIFAR-10


def plot_audit(audits: Mapping[str, Found], title: str) -> Figure:
    """Accuracy against radius and against step size, and loss against steps; one line per net."""
    figure, panels = plt.subplots(1, 3, figsize=(12.0, 4.2), layout="constrained")
    for index, (net, audit) in enumerate(audits.items()):
        style: dict[str, Any] = {"color": label_color(short(net), index), "marker": "o", "markersize": 4}
        label = short(net)
        radii = [*sweep(audit, "pgd@"), (0.0, audit["clean"]["percent"]), (1.0, audit["pgd"]["percent"])]
        panels[0].plot(*zip(*sorted(radii), strict=True), label=label, **style)
        panels[1].plot(*zip(*sweep(audit, "step@"), strict=True), **style)
        panels[2].plot(audit["gradients"]["steps"], audit["gradients"]["loss"], **style)
    for axes, label in zip(panels, ("radius / ε", "step size / ε", "steps"), strict=True):
        plain_axes(axes)
        axes.set_xlabel(label)
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


def plot_surfaces(audits: Mapping[str, Found], title: str) -> Figure:
    """Cross-entropy around one image, up to 2ε along the gradient's signs and along random signs; one panel per net."""
    figure, panels = plt.subplots(
        1, len(audits), figsize=(2.5 * len(audits) + 0.8, 3.0), layout="constrained", squeeze=False
    )
    highest = max(np.max(audit["gradients"]["surface"]) for audit in audits.values())
    image: Any = None
    for axes, (net, audit) in zip(panels[0], audits.items(), strict=True):
        surface, radius = np.array(audit["gradients"]["surface"]), audit["gradients"]["surface_radius"]
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
    """Certified radius of the student against that of its teacher; one dot per image and seed."""
    figure, panels = plt.subplots(1, len(names), figsize=(4.1 * len(names), 4.4), layout="constrained", sharey=True)
    for index, (axes, name) in enumerate(zip(np.atleast_1d(panels), names, strict=True)):
        certified = results(experiment.row(name), "radius_crown")
        teacher = [radius for result in certified for radius in result["teacher_radii"]]
        student = [radius for result in certified for radius in result["radii"]]
        limit = 1.05 * max([*teacher, *student, 1e-3])
        axes.plot([0, limit], [0, limit], color="black", linewidth=0.8)
        # One dot per image: as pixels, thousands of them do not make the SVG large.
        color = method_color(name, index)
        axes.scatter(teacher, student, s=8, alpha=0.35, color=color, linewidths=0, rasterized=True)
        kept = 100 * float(np.mean(np.array(student) >= np.array(teacher)))
        axes.set_title(f"{short(experiment.row(name).label)}\n{kept:.0f} % at or above the teacher", fontsize=9)
        axes.set_xlabel("teacher's certified radius")
        plain_axes(axes)
    np.atleast_1d(panels)[0].set_ylabel("student's certified radius (pixels in [0, 1])")
    figure.suptitle(title)
    return figure


def plot_tightness(experiment: Experiment, title: str) -> Figure:
    """Measured gap against three forms of Proposition 2's bound; one dot per image, violations above the diagonal."""
    forms = {
        "bound": "dual norm, CE_s + CE_t",
        "bound_tight": "dual norm, |CE_s − CE_t|",
        "bound_l2": "ℓ2 norm, as Table 3 prints it",
    }
    figure, panels = plt.subplots(1, 3, figsize=(12.0, 4.6), layout="constrained", sharey=True)
    for axes, (form, name) in zip(panels, forms.items(), strict=True):
        broken, total = 0, 0
        for index, row in enumerate(experiment.rows):
            style: dict[str, Any] = {"color": method_color(row.id, index), "label": short(row.label)}
            for images in [result["images"] for result in results(row, "gap")]:
                gap, bound = np.array(images["gap"]), np.array(images[form])
                broken, total = broken + int((gap > bound).sum()), total + len(gap)
                axes.scatter(bound, gap, s=7, alpha=0.4, linewidths=0, rasterized=True, **style)
        axes.axline((1, 1), (10, 10), color="black", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel="bound (nats)")
        axes.set_title(f"{name}\n{broken} of {total} images above the diagonal", fontsize=9)
        plain_axes(axes)
    panels[0].set_ylabel("measured gap (nats)")
    handles, labels = panels[0].get_legend_handles_labels()
    legend = figure.legend(
        handles, labels, loc="outside lower center", ncols=6, fontsize=9, frameon=False, markerscale=2
    )
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1)
    figure.suptitle(title)
    return figure


def plot_effects(effects: Mapping[str, Sequence[Effect]], title: str) -> Figure:
    """Main effects with 95 % intervals: one line per choice, one colour per metric."""
    first = next(iter(effects.values()))
    figure, axes = one_panel(8.6, 1.2 + 0.5 * len(first))
    step = 0.6 / len(effects)
    for index, (metric, levels) in enumerate(effects.items()):
        places = np.arange(len(levels)) + (index - (len(effects) - 1) / 2) * step
        points = np.array([effect.points for effect in levels])
        error = np.array([[effect.points - effect.low, effect.high - effect.points] for effect in levels]).T
        axes.errorbar(
            points, places, xerr=error, fmt="o", capsize=3, color=metric_color(metric), label=metric_name(metric)
        )
    axes.axvline(0, color="black", linewidth=0.8)
    choices = [f"{effect.factor.name}: {effect.factor.low} → {effect.factor.high}" for effect in first]
    axes.set_yticks(range(len(first)), choices, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("change of accuracy (percentage points)")
    axes.set_title(title)
    axes.legend(fontsize=9, frameon=False)
    return figure


def plot_weights(table: pd.DataFrame, params: AlignmentParams, robust: str, title: str) -> Figure:
    """Robust against clean accuracy of every kind of ``WEIGHTED``: one line per kind, one point per weight λ.

    A kind whose line lies above another's is more robust at the same clean accuracy, whatever the weights. A dashed
    line joins the loops of ISD-WoT at Table 1's weight. Nets at chance are not drawn; the figure says how many.
    """
    numbers = values(table)

    def point(row: str) -> tuple[float, float]:
        clean = numbers[row, "clean"]
        return (clean, numbers[row, robust]) if clean > 2 * CHANCE else (math.nan, math.nan)

    figure, axes = one_panel(10.2, 4.8)
    axes.margins(y=0.12)  # the most robust nets crowd the upper edge: room for their labels
    labels: list[tuple[str, float, float, Any]] = []
    drawn = (*WEIGHTED, *SINGLE)
    styles = dict(zip(drawn, method_styles(drawn), strict=True))
    for kind, (label, _) in WEIGHTED.items():
        points = {weight: point(weighted_row(kind, weight)) for weight in weights_of(params, kind)}
        points = {weight: at for weight, at in points.items() if not np.isnan(at).any()}
        if points:
            axes.plot(*zip(*points.values(), strict=True), label=label, linewidth=1.2, **styles[kind])
        labels += [(f"{weight:g}", *at, styles[kind]["color"]) for weight, at in points.items()]
    loops = [at for at in map(point, loop_rows(params)) if not np.isnan(at).any()]
    if len(loops) > 1:
        style = {"color": method_color("isd_wot"), "marker": ".", "linestyle": "--", "linewidth": 1}
        axes.plot(*zip(*loops, strict=True), label=f"ISD-WoT, loops 1 to {len(loops)}", **style)
    for row, words in SINGLE.items():
        if not np.isnan(at := point(row)).any():
            axes.plot(*at, label=words, **{**styles[row], "linestyle": "none"})
    _note_collapsed(axes, [accuracy for (_, metric), accuracy in numbers.items() if metric == "clean"])
    axes.set_xlabel("clean accuracy (%)")
    axes.set_ylabel(f"accuracy under {metric_name(robust)} (%)")
    axes.set_title(title)
    figure.legend(
        loc="outside right center", fontsize=9, frameon=False, title="numbers: the weight λ", title_fontsize=9
    )
    label_points(axes, labels)
    return figure


def plot_teachers(table: pd.DataFrame, params: AlignmentParams, robust: str, title: str) -> Figure:
    """Robust accuracy of the students, with 95 % intervals, by how robust their teacher was trained to be.

    The last teacher is the study's own, under TRADES; its students are those at the weight closest to ``lambda_iga``.
    """
    trades = {kind: nearest_row(kind, params) for kind in TAUGHT} | {"kd": "kd", "teacher": "trades_teacher"}
    kinds = {"teacher": "the teacher", "kd": "KD", "kdiga_zero": WEIGHTED["kdiga_zero"][0], "kdiga": "KDIGA"}
    found = table[table["metric"] == robust].set_index("row")
    figure, axes = one_panel(9.4, 4.4)
    for index, (kind, label) in enumerate(kinds.items()):
        rows = [*(taught_row(kind, radius) for radius in params.teacher_radii), trades[kind]]
        middle, low, high = (found.loc[rows, key].to_numpy(float) for key in ("value", "low", "high"))
        places = np.arange(len(rows)) + 0.06 * (index - 1.5)
        color = "0.45" if kind == "teacher" else method_color(kind, index)
        error = np.maximum(np.array([middle - low, high - middle]), 0)
        axes.errorbar(places, middle, yerr=error, fmt="so^D"[index] + "-", capsize=3, color=color, label=label)
    names = ["standard training" if radius == 0 else f"AT, ε = {radius:g}" for radius in params.teacher_radii]
    axes.set_xticks(range(len(names) + 1), [*names, f"TRADES, ε = {params.train_epsilon:g}"])
    axes.margins(x=0.12)
    axes.set_xlabel("training of the teacher")
    axes.set_ylabel(f"accuracy under {metric_name(robust)} (%)")
    axes.set_title(title)
    figure.legend(fontsize=9, frameon=False, loc="outside right center")
    return figure


def _note_collapsed(axes: Axes, accuracies: Sequence[float]) -> None:
    """Say in the corner how many nets are at chance, and so not drawn."""
    if collapsed := sum(accuracy <= 2 * CHANCE for accuracy in accuracies):
        said = f"not shown: {collapsed} net{'s' * (collapsed > 1)} at chance ({CHANCE:g} %)"
        axes.text(0.01, 0.015, said, transform=axes.transAxes, fontsize=9, color="0.4")


def weight_labels(points: Mapping[float, tuple[float, float]]) -> list[tuple[str, float, float]]:
    """Label, x and y by weight; weights in a row within 3 points of their first share one label: "0.01 to 300"."""
    places: list[tuple[list[float], tuple[float, float]]] = []
    for weight, point in sorted(points.items()):
        if places and math.dist(point, places[-1][1]) <= 3:
            places[-1][0].append(weight)
        elif not math.isnan(sum(point)):
            places.append(([weight], point))
    return [(" to ".join(f"{end:g}" for end in sorted({shared[0], shared[-1]})), *at) for shared, at in places]


def plot_search(experiment: Experiment, table: pd.DataFrame, title: str) -> Figure:
    """Robust against clean accuracy of every net of the search for ISD: what no setting reaches stays empty.

    Dots are combinations of the factorial (hollow: fresh students), the line is the grid of weights, thin lines follow
    the finalists loop by loop; where the data are CIFAR-10, the paper's loops are drawn as well.
    """
    params = experiment.params
    assert isinstance(params, IsdSearchParams)
    robust, numbers = f"pgd{params.pgd_steps}", values(table)
    figure, axes = one_panel(10.2, 5.2)
    color = method_color("isd_wot")

    def points(rows: Sequence[str]) -> tuple[list[float], list[float]]:
        found = [(numbers[row, "clean"], numbers[row, robust]) for row in rows]
        found = [point for point in found if point[0] > 2 * CHANCE and not np.isnan(point).any()]
        return [x for x, _ in found], [y for _, y in found]

    def draw(rows: Sequence[str], style: str, **more: Any) -> None:
        xs, ys = points(rows)
        if xs:  # what is not measured needs no line in the legend
            axes.plot(xs, ys, style, **more)

    init = next(factor for factor in isd_factors(params) if factor.name == "init")
    for level, face in ((-1, color), (1, "none")):
        rows = [combination_row(number) for number in range(1, 17) if init.signs[number - 1] == level]
        label = f"{len(rows)} settings, student {init.high if level > 0 else init.low}"
        axes.scatter(*points(rows), s=42, facecolors=face, edgecolors=color, label=label, zorder=3)
    for index, number in enumerate(params.finalists):
        rows = [combination_row(number, loop) for loop in range(1, params.loops + 1)]
        drawn = len(points(rows)[0])
        if drawn > 1:
            style = ("-", "--", ":")[index % 3]
            draw(rows, style, color=color, linewidth=1.2, label=f"setting {number}, {drawn} loops")
    sweep = [weighted_row("isd_wot_1", weight) for weight in params.weights]
    draw(sweep, "v-", color="#4b0082", markersize=5, linewidth=1, zorder=4, label="one loop over λ (numbers)")
    at = {
        weight: (numbers[row, "clean"], numbers[row, robust]) for weight, row in zip(params.weights, sweep, strict=True)
    }
    labels = [(*label, "#4b0082") for label in weight_labels(at)]
    controls = {"isd_wot_1_zero": "X", "isd_wot_1_shuffled": "P", "self_kd": "s", "self_st": "D"}
    for row, marker in controls.items():
        label = short(experiment.row(row).label)
        draw([row], marker, color=method_color(row), markersize=8, label=label, linestyle="none")
    draw(["st"], "*", color=method_color("st"), markersize=12, label="loop 0 (ST)", linestyle="none")
    if params.dataset == "cifar10":
        paper = [TABLE1[isd_row("isd_wot", loop)] for loop in range(1, 7)]
        points_of_paper = zip(*((row["clean"], row["pgd20"]) for row in paper), strict=True)
        axes.plot(*points_of_paper, "o-", color="0.55", markersize=4, label="the paper's loops 1 to 6")
    _note_collapsed(axes, [accuracy for (_, metric), accuracy in numbers.items() if metric == "clean"])
    axes.set_xlabel("clean accuracy (%)")
    axes.set_ylabel(f"accuracy under {metric_name(robust)} (%)")
    axes.set_title(title)
    figure.legend(loc="outside right center", fontsize=9, frameon=False)
    label_points(axes, labels)
    return figure
