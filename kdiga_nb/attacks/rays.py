"""RayS: an attack that sees labels only."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdiga_nb.attacks.checks import check_inputs
from kdiga_nb.attacks.gradient import ball
from kdiga_nb.numerics.scopes import frozen, full_precision_inference


@dataclass(frozen=True)
class RayS:
    """RayS (Chen & Gu 2020), which uses only the decision: search for the nearest corner by flipping blocks of signs.

    A direction has one sign per pixel. The radius of a direction is the distance to the first wrong decision. The block
    size halves from the whole image to single pixels. A flip is kept if it gives a wrong decision within the current
    radius; bisection then finds the new radius.
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

        with frozen(model), full_precision_inference():
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
