"""The explorer: controls, a picture and a line of text, made by ``compute``, ``draw`` and ``words``.

Moving a control reads the store and redraws; only a button starts training, in a separate process.
"""

import base64
import gc
import html
import itertools
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import ipywidgets as ipw
import yaml

from kdiga_nb import paths, runs
from kdiga_nb.artifacts.explore import CHAINS, Point, reference_teacher
from kdiga_nb.artifacts.table import Row
from kdiga_nb.data import DataError, load_data
from kdiga_nb.models import MODELS
from kdiga_nb.params import EXPLORED, VIEWS, ExploreParams, ParameterError, at_scale, radius_text, scales
from kdiga_nb.runs import StoreError
from kdiga_nb.runs.graph import Job, title
from kdiga_nb.runs.run import Run
from kdiga_nb.runs.store import is_finished
from kdiga_nb.widgets.background import Training, TrainingProgress, warm_up
from kdiga_nb.widgets.drawing import DPI, SIZE, draw, image_bytes
from kdiga_nb.widgets.finding import FINDS, SHOWN, find
from kdiga_nb.widgets.thumbnails import Thumbnails
from kdiga_nb.widgets.views import (
    State,
    ViewData,
    comparison,
    compute,
    details,
    glance_points,
    is_empty,
    missing,
    words,
)

log = logging.getLogger("kdiga")

LOOPS_BEYOND = 2  # loops on the slider beyond those that the parameters train
POLL_SECONDS = 0.3
WIDE, NARROW = "370px", "182px"

STYLE = """<style>
.kdiga-text, .kdiga-status { line-height: 1.4; max-width: 1500px }
.kdiga-text { min-height: 2.8em; font-size: 1.05em }
.kdiga-explorer { --kdiga-red: #a32020 }
[data-jp-theme-light="false"] .kdiga-explorer, .theme-dark .kdiga-explorer { --kdiga-red: #ff8a80 }
.kdiga-error { color: var(--kdiga-red) }
.kdiga-explorer img { width: 100%; max-width: 1500px; height: auto; border-radius: 4px }
.kdiga-explorer img { outline: 2px dashed transparent }
.kdiga-explorer .kdiga-stale img { opacity: .35; outline-color: var(--kdiga-red) }
.kdiga-explorer .kdiga-stale img { transition: opacity 0s .6s, outline-color 0s .6s } /* quick moves do not flicker */
.kdiga-explorer .widget-html-content { width: 100%; color: inherit }
[data-jp-theme-light="false"] .kdiga-explorer img, .theme-dark .kdiga-explorer img { filter: brightness(.86) }
.kdiga-explorer details { line-height: 1.5; max-width: 900px }
.kdiga-explorer summary { cursor: pointer }
.kdiga-explorer .kdiga-chosen { outline: 3px solid #0072b2 }
</style>"""

HELP = {
    "glance": (
        "One image, seen by five nets. First row: the gradient of the loss with respect to the image; red: a brighter "
        "pixel raises the loss. Second row: the image attacked on that net at the chosen ε, and its answer. Third row: "
        "its probabilities for every class, clean and attacked. Left: the smallest ε of the slider at which the attack "
        "fools each net; the dashed line is the chosen ε. The gradient penalty has no teacher: it is the control that "
        "shows how much a small gradient alone does."
    ),
    "lambda": (
        "λ_IGA is the weight of input gradient alignment in the loss; λ_IGA = 0 is KD. Left: clean and robust "
        "accuracy of all trained weights, with 95 % intervals over the test images. Middle: the same nets as a "
        "trade-off; the ring marks the chosen weight. Right: the weighted terms of the loss during training. The "
        "effective weight decides: with the norm of the authors' code, the effective weight is far below the nominal."
    ),
    "epsilon": (
        "ε is the largest change of a pixel. Left: accuracy against ε, from the store. Middle: clean images, the "
        "magnified change (grey: none, white: brighter, black: darker) and attacked images; the attack is computed "
        "now and knows the student. Right: predictions of student and teacher for the first image; the teacher gets "
        "the image that was attacked on the student."
    ),
    "film": (
        "PGD on one image, step by step; step 0 is its random start. Above: the image, its magnified change (grey: "
        "none, white: brighter, black: darker) and the attacked image. Below: the loss after each step, with a cross "
        "where the net is first fooled, and the probabilities of the clean image and at this step. Play runs through "
        "the steps."
    ),
    "loops": (
        "The student of each loop is the teacher of the next loop. Left: accuracy per loop, with dropout before the "
        "last layer (solid) and without (dotted). Middle: the local linearity measure of Definition 2; 0 means that "
        "the loss is linear in the ball. Right: the input gradients of student and teacher at one image, and their "
        "cosine similarity."
    ),
    "image": (
        "Proposition 2 bounds the difference between the losses of student and teacher in the ball of radius ε. "
        "Left: the stacked terms of the bound, and the largest difference that a search found. The terms γ come from "
        "a search too, so the bar can be slightly too low. Right: the loss of both nets around the image. The dashed "
        "square is the ball; orange marks wrong predictions."
    ),
}
# The controls that each view depends on.
CONTROLS = {
    "glance": ("epsilon", "image", "lambda_iga"),
    "lambda": ("lambda_iga",),
    "epsilon": ("epsilon", "image", "method", "lambda_iga", "loop", "dropout"),
    "film": ("epsilon", "step", "image", "method", "lambda_iga", "loop", "dropout"),
    "loops": ("loop", "image", "chain", "dropout"),
    "image": ("image", "epsilon", "method", "lambda_iga", "loop", "dropout"),
}


OWN = ("epsilon", "step", "image", "method", "chain", "lambda_iga", "loop", "dropout")  # shown by some views only
GLOSSARY = {
    "ST": "standard training on the labels",
    "KD": "knowledge distillation: the student also matches the teacher's predictions",
    "KDIGA": "KD with input gradient alignment: the student also matches the teacher's input gradients",
    "gradient penalty": "a control without a teacher: the student's input gradients are made small",
    "input gradient": "how the loss changes with each pixel",
    "ISD-WoT, ISD-WiT": "iterative self-distillation without and with a robust teacher for the first loop",
    "TRADES": "adversarial training that keeps clean and attacked predictions close",
    "PGD-20, AutoAttack": "attacks that know the net; AutoAttack is the stronger one",
    "LLM": "local linearity measure: how far the loss is from linear in the ball of radius ε (0: linear)",
    "nats": "the unit of the cross-entropy: its logarithm is natural",
}


@cache
def _freeze_garbage() -> None:
    """Once per process: exclude imported objects from garbage collection, which would take 200 ms every few figures."""
    gc.collect()
    gc.freeze()


@contextmanager
def _collected_after() -> Iterator[None]:
    """No garbage collection inside, and one of what was made inside at the end.

    Matplotlib's figures are reference cycles. A collection while one is drawn would find nothing and make the figure
    old; at the end a collection of young objects frees the figure in a quarter of the time of a full one.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.collect(0)


class Explorer:
    """Controls for λ_IGA, ε and the loop, with a figure that follows the controls.

    Attributes:
        state: the values of the controls.
        data: the data of the figure; None if there is no figure.
        training: the current training, if any.
        widget: the widget to display.
    """

    def __init__(self, params: ExploreParams) -> None:
        self.params = params
        self.data: ViewData | None = None
        self.training: Training | None = None
        self._state = State.start(params)
        self._draws = itertools.count()  # of random images
        self._busy = False  # True while code sets the controls: handlers then do nothing
        self._lock = threading.RLock()  # the thread that watches a training redraws at the end
        _freeze_garbage()
        warm_up()
        self._build()
        self._take(self._state)
        self.refresh()

    @property
    def state(self) -> State:
        """The values of the controls."""
        return self._state

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        """The widget, and a text for readers without a kernel."""
        shown = words(self.data) if self.data else "The explorer; run this cell to use it."
        return (self.widget._repr_mimebundle_() or {}) | {"text/plain": shown}

    # ---- the controls ----

    def _build(self) -> None:
        self.text = ipw.HTML()
        self.status = ipw.HTML()
        self.picture = ipw.HTML()
        self.help = ipw.HTML()
        self.pinned: State | None = None
        self.pin_text = ipw.HTML()
        self.pin_button = ipw.Button(description="Pin this net", icon="thumb-tack", layout=ipw.Layout(width="auto"))
        self.pin_button.on_click(lambda _: self.pin())
        self.untrained = ipw.Checkbox(description="untrained weights too", indent=False)
        self.untrained.layout.width = "180px"
        self.untrained.observe(lambda _: self._renew_weights(), names="value")
        self.bar = ipw.IntProgress(value=0, min=0, max=1, layout=ipw.Layout(width="220px", visibility="hidden"))
        self.train_button = ipw.Button(description="Train this point", icon="play", disabled=True)
        self.cancel_button = ipw.Button(description="Cancel", icon="stop", disabled=True)
        self.autoattack = ipw.Checkbox(value=False, description="with AutoAttack (slow)", indent=False)
        self.autoattack.layout.width = "190px"
        exports = {"png": "Save PNG", "svg": "Save SVG", "yaml": "Save parameters"}
        self.exports = {kind: ipw.Button(description=name, icon="download") for kind, name in exports.items()}
        for button in (self.train_button, self.cancel_button, *self.exports.values()):
            button.layout.width = "auto"  # the default width cuts the text
        self.finds = {kind: ipw.Button(description=name) for kind, name in FINDS.items()}
        for kind, button in self.finds.items():
            button.layout.width = "auto"
            button.on_click(lambda _, kind=kind: self.find(kind))
        self.controls = self._make_controls()
        self.train_button.on_click(lambda _: self.train())
        self.cancel_button.on_click(lambda _: self.cancel())
        self.autoattack.observe(lambda _: self._offer(), names="value")
        for kind, button in self.exports.items():
            button.on_click(lambda _, kind=kind: self.export(kind))
        for name, control in self.controls.items():
            control.observe(lambda change, name=name: self._changed(name), names="value")
        head = ipw.HBox([self.controls[name] for name in ("view", "scale", "student", "seed")], layout=_wrapped())
        self.play = ipw.Play(min=0, max=self.params.pgd_steps, interval=250, description="play the attack")
        ipw.jslink((self.play, "value"), (self.controls["step"], "value"))
        # The chain seen loop by loop: slow enough to look at the gradient maps.
        start = {"value": self._state.loop, "min": 1, "max": self._last_loop()}
        self.loop_play = ipw.Play(**start, interval=1200, description="play the loops")
        ipw.jslink((self.loop_play, "value"), (self.controls["loop"], "value"))
        own = [self.play, self.loop_play, *(self.controls[name] for name in OWN), self.untrained]
        # Of fixed height: the figure then keeps its place when the view changes.
        fixed = ipw.Layout(flex_flow="row wrap", align_items="center", align_content="flex-start", min_height="112px")
        self.own = ipw.HBox(own, layout=fixed)
        actions = ipw.HBox(
            [self.train_button, self.autoattack, self.cancel_button, self.bar, self.pin_button, *self.exports.values()],
            layout=_wrapped(),
        )
        self.thumbnails = Thumbnails(self._choose_image)
        self._offer_images(range(SHOWN))
        search = [ipw.Label("find an image:"), *self.finds.values(), self.thumbnails.widget]
        self.finders = ipw.HBox(search, layout=_wrapped())
        parts = [ipw.HTML(STYLE), head, self.own, self.finders, self.text, self.pin_text, self.picture]
        parts += [self.controls["compare"], actions, self.status, self.help]
        self.widget = ipw.VBox(parts)
        self.widget.add_class("kdiga-explorer")

    def _make_controls(self) -> dict[str, Any]:
        state = self._state
        views = [(name, key) for key, name in VIEWS.items()]
        methods = [(name, key) for key, name in EXPLORED.items()]
        seeds = sorted({*self.params.seeds, state.seed})
        every_scale = sorted({*scales(), self.params.scale})
        return {
            "view": ipw.ToggleButtons(options=views, style={"button_width": "auto"}),
            "scale": ipw.Dropdown(options=every_scale, description="scale", **_place(NARROW, "50px")),
            "student": ipw.Dropdown(options=self._students(), description="student", **_place(NARROW, "50px")),
            "seed": ipw.Dropdown(options=seeds, description="seed", **_place(NARROW, "50px")),
            "lambda_iga": ipw.SelectionSlider(options=self._weights(), description="λ_IGA", **_slider()),
            "epsilon": ipw.SelectionSlider(options=self._radii(), description="ε", **_place(WIDE)),
            "step": ipw.IntSlider(min=0, max=self.params.pgd_steps, description="step", **_place(WIDE)),
            "loop": ipw.IntSlider(min=1, max=self._last_loop(), description="loop", **_slider()),
            "image": ipw.IntSlider(min=0, max=self._images() - 1, description="image", **_slider()),
            "chain": ipw.Dropdown(
                options=[(EXPLORED[name], name) for name in CHAINS], description="chain", **_place(WIDE)
            ),
            "method": ipw.Dropdown(options=methods, description="method", **_place(WIDE)),
            "dropout": ipw.Checkbox(description="head dropout, in ISD", **_place(WIDE)),
            "compare": ipw.SelectMultiple(options=methods, rows=5, description="compare with", **_place(WIDE, "90px")),
        }

    def _weights(self) -> list[tuple[str, float]]:
        """The weights with a trained net and the chosen one, or all weights."""
        state, shown = self._state, self._state.lambdas
        trained = [weight for weight in shown if is_finished(state.row(Point("kdiga", weight)).runs[0])]
        if trained and not self.untrained.value:
            shown = sorted({*trained, state.lambda_iga})
        return [(f"{weight:g}" if weight else "0 (KD)", weight) for weight in shown]

    def _renew_weights(self) -> None:
        """The slider's weights, after a change of the store, the net or the checkbox."""
        before, self._busy = self._busy, True
        try:
            self.controls["lambda_iga"].options = self._weights()
            self.controls["lambda_iga"].value = self._state.lambda_iga
        finally:
            self._busy = before

    def _radii(self) -> list[tuple[str, float]]:
        return [(radius_text(radius), radius) for radius in sorted({*self._state.radii, self._state.epsilon})]

    def _students(self) -> list[str]:
        """The nets for the data set: those for digits, or all others."""
        return [name for name, net in MODELS.items() if net.digits == MODELS[self.params.student].digits]

    def _images(self) -> int:
        return len(load_data(self.params.dataset).test.labels)

    def _last_loop(self) -> int:
        return max(self.params.loops + LOOPS_BEYOND, self._state.loop)

    def _take(self, state: State) -> None:
        """Set the state and the controls."""
        self._state = state
        self._busy = True
        try:
            for name, control in self.controls.items():
                control.value = self.params.scale if name == "scale" else getattr(self._state, name)
        finally:
            self._busy = False

    def _changed(self, name: str) -> None:
        if self._busy:
            return
        with self._lock:
            if name == "scale":
                self._change_scale(self.controls["scale"].value)
                return
            values = {key: control.value for key, control in self.controls.items() if key != "scale"}
            self._take(State(self.params, **values))
            if name in ("seed", "student"):
                self._renew_weights()
            self.refresh()

    def _change_scale(self, scale: str) -> None:
        """Load the parameters of another scale and reset the controls to the new parameters."""
        try:
            params = at_scale(ExploreParams, scale)
            load_data(params.dataset)
        except (ParameterError, DataError) as error:
            self._take(self._state)  # the control returns to the scale that is shown
            self._say(f"The scale {scale} cannot be shown: {_one_line(error)}. {self.params.scale} stays.", "error")
            return
        self.params = params
        self._state = State.start(self.params, view=self._state.view)
        self._busy = True
        try:
            self.controls["student"].options = self._students()
            self.controls["seed"].options = sorted({*self.params.seeds, self._state.seed})
            self._renew_weights()
            self.controls["epsilon"].options = self._radii()
            self.controls["loop"].max, self.controls["image"].max = self._last_loop(), self._images() - 1
            self.controls["step"].max = self.play.max = self.params.pgd_steps
            self.loop_play.max = self._last_loop()
            self.pinned = None
            self._offer_images(range(SHOWN))
        finally:
            self._busy = False
        self._take(self._state)
        self.refresh()

    # ---- figure and text ----

    def refresh(self) -> None:
        """Compute and draw the chosen view; an error is reported as text."""
        with self._lock, _collected_after():
            self._arrange()
            self._mark_stale(True)
            try:
                data = compute(self._state)
                shown = words(data)
                self._show(draw(data), shown)
                self.data = data
            except Exception as error:
                # Jupyter hides exceptions of handlers in the server's log. Tell the reader, and keep the old figure,
                # marked as outdated.
                log.debug("the explorer cannot show %s", self._state, exc_info=True)
                self._text(f"This point cannot be shown: {_one_line(error)}.")
                self._offer()
                return
            self._mark_stale(False)
            self._text(shown, details(data))
            self._compare_with_pinned()
            self._offer()

    def pin(self) -> None:
        """Keep the chosen net as the one that the next nets are compared with, or let it go."""
        self.pinned = self._state if self.pinned is None else None
        self._compare_with_pinned()

    def _compare_with_pinned(self) -> None:
        self.pin_button.description = "Pin this net" if self.pinned is None else "Unpin"
        self.pin_button.disabled = self.pinned is None and not is_finished(self._state.row().runs[0])
        text = ""
        if self.pinned is not None:
            shown = comparison(self._state, self.pinned)
            text = f"Pinned: {self._name(self.pinned)}." + (
                f" {self._name(self._state)} against it: {shown}." * bool(shown)
            )
        self.pin_text.value = f'<div class="kdiga-pinned" role="status">{html.escape(text)}</div>' if text else ""

    def _arrange(self) -> None:
        """Show the controls of the view, and disable those that the chosen method does not use."""
        state = self._state
        for name in OWN:
            self.controls[name].layout.display = "flex" if name in CONTROLS[state.view] else "none"
        self.controls["compare"].layout.display = "flex" if state.view == "epsilon" else "none"
        self.play.layout.display = "flex" if state.view == "film" else "none"
        self.loop_play.layout.display = "flex" if state.view == "loops" else "none"
        self.untrained.layout.display = "flex" if "lambda_iga" in CONTROLS[state.view] else "none"
        self.finders.layout.display = "flex" if "image" in CONTROLS[state.view] else "none"
        self.thumbnails.mark(state.image)
        chain = state.method in CHAINS or state.view == "loops"
        self.controls["lambda_iga"].disabled = state.view not in ("glance", "lambda") and state.method != "kdiga"
        self.controls["loop"].disabled = not chain
        self.controls["dropout"].disabled = not chain
        self.autoattack.disabled = self.params.autoattack_images == 0
        terms = "".join(
            f"<dt><b>{html.escape(term)}</b></dt><dd>{html.escape(GLOSSARY[term])}</dd>" for term in GLOSSARY
        )
        self.help.value = (
            f"<details><summary>About this view</summary>{html.escape(HELP[state.view])}</details>"
            f"<details><summary>Glossary</summary><dl>{terms}</dl></details>"
        )

    def _show(self, figure: Any, text: str) -> None:
        content = base64.b64encode(image_bytes(figure)).decode()
        width, height = (round(inches * DPI) for inches in SIZE)
        # An image element has an alternative text and does not flicker; an output area does.
        self.picture.value = (
            f'<img src="data:image/png;base64,{content}" alt="{html.escape(text)}" '
            f'style="aspect-ratio: {width} / {height}">'
        )

    def _text(self, text: str, more: Sequence[str] = ()) -> None:
        folded = "<br>".join(html.escape(line) for line in more)
        folded = f"<details><summary>Details</summary>{folded}</details>" if more else ""
        self.text.value = f'<div role="status" class="kdiga-text">{html.escape(text)}</div>{folded}'

    def _mark_stale(self, stale: bool) -> None:
        """Dim a figure that does not match the controls."""
        (self.picture.add_class if stale else self.picture.remove_class)("kdiga-stale")

    def _say(self, text: str, kind: str = "info", link: str = "") -> None:
        self.status.value = f'<div role="status" class="kdiga-status kdiga-{kind}">{html.escape(text)} {link}</div>'

    def find(self, kind: str) -> None:
        """Show the next test image of a kind of ``FINDS``, offer more of them, and say how many there are."""
        with self._lock:
            try:
                images, text = find(self._state, kind, draw=next(self._draws))
            except StoreError as error:
                self._say(str(error), "error")
                return
            if images:
                self._offer_images(images)
                self.thumbnails.mark(images[0])
                self.controls["image"].value = images[0]
            self._say(text)

    def _offer_images(self, images: Sequence[int]) -> None:
        self.thumbnails.show(load_data(self.params.dataset), images, self._state.class_name)

    def _choose_image(self, image: int) -> None:
        self.controls["image"].value = image

    # ---- training ----

    def wanted(self) -> list[Job]:
        """The jobs of the train button: the chosen net and its measurements; for an empty store the smallest set."""
        if is_empty(self._state):
            points = [Point("st"), Point("kd"), Point("kdiga", self.params.lambda_iga)]
            return [job for point in points for job in self._jobs(self._state.row(point))]
        if self._state.view == "glance":
            sources = [self._state.row(point).runs[0] for point in glance_points(self._state)]
            return [Job(source) for source in (*sources, reference_teacher(self._state.here)[0])]
        # All views but the λ view compare the net with the reference teacher.
        teachers = [] if self._state.view == "lambda" else [Job(reference_teacher(self._state.here)[0])]
        return [*teachers, *self._jobs(self._state.row())]

    def _jobs(self, row: Row) -> list[Job]:
        """The net and its measurements in the view; AutoAttack, which takes longer than training, only if ticked."""
        cells = [cell for cell in row.cells if cell.metric != "autoattack" or self.autoattack.value]
        if self._state.view != "epsilon":
            cells = [cell for cell in cells if "@" not in cell.metric]
        return list(dict.fromkeys([Job(row.runs[0]), *(job for cell in cells for job in cell.jobs)]))

    def _offer(self) -> None:
        """Report missing results and enable the train button."""
        if self.training is not None:
            return
        state, params = self._state, self.params
        open_jobs = [job for job in self.wanted() if not job.is_done()]
        finished = [run for run in _with_teachers(self.wanted()) if is_finished(run)]
        weightless = [run for run in finished if runs.lacks_weights(run)]
        damaged = [reason for run in finished if run not in weightless and (reason := runs.damage(run))]
        self.train_button.disabled = not open_jobs and not damaged and not weightless
        measured_only = is_finished(state.row().runs[0]) and not damaged and not weightless
        self.train_button.description = "Measure this point" if measured_only else "Train this point"
        if is_empty(state):
            self.train_button.description = "Train the smallest set"
            self._say(
                f"The store has no nets of the scale {params.scale} for {state.student}, seed {state.seed}. "
                f"`{self._command()}` trains all nets of this page; "
                "the button trains ST, KD and one KDIGA net."
            )
        elif damaged:
            self._say(f"Damaged ({damaged[0]}). The button sets the damaged run aside and trains again.", "error")
        elif weightless:
            self._say("The results are published, but not every net that this view needs. The button trains the nets.")
        elif text := missing(state):
            self._say(f"{text} The button trains and measures this net; sliders never train.")
        elif open_jobs:
            self._say("The net is in the store; some measurements are missing. The button makes them.")
        else:
            self._say("Read from the run store.")

    def _command(self) -> str:
        """The command that trains the nets of the page for the chosen student and seed."""
        command = f"kdiga reproduce --scale {self.params.scale} --only explore"
        own = at_scale(ExploreParams, self.params.scale)
        if self._state.student != own.student:
            command += f" --set student={self._state.student}"
        return command if self._state.seed in own.seeds else f"{command} --set seeds=[{self._state.seed}]"

    def train(self) -> None:
        """Train and measure in another process; the page stays responsive."""
        if self.training is not None:
            return
        try:
            runs.check_writable(paths.runs())
        except StoreError as error:
            self._say(str(error), "error")
            return
        self.training = Training(self.wanted(), self.params.device)
        self._trained = self._state
        self.train_button.disabled, self.cancel_button.disabled = True, False
        self.bar.layout.visibility = "visible"
        self._report(self.training.progress)
        threading.Thread(target=self._watch, args=(self.training,), daemon=True).start()

    def cancel(self) -> None:
        """End the training; the store keeps all finished epochs and measurements."""
        if self.training is not None:
            self.training.cancel()

    def _name(self, state: State) -> str:
        """The point that a state selects, in words."""
        return f"{state.row().label}, seed {state.seed}"

    def _watch(self, training: Training) -> None:
        pause = threading.Event()
        drawn = training.progress.done
        while training.is_running:
            self._report(progress := training.progress)
            if progress.done != drawn and self._state.view == "lambda" and self._state == self._trained:
                drawn = progress.done
                self.refresh()  # the training curve grows
            pause.wait(POLL_SECONDS)
        failures = training.failures()
        done = training.progress
        with self._lock:
            self.training = None
            self.cancel_button.disabled = True
            self.bar.layout.visibility = "hidden"
            self._renew_weights()
            self.refresh()
            what = self._name(self._trained)
            if training.cancelled:
                here = self._state.row().runs == self._trained.row().runs
                then = "the button continues from there" if here else "choose that point again to continue"
                self._say(f"Cancelled: {what} keeps {done.done} of {done.total} steps; {then}.")
            elif failures:
                self._say(f"Training of {what} failed: {'; '.join(failures)}", "error")
            else:
                self._say(f"Trained and measured {what} in {done.seconds:.0f} s; the result is in the run store.")

    def _report(self, progress: TrainingProgress) -> None:
        self.bar.max, self.bar.value = max(progress.total, 1), progress.done
        left = "" if progress.seconds_left is None else f", about {progress.seconds_left:.0f} s left"
        step = progress.attack or f"measuring, {progress.done} of {progress.total} steps"
        if progress.run is not None:
            first = "" if progress.run == self._trained.row().runs[0] else f"first {title(Job(progress.run))}: "
            step = f"{first}epoch {progress.epoch} of {progress.run.schedule.epochs}"
        self._say(f"Training {self._name(self._trained)}: {step}, {progress.seconds:.0f} s so far{left}.")

    # ---- export ----

    def export(self, kind: str) -> None:
        """Write the figure (png, svg) or the parameters that reproduce it (yaml) to the scale's figures folder."""
        if kind != "yaml" and self.data is None:
            self._say("There is no figure to save yet.", "error")
            return
        home = paths.figures(self.params.scale) / "explorer"
        try:
            home.mkdir(parents=True, exist_ok=True)
            if kind == "yaml":
                path = _unused(home / "explore.yaml")
                chosen, own = (
                    self._state.parameters().model_dump(),
                    at_scale(ExploreParams, self.params.scale).model_dump(),
                )
                changed = {name: value for name, value in chosen.items() if value != own[name]}
                values = {"scale": self.params.scale, "settings": {"explore": changed}}
                path.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
            else:
                assert self.data is not None
                path = _unused(home / f"{self.data.state.view}.{kind}")
                path.write_bytes(image_bytes(draw(self.data), kind))
        except OSError as error:
            self._say(f"{home} cannot be written: {error.strerror or error}", "error")
            return
        shown = path.relative_to(paths.ROOT) if path.is_relative_to(paths.ROOT) else path
        repeat = f"; papermill notebooks/explore.ipynb out.ipynb -f {shown} repeats this view" if kind == "yaml" else ""
        content = base64.b64encode(path.read_bytes()).decode()
        link = (
            f'<a download="{path.name}" href="data:application/octet-stream;base64,{content}">Download {path.name}</a>'
        )
        self._say(f"Written to {shown}{repeat}.", link=link)


def _with_teachers(jobs: list[Job]) -> list[Run]:
    """The runs of the jobs, and their teachers."""
    trained = [run for run in {job.run for job in jobs} if isinstance(run, Run)]
    return [*trained, *(run.teacher for run in trained if isinstance(run.teacher, Run))]


def _unused(path: Path) -> Path:
    """The path, or the first of name-2, name-3, … that does not exist."""
    numbered = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    return path if not path.exists() else next(other for other in numbered if not other.exists())


def _place(width: str, description: str = "70px") -> dict[str, Any]:
    """Style and layout of one control; a separate layout lets each control be hidden alone."""
    return {"style": {"description_width": description}, "layout": ipw.Layout(width=width)}


def _wrapped() -> ipw.Layout:
    """Layout of one row that wraps; a shared one would hide all rows with the first."""
    return ipw.Layout(flex_flow="row wrap", align_items="center")


def _slider() -> dict[str, Any]:
    return _place(WIDE) | {"continuous_update": False}


def _one_line(error: Exception) -> str:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return text.rstrip(".")
