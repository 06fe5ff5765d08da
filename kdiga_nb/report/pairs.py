"""Paired comparison of two rows: the same test images, and the same seeds."""

from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

from kdiga_nb.artifacts.table import Experiment
from kdiga_nb.report.numbers import results

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
        return f"{self.points:+.1f} [{self.low:+.1f}, {self.high:+.1f}] points, {p}, n = {self.n}, {seeds}"


def compare(experiment: Experiment, a: str, b: str, metric: str) -> Difference:
    """Compare rows ``a`` and ``b`` of an experiment on a metric, from the masks of survivors in the store.

    Seeds are paired in their order; if one row has fewer, the others are left out.

    Raises:
        KeyError: a row has no such metric.
        ValueError: a row is not measured, its results have no masks, or the rows were measured on different images.
    """
    masks = {name: _masks(experiment, name, metric) for name in (a, b)}
    seeds = min(len(one) for one in masks.values())
    sizes = {one.shape[1] for one in masks.values()}
    if len(sizes) > 1:
        raise ValueError(f"{a} and {b} were measured on different numbers of images: {sorted(sizes)}")
    difference = masks[a][:seeds].astype(float) - masks[b][:seeds]
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


def _masks(experiment: Experiment, name: str, metric: str) -> np.ndarray:
    """(seeds, images), True where the image is still classified correctly."""
    found = results(experiment.row(name), metric)
    if not found:
        raise ValueError(f"{name}: {metric} is not measured")
    if any("survivors" not in result for result in found):
        raise ValueError(f"{name}: {metric} was measured without a mask of survivors; measure again")
    if len({len(result["survivors"]) for result in found}) > 1:
        raise ValueError(f"{name}: its seeds were measured on different numbers of images")
    return np.array([[sign == "1" for sign in result["survivors"]] for result in found])
