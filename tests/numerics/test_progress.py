"""Progress: a bar on a terminal, a line per minute in a log."""

import os
import pty
import subprocess
import sys
import termios

import pytest

from kdiga_nb.numerics.progress import progress


def test_a_log_gets_one_line_per_interval_and_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("runs", "job") as show:
        for done in range(1001):
            show(done, 1000, f"train {done}")
        show(1000, 1000, "again")
    assert capsys.readouterr().err == "runs: 1000 of 1000 jobs after 0 s: train 1000\n"
    with progress("runs", "job", seconds=0) as show:
        for done in range(3):
            show(done, 2, "x")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" after")[0] for line in lines] == [f"runs: {done} of 2 jobs" for done in range(3)]


def test_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("runs", "job", silent=True, seconds=0) as show:
        show(0, 1, "x")
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar() -> None:
    terminal, side = pty.openpty()
    termios.tcsetwinsize(side, (24, 100))
    code = "from kdiga_nb.numerics.progress import progress\nwith progress('runs', 'job') as show: show(1, 2, 'x')"
    subprocess.run([sys.executable, "-c", code], stderr=side, check=True)
    os.close(side)
    assert b"\rruns:  50%" in os.read(terminal, 10_000)
