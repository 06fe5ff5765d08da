"""Several ways of doing the same work, timed in alternation in one process, so that a drift hits them all."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch


def alternate(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of each way: median, smallest, largest and n of ``rounds`` rounds, after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(rounds + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if round_:
                seconds[name].append(time.perf_counter() - started)
    return {name: summary(values) for name, values in seconds.items()}


def summary(values: list[float]) -> dict[str, float]:
    """Median and spread."""
    return {
        "median": statistics.median(values),
        "smallest": min(values),
        "largest": max(values),
        "n": len(values),
    }


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    libraries = ("torch", "foolbox", "adversarial-robustness-toolbox", "pyautoattack", "numpy")
    return {
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in libraries},
        "load_before": os.getloadavg()[0],
        "taken": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
