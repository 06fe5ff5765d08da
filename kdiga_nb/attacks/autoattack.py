"""AutoAttack (Croce & Hein 2020): an adapter to the pyautoattack library, with faster members of our own."""

import json
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdiga_nb.attacks.apgd import APGD
from kdiga_nb.attacks.checks import _check_epsilon, check_inputs
from kdiga_nb.attacks.fab import FAB
from kdiga_nb.attacks.gradient import ball
from kdiga_nb.attacks.square import Square
from kdiga_nb.numerics.batches import in_batches
from kdiga_nb.numerics.files import content_hash, replace_file
from kdiga_nb.numerics.scopes import frozen, full_precision, restored_generators


@dataclass
class AutoAttackReport:
    """AutoAttack's result: the images still classified correctly after each member, and warnings.

    ``survivors`` maps "clean", then each member in the order they ran, to a (B,) mask. Each member attacks the
    survivors of the members before it. ``flags`` are the library's warnings and the kit's own by the same rules.
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
TARGETS = 9  # wrong classes that APGD-T and FAB-T aim at, or as many as there are
# Members whose loss compares the largest logits, and how many.
LOGITS_COMPARED = {"apgd-t": 4, "apgd-dlr": 3}


@dataclass(frozen=True)
class AutoAttack:
    """Croce & Hein's parameter-free ensemble, run by the pyautoattack library.

    The members are the kit's own where the net is deterministic and ``version`` is not "rand", else the library's.

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
        """Adversarial images; an image that no member misclassifies is returned unchanged.

        ``generator`` is ignored: the library is seeded by ``seed``, and the global generators are restored.
        """
        x_adv = x.detach().clone()
        self.evaluate(model, x, y, found=x_adv)
        return x_adv

    def evaluate(
        self, model: nn.Module, x: Tensor, y: Tensor, *, state: Path | None = None, found: Tensor | None = None
    ) -> AutoAttackReport:
        """Run the members in order, each on the survivors of the members before it.

        Args:
            state: a JSON file written after each member. The evaluation resumes from this file if model, data and
                attack match; the caller deletes it.
            found: images (B, C, H, W), overwritten where a member succeeds.

        Raises:
            ValueError: inputs as in ``check_inputs``, or a net with fewer classes than a member's loss compares.
        """
        classes = check_inputs(model, x, y)
        x = x.detach()
        for member in MEMBERS[self.version]:
            if classes < (fewest := LOGITS_COMPARED.get(member, 0)):
                raise ValueError(f"AutoAttack {self.version}: {member} compares {fewest} logits, the net has {classes}")
        identity = "" if state is None else _identity(self, model, x, y)
        report = _restore(state, identity, x.device)
        # The library would take an image that is wrong in TF32 only as found, and attack it no further.
        with frozen(model), full_precision():
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
        with torch.no_grad():
            return in_batches(lambda x, y: (model(x).argmax(1) == y,), (x, y), self.batch_size, models=[model])[0]

    def _run(self, member: str, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, list[str]]:
        """``_attack`` in batches that fit into memory, of at most ``batch_size``."""
        flags: list[str] = []

        def work(x: Tensor, y: Tensor) -> tuple[Tensor]:
            adversarial, found = self._attack(member, model, x, y)
            flags.extend(found)
            return (adversarial,)

        copies = TARGETS if member in ("apgd-t", "fab-t") else 1  # several targets of an image enter one batch
        return in_batches(work, (x, y), self.batch_size, models=[model], copies=copies)[0], flags

    def _attack(self, member: str, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, list[str]]:
        """Run one member through the library; restore the tracer, the generators and the logger."""
        import pyautoattack
        from pyautoattack import checks

        # The check for dynamic defences counts in a module-wide table that the library never clears.
        checks.funcs.update(dict.fromkeys(checks.funcs, 0))
        flags = _Flags()
        logger = logging.getLogger("auto-attack")
        tracer = sys.gettrace()
        propagate, logger.propagate = logger.propagate, False
        logger.addHandler(flags)
        try:
            with restored_generators(x.device):
                attacks: Any = [member]
                library = pyautoattack.AutoAttack(
                    model, attacks=attacks, version="custom", eps=self.epsilon, seed=self.seed, device=x.device
                )
                with torch.no_grad():
                    targets = min(TARGETS, model(x[:1]).shape[1] - 1)
                library.apgd_targeted.n_target_classes = library.fab.n_target_classes = targets
                # As the library's own "standard" and "rand" set it; its custom version would restart five times.
                library.apgd.n_restarts = 1
                if self.version != "rand" and _repeats(model, x):
                    _use_own_members(library, self.epsilon, targets, logger)
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


def _use_own_members(library: Any, epsilon: float, targets: int, logger: logging.Logger) -> None:
    """Put the kit's members in the place of the library's, which are slower and find the same."""
    from pyautoattack.checks import check_zero_gradients

    predict = library.get_logits
    library.apgd = APGD(predict, epsilon)
    # The library's check cannot take the gradients of a channels-last net as they are.
    check = lambda gradient: check_zero_gradients(gradient.flatten(1), logger)  # noqa: E731
    library.apgd_targeted = APGD(predict, epsilon, targets, check)
    library.fab = FAB(predict, epsilon, targets)
    library.square = Square(predict, epsilon)


def _repeats(model: nn.Module, x: Tensor) -> bool:
    """Whether the net gives the same logits twice; the library's own members attack a net that does not."""
    with torch.no_grad():
        return torch.equal(model(x), model(x))


class _Flags(logging.Handler):
    """Collects the first sentence of the library's warnings (the rest names a file that the kit does not have)."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage().split(" See ")[0])


def _flag_square(report: AutoAttackReport, threshold: float = 0.002) -> None:
    """AutoAttack's rule: gradients may be masked if a black-box attack succeeds where white-box attacks fail."""
    if not {"fab-t", "square"} <= set(report.survivors):
        return
    before = report.survivors["fab-t"].double().mean().item()
    after = report.survivors["square"].double().mean().item()
    if before - after > threshold:
        flag = f"Square lowered the robust accuracy by {100 * (before - after):.1f} points below the white-box members"
        if flag not in report.flags:
            report.flags.append(flag)


def _identity(attack: AutoAttack, model: nn.Module, x: Tensor, y: Tensor) -> str:
    """A hash of everything that an evaluation depends on."""
    return content_hash([(repr(attack), x), *(("", tensor) for tensor in (y, *model.state_dict().values()))])


def _save(state: Path | None, identity: str, report: AutoAttackReport) -> None:
    if state is None:
        return
    survivors = {k: v.int().tolist() for k, v in report.survivors.items()}
    record = json.dumps({"identity": identity, "survivors": survivors, "flags": report.flags})
    replace_file(state, lambda partial: partial.write_text(record))


def _restore(state: Path | None, identity: str, device: torch.device) -> AutoAttackReport:
    if state is None or not state.exists():
        return AutoAttackReport({})
    record = json.loads(state.read_text())
    if record.get("identity") != identity:
        raise ValueError(f"{state.name} is the state of another evaluation (net, images or attack); remove it")
    survivors = {k: torch.tensor(v, dtype=torch.bool, device=device) for k, v in record["survivors"].items()}
    return AutoAttackReport(survivors, record["flags"])
