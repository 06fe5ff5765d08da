"""Notebooks: their list, their runs through papermill, and the stamps that say whether a notebook is up to date."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import torch
from pydantic import BaseModel

from kdiga_nb import paths
from kdiga_nb.artifacts import EVERY
from kdiga_nb.artifacts.table import Experiment
from kdiga_nb.numerics.progress import progress
from kdiga_nb.params import ParameterError, WalkthroughParams, at_scale
from kdiga_nb.runs.run import run_key
from kdiga_nb.runs.store import environment, measured

ARTEFACTS = (*EVERY, "walkthrough")  # one notebook per artefact, in reading order


def model_of(name: str) -> type[BaseModel]:
    """The parameters' model of a notebook."""
    return EVERY[name].params if name in EVERY else WalkthroughParams


def load(scale: str, name: str, overrides: Mapping[str, Any]) -> Experiment | None:
    """The experiment of an artefact at a scale; None for the walkthrough, which has no table.

    Overrides of other artefacts' settings are ignored.

    Raises:
        ParameterError: a key or value that cannot be used.
    """
    params: Any = _params(scale, name, overrides)
    return EVERY[name].build(params) if name in EVERY else None


def _params(scale: str, name: str, overrides: Mapping[str, Any]) -> BaseModel:
    if overrides.get("scale", scale) != scale:
        raise ParameterError(f"--set scale: must be {scale}, got {overrides['scale']!r}")
    return at_scale(model_of(name), scale, _own(name, overrides))


def _own(name: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in overrides.items() if key in model_of(name).model_fields}


@dataclass
class Summary:
    """Names of the notebooks that were run and that were up to date; reasons of those that failed."""

    made: list[str]
    cached: list[str]
    failed: dict[str, str]


def run_notebooks(
    scale: str, experiments: dict[str, Experiment | None], overrides: dict[str, Any], workers: int, again: bool
) -> Summary:
    """Run each notebook in its own papermill process. A failing notebook leaves its output and stops no other notebook.

    Args:
        workers: processes at a time.
        again: also run the notebooks that are up to date.
    """
    home = paths.executed(scale)
    inputs = {name: _inputs(scale, name, experiment, overrides) for name, experiment in experiments.items()}
    cached = [name for name in inputs if not again and _is_current(scale, name, inputs[name])]
    summary = Summary([], cached, {})
    todo = [name for name in inputs if name not in cached]
    with ThreadPoolExecutor(workers) as pool, progress("notebooks", "notebook", silent=not todo) as show:
        futures = {pool.submit(_papermill, scale, name, overrides, home): name for name in todo}
        for done, future in enumerate(as_completed(futures), start=1):
            name, reason = futures[future], future.result()
            if reason:
                summary.failed[name] = reason
            else:
                summary.made.append(name)
                _stamp(scale, name, inputs[name])
            show(done, len(todo), name)
    return summary


def _inputs(scale: str, name: str, experiment: Experiment | None, overrides: dict[str, Any]) -> str:
    """A hash of everything a notebook's output depends on: its cells, parameters, the code and the measurements."""
    cells = [cell.source for cell in nbformat.read(paths.NOTEBOOKS / f"{name}.ipynb", as_version=4).cells]
    jobs = experiment.jobs() if experiment else []
    results = [measured(job.run, job.measure, reference=job.reference) for job in jobs if job.measure]
    code = [path.read_text() for path in sorted(paths.PACKAGE.rglob("*.py"))]
    keys = [run_key(job.run) for job in jobs]
    versions = environment(torch.device("cpu"))
    parts = [cells, _params(scale, name, overrides).model_dump(), keys, results, code, versions]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _outputs(scale: str, name: str) -> dict[str, str]:
    """The artefact's files and their sha256."""
    files = [path for pattern in (f"{name}.*", f"{name}_*.*") for path in paths.figures(scale).glob(pattern)]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def _is_current(scale: str, name: str, inputs: str) -> bool:
    """Whether the executed notebook has the same inputs and its artefact's files are unchanged since."""
    try:
        executed = nbformat.read(paths.executed(scale) / f"{name}.ipynb", as_version=4)
    except (OSError, ValueError):
        return False
    return executed.metadata.get("kdiga") == {"inputs": inputs, "outputs": _outputs(scale, name)}


def _stamp(scale: str, name: str, inputs: str) -> None:
    path = paths.executed(scale) / f"{name}.ipynb"
    executed = nbformat.read(path, as_version=4)
    executed.metadata["kdiga"] = {"inputs": inputs, "outputs": _outputs(scale, name)}
    nbformat.write(executed, path)


def _papermill(scale: str, name: str, overrides: dict[str, Any], home: Path) -> str | None:
    """Run one notebook; return the reason if it failed."""
    command = [sys.executable, "-m", "papermill", str(paths.NOTEBOOKS / f"{name}.ipynb"), str(home / f"{name}.ipynb")]
    parameters = {"scale": scale, "settings": _own(name, overrides)}
    command += ["-y", json.dumps(parameters), "--no-progress-bar", "--no-log-output", "-k", "python3"]
    finished = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONWARNINGS": "ignore"})
    if finished.returncode == 0:
        return None
    lines = [line for line in finished.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"papermill ended with status {finished.returncode}"
