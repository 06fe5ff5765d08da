"""Training methods: each against its equation, and the identities that tie one to another."""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import MISSING, fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, kl_div, log_softmax, softmax
from torch.nn.functional import cross_entropy as mean_cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from kdiga_nb.attacks.gradient import FGSM, PGD
from kdiga_nb.data import Split
from kdiga_nb.losses import distillation_kl, gradient_distance, input_gradient, logit_gradients
from kdiga_nb.methods import (
    ARD,
    AT,
    IAD,
    IGAM,
    IGDM,
    KD,
    KDIGA,
    KDIGA_ARD_A,
    KDIGA_ARD_C,
    METHODS,
    PRESETS,
    RSLAD,
    SAAD,
    ST,
    TRADES,
    AdaAD,
    GradientPenalty,
    Method,
    Terms,
    effective_lambda_iga,
    with_preset,
)
from kdiga_nb.models import build_model
from kdiga_nb.numerics.scopes import frozen
from kdiga_nb.teacher import CachedTeacher
from kdiga_nb.training import train_step

ATTACK = PGD(0.1, 0.04, 3)
STILL = PGD(0.0, 0.0, 2)
CPU = torch.device("cpu")


@pytest.fixture
def student(tiny_net: Callable[..., nn.Module]) -> nn.Module:
    return tiny_net(0, dtype=torch.float64)


@pytest.fixture
def teacher(tiny_net: Callable[..., nn.Module]) -> nn.Module:
    """In eval mode but with its parameter gradients on, so that one that reaches it would show."""
    return tiny_net(1, gain=2.0, dtype=torch.float64).eval()


@pytest.fixture
def batch(random_images: Callable[..., Split]) -> Split:
    return random_images(6, dtype=torch.float64)


def game(method: IGAM) -> nn.Module:
    torch.manual_seed(0)
    bound = method.bind((1, 4, 4), CPU)
    assert isinstance(bound, nn.Module)
    return bound.double()


def terms_of(method: Method | nn.Module, student: nn.Module, teacher: nn.Module | None, batch: Split) -> Terms:
    """The terms under the same random draws every time; IGAM against a discriminator in double precision."""
    method = game(method) if isinstance(method, IGAM) else method
    torch.manual_seed(0)
    return method(student, teacher, *batch)


def total_and_gradients(
    method: Method, student: nn.Module, teacher: nn.Module | None, batch: Split
) -> tuple[Tensor, tuple[Tensor, ...]]:
    total = torch.stack(list(terms_of(method, student, teacher, batch).values())).sum()
    return total, torch.autograd.grad(total, list(student.parameters()))


def assert_same(
    left: Method, right: Method, student: nn.Module, teacher: nn.Module, batch: Split, factor: float = 1.0
) -> None:
    """Equal sums and equal gradients; ``factor`` times the right side."""
    ours, our_gradients = total_and_gradients(left, student, teacher, batch)
    theirs, their_gradients = total_and_gradients(right, student, teacher, batch)
    torch.testing.assert_close(ours, factor * theirs, rtol=1e-10, atol=1e-12)
    for our, their in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(our, factor * their, rtol=1e-8, atol=1e-12)


def watched(net: nn.Module) -> list[Tensor]:
    """The images of every forward pass from here on."""
    seen: list[Tensor] = []
    net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    return seen


def identities() -> list[Any]:
    pairs: list[tuple[str, Method, Method]] = [
        ("KD without KL is ST", KD(lambda_ce=1, lambda_kl=0), ST()),
        ("KDIGA without KL and IGA is ST", KDIGA(lambda_ce=1, lambda_kl=0, lambda_iga=0), ST()),
        ("IGAM with CE alone is ST", IGAM(lambda_ce=1, lambda_adv=0, lambda_diff=0), ST()),
        ("TRADES at beta 0 is ST", TRADES(ATTACK, beta=0), ST()),
        ("TRADES at radius 0 is ST", TRADES(STILL, beta=6), ST()),
        ("AT at radius 0 is ST", AT(STILL), ST()),
        ("RSLAD at radius 0 is soft-label KD", RSLAD(STILL), KD(lambda_ce=0, lambda_kl=1)),
        ("RSLAD on clean images is soft-label KD", RSLAD(ATTACK, 0.7, 0), KD(lambda_ce=0, lambda_kl=0.7)),
        ("AdaAD at radius 0 is soft-label KD", AdaAD(STILL, 0.25, 0.5), KD(lambda_ce=0, lambda_kl=0.75)),
        ("IAD at radius 0 is soft-label KD", IAD(STILL), KD(lambda_ce=0, lambda_kl=1)),
        ("IAD that always trusts is ARD without CE", IAD(ATTACK, beta=0), ARD(ATTACK, lambda_ce=0, lambda_kl=1)),
        ("IGDM at weight 0 is AdaAD", IGDM(ATTACK, 0.2, 0.8, lambda_igdm=0), AdaAD(ATTACK, 0.2, 0.8)),
        ("IGDM at radius 0 is AdaAD", IGDM(STILL, lambda_igdm=3), AdaAD(STILL)),
    ]
    kd_settings: list[dict[str, Any]] = [
        {},
        {"temperature": 4.0, "kl_reduction": "mean", "lambda_ce": 0.3, "lambda_kl": 0.9},
    ]
    for kd in kd_settings:
        pairs += [
            ("KDIGA without IGA is KD", KDIGA(lambda_iga=0, **kd), KD(**kd)),
            ("ARD at radius 0 is KD", ARD(STILL, **kd), KD(**kd)),
            ("ARD with an adversarial target at radius 0 is KD", ARD(STILL, target="adversarial", **kd), KD(**kd)),
            ("KDIGA-ARD-C without IGA is ARD", KDIGA_ARD_C(ATTACK, lambda_iga=0, **kd), ARD(ATTACK, **kd)),
            (
                "KDIGA-ARD-A without IGA is ARD with an adversarial target",
                KDIGA_ARD_A(ATTACK, lambda_iga=0, **kd),
                ARD(ATTACK, target="adversarial", **kd),
            ),
        ]
        for norm in ("per_sample", "batch"):
            both = kd | {"lambda_iga": 3.0, "norm": norm}
            pairs += [
                ("KDIGA-ARD-C at radius 0 is KDIGA", KDIGA_ARD_C(STILL, **both), KDIGA(**both)),
                ("KDIGA-ARD-A at radius 0 is KDIGA", KDIGA_ARD_A(STILL, **both), KDIGA(**both)),
                ("KDIGA+FGSM at radius 0 is KDIGA", KDIGA(attack=FGSM(0.0), **both), KDIGA(**both)),
                ("at x + δ, too", KDIGA(attack=FGSM(0.0), align_at="perturbed", **both), KDIGA(**both)),
            ]
    return [pytest.param(left, right, id=f"{name}-{i}") for i, (name, left, right) in enumerate(pairs)]


@pytest.mark.parametrize(("left", "right"), identities())
def test_identities(left: Method, right: Method, student: nn.Module, teacher: nn.Module, batch: Split) -> None:
    assert_same(left, right, student, teacher, batch)


def test_kd_without_kl_is_standard_training_times_its_weight(
    student: nn.Module, teacher: nn.Module, batch: Split
) -> None:
    assert_same(KD(lambda_ce=0.3, lambda_kl=0), ST(), student, teacher, batch, factor=0.3)


@pytest.mark.parametrize(
    "method", [ARD(ATTACK), AT(ATTACK), KDIGA(attack=FGSM(0.1)), TRADES(ATTACK), RSLAD(ATTACK), AdaAD(ATTACK)], ids=repr
)
def test_a_radius_makes_a_difference(method: Method, student: nn.Module, teacher: nn.Module, batch: Split) -> None:
    """The counterpart of the identities at radius 0, which a method that forgot its attack would pass as well."""
    soft = KD(lambda_ce=0, lambda_kl=1)
    plain = {ARD: KD(), AT: ST(), KDIGA: KDIGA(), TRADES: ST(), RSLAD: soft, AdaAD: soft}[type(method)]
    ours, theirs = (total_and_gradients(one, student, teacher, batch)[0] for one in (method, plain))
    assert abs(ours - theirs) > 1e-3


def mean_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    return kl_div(log_softmax(student_logits, 1), softmax(teacher_logits, 1), reduction="batchmean")


def pixel_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(mean_cross_entropy(model(x), y, reduction="sum"), x, create_graph=True)[0]


def attacked(student: nn.Module, batch: Split) -> Tensor:
    torch.manual_seed(0)
    return ATTACK(student, *batch)


def distance(student: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    difference = pixel_gradient(student, x, y) - pixel_gradient(teacher, x, y)
    return difference.square().sum((1, 2, 3)).sqrt().mean()


Expected = Callable[[nn.Module, nn.Module, Split], dict[str, Tensor]]


def expected_st(s: nn.Module, t: nn.Module, b: Split) -> dict[str, Tensor]:
    return {"cross_entropy": mean_cross_entropy(s(b.images), b.labels)}


def expected_kd(s: nn.Module, t: nn.Module, b: Split) -> dict[str, Tensor]:
    kl = mean_kl(s(b.images) / 4, t(b.images) / 4)
    return {"cross_entropy": 0.3 * expected_st(s, t, b)["cross_entropy"], "distillation": 0.9 * 16 * kl}


def expected_kdiga(s: nn.Module, t: nn.Module, b: Split) -> dict[str, Tensor]:
    return {
        "cross_entropy": 0.5 * expected_st(s, t, b)["cross_entropy"],
        "distillation": 0.5 * mean_kl(s(b.images), t(b.images)),
        "alignment": 2 * distance(s, t, *b),
    }


def expected_kdiga_zero(s: nn.Module, t: nn.Module, b: Split) -> dict[str, Tensor]:
    """KD and a penalty on the size of the student's input gradient."""
    norms = pixel_gradient(s, *b).flatten(1).square().sum(1).sqrt()
    return expected_kdiga(s, t, b) | {"alignment": 2 * norms.mean()}


def expected_kdiga_shuffled(s: nn.Module, t: nn.Module, b: Split) -> dict[str, Tensor]:
    torch.manual_seed(0)
    order = torch.randperm(len(b.labels))
    difference = pixel_gradient(s, *b) - pixel_gradient(t, *b).detach()[order]
    return expected_kdiga(s, t, b) | {"alignment": 2 * difference.flatten(1).square().sum(1).sqrt().mean()}


def expected_penalty(s: nn.Module, t: nn.Module, b: Split) -> dict[str, Tensor]:
    return expected_st(s, t, b) | {"penalty": expected_kdiga_zero(s, t, b)["alignment"]}


def expected_kdiga_fgsm(s: nn.Module, t: nn.Module, b: Split) -> dict[str, Tensor]:
    x_adv = (b.images + 0.1 * pixel_gradient(s, *b).sign()).clamp(0, 1)
    moved = expected_kdiga(s, t, Split(x_adv, b.labels))
    return moved | {"alignment": 2 * distance(s, t, *b)}


def expected_kdiga_perturbed(s: nn.Module, t: nn.Module, b: Split) -> dict[str, Tensor]:
    x_adv = (b.images + 0.1 * pixel_gradient(s, *b).sign()).clamp(0, 1)
    return expected_kdiga(s, t, Split(x_adv, b.labels))


def expected_ard(s: nn.Module, t: nn.Module, b: Split) -> dict[str, Tensor]:
    kl = mean_kl(s(attacked(s, b)), t(b.images))
    return {"cross_entropy": 0.5 * expected_st(s, t, b)["cross_entropy"], "distillation": 0.5 * kl}


def expected_ard_adversarial(s: nn.Module, t: nn.Module, b: Split) -> dict[str, Tensor]:
    x_adv = attacked(s, b)
    return expected_ard(s, t, b) | {"distillation": 0.5 * mean_kl(s(x_adv), t(x_adv))}


def expected_c(s: nn.Module, t: nn.Module, b: Split) -> dict[str, Tensor]:
    return expected_ard(s, t, b) | {"alignment": 2 * distance(s, t, *b)}


def expected_a(s: nn.Module, t: nn.Module, b: Split) -> dict[str, Tensor]:
    return expected_ard_adversarial(s, t, b) | {"alignment": 2 * distance(s, t, attacked(s, b), b.labels)}


def expected_at(s: nn.Module, t: nn.Module, b: Split) -> dict[str, Tensor]:
    return expected_st(s, t, Split(attacked(s, b), b.labels))


def expected_trades(s: nn.Module, t: nn.Module, b: Split) -> dict[str, Tensor]:
    clean_logits = s(b.images).detach()
    torch.manual_seed(0)
    x_adv = ATTACK.perturb(lambda images: distillation_kl(s(images), clean_logits), b.images)
    return expected_st(s, t, b) | {"consistency": 6 * mean_kl(s(x_adv), s(b.images))}


def climbed(student: nn.Module, batch: Split, target: Callable[[Tensor], Tensor]) -> Tensor:
    """x' of the attacks that ascend KL(f_s(x'), target(x')), step by step as the equation says."""
    x = batch.images
    torch.manual_seed(0)
    x_adv = (x + torch.empty_like(x).uniform_(-0.1, 0.1)).clamp(0, 1)
    for _ in range(3):
        x_adv.requires_grad_()
        (slope,) = torch.autograd.grad(mean_kl(student(x_adv), target(x_adv)), x_adv)
        x_adv = (x_adv + 0.04 * slope.sign()).detach()
        x_adv = x_adv.clamp(x - 0.1, x + 0.1).clamp(0, 1)
    return x_adv


def expected_rslad(s: nn.Module, t: nn.Module, b: Split) -> dict[str, Tensor]:
    target = t(b.images).detach()
    x_adv = climbed(s, b, lambda _: target)
    return {
        "distillation": mean_kl(s(b.images), target) / 6,
        "adversarial": 5 * mean_kl(s(x_adv), target) / 6,
    }


def expected_iad(s: nn.Module, t: nn.Module, b: Split) -> dict[str, Tensor]:
    x_adv = attacked(s, b)
    doubt = 1 - softmax(t(x_adv), 1)[range(6), b.labels].detach() ** 0.5
    itself = kl_div(log_softmax(s(x_adv), 1), softmax(s(b.images), 1), reduction="none").sum(1)
    return {"distillation": mean_kl(s(x_adv), t(b.images).detach()), "introspection": (doubt * itself).mean()}


def expected_adaad(s: nn.Module, t: nn.Module, b: Split) -> dict[str, Tensor]:
    x_adv = climbed(s, b, t)
    return {
        "distillation": 0.2 * mean_kl(s(b.images), t(b.images).detach()),
        "adversarial": 0.8 * mean_kl(s(x_adv), t(x_adv).detach()),
    }


def expected_igdm(s: nn.Module, t: nn.Module, b: Split) -> dict[str, Tensor]:
    delta = climbed(s, b, t) - b.images
    ours, theirs = (net(b.images + delta) - net(b.images - delta) for net in (s, t))
    return expected_adaad(s, t, b) | {"difference": 3 * mean_kl(ours, theirs.detach())}


def expected_saad(s: nn.Module, t: nn.Module, b: Split) -> dict[str, Tensor]:
    """Slopes and weights image by image."""
    x, y = b.images, b.labels
    clean = t(x).detach()
    leaf = x.clone().requires_grad_()
    slopes = [torch.autograd.grad(t(leaf)[i, y[i]], leaf)[0][i] for i in range(6)]

    def target(images: Tensor) -> Tensor:
        rows = [clean[i].clone() for i in range(6)]
        for i, row in enumerate(rows):
            row[y[i]] = row[y[i]] + 0.5 * (slopes[i] * (images[i] - x[i])).sum()
        return torch.stack(rows)

    delta = climbed(s, b, target) - x
    shares = softmax(t(x + delta), 1).detach()
    entropy = [-(row * row.log()).sum() for row in shares]
    weight = torch.stack([4 * (one - min(entropy)) for one in entropy])
    ours, theirs = (net(x + delta) - net(x - delta) for net in (s, t))

    def each(logits: Tensor, goal: Tensor) -> Tensor:
        return kl_div(log_softmax(logits, 1), softmax(goal.detach(), 1), reduction="none").sum(1)

    return {
        "distillation": 0.3 * ((1 - weight / max(weight)) * each(s(x), clean)).mean(),
        "adversarial": (weight * each(s(x + delta), t(x + delta))).mean(),
        "difference": 3 * (weight * each(ours, theirs)).mean(),
    }


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (ST(), expected_st),
        (KD(lambda_ce=0.3, lambda_kl=0.9, temperature=4), expected_kd),
        (KDIGA(lambda_iga=2), expected_kdiga),
        (KDIGA(lambda_iga=2, target_gradient="zero"), expected_kdiga_zero),
        (KDIGA(lambda_iga=2, target_gradient="shuffled"), expected_kdiga_shuffled),
        (GradientPenalty(2), expected_penalty),
        (KDIGA(lambda_iga=2, attack=FGSM(0.1)), expected_kdiga_fgsm),
        (KDIGA(lambda_iga=2, attack=FGSM(0.1), align_at="perturbed"), expected_kdiga_perturbed),
        (ARD(ATTACK), expected_ard),
        (ARD(ATTACK, target="adversarial"), expected_ard_adversarial),
        (RSLAD(ATTACK), expected_rslad),
        (IAD(ATTACK, beta=0.5), expected_iad),
        (AdaAD(ATTACK, 0.2, 0.8), expected_adaad),
        (IGDM(ATTACK, 0.2, 0.8, lambda_igdm=3), expected_igdm),
        (SAAD(ATTACK, 0.3, lambda_igdm=3, lambda_inner=0.5, lambda_entropy=4), expected_saad),
        (KDIGA_ARD_C(ATTACK, lambda_iga=2), expected_c),
        (KDIGA_ARD_A(ATTACK, lambda_iga=2), expected_a),
        (AT(ATTACK), expected_at),
        (TRADES(ATTACK), expected_trades),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_every_term_and_its_gradient_are_those_of_the_equation(
    method: Method, expected: Expected, student: nn.Module, teacher: nn.Module, batch: Split
) -> None:
    terms = terms_of(method, student, teacher, batch)
    values = expected(student, teacher, batch)
    assert list(terms) == list(values)
    for name, value in values.items():
        assert terms[name].shape == ()
        torch.testing.assert_close(terms[name], value, rtol=1e-9, atol=1e-12)
        ours, theirs = (
            torch.autograd.grad(term, list(student.parameters()), retain_graph=True, allow_unused=True)
            for term in (terms[name], value)
        )
        for our, their in zip(ours, theirs, strict=True):
            torch.testing.assert_close(our, their, rtol=1e-7, atol=1e-11)


def test_the_gradient_of_the_alignment_reaches_the_student(
    student: nn.Module, teacher: nn.Module, batch: Split
) -> None:
    """The alignment's slope along its own gradient against a central difference: double backpropagation is right."""
    method = KDIGA(lambda_ce=0, lambda_kl=0, lambda_iga=1)
    _, gradients = total_and_gradients(method, student, teacher, batch)
    values, h = [], 1e-6
    for sign in (1, -1):
        moved = deepcopy(student)
        with torch.no_grad():
            for parameter, gradient in zip(moved.parameters(), gradients, strict=True):
                parameter += sign * h * gradient
        values.append(terms_of(method, moved, teacher, batch)["alignment"].item())
    squared = sum(gradient.square().sum().item() for gradient in gradients)
    assert squared > 0
    assert (values[0] - values[1]) / (2 * h) == pytest.approx(squared, rel=1e-5)


@pytest.mark.parametrize("norm", ["per_sample", "batch"])
@pytest.mark.parametrize("same_object", [False, True])
def test_a_perfect_student_has_nothing_to_learn_and_finite_gradients(
    norm: str, same_object: bool, student: nn.Module, batch: Split
) -> None:
    teacher = student if same_object else deepcopy(student)
    methods: list[Method] = [
        KD(lambda_ce=0),
        KDIGA(lambda_ce=0, norm=norm),
        KDIGA(lambda_ce=0, norm=norm, attack=FGSM(0.1)),
        ARD(ATTACK, lambda_ce=0, target="adversarial"),
        KDIGA_ARD_A(ATTACK, lambda_ce=0, norm=norm),
        AdaAD(ATTACK, 0.5, 0.5),
        IGDM(ATTACK),
        IGAM(lambda_ce=0, lambda_adv=0),
    ]
    for method in methods:
        total, gradients = total_and_gradients(method, student, teacher, batch)
        assert total == 0
        assert all(gradient.abs().max() < 1e-12 for gradient in gradients)


@pytest.mark.parametrize(
    ("method", "student_passes", "teacher_passes"),
    [(KD(), 1, 1), (KDIGA(), 1, 1), (KDIGA(attack=FGSM(0.1)), 2, 2), (ST(), 1, 0)],
    ids=["KD", "KDIGA", "KDIGA+FGSM", "ST"],
)
def test_no_more_forward_passes_than_the_equation_needs(
    method: Method, student_passes: int, teacher_passes: int, student: nn.Module, teacher: nn.Module, batch: Split
) -> None:
    by_student, by_teacher = watched(student), watched(teacher)
    terms_of(method, student, teacher, batch)
    assert (len(by_student), len(by_teacher)) == (student_passes, teacher_passes)
    assert all(torch.equal(images[0], batch.images) for images in (by_student, by_teacher) if images)


def test_kdiga_with_fgsm_moves_along_the_gradient_that_it_aligns(
    student: nn.Module, teacher: nn.Module, batch: Split
) -> None:
    """Both nets see x and then exactly what FGSM would return."""
    x_adv = FGSM(0.1)(student, *batch)
    assert not torch.equal(x_adv, batch.images)
    by_student, by_teacher = watched(student), watched(teacher)
    terms_of(KDIGA(attack=FGSM(0.1)), student, teacher, batch)
    for first, second in (by_student, by_teacher):
        assert torch.equal(first, batch.images) and torch.equal(second, x_adv)


def test_kdiga_with_a_random_start_aligns_there(student: nn.Module, teacher: nn.Module, batch: Split) -> None:
    attack, seen = PGD(0.1, 0.125, 1), watched(student)
    terms = terms_of(KDIGA(attack=attack), student, teacher, batch)
    start, moved = seen
    torch.manual_seed(0)
    assert torch.equal(start, attack.start(batch.images))
    uphill = pixel_gradient(student, start, batch.labels).sign()
    lower, upper = (batch.images - 0.1).clamp(min=0), (batch.images + 0.1).clamp(max=1)
    torch.testing.assert_close(moved, (start + 0.125 * uphill).clamp(lower, upper), rtol=0, atol=1e-12)
    torch.testing.assert_close(terms["alignment"], distance(student, teacher, start, batch.labels))


def passes_of_the_loss() -> dict[str, tuple[Method, int]]:
    return {
        "st": (ST(), 1),
        "kd": (KD(), 1),
        "kdiga": (KDIGA(), 1),
        "kdiga, zero": (KDIGA(target_gradient="zero"), 1),
        "kdiga, shuffled": (KDIGA(target_gradient="shuffled"), 1),
        "gradient_penalty": (GradientPenalty(), 1),
        "kdiga+fgsm": (KDIGA(attack=FGSM(0.1)), 2),
        "kdiga+fgsm, all at x + δ": (KDIGA(attack=FGSM(0.1), align_at="perturbed"), 1),
        "ard": (ARD(ATTACK), 2),
        "rslad": (RSLAD(ATTACK), 2),
        "iad": (IAD(ATTACK), 2),
        "adaad": (AdaAD(ATTACK), 2),
        "igdm": (IGDM(ATTACK), 3),
        "saad": (SAAD(ATTACK), 3),
        "kdiga_ard_c": (KDIGA_ARD_C(ATTACK), 2),
        "kdiga_ard_a": (KDIGA_ARD_A(ATTACK), 2),
        "igam": (IGAM(), 1),
        "at": (AT(ATTACK), 1),
        "trades": (TRADES(ATTACK), 2),
    }


@pytest.mark.parametrize("name", passes_of_the_loss())
def test_batch_norm_moves_with_the_loss_and_never_with_the_attack(
    name: str, tiny_net: Callable[..., nn.Module], teacher: nn.Module, batch: Split
) -> None:
    method, passes = passes_of_the_loss()[name]
    student = tiny_net(0, batch_norm=True, dtype=torch.float64).train()
    before = deepcopy(teacher.state_dict())
    terms = terms_of(method, student, teacher, batch)
    assert student.get_buffer("norm.num_batches_tracked") == passes
    assert all(module.training for module in student.modules())
    assert all(parameter.requires_grad for parameter in student.parameters())
    torch.stack(list(terms.values())).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in student.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not teacher.training
    assert all(torch.equal(teacher.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize("name", METHODS)
def test_the_needs_are_as_declared(name: str, student: nn.Module, batch: Split) -> None:
    method = example(METHODS[name])
    if method.needs_teacher:
        with pytest.raises(ValueError, match="needs a teacher"):
            method(student, None, *batch)
    else:
        assert method(student, None, *batch)


def example(kind: type[Method]) -> Method:
    """A method with its defaults, and an attack where it must have one."""
    required = [field.name for field in fields(kind) if field.default is MISSING]  # pyright: ignore
    assert set(required) <= {"attack"}
    return kind(**{name: ATTACK for name in required})


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_a_step(
    name: str, tiny_net: Callable[..., nn.Module], random_images: Callable[..., Split]
) -> None:
    student, teacher = tiny_net(0, dropout=0.5), tiny_net(1).eval()
    before = deepcopy(student.state_dict())
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    for seed in range(3):
        values = train_step(student, teacher, example(METHODS[name]), optimizer, *random_images(6, seed))
        assert values and all(math.isfinite(value) for value in values.values())
    assert all(tensor.isfinite().all() for tensor in student.state_dict().values())
    assert all(not torch.equal(student.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize("kind", [KD, KDIGA, ARD, KDIGA_ARD_C, KDIGA_ARD_A])
def test_the_mean_over_classes_divides_the_divergence_by_their_number(
    kind: type[Method], student: nn.Module, teacher: nn.Module, batch: Split
) -> None:
    method = example(kind)
    whole, divided = (
        terms_of(replace(method, kl_reduction=reduction), student, teacher, batch)  # pyright: ignore
        for reduction in ("batchmean", "mean")
    )
    torch.testing.assert_close(divided.pop("distillation"), whole.pop("distillation") / 5)
    assert divided == whole


def test_ards_targets_differ_in_what_the_teacher_sees(student: nn.Module, teacher: nn.Module, batch: Split) -> None:
    x_adv, seen = attacked(student, batch), watched(teacher)
    for target in ("clean", "adversarial"):
        terms_of(ARD(ATTACK, target=target), student, teacher, batch)
    assert len(seen) == 2 and torch.equal(seen[0], batch.images) and torch.equal(seen[1], x_adv)


def test_trades_climbs_its_own_divergence_in_eval_mode(
    tiny_net: Callable[..., nn.Module], random_images: Callable[..., Split]
) -> None:
    """The perturbed images, as the student sees them, lie in the ball and far up the divergence of the net at rest."""
    student = tiny_net(0, dropout=0.5, gain=3.0).train()
    x, y = random_images(16)
    seen: list[tuple[bool, Tensor]] = []
    student.register_forward_pre_hook(lambda net, inputs: seen.append((net.training, inputs[0].detach().clone())))
    TRADES(PGD(0.1, 0.025, 8))(student, None, x, y)
    # One pass for the target, one a step, then the two of the loss.
    assert [training for training, _ in seen] == [False] * 9 + [True] * 2
    start, end = seen[1][1], seen[-1][1]
    assert torch.equal(seen[0][1], x) and torch.equal(seen[-2][1], x)
    assert (end - x).abs().max() <= 0.1 + 1e-7
    with frozen(student), torch.no_grad():
        climbed, random = (distillation_kl(student(images), student(x)).mean() for images in (end, start))
    assert climbed > 2 * random


@pytest.mark.parametrize(
    ("method", "teacher_steps"),
    [(RSLAD(PGD(0.1, 0.025, 8)), 0), (AdaAD(PGD(0.1, 0.025, 8)), 8), (IGDM(PGD(0.1, 0.025, 8)), 8)],
    ids=["RSLAD", "AdaAD", "IGDM"],
)
def test_the_distillations_climb_their_own_divergence_in_eval_mode(
    method: Method, teacher_steps: int, tiny_net: Callable[..., nn.Module], random_images: Callable[..., Split]
) -> None:
    """One pass of the student per step, of the teacher where the target moves; no step leaves ball or step size."""
    student, teacher = tiny_net(0, dropout=0.5, gain=3.0).train(), tiny_net(1, gain=3.0).eval()
    x, y = random_images(16)
    by_teacher = watched(teacher)
    seen: list[tuple[bool, Tensor]] = []
    student.register_forward_pre_hook(lambda net, inputs: seen.append((net.training, inputs[0].detach().clone())))
    method(student, teacher, x, y)
    losses = 3 if isinstance(method, IGDM) else 2
    assert [training for training, _ in seen] == [False] * 8 + [True] * losses
    end = seen[-1 if isinstance(method, RSLAD) else 8][1]
    path = [images for _, images in seen[:8]]
    assert all((images - x).abs().max() <= 0.1 + 1e-7 and 0 <= images.min() <= images.max() <= 1 for images in path)
    steps = [(after - before).abs().max() for before, after in zip(path, [*path[1:], end], strict=True)]
    assert all(0.02 < step <= 0.025 + 1e-6 for step in steps)
    assert sum(any(torch.equal(images, one) for one in path) for images in by_teacher) == teacher_steps
    with frozen(student), torch.no_grad():
        moving = teacher_steps > 0
        values = [distillation_kl(student(z), teacher(z if moving else x)).mean() for z in (end, path[0])]
    assert values[0] > 1.2 * values[1]


def test_igdms_difference_of_logits_tends_to_the_jacobian_along_the_perturbation(
    student: nn.Module, teacher: nn.Module, batch: Split
) -> None:
    """(f(x') − f(x'')) / 2ε, as IGDM computes it, against J·δ/ε: the error falls with ε²."""
    errors = []
    for epsilon in (1e-2, 1e-3):
        logits: dict[bytes, Tensor] = {}
        hook = student.register_forward_hook(
            lambda _, inputs, output, into=logits: into.__setitem__(inputs[0].detach().numpy().tobytes(), output)
        )
        inside = Split(batch.images.clamp(0.2, 0.8), batch.labels)
        torch.manual_seed(0)
        seen = watched(student)
        IGDM(PGD(epsilon, epsilon / 2, 2))(student, teacher, *inside)
        hook.remove()
        x_adv, _, opposite = seen[-3:]
        difference = logits[x_adv.numpy().tobytes()] - logits[opposite.numpy().tobytes()]
        jacobian = torch.func.vmap(torch.func.jacrev(lambda x: student(x[None])[0]))(inside.images)
        along = torch.einsum("bnchw,bchw->bn", jacobian, x_adv - inside.images)
        errors.append(((difference / 2 - along) / epsilon).abs().max().item())
    assert errors[0] > 1e-8 and errors[1] < errors[0] / 30


@pytest.mark.parametrize(
    ("method", "batch_size", "expected"),
    [
        (KDIGA(lambda_iga=1, norm="batch"), 128, 6.9e-4),
        (KDIGA(lambda_iga=1000, norm="batch"), 128, 0.69),
        (KDIGA_ARD_C(ATTACK, lambda_iga=10, norm="batch"), 128, 6.9e-3),
        (KDIGA_ARD_A(ATTACK, lambda_iga=10, norm="batch"), 1, 10.0),
        (KDIGA(lambda_iga=3), 128, 3.0),
        (KDIGA_ARD_A(ATTACK, lambda_iga=3), 7, 3.0),
        (KD(), 128, 0.0),
        (ST(), 128, 0.0),
    ],
)
def test_effective_lambda_iga(method: Method, batch_size: int, expected: float) -> None:
    assert effective_lambda_iga(method, batch_size) == pytest.approx(expected, rel=2e-3)


def test_effective_lambda_iga_weighs_the_root_mean_square(student: nn.Module, teacher: nn.Module, batch: Split) -> None:
    method = KDIGA(lambda_iga=7, norm="batch")
    difference = pixel_gradient(student, *batch) - pixel_gradient(teacher, *batch)
    root_mean_square = difference.square().sum((1, 2, 3)).mean().sqrt()
    weighed = effective_lambda_iga(method, len(batch.labels)) * root_mean_square
    torch.testing.assert_close(terms_of(method, student, teacher, batch)["alignment"].detach(), weighed)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", METHODS)
def test_a_preset_sets_the_fields_that_the_method_has(name: str, preset: str) -> None:
    kind = METHODS[name]
    given = {field.name: ATTACK for field in fields(kind) if field.default is MISSING}  # pyright: ignore
    method = with_preset(kind, preset, **given)
    named = {field.name for field in fields(kind)}  # pyright: ignore
    for field, value in PRESETS[preset].items():
        assert getattr(method, field, value) == value and (field in named) == hasattr(method, field)


def test_presets() -> None:
    assert with_preset(KDIGA, "paper") == KDIGA(norm="per_sample", kl_reduction="batchmean")
    assert with_preset(KDIGA, "author_code") == KDIGA(norm="batch", kl_reduction="mean")
    assert with_preset(ARD, "author_code", attack=ATTACK) == ARD(ATTACK, kl_reduction="mean", target="adversarial")
    assert with_preset(KDIGA, "author_code", norm="per_sample", lambda_iga=5.0) == KDIGA(
        norm="per_sample", kl_reduction="mean", lambda_iga=5.0
    )
    with pytest.raises(ValueError, match="preset must be one of paper, author_code, got 'authors'"):
        with_preset(KDIGA, "authors")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: KD(lambda_ce=-1), "lambda_ce must not be negative, got -1"),
        (lambda: KD(lambda_kl=-0.5), "lambda_kl must not be negative"),
        (lambda: KDIGA(lambda_iga=-1), "lambda_iga must not be negative"),
        (lambda: KDIGA(lambda_iga=float("nan")), "lambda_iga must not be negative"),
        (lambda: IGAM(lambda_adv=-1), "lambda_adv must not be negative"),
        (lambda: IGAM(lambda_diff=-1), "lambda_diff must not be negative"),
        (lambda: RSLAD(ATTACK, lambda_clean=-1), "lambda_clean must not be negative"),
        (lambda: IAD(ATTACK, beta=-1), "beta must not be negative"),
        (lambda: IGDM(ATTACK, lambda_igdm=-1), "lambda_igdm must not be negative"),
        (lambda: SAAD(ATTACK, lambda_inner=-1), "lambda_inner must not be negative"),
        (lambda: TRADES(ATTACK, beta=-1), "beta must not be negative"),
        (lambda: KD(temperature=0), "temperature must be positive, got 0"),
        (lambda: ARD(ATTACK, temperature=-2), "temperature must be positive"),
        (lambda: KDIGA(norm="l2"), "norm must be one of per_sample, batch, got 'l2'"),
        (lambda: KDIGA_ARD_C(ATTACK, norm="l2"), "norm must be one of"),
        (lambda: KD(kl_reduction="sum"), "kl_reduction must be one of batchmean, mean, got 'sum'"),
        (lambda: ARD(ATTACK, target="dirty"), "target must be one of clean, adversarial, got 'dirty'"),
        (lambda: KDIGA(attack=PGD(0.1, 0.05, 2)), "its attack must have one step, got 2"),
        (lambda: TRADES(FGSM(0.1)), "TRADES needs an attack with a random start"),
        (lambda: TRADES(PGD(0.1, 0.1, 1, random_start=False)), "TRADES needs an attack with a random start"),
    ],
)
def test_bad_settings_are_refused(build: Callable[[], Method], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("name", METHODS)
def test_only_a_method_with_weights_of_its_own_is_bound_to_something_else(name: str) -> None:
    method = example(METHODS[name])
    bound = method.bind((1, 4, 4), CPU)
    if METHODS[name] is IGAM:
        assert isinstance(bound, nn.Module) and len(list(bound.parameters())) > 0
    else:
        assert bound is method


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (2, 5, 7)])
def test_igams_discriminator_takes_images_of_any_size(shape: tuple[int, int, int]) -> None:
    bound = IGAM().bind(shape, CPU)
    assert isinstance(bound, nn.Module)
    logits = bound.get_submodule("discriminator")(torch.zeros(3, *shape))
    assert logits.shape == (3, 1)


def unit(gradient: Tensor) -> Tensor:
    return gradient / gradient.square().sum((1, 2, 3), keepdim=True).sqrt()


def test_igam_is_its_formula(student: nn.Module, teacher: nn.Module, batch: Split) -> None:
    bound = game(IGAM(lambda_ce=0.7, lambda_adv=0.3, lambda_diff=2.0))
    terms = terms_of(bound, student, teacher, batch)
    g_student, g_teacher = pixel_gradient(student, *batch), pixel_gradient(teacher, *batch)
    judge = bound.get_submodule("discriminator")
    real, fake = judge(unit(g_teacher)), judge(unit(g_student))
    expected = {
        "cross_entropy": 0.7 * mean_cross_entropy(student(batch.images), batch.labels),
        "adversarial": 0.3
        * (
            binary_cross_entropy_with_logits(real, torch.ones_like(real))
            + binary_cross_entropy_with_logits(fake, torch.zeros_like(fake))
        ),
        "difference": 2 * (g_student - g_teacher).square().sum((1, 2, 3)).mean(),
    }
    assert list(terms) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-9, atol=1e-12)


def test_igams_players_pull_the_adversarial_term_apart(student: nn.Module, teacher: nn.Module, batch: Split) -> None:
    """One descent on the sum: the discriminator's share of it lowers L_adv, the student's raises it."""
    bound = game(IGAM(lambda_ce=0, lambda_adv=1, lambda_diff=0))

    def value(student: nn.Module, bound: nn.Module) -> float:
        return terms_of(bound, student, teacher, batch)["adversarial"].item()

    def stepped(net: nn.Module, gradients: tuple[Tensor, ...], rate: float) -> nn.Module:
        moved = deepcopy(net)
        with torch.no_grad():
            for parameter, gradient in zip(moved.parameters(), gradients, strict=True):
                parameter -= rate * gradient
        return moved

    total = torch.stack(list(terms_of(bound, student, teacher, batch).values())).sum()
    players = [*student.parameters(), *bound.parameters()]
    gradients = torch.autograd.grad(total, players)
    of_student, of_judge = gradients[: len(list(student.parameters()))], gradients[len(list(student.parameters())) :]
    here = value(student, bound)
    for share, change in (
        (of_judge, value(student, stepped(bound, of_judge, 1e-6)) - here),
        (of_student, value(stepped(student, of_student, 1e-6), bound) - here),
    ):
        slope = sum(gradient.square().sum().item() for gradient in share)
        assert slope > 0
        sign = -1 if share is of_judge else 1
        assert change / 1e-6 == pytest.approx(sign * slope, rel=1e-3)


def test_a_known_teacher_answers_as_the_net_does():
    """From its table for the images it was given, in any order and batch; through the net for all others."""
    torch.manual_seed(0)
    net = build_model("digits_small", num_classes=10, image_shape=(1, 8, 8)).eval().requires_grad_(False)
    images, labels = torch.rand(10, 1, 8, 8), torch.arange(10)
    known = CachedTeacher(net, images, labels, batch_size=4)
    order = torch.tensor([7, 2, 2, 9])
    rows = known.rows(images[order])
    assert rows is not None and rows.tolist() == order.tolist()
    assert known.rows(images[order] + 1e-6) is None
    gradient, logits = input_gradient(net, images, labels)
    assert torch.allclose(known.logits, logits, atol=1e-6)
    assert torch.allclose(known.gradients, gradient, atol=1e-6)


@pytest.mark.parametrize("shown", [True, False], ids=["known images", "other images"])
def test_a_known_teacher_changes_no_term(shown: bool):
    torch.manual_seed(0)
    student, net = (build_model("digits_small", num_classes=10, image_shape=(1, 8, 8)) for _ in range(2))
    net.eval().requires_grad_(False)
    images, labels = torch.rand(12, 1, 8, 8), torch.arange(12) % 10
    known = CachedTeacher(net, images, labels, batch_size=12)
    x = images if shown else (images + 0.01).clamp(max=1)
    # Another label than the table's changes the gradient that is asked for.
    for y in (labels, (labels + 1) % 10):
        with_table, without = KDIGA()(student, known, x, y), KDIGA()(student, net, x, y)
        for name, value in without.items():
            assert torch.allclose(with_table[name], value, rtol=1e-5), name


# ---- aligning all logits ----


def test_the_gradients_of_all_logits_are_the_centred_jacobian(student: nn.Module, batch: Split) -> None:
    found, logits = logit_gradients(student, batch.images)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda x: student(x[None])[0]))(batch.images)
    torch.testing.assert_close(found, jacobian - jacobian.mean(1, keepdim=True))
    torch.testing.assert_close(logits, student(batch.images).detach())
    assert not found.requires_grad and found.shape == (6, 5, 1, 4, 4)


def test_the_gradients_of_all_logits_determine_that_of_the_loss(student: nn.Module, batch: Split) -> None:
    x, y = batch
    every, logits = logit_gradients(student, x)
    weights = softmax(logits, dim=1) - nn.functional.one_hot(y, 5)
    torch.testing.assert_close((weights[:, :, None, None, None] * every).sum(1), input_gradient(student, x, y)[0])


@pytest.mark.parametrize("norm", ["per_sample", "batch"])
def test_aligning_all_logits_is_their_distance(norm: str, student: nn.Module, teacher: nn.Module, batch: Split) -> None:
    method = KDIGA(lambda_iga=3.0, norm=norm, align="logits")
    ours, theirs = (logit_gradients(net, batch.images)[0] for net in (student, teacher))
    terms = terms_of(method, student, teacher, batch)
    torch.testing.assert_close(terms["alignment"], 3 * gradient_distance(ours, theirs, norm))
    only = replace(method, align="loss")
    for name in ("cross_entropy", "distillation"):
        torch.testing.assert_close(terms[name], terms_of(only, student, teacher, batch)[name])


def test_aligned_logits_reach_every_weight_and_match_finite_differences(
    student: nn.Module, teacher: nn.Module, batch: Split
) -> None:
    method = KDIGA(lambda_ce=0, lambda_kl=0, lambda_iga=1, align="logits")
    total, gradients = total_and_gradients(method, student, teacher, batch)
    weight = student.get_parameter("conv.weight")
    with torch.no_grad():
        weight[0, 0, 0, 0] += 1e-6
        above = torch.stack(list(terms_of(method, student, teacher, batch).values())).sum()
    names = [name for name, _ in student.named_parameters()]
    slope = gradients[names.index("conv.weight")][0, 0, 0, 0]
    assert (above - total).item() / 1e-6 == pytest.approx(slope.item(), rel=1e-3, abs=1e-6)


def test_a_student_that_is_its_teacher_has_no_logits_to_align(teacher: nn.Module, batch: Split) -> None:
    method = KDIGA(lambda_ce=0, lambda_iga=1, align="logits")
    total, gradients = total_and_gradients(method, deepcopy(teacher), teacher, batch)
    assert total == 0 and all(gradient.isfinite().all() for gradient in gradients)


def test_two_classes_need_no_more_than_the_loss(tiny_net: Callable[..., nn.Module], batch: Split) -> None:
    """N = 2: the centred gradients are ±half of one difference, a multiple of the loss's gradient."""
    net, x = tiny_net(0, classes=2, dtype=torch.float64), batch.images
    y = batch.labels % 2
    every, logits = logit_gradients(net, x)
    share = softmax(logits, dim=1).gather(1, 1 - y[:, None])[:, :, None, None]
    own = every.gather(1, y[:, None, None, None, None].expand_as(every[:, :1])).squeeze(1)
    torch.testing.assert_close(-2 * share * own, input_gradient(net, x, y)[0])


def test_a_step_along_the_losss_gradient_cannot_align_logits() -> None:
    with pytest.raises(ValueError, match="align must be loss with an attack"):
        KDIGA(attack=FGSM(0.1), align="logits")
    with pytest.raises(ValueError, match="without an attack there is no perturbed image"):
        KDIGA(align_at="perturbed")
    with pytest.raises(ValueError, match="align must be one of loss, logits, got 'jacobian'"):
        KDIGA(align="jacobian")


class CountedReads(TorchDispatchMode):
    """Counts the reads of a value from a tensor, each of which waits for the device on a GPU."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", METHODS)
def test_no_step_reads_a_value_from_the_device(name: str, student: nn.Module, teacher: nn.Module, batch: Split) -> None:
    method = example(METHODS[name])
    bound = method.bind((1, 4, 4), torch.device("cpu")).double() if isinstance(method, IGAM) else method
    with CountedReads() as reads:
        terms = bound(student, teacher if method.needs_teacher else None, *batch)
        torch.stack(list(terms.values())).sum().backward()
    assert reads.number == 0
