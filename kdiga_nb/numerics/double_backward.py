"""Convolution and batch normalisation with a fast double backward pass.

Input gradient alignment differentiates a gradient. PyTorch's double backward pass is slow in two places: a grouped
convolution loops over its groups, and batch normalisation is a long chain of elementwise operations. The modules here
are ``nn.Conv2d`` and ``nn.BatchNorm2d`` with the same parameters, buffers, names and values. Inside
``twice_differentiable`` their forward pass records the derivatives below; everywhere else the modules are PyTorch's.

Convolution. With y = x ∗ w, the gradients gx(gy, w) and gw(x, gy) are bilinear, as y is. The derivatives of each of the
three functions are the other two functions, so only plain convolutions are needed, for any number of groups.

Batch normalisation, train mode. With r = 1/√(var + eps), x̂ = (x − mean)·r and the projection P(u) = u − mean(u) −
x̂·mean(u·x̂), a channel's gradient is gx = γ·r·P(gy). For a cotangent v of gx, with a = mean(v·x̂), b = mean(gy·x̂) and
c = mean(v·gy) − mean(v)·mean(gy),

    d/dgy = γ·r·P(v)      d/dγ = n·r·(c − a·b)      d/dx = −γ·r²·[(c − a·b)·x̂ + b·P(v) + a·P(gy)]

where P(v) comes from the same fused kernel as P(gy).
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch.fx
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_scope = threading.local()
# Up to this many elements, the overhead of calls dominates, and PyTorch's path, which has fewer calls, is faster. Not
# for grouped convolutions, where PyTorch makes calls for each group.
SMALL = 2**16


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Forward passes inside the block record a graph whose input gradient is cheap to differentiate again."""
    before = getattr(_scope, "active", False)
    _scope.active = True
    try:
        yield
    finally:
        _scope.active = before


def _active(x: Tensor, groups: int = 1) -> bool:
    return getattr(_scope, "active", False) and torch.is_grad_enabled() and (groups > 1 or x.numel() > SMALL)


def use_operators(model: nn.Module) -> nn.Module:
    """Replace the class of every plain ``nn.Conv2d`` and ``nn.BatchNorm2d`` of the net by the class here, in place."""
    for module in model.modules():
        if type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str):
            module.__class__ = Conv2d
        elif type(module) is nn.BatchNorm2d:
            module.__class__ = BatchNorm2d
    return model


class _Geometry(NamedTuple):
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def _output(x: Tensor, weight: Tensor, at: _Geometry) -> Tensor:
    return torch.ops.aten.convolution(x, weight, None, at.stride, at.padding, at.dilation, False, [0, 0], at.groups)


def _gradients(gradient: Tensor, x: Tensor, weight: Tensor, at: _Geometry, mask: list[bool]) -> tuple[Tensor, ...]:
    return torch.ops.aten.convolution_backward(
        gradient, x, weight, None, at.stride, at.padding, at.dilation, False, [0, 0], at.groups, mask
    )


def _blank(like: Tensor, shape: torch.Size) -> Tensor:
    """A tensor of which the backward pass of a convolution reads only the shape; on a CPU it takes no memory.

    On a GPU cuDNN also reads the memory layout, and copies all tensors to it if it is not that of ``like``.
    """
    if like.device.type == "cpu":
        return like.new_empty(()).expand(shape)
    order = torch.contiguous_format if like.is_contiguous() else torch.channels_last
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=order)


class _InputGradient(torch.autograd.Function):
    """(gy, w) -> gx, bilinear; its derivatives are a convolution and a weight gradient."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, weight: Tensor, shape: torch.Size, at: _Geometry) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(gradient, weight)
        ctx.at = at
        return _gradients(gradient, _blank(gradient, shape), weight, at, [True, False, False])[0]

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradient, weight = ctx.saved_tensors
        to_gradient = _output(v, weight, ctx.at) if ctx.needs_input_grad[0] else None
        to_weight = _WeightGradient.apply(v, gradient, weight.shape, ctx.at) if ctx.needs_input_grad[1] else None
        return to_gradient, to_weight, None, None


class _WeightGradient(torch.autograd.Function):
    """(x, gy) -> gw, bilinear; its derivatives are an input gradient and a convolution."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: Tensor, shape: torch.Size, at: _Geometry) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x, gradient)
        ctx.at = at
        return _gradients(gradient, x, _blank(x, shape), at, [False, True, False])[1]

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, gradient = ctx.saved_tensors
        to_x = _InputGradient.apply(gradient, v, x.shape, ctx.at) if ctx.needs_input_grad[0] else None
        to_gradient = _output(x, v, ctx.at) if ctx.needs_input_grad[1] else None
        return to_x, to_gradient, None, None


class _Port(torch.autograd.Function):
    """One side of a convolution, x or w; the backward pass computes the gradient of this side only.

    One node with two inputs would always compute both gradients. With one node per input, the autograd engine runs only
    the nodes whose gradient is needed. The forward value is one unread number. ``other`` is no input
    of the node, for an input would be an edge.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, other: list[Tensor], shape: torch.Size, at: _Geometry, side: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.other, ctx.at, ctx.side, ctx.shape = other[0], at, side, own.shape
        return own.new_empty(()).expand(shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        pair = (gradient, ctx.other) if ctx.side is _InputGradient else (ctx.other, gradient)
        return ctx.side.apply(*pair, ctx.shape, ctx.at), None, None, None, None


class _Convolution(torch.autograd.Function):
    """The value y = x ∗ w; the gradient goes to both ports."""

    @staticmethod
    def forward(ctx: Any, x_port: Tensor, weight_port: Tensor, value: list[Tensor]) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return value.pop()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient, gradient, None


def convolution(x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> Tensor:
    """x ∗ w without bias, (B, C, H, W), (K, C/groups, h, w) -> (B, K, H', W'), differentiable any number of times."""
    at = _Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    with torch.no_grad():
        value = _output(x, weight, at)
    x_port = _Port.apply(x, [weight], value.shape, at, _InputGradient)
    weight_port = _Port.apply(weight, [x], value.shape, at, _WeightGradient)
    return _Convolution.apply(x_port, weight_port, [value])  # pyright: ignore[reportReturnType]


class Conv2d(nn.Conv2d):
    """``nn.Conv2d``; inside ``twice_differentiable``, with the convolution above."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, K, H', W')."""
        if not _active(input, self.groups):
            return super().forward(input)
        device, weight, bias = input.device.type, self.weight, self.bias
        if torch.is_autocast_enabled(device):  # what autocast does to PyTorch's own convolution
            kind = torch.get_autocast_dtype(device)
            input, weight, bias = input.to(kind), weight.to(kind), None if bias is None else bias.to(kind)
        y = convolution(input, weight, self.stride, self.padding, self.dilation, self.groups)
        return y if bias is None else y + bias[:, None, None]


class _BatchNorm(torch.autograd.Function):
    """Train mode: x, γ, β -> y with the statistics of the batch; updates the running statistics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, running: Any, momentum: float, eps: float) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        running_mean, running_var = running
        y, mean, scale = torch.native_batch_norm(x, weight, bias, running_mean, running_var, True, momentum, eps)
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (*_BatchNormGradient.apply(gradient, *ctx.saved_tensors, ctx.eps), None, None, None)  # pyright: ignore[reportGeneralTypeIssues]


def _kernel(
    gradient: Tensor, x: Tensor, weight: Tensor, mean: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """γ·r·P(gy), Σ gy·x̂ and Σ gy, in one fused kernel."""
    return torch.ops.aten.native_batch_norm_backward(
        gradient, x, weight, None, None, mean, scale, True, eps, [True, True, True]
    )


class _BatchNormGradient(torch.autograd.Function):
    """gy, x, γ -> gx, gγ, gβ of train mode; ``mean`` and ``scale`` follow from x and have no gradient of their own."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, gradient: Tensor, x: Tensor, weight: Tensor, mean: Tensor, scale: Tensor, eps: float
    ) -> tuple[Tensor, ...]:
        to_x, to_weight, to_bias = _kernel(gradient, x, weight, mean, scale, eps)
        ctx.save_for_backward(gradient, x, weight, mean, scale, to_weight, to_bias)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return to_x, to_weight, to_bias

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, v: Tensor | None, v_weight: Tensor | None, v_bias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        gradient, x, weight, mean, scale, to_weight, to_bias = ctx.saved_tensors
        n = x.numel() // x.shape[1]
        channel = (slice(None), None, None)

        def spread(of_gradient: Tensor, of_x: Tensor, constant: Tensor, out: Tensor | None = None) -> Tensor:
            """of_gradient·gy + of_x·(x − mean) + constant, one number per channel, added to ``out``."""
            constant = constant - of_x * mean
            total = constant[channel].expand_as(x) if out is None else out.add_(constant[channel])
            total = torch.addcmul(total, x, of_x[channel])
            return total.addcmul_(gradient, of_gradient[channel])

        mean_gradient, b = to_bias / n, to_weight / n
        g_gradient = g_x = g_weight = None
        if v is not None:
            # The kernel is fast if both tensors have the same memory layout.
            order = torch.contiguous_format if x.is_contiguous() else torch.channels_last
            g_gradient, sum_v_x, sum_v = _kernel(v.contiguous(memory_format=order), x, weight, mean, scale, ctx.eps)
            a = sum_v_x / n
            c = (v * gradient).sum((0, 2, 3), dtype=mean.dtype) / n - sum_v / n * mean_gradient
            rest = c - a * b
            g_weight = n * scale * rest
            # −γ·r²·[rest·x̂ + a·P(gy)], written out in gy and x, and −r·b times γ·r·P(v), which is g_gradient.
            factor = -weight * scale.square()
            g_x = g_gradient * (-scale * b)[channel]
            g_x = spread(factor * a, factor * (rest - a * b) * scale, -factor * a * mean_gradient, g_x)
        if v_weight is not None:
            # Σ gy·x̂: its derivatives are x̂ and r·P(gy).
            factor = v_weight * scale
            to_x = spread(factor, -factor * b * scale, -factor * mean_gradient)
            to_gradient = (x - mean[channel]) * factor[channel]
            g_x = to_x if g_x is None else g_x + to_x
            g_gradient = to_gradient if g_gradient is None else g_gradient + to_gradient
        if v_bias is not None:
            constant = v_bias[channel].expand_as(x)
            g_gradient = constant if g_gradient is None else g_gradient + constant
        return _like(gradient, g_gradient), _like(x, g_x), g_weight, None, None, None


def _like(tensor: Tensor, value: Tensor | None) -> Tensor | None:
    """Cast to the dtype of ``tensor``: under autocast activations are bf16, and sums over them are fp32."""
    return None if value is None else value.to(tensor.dtype)


class BatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d``; inside ``twice_differentiable``, with the derivatives above."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        plain = self.momentum is None or not self.affine or not self.track_running_stats
        if not _active(input) or plain or input.dtype not in (self.weight.dtype, torch.bfloat16):
            return super().forward(input)
        if self.training:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            running = (self.running_mean, self.running_var)
            return _BatchNorm.apply(input, self.weight, self.bias, running, self.momentum, self.eps)  # pyright: ignore[reportReturnType]
        assert self.running_mean is not None and self.running_var is not None
        # With fixed statistics the layer is one scale and one shift per channel, whose derivatives are cheap.
        scale = self.weight * torch.rsqrt(self.running_var + self.eps)
        shift = self.bias - self.running_mean * scale
        return torch.addcmul(shift[:, None, None], input, scale[:, None, None]).to(input.dtype)
