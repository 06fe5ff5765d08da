"""What the store holds: its list (``kdiga runs``), unfinished trainings, and the export of a finished run."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch

from kdiga_nb import paths
from kdiga_nb.measures import Measure
from kdiga_nb.runs.checkpoints import Checkpoint, StoreError, digest_of, rounded
from kdiga_nb.runs.run import Run, folder
from kdiga_nb.runs.store import is_finished, measure, measures_of, read_history, write_file, write_json


def stored(key: str) -> Checkpoint:
    """A finished run of the store by its key (or the beginning of it), as a checkpoint.

    Raises:
        StoreError: no finished run, or more than one, has that key.
    """
    homes = [home for home in sorted(paths.runs().glob(f"{key}*/")) if (home / "run.json").exists()]
    if len(homes) != 1:
        raise StoreError(f"{key}: {'no finished run' if not homes else f'{len(homes)} runs'} of the store has that key")
    return net_in(homes[0])


def net_in(home: Path) -> Checkpoint:
    """The net of a finished run by its folder, in the store or below ``published/``, as a checkpoint.

    Raises:
        StoreError: the folder has no record of a run, or no weights.
    """
    weights = home / "model.safetensors"
    try:
        record = json.loads((home / "run.json").read_text())
        name = f"{record['run']['model']}:{record['run']['dataset']}"
        net = Checkpoint(str(weights), record["sha256"], "safetensors", name)
    except FileNotFoundError:
        raise StoreError(f"{home}: not the folder of a finished run, for there is no run.json") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{home}: run.json is damaged ({error})") from None
    if not weights.exists():
        raise StoreError(f"{home}: this run has no weights; it came without them, and must be trained to be used")
    return net


def export(key: str, path: Path, checks: Mapping[str, Measure]) -> dict[str, Any]:
    """Write a finished run's weights in half precision to ``path``, and its record next to them (``.json``).

    The record has the net, the file's sha256, the runs that the net depends on, the training curve, all measurements,
    and each of ``checks`` on the weights as trained and as written, which shows the effect of the rounding.

    Raises:
        StoreError: no such run, or the files cannot be written.
    """
    if path.suffix != ".safetensors":
        raise StoreError(f"{path}: must end in .safetensors")
    trained = stored(key)
    home = Path(trained.path).parent
    weights = safetensors.torch.load_file(trained.path)
    half = rounded(weights, f"run {key}")
    write_file(path, lambda partial: safetensors.torch.save_file(half, partial))
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
        "history": read_history(home),
        "measures": measures_of(trained),
    }
    write_json(path.with_suffix(".json"), record)
    return record


def _records(key: str) -> dict[str, Any]:
    """The records of a run and of all runs that it depends on, as far as the store has them."""
    records: dict[str, Any] = {}
    todo = [key]
    while todo:
        name = todo.pop()
        path = paths.runs() / name / "run.json"
        if name not in records and path.exists():
            records[name] = json.loads(path.read_text())
            todo += [parent for kind in ("teacher", "init") if isinstance(parent := records[name]["run"][kind], str)]
    return records


def epochs_done(run: Run) -> int:
    """The number of epochs in the checkpoint of an unfinished run."""
    record = _unfinished(folder(run))
    return 0 if record is None else int(record["epoch"])


def history_so_far(run: Run) -> list[dict[str, float]]:
    """The training curve, one row per epoch; of an unfinished run, up to its last checkpoint."""
    if is_finished(run):
        return read_history(folder(run))
    record = _unfinished(folder(run))
    return [] if record is None else record["rows"]


def list_store() -> list[dict[str, Any]]:
    """One entry per run of the store, newest first.

    Key, state (finished, published, epoch e of E, damaged), what the run is, epochs, seconds; the last epoch's clean
    accuracy on the validation images and the robust accuracy that epochs are selected by, in per cent; the seconds left
    to the end (None where unknown).
    """
    homes = sorted(paths.runs().glob("*/"), key=lambda path: -path.stat().st_mtime)
    return [entry for home in homes if (entry := _entry(home)) is not None]


def _entry(home: Path) -> dict[str, Any] | None:
    """The entry of one folder of the store; None if it holds neither a result nor a checkpoint."""
    try:
        record = json.loads((home / "run.json").read_text())
        run = record["run"]
        state = "published" if "published" in record else "finished"
        epochs, seconds, left = run["schedule"]["epochs"], record["seconds"], 0.0
        rows = read_history(home)
    except FileNotFoundError:
        record = _unfinished(home)
        if record is None:
            return None
        run, epochs, seconds, rows = record["run"], record["epoch"], round(record["seconds"], 1), record["rows"]
        state, left = _progress(record)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return {"key": home.name, "state": f"damaged ({error})", "what": "", "epochs": 0, "seconds": 0}
    last = rows[-1] if rows else {}
    return {
        "key": home.name,
        "state": "set aside as damaged" if ".damaged-" in home.name else state,
        "what": f"{run['method']['type']} {run['model']} on {run['dataset']}, seed {run['seed']}",
        "epochs": epochs,
        "seconds": seconds,
        "accuracy": last.get("validation_clean"),
        "robust": last.get("selection_robust"),
        "seconds_left": left,
        "run": run,
    }


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
    """The metadata of a safetensors file, which a running training may delete at any moment.

    The format starts with the length of a JSON header, eight bytes, little endian. safetensors itself would open the
    file twice, and raises a bare RuntimeError if the file vanishes in between.

    Raises:
        OSError, ValueError, KeyError: the file is missing or not a safetensors file.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > os.fstat(file.fileno()).st_size:
            raise ValueError("not a safetensors file")
        return json.loads(file.read(length))["__metadata__"]
