"""Every net of the kit under one contract: images in [0, 1] to logits, twice differentiable, dropout as a module."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from kdiga_nb.losses import input_gradient
from kdiga_nb.models import MODELS, Normalize, build_model, head_parameters

CLASSES = 7


def shape_of(name: str) -> tuple[int, int, int]:
    return (1, 8, 8) if name.startswith("digits") else (3, 32, 32)


def net(name: str, head_dropout: float = 0.0, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_model(name, num_classes=CLASSES, image_shape=shape_of(name), head_dropout=head_dropout)


def images(name: str, n: int = 3) -> Tensor:
    return torch.rand(n, *shape_of(name), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_one_row_an_image_and_do_not_mix_images(name: str) -> None:
    model, x = net(name).eval(), images(name)
    logits = model(x)
    assert logits.shape == (3, CLASSES) and logits.isfinite().all()
    assert (logits[0] - logits[1]).abs().max() > 1e-6
    torch.testing.assert_close(model(x[1:2]), logits[1:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_the_seed_decides_the_weights(name: str) -> None:
    first, second, other = (net(name, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", MODELS)
def test_normalisation_is_a_layer_that_sees_the_image_as_it_is(name: str) -> None:
    model, x = net(name).eval(), images(name)
    layers = [module for module in model.modules() if isinstance(module, Normalize)]
    assert len(layers) == 1 or not name.startswith("digits")
    for layer in layers:
        seen: list[tuple[Tensor, Tensor]] = []
        layer.register_forward_hook(lambda _, inputs, output, seen=seen: seen.append((inputs[0], output)))
        model(x)
        ((given, normalised),) = seen
        assert torch.equal(given, x)
        torch.testing.assert_close(normalised * layer.std + layer.mean, x)


def test_normalize_is_the_standard_score_a_channel() -> None:
    x = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    y = Normalize([0.1, 0.2, 0.3], [0.5, 0.25, 0.125])(x)
    for channel, (mean, std) in enumerate(zip([0.1, 0.2, 0.3], [0.5, 0.25, 0.125], strict=True)):
        torch.testing.assert_close(y[:, channel], (x[:, channel] - mean) / std)


@pytest.mark.parametrize("name", MODELS)
def test_weights_move_freely_between_nets_with_and_without_dropout(name: str) -> None:
    plain, dropping = net(name, seed=0), net(name, head_dropout=0.5, seed=1)
    assert list(plain.state_dict()) == list(dropping.state_dict())
    dropping.load_state_dict(plain.state_dict())
    x = images(name)
    assert torch.equal(plain.eval()(x), dropping.eval()(x))


@pytest.mark.parametrize("name", MODELS)
def test_head_dropout_acts_in_train_mode_only(name: str) -> None:
    model, x = net(name, head_dropout=0.5), images(name)
    module = model.get_submodule("head_dropout")
    assert isinstance(module, nn.Dropout) and module.p == 0.5
    torch.manual_seed(0)
    # Of the whole net only the dropout is in train mode, so nothing else can make two passes differ.
    model.eval()
    module.train()
    assert not torch.equal(model(x), model(x))
    module.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("name", MODELS)
def test_head_dropout_acts_on_the_heads_input(name: str) -> None:
    model, x = net(name, head_dropout=0.999).eval(), images(name)
    model.get_submodule("head_dropout").train()
    torch.manual_seed(0)
    zeros: list[float] = []
    model.get_submodule("head").register_forward_pre_hook(
        lambda _, inputs: zeros.append((inputs[0] == 0).float().mean().item())
    )
    model(x)
    assert zeros[0] > 0.95


@pytest.mark.parametrize("name", MODELS)
def test_the_input_gradient_can_be_differentiated_by_the_weights(name: str) -> None:
    """The second derivative along one direction of the weights against a central difference, in float64."""
    model, x, y = net(name).double().eval(), images(name, 2).double(), torch.tensor([0, 1])
    generator = torch.Generator().manual_seed(0)
    weights = dict(model.named_parameters())
    direction = {k: torch.randn(w.shape, generator=generator, dtype=w.dtype) for k, w in weights.items()}
    probe = torch.randn(x.shape, generator=generator, dtype=x.dtype)

    def projected(step: float, create_graph: bool = False) -> Tensor:
        moved = {k: w + step * direction[k] for k, w in weights.items()}
        gradient, _ = input_gradient(lambda z: functional_call(model, moved, (z,)), x, y, create_graph=create_graph)
        return (gradient * probe).sum()

    seconds = torch.autograd.grad(projected(0.0, create_graph=True), list(weights.values()), allow_unused=True)
    assert all(second is None or second.isfinite().all() for second in seconds)
    along = sum((d * s).sum().item() for d, s in zip(direction.values(), seconds, strict=True) if s is not None)
    h = 1e-6
    difference = (projected(h) - projected(-h)).item() / (2 * h)
    assert abs(difference) > 1e-6
    assert along == pytest.approx(difference, rel=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_head_parameters_are_the_last_layers(name: str) -> None:
    model, x = net(name).eval(), images(name)
    weight, bias = head_parameters(model)
    assert weight.shape[0] == CLASSES and bias.shape == (CLASSES,)
    before = model(x)
    with torch.no_grad():
        bias += torch.arange(CLASSES)
    torch.testing.assert_close(model(x) - before, torch.arange(CLASSES).float().expand(3, -1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "digits_tiny"}, "model must be one of digits_small, .*'digits_tiny'"),
        ({"head_dropout": 1.0}, "head_dropout must be in"),
        ({"head_dropout": -0.1}, "head_dropout must be in"),
        ({"head_dropout": float("nan")}, "head_dropout must be in"),
        ({"pretrained": True}, "digits_small has no published weights"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(**({"name": "digits_small", "num_classes": 10, "image_shape": (1, 8, 8)} | arguments))


def test_an_unknown_name_is_answered_with_all_names() -> None:
    with pytest.raises(ValueError) as error:
        build_model("resnet", num_classes=10, image_shape=(1, 8, 8))
    assert all(name in str(error.value) for name in MODELS)
