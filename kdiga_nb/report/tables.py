"""Tables for readers: words instead of keys, families of rows, intervals small, the best value bold, signs in colour.

The HTML reads well without its styles too, which some viewers of notebooks strip.
"""

import html
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from kdiga_nb.audit import MASKING, WEAKNESS, Verdict
from kdiga_nb.report.colors import method_of_row
from kdiga_nb.report.names import heading

# Method -> family of rows, in which a table is grouped.
FAMILIES = {
    "st": "standard training",
    **dict.fromkeys(("kd", "ard", "rslad", "iad", "adaad", "igdm", "saad", "igam"), "distillation"),
    **dict.fromkeys(("pgd", "trades"), "adversarial training"),
    **dict.fromkeys(("kdiga", "kdiga_ard_c", "kdiga_ard_a"), "KDIGA"),
    **dict.fromkeys(("isd_wot", "isd_wit"), "self-distillation"),
    **dict.fromkeys(("penalty", "kdiga_zero", "kdiga_shuffled", "isd_wot_1_zero"), "controls"),
}
# Metrics of which more is better.
HIGHER = re.compile(r"(teacher_)?(clean|pgd\d+|autoattack|apgd|certified|kept|kept_proven)(@.*)?")


def shown(frame: pd.DataFrame, rows: Sequence[str]) -> pd.DataFrame:
    """The frame, which a notebook displays for readers; ``rows`` are the row ids, by which lines are grouped."""
    table = _Shown(frame)
    table.attrs["rows"] = list(rows)
    return table


class _Shown(pd.DataFrame):
    """A frame with another display."""

    @property
    def _constructor(self) -> Any:
        return pd.DataFrame

    def _repr_html_(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        metrics: dict[str, list[str]] = {}
        for column in map(str, self.columns):
            name, _, whose = column.rpartition(", ")
            metrics.setdefault(name or column, []).append(whose if name else "")
        first = "".join(
            f'<th{_span(len(whose))} style="text-align:center">{html.escape(heading(name) if whose[0] else name)}</th>'
            for name, whose in metrics.items()
        )
        both = any("paper" in whose for whose in metrics.values())
        second = "".join(f"<th>{one}</th>" for whose in metrics.values() for one in whose)
        head = f"<tr><th></th>{first}</tr>" + (f"<tr><th></th>{second}</tr>" if both else "")
        return f"<table>\n<thead>{head}</thead>\n<tbody>\n{self._body()}</tbody>\n</table>"

    def _body(self) -> str:
        families = [FAMILIES.get(method_of_row(row) or "", "") for row in self.attrs.get("rows", [])]
        grouped = len(set(families)) > 1 and "" not in families
        best = {place: _best(self.iloc[:, place]) for place, name in enumerate(self.columns) if _is_better(str(name))}
        lines, family = [], ""
        for number, (label, *cells) in enumerate(self.itertuples()):
            if grouped and families[number] != family:
                family = families[number]
                across = len(self.columns) + 1
                lines.append(f'<tr><th{_span(across)} style="text-align:left"><em>{family}</em></th></tr>\n')
            inner = "".join(
                f'<td style="white-space:nowrap">{_cell(str(text), best.get(place) == number)}</td>'
                for place, text in enumerate(cells)
            )
            lines.append(f'<tr><th style="text-align:left">{html.escape(str(label))}</th>{inner}</tr>\n')
        return "".join(lines)


def _span(number: int) -> str:
    return f' colspan="{number}"' if number > 1 else ""


def _is_better(column: str) -> bool:
    name, _, whose = column.rpartition(", ")
    return whose == "ours" and HIGHER.fullmatch(name) is not None


def _best(column: pd.Series) -> int:
    numbers = [float(found[0]) if (found := re.match(r"-?[\d.]+", str(text))) else -math.inf for text in column]
    return numbers.index(max(numbers)) if len(numbers) > 1 else -1


def _cell(text: str, bold: bool) -> str:
    value, separator, interval = html.escape(text).partition(" [")
    value = f"<b>{value}</b>" if bold else value
    return f'{value} <small style="color:gray">[{interval}</small>' if separator else value


@dataclass(frozen=True)
class Grid:
    """Rules of the audit against nets: ✓ no warning sign, ! the plain attack is too weak, ✗ masked or not valid.

    Attributes:
        nets: label -> verdict.
    """

    nets: Mapping[str, Verdict]

    @property
    def lines(self) -> list[tuple[str, list[str]]]:
        """(rule in words, one sign per net), preconditions first."""
        faults = sorted({name for one in self.nets.values() for name in one.faults}) or ["preconditions"]
        return [
            *((name, self._signs([name in one.faults for one in self.nets.values()], "✗")) for name in faults),
            *((rule.__name__, self._signs([rule.__name__ in one.masking for one in self.nets.values()], "✗"))
              for rule in MASKING),
            *((rule.__name__, self._signs([rule.__name__ in one.weakness for one in self.nets.values()], "!"))
              for rule in WEAKNESS),
            ("verdict", [one.word for one in self.nets.values()]),
        ]  # fmt: skip

    def _signs(self, fired: Sequence[bool], sign: str) -> list[str]:
        return [sign if one else "✓" for one in fired]

    def __repr__(self) -> str:
        return "\n".join(f"{rule.replace('_', ' '):24} {'  '.join(signs)}" for rule, signs in self.lines)

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(net)}</th>" for net in self.nets)
        rows = []
        for rule, signs in self.lines:
            cells = "".join(f'<td style="text-align:center; {_light(sign)}">{sign}</td>' for sign in signs)
            rows.append(f'<tr><th style="text-align:left">{rule.replace("_", " ")}</th>{cells}</tr>\n')
        return f"<table>\n<thead><tr><th></th>{head}</tr></thead>\n<tbody>\n{''.join(rows)}</tbody>\n</table>"


LIGHTS = {
    **dict.fromkeys(("✓", "sound"), ("#d4ecd9", "#0b4a2a")),
    **dict.fromkeys(("!", "overstated"), ("#fbe6b5", "#5a3c00")),
    **dict.fromkeys(("✗", "masked", "invalid"), ("#f6cfcd", "#6d1210")),
}


def _light(sign: str) -> str:
    ground, ink = LIGHTS[sign]
    return f"background:{ground}; color:{ink}"


def audit_grid(verdicts: Mapping[str, Verdict]) -> Grid:
    """The rules of the audit against nets, as a grid of signs."""
    return Grid(verdicts)
