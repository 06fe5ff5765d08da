"""The operators against PyTorch's own, their second derivatives, and how many convolutions a step costs."""

from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from steps import Textbook, plain
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kdiga_nb.losses import input_gradient
from kdiga_nb.methods import KDIGA
from kdiga_nb.models import build_model
from kdiga_nb.numerics import double_backward as operators
from kdiga_nb.numerics.double_backward import BatchNorm2d, Conv2d, twice_differentiable, use_operators
from kdiga_nb.numerics.folding import folded_copy
from kdiga_nb.numerics.scopes import Autocast
from kdiga_nb.training import PRECISIONS, train_step

# in, out, kernel, stride, padding, dilation, groups
CONVOLUTIONS = {
    "plain": (3, 4, 3, 1, 1, 1, 1),
    "no padding": (2, 3, 3, 1, 0, 1, 1),
    "one by one": (4, 5, 1, 1, 0, 1, 1),
    "one by one, strided": (4, 3, 1, 2, 0, 1, 1),
    "strided": (2, 4, 3, 2, 1, 1, 1),
    "even kernel, strided": (2, 4, 4, 2, 1, 1, 1),
    "dilated": (2, 2, 3, 1, 2, 2, 1),
    "grouped": (4, 6, 3, 1, 1, 1, 2),
    "grouped, strided, dilated": (4, 6, 3, 2, 2, 2, 2),
    "depthwise": (4, 4, 3, 1, 1, 1, 4),
    "depthwise, strided": (4, 4, 3, 2, 1, 1, 4),
    "depthwise, two a channel": (3, 6, 3, 1, 1, 1, 3),
    "oblong": (2, 3, (3, 2), (1, 2), (1, 0), 1, 1),
    "stride leaves a rest": (2, 3, 3, 3, 0, 1, 1),
}


@pytest.fixture(autouse=True)
def own_path_at_any_size(monkeypatch: pytest.MonkeyPatch):
    """The tests' tensors are small, where PyTorch's own path would be taken."""
    monkeypatch.setattr(operators, "SMALL", 0)


def called(module: nn.Module, names: list[str]) -> Callable[..., Tensor]:
    """The module as a function of its input and its named parameters, inside ``twice_differentiable``."""

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        with twice_differentiable():
            return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    return call


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("case", CONVOLUTIONS.values(), ids=list(CONVOLUTIONS))
def test_convolution_has_two_derivatives(case: tuple[Any, ...], bias: bool):
    module = use_operators(nn.Conv2d(*case[:4], *case[4:], bias=bias).double())
    assert type(module) is Conv2d
    parameters = dict(module.named_parameters())
    inputs = [draw(2, case[0], 6, 7), *(value.detach() for value in parameters.values())]
    inputs = [value.requires_grad_() for value in inputs]
    call = called(module, list(parameters))
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)
    assert torch.allclose(call(*inputs), module(inputs[0]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", [(4, 3, 2, 3), (2, 2, 1, 1), (3, 1, 4, 4)], ids=str)
def test_batch_normalisation_has_two_derivatives(shape: tuple[int, ...], train: bool):
    if train and shape[0] * shape[2] * shape[3] == 2:
        shape = (3, *shape[1:])  # two values a channel normalise to ±1, whatever they are
    module = use_operators(nn.BatchNorm2d(shape[1]).double().train(train))
    assert isinstance(module, BatchNorm2d) and module.running_mean is not None and module.running_var is not None
    module.running_mean.copy_(draw(shape[1]))
    module.running_var.copy_(draw(shape[1]).square() + 0.5)
    inputs = [value.requires_grad_() for value in (draw(*shape), draw(shape[1]) + 1, draw(shape[1]))]
    call = called(module, ["weight", "bias"])
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_a_weight_of_zero_keeps_its_second_derivative():
    # A formula that divides by γ would fail here, and residual nets start there.
    module = use_operators(nn.BatchNorm2d(2).double())
    inputs = [value.requires_grad_() for value in (draw(3, 2, 2, 2), torch.zeros(2).double(), draw(2))]
    assert torch.autograd.gradgradcheck(called(module, ["weight", "bias"]), inputs)


def test_running_statistics_move_as_in_torch():
    ours, theirs = use_operators(nn.BatchNorm2d(3)), nn.BatchNorm2d(3)
    for scale in (1.0, 3.0):
        x = scale * torch.randn(4, 3, 5, 5) + scale
        with twice_differentiable():
            value = ours(x)
        assert torch.allclose(value, theirs(x), atol=1e-6)
    for name, expected in theirs.state_dict().items():
        assert torch.allclose(ours.state_dict()[name], expected), name


def test_the_state_dict_is_torchs():
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3, padding="same"))
    names = list(plain.state_dict())
    changed = use_operators(plain)
    assert list(changed.state_dict()) == names
    assert [type(module) for module in changed.children()] == [Conv2d, BatchNorm2d, nn.Conv2d]


NETS = {"digits_small": (1, 8, 8), "mobilenet_v2": (3, 32, 32), "preact_resnet18": (3, 32, 32)}


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str)
@pytest.mark.parametrize("name", NETS)
def test_the_gradient_of_a_step_is_the_textbooks(name: str, dtype: torch.dtype, bound: float):
    """Over all parameters together: some gradients are zero but for rounding."""
    torch.manual_seed(0)
    shape = NETS[name]
    student = build_model(name, num_classes=10, image_shape=shape).to(dtype)
    teacher = build_model(name, num_classes=10, image_shape=shape).to(dtype).eval().requires_grad_(False)
    x, y = torch.rand(4, *shape, dtype=dtype), torch.randint(0, 10, (4,))
    reference = plain(student)
    assert not any(isinstance(module, Conv2d | BatchNorm2d) for module in reference.modules())
    for net, loss in (
        (student, torch.stack(list(KDIGA(lambda_iga=2.0)(student, teacher, x, y).values())).sum()),
        (reference, torch.stack(list(Textbook(2.0)(reference, plain(teacher), x, y).values())).sum()),
    ):
        loss.backward(inputs=list(net.parameters()))
    ours, theirs = (
        torch.cat([parameter.grad.flatten() for parameter in net.parameters() if parameter.grad is not None])
        for net in (student, reference)
    )
    assert len(ours) == sum(parameter.numel() for parameter in student.parameters())
    assert (ours - theirs).norm() <= bound * theirs.norm()
    assert (ours - theirs).abs().max() <= bound * theirs.abs().max()


class Counting(TorchDispatchMode):
    """Counts convolutions: forward ones, and backward ones by what they compute."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            self.counts["forward"] += 1
        elif func is torch.ops.aten.convolution_backward.default:
            self.counts["input"] += args[-1][0]
            self.counts["weight"] += args[-1][1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", NETS)
def test_how_many_convolutions_a_step_costs(name: str, precision: str):
    """Of L layers: student and teacher forward, both to the pixels, the penalty's way back, and the loss's."""
    shape = NETS[name]
    student: nn.Module = build_model(name, num_classes=10, image_shape=shape)
    teacher: nn.Module = build_model(name, num_classes=10, image_shape=shape).eval().requires_grad_(False)
    optimizer = torch.optim.SGD(student.parameters(), 0.01)
    layers = sum(isinstance(module, Conv2d) for module in student.modules())
    if precision == "bfloat16":
        student, teacher = (Autocast(net, torch.device("cpu")) for net in (student, teacher))
    with Counting() as mode:
        train_step(student, teacher, KDIGA(), optimizer, torch.rand(2, *shape), torch.tensor([1, 2]))
    # The loss's way back ends at the first layer's weights: no gradient of the pixels is asked for.
    assert mode.counts == {"forward": 3 * layers, "input": 3 * layers - 1, "weight": 2 * layers}


def test_an_input_gradient_computes_no_weight_gradient():
    student = build_model("digits_small", num_classes=10, image_shape=(1, 8, 8))
    with Counting() as mode:
        input_gradient(student, torch.rand(2, 1, 8, 8), torch.tensor([1, 2]), create_graph=True)
    assert mode.counts == {"forward": 3, "input": 3, "weight": 0}


def second_gradient(module: nn.Module, x: Tensor, v: Tensor, w: Tensor, *, autocast: bool) -> Tensor:
    """That of ⟨v, gx⟩ by x and the parameters, where gx is the gradient of ⟨w, module(x)²⟩ by x; as one vector."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), twice_differentiable():
        y = module(x)
    (gx,) = torch.autograd.grad((w * y.to(x.dtype) ** 2).sum(), x, create_graph=True)
    parts = torch.autograd.grad((v * gx).sum(), [x, module.get_parameter("weight")])
    return torch.cat([part.double().flatten() for part in parts])


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", ["convolution", "depthwise", "batch normalisation"])
def test_under_autocast_they_are_as_close_as_torchs_own(kind: str, train: bool):
    """To float64; each rounds to bf16 at other places."""
    groups = 8 if kind == "depthwise" else 1
    theirs = nn.BatchNorm2d(8) if kind == "batch normalisation" else nn.Conv2d(8, 8, 3, padding=1, groups=groups)
    theirs.train(train)
    x, v, w = (draw(16, 8, 6 + i, 12 - i)[:, :, :6, :6] for i in range(3))
    # What comes to a layer under autocast is in bf16 already.
    x = x.bfloat16().double()
    truth = second_gradient(deepcopy(theirs).double(), x, v, w, autocast=False)
    near = x.bfloat16(), v.bfloat16(), w.bfloat16()
    errors = [
        ((second_gradient(module, *near, autocast=True) - truth).norm() / truth.norm()).item()
        for module in (use_operators(deepcopy(theirs)), deepcopy(theirs))
    ]
    assert 0 < errors[0] < max(1.2 * errors[1], 0.01)
    assert errors[1] < 0.05


def test_in_channels_last_order_no_kernel_is_given_two_orders():
    """Batch normalisation's takes several times as long then."""
    orders: list[set[bool]] = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.native_batch_norm_backward.default:
                orders.append({tensor.is_contiguous() for tensor in args[:2]})
            return func(*args, **(kwargs or {}))

    net = build_model("mobilenet_v2", num_classes=10, image_shape=(3, 32, 32)).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] (missing in the stubs)
    teacher = deepcopy(net).eval().requires_grad_(False)
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    x = torch.rand(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with Watching():
        train_step(net, teacher, KDIGA(), optimizer, x, torch.tensor([1, 2]))
    assert len(orders) == 4 * sum(isinstance(module, BatchNorm2d) for module in net.modules())
    assert sum(order == {False} for order in orders) > len(orders) / 2
    assert all(len(order) == 1 for order in orders)


class Backwards(TorchDispatchMode):
    """Whether each tensor given to a convolution's backward pass is contiguous in channels-last order."""

    def __init__(self):
        super().__init__()
        self.orders: list[list[bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution_backward.default:
            self.orders.append([one.is_contiguous(memory_format=torch.channels_last) for one in args[:3]])
        return func(*args, **(kwargs or {}))


def test_off_the_cpu_a_convolution_is_given_one_memory_layout():
    shapes = [(2, 3, 5, 5), (4, 3, 3, 3), (2, 4, 5, 5)]
    x, weight, gradient = (torch.empty(one, device="meta", memory_format=torch.channels_last) for one in shapes)
    at = operators._Geometry((1, 1), (1, 1), (1, 1), 1)
    with Backwards() as seen:
        operators._InputGradient.apply(gradient, weight, x.shape, at)
        operators._WeightGradient.apply(x, gradient, weight.shape, at)
    assert seen.orders == [[True, True, True]] * 2


def test_small_tensors_take_torchs_path_unless_the_convolution_is_grouped(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    module, grouped = use_operators(nn.Conv2d(1, 2, 3)), use_operators(nn.Conv2d(2, 2, 3, groups=2))
    with twice_differentiable():
        values = module(torch.rand(2, 1, 8, 8)), module(torch.rand(5, 1, 128, 128)), grouped(torch.rand(2, 2, 8, 8))
    small, large, by_groups = (type(value.grad_fn).__name__ for value in values)
    assert small == "ConvolutionBackward0" != large and by_groups == large


@pytest.mark.parametrize("name", [*NETS, "digits_wide", "digits_vit"])
def test_a_still_copy_is_the_same_function(name: str):
    """Values and input gradients, in float64; the net itself stays as it was."""
    torch.manual_seed(0)
    shape = NETS.get(name, (1, 8, 8))
    model = build_model(name, num_classes=10, image_shape=shape).double()
    model(torch.rand(8, *shape, dtype=torch.float64))  # gives the running statistics something to hold
    before = {key: value.clone() for key, value in model.state_dict().items()}
    copied = folded_copy(model, shape)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    x, y = torch.rand(6, *shape, dtype=torch.float64), torch.arange(6)
    gradient, logits = input_gradient(model.eval(), x, y)
    other_gradient, other_logits = input_gradient(copied, x, y)
    assert torch.allclose(logits, other_logits, rtol=1e-9, atol=1e-9)
    assert torch.allclose(gradient, other_gradient, rtol=1e-9, atol=1e-9)


class Oddities(nn.Module):
    """Convolutions that may not be folded: their output is used twice, or the layer is; and one that may."""

    def __init__(self, branching: bool = False):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))
        self.norm_a, self.norm_b, self.norm_c = (nn.BatchNorm2d(3) for _ in range(3))
        self.branching = branching

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        a = a + self.norm_a(a)
        b = self.norm_b(self.b(a)) + self.b(x)
        c = self.norm_c(self.c(b)).mean((2, 3))
        return -c if self.branching and c.sum() > 0 else c


@pytest.mark.parametrize(
    ("build", "shape", "left"),
    [
        (lambda: build_model("mobilenet_v2", num_classes=10, image_shape=(3, 32, 32)), (3, 32, 32), 0),
        (lambda: build_model("preact_resnet18", num_classes=10, image_shape=(3, 32, 32)), (3, 32, 32), 9),
        (Oddities, (3, 4, 4), 2),
        (lambda: Oddities(branching=True), (3, 4, 4), 3),
    ],
    ids=["mobilenet_v2", "preact_resnet18", "used twice", "cannot be traced"],
)
def test_what_normalisation_a_still_copy_has_left(
    build: Callable[[], nn.Module], shape: tuple[int, int, int], left: int
):
    model = build().double()
    model(torch.rand(8, *shape, dtype=torch.float64))
    copied = folded_copy(model, shape)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in copied.modules()) == left
    x = torch.rand(6, *shape, dtype=torch.float64)
    assert torch.allclose(copied(x), model.eval()(x), rtol=1e-9, atol=1e-9)


def test_a_still_copy_is_made_of_matrices_where_images_are_small():
    copied = folded_copy(build_model("digits_small", num_classes=10, image_shape=(1, 8, 8)), (1, 8, 8))
    layers = [module for module in copied.get_submodule("features").children() if not isinstance(module, nn.Identity)]
    names = ["_Affine", "GELU", "_Affine", "GELU", "_Affine", "GELU", "_Affine"]
    assert [type(module).__name__ for module in layers] == names
    # The strided convolution goes forward as it is.
    assert [getattr(module, "layers", None) is not None for module in layers[::2]] == [False, True, False, False]
    large = folded_copy(build_model("mobilenet_v2", num_classes=10, image_shape=(3, 32, 32)), (3, 32, 32))
    assert not any(type(module).__name__ == "_Affine" for module in large.modules())
