"""The studies as code: the runs they share with the tables, the factorial's design, and what their figures bear."""

import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from kdiga_nb import paths, report
from kdiga_nb import report as plots
from kdiga_nb.artifacts import ARTIFACTS, STUDIES
from kdiga_nb.artifacts.studies import (
    TAUGHT,
    Factor,
    audit_jobs,
    combination_row,
    factors,
    findings,
    isd_factors,
    loop_rows,
    main_effects,
    taught_row,
    weighted_row,
    worth_of_test_selection,
)
from kdiga_nb.artifacts.table import Experiment
from kdiga_nb.audit.measures import plan
from kdiga_nb.audit.verdict import verdict
from kdiga_nb.methods import ARD, AT, KDIGA, PRESETS, ST
from kdiga_nb.params import AlignmentParams, IsdSearchParams, ParameterError, at_scale, scales
from kdiga_nb.runs import Checkpoint
from kdiga_nb.runs.graph import run_all
from kdiga_nb.runs.run import Run, ancestors, run_key

SCALES = scales()


def study(scale: str, name: str, **overrides: Any) -> Experiment:
    artifact = (ARTIFACTS | STUDIES)[name]
    return artifact.build(at_scale(artifact.params, scale, overrides))


def keys(found: Experiment) -> set[str]:
    return {run_key(run) for run in ancestors([run for job in found.jobs() for run in [job.run, *job.needs()]])}


each = pytest.mark.parametrize("name", STUDIES)
each_scale = pytest.mark.parametrize("scale", SCALES)


@each
@each_scale
def test_every_study_can_be_built(scale: str, name: str) -> None:
    found = study(scale, name)
    assert found.name == name and found.jobs()
    names = [row.id for row in found.rows]
    assert len(set(names)) == len(names)
    assert all(row.isidentifier() and row == row.lower() for row in names)
    for row in found.rows:
        metrics = [cell.metric for cell in row.cells]
        published = [job for cell in row.cells for job in cell.jobs if isinstance(job.run, Checkpoint)]
        assert (row.runs or published) and len(set(metrics)) == len(metrics)
        assert all(job.measure is not None for cell in row.cells for job in cell.jobs)


@each
def test_teachers_and_starting_points_have_the_seed_of_their_student(name: str) -> None:
    for job in study("smoke", name).jobs():
        for run in ancestors([job.run]):
            assert all(not isinstance(source, Run) or source.seed == run.seed for source in (run.teacher, run.init))


@each_scale
@pytest.mark.parametrize("name", ["robustness_audit", "prop2_bound"])
def test_the_audit_and_the_bound_stand_on_the_runs_of_table_1(scale: str, name: str) -> None:
    assert keys(study(scale, name)) <= keys(study(scale, "table1"))


@each_scale
def test_only_the_controls_of_isd_are_trained_anew(scale: str) -> None:
    ours, known = study(scale, "isd_autoattack"), keys(study(scale, "table1")) | keys(study(scale, "table4"))
    new = {row.id for row in ours.rows for run in row.runs if run_key(run) not in known}
    assert new == {"self_kd", "self_st"}


@each_scale
def test_autoattack_of_table_1_is_not_run_again(scale: str) -> None:
    known = {job for job in study(scale, "table1").jobs() if job.measure is not None}
    rows = study(scale, "isd_autoattack").rows
    jobs = [job for row in rows for cell in row.cells if cell.metric == "autoattack" for job in cell.jobs]
    assert jobs and set(jobs) <= known


@each_scale
def test_the_audit_compares_attacks_on_the_same_images(scale: str) -> None:
    found = study(scale, "robustness_audit")
    for row in found.rows:
        jobs = audit_jobs(found.params, row.runs[0])  # pyright: ignore[reportArgumentType]
        images = {name: getattr(jobs[name].measure, "images", None) for name in ("clean", "pgd", "autoattack")}
        assert set(images.values()) == {found.params.audit_images}  # pyright: ignore[reportAttributeAccessIssue]


def test_an_audit_covers_the_plan_transfers_and_autoattack() -> None:
    found = study("smoke", "robustness_audit")
    names = set(plan(0.1)) - {"transfer"} | {"autoattack"}
    sources = {f"transfer_from_{name}" for name in ("teacher", "earlier_loop", "adversarially_trained")}
    for row in found.rows:
        jobs = audit_jobs(found.params, row.runs[0])  # pyright: ignore[reportArgumentType]
        # The ST net is the earlier loop itself.
        expected = sources - {"transfer_from_earlier_loop"} if row.id == "st" else sources
        assert set(jobs) == names | expected
        assert {job.run for job in jobs.values()} == {row.runs[0]}
        measured = {job for cell in row.cells for job in cell.jobs}
        assert measured == set(jobs.values())


def test_the_controls_share_everything_but_the_method_with_loop_1() -> None:
    found = study("smoke", "isd_autoattack")
    for name, teacher in (("self_kd", True), ("self_st", False)):
        for control, loop in zip(found.row(name).runs, found.row("isd_wot_1").runs, strict=True):
            assert (control.teacher is not None) == teacher
            assert replace(control, method=loop.method, teacher=loop.teacher) == loop


def test_the_students_of_proposition_1_differ_in_what_is_aligned() -> None:
    found = study("smoke", "prop1_certified")
    loss, logits = (found.row(name).runs[0] for name in ("kdiga_loss", "kdiga_logits"))
    assert isinstance(loss.method, KDIGA) and isinstance(logits.method, KDIGA)
    assert (loss.method.align, logits.method.align) == ("loss", "logits")
    assert replace(logits, method=loss.method) == loss


def test_ard_stands_at_its_own_settings() -> None:
    (method,) = {run.method for run in study("smoke", "pareto").row("ard").runs}
    assert isinstance(method, ARD)
    assert (method.lambda_ce, method.lambda_kl, method.temperature, method.attack.steps) == (0.0, 1.0, 30.0, 2)
    (plain,) = {run.method for run in study("smoke", "pareto").row("fgsm_at").runs}
    assert isinstance(plain, AT) and plain.attack.steps == 1


# ---- the factorial ----


def test_the_design_is_balanced_orthogonal_and_of_resolution_iv() -> None:
    chosen = factors()  # pyright: ignore[reportArgumentType]
    columns = [factor.signs for factor in chosen]
    assert len(chosen) == 8 and all(sum(signs) == 0 and len(signs) == 16 for signs in columns)
    for a, b in combinations(columns, 2):
        assert sum(x * y for x, y in zip(a, b, strict=True)) == 0
    products = [tuple(x * y for x, y in zip(a, b, strict=True)) for a, b in combinations(columns, 2)]
    for signs in columns:
        for product in products:
            assert sum(x * y for x, y in zip(signs, product, strict=True)) == 0


def planted(effects: dict[int, float], noise: list[float], chosen: list[Factor]) -> list[float]:
    return [
        50 + sum(points / 2 * chosen[index].signs[run] for index, points in effects.items()) + noise[run]
        for run in range(16)
    ]


def test_main_effects_are_found_as_planted() -> None:
    chosen = factors()  # pyright: ignore[reportArgumentType]
    found = main_effects(chosen, planted({0: 8.0, 3: -2.0, 7: 0.5}, [0.0] * 16, chosen))
    assert [effect.points for effect in found] == pytest.approx([8, 0, 0, -2, 0, 0, 0, 0.5])
    assert all(effect.high - effect.low == pytest.approx(0, abs=1e-9) for effect in found)


def test_an_interaction_widens_the_interval_and_moves_no_effect() -> None:
    chosen = factors()  # pyright: ignore[reportArgumentType]
    interaction = [3.0 * a * b for a, b in zip(chosen[1].signs, chosen[4].signs, strict=True)]
    found = main_effects(chosen, planted({0: 8.0}, interaction, chosen))
    assert [effect.points for effect in found] == pytest.approx([8, 0, 0, 0, 0, 0, 0, 0])
    # One of seven columns holds 6 points: t(7) = 2.365 times 6/√7.
    assert found[0].high - found[0].points == pytest.approx(2.3646 * 6 / math.sqrt(7), rel=1e-3)


def test_a_design_needs_a_value_a_combination() -> None:
    chosen = factors()  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="16 combinations needs as many values, got 15"):
        main_effects(chosen, [1.0] * 15)


def test_a_combination_has_the_levels_of_its_row() -> None:
    found = study("digits", "ablations")
    chosen = factors()  # pyright: ignore[reportArgumentType]
    read_off = {
        "lambda_iga": lambda run: run.method.lambda_iga > 0.5 * (64**1.5 if run.method.norm == "batch" else 1),
        "iga_norm": lambda run: run.method.norm == "batch",
        "kl_reduction": lambda run: run.method.kl_reduction == "mean",
        "temperature": lambda run: run.method.temperature > 1,
        "head_dropout": lambda run: run.head_dropout > 0,
        "schedule": lambda run: not run.schedule.compounding,
        "selection": lambda run: run.schedule.selection == "best_on_test",
        "init": lambda run: run.init is not None,
    }
    assert {factor.name for factor in chosen} == set(read_off)
    for index in range(16):
        (run,) = found.row(f"combination_{index + 1:02d}").runs
        assert {f.name: f.signs[index] > 0 for f in chosen} == {name: high(run) for name, high in read_off.items()}


def test_the_effective_weight_does_not_depend_on_the_norm() -> None:
    rows = [row for row in study("digits", "ablations").rows if row.id.startswith("combination")]
    weights = sorted({round(row.weights[1], 9) for row in rows if row.weights})
    assert weights == [0.1, 1.0]


def test_the_presets_are_those_of_the_methods() -> None:
    found = study("digits", "ablations")
    for name, preset in (("paper", "paper"), ("author_code", "author_code")):
        (method,) = {run.method for run in found.row(name).runs}
        assert isinstance(method, KDIGA)
        assert (method.norm, method.kl_reduction) == (PRESETS[preset]["norm"], PRESETS[preset]["kl_reduction"])
    weights = {name: found.row(name).weights for name in ("paper", "author_code", "author_code_effective")}
    assert weights["author_code_effective"] is not None and weights["paper"] is not None
    assert weights["author_code_effective"][1] == pytest.approx(weights["paper"][1])


def test_milestones_of_an_ablation_lie_within_its_epochs() -> None:
    for epochs, milestones in ((2, (1,)), (3, (1, 2)), (8, (4, 6))):
        run = study("smoke", "ablations", ablation_epochs=epochs).rows[0].runs[0]
        assert run.schedule.milestones == milestones
    with pytest.raises(ParameterError, match=r"ablation_epochs: .*greater than or equal to 2"):
        study("smoke", "ablations", ablation_epochs=1)


# ---- the search for ISD ----


def test_a_setting_of_the_search_has_the_levels_of_its_row() -> None:
    found = study("digits", "isd_search")
    chosen = isd_factors(found.params)  # pyright: ignore[reportArgumentType]
    read_off = {
        "lambda_isd": lambda run: run.method.lambda_iga > 2 * (64**1.5 if run.method.norm == "batch" else 1),
        "init": lambda run: run.init is None,
        "head_dropout": lambda run: run.head_dropout > 0,
        "iga_norm": lambda run: run.method.norm == "batch",
        "first teacher": lambda run: run.teacher.schedule.selection == "validation",
        "learning_rate_decay": lambda run: run.schedule.learning_rate < run.teacher.schedule.learning_rate,
        "activation": lambda run: run.model.endswith("_relu"),
    }
    assert [factor.name for factor in chosen] == list(read_off)
    for index in range(16):
        (run,) = found.row(combination_row(index + 1)).runs
        assert {f.name: f.signs[index] > 0 for f in chosen} == {name: high(run) for name, high in read_off.items()}
        assert run.init in (None, run.teacher)


def test_main_effects_of_the_search_are_clear_of_pairs_of_choices() -> None:
    chosen = isd_factors(study("digits", "isd_search").params)  # pyright: ignore[reportArgumentType]
    columns = np.array([factor.signs for factor in chosen])
    assert np.array_equal(columns @ columns.T, 16 * np.eye(len(chosen)))
    for one, two in combinations(columns, 2):
        assert not (columns @ (one * two)).any()


def test_the_finalists_are_followed_and_the_controls_differ_in_one_thing() -> None:
    found = study("digits", "isd_search", finalists=[13], loops=3)
    later = [row.id for row in found.rows if "_loop_" in row.id]
    assert later == ["combination_13_loop_2", "combination_13_loop_3"]
    assert found.row(later[1]).runs[0].teacher == found.row(later[0]).runs[0]
    (aligned,) = found.row("isd_wot_1_30").runs
    for name, target in (("isd_wot_1_zero", "zero"), ("isd_wot_1_shuffled", "shuffled")):
        (control,) = found.row(name).runs
        assert replace(control, method=replace(control.method, target_gradient="teacher")) == aligned  # pyright: ignore
        assert control.method.target_gradient == target  # pyright: ignore[reportAttributeAccessIssue]
    (plain,) = found.row("self_st").runs
    assert plain == replace(aligned, method=ST(), teacher=None)
    without = study("cifar10", "isd_search").params
    assert isinstance(without, IsdSearchParams) and len(isd_factors(without)) == 6
    with pytest.raises(ParameterError, match=r"finalists.*less than or equal to 16"):
        study("smoke", "isd_search", finalists=[17])


def test_the_published_finalists_are_the_best_on_held_out_images() -> None:
    ours = report.values(pd.read_csv(paths.published("digits") / "isd_search.csv"))
    params = study("digits", "isd_search").params
    score = {
        number: ours[combination_row(number), "validation_clean"] + ours[combination_row(number), "validation_pgd20"]
        for number in range(1, 17)
    }
    assert sorted(params.finalists) == sorted(sorted(score, key=lambda n: score[n])[-3:])  # pyright: ignore


# ---- what is shown ----


@pytest.fixture(autouse=True)
def closed_figures() -> Any:
    yield
    plt.close("all")


def drawn(figure: Figure, path: Path) -> None:
    """Layout and fonts are only worked out when it is drawn; a warning there is an error here."""
    figure.savefig(path / "figure.png")
    assert (path / "figure.png").stat().st_size > 1000


def test_an_audit_is_measured_judged_and_drawn(tmp_path: Path) -> None:
    whole = study("smoke", "robustness_audit", autoattack_images=0)
    found = replace(whole, rows=tuple(row for row in whole.rows if row.id in ("st", "trades_student")))
    assert not run_all(found.jobs(), workers=1).failed
    results = {row.label: findings(found.params, row) for row in found.rows}  # pyright: ignore[reportArgumentType]
    verdicts = {label: verdict(one) for label, one in results.items()}
    assert list(plots.verdict_table(verdicts).index) == list(results)
    table = plots.audit_table(results)
    assert "RayS (labels only)" in table.index and "PGD, radius 2 ε" in table.index
    drawn(plots.plot_audit(results, "title"), tmp_path)
    drawn(plots.plot_surfaces(results, "title"), tmp_path)
    assert len(plots.with_training_cost(report.frame(found), found)) == len(report.frame(found)) + 2
    assert worth_of_test_selection(found) == []


@pytest.mark.parametrize("name", ["prop1_certified", "prop2_bound"])
def test_the_propositions_are_measured_and_drawn(name: str, tmp_path: Path) -> None:
    found = study("smoke", name)
    assert not run_all(found.jobs(), workers=1).failed
    ours = report.values(report.frame(found))
    if name == "prop1_certified":
        drawn(plots.plot_radii(found, ["kd", "kdiga_loss"], "title"), tmp_path)
        assert ours["teacher", "kept"] == 100
    else:
        drawn(plots.plot_tightness(found, "title"), tmp_path)
        partly = replace(found, rows=(found.rows[0], *study("smoke", name, bound_images=5).rows[1:]))
        assert [row.is_done() for row in partly.rows] == [row == found.rows[0] for row in partly.rows]
        assert [len(axes.collections) for axes in plots.plot_tightness(partly, "title").axes] == [1, 1, 1]
        for row in found.rows:
            assert ours[row.id, "violations"] == ours[row.id, "violations_tight"] == 0
            assert ours[row.id, "gap"] <= ours[row.id, "bound_tight"] <= ours[row.id, "bound"]
            assert ours[row.id, "bound_l2"] < ours[row.id, "bound"]
    with pytest.raises(KeyError, match="has no metric"):
        plots.results(found.rows[0], "nonsense")


def test_students_of_weaker_teachers_differ_from_table_1_only_in_their_teacher() -> None:
    found = study("digits", "alignment_or_penalty", teacher_radii=[0.0, 0.03])
    zero = weighted_row("kdiga_zero", 1.5)
    for radius in (0.0, 0.03):
        teachers = found.row(taught_row("teacher", radius)).runs
        for kind, same in zip(TAUGHT, ("kd", zero, weighted_row("kdiga", 1.5)), strict=True):
            runs = found.row(taught_row(kind, radius)).runs
            assert [run.teacher for run in runs] == list(teachers)
            others = found.row(same).runs
            assert [replace(run, teacher=other.teacher) for run, other in zip(runs, others, strict=True)] == list(
                others
            )
    standard, weak = (found.row(taught_row("teacher", radius)).runs[0] for radius in (0.0, 0.03))
    assert isinstance(standard.method, ST) and isinstance(weak.method, AT)
    assert weak.method.attack.epsilon == 0.03
    assert standard.model == weak.model == found.params.teacher and standard.schedule == weak.schedule


def test_the_loops_and_pgd_training_beside_the_penalties_are_those_of_table_1() -> None:
    found, table1 = (study("digits", name) for name in ("alignment_or_penalty", "table1"))
    assert isinstance(found.params, AlignmentParams)
    assert len(loop_rows(found.params)) == found.params.loops == 6
    for row in [*loop_rows(found.params), "pgd_student", "ard"]:
        assert found.row(row).runs == table1.row(row).runs


def test_nets_at_chance_are_counted_and_not_drawn() -> None:
    found = study("cifar10_cpu", "alignment_or_penalty")
    table = pd.read_csv(paths.published("cifar10_cpu") / "alignment_or_penalty.csv")
    assert isinstance(found.params, AlignmentParams)
    (axes,) = plots.plot_weights(table, found.params, "pgd20", "title").axes
    assert "not shown: 1 net at chance (10 %)" in [text.get_text() for text in axes.texts]
    points = {line.get_label(): np.size(line.get_xdata()) for line in axes.lines}
    assert (points["ISD-WoT-1"], points["ISD-WoT, loops 1 to 6"], points["PGD AT"]) == (2, 6, 1)


def test_weaker_teachers_are_measured_and_drawn(tmp_path: Path) -> None:
    found = study("smoke", "alignment_or_penalty", grid=[0.3], teacher_radii=[0.0, 0.03])
    assert not run_all(found.jobs(), workers=1).failed
    params = found.params
    assert isinstance(params, AlignmentParams)
    figure = plots.plot_teachers(report.frame(found), params, f"pgd{params.pgd_steps}", "title")
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()][:2] == ["standard training", "AT, ε = 0.03"]
    drawn(figure, tmp_path)


def test_effects_are_drawn(tmp_path: Path) -> None:
    chosen = factors()  # pyright: ignore[reportArgumentType]
    effects = {"clean": main_effects(chosen, [50.0 + run % 3 for run in range(16)])}
    assert list(plots.effects_table(effects).index) == [factor.name for factor in chosen]
    drawn(plots.plot_effects(effects, "title"), tmp_path)


def test_test_selection_is_worth_what_the_curves_say() -> None:
    found = study("smoke", "ablations")
    chosen = [row for row in found.rows if row.id in ("combination_01", "author_code")]
    part = replace(found, rows=tuple(chosen))
    assert not run_all(part.jobs(), workers=1).failed
    on_test = [run for row in chosen for run in row.runs if run.schedule.selection == "best_on_test"]
    worth = worth_of_test_selection(part)
    assert len(worth) == len(on_test) > 0 and min(worth) >= 0


def test_standard_training_is_the_start_of_every_chain() -> None:
    for run in study("smoke", "isd_autoattack").row("isd_wot_1").runs:
        assert isinstance(run.init, Run) and isinstance(run.init.method, ST)
