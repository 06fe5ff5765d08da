"""The building blocks that tables and studies share: schedules, methods, runs per seed, cells."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kdiga_nb.artifacts.table import Cell, Nets, PerSeed
from kdiga_nb.attacks.autoattack import AutoAttack
from kdiga_nb.attacks.gradient import PGD, evaluation_pgd
from kdiga_nb.isd import isd_with_teacher, isd_without_teacher
from kdiga_nb.measures import Measure, TestAccuracy
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
    GradientPenalty,
    Method,
    with_preset,
)
from kdiga_nb.params import NONE, IsdParams, Params, Table1Params, did_you_mean
from kdiga_nb.runs import checkpoints
from kdiga_nb.runs.graph import Job
from kdiga_nb.runs.run import Run
from kdiga_nb.training import Schedule


def schedule_of(
    params: Params,
    epochs: int | None = None,
    *,
    learning_rate: float | None = None,
    policy: str | None = None,
    trainable: str = "all",
) -> Schedule:
    """The schedule of the parameters; an argument replaces the value of the parameters."""
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
        batch_norm=params.batch_norm,
    )


def method_of(params: Params, method: type[Method], **fields: Any) -> Method:
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


def training_attack(params: Params, steps: int | None = None) -> PGD:
    """The attack of adversarial training.

    Without a given step size a step is ε/3, or longer if there are fewer than three, so that the last iterate can reach
    the surface of the ball.
    """
    steps = steps or params.train_steps
    return PGD(params.train_epsilon, params.train_step_size or params.train_epsilon / min(steps, 3), steps)


def fast_attack(params: Params) -> PGD:
    """The attack of fast adversarial training (Wong et al. 2020): one step of 1.25 ε from a random start."""
    return PGD(params.train_epsilon, min(1.25 * params.train_epsilon, 1.0), 1)


def runs_per_seed(params: Params, method: Method, model: str | None = None, **changes: Any) -> PerSeed:
    """The same training for every seed; a tuple in ``changes`` (teachers, starting points) holds one value per seed."""
    model = model or params.student
    schedule = changes.pop("schedule", None) or schedule_of(params)
    if schedule.selection == "validation" and isinstance(method, (ST, KD)):
        # A net without robustness is most robust while it has hardly learnt, so its clean accuracy (radius 0) decides.
        schedule = replace(schedule, selection_epsilon=0.0)
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


def standard_training(params: Params, model: str | None = None) -> PerSeed:
    """Equation 1 for every seed."""
    return runs_per_seed(params, ST(), model)


def published_nets(params: Params, text: str, net: str) -> Nets:
    """Published weights instead of trained ones; the same for every seed."""
    return (checkpoints.parse(text, f"{net}:{params.dataset}"),) * len(params.seeds)


def teacher_schedule(params: Params) -> Schedule:
    """The schedule of an adversarially trained teacher."""
    return schedule_of(params, params.teacher_epochs)


def trades_teacher(params: Params) -> Nets:
    """The robust teacher of each seed: trained by TRADES, or published weights."""
    if params.teacher_checkpoint:
        return published_nets(params, params.teacher_checkpoint, params.teacher)
    method = TRADES(training_attack(params), params.beta)
    teachers = runs_per_seed(params, method, params.teacher, schedule=teacher_schedule(params))
    return teachers[:1] * len(teachers) if params.shared_teacher else teachers


def pgd_teacher(params: Params) -> PerSeed:
    """The teacher architecture under PGD adversarial training."""
    return runs_per_seed(params, pgd_training(params), params.teacher, schedule=teacher_schedule(params))


def pgd_training(params: Params) -> AT:
    """PGD adversarial training with ``at_steps`` steps."""
    return AT(training_attack(params, params.at_steps))


def accuracy_cells(params: Params, runs: Nets, autoattack: bool = True, row: str = "") -> tuple[Cell, ...]:
    """Clean accuracy, PGD at ``epsilon`` and, unless switched off, AutoAttack."""
    cells = clean_cell(params, runs), pgd_cell(params, runs)
    return (*cells, *(autoattack_cells(params, runs, params.epsilon, "autoattack", row) if autoattack else ()))


def clean_cell(params: Params, runs: Nets, prefix: str = "") -> Cell:
    """Accuracy without an attack."""
    return cell_of(f"{prefix}clean", runs, TestAccuracy(None, params.test_images or None))


def pgd_cell(params: Params, runs: Nets, prefix: str = "", radius: float | None = None) -> Cell:
    """Accuracy under the evaluation PGD, at ``epsilon`` or at a further radius, which the metric then names."""
    name = f"{prefix}pgd{params.pgd_steps}" + ("" if radius is None else f"@{radius:g}")
    pgd = evaluation_pgd(params.epsilon if radius is None else radius, params.pgd_steps, params.pgd_restarts)
    return cell_of(name, runs, TestAccuracy(pgd, params.test_images or None))


def autoattack_cells(params: Params, runs: Nets, epsilon: float, metric: str, row: str = "") -> tuple[Cell, ...]:
    """AutoAttack on the first ``autoattack_seeds`` runs, on all of a row of ``autoattack_rows``; perhaps no cell."""
    seeds = len(runs) if row in params.autoattack_rows else params.autoattack_seeds
    if not params.autoattack_images or not seeds:
        return ()
    return (cell_of(metric, runs[:seeds], TestAccuracy(AutoAttack(epsilon), params.autoattack_images)),)


def trained_runs(nets: Nets) -> PerSeed:
    """The nets that this kit trains, without published ones."""
    return tuple(net for net in nets if isinstance(net, Run))


def cell_of(metric: str, runs: Nets, measure: Measure) -> Cell:
    """A cell with one job per distinct net."""
    return Cell(metric, tuple(Job(run, measure) for run in dict.fromkeys(runs)))


LATER = ("rslad", "iad", "adaad", "igdm", "saad")  # rows of the distillations since the paper
PENALTIES = ("kdiga_zero", "penalty")  # controls: a small input gradient that is not the teacher's
ISD = {"isd_wot": "ISD-WoT", "isd_wit": "ISD-WiT"}  # chain -> name that a reader sees


def isd_row(chain: str, loop: int, dropout: bool = True) -> str:
    """The row id of a loop of a chain of ``ISD``."""
    return f"{chain}_{loop}" + ("" if dropout else "_no_dropout")


def isd_label(chain: str, loop: int) -> str:
    """The name of a loop that a reader sees."""
    return f"{ISD[chain]}-{loop}"


def isd_chain(row: str) -> str | None:
    """The chain of a row id of a loop with dropout; None for any other row."""
    chain, _, loop = row.rpartition("_")
    return chain if chain in ISD and loop.isdigit() else None


def isd_wot_runs(params: IsdParams, dropout: bool, method: Method | None = None) -> list[PerSeed]:
    """ISD-WoT: loops 1 … L, each one run per seed; the loops use ``method`` (default: KDIGA at ``lambda_isd``)."""
    method = method or method_of(params, KDIGA, lambda_iga=params.lambda_isd)
    rate, schedule = params.head_dropout if dropout else 0.0, schedule_of(params, params.isd_epochs)
    chains = [
        isd_without_teacher(first, method, params.loops, params.learning_rate_decay, rate, loop_schedule=schedule)
        for first in standard_training(params)
    ]
    return list(zip(*(chain[1:] for chain in chains), strict=True))


def isd_wit_runs(params: IsdParams, loops: int, dropout: bool) -> list[PerSeed]:
    """ISD-WiT: loops 1 … L, each one run per seed."""
    rate = params.head_dropout if dropout else 0.0
    later: dict[str, Any] = {
        "loop_schedule": schedule_of(params, params.isd_epochs),
        "loop_method": method_of(params, KDIGA, lambda_iga=params.lambda_isd),
    }
    chains = [
        isd_with_teacher(student, teacher, method_of(params, KDIGA), loops, params.learning_rate_decay, rate, **later)
        for student, teacher in zip(standard_training(params), trades_teacher(params), strict=True)
    ]
    return list(zip(*chains, strict=True))


def table1_runs(params: Table1Params) -> dict[str, tuple[str, Nets]]:
    """The nets of Table 1: row id -> label and runs; a row that the scale does not run has no runs."""
    attack = training_attack(params)
    teacher = trades_teacher(params)
    wide, small = params.teacher, params.student
    longer = {}
    if params.long_epochs:
        runs = runs_per_seed(params, ST(), schedule=schedule_of(params, params.long_epochs))
        longer["st_long"] = (f"student (ST), {params.long_epochs} epochs", runs)
    rows: dict[str, tuple[str, Nets]] = {
        "st": ("student (ST)", standard_training(params)),
        **longer,
        "kd": ("TRADES teacher → KD → student", runs_per_seed(params, method_of(params, KD), teacher=teacher)),
        "ard": (
            "TRADES teacher → ARD → student",
            runs_per_seed(params, method_of(params, ARD, attack=attack), teacher=teacher),
        ),
    }
    sources = {
        "igam_tinyimagenet": (params.source_tinyimagenet, "TinyImageNet"),
        "igam_mnist": (params.source_mnist, "MNIST"),
    }
    for name, (source, in_paper) in sources.items():
        teachers = () if source == NONE else igam_sources(params, name, source)
        task = in_paper if source in (NONE, in_paper.lower()) else source
        kind = "published" if name == "igam_mnist" and params.source_mnist_checkpoint else "PGD"
        rows[name] = (f"{kind} teacher of {task} → IGAM → {wide}", igam_students(params, teachers))
    rows |= {
        "pgd_teacher": (f"{wide} (PGD-{params.at_steps} AT)", pgd_teacher(params)),
        "trades_teacher": (f"{wide} (TRADES), the teacher", teacher),
        "pgd_student": (f"{small} (PGD-{params.at_steps} AT)", runs_per_seed(params, pgd_training(params))),
        "trades_student": (f"{small} (TRADES)", runs_per_seed(params, TRADES(attack, params.beta))),
        "kdiga": ("TRADES teacher → KDIGA → student", kdiga_students(params)),
        "kdiga_ard_c": (
            "TRADES teacher → KDIGA-ARD_C → student",
            runs_per_seed(params, method_of(params, KDIGA_ARD_C, attack=attack), teacher=teacher),
        ),
        "kdiga_ard_a": (
            "TRADES teacher → KDIGA-ARD_A → student",
            runs_per_seed(params, method_of(params, KDIGA_ARD_A, attack=attack), teacher=teacher),
        ),
    }
    for loop, runs in enumerate(isd_wit_runs(params, params.wit_loops, dropout=True), 1):
        rows[isd_row("isd_wit", loop)] = (f"TRADES teacher → {isd_label('isd_wit', loop)}", runs)
    for loop, runs in enumerate(isd_wot_runs(params, dropout=True), 1):
        rows[isd_row("isd_wot", loop)] = (isd_label("isd_wot", loop), runs)
    rows |= control_runs(params)
    for setting in ("all_seeds_rows", "autoattack_rows"):
        _check_rows(setting, getattr(params, setting), [*rows, *LATER])
    return {name: (label, seeds_of_row(params, name, runs)) for name, (label, runs) in rows.items()}


def seeds_of_row(params: Table1Params, row: str, runs: Nets) -> Nets:
    """A row's nets of every seed, or of the first if ``all_seeds_rows`` leaves the row out; shared nets once."""
    first = params.all_seeds_rows and row not in params.all_seeds_rows
    return tuple(dict.fromkeys(runs[:1] if first else runs))


def _check_rows(setting: str, names: Sequence[str], rows: Sequence[str]) -> None:
    for name in names:
        if name not in rows:
            raise ValueError(f"{setting}: must be among {', '.join(rows)}{did_you_mean(name, rows)}, got {name!r}")


def control_runs(params: Table1Params) -> dict[str, tuple[str, Nets]]:
    """Controls that the paper lacks: the alignment without the teacher's gradient, or without the teacher."""
    teacher = trades_teacher(params)
    zero = method_of(params, KDIGA, lambda_iga=params.lambda_zero, target_gradient="zero")
    shuffled = method_of(params, KDIGA, target_gradient="shuffled")
    self_zero = method_of(params, KDIGA, lambda_iga=params.lambda_isd, target_gradient="zero")
    penalty, wide = GradientPenalty(params.lambda_penalty), {}
    if params.wide_penalty:
        label = f"gradient penalty, no teacher → {params.teacher}"
        wide = {"penalty_wide": (label, runs_per_seed(params, penalty, params.teacher))}
    return {
        "kdiga_zero": ("TRADES teacher → KD + gradient penalty", runs_per_seed(params, zero, teacher=teacher)),
        "kdiga_shuffled": (
            "TRADES teacher → KDIGA, teacher's gradients shuffled",
            runs_per_seed(params, shuffled, teacher=teacher),
        ),
        "penalty": ("gradient penalty, no teacher", runs_per_seed(params, penalty)),
        **wide,
        "isd_wot_1_zero": (
            f"{isd_label('isd_wot', 1)}, target gradient zero",
            isd_wot_runs(params, dropout=True, method=self_zero)[0],
        ),
    }


def kdiga_students(params: Params) -> PerSeed:
    """KDIGA from the robust teacher."""
    return runs_per_seed(params, method_of(params, KDIGA), teacher=trades_teacher(params))


def igam_sources(params: Table1Params, row: str, source: str) -> Nets:
    """IGAM's teachers, adversarially trained on another task or published; MNIST's has its own net and radius."""
    if row == "igam_mnist" and params.source_mnist_checkpoint:
        text = params.source_mnist_checkpoint
        return (checkpoints.parse(text, f"{params.source_mnist_net}:{source}"),) * len(params.seeds)
    attack, net = training_attack(params, params.at_steps), params.teacher
    if row == "igam_mnist":
        net, radius = params.source_mnist_net, params.source_mnist_epsilon
        if radius != params.train_epsilon:
            attack = PGD(radius, radius / min(params.at_steps, 3), params.at_steps)
    return runs_per_seed(params, AT(attack), net, schedule=teacher_schedule(params), dataset=source)


def igam_students(params: Table1Params, sources: Nets) -> PerSeed:
    """IGAM: fine-tune the last layer of a robust net of another task, then match its input gradients."""
    if not sources:
        return ()
    net = sources[0].model.partition(":")[0] if sources[0].model else params.teacher
    head = schedule_of(params, params.head_epochs, trainable="head")
    teacher = runs_per_seed(params, ST(), net, schedule=head, init=sources)
    return runs_per_seed(params, IGAM(), params.teacher, teacher=teacher)
