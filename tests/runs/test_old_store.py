"""A store written before the package had rooms: its keys, nets and accuracies are read as before.

``store_of_0_1_0`` holds the first seed of Table 1's ST row at the digits scale, as commit abf72fe wrote it.
"""

import shutil
from pathlib import Path

import pytest
import torch

from kdiga_nb import paths
from kdiga_nb.attacks import evaluation_pgd
from kdiga_nb.data import load_data
from kdiga_nb.measures import TestAccuracy
from kdiga_nb.methods import ST
from kdiga_nb.runs import Run, damage, is_finished, load_or_train, measure, measured, run_key
from kdiga_nb.training import Schedule

KEY = "36a386034c855016"
SCHEDULE = Schedule(15, 64, 0.1, policy="one_cycle", weight_decay=5e-4, clip_norm=1.0, augment=False, selection="last")
RUN = Run("digits", "digits_small", ST(), SCHEDULE)


@pytest.fixture(autouse=True)
def old_store(own_run_store: None) -> None:
    shutil.copytree(Path(__file__).with_name("store_of_0_1_0"), paths.runs())


def test_the_key_of_a_run_is_what_it_was() -> None:
    assert run_key(RUN) == KEY


def test_an_old_net_is_loaded_and_not_trained_again() -> None:
    assert is_finished(RUN) and damage(RUN) is None
    before = (paths.runs() / KEY / "run.json").read_bytes()
    model = load_or_train(RUN, device="cpu")
    assert (paths.runs() / KEY / "run.json").read_bytes() == before
    x, y = load_data("digits").test
    with torch.no_grad():
        percent = 100 * (model(x).argmax(1) == y).double().mean().item()
    recorded = measured(RUN, TestAccuracy())
    assert recorded is not None
    # The net computes in single precision, and an image on the edge may fall to the other side on another processor.
    assert abs(percent - recorded["percent"]) <= 0.4


@pytest.mark.parametrize("taken", [TestAccuracy(), TestAccuracy(evaluation_pgd(0.1))], ids=["clean", "PGD-20"])
def test_an_old_measurement_is_found_under_its_name(taken: TestAccuracy) -> None:
    recorded = measured(RUN, taken)
    assert recorded is not None and recorded["n"] == 500


def test_an_old_result_without_a_mask_is_measured_again_only_where_the_mask_is_needed() -> None:
    plain, masked = TestAccuracy(), TestAccuracy(needs_mask=True)
    recorded = measured(RUN, plain)
    assert recorded is not None and "survivors" not in recorded and measured(RUN, masked) is None
    again = measure(RUN, masked, device="cpu")
    assert abs(again["percent"] - recorded["percent"]) <= 0.4
    assert measured(RUN, masked) == measured(RUN, plain) == again and len(again["survivors"]) == 500
