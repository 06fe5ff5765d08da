"""Many runs and measurements: the job graph, local workers and executors."""

import contextlib
import multiprocessing.connection
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from kdiga_nb import paths
from kdiga_nb.measures import Measure
from kdiga_nb.numerics import distributed
from kdiga_nb.numerics.scopes import resolve_device
from kdiga_nb.runs.checkpoints import Checkpoint, StoreError
from kdiga_nb.runs.listing import epochs_done
from kdiga_nb.runs.run import _NAMES, Run, Source, ancestors, run_key
from kdiga_nb.runs.store import check_writable, is_finished, lacks_weights, load_or_train, log, measure, measured
from kdiga_nb.training import Callback, TrainingState

_LOCKS: list[FileLock] = []  # a lock that is garbage is released
NO_TRAINING = "KDIGA_NO_TRAINING"  # environment variable, which worker processes and notebooks inherit


@dataclass(frozen=True)
class Job:
    """One piece of work of the run graph: a training, or a measurement on a trained run."""

    run: Source
    measure: Measure | None = None
    reference: Source | None = None

    def is_done(self) -> bool:
        """Whether the store already has the result."""
        if self.measure is None:
            return is_finished(self.run)
        return measured(self.run, self.measure, reference=self.reference) is not None

    def needs(self) -> list[Run]:
        """The runs that must be finished first."""
        if self.measure is None:
            parents = (self.run.teacher, self.run.init) if isinstance(self.run, Run) else ()
            return [source for source in parents if isinstance(source, Run)]
        return [source for source in (self.run, self.reference) if isinstance(source, Run)]


@dataclass
class Outcome:
    """The result of a list of jobs: how many were done now, how many were cached, and why jobs failed."""

    made: int = 0
    cached: int = 0
    failed: dict[Job, str] = field(default_factory=dict)

    @property
    def causes(self) -> list[str]:
        """Why jobs failed, each reason once, without the jobs that failed because of another job."""
        return sorted({reason for reason in self.failed.values() if not reason.startswith("needs ")})


def do(job: Job, device: str | None = None, callbacks: Sequence[Callback] = ()) -> None:
    """Do one job in this process; its result goes to the store."""
    if job.measure is None:
        load_or_train(job.run, device=device, callbacks=callbacks)
    else:
        measure(job.run, job.measure, reference=job.reference, device=device)


Progress = Callable[[int, int, str], None]


def run_all(
    jobs: Iterable[Job],
    *,
    workers: int | None = None,
    device: str | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Do the jobs and everything that they depend on, independent jobs at the same time.

    If a job fails, the jobs that depend on it fail too, and no others. Where the environment variable
    ``KDIGA_NO_TRAINING`` is set, nothing is trained or measured, and the store stays as it is.

    Args:
        workers: local processes (default: one per core); 1 works in this process.
        executor: where to send jobs instead (any ``concurrent.futures`` executor whose workers see the same store).
        progress: called every second or so with (jobs done, jobs to do, current work).
    """
    graph = graph_of(jobs)
    todo = distributed.broadcast_from_rank0(lambda: to_do(graph))
    outcome = Outcome(cached=len(graph) - len(todo))
    if not todo or os.environ.get(NO_TRAINING):
        return outcome
    check_writable(paths.runs())
    workers = workers or default_workers(device)
    if executor is not None:
        places = {"KDIGA_RUNS": str(paths.runs().absolute()), "KDIGA_DATA": str(paths.data().absolute())}
        _schedule(todo, executor, partial(_do_elsewhere, places), device, outcome, progress)
    elif workers == 1 or len(todo) == 1 or distributed.world_size() > 1:
        _in_turn(todo, device, outcome, progress)
    else:
        # spawn: a forked child would inherit torch's threads in an unknown state.
        context = get_context("spawn")
        processes = min(workers, len(todo))
        threads = max(1, (os.cpu_count() or 1) // processes)
        with ProcessPoolExecutor(processes, context, _begin_worker, (context.Value("i", 0), threads)) as pool:
            try:
                _schedule(todo, pool, do, device, outcome, progress)
            except KeyboardInterrupt:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return outcome


def graph_of(jobs: Iterable[Job]) -> list[Job]:
    """The jobs and everything that they depend on: trainings, each after those it needs, then measurements."""
    wanted = list(jobs)
    graph = [Job(run) for run in ancestors([run for job in wanted for run in [job.run, *job.needs()]])]
    return graph + [job for job in dict.fromkeys(wanted) if job.measure is not None]


def to_do(graph: list[Job]) -> list[Job]:
    """The jobs without a result. A published run without weights that one of them needs is made again as a whole."""
    todo, before = {job for job in graph if not job.is_done()}, -1
    while len(todo) != before:
        before = len(todo)
        again = {run for job in todo for run in job.needs() if lacks_weights(run)}
        todo |= {job for job in graph if job.run in again}
    return [job for job in graph if job in todo]


def default_workers(device: str | None = None) -> int:
    """A sensible number of local processes: one per GPU, or one per core."""
    return max(1, torch.cuda.device_count()) if resolve_device(device).type == "cuda" else os.cpu_count() or 1


def _do_elsewhere(places: dict[str, str], job: Job, device: str | None) -> None:
    """``do`` on another machine, with the store and the data of this one, on a GPU that no other worker there uses."""
    os.environ.update(places)
    if torch.cuda.is_available():
        torch.cuda.set_device(claimed_place(torch.cuda.device_count(), Path(tempfile.gettempdir())))
    do(job, device)


@cache
def claimed_place(places: int, home: Path) -> int:
    """One of so many places of this machine, locked for the life of this process; a shared one if all are taken."""
    for place in range(places):
        lock = FileLock(home / f"kdiga-gpu-{place}.lock", timeout=0)
        with contextlib.suppress(Timeout):
            lock.acquire()
            _LOCKS.append(lock)
            return place
    return os.getpid() % places


def _begin_worker(number: Any, threads: int) -> None:
    """In a worker: take the next GPU and a share of the cores, and stop with the parent."""
    torch.set_num_threads(threads)  # each process would take all cores, and they would wait for each other
    with number.get_lock():
        mine, number.value = number.value, number.value + 1
    if torch.cuda.is_available():
        torch.cuda.set_device(mine % torch.cuda.device_count())
    end_with_parent()


def end_with_parent() -> None:
    """In a worker: stop as soon as the parent process is gone, so that no orphan continues to train."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _blocked(job: Job, outcome: Outcome) -> str | None:
    failed_runs = {failed.run for failed in outcome.failed if failed.measure is None}
    return next((f"needs {run_key(run)}, which failed" for run in job.needs() if run in failed_runs), None)


def _note(job: Job, error: BaseException | None, outcome: Outcome, progress: Progress | None, total: int) -> None:
    if error is None:
        outcome.made += 1
    else:
        outcome.failed[job] = str(error).splitlines()[0] if str(error) else type(error).__name__
        log.error("%s failed: %s", title(job), outcome.failed[job])
    if progress is not None:
        progress(outcome.made + len(outcome.failed), total, title(job))


def _in_turn(todo: list[Job], device: str | None, outcome: Outcome, progress: Progress | None) -> None:
    for job in todo:
        reason = _blocked(job, outcome)
        error: Exception | None = StoreError(reason) if reason else None
        if error is None:
            try:
                do(job, device, [_report_epochs(job, outcome, progress, len(todo))])
            except Exception as raised:  # reported by name at the end; the other jobs continue
                if distributed.world_size() > 1:
                    raise  # alone, this process would leave the others waiting for ever
                error = raised
        _note(job, error, outcome, progress, len(todo))


def _schedule(
    todo: list[Job],
    executor: Executor,
    work: Callable[[Job, str | None], None],
    device: str | None,
    outcome: Outcome,
    progress: Progress | None,
) -> None:
    """Keep the executor fed with jobs whose needs are met."""
    waiting = list(todo)
    running: dict[Future[None], Job] = {}
    while waiting or running:
        open_runs = {job.run for job in [*waiting, *running.values()] if job.measure is None}
        for job in list(waiting):
            if reason := _blocked(job, outcome):
                waiting.remove(job)
                _note(job, StoreError(reason), outcome, progress, len(todo))
            elif not any(run in open_runs for run in job.needs()):
                waiting.remove(job)
                running[executor.submit(work, job, device)] = job
        if running:
            for future in wait(running, timeout=1, return_when=FIRST_COMPLETED).done:
                job, error = running.pop(future), future.exception()
                if error is None and not job.is_done():
                    error = StoreError(
                        f"done, but its result is not in {paths.runs()}: do the workers share that folder?"
                    )
                _note(job, error, outcome, progress, len(todo))
            if progress is not None:
                now = [text for job in running.values() if (text := _underway(job)) is not None]
                progress(outcome.made + len(outcome.failed), len(todo), "; ".join(now))


def _report_epochs(job: Job, outcome: Outcome, progress: Progress | None, total: int) -> Callback:
    def report(state: TrainingState) -> None:
        if progress is not None:
            done = outcome.made + len(outcome.failed)
            progress(done, total, f"{title(job)}, epoch {state.epoch}/{state.epochs}")

    return report


def _underway(job: Job) -> str | None:
    """The progress of a job in another process, read from the store; None before its first checkpoint."""
    if job.measure is not None or isinstance(job.run, Checkpoint):
        return None
    epoch = epochs_done(job.run)
    return f"{title(job)}, epoch {epoch}/{job.run.schedule.epochs}" if epoch else None


def title(job: Job) -> str:
    """A job in a few words, for progress lines."""
    run = job.run
    if isinstance(run, Checkpoint):
        return f"measure {run.model}, {run.format} file"
    name = f"{_NAMES[type(run.method)]} {run.model} on {run.dataset}, seed {run.seed}"
    return f"train {name}" if job.measure is None else f"measure {name}"
