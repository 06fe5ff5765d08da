"""The run store: results of trainings and measurements, cached under the run's key.

``load_or_train`` loads a run from the store or trains it; ``measure`` does the same for measurements:

    runs/<key>/run.json                the record: the run, sha256 of the weights, versions, seconds
    runs/<key>/model.safetensors       the weights
    runs/<key>/history.csv             one row per epoch
    runs/<key>/measures.json           results of measurements, by readable name
    runs/<key>/checkpoint.safetensors  the state of an unfinished training, at most ten minutes old

Every file is written under a temporary name and renamed, so a kill at any moment leaves whole files. ``run.json`` is
written last and marks the run as finished. A file lock per key makes a second process wait while the first one trains.
Weights with a wrong hash are moved to ``<key>.damaged-…`` and trained again. Nothing is ever unpickled.
"""

import csv
import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from filelock import FileLock
from torch import nn

from kdiga_nb import __version__, paths
from kdiga_nb.data import load_data
from kdiga_nb.measures import Measure
from kdiga_nb.models import build_model
from kdiga_nb.numerics import distributed
from kdiga_nb.numerics.files import content_hash, replace_file
from kdiga_nb.numerics.scopes import computing, placed, resolve_device, restored_generators
from kdiga_nb.runs import checkpoints
from kdiga_nb.runs.checkpoints import Checkpoint, StoreError, digest_of
from kdiga_nb.runs.run import Run, Source, describe, folder, measure_name, run_key
from kdiga_nb.training import Callback, History, TrainingState, computed_in, train

log = logging.getLogger("kdiga")
SAVE_SECONDS = 600.0  # seconds between checkpoints: what a kill may cost


def is_finished(run: Source) -> bool:
    """Whether the store holds the run's result (``load_or_train`` checks its hash). A checkpoint is always finished."""
    return isinstance(run, Checkpoint) or (folder(run) / "run.json").exists()


def is_published(run: Source) -> bool:
    """Whether the store's result came from ``kdiga store pull`` and was not trained here."""
    return pulled_from(folder(run)) is not None


def pulled_from(home: Path) -> str | None:
    """The scale that a folder of the store was pulled from; None if it was trained here or has no readable record."""
    try:
        return json.loads((home / "run.json").read_text()).get("published")
    except (OSError, ValueError):
        return None


def load_or_train(
    run: Source, *, device: str | torch.device | None = None, callbacks: Sequence[Callback] = ()
) -> nn.Module:
    """The run's net, loaded from the store or trained now, in eval mode and without head dropout.

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
    if distributed.broadcast_from_rank0(lambda: not is_finished(run) or _set_aside_if_damaged(run)):
        _train_once(run, where, callbacks)
    return placed(_load(run), where).eval()


def load(run: Run, *, device: str | torch.device | None = None) -> nn.Module:
    """The finished run's net, like ``load_or_train``, but it never trains and never sets anything aside.

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
    """The finished run's training curve, one row per epoch."""
    return read_history(folder(run))


def read_history(home: Path) -> list[dict[str, float]]:
    """``history`` of the run whose folder this is."""
    with (home / "history.csv").open(newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def measure(
    run: Source, measure: Measure, *, reference: Source | None = None, device: str | None = None
) -> dict[str, Any]:
    """The result of ``measure`` on the run, stored or measured now; ``reference`` is the net it is compared to."""
    name = measure_name(measure, reference)
    cached = measured(run, measure, reference=reference)
    if cached is not None:
        return cached
    model = load_or_train(run, device=device)
    other = None if reference is None else load_or_train(reference, device=device)
    tag = _tag(name)
    partial = _partial(run, name)
    data = load_data(run.dataset)
    # One lock per measurement, so that two measurements of one run do not wait for each other.
    with _lock(run, tag), computing(resolve_device(device), single_thread=data.single_thread):
        cached = measured(run, measure, reference=reference)
        if cached is not None:
            return cached
        started = time.perf_counter()
        result = measure(model, data, reference=other, state=partial)
        result["seconds"] = round(time.perf_counter() - started, 3)
        with _lock(run):
            write_json(folder(run) / "measures.json", measures_of(run) | {name: result})
        partial.unlink(missing_ok=True)
    return result


def _tag(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:8]


def _partial(run: Source, name: str) -> Path:
    """The file that a measurement under way keeps its state in."""
    return folder(run) / f"partial-{_tag(name)}.json"


def members_done(run: Source, measure: Measure) -> list[tuple[str, int, int]]:
    """An AutoAttack under way: its finished members, "clean" first, each with the images left and their number."""
    try:
        survivors = json.loads(_partial(run, measure_name(measure, None)).read_text())["survivors"]
    except FileNotFoundError:
        return []
    return [(member, sum(mask), len(mask)) for member, mask in survivors.items()]


def measured(run: Source, measure: Measure, *, reference: Source | None = None) -> dict[str, Any] | None:
    """The stored result of a measurement; None if there is none that ``measure.accepts``."""
    result = measures_of(run).get(measure_name(measure, reference))
    return result if result is not None and measure.accepts(result) else None


def halve_weights(run: Run) -> None:
    """Store a finished run's weights as float16, half the size; what is measured and taught later is the rounded net.

    Statistics of batch normalisation stay in float32. Half precision has 11 significant bits: a weight changes by at
    most 1 part in 2,000.

    Raises:
        StoreError: a weight is too large for float16.
    """
    home = folder(run)
    with _lock(run):
        record = json.loads((home / "run.json").read_text())
        if record.get("weights") == "float16":
            return
        half = checkpoints.rounded(safetensors.torch.load_file(home / "model.safetensors"), f"run {run_key(run)}")
        write_file(home / "model.safetensors", lambda partial: safetensors.torch.save_file(half, partial))
        record |= {"weights": "float16", "sha256": digest_of(home / "model.safetensors")}
        write_json(home / "run.json", record)


def check_writable(home: Path) -> None:
    """Check that a folder can be created and written, before any work is done.

    Raises:
        StoreError: the folder cannot be written.
    """
    probe = home / f".probe-{os.getpid()}"
    try:
        home.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise StoreError(f"the folder {home} cannot be written: {error.strerror or error}") from error


def _lock(run: Source, part: str = "") -> FileLock:
    """The lock of a run, or of a part of the run. The operating system releases the lock when its process dies."""
    check_writable(paths.runs())
    return FileLock(paths.runs() / f"{run_key(run)}{part and '-' + part}.lock")


def write_file(path: Path, write: Callable[[Path], Any]) -> None:
    """``replace_file``; a failure becomes a StoreError that names the file."""
    try:
        replace_file(path, write)
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StoreError(f"{path.parent.name}/{path.name} cannot be written: {reason}") from error


def write_json(path: Path, value: Any) -> None:
    """A value as a JSON file, written like ``write_file``."""
    write_file(path, lambda partial: partial.write_text(json.dumps(value, indent=1)))


def measures_of(run: Source) -> dict[str, Any]:
    """All stored results of the run, by ``measure_name``."""
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
    """Cached until the file changes (``written``), because a table reads the file once per cell."""
    measures = json.loads(path.read_text())
    if not isinstance(measures, dict):
        raise ValueError("not a mapping")
    return measures


NO_WEIGHTS = "its weights are not among the published ones"


def lacks_weights(run: Run) -> bool:
    """Whether the run was pulled without its weights: its results are there, its net is not."""
    return is_published(run) and not (folder(run) / "model.safetensors").exists()


def damage(run: Run) -> str | None:
    """What is wrong with a finished run's files; None if nothing is."""
    home = folder(run)
    try:
        record = json.loads((home / "run.json").read_text())
        if lacks_weights(run):
            return NO_WEIGHTS
        if record["sha256"] != digest_of(home / "model.safetensors"):
            return "the weights do not match their sha256"
        return None if (home / "history.csv").exists() else "history.csv is missing"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError):
        return "run.json or the weights cannot be read"


def _set_aside_if_damaged(run: Run) -> bool:
    """Move a finished run whose files do not match its record out of the way; True if it was moved."""
    if damage(run) is None:
        return False
    home = folder(run)
    with _lock(run):
        # Checked again under the lock: another process may have set the run aside and trained it meanwhile.
        reason = damage(run)
        if reason is None:
            return False
        if not home.exists():
            return True
        aside = home.with_name(f"{home.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
        home.rename(aside)
    what = "was published without its weights" if reason == NO_WEIGHTS else f"is damaged ({reason})"
    log.warning("run %s %s; set aside as %s and trained again", home.name, what, aside.name)
    return True


def _fresh(run: Run) -> nn.Module:
    data = load_data(run.dataset)
    with restored_generators():
        torch.manual_seed(run.seed)
        return build_model(
            run.model, num_classes=data.num_classes, image_shape=data.image_shape, head_dropout=run.head_dropout
        )


def _load(run: Run) -> nn.Module:
    model = _fresh(run)
    model.load_state_dict(safetensors.torch.load_file(folder(run) / "model.safetensors"))
    return model


def _train_once(run: Run, device: torch.device, callbacks: Sequence[Callback]) -> None:
    """Train under the run's lock, unless another process finished the run while this one waited.

    In a process group, rank 0 alone holds the lock and writes.
    """
    teacher = None if run.teacher is None else load_or_train(run.teacher, device=device)
    writes = distributed.rank() == 0
    with _lock(run) if writes else nullcontext():
        if distributed.broadcast_from_rank0(lambda: is_finished(run)):
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
                metadata = {"record": json.dumps(record), "sha256": content_hash(tensors)}
                path = home / "checkpoint.safetensors"
                write_file(path, lambda partial: safetensors.torch.save_file(tensors, partial, metadata))

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
        distributed.broadcast_from_rank0(
            lambda: _write_result(run, student, curve, device, before + time.perf_counter() - started, resumed)
        )


def _examples(run: Run) -> int:
    """The number of examples per epoch of the run."""
    n = len(load_data(run.dataset).fitting.labels)
    return min(n, run.schedule.images) if run.schedule.images else n


def _write_result(
    run: Run, student: nn.Module, curve: History, device: torch.device, seconds: float, resumed: int
) -> None:
    home = folder(run)
    weights = {name: value.cpu().contiguous() for name, value in student.state_dict().items()}
    write_file(home / "model.safetensors", lambda partial: safetensors.torch.save_file(weights, partial))
    write_file(home / "history.csv", lambda partial: _write_history(partial, curve.rows))
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
        "computed_in": computed_in(run.schedule, device),
        "environment": environment(device),
    }
    write_json(home / "run.json", record)
    (home / "checkpoint.safetensors").unlink(missing_ok=True)


def _load_training(run: Run) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    path = folder(run) / "checkpoint.safetensors"
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            record = json.loads(file.metadata()["record"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            if content_hash(tensors) != file.metadata()["sha256"]:
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
