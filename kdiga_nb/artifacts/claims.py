"""The ledger of claims: ``published/claims.yaml``, and what numbers say of a claim.

A claim is a sentence and a rule over the cells of one artefact. A rule is data, with one of the words of ``RULES``:

    {at_least: 15, of: [kdiga, robust], minus: [kd, robust]}

A cell is ``[row, metric]``; both may be patterns (``isd_wot_?``, ``*``), which stand for the cells that were measured.
The metric ``robust`` is the scale's PGD, ``@last`` the largest radius; the row endings ``@near`` and ``@isd`` are the
weight nearest to λ_IGA and that of self-distillation. ``minus`` subtracts, ``share_of`` divides, ``take`` reduces
several cells to one; without it the rule must hold for each of them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from kdiga_nb import paths
from kdiga_nb.artifacts import EVERY
from kdiga_nb.artifacts.studies import nearest_row, weighted_row
from kdiga_nb.params import ParameterError, Params, did_you_mean

HOLDS, FAILS, UNMEASURED = "holds", "does not hold", "not measured"
SIGNS = {HOLDS: "✓", FAILS: "✗", UNMEASURED: "○"}
# Expected verdicts. An open claim is too close to its threshold to come out the same on every machine.
EXPECTED = {"holds": HOLDS, "fails": FAILS, "open": None}

Key = tuple[str, str]  # row, metric
ALL: Key = ("", "")  # several cells reduced to one number


@dataclass(frozen=True)
class Number:
    """A number with its 95 % interval (NaN without one) and the cells that it comes from."""

    value: float
    low: float = math.nan
    high: float = math.nan
    cells: tuple[Key, ...] = ()

    def __sub__(self, other: "Number") -> "Number":
        """The difference; errors of independent numbers add in quadrature."""
        below = math.hypot(self.value - self.low, other.high - other.value)
        above = math.hypot(self.high - self.value, other.value - other.low)
        value = self.value - other.value
        return Number(value, value - below, value + above, self.cells + other.cells)

    def __truediv__(self, other: "Number") -> "Number":
        return Number(self.value / other.value if other.value else math.nan, cells=self.cells + other.cells)


Numbers = Mapping[Key, Number]


def _total(numbers: Sequence[Number]) -> Number:
    return Number(sum(one.value for one in numbers), cells=tuple(cell for one in numbers for cell in one.cells))


def _mean(numbers: Sequence[Number]) -> Number:
    return Number(_total(numbers).value / len(numbers), cells=_total(numbers).cells)


def _lowest(numbers: Sequence[Number]) -> Number:
    return min(numbers, key=lambda one: one.value)


def _highest(numbers: Sequence[Number]) -> Number:
    return max(numbers, key=lambda one: one.value)


def _farthest(numbers: Sequence[Number]) -> Number:
    return max(numbers, key=lambda one: abs(one.value))


TAKE: dict[str, Callable[[Sequence[Number]], Number]] = {
    "best": _highest,
    "worst": _lowest,
    "mean": _mean,
    "sum": _total,
}


@dataclass(frozen=True)
class Rule:
    """A word of the vocabulary: which of several numbers decides, and when it satisfies the threshold."""

    decides: Callable[[Sequence[Number]], Number]
    holds: Callable[[float, float], bool]
    series: bool = False


RULES: dict[str, Rule] = {
    "at_least": Rule(_lowest, lambda x, bound: x >= bound),
    "more_than": Rule(_lowest, lambda x, bound: x > bound),
    "at_most": Rule(_highest, lambda x, bound: x <= bound),
    "less_than": Rule(_highest, lambda x, bound: x < bound),
    "within": Rule(_farthest, lambda x, bound: abs(x) <= bound),
    # Every step of a series rises or falls by the bound. A pattern of metrics makes a series per row, else one of rows.
    "rises_by": Rule(_lowest, lambda x, bound: x >= bound, series=True),
    "falls_by": Rule(_highest, lambda x, bound: -x >= bound, series=True),
}


@dataclass(frozen=True)
class Claim:
    """One line of the ledger.

    Attributes:
        id, claim: a stable snake_case name, and the sentence.
        source: the table, figure or section of the paper, or "kit" for a claim that the paper does not make.
        artefact: whose cells the rule reads.
        word, bound: the rule's word of ``RULES`` and its threshold.
        cells: the rule's ``of``, ``take``, ``minus`` and ``share_of``.
        expected: a word of ``EXPECTED`` per scale at which the kit has a published result.
    """

    id: str
    claim: str
    source: str
    artefact: str
    word: str
    bound: float
    cells: dict[str, Any]
    expected: dict[str, str]

    def expected_at(self, scale: str) -> str | None:
        """The verdict that every machine should reach at a scale; None if there is none."""
        return EXPECTED[self.expected[scale]] if scale in self.expected else None


@dataclass(frozen=True)
class Judged:
    """A claim with its verdict and the number that decided it (None: not measured)."""

    claim: Claim
    verdict: str
    number: Number | None

    @property
    def within_chance(self) -> bool:
        """Whether the number's interval also holds numbers of the other verdict."""
        if self.number is None or math.isnan(self.number.low):
            return False
        low, high = self.number.low, self.number.high
        holds = RULES[self.claim.word].holds
        nearest = min(max(0.0, low), high)  # to zero: "within" holds between its ends
        return len({holds(x, self.claim.bound) for x in (low, nearest, high, self.number.value)}) > 1


@dataclass(frozen=True)
class Finding:
    """A finding of README.md: its sentence there, and the ids of the claims that it rests on."""

    sentence: str
    claims: tuple[str, ...]


def ledger() -> tuple[tuple[Claim, ...], tuple[Finding, ...]]:
    """All claims and findings of the kit's ledger.

    Raises:
        ParameterError: see ``read``.
    """
    return read(paths.claims())


@lru_cache(maxsize=4)
def read(path: Path) -> tuple[tuple[Claim, ...], tuple[Finding, ...]]:
    """The claims and findings of a ledger.

    Raises:
        ParameterError: the file cannot be read, or a claim has an unknown word; one line that names the claim.
    """
    try:
        content = yaml.safe_load(path.read_text())
        entries, findings = content["claims"], content["findings"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ParameterError(f"{path.name}: cannot be read ({type(error).__name__})") from None
    claims = tuple(_claim(path.name, entry) for entry in entries)
    known = [claim.id for claim in claims]
    if len(set(known)) < len(known):
        raise ParameterError(f"{path.name}: ids must differ")
    for name in (name for finding in findings for name in finding["claims"]):
        _known(f"{path.name}: findings", name, known)
    return claims, tuple(Finding(one["sentence"], tuple(one["claims"])) for one in findings)


def claims_of(artefact: str) -> list[Claim]:
    """The claims on an artefact, in the ledger's order."""
    return [claim for claim in ledger()[0] if claim.artefact == artefact]


def _known(where: str, value: Any, names: Any) -> None:
    if value not in names:
        raise ParameterError(f"{where}: must be one of {', '.join(names)}{did_you_mean(value, names)}, got {value!r}")


FIELDS = ("id", "claim", "source", "artefact", "rule", "expected")
CELLS = ("of", "take", "minus", "share_of")


def _claim(file: str, entry: Any) -> Claim:
    name = entry.get("id", "a claim without id") if isinstance(entry, dict) else "an entry"
    where = f"{file}: {name}"
    if not isinstance(entry, dict) or set(entry) != set(FIELDS):
        raise ParameterError(f"{where}: needs exactly {', '.join(FIELDS)}")
    _known(f"{where}: artefact", entry["artefact"], list(EVERY))
    rule = entry["rule"] if isinstance(entry["rule"], dict) else {}
    words = [word for word in rule if word not in CELLS]
    _known(f"{where}: rule", words[0] if words else None, list(RULES))
    bound = rule[words[0]]
    if len(words) != 1 or isinstance(bound, bool) or not isinstance(bound, int | float):
        raise ParameterError(f"{where}: rule: needs one word with a number")
    for word in entry["expected"].values():
        _known(f"{where}: expected", word, list(EXPECTED))
    cells = {key: value for key, value in rule.items() if key in CELLS}
    _check_cells(where, cells)
    values = {key: entry[key] for key in ("id", "claim", "source", "artefact", "expected")}
    return Claim(word=words[0], bound=float(bound), cells=cells, **values)


def _check_cells(where: str, quantity: Any) -> None:
    if isinstance(quantity, list):
        if len(quantity) != 2 or not all(isinstance(part, str | list) for part in quantity):
            raise ParameterError(f"{where}: rule: a cell is [row, metric], got {quantity}")
        return
    if not isinstance(quantity, dict) or "of" not in quantity or not set(quantity) <= set(CELLS):
        raise ParameterError(f"{where}: rule: a quantity has {', '.join(CELLS)}, got {quantity}")
    if "take" in quantity:
        _known(f"{where}: rule: take", quantity["take"], list(TAKE))
    for key in ("of", "minus", "share_of"):
        if key in quantity:
            _check_cells(where, quantity[key])


def judge(claim: Claim, numbers: Numbers, params: Params) -> Judged:
    """The verdict of numbers, by (row, metric), on a claim; a NaN counts as not measured."""
    measured = {key: number for key, number in numbers.items() if not math.isnan(number.value)}
    rule, found = RULES[claim.word], _quantity(claim.cells, measured, params)
    chosen = _steps(found, by_row=_is_pattern(claim.cells["of"][1])) if rule.series else list(found.values())
    chosen = [number for number in chosen if not math.isnan(number.value)]
    if not chosen:
        return Judged(claim, UNMEASURED, None)
    decides = rule.decides(chosen)
    return Judged(claim, HOLDS if rule.holds(decides.value, claim.bound) else FAILS, decides)


def _steps(numbers: Numbers, by_row: bool) -> list[Number]:
    """The differences of successive numbers, within each row or within each metric."""
    series: dict[str, list[Number]] = {}
    for (row, metric), number in numbers.items():
        series.setdefault(row if by_row else metric, []).append(number)
    return [after - before for one in series.values() for before, after in pairwise(one)]


def _is_pattern(part: str | list[str]) -> bool:
    return isinstance(part, list) or any(sign in part for sign in "*?")


def _quantity(quantity: Any, numbers: Numbers, params: Params) -> dict[Key, Number]:
    """The numbers of a cell, or of a mapping with ``of``; of a pattern, those that have a partner to subtract."""
    if isinstance(quantity, list):
        return _cells(quantity, numbers, params)
    found = _quantity(quantity["of"], numbers, params)
    for word, apply in (("minus", Number.__sub__), ("share_of", Number.__truediv__)):
        if word in quantity:
            others = _quantity(quantity[word], numbers, params)
            pairs = {key: _partner(quantity[word], key, others) for key in found}
            found = {key: apply(found[key], others[other]) for key, other in pairs.items() if other is not None}
    if "take" in quantity and found:
        return {ALL: TAKE[quantity["take"]](list(found.values()))}
    return found


def _partner(quantity: Any, key: Key, others: Mapping[Key, Number]) -> Key | None:
    """The cell to subtract: that of the same row or metric where the quantity has a pattern there."""
    if isinstance(quantity, dict) and "take" in quantity:
        return next(iter(others), None)
    cell = quantity if isinstance(quantity, list) else quantity["of"]
    same = [index for index in (0, 1) if _is_pattern(cell[index])]
    return next((other for other in others if all(other[index] == key[index] for index in same)), None)


def _cells(cell: Sequence[str | list[str]], numbers: Numbers, params: Params) -> dict[Key, Number]:
    rows, metrics = (part if isinstance(part, list) else [part] for part in cell)
    rows, metrics = [_row(name, params) for name in rows], [_metric(name, params) for name in metrics]
    return {
        key: Number(number.value, number.low, number.high, (key,))
        for key, number in numbers.items()
        if any(fnmatchcase(key[0], name) for name in rows) and any(fnmatchcase(key[1], name) for name in metrics)
    }


def _row(name: str, params: Any) -> str:
    kind, _, which = name.partition("@")
    if which == "near":
        return nearest_row(kind, params)
    return weighted_row(kind, params.lambda_isd) if which == "isd" else name


def _metric(name: str, params: Any) -> str:
    kind, separator, which = name.partition("@")
    kind = f"pgd{params.pgd_steps}" if kind == "robust" else kind
    return kind + separator + (f"{max(params.radii):g}" if which == "last" else which)
