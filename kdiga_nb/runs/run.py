"""``Run`` as a value, its key, and its place in the store."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from kdiga_nb import paths
from kdiga_nb.attacks import ATTACKS
from kdiga_nb.measures import Measure
from kdiga_nb.methods import METHODS, Method
from kdiga_nb.runs.checkpoints import Checkpoint
from kdiga_nb.training import Schedule

# Part of every key. Raise it when a change of the code changes a run's result, so that old results are not reused.
RESULTS_VERSION = 2


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
        """Cached: hashing a run hashes its whole ancestry."""
        if "hash" not in self.__dict__:
            self.__dict__["hash"] = hash(tuple(getattr(self, item.name) for item in fields(self)))
        return self.__dict__["hash"]

    def __getstate__(self) -> dict[str, Any]:
        """Without the hash: another process hashes strings differently."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


Source = Run | Checkpoint
_NAMES: dict[type, str] = {cls: name for name, cls in [*METHODS.items(), *ATTACKS.items()]}


def describe(value: Any) -> Any:
    """A run, method, attack, schedule or measure as plain JSON; ancestors appear as their keys."""
    if is_dataclass(value) and not isinstance(value, type):
        name = _NAMES.get(type(value), type(value).__name__)
        values = {item: getattr(value, item.name) for item in fields(value) if item.init}
        # "unnamed" fields change no result. "unnamed_at_default" fields came after results were published: leaving them
        # out at their default keeps the old keys valid.
        values = {k: v for k, v in values.items() if "unnamed" not in k.metadata}
        values = {k: v for k, v in values.items() if not ("unnamed_at_default" in k.metadata and v == k.default)}
        # The declared type decides: a weight of 3 and one of 3.0 are the same run.
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

    The key of a checkpoint hashes its sha256 where one is given, else its path. A checkpoint that is a run's own file
    in the store has the run's key, so that both share their measurements.
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
    """The run's folder in the store, which need not exist. A checkpoint's folder holds its measurements."""
    return paths.runs() / run_key(run)


def ancestors(runs: Iterable[Source]) -> list[Run]:
    """The runs and all their teachers and starting points, each once, every run after the runs that it depends on."""
    ordered: dict[Run, None] = {}

    def visit(source: Source | None) -> None:
        if isinstance(source, Run) and source not in ordered:
            visit(source.teacher)
            visit(source.init)
            ordered[source] = None

    for run in runs:
        visit(run)
    return list(ordered)


def measure_name(measure: Measure, reference: Source | None = None) -> str:
    """The readable name under which a measurement is stored."""
    name = json.dumps(describe(measure), sort_keys=True)
    return name if reference is None else f"{name} against {run_key(reference)}"
