"""The package's shape: who imports whom, what stays at the edge, and functions short enough to read at one sitting."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from kdiga_nb.paths import ROOT

PACKAGE = ROOT / "kdiga_nb"
# A module of a folder is named folder.module; a folder is one room.
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"
}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}

# The rooms from the bottom up: a room may import from lower lines, and from itself.
LEVELS = {
    room: level
    for level, rooms in enumerate(
        [
            ("paths", "numerics"),
            ("losses", "models", "data"),
            ("attacks", "teacher"),
            ("methods", "metrics"),
            ("training", "measures"),
            ("runs", "audit"),
            ("isd", "params"),
            ("artifacts",),
            ("report",),
            ("notebooks", "widgets"),
            ("site",),
            ("cli",),
            ("__main__",),
        ]
    )
    for room in rooms
}
LOWEST_ROOM = {"matplotlib": "report", "seaborn": "report", "pandas": "report", "ipywidgets": "widgets"}
LOWEST_ROOM |= {"typer": "cli", "papermill": "notebooks"}
LONGEST_FUNCTION = 60  # lines, docstring included


def top(name: str) -> str:
    """The folder of a module, or the module itself where it lies in none."""
    return name.partition(".")[0]


def inner_imports(tree: ast.Module) -> set[str]:
    """The modules and folders of the package that a module imports, at its top or inside a function."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "kdiga_nb":
            found |= {alias.name for alias in node.names} & set(LEVELS)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kdiga_nb."):
            found.add((node.module or "").split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("kdiga_nb.")}
    return found


def outer_imports(tree: ast.Module) -> set[str]:
    """The top-level packages that a module imports anywhere."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
    return found


def functions(tree: ast.Module) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_every_module_has_a_level():
    assert {top(name) for name in MODULES} <= set(LEVELS)
    assert len(MODULES) >= 16


@pytest.mark.parametrize("name", MODULES)
def test_imports_come_from_lower_levels(name: str):
    folder = top(name)
    allowed = {other for other in LEVELS if LEVELS[other] < LEVELS[folder]}
    allowed |= {folder} if (PACKAGE / folder).is_dir() else set()
    assert inner_imports(TREES[name]) <= allowed


@pytest.mark.parametrize("name", MODULES)
def test_no_relative_imports(name: str):
    assert not [node.lineno for node in ast.walk(TREES[name]) if isinstance(node, ast.ImportFrom) and node.level]


@pytest.mark.parametrize("name", MODULES)
def test_libraries_of_the_edge_stay_there(name: str):
    too_high = {library for library, room in LOWEST_ROOM.items() if LEVELS[room] > LEVELS[top(name)]}
    assert not outer_imports(TREES[name]) & too_high
    assert name in ("widgets.explorer", "widgets.thumbnails") or "ipywidgets" not in outer_imports(TREES[name])


def test_training_does_not_load_the_plotting_libraries():
    heavy = ["matplotlib", "seaborn", "pandas", "ipywidgets", "papermill"]
    program = f"import sys, kdiga_nb.artifacts; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("command", [[], ["train"], ["store"]])
def test_the_help_of_a_command_loads_no_large_library(command: list[str]):
    heavy = ["torch", "numpy", "scipy", "sklearn", "pandas", "nbformat"]
    program = f"""
import sys, kdiga_nb.cli
try:
    kdiga_nb.cli.app({[*command, "--help"]})
finally:
    print([name for name in {heavy} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "Usage" in done.stdout and done.stdout.strip().splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", MODULES)
def test_functions_fit_on_a_screen(name: str):
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions(TREES[name])}
    assert {function: length for function, length in lengths.items() if length > LONGEST_FUNCTION} == {}


@pytest.mark.parametrize("name", MODULES)
def test_no_error_is_swallowed(name: str):
    handlers = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.ExceptHandler)]
    silent = [h.lineno for h in handlers if h.type is None or all(isinstance(line, ast.Pass) for line in h.body)]
    assert silent == []


@pytest.mark.parametrize("name", MODULES)
def test_no_scope_opens_a_context_on_every_gpu(name: str):
    calls = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.Call)]
    forks = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "fork_rng"]
    assert all(call.args for call in forks)


@pytest.mark.parametrize("name", MODULES)
def test_public_names_are_documented(name: str):
    module = importlib.import_module(f"kdiga_nb.{name}")
    bare = [
        qualified
        for qualified, value in public_names(module)
        # getdoc also finds what an override inherits.
        if not inspect.getdoc(value)
    ]
    assert inspect.getdoc(module)
    assert bare == []


def public_names(module: ModuleType) -> list[tuple[str, object]]:
    """The functions and classes that a module defines, and their methods and properties."""
    found: list[tuple[str, object]] = []
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(value):
            # A dataclass without a docstring has its signature in its place.
            found.append((name, value if not (value.__doc__ or "").startswith(f"{name}(") else None))
            members = [(key, member) for key, member in vars(value).items() if not key.startswith("_")]
            found += [
                (f"{name}.{key}", getattr(value, key))
                for key, member in members
                if inspect.isfunction(member) or isinstance(member, property)
            ]
        elif inspect.isfunction(value):
            found.append((name, value))
    return found


def test_the_package_reads_no_path_but_those_of_paths():
    named = {
        name: node.value
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and Path(node.value).is_absolute()
        if len(node.value) > 1 and " " not in node.value
    }
    assert named == {}
