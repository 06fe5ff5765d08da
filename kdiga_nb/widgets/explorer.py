"""The explorer: controls, a picture, a line of text. Everything it knows comes from ``compute`` and ``draw``.

Moving a control reads the store and redraws; it never trains. Training sits behind a button, in a process of its own.
"""

import base64
import gc
import html
import logging
import threading
from dataclasses import replace
from typing import Any

import ipywidgets as ipw
import yaml

from kdiga_nb import paths, runs
from kdiga_nb.artifacts.explore import CHAINS, Point, reference_teacher
from kdiga_nb.artifacts.table import Row
from kdiga_nb.data import load_data
from kdiga_nb.models import MODELS
from kdiga_nb.params import EXPLORED, VIEWS, ExploreParams, ParameterError, at_scale, radius_text, scales
from kdiga_nb.runs import StoreError
from kdiga_nb.runs.graph import Job
from kdiga_nb.runs.run import Run
from kdiga_nb.runs.store import is_finished
from kdiga_nb.widgets.background import Training, TrainingProgress
from kdiga_nb.widgets.drawing import DPI, SIZE, draw, image_bytes
from kdiga_nb.widgets.views import State, ViewData, compute, is_empty, missing, words

log = logging.getLogger("kdiga")

LOOPS_BEYOND = 2  # the loop slider goes this far beyond what the parameters train
POLL_SECONDS = 0.3
WIDE, NARROW = "370px", "200px"

STYLE = """<style>
.kdiga-text, .kdiga-status { line-height: 1.4; max-width: 1080px }
.kdiga-text { min-height: 2.8em }
.kdiga-error { color: #a32020 }
.kdiga-stale img { opacity: .35; outline: 2px dashed #a32020 }
.kdiga-explorer details { line-height: 1.5; max-width: 900px }
.kdiga-explorer summary { cursor: pointer }
</style>"""

HELP = {
    "lambda": (
        "λ_IGA is the weight of the term that pulls the student's input gradients to its teacher's; at 0 the "
        "method is plain KD. Left: clean and robust accuracy at every weight that is trained, with 95 % intervals "
        "over the test images. Middle: the same points as a trade-off; the ring marks the chosen weight. Right: "
        "each weighted term of the loss while the chosen net trained. The weight that counts is the effective one:"
        " under the authors' code's norm it is far smaller than the nominal one."
    ),
    "epsilon": (
        "ε is the largest change of a pixel that the attack may make. Left: accuracy against ε, from the store. "
        "Middle: the same images clean, the change (grey: none, white: brighter, black: darker; magnified as "
        "stated) and attacked, computed now, with full knowledge of the student. Right: what the student and its "
        "teacher make of the first of these images; the teacher sees the attack that was made on the student."
    ),
    "loops": (
        "Each loop distils a net from itself: the student of one loop is the teacher of the next. Left: accuracy "
        "loop by loop, with dropout before the last layer (solid) and without (dotted). Middle: the local "
        "linearity measure of Definition 2; a net that is linear inside the ball has 0. Right: the loss's gradient"
        " for the pixels of one image, student and teacher, and how well the two point the same way."
    ),
    "image": (
        "Proposition 2 bounds how far the losses of student and teacher can drift apart inside the ball of radius "
        "ε. Left: the bound's terms stacked, against the largest gap that a search found. γ is searched for too, "
        "so the bar can be a little too low. Right: the loss of both nets around the image; the dashed square is "
        "the ball, orange is where the label is no longer predicted."
    ),
}
# Which controls a view has; the others would change nothing in it.
CONTROLS = {
    "lambda": ("lambda_iga",),
    "epsilon": ("epsilon", "image", "method", "lambda_iga", "loop", "dropout"),
    "loops": ("loop", "image", "method", "dropout"),
    "image": ("image", "epsilon", "method", "lambda_iga", "loop", "dropout"),
}


def _freeze_garbage() -> None:
    """Exclude what is imported by now from garbage collection: a full collection takes 200 ms every few pictures."""
    gc.collect()
    gc.freeze()


class Explorer:
    """λ_IGA, ε and loop count by hand.

    Attributes:
        state: what the controls say.
        data: what is shown; None before the first picture, or where there is none.
        training: the training under way, if any.
        widget: the whole, to be displayed.
    """

    def __init__(self, params: ExploreParams) -> None:
        self.params = params
        self.data: ViewData | None = None
        self.training: Training | None = None
        self._state = State.start(params)
        self._busy = False  # while the controls are set by code, their handlers do nothing
        self._lock = threading.RLock()  # a training that ends redraws from its own thread
        _freeze_garbage()
        self._build()
        self._take(self._state)
        self.refresh()

    @property
    def state(self) -> State:
        """What the controls say."""
        return self._state

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        """The widget where there is a kernel, and in words where there is none."""
        shown = words(self.data) if self.data else "The explorer; run this cell to use it."
        return (self.widget._repr_mimebundle_() or {}) | {"text/plain": shown}

    # ---- the controls ----

    def _build(self) -> None:
        self.controls = self._make_controls()
        self.text = ipw.HTML()
        self.status = ipw.HTML()
        self.picture = ipw.HTML()
        self.help = ipw.HTML()
        self.bar = ipw.IntProgress(value=0, min=0, max=1, layout=ipw.Layout(width="220px", visibility="hidden"))
        self.train_button = ipw.Button(description="Train this point", icon="play", disabled=True)
        self.cancel_button = ipw.Button(description="Cancel", icon="stop", disabled=True)
        self.autoattack = ipw.Checkbox(value=False, description="with AutoAttack (slow)", indent=False)
        self.autoattack.layout.width = "190px"
        exports = {"png": "Save PNG", "svg": "Save SVG", "yaml": "Save parameters"}
        self.exports = {kind: ipw.Button(description=name, icon="download") for kind, name in exports.items()}
        for button in (self.train_button, self.cancel_button, *self.exports.values()):
            button.layout.width = "auto"  # by its text, which the default would cut
        self.train_button.on_click(lambda _: self.train())
        self.cancel_button.on_click(lambda _: self.cancel())
        self.autoattack.observe(lambda _: self._offer(), names="value")
        for kind, button in self.exports.items():
            button.on_click(lambda _, kind=kind: self.export(kind))
        for name, control in self.controls.items():
            control.observe(lambda change, name=name: self._changed(name), names="value")
        wrap = ipw.Layout(flex_flow="row wrap", align_items="center")
        head = ipw.HBox([self.controls[name] for name in ("view", "scale", "student", "seed")], layout=wrap)
        own = [self.controls[name] for name in CONTROLS["epsilon"]]  # all that any view has
        # A place of fixed height for them: a picture that moves when the view changes is hard to compare.
        fixed = ipw.Layout(flex_flow="row wrap", align_items="center", align_content="flex-start", min_height="112px")
        self.own = ipw.HBox(own, layout=fixed)
        actions = ipw.HBox(
            [self.train_button, self.autoattack, self.cancel_button, self.bar, *self.exports.values()], layout=wrap
        )
        parts = [ipw.HTML(STYLE), head, self.own, self.text, self.picture, self.controls["compare"], actions]
        parts += [self.status, self.help]
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
            "scale": ipw.Dropdown(options=every_scale, description="scale", **_place(NARROW)),
            "student": ipw.Dropdown(options=self._students(), description="student", **_place(NARROW)),
            "seed": ipw.Dropdown(options=seeds, description="seed", **_place(NARROW)),
            "lambda_iga": ipw.SelectionSlider(options=self._weights(), description="λ_IGA", **_slider()),
            "epsilon": ipw.SelectionSlider(options=self._radii(), description="ε", **_slider()),
            "loop": ipw.IntSlider(min=1, max=self._last_loop(), description="loop", **_slider()),
            "image": ipw.IntSlider(min=0, max=self._images() - 1, description="image", **_slider()),
            "method": ipw.Dropdown(options=methods, description="method", **_place(WIDE)),
            "dropout": ipw.Checkbox(description="head dropout, in ISD", **_place(WIDE)),
            "compare": ipw.SelectMultiple(options=methods, rows=5, description="beside", **_place(WIDE)),
        }

    def _weights(self) -> list[tuple[str, float]]:
        return [(f"{weight:g}" if weight else "0 (KD)", weight) for weight in self._state.lambdas]

    def _radii(self) -> list[tuple[str, float]]:
        """The ε slider's stops: steps of 1/255 where that is how the parameters write ε, else of 0.005."""
        steps = [n / 255 for n in range(33)] if "/" in self.params.radius else [n / 200 for n in range(61)]
        return [(radius_text(radius), radius) for radius in sorted({*steps, self.params.epsilon, self._state.epsilon})]

    def _students(self) -> list[str]:
        """The nets for images of the data set's size: the digits' own, or the others."""
        digits = self.params.student.startswith("digits_")
        return [name for name in MODELS if name.startswith("digits_") == digits]

    def _images(self) -> int:
        return len(load_data(self.params.dataset).test.labels)

    def _last_loop(self) -> int:
        return max(self.params.loops + LOOPS_BEYOND, self._state.loop)

    def _take(self, state: State) -> None:
        """Take over a state and put the controls where it has them; the loop view follows a chain in any case."""
        self._state = replace(state, method=state.chain) if state.view == "loops" else state
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
            self.refresh()

    def _change_scale(self, scale: str) -> None:
        """Another scale is another parameter file; the controls start where it says."""
        try:
            self.params = at_scale(ExploreParams, scale)
        except ParameterError as error:
            self._say(str(error), "error")
            return
        self._state = State.start(self.params, view=self._state.view)
        self._busy = True
        try:
            self.controls["student"].options = self._students()
            self.controls["seed"].options = sorted({*self.params.seeds, self._state.seed})
            self.controls["lambda_iga"].options = self._weights()
            self.controls["epsilon"].options = self._radii()
            self.controls["loop"].max, self.controls["image"].max = self._last_loop(), self._images() - 1
        finally:
            self._busy = False
        self._take(self._state)
        self.refresh()

    # ---- what is shown ----

    def refresh(self) -> None:
        """Compute and draw what the controls say; what cannot be shown is said in words."""
        with self._lock:
            self._arrange()
            self._mark_stale(True)
            try:
                data = compute(self._state)
                shown = words(data)
                self._show(draw(data), shown)
                self.data = data
            except Exception as error:
                # A handler's exception would vanish in the server's log: the reader is told, and the old picture
                # stays, marked as what it is.
                log.debug("the explorer cannot show %s", self._state, exc_info=True)
                self._text(f"This point cannot be shown: {_one_line(error)}.")
                self._offer()
                return
            self._mark_stale(False)
            self._text(shown)
            self._offer()
        # matplotlib leaves cycles behind: collected now, when the picture is out, and not in the midst of a later one.
        gc.collect()

    def _arrange(self) -> None:
        """Show the view's controls, and grey out those that the chosen method does not have."""
        state = self._state
        for name in CONTROLS["epsilon"]:
            self.controls[name].layout.display = "flex" if name in CONTROLS[state.view] else "none"
        self.controls["compare"].layout.display = "flex" if state.view == "epsilon" else "none"
        chain = state.method in CHAINS or state.view == "loops"
        self.controls["lambda_iga"].disabled = state.view != "lambda" and state.method != "kdiga"
        self.controls["loop"].disabled = not chain
        self.controls["dropout"].disabled = not chain
        self.autoattack.disabled = self.params.autoattack_images == 0
        self.help.value = f"<details><summary>What is shown here</summary>{html.escape(HELP[state.view])}</details>"

    def _show(self, figure: Any, text: str) -> None:
        content = base64.b64encode(image_bytes(figure)).decode()
        width, height = (round(inches * DPI) for inches in SIZE)
        # An image element instead of an output area: it has an alternative text, and nothing flickers.
        self.picture.value = (
            f'<img src="data:image/png;base64,{content}" alt="{html.escape(text)}" width="{width}" height="{height}" '
            f'style="max-width: 100%; height: auto; aspect-ratio: {width} / {height}">'
        )

    def _text(self, text: str) -> None:
        self.text.value = f'<div role="status" class="kdiga-text">{html.escape(text)}</div>'

    def _mark_stale(self, stale: bool) -> None:
        """Dim a picture that does not show what the controls say."""
        (self.picture.add_class if stale else self.picture.remove_class)("kdiga-stale")

    def _say(self, text: str, kind: str = "info") -> None:
        self.status.value = f'<div role="status" class="kdiga-status kdiga-{kind}">{html.escape(text)}</div>'

    # ---- training ----

    def wanted(self) -> list[Job]:
        """What the train button would do: the chosen net and its measurements; on an empty store the smallest set."""
        if is_empty(self._state):
            points = [Point("st"), Point("kd"), Point("kdiga", self.params.lambda_iga)]
            return [job for point in points for job in self._jobs(self._state.row(point))]
        # What the net is compared to is shown beside it, but for the λ view.
        beside = [] if self._state.view == "lambda" else [Job(reference_teacher(self._state.here)[0])]
        return [*beside, *self._jobs(self._state.row())]

    def _jobs(self, row: Row) -> list[Job]:
        """The net and what the view shows of it; AutoAttack, which takes longer than training, only if asked for."""
        cells = [cell for cell in row.cells if cell.metric != "autoattack" or self.autoattack.value]
        if self._state.view != "epsilon":
            cells = [cell for cell in cells if "@" not in cell.metric]
        return list(dict.fromkeys([Job(row.runs[0]), *(job for cell in cells for job in cell.jobs)]))

    def _offer(self) -> None:
        """Say what is missing, and offer to train it."""
        if self.training is not None:
            return
        state, params = self._state, self.params
        open_jobs = [job for job in self.wanted() if not job.is_done()]
        finished = [run for run in _with_teachers(self.wanted()) if is_finished(run)]
        damaged = [reason for run in finished if (reason := runs.damage(run))]
        self.train_button.disabled = not open_jobs and not damaged
        measured_only = is_finished(state.row().runs[0]) and not damaged
        self.train_button.description = "Measure this point" if measured_only else "Train this point"
        if is_empty(state):
            self.train_button.description = "Train the smallest set"
            self._say(
                f"The store has no nets of the scale {params.scale} for {state.student}, seed {state.seed}. "
                f"`kdiga reproduce --scale {params.scale} --only explore` makes all that is shown here; "
                "the button trains ST, KD and one KDIGA net."
            )
        elif damaged:
            self._say(f"Damaged ({damaged[0]}). Training this point sets it aside and makes it again.", "error")
        elif text := missing(state):
            self._say(f"{text} The button trains and measures it; the sliders never do.")
        elif open_jobs:
            self._say("In the store, but not all of it is measured; the button does that.")
        else:
            self._say("Read from the run store.")

    def train(self) -> None:
        """Train and measure what is wanted, in another process; the page stays alive."""
        if self.training is not None:
            return
        try:
            runs.check_writable(paths.runs())
        except StoreError as error:
            self._say(str(error), "error")
            return
        self.training = Training(self.wanted(), self.params.device)
        self.train_button.disabled, self.cancel_button.disabled = True, False
        self.bar.layout.visibility = "visible"
        self._report(self.training.progress)
        threading.Thread(target=self._watch, args=(self.training,), daemon=True).start()

    def cancel(self) -> None:
        """End the training; the store keeps what is done."""
        if self.training is not None:
            self.training.cancel()

    def _watch(self, training: Training) -> None:
        pause = threading.Event()
        while training.is_running:
            self._report(training.progress)
            pause.wait(POLL_SECONDS)
        failures = training.failures()
        done = training.progress
        with self._lock:
            self.training = None
            self.cancel_button.disabled = True
            self.bar.layout.visibility = "hidden"
            self.refresh()
            if training.cancelled:
                self._say(f"Cancelled. {done.done} of {done.total} steps are kept; the button goes on from there.")
            elif failures:
                self._say(f"Training failed: {'; '.join(failures)}", "error")
            else:
                self._say(f"Trained and measured in {done.seconds:.0f} s; the result is in the run store.")

    def _report(self, progress: TrainingProgress) -> None:
        self.bar.max, self.bar.value = max(progress.total, 1), progress.done
        left = "" if progress.seconds_left is None else f", about {progress.seconds_left:.0f} s left"
        steps = f"{progress.done} of {progress.total} epochs and measurements"
        self._say(f"Training: {steps}, {progress.seconds:.0f} s so far{left}.")

    # ---- export ----

    def export(self, kind: str) -> None:
        """Write what is shown (png, svg), or the parameter file that repeats it (yaml), beside the scale's figures."""
        if kind != "yaml" and self.data is None:
            self._say("There is no picture yet to save.", "error")
            return
        home = paths.figures(self.params.scale) / "explorer"
        try:
            home.mkdir(parents=True, exist_ok=True)
            if kind == "yaml":
                path = home / "explore.yaml"
                chosen, own = (
                    self._state.parameters().model_dump(),
                    at_scale(ExploreParams, self.params.scale).model_dump(),
                )
                changed = {name: value for name, value in chosen.items() if value != own[name]}
                values = {"scale": self.params.scale, "settings": {"explore": changed}}
                path.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
            else:
                assert self.data is not None
                path = home / f"{self.data.state.view}.{kind}"
                path.write_bytes(image_bytes(draw(self.data), kind))
        except OSError as error:
            self._say(f"{home} cannot be written: {error.strerror or error}", "error")
            return
        shown = path.relative_to(paths.ROOT) if path.is_relative_to(paths.ROOT) else path
        repeat = f"; papermill notebooks/explore.ipynb out.ipynb -f {shown} repeats it" if kind == "yaml" else ""
        self._say(f"Written to {shown}{repeat}.")


def _with_teachers(jobs: list[Job]) -> list[Run]:
    """The runs of the jobs, and their teachers."""
    trained = [run for run in {job.run for job in jobs} if isinstance(run, Run)]
    return [*trained, *(run.teacher for run in trained if isinstance(run.teacher, Run))]


def _place(width: str) -> dict[str, Any]:
    """Style and a layout of its own: each control is shown and hidden by itself."""
    return {"style": {"description_width": "70px"}, "layout": ipw.Layout(width=width)}


def _slider() -> dict[str, Any]:
    return _place(WIDE) | {"continuous_update": False}


def _one_line(error: Exception) -> str:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return text.rstrip(".")
