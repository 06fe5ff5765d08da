"""Work on tensors batch by batch, with batches that fit into memory."""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from kdiga_nb.numerics.memory import free_memory, is_out_of_memory, release, trim
from kdiga_nb.numerics.scopes import frozen

log = logging.getLogger("kdiga")
Results = tuple[Tensor, ...]


def batch_that_fits(models: Sequence[nn.Module], x: Tensor, wanted: int, *, copies: int = 1) -> int:
    """How many of ``wanted`` images (B, C, H, W) may be in one batch while the nets' input gradients are taken.

    What autograd keeps for an image is counted on the spot, and may take a third of the free memory: the gradients on
    the way back take about as much again, and other processes want some. On a CPU this has to be known beforehand: a
    process that takes too much is ended by the system without a word.

    Args:
        copies: how often an image enters the batch.
    """
    wanted = min(wanted, len(x))
    if wanted <= 1:
        return 1
    kept = _kept_for_backward(models, x[:2]) - _kept_for_backward(models, x[:1])  # without weights, which come once
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
    """Bytes that autograd keeps from the nets' forward passes on x until the way back."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    devices = [x.device] if x.device.type == "cuda" else []
    with ExitStack() as stack, torch.random.fork_rng(devices), torch.enable_grad():
        for model in models:
            stack.enter_context(frozen(model))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            graphs = [model(x.detach().clone().requires_grad_()) for model in models]
    del graphs  # alive until here, so that no address stands for two tensors
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
    """``work`` on tensors (B, …) batch by batch, its results (B, …) joined.

    Batches are no larger than what ``batch_that_fits`` says of ``models``. One that does not fit all the same is
    halved, and so are those after it, down to a single image; ``generator`` is then set back to where the batch began.
    """
    if models:
        batch_size = batch_that_fits(models, tensors[0], batch_size, copies=copies)
    parts: list[Results] = []
    done, total = 0, len(tensors[0])
    while not parts or done < total:
        before = None if generator is None else generator.get_state()
        failed = False
        try:
            parts.append(work(*(tensor[done : done + batch_size] for tensor in tensors)))
        except (RuntimeError, MemoryError) as error:
            if batch_size == 1 or not is_out_of_memory(error):
                raise
            failed = True
        if not failed:
            done += batch_size
            continue
        # Outside the handler, so that what the failed batch held is free.
        batch_size = (min(batch_size, total - done) + 1) // 2
        log.warning("out of memory: going on with batches of %d images", batch_size)
        release(tensors[0].device)
        if generator is not None and before is not None:
            generator.set_state(before)
    return tuple(torch.cat(results) for results in zip(*parts, strict=True))
