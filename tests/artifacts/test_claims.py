"""The ledger of claims: its vocabulary, judged by hand, and ledgers that are refused."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from kdiga_nb import paths
from kdiga_nb.artifacts.claims import (
    EXPECTED,
    FAILS,
    HOLDS,
    RULES,
    UNMEASURED,
    Claim,
    Judged,
    Number,
    judge,
    ledger,
    read,
)
from kdiga_nb.params import AlignmentParams, ParameterError, Table1Params, Table6Params, at_scale, scales

TABLE = {
    ("a", "clean"): 90.0,
    ("a", "pgd20"): 60.0,
    ("a", "autoattack"): 50.0,
    ("b", "clean"): 80.0,
    ("b", "pgd20"): 40.0,
    ("b", "autoattack"): 40.0,
    ("loop_1", "pgd20"): 10.0,
    ("loop_2", "pgd20"): 30.0,
    ("loop_3", "pgd20"): 25.0,
    ("missing", "pgd20"): math.nan,
}
ENTRY: dict[str, Any] = {
    "id": "one",
    "claim": "one is more robust",
    "source": "kit",
    "artefact": "table1",
    "rule": {"more_than": 0, "of": ["a", "robust"]},
    "expected": {"digits": "holds"},
}


def claim(rule: dict[str, Any]) -> Claim:
    (word,) = set(rule) & set(RULES)
    cells = {key: value for key, value in rule.items() if key != word}
    return Claim("one", "one", "kit", "table1", word, rule[word], cells, {})


@pytest.mark.parametrize(
    ("rule", "verdict", "value"),
    [
        ({"at_least": 60, "of": ["a", "robust"]}, HOLDS, 60),
        ({"more_than": 60, "of": ["a", "robust"]}, FAILS, 60),
        ({"at_most": 60, "of": ["a", "robust"]}, HOLDS, 60),
        ({"less_than": 60, "of": ["a", "robust"]}, FAILS, 60),
        ({"within": 15, "of": ["b", "robust"], "minus": ["a", "robust"]}, FAILS, -20),
        ({"within": 20, "of": ["b", "robust"], "minus": ["a", "robust"]}, HOLDS, -20),
        ({"more_than": 0.5, "of": ["a", "robust"], "share_of": ["a", "clean"]}, HOLDS, 60 / 90),
        ({"at_least": 30, "of": ["loop_?", "robust"]}, FAILS, 10),
        ({"at_least": 30, "of": ["loop_?", "robust"], "take": "best"}, HOLDS, 30),
        ({"at_most": 10, "of": ["loop_?", "robust"], "take": "worst"}, HOLDS, 10),
        ({"at_least": 22, "of": [["loop_2", "loop_3", "loop_1"], "robust"], "take": "mean"}, FAILS, 65 / 3),
        ({"at_least": 65, "of": ["loop_?", "robust"], "take": "sum"}, HOLDS, 65),
        ({"rises_by": 0, "of": ["loop_?", "robust"]}, FAILS, -5),
        ({"falls_by": 0, "of": ["loop_?", "robust"]}, FAILS, 20),
        ({"falls_by": 10, "of": ["a", "*"]}, HOLDS, -10),
        ({"less_than": 15, "of": ["*", "robust"], "minus": ["*", "autoattack"]}, HOLDS, 10),
        (
            {"at_least": 0.5, "of": {"of": ["a", "robust"], "minus": ["b", "robust"]}, "share_of": ["b", "clean"]},
            FAILS,
            0.25,
        ),
        ({"at_least": 0, "of": ["missing", "robust"]}, UNMEASURED, None),
        ({"at_least": 0, "of": ["a", "robust"], "minus": ["missing", "robust"]}, UNMEASURED, None),
        ({"at_least": 0, "of": ["nobody", "robust"]}, UNMEASURED, None),
    ],
    ids=str,
)
def test_the_rules_give(rule: dict[str, Any], verdict: str, value: float | None) -> None:
    numbers = {key: Number(number) for key, number in TABLE.items()}
    judged = judge(claim(rule), numbers, at_scale(Table1Params, "digits", {}))
    assert judged.verdict == verdict
    assert judged.number is None if value is None else judged.number is not None and judged.number.value == value


def test_differences_add_their_errors_in_quadrature() -> None:
    number = Number(50, 47, 54) - Number(30, 27, 34)
    assert (number.value, number.low, number.high) == (20, 15, 25)


def test_a_scales_own_weights_and_radii_are_filled_in() -> None:
    params = at_scale(AlignmentParams, "cifar10_cpu", {})
    numbers = {("kdiga_1", "pgd20"): Number(4.0), ("isd_wot_1_1", "pgd20"): Number(5.0)}
    for row, value in (("kdiga@near", 4), ("isd_wot_1@isd", 5)):
        judged = judge(claim({"at_least": 0, "of": [row, "robust"]}), numbers, params)
        assert judged.number is not None and judged.number.value == value
    radii = at_scale(Table6Params, "digits", {"radii": [0.05, 0.2]})
    judged = judge(claim({"at_least": 0, "of": ["a", "autoattack@last"]}), {("a", "autoattack@0.2"): Number(7)}, radii)
    assert judged.number is not None and judged.number.value == 7


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rule": {"more_then": 0, "of": ["a", "robust"]}}, r"one: rule: must be one of .*mean more_than\?.*more_then"),
        ({"rule": {"of": ["a", "robust"]}}, "one: rule: must be one of at_least"),
        ({"rule": {"at_least": "x", "of": ["a", "robust"]}}, "one: rule: needs one word with a number"),
        ({"rule": {"at_least": 0, "at_most": 1, "of": ["a", "robust"]}}, "one: rule: needs one word with a number"),
        ({"rule": {"at_least": 0, "of": ["a"]}}, r"one: rule: a cell is \[row, metric\]"),
        ({"rule": {"at_least": 0}}, "one: rule: a quantity has of, take, minus, share_of"),
        ({"rule": {"at_least": 0, "of": ["a", "robust"], "take": "median"}}, "one: rule: take: must be one of best"),
        ({"artefact": "table9"}, r"one: artefact: must be one of .*did you mean table\d\?"),
        ({"expected": {"digits": "maybe"}}, "one: expected: must be one of holds, fails, open"),
        ({"extra": 1}, "one: needs exactly id, claim, source, artefact, rule, expected"),
    ],
    ids=str,
)
def test_a_claim_that_cannot_be_judged_is_refused_in_one_line(changes: Any, says: str, tmp_path: Path) -> None:
    path = tmp_path / "claims.yaml"
    path.write_text(yaml.safe_dump({"claims": [ENTRY | changes], "findings": []}))
    with pytest.raises(ParameterError, match=says) as error:
        read(path)
    assert "\n" not in str(error.value) and str(error.value).startswith("claims.yaml: ")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, r"cannot be read \(FileNotFoundError\)"),
        ("claims: [", r"cannot be read \(ParserError\)"),
        ("[]", "cannot be read"),
        (yaml.safe_dump({"claims": [ENTRY, ENTRY], "findings": []}), "ids must differ"),
        (yaml.safe_dump({"claims": [ENTRY], "findings": [{"sentence": "x", "claims": ["two"]}]}), "findings: .*'two'"),
    ],
)
def test_a_ledger_that_cannot_be_used_is_refused_in_one_line(text: str | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / "claims.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ParameterError, match=says) as error:
        read(path)
    assert "\n" not in str(error.value)


def test_the_kits_ledger_expects_verdicts_of_published_scales_alone() -> None:
    claims, findings = ledger()
    published = {scale for scale in scales() if paths.published(scale).is_dir()}
    assert {scale for one in claims for scale in one.expected} == published
    assert all(one.expected and set(one.expected.values()) <= set(EXPECTED) for one in claims)
    assert len({one.claim for one in claims}) == len(claims) and findings


@pytest.mark.parametrize(
    ("word", "bound", "number", "within_chance"),
    [
        ("more_than", 0, Number(0.5, -0.1, 1.2), True),
        ("more_than", 0, Number(4.2, 2.2, 6.3), False),
        ("more_than", 0, Number(1.0, 0.0, 2.0), True),  # 0 itself is not more than 0
        ("at_least", 0, Number(1.0, 0.0, 2.0), False),
        ("at_most", 5, Number(7.0, 5.1, 8.0), False),
        ("less_than", 5, Number(7.0, 4.9, 8.0), True),
        ("falls_by", 1, Number(-2.0, -3.0, -0.5), True),
        ("within", 10, Number(11.0, -12.0, 15.0), True),  # both ends fail, and 0 between them holds
        ("within", 10, Number(-12.0, -14.0, -11.0), False),
        ("at_least", 0, Number(1.0), False),  # no interval
    ],
)
def test_a_verdict_is_within_chance_if_its_interval_holds_both(
    word: str, bound: float, number: Number, within_chance: bool
) -> None:
    one = claim({word: bound, "of": ["a", "robust"]})
    verdict = HOLDS if RULES[word].holds(number.value, one.bound) else FAILS
    assert Judged(one, verdict, number).within_chance == within_chance


def test_what_is_not_measured_is_not_within_chance() -> None:
    assert not Judged(claim({"at_least": 0, "of": ["a", "robust"]}), UNMEASURED, None).within_chance
