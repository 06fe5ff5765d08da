"""A run is a value, and training is a cached function of it.

``run`` holds the value and its key, ``store`` the cached results, ``listing`` the list of the store and the export,
``graph`` many runs at once, ``checkpoints`` weights from outside the store.
"""

from kdiga_nb.runs.checkpoints import Checkpoint, StoreError
from kdiga_nb.runs.graph import Job, Outcome, Progress, default_workers, do, end_with_parent, graph_of, run_all, title
from kdiga_nb.runs.listing import epochs_done, export, list_store, stored
from kdiga_nb.runs.run import RESULTS_VERSION, Run, Source, ancestors, describe, folder, measure_name, run_key
from kdiga_nb.runs.store import (
    SAVE_SECONDS,
    check_writable,
    damage,
    environment,
    history,
    is_finished,
    load,
    load_or_train,
    measure,
    measured,
    training_seconds,
)

__all__ = [
    "RESULTS_VERSION",
    "SAVE_SECONDS",
    "Checkpoint",
    "Job",
    "Outcome",
    "Progress",
    "Run",
    "Source",
    "StoreError",
    "ancestors",
    "check_writable",
    "damage",
    "default_workers",
    "describe",
    "do",
    "end_with_parent",
    "environment",
    "epochs_done",
    "export",
    "folder",
    "graph_of",
    "history",
    "is_finished",
    "list_store",
    "load",
    "load_or_train",
    "measure",
    "measure_name",
    "measured",
    "run_all",
    "run_key",
    "stored",
    "title",
    "training_seconds",
]
