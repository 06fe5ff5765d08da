"""Every location the kit reads or writes, derived from the package or from an environment variable.

Nothing else in the kit spells a folder: papermill runs a notebook in the caller's directory, nbval in the notebook's,
so a path relative to the working directory would mean two places.
"""

import os
from pathlib import Path

import platformdirs

PACKAGE = Path(__file__).resolve().parent
# The repository, where the package is used from one (also installed as editable); None in an installed wheel.
CHECKOUT = PACKAGE.parent if (PACKAGE.parent / "params").is_dir() and (PACKAGE.parent / "notebooks").is_dir() else None
ROOT = CHECKOUT or PACKAGE / "kit"  # what the kit brings: notebooks, parameters, published results
NOTEBOOKS = ROOT / "notebooks"
PARAMS = ROOT / "params"


def home() -> Path:
    """Where runs, figures and data go: ``$KDIGA_HOME``, else the checkout, else the user's data folder.

    It is not the working directory, which differs between a command, a notebook and a worker of one reproduction.
    """
    chosen = os.environ.get("KDIGA_HOME")
    return Path(chosen) if chosen else CHECKOUT or platformdirs.user_data_path("kdiga", appauthor=False)


def runs() -> Path:
    """The run store: ``$KDIGA_RUNS``, else ``runs/`` in ``home()``."""
    return Path(os.environ.get("KDIGA_RUNS") or home() / "runs")


def figures(scale: str) -> Path:
    """Where a run writes a scale's artefacts: ``$KDIGA_FIGURES/<scale>``, else ``figures/<scale>`` in ``home()``."""
    return Path(os.environ.get("KDIGA_FIGURES") or home() / "figures") / scale


def published(scale: str) -> Path:
    """The results of a scale that the kit publishes. No run writes here; ``make publish`` does."""
    return ROOT / "published" / scale


def claims() -> Path:
    """The ledger of claims."""
    return ROOT / "published" / "claims.yaml"


def executed(scale: str) -> Path:
    """Where ``kdiga reproduce`` leaves the executed notebooks of a scale."""
    return figures(scale) / "notebooks"


def data() -> Path:
    """Root of the torchvision data sets: ``$KDIGA_DATA``, else ``data/`` in ``home()``."""
    return Path(os.environ.get("KDIGA_DATA") or home() / "data")


def checkpoints() -> Path:
    """Where published weights are looked for and downloaded to: ``checkpoints/`` below ``data()``."""
    return data() / "checkpoints"


def params(scale: str) -> Path:
    """The settings of a scale."""
    return PARAMS / f"{scale}.yaml"
