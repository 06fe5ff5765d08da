"""Tables and figures of the studies: what ``report`` draws of any table, these draw of single images and sweeps."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from kdiga_nb.artifacts import Experiment, Row
from kdiga_nb.audit import Found, Verdict
from kdiga_nb.report import COLUMNS, PALETTE, _axes, _plain_axes, _pretty, interval, short
from kdiga_nb.runs import measured, run_key, training_seconds
from kdiga_nb.studies import Effect

NAMES = {
    "pgd": "PGD, plain",
    "pgd_more": "PGD, five times the steps",
    "pgd_long": "PGD, long, with restarts",
    "margin": "margin loss",
    "dlr": "DLR loss",
    "targeted": "targeted, nine classes in turn",
    "scaled": "scaled logits",
    "noise": "random noise, best of 10",
    "hard_label": "RayS (labels only)",
    "square": "Square (scores only)",
    "autoattack": "AutoAttack",
    "clean": "clean",
}


def results(row: Row, metric: str) -> list[dict[str, Any]]:
    """What the store has behind one cell, a result a seed; a measure's lists are there too.

    Raises:
        KeyError: the row has no such metric.
    """
    for cell in row.cells:
        if cell.metric == metric:
            found = [measured(job.run, job.measure, reference=job.reference) for job in cell.jobs if job.measure]
            return [result for result in found if result is not None]
    raise KeyError(f"{row.id} has no metric {metric}")


def with_training_cost(table: pd.DataFrame, experiment: Experiment) -> pd.DataFrame:
    """The long table with a line ``training_seconds`` a row: wall-clock seconds of one training, mean over the seeds.

    Each training ran in one process; on a busy machine others beside it slow it down.
    """
    lines = []
    for row in experiment.rows:
        seconds = [s for run in row.runs if (s := training_seconds(run)) is not None]
        mean, low, high = interval(seconds) if seconds else (math.nan,) * 3
        names = {"row": row.id, "label": row.label, "metric": "training_seconds", "reported": math.nan}
        keys = " ".join(run_key(run) for run in row.runs)
        lines.append(names | {"value": mean, "low": low, "high": high, "n": 0, "seeds": len(seconds), "runs": keys})
    return pd.concat([table, pd.DataFrame(lines, columns=COLUMNS)], ignore_index=True)


# ---- the audit ----


def audit_table(found: Mapping[str, Found]) -> pd.DataFrame:
    """Accuracy left under each attack, a line an attack and a column a net; ``n`` is the number of images."""
    attacks = dict.fromkeys(name for one in found.values() for name, result in one.items() if "percent" in result)
    lines = []
    for attack in attacks:
        numbers = {net: f"{one[attack]['percent']:.1f}" for net, one in found.items() if attack in one}
        n = next(int(one[attack]["n"]) for one in found.values() if attack in one)
        lines.append({"": _named(attack), "n": n} | numbers)
    return pd.DataFrame(lines).fillna("–").set_index("")


def _named(attack: str) -> str:
    name, separator, factor = attack.partition("@")
    if separator:
        return f"PGD, step {factor} ε" if name == "step" else f"PGD, radius {factor} ε"
    return NAMES.get(attack, attack.replace("_", " "))


def verdict_table(verdicts: Mapping[str, Verdict]) -> pd.DataFrame:
    """A line a net: the word, the figures it rests on, and the names of the rules that rang."""
    lines = []
    for net, one in verdicts.items():
        rang = one.faults | one.masking | one.weakness
        figures = {"clean": f"{one.clean:.1f}", "plain PGD": f"{one.plain:.1f}", "all together": f"{one.worst:.1f}"}
        lines.append({"": net, "verdict": one.word} | figures | {"rules that rang": ", ".join(rang) or "none"})
    return pd.DataFrame(lines).set_index("")


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


# ---- the propositions ----


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


# ---- ablations ----


def effects_table(effects: Mapping[str, Sequence[Effect]]) -> pd.DataFrame:
    """A line a choice: its two levels and, for each metric, what the high one changes in points with its interval."""
    lines = []
    for index, effect in enumerate(next(iter(effects.values()))):
        line = {"": effect.factor.name, "from": effect.factor.low, "to": effect.factor.high}
        for metric, chosen in effects.items():
            one = chosen[index]
            line[metric] = f"{one.points:+.1f} [{one.low:+.1f}, {one.high:+.1f}]"
        lines.append(line)
    return pd.DataFrame(lines).set_index("")


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
