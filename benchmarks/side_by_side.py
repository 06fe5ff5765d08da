"""Time several ways of doing the same work alternately in one process: a drift of the machine affects all of them."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch


def alternate(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of each way: median, smallest, largest and n over ``rounds`` rounds. One uncounted round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(rounds + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if round_:
                seconds[name].append(time.perf_counter() - started)
    return {name: summary(values) for name, values in seconds.items()}


def summary(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest value, and their number."""
    return {
        "median": statistics.median(values),
        "smallest": min(values),
        "largest": max(values),
        "n": len(values),
    }


def machine() -> dict[str, Any]:
    """The machine and the library versions of the measurement."""
    libraries = ("torch", "foolbox", "adversarial-robustness-toolbox", "pyautoattack", "numpy")
    return {
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in libraries},
        "load_before": os.getloadavg()[0],
        "taken": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
