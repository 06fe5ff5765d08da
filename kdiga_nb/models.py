"""``build_model(name, …)``: images in [0, 1] -> logits.

Whatever normalisation a net needs is one of its layers, so that ε always means pixels of [0, 1]. Head dropout (Section
2.2: dropout on the last layer) is a module called ``head_dropout``; it has no weights, so a state dict moves freely
between a net with and one without. To add a net, write its builder and enter it in ``MODELS``.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

ImageShape = tuple[int, int, int]


class Normalize(nn.Module):
    """(x − mean) / std a channel, as a layer: pixels stay in [0, 1] outside the net."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: list[float], std: list[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class DigitsCNN(nn.Module):
    """Three convolutions with batch normalisation (the second halves the image), 2×2 pooling, a linear head.

    The activation is GELU: a net whose gradient is to be trained needs one that is smooth. With ReLU the alignment of
    a fresh student collapses at weights that GELU bears (its input gradient is piecewise constant).
    """

    def __init__(self, width: int, num_classes: int, image_shape: ImageShape, head_dropout: float):
        super().__init__()
        channels, height, rows = image_shape
        self.features = nn.Sequential(
            Normalize([0.3] * channels, [0.4] * channels),
            nn.Conv2d(channels, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.GELU(),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.GELU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.GELU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
        )
        self.head_dropout = nn.Dropout(head_dropout)
        self.head = nn.Linear(2 * width * (height // 4) * (rows // 4), num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.head_dropout(self.features(x)))


class DigitsViT(nn.Module):
    """A small vision transformer (timm's), 2×2 patches.

    The fused attention kernels have no double backward, so attention takes the plain path.
    """

    def __init__(self, num_classes: int, image_shape: ImageShape, head_dropout: float):
        super().__init__()
        from timm.models.vision_transformer import Attention, VisionTransformer

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
        for module in self.encoder.modules():
            if isinstance(module, Attention):
                module.fused_attn = False  # pyright: ignore[reportAttributeAccessIssue]
        self.head_dropout = nn.Dropout(head_dropout)
        self.head = nn.Linear(48, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.head_dropout(self.encoder(self.normalize(x))))


def _digits_cnn(width: int) -> Callable[[int, ImageShape, float], nn.Module]:
    return lambda num_classes, image_shape, head_dropout: DigitsCNN(width, num_classes, image_shape, head_dropout)


MODELS: dict[str, Callable[[int, ImageShape, float], nn.Module]] = {
    "digits_small": _digits_cnn(8),
    "digits_medium": _digits_cnn(12),
    "digits_large": _digits_cnn(16),
    "digits_wide": _digits_cnn(24),
    "digits_vit": DigitsViT,
}


def build_model(
    name: str, *, num_classes: int, image_shape: ImageShape, head_dropout: float = 0.0, pretrained: bool = False
) -> nn.Module:
    """A net of that name with fresh weights: images (B, C, H, W) in [0, 1] -> logits (B, num_classes).

    Args:
        name: a key of ``MODELS``.
        head_dropout: probability of dropping a feature before the last layer, active in train mode only.
        pretrained: load published weights, for the nets that have them.

    Raises:
        ValueError: an unknown name, a dropout outside [0, 1), or no published weights.
    """
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    if not 0 <= head_dropout < 1:
        raise ValueError(f"head_dropout must be in [0, 1), got {head_dropout}")
    if pretrained:
        raise ValueError(f"{name} has no published weights; pass them as init=Checkpoint(path)")
    return MODELS[name](num_classes, image_shape, head_dropout)


def head_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of the last layer, ``model.head``: all that IGAM fine-tunes on a new task."""
    head = model.get_submodule("head")
    return list(head.parameters())
