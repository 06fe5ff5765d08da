"""What the explorer shows, as data: ``compute(state)`` reads the run store and never trains.

A ``State`` is everything that the controls say. ``compute`` turns it into the data of one view, plain numbers and
arrays, which ``drawing.draw`` turns into a figure. What comes from the store are accuracies, training curves and
weights; what is computed on the spot are attacks on a few images, gradient maps, the terms of Proposition 2 of one
image and its loss surface.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdiga_nb import runs
from kdiga_nb.artifacts.explore import CHAINS, Point, explored, reference_teacher
from kdiga_nb.artifacts.table import Row
from kdiga_nb.attacks.gradient import evaluation_pgd
from kdiga_nb.data import load_data
from kdiga_nb.losses import cross_entropy, input_gradient
from kdiga_nb.metrics import EVALUATION_SEED, Accuracy, gap_and_bound
from kdiga_nb.numerics.folding import folded_copy
from kdiga_nb.numerics.scopes import computing
from kdiga_nb.params import ExploreParams, radius_text
from kdiga_nb.runs.run import Run, run_key
from kdiga_nb.runs.store import measured

Array = np.ndarray[Any, Any]

LAMBDAS = (0.0, *(2.0**power for power in range(-3, 8)))  # the slider's stops, beside what the parameters train
GALLERY = 5  # images side by side
COSINES = 100  # test images over which the gradients' cosine is averaged
BOUND_STEPS = 10  # of each search behind the bound of one image: 3 starts × 10 steps
SURFACE = 17  # points a side of a loss surface


@dataclass(frozen=True)
class State:
    """What the controls say; ``params`` decides how everything is trained and measured.

    Attributes:
        view: a key of ``params.VIEWS``.
        method: a key of ``params.EXPLORED``; with ``lambda_iga``, ``loop`` and ``dropout`` it names the net.
        student: its architecture.
        image: index of a test image.
        epsilon: of the attack on the spot, in pixels of [0, 1].
        compare: methods whose curves stand beside the chosen net's.
    """

    params: ExploreParams
    view: str = "lambda"
    student: str = "digits_small"
    method: str = "kdiga"
    seed: int = 0
    image: int = 0
    lambda_iga: float = 1.5
    epsilon: float = 0.1
    loop: int = 1
    dropout: bool = True
    compare: tuple[str, ...] = ("st", "kd", "kdiga", "trades_student", "isd_wot")

    @classmethod
    def start(cls, params: ExploreParams, **changes: Any) -> "State":
        """Where the parameters put the controls."""
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
        }
        return cls(params, **(shown | changes))

    def parameters(self) -> ExploreParams:
        """The parameters that put the controls where they are now."""
        shown = {
            "show_view": self.view,
            "student": self.student,
            "show_method": self.method,
            "show_seed": self.seed,
            "show_image": self.image,
            "show_lambda_iga": self.lambda_iga,
            "show_epsilon": self.epsilon,
            "show_loop": self.loop,
            "show_dropout": self.dropout,
        }
        return self.params.model_copy(update=shown)

    @property
    def here(self) -> ExploreParams:
        """The parameters for the chosen student and seed alone."""
        return self.params.model_copy(update={"student": self.student, "seeds": [self.seed]})

    @property
    def point(self) -> Point:
        """The net that the view is about: the λ view is about KDIGA, the loop view about a chain."""
        if self.view == "lambda":
            return Point("kdiga", self.lambda_iga)
        method = self.chain if self.view == "loops" else self.method
        return Point(method, self.lambda_iga, self.loop, self.dropout)

    @property
    def chain(self) -> str:
        """The self-distillation that the loop view follows."""
        return self.method if self.method in CHAINS else "isd_wot"

    def row(self, point: Point | None = None) -> Row:
        """The row of a point (default: the chosen one) at the chosen student and seed."""
        return explored(self.here, point or self.point)

    @property
    def lambdas(self) -> tuple[float, ...]:
        """The λ_IGA slider's stops."""
        return tuple(sorted({*LAMBDAS, *self.params.sweep, self.params.lambda_iga, self.lambda_iga}))


@dataclass(frozen=True)
class Net:
    """What the store knows of one net: accuracies by metric (``clean``, ``pgd20``, ``autoattack``, ``pgd20@0.05``)."""

    label: str
    run: Run
    trained: bool
    accuracies: dict[str, Accuracy] = field(hash=False)
    point: Point
    llm: tuple[float, float] | None = None  # mean and standard error, in nats


def net(row: Row, point: Point) -> Net:
    """Reads a row of one seed from the store."""
    found: dict[str, Accuracy] = {}
    llm = None
    for cell in row.cells:
        job = cell.jobs[0]
        result = measured(job.run, job.measure) if job.measure else None
        if result is None:
            continue
        if cell.is_accuracy:
            found[cell.metric] = Accuracy(*(result[key] for key in ("percent", "low", "high", "n")))
        else:
            llm = (float(result["llm"]), float(result["standard_error"]))
    return Net(row.label, row.runs[0], runs.is_finished(row.runs[0]), found, point, llm)


# ---- the views' data ----


@dataclass(frozen=True)
class TradeOff:
    """The λ view: KDIGA's accuracy at every λ_IGA of the slider, and the chosen one's training curves."""

    state: State
    nets: tuple[Net, ...]
    chosen: Net
    curves: dict[str, list[float]]
    weights: tuple[float, float]  # nominal and effective λ_IGA


@dataclass(frozen=True)
class Gallery:
    """Images (k, H, W) or (k, H, W, 3), and what the net makes of them; probabilities (2, N): clean, attacked."""

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
    """The ε view: accuracy against ε from the store, and an attack made on the spot."""

    state: State
    nets: tuple[Net, ...]
    chosen: Net
    gallery: Gallery | None


@dataclass(frozen=True)
class GradientMaps:
    """Input gradients (H, W) of student and teacher at one image, and their cosine there and over test images."""

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
    chains: dict[bool, tuple[Net, ...]]
    chosen: Net
    maps: GradientMaps | None


@dataclass(frozen=True)
class Surface:
    """Cross-entropy (k, k) in nats around an image, and whether the label is still predicted there."""

    axis: Array
    loss: Array
    correct: Array


@dataclass(frozen=True)
class OneImage:
    """The image view: both sides of Proposition 2 at one image (nats), and the loss around it."""

    state: State
    chosen: Net
    teacher_name: str
    image: Array | None = None
    label: int = 0
    terms: dict[str, float] = field(default_factory=dict, hash=False)
    gap: float = float("nan")
    surfaces: tuple[Surface, Surface] | None = None


ViewData = TradeOff | UnderAttack | Loops | OneImage


def compute(state: State) -> ViewData:
    """The data of the state's view.

    Raises:
        StoreError: a net that is needed is in the store, and damaged.
    """
    with computing(load_data(state.params.dataset).image_shape):
        return _COMPUTE[state.view](state)


def _trade_off(state: State) -> TradeOff:
    points = [Point("kdiga", weight) for weight in state.lambdas]
    nets = tuple(net(state.row(point), point) for point in points)
    chosen = nets[points.index(state.point)]
    row = state.row()
    curves: dict[str, list[float]] = {}
    for line in runs.history(chosen.run) if chosen.trained else []:
        for name, number in line.items():
            curves.setdefault(name, []).append(number)
    return TradeOff(state, nets, chosen, curves, row.weights or (0.0, 0.0))


def _under_attack(state: State) -> UnderAttack:
    nets: dict[Run, Net] = {}
    for method in state.compare:
        point = Point(method, state.params.lambda_iga, 1)
        found = net(state.row(point), point)
        nets.setdefault(found.run, found)
    chosen = net(state.row(), state.point)
    nets[chosen.run] = chosen
    student, teacher, name = _pair(state, chosen.run)
    gallery = None if student is None or teacher is None else _gallery(state, student, teacher, name)
    return UnderAttack(state, tuple(nets.values()), chosen, gallery)


def _pair(state: State, run: Run) -> tuple[nn.Module | None, nn.Module | None, str]:
    """A net and its teacher (the TRADES teacher for one that has none), None for what is not in the store."""
    reference = reference_teacher(state.here)[0]
    teacher = run.teacher if isinstance(run.teacher, Run) else reference
    name = "the TRADES teacher" if teacher == reference else "the loop before"
    shape = load_data(state.params.dataset).image_shape
    return _at_hand(run, shape), _at_hand(teacher, shape), name


def _at_hand(source: runs.Source, shape: tuple[int, int, int]) -> nn.Module | None:
    """The net to be evaluated, if it needs no training."""
    if not isinstance(source, Run):
        return _evaluated(source, shape, ())
    if not runs.is_finished(source):
        return None
    files = [runs.folder(source) / name for name in ("run.json", "model.safetensors")]
    return _evaluated(source, shape, tuple(file.stat().st_mtime_ns for file in files if file.exists()))


@lru_cache(maxsize=16)
def _evaluated(source: runs.Source, shape: tuple[int, int, int], written: tuple[int, ...]) -> nn.Module:
    """Loaded and checked once, and again when its files were ``written`` anew."""
    return folded_copy(runs.load(source) if isinstance(source, Run) else runs.load_or_train(source), shape)


def _images(state: State, count: int) -> tuple[Tensor, Tensor]:
    """``count`` test images from the chosen one on, round the end."""
    test = load_data(state.params.dataset).test
    if state.image >= len(test.labels):
        raise ValueError(f"image must be below {len(test.labels)}, got {state.image}")
    index = torch.arange(state.image, state.image + count) % len(test.labels)
    return test.images[index], test.labels[index]


def _pixels(images: Tensor) -> Array:
    """Images (k, C, H, W) as matplotlib takes them: (k, H, W) or (k, H, W, 3)."""
    return (images[:, 0] if images.shape[1] == 1 else images.permute(0, 2, 3, 1)).numpy()


def _gallery(state: State, student: nn.Module, teacher: nn.Module, name: str) -> Gallery:
    x, y = _images(state, GALLERY)
    steps = state.params.pgd_steps
    pgd = evaluation_pgd(state.epsilon, steps)
    x_adv = pgd(student, x, y, generator=torch.Generator().manual_seed(EVALUATION_SEED))
    with torch.no_grad():
        clean, attacked = student(x), student(x_adv)
        beside = torch.stack([teacher(x[:1])[0], teacher(x_adv[:1])[0]])
    return Gallery(
        _pixels(x),
        _pixels(x_adv),
        y.tolist(),
        clean.argmax(1).tolist(),
        attacked.argmax(1).tolist(),
        torch.stack([clean[0], attacked[0]]).softmax(1).numpy(),
        beside.softmax(1).numpy(),
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
    return OneImage(state, chosen, name, _pixels(x)[0], int(y), values, float(gap), (surfaces[0], surfaces[1]))


def _surfaces(state: State, models: Sequence[nn.Module], x: Tensor, y: Tensor) -> list[Surface]:
    """Loss over the plane of the student's gradient sign and a random sign pattern, ±2ε; pixels stay in [0, 1]."""
    reach = 2 * state.epsilon or 0.1
    axis = torch.linspace(-reach, reach, SURFACE)
    gradient, _ = input_gradient(models[0], x, y)
    generator = torch.Generator().manual_seed(EVALUATION_SEED)
    other = torch.randint(0, 2, x.shape, generator=generator) * 2.0 - 1
    down, along = torch.meshgrid(axis, axis, indexing="ij")
    weights = [part.reshape(-1, 1, 1, 1) for part in (along, down)]
    plane = (x + weights[0] * gradient.sign() + weights[1] * other).clamp(0, 1)
    labels = y.expand(len(plane))
    found = []
    with torch.no_grad():
        for model in models:
            logits = model(plane)
            loss, correct = cross_entropy(logits, labels), logits.argmax(1) == labels
            found.append(Surface(axis.numpy(), *(part.reshape(SURFACE, SURFACE).numpy() for part in (loss, correct))))
    return found


_COMPUTE: dict[str, Callable[[State], ViewData]] = {
    "lambda": _trade_off,
    "epsilon": _under_attack,
    "loops": _loops,
    "image": _one_image,
}


# ---- in words ----


def missing(state: State, row: Row | None = None) -> str:
    """Why the chosen point has no numbers yet; empty if it has."""
    chosen = (row or state.row()).runs[0]
    if runs.is_finished(chosen):
        return ""
    done = runs.epochs_done(chosen)
    begun = f" ({done} of {chosen.schedule.epochs} epochs are done; training goes on from there)" if done else ""
    return f"{(row or state.row()).label} on {state.student}, seed {state.seed}, is not in the store{begun}."


def is_empty(state: State) -> bool:
    """Whether the store has none of the nets that the λ view of this scale, student and seed can show."""
    points = [Point("st"), *(Point("kdiga", weight) for weight in state.lambdas)]
    return not any(runs.is_finished(state.row(point).runs[0]) for point in points)


def words(data: ViewData) -> str:
    """The controls' values and what was found, in one line of plain text."""
    state, chosen = data.state, data.chosen
    match data:
        case TradeOff():
            where = f"λ_IGA = {state.lambda_iga:g}"
            found = "nominal {:g}, effective {:.2g}; ".format(*data.weights) + _accuracies(chosen)
        case UnderAttack():
            where = f"ε = {radius_text(state.epsilon)}"
            found = _accuracies(chosen) + _gallery_words(data)
        case Loops():
            where = f"loop {state.loop}, image {state.image}"
            llm = "" if chosen.llm is None else f"; LLM {chosen.llm[0]:.3f} ± {1.96 * chosen.llm[1]:.3f} nats"
            found = _accuracies(chosen) + llm + _map_words(data.maps)
        case OneImage():
            where = f"ε = {radius_text(state.epsilon)}, image {state.image}"
            sides = f"measured gap {data.gap:.3f}, bound {sum(data.terms.values()):.3f} nats"
            found = f"label {data.label}; {sides}" if data.terms else "its teacher is not in the store"
    if not chosen.trained:
        return f"{where}: {missing(state)}"
    return f"{where}: {chosen.label}, {state.student}, seed {state.seed}: {found}. Run {run_key(chosen.run)}."


def _accuracies(net: Net) -> str:
    texts = [f"{pretty(name)} {_percent(value)}" for name, value in net.accuracies.items() if "@" not in name]
    return ", ".join(texts) or "not measured yet"


def _percent(value: Accuracy) -> str:
    return f"{value.percent:.1f} % [{value.low:.1f}, {value.high:.1f}]"


def pretty(metric: str) -> str:
    """A metric as a reader writes it."""
    if metric.startswith("pgd"):
        return f"PGD-{metric[3:]}"
    return {"autoattack": "AutoAttack"}.get(metric, metric)


def _gallery_words(data: UnderAttack) -> str:
    if data.gallery is None:
        return ""
    gallery = data.gallery
    kept = sum(guess == label for guess, label in zip(gallery.guesses_attacked, gallery.labels, strict=True))
    before, after = gallery.student[:, gallery.labels[0]]
    shown = f"; of the {len(gallery.labels)} images shown {kept} withstand"
    return f"{shown}; image {data.state.image}: P(label {gallery.labels[0]}) {before:.2f} → {after:.2f}"


def _map_words(maps: GradientMaps | None) -> str:
    if maps is None:
        return ""
    return f"; cosine with {maps.teacher_name} {maps.cosine:.3f}, mean of {maps.images} images {maps.mean_cosine:.3f}"
