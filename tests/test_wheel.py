"""The kit as an installed wheel, in a folder of its own: commands, parameters, published results and notebooks."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from kdiga_nb import paths
from kdiga_nb.notebooks import ARTEFACTS


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("KDIGA_", "PYTHON"))} | variables
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel, which borrows all other packages from the one that runs the tests."""
    home = tmp_path_factory.mktemp("wheel")
    files = run("git", "ls-files", "-z", cwd=paths.ROOT).split("\0")
    for name in filter(None, files):
        if (paths.ROOT / name).is_file():
            (home / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(paths.ROOT / name, home / "source" / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "--wheel-dir", home, home / "source", cwd=home)
    venv.create(home / "env", symlinks=True)
    (wheel,) = home.glob("kdiga_nb-*.whl")
    run(*pip, "--python", home / "env" / "bin" / "python", "install", "--no-deps", wheel, cwd=home)
    (site,) = (home / "env" / "lib").glob("python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    shutil.rmtree(home / "source")
    return home


def kdiga(home: Path, *arguments: str | Path) -> str:
    (home / "elsewhere").mkdir(exist_ok=True)
    return run(home / "env" / "bin" / "kdiga", *arguments, cwd=home / "elsewhere", KDIGA_HOME=str(home / "own"))


def test_the_package_is_the_wheels_and_brings_its_parts(installed: Path) -> None:
    code = "from kdiga_nb import paths; print(paths.PACKAGE, paths.CHECKOUT, paths.claims().exists(), paths.runs())"
    python = installed / "env" / "bin" / "python"
    package, checkout, claims, runs = run(python, "-c", code, cwd=installed, HOME=str(installed)).split()
    assert package.startswith(str(installed / "env")) and (checkout, claims) == ("None", "True")
    assert runs.startswith(str(installed)) and "site-packages" not in runs
    assert (Path(package) / "py.typed").exists()


def test_notebooks_are_copied_and_never_overwritten(installed: Path) -> None:
    copies = installed / "elsewhere" / "mine"
    number = len(ARTEFACTS)
    assert f"{number} notebooks copied to mine, 0 were there" in kdiga(installed, "notebooks", "mine")
    (copies / "table1.ipynb").write_text("my own")
    assert f"0 notebooks copied to mine, {number} were there" in kdiga(installed, "notebooks", "mine")
    assert (copies / "table1.ipynb").read_text() == "my own"


def test_published_results_are_judged_and_pulled(installed: Path) -> None:
    assert "0 differ" in kdiga(installed, "verify", "--published")
    assert "runs copied to" in kdiga(installed, "store", "pull", "digits")
    assert (installed / "own" / "runs").is_dir()


def test_a_table_is_reproduced_outside_the_package(installed: Path) -> None:
    package = next((installed / "env" / "lib").glob("python*/site-packages/kdiga_nb"))

    def brought() -> set[Path]:
        return {path for path in package.rglob("*") if "__pycache__" not in path.parts}

    before = brought()
    assert "0 failed" in kdiga(installed, "reproduce", "--scale", "smoke", "--only", "table5", "--jobs", "2")
    figures = {path.name for path in (installed / "own" / "figures" / "smoke").iterdir()}
    assert {"table5.csv", "table5.png", "table5.svg", "table5.json", "notebooks"} <= figures
    assert brought() == before
