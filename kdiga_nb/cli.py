"""The command ``kdiga``: reproduce · train · audit · export · runs · data.

Each function imports what it needs of the kit, so that ``kdiga --help`` does not load PyTorch.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from kdiga_nb import paths

if TYPE_CHECKING:
    from kdiga_nb.artifacts.table import Experiment
    from kdiga_nb.notebooks import Summary
    from kdiga_nb.report import Difference
    from kdiga_nb.runs import Checkpoint
    from kdiga_nb.runs.graph import Job, Outcome

T = TypeVar("T")

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Reproduce, train, audit and list what the KDIGA notebook kit knows.",
)


def _fail(message: str, status: int = 2) -> typer.Exit:
    typer.echo(message, err=True)
    return typer.Exit(status)


def _overrides(texts: list[str] | None, names: list[str]) -> dict[str, Any]:
    """The ``--set`` options; each must be a setting of at least one of the notebooks."""
    from kdiga_nb.notebooks import model_of
    from kdiga_nb.params import ParameterError, parse_override, unknown_key

    overrides = dict(parse_override(text) for text in texts or [])
    known = sorted({field for name in names for field in model_of(name).model_fields})
    for key in overrides:
        if key not in known:
            raise ParameterError(f"--set {unknown_key(key, known)}")
    return overrides


def _one_of(option: str, value: str, names: Sequence[str]) -> str:
    """The value if it is one of the names; otherwise the command ends."""
    from kdiga_nb.params import did_you_mean

    if value not in names:
        raise _fail(f"{option}: must be one of {', '.join(names)}{did_you_mean(value, names)}, got {value!r}")
    return value


DataOption = Annotated[
    Path | None, typer.Option("--data", help="Root of the data sets and published weights (KDIGA_DATA).")
]
TRAINED = "trained"
StudiesOption = Annotated[
    str, typer.Option(help="Studies beyond the paper: `trained` here, or on the runs that are `published`.")
]
ExecutorOption = Annotated[
    str | None, typer.Option("--executor", help="Send the jobs to a Dask cluster: dask://ADDRESS of its scheduler.")
]


def _use_data(root: Path | None) -> None:
    """Set the environment variable, which worker processes and notebooks inherit."""
    if root is not None:
        os.environ["KDIGA_DATA"] = str(root.absolute())


def check_sources(jobs: list[Job]) -> None:
    """Fail before anything trains if a data set or a local checkpoint is missing that what is to do needs."""
    from kdiga_nb import data
    from kdiga_nb.runs import Checkpoint, StoreError, checkpoints
    from kdiga_nb.runs.graph import graph_of, to_do

    graph = to_do(graph_of(jobs))
    sources = {source for job in graph for source in (job.run, job.reference) if source is not None}
    sources |= {s for job in graph for s in (getattr(job.run, "teacher", None), getattr(job.run, "init", None)) if s}
    try:
        for name in sorted({source.dataset for source in sources} | {job.run.dataset for job in jobs}):
            data.load_data(name)
        for source in sources:
            if isinstance(source, Checkpoint) and source.format != "timm" and not checkpoints.is_url(source.path):
                checkpoints.locate(source)
    except (data.DataError, StoreError) as error:
        raise _fail(str(error), 1) from None


def _executor(address: str | None, stack: ExitStack) -> Executor | None:
    """The cluster's executor, closed with ``stack``."""
    if address is None:
        return None
    scheme, _, where = address.partition("://")
    if scheme != "dask" or not where:
        raise _fail(f"--executor: must be dask://ADDRESS, got {address!r}")
    try:
        from dask.distributed import Client
    except ImportError:
        raise _fail("--executor: needs Dask: pip install dask[distributed], or this package's extra cluster") from None
    try:
        client = stack.enter_context(Client(f"tcp://{where}", timeout=10))
    except (OSError, ValueError) as error:
        raise _fail(f"--executor: no Dask scheduler at {where} ({type(error).__name__})", 1) from None
    workers = client.scheduler_info(n_workers=-1)["workers"]
    # Two trainings in one process would share its random generators.
    crowded = [name for name, worker in workers.items() if worker["nthreads"] != 1]
    if crowded or not workers:
        problem = f"{crowded[0]} has several threads" if crowded else "there are none"
        raise _fail(f"--executor: workers of one thread each are needed (dask worker --nthreads 1): {problem}", 1)
    return stack.enter_context(client.get_executor(pure=False))


@app.command()
def reproduce(
    scale: Annotated[str, typer.Option(help="A file of params/: smoke, digits, …")] = "digits",
    only: Annotated[list[str] | None, typer.Option(help="Artefacts to make: --only table1, or several.")] = None,
    more: Annotated[list[str] | None, typer.Argument(hidden=True, help="Further artefacts after --only.")] = None,
    jobs: Annotated[int, typer.Option(min=0, help="Processes; 0: one per GPU, or one per core.")] = 0,
    data_: DataOption = None,
    executor: ExecutorOption = None,
    dry_run: Annotated[bool, typer.Option(help="Print what would be done, and do nothing.")] = False,
    again: Annotated[bool, typer.Option(help="Also run the notebooks whose inputs have not changed.")] = False,
    training: Annotated[
        bool, typer.Option("--training/--no-training", help="Train and measure what the store lacks, or leave it out.")
    ] = True,
    notebooks: Annotated[bool, typer.Option(help="Run the notebooks, or only fill the run store.")] = True,
    studies: StudiesOption = TRAINED,
    set_: Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE on top of the scale's file.")] = None,
) -> None:
    """Train and measure what is missing, run every notebook through papermill, leave figures/SCALE/*."""
    from kdiga_nb.notebooks import ARTEFACTS, run_notebooks
    from kdiga_nb.params import scales
    from kdiga_nb.runs import StoreError
    from kdiga_nb.runs.graph import NO_TRAINING, default_workers
    from kdiga_nb.runs.store import check_writable

    started = time.perf_counter()
    _use_data(data_)
    _one_of("--scale", scale, scales())
    if more and not only:
        raise _fail(f"unexpected argument {more[0]!r}; artefacts are named with --only")
    names = [_one_of("--only", name, ARTEFACTS) for name in [*(only or ARTEFACTS), *(more or [])]]
    overrides, experiments = _experiments(scale, names, set_)
    first = _before_the_pull(scale, experiments, studies)
    if dry_run:
        _print_plan(experiments if first is None else first)
        return
    if training:
        check_sources(_jobs(experiments))
    else:
        os.environ[NO_TRAINING] = "1"
        if first is not None:
            store_pull(scale)
            first = None
        _leave_out_what_has_no_results(experiments)
    try:
        check_writable(paths.runs())
        check_writable(paths.executed(scale))
    except StoreError as error:
        raise _fail(str(error), 1) from None
    workers = jobs or default_workers(_device(experiments))
    with ExitStack() as stack:
        cluster = _executor(executor, stack)
        outcome = _train_and_measure(_jobs(experiments if first is None else first), workers, experiments, cluster)
        if first is not None and outcome.failed:
            experiments = first  # what failed here must not be taken from the published runs
        elif first is not None:
            outcome = _continue_on_published_runs(scale, outcome, workers, experiments, cluster)
    summary = run_notebooks(scale, experiments, overrides, workers, again) if notebooks else None
    _print_summary(outcome, summary, scale, experiments, time.perf_counter() - started)
    if outcome.failed or (summary and summary.failed):
        raise typer.Exit(1)


def _leave_out_what_has_no_results(experiments: dict[str, Experiment | None]) -> None:
    for name in [name for name, one in experiments.items() if not _has_results(one)]:
        typer.echo(f"{name}: left out, the store lacks its results")
        del experiments[name]


def _has_results(experiment: Experiment | None) -> bool:
    """Whether the store has a measurement of the experiment, of an audit all of a net.

    The walkthrough has no experiment: it trains itself.
    """
    from kdiga_nb.params import AuditParams

    if experiment is not None and isinstance(experiment.params, AuditParams):
        return any(row.is_done() for row in experiment.rows)
    return experiment is not None and any(job.measure is not None and job.is_done() for job in experiment.jobs())


def _experiments(
    scale: str, names: list[str], set_: list[str] | None
) -> tuple[dict[str, Any], dict[str, Experiment | None]]:
    """The ``--set`` options as a dictionary, and the artefacts with these settings."""
    from kdiga_nb.notebooks import load
    from kdiga_nb.params import ParameterError

    try:
        overrides = _overrides(set_, names)
        return overrides, {name: load(scale, name, overrides) for name in names}
    except ParameterError as error:
        raise _fail(str(error)) from None
    except ValueError as error:  # two values that are fine alone and impossible together
        raise _fail(f"params/{scale}.yaml: {error}") from None


def _jobs(experiments: dict[str, Experiment | None]) -> list[Job]:
    return list(dict.fromkeys(job for one in experiments.values() if one for job in one.jobs()))


def _before_the_pull(
    scale: str, experiments: dict[str, Experiment | None], studies: str
) -> dict[str, Experiment | None] | None:
    """What is trained before the published runs come into the store: all but the studies. None: nothing is pulled."""
    from kdiga_nb.artifacts import STUDIES
    from kdiga_nb.runs import StoreError, shipped

    if _one_of("--studies", studies, (TRAINED, "published")) == TRAINED or not STUDIES.keys() & experiments:
        return None
    try:
        shipped.manifest(scale)
    except StoreError as error:
        raise _fail(f"--studies published: {error}") from None
    return {name: one for name, one in experiments.items() if name not in STUDIES}


def _continue_on_published_runs(
    scale: str, outcome: Outcome, workers: int, experiments: dict[str, Experiment | None], executor: Executor | None
) -> Outcome:
    """Pull the published runs, then measure the studies on your own nets and train what is not published."""
    from dataclasses import replace

    store_pull(scale)
    later = _train_and_measure(_jobs(experiments), workers, experiments, executor)
    return replace(later, made=outcome.made + later.made, cached=later.cached - outcome.made)


def _print_plan(experiments: dict[str, Experiment | None]) -> None:
    from kdiga_nb.artifacts.costs import ASSUMPTION, costs, disk_bytes
    from kdiga_nb.runs.graph import graph_of, title
    from kdiga_nb.runs.run import run_key

    for name, experiment in experiments.items():
        rows = len(experiment.rows) if experiment else 0
        typer.echo(f"{name}: {rows} rows")
    graph = graph_of(_jobs(experiments))
    cost = costs(graph)
    for job in graph:
        if job.measure is None:
            parents = ", ".join(run_key(run) for run in job.needs()) or "nothing"
            state = "cached" if job.is_done() else f"to do, {_hours(cost[job].seconds, cost[job].measured)}"
            typer.echo(f"  {run_key(job.run)}  {state}  {title(job)}, from {parents}")
    left = [job for job in graph if not job.is_done()]
    for kind, trains in (("trainings", True), ("measurements", False)):
        chosen = [job for job in graph if (job.measure is None) == trains]
        ahead = [job for job in chosen if job in left]
        hours = f": {_hours(sum(cost[job].seconds for job in ahead))}" if ahead else ""
        typer.echo(f"{len(chosen)} {kind}: {len(chosen) - len(ahead)} cached, {len(ahead)} to do{hours}")
    known = [job for job in left if cost[job].measured]
    weights, checkpoint = disk_bytes(left)
    typer.echo(f"{len(known)} of {len(left)} from a step measured here; estimates are GPU time {ASSUMPTION}")
    typer.echo(
        f"disk: {weights / 1e9:.2g} GB of weights, {checkpoint / 1e9:.2g} GB for a checkpoint of a run under way"
    )


def _hours(seconds: float, measured: bool = False) -> str:
    return f"{seconds / 3600:.2g} h {'by a measured step' if measured else 'estimated'}"


def _device(experiments: dict[str, Experiment | None]) -> str:
    return next((experiment.params.device for experiment in experiments.values() if experiment), "auto")


def _train_and_measure(
    todo: list[Job], workers: int, experiments: dict[str, Experiment | None], executor: Executor | None = None
) -> Outcome:
    from kdiga_nb.numerics import distributed
    from kdiga_nb.numerics.progress import progress
    from kdiga_nb.runs import StoreError
    from kdiga_nb.runs.graph import run_all

    device, silent = _device(experiments), not todo or distributed.rank() > 0
    with progress("runs and measurements", "job", silent=silent) as show:
        try:
            return run_all(todo, workers=workers, device=device, executor=executor, progress=show)
        except StoreError as error:
            raise _fail(str(error), 1) from None


def _print_summary(
    outcome: Outcome, summary: Summary | None, scale: str, experiments: dict[str, Experiment | None], seconds: float
) -> None:
    from kdiga_nb.report.verify import verify
    from kdiga_nb.runs.graph import title
    from kdiga_nb.runs.run import run_key

    typer.echo(f"runs and measurements: {outcome.made} made, {outcome.cached} cached, {len(outcome.failed)} failed")
    for job, reason in outcome.failed.items():
        typer.echo(f"  failed: {title(job)} ({run_key(job.run)}): {reason}")
    if summary:
        typer.echo(f"notebooks: {len(summary.made)} made, {len(summary.cached)} cached, {len(summary.failed)} failed")
        for name, reason in summary.failed.items():
            typer.echo(f"  failed: {name}: {reason}")
        typer.echo(f"figures in {_shown(paths.figures(scale))}, after {seconds:.0f} s")
    typer.echo(verify(scale, experiments).summary())


def _shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


@app.command()
def verify(
    scale: Annotated[str, typer.Option(help="A file of params/: smoke, digits, …")] = "digits",
    json_: Annotated[Path | None, typer.Option("--json", help="Also write everything to this file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write a page for a paper or an issue.")] = None,
    published: Annotated[bool, typer.Option("--published", help="Judge the published tables, not yours.")] = False,
) -> None:
    """Judge your results: values against the published intervals, claims against the ledger; exit status 1 if not."""
    from kdiga_nb.artifacts import EVERY
    from kdiga_nb.notebooks import load
    from kdiga_nb.params import ParameterError, scales
    from kdiga_nb.report import verify as verify_

    _one_of("--scale", scale, scales())
    try:
        result = verify_.verify(scale, {name: load(scale, name, {}) for name in EVERY}, own=not published)
        if json_ is not None:
            json_.write_text(json.dumps(result.record(), indent=1, ensure_ascii=False) + "\n")
        if markdown is not None:
            markdown.write_text(result.markdown())
    except ParameterError as error:
        raise _fail(str(error)) from None
    except OSError as error:
        raise _fail(f"{error.filename}: {error.strerror}", 1) from None
    typer.echo(result.text())
    if not result.reproduced:
        raise typer.Exit(1)


@app.command("compare")
def compare_command(
    artefact: Annotated[str, typer.Argument(help="An artefact that has both rows, e.g. table1.")],
    row: Annotated[str, typer.Argument(help="A row of it, e.g. kdiga; kdiga:1 is its net of seed 1.")],
    other: Annotated[str, typer.Argument(help="The row that is subtracted, e.g. kd.")],
    scale: Annotated[str, typer.Option(help="A file of params/: smoke, digits, …")] = "digits",
    set_: Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE on top of the file.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Accuracy of a row minus that of another on the same images and seeds, with a 95 % interval and p.

    p is McNemar's exact test for one seed, a bootstrap over seeds and images for several. The interval is a bootstrap's
    too, so its last digit may differ in the other order.
    """
    from kdiga_nb.artifacts import EVERY
    from kdiga_nb.params import scales
    from kdiga_nb.report import compare, heading, row_of

    _one_of("--scale", scale, scales())
    name = _one_of("artefact", artefact, list(EVERY))
    experiment = _experiments(scale, [name], set_)[1][name]
    assert experiment is not None  # only the walkthrough has none
    ids = [each.id for each in experiment.rows]
    for each in (row, other):
        _one_of("row", each.partition(":")[0], ids)
    try:
        a, b = row_of(experiment, row), row_of(experiment, other)
    except ValueError as error:
        raise _fail(str(error)) from None
    theirs = {cell.metric for cell in b.cells}
    found: dict[str, Difference | str] = {}
    for metric in (cell.metric for cell in a.cells if cell.is_accuracy and cell.metric in theirs):
        try:
            found[metric] = compare(experiment, row, other, metric)
        except ValueError as error:
            found[metric] = str(error)
    if not found:
        raise _fail(f"{name}: {a.id} and {b.id} have no accuracy in common")
    if all(isinstance(one, str) for one in found.values()):
        why = str(next(iter(found.values())))
        help_ = "; kdiga store pull brings published measurements, kdiga reproduce makes your own"
        raise _fail(f"{name} at {scale}: {why}{help_ * ('measured' in why)}", 1)
    if json_:
        typer.echo(json.dumps({key: one if isinstance(one, str) else vars(one) for key, one in found.items()}))
        return
    typer.echo(f"{a.label} minus {b.label}, {scale}:")
    for metric, one in found.items():
        typer.echo(f"  {heading(metric)}: {one}")


@app.command()
def train(
    file: Annotated[Path, typer.Argument(help="A parameter file, e.g. params/digits.yaml, or one of your own.")],
    artefact: Annotated[
        str | None, typer.Option(help="Of which artefact, e.g. table1; the file may say it: `artefact: table1`.")
    ] = None,
    row: Annotated[str | None, typer.Option(help="Only this row, e.g. kdiga.")] = None,
    jobs: Annotated[int, typer.Option(min=0, help="Processes; 0: one per GPU, or one per core.")] = 0,
    data_: DataOption = None,
    executor: ExecutorOption = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE on top of the file.")] = None,
) -> None:
    """Train the runs of a parameter file, and the runs that those need, without measuring them.

    Over several GPUs of a machine, or several machines: torchrun --nproc_per_node N -m kdiga_nb train FILE.
    """
    from kdiga_nb.numerics import distributed
    from kdiga_nb.runs.graph import Job, default_workers, title
    from kdiga_nb.runs.run import run_key

    _use_data(data_)
    name, experiment = _experiment_of(file, artefact, set_)
    ids = [one.id for one in experiment.rows]
    rows = [experiment.row(_one_of("--row", row, ids))] if row else list(experiment.rows)
    if row and not rows[0].runs:
        raise _fail(f"{file}: row {row} has no net at this scale")
    todo = list(dict.fromkeys(Job(run) for row in rows for run in row.runs))
    check_sources(todo)
    experiments: dict[str, Experiment | None] = {name: experiment}
    with ExitStack() as stack:
        stack.enter_context(distributed.process_group())
        workers = jobs or default_workers(experiment.params.device)
        outcome = _train_and_measure(todo, workers, experiments, _executor(executor, stack))
        if distributed.rank() > 0:
            return
    typer.echo(f"runs: {outcome.made} made, {outcome.cached} cached, {len(outcome.failed)} failed")
    for job, reason in outcome.failed.items():
        typer.echo(f"  failed: {title(job)} ({run_key(job.run)}): {reason}")
    if outcome.failed:
        raise typer.Exit(1)


def _experiment_of(file: Path, artefact: str | None, set_: list[str] | None) -> tuple[str, Experiment]:
    """Name and experiment of the artefact that the option, or else the parameter file, names."""
    from kdiga_nb.artifacts import EVERY
    from kdiga_nb.params import ParameterError, load_yaml, read

    try:
        artefact = artefact or load_yaml(file, str(file)).get("artefact")
        if artefact is None:
            known = ", ".join(EVERY)
            raise ParameterError(f"{file}: --artefact, or a key `artefact` in the file, must be one of {known}")
        name = _one_of("--artefact", str(artefact), list(EVERY))
        params = read(EVERY[name].params, file.resolve(), _overrides(set_, [name]))
        return name, EVERY[name].build(params)
    except ParameterError as error:
        raise _fail(str(error)) from None
    except ValueError as error:  # two values that are fine alone and impossible together
        raise _fail(f"{file}: {error}") from None


@app.command("params")
def params_command(
    artefact: Annotated[str, typer.Argument(help="Whose settings, e.g. table1.")] = "table1",
    scale: Annotated[str, typer.Option(help="At which scale.")] = "digits",
    json_: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """List every setting of an artefact: value at the scale, default, allowed values, meaning and source."""
    from kdiga_nb.notebooks import ARTEFACTS, model_of
    from kdiga_nb.params import describe_settings, scales

    _one_of("--scale", scale, scales())
    model = model_of(_one_of("artefact", artefact, ARTEFACTS))
    settings = describe_settings(model, scale)
    if json_:
        typer.echo(json.dumps(settings, indent=1, ensure_ascii=False))
        return
    for one in settings:
        typer.echo(f"{one['name']} = {one['value']}")
        default = "" if one["default"] is None else f"; default {one['default']}"
        typer.echo(f"    {one['meaning']}; {one['allowed']}{default}")


def _source(target: str, model: str | None, folder: Path | None = None) -> Checkpoint:
    """The net named on the command line: a run's key, its folder or its weights, or another file of weights."""
    from kdiga_nb.runs import Checkpoint, StoreError, checkpoints, foreign
    from kdiga_nb.runs.listing import net_in, stored

    path = Path(target)
    if path.is_dir():
        return net_in(path)
    if path.is_file():
        if model is None:
            of_a_run = path.name == "model.safetensors" and path.with_name("run.json").exists()
            return net_in(path.parent) if of_a_run else checkpoints.described(path)
        if folder is not None:
            model = f"{foreign.own_net(model)}:{foreign.own_images(folder)}"
            kind = "safetensors" if path.suffix == ".safetensors" else "state_dict"
            return Checkpoint(str(path), checkpoints.digest_of(path), kind, model)
        return Checkpoint(target, None, "safetensors" if path.suffix == ".safetensors" else "state_dict", model)
    if path.suffix:
        raise StoreError(f"{target}: there is no such file")
    return stored(target)


def _radius_of(text: str) -> float:
    from pydantic import TypeAdapter, ValidationError

    from kdiga_nb.params import ParameterError, Radius

    try:
        return TypeAdapter(Radius).validate_python(text)
    except ValidationError as error:
        raise ParameterError(f"--epsilon: {error.errors()[0]['msg'].lower()}, got {text!r}") from None


@app.command()
def audit(
    target: Annotated[str, typer.Argument(help="A run's key (kdiga runs lists them) or folder, or a file of weights.")],
    model: Annotated[
        str | None,
        typer.Option(help="Net and data set of a file: digits_small:digits; with --data, your own: MODULE:FUNCTION."),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--data", help="Images of your own, FOLDER/CLASS/IMAGE, for a net of your own.")
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="A second net, such as its teacher (key or file), whose adversarial images are tried."),
    ] = None,
    reference_model: Annotated[str | None, typer.Option(help="Net and data set of the reference's file.")] = None,
    epsilon: Annotated[str, typer.Option(help="Radius of the l-inf ball in pixels of [0, 1], e.g. 8/255.")] = "0.1",
    images: Annotated[int, typer.Option(min=1, help="Test images of most attacks.")] = 200,
    json_: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Attack a net in every way the kit knows and give a verdict by named rules; a second call resumes."""
    from kdiga_nb.attacks.autoattack import AutoAttack
    from kdiga_nb.audit.measures import COMPARES, plan
    from kdiga_nb.audit.verdict import verdict
    from kdiga_nb.measures import TestAccuracy
    from kdiga_nb.numerics.progress import progress
    from kdiga_nb.params import ParameterError
    from kdiga_nb.runs import StoreError
    from kdiga_nb.runs.store import measure

    try:
        radius = _radius_of(epsilon)
        if folder is not None and (model is None or not Path(target).is_file()):
            raise ValueError("--data needs a file of weights and --model MODULE:FUNCTION")
        net = _source(target, model, folder)
        other = None if reference is None else _source(reference, reference_model)
        measures = plan(radius, images=images) | {"autoattack": TestAccuracy(AutoAttack(radius), images)}
        results: dict[str, dict[str, Any]] = {}
        with progress("audit", "attack") as show:
            for done, name in enumerate(measures):
                show(done, len(measures), name)
                if name == "transfer" and other is None:
                    continue
                results[name] = measure(net, measures[name], reference=other if name in COMPARES else None)
                if name == "preconditions" and verdict(results).word == "invalid":
                    break
    except (ParameterError, StoreError, ValueError) as error:
        raise _fail(str(error)) from None
    _print_audit(results, json_)
    if verdict(results).word == "invalid":
        raise typer.Exit(1)


def _print_audit(results: dict[str, dict[str, Any]], as_json: bool) -> None:
    from kdiga_nb.audit.verdict import verdict

    says = verdict(results)
    alarms = says.faults | says.masking | says.weakness
    if as_json:
        typer.echo(json.dumps({"verdict": says.word, "alarms": alarms, "results": results}, indent=1))
        return
    for name, result in results.items():
        if "percent" in result:
            typer.echo(
                f"{name:12} {result['percent']:6.1f} % [{result['low']:.1f}, {result['high']:.1f}], n = {result['n']}"
            )
    for name, sentence in alarms.items():
        typer.echo(f"{name}: {sentence}")
    typer.echo(says.sentence)


@app.command()
def export(
    key: Annotated[str, typer.Argument(help="A finished run's key (kdiga runs lists them).")],
    path: Annotated[Path, typer.Argument(help="Where to, e.g. checkpoints/cifar10/isd_wot_3.safetensors.")],
    epsilon: Annotated[str, typer.Option(help="Radius at which the rounded weights are checked, e.g. 8/255.")] = "0.1",
) -> None:
    """Write a run's weights in half precision and its record; accuracies are measured again after rounding."""
    from kdiga_nb.attacks.gradient import PGD
    from kdiga_nb.measures import TestAccuracy
    from kdiga_nb.params import ParameterError
    from kdiga_nb.runs import StoreError, listing

    try:
        radius = _radius_of(epsilon)
        checks = {"clean": TestAccuracy(), "pgd20": TestAccuracy(PGD(radius, radius / 10, 20))}
        record = listing.export(key, path, checks)
    except (ParameterError, StoreError, ValueError) as error:
        raise _fail(str(error)) from None
    for name, accuracy in record["accuracy"].items():
        before, after = (accuracy[words]["percent"] for words in ("as trained", "as written"))
        typer.echo(f"{name}: {before:.2f} % as trained, {after:.2f} % as written, n = {accuracy['as written']['n']}")
    typer.echo(f"{_shown(path)}: {path.stat().st_size / 1e6:.2f} MB, sha256 {record['sha256']}")


@app.command()
def runs(
    scale: Annotated[str | None, typer.Option(help="Only runs of this scale: digits, cifar10_cpu, …")] = None,
    method: Annotated[str | None, typer.Option(help="Only runs of this method: st, kd, kdiga, …")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """List the run store, newest first: finished runs and those under way, and the artefacts that use each.

    Where another command takes a run, the beginning of its key will do.
    """
    from kdiga_nb.methods import METHODS
    from kdiga_nb.params import scales
    from kdiga_nb.runs.listing import list_store

    chosen = scales() if scale is None else [_one_of("--scale", scale, scales())]
    if method is not None:
        _one_of("--method", method, list(METHODS))
    uses = _uses(chosen)
    found: list[dict[str, Any]] = [{**entry, "artefacts": uses.get(entry["key"], {})} for entry in list_store()]
    entries = [
        entry
        for entry in found
        if (scale is None or entry["artefacts"])
        and (method is None or ("run" in entry and entry["run"]["method"]["type"] == method))
    ]
    if json_:
        typer.echo(json.dumps(entries, indent=1, ensure_ascii=False))
        return
    if not entries:
        which = "" if scale is None and method is None else " of that kind"
        typer.echo(f"no runs{which} in {_shown(paths.runs())}; kdiga reproduce makes them")
        return
    lines = [("key", "state", "row", "training", "result", "used by")]
    for entry in entries:
        label = next(iter(entry["artefacts"].values()), "–")
        names = ", ".join(entry["artefacts"]) or "–"
        lines.append((entry["key"], entry["state"], label, entry["what"], ", ".join(_so_far(entry)), names))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        typer.echo("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def _uses(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Run key -> artefact -> label of the row that the run is part of, over some scales."""
    from kdiga_nb.artifacts import EVERY
    from kdiga_nb.params import at_scale
    from kdiga_nb.runs.run import run_key

    found: dict[str, dict[str, str]] = {}
    for name in names:
        for artefact, one in EVERY.items():
            for row in one.build(at_scale(one.params, name)).rows:
                for run in row.runs:
                    found.setdefault(run_key(run), {}).setdefault(artefact, row.label)
    return found


def _so_far(entry: dict[str, Any]) -> list[str]:
    """Accuracy, time spent and time left of a listed run, as far as they are known."""
    parts = [f"{entry['epochs']} epochs in {entry['seconds']:.0f} s"]
    if entry.get("accuracy") is not None:
        parts.append(f"{entry['accuracy']:.1f} % clean on validation")
    if entry.get("robust") is not None:
        where = "test" if entry["run"]["schedule"]["selection"] == "best_on_test" else "validation"
        parts.append(f"{entry['robust']:.1f} % PGD-20 on {where}")
    if entry.get("seconds_left"):
        parts.append(f"{entry['seconds_left'] / 60:.0f} min left")
    return parts


@app.command()
def explore(
    page: Annotated[bool, typer.Option("--page", help="As a page without code (Voilà), not in JupyterLab.")] = False,
    scale: Annotated[str, typer.Option(help="At which it opens, with its published runs at need.")] = "digits",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on this machine.")] = 8888,
    browser: Annotated[bool, typer.Option(help="Open it in the browser.")] = True,
) -> None:
    """Open the explorer, with your own nets if the run store has any, else with the published ones (no training)."""
    import sys
    from importlib.util import find_spec

    from kdiga_nb.notebooks import load
    from kdiga_nb.params import scales
    from kdiga_nb.runs import StoreError, shipped

    if page and find_spec("voila") is None:
        raise _fail("--page: needs Voilà: pip install voila, or this package's extra page")
    if not _has_results(load(_one_of("--scale", scale, scales()), "explore", {})):
        os.environ["KDIGA_RUNS"] = f"{paths.runs()}-published"
        try:
            shipped.pull(scale)
        except StoreError as error:
            raise _fail(str(error), 1) from None
        typer.echo(
            f"the run store has no net of the explorer: the published ones are shown, from {_shown(paths.runs())}\n"
            f"kdiga reproduce --scale {scale} --only explore trains your own"
        )
    notebook = paths.NOTEBOOKS / "explore.ipynb"
    if scale != "digits":
        notebook = explorer_at(scale)
    elif paths.CHECKOUT is None and not page:  # JupyterLab saves what it opens
        own = paths.home() / "notebooks"
        _copy_notebooks(own, ["explore"])
        notebook = own / "explore.ipynb"
    serve = ["voila", "--Voila.ip=127.0.0.1", f"--port={port}"] if page else ["jupyterlab", f"--port={port}"]
    serve += [str(notebook)] if browser else ["--no-browser", str(notebook)]
    os.execv(sys.executable, [sys.executable, "-m", *serve])  # so that Ctrl-C reaches the server alone


def explorer_at(scale: str) -> Path:
    """A copy of the explorer's notebook that opens at the scale, with the scale's figures; one that is there stays."""
    import papermill

    target = paths.figures(scale) / "explore.ipynb"
    if not target.exists():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            source = paths.NOTEBOOKS / "explore.ipynb"
            papermill.execute_notebook(source, target, {"scale": scale}, prepare_only=True, progress_bar=False)
        except OSError as error:
            raise _fail(f"{error.filename}: {error.strerror}", 1) from None
    return target


def _copy_notebooks(folder: Path, names: Sequence[str]) -> list[Path]:
    """Copy notebooks of the kit; one that is there stays as it is. Returns the copies."""
    import shutil

    copied = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            target = folder / f"{name}.ipynb"
            if not target.exists():
                shutil.copyfile(paths.NOTEBOOKS / target.name, target)
                copied.append(target)
    except OSError as error:
        raise _fail(f"{error.filename}: {error.strerror}", 1) from None
    return copied


@app.command("notebooks")
def notebooks_command(
    folder: Annotated[Path, typer.Argument(help="Where to, e.g. a folder of your own: kdiga-notebooks.")],
) -> None:
    """Copy the notebooks into a folder, to read and run; a notebook that is there stays as it is."""
    from kdiga_nb.notebooks import ARTEFACTS

    copied = _copy_notebooks(folder, ARTEFACTS)
    typer.echo(f"{len(copied)} notebooks copied to {_shown(folder)}, {len(ARTEFACTS) - len(copied)} were there")


@app.command("explorable")
def explorable_command(
    path: Annotated[Path, typer.Argument(help="Where to.")] = Path("explorable.html"),
    scale: Annotated[str, typer.Option(help="A scale of 8×8 digits.")] = "digits",
) -> None:
    """Write the page on which a reader attacks digits by hand: one file, no server, from the nets of the run store."""
    from kdiga_nb.params import scales
    from kdiga_nb.report.explorable import explorable
    from kdiga_nb.runs import StoreError

    try:
        text = explorable(_one_of("--scale", scale, scales()))
        path.write_text(text, encoding="utf-8")
    except StoreError as error:
        raise _fail(str(error), 1) from None
    except ValueError as error:
        raise _fail(f"--scale {scale}: {error}") from None
    except OSError as error:
        raise _fail(f"{error.filename}: {error.strerror}", 1) from None
    typer.echo(f"{_shown(path)}: {len(text.encode()) / 1e6:.2f} MB")


@app.command("site")
def site_command(folder: Annotated[Path, typer.Argument(help="Where to.")] = Path("site")) -> None:
    """Write the kit as web pages: notebooks with their outputs, documents, the API and the explorable page."""
    if paths.CHECKOUT is None:
        raise _fail("site: the documents are in the repository; run this in a checkout")
    try:
        from kdiga_nb.site import build
    except ImportError as error:
        raise _fail(f"site: needs {error.name}: pip install {error.name}, or this package's extra site") from None
    try:
        pages = build(folder, (paths.published("digits") / "explorable.html").read_text(encoding="utf-8"))
    except OSError as error:
        raise _fail(f"{error.filename}: {error.strerror}", 1) from None
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    typer.echo(f"{len(pages)} pages and the API, {size / 1e6:.1f} MB: open {_shown(folder / 'index.html')}")


store_app = typer.Typer(no_args_is_help=True, help="Published runs: copy them into the run store, check or make them.")
app.add_typer(store_app, name="store")
PUBLISHED = "digits, cifar10_cpu, cifar10_short, …"


def _for_scale(work: Callable[[str], T], scale: str) -> T:
    """The result of the work on a scale's published runs; an unknown scale or a fault of the store ends the command."""
    from kdiga_nb.params import scales
    from kdiga_nb.runs import StoreError

    try:
        return work(_one_of("SCALE", scale, scales()))
    except StoreError as error:
        raise _fail(str(error), 1) from None


@store_app.command("pull")
def store_pull(scale: Annotated[str, typer.Argument(help=f"A scale: {PUBLISHED}")] = "digits") -> None:
    """Copy a scale's published runs into the run store; what is there stays."""
    from kdiga_nb.runs import shipped

    pulled = _for_scale(shipped.pull, scale)
    typer.echo(f"{len(pulled.copied)} runs copied to {_shown(paths.runs())}, {len(pulled.there)} were there")


@store_app.command("drop")
def store_drop(scale: Annotated[str, typer.Argument(help=f"A scale: {PUBLISHED}")] = "digits") -> None:
    """Remove the runs that were pulled from the run store, so that your own are trained in their place."""
    from kdiga_nb.runs import shipped

    dropped = _for_scale(shipped.drop, scale)
    typer.echo(f"{len(dropped)} published runs removed from {_shown(paths.runs())}")


@store_app.command("verify")
def store_verify(scale: Annotated[str, typer.Argument(help=f"A scale: {PUBLISHED}")] = "digits") -> None:
    """Check the sha256 of every published file of a scale."""
    from kdiga_nb.runs import shipped

    if lines := _for_scale(shipped.faults, scale):
        raise _fail("\n".join(f"{scale}: {line}" for line in lines), 1)
    typer.echo(f"{len(shipped.manifest(scale)['files'])} files, all as in the manifest")


@store_app.command("pack")
def store_pack(
    scale: Annotated[str, typer.Argument(help=f"A scale: {PUBLISHED}")],
    row: Annotated[list[str] | None, typer.Option(help="Rows of Table 1 whose first seed's weights go along.")] = None,
    artefact: Annotated[list[str] | None, typer.Option(help="Artefacts all of whose weights go along.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="key=value: a setting for which more runs were trained.")
    ] = None,
) -> None:
    """For maintainers: publish the finished runs of a scale, and the weights of some rows and artefacts."""
    from kdiga_nb.artifacts import EVERY
    from kdiga_nb.notebooks import load
    from kdiga_nb.params import ParameterError, scales
    from kdiga_nb.report.card import card
    from kdiga_nb.report.files import commit
    from kdiga_nb.runs import Run, StoreError, shipped
    from kdiga_nb.runs.graph import graph_of

    _one_of("SCALE", scale, scales())
    try:
        overrides = _overrides(set_, list(EVERY))
        experiments = {name: one for name in EVERY if (one := load(scale, name, overrides))}
    except ParameterError as error:
        raise _fail(str(error)) from None
    rows = {one.id: one for one in experiments["table1"].rows}
    kept = [rows[_one_of("--row", name, list(rows))].runs[0] for name in row or []]
    for name in artefact or []:
        kept += [job.run for job in graph_of(experiments[_one_of("--artefact", name, list(EVERY))].jobs())]
    every = [job.run for job in graph_of(job for one in experiments.values() for job in one.jobs())]
    try:
        lists = [[run for run in some if isinstance(run, Run)] for some in (every, kept)]
        packed = shipped.pack(scale, *lists, commit=commit())
    except StoreError as error:
        raise _fail(str(error), 1) from None
    files = [Path(name) for name in shipped.manifest(scale)["files"]]
    with_weights = [str(path.parent) for path in files if path.name == shipped.WEIGHTS]
    (shipped.home_of(scale) / "README.md").write_text(card(scale, experiments, with_weights))
    size = sum(path.stat().st_size for path in shipped.home_of(scale).rglob("*") if path.is_file())
    typer.echo(
        f"{len(packed)} runs, {len(with_weights)} with weights, {size / 1e6:.1f} MB in {_shown(shipped.home_of(scale))}"
    )


@app.command("data")
def data_command(
    names: Annotated[list[str] | None, typer.Argument(help="Data sets; all by default.")] = None,
    root: DataOption = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch what is missing.")] = False,
) -> None:
    """Say which data sets are present and complete, or download them."""
    from kdiga_nb import data

    _use_data(root)
    missing = False
    for name in names or list(data.DATASETS):
        if name not in data.DATASETS:
            raise _fail(f"data: must be one of {', '.join(data.DATASETS)}, got {name!r}")
        try:
            if download:
                data.download(name)
            loaded = data.load_data(name)
            typer.echo(f"{name}: {len(loaded.train.labels)} training and {len(loaded.test.labels)} test images")
        except data.DataError as error:
            missing = True
            typer.echo(str(error), err=True)
    if missing:
        raise typer.Exit(1)


def main() -> None:
    """The console script; log lines go to stderr."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    app()


if __name__ == "__main__":
    main()
