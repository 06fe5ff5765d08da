"""PGD and AutoAttack beside their peers, on the same net, images and starts, with the verdicts compared image by image.

    python benchmarks/attacks.py [--images 500] [--rounds 5]
    python benchmarks/attacks.py --scale cifar10_cpu --row st --row kdiga --images 200    AutoAttack by member only
    python benchmarks/attacks.py --seeds 3 --row st --row kd …                            its verdicts only

The net is Table 1's KDIGA student on the digits, from the run store; the peers are foolbox and ART for PGD-20 (without
a random start, so that all three walk the same path), and pyautoattack alone for AutoAttack. By member, the library's
members and the kit's attack the same folded net.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from side_by_side import alternate, machine
from torch import Tensor, nn

from kdiga_nb.artifacts.paper import table1
from kdiga_nb.attacks import autoattack
from kdiga_nb.attacks.gradient import PGD
from kdiga_nb.data import Data, load_data
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


def whole(model: nn.Module, x: Tensor, y: Tensor, rounds: int) -> dict[str, Any]:
    """Seconds of AutoAttack, and on how many images the verdicts differ."""
    from pyautoattack import AutoAttack as Library

    found: dict[str, Tensor] = {}
    quick = folded_copy(model, load_data("digits").image_shape)

    def kit() -> None:
        found["kit"] = autoattack.AutoAttack(EPSILON).evaluate(quick, x, y).robust

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


@contextmanager
def librarys_members() -> Iterator[None]:
    """Inside, ``AutoAttack`` runs the library's members and not the kit's."""
    own, autoattack._use_own_members = autoattack._use_own_members, lambda *_: None
    try:
        yield
    finally:
        autoattack._use_own_members = own


def by_member(model: nn.Module, data: Data, epsilon: float, images: int, rounds: int) -> dict[str, Any]:
    """Seconds of each member, on the images that those before it have left, and how many verdicts differ."""
    net, attack = folded_copy(model, data.image_shape), autoattack.AutoAttack(epsilon)
    x, y = data.test.images[:images], data.test.labels[:images]
    right, result = _verdict(net, x, y), {}
    for member in autoattack.MEMBERS["standard"]:
        x, y = x[right], y[right]
        if not len(x):
            break
        found: dict[str, Tensor] = {}

        def run(name: str, member: str = member, x: Tensor = x, y: Tensor = y, found: Any = found) -> None:
            with librarys_members() if name == "library" else nullcontext():
                found[name] = _verdict(net, attack._run(member, net, x, y)[0], y)

        seconds = alternate({name: partial(run, name) for name in ("kit", "library")}, rounds)
        result[member] = {
            "images": len(x),
            "seconds": seconds,
            "kit / library": seconds["kit"]["median"] / seconds["library"]["median"],
            "verdicts that differ": int((found["kit"] != found["library"]).sum()),
        }
        right = found["kit"]
    return result


def equality(model: nn.Module, data: Data, epsilon: float, images: int, seeds: int) -> dict[str, Any]:
    """Verdicts of the kit and of the library, whole AutoAttack, under several seeds of its random draws."""
    net, x, y = folded_copy(model, data.image_shape), data.test.images[:images], data.test.labels[:images]
    ours, theirs = [], []
    for seed in range(seeds):
        ours.append(autoattack.AutoAttack(epsilon, seed=seed).evaluate(net, x, y).robust)
        with librarys_members():
            theirs.append(autoattack.AutoAttack(epsilon, seed=seed).evaluate(net, x, y).robust)
    differ = torch.stack([one != two for one, two in zip(ours, theirs, strict=True)])
    drawn = torch.stack(theirs).any(0) & ~torch.stack(theirs).all(0)
    return {
        "verdicts": differ.numel(),
        "verdicts that differ": int(differ.sum()),
        "of them on images that depend on the library's seed": int((differ & drawn).sum()),
        "images that depend on the library's seed": int(drawn.sum()),
        "robust, kit": [int(one.sum()) for one in ours],
        "robust, library": [int(one.sum()) for one in theirs],
    }


def main() -> None:
    """Print the measurement as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", default="digits")
    parser.add_argument("--row", action="append", help="rows of Table 1: AutoAttack only, by member")
    parser.add_argument("--seeds", type=int, default=0, help="compare verdicts under so many seeds instead of times")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # the peers' own
    params = at_scale(Table1Params, arguments.scale)
    data = load_data(params.dataset)
    torch.set_num_threads(1 if data.single_thread else torch.get_num_threads())
    table = table1(params)
    nets = {row: load_or_train(table.row(row).runs[0], device="cpu").requires_grad_(False)
            for row in arguments.row or ["kdiga"]}  # fmt: skip
    result: dict[str, Any] = {"machine": machine()}
    if arguments.row:
        for row, net in nets.items():
            common = (net, data, params.epsilon, arguments.images)
            result[row] = (
                equality(*common, arguments.seeds) if arguments.seeds else by_member(*common, arguments.rounds)
            )
            print(row, json.dumps(result[row]), file=sys.stderr, flush=True)
    else:
        model, (x, y) = nets["kdiga"], (part[: arguments.images] for part in data.test)
        result |= {
            "pgd": pgd(model, x, y, arguments.rounds),
            "autoattack": whole(model, x[:200], y[:200], 3),
            "members": by_member(model, data, params.epsilon, 200, 2),
        }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
