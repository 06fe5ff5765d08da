"""Experiment -> DataFrame -> CSV, figure, provenance; ours beside the paper's.

How a number and its interval come about (``INTERVAL`` says it in the notebooks too): the value is the mean over the
seeds. The 95 % interval of an accuracy adds two independent sources of error in quadrature: Student's t over the seeds,
for training, and Wilson's score interval of the mean at n images, for the finite test set that all seeds share. With
one seed only the second is there. Other metrics have the Student part alone.
"""

import json
import math
import platform
import re
import subprocess
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import matplotlib

if not matplotlib.get_backend().lower().startswith(("module://", "inline")):
    matplotlib.use("Agg", force=False)

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import t as student_t
from tqdm.auto import tqdm

from kdiga_nb import paths
from kdiga_nb.artifacts import Cell, Experiment, Row
from kdiga_nb.metrics import proportion
from kdiga_nb.runs import Outcome, ancestors, environment, measured, run_all, run_key, training_seconds

COLUMNS = ["row", "label", "metric", "value", "low", "high", "n", "seeds", "reported", "runs"]
INTERVAL = (
    "value: mean over the seeds. low, high: 95 % interval; for accuracies Student's t over the seeds and Wilson's "
    "score interval over the n test images, added in quadrature; for other metrics Student's t alone."
)
PALETTE = sns.color_palette("colorblind")


class ReproductionError(RuntimeError):
    """Some jobs of an experiment failed; the message lists them."""


def reproduce(experiment: Experiment, *, workers: int | None = None) -> Outcome:
    """Train and measure what the store lacks, with a progress bar, over ``workers`` processes (default: one a core).

    Raises:
        ReproductionError: a job failed; everything that could be finished is in the store.
    """
    jobs = experiment.jobs()
    cached = all(job.is_done() for job in jobs)
    with tqdm(total=len(jobs), desc=experiment.name, unit="job", leave=False, disable=cached) as bar:

        def progress(done: int, total: int, title: str) -> None:
            bar.total = total
            bar.n = done
            bar.set_postfix_str(title)

        outcome = run_all(jobs, workers=workers, device=experiment.params.device, progress=progress)
    if outcome.failed:
        raise ReproductionError("; ".join(outcome.causes))
    return outcome


# ---- numbers ----


def interval(values: Sequence[float], n: int | None = None) -> tuple[float, float, float]:
    """Mean and 95 % interval of one value a seed; ``n`` is the number of test images if the values are accuracies in %.

    See the module's docstring for how the two parts are combined.
    """
    mean = float(np.mean(values))
    seeds = 0.0
    if len(values) > 1:
        seeds = float(student_t.ppf(0.975, len(values) - 1)) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    if n is None:
        return (mean, mean - seeds, mean + seeds) if len(values) > 1 else (mean, math.nan, math.nan)
    images = proportion(round(mean / 100 * n), n)
    below, above = max(images.percent - images.low, 0.0), max(images.high - images.percent, 0.0)
    return mean, max(0.0, mean - math.hypot(seeds, below)), min(100.0, mean + math.hypot(seeds, above))


def frame(experiment: Experiment) -> pd.DataFrame:
    """The long table of an experiment, columns ``COLUMNS``: what the store has of it, beside the paper's numbers.

    What was not run has no value; ``runs`` lists the keys a number rests on, separated by spaces.
    """
    lines = []
    for row in experiment.rows:
        metrics = {cell.metric for cell in row.cells}
        lines += [_line(row, cell) for cell in row.cells]
        for metric, value in row.reported.items():
            if metric not in metrics:
                lines.append(_empty(row, metric) | {"reported": value})
        if row.weights is not None:
            keys = " ".join(run_key(run) for run in row.runs)
            for metric, value in zip(("lambda_iga", "lambda_iga_effective"), row.weights, strict=True):
                lines.append(_empty(row, metric) | {"value": value, "seeds": len(row.runs), "runs": keys})
    return pd.DataFrame(lines, columns=COLUMNS)


def _empty(row: Row, metric: str) -> dict[str, Any]:
    empty = dict.fromkeys(COLUMNS, math.nan)
    return empty | {"row": row.id, "label": row.label, "metric": metric, "n": 0, "seeds": 0, "runs": ""}


def _line(row: Row, cell: Cell) -> dict[str, Any]:
    line = _empty(row, cell.metric) | {"reported": row.reported.get(cell.metric, math.nan)}
    found = [measured(job.run, job.measure, reference=job.reference) for job in cell.jobs if job.measure]
    results = [result for result in found if result is not None]
    if not results or len(results) < len(found):
        return line
    n = int(results[0]["n"])
    value, low, high = interval([float(result[cell.key]) for result in results], n if cell.is_accuracy else None)
    keys = " ".join(run_key(job.run) for job in cell.jobs)
    return line | {"value": value, "low": low, "high": high, "n": n, "seeds": len(results), "runs": keys}


def value(table: pd.DataFrame, row: str, metric: str) -> float:
    """One number of a long table; NaN if it was not measured."""
    found = table.loc[(table["row"] == row) & (table["metric"] == metric), "value"]
    return float(found.iloc[0]) if len(found) else math.nan


def values(table: pd.DataFrame) -> Mapping[tuple[str, str], float]:
    """The numbers of a long table by (row, metric); NaN for what was not measured, which bears out no claim."""
    found: defaultdict[tuple[str, str], float] = defaultdict(lambda: math.nan)
    for row, metric, number in zip(table["row"], table["metric"], table["value"], strict=True):
        found[str(row), str(metric)] = float(number)
    return found


def best(table: pd.DataFrame, rows: Sequence[str], metric: str) -> str:
    """The row of highest value among ``rows``."""
    return max(rows, key=lambda row: value(table, row, metric))


def claim(text: str, holds: bool) -> None:
    """Print a claim and whether the numbers bear it out: what the notebooks' tests compare."""
    print(f"{'holds' if holds else 'does not hold'}: {text}")


def flags(experiment: Experiment) -> pd.DataFrame:
    """What AutoAttack found suspicious, and the accuracy left after each of its members: one line an evaluation."""
    lines = []
    for row in experiment.rows:
        for cell in row.cells:
            for job in cell.jobs:
                result = measured(job.run, job.measure, reference=job.reference) if job.measure else None
                if result is not None and "members" in result:
                    members = {name: f"{percent:.1f}" for name, percent in result["members"].items()}
                    warned = "; ".join(result["flags"]) or "none"
                    lines.append(
                        {"row": row.id, "metric": cell.metric, "seed": getattr(job.run, "seed", "–")}
                        | members
                        | {"flags": warned}
                    )
    return pd.DataFrame(lines)


def show(table: pd.DataFrame, metrics: Sequence[str] | None = None, *, digits: int = 1) -> pd.DataFrame:
    """The long table as a reader wants it: a line a row, and for each metric ours [low, high] beside the paper's.

    A dash means that the paper gives no number, "not run" that this scale has none.
    """
    names = list(metrics) if metrics is not None else [m for m in dict.fromkeys(table["metric"]) if "lambda" not in m]
    with_paper = {m for m in names if table.loc[table["metric"] == m, "reported"].notna().any()}
    lines = []
    for row in dict.fromkeys(table["row"]):
        part = table[table["row"] == row].set_index("metric")
        line: dict[str, Any] = {"": part["label"].iloc[0]}
        for name in names:
            entry = part.loc[name] if name in part.index else None
            line[f"{name}, ours"] = "not run" if entry is None or pd.isna(entry["value"]) else _number(entry, digits)
            if name in with_paper:
                line[f"{name}, paper"] = _plain(entry["reported"] if entry is not None else math.nan, digits)
        if "lambda_iga" in part.index:
            nominal, effective = part.loc["lambda_iga", "value"], part.loc["lambda_iga_effective", "value"]
            line["λ_IGA nominal (effective)"] = f"{nominal:g} ({effective:.2g})"
        lines.append(line)
    return pd.DataFrame(lines).fillna("–").set_index("")


def _plain(number: float, digits: int) -> str:
    return "–" if pd.isna(number) else f"{number:.{digits}f}"


def _number(entry: Any, digits: int) -> str:
    text = f"{entry['value']:.{digits}f}"
    return text if pd.isna(entry["low"]) else f"{text} [{entry['low']:.{digits}f}, {entry['high']:.{digits}f}]"


# ---- figures ----


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


def short(label: str) -> str:
    """A row's label without the teacher, for the crowded plane of a figure."""
    parts = label.split(" → ")
    return parts[1] if len(parts) > 2 else parts[-1]


def _series(table: pd.DataFrame) -> dict[str, list[str]]:
    """The rows of a table by what a reader follows: the loops of one self-distillation together, others alone."""
    series: dict[str, list[str]] = {}
    for row in dict.fromkeys(str(row) for row in table["row"]):
        label = short(str(table.loc[table["row"] == row, "label"].iloc[0]))
        loop = re.fullmatch(r"(isd_wi?o?t)_\d+", row)
        series.setdefault(re.sub(r"-\d+$", "", label) if loop else label, []).append(row)
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


_PRETTY = {"clean": "clean", "autoattack": "AutoAttack", "apgd": "APGD-CE + APGD-T"}


def _pretty(metric: str) -> str:
    name, separator, radius = metric.partition("@")
    name = _PRETTY.get(name) or re.sub(r"^pgd(\d+)$", r"PGD-\1", name)
    return f"{name}, ε = {radius}" if separator else name


# ---- files ----


def save(experiment: Experiment, table: pd.DataFrame, figure: Figure, **more: Figure) -> None:
    """Write ``<artefact>.csv``, ``.png``, ``.svg`` and ``.json`` (provenance) to the scale's figures folder.

    Further figures go beside it as ``<artefact>_<name>.png`` and ``.svg``.
    """
    home = paths.figures(experiment.params.scale)
    home.mkdir(parents=True, exist_ok=True)
    table.to_csv(home / f"{experiment.name}.csv", index=False, float_format="%.6g")
    for name, drawn in {experiment.name: figure, **{f"{experiment.name}_{k}": v for k, v in more.items()}}.items():
        drawn.savefig(home / f"{name}.png", dpi=150)
        # Fixed ids and no date: the same figure gives the same file.
        with matplotlib.rc_context({"svg.hashsalt": name}):
            drawn.savefig(home / f"{name}.svg", metadata={"Date": None})
    record = json.dumps(provenance(experiment), indent=1, ensure_ascii=False)
    (home / f"{experiment.name}.json").write_text(record + "\n")


def provenance(experiment: Experiment) -> dict[str, Any]:
    """Where an artefact comes from: commit, versions, hardware, parameters, seconds of computing, run keys, notes."""
    jobs = [job for job in experiment.jobs() if job.measure is not None]
    results = [measured(job.run, job.measure, reference=job.reference) for job in jobs if job.measure]
    trained = [seconds for run in ancestors(job.run for job in jobs) if (seconds := training_seconds(run)) is not None]
    measuring = [float(result["seconds"]) for result in results if result is not None]
    libraries = ("torch", "torchvision", "timm", "numpy", "scikit-learn", "pyautoattack", "papermill", "matplotlib")
    return {
        "artefact": experiment.name,
        "title": experiment.title,
        "commit": commit(),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in libraries},
        "hardware": environment()["device"],
        "threads": torch.get_num_threads(),
        "parameters": experiment.params.model_dump(),
        "seconds": {"training": round(sum(trained), 1), "measuring": round(sum(measuring), 1)},
        "interval": INTERVAL,
        "runs": {row.id: [run_key(run) for run in row.runs] for row in experiment.rows},
        "notes": {row.id: row.note for row in experiment.rows if row.note},
    }


def commit() -> str:
    """The commit the code is at, with ``+`` if files differ from it; "unknown" outside a git checkout."""
    try:
        git = ["git", "-C", str(paths.ROOT)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "kdiga_nb"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed.stdout.strip() else "")
