"""What is measured on a trained net: accuracy with its interval, local linearity, the terms of Proposition 2.

These are plain functions of nets and tensors; ``measures`` turns them into values that the store can cache.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor, nn

from kdiga_nb.attacks.checks import check_inputs
from kdiga_nb.losses import cross_entropy, input_gradient
from kdiga_nb.numerics.batches import Results, in_batches
from kdiga_nb.numerics.scopes import frozen, full_precision_inference

EVALUATION_SEED = 0
BATCH_SIZE = 500  # images per forward pass, fewer where memory does not hold them
STARTS = 4  # at most, of a search for a largest value, in one batch


class Attacking(Protocol):
    """Anything that turns images into adversarial ones."""

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Adversarial images (B, C, H, W) in [0, 1]."""
        ...


@dataclass(frozen=True)
class Accuracy:
    """Correct predictions in per cent of ``n`` images, with the 95 % Wilson score interval of that proportion."""

    percent: float
    low: float
    high: float
    n: int


@cache
def proportion(correct: int, n: int) -> Accuracy:
    """``correct`` of ``n`` as an ``Accuracy``."""
    from scipy.stats import binomtest

    interval = binomtest(correct, n).proportion_ci(confidence_level=0.95, method="wilson")
    return Accuracy(100 * correct / n, 100 * interval.low, 100 * interval.high, n)


def accuracy(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    attack: Attacking | None = None,
    batch_size: int = BATCH_SIZE,
    generator: torch.Generator | None = None,
) -> Accuracy:
    """Clean accuracy, or robust accuracy under ``attack``, of a net in eval mode.

    Args:
        images, labels: (n, C, H, W) in [0, 1] and (n,).
        generator: of the attack's random starts; the default has a fixed seed, so that a number can be repeated.

    Raises:
        ValueError: images outside [0, 1] or labels out of range.
    """
    correct = classified_correctly(model, images, labels, attack=attack, batch_size=batch_size, generator=generator)
    return proportion(int(correct.sum()), len(labels))


def classified_correctly(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    attack: Attacking | None = None,
    attacked: nn.Module | None = None,
    batch_size: int = BATCH_SIZE,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The mask (n,) of the images that ``accuracy`` counts as correct.

    Args:
        attacked: the net that ``attack`` attacks (default: ``model``); another net makes this a transfer attack.
    """
    check_inputs(model, images, labels)
    attacked = model if attacked is None else attacked
    if generator is None:
        generator = torch.Generator(images.device).manual_seed(EVALUATION_SEED)

    def right(x: Tensor, y: Tensor) -> Results:
        if attack is not None:
            x = attack(attacked, x, y, generator=generator)
        with full_precision_inference():
            return (model(x).argmax(1) == y,)

    models = [model] if attacked is model else [model, attacked]
    with frozen(model), frozen(attacked):
        return in_batches(right, (images, labels), batch_size, models=models, generator=generator)[0]


def loss_surface(
    model: nn.Module, x: Tensor, y: Tensor, directions: tuple[Tensor, Tensor], radius: float, points: int
) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats on a plane around one image, and whether the decision is correct there.

    Both results are (points, points): one row per multiple of the first direction, one column per multiple of the
    second, from −radius to radius. Pixels are clamped to [0, 1].

    Args:
        x, y: one image (1, C, H, W) and its label (1,).
        directions: two perturbations (1, C, H, W) of size 1 in ℓ∞, the signs of a gradient for instance.
    """
    axis = torch.linspace(-radius, radius, points, dtype=x.dtype, device=x.device)
    rows, columns = (part.reshape(-1, 1, 1, 1) for part in torch.meshgrid(axis, axis, indexing="ij"))
    labels = y.expand(points * points)
    with torch.no_grad():
        logits = model((x + rows * directions[0] + columns * directions[1]).clamp(0, 1))
    losses, correct = cross_entropy(logits, labels), logits.argmax(1) == labels
    return losses.view(points, points), correct.view(points, points)


def local_linearity(
    model: nn.Module, x: Tensor, y: Tensor, epsilon: float, *, steps: int = 50, step_size: float | None = None
) -> Tensor:
    """LLM of Definition 2: max over ‖δ‖∞ ≤ ε of |CE(f(x+δ)) − CE(f(x)) − δᵀ∇CE(f(x))|, (B,) in nats.

    Sign ascent from three starts, a random one and the two corners ±ε·sign(∇CE), searches for the maximum and keeps
    the best iterate, so the value is a lower bound of the true maximum. (A single random start stops at poor local
    maxima: the gap has no slope at δ = 0.) The absolute value is part of the objective, and δ stays in the ball. (The
    authors' code drops the absolute value and takes steps of 0.1, which leave the ball.) The domain is the ball alone,
    as in the definition: x + δ may leave [0, 1].

    Args:
        x, y, epsilon: images (B, C, H, W) in [0, 1], labels (B,), radius in pixel units.
        step_size: of the ascent, in pixel units (default ε/10).
    """

    def work(x: Tensor, y: Tensor) -> Results:
        return (_linearity(model, x, y, epsilon, steps, step_size, []),)

    return in_batches(work, (x, y), BATCH_SIZE, models=[model], copies=STARTS)[0]


def _linearity(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    epsilon: float,
    steps: int,
    step_size: float | None,
    candidates: list[Tensor],
) -> Tensor:
    """``local_linearity`` that also evaluates the gap at the given perturbations."""
    check_inputs(model, x, y)
    with frozen(model):
        gradient, logits = input_gradient(model, x, y)
        base = cross_entropy(logits, y)

        def gap(delta: Tensor) -> Tensor:
            images, labels, value, slope = (_for_each_start(each, delta) for each in (x, y, base, gradient))
            tangent = value + (delta * slope).flatten(1).sum(1)
            return (cross_entropy(model(images + delta), labels) - tangent).abs()

        corner = epsilon * gradient.sign()
        best, _ = _largest(gap, [_random_start(x, epsilon), corner, -corner], epsilon, steps, step_size)
        with torch.no_grad():
            for delta in candidates:
                best = torch.maximum(best, gap(delta))
    return best


def measured_gap(
    student: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor, epsilon: float, *, steps: int = 50
) -> Tensor:
    """The left side of Proposition 2, max over ‖δ‖∞ ≤ ε of |CE(f_s(x+δ), y) − CE(f_t(x+δ), y)|, (B,) in nats.

    Sign ascents search for a student's loss above the teacher's and, apart from that, for one below it. Each starts at
    two corners of the ball: ε·sign(g) of the loss that is to be the larger, and ±ε·sign(g_s − g_t). (An ascent on the
    absolute value stays on the side where it starts: a student with less loss than its teacher at x is then hardly
    ever found with more.) The gap at x itself counts too. The value is a lower bound of the true maximum.
    """

    def work(x: Tensor, y: Tensor) -> Results:
        return _gap(student, teacher, x, y, epsilon, steps)

    return in_batches(work, (x, y), BATCH_SIZE, models=[student, teacher], copies=STARTS)[0]


def _gap(
    student: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor, epsilon: float, steps: int
) -> tuple[Tensor, Tensor]:
    """``measured_gap``, and the perturbations (B, C, H, W) that reach it."""
    check_inputs(student, x, y)
    with frozen(student), frozen(teacher):

        def gap(delta: Tensor) -> Tensor:
            images, labels = _for_each_start(x, delta) + delta, _for_each_start(y, delta)
            difference = cross_entropy(student(images), labels) - cross_entropy(teacher(images), labels)
            higher, lower = difference.chunk(2)
            return torch.cat([higher, -lower])

        g_student, student_logits = input_gradient(student, x, y)
        g_teacher, teacher_logits = input_gradient(teacher, x, y)
        corner = epsilon * (g_student - g_teacher).sign()
        starts = [epsilon * g_student.sign(), corner, epsilon * g_teacher.sign(), -corner]
        best, delta = _largest(gap, starts, epsilon, steps, None)
    at_x = (cross_entropy(student_logits, y) - cross_entropy(teacher_logits, y)).abs()
    moved = (best > at_x).view(-1, *[1] * (x.ndim - 1))
    return torch.maximum(best, at_x), torch.where(moved, delta, 0.0)


def _random_start(x: Tensor, epsilon: float) -> Tensor:
    generator = torch.Generator(x.device).manual_seed(EVALUATION_SEED)
    return torch.empty_like(x).uniform_(-epsilon, epsilon, generator=generator)


def _largest(
    gap: Callable[[Tensor], Tensor], starts: list[Tensor], epsilon: float, steps: int, step_size: float | None
) -> tuple[Tensor, Tensor]:
    """Sign ascent on δ in the ball from each start: the largest value per example on the way, and its δ."""
    step_size = epsilon / 10 if step_size is None else step_size
    delta = torch.cat(starts)  # all ascents in one batch: on few images the calls cost more than the arithmetic
    best = torch.full_like(delta.flatten(1)[:, 0], -torch.inf)
    where = torch.zeros_like(delta)

    def keep(value: Tensor, delta: Tensor) -> None:
        better = value > best
        best[better], where[better] = value[better], delta[better]

    for _ in range(steps):
        delta = delta.detach().requires_grad_()
        with torch.enable_grad():
            value = gap(delta)
            (ascent,) = torch.autograd.grad(value.sum(), delta)
        keep(value.detach(), delta.detach())
        delta = (delta.detach() + step_size * ascent.sign()).clamp_(-epsilon, epsilon)
    with torch.no_grad():
        keep(gap(delta), delta)
    best, chosen = best.view(len(starts), -1).max(dim=0)
    return best, where.view(len(starts), *starts[0].shape)[chosen, torch.arange(len(chosen), device=chosen.device)]


def _for_each_start(tensor: Tensor, delta: Tensor) -> Tensor:
    """A tensor (B, …) repeated for the perturbations (k·B, C, H, W) of k starts."""
    return tensor.repeat(len(delta) // len(tensor), *[1] * (tensor.ndim - 1))


@dataclass(frozen=True)
class BoundTerms:
    """The terms of Proposition 2, one value per example (B,), in nats.

    |CE(f_s(x+δ), y) − CE(f_t(x+δ), y)| ≤ γ_s + γ_t + φ with φ = CE_s + CE_t + ε‖g_s − g_t‖.

    Attributes:
        llm_student, llm_teacher: γ_s and γ_t, estimated from below by ``local_linearity``.
        ce_student, ce_teacher: cross-entropies at x.
        distance: ‖g_s − g_t‖ in the chosen norm.
        epsilon: radius in pixel units.
    """

    llm_student: Tensor
    llm_teacher: Tensor
    ce_student: Tensor
    ce_teacher: Tensor
    distance: Tensor
    epsilon: float

    @property
    def phi(self) -> Tensor:
        """φ of Proposition 2."""
        return self.ce_student + self.ce_teacher + self.epsilon * self.distance

    @property
    def bound(self) -> Tensor:
        """γ_s + γ_t + φ."""
        return self.llm_student + self.llm_teacher + self.phi

    @property
    def tight(self) -> Tensor:
        """``bound`` with |CE_s − CE_t| in place of CE_s + CE_t: all that the triangle inequality needs."""
        difference = (self.ce_student - self.ce_teacher).abs()
        return self.llm_student + self.llm_teacher + difference + self.epsilon * self.distance


BOUND_NORMS = {"l1": 1, "l2": 2}


def bound_terms(
    student: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor, epsilon: float, norm: str = "l1", *, steps: int = 50
) -> BoundTerms:
    """Every term of Proposition 2 for images (B, C, H, W) and labels (B,).

    Args:
        norm: of the gradient difference. ``l1`` is the dual of ℓ∞, which the proposition needs; ``l2`` is what Table 3
            prints, and with ``l2`` the inequality can fail by up to the root of the number of pixels.

    Raises:
        ValueError: an unknown norm, images outside [0, 1] or labels out of range.
    """
    if norm not in BOUND_NORMS:
        raise ValueError(f"norm must be one of {', '.join(BOUND_NORMS)}, got {norm!r}")

    def work(x: Tensor, y: Tensor) -> Results:
        return _bound_terms(student, teacher, x, y, epsilon, norm, steps, [])

    terms = in_batches(work, (x, y), BATCH_SIZE, models=[student, teacher], copies=STARTS)
    return BoundTerms(*terms, epsilon=epsilon)


def _bound_terms(
    student: nn.Module,
    teacher: nn.Module,
    x: Tensor,
    y: Tensor,
    epsilon: float,
    norm: str,
    steps: int,
    candidates: list[Tensor],
) -> Results:
    """The tensors of ``BoundTerms``, in its order."""
    llm_student = _linearity(student, x, y, epsilon, steps, None, candidates)
    llm_teacher = _linearity(teacher, x, y, epsilon, steps, None, candidates)
    with frozen(student), frozen(teacher):
        g_student, student_logits = input_gradient(student, x, y)
        g_teacher, teacher_logits = input_gradient(teacher, x, y)
    distance = torch.linalg.vector_norm((g_student - g_teacher).flatten(1), ord=BOUND_NORMS[norm], dim=1)
    ce_student, ce_teacher = cross_entropy(student_logits, y), cross_entropy(teacher_logits, y)
    return llm_student, llm_teacher, ce_student, ce_teacher, distance


def gap_and_bound(
    student: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor, epsilon: float, *, steps: int = 50
) -> tuple[Tensor, BoundTerms]:
    """Both sides of Proposition 2, in the norm it needs: ``measured_gap`` (B,) and ``bound_terms``.

    γ comes from a search. The search for γ also looks where the gap is largest, so that a short search does not fake
    a violation.
    """

    def work(x: Tensor, y: Tensor) -> Results:
        gap, delta = _gap(student, teacher, x, y, epsilon, steps)
        return gap, *_bound_terms(student, teacher, x, y, epsilon, "l1", steps, [delta])

    gap, *terms = in_batches(work, (x, y), BATCH_SIZE, models=[student, teacher], copies=STARTS)
    return gap, BoundTerms(*terms, epsilon=epsilon)
