"""Chains of self-distillation: each a prefix of the next, with the teachers, starts and rates of Algorithms 2 and 3."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest

from kdiga_nb.attacks.gradient import PGD
from kdiga_nb.isd import isd_with_teacher, isd_without_teacher
from kdiga_nb.methods import KDIGA, ST, TRADES
from kdiga_nb.runs import Checkpoint
from kdiga_nb.runs.run import Run, ancestors, run_key
from kdiga_nb.runs.store import load_or_train
from kdiga_nb.training import Schedule

SCHEDULE = Schedule(2, batch_size=256, learning_rate=0.08, policy="one_cycle", augment=False)
FIRST = Run("digits", "digits_small", ST(), SCHEDULE, seed=3)
TEACHER = Run("digits", "digits_wide", TRADES(PGD(0.1, 0.05, 2)), SCHEDULE, seed=3)
METHOD = KDIGA(lambda_iga=5.0)
MU, DROPOUT = 0.25, 0.5


def without(loops: int) -> list[Run]:
    return isd_without_teacher(FIRST, METHOD, loops, MU, DROPOUT)


def with_teacher(loops: int) -> list[Run]:
    return isd_with_teacher(FIRST, TEACHER, METHOD, loops, MU, DROPOUT)


@pytest.mark.parametrize("loops", [1, 2, 3, 6])
def test_number_of_runs(loops: int):
    assert len(without(loops)) == loops + 1
    assert len(with_teacher(loops)) == loops


@pytest.mark.parametrize("chain", [without, with_teacher])
def test_a_longer_chain_starts_with_the_shorter_one(chain: Callable[[int], list[Run]]):
    chains = [chain(loops) for loops in range(1, 6)]
    for shorter, longer in pairwise(chains):
        assert longer[:-1] == shorter
        assert [run_key(run) for run in longer[:-1]] == [run_key(run) for run in shorter]


@pytest.mark.parametrize("chain", [without(4), with_teacher(4)], ids=["WoT", "WiT"])
def test_every_later_loop_distils_and_starts_from_the_one_before(chain: list[Run]):
    for previous, run in pairwise(chain):
        assert run.teacher == previous
        assert run.init == previous
        assert run.schedule.learning_rate == pytest.approx(MU * SCHEDULE.learning_rate)
        assert run.method == METHOD
        assert run.head_dropout == DROPOUT
        assert run.seed == FIRST.seed
    assert ancestors([chain[-1]])[-len(chain) :] == chain


def test_without_teacher_begins_with_the_standard_net_as_it_is():
    assert without(3)[0] is FIRST


def test_fresh_students_differ_from_the_paper_only_in_their_start():
    chain, fresh = without(3), isd_without_teacher(FIRST, METHOD, 3, MU, DROPOUT, fresh=True)
    assert fresh[0] == FIRST and all(run.init is None for run in fresh)
    for run, previous, paper in zip(fresh[1:], fresh, chain[1:], strict=False):
        assert run.teacher == previous
        assert replace(run, teacher=paper.teacher, init=paper.init) == paper


@pytest.mark.parametrize("teacher", [TEACHER, Checkpoint("robust.pt", model="digits_wide:digits")])
def test_with_teacher_begins_from_scratch_at_the_full_rate(teacher: Run | Checkpoint):
    first = isd_with_teacher(FIRST, teacher, METHOD, 3, MU, DROPOUT)[0]
    assert first.teacher == teacher
    assert first.init is None
    assert first.schedule.learning_rate == SCHEDULE.learning_rate
    assert (first.method, first.head_dropout) == (METHOD, DROPOUT)


@pytest.mark.parametrize("chain", [without, with_teacher])
@pytest.mark.parametrize("loops", [0, -1])
def test_fewer_than_one_loop_is_refused(chain: Callable[[int], list[Run]], loops: int):
    with pytest.raises(ValueError, match=f"loops must be at least 1, got {loops}"):
        chain(loops)


def test_the_store_trains_a_shared_prefix_once():
    seen: list[int] = []
    load_or_train(without(1)[-1])
    load_or_train(without(2)[-1], callbacks=[lambda state: seen.append(state.epoch)])
    assert seen == [1, 2]
