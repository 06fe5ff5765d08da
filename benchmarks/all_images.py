"""AutoAttack on all test images of the digits, for every seed of the main rows, and the paired differences.

    python benchmarks/all_images.py [--images 500]

``make reproduce`` measures AutoAttack on 100 images. This takes the same nets from the run store (those that the store
lacks are trained) and measures AutoAttack on all 500. A difference is that of ``report.compare``: a paired bootstrap
over seeds and images.
"""

import argparse
import json
import sys
from typing import Any

from side_by_side import machine

from kdiga_nb import report
from kdiga_nb.artifacts import EVERY
from kdiga_nb.params import BaselineParams, at_scale
from kdiga_nb.runs.graph import run_all

LATER = ["rslad", "iad", "adaad", "igdm"]
CHAIN = ["isd_wot_1", "isd_wot_6"]
ROWS = ["st", "kd", "kdiga", "kdiga_zero", "penalty", *CHAIN, *LATER, "trades_student"]
PAIRS = [("kdiga", other) for other in ("kd", "kdiga_zero", "penalty", *LATER, "trades_student")]
PAIRS += [(loop, other) for loop in CHAIN for other in ("st", "penalty")]


def main() -> None:
    """Print the measurement as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500, help="of the test images, the first so many")
    images = parser.parse_args().images
    # No seed of the other rows.
    settings = {"autoattack_images": images, "autoattack_rows": ROWS, "autoattack_seeds": 0}
    params = at_scale(BaselineParams, "digits", settings)
    experiment = EVERY["baselines"].build(params)
    cells = {name: {cell.metric: cell for cell in experiment.row(name).cells} for name in ROWS}
    jobs = [job for own in cells.values() for job in own["autoattack"].jobs]
    if causes := run_all(jobs, device=params.device).causes:
        sys.exit(f"error: {'; '.join(causes)}")
    table = report.frame(experiment)
    found = {name: part.iloc[0] for name, part in table[table["metric"] == "autoattack"].groupby("row")}
    rows = {name: [float(found[name][key]) for key in ("value", "low", "high")] for name in ROWS}
    differences: dict[str, Any] = {f"{a} - {b}": vars(report.compare(experiment, a, b, "autoattack")) for a, b in PAIRS}
    result = {"images": images, "rows": rows, "differences": differences, "machine": machine()}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
