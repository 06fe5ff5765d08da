"""The model card of a scale's published runs."""

from collections.abc import Collection, Mapping

from kdiga_nb.artifacts.table import Experiment
from kdiga_nb.attacks.gradient import evaluation_pgd
from kdiga_nb.measures import TestAccuracy
from kdiga_nb.runs.graph import graph_of
from kdiga_nb.runs.run import Run, run_key
from kdiga_nb.runs.store import measured

USES = """\
**Use**: to check tables, to attack the nets, to draw them in the explorer. **Not for**: classifying anything that
matters. The nets are small, trained for a study of robustness, and none is the best of its kind.

`kdiga store verify {scale}` checks every file against `manifest.json`. `kdiga store pull {scale}` copies the runs into
the run store, where every table, the explorer and `kdiga audit KEY` find them. Licence: MIT.
"""


def card(scale: str, experiments: Mapping[str, Experiment], with_weights: Collection[str]) -> str:
    """Markdown: data, training, use, and one line per net whose weights are published.

    Args:
        with_weights: keys of the runs whose weights are published.
    """
    params = experiments["table1"].params
    labels: dict[str, str] = {}
    for one in experiments.values():
        for row in one.rows:
            for run in row.runs:
                labels.setdefault(run_key(run), row.label)
    runs = [job.run for one in experiments.values() for job in graph_of(one.jobs())]
    nets = {run_key(run): run for run in runs if isinstance(run, Run) and run_key(run) in with_weights}
    lines = [
        f"# Published runs: {scale}",
        "",
        f"Nets for {params.dataset}, images in [0, 1], ε = {params.epsilon:.4g} (ℓ∞). The training of every net stands",
        "in its `run.json`, with seconds, versions and hardware.",
        "",
        USES.format(scale=scale),
        f"| key | net | data | row | seed | clean, % | PGD-{params.pgd_steps}, % |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    images = params.test_images or None
    pgd = evaluation_pgd(params.epsilon, params.pgd_steps, params.pgd_restarts)
    for key, run in nets.items():
        found = [measured(run, TestAccuracy(attack, images)) for attack in (None, pgd)]
        numbers = ["–" if one is None else f"{one['percent']:.1f}" for one in found]
        label = labels.get(key, f"{type(run.method).__name__}, for other nets")
        cells = [f"`{key}`", run.model, run.dataset, label, str(run.seed), *numbers]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
