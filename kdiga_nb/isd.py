"""Iterative self-distillation (Section 2.2, Algorithms 2 and 3) as chains of runs.

Each loop distils a net from itself: the student of loop l starts from the student of loop l − 1, which is also its
teacher. A chain is a list of runs, each a prefix of the next, so a chain of six loops contains the chain of three, and
the store trains none of them twice.
"""

from dataclasses import replace

from kdiga_nb.methods import Method
from kdiga_nb.runs import Checkpoint
from kdiga_nb.runs.run import Run
from kdiga_nb.training import Schedule


def isd_without_teacher(
    first: Run,
    method: Method,
    loops: int,
    learning_rate_decay: float,
    head_dropout: float,
    *,
    loop_schedule: Schedule | None = None,
    fresh: bool = False,
) -> list[Run]:
    """ISD-WoT (Algorithm 2): the standard-trained net ``first``, then ``loops`` loops; loops + 1 runs.

    Args:
        first: Equation 1, standard training at learning rate η.
        method: Algorithm 1, used in every loop.
        learning_rate_decay: μ; every loop fine-tunes at μη. (The authors' code runs loop 1 at η.)
        head_dropout: dropout of the student in every loop; the teacher has none, because it is in eval mode.
        loop_schedule: the schedule of the loops (default: that of ``first``); its learning rate is replaced by μη.
        fresh: every loop starts from fresh weights and not, as in the paper, from its teacher's.

    Raises:
        ValueError: fewer than one loop.
    """
    _check(loops)
    schedule = loop_schedule or first.schedule
    schedule = replace(schedule, learning_rate=first.schedule.learning_rate * learning_rate_decay)
    chain = [first]
    for _ in range(loops):
        loop = _loop(first, chain[-1], method, schedule, head_dropout)
        chain.append(replace(loop, init=None) if fresh else loop)
    return chain


def isd_with_teacher(
    student: Run,
    teacher: Run | Checkpoint,
    method: Method,
    loops: int,
    learning_rate_decay: float,
    head_dropout: float,
    *,
    loop_schedule: Schedule | None = None,
    loop_method: Method | None = None,
) -> list[Run]:
    """ISD-WiT (Algorithm 3): loop 1 distils from a robust ``teacher``, from scratch at η; the others from themselves.

    Args:
        student: gives data set, net, schedule and seed of loop 1; its method, teacher and dropout are replaced.
        teacher, method, learning_rate_decay, head_dropout, loop_schedule: as in ``isd_without_teacher``; the schedule
            is that of the loops after the first.
        loop_method: the method of the loops after the first (default: ``method``).

    Returns:
        ``loops`` runs. The algorithm's test "l = l" is read as "l = 1"; the teacher of a later loop is the student of
        the loop before.

    Raises:
        ValueError: fewer than one loop.
    """
    _check(loops)
    first = replace(student, method=method, teacher=teacher, head_dropout=head_dropout)
    if loops == 1:
        return [first]
    return isd_without_teacher(
        first, loop_method or method, loops - 1, learning_rate_decay, head_dropout, loop_schedule=loop_schedule
    )


def _check(loops: int) -> None:
    if loops < 1:
        raise ValueError(f"loops must be at least 1, got {loops}")


def _loop(first: Run, previous: Run, method: Method, schedule: Schedule, head_dropout: float) -> Run:
    """One loop: the student starts from the net of the loop before, which is its teacher too."""
    return replace(first, method=method, schedule=schedule, teacher=previous, init=previous, head_dropout=head_dropout)
