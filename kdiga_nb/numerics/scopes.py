"""Scopes and devices: evaluation mode, full precision, thread counts, bf16; each restores what it changed."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kdiga_nb.numerics.memory import keep_pages, return_pages


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without parameter gradients inside the block; every module and flag as it was afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def full_precision_inference() -> Iterator[None]:
    """Forward passes inside the block decide what counts as robust: without gradients, and on a GPU in full fp32.

    Attacks search in TF32 there, where training does, and what they find is judged here.
    """
    precision, tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = tf32


def resolve_device(device: str | torch.device | None = None) -> torch.device:
    """The device of that name; ``None`` or "auto" is the GPU where there is one, else the CPU.

    Raises:
        ValueError: a device that is not there.
    """
    if not isinstance(device, str | torch.device | None):
        raise ValueError(f"device must be a name, got {device!r}")
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {str(device)!r} is not there: {reason}; use cpu, cuda or auto") from error
    return resolved


def placed(model: nn.Module, device: torch.device) -> nn.Module:
    """The net on the device, in the quickest memory order: ``channels_last`` on a GPU and where the net asks for it."""
    model.to(device)
    if device.type == "cuda" or getattr(model, "channels_last", False):
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] (missing in the stubs)
    return model


@contextmanager
def computing(image_shape: tuple[int, int, int], device: torch.device | None = None) -> Iterator[None]:
    """How numbers are computed: TF32 on a GPU; on the CPU freed memory at hand, and one thread for the digits.

    A second thread gives a step of theirs 3 to 20 % (benchmarks/steps.py), a second process, which ``reproduce`` has,
    far more; and sums that are split over threads differ in their last bits from machine to machine.
    """
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    on_gpu, tiny = device is not None and device.type == "cuda", image_shape[1] * image_shape[2] <= 64
    try:
        if on_gpu:
            torch.set_float32_matmul_precision("high")
        else:
            keep_pages()
            torch.set_num_threads(1 if tiny else threads)
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        if not on_gpu and not tiny:  # the digits' few MB stay: giving them back would cost the explorer's moves
            return_pages()


class Autocast(nn.Module):
    """A net whose forward pass, and with it every gradient through it, runs in bf16; its logits are fp32 again."""

    def __init__(self, model: nn.Module, device: torch.device):
        super().__init__()
        self.model, self.kind = model, device.type

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) in fp32 -> logits (B, N) in fp32."""
        with torch.autocast(self.kind, torch.bfloat16):
            logits = self.model(x)
        return logits.float()
