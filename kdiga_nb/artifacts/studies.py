"""Studies that the paper lacks: the audit, ISD under AutoAttack, both propositions, ablations, the Pareto plot.

Each study is an experiment like a table of the paper: one row per net, one cell per measured number. A net that a table
trains is the same run here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any

from scipy.stats import t as student_t

from kdiga_nb.artifacts.recipes import (
    PENALTIES,
    accuracy_cells,
    autoattack_cells,
    cell_of,
    fast_attack,
    isd_chain,
    isd_label,
    isd_row,
    isd_wot_runs,
    method_of,
    pgd_teacher,
    runs_per_seed,
    schedule_of,
    seeds_of_row,
    standard_training,
    table1_runs,
    teacher_schedule,
    trades_teacher,
    trained_runs,
    training_attack,
)
from kdiga_nb.artifacts.table import Cell, Experiment, Nets, PerSeed, Row
from kdiga_nb.attacks.autoattack import AutoAttack
from kdiga_nb.attacks.gradient import FGSM, evaluation_pgd
from kdiga_nb.attacks.losses import LossPGD
from kdiga_nb.audit.certify import CertifiedRadius
from kdiga_nb.audit.measures import COMPARES, Gradients, Preconditions, plan
from kdiga_nb.audit.verdict import Found
from kdiga_nb.isd import isd_without_teacher
from kdiga_nb.measures import ImageBounds, Measure, TestAccuracy, ValidationAccuracy
from kdiga_nb.methods import ARD, AT, IAD, IGDM, KD, KDIGA, KDIGA_ARD_A, RSLAD, SAAD, ST, TRADES, AdaAD, Method
from kdiga_nb.params import (
    NONE,
    AblationParams,
    AlignmentParams,
    AuditParams,
    BaselineParams,
    IsdAutoAttackParams,
    IsdSearchParams,
    ParetoParams,
    Prop1Params,
    Prop2Params,
)
from kdiga_nb.runs.graph import Job
from kdiga_nb.runs.run import Run, Source
from kdiga_nb.runs.store import history, measured
from kdiga_nb.training import Schedule

CERTIFIED_STUDENT, CERTIFIED_TEACHER = "digits_mlp", "digits_mlp_wide"  # ReLU nets small enough to be certified
ARD_TEMPERATURE = 30.0  # that of ARD's own authors, with λ_CE = 0
# Levels of the factorial, low then high.
LAMBDA_LEVELS, TEMPERATURE_LEVELS, DROPOUT_LEVELS = (0.1, 1.0), (1.0, 4.0), (0.0, 0.5)


def _compared(metric: str, runs: Nets, measure: Measure, references: Nets, key: str) -> Cell:
    """A cell whose measure compares the net of each seed with a reference."""
    return Cell(metric, tuple(Job(run, measure, other) for run, other in zip(runs, references, strict=False)), key)


def audit_plan(params: AuditParams) -> dict[str, Measure]:
    """The measures of the audit by name, at the sizes of the parameters."""
    return plan(
        params.epsilon,
        steps=params.pgd_steps,
        images=params.audit_images,
        long_steps=params.long_steps,
        long_restarts=params.long_restarts,
        long_images=params.long_images,
        black_box_images=params.black_box_images,
        queries=params.queries,
    )


def _audited(params: AuditParams) -> dict[str, tuple[str, Source]]:
    """Row id -> label and net of the first seed."""
    runs = table1_runs(params)
    names = ("st", "kd", "kdiga", "isd_wot_1", "trades_student")
    return {name: (runs[name][0], runs[name][1][0]) for name in names}


def audit_jobs(params: AuditParams, net: Source) -> dict[str, Job]:
    """Every measurement of one net's audit, AutoAttack included, under the names that the audit's rules use."""
    runs = table1_runs(params)
    teacher = runs["trades_teacher"][1][0]
    jobs = {
        name: Job(net, measure, teacher if name in COMPARES else None) for name, measure in audit_plan(params).items()
    }
    transfer = jobs.pop("transfer").measure
    sources = {
        "teacher": teacher,
        "earlier_loop": runs["st"][1][0],  # self-distillation starts from this net
        "adversarially_trained": runs["pgd_student"][1][0],  # has the student's architecture
    }
    jobs |= {f"transfer_from_{name}": Job(net, transfer, run) for name, run in sources.items() if run != net}
    if params.autoattack_images:  # on the audit's own images: the verdict compares it with PGD on the same ones
        jobs["autoattack"] = Job(net, TestAccuracy(AutoAttack(params.epsilon), params.audit_images))
    return jobs


def _audit_cells(jobs: dict[str, Job]) -> tuple[Cell, ...]:
    cells = []
    for name, job in jobs.items():
        if isinstance(job.measure, Gradients):
            keys = {"zero_gradients": "zero", "gradient_norm": "norm", "gradient_cosine": "cosine"}
            cells += [Cell(metric, (job,), key) for metric, key in keys.items()]
        elif isinstance(job.measure, Preconditions):
            cells.append(Cell("faults", (job,), "count"))
        else:
            cells.append(Cell(name, (job,)))
    return tuple(cells)


def robustness_audit(params: AuditParams) -> Experiment:
    """The audit of ST, KD, KDIGA, ISD-WoT-1 and a TRADES-trained net of the same architecture."""
    rows = [
        Row(name, label, trained_runs((net,)), _audit_cells(audit_jobs(params, net)))
        for name, (label, net) in _audited(params).items()
    ]
    return Experiment("robustness_audit", "Is the robustness real?", tuple(rows), params)


def findings(params: AuditParams, row: Row) -> Found:
    """The stored results of a row's audit, under the names that ``audit.verdict`` uses."""
    jobs = audit_jobs(params, row.runs[0])
    stored = {n: measured(job.run, job.measure, reference=job.reference) for n, job in jobs.items() if job.measure}
    return {name: result for name, result in stored.items() if result is not None}


def _self_distilled(params: IsdAutoAttackParams, method: Method) -> PerSeed:
    """ISD-WoT-1 with dropout, but trained by another method: the effect of a loop without the alignment."""
    (runs,) = isd_wot_runs(params.model_copy(update={"loops": 1}), dropout=True, method=method)
    return runs if method.needs_teacher else tuple(replace(run, teacher=None) for run in runs)


def isd_autoattack(params: IsdAutoAttackParams) -> Experiment:
    """ISD loop by loop under stronger attacks, with and without dropout.

    Controls: one loop without alignment, one with a zero target, and the gradient penalty without a teacher.
    """
    table = table1_runs(params)
    chosen: dict[str, tuple[str, Nets]] = {"st": ("loop 0: student (ST)", table["st"][1])}

    def choose(chain: str, loops: int) -> None:
        for loop in range(1, loops + 1):
            row = isd_row(chain, loop)
            chosen[row] = (isd_label(chain, loop), table[row][1])

    choose("isd_wot", params.loops)
    for loop, runs in enumerate(isd_wot_runs(params, dropout=False)[: params.loops_without_dropout], 1):
        chosen[isd_row("isd_wot", loop, dropout=False)] = (f"{isd_label('isd_wot', loop)}, without dropout", runs)
    choose("isd_wit", params.wit_loops)
    kd = method_of(params, KD)
    chosen["self_kd"] = ("loop 1 by KD: dropout, no alignment", _self_distilled(params, kd))
    chosen["self_st"] = ("loop 1 by ST: dropout, no teacher", _self_distilled(params, ST()))
    for name in ("isd_wot_1_zero", "penalty"):
        chosen[name] = table[name]
    size = evaluation_pgd(params.epsilon, params.pgd_steps).step_size
    long = TestAccuracy(LossPGD(params.epsilon, size / 2, params.long_steps), params.long_images)
    apgd = TestAccuracy(AutoAttack(params.epsilon, version="apgd"), params.apgd_images)
    gradients = Gradients(params.epsilon, params.audit_images, steps=(0,), grid=3)
    rows = []
    for name, (label, runs) in chosen.items():
        cells = (
            *accuracy_cells(params, runs, autoattack=name in table or isd_chain(name) is not None, row=name),
            cell_of("apgd", runs, apgd),
            cell_of(f"pgd{params.long_steps}", runs[: params.autoattack_seeds], long),
            _compared("gradient_norm", runs, gradients, table["st"][1], "norm"),
            _compared("cosine_to_loop_0", runs, gradients, table["st"][1], "cosine"),
        )
        rows.append(Row(name, label, trained_runs(runs), cells))
    return Experiment("isd_autoattack", "Iterative self-distillation under AutoAttack", tuple(rows), params)


def prop1_certified(params: Prop1Params) -> Experiment:
    """Proposition 1: certified radii of a teacher and of students that align the loss's gradient or all logits'."""
    schedule = schedule_of(params, params.certified_epochs)
    small, attack = CERTIFIED_STUDENT, training_attack(params)
    teacher = runs_per_seed(params, TRADES(attack, params.beta), CERTIFIED_TEACHER, schedule=schedule)

    def student(method: Method, **extra: Any) -> PerSeed:
        return runs_per_seed(params, method, small, schedule=schedule, **extra)

    aligned = method_of(params, KDIGA, lambda_iga=params.lambda_logits, align="logits")
    nets: dict[str, tuple[str, Nets]] = {
        "teacher": (f"{CERTIFIED_TEACHER} (TRADES), the teacher", teacher),
        "st": ("student (ST)", student(ST())),
        "kd": ("teacher → KD → student", student(method_of(params, KD), teacher=teacher)),
        "kdiga_loss": (
            "teacher → KDIGA, the loss's gradient → student",
            student(method_of(params, KDIGA), teacher=teacher),
        ),
        "kdiga_logits": ("teacher → KDIGA, all logits' gradients → student", student(aligned, teacher=teacher)),
    }
    measure = CertifiedRadius(params.certified_epsilon, params.certified_images)
    keys = ["radius_interval", "radius_crown", "radius_one_sided", "radius_attack", "certified", "kept"]
    keys += ["kept_proven", "lost_proven", "distance_loss", "distance_logits"]
    rows = []
    for name, (label, runs) in nets.items():
        cells = tuple(_compared(key, runs, measure, teacher, key) for key in keys)
        rows.append(Row(name, label, trained_runs(runs), (*accuracy_cells(params, runs, autoattack=False), *cells)))
    return Experiment("prop1_certified", "Proposition 1 and certified radii", tuple(rows), params)


def prop2_bound(params: Prop2Params) -> Experiment:
    """Proposition 2, image by image: four students of the TRADES teacher of the first seed, and two penalties."""
    runs = table1_runs(params)
    teacher = runs["trades_teacher"][1][:1]
    measure = ImageBounds(params.epsilon, params.bound_images, params.llm_steps)
    keys = ["gap", "bound", "bound_tight", "bound_l2", "violations", "violations_tight", "violations_l2"]
    keys += ["llm_student", "llm_teacher", "ce_sum", "ce_difference", "distance_l1", "distance_l2", "tightness"]
    rows = []
    for name in ("st", "kd", "kdiga", "ard", *PENALTIES):
        label, students = runs[name]
        cells = tuple(_compared(key, students[:1], measure, teacher, key) for key in (*keys, "tightness_tight"))
        rows.append(Row(name, label, trained_runs(students[:1]), cells))
    return Experiment("prop2_bound", "Proposition 2, image by image", tuple(rows), params)


@dataclass(frozen=True)
class Factor:
    """One choice of the factorial: name, two levels, column of −1 and +1, and one word per level."""

    name: str
    low: str
    high: str
    signs: tuple[int, ...]
    words: tuple[str, str]


# A 2^(8−4) design of resolution IV: four choices vary freely over 16 runs; each other choice is the product of three
# of them. No main effect is confounded with an interaction of two choices.
_FREE = [tuple(1 if run >> bit & 1 else -1 for run in range(16)) for bit in range(4)]
_COLUMNS = [*_FREE, *(tuple(math.prod(s) for s in zip(*(_FREE[i] for i in three), strict=True))
                      for three in ((1, 2, 3), (0, 2, 3), (0, 1, 2), (0, 1, 3)))]  # fmt: skip


Level = tuple[str, ...]  # a choice, its low and high level, and one word per level


def _design(levels: Sequence[Level]) -> list[Factor]:
    """At most eight choices, each with a column of the design."""
    return [
        Factor(name, low, high, signs, (few, more))
        for (name, low, high, few, more), signs in zip(levels, _COLUMNS, strict=False)
    ]


def _levels(chosen: Sequence[Factor], index: int) -> tuple[dict[str, bool], str]:
    """Which choices a combination (from 0) has at the high level, and the combination in words."""
    high = {factor.name: factor.signs[index] > 0 for factor in chosen}
    return high, " ".join(factor.words[high[factor.name]] for factor in chosen)


def factors() -> list[Factor]:
    """The eight choices in the order of the design's columns."""
    weights, temperatures, rates = LAMBDA_LEVELS, TEMPERATURE_LEVELS, DROPOUT_LEVELS
    levels = [
        ("lambda_iga", *(f"{value:g}" for value in weights), *(f"λ{value:g}" for value in weights)),
        ("iga_norm", "per_sample", "batch, same effective weight", "sample", "batch"),
        ("kl_reduction", "batchmean", "mean (N times weaker)", "KL", "KL/N"),
        ("temperature", *(f"{value:g}" for value in temperatures), *(f"T{value:g}" for value in temperatures)),
        ("head_dropout", *(f"{value:g}" for value in rates), *(f"drop{value:g}" for value in rates)),
        ("schedule", "second step taken", "second step missing", "2-step", "1-step"),
        ("selection", "validation", "best on test", "val", "test"),
        ("init", "fresh", "from the ST net", "fresh", "ST"),
    ]
    return _design(levels)


def _ablation_schedule(params: AblationParams) -> Schedule:
    milestones = tuple(sorted({params.ablation_epochs // 2, 3 * params.ablation_epochs // 4}))
    return replace(schedule_of(params, params.ablation_epochs), policy="multistep", milestones=milestones)


def _combination(params: AblationParams, high: dict[str, bool]) -> Run:
    """The run of the first seed with each choice at its low or high level."""
    weight = LAMBDA_LEVELS[high["lambda_iga"]]
    schedule = replace(
        _ablation_schedule(params),
        compounding=not high["schedule"],
        selection="best_on_test" if high["selection"] else "validation",
        selection_epsilon=params.epsilon,
    )
    method = KDIGA(
        lambda_ce=params.lambda_ce,
        lambda_kl=params.lambda_kl,
        lambda_iga=weight * schedule.batch_size**1.5 if high["iga_norm"] else weight,
        temperature=TEMPERATURE_LEVELS[high["temperature"]],
        norm="batch" if high["iga_norm"] else "per_sample",
        kl_reduction="mean" if high["kl_reduction"] else "batchmean",
    )
    teacher, start = trades_teacher(params)[0], standard_training(params)[0]
    return Run(
        params.dataset,
        params.student,
        method,
        schedule,
        params.seeds[0],
        DROPOUT_LEVELS[high["head_dropout"]],
        teacher,
        start if high["init"] else None,
    )


def ablations(params: AblationParams) -> Experiment:
    """Sixteen combinations of eight choices; then the paper's and the authors' presets over all seeds."""
    rows = []
    for index in range(16):
        high, words = _levels(factors(), index)
        run = _combination(params, high)
        cells = accuracy_cells(params, (run,), autoattack=False)
        rows.append(Row(combination_row(index + 1), words, (run,), cells))
    paper, authors = (params.model_copy(update={"preset": preset}) for preset in ("paper", "author_code"))
    weight = params.lambda_iga * params.batch_size**1.5
    presets: dict[str, tuple[str, AblationParams, Method]] = {
        "paper": ("preset paper", paper, method_of(paper, KDIGA)),
        "author_code": ("preset author_code, the same nominal λ_IGA", authors, method_of(authors, KDIGA)),
        "author_code_effective": (
            "preset author_code, the same effective λ_IGA",
            authors,
            method_of(authors, KDIGA, lambda_iga=weight),
        ),
    }
    for name, (label, preset, method) in presets.items():
        runs = runs_per_seed(params, method, schedule=_ablation_schedule(preset), teacher=trades_teacher(params))
        rows.append(Row(name, label, runs, accuracy_cells(params, runs, autoattack=False)))
    return Experiment("ablations", "Which of the open choices matter", tuple(rows), params)


@dataclass(frozen=True)
class Effect:
    """The average effect of a choice: high level minus low level, in points, with its 95 % interval."""

    factor: Factor
    points: float
    low: float
    high: float


def main_effects(chosen: Sequence[Factor], values: Sequence[float]) -> list[Effect]:
    """Main effects of the design's factors from one value per combination, in the order of the combinations.

    Seven columns of the design carry interactions of two choices (in alias chains of four) and no main effect; the
    error is estimated from those columns. Real interactions therefore widen the interval and never narrow it.
    """
    n = len(values)
    if any(len(factor.signs) != n for factor in chosen):
        raise ValueError(f"a design of {len(chosen[0].signs)} combinations needs as many values, got {n}")

    def contrast(signs: Sequence[int]) -> float:
        return 2 * sum(sign * value for sign, value in zip(signs, values, strict=True)) / n

    pairs = {tuple(a * b for a, b in zip(one.signs, two.signs, strict=True)) for one, two in combinations(chosen, 2)}
    error = math.sqrt(sum(contrast(signs) ** 2 for signs in pairs) / len(pairs))
    reach = float(student_t.ppf(0.975, len(pairs))) * error
    effects = [(factor, contrast(factor.signs)) for factor in chosen]
    return [Effect(factor, points, points - reach, points + reach) for factor, points in effects]


def combination_row(number: int, loop: int = 1) -> str:
    """The row id of a combination (from 1), and of a later loop of it: combination_03, combination_03_loop_2."""
    return f"combination_{number:02d}" + (f"_loop_{loop}" if loop > 1 else "")


def worth_of_test_selection(experiment: Experiment) -> list[float]:
    """PGD-20 of the best epoch minus that of the last, in points, for every finished run selected on the test set."""
    runs = [run for row in experiment.rows for run in row.runs if run.schedule.selection == "best_on_test"]
    curves = [[row["selection_robust"] for row in history(run)] for run in runs]
    return [max(curve) - curve[-1] for curve in curves]


def pareto(params: ParetoParams) -> Experiment:
    """KDIGA+FGSM, fast adversarial training, and ARD at its authors' settings (α = 1, T = 30), at the same cost."""
    teacher, model = trades_teacher(params), params.fgsm_student
    fast, own = (
        fast_attack(params),
        ARD(training_attack(params), lambda_ce=0.0, lambda_kl=1.0, temperature=ARD_TEMPERATURE),
    )
    fgsm_schedule = schedule_of(params, params.fgsm_epochs)
    nets: dict[str, tuple[str, Method, Schedule, bool]] = {
        "fgsm_at": ("fast AT (FGSM, random start)", AT(fast), schedule_of(params, params.fgsm_at_epochs), False),
        "ard": (
            f"teacher → ARD, α = 1, T = {ARD_TEMPERATURE:g}",
            own,
            schedule_of(params, params.ard_epochs),
            True,
        ),
        "kdiga_fgsm": (
            "teacher → KDIGA+FGSM, aligned at x",
            method_of(params, KDIGA, attack=FGSM(params.train_epsilon)),
            fgsm_schedule,
            True,
        ),
        "kdiga_fgsm_at_delta": (
            "teacher → KDIGA+FGSM, aligned at x + δ",
            method_of(params, KDIGA_ARD_A, attack=fast),
            fgsm_schedule,
            True,
        ),
    }
    apgd = TestAccuracy(AutoAttack(params.epsilon, version="apgd"), params.apgd_images)
    rows = []
    for name, (label, method, schedule, distilled) in nets.items():
        extra: dict[str, Any] = {"teacher": teacher} if distilled else {}
        runs = runs_per_seed(params, method, model, schedule=schedule, **extra)
        cells = (
            *accuracy_cells(params, runs, autoattack=False),
            cell_of("apgd", runs, apgd),
            *autoattack_cells(params, runs, params.epsilon, "autoattack"),
        )
        rows.append(Row(name, label, runs, cells))
    return Experiment("pareto", "KDIGA+FGSM at the cost of adversarial training", tuple(rows), params)


# Kind of the study's rows -> what a reader sees, and the setting that the grid replaces.
WEIGHTED = {
    "kdiga": ("KDIGA", "lambda_iga"),
    "kdiga_shuffled": ("KDIGA, teacher's gradients shuffled", "lambda_iga"),
    "kdiga_zero": ("KD + gradient penalty", "lambda_zero"),
    "penalty": ("gradient penalty, no teacher", "lambda_penalty"),
    "isd_wot_1": ("ISD-WoT-1", "lambda_isd"),
}
# Table 1's rows beside the grid -> what a reader sees.
SINGLE = {
    "st": "ST",
    "kd": "KD",
    "ard": "ARD",
    "pgd_student": "PGD AT",
    "trades_teacher": "the teacher",
    "isd_wot_1_zero": "ISD-WoT-1, zero target",
}


def weighted_row(kind: str, weight: float) -> str:
    """The row id of a kind of ``WEIGHTED`` at a weight: kdiga_0p3."""
    return f"{kind}_{weight:g}".replace(".", "p")


def weights_of(params: AlignmentParams, kind: str) -> list[float]:
    """The weights at which a kind of ``WEIGHTED`` is trained."""
    return (params.isd_grid or [params.lambda_isd]) if kind == "isd_wot_1" else params.grid


def loop_rows(params: AlignmentParams) -> list[str]:
    """The row ids of the loops of ISD-WoT, at Table 1's weight."""
    return [isd_row("isd_wot", loop) for loop in range(1, params.loops + 1)]


def nearest_row(kind: str, params: AlignmentParams) -> str:
    """The row id of a kind at the weight of the grid that is closest to ``lambda_iga``."""
    return weighted_row(kind, min(params.grid, key=lambda weight: abs(weight - params.lambda_iga)))


# What is trained from each of the study's teachers.
TAUGHT = ("kd", "kdiga_zero", "kdiga")


def taught_row(kind: str, radius: float) -> str:
    """The row id of a student (a kind of ``TAUGHT``) or "teacher", by the radius of the teacher: kdiga_from_0p03."""
    return f"{kind}_from_{radius:g}".replace(".", "p")


def _weaker_teacher(params: AlignmentParams, radius: float) -> tuple[str, PerSeed]:
    """The teacher's net under PGD adversarial training at a radius of its own, or standard training at radius 0."""
    if radius == 0:
        return "ST", runs_per_seed(params, ST(), params.teacher, schedule=teacher_schedule(params))
    own = params.model_copy(update={"train_epsilon": radius, "train_step_size": 0.0})
    return f"AT ε = {radius:g}", pgd_teacher(own)


def alignment_or_penalty(params: AlignmentParams) -> Experiment:
    """KDIGA beside its controls over a grid of weights: is the gain the teacher's gradient, or a small gradient?

    Every net is measured clean, under PGD and under AutoAttack, the grid and the students of further teachers on every
    seed. The loops of ISD-WoT are those of Table 1. Beside the other students stand the mean norm of the input gradient
    and, where there is a robust teacher, the mean cosine to the teacher's gradient. KD, KDIGA and KDIGA with a zero
    target are also trained from weaker teachers (``teacher_radii``), both kinds of KDIGA at ``lambda_iga``.
    """
    gradients = Gradients(params.epsilon, params.gradient_images)
    trades = trades_teacher(params)

    def row(name: str, label: str, runs: Nets, compare: bool, teachers: Nets = trades) -> Row:
        cells = [_with_mask(cell) for cell in accuracy_cells(params if name in fixed else every_seed, runs, row=name)]
        if compare:
            cells += [_compared(key, runs, gradients, teachers, key) for key in ("norm", "cosine")]
        return Row(name, label, trained_runs(runs), tuple(cells))

    every_seed = params.model_copy(update={"autoattack_seeds": len(params.seeds)})
    fixed = table1_runs(params)
    compared = ("kd", "ard", "isd_wot_1_zero")
    rows = [row(name, *fixed[name], name in compared) for name in SINGLE]
    rows += [row(name, *fixed[name], False) for name in loop_rows(params)]
    for kind, (label, setting) in WEIGHTED.items():
        for weight in weights_of(params, kind):
            at_weight = params.model_copy(update={setting: weight})
            runs = table1_runs(at_weight)[kind][1]
            rows.append(row(weighted_row(kind, weight), f"{label}, λ = {weight:g}", runs, True))
    for radius in params.teacher_radii:
        words, teacher = _weaker_teacher(params, radius)
        rows.append(row(taught_row("teacher", radius), f"{params.teacher} ({words})", teacher, False))
        methods = method_of(params, KD), method_of(params, KDIGA, target_gradient="zero"), method_of(params, KDIGA)
        for kind, label, method in zip(TAUGHT, ("KD", "KD + gradient penalty", "KDIGA"), methods, strict=True):
            runs = runs_per_seed(params, method, teacher=teacher)
            rows.append(row(taught_row(kind, radius), f"{words} teacher → {label} → student", runs, True, teacher))
    title = "The teacher's gradient, or a small gradient?"
    return Experiment("alignment_or_penalty", title, tuple(rows), params)


# Levels of the search for ISD, low then high. Stronger levels make fresh students fail, and show little else.
ISD_LAMBDA_LEVELS, ISD_RATE_LEVELS = (1.0, 3.0), (1.0, 0.1)
PAPERS_RATE = 0.01  # μ of Appendix E


def isd_factors(params: IsdSearchParams) -> list[Factor]:
    """The choices of one ISD-WoT loop in the order of the design's columns; without a ReLU student, six."""
    weights, rates, dropouts = ISD_LAMBDA_LEVELS, ISD_RATE_LEVELS, DROPOUT_LEVELS
    levels: list[Level] = [
        ("lambda_isd", *(f"{value:g}" for value in weights), *(f"λ{value:g}" for value in weights)),
        ("init", "from the teacher", "fresh", "teacher", "fresh"),
        ("head_dropout", *(f"{value:g}" for value in dropouts), *(f"drop{value:g}" for value in dropouts)),
        ("iga_norm", "per_sample", "batch, same effective weight", "sample", "batch"),
        ("first teacher", "last epoch", "most robust epoch", "last", "robust"),
        ("learning_rate_decay", *(f"{value:g}" for value in rates), *(f"μ{value:g}" for value in rates)),
        ("activation", "GELU", "ReLU", "GELU", "ReLU"),
    ]
    return _design(levels if params.relu_student != NONE else levels[:-1])


def _first_net(params: IsdSearchParams, robust: bool, relu: bool) -> Run:
    """Loop 0: standard training; its last epoch, or the one that is most robust on held-out training images.

    The second stands for the authors' selection by PGD-20 on the test set, without its look at the test set.
    """
    schedule = schedule_of(params)
    if robust:
        schedule = replace(schedule, selection="validation", selection_epsilon=params.epsilon)
    model = params.relu_student if relu else params.student
    return Run(params.dataset, model, ST(), schedule, params.seeds[0])


def _searched(params: IsdSearchParams, high: dict[str, bool], loops: int) -> list[Run]:
    """Loops 0 … L of one combination."""
    weight = ISD_LAMBDA_LEVELS[high["lambda_isd"]]
    by_batch = {"norm": "batch", "lambda_iga": weight * params.batch_size**1.5}
    method = method_of(params, KDIGA, **(by_batch if high["iga_norm"] else {"lambda_iga": weight}))
    return isd_without_teacher(
        _first_net(params, high["first teacher"], high.get("activation", False)),
        method,
        loops,
        ISD_RATE_LEVELS[high["learning_rate_decay"]],
        DROPOUT_LEVELS[high["head_dropout"]],
        loop_schedule=schedule_of(params, params.isd_epochs),
        fresh=high["init"],
    )


def isd_search(params: IsdSearchParams) -> Experiment:
    """Does any setting make iterative self-distillation robust? Half a factorial, a grid of weights, the best for long.

    The validation columns, on held-out training images, choose the finalists; the test columns judge them.
    """
    pgd = evaluation_pgd(params.epsilon, params.pgd_steps, params.pgd_restarts)
    apgd = TestAccuracy(AutoAttack(params.epsilon, version="apgd"), params.apgd_images)
    gradients = Gradients(params.epsilon, params.gradient_images, steps=(0,), grid=3)
    rows: dict[str, Row] = {}

    def add(name: str, label: str, run: Run) -> None:
        cells = [
            cell_of("validation_clean", (run,), ValidationAccuracy()),
            cell_of(f"validation_pgd{params.pgd_steps}", (run,), ValidationAccuracy(pgd)),
            *accuracy_cells(params, (run,), autoattack=False),
            cell_of("apgd", (run,), apgd),
        ]
        if isinstance(run.teacher, Run):
            cells += [_compared(key, (run,), gradients, (run.teacher,), key) for key in ("norm", "cosine")]
        rows[name] = Row(name, label, (run,), tuple(cells))

    for robust, relu in product((False, True), (False, True) if params.relu_student != NONE else (False,)):
        words = ("most robust epoch" if robust else "last epoch") + (", ReLU" if relu else "")
        name = "st" + "_robust" * robust + "_relu" * relu
        add(name, f"loop 0: student (ST), {words}", _first_net(params, robust, relu))
    for number in range(1, 17):
        high, words = _levels(isd_factors(params), number - 1)
        last = params.loops if number in params.finalists else 1
        for loop, run in enumerate(_searched(params, high, last)[1:], 1):
            add(combination_row(number, loop), f"{words}, loop {loop}" if loop > 1 else words, run)
    first = _first_net(params, robust=False, relu=False)

    def one_loop(method: Method, decay: float = params.learning_rate_decay) -> Run:
        schedule = schedule_of(params, params.isd_epochs)
        run = isd_without_teacher(first, method, 1, decay, params.head_dropout, loop_schedule=schedule)[1]
        return run if method.needs_teacher else replace(run, teacher=None)

    for weight in params.weights:
        run = one_loop(method_of(params, KDIGA, lambda_iga=weight))
        add(weighted_row("isd_wot_1", weight), f"{isd_label('isd_wot', 1)}, λ = {weight:g}", run)
    middle = params.lambda_isd
    slow = one_loop(method_of(params, KDIGA, lambda_iga=middle), PAPERS_RATE)
    add("isd_wot_1_slow", f"{isd_label('isd_wot', 1)}, λ = {middle:g}, μ = {PAPERS_RATE:g}", slow)
    controls: dict[str, tuple[str, Method]] = {
        "isd_wot_1_zero": ("target gradient zero", method_of(params, KDIGA, lambda_iga=middle, target_gradient="zero")),
        "isd_wot_1_shuffled": (
            "gradients shuffled",
            method_of(params, KDIGA, lambda_iga=middle, target_gradient="shuffled"),
        ),
        "self_kd": ("no alignment (KD)", method_of(params, KD)),
        "self_st": ("no teacher (ST)", ST()),
    }
    for name, (words, method) in controls.items():
        add(name, f"control of {isd_label('isd_wot', 1)}: {words}", one_loop(method))
    title = "Does any setting make self-distillation robust?"
    return Experiment("isd_search", title, tuple(rows.values()), params)


def baselines(params: BaselineParams) -> Experiment:
    """KDIGA, its controls and the adversarial distillations since the paper: same teacher, attack and epochs.

    Each row has every seed, or the first if ``all_seeds_rows`` leaves it out. The later methods keep their authors'
    weights; IGDM's and SAAD's is ``lambda_igdm``. The other nets are those of Table 1.
    """
    attack, teacher = training_attack(params), trades_teacher(params)
    later = {
        "rslad": RSLAD(attack),
        "iad": IAD(attack),
        "adaad": AdaAD(attack),
        "igdm": IGDM(attack, lambda_igdm=params.lambda_igdm),
        "saad": SAAD(attack, lambda_igdm=params.lambda_igdm),
    }
    known = table1_runs(params)
    chosen = {name: known[name] for name in ("st", "trades_teacher", "pgd_student", "trades_student", "kd", "ard")}
    for name, method in later.items():
        runs = runs_per_seed(params, method, teacher=teacher)
        chosen[name] = (f"TRADES teacher → {type(method).__name__} → student", seeds_of_row(params, name, runs))
    for name in ("kdiga", "kdiga_zero", "kdiga_ard_c", "kdiga_ard_a", "penalty"):
        chosen[name] = known[name]
    chosen |= {name: one for name, one in known.items() if isd_chain(name)}
    rows = []
    for name, (label, runs) in chosen.items():
        cells = tuple(_with_mask(cell) for cell in accuracy_cells(params, runs, row=name))
        rows.append(Row(name, label, trained_runs(runs), cells))
    return Experiment("baselines", "KDIGA beside its controls and later distillations", tuple(rows), params)


def _with_mask(cell: Cell) -> Cell:
    """The cell for paired comparisons, which need to know which images were withstood."""
    jobs = tuple(replace(job, measure=replace(job.measure, needs_mask=True)) for job in cell.jobs)  # pyright: ignore
    return replace(cell, jobs=jobs)
