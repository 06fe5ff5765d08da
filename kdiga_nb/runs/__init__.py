"""A run is a value, and training is a cached function of it.

``run`` holds the value and its key, ``store`` the cached results, ``listing`` the list of the store and the export,
``graph`` many runs at once, ``checkpoints`` weights from outside the store.
"""

from kdiga_nb.runs.checkpoints import Checkpoint, StoreError
from kdiga_nb.runs.graph import Job, Outcome, Progress, default_workers, do, end_with_parent, graph_of, run_all, title
from kdiga_nb.runs.listing import epochs_done, export, history_so_far, list_store, stored
from kdiga_nb.runs.run import RESULTS_VERSION, Run, Source, ancestors, describe, folder, measure_name, run_key
from kdiga_nb.runs.store import (
    SAVE_SECONDS,
    check_writable,
    damage,
    environment,
    history,
    is_finished,
    lacks_weights,
    load,
    load_or_train,
    measure,
    measured,
    training_seconds,
)
