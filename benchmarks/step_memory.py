"""Peak memory of one training step, by method, net and batch size.

    python benchmarks/step_memory.py [--model mobilenet_v2] [--teacher wrn_34_10] [--batch 128] [--method kdiga]

prints JSON. On a GPU, the value is the allocator's peak. On a CPU, it is the growth of the process's resident peak over
two steps.
"""

import argparse
import json
import resource

import torch
from side_by_side import machine
from steps import Textbook, plain

from kdiga_nb.attacks.gradient import PGD
from kdiga_nb.methods import IGDM, KDIGA, ST
from kdiga_nb.models import build_model
from kdiga_nb.numerics.folding import folded_copy
from kdiga_nb.numerics.scopes import computing, placed, resolve_device
from kdiga_nb.training import train_step

METHODS = {"st": ST(), "kdiga": KDIGA(), "textbook": Textbook(), "igdm": IGDM(PGD(8 / 255, 2 / 255, 5))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mobilenet_v2")
    parser.add_argument("--teacher", default="wrn_34_10")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--method", choices=METHODS, default="kdiga")
    options = parser.parse_args()
    device = resolve_device()
    shape = (3, options.side, options.side)
    student, teacher = (
        placed(build_model(name, num_classes=10, image_shape=shape), device)
        for name in (options.model, options.teacher)
    )
    if options.method == "textbook":
        student, teacher = plain(student), plain(teacher).eval().requires_grad_(False)
    else:
        teacher = folded_copy(teacher, shape)
    optimizer = torch.optim.SGD(student.parameters(), 0.1, momentum=0.9)
    x, y = (
        torch.rand(options.batch, *shape, device=device),
        torch.zeros(options.batch, dtype=torch.int64, device=device),
    )
    before = _peak(device)
    with computing(device):
        for _ in range(2):
            train_step(student, teacher, METHODS[options.method], optimizer, x, y)
    grown = _peak(device) - before
    values = {name: getattr(options, name) for name in ("method", "model", "teacher", "batch", "side")}
    print(json.dumps({**values, "device": str(device), "peak_gb": round(grown, 3), "machine": machine()}, indent=1))


def _peak(device: torch.device) -> float:
    """The most memory used so far, in GB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    main()
