"""One name, colour and marker per training method, one colour per metric: in figures, tables, explorer, command."""

from collections.abc import Sequence
from typing import Any

from matplotlib.colors import to_hex, to_rgb

# Method -> name, colour and marker. Grey and brown: no robust teacher; green and olive: adversarial training.
METHODS = {
    "st": ("ST", "#7f7f7f", "o"),
    "kd": ("KD", "#de8f05", "s"),
    "kdiga": ("KDIGA", "#0173b2", "*"),
    "kdiga_ard_c": ("KDIGA-ARD_C", "#17a2b8", "P"),
    "kdiga_ard_a": ("KDIGA-ARD_A", "#56b4e9", "X"),
    "ard": ("ARD", "#d55e00", "D"),
    "rslad": ("RSLAD", "#ff8a65", "8"),
    "iad": ("IAD", "#f0c05a", "h"),
    "adaad": ("AdaAD", "#c0141c", "H"),
    "igdm": ("IGDM", "#5c0a0a", ">"),
    "saad": ("SAAD", "#7a7a00", "d"),
    "igam": ("IGAM", "#ca9161", "8"),
    "pgd": ("PGD adversarial training", "#a6a300", "^"),
    "trades": ("TRADES", "#029e73", "v"),
    "isd_wot": ("ISD-WoT", "#cc3399", "<"),
    "isd_wit": ("ISD-WiT", "#6a3d9a", "p"),
    "penalty": ("gradient penalty", "#6b3d1e", "d"),
    "kdiga_zero": ("KD + gradient penalty", "#1f2f7a", ">"),
    "kdiga_shuffled": ("KDIGA, teacher's gradients shuffled", "#8fa3ff", "8"),
    "isd_wot_1_zero": ("ISD-WoT-1, target gradient zero", "#7d1f4f", "h"),
}
METRICS = {"clean": "#0173b2", "pgd": "#de8f05", "autoattack": "#029e73", "apgd": "#cc78bc"}
OTHER = ("#949494", "#ece133", "#fbafe4", "#ca9161")  # rows that are no method, metrics that are no accuracy
MARKERS = "osD^v<>8pPhH*Xd"  # all markers of matplotlib that are filled and easily told apart
LIGHTER = 0.5  # share of white in the colour of a chain without dropout


def method_of_row(row: str) -> str | None:
    """The key in ``METHODS`` of a row id such as ``trades_teacher`` or ``isd_wot_3``; None for another row."""
    found = [key for key in METHODS if row == key or row.startswith(f"{key}_")]
    return max(found, key=len, default=None)


def method_color(row: str, position: int = 0) -> str:
    """The colour of a row's method; of another row, one of ``OTHER`` by its position in the figure."""
    method = method_of_row(row)
    color = OTHER[position % len(OTHER)] if method is None else METHODS[method][1]
    if not row.endswith("_no_dropout"):
        return color
    red, green, blue = (LIGHTER + (1 - LIGHTER) * channel for channel in to_rgb(color))
    return to_hex((red, green, blue))


def method_markers(rows: Sequence[str]) -> list[str]:
    """One marker per row of a figure: that of its method, so that figures of several scales agree.

    A row whose marker another one has, or that is no method, takes a free one. With more rows than markers, a marker
    repeats in another colour.
    """
    methods = [method_of_row(row) for row in rows]
    own = ["" if method is None else METHODS[method][2] for method in methods]
    markers: list[str] = []
    for method, marker in zip(methods, own, strict=True):
        drawn = set(zip(methods, markers, strict=False))
        choices = [marker] if marker and marker not in markers else []
        choices += [one for one in MARKERS if one not in (*own, *markers)]
        choices += [one for one in (marker, *MARKERS) if one and (method, one) not in drawn]
        markers.append((choices or MARKERS)[0])
    return markers


def method_styles(rows: Sequence[str]) -> list[dict[str, Any]]:
    """Colour, marker and size of the marker of each row of a figure, as arguments of matplotlib's ``plot``."""
    sizes = {"*": 11}  # a star of the same size looks smaller
    return [
        {"color": method_color(row, index), "marker": marker, "markersize": sizes.get(marker, 7)}
        for index, (row, marker) in enumerate(zip(rows, method_markers(rows), strict=True))
    ]


def label_color(label: str, position: int = 0) -> str:
    """The colour of the method that a label names, the longest name first."""
    named = sorted(METHODS, key=lambda key: -len(METHODS[key][0]))
    return method_color(next((key for key in named if METHODS[key][0] in label), ""), position)


def metric_color(metric: str) -> str:
    """The colour of a metric such as ``clean``, ``pgd20`` or ``pgd20@0.05``."""
    return METRICS.get(metric.partition("@")[0].rstrip("0123456789"), OTHER[0])


def metric_colors(metrics: Sequence[str]) -> list[str]:
    """One colour per metric of a figure; a metric whose colour another one has takes one of ``OTHER``.

    With more metrics than colours, colours repeat.
    """
    colors: list[str] = []
    for metric in metrics:
        color = metric_color(metric)
        colors.append(next((one for one in (color, *OTHER, *METRICS.values()) if one not in colors), color))
    return colors
