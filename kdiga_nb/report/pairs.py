"""Paired comparison of two rows: the same test images, and the same seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from kdiga_nb.artifacts.table import Experiment, Row
from kdiga_nb.report.names import heading
from kdiga_nb.report.numbers import stored
from kdiga_nb.report.tables import shown

RESAMPLES = 10_000


@dataclass(frozen=True)
class Difference:
    """Accuracy of row a minus that of row b.

    Attributes:
        points: the difference in percentage points, mean over the seeds.
        low, high: its 95 % interval, from a bootstrap that draws seeds and images with replacement, both rows alike.
        p: two-sided; McNemar's exact test for one seed (only images on which the nets differ count), the bootstrap's
            share beyond zero for several seeds.
        n, seeds: test images and seeds that both rows were measured on.
    """

    points: float
    low: float
    high: float
    p: float
    n: int
    seeds: int

    def __str__(self) -> str:
        p = "p < 0.001" if self.p < 0.001 else f"p = {self.p:.3f}"
        seeds = f"{self.seeds} seed{'s' * (self.seeds > 1)}"
        return f"{_signed(self.points)} {self.interval} points, {p}, n = {self.n}, {seeds}"

    @property
    def interval(self) -> str:
        """The interval in brackets."""
        return f"[{_signed(self.low)}, {_signed(self.high)}]"


def _signed(points: float) -> str:
    return f"{round(points, 1) + 0.0:+.1f}"  # + 0.0: no −0.0


def compare(experiment: Experiment, a: str, b: str, metric: str) -> Difference:
    """Compare rows ``a`` and ``b`` of an experiment on a metric, from the masks of survivors in the store.

    Seeds are paired in their order; a seed that was measured in one row only is left out. ``kdiga:1`` is the net of
    row ``kdiga`` with seed 1 alone; the other row must then have one net, or name its seed too. The interval is a
    bootstrap's, so its last digit may differ if the rows are exchanged.

    Raises:
        KeyError: a row has no such metric.
        ValueError: no seed is measured in both rows, one seed is named and the other row has several, the results have
            no masks, or the images differ in number.
    """
    masks = {name: _masks(experiment, name, metric) for name in (a, b)}
    for name, other in ((a, b), (b, a)):
        if ":" in name and len(masks[other]) > 1:
            raise ValueError(f"{name} is one net and {other} has {len(masks[other])} seeds; name one, as in {other}:0")
    both = [seed for seed in masks[a] if seed in masks[b]]
    if not both:
        raise ValueError(f"{a} and {b}: no seed has {metric} measured in both")
    sizes = {len(mask) for one in masks.values() for mask in one.values()}
    if len(sizes) > 1:
        raise ValueError(f"{a} and {b} were measured on different numbers of images: {sorted(sizes)}")
    seeds = len(both)
    difference = np.array([masks[a][seed].astype(float) - masks[b][seed] for seed in both])
    draw = np.random.default_rng(0)
    n = difference.shape[1]
    # Images on which the nets of all seeds behave alike are drawn together, which is quick and the same.
    patterns, counts = np.unique(difference, axis=1, return_counts=True)
    images = draw.multinomial(n, counts / n, size=RESAMPLES) / n  # (resamples, patterns)
    seed_weights = draw.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES) / seeds  # (resamples, seeds)
    means = np.einsum("rs,sp,rp->r", seed_weights, patterns, images)
    low, high = 100 * np.quantile(means, [0.025, 0.975])
    if seeds == 1:
        better, worse = int((difference > 0).sum()), int((difference < 0).sum())
        p = float(binomtest(better, better + worse).pvalue) if better + worse else 1.0
    else:
        p = min(1.0, 2 * float(min((means <= 0).mean(), (means >= 0).mean())))
    return Difference(100 * float(difference.mean()), float(low), float(high), p, n, seeds)


def row_of(experiment: Experiment, name: str) -> Row:
    """The row of an id, or its net of one seed: ``kdiga``, ``kdiga:1``.

    Raises:
        ValueError: there is no such row, or no such seed.
    """
    row, colon, seed = name.partition(":")
    if colon and not seed.isdecimal():
        raise ValueError(f"{name}: a seed is a whole number, as in {row}:0")
    return experiment.row(row).of_seed(int(seed)) if colon else experiment.row(row)


def _stored(experiment: Experiment, name: str, metric: str) -> dict[int, dict[str, Any]]:
    """Seed, by its place in the row -> the result in the store; empty if the row has no such metric."""
    return next((stored(cell) for cell in row_of(experiment, name).cells if cell.metric == metric), {})


def _masks(experiment: Experiment, name: str, metric: str) -> dict[int, np.ndarray]:
    """Seed, by its place in the row -> (images,), True where the image is still classified correctly."""
    if all(cell.metric != metric for cell in row_of(experiment, name).cells):
        raise KeyError(f"{name} has no metric {metric}")
    found = _stored(experiment, name, metric)
    if not found:
        raise ValueError(f"{name}: {metric} is not measured")
    if any("survivors" not in result for result in found.values()):
        raise ValueError(f"{name}: {metric} was measured without a mask of survivors; measure again")
    return {place: np.array([sign == "1" for sign in result["survivors"]]) for place, result in found.items()}


def holm(values: Sequence[float]) -> list[float]:
    """Values of p, corrected for their number by Holm's method (1979); the order is kept."""
    order = np.argsort(values, kind="stable")
    raised = np.asarray(values, dtype=float)[order] * np.arange(len(values), 0, -1)
    corrected = np.empty(len(values))
    corrected[order] = np.minimum(np.maximum.accumulate(raised), 1)
    return corrected.tolist()


STARS = (
    "points, with their 95 % interval. *: p < 0.05. **: also after Holm's correction for all differences of the table. "
    "p: McNemar's exact test for one seed, a bootstrap over seeds and images for several."
)


def differences(experiment: Experiment, pairs: Mapping[str, tuple[str, str]], metrics: Sequence[str]) -> pd.DataFrame:
    """A table of paired differences for readers, as ``STARS`` says; "not run" where a row is not measured.

    Args:
        pairs: in words -> (row, row that is subtracted).

    Raises:
        ValueError: as ``compare``, but for rows that are not measured.
    """
    found = {
        (words, metric): compare(experiment, *rows, metric)
        for words, rows in pairs.items()
        for metric in metrics
        if all(_stored(experiment, row, metric) for row in rows)
    }
    corrected = dict(zip(found, holm([one.p for one in found.values()]), strict=True))

    def cell(key: tuple[str, str]) -> str:
        if key not in found:
            return "not run"
        one, stars = found[key], "*" * ((found[key].p < 0.05) + (corrected[key] < 0.05))
        return f"{_signed(one.points)}{stars} {one.interval}"

    columns = {heading(metric).replace(", ", " at "): [cell((words, metric)) for words in pairs] for metric in metrics}
    return shown(pd.DataFrame(columns, index=pd.Index(pairs, name="")), [])
