"""``kdiga verify``: a user's own results judged by the published numbers and by the ledger of claims."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from kdiga_nb import paths
from kdiga_nb.artifacts.claims import FAILS, HOLDS, UNMEASURED
from kdiga_nb.artifacts.table import Experiment
from kdiga_nb.report import published
from kdiga_nb.report.numbers import frame
from kdiga_nb.report.verdicts import Line, Verdicts, judge_all, unexpected, with_audit
from kdiga_nb.runs.graph import Job, graph_of, title
from kdiga_nb.runs.run import Run, run_key
from kdiga_nb.runs.store import damage, is_finished, is_published, measured

LISTED = 5  # problems that a summary names


@dataclass(frozen=True)
class Verification:
    """What ``verify`` found.

    Attributes:
        values: the frame of ``published.compare``, without ``taken``.
        taken: the same of the rows whose runs are all published ones: what is compared there is the publication.
        claims: the ledger's claims on the artefacts, judged.
        faults: damaged runs and measurements that contradict themselves, one line each.
        published: how many of the runs came from ``kdiga store pull``.
    """

    scale: str
    values: pd.DataFrame
    taken: pd.DataFrame
    claims: list[Line]
    faults: list[str]
    published: int

    @property
    def compared(self) -> list[Any]:
        """Every compared value as a dictionary, those of ``taken`` last."""
        return [*self.values.to_dict("records"), *self.taken.to_dict("records")]

    @property
    def measured(self) -> list[Line]:
        """The claims that have a verdict."""
        return [line for line in self.claims if line.judged.verdict != UNMEASURED]

    @property
    def problems(self) -> list[str]:
        """Why the results are not those that the kit publishes, one line each; chance is no problem."""
        differing = [entry for entry in self.compared if entry["outcome"] == published.DIFFERS]
        broken = [line.judged for line in self.claims if unexpected(line, self.scale)]
        return [
            *self.faults,
            *(f"differs: {_described(entry)}" for entry in differing),
            *(f"claim {one.claim.id} ({one.claim.claim}): {one.verdict}, published otherwise" for one in broken),
        ]

    @property
    def reproduced(self) -> bool:
        """Whether something was measured and nothing of it is a problem."""
        return bool(self.measured or self.compared) and not self.problems

    def summary(self, listed: int = LISTED) -> str:
        """The counts in two lines, and the first few problems; one line if nothing was measured."""
        if not self.measured and not self.compared and not self.faults:
            return f"verify {self.scale}: nothing is measured yet"
        inside, chance, differ, untested = (int((self.values["outcome"] == name).sum()) for name in OUTCOMES)
        verdicts = [line.judged.verdict for line in self.claims]
        lines = [
            f"verify {self.scale}: {inside} of {len(self.values)} values agree with the published ones, {chance} are "
            f"outside their interval by chance, {differ} differ, {untested} cannot be tested"
            if len(self.values)
            else f"verify {self.scale}: no values of your own to compare with the published ones",
            f"claims: {verdicts.count(HOLDS)} hold, {verdicts.count(FAILS)} do not hold, "
            f"{verdicts.count(UNMEASURED)} not measured; "
            f"{sum(unexpected(line, self.scale) for line in self.claims)} not as published",
        ]
        if self.published:
            again = int((self.taken["outcome"] == published.AGREES).sum())
            lines.append(
                f"{self.published} of the runs are published ones, not trained here; {again} of {len(self.taken)} "
                "values that rest on them alone are in the published tables"
            )
        lines += [f"  {problem}" for problem in self.problems[:listed]]
        if len(self.problems) > listed:
            lines.append(f"  and {len(self.problems) - listed} more: kdiga verify --scale {self.scale} lists them")
        return "\n".join(lines)

    def text(self) -> str:
        """The summary with every problem, the values outside by chance, and the claims that have a verdict."""
        others = [
            f"  {entry['outcome']}: {_described(entry)}"
            for entry in self.compared
            if entry["outcome"] in (published.CHANCE, published.UNTESTED)
        ]
        claims = [str(Verdicts(self.measured))] if self.measured else []
        return "\n".join([self.summary(len(self.problems)), *others, *claims])

    def markdown(self) -> str:
        """The same as a page, for a paper's appendix or an issue."""
        outside = [entry for entry in self.compared if entry["outcome"] != published.AGREES]
        table = [
            "| artefact | row | metric | own | published | p | outcome |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        table += [
            f"| {entry['artefact']} | {entry['row']} | {entry['metric']} | {entry['own']:g} | {_limits(entry)} | "
            f"{'–' if pd.isna(entry['p']) else format(entry['p'], '.2g')} | {entry['outcome']} |"
            for entry in outside
        ]
        head = "reproduced" if self.reproduced else "not reproduced"
        parts = [f"# {self.scale}: {head}", self.summary(len(self.problems)), Verdicts(self.claims).markdown()]
        return "\n\n".join(parts + (["\n".join(table)] if outside else [])) + "\n"

    def record(self) -> dict[str, Any]:
        """The same as plain JSON."""
        claims = [
            {
                "id": line.judged.claim.id,
                "claim": line.judged.claim.claim,
                "source": line.judged.claim.source,
                "artefact": line.judged.claim.artefact,
                "paper": None if line.paper is None else line.paper.value,
                "ours": None if line.judged.number is None else line.judged.number.value,
                "verdict": line.judged.verdict,
                "expected": line.judged.claim.expected_at(self.scale),
            }
            for line in self.claims
        ]
        values, taken = (
            part.astype(object).where(part.notna(), None).to_dict("records") for part in (self.values, self.taken)
        )
        shared = {"scale": self.scale, "reproduced": self.reproduced, "problems": self.problems}
        return shared | {"published_runs": self.published, "claims": claims, "values": values, "taken": taken}


OUTCOMES = (published.AGREES, published.CHANCE, published.DIFFERS, published.UNTESTED)


def _limits(entry: Any) -> str:
    limits = "" if pd.isna(entry["low"]) else f" [{entry['low']:g}, {entry['high']:g}]"
    return f"{entry['published']:g}{limits}"


def _described(entry: Any) -> str:
    p = "" if pd.isna(entry["p"]) else f", p = {entry['p']:.2g}"
    where = f"{entry['artefact']}, {entry['row']}, {entry['metric']}"
    return f"{where}: {entry['own']:g}, published {_limits(entry)}{p}"


def verify(scale: str, experiments: Mapping[str, Experiment | None], *, own: bool = True) -> Verification:
    """Judge what the run store has of some experiments, or, with ``own=False``, the published tables themselves."""
    known = {name: one for name, one in experiments.items() if one is not None}
    if not own:
        found = {name: path for name in known if (path := paths.published(scale) / f"{name}.csv").exists()}
        tables = {name: (known[name], pd.read_csv(path)) for name, path in found.items()}
        claims = [line for one, table in tables.values() for line in judge_all(one, table, paired=False)]
        return Verification(scale, published.compare(scale, tables), published.compare(scale, {}), claims, [], 0)
    tables = {name: (one, with_audit(frame(one), one)) for name, one in known.items()}
    claims = [line for one, table in tables.values() for line in judge_all(one, table)]
    graph = graph_of(job for one in known.values() for job in one.jobs())
    runs = [job.run for job in graph if isinstance(job.run, Run) and job.measure is None and is_finished(job.run)]
    faults = [
        f"run {run_key(run)} is damaged: {reason}"
        for run in runs
        if (reason := damage(run)) and not (is_published(run) and "not among" in reason)
    ]
    faults += dict.fromkeys(fault for job in graph if (fault := _contradiction(job)))
    values, taken = (
        published.compare(scale, {name: (one, _rows(one, table, pulled)) for name, (one, table) in tables.items()})
        for pulled in (False, True)
    )
    return Verification(scale, values, taken, claims, faults, sum(map(is_published, runs)))


def _rows(experiment: Experiment, table: pd.DataFrame, pulled: bool) -> pd.DataFrame:
    """The rows of a table whose runs are all published ones, or all other rows."""
    names = [row.id for row in experiment.rows if row.runs and all(map(is_published, row.runs))]
    return table[table["row"].isin(names) == pulled]


def _contradiction(job: Job) -> str | None:
    """What is wrong with a stored accuracy: it is not the share of its own mask."""
    result = measured(job.run, job.measure, reference=job.reference) if job.measure else None
    if result is None or "survivors" not in result:
        return None
    mask = str(result["survivors"])
    share = 100 * mask.count("1") / len(mask)
    if abs(share - float(result["percent"])) < 1e-6 and int(result["n"]) == len(mask):
        return None
    return f"run {run_key(job.run)}: {title(job)}: {result['percent']:.1f} %, but its images give {share:.1f} %"
