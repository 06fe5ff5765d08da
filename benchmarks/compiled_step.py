"""Would a KDIGA step compiled as one graph be faster? A trial, not part of the kit.

    python benchmarks/compiled_step.py [--model mobilenet_v2] [--batch 128] [--precision float32] [--rounds 5]

``torch.compile`` refuses a double backward pass. ``make_fx`` traces the whole function from weights and images to the
weights' gradients, the kit's operators included, into one graph without autograd; Inductor compiles that graph (with a
C++ compiler). Both ways compute the same gradients from the same weights, buffers and draws; ``difference`` is the
relative ℓ2 distance of the gradients. Seconds are measured alternately.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from side_by_side import alternate, machine
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.stateless import _reparametrize_module  # pyright: ignore[reportPrivateUsage]

from kdiga_nb.methods import KDIGA, ST, Method
from kdiga_nb.models import build_model
from kdiga_nb.numerics.folding import folded_copy
from kdiga_nb.numerics.scopes import computing
from kdiga_nb.training import PRECISIONS

CPU = torch.device("cpu")
Gradients = Callable[[dict[str, Tensor], dict[str, Tensor], Tensor, Tensor], list[Tensor]]


def gradients_of(net: nn.Module, teacher: nn.Module, method: Method, bf16: bool) -> Gradients:
    """The function that is traced: weights, buffers (updated in place), images, labels → gradients of the weights."""

    def gradients(weights: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor, y: Tensor) -> list[Tensor]:
        with _reparametrize_module(net, weights | buffers), torch.enable_grad():
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = torch.stack(list(method(net, teacher, x, y).values())).sum()
            return list(torch.autograd.grad(loss, list(weights.values())))

    return gradients


def measure(model: str, batch: int, bf16: bool, rounds: int) -> dict[str, Any]:
    """Seconds of both ways for a standard and a KDIGA step, of tracing and of compiling."""
    shape, results = (3, 32, 32), {}
    torch.manual_seed(0)
    net = build_model(model, num_classes=10, image_shape=shape).to(memory_format=torch.channels_last).train()
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # both ways would draw other masks
    teacher = folded_copy(net, shape).to(memory_format=torch.channels_last)
    x = torch.rand(batch, *shape).to(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (batch,))
    weights = {name: weight.detach().clone().requires_grad_() for name, weight in net.named_parameters()}
    frozen = {name: weight.detach() for name, weight in weights.items()}

    def buffers() -> dict[str, Tensor]:
        return {name: value.clone() for name, value in net.named_buffers()}

    for name, method in (("standard", ST()), ("kdiga", KDIGA())):
        eager = gradients_of(net, teacher, method, bf16)
        started = time.perf_counter()
        graph = make_fx(eager)(weights, buffers(), x, y)
        traced = time.perf_counter()
        with torch.no_grad():
            compiled = torch.compile(graph, fullgraph=True)
            found = compiled(frozen, buffers(), x, y)
            ready = time.perf_counter()
            one, other = (torch.cat([g.flatten() for g in side]) for side in (found, eager(weights, buffers(), x, y)))
            apart = ((one - other).norm() / other.norm()).item()
            ways: dict[str, Callable[[], Any]] = {
                "eager": lambda eager=eager: eager(weights, buffers(), x, y),
                "compiled": lambda compiled=compiled: compiled(frozen, buffers(), x, y),
            }
            seconds = alternate(ways, rounds)
        results[name] = {
            "nodes": len(graph.graph.nodes),
            "trace_s": round(traced - started, 1),
            "compile_s": round(ready - traced, 1),
            "difference": float(f"{apart:.1e}"),
            "seconds": {way: round(value["median"], 4) for way, value in seconds.items()},
            "eager / compiled": round(seconds["eager"]["median"] / seconds["compiled"]["median"], 2),
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mobilenet_v2")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with computing(CPU):
        result = measure(options.model, options.batch, options.precision == "bfloat16", options.rounds)
    print(json.dumps({"machine": machine()} | vars(options) | result, indent=1))


if __name__ == "__main__":
    main()
