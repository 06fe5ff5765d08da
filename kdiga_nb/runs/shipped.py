"""The published part of the run store: finished runs under ``published/<scale>/runs/``, in the layout of the store.

``pull`` copies them into the store, so that tables, audits and later trainings use them. Every run comes with its
record, curve and (packed) measurements; most come without weights, because the repository must stay small. A run
without weights serves tables; where its net is needed, the run is trained again. ``manifest.json`` lists every file
with its sha256.
"""

import gzip
import json
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdiga_nb import paths
from kdiga_nb.runs.checkpoints import StoreError, digest_of
from kdiga_nb.runs.run import Run, folder, run_key
from kdiga_nb.runs.store import check_writable, environment, halve_weights, is_finished, pulled_from, write_json

RECORDS = ("run.json", "history.csv", "measures.json")
MEASURES = "measures.json.gz"  # as published: it says of every image whether it was withstood
WEIGHTS = "model.safetensors"
LIMIT = 5_000_000  # bytes of a file in the repository


@dataclass
class Pulled:
    """Keys of the runs that were copied, and of those that the store had already."""

    copied: list[str] = field(default_factory=list)
    there: list[str] = field(default_factory=list)


def home_of(scale: str) -> Path:
    """Where a scale's published runs are."""
    return paths.published(scale) / "runs"


def manifest(scale: str) -> dict[str, Any]:
    """The manifest of a scale's published runs.

    Raises:
        StoreError: the scale publishes no runs, or the manifest cannot be read.
    """
    path = home_of(scale) / "manifest.json"
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict) or not isinstance(found.get("files"), dict):
            raise ValueError("not a manifest")
        return found
    except FileNotFoundError:
        raise StoreError(f"{scale}: no runs are published") from None
    except (OSError, ValueError) as error:
        raise StoreError(f"{scale}: manifest.json cannot be read ({error})") from None


def faults(scale: str) -> list[str]:
    """What is wrong with a scale's published files, one line each; empty if every hash is right."""
    home, listed = home_of(scale), manifest(scale)["files"]
    lines = []
    for name, digest in listed.items():
        if not (home / name).is_file():
            lines.append(f"{name}: is missing")
        elif digest_of(home / name) != digest:
            lines.append(f"{name}: does not match its sha256")
    there = {str(path.relative_to(home)) for path in home.glob("*/*") if path.is_file()}
    return lines + [f"{name}: is not in the manifest" for name in sorted(there - set(listed))]


def pull(scale: str) -> Pulled:
    """Copy a scale's published runs into the store; a run that the store has, finished or not, is left as it is.

    A run that several scales publish comes with the weights that one of them has.

    Raises:
        StoreError: a published file is missing or damaged (nothing is copied then), or the store cannot be written.
    """
    if lines := faults(scale):
        raise StoreError("\n".join(f"{scale}: {line}" for line in lines))
    check_writable(paths.runs())
    pulled = Pulled()
    for source in sorted(path for path in home_of(scale).iterdir() if path.is_dir()):
        target = paths.runs() / source.name
        if target.exists():
            pulled.there.append(source.name)
            continue
        partial = target.with_name(f"{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            shutil.copytree(source, partial)
            if (packed := partial / MEASURES).exists():
                packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
                packed.unlink()
            record = json.loads((partial / "run.json").read_text())
            for weights in home_of(scale).parents[1].glob(f"*/runs/{source.name}/{WEIGHTS}"):
                if not (partial / WEIGHTS).exists() and digest_of(weights) == record["sha256"]:
                    shutil.copyfile(weights, partial / WEIGHTS)
            write_json(partial / "run.json", record | {"published": scale})
            partial.rename(target)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise StoreError(f"{target} cannot be written: {error.strerror or error}") from error
        pulled.copied.append(source.name)
    return pulled


def _as_published(path: Path) -> tuple[str, bytes]:
    """Name and content of a file of the store as it is published: measurements packed, a record without its mark."""
    if path.name == "measures.json":
        return MEASURES, gzip.compress(path.read_bytes(), mtime=0)
    if path.name == "run.json":
        record = json.loads(path.read_text())
        record.pop("published", None)
        return path.name, json.dumps(record, indent=1).encode()
    return path.name, path.read_bytes()


def drop(scale: str) -> list[str]:
    """Remove from the store the runs that ``pull`` copied, with what was measured on them since; returns their keys.

    Raises:
        StoreError: a folder of the store cannot be removed.
    """
    dropped = []
    for home in sorted(record.parent for record in paths.runs().glob("*/run.json")):
        if pulled_from(home) != scale:
            continue
        partial = home.with_name(f"{home.name}.partial")  # which the next pull removes if this one is cut short
        try:
            home.rename(partial)
            shutil.rmtree(partial)
        except OSError as error:
            raise StoreError(f"{home} cannot be removed: {error.strerror or error}") from error
        dropped.append(home.name)
    return dropped


def pack(scale: str, runs: Iterable[Run], with_weights: Iterable[Run], commit: str = "unknown") -> list[str]:
    """Publish the finished ones of ``runs``, with the weights for those of ``with_weights``; returns their keys.

    A run that was itself pulled without weights is published without them again. Published measurements are those of
    the published weights: a net without measurements is rounded to float16 in the store first; a net that was measured
    in float32 is published in float32.

    Raises:
        StoreError: the weights of a net take more than ``LIMIT``.
    """
    kept, keys, files = {run_key(run): run for run in with_weights}, [], {}
    home = home_of(scale)
    shutil.rmtree(home, ignore_errors=True)
    for run in dict.fromkeys(runs):
        if not is_finished(run):
            continue
        source, key = folder(run), run_key(run)
        (home / key).mkdir(parents=True)
        names = [name for name in RECORDS if (source / name).exists()]
        if key in kept and (source / WEIGHTS).exists():
            if not (source / "measures.json").exists():
                halve_weights(run)
            if (source / WEIGHTS).stat().st_size > LIMIT:
                raise StoreError(f"run {key}: its weights take more than {LIMIT / 1e6:g} MB")
            names.append(WEIGHTS)
        for path in (source / name for name in names):
            name, content = _as_published(path)
            (home / key / name).write_bytes(content)
            files[f"{key}/{name}"] = digest_of(home / key / name)
        keys.append(key)
    made = {
        "scale": scale,
        "packed": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "licence": "MIT",
        "commit": commit,
    }
    write_json(home / "manifest.json", made | {"packed_with": environment(), "files": files})
    return keys
