"""``Schedule``, ``train_step`` and ``train``: one loop for every method.

Each epoch draws its data order, augmentation, dropout and random starts from generators seeded by (seed, epoch), so an
epoch is a function of the state before it: a training resumed from its last finished epoch repeats, bit for bit, what
the uninterrupted one does on the same machine.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kdiga_nb import distributed
from kdiga_nb.attacks import PGD, frozen
from kdiga_nb.data import Data, Split, batches
from kdiga_nb.methods import Method
from kdiga_nb.metrics import accuracy
from kdiga_nb.models import head_parameters

OPTIMIZERS = ("sgd", "adamw")
POLICIES = ("multistep", "one_cycle", "constant")
SELECTIONS = ("last", "validation", "best_on_test")
TRAINABLE = ("all", "head")


class TrainingError(RuntimeError):
    """A training that cannot go on, with the reason."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a net is trained, and which of its epochs is kept.

    Attributes:
        epochs, batch_size: passes over the data; images a step.
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
        selection: keep the ``last`` epoch, or the one of best robust accuracy on ``validation`` (PGD-20 of radius
            ``selection_epsilon``), or, as the authors did, ``best_on_test``.
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

    def __post_init__(self) -> None:
        for name, allowed in {
            "optimizer": OPTIMIZERS,
            "policy": POLICIES,
            "selection": SELECTIONS,
            "trainable": TRAINABLE,
        }.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(f"epochs and batch_size must be at least 1, got {self.epochs} and {self.batch_size}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        for name in ("decay", "momentum", "weight_decay", "clip_norm"):
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
    """One row an epoch: epoch (from 1), learning_rate, each term's mean over the epoch, validation figures, seconds."""

    rows: list[dict[str, float]] = field(default_factory=list)
    selected_epoch: int = 0


@dataclass
class TrainingState:
    """A training between two epochs: everything the rest of it depends on."""

    student: nn.Module
    criterion: Method | nn.Module
    optimizer: torch.optim.Optimizer
    history: History = field(default_factory=History)
    best: dict[str, Tensor] = field(default_factory=dict)
    best_score: float = -1.0
    epoch: int = 0
    epochs: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the state under readable names, copied."""
        named = {f"student.{k}": v for k, v in self.student.state_dict().items()}
        named |= {f"best.{k}": v for k, v in self.best.items()}
        if isinstance(self.criterion, nn.Module):
            named |= {f"criterion.{k}": v for k, v in self.criterion.state_dict().items()}
        for index, parameter in enumerate(self.optimizer.param_groups[0]["params"]):
            named |= {f"optimizer.{index}.{k}": v for k, v in self.optimizer.state[parameter].items() if v is not None}
        return {k: v.detach().clone().contiguous() for k, v in named.items()}

    def record(self) -> dict[str, Any]:
        """The rest of the state, as JSON takes it."""
        return {
            "epoch": self.epoch,
            "best_score": self.best_score,
            "selected_epoch": self.history.selected_epoch,
            "rows": [dict(row) for row in self.history.rows],
        }

    def restore(self, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        """Take over a state saved by ``tensors`` and ``record``."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        self.student.load_state_dict(part("student."))
        if isinstance(self.criterion, nn.Module):
            self.criterion.load_state_dict(part("criterion."))
        parameters = self.optimizer.param_groups[0]["params"]
        for name, value in part("optimizer.").items():
            index, _, slot = name.partition(".")
            parameter = parameters[int(index)]
            self.optimizer.state[parameter][slot] = value.to(parameter.device, copy=True)
        self.best = part("best.")
        self.best_score, self.epoch = record["best_score"], record["epoch"]
        self.history = History(list(record["rows"]), record["selected_epoch"])


Callback = Callable[[TrainingState], None]


def resolve_device(device: str | torch.device | None = None) -> torch.device:
    """The device of that name; ``None`` or "auto" is the GPU where there is one, else the CPU.

    Raises:
        ValueError: a device that is not there.
    """
    if not isinstance(device, str | torch.device | None):
        raise ValueError(f"device must be a name, got {device!r}")
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {str(device)!r} is not there: {reason}; use cpu, cuda or auto") from error
    return resolved


@contextmanager
def computing(image_shape: tuple[int, int, int]) -> Iterator[None]:
    """One thread for small images: splitting microseconds of work costs more than it gives, and moves the last bits."""
    threads = torch.get_num_threads()
    small = image_shape[1] * image_shape[2] <= 256
    try:
        if small:
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)


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
    """One step on images (B, C, H, W) and labels (B,): the value of each weighted term, in nats.

    Raises:
        TrainingError: a term is not finite; the weights are as before the step.
    """
    terms = method(student, teacher, x, y)
    values = {name: value.item() for name, value in terms.items()}
    for name, value in values.items():
        if not math.isfinite(value):
            raise TrainingError(f"the term {name} is {value}")
    optimizer.zero_grad(set_to_none=True)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    # Naming the inputs keeps the backward pass from also computing the gradient of every term for the pixels.
    torch.stack(list(terms.values())).sum().backward(inputs=parameters)
    distributed.average_gradients(parameters)
    if clip_norm:
        nn.utils.clip_grad_norm_(parameters, clip_norm)
    optimizer.step()
    return values


def begin(
    student: nn.Module, method: Method, data: Data, schedule: Schedule, *, seed: int, device: torch.device
) -> TrainingState:
    """The state before the first epoch."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        criterion = method.bind(data.image_shape, device)
    parameters = head_parameters(student) if schedule.trainable == "head" else list(student.parameters())
    if isinstance(criterion, nn.Module):
        parameters = parameters + list(criterion.parameters())
    rate, decay = schedule.learning_rate, schedule.weight_decay
    if schedule.optimizer == "adamw":
        optimizer = torch.optim.AdamW(parameters, rate, weight_decay=decay, foreach=True)
    else:
        optimizer = torch.optim.SGD(parameters, rate, momentum=schedule.momentum, weight_decay=decay, foreach=True)
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
) -> History:
    """Train ``student`` in place; it ends in eval mode with the weights of the selected epoch.

    Args:
        teacher: used frozen, in eval mode.
        callbacks: called after each epoch with the ``TrainingState``; saving it there is what makes a kill cost one
            epoch.
        resume: ``(state.tensors(), state.record())`` of an earlier epoch of the same training.

    Raises:
        ValueError: a method that needs a teacher has none.
        TrainingError: a term is not finite (names term, epoch and step).
    """
    if method.needs_teacher and teacher is None:
        raise ValueError(f"{type(method).__name__} needs a teacher")
    where = resolve_device(device)
    student.to(where)
    fitting = Split(*(part.to(where) for part in data.fitting))
    state = begin(student, method, data, schedule, seed=seed, device=where)
    if resume is not None:
        state.restore(*resume)
    with computing(data.image_shape), torch.random.fork_rng(), _still(teacher, where):
        while state.epoch < schedule.epochs:
            started = time.perf_counter()
            row = _epoch(state, teacher, data, fitting, schedule, seed)
            state.epoch += 1
            score = _score(student, data, schedule, row)
            if score >= state.best_score:
                state.best_score, state.history.selected_epoch = score, state.epoch
                if schedule.selection != "last":
                    state.best = {k: v.detach().clone() for k, v in student.state_dict().items()}
            row["seconds"] = time.perf_counter() - started
            state.history.rows.append(row)
            for callback in callbacks:
                callback(state)
    if state.best:
        student.load_state_dict(state.best)
    student.eval()
    return state.history


@contextmanager
def _still(teacher: nn.Module | None, device: torch.device) -> Iterator[None]:
    """The teacher on the device, in eval mode and without parameter gradients, for the length of a training."""
    if teacher is None:
        yield
        return
    with frozen(teacher.to(device)):
        yield


def _epoch(
    state: TrainingState, teacher: nn.Module | None, data: Data, fitting: Split, schedule: Schedule, seed: int
) -> dict[str, float]:
    """One pass over the fitting part: the means of the terms."""
    torch.manual_seed(seed * 1_000_003 + state.epoch)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + state.epoch)
    steps = math.ceil(len(fitting.labels) / schedule.batch_size)
    sums: dict[str, float] = {}
    state.student.train()
    if schedule.trainable == "head":
        # The body is a fixed feature extractor: its BatchNorm statistics stay as well.
        state.student.eval()
        for name in ("head", "head_dropout"):
            state.student.get_submodule(name).train()
    for step, (x, y) in enumerate(batches(fitting, schedule.batch_size, generator)):
        rate = schedule.rate(state.epoch, (step + 0.5) / steps)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        if schedule.augment:
            x = data.augmentation(x, generator)
        try:
            values = train_step(
                state.student, teacher, state.criterion, state.optimizer, x, y, clip_norm=schedule.clip_norm
            )
        except TrainingError as error:
            raise TrainingError(f"{error} at epoch {state.epoch + 1}, step {step + 1} of {steps}") from None
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value / steps
    return {"epoch": state.epoch + 1, "learning_rate": schedule.rate(state.epoch, 0.5)} | sums


def _score(student: nn.Module, data: Data, schedule: Schedule, row: dict[str, float]) -> float:
    """Validation accuracy goes into the row; the score, by which epochs are selected, rises for ``last``."""
    device = next(student.parameters()).device
    if len(data.validation.labels):
        row["validation_clean"] = accuracy(student, *_on(data.validation, device)).percent
    if schedule.selection == "last":
        return row["epoch"]
    attack = PGD(schedule.selection_epsilon, schedule.selection_epsilon / 10, 20)
    part = data.validation if schedule.selection == "validation" else data.test
    row["selection_robust"] = accuracy(student, *_on(part, device), attack=attack).percent
    return row["selection_robust"]


def _on(split: Split, device: torch.device) -> Split:
    return Split(split.images.to(device), split.labels.to(device))
