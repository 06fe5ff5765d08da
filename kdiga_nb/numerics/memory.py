"""How much memory there is, what to do when it does not suffice, and freed memory kept at hand on a CPU."""

import ctypes
import sys

import psutil
import torch

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4  # of glibc's malloc.h


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory did not suffice, on a GPU or on a CPU."""
    # On a CPU it is the allocator that says so, or oneDNN, in its own words.
    words = ("can't allocate memory", "could not create a primitive", "could not create a memory object")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)


def free_memory(device: torch.device) -> int:
    """Bytes that a tensor on the device could take now; on a CPU, beside what ``trim`` would give back."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return psutil.virtual_memory().available


def keep_pages() -> None:
    """Have the pages of freed memory kept for the next tensor, on a CPU.

    Left alone glibc takes each tensor of more than 32 MB from the system and gives it back at once, which then has to
    clear every page anew: half of a KDIGA step of MobileNetV2 at batch 256 (benchmarks/steps.py).
    """
    if allocator := _allocator():
        allocator.mallopt(MMAP_MAX, 0)
        allocator.mallopt(TRIM_THRESHOLD, -1)
        allocator.mallopt(TOP_PAD, 64 << 20)


def return_pages() -> None:
    """Have them given back, now and from now on, as glibc does by default."""
    if allocator := _allocator():
        allocator.mallopt(MMAP_MAX, 1 << 16)
        allocator.mallopt(TRIM_THRESHOLD, 128 << 10)
        allocator.mallopt(TOP_PAD, 128 << 10)
    trim()


def release(device: torch.device) -> None:
    """After an allocation that failed: whatever is kept for later tensors goes back, and on a CPU no more is kept."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        return_pages()


def trim() -> None:
    """Give the pages of freed memory back to the system, on a CPU."""
    if allocator := _allocator():
        allocator.malloc_trim(0)


def _allocator() -> ctypes.CDLL | None:
    """The C library, where it is glibc."""
    library = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    return library if hasattr(library, "mallopt") else None
