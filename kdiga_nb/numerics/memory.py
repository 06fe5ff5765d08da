"""How much memory is free, what happens after a failed allocation, and glibc's handling of freed memory."""

import ctypes
import sys
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import psutil
import torch

T = TypeVar("T")
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4  # of glibc's malloc.h
# What each library says when an allocation fails.
OUT_OF_MEMORY = (
    "CUDA error: out of memory",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "unable to find an engine",  # cuDNN: no algorithm's workspace fits
    "can't allocate memory",  # PyTorch's CPU allocator
    "DefaultCPUAllocator: not enough memory",
    "could not create a primitive",  # oneDNN
    "could not create a memory object",
    "could not execute a primitive",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception reports a failed allocation, in whichever library."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(words in str(error) for words in OUT_OF_MEMORY)


def attempt(work: Callable[[], T], device: torch.device) -> T | None:
    """The result of ``work``; None if memory ran out, with everything that the failed work held freed."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # Outside the handler: the error keeps its frames, and with them their tensors, alive.
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        keep_pages(False)
    return None


def largest_that_fits(work: Callable[[int], object], n: int, device: torch.device) -> int:
    """The first of n/2, n/4, … examples on which ``work`` does not run out of memory; 0 if there is none."""

    def fits(size: int) -> bool:
        work(size)
        return True

    while n := n // 2:
        if attempt(partial(fits, n), device):
            break
    return n


def free_memory(device: torch.device) -> int:
    """Bytes that a tensor on the device could take now; on a CPU, without what ``trim`` would return."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return psutil.virtual_memory().available


def keep_pages(keep: bool = True) -> None:
    """Keep the pages of freed CPU memory for the next tensor, or restore glibc's defaults and return them.

    By default, glibc returns each freed tensor of more than 32 MB to the system, which must clear every page again:
    half of the time of a KDIGA step of MobileNetV2 at batch size 256 (benchmarks/steps.py).
    """
    if allocator := _allocator():
        allocator.mallopt(MMAP_MAX, 0 if keep else 1 << 16)
        allocator.mallopt(TRIM_THRESHOLD, -1 if keep else 128 << 10)
        allocator.mallopt(TOP_PAD, 64 << 20 if keep else 128 << 10)
    if not keep:
        trim()


def trim() -> None:
    """Return the pages of freed CPU memory to the system, once."""
    if allocator := _allocator():
        allocator.malloc_trim(0)


def _allocator() -> ctypes.CDLL | None:
    """The C library if it is glibc."""
    library = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    return library if hasattr(library, "mallopt") else None
