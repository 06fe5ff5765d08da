"""PGD and AutoAttack beside their peers, on the same net, images and starts, with the verdicts compared image by image.

    python benchmarks/attacks.py [--images 500] [--rounds 5]

The net is Table 1's KDIGA student on the digits, from the run store; the peers are foolbox and ART for PGD-20 (without
a random start, so that all three walk the same path), and pyautoattack alone for AutoAttack.
"""

import argparse
import json
import warnings
from typing import Any

import numpy as np
import torch
from side_by_side import alternate, machine
from torch import Tensor, nn

from kdiga_nb.artifacts.paper import table1
from kdiga_nb.attacks.autoattack import AutoAttack
from kdiga_nb.attacks.gradient import PGD
from kdiga_nb.data import load_data
from kdiga_nb.numerics.folding import folded_copy
from kdiga_nb.params import Table1Params, at_scale
from kdiga_nb.runs.store import load_or_train

EPSILON, STEPS = 0.1, 20


def pgd(model: nn.Module, x: Tensor, y: Tensor, rounds: int) -> dict[str, Any]:
    """Images a second of PGD-20, and on how many images the verdicts differ from ours."""
    import foolbox
    from art.attacks.evasion import ProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    length = 2 * EPSILON / STEPS
    ours = PGD(EPSILON, length, STEPS, random_start=False)
    quick = folded_copy(model, load_data("digits").image_shape)
    theirs = foolbox.PyTorchModel(model, bounds=(0, 1))
    attack = foolbox.attacks.LinfPGD(abs_stepsize=length, steps=STEPS, random_start=False)
    classes = load_data("digits").num_classes
    classifier = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), tuple(x.shape[1:]), classes, clip_values=(0, 1), device_type="cpu"
    )
    art = ProjectedGradientDescent(
        classifier, norm=np.inf, eps=EPSILON, eps_step=length, max_iter=STEPS, batch_size=len(x), verbose=False
    )
    pixels, labels = x.numpy(), y.numpy()
    ways = {
        "kit": lambda: ours(quick, x, y),
        "foolbox": lambda: attack(theirs, x, y, epsilons=EPSILON)[1],
        "art": lambda: torch.from_numpy(art.generate(pixels, labels)),
    }
    verdicts = {name: _verdict(model, way(), y) for name, way in ways.items()}
    seconds = alternate(ways, rounds)
    speed = {name: len(x) / value["median"] for name, value in seconds.items()}
    return {
        "images": len(x),
        "seconds": seconds,
        "images_per_second": speed,
        "kit / fastest peer": speed["kit"] / max(speed["foolbox"], speed["art"]),
        "verdicts that differ": {n: int((verdicts[n] != verdicts["kit"]).sum()) for n in ("foolbox", "art")},
    }


def _verdict(model: nn.Module, x_adv: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x_adv).argmax(1) == y


def autoattack(model: nn.Module, x: Tensor, y: Tensor, rounds: int) -> dict[str, Any]:
    """Seconds of AutoAttack, and on how many images the verdicts differ."""
    from pyautoattack import AutoAttack as Library

    found: dict[str, Tensor] = {}
    quick = folded_copy(model, load_data("digits").image_shape)

    def kit() -> None:
        found["kit"] = AutoAttack(EPSILON).evaluate(quick, x, y).robust

    def library() -> None:
        attack = Library(model, eps=EPSILON, seed=0, version="standard")
        x_adv, _ = attack.run_standard_evaluation(x, y, batch_size=len(x))
        found["pyautoattack"] = _verdict(model, x_adv, y)

    seconds = alternate({"kit": kit, "pyautoattack": library}, rounds)
    return {
        "images": len(x),
        "seconds": seconds,
        "kit / pyautoattack": seconds["kit"]["median"] / seconds["pyautoattack"]["median"],
        "verdicts that differ": int((found["kit"] != found["pyautoattack"]).sum()),
    }


def main() -> None:
    """Print the measurement as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # the peers' own
    torch.set_num_threads(1)
    run = table1(at_scale(Table1Params, "digits")).row("kdiga").runs[0]
    model = load_or_train(run, device="cpu").requires_grad_(False)
    data = load_data("digits")
    x, y = data.test.images[: arguments.images], data.test.labels[: arguments.images]
    result = {
        "machine": machine(),
        "pgd": pgd(model, x, y, arguments.rounds),
        "autoattack": autoattack(model, x[:200], y[:200], 3),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
