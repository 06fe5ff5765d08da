"""What an audit measures: ``plan`` lists the measures by name, cheap ones first."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdiga_nb.attacks.autoattack import AutoAttack
from kdiga_nb.attacks.checks import check_inputs
from kdiga_nb.attacks.gradient import PGD, evaluation_pgd
from kdiga_nb.attacks.losses import LossPGD
from kdiga_nb.attacks.rays import RayS
from kdiga_nb.data import Data
from kdiga_nb.losses import cross_entropy, input_gradient
from kdiga_nb.measures import Measure, TestAccuracy, first_images, with_mask
from kdiga_nb.metrics import EVALUATION_SEED, Attacking, classified_correctly, loss_surface
from kdiga_nb.numerics.batches import batch_that_fits, in_batches
from kdiga_nb.numerics.folding import folded_copy
from kdiga_nb.numerics.scopes import frozen

BATCH = 500  # images at a time, if they fit into memory


def _input_gradient(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """``input_gradient`` in batches that fit into memory."""
    return in_batches(partial(input_gradient, model), (x, y), BATCH, models=[model])


def _generator(x: Tensor) -> torch.Generator:
    return torch.Generator(x.device).manual_seed(EVALUATION_SEED)


@dataclass(frozen=True)
class Transfer(Measure):
    """Accuracy on images that ``attack`` made on another net, the reference; ``survivors`` as in ``TestAccuracy``."""

    attack: PGD
    images: int

    def __call__(
        self, model: nn.Module, data: Data, *, reference: nn.Module | None = None, state: Path | None = None
    ) -> dict[str, Any]:
        if reference is None:
            raise ValueError("a transfer attack needs a reference, the net that its images are made on")
        x, y = first_images(data, model, self.images)
        model, reference = (folded_copy(net, data.image_shape) for net in (model, reference))
        return with_mask(classified_correctly(model, x, y, attack=self.attack, attacked=reference))


@dataclass(frozen=True)
class Gradients(Measure):
    """What the input gradients look like on the first ``images`` test images.

    Keys: ``zero`` (per cent of images whose gradient of the cross-entropy is exactly zero), ``norm`` (mean ‖g‖₂ in
    nats per unit of pixel), ``cosine`` (mean cosine to the reference's gradient; only with a reference), ``loss`` (mean
    cross-entropy in nats after each number of PGD steps in ``steps``), ``noise_loss`` (mean of the highest
    cross-entropy of ten uniform draws in the ball), ``surface`` (cross-entropy of one image on a grid over ε times the
    signs of its gradient and of a random direction, one row per multiple of the gradient), ``surface_radius``.
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
            g, logits = _input_gradient(model, x, y)
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
                other, _ = _input_gradient(reference, x, y)
            cosine = torch.cosine_similarity(g.flatten(1), other.flatten(1), dim=1)
            result["cosine"] = cosine.mean().item()
        return result

    def _curve(self, model: nn.Module, x: Tensor, y: Tensor) -> list[float]:
        attack, losses = PGD(self.epsilon, self.epsilon / 10, 1), []
        x_adv = attack.start(x, generator=_generator(x))
        size = batch_that_fits([model], x, BATCH)
        for step in range(max(self.steps) + 1):
            gradient, logits = in_batches(partial(input_gradient, model), (x_adv, y), size)
            if step in self.steps:
                losses.append(cross_entropy(logits, y).mean().item())
            x_adv = attack.step(x_adv, gradient, x)
        return losses

    def _noise(self, model: nn.Module, x: Tensor, y: Tensor) -> float:
        attack, generator = PGD(self.epsilon, self.epsilon, 1), _generator(x)
        with torch.no_grad():
            starts = (attack.start(x, generator=generator) for _ in range(10))
            draws = [cross_entropy(in_batches(lambda x: (model(x),), (start,), BATCH)[0], y) for start in starts]
        return torch.stack(draws).amax(0).mean().item()

    def _surface(self, model: nn.Module, x: Tensor, y: Tensor, g: Tensor, logits: Tensor) -> list[list[float]]:
        """Around the first image that is classified correctly, out to 2ε."""
        index = int((logits.argmax(1) == y).double().argmax())
        other = torch.empty_like(x[:1]).uniform_(-1, 1, generator=_generator(x)).sign()
        one = slice(index, index + 1)
        losses, _ = loss_surface(model, x[one], y[one], (g[one].sign(), other), 2 * self.epsilon, self.grid)
        return losses.tolist()


@dataclass(frozen=True)
class Preconditions(Measure):
    """``preconditions`` on the first ``images`` test images; ``faults`` maps the name of each fault to its sentence."""

    images: int

    def __call__(
        self, model: nn.Module, data: Data, *, reference: nn.Module | None = None, state: Path | None = None
    ) -> dict[str, Any]:
        x, y = first_images(data, model, self.images)
        faults = preconditions(model, x, y, data.num_classes)
        return {"faults": faults, "count": len(faults), "n": len(y)}


def preconditions(model: nn.Module, x: Tensor, y: Tensor, num_classes: int) -> dict[str, str]:
    """The faults that make a robustness number of this model meaningless, by name; empty if there is none.

    Args:
        x, y: some test images (B, C, H, W) and labels (B,); a hundred are enough.
        num_classes: of the data set.
    """
    faults: dict[str, str] = {}
    low, high = x.min().item(), x.max().item()
    if not (low >= 0 and high <= 1):
        faults["pixel_range"] = f"images must lie in [0, 1], got values from {low:g} to {high:g}"
    training = [name or type(model).__name__ for name, module in model.named_modules() if module.training]
    if training:
        faults["train_mode"] = f"the model is in train mode ({training[0]}): call model.eval() first"
    with frozen(model), torch.no_grad():
        first, second = model(x), model(x)
        if first.ndim != 2 or first.shape[1] != num_classes:
            faults["class_count"] = (
                f"the model's output has shape {tuple(first.shape)}, the data set {num_classes} classes"
            )
            return faults
        if not first.isfinite().all():
            faults["not_finite"] = "the model's output is not finite"
        if not torch.equal(first, second):
            difference = (first - second).abs().max().item()
            faults["random_output"] = (
                f"two passes on the same images differ by up to {difference:.2g}: attack its expectation"
            )
        if (first >= 0).all() and torch.allclose(first.sum(1), torch.ones_like(first[:, 0]), atol=1e-4):
            faults["probabilities"] = "the model's outputs are probabilities: take the layer before its softmax"
        if "pixel_range" not in faults:
            faults |= _unnormalised(model, x, y)
        percent = 100 * (first.argmax(1) == y).double().mean().item()
        if percent < 150 / num_classes:
            faults["at_chance"] = f"clean accuracy is {percent:.0f} %, hardly better than guessing"
    return faults


def _unnormalised(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, str]:
    """A net without the normalisation that it was trained with is more accurate on normalised images."""
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
        images, long_images, black_box_images: test images of most attacks, of the long PGD, of Square and RayS.
        queries: of RayS; Square makes its authors' 5,000 queries.
        step_sizes, radii: of the sweeps, in multiples of epsilon.
    """
    size = evaluation_pgd(epsilon, steps).step_size
    few = min(black_box_images, images)
    wide = {factor: min(factor * epsilon, 1.0) for factor in radii}
    long = LossPGD(epsilon, epsilon / 20, long_steps, restarts=long_restarts)

    def left(attack: Attacking | None, n: int = images) -> TestAccuracy:
        return TestAccuracy(attack, n, needs_mask=True)

    return {
        "preconditions": Preconditions(min(images, 100)),
        "clean": left(None),
        "gradients": Gradients(epsilon, images),
        "noise": left(LossPGD(epsilon, 0.0, 1, restarts=10)),
        "pgd": left(LossPGD(epsilon, size, steps)),
        "pgd_more": left(LossPGD(epsilon, size / 2, 5 * steps)),
        "margin": left(LossPGD(epsilon, size, 2 * steps, loss="margin")),
        "dlr": left(LossPGD(epsilon, size, 2 * steps, loss="dlr")),
        "targeted": left(LossPGD(epsilon, size, 2 * steps, restarts=9, loss="targeted")),
        "scaled": left(LossPGD(epsilon, size, 2 * steps, logit_scale=0.05)),
        **{f"step@{f:g}": left(LossPGD(epsilon, f * epsilon, steps)) for f in step_sizes},
        **{f"pgd@{f:g}": left(LossPGD(e, 2 * e / steps, steps)) for f, e in wide.items()},
        "transfer": Transfer(PGD(epsilon, size, steps), images),
        "hard_label": left(RayS(epsilon, queries), few),
        "square": left(AutoAttack(epsilon, version="square"), few),
        "pgd_long": left(long, min(long_images, images)),
    }


COMPARES = ("transfer", "gradients")  # the measures that take a reference net
