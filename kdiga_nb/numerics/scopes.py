"""Devices, and scopes for evaluation mode, precision and thread counts; each scope restores what it changed."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from kdiga_nb.numerics.memory import keep_pages


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without parameter gradients inside the block; afterwards every mode and flag is restored."""
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


def restored_generators(device: torch.device | None = None) -> AbstractContextManager[None]:
    """The random generators of the CPU, and of this GPU, have the same state after the block as before.

    ``fork_rng`` without a list of devices opens a context on every GPU of the machine.
    """
    return torch.random.fork_rng([device] if device is not None and device.type == "cuda" else [])


@contextmanager
def full_precision() -> Iterator[None]:
    """Convolutions and matrix products inside the block run in full fp32, on a GPU too."""
    precision, tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = tf32


@contextmanager
def full_precision_inference() -> Iterator[None]:
    """Forward passes inside the block run without gradients and in full fp32: they decide what counts as robust.

    On a GPU, PGD searches in TF32, as training does. The images that attacks return are classified in full fp32.
    """
    with full_precision(), torch.no_grad():
        yield


def resolve_device(device: str | torch.device | None = None) -> torch.device:
    """The device of that name; ``None`` and "auto" mean the GPU if there is one, else the CPU.

    Raises:
        ValueError: the machine has no such device.
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
    """The net on the device, in the quickest memory layout: channels-last on a GPU and where the net asks for it."""
    model.to(device)
    if device.type == "cuda" or getattr(model, "channels_last", False):
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] (missing in the stubs)
    return model


@contextmanager
def computing(device: torch.device | None = None, *, single_thread: bool = False) -> Iterator[None]:
    """TF32 on a GPU; on a CPU, freed memory stays with the process, and small data sets use one thread.

    A second thread makes a step on the digits 3 to 20 % faster (benchmarks/steps.py). A second process, which
    ``reproduce`` starts, gains far more, and sums split over threads differ in their last bits between machines.

    Args:
        device: where the nets are (default: the CPU).
        single_thread: ``Data.single_thread``, ignored on a GPU.
    """
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    on_gpu = device is not None and device.type == "cuda"
    try:
        if on_gpu:
            torch.set_float32_matmul_precision("high")
        else:
            keep_pages()
            torch.set_num_threads(1 if single_thread else threads)
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        if not on_gpu and not single_thread:  # returning the digits' few MB would slow the explorer's moves
            keep_pages(False)


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bf16 at speed.

    A CPU without AVX-512 (or, on ARM, without bf16 instructions) emulates bf16 one number at a time: a step of the
    CIFAR-10 student then takes some 13 times as long as in fp32.
    """
    return device.type == "cuda" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Autocast(nn.Module):
    """A net whose forward pass, and hence every gradient through the net, runs in bf16; logits are cast to fp32."""

    def __init__(self, model: nn.Module, device: torch.device):
        super().__init__()
        self.model, self.kind = model, device.type

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) in fp32 -> logits (B, N) in fp32."""
        with torch.autocast(self.kind, torch.bfloat16):
            logits = self.model(x)
        return logits.float()
