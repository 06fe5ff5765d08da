"""Whether the alignment's parameter gradient is worth approximating by finite differences.

    python benchmarks/finite_differences.py [--rounds 5] [--cifar-steps 150]

After Finlay & Oberman 2019: with v_i = (g_s − g_t) / ‖g_s − g_t‖ held fixed, the parameter gradient of ‖g_s − g_t‖ is
that of the slope of the loss along v_i, and (ℓ(x + h·v) − ℓ(x)) / h, or (ℓ(x + h·v) − ℓ(x − h·v)) / 2h, has nearly that
gradient without a double backward pass. Counted in forward passes a step is then 7 (or 10) of the student against the
6 of the exact one, so it can only win where a double backward costs more than its arithmetic.

Prints, for a trained net of the digits and MobileNetV2 after some training on CIFAR-10 (left out where the data are not
there): the relative error of the penalty's parameter gradient at each step size, and the time beside the exact step's.
"""

import argparse
import copy
import json
from collections.abc import Callable
from typing import Any

import torch
from side_by_side import alternate, machine
from torch import Tensor, nn

from kdiga_nb.artifacts.paper import table1
from kdiga_nb.data import DataError, load_data
from kdiga_nb.losses import cross_entropy, distillation_kl, gradient_distance, input_gradient
from kdiga_nb.methods import ST
from kdiga_nb.models import build_model
from kdiga_nb.params import Table1Params, at_scale
from kdiga_nb.runs.store import load_or_train
from kdiga_nb.training import train_step

STEP_SIZES = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)  # ‖h·v‖₂ in pixel units
Penalty = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


def exact(student: nn.Module, x: Tensor, y: Tensor, g_teacher: Tensor) -> Tensor:
    """The mean of ‖g_s − g_t‖₂, differentiable through g_s."""
    g_student, _ = input_gradient(student, x, y, create_graph=True)
    return gradient_distance(g_student, g_teacher)


def differences(h: float, central: bool) -> Penalty:
    """A scalar whose parameter gradient is close to that of ``exact``."""

    def penalty(student: nn.Module, x: Tensor, y: Tensor, g_teacher: Tensor) -> Tensor:
        g_student, _ = input_gradient(student, x, y)
        d = (g_student - g_teacher).flatten(1)
        v = (d / torch.linalg.vector_norm(d, dim=1, keepdim=True).clamp_min(1e-12)).view_as(x)
        ahead = cross_entropy(student(x + h * v), y).mean()
        behind = cross_entropy(student(x - h * v if central else x), y).mean()
        return (ahead - behind) / (2 * h if central else h)

    return penalty


def gradient(net: nn.Module, penalty: Penalty, x: Tensor, y: Tensor, g_teacher: Tensor) -> Tensor:
    """The parameter gradient as one vector, on a copy, so that no batch statistics move."""
    net = copy.deepcopy(net).train()
    value = penalty(net, x, y, g_teacher)
    parts = torch.autograd.grad(value, list(net.parameters()), allow_unused=True)
    return torch.cat([part.flatten() for part in parts if part is not None])


def errors(net: nn.Module, x: Tensor, y: Tensor, g_teacher: Tensor) -> dict[str, dict[str, float]]:
    """‖approximate − exact‖ / ‖exact‖ by kind and step size."""
    truth = gradient(net.double(), exact, x.double(), y, g_teacher.double())
    net.float()
    found: dict[str, dict[str, float]] = {}
    for kind, central in (("forward", False), ("central", True)):
        found[kind] = {}
        for h in STEP_SIZES:
            close = gradient(net, differences(h, central), x, y, g_teacher).double()
            # The biases of convolutions before batch normalisation have no gradient but rounding; all others match.
            found[kind][f"{h:g}"] = ((close - truth).norm() / truth.norm()).item()
    found["exact in float32"] = {
        "": ((gradient(net, exact, x, y, g_teacher).double() - truth).norm() / truth.norm()).item()
    }
    return found


def step(student: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor, h: float | None) -> Callable[[], None]:
    """A whole KDIGA step; ``h`` is None for the exact one, else that of the forward difference."""
    student = copy.deepcopy(student).train()
    optimizer = torch.optim.SGD(student.parameters(), 1e-4, momentum=0.9)

    def run() -> None:
        g_teacher, teacher_logits = input_gradient(teacher, x, y)
        if h is None:
            g_student, logits = input_gradient(student, x, y, create_graph=True)
            alignment = gradient_distance(g_student, g_teacher)
        else:
            # One graph serves the loss terms, the direction and the near end of the difference.
            pixels = x.clone().requires_grad_()
            logits = student(pixels)
            near = cross_entropy(logits, y).mean()
            (g_student,) = torch.autograd.grad(near * len(y), pixels, retain_graph=True)
            d = (g_student - g_teacher).flatten(1)
            v = (d / torch.linalg.vector_norm(d, dim=1, keepdim=True).clamp_min(1e-12)).view_as(x)
            alignment = (cross_entropy(student(x + h * v), y).mean() - near) / h
        loss = 0.5 * cross_entropy(logits, y).mean() + 0.5 * distillation_kl(logits, teacher_logits).mean() + alignment
        optimizer.zero_grad(set_to_none=True)
        loss.backward(inputs=list(student.parameters()))
        optimizer.step()

    return run


def compare(student: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor, rounds: int) -> dict[str, Any]:
    """Errors and times for one pair of nets."""
    teacher = teacher.eval().requires_grad_(False)
    student.requires_grad_(True)
    g_teacher, _ = input_gradient(teacher, x, y)
    found = errors(student, x, y, g_teacher)
    seconds = alternate(
        {"exact": step(student, teacher, x, y, None), "forward": step(student, teacher, x, y, 1e-2)}, rounds
    )
    smallest = {kind: min(found[kind].values()) for kind in ("forward", "central")}
    return {
        "batch": len(x),
        "relative error by step size": found,
        "smallest relative error": smallest,
        "seconds": seconds,
        "forward difference / exact": seconds["forward"]["median"] / seconds["exact"]["median"],
    }


def digits(rounds: int) -> dict[str, Any]:
    """The KDIGA student of Table 1 and its teacher."""
    run = table1(at_scale(Table1Params, "digits")).row("kdiga").runs[0]
    assert run.teacher is not None
    data = load_data("digits")
    student, teacher = (load_or_train(source, device="cpu") for source in (run, run.teacher))
    return compare(student, teacher, data.train.images[:64], data.train.labels[:64], rounds)


def cifar10(steps: int, rounds: int) -> dict[str, Any]:
    """MobileNetV2 after ``steps`` steps of standard training, and itself some steps earlier as the teacher."""
    data = load_data("cifar10")
    torch.manual_seed(0)
    net = build_model("mobilenet_v2", num_classes=10, image_shape=data.image_shape).train()
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    teacher = net
    for number in range(steps):
        part = slice(64 * number, 64 * (number + 1))
        train_step(net, None, ST(), optimizer, data.train.images[part], data.train.labels[part])
        if number == steps * 3 // 4:
            teacher = copy.deepcopy(net)
    x, y = data.test.images[:32], data.test.labels[:32]
    return {"steps trained": steps} | compare(net, teacher, x, y, rounds)


def main() -> None:
    """Print the measurement as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cifar-steps", type=int, default=150)
    arguments = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(), "digits_small": digits(arguments.rounds)}
    try:
        result["mobilenet_v2 on CIFAR-10"] = cifar10(arguments.cifar_steps, arguments.rounds)
    except DataError as error:
        result["mobilenet_v2 on CIFAR-10"] = f"left out: {error}"
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
