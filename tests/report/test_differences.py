"""The differences between rows that docs/results.md states, computed again from the published measurements."""

import json
import re

import pandas as pd
import pytest

from kdiga_nb import paths
from kdiga_nb.artifacts import combination_row, isd_factors, main_effects
from kdiga_nb.notebooks import load
from kdiga_nb.params import IsdSearchParams, at_scale, parse_override
from kdiga_nb.report import Difference, compare, holm
from kdiga_nb.report.numbers import value
from kdiga_nb.runs import shipped

# Scale, artefact, row, row subtracted, settings; by metric what the page says: points [low, high], p if stated.
DIFFERENCES = """
cifar10_cpu table1 kdiga isd_wit_1: clean 0.6 [0.2, 1.0] 0.002; pgd20 1.5 [1.0, 1.9] <; autoattack 1.8 [0.6, 3.0] 0.005
cifar10_cpu table1 kdiga:1 kdiga:0: clean 0.1 [−0.3, 0.4] 0.78; pgd20 0.3 [−0.2, 0.7] 0.25
cifar10_cpu table1 kdiga:1 kdiga:0: autoattack −0.8 [−2.0, 0.4] 0.26
cifar10_cpu table1 kdiga:2 kdiga:0: clean −0.1 [−0.4, 0.3] 0.82; pgd20 0.3 [−0.1, 0.7] 0.15
cifar10_cpu table1 kdiga:2 kdiga:0: autoattack −0.3 [−1.6, 1.0] 0.76
cifar10_cpu table1 pgd_student kdiga:1: autoattack 2.6 [0.7, 4.5] 0.01
cifar10_cpu table1 pgd_student kdiga:2: autoattack 2.1 [0.3, 3.9] 0.03
cifar10_cpu table1 kdiga_ard_c ard: pgd20 9.4 [8.8, 10.1] <
cifar10_cpu table1 ard kdiga_ard_c: clean 7.1 [6.5, 7.7] <
cifar10_cpu table1 kdiga_ard_c kdiga: clean 0.1 [−0.3, 0.4] 0.68; pgd20 0.7 [0.3, 1.1] <
cifar10_cpu table1 kdiga_ard_c kdiga:1: pgd20 0.5 [0.1, 0.9] 0.03
cifar10_cpu table1 kdiga_ard_c kdiga:2: pgd20 0.4 [0.0, 0.8] 0.06
cifar10_cpu table1 pgd_student kdiga_ard_c: pgd20 1.1 [0.5, 1.7] <
cifar10_cpu table1 kdiga_ard_c pgd_student: clean 2.5 [2.0, 3.1] <
cifar10_cpu table1 trades_teacher igam_mnist: clean 0.3 [−0.4, 0.9] 0.44; pgd20 13.6 [12.8, 14.4] <
cifar10_cpu table1 trades_teacher igam_mnist: autoattack 15.1 [12.8, 17.5] <
cifar10_cpu table1 kdiga igam_mnist: clean 2.3 [1.7, 3.0] <; pgd20 11.7 [10.9, 12.4] <; autoattack 13.1 [10.8, 15.4] <
cifar10_cpu table1 penalty igam_mnist: clean 5.0 [4.3, 5.6] <
cifar10_cpu table1 igam_mnist penalty: pgd20 1.5 [0.8, 2.2] <; autoattack 3.7 [1.7, 5.7] <
cifar10_cpu table1 isd_wit_2 isd_wit_1: clean 0.7 [0.4, 1.0] <
cifar10_cpu table1 isd_wit_1 isd_wit_2: pgd20 0.9 [0.6, 1.3] <
cifar10_cpu table1 kdiga isd_wit_2: pgd20 2.4 [1.9, 2.9] <
cifar10_cpu table1 pgd_student kdiga: pgd20 1.8 [1.2, 2.4] <; autoattack 1.8 [−0.1, 3.6] 0.07
cifar10_cpu table1 kdiga pgd_student: clean 2.5 [1.9, 3.0] <
cifar10_cpu table1 kdiga pgd_student lambda_iga=3: clean 0.8 [0.2, 1.3] 0.005; pgd20 −0.2 [−0.8, 0.4] 0.50
cifar10_cpu table1 ard kd: pgd20 33.9 [33.0, 34.8] <; autoattack 27.7 [25.0, 30.5] <
cifar10_cpu table1 kdiga ard: pgd20 8.7 [8.0, 9.4] <; autoattack 11.0 [8.8, 13.2] <
cifar10_cpu table1 ard kdiga: clean 7.1 [6.6, 7.7] <
cifar10_cpu table1 kdiga ard lambda_iga=0.3: pgd20 1.6 [1.0, 2.1] <
cifar10_cpu table1 ard kdiga lambda_iga=0.3: clean 4.0 [3.5, 4.5] <
cifar10_cpu table1 ard kdiga lambda_iga=0.1: clean 0.3 [−0.1, 0.8] 0.20; pgd20 11.9 [11.2, 12.6] <
cifar10_cpu table1 ard kdiga lambda_iga=0.1: autoattack 12.2 [10.2, 14.3] <
cifar10_cpu table1 ard kdiga_zero: clean 3.2 [2.6, 3.7] <; pgd20 2.5 [1.9, 3.1] <
cifar10_cpu table1 ard kdiga_zero: autoattack 3.5 [1.8, 5.3] <
cifar10_cpu table1 trades_teacher pgd_student: clean 0.4 [−0.2, 1.0] 0.20; pgd20 0.0 [−0.6, 0.7] 0.93
cifar10_cpu table1 trades_teacher pgd_student: autoattack 0.2 [−1.8, 2.1] 0.92
cifar10_cpu table1 kdiga kd: autoattack 38.3 [35.4, 41.3]
cifar10_cpu table1 kdiga kdiga_zero: autoattack 14.5 [12.3, 16.8]
cifar10_cpu table1 kdiga penalty: autoattack 16.8 [14.3, 19.3]
cifar10_cpu table1 trades_teacher kdiga: autoattack 2.0 [0.6, 3.4]
cifar10_cpu table1 kdiga kdiga_shuffled: clean 2.3 [1.8, 2.9] <; pgd20 3.5 [2.9, 4.1] <; autoattack 6.3 [4.6, 8.1] <
cifar10_cpu alignment_or_penalty isd_wot_5 penalty_0p3: clean −0.3 [−0.8, 0.2] 0.31; pgd20 0.2 [−0.2, 0.6] 0.41
cifar10_cpu alignment_or_penalty penalty_0p3 isd_wot_4: pgd20 0.6 [0.2, 1.0] 0.01
cifar10_cpu alignment_or_penalty isd_wot_6 penalty_0p3: pgd20 1.2 [0.8, 1.6]
cifar10_cpu alignment_or_penalty penalty_0p3 isd_wot_6: clean 0.5 [0.0, 1.0] 0.05
cifar10_short baselines kdiga kd: pgd20 28.8 [26.8, 30.8]; autoattack 20.0 [14.7, 25.5]
cifar10_short baselines kdiga ard: pgd20 6.3 [4.9, 7.8]; autoattack 5.7 [2.0, 9.5] 0.001
cifar10_short baselines trades_student kdiga: pgd20 0.7 [−0.8, 2.2] 0.32; autoattack 3.0 [−0.5, 6.5] 0.09
cifar10_short baselines kd kdiga: clean 14.0 [12.0, 15.9]
cifar10_short baselines ard kdiga: clean 4.8 [3.0, 6.6]
cifar10_short baselines kdiga trades_student: clean 7.2 [5.8, 8.6]
cifar10_short table1 pgd_student kdiga: pgd20 3.2 [1.6, 5.0] <; autoattack 5.0 [0.0, 10.0] 0.08
cifar10_short table1 kdiga pgd_student: clean 13.0 [11.1, 14.9]
cifar10_short table1 kdiga_ard_c ard: pgd20 6.7 [5.2, 8.2]; autoattack 5.5 [1.5, 10.0] 0.02
cifar10_short table1 kdiga_ard_a ard: pgd20 7.6 [6.0, 9.2]; autoattack 7.5 [2.5, 12.5] 0.006
cifar10_short table1 kdiga_ard_c kdiga: pgd20 0.8 [−0.2, 1.7] 0.17
cifar10_short table1 kdiga_ard_a kdiga: pgd20 1.7 [0.6, 2.8] 0.004
cifar10_short table1 igam_mnist penalty_wide: clean 3.5 [2.0, 5.1] <; autoattack −3.0 [−8.0, 1.5] 0.31
cifar10_short table1 penalty_wide igam_mnist: pgd20 3.9 [2.4, 5.5] <
cifar10_short table1 kdiga igam_mnist: clean 3.2 [1.6, 4.7] <; pgd20 2.5 [1.1, 4.0] <
cifar10_short baselines kdiga kdiga_zero: pgd20 6.0 [4.9, 7.1] <; autoattack 4.8 [1.2, 8.5] 0.01
cifar10_short baselines kdiga penalty: pgd20 0.8 [−0.8, 2.3]; autoattack −0.2 [−4.3, 4.0]; clean 11.5 [9.9, 13.1]
cifar10_short table1 kdiga kdiga_shuffled: pgd20 −0.4 [−1.7, 1.0]; autoattack −0.5 [−4.5, 3.5]; clean 8.0 [6.5, 9.6]
cifar10_short baselines igdm kdiga: pgd20 4.2 [2.9, 5.5] <; autoattack 8.0 [3.5, 13.0] 0.002
cifar10_short baselines adaad kdiga: pgd20 1.7 [0.4, 3.0] 0.01
cifar10_short table1 kdiga pgd_student lambda_iga=3: pgd20 0.9 [−0.7, 2.6]; clean 11.5 [9.7, 13.2]
cifar10_short table1 kdiga pgd_student lambda_iga=3: autoattack 0.0 [−5.5, 5.5]
cifar10_short table1 kdiga trades_student lambda_iga=3: pgd20 2.5 [1.0, 4.0] 0.001; autoattack 2.0 [−2.5, 6.5]
cifar10_short table1 kdiga trades_student lambda_iga=3: clean 6.2 [4.6, 7.8]
cifar10_short isd_autoattack st isd_wot_6: clean 2.5 [1.1, 3.9]
cifar10_short isd_autoattack self_kd isd_wot_1: clean 1.8 [0.6, 3.0] 0.005
cifar10_short isd_autoattack isd_wot_1 isd_wot_1_zero: clean 18.1 [16.0, 20.2]
cifar10_short table4 isd_wot_6 isd_wot_6_no_dropout: pgd20 0.35 [0.1, 0.7] 0.016
cifar10_short table4 isd_wit_1_no_dropout isd_wit_1: clean 4.9 [3.6, 6.3]
cifar10_short table4 isd_wit_1 isd_wit_1_no_dropout: pgd20 −1.0 [−2.3, 0.3]
cifar10_short table4 isd_wit_3 isd_wit_1: clean 2.0 [0.9, 3.1]; pgd20 −0.4 [−1.5, 0.8]
cifar10_short table5 kdiga_fgsm fgsm_at: clean 0.1 [−1.3, 1.4]; pgd20 0.8 [−0.5, 2.1] 0.30
cifar10_short table5 kdiga_fgsm fgsm_at: autoattack 1.5 [−2.5, 5.5] 0.63
cifar10_short table5 kdiga_fgsm kdiga_plain: pgd20 2.9 [1.3, 4.4] <; autoattack 4.5 [−0.5, 9.5]
cifar10_short table5 kdiga_plain kdiga_fgsm: clean 10.4 [8.8, 12.1]
cifar10_short table5 kdiga_fgsm_perturbed fgsm_at: clean 4.0 [2.7, 5.4] <; pgd20 1.1 [−0.3, 2.5]
cifar10_short table5 kdiga_fgsm_perturbed fgsm_at: autoattack −2.0 [−6.0, 2.0]
cifar10_short table5 kdiga_fgsm_random kdiga_fgsm: clean 0.7 [−0.1, 1.5] 0.12; pgd20 −0.7 [−1.7, 0.2] 0.17
cifar10_short table5 kdiga_fgsm_random kdiga_fgsm: autoattack −1.0 [−3.0, 1.0] 0.63
cifar10_short table1 trades_teacher kdiga: pgd20 16.8 [14.9, 18.6] <; autoattack 21.0 [15.0, 27.0] <
cifar10_short table1 trades_teacher kdiga: clean 13.8 [12.0, 15.6] <
digits table1 kdiga kdiga_zero: pgd20 4.2 [2.2, 6.3] <; autoattack 4.0 [1.2, 7.6]
digits table1 kdiga penalty: pgd20 5.2 [3.2, 7.6] <; autoattack 8.2 [2.8, 14.8]
digits table1 isd_wot_1 isd_wot_1_zero: pgd20 0.0 [−0.6, 0.8]
digits table5 kdiga_fgsm_perturbed fgsm_at: pgd20 2.4 [0.6, 4.2] 0.008
digits table5 fgsm_at kdiga_fgsm_perturbed: clean 1.2 [0.4, 2.2]
digits alignment_or_penalty kdiga_zero_from_0 kd_from_0: pgd20 26.6 [19.5, 34.0]
digits alignment_or_penalty kdiga_from_0 kdiga_zero_from_0: pgd20 0.3 [−1.2, 1.8]; autoattack 1.0 [−1.4, 3.4]
digits alignment_or_penalty kdiga_zero_from_0p03 kd_from_0p03: pgd20 26.6 [19.3, 34.2]
digits alignment_or_penalty kdiga_from_0p03 kdiga_zero_from_0p03: pgd20 0.6 [0.0, 1.2] 0.07; autoattack 0.8 [−0.6, 3.0]
digits alignment_or_penalty kdiga_zero_1p5 kd: pgd20 22.3 [15.7, 29.5]
digits alignment_or_penalty kdiga_from_0 teacher_from_0: pgd20 15.8 [11.8, 19.9]; autoattack 20.8 [13.4, 28.6]
digits alignment_or_penalty kdiga_2 kdiga_zero_1p5: pgd20 4.9 [2.7, 7.4]; autoattack 5.2 [2.0, 9.0]
digits alignment_or_penalty kdiga_2 penalty_2: pgd20 5.9 [3.6, 8.5]; autoattack 9.4 [3.8, 16.6]
digits baselines rslad kdiga: pgd20 3.7 [2.2, 5.4] <
digits baselines iad kdiga: pgd20 4.0 [2.4, 5.7] <
digits baselines adaad kdiga: pgd20 3.4 [1.6, 5.3] <
digits baselines igdm kdiga: pgd20 4.4 [2.6, 6.4] <
digits baselines saad kdiga: pgd20 4.9 [3.0, 6.8] <
digits baselines saad igdm: pgd20 0.5 [−0.8, 2.0]
digits baselines penalty isd_wot_1: pgd20 3.5 [0.5, 6.9] 0.02
digits baselines penalty isd_wot_6: pgd20 7.6 [4.6, 10.5]
"""
# Choice of the search, metric, whether the page states the loss, and what it says.
EFFECTS = [
    ("init", "pgd20", False, "7.4 [0.5, 14.3]"),
    ("init", "clean", True, "17.9 [2.1, 33.8]"),
    ("first teacher", "clean", True, "22.9 [7.0, 38.7]"),
    ("first teacher", "pgd20", False, "−2.1 [−9.1, 4.8]"),
]
STATED = re.compile(r"(\w+) (−?[\d.]+) \[(−?[\d.]+), (−?[\d.]+)\] ?(<|[\d.]+)?")
PARTS = (line.partition(": ") for line in DIFFERENCES.strip().split("\n"))
LINES = [(names.split(), STATED.findall(stated)) for names, _, stated in PARTS]


def number(text: str) -> float:
    return float(text.replace("−", "-"))


def differs(found: Difference, points: str, low: str, high: str, p: str) -> bool:
    """Whether a comparison differs from what the page says.

    A bootstrap's numbers may differ by one in the last digit, because they depend on the order of the rows.
    """
    unit = 10.0 ** -len(p.partition(".")[2])
    return (
        abs(found.points - number(points)) > 0.051
        or max(abs(found.low - number(low)), abs(found.high - number(high))) > 0.151
        or (p == "<" and found.p >= 0.001)
        or (p not in ("", "<") and abs(found.p - float(p)) > (0.51 if found.seeds == 1 else 1.01) * unit)
    )


@pytest.fixture(scope="module")
def page() -> str:
    return " ".join((paths.ROOT / "docs" / "results.md").read_text().split())


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, tuple[str, ...], Difference]]:
    """What is compared, what the page says of it, and the comparison."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDIGA_RUNS", str(tmp_path_factory.mktemp("runs")))
        for scale in ("digits", "cifar10_cpu", "cifar10_short"):
            shipped.pull(scale)
        for (scale, artefact, row, other, *settings), stated in LINES:
            experiment = load(scale, artefact, dict(map(parse_override, settings)))
            assert experiment is not None
            for metric, *says in stated:
                words = f"{scale} {artefact} {row} − {other}, {metric}"
                found.append((words, tuple(says), compare(experiment, row, other, metric)))
    return found


def test_a_stated_difference_is_that_of_the_published_measurements(
    page: str, measured: list[tuple[str, tuple[str, ...], Difference]]
) -> None:
    page = page.replace(" points", "")
    wrong = [
        f"{words}: {says}, and it is {found}"
        for words, says, found in measured
        if differs(found, *says) or "{} [{}, {}]".format(*says) not in page
    ]
    assert not wrong, "\n".join(wrong)


def test_how_many_differences_remain_after_correction_for_their_number(
    page: str, measured: list[tuple[str, tuple[str, ...], Difference]]
) -> None:
    values = [found.p for *_, found in measured]
    remain = [p for p, corrected in zip(values, holm(values), strict=True) if corrected < 0.05]
    small = sum(p < 0.05 for p in values)
    assert max(remain) < 0.00105
    assert f"{len(values)} differences with an interval, of which {small} have p < 0.05" in page
    assert f"over all {len(values)}), {len(remain)} do, each with p ≤ 0.001" in page


@pytest.mark.parametrize(("choice", "metric", "cost", "stated"), EFFECTS)
def test_a_stated_main_effect_is_that_of_the_published_search(
    choice: str, metric: str, cost: bool, stated: str
) -> None:
    table = pd.read_csv(paths.published("cifar10_cpu") / "isd_search.csv")
    results = [value(table, combination_row(n), metric) for n in range(1, 17)]
    effects = main_effects(isd_factors(at_scale(IsdSearchParams, "cifar10_cpu")), results)
    (one,) = (effect for effect in effects if effect.factor.name == choice)
    found = (-one.points, -one.high, -one.low) if cost else (one.points, one.low, one.high)
    assert [number(text) for text in re.findall(r"−?[\d.]+", stated)] == pytest.approx(found, abs=0.051)


def test_every_interval_of_the_page_is_tested() -> None:
    """Outside the tables: of differences, of main effects, of AutoAttack on all digits."""
    saved = json.loads((paths.ROOT / "benchmarks" / "results" / "autoattack_all_images.json").read_text())["result"]
    tested = {(low, high) for _, stated in LINES for _, _, low, high, _ in stated}
    tested |= {tuple(re.findall(r"−?[\d.]+", stated)[1:]) for *_, stated in EFFECTS}
    for one in saved["differences"].values():
        for low, high in ((one["low"], one["high"]), (-one["high"], -one["low"])):
            tested.add((f"{low:.1f}".replace("-", "−"), f"{high:.1f}".replace("-", "−")))
    prose = [line for line in (paths.ROOT / "docs" / "results.md").read_text().splitlines() if line[:1] != "|"]
    written = re.findall(r"\[(−?[\d.]+), (−?[\d.]+)\]", " ".join(prose))
    assert {*written} - tested == {("0.2", "0.7"), ("0", "1")}  # ISD-WoT-6 in short trainings; the range of a pixel
