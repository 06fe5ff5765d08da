"""What the ledger of claims says of an experiment: claim, the paper's number, ours, verdict."""

import html
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from kdiga_nb.artifacts.claims import SIGNS, UNMEASURED, Judged, Key, Number, claims_of, judge
from kdiga_nb.artifacts.studies import findings
from kdiga_nb.artifacts.table import Experiment
from kdiga_nb.audit.verdict import verdict
from kdiga_nb.metrics import proportion
from kdiga_nb.params import AuditParams
from kdiga_nb.report.numbers import COLUMNS, frame
from kdiga_nb.report.pairs import compare

CHANCE = "Within chance: the 95 % interval also holds numbers of the other verdict."
TITLE_WIDTH = 64  # characters in a line of a figure's title


def with_audit(table: pd.DataFrame, experiment: Experiment) -> pd.DataFrame:
    """The long table with what the audit's rules say of each row whose audit is complete; other tables unchanged.

    The metrics are ``masking`` and ``weakness``, the number of warning signs, and ``all_together``, the accuracy under
    all attacks together that ran on all of the audit's images.
    """
    if not isinstance(experiment.params, AuditParams):
        return table
    lines = []
    for row in experiment.rows:
        if not row.is_done():
            continue
        part = table[table["row"] == row.id]
        one = verdict(findings(experiment.params, row))
        shared = {"row": row.id, "label": row.label, "n": one.n, "seeds": 1, "runs": part["runs"].iloc[0]}
        together = proportion(round(one.worst / 100 * one.n), one.n)
        lines += [shared | {"metric": name, "value": len(getattr(one, name))} for name in ("masking", "weakness")]
        lines.append(
            shared | {"metric": "all_together", "value": one.worst, "low": together.low, "high": together.high}
        )
    return pd.concat([table, pd.DataFrame(lines, columns=COLUMNS)], ignore_index=True) if lines else table


@dataclass(frozen=True)
class Line:
    """A claim's line: the verdict on our numbers, and the number that the paper's own table gives to its rule."""

    judged: Judged
    paper: Number | None

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """Claim, paper, ours with its interval, verdict with its sign: what a table shows."""
        paper = "–" if self.paper is None else _text(self.paper)
        ours = "–" if self.judged.number is None else _text(self.judged.number)
        return self.judged.claim.claim, paper, ours, f"{SIGNS[self.judged.verdict]} {self.verdict}"

    @property
    def verdict(self) -> str:
        """The verdict, and whether the interval leaves it to chance."""
        return self.judged.verdict + ", within chance" * self.judged.within_chance


@dataclass(frozen=True)
class Verdicts:
    """The lines of one artefact; Jupyter shows them as a table."""

    lines: Sequence[Line]

    def __str__(self) -> str:
        return "\n".join(f"{end:30}  {claim}: {ours} (paper: {paper})" for claim, paper, ours, end in self._rows())

    def markdown(self) -> str:
        """The table for an issue or a page."""
        head = ["| claim | paper | ours | verdict |", "| --- | --- | --- | --- |"]
        return "\n".join([*head, *("| " + " | ".join(row) + " |" for row in self._rows())])

    def _rows(self) -> list[tuple[str, str, str, str]]:
        return [line.cells for line in self.lines]

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{name}</th>" for name in ("claim", "paper", "ours", "verdict"))
        rows = [
            f'<td style="text-align:left">{html.escape(claim)}</td><td>{paper}</td><td>{_small_interval(ours)}</td>'
            f'<td style="text-align:left; white-space:nowrap">{end}</td>'
            for claim, paper, ours, end in self._rows()
        ]
        body = "".join(f"<tr>{row}</tr>\n" for row in rows)
        below = f"<p><small>{CHANCE}</small></p>" * any(line.judged.within_chance for line in self.lines)
        return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>{below}"


def _small_interval(text: str) -> str:
    value, separator, interval = text.partition(" [")
    return f'{value} <small style="color:gray">[{interval}</small>' if separator else value


def _text(number: Number) -> str:
    """Differences of the tables are in the tables' units: points for accuracies, nats, pixels."""
    known = [x for x in (number.value, number.low, number.high) if not pd.isna(x)]
    digits = 1 if max(map(abs, known)) >= 2 or not any(known) else 2
    value, *limits = (f"{round(x, digits) + 0.0:.{digits}f}" for x in known)  # + 0.0: no negative zero
    return f"{value} [{', '.join(limits)}]" if limits else value


def judge_all(experiment: Experiment, table: pd.DataFrame, *, paired: bool = True) -> list[Line]:
    """The ledger's claims on an experiment, judged by a long table.

    Args:
        paired: the table comes from the run store, whose masks give the interval of a difference of two nets.
    """
    ours = {
        (str(row), str(metric)): Number(float(value), float(low), float(high))
        for row, metric, value, low, high in table[["row", "metric", "value", "low", "high"]].itertuples(index=False)
    }
    paper: dict[Key, Number] = {
        (row.id, metric): Number(value) for row in experiment.rows for metric, value in row.reported.items()
    }
    lines = []
    for claim in claims_of(experiment.name):
        judged = judge(claim, ours, experiment.params)
        if paired and judged.number is not None:
            judged = Judged(claim, judged.verdict, _paired(experiment, judged.number))
        lines.append(Line(judged, judge(claim, paper, experiment.params).number))
    return lines


def _paired(experiment: Experiment, number: Number) -> Number:
    """A difference of two nets with the interval of the paired comparison, where the store knows image by image."""
    if len(number.cells) != 2 or number.cells[0][1] != number.cells[1][1]:
        return number
    (a, metric), (b, _) = number.cells
    try:
        difference = compare(experiment, a, b, metric)
    except (KeyError, ValueError):
        return number
    same = abs(difference.points - number.value) < 1e-6  # else one of the rows has more seeds
    return Number(number.value, difference.low, difference.high, number.cells) if same else number


def verdicts(experiment: Experiment) -> Verdicts:
    """The ledger's claims on an experiment as a table: claim, the paper's number, ours with its interval, verdict."""
    return Verdicts(judge_all(experiment, with_audit(frame(experiment), experiment)))


def headline(experiment: Experiment, claim: str, shown: str) -> str:
    """A figure's title: what a claim of the ledger comes to on these numbers and, below it, what is shown.

    Args:
        claim: the claim's id.

    Raises:
        ValueError: the artefact has no such claim.
    """
    lines = {line.judged.claim.id: line for line in verdicts(experiment).lines}
    if claim not in lines:
        raise ValueError(f"claim must be one of {', '.join(lines)}, got {claim!r}")
    sentence, _, ours, _ = lines[claim].cells
    judged = lines[claim].judged
    start = sentence[0].upper() if sentence[0].isascii() else sentence[0]  # λ stays λ
    finding = _even_lines(f"{start}{sentence[1:]}: {lines[claim].verdict}")
    return f"{finding}\n{'' if judged.number is None else f'{ours} · '}{shown}"


def _even_lines(text: str) -> str:
    """The text in as few lines of ``TITLE_WIDTH`` as it needs, all as short as that number of lines allows."""
    fills = [textwrap.fill(text, width, break_on_hyphens=False) for width in range(TITLE_WIDTH, TITLE_WIDTH // 2, -1)]
    return [fill for fill in fills if fill.count("\n") == fills[0].count("\n")][-1]


def print_verdicts(experiment: Experiment) -> None:
    """Print claim and verdict, without numbers, of the claims that come out the same on every machine.

    The notebooks' tests compare these lines. A claim that the ledger calls open at this scale is left out.
    """
    for line in verdicts(experiment).lines:
        claim = line.judged.claim
        if claim.expected.get(experiment.params.scale) != "open":
            print(f"{line.judged.verdict}: {claim.claim}")


def unexpected(line: Line, scale: str) -> bool:
    """Whether a measured claim has another verdict than the ledger expects at a scale."""
    expected = line.judged.claim.expected_at(scale)
    return expected is not None and line.judged.verdict not in (expected, UNMEASURED)
