"""What a job will cost: GPU time from a measured step where the store has one, else estimated; disk.

An estimate counts a net's forward pass on tensors without data: its floating-point operations, the numbers its layers
put out, the layers themselves. Each is multiplied by how many such passes a step takes and divided by what an H100 is
assumed to sustain; the longest of the three times decides (wide nets compute, MobileNetV2 moves data, small batches
launch kernels). Nothing here has been measured on a GPU: every estimate is marked as one.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from kdiga_nb.attacks.autoattack import AutoAttack
from kdiga_nb.attacks.gradient import PGD
from kdiga_nb.data import SHAPES
from kdiga_nb.measures import Bounds, TestAccuracy
from kdiga_nb.methods import ARD, AT, IGAM, KD, KDIGA, KDIGA_ARD_A, KDIGA_ARD_C, ST, TRADES, Method
from kdiga_nb.models import build_model
from kdiga_nb.numerics.scopes import resolve_device
from kdiga_nb.runs.graph import Job
from kdiga_nb.runs.run import Run, Source, folder
from kdiga_nb.runs.store import environment, is_finished

SUSTAINED = 20e12  # floating-point operations a second: an assumption for an H100 in TF32
BANDWIDTH = 2e12  # bytes a second to and from its memory, another
LAUNCH = 1e-5  # seconds a layer takes at the least, another
ASSUMPTION = (
    f"at {SUSTAINED / 1e12:g} TFLOP/s, {BANDWIDTH / 1e12:g} TB/s and {1e6 * LAUNCH:g} µs a layer: assumed, not measured"
)
# Fitting and test examples, and classes, of the data sets that need not be there to be planned for.
SIZES = {
    **dict.fromkeys(("digits", "digits_rotated", "digits_inverted"), (1200, 500, 10)),
    "cifar10": (49_000, 10_000, 10),
    "mnist": (59_000, 10_000, 10),
    **dict.fromkeys(("imagenette", "imagenette_32"), (8_969, 3_925, 10)),
    "imagenet": (1_271_167, 50_000, 1000),
}
# Forward passes' worth of work a step: of the student, of the teacher. A backward pass counts two, the gradient for the
# pixels alone one; differentiating the input gradient again doubles the forward pass and that gradient each.
PASSES: dict[type[Method], tuple[int, int]] = {
    ST: (3, 0),
    KD: (3, 1),
    KDIGA: (6, 2),
    ARD: (6, 1),
    KDIGA_ARD_C: (9, 2),
    KDIGA_ARD_A: (9, 2),
    IGAM: (6, 2),
    AT: (3, 0),
    TRADES: (7, 0),
}
# AutoAttack on an image that resists: targets × steps, forward and backward, and Square's queries; half of them do.
AUTOATTACK_PASSES = (2 * (100 + 9 * 100 + 9 * 100) + 5000) // 2


@dataclass(frozen=True)
class Cost:
    """GPU seconds, and whether they come from a measured step."""

    seconds: float
    measured: bool


@dataclass(frozen=True)
class NetCost:
    """A net's forward pass of one image: operations, numbers put out by layers, layers; and its parameters."""

    flops: float
    outputs: int
    layers: int
    parameters: int


@cache
def net_of(model: str, dataset: str) -> NetCost:
    """Counted on the meta device."""
    shape = SHAPES[dataset]
    outputs: list[int] = []
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        built = build_model(model, num_classes=SIZES[dataset][2], image_shape=shape).eval()
        for module in built.modules():
            if not list(module.children()):
                module.register_forward_hook(lambda _, inputs, output: outputs.append(output.numel()))
        built(torch.empty(1, *shape))
    return NetCost(counter.get_total_flops(), sum(outputs), len(outputs), sum(p.numel() for p in built.parameters()))


def _net(source: Source) -> NetCost:
    return net_of((source.model or "").partition(":")[0], source.dataset)


def _seconds(net: NetCost, passes: float, images: int) -> float:
    # Each output is written, read by the activation and read by the next layer, 4 bytes a time.
    moving = 3 * 4 * net.outputs * passes * images / BANDWIDTH
    return max(net.flops * passes * images / SUSTAINED, moving, net.layers * passes * LAUNCH)


def costs(jobs: Sequence[Job]) -> dict[Job, Cost]:
    """What each job takes; steps are taken as measured from the finished runs among the jobs."""
    measured = _measured_steps([job.run for job in jobs if isinstance(job.run, Run)])
    found = {}
    for job in jobs:
        if job.measure is None and isinstance(job.run, Run):
            step = measured.get(_kind(job.run))
            seconds = _step(job.run) if step is None else step
            found[job] = Cost(seconds * _steps(job.run), step is not None)
        else:
            found[job] = Cost(_measuring(job), False)
    return found


def disk_bytes(jobs: Sequence[Job]) -> tuple[int, int]:
    """What the trainings leave in the store, and the largest checkpoint of one under way: weights, momentum, best."""
    sizes = [4 * _net(job.run).parameters for job in jobs if job.measure is None]
    return sum(sizes), 3 * max(sizes, default=0)


def _step(run: Run) -> float:
    method, batch = run.method, run.schedule.batch_size
    student, teacher = PASSES[type(method)]
    if run.schedule.trainable == "head":
        student = 1
    attack = getattr(method, "attack", None)
    if attack is not None:
        student += 2 * attack.steps
    step = _seconds(_net(run), student, batch)
    return step if run.teacher is None else step + _seconds(_net(run.teacher), teacher, batch)


def _steps(run: Run) -> int:
    examples = min(SIZES[run.dataset][0], run.schedule.images or SIZES[run.dataset][0])
    return run.schedule.epochs * -(-examples // run.schedule.batch_size)


def _measuring(job: Job) -> float:
    measure, net = job.measure, _net(job.run)
    images = SIZES[job.run.dataset][1]
    passes = 1
    if isinstance(measure, TestAccuracy | Bounds):
        images = min(images, measure.images or images)
    if isinstance(measure, TestAccuracy) and isinstance(measure.attack, PGD):
        passes = 2 * measure.attack.steps * measure.attack.restarts + 1
    elif isinstance(measure, TestAccuracy) and isinstance(measure.attack, AutoAttack):
        passes = AUTOATTACK_PASSES
    elif isinstance(measure, Bounds):
        passes = 5 * 3 * 2 * measure.steps  # five searches from three starts
    batches = -(-images // 500)
    seconds = batches * _seconds(net, passes, min(images, 500))
    return seconds if job.reference is None else seconds + batches * _seconds(_net(job.reference), passes, 500)


def _kind(run: Run) -> tuple[object, ...]:
    """What decides how long a step takes."""
    teacher = run.teacher.model if run.teacher is not None else None
    attack_steps = getattr(getattr(run.method, "attack", None), "steps", 0)
    schedule = run.schedule
    sizes = schedule.batch_size, schedule.precision, schedule.trainable
    return run.dataset, run.model, type(run.method), attack_steps, teacher, *sizes


def _measured_steps(runs: Sequence[Run]) -> dict[tuple[object, ...], float]:
    """Seconds a step, validation included, by kind of run, from those that finished on hardware like this."""
    here, found = environment(resolve_device())["device"], {}
    for run in runs:
        if is_finished(run):
            record = json.loads((folder(run) / "run.json").read_text())
            if record["environment"]["device"] == here:
                found[_kind(run)] = record["seconds"] / _steps(run)
    return found
