"""Fixtures for all tests: one thread, a run store per test, no network, and a few small nets and data sets."""

import ipaddress
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import Tensor, nn

from kdiga_nb import paths
from kdiga_nb.artifacts.explore import explore
from kdiga_nb.data import Augmentation, Data, Split, load_data
from kdiga_nb.methods import ST
from kdiga_nb.models import build_model
from kdiga_nb.params import ExploreParams, at_scale
from kdiga_nb.runs.graph import run_all
from kdiga_nb.training import Schedule, train

# An optional copy of the real data sets and of published weights next to the checkout.
BESIDE = paths.ROOT.parent / "shared" / "data"


def pytest_configure() -> None:
    """Draw without a display, and unpack real data sets that lie next to the checkout unless KDIGA_DATA is set.

    Tests that need real data are skipped without them. The workers of xdist inherit both variables.
    """
    os.environ.setdefault("MPLBACKEND", "Agg")
    if "KDIGA_DATA" in os.environ or paths.data().exists() or not (BESIDE / "restore.py").is_file():
        return
    home = paths.ROOT / "build" / "data"
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home / "lock"):
        if not (home / "whole").exists():
            command = [sys.executable, str(BESIDE / "restore.py"), str(home)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            shutil.copytree(BESIDE / "weights", home / "checkpoints", dirs_exist_ok=True)
            (home / "whole").touch()
    os.environ["KDIGA_DATA"] = str(home)


class TinyNet(nn.Module):
    """A convolution and a linear head, smooth unless told otherwise, so that second derivatives exist everywhere."""

    def __init__(self, side: int, classes: int, batch_norm: bool, dropout: float, activation: nn.Module):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4) if batch_norm else nn.Identity()
        self.activation = activation
        self.head_dropout = nn.Dropout(dropout)
        self.head = nn.Linear(4 * side * side, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.head_dropout(self.activation(self.norm(self.conv(x))).flatten(1)))


def _tiny_net(
    seed: int = 0,
    *,
    side: int = 4,
    classes: int = 5,
    batch_norm: bool = False,
    dropout: float = 0.0,
    activation: nn.Module | None = None,
    gain: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = TinyNet(side, classes, batch_norm, dropout, activation or nn.Tanh())
        if batch_norm:
            # Random statistics, so that eval mode differs from train mode and a changed buffer is noticed.
            nn.init.uniform_(net.get_buffer("norm.running_mean"), -0.3, 0.3)
            nn.init.uniform_(net.get_buffer("norm.running_var"), 0.5, 1.5)
    with torch.no_grad():
        net.head.weight.mul_(gain)
    return net.to(dtype)


@pytest.fixture(scope="session")
def tiny_net() -> Callable[..., nn.Module]:
    """Builds a small net from a seed; the global generator keeps its state."""
    return _tiny_net


def _random_images(
    n: int, seed: int = 0, *, side: int = 4, classes: int = 5, dtype: torch.dtype = torch.float32
) -> Split:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(n, 1, side, side, generator=generator, dtype=dtype)
    return Split(images, torch.randint(classes, (n,), generator=generator))


@pytest.fixture(scope="session")
def random_images() -> Callable[..., Split]:
    """Builds uniform images in [0, 1] and labels from a seed."""
    return _random_images


@pytest.fixture(scope="session")
def digits() -> Data:
    return load_data("digits")


@pytest.fixture(scope="session")
def few_digits(digits: Data) -> Data:
    """96 training digits, 32 of them held out, and 40 for testing: an epoch of a few milliseconds."""
    train_part = Split(*(part[:96] for part in digits.train))
    test_part = Split(*(part[:40] for part in digits.test))
    return replace(
        digits, train=train_part, test=test_part, validation_size=32, augmentation=Augmentation(padding=1, flip=True)
    )


def _trained_on_digits(data: Data, epochs: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = build_model("digits_small", num_classes=10, image_shape=(1, 8, 8))
    train(net, ST(), data, Schedule(epochs, policy="one_cycle"), device="cpu")
    return net


@pytest.fixture(scope="session")
def trained(digits: Data) -> nn.Module:
    """A digits net after eight epochs of standard training; tests that train on copy it first."""
    return _trained_on_digits(digits, 8)


@pytest.fixture(scope="session")
def small() -> ExploreParams:
    """The explorer at settings that train in seconds."""
    changes = {
        "autoattack_images": 0,
        "epochs": 3,
        "batch_size": 64,
        "epsilon": 0.1,
        "show_epsilon": 0.1,
        "show_view": "lambda",
    }
    return at_scale(ExploreParams, "smoke", changes)


@pytest.fixture(scope="session")
def explored_store(small: ExploreParams, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with all results of the explorer at the small settings; tests use the copy ``store``."""
    home = tmp_path_factory.mktemp("explored") / "runs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDIGA_RUNS", str(home))
        assert not run_all(explore(small).jobs(), workers=1, device="cpu").failed
    return home


@pytest.fixture
def store(explored_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the explorer's store for one test."""
    home = tmp_path / "store"
    shutil.copytree(explored_store, home)
    monkeypatch.setenv("KDIGA_RUNS", str(home))
    return home


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_run_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KDIGA_RUNS", str(tmp_path / "runs"))


def _is_local(host: str | bytes | None) -> bool:
    name = host.decode() if isinstance(host, bytes) else host
    if name in (None, "", "localhost"):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Refuse connections and look-ups other than loopback and AF_UNIX."""

    def guarded(original: Callable[..., Any]) -> Callable[..., Any]:
        def connect(self: socket.socket, address: Any) -> Any:
            if self.family != socket.AF_UNIX and not _is_local(address[0]):
                raise RuntimeError(f"a test tried to reach {address}")
            return original(self, address)

        return connect

    look_up = socket.getaddrinfo

    def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_local(host):
            raise RuntimeError(f"a test tried to look up {host!r}")
        return look_up(host, *args, **kwargs)

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, guarded(getattr(socket.socket, name)))
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    yield
