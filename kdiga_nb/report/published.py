"""A user's own results compared with the published ones.

Both are long tables, ``<artefact>.csv``: the user's in ``paths.figures(scale)``, the published in
``paths.published(scale)``. Values are matched by artefact, row and metric. Only what both tables measured is compared.
Training times are not: they depend on the machine.
"""

import pandas as pd

from kdiga_nb import paths

MACHINE_METRICS = ("training_seconds",)
LISTED = 5  # values outside that a summary names


def agrees(own: float, published: float, low: float, high: float) -> bool:
    """Whether a value reproduces a published one.

    With a published 95 % interval: the value lies inside the interval, limits included. Without an interval (a setting,
    a count, a mean over one net): both values are the same when rounded to two significant digits.
    """
    if pd.isna(low) or pd.isna(high):
        return f"{own:.2g}" == f"{published:.2g}"
    return low <= own <= high


def compare(scale: str) -> pd.DataFrame:
    """One row per value that both tables of an artefact measured.

    Columns: ``artefact``, ``row``, ``metric``, ``own``, ``published``, ``low``, ``high``, ``inside`` (``agrees``). The
    frame is empty if nothing is published for the scale, or if the user has run none of the published artefacts.
    """
    columns = ["artefact", "row", "metric", "own", "published", "low", "high"]
    parts = [pd.DataFrame(columns=columns)]
    for path in sorted(paths.published(scale).glob("*.csv")):
        own = paths.figures(scale) / path.name
        if own.is_file():
            both = pd.read_csv(path).merge(pd.read_csv(own), on=["row", "metric"], suffixes=("", "_own"))
            both = both[both["value"].notna() & both["value_own"].notna() & ~both["metric"].isin(MACHINE_METRICS)]
            both = both.drop(columns="label").rename(columns={"value": "published", "value_own": "own"})
            parts.append(both.assign(artefact=path.stem)[columns])
    table = pd.concat([part for part in parts if len(part)] or parts, ignore_index=True)
    inside = [agrees(*values) for values in table[["own", "published", "low", "high"]].itertuples(index=False)]
    return table.assign(inside=pd.Series(inside, index=table.index, dtype=bool))


def summary(scale: str) -> str:
    """How many values agree with the published ones, and the first few that do not; "" without any to compare."""
    table = compare(scale)
    if table.empty:
        return ""
    outside = table[~table["inside"]]
    lines = [f"compared with published/{scale}: {len(table) - len(outside)} of {len(table)} values agree"]
    for entry in outside.head(LISTED).to_dict("records"):
        limits = "" if pd.isna(entry["low"]) else f" [{entry['low']:g}, {entry['high']:g}]"
        name = f"{entry['artefact']}, {entry['row']}, {entry['metric']}"
        lines.append(f"  differs: {name}: {entry['own']:g}, published {entry['published']:g}{limits}")
    if len(outside) > LISTED:
        lines.append(f"  and {len(outside) - LISTED} more: kdiga_nb.report.published.compare({scale!r}) lists them")
    return "\n".join(lines)
