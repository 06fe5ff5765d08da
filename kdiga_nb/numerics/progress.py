"""Progress of a command: a bar on a terminal, one line per minute in a log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

SECONDS = 60.0  # between two lines of a log

Show = Callable[[int, int, str], None]


@contextmanager
def progress(desc: str, unit: str, *, silent: bool = False, seconds: float = SECONDS) -> Iterator[Show]:
    """A function ``show(done, total, text)`` that reports on stderr how far the work is.

    Args:
        unit: what is counted, in the singular: "job".
        silent: report nothing.
        seconds: least time between two lines where stderr is no terminal. The last line, at done = total, always comes.
    """
    if silent:
        yield lambda done, total, text: None
    elif sys.stderr.isatty():
        with tqdm(desc=desc, unit=unit, total=0, dynamic_ncols=True) as bar:

            def draw(done: int, total: int, text: str) -> None:
                bar.total, bar.n = total, done
                bar.set_postfix_str(text)

            yield draw
    else:
        yield _lines(desc, unit, seconds)


def _lines(desc: str, unit: str, seconds: float) -> Show:
    started = written = time.monotonic()
    finished = False

    def write(done: int, total: int, text: str) -> None:
        nonlocal written, finished
        now = time.monotonic()
        last = done == total and not finished
        if now - written < seconds and not last:
            return
        written, finished = now, done == total
        minutes, rest = divmod(round(now - started), 60)
        after = f"{minutes} min {rest} s" if minutes else f"{rest} s"
        print(f"{desc}: {done} of {total} {unit}s after {after}: {text}", file=sys.stderr, flush=True)

    return write
