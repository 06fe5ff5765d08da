"""Measurements as values: a frozen dataclass that is called with a net and data and returns plain numbers."""

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdiga_nb.attacks.autoattack import AutoAttack
from kdiga_nb.data import Data, Split
from kdiga_nb.losses import input_gradient
from kdiga_nb.metrics import Attacking, BoundTerms, classified_correctly, gap_and_bound, local_linearity, proportion
from kdiga_nb.numerics.folding import folded_copy
from kdiga_nb.numerics.scopes import frozen


class Measure:
    """One measurement of a trained net. Subclasses are frozen dataclasses; their fields name the stored result."""

    def __call__(
        self, model: nn.Module, data: Data, *, reference: nn.Module | None = None, state: Path | None = None
    ) -> dict[str, Any]:
        """Plain numbers, fit for JSON.

        Args:
            reference: the teacher that the net is compared to, for the measures that compare.
            state: a file where an evaluation in several parts keeps the finished parts and resumes from.
        """
        raise TypeError(f"{type(self).__name__} measures nothing")

    def accepts(self, result: dict[str, Any]) -> bool:
        """Whether a stored result has everything that this measurement is taken for."""
        return True


@dataclass(frozen=True)
class TestAccuracy(Measure):
    """Accuracy on the first ``images`` test images (all of them by default), under ``attack`` if there is one.

    ``survivors`` is the mask of the images that are still classified correctly, one character ("1" or "0") per image,
    so that attacks can be compared image by image. Stores of version 0.1.0 hold results without the mask; with
    ``needs_mask`` such a result does not count as measured.
    """

    __test__ = False  # no pytest class

    attack: Attacking | None = None
    images: int | None = None
    needs_mask: bool = field(default=False, metadata={"unnamed": True})

    def accepts(self, result: dict[str, Any]) -> bool:
        return not self.needs_mask or "survivors" in result

    def __call__(
        self, model: nn.Module, data: Data, *, reference: nn.Module | None = None, state: Path | None = None
    ) -> dict[str, Any]:
        x, y = first_images(data, model, self.images)
        if self.attack is not None:
            model = folded_copy(model, data.image_shape)
        if isinstance(self.attack, AutoAttack):
            report = self.attack.evaluate(model, x, y, state=state)
            members = {name: 100 * mask.double().mean().item() for name, mask in report.survivors.items()}
            return with_mask(report.robust) | {"members": members, "flags": report.flags}
        return with_mask(classified_correctly(model, x, y, attack=self.attack))


@dataclass(frozen=True)
class ValidationAccuracy(Measure):
    """Accuracy on the held-out training images, under ``attack`` if there is one: what settings are chosen by."""

    attack: Attacking | None = None

    def __call__(
        self, model: nn.Module, data: Data, *, reference: nn.Module | None = None, state: Path | None = None
    ) -> dict[str, Any]:
        device = next(iter(model.parameters()), torch.empty(0)).device
        x, y = (part.to(device) for part in data.validation)
        return with_mask(classified_correctly(folded_copy(model, data.image_shape), x, y, attack=self.attack))


def with_mask(correct: Tensor) -> dict[str, Any]:
    """The accuracy that a mask (n,) of correct decisions stands for, and the mask as text under ``survivors``."""
    mask = "".join("1" if one else "0" for one in correct.tolist())
    return vars(proportion(int(correct.sum()), len(correct))) | {"survivors": mask}


@dataclass(frozen=True)
class Bounds(Measure):
    """Table 3: means over the first ``images`` test images of the terms of Proposition 2 against a reference teacher.

    ``gradient_distance`` is the mean of ‖g_s − g_t‖₂, ``gradient_distance_l1`` of the dual norm that the proposition
    needs, ``gradient_distance_batch`` what the authors' code prints: the Frobenius norm of batch-MEAN gradients at
    B = 100, that is the root mean square of ‖g_s − g_t‖₂ divided by 10. ``violations`` counts images whose measured
    gap exceeds the bound in the dual norm.
    """

    epsilon: float
    images: int | None = None
    steps: int = 50

    def __call__(
        self, model: nn.Module, data: Data, *, reference: nn.Module | None = None, state: Path | None = None
    ) -> dict[str, Any]:
        gap, terms, l2 = _proposition_2(model, reference, data, self)
        x, y = first_images(data, model, self.images)
        half = local_linearity(folded_copy(model, data.image_shape), x, y, self.epsilon / 2, steps=self.steps)
        means = {
            "llm_eps": terms.llm_student,
            "llm_half_eps": half,
            "llm_eps_teacher": terms.llm_teacher,
            "cross_entropy": terms.ce_student,
            "cross_entropy_teacher": terms.ce_teacher,
            "gradient_distance": l2,
            "gradient_distance_l1": terms.distance,
            "bound": terms.bound,
            "gap": gap,
        }
        result: dict[str, Any] = {name: value.mean().item() for name, value in means.items()}
        result["gradient_distance_batch"] = l2.square().mean().sqrt().item() / 10
        result["violations"] = int((gap > terms.bound).sum())
        return result | {"n": len(gap)}


@dataclass(frozen=True)
class Linearity(Measure):
    """Mean of ``local_linearity`` over the first ``images`` test images, in nats, and its standard error."""

    epsilon: float
    images: int | None = None
    steps: int = 50

    def __call__(
        self, model: nn.Module, data: Data, *, reference: nn.Module | None = None, state: Path | None = None
    ) -> dict[str, Any]:
        x, y = first_images(data, model, self.images)
        values = local_linearity(folded_copy(model, data.image_shape), x, y, self.epsilon, steps=self.steps)
        error = values.std().item() / len(values) ** 0.5 if len(values) > 1 else float("nan")
        return {"llm": values.mean().item(), "standard_error": error, "n": len(values)}


@dataclass(frozen=True)
class ImageBounds(Measure):
    """Proposition 2 for each of the first ``images`` test images against a reference teacher.

    ``images`` holds one list per term: ``gap`` (measured), ``bound`` (dual norm), ``bound_tight`` (|CE_s − CE_t|, dual
    norm), ``bound_l2`` (the norm that Table 3 prints), ``llm_student``, ``llm_teacher``, ``ce_sum``, ``ce_difference``,
    ``distance_l1``, ``distance_l2``. The same keys of the result hold their means. ``violations``,
    ``violations_tight`` and ``violations_l2`` count the images whose gap exceeds the bound; ``tightness`` and
    ``tightness_tight`` are mean quotients of gap and bound. γ comes from a search, so the true bounds are at least as
    large as these.
    """

    epsilon: float
    images: int
    steps: int = 50

    def __call__(
        self, model: nn.Module, data: Data, *, reference: nn.Module | None = None, state: Path | None = None
    ) -> dict[str, Any]:
        gap, terms, l2 = _proposition_2(model, reference, data, self)
        columns = {
            "gap": gap,
            "bound": terms.bound,
            "bound_tight": terms.tight,
            "bound_l2": terms.bound + self.epsilon * (l2 - terms.distance),
            "llm_student": terms.llm_student,
            "llm_teacher": terms.llm_teacher,
            "ce_sum": terms.ce_student + terms.ce_teacher,
            "ce_difference": (terms.ce_student - terms.ce_teacher).abs(),
            "distance_l1": terms.distance,
            "distance_l2": l2,
        }
        result: dict[str, Any] = {name: column.mean().item() for name, column in columns.items()}
        for suffix in ("", "_tight", "_l2"):
            result[f"violations{suffix}"] = int((gap > columns[f"bound{suffix}"]).sum())
        result["tightness"] = (gap / terms.bound).mean().item()
        result["tightness_tight"] = (gap / terms.tight).mean().item()
        result["images"] = {
            name: [float(f"{value:.6g}") for value in column.tolist()] for name, column in columns.items()
        }
        return result | {"n": len(gap)}


def _proposition_2(
    model: nn.Module, reference: nn.Module | None, data: Data, measure: Bounds | ImageBounds
) -> tuple[Tensor, BoundTerms, Tensor]:
    """Both sides of Proposition 2 on the measure's images, and ‖g_s − g_t‖₂, one value per image."""
    if reference is None:
        raise ValueError("the terms of Proposition 2 need a reference teacher")
    x, y = first_images(data, model, measure.images)
    model, reference = folded_copy(model, data.image_shape), folded_copy(reference, data.image_shape)
    gap, terms = gap_and_bound(model, reference, x, y, measure.epsilon, steps=measure.steps)
    with frozen(model), frozen(reference):
        difference = input_gradient(model, x, y)[0] - input_gradient(reference, x, y)[0]
    return gap, terms, torch.linalg.vector_norm(difference.flatten(1), dim=1)


def first_images(data: Data, model: nn.Module, images: int | None) -> Split:
    """The first ``images`` test images (None: all) and their labels, on the model's device."""
    return _moved(data.test, images, next(iter(model.parameters()), torch.empty(0)).device)


@lru_cache(maxsize=1)
def _moved(test: Split, images: int | None, device: torch.device) -> Split:
    """Cached: consecutive measurements share the images, which photographs take long to read."""
    return Split(test.images[:images].to(device), test.labels[:images].to(device))
