"""The audit: attacks against closed forms and other libraries, and a verdict on nets built to break each rule."""

import json
import math
import re
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdiga_nb.attacks.autoattack import AutoAttack
from kdiga_nb.attacks.gradient import PGD
from kdiga_nb.attacks.losses import LOSSES, LossPGD, dlr, margin
from kdiga_nb.attacks.rays import RayS
from kdiga_nb.audit import measures
from kdiga_nb.audit.measures import COMPARES, Gradients, Preconditions, Transfer, plan, preconditions
from kdiga_nb.audit.verdict import MASKING, WEAKNESS, verdict
from kdiga_nb.data import Data, Split
from kdiga_nb.losses import cross_entropy, input_gradient
from kdiga_nb.measures import TestAccuracy
from kdiga_nb.methods import AT
from kdiga_nb.models import build_model
from kdiga_nb.training import Schedule, train

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:foolbox")

EPSILON = 0.1
SMALL: dict[str, Any] = {
    "images": 60,
    "long_steps": 60,
    "long_restarts": 3,
    "long_images": 20,
    "black_box_images": 60,
    "queries": 400,
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Wrapped(nn.Module):
    """A net behind something that breaks its evaluation."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net


class Saturated(Wrapped):
    """Logits so large that the cross-entropy is flat to the last bit."""

    def forward(self, x: Tensor) -> Tensor:
        return 300 * self.net(x)


class Randomised(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + 0.05 * torch.randn_like(x))


class Shattered(Wrapped):
    """A ripple too fine to see and too steep for a gradient: the sign of every pixel's slope is as good as random."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + 0.002 * (30_000 * x).sin())


class Probabilities(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).softmax(1)


class WithoutNormalisation(Wrapped):
    """Expects images that were normalised outside."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(0.5 * x + 0.5)


class LabelsOnly(Wrapped):
    """Answers with its decision alone."""

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        return nn.functional.one_hot(logits.argmax(1), logits.shape[1]).to(x.dtype)


@pytest.fixture(scope="module")
def robust(digits: Data) -> nn.Module:
    """A net after a few epochs of fast adversarial training."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = build_model("digits_small", num_classes=10, image_shape=(1, 8, 8))
    schedule = Schedule(8, batch_size=64, policy="one_cycle", augment=False, clip_norm=1.0)
    train(net, AT(PGD(0.12, 0.15, 1)), digits, schedule, device="cpu")
    return net


def audited(model: nn.Module, data: Data, reference: nn.Module, names: tuple[str, ...] = ()) -> dict[str, Any]:
    """An audit with small numbers, or the measures of it that are named."""
    measures = plan(EPSILON, **SMALL)
    chosen = names or tuple(measures)
    torch.manual_seed(0)
    return {name: measures[name](model, data, reference=reference if name in COMPARES else None) for name in chosen}


# ---- losses and attacks ----


def test_margin_and_dlr_by_hand() -> None:
    logits, labels = torch.tensor([[3.0, 1.0, -1.0, 0.0], [3.0, 1.0, -1.0, 0.0]]), torch.tensor([0, 1])
    assert margin(logits, labels).tolist() == [-2.0, 2.0]
    assert dlr(logits, labels).tolist() == pytest.approx([-2 / 3, 2 / 3])
    assert dlr(logits[:, :2], labels).tolist() == [-2.0, 2.0]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_dlr_does_not_see_scale_or_shift(scale: float) -> None:
    logits, labels = torch.randn(50, 6, generator=seeded()).double(), torch.arange(50) % 6
    torch.testing.assert_close(dlr(scale * logits + 7, labels), dlr(logits, labels))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("restarts", [1, 3])
def test_loss_pgd_keeps_an_attacks_promises(loss: str, restarts: int, trained: nn.Module, digits: Data) -> None:
    x, y = (part[:30] for part in digits.test)
    before = deepcopy(trained.state_dict())
    attack = LossPGD(EPSILON, EPSILON / 5, 10, restarts=restarts, loss=loss, look_every=3)
    first, second = (attack(trained, x, y, generator=seeded()) for _ in range(2))
    assert torch.equal(first, second) and not first.requires_grad
    assert first.min() >= 0 and first.max() <= 1 and (first.double() - x.double()).abs().max() <= EPSILON
    assert all(torch.equal(trained.state_dict()[key], value) for key, value in before.items())
    assert (trained(first).argmax(1) == y).sum() < (trained(x).argmax(1) == y).sum()


def test_loss_pgd_is_pgd_for_the_images_that_nothing_fools(trained: nn.Module, digits: Data) -> None:
    x, y = (part[:100] for part in digits.test)
    ours = LossPGD(0.05, 0.01, 10)(trained, x, y, generator=seeded())
    plain = PGD(0.05, 0.01, 10)(trained, x, y, generator=seeded())
    left = trained(ours).argmax(1) == y
    assert left.any() and torch.equal(ours[left], plain[left])
    # It stops at the first success, so it finds whatever the plain attack ends on.
    assert (left <= (trained(plain).argmax(1) == y)).all()


def test_more_restarts_only_add_victims(trained: nn.Module, digits: Data) -> None:
    x, y = (part[:60] for part in digits.test)
    left = []
    for restarts in (1, 4):
        x_adv = LossPGD(EPSILON, EPSILON, 1, restarts=restarts)(trained, x, y, generator=seeded())
        left.append(int((trained(x_adv).argmax(1) == y).sum()))
    assert left[1] <= left[0]


@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_climbs_its_own_hill(loss: str, trained: nn.Module, digits: Data) -> None:
    x, y = (part[:40] for part in digits.test)
    value = {"cross_entropy": cross_entropy, "margin": margin, "dlr": dlr, "targeted": margin}[loss]
    x_adv = LossPGD(0.03, 0.01, 5, loss=loss, random_start=False)(trained, x, y)
    assert (value(trained(x_adv), y) > value(trained(x), y)).double().mean() > 0.95


def test_a_targeted_restart_aims_at_one_wrong_class_after_the_other() -> None:
    """Logits linear in the pixels: with one restart each image ends as the class it was closest to."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 5))
    with torch.no_grad():
        for index, parameter in enumerate(net.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=seeded(index)))
    x = torch.rand(30, 1, 4, 4, generator=seeded(3))
    ranked = net(x).argsort(1, descending=True)
    for place in (1, 2):
        attack = LossPGD(0.9, 0.1, 20, restarts=place, loss="targeted", look_every=100, random_start=False)
        aims = attack._aims(net, x, ranked[:, 0]).view(place, 30)
        assert torch.equal(aims, ranked[:, 1 : place + 1].T)
        assert (net(attack(net, x, ranked[:, 0])).argmax(1) != ranked[:, 0]).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "hinge"}, "loss must be one of cross_entropy, margin, dlr, targeted, got 'hinge'"),
        ({"logit_scale": 0.0}, "pos"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossPGD(0.1, 0.1, 1, **settings)


def test_foolbox_gives_the_same_verdict_on_every_test_image(trained: nn.Module, digits: Data) -> None:
    import eagerpy
    import foolbox

    x, y = digits.test
    attack = PGD(EPSILON, 0.01, 20)

    class Oracle(foolbox.attacks.LinfPGD):
        def get_random_start(self, x0: Any, epsilon: float) -> Any:
            return eagerpy.astensor(attack.start(x, generator=seeded()))

    oracle = Oracle(abs_stepsize=0.01, steps=20, random_start=True)
    theirs = oracle.run(foolbox.PyTorchModel(trained, bounds=(0, 1), device="cpu"), x, y, epsilon=EPSILON)
    ours = attack(trained, x, y, generator=seeded())
    robust_to = [trained(images).argmax(1) == y for images in (ours, theirs)]
    assert torch.equal(*robust_to) and 0 < robust_to[0].sum() < len(y)


def test_rays_needs_labels_alone(trained: nn.Module, digits: Data) -> None:
    x, y = (part[:30] for part in digits.test)
    attack = RayS(EPSILON, queries=300)
    assert torch.equal(attack(LabelsOnly(trained).eval(), x, y), attack(trained, x, y))


def test_rays_finds_the_nearest_corner_of_a_linear_net() -> None:
    """Two classes and 16 pixels: the nearest wrong decision lies along the signs of the weights."""
    weight = torch.randn(16, generator=seeded())
    weight -= weight.mean()
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2, bias=False))
    with torch.no_grad():
        net[1].weight.copy_(torch.stack([weight, -weight]))  # pyright: ignore[reportArgumentType, reportCallIssue]
    x = 0.4 + 0.2 * torch.rand(40, 1, 4, 4, generator=seeded(1))
    y = net(x).argmax(1)
    needed = (x.flatten(1) @ weight).abs() / weight.abs().sum()
    for epsilon in (0.02, 0.05):
        fooled = net(RayS(epsilon, queries=2000)(net, x, y)).argmax(1) != y
        assert not fooled[needed > epsilon].any()
        assert fooled[needed < 0.9 * epsilon].all() and fooled.any()


def test_rays_stays_in_the_ball_and_finds_more_with_more_queries(trained: nn.Module, digits: Data) -> None:
    x, y = (part[:40] for part in digits.test)
    left = []
    for queries in (5, 50, 1000):
        x_adv = RayS(EPSILON, queries)(trained, x, y)
        assert x_adv.min() >= 0 and x_adv.max() <= 1 and (x_adv.double() - x.double()).abs().max() <= EPSILON
        left.append(int((trained(x_adv).argmax(1) == y).sum()))
    assert left == sorted(left, reverse=True) and left[-1] < left[0]


def test_the_parts_of_autoattack_are_the_ensembles_own(tiny_net: Callable[..., nn.Module]) -> None:
    net = tiny_net(0, gain=3.0).eval()
    x = torch.rand(6, 1, 4, 4, generator=seeded())
    y = net(x).argmax(1)
    whole = AutoAttack(0.05).evaluate(net, x, y)
    part = AutoAttack(0.05, version="apgd").evaluate(net, x, y)
    assert list(part.survivors) == ["clean", "apgd-ce", "apgd-t"]
    assert all(torch.equal(mask, whole.survivors[name]) for name, mask in part.survivors.items())
    square = AutoAttack(0.05, version="square").evaluate(net, x, y)
    assert list(square.survivors) == ["clean", "square"] and square.flags == []


# ---- measures ----


def test_survivors_name_the_images(trained: nn.Module, digits: Data) -> None:
    result = TestAccuracy(None, 50)(trained, digits)
    x, y = (part[:50] for part in digits.test)
    assert result["survivors"] == "".join(str(int(right)) for right in trained(x).argmax(1) == y)
    assert (result["n"], result["percent"]) == (50, 2 * result["survivors"].count("1"))


def test_images_of_the_net_itself_transfer_fully(trained: nn.Module, robust: nn.Module, digits: Data) -> None:
    attack = PGD(EPSILON, 0.01, 10)
    own = TestAccuracy(attack, 50)(trained, digits)
    assert Transfer(attack, 50)(trained, digits, reference=trained) == own
    assert Transfer(attack, 50)(trained, digits, reference=robust)["percent"] > own["percent"]
    with pytest.raises(ValueError, match="needs a reference"):
        Transfer(attack, 50)(trained, digits)


def test_gradients_in_batches_are_the_gradients_at_once(
    trained: nn.Module, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = Gradients(EPSILON, 40, steps=(0, 1, 10), grid=5)
    at_once = measure(trained, digits, reference=trained)
    monkeypatch.setattr(measures, "BATCH", 7)
    in_parts = measure(trained, digits, reference=trained)
    assert at_once.keys() == in_parts.keys()
    for name, value in at_once.items():
        torch.testing.assert_close(torch.tensor(in_parts[name]), torch.tensor(value), rtol=1e-5, atol=1e-6)


def test_what_gradients_measures(trained: nn.Module, robust: nn.Module, digits: Data) -> None:
    measure = Gradients(EPSILON, 40, steps=(0, 1, 10), grid=5)
    result = measure(trained, digits, reference=robust)
    x, y = (part[:40] for part in digits.test)
    g, other = (input_gradient(net, x, y)[0].flatten(1) for net in (trained, robust))
    assert result["norm"] == pytest.approx(g.norm(dim=1).mean().item())
    assert result["cosine"] == pytest.approx(torch.cosine_similarity(g, other).mean().item())
    assert result["zero"] == 0 and len(result["loss"]) == 3
    assert result["loss"] == sorted(result["loss"])
    assert result["loss"][0] < result["noise_loss"] < result["loss"][-1]
    surface = result["surface"]
    assert len(surface) == len(surface[0]) == 5
    index = int((trained(x).argmax(1) == y).double().argmax())
    assert surface[2][2] == pytest.approx(cross_entropy(trained(x), y)[index].item(), rel=1e-4)
    assert "cosine" not in measure(trained, digits)
    assert measure(trained, digits, reference=trained)["cosine"] == pytest.approx(1)


@pytest.fixture(scope="module")
def weak(trained: nn.Module, robust: nn.Module, digits: Data) -> dict[str, Any]:
    """The audit of a net after standard training."""
    return audited(trained, digits, robust)


def test_results_are_plain_json_and_name_every_measure(weak: dict[str, Any]) -> None:
    assert json.loads(json.dumps(weak)) == weak
    assert set(weak) == set(plan(EPSILON))


# ---- bad input ----


def wrong_classes(net: nn.Module) -> nn.Module:
    return build_model("digits_small", num_classes=7, image_shape=(1, 8, 8)).eval()


def in_train_mode(net: nn.Module) -> nn.Module:
    return deepcopy(net).train()


def not_finite(net: nn.Module) -> nn.Module:
    broken = deepcopy(net)
    with torch.no_grad():
        next(broken.parameters()).fill_(math.nan)
    return broken


def untrained(net: nn.Module) -> nn.Module:
    return build_model("digits_small", num_classes=10, image_shape=(1, 8, 8)).eval()


@pytest.mark.parametrize(
    ("break_it", "name", "says"),
    [
        (lambda net: Probabilities(net).eval(), "probabilities", "the layer before its softmax"),
        (lambda net: Randomised(net).eval(), "random_output", "differ by up to"),
        (in_train_mode, "train_mode", r"call model.eval\(\) first"),
        (lambda net: WithoutNormalisation(net).eval(), "unnormalised_images", "put the normalisation into the model"),
        (wrong_classes, "class_count", r"has shape \(100, 7\), the data set 10 classes"),
        (not_finite, "not_finite", "is not finite"),
        (untrained, "at_chance", "hardly better than guessing"),
    ],
)
def test_a_broken_model_is_named(
    break_it: Callable[[nn.Module], nn.Module], name: str, says: str, trained: nn.Module, digits: Data
) -> None:
    torch.manual_seed(0)
    found = Preconditions(100)(break_it(trained), digits)["faults"]
    assert name in found
    assert re.search(says, found[name]), found[name]


def test_images_outside_their_range_are_named(trained: nn.Module, digits: Data) -> None:
    x, y = (part[:50] for part in digits.test)
    assert "[0, 1]" in preconditions(trained, 255 * x, y, 10)["pixel_range"]


def test_a_sound_model_has_no_faults_and_stays_as_it_is(robust: nn.Module, trained: nn.Module, digits: Data) -> None:
    for net in (robust, trained):
        before = deepcopy(net.state_dict())
        assert preconditions(net, digits.test.images[:100], digits.test.labels[:100], 10) == {}
        assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())


# ---- the verdict on nets built to break it ----


@pytest.fixture(scope="module")
def broken(trained: nn.Module, robust: nn.Module, digits: Data) -> dict[str, set[str]]:
    """The masking rules that ring for each net."""
    nets = {"saturated": Saturated(trained), "random": Randomised(trained), "shattered": Shattered(trained)}
    return {name: set(verdict(audited(net.eval(), digits, robust)).masking) for name, net in nets.items()}


@pytest.mark.parametrize(
    ("net", "rules"),
    [
        ("saturated", {"zero_gradients", "saturated_loss", "never_to_chance"}),
        ("random", {"random_output"}),
        ("shattered", {"uninformative_gradient", "black_box_wins", "transfer_wins"}),
    ],
)
def test_gradient_masking_is_named(net: str, rules: set[str], broken: dict[str, set[str]]) -> None:
    assert rules <= broken[net]


def test_a_robust_net_passes_every_rule(robust: nn.Module, trained: nn.Module, digits: Data) -> None:
    found = audited(robust, digits, trained)
    found["autoattack"] = {"percent": found["pgd_more"]["percent"], "n": 60, "flags": []}
    says = verdict(found)
    assert (says.faults, says.masking, says.weakness, says.word) == ({}, {}, {}, "sound")
    assert 60 < says.worst <= says.plain <= says.clean
    assert "no warning sign" in says.sentence


def test_a_weak_net_is_not_taken_for_a_masked_one(weak: dict[str, Any]) -> None:
    says = verdict(weak)
    assert says.masking == {} and says.worst < 70


# ---- each rule on results made up for it ----


def left(survivors: str) -> dict[str, Any]:
    return {"percent": 100 * survivors.count("1") / len(survivors), "n": len(survivors), "survivors": survivors}


HALF, MOST, ALL = "1" * 10 + "0" * 10, "1" * 18 + "0" * 2, "1" * 20
FLAT = {"zero": 0.0, "loss": [1.0, 1.1], "noise_loss": 1.2}
STEEP = {"zero": 0.0, "loss": [1.0, 3.0], "noise_loss": 1.2}
RULES = {rule.__name__: rule for rule in (*MASKING, *WEAKNESS)}
CASES: list[tuple[str, dict[str, Any], bool]] = [
    ("zero_gradients", {"gradients": STEEP | {"zero": 40.0}}, True),
    ("zero_gradients", {"gradients": STEEP}, False),
    ("saturated_loss", {"pgd": left(MOST), "scaled": left(HALF)}, True),
    ("saturated_loss", {"pgd": left(MOST), "dlr": left(HALF), "scaled": left(ALL)}, False),
    ("uninformative_gradient", {"gradients": FLAT}, True),
    ("uninformative_gradient", {"gradients": STEEP}, False),
    ("black_box_wins", {"pgd": left(MOST), "square": left(HALF)}, True),
    ("black_box_wins", {"pgd": left(MOST), "margin": left(HALF), "square": left(HALF)}, False),
    ("black_box_wins", {"pgd": left(MOST), "hard_label": left(HALF[:12])}, True),
    ("transfer_wins", {"pgd": left(ALL), "transfer_from_teacher": left(MOST)}, True),
    ("transfer_wins", {"pgd": left(MOST), "transfer_from_teacher": left(ALL)}, False),
    ("never_to_chance", {"pgd@5": left(HALF)}, True),
    ("never_to_chance", {"pgd@5": left("0" * 20)}, False),
    ("never_to_chance", {"pgd@2": left(HALF)}, False),
    ("rises_with_radius", {"pgd": left(HALF), "pgd@2": left(MOST)}, True),
    ("rises_with_radius", {"pgd": left(MOST), "pgd@2": left(HALF), "pgd@0.5": left(ALL)}, False),
    ("random_output", {"preconditions": {"faults": {"random_output": "differs"}}}, True),
    ("random_output", {"preconditions": {"faults": {}}}, False),
    ("autoattack_flags", {"autoattack": left(HALF) | {"flags": ["randomized defense"]}}, True),
    ("autoattack_flags", {"autoattack": left(HALF) | {"flags": []}}, False),
    ("unconverged", {"pgd": left(MOST), "pgd_long": left(HALF)}, True),
    ("unconverged", {"pgd": left(MOST), "pgd_long": left(ALL)}, False),
    ("unconverged", {"pgd": left(MOST), "targeted": left(HALF)}, True),
    ("wrong_loss", {"pgd": left(MOST), "dlr": left(HALF)}, True),
    ("wrong_loss", {"pgd": left(HALF), "dlr": left(MOST), "scaled": left("0" * 20)}, False),
    ("wrong_step_size", {"pgd": left(MOST), "step@0.5": left(HALF)}, True),
    ("wrong_step_size", {"pgd": left(MOST), "step@0.5": left(ALL)}, False),
    ("overstated", {"pgd": left(MOST), "autoattack": {"percent": 50.0, "n": 20, "flags": []}}, True),
    ("overstated", {"pgd": left(MOST), "autoattack": {"percent": 88.0, "n": 20, "flags": []}}, False),
]


@pytest.mark.parametrize(("name", "results", "warns"), CASES, ids=[f"{name}-{warns}" for name, _, warns in CASES])
def test_rule(name: str, results: dict[str, Any], warns: bool) -> None:
    sentence = RULES[name](results)
    assert bool(sentence) == warns
    says = verdict(results)
    assert (name in says.masking | says.weakness) == warns


def test_every_rule_has_a_case_that_warns_and_one_that_does_not() -> None:
    for warns in (True, False):
        assert {name for name, _, expected in CASES if expected == warns} == set(RULES)


@pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
def test_a_rule_without_its_measures_stays_silent(rule: Callable[[dict[str, Any]], str | None]) -> None:
    assert rule({}) is None


def test_attacks_are_compared_on_the_images_they_share() -> None:
    """The long attack saw five images; on these the plain one is no better, whatever it does on the rest."""
    assert RULES["unconverged"]({"pgd": left("11111" + "1" * 15), "pgd_long": left("11111")}) is None
    assert RULES["unconverged"]({"pgd": left("00000" + "1" * 15), "pgd_long": left("00000")}) is None
    assert RULES["unconverged"]({"pgd": left("11111" + "0" * 15), "pgd_long": left("11000")}) is not None


def test_together_counts_an_image_once_lost_to_any_attack() -> None:
    found = {"clean": left("1111"), "pgd": left("1110"), "dlr": left("1011"), "pgd@2": left("0000")}
    says = verdict(found)
    assert (says.clean, says.plain, says.worst, says.n) == (100, 75, 50, 4)


@pytest.mark.parametrize(
    ("found", "word"),
    [
        ({"preconditions": {"faults": {"train_mode": "it is"}}, "pgd": left(ALL)}, "invalid"),
        ({"preconditions": {"faults": {"random_output": "it is"}}, "pgd": left(ALL)}, "masked"),
        ({"pgd": left(MOST), "pgd_long": left(HALF)}, "overstated"),
        ({"pgd": left(MOST), "pgd_long": left(HALF), "gradients": FLAT}, "masked"),
        ({"pgd": left(MOST), "clean": left(ALL)}, "sound"),
    ],
)
def test_the_word_of_a_verdict(found: dict[str, Any], word: str) -> None:
    assert verdict(found).word == word
    assert verdict(found).sentence.startswith(word)


def test_a_two_class_split_has_its_audit_too(tiny_net: Callable[..., nn.Module]) -> None:
    net = tiny_net(0, classes=2).eval()
    x = torch.rand(40, 1, 4, 4, generator=seeded())
    split = Split(x, net(x).argmax(1))
    data = Data("two", split, split, num_classes=2, validation_size=0)
    found = {n: m(net, data) for n, m in plan(0.05, images=40).items() if n in ("pgd", "dlr", "margin", "clean")}
    assert verdict(found).clean == 100
