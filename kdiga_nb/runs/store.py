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
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
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
from kdiga_nb.numerics.scopes import computing, placed, resolve_device
from kdiga_nb.runs import checkpoints
from kdiga_nb.runs.checkpoints import Checkpoint, StoreError, digest_of
from kdiga_nb.runs.run import Run, Source, describe, folder, measure_name, run_key
from kdiga_nb.training import Callback, History, TrainingState, train

log = logging.getLogger("kdiga")
SAVE_SECONDS = 600.0  # how much of a long epoch a kill may cost


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
    if distributed.broadcast_from_rank0(lambda: not is_finished(run) or _set_aside_if_damaged(run)):
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
    with _lock(run, tag), computing(resolve_device(device), single_thread=data.single_thread):
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
        distributed.broadcast_from_rank0(
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


def epochs_done(run: Run) -> int:
    """How many epochs of an unfinished run are in its checkpoint."""
    record = _unfinished(folder(run))
    return 0 if record is None else int(record["epoch"])


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
