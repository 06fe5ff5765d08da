"""``Cell``, ``Row``, ``Experiment``: a table before it is measured."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from kdiga_nb.methods import effective_lambda_iga
from kdiga_nb.params import Params
from kdiga_nb.runs.graph import Job
from kdiga_nb.runs.run import Run, Source

PerSeed = tuple[Run, ...]
Nets = tuple[Source, ...]  # one per seed too; a net may be published weights instead of a run


@dataclass(frozen=True)
class Cell:
    """A table cell: ``result[key]`` of each job, one job per seed."""

    metric: str
    jobs: tuple[Job, ...]
    key: str = "percent"

    @property
    def is_accuracy(self) -> bool:
        """Whether the number is a share of images."""
        return self.key == "percent"


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        id, label: a stable snake_case name, and what a reader sees.
        runs: the trained nets, one per seed; empty if the scale trains none ("not run", or published weights).
        cells: what is measured on the nets.
        reported: the paper's numbers by metric.
        note: what a reader must know to compare.
    """

    id: str
    label: str
    runs: PerSeed = ()
    cells: tuple[Cell, ...] = ()
    reported: dict[str, float] = field(default_factory=dict, hash=False)
    note: str = ""

    @property
    def weights(self) -> tuple[float, float] | None:
        """Nominal and effective λ_IGA; None for a method without the alignment."""
        nominal = getattr(self.runs[0].method, "lambda_iga", None) if self.runs else None
        if nominal is None:
            return None
        return nominal, effective_lambda_iga(self.runs[0].method, self.runs[0].schedule.batch_size)

    def is_done(self) -> bool:
        """Whether the store has every measurement of the row; no measurements count as not done."""
        return bool(self.cells) and all(job.is_done() for cell in self.cells for job in cell.jobs)

    def of_seed(self, seed: int) -> "Row":
        """The same row with its net of one seed only.

        Raises:
            ValueError: the row trains no net of that seed.
        """
        runs = tuple(run for run in self.runs if run.seed == seed)
        if not runs:
            seeds = ", ".join(str(run.seed) for run in self.runs) or "none"
            raise ValueError(f"{self.id}: seed must be one of {seeds}, got {seed}")
        cells = (replace(cell, jobs=tuple(job for job in cell.jobs if job.run in runs)) for cell in self.cells)
        return replace(self, label=f"{self.label}, seed {seed}", runs=runs, cells=tuple(cells))


@dataclass(frozen=True)
class Experiment:
    """A table, figure or study: its rows, and the parameters that the rows were built from."""

    name: str
    title: str
    rows: tuple[Row, ...]
    params: Params

    def jobs(self) -> list[Job]:
        """Everything that must be trained and measured."""
        trained = [Job(run) for row in self.rows for run in row.runs]
        return list(dict.fromkeys(trained + [job for row in self.rows for cell in row.cells for job in cell.jobs]))

    def row(self, name: str) -> Row:
        """The row of that id.

        Raises:
            ValueError: there is none.
        """
        for row in self.rows:
            if row.id == name:
                return row
        raise ValueError(f"row must be one of {', '.join(row.id for row in self.rows)}, got {name!r}")


@dataclass(frozen=True)
class Artifact:
    """How an artefact is built: the model of its parameters and the function that makes the experiment."""

    params: type[Params]
    build: Callable[[Any], Experiment]
