"""Choose the schedule of standard training for ``cifar_cnn`` on held-out TRAINING images, then train seed 0 at length.

Short runs see the first 44,000 training images for 5 epochs and are scored on the other 6,000 training images; the test
images are never read. Per axis, the level of highest held-out accuracy is kept; a lead below 0.3 points (less than the
noise of one seed) keeps the level named first. ``choice.json`` in the run store holds the choice; where the file
exists, no short run is made. Every training is a ``Run``, so a killed process continues where it stopped:

    KDIGA_RUNS=FOLDER KDIGA_DATA=FOLDER nice -n 19 python benchmarks/cifar10_schedule.py >> schedule.log
"""

import json
import resource
import time

import torch
from torch import Tensor, nn

from kdiga_nb import paths
from kdiga_nb.data import load_data
from kdiga_nb.losses import cross_entropy
from kdiga_nb.methods import ST
from kdiga_nb.numerics.files import replace_file
from kdiga_nb.runs import Run, load_or_train, run_key, training_seconds
from kdiga_nb.training import Schedule, TrainingState

EPOCHS, SHORT, IMAGES = 24, 5, 44_000
Setting = tuple[float, float, int, float]  # learning rate, weight decay, batch size, clip norm


def say(*words: object) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(time.strftime("%H:%M:%S"), *words, f"[{used.ru_utime + used.ru_stime:.0f} CPU seconds so far]", flush=True)


def report(state: TrainingState) -> None:
    say("epoch", state.epoch, "of", state.epochs, {k: round(v, 5) for k, v in state.history.rows[-1].items()})


def run_of(setting: Setting, epochs: int, images: int = 0) -> Run:
    rate, decay, batch, clip = setting
    schedule = Schedule(
        epochs, batch, rate, policy="one_cycle", weight_decay=decay, precision="bfloat16", clip_norm=clip, images=images
    )
    return Run("cifar10", "cifar_cnn", ST(), schedule)


def score(net: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Accuracy in per cent and mean cross-entropy in nats."""
    with torch.no_grad():
        logits = torch.cat([net(part) for part in images.split(250)])
    return 100 * (logits.argmax(1) == labels).double().mean().item(), cross_entropy(logits, labels).mean().item()


def short(setting: Setting) -> float:
    """Held-out accuracy of a short run, in per cent."""
    run = run_of(setting, SHORT, IMAGES)
    net = load_or_train(run, device="cpu", callbacks=[report])
    train = load_data("cifar10").train
    accuracy, loss = score(net, train.images[IMAGES:], train.labels[IMAGES:])
    say(
        f"short run {run_key(run)} {setting}: {accuracy:.2f} % of 6,000, {loss:.4f} nats, {training_seconds(run):.0f} s"
    )
    return accuracy


def best(levels: list[Setting]) -> Setting:
    reached = [short(level) for level in levels]
    return next(level for level, one in zip(levels, reached, strict=True) if one >= max(reached) - 0.3)


def choose() -> Setting:
    rate = best([(rate, 5e-4, 128, 0.0) for rate in (0.2, 0.1, 0.4)])[0]
    decay = best([(rate, decay, 128, 0.0) for decay in (5e-4, 1e-3, 2e-4)])[1]
    batch = best([(rate, decay, 128, 0.0), (2 * rate, decay, 256, 0.0)])
    return best([batch, (*batch[:3], 1.0)])


def main() -> None:
    path = paths.runs() / "choice.json"
    if not path.exists():
        record = json.dumps({"choice": choose(), "epochs": EPOCHS})
        replace_file(path, lambda partial: partial.write_text(record))
    record = json.loads(path.read_text())
    run = run_of(tuple(record["choice"]), record["epochs"])
    net = load_or_train(run, device="cpu", callbacks=[report])
    held_out = load_data("cifar10").validation
    accuracy, loss = score(net, held_out.images, held_out.labels)
    say(f"full length {run_key(run)} {record}: {accuracy:.1f} % of 1,000, {loss:.4f} nats, {training_seconds(run)} s")


if __name__ == "__main__":
    main()
