"""Auto-PGD (Croce & Hein 2020) in l_inf on the cross-entropy or on the targeted DLR, as AutoAttack runs it."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

ITERATIONS = 100
ROWS = 1024  # (image, target) pairs per batch
Loss = Callable[[Tensor], Tensor]


class APGD:
    """Gradient ascent with momentum, whose step halves for an image whenever its loss stops rising.

    It takes the place of ``pyautoattack``'s two classes. It is faster because several targets of an image enter one
    batch, and because an image leaves it once one target fools the net: nothing after that changes the verdict. The net
    must be deterministic.

    Args:
        predict: images (B, C, H, W) in [0, 1] -> logits (B, N).
        targets: how many wrong classes are aimed at, the likeliest first; 0: the cross-entropy, without a target.
        check: told the first gradient of the DLR, to warn of zeros.
    """

    def __init__(
        self,
        predict: Callable[[Tensor], Tensor],
        epsilon: float,
        targets: int = 0,
        check: Callable[[Tensor], None] | None = None,
    ) -> None:
        self.predict, self.epsilon, self.n_target_classes, self.check = predict, epsilon, targets, check
        self.seed = 0
        self.loss = "ce"  # the library sets it

    def perturb(self, x: Tensor, y: Tensor) -> Tensor:
        """Images (B, C, H, W), unchanged where the attack fails; seeds the global generator with ``seed``."""
        torch.manual_seed(self.seed)
        found = x.clone()
        with torch.no_grad():
            logits = self.predict(x)
            aims = logits.argsort(1, descending=True)[:, 1 : self.n_target_classes + 1]
            open_ = logits.argmax(1) == y
        per_image = max(self.n_target_classes, 1)
        step = max(ROWS // max(int(open_.sum()), 1), 1)
        for first in range(0, per_image, step):
            left = open_.nonzero().squeeze(1)
            count = min(step, per_image - first)
            if len(left):
                image = left.repeat(count)
                aim = aims[left, first : first + count].T.reshape(-1) if self.n_target_classes else y[image]
                noise = 2 * torch.rand(len(image), *x.shape[1:]).to(x.device) - 1
                self._ascend(x, y, image, aim, noise, found, open_)
        return found

    def _loss(self, y: Tensor, aim: Tensor) -> Loss:
        if not self.n_target_classes:
            return lambda logits: F.cross_entropy(logits, y, reduction="none")

        def targeted_dlr(logits: Tensor) -> Tensor:
            top = logits.topk(4, dim=1).values
            lead = logits.gather(1, aim[:, None]) - logits.gather(1, y[:, None])
            return lead.squeeze(1) / (top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + 1e-12)

        return targeted_dlr

    def _ascend(
        self, images: Tensor, labels: Tensor, image: Tensor, aim: Tensor, noise: Tensor, found: Tensor, open_: Tensor
    ) -> None:
        """Attack the rows ``image``; write what fools the net to ``found`` and take these images out of ``open_``."""
        x, y = images[image], labels[image]
        lower, upper = (x - self.epsilon).clamp_(min=0), (x + self.epsilon).clamp_(max=1)
        noise = noise / (noise.abs().flatten(1).amax(1) + 1e-12).view(-1, *[1] * (x.ndim - 1))
        current = (x + self.epsilon * noise).clamp_(0, 1)
        loss, gradient, _ = self._gradient(current, y, aim)
        if self.n_target_classes and self.check is not None:
            self.check(gradient)
        state = _State(x, y, image, aim, lower, upper, current, gradient, loss, self.epsilon)
        checkpoint, since = ITERATIONS * 22 // 100, 0
        for iteration in range(ITERATIONS):
            state.step(1.0 if iteration == 0 else 0.75)
            loss, gradient, fooled = self._gradient(state.current, state.y, state.aim)
            if fooled.any():
                rows = state.image[fooled]
                found[rows] = state.current[fooled]
                open_[rows] = False
            state.record(loss, gradient)
            since += 1
            if since == checkpoint:
                state.adapt(since)
                checkpoint, since = max(checkpoint - ITERATIONS * 3 // 100, ITERATIONS * 6 // 100), 0
            going_on = open_[state.image]
            # To drop rows costs as much as a few steps of them.
            if going_on.float().mean() < 0.9:
                state.keep(going_on)
                if not len(state.x):
                    return

    def _gradient(self, x: Tensor, y: Tensor, aim: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss (B,), its gradient (B, C, H, W), and which rows the net gets wrong (B,)."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            logits = self.predict(x)
            loss = self._loss(y, aim)(logits)
            (gradient,) = torch.autograd.grad(loss.sum(), x)
        return loss.detach(), gradient, logits.detach().argmax(1) != y


class _State:
    """The rows under attack: where each is, where its loss was highest, and how long its step is."""

    FIELDS = (
        *("x", "y", "image", "aim", "lower", "upper", "current", "before", "gradient", "best", "best_gradient"),
        *("best_loss", "last_loss", "last_best", "rises", "reduced", "length"),
    )

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        image: Tensor,
        aim: Tensor,
        lower: Tensor,
        upper: Tensor,
        current: Tensor,
        gradient: Tensor,
        loss: Tensor,
        epsilon: float,
    ) -> None:
        self.x, self.y, self.image, self.aim, self.lower, self.upper = x, y, image, aim, lower, upper
        self.current, self.before, self.gradient = current, current, gradient
        self.best, self.best_gradient, self.best_loss = current.clone(), gradient.clone(), loss.clone()
        self.last_loss, self.last_best = torch.zeros_like(loss), loss.clone()
        self.rises, self.reduced = torch.zeros_like(loss), torch.ones_like(loss, dtype=torch.bool)
        self.length = torch.full_like(loss, 2 * epsilon).view(-1, *[1] * (x.ndim - 1))

    def step(self, share: float) -> None:
        """A step along the sign of the gradient, mixed with the move before it: ``share`` and 1 - ``share``."""
        ahead = (self.current + self.length * self.gradient.sign()).clamp_(self.lower, self.upper)
        moved = self.current + (ahead - self.current) * share + (self.current - self.before) * (1 - share)
        self.before, self.current = self.current, moved.clamp_(self.lower, self.upper)

    def record(self, loss: Tensor, gradient: Tensor) -> None:
        """Take in the loss (B,) and the gradient at the current images."""
        self.gradient = gradient
        self.rises += loss > self.last_loss
        self.last_loss = loss
        higher = loss > self.best_loss
        where = higher.view_as(self.length)
        self.best = torch.where(where, self.current, self.best)
        self.best_gradient = torch.where(where, gradient, self.best_gradient)
        self.best_loss = torch.where(higher, loss, self.best_loss)

    def adapt(self, steps: int) -> None:
        """Halve the step, and go back to the best image, where the loss rose in too few of the last ``steps``."""
        stalled = (self.rises <= 0.75 * steps) | (~self.reduced & (self.last_best >= self.best_loss))
        self.reduced, self.last_best = stalled, self.best_loss
        self.rises = torch.zeros_like(self.rises)
        where = stalled.view_as(self.length)
        self.length = torch.where(where, self.length / 2, self.length)
        self.current = torch.where(where, self.best, self.current)
        self.gradient = torch.where(where, self.best_gradient, self.gradient)

    def keep(self, rows: Tensor) -> None:
        """Drop the rows outside of a mask (B,)."""
        for name in self.FIELDS:
            setattr(self, name, getattr(self, name)[rows])
