"""The paper's tables as code: ``table1(params) -> Experiment``, a row a net, a cell a measured number.

A row's runs are values, so tables share what they have in common: Figure 1 and Table 3 stand on Table 1's runs, and
Table 6 on Table 2's. To add a row, add it here; reports, figures and the command follow. Rows that a scale has no net
for keep the paper's number and are marked "not run".
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from kdiga_nb import checkpoints, reported
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
from kdiga_nb.metrics import Bounds, Linearity, Measure, TestAccuracy
from kdiga_nb.params import (
    EXPLORED,
    NONE,
    ExploreParams,
    IsdParams,
    Params,
    Table1Params,
    Table2Params,
    Table3Params,
    Table4Params,
    Table5Params,
    Table6Params,
)
from kdiga_nb.runs import Job, Run, Source
from kdiga_nb.training import Schedule

PerSeed = tuple[Run, ...]
Nets = tuple[Source, ...]  # one a seed too, where published weights may stand in for a training


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
        runs: the trained nets, one a seed; empty if the scale trains none ("not run", or published weights).
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
    params: Params,
    epochs: int | None = None,
    *,
    learning_rate: float | None = None,
    policy: str | None = None,
    trainable: str = "all",
) -> Schedule:
    epochs = epochs or params.epochs
    selection = "best_on_test" if params.preset == "author_code" else params.selection
    return Schedule(
        epochs=epochs,
        batch_size=params.batch_size,
        policy=policy or params.policy,
        milestones=tuple(milestone for milestone in params.milestones if milestone < epochs),
        compounding=params.preset != "author_code",
        weight_decay=params.weight_decay,
        clip_norm=params.clip_norm,
        augment=params.augment,
        selection=selection,
        selection_epsilon=0.0 if selection == "last" else params.epsilon,
        learning_rate=learning_rate or params.learning_rate,
        trainable=trainable,
        precision=params.precision,
        images=params.train_images,
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


def _train_attack(params: Params, steps: int | None = None) -> PGD:
    """Adversarial training's attack: unless a step size is given, steps of ε/3 or longer, so that the last iterate can
    reach the ball's surface."""
    steps = steps or params.train_steps
    return PGD(params.train_epsilon, params.train_step_size or params.train_epsilon / min(steps, 3), steps)


def _runs(params: Params, method: Method, model: str | None = None, **changes: Any) -> PerSeed:
    """The same training for every seed. Teachers and starting points in ``changes`` are per seed themselves."""
    model = model or params.student
    schedule = changes.pop("schedule", None) or _schedule(params)
    per_seed = {name: value for name, value in changes.items() if isinstance(value, tuple)}
    fixed: dict[str, Any] = {"dataset": params.dataset} | {k: v for k, v in changes.items() if k not in per_seed}
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


def _published(params: Params, text: str, net: str) -> Nets:
    """Published weights in the place of a training; the same for every seed."""
    return (checkpoints.parse(text, f"{net}:{params.dataset}"),) * len(params.seeds)


def _teacher_schedule(params: Params) -> Schedule:
    return _schedule(params, params.teacher_epochs, policy=params.teacher_policy)


def _trades(params: Params) -> Nets:
    if params.teacher_checkpoint:
        return _published(params, params.teacher_checkpoint, params.teacher)
    method = TRADES(_train_attack(params), params.beta)
    return _runs(params, method, params.teacher, schedule=_teacher_schedule(params))


def _pgd_at(params: Params) -> PerSeed:
    return _runs(params, _pgd(params), params.teacher, schedule=_teacher_schedule(params))


def _pgd(params: Params) -> AT:
    return AT(_train_attack(params, params.at_steps))


def _accuracy_cells(params: Params, runs: Nets, prefix: str = "", autoattack: bool = True) -> tuple[Cell, ...]:
    """Clean accuracy, PGD of the paper's step 2ε/steps, and AutoAttack where it is asked for."""
    images = params.test_images or None
    pgd = PGD(params.epsilon, 2 * params.epsilon / params.pgd_steps, params.pgd_steps, restarts=params.pgd_restarts)
    cells = [
        _cell(f"{prefix}clean", runs, TestAccuracy(None, images)),
        _cell(f"{prefix}pgd{params.pgd_steps}", runs, TestAccuracy(pgd, images)),
    ]
    return (*cells, *(_autoattack_cells(params, runs, params.epsilon, f"{prefix}autoattack") if autoattack else ()))


def _autoattack_cells(params: Params, runs: Nets, epsilon: float, metric: str) -> tuple[Cell, ...]:
    if not params.autoattack_images or not params.autoattack_seeds:
        return ()
    measure = TestAccuracy(AutoAttack(epsilon), params.autoattack_images)
    return (_cell(metric, runs[: params.autoattack_seeds], measure),)


def _trained(nets: Nets) -> PerSeed:
    return tuple(net for net in nets if isinstance(net, Run))


def _cell(metric: str, runs: Nets, measure: Measure) -> Cell:
    return Cell(metric, tuple(Job(run, measure) for run in dict.fromkeys(runs)))


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


def _table1_runs(params: Table1Params) -> dict[str, tuple[str, Nets, bool]]:
    """Row id -> label, runs, whether adversarial examples are trained on."""
    attack = _train_attack(params)
    teacher = _trades(params)
    wide, small = params.teacher, params.student
    rows: dict[str, tuple[str, Nets, bool]] = {
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
        teachers = () if source == NONE else _igam_sources(params, name, source)
        kind = "published" if name == "igam_mnist" and params.source_mnist_checkpoint else "PGD"
        rows[name] = (f"{kind} teacher of {source} → IGAM → wide net", _igam(params, teachers), True)
    rows |= {
        "pgd7_teacher": (f"{wide} (PGD-{params.at_steps} AT)", _pgd_at(params), True),
        "trades_teacher": (f"{wide} (TRADES), the teacher", tuple(dict.fromkeys(teacher)), True),
        "pgd7_student": (f"{small} (PGD-{params.at_steps} AT)", _runs(params, _pgd(params)), True),
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


def _igam_sources(params: Table1Params, row: str, source: str) -> Nets:
    """IGAM's teachers: adversarially trained on another task, MNIST's by its own net and radius, or published."""
    if row == "igam_mnist" and params.source_mnist_checkpoint:
        text = params.source_mnist_checkpoint
        return (checkpoints.parse(text, f"{params.source_mnist_net}:{source}"),) * len(params.seeds)
    attack, net = _train_attack(params, params.at_steps), params.teacher
    if row == "igam_mnist":
        net, radius = params.source_mnist_net, params.source_mnist_epsilon
        if radius != params.train_epsilon:
            attack = PGD(radius, radius / min(params.at_steps, 3), params.at_steps)
    return _runs(params, AT(attack), net, schedule=_teacher_schedule(params), dataset=source)


def _igam(params: Table1Params, sources: Nets) -> PerSeed:
    """IGAM: a robust net of another task, its last layer fine-tuned on this one, then gradients matched."""
    if not sources:
        return ()
    net = sources[0].model.partition(":")[0] if sources[0].model else params.teacher
    head = _schedule(params, params.head_epochs, trainable="head")
    teacher = _runs(params, ST(), net, schedule=head, init=sources)
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
        cells = _accuracy_cells(params, runs) if runs else ()
        rows.append(Row(name, label, _trained(runs), cells, paper, adversarial, note))
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
        rows.append(Row(name, label, _trained(students), cells, reported.TABLE3[name], adversarial))
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
    model = params.fgsm_student
    schedule = replace(
        _schedule(params, params.fgsm_epochs, learning_rate=params.fgsm_learning_rate, policy=params.fgsm_policy),
        weight_decay=params.fgsm_weight_decay,
    )
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


def _table2_runs(params: Table2Params) -> dict[str, tuple[str, Nets, Nets]]:
    """Row id -> label, students, teachers. Rows of the paper's table without a stand-in are missing."""
    small, medium, large, wide = params.student, params.student_medium, params.student_large, params.teacher
    if params.vit_checkpoint:
        vit = _published(params, params.vit_checkpoint, params.vit)
    else:
        vit = _runs(params, ST(), params.vit, schedule=_vit_schedule(params))
    if params.teacher_checkpoint:
        robust = _published(params, params.teacher_checkpoint, params.teacher)
    else:
        robust = _pgd_at(params)
    kd, kdiga = _method(params, KD), _method(params, KDIGA)
    finetune = _schedule(params, params.finetune_epochs, learning_rate=params.finetune_learning_rate)
    finetune = _for_vit(params, finetune)

    def students(method: Method, teacher: Nets, model: str) -> PerSeed:
        return _runs(params, method, model, teacher=teacher)

    vit_kdiga = _method(params, KDIGA, lambda_iga=params.vit_lambda_iga)
    tuned = _runs(params, vit_kdiga, params.vit, schedule=finetune, teacher=robust, init=vit)
    rows: dict[str, tuple[str, Nets, Nets]] = {
        "st_resnet18": (f"{small} (ST)", _standard(params), ()),
        "st_vit_s16": (f"{params.vit} (ST)", tuple(dict.fromkeys(vit)), ()),
        "kd_vit_s16_resnet18": (f"ViT (ST) → KD → {small}", students(kd, vit, small), vit),
        "kdiga_vit_s16_resnet18": (f"ViT (ST) → KDIGA → {small}", students(kdiga, vit, small), vit),
        "kd_resnet50_resnet18": (f"CNN (AT) → KD → {small}", students(kd, robust, small), robust),
        "kdiga_resnet50_resnet18": (f"CNN (AT) → KDIGA → {small}", students(kdiga, robust, small), robust),
        "kdiga_resnet50_resnet34": (f"CNN (AT) → KDIGA → {medium}", students(kdiga, robust, medium), robust),
        "kdiga_resnet50_resnet50": (f"CNN (AT) → KDIGA → {wide}", students(kdiga, robust, wide), robust),
        "kdiga_resnet50_resnet101": (f"CNN (AT) → KDIGA → {large}", students(kdiga, robust, large), robust),
        "kdiga_finetune_resnet50_vit_s16": ("CNN (AT) → KDIGA, fine-tuned → pre-trained ViT", tuned, robust),
    }
    for name, net in (("vit_b16", params.vit_base), ("vit_l16", params.vit_large), ("deit_s16", params.deit)):
        if net != NONE:
            teachers = _published(params, f"timm:{checkpoints.PUBLISHED}", net)
            row = f"kdiga_{name}_resnet18"
            rows[row] = (_NOT_RUN[row].replace("ResNet18", small), students(kdiga, teachers, small), teachers)
    return rows


_NOT_RUN = {
    "kdiga_vit_b16_resnet18": "ViT-B/16 (ST) → KDIGA → ResNet18",
    "kdiga_vit_l16_resnet18": "ViT-L/16 (ST) → KDIGA → ResNet18",
    "kdiga_deit_s16_resnet18": "DeiT-S/16 (ST) → KDIGA → ResNet18",
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
            rows.append(Row(name, label, _trained(students), measured, paper, note=note))
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
        rows.append(Row(name, label, _trained(students), measured, paper, note=note))
    return Experiment("table6", "Table 6. Between CNNs and vision transformers, under AutoAttack", tuple(rows), params)


# ---- the explorer ----

CHAINS = {"isd_wot": "ISD-WoT", "isd_wit": "ISD-WiT"}


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
    """The row of a point: a run for each of the parameters' seeds; LLM and the further radii on the first of them.

    Args:
        autoattack, radii: whether AutoAttack, and PGD at the further radii, are among the cells.
    """
    name, label, runs = _explored_runs(params, point)
    linearity = Linearity(params.epsilon, params.llm_images, params.llm_steps)
    cells = [*_accuracy_cells(params, runs, autoattack=autoattack), Cell("llm", (Job(runs[0], linearity),), "llm")]
    for radius in params.radii if radii else ():
        pgd = PGD(radius, 2 * radius / params.pgd_steps, params.pgd_steps, restarts=params.pgd_restarts)
        measure = TestAccuracy(pgd, params.test_images or None)
        cells.append(_cell(f"pgd{params.pgd_steps}@{_radius(radius)}", runs[:1], measure))
    adversarial = point.method in ("ard", "kdiga_ard_a", "pgd7_student", "trades_student")
    return Row(name, label, runs, tuple(cells), adversarial=adversarial)


def _explored_runs(params: ExploreParams, point: Point) -> tuple[str, str, PerSeed]:
    """Row id, label and runs of a point."""
    method = "kd" if point.method == "kdiga" and point.lambda_iga == 0 else point.method
    if method in CHAINS:
        return _explored_loop(params, point)
    if method == "kdiga":
        weighted = params.model_copy(update={"lambda_iga": point.lambda_iga})
        weight = f"{point.lambda_iga:g}"
        return f"kdiga_{re.sub(r'[^0-9]', '_', weight)}", f"KDIGA, λ = {weight}", _kdiga(weighted)
    attack = _train_attack(params)
    trained: dict[str, tuple[Method, bool]] = {
        "st": (ST(), False),
        "kd": (_method(params, KD), True),
        "ard": (_method(params, ARD, attack=attack), True),
        "kdiga_ard_a": (_method(params, KDIGA_ARD_A, attack=attack), True),
        "pgd7_student": (_pgd(params), False),
        "trades_student": (TRADES(attack, params.beta), False),
    }
    way, distilled = trained[method]
    extra: dict[str, Any] = {"teacher": _trades(params)} if distilled else {}
    return method, EXPLORED[method], _runs(params, way, **extra)


def _explored_loop(params: ExploreParams, point: Point) -> tuple[str, str, PerSeed]:
    if point.method == "isd_wot" and point.loop == 0:
        return "st", EXPLORED["st"], _standard(params)
    if point.method == "isd_wot":
        chain = _isd_without_teacher(params.model_copy(update={"loops": point.loop}), point.dropout)
    else:
        chain = _isd_with_teacher(params, point.loop, point.dropout)
    suffix, words = ("", "") if point.dropout else ("_no_dropout", ", no dropout")
    return f"{point.method}_{point.loop}{suffix}", f"{CHAINS[point.method]}-{point.loop}{words}", chain[-1]


def reference_teacher(params: Params) -> Nets:
    """The TRADES-trained teacher of each seed: what a net without a teacher of its own is compared to."""
    return _trades(params)


def explore(params: ExploreParams) -> Experiment:
    """What the explorer shows at once: nets of Tables 1 and 4, and KDIGA at further weights on the first seed."""
    headline = [Point("st"), Point("kd"), Point("kdiga", params.lambda_iga), Point("trades_student")]
    headline += [Point("isd_wot", loop=1), Point("isd_wot", loop=params.loops)]
    further = [Point("ard"), Point("kdiga_ard_a"), Point("pgd7_student")]
    further += [Point("isd_wot", loop=loop) for loop in range(2, params.loops)]
    further += [Point("isd_wit", loop=loop) for loop in range(1, params.wit_loops + 1)]
    plain = [Point("isd_wot", loop=loop, dropout=False) for loop in range(1, params.plain_loops + 1)]
    plain += [Point("isd_wit", loop=loop, dropout=False) for loop in range(1, params.plain_wit_loops + 1)]
    first = params.model_copy(update={"seeds": params.seeds[:1]})
    sweep = [Point("kdiga", weight) for weight in params.sweep if weight not in (0, params.lambda_iga)]
    rows = [explored(params, point) for point in headline]
    rows += [explored(params, point, radii=False) for point in further]
    rows += [explored(params, point, radii=False, autoattack=False) for point in plain]
    rows += [explored(first, point, radii=False, autoattack=False) for point in sweep]
    unique = {row.id: row for row in rows}  # with one loop, the first is the last
    return Experiment("explore", "Explore. λ_IGA, ε and loop count by hand", tuple(unique.values()), params)


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
    "explore": Artifact(ExploreParams, explore),
}
