"""``kdiga verify`` on real stores of the smoke scale: as published, changed, tampered with, damaged and empty."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner, Result

from kdiga_nb import paths
from kdiga_nb.artifacts.paper import table5
from kdiga_nb.cli import app
from kdiga_nb.params import Table5Params, at_scale
from kdiga_nb.report.numbers import frame, value
from kdiga_nb.runs.graph import run_all
from kdiga_nb.runs.run import folder, run_key

EXPERIMENT = table5(at_scale(Table5Params, "smoke"))
FIRST, SECOND = (EXPERIMENT.row(name).runs[0] for name in ("kdiga_fgsm", "fgsm_at"))


@pytest.fixture(scope="module")
def trained_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of Table 5 at the smoke scale."""
    home = tmp_path_factory.mktemp("table5") / "runs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDIGA_RUNS", str(home))
        assert not run_all(EXPERIMENT.jobs(), workers=1, device="cpu").failed
    return home


@pytest.fixture
def table(trained_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the store for one test, and its own table as the published one."""
    shutil.copytree(trained_store, tmp_path / "store")
    monkeypatch.setenv("KDIGA_RUNS", str(tmp_path / "store"))
    monkeypatch.setattr(paths, "published", lambda scale: tmp_path / "published" / scale)
    path = paths.published("smoke") / "table5.csv"
    path.parent.mkdir(parents=True)
    frame(EXPERIMENT).to_csv(path, index=False)
    return path


def kdiga_verify(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["verify", "--scale", "smoke", *arguments])


def change(path: Path, metric: str, **values: float) -> None:
    """Other published values of the first row."""
    table = pd.read_csv(path)
    at = (table["row"] == "kdiga_fgsm") & (table["metric"] == metric)
    for name, number in values.items():
        table[name] = table[name].mask(at, number)
    table.to_csv(path, index=False)


def test_the_same_results_are_reproduced(table: Path) -> None:
    result = kdiga_verify()
    assert result.exit_code == 0
    values, claims, *lines = result.stdout.splitlines()
    assert values.startswith("verify smoke: 15 of 15 values agree with the published ones, 0 are outside")
    assert claims.endswith("0 not as published")
    assert len(lines) == 2 and all(line.startswith(("✓", "✗")) for line in lines)


def test_a_value_outside_its_interval_is_chance_unless_the_test_rejects(table: Path) -> None:
    own = value(frame(EXPERIMENT), "kdiga_fgsm", "clean")
    change(table, "clean", value=own + 5, low=own + 0.1, high=own + 10)  # the published interval lies above our value
    result = kdiga_verify()
    assert result.exit_code == 0 and "1 are outside their interval by chance, 0 differ" in result.stdout
    assert f"  chance: table5, kdiga_fgsm, clean: {own:g}, published" in result.stdout
    change(table, "clean", value=99.0, low=98.0, high=99.5, n=1000)
    result = kdiga_verify()
    assert result.exit_code == 1 and "0 are outside their interval by chance, 1 differ" in result.stdout
    assert f"  differs: table5, kdiga_fgsm, clean: {own:g}, published 99 [98, 99.5], p = " in result.stdout


def test_values_of_published_runs_alone_are_counted_apart(table: Path) -> None:
    row = EXPERIMENT.row("kdiga_fgsm")
    for run in row.runs:
        record = json.loads((folder(run) / "run.json").read_text())
        (folder(run) / "run.json").write_text(json.dumps(record | {"published": "smoke"}))
    apart = sum(pd.read_csv(table)["row"].eq(row.id) & pd.read_csv(table)["n"].gt(0))
    first, _, taken, *_ = kdiga_verify().stdout.splitlines()
    assert first.startswith(f"verify smoke: {15 - apart} of {15 - apart} values agree") and 0 < apart < 15
    runs = f"{len(row.runs)} of the runs are published ones, not trained here"
    assert taken == f"{runs}; {apart} of {apart} values that rest on them alone are in the published tables"
    change(table, "clean", value=99.0, low=98.0, high=99.5, n=1000)
    result = kdiga_verify()
    assert result.exit_code == 1 and f"{apart - 1} of {apart} values that rest on them" in result.stdout
    assert "  differs: table5, kdiga_fgsm, clean: " in result.stdout


def test_a_tampered_measure_and_a_damaged_net_are_both_named(table: Path) -> None:
    path = folder(FIRST) / "measures.json"
    measures = json.loads(path.read_text())
    name = next(name for name, result in measures.items() if "survivors" in result)
    measures[name]["percent"] += 1.0
    path.write_text(json.dumps(measures))
    weights = folder(SECOND) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    result = kdiga_verify()
    assert result.exit_code == 1
    assert f"run {run_key(FIRST)}: measure kdiga" in result.stdout and "but its images give" in result.stdout
    assert f"run {run_key(SECOND)} is damaged: the weights do not match their sha256" in result.stdout


def test_nothing_measured_is_no_verdict(tmp_path: Path) -> None:
    result = kdiga_verify("--json", str(tmp_path / "a.json"))
    assert (result.exit_code, result.stdout) == (1, "verify smoke: nothing is measured yet\n")
    record = json.loads((tmp_path / "a.json").read_text())
    assert not record["reproduced"] and {claim["verdict"] for claim in record["claims"]} == {"not measured"}
    assert list(tmp_path.iterdir()) == [tmp_path / "a.json"]  # no store is made


def test_the_report_is_written_as_json_and_as_a_page(table: Path, tmp_path: Path) -> None:
    change(table, "clean", value=99.0, low=98.0, high=99.5, n=1000)
    assert kdiga_verify("--json", str(tmp_path / "a.json"), "--markdown", str(tmp_path / "a.md")).exit_code == 1
    record = json.loads((tmp_path / "a.json").read_text())
    (differs,) = [value for value in record["values"] if value["outcome"] == "differs"]
    assert (differs["row"], differs["metric"], differs["published"]) == ("kdiga_fgsm", "clean", 99.0)
    assert len(record["problems"]) == 1 and record["problems"][0].startswith("differs: table5, kdiga_fgsm, clean")
    page = (tmp_path / "a.md").read_text()
    assert page.startswith("# smoke: not reproduced\n") and "| table5 | kdiga_fgsm | clean | " in page
    result = kdiga_verify("--json", str(tmp_path / "no" / "a.json"))
    assert result.exit_code == 1 and result.stderr.splitlines()[0].endswith("a.json: No such file or directory")


def test_a_ledger_with_an_unknown_rule_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = paths.claims().read_text().replace("{more_than: 0, of: [kdiga, robust]", "{beats: 0, of: [kdiga, robust]", 1)
    (tmp_path / "claims.yaml").write_text(text)
    monkeypatch.setattr(paths, "claims", lambda: tmp_path / "claims.yaml")
    result = kdiga_verify()
    (line,) = result.stderr.splitlines()
    assert result.exit_code == 2 and line.startswith("claims.yaml: kdiga_over_kd: rule: must be one of at_least")
