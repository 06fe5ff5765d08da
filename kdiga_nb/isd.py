"""Iterative self-distillation (Section 2.2, Algorithms 2 and 3) as chains of runs.

Each loop distils a net from itself: the student of loop l starts from the student of loop l − 1, which is also its
teacher. A chain is a list of runs, each a prefix of the next, so a chain of six loops contains the chain of three, and
the store trains none of them twice.
"""

from dataclasses import replace

from kdiga_nb.methods import Method
from kdiga_nb.runs import Checkpoint, Run


def isd_without_teacher(
    first: Run, method: Method, loops: int, learning_rate_decay: float, head_dropout: float
) -> list[Run]:
    """ISD-WoT (Algorithm 2): the standard-trained net ``first``, then ``loops`` loops; loops + 1 runs.

    Args:
        first: Equation 1, standard training at learning rate η.
        method: Algorithm 1 for every loop.
        learning_rate_decay: μ; every loop fine-tunes at μη. (The authors' code runs loop 1 at η.)
        head_dropout: of the student of every loop; the teacher has none, for it is in eval mode.

    Raises:
        ValueError: fewer than one loop.
    """
    return _chain([first], method, loops, learning_rate_decay, head_dropout, first.schedule.learning_rate)


def isd_with_teacher(
    student: Run, teacher: Run | Checkpoint, method: Method, loops: int, learning_rate_decay: float, head_dropout: float
) -> list[Run]:
    """ISD-WiT (Algorithm 3): loop 1 distils from a robust ``teacher``, from scratch at η; the others from themselves.

    Args:
        student: names data set, net, schedule and seed of loop 1; its method, teacher and dropout are replaced.
        teacher, method, learning_rate_decay, head_dropout: as in ``isd_without_teacher``.

    Returns:
        ``loops`` runs. (The algorithm's test "l = l" is read as "l = 1"; the teacher of a later loop is the student of
        the one before it.)

    Raises:
        ValueError: fewer than one loop.
    """
    first = replace(student, method=method, teacher=teacher, head_dropout=head_dropout)
    if loops < 1:
        raise ValueError(f"loops must be at least 1, got {loops}")
    if loops == 1:
        return [first]
    return _chain([first], method, loops - 1, learning_rate_decay, head_dropout, first.schedule.learning_rate)


def _chain(
    chain: list[Run], method: Method, loops: int, learning_rate_decay: float, head_dropout: float, rate: float
) -> list[Run]:
    if loops < 1:
        raise ValueError(f"loops must be at least 1, got {loops}")
    schedule = replace(chain[0].schedule, learning_rate=rate * learning_rate_decay)
    for _ in range(loops):
        previous = chain[-1]
        chain.append(
            replace(
                chain[0], method=method, schedule=schedule, teacher=previous, init=previous, head_dropout=head_dropout
            )
        )
    return chain
