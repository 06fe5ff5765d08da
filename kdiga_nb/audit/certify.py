"""Certified radii of small ReLU nets: Definition 1 measured, not assumed.

An attack bounds the robust radius from above; here it is bounded from below, so that the truth lies between the two.
A net that is a sequence of affine layers and ReLUs is rewritten as z_1 = W_1 x + b_1, z_k = W_k relu(z_{k-1}) + b_k.
Two bounds of the margins over a box of images:

* ``interval``: each layer's bounds from those of the layer before (interval bound propagation, Gowal et al. 2018);
* ``crown``: a linear bound of the output carried back to the pixels, each unstable ReLU between two lines (CROWN, Zhang
  et al. 2018, with its adaptive lower slope), never looser than ``interval``.

Both are sound for the net in exact arithmetic. They are computed in double precision, while the nets run in single
precision, so the last digits are no proof. The weight matrices limit the method to nets of some hundred units.
"""

import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdiga_nb.attacks.checks import check_inputs
from kdiga_nb.data import Data
from kdiga_nb.losses import input_gradient, logit_gradients
from kdiga_nb.measures import Measure
from kdiga_nb.numerics.folding import affine_matrix
from kdiga_nb.numerics.scopes import frozen

Layers = list[tuple[Tensor, Tensor]]
LayerBounds = list[tuple[Tensor, Tensor]]
BOUND_METHODS = ("interval", "crown")
MOST_VALUES = 1024  # the first matrix has one column per pixel and channel


def affine_layers(model: nn.Module, image_shape: tuple[int, int, int]) -> Layers:
    """The affine maps (M, K), (M,) between the ReLUs of a net in eval mode, in double precision.

    Convolutions, average pooling, batch normalisation and the like become matrices, built from the images of the basis
    vectors.

    Raises:
        ValueError: the net is not a sequence of affine layers and ReLUs, in the order its modules were registered, or
            its images have more than ``MOST_VALUES`` values.
    """
    values = math.prod(image_shape)
    if values > MOST_VALUES:
        raise ValueError(
            f"{type(model).__name__} cannot be certified: images of {values} values, {MOST_VALUES} at the most"
        )
    twin = deepcopy(model).cpu().double().eval()
    layers: Layers = []
    shape: tuple[int, ...] = image_shape
    refused = f"{type(model).__name__} cannot be certified: it is not a sequence of affine layers and ReLUs"
    with torch.no_grad():
        probe = torch.rand(4, *image_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        try:
            for group in _between_relus(twin):
                matrix, constant = affine_matrix(group, shape)
                shape = tuple(constant.shape)
                layers.append((matrix, constant.flatten()))
            agree = torch.allclose(forward(layers, probe.flatten(1)), twin(probe), rtol=1e-6, atol=1e-8)
        except (RuntimeError, TypeError, IndexError) as error:
            raise ValueError(f"{refused} ({str(error).splitlines()[0]})") from None
    if not agree:
        raise ValueError(refused)
    return layers


def _between_relus(model: nn.Module) -> Iterator[nn.Sequential]:
    group: list[nn.Module] = []
    for leaf in (module for module in model.modules() if not list(module.children())):
        if isinstance(leaf, nn.ReLU):
            yield nn.Sequential(*group)
            group = []
        else:
            # Many nets flatten without a module; on flat input the extra Flatten changes nothing.
            group += [nn.Flatten(), leaf] if isinstance(leaf, nn.Linear) else [leaf]
    yield nn.Sequential(*group)


def forward(layers: Layers, x: Tensor) -> Tensor:
    """The net that the layers stand for: flat images (B, D) -> logits (B, N)."""
    for index, (weight, bias) in enumerate(layers):
        x = (x.relu() if index else x) @ weight.T + bias
    return x


def _interval(weight: Tensor, bias: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Lower and upper bound of W x + b over a box; W is (M, K), or (B, M, K) with one matrix per image."""
    centre, radius = ((upper + lower) / 2).unsqueeze(2), ((upper - lower) / 2).unsqueeze(2)
    middle, reach = (weight @ centre).squeeze(2) + bias, (weight.abs() @ radius).squeeze(2)
    return middle - reach, middle + reach


def _linear_lower_bound(
    layers: Layers, bounds: LayerBounds, weight: Tensor, bias: Tensor, lower: Tensor, upper: Tensor
) -> Tensor:
    """Lower bound (B, M) of weight·relu(z) + bias, z the output of ``layers`` whose ``bounds`` are known."""
    for (inner, shift), (low, high) in zip(reversed(layers), reversed(bounds), strict=True):
        above = torch.where(
            low >= 0, torch.ones_like(low), high.clamp(min=0) / (high.clamp(min=0) - low).clamp(min=1e-12)
        )
        offset = torch.where((low < 0) & (high > 0), -above * low, torch.zeros_like(low))
        # The lower line of an unstable ReLU may have any slope in [0, 1]; take 0 or 1, whichever has less area.
        below = torch.where(low >= 0, torch.ones_like(low), (high > -low).to(low))
        positive, negative = weight.clamp(min=0), weight.clamp(max=0)
        bias = bias + (negative * offset.unsqueeze(1)).sum(2)
        weight = positive * below.unsqueeze(1) + negative * above.unsqueeze(1)
        bias = bias + (weight * shift).sum(2)
        weight = weight @ inner
    return _interval(weight, bias, lower, upper)[0]


def preactivation_bounds(layers: Layers, lower: Tensor, upper: Tensor, method: str = "crown") -> LayerBounds:
    """Bounds (B, M) of every layer's output before its ReLU, over the boxes [lower, upper], each (B, D).

    Raises:
        ValueError: an unknown method.
    """
    if method not in BOUND_METHODS:
        raise ValueError(f"method must be one of {', '.join(BOUND_METHODS)}, got {method!r}")
    bounds: LayerBounds = []
    for index, (weight, bias) in enumerate(layers):
        below, above = (part.relu() for part in bounds[-1]) if bounds else (lower, upper)
        low, high = _interval(weight, bias, below, above)
        if method == "crown" and index:
            rows, shift = weight.expand(len(lower), -1, -1), bias.expand(len(lower), -1)
            low = torch.maximum(low, _linear_lower_bound(layers[:index], bounds, rows, shift, lower, upper))
            high = torch.minimum(high, -_linear_lower_bound(layers[:index], bounds, -rows, -shift, lower, upper))
        bounds.append((low, high))
    return bounds


def certified_margins(layers: Layers, lower: Tensor, upper: Tensor, labels: Tensor, method: str = "crown") -> Tensor:
    """Lower bound (B,) of min over other classes of z_label − z_other, over the boxes [lower, upper], each (B, D)."""
    hidden = preactivation_bounds(layers[:-1], lower, upper, method)
    weight, bias = layers[-1]
    classes = len(bias)
    others = torch.tensor([[k for k in range(classes) if k != label] for label in labels.tolist()])
    rows, shift = weight[labels].unsqueeze(1) - weight[others], bias[labels].unsqueeze(1) - bias[others]
    below, above = (part.relu() for part in hidden[-1]) if hidden else (lower, upper)
    margins, _ = _interval(rows, shift, below, above)
    if method == "crown":
        margins = torch.maximum(margins, _linear_lower_bound(layers[:-1], hidden, rows, shift, lower, upper))
    return margins.amin(1)


def certified_radius(
    layers: Layers,
    x: Tensor,
    *,
    method: str = "crown",
    largest: float = 0.5,
    halvings: int = 12,
    one_sided: bool = False,
) -> Tensor:
    """The radius (B,), in pixel units, up to which the decision provably stays, by bisection.

    Args:
        x: flat images (B, D) in [0, 1]; the decision is the net's own at x, as in Definition 1.
        largest: where the search begins; ``largest``·2^-halvings is its resolution.
        one_sided: the domain δ ∈ [0, ε]^D that Definition 1 prints, not the ball [−ε, ε]^D. Either way x + δ stays in
            [0, 1].
    """
    x = x.double()
    labels = forward(layers, x).argmax(1)
    low, high = torch.zeros(len(x)).double(), torch.full((len(x),), largest).double()
    for _ in range(halvings):
        middle = (low + high) / 2
        reach = middle.unsqueeze(1)
        below = x if one_sided else (x - reach).clamp(min=0)
        holds = certified_margins(layers, below, (x + reach).clamp(max=1), labels, method) > 0
        low, high = torch.where(holds, middle, low), torch.where(holds, high, middle)
    return low


def attacked_radius(model: nn.Module, x: Tensor, *, largest: float = 0.5, halvings: int = 8, steps: int = 20) -> Tensor:
    """An upper bound (B,) of the robust radius: the smallest of the bisected radii where PGD moves the decision.

    ``largest`` where no radius does.
    """
    with frozen(model), torch.no_grad():
        labels = model(x).argmax(1)
    low, high = torch.zeros(len(x)), torch.full((len(x),), largest)
    generator = torch.Generator().manual_seed(0)
    for _ in range(halvings):
        middle = (low + high) / 2
        moved = torch.zeros(len(x), dtype=torch.bool)
        with frozen(model):
            # Each image has its own radius, so a step is a fraction of that radius.
            scale = middle.view(-1, 1, 1, 1)
            delta = (torch.rand(x.shape, generator=generator) * 2 - 1) * scale
            for _ in range(steps):
                gradient, _ = input_gradient(model, (x + delta).clamp(0, 1), labels)
                delta = (delta + gradient.sign() * scale / 4).clamp(-scale, scale)
                with torch.no_grad():
                    moved |= model((x + delta).clamp(0, 1)).argmax(1) != labels
        low, high = torch.where(moved, low, middle), torch.where(moved, middle, high)
    return high


@dataclass(frozen=True)
class CertifiedRadius(Measure):
    """Robust radii of the first ``images`` test images, of the net and of its reference teacher.

    Keys: ``radius_interval`` and ``radius_crown`` (means of lower bounds), ``radius_one_sided`` (crown, Definition 1 as
    printed), ``radius_attack`` (mean of the upper bound), ``certified`` (per cent of images certified at ``epsilon``
    and classified as labelled), ``kept`` (per cent of images whose crown radius is at least the teacher's),
    ``kept_proven`` and ``lost_proven`` (per cent of images where the true radius is certainly at least the teacher's:
    crown ≥ the teacher's upper bound; and certainly smaller: upper bound < the teacher's crown, and both nets classify
    the image as labelled, as Equation 7 assumes), ``both_right`` (per cent of images where they do), ``distance_loss``
    and ``distance_logits`` (mean ‖·‖₂ between the two nets' input gradients of the loss, and of all logits, at the
    images), ``radii`` and ``teacher_radii``.
    """

    epsilon: float
    images: int = 200

    def accepts(self, result: dict[str, Any]) -> bool:
        return "both_right" in result  # older results also count images that a net classifies wrongly

    def __call__(
        self, model: nn.Module, data: Data, *, reference: nn.Module | None = None, state: Path | None = None
    ) -> dict[str, Any]:
        if reference is None:
            raise ValueError("the certified radius is compared to a reference teacher's, and there is none")
        x, y = data.test.images[: self.images], data.test.labels[: self.images]
        check_inputs(model, x, y)
        layers = affine_layers(model, data.image_shape)
        crown = certified_radius(layers, x.flatten(1))
        teachers_layers = affine_layers(reference, data.image_shape)
        teachers = certified_radius(teachers_layers, x.flatten(1))
        upper, teachers_upper = attacked_radius(model, x), attacked_radius(reference, x)
        right = forward(layers, x.flatten(1).double()).argmax(1) == y
        both = right & (forward(teachers_layers, x.flatten(1).double()).argmax(1) == y)
        with frozen(model), frozen(reference):
            loss = input_gradient(model, x, y)[0] - input_gradient(reference, x, y)[0]
            logits = logit_gradients(model, x)[0] - logit_gradients(reference, x)[0]
        return {
            "radius_interval": certified_radius(layers, x.flatten(1), method="interval").mean().item(),
            "radius_crown": crown.mean().item(),
            "radius_one_sided": certified_radius(layers, x.flatten(1), one_sided=True).mean().item(),
            "radius_attack": upper.double().mean().item(),
            "certified": 100 * (right & (crown >= self.epsilon)).double().mean().item(),
            "kept": 100 * (crown >= teachers).double().mean().item(),
            "kept_proven": 100 * (crown >= teachers_upper).double().mean().item(),
            "lost_proven": 100 * (both & (upper < teachers)).double().mean().item(),
            "both_right": 100 * both.double().mean().item(),
            "distance_loss": loss.flatten(1).norm(dim=1).mean().item(),
            "distance_logits": logits.flatten(1).norm(dim=1).mean().item(),
            "radii": crown.tolist(),
            "teacher_radii": teachers.tolist(),
            "n": len(y),
        }


class LinearPair:
    """Two linear nets on two pixels that show why Proposition 1 fails for three classes.

    At ``x`` both give the same logits, so the distillation term is 0, and the same input gradient of the cross-entropy,
    so the alignment term is 0; the cross-entropy is as small as ``margin`` is large. The gradients of the single logits
    differ by what the softmax weights cancel: p_1·u on one wrong class, −p_2·… on the other. So the student's decision
    changes far closer to x than the teacher's.

    Args:
        margin: by how much the true logit leads at ``x``, in nats.
        tilt: size of the hidden difference; 0 gives the teacher twice.
    """

    def __init__(self, margin: float = 2.0, tilt: float = 6.0):
        self.x, self.y = torch.full((1, 1, 1, 2), 0.5, dtype=torch.float64), torch.zeros(1, dtype=torch.long)
        weight = torch.tensor([[2.0, 2.0], [-1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        # The two wrong classes have equal probability at x, so opposite differences cancel in the loss's gradient.
        hidden = tilt * torch.tensor([[0.0, 0.0], [1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
        logits = torch.tensor([margin, 0.0, 0.0], dtype=torch.float64)
        self.teacher, self.student = (self._net(rows, logits) for rows in (weight, weight + hidden))

    def _net(self, weight: Tensor, logits: Tensor) -> nn.Module:
        linear = nn.Linear(2, 3).double()
        with torch.no_grad():
            linear.weight.copy_(weight)
            linear.bias.copy_(logits - weight @ self.x.flatten())
        return nn.Sequential(nn.Flatten(), linear).eval()

    def exact_radius(self, net: nn.Module) -> float:
        """The exact ℓ∞ radius of a linear net at ``x`` (without the box [0, 1]): the margin over the dual norm."""
        ((weight, bias),) = affine_layers(net, (1, 1, 2))
        logits = forward([(weight, bias)], self.x.flatten(1))[0]
        return min(((logits[0] - logits[k]) / (weight[0] - weight[k]).abs().sum()).item() for k in (1, 2))
