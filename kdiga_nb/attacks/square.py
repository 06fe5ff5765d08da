"""Square attack (Andriushchenko et al. 2020) in l_inf, as AutoAttack runs it, with pyautoattack's draws."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

# The square's share of the image by the step: (first step, divisor of the first share).
HALVINGS = (
    *((0, 1), (11, 2), (51, 4), (201, 8), (501, 16)),
    *((1001, 32), (2001, 64), (4001, 128), (6001, 256), (8001, 512)),
)


class Square:
    """A random search: vertical stripes first, then squares of one colour, each kept where it lowers the margin.

    It takes the place of ``pyautoattack``'s class, with the same draws in the same order. It is faster because it asks
    a net no question twice: a square that an image has refused is refused again until the image moves. On small images,
    whose squares soon repeat, most questions go. The net must be deterministic.
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
        # Proposals that an image has refused since it last moved: the same answer, so they are not asked again.
        bits = (draws[:, 2:] > 0.5).long() @ 2 ** torch.arange(channels)
        keys = [
            (top * width + left) * 2**channels + bit for top, left, bit in zip(tops, lefts, bits.tolist(), strict=True)
        ]
        refused = torch.zeros(len(index), height * width * 2**channels, dtype=torch.bool, device=x.device)
        y, best, margin = y[index], found[index], margin[index]
        lower, upper = x[index] - self.epsilon, x[index] + self.epsilon
        before = sides[0]
        for side, top, left, color, key in zip(sides, tops, lefts, colors, keys, strict=True):
            if side != before:
                before = side
                refused.zero_()
            asked = (~refused[:, key]).nonzero().squeeze(1)
            if not len(asked):
                continue
            square = (..., slice(top, top + side), slice(left, left + side))
            new = best[asked]
            # The rest is inside the ball already.
            low, high = lower[square][asked], upper[square][asked]
            new[square] = (new[square] + color).maximum(low).minimum(high).clamp_(0, 1)
            new_margin = self._margin(new, y[asked])
            better = new_margin < margin[asked]
            refused[asked, key] = True
            moved = asked[better]
            if not len(moved):
                continue
            margin[moved], best[moved] = new_margin[better], new[better]
            refused[moved] = False
            remaining = margin > 0
            if not remaining.all():
                found[index] = best
                index, y, best, margin = index[remaining], y[remaining], best[remaining], margin[remaining]
                lower, upper, refused = lower[remaining], upper[remaining], refused[remaining]
                if not len(index):
                    break
        found[index] = best
        return found


def _side(step: int, area: float, height: int, width: int) -> int:
    """The side of the square at a step: its share of the image falls by halves on the authors' schedule."""
    divisor = next(divisor for first, divisor in reversed(HALVINGS) if step >= first)
    return min(max(round(math.sqrt(area / divisor * height * width)), 1), height, width)
