"""The paper's terms against references in float64, and the identities that hold between them."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, logsumexp
from torch import Tensor, nn
from torch.func import functional_call

from kdiga_nb.data import Split
from kdiga_nb.losses import NORMS, cross_entropy, distillation_kl, gradient_distance, input_gradient

TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5}
SCALES = (1e-3, 1.0, 30.0, 300.0)


def some_logits(seed: int, scale: float, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(7, 5, generator=generator, dtype=torch.float64).to(dtype)


def reference_kl(student: Tensor, teacher: Tensor, temperature: float) -> np.ndarray:
    s, t = (log_softmax(part.double().numpy() / temperature, axis=1) for part in (student, teacher))
    return temperature**2 * (np.exp(t) * (t - s)).sum(axis=1)


def images_gradients(seed: int, n: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, 3, 4, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("scale", SCALES)
def test_cross_entropy_is_log_sum_exp_minus_the_labels_logit(scale: float, dtype: torch.dtype) -> None:
    logits, labels = some_logits(0, scale, dtype), torch.arange(7) % 5
    values = cross_entropy(logits, labels)
    exact = logits.double().numpy()
    expected = logsumexp(exact, axis=1) - exact[np.arange(7), labels.numpy()]
    assert values.shape == (7,) and values.dtype == dtype
    np.testing.assert_allclose(values.double(), expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype] * scale)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 30.0])
def test_distillation_kl_is_the_divergence_from_the_teacher(
    temperature: float, scale: float, dtype: torch.dtype
) -> None:
    student, teacher = some_logits(1, scale, dtype), some_logits(2, scale, dtype)
    values = distillation_kl(student, teacher, temperature)
    assert values.shape == (7,)
    size = temperature**2 * (1 + scale / temperature)
    expected = reference_kl(student, teacher, temperature)
    np.testing.assert_allclose(values.double(), expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype] * size)


def test_distillation_kl_has_a_direction() -> None:
    student, teacher = some_logits(1, 2.0), some_logits(2, 2.0)
    assert (distillation_kl(student, teacher) - distillation_kl(teacher, student)).abs().min() > 1e-3


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("scale", [*SCALES, 1e4])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 30.0])
def test_distillation_kl_is_exactly_zero_at_equality(temperature: float, scale: float, dtype: torch.dtype) -> None:
    student = some_logits(3, scale, dtype).requires_grad_()
    values = distillation_kl(student, student.detach(), temperature)
    values.sum().backward()
    assert (values == 0).all()
    assert student.grad is not None and student.grad.abs().max() <= 1e-6 * temperature


def test_distillation_kl_ignores_a_constant_added_to_the_logits() -> None:
    student, teacher = some_logits(1, 2.0), some_logits(2, 2.0)
    shifted = distillation_kl(student + 3, teacher - 5, 4.0)
    torch.testing.assert_close(shifted, distillation_kl(student, teacher, 4.0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 2.0, 30.0])
def test_the_temperature_divides_the_logits_and_its_square_multiplies_the_value(temperature: float) -> None:
    student, teacher = some_logits(1, 2.0), some_logits(2, 2.0)
    expected = temperature**2 * distillation_kl(student / temperature, teacher / temperature)
    torch.testing.assert_close(distillation_kl(student, teacher, temperature), expected, rtol=1e-12, atol=0)


def test_the_size_of_the_gradient_does_not_fade_with_the_temperature() -> None:
    """Towards high temperature T²·KL tends to |centred difference of the logits|² / 2N, so its gradient to that / N."""
    student, teacher = some_logits(1, 1.0).requires_grad_(), some_logits(2, 1.0)
    distillation_kl(student, teacher, 1e4).sum().backward()
    difference = student.detach() - teacher
    expected = (difference - difference.mean(1, keepdim=True)) / 5
    torch.testing.assert_close(student.grad, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be positive"):
        distillation_kl(some_logits(0, 1.0), some_logits(1, 1.0), temperature)


@pytest.mark.parametrize("n", [1, 6])
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_input_gradient_is_that_of_each_image_alone(
    tiny_net: Callable[..., nn.Module],
    random_images: Callable[..., Split],
    n: int,
    create_graph: bool,
    batch_norm: bool,
) -> None:
    net = tiny_net(0, batch_norm=batch_norm, dtype=torch.float64).eval()
    x, y = random_images(n, dtype=torch.float64)
    gradient, logits = input_gradient(net, x, y, create_graph=create_graph)
    for i in range(n):
        one, label = x[i : i + 1], y[i : i + 1]
        alone = torch.autograd.functional.jacobian(
            lambda image, k=label: nn.functional.cross_entropy(net(image), k), one
        )
        torch.testing.assert_close(gradient[i : i + 1].detach(), alone, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(logits.detach(), net(x).detach(), rtol=0, atol=0)


@pytest.mark.parametrize("create_graph", [False, True])
def test_input_gradient_takes_one_forward_pass_and_leaves_nothing_behind(
    tiny_net: Callable[..., nn.Module], random_images: Callable[..., Split], create_graph: bool
) -> None:
    net, (x, y) = tiny_net(0), random_images(4)
    calls: list[int] = []
    net.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        gradient, logits = input_gradient(net, x, y, create_graph=create_graph)
        assert not torch.is_grad_enabled()
    assert len(calls) == 1
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not x.requires_grad and x.grad is None
    assert gradient.shape == x.shape
    assert gradient.requires_grad == logits.requires_grad == create_graph


@pytest.mark.parametrize("norm", NORMS)
def test_the_alignment_can_be_differentiated_again(
    tiny_net: Callable[..., nn.Module], random_images: Callable[..., Split], norm: str
) -> None:
    net, other = (tiny_net(seed, side=3, classes=3, dtype=torch.float64) for seed in (0, 1))
    x, y = random_images(2, side=3, classes=3, dtype=torch.float64)
    target, _ = input_gradient(other, x, y)
    names = [name for name, _ in net.named_parameters()]

    def distance(*weights: Tensor) -> Tensor:
        def model(images: Tensor) -> Tensor:
            return functional_call(net, dict(zip(names, weights, strict=True)), (images,))

        return gradient_distance(input_gradient(model, x, y, create_graph=True)[0], target, norm)

    weights = tuple(parameter.detach().clone().requires_grad_() for parameter in net.parameters())
    assert torch.autograd.gradcheck(distance, weights)


@pytest.mark.parametrize("n", [1, 3, 8])
def test_gradient_distance_against_its_formulas(n: int) -> None:
    ours, theirs = images_gradients(0, n), images_gradients(1, n)
    each = np.linalg.norm((ours - theirs).numpy().reshape(n, -1), axis=1)
    whole = np.linalg.norm((ours / n - theirs / n).numpy())
    root_mean_square = np.sqrt((each**2).mean())
    assert gradient_distance(ours, theirs).item() == pytest.approx(each.mean(), rel=1e-12)
    assert gradient_distance(ours, theirs, "per_sample").item() == pytest.approx(each.mean(), rel=1e-12)
    assert gradient_distance(ours, theirs, "batch").item() == pytest.approx(whole / n, rel=1e-12)
    assert gradient_distance(ours, theirs, "batch").item() == pytest.approx(n**-1.5 * root_mean_square, rel=1e-12)


def test_the_batch_norm_is_that_of_gradients_of_the_batch_mean(
    tiny_net: Callable[..., nn.Module], random_images: Callable[..., Split]
) -> None:
    nets = [tiny_net(seed, dtype=torch.float64) for seed in (0, 1)]
    x, y = random_images(6, dtype=torch.float64)
    x.requires_grad_()
    of_the_mean = [torch.autograd.grad(nn.functional.cross_entropy(net(x), y), x)[0] for net in nets]
    expected = (of_the_mean[0] - of_the_mean[1]).square().sum().sqrt() / len(x)
    ours, theirs = (input_gradient(net, x, y)[0] for net in nets)
    torch.testing.assert_close(gradient_distance(ours, theirs, "batch"), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_gradient_distance_is_zero_at_equality_and_its_gradient_finite(norm: str) -> None:
    ours, theirs = (images_gradients(0, 3).requires_grad_() for _ in range(2))
    distance = gradient_distance(ours, theirs, norm)
    distance.backward()
    assert distance == 0
    assert ours.grad is not None and (ours.grad == 0).all()
    assert theirs.grad is not None and (theirs.grad == 0).all()


def test_one_equal_image_does_not_spoil_the_gradient_of_the_others() -> None:
    ours, theirs = images_gradients(0, 3), images_gradients(1, 3)
    theirs[1] = ours[1]
    ours.requires_grad_()
    gradient_distance(ours, theirs).backward()
    difference = (ours - theirs).detach()
    lengths = difference.flatten(1).norm(dim=1)
    lengths[1] = 1
    torch.testing.assert_close(ours.grad, difference / lengths[:, None, None, None] / 3, rtol=1e-12, atol=1e-15)


def test_an_unknown_norm_is_refused() -> None:
    with pytest.raises(ValueError, match="norm must be one of per_sample, batch, got 'l7'"):
        gradient_distance(images_gradients(0, 2), images_gradients(1, 2), "l7")
