"""One colour and one name per training method, one colour per metric: in figures, tables, explorer and command."""

from collections.abc import Sequence

from matplotlib.colors import to_hex, to_rgb

# Method -> name and colour. Grey and brown: no robust teacher; green and olive: adversarial training.
METHODS = {
    "st": ("ST", "#7f7f7f"),
    "kd": ("KD", "#de8f05"),
    "kdiga": ("KDIGA", "#0173b2"),
    "kdiga_ard_c": ("KDIGA-ARD_C", "#17a2b8"),
    "kdiga_ard_a": ("KDIGA-ARD_A", "#56b4e9"),
    "ard": ("ARD", "#d55e00"),
    "rslad": ("RSLAD", "#ff8a65"),
    "iad": ("IAD", "#f0c05a"),
    "adaad": ("AdaAD", "#c0141c"),
    "igdm": ("IGDM", "#5c0a0a"),
    "saad": ("SAAD", "#7a7a00"),
    "igam": ("IGAM", "#ca9161"),
    "pgd": ("PGD adversarial training", "#a6a300"),
    "trades": ("TRADES", "#029e73"),
    "isd_wot": ("ISD-WoT", "#cc3399"),
    "isd_wit": ("ISD-WiT", "#6a3d9a"),
    "penalty": ("gradient penalty", "#6b3d1e"),
    "kdiga_zero": ("KD + gradient penalty", "#1f2f7a"),
    "kdiga_shuffled": ("KDIGA, teacher's gradients shuffled", "#8fa3ff"),
    "isd_wot_1_zero": ("ISD-WoT-1, target gradient zero", "#7d1f4f"),
}
METRICS = {"clean": "#0173b2", "pgd": "#de8f05", "autoattack": "#029e73", "apgd": "#cc78bc"}
OTHER = ("#949494", "#ece133", "#fbafe4", "#ca9161")  # rows that are no method, metrics that are no accuracy
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
