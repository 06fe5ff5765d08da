"""Several processes: the identity on one, and two real ones that train like one on the whole batch."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

from kdiga_nb.artifacts import ARTIFACTS
from kdiga_nb.data import Augmentation, Data, Split
from kdiga_nb.methods import KDIGA
from kdiga_nb.models import build_model
from kdiga_nb.numerics import distributed
from kdiga_nb.params import Table1Params, at_scale
from kdiga_nb.paths import PARAMS, ROOT
from kdiga_nb.runs.listing import epochs_done, history_so_far
from kdiga_nb.runs.run import folder
from kdiga_nb.runs.store import history, is_finished, load_or_train
from kdiga_nb.training import Schedule, train, train_step

PROCESSES = 2
NORMS = ("per_sample", "batch")


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


def nets() -> tuple[nn.Module, nn.Module]:
    """Student and teacher with BatchNorm, which mixes the examples of a batch, in float64."""
    student, teacher = (
        nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Tanh(), nn.Flatten(), nn.Linear(96, 5)
        ).double()
        for _ in range(2)
    )
    for seed, net in enumerate((student, teacher)):
        generator = torch.Generator().manual_seed(seed)
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)
    return student, teacher


def trained_with_batch_norm(
    norm: str, pair: tuple[nn.Module, nn.Module], images: Split, statistics: str = "synchronised"
) -> dict[str, Any]:
    """Two epochs on 18 images in batches of 7, 7 and 4, which two processes cannot halve; four held out."""
    split = Split(*(part.repeat(3, *[1] * (part.ndim - 1))[:22] for part in images))
    split = Split(split.images * torch.linspace(0.5, 1, 22, dtype=torch.float64)[:, None, None, None], split.labels)
    data = Data("few", split, split, 5, validation_size=4, augmentation=Augmentation(padding=1, flip=True))
    student, teacher = pair
    schedule = Schedule(2, 7, learning_rate=0.1, clip_norm=1.0, batch_norm=statistics)
    curve = train(student, KDIGA(lambda_iga=2.0, norm=norm), data, schedule, teacher=teacher, device="cpu")
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in curve.rows]
    return {"weights": student.state_dict(), "rows": rows}


def mobilenet_step() -> dict[str, torch.Tensor]:
    """One step of the paper's student on four images, this process's share of them, in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student, teacher = (
            build_model("mobilenet_v2", num_classes=10, image_shape=(3, 32, 32)).double() for _ in range(2)
        )
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4, 3, 32, 32, generator=generator, dtype=torch.float64)
    mine = slice(distributed.rank(), None, distributed.world_size())
    distributed.synchronise(student)
    optimizer = torch.optim.SGD(student.parameters(), 0.01)
    train_step(
        student, teacher.eval(), KDIGA(norm="batch", lambda_iga=100.0), optimizer, x[mine], torch.arange(4)[mine]
    )
    return student.state_dict()


def all_reduces_of_batch_norm() -> dict[str, Any]:
    """How many all-reduces a forward pass makes, and its error where the mean is large beside the deviation."""
    calls, original = [], dist.all_reduce

    def counted(tensor: torch.Tensor) -> None:
        calls.append(tensor.shape)
        original(tensor)

    x = 100 + torch.randn(6, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    mine = x[:4] if distributed.rank() == 0 else x[4:]
    distributed.dist.all_reduce = counted
    y = distributed.SynchronisedBatchNorm2d(3)(mine)
    distributed.dist.all_reduce = original
    whole = nn.BatchNorm2d(3).double()(x.double())
    expected = whole[:4] if distributed.rank() == 0 else whole[4:]
    return {"calls": len(calls), "error": (y - expected).abs().max().item()}


def twice_differentiated_sum(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The sum s of x over the processes; s², whose gradient is 2s a process; and the square of that, again."""
    total = distributed.summed(x)
    (first,) = torch.autograd.grad(total.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    return {"total": total.detach(), "first": first.detach(), "second": second}


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
        "sum": twice_differentiated_sum(torch.tensor([1.0 + rank, 2.0], dtype=torch.float64, requires_grad=True)),
        "decided": distributed.broadcast_from_rank0(lambda: f"by {rank}"),
        "trained": {norm: trained_with_batch_norm(norm, nets(), images) for norm in NORMS},
        "per process": trained_with_batch_norm("batch", nets(), images, "per_process"),
        "mobilenet": mobilenet_step(),
        "batch norm": all_reduces_of_batch_norm(),
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


def test_a_sum_over_processes_can_be_differentiated_twice(two_processes: list[dict[str, Any]]) -> None:
    """P processes: s = Σ x, L = P·s² as all of them add it, dL/dx = 2Ps; M = P·(2Ps)², dM/dx = 8P³s."""
    for found in two_processes:
        total = torch.tensor([3.0, 4.0], dtype=torch.float64)
        torch.testing.assert_close(found["sum"]["total"], total)
        torch.testing.assert_close(found["sum"]["first"], 2 * PROCESSES * total)
        torch.testing.assert_close(found["sum"]["second"], 8 * PROCESSES**3 * total)


def test_batch_norm_takes_one_all_reduce_and_does_not_cancel(two_processes: list[dict[str, Any]]) -> None:
    for found in two_processes:
        assert found["batch norm"]["calls"] == 1
        assert found["batch norm"]["error"] < 1e-4


def test_the_first_process_decides(two_processes: list[dict[str, Any]]) -> None:
    assert [found["decided"] for found in two_processes] == ["by 0", "by 0"]
    assert distributed.broadcast_from_rank0(lambda: "alone") == "alone"


@pytest.mark.parametrize("norm", NORMS)
def test_two_processes_train_like_one_on_the_whole_batch(
    two_processes: list[dict[str, Any]], norm: str, random_images: Callable[..., Split]
) -> None:
    """BatchNorm, data order, augmentation, clipping, both norms, unequal shares, validation: weights and history."""
    alone = trained_with_batch_norm(norm, nets(), random_images(8, dtype=torch.float64))
    fresh = nets()[0].state_dict()
    assert any((alone["weights"][name] - fresh[name]).abs().max() > 1e-3 for name in fresh)
    for found in two_processes:
        together = found["trained"][norm]
        for name, expected in alone["weights"].items():
            torch.testing.assert_close(together["weights"][name], expected, rtol=1e-9, atol=1e-11)
        assert together["rows"] == [pytest.approx(row, rel=1e-9) for row in alone["rows"]]


def test_statistics_per_process_are_averaged_and_are_another_training(two_processes: list[dict[str, Any]]) -> None:
    first, second = (found["per process"]["weights"] for found in two_processes)
    assert {name for name in first if not torch.equal(first[name], second[name])} == set()
    together = two_processes[0]["trained"]["batch"]["weights"]
    assert (first["1.running_var"] - together["1.running_var"]).abs().max() > 1e-4
    assert (first["0.weight"] - together["0.weight"]).abs().max() > 1e-4


def test_mobilenet_steps_on_two_processes_as_on_one(two_processes: list[dict[str, Any]]) -> None:
    alone = mobilenet_step()
    for found in two_processes:
        for name, expected in alone.items():
            torch.testing.assert_close(found["mobilenet"][name], expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("training", [True, False])
def test_on_one_process_batch_norm_is_pytorchs(training: bool) -> None:
    ours, theirs = distributed.SynchronisedBatchNorm2d(3).train(training), nn.BatchNorm2d(3).train(training)
    x = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours(x), theirs(x))
    net = nn.Sequential(nn.BatchNorm2d(3))
    distributed.synchronise(net)
    assert type(net[0]) is nn.BatchNorm2d


# ---- torchrun ----


def torchrun(home: Path, *arguments: str) -> subprocess.Popen[str]:
    """``kdiga train`` of a smoke row by two processes, as a user starts it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(PROCESSES)]
    command += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
    command += ["-m", "kdiga_nb", "train", str(PARAMS / "smoke.yaml")]
    command += ["--artefact", "table1", "--row", "st", *arguments]
    environment = os.environ | {"KDIGA_RUNS": str(home / "runs"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"GLOO_SOCKET_IFNAME": "lo"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=home, env=environment, text=True, stdout=pipe, stderr=pipe)


def ranks_of(job: subprocess.Popen[str]) -> list[int]:
    """The processes that torchrun started, in the order of their ranks."""
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    return sorted(int(child) for child in children if b"kdiga_nb" in Path(f"/proc/{child}/cmdline").read_bytes())


def test_a_killed_rank_ends_the_job_and_one_process_takes_it_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDIGA_RUNS", str(tmp_path / "runs"))
    epochs = 400
    run = ARTIFACTS["table1"].build(at_scale(Table1Params, "smoke", {"epochs": epochs})).row("st").runs[0]
    job = torchrun(tmp_path, "--set", f"epochs={epochs}")
    try:
        deadline = time.monotonic() + 120
        while epochs_done(run) < 3:
            assert job.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(ranks_of(job)[1], signal.SIGKILL)
        assert job.wait(60) != 0
    finally:
        job.kill()
        job.communicate()
    done = epochs_done(run)
    assert 3 <= done < epochs and not is_finished(run)
    saved = history_so_far(run)
    load_or_train(run, device="cpu")
    assert len(history(run)) == epochs
    # What two processes had done was not done again.
    assert [row["cross_entropy"] for row in history(run)[:done]] == [row["cross_entropy"] for row in saved]
    assert json.loads((folder(run) / "run.json").read_text())["resumed"] == 1


def test_torchrun_trains_and_says_so_once(tmp_path: Path) -> None:
    job = torchrun(tmp_path)
    out, err = job.communicate(timeout=180)
    assert job.returncode == 0, err
    assert out.count("runs: 1 made, 0 cached, 0 failed") == 1
    (record,) = (tmp_path / "runs").glob("*/run.json")
    assert json.loads(record.read_text())["processes"] == PROCESSES
