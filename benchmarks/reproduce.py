"""Seconds and memory of ``kdiga reproduce`` with an empty run store, and again with a complete one.

    python benchmarks/reproduce.py [--scale digits] [--jobs 2] [--studies published]
    python benchmarks/reproduce.py --store FOLDER    only the seconds by kind, of the runs in that folder

Each reproduction runs in its own process, with the run store and the figures in a temporary folder. Memory is the sum
of the proportional set sizes (PSS, Linux) of all processes, sampled once per second. ``by_kind`` adds up what the
store's records say of each training and measurement made here, in seconds of one process.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from side_by_side import machine


def shares(parent: int) -> float:
    """Memory of a process and its descendants in MiB; shared pages count once."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # the process has ended
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    total, left = 0, [parent]
    while left:
        process = left.pop()
        left += children.get(process, [])
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def once(options: list[str], home: Path) -> dict[str, Any]:
    """Seconds, peak memory and closing lines of one reproduction."""
    env = os.environ | {"KDIGA_RUNS": str(home / "runs"), "KDIGA_FIGURES": str(home / "figures")}
    command = [sys.executable, "-m", "kdiga_nb.cli", "reproduce", *options]
    started = time.perf_counter()
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        peak = 0.0
        while process.poll() is None:
            peak = max(peak, shares(process.pid))
            time.sleep(1)
        assert process.stdout is not None
        lines = process.stdout.read().replace(f"{home}/", "").splitlines()
    seconds = time.perf_counter() - started
    return {"seconds": round(seconds, 1), "peak_mib": round(peak), "status": process.returncode, "says": lines[-4:]}


def by_kind(store: Path) -> dict[str, dict[str, float]]:
    """Number and seconds of the trainings and of the measurements by attack, from the records of a run store."""
    found: dict[str, list[float]] = {}
    for home in sorted(store.iterdir()):
        if not (home / "run.json").exists():
            continue
        record = json.loads((home / "run.json").read_text())
        if "published" in record:
            continue
        found.setdefault("training", []).append(record["seconds"])
        measures = home / "measures.json"
        for name, result in (json.loads(measures.read_text()) if measures.exists() else {}).items():
            # The name is the measure as JSON, perhaps followed by the net that the run was compared with.
            measure = json.JSONDecoder().raw_decode(name)[0]
            attack = measure.get("attack") or {}
            kind = " ".join(filter(None, (attack.get("type", measure["type"]), attack.get("version"))))
            found.setdefault(kind, []).append(result["seconds"])
    ordered = sorted(found.items(), key=lambda item: -sum(item[1]))
    return {kind: {"number": len(seconds), "seconds": round(sum(seconds), 1)} for kind, seconds in ordered}


def main() -> None:
    """Print the measurement as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", default="digits")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--studies", default="trained", help="trained or published")
    parser.add_argument("--store", type=Path, help="add up the seconds in this run store, and reproduce nothing")
    arguments = parser.parse_args()
    if arguments.store:
        print(json.dumps({"by_kind": by_kind(arguments.store), "machine": machine()}, indent=1))
        return
    with tempfile.TemporaryDirectory() as home:
        result = {"machine": machine()} | {name: getattr(arguments, name) for name in ("scale", "jobs", "studies")}
        options = [f"--scale={arguments.scale}", f"--jobs={arguments.jobs}", f"--studies={arguments.studies}"]
        for kind in ("cold", "cached"):
            result[kind] = once(options, Path(home))
        result["by_kind"] = by_kind(Path(home) / "runs")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
