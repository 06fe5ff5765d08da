"""Is the robustness real? The checks that an adversarial evaluation owes its reader, and a verdict by named rules.

``plan(epsilon)`` lists the measures of an audit by name: more steps and restarts, other losses, other step sizes and
radii, attacks that see only scores (Square) or only labels (RayS), images made on another net, and what the input
gradients look like. Each is a ``Measure``, so the run store caches them one by one and an audit goes on where it was
cut off. ``verdict`` reads the results: every rule is a function of them that answers with a sentence if it rings, after
Carlini et al. 2019 (On Evaluating Adversarial Robustness), Athalye et al. 2018 (Obfuscated Gradients) and AutoAttack's
own flags. No single number says whether a net is robust.

``preconditions`` comes first: what makes any robustness number of a model meaningless (train mode, random output,
probabilities for logits, missing normalisation, another number of classes), by name.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kdiga_nb.attacks import PGD, AutoAttack, Results, ball, check_inputs, frozen, in_batches, verdicts
from kdiga_nb.data import Data
from kdiga_nb.losses import cross_entropy, input_gradient
from kdiga_nb.metrics import BATCH_SIZE, EVALUATION_SEED, Measure, first_images, proportion
from kdiga_nb.operators import still

LOSSES = ("cross_entropy", "margin", "dlr", "targeted")
Found = Mapping[str, Mapping[str, Any]]


class Attacking(Protocol):
    """Anything that turns images into adversarial ones."""

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Adversarial images (B, C, H, W) in [0, 1]."""
        ...


# ---- attacks that only an audit needs ----


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Largest other logit minus the true one, (B, N), (B,) -> (B,): positive where the model is wrong."""
    true = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], -math.inf)
    return others.amax(1) - true


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio, (B, N), (B,) -> (B,): the margin over the lead of the first logit on the third.

    Neither a shift nor a positive scale of the logits changes it (Croce & Hein 2020). With two classes it is
    the margin.
    """
    if logits.shape[1] < 3:
        return margin(logits, labels)
    ordered = logits.sort(1, descending=True).values
    return margin(logits, labels) / (ordered[:, 0] - ordered[:, 2]).clamp(min=1e-12)


_OBJECTIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": cross_entropy,
    "margin": margin,
    "dlr": dlr,
}


def _lead(logits: Tensor, aims: Tensor, labels: Tensor) -> Tensor:
    """A chosen other logit minus the true one, (B, N), (B,), (B,) -> (B,)."""
    return (logits.gather(1, aims[:, None]) - logits.gather(1, labels[:, None])).squeeze(1)


@dataclass(frozen=True)
class LossPGD(PGD):
    """PGD on a loss of one's choice, all restarts in one batch; an image is given up as soon as one of them fools it.

    Attributes:
        loss: ``cross_entropy``, ``margin``, ``dlr``, or ``targeted``: the lead of one wrong class over the true
            one, the likeliest at x in the first restart, the next in the second, and so on.
        logit_scale: the logits are multiplied by it first. A net that saturates the cross-entropy by sheer size of its
            logits has gradients again at a small scale.
    """

    loss: str = "cross_entropy"
    logit_scale: float = 1.0
    look_every: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {self.loss!r}")
        if not self.logit_scale > 0:
            raise ValueError(f"logit_scale must be positive, got {self.logit_scale}")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Adversarial images (B, C, H, W): one that fools the net if a restart found it, else one of the restarts'."""
        check_inputs(model, x, y)
        x = x.detach()
        found = x.clone()
        with frozen(model):
            left = torch.arange(len(x), device=x.device).repeat(self.restarts)
            aims = self._aims(model, x, y)
            x_adv = self.start(x[left], generator=generator)
            for step in range(self.steps + 1):
                if step % self.look_every == 0 or step == self.steps:
                    with verdicts():
                        fooled = model(x_adv).argmax(1) != y[left]
                    found[left[fooled]] = x_adv[fooled]
                    done = torch.isin(left, left[fooled])
                    left, aims, x_adv = left[~done], aims[~done], x_adv[~done]
                if not len(left) or step == self.steps:
                    break
                x_adv = self._step(model, x_adv, x[left], y[left], aims)
            found[left] = x_adv
        return found

    def _aims(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The wrong class that each restart of each image aims at, (restarts · B,); the likeliest at x comes first."""
        with torch.no_grad():
            ranked = model(x).scatter(1, y[:, None], -math.inf).argsort(1, descending=True)
        wrong = ranked.shape[1] - 1
        return torch.cat([ranked[:, restart % wrong] for restart in range(self.restarts)])

    def _step(self, model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor, aims: Tensor) -> Tensor:
        with torch.enable_grad():
            x_adv = x_adv.detach().requires_grad_()
            logits = self.logit_scale * model(x_adv)
            targeted = self.loss == "targeted"
            value = _lead(logits, aims, y) if targeted else _OBJECTIVES[self.loss](logits, y)
            (gradient,) = torch.autograd.grad(value.sum(), x_adv)
        return self.step(x_adv.detach(), gradient, x)


@dataclass(frozen=True)
class RayS:
    """RayS (Chen & Gu 2020), which sees the decision alone: the nearest corner, searched by flipping blocks of signs.

    A direction is a sign a pixel; its radius is how far one must go along it for another decision. Halving the block
    size from the whole image down to single pixels, a flip is kept if it leads to a wrong decision within the radius so
    far, which is then bisected.
    """

    epsilon: float
    queries: int = 1000
    halvings: int = 10

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Adversarial images where a wrong decision lies within epsilon, else the corner nearest to one."""
        check_inputs(model, x, y)
        flat = x.detach().flatten(1)
        sign, radius = torch.ones_like(flat), torch.ones_like(flat[:, 0])
        used, blocks = 0, 1

        def wrong(rows: Tensor, signs: Tensor, reach: Tensor) -> Tensor:
            moved = (flat[rows] + reach[:, None] * signs).clamp(0, 1).view(-1, *x.shape[1:])
            return model(moved).argmax(1) != y[rows]

        with frozen(model), verdicts():
            while used < self.queries:
                size = math.ceil(flat.shape[1] / blocks)
                for begin in range(0, flat.shape[1], size):
                    rows = (radius > self.epsilon).nonzero().squeeze(1)
                    if used >= self.queries or not len(rows):
                        return self._at(x, flat, sign, radius)
                    trial = sign[rows].clone()
                    trial[:, begin : begin + size] *= -1
                    hit = wrong(rows, trial, radius[rows])
                    used += 1
                    if hit.any():
                        rows, trial = rows[hit], trial[hit]
                        low, high = torch.zeros_like(radius[rows]), radius[rows]
                        for _ in range(self.halvings):
                            middle = (low + high) / 2
                            inside = wrong(rows, trial, middle)
                            low, high = torch.where(inside, low, middle), torch.where(inside, middle, high)
                        used += self.halvings
                        sign[rows], radius[rows] = trial, high
                blocks = min(2 * blocks, flat.shape[1])
        return self._at(x, flat, sign, radius)

    def _at(self, x: Tensor, flat: Tensor, sign: Tensor, radius: Tensor) -> Tensor:
        lower, upper = ball(x.detach(), self.epsilon)
        moved = flat + radius.clamp(max=self.epsilon)[:, None] * sign
        return moved.view_as(x).clamp(lower, upper)


# ---- what an audit measures ----


def _generator(x: Tensor) -> torch.Generator:
    return torch.Generator(x.device).manual_seed(EVALUATION_SEED)


def _attacked(attack: Attacking, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    generator = _generator(x)

    def work(x: Tensor, y: Tensor) -> Results:
        return (attack(model, x, y, generator=generator),)

    return in_batches(work, (x, y), BATCH_SIZE, models=[model], generator=generator)[0]


def _survivors(model: nn.Module, x_adv: Tensor, y: Tensor) -> dict[str, Any]:
    with frozen(model), verdicts():
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
            model = still(model, data.image_shape)
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
        model, reference = (still(net, data.image_shape) for net in (model, reference))
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
        model = still(model, data.image_shape)
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
    size = 2 * epsilon / steps
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


# ---- the verdict ----

WHITE_BOX = ("pgd", "pgd_more", "pgd_long", "margin", "dlr", "targeted", "scaled")
SLACK = 2.0  # points that chance alone may make of a comparison on the same images
TELLING = 5.0  # points by which an attack must be beaten before it is called too weak


def _left(found: Found, names: Sequence[str], n: int | None = None) -> tuple[float, int] | None:
    """Per cent of the first images that survive all the attacks named, and of how many; None if none was run."""
    masks = [str(found[name]["survivors"]) for name in names if name in found]
    if not masks:
        return None
    n = min([len(mask) for mask in masks] + ([n] if n else []))
    return 100 * sum(all(mask[i] == "1" for mask in masks) for i in range(n)) / n, n


def _beaten(found: Found, weaker: Sequence[str], stronger: Sequence[str], by: float) -> tuple[float, float, int] | None:
    """(accuracy under ``weaker``, under ``stronger`` as well, n) if the latter lowers it by more than ``by`` points."""
    after = _left(found, stronger)
    before = _left(found, weaker, after[1] if after else None)
    if before is None or after is None:
        return None
    together = _left(found, [*weaker, *stronger], before[1])
    assert together is not None
    return (before[0], together[0], together[1]) if before[0] - together[0] > by else None


def zero_gradients(found: Found) -> str | None:
    """Saturation: the loss is flat to the last bit, and a gradient attack on it stands still."""
    share = found["gradients"]["zero"] if "gradients" in found else 0.0
    return f"{share:.1f} % of the input gradients are exactly zero" if share > 1 else None


def saturated_loss(found: Found) -> str | None:
    """A margin or a smaller scale of the logits succeeds where the cross-entropy fails."""
    if beaten := _beaten(found, ["pgd"], ["margin", "dlr", "scaled"], TELLING):
        return f"margin, DLR and scaled logits lower {beaten[0]:.1f} % to {beaten[1]:.1f} % on the same images"
    return None


def uninformative_gradient(found: Found) -> str | None:
    """Shattered gradients: their sign raises the loss hardly more than random noise does."""
    if "gradients" not in found:
        return None
    loss, noise = found["gradients"]["loss"], found["gradients"]["noise_loss"]
    rise, by_chance = max(loss) - loss[0], noise - loss[0]
    if rise < 2 * max(by_chance, 0):
        return f"PGD raises the loss by {rise:.2g} nats, the best of ten random draws by {by_chance:.2g}"
    return None


def black_box_wins(found: Found) -> str | None:
    """Square or a hard-label attack finds what the white-box attacks missed."""
    for name, words in {"square": "Square", "hard_label": "RayS, which sees labels alone,"}.items():
        if beaten := _beaten(found, WHITE_BOX, [name], SLACK):
            return f"{words} lowers the white-box {beaten[0]:.1f} % to {beaten[1]:.1f} % on the same {beaten[2]} images"
    return None


def transfer_wins(found: Found) -> str | None:
    """Images made on another net fool this one where its own gradients did not."""
    names = [name for name in found if name.startswith("transfer")]
    for name in names:
        if beaten := _beaten(found, WHITE_BOX, [name], SLACK):
            return f"{name.replace('_', ' ')}: images made on another net lower {beaten[0]:.1f} % to {beaten[1]:.1f} %"
    return None


def never_to_chance(found: Found) -> str | None:
    """In a ball wide enough to hold any image, every net must fall to the level of guessing."""
    wide = _sweep(found, "pgd@")
    if not wide or wide[-1][0] < 5:
        return None
    factor, percent = wide[-1]
    return f"at {factor:g} ε, {percent:.1f} % are still classified correctly" if percent > 20 else None


def rises_with_radius(found: Found) -> str | None:
    """Accuracy under attack that rises with ε shows an attack that fails."""
    wide = _sweep(found, "pgd@") + ([(1.0, float(found["pgd"]["percent"]))] if "pgd" in found else [])
    for (small, before), (large, after) in zip(sorted(wide), sorted(wide)[1:], strict=False):
        if after > before + SLACK:
            return f"accuracy rises from {before:.1f} % at {small:g} ε to {after:.1f} % at {large:g} ε"
    return None


def random_output(found: Found) -> str | None:
    """A random net must be attacked in expectation; no figure here was."""
    return found["preconditions"]["faults"].get("random_output") if "preconditions" in found else None


def unconverged(found: Found) -> str | None:
    """More steps and restarts of the same attack, or one wrong class after the other as its target, find more."""
    for names, words in ((["pgd_more", "pgd_long"], "more steps and restarts"), (["targeted"], "targets")):
        if beaten := _beaten(found, ["pgd"], names, TELLING):
            return f"{words} lower {beaten[0]:.1f} % to {beaten[1]:.1f} % on the same {beaten[2]} images"
    return None


def wrong_step_size(found: Found) -> str | None:
    """Another step size of the same attack finds clearly more."""
    for name in found:
        if name.startswith("step@") and (beaten := _beaten(found, ["pgd"], [name], TELLING)):
            return f"a step of {name.removeprefix('step@')} ε lowers {beaten[0]:.1f} % to {beaten[1]:.1f} %"
    return None


def autoattack_flags(found: Found) -> str | None:
    """AutoAttack's own warnings."""
    flags = found["autoattack"].get("flags", []) if "autoattack" in found else []
    return "; ".join(flags) or None


def overstated(found: Found) -> str | None:
    """AutoAttack leaves clearly less than the plain PGD figure."""
    if "autoattack" not in found or "pgd" not in found:
        return None
    n = int(found["autoattack"]["n"])
    plain = _left(found, ["pgd"], n)
    if plain is None or plain[1] != n or plain[0] - found["autoattack"]["percent"] <= TELLING:
        return None
    return f"AutoAttack leaves {found['autoattack']['percent']:.1f} % of the {plain[0]:.1f} % that plain PGD reports"


Rule = Callable[[Found], str | None]
# Rules that say: the net hides its gradients, so that no attack by gradients is evidence.
MASKING: tuple[Rule, ...] = (
    zero_gradients,
    saturated_loss,
    uninformative_gradient,
    black_box_wins,
    transfer_wins,
    never_to_chance,
    rises_with_radius,
    random_output,
    autoattack_flags,
)
# Rules that say: the net may be as it seems, but the plain attack is too weak to tell.
WEAKNESS: tuple[Rule, ...] = (unconverged, wrong_step_size, overstated)


@dataclass(frozen=True)
class Verdict:
    """What the rules say of one net.

    Attributes:
        faults: preconditions that do not hold, by name.
        masking, weakness: the rules that rang, by name, each with its sentence.
        clean, plain: accuracy and accuracy under the plain PGD, in per cent.
        worst: per cent that survives every attack that ran on all the audit's images together.
        n: how many images these are.
    """

    faults: dict[str, str]
    masking: dict[str, str]
    weakness: dict[str, str]
    clean: float
    plain: float
    worst: float
    n: int

    @property
    def word(self) -> str:
        """``invalid``, ``masked``, ``overstated`` or ``sound``."""
        if self.faults.keys() - {"random_output"}:
            return "invalid"
        return "masked" if self.masking else "overstated" if self.weakness else "sound"

    @property
    def sentence(self) -> str:
        """The verdict in one line: what may be believed."""
        says = {
            "invalid": "no figure is evidence until this is mended",
            "masked": "the net hides its gradients; no figure from gradient attacks is evidence",
            "overstated": "the plain PGD figure is too high; believe the lowest",
            "sound": "no rule rings; the attacks agree",
        }
        if math.isnan(self.plain):
            return f"{self.word}: {says[self.word]}"
        return (
            f"{self.word}: {says[self.word]}. Clean {self.clean:.1f} %, plain PGD {self.plain:.1f} %, all attacks "
            f"together {self.worst:.1f} % of {self.n} images"
        )


def verdict(found: Found) -> Verdict:
    """The rules applied to the results of an audit, by the names of ``plan`` (and ``autoattack``, if it was run).

    Rules whose measures are missing stay silent.
    """

    def ringing(rules: Sequence[Rule]) -> dict[str, str]:
        answers = {rule.__name__: rule(found) for rule in rules}
        return {name: answer for name, answer in answers.items() if answer}

    n = len(found["pgd"]["survivors"]) if "pgd" in found else 0
    full = [name for name, one in found.items() if len(str(one.get("survivors", ""))) == n and "pgd@" not in name]
    worst = _left(found, full) if n else None
    return Verdict(
        faults=dict(found["preconditions"]["faults"]) if "preconditions" in found else {},
        masking=ringing(MASKING),
        weakness=ringing(WEAKNESS),
        clean=float(found["clean"]["percent"]) if "clean" in found else math.nan,
        plain=float(found["pgd"]["percent"]) if "pgd" in found else math.nan,
        worst=worst[0] if worst else math.nan,
        n=n,
    )


def _sweep(found: Found, prefix: str) -> list[tuple[float, float]]:
    """(factor, per cent) of the measures ``prefix``FACTOR, by rising factor."""
    chosen = [name for name in found if name.startswith(prefix)]
    return sorted((float(name.removeprefix(prefix)), float(found[name]["percent"])) for name in chosen)
