"""Copies of nets that are only evaluated: BatchNorm folded into convolutions, small affine layers as one matrix."""

import logging
import math
from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from itertools import groupby
from typing import Any

import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.proxy import TraceError
from torch.nn.utils.fusion import fuse_conv_bn_eval

log = logging.getLogger("kdiga")
# Limits on the number of matrix entries. Up to FORWARD_LIMIT the matrix is faster than the layers, up to BACKWARD_LIMIT
# it is faster than their backward pass, and up to STRIDED_LIMIT if one of the layers is a strided convolution.
FORWARD_LIMIT, BACKWARD_LIMIT, STRIDED_LIMIT = 100_000, 2**17, 2**18
AFFINE = (nn.Conv2d, nn.AvgPool2d, nn.Linear, nn.Flatten, nn.Identity, nn.Dropout)


class _MatrixBackward(torch.autograd.Function):
    """An affine map whose backward pass is one product with its matrix."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, matrix: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.shape = x.shape
        ctx.save_for_backward(matrix)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (matrix,) = ctx.saved_tensors
        return (gradient.flatten(1) @ matrix).view(ctx.shape), None, None


def affine_matrix(layers: nn.Module, shape: Sequence[int], device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Affine layers as one matrix (M, K) and constant, in double precision, built from the images of the basis vectors.

    Args:
        shape: of one input of the layers, K numbers. The constant has the shape of one output, M numbers.
        device: where the layers are (default: the CPU).
    """
    basis = torch.eye(math.prod(shape), dtype=torch.float64, device=device)
    with torch.no_grad():
        images = deepcopy(layers).double()(torch.cat([torch.zeros_like(basis[:1]), basis]).view(-1, *shape))
    flat = images.flatten(1)
    return (flat[1:] - flat[0]).T.contiguous(), images[0].clone()


class _Affine(nn.Module):
    """Consecutive affine layers as one matrix, used forward and backward, or backward only."""

    def __init__(self, layers: nn.Sequential, shape: torch.Size, like: Tensor, both_ways: bool):
        super().__init__()
        matrix, constant = affine_matrix(layers, shape, like.device)
        self.shape = constant.shape
        self.register_buffer("matrix", matrix.to(like.dtype), persistent=False)
        self.register_buffer("constant", constant.flatten().to(like.dtype), persistent=False)
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
    """A copy of the net for evaluation: the same function up to rounding, cheaper to attack.

    The copy is in eval mode, has no parameter gradients, and gives first derivatives only. Batch normalisation is
    folded into the convolution before it, if torch.fx can trace the net. Consecutive affine layers become one matrix
    where images are small enough for the matrix to be faster. (B, C, H, W) -> (B, N).
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
    """A tracer that does not look inside the kit's convolution and normalisation layers."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d | nn.BatchNorm2d) or super().is_leaf_module(m, module_qualified_name)


def _followed_by_normalisation(model: nn.Module) -> list[tuple[str, str]]:
    """Pairs of names: a convolution, and the batch normalisation that is the only user of the convolution's output.

    Both layers are called once. A net that cannot be traced has no pairs.
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
    """Use timm's fused attention without gradients only: on small images its backward pass is slower."""
    attention.fused_attn = not torch.is_grad_enabled()  # pyright: ignore[reportArgumentType]


def _is_affine(module: nn.Module) -> bool:
    return isinstance(module, AFFINE) or getattr(module, "is_affine", False)


Shapes = dict[nn.Module, tuple[torch.Size, torch.Size]]


def _as_matrix(layers: tuple[nn.Module, ...], shapes: Shapes, like: Tensor) -> _Affine | None:
    """The affine layers as a matrix; None if the layers are faster."""
    work = [layer for layer in layers if not isinstance(layer, nn.Flatten | nn.Identity | nn.Dropout)]
    if not work or (len(work) == 1 and isinstance(work[0], nn.Linear)) or any(layer not in shapes for layer in layers):
        return None
    shape, size = shapes[layers[0]][0], math.prod(shapes[layers[0]][0]) * math.prod(shapes[layers[-1]][1])
    strided = any(isinstance(layer, nn.Conv2d) and max(layer.stride) > 1 for layer in work)
    if size > (STRIDED_LIMIT if strided else BACKWARD_LIMIT):
        return None
    return _Affine(nn.Sequential(*layers), shape, like, both_ways=size <= FORWARD_LIMIT)


def _shapes(model: nn.Module, image_shape: tuple[int, int, int]) -> Shapes:
    """The shapes of one input and one output of each affine layer, without the batch dimension."""
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
