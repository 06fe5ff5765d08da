"""The project's own files: two lists of dependencies that agree, a README that quotes the committed results, and
nothing committed that belongs to one machine.

conda cannot be run everywhere, so environment.yml is compared with pyproject.toml, which every test run installs.
"""

import ast
import itertools
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from packaging.requirements import Requirement

from kdiga_nb import __version__
from kdiga_nb.paths import ROOT
from kdiga_nb.report.numbers import show

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ENVIRONMENT: dict[str, Any] = yaml.safe_load((ROOT / "environment.yml").read_text())

# Where conda, or an import statement, calls a distribution by another name.
CONDA_NAMES = {"pytorch": "torch"}
IMPORT_NAMES = {"sklearn": "scikit-learn", "yaml": "pyyaml"}

FILE_LIMIT, TOTAL_LIMIT = 5_000_000, 30_000_000  # bytes
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
    optional = set(bounds(PROJECT["optional-dependencies"]["cluster"]))
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


def test_the_readmes_table_is_the_committed_result() -> None:
    """Ours [low, high] and the paper's number, as ``report.show`` prints them from figures/digits/table1.csv."""
    shown = show(pd.read_csv(ROOT / "figures" / "digits" / "table1.csv"), ["clean", "pgd20", "autoattack"])
    table = rows_below("| row of Table 1 |")
    assert len(table) >= 10
    columns = ["clean, ours", "clean, paper", "pgd20, ours", "pgd20, paper", "autoattack, ours"]
    for label, *cells in table:
        assert cells == [str(shown.loc[label, column]) for column in columns], label


def saved(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["result"]


def rows_below(heading: str) -> list[list[str]]:
    lines = (ROOT / "README.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(heading)) + 2
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in itertools.takewhile(len, lines[start:])]


def test_the_readme_quotes_the_saved_benchmarks() -> None:
    """``make bench`` writes what the README's speed tables say."""
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
        smoke,
        digits,
    ]
    assert [row[1] for row in rows_below("| what | ratio")] == expected
    assert pgd["verdicts that differ"] == {"foolbox": 0, "art": 0}
    assert aa["verdicts that differ"] == 0
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
    assert rows_below("| net | images | batch") == scaling


def test_the_readmes_sentences_on_speed_quote_the_saved_benchmarks() -> None:
    differences, text = saved("finite_differences"), " ".join((ROOT / "README.md").read_text().split())
    smooth, kinked = differences["digits_small"], differences["mobilenet_v2 on CIFAR-10"]
    wrong = [100 * min(net["smallest relative error"].values()) for net in (kinked, smooth)]
    step, pages = saved("steps")["step"], [f"{entry['given back / kept']:.1f}" for entry in saved("steps")["pages"]]
    cosines = [
        ", ".join(f"{value:.2f}" for value in saved(f"bfloat16_{name}")["step"]["cosine to float32"].values())
        for name in ("preact_resnet18", "mobilenet_v2")
    ]
    sentences = [
        f"a cosine of {cosines[0]} on PreActResNet-18 and of {cosines[1]} on MobileNetV2",
        f"take {kinked['forward difference / exact']:.2f} of the exact step's time",
        f"wrong by {wrong[0]:.0f} % at the best step size there, for its ReLUs have kinks ({wrong[1]:.2f} %",
        f"takes {pages[0]}, {pages[1]} and {pages[2]} times as long at batch 32, 128 and 256",
        f"is {step['arithmetic, kdiga / standard']:.1f} times that of a standard step",
        f"plain formulation's {step['arithmetic, textbook / standard']:.1f} times",
    ]
    assert [sentence for sentence in sentences if sentence not in text] == []
