"""Gradient averaging: the identity on one process, the mean over two real ones."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

from kdiga_nb import distributed
from kdiga_nb.data import Split
from kdiga_nb.methods import KDIGA
from kdiga_nb.training import train_step

PROCESSES = 2


def parameters_with_gradients(rank: int) -> list[nn.Parameter]:
    """Two of single precision, one of double, and one without a gradient."""
    generator = torch.Generator().manual_seed(rank)
    parameters = [nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(()))]
    parameters.append(nn.Parameter(torch.zeros(5, dtype=torch.float64)))
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return [*parameters, nn.Parameter(torch.zeros(2))]


def one_step(student: nn.Module, teacher: nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    train_step(student, teacher, KDIGA(lambda_iga=2.0), optimizer, x, y)
    return student.state_dict()


def one_process(rank: int, folder: Path, student: nn.Module, teacher: nn.Module, images: Split) -> None:
    """What each process does; what it finds lies in the folder afterwards."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=PROCESSES)
    parameters = parameters_with_gradients(rank)
    before = [parameter.grad for parameter in parameters]
    distributed.average_gradients(parameters)
    mine = slice(rank * 4, rank * 4 + 4)
    found: dict[str, Any] = {
        "rank": distributed.rank(),
        "world_size": distributed.world_size(),
        "gradients": [parameter.grad for parameter in parameters],
        "in place": all(parameter.grad is grad for parameter, grad in zip(parameters, before, strict=True)),
        # Tensors handed to a spawned process are shared memory, which both would step.
        "stepped": one_step(deepcopy(student), teacher, images.images[mine], images.labels[mine]),
    }
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_one_process_is_rank_zero_of_one_and_keeps_its_gradients() -> None:
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    parameters = parameters_with_gradients(0)
    before = [parameter.grad for parameter in parameters]
    values = deepcopy(before)
    distributed.average_gradients(parameters)
    for parameter, grad, value in zip(parameters, before, values, strict=True):
        assert parameter.grad is grad
        assert (grad is None and value is None) or torch.equal(grad, value)  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def two_processes(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_net: Callable[..., nn.Module],
    random_images: Callable[..., Split],
) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("gloo")
    nets = (tiny_net(0, dtype=torch.float64), tiny_net(1, dtype=torch.float64))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
        arguments = (folder, *nets, random_images(8, dtype=torch.float64))
        torch.multiprocessing.spawn(one_process, arguments, nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


def test_two_processes_average_their_gradients(two_processes: list[dict[str, Any]]) -> None:
    assert [(found["rank"], found["world_size"]) for found in two_processes] == [(0, 2), (1, 2)]
    assert all(found["in place"] for found in two_processes)
    for found in two_processes:
        assert found["gradients"].pop() is None
        *first, _ = parameters_with_gradients(0)
        *second, _ = parameters_with_gradients(1)
        for mean, one, other in zip(found["gradients"], first, second, strict=True):
            assert one.grad is not None and other.grad is not None and mean.dtype == one.dtype
            torch.testing.assert_close(mean, (one.grad + other.grad) / 2)


def test_two_halves_of_a_batch_step_like_the_whole(
    two_processes: list[dict[str, Any]], tiny_net: Callable[..., nn.Module], random_images: Callable[..., Split]
) -> None:
    nets = (tiny_net(0, dtype=torch.float64), tiny_net(1, dtype=torch.float64))
    whole = one_step(*nets, *random_images(8, dtype=torch.float64))
    for found in two_processes:
        for name, expected in whole.items():
            torch.testing.assert_close(found["stepped"][name], expected, rtol=1e-10, atol=1e-12)
