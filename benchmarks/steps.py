"""What a training step costs: standard, KDIGA as the kit computes it, KDIGA in the textbook's formulation.

    python benchmarks/steps.py [--model mobilenet_v2] [--batch 32] [--rounds 9] [--scaling]
    python benchmarks/steps.py --device cuda --precision bfloat16 --batch 512

Student and teacher are the same net, as in self-distillation; our teacher is folded, as in ``train``. The textbook
formulation is the authors' scheme written plainly with PyTorch's own modules: one forward pass of each net for the loss
terms and one more for its input gradient.
The share of the ceiling is a step's arithmetic (convolutions and matrix products) a second over that of one large
matrix product, measured on the spot.
"""

import argparse
import copy
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from side_by_side import alternate, machine, summary
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from kdiga_nb.losses import distillation_kl, gradient_distance
from kdiga_nb.methods import KDIGA, ST, Method, Terms
from kdiga_nb.models import build_model
from kdiga_nb.numerics.double_backward import BatchNorm2d, Conv2d
from kdiga_nb.numerics.folding import folded_copy
from kdiga_nb.numerics.memory import keep_pages
from kdiga_nb.numerics.scopes import Autocast, computing, placed
from kdiga_nb.training import PRECISIONS, train_step

# Nets small to large, images 8×8 to 64×64, batches 16 to 512: (model, side, batch). What takes more than some 17 GB in
# one of the formulations is left out.
SCALING = (
    *(("digits_small", 8, batch) for batch in (16, 64, 512)),
    *(("digits_wide", 8, batch) for batch in (16, 64, 512)),
    *(("mobilenet_v2", 8, batch) for batch in (16, 64, 512)),
    *(("mobilenet_v2", 16, batch) for batch in (16, 64, 512)),
    *(("mobilenet_v2", 32, batch) for batch in (16, 32, 64, 128, 256)),
    *(("mobilenet_v2", 64, batch) for batch in (16, 64)),
    *(("preact_resnet18", 32, batch) for batch in (16, 64, 128)),
)


@dataclass(frozen=True)
class Textbook(Method):
    """KDIGA with a forward pass of its own for each gradient."""

    lambda_iga: float = 1.0

    def __call__(self, student: nn.Module, teacher: nn.Module | None, x: Tensor, y: Tensor) -> Terms:
        assert teacher is not None
        logits = student(x)
        with torch.no_grad():
            teacher_logits = teacher(x)
        gradients = []
        for net, graph in ((student, True), (teacher, False)):
            pixels = x.clone().requires_grad_()
            loss = F.cross_entropy(net(pixels), y, reduction="sum")
            gradients += torch.autograd.grad(loss, pixels, create_graph=graph)
        return {
            "cross_entropy": 0.5 * F.cross_entropy(logits, y),
            "distillation": 0.5 * distillation_kl(logits, teacher_logits).mean(),
            "alignment": self.lambda_iga * gradient_distance(gradients[0], gradients[1]),
        }


def plain(model: nn.Module) -> nn.Module:
    """A copy made of PyTorch's own modules."""
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if isinstance(module, Conv2d | BatchNorm2d):
            module.__class__ = type(module).__mro__[1]
    return copied


@dataclass(frozen=True)
class Where:
    """Device and precision of a measurement."""

    device: torch.device
    precision: str


CPU = Where(torch.device("cpu"), "float32")
ONE_FORWARD = "one forward, PyTorch's derivatives"


def steps(model: str, batch: int, shape: tuple[int, int, int], where: Where) -> dict[str, Any]:
    """Callables that each make one step. (It ends with the terms' values, so a GPU has done its work.)"""
    torch.manual_seed(0)
    ours = build_model(model, num_classes=10, image_shape=shape)
    x = torch.rand(batch, *shape).to(where.device)
    y = torch.randint(0, 10, (batch,)).to(where.device)

    def step(net: nn.Module, method: Method, folded: bool = False) -> Any:
        net = placed(net, where.device)
        teacher = folded_copy(net, shape) if folded else copy.deepcopy(net).eval().requires_grad_(False)
        optimizer = torch.optim.SGD(net.parameters(), 1e-4, momentum=0.9, fused=where.device.type == "cuda")
        if where.precision == "bfloat16":
            net, teacher = Autocast(net, where.device), Autocast(teacher, where.device)
        return lambda: train_step(net, teacher, method, optimizer, x, y)

    return {
        "standard": step(plain(ours), ST()),
        "kdiga": step(copy.deepcopy(ours), KDIGA(), folded=True),
        "textbook": step(plain(ours), Textbook()),
        ONE_FORWARD: step(plain(ours), KDIGA()),
    }


def agreement(model: str, batch: int, shape: tuple[int, int, int], where: Where) -> dict[str, float]:
    """The cosine of each term's gradient, by the student's parameters, to that in float32, between two fresh nets."""
    nets = []
    for seed in range(2):
        torch.manual_seed(seed)
        nets.append(placed(build_model(model, num_classes=10, image_shape=shape), where.device))
    student, teacher = nets[0].train(), nets[1].eval()
    x, y = torch.rand(batch, *shape).to(where.device), torch.randint(0, 10, (batch,)).to(where.device)
    found: dict[str, list[Tensor]] = {}
    for wrap in (lambda net: net, lambda net: Autocast(net, where.device)):
        for name, term in KDIGA()(wrap(student), wrap(teacher), x, y).items():
            parts = torch.autograd.grad(term, list(student.parameters()), retain_graph=True, allow_unused=True)
            found.setdefault(name, []).append(torch.cat([part.flatten() for part in parts if part is not None]))
    return {name: torch.cosine_similarity(*values, dim=0).item() for name, values in found.items()}


class Flops(TorchDispatchMode):
    """Counts the floating-point operations of convolutions and matrix products.

    PyTorch's own counter leaves groups out of a convolution's way back, and the hooks by which it follows modules do
    not bear a gradient of a gradient.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet is torch.ops.aten.convolution:
            self.total += _convolution(out, args[1])
        elif packet is torch.ops.aten.convolution_backward:
            self.total += (args[-1][0] + args[-1][1]) * _convolution(args[0], args[2])
        elif packet in flop_registry:
            self.total += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out


def _convolution(values: Tensor, weight: Tensor) -> int:
    """Two operations for each number put out and each weight that it sees."""
    return 2 * values.numel() * weight[0].numel()


def ceiling(where: Where) -> float:
    """Floating-point operations a second of a large matrix product."""
    side = 8192 if where.device.type == "cuda" else 2048
    kind = torch.bfloat16 if where.precision == "bfloat16" else torch.float32
    a = torch.rand(side, side, device=where.device, dtype=kind)

    def product() -> None:
        (a @ a)[0, 0].item()

    return 2 * side**3 / alternate({"product": product}, 5)["product"]["median"]


def shape_of(model: str, side: int) -> tuple[int, int, int]:
    """(C, H, W) of the images that a net is measured on."""
    return (1 if model.startswith("digits") else 3), side, side


def measure(model: str, side: int, batch: int, rounds: int, where: Where, without: str = "") -> dict[str, Any]:
    """Seconds of each kind of step, and the ratios that matter; threads and memory as in training."""
    shape = shape_of(model, side)
    with computing(where.device, single_thread=side * side <= 64):
        return _measured(model, batch, rounds, shape, where, without)


def _measured(
    model: str, batch: int, rounds: int, shape: tuple[int, int, int], where: Where, without: str
) -> dict[str, Any]:
    ways = steps(model, batch, shape, where)
    ways.pop(without, None)
    seconds = alternate(ways, rounds)
    median = {name: value["median"] for name, value in seconds.items()}
    flops = {}
    for name in ("standard", "kdiga", "textbook"):
        with Flops() as counter:
            ways[name]()
        flops[name] = counter.total
    top = ceiling(where)
    in_bf16 = where.precision == "bfloat16"
    return {
        **({"cosine to float32": agreement(model, batch, shape, where)} if in_bf16 else {}),
        "device": str(where.device),
        "threads": torch.get_num_threads(),
        "precision": where.precision,
        "ceiling, TFLOP/s": top / 1e12,
        "share of the ceiling": {name: flops[name] / median[name] / top for name in flops},
        "arithmetic, kdiga / standard": flops["kdiga"] / flops["standard"],
        "arithmetic, textbook / standard": flops["textbook"] / flops["standard"],
        "model": model,
        "batch": batch,
        "shape": shape,
        "seconds": seconds,
        "kdiga / standard": median["kdiga"] / median["standard"],
        "textbook / kdiga": median["textbook"] / median["kdiga"],
    }


def scaling(rounds: int) -> list[dict[str, Any]]:
    """Every entry of ``SCALING``."""
    return [measure(*entry, rounds, CPU, without=ONE_FORWARD) for entry in SCALING]


def threads(rounds: int, batch: int = 64) -> list[dict[str, Any]]:
    """KDIGA steps on one thread and on all cores, for which ``training.computing`` decides by the images' size."""
    everything = os.cpu_count() or 1
    found = []
    for model, side in (("digits_small", 8), ("digits_wide", 8), ("mobilenet_v2", 16), ("mobilenet_v2", 32)):
        step = steps(model, batch, shape_of(model, side), CPU)["kdiga"]
        seconds = alternate({str(count): partial(_on, count, step) for count in (1, everything)}, rounds)
        ratio = seconds["1"]["median"] / seconds[str(everything)]["median"]
        found.append({"model": model, "side": side, "batch": batch, "seconds": seconds, "one thread / all": ratio})
    return found


def _on(count: int, step: Callable[[], Any]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    step()
    torch.set_num_threads(before)


def pages(rounds: int, model: str = "mobilenet_v2", side: int = 32) -> list[dict[str, Any]]:
    """KDIGA steps where the C library gives freed memory back at once, and where it keeps it, as in training."""
    found = []
    for batch in (32, 128, 256):
        step = steps(model, batch, shape_of(model, side), CPU)["kdiga"]
        ways = {"given back": False, "kept": True}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, kept in ways.items():
                keep_pages(kept)
                step()
                started = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - started)
        keep_pages(False)
        medians = {name: summary(values) for name, values in seconds.items()}
        ratio = medians["given back"]["median"] / medians["kept"]["median"]
        found.append({"model": model, "side": side, "batch": batch, "seconds": medians, "given back / kept": ratio})
    return found


def main() -> None:
    """Print the measurement as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mobilenet_v2")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32", choices=PRECISIONS)
    parser.add_argument("--side", type=int, help="of the images, in pixels (default: 8 for the digits' nets, else 32)")
    parser.add_argument("--scaling", action="store_true", help="also threads, memory, batches and sizes (minutes)")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"machine": machine()}
    where = Where(torch.device(arguments.device), arguments.precision)
    side = arguments.side or (8 if arguments.model.startswith("digits") else 32)
    result["step"] = measure(arguments.model, side, arguments.batch, arguments.rounds, where)
    if arguments.scaling:
        result["threads"] = threads(15)
        result["pages"] = pages(3)
        result["scaling"] = scaling(3)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
