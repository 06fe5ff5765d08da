"""Guess first: three questions that a reader answers with the explorer before the measured answer is unfolded."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from kdiga_nb.artifacts.explore import Point, explored
from kdiga_nb.params import ExploreParams
from kdiga_nb.report.numbers import value


@dataclass(frozen=True)
class Mission:
    """A question, how to look for the answer in the explorer, and the answer that the store gives."""

    question: str
    hint: str
    answer: str


@dataclass(frozen=True)
class Missions:
    """Missions as a page on which every answer is folded, or as text."""

    every: Sequence[Mission]

    def __repr__(self) -> str:
        return "\n".join(f"{one.question} {one.answer}" for one in self.every)

    def _repr_html_(self) -> str:
        return "\n".join(
            f"<p><b>{html.escape(one.question)}</b><br>{html.escape(one.hint)}</p>\n"
            f"<details><summary>The measured answer</summary>{html.escape(one.answer)}</details>"
            for one in self.every
        )


def missions(params: ExploreParams, table: pd.DataFrame) -> Missions:
    """Break KD, find the edge of λ_IGA, compare the last loop with the first.

    Args:
        table: the long table of the explorer's artefact.
    """
    return Missions((_break(params, table), _edge(params, table), _loops(params, table)))


def _break(params: ExploreParams, table: pd.DataFrame) -> Mission:
    metrics = {params.epsilon: f"pgd{params.pgd_steps}"}
    metrics |= {radius: f"pgd{params.pgd_steps}@{radius:g}" for radius in params.radii}
    radii = sorted(metrics)

    def first(point: Point) -> str:
        row = explored(params, point)
        found = [value(table, row.id, metrics[radius]) for radius in radii]
        if any(math.isnan(one) for one in found):
            return "not measured"
        fallen = [f"ε = {radius:g} ({one:.1f} %)" for radius, one in zip(radii, found, strict=True) if one < 50]
        return fallen[0] if fallen else f"at none, {found[-1]:.1f} % at ε = {radii[-1]:g}"

    kd, kdiga = first(Point("kd")), first(Point("kdiga", params.lambda_iga))
    return Mission(
        "Break KD: from which ε on does KD misread more than half of the test images, and from which on KDIGA?",
        f"View ε; measured at {', '.join(f'{radius:g}' for radius in radii)}.",
        f"Below 50 % under PGD-{params.pgd_steps}: KD {kd}; KDIGA {kdiga}.",
    )


def _edge(params: ExploreParams, table: pd.DataFrame) -> Mission:
    weights = sorted({0.0, params.lambda_iga, *params.sweep})
    rows = {weight: explored(params, Point("kdiga", weight)).id for weight in weights}
    robust, clean = (
        {weight: value(table, row, metric) for weight, row in rows.items()}
        for metric in (f"pgd{params.pgd_steps}", "clean")
    )
    known = [weight for weight in weights if not math.isnan(robust[weight] + clean[weight])]
    answer = "Not measured."
    if known and 0.0 in known:
        best, last = max(known, key=lambda weight: robust[weight]), known[-1]
        answer = (
            f"λ = {best:g} has {robust[best]:.1f} % under PGD-{params.pgd_steps} and {clean[best]:.1f} % clean; KD "
            f"(λ = 0) has {robust[0.0]:.1f} and {clean[0.0]:.1f} %. At λ = {last:g}, clean accuracy is "
            f"{clean[last]:.1f} %."
        )
    return Mission(
        f"Find the edge of λ: which of the weights {', '.join(f'{weight:g}' for weight in weights)} is most robust, "
        "and what does the largest cost?",
        "View λ_IGA. A weight far too large lowers both accuracies.",
        answer,
    )


def _loops(params: ExploreParams, table: pd.DataFrame) -> Mission:
    ends = [explored(params, Point("isd_wot", loop=loop)).id for loop in (1, params.loops)]
    pgd, autoattack = (
        [value(table, row, metric) for row in ends] for metric in (f"pgd{params.pgd_steps}", "autoattack")
    )
    answer = "Not measured."
    if not math.isnan(sum(pgd)):
        higher = "more" if pgd[1] > pgd[0] else "less"
        answer = f"Loop {params.loops} is {higher} robust: {pgd[1]:.1f} % against {pgd[0]:.1f} % of loop 1 under PGD"
        answer += (
            "." if math.isnan(sum(autoattack)) else f" ({autoattack[1]:.1f} and {autoattack[0]:.1f} % AutoAttack)."
        )
    return Mission(
        f"Does loop {params.loops} of self-distillation without a teacher beat loop 1?",
        "View ISD loops. The paper's curve rises with every loop.",
        answer,
    )
