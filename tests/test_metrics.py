"""Accuracy on nets with known answers, local linearity against closed forms and grids, the bound of Proposition 2."""

import json
import math
import subprocess
import sys
import weakref
from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist

import pytest
import torch
from torch import Tensor, nn

from kdiga_nb.attacks import Attack
from kdiga_nb.attacks.autoattack import AutoAttack
from kdiga_nb.attacks.gradient import FGSM, PGD
from kdiga_nb.attacks.losses import LossPGD
from kdiga_nb.data import Data, Split
from kdiga_nb.losses import cross_entropy
from kdiga_nb.measures import Bounds, Measure, TestAccuracy, first_images
from kdiga_nb.metrics import accuracy, bound_terms, local_linearity, measured_gap, proportion
from kdiga_nb.numerics import batches
from kdiga_nb.numerics.batches import batch_that_fits, in_batches
from kdiga_nb.numerics.memory import is_out_of_memory
from kdiga_nb.paths import ROOT

Nets = tuple[nn.Module, nn.Module]


class ReadsFirstPixel(nn.Module):
    """Answers with ten times the first pixel, rounded."""

    def forward(self, x: Tensor) -> Tensor:
        return -((10 * x[:, 0, 0, 0, None] - torch.arange(10)) ** 2)


class Loss(nn.Module):
    """A two-class net whose cross-entropy for label 0 is 100 + ``height(x)``, to rounding: log(1 + e^-100) vanishes."""

    def __init__(self, height: Callable[[Tensor], Tensor]):
        super().__init__()
        self.height = height

    def forward(self, x: Tensor) -> Tensor:
        height = self.height(x.flatten(1))
        return torch.stack([torch.zeros_like(height), 100 + height], dim=1)


class Perceptron(nn.Module):
    """Two pixels, one curved hidden layer, three classes, in double precision."""

    def __init__(self, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = 4 * torch.randn(2, 8, generator=generator, dtype=torch.float64)
        self.second = torch.randn(8, 3, generator=generator, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) @ self.first - 1).tanh() @ self.second


@pytest.fixture
def nets(tiny_net: Callable[..., nn.Module]) -> Nets:
    return tiny_net(0, gain=3.0).eval(), tiny_net(1, gain=3.0).eval()


@pytest.fixture
def data(random_images: Callable[..., Split]) -> Data:
    split = random_images(100)
    return Data("random", split, split, num_classes=5, validation_size=0)


@pytest.mark.parametrize(("correct", "n"), [(0, 10), (10, 10), (1, 3), (7, 10), (250, 500), (9999, 10000)])
def test_the_interval_is_wilsons(correct: int, n: int) -> None:
    z, p = NormalDist().inv_cdf(0.975), correct / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    found = proportion(correct, n)
    assert (found.percent, found.n) == (100 * correct / n, n)
    assert found.low == pytest.approx(100 * (centre - half), abs=1e-9)
    assert found.high == pytest.approx(100 * (centre + half), abs=1e-9)
    assert 0 <= found.low <= found.percent <= found.high <= 100


@pytest.mark.parametrize("batch_size", [1, 3, 10, 500])
def test_accuracy_of_known_answers(batch_size: int) -> None:
    answers = torch.arange(10)
    images = (answers / 10).reshape(10, 1, 1, 1).expand(10, 1, 2, 2)
    labels = answers.clone()
    labels[[2, 5, 9]] = torch.tensor([3, 0, 8])
    assert accuracy(ReadsFirstPixel(), images, labels, batch_size=batch_size) == proportion(7, 10)


class ShortOfMemory(nn.Module):
    """Runs out of memory on more than ``largest`` images: the allocator refuses a tensor that no machine can hold.

    A failed call leaves a tensor in its frame; ``released`` says, at each later call, whether that tensor is gone.
    """

    def __init__(self, net: nn.Module, largest: int):
        super().__init__()
        self.net, self.largest = net, largest
        self.sizes: list[int] = []
        self.held: weakref.ref[Tensor] | None = None
        self.released: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        if self.held is not None:
            self.released.append(self.held() is None)
            self.held = None
        if len(x) > self.largest:
            held = x * 2
            self.held = weakref.ref(held)
            torch.empty(2**60)
        return self.net(x)


def test_an_evaluation_short_of_memory_takes_smaller_batches(caplog: pytest.LogCaptureFixture) -> None:
    """It gives what an evaluation with enough memory gives, random starts included, and frees what a batch held."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        x = torch.rand(300, 1, 8, 8)
    attack = PGD(0.02, 0.01, 2)
    with torch.no_grad():
        y = net(x).argmax(1)
    states = [torch.Generator().manual_seed(3) for _ in range(2)]
    short = ShortOfMemory(net, 100)
    results = [
        accuracy(model, x, y, attack=attack, batch_size=300, generator=generator)
        for model, generator in zip((short, net), states, strict=True)
    ]
    assert results[0] == results[1] and results[0].n == 300 and 0 < results[0].percent < 100
    assert torch.equal(states[0].get_state(), states[1].get_state())
    assert caplog.messages == [f"out of memory: continuing with batches of {size} images" for size in (150, 75)]
    assert [size for size in short.sizes if size > 100] == [300, 150]
    assert short.released == [True, True]


def test_a_single_image_that_does_not_fit_is_an_error() -> None:
    net = ShortOfMemory(nn.Flatten(), 0)
    with pytest.raises(RuntimeError, match="allocate"):
        in_batches(lambda x: (net(x),), (torch.rand(4, 1, 2, 2),), 4)
    assert net.sizes == [4, 2, 1]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("GET was unable to find an engine to execute this computation"), True),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"),
            True,
        ),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("could not create a memory object"), True),
        (RuntimeError("could not execute a primitive"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (RuntimeError("CUDNN_STATUS_BAD_PARAM"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (1x2 and 3x4)"), False),
        (ValueError("epsilon must be in [0, 1]"), False),
    ],
)
def test_a_failed_allocation_in_any_library_is_out_of_memory(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def counted_net() -> nn.Module:
    """What it keeps of an 8x8 image: the image (256 bytes) and what leaves the ReLU (1,024), once for two users."""
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)).eval()


@pytest.mark.parametrize(
    ("free", "nets", "copies", "fits"),
    [
        (10**9, 1, 1, 40),  # no more than are wanted
        (3 * 1280 * 40, 1, 1, 40),
        (3 * 1280 * 40 - 1, 1, 1, 39),
        (3 * 1280 * 40 - 1, 2, 1, 19),
        (3 * 1280 * 40 - 1, 1, 3, 13),
        (100, 1, 1, 1),  # one is tried in any case
    ],
)
def test_a_batch_takes_a_third_of_the_free_memory(
    free: int, nets: int, copies: int, fits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "free_memory", lambda device: free)
    models = [counted_net() for _ in range(nets)]
    seen = []

    def work(x: Tensor) -> tuple[Tensor]:
        seen.append(len(x))
        return (x,)

    (joined,) = in_batches(work, (torch.rand(40, 1, 8, 8),), 500, models=models, copies=copies)
    assert len(joined) == 40
    assert seen[0] == max(seen) == fits
    assert all(parameter.requires_grad and parameter.grad is None for net in models for parameter in net.parameters())


def test_counting_a_nets_memory_draws_no_random_numbers() -> None:
    net = nn.Sequential(counted_net(), nn.Dropout(0.5).train())
    net.eval = lambda: net  # a defence that is random in any mode
    before = torch.random.get_rng_state()
    assert batch_that_fits([net], torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), 4) == 4
    assert torch.equal(torch.random.get_rng_state(), before)


def test_memory_that_is_kept_at_hand_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """What looks scarce is looked at again once the pages of freed memory were given back."""
    free = [3 * 1280 * 2]
    monkeypatch.setattr(batches, "free_memory", lambda device: free[-1])
    monkeypatch.setattr(batches, "trim", lambda: free.append(3 * 1280 * 7))
    assert batch_that_fits([counted_net()], torch.rand(50, 1, 8, 8), 2) == 2 and len(free) == 1
    assert batch_that_fits([counted_net()], torch.rand(50, 1, 8, 8), 50) == 7 and len(free) == 2


HELD = """
import re, torch
from pathlib import Path
from kdiga_nb.models import build_model
from kdiga_nb.numerics import batches
from kdiga_nb.numerics.batches import batch_that_fits
from kdiga_nb.attacks import PGD
from kdiga_nb.metrics import accuracy
from kdiga_nb.models import build_model
torch.set_num_threads(1)
net = build_model("preact_resnet18", num_classes=10, image_shape=(3, 32, 32)).eval()
x, y = torch.rand(200, 3, 32, 32), torch.randint(10, (200,))
attack, limit = PGD(0.1, 0.05, 1), 400_000_000
accuracy(net, x[:2], y[:2], attack=attack)
batches.free_memory = lambda device: limit
fits = batch_that_fits([net], x, 200)
# Not ru_maxrss, which begins with what the process that started this one held.
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
accuracy(net, x[:fits], y[:fits], attack=attack)
print(fits, (peak() - before) / limit)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to read the peak memory from")
def test_what_is_thought_to_fit_does() -> None:
    """An attack on the batch that is said to fit takes less than the free memory, and not a small part of it."""
    done = subprocess.run([sys.executable, "-c", HELD], cwd=ROOT, capture_output=True, text=True, check=True)
    fits, share = done.stdout.split()
    assert 2 < int(fits) < 200
    assert 0.2 < float(share) < 1


def test_accuracy_under_attack_of_known_answers() -> None:
    """A step of 0.04 leaves every rounding in place, one of 0.06 moves every one."""
    answers = torch.arange(1, 9)
    images = (answers / 10 + 0.01).reshape(8, 1, 1, 1)
    assert accuracy(ReadsFirstPixel(), images, answers, attack=FGSM(0.03)).percent == 100
    assert accuracy(ReadsFirstPixel(), images, answers, attack=FGSM(0.06)).percent == 0


class Recording(nn.Module):
    """Linear, and notes in which precision it was asked what is to be decided (without gradients)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.asked = nn.Linear(4, 10), []

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            self.asked.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        return self.layer(x.flatten(1))


@pytest.mark.parametrize(
    ("attack", "checks"),
    [
        (None, 1),
        (PGD(0.1, 0.05, 2), 2),
        (PGD(0.1, 0.05, 2, restarts=3), 2),
        (LossPGD(0.1, 0.05, 2), 3),
        (AutoAttack(0.1, "square"), 1),
    ],
)
def test_verdicts_are_in_full_precision(attack: Attack | None, checks: int) -> None:
    net, (x, y) = Recording().eval(), (torch.rand(5, 1, 2, 2), torch.arange(5))
    torch.set_float32_matmul_precision("high")
    try:
        if isinstance(attack, AutoAttack):
            attack.evaluate(net, x, y)  # its search too: an image wrong in TF32 only is attacked further
        else:
            accuracy(net, x, y, attack=attack)
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")
    # The checks of the inputs, and a ranking of the classes to aim at, come first and decide nothing.
    assert net.asked[:checks] == [("high", True)] * checks
    assert net.asked[checks:] and set(net.asked[checks:]) == {("highest", False)}


def test_accuracy_is_taken_in_eval_mode_and_leaves_the_net_alone(
    tiny_net: Callable[..., nn.Module], random_images: Callable[..., Split]
) -> None:
    net = tiny_net(0, dropout=0.5, batch_norm=True).train()
    net.get_submodule("activation").eval()
    modes, tensors = [module.training for module in net.modules()], deepcopy(net.state_dict())
    x, _ = random_images(50)
    at_rest = deepcopy(net).eval()
    found = accuracy(net, x, at_rest(x).argmax(1), attack=PGD(0.0, 0.0, 2))
    assert found.percent == 100
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(net.state_dict()[key], value) for key, value in tensors.items())


def test_robust_accuracy_repeats_itself_and_leaves_the_global_generator(nets: Nets, data: Data) -> None:
    net, x = nets[0], data.test.images
    y, attack = net(x).argmax(1), PGD(0.05, 0.05, 1)
    figures, states = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append(torch.get_rng_state())
        figures.append(accuracy(net, x, y, attack=attack).percent)
        assert torch.equal(torch.get_rng_state(), states[-1])
    assert figures[0] == figures[1]
    draws = {
        accuracy(net, x, y, attack=attack, generator=torch.Generator().manual_seed(seed)).percent for seed in range(8)
    }
    assert len(draws) > 1


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.full((2, 1, 2, 2), 1.5), torch.tensor([0, 1]), r"images must lie in \[0, 1\]"),
        (torch.full((2, 1, 2, 2), -0.5), torch.tensor([0, 1]), r"images must lie in \[0, 1\]"),
        (torch.full((2, 1, 2, 2), 0.5), torch.tensor([0, 10]), "labels must lie in 0 … 9"),
        (torch.full((2, 1, 2, 2), 0.5), torch.tensor([0]), "labels must be integers of shape"),
        (torch.full((0, 1, 2, 2), 0.5), torch.zeros(0, dtype=torch.long), "there are no images"),
    ],
)
def test_accuracy_refuses_what_would_be_a_wrong_number(images: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        accuracy(ReadsFirstPixel(), images, labels)


def at(*pixels: float) -> tuple[Tensor, Tensor]:
    """One image (1, 1, 1, D) in double precision, and its label 0."""
    return torch.tensor(pixels, dtype=torch.float64).reshape(1, 1, 1, -1), torch.zeros(1, dtype=torch.long)


def test_a_linear_loss_has_no_gap_to_its_tangent() -> None:
    net = Loss(lambda x: x @ torch.tensor([3.0, -5.0], dtype=torch.float64))
    assert local_linearity(net, *at(0.2, 0.7), 0.1).abs().max() < 1e-12


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("pixels", [(0.5, 0.5), (0.0, 1.0)])
@pytest.mark.parametrize("epsilon", [0.01, 0.1])
def test_a_quadratic_loss_has_the_gap_of_its_corner(sign: int, pixels: tuple[float, float], epsilon: float) -> None:
    """a·x₀² + b·x₁² leaves its tangent by (a + b)·ε² at the corners, also of the ball round an image on the edge of
    [0, 1]; curved downwards the gap is negative, and counts by its size."""
    net = Loss(lambda x: sign * (2 * x[:, 0] ** 2 + 3 * x[:, 1] ** 2) + x[:, 0])
    found = local_linearity(net, *at(*pixels), epsilon).item()
    assert found == pytest.approx(5 * epsilon**2, rel=1e-6)


def grid(epsilon: float, n: int = 201) -> Tensor:
    """Every δ of a grid over the two-pixel ball, its corners included."""
    line = torch.linspace(-epsilon, epsilon, n, dtype=torch.float64)
    return torch.cartesian_prod(line, line).reshape(-1, 1, 1, 2)


def tangent_gaps(net: nn.Module, x: Tensor, y: Tensor, delta: Tensor) -> Tensor:
    point = x.clone().requires_grad_()
    base = cross_entropy(net(point), y)
    (gradient,) = torch.autograd.grad(base.sum(), point)
    moved = cross_entropy(net(x + delta), y.expand(len(delta)))
    return (moved - base.detach() - (delta * gradient).flatten(1).sum(1)).abs()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("epsilon", [0.05, 0.2])
def test_local_linearity_against_every_point_of_a_grid(seed: int, epsilon: float) -> None:
    net, generator = Perceptron(seed), torch.Generator().manual_seed(seed)
    images = torch.rand(12, 1, 1, 2, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (12,), generator=generator)
    found = local_linearity(net, images, labels, epsilon)
    largest = torch.stack(
        [tangent_gaps(net, x[None], y[None], grid(epsilon)).max() for x, y in zip(images, labels, strict=True)]
    )
    # Between two grid points the gap can be a little larger than on either.
    assert (found <= largest * 1.001 + 1e-9).all()
    # One search may end on a lesser corner, which the docstring owns up to; each copy of an image starts elsewhere.
    copies = images.repeat_interleave(16, 0), labels.repeat_interleave(16, 0)
    best = local_linearity(net, *copies, epsilon).reshape(12, 16).amax(1)
    assert (best <= largest * 1.001 + 1e-9).all() and (best >= 0.95 * largest).all()
    assert (found >= 0.5 * largest).double().mean() >= 0.5


def test_longer_searches_and_wider_balls_never_find_less(nets: Nets, data: Data) -> None:
    x, y = data.test
    by_steps = [local_linearity(nets[0], x, y, 0.1, steps=steps) for steps in (1, 5, 50)]
    assert all((more >= fewer).all() for fewer, more in pairwise(by_steps))
    by_radius = [local_linearity(nets[0], x, y, epsilon).mean() for epsilon in (0.0, 0.05, 0.1, 0.2)]
    assert by_radius[0] == 0 and by_radius == sorted(by_radius)


def test_the_best_point_on_the_way_counts_not_the_last() -> None:
    """The largest gap lies inside the ball, and the steps swing about it; more of them never find less."""
    net, (x, y) = Loss(lambda x: (40 * x).sin().sum(1)), at(math.pi / 80)
    found = [local_linearity(net, x, y, 0.12, steps=steps, step_size=0.03).item() for steps in range(1, 30)]
    assert found == sorted(found)
    # The gap is |cos 40δ − 1|: 2 at its largest, and half a step of 0.03 beside that 1 + cos 0.6.
    assert 1 + math.cos(0.6) <= found[-1] <= 2


def test_the_measures_repeat_themselves_and_leave_everything_alone(
    tiny_net: Callable[..., nn.Module], data: Data
) -> None:
    net, reference = (tiny_net(seed, batch_norm=True, dropout=0.5).train() for seed in (0, 1))
    before = [deepcopy(one.state_dict()) for one in (net, reference)]
    state = torch.get_rng_state()
    x, y = data.test
    first, second = (bound_terms(net, reference, x, y, 0.1, steps=5) for _ in range(2))
    at_rest = bound_terms(deepcopy(net).eval(), deepcopy(reference).eval(), x, y, 0.1, steps=5)
    assert torch.equal(first.bound, second.bound) and torch.equal(first.bound, at_rest.bound)
    gaps = [measured_gap(net, reference, x, y, 0.1, steps=5) for _ in range(2)]
    assert torch.equal(*gaps)
    assert torch.equal(torch.get_rng_state(), state)
    for one, tensors in zip((net, reference), before, strict=True):
        assert all(module.training for module in one.modules())
        assert all(parameter.requires_grad and parameter.grad is None for parameter in one.parameters())
        assert all(torch.equal(one.state_dict()[key], value) for key, value in tensors.items())


@pytest.mark.parametrize("epsilon", [0.01, 0.05, 0.2])
def test_the_bound_in_the_dual_norm_holds(epsilon: float, tiny_net: Callable[..., nn.Module], data: Data) -> None:
    x, y = data.test
    for seed in range(3):
        student, teacher = (tiny_net(seed + offset, gain=5.0).eval() for offset in (0, 10))
        terms = bound_terms(student, teacher, x, y, epsilon)
        gap = measured_gap(student, teacher, x, y, epsilon)
        assert (gap > 0).all() and (gap <= terms.bound).all()


def test_the_bound_needs_the_dual_norm() -> None:
    """Two linear losses that differ by a slope of 1 a pixel, over 100 pixels: the gap is 100·ε, ε‖·‖₂ only 10·ε."""
    flat, steep = Loss(lambda x: 0 * x.sum(1)), Loss(lambda x: x.sum(1))
    x, y = at(*[0.5] * 100)
    dual, euclidean = (bound_terms(steep, flat, x, y, 0.1, norm) for norm in ("l1", "l2"))
    assert dual.distance.item() == pytest.approx(100) and euclidean.distance.item() == pytest.approx(10)
    gap = measured_gap(steep, flat, x, y, 0.1)
    base = (cross_entropy(steep(x), y) - cross_entropy(flat(x), y)).abs()
    assert (gap - base).item() == pytest.approx(0.1 * dual.distance.item())
    assert (gap - base).item() > 0.1 * euclidean.distance.item()


def test_the_gap_is_searched_on_both_sides() -> None:
    """A student surer than its teacher at x; its loss explodes in a direction that the teacher's gradient hides."""
    direction = torch.tensor([1.0, -1.0] * 5, dtype=torch.float64)
    student = Loss(lambda x: 0.01 * ((x - 0.5) @ (6 * direction)).exp())
    teacher = Loss(lambda x: 1 + 0.1 * (x - 0.5).sum(1))
    x, y = at(*[0.5] * 10)
    largest = 0.01 * math.exp(6) - 1  # at 0.1 · direction; on the teacher's side no more than 1.1
    assert measured_gap(student, teacher, x, y, 0.0).item() == pytest.approx(0.99)  # the gap at x
    for order in ((student, teacher), (teacher, student)):
        assert measured_gap(*order, x, y, 0.1).item() == pytest.approx(largest, rel=1e-4)


def test_the_terms_of_the_bound(nets: Nets, data: Data) -> None:
    student, teacher = nets
    x, y = data.test
    l1, l2 = (bound_terms(student, teacher, x, y, 0.1, norm) for norm in ("l1", "l2"))
    gradients = []
    for net in nets:
        point = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad(cross_entropy(net(point), y).sum(), point)[0])
    difference = (gradients[0] - gradients[1]).flatten(1).double()
    for terms, distance in ((l1, difference.abs().sum(1)), (l2, difference.square().sum(1).sqrt())):
        torch.testing.assert_close(terms.distance.double(), distance, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(terms.ce_student, cross_entropy(student(x), y).detach())
        torch.testing.assert_close(terms.ce_teacher, cross_entropy(teacher(x), y).detach())
        torch.testing.assert_close(terms.llm_student, local_linearity(student, x, y, 0.1))
        torch.testing.assert_close(terms.llm_teacher, local_linearity(teacher, x, y, 0.1))
        torch.testing.assert_close(terms.phi, terms.ce_student + terms.ce_teacher + 0.1 * terms.distance)
        torch.testing.assert_close(terms.bound, terms.llm_student + terms.llm_teacher + terms.phi)
    pixels = difference.shape[1]
    assert (l2.distance <= l1.distance).all() and (l1.distance <= math.sqrt(pixels) * l2.distance * 1.00001).all()


def test_equal_nets_have_no_gap_and_no_distance(nets: Nets, data: Data) -> None:
    student, twin = nets[0], deepcopy(nets[0])
    x, y = data.test
    terms = bound_terms(student, twin, x, y, 0.1)
    assert (terms.distance == 0).all() and torch.equal(terms.llm_student, terms.llm_teacher)
    assert (measured_gap(student, twin, x, y, 0.1) == 0).all()


def test_an_unknown_norm_is_refused(nets: Nets, data: Data) -> None:
    with pytest.raises(ValueError, match="norm must be one of l1, l2, got 'linf'"):
        bound_terms(*nets, *data.test, 0.1, "linf")


@pytest.mark.parametrize("images", [None, 10])
@pytest.mark.parametrize("attack", [None, FGSM(0.1), PGD(0.1, 0.05, 3)], ids=repr)
def test_test_accuracy_is_that_of_the_first_test_images(
    attack: FGSM | PGD | None, images: int | None, nets: Nets, data: Data
) -> None:
    result = TestAccuracy(attack, images)(nets[0], data)
    x, y = data.test.images[:images], data.test.labels[:images]
    assert set(result) == {"percent", "low", "high", "n", "survivors"}
    mask = result["survivors"]
    assert len(mask) == len(y) and 100 * mask.count("1") / len(y) == result["percent"]
    assert result == vars(accuracy(nets[0], x, y, attack=attack)) | {"survivors": mask}
    assert json.loads(json.dumps(result)) == result


def test_test_accuracy_under_autoattack_names_members_and_flags(nets: Nets, data: Data, tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    result = TestAccuracy(AutoAttack(0.5), images=12)(nets[0], data, state=state)
    assert set(result) == {"percent", "low", "high", "n", "survivors", "members", "flags"}
    assert 100 * result["survivors"].count("1") / 12 == result["percent"]
    assert list(result["members"]) == ["clean", "apgd-ce", "apgd-t", "fab-t", "square"]
    assert result["percent"] == result["members"]["square"] and result["n"] == 12
    assert result["members"]["clean"] == pytest.approx(accuracy(nets[0], *(part[:12] for part in data.test)).percent)
    assert list(json.loads(state.read_text())["survivors"]) == list(result["members"])
    assert json.loads(json.dumps(result)) == result


BOUND_KEYS = {
    "llm_eps",
    "llm_half_eps",
    "llm_eps_teacher",
    "cross_entropy",
    "cross_entropy_teacher",
    "gradient_distance",
    "gradient_distance_l1",
    "gradient_distance_batch",
    "bound",
    "gap",
    "violations",
    "n",
}


def test_bounds_are_means_over_the_test_images(nets: Nets, data: Data) -> None:
    student, teacher = nets
    x, y = data.test
    result = Bounds(0.1, steps=10)(student, data, reference=teacher)
    assert set(result) == BOUND_KEYS and json.loads(json.dumps(result)) == result
    l1, l2 = (bound_terms(student, teacher, x, y, 0.1, norm, steps=10) for norm in ("l1", "l2"))
    expected = {
        "llm_eps": l1.llm_student.mean(),
        "llm_half_eps": local_linearity(student, x, y, 0.05, steps=10).mean(),
        "llm_eps_teacher": l1.llm_teacher.mean(),
        "cross_entropy": cross_entropy(student(x), y).mean().item(),
        "cross_entropy_teacher": cross_entropy(teacher(x), y).mean().item(),
        "gradient_distance": l2.distance.mean(),
        "gradient_distance_l1": l1.distance.mean(),
        "bound": l1.bound.mean(),
        "gap": measured_gap(student, teacher, x, y, 0.1, steps=10).mean(),
        "violations": 0,
        "n": 100,
    }
    for name, value in expected.items():
        if name in ("llm_eps", "llm_eps_teacher", "bound"):
            # The measure also looks where the gap was found, so it may find more, and never less.
            assert float(value) * (1 - 1e-5) <= result[name] <= 1.5 * float(value), name
        else:
            assert result[name] == pytest.approx(float(value), rel=1e-5), name
    assert Bounds(0.1, images=7, steps=2)(student, data, reference=teacher)["n"] == 7


def test_the_batch_distance_is_that_of_the_gradients_of_a_batch_mean_of_100(nets: Nets, data: Data) -> None:
    x, y = data.test
    assert len(y) == 100
    gradients = []
    for net in nets:
        point = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad(nn.functional.cross_entropy(net(point), y), point)[0])
    expected = (gradients[0] - gradients[1]).norm().item()
    result = Bounds(0.1, steps=2)(nets[0], data, reference=nets[1])
    assert result["gradient_distance_batch"] == pytest.approx(expected, rel=1e-5)


def test_bounds_are_measured_in_eval_mode_and_leave_the_nets_alone(
    tiny_net: Callable[..., nn.Module], data: Data
) -> None:
    net, reference = (tiny_net(seed, batch_norm=True, dropout=0.5).train() for seed in (0, 1))
    at_rest = Bounds(0.1, steps=3)(deepcopy(net).eval(), data, reference=deepcopy(reference).eval())
    before = [deepcopy(one.state_dict()) for one in (net, reference)]
    assert Bounds(0.1, steps=3)(net, data, reference=reference) == pytest.approx(at_rest)
    for one, tensors in zip((net, reference), before, strict=True):
        assert all(torch.equal(one.state_dict()[key], value) for key, value in tensors.items())


def test_bounds_need_a_reference(nets: Nets, data: Data) -> None:
    with pytest.raises(ValueError, match="need a reference teacher"):
        Bounds(0.1)(nets[0], data)


def test_measures_are_values() -> None:
    assert TestAccuracy(PGD(0.1, 0.05, 3), 10) == TestAccuracy(PGD(0.1, 0.05, 3), 10)
    assert len({Bounds(0.1), Bounds(0.1), Bounds(0.2), TestAccuracy()}) == 3
    assert all(issubclass(kind, Measure) for kind in (Bounds, TestAccuracy))


def test_the_measurements_of_many_nets_share_the_images(few_digits: Data, tiny_net: Callable[..., nn.Module]) -> None:
    one, other = (first_images(few_digits, tiny_net(side=8, classes=10), 5) for _ in range(2))
    assert one is other and len(one.labels) == 5
    assert len(first_images(few_digits, tiny_net(side=8, classes=10), 4).labels) == 4
