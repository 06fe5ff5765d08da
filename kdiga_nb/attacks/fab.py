"""FAB (Croce & Hein 2020, fast adaptive boundary) in l_inf with targets, as AutoAttack runs it."""

from collections.abc import Callable

import torch
from torch import Tensor

ITERATIONS = 100
BACKWARD, OVERSHOOT, LARGEST_BIAS = 0.9, 1.05, 0.1  # β, η and α_max of the paper
ROWS = 1024  # (image, target) pairs per batch


class FAB:
    """Project to the linearised boundary between the true class and a target, over and over, from the image itself.

    It takes the place of ``pyautoattack``'s class, which seeks the smallest perturbation: AutoAttack asks no more than
    whether it is within epsilon, so an image is done at the first such perturbation. Several targets of an image enter
    one batch, and the projection needs no sorting. Nothing is drawn. The net must be deterministic.
    """

    def __init__(self, predict: Callable[[Tensor], Tensor], epsilon: float, targets: int) -> None:
        self.predict, self.epsilon, self.n_target_classes = predict, epsilon, targets
        # The library sets these; the attack draws nothing.
        self.seed, self.targeted, self.n_restarts = 0, True, 1

    def perturb(self, x: Tensor, y: Tensor) -> Tensor:
        """Images (B, C, H, W), unchanged where the attack fails."""
        found = x.clone()
        with torch.no_grad():
            logits = self.predict(x)
            aims = logits.argsort(1, descending=True)[:, 1 : self.n_target_classes + 1]
            open_ = logits.argmax(1) == y
            step = max(ROWS // max(int(open_.sum()), 1), 1)
            for first in range(0, self.n_target_classes, step):
                left = open_.nonzero().squeeze(1)
                count = min(step, self.n_target_classes - first)
                if len(left):
                    aim = aims[left, first : first + count].T.reshape(-1)
                    self._search(x, y, left.repeat(count), aim, found, open_)
        return found

    def _search(self, images: Tensor, labels: Tensor, image: Tensor, aim: Tensor, found: Tensor, open_: Tensor) -> None:
        """Attack the rows ``image``; write what fools the net to ``found`` and take these images out of ``open_``."""
        x, y = images[image].flatten(1), labels[image]
        shape, current = images.shape[1:], x
        lead, normal, _ = self._boundary(current, y, aim, shape)
        for _ in range(ITERATIONS):
            offset = (normal * current).sum(1) - lead
            both = projection(torch.cat((current, x)), normal.repeat(2, 1), offset.repeat(2))
            near, back = both.chunk(2)
            sizes = both.abs().amax(1, keepdim=True).clamp_(min=1e-8)
            bias = (sizes[: len(x)] / (sizes[: len(x)] + sizes[len(x) :])).clamp_(0, LARGEST_BIAS)
            ahead = (current + OVERSHOOT * near) * (1 - bias) + (x + OVERSHOOT * back) * bias
            current = ahead.clamp_(0, 1)
            lead, normal, wrong = self._boundary(current, y, aim, shape)
            if not wrong.any():
                continue
            within = wrong & ((current - x).abs().amax(1) <= self.epsilon)
            if within.any():
                rows = image[within]
                found[rows] = current[within].view(-1, *shape)
                open_[rows] = False
                kept = open_[image]
                image, aim, x, y, current, wrong, lead, normal = (
                    tensor[kept] for tensor in (image, aim, x, y, current, wrong, lead, normal)
                )
                if not len(image):
                    return
            wrong = wrong.nonzero().squeeze(1)
            if len(wrong):
                start = x[wrong] + (current[wrong] - x[wrong]) * BACKWARD
                current[wrong] = start
                lead[wrong], normal[wrong], _ = self._boundary(start, y[wrong], aim[wrong], shape)

    def _boundary(self, x: Tensor, y: Tensor, aim: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
        """The aim's lead over the true class (B,), its gradient (B, D), and which rows the net gets wrong (B,)."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            logits = self.predict(x.view(-1, *shape))
            lead = (logits.gather(1, aim[:, None]) - logits.gather(1, y[:, None])).squeeze(1)
            (gradient,) = torch.autograd.grad(lead.sum(), x)
        return lead.detach(), gradient, logits.detach().argmax(1) != y


def projection(x: Tensor, normal: Tensor, offset: Tensor) -> Tensor:
    """The smallest move in l_inf, (B, D), from points (B, D) in [0, 1] to the planes normal · z = offset.

    No coordinate leaves [0, 1]; where no point of the cube lies on the plane, the move goes as far as it can. A
    coordinate moves by min(length, its room) along the plane's normal, so the way covered is concave in the length, and
    Newton's iteration rises from 0 to the solution in finitely many steps.
    """
    way = offset - (normal * x).sum(1)
    normal = normal * torch.where(way < 0, -1.0, 1.0)[:, None]
    way = way.abs()
    room = torch.where(normal > 0, 1 - x, x)
    weight = normal.abs()
    length = torch.zeros_like(way)
    for _ in range(x.shape[1]):
        covered = (weight * torch.minimum(room, length[:, None])).sum(1)
        slope = (weight * (room > length[:, None])).sum(1)
        further = length + torch.where(slope > 0, (way - covered) / slope.clamp(min=1e-30), 0.0)
        done = not (further > length * (1 + 1e-6)).any()
        length = further
        if done:
            break
    full = (weight * room).sum(1) <= way
    length = torch.where(full, 1.0, length)
    return normal.sign() * torch.minimum(room, length[:, None])
