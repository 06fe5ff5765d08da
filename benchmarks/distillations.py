"""What a step of each distillation costs, and how far IGDM's matching of differences is KDIGA's matching of gradients.

    python benchmarks/distillations.py [--rounds 9]

``step``: seconds of a training step of every method relative to a standard step, alternately in one process, on a
digits net and on MobileNetV2. ``cosine``: between the gradients, by the student's parameters, of KDIGA's ‖g_s − g_t‖₂
(double backward pass) and of IGDM's KL of logit differences (two more forward passes), both with weight 1, over the
first 20 batches of training images, for digits students of seed 0 (trained now if the run store lacks them). The
perturbation is that of Table 1's training attack. ``size``: norm of IGDM's gradient over the norm of KDIGA's.
"""

import argparse
import json
import statistics
from typing import Any

import torch
from side_by_side import alternate, machine
from torch import Tensor, nn

from kdiga_nb.artifacts import EVERY
from kdiga_nb.artifacts.recipes import training_attack
from kdiga_nb.data import load_data
from kdiga_nb.methods import ARD, IAD, IGDM, KD, KDIGA, RSLAD, ST, AdaAD, GradientPenalty, Method
from kdiga_nb.models import build_model
from kdiga_nb.numerics.folding import folded_copy
from kdiga_nb.numerics.scopes import computing
from kdiga_nb.params import BaselineParams, at_scale
from kdiga_nb.runs.store import load_or_train
from kdiga_nb.training import train_step

NETS = (("digits_small", "digits_wide", (1, 8, 8), 64), ("mobilenet_v2", "mobilenet_v2", (3, 32, 32), 32))
BATCHES = 20
CPU = torch.device("cpu")


def methods(params: BaselineParams) -> dict[str, Method]:
    """The methods at their weights of the digits."""
    attack = training_attack(params)
    return {
        "st": ST(),
        "kd": KD(),
        "penalty": GradientPenalty(params.lambda_penalty),
        "kdiga": KDIGA(lambda_iga=params.lambda_iga),
        "ard": ARD(attack),
        "rslad": RSLAD(attack),
        "iad": IAD(attack),
        "adaad": AdaAD(attack),
        "igdm": IGDM(attack, lambda_igdm=params.lambda_igdm),
    }


def step(
    params: BaselineParams, student: str, teacher: str, shape: tuple[int, int, int], batch: int, rounds: int
) -> Any:
    """Seconds of each method's step, and their ratios to the standard step."""
    torch.manual_seed(0)
    x, y = torch.rand(batch, *shape), torch.randint(0, 10, (batch,))
    taught = folded_copy(build_model(teacher, num_classes=10, image_shape=shape), shape)

    def one(method: Method) -> Any:
        net = build_model(student, num_classes=10, image_shape=shape)
        optimizer = torch.optim.SGD(net.parameters(), 1e-4, momentum=0.9)
        return lambda: train_step(net, taught, method, optimizer, x, y)

    with computing(CPU, single_thread=shape[1] <= 8):
        seconds = alternate({name: one(method) for name, method in methods(params).items()}, rounds)
    standard = seconds["st"]["median"]
    return {
        "student": student,
        "teacher": teacher,
        "batch": batch,
        "seconds": {name: round(value["median"], 5) for name, value in seconds.items()},
        "over standard": {name: round(value["median"] / standard, 2) for name, value in seconds.items()},
    }


def by_parameters(term: Tensor, net: nn.Module) -> Tensor:
    """The term's gradient by all parameters of a net, as one vector."""
    parts = torch.autograd.grad(term, list(net.parameters()), retain_graph=True, allow_unused=True)
    pairs = zip(parts, net.parameters(), strict=True)
    return torch.cat([(torch.zeros_like(p) if part is None else part).flatten() for part, p in pairs])


def cosine(params: BaselineParams, row: str) -> dict[str, Any]:
    """Cosine and ratio of size of the two matching terms' gradients, over batches, at a trained student."""
    rows = {one.id: one for one in EVERY["baselines"].build(params).rows}
    student, teacher = (load_or_train(rows[name].runs[0], device=CPU) for name in (row, "trades_teacher"))
    student.requires_grad_()
    split = load_data("digits").train
    kinds: dict[str, tuple[Method, str]] = {
        "kdiga": (KDIGA(lambda_iga=1.0), "alignment"),
        "igdm": (IGDM(training_attack(params), lambda_igdm=1.0), "difference"),
    }
    cosines, sizes = [], []
    for start in range(0, BATCHES * params.batch_size, params.batch_size):
        x, y = (part[start : start + params.batch_size] for part in (split.images, split.labels))
        found = {}
        for name, (method, term) in kinds.items():
            torch.manual_seed(start)
            found[name] = by_parameters(method(student, teacher, x, y)[term], student)
        cosines.append(torch.cosine_similarity(found["kdiga"], found["igdm"], dim=0).item())
        sizes.append((found["igdm"].norm() / found["kdiga"].norm()).item())
    return {
        "student": row,
        "batches": len(cosines),
        "cosine": {"mean": round(statistics.mean(cosines), 3), "sd": round(statistics.stdev(cosines), 3)},
        "size": round(statistics.mean(sizes), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    params = at_scale(BaselineParams, "digits")
    result = {
        "machine": machine(),
        "step": [step(params, *net, options.rounds) for net in NETS],
        "cosine": [cosine(params, row) for row in ("st", "kd", "kdiga", "igdm")],
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
