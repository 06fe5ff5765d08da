"""A user's own numbers compared with the published ones.

Both are long tables: the user's from the run store, the published from ``published/<scale>/<artefact>.csv``. Values are
matched by artefact, row and metric. Only what both measured is compared. Settings (n = 0) are not compared, nor are
training times, which depend on the machine.
"""

import math
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control
from scipy.stats import t as student_t

from kdiga_nb import paths
from kdiga_nb.artifacts.table import Experiment
from kdiga_nb.metrics import proportion

AGREES, CHANCE, DIFFERS, UNTESTED = "agrees", "chance", "differs", "untested"
COLUMNS = ["artefact", "row", "metric", "own", "published", "low", "high", "p", "outcome"]
LEVEL = 0.05  # false discovery rate of the values that are said to differ
Z = 1.959964  # a normal 95 % interval reaches this many standard errors


def agrees(own: float, published: float, low: float, high: float) -> bool:
    """Whether a value reproduces a published one.

    With a published 95 % interval: the value lies inside the interval, limits included. Without an interval (a count, a
    mean over one net): both values are the same when rounded to two significant digits.
    """
    if pd.isna(low) or pd.isna(high):
        return f"{own:.2g}" == f"{published:.2g}"
    return low <= own <= high


def _variances(entry: Any, end: str, is_accuracy: bool) -> list[tuple[float, float]]:
    """Variance and degrees of freedom of a value's errors, seeds and test images, from its interval.

    ``report.interval`` adds Student's t over the seeds and, for accuracies, Wilson's interval over the images.
    """
    value, low, high, n, seeds = (float(entry[name + end]) for name in ("value", "low", "high", "n", "seeds"))
    reach, wilson = max(value - low, high - value), 0.0
    if is_accuracy:
        images = proportion(round(value / 100 * n), int(n))
        wilson = max(images.percent - images.low, images.high - images.percent)
    errors = [((wilson / Z) ** 2, math.inf)]
    if seeds > 1:
        by_seeds = max(reach**2 - wilson**2, 0.0) / float(student_t.ppf(0.975, seeds - 1)) ** 2
        errors.append((by_seeds, seeds - 1))
    return errors


def difference_test(entry: Any, is_accuracy: bool) -> float:
    """Two-sided p of Welch's test that both values are means of the same distribution; NaN without intervals.

    The two runs count as independent, on independent images, so the test is cautious. A value of one seed has no error
    of training: the p of such a value is too small, if anything.
    """
    if pd.isna(entry["low"]) or pd.isna(entry["low_own"]):
        return math.nan
    errors = _variances(entry, "", is_accuracy) + _variances(entry, "_own", is_accuracy)
    total, distance = sum(variance for variance, _ in errors), abs(entry["value"] - entry["value_own"])
    if total == 0:
        return 1.0 if distance == 0 else 0.0
    degrees = total**2 / max(sum(variance**2 / df for variance, df in errors), 1e-300)
    return 2 * float(student_t.sf(distance / math.sqrt(total), degrees))


def compare(scale: str, own: dict[str, tuple[Experiment, pd.DataFrame]]) -> pd.DataFrame:
    """One row per value that the published table of an artefact and one's own have both measured.

    ``outcome``: ``agrees`` (as ``agrees`` says); else ``chance`` where the test of the difference does not reject after
    control of the false discovery rate over all values, ``differs`` where it does, ``untested`` where a value has no
    interval.

    Args:
        own: the experiment and its long table by artefact.
    """
    entries: list[dict[str, Any]] = []
    for name, (experiment, table) in own.items():
        path = paths.published(scale) / f"{name}.csv"
        if not path.exists():
            continue
        accuracies = {(row.id, cell.metric) for row in experiment.rows for cell in row.cells if cell.is_accuracy}
        both = pd.read_csv(path).merge(table, on=["row", "metric"], suffixes=("", "_own"))
        both = both[both["value"].notna() & both["value_own"].notna() & (both["n_own"] > 0)]
        for entry in both.to_dict("records"):
            p = difference_test(entry, (entry["row"], entry["metric"]) in accuracies)
            names = {"artefact": name, "own": entry["value_own"], "published": entry["value"], "p": p}
            entries.append({**{key: entry[key] for key in ("row", "metric", "low", "high")}, **names})
    table = pd.DataFrame(entries, columns=COLUMNS[:-1])
    tested = table["p"].notna().to_numpy()
    adjusted = np.full(len(table), math.nan)
    adjusted[tested] = false_discovery_control(table["p"][tested]) if tested.any() else []
    outcomes = [_outcome(entry, q) for entry, q in zip(table.to_dict("records"), adjusted, strict=True)]
    return table.assign(outcome=pd.Series(outcomes, index=table.index, dtype=object))[COLUMNS]


def _outcome(entry: Any, adjusted: float) -> str:
    if agrees(entry["own"], entry["published"], entry["low"], entry["high"]):
        return AGREES
    if math.isnan(adjusted):
        return UNTESTED
    return DIFFERS if adjusted < LEVEL else CHANCE
