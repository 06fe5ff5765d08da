"""Every location the kit reads or writes, derived from the package or from an environment variable.

Nothing else in the kit spells a folder: papermill runs a notebook in the caller's directory, nbval in the notebook's,
so a path relative to the working directory would mean two places.
"""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
PARAMS = ROOT / "params"


def runs() -> Path:
    """The run store: ``$KDIGA_RUNS``, else ``runs/`` beside the package."""
    return Path(os.environ.get("KDIGA_RUNS") or ROOT / "runs")


def figures(scale: str) -> Path:
    """Where a run writes the artefacts of a scale: ``$KDIGA_FIGURES/<scale>``, else ``figures/<scale>``."""
    return Path(os.environ.get("KDIGA_FIGURES") or ROOT / "figures") / scale


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
    """Root of the torchvision data sets: ``$KDIGA_DATA``, else ``data/`` beside the package."""
    return Path(os.environ.get("KDIGA_DATA") or ROOT / "data")


def checkpoints() -> Path:
    """Where published weights are looked for and downloaded to: ``checkpoints/`` below ``data()``."""
    return data() / "checkpoints"


def params(scale: str) -> Path:
    """The settings of a scale."""
    return PARAMS / f"{scale}.yaml"
