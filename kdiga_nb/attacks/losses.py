"""PGD on other losses than the cross-entropy: margin, DLR, targeted, scaled logits."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdiga_nb.attacks.checks import check_inputs
from kdiga_nb.attacks.gradient import PGD
from kdiga_nb.losses import cross_entropy
from kdiga_nb.numerics.scopes import frozen, full_precision_inference

LOSSES = ("cross_entropy", "margin", "dlr", "targeted")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Largest other logit minus the true one, (B, N), (B,) -> (B,): positive where the model is wrong."""
    true = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], -math.inf)
    return others.amax(1) - true


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio, (B, N), (B,) -> (B,): the margin divided by the first minus the third logit.

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
    """PGD on a chosen loss, with all restarts in one batch; an image is done as soon as one restart fools the net.

    Attributes:
        loss: ``cross_entropy``, ``margin``, ``dlr``, or ``targeted``: the lead of one wrong class over the true
            one, the likeliest at x in the first restart, the next in the second, and so on.
        logit_scale: factor on the logits. Very large logits saturate the cross-entropy; at a small scale the loss has
            gradients again.
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
        """Adversarial images (B, C, H, W): the image of a restart that fools the net, else that of any restart."""
        check_inputs(model, x, y)
        x = x.detach()
        found = x.clone()
        with frozen(model):
            left = torch.arange(len(x), device=x.device).repeat(self.restarts)
            aims = self._aims(model, x, y)
            x_adv = self.start(x[left], generator=generator)
            for step in range(self.steps + 1):
                if step % self.look_every == 0 or step == self.steps:
                    with full_precision_inference():
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
