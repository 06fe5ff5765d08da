"""Every net of the kit under one contract: images in [0, 1] to logits, twice differentiable, dropout as a module."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.func import functional_call

from kdiga_nb.losses import input_gradient
from kdiga_nb.models import MODELS, Normalize, build_model, head_parameters, timm_names

CLASSES = 7


# The larger nets of the same classes are checked by their names and sizes alone.
LARGE = ("wrn_34_10", "wrn_28_10", "resnet34", "resnet50", "resnet101", "vit_b16", "vit_l16", "deit_s16")
SMALL = [name for name in MODELS if name not in LARGE]
TIMM = {name: net.timm for name, net in MODELS.items() if net.timm}


def shape_of(name: str) -> tuple[int, int, int]:
    return (1, 8, 8) if MODELS[name].digits else (1, 28, 28) if name == "trades_mnist" else (3, 32, 32)


def net(name: str, head_dropout: float = 0.0, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_model(name, num_classes=CLASSES, image_shape=shape_of(name), head_dropout=head_dropout)


def images(name: str, n: int = 3) -> Tensor:
    return torch.rand(n, *shape_of(name), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", SMALL)
def test_logits_are_one_row_an_image_and_do_not_mix_images(name: str) -> None:
    model, x = net(name), images(name)
    with torch.no_grad():
        for _ in range(10):  # fresh statistics of BatchNorm let the signal of a deep net fade away
            model(images(name, 8))
    model.eval()
    logits = model(x)
    assert logits.shape == (3, CLASSES) and logits.isfinite().all()
    assert (logits[0] - logits[1]).abs().max() > 1e-6
    torch.testing.assert_close(model(x[1:2]), logits[1:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_the_seed_decides_the_weights(name: str) -> None:
    first, second, other = (net(name, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", SMALL)
def test_normalisation_is_a_layer_that_sees_the_image_as_it_is(name: str) -> None:
    model, x = net(name).eval(), images(name)
    layers = [module for module in model.modules() if isinstance(module, Normalize)]
    assert len(layers) == 1
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


@pytest.mark.parametrize("name", SMALL)
def test_weights_move_freely_between_nets_with_and_without_dropout(name: str) -> None:
    plain, dropping = net(name, seed=0), net(name, head_dropout=0.5, seed=1)
    assert list(plain.state_dict()) == list(dropping.state_dict())
    dropping.load_state_dict(plain.state_dict())
    x = images(name)
    assert torch.equal(plain.eval()(x), dropping.eval()(x))


@pytest.mark.parametrize("name", SMALL)
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


@pytest.mark.parametrize("name", SMALL)
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


@pytest.mark.parametrize("name", SMALL)
def test_the_input_gradient_can_be_differentiated_by_the_weights(name: str) -> None:
    """The second derivative along one direction of the weights against a central difference, in float64."""
    model, x, y = net(name).double().eval(), images(name, 2).double(), torch.tensor([0, 1])
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # biases of 0 put dead channels exactly on the kink of ReLU
            nn.init.normal_(module.bias, std=0.1, generator=generator)
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
    h = 1e-6 if MODELS[name].digits or name == "vit_s16" else 1e-9  # a step short of the kinks of ReLU
    difference = (projected(h) - projected(-h)).item() / (2 * h)
    assert abs(difference) > 1e-6
    assert along == pytest.approx(difference, rel=1e-4)


@pytest.mark.parametrize("name", SMALL)
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
        ({"name": "mobilenet_v2", "pretrained": True}, "mobilenet_v2 has no published weights"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(**({"name": "digits_small", "num_classes": 10, "image_shape": (1, 8, 8)} | arguments))


def test_an_unknown_name_is_answered_with_all_names() -> None:
    with pytest.raises(ValueError) as error:
        build_model("resnet", num_classes=10, image_shape=(1, 8, 8))
    assert all(name in str(error.value) for name in MODELS)


# ---- the nets of the paper's own scale ----

# Parameters as published: author code (MobileNetV2), the nets' papers, timm's model cards; 10 and 1,000 classes.
PARAMETERS = {
    "cifar_cnn": 1_113_730,
    "cifar_cnn_relu": 1_113_730,
    "cifar_cnn_narrow": 279_526,
    "cifar_cnn_wide": 1_978_026,
    "mobilenet_v2": 2_296_922,
    "wrn_28_10": 36_479_194,
    "wrn_34_10": 46_160_474,
    "preact_resnet18": 11_172_170,
    "trades_mnist": 312_202,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "vit_s16": 22_050_664,
    "vit_b16": 86_567_656,
    "vit_l16": 304_326_632,
    "deit_s16": 22_050_664,
}


@pytest.mark.parametrize(("name", "parameters"), PARAMETERS.items())
def test_nets_for_photographs_have_their_stated_size(name: str, parameters: int) -> None:
    imagenet = name in TIMM
    shape = (3, 224, 224) if imagenet else shape_of(name)
    with torch.device("meta"):
        model = build_model(name, num_classes=1000 if imagenet else 10, image_shape=shape)
        logits = model.eval()(torch.empty(2, *shape))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert logits.shape == (2, 1000 if imagenet else 10)


def test_no_net_for_photographs_goes_uncounted() -> None:
    assert set(PARAMETERS) == {name for name, entry in MODELS.items() if not entry.digits}


@pytest.mark.parametrize("name", ["vit_s16", "vit_b16", "vit_l16", "deit_s16", "digits_vit"])
def test_no_attention_is_fused(name: str) -> None:
    with torch.device("meta"):
        model = net(name)
    switches = [module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")]
    assert switches and not any(switches)


@pytest.mark.parametrize("name", TIMM)
def test_timms_nets_give_timms_logits_under_our_names(name: str) -> None:
    """The same weights under timm's names and ours; of the large nets the names alone."""
    shape, large = (3, 32, 32), name in LARGE
    with torch.device("meta" if large else "cpu"):
        size: dict[str, Any] = {} if name.startswith("resnet") else {"img_size": shape[1:]}
        theirs = timm.create_model(TIMM[name], num_classes=CLASSES, **size).eval()
        ours = net(name).eval()
    state = timm_names(theirs.state_dict())
    assert set(ours.state_dict()) == set(state) | {"normalize.mean", "normalize.std"}
    if not large:
        ours.load_state_dict(ours.state_dict() | state)
        x = images(name)
        config: Any = theirs.pretrained_cfg
        mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
        torch.testing.assert_close(ours(x), theirs((x - mean) / std))


def test_the_mnist_net_takes_colour_images_as_grey_ones() -> None:
    model = net("trades_mnist").eval()
    grey = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(grey.expand(-1, 3, -1, -1)), model(grey))
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, CLASSES)


@pytest.mark.parametrize("depth", [28, 34])
def test_wide_nets_count_their_convolutions(depth: int) -> None:
    """A WRN of that depth has as many 3×3 convolutions as its name says, less the last layer and the shortcuts."""
    with torch.device("meta"):
        model = net(f"wrn_{depth}_10")
    kernels = [module.kernel_size for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert kernels.count((3, 3)) == depth - 3 and kernels.count((1, 1)) == 3
