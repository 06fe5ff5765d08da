"""KDIGA trained in float32 beside bfloat16 on CIFAR-10: does half precision change the result?

    python benchmarks/precision.py

The two trainings share the teacher, seed, settings and test images of the scale ``cifar10_short``. The one in bfloat16
comes from the run store, if it is there; the one in float32 is trained (half an hour on two CPU cores). Needs CIFAR-10
in ``KDIGA_DATA``.
"""

import json
import sys
from dataclasses import replace

from side_by_side import machine

from kdiga_nb import report
from kdiga_nb.artifacts import EVERY
from kdiga_nb.artifacts.table import Cell, Experiment, Row
from kdiga_nb.params import BaselineParams, at_scale
from kdiga_nb.runs.graph import run_all
from kdiga_nb.runs.run import run_key


def main() -> None:
    """Print the measurement as JSON."""
    params = at_scale(BaselineParams, "cifar10_short")
    row = EVERY["baselines"].build(params).row("kdiga")
    runs = {"bfloat16": row.runs[0]}
    runs["float32"] = replace(runs["bfloat16"], schedule=replace(runs["bfloat16"].schedule, precision="float32"))
    rows = []
    for precision, run in runs.items():
        cells = tuple(
            Cell(cell.metric, tuple(replace(job, run=run) for job in cell.jobs))
            for cell in row.cells
            if cell.metric != "autoattack"
        )
        rows.append(Row(precision, precision, (run,), cells))
    experiment = Experiment("precision", "float32 beside bfloat16", tuple(rows), params)
    if causes := run_all(experiment.jobs(), device=params.device).causes:
        sys.exit(f"error: {'; '.join(causes)}")
    table = report.frame(experiment)
    metrics = [cell.metric for cell in rows[0].cells]
    found = report.values(table)
    percent = {row.id: {metric: found[row.id, metric] for metric in metrics} for row in rows}
    differences = {metric: vars(report.compare(experiment, "bfloat16", "float32", metric)) for metric in metrics}
    keys = {precision: run_key(run) for precision, run in runs.items()}
    print(json.dumps({"percent": percent, "difference": differences, "runs": keys, "machine": machine()}, indent=1))


if __name__ == "__main__":
    main()
