"""Figure 1 and Tables 1 to 6 of the paper, each as an experiment: rows of runs and cells."""

from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from typing import Any

from kdiga_nb.artifacts import reported
from kdiga_nb.artifacts.recipes import (
    PENALTIES,
    accuracy_cells,
    autoattack_cells,
    clean_cell,
    fast_attack,
    isd_label,
    isd_row,
    isd_wit_runs,
    isd_wot_runs,
    method_of,
    pgd_cell,
    pgd_teacher,
    published_nets,
    runs_per_seed,
    schedule_of,
    standard_training,
    table1_runs,
    trades_teacher,
    trained_runs,
)
from kdiga_nb.artifacts.table import Cell, Experiment, Nets, Row
from kdiga_nb.attacks.gradient import FGSM
from kdiga_nb.measures import Bounds
from kdiga_nb.methods import AT, KD, KDIGA, ST, Method
from kdiga_nb.params import NONE, Table1Params, Table2Params, Table3Params, Table4Params, Table5Params, Table6Params
from kdiga_nb.runs import checkpoints
from kdiga_nb.runs.graph import Job
from kdiga_nb.training import Schedule


def table1(params: Table1Params) -> Experiment:
    """Table 1: clean and robust accuracy of every method."""
    rows, last_wit = [], isd_row("isd_wit", params.wit_loops)
    for name, (label, runs) in table1_runs(params).items():
        # The paper's only ISD-WiT row, which does not say its loop, stands at the last loop.
        known = "isd_wit" if name == last_wit else name
        cells = accuracy_cells(params, runs, row=name) if runs else ()
        paper, note = reported.TABLE1.get(known, {}), reported.NOTES.get(known, "")
        rows.append(Row(name, label, trained_runs(runs), cells, paper, note))
    return Experiment("table1", "Table 1. Clean and robust accuracy of every method", tuple(rows), params)


def figure1(params: Table1Params) -> Experiment:
    """Figure 1: the students of Table 1 in the plane of clean and robust accuracy."""
    others = {"igam_tinyimagenet", "igam_mnist", "pgd_teacher", "trades_teacher", "penalty_wide"}
    rows = tuple(row for row in table1(params).rows if row.id not in others)
    return Experiment("figure1", "Figure 1. Clean against robust accuracy of the student", rows, params)


def table3(params: Table3Params) -> Experiment:
    """Table 3: the terms of Proposition 2 for students of the TRADES teacher, and for two gradient penalties.

    The penalties are controls that the paper lacks. Their terms, too, are against the TRADES teacher's gradient.
    """
    runs = table1_runs(params)
    measure = Bounds(params.epsilon, params.bound_images or None, params.llm_steps)
    keys = ["llm_half_eps", "llm_eps", "llm_eps_teacher", "cross_entropy", "cross_entropy_teacher"]
    keys += ["gradient_distance", "gradient_distance_l1", "gradient_distance_batch", "bound", "gap", "violations"]
    rows = []
    for name in (*reported.TABLE3, *PENALTIES):
        label, students = runs[name]
        jobs = tuple(Job(run, measure, teacher) for run, teacher in zip(students, trades_teacher(params), strict=False))
        cells = tuple(Cell(key, jobs, key) for key in keys)
        cells = (*cells, *accuracy_cells(params, students))
        rows.append(Row(name, label, trained_runs(students), cells, reported.TABLE3.get(name, {})))
    return Experiment("table3", "Table 3. The terms of Proposition 2", tuple(rows), params)


def table4(params: Table4Params) -> Experiment:
    """Table 4: ISD with and without dropout before the last layer: ISD-WoT as in the paper, and ISD-WiT."""
    rows = []
    for dropout in (True, False):
        words = "with dropout" if dropout else "without dropout"
        for loop, runs in enumerate(isd_wot_runs(params, dropout), 1):
            name, label = isd_row("isd_wot", loop, dropout), f"{isd_label('isd_wot', loop)}, {words}"
            cells = accuracy_cells(params, runs, autoattack=dropout or loop == params.loops)
            rows.append(Row(name, label, runs, cells, reported.TABLE4.get(name, {})))
        for loop, runs in enumerate(isd_wit_runs(params, params.wit_loops, dropout), 1):
            cells = accuracy_cells(params, runs, autoattack=dropout)
            name, label = isd_row("isd_wit", loop, dropout), f"{isd_label('isd_wit', loop)}, {words}"
            rows.append(Row(name, label, runs, cells))
    return Experiment("table4", "Table 4. Head dropout in iterative self-distillation", tuple(rows), params)


def table5(params: Table5Params) -> Experiment:
    """Table 5: KDIGA+FGSM; for comparison, fast adversarial training of the same net, which the paper does not show."""
    model = params.fgsm_student
    schedule = replace(
        schedule_of(params, params.fgsm_epochs, learning_rate=params.fgsm_learning_rate, policy="one_cycle"),
        weight_decay=params.fgsm_weight_decay,
    )
    teacher, fast = trades_teacher(params), fast_attack(params)
    specs: list[tuple[str, str, Method, bool]] = [
        ("kdiga_fgsm", "teacher → KDIGA+FGSM", method_of(params, KDIGA, attack=FGSM(params.train_epsilon)), True),
        ("kdiga_fgsm_random", "teacher → KDIGA+FGSM, random start", method_of(params, KDIGA, attack=fast), True),
        (
            "kdiga_fgsm_perturbed",
            "teacher → KDIGA+FGSM, all losses at x + δ",
            method_of(params, KDIGA, attack=fast, align_at="perturbed"),
            True,
        ),
        ("fgsm_at", "fast AT (FGSM, random start)", AT(fast), False),
        ("kdiga_plain", "teacher → KDIGA", method_of(params, KDIGA), True),
    ]
    rows = []
    for name, label, method, distilled in specs:
        extra: dict[str, Any] = {"teacher": teacher} if distilled else {}
        runs = runs_per_seed(params, method, model, schedule=schedule, **extra)
        cells = accuracy_cells(params, runs)
        rows.append(Row(name, label, runs, cells, reported.TABLE5.get(name, {})))
    return Experiment("table5", "Table 5. KDIGA+FGSM under AutoAttack", tuple(rows), params)


def _students_and_teachers(params: Table2Params) -> dict[str, tuple[str, Nets, Nets]]:
    """Rows of Tables 2 and 6: id -> label, students, teachers. A row that the scale does not run has no nets."""
    small, kd, kdiga = params.student, method_of(params, KD), method_of(params, KDIGA)

    def transformer_schedule(epochs: int, learning_rate: float) -> Schedule:
        schedule = schedule_of(params, epochs, learning_rate=learning_rate)
        return replace(schedule, optimizer=params.vit_optimizer, weight_decay=params.vit_weight_decay)

    def distilled(teachers: Nets, name: str, method: Method, student: str) -> tuple[str, Nets, Nets]:
        label = f"{name} → {type(method).__name__} → {student}"
        return label, runs_per_seed(params, method, student, teacher=teachers) if teachers else (), teachers

    def published_teacher(net: str, words: str) -> tuple[str, Nets, Nets]:
        teachers = () if net == NONE else published_nets(params, f"timm:{checkpoints.PUBLISHED}", net)
        return distilled(teachers, f"{words if net == NONE else net} (ST)", kdiga, small)

    if params.vit_checkpoint:
        vit = published_nets(params, params.vit_checkpoint, params.vit)
    else:
        scratch = transformer_schedule(params.vit_epochs, params.vit_learning_rate)
        vit = runs_per_seed(params, ST(), params.vit, schedule=scratch)
    if params.teacher_checkpoint:
        robust = published_nets(params, params.teacher_checkpoint, params.teacher)
    else:
        robust = pgd_teacher(params)
    vit_kdiga = method_of(params, KDIGA, lambda_iga=params.vit_lambda_iga)
    finetune = transformer_schedule(params.finetune_epochs, params.finetune_learning_rate)
    tuned = runs_per_seed(params, vit_kdiga, params.vit, schedule=finetune, teacher=robust, init=vit)
    st, at = f"{params.vit} (ST)", f"{params.teacher} (AT)"
    return {
        "st_cnn": (f"{small} (ST)", standard_training(params), ()),
        "st_vit": (st, vit, ()),
        "kd_vit_to_cnn": distilled(vit, st, kd, small),
        "kdiga_vit_to_cnn": distilled(vit, st, kdiga, small),
        "kdiga_vit_base_to_cnn": published_teacher(params.vit_base, "larger ViT"),
        "kdiga_vit_large_to_cnn": published_teacher(params.vit_large, "largest ViT"),
        "kdiga_deit_to_cnn": published_teacher(params.deit, "distilled ViT"),
        "kd_cnn_to_cnn": distilled(robust, at, kd, small),
        "kdiga_cnn_to_cnn": distilled(robust, at, kdiga, small),
        "kdiga_cnn_to_medium": distilled(robust, at, kdiga, params.student_medium),
        "kdiga_cnn_to_wide": distilled(robust, at, kdiga, params.teacher),
        "kdiga_cnn_to_large": distilled(robust, at, kdiga, params.student_large),
        "kdiga_finetune_cnn_to_vit": (f"{at} → KDIGA, fine-tuned → {st}", tuned, robust),
    }


def _student_and_teacher_rows(
    params: Table2Params, paper: dict[str, dict[str, float]], cells: Callable[[Nets, str], tuple[Cell, ...]]
) -> tuple[Row, ...]:
    """One row per entry of ``paper``; ``cells`` takes nets and the prefix of their metrics."""
    nets = _students_and_teachers(params)
    rows = []
    for name, numbers in paper.items():
        label, students, teachers = nets[name]
        measured = (*(cells(students, "") if students else ()), *(cells(teachers, "teacher_") if teachers else ()))
        reported_here = reported.at_radii(numbers, params.radii)
        rows.append(Row(name, label, trained_runs(students), measured, reported_here, reported.NOTES.get(name, "")))
    return tuple(rows)


def table2(params: Table2Params) -> Experiment:
    """Table 2: distillation between CNNs and vision transformers, students and teachers under PGD at several radii."""

    def cells(nets: Nets, prefix: str) -> tuple[Cell, ...]:
        return (clean_cell(params, nets, prefix), *(pgd_cell(params, nets, prefix, radius) for radius in params.radii))

    rows = _student_and_teacher_rows(params, reported.TABLE2, cells)
    return Experiment("table2", "Table 2. Between CNNs and vision transformers", rows, params)


def table6(params: Table6Params) -> Experiment:
    """Table 6: nets of Table 2, students and teachers under AutoAttack at several radii."""

    def cells(nets: Nets, prefix: str) -> tuple[Cell, ...]:
        attacked = [autoattack_cells(params, nets, radius, f"{prefix}autoattack@{radius:g}") for radius in params.radii]
        return (clean_cell(params, nets, prefix), *chain.from_iterable(attacked))

    rows = _student_and_teacher_rows(params, reported.TABLE6, cells)
    return Experiment("table6", "Table 6. Between CNNs and vision transformers, under AutoAttack", rows, params)
