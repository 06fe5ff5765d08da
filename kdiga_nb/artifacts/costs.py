"""What a job will cost: GPU time from a measured step where the store has one, else estimated; disk.

An estimate counts a net's forward pass on tensors without data: floating-point operations, activations, layers. Each
count is multiplied by the passes per step and divided by what an H100 is assumed to sustain. The longest of the three
times is the estimate: compute limits wide nets, memory traffic MobileNetV2, kernel launches small batches. None of this
has been measured on a GPU, and every estimate is marked as one.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from kdiga_nb.attacks.autoattack import AutoAttack
from kdiga_nb.attacks.gradient import PGD
from kdiga_nb.attacks.losses import LossPGD
from kdiga_nb.data import DATASETS
from kdiga_nb.measures import Bounds, TestAccuracy
from kdiga_nb.methods import ST
from kdiga_nb.models import build_model
from kdiga_nb.numerics.scopes import resolve_device
from kdiga_nb.runs.graph import Job
from kdiga_nb.runs.run import Run, Source, folder
from kdiga_nb.runs.store import environment, is_finished

SUSTAINED = 20e12  # floating-point operations per second: an assumption for an H100 in TF32
BANDWIDTH = 2e12  # bytes per second to and from its memory: also an assumption
LAUNCH = 1e-5  # minimum seconds per layer: also an assumption
ASSUMPTION = (
    f"at {SUSTAINED / 1e12:g} TFLOP/s, {BANDWIDTH / 1e12:g} TB/s and {1e6 * LAUNCH:g} µs per layer: "
    "assumed, not measured"
)
# AutoAttack on an image that resists: targets × steps, forward and backward, and Square's queries. Half of all images
# are assumed to resist.
AUTOATTACK_PASSES = (2 * (100 + 9 * 100 + 9 * 100) + 5000) // 2


@dataclass(frozen=True)
class Cost:
    """GPU seconds, and whether they come from a measured step."""

    seconds: float
    measured: bool


@dataclass(frozen=True)
class NetCost:
    """Forward cost per image: FLOPs, activations, layer count; plus the parameter count."""

    flops: float
    outputs: int
    layers: int
    parameters: int


@cache
def net_of(model: str, dataset: str) -> NetCost:
    """Counted on the meta device."""
    data = DATASETS[dataset]
    outputs: list[int] = []
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        built = build_model(model, num_classes=data.classes, image_shape=data.image_shape).eval()
        for module in built.modules():
            if not list(module.children()):
                module.register_forward_hook(lambda _, inputs, output: outputs.append(output.numel()))
        built(torch.empty(1, *data.image_shape))
    return NetCost(counter.get_total_flops(), sum(outputs), len(outputs), sum(p.numel() for p in built.parameters()))


def _net(source: Source) -> NetCost:
    return net_of((source.model or "").partition(":")[0], source.dataset)


def _seconds(net: NetCost, passes: float, images: int) -> float:
    # Each output is written, read by the activation and read by the next layer, 4 bytes a time.
    moving = 3 * 4 * net.outputs * passes * images / BANDWIDTH
    return max(net.flops * passes * images / SUSTAINED, moving, net.layers * passes * LAUNCH)


def costs(jobs: Sequence[Job]) -> dict[Job, Cost]:
    """The cost of each job. The finished runs among the jobs give measured seconds per step."""
    measured = _measured_steps([job.run for job in jobs if isinstance(job.run, Run)])
    estimates = {}
    for job in jobs:
        if job.measure is None and isinstance(job.run, Run):
            step = measured.get(_kind(job.run))
            seconds = _step(job.run) if step is None else step
            estimates[job] = Cost(seconds * _steps(job.run), step is not None)
        else:
            estimates[job] = Cost(_measuring(job), False)
    return estimates


def disk_bytes(jobs: Sequence[Job]) -> tuple[int, int]:
    """Bytes of the trained weights, and of the largest checkpoint during training: weights, momentum, best weights."""
    sizes = [4 * _net(job.run).parameters for job in jobs if job.measure is None]
    return sum(sizes), 3 * max(sizes, default=0)


def _step(run: Run) -> float:
    student, teacher = _passes(run)
    step = _seconds(_net(run), student, run.schedule.batch_size)
    return step if run.teacher is None else step + _seconds(_net(run.teacher), teacher, run.schedule.batch_size)


def relative_cost(run: Run) -> float:
    """The arithmetic of a training step over that of a step of standard training of the same net."""
    student, teacher = _passes(run)
    flops = student * _net(run).flops + (teacher * _net(run.teacher).flops if run.teacher else 0)
    return flops / (ST().passes[0] * _net(run).flops)


def _passes(run: Run) -> tuple[int, int]:
    """Forward passes of student and teacher in a training step, those of the attack included."""
    method = run.method
    student, teacher = method.passes
    if run.schedule.trainable == "head":
        student = 1
    attack = getattr(method, "attack", None)
    if attack is not None:
        student += 2 * attack.steps
        teacher += 2 * attack.steps if method.attacks_teacher else 0
    return student, teacher


def _steps(run: Run) -> int:
    fitting = DATASETS[run.dataset].fitting
    examples = min(fitting, run.schedule.images or fitting)
    return run.schedule.epochs * -(-examples // run.schedule.batch_size)


def _measuring(job: Job) -> float:
    measure, net = job.measure, _net(job.run)
    images = DATASETS[job.run.dataset].test
    passes = 1
    if isinstance(measure, TestAccuracy | Bounds):
        images = min(images, measure.images or images)
    if isinstance(measure, TestAccuracy) and isinstance(measure.attack, PGD | LossPGD):
        passes = 2 * measure.attack.steps * measure.attack.restarts + 1
    elif isinstance(measure, TestAccuracy) and isinstance(measure.attack, AutoAttack):
        passes = AUTOATTACK_PASSES
    elif isinstance(measure, Bounds):
        passes = 5 * 3 * 2 * measure.steps  # five searches from three starts
    batches = -(-images // 500)
    seconds = batches * _seconds(net, passes, min(images, 500))
    return seconds if job.reference is None else seconds + batches * _seconds(_net(job.reference), passes, 500)


def _kind(run: Run) -> tuple[object, ...]:
    """Everything that the duration of a step depends on."""
    teacher = run.teacher.model if run.teacher is not None else None
    attack_steps = getattr(getattr(run.method, "attack", None), "steps", 0)
    schedule = run.schedule
    sizes = schedule.batch_size, schedule.precision, schedule.trainable
    return run.dataset, run.model, type(run.method), attack_steps, teacher, *sizes


def _measured_steps(runs: Sequence[Run]) -> dict[tuple[object, ...], float]:
    """Seconds per step, validation included, by kind of run, from finished runs on the same hardware."""
    here, seconds = environment(resolve_device())["device"], {}
    for run in runs:
        if is_finished(run):
            record = json.loads((folder(run) / "run.json").read_text())
            if record["environment"]["device"] == here:
                seconds[_kind(run)] = record["seconds"] / _steps(run)
    return seconds
