"""The data of the explorer's views: ``compute(state)`` reads the run store and never trains.

A ``State`` holds the values of all controls. ``compute`` returns the data of one view as plain numbers and arrays;
``drawing.draw`` makes a figure of the data. Accuracies, training curves and weights come from the store. Attacks on a
few images, gradient maps, the terms of Proposition 2 and loss surfaces are computed for the view.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdiga_nb import runs
from kdiga_nb.artifacts.explore import CHAINS, Point, explored, reference_teacher
from kdiga_nb.artifacts.table import Experiment, Row
from kdiga_nb.attacks.gradient import ball, evaluation_pgd
from kdiga_nb.data import CLASS_NAMES, load_data
from kdiga_nb.losses import cross_entropy, input_gradient
from kdiga_nb.measures import ImageBounds
from kdiga_nb.metrics import EVALUATION_SEED, Accuracy, gap_and_bound, loss_surface
from kdiga_nb.numerics.folding import folded_copy
from kdiga_nb.numerics.scopes import computing
from kdiga_nb.params import ExploreParams, Prop2Params, at_scale, radius_text
from kdiga_nb.report.names import metric_name
from kdiga_nb.report.pairs import compare
from kdiga_nb.runs.run import Run, run_key
from kdiga_nb.runs.store import measured

Array = np.ndarray[Any, Any]

LAMBDAS = (0.0, *(2.0**power for power in range(-3, 8)))  # the slider's values, besides those of the parameters
GALLERY = 5  # images shown
COSINES = 100  # test images in the mean cosine of the gradients
BOUND_STEPS = 10  # steps of each search for the bound of one image; a search has 3 starts
SURFACE = 17  # points per side of a loss surface


@dataclass(frozen=True)
class State:
    """The values of the controls; ``params`` says how nets are trained and measured.

    Attributes:
        view: a key of ``params.VIEWS``.
        method: a key of ``params.EXPLORED``; with ``lambda_iga``, ``loop`` and ``dropout`` it identifies the net.
        student: the architecture of the net.
        image: index of a test image.
        epsilon: radius of the attack computed in the view, in pixels of [0, 1].
        step: step of the attack that the film shows; 0: its random start.
        chain: the self-distillation of the loop view; the other views keep ``method``.
        compare: methods whose curves are drawn for comparison.
    """

    params: ExploreParams
    view: str = "lambda"
    student: str = "digits_small"
    method: str = "kdiga"
    seed: int = 0
    image: int = 0
    lambda_iga: float = 1.5
    epsilon: float = 0.1
    step: int = 0
    loop: int = 1
    dropout: bool = True
    chain: str = "isd_wot"
    compare: tuple[str, ...] = ()

    @classmethod
    def start(cls, params: ExploreParams, **changes: Any) -> "State":
        """The state that the parameters ask for."""
        shown = {
            "view": params.show_view,
            "student": params.student,
            "method": params.show_method,
            "seed": params.show_seed,
            "image": params.show_image,
            "lambda_iga": params.lambda_iga if params.show_lambda_iga is None else params.show_lambda_iga,
            "epsilon": params.epsilon if params.show_epsilon is None else params.show_epsilon,
            "loop": params.show_loop,
            "dropout": params.show_dropout,
            "compare": tuple(params.show_compare),
        }
        state = cls(params, **(shown | changes))
        return replace(state, chain=state.method) if "chain" not in changes and state.method in CHAINS else state

    def parameters(self) -> ExploreParams:
        """The parameters that reproduce this state."""
        shown = {
            "show_view": self.view,
            "student": self.student,
            "show_method": self.chain if self.view == "loops" else self.method,
            "show_seed": self.seed,
            "show_image": self.image,
            "show_lambda_iga": self.lambda_iga,
            "show_epsilon": self.epsilon,
            "show_loop": self.loop,
            "show_dropout": self.dropout,
            "show_compare": list(self.compare),
        }
        return self.params.model_copy(update=shown)

    @property
    def here(self) -> ExploreParams:
        """The parameters for the chosen student and seed alone."""
        return self.params.model_copy(update={"student": self.student, "seeds": [self.seed]})

    @property
    def point(self) -> Point:
        """The chosen net: always KDIGA in the first two views, always a loop of self-distillation in the loop view."""
        if self.view in ("lambda", "glance"):
            return Point("kdiga", self.lambda_iga)
        method = self.chain if self.view == "loops" else self.method
        return Point(method, self.lambda_iga, self.loop, self.dropout)

    def class_name(self, label: int) -> str:
        """The name of a class, where the data set has names; otherwise its number."""
        names = CLASS_NAMES.get(self.params.dataset)
        return names[label] if names else str(label)

    def row(self, point: Point | None = None) -> Row:
        """The row of a point (default: the chosen one) at the chosen student and seed."""
        return explored(self.here, point or self.point)

    @property
    def radii(self) -> tuple[float, ...]:
        """The values of the ε slider: steps of 1/255 if the parameters write ε as a fraction, otherwise of 0.005."""
        steps = [n / 255 for n in range(33)] if "/" in self.params.radius else [n / 200 for n in range(61)]
        return tuple(sorted({*steps, self.params.epsilon}))

    @property
    def lambdas(self) -> tuple[float, ...]:
        """The values of the λ_IGA slider."""
        return tuple(sorted({*LAMBDAS, *self.params.sweep, self.params.lambda_iga, self.lambda_iga}))


@dataclass(frozen=True)
class NetView:
    """The stored results of one net: accuracies by metric (``clean``, ``pgd20``, ``autoattack``, ``pgd20@0.05``)."""

    row: str
    label: str
    run: Run
    trained: bool
    accuracies: dict[str, Accuracy] = field(hash=False)
    point: Point
    llm: tuple[float, float] | None = None  # mean and standard error, in nats


def net(row: Row, point: Point) -> NetView:
    """Read a row of one seed from the store."""
    accuracies: dict[str, Accuracy] = {}
    llm = None
    for cell in row.cells:
        job = cell.jobs[0]
        result = measured(job.run, job.measure) if job.measure else None
        if result is None:
            continue
        if cell.is_accuracy:
            accuracies[cell.metric] = Accuracy(*(result[key] for key in ("percent", "low", "high", "n")))
        else:
            llm = (float(result["llm"]), float(result["standard_error"]))
    return NetView(row.id, row.label, row.runs[0], runs.is_finished(row.runs[0]), accuracies, point, llm)


# ---- the views' data ----


@dataclass(frozen=True)
class TradeOff:
    """The λ view: KDIGA's accuracy at every λ_IGA of the slider, and training curves of the chosen net."""

    state: State
    nets: tuple[NetView, ...]
    chosen: NetView
    curves: dict[str, list[float]]
    weights: tuple[float, float]  # nominal and effective λ_IGA
    bands: dict[str, list[tuple[float, float, float]]]  # by metric: λ_IGA, lowest and highest accuracy over the seeds


@dataclass(frozen=True)
class Facet:
    """One net's answer to one image.

    Attributes:
        name: the column's heading; ``row`` chooses its colour.
        gradient: input gradient (H, W), mean over the channels; ``norm`` is its ℓ2 norm over all pixels.
        smallest: the smallest radius of ``State.radii`` at which the attack fools the net; None: none of them.
        attacked: the image (H, W) or (H, W, 3) attacked on this net at the chosen radius.
        beliefs: probabilities (2, N): clean, attacked.
    """

    name: str
    row: str
    gradient: Array
    norm: float
    smallest: float | None
    attacked: Array
    beliefs: Array


@dataclass(frozen=True)
class Glance:
    """The first view: one image seen by every net; None for a net that is not in the store."""

    state: State
    chosen: NetView
    image: Array
    label: int
    facets: dict[str, Facet | None] = field(hash=False)  # by heading


@dataclass(frozen=True)
class Gallery:
    """Images (k, H, W) or (k, H, W, 3), predictions, and probabilities (2, N): clean, attacked."""

    clean: Array
    attacked: Array
    labels: list[int]
    guesses: list[int]
    guesses_attacked: list[int]
    student: Array
    teacher: Array
    teacher_name: str


@dataclass(frozen=True)
class UnderAttack:
    """The ε view: stored accuracy against ε, and an attack computed for the view."""

    state: State
    nets: tuple[NetView, ...]
    chosen: NetView
    gallery: Gallery | None


@dataclass(frozen=True)
class Film:
    """The film view: PGD on one image, step by step; empty arrays if the net is not in the store.

    Attributes:
        clean: the image (H, W) or (H, W, 3).
        frames: the image after each step (S + 1, H, W) or (S + 1, H, W, 3), the random start first.
        losses: cross-entropy (S + 1,) in nats.
        beliefs: probabilities (S + 2, N): of the clean image, then after each step.
    """

    state: State
    chosen: NetView
    label: int
    clean: Array
    frames: Array
    losses: Array
    beliefs: Array

    @property
    def step(self) -> int:
        """The step that is shown."""
        return min(self.state.step, len(self.frames) - 1)

    @property
    def fooled(self) -> int | None:
        """The first step after which the answer is wrong."""
        wrong = np.flatnonzero(self.beliefs[1:].argmax(1) != self.label)
        return int(wrong[0]) if len(wrong) else None


@dataclass(frozen=True)
class GradientMaps:
    """Input gradients (H, W) of student and teacher at one image; their cosine at the image and its mean."""

    image: Array
    label: int
    student: Array
    teacher: Array
    norms: tuple[float, float]
    cosine: float
    mean_cosine: float
    images: int
    teacher_name: str


@dataclass(frozen=True)
class Loops:
    """The loop view: a chain of self-distillation, with and without head dropout, and gradient maps of one loop."""

    state: State
    chains: dict[bool, tuple[NetView, ...]]
    chosen: NetView
    maps: GradientMaps | None


@dataclass(frozen=True)
class Surface:
    """Cross-entropy (k, k) in nats around an image, and where the image is still classified correctly."""

    axis: Array
    loss: Array
    correct: Array


@dataclass(frozen=True)
class OneImage:
    """The image view: both sides of Proposition 2 in nats, and the loss around the image."""

    state: State
    chosen: NetView
    teacher_name: str
    image: Array | None = None
    label: int = 0
    terms: dict[str, float] = field(default_factory=dict, hash=False)
    gap: float = float("nan")
    surfaces: tuple[Surface, Surface] | None = None
    cloud: Array | None = None  # (2, n) in nats, of all measured test images: measured gap, bound


ViewData = Glance | TradeOff | UnderAttack | Film | Loops | OneImage


def compute(state: State) -> ViewData:
    """The data of the view that the state selects.

    Raises:
        StoreError: a stored net that the view needs is damaged.
    """
    with computing(single_thread=load_data(state.params.dataset).single_thread):
        return _COMPUTE[state.view](state)


GLANCE = ("st", "kd", "kdiga", "penalty")  # the columns of the first view; the last is the teacher


def glance_points(state: State) -> list[Point]:
    """The nets of the first view, besides the teacher."""
    return [Point(method, state.lambda_iga if method == "kdiga" else 0.0) for method in GLANCE]


def _glance(state: State) -> Glance:
    shape = load_data(state.params.dataset).image_shape
    rows = [state.row(point) for point in glance_points(state)]
    sources: dict[str, tuple[str, runs.Source]] = {row.label: (row.id, row.runs[0]) for row in rows}
    sources["TRADES teacher"] = ("trades_teacher", reference_teacher(state.here)[0])
    x, y = _images(state, 1)
    facets = {}
    for name, (row, source) in sources.items():
        model = stored_net(source, shape)
        facets[name] = None if model is None else _facet(state, name, row, model, x, y)
    return Glance(state, net(state.row(), state.point), _pixels(x)[0], int(y), facets)


def _facet(state: State, name: str, row: str, model: nn.Module, x: Tensor, y: Tensor) -> Facet:
    gradient, clean = input_gradient(model, x, y)
    radii = tuple(sorted({*state.radii, state.epsilon}))
    attacked, logits = _attacked(model, state.params.dataset, state.image, radii, state.params.pgd_steps)
    here = radii.index(state.epsilon)
    beliefs = torch.cat([clean, logits[here : here + 1]]).softmax(1)
    fools = dict(zip(radii, logits.argmax(1) != y, strict=True))
    smallest = next((radius for radius in state.radii if fools[radius]), None)
    map_, norm = gradient[0].mean(0).numpy(), gradient.norm().item()
    return Facet(name, row, map_, norm, smallest, _pixels(attacked[here : here + 1])[0], beliefs.numpy())


@lru_cache(maxsize=256)
def _attacked(
    model: nn.Module, dataset: str, image: int, radii: tuple[float, ...], steps: int
) -> tuple[Tensor, Tensor]:
    """A test image attacked at every radius (R, C, H, W), and the net's logits (R, N): the slider of ε reads them."""
    test = load_data(dataset).test
    attacked = attack_at(model, test.images[image : image + 1], test.labels[image : image + 1], radii, steps)[-1]
    with torch.no_grad():
        return attacked, model(attacked)


def attack_at(model: nn.Module, x: Tensor, y: Tensor, radii: Sequence[float], steps: int) -> list[Tensor]:
    """PGD on one image (1, C, H, W) at every radius at once: images (R, C, H, W) after each step, the start first.

    The same attack as ``evaluation_pgd``, from one random start that all radii scale.
    """
    size = (-1, 1, 1, 1)
    epsilon = torch.tensor(radii, dtype=torch.float64).view(size)
    lower, upper = ball(x.expand(len(radii), -1, -1, -1), epsilon)
    length = (2 * epsilon / steps).to(x.dtype)
    noise = torch.empty_like(x).uniform_(-1, 1, generator=torch.Generator().manual_seed(EVALUATION_SEED))
    images = [(x + epsilon.to(x.dtype) * noise).clamp(lower, upper)]
    for _ in range(steps):
        gradient, _ = input_gradient(model, images[-1], y.expand(len(radii)))
        images.append((images[-1] + length * gradient.sign()).clamp(lower, upper))
    return images


def _trade_off(state: State) -> TradeOff:
    points = [Point("kdiga", weight) for weight in state.lambdas]
    nets = tuple(net(state.row(point), point) for point in points)
    chosen = nets[points.index(state.point)]
    row = state.row()
    curves: dict[str, list[float]] = {}
    for line in runs.history_so_far(chosen.run):
        for name, number in line.items():
            curves.setdefault(name, []).append(number)
    return TradeOff(state, nets, chosen, curves, row.weights or (0.0, 0.0), _bands(state, points))


def _bands(state: State, points: Sequence[Point]) -> dict[str, list[tuple[float, float, float]]]:
    """The spread over the seeds, at every weight that at least two seeds are measured at."""
    bands: dict[str, list[tuple[float, float, float]]] = {}
    everyone = state.params.model_copy(update={"student": state.student})
    for point in points:
        for cell in explored(everyone, point, autoattack=False, radii=False).cells:
            results = [measured(job.run, job.measure) for job in cell.jobs if job.measure] if cell.is_accuracy else []
            percents = [float(result["percent"]) for result in results if result is not None]
            if len(percents) > 1:
                bands.setdefault(cell.metric, []).append((point.lambda_iga, min(percents), max(percents)))
    return bands


def _under_attack(state: State) -> UnderAttack:
    nets: dict[Run, NetView] = {}
    for method in state.compare:
        point = Point(method, state.params.lambda_iga, 1)
        compared = net(state.row(point), point)
        nets.setdefault(compared.run, compared)
    chosen = net(state.row(), state.point)
    nets[chosen.run] = chosen
    student, teacher, name = _pair(state, chosen.run)
    gallery = None if student is None or teacher is None else _gallery(state, student, teacher, name)
    return UnderAttack(state, tuple(nets.values()), chosen, gallery)


def _film(state: State) -> Film:
    chosen = net(state.row(), state.point)
    model = stored_net(chosen.run, load_data(state.params.dataset).image_shape)
    x, y = _images(state, 1)
    clean, none = _pixels(x)[0], np.zeros((0,))
    if model is None:
        return Film(state, chosen, int(y), clean, none, none, none)
    frames = torch.cat(attack_at(model, x, y, (state.epsilon,), state.params.pgd_steps))
    with torch.no_grad():
        logits = model(torch.cat([x, frames]))
    losses = cross_entropy(logits[1:], y.expand(len(frames)))
    return Film(state, chosen, int(y), clean, _pixels(frames), losses.numpy(), logits.softmax(1).numpy())


def _pair(state: State, run: Run) -> tuple[nn.Module | None, nn.Module | None, str]:
    """A net, its teacher and the teacher's name; None for a net that is not in the store.

    The TRADES teacher stands in for a missing teacher.
    """
    reference = reference_teacher(state.here)[0]
    teacher = run.teacher if isinstance(run.teacher, Run) else reference
    name = "the TRADES teacher" if teacher == reference else "the loop before"
    shape = load_data(state.params.dataset).image_shape
    return stored_net(run, shape), stored_net(teacher, shape), name


def stored_net(source: runs.Source, shape: tuple[int, int, int]) -> nn.Module | None:
    """The net, ready for evaluation; None if it has to be trained first, or was published without its weights."""
    if not isinstance(source, Run):
        return _evaluated(source, shape, ())
    if not runs.is_finished(source) or runs.lacks_weights(source):
        return None
    files = [runs.folder(source) / name for name in ("run.json", "model.safetensors")]
    return _evaluated(source, shape, tuple(file.stat().st_mtime_ns for file in files if file.exists()))


@lru_cache(maxsize=16)
def _evaluated(source: runs.Source, shape: tuple[int, int, int], written: tuple[int, ...]) -> nn.Module:
    """The net, cached until the modification times ``written`` of its files change."""
    return folded_copy(runs.load(source) if isinstance(source, Run) else runs.load_or_train(source), shape)


def _images(state: State, count: int) -> tuple[Tensor, Tensor]:
    """``count`` test images starting with the chosen one, cyclically."""
    test = load_data(state.params.dataset).test
    if state.image >= len(test.labels):
        raise ValueError(f"image must be below {len(test.labels)}, got {state.image}")
    index = torch.arange(state.image, state.image + count) % len(test.labels)
    return test.images[index], test.labels[index]


def _pixels(images: Tensor) -> Array:
    """Images (k, C, H, W) in matplotlib's layout: (k, H, W) or (k, H, W, 3)."""
    return (images[:, 0] if images.shape[1] == 1 else images.permute(0, 2, 3, 1)).numpy()


def _gallery(state: State, student: nn.Module, teacher: nn.Module, name: str) -> Gallery:
    x, y = _images(state, GALLERY)
    steps = state.params.pgd_steps
    pgd = evaluation_pgd(state.epsilon, steps)
    x_adv = pgd(student, x, y, generator=torch.Generator().manual_seed(EVALUATION_SEED))
    with torch.no_grad():
        clean, attacked = student(x), student(x_adv)
        teacher_logits = torch.stack([teacher(x[:1])[0], teacher(x_adv[:1])[0]])
    return Gallery(
        _pixels(x),
        _pixels(x_adv),
        y.tolist(),
        clean.argmax(1).tolist(),
        attacked.argmax(1).tolist(),
        torch.stack([clean[0], attacked[0]]).softmax(1).numpy(),
        teacher_logits.softmax(1).numpy(),
        name,
    )


def _loops(state: State) -> Loops:
    chains = {}
    for dropout in (True, False):
        numbers = range(0 if state.chain == "isd_wot" else 1, max(state.params.loops, state.loop) + 1)
        points = [Point(state.chain, loop=loop, dropout=dropout) for loop in numbers]
        chains[dropout] = tuple(net(state.row(point), point) for point in points)
    chosen = net(state.row(), state.point)
    student, teacher, name = _pair(state, chosen.run)
    maps = None if student is None or teacher is None else _gradient_maps(state, student, teacher, name)
    return Loops(state, chains, chosen, maps)


def _gradient_maps(state: State, student: nn.Module, teacher: nn.Module, name: str) -> GradientMaps:
    count = min(COSINES, len(load_data(state.params.dataset).test.labels))
    x, y = _images(state, count)
    gradients = [input_gradient(model, x, y)[0] for model in (student, teacher)]
    cosines = torch.cosine_similarity(gradients[0].flatten(1), gradients[1].flatten(1))
    maps = [gradient[0].mean(0).numpy() for gradient in gradients]
    norms = [gradient[0].norm().item() for gradient in gradients]
    image = _pixels(x[:1])[0]
    cosine, mean = cosines[0].item(), cosines.mean().item()
    return GradientMaps(image, int(y[0]), maps[0], maps[1], (norms[0], norms[1]), cosine, mean, count, name)


def _one_image(state: State) -> OneImage:
    chosen = net(state.row(), state.point)
    student, teacher, name = _pair(state, chosen.run)
    if student is None or teacher is None:
        return OneImage(state, chosen, name)
    x, y = _images(state, 1)
    gap, terms = gap_and_bound(student, teacher, x, y, state.epsilon, steps=BOUND_STEPS)
    parts = {
        "γ_s: student's LLM": terms.llm_student,
        "γ_t: teacher's LLM": terms.llm_teacher,
        "CE_s": terms.ce_student,
        "CE_t": terms.ce_teacher,
        "ε‖g_s − g_t‖₁": state.epsilon * terms.distance,
    }
    values = {part: float(value) for part, value in parts.items()}
    surfaces = _surfaces(state, [student, teacher], x, y)
    pair, cloud = (surfaces[0], surfaces[1]), _cloud(state, chosen.run)
    return OneImage(state, chosen, name, _pixels(x)[0], int(y), values, float(gap), pair, cloud)


def _cloud(state: State, run: Run) -> Array | None:
    """Gap and bound of every test image that ``prop2_bound`` measured for this net; None where it did not."""
    params = at_scale(Prop2Params, state.params.scale)
    measure = ImageBounds(params.epsilon, params.bound_images, params.llm_steps)
    found = measured(run, measure, reference=reference_teacher(state.here)[0])
    if found is None or params.epsilon != state.epsilon:
        return None
    return np.array([found["images"][term] for term in ("gap", "bound")])


def _surfaces(state: State, models: Sequence[nn.Module], x: Tensor, y: Tensor) -> list[Surface]:
    """Per net, the loss on the plane of random signs (rows) and the student's gradient signs (columns), up to ±2ε."""
    radius = 2 * state.epsilon or 0.1
    generator = torch.Generator().manual_seed(EVALUATION_SEED)
    random_signs = torch.randint(0, 2, x.shape, generator=generator) * 2.0 - 1
    directions = random_signs, input_gradient(models[0], x, y)[0].sign()
    axis = torch.linspace(-radius, radius, SURFACE).numpy()
    surfaces = (loss_surface(model, x, y, directions, radius, SURFACE) for model in models)
    return [Surface(axis, loss.numpy(), correct.numpy()) for loss, correct in surfaces]


_COMPUTE: dict[str, Callable[[State], ViewData]] = {
    "glance": _glance,
    "lambda": _trade_off,
    "epsilon": _under_attack,
    "film": _film,
    "loops": _loops,
    "image": _one_image,
}


# ---- text ----


def missing(state: State, row: Row | None = None) -> str:
    """Why the chosen net has no results yet; empty if the net is trained."""
    chosen = (row or state.row()).runs[0]
    if runs.is_finished(chosen):
        return ""
    done = runs.epochs_done(chosen)
    begun = f" ({done} of {chosen.schedule.epochs} epochs are done; training continues from there)" if done else ""
    return f"{(row or state.row()).label} on {state.student}, seed {state.seed}, is not in the store{begun}."


def is_empty(state: State) -> bool:
    """Whether the store has no net for the λ view of this scale, student and seed."""
    points = [Point("st"), *(Point("kdiga", weight) for weight in state.lambdas)]
    return not any(runs.is_finished(state.row(point).runs[0]) for point in points)


def words(data: ViewData) -> str:
    """The chosen net and its results, as one line of plain text; every number names the radius it was measured at."""
    state, chosen = data.state, data.chosen
    parts = [f"{chosen.label}, seed {state.seed}"]
    match data:
        case Glance():
            parts[0] = f"image {state.image}, a {state.class_name(data.label)}, attacked on each net at {_at(state)}"
            parts += _facet_words(data)
        case TradeOff():
            parts += _accuracies(chosen, state)
        case UnderAttack():
            parts += [*_accuracies(chosen, state), *_here(chosen, state), *_gallery_words(data)]
        case Film():
            parts += _film_words(data) if len(data.frames) else []
        case Loops():
            parts += [*_accuracies(chosen, state), *_map_words(data)]
        case OneImage():
            sides = f"at {_at(state)} the losses of student and teacher differ by up to {data.gap:.3f}"
            allowed = f"{sides} nats; Proposition 2 allows {sum(data.terms.values()):.3f}"
            parts += [f"image {state.image}, label {data.label}", allowed] if data.terms else [NO_TEACHER]
    return " · ".join(parts) if chosen.trained or isinstance(data, Glance) else missing(state)


NO_TEACHER = "the teacher is not in the store"


def details(data: ViewData) -> list[str]:
    """The net, its run and the 95 % intervals, one per line."""
    state, chosen = data.state, data.chosen
    lines = [f"net {state.student}, scale {state.params.scale}, run {run_key(chosen.run)}"]
    if not chosen.trained:
        return lines
    for name, value in chosen.accuracies.items():
        lines.append(
            f"{_metric(name, state)}: {value.percent:.1f} % [{value.low:.1f}, {value.high:.1f}], n = {value.n}"
        )
    if chosen.llm is not None:
        radius = state.params.radius
        lines.append(f"LLM at ε = {radius}: {chosen.llm[0]:.3f} ± {1.96 * chosen.llm[1]:.3f} nats")
    if isinstance(data, TradeOff):
        lines.append("weight λ_IGA: nominal {:g}, effective {:.2g}".format(*data.weights))
    return lines


def comparison(state: State, pinned: State) -> str:
    """The chosen net against another one on the same test images, in words, with 95 % intervals."""
    if state.row().runs == pinned.row().runs:
        return ""
    rows = replace(state.row(), id="shown"), replace(pinned.row(), id="pinned")
    pair, parts = Experiment("pair", "", rows, state.params), []
    known = net(rows[0], state.point).accuracies.keys() & net(rows[1], pinned.point).accuracies.keys()
    for cell in rows[0].cells:
        if cell.metric in known:
            difference = compare(pair, "shown", "pinned", cell.metric)
            interval = f"{difference.points:+.1f} points [{difference.low:+.1f}, {difference.high:+.1f}]"
            parts.append(f"{_metric(cell.metric, state)} {interval}")
    return " · ".join(parts) or "not measured on both nets"


def _metric(name: str, state: State) -> str:
    """A metric with the radius that it was measured at."""
    if name == "clean" or "@" in name:
        return metric_name(name).replace(", ε", " at ε")
    return f"{metric_name(name)} at ε = {state.params.radius}"


def _at(state: State) -> str:
    return f"ε = {radius_text(state.epsilon)}"


def _facet_words(data: Glance) -> list[str]:
    """What each net answers after the attack."""
    words = []
    for name, facet in data.facets.items():
        if facet is None:
            words.append(f"{name}: its net is not in the store")
            continue
        guess = int(facet.beliefs[1].argmax())
        verdict = "right" if guess == data.label else f"says {data.state.class_name(guess)}"
        words.append(f"{name} {verdict} ({100 * facet.beliefs[1, guess]:.0f} %)")
    return words


def _accuracies(net: NetView, state: State) -> list[str]:
    known = {name: value for name, value in net.accuracies.items() if "@" not in name}
    joined = [
        f"{_metric(name, state)}{':' if name != 'clean' else ''} {value.percent:.1f} %" for name, value in known.items()
    ]
    return joined or ["not measured yet"]


def curve(net: NetView, state: State) -> list[tuple[float, Accuracy]]:
    """Accuracy under the evaluation PGD against ε, at the radii that were measured; clean accuracy at 0."""
    pgd = f"pgd{state.params.pgd_steps}"
    radii = {"clean": 0.0, pgd: state.params.epsilon}
    radii |= {name: float(name.partition("@")[2]) for name in net.accuracies if name.startswith(f"{pgd}@")}
    return sorted((radii[name], value) for name, value in net.accuracies.items() if name in radii)


def _here(net: NetView, state: State) -> list[str]:
    """Accuracy at the chosen radius, interpolated between the two measured radii around it."""
    points = curve(net, state)
    radii = [radius for radius, _ in points]
    if not radii or not radii[0] <= state.epsilon <= radii[-1] or state.epsilon in radii:
        return []
    percent = np.interp(state.epsilon, radii, [value.percent for _, value in points])
    return [f"at {_at(state)} about {percent:.0f} % (interpolated)"]


def _gallery_words(data: UnderAttack) -> list[str]:
    if data.gallery is None:
        return []
    gallery = data.gallery
    correct = sum(guess == label for guess, label in zip(gallery.guesses_attacked, gallery.labels, strict=True))
    before, after = gallery.student[:, gallery.labels[0]]
    name = data.state.class_name(gallery.labels[0])
    return [
        f"attacked now at {_at(data.state)}: {correct} of {len(gallery.labels)} images still right",
        f"image {data.state.image}: P({name}) {before:.2f} → {after:.2f}",
    ]


def _film_words(data: Film) -> list[str]:
    belief, label = data.beliefs[1 + data.step], data.state.class_name(data.label)
    answer = data.state.class_name(int(belief.argmax()))
    ends = "never fooled" if data.fooled is None else f"fooled from step {data.fooled} on"
    return [
        f"image {data.state.image}, a {label}, attacked at {_at(data.state)}",
        f"step {data.step} of {len(data.frames) - 1}: loss {data.losses[data.step]:.2f} nats, P({label}) "
        f"{data.beliefs[0, data.label]:.2f} → {belief[data.label]:.2f}, answer {answer}",
        ends,
    ]


def _map_words(data: Loops) -> list[str]:
    maps = data.maps
    if maps is None:
        return []
    cosine = (
        f"{maps.cosine:.2f} at image {data.state.image}, {maps.mean_cosine:.2f} on average over {maps.images} images"
    )
    return [f"cosine of its input gradient with that of {maps.teacher_name}: {cosine}"]
