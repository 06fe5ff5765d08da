"""The command ``kdiga``: reproduce · train · runs."""

import json
import logging
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import nbformat
import typer
from pydantic import BaseModel
from tqdm import tqdm

from kdiga_nb import paths
from kdiga_nb.artifacts import ARTIFACTS, Experiment
from kdiga_nb.params import ParameterError, WalkthroughParams, parse_override, read
from kdiga_nb.runs import Job, Outcome, StoreError, ancestors, check_writable, list_store, run_all, run_key, title

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Reproduce, train and list what the KDIGA notebook kit knows.",
)


def _fail(message: str, status: int = 2) -> typer.Exit:
    typer.echo(message, err=True)
    return typer.Exit(status)


def scales() -> list[str]:
    """The folders of ``params/``."""
    return sorted(path.name for path in paths.PARAMS.iterdir() if path.is_dir())


def notebook_parameters(notebook: Path) -> set[str]:
    """The names that a notebook's ``parameters`` cell assigns."""
    import ast

    for cell in nbformat.read(notebook, as_version=4).cells:
        if "parameters" in cell.metadata.get("tags", []):
            tree = ast.parse(cell.source)
            targets = [node.target for node in tree.body if isinstance(node, ast.AnnAssign)]
            targets += [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
            return {target.id for target in targets if isinstance(target, ast.Name)}
    return set()


def artefact_names(scale: str) -> list[str]:
    """The notebooks that a scale has parameter files for, in reading order."""
    order = [*ARTIFACTS, "walkthrough"]
    found = {path.stem for path in (paths.PARAMS / scale).glob("*.yaml")}
    return [name for name in order if name in found]


def model_of(name: str) -> type[BaseModel]:
    """The parameters' model of a notebook."""
    return ARTIFACTS[name].params if name in ARTIFACTS else WalkthroughParams


def load(scale: str, name: str, overrides: dict[str, Any]) -> Experiment | None:
    """The experiment of an artefact at a scale, its parameter file checked; None for a notebook that only explains.

    Overrides that the notebook has no parameter for are left out.

    Raises:
        ParameterError: a key or value that cannot be used.
    """
    path = paths.params(scale, name)
    known = notebook_parameters(paths.NOTEBOOKS / f"{name}.ipynb")
    params: Any = read(model_of(name), path, {key: value for key, value in overrides.items() if key in known})
    foreign = set(type(params).model_fields) - known
    if foreign:
        raise ParameterError(f"notebooks/{name}.ipynb: {', '.join(sorted(foreign))}: not in its parameters cell")
    if params.scale != scale:
        raise ParameterError(f"params/{scale}/{path.name}: scale: must be {scale}, got {params.scale!r}")
    return ARTIFACTS[name].build(params) if name in ARTIFACTS else None


def _overrides(texts: list[str] | None, names: list[str]) -> dict[str, Any]:
    """``--set`` options, each known to at least one of the notebooks."""
    overrides = dict(parse_override(text) for text in texts or [])
    known = sorted({field for name in names for field in model_of(name).model_fields})
    for key in overrides:
        if key not in known:
            raise ParameterError(f"--set {key}: unknown key; known are {', '.join(known)}")
    return overrides


@dataclass
class _Summary:
    made: list[str]
    failed: dict[str, str]


@app.command()
def reproduce(
    scale: Annotated[str, typer.Option(help="A folder of params/: smoke, digits, …")] = "digits",
    only: Annotated[list[str] | None, typer.Option(help="Artefacts to make: --only table1, or several.")] = None,
    more: Annotated[list[str] | None, typer.Argument(hidden=True, help="Further artefacts after --only.")] = None,
    jobs: Annotated[int, typer.Option(min=0, help="Processes; 0 takes one a core.")] = 0,
    dry_run: Annotated[bool, typer.Option(help="Print what would be done, and do nothing.")] = False,
    set_: Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE on top of every parameter file.")] = None,
) -> None:
    """Train and measure what is missing, run every notebook through papermill, leave figures/SCALE/*."""
    started = time.perf_counter()
    if scale not in scales():
        raise _fail(f"--scale: must be one of {', '.join(scales())}, got {scale!r}")
    known = artefact_names(scale)
    if more and not only:
        raise _fail(f"unexpected argument {more[0]!r}; artefacts are named with --only")
    names = [*(only or known), *(more or [])]
    for name in names:
        if name not in known:
            raise _fail(f"--only: must be one of {', '.join(known)}, got {name!r}")
    try:
        overrides = _overrides(set_, names)
        experiments = {name: load(scale, name, overrides) for name in names}
    except ParameterError as error:
        raise _fail(str(error)) from None
    except ValueError as error:  # two values that are fine alone and impossible together
        raise _fail(f"params/{scale}: {error}") from None
    todo = list(dict.fromkeys(job for found in experiments.values() if found for job in found.jobs()))
    workers = jobs or os.cpu_count() or 1
    if dry_run:
        _print_plan(experiments, todo)
        return
    try:
        check_writable(paths.runs())
        check_writable(paths.executed(scale))
    except StoreError as error:
        raise _fail(str(error), 1) from None
    outcome = _train_and_measure(todo, workers, experiments)
    summary = _run_notebooks(scale, names, overrides, workers)
    _print_summary(outcome, summary, scale, time.perf_counter() - started)
    if outcome.failed or summary.failed:
        raise typer.Exit(1)


def _graph(todo: list[Job]) -> list[Job]:
    runs = ancestors([run for job in todo for run in [job.run, *job.needs()]])
    return [*(Job(run) for run in runs), *(job for job in todo if job.measure is not None)]


def _print_plan(experiments: dict[str, Experiment | None], todo: list[Job]) -> None:
    for name, experiment in experiments.items():
        rows = len(experiment.rows) if experiment else 0
        typer.echo(f"{name}: {rows} rows")
    graph = _graph(todo)
    for job in graph:
        if job.measure is None:
            parents = ", ".join(run_key(run) for run in job.needs()) or "nothing"
            typer.echo(f"  {run_key(job.run)}  {'cached' if job.is_done() else 'to do '}  {title(job)}, from {parents}")
    for kind, chosen in (
        ("trainings", [j for j in graph if not j.measure]),
        ("measurements", [j for j in graph if j.measure]),
    ):
        done = sum(job.is_done() for job in chosen)
        typer.echo(f"{len(chosen)} {kind}: {done} cached, {len(chosen) - done} to do")


def _train_and_measure(todo: list[Job], workers: int, experiments: dict[str, Experiment | None]) -> Outcome:
    device = next((experiment.params.device for experiment in experiments.values() if experiment), "auto")
    with tqdm(desc="runs and measurements", unit="job", dynamic_ncols=True, total=0, disable=not todo) as bar:

        def progress(done: int, total: int, text: str) -> None:
            bar.total, bar.n = total, done
            bar.set_postfix_str(text)

        try:
            return run_all(todo, workers=workers, device=device, progress=progress)
        except StoreError as error:
            raise _fail(str(error), 1) from None


def _run_notebooks(scale: str, names: list[str], overrides: dict[str, Any], workers: int) -> _Summary:
    """Each notebook in a papermill process of its own; one that fails leaves its output and stops no other."""
    home = paths.executed(scale)
    summary = _Summary([], {})
    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(names), desc="notebooks", unit="notebook") as bar:
        futures = {pool.submit(_papermill, scale, name, overrides, home): name for name in names}
        for future in as_completed(futures):
            name, reason = futures[future], future.result()
            if reason:
                summary.failed[name] = reason
            else:
                summary.made.append(name)
            bar.update()
            bar.set_postfix_str(name)
    return summary


def _papermill(scale: str, name: str, overrides: dict[str, Any], home: Path) -> str | None:
    """Run one notebook; the reason if it failed."""
    command = [sys.executable, "-m", "papermill", str(paths.NOTEBOOKS / f"{name}.ipynb"), str(home / f"{name}.ipynb")]
    command += ["-f", str(paths.params(scale, name)), "--no-progress-bar", "--no-log-output", "-k", "python3"]
    for key in overrides.keys() & model_of(name).model_fields.keys():
        value = overrides[key]
        command += ["-y", json.dumps({key: value})]
    finished = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONWARNINGS": "ignore"})
    if finished.returncode == 0:
        return None
    lines = [line for line in finished.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"papermill ended with status {finished.returncode}"


def _print_summary(outcome: Outcome, summary: _Summary, scale: str, seconds: float) -> None:
    typer.echo(f"runs and measurements: {outcome.made} made, {outcome.cached} cached, {len(outcome.failed)} failed")
    for job, reason in outcome.failed.items():
        typer.echo(f"  failed: {title(job)} ({run_key(job.run)}): {reason}")
    typer.echo(f"notebooks: {len(summary.made)} made, {len(summary.failed)} failed")
    for name, reason in summary.failed.items():
        typer.echo(f"  failed: {name}: {reason}")
    typer.echo(f"figures in {_shown(paths.figures(scale))}, after {seconds:.0f} s")


def _shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


@app.command()
def train(
    file: Annotated[Path, typer.Argument(help="A parameter file, e.g. params/digits/table1.yaml.")],
    row: Annotated[str | None, typer.Option(help="Only this row, e.g. kdiga.")] = None,
    jobs: Annotated[int, typer.Option(min=0, help="Processes; 0 takes one a core.")] = 0,
    set_: Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE on top of the file.")] = None,
) -> None:
    """Train the runs of a parameter file, and what they stand on, without measuring them."""
    if file.stem not in ARTIFACTS:
        raise _fail(f"{file}: the file's name must be one of {', '.join(ARTIFACTS)}")
    try:
        overrides = _overrides(set_, [file.stem])
        artifact = ARTIFACTS[file.stem]
        experiment = artifact.build(read(artifact.params, file.resolve(), overrides))
        rows = [experiment.row(row)] if row else list(experiment.rows)
    except ValueError as error:
        raise _fail(str(error) if isinstance(error, ParameterError) else f"{file}: {error}") from None
    if row and not rows[0].runs:
        raise _fail(f"{file}: row {row} has no net at this scale")
    todo = list(dict.fromkeys(Job(run) for row in rows for run in row.runs))
    outcome = _train_and_measure(todo, jobs or os.cpu_count() or 1, {file.stem: experiment})
    typer.echo(f"runs: {outcome.made} made, {outcome.cached} cached, {len(outcome.failed)} failed")
    for job, reason in outcome.failed.items():
        typer.echo(f"  failed: {title(job)} ({run_key(job.run)}): {reason}")
    if outcome.failed:
        raise typer.Exit(1)


@app.command()
def runs(json_: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False) -> None:
    """List the run store: finished runs and those under way."""
    found = list_store()
    if json_:
        typer.echo(json.dumps(found, indent=1))
        return
    if not found:
        typer.echo(f"no runs in {_shown(paths.runs())}; kdiga reproduce makes them")
    for entry in found:
        typer.echo("  ".join(str(entry[key]) for key in ("key", "state", "what", "epochs", "seconds")))


def main() -> None:
    """The console script: log lines go to stderr in one plain form."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    app()


if __name__ == "__main__":
    main()
