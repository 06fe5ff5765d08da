"""Attacks: guarantees on a BatchNorm net in train mode, identities, and other libraries' attacks as oracles."""

import json
import logging
import random
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kdiga_nb.attacks import Attack, apgd, fab
from kdiga_nb.attacks.autoattack import MEMBERS, AutoAttack, AutoAttackReport
from kdiga_nb.attacks.gradient import FGSM, PGD, ball
from kdiga_nb.attacks.square import Square
from kdiga_nb.data import Data, Split
from kdiga_nb.losses import cross_entropy, input_gradient
from kdiga_nb.methods import ST
from kdiga_nb.metrics import accuracy
from kdiga_nb.numerics.scopes import frozen
from kdiga_nb.training import Schedule, train

# foolbox imports through a scipy namespace that SciPy has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:foolbox")

EPSILON = 0.3
TABLE: dict[str, Attack] = {
    "fgsm": FGSM(EPSILON),
    "pgd": PGD(EPSILON, EPSILON / 4, 6),
    "pgd from the image": PGD(EPSILON, EPSILON / 4, 6, random_start=False),
    "pgd restarted": PGD(EPSILON, EPSILON / 4, 3, restarts=3),
    "pgd with long steps": PGD(EPSILON, 3 * EPSILON, 3),
    "autoattack": AutoAttack(EPSILON),
}
SIGN_ATTACKS = {name: attack for name, attack in TABLE.items() if not isinstance(attack, AutoAttack)}


class Linear(nn.Module):
    """Logits linear in the pixels, so that the sign of every gradient is known and constant."""

    def __init__(self, pixels: int, classes: int, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(classes, pixels, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T


class Probabilities(nn.Module):
    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).softmax(1)


class Randomised(nn.Module):
    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + 0.05 * torch.randn_like(x))


class Dynamic(nn.Module):
    """Takes a gradient inside its forward pass, as a defence that optimises at test time does."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            image = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.net(image).sum(), image)
        return self.net(x + 0 * gradient)


class Masked(nn.Module):
    """Rounds the pixels to few levels, which hides the gradient from white-box attacks but nothing from Square."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net((8 * x).round() / 8)


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that an attack must leave alone, copied."""
    return {
        "modes": {name: module.training for name, module in model.named_modules()},
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "flags": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "grads": {name: deepcopy(parameter.grad) for name, parameter in model.named_parameters()},
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = state_of(model)
    assert after["modes"] == before["modes"] and after["flags"] == before["flags"]
    for kind in ("tensors", "grads"):
        for name, value in before[kind].items():
            assert value is None or torch.equal(after[kind][name], value), f"{kind} of {name}"


def generators() -> tuple[list[int], str, str]:
    """The state of every global generator."""
    return torch.get_rng_state().tolist(), repr(np.random.get_state()), repr(random.getstate())


def radius(x_adv: Tensor, x: Tensor) -> Tensor:
    """|δ| in double precision, in which the difference of two single-precision numbers of [0, 1] is exact."""
    return (x_adv.double() - x.double()).abs()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def busy_net(tiny_net: Callable[..., nn.Module], random_images: Callable[..., Split]) -> nn.Module:
    """In the middle of a training: train mode, but one frozen layer, moved buffers and gradients of the last step."""
    net = tiny_net(0, batch_norm=True, dropout=0.5).train()
    net.get_submodule("activation").eval()
    net.get_parameter("conv.bias").requires_grad_(False)
    x, y = random_images(8)
    cross_entropy(net(x), y).mean().backward()
    return net


@pytest.fixture
def easy(busy_net: nn.Module, random_images: Callable[..., Split]) -> Split:
    """Images that the net in eval mode classifies as labelled, some pixels at 0 and at 1."""
    x, _ = random_images(8, 1)
    x = (1.4 * x - 0.2).clamp(0, 1)
    with frozen(busy_net), torch.no_grad():
        return Split(x, busy_net(x).argmax(1))


@pytest.mark.parametrize("attack", TABLE.values(), ids=list(TABLE))
def test_every_attack_keeps_its_promises(attack: Attack, busy_net: nn.Module, easy: Split) -> None:
    x, y = easy
    before, world, images, labels = state_of(busy_net), generators(), x.clone(), y.clone()
    x.requires_grad_()
    x_adv = attack(busy_net, x, y, generator=seeded())
    assert x_adv.shape == x.shape and x_adv.dtype == x.dtype
    assert not x_adv.requires_grad and x_adv.is_leaf
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    assert radius(x_adv, images).max() <= EPSILON
    assert radius(x_adv, images).max() > 0.99 * EPSILON
    assert_unchanged(busy_net, before)
    assert generators() == world
    assert torch.equal(x.detach(), images) and torch.equal(y, labels) and x.grad is None
    with frozen(busy_net), torch.no_grad():
        assert cross_entropy(busy_net(x_adv), y).mean() > cross_entropy(busy_net(images), y).mean()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("attack", SIGN_ATTACKS.values(), ids=list(SIGN_ATTACKS))
def test_the_promises_hold_in_every_precision(attack: Attack, dtype: torch.dtype) -> None:
    net = Linear(16, 4).to(dtype)
    x = torch.rand(8, 1, 4, 4, generator=seeded()).to(dtype)
    x_adv = attack(net, x, torch.arange(8) % 4, generator=seeded())
    assert x_adv.dtype == dtype and x_adv.min() >= 0 and x_adv.max() <= 1
    assert 0.99 * EPSILON < radius(x_adv, x).max() <= EPSILON


@pytest.mark.parametrize("epsilon", [0.0, 1e-9, 1e-3, 2 / 255, 8 / 255, 0.1, 1 / 3, 0.7, 1.0])
def test_the_ball_is_the_largest_that_never_exceeds_its_radius(epsilon: float) -> None:
    x = torch.cat([torch.rand(20000, generator=seeded()), torch.tensor([0.0, 1.0, 1e-42, 1e-7, 1 - 2**-24, epsilon])])
    lower, upper = ball(x, epsilon)
    assert (lower >= 0).all() and (upper <= 1).all() and (lower <= x).all() and (x <= upper).all()
    assert radius(lower, x).max() <= epsilon and radius(upper, x).max() <= epsilon
    wider_up, wider_down = torch.nextafter(upper, torch.tensor(2.0)), torch.nextafter(lower, torch.tensor(-1.0))
    assert ((radius(wider_up, x) > epsilon) | (wider_up > 1)).all()
    assert ((radius(wider_down, x) > epsilon) | (wider_down < 0)).all()


def test_the_ball_survives_where_rounding_alone_would_leave_it() -> None:
    x = torch.rand(20000, generator=seeded())
    naive = x + 8 / 255
    assert (radius(naive, x)[naive <= 1] > 8 / 255).any()
    assert radius(ball(x, 8 / 255)[1], x).max() <= 8 / 255


def test_frozen_restores_even_after_an_error(busy_net: nn.Module) -> None:
    before = state_of(busy_net)
    with pytest.raises(KeyboardInterrupt), frozen(busy_net):
        assert not any(module.training for module in busy_net.modules())
        assert not any(parameter.requires_grad for parameter in busy_net.parameters())
        raise KeyboardInterrupt
    assert_unchanged(busy_net, before)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 10])
def test_each_step_is_as_long_as_step_size_and_the_ball_as_wide_as_epsilon(steps: int) -> None:
    """On a two-class linear net the gradient's sign never changes; the two sizes swapped would show at every count."""
    net, epsilon, step_size = Linear(16, 2), 0.1, 0.03
    x = 0.3 + 0.4 * torch.rand(8, 1, 4, 4, generator=seeded())
    y = torch.arange(8) % 2
    x_adv = PGD(epsilon, step_size, steps, random_start=False)(net, x, y)
    expected = min(steps * step_size, epsilon)
    torch.testing.assert_close(radius(x_adv, x), torch.full(x.shape, expected).double(), rtol=0, atol=1e-6)
    uphill = (net.weight[1 - y] - net.weight[y]).sign().reshape(x.shape)
    assert torch.equal((x_adv - x).sign(), uphill)


def test_pgd_fills_the_ball_from_a_random_start() -> None:
    net, x, y = Linear(16, 2), 0.3 + 0.4 * torch.rand(8, 1, 4, 4, generator=seeded()), torch.arange(8) % 2
    x_adv = PGD(0.1, 0.02, 10)(net, x, y, generator=seeded())
    assert radius(x_adv, x).min() >= 0.1 - 1e-7


def test_a_random_start_is_uniform_in_the_ball() -> None:
    x = torch.full((500, 1, 4, 4), 0.5)
    delta = (PGD(0.2, 0.1, 1).start(x, generator=seeded()) - x).flatten() / 0.2
    counts = torch.histc(delta, 10, -1, 1)
    assert delta.abs().max() <= 1 + 1e-6
    assert counts.sum() == 8000 and counts.min() > 650 and counts.max() < 950


@pytest.mark.parametrize("attack", SIGN_ATTACKS.values(), ids=list(SIGN_ATTACKS))
def test_radius_zero_returns_the_images(attack: Attack, busy_net: nn.Module, easy: Split) -> None:
    nothing = replace(attack, epsilon=0.0)
    assert torch.equal(nothing(busy_net, *easy, generator=seeded()), easy.images)


def test_radius_zero_leaves_autoattack_nothing_to_find() -> None:
    net, x = Linear(16, 4), torch.rand(2, 1, 4, 4, generator=seeded())
    y = net(x).argmax(1)
    assert torch.equal(AutoAttack(0.0)(net, x, y), x)


def test_fgsm_is_the_first_step_of_pgd(busy_net: nn.Module, easy: Split) -> None:
    first = PGD(EPSILON, EPSILON, 1, random_start=False)(busy_net, *easy)
    assert torch.equal(FGSM(EPSILON)(busy_net, *easy), first)


def test_fgsm_steps_along_the_sign_of_the_input_gradient(busy_net: nn.Module, easy: Split) -> None:
    x, y = easy
    with frozen(busy_net):
        gradient, _ = input_gradient(busy_net, x, y)
    expected = (x + EPSILON * gradient.sign()).clamp(0, 1)
    torch.testing.assert_close(FGSM(EPSILON)(busy_net, x, y), expected, rtol=0, atol=1e-7)


def test_start_and_step_compose_to_the_attack(busy_net: nn.Module, easy: Split) -> None:
    x, y = easy
    attack = PGD(EPSILON, EPSILON / 3, 4)
    x_adv = attack.start(x, generator=seeded())
    with frozen(busy_net):
        for _ in range(attack.steps):
            x_adv = attack.step(x_adv, input_gradient(busy_net, x_adv, y)[0], x)
    assert torch.equal(attack(busy_net, x, y, generator=seeded()), x_adv)


@pytest.mark.parametrize("attack", [TABLE["pgd"], TABLE["pgd restarted"]], ids=["pgd", "pgd restarted"])
def test_the_generator_decides_the_random_start(attack: Attack, busy_net: nn.Module, easy: Split) -> None:
    first, second, other = (attack(busy_net, *easy, generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        assert torch.equal(attack(busy_net, *easy), first)


@pytest.mark.parametrize("attack", [FGSM(0.1), PGD(0.1, 0.02, 5), PGD(0.1, 0.02, 3, restarts=3)], ids=repr)
def test_robust_accuracy_does_not_rise_with_the_radius(attack: PGD | FGSM, trained: nn.Module, digits: Data) -> None:
    x, y = (part[:200] for part in digits.test)
    figures = [accuracy(trained, x, y).percent]
    for epsilon in (0.0, 0.03, 0.06, 0.12, 0.24):
        sizes = {"epsilon": epsilon} | ({"step_size": epsilon / 4} if isinstance(attack, PGD) else {})
        figures.append(accuracy(trained, x, y, attack=replace(attack, **sizes)).percent)
    assert figures == sorted(figures, reverse=True)
    assert figures[0] == figures[1] > 80 and figures[-1] < 40


def test_robust_accuracy_does_not_rise_with_restarts(trained: nn.Module, digits: Data) -> None:
    x, y = digits.test
    attack = PGD(0.15, 0.15, 1)
    survivors = []
    for restarts in (1, 2, 8):
        x_adv = replace(attack, restarts=restarts)(trained, x, y, generator=seeded())
        survivors.append(trained(x_adv).argmax(1) == y)
    # The restarts draw from one generator in turn, so more of them only ever add to those before.
    assert all((later <= earlier).all() for earlier, later in pairwise(survivors))
    assert survivors[0].sum() > survivors[-1].sum() > 0


@pytest.mark.parametrize("epsilon", [0.05, 0.1])
def test_restarts_keep_the_first_success_or_else_the_highest_loss(
    epsilon: float, trained: nn.Module, digits: Data
) -> None:
    """One image at a time, the restarts of one attack are the attacks of one start that share its generator."""
    single = PGD(epsilon, epsilon, 1)
    fooled = 0
    for x, y in zip(digits.test.images[:40, None], digits.test.labels[:40, None], strict=True):
        generator = seeded()
        tries = [single(trained, x, y, generator=generator) for _ in range(5)]
        successes = [x_adv for x_adv in tries if trained(x_adv).argmax() != y]
        highest = max(tries, key=lambda x_adv, y=y: cross_entropy(trained(x_adv), y).item())
        expected = successes[0] if successes else highest
        assert torch.equal(replace(single, restarts=5)(trained, x, y, generator=seeded()), expected)
        fooled += len(successes) > 0
    assert 0 < fooled < 40


def test_a_success_counts_more_than_a_higher_loss() -> None:
    """Left of 0.5 the net is right and unsure, right of it wrong and sure of the true class as well: a lower loss."""

    class Step(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            pixel = x[:, 0, 0, 0, None]
            unsure, wrong = torch.tensor([0.34, 0.33, 0.33]).log(), torch.tensor([0.45, 0.54, 0.01]).log()
            return torch.where(pixel < 0.5, unsure, wrong) + 0 * pixel

    x, y = torch.full((50, 1, 1, 1), 0.5), torch.zeros(50, dtype=torch.long)
    x_adv = PGD(0.1, 0.0, 1, restarts=20)(Step(), x, y, generator=seeded())
    assert (x_adv >= 0.5).all()


def test_foolbox_takes_the_same_fast_gradient_step(trained: nn.Module, digits: Data) -> None:
    import foolbox

    x, y = (part[:100] for part in digits.test)
    oracle = foolbox.attacks.LinfFastGradientAttack()
    theirs = oracle.run(foolbox.PyTorchModel(trained, bounds=(0, 1), device="cpu"), x, y, epsilon=0.1)
    torch.testing.assert_close(FGSM(0.1)(trained, x, y), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("epsilon", "step_size", "steps"), [(0.1, 0.02, 10), (8 / 255, 2 / 255, 7), (0.2, 0.3, 5)])
@pytest.mark.parametrize("random_start", [False, True])
def test_foolbox_finds_the_same_images_from_the_same_start(
    epsilon: float, step_size: float, steps: int, random_start: bool, trained: nn.Module, digits: Data
) -> None:
    import eagerpy
    import foolbox

    x, y = (part[:100] for part in digits.test)
    attack = PGD(epsilon, step_size, steps, random_start=random_start)

    class Oracle(foolbox.attacks.LinfPGD):
        def get_random_start(self, x0: Any, epsilon: float) -> Any:
            return eagerpy.astensor(attack.start(x, generator=seeded()))

    oracle = Oracle(abs_stepsize=step_size, steps=steps, random_start=random_start)
    theirs = oracle.run(foolbox.PyTorchModel(trained, bounds=(0, 1), device="cpu"), x, y, epsilon=epsilon)
    torch.testing.assert_close(attack(trained, x, y, generator=seeded()), theirs, rtol=0, atol=1e-5)


GOOD_IMAGES, GOOD_LABELS = torch.full((3, 1, 4, 4), 0.5), torch.tensor([0, 1, 3])


@pytest.mark.parametrize("attack", [FGSM(0.1), PGD(0.1, 0.1, 1), AutoAttack(0.1)], ids=["fgsm", "pgd", "autoattack"])
@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (GOOD_IMAGES - 0.6, GOOD_LABELS, r"images must lie in \[0, 1\], got values from -0.1"),
        (GOOD_IMAGES + 0.6, GOOD_LABELS, r"images must lie in \[0, 1\], got values from 1.1"),
        (GOOD_IMAGES * 255, GOOD_LABELS, r"images must lie in \[0, 1\]"),
        (GOOD_IMAGES * float("nan"), GOOD_LABELS, r"images must lie in \[0, 1\]"),
        (GOOD_IMAGES.long(), GOOD_LABELS, "images must be a float tensor"),
        (GOOD_IMAGES[0], GOOD_LABELS, "images must be a float tensor"),
        (GOOD_IMAGES[:0], GOOD_LABELS[:0], "there are no images"),
        (GOOD_IMAGES, GOOD_LABELS[:2], r"labels must be integers of shape \(3,\)"),
        (GOOD_IMAGES, GOOD_LABELS[:, None], r"labels must be integers of shape \(3,\)"),
        (GOOD_IMAGES, GOOD_LABELS.float(), r"labels must be integers of shape \(3,\)"),
        (GOOD_IMAGES, GOOD_LABELS + 1, "labels must lie in 0 … 3, got values from 1 to 4"),
        (GOOD_IMAGES, GOOD_LABELS - 1, "labels must lie in 0 … 3, got values from -1 to 2"),
    ],
)
def test_bad_images_and_labels_are_refused(attack: Attack, images: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attack(Linear(16, 4), images, labels)


@pytest.mark.parametrize(
    ("version", "member", "fewest"), [("standard", "apgd-t", 4), ("apgd", "apgd-t", 4), ("rand", "apgd-dlr", 3)]
)
def test_autoattack_refuses_nets_of_too_few_classes(version: str, member: str, fewest: int) -> None:
    attack, labels = AutoAttack(0.1, version), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"{member} compares {fewest} logits, the net has {fewest - 1}"):
        attack(Linear(16, fewest - 1), GOOD_IMAGES, labels)
    assert attack.evaluate(Linear(16, fewest), GOOD_IMAGES, labels).robust.shape == (3,)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        *[
            (lambda e=epsilon, kind=kind: kind(e), "epsilon must be in")
            for kind in (FGSM, AutoAttack, lambda e: PGD(e, 0.1, 1))
            for epsilon in (-0.1, 8.0, float("nan"))
        ],
        (lambda: PGD(0.1, -0.1, 1), "step_size must not be negative"),
        (lambda: PGD(0.1, float("nan"), 1), "step_size must not be negative"),
        (lambda: PGD(0.1, 0.1, 0), "steps and restarts must be at least 1"),
        (lambda: PGD(0.1, 0.1, 1, restarts=0), "steps and restarts must be at least 1"),
        (lambda: AutoAttack(0.1, version="plus"), "version must be one of standard, rand, apgd, square, got 'plus'"),
    ],
)
def test_bad_settings_are_refused(build: Callable[[], Attack], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


class Forwards:
    """Counts a net's forward passes, and optionally stops one."""

    def __init__(self, model: nn.Module, stop_when: Callable[[], bool] = lambda: False):
        self.model, self.stop_when, self.count = model, stop_when, 0

    def _before(self, *_: Any) -> None:
        if self.stop_when():
            raise KeyboardInterrupt
        self.count += 1

    def __enter__(self) -> "Forwards":
        self.handle = self.model.register_forward_pre_hook(self._before)
        return self

    def __exit__(self, *_: Any) -> None:
        self.handle.remove()


class Percents(logging.Handler):
    """The library's running robust accuracy, as it logs it."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message.startswith("robust accuracy after"):
            self.found.append(message.split(": ")[1].split(" ")[0])


class Library(NamedTuple):
    """What the library finds when it runs the whole standard version by itself."""

    images: Tensor
    robust: Tensor
    percents: list[str]
    forwards: int


def run_library(model: nn.Module, x: Tensor, y: Tensor, epsilon: float) -> Library:
    import pyautoattack

    logger, percents = logging.getLogger("auto-attack"), Percents()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(percents)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        with Forwards(model) as forwards, torch.random.fork_rng(), frozen(model):
            library = pyautoattack.AutoAttack(model, eps=epsilon, seed=0, version="standard")
            images, labels = library.run_standard_evaluation(x, y)
    finally:
        logger.removeHandler(percents)
        logger.setLevel(level)
        logger.propagate = propagate
    return Library(images, labels == y, percents.found, forwards.count)


class Case(NamedTuple):
    """A finished evaluation: what was attacked, and what came out."""

    attack: AutoAttack
    model: nn.Module
    images: Tensor
    labels: Tensor
    report: AutoAttackReport
    found: Tensor
    state: str
    forwards: int


def run_case(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, state: Path) -> Case:
    attack, found = AutoAttack(epsilon), x.clone()
    with Forwards(model) as forwards:
        report = attack.evaluate(model, x, y, state=state, found=found)
    return Case(attack, model, x, y, report, found, state.read_text(), forwards.count)


@pytest.fixture(scope="module")
def case(tiny_net: Callable[..., nn.Module], digits: Data, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Twenty digits and a weakly trained net, at a radius where members disagree and some images survive them all."""
    net = tiny_net(0, side=8, classes=10)
    train(net, ST(), digits, Schedule(4, policy="one_cycle", augment=False), device="cpu")
    x, y = (part[:20] for part in digits.test)
    return run_case(net, x, y, 0.15, tmp_path_factory.mktemp("autoattack") / "state.json")


@pytest.fixture(scope="module")
def library(case: Case) -> Library:
    return run_library(case.model, case.images, case.labels, case.attack.epsilon)


@pytest.fixture(scope="module")
def masked(
    tiny_net: Callable[..., nn.Module],
    random_images: Callable[..., Split],
    tmp_path_factory: pytest.TempPathFactory,
) -> Case:
    """A net without gradients: every member finds something, and what it finds depends on its random draws."""
    net, (x, _) = Masked(tiny_net(0, gain=3.0)).eval(), random_images(20)
    return run_case(net, x, net(x).argmax(1).detach(), 0.3, tmp_path_factory.mktemp("masked") / "state.json")


def test_autoattack_and_its_library_agree_on_every_image(case: Case, library: Library) -> None:
    assert 0 < case.report.robust.sum() < case.report.survivors["apgd-ce"].sum() < case.report.survivors["clean"].sum()
    assert torch.equal(case.report.robust, library.robust)
    assert torch.equal(case.model(case.found).argmax(1) == case.labels, library.robust)


def test_autoattack_and_its_library_agree_after_every_member(case: Case, library: Library) -> None:
    members = list(case.report.survivors.values())[1:]
    assert [f"{mask.double().mean().item():.2%}" for mask in members] == library.percents


def test_the_standard_version_is_the_librarys_own(
    case: Case, library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Restarts and queries show in the number of forward passes; ours adds a few checks before each member."""
    monkeypatch.setattr("kdiga_nb.attacks.autoattack._repeats", lambda model, x: False)  # the library's own members
    theirs = run_case(case.model, case.images, case.labels, case.attack.epsilon, tmp_path / "state.json")
    assert abs(theirs.forwards - library.forwards) < 60
    assert case.forwards < theirs.forwards - 2000
    assert torch.equal(case.report.robust, theirs.report.robust)


class Between(nn.Module):
    """A net in float64 for a library that works in float32."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.double()).float()


def bent(seed: int, channels: int = 1, images: int = 40) -> tuple[nn.Module, Tensor, Tensor]:
    """A smooth net of five classes of about equal size in float64, images and the net's own labels."""
    x = torch.rand(images, channels, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Flatten(), nn.Linear(16 * channels, 16), nn.Tanh(), last := nn.Linear(16, 5)).double()
    with torch.no_grad():
        last.bias -= net(x).mean(0)
        return net, x, net(x).argmax(1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("radius", [0.03, 0.08])
@pytest.mark.parametrize("rows", [1, 100, 10_000])
def test_apgd_and_fab_give_the_librarys_verdicts(
    seed: int, radius: float, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one target per batch APGD-T makes the library's draws; with several it starts elsewhere."""
    from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
    from pyautoattack.fab_pt import FABAttack_PT

    monkeypatch.setattr(apgd, "ROWS", rows)
    monkeypatch.setattr(fab, "ROWS", rows)
    net, x, y = bent(seed)
    x = x.float().double()  # the library's own precision
    wide = Between(net)
    theirs = {
        "apgd-ce": APGDAttack(wide, eps=radius, seed=0, device="cpu"),
        "apgd-t": APGDAttack_targeted(wide, eps=radius, seed=0, n_target_classes=4, device="cpu"),
        "fab-t": FABAttack_PT(wide, eps=radius, seed=0, targeted=True, n_target_classes=4, device="cpu"),
    }
    ours = {
        "apgd-ce": apgd.APGD(net, radius),
        "apgd-t": apgd.APGD(net, radius, 4),
        "fab-t": fab.FAB(net, radius, 4),
    }
    with frozen(net), torch.random.fork_rng():
        for name, attack in ours.items():
            x_adv = attack.perturb(x, y)
            fooled = net(x_adv).argmax(1) != y
            assert (x_adv - x).abs().max() <= radius + 1e-12
            assert 0 < fooled.sum() < len(x)
            assert torch.equal(x_adv[~fooled], x[~fooled])
            assert torch.equal(fooled, wide(theirs[name].perturb(x.float(), y)).argmax(1) != y), name


@pytest.mark.parametrize("seed", range(3))
def test_the_projection_is_the_librarys(seed: int) -> None:
    from pyautoattack.fab_projections import projection_linf

    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(60, 12, generator=generator, dtype=torch.float64)
    normal = torch.randn(60, 12, generator=generator, dtype=torch.float64)
    normal[:, 0] = 0
    offset = (normal * x).sum(1) + 3 * torch.randn(60, generator=generator, dtype=torch.float64)
    move = fab.projection(x, normal, offset)
    torch.testing.assert_close(move, projection_linf(x, normal, offset), rtol=0, atol=1e-9)
    assert ((x + move) >= -1e-12).all() and ((x + move) <= 1 + 1e-12).all()
    reached = (normal * (x + move)).sum(1)
    assert 0 < torch.isclose(reached, offset).sum() < 60  # where the plane crosses the cube, and where it does not


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("channels", [1, 3])
def test_square_finds_the_librarys_images_with_fewer_questions(channels: int, seed: int) -> None:
    """In float64, where the size of a batch does not decide which of two squares is better."""
    from pyautoattack.square import SquareAttack

    (net, x, y), epsilon = bent(seed, channels), 0.08
    with Forwards(net) as theirs:
        library = SquareAttack(
            net, p_init=0.8, n_queries=3000, eps=epsilon, norm="Linf", seed=seed, resc_schedule=False
        )
        expected = library.perturb(x, y)
    with Forwards(net) as ours:
        square = Square(net, epsilon, queries=3000)
        square.seed = seed
        found = square.perturb(x, y)
    assert torch.equal(found, expected)
    assert 0 < (found != x).flatten(1).any(1).sum() < len(x)
    assert ours.count < 0.7 * theirs.count


@pytest.mark.parametrize("which", ["case", "masked"])
def test_the_survivors_are_nested_in_the_order_of_the_members(which: str, request: pytest.FixtureRequest) -> None:
    found: Case = request.getfixturevalue(which)
    assert list(found.report.survivors) == ["clean", *MEMBERS["standard"]]
    masks = list(found.report.survivors.values())
    assert torch.equal(masks[0], found.model(found.images).argmax(1) == found.labels)
    assert all((later <= earlier).all() for earlier, later in pairwise(masks))
    assert torch.equal(found.report.robust, masks[-1])


@pytest.mark.parametrize("which", ["case", "masked"])
def test_found_images_are_the_proof(which: str, request: pytest.FixtureRequest) -> None:
    found: Case = request.getfixturevalue(which)
    survivors = found.report.robust
    fooled = found.model(found.found).argmax(1) != found.labels
    assert torch.equal(fooled, ~survivors) and fooled.any()
    assert torch.equal(found.found[survivors], found.images[survivors])
    assert radius(found.found, found.images).max() <= found.attack.epsilon
    assert found.found.min() >= 0 and found.found.max() <= 1


def test_an_interrupted_evaluation_goes_on_behind_its_last_member(masked: Case, tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    torch.manual_seed(123)
    tracer, world, handlers = sys.gettrace(), generators(), list(logging.getLogger("auto-attack").handlers)
    with pytest.raises(KeyboardInterrupt), Forwards(masked.model, stop_when=state.exists) as first:
        masked.attack.evaluate(masked.model, masked.images, masked.labels, state=state)
    assert list(json.loads(state.read_text())["survivors"]) == ["clean", "apgd-ce"]
    assert sys.gettrace() is tracer and generators() == world
    assert logging.getLogger("auto-attack").handlers == handlers
    with Forwards(masked.model) as second:
        report = masked.attack.evaluate(masked.model, masked.images, masked.labels, state=state)
    assert report.flags == masked.report.flags
    assert list(report.survivors) == list(masked.report.survivors)
    assert all(torch.equal(report.survivors[name], mask) for name, mask in masked.report.survivors.items())
    # Nothing runs twice but the check of the inputs.
    assert first.count + second.count == masked.forwards + 1


def test_a_finished_evaluation_is_read_back_without_an_attack(masked: Case, tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    state.write_text(masked.state)
    with Forwards(masked.model) as forwards:
        report = masked.attack.evaluate(masked.model, masked.images, masked.labels, state=state)
    assert forwards.count == 1
    assert report.flags == masked.report.flags
    assert all(torch.equal(report.survivors[name], mask) for name, mask in masked.report.survivors.items())


def test_the_state_of_another_evaluation_is_refused(masked: Case, tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    state.write_text(masked.state)
    with pytest.raises(ValueError, match="state of another evaluation"):
        masked.attack.evaluate(masked.model, masked.images[:5], masked.labels[:5], state=state)


def test_another_seed_finds_other_images(masked: Case) -> None:
    other = replace(masked.attack, seed=1)(masked.model, masked.images, masked.labels)
    assert not torch.equal(other, masked.found)


def test_masked_gradients_are_flagged_by_what_square_finds(masked: Case) -> None:
    assert masked.report.survivors["square"].sum() < masked.report.survivors["fab-t"].sum()
    assert any("zero gradient" in flag for flag in masked.report.flags)
    assert any(flag.startswith("Square lowered the robust accuracy by") for flag in masked.report.flags)
    assert len(set(masked.report.flags)) == len(masked.report.flags)


@pytest.fixture
def fragile(tiny_net: Callable[..., nn.Module], random_images: Callable[..., Split]) -> tuple[nn.Module, Split]:
    """A net and images that fall to the first member at the radius of these tests, so that an evaluation is cheap."""
    net, (x, _) = tiny_net(0, gain=3.0).eval(), random_images(6)
    return net, Split(x, net(x).argmax(1).detach())


def test_autoattack_leaves_the_process_as_it_was(fragile: tuple[nn.Module, Split]) -> None:
    net, (x, y) = fragile
    before, world, calls = state_of(net), generators(), []

    def tracer(frame: Any, event: str, argument: Any) -> None:
        calls.append(event)

    previous = sys.gettrace()
    sys.settrace(tracer)
    try:
        report = AutoAttack(0.5).evaluate(net, x, y)
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(previous)
    assert calls and not report.robust.any()
    assert_unchanged(net, before)
    assert generators() == world


class Precise(nn.Module):
    """A net that notes the precision of matrix products at each call with a batch."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net, self.seen = net, set[str]()

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 1:
            self.seen.add(torch.get_float32_matmul_precision())
        return self.net(x)


def test_autoattack_searches_in_full_precision(fragile: tuple[nn.Module, Split]) -> None:
    net, (x, y) = fragile
    seen: dict[str, set[str]] = {}
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        for name, attack in {"autoattack": AutoAttack(0.1, "apgd"), "pgd": PGD(0.1, 0.1, 2)}.items():
            noting = Precise(net).eval()
            attack(noting, x, y)
            seen[name] = noting.seen
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert "high" in seen["pgd"] and seen["autoattack"] == {"highest"}


def test_autoattack_counts_wrong_images_as_not_robust_and_leaves_them(fragile: tuple[nn.Module, Split]) -> None:
    net, (x, y) = fragile
    wrong = (y + 1) % 5
    found = x.clone()
    report = AutoAttack(0.3).evaluate(net, x, wrong, found=found)
    assert not any(mask.any() for mask in report.survivors.values())
    assert torch.equal(found, x)


@pytest.mark.parametrize(
    ("wrap", "flag"),
    [(Probabilities, "probability distribution"), (Randomised, "randomized defense")],
)
def test_a_suspicious_net_is_flagged(
    wrap: Callable[[nn.Module], nn.Module], flag: str, fragile: tuple[nn.Module, Split]
) -> None:
    net, (x, y) = fragile
    torch.manual_seed(0)
    assert AutoAttack(0.5).evaluate(net, x, y).flags == []
    flags = AutoAttack(0.5).evaluate(wrap(net).eval(), x, y).flags
    assert sum(flag in text for text in flags) == 1


def test_the_rand_version_takes_a_randomised_net_as_it_is(fragile: tuple[nn.Module, Split]) -> None:
    net, (x, y) = fragile
    torch.manual_seed(0)
    report = AutoAttack(0.5, version="rand").evaluate(Randomised(net).eval(), x, y)
    assert list(report.survivors) == ["clean", *MEMBERS["rand"]]
    assert report.flags == [] and report.robust.sum() < report.survivors["clean"].sum()


def test_a_dynamic_net_is_flagged_and_the_flag_does_not_stick(fragile: tuple[nn.Module, Split]) -> None:
    net, (x, y) = fragile
    assert any("dynamic defense" in flag for flag in AutoAttack(0.5).evaluate(Dynamic(net).eval(), x, y).flags)
    assert AutoAttack(0.5).evaluate(net, x, y).flags == []


def test_autoattack_on_a_net_with_another_memory_layout() -> None:
    """A channels-last net gives gradients in its own order, which the library's checks cannot take."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(64, 10)).requires_grad_(False)
    x = torch.rand(6, 3, 6, 6)
    y = net(x).argmax(1)
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        net.to(memory_format=layout)  # pyright: ignore[reportCallIssue] (missing in the stubs)
        found.append(AutoAttack(0.01).evaluate(net, x, y))
    assert found[0].survivors.keys() == found[1].survivors.keys()
    assert found[0].robust.any() and found[0].robust.tolist() == found[1].robust.tolist()
