"""A run is a value, and training is a cached function of it.

A ``Run`` says data set, net, method, schedule, seed, and which run (or published checkpoint) is its teacher and its
starting point. ``run_key`` hashes exactly that: ancestors enter by their own key; a label, a path or a device does not
enter. ``load_or_train`` answers from the store or trains:

    runs/<key>/run.json                the record: the run, sha256 of the weights, versions, seconds
    runs/<key>/model.safetensors       the weights
    runs/<key>/history.csv             one row an epoch
    runs/<key>/measures.json           what was measured on it, by readable name
    runs/<key>/checkpoint.safetensors  an unfinished training after its last epoch, or ten minutes ago inside one

Every file is written under a temporary name and renamed, so a kill at any moment leaves whole files; ``run.json`` comes
last and marks the run as finished. A file lock on the key makes the second process that wants a run wait for the first.
Weights whose hash does not fit are set aside under ``<key>.damaged-…`` and trained again. Nothing is ever unpickled.
"""

import csv
import hashlib
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import platform
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache, lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from filelock import FileLock
from torch import nn

from kdiga_nb import __version__, checkpoints, distributed, paths
from kdiga_nb.attacks import ATTACKS
from kdiga_nb.checkpoints import Checkpoint, StoreError, digest_of
from kdiga_nb.data import load_data
from kdiga_nb.methods import METHODS, Method
from kdiga_nb.metrics import Measure
from kdiga_nb.models import build_model
from kdiga_nb.training import Callback, History, Schedule, TrainingState, computing, placed, resolve_device, train

log = logging.getLogger("kdiga")

# Raised whenever a change of the code changes what a run gives; it enters every key, so old results are not mixed in.
RESULTS_VERSION = 2
SAVE_SECONDS = 600.0  # how much of a long epoch a kill may cost


@dataclass(frozen=True)
class Run:
    """One training as a value: all that changes its result, and nothing else.

    Attributes:
        teacher: what the method distils from.
        init: where the weights start (None: fresh weights drawn with ``seed``).
        head_dropout: probability of dropping a feature before the last layer while this run trains.
    """

    dataset: str
    model: str
    method: Method
    schedule: Schedule
    seed: int = 0
    head_dropout: float = 0.0
    teacher: "Run | Checkpoint | None" = None
    init: "Run | Checkpoint | None" = None

    def __hash__(self) -> int:
        """Of all fields, taken once: a run hashes its ancestors, and a chain of loops is asked for at every turn."""
        if "hash" not in self.__dict__:
            self.__dict__["hash"] = hash(tuple(getattr(self, item.name) for item in fields(self)))
        return self.__dict__["hash"]

    def __getstate__(self) -> dict[str, Any]:
        """Without the hash: another process hashes strings differently."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


Source = Run | Checkpoint
_NAMES: dict[type, str] = {cls: name for name, cls in [*METHODS.items(), *ATTACKS.items()]}


def describe(value: Any) -> Any:
    """A run, method, attack, schedule or measure as plain JSON; ancestors stand by their key."""
    if is_dataclass(value) and not isinstance(value, type):
        name = _NAMES.get(type(value), type(value).__name__)
        # By its declared type: a weight of 3 and one of 3.0 are the same run.
        values = {item: getattr(value, item.name) for item in fields(value) if item.init}
        # A switch that came after results were published: at its default it changes nothing, so it is not named.
        values = {k: v for k, v in values.items() if not ("unnamed_at_default" in k.metadata and v == k.default)}
        body = {item.name: float(v) if item.type in (float, "float") else _nested(v) for item, v in values.items()}
        return {"type": name} | body
    return _nested(value)


def _nested(value: Any) -> Any:
    if isinstance(value, Run | Checkpoint):
        return run_key(value)
    if is_dataclass(value) and not isinstance(value, type):
        return describe(value)
    return list(value) if isinstance(value, tuple) else value


@cache
def run_key(run: Source) -> str:
    """A hash of everything that changes the run's result, 16 hexadecimal digits.

    A checkpoint enters by its content where the sha256 is given, else by its path; one that is a run's own file in the
    store has the run's key, so that both share what was measured.
    """
    if isinstance(run, Checkpoint):
        home = Path(run.path).parent
        if Path(run.path).name == "model.safetensors" and home.parent == paths.runs():
            return home.name
        identity: Any = {"checkpoint": run.sha256 or run.path, "format": run.format, "model": run.model}
    else:
        identity = describe(run) | {"results_version": RESULTS_VERSION}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def folder(run: Source) -> Path:
    """The run's folder in the store; it need not exist. A checkpoint has one for what was measured on it."""
    return paths.runs() / run_key(run)


def ancestors(runs: Iterable[Source]) -> list[Run]:
    """The runs with everything they stand on, each once, teachers and starting points before those that use them."""
    ordered: dict[Run, None] = {}

    def visit(source: Source | None) -> None:
        if isinstance(source, Run) and source not in ordered:
            visit(source.teacher)
            visit(source.init)
            ordered[source] = None

    for run in runs:
        visit(run)
    return list(ordered)


def is_finished(run: Source) -> bool:
    """Whether the store holds the run's result (its hash is checked when it is loaded). A checkpoint is always one."""
    return isinstance(run, Checkpoint) or (folder(run) / "run.json").exists()


def load_or_train(
    run: Source, *, device: str | torch.device | None = None, callbacks: Sequence[Callback] = ()
) -> nn.Module:
    """The run's net, from the store or freshly trained: eval mode, head dropout off.

    Args:
        run: a ``Run``, or a ``Checkpoint`` whose file is loaded.
        callbacks: see ``training.train``; not called when the store has the run.

    Raises:
        StoreError: the store cannot be written, or a checkpoint cannot be used.
        TrainingError: a term of the loss is not finite.
    """
    where = resolve_device(device)
    if isinstance(run, Checkpoint):
        return placed(checkpoints.load(run), where).eval()
    if distributed.decided(lambda: not is_finished(run) or _set_aside_if_damaged(run)):
        _train_once(run, where, callbacks)
    return placed(_load(run), where).eval()


def load(run: Run, *, device: str | torch.device | None = None) -> nn.Module:
    """The finished run's net, like ``load_or_train``, but nothing is ever trained or set aside.

    Raises:
        StoreError: the store does not have the run, or its files are damaged.
    """
    if not is_finished(run):
        raise StoreError(f"run {run_key(run)} is not in the store")
    reason = damage(run)
    if reason is not None:
        raise StoreError(f"run {run_key(run)} is damaged: {reason}")
    return placed(_load(run), resolve_device(device)).eval()


def training_seconds(run: Source) -> float | None:
    """How long the finished run trained; None if it is not finished."""
    try:
        return float(json.loads((folder(run) / "run.json").read_text())["seconds"])
    except FileNotFoundError:
        return None


def history(run: Run) -> list[dict[str, float]]:
    """The finished run's training curve, one row an epoch."""
    return _read_history(folder(run))


def _read_history(home: Path) -> list[dict[str, float]]:
    with (home / "history.csv").open(newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def stored(key: str) -> Checkpoint:
    """A finished run of the store by its key (or the beginning of it), as a checkpoint.

    Raises:
        StoreError: no finished run, or more than one, has that key.
    """
    homes = [home for home in sorted(paths.runs().glob(f"{key}*/")) if (home / "run.json").exists()]
    if len(homes) != 1:
        raise StoreError(f"{key}: {'no finished run' if not homes else f'{len(homes)} runs'} of the store has that key")
    try:
        record = json.loads((homes[0] / "run.json").read_text())
        name = f"{record['run']['model']}:{record['run']['dataset']}"
        return Checkpoint(str(homes[0] / "model.safetensors"), record["sha256"], "safetensors", name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{key}: run.json is damaged ({error})") from None


def export(key: str, path: Path, checks: Mapping[str, Measure]) -> dict[str, Any]:
    """Write a finished run's weights in half precision to ``path``, and its record beside them (``.json``).

    The record has the net, the file's sha256, the runs it stands on, its training curve, everything that was measured,
    and each of ``checks`` on the weights as trained and as written: what the rounding costs.

    Raises:
        StoreError: no such run, or the files cannot be written.
    """
    if path.suffix != ".safetensors":
        raise StoreError(f"{path}: must end in .safetensors")
    trained = stored(key)
    home = Path(trained.path).parent
    weights = safetensors.torch.load_file(trained.path)
    half = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
    _replace(path, lambda partial: safetensors.torch.save_file(half, partial))
    written = Checkpoint(str(path), digest_of(path), "safetensors", trained.model)
    accuracy = {
        name: {words: measure(net, check) for words, net in (("as trained", trained), ("as written", written))}
        for name, check in checks.items()
    }
    record = {
        "model": trained.model,
        "sha256": written.sha256,
        "precision": "float16",
        "accuracy": accuracy,
        "runs": _records(home.name),
        "history": _read_history(home),
        "measures": _measures(trained),
    }
    _write_json(path.with_suffix(".json"), record)
    return record


def _records(key: str) -> dict[str, Any]:
    """The records of a run and of all it stands on, as far as the store has them."""
    found: dict[str, Any] = {}
    todo = [key]
    while todo:
        name = todo.pop()
        path = paths.runs() / name / "run.json"
        if name not in found and path.exists():
            found[name] = json.loads(path.read_text())
            todo += [parent for kind in ("teacher", "init") if isinstance(parent := found[name]["run"][kind], str)]
    return found


def measure(
    run: Source, measure: Measure, *, reference: Source | None = None, device: str | None = None
) -> dict[str, Any]:
    """What ``measure`` gives on the run, from the store or measured now; ``reference`` is the net it is compared to."""
    name = measure_name(measure, reference)
    cached = _measures(run).get(name)
    if cached is not None:
        return cached
    model = load_or_train(run, device=device)
    other = None if reference is None else load_or_train(reference, device=device)
    tag = hashlib.sha256(name.encode()).hexdigest()[:8]
    partial = folder(run) / f"partial-{tag}.json"
    data = load_data(run.dataset)
    # One lock a measurement, so that two measurements of one run do not wait for each other.
    with _lock(run, tag), computing(data.image_shape, resolve_device(device)):
        cached = _measures(run).get(name)
        if cached is not None:
            return cached
        started = time.perf_counter()
        result = measure(model, data, reference=other, state=partial)
        result["seconds"] = round(time.perf_counter() - started, 3)
        with _lock(run):
            _write_json(folder(run) / "measures.json", _measures(run) | {name: result})
        partial.unlink(missing_ok=True)
    return result


def measured(run: Source, measure: Measure, *, reference: Source | None = None) -> dict[str, Any] | None:
    """What the store has of a measurement; None if it was not taken."""
    return _measures(run).get(measure_name(measure, reference))


def measure_name(measure: Measure, reference: Source | None = None) -> str:
    """The readable name under which a measurement is stored."""
    name = json.dumps(describe(measure), sort_keys=True)
    return name if reference is None else f"{name} against {run_key(reference)}"


# ---- the store's files ----


def check_writable(home: Path) -> None:
    """Make a folder and a file in it, to learn before any work whether that is possible.

    Raises:
        StoreError: it is not.
    """
    probe = home / f".probe-{os.getpid()}"
    try:
        home.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise StoreError(f"the folder {home} cannot be written: {error.strerror or error}") from error


def _lock(run: Source, part: str = "") -> FileLock:
    """The lock of a run, or of a part of it. The operating system drops it when its process dies, however it dies."""
    check_writable(paths.runs())
    return FileLock(paths.runs() / f"{run_key(run)}{part and '-' + part}.lock")


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write under a temporary name, then rename: readers see the old file or the whole new one."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        partial.replace(path)
    except (OSError, safetensors.SafetensorError) as error:
        partial.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or error
        raise StoreError(f"{path.parent.name}/{path.name} cannot be written: {reason}") from error


def _write_json(path: Path, value: Any) -> None:
    _replace(path, lambda partial: partial.write_text(json.dumps(value, indent=1)))


def _measures(run: Source) -> dict[str, Any]:
    path = folder(run) / "measures.json"
    try:
        written = path.stat()
        return _read_measures(path, written.st_ino, written.st_mtime_ns, written.st_size)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError:
        log.warning("run %s: measures.json is damaged; measuring again", run_key(run))
        return {}


@lru_cache(maxsize=256)
def _read_measures(path: Path, *written: int) -> dict[str, Any]:
    """Parsed once and again when it is ``written`` anew: a row asks for each of its cells. Not to be changed."""
    measures = json.loads(path.read_text())
    if not isinstance(measures, dict):
        raise ValueError("not a mapping")
    return measures


def _content(tensors: dict[str, torch.Tensor]) -> str:
    """One sha256 over names and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def damage(run: Run) -> str | None:
    """What is wrong with a finished run's files; None if nothing is."""
    home = folder(run)
    try:
        record = json.loads((home / "run.json").read_text())
        if record["sha256"] != digest_of(home / "model.safetensors"):
            return "the weights do not match their sha256"
        return None if (home / "history.csv").exists() else "history.csv is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"


def _set_aside_if_damaged(run: Run) -> bool:
    """Move a finished run whose files do not fit its record out of the way; True if that happened."""
    if damage(run) is None:
        return False
    home = folder(run)
    with _lock(run):
        # Looked at again under the lock: another process may have set it aside and trained it meanwhile.
        reason = damage(run)
        if reason is None:
            return False
        if not home.exists():
            return True
        aside = home.with_name(f"{home.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
        home.rename(aside)
    log.warning("run %s is damaged (%s); set aside as %s and trained again", home.name, reason, aside.name)
    return True


def _fresh(run: Run) -> nn.Module:
    data = load_data(run.dataset)
    with torch.random.fork_rng():
        torch.manual_seed(run.seed)
        return build_model(
            run.model, num_classes=data.num_classes, image_shape=data.image_shape, head_dropout=run.head_dropout
        )


def _load(run: Run) -> nn.Module:
    model = _fresh(run)
    model.load_state_dict(safetensors.torch.load_file(folder(run) / "model.safetensors"))
    return model


def _train_once(run: Run, device: torch.device, callbacks: Sequence[Callback]) -> None:
    """Train under the run's lock, unless another process has done so while we waited.

    Of several processes that train together the first holds the lock and writes.
    """
    teacher = None if run.teacher is None else load_or_train(run.teacher, device=device)
    writes = distributed.rank() == 0
    with _lock(run) if writes else nullcontext():
        if distributed.decided(lambda: is_finished(run)):
            return
        home = folder(run)
        student = _fresh(run)
        if run.init is not None:
            student.load_state_dict(load_or_train(run.init, device="cpu").state_dict())
        data = load_data(run.dataset)
        started = time.perf_counter()
        resume = _load_training(run)
        before = resume[1]["seconds"] if resume else 0.0
        resumed = 1 + resume[1].get("resumed", 0) if resume else 0

        def save(state: TrainingState) -> None:
            if writes and state.epoch < state.epochs:
                seconds = before + time.perf_counter() - started
                record = state.record() | {"seconds": seconds, "resumed": resumed, "run": describe(run)}
                record |= {"steps": -(-_examples(run) // run.schedule.batch_size)}
                tensors = state.tensors()
                metadata = {"record": json.dumps(record), "sha256": _content(tensors)}
                path = home / "checkpoint.safetensors"
                _replace(path, lambda partial: safetensors.torch.save_file(tensors, partial, metadata))

        curve = train(
            student,
            run.method,
            data,
            run.schedule,
            teacher=teacher,
            seed=run.seed,
            device=device,
            callbacks=callbacks if writes else (),
            resume=resume,
            save=save,
            save_seconds=SAVE_SECONDS,
        )
        distributed.decided(
            lambda: _write_result(run, student, curve, device, before + time.perf_counter() - started, resumed)
        )


def _examples(run: Run) -> int:
    """How many examples an epoch of the run shows."""
    n = len(load_data(run.dataset).fitting.labels)
    return min(n, run.schedule.images) if run.schedule.images else n


def _write_result(
    run: Run, student: nn.Module, curve: History, device: torch.device, seconds: float, resumed: int
) -> None:
    home = folder(run)
    weights = {name: value.cpu().contiguous() for name, value in student.state_dict().items()}
    _replace(home / "model.safetensors", lambda partial: safetensors.torch.save_file(weights, partial))
    _replace(home / "history.csv", lambda partial: _write_history(partial, curve.rows))
    record = {
        "key": run_key(run),
        "run": describe(run),
        "sha256": digest_of(home / "model.safetensors"),
        "selected_epoch": curve.selected_epoch,
        "parameters": sum(parameter.numel() for parameter in student.parameters()),
        "seconds": round(seconds, 3),
        "resumed": resumed,
        "processes": distributed.world_size(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "environment": environment(device),
    }
    _write_json(home / "run.json", record)
    (home / "checkpoint.safetensors").unlink(missing_ok=True)


def _load_training(run: Run) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    path = folder(run) / "checkpoint.safetensors"
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            record = json.loads(file.metadata()["record"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            if _content(tensors) != file.metadata()["sha256"]:
                raise ValueError("its tensors do not match their sha256")
            return tensors, record
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        log.warning("run %s: its checkpoint cannot be read (%s); training from the start", run_key(run), error)
        return None


def _write_history(path: Path, rows: list[dict[str, float]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def environment(device: torch.device | None = None) -> dict[str, str]:
    """Versions and hardware, for the record."""
    where = device or resolve_device()
    gpu = torch.cuda.get_device_name(where) if where.type == "cuda" else ""
    return {
        "kdiga_nb": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": gpu or f"CPU ({platform.machine()}, {os.cpu_count()} cores)",
    }


# ---- many runs ----


@dataclass(frozen=True)
class Job:
    """One piece of work of the run graph: a training, or a measurement on a trained run."""

    run: Source
    measure: Measure | None = None
    reference: Source | None = None

    def is_done(self) -> bool:
        """Whether the store already has the result."""
        if self.measure is None:
            return is_finished(self.run)
        return measured(self.run, self.measure, reference=self.reference) is not None

    def needs(self) -> list[Run]:
        """The runs that must be finished before."""
        if self.measure is None:
            parents = (self.run.teacher, self.run.init) if isinstance(self.run, Run) else ()
            return [source for source in parents if isinstance(source, Run)]
        return [source for source in (self.run, self.reference) if isinstance(source, Run)]


@dataclass
class Outcome:
    """What became of a list of jobs: how many were made and found, and the reason of each that failed."""

    made: int = 0
    cached: int = 0
    failed: dict[Job, str] = field(default_factory=dict)

    @property
    def causes(self) -> list[str]:
        """Why jobs failed, each reason once; not what failed because of them."""
        return sorted({reason for reason in self.failed.values() if not reason.startswith("needs ")})


def do(job: Job, device: str | None = None, callbacks: Sequence[Callback] = ()) -> None:
    """Do one job in this process; its result goes to the store."""
    if job.measure is None:
        load_or_train(job.run, device=device, callbacks=callbacks)
    else:
        measure(job.run, job.measure, reference=job.reference, device=device)


Progress = Callable[[int, int, str], None]


def run_all(
    jobs: Iterable[Job],
    *,
    workers: int | None = None,
    device: str | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Do the jobs and everything they stand on, independent ones at the same time.

    A job that fails takes those that stand on it with it, and no others.

    Args:
        workers: local processes (default: one a core); 1 works in this process.
        executor: where to send jobs instead (any ``concurrent.futures`` executor whose workers see the same store).
        progress: called every second or so with (jobs done, jobs to do, what is being done).
    """
    graph = graph_of(jobs)
    todo = distributed.decided(lambda: [job for job in graph if not job.is_done()])
    outcome = Outcome(cached=len(graph) - len(todo))
    if not todo:
        return outcome
    check_writable(paths.runs())
    workers = workers or default_workers(device)
    if executor is not None:
        places = {"KDIGA_RUNS": str(paths.runs().absolute()), "KDIGA_DATA": str(paths.data().absolute())}
        _schedule(todo, executor, partial(_do_elsewhere, places), device, outcome, progress)
    elif workers == 1 or len(todo) == 1 or distributed.world_size() > 1:
        _in_turn(todo, device, outcome, progress)
    else:
        # spawn: a forked child would inherit torch's threads in whatever state they are.
        context = get_context("spawn")
        processes = min(workers, len(todo))
        threads = max(1, (os.cpu_count() or 1) // processes)
        with ProcessPoolExecutor(processes, context, _begin_worker, (context.Value("i", 0), threads)) as pool:
            try:
                _schedule(todo, pool, do, device, outcome, progress)
            except KeyboardInterrupt:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return outcome


def graph_of(jobs: Iterable[Job]) -> list[Job]:
    """The jobs and everything they stand on: trainings in an order they can be done in, then measurements."""
    wanted = list(jobs)
    graph = [Job(run) for run in ancestors([run for job in wanted for run in [job.run, *job.needs()]])]
    return graph + [job for job in dict.fromkeys(wanted) if job.measure is not None]


def default_workers(device: str | None = None) -> int:
    """Local processes that make sense: one a GPU, or one a core."""
    return max(1, torch.cuda.device_count()) if resolve_device(device).type == "cuda" else os.cpu_count() or 1


def _do_elsewhere(places: dict[str, str], job: Job, device: str | None) -> None:
    """``do`` on another machine, with the store and the data of this one."""
    os.environ.update(places)
    do(job, device)


def _begin_worker(number: Any, threads: int) -> None:
    """In a worker: take the next GPU and a share of the cores, and stop with the parent."""
    torch.set_num_threads(threads)  # each process would take all cores, and they would wait for each other
    with number.get_lock():
        mine, number.value = number.value, number.value + 1
    if torch.cuda.is_available():
        torch.cuda.set_device(mine % torch.cuda.device_count())
    end_with_parent()


def end_with_parent() -> None:
    """In a worker: stop as soon as the parent is gone, however it went; an orphan would train on unseen."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _blocked(job: Job, outcome: Outcome) -> str | None:
    failed_runs = {failed.run for failed in outcome.failed if failed.measure is None}
    return next((f"needs {run_key(run)}, which failed" for run in job.needs() if run in failed_runs), None)


def _note(job: Job, error: BaseException | None, outcome: Outcome, progress: Progress | None, total: int) -> None:
    if error is None:
        outcome.made += 1
    else:
        outcome.failed[job] = str(error).splitlines()[0] if str(error) else type(error).__name__
        log.error("%s failed: %s", title(job), outcome.failed[job])
    if progress is not None:
        progress(outcome.made + len(outcome.failed), total, title(job))


def _in_turn(todo: list[Job], device: str | None, outcome: Outcome, progress: Progress | None) -> None:
    for job in todo:
        reason = _blocked(job, outcome)
        error: Exception | None = StoreError(reason) if reason else None
        if error is None:
            try:
                do(job, device, [_report_epochs(job, outcome, progress, len(todo))])
            except Exception as raised:  # reported by name at the end; the other jobs go on
                if distributed.world_size() > 1:
                    raise  # alone, this process would wait for the others for ever
                error = raised
        _note(job, error, outcome, progress, len(todo))


def _schedule(
    todo: list[Job],
    executor: Executor,
    work: Callable[[Job, str | None], None],
    device: str | None,
    outcome: Outcome,
    progress: Progress | None,
) -> None:
    """Keep the executor fed with jobs whose needs are met."""
    waiting = list(todo)
    running: dict[Future[None], Job] = {}
    while waiting or running:
        open_runs = {job.run for job in [*waiting, *running.values()] if job.measure is None}
        for job in list(waiting):
            if reason := _blocked(job, outcome):
                waiting.remove(job)
                _note(job, StoreError(reason), outcome, progress, len(todo))
            elif not any(run in open_runs for run in job.needs()):
                waiting.remove(job)
                running[executor.submit(work, job, device)] = job
        if running:
            for future in wait(running, timeout=1, return_when=FIRST_COMPLETED).done:
                job, error = running.pop(future), future.exception()
                if error is None and not job.is_done():
                    error = StoreError(
                        f"done, but its result is not in {paths.runs()}: do the workers share that folder?"
                    )
                _note(job, error, outcome, progress, len(todo))
            if progress is not None:
                now = [text for job in running.values() if (text := _underway(job)) is not None]
                progress(outcome.made + len(outcome.failed), len(todo), "; ".join(now))


def _report_epochs(job: Job, outcome: Outcome, progress: Progress | None, total: int) -> Callback:
    def report(state: TrainingState) -> None:
        if progress is not None:
            done = outcome.made + len(outcome.failed)
            progress(done, total, f"{title(job)}, epoch {state.epoch}/{state.epochs}")

    return report


def _underway(job: Job) -> str | None:
    """What a job in another process is at, read from the store; None if it has not begun to write."""
    if job.measure is not None or isinstance(job.run, Checkpoint):
        return None
    epoch = epochs_done(job.run)
    return f"{title(job)}, epoch {epoch}/{job.run.schedule.epochs}" if epoch else None


def epochs_done(run: Run) -> int:
    """How many epochs of an unfinished run are in its checkpoint."""
    record = _unfinished(folder(run))
    return 0 if record is None else int(record["epoch"])


def title(job: Job) -> str:
    """A job in a few words, for progress lines."""
    run = job.run
    if isinstance(run, Checkpoint):
        return f"measure {run.model}, {run.format} file"
    name = f"{_NAMES[type(run.method)]} {run.model} on {run.dataset}, seed {run.seed}"
    return f"train {name}" if job.measure is None else f"measure {name}"


def list_store() -> list[dict[str, Any]]:
    """What the store holds, newest first.

    Key, state (finished, epoch e of E, damaged), what it is, epochs, seconds; in per cent of the last epoch the clean
    accuracy on the validation images and the robust one that epochs are selected by; the seconds left to the end (None
    where they are not known).
    """
    entries = []
    for home in sorted(paths.runs().glob("*/"), key=lambda path: -path.stat().st_mtime):
        try:
            record = json.loads((home / "run.json").read_text())
            run = record["run"]
            state, epochs, seconds, left = "finished", run["schedule"]["epochs"], record["seconds"], 0.0
            rows = _read_history(home)
        except FileNotFoundError:
            record = _unfinished(home)
            if record is None:
                continue
            run, epochs, seconds, rows = record["run"], record["epoch"], round(record["seconds"], 1), record["rows"]
            state, left = _progress(record)
        except (OSError, ValueError, KeyError, TypeError) as error:
            entries.append({"key": home.name, "state": f"damaged ({error})", "what": "", "epochs": 0, "seconds": 0})
            continue
        if ".damaged-" in home.name:
            state = "set aside as damaged"
        what = f"{run['method']['type']} {run['model']} on {run['dataset']}, seed {run['seed']}"
        last = rows[-1] if rows else {}
        entry = {"key": home.name, "state": state, "what": what, "epochs": epochs, "seconds": seconds}
        entry |= {
            "accuracy": last.get("validation_clean"),
            "robust": last.get("selection_robust"),
            "seconds_left": left,
        }
        entries.append(entry | {"run": run})
    return entries


def _progress(record: dict[str, Any]) -> tuple[str, float | None]:
    """The state of an unfinished training in words, and the seconds left at the pace so far."""
    total, done = record["run"]["schedule"]["epochs"], record["epoch"]
    inside = record.get("step", 0) / record["steps"] if record.get("steps") else 0.0
    state = f"epoch {done} of {total}" + (f" and {100 * inside:.0f} %" if inside else "")
    share = (done + inside) / total
    return state, round(record["seconds"] * (1 - share) / share, 1) if share else None


def _unfinished(home: Path) -> dict[str, Any] | None:
    try:
        return json.loads(_metadata(home / "checkpoint.safetensors")["record"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, which may be gone at any moment: its training goes on meanwhile.

    The format opens with the length of a JSON header, eight bytes, little endian. The library opens the file a second
    time, and answers one that vanished in between with a bare RuntimeError.

    Raises:
        OSError, ValueError, KeyError: there is no such file, or it is none of that kind.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > os.fstat(file.fileno()).st_size:
            raise ValueError("not a safetensors file")
        return json.loads(file.read(length))["__metadata__"]
