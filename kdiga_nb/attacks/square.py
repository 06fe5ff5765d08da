"""Square attack (Andriushchenko et al. 2020) in l_inf, as AutoAttack runs it, with pyautoattack's draws."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

# The square's share of the image by the step: (first step, divisor of the first share).
HALVINGS = ((0, 1), (11, 2), (51, 4), (201, 8), (501, 16), (1001, 32), (2001, 64), (4001, 128), (6001, 256), (8001, 512))


class Square:
    """A random search: vertical stripes first, then squares of one colour, each kept where it lowers the margin.

    It takes the place of ``pyautoattack``'s class and finds the same images bit for bit: the same draws, on the same
    images, in the same order. It is faster because it draws all squares at once, computes the margin alone, moves
    images only after one of them is found, and asks the device once a step.
    """

    def __init__(
        self, predict: Callable[[Tensor], Tensor], epsilon: float, queries: int = 5000, area: float = 0.8
    ) -> None:
        self.predict, self.epsilon, self.queries, self.area = predict, epsilon, queries, area
        self.seed = 0

    def perturb(self, x: Tensor, y: Tensor) -> Tensor:
        """Images (B, C, H, W), unchanged where the attack fails; seeds the global generator with ``seed``."""
        torch.manual_seed(self.seed)
        adversarial = x.clone()
        with torch.no_grad():
            index = (self.predict(x).argmax(1) == y).nonzero().squeeze(1)
            if len(index):
                best = self._search(x[index], y[index])
                fooled = self.predict(best).argmax(1) != y[index]
                adversarial[index[fooled]] = best[fooled]
        return adversarial

    def _margin(self, x: Tensor, y: Tensor) -> Tensor:
        """(B,): the true class's logit less the largest other; negative where the image is misclassified."""
        logits = self.predict(x)
        true = logits.gather(1, y[:, None])
        return (true - logits.scatter(1, y[:, None], -math.inf).amax(1, keepdim=True)).squeeze(1)

    def _search(self, x: Tensor, y: Tensor) -> Tensor:
        count, channels, height, width = x.shape
        stripes = torch.sign(2 * torch.rand(count, channels, 1, width) - 1).to(x.device)
        found = (x + self.epsilon * stripes).clamp(0, 1)
        margin = self._margin(found, y)
        index = (margin > 0).nonzero().squeeze(1)
        # A row and a column for each square, then a sign for each channel.
        draws = torch.rand(self.queries, 2 + channels)
        colors = (2 * self.epsilon * torch.sign(2 * draws[:, 2:] - 1)).to(x.device)[:, :, None, None]
        rows, columns = draws[:, 0], draws[:, 1]
        sides = [_side(step, self.area, height, width) for step in range(self.queries)]
        tops = (rows * (height - torch.tensor(sides))).long().tolist()
        lefts = (columns * (width - torch.tensor(sides))).long().tolist()
        y, best, margin = y[index], found[index], margin[index]
        lower, upper = x[index] - self.epsilon, x[index] + self.epsilon
        for side, top, left, color in zip(sides, tops, lefts, colors, strict=True):
            if not len(index):
                break
            square = (..., slice(top, top + side), slice(left, left + side))
            new = best.clone()
            new[square] += color
            # The rest is inside the ball already.
            new[square] = new[square].maximum(lower[square]).minimum(upper[square]).clamp_(0, 1)
            new_margin = self._margin(new, y)
            better = new_margin < margin
            torch.where(better, new_margin, margin, out=margin)
            best = torch.where(better[:, None, None, None], new, best)
            left_over = margin > 0
            if not left_over.all():
                found[index] = best
                index, y, best, margin = index[left_over], y[left_over], best[left_over], margin[left_over]
                lower, upper = lower[left_over], upper[left_over]
        found[index] = best
        return found


def _side(step: int, area: float, height: int, width: int) -> int:
    """The side of the square at a step: its share of the image falls by halves on the authors' schedule."""
    divisor = next(divisor for first, divisor in reversed(HALVINGS) if step >= first)
    return min(max(round(math.sqrt(area / divisor * height * width)), 1), height, width)
