"""The paper's own scale on a CPU: every row of Table 1 on real CIFAR-10, shrunk by parameter overrides alone."""

import json

import pytest
from typer.testing import CliRunner

from kdiga_nb import paths
from kdiga_nb.artifacts import ARTIFACTS, reported
from kdiga_nb.artifacts.costs import costs, disk_bytes, net_of
from kdiga_nb.artifacts.recipes import control_runs
from kdiga_nb.cli import app
from kdiga_nb.params import Table1Params, at_scale
from kdiga_nb.report.numbers import frame
from kdiga_nb.runs.graph import Job, graph_of, run_all
from kdiga_nb.runs.store import load_or_train
from kdiga_nb.training import TrainingState

FILE = paths.PARAMS / "cifar10.yaml"
HERE = all((paths.data() / folder).is_dir() for folder in ("cifar-10-batches-py", "MNIST", "imagenette2-160"))
# Two steps a training, four images a measurement; a smaller net for the teacher.
SHRUNK = {
    "teacher": "preact_resnet18",
    "device": "cpu",
    "train_images": 4,
    "batch_size": 2,
    "selection": "last",
    "milestones": [],
    **dict.fromkeys(("epochs", "teacher_epochs", "isd_epochs", "head_epochs", "loops", "wit_loops"), 1),
    **dict.fromkeys(("train_steps", "at_steps", "pgd_steps"), 1),
    "test_images": 4,
    "autoattack_images": 0,
}


@pytest.mark.skipif(not HERE, reason="no CIFAR-10, MNIST and Imagenette under KDIGA_DATA")
def test_every_row_of_table_1_trains_and_is_measured_by_overrides_alone() -> None:
    params = at_scale(Table1Params, "cifar10", SHRUNK)
    experiment = ARTIFACTS["table1"].build(params)
    outcome = run_all(experiment.jobs(), workers=1, device="cpu")
    assert outcome.failed == {}
    table = frame(experiment)
    in_paper = set(reported.TABLE1) - {f"isd_wot_{loop}" for loop in range(2, 7)} - {"isd_wit"} | {"isd_wit_1"}
    assert set(table["row"]) == in_paper | set(control_runs(params))
    measured = table[table["metric"].isin(["clean", "pgd1"])]
    assert len(measured) == 2 * table["row"].nunique() and not measured["value"].isna().any()
    assert (measured["n"] == 4).all()


def plan(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["reproduce", "--dry-run", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_nets_without_robustness_are_selected_by_clean_accuracy() -> None:
    rows = {row.id: row.runs for row in ARTIFACTS["table1"].build(at_scale(Table1Params, "cifar10")).rows}
    radii = {name: {run.schedule.selection_epsilon for run in rows[name]} for name in ("st", "kd", "ard", "kdiga")}
    assert radii == {"st": {0.0}, "kd": {0.0}, "ard": {8 / 255}, "kdiga": {8 / 255}}


@pytest.mark.parametrize("scale", ["cifar10", "imagenette", "imagenet"])
def test_a_dry_run_needs_no_data_and_gives_hours_and_disk(
    scale: str, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("KDIGA_DATA", str(tmp_path_factory.mktemp("empty")))
    text = plan("--scale", scale, "--only", "table2")
    assert "h estimated" in text and "assumed, not measured" in text and "GB of weights" in text
    assert "by a measured step" not in text


def test_a_finished_run_makes_the_next_ones_hours_measured() -> None:
    scale = ["--scale", "smoke", "--only", "table5"]
    file = str(paths.PARAMS / "smoke.yaml")
    assert (
        CliRunner().invoke(app, ["train", file, "--artefact", "table5", "--row", "fgsm_at", "--jobs", "1"]).exit_code
        == 0
    )
    assert "by a measured step" not in plan(*scale)
    again = plan(*scale, "--set", "seeds=[0, 1]")
    assert again.count("by a measured step") == 1 and "cached" in again


def test_costs_count_operations_parameters_and_steps() -> None:
    """MobileNetV2 at 32×32: 91 million multiply-adds; WRN-34-10 6.7 billion."""
    assert net_of("mobilenet_v2", "cifar10").flops == pytest.approx(2 * 91e6, rel=0.01)
    assert net_of("wrn_34_10", "cifar10").flops == pytest.approx(2 * 6.66e9, rel=0.01)
    graph = graph_of(ARTIFACTS["table1"].build(at_scale(Table1Params, "cifar10")).jobs())
    found = costs(graph)
    assert set(found) == set(graph) and all(cost.seconds > 0 and not cost.measured for cost in found.values())
    trainings: list[Job] = [job for job in graph if job.measure is None]
    weights, checkpoint = disk_bytes(graph)
    assert weights == sum(4 * net_of(job.run.model or "", job.run.dataset).parameters for job in trainings)
    assert checkpoint == 3 * 4 * 46_160_474


def test_missing_data_is_said_before_anything_trains(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("empty")
    monkeypatch.delenv("KDIGA_DATA", raising=False)
    result = CliRunner().invoke(app, ["train", str(FILE), "--artefact", "table1", "--row", "st", "--data", str(root)])
    monkeypatch.setenv("KDIGA_DATA", str(root))  # what --data left there is taken back with this
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert "cifar10: not found under" in line and str(root) in line
    assert not paths.runs().exists()


def test_a_missing_published_teacher_is_said_before_anything_trains() -> None:
    override = ["--set", "teacher_checkpoint=state_dict:nowhere.pt"]
    file = str(paths.PARAMS / "smoke.yaml")
    result = CliRunner().invoke(app, ["train", file, "--artefact", "table1", "--row", "kdiga", *override])
    assert result.exit_code == 1
    assert "nowhere.pt: there is no such file" in result.stderr
    bad = CliRunner().invoke(
        app, ["train", file, "--artefact", "table1", "--row", "kdiga", "--set", "teacher_checkpoint=nowhere.pt"]
    )
    assert bad.exit_code == 2 and "teacher_checkpoint: must be FORMAT:PATH_OR_URL" in bad.stderr


def test_data_sets_are_listed_with_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("KDIGA_DATA", str(tmp_path_factory.mktemp("empty")))
    result = CliRunner().invoke(app, ["data", "digits", "mnist"])
    assert result.exit_code == 1
    assert "digits: 1297 training and 500 test images" in result.stdout
    assert "mnist: not found" in result.stderr
    assert CliRunner().invoke(app, ["data", "mnits"]).exit_code == 2


def test_a_run_under_way_is_listed_with_accuracy_and_time_left() -> None:
    parameters = at_scale(Table1Params, "smoke", {"epochs": 10})
    run = ARTIFACTS["table1"].build(parameters).row("st").runs[0]

    def stop(state: TrainingState) -> None:
        if state.epoch == 4:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        load_or_train(run, device="cpu", callbacks=[stop])
    (entry,) = json.loads(CliRunner().invoke(app, ["runs", "--json"]).stdout)
    assert entry["state"] == "epoch 4 of 10" and 0 < entry["accuracy"] <= 100
    assert entry["seconds_left"] == pytest.approx(entry["seconds"] * 6 / 4, abs=0.2)
    line = CliRunner().invoke(app, ["runs"]).stdout
    assert "% clean on validation" in line and "min left" in line
