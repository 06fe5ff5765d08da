"""How long a moved control of the explorer keeps the kernel busy, on points that the store has.

    python benchmarks/explorer.py [--scale digits] [--moves 40]

prints JSON: for each view, and over all of them, the 50th and 95th percentile and the largest of ``moves`` moves, in
milliseconds. A move sets the value of a real ``Explorer``'s control and lasts until its handler returns: compute, draw,
PNG, text, what the buttons offer, and the garbage collection after the picture. Every move lands on another point or
image, so nothing is served from a cache but the run store and the nets that it holds ready; the first moves of a view,
which pay for imports and file caches, are not counted.
"""

import argparse
import itertools
import json
import time
from typing import Any

import numpy as np
from side_by_side import machine

from kdiga_nb import runs
from kdiga_nb.params import VIEWS, ExploreParams, at_scale
from kdiga_nb.runs import StoreError
from kdiga_nb.widgets import Explorer, State

WARM_UP = 3
CONTROLS = {"glance": "epsilon", "lambda": "lambda_iga", "epsilon": "epsilon", "film": "step"}
CONTROLS |= {"loops": "loop", "image": "image"}


def stops(explorer: Explorer, view: str) -> list[Any]:
    """The values of the view's control at which its net is in the store."""
    name = CONTROLS[view]
    control = explorer.controls[name]
    values = [value for _, value in control.options] if name in ("lambda_iga", "epsilon") else range(1, control.max + 1)
    rows = {value: State.start(explorer.params, view=view, **{name: value}).row() for value in values}
    known = [value for value, row in rows.items() if runs.is_finished(row.runs[0])]
    if len(known) < 2:
        raise StoreError(f"the store has no nets for the view {view}; kdiga reproduce --only explore makes them")
    return known


def measure(params: ExploreParams, count: int = 40) -> dict[str, Any]:
    """Latencies in milliseconds, by view and over all views."""
    explorer = Explorer(params)
    latencies: dict[str, list[float]] = {}
    for view in VIEWS:
        explorer.controls["view"].value = view
        control, values = explorer.controls[CONTROLS[view]], itertools.cycle(stops(explorer, view))
        for move, value in enumerate(itertools.islice(values, count + WARM_UP)):
            started = time.perf_counter()
            control.value = value
            if move >= WARM_UP:
                latencies.setdefault(view, []).append(1000 * (time.perf_counter() - started))
        control.value = getattr(State.start(params), CONTROLS[view])
    everything = [value for values in latencies.values() for value in values]
    return {
        "what": "a move of a control on a point in the store, until its handler returns, milliseconds",
        "scale": params.scale,
        "moves": count,
        "views": {view: _summary(values) for view, values in latencies.items()},
        "all": _summary(everything),
        "machine": machine(),
    }


def _summary(values: list[float]) -> dict[str, float]:
    p50, p95 = np.percentile(values, [50, 95])
    return {"p50": round(float(p50), 1), "p95": round(float(p95), 1), "max": round(max(values), 1)}


def main() -> None:
    """Print the measurement as JSON."""
    parser = argparse.ArgumentParser(description="Latency of the explorer on points that the store has, as JSON.")
    parser.add_argument("--scale", default="digits", help="a file of params/")
    parser.add_argument("--moves", type=int, default=40, help="moves measured in each view")
    arguments = parser.parse_args()
    print(json.dumps(measure(at_scale(ExploreParams, arguments.scale), arguments.moves), indent=1))


if __name__ == "__main__":
    main()
