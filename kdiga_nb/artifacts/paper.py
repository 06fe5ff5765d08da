"""TODO"""

from dataclasses import replace
from typing import Any

from kdiga_nb.artifacts import reported
from kdiga_nb.artifacts.recipes import (
    accuracy_cells,
    autoattack_cells,
    cell_of,
    isd_wit_runs,
    isd_wot_runs,
    method_of,
    pgd_teacher,
    published_nets,
    runs_per_seed,
    schedule_of,
    standard_training,
    table1_runs,
    trades_teacher,
    trained_runs,
)
from kdiga_nb.artifacts.table import Cell, Experiment, Nets, PerSeed, Row
from kdiga_nb.attacks.gradient import FGSM, PGD, evaluation_pgd
from kdiga_nb.measures import Bounds, TestAccuracy
from kdiga_nb.methods import AT, KD, KDIGA, ST, Method
from kdiga_nb.params import NONE, Table1Params, Table2Params, Table3Params, Table4Params, Table5Params, Table6Params
from kdiga_nb.runs import checkpoints
from kdiga_nb.runs.graph import Job
from kdiga_nb.training import Schedule


def table1(params: Table1Params) -> Experiment:
    """Table 1: clean and robust accuracy of every method."""
    rows = []
    for name, (label, runs) in table1_runs(params).items():
        paper = reported.TABLE1.get(name, {})
        note = reported.NOTES.get(name, "")
        if name == f"isd_wit_{params.wit_loops}":
            paper, note = reported.TABLE1["isd_wit"], reported.NOTES["isd_wit"]
        cells = accuracy_cells(params, runs) if runs else ()
        rows.append(Row(name, label, trained_runs(runs), cells, paper, note))
    return Experiment("table1", "Table 1. Clean and robust accuracy of every method", tuple(rows), params)


def figure1(params: Table1Params) -> Experiment:
    """Figure 1: the students of Table 1 in the plane of clean and robust accuracy."""
    others = {"igam_tinyimagenet", "igam_mnist", "pgd_teacher", "trades_teacher"}
    rows = tuple(row for row in table1(params).rows if row.id not in others)
    return Experiment("figure1", "Figure 1. Clean against robust accuracy of the student", rows, params)


def table3(params: Table3Params) -> Experiment:
    """Table 3: the terms of Proposition 2, against the TRADES teacher."""
    runs = table1_runs(params)
    measure = Bounds(params.epsilon, params.bound_images or None, params.llm_steps)
    keys = ["llm_half_eps", "llm_eps", "llm_eps_teacher", "cross_entropy", "cross_entropy_teacher"]
    keys += ["gradient_distance", "gradient_distance_l1", "gradient_distance_batch", "bound", "gap", "violations"]
    rows = []
    for name in reported.TABLE3:
        label, students = runs[name]
        jobs = tuple(Job(run, measure, teacher) for run, teacher in zip(students, trades_teacher(params), strict=True))
        cells = tuple(Cell(key, jobs, key) for key in keys)
        cells = (*cells, *accuracy_cells(params, students))
        rows.append(Row(name, label, trained_runs(students), cells, reported.TABLE3[name]))
    return Experiment("table3", "Table 3. The terms of Proposition 2", tuple(rows), params)


def table4(params: Table4Params) -> Experiment:
    """Table 4: ISD with and without dropout before the last layer; WoT as in the paper, WiT beside it."""
    rows = []
    for suffix, dropout in (("", True), ("_no_dropout", False)):
        words = "with dropout" if dropout else "without dropout"
        for loop, runs in enumerate(isd_wot_runs(params, dropout), 1):
            name = f"isd_wot_{loop}{suffix}"
            cells = accuracy_cells(params, runs, autoattack=dropout or loop == params.loops)
            rows.append(Row(name, f"ISD-WoT-{loop}, {words}", runs, cells, reported.TABLE4.get(name, {})))
        for loop, runs in enumerate(isd_wit_runs(params, params.wit_loops, dropout), 1):
            cells = accuracy_cells(params, runs, autoattack=dropout)
            rows.append(Row(f"isd_wit_{loop}{suffix}", f"ISD-WiT-{loop}, {words}", runs, cells))
    return Experiment("table4", "Table 4. Head dropout in iterative self-distillation", tuple(rows), params)


def table5(params: Table5Params) -> Experiment:
    """Table 5: KDIGA+FGSM, beside fast adversarial training of the same net, which the paper does not show."""
    model = params.fgsm_student
    schedule = replace(
        schedule_of(params, params.fgsm_epochs, learning_rate=params.fgsm_learning_rate, policy="one_cycle"),
        weight_decay=params.fgsm_weight_decay,
    )
    teacher = trades_teacher(params)
    # One step of 1.25 ε from a random start is fast adversarial training (Wong et al. 2020).
    fast = PGD(params.train_epsilon, min(1.25 * params.train_epsilon, 1.0), 1)
    specs: list[tuple[str, str, Method, bool]] = [
        ("kdiga_fgsm", "teacher → KDIGA+FGSM", method_of(params, KDIGA, attack=FGSM(params.train_epsilon)), True),
        ("kdiga_fgsm_random", "teacher → KDIGA+FGSM, random start", method_of(params, KDIGA, attack=fast), True),
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


def _vit_schedule(params: Table2Params) -> Schedule:
    return _for_vit(params, schedule_of(params, params.vit_epochs, learning_rate=params.vit_learning_rate))


def _for_vit(params: Table2Params, schedule: Schedule) -> Schedule:
    return replace(schedule, optimizer=params.vit_optimizer, weight_decay=params.vit_weight_decay)


def _table2_runs(params: Table2Params) -> dict[str, tuple[str, Nets, Nets]]:
    """Row id -> label, students, teachers. Rows of the paper's table without a stand-in are missing."""
    small, medium, large, wide = params.student, params.student_medium, params.student_large, params.teacher
    if params.vit_checkpoint:
        vit = published_nets(params, params.vit_checkpoint, params.vit)
    else:
        vit = runs_per_seed(params, ST(), params.vit, schedule=_vit_schedule(params))
    if params.teacher_checkpoint:
        robust = published_nets(params, params.teacher_checkpoint, params.teacher)
    else:
        robust = pgd_teacher(params)
    kd, kdiga = method_of(params, KD), method_of(params, KDIGA)
    finetune = schedule_of(params, params.finetune_epochs, learning_rate=params.finetune_learning_rate)
    finetune = _for_vit(params, finetune)

    def students(method: Method, teacher: Nets, model: str) -> PerSeed:
        return runs_per_seed(params, method, model, teacher=teacher)

    vit_kdiga = method_of(params, KDIGA, lambda_iga=params.vit_lambda_iga)
    tuned = runs_per_seed(params, vit_kdiga, params.vit, schedule=finetune, teacher=robust, init=vit)
    rows: dict[str, tuple[str, Nets, Nets]] = {
        "st_cnn": (f"{small} (ST)", standard_training(params), ()),
        "st_vit": (f"{params.vit} (ST)", tuple(dict.fromkeys(vit)), ()),
        "kd_vit_to_cnn": (f"ViT (ST) → KD → {small}", students(kd, vit, small), vit),
        "kdiga_vit_to_cnn": (f"ViT (ST) → KDIGA → {small}", students(kdiga, vit, small), vit),
        "kd_cnn_to_cnn": (f"CNN (AT) → KD → {small}", students(kd, robust, small), robust),
        "kdiga_cnn_to_cnn": (f"CNN (AT) → KDIGA → {small}", students(kdiga, robust, small), robust),
        "kdiga_cnn_to_medium": (f"CNN (AT) → KDIGA → {medium}", students(kdiga, robust, medium), robust),
        "kdiga_cnn_to_wide": (f"CNN (AT) → KDIGA → {wide}", students(kdiga, robust, wide), robust),
        "kdiga_cnn_to_large": (f"CNN (AT) → KDIGA → {large}", students(kdiga, robust, large), robust),
        "kdiga_finetune_cnn_to_vit": ("CNN (AT) → KDIGA, fine-tuned → pre-trained ViT", tuned, robust),
    }
    for name, net in (("vit_base", params.vit_base), ("vit_large", params.vit_large), ("deit", params.deit)):
        if net != NONE:
            teachers = published_nets(params, f"timm:{checkpoints.PUBLISHED}", net)
            row = f"kdiga_{name}_to_cnn"
            rows[row] = (_NOT_RUN[row].replace("ResNet18", small), students(kdiga, teachers, small), teachers)
    return rows


_NOT_RUN = {
    "kdiga_vit_base_to_cnn": "ViT-B/16 (ST) → KDIGA → ResNet18",
    "kdiga_vit_large_to_cnn": "ViT-L/16 (ST) → KDIGA → ResNet18",
    "kdiga_deit_to_cnn": "DeiT-S/16 (ST) → KDIGA → ResNet18",
}


def _radius(radius: float) -> str:
    return f"{radius:g}"


def _paper_at(row: dict[str, float], paper_radii: tuple[str, ...], radii: list[float]) -> dict[str, float]:
    """The paper's numbers under our metric names: at its own radii, else from the largest down beside ours."""
    ours = [_radius(r) for r in sorted(radii, reverse=True)]
    renamed = dict(zip(reversed(paper_radii), ours, strict=False))
    if set(paper_radii) <= set(ours):
        renamed = {radius: radius for radius in paper_radii}
    result = {}
    for metric, value in row.items():
        name, separator, radius = metric.partition("@")
        if not separator or radius in renamed:
            result[f"{name}@{renamed[radius]}" if separator else name] = value
    return result


def table2(params: Table2Params) -> Experiment:
    """Table 2: distillation between CNNs and vision transformers, PGD at several radii; teachers in brackets."""
    images = params.test_images or None

    def cells(runs: Nets, prefix: str = "") -> tuple[Cell, ...]:
        found = [cell_of(f"{prefix}clean", runs, TestAccuracy(None, images))]
        for radius in params.radii:
            pgd = evaluation_pgd(radius, params.pgd_steps, params.pgd_restarts)
            found.append(cell_of(f"{prefix}pgd{params.pgd_steps}@{_radius(radius)}", runs, TestAccuracy(pgd, images)))
        return tuple(found)

    rows, runs = [], _table2_runs(params)
    for name, numbers in reported.TABLE2.items():
        paper = _paper_at(numbers, ("0.001", "0.01"), params.radii)
        note = reported.NOTES.get(name, "")
        if name in runs:
            label, students, teachers = runs[name]
            measured = cells(students) + (cells(teachers, "teacher_") if teachers else ())
            rows.append(Row(name, label, trained_runs(students), measured, paper, note=note))
        else:
            rows.append(Row(name, _NOT_RUN[name], reported=paper, note=note))
    return Experiment("table2", "Table 2. Between CNNs and vision transformers", tuple(rows), params)


def table6(params: Table6Params) -> Experiment:
    """Table 6: nets of Table 2 under AutoAttack at several radii; teachers in brackets."""
    rows, runs = [], _table2_runs(params)
    images = params.test_images or None
    for name, numbers in reported.TABLE6.items():
        paper = _paper_at(numbers, reported.TABLE6_RADII, params.radii)
        note = reported.NOTES.get(name, "")
        if name not in runs:
            rows.append(Row(name, _NOT_RUN[name], reported=paper, note=note))
            continue
        label, students, teachers = runs[name]
        measured: tuple[Cell, ...] = ()
        for nets, prefix in ((students, ""), (teachers, "teacher_")):
            if nets:
                measured += (cell_of(f"{prefix}clean", nets, TestAccuracy(None, images)),)
                for radius in params.radii:
                    measured += autoattack_cells(params, nets, radius, f"{prefix}autoattack@{_radius(radius)}")
        rows.append(Row(name, label, trained_runs(students), measured, paper, note=note))
    return Experiment("table6", "Table 6. Between CNNs and vision transformers, under AutoAttack", tuple(rows), params)
