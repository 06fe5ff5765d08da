"""Many runs over a Dask cluster: a real scheduler and two worker processes, one of which is killed half-way."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kdiga_nb import paths
from kdiga_nb.cli import app
from kdiga_nb.measures import TestAccuracy
from kdiga_nb.methods import KD, ST
from kdiga_nb.runs.graph import Job, graph_of, run_all
from kdiga_nb.runs.run import Run, folder
from kdiga_nb.runs.store import epochs_done, history, is_finished
from kdiga_nb.training import Schedule

dask_distributed = pytest.importorskip("dask.distributed")


class Cluster:
    """A scheduler and its workers, each a process of its own that dies without ceremony."""

    def __init__(self, home: Path):
        self.home, self.file = home, home / "scheduler.json"
        self.processes: list[subprocess.Popen[bytes]] = []
        self.start("scheduler", "--port", "0", "--host", "127.0.0.1", "--no-dashboard", "--no-show")

    def start(self, what: str, *options: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "dask", what, "--scheduler-file", str(self.file), *options]
        environment = os.environ | {"PYTHONPATH": str(paths.ROOT), "OMP_NUM_THREADS": "1"}
        # Elsewhere by their own lights: the store and the data they work on come with the jobs.
        environment |= {"KDIGA_RUNS": str(self.home / "not here"), "KDIGA_DATA": str(self.home / "nor here")}
        with (self.home / "log").open("ab") as log:
            self.processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        return self.processes[-1]

    def worker(self, threads: int = 1) -> subprocess.Popen[bytes]:
        return self.start("worker", "--nthreads", str(threads), "--no-nanny", "--no-dashboard")

    def address(self) -> str:
        wait_for(self.file.exists)
        return json.loads(self.file.read_text())["address"].removeprefix("tcp://")


def wait_for(condition: Any, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    found = Cluster(tmp_path)
    yield found
    for process in found.processes:
        process.kill()
        process.wait()


SCHEDULE = Schedule(40, 64, policy="one_cycle")


def chain() -> list[Run]:
    """Two independent teachers and a student of each."""
    teachers = [Run("digits", "digits_small", ST(), SCHEDULE, seed=seed) for seed in (0, 1)]
    return [replace(teacher, method=KD(), teacher=teacher, schedule=Schedule(4, 64)) for teacher in teachers]


def test_a_killed_worker_loses_no_run_and_trains_none_twice(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDIGA_RUNS", str(cluster.home / "runs"))
    jobs = [Job(run, TestAccuracy(None)) for run in chain()]
    teachers = [job.run.teacher for job in jobs if isinstance(job.run, Run)]
    workers = [cluster.worker(), cluster.worker()]
    killed = False

    def progress(done: int, total: int, text: str) -> None:
        nonlocal killed
        begun = all(isinstance(run, Run) and epochs_done(run) >= 2 for run in teachers)
        if begun and not killed:
            workers[0].send_signal(signal.SIGKILL)
            killed = True

    with dask_distributed.Client(cluster.address()) as client:
        client.wait_for_workers(2, timeout=120)
        with client.get_executor(pure=False) as executor:
            outcome = run_all(jobs, device="cpu", executor=executor, progress=progress)
    assert killed
    assert outcome.failed == {}
    graph = graph_of(jobs)
    assert outcome.made == len(graph) and all(job.is_done() for job in graph)
    records = []
    for run in [job.run for job in graph if isinstance(job.run, Run) and job.measure is None]:
        assert is_finished(run) and len(history(run)) == run.schedule.epochs
        records.append(json.loads((folder(run) / "run.json").read_text()))
    # One training was interrupted; it went on from its last epoch.
    assert sorted(record["resumed"] for record in records) == [0, 0, 0, 1]
    assert not (cluster.home / "not here").exists()


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("127.0.0.1:1", r"must be dask://ADDRESS, got '127\.0\.0\.1:1'"),
        ("dask://", "must be dask://ADDRESS"),
        ("ray://127.0.0.1:1", "must be dask://ADDRESS"),
        ("dask://127.0.0.1:1", r"no Dask scheduler at 127\.0\.0\.1:1"),
    ],
)
def test_a_cluster_that_cannot_be_used_is_said_in_one_line(address: str, says: str) -> None:
    result = refused(address)
    assert result.exit_code in (1, 2)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("--executor")]
    assert re.search(says, line)


def refused(address: str) -> Any:
    file = str(paths.PARAMS / "smoke.yaml")
    return CliRunner().invoke(app, ["train", file, "--artefact", "table5", "--row", "fgsm_at", "--executor", address])


def test_workers_of_several_threads_are_refused(cluster: Cluster) -> None:
    cluster.worker(threads=2)
    with dask_distributed.Client(cluster.address()) as client:
        client.wait_for_workers(1, timeout=120)
    result = refused(f"dask://{cluster.address()}")
    assert result.exit_code == 1
    assert "workers of one thread each are needed" in result.stderr
