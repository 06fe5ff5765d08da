"""``build_model(name, …)``: images in [0, 1] -> logits.

Whatever normalisation a net needs is one of its layers, so that ε always means pixels of [0, 1]. Head dropout (Section
2.2: dropout on the last layer) is a module called ``head_dropout``; it has no weights, so a state dict moves freely
between a net with and one without. To add a net, write its builder and enter it in ``MODELS``.

The nets of the paper's own scale carry the layer names of the published checkpoints of their kind, with the last layer
called ``head``, so that those files load (``checkpoints``). Their normalisation is part of the state dict, because
published files contain it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdiga_nb.numerics.double_backward import use_operators

ImageShape = tuple[int, int, int]


class Normalize(nn.Module):
    """(x − mean) / std per channel, as a layer: pixels stay in [0, 1] outside the net."""

    is_affine = True
    mean: Tensor
    std: Tensor

    def __init__(self, mean: list[float], std: list[float], *, persistent: bool = False):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class DigitsCNN(nn.Module):
    """Three convolutions with batch normalisation (the second halves the image), 2×2 pooling, a linear head.

    The activation is GELU, because training an input gradient needs a smooth activation. The input gradient of a ReLU
    net is piecewise constant, and the alignment of a fresh ReLU student collapses at weights λ_IGA that GELU tolerates.
    """

    def __init__(self, width: int, num_classes: int, image_shape: ImageShape, head_dropout: float):
        super().__init__()
        channels, height, rows = image_shape
        self.features = nn.Sequential(
            Normalize([0.3] * channels, [0.4] * channels),
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.GELU(),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.GELU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.GELU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
        )
        self.head_dropout = nn.Dropout(head_dropout)
        self.head = nn.Linear(2 * width * (height // 4) * (rows // 4), num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.head_dropout(self.features(x)))


class DigitsMLP(nn.Module):
    """Two hidden layers of ReLUs: small and piecewise linear, so that its robust radius can be certified."""

    def __init__(self, width: int, num_classes: int, image_shape: ImageShape, head_dropout: float):
        super().__init__()
        channels, height, rows = image_shape
        self.features = nn.Sequential(
            Normalize([0.3] * channels, [0.4] * channels),
            nn.Flatten(),
            nn.Linear(channels * height * rows, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
        )
        self.head_dropout = nn.Dropout(head_dropout)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.head_dropout(self.features(x)))


class DigitsViT(nn.Module):
    """A small vision transformer (timm's), 2×2 patches."""

    def __init__(self, num_classes: int, image_shape: ImageShape, head_dropout: float):
        super().__init__()
        from timm.models.vision_transformer import VisionTransformer

        channels, height, width = image_shape
        self.normalize = Normalize([0.3] * channels, [0.4] * channels)
        self.encoder = VisionTransformer(
            img_size=(height, width),
            patch_size=2,
            in_chans=channels,
            num_classes=0,
            embed_dim=48,
            depth=2,
            num_heads=4,
            mlp_ratio=2,
        )
        _plain_attention(self.encoder)
        self.head_dropout = nn.Dropout(head_dropout)
        self.head = nn.Linear(48, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.head_dropout(self.encoder(self.normalize(x))))


def _plain_attention(model: nn.Module) -> None:
    """The fused attention kernels have no double backward, so attention takes the plain path."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # pyright: ignore[reportArgumentType]


def _unnormalised(channels: int) -> Normalize:
    """The paper's CIFAR-10 nets see the pixels as they are; a published file may bring a mean and a deviation."""
    return Normalize([0.0] * channels, [1.0] * channels, persistent=True)


class _InvertedResidual(nn.Module):
    """MobileNetV2's block: expand (1×1), filter each channel (3×3), project (1×1), and a shortcut where stride is 1."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int):
        super().__init__()
        inner = expansion * inputs
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.residual = stride == 1
        self.shortcut = nn.Sequential()
        if self.residual and inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return out + self.shortcut(x) if self.residual else out


class MobileNetV2(nn.Module):
    """MobileNetV2 for 32×32 images (Sandler et al. 2018), the paper's student: 2,296,922 parameters for 10 classes.

    The variant of the authors' code: stem and first stages keep the full resolution, the activation is ReLU, and
    blocks of stride 1 have a shortcut even where the number of channels changes.
    """

    # expansion, channels, blocks, stride of the first block
    STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self, num_classes: int, image_shape: ImageShape, head_dropout: float):
        super().__init__()
        self.normalize = _unnormalised(image_shape[0])
        self.conv1 = nn.Conv2d(image_shape[0], 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        blocks, inputs = [], 32
        for expansion, channels, number, stride in self.STAGES:
            for index in range(number):
                blocks.append(_InvertedResidual(inputs, channels, expansion, stride if index == 0 else 1))
                inputs = channels
        self.layers = nn.Sequential(*blocks)
        self.conv2 = nn.Conv2d(inputs, 1280, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1280)
        self.head_dropout = nn.Dropout(head_dropout)
        self.head = nn.Linear(1280, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(self.normalize(x))))
        out = F.relu(self.bn2(self.conv2(self.layers(out))))
        return self.head(self.head_dropout(out.mean((2, 3))))


class _PooledResidual(nn.Module):
    """Convolution, 2×2 max-pool, BN, GELU; then a residual branch of the same without pooling."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.activation = nn.GELU()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        out = self.activation(self.bn1(F.max_pool2d(self.conv1(x), 2)))
        return out + self.activation(self.bn2(self.conv2(out)))


class CifarCNN(nn.Module):
    """A small, smooth, quick net for 32×32 images: 1,113,730 parameters for 10 classes at width 48, 1,978,026 at 64.

    The layout is that of airbench94 (Jordan 2024, "94% on CIFAR-10 in 3.29 seconds on a single GPU"): pooling directly
    after the first convolution of a block, so that normalisation and activation see a quarter of the pixels. The stem
    is a trained 3×3 convolution instead of a fixed whitening, each block has a shortcut, and the last pooling is a
    mean, which is smooth. Channels: 3 -> width/2 -> width -> 4·width -> 4·width; sides: 32 -> 32 -> 16 -> 8 -> 4 -> 1.
    """

    channels_last = True  # the quicker memory order for this net on a CPU too, see ``placed``

    def __init__(self, width: int, num_classes: int, image_shape: ImageShape, head_dropout: float):
        super().__init__()
        self.activation = nn.GELU()
        channels, stem = image_shape[0], width // 2
        self.normalize = Normalize([0.4914, 0.4822, 0.4465][:channels], [0.2470, 0.2435, 0.2616][:channels])
        self.conv1 = nn.Conv2d(channels, stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.layers = nn.Sequential(
            _PooledResidual(stem, width), _PooledResidual(width, 4 * width), _PooledResidual(4 * width, 4 * width)
        )
        self.head_dropout = nn.Dropout(head_dropout)
        self.head = nn.Linear(4 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(self.activation(self.bn1(self.conv1(self.normalize(x)))))
        return self.head(self.head_dropout(out.mean((2, 3))))


class _PreActivation(nn.Module):
    """The pre-activation residual block of wide residual nets: BN, ReLU, 3×3; twice."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.convShortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    @property
    def projection(self) -> nn.Module | None:
        """The shortcut's 1×1 convolution, where the width changes."""
        return self.convShortcut

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = x if self.projection is None else self.projection(out)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(out))))


class _Stage(nn.Module):
    """Residual blocks of one width, under the name ``layer`` that published files have."""

    def __init__(self, inputs: int, outputs: int, blocks: int, stride: int):
        super().__init__()
        rest = [_PreActivation(outputs, outputs, 1) for _ in range(blocks - 1)]
        self.layer = nn.Sequential(_PreActivation(inputs, outputs, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """A wide residual net (Zagoruyko & Komodakis 2016): three stages of (depth − 4)/6 blocks, 16·width channels up.

    WRN-34-10, the paper's teacher, has 46,160,474 parameters. (The published file has a fourth, unused stage; with it
    one counts the paper's "48M".)
    """

    def __init__(self, depth: int, width: int, num_classes: int, image_shape: ImageShape, head_dropout: float):
        super().__init__()
        blocks, channels = (depth - 4) // 6, [16, 16 * width, 32 * width, 64 * width]
        self.normalize = _unnormalised(image_shape[0])
        self.conv1 = nn.Conv2d(image_shape[0], 16, 3, padding=1, bias=False)
        self.block1 = _Stage(channels[0], channels[1], blocks, 1)
        self.block2 = _Stage(channels[1], channels[2], blocks, 2)
        self.block3 = _Stage(channels[2], channels[3], blocks, 2)
        self.bn1 = nn.BatchNorm2d(channels[3])
        self.head_dropout = nn.Dropout(head_dropout)
        self.head = nn.Linear(channels[3], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        out = self.block3(self.block2(self.block1(self.conv1(self.normalize(x)))))
        return self.head(self.head_dropout(F.relu(self.bn1(out)).mean((2, 3))))


class _PreActResidual(_PreActivation):
    """The same block under PreActResNet's names: the shortcut is a sequence of one."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__(inputs, outputs, stride)
        self.shortcut = None if self.convShortcut is None else nn.Sequential(self.convShortcut)
        del self.convShortcut

    @property
    def projection(self) -> nn.Module | None:
        return self.shortcut


class PreActResNet18(nn.Module):
    """PreActResNet-18 (He et al. 2016) with BN before the last layer: Table 5's student, 11,172,170 parameters."""

    def __init__(self, num_classes: int, image_shape: ImageShape, head_dropout: float):
        super().__init__()
        self.normalize = _unnormalised(image_shape[0])
        self.conv1 = nn.Conv2d(image_shape[0], 64, 3, padding=1, bias=False)
        self.layer1 = nn.Sequential(_PreActResidual(64, 64, 1), _PreActResidual(64, 64, 1))
        self.layer2 = nn.Sequential(_PreActResidual(64, 128, 2), _PreActResidual(128, 128, 1))
        self.layer3 = nn.Sequential(_PreActResidual(128, 256, 2), _PreActResidual(256, 256, 1))
        self.layer4 = nn.Sequential(_PreActResidual(256, 512, 2), _PreActResidual(512, 512, 1))
        self.bn = nn.BatchNorm2d(512)
        self.head_dropout = nn.Dropout(head_dropout)
        self.head = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(self.normalize(x))))))
        return self.head(self.head_dropout(F.relu(self.bn(out)).mean((2, 3))))


class MnistCNN(nn.Module):
    """The net for MNIST that TRADES' authors publish robust weights of: four convolutions and three linear layers.

    Images of another shape are brought to 28×28 grey ones first (mean of the channels, bilinear), so that the net can
    be IGAM's source teacher on CIFAR-10 with a new last layer.
    """

    def __init__(self, num_classes: int, image_shape: ImageShape, head_dropout: float):
        super().__init__()
        self.normalize = _unnormalised(1)
        self.conv1, self.conv2 = nn.Conv2d(1, 32, 3), nn.Conv2d(32, 32, 3)
        self.conv3, self.conv4 = nn.Conv2d(32, 64, 3), nn.Conv2d(64, 64, 3)
        self.fc1, self.fc2 = nn.Linear(64 * 4 * 4, 200), nn.Linear(200, 200)
        self.head_dropout = nn.Dropout(head_dropout)
        self.head = nn.Linear(200, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 1:
            x = x.mean(1, keepdim=True)
        if x.shape[2:] != (28, 28):
            x = F.interpolate(x, (28, 28), mode="bilinear", align_corners=False)
        out = F.max_pool2d(F.relu(self.conv2(F.relu(self.conv1(self.normalize(x))))), 2)
        out = F.max_pool2d(F.relu(self.conv4(F.relu(self.conv3(out)))), 2)
        out = F.relu(self.fc2(F.relu(self.fc1(out.flatten(1)))))
        return self.head(self.head_dropout(out))


class ImageNetNet(nn.Module):
    """One of timm's nets without its last layer, between a normalisation and a head: ``encoder``, ``head``.

    The normalisation has timm's own mean and deviation, which differ between its nets. ``name`` is timm's; ``sized``
    says that timm builds the net for one image size, as it does a transformer.
    """

    def __init__(self, name: str, sized: bool, num_classes: int, image_shape: ImageShape, head_dropout: float):
        super().__init__()
        import timm

        channels = image_shape[0]
        size: dict[str, Any] = {"img_size": image_shape[1:]} if sized else {}
        self.encoder = timm.create_model(name, num_classes=0, in_chans=channels, **size)
        _plain_attention(self.encoder)
        config = timm.get_pretrained_cfg(name)
        mean, std = (config.mean, config.std) if config else (None, None)
        if mean is None or std is None:
            raise ValueError(f"timm does not know how {name} is normalised")
        self.normalize = Normalize(list(mean[:channels]), list(std[:channels]), persistent=True)
        self.head_dropout = nn.Dropout(head_dropout)
        self.head = nn.Linear(int(self.encoder.num_features), num_classes)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.head_dropout(self.encoder(self.normalize(x))))


def timm_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of one of timm's nets under the names of ``ImageNetNet``."""
    last = ("fc.", "head.")
    return {f"head.{k.partition('.')[2]}" if k.startswith(last) else f"encoder.{k}": v for k, v in state.items()}


def published_weights(name: str, image_shape: ImageShape) -> dict[str, Tensor]:
    """The weights that timm publishes for a net of ``MODELS``, with position embeddings for images of that shape."""
    import timm

    net = MODELS[name]
    assert net.timm is not None
    size: dict[str, Any] = {"img_size": image_shape[1:]} if net.sized else {}
    model = timm.create_model(net.timm, pretrained=True, in_chans=image_shape[0], **size)
    return timm_names(model.state_dict())


Builder = Callable[[int, ImageShape, float], nn.Module]


@dataclass(frozen=True)
class Net:
    """One entry of ``MODELS``.

    Attributes:
        build: (num_classes, image_shape, head_dropout) -> the net with fresh weights.
        digits: whether the net is made for the 8×8 digits; the others are made for larger images.
        timm: timm's name for the net and its published weights, for the nets that Table 2 takes ready-made.
        sized: whether timm builds the net for one image size, as it does a transformer.
    """

    build: Builder
    digits: bool = False
    timm: str | None = None
    sized: bool = False


def _with_relu(net: Net) -> Net:
    """The same net with ReLU wherever it has GELU."""

    def build(num_classes: int, image_shape: ImageShape, head_dropout: float) -> nn.Module:
        model = net.build(num_classes, image_shape, head_dropout)
        for module in model.modules():
            for name, child in module.named_children():
                if isinstance(child, nn.GELU):
                    setattr(module, name, nn.ReLU())
        return model

    return replace(net, build=build)


def _digits(build: Callable[..., nn.Module], *width: int) -> Net:
    return Net(partial(build, *width), digits=True)


def _timm(name: str, *, sized: bool) -> Net:
    return Net(partial(ImageNetNet, name, sized), timm=name, sized=sized)


MODELS: dict[str, Net] = {
    "digits_small": _digits(DigitsCNN, 8),
    "digits_small_relu": _with_relu(_digits(DigitsCNN, 8)),
    "digits_medium": _digits(DigitsCNN, 10),
    "digits_large": _digits(DigitsCNN, 14),
    "digits_wide": _digits(DigitsCNN, 16),
    "digits_vit": _digits(DigitsViT),
    "digits_mlp": _digits(DigitsMLP, 32),
    "digits_mlp_wide": _digits(DigitsMLP, 64),
    "cifar_cnn_narrow": Net(partial(CifarCNN, 24)),
    "cifar_cnn": Net(partial(CifarCNN, 48)),
    "cifar_cnn_relu": _with_relu(Net(partial(CifarCNN, 48))),
    "cifar_cnn_wide": Net(partial(CifarCNN, 64)),
    "mobilenet_v2": Net(MobileNetV2),
    "wrn_28_10": Net(partial(WideResNet, 28, 10)),
    "wrn_34_10": Net(partial(WideResNet, 34, 10)),
    "preact_resnet18": Net(PreActResNet18),
    "trades_mnist": Net(MnistCNN),
    "resnet18": _timm("resnet18.tv_in1k", sized=False),
    "resnet34": _timm("resnet34.tv_in1k", sized=False),
    "resnet50": _timm("resnet50.tv_in1k", sized=False),
    "resnet101": _timm("resnet101.tv_in1k", sized=False),
    "vit_s16": _timm("vit_small_patch16_224.augreg_in21k_ft_in1k", sized=True),
    "vit_b16": _timm("vit_base_patch16_224.augreg_in21k_ft_in1k", sized=True),
    "vit_l16": _timm("vit_large_patch16_224.augreg_in21k_ft_in1k", sized=True),
    "deit_s16": _timm("deit_small_patch16_224.fb_in1k", sized=True),
}


def build_model(
    name: str, *, num_classes: int, image_shape: ImageShape, head_dropout: float = 0.0, pretrained: bool = False
) -> nn.Module:
    """A net of that name with fresh weights: images (B, C, H, W) in [0, 1] -> logits (B, num_classes).

    Args:
        name: a key of ``MODELS``.
        head_dropout: probability of dropping a feature before the last layer, active in train mode only.
        pretrained: load the weights that timm publishes for ImageNet, for its nets; with another number of classes
            than its 1,000, all but the last layer's.

    Raises:
        ValueError: an unknown name, a dropout outside [0, 1), or no published weights.
    """
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    if not 0 <= head_dropout < 1:
        raise ValueError(f"head_dropout must be in [0, 1), got {head_dropout}")
    if pretrained and MODELS[name].timm is None:
        raise ValueError(f"{name} has no published weights; pass them as init=Checkpoint(path)")
    model = use_operators(MODELS[name].build(num_classes, image_shape, head_dropout))
    if pretrained:
        weights = published_weights(name, image_shape)
        if len(weights["head.bias"]) != num_classes:
            weights = {k: v for k, v in weights.items() if not k.startswith("head.")}
        model.load_state_dict(model.state_dict() | weights)
    return model


def head_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of the last layer, ``model.head``: all that IGAM fine-tunes on a new task."""
    head = model.get_submodule("head")
    return list(head.parameters())
