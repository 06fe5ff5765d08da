"""A user's own tables compared with the published ones, and what the published tables say of the audit."""

import json
import math
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest

from kdiga_nb import paths
from kdiga_nb.audit.verdict import TELLING
from kdiga_nb.cli import _print_summary
from kdiga_nb.notebooks import Summary
from kdiga_nb.report.numbers import COLUMNS
from kdiga_nb.report.published import agrees, compare, summary
from kdiga_nb.runs.graph import Outcome

NAN = math.nan
SCALES = ["digits", "cifar10_cpu"]


@pytest.fixture(autouse=True)
def own_figures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("KDIGA_FIGURES", str(tmp_path / "figures"))
    return tmp_path / "figures"


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A kit that publishes nothing yet."""
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    return tmp_path


def write(path: Path, *lines: tuple[str, str, float, float, float]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"row": row, "label": row.upper(), "metric": metric, "value": value, "low": low, "high": high}
        for row, metric, value, low, high in lines
    ]
    pd.DataFrame(rows, columns=COLUMNS).to_csv(path, index=False)


@pytest.mark.parametrize(
    ("values", "holds"),
    [
        ((50.0, 50.0, 40.0, 60.0), True),
        ((60.0, 50.0, 40.0, 60.0), True),
        ((39.99, 50.0, 40.0, 60.0), False),
        ((60.01, 50.0, 40.0, 60.0), False),
        ((0.4772, 0.4811, NAN, NAN), True),
        ((0.47, 0.49, NAN, NAN), False),
        ((0.0, 0.0, NAN, NAN), True),
        ((3.0, 0.0, NAN, NAN), False),
        ((-1.5, 1.5, NAN, NAN), False),
    ],
)
def test_a_value_agrees_inside_the_interval_or_to_two_digits(values: tuple[float, ...], holds: bool) -> None:
    assert agrees(*values) is holds


def test_values_are_matched_by_artefact_row_and_metric(elsewhere: Path, own_figures: Path) -> None:
    write(
        elsewhere / "published" / "smoke" / "table1.csv",
        ("st", "clean", 90, 85, 95),
        ("st", "pgd20", 10, 5, 15),
        ("kd", "clean", 80, 75, 85),
        ("kd", "pgd20", NAN, NAN, NAN),
        ("kd", "lambda_iga", 3, NAN, NAN),
        ("kd", "training_seconds", 1, 0.9, 1.1),
        ("ard", "clean", 70, 65, 75),
    )
    write(elsewhere / "published" / "smoke" / "table2.csv", ("st", "clean", 10, 5, 15))
    write(
        own_figures / "smoke" / "table1.csv",
        ("kd", "clean", 86, 80, 90),
        ("kd", "pgd20", 10, 5, 15),
        ("kd", "lambda_iga", 3, NAN, NAN),
        ("kd", "training_seconds", 100, 99, 101),
        ("st", "clean", 91, 85, 95),
        ("st", "pgd20", NAN, NAN, NAN),
        ("new", "clean", 91, 85, 95),
    )
    write(own_figures / "smoke" / "mine.csv", ("st", "clean", 10, 5, 15))
    table = compare("smoke")
    assert list(table[["artefact", "row", "metric", "inside"]].itertuples(index=False, name=None)) == [
        ("table1", "st", "clean", True),
        ("table1", "kd", "clean", False),
        ("table1", "kd", "lambda_iga", True),
    ]
    assert summary("smoke").splitlines() == [
        "compared with published/smoke: 2 of 3 values agree",
        "  differs: table1, kd, clean: 86, published 80 [75, 85]",
    ]


def test_a_summary_names_a_few_and_counts_the_rest(elsewhere: Path, own_figures: Path) -> None:
    rows = [f"net{i}" for i in range(9)]
    write(elsewhere / "published" / "smoke" / "table1.csv", *((row, "bound", 1, NAN, NAN) for row in rows))
    write(own_figures / "smoke" / "table1.csv", *((row, "bound", 2, NAN, NAN) for row in rows))
    lines = summary("smoke").splitlines()
    assert lines[0] == "compared with published/smoke: 0 of 9 values agree"
    assert lines[1] == "  differs: table1, net0, bound: 2, published 1"
    assert len(lines) == 7
    assert lines[-1] == "  and 4 more: kdiga_nb.report.published.compare('smoke') lists them"


def test_nothing_published_or_nothing_run_gives_no_summary(elsewhere: Path, own_figures: Path) -> None:
    write(own_figures / "smoke" / "table1.csv", ("st", "clean", 90, 85, 95))
    assert compare("smoke").empty and summary("smoke") == ""
    write(elsewhere / "published" / "digits" / "table1.csv", ("st", "clean", 90, 85, 95))
    assert compare("digits").empty and summary("digits") == ""


@pytest.mark.parametrize("scale", SCALES)
def test_the_published_results_agree_with_themselves(scale: str, own_figures: Path) -> None:
    shutil.copytree(paths.published(scale), own_figures / scale)
    table = compare(scale)
    assert set(table["artefact"]) == {path.stem for path in paths.published(scale).glob("*.csv")}
    assert len(table) > 100 and table["inside"].all()
    assert summary(scale) == f"compared with published/{scale}: {len(table)} of {len(table)} values agree"


@pytest.mark.parametrize("scale", SCALES)
def test_every_published_table_has_its_figure_and_provenance(scale: str) -> None:
    names = {path.name for path in paths.published(scale).iterdir()}
    tables = {name.removesuffix(".csv") for name in names if name.endswith(".csv")}
    assert tables
    assert {f"{table}.{kind}" for table in tables for kind in ("png", "svg", "json")} <= names


def test_plain_pgd_overstates_the_published_audit_of_one_net_alone() -> None:
    """docs/audit.md names ST as the net whose PGD-20 figure is too high, and KD as sound."""
    table = pd.read_csv(paths.published("digits") / "robustness_audit.csv").pivot(
        index="row", columns="metric", values="value"
    )
    overstated = table.index[table["pgd"] - table["autoattack"] > TELLING]
    assert list(overstated) == ["st"]
    text = " ".join((paths.ROOT / "docs" / "audit.md").read_text().split())
    for row, name in (("st", "ST"), ("kd", "KD")):
        pgd, autoattack = table.loc[row, "pgd"], table.loc[row, "autoattack"]
        assert f"{name}: {pgd:.1f} % under PGD-20, {autoattack:.1f} % under AutoAttack" in text


def test_the_pages_name_the_verdicts_of_the_audit() -> None:
    """README.md and docs/audit.md against the verdicts that the executed notebook prints, one line per net."""
    notebook = json.loads((paths.NOTEBOOKS / "robustness_audit.ipynb").read_text())
    outputs = [out for cell in notebook["cells"] for out in cell.get("outputs", [])]
    printed = "".join(line for out in outputs for line in out.get("text", []))
    verdicts = dict(re.findall(r"^(.+): plain PGD is .* points above AutoAttack; (\w+):", printed, re.MULTILINE))
    assert len(verdicts) == 5
    overstated = [label for label, word in verdicts.items() if word == "overstated"]
    assert overstated == ["student (ST)"] and sorted(verdicts.values()) == ["overstated"] + 4 * ["sound"]
    audit, readme = (" ".join((paths.ROOT / page).read_text().split()) for page in ("docs/audit.md", "README.md"))
    assert "ST: 40.0 % under PGD-20, 31.0 % under AutoAttack (verdict *overstated*" in audit
    assert "The audit calls the other four nets *sound*" in audit
    assert "the audit finds no net that hides its gradients" in readme
    assert not re.search(r"(overstate|overstated)[^.]*\bKD\b", readme)


@pytest.mark.parametrize("run", [True, False], ids=["digits", "nothing"])
def test_reproduce_ends_with_the_comparison(run: bool, own_figures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if run:
        shutil.copytree(paths.published("digits"), own_figures / "digits")
    _print_summary(Outcome(), Summary([], [], {}), "digits", 1.0)
    *_, before, last = capsys.readouterr().out.splitlines()
    assert (last if not run else before).startswith("figures in ")
    assert not run or last == summary("digits")
