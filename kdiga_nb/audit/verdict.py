"""Is the robustness real? The checks that an adversarial evaluation owes its reader, and a verdict by named rules.

``plan(epsilon)`` lists the measures of an audit by name: more steps and restarts, other losses, other step sizes and
radii, attacks that see only scores (Square) or only labels (RayS), images made on another net, and what the input
gradients look like. Each is a ``Measure``, so the run store caches them one by one and an audit goes on where it was
cut off. ``verdict`` reads the results: every rule is a function of them that answers with a sentence if it rings, after
Carlini et al. 2019 (On Evaluating Adversarial Robustness), Athalye et al. 2018 (Obfuscated Gradients) and AutoAttack's
own flags. No single number says whether a net is robust.

``preconditions`` comes first: what makes any robustness number of a model meaningless (train mode, random output,
probabilities for logits, missing normalisation, another number of classes), by name.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Found = Mapping[str, Mapping[str, Any]]
WHITE_BOX = ("pgd", "pgd_more", "pgd_long", "margin", "dlr", "targeted", "scaled")
SLACK = 2.0  # points that chance alone may make of a comparison on the same images
TELLING = 5.0  # points by which an attack must be beaten before it is called too weak


def _left(found: Found, names: Sequence[str], n: int | None = None) -> tuple[float, int] | None:
    """Per cent of the first images that survive all the attacks named, and of how many; None if none was run."""
    masks = [str(found[name]["survivors"]) for name in names if name in found]
    if not masks:
        return None
    n = min([len(mask) for mask in masks] + ([n] if n else []))
    return 100 * sum(all(mask[i] == "1" for mask in masks) for i in range(n)) / n, n


def _beaten(found: Found, weaker: Sequence[str], stronger: Sequence[str], by: float) -> tuple[float, float, int] | None:
    """(accuracy under ``weaker``, under ``stronger`` as well, n) if the latter lowers it by more than ``by`` points."""
    after = _left(found, stronger)
    before = _left(found, weaker, after[1] if after else None)
    if before is None or after is None:
        return None
    together = _left(found, [*weaker, *stronger], before[1])
    assert together is not None
    return (before[0], together[0], together[1]) if before[0] - together[0] > by else None


def zero_gradients(found: Found) -> str | None:
    """Saturation: the loss is flat to the last bit, and a gradient attack on it stands still."""
    share = found["gradients"]["zero"] if "gradients" in found else 0.0
    return f"{share:.1f} % of the input gradients are exactly zero" if share > 1 else None


def saturated_loss(found: Found) -> str | None:
    """A margin or a smaller scale of the logits succeeds where the cross-entropy fails."""
    if beaten := _beaten(found, ["pgd"], ["margin", "dlr", "scaled"], TELLING):
        return f"margin, DLR and scaled logits lower {beaten[0]:.1f} % to {beaten[1]:.1f} % on the same images"
    return None


def uninformative_gradient(found: Found) -> str | None:
    """Shattered gradients: their sign raises the loss hardly more than random noise does."""
    if "gradients" not in found:
        return None
    loss, noise = found["gradients"]["loss"], found["gradients"]["noise_loss"]
    rise, by_chance = max(loss) - loss[0], noise - loss[0]
    if rise < 2 * max(by_chance, 0):
        return f"PGD raises the loss by {rise:.2g} nats, the best of ten random draws by {by_chance:.2g}"
    return None


def black_box_wins(found: Found) -> str | None:
    """Square or a hard-label attack finds what the white-box attacks missed."""
    for name, words in {"square": "Square", "hard_label": "RayS, which sees labels alone,"}.items():
        if beaten := _beaten(found, WHITE_BOX, [name], SLACK):
            return f"{words} lowers the white-box {beaten[0]:.1f} % to {beaten[1]:.1f} % on the same {beaten[2]} images"
    return None


def transfer_wins(found: Found) -> str | None:
    """Images made on another net fool this one where its own gradients did not."""
    names = [name for name in found if name.startswith("transfer")]
    for name in names:
        if beaten := _beaten(found, WHITE_BOX, [name], SLACK):
            return f"{name.replace('_', ' ')}: images made on another net lower {beaten[0]:.1f} % to {beaten[1]:.1f} %"
    return None


def never_to_chance(found: Found) -> str | None:
    """In a ball wide enough to hold any image, every net must fall to the level of guessing."""
    wide = _sweep(found, "pgd@")
    if not wide or wide[-1][0] < 5:
        return None
    factor, percent = wide[-1]
    return f"at {factor:g} ε, {percent:.1f} % are still classified correctly" if percent > 20 else None


def rises_with_radius(found: Found) -> str | None:
    """Accuracy under attack that rises with ε shows an attack that fails."""
    wide = _sweep(found, "pgd@") + ([(1.0, float(found["pgd"]["percent"]))] if "pgd" in found else [])
    for (small, before), (large, after) in zip(sorted(wide), sorted(wide)[1:], strict=False):
        if after > before + SLACK:
            return f"accuracy rises from {before:.1f} % at {small:g} ε to {after:.1f} % at {large:g} ε"
    return None


def random_output(found: Found) -> str | None:
    """A random net must be attacked in expectation; no figure here was."""
    return found["preconditions"]["faults"].get("random_output") if "preconditions" in found else None


def unconverged(found: Found) -> str | None:
    """More steps and restarts of the same attack, or one wrong class after the other as its target, find more."""
    for names, words in ((["pgd_more", "pgd_long"], "more steps and restarts"), (["targeted"], "targets")):
        if beaten := _beaten(found, ["pgd"], names, TELLING):
            return f"{words} lower {beaten[0]:.1f} % to {beaten[1]:.1f} % on the same {beaten[2]} images"
    return None


def wrong_step_size(found: Found) -> str | None:
    """Another step size of the same attack finds clearly more."""
    for name in found:
        if name.startswith("step@") and (beaten := _beaten(found, ["pgd"], [name], TELLING)):
            return f"a step of {name.removeprefix('step@')} ε lowers {beaten[0]:.1f} % to {beaten[1]:.1f} %"
    return None


def autoattack_flags(found: Found) -> str | None:
    """AutoAttack's own warnings."""
    flags = found["autoattack"].get("flags", []) if "autoattack" in found else []
    return "; ".join(flags) or None


def overstated(found: Found) -> str | None:
    """AutoAttack leaves clearly less than the plain PGD figure."""
    if "autoattack" not in found or "pgd" not in found:
        return None
    n = int(found["autoattack"]["n"])
    plain = _left(found, ["pgd"], n)
    if plain is None or plain[1] != n or plain[0] - found["autoattack"]["percent"] <= TELLING:
        return None
    return f"AutoAttack leaves {found['autoattack']['percent']:.1f} % of the {plain[0]:.1f} % that plain PGD reports"


Rule = Callable[[Found], str | None]
# Rules that say: the net hides its gradients, so that no attack by gradients is evidence.
MASKING: tuple[Rule, ...] = (
    zero_gradients,
    saturated_loss,
    uninformative_gradient,
    black_box_wins,
    transfer_wins,
    never_to_chance,
    rises_with_radius,
    random_output,
    autoattack_flags,
)
# Rules that say: the net may be as it seems, but the plain attack is too weak to tell.
WEAKNESS: tuple[Rule, ...] = (unconverged, wrong_step_size, overstated)


@dataclass(frozen=True)
class Verdict:
    """What the rules say of one net.

    Attributes:
        faults: preconditions that do not hold, by name.
        masking, weakness: the rules that rang, by name, each with its sentence.
        clean, plain: accuracy and accuracy under the plain PGD, in per cent.
        worst: per cent that survives every attack that ran on all the audit's images together.
        n: how many images these are.
    """

    faults: dict[str, str]
    masking: dict[str, str]
    weakness: dict[str, str]
    clean: float
    plain: float
    worst: float
    n: int

    @property
    def word(self) -> str:
        """``invalid``, ``masked``, ``overstated`` or ``sound``."""
        if self.faults.keys() - {"random_output"}:
            return "invalid"
        return "masked" if self.masking else "overstated" if self.weakness else "sound"

    @property
    def sentence(self) -> str:
        """The verdict in one line: what may be believed."""
        says = {
            "invalid": "no figure is evidence until this is mended",
            "masked": "the net hides its gradients; no figure from gradient attacks is evidence",
            "overstated": "the plain PGD figure is too high; believe the lowest",
            "sound": "no rule rings; the attacks agree",
        }
        if math.isnan(self.plain):
            return f"{self.word}: {says[self.word]}"
        return (
            f"{self.word}: {says[self.word]}. Clean {self.clean:.1f} %, plain PGD {self.plain:.1f} %, all attacks "
            f"together {self.worst:.1f} % of {self.n} images"
        )


def verdict(found: Found) -> Verdict:
    """The rules applied to the results of an audit, by the names of ``plan`` (and ``autoattack``, if it was run).

    Rules whose measures are missing stay silent.
    """

    def ringing(rules: Sequence[Rule]) -> dict[str, str]:
        answers = {rule.__name__: rule(found) for rule in rules}
        return {name: answer for name, answer in answers.items() if answer}

    n = len(found["pgd"]["survivors"]) if "pgd" in found else 0
    full = [name for name, one in found.items() if len(str(one.get("survivors", ""))) == n and "pgd@" not in name]
    worst = _left(found, full) if n else None
    return Verdict(
        faults=dict(found["preconditions"]["faults"]) if "preconditions" in found else {},
        masking=ringing(MASKING),
        weakness=ringing(WEAKNESS),
        clean=float(found["clean"]["percent"]) if "clean" in found else math.nan,
        plain=float(found["pgd"]["percent"]) if "pgd" in found else math.nan,
        worst=worst[0] if worst else math.nan,
        n=n,
    )


def _sweep(found: Found, prefix: str) -> list[tuple[float, float]]:
    """(factor, per cent) of the measures ``prefix``FACTOR, by rising factor."""
    chosen = [name for name in found if name.startswith(prefix)]
    return sorted((float(name.removeprefix(prefix)), float(found[name]["percent"])) for name in chosen)
