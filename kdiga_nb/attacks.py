"""ℓ∞ attacks: FGSM and PGD are ours, AutoAttack is an adapter to its authors' library.

An attack is loss × step × start × projection. PGD on the cross-entropy is

    x_adv = project(x + uniform(-epsilon, epsilon))
    repeat steps times:
        x_adv = project(x_adv + step_size * sign(gradient of the loss at x_adv))

with ``project`` the clamp to the ball of radius epsilon round x and to [0, 1] (Equation 19), and FGSM is its first full
step without the random start. Both come from ``SignAscent``; another loss is another ``objective`` handed to
``perturb``, as TRADES does.

Every attack guarantees: shape and dtype are kept, the result is detached and lies inside [0, 1], and
‖x_adv − x‖∞ ≤ epsilon holds exactly, not up to rounding. The model's mode, buffers, parameters and ``.grad`` are as
before the call. Images outside [0, 1] and labels out of range are refused with a ValueError.

epsilon and step_size are in the pixel unit of [0, 1].
"""

import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdiga_nb.losses import cross_entropy
from kdiga_nb.memory import free_memory, is_out_of_memory, release, trim

log = logging.getLogger("kdiga")
Objective = Callable[[Tensor], Tensor]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without parameter gradients inside the block; every module and flag as it was afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def verdicts() -> Iterator[None]:
    """Forward passes inside the block decide what counts as robust: without gradients, and on a GPU in full fp32.

    Attacks search in TF32 there, where training does, and what they find is judged here.
    """
    precision, tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = tf32


Results = tuple[Tensor, ...]


def batch_that_fits(models: Sequence[nn.Module], x: Tensor, wanted: int, *, copies: int = 1) -> int:
    """How many of ``wanted`` images (B, C, H, W) may be in one batch while the nets' input gradients are taken.

    What autograd keeps for an image is counted on the spot, and may take a third of the free memory: the gradients on
    the way back take about as much again, and other processes want some. On a CPU this has to be known beforehand: a
    process that takes too much is ended by the system without a word.

    Args:
        copies: how often an image enters the batch.
    """
    wanted = min(wanted, len(x))
    if wanted <= 1:
        return 1
    kept = _kept_for_backward(models, x[:2]) - _kept_for_backward(models, x[:1])  # without weights, which come once
    if not kept:
        return wanted
    fitting = free_memory(x.device) // (3 * copies * kept)
    if fitting < wanted:
        trim()
        fitting = free_memory(x.device) // (3 * copies * kept)
    if fitting >= wanted:
        return wanted
    log.info("memory holds batches of %d images (of %d)", max(fitting, 1), wanted)
    return max(fitting, 1)


def _kept_for_backward(models: Sequence[nn.Module], x: Tensor) -> int:
    """Bytes that autograd keeps from the nets' forward passes on x until the way back."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    devices = [x.device] if x.device.type == "cuda" else []
    with ExitStack() as stack, torch.random.fork_rng(devices), torch.enable_grad():
        for model in models:
            stack.enter_context(frozen(model))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            graphs = [model(x.detach().clone().requires_grad_()) for model in models]
    del graphs  # alive until here, so that no address stands for two tensors
    return sum(kept.values())


def in_batches(
    work: Callable[..., Results],
    tensors: tuple[Tensor, ...],
    batch_size: int,
    *,
    models: Sequence[nn.Module] = (),
    copies: int = 1,
    generator: torch.Generator | None = None,
) -> Results:
    """``work`` on tensors (B, …) batch by batch, its results (B, …) joined.

    Batches are no larger than what ``batch_that_fits`` says of ``models``. One that does not fit all the same is
    halved, and so are those after it, down to a single image; ``generator`` is then set back to where the batch began.
    """
    if models:
        batch_size = batch_that_fits(models, tensors[0], batch_size, copies=copies)
    parts: list[Results] = []
    done, total = 0, len(tensors[0])
    while not parts or done < total:
        before = None if generator is None else generator.get_state()
        failed = False
        try:
            parts.append(work(*(tensor[done : done + batch_size] for tensor in tensors)))
        except (RuntimeError, MemoryError) as error:
            if batch_size == 1 or not is_out_of_memory(error):
                raise
            failed = True
        if not failed:
            done += batch_size
            continue
        # Outside the handler, so that what the failed batch held is free.
        batch_size = (min(batch_size, total - done) + 1) // 2
        log.warning("out of memory: going on with batches of %d images", batch_size)
        release(tensors[0].device)
        if generator is not None and before is not None:
            generator.set_state(before)
    return tuple(torch.cat(results) for results in zip(*parts, strict=True))


def check_inputs(model: nn.Module, x: Tensor, y: Tensor) -> int:
    """Refuse what would make a robustness number wrong in silence; gives the model's number of classes.

    Raises:
        ValueError: images that are not float (B, C, H, W) in [0, 1], or labels that are not (B,) classes of the model.
    """
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"images must be a float tensor (B, C, H, W), got {x.dtype} of shape {tuple(x.shape)}")
    if y.shape != x.shape[:1] or y.is_floating_point():
        raise ValueError(f"labels must be integers of shape ({len(x)},), got {y.dtype} of shape {tuple(y.shape)}")
    if not len(x):
        raise ValueError("there are no images")
    low, high = x.min().item(), x.max().item()
    if not (low >= 0 and high <= 1):
        raise ValueError(f"images must lie in [0, 1], got values from {low:g} to {high:g}")
    with frozen(model), torch.no_grad():
        classes = model(x[:1]).shape[1]
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= classes:
        raise ValueError(f"labels must lie in 0 … {classes - 1}, got values from {low} to {high}")
    return classes


def ball(x: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Lower and upper bounds of the images within epsilon of x and inside [0, 1].

    x + epsilon is rounded to x's precision, upwards half of the time; such bounds are taken one representable number
    back, so that the radius is never exceeded.
    """
    exact = x.double()
    upper, lower = (exact + epsilon).to(x.dtype), (exact - epsilon).to(x.dtype)
    upper = torch.where(upper.double() - exact > epsilon, torch.nextafter(upper, x), upper)
    lower = torch.where(exact - lower.double() > epsilon, torch.nextafter(lower, x), lower)
    return lower.clamp_(min=0), upper.clamp_(max=1)


def _check_epsilon(epsilon: float) -> None:
    if not 0 <= epsilon <= 1:
        raise ValueError(f"epsilon must be in [0, 1], got {epsilon}")


class SignAscent:
    """What FGSM and PGD share: start, step and projection."""

    epsilon: float
    steps: int
    random_start: bool
    restarts: int

    @property
    def length(self) -> float:
        """Of one step, in pixel units."""
        return getattr(self, "step_size", self.epsilon)

    def start(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Where the ascent begins: x, or a uniform draw from its ball."""
        if not self.random_start:
            return x.detach().clone()
        lower, upper = ball(x.detach(), self.epsilon)
        noise = torch.empty_like(x).uniform_(-self.epsilon, self.epsilon, generator=generator)
        return (x.detach() + noise).clamp_(lower, upper)

    def step(self, x_adv: Tensor, gradient: Tensor, x: Tensor) -> Tensor:
        """One projected step from x_adv along the sign of a gradient."""
        return (x_adv + self.length * gradient.sign()).clamp_(*ball(x, self.epsilon)).detach()

    def perturb(self, objective: Objective, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Raise ``objective``, images (B, C, H, W) -> (B,), inside the ball round x: one start, the last iterate."""
        x = x.detach()
        lower, upper = ball(x, self.epsilon)
        x_adv = self.start(x, generator=generator)
        with torch.enable_grad():
            for _ in range(self.steps):
                x_adv.requires_grad_()
                (gradient,) = torch.autograd.grad(objective(x_adv).sum(), x_adv)
                x_adv = x_adv.detach().add_(gradient.sign_(), alpha=self.length).clamp_(lower, upper)
        return x_adv.detach()

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Adversarial images (B, C, H, W) for the cross-entropy of ``model``.

        With several restarts, each further one is spent on the images that are still classified correctly, and the
        image of highest loss is kept of those that never are misclassified.
        """
        check_inputs(model, x, y)
        with frozen(model):
            best = self.perturb(lambda images: cross_entropy(model(images), y), x, generator=generator)
            for _ in range(self.restarts - 1):
                with verdicts():
                    logits = model(best)
                left = (logits.argmax(1) == y).nonzero().squeeze(1)
                if not len(left):
                    break
                labels = y[left]
                again = self.perturb(
                    lambda images, k=labels: cross_entropy(model(images), k), x[left], generator=generator
                )
                with verdicts():
                    fresh = model(again)
                    fooled = fresh.argmax(1) != labels
                    higher = cross_entropy(fresh, labels) > cross_entropy(logits[left], labels)
                chosen = fooled | higher
                best[left[chosen]] = again[chosen]
        return best


@dataclass(frozen=True)
class PGD(SignAscent):
    """Projected gradient ascent on the cross-entropy under ℓ∞ (Equation 19).

    ``PGD(8/255, 0.8/255, 20)`` is the paper's evaluation, ``PGD(8/255, 1.6/255, 10)`` the authors' training attack.
    """

    epsilon: float
    step_size: float
    steps: int
    random_start: bool = True
    restarts: int = 1

    def __post_init__(self) -> None:
        _check_epsilon(self.epsilon)
        if not self.step_size >= 0:
            raise ValueError(f"step_size must not be negative, got {self.step_size}")
        if self.steps < 1 or self.restarts < 1:
            raise ValueError(f"steps and restarts must be at least 1, got {self.steps} and {self.restarts}")


@dataclass(frozen=True)
class FGSM(SignAscent):
    """The fast gradient sign method: one step as long as the radius, from the image itself."""

    epsilon: float
    steps: int = field(default=1, init=False)
    random_start: bool = field(default=False, init=False)
    restarts: int = field(default=1, init=False)

    def __post_init__(self) -> None:
        _check_epsilon(self.epsilon)


@dataclass
class AutoAttackReport:
    """What AutoAttack found: who is still classified correctly after each member, and what made it suspicious.

    ``survivors`` maps "clean" and then each member, in the order they ran, to a (B,) mask; a member only ever sees the
    survivors of those before it. ``flags`` are the library's warnings, and ours by the same rules.
    """

    survivors: dict[str, Tensor]
    flags: list[str] = field(default_factory=list)

    @property
    def robust(self) -> Tensor:
        """(B,) mask of the images that no member misclassified."""
        return list(self.survivors.values())[-1]


MEMBERS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "rand": ("apgd-ce", "apgd-dlr"),
    # Parts of the standard ensemble: its two APGDs, which find nearly all that it finds, and its black-box member.
    "apgd": ("apgd-ce", "apgd-t"),
    "square": ("square",),
}
# Members whose loss compares the largest logits, and how many.
LOGITS_COMPARED = {"apgd-t": 4, "apgd-dlr": 3}


@dataclass(frozen=True)
class AutoAttack:
    """Croce & Hein's parameter-free ensemble, run by the pyautoattack library.

    ``version`` is "standard" or "rand", or a part of the standard ensemble: "apgd" or "square" (see ``MEMBERS``).
    """

    epsilon: float
    version: str = "standard"
    seed: int = 0
    batch_size: int = 500

    def __post_init__(self) -> None:
        _check_epsilon(self.epsilon)
        if self.version not in MEMBERS:
            raise ValueError(f"version must be one of {', '.join(MEMBERS)}, got {self.version!r}")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Adversarial images; an image that resists every member is returned as it is.

        ``generator`` is ignored: the library seeds itself from ``seed``, and is kept from moving the global generators.
        """
        x_adv = x.detach().clone()
        self.evaluate(model, x, y, found=x_adv)
        return x_adv

    def evaluate(
        self, model: nn.Module, x: Tensor, y: Tensor, *, state: Path | None = None, found: Tensor | None = None
    ) -> AutoAttackReport:
        """Run the members one after the other, each on the survivors of those before it.

        Args:
            state: a JSON file written after each member; an evaluation that finds one of the same net, images and
                attack goes on behind it. The caller removes it when the result is stored elsewhere.
            found: images (B, C, H, W) that are overwritten where a member succeeds.

        Raises:
            ValueError: inputs as in ``check_inputs``, or a net of fewer classes than a member's loss compares logits.
        """
        classes = check_inputs(model, x, y)
        x = x.detach()
        for member in MEMBERS[self.version]:
            if classes < (fewest := LOGITS_COMPARED.get(member, 0)):
                raise ValueError(f"AutoAttack {self.version}: {member} compares {fewest} logits, the net has {classes}")
        identity = "" if state is None else _identity(self, model, x, y)
        report = _restore(state, identity, x.device)
        with frozen(model):
            if not report.survivors:
                report.survivors["clean"] = self._right(model, x, y)
            for member in MEMBERS[self.version]:
                if member in report.survivors:
                    continue
                survivors = report.robust.clone()
                index = survivors.nonzero().squeeze(1)
                if len(index):
                    adversarial, flags = self._run(member, model, x[index], y[index])
                    fooled = ~self._right(model, adversarial, y[index])
                    survivors[index[fooled]] = False
                    if found is not None:
                        found[index[fooled]] = adversarial[fooled]
                    report.flags += [flag for flag in dict.fromkeys(flags) if flag not in report.flags]
                report.survivors[member] = survivors
                _save(state, identity, report)
        _flag_square(report)
        return report

    def _right(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """(B,) mask of the images that are classified correctly."""
        with verdicts():
            return in_batches(lambda x, y: (model(x).argmax(1) == y,), (x, y), self.batch_size, models=[model])[0]

    def _run(self, member: str, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, list[str]]:
        """``_attack`` by the largest batches up to ``batch_size`` that fit."""
        flags: list[str] = []

        def work(x: Tensor, y: Tensor) -> tuple[Tensor]:
            adversarial, found = self._attack(member, model, x, y)
            flags.extend(found)
            return (adversarial,)

        return in_batches(work, (x, y), self.batch_size, models=[model])[0], flags

    def _attack(self, member: str, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, list[str]]:
        """One member through the library, its side effects contained: tracer, generators and logger as before."""
        import pyautoattack
        from pyautoattack import checks

        # The check for dynamic defences counts in a module-wide table that the library never clears.
        checks.funcs.update(dict.fromkeys(checks.funcs, 0))
        flags = _Flags()
        logger = logging.getLogger("auto-attack")
        tracer = sys.gettrace()
        devices = [x.device] if x.device.type == "cuda" else []
        propagate, logger.propagate = logger.propagate, False
        logger.addHandler(flags)
        try:
            with torch.random.fork_rng(devices):
                attacks: Any = [member]
                library = pyautoattack.AutoAttack(
                    model, attacks=attacks, version="custom", eps=self.epsilon, seed=self.seed, device=x.device
                )
                with torch.no_grad():
                    targets = min(9, model(x[:1]).shape[1] - 1)
                library.apgd_targeted.n_target_classes = library.fab.n_target_classes = targets
                # As the library's own "standard" and "rand" set it; its custom version would restart five times.
                library.apgd.n_restarts = 1
                if self.version == "rand":
                    library.apgd.eot_iter = 20
                    library.version = "rand"
                adversarial, _ = library.run_standard_evaluation(x, y, batch_size=len(x))
        finally:
            sys.settrace(tracer)
            logger.removeHandler(flags)
            logger.propagate = propagate
        lower, upper = ball(x, self.epsilon)
        return adversarial.detach().clamp(lower, upper), flags.messages


class _Flags(logging.Handler):
    """Collects the library's warnings, cut to their first sentence (the rest points at a file we do not have)."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage().split(" See ")[0])


def _flag_square(report: AutoAttackReport, threshold: float = 0.002) -> None:
    """AutoAttack's rule: a black-box attack that finds what white-box ones missed points at masked gradients."""
    if not {"fab-t", "square"} <= set(report.survivors):
        return
    before = report.survivors["fab-t"].double().mean().item()
    after = report.survivors["square"].double().mean().item()
    if before - after > threshold:
        flag = f"Square lowered the robust accuracy by {100 * (before - after):.1f} points below the white-box members"
        if flag not in report.flags:
            report.flags.append(flag)


def _identity(attack: AutoAttack, model: nn.Module, x: Tensor, y: Tensor) -> str:
    """A hash of what an evaluation is of."""
    digest = hashlib.sha256(repr(attack).encode())
    for tensor in (x, y, *model.state_dict().values()):
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _save(state: Path | None, identity: str, report: AutoAttackReport) -> None:
    if state is None:
        return
    survivors = {k: v.int().tolist() for k, v in report.survivors.items()}
    partial = state.with_suffix(".partial")
    partial.write_text(json.dumps({"identity": identity, "survivors": survivors, "flags": report.flags}))
    partial.replace(state)


def _restore(state: Path | None, identity: str, device: torch.device) -> AutoAttackReport:
    if state is None or not state.exists():
        return AutoAttackReport({})
    record = json.loads(state.read_text())
    if record.get("identity") != identity:
        raise ValueError(f"{state.name} is the state of another evaluation (net, images or attack); remove it")
    survivors = {k: torch.tensor(v, dtype=torch.bool, device=device) for k, v in record["survivors"].items()}
    return AutoAttackReport(survivors, record["flags"])


Attack = PGD | FGSM | AutoAttack
ATTACKS: dict[str, type[PGD] | type[FGSM] | type[AutoAttack]] = {"pgd": PGD, "fgsm": FGSM, "autoattack": AutoAttack}
