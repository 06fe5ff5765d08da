"""``Schedule``, ``train_step`` and ``train``: one loop for every method.

Each epoch draws its data order, augmentation, dropout and random starts from generators seeded by (seed, epoch). The
result of an epoch therefore depends only on the state before the epoch. A training that is resumed after an epoch, or
inside one, gives bit for bit the result of an uninterrupted training on the same CPU. (On a GPU, cuDNN sums some
gradients in an order that differs between calls.)

The same loop runs on a CPU, on a GPU, or in several processes with one GPU each (torchrun). Several processes split
each batch and together compute what one process computes on the whole batch (``numerics.distributed``). On a GPU the
nets use the channels-last layout, the optimiser is fused, and matrix products use TF32.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from kdiga_nb.attacks import Attack
from kdiga_nb.attacks.gradient import PGD
from kdiga_nb.data import Data, Feed, Shard, Split
from kdiga_nb.methods import Method
from kdiga_nb.metrics import accuracy
from kdiga_nb.models import head_parameters
from kdiga_nb.numerics import distributed
from kdiga_nb.numerics.memory import attempt, largest_that_fits
from kdiga_nb.numerics.scopes import (
    Autocast,
    computing,
    has_bfloat16,
    placed,
    resolve_device,
    restored_generators,
)
from kdiga_nb.teacher import prepared_teacher

log = logging.getLogger("kdiga")

CHECK_EVERY = 50  # steps between two checks for non-finite terms on a GPU; each check waits for the GPU
PRECISIONS = ("float32", "bfloat16")
OPTIMIZERS = ("sgd", "adamw")
POLICIES = ("multistep", "one_cycle", "constant")
SELECTIONS = ("last", "validation", "best_on_test")
TRAINABLE = ("all", "head")
BATCH_NORM = ("synchronised", "per_process")


class TrainingError(RuntimeError):
    """A training that cannot continue, with the reason."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a net is trained, and which of its epochs is kept.

    Attributes:
        epochs, batch_size: passes over the data; images per step.
        learning_rate: the peak rate for ``one_cycle``.
        optimizer: ``sgd`` with momentum (the paper's), or ``adamw`` (for transformers trained from scratch).
        policy: ``multistep`` multiplies by ``decay`` at each milestone (epochs); ``one_cycle`` rises linearly over the
            first 30 % of the steps and falls linearly to 0.
        compounding: False repeats the authors' schedule, whose second milestone multiplies the initial rate again and
            so changes nothing.
        momentum, weight_decay: of the optimiser (AdamW has no momentum field).
        clip_norm: bound on the gradient's ℓ2 norm, 0 for none.
        augment: use the data set's augmentation.
        trainable: ``all`` weights or the ``head`` alone.
        selection: keep the ``last`` epoch, or the one of best accuracy on ``validation`` (PGD-20 of radius
            ``selection_epsilon``; radius 0: clean), or, as the authors did, ``best_on_test``.
        precision: ``float32``, or ``bfloat16``: convolutions and matrix products of student and teacher, and of their
            gradients, in bf16; logits, losses, the alignment term and the weights stay in fp32. A device without bf16
            arithmetic computes in fp32 instead; the record says so (``computed_in``).
        images: train on the first so many fitting examples and validate on at most as many (0: all).
        batch_norm: with several processes, ``synchronised`` statistics are over the whole batch, as with one process;
            ``per_process`` ones over each process's part, which saves their sums over the processes. The result then
            depends on the number of processes. The running statistics are averaged after each epoch.
    """

    epochs: int
    batch_size: int = 128
    learning_rate: float = 0.1
    optimizer: str = "sgd"
    policy: str = "multistep"
    milestones: tuple[int, ...] = ()
    decay: float = 0.1
    compounding: bool = True
    momentum: float = 0.9
    weight_decay: float = 2e-4
    clip_norm: float = 0.0
    augment: bool = True
    trainable: str = "all"
    selection: str = "last"
    selection_epsilon: float = 0.0
    # Added later: omitted from run keys at the default, so old keys stay valid.
    precision: str = field(default="float32", metadata={"unnamed_at_default": True})
    images: int = field(default=0, metadata={"unnamed_at_default": True})
    batch_norm: str = field(default="synchronised", metadata={"unnamed_at_default": True})

    def __post_init__(self) -> None:
        for name, allowed in {
            "precision": PRECISIONS,
            "optimizer": OPTIMIZERS,
            "policy": POLICIES,
            "selection": SELECTIONS,
            "trainable": TRAINABLE,
            "batch_norm": BATCH_NORM,
        }.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(f"epochs and batch_size must be at least 1, got {self.epochs} and {self.batch_size}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        for name in ("decay", "momentum", "weight_decay", "clip_norm", "images"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.selection_epsilon <= 1:
            raise ValueError(f"selection_epsilon must be in [0, 1], got {self.selection_epsilon}")
        rising = all(a < b for a, b in zip(self.milestones, self.milestones[1:], strict=False))
        if not rising or any(not 0 < milestone < self.epochs for milestone in self.milestones):
            raise ValueError(
                f"milestones must rise and lie between 0 and epochs = {self.epochs}, got {self.milestones}"
            )

    def rate(self, epoch: int, progress: float) -> float:
        """The learning rate ``progress`` (0 to 1) into an epoch (from 0)."""
        if self.policy == "one_cycle":
            done = (epoch + progress) / self.epochs
            return self.learning_rate * (done / 0.3 if done < 0.3 else (1 - done) / 0.7)
        passed = sum(epoch >= milestone for milestone in self.milestones) if self.policy == "multistep" else 0
        return self.learning_rate * self.decay ** (passed if self.compounding else min(passed, 1))


@dataclass
class History:
    """One row per epoch: epoch (from 1), learning_rate, mean of each term, validation accuracy, seconds."""

    rows: list[dict[str, float]] = field(default_factory=list)
    selected_epoch: int = 0


@dataclass
class TrainingState:
    """A training between two steps: everything that the remaining steps depend on.

    Between two epochs, ``step`` is 0 and ``random`` is empty. Inside an epoch, ``step`` counts the steps done and
    ``random`` holds the states of the generators.
    """

    student: nn.Module
    criterion: Method | nn.Module
    optimizer: torch.optim.Optimizer
    history: History = field(default_factory=History)
    best: dict[str, Tensor] = field(default_factory=dict)
    best_score: float = -1.0
    epoch: int = 0
    epochs: int = 0
    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    random: dict[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """Copies of all tensors of the state, under readable names."""
        named = {f"student.{k}": v for k, v in self.student.state_dict().items()}
        named |= {f"best.{k}": v for k, v in self.best.items()}
        if isinstance(self.criterion, nn.Module):
            named |= {f"criterion.{k}": v for k, v in self.criterion.state_dict().items()}
        for index, parameter in enumerate(self.optimizer.param_groups[0]["params"]):
            named |= {f"optimizer.{index}.{k}": v for k, v in self.optimizer.state[parameter].items() if v is not None}
        named |= {f"random.{k}": v for k, v in self.random.items()}
        return {k: v.detach().clone().contiguous() for k, v in named.items()}

    def record(self) -> dict[str, Any]:
        """The rest of the state, ready for JSON."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "sums": dict(self.sums),
            "best_score": self.best_score,
            "selected_epoch": self.history.selected_epoch,
            "rows": [dict(row) for row in self.history.rows],
        }

    def restore(self, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        """Load a state saved by ``tensors`` and ``record``."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        self.student.load_state_dict(part("student."))
        if isinstance(self.criterion, nn.Module):
            self.criterion.load_state_dict(part("criterion."))
        parameters = self.optimizer.param_groups[0]["params"]
        for name, value in part("optimizer.").items():
            index, _, slot = name.partition(".")
            parameter = parameters[int(index)]
            self.optimizer.state[parameter][slot] = _slot(value, parameter, self.optimizer)
        self.best, self.random = part("best."), part("random.")
        self.best_score, self.epoch = record["best_score"], record["epoch"]
        self.step, self.sums = record.get("step", 0), dict(record.get("sums", {}))
        self.history = History(list(record["rows"]), record["selected_epoch"])


def _slot(value: Tensor, parameter: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    """A saved tensor of the optimiser's state, in the layout and on the device that the optimiser uses."""
    if value.shape == parameter.shape:
        return torch.empty_like(parameter, requires_grad=False).copy_(value)
    # The step count: a fused optimiser keeps the count on the GPU, any other on the CPU.
    return value.to(parameter.device if optimizer.defaults.get("fused") else "cpu", copy=True)


Callback = Callable[[TrainingState], None]


def train_step(
    student: nn.Module,
    teacher: nn.Module | None,
    method: Method | nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    *,
    clip_norm: float = 0.0,
) -> dict[str, float]:
    """One optimiser step on images (B, C, H, W) and labels (B,); returns the value of each weighted term, in nats.

    Raises:
        TrainingError: a term is not finite; the weights are unchanged.
    """
    return {
        name: value.item() for name, value in _advance(student, teacher, method, optimizer, x, y, clip_norm).items()
    }


def _advance(
    student: nn.Module,
    teacher: nn.Module | None,
    method: Method | nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    clip_norm: float,
    share: float = 1.0,
    check: bool = True,
) -> dict[str, Tensor]:
    """``train_step`` whose terms stay on the device; ``check`` says whether to test them for finiteness.

    ``share`` is the size of this process's part of the batch, relative to the mean part.
    """
    terms = method(student, teacher, x, y)
    if share != 1:
        terms = {name: share * value for name, value in terms.items()}
    if check:
        check_finite(terms)
    optimizer.zero_grad(set_to_none=True)
    parameters = _parameters(optimizer)
    # With ``inputs`` the backward pass does not also compute the gradient of each term with respect to the pixels.
    torch.stack(list(terms.values())).sum().backward(inputs=parameters)
    distributed.average_gradients(parameters)
    if clip_norm:
        nn.utils.clip_grad_norm_(parameters, clip_norm)
    optimizer.step()
    return {name: value.detach() for name, value in terms.items()}


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def check_finite(terms: dict[str, Tensor]) -> None:
    """Raise ``TrainingError`` if a term is not finite."""
    for name, term in terms.items():
        value = term.item()
        if not math.isfinite(value):
            raise TrainingError(f"the term {name} is {value}")


def begin(
    student: nn.Module, method: Method, data: Data, schedule: Schedule, *, seed: int, device: torch.device
) -> TrainingState:
    """The state before the first epoch."""
    with restored_generators(device):
        torch.manual_seed(seed)
        criterion = method.bind(data.image_shape, device)
    parameters = head_parameters(student) if schedule.trainable == "head" else list(student.parameters())
    if isinstance(criterion, nn.Module):
        parameters = parameters + list(criterion.parameters())
    rate, decay = schedule.learning_rate, schedule.weight_decay
    fused = device.type == "cuda"
    kernels: dict[str, Any] = {"weight_decay": decay, "fused": fused, "foreach": not fused}
    if schedule.optimizer == "adamw":
        optimizer = torch.optim.AdamW(parameters, rate, **kernels)
    else:
        optimizer = torch.optim.SGD(parameters, rate, momentum=schedule.momentum, **kernels)
    return TrainingState(student, criterion, optimizer, epochs=schedule.epochs)


def train(
    student: nn.Module,
    method: Method,
    data: Data,
    schedule: Schedule,
    *,
    teacher: nn.Module | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    callbacks: Sequence[Callback] = (),
    resume: tuple[dict[str, Tensor], dict[str, Any]] | None = None,
    save: Callback | None = None,
    save_seconds: float = math.inf,
) -> History:
    """Train ``student`` in place; it ends in eval mode with the weights of the selected epoch.

    Args:
        teacher: used frozen, in eval mode.
        callbacks: called after each epoch with the ``TrainingState``.
        save: called after each epoch, before the callbacks, and inside an epoch every ``save_seconds`` seconds. If it
            saves ``state.tensors()`` and ``state.record()``, a killed training loses no more than that time.
        resume: ``(state.tensors(), state.record())`` from an earlier point of the same training. The device and the
            number of processes may differ.

    Raises:
        ValueError: a method that needs a teacher has none, or a selection on validation examples has none.
        TrainingError: a term is not finite (the message names term, epoch and step), or memory is insufficient (the
            message names a batch size that fits).
    """
    if method.needs_teacher and teacher is None:
        raise ValueError(f"{type(method).__name__} needs a teacher")
    if schedule.selection == "validation" and not len(data.validation.labels):
        raise ValueError(f"selection: {data.name} holds no validation examples out; choose last")
    where = resolve_device(device)
    placed(student, where)
    if schedule.batch_norm == "synchronised":
        distributed.synchronise(student)
    shard = Shard(distributed.rank(), distributed.world_size())
    feed = Feed(data, where, images=schedule.images, shard=shard)
    state = begin(student, method, data, schedule, seed=seed, device=where)
    if resume is not None:
        state.restore(*resume)
    saver = _Saver(save, save_seconds)
    inputs_repeat = not schedule.augment and computed_in(schedule, where) == "float32"
    prepared = prepared_teacher(teacher, feed, schedule.batch_size, inputs_repeat=inputs_repeat)
    with computing(where, single_thread=data.single_thread), restored_generators(where), prepared as teacher:
        while state.epoch < schedule.epochs:
            started = time.perf_counter()
            row = _epoch(state, teacher, feed, schedule, seed, saver)
            state.epoch += 1
            _select(state, data, schedule, row)
            row["seconds"] = time.perf_counter() - started
            state.history.rows.append(row)
            saver(state)
            for callback in callbacks:
                callback(state)
    if state.best:
        student.load_state_dict(state.best)
    student.eval()
    return state.history


class _Saver:
    """Calls ``save`` and remembers when it last did."""

    def __init__(self, save: Callback | None, seconds: float):
        self.save, self.seconds, self.last = save, seconds, time.monotonic()

    def is_due(self) -> bool:
        return self.save is not None and time.monotonic() - self.last >= self.seconds

    def __call__(self, state: TrainingState) -> None:
        if self.save is not None:
            self.save(state)
        self.last = time.monotonic()


def _epoch(
    state: TrainingState, teacher: nn.Module | None, feed: Feed, schedule: Schedule, seed: int, saver: _Saver
) -> dict[str, float]:
    """One pass over the fitting part, or the rest of a pass; returns the mean of each term."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + state.epoch)
    _seed(state, feed, seed)
    steps, processes = feed.steps(schedule.batch_size), feed.shard.size
    sums = {name: torch.tensor(value, dtype=torch.float64) for name, value in state.sums.items()}
    student, teacher = _in_precision(state.student, feed, schedule), teacher and _in_precision(teacher, feed, schedule)
    _train_mode(state.student, schedule)
    batches = feed.epoch(
        schedule.batch_size, generator, schedule.augment, skip=state.step, state=state.random.get("data")
    )
    on_gpu = feed.device.type == "cuda"
    for step, (x, y) in enumerate(batches, state.step):
        for group in state.optimizer.param_groups:
            group["lr"] = schedule.rate(state.epoch, (step + 0.5) / steps)
        whole = min(schedule.batch_size, feed.size - step * schedule.batch_size)
        where = f"at epoch {state.epoch + 1}, step {step + 1} of {steps}"
        try:
            options = {"share": len(y) * processes / whole, "check": not on_gpu}
            step_on = partial(_advance, student, teacher, state.criterion, state.optimizer, **options)
            terms = attempt(partial(step_on, x, y, schedule.clip_norm), feed.device)
            if terms is None:
                raise _out_of_memory(student, teacher, state, x, y)
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value.double() / steps
            saving = step + 1 < steps and saver.is_due()
            if on_gpu and (saving or (step + 1) % CHECK_EVERY == 0):
                check_finite(sums)
        except TrainingError as error:
            raise TrainingError(f"{error} {where}") from None
        if saving:
            state.step, state.random = step + 1, _random_states(generator, feed.device)
            state.sums = {name: value.item() for name, value in sums.items()}
            saver(state)
    check_finite(sums)
    distributed.average_statistics(state.student)
    state.step, state.sums, state.random = 0, {}, {}
    means = {name: distributed.summed(value).item() / processes for name, value in sums.items()}
    return {"epoch": state.epoch + 1, "learning_rate": schedule.rate(state.epoch, 0.5)} | means


@cache
def _say_once(text: str) -> None:
    log.warning(text)


def computed_in(schedule: Schedule, device: torch.device) -> str:
    """The precision of a training's steps: the schedule's, or float32 where the device has no bf16 arithmetic."""
    return schedule.precision if has_bfloat16(device) else "float32"


def _in_precision(net: nn.Module, feed: Feed, schedule: Schedule) -> nn.Module:
    precision = computed_in(schedule, feed.device)
    if precision != schedule.precision:
        _say_once(f"this processor has no fast {schedule.precision}; the training computes in {precision}")
    return net if precision == "float32" else Autocast(net, feed.device)


def _train_mode(student: nn.Module, schedule: Schedule) -> None:
    student.train()
    if schedule.trainable == "head":
        # The body is a fixed feature extractor: its BatchNorm statistics stay as well.
        student.eval()
        for name in ("head", "head_dropout"):
            student.get_submodule(name).train()


def _random_states(generator: torch.Generator, device: torch.device) -> dict[str, Tensor]:
    states = {"data": generator.get_state(), "cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _seed(state: TrainingState, feed: Feed, seed: int) -> None:
    """Seed the generators of dropout and random starts, or restore their states inside an epoch.

    Each process has its own generators, and only rank 0 saves states, so the other ranks are seeded anew.
    """
    at = seed * 1_000_003 + state.epoch
    if not feed.shard.rank:
        torch.manual_seed(at)
        if state.random:
            torch.set_rng_state(state.random["cpu"])
        if "cuda" in state.random and feed.device.type == "cuda":
            torch.cuda.set_rng_state(state.random["cuda"], feed.device)
    else:
        torch.manual_seed((at * 1009 + state.step) * 1009 + feed.shard.rank)


def _out_of_memory(
    student: nn.Module, teacher: nn.Module | None, state: TrainingState, x: Tensor, y: Tensor
) -> TrainingError:
    """The error of a step that ran out of memory; it names a batch size that fits."""
    state.optimizer.zero_grad(set_to_none=True)
    processes, total = distributed.world_size(), len(y) * distributed.world_size()

    def gradients(n: int) -> None:
        terms = state.criterion(student, teacher, x[:n], y[:n])
        torch.autograd.grad(torch.stack(list(terms.values())).sum(), _parameters(state.optimizer), allow_unused=True)

    # Several processes would have to try together: half is only likely to fit.
    fits = len(y) // 2 if processes > 1 else largest_that_fits(gradients, len(y), x.device)
    may = "may fit" if processes > 1 else "fits"
    advice = f"batch_size {fits * processes} {may}" if fits else "even 1 does not fit"
    return TrainingError(
        f"out of memory with {total} images per step on {x.device}: {advice}; the saved state is kept,"
    )


def _select(state: TrainingState, data: Data, schedule: Schedule, row: dict[str, float]) -> None:
    """Score the finished epoch, and keep its weights if it is the best so far."""
    score = _score(state.student, data, schedule, row)
    if score >= state.best_score:
        state.best_score, state.history.selected_epoch = score, state.epoch
        if schedule.selection != "last":
            state.best = {k: v.detach().clone() for k, v in state.student.state_dict().items()}


def _score(student: nn.Module, data: Data, schedule: Schedule, row: dict[str, float]) -> float:
    """Write the validation accuracies into the row and return the score; for ``last`` the score is the epoch."""
    validation = Split(*(part[: schedule.images or None] for part in data.validation))
    if len(validation.labels):
        row["validation_clean"] = _shared_accuracy(student, validation)
    if schedule.selection == "last":
        return row["epoch"]
    if schedule.selection == "validation" and not schedule.selection_epsilon:
        return row["validation_clean"]
    attack = PGD(schedule.selection_epsilon, schedule.selection_epsilon / 10, 20)
    part = validation if schedule.selection == "validation" else data.test
    row["selection_robust"] = _shared_accuracy(student, part, attack)
    return row["selection_robust"]


def _shared_accuracy(student: nn.Module, part: Split, attack: Attack | None = None) -> float:
    """Accuracy in per cent. Several processes split the images; their random starts differ."""
    device = next(student.parameters()).device
    rank, processes = distributed.rank(), distributed.world_size()
    if processes == 1:
        return accuracy(student, *_on(part, device), attack=attack).percent
    share = -(-len(part.labels) // processes)
    mine = Split(*(values[rank * share : (rank + 1) * share] for values in part))
    correct = torch.zeros((), device=device)
    if len(mine.labels):
        correct += accuracy(student, *_on(mine, device), attack=attack).percent * len(mine.labels) / 100
    return round(distributed.summed(correct).item()) * 100 / len(part.labels)


def _on(split: Split, device: torch.device) -> Split:
    return Split(split.images.to(device), split.labels.to(device))
