"""Copies of nets that are only evaluated: BatchNorm folded into convolutions, small affine layers as one matrix."""

import logging
import math
from collections import Counter
from copy import deepcopy
from itertools import groupby
from typing import Any

import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.proxy import TraceError
from torch.nn.utils.fusion import fuse_conv_bn_eval

log = logging.getLogger("kdiga")
# Entries of the matrix of affine layers on small images. Up to FORWARD_LIMIT a product with it beats the layers, up to
# BACKWARD_LIMIT it beats their way back, and up to STRIDED_LIMIT if a strided convolution is among them.
FORWARD_LIMIT, BACKWARD_LIMIT, STRIDED_LIMIT = 100_000, 2**17, 2**18
AFFINE = (nn.Conv2d, nn.AvgPool2d, nn.Linear, nn.Flatten, nn.Identity, nn.Dropout)


class _MatrixBackward(torch.autograd.Function):
    """An affine map whose way back is one product with its matrix."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, matrix: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.shape = x.shape
        ctx.save_for_backward(matrix)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (matrix,) = ctx.saved_tensors
        return (gradient.flatten(1) @ matrix).view(ctx.shape), None, None


class _Affine(nn.Module):
    """Affine layers in a row as one matrix, read off where they send the unit vectors: both ways, or the way back."""

    def __init__(self, layers: nn.Sequential, shape: torch.Size, like: Tensor, both_ways: bool):
        super().__init__()
        pixels = math.prod(shape)
        basis = torch.cat([torch.zeros(1, pixels), torch.eye(pixels)]).to(like.device, torch.float64)
        with torch.no_grad():
            image = deepcopy(layers).double()(basis.view(-1, *shape))
        self.shape, flat = image.shape[1:], image.flatten(1)
        self.register_buffer("matrix", (flat[1:] - flat[0]).T.to(like.dtype).contiguous(), persistent=False)
        self.register_buffer("constant", flat[0].to(like.dtype), persistent=False)
        self.layers = None if both_ways else layers

    def forward(self, x: Tensor) -> Tensor:
        """The layers' input -> their output."""
        matrix = self.get_buffer("matrix")
        if self.layers is None:
            return F.linear(x.flatten(1), matrix, self.get_buffer("constant")).view(-1, *self.shape)
        value = self.layers(x.detach())
        if not (x.requires_grad and torch.is_grad_enabled()):
            return value
        return _MatrixBackward.apply(x, value, matrix)  # pyright: ignore[reportReturnType]


def folded_copy(model: nn.Module, image_shape: tuple[int, int, int]) -> nn.Module:
    """A copy of the net that is only to be evaluated: the same function to rounding, cheaper to attack.

    It is in eval mode and without parameter gradients. Batch normalisation that follows a convolution is folded into
    it (in a net that torch.fx can trace), and affine layers in a row become a matrix where images are so small that
    this is quicker. (B, C, H, W) -> (B, N), as the net; first derivatives only.
    """
    copied = deepcopy(model).eval().requires_grad_(False)
    for name, following in _followed_by_normalisation(copied):
        convolution, after = copied.get_submodule(name), copied.get_submodule(following)
        assert isinstance(convolution, nn.Conv2d) and isinstance(after, nn.BatchNorm2d)
        copied.set_submodule(name, fuse_conv_bn_eval(convolution, after))
        copied.set_submodule(following, nn.Identity())
    sequences = [module for module in copied.modules() if isinstance(module, nn.Sequential)]
    shapes = _shapes(copied, image_shape)
    like = next(copied.parameters())
    inside = set()
    for sequence in sequences:
        inside |= set(sequence.children())
        for affine, run in groupby(list(sequence.named_children()), lambda child: _is_affine(child[1])):
            names, layers = zip(*run, strict=True)
            if affine and (matrix := _as_matrix(layers, shapes, like)) is not None:
                sequence.set_submodule(names[0], matrix)
                for name in names[1:]:
                    sequence.set_submodule(name, nn.Identity())
    for name, module in list(copied.named_modules()):
        alone = isinstance(module, nn.Conv2d) and module in shapes and module not in inside
        if alone and (matrix := _as_matrix((module,), shapes, like)) is not None:
            copied.set_submodule(name, matrix)
        if hasattr(module, "fused_attn"):
            module.register_forward_pre_hook(_fused_without_gradient)
    return copied


class _Tracer(torch.fx.Tracer):
    """Takes the layers here for what they are, as it takes PyTorch's."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d | nn.BatchNorm2d) or super().is_leaf_module(m, module_qualified_name)


def _followed_by_normalisation(model: nn.Module) -> list[tuple[str, str]]:
    """Names of each convolution whose output goes into batch normalisation alone, and of the latter.

    Both are called once. None of a net whose forward pass depends on values, which cannot be traced.
    """
    try:
        graph = _Tracer().trace(model)
    except (TraceError, TypeError, RuntimeError, AttributeError, ValueError) as error:
        log.debug("%s is not folded: %s", type(model).__name__, error)
        return []
    modules = dict(model.named_modules())
    calls = [node for node in graph.nodes if node.op == "call_module"]
    times = Counter(id(modules[str(node.target)]) for node in calls)
    pairs = []
    for node in calls:
        before = node.args[0]
        if not isinstance(before, torch.fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        convolution, after = (modules[str(end.target)] for end in (before, node))
        once = times[id(convolution)] == times[id(after)] == 1
        if isinstance(convolution, nn.Conv2d) and isinstance(after, nn.BatchNorm2d) and once:
            pairs.append((str(before.target), str(node.target)))
    return pairs


def _fused_without_gradient(attention: nn.Module, _: Any) -> None:
    """timm's switch: the fused kernel is the quicker one forward, and on small images the slower one back."""
    attention.fused_attn = not torch.is_grad_enabled()  # pyright: ignore[reportArgumentType]


def _is_affine(module: nn.Module) -> bool:
    return isinstance(module, AFFINE) or getattr(module, "is_affine", False)


Shapes = dict[nn.Module, tuple[torch.Size, torch.Size]]


def _as_matrix(layers: tuple[nn.Module, ...], shapes: Shapes, like: Tensor) -> _Affine | None:
    """The affine layers as a matrix, if that is quicker."""
    work = [layer for layer in layers if not isinstance(layer, nn.Flatten | nn.Identity | nn.Dropout)]
    if not work or (len(work) == 1 and isinstance(work[0], nn.Linear)) or any(layer not in shapes for layer in layers):
        return None
    shape, size = shapes[layers[0]][0], math.prod(shapes[layers[0]][0]) * math.prod(shapes[layers[-1]][1])
    strided = any(isinstance(layer, nn.Conv2d) and max(layer.stride) > 1 for layer in work)
    if size > (STRIDED_LIMIT if strided else BACKWARD_LIMIT):
        return None
    return _Affine(nn.Sequential(*layers), shape, like, both_ways=size <= FORWARD_LIMIT)


def _shapes(model: nn.Module, image_shape: tuple[int, int, int]) -> Shapes:
    """Shapes of the input and the output of each layer that takes and gives one tensor, without the batch."""
    shapes: Shapes = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        shapes[module] = (inputs[0].shape[1:], output.shape[1:])

    hooks = [module.register_forward_hook(note) for module in model.modules() if _is_affine(module)]
    parameter = next(model.parameters())
    with torch.no_grad():
        model(torch.zeros(1, *image_shape, dtype=parameter.dtype, device=parameter.device))
    for hook in hooks:
        hook.remove()
    return shapes
