"""Files of an artefact: table, figures, provenance."""

import json
import platform
import subprocess
import time
from importlib.metadata import version
from typing import Any

import matplotlib
import pandas as pd
import torch
from matplotlib.figure import Figure
from PIL import Image
from tqdm.auto import tqdm

from kdiga_nb import paths
from kdiga_nb.artifacts.table import Experiment
from kdiga_nb.report.numbers import INTERVAL
from kdiga_nb.runs.graph import Outcome, run_all
from kdiga_nb.runs.run import ancestors, run_key
from kdiga_nb.runs.store import environment, is_published, measured, training_seconds


class ReproductionError(RuntimeError):
    """Some jobs of an experiment failed; the message lists them."""


def reproduce(experiment: Experiment, *, workers: int | None = None) -> Outcome:
    """Train and measure what the store lacks, with a progress bar, over ``workers`` processes (default: one per core).

    Published runs (``kdiga store pull``) are counted in a line, so that they are not taken for trainings made here.

    Raises:
        ReproductionError: a job failed; everything that could be finished is in the store.
    """
    jobs = experiment.jobs()
    cached = all(job.is_done() for job in jobs)
    with tqdm(total=len(jobs), desc=experiment.name, unit="job", leave=False, disable=cached) as bar:

        def progress(done: int, total: int, title: str) -> None:
            bar.total = total
            bar.n = done
            bar.set_postfix_str(title)

        outcome = run_all(jobs, workers=workers, device=experiment.params.device, progress=progress)
    if outcome.failed:
        raise ReproductionError("; ".join(outcome.causes))
    if published := published_runs(experiment):
        print(f"{published} runs of this page are published ones, not trained here")
    return outcome


def published_runs(experiment: Experiment) -> int:
    """How many of an experiment's runs came from ``kdiga store pull``."""
    return sum(is_published(run) for row in experiment.rows for run in row.runs)


def save(experiment: Experiment, table: pd.DataFrame, figure: Figure, **more: Figure) -> None:
    """Write ``<artefact>.csv``, ``.png``, ``.svg`` and ``.json`` (provenance) to the scale's figures folder.

    Further figures are saved as ``<artefact>_<name>.png`` and ``.svg``.
    """
    home = paths.figures(experiment.params.scale)
    home.mkdir(parents=True, exist_ok=True)
    table.to_csv(home / f"{experiment.name}.csv", index=False, float_format="%.6g")
    for name, drawn in {experiment.name: figure, **{f"{experiment.name}_{k}": v for k, v in more.items()}}.items():
        drawn.savefig(home / f"{name}.png", dpi=150)
        if not any(axes.images for axes in drawn.axes):  # lines and text look the same in 256 colours
            with Image.open(home / f"{name}.png") as picture:
                few = picture.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
            few.save(home / f"{name}.png", optimize=True)
        # Fixed ids and no date, so that a figure always gives the same file. Text stays text, which one can search.
        with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
            drawn.savefig(home / f"{name}.svg", dpi=150, metadata={"Date": None})
    record = json.dumps(provenance(experiment), indent=1, ensure_ascii=False)
    (home / f"{experiment.name}.json").write_text(record + "\n")


def provenance(experiment: Experiment) -> dict[str, Any]:
    """The origin of an artefact: commit, versions, hardware, parameters, computing time, run keys, notes."""
    jobs = [job for job in experiment.jobs() if job.measure is not None]
    results = [measured(job.run, job.measure, reference=job.reference) for job in jobs if job.measure]
    trained = [seconds for run in ancestors(job.run for job in jobs) if (seconds := training_seconds(run)) is not None]
    measuring = [float(result["seconds"]) for result in results if result is not None]
    libraries = ("torch", "torchvision", "timm", "numpy", "scikit-learn", "pyautoattack", "papermill", "matplotlib")
    return {
        "artefact": experiment.name,
        "title": experiment.title,
        "commit": commit(),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in libraries},
        "hardware": environment()["device"],
        "threads": torch.get_num_threads(),
        "parameters": experiment.params.model_dump(),
        "seconds": {"training": round(sum(trained), 1), "measuring": round(sum(measuring), 1)},
        "interval": INTERVAL,
        "runs": {row.id: [run_key(run) for run in row.runs] for row in experiment.rows},
        "published_runs": published_runs(experiment),
        "notes": {row.id: row.note for row in experiment.rows if row.note},
    }


def commit() -> str:
    """The commit of the code, with ``+`` if files of the package differ from it; "unknown" outside a git checkout."""
    if paths.CHECKOUT is None:
        return "unknown"
    try:
        git = ["git", "-C", str(paths.CHECKOUT)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "kdiga_nb"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed.stdout.strip() else "")
