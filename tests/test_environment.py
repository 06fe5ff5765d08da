"""The project's own files: two lists of dependencies that agree, pages that quote the published results, and nothing
committed that belongs to one machine.

Where a page quotes an old number, the failure prints the lines or the sentences that the page should hold.

conda cannot be run everywhere, so environment.yml is compared with pyproject.toml, which every test run installs.
"""

import ast
import gzip
import itertools
import json
import math
import re
import subprocess
import sys
import tomllib
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from packaging.requirements import Requirement
from test_layers import LEVELS

from kdiga_nb import __version__
from kdiga_nb.artifacts import baselines, combination_row
from kdiga_nb.artifacts.costs import relative_cost
from kdiga_nb.params import BaselineParams, at_scale
from kdiga_nb.paths import NOTEBOOKS, ROOT, published
from kdiga_nb.report.numbers import show, value

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ENVIRONMENT: dict[str, Any] = yaml.safe_load((ROOT / "environment.yml").read_text())

# Where conda, or an import statement, calls a distribution by another name.
CONDA_NAMES = {"pytorch": "torch", "huggingface_hub": "huggingface-hub"}
IMPORT_NAMES = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml", "huggingface_hub": "huggingface-hub"}

FILE_LIMIT, TOTAL_LIMIT = 5_000_000, 40_000_000  # bytes
# Written so that they do not find themselves.
PERSONAL_PATH = re.compile(r"/(?:home|root|Users|work)/[\w.]|/tmp/ipykernel_\d|[A-Za-z]:\\+Users\\")
REGISTRY = re.compile(
    r"(?:pypi|pythonhosted|anaconda|npmjs|debian|golang)[.](?:org|com)|download[.]pytorch[.]org/whl|--(?:extra-)?index-ur[l]"
)


def bounds(lines: list[str], names: dict[str, str] | None = None) -> dict[str, str]:
    """Name and version bounds of each requirement, under its name on the package index."""
    requirements = [Requirement(line) for line in lines]
    return {(names or {}).get(entry.name, entry.name): str(entry.specifier) for entry in requirements}


def tracked() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for name in listed.split("\0") if (path := ROOT / name).is_file()]


def test_environment_has_the_names_and_bounds_of_pyproject() -> None:
    conda = [entry for entry in ENVIRONMENT["dependencies"] if isinstance(entry, str)]
    (by_pip,) = (entry["pip"] for entry in ENVIRONMENT["dependencies"] if isinstance(entry, dict))
    assert by_pip[-1] == "--editable ."
    assert "pip" in conda, "conda asks for pip by name where it is to install something"
    found = bounds([entry for entry in conda if entry != "pip"], CONDA_NAMES) | bounds(by_pip[:-1])
    assert found == bounds(PROJECT["dependencies"]) | {"python": PROJECT["requires-python"]}


def test_every_dependency_has_a_bound() -> None:
    everything = PROJECT["dependencies"] + [
        entry for extra in PROJECT["optional-dependencies"].values() for entry in extra
    ]
    assert [name for name, bound in bounds(everything).items() if ">=" not in bound] == []


def test_environment_is_conda_forge_only_and_gives_reasons() -> None:
    assert ENVIRONMENT["channels"] == ["conda-forge", "nodefaults"]
    _, _, dependencies = (ROOT / "environment.yml").read_text().partition("dependencies:\n")
    entries = [line for line in dependencies.splitlines() if re.match(r" +- (?!pip:)", line)]
    assert [line for line in entries if "  # " not in line] == []


def test_every_import_of_the_package_is_declared() -> None:
    imported = set()
    for path in (ROOT / "kdiga_nb").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.partition(".")[0])
    foreign = {IMPORT_NAMES.get(name, name) for name in imported - sys.stdlib_module_names - {"kdiga_nb"}}
    optional = {name for extra in ("cluster", "site") for name in bounds(PROJECT["optional-dependencies"][extra])}
    assert foreign - set(bounds(PROJECT["dependencies"])) == optional & foreign


def test_citation_names_this_version_and_licence() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (__version__, PROJECT["license"])


@pytest.mark.parametrize("pattern", [PERSONAL_PATH, REGISTRY], ids=["personal path", "package registry"])
def test_no_committed_file_names_a(pattern: re.Pattern[str]) -> None:
    found = {path.relative_to(ROOT): pattern.search(path.read_text(errors="ignore")) for path in tracked()}
    assert {str(path): match.group() for path, match in found.items() if match} == {}


def test_committed_files_are_small() -> None:
    sizes = {str(path.relative_to(ROOT)): path.stat().st_size for path in tracked()}
    assert {name: size for name, size in sizes.items() if size > FILE_LIMIT} == {}
    assert sum(sizes.values()) < TOTAL_LIMIT


def test_git_ignores_a_users_own_results() -> None:
    assert [path.name for path in tracked() if path.is_relative_to(ROOT / "figures")] == ["README.md"]
    own = ["figures/digits/table1.csv", "figures/new/notebooks/table1.ipynb", "figures/smoke/explorer/explore.yaml"]
    ignored = subprocess.run(["git", "check-ignore", *own], cwd=ROOT, capture_output=True, text=True).stdout
    assert ignored.split() == own


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (PERSONAL_PATH, "/".join(["", "home", "ada", "kit"])),
        (PERSONAL_PATH, "/".join(["\x1b[0m", "root", ".venv"])),
        (PERSONAL_PATH, "\\".join(["C:", "Users", "ada"])),
        (PERSONAL_PATH, "/".join(["", "tmp", "ipykernel_12", "34.py"])),
        (REGISTRY, ".".join(["https://files", "pythonhosted", "org"])),
        (REGISTRY, " --" + "index-url"),
    ],
    ids=["Linux", "after an escape sequence", "Windows", "kernel", "host", "option"],
)
def test_the_patterns_find(pattern: re.Pattern[str], text: str) -> None:
    assert pattern.search(text)


# ---- README.md and docs/: short, linked, and true to the published tables ----

README, DOCS = ROOT / "README.md", sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "figures" / "README.md", *DOCS]
README_LINES, WIDTH = 150, 120
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
# Files that a page names in code type, such as `kdiga_nb/methods.py`, patterns such as `table1.*` included.
NAMED = re.compile(r"`(?:python )?((?:kdiga_nb|notebooks|benchmarks|published|tests)/[\w./*]*)")

DIGITS_ROWS = [
    *["st", "kd", "kdiga", "ard", "kdiga_ard_a", "isd_wit_1", "isd_wit_3", "isd_wot_1", "isd_wot_6"],
    *["pgd_student", "trades_student", "trades_teacher"],
]
CIFAR_ROWS = [
    *["st", "st_long", "kd", "ard", "igam_mnist", "kdiga", "kdiga_ard_c", "pgd_student", "trades_teacher"],
    *["isd_wit_1", "isd_wit_2"],
    *(f"isd_wot_{loop}" for loop in range(1, 7)),
    *["kdiga_zero", "kdiga_shuffled", "penalty", "isd_wot_1_zero"],
]
README_ROWS = [
    *["st", "kd", "ard", "kdiga", "kdiga_zero", "pgd_student", "isd_wot_1", "isd_wot_6", "isd_wot_1_zero"],
    "trades_teacher",
]
LATER_ROWS = ["kd", "kdiga_zero", "penalty", "kdiga", "ard", "rslad", "iad", "adaad", "igdm", "saad", "trades_student"]
NARROW_ROWS = [
    *["st", "kd", "kdiga_zero", "penalty", "kdiga", "ard", "kdiga_ard_c", "kdiga_ard_a"],
    *["rslad", "iad", "adaad", "igdm", "pgd_student", "trades_student"],
]
NARROW_LOOPS = [
    *["st", *(f"isd_wot_{loop}" for loop in range(1, 7)), *(f"isd_wot_{loop}_no_dropout" for loop in range(1, 4))],
    *["self_kd", "self_st", "isd_wot_1_zero", "penalty", "isd_wit_1", "isd_wit_2", "isd_wit_3"],
]
LOOP_ROWS = [
    *(f"isd_wot_1_{weight}" for weight in ("0p01", "0p1", "1", "3", "10", "30", "300", "slow")),
    *["isd_wot_1_zero", "isd_wot_1_shuffled", "self_kd", "self_st"],
]
GRID_ROWS = [
    *["kdiga_0p1", "kdiga_0p3", "kdiga_1", "kdiga_3", "kdiga_10", "kdiga_zero_0p3", "kdiga_zero_1"],
    *["penalty_0p1", "penalty_0p3", "penalty_1", "penalty_3", "isd_wot_1_1", "isd_wot_1_10", "isd_wot_1_100"],
]


def text_of(*pages: Path) -> str:
    """The pages on one line, so that a sentence is found wherever its lines break."""
    return " ".join(" ".join(page.read_text() for page in pages).split())


def rows_below(page: str, heading: str) -> list[list[str]]:
    lines = (ROOT / page).read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(heading)) + 2
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in itertools.takewhile(len, lines[start:])]


def as_rows(rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def assert_table(page: str, heading: str, expected: list[list[str]]) -> None:
    assert rows_below(page, heading) == expected, f"{page}, below {heading!r}, should hold\n{as_rows(expected)}"


def assert_sentences(sentences: list[str], *pages: Path) -> None:
    absent = [sentence for sentence in sentences if sentence not in text_of(*pages)]
    names = ", ".join(str(page.relative_to(ROOT)) for page in pages)
    assert absent == [], f"{names} should say\n" + "\n".join(absent)


def table_of(scale: str, artefact: str) -> pd.DataFrame:
    return pd.read_csv(published(scale) / f"{artefact}.csv")


def number(scale: str, artefact: str, row: str, metric: str) -> float:
    return value(table_of(scale, artefact), row, metric)


def with_interval(artefact: str, row: str, metric: str) -> str:
    table = table_of("digits", artefact)
    line = table[(table["row"] == row) & (table["metric"] == metric)].iloc[0]
    return f"{line['value']:.1f} [{line['low']:.1f}, {line['high']:.1f}]"


def quoted(scale: str, rows: list[str], columns: list[str], artefact: str = "table1") -> list[list[str]]:
    """Label and columns of a table as ``report.show`` prints them."""
    table = table_of(scale, artefact)
    shown = show(table, list(dict.fromkeys(column.split(",")[0] for column in columns)))
    labels = [table.loc[table["row"] == row, "label"].iloc[0] for row in rows]
    return [[label, *(str(shown.loc[label, column]) for column in columns)] for label in labels]


def test_the_readme_is_short() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= README_LINES
    assert [line for line in lines if len(line) > WIDTH] == []


def test_the_readme_names_every_notebook_and_what_cifar10_has_of_it() -> None:
    rows = [(re.findall(r"`(\w+)`", names), words) for _, names, words in rows_below("README.md", "| artefact | note")]
    named = [name for names, _ in rows for name in names]
    assert sorted(named) == sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
    for names, words in rows:
        files = [published(scale) / f"{name}.csv" for scale in ("cifar10_cpu", "cifar10_short") for name in names]
        assert (words != "no") == any(file.exists() for file in files), names


def test_the_readme_links_every_page_of_docs_once() -> None:
    links = LINK.findall(README.read_text())
    assert DOCS
    assert {page.name: links.count(f"docs/{page.name}") for page in DOCS} == {page.name: 1 for page in DOCS}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_links_or_names_exists(page: Path) -> None:
    text = page.read_text()
    links = [link for link in LINK.findall(text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
    assert [name for name in NAMED.findall(text) if not list(ROOT.glob(name.rstrip("/.")))] == []


def test_the_architecture_page_has_the_table_of_layers() -> None:
    rows = rows_below("docs/architecture.md", "| level | rooms |")
    named = {room: int(level) for level, rooms, _ in rows for room in re.findall(r"`(\w+)`", rooms)}
    assert named == LEVELS


def test_the_readmes_table_is_the_committed_result() -> None:
    """Ours [low, high] and the paper's number, from published/digits/table1.csv."""
    columns = ["clean, ours", "clean, paper", "pgd20, ours", "pgd20, paper", "autoattack, ours"]
    expected = quoted("digits", DIGITS_ROWS, columns)
    assert len(expected) >= 10
    assert_table("docs/results.md", "| row of Table 1 | clean, ours", expected)


def test_the_tables_on_photographs_are_the_committed_results() -> None:
    columns = ["clean, ours", "clean, paper", "pgd20, ours", "pgd20, paper", "autoattack, ours"]
    assert_table("docs/results.md", "| row of Table 1, CIFAR-10 |", quoted("cifar10_cpu", CIFAR_ROWS, columns))
    assert_table("README.md", "| CIFAR-10, accuracy in % |", quoted("cifar10_cpu", README_ROWS, columns))
    grid = quoted("cifar10_cpu", GRID_ROWS, ["clean, ours", "pgd20, ours"], "alignment_or_penalty")
    assert_table("docs/results.md", "| net | clean | PGD-20 |", grid)


def test_the_terms_of_the_bound_on_photographs_are_the_committed_result() -> None:
    terms = {
        "llm_half_eps": "student's LLM at ε/2",
        "llm_eps": "student's LLM at ε (γ_s)",
        "llm_eps_teacher": "teacher's LLM at ε (γ_t)",
        "cross_entropy": "student's cross-entropy",
        "gradient_distance": "‖g_s − g_t‖₂",
        "bound": "bound, dual norm",
        "gap": "gap found",
    }
    paper = table_of("cifar10_cpu", "table3").set_index(["row", "metric"])["reported"]
    in_paper, controls = ("st", "ard", "kdiga"), ("kdiga_zero", "penalty")
    expected = []
    for term, words in terms.items():
        numbers = [v for row in in_paper for v in (number("cifar10_cpu", "table3", row, term), paper[row, term])]
        numbers += [number("cifar10_cpu", "table3", row, term) for row in controls]
        expected.append([words, *("–" if math.isnan(v) else f"{v:.2f}" for v in numbers)])
    for norm, words in {"violations": "the dual norm", "violations_l2": "ℓ2 as printed"}.items():
        counts = [f"{number('cifar10_cpu', 'prop2_bound', row, norm):.0f}" for row in (*in_paper, *controls)]
        with_paper = [text for count in counts[:3] for text in (count, "–")]
        expected.append([f"images of 200 above the bound, {words}", *with_paper, *counts[3:]])
    assert_table("docs/results.md", "| term of Proposition 2 |", expected)


def test_the_sentences_on_the_terms_of_the_bound_are_computed() -> None:
    def of(scale: str, metric: str, artefact: str = "table3") -> dict[str, float]:
        table = table_of(scale, artefact)
        measured = table[(table["metric"] == metric) & table["value"].notna()]
        return dict(zip(measured["row"], measured["value"], strict=True))

    def share(bound: dict[str, float], row: str, start: str) -> str:
        return f"{100 * (bound[row] - bound[start]) / (bound['kdiga'] - bound[start]):.0f} %"

    bound, distance, gap = (of("cifar10_cpu", metric) for metric in ("bound", "gradient_distance", "gap"))
    broken, robust = of("cifar10_cpu", "violations_l2", "prop2_bound"), of("cifar10_cpu", "pgd20")
    digits, near, holds = of("digits", "bound"), of("digits", "gradient_distance"), of("digits", "pgd20")
    assert round(gap["kdiga"] / gap["kdiga_zero"], 1) == 0.5
    assert f"{near['kdiga_zero']:.2f}" == f"{near['penalty']:.2f}"
    order = sorted(digits, key=lambda row: digits[row])
    swapped = [(a, b) for a, b in itertools.pairwise(order) if holds[a] < holds[b]]
    assert swapped == [("kdiga_ard_c", "ard"), ("penalty", "kdiga_zero")]
    assert sorted(bound, key=lambda row: bound[row]) == ["kdiga", "kdiga_zero", "ard", "penalty", "st"]
    sentences = [
        f"{broken['st']:.0f} of 200 images of ST, {broken['ard']:.0f} of ARD and {broken['penalty']:.0f} of the "
        "penalty without a teacher exceed the bound",
        f"KD with the zero target has {share(bound, 'kdiga_zero', 'st')} and the penalty without a teacher "
        f"{share(bound, 'penalty', 'st')}.",
        f"falls from {distance['st']:.2f} to {distance['kdiga_zero']:.2f} and {distance['penalty']:.2f}, under KDIGA "
        f"to {distance['kdiga']:.2f}.",
        f"(ARD has {share(bound, 'ard', 'st')} too)",
        f"and {robust['kdiga'] - robust['kdiga_zero']:.1f} points more under PGD-20",
        f"({robust['ard']:.1f} and {robust['kdiga_zero']:.1f} % under PGD-20)",
        f"It is {digits['kd']:.2f} for KD and {digits['kdiga']:.2f} for KDIGA; KD with the zero target has "
        f"{digits['kdiga_zero']:.2f}, which is {share(digits, 'kdiga_zero', 'kd')} of that fall, and the penalty "
        f"without a teacher {digits['penalty']:.2f}.",
        f"is {near['kd']:.2f} for KD, {near['kdiga']:.2f} for KDIGA and {near['penalty']:.2f} for both penalties",
        f"at most {max(holds[b] - holds[a] for a, b in swapped):.1f} points apart",
    ]
    assert_sentences(sentences, ROOT / "docs" / "results.md")
    short = f"from ST to KDIGA, a penalty without a teacher has {share(bound, 'penalty', 'st')}"
    assert_sentences([short], ROOT / "README.md")


def test_the_table_of_the_search_is_the_committed_result() -> None:
    table = table_of("cifar10_cpu", "isd_search")
    shown = show(table, ["clean", "pgd20", "apgd"])
    rows = ["st", *(combination_row(index) for index in range(1, 17))]
    labels = [table.loc[table["row"] == row, "label"].iloc[0] for row in rows]
    expected = [[label, *(str(shown.loc[label, f"{m}, ours"]) for m in ("clean", "pgd20", "apgd"))] for label in labels]
    assert_table("docs/results.md", "| setting of one loop | clean |", expected)
    later = table[table["row"].str.fullmatch(r"combination_\d\d_loop_\d") & (table["metric"] == "apgd")]
    labels = later.loc[later["value"].notna(), "label"]
    expected = [[label, *(str(shown.loc[label, f"{m}, ours"]) for m in ("clean", "pgd20", "apgd"))] for label in labels]
    assert_table("docs/results.md", "| a later loop | clean |", expected)


def test_the_table_of_the_weights_is_the_committed_result() -> None:
    columns = ["clean, ours", "pgd20, ours", "apgd, ours"]
    lines = quoted("cifar10_cpu", LOOP_ROWS, columns, "isd_search")
    cosine = [number("cifar10_cpu", "isd_search", row, "cosine") if row != "self_st" else math.nan for row in LOOP_ROWS]
    expected = [[*line, "–" if math.isnan(c) else f"{c:.2f}"] for line, c in zip(lines, cosine, strict=True)]
    assert_table("docs/results.md", "| one loop | clean | PGD-20 | APGD | cosine |", expected)
    pgd = partial(number, "cifar10_cpu", "isd_search", metric="pgd20")
    assert [pgd(row=row) for row in LOOP_ROWS[:7]] == [0.0] * 7
    zero = f"with the zero target {pgd(row='isd_wot_1_zero'):.1f} % do"
    search = partial(number, "cifar10_cpu", "isd_search")
    best = max((combination_row(index) for index in range(1, 17)), key=lambda row: search(row, "pgd20"))
    sentences = [
        f"at every weight from 0.01 to 300, none of 1,000 images withstands PGD-20; {zero}",
        f"has {search(best, 'pgd20'):.1f} % under PGD-20 at {search(best, 'clean'):.1f} % clean, and its further loops",
    ]
    assert_sentences(sentences, README)


def test_the_table_of_teachers_is_the_committed_result() -> None:
    trades = {"teacher": "trades_teacher", "kd": "kd"} | {kind: f"{kind}_1p5" for kind in ("kdiga_zero", "kdiga")}
    teachers = {
        words: [f"{kind}_from_{radius}" for kind in trades]
        for words, radius in (("standard training", "0"), ("AT, ε = 0.03", "0p03"))
    } | {"TRADES, ε = 0.12": list(trades.values())}
    expected = [
        [words, *(cell for _, cell in quoted("digits", rows, ["pgd20, ours"], "alignment_or_penalty"))]
        for words, rows in teachers.items()
    ]
    assert_table("docs/results.md", "| teacher | the teacher itself | KD |", expected)


def test_the_table_of_later_distillations_is_the_committed_result() -> None:
    experiment = baselines(at_scale(BaselineParams, "digits"))
    columns = ["clean, ours", "pgd20, ours", "autoattack, ours"]
    steps = [f"{relative_cost(experiment.row(row).runs[0]):.1f}" for row in LATER_ROWS]
    expected = [
        [*line, step] for line, step in zip(quoted("digits", LATER_ROWS, columns, "baselines"), steps, strict=True)
    ]
    assert_table("docs/results.md", "| method | clean | PGD-20 | AutoAttack | step |", expected)


def test_the_table_of_later_distillations_on_photographs_is_the_committed_result() -> None:
    experiment = baselines(at_scale(BaselineParams, "cifar10_short"))
    columns = ["clean, ours", "pgd20, ours", "autoattack, ours"]
    lines = quoted("cifar10_short", NARROW_ROWS, columns, "baselines")
    steps = [f"{relative_cost(experiment.row(row).runs[0]):.1f}" for row in NARROW_ROWS]
    expected = [[*line, step] for line, step in zip(lines, steps, strict=True)]
    assert_table("docs/results.md", "| method, narrow student |", expected)
    clean, pgd, autoattack = (
        number("cifar10_short", "baselines", "trades_teacher", m) for m in ("clean", "pgd20", "autoattack")
    )
    teacher = f"the teacher has {clean:.1f} % clean, {pgd:.1f} % under PGD-20 and {autoattack:.1f} % under AutoAttack"
    assert_sentences([teacher], ROOT / "docs" / "results.md")


def test_what_the_results_page_says_of_igam_on_photographs_is_the_committed_result() -> None:
    columns = ["clean, ours", "clean, paper", "pgd20, ours", "pgd20, paper", "autoattack, ours"]
    lines = quoted("cifar10_short", ["igam_mnist", "penalty_wide"], columns)
    assert_table("docs/results.md", "| row of Table 1, wide net |", lines)
    table = table_of("cifar10_short", "table1")
    run = table[table["row"] == "igam_mnist"]["runs"].iloc[0]
    folder = published("cifar10_short") / "runs"
    teacher = json.loads((folder / run / "run.json").read_text())["run"]["teacher"]
    heard = pd.read_csv(folder / run / "history.csv")["adversarial"]
    coin = 0.2 * math.log(2)
    assert heard.to_list() == pytest.approx([coin, coin], abs=5e-5)
    full = table_of("cifar10_cpu", "table1").set_index(["row", "metric"])["runs"]["igam_mnist", "clean"]
    long = pd.read_csv(published("cifar10_cpu") / "runs" / full / "history.csv")["adversarial"]
    assert [f"{loss:.4f}" for loss in long] == [f"{coin:.4f}"] * 20
    right = pd.read_csv(folder / teacher / "history.csv")["validation_clean"].iloc[-1]
    sentences = [
        f"gets {right:.1f} % of the held-out images right",
        f"its loss is {coin:.4f} in both epochs",
        f"`history.csv` of run {run}), and in all 20 of the full training ({full})",
    ]
    assert_sentences(sentences, ROOT / "docs" / "results.md")


def test_the_table_of_loops_in_short_trainings_is_the_committed_result() -> None:
    columns = ["clean, ours", "pgd20, ours", "apgd, ours"]
    lines = quoted("cifar10_short", NARROW_LOOPS, columns, "isd_autoattack")
    norms = [number("cifar10_short", "isd_autoattack", row, "gradient_norm") for row in NARROW_LOOPS]
    expected = [[*line, f"{norm:.2f}"] for line, norm in zip(lines, norms, strict=True)]
    assert_table("docs/results.md", "| loop, narrow student |", expected)


def test_the_audit_in_short_trainings_is_the_committed_result() -> None:
    audited = partial(number, "cifar10_short", "robustness_audit")
    metrics = ["clean", "pgd", "all_together", "autoattack", "gradient_norm"]
    table = table_of("cifar10_short", "robustness_audit")
    labels = dict(zip(table["row"], table["label"], strict=True))
    digits = [1, 1, 1, 1, 2]
    expected = [
        [label, *(f"{audited(row, metric):.{places}f}" for metric, places in zip(metrics, digits, strict=True))]
        for row, label in labels.items()
    ]
    assert_table("docs/results.md", "| audited net, narrow |", expected)
    pgd, autoattack = (audited("kdiga", metric) for metric in ("pgd", "autoattack"))
    assert_sentences([f"PGD-20 overstates KDIGA ({pgd:.1f} %, AutoAttack {autoattack:.1f} %)"], README)
    found = [f"KDIGA: {pgd:.1f} % under PGD-20, {autoattack:.1f} % under AutoAttack (rules"]
    assert_sentences(found, ROOT / "docs" / "audit.md")
    other_attacks = ("margin", "targeted", "pgd_more", "square", "hard_label")
    others = [f"{audited('kdiga', attack):.1f}" for attack in other_attacks]
    found = [
        f"on the margin leaves {others[0]} %, on every wrong class in turn {others[1]} %, AutoAttack {autoattack:.1f}",
        f"find next to nothing ({others[2]} %)",
        f"(Square {others[3]}, RayS {others[4]} %)",
    ]
    assert_sentences(found, ROOT / "docs" / "results.md")


def test_the_table_of_fgsm_on_photographs_is_the_committed_result() -> None:
    columns = ["clean, ours", "pgd20, ours", "autoattack, ours"]
    rows = ["kdiga_fgsm", "kdiga_fgsm_random", "kdiga_fgsm_perturbed", "fgsm_at", "kdiga_plain"]
    assert_table("docs/results.md", "| row of Table 5, narrow", quoted("cifar10_short", rows, columns, "table5"))


def test_the_findings_quote_the_published_tables() -> None:
    def both(scale: str, row: str) -> str:
        pgd, autoattack = (number(scale, "table1", row, metric) for metric in ("pgd20", "autoattack"))
        return f"{pgd:.1f} and {autoattack:.1f} %"

    digits = partial(number, "digits", "table1")
    cifar = partial(number, "cifar10_cpu", "table1")
    gains = [digits(row, "pgd20") - digits("kd", "pgd20") for row in ("kdiga_zero", "kdiga")]
    grid = partial(number, "cifar10_cpu", "alignment_or_penalty")
    zero, aligned = ([grid(row, metric) for metric in ("pgd20", "clean")] for row in ("kdiga_zero_0p3", "kdiga_0p3"))
    weak, fifth = ([grid(row, metric) for metric in ("clean", "pgd20")] for row in ("penalty_0p3", "isd_wot_5"))
    shuffled = [cifar("kdiga_shuffled", metric) for metric in ("pgd20", "autoattack")]
    penalty = [cifar("isd_wot_1_zero", metric) for metric in ("pgd20", "autoattack", "clean")]
    loops = [f"{digits(row, 'pgd20'):.1f}" for row in ("isd_wot_1", "isd_wot_1_zero")]
    lost = number("digits", "prop1_certified", "kdiga_loss", "lost_proven")
    narrow = partial(number, "cifar10_short", "baselines")
    below = narrow("trades_teacher", "pgd20") - narrow("kdiga", "pgd20")
    pgd, autoattack, clean = (
        f"{abs(cifar('pgd_student', metric) - cifar('kdiga', metric)):.1f}"
        for metric in ("pgd20", "autoattack", "clean")
    )
    ard = [abs(cifar("kdiga", metric) - cifar("ard", metric)) for metric in ("pgd20", "autoattack", "clean")]
    accurate = grid("ard", "pgd20") - grid("kdiga_0p1", "pgd20")
    bound = table_of("digits", "prop2_bound").pivot(index="row", columns="metric", values="value")
    assert len(bound) * 500 == 3000
    sentences = [
        f"is {both('digits', 'kd')} for KD, {both('digits', 'kdiga')} for KDIGA, {both('digits', 'trades_teacher')} "
        "for the teacher",
        f"KDIGA is {below:.1f} points below its teacher (PGD-20, 3 seeds)",
        f"is {ard[0]:.1f} points less robust than KDIGA under PGD-20 (AutoAttack: {ard[1]:.1f}) and {ard[2]:.1f} more "
        f"accurate; at equal clean accuracy (λ = 0.1) it is {accurate:.1f} more robust (AutoAttack:",
        f"is {pgd} more robust than KDIGA (AutoAttack: {autoattack}; p = 0.01 to 0.07, by seed) and {clean} less "
        "accurate.",
        f"(with 40, ST has {cifar('st_long', 'clean'):.1f} % clean)",
        f"(AutoAttack: {cifar('isd_wot_6', 'autoattack'):.1f} %)",
        f"KD gains {gains[0]:.1f} of KDIGA's {gains[1]:.1f} points on the digits",
        f"the zero target reaches {zero[0]:.1f} % under PGD-20 at {zero[1]:.1f} % clean, where KDIGA has "
        f"{aligned[0]:.1f} % at {aligned[1]:.1f} %",
        f"With the gradients shuffled among the images, {shuffled[0]:.1f} and {shuffled[1]:.1f} % remain of KDIGA's "
        f"{both('cifar10_cpu', 'kdiga')}",
        loops_on_photographs(),
        f"λ = 0.3 has what the fifth loop has ({weak[0]:.1f} and {fifth[0]:.1f} % clean, {weak[1]:.1f} and "
        f"{fifth[1]:.1f} % under PGD-20)",
        f"reaches {penalty[0]:.1f} % (AutoAttack {penalty[1]:.1f} %) at {penalty[2]:.1f} % clean",
        f"a loop with either target gives the same: {loops[0]} and {loops[1]} %",
        f"on {lost:.1f} % of the images the radius of KDIGA as published is certainly smaller",
        f"{bound['violations_l2'].sum():.0f} of 3,000 images violate the bound; with the dual norm, "
        f"{bound['violations'].sum():.0f} do",
    ]
    assert_sentences(sentences, README)


def loops_on_photographs() -> str:
    table = table_of("cifar10_cpu", "table1")
    start, last = value(table, "st", "pgd20"), value(table, "isd_wot_6", "pgd20")
    reported = table[(table["row"] == "isd_wot_6") & (table["metric"] == "pgd20")]["reported"].iloc[0]
    return f"from {start:.1f} to {last:.1f} % under PGD-20, where the paper reports {reported:.1f} %"


def test_the_results_page_quotes_the_published_tables() -> None:
    def gain(artefact: str, row: str) -> str:
        return f"{number('digits', artefact, row, 'pgd20') - number('digits', 'table1', 'st', 'pgd20'):.0f}"

    st, first = (number("digits", "table1", row, "autoattack") for row in ("st", "isd_wot_1"))
    fast = [number("digits", "table5", row, "autoattack") for row in ("kdiga_fgsm", "fgsm_at")]
    grid = partial(number, "cifar10_cpu", "alignment_or_penalty", "isd_wot_1_10")
    large = [grid(metric) for metric in ("pgd20", "clean")]
    cifar = partial(number, "cifar10_cpu", "table1", metric="clean")
    fifth, weak, strong, full = (
        [number("cifar10_cpu", "alignment_or_penalty", row, metric) for metric in ("clean", "pgd20")]
        for row in ("isd_wot_5", "penalty_0p3", "penalty_3", "penalty_1")
    )
    rows = ("kd", "kdiga", "kdiga_zero", "kdiga_shuffled")
    kd, kdiga, zero, shuffled = (number("digits", "table1", row, "pgd20") for row in rows)
    sentences = [
        f"gains {gain('table1', 'isd_wot_1')} points under PGD-20 over standard training",
        f"survives AutoAttack ({first:.1f} against {st:.1f})",
        f"clean accuracy is {number('digits', 'table1', 'kdiga', 'clean'):.1f} %",
        f"the first loop gains {gain('table4', 'isd_wot_1_no_dropout')} points instead of "
        f"{gain('table1', 'isd_wot_1')}",
        f"({fast[0]:.1f} and {fast[1]:.1f} under AutoAttack)",
        f"KD gains {zero - kd:.1f} of KDIGA's {kdiga - kd:.1f} points, with shuffled gradients {shuffled - kd:.1f}",
        f"at λ = 10 has {large[0]:.1f} % under PGD-20, at {large[1]:.1f} % clean",
        f"The fifth loop has {fifth[0]:.1f} % clean and {fifth[1]:.1f} % under PGD-20, the penalty without a teacher "
        f"at λ = 0.3 has {weak[0]:.1f} and {weak[1]:.1f} %",
        f"at λ = 3 has it, {strong[1]:.1f} % at {strong[0]:.1f} % clean",
        f"at λ = 1 it has {full[1]:.1f} % at {full[0]:.1f} %",
        f"at λ = 10, has {large[0]:.1f} % at {large[1]:.1f} % clean",
        f"ST has {cifar('st'):.1f} % after the 20 epochs of every row and {cifar('st_long'):.1f} % after 40",
    ]
    assert_sentences(sentences, ROOT / "docs" / "results.md")


def test_the_audit_page_quotes_the_published_tables() -> None:
    prop1, pareto = table_of("digits", "prop1_certified"), table_of("digits", "pareto")
    kept = [value(prop1, row, "kept") for row in ("kdiga_loss", "kdiga_logits")]
    took = [value(prop1, row, "training_seconds") for row in ("kdiga_loss", "kdiga_logits")]
    seconds = pareto.loc[pareto["metric"] == "training_seconds", "value"]
    bound = table_of("digits", "prop2_bound").pivot(index="row", columns="metric", values="value")
    ours, fast = (
        [with_interval("pareto", row, metric) for metric in ("clean", "apgd")] for row in ("kdiga_fgsm", "fgsm_at")
    )
    sentences = [
        f"certainly smaller than its teacher's on {value(prop1, 'kdiga_loss', 'lost_proven'):.1f} % of the images",
        f"certainly no smaller on {value(prop1, 'kdiga_loss', 'kept_proven'):.1f} %",
        f"does not make fewer images certainly worse ({value(prop1, 'kdiga_logits', 'lost_proven'):.1f} %)",
        f"certified radius on {kept[1]:.1f} % of the images, KDIGA as published on {kept[0]:.1f} %, for about "
        f"{took[1] / took[0]:.1f} times the training time ({took[0]:.1f} and {took[1]:.1f} s per net)",
        f"{max(bound['violations'].sum(), bound['violations_tight'].sum()):.0f} of 3,000 images violate the bound",
        f"that Table 3 prints, {bound['violations_l2'].sum():.0f} do",
        f"{ours[0]} clean and {ours[1]} under APGD against {fast[0]} and {fast[1]}",
        f"matched to a factor of {seconds.max() / seconds.min():.1f}: {seconds.min():.1f} to {seconds.max():.1f} s",
    ]
    assert_sentences(sentences, ROOT / "docs" / "audit.md")


def saved(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["result"]


def test_the_speed_page_quotes_the_saved_benchmarks() -> None:
    """``make bench`` writes what the speed tables say."""
    step, pgd, aa = saved("steps")["step"], saved("attacks")["pgd"], saved("attacks")["autoattack"]
    speed, move = pgd["images_per_second"], saved("explorer")["all"]
    smoke, digits = (
        f"{took['cold']['seconds']:.0f}, {took['cached']['seconds']:.0f} s; {took['cold']['peak_mib'] / 1024:.1f} GiB"
        for took in (saved("reproduce_smoke"), saved("reproduce"))
    )
    memory = [saved(f"memory_{kind}")["peak_gb"] for kind in ("st", "kdiga", "textbook")]
    expected = [
        f"{step['kdiga / standard']:.2f}",
        f"{step['textbook / kdiga']:.2f}",
        ", ".join(f"{peak:.2f}" for peak in memory) + " GB",
        f"{speed['kit'] / speed['foolbox']:.2f}, {speed['kit'] / speed['art']:.2f}",
        f"{aa['kit / pyautoattack']:.2f}",
        f"{move['p50']:.0f}, {move['p95']:.0f}, {move['max']:.0f} ms",
        ", ".join(
            f"{saved('start')[name]['median']:.1f}" for name in ("kdiga --help", "first picture of the explorer")
        ),
        smoke,
        digits,
    ]
    written = rows_below("docs/speed.md", "| what | ratio")
    renewed = [[what, ratio, script] for (what, _, script), ratio in zip(written, expected, strict=True)]
    assert_table("docs/speed.md", "| what | ratio", renewed)
    assert pgd["verdicts that differ"] == {"foolbox": 0, "art": 0}
    assert aa["verdicts that differ"] == 0
    nets = [entry for name, entry in saved("autoattack_verdicts").items() if name != "machine"]
    seen, differ = (sum(entry[key] for entry in nets) for key in ("verdicts", "verdicts that differ"))
    assert len(nets) == 10
    assert_sentences([f"{differ} of {seen:,} verdicts differ"], ROOT / "docs" / "speed.md")
    kinds = list(saved("reproduce_by_kind")["by_kind"].values())
    parts = [*kinds[:7], {name: sum(kind[name] for kind in kinds[7:]) for name in ("number", "seconds")}]
    written = rows_below("docs/speed.md", "| what | number | seconds |")
    found = [
        [what, f"{part['number']}", f"{part['seconds']:.0f}"] for (what, *_), part in zip(written, parts, strict=True)
    ]
    assert_table("docs/speed.md", "| what | number | seconds |", found)
    names = {"mobilenet_v2": "MobileNetV2", "preact_resnet18": "PreActResNet-18"}
    scaling = [
        [
            names.get(entry["model"], entry["model"]),
            f"{entry['shape'][1]}×{entry['shape'][2]}",
            str(entry["batch"]),
            f"{entry['kdiga / standard']:.1f}",
            f"{entry['textbook / kdiga']:.1f}",
        ]
        for entry in saved("steps")["scaling"]
    ]
    assert_table("docs/speed.md", "| net | images | batch", scaling)


def test_the_scales_page_quotes_the_saved_benchmarks() -> None:
    smoke, digits = (saved(name)["cold"]["seconds"] for name in ("reproduce_smoke", "reproduce"))
    sentences = [f"| {smoke:.0f} s on 2 CPU cores", f"({digits:.0f} s from an empty store"]
    kinds = saved("reproduce_by_kind")["by_kind"].values()
    sentences.append(f"({sum(kind['seconds'] for kind in kinds):,.0f} seconds of one process)")
    assert_sentences(sentences, ROOT / "docs" / "scales.md")


def test_autoattack_on_all_digits_is_quoted_as_saved() -> None:
    found = saved("autoattack_all_images")
    assert found["images"] == 500
    values = [f"{value:.1f} [{low:.1f}, {high:.1f}]" for value, low, high in found["rows"].values()]
    written = rows_below("docs/results.md", "| net | AutoAttack |")
    assert_table(
        "docs/results.md", "| net | AutoAttack |", [[net, v] for (net, _), v in zip(written, values, strict=True)]
    )

    def points(pair: str, sign: int = 1) -> str:
        one = found["differences"][pair]
        low, high = sorted((sign * one["low"], sign * one["high"]))
        return f"{sign * one['points']:.1f} [{low:.1f}, {high:.1f}]".replace("-", "−")

    sentences = [
        f"KDIGA is {points('kdiga - kd')} points above KD, {points('kdiga - kdiga_zero')} above the zero target and "
        f"{points('kdiga - penalty')} above the penalty",
        f"It is {points('kdiga - rslad', -1)} points below RSLAD, {points('kdiga - iad', -1)} below IAD, "
        f"{points('kdiga - adaad', -1)} below AdaAD, {points('kdiga - igdm', -1)} below IGDM and "
        f"{points('kdiga - trades_student', -1)} below TRADES",
        f"ISD-WoT-1 is {points('isd_wot_1 - st')} points above ST and {points('isd_wot_1 - penalty', -1)} below the "
        f"penalty (p = {found['differences']['isd_wot_1 - penalty']['p']:.2f})",
        f"ISD-WoT-6 is {points('isd_wot_6 - penalty', -1)} below the penalty (p < 0.001)",
    ]
    certain = [one["p"] for pair, one in found["differences"].items() if pair.startswith("kdiga") or "6" in pair]
    assert max(certain) < 0.001
    assert_sentences(sentences, ROOT / "docs" / "results.md")


def test_autoattack_by_member_is_quoted_as_saved() -> None:
    nets = {"digits, KDIGA": saved("attacks")["members"]}
    nets |= {f"CIFAR-10, {row.upper()}": saved("autoattack_cifar10")[row] for row in ("st", "kdiga")}
    expected, faster = [], []
    for net, members in nets.items():
        kit, library = (
            sum(entry["seconds"][side]["median"] for entry in members.values()) for side in ("kit", "library")
        )
        faster.append(f"{library / kit:.1f} times")
        for member, entry in members.items():
            assert entry["verdicts that differ"] == 0
            seconds = [f"{entry['seconds'][side]['median']:.1f}" for side in ("kit", "library")]
            expected.append([net, member, f"{entry['images']}", *seconds, f"{entry['kit / library']:.2f}"])
    assert_table("docs/speed.md", "| net | member | images", expected)
    sentence = (
        f"{faster[0]} as fast on the digits, {faster[1]} on a CIFAR-10 net without any robustness and {faster[2]}"
    )
    assert_sentences([sentence], ROOT / "docs" / "speed.md")


def test_what_the_last_members_of_autoattack_find_is_quoted_as_published() -> None:
    nets, counts = [], [0, 0, 0, 0]
    for scales in (["digits"], ["cifar10_cpu", "cifar10_short"]):
        found = 0
        files = (path for scale in scales for path in (published(scale) / "runs").glob("*/measures.json.gz"))
        for path in {path.parent.name: path for path in files}.values():  # a net that two scales publish counts once
            for result in json.loads(gzip.decompress(path.read_bytes())).values():
                members = result.get("members", {})
                if {"fab-t", "square"} <= set(members):
                    found += 1
                    images = len(result["survivors"])
                    left = [round(members[name] * images / 100) for name in ("apgd-t", "fab-t", "square")]
                    own = [images, left[0], left[0] - left[1], left[1] - left[2]]
                    counts = [one + other for one, other in zip(counts, own, strict=True)]
        nets.append(found)
    images, left, fab, square = counts
    sentences = [
        f"{nets[0]} published measurements of digits nets and {nets[1]} of CIFAR-10 nets, {left:,} of {images:,} "
        f"images are still right after APGD-T; FAB-T then changes {fab} of these verdicts, Square {square}"
    ]
    assert_sentences(sentences, ROOT / "docs" / "speed.md")


def test_the_sentences_on_speed_quote_the_saved_benchmarks() -> None:
    differences = saved("finite_differences")
    smooth, kinked = differences["digits_small"], differences["mobilenet_v2 on CIFAR-10"]
    wrong = [100 * min(net["smallest relative error"].values()) for net in (kinked, smooth)]
    step, pages = saved("steps")["step"], [f"{entry['given back / kept']:.1f}" for entry in saved("steps")["pages"]]
    cosines = [
        ", ".join(f"{value:.2f}" for value in saved(f"bfloat16_{name}")["step"]["cosine to float32"].values())
        for name in ("preact_resnet18", "mobilenet_v2")
    ]
    halved = saved("precision")
    accuracy = [
        f"{halved['percent'][kind]['clean']:.1f} {words} {halved['percent'][kind]['pgd20']:.1f} %"
        for kind, words in (("bfloat16", "% clean and"), ("float32", "and"))
    ]
    apart = [
        f"{one['points']:+.1f} [{one['low']:.1f}, {one['high']:.1f}]".replace("-", "−")
        for one in halved["difference"].values()
    ]
    sentences = [
        f"KDIGA has {accuracy[0]} under PGD-20 after 2 epochs in bf16, and {accuracy[1]} in fp32; the differences are "
        f"{apart[0]} and {apart[1]} points",
        f"a cosine of {cosines[0]} on PreActResNet-18 and of {cosines[1]} on MobileNetV2",
        f"take {kinked['forward difference / exact']:.2f} of the exact step's time",
        f"wrong by {wrong[0]:.0f} % at the best step size there, for its ReLUs have kinks ({wrong[1]:.2f} %",
        f"takes {pages[0]}, {pages[1]} and {pages[2]} times as long at batch 32, 128 and 256",
        f"is {step['arithmetic, kdiga / standard']:.1f} times that of a standard step",
        f"plain formulation's {step['arithmetic, textbook / standard']:.1f} times",
    ]
    assert_sentences(sentences, ROOT / "docs" / "speed.md", ROOT / "docs" / "gpu.md")


def test_the_trial_of_a_compiled_step_is_quoted_as_saved() -> None:
    net, photographs = saved("compiled_mobilenet_v2"), saved("compiled_cifar_cnn")
    ratios = [[one[kind]["eager / compiled"] for kind in ("kdiga", "standard")] for one in (net, photographs)]
    sentences = [
        f"is then {ratios[0][0]:.2f} times as fast, a standard step {ratios[0][1]:.2f} times",
        f"is as fast as before ({ratios[1][0]:.2f}), a standard step slower ({ratios[1][1]:.2f})",
        f"gradients differ by {100 * net['kdiga']['difference']:.0f} % from the eager ones",
    ]
    assert_sentences(sentences, ROOT / "docs" / "speed.md")


def test_the_comparison_with_igdm_is_quoted_as_saved() -> None:
    found = saved("distillations")
    at = {one["student"]: f"{one['cosine']['mean']:.2f}".replace("-", "−") for one in found["cosine"]}
    spread = {one["student"]: f"{one['cosine']['sd']:.2f}" for one in found["cosine"]}
    ratio = found["step"][1]["over standard"]
    memory = [saved(f"memory_{name}")["peak_gb"] for name in ("kdiga", "igdm")]
    sentences = [
        f"{at['st']} (standard deviation {spread['st']}) at ST, {at['kd']} ({spread['kd']}) at KD and {at['kdiga']} "
        f"({spread['kdiga']}) at KDIGA",
        f"a KDIGA step takes {ratio['kdiga']:.1f} times a standard step and an IGDM step {ratio['igdm']:.1f} times",
        f"batch 128 is {memory[0]:.2f} and {memory[1]:.2f} GB",
    ]
    assert_sentences(sentences, ROOT / "docs" / "results.md")
