"""What an audit measures: ``plan`` lists the measures by name, cheap ones first."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kdiga_nb.attacks.autoattack import AutoAttack
from kdiga_nb.attacks.checks import check_inputs
from kdiga_nb.attacks.gradient import PGD, evaluation_pgd
from kdiga_nb.attacks.losses import LossPGD
from kdiga_nb.attacks.rays import RayS
from kdiga_nb.data import Data
from kdiga_nb.losses import cross_entropy, input_gradient
from kdiga_nb.measures import Measure, first_images
from kdiga_nb.metrics import BATCH_SIZE, EVALUATION_SEED, proportion
from kdiga_nb.numerics.batches import Results, in_batches
from kdiga_nb.numerics.folding import folded_copy
from kdiga_nb.numerics.scopes import frozen, full_precision_inference


class Attacking(Protocol):
    """Anything that turns images into adversarial ones."""

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Adversarial images (B, C, H, W) in [0, 1]."""
        ...


def _generator(x: Tensor) -> torch.Generator:
    return torch.Generator(x.device).manual_seed(EVALUATION_SEED)


def _attacked(attack: Attacking, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    generator = _generator(x)

    def work(x: Tensor, y: Tensor) -> Results:
        return (attack(model, x, y, generator=generator),)

    return in_batches(work, (x, y), BATCH_SIZE, models=[model], generator=generator)[0]


def _survivors(model: nn.Module, x_adv: Tensor, y: Tensor) -> dict[str, Any]:
    with frozen(model), full_precision_inference():
        right = model(x_adv).argmax(1) == y
    mask = "".join("1" if one else "0" for one in right.tolist())
    return vars(proportion(int(right.sum()), len(y))) | {"survivors": mask}


@dataclass(frozen=True)
class Survivors(Measure):
    """Accuracy on the first ``images`` test images under ``attack`` (None: clean), and who is left.

    ``survivors`` is a string of 0 and 1, an image a character, so that attacks can be compared image by image.
    """

    attack: Attacking | None
    images: int

    def __call__(
        self, model: nn.Module, data: Data, *, reference: nn.Module | None = None, state: Path | None = None
    ) -> dict[str, Any]:
        x, y = first_images(data, model, self.images)
        check_inputs(model, x, y)
        if self.attack is not None:
            model = folded_copy(model, data.image_shape)
            x = _attacked(self.attack, model, x, y)
        return _survivors(model, x, y)


@dataclass(frozen=True)
class Transfer(Measure):
    """Accuracy on images that ``attack`` made on another net, the reference."""

    attack: PGD
    images: int

    def __call__(
        self, model: nn.Module, data: Data, *, reference: nn.Module | None = None, state: Path | None = None
    ) -> dict[str, Any]:
        if reference is None:
            raise ValueError("a transfer attack needs a reference, the net that its images are made on")
        x, y = first_images(data, model, self.images)
        model, reference = (folded_copy(net, data.image_shape) for net in (model, reference))
        return _survivors(model, _attacked(self.attack, reference, x, y), y)


@dataclass(frozen=True)
class Gradients(Measure):
    """What the input gradients look like on the first ``images`` test images.

    Keys: ``zero`` (per cent of images whose gradient of the cross-entropy is exactly zero), ``norm`` (mean ‖g‖₂ in
    nats per unit of pixel), ``cosine`` (mean cosine to the reference's gradient; only with a reference), ``loss`` (mean
    cross-entropy in nats after each number of PGD steps in ``steps``), ``noise_loss`` (mean of the highest
    cross-entropy of ten uniform draws in the ball), ``surface`` (cross-entropy of one image on a grid over ε times the
    signs of its gradient and of a random direction, a row a multiple of the gradient), ``surface_radius``.
    """

    epsilon: float
    images: int
    steps: tuple[int, ...] = (0, 1, 2, 5, 10, 20, 50, 100)
    grid: int = 21

    def __call__(
        self, model: nn.Module, data: Data, *, reference: nn.Module | None = None, state: Path | None = None
    ) -> dict[str, Any]:
        x, y = first_images(data, model, self.images)
        check_inputs(model, x, y)
        model = folded_copy(model, data.image_shape)
        with frozen(model):
            g, logits = input_gradient(model, x, y)
            result: dict[str, Any] = {
                "zero": 100 * (g.flatten(1).abs().amax(1) == 0).double().mean().item(),
                "norm": g.flatten(1).norm(dim=1).mean().item(),
                "steps": list(self.steps),
                "loss": self._curve(model, x, y),
                "noise_loss": self._noise(model, x, y),
                "surface": self._surface(model, x, y, g, logits),
                "surface_radius": 2 * self.epsilon,
                "n": len(y),
            }
        if reference is not None:
            with frozen(reference):
                other, _ = input_gradient(reference, x, y)
            cosine = torch.cosine_similarity(g.flatten(1), other.flatten(1), dim=1)
            result["cosine"] = cosine.mean().item()
        return result

    def _curve(self, model: nn.Module, x: Tensor, y: Tensor) -> list[float]:
        attack, losses = PGD(self.epsilon, self.epsilon / 10, 1), []
        x_adv = attack.start(x, generator=_generator(x))
        for step in range(max(self.steps) + 1):
            gradient, logits = input_gradient(model, x_adv, y)
            if step in self.steps:
                losses.append(cross_entropy(logits, y).mean().item())
            x_adv = attack.step(x_adv, gradient, x)
        return losses

    def _noise(self, model: nn.Module, x: Tensor, y: Tensor) -> float:
        attack, generator = PGD(self.epsilon, self.epsilon, 1), _generator(x)
        with torch.no_grad():
            draws = [cross_entropy(model(attack.start(x, generator=generator)), y) for _ in range(10)]
        return torch.stack(draws).amax(0).mean().item()

    def _surface(self, model: nn.Module, x: Tensor, y: Tensor, g: Tensor, logits: Tensor) -> list[list[float]]:
        """Around the first image that is classified correctly, out to 2ε; pixels are clamped to [0, 1]."""
        index = int((logits.argmax(1) == y).double().argmax())
        other = torch.empty_like(x[:1]).uniform_(-1, 1, generator=_generator(x)).sign()
        line = torch.linspace(-2 * self.epsilon, 2 * self.epsilon, self.grid, dtype=x.dtype, device=x.device)
        a, b = torch.meshgrid(line, line, indexing="ij")
        moved = x[index] + a.reshape(-1, 1, 1, 1) * g[index].sign() + b.reshape(-1, 1, 1, 1) * other
        with torch.no_grad():
            losses = cross_entropy(model(moved.clamp(0, 1)), y[index].expand(len(moved)))
        return losses.view(self.grid, self.grid).tolist()


@dataclass(frozen=True)
class Preconditions(Measure):
    """``preconditions`` on the first ``images`` test images; ``faults`` maps the name of each to its sentence."""

    images: int

    def __call__(
        self, model: nn.Module, data: Data, *, reference: nn.Module | None = None, state: Path | None = None
    ) -> dict[str, Any]:
        x, y = first_images(data, model, self.images)
        found = preconditions(model, x, y, data.num_classes)
        return {"faults": found, "count": len(found), "n": len(y)}


def preconditions(model: nn.Module, x: Tensor, y: Tensor, num_classes: int) -> dict[str, str]:
    """What makes a robustness number of this model meaningless, by name; empty if nothing does.

    Args:
        x, y: some test images (B, C, H, W) and labels (B,); a hundred are enough.
        num_classes: of the data set.
    """
    found: dict[str, str] = {}
    low, high = x.min().item(), x.max().item()
    if not (low >= 0 and high <= 1):
        found["pixel_range"] = f"images must lie in [0, 1], got values from {low:g} to {high:g}"
    training = [name or type(model).__name__ for name, module in model.named_modules() if module.training]
    if training:
        found["train_mode"] = f"the model is in train mode ({training[0]}): call model.eval() first"
    with frozen(model), torch.no_grad():
        first, second = model(x), model(x)
        if first.ndim != 2 or first.shape[1] != num_classes:
            found["class_count"] = (
                f"the model's output has shape {tuple(first.shape)}, the data set {num_classes} classes"
            )
            return found
        if not first.isfinite().all():
            found["not_finite"] = "the model's output is not finite"
        if not torch.equal(first, second):
            difference = (first - second).abs().max().item()
            found["random_output"] = (
                f"two passes on the same images differ by up to {difference:.2g}: attack its expectation"
            )
        if (first >= 0).all() and torch.allclose(first.sum(1), torch.ones_like(first[:, 0]), atol=1e-4):
            found["probabilities"] = "the model's outputs are probabilities: take the layer before its softmax"
        if "pixel_range" not in found:
            found |= _unnormalised(model, x, y)
        percent = 100 * (first.argmax(1) == y).double().mean().item()
        if percent < 150 / num_classes:
            found["at_chance"] = f"clean accuracy is {percent:.0f} %, hardly better than guessing"
    return found


def _unnormalised(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, str]:
    """A net trained on normalised images and handed over without its normalisation does better on those."""
    mean, std = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
    others = {"(x − mean)/std": (x - mean) / std, "2x − 1": 2 * x - 1, "255·x": 255 * x}
    here = 100 * (model(x).argmax(1) == y).double().mean().item()
    for name, images in others.items():
        there = 100 * (model(images).argmax(1) == y).double().mean().item()
        if there > here + 10:
            sentence = f"accuracy is {here:.0f} % on images in [0, 1] and {there:.0f} % on {name}"
            sentence += ": put the normalisation into the model"
            return {"unnormalised_images": sentence}
    return {}


def plan(
    epsilon: float,
    *,
    steps: int = 20,
    images: int = 200,
    long_steps: int = 1000,
    long_restarts: int = 10,
    long_images: int = 40,
    black_box_images: int = 100,
    queries: int = 1000,
    step_sizes: Sequence[float] = (0.02, 0.05, 0.1, 0.2, 0.5),
    radii: Sequence[float] = (0.5, 1.5, 2, 3, 5),
) -> dict[str, Measure]:
    """The measures of an audit by name, cheap ones first.

    Args:
        epsilon: radius in pixel units; the plain attack, ``pgd``, takes ``steps`` steps of 2·epsilon/steps.
        images, long_images, black_box_images: test images for most attacks, for the long PGD, for Square and RayS.
        queries: of RayS; Square has its authors' 5,000.
        step_sizes, radii: of the sweeps, in multiples of epsilon.
    """
    size = evaluation_pgd(epsilon, steps).step_size
    few = min(black_box_images, images)
    wide = {factor: min(factor * epsilon, 1.0) for factor in radii}
    return {
        "preconditions": Preconditions(min(images, 100)),
        "clean": Survivors(None, images),
        "gradients": Gradients(epsilon, images),
        "noise": Survivors(LossPGD(epsilon, 0.0, 1, restarts=10), images),
        "pgd": Survivors(LossPGD(epsilon, size, steps), images),
        "pgd_more": Survivors(LossPGD(epsilon, size / 2, 5 * steps), images),
        "margin": Survivors(LossPGD(epsilon, size, 2 * steps, loss="margin"), images),
        "dlr": Survivors(LossPGD(epsilon, size, 2 * steps, loss="dlr"), images),
        "targeted": Survivors(LossPGD(epsilon, size, 2 * steps, restarts=9, loss="targeted"), images),
        "scaled": Survivors(LossPGD(epsilon, size, 2 * steps, logit_scale=0.05), images),
        **{f"step@{f:g}": Survivors(LossPGD(epsilon, f * epsilon, steps), images) for f in step_sizes},
        **{f"pgd@{f:g}": Survivors(LossPGD(e, 2 * e / steps, steps), images) for f, e in wide.items()},
        "transfer": Transfer(PGD(epsilon, size, steps), images),
        "hard_label": Survivors(RayS(epsilon, queries), few),
        "square": Survivors(AutoAttack(epsilon, version="square"), few),
        "pgd_long": Survivors(
            LossPGD(epsilon, epsilon / 20, long_steps, restarts=long_restarts), min(long_images, images)
        ),
    }


COMPARES = ("transfer", "gradients")  # what is measured against a reference net, where there is one
