"""Training from a notebook without blocking the kernel, in a separate process.

The process writes to the run store; the kernel reads the progress from the store. Cancelling ends the process, and the
process also ends if the kernel dies. In both cases the next training continues from the last epoch.

Starting Python and importing PyTorch takes seconds. ``warm_up`` does so before the first click: a server process
imports this module and ``kdiga_nb.widgets.warm``, and then forks for each training.
"""

import contextlib
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any

from kdiga_nb.attacks.autoattack import MEMBERS, AutoAttack
from kdiga_nb.runs.graph import Job, end_with_parent, run_all
from kdiga_nb.runs.listing import epochs_done
from kdiga_nb.runs.run import Run, ancestors
from kdiga_nb.runs.store import is_finished, load_or_train, members_done

# A process forked from the kernel would inherit torch's threads and the kernel's sockets; the server has neither.
_CONTEXT: Any = multiprocessing.get_context("forkserver" if sys.platform != "win32" else "spawn")


def warm_up() -> None:
    """Start the server that trainings are forked from; it imports what they need while the reader looks around."""
    if sys.platform != "win32":
        _CONTEXT.set_forkserver_preload([__name__, "kdiga_nb.widgets.warm"])
        forkserver.ensure_running()


@dataclass(frozen=True)
class TrainingProgress:
    """Progress of a training.

    Attributes:
        done, total: epochs and measurements.
        seconds, seconds_left: so far; and to the end, None until that is known.
        run, epoch: the first unfinished training and its finished epochs; None when only measurements are left.
        attack: an AutoAttack under way, in words; empty without one.
    """

    done: int
    total: int
    seconds: float
    seconds_left: float | None
    run: Run | None
    epoch: int
    attack: str = ""


class Training:
    """Jobs that run in another process.

    Attributes:
        cancelled: whether ``cancel`` was called.
    """

    def __init__(self, jobs: Sequence[Job], device: str) -> None:
        """Start the jobs and the trainings that they depend on."""
        warm_up()
        self._runs = [run for run in ancestors(job.run for job in jobs) if not is_finished(run)]
        self._measures = [job for job in jobs if job.measure is not None and not job.is_done()]
        self._total = sum(run.schedule.epochs for run in self._runs) + len(self._measures)
        self._before = self._done()
        self._started = time.perf_counter()
        self.cancelled = False
        self._report, writer = _CONTEXT.Pipe(duplex=False)
        arguments = list(jobs), device, writer, dict(os.environ)
        self._process = _CONTEXT.Process(target=_work, args=arguments, daemon=True)
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
        run = next((run for run in self._runs if not is_finished(run)), None)
        epoch = 0 if run is None else epochs_done(run)
        return TrainingProgress(done, self._total, seconds, left, run, epoch, "" if run else self._attack())

    def _attack(self) -> str:
        for job in self._measures:
            attack = getattr(job.measure, "attack", None)
            if job.measure is not None and isinstance(attack, AutoAttack):
                finished = members_done(job.run, job.measure)
                if finished and len(finished) <= len(MEMBERS[attack.version]):
                    _, left, images = finished[-1]
                    member = MEMBERS[attack.version][len(finished) - 1]
                    return f"AutoAttack, {member} attacks the {left} of {images} images that are left"
        return ""

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


def _work(jobs: list[Job], device: str, report: Connection, environment: dict[str, str]) -> None:
    """In the other process: run the jobs, then report the failures."""
    os.environ.clear()
    os.environ.update(environment)  # the server has the variables of its own start
    end_with_parent()
    os.nice(5)  # the kernel has priority, so that the page stays responsive
    # Damage shows only on loading; load_or_train then sets the run aside and trains again.
    for run in ancestors(job.run for job in jobs):
        if is_finished(run):
            load_or_train(run, device=device)
    report.send(run_all(jobs, workers=1, device=device).causes)
