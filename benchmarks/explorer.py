"""How long the explorer takes from a moved control to its picture: compute + draw + PNG, on points that the store has.

    python benchmarks/explorer.py [--scale digits] [--moves 40]

prints JSON: for each view, and over all of them, the 50th and 95th percentile and the largest of ``moves`` moves, in
milliseconds. Every move lands on another point or image, so nothing is served from a cache but the run store; the first
move of a view, which pays for imports and file caches, is not counted.
"""

import argparse
import itertools
import json
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from kdiga_nb import paths, runs
from kdiga_nb.params import VIEWS, ExploreParams, read
from kdiga_nb.runs import StoreError
from kdiga_nb.widgets import State, compute, draw, image_bytes


def moves(params: ExploreParams, view: str) -> Iterator[State]:
    """States of a view whose nets are in the store, without end: the view's own control goes round, images change."""
    start = State.start(params, view=view)
    choices: dict[str, dict[str, Any]] = {
        "lambda": {"lambda_iga": start.lambdas},
        "epsilon": {"epsilon": np.linspace(0.02, 0.2, 10).round(3).tolist()},
        "loops": {"loop": range(1, params.loops + 1)},
        "image": {"epsilon": np.linspace(0.02, 0.2, 10).round(3).tolist()},
    }
    ((name, values),) = choices[view].items()
    states = [State.start(params, view=view, **{name: value}) for value in values]
    known = [state for state in states if runs.is_finished(state.row().runs[0])]
    if not known:
        raise StoreError(f"the store has no net for the view {view}; kdiga reproduce --only explore makes them")
    for image, state in enumerate(itertools.cycle(known)):
        yield state if view == "lambda" else replace(state, image=image % 100)


def measure(params: ExploreParams, count: int = 40) -> dict[str, Any]:
    """Latencies in milliseconds, by view and over all views."""
    latencies: dict[str, list[float]] = {}
    for view in VIEWS:
        states = moves(params, view)
        image_bytes(draw(compute(next(states))))
        for state in itertools.islice(states, count):
            started = time.perf_counter()
            image_bytes(draw(compute(state)))
            latencies.setdefault(view, []).append(1000 * (time.perf_counter() - started))
    everything = [value for values in latencies.values() for value in values]
    return {
        "what": "compute + draw + PNG of a point in the store, milliseconds",
        "scale": params.scale,
        "moves": count,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "views": {view: _summary(values) for view, values in latencies.items()},
        "all": _summary(everything),
    }


def _summary(values: list[float]) -> dict[str, float]:
    p50, p95 = np.percentile(values, [50, 95])
    return {"p50": round(float(p50), 1), "p95": round(float(p95), 1), "max": round(max(values), 1)}


def main() -> None:
    """Print the measurement as JSON."""
    parser = argparse.ArgumentParser(description="Latency of the explorer on points that the store has, as JSON.")
    parser.add_argument("--scale", default="digits", help="a folder of params/")
    parser.add_argument("--moves", type=int, default=40, help="moves measured in each view")
    arguments = parser.parse_args()
    print(json.dumps(measure(read(ExploreParams, paths.params(arguments.scale, "explore")), arguments.moves), indent=1))


if __name__ == "__main__":
    main()
