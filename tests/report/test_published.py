"""How two values are compared, and what the published tables say of the ledger of claims and of the pages."""

import json
import math
import re

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm, ttest_ind

from kdiga_nb import paths
from kdiga_nb.artifacts import EVERY
from kdiga_nb.artifacts.claims import RULES, claims_of, ledger
from kdiga_nb.audit.verdict import TELLING
from kdiga_nb.metrics import proportion
from kdiga_nb.notebooks import load
from kdiga_nb.params import at_scale
from kdiga_nb.report.numbers import interval
from kdiga_nb.report.published import AGREES, agrees, difference_test
from kdiga_nb.report.verdicts import TITLE_WIDTH, Verdicts, headline
from kdiga_nb.report.verify import verify

NAN = math.nan
SCALES = ["digits", "cifar10_cpu", "cifar10_short"]


@pytest.mark.parametrize(
    ("values", "holds"),
    [
        ((50.0, 50.0, 40.0, 60.0), True),
        ((60.0, 50.0, 40.0, 60.0), True),
        ((39.99, 50.0, 40.0, 60.0), False),
        ((60.01, 50.0, 40.0, 60.0), False),
        ((0.4772, 0.4811, NAN, NAN), True),
        ((0.47, 0.49, NAN, NAN), False),
        ((0.0, 0.0, NAN, NAN), True),
        ((3.0, 0.0, NAN, NAN), False),
        ((-1.5, 1.5, NAN, NAN), False),
    ],
)
def test_a_value_agrees_inside_the_interval_or_to_two_digits(values: tuple[float, ...], holds: bool) -> None:
    assert agrees(*values) is holds


def entry(**numbers: float) -> dict[str, float]:
    return {"n": 0, "n_own": 0, "seeds": 3, "seeds_own": 3} | numbers


def test_the_test_of_two_means_over_seeds_is_welchs() -> None:
    draw = np.random.default_rng(0)
    a, b = draw.normal(1.0, 0.1, 3), draw.normal(1.3, 0.4, 5)
    (value, low, high), (own, low_own, high_own) = interval(list(a)), interval(list(b))
    p = difference_test(
        entry(value=value, low=low, high=high, value_own=own, low_own=low_own, high_own=high_own, seeds_own=5), False
    )
    assert p == pytest.approx(ttest_ind(a, b, equal_var=False)[1], rel=1e-6)


@pytest.mark.parametrize("own", [0.40, 0.45, 0.50])
def test_the_test_of_two_single_nets_is_that_of_two_proportions(own: float) -> None:
    n = 2000
    one, other = (proportion(round(share * n), n) for share in (0.40, own))
    numbers = {"value": one.percent, "low": one.low, "high": one.high}
    numbers |= {"value_own": other.percent, "low_own": other.low, "high_own": other.high, "seeds": 1, "seeds_own": 1}
    p = difference_test(entry(**numbers, n=n, n_own=n), True)
    z = (own - 0.40) / math.sqrt(0.4 * 0.6 / n + own * (1 - own) / n)
    assert norm.isf(p / 2) == pytest.approx(z, rel=0.02, abs=1e-9)


def test_equal_values_without_any_error_do_not_differ_and_others_do() -> None:
    alike = {"value": 0.0, "low": 0.0, "high": 0.0, "value_own": 0.0, "low_own": 0.0, "high_own": 0.0}
    assert difference_test(entry(**alike), False) == 1.0
    assert difference_test(entry(**alike | {"value_own": 1.0, "low_own": 1.0, "high_own": 1.0}), False) == 0.0
    assert math.isnan(difference_test(entry(**alike | {"low": NAN}), False))


@pytest.mark.parametrize("scale", SCALES)
def test_the_published_tables_agree_with_themselves_and_with_the_ledger(scale: str) -> None:
    result = verify(scale, {name: load(scale, name, {}) for name in EVERY}, own=False)
    assert len(result.values) > 100 and set(result.values["outcome"]) == {AGREES}
    assert result.problems == [] and result.reproduced
    expected = {line.judged.claim.id for line in result.claims if scale in line.judged.claim.expected}
    assert {line.judged.claim.id for line in result.measured} == expected


def test_the_papers_numbers_support_the_papers_claims() -> None:
    lines = verify("digits", {name: load("digits", name, {}) for name in EVERY}, own=False).claims
    supported = [line for line in lines if line.paper is not None and line.judged.claim.source != "kit"]
    assert len(supported) > 15
    for line in supported:
        rule = RULES[line.judged.claim.word]
        assert line.paper is not None and rule.holds(line.paper.value, line.judged.claim.bound), line.judged.claim.id


@pytest.mark.parametrize("scale", SCALES)
def test_the_page_has_the_table_of_verdicts(scale: str) -> None:
    """``kdiga verify --published --scale SCALE --markdown FILE`` writes the table."""
    result = verify(scale, {name: load(scale, name, {}) for name in EVERY}, own=False)
    table = Verdicts(result.claims).markdown()
    assert table in (paths.ROOT / "docs" / "verify.md").read_text(), f"docs/verify.md should hold\n{table}"


def test_every_finding_of_the_readme_rests_on_claims_of_the_ledger() -> None:
    text = (paths.ROOT / "README.md").read_text()
    found = [" ".join(bold.split()) for bold in re.findall(r"^\d\. \*\*(.*?)\*\*", text, re.MULTILINE | re.DOTALL)]
    assert found == [finding.sentence for finding in ledger()[1]]


@pytest.mark.parametrize("scale", SCALES)
def test_every_published_table_has_its_figure_and_provenance(scale: str) -> None:
    names = {path.name for path in paths.published(scale).iterdir()}
    tables = {name.removesuffix(".csv") for name in names if name.endswith(".csv")}
    assert tables
    assert {f"{table}.{kind}" for table in tables for kind in ("png", "json")} <= names


def test_plain_pgd_overstates_the_published_audit_of_one_net_alone() -> None:
    """docs/audit.md names ST as the net whose PGD-20 figure is too high, and KD as sound."""
    table = pd.read_csv(paths.published("digits") / "robustness_audit.csv").pivot(
        index="row", columns="metric", values="value"
    )
    overstated = table.index[table["pgd"] - table["autoattack"] > TELLING]
    assert list(overstated) == ["st"]
    text = " ".join((paths.ROOT / "docs" / "audit.md").read_text().split())
    for row, name in (("st", "ST"), ("kd", "KD")):
        pgd, autoattack = table.loc[row, "pgd"], table.loc[row, "autoattack"]
        assert f"{name}: {pgd:.1f} % under PGD-20, {autoattack:.1f} % under AutoAttack" in text


def test_the_pages_name_the_verdicts_of_the_audit() -> None:
    """README.md and docs/audit.md against the verdicts that the executed notebook prints, one line per net."""
    notebook = json.loads((paths.NOTEBOOKS / "robustness_audit.ipynb").read_text())
    outputs = [out for cell in notebook["cells"] for out in cell.get("outputs", [])]
    printed = "".join(line for out in outputs for line in out.get("text", []))
    verdicts = dict(re.findall(r"^(.+): plain PGD is .* points above AutoAttack; (\w+):", printed, re.MULTILINE))
    assert len(verdicts) == 5
    overstated = [label for label, word in verdicts.items() if word == "overstated"]
    assert overstated == ["student (ST)"] and sorted(verdicts.values()) == ["overstated"] + 4 * ["sound"]
    audit, readme = (" ".join((paths.ROOT / page).read_text().split()) for page in ("docs/audit.md", "README.md"))
    assert "ST: 40.0 % under PGD-20, 31.0 % under AutoAttack (verdict *overstated*" in audit
    assert "The audit calls the other four nets *sound*" in audit
    assert "the audit finds no net that hides its gradients" in readme
    assert not re.search(r"(overstate|overstated)[^.]*\bKD\b", readme)


@pytest.mark.parametrize("name", EVERY)
def test_a_figures_title_is_what_a_claim_comes_to(name: str) -> None:
    """With nothing in the store every finding is "not measured"; a line of a title is never too long for its figure."""
    experiment = EVERY[name].build(at_scale(EVERY[name].params, "digits"))
    for claim in claims_of(name):
        *finding, shown = headline(experiment, claim.id, "digits scale").splitlines()
        sentence = " ".join(finding)
        assert sentence[1:] == f"{claim.claim[1:]}: not measured" and sentence[0].lower() == claim.claim[0].lower()
        assert shown == "digits scale"
        assert max(map(len, finding)) <= TITLE_WIDTH
        assert min(map(len, finding)) > TITLE_WIDTH // 3  # no word alone in its line
    with pytest.raises(ValueError, match="claim must be one of"):
        headline(experiment, "no_claim", "digits scale")
