"""What every attack checks before it starts."""

import torch
from torch import Tensor, nn

from kdiga_nb.numerics.scopes import frozen


def check_inputs(model: nn.Module, x: Tensor, y: Tensor) -> int:
    """Refuse inputs that would silently make a robustness number wrong; return the number of classes of the model.

    Raises:
        ValueError: images that are not float (B, C, H, W) in [0, 1], or labels that are not (B,) classes of the model.
    """
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"images must be a float tensor (B, C, H, W), got {x.dtype} of shape {tuple(x.shape)}")
    if y.shape != x.shape[:1] or y.is_floating_point():
        raise ValueError(f"labels must be integers of shape ({len(x)},), got {y.dtype} of shape {tuple(y.shape)}")
    if not len(x):
        raise ValueError("there are no images")
    low, high = x.min().item(), x.max().item()
    if not (low >= 0 and high <= 1):
        raise ValueError(f"images must lie in [0, 1], got values from {low:g} to {high:g}")
    with frozen(model), torch.no_grad():
        classes = model(x[:1]).shape[1]
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= classes:
        raise ValueError(f"labels must lie in 0 … {classes - 1}, got values from {low} to {high}")
    return classes


def _check_epsilon(epsilon: float) -> None:
    if not 0 <= epsilon <= 1:
        raise ValueError(f"epsilon must be in [0, 1], got {epsilon}")
