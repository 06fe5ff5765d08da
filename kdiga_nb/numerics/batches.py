"""Work on tensors in batches that fit into memory."""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from kdiga_nb.numerics.memory import attempt, free_memory, trim
from kdiga_nb.numerics.scopes import frozen, restored_generators

log = logging.getLogger("kdiga")
Results = tuple[Tensor, ...]


def batch_that_fits(models: Sequence[nn.Module], x: Tensor, wanted: int, *, copies: int = 1) -> int:
    """The largest batch, of at most ``wanted`` images (B, C, H, W), on which the nets' input gradients fit.

    Budget: a third of the free memory for saved activations. The backward pass needs about as much again, and other
    processes need some. The prediction matters on a CPU: the system kills a process that takes too much memory.

    Args:
        copies: how often each image enters the batch.
    """
    wanted = min(wanted, len(x))
    if wanted <= 1:
        return 1
    kept = _kept_for_backward(models, x[:2]) - _kept_for_backward(models, x[:1])  # the weights cancel
    if not kept:
        return wanted
    fitting = free_memory(x.device) // (3 * copies * kept)
    if fitting < wanted:
        trim()
        fitting = free_memory(x.device) // (3 * copies * kept)
    if fitting >= wanted:
        return wanted
    log.info("memory holds batches of %d images (of %d)", max(fitting, 1), wanted)
    return max(fitting, 1)


def _kept_for_backward(models: Sequence[nn.Module], x: Tensor) -> int:
    """Bytes that autograd saves in the nets' forward passes on x for the backward pass."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with ExitStack() as stack, restored_generators(x.device), torch.enable_grad():
        for model in models:
            stack.enter_context(frozen(model))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            graphs = [model(x.detach().clone().requires_grad_()) for model in models]
    del graphs  # kept until here: an address that is freed could be counted as the same tensor
    return sum(kept.values())


def in_batches(
    work: Callable[..., Results],
    tensors: tuple[Tensor, ...],
    batch_size: int,
    *,
    models: Sequence[nn.Module] = (),
    copies: int = 1,
    generator: torch.Generator | None = None,
) -> Results:
    """Apply ``work`` to tensors (B, …) in batches and concatenate its results (B, …).

    ``batch_that_fits`` bounds the batches if ``models`` are given. When a batch runs out of memory, the batch size is
    halved, down to a single image, and ``generator`` returns to its state before the batch.
    """
    if models:
        batch_size = batch_that_fits(models, tensors[0], batch_size, copies=copies)
    parts: list[Results] = []
    done, total = 0, len(tensors[0])
    while not parts or done < total:
        before = None if generator is None else generator.get_state()
        part = partial(work, *(tensor[done : done + batch_size] for tensor in tensors))
        results = part() if batch_size == 1 else attempt(part, tensors[0].device)
        if results is not None:
            parts.append(results)
            done += batch_size
            continue
        batch_size = (min(batch_size, total - done) + 1) // 2
        log.warning("out of memory: continuing with batches of %d images", batch_size)
        if generator is not None and before is not None:
            generator.set_state(before)
    return tuple(torch.cat(results) for results in zip(*parts, strict=True))
