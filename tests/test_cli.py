"""The command: errors in one line that leave everything as it was, and whole reproductions by real processes."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import safetensors.torch
import torch
import typer
from torch import nn
from torchvision.transforms.functional import to_pil_image
from typer.testing import CliRunner, Result

from kdiga_nb import paths
from kdiga_nb.artifacts import EVERY
from kdiga_nb.artifacts.paper import table5
from kdiga_nb.cli import app, check_sources, explorer_at
from kdiga_nb.data import load_data
from kdiga_nb.measures import TestAccuracy
from kdiga_nb.methods import ST
from kdiga_nb.notebooks import ARTEFACTS, load
from kdiga_nb.params import Table1Params, Table5Params, at_scale, models
from kdiga_nb.report.numbers import COLUMNS
from kdiga_nb.report.numbers import value as value_of
from kdiga_nb.runs import Checkpoint
from kdiga_nb.runs.graph import NO_TRAINING, Job, graph_of
from kdiga_nb.runs.listing import list_store, net_in
from kdiga_nb.runs.run import Run, ancestors, folder, run_key
from kdiga_nb.runs.store import is_published, measure
from kdiga_nb.training import Schedule

SMOKE = paths.PARAMS / "smoke.yaml"


def kdiga(*arguments: str, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(app, list(arguments), env=env)


@pytest.fixture(autouse=True)
def own_figures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("KDIGA_FIGURES", str(tmp_path / "figures"))
    return tmp_path / "figures"


@dataclass
class Place:
    """A folder of one's own to call the command from, by processes that share store and figures."""

    home: Path

    @property
    def figures(self) -> Path:
        return self.home / "figures" / "smoke"

    @property
    def env(self) -> dict[str, str]:
        names = {"KDIGA_RUNS": self.home / "runs", "KDIGA_FIGURES": self.home / "figures", "PYTHONPATH": paths.ROOT}
        return os.environ | {name: str(path) for name, path in names.items()}

    def call(self, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", module, *arguments]
        return subprocess.run(command, cwd=self.home, env=self.env, capture_output=True, text=True, timeout=300)

    def reproduce(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.call("kdiga_nb.cli", "reproduce", "--scale", "smoke", "--only", "table5", "--jobs", "1", *arguments)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("elsewhere"))


@pytest.fixture(scope="module")
def reproduced(place: Place) -> tuple[Place, subprocess.CompletedProcess[str]]:
    return place, place.reproduce()


# ---- refused before anything happens ----


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["reproduce", "--scale", "cifar1000"], "--scale: must be one of cifar10, .*smoke.*, got 'cifar1000'"),
        (["reproduce", "--scale", "smoke", "--only", "table7"], "--only: must be one of figure1, .*, got 'table7'"),
        (["reproduce", "--scale", "smoke", "--only", "table5", "--set", "lamda_iga=3"], "lamda_iga: unknown key"),
        (["reproduce", "--scale", "smoke", "--only", "table5", "--set", "epsilon=1.5"], "epsilon: .* got 1.5"),
        (["reproduce", "--scale", "smoke", "--only", "table5", "--set", "epsilon"], "NAME=VALUE"),
        (["reproduce", "--scale", "smoke", "--only", "table5", "--set", "scale=digits"], "scale: must be smoke"),
        (["reproduce", "--scale", "smoke", "--only", "table5", "--set", "device=cuda:99"], "device: .*cuda:99"),
        (["reproduce", "--scale", "smoke", "--only", "table5", "--set", "loops=3"], "loops: unknown key"),
        (["reproduce", "--studies", "publish"], r"--studies: must be one of .*mean published\?\), got 'publish'"),
        (["reproduce", "--scale", "smoke", "--studies", "published"], "--studies published: smoke: no runs are publ"),
        (["reproduce", "--scale", "smoke", "--set", "milestones=[7]"], "milestones: must rise"),
        (["reproduce", "--scale", "smoke", "--set", "all_seeds_rows=['kdigo']"], r"all_seeds_rows: .*mean kdiga\?"),
        (["reproduce", "--scale", "smoke", "--set", "lambda_penalty=-1"], "lambda_penalty: .*greater than or equal"),
        (["store", "pull", "cifar1"], r"SCALE: must be one of .*did you mean cifar10\?\), got 'cifar1'"),
        (["store", "pack", "smoke", "--set", "swep=[1]"], r"--set swep.*did you mean sweep\?"),
        (["store", "pack", "smoke", "--row", "kdigo"], r"--row: must be one of st, .*did you mean kdiga\?"),
        (
            ["train", str(SMOKE), "--artefact", "table5", "--row", "kdigo"],
            "--row: must be one of kdiga_fgsm, .*, got 'kdigo'",
        ),
        (["train", str(SMOKE), "--artefact", "table5", "--set", "seeds=[]"], "seeds: .*at least 1 item"),
        (["train", str(SMOKE), "--artefact", "table2", "--row", "kdiga_vit_base_to_cnn"], "has no net at this scale"),
        (["train", "somewhere/table5.yaml"], "there is no such file"),
        (["train", "somewhere/other.yaml", "--artefact", "table1"], "there is no such file"),
        (["train", str(SMOKE)], "--artefact, or a key `artefact` in the file, must be one of figure1"),
        (["train", str(SMOKE), "--artefact", "tabel1"], r"--artefact: must be one of figure1, .*did you mean table1\?"),
        (["compare", "table1", "kdiga", "kdigo"], r"row: must be one of st, .*mean kdiga\?\), got 'kdigo'"),
        (["compare", "table1", "kdiga:9", "kd"], "kdiga: seed must be one of 0, 1, 2, 3, 4, got 9"),
        (["compare", "table1", "kdiga:one", "kd"], "kdiga:one: a seed is a whole number, as in kdiga:0"),
        (["compare", "walkthrough", "st", "kd"], "artefact: must be one of figure1, .*, got 'walkthrough'"),
        (["compare", "prop2_bound", "st", "kd"], "prop2_bound: st and kd have no accuracy in common"),
        (["compare", "table1", "st", "kd", "--scale", "digit"], r"--scale: must be .*mean digits\?\), got 'digit'"),
        (["compare", "table1", "st", "kd", "--set", "lamda_iga=3"], "--set lamda_iga: unknown key"),
        (["params", "table7"], r"artefact: must be one of .*did you mean table\d\?\), got 'table7'"),
        (["params", "table1", "--scale", "cifar"], r"--scale: must be one of .*did you mean cifar10\?\), got 'cifar'"),
    ],
    ids=lambda value: " ".join(value[1:]).replace(str(SMOKE), "") if isinstance(value, list) else "",
)
def test_refused_in_one_line(arguments: list[str], says: str, own_figures: Path):
    result = kdiga(*arguments)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert re.search(says, line), line
    assert result.stdout == ""
    assert not paths.runs().exists()
    assert not own_figures.exists()


def test_a_store_that_cannot_be_written_is_said_in_one_line(tmp_path: Path):
    (tmp_path / "file").touch()
    env = {"KDIGA_RUNS": str(tmp_path / "file" / "runs")}
    result = kdiga("train", str(SMOKE), "--artefact", "table5", "--row", "fgsm_at", "--jobs", "1", env=env)
    assert result.exit_code == 1
    assert "cannot be written" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("arguments", [["--help"], ["reproduce", "--help"], ["train", "--help"], ["runs", "--help"]])
def test_help(arguments: list[str]):
    assert kdiga(*arguments).exit_code == 0


# ---- without training much ----


def test_dry_run_says_what_would_be_done_and_does_nothing(own_figures: Path):
    result = kdiga("reproduce", "--scale", "smoke", "--dry-run")
    assert result.exit_code == 0
    for name in EVERY:
        assert f"{name}: " in result.stdout
    assert "trainings: 0 cached" in result.stdout
    teacher = table5(at_scale(Table5Params, "smoke")).row("kdiga_fgsm").runs[0].teacher
    assert teacher is not None
    # Figure 1 and Tables 1, 3, 4 and 5 distil from it, and it is listed to be trained once.
    assert sum(line.strip().startswith(run_key(teacher)) for line in result.stdout.splitlines()) == 1
    assert not paths.runs().exists()
    assert not own_figures.exists()


def test_without_training_an_empty_store_stays_empty_and_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(NO_TRAINING, "")  # the command sets the variable; this restores it
    result = kdiga("reproduce", "--scale", "smoke", "--only", "table1", "walkthrough", "--no-training")
    assert result.exit_code == 0
    for name in ("table1", "walkthrough"):
        assert f"{name}: left out, the store lacks its results" in result.stdout
    assert "notebooks: 0 made, 0 cached, 0 failed" in result.stdout
    assert list(paths.runs().iterdir()) == []


def test_without_training_an_audit_that_has_no_whole_net_is_left_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(NO_TRAINING, "")
    audit = load("smoke", "robustness_audit", {})
    assert audit is not None
    (job,) = next(cell.jobs for cell in audit.row("st").cells if cell.metric == "clean")
    assert job.measure is not None
    measure(job.run, job.measure, reference=job.reference)
    assert job.is_done() and not audit.row("st").is_done()
    result = kdiga("reproduce", "--scale", "smoke", "--only", "robustness_audit", "--no-training")
    assert result.exit_code == 0
    assert "robustness_audit: left out, the store lacks its results" in result.stdout


def test_studies_may_use_published_runs_and_the_papers_nets_are_trained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "published").mkdir()
    shutil.copy(paths.ROOT / "published" / "claims.yaml", tmp_path / "published")
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    arguments = ("reproduce", "--scale", "smoke", "--only", "table5", "pareto", "--jobs", "1", "--no-notebooks")
    assert kdiga(*arguments).exit_code == 0
    assert kdiga("store", "pack", "smoke").exit_code == 0
    monkeypatch.setenv("KDIGA_RUNS", str(tmp_path / "another"))
    broken = kdiga(*arguments, "--studies", "published", "--set", "learning_rate=1e30", "--set", "clip_norm=0")
    assert broken.exit_code == 1 and "the term cross_entropy is" in broken.stdout
    assert "copied" not in broken.stdout and not any(entry["state"] == "published" for entry in list_store())
    done = kdiga(*arguments, "--studies", "published")
    assert done.exit_code == 0, done.output
    paper, study = (load("smoke", name, {}) for name in ("table5", "pareto"))
    assert paper is not None and study is not None
    trained = {job.run for job in graph_of(paper.jobs())}
    pulled = {job.run for job in graph_of(study.jobs())} - trained
    assert pulled and all(map(is_published, pulled)) and not any(map(is_published, trained))
    assert f"{len(pulled)} of the runs are published ones, not trained here" in done.stdout
    made = re.search(r"runs and measurements: (\d+) made", done.stdout)
    every = graph_of([*paper.jobs(), *study.jobs()])
    assert made and int(made[1]) == len([job for job in every if job.run not in pulled])


def test_artefacts_are_named_in_reading_order():
    assert (*EVERY, "walkthrough") == ARTEFACTS
    assert {path.stem for path in paths.NOTEBOOKS.glob("*.ipynb")} == set(ARTEFACTS)


@pytest.mark.parametrize("name", ARTEFACTS)
def test_every_setting_is_listed_with_its_meaning(name: str):
    settings = json.loads(kdiga("params", name, "--scale", "cifar10", "--json").stdout)
    model = EVERY[name].params if name in EVERY else models()["walkthrough"]
    assert [one["name"] for one in settings] == list(model.model_fields)
    assert all(one["meaning"] and one["allowed"] for one in settings)
    values = {one["name"]: one["value"] for one in settings}
    assert (values["scale"], values["epsilon"]) == ("cifar10", 8 / 255)
    text = kdiga("params", name, "--scale", "cifar10").stdout
    assert [line.split(" = ")[0] for line in text.splitlines() if not line.startswith(" ")] == list(values)


def test_a_parameter_file_of_ones_own(tmp_path: Path):
    file = tmp_path / "my_run.yaml"
    file.write_text("scale: smoke\nlambda_iga: 3\nsettings:\n  batch_size: 128\n")
    (line,) = kdiga("train", str(file), "--row", "kdiga").stderr.splitlines()
    assert re.search(r"my_run\.yaml: --artefact, or a key `artefact` in the file, must be one of figure1, table1", line)
    file.write_text(file.read_text() + "artefact: table1\n")
    assert kdiga("train", str(file), "--row", "kdiga", "--jobs", "1").exit_code == 0
    own = at_scale(Table1Params, "smoke", {"lambda_iga": 3, "batch_size": 128})
    wanted = ancestors(EVERY["table1"].build(own).row("kdiga").runs)
    assert {entry["key"] for entry in list_store()} == {run_key(run) for run in wanted}


def test_train_one_row_and_list_it(own_figures: Path):
    row = EVERY["table1"].build(at_scale(Table1Params, "smoke")).row("kdiga")
    result = kdiga("train", str(SMOKE), "--artefact", "table1", "--row", "kdiga", "--jobs", "1")
    assert result.exit_code == 0
    assert "runs: 2 made, 0 cached, 0 failed" in result.stdout
    assert {entry["key"] for entry in list_store()} == {run_key(run) for run in ancestors(row.runs)}
    assert not own_figures.exists()

    assert (
        "runs: 0 made, 2 cached, 0 failed"
        in kdiga("train", str(SMOKE), "--artefact", "table1", "--row", "kdiga", "--jobs", "1").stdout
    )
    entries = json.loads(kdiga("runs", "--json").stdout)
    assert {entry["state"] for entry in entries} == {"finished"}
    head, *lines = kdiga("runs").stdout.splitlines()
    assert head.split()[:2] == ["key", "state"]
    assert [line.split()[0] for line in lines] == [entry["key"] for entry in entries]
    assert {"table1": "TRADES teacher → KDIGA → student"}.items() <= entries[0]["artefacts"].items()
    of_method = json.loads(kdiga("runs", "--method", "trades", "--json").stdout)
    assert [entry["run"]["method"]["type"] for entry in of_method] == ["trades"]
    assert len(json.loads(kdiga("runs", "--scale", "smoke", "--json").stdout)) == 2
    assert "no runs of that kind" in kdiga("runs", "--scale", "cifar10").stdout
    assert "did you mean" in kdiga("runs", "--method", "trade").stderr


def test_two_rows_are_compared_from_the_published_measurements():
    arguments = ["compare", "table1", "kdiga", "kd", "--scale", "cifar10_cpu"]  # three seeds each
    result = kdiga(*arguments)
    assert result.exit_code == 1 and "kdiga: clean is not measured; kdiga store pull brings" in result.stderr
    assert kdiga("store", "pull", "cifar10_cpu").exit_code == 0
    first, *lines = kdiga(*arguments).stdout.splitlines()
    assert first == "TRADES teacher → KDIGA → student minus TRADES teacher → KD → student, cifar10_cpu:"
    assert [line.partition(":")[0].strip() for line in lines] == ["clean", "PGD-20", "AutoAttack"]
    found = json.loads(kdiga(*arguments, "--json").stdout)
    table = pd.read_csv(paths.published("cifar10_cpu") / "table1.csv")
    for metric, n in {"clean": 10_000, "pgd20": 10_000, "autoattack": 1_000}.items():
        points = value_of(table, "kdiga", metric) - value_of(table, "kd", metric)
        assert found[metric]["points"] == pytest.approx(points, abs=2e-4), metric  # the table has six digits
        assert found[metric]["low"] < points < found[metric]["high"]
        assert (found[metric]["n"], found[metric]["seeds"]) == (n, 3)
    arguments[1] = "robustness_audit"  # no attack of its own was run at this scale
    lines = kdiga(*arguments[:3], "st", *arguments[4:]).stdout.splitlines()
    assert "  margin loss: kdiga: margin is not measured" in lines
    assert lines[-1].startswith("  AutoAttack: +38.7 [")


def test_a_missing_checkpoint_stops_only_what_has_still_to_be_trained_from_it(capsys: pytest.CaptureFixture[str]):
    """The head of IGAM's MNIST teacher; the published record of a training serves without the file."""
    missing = Checkpoint("absent.pt", None, "trades", "digits_small:digits")
    job = Job(Run("digits", "digits_small", ST(), Schedule(1), init=missing))
    with pytest.raises(typer.Exit):
        check_sources([job])
    assert "checkpoint absent.pt: there is no such file" in capsys.readouterr().err
    folder(job.run).mkdir(parents=True)
    (folder(job.run) / "run.json").touch()
    check_sources([job])


def test_an_empty_store_is_listed_too():
    assert json.loads(kdiga("runs", "--json").stdout) == []
    assert "no runs" in kdiga("runs").stdout


def test_training_that_fails_names_the_run_and_why():
    diverging = ["--set", "learning_rate=1e30", "--set", "clip_norm=0", "--set", "vit_epochs=1"]
    result = kdiga("train", str(SMOKE), "--artefact", "table2", "--row", "st_cnn", "--jobs", "1", *diverging)
    assert result.exit_code == 1
    assert "0 made, 0 cached, 1 failed" in result.stdout
    assert "the term cross_entropy is" in result.stdout


# ---- audit ----


@pytest.fixture
def weights(trained: nn.Module, tmp_path: Path) -> str:
    """A trained net as a file of weights."""
    path = tmp_path / "net.pt"
    torch.save(trained.state_dict(), path)
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["0123abcd"], "0123abcd: no finished run of the store has that key"),
        (["missing.pt", "--model", "digits_small:digits"], "missing.pt: there is no such file"),
        (["0123abcd", "--epsilon", "3"], "--epsilon: .*less than or equal to 1, got '3'"),
        (["0123abcd", "--epsilon", "wide"], "--epsilon: .*number, got 'wide'"),
    ],
)
def test_an_audit_refused_in_one_line(arguments: list[str], says: str):
    result = kdiga("audit", *arguments)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert re.search(says, line), line


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (None, "--model must name its net and data set, for there is no net.json"),
        ("digits_small:mnits", "dataset must be one of digits"),
        ("digits_tiny:digits", "model must be one of digits_small"),
        ("digits_large:digits", "has shape"),
    ],
)
def test_an_audit_of_a_file_needs_its_net(model: str | None, says: str, weights: str):
    result = kdiga("audit", weights, *(["--model", model] if model else []))
    assert result.exit_code == 2
    assert says in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.output


def test_an_audit_ends_in_a_verdict_and_resumes(weights: str):
    # At this radius every attack is over after its first steps.
    arguments = ["audit", weights, "--model", "digits_small:digits", "--epsilon", "1/2", "--images", "20", "--json"]
    first = kdiga(*arguments)
    assert first.exit_code == 0, first.output
    report = json.loads(first.stdout)
    assert report["verdict"] in ("sound", "overstated") and report["results"]["pgd"]["percent"] == 0
    assert {"clean", "hard_label", "square", "pgd_long", "autoattack"} <= set(report["results"])
    assert json.loads(kdiga(*arguments).stdout) == report
    lines = kdiga(*arguments[:-1]).stdout.splitlines()
    assert lines[-1].startswith(report["verdict"]) and any(line.startswith("autoattack") for line in lines)


@pytest.mark.parametrize("named", ["folder", "file"])
def test_a_published_net_is_audited_where_it_lies(named: str):
    weights = min((paths.ROOT / "published" / "digits" / "runs").glob("*/model.safetensors"))
    result = kdiga("audit", str(weights if named == "file" else weights.parent), "--epsilon", "1/2", "--images", "20")
    assert result.exit_code == 0, result.output
    assert "plain PGD 0.0 %" in result.stdout.splitlines()[-1]
    published = json.loads(gzip.decompress(weights.with_name("measures.json.gz").read_bytes()))
    recorded = published['{"attack": null, "images": null, "type": "TestAccuracy"}']["percent"]
    assert abs(measure(net_in(weights.parent), TestAccuracy())["percent"] - recorded) <= 0.4  # another processor


def test_a_folder_without_a_net_is_not_audited(tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"run": {"model": "digits_small", "dataset": "digits"}, "sha256": "0"}')
    for where, says in ((tmp_path, "there is no run.json"), (tmp_path / "run", "this run has no weights")):
        result = kdiga("audit", str(where))
        assert result.exit_code == 2 and says in result.stderr


def test_an_audit_of_a_run_that_learned_nothing_stops_and_says_why():
    command = ["train", str(SMOKE), "--artefact", "table5", "--row", "fgsm_at", "--jobs", "1"]
    assert kdiga(*command, "--set", "fgsm_learning_rate=1000").exit_code == 0
    (entry,) = list_store()
    result = kdiga("audit", entry["key"])
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1].startswith("invalid: no figure is evidence")
    assert "autoattack" not in result.stdout


# ---- export ----


@pytest.fixture
def key() -> str:
    """A finished run of the store."""
    assert kdiga("train", str(SMOKE), "--artefact", "table1", "--row", "st", "--jobs", "1").exit_code == 0
    return list_store()[0]["key"]


def test_an_export_carries_what_an_audit_needs(key: str, tmp_path: Path):
    file = tmp_path / "checkpoints" / "st.safetensors"
    result = kdiga("export", key, str(file), "--epsilon", "0.1")
    assert result.exit_code == 0, result.output
    record = json.loads(file.with_suffix(".json").read_text())
    assert set(record["accuracy"]) == {"clean", "pgd20"}
    assert all(found["as written"]["n"] == 500 for found in record["accuracy"].values())
    assert record["runs"][key]["run"]["method"]["type"] == "st" and record["history"][-1]["epoch"] >= 1
    written = safetensors.torch.load_file(file)
    statistics = {name for name in written if "running_" in name}
    assert {written[name].dtype for name in statistics} == {torch.float32}
    assert {v.dtype for k, v in written.items() if v.is_floating_point() and k not in statistics} == {torch.float16}
    for name, value in safetensors.torch.load_file(paths.runs() / key / "model.safetensors").items():
        torch.testing.assert_close(written[name].to(value.dtype), value, rtol=1e-3, atol=1e-4)
    audit = kdiga("audit", str(file), "--epsilon", "1/2", "--images", "5", "--json")
    assert json.loads(audit.stdout)["results"]["preconditions"]["n"] == 5


def test_an_exported_file_that_was_changed_is_refused(key: str, tmp_path: Path):
    file = tmp_path / "st.safetensors"
    assert kdiga("export", key, str(file)).exit_code == 0
    safetensors.torch.save_file({"head.bias": torch.zeros(10)}, file)
    result = kdiga("audit", str(file))
    assert result.exit_code == 2 and "its sha256 is" in result.stderr


@pytest.mark.parametrize(
    ("key_", "file", "says"),
    [
        ("0123abcd", "x.safetensors", "no finished run of the store has that key"),
        ("0123abcd", "x.pt", "must end in .safetensors"),
    ],
)
def test_an_export_refused_in_one_line(key_: str, file: str, says: str, tmp_path: Path):
    result = kdiga("export", key_, str(tmp_path / file))
    assert result.exit_code == 2 and not (tmp_path / file).exists()
    (line,) = result.stderr.splitlines()
    assert says in line


# ---- whole reproductions, by processes of their own, from another folder ----


def test_reproduce_leaves_table_figure_and_provenance(reproduced: tuple[Place, subprocess.CompletedProcess[str]]):
    place, done = reproduced
    assert done.returncode == 0, done.stderr
    assert "0 failed" in done.stdout
    files = {path.name for path in place.figures.iterdir() if path.is_file()}
    assert {"table5.csv", "table5.png", "table5.svg", "table5.json"} <= files
    table = pd.read_csv(place.figures / "table5.csv")
    assert list(table.columns) == COLUMNS
    assert not table.loc[table["metric"] == "clean", "value"].isna().any()
    provenance = json.loads((place.figures / "table5.json").read_text())
    assert provenance["parameters"] == Table5Params(**provenance["parameters"]).model_dump()
    assert provenance["parameters"]["scale"] == "smoke"


def test_reproduce_leaves_the_executed_notebook(reproduced: tuple[Place, subprocess.CompletedProcess[str]]):
    place, _ = reproduced
    content = nbformat.read(place.figures / "notebooks" / "table5.ipynb", as_version=4)
    code = [cell for cell in content.cells if cell.cell_type == "code" and cell.source.strip()]
    assert all(cell.execution_count for cell in code)
    assert not [output for cell in code for output in cell.outputs if output.get("output_type") == "error"]


def test_nothing_is_left_in_the_callers_folder(reproduced: tuple[Place, subprocess.CompletedProcess[str]]):
    place, _ = reproduced
    assert {path.name for path in place.home.iterdir()} <= {"runs", "figures", "out.ipynb"}


def test_reproduced_again_everything_is_cached(reproduced: tuple[Place, subprocess.CompletedProcess[str]]):
    place, _ = reproduced
    before = (place.figures / "table5.csv").read_bytes()
    plan = place.reproduce("--dry-run").stdout
    assert "6 trainings: 6 cached, 0 to do" in plan
    done = place.reproduce()
    assert done.returncode == 0, done.stderr
    assert "runs and measurements: 0 made" in done.stdout
    assert "notebooks: 0 made, 1 cached, 0 failed" in done.stdout
    assert (place.figures / "table5.csv").read_bytes() == before
    done = place.reproduce("--no-notebooks", "--again")
    assert "runs and measurements: 0 made" in done.stdout and "notebooks" not in done.stdout


def test_a_notebook_is_run_again_when_its_artefact_or_its_parameters_changed(
    reproduced: tuple[Place, subprocess.CompletedProcess[str]],
):
    place, _ = reproduced
    before = (place.figures / "table5.csv").read_bytes()
    (place.figures / "table5.csv").write_text("spoilt")
    for options in ([], ["--again"], ["--set", "pgd_steps=4"]):
        assert "notebooks: 1 made, 0 cached, 0 failed" in place.reproduce(*options).stdout, options
    # Back at the file's own parameters: what is there came from others.
    assert "notebooks: 1 made, 0 cached, 0 failed" in place.reproduce().stdout
    assert (place.figures / "table5.csv").read_bytes() == before


def test_plain_papermill_with_a_parameter_of_ones_own(reproduced: tuple[Place, subprocess.CompletedProcess[str]]):
    place, _ = reproduced
    source = str(paths.NOTEBOOKS / "table5.ipynb")
    options = ["-f", str(SMOKE), "-p", "lambda_iga", "4", "-p", "weight_decay", "1/2000"]
    done = place.call("papermill", source, "out.ipynb", *options, "-k", "python3")
    assert done.returncode == 0, done.stderr
    parameters = json.loads((place.figures / "table5.json").read_text())["parameters"]
    assert (parameters["lambda_iga"], parameters["weight_decay"]) == (4.0, 1 / 2000)


def test_papermill_with_a_misspelt_parameter_stops_before_it_trains(tmp_path: Path):
    place = Place(tmp_path)
    options = ["-f", str(SMOKE), "-p", "lamda_iga", "3", "-k", "python3"]
    done = place.call("papermill", str(paths.NOTEBOOKS / "table5.ipynb"), "out.ipynb", *options)
    assert done.returncode != 0
    assert "lamda_iga: unknown key" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_failing_notebook_is_named_and_the_status_says_so(tmp_path: Path):
    place = Place(tmp_path)
    done = place.reproduce("--set", "learning_rate=1e30", "--set", "clip_norm=0")
    assert done.returncode == 1
    (named,) = [line for line in done.stdout.splitlines() if line.strip().startswith("failed: table5")]
    assert "ReproductionError" in named
    assert "notebooks: 0 made, 0 cached, 1 failed" in done.stdout
    assert "the term cross_entropy is" in done.stdout
    assert "Traceback" not in done.stderr
    assert (place.figures / "notebooks" / "table5.ipynb").exists()
    assert not (place.figures / "table5.csv").exists()


# ---- a net and images of one's own ----


def photographs(folder: Path, per_class: int = 12) -> None:
    """Digits as PNG files, one folder per class."""
    split = load_data("digits").test
    for label in range(10):
        home = folder / str(label)
        home.mkdir(parents=True)
        for place in (split.labels == label).nonzero().flatten()[:per_class].tolist():
            to_pil_image(split.images[place]).convert("RGB").save(home / f"{place}.png")


def test_the_example_of_an_audit_of_ones_own_net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/audit.md's ``mymodule.py``, for images of three channels, trained for a moment."""
    text = (paths.ROOT / "docs" / "audit.md").read_text()
    (example,) = re.findall(r"```python\n# mymodule.py\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("mymodule.py").write_text(example.replace("1 * 8 * 8", "3 * 8 * 8"))
    photographs(Path("photographs"))
    train = load_data("digits").train
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10))
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(train.images.repeat(1, 3, 1, 1)), train.labels).backward()
        optimizer.step()
    torch.save(net.state_dict(), "weights.pt")
    command = ["audit", "weights.pt", "--model", "mymodule:build", "--data", "photographs"]
    result = kdiga(*command, "--epsilon", "0.2", "--images", "20", "--json")
    found = json.loads(result.stdout)
    assert found["verdict"] in ("sound", "overstated", "masked") and found["results"]["clean"]["n"] == 20
    assert found["results"]["clean"]["percent"] > 60 > found["results"]["autoattack"]["percent"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["weights.pt", "--data", "photographs"], "--data needs a file of weights and --model MODULE:FUNCTION"),
        (["weights.pt", "--model", "nowhere:build", "--data", "photographs"], "--model nowhere:build: ModuleNotFound"),
        (["weights.pt", "--model", "json:dumps", "--data", "photographs"], "--model json:dumps: TypeError"),
        (["weights.pt", "--model", "time:time", "--data", "photographs"], "time() returns a float, not a torch.nn"),
        (["weights.pt", "--model", "torch.nn:Identity", "--data", "missing"], "--data missing: "),
    ],
)
def test_an_own_net_that_cannot_be_audited_is_one_line(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({}, "weights.pt")
    photographs(Path("photographs"), per_class=1)
    result = kdiga("audit", *arguments)
    assert result.exit_code == 2 and says in result.stderr and len(result.stderr.splitlines()) == 1


def test_the_explorer_opens_at_another_scale_from_a_copy_that_stays(own_figures: Path) -> None:
    copy = explorer_at("cifar10_short")
    sources = [cell.source for cell in nbformat.read(copy, as_version=4).cells]
    assert copy == paths.figures("cifar10_short") / "explore.ipynb"
    assert [source for source in sources if 'scale = "cifar10_short"' in source]
    copy.write_text("mine")
    assert explorer_at("cifar10_short").read_text() == "mine"
