"""The explorer without a browser: data, figures, handlers, and training in another process."""

import base64
import io
import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from PIL import Image

from kdiga_nb import metrics, paths, runs
from kdiga_nb.artifacts.explore import Point, explore, explored
from kdiga_nb.artifacts.paper import table1, table4
from kdiga_nb.attacks.autoattack import MEMBERS
from kdiga_nb.data import load_data
from kdiga_nb.losses import cross_entropy, input_gradient
from kdiga_nb.measures import ImageBounds
from kdiga_nb.methods import KD, KDIGA
from kdiga_nb.params import EXPLORED, VIEWS, ExploreParams, Prop2Params, Table1Params, Table4Params, at_scale, read
from kdiga_nb.runs import StoreError
from kdiga_nb.runs.graph import Job
from kdiga_nb.runs.run import Run, ancestors
from kdiga_nb.runs.store import is_finished, load_or_train, measured
from kdiga_nb.widgets import Explorer, State, compute, draw, image_bytes, missions, table, words
from kdiga_nb.widgets.background import Training
from kdiga_nb.widgets.drawing import DPI, SIZE
from kdiga_nb.widgets.fast_axes import set_ticks
from kdiga_nb.widgets.finding import SHOWN, find
from kdiga_nb.widgets.views import SURFACE, Film, Glance, Loops, OneImage, TradeOff, UnderAttack, attack_at, curve

each_view = pytest.mark.parametrize("view", VIEWS)
LONG = {"isd_epochs": 25}  # a loop that is cut short

DIGITS = at_scale(ExploreParams, "digits")


def one_seed(params: ExploreParams, **changes: Any) -> ExploreParams:
    return params.model_copy(update={"seeds": [0], **changes})


def trained(home: Path) -> set[str]:
    return {path.parent.name for path in home.glob("*/run.json")}


# ---- what the experiment asks for ----


def test_only_the_sweep_is_trained_for_the_explorer_alone():
    shared = [table1(at_scale(Table1Params, "digits")), table4(at_scale(Table4Params, "digits"))]
    known = set(ancestors(run for found in shared for row in found.rows for run in row.runs))
    params = DIGITS
    rows = explore(params).rows
    new = [run for run in ancestors(run for row in rows for run in row.runs) if run not in known]
    assert [getattr(run.method, "lambda_iga", None) for run in new] == params.sweep
    assert {run.seed for run in new} == {params.seeds[0]}


def test_rows_are_named_once():
    names = [row.id for row in explore(DIGITS).rows]
    assert len(names) == len(set(names))
    assert len(explore(at_scale(ExploreParams, "digits", {"loops": 1})).rows) < len(names)


@pytest.mark.parametrize("method", EXPLORED)
def test_every_method_has_a_row(method: str):
    row = explored(DIGITS, Point(method, 2.0, 1))
    assert [run.seed for run in row.runs] == DIGITS.seeds


def test_kdiga_without_alignment_is_kd():
    at_zero, kd = explored(DIGITS, Point("kdiga", 0.0)), explored(DIGITS, Point("kd"))
    assert at_zero == kd
    assert isinstance(at_zero.runs[0].method, KD)
    assert isinstance(explored(DIGITS, Point("kdiga", 0.5)).runs[0].method, KDIGA)


# ---- compute ----


def test_the_trade_off_is_what_the_store_has(small: ExploreParams, store: Path):
    data = compute(State.start(small, view="lambda", lambda_iga=8.0))
    assert isinstance(data, TradeOff)
    row = explored(one_seed(small), Point("kdiga", 8.0))
    for cell in row.cells:
        job = cell.jobs[0]
        assert job.measure is not None
        result = runs.measured(job.run, job.measure)
        if result is not None and cell.is_accuracy:
            assert data.chosen.accuracies[cell.metric].percent == result["percent"]
    assert data.curves["alignment"] == [line["alignment"] for line in runs.history(row.runs[0])]
    assert data.weights == (8.0, 8.0)
    assert [found.point.lambda_iga for found in data.nets if found.trained] == [0.0, 2.0, 8.0]


@pytest.mark.parametrize("epsilon", [0.0, 0.05, 0.3])
def test_the_gallery_is_attacked_inside_the_ball(small: ExploreParams, store: Path, epsilon: float):
    state = State.start(small, view="epsilon", epsilon=epsilon, image=7)
    data = compute(state)
    assert isinstance(data, UnderAttack)
    gallery = data.gallery
    assert gallery is not None
    change = np.abs(gallery.attacked.astype(np.float64) - gallery.clean.astype(np.float64))
    assert change.max() <= epsilon
    assert change.max() == pytest.approx(epsilon)
    assert 0 <= gallery.attacked.min() <= gallery.attacked.max() <= 1
    test = load_data("digits").test
    assert gallery.labels == test.labels[7 : 7 + len(gallery.labels)].tolist()
    student = runs.load(data.chosen.run)
    for images, guesses in ((gallery.clean, gallery.guesses), (gallery.attacked, gallery.guesses_attacked)):
        assert student(torch.from_numpy(images)[:, None]).argmax(1).tolist() == guesses
    assert gallery.student.sum(1) == pytest.approx([1, 1])
    assert gallery.teacher.sum(1) == pytest.approx([1, 1])


def test_the_gallery_goes_round_the_end_and_not_beyond(small: ExploreParams, store: Path):
    last = len(load_data("digits").test.labels) - 1
    data = compute(State.start(small, view="epsilon", image=last))
    assert isinstance(data, UnderAttack)
    assert data.gallery is not None
    assert data.gallery.labels[:2] == load_data("digits").test.labels[[last, 0]].tolist()
    with pytest.raises(ValueError, match=f"image must be below {last + 1}"):
        compute(State.start(small, view="epsilon", image=last + 1))


@pytest.mark.parametrize(("method", "first"), [("isd_wot", 0), ("isd_wit", 1)])
def test_loops_are_a_chain(small: ExploreParams, store: Path, method: str, first: int):
    data = compute(State.start(small, view="loops", method=method, loop=1))
    assert isinstance(data, Loops)
    for nets in data.chains.values():
        assert [found.point.loop for found in nets] == list(range(first, small.loops + 1))
        assert all(later.run.teacher == earlier.run for earlier, later in pairwise(nets))
    maps = data.maps
    assert maps is not None
    assert isinstance(data.chosen.run.teacher, Run)
    x, y = (part[:1] for part in load_data("digits").test)
    student, _ = input_gradient(runs.load(data.chosen.run), x, y)
    teacher, _ = input_gradient(runs.load(data.chosen.run.teacher), x, y)
    assert maps.student == pytest.approx(student[0, 0].numpy(), rel=1e-4, abs=1e-6)
    assert maps.norms == pytest.approx((student.norm().item(), teacher.norm().item()), rel=1e-5)
    cosine = (student * teacher).sum() / student.norm() / teacher.norm()
    assert maps.cosine == pytest.approx(cosine.item(), rel=1e-4)


def test_one_image_shows_both_sides_of_proposition_2(small: ExploreParams, store: Path):
    data = compute(State.start(small, view="image", image=3))
    assert isinstance(data, OneImage)
    x, y = (part[3:4] for part in load_data("digits").test)
    assert isinstance(data.chosen.run.teacher, Run)
    student, teacher = runs.load(data.chosen.run), runs.load(data.chosen.run.teacher)
    terms = metrics.bound_terms(student, teacher, x, y, 0.1, steps=10)
    assert data.terms["CE_s"] == pytest.approx(terms.ce_student.item(), rel=1e-5)
    assert data.terms["ε‖g_s − g_t‖₁"] == pytest.approx(0.1 * terms.distance.item(), rel=1e-5)
    assert 0 <= data.gap <= sum(data.terms.values())
    assert data.surfaces is not None
    for surface, model in zip(data.surfaces, (student, teacher), strict=True):
        centre = surface.loss[SURFACE // 2, SURFACE // 2]
        assert centre == pytest.approx(cross_entropy(model(x), y).item(), rel=1e-4)
        assert surface.loss.shape == surface.correct.shape == (SURFACE, SURFACE)


@each_view
def test_nothing_is_trained_by_looking(view: str, small: ExploreParams, tmp_path: Path):
    state = State.start(small, view=view)
    assert "is not in the store" in words(compute(state))
    assert list((tmp_path / "runs").glob("*")) == []


@each_view
def test_a_damaged_net_is_an_error_and_stays_where_it_is(view: str, small: ExploreParams, store: Path):
    state = State.start(small, view=view)
    home = runs.folder(state.row().runs[0])
    (home / "model.safetensors").write_bytes(b"no weights")
    if view == "lambda":  # needs no weights
        assert "PGD-3" in words(compute(state))
    else:
        with pytest.raises(StoreError, match="damaged: the weights do not match"):
            compute(state)
    assert home.exists()


# ---- draw ----


def overhang(figure: Figure) -> float:
    """How far what is drawn reaches beyond the figure's edges, in inches."""
    image_bytes(figure)
    drawn = figure.get_tightbbox()
    return max(-drawn.x0, -drawn.y0, drawn.x1 - SIZE[0], drawn.y1 - SIZE[1])


@pytest.mark.parametrize(
    ("scale", "low", "high"), [("linear", -0.2, 0.2), ("linear", 0, 103), ("linear", 7, 7.004), ("log", 0.02, 30)]
)
def test_ticks_stand_and_read_as_matplotlib_would_set_them(scale: str, low: float, high: float):
    def figure() -> Figure:
        made = Figure(SIZE)
        axes = made.subplots()
        axes.set(xscale=scale, yscale=scale, xlim=(low, high), ylim=(low, high))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 3)) if scale == "log" else MaxNLocator(5))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_locator(NullLocator())
        return made

    theirs, ours = figure(), figure()
    set_ticks(ours.axes[0], grid=True)
    for made in (theirs, ours):
        made.canvas.draw()
    axes = theirs.axes[0]
    along = [(label, label.get_position()[0]) for label in axes.get_xticklabels()]
    along += [(label, label.get_position()[1]) for label in axes.get_yticklabels()]
    expected = [label for label, value in along if low <= value <= high]
    found = ours.axes[0].texts
    assert len(found) >= 6
    assert [text.get_text() for text in found] == [label.get_text() for label in expected]
    for text, label in zip(found, expected, strict=True):
        box, matplotlibs = (part.get_window_extent().get_points() for part in (text, label))
        np.testing.assert_allclose(box, matplotlibs, atol=0.5)  # pixels


@each_view
@pytest.mark.parametrize("filled", [True, False], ids=["store", "empty store"])
def test_figures_have_one_size_and_no_text_is_cut_off(
    view: str, filled: bool, small: ExploreParams, request: pytest.FixtureRequest
):
    if filled:
        request.getfixturevalue("store")
    data = compute(State.start(small, view=view))
    figure = draw(data)
    assert tuple(figure.get_size_inches()) == SIZE
    assert overhang(figure) <= 0
    assert image_bytes(draw(data)) == image_bytes(draw(data))
    assert image_bytes(draw(data), "svg") == image_bytes(draw(data), "svg")


def test_a_picture_may_be_saved_at_another_resolution_in_between(small: ExploreParams, store: None):
    figure = draw(compute(State.start(small, view="lambda")))
    before = image_bytes(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=3 * DPI)
    fine, coarse = (Image.open(io.BytesIO(content)).convert("L") for content in (buffer.getvalue(), before))
    assert coarse.size == tuple(round(inches * DPI) for inches in SIZE)
    assert fine.size == tuple(3 * side for side in coarse.size)
    difference = np.asarray(fine.reduce(3), dtype=float) - np.asarray(coarse)
    assert np.abs(difference).mean() < 5  # of 255: the same picture
    assert image_bytes(figure) == before


def test_a_slider_changes_the_picture(small: ExploreParams, store: Path):
    for view, change in (("lambda", {"lambda_iga": 8.0}), ("epsilon", {"epsilon": 0.2}), ("loops", {"loop": 2})):
        state = State.start(small, view=view)
        assert image_bytes(draw(compute(state))) != image_bytes(draw(compute(replace(state, **change))))


def test_the_table_has_the_picture_s_numbers(small: ExploreParams, store: Path):
    data = compute(State.start(small, view="lambda"))
    assert isinstance(data, TradeOff)
    shown = table(data)
    assert list(shown.index) == [found.label for found in data.nets if found.trained]
    clean = data.chosen.accuracies["clean"]
    assert shown.loc[data.chosen.label, "clean"] == f"{clean.percent:.1f} [{clean.low:.1f}, {clean.high:.1f}]"


# ---- the explorer's handlers ----


def text_of(explorer: Explorer) -> str:
    return re.sub("<[^>]*>", "", explorer.text.value)


def status_of(explorer: Explorer) -> str:
    return re.sub("<[^>]*>", "", explorer.status.value)


def is_stale(explorer: Explorer) -> bool:
    return "kdiga-stale" in explorer.picture._dom_classes


MOVES: list[tuple[str, str, Any]] = [
    ("glance", "image", 4),
    ("glance", "epsilon", 0.2),
    ("lambda", "lambda_iga", 8.0),
    ("epsilon", "epsilon", 0.2),
    ("epsilon", "image", 4),
    ("epsilon", "method", "trades_student"),
    ("epsilon", "compare", ("st",)),
    ("film", "step", 1),
    ("film", "epsilon", 0.2),
    ("film", "image", 4),
    ("loops", "loop", 2),
    ("loops", "chain", "isd_wit"),
    ("loops", "dropout", False),
    ("image", "epsilon", 0.03),
]


@pytest.mark.parametrize(("view", "control", "value"), MOVES, ids=[f"{view}, {name}" for view, name, _ in MOVES])
def test_a_control_changes_state_text_and_picture(
    view: str, control: str, value: Any, small: ExploreParams, store: Path
):
    explorer = Explorer(small.model_copy(update={"show_view": view}))
    before, before_text = explorer.picture.value, text_of(explorer)
    explorer.controls[control].value = value
    assert getattr(explorer.state, control) == value
    assert explorer.picture.value != before
    assert text_of(explorer) != before_text or control == "compare"
    assert not is_stale(explorer)
    found = re.search(r"base64,([^\"]+)", explorer.picture.value)
    assert found and base64.b64decode(found[1]).startswith(b"\x89PNG")


def test_a_point_that_is_not_there_is_offered_and_not_trained(small: ExploreParams, store: Path):
    explorer = Explorer(small)
    assert explorer.train_button.disabled
    before = trained(store)
    explorer.untrained.value = True
    explorer.controls["lambda_iga"].value = 1.0
    assert "λ = 1 on digits_small, seed 0, is not in the store" in text_of(explorer)
    assert not explorer.train_button.disabled
    assert trained(store) == before


def weights_of(explorer: Explorer) -> list[float]:
    """What the slider of λ_IGA offers."""
    return [weight for _, weight in explorer.controls["lambda_iga"].options]


def test_the_slider_skips_weights_without_a_net_unless_asked(small: ExploreParams, store: Path):
    explorer = Explorer(small)
    assert weights_of(explorer) == [0.0, 2.0, 8.0]
    explorer.untrained.value = True
    assert weights_of(explorer) == list(explorer.state.lambdas)
    explorer.controls["lambda_iga"].value = 4.0
    explorer.untrained.value = False
    assert weights_of(explorer) == [0.0, 2.0, 4.0, 8.0]  # the chosen one stays
    assert "λ = 4" in text_of(explorer)


def test_an_empty_store_offers_every_weight(small: ExploreParams):
    explorer = Explorer(small)
    assert weights_of(explorer) == list(explorer.state.lambdas)


def test_a_pinned_net_is_compared_with_the_next(small: ExploreParams, store: Path):
    explorer = Explorer(small)
    explorer.pin_button.click()
    assert explorer.pin_text.value.count("Pinned: KDIGA, λ = 2, seed 0.") == 1
    first = compute(explorer.state)
    explorer.controls["lambda_iga"].value = 8.0
    second = compute(explorer.state)
    clean = second.chosen.accuracies["clean"].percent - first.chosen.accuracies["clean"].percent
    assert f"KDIGA, λ = 8, seed 0 against it: clean {clean:+.1f} points [" in explorer.pin_text.value
    assert "PGD-3 at ε = 0.1" in explorer.pin_text.value
    explorer.controls["seed"].value = explorer.controls["seed"].options[-1]
    explorer.pin_button.click()
    assert explorer.pin_text.value == ""
    assert explorer.pin_button.description == "Pin this net"


def test_the_band_spans_all_seeds(small: ExploreParams, store: Path):
    params = small.model_copy(update={"seeds": [0, 1]})
    (clean,) = (cell for cell in explored(params, Point("kdiga", 2.0)).cells if cell.metric == "clean")
    percents = [runs.measure(job.run, job.measure)["percent"] for job in clean.jobs if job.measure]
    data = compute(State.start(params, view="lambda"))
    assert isinstance(data, TradeOff)
    assert data.bands == {"clean": [(2.0, min(percents), max(percents))]}  # every other weight has one seed


def test_the_image_is_a_dot_in_the_cloud_of_all(small: ExploreParams, store: Path):
    params = at_scale(Prop2Params, "smoke")
    state = State.start(small, view="image", epsilon=params.epsilon, image=3)
    data = compute(state)
    assert isinstance(data, OneImage) and data.cloud is None
    measure = ImageBounds(params.epsilon, params.bound_images, params.llm_steps)
    found = runs.measure(data.chosen.run, measure, reference=data.chosen.run.teacher)
    data = compute(state)
    assert isinstance(data, OneImage) and data.cloud is not None
    assert data.cloud.tolist() == [found["images"]["gap"], found["images"]["bound"]]
    assert any(axes.get_title() == f"bound, {params.bound_images} images" for axes in draw(data).axes)
    elsewhere = compute(replace(state, epsilon=0.2))
    assert isinstance(elsewhere, OneImage) and elsewhere.cloud is None


def test_controls_that_change_nothing_are_grey(small: ExploreParams, store: Path):
    explorer = Explorer(small.model_copy(update={"show_view": "epsilon"}))
    disabled = {name: explorer.controls[name].disabled for name in ("lambda_iga", "loop", "dropout")}
    assert disabled == {"lambda_iga": False, "loop": True, "dropout": True}
    explorer.controls["method"].value = "isd_wit"
    disabled = {name: explorer.controls[name].disabled for name in ("lambda_iga", "loop", "dropout")}
    assert disabled == {"lambda_iga": True, "loop": False, "dropout": False}


def test_an_empty_store_says_what_to_run(small: ExploreParams):
    explorer = Explorer(small)
    assert "kdiga reproduce --scale smoke --only explore" in status_of(explorer)
    assert explorer.train_button.description == "Train the smallest set"
    methods = {type(job.run.method).__name__ for job in explorer.wanted() if isinstance(job.run, Run)}
    assert methods == {"ST", "KD", "KDIGA"}


def test_what_cannot_be_shown_is_said_and_the_old_picture_marked(small: ExploreParams, store: Path):
    explorer = Explorer(small)
    weights = runs.folder(explorer.state.row().runs[0]) / "model.safetensors"
    weights.unlink()
    before = explorer.picture.value
    explorer.controls["view"].value = "image"
    assert "This point cannot be shown: run" in text_of(explorer)
    assert explorer.picture.value == before
    assert is_stale(explorer)
    assert not explorer.train_button.disabled
    assert "Damaged (model.safetensors is missing)" in status_of(explorer)


def test_another_scale_is_another_parameter_file(small: ExploreParams, store: Path):
    explorer = Explorer(small)
    explorer.controls["scale"].value = "digits"
    assert explorer.state.params == DIGITS
    assert "--scale digits" in status_of(explorer)
    assert explorer.controls["seed"].options == tuple(DIGITS.seeds)


def test_a_scale_without_data_leaves_everything_as_it_was(
    small: ExploreParams, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("KDIGA_DATA", str(tmp_path / "no data"))
    explorer = Explorer(small)
    before = {name: control.value for name, control in explorer.controls.items()}
    picture, text, options = explorer.picture.value, text_of(explorer), explorer.controls["student"].options
    for scale in ("imagenet", "imagenette"):
        explorer.controls["scale"].value = scale
        assert f"The scale {scale} cannot be shown" in status_of(explorer)
        assert {name: control.value for name, control in explorer.controls.items()} == before
        assert (explorer.picture.value, text_of(explorer)) == (picture, text)
        assert explorer.controls["student"].options == options
        assert explorer.train_button.disabled


def test_every_accuracy_names_the_radius_it_was_measured_at(small: ExploreParams, store: Path):
    for epsilon in (0.05, 0.1, 0.3):
        text = words(compute(State.start(small, view="epsilon", epsilon=epsilon)))
        assert "PGD-3 at ε = 0.1:" in text
        assert f"attacked now at ε = {epsilon:g}" in text


def test_accuracy_between_measured_radii_is_marked_as_interpolated(small: ExploreParams, store: Path):
    data = compute(State.start(small, view="epsilon"))
    points = curve(data.chosen, data.state)
    (low, before), (high, after) = points[:2]
    middle = compute(State.start(small, view="epsilon", epsilon=(low + high) / 2))
    expected = (before.percent + after.percent) / 2
    assert f"about {expected:.0f} % (interpolated)" in words(middle)
    assert "interpolated" not in words(data)


def test_the_smallest_radius_is_the_first_that_fools(small: ExploreParams, store: Path):
    data = compute(State.start(small, view="glance", image=3))
    assert isinstance(data, Glance)
    x, y = (part[3:4] for part in load_data("digits").test)
    model = runs.load(data.chosen.run)
    facet = data.facets[data.chosen.label]
    assert facet is not None
    fooled = [
        radius
        for radius in data.state.radii
        if model(attack_at(model, x, y, (radius,), small.pgd_steps)[-1]).argmax(1) != y
    ]
    assert facet.smallest == (fooled[0] if fooled else None)
    gradient, _ = input_gradient(model, x, y)
    assert facet.norm == pytest.approx(gradient.norm().item(), rel=1e-4)
    for radius, image in zip((0.0, 0.1), attack_at(model, x, y, (0.0, 0.1), small.pgd_steps)[-1], strict=True):
        assert (image.double() - x[0].double()).abs().max() <= radius
        assert image.min() >= 0 and image.max() <= 1


def test_the_advice_makes_what_is_shown(small: ExploreParams):
    explorer = Explorer(small)
    explorer.controls["student"].value = "digits_wide"
    assert "kdiga reproduce --scale smoke --only explore --set student=digits_wide" in status_of(explorer)
    advised = explore(at_scale(ExploreParams, "smoke", {"student": "digits_wide"}))
    assert {run.model for row in advised.rows for run in row.runs if row.id == "st"} == {"digits_wide"}


# ---- export ----


def test_saving_overwrites_nothing_and_offers_a_download(
    small: ExploreParams, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("KDIGA_FIGURES", str(tmp_path / "figures"))
    explorer = Explorer(small)
    explorer.export("png")
    explorer.controls["lambda_iga"].value = 8.0
    explorer.export("png")
    first, second = (tmp_path / "figures" / "smoke" / "explorer" / name for name in ("lambda.png", "lambda-2.png"))
    assert first.read_bytes() != second.read_bytes()
    found = re.search(r'download="lambda-2.png" href="data:[^,]*,([^"]+)"', explorer.status.value)
    assert found and base64.b64decode(found[1]) == second.read_bytes()


def test_the_parameter_file_brings_the_reader_back(
    small: ExploreParams, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("KDIGA_FIGURES", str(tmp_path / "figures"))
    explorer = Explorer(small)
    for name, value in {
        "view": "epsilon",
        "epsilon": 0.2,
        "image": 9,
        "method": "ard",
        "compare": ("st", "ard"),
    }.items():
        explorer.controls[name].value = value
    explorer.export("yaml")
    path = tmp_path / "figures" / "smoke" / "explorer" / "explore.yaml"
    assert yaml.safe_load(path.read_text())["settings"]["explore"]["show_image"] == 9
    again = Explorer(read(ExploreParams, path))
    assert text_of(again) == text_of(explorer)
    assert again.picture.value == explorer.picture.value


@pytest.mark.parametrize(("kind", "opening"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_pictures_are_saved(
    kind: str, opening: bytes, small: ExploreParams, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("KDIGA_FIGURES", str(tmp_path / "figures"))
    Explorer(small).exports[kind].click()
    assert (tmp_path / "figures" / "smoke" / "explorer" / f"lambda.{kind}").read_bytes().startswith(opening)


def test_a_folder_that_cannot_be_written_is_said(
    small: ExploreParams, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KDIGA_FIGURES", str(tmp_path / "file"))
    explorer = Explorer(small)
    explorer.export("png")
    assert "cannot be written: Not a directory" in status_of(explorer)


# ---- training in another process ----


def wait_until(condition: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def test_a_new_point_joins_the_store_and_the_curve(small: ExploreParams, store: Path):
    explorer = Explorer(small)
    explorer.untrained.value = True
    explorer.controls["lambda_iga"].value = 1.0
    explorer.untrained.value = False
    explorer.train_button.click()
    assert explorer.training is not None
    assert explorer.train_button.disabled
    assert not explorer.cancel_button.disabled
    wait_until(lambda: explorer.training is None)
    wait_until(lambda: "Trained and measured" in status_of(explorer))
    assert isinstance(explorer.data, TradeOff)
    assert 1.0 in [found.point.lambda_iga for found in explorer.data.nets if found.trained]
    assert "PGD-3" in text_of(explorer)
    assert explorer.train_button.disabled
    assert explorer.cancel_button.disabled
    assert weights_of(explorer) == [0.0, 1.0, 2.0, 8.0]


def test_a_cancelled_training_goes_on_from_its_last_epoch(small: ExploreParams, store: Path):
    explorer = Explorer(small.model_copy(update={"show_view": "loops", **LONG}))
    run = explorer.state.row().runs[0]
    explorer.train()
    wait_until(lambda: runs.epochs_done(run) > 0)
    explorer.cancel()
    wait_until(lambda: "Cancelled:" in status_of(explorer))
    done = runs.epochs_done(run)
    assert 0 < done < 25
    assert not is_finished(run)
    assert f"{done} of 25 epochs are done" in text_of(explorer)
    assert "ISD-WoT-1, seed 0 keeps" in status_of(explorer) and "the button continues from there" in status_of(explorer)
    training = Training(explorer.wanted(), "cpu")
    assert training.progress.done == done
    assert training.failures() == []
    assert len(runs.history(run)) == 25
    assert training.progress.done == training.progress.total


def test_the_curve_grows_while_the_net_trains(small: ExploreParams, store: Path):
    params = small.model_copy(update={"epochs": 40})
    runs.load_or_train(explored(one_seed(params), Point("st")).runs[0])  # else the button trains the smallest set
    explorer = Explorer(params)
    explorer.train()
    wait_until(lambda: isinstance(explorer.data, TradeOff) and bool(explorer.data.curves))
    assert explorer.training is not None and not is_finished(explorer.state.row().runs[0])
    assert re.search(r"Training KDIGA, λ = 2, seed 0: epoch \d+ of 40, \d+ s so far", status_of(explorer))
    explorer.cancel()
    wait_until(lambda: explorer.training is None)


def test_an_autoattack_under_way_says_which_images_are_left(small: ExploreParams, store: Path):
    explorer = Explorer(small.model_copy(update={"autoattack_images": 10}))
    explorer.autoattack.value = True
    explorer.train()
    said: list[str] = []
    wait_until(lambda: said.append(status_of(explorer)) or "Trained and measured" in said[-1])
    found = [match for text in said if (match := re.search(r"(\S+) attacks the (\d+) of 10 images", text))]
    members = list(dict.fromkeys(match[1] for match in found))
    assert members and members == [name for name in MEMBERS["standard"][1:] if name in members]
    assert all(0 < int(match[2]) <= 10 for match in found)


def test_a_net_published_without_weights_keeps_its_results(small: ExploreParams, store: Path):
    home = runs.folder(explored(one_seed(small), Point("kd")).runs[0])
    (home / "model.safetensors").unlink()
    record = json.loads((home / "run.json").read_text())
    (home / "run.json").write_text(json.dumps(record | {"published": "smoke"}))
    explorer = Explorer(small.model_copy(update={"show_view": "glance"}))
    assert "KD: its net is not in the store" in text_of(explorer)
    assert "published, but not every net that this view needs" in status_of(explorer)
    assert not explorer.train_button.disabled
    explorer.controls["view"].value = "lambda"
    assert isinstance(explorer.data, TradeOff)
    assert "clean" in explorer.data.nets[0].accuracies  # λ = 0 is KD


def test_a_damaged_net_is_set_aside_and_trained_again(small: ExploreParams, store: Path):
    explorer = Explorer(small.model_copy(update={"show_view": "image"}))
    home = runs.folder(explorer.state.row().runs[0])
    (home / "model.safetensors").write_bytes(b"no weights")
    explorer.refresh()
    explorer.train()
    wait_until(lambda: "Trained and measured" in status_of(explorer))
    assert len(list(store.glob(f"{home.name}.damaged-*"))) == 1
    assert not is_stale(explorer)
    assert "the losses of student and teacher differ" in text_of(explorer)


def test_a_training_that_fails_says_why(small: ExploreParams, store: Path):
    params = one_seed(small, learning_rate=1e30, clip_norm=0.0)
    training = Training([Job(explored(params, Point("st")).runs[0])], "cpu")
    (reason,) = training.failures()
    assert re.search("the term cross_entropy is (nan|inf)", reason)


def test_a_process_that_is_killed_is_told_from_one_that_ended(small: ExploreParams, store: Path):
    params = one_seed(small, **LONG)
    training = Training([Job(explored(params, Point("isd_wot", loop=1)).runs[0])], "cpu")
    training.cancel()
    assert training.failures() == ["the training process ended with status -15"]
    assert not training.is_running


def test_the_loop_view_follows_a_chain_whatever_was_chosen(small: ExploreParams, store: Path):
    explorer = Explorer(small)
    explorer.controls["view"].value = "loops"
    assert explorer.state.point.method == "isd_wot"
    explorer.controls["chain"].value = "isd_wit"
    assert explorer.state.point.method == "isd_wit"
    explorer.controls["view"].value = "epsilon"
    assert explorer.controls["method"].value == explorer.state.point.method == "kdiga"


# ---- finding an image ----


def test_found_images_are_what_the_store_says_of_them(small: ExploreParams, store: Path):
    state = State.start(small)
    masks = []
    for point in (Point("kd"), Point("kdiga", small.lambda_iga)):
        (cell,) = [one for one in state.row(point).cells if one.metric == f"pgd{small.pgd_steps}"]
        assert cell.jobs[0].measure is not None
        result = measured(cell.jobs[0].run, cell.jobs[0].measure)
        assert result is not None
        masks.append(result["survivors"])
    for kind, wanted in (("kd_only", "01"), ("both", "00")):
        expected = [i for i, pair in enumerate(zip(*masks, strict=True)) if "".join(pair) == wanted]
        found, seen = state, []
        for _ in expected:
            images, text = find(found, kind)
            assert text.startswith(f"{len(expected)} of {len(masks[0])} test images")
            after = [i for i in expected if i > found.image] + [i for i in expected if i <= found.image]
            assert images == after[:SHOWN]
            seen.append(images[0])
            found = replace(found, image=images[0])
        assert sorted(seen) == expected
        if not expected:
            assert find(state, kind)[0] == []


def test_the_smallest_margins_are_the_smallest(small: ExploreParams, store: Path):
    state = State.start(small)
    images, text = find(state, "margin")
    model = load_or_train(state.row(Point("kdiga", small.lambda_iga)).runs[0], device="cpu")
    test = load_data(small.dataset).test
    with torch.no_grad():
        logits = model(test.images)
    rivals = logits.clone()
    rivals[torch.arange(len(rivals)), test.labels] = -torch.inf
    lead = logits[torch.arange(len(logits)), test.labels] - rivals.max(1).values
    positive = lead.where(lead > 0, torch.inf)
    assert positive[images].tolist() == pytest.approx(positive.sort().values[:SHOWN].tolist(), abs=1e-4)
    assert f"leads by {positive.min().item():.2f} nats" in text


def test_buttons_find_images_and_are_there_where_an_image_is_shown(small: ExploreParams, store: Path):
    explorer = Explorer(small)
    explorer.finds["random"].click()
    first = explorer.state.image
    explorer.finds["random"].click()
    assert explorer.state.image != first
    explorer.finds["margin"].click()
    least, _ = find(State.start(small), "margin")
    assert explorer.state.image == least[0] and "leads by" in explorer.status.value
    strip = explorer.thumbnails
    assert strip.images == least and "kdiga-chosen" in strip.buttons[0]._dom_classes
    strip.buttons[3].click()
    assert explorer.state.image == least[3]
    marked = [place for place, button in enumerate(strip.buttons) if "kdiga-chosen" in button._dom_classes]
    assert marked == [3]
    label = int(load_data(small.dataset).test.labels[least[3]])
    assert strip.buttons[3].tooltip == f"image {least[3]}: {label}"
    explorer.controls["view"].value = "lambda"
    assert explorer.finders.layout.display == "none"


def test_without_measurements_the_finder_says_so(small: ExploreParams):
    images, text = find(State.start(small), "both")
    assert images == [] and "no PGD measurement" in text
    assert find(State.start(small), "margin") == ([], "The store has no KDIGA net with this weight and seed.")


# ---- guess first ----


def test_missions_have_the_tables_answers() -> None:
    params = at_scale(ExploreParams, "digits")
    published = pd.read_csv(paths.published("digits") / "explore.csv")

    def number(row: str, metric: str) -> float:
        return published.loc[(published["row"] == row) & (published["metric"] == metric), "value"].iloc[0]

    broken, edge, loops = missions(params, published).every
    assert number("kd", "pgd20") > 50 > number("kd", "pgd20@0.15") and number("kdiga_1_5", "pgd20@0.15") > 50
    assert f"KD ε = 0.15 ({number('kd', 'pgd20@0.15'):.1f} %)" in broken.answer
    assert f"KDIGA ε = 0.2 ({number('kdiga_1_5', 'pgd20@0.2'):.1f} %)" in broken.answer
    weights = {0.5: "kdiga_0_5", 1.5: "kdiga_1_5", 8.0: "kdiga_8", 32.0: "kdiga_32"}
    best = max(weights, key=lambda weight: number(weights[weight], "pgd20"))
    assert edge.answer.startswith(f"λ = {best:g} has {number(weights[best], 'pgd20'):.1f} %")
    one, six = number("isd_wot_1", "pgd20"), number("isd_wot_6", "pgd20")
    assert f"{'more' if six > one else 'less'} robust: {six:.1f} % against {one:.1f} %" in loops.answer


def test_missions_fold_their_answers_and_say_what_is_not_measured() -> None:
    params = at_scale(ExploreParams, "digits")
    empty = pd.DataFrame(columns=["row", "metric", "value"])
    page = missions(params, empty)
    assert page._repr_html_().count("<details>") == 3
    assert ["ot measured" in one.answer for one in page.every] == [True] * 3


# ---- the attack film ----


def test_the_film_is_the_attack_of_the_other_views_step_by_step(small: ExploreParams, store: Path):
    state = State.start(small, view="film", image=2, step=small.pgd_steps)
    film = compute(state)
    assert isinstance(film, Film)
    model = load_or_train(state.row().runs[0], device="cpu")
    test = load_data(small.dataset).test
    x, y = test.images[2:3], test.labels[2:3]
    frames = attack_at(model, x, y, (state.epsilon,), small.pgd_steps)
    assert len(film.frames) == small.pgd_steps + 1 and film.step == small.pgd_steps
    np.testing.assert_allclose(film.frames[-1], frames[-1][0, 0].numpy(), atol=1e-6)
    losses = [cross_entropy(model(frame), y).item() for frame in frames]
    np.testing.assert_allclose(film.losses, losses, rtol=1e-4, atol=1e-5)
    answers = [int(model(frame).argmax()) for frame in frames]
    expected = next((step for step, answer in enumerate(answers) if answer != int(y)), None)
    assert film.fooled == expected
    assert list(table(film)["answer"]) == [str(answer) for answer in answers]
    assert words(compute(replace(state, step=0))) != words(film)


def test_play_belongs_to_the_film_alone(small: ExploreParams, store: Path):
    explorer = Explorer(small.model_copy(update={"show_view": "film"}))
    assert explorer.play.layout.display == "flex" and explorer.play.max == small.pgd_steps
    explorer.controls["view"].value = "epsilon"
    assert explorer.play.layout.display == "none"
