"""Seconds until ``kdiga --help`` has ended, and until a cold kernel has the explorer's first picture.

    python benchmarks/start.py [--rounds 5]

Each round is a new process. The explorer's process imports the package, builds the explorer at the digits scale and
draws its first view; the run store is the user's.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

from side_by_side import machine

EXPLORER = """
from kdiga_nb.params import ExploreParams, at_scale
from kdiga_nb.widgets import Explorer
assert Explorer(at_scale(ExploreParams, "digits")).picture.value
"""
COMMANDS = {"kdiga --help": ["-m", "kdiga_nb", "--help"], "first picture of the explorer": ["-c", EXPLORER]}


def main() -> None:
    """Print the measurement as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, arguments in COMMANDS.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - started)
    result = {name: {"median": statistics.median(own), "largest": max(own)} for name, own in seconds.items()}
    print(json.dumps(result | {"rounds": rounds, "machine": machine()}, indent=1))


if __name__ == "__main__":
    main()
