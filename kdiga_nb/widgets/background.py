"""Training from a notebook without blocking the kernel, in a separate process.

The process writes to the run store; the kernel reads the progress from the store. Cancelling ends the process, and the
process also ends if the kernel dies. In both cases the next training continues from the last epoch.
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
    """Progress of a training: epochs and measurements done and in total, seconds so far, seconds left if known."""

    done: int
    total: int
    seconds: float
    seconds_left: float | None


class Training:
    """Jobs that run in another process.

    Attributes:
        cancelled: whether ``cancel`` was called.
    """

    def __init__(self, jobs: Sequence[Job], device: str) -> None:
        """Start the jobs and the trainings that they depend on."""
        self._runs = [run for run in ancestors(job.run for job in jobs) if not is_finished(run)]
        self._measures = [job for job in jobs if job.measure is not None and not job.is_done()]
        self._total = sum(run.schedule.epochs for run in self._runs) + len(self._measures)
        self._before = self._done()
        self._started = time.perf_counter()
        self.cancelled = False
        # A forked process would inherit torch's threads and the kernel's sockets.
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
        new = done - self._before
        left = seconds / new * (self._total - done) if new else None
        return TrainingProgress(done, self._total, seconds, left)

    @property
    def is_running(self) -> bool:
        """Whether the process is alive."""
        return self._process.is_alive()

    def cancel(self) -> None:
        """End the process; all finished epochs and measurements stay in the store."""
        self.cancelled = True
        self._process.terminate()
        self._process.join()

    def failures(self) -> list[str]:
        """Wait for the end; one line per failed job, or one line with the exit status if the process died."""
        reasons: list[str] | None = None
        # The pipe ends without a report if the process died; the exit status then says why.
        with contextlib.suppress(EOFError):
            reasons = self._report.recv()
        self._process.join()
        return [f"the training process ended with status {self._process.exitcode}"] if reasons is None else reasons


def _work(jobs: list[Job], device: str, report: Connection) -> None:
    """In the other process: run the jobs, then report the failures."""
    end_with_parent()
    os.nice(5)  # the kernel has priority, so that the page stays responsive
    # Damage shows only on loading; load_or_train then sets the run aside and trains again.
    for run in ancestors(job.run for job in jobs):
        if is_finished(run):
            load_or_train(run, device=device)
    report.send(run_all(jobs, workers=1, device=device).causes)
