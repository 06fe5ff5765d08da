"""What the explorer shows: points, their runs and their cells."""

import re
from dataclasses import dataclass
from typing import Any

from kdiga_nb.artifacts.recipes import (
    ISD,
    accuracy_cells,
    isd_label,
    isd_row,
    isd_wit_runs,
    isd_wot_runs,
    kdiga_students,
    method_of,
    pgd_cell,
    pgd_training,
    runs_per_seed,
    standard_training,
    trades_teacher,
    training_attack,
)
from kdiga_nb.artifacts.table import Cell, Experiment, Nets, PerSeed, Row
from kdiga_nb.measures import Linearity
from kdiga_nb.methods import ARD, KD, KDIGA_ARD_A, ST, TRADES, GradientPenalty, Method
from kdiga_nb.params import EXPLORED, ExploreParams, Params
from kdiga_nb.runs.graph import Job

CHAINS = tuple(ISD)


@dataclass(frozen=True)
class Point:
    """One net that the explorer can show.

    Attributes:
        method: a key of ``params.EXPLORED``.
        lambda_iga: of ``kdiga``; at 0 it is KD.
        loop, dropout: of ``isd_wot`` (loop 0 is the standard-trained net) and ``isd_wit`` (from loop 1).
    """

    method: str
    lambda_iga: float = 0.0
    loop: int = 0
    dropout: bool = True


def explored(params: ExploreParams, point: Point, *, autoattack: bool = True, radii: bool = True) -> Row:
    """The row of a point: one run per seed; LLM and the further radii are measured on the first seed.

    Args:
        autoattack, radii: whether the row has cells of AutoAttack, and of PGD at the further radii.
    """
    name, label, runs = _explored_runs(params, point)
    linearity = Linearity(params.epsilon, params.llm_images, params.llm_steps)
    cells = [*accuracy_cells(params, runs, autoattack=autoattack), Cell("llm", (Job(runs[0], linearity),), "llm")]
    if radii:
        cells += [pgd_cell(params, runs[:1], radius=radius) for radius in params.radii]
    return Row(name, label, runs, tuple(cells))


def _explored_runs(params: ExploreParams, point: Point) -> tuple[str, str, PerSeed]:
    """Row id, label and runs of a point."""
    method = "kd" if point.method == "kdiga" and point.lambda_iga == 0 else point.method
    if method in CHAINS:
        return _explored_loop(params, point)
    if method == "kdiga":
        weighted = params.model_copy(update={"lambda_iga": point.lambda_iga})
        weight = f"{point.lambda_iga:g}"
        return f"kdiga_{re.sub(r'[^0-9]', '_', weight)}", f"KDIGA, λ = {weight}", kdiga_students(weighted)
    attack = training_attack(params)
    trained: dict[str, tuple[Method, bool]] = {
        "st": (ST(), False),
        "kd": (method_of(params, KD), True),
        "ard": (method_of(params, ARD, attack=attack), True),
        "penalty": (GradientPenalty(params.lambda_penalty), False),
        "kdiga_ard_a": (method_of(params, KDIGA_ARD_A, attack=attack), True),
        "pgd_student": (pgd_training(params), False),
        "trades_student": (TRADES(attack, params.beta), False),
    }
    chosen, distilled = trained[method]
    extra: dict[str, Any] = {"teacher": trades_teacher(params)} if distilled else {}
    return method, EXPLORED[method], runs_per_seed(params, chosen, **extra)


def _explored_loop(params: ExploreParams, point: Point) -> tuple[str, str, PerSeed]:
    if point.method == "isd_wot" and point.loop == 0:
        return "st", EXPLORED["st"], standard_training(params)
    if point.method == "isd_wot":
        chain = isd_wot_runs(params.model_copy(update={"loops": point.loop}), point.dropout)
    else:
        chain = isd_wit_runs(params, point.loop, point.dropout)
    label = isd_label(point.method, point.loop) + ("" if point.dropout else ", no dropout")
    return isd_row(point.method, point.loop, point.dropout), label, chain[-1]


def reference_teacher(params: Params) -> Nets:
    """The TRADES teacher of each seed, which a net without its own teacher is compared with."""
    return trades_teacher(params)


def explore(params: ExploreParams) -> Experiment:
    """What the explorer shows at the start: nets of Tables 1 and 4; KDIGA at further weights on fewer seeds."""
    headline = [Point("st"), Point("kd"), Point("kdiga", params.lambda_iga), Point("penalty"), Point("trades_student")]
    headline += [Point("isd_wot", loop=1), Point("isd_wot", loop=params.loops)]
    further = [Point("ard"), Point("kdiga_ard_a"), Point("pgd_student")]
    further += [Point("isd_wot", loop=loop) for loop in range(2, params.loops)]
    further += [Point("isd_wit", loop=loop) for loop in range(1, params.wit_loops + 1)]
    plain = [Point("isd_wot", loop=loop, dropout=False) for loop in range(1, params.loops_without_dropout + 1)]
    plain += [Point("isd_wit", loop=loop, dropout=False) for loop in range(1, params.wit_loops_without_dropout + 1)]
    fewer = params.model_copy(update={"seeds": params.seeds[: params.sweep_seeds]})
    sweep = [Point("kdiga", weight) for weight in params.sweep if weight not in (0, params.lambda_iga)]
    rows = [explored(params, point) for point in headline]
    rows += [explored(params, point, radii=False) for point in further]
    rows += [explored(params, point, radii=False, autoattack=False) for point in plain]
    rows += [explored(fewer, point, radii=False, autoattack=False) for point in sweep]
    unique = {row.id: row for row in rows}  # of a single loop, the first row is also the last
    return Experiment("explore", "Explore. λ_IGA, ε and loop count by hand", tuple(unique.values()), params)
