"""One frozen dataclass per training method; ``method(student, teacher, x, y) -> Terms``.

``Terms`` are the named, weighted scalars whose sum is minimised; training logs each of them. The student is in train
mode, the teacher is frozen in eval mode. Each ``__call__`` implements the equation in the docstring of the class, with

    CE(f(x), y)      cross-entropy, mean over the batch
    KL(s, t)         T²·KL(teacher ‖ student) at temperature T
    g_s, g_t         input gradients of the summed cross-entropy
    IGA(g_s, g_t)    their distance (``losses.gradient_distance``)

The paper leaves the norm, the reductions and ARD's target open; the authors' code makes choices of its own. The choices
are fields here, and ``PRESETS`` holds both readings. To add a method, write its class and enter the class in
``METHODS``: run keys and tests then include the method.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdiga_nb.attacks.gradient import SignAscent
from kdiga_nb.losses import NORMS, cross_entropy, distillation_kl, gradient_distance, input_gradient, logit_gradients
from kdiga_nb.numerics.scopes import frozen
from kdiga_nb.teacher import CachedTeacher

Terms = dict[str, Tensor]
REDUCTIONS = ("batchmean", "mean")
TARGETS = ("clean", "adversarial")
ALIGNMENTS = ("loss", "logits")
TARGET_GRADIENTS = ("teacher", "zero", "shuffled")
ALIGNED_AT = ("start", "perturbed")
_CHOICES = {
    "norm": NORMS,
    "kl_reduction": REDUCTIONS,
    "target": TARGETS,
    "align": ALIGNMENTS,
    "target_gradient": TARGET_GRADIENTS,
    "align_at": ALIGNED_AT,
}
# The choices the paper leaves open (first) and what the authors' published code does. In a run, a preset also decides
# how the checkpoint is selected and whether the learning rate falls twice. docs/results.md says what else differs.
PRESETS: dict[str, dict[str, str]] = {
    "paper": {"norm": "per_sample", "kl_reduction": "batchmean", "target": "clean"},
    "author_code": {"norm": "batch", "kl_reduction": "mean", "target": "adversarial"},
}


class Method:
    """What every method shares: checks of its fields, and what a step needs.

    Attributes:
        needs_teacher: whether the method needs a teacher.
        passes: the cost of one step in forward passes of the student and of the teacher, without the attack's steps. A
            backward pass counts two and the gradient of the pixels alone one; differentiating an input gradient again
            counts the forward pass and the input gradient twice each.
        attacks_teacher: whether a step of the attack also runs through the teacher.
    """

    needs_teacher: ClassVar[bool] = True
    attacks_teacher: ClassVar[bool] = False
    passes: ClassVar[tuple[int, int]] = (3, 0)

    def __post_init__(self) -> None:
        for item in fields(self):  # pyright: ignore[reportArgumentType]
            name, value = item.name, getattr(self, item.name)
            if (name.startswith("lambda_") or name == "beta") and not value >= 0:
                raise ValueError(f"{name} must not be negative, got {value}")
            if name == "temperature" and not value > 0:
                raise ValueError(f"temperature must be positive, got {value}")
            allowed = _CHOICES.get(name)
            if allowed and value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")

    def bind(self, image_shape: tuple[int, int, int], device: torch.device) -> "Method | nn.Module":
        """The method, ready for one training. IGAM returns a module, because IGAM has weights to learn."""
        return self

    def __call__(self, student: nn.Module, teacher: nn.Module | None, x: Tensor, y: Tensor) -> Terms:
        """The weighted terms for images (B, C, H, W) in [0, 1] and labels (B,); scalars in nats."""
        raise TypeError(f"{type(self).__name__} is no training method")


def _teacher(teacher: nn.Module | None) -> nn.Module:
    if teacher is None:
        raise ValueError("this method needs a teacher")
    return teacher


def _logits(teacher: nn.Module | None, x: Tensor) -> Tensor:
    """f_t(x), (B, N), without a graph."""
    if isinstance(teacher, CachedTeacher) and (rows := teacher.rows(x)) is not None:
        return teacher.logits[rows]
    with torch.no_grad():
        return _teacher(teacher)(x)


def _gradient(teacher: nn.Module | None, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """g_t (B, C, H, W) and f_t(x) (B, N), without a graph."""
    if isinstance(teacher, CachedTeacher):
        rows = teacher.rows(x)
        if rows is not None and torch.equal(teacher.labels[rows], y):
            return teacher.gradients[rows], teacher.logits[rows]
    return input_gradient(_teacher(teacher), x, y)


def _distillation(method: Any, logits: Tensor, y: Tensor, student_logits: Tensor, target: Tensor) -> Terms:
    """λ_CE·CE(logits, y) and λ_KL·KL(student_logits, target).

    The KL is averaged over the batch, or over batch and classes as in the authors' code (a factor 1/N weaker).
    """
    kl = distillation_kl(student_logits, target, method.temperature)
    mean_kl = kl.mean() / (logits.shape[1] if method.kl_reduction == "mean" else 1)
    return {
        "cross_entropy": method.lambda_ce * cross_entropy(logits, y).mean(),
        "distillation": method.lambda_kl * mean_kl,
    }


def _divergent(attack: SignAscent, student: nn.Module, x: Tensor, target: Callable[[Tensor], Tensor]) -> Tensor:
    """x' of the ball around x, (B, C, H, W), that ascends KL(f_s(x'), target(x')), with the student in eval mode."""
    with frozen(student):
        return attack.perturb(lambda images: distillation_kl(student(images), target(images)), x)


def _difference(
    student: nn.Module, teacher: nn.Module | None, x: Tensor, x_adv: Tensor, logits: Tensor, target: Tensor
) -> Tensor:
    """KL(f_s(x') − f_s(x''), f_t(x') − f_t(x'')), (B,), with x'' = 2x − x'; ``logits`` and ``target`` are at x'."""
    opposite = 2 * x - x_adv
    return distillation_kl(logits - student(opposite), target - _logits(teacher, opposite))


def _alignment(method: Any, g_student: Tensor, g_teacher: Tensor) -> Terms:
    """λ_IGA·IGA(g_s, g_t)."""
    return {"alignment": method.lambda_iga * gradient_distance(g_student, g_teacher, method.norm)}


@dataclass(frozen=True)
class ST(Method):
    """Standard training: CE(f_s(x), y). Equation 1."""

    needs_teacher: ClassVar[bool] = False

    def __call__(self, student: nn.Module, teacher: nn.Module | None, x: Tensor, y: Tensor) -> Terms:
        return {"cross_entropy": cross_entropy(student(x), y).mean()}


@dataclass(frozen=True)
class KD(Method):
    """Knowledge distillation: λ_CE·CE(f_s(x), y) + λ_KL·KL(f_s(x), f_t(x)). Equation 17."""

    passes: ClassVar[tuple[int, int]] = (3, 1)
    lambda_ce: float = 0.5
    lambda_kl: float = 0.5
    temperature: float = 1.0
    kl_reduction: str = "batchmean"

    def __call__(self, student: nn.Module, teacher: nn.Module | None, x: Tensor, y: Tensor) -> Terms:
        logits = student(x)
        return _distillation(self, logits, y, logits, _logits(teacher, x))


@dataclass(frozen=True)
class KDIGA(Method):
    """KD with input gradient alignment: KD + λ_IGA·IGA(g_s, g_t). Section 2.1 and Algorithm 1.

    With a one-step ``attack`` the method is KDIGA+FGSM of Appendix H, which can be read in two ways. ``align_at`` says
    which. At the ``start``, the attack reuses the gradient of the alignment: g_s and g_t are aligned where the attack
    starts (x for FGSM, a random point of the ball for a random start), and CE and KL are taken one step along the sign
    of g_s. The extra cost is one forward pass of each net. ``perturbed``: CE, KL and alignment are all at the perturbed
    image, as the authors' code has it, which needs a second gradient of the student.

    ``align`` says what is aligned: the gradient of the ``loss`` (the paper's), or those of all ``logits``, which is
    what the proof of Proposition 1 needs with more than two classes and costs a backward pass a class.

    ``target_gradient`` says what g_s is aligned to: the ``teacher``'s gradient g_t (the paper's), or one of two
    controls that the paper lacks. ``zero`` replaces g_t by 0, which leaves KD with a penalty on ‖g_s‖₂. ``shuffled``
    gives every example the g_t of a random example of the batch: the teacher's gradients without their images.
    """

    passes: ClassVar[tuple[int, int]] = (6, 2)
    lambda_ce: float = 0.5
    lambda_kl: float = 0.5
    lambda_iga: float = 1.0
    temperature: float = 1.0
    norm: str = "per_sample"
    attack: SignAscent | None = None
    kl_reduction: str = "batchmean"
    align: str = field(default="loss", metadata={"unnamed_at_default": True})
    target_gradient: str = field(default="teacher", metadata={"unnamed_at_default": True})
    align_at: str = field(default="start", metadata={"unnamed_at_default": True})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attack is None and self.align_at == "perturbed":
            raise ValueError("without an attack there is no perturbed image, so align_at must be start")
        if self.attack is not None and self.attack.steps != 1:
            raise ValueError(f"KDIGA reuses one gradient, so its attack must have one step, got {self.attack.steps}")
        if self.attack is not None and self.align != "loss":
            raise ValueError(
                "KDIGA's attack steps along the gradient of the loss, so align must be loss with an attack"
            )

    def __call__(self, student: nn.Module, teacher: nn.Module | None, x: Tensor, y: Tensor) -> Terms:
        attack = self.attack
        if attack is not None and self.align_at == "perturbed":
            x, attack = attack.unchecked(student, x, y), None
        start = x if attack is None else attack.start(x)
        if self.align == "logits":
            g_student, student_logits = logit_gradients(student, start, create_graph=True)
            g_teacher, teacher_logits = logit_gradients(_teacher(teacher), start)
        else:
            g_student, student_logits = input_gradient(student, start, y, create_graph=True)
            g_teacher, teacher_logits = _gradient(teacher, start, y)
        if attack is not None:
            x_adv = attack.step(start, g_student.detach(), x)
            student_logits, teacher_logits = student(x_adv), _logits(teacher, x_adv)
        if self.target_gradient == "zero":
            g_teacher = torch.zeros_like(g_teacher)
        elif self.target_gradient == "shuffled":
            g_teacher = g_teacher[torch.randperm(len(g_teacher), device=g_teacher.device)]
        terms = _distillation(self, student_logits, y, student_logits, teacher_logits)
        return terms | _alignment(self, g_student, g_teacher)


@dataclass(frozen=True)
class GradientPenalty(Method):
    """A penalty on the input gradient and no teacher: CE(f_s(x), y) + λ·mean‖g_s‖₂.

    Double backpropagation (Drucker & LeCun 1992) with the norm of the alignment: what KDIGA does to the size of the
    gradient, without its direction.
    """

    passes: ClassVar[tuple[int, int]] = (6, 0)
    lambda_penalty: float = 1.0
    needs_teacher: ClassVar[bool] = False

    def __call__(self, student: nn.Module, teacher: nn.Module | None, x: Tensor, y: Tensor) -> Terms:
        gradient, logits = input_gradient(student, x, y, create_graph=True)
        penalty = gradient_distance(gradient, torch.zeros_like(gradient))
        return {"cross_entropy": cross_entropy(logits, y).mean(), "penalty": self.lambda_penalty * penalty}


@dataclass(frozen=True)
class ARD(Method):
    """Adversarially robust distillation: λ_CE·CE(f_s(x), y) + λ_KL·KL(f_s(x + δ), target).

    δ maximises the student's cross-entropy (Equation 18). The target is f_t(x) (``clean``, as Appendix I writes it) or
    f_t(x + δ) (``adversarial``, as the authors' code has it). ARD's own authors use λ_CE = 0, λ_KL = 1, T = 30.
    """

    passes: ClassVar[tuple[int, int]] = (6, 1)
    attack: SignAscent
    lambda_ce: float = 0.5
    lambda_kl: float = 0.5
    temperature: float = 1.0
    kl_reduction: str = "batchmean"
    target: str = "clean"

    def __call__(self, student: nn.Module, teacher: nn.Module | None, x: Tensor, y: Tensor) -> Terms:
        x_adv = self.attack.unchecked(student, x, y)
        logits = student(x)
        target = _logits(teacher, x if self.target == "clean" else x_adv)
        return _distillation(self, logits, y, student(x_adv), target)


@dataclass(frozen=True)
class RSLAD(Method):
    """Robust soft label distillation (Zi et al., ICCV 2021): λ_clean·KL(f_s(x), f_t(x)) + λ_adv·KL(f_s(x'), f_t(x)).

    x' maximises KL(f_s(x'), f_t(x)). No label is used. The weights 1/6 and 5/6 and T = 1 are the authors'. Their attack
    starts near x, from Gaussian noise of 0.001; here ``attack`` says where it starts, as for every other method.
    """

    passes: ClassVar[tuple[int, int]] = (6, 1)
    attack: SignAscent
    lambda_clean: float = 1 / 6
    lambda_adv: float = 5 / 6

    def __call__(self, student: nn.Module, teacher: nn.Module | None, x: Tensor, y: Tensor) -> Terms:
        target = _logits(teacher, x)
        x_adv = _divergent(self.attack, student, x, lambda _: target)
        return {
            "distillation": self.lambda_clean * distillation_kl(student(x), target).mean(),
            "adversarial": self.lambda_adv * distillation_kl(student(x_adv), target).mean(),
        }


@dataclass(frozen=True)
class IAD(Method):
    """Introspective adversarial distillation (IAD-I; Zhu et al., ICLR 2022).

    KL(f_s(x'), f_t(x)) + mean (1 − w)·KL(f_s(x'), f_s(x)) with w = p_t(y | x')^β: where the teacher is wrong at x', the
    student also learns from itself. x' maximises the student's cross-entropy. β = 0.1, T = 1 and the unweighted first
    term are those of the authors' code. Their first 60 of 200 epochs have no second term; here it is there from the
    start, because a method does not know the epoch.
    """

    passes: ClassVar[tuple[int, int]] = (6, 2)
    attack: SignAscent
    beta: float = 0.1

    def __call__(self, student: nn.Module, teacher: nn.Module | None, x: Tensor, y: Tensor) -> Terms:
        target = _logits(teacher, x)
        x_adv = self.attack.unchecked(student, x, y)
        trust = _logits(teacher, x_adv).softmax(1).gather(1, y[:, None]).squeeze(1) ** self.beta
        logits, logits_adv = student(x), student(x_adv)
        return {
            "distillation": distillation_kl(logits_adv, target).mean(),
            "introspection": ((1 - trust) * distillation_kl(logits_adv, logits)).mean(),
        }


@dataclass(frozen=True)
class AdaAD(Method):
    """Adaptive adversarial distillation (Huang et al., CVPR 2023).

    λ_clean·KL(f_s(x), f_t(x)) + λ_adv·KL(f_s(x'), f_t(x')). x' maximises KL(f_s(x'), f_t(x')), so the gradient of the
    attack runs through both nets. λ_adv = 1, λ_clean = 0 and T = 1 are the authors'; as in their code, f_s(x) is always
    computed, so batch normalisation sees x too. ``attack`` says where the attack starts (theirs: near x).
    """

    passes: ClassVar[tuple[int, int]] = (6, 2)
    attacks_teacher: ClassVar[bool] = True
    attack: SignAscent
    lambda_clean: float = 0.0
    lambda_adv: float = 1.0

    def __call__(self, student: nn.Module, teacher: nn.Module | None, x: Tensor, y: Tensor) -> Terms:
        return self._at(_divergent(self.attack, student, x, _teacher(teacher)), student, teacher, x)[0]

    def _at(
        self, x_adv: Tensor, student: nn.Module, teacher: nn.Module | None, x: Tensor
    ) -> tuple[Terms, Tensor, Tensor]:
        """The terms, and the logits (B, N) of student and teacher at x'."""
        logits, target = student(x_adv), _logits(teacher, x_adv)
        terms = {
            "distillation": self.lambda_clean * distillation_kl(student(x), _logits(teacher, x)).mean(),
            "adversarial": self.lambda_adv * distillation_kl(logits, target).mean(),
        }
        return terms, logits, target


@dataclass(frozen=True)
class IGDM(AdaAD):
    """Indirect gradient distillation (Lee et al. 2023): AdaAD + λ_IGDM·KL(f_s(x') − f_s(x''), f_t(x') − f_t(x'')).

    With δ = x' − x of AdaAD's attack and x'' = x − δ, the differences of logits are 2·J·δ up to O(‖δ‖³): the term
    matches the Jacobians J along δ without a double backward pass. The KL of the differences is that of the authors'
    code. IGDM is a module on top of a distillation; the base here is AdaAD, which needs f_t(x') anyway. Like the
    authors, x'' is not clamped to [0, 1]. Their weight grows linearly with the epoch; here it is constant, because a
    method does not know the epoch.
    """

    passes: ClassVar[tuple[int, int]] = (9, 3)
    lambda_igdm: float = 1.0

    def __call__(self, student: nn.Module, teacher: nn.Module | None, x: Tensor, y: Tensor) -> Terms:
        x_adv = _divergent(self.attack, student, x, _teacher(teacher))
        terms, logits, target = self._at(x_adv, student, teacher, x)
        difference = _difference(student, teacher, x, x_adv, logits, target)
        return terms | {"difference": self.lambda_igdm * difference.mean()}


@dataclass(frozen=True)
class SAAD(Method):
    """Sample-wise adaptive adversarial distillation (Lee and Chung 2026): IGDM's terms, weighted example by example.

    mean of w_i·(KL(f_s(x'), f_t(x')) + λ_IGDM·KL(f_s(x') − f_s(x''), f_t(x') − f_t(x''))), with x'' as in IGDM, plus
    λ_clean·mean of (1 − ŵ_i)·KL(f_s(x), f_t(x)). The weight w_i = λ_H·(H_i − min H) is the entropy H_i of f_t(x') in
    nats, above the smallest of the batch: where the teacher is sure of an image that fools the student, the attack does
    not transfer, and the image counts little. ŵ_i is w_i on the scale from 0 to 1. x' maximises KL(f_s(x'), t(x')),
    where t is f_t(x) with the label's logit followed to first order, by λ_inner·∇f_t^y(x)·(x' − x): one gradient of the
    teacher takes the place of one per step.

    Equation and weights are those of the authors' code (λ_clean is 0 on CIFAR-10); its averaging of weights over the
    last epochs is left out, and λ_IGDM is constant, as in ``IGDM``.
    """

    passes: ClassVar[tuple[int, int]] = (9, 4)
    attack: SignAscent
    lambda_clean: float = 0.0
    lambda_igdm: float = 1.0
    lambda_inner: float = 1.0
    lambda_entropy: float = 5.0

    def __call__(self, student: nn.Module, teacher: nn.Module | None, x: Tensor, y: Tensor) -> Terms:
        clean, follow = self._followed(_teacher(teacher), x, y)
        x_adv = _divergent(self.attack, student, x, follow)
        logits, target = student(x_adv), _logits(teacher, x_adv)
        difference = _difference(student, teacher, x, x_adv, logits, target)
        log_shares = F.log_softmax(target, dim=1)
        entropy = -(log_shares.exp() * log_shares).sum(1)
        weight = self.lambda_entropy * (entropy - entropy.min())
        relative = weight / weight.max().clamp_min(1e-8)
        return {
            "distillation": self.lambda_clean * ((1 - relative) * distillation_kl(student(x), clean)).mean(),
            "adversarial": (weight * distillation_kl(logits, target)).mean(),
            "difference": self.lambda_igdm * (weight * difference).mean(),
        }

    def _followed(self, teacher: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """f_t(x), (B, N), and t: images (B, C, H, W) -> f_t(x) with the label's logit to first order."""
        with torch.enable_grad():
            leaf = x.detach().clone().requires_grad_()
            logits = teacher(leaf)
            (slope,) = torch.autograd.grad(logits.gather(1, y[:, None]).sum(), leaf)
        logits = logits.detach()
        label = torch.zeros_like(logits).scatter(1, y[:, None], 1.0)

        def follow(images: Tensor) -> Tensor:
            rise = (slope * (images - x)).flatten(1).sum(1)
            return logits + self.lambda_inner * label * rise[:, None]

        return logits, follow


@dataclass(frozen=True)
class KDIGA_ARD_C(Method):
    """KDIGA on clean images and ARD: CE(f_s(x)), KL(f_s(x + δ), f_t(x)), IGA at x. Equation 20."""

    passes: ClassVar[tuple[int, int]] = (9, 2)
    attack: SignAscent
    lambda_ce: float = 0.5
    lambda_kl: float = 0.5
    lambda_iga: float = 1.0
    temperature: float = 1.0
    norm: str = "per_sample"
    kl_reduction: str = "batchmean"

    def __call__(self, student: nn.Module, teacher: nn.Module | None, x: Tensor, y: Tensor) -> Terms:
        x_adv = self.attack.unchecked(student, x, y)
        g_student, logits = input_gradient(student, x, y, create_graph=True)
        g_teacher, teacher_logits = _gradient(teacher, x, y)
        terms = _distillation(self, logits, y, student(x_adv), teacher_logits)
        return terms | _alignment(self, g_student, g_teacher)


@dataclass(frozen=True)
class KDIGA_ARD_A(Method):
    """KDIGA on adversarial images: CE(f_s(x)), KL(f_s(x + δ), f_t(x + δ)), IGA at x + δ. Equation 21."""

    passes: ClassVar[tuple[int, int]] = (9, 2)
    attack: SignAscent
    lambda_ce: float = 0.5
    lambda_kl: float = 0.5
    lambda_iga: float = 1.0
    temperature: float = 1.0
    norm: str = "per_sample"
    kl_reduction: str = "batchmean"

    def __call__(self, student: nn.Module, teacher: nn.Module | None, x: Tensor, y: Tensor) -> Terms:
        x_adv = self.attack.unchecked(student, x, y)
        g_student, student_logits = input_gradient(student, x_adv, y, create_graph=True)
        g_teacher, teacher_logits = _gradient(teacher, x_adv, y)
        terms = _distillation(self, student(x), y, student_logits, teacher_logits)
        return terms | _alignment(self, g_student, g_teacher)


@dataclass(frozen=True)
class AT(Method):
    """Adversarial training (Madry et al.): CE(f(x + δ), y). PGD-7 in Table 1, fast AT with one random-start step."""

    attack: SignAscent
    needs_teacher: ClassVar[bool] = False

    def __call__(self, student: nn.Module, teacher: nn.Module | None, x: Tensor, y: Tensor) -> Terms:
        return {"cross_entropy": cross_entropy(student(self.attack.unchecked(student, x, y)), y).mean()}


@dataclass(frozen=True)
class TRADES(Method):
    """TRADES (Zhang et al. 2019): CE(f(x), y) + β·KL(f(x) ‖ f(x + δ)), δ maximising that same divergence.

    ``attack`` gives radius, steps and start. The start must be random, because the divergence has no gradient at x.
    """

    passes: ClassVar[tuple[int, int]] = (7, 0)
    attack: SignAscent
    beta: float = 6.0
    needs_teacher: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.attack.random_start:
            raise ValueError("TRADES needs an attack with a random start: its loss has no gradient at the image itself")

    def __call__(self, student: nn.Module, teacher: nn.Module | None, x: Tensor, y: Tensor) -> Terms:
        with frozen(student), torch.no_grad():
            clean_logits = student(x)
        x_adv = _divergent(self.attack, student, x, lambda _: clean_logits)
        logits = student(x)
        return {
            "cross_entropy": cross_entropy(logits, y).mean(),
            "consistency": self.beta * distillation_kl(student(x_adv), logits).mean(),
        }


class _Reversed(torch.autograd.Function):
    """Identity forward, reversed gradient backward: one loss then serves both players of a minimax game."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return -gradient


@dataclass(frozen=True)
class IGAM(Method):
    """Input gradient adversarial matching (Chan et al., CVPR 2020), a baseline of Table 1.

    λ_CE·CE(f_s(x), y) + λ_adv·L_adv + λ_diff·mean‖g_s − g_t‖₂², where a discriminator D distinguishes the input
    gradients of teacher and student: L_adv = −log D(g_t) − log(1 − D(g_s)), minimised by D, maximised by the student.
    With gradient reversal one optimiser trains both. The teacher is adversarially trained on another task, and its last
    layer is fine-tuned on this task.
    """

    passes: ClassVar[tuple[int, int]] = (6, 2)
    lambda_ce: float = 1.0
    lambda_adv: float = 0.1
    lambda_diff: float = 1.0

    def bind(self, image_shape: tuple[int, int, int], device: torch.device) -> nn.Module:
        return _IGAMGame(self, image_shape).to(device)

    def __call__(self, student: nn.Module, teacher: nn.Module | None, x: Tensor, y: Tensor) -> Terms:
        """The terms with a fresh discriminator; a training uses ``bind``, whose discriminator learns."""
        channels, height, width = x.shape[1:]
        return self.bind((channels, height, width), x.device)(student, teacher, x, y)


class _IGAMGame(nn.Module):
    """IGAM with its discriminator, whose weights are part of the state of the training."""

    def __init__(self, method: IGAM, image_shape: tuple[int, int, int]):
        super().__init__()
        self.method = method
        channels, height, width = image_shape
        self.discriminator = nn.Sequential(
            nn.Conv2d(channels, 16, 3, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(32 * ((height + 3) // 4) * ((width + 3) // 4), 1),
        )

    def forward(self, student: nn.Module, teacher: nn.Module | None, x: Tensor, y: Tensor) -> Terms:
        g_student, logits = input_gradient(student, x, y, create_graph=True)
        g_teacher, _ = _gradient(teacher, x, y)
        real = self.discriminator(_unit(g_teacher))
        fake = self.discriminator(_Reversed.apply(_unit(g_student)))
        adversarial = F.softplus(-real) + F.softplus(fake)  # −log D(g_t) − log(1 − D(g_s)), D the sigmoid
        difference = (g_student - g_teacher).flatten(1).square().sum(1)
        return {
            "cross_entropy": self.method.lambda_ce * cross_entropy(logits, y).mean(),
            "adversarial": self.method.lambda_adv * adversarial.mean(),
            "difference": self.method.lambda_diff * difference.mean(),
        }


def _unit(gradient: Tensor) -> Tensor:
    """Gradients of unit length per example: the discriminator judges the pattern, not the size."""
    norm = torch.linalg.vector_norm(gradient.flatten(1), dim=1).clamp_min(1e-8)
    return gradient / norm[:, None, None, None]


METHODS: dict[str, type[Method]] = {
    "st": ST,
    "kd": KD,
    "kdiga": KDIGA,
    "ard": ARD,
    "rslad": RSLAD,
    "iad": IAD,
    "adaad": AdaAD,
    "igdm": IGDM,
    "saad": SAAD,
    "kdiga_ard_c": KDIGA_ARD_C,
    "kdiga_ard_a": KDIGA_ARD_A,
    "igam": IGAM,
    "gradient_penalty": GradientPenalty,
    "at": AT,
    "trades": TRADES,
}


def with_preset(method: type[Method], preset: str, **values: Any) -> Method:
    """A method under a preset: the preset's choices, for the fields the method has, then ``values``.

    Raises:
        ValueError: an unknown preset.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    names = {item.name for item in fields(method)}  # pyright: ignore[reportArgumentType]
    return method(**{k: v for k, v in PRESETS[preset].items() if k in names} | values)


def effective_lambda_iga(method: Method, batch_size: int) -> float:
    """The weight of ‖d_i‖₂ of one example, in the mean over the batch.

    λ_IGA itself for ``per_sample``. Under ``batch`` it is λ_IGA·B^-1.5 (of the root mean square of ‖d_i‖₂), so the
    authors' nominal 1 at B = 128 is an effective 6.9e-4.
    """
    weight = getattr(method, "lambda_iga", 0.0)
    return weight * batch_size**-1.5 if getattr(method, "norm", "per_sample") == "batch" else weight
