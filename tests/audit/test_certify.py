"""Certified bounds: closed forms on linear nets, every activation pattern of tiny ones, grids, an attack."""

import json
import math
from collections.abc import Callable
from itertools import pairwise, product

import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

from kdiga_nb.audit.certify import (
    BOUND_METHODS,
    CertifiedRadius,
    Layers,
    LinearPair,
    affine_layers,
    attacked_radius,
    certified_margins,
    certified_radius,
    forward,
    preactivation_bounds,
)
from kdiga_nb.data import Data, Split
from kdiga_nb.losses import distillation_kl, gradient_distance, input_gradient, logit_gradients
from kdiga_nb.methods import KDIGA
from kdiga_nb.models import MODELS, build_model

SHAPE = (1, 1, 2)


def relu_net(seed: int, sizes: tuple[int, ...] = (2, 3, 3, 3)) -> nn.Module:
    """A net of two pixels whose regions are few enough to visit them all."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        parts: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in pairwise(sizes):
            parts += [nn.Linear(inputs, outputs), nn.ReLU()]
        net = nn.Sequential(*parts[:-1]).double().eval()
    with torch.no_grad():
        for weight in net.parameters():
            weight.mul_(2)
    return net


def images(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def box(x: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    flat = x.flatten(1)
    return (flat - epsilon).clamp(min=0), (flat + epsilon).clamp(max=1)


def grid(lower: Tensor, upper: Tensor, n: int = 101) -> Tensor:
    """Every point of a grid over one box of two pixels, its corners included."""
    lines = [torch.linspace(low, high, n, dtype=torch.float64) for low, high in zip(lower, upper, strict=True)]
    return torch.cartesian_prod(*lines)


def exact_margin(layers: Layers, lower: Tensor, upper: Tensor, label: int) -> float:
    """The true least margin over a box, by a linear program in every activation pattern."""
    best = math.inf
    widths = [len(bias) for _, bias in layers[:-1]]
    for flat_pattern in product((0.0, 1.0), repeat=sum(widths)):
        pattern = torch.tensor(flat_pattern, dtype=torch.float64).split(widths)
        weight, bias = torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        rows, limits = [], []
        for (matrix, shift), active in zip(layers, [*pattern, torch.ones(3, dtype=torch.float64)], strict=True):
            weight, bias = matrix @ weight, matrix @ bias + shift
            if len(bias) == len(active) and matrix is not layers[-1][0]:
                # An active unit is not negative, an inactive one not positive.
                sign = 1 - 2 * active
                rows.append(sign[:, None] * weight)
                limits.append(-sign * bias)
                weight, bias = active[:, None] * weight, active * bias
        for other in set(range(3)) - {label}:
            answer = linprog(
                (weight[label] - weight[other]).numpy(),
                A_ub=torch.cat(rows).numpy(),
                b_ub=torch.cat(limits).numpy(),
                bounds=list(zip(lower.tolist(), upper.tolist(), strict=True)),
            )
            if answer.success:
                best = min(best, answer.fun + (bias[label] - bias[other]).item())
    return best


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("epsilon", [0.01, 0.1])
def test_bounds_against_every_activation_pattern(seed: int, epsilon: float) -> None:
    net, x = relu_net(seed), images(2, seed)
    layers = affine_layers(net, SHAPE)
    lower, upper = box(x, epsilon)
    labels = net(x).argmax(1)
    exact = [exact_margin(layers, lower[i], upper[i], int(labels[i])) for i in range(2)]
    interval, crown = (certified_margins(layers, lower, upper, labels, method) for method in BOUND_METHODS)
    for index, truth in enumerate(exact):
        assert interval[index] <= crown[index] + 1e-9
        assert crown[index] <= truth + 1e-7
        # The linear program is itself checked: no point of a fine grid lies below it, and some lie close.
        logits = forward(layers, grid(lower[index], upper[index]))
        label = int(labels[index])
        others = torch.stack([logits[:, label] - logits[:, k] for k in range(3) if k != label]).amin()
        assert truth - 1e-7 <= others <= truth + 0.05 * (1 + abs(truth))


@pytest.mark.parametrize("seed", range(2))
def test_crown_is_exact_where_no_unit_changes_sides(seed: int) -> None:
    net, x = relu_net(seed), images(2, seed)
    layers, labels = affine_layers(net, SHAPE), net(x).argmax(1)
    lower, upper = box(x, 1e-6)
    found = certified_margins(layers, lower, upper, labels)
    for index in range(2):
        truth = exact_margin(layers, lower[index], upper[index], int(labels[index]))
        assert found[index].item() == pytest.approx(truth, abs=1e-9)


@pytest.mark.parametrize("method", BOUND_METHODS)
def test_a_linear_net_has_its_closed_form(method: str) -> None:
    net = relu_net(0, (2, 3))
    layers, x = affine_layers(net, SHAPE), images(20)
    labels = net(x).argmax(1)
    (weight, _), logits = layers[0], net(x)
    lower, upper = x.flatten(1) - 0.1, x.flatten(1) + 0.1
    expected = torch.stack(
        [
            torch.stack(
                [
                    logits[i, y] - logits[i, k] - 0.1 * (weight[y] - weight[k]).abs().sum()
                    for k in range(3)
                    if k != int(y)
                ]
            ).amin()
            for i, y in enumerate(labels)
        ]
    )
    torch.testing.assert_close(certified_margins(layers, lower, upper, labels, method), expected)


@pytest.mark.parametrize("method", BOUND_METHODS)
def test_hidden_bounds_hold_what_the_net_computes(method: str) -> None:
    net = relu_net(1, (2, 8, 8, 3))
    layers, x = affine_layers(net, SHAPE), images(5)
    lower, upper = box(x, 0.2)
    bounds = preactivation_bounds(layers, lower, upper, method)
    for index in range(5):
        values = grid(lower[index], upper[index])
        for depth, (low, high) in enumerate(bounds):
            values = (values.relu() if depth else values) @ layers[depth][0].T + layers[depth][1]
            assert (values >= low[index] - 1e-9).all() and (values <= high[index] + 1e-9).all()


def test_crown_is_never_looser_and_somewhere_much_tighter() -> None:
    net = relu_net(2, (2, 16, 16, 3))
    layers, x = affine_layers(net, SHAPE), images(30)
    radii = {method: certified_radius(layers, x.flatten(1), method=method) for method in BOUND_METHODS}
    assert (radii["crown"] >= radii["interval"] - 1e-3).all()
    assert radii["crown"].mean() > 1.3 * radii["interval"].mean()


@pytest.mark.parametrize("one_sided", [False, True])
def test_no_point_within_a_certified_radius_changes_the_decision(one_sided: bool) -> None:
    net = relu_net(3)
    layers, x = affine_layers(net, SHAPE), images(20)
    radii = certified_radius(layers, x.flatten(1), one_sided=one_sided)
    assert (radii > 0).any()
    for point, radius in zip(x.flatten(1), radii, strict=True):
        below = point if one_sided else (point - radius).clamp(min=0)
        decisions = forward(layers, grid(below, (point + radius).clamp(max=1))).argmax(1)
        assert (decisions == forward(layers, point[None]).argmax()).all()


def test_the_radius_lies_between_bound_and_attack() -> None:
    """One linear region: the radius is known, the bound reaches it from below and the attack from above."""
    pair = LinearPair(margin=1.0, tilt=0.0)
    exact = pair.exact_radius(pair.teacher)
    assert exact == pytest.approx(1 / 6)
    layers = affine_layers(pair.teacher, SHAPE)
    below = certified_radius(layers, pair.x.flatten(1), halvings=16).item()
    above = attacked_radius(pair.teacher.float(), pair.x.float(), halvings=10).item()
    assert exact - 1e-4 < below <= exact <= above < exact + 2e-3


def test_one_sided_is_the_weaker_demand() -> None:
    layers, x = affine_layers(relu_net(4), SHAPE), images(40).flatten(1)
    assert (certified_radius(layers, x, one_sided=True) >= certified_radius(layers, x) - 1e-3).all()


def test_convolution_and_batch_norm_become_matrices(
    tiny_net: Callable[..., nn.Module], random_images: Callable[..., Split]
) -> None:
    net = tiny_net(0, batch_norm=True, dropout=0.5, activation=nn.ReLU(), dtype=torch.float64).train()
    x, _ = random_images(20, dtype=torch.float64)
    layers = affine_layers(net, (1, 4, 4))
    assert net.training and [len(bias) for _, bias in layers] == [64, 5]
    torch.testing.assert_close(forward(layers, x.flatten(1)), net.eval()(x), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", [name for name, entry in MODELS.items() if entry.digits])
def test_every_net_is_certified_or_refused_by_name(name: str) -> None:
    net = build_model(name, num_classes=10, image_shape=(1, 8, 8))
    certified = {"digits_small_relu": 4}
    if name.startswith("digits_mlp") or name in certified:
        assert len(affine_layers(net, (1, 8, 8))) == certified.get(name, 3)
    else:
        with pytest.raises(ValueError, match=f"{type(net).__name__} cannot be certified"):
            affine_layers(net, (1, 8, 8))


def test_large_images_are_refused_before_memory_runs_out() -> None:
    net = build_model("mobilenet_v2", num_classes=10, image_shape=(3, 32, 32))
    with pytest.raises(ValueError, match="MobileNetV2 cannot be certified: images of 3072 values"):
        affine_layers(net, (3, 32, 32))


def test_an_unknown_method_is_refused() -> None:
    layers = affine_layers(relu_net(0), SHAPE)
    with pytest.raises(ValueError, match="method must be one of interval, crown, got 'milp'"):
        certified_radius(layers, images(2).flatten(1), method="milp")


# ---- Proposition 1 ----


@pytest.mark.parametrize("margin", [1.0, 5.0, 12.0])
def test_the_counter_example_is_a_perfect_student_of_smaller_radius(margin: float) -> None:
    pair = LinearPair(margin)
    terms = KDIGA(lambda_ce=1, lambda_kl=1, lambda_iga=1)(pair.student, pair.teacher, pair.x, pair.y)
    assert terms["distillation"].item() == pytest.approx(0, abs=1e-12)
    assert terms["alignment"].item() == pytest.approx(0, abs=1e-12)
    assert terms["cross_entropy"].item() == pytest.approx(math.log1p(2 * math.exp(-margin)))
    assert pair.exact_radius(pair.student) < 0.6 * pair.exact_radius(pair.teacher)


def test_the_student_of_the_counter_example_really_falls_inside_the_teachers_radius() -> None:
    pair = LinearPair(1.0)
    reach = 0.99 * pair.exact_radius(pair.teacher)
    corners = pair.x.flatten(1) + reach * torch.tensor(list(product((-1.0, 1.0), repeat=2))).double()
    decisions = {name: getattr(pair, name)(corners.view(-1, *SHAPE)).argmax(1) for name in ("teacher", "student")}
    assert (decisions["teacher"] == 0).all() and (decisions["student"] != 0).any()


def test_the_gradients_of_all_logits_show_what_the_losss_hides() -> None:
    pair = LinearPair()
    of_loss = [input_gradient(net, pair.x, pair.y)[0] for net in (pair.student, pair.teacher)]
    of_logits = [logit_gradients(net, pair.x)[0] for net in (pair.student, pair.teacher)]
    hidden, shown = (gradient_distance(student, teacher) for student, teacher in (of_loss, of_logits))
    assert hidden.item() < 1e-12 < 1 < shown.item()
    terms = KDIGA(lambda_iga=1, align="logits")(pair.student, pair.teacher, pair.x, pair.y)
    assert terms["alignment"].item() == pytest.approx(shown.item())


def test_without_a_tilt_the_pair_is_one_net_twice() -> None:
    pair = LinearPair(tilt=0.0)
    torch.testing.assert_close(pair.student(pair.x + 0.1), pair.teacher(pair.x + 0.1))
    assert distillation_kl(pair.student(pair.x), pair.teacher(pair.x)).item() == 0


# ---- the measure ----


@pytest.fixture
def data() -> Data:
    split = Split(images(12).float(), torch.zeros(12, dtype=torch.long))
    return Data("two pixels", split, split, num_classes=3, validation_size=0)


def test_the_measure_of_a_net_against_itself(data: Data) -> None:
    net = relu_net(0).float()
    result = CertifiedRadius(0.01, images=10)(net, data, reference=net)
    assert json.loads(json.dumps(result)) == result
    assert result["n"] == len(result["radii"]) == 10
    assert result["radii"] == result["teacher_radii"] and result["kept"] == 100
    assert result["distance_loss"] == result["distance_logits"] == 0
    assert result["radius_interval"] <= result["radius_crown"] <= result["radius_attack"]
    layers = affine_layers(net, SHAPE)
    right = net(data.test.images[:10]).argmax(1) == 0
    certified = right & (certified_radius(layers, data.test.images[:10].flatten(1)) >= 0.01)
    assert result["certified"] == pytest.approx(100 * certified.double().mean().item())
    assert result["lost_proven"] == 0 and result["kept_proven"] < 100  # its own upper bound is above its lower bound


def test_kept_and_lost_radii_are_proven_by_the_bounds_of_both_nets() -> None:
    pair = LinearPair(margin=0.5)
    assert pair.exact_radius(pair.student) < pair.exact_radius(pair.teacher)
    split = Split(pair.x.float().repeat(4, 1, 1, 1), pair.y.repeat(4))
    data = Data("two pixels", split, split, num_classes=3, validation_size=0)
    student, teacher = pair.student.float(), pair.teacher.float()
    for net, reference, expected in ((student, teacher, (0, 0, 100)), (teacher, student, (100, 100, 0))):
        result = CertifiedRadius(0.01)(net, data, reference=reference)
        assert (result["kept"], result["kept_proven"], result["lost_proven"]) == expected
        assert result["both_right"] == 100


def test_a_radius_is_not_lost_where_a_net_is_wrong() -> None:
    """Half of the images carry another label: Equation 7 says nothing of them."""
    pair = LinearPair(margin=0.5)
    split = Split(pair.x.float().repeat(4, 1, 1, 1), torch.cat([pair.y, pair.y, 1 - pair.y, 1 - pair.y]))
    data = Data("two pixels", split, split, num_classes=3, validation_size=0)
    result = CertifiedRadius(0.01)(pair.student.float(), data, reference=pair.teacher.float())
    assert (result["lost_proven"], result["both_right"]) == (50, 50)


def test_the_measure_needs_a_teacher(data: Data) -> None:
    with pytest.raises(ValueError, match="reference teacher"):
        CertifiedRadius(0.01)(relu_net(0).float(), data)
