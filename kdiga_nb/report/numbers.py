"""Experiment -> DataFrame: our numbers with intervals, and the paper's numbers.

A value is the mean over the seeds. The 95 % interval of an accuracy adds two independent errors in quadrature:
Student's t over the seeds, for training, and Wilson's score interval of the mean at n images, for the finite test set
that all seeds share. With one seed, the interval is Wilson's alone. Other metrics have Student's t alone. ``INTERVAL``
says the same in the notebooks.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t as student_t

from kdiga_nb.artifacts.studies import Effect
from kdiga_nb.artifacts.table import Cell, Experiment, Row
from kdiga_nb.audit.verdict import Found, Verdict
from kdiga_nb.metrics import proportion
from kdiga_nb.report.names import NAMES
from kdiga_nb.report.tables import shown
from kdiga_nb.runs.run import run_key
from kdiga_nb.runs.store import measured, training_seconds

COLUMNS = ["row", "label", "metric", "value", "low", "high", "n", "seeds", "reported", "runs"]
INTERVAL = (
    "value: mean over the seeds. low, high: 95 % interval; for accuracies Student's t over the seeds and Wilson's "
    "score interval over the n test images, added in quadrature; for other metrics Student's t alone."
)


def interval(values: Sequence[float], n: int | None = None) -> tuple[float, float, float]:
    """Mean and 95 % interval of one value per seed, as the module's docstring defines the interval.

    Args:
        n: the number of test images if the values are accuracies in %.
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
    """The long table of an experiment with the columns ``COLUMNS``: the results in the store and the paper's numbers.

    A missing result is NaN; ``runs`` lists the keys of the runs behind a number, separated by spaces.
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
    results = list(stored(cell).values())
    if not results or len(results) < sum(job.measure is not None for job in cell.jobs):
        return line
    n = int(results[0]["n"])
    value, low, high = interval([float(result[cell.key]) for result in results], n if cell.is_accuracy else None)
    keys = " ".join(run_key(job.run) for job in cell.jobs)
    return line | {"value": value, "low": low, "high": high, "n": n, "seeds": len(results), "runs": keys}


def stored(cell: Cell) -> dict[int, dict[str, Any]]:
    """The results of a cell that the store has, by the place of their seed in the row."""
    results = [job.measure and measured(job.run, job.measure, reference=job.reference) for job in cell.jobs]
    return {place: result for place, result in enumerate(results) if result is not None}


def value(table: pd.DataFrame, row: str, metric: str) -> float:
    """One number of a long table; NaN if it was not measured."""
    numbers = table.loc[(table["row"] == row) & (table["metric"] == metric), "value"]
    return float(numbers.iloc[0]) if len(numbers) else math.nan


def values(table: pd.DataFrame) -> Mapping[tuple[str, str], float]:
    """The numbers of a long table by (row, metric); NaN, which supports no claim, for a missing number."""
    numbers: defaultdict[tuple[str, str], float] = defaultdict(lambda: math.nan)
    for row, metric, number in zip(table["row"], table["metric"], table["value"], strict=True):
        numbers[str(row), str(metric)] = float(number)
    return numbers


def best(table: pd.DataFrame, rows: Sequence[str], metric: str) -> str:
    """The row with the highest value among ``rows``."""
    return max(rows, key=lambda row: value(table, row, metric))


def claim(text: str, holds: bool | None) -> None:
    """Print a claim and whether the numbers support it (None: not measured); the notebooks' tests compare this line."""
    print(f"{'not measured' if holds is None else 'holds' if holds else 'does not hold'}: {text}")


def flags(experiment: Experiment) -> pd.DataFrame:
    """AutoAttack's warnings and the accuracy after each of its attacks: one line per evaluation."""
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
    """The long table for readers: one line per row; per metric, our value [low, high] and the paper's.

    A dash: the paper gives no number. "not run": the store has no result.
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
    frame = pd.DataFrame(lines).fillna("–").set_index("")
    return shown(frame, [str(row) for row in dict.fromkeys(table["row"])])


def _plain(number: float, digits: int) -> str:
    return "–" if pd.isna(number) else f"{number:.{digits}f}"


def _number(entry: Any, digits: int) -> str:
    text = f"{entry['value']:.{digits}f}"
    return text if pd.isna(entry["low"]) else f"{text} [{entry['low']:.{digits}f}, {entry['high']:.{digits}f}]"


def short(label: str) -> str:
    """A row's label without its teacher, for figures with little space."""
    parts = label.split(" → ")
    return parts[1] if len(parts) > 2 else parts[-1]


def results(row: Row, metric: str) -> list[dict[str, Any]]:
    """The stored results of one cell, one per seed, with all that the measure returned.

    Raises:
        KeyError: the row has no such metric.
    """
    for cell in row.cells:
        if cell.metric == metric:
            return list(stored(cell).values())
    raise KeyError(f"{row.id} has no metric {metric}")


def with_training_cost(table: pd.DataFrame, experiment: Experiment) -> pd.DataFrame:
    """The long table with one more metric per row, ``training_seconds``: wall-clock time per training.

    Each training ran in one process; other processes on the same machine slow it down.
    """
    lines = []
    for row in experiment.rows:
        seconds = [s for run in row.runs if (s := training_seconds(run)) is not None]
        mean, low, high = interval(seconds) if seconds else (math.nan,) * 3
        names = {"row": row.id, "label": row.label, "metric": "training_seconds", "reported": math.nan}
        keys = " ".join(run_key(run) for run in row.runs)
        lines.append(names | {"value": mean, "low": low, "high": high, "n": 0, "seeds": len(seconds), "runs": keys})
    return pd.concat([table, pd.DataFrame(lines, columns=COLUMNS)], ignore_index=True)


def audit_table(audits: Mapping[str, Found]) -> pd.DataFrame:
    """Accuracy under attack: one line per attack, one column per net; ``n`` is the number of images."""
    attacks = dict.fromkeys(name for audit in audits.values() for name, result in audit.items() if "percent" in result)
    lines = []
    for attack in attacks:
        numbers = {net: f"{audit[attack]['percent']:.1f}" for net, audit in audits.items() if attack in audit}
        n = next(int(audit[attack]["n"]) for audit in audits.values() if attack in audit)
        lines.append({"": _named(attack), "n": n} | numbers)
    return pd.DataFrame(lines).fillna("–").set_index("")


def _named(attack: str) -> str:
    name, separator, factor = attack.partition("@")
    if separator:
        return f"PGD, step {factor} ε" if name == "step" else f"PGD, radius {factor} ε"
    return NAMES.get(attack, attack.replace("_", " "))


def verdict_table(verdicts: Mapping[str, Verdict]) -> pd.DataFrame:
    """One line per net: the verdict, the accuracies behind it, and the names of its warning signs."""
    lines = []
    for net, one in verdicts.items():
        signs = one.faults | one.masking | one.weakness
        figures = {"clean": f"{one.clean:.1f}", "plain PGD": f"{one.plain:.1f}", "all together": f"{one.worst:.1f}"}
        lines.append({"": net, "verdict": one.word} | figures | {"warning signs": ", ".join(signs) or "none"})
    return pd.DataFrame(lines).set_index("")


def effects_table(effects: Mapping[str, Sequence[Effect]]) -> pd.DataFrame:
    """One line per choice: its two levels and, per metric, the effect of the second in points with its interval."""
    lines = []
    for index, effect in enumerate(next(iter(effects.values()))):
        line = {"": effect.factor.name, "from": effect.factor.low, "to": effect.factor.high}
        for metric, chosen in effects.items():
            one = chosen[index]
            line[metric] = f"{one.points:+.1f} [{one.low:+.1f}, {one.high:+.1f}]"
        lines.append(line)
    return pd.DataFrame(lines).set_index("")
