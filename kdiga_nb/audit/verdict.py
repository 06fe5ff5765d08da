"""Is the robustness real? The checks that an adversarial evaluation needs, and a verdict by named rules.

``plan(epsilon)`` lists the measures of an audit by name: more steps and restarts, other losses, other step sizes and
radii, attacks that see only scores (Square) or only labels (RayS), images made on another net, and what the input
gradients look like. Each is a ``Measure``, so the run store caches each result and an interrupted audit resumes.
``verdict`` reads the results. Every rule is a function of the results that returns a sentence where it sees a warning
sign, after Carlini et al. 2019 (On Evaluating Adversarial Robustness), Athalye et al. 2018 (Obfuscated Gradients) and
AutoAttack's own flags. No single number says whether a net is robust.

``preconditions`` comes first: faults that make any robustness number of a model meaningless (train mode, random output,
probabilities instead of logits, missing normalisation, a wrong number of classes), by name.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Found = Mapping[str, Mapping[str, Any]]
WHITE_BOX = ("pgd", "pgd_more", "pgd_long", "margin", "dlr", "targeted", "scaled")
SLACK = 2.0  # points: a difference on the same images that chance alone may make
TELLING = 5.0  # points: the difference from which the weaker attack counts as too weak


def _left(results: Found, names: Sequence[str], n: int | None = None) -> tuple[float, int] | None:
    """Accuracy in per cent under all the named attacks together, and the number of images; None without a result."""
    masks = [str(results[name]["survivors"]) for name in names if name in results]
    if not masks:
        return None
    n = min([len(mask) for mask in masks] + ([n] if n else []))
    return 100 * sum(all(mask[i] == "1" for mask in masks) for i in range(n)) / n, n


def _beaten(
    results: Found, weaker: Sequence[str], stronger: Sequence[str], by: float
) -> tuple[float, float, int] | None:
    """(accuracy under ``weaker``, accuracy under both, n) if ``stronger`` lowers it by more than ``by`` points."""
    after = _left(results, stronger)
    before = _left(results, weaker, after[1] if after else None)
    if before is None or after is None:
        return None
    together = _left(results, [*weaker, *stronger], before[1])
    assert together is not None
    return (before[0], together[0], together[1]) if before[0] - together[0] > by else None


def zero_gradients(results: Found) -> str | None:
    """Saturation: the loss is flat to the last bit, so a gradient attack does not move."""
    share = results["gradients"]["zero"] if "gradients" in results else 0.0
    return f"{share:.1f} % of the input gradients are exactly zero" if share > 1 else None


def saturated_loss(results: Found) -> str | None:
    """The cross-entropy succeeds at a smaller scale of the logits, where it is not flat."""
    if beaten := _beaten(results, ["pgd"], ["scaled"], TELLING):
        return f"scaled logits lower {beaten[0]:.1f} % to {beaten[1]:.1f} % on the same images"
    return None


def uninformative_gradient(results: Found) -> str | None:
    """Shattered gradients: their sign raises the loss hardly more than random noise does."""
    if "gradients" not in results:
        return None
    loss, noise = results["gradients"]["loss"], results["gradients"]["noise_loss"]
    rise, by_chance = max(loss) - loss[0], noise - loss[0]
    if rise < 2 * max(by_chance, 0):
        return f"PGD raises the loss by {rise:.2g} nats, the best of ten random draws by {by_chance:.2g}"
    return None


def black_box_wins(results: Found) -> str | None:
    """Square or a hard-label attack finds what the white-box attacks missed."""
    for name, words in {"square": "Square", "hard_label": "RayS, which sees labels alone,"}.items():
        if beaten := _beaten(results, WHITE_BOX, [name], SLACK):
            return f"{words} lowers the white-box {beaten[0]:.1f} % to {beaten[1]:.1f} % on the same {beaten[2]} images"
    return None


def transfer_wins(results: Found) -> str | None:
    """Images made on another net fool this one where its own gradients did not."""
    names = [name for name in results if name.startswith("transfer")]
    for name in names:
        if beaten := _beaten(results, WHITE_BOX, [name], SLACK):
            return f"{name.replace('_', ' ')}: images made on another net lower {beaten[0]:.1f} % to {beaten[1]:.1f} %"
    return None


def never_to_chance(results: Found) -> str | None:
    """In a ball wide enough to hold any image, every net must fall to the level of guessing."""
    wide = sweep(results, "pgd@")
    if not wide or wide[-1][0] < 5:
        return None
    factor, percent = wide[-1]
    return f"at {factor:g} ε, {percent:.1f} % are still classified correctly" if percent > 20 else None


def rises_with_radius(results: Found) -> str | None:
    """Accuracy under attack that rises with ε shows an attack that fails."""
    wide = sweep(results, "pgd@") + ([(1.0, float(results["pgd"]["percent"]))] if "pgd" in results else [])
    for (small, before), (large, after) in zip(sorted(wide), sorted(wide)[1:], strict=False):
        if after > before + SLACK:
            return f"accuracy rises from {before:.1f} % at {small:g} ε to {after:.1f} % at {large:g} ε"
    return None


def random_output(results: Found) -> str | None:
    """A random net must be attacked in expectation, which these attacks do not do."""
    return results["preconditions"]["faults"].get("random_output") if "preconditions" in results else None


def unconverged(results: Found) -> str | None:
    """The same attack finds more with more steps and restarts, or with every wrong class as target in turn."""
    for names, words in ((["pgd_more", "pgd_long"], "more steps and restarts"), (["targeted"], "targets")):
        if beaten := _beaten(results, ["pgd"], names, TELLING):
            return f"{words} lower {beaten[0]:.1f} % to {beaten[1]:.1f} % on the same {beaten[2]} images"
    return None


def wrong_loss(results: Found) -> str | None:
    """A difference of logits finds clearly more than the cross-entropy, which is not flat but points elsewhere."""
    if beaten := _beaten(results, ["pgd"], ["margin", "dlr"], TELLING):
        return f"margin and DLR lower {beaten[0]:.1f} % to {beaten[1]:.1f} % on the same images"
    return None


def wrong_step_size(results: Found) -> str | None:
    """Another step size of the same attack finds clearly more."""
    for name in results:
        if name.startswith("step@") and (beaten := _beaten(results, ["pgd"], [name], TELLING)):
            return f"a step of {name.removeprefix('step@')} ε lowers {beaten[0]:.1f} % to {beaten[1]:.1f} %"
    return None


def autoattack_flags(results: Found) -> str | None:
    """AutoAttack's own warnings."""
    flags = results["autoattack"].get("flags", []) if "autoattack" in results else []
    return "; ".join(flags) or None


def overstated(results: Found) -> str | None:
    """AutoAttack leaves clearly less than plain PGD."""
    if "autoattack" not in results or "pgd" not in results:
        return None
    n = int(results["autoattack"]["n"])
    plain = _left(results, ["pgd"], n)
    if plain is None or plain[1] != n or plain[0] - results["autoattack"]["percent"] <= TELLING:
        return None
    return f"AutoAttack leaves {results['autoattack']['percent']:.1f} % of the {plain[0]:.1f} % that plain PGD reports"


Rule = Callable[[Found], str | None]
# Rules for a net that hides its gradients: no gradient attack on it is evidence.
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
# Rules for a plain attack that is too weak; the net may be robust or not.
WEAKNESS: tuple[Rule, ...] = (unconverged, wrong_loss, wrong_step_size, overstated)


@dataclass(frozen=True)
class Verdict:
    """The result of the rules for one net.

    Attributes:
        faults: preconditions that do not hold, by name.
        masking, weakness: warning signs by the name of their rule, each with its sentence.
        clean, plain: accuracy and accuracy under the plain PGD, in per cent.
        worst: accuracy in per cent under all attacks together that ran on all of the audit's images.
        n: the number of these images.
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
        """The verdict in one line: which figure is evidence."""
        says = {
            "invalid": "no figure is evidence until this is fixed",
            "masked": "the net hides its gradients; no figure from gradient attacks is evidence",
            "overstated": "the plain PGD figure is too high; believe the lowest",
            "sound": "no warning sign; the attacks agree",
        }
        if math.isnan(self.plain):
            return f"{self.word}: {says[self.word]}"
        return (
            f"{self.word}: {says[self.word]}. Clean {self.clean:.1f} %, plain PGD {self.plain:.1f} %, all attacks "
            f"together {self.worst:.1f} % of {self.n} images"
        )


def verdict(results: Found) -> Verdict:
    """The rules applied to the results of an audit, by the names of ``plan`` (and ``autoattack``, if it was run).

    A rule whose measures are missing gives no warning sign.
    """

    def warnings(rules: Sequence[Rule]) -> dict[str, str]:
        answers = {rule.__name__: rule(results) for rule in rules}
        return {name: answer for name, answer in answers.items() if answer}

    n = len(results["pgd"]["survivors"]) if "pgd" in results else 0
    full = [name for name, one in results.items() if len(str(one.get("survivors", ""))) == n and "pgd@" not in name]
    worst = _left(results, full) if n else None
    return Verdict(
        faults=dict(results["preconditions"]["faults"]) if "preconditions" in results else {},
        masking=warnings(MASKING),
        weakness=warnings(WEAKNESS),
        clean=float(results["clean"]["percent"]) if "clean" in results else math.nan,
        plain=float(results["pgd"]["percent"]) if "pgd" in results else math.nan,
        worst=worst[0] if worst else math.nan,
        n=n,
    )


def sweep(results: Found, prefix: str) -> list[tuple[float, float]]:
    """(factor, accuracy in per cent) of the measures named ``prefix``FACTOR, by rising factor."""
    chosen = [name for name in results if name.startswith(prefix)]
    return sorted((float(name.removeprefix(prefix)), float(results[name]["percent"])) for name in chosen)
