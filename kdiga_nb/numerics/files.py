"""Atomic writing of files, and content hashes of tensors."""

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Write to a temporary name in the same folder, then rename: readers see the old file or the whole new one.

    A missing folder is created. If ``write`` raises, the partial file is removed and the error raised again.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def content_hash(tensors: dict[str, Tensor] | Iterable[tuple[str, Tensor]]) -> str:
    """The sha256 of names and values. A mapping is hashed in the order of its names, pairs in their own order."""
    pairs: Any = sorted(tensors.items()) if isinstance(tensors, dict) else tensors
    digest = hashlib.sha256()
    for name, tensor in pairs:
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
