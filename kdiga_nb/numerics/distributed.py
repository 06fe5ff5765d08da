"""Several processes in one training: rank, sums, BatchNorm, mean gradients. With one process nothing changes.

Gradients are averaged explicitly after the backward pass instead of through DistributedDataParallel, whose hooks clash
with a double backward pass. Two parts of the loss mix the examples of a batch: BatchNorm in train mode, and a norm over
the whole batch. Both use ``summed``, which can be differentiated any number of times. N processes on N shards of a
batch therefore compute what one process computes on the whole batch.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


def rank() -> int:
    """This process's rank, 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def local_world_size() -> int:
    """The number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def process_group() -> Iterator[None]:
    """Join the process group if torchrun started this process: NCCL for tensors on a GPU, gloo for those on the CPU.

    Rank 0 may wait for hours until another job has trained a run that it needs. The other ranks wait for rank 0;
    torchrun ends them if it dies. After success the ranks leave together: a rank that goes first can abort the rest.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    gpus = torch.cuda.device_count()
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % gpus)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=timedelta(days=30))
    try:
        yield
        dist.barrier()
    finally:
        dist.destroy_process_group()


def broadcast_from_rank0(decide: Callable[[], T]) -> T:
    """Call ``decide`` on rank 0 only and broadcast the result."""
    if world_size() == 1:
        return decide()
    holder: list[Any] = [decide() if rank() == 0 else None]
    dist.broadcast_object_list(holder)
    return holder[0]


class _Sum(torch.autograd.Function):
    """The sum of a tensor over the processes. The gradient is the sum of the gradients: the same function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _Sum.apply(gradient)


def summed(x: Tensor) -> Tensor:
    """The sum of ``x`` over the processes, differentiable any number of times; every process must call it."""
    return x if world_size() == 1 else _Sum.apply(x)  # pyright: ignore[reportReturnType]


class SynchronisedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose train mode takes mean and variance over the batch of all processes.

    PyTorch's own has no double backward pass and needs a GPU.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(input)
        x = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
        n, mean, variance = _moments(x)
        if self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                assert self.momentum is not None and self.num_batches_tracked is not None
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                unbiased = variance * (n / (n - 1))
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        scale = torch.rsqrt(variance + self.eps) * self.weight
        centred = x - mean[:, None, None]
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(input.dtype)


def _moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per channel of (B, C, H, W): number of values, mean and variance over all processes, with one all-reduce.

    Chan, Golub & LeVeque 1983, which does not cancel as a difference of E[x²] and E[x]² would.
    """
    channels = x.shape[1]
    variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    mine = torch.cat([x.new_full((1,), x.numel() / channels), mean, variance])
    others = x.new_zeros(len(mine))
    rows = summed(torch.stack([mine if one == rank() else others for one in range(world_size())]))
    numbers, means, variances = rows.split([1, channels, channels], 1)
    n = numbers.sum()
    mean = (numbers * means).sum(0) / n
    return n, mean, (numbers * (variances + (means - mean).square())).sum(0) / n


def synchronise(model: nn.Module) -> None:
    """Make every BatchNorm2d of a net, in place, use the batch of all processes; with one process nothing changes.

    Parameters, buffers and their names stay the same.
    """
    if world_size() == 1:
        return
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d) and not isinstance(child, SynchronisedBatchNorm2d):
                twin = SynchronisedBatchNorm2d(child.num_features, child.eps, child.momentum or 0.1)
                twin._parameters, twin._buffers = child._parameters, child._buffers
                setattr(parent, name, twin.train(child.training))


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes, with one all-reduce per dtype and device."""
    _average(parameter.grad for parameter in parameters if parameter.grad is not None)


def average_statistics(model: nn.Module) -> None:
    """Replace running statistics that differ by process by their mean over the processes.

    Those of ``SynchronisedBatchNorm2d`` are the same everywhere and stay.
    """
    _average(
        statistic
        for module in model.modules()
        if isinstance(module, nn.BatchNorm2d) and not isinstance(module, SynchronisedBatchNorm2d)
        for statistic in (module.running_mean, module.running_var)
        if statistic is not None
    )


def _average(tensors: Iterable[Tensor]) -> None:
    if world_size() == 1:
        return
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for group in groups.values():
        flat = torch.cat([tensor.flatten() for tensor in group])
        dist.all_reduce(flat)
        flat /= world_size()
        for tensor, mean in zip(group, flat.split([one.numel() for one in group]), strict=True):
            tensor.copy_(mean.view_as(tensor))
