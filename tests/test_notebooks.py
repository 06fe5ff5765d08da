"""The committed notebooks: one an artefact, valid, executed, and free of what belongs to one machine."""

import ast
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from kdiga_nb.artifacts import EVERY
from kdiga_nb.paths import NOTEBOOKS

FILES = sorted(NOTEBOOKS.glob("*.ipynb"))
TAGS = {"parameters", "nbval-check-output", "nbval-ignore-output", "nbval-skip", "nbval-raises-exception"}
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/])/(?:home|root|Users|work|tmp|mnt|var|usr)/|[A-Za-z]:\\\\")
# What another machine prints differently: rounding errors such as 6.3e-16, and wall-clock times.
ROUNDING = re.compile(r"\de-(?:[1-9]\d|\d{3,})\b")
SECONDS = re.compile(r"\d\s*(?:s|ms|sec|secs|seconds?|minutes?)\b")
LONGEST_CELL = 25  # lines: notebooks narrate and call

# nbval runs every notebook; these differ most in what a second run could trip over.
RUN_TWICE = ("alignment_or_penalty", "explore", "robustness_audit", "table1", "walkthrough")

each = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def notebook(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook(path).cells if cell.cell_type == "code" and cell.source.strip()]


def tags(cell: nbformat.NotebookNode) -> set[str]:
    return set(cell.metadata.get("tags", []))


def tagged(path: Path, tag: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in code_cells(path) if tag in tags(cell)]


def test_one_notebook_an_artefact_and_the_walkthrough():
    assert {path.stem for path in FILES} == {*EVERY, "walkthrough"}


@each
def test_valid_and_for_the_plain_kernel(path: Path):
    content = notebook(path)
    nbformat.validate(content)
    assert content.metadata.kernelspec.name == "python3"


@each
def test_one_parameters_cell_of_plain_commented_values(path: Path):
    (cell,) = tagged(path, "parameters")
    for node in ast.parse(cell.source).body:
        # papermill --help-notebook shows name, type, default and comment; anything derived would go stale.
        assert isinstance(node, ast.AnnAssign)
        assert node.value is not None
        ast.literal_eval(node.value)
        assert "  # " in cell.source.splitlines()[node.lineno - 1]


@each
def test_something_is_checked_against_the_committed_output(path: Path):
    assert tagged(path, "nbval-check-output")


@each
def test_tags_are_known(path: Path):
    assert set().union(*(tags(cell) for cell in notebook(path).cells)) <= TAGS


@each
def test_opens_with_a_title(path: Path):
    first = notebook(path).cells[0]
    assert first.cell_type == "markdown"
    assert first.source.startswith("# ")


@each
def test_narrates_and_calls(path: Path):
    for cell in code_cells(path):
        definitions = [n for n in ast.walk(ast.parse(cell.source)) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
        assert not definitions or path.stem == "walkthrough"
        longest = LONGEST_CELL * (2 if path.stem == "walkthrough" else 1)
        assert len(cell.source.splitlines()) <= longest or "parameters" in tags(cell)


@each
def test_names_no_folder_of_one_machine(path: Path):
    assert ABSOLUTE_PATH.findall(path.read_text()) == []


@each
def test_outputs_hold_no_error_and_nothing_on_stderr(path: Path):
    outputs = [output for cell in code_cells(path) for output in cell.get("outputs", [])]
    assert [output for output in outputs if output.output_type == "error"] == []
    assert [output for output in outputs if output.get("name") == "stderr"] == []


@each
def test_committed_executed_from_top_to_bottom(path: Path):
    counts = [cell.get("execution_count") or 0 for cell in code_cells(path)]
    assert all(counts)
    assert counts == sorted(counts)


@each
def test_committed_claims_were_printed(path: Path):
    printed = [
        output
        for cell in tagged(path, "nbval-check-output")
        for output in cell.get("outputs", [])
        if output.output_type in ("stream", "execute_result", "display_data")
    ]
    assert printed


@each
def test_compared_outputs_hold_neither_rounding_nor_seconds(path: Path):
    for cell in tagged(path, "nbval-check-output"):
        for output in cell.get("outputs", []):
            text = output.get("text") or "".join(str(value) for value in output.get("data", {}).values())
            assert not ROUNDING.search(text), f"{cell.id} compares rounding: {text}"
            assert not SECONDS.search(text), f"{cell.id} compares a time: {text}"


@each
def test_committed_at_the_defaults(path: Path):
    # papermill marks what it injected; a notebook committed with that would hide its own defaults.
    assert not [cell for cell in notebook(path).cells if "injected-parameters" in tags(cell)]
    assert "papermill" not in notebook(path).metadata


@pytest.fixture(scope="session")
def smoke_place(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a notebook whose runs and figures lie in a folder of this worker's own.

    The notebooks share one run store, so that each net of the smoke scale is trained once per worker.
    """
    home = tmp_path_factory.mktemp("run_all")
    # A warning is not an error in a kernel: the notebooks' machinery is other people's.
    own = {"KDIGA_RUNS": str(home / "runs"), "KDIGA_FIGURES": str(home / "figures"), "PYTHONWARNINGS": "ignore"}
    return os.environ | own


def run_all_cells(client: NotebookClient) -> None:
    """JupyterLab's "Run All": every code cell in order; the first error raises."""
    for index, cell in enumerate(client.nb.cells):
        client.execute_cell(cell, index)


@pytest.mark.parametrize("name", RUN_TWICE)
def test_run_all_twice_in_one_kernel(name: str, smoke_place: dict[str, str], tmp_path: Path):
    # Readers change a parameter and run all cells again; names of the first run must not pass for parameters then.
    content = notebook(NOTEBOOKS / f"{name}.ipynb")
    place = next(i for i, cell in enumerate(content.cells) if "parameters" in tags(cell)) + 1
    injected = nbformat.v4.new_code_cell(metadata={"tags": ["injected-parameters"]})
    content.cells.insert(place, injected)
    where = {"metadata": {"path": str(tmp_path)}}
    client = NotebookClient(content, timeout=300, kernel_name="python3", resources=where)
    with client.setup_kernel(env=smoke_place):
        for epsilon in (0.3, 0.15):
            injected.source = f"# Parameters\nscale = 'smoke'\nepsilon = {epsilon}"
            run_all_cells(client)
            outputs = [output for cell in content.cells for output in cell.get("outputs", [])]
            assert [output for output in outputs if output.output_type == "error"] == []


@each
def test_every_picture_has_words_for_those_who_do_not_see_it(path: Path):
    """The cell's metadata ``alt``, which nbconvert writes into the page; a picture that has its own needs none."""
    wordless = [
        cell.source
        for cell in code_cells(path)
        for output in cell.outputs
        if "image/png" in output.get("data", {})
        and not cell.metadata.get("alt")
        and not output.metadata.get("image/png", {}).get("alt")
    ]
    assert wordless == []
