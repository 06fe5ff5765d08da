"""Paired comparisons against closed forms: McNemar's test and the variance of a mean of paired differences."""

import re
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binom

from kdiga_nb.artifacts.table import Cell, Experiment, Row
from kdiga_nb.measures import TestAccuracy
from kdiga_nb.methods import ST
from kdiga_nb.params import Params, at_scale
from kdiga_nb.report import compare, differences, holm
from kdiga_nb.runs.graph import Job
from kdiga_nb.runs.run import Run, folder, measure_name
from kdiga_nb.runs.store import write_json
from kdiga_nb.training import Schedule

RUN = Run("digits", "digits_small", ST(), Schedule(1))
CLEAN = TestAccuracy(None, needs_mask=True)


def stored(rows: dict[str, list[str | None]], key: str = "survivors") -> Experiment:
    """An experiment whose rows were measured with these masks, one per seed; None: not measured."""
    made = []
    for name, masks in rows.items():
        runs = tuple(replace(RUN, seed=100 * ord(name) + seed) for seed in range(len(masks)))
        for run, mask in zip(runs, masks, strict=True):
            if mask is not None:
                folder(run).mkdir(parents=True)
                result = {"percent": 100 * mask.count("1") / len(mask), "n": len(mask), key: mask}
                write_json(folder(run) / "measures.json", {measure_name(CLEAN): result})
        measure = replace(CLEAN, needs_mask=key == "survivors")
        made.append(Row(name, name, runs, (Cell("clean", tuple(Job(run, measure) for run in runs)),)))
    return Experiment("table", "A table", tuple(made), at_scale(Params, "smoke"))


def test_one_seed_is_mcnemars_exact_test() -> None:
    """On 100 images, a alone is right on 12 and b alone on 3: p = 2·P(Bin(15, ½) ≤ 3)."""
    a, b = "1" * 70 + "1" * 12 + "0" * 3 + "0" * 15, "1" * 70 + "0" * 12 + "1" * 3 + "0" * 15
    found = compare(stored({"a": [a], "b": [b]}), "a", "b", "clean")
    assert (found.points, found.n, found.seeds) == (pytest.approx(9.0), 100, 1)
    assert found.p == pytest.approx(2 * binom.cdf(3, 15, 0.5))
    # The bootstrap over images has the standard error of a mean of differences in {−1, 0, 1}.
    error = 100 * np.sqrt((0.15 - 0.09**2) / 100)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.08)


def test_a_row_does_not_differ_from_itself_and_the_order_changes_the_sign() -> None:
    draw = np.random.default_rng(1)
    masks = {name: ["".join(draw.choice(["0", "1"], 60)) for _ in range(3)] for name in "ab"}
    experiment = stored({name: list(one) for name, one in masks.items()})
    same = compare(experiment, "a", "a", "clean")
    assert (same.points, same.low, same.high, same.p) == (0, 0, 0, 1)
    one, other = compare(experiment, "a", "b", "clean"), compare(experiment, "b", "a", "clean")
    assert one.points == pytest.approx(-other.points) and one.seeds == 3
    assert (one.low, one.high) == (pytest.approx(-other.high), pytest.approx(-other.low))


def test_seeds_that_disagree_widen_the_interval() -> None:
    agree = stored({"a": [("1" * 9 + "0") * 50] * 3, "b": [("1" * 6 + "0" * 4) * 50] * 3})
    narrow = compare(agree, "a", "b", "clean")
    apart = stored({"c": ["1" * 500, "1" * 500, ("1" * 7 + "000") * 50], "d": [("1" * 6 + "0000") * 50] * 3})
    wide = compare(apart, "c", "d", "clean")
    assert narrow.points == pytest.approx(30) and wide.points == pytest.approx(30)
    assert wide.high - wide.low > narrow.high - narrow.low


def test_seeds_are_paired_by_their_place_though_some_are_not_measured() -> None:
    """Seed 1 is measured in both rows: there a is right on 10 images more. Beside seed 2 of b the difference is −50."""
    a, b = "1" * 50 + "0" * 50, "1" * 40 + "0" * 60
    found = compare(stored({"a": [None, a, None], "b": [a, b, "1" * 100]}), "a", "b", "clean")
    assert (found.points, found.seeds) == (pytest.approx(10), 1)


def test_one_net_of_a_row_is_named_by_its_seed() -> None:
    """Row a has seeds 9700 to 9702 (ord(a) = 97), right on 50, 40 and 90 images; row b has 9800, c 9900 and 9901."""
    masks = ["1" * right + "0" * (100 - right) for right in (50, 40, 90)]
    experiment = stored({"a": list(masks), "b": [masks[1]], "c": [masks[0], masks[2]]})
    for a, b, points in (("a:9702", "b", 50), ("a:9701", "b:9800", 0), ("a:9700", "a:9702", -40), ("c:9901", "b", 50)):
        found = compare(experiment, a, b, "clean")
        assert (found.points, found.seeds) == (pytest.approx(points), 1), (a, b)
    for a, b, words in (
        ("a:9700", "c", "a:9700 is one net and c has 2 seeds; name one, as in c:0"),
        ("a", "b:9800", "b:9800 is one net and a has 3 seeds; name one, as in a:0"),
        ("a:7", "b", "a: seed must be one of 9700, 9701, 9702, got 7"),
        ("a:x", "b", "a:x: a seed is a whole number, as in a:0"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            compare(experiment, a, b, "clean")


def test_holms_correction() -> None:
    """The smallest of n is multiplied by n, the next by n − 1, …; none falls below one before it, none exceeds 1."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6, 0.7]) == [1, 1, 1] and holm([]) == []


def test_differences_are_marked_before_and_after_correction() -> None:
    """McNemar's p: 2·2^−12 for 12 images to 0, 2·2^−7 = 0.016 for 7 to 0, 1 for none; three in the table."""
    base = "1" * 50 + "0" * 50
    rows: dict[str, list[str | None]] = {"a": [base], "b": ["0" * 12 + base[12:]], "c": ["0" * 7 + base[7:]]}
    experiment = stored(rows | {"d": [base], "e": [None]})
    pairs = {"a − b": ("a", "b"), "c − a": ("c", "a"), "a − d": ("a", "d"), "e − a": ("e", "a")}
    table = differences(experiment, pairs, ["clean"])
    assert list(table.index) == list(pairs)
    marked = [text.partition(" [")[0] for text in table["clean"]]
    assert marked == ["+12.0**", "-7.0**", "+0.0", "not run"]  # 0.016 · 2 = 0.031
    more = differences(experiment, pairs | {f"a − d, {n}": ("a", "d") for n in range(2)}, ["clean"])
    assert more["clean"].iloc[1].startswith("-7.0* [")  # 0.016 · 4 = 0.062
    assert "<small" in table._repr_html_()  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize(
    ("rows", "key", "words"),
    [
        ({"a": ["11"], "b": ["110"]}, "survivors", "a and b were measured on different numbers of images: [2, 3]"),
        ({"a": ["11"], "b": [None]}, "survivors", "b: clean is not measured"),
        ({"a": ["11", "110"], "b": ["11", "11"]}, "survivors", "different numbers of images: [2, 3]"),
        (
            {"a": ["11", None], "b": [None, "11"]},
            "survivors",
            "a and b: no seed has clean measured in both",
        ),
        ({"a": ["11"], "b": ["10"]}, "mask", "a: clean was measured without a mask of survivors; measure again"),
    ],
)
def test_rows_that_cannot_be_paired_are_refused(rows: dict[str, list[str | None]], key: str, words: str) -> None:
    experiment = stored(rows, key)
    with pytest.raises(ValueError, match=re.escape(words)):
        compare(experiment, "a", "b", "clean")
    with pytest.raises(KeyError, match="a has no metric pgd20"):
        compare(experiment, "a", "b", "pgd20")
