"""The paper's tables as code: ``table1(params) -> Experiment``, a row a net, a cell a measured number.

A row's runs are values, so tables share what they have in common: Figure 1 and Table 3 stand on Table 1's runs, and
Table 6 on Table 2's. To add a row, add it here; reports, figures and the command follow. Rows that a scale has no net
for keep the paper's number and are marked "not run".
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from kdiga_nb import reported
from kdiga_nb.attacks import FGSM, PGD, AutoAttack
from kdiga_nb.isd import isd_with_teacher, isd_without_teacher
from kdiga_nb.methods import (
    ARD,
    AT,
    IGAM,
    KD,
    KDIGA,
    KDIGA_ARD_A,
    KDIGA_ARD_C,
    ST,
    TRADES,
    Method,
    effective_lambda_iga,
    with_preset,
)
from kdiga_nb.metrics import Bounds, Measure, TestAccuracy
from kdiga_nb.params import (
    IsdParams,
    Params,
    Table1Params,
    Table2Params,
    Table3Params,
    Table4Params,
    Table5Params,
    Table6Params,
)
from kdiga_nb.runs import Job, Run
from kdiga_nb.training import Schedule

PerSeed = tuple[Run, ...]


@dataclass(frozen=True)
class Cell:
    """One number of a table: ``key`` of what each job measures; the jobs are one a seed."""

    metric: str
    jobs: tuple[Job, ...]
    key: str = "percent"

    @property
    def is_accuracy(self) -> bool:
        """Whether the number is a share of images."""
        return self.key == "percent"


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        id, label: a stable snake_case name, and what a reader sees.
        runs: the trained nets, one a seed; empty if the scale has none ("not run").
        cells: what is measured on them.
        reported: the paper's numbers by metric.
        adversarial: whether training used adversarial examples ("Adv" in Table 1).
        note: what a reader must know to compare.
    """

    id: str
    label: str
    runs: PerSeed = ()
    cells: tuple[Cell, ...] = ()
    reported: dict[str, float] = field(default_factory=dict, hash=False)
    adversarial: bool = False
    note: str = ""

    @property
    def weights(self) -> tuple[float, float] | None:
        """Nominal and effective λ_IGA, for the methods that have one."""
        if not self.runs or not hasattr(self.runs[0].method, "lambda_iga"):
            return None
        run = self.runs[0]
        return getattr(run.method, "lambda_iga"), effective_lambda_iga(run.method, run.schedule.batch_size)  # noqa: B009


@dataclass(frozen=True)
class Experiment:
    """An artefact of the paper: its rows, and the parameters they were built from."""

    name: str
    title: str
    rows: tuple[Row, ...]
    params: Params

    def jobs(self) -> list[Job]:
        """Everything that must be trained and measured."""
        trained = [Job(run) for row in self.rows for run in row.runs]
        return list(dict.fromkeys(trained + [job for row in self.rows for cell in row.cells for job in cell.jobs]))

    def row(self, name: str) -> Row:
        """The row of that id.

        Raises:
            ValueError: there is none.
        """
        for row in self.rows:
            if row.id == name:
                return row
        raise ValueError(f"row must be one of {', '.join(row.id for row in self.rows)}, got {name!r}")


# ---- what the rows are made of ----


def _schedule(
    params: Params, epochs: int | None = None, *, learning_rate: float | None = None, trainable: str = "all"
) -> Schedule:
    epochs = epochs or params.epochs
    selection = "best_on_test" if params.preset == "author_code" else params.selection
    return Schedule(
        epochs=epochs,
        batch_size=params.batch_size,
        policy=params.policy,
        milestones=tuple(milestone for milestone in params.milestones if milestone < epochs),
        compounding=params.preset != "author_code",
        weight_decay=params.weight_decay,
        clip_norm=params.clip_norm,
        augment=params.augment,
        selection=selection,
        selection_epsilon=0.0 if selection == "last" else params.epsilon,
        learning_rate=learning_rate or params.learning_rate,
        trainable=trainable,
    )


def _method(params: Params, method: type[Method], **fields: Any) -> Method:
    """A distillation method with the weights, temperature and switches of the parameters."""
    known = method.__dataclass_fields__  # pyright: ignore[reportAttributeAccessIssue]
    shared: dict[str, Any] = {
        "lambda_ce": params.lambda_ce,
        "lambda_kl": params.lambda_kl,
        "lambda_iga": params.lambda_iga,
        "temperature": params.temperature,
    }
    if params.iga_norm != "preset":
        shared["norm"] = params.iga_norm
    return with_preset(method, params.preset, **({k: v for k, v in shared.items() if k in known} | fields))


def _train_attack(params: Params) -> PGD:
    """Adversarial training's attack: steps of ε/3 or longer, so that the last iterate can reach the ball's surface."""
    return PGD(params.train_epsilon, params.train_epsilon / min(params.train_steps, 3), params.train_steps)


def _runs(params: Params, method: Method, model: str | None = None, **changes: Any) -> PerSeed:
    """The same training for every seed. Teachers and starting points in ``changes`` are per seed themselves."""
    model = model or params.student
    schedule = changes.pop("schedule", None) or _schedule(params)
    per_seed = {name: value for name, value in changes.items() if isinstance(value, tuple)}
    fixed = {"dataset": params.dataset} | {k: v for k, v in changes.items() if k not in per_seed}
    return tuple(
        Run(
            model=model,
            method=method,
            schedule=schedule,
            seed=seed,
            **fixed,
            **{name: value[index] for name, value in per_seed.items()},
        )
        for index, seed in enumerate(params.seeds)
    )


def _standard(params: Params, model: str | None = None) -> PerSeed:
    return _runs(params, ST(), model)


def _trades(params: Params) -> PerSeed:
    schedule = _schedule(params, params.teacher_epochs)
    return _runs(params, TRADES(_train_attack(params), params.beta), params.teacher, schedule=schedule)


def _pgd_at(params: Params) -> PerSeed:
    schedule = _schedule(params, params.teacher_epochs)
    return _runs(params, AT(_train_attack(params)), params.teacher, schedule=schedule)


def _accuracy_cells(params: Params, runs: PerSeed, prefix: str = "", autoattack: bool = True) -> tuple[Cell, ...]:
    """Clean accuracy, PGD of the paper's step 2ε/steps, and AutoAttack where it is asked for."""
    images = params.test_images or None
    pgd = PGD(params.epsilon, 2 * params.epsilon / params.pgd_steps, params.pgd_steps, restarts=params.pgd_restarts)
    cells = [
        _cell(f"{prefix}clean", runs, TestAccuracy(None, images)),
        _cell(f"{prefix}pgd{params.pgd_steps}", runs, TestAccuracy(pgd, images)),
    ]
    return (*cells, *(_autoattack_cells(params, runs, params.epsilon, f"{prefix}autoattack") if autoattack else ()))


def _autoattack_cells(params: Params, runs: PerSeed, epsilon: float, metric: str) -> tuple[Cell, ...]:
    if not params.autoattack_images or not params.autoattack_seeds:
        return ()
    measure = TestAccuracy(AutoAttack(epsilon), params.autoattack_images)
    return (_cell(metric, runs[: params.autoattack_seeds], measure),)


def _cell(metric: str, runs: PerSeed, measure: Measure) -> Cell:
    return Cell(metric, tuple(Job(run, measure) for run in runs))


# ---- Table 1, Figure 1, Table 3, Table 4 ----


def _isd_without_teacher(params: IsdParams, dropout: bool) -> list[PerSeed]:
    """Loops 1 … L, each one run a seed."""
    method = _method(params, KDIGA, lambda_iga=params.lambda_isd)
    chains = []
    for first in _standard(params):
        # The first net of a chain is the table's ST net; the loops have their own number of epochs.
        chain = isd_without_teacher(
            first, method, params.loops, params.learning_rate_decay, params.head_dropout if dropout else 0.0
        )
        chains.append(_with_epochs(chain, params))
    return [tuple(chain[loop] for chain in chains) for loop in range(1, params.loops + 1)]


def _isd_with_teacher(params: IsdParams, loops: int, dropout: bool) -> list[PerSeed]:
    first = _method(params, KDIGA)
    method = _method(params, KDIGA, lambda_iga=params.lambda_isd)
    chains = []
    for student, teacher in zip(_standard(params), _trades(params), strict=True):
        rate = params.head_dropout if dropout else 0.0
        chain = isd_with_teacher(student, teacher, first, loops, params.learning_rate_decay, rate)
        chains.append(_with_epochs(chain, params, method))
    return [tuple(chain[loop] for chain in chains) for loop in range(loops)]


def _with_epochs(chain: list[Run], params: IsdParams, method: Method | None = None) -> list[Run]:
    """The chain with the loops' own epochs (and, after the first run, their own method) put in."""
    changed = [chain[0]]
    for run in chain[1:]:
        schedule = replace(_schedule(params, params.isd_epochs), learning_rate=run.schedule.learning_rate)
        previous = changed[-1]
        changed.append(replace(run, schedule=schedule, method=method or run.method, teacher=previous, init=previous))
    return changed


def _table1_runs(params: Table1Params) -> dict[str, tuple[str, PerSeed, bool]]:
    """Row id -> label, runs, whether adversarial examples are trained on."""
    attack = _train_attack(params)
    teacher = _trades(params)
    wide, small = params.teacher, params.student
    rows: dict[str, tuple[str, PerSeed, bool]] = {
        "st": ("student (ST)", _standard(params), False),
        "kd": ("TRADES teacher → KD → student", _runs(params, _method(params, KD), teacher=teacher), False),
        "ard": (
            "TRADES teacher → ARD → student",
            _runs(params, _method(params, ARD, attack=attack), teacher=teacher),
            True,
        ),
    }
    sources = {"igam_tinyimagenet": params.source_tinyimagenet, "igam_mnist": params.source_mnist}
    for name, source in sources.items():
        rows[name] = (f"PGD teacher of {source} → IGAM → wide net", _igam(params, source), True)
    rows |= {
        "pgd7_teacher": (f"{wide} (PGD-{attack.steps} AT)", _pgd_at(params), True),
        "trades_teacher": (f"{wide} (TRADES), the teacher", teacher, True),
        "pgd7_student": (f"{small} (PGD-{attack.steps} AT)", _runs(params, AT(attack)), True),
        "trades_student": (f"{small} (TRADES)", _runs(params, TRADES(attack, params.beta)), True),
        "kdiga": ("TRADES teacher → KDIGA → student", _kdiga(params), False),
        "kdiga_ard_c": (
            "TRADES teacher → KDIGA-ARD_C → student",
            _runs(params, _method(params, KDIGA_ARD_C, attack=attack), teacher=teacher),
            True,
        ),
        "kdiga_ard_a": (
            "TRADES teacher → KDIGA-ARD_A → student",
            _runs(params, _method(params, KDIGA_ARD_A, attack=attack), teacher=teacher),
            True,
        ),
    }
    for loop, runs in enumerate(_isd_with_teacher(params, params.wit_loops, dropout=True), 1):
        rows[f"isd_wit_{loop}"] = (f"TRADES teacher → ISD-WiT-{loop}", runs, False)
    for loop, runs in enumerate(_isd_without_teacher(params, dropout=True), 1):
        rows[f"isd_wot_{loop}"] = (f"ISD-WoT-{loop}", runs, False)
    return rows


def _kdiga(params: Params) -> PerSeed:
    return _runs(params, _method(params, KDIGA), teacher=_trades(params))


def _igam(params: Table1Params, source: str) -> PerSeed:
    """IGAM: a PGD-trained teacher of another task, its last layer fine-tuned on this one, then gradients matched."""
    robust = tuple(replace(run, dataset=source) for run in _pgd_at(params))
    head = _schedule(params, params.head_epochs, trainable="head")
    teacher = _runs(params, ST(), params.teacher, schedule=head, init=robust)
    method = IGAM(lambda_adv=params.lambda_adv, lambda_diff=params.lambda_diff)
    return _runs(params, method, params.teacher, teacher=teacher)


def table1(params: Table1Params) -> Experiment:
    """Table 1: clean and robust accuracy of every method."""
    rows = []
    for name, (label, runs, adversarial) in _table1_runs(params).items():
        paper = reported.TABLE1.get(name, {})
        note = reported.NOTES.get(name, "")
        if name == f"isd_wit_{params.wit_loops}":
            paper, note = reported.TABLE1["isd_wit"], reported.NOTES["isd_wit"]
        rows.append(Row(name, label, runs, _accuracy_cells(params, runs), paper, adversarial, note))
    return Experiment("table1", "Table 1. Clean and robust accuracy of every method", tuple(rows), params)


def figure1(params: Table1Params) -> Experiment:
    """Figure 1: the students of Table 1 in the plane of clean and robust accuracy."""
    others = {"igam_tinyimagenet", "igam_mnist", "pgd7_teacher", "trades_teacher"}
    rows = tuple(row for row in table1(params).rows if row.id not in others)
    return Experiment("figure1", "Figure 1. Clean against robust accuracy of the student", rows, params)


def table3(params: Table3Params) -> Experiment:
    """Table 3: the terms of Proposition 2, against the TRADES teacher."""
    runs = _table1_runs(params)
    measure = Bounds(params.epsilon, params.bound_images or None, params.llm_steps)
    keys = ["llm_half_eps", "llm_eps", "llm_eps_teacher", "cross_entropy", "cross_entropy_teacher"]
    keys += ["gradient_distance", "gradient_distance_l1", "gradient_distance_batch", "bound", "gap", "violations"]
    rows = []
    for name in reported.TABLE3:
        label, students, adversarial = runs[name]
        jobs = tuple(Job(run, measure, teacher) for run, teacher in zip(students, _trades(params), strict=True))
        cells = tuple(Cell(key, jobs, key) for key in keys)
        cells = (*cells, *_accuracy_cells(params, students))
        rows.append(Row(name, label, students, cells, reported.TABLE3[name], adversarial))
    return Experiment("table3", "Table 3. The terms of Proposition 2", tuple(rows), params)


def table4(params: Table4Params) -> Experiment:
    """Table 4: ISD with and without dropout before the last layer; WoT as in the paper, WiT beside it."""
    rows = []
    for suffix, dropout in (("", True), ("_no_dropout", False)):
        words = "with dropout" if dropout else "without dropout"
        for loop, runs in enumerate(_isd_without_teacher(params, dropout), 1):
            name = f"isd_wot_{loop}{suffix}"
            cells = _accuracy_cells(params, runs, autoattack=dropout or loop == params.loops)
            rows.append(Row(name, f"ISD-WoT-{loop}, {words}", runs, cells, reported.TABLE4.get(name, {})))
        for loop, runs in enumerate(_isd_with_teacher(params, params.wit_loops, dropout), 1):
            cells = _accuracy_cells(params, runs, autoattack=dropout)
            rows.append(Row(f"isd_wit_{loop}{suffix}", f"ISD-WiT-{loop}, {words}", runs, cells))
    return Experiment("table4", "Table 4. Head dropout in iterative self-distillation", tuple(rows), params)


# ---- Table 5 ----


def table5(params: Table5Params) -> Experiment:
    """Table 5: KDIGA+FGSM, beside fast adversarial training of the same net, which the paper does not show."""
    model, schedule = params.fgsm_student, _schedule(params, params.fgsm_epochs)
    teacher = _trades(params)
    # One step of 1.25 ε from a random start is fast adversarial training (Wong et al. 2020).
    fast = PGD(params.train_epsilon, min(1.25 * params.train_epsilon, 1.0), 1)
    specs: list[tuple[str, str, Method, bool]] = [
        ("kdiga_fgsm", "teacher → KDIGA+FGSM", _method(params, KDIGA, attack=FGSM(params.train_epsilon)), True),
        ("kdiga_fgsm_random", "teacher → KDIGA+FGSM, random start", _method(params, KDIGA, attack=fast), True),
        ("fgsm_at", "fast AT (FGSM, random start)", AT(fast), False),
        ("kdiga_plain", "teacher → KDIGA", _method(params, KDIGA), True),
    ]
    rows = []
    for name, label, method, distilled in specs:
        extra: dict[str, Any] = {"teacher": teacher} if distilled else {}
        runs = _runs(params, method, model, schedule=schedule, **extra)
        cells = _accuracy_cells(params, runs)
        rows.append(Row(name, label, runs, cells, reported.TABLE5.get(name, {}), name != "kdiga_plain"))
    return Experiment("table5", "Table 5. KDIGA+FGSM under AutoAttack", tuple(rows), params)


# ---- Tables 2 and 6 ----


def _vit_schedule(params: Table2Params) -> Schedule:
    return _for_vit(params, _schedule(params, params.vit_epochs, learning_rate=params.vit_learning_rate))


def _for_vit(params: Table2Params, schedule: Schedule) -> Schedule:
    return replace(schedule, optimizer=params.vit_optimizer, weight_decay=params.vit_weight_decay)


def _table2_runs(params: Table2Params) -> dict[str, tuple[str, PerSeed, PerSeed]]:
    """Row id -> label, students, teachers. Rows of the paper's table without a stand-in are missing."""
    small, medium, large, wide = params.student, params.student_medium, params.student_large, params.teacher
    vit = _runs(params, ST(), params.vit, schedule=_vit_schedule(params))
    robust = _pgd_at(params)
    kd, kdiga = _method(params, KD), _method(params, KDIGA)
    finetune = _schedule(params, params.finetune_epochs, learning_rate=params.finetune_learning_rate)
    finetune = _for_vit(params, finetune)

    def students(method: Method, teacher: PerSeed, model: str) -> PerSeed:
        return _runs(params, method, model, teacher=teacher)

    vit_kdiga = _method(params, KDIGA, lambda_iga=params.vit_lambda_iga)
    tuned = _runs(params, vit_kdiga, params.vit, schedule=finetune, teacher=robust, init=vit)
    return {
        "st_resnet18": (f"{small} (ST)", _standard(params), ()),
        "st_vit_s16": (f"{params.vit} (ST)", vit, ()),
        "kd_vit_s16_resnet18": (f"ViT (ST) → KD → {small}", students(kd, vit, small), vit),
        "kdiga_vit_s16_resnet18": (f"ViT (ST) → KDIGA → {small}", students(kdiga, vit, small), vit),
        "kd_resnet50_resnet18": (f"CNN (AT) → KD → {small}", students(kd, robust, small), robust),
        "kdiga_resnet50_resnet18": (f"CNN (AT) → KDIGA → {small}", students(kdiga, robust, small), robust),
        "kdiga_resnet50_resnet34": (f"CNN (AT) → KDIGA → {medium}", students(kdiga, robust, medium), robust),
        "kdiga_resnet50_resnet50": (f"CNN (AT) → KDIGA → {wide}", students(kdiga, robust, wide), robust),
        "kdiga_resnet50_resnet101": (f"CNN (AT) → KDIGA → {large}", students(kdiga, robust, large), robust),
        "kdiga_finetune_resnet50_vit_s16": ("CNN (AT) → KDIGA, fine-tuned → pre-trained ViT", tuned, robust),
    }


_NOT_RUN = {
    "kdiga_vit_b16_resnet18": "ViT-B/16 (ST) → KDIGA → ResNet18",
    "kdiga_vit_l16_resnet18": "ViT-L/16 (ST) → KDIGA → ResNet18",
    "kdiga_deit_s16_resnet18": "DeiT-S/16 (ST) → KDIGA → ResNet18",
}


def _radius(radius: float) -> str:
    return f"{radius:g}"


def _paper_at(row: dict[str, float], paper_radii: tuple[str, ...], radii: list[float]) -> dict[str, float]:
    """The paper's numbers under our metric names: its radii, from the largest down, stand beside ours."""
    renamed = dict(zip(reversed(paper_radii), (_radius(r) for r in sorted(radii, reverse=True)), strict=False))
    result = {}
    for metric, value in row.items():
        name, separator, radius = metric.partition("@")
        if not separator or radius in renamed:
            result[f"{name}@{renamed[radius]}" if separator else name] = value
    return result


def table2(params: Table2Params) -> Experiment:
    """Table 2: distillation between CNNs and vision transformers, PGD at several radii; teachers in brackets."""
    images = params.test_images or None

    def cells(runs: PerSeed, prefix: str = "") -> tuple[Cell, ...]:
        found = [_cell(f"{prefix}clean", runs, TestAccuracy(None, images))]
        for radius in params.radii:
            pgd = PGD(radius, 2 * radius / params.pgd_steps, params.pgd_steps, restarts=params.pgd_restarts)
            found.append(_cell(f"{prefix}pgd{params.pgd_steps}@{_radius(radius)}", runs, TestAccuracy(pgd, images)))
        return tuple(found)

    rows, runs = [], _table2_runs(params)
    for name, numbers in reported.TABLE2.items():
        paper = _paper_at(numbers, ("0.001", "0.01"), params.radii)
        note = reported.NOTES.get(name, "")
        if name in runs:
            label, students, teachers = runs[name]
            measured = cells(students) + (cells(teachers, "teacher_") if teachers else ())
            rows.append(Row(name, label, students, measured, paper, note=note))
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
                measured += (_cell(f"{prefix}clean", nets, TestAccuracy(None, images)),)
                for radius in params.radii:
                    measured += _autoattack_cells(params, nets, radius, f"{prefix}autoattack@{_radius(radius)}")
        rows.append(Row(name, label, students, measured, paper, note=note))
    return Experiment("table6", "Table 6. Between CNNs and vision transformers, under AutoAttack", tuple(rows), params)


@dataclass(frozen=True)
class Artifact:
    """How an artefact of the paper is built: its parameters' model and the function that makes the experiment."""

    params: type[Params]
    build: Callable[[Any], Experiment]


ARTIFACTS: dict[str, Artifact] = {
    "figure1": Artifact(Table1Params, figure1),
    "table1": Artifact(Table1Params, table1),
    "table2": Artifact(Table2Params, table2),
    "table3": Artifact(Table3Params, table3),
    "table4": Artifact(Table4Params, table4),
    "table5": Artifact(Table5Params, table5),
    "table6": Artifact(Table6Params, table6),
}
