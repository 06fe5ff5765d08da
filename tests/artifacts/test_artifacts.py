"""The tables as code: their rows, the runs they share, the presets, and the paper's numbers beside them."""

from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

import pytest

from kdiga_nb.artifacts import ARTIFACTS, EVERY, reported
from kdiga_nb.artifacts.recipes import trades_teacher
from kdiga_nb.artifacts.table import Experiment
from kdiga_nb.data import load_data
from kdiga_nb.losses import NORMS
from kdiga_nb.measures import TestAccuracy
from kdiga_nb.methods import IGAM, METHODS, PRESETS, TRADES
from kdiga_nb.params import at_scale, scales
from kdiga_nb.runs import Checkpoint
from kdiga_nb.runs.run import Run, Source, ancestors, run_key

SCALES = scales()
ALL = [(scale, name) for scale in SCALES for name in ARTIFACTS]

each = pytest.mark.parametrize(("scale", "name"), ALL)


def experiment(scale: str, name: str, **overrides: Any) -> Experiment:
    artifact = EVERY[name]
    return artifact.build(at_scale(artifact.params, scale, overrides))


def all_runs(found: Experiment) -> set[Run]:
    """The runs of an experiment with everything they stand on, also those that only a cell needs."""
    return set(ancestors([run for job in found.jobs() for run in [job.run, *job.needs()]]))


def keys(runs: Iterable[Run]) -> set[str]:
    return {run_key(run) for run in runs}


def trained(found: Experiment) -> set[str]:
    return keys(run for row in found.rows for run in row.runs)


@each
def test_every_artefact_can_be_built(scale: str, name: str):
    found = experiment(scale, name)
    assert found.name == name
    assert found.title.replace(" ", "").lower().startswith(name)
    assert found.jobs()
    for dataset in {run.dataset for row in found.rows for run in row.runs if run.dataset.startswith("digits")}:
        assert load_data(dataset).num_classes == 10


@each
def test_row_ids_are_stable_names(scale: str, name: str):
    names = [row.id for row in experiment(scale, name).rows]
    assert len(set(names)) == len(names)
    assert all(row.isidentifier() and row == row.lower() for row in names)


PAPER = {
    "table1": reported.TABLE1,
    "table2": reported.TABLE2,
    "table3": reported.TABLE3,
    "table4": reported.TABLE4,
    "table5": reported.TABLE5,
    "table6": reported.TABLE6,
}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ["table2", "table3", "table6"])
def test_rows_are_those_of_the_paper_in_its_order(scale: str, name: str):
    controls = ["kdiga_zero", "penalty"] if name == "table3" else []
    assert [row.id for row in experiment(scale, name).rows] == [*PAPER[name], *controls]


@pytest.mark.parametrize("scale", SCALES)
def test_table_1_keeps_the_papers_order(scale: str):
    found = experiment(scale, "table1")
    last = f"isd_wit_{found.params.model_dump()['wit_loops']}"
    names = [last if name == "isd_wit" else name for name in reported.TABLE1]
    ours = [row.id for row in found.rows]
    assert [name for name in ours if name in names] == [name for name in names if name in ours]
    assert {name for name in names if not name.startswith("isd_wot")} <= set(ours)


def test_at_digits_every_row_of_tables_1_4_and_5_is_there():
    assert set(reported.TABLE1) - {row.id for row in experiment("digits", "table1").rows} == {"isd_wit"}
    for name in ("table4", "table5"):
        assert set(PAPER[name]) <= {row.id for row in experiment("digits", name).rows}


@pytest.mark.parametrize(
    ("name", "row", "metric", "number"),
    [
        ("table1", "kdiga", "pgd20", 25.35),
        ("table1", "isd_wot_6", "clean", 94.43),
        ("table1", "isd_wit_3", "pgd20", 44.42),
        ("table2", "kdiga_finetune_cnn_to_vit", "pgd40@0.1", 11.1),
        ("table2", "kdiga_vit_to_cnn", "teacher_pgd40@0.05", 55.4),
        ("table3", "st", "llm_eps", 21.691),
        ("table3", "kdiga_ard_a", "gradient_distance", 0.377),
        ("table4", "isd_wot_3_no_dropout", "pgd20", 41.11),
        ("table5", "kdiga_fgsm", "autoattack", 41.00),
        ("table6", "st_vit", "autoattack@0.05", 6.0),
        ("table6", "kdiga_cnn_to_cnn", "autoattack@0.15", 3.9),
    ],
)
def test_the_papers_number_stands_in_the_row(name: str, row: str, metric: str, number: float):
    radii = {"table2": [0.05, 0.1], "table6": [0.05, 0.1, 0.15]}
    overrides = {"radii": radii[name]} if name in radii else {}
    assert experiment("digits", name, **overrides).row(row).reported[metric] == number


@each
def test_every_reported_number_comes_from_the_papers_table(scale: str, name: str):
    numbers = {value for row in PAPER.get(name, reported.TABLE1).values() for value in row.values()}
    for row in experiment(scale, name).rows:
        assert set(row.reported.values()) <= numbers


@each
def test_a_row_without_a_net_has_nothing_measured(scale: str, name: str):
    for row in experiment(scale, name).rows:
        measured = {job.run for cell in row.cells for job in cell.jobs}
        published = {source for source in measured if isinstance(source, Checkpoint)}
        assert bool(row.runs or published) == bool(row.cells)
        assert row.label


@each
def test_cells_measure_one_net_a_seed(scale: str, name: str):
    found = experiment(scale, name)
    for row in found.rows:
        # The explorer's sweep is on the first seed alone, and a scale may name the rows that have all seeds.
        rows = getattr(found.params, "all_seeds_rows", []) or [row.id]
        first_only = (name == "explore" and len(row.runs) == 1) or row.id not in rows
        seeds = found.params.seeds[: 1 if first_only else None]
        assert not row.runs or [run.seed for run in row.runs] == seeds
        metrics = [cell.metric for cell in row.cells]
        assert len(set(metrics)) == len(metrics)
        for cell in row.cells:
            assert cell.jobs
            assert all(job.measure is not None for job in cell.jobs)
            assert len({job.run for job in cell.jobs}) == len(cell.jobs)
            assert cell.is_accuracy == isinstance(cell.jobs[0].measure, TestAccuracy)


def shared_teacher(found: Experiment) -> Source:
    (teacher,) = set(trades_teacher(found.params))
    return teacher


@each
def test_a_teacher_of_a_seed_has_that_seed(scale: str, name: str):
    found = experiment(scale, name)
    for run in all_runs(found):
        for source in (run.teacher, run.init):
            shared = found.params.shared_teacher and isinstance(source, Run) and source == shared_teacher(found)
            assert shared or not isinstance(source, Run) or source.seed == run.seed


@each
def test_a_method_that_needs_a_teacher_has_one(scale: str, name: str):
    for run in all_runs(experiment(scale, name)):
        assert run.method.needs_teacher == (run.teacher is not None)


# ---- what the artefacts share ----


@pytest.mark.parametrize("scale", SCALES)
def test_figure_1_and_table_3_stand_on_the_runs_of_table_1(scale: str):
    first = trained(experiment(scale, "table1"))
    for name in ("figure1", "table3"):
        found = experiment(scale, name)
        assert trained(found) <= first
        assert keys(all_runs(found)) <= keys(all_runs(experiment(scale, "table1")))


@pytest.mark.parametrize("scale", SCALES)
def test_table_6_stands_on_the_runs_of_table_2(scale: str):
    assert trained(experiment(scale, "table6")) <= trained(experiment(scale, "table2"))


@pytest.mark.parametrize("scale", SCALES)
def test_table_4_with_dropout_and_table_5s_teacher_are_table_1s(scale: str):
    first = keys(all_runs(experiment(scale, "table1")))
    with_dropout = [row for row in experiment(scale, "table4").rows if not row.id.endswith("no_dropout")]
    assert keys(run for row in with_dropout for run in row.runs) <= first
    teachers = {run.teacher for row in experiment(scale, "table5").rows for run in row.runs}
    assert keys(run for run in teachers if isinstance(run, Run)) <= first


@pytest.mark.parametrize("scale", SCALES)
def test_accuracies_of_shared_runs_are_measured_once(scale: str):
    first = set(experiment(scale, "table1").jobs())
    assert set(experiment(scale, "figure1").jobs()) <= first


@pytest.mark.parametrize("scale", SCALES)
def test_every_method_is_part_of_some_artefact(scale: str):
    used = {type(run.method) for name in EVERY for run in all_runs(experiment(scale, name))}
    without = scale.startswith("imagenet")  # IGAM's source tasks are CIFAR-10's
    assert used >= set(METHODS.values()) - ({IGAM} if without else set())


@pytest.mark.parametrize(
    ("row", "metric", "number"),
    [
        ("st_cnn", "pgd40@0.001", 24.9),
        ("st_cnn", "pgd40@0.01", 0.0),
        ("kdiga_cnn_to_cnn", "pgd40@0.01", 9.2),
    ],
)
def test_at_the_papers_own_radii_its_numbers_stand_beside_ours(row: str, metric: str, number: float):
    found = experiment("imagenet", "table2").row(row)
    assert found.reported[metric] == number
    assert metric in {cell.metric for cell in found.cells}


def test_published_weights_take_the_place_of_a_training():
    text = "trades:model_cifar_wrn.pt#sha256=" + "a" * 64
    found = experiment("cifar10", "table1", teacher_checkpoint=text)
    teacher = Checkpoint("model_cifar_wrn.pt", "a" * 64, "trades", "wrn_34_10:cifar10")
    assert found.row("kdiga").runs[0].teacher == teacher
    row = found.row("trades_teacher")
    assert not row.runs and {job.run for cell in row.cells for job in cell.jobs} == {teacher}
    assert not any(isinstance(run.method, TRADES) and run.model == "wrn_34_10" for run in all_runs(found))


def test_igams_mnist_teacher_may_be_published_and_is_given_a_new_head():
    text = "trades:trades_model_mnist_smallcnn.pt"
    row = experiment("cifar10", "table1", source_mnist_checkpoint=text).row("igam_mnist")
    assert row.label == "published teacher of MNIST → IGAM → wrn_34_10"
    (run,) = row.runs
    teacher = run.teacher
    assert isinstance(teacher, Run) and (teacher.dataset, teacher.schedule.trainable) == ("cifar10", "head")
    assert teacher.init == Checkpoint("trades_model_mnist_smallcnn.pt", None, "trades", "trades_mnist:mnist")


def test_igams_control_is_the_gradient_penalty_on_igams_net():
    found = experiment("cifar10", "table1", wide_penalty=True)
    row, igam = found.row("penalty_wide"), found.row("igam_mnist")
    assert row.label == "gradient penalty, no teacher → wrn_34_10"
    assert (row.runs[0].model, row.runs[0].schedule) == (igam.runs[0].model, igam.runs[0].schedule)
    assert row.runs[0].method == found.row("penalty").runs[0].method and row.runs[0].teacher is None
    assert "penalty_wide" not in {one.id for one in experiment("cifar10", "figure1", wide_penalty=True).rows}
    assert "penalty_wide" not in {one.id for one in experiment("cifar10", "table1").rows}


def test_a_source_task_of_none_is_not_run():
    row = experiment("cifar10", "table1", source_tinyimagenet="none").row("igam_tinyimagenet")
    assert not row.runs and not row.cells and row.reported


@pytest.mark.parametrize("scale", SCALES)
def test_table_4_rows_differ_in_dropout_alone(scale: str):
    found = experiment(scale, "table4")
    pairs = [(row, found.row(f"{row.id}_no_dropout")) for row in found.rows if not row.id.endswith("_no_dropout")]
    assert pairs
    for with_dropout, without in pairs:
        for a, b in zip(with_dropout.runs, without.runs, strict=True):
            assert (a.head_dropout > 0, b.head_dropout) == (True, 0.0)
            assert replace(a, teacher=None, init=None, head_dropout=0.0) == replace(b, teacher=None, init=None)


# ---- presets ----


@pytest.mark.parametrize("name", ARTIFACTS)
@pytest.mark.parametrize("preset", PRESETS)
def test_preset_decides_what_the_paper_leaves_open(name: str, preset: str):
    found = experiment("digits", name, preset=preset)
    for run in all_runs(found):
        open_choices = {field.name for field in fields(run.method)} & set(PRESETS[preset])  # pyright: ignore
        assert {key: getattr(run.method, key) for key in open_choices} == {
            key: PRESETS[preset][key] for key in open_choices
        }
        assert run.schedule.compounding == (preset == "paper")
        assert run.schedule.selection == ("last" if preset == "paper" else "best_on_test")


@pytest.mark.parametrize("selection", ["last", "validation"])
def test_no_net_is_selected_on_the_test_set_under_paper(selection: str):
    for name in ARTIFACTS:
        chosen = {run.schedule.selection for run in all_runs(experiment("smoke", name, selection=selection))}
        assert chosen == {selection}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_norm_that_is_named_stands_above_the_preset(norm: str, preset: str):
    found = experiment("smoke", "table1", iga_norm=norm, preset=preset)
    assert {getattr(run.method, "norm", norm) for run in all_runs(found)} == {norm}


@pytest.mark.parametrize(("preset", "exponent"), [("paper", 0.0), ("author_code", -1.5)])
def test_nominal_and_effective_weight(preset: str, exponent: float):
    found = experiment("smoke", "table1", preset=preset, batch_size=128, lambda_iga=2.0)
    assert found.row("kdiga").weights == pytest.approx((2.0, 2.0 * 128**exponent))
    assert found.row("kd").weights is None
    assert found.row("st").weights is None


@pytest.mark.parametrize(
    ("name", "key", "value", "row"),
    [
        ("table1", "lambda_iga", 9.0, "kdiga"),
        ("table1", "lambda_isd", 9.0, "isd_wot_1"),
        ("table1", "head_dropout", 0.1, "isd_wit_1"),
        ("table1", "beta", 2.0, "trades_student"),
        ("table1", "train_epsilon", 0.2, "ard"),
        ("table1", "head_epochs", 2, "igam_mnist"),
        ("table1", "source_mnist", "digits_rotated", "igam_mnist"),
        ("table5", "fgsm_epochs", 2, "kdiga_fgsm"),
        ("table2", "vit_epochs", 2, "st_vit"),
        ("table2", "finetune_learning_rate", 0.2, "kdiga_finetune_cnn_to_vit"),
    ],
)
def test_a_parameter_reaches_its_row(name: str, key: str, value: Any, row: str):
    before, after = (experiment("smoke", name, **overrides).row(row) for overrides in ({}, {key: value}))
    assert keys(before.runs).isdisjoint(keys(after.runs))


def test_evaluation_alone_leaves_the_runs_as_they_are():
    for name in ARTIFACTS:
        changed: dict[str, Any] = {"epsilon": 0.07, "pgd_steps": 9}
        if name in ("table2", "table6"):
            changed["radii"] = [0.07]
        before, after = (experiment("smoke", name, **extra) for extra in ({}, changed))
        assert trained(before) == trained(after)
        assert set(before.jobs()) != set(after.jobs())


@pytest.mark.parametrize(("images", "seeds"), [(0, 1), (5, 0)])
def test_autoattack_can_be_left_out(images: int, seeds: int):
    found = experiment("smoke", "table5", autoattack_images=images, autoattack_seeds=seeds)
    assert not any("autoattack" in cell.metric for row in found.rows for cell in row.cells)


def test_an_unknown_row_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"row must be one of st, kd, .*, got 'kdigo'"):
        experiment("smoke", "table1").row("kdigo")


def test_autoattack_meets_every_seed_of_the_rows_that_say_so():
    found = experiment("digits", "table1", autoattack_rows=["kdiga"])
    nets = {row.id: len(cell.jobs) for row in found.rows for cell in row.cells if cell.metric == "autoattack"}
    assert nets.pop("kdiga") == len(found.params.seeds) > 1
    assert set(nets.values()) == {1}
    with pytest.raises(ValueError, match=r"autoattack_rows: must be among .*did you mean kdiga.*got 'kdga'"):
        experiment("digits", "table1", autoattack_rows=["kdga"])
