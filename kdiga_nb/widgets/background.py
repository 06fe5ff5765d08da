"""Training from a notebook without blocking its kernel: a process of its own, watched through the run store.

The process trains and measures what it is told and writes to the store, as any other would; the kernel only counts
the epochs that the store has. So cancelling is ending the process, a training whose kernel dies ends with it, and in
both cases the next one goes on from the last epoch.
"""

import contextlib
import multiprocessing
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

from kdiga_nb.runs.graph import Job, end_with_parent, run_all
from kdiga_nb.runs.listing import epochs_done
from kdiga_nb.runs.run import ancestors
from kdiga_nb.runs.store import is_finished, load_or_train


@dataclass(frozen=True)
class TrainingProgress:
    """How far a training is: epochs and measurements done and to do, seconds so far, seconds left if known."""

    done: int
    total: int
    seconds: float
    seconds_left: float | None


class Training:
    """Jobs under way in another process.

    Attributes:
        cancelled: whether ``cancel`` was called.
    """

    def __init__(self, jobs: Sequence[Job], device: str) -> None:
        """Start on the jobs and on everything they stand on."""
        self._runs = [run for run in ancestors(job.run for job in jobs) if not is_finished(run)]
        self._measures = [job for job in jobs if job.measure is not None and not job.is_done()]
        self._total = sum(run.schedule.epochs for run in self._runs) + len(self._measures)
        self._before = self._done()
        self._started = time.perf_counter()
        self.cancelled = False
        # spawn: a forked child would inherit torch's threads and the kernel's sockets.
        context = multiprocessing.get_context("spawn")
        self._report, writer = context.Pipe(duplex=False)
        self._process = context.Process(target=_work, args=(list(jobs), device, writer), daemon=True)
        self._process.start()
        writer.close()

    def _done(self) -> int:
        trained = sum(run.schedule.epochs if is_finished(run) else epochs_done(run) for run in self._runs)
        return trained + sum(job.is_done() for job in self._measures)

    @property
    def progress(self) -> TrainingProgress:
        """Read from the store."""
        done, seconds = self._done(), time.perf_counter() - self._started
        made = done - self._before
        left = seconds / made * (self._total - done) if made else None
        return TrainingProgress(done, self._total, seconds, left)

    @property
    def is_running(self) -> bool:
        """Whether the process still works."""
        return self._process.is_alive()

    def cancel(self) -> None:
        """End the process; what it finished, to the last epoch, stays in the store."""
        self.cancelled = True
        self._process.terminate()
        self._process.join()

    def failures(self) -> list[str]:
        """Waits for the end: one line for each job that failed, or one that says how the process ended."""
        reasons: list[str] | None = None
        # An end without a report is the process's death; its exit status says of what.
        with contextlib.suppress(EOFError):
            reasons = self._report.recv()
        self._process.join()
        return [f"the training process ended with status {self._process.exitcode}"] if reasons is None else reasons


def _work(jobs: list[Job], device: str, report: Connection) -> None:
    """In the other process: do the jobs, then say what failed."""
    end_with_parent()
    os.nice(5)  # the kernel, whose page is being looked at, goes first
    # A damaged run counts as done until it is loaded; loading sets it aside and trains it again.
    for run in ancestors(job.run for job in jobs):
        if is_finished(run):
            load_or_train(run, device=device)
    report.send(run_all(jobs, workers=1, device=device).causes)
