"""FGSM and PGD under ℓ∞.

An attack is loss × step × start × projection. PGD on the cross-entropy is

    x_adv = project(x + uniform(-epsilon, epsilon))
    repeat steps times:
        x_adv = project(x_adv + step_size * sign(gradient of the loss at x_adv))

with ``project`` the clamp to the ball of radius epsilon around x and to [0, 1] (Equation 19). FGSM is one step of
length epsilon without the random start. Both are a ``SignAscent``; for another loss, pass another ``objective`` to
``perturb``, as TRADES does.

Every attack guarantees: shape and dtype are kept, the result is detached and lies inside [0, 1], and
‖x_adv − x‖∞ ≤ epsilon holds exactly, not up to rounding. The model's mode, buffers, parameters and ``.grad`` are as
before the call. Images outside [0, 1] and labels out of range are refused with a ValueError.

epsilon and step_size are in the pixel unit of [0, 1].
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kdiga_nb.attacks.checks import _check_epsilon, check_inputs
from kdiga_nb.losses import cross_entropy
from kdiga_nb.numerics.scopes import frozen, full_precision_inference

Objective = Callable[[Tensor], Tensor]


def ball(x: Tensor, epsilon: float | Tensor) -> tuple[Tensor, Tensor]:
    """Lower and upper bounds of the images within epsilon of x and inside [0, 1]; epsilon may differ per image.

    x + epsilon is rounded to the precision of x, half of the time away from x. Such a bound is moved back by one
    representable number, so that the distance never exceeds the radius.
    """
    exact = x.double()
    upper, lower = (exact + epsilon).to(x.dtype), (exact - epsilon).to(x.dtype)
    upper = torch.where(upper.double() - exact > epsilon, torch.nextafter(upper, x), upper)
    lower = torch.where(exact - lower.double() > epsilon, torch.nextafter(lower, x), lower)
    return lower.clamp_(min=0), upper.clamp_(max=1)


class SignAscent:
    """What FGSM and PGD share: start, step and projection."""

    epsilon: float
    steps: int
    random_start: bool
    restarts: int

    @property
    def length(self) -> float:
        """The length of one step, in pixel units."""
        return getattr(self, "step_size", self.epsilon)

    def start(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The start of the ascent: x, or a uniform draw from the ball around x."""
        if not self.random_start:
            return x.detach().clone()
        lower, upper = ball(x.detach(), self.epsilon)
        noise = torch.empty_like(x).uniform_(-self.epsilon, self.epsilon, generator=generator)
        return (x.detach() + noise).clamp_(lower, upper)

    def step(self, x_adv: Tensor, gradient: Tensor, x: Tensor) -> Tensor:
        """One projected step from x_adv along the sign of a gradient."""
        return (x_adv + self.length * gradient.sign()).clamp_(*ball(x, self.epsilon)).detach()

    def perturb(self, objective: Objective, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Ascend ``objective``, images (B, C, H, W) -> (B,), in the ball around x; the last iterate of one start."""
        x = x.detach()
        lower, upper = ball(x, self.epsilon)
        x_adv = self.start(x, generator=generator)
        with torch.enable_grad():
            for _ in range(self.steps):
                x_adv.requires_grad_()
                (gradient,) = torch.autograd.grad(objective(x_adv).sum(), x_adv)
                x_adv = x_adv.detach().add_(gradient.sign_(), alpha=self.length).clamp_(lower, upper)
        return x_adv.detach()

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Adversarial images (B, C, H, W) for the cross-entropy of ``model``.

        Each further restart attacks only the images that are still classified correctly. For an image that no restart
        fools, the adversarial image of highest loss is returned.
        """
        check_inputs(model, x, y)
        return self.unchecked(model, x, y, generator=generator)

    def unchecked(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The same without looking at the inputs' values: on a GPU, a training step must not wait for them."""
        with frozen(model):
            best = self.perturb(lambda images: cross_entropy(model(images), y), x, generator=generator)
            for _ in range(self.restarts - 1):
                with full_precision_inference():
                    logits = model(best)
                left = (logits.argmax(1) == y).nonzero().squeeze(1)
                if not len(left):
                    break
                labels = y[left]
                again = self.perturb(
                    lambda images, k=labels: cross_entropy(model(images), k), x[left], generator=generator
                )
                with full_precision_inference():
                    fresh = model(again)
                    fooled = fresh.argmax(1) != labels
                    higher = cross_entropy(fresh, labels) > cross_entropy(logits[left], labels)
                chosen = fooled | higher
                best[left[chosen]] = again[chosen]
        return best


@dataclass(frozen=True)
class PGD(SignAscent):
    """Projected gradient ascent on the cross-entropy under ℓ∞ (Equation 19).

    ``PGD(8/255, 0.8/255, 20)`` is the paper's evaluation, ``PGD(8/255, 1.6/255, 10)`` the authors' training attack.
    """

    epsilon: float
    step_size: float
    steps: int
    random_start: bool = True
    restarts: int = 1

    def __post_init__(self) -> None:
        _check_epsilon(self.epsilon)
        if not self.step_size >= 0:
            raise ValueError(f"step_size must not be negative, got {self.step_size}")
        if self.steps < 1 or self.restarts < 1:
            raise ValueError(f"steps and restarts must be at least 1, got {self.steps} and {self.restarts}")


def evaluation_pgd(epsilon: float, steps: int = 20, restarts: int = 1) -> PGD:
    """PGD as the paper evaluates: steps of 2·epsilon/steps (PGD-20 at 8/255: 0.8/255, the authors' code)."""
    return PGD(epsilon, 2 * epsilon / steps, steps, restarts=restarts)


@dataclass(frozen=True)
class FGSM(SignAscent):
    """The fast gradient sign method: one step as long as the radius, from the image itself."""

    epsilon: float
    steps: int = field(default=1, init=False)
    random_start: bool = field(default=False, init=False)
    restarts: int = field(default=1, init=False)

    def __post_init__(self) -> None:
        _check_epsilon(self.epsilon)
