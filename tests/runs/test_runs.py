"""The run store: keys, caching, kills, damage, full disks, foreign checkpoints and graphs of runs.

What can happen to a process happens here to a real one: it is killed with SIGKILL, starved of disk, run twice.
"""

import hashlib
import json
import logging
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from kdiga_nb import paths
from kdiga_nb.attacks.autoattack import AutoAttack
from kdiga_nb.attacks.gradient import FGSM, PGD
from kdiga_nb.data import Data, load_data
from kdiga_nb.measures import Measure, TestAccuracy
from kdiga_nb.methods import KD, KDIGA, METHODS, ST, Method
from kdiga_nb.models import build_model
from kdiga_nb.numerics.scopes import has_bfloat16
from kdiga_nb.runs import Checkpoint, StoreError
from kdiga_nb.runs.graph import Job, run_all
from kdiga_nb.runs.listing import epochs_done, list_store, stored
from kdiga_nb.runs.run import Run, ancestors, describe, folder, measure_name, run_key
from kdiga_nb.runs.store import history, is_finished, load_or_train, measure, measured, training_seconds
from kdiga_nb.training import Schedule, TrainingError, TrainingState

ATTACK = PGD(0.1, 0.05, 2)
QUICK = Schedule(1, batch_size=256, learning_rate=0.05, policy="constant", augment=False)
FOUR = replace(QUICK, epochs=4)
QUICK_RUN = Run("digits", "digits_small", ST(), QUICK)
FOUR_RUN = Run("digits", "digits_small", ST(), FOUR)
# Everything a training carries from epoch to epoch: momentum, dropout, augmentation, the selected epoch, a teacher.
RICH_RUN = Run(
    "digits",
    "digits_small",
    KDIGA(lambda_iga=2.0),
    Schedule(
        epochs=5, batch_size=256, policy="multistep", milestones=(3,), selection="validation", selection_epsilon=0.05
    ),
    seed=7,
    head_dropout=0.3,
    teacher=QUICK_RUN,
    init=QUICK_RUN,
)
HOPELESS = replace(QUICK_RUN, schedule=replace(QUICK, learning_rate=1e30))


def sha(run: Run) -> str:
    return json.loads((folder(run) / "run.json").read_text())["sha256"]


def only_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    """The message, which has to be a single line."""
    text = str(error.value)
    assert text
    assert "\n" not in text
    return text


def test_the_record_says_in_which_precision_a_bf16_training_computed() -> None:
    run = replace(QUICK_RUN, schedule=replace(QUICK, precision="bfloat16"))
    half, full = load_or_train(run, device="cpu").state_dict(), load_or_train(QUICK_RUN, device="cpu").state_dict()
    same = all(torch.equal(half[name], full[name]) for name in full)
    record = json.loads((folder(run) / "run.json").read_text())
    assert record["computed_in"] == ("float32" if same else "bfloat16")
    assert same != has_bfloat16(torch.device("cpu"))


# ---- keys ----

OTHERS: dict[str, Any] = {
    "precision": "bfloat16",
    "batch_norm": "per_process",
    "dataset": "digits_rotated",
    "model": "digits_medium",
    "method": KD(),
    "schedule": FOUR,
    "teacher": FOUR_RUN,
    "init": Checkpoint("start.pt", "0" * 64, "state_dict", "digits_small:digits"),
    "policy": "one_cycle",
    "optimizer": "adamw",
    "milestones": (2,),
    "trainable": "head",
    "selection": "validation",
    "norm": "batch",
    "kl_reduction": "mean",
    "target": "adversarial",
    "align": "logits",
    "target_gradient": "zero",
    "attack": FGSM(0.05),
    "align_at": "perturbed",
}


def changed(value: Any, name: str) -> Any:
    """The same value with one field set to something else that is allowed."""
    old = getattr(value, name)
    if name in OTHERS:
        return replace(value, **{name: OTHERS[name]})
    if isinstance(old, bool):
        return replace(value, **{name: not old})
    return replace(value, **{name: old + 1 if isinstance(old, int) else old + 0.25})


def with_random_start(method: Method, name: str) -> Method:
    """TRADES refuses an attack that starts at the image, so its attack changes by its radius."""
    return changed(method, name) if name != "attack" else replace(method, attack=replace(ATTACK, epsilon=0.2))  # pyright: ignore


def example(method: type[Method]) -> Method:
    names = {field.name for field in fields(method)}  # pyright: ignore[reportArgumentType]
    return method(**({"attack": ATTACK} if "attack" in names and method is not KDIGA else {}))


METHOD_FIELDS = [
    (name, field.name)
    for name, method in METHODS.items()
    for field in fields(method)  # pyright: ignore[reportArgumentType]
]


@pytest.mark.parametrize("name", [field.name for field in fields(Run)])
def test_key_changes_with_every_field_of_the_run(name: str):
    assert run_key(changed(QUICK_RUN, name)) != run_key(QUICK_RUN)


@pytest.mark.parametrize("name", [field.name for field in fields(Schedule)])
def test_key_changes_with_every_field_of_the_schedule(name: str):
    assert run_key(replace(FOUR_RUN, schedule=changed(FOUR, name))) != run_key(FOUR_RUN)


@pytest.mark.parametrize(("method", "name"), METHOD_FIELDS)
def test_key_changes_with_every_field_of_every_method(method: str, name: str):
    old = replace(QUICK_RUN, method=example(METHODS[method]))
    if name == "align_at":  # only an attack perturbs
        old = replace(old, method=changed(old.method, "attack"))
    change = changed if method not in ("trades", "at") else with_random_start
    assert run_key(replace(old, method=change(old.method, name))) != run_key(old)


@pytest.mark.parametrize("name", [field.name for field in fields(PGD)])
def test_key_changes_with_every_field_of_the_attack(name: str):
    old = replace(QUICK_RUN, method=METHODS["ard"](attack=ATTACK))  # pyright: ignore[reportCallIssue]
    new = replace(old, method=METHODS["ard"](attack=changed(ATTACK, name)))  # pyright: ignore[reportCallIssue]
    assert run_key(new) != run_key(old)


@pytest.mark.parametrize("role", ["teacher", "init"])
def test_key_changes_with_an_ancestor_however_far(role: str):
    def chain(seed: int) -> Run:
        run = replace(QUICK_RUN, seed=seed)
        for _ in range(4):
            run = replace(QUICK_RUN, seed=9, **{role: run})
        return run

    assert run_key(chain(0)) != run_key(chain(1))
    assert run_key(chain(0)) == run_key(chain(0))


def test_teacher_and_init_are_not_the_same_to_a_key():
    assert run_key(replace(QUICK_RUN, teacher=FOUR_RUN)) != run_key(replace(QUICK_RUN, init=FOUR_RUN))


def test_methods_of_equal_fields_have_keys_of_their_own():
    keys = {run_key(replace(QUICK_RUN, method=example(method))) for method in METHODS.values()}
    assert len(keys) == len(METHODS)


def test_equal_runs_have_equal_keys():
    again = Run(
        "digits", "digits_small", KDIGA(lambda_iga=2.0), replace(RICH_RUN.schedule), 7, 0.3, QUICK_RUN, QUICK_RUN
    )
    assert again == RICH_RUN
    assert run_key(again) == run_key(RICH_RUN)


@pytest.mark.parametrize(
    ("whole", "decimal"),
    [
        (replace(QUICK_RUN, method=KDIGA(lambda_iga=3)), replace(QUICK_RUN, method=KDIGA(lambda_iga=3.0))),
        (
            replace(FOUR_RUN, schedule=replace(FOUR, learning_rate=1)),
            replace(FOUR_RUN, schedule=replace(FOUR, learning_rate=1.0)),
        ),
        (replace(QUICK_RUN, head_dropout=0), replace(QUICK_RUN, head_dropout=0.0)),
    ],
    ids=["lambda_iga", "learning_rate", "head_dropout"],
)
def test_a_whole_number_is_the_same_as_its_decimal(whole: Run, decimal: Run):
    # Equal runs share one entry of the key's cache, so their own keys are compared: with differing ones, a process's
    # first spelling would decide where the result is stored.
    assert whole == decimal
    assert run_key.__wrapped__(whole) == run_key.__wrapped__(decimal)


def test_a_key_is_the_same_in_another_process_and_place(tmp_path: Path):
    program = (
        "from kdiga_nb.methods import KDIGA, ST; from kdiga_nb.runs import Run, run_key\n"
        "from kdiga_nb.training import Schedule\n"
        f"first = {QUICK_RUN!r}\n"
        f"print(run_key({RICH_RUN!r}), run_key(first))"
    )
    env = os.environ | {"PYTHONHASHSEED": "1", "KDIGA_RUNS": str(tmp_path), "PYTHONPATH": str(paths.ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [run_key(RICH_RUN), run_key(QUICK_RUN)]


def test_a_hash_does_not_travel_to_another_process():
    hash(RICH_RUN)
    there = pickle.loads(pickle.dumps(RICH_RUN))
    assert there == RICH_RUN
    assert hash(there) == hash(RICH_RUN)
    program = f"import pickle; print(hash(pickle.loads({pickle.dumps(RICH_RUN)!r})) == {hash(RICH_RUN)})"
    env = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": str(paths.ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


def test_a_checkpoint_enters_by_its_content():
    here, there = (Checkpoint(path, "a" * 64, "safetensors", "digits_small:digits") for path in ("here.pt", "there.pt"))
    assert run_key(here) == run_key(there)
    assert run_key(replace(here, sha256="b" * 64)) != run_key(here)
    assert run_key(replace(here, sha256=None)) != run_key(replace(there, sha256=None))


def test_ancestors_stand_before_their_heirs_and_once():
    a, b = QUICK_RUN, FOUR_RUN
    c = replace(QUICK_RUN, seed=1, teacher=a, init=b)
    d = replace(QUICK_RUN, seed=2, teacher=c, init=a)
    e = replace(QUICK_RUN, seed=3, teacher=Checkpoint("x.pt"), init=d)
    order = ancestors([e, d, a])
    assert sorted(map(run_key, order)) == sorted(map(run_key, [a, b, c, d, e]))
    for run in order:
        for source in (run.teacher, run.init):
            assert not isinstance(source, Run) or order.index(source) < order.index(run)


# ---- training once ----


def test_trained_once_and_then_read():
    seen: list[int] = []
    run = replace(FOUR_RUN, head_dropout=0.5)
    first = load_or_train(run, callbacks=[lambda state: seen.append(state.epoch)])
    times = {path.name: path.stat().st_mtime_ns for path in folder(run).iterdir()}
    second = load_or_train(run, callbacks=[lambda state: seen.append(state.epoch)])
    assert seen == [1, 2, 3, 4]
    assert {path.name: path.stat().st_mtime_ns for path in folder(run).iterdir()} == times
    assert set(times) == {"run.json", "model.safetensors", "history.csv"}
    x = load_data("digits").test.images[:50]
    with torch.no_grad():
        assert torch.equal(first(x), second(x))
        assert torch.equal(first(x), first(x))
    assert not any(module.training for net in (first, second) for module in net.modules())


def test_what_the_store_says_of_a_run():
    assert (is_finished(FOUR_RUN), training_seconds(FOUR_RUN), list_store()) == (False, None, [])
    load_or_train(FOUR_RUN)
    record = json.loads((folder(FOUR_RUN) / "run.json").read_text())
    weights = (folder(FOUR_RUN) / "model.safetensors").read_bytes()
    assert record["sha256"] == hashlib.sha256(weights).hexdigest()
    assert record["key"] == run_key(FOUR_RUN) == folder(FOUR_RUN).name
    assert record["run"] == describe(FOUR_RUN)
    assert [row["epoch"] for row in history(FOUR_RUN)] == [1, 2, 3, 4]
    assert (training_seconds(FOUR_RUN) or 0) > 0
    (entry,) = list_store()
    assert (entry["key"], entry["state"], entry["epochs"]) == (run_key(FOUR_RUN), "finished", 4)


def test_training_needs_nothing_of_the_global_generator():
    load_or_train(QUICK_RUN)
    first = sha(QUICK_RUN)
    torch.manual_seed(12345)
    before = torch.get_rng_state()
    folder(QUICK_RUN).rename(paths.runs() / "elsewhere")
    load_or_train(QUICK_RUN)
    assert sha(QUICK_RUN) == first
    assert torch.equal(torch.get_rng_state(), before)


# ---- kills ----


def train_and_stand_still(run: Run, epoch: int, marker: Path) -> None:
    """Train, and wait to be killed once the checkpoint of ``epoch`` is written."""

    def wait(state: TrainingState) -> None:
        if state.epoch == epoch:
            marker.touch()
            time.sleep(300)

    load_or_train(run, callbacks=[wait])


def kill_at(run: Run, epoch: int, marker: Path) -> None:
    """Train in another process and end it with SIGKILL after ``epoch``."""
    process = get_context("spawn").Process(target=train_and_stand_still, args=(run, epoch, marker))
    process.start()
    deadline = time.monotonic() + 120
    while not marker.exists() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.join()
    assert marker.exists()
    assert process.exitcode == -signal.SIGKILL


def test_a_killed_training_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = RICH_RUN
    kill_at(run, 3, tmp_path / "reached")
    assert not is_finished(run)
    assert epochs_done(run) == 3
    assert [entry["state"] for entry in list_store() if entry["key"] == run_key(run)] == ["epoch 3 of 5"]
    seen: list[int] = []
    load_or_train(run, callbacks=[lambda state: seen.append(state.epoch)])
    resumed, rows = sha(run), history(run)
    assert seen == [4, 5]
    assert not (folder(run) / "checkpoint.safetensors").exists()

    monkeypatch.setenv("KDIGA_RUNS", str(tmp_path / "uninterrupted"))
    load_or_train(run)
    assert sha(run) == resumed
    assert [row | {"seconds": 0} for row in history(run)] == [row | {"seconds": 0} for row in rows]


def train_and_log(run: Run, log: Path) -> None:
    def note(state: TrainingState) -> None:
        with log.open("a") as file:
            file.write(f"{os.getpid()} {state.epoch}\n")
        time.sleep(0.3)  # long enough that the other process finds the lock taken

    net = load_or_train(run, callbacks=[note])
    digest = hashlib.sha256(b"".join(v.numpy().tobytes() for v in net.state_dict().values())).hexdigest()
    log.with_name(f"returned-{os.getpid()}").write_text(digest)


def test_two_processes_on_one_key_train_it_once(tmp_path: Path):
    log = tmp_path / "log"
    context = get_context("spawn")
    processes = [context.Process(target=train_and_log, args=(FOUR_RUN, log)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    lines = [line.split() for line in log.read_text().splitlines()]
    assert [int(epoch) for _, epoch in lines] == [1, 2, 3, 4]
    assert len({pid for pid, _ in lines}) == 1
    returned = [path.read_text() for path in tmp_path.glob("returned-*")]
    assert len(returned) == 2
    assert len(set(returned)) == 1


# ---- damage ----


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def garble(path: Path) -> None:
    path.write_bytes(b"\xff" * 64)


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES = [truncate, flip_a_bit, garble, empty, Path.unlink]


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        *(("model.safetensors", damage) for damage in DAMAGES),
        *(("run.json", damage) for damage in (truncate, garble, empty)),
        ("history.csv", Path.unlink),
    ],
)
def test_a_damaged_run_is_set_aside_and_trained_again(
    file: str, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
):
    load_or_train(QUICK_RUN)
    first = sha(QUICK_RUN)
    damage(folder(QUICK_RUN) / file)
    seen: list[int] = []
    with caplog.at_level(logging.WARNING, "kdiga"):
        load_or_train(QUICK_RUN, callbacks=[lambda state: seen.append(state.epoch)])
    assert seen == [1]
    assert sha(QUICK_RUN) == first
    (aside,) = paths.runs().glob(f"{run_key(QUICK_RUN)}.damaged-*")
    assert aside.name in caplog.text
    assert "damaged" in caplog.text
    caplog.clear()
    load_or_train(QUICK_RUN)
    assert caplog.text == ""


class Stopped(Exception):
    """Ends a training from a callback."""


def leave_unfinished(run: Run, epoch: int) -> Path:
    def stop(state: TrainingState) -> None:
        if state.epoch == epoch:
            raise Stopped

    with pytest.raises(Stopped):
        load_or_train(run, callbacks=[stop])
    return folder(run) / "checkpoint.safetensors"


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, garble, empty])
def test_a_damaged_checkpoint_means_training_from_the_start(
    damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
):
    damage(leave_unfinished(FOUR_RUN, 2))
    seen: list[int] = []
    with caplog.at_level(logging.WARNING, "kdiga"):
        load_or_train(FOUR_RUN, callbacks=[lambda state: seen.append(state.epoch)])
    assert seen == [1, 2, 3, 4]
    assert "training from the start" in caplog.text
    assert run_key(FOUR_RUN) in caplog.text


def test_no_half_written_file_is_left_behind():
    leave_unfinished(FOUR_RUN, 3)
    assert {path.name for path in folder(FOUR_RUN).iterdir()} == {"checkpoint.safetensors"}


# ---- measures ----

CALLS: list[str] = []


@dataclass(frozen=True)
class Counted(Measure):
    """A measure that says when it is taken."""

    size: int = 10

    def __call__(
        self, model: nn.Module, data: Data, *, reference: nn.Module | None = None, state: Path | None = None
    ) -> dict[str, Any]:
        CALLS.append(data.name)
        return {"percent": 50.0, "n": self.size}


@pytest.fixture(autouse=True)
def no_calls() -> None:
    CALLS.clear()


def test_measured_once():
    first = measure(QUICK_RUN, Counted())
    assert measure(QUICK_RUN, Counted()) == first == measured(QUICK_RUN, Counted())
    assert CALLS == ["digits"]
    assert first["percent"] == 50.0
    assert first["seconds"] >= 0


def test_measures_do_not_stand_in_for_each_other():
    measure(QUICK_RUN, Counted())
    for other, reference in ((Counted(11), None), (Counted(), QUICK_RUN), (Counted(), FOUR_RUN)):
        assert measured(QUICK_RUN, other, reference=reference) is None
        measure(QUICK_RUN, other, reference=reference)
    assert len(CALLS) == 4
    assert len(json.loads((folder(QUICK_RUN) / "measures.json").read_text())) == 4


def test_a_measure_is_named_by_all_its_fields():
    names = {measure_name(TestAccuracy(attack, images)) for attack in (None, ATTACK, FGSM(0.1)) for images in (None, 5)}
    assert len(names) == 6


@pytest.mark.parametrize("damage", [truncate, garble, empty, Path.unlink, lambda path: path.write_text("[]")])
def test_damaged_measures_are_taken_again(damage: Callable[[Path], Any]):
    measure(QUICK_RUN, Counted())
    weights = sha(QUICK_RUN)
    damage(folder(QUICK_RUN) / "measures.json")
    assert measured(QUICK_RUN, Counted()) is None
    measure(QUICK_RUN, Counted())
    assert len(CALLS) == 2
    assert sha(QUICK_RUN) == weights


def test_an_interrupted_autoattack_goes_on_behind_its_last_member(monkeypatch: pytest.MonkeyPatch):
    ensemble = TestAccuracy(AutoAttack(0.001), 100)
    ran: list[str] = []
    library = AutoAttack._run

    def interrupted(self: AutoAttack, member: str, *args: Any) -> Any:
        ran.append(member)
        if ran == ["apgd-ce", "apgd-t"]:
            raise KeyboardInterrupt
        return library(self, member, *args)

    monkeypatch.setattr(AutoAttack, "_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure(QUICK_RUN, ensemble)
    (partial,) = folder(QUICK_RUN).glob("partial-*")
    survivors = json.loads(partial.read_text())["survivors"]
    assert list(survivors) == ["clean", "apgd-ce"]
    result = measure(QUICK_RUN, ensemble)
    assert ran[:3] == ["apgd-ce", "apgd-t", "apgd-t"]
    assert ran.count("apgd-ce") == 1
    assert result["members"]["apgd-ce"] == pytest.approx(sum(survivors["apgd-ce"]))
    assert list(result["members"]) == ["clean", "apgd-ce", "apgd-t", "fab-t", "square"]
    assert not partial.exists()


# ---- disks ----


def test_a_store_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("KDIGA_RUNS", str(tmp_path / "file" / "runs"))
    with pytest.raises(StoreError, match="cannot be written") as error:
        load_or_train(QUICK_RUN)
    assert str(tmp_path / "file" / "runs") in only_line(error)


def train_on_a_small_disk(runs: list[Run], limit: int, answer: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    messages = []
    for run in runs:
        try:
            load_or_train(run)
        except StoreError as error:
            messages.append(str(error))
    answer.write_text(json.dumps(messages))


def test_a_disk_that_fills_up(tmp_path: Path):
    load_or_train(QUICK_RUN)
    finished = sha(QUICK_RUN)
    # One fails at its weights, the other at its first checkpoint.
    runs = [replace(QUICK_RUN, seed=1), replace(FOUR_RUN, seed=1)]
    process = get_context("spawn").Process(target=train_on_a_small_disk, args=(runs, 20_000, tmp_path / "answer"))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    messages = json.loads((tmp_path / "answer").read_text())
    for run, file, message in zip(runs, ("model", "checkpoint"), messages, strict=True):
        assert message.startswith(f"{run_key(run)}/{file}.safetensors cannot be written: ")
        assert "\n" not in message
        assert not is_finished(run)
    assert not list(paths.runs().glob("*/*.partial"))
    load_or_train(QUICK_RUN)
    assert sha(QUICK_RUN) == finished
    load_or_train(runs[0])
    assert is_finished(runs[0])


# ---- checkpoints from outside ----


def digits_small(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_model("digits_small", num_classes=10, image_shape=(1, 8, 8)).eval()


class Malicious:
    """Runs code when it is unpickled in good faith."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def save_as(kind: str, path: Path) -> None:
    state = digits_small().state_dict()
    first = next(iter(state))
    match kind:
        case "none":
            pass
        case "not a torch file":
            path.write_text("weights")
        case "an empty file":
            path.touch()
        case "a missing key":
            torch.save({k: v for k, v in state.items() if k != first}, path)
        case "a foreign key":
            torch.save(state | {"other.weight": torch.zeros(3)}, path)
        case "another shape":
            torch.save(state | {first: torch.zeros(1)}, path)
        case "a tensor":
            torch.save(torch.zeros(3), path)
        case "no tensors":
            torch.save(dict.fromkeys(state, 3), path)
        case "wrapped":
            torch.save({"state_dict": state}, path)
        case "malicious":
            torch.save({first: Malicious(path.with_name("owned"))}, path)
        case "malicious, older":
            path.write_bytes(pickle.dumps(Malicious(path.with_name("owned"))))
        case _:
            torch.save(state, path)


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("none", {}, "there is no such file"),
        ("not a torch file", {}, "not a state_dict file"),
        ("an empty file", {}, "not a state_dict file"),
        ("not a torch file", {"format": "safetensors"}, "not a safetensors file"),
        ("fine", {"format": "safetensors"}, "not a safetensors file"),
        ("a missing key", {}, "missing"),
        ("a foreign key", {}, "other.weight"),
        ("another shape", {}, "shape"),
        ("a tensor", {}, "not a state_dict"),
        ("no tensors", {}, "not a state_dict"),
        ("wrapped", {}, "not a state_dict"),
        ("malicious", {}, "not a state_dict file"),
        ("malicious, older", {}, "not a state_dict file"),
        ("fine", {"sha256": "0" * 64}, "sha256"),
        ("fine", {"model": None}, "model must name"),
        ("fine", {"model": "digits_small"}, "model must name"),
        ("fine", {"model": "digits_wide:digits"}, "shape"),
    ],
)
def test_a_checkpoint_that_cannot_be_used(kind: str, changes: dict[str, Any], says: str, tmp_path: Path):
    path = tmp_path / "checkpoint.pt"
    save_as(kind, path)
    with pytest.raises(StoreError, match=says) as error:
        load_or_train(replace(Checkpoint(str(path), model="digits_small:digits"), **changes))
    assert str(path) in only_line(error)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("model", ["nonsense:digits", "digits_small:nonsense"])
def test_a_checkpoint_of_an_unknown_net_or_data_set(model: str, tmp_path: Path):
    save_as("fine", tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"must be one of digits.*, got 'nonsense'") as error:
        load_or_train(Checkpoint(str(tmp_path / "checkpoint.pt"), model=model))
    only_line(error)


def test_an_unknown_format_is_refused_at_once():
    with pytest.raises(ValueError, match=r"format must be one of state_dict, safetensors, .*, got 'pickle'"):
        Checkpoint("x.pt", format="pickle")


@pytest.mark.parametrize("kind", ["state_dict", "safetensors"])
def test_a_checkpoint_predicts_what_its_net_did(kind: str, tmp_path: Path):
    net, path = digits_small(4), tmp_path / "weights"
    if kind == "state_dict":
        torch.save(net.state_dict(), path)
    else:
        safetensors.torch.save_file(net.state_dict(), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    loaded = load_or_train(Checkpoint(str(path), digest, kind, "digits_small:digits"))
    x = load_data("digits").test.images[:20]
    with torch.no_grad():
        assert torch.equal(loaded(x), net(x))
    assert not loaded.training


def test_runs_stand_on_checkpoints(tmp_path: Path):
    save_as("fine", tmp_path / "weights.pt")
    source = Checkpoint(str(tmp_path / "weights.pt"), model="digits_small:digits")
    run = Run("digits", "digits_small", KD(), QUICK, teacher=source, init=source)
    assert run_all([Job(run)], workers=1).made == 1
    assert not torch.equal(load_or_train(run).state_dict()["head.weight"], digits_small().state_dict()["head.weight"])


# ---- many runs ----

TOP = QUICK_RUN
LEFT = Run("digits", "digits_small", KD(), QUICK, seed=1, teacher=TOP)
RIGHT = Run("digits", "digits_small", KDIGA(), QUICK, seed=2, teacher=TOP)
BOTTOM = Run("digits", "digits_small", KD(), QUICK, seed=3, teacher=LEFT, init=RIGHT)
DIAMOND = [TOP, LEFT, RIGHT, BOTTOM]


def test_a_diamond_is_done_once_whoever_does_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    jobs = [Job(BOTTOM), Job(BOTTOM, TestAccuracy(None, 50)), Job(LEFT), Job(BOTTOM)]
    results = []
    for workers in (1, 2):
        monkeypatch.setenv("KDIGA_RUNS", str(tmp_path / f"workers-{workers}"))
        steps: list[tuple[int, int, str]] = []
        outcome = run_all(jobs, workers=workers, progress=lambda *step: steps.append(step))  # noqa: B023
        assert (outcome.made, outcome.cached, outcome.failed) == (5, 0, {})
        assert steps[-1][:2] == (5, 5)
        again = run_all(jobs, workers=workers)
        assert (again.made, again.cached) == (0, 5)
        results.append([*map(sha, DIAMOND), measured(BOTTOM, TestAccuracy(None, 50)) | {"seconds": 0}])  # pyright: ignore
    assert results[0] == results[1]


def test_an_executor_of_ones_own():
    with ThreadPoolExecutor(1) as executor:
        outcome = run_all([Job(LEFT), Job(LEFT, Counted())], executor=executor)
    assert (outcome.made, outcome.failed) == (3, {})
    assert CALLS == ["digits"]


def test_numbers_that_are_not_finite_stop_a_run_and_are_named():
    with pytest.raises(TrainingError, match=r"the term cross_entropy is \w+ at epoch 1, step \d of 5") as error:
        load_or_train(HOPELESS)
    only_line(error)
    assert not is_finished(HOPELESS)


@pytest.mark.parametrize("executor", [None, ThreadPoolExecutor(1)], ids=["in turn", "scheduled"])
def test_a_failure_takes_its_heirs_with_it_and_no_others(executor: Executor | None):
    heir = replace(LEFT, teacher=HOPELESS)
    grandchild = replace(QUICK_RUN, seed=5, init=heir)
    good = [Job(LEFT), Job(TOP, TestAccuracy(None, 20))]
    lost = [Job(grandchild), Job(heir), Job(HOPELESS), Job(heir, TestAccuracy(None, 20))]
    outcome = run_all([*lost, *good], workers=1, executor=executor)
    assert set(outcome.failed) == set(lost)
    assert "cross_entropy" in outcome.failed[Job(HOPELESS)]
    assert run_key(HOPELESS) in outcome.failed[Job(heir)]
    assert outcome.made == 3
    assert all(job.is_done() for job in good)


@dataclass(frozen=True)
class Deadly(Measure):
    """A measure whose process does not survive it, as one that runs out of memory."""

    def __call__(
        self, model: nn.Module, data: Data, *, reference: nn.Module | None = None, state: Path | None = None
    ) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGKILL)
        return {}


def test_workers_of_a_machine_claim_different_gpus(tmp_path: Path):
    """Three processes and two places: the third shares one; a place is free again when its process ends."""
    program = "import sys, kdiga_nb.runs.graph as g; from pathlib import Path"
    program += f"; print(g.claimed_place(2, Path({str(tmp_path)!r})), flush=True); sys.stdin.read()"

    def worker() -> tuple[subprocess.Popen[str], int]:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": paths.ROOT}
        process = subprocess.Popen([sys.executable, "-c", program], **pipes)
        assert process.stdout is not None
        return process, int(process.stdout.readline())

    def end(process: subprocess.Popen[str]) -> None:
        process.communicate("")

    (first, a), (second, b), (third, c) = worker(), worker(), worker()
    assert (a, b) == (0, 1) and c in (0, 1)
    end(first)
    fourth, d = worker()
    assert d == 0
    for process in (second, third, fourth):
        end(process)


def test_a_worker_that_dies_is_a_failed_job():
    load_or_train(TOP)
    outcome = run_all([Job(TOP, Deadly()), *(Job(replace(TOP, seed=seed)) for seed in range(1, 5))], workers=2)
    assert Job(TOP, Deadly()) in outcome.failed
    assert outcome.made + len(outcome.failed) == 5


# ---- a switch that came later, and nets that are only measured ----


def test_a_later_switch_is_named_only_off_its_default():
    assert "align" not in describe(KDIGA())
    assert describe(KDIGA(align="logits"))["align"] == "logits"


def test_a_finished_run_is_found_by_its_key_as_a_checkpoint():
    run = Run("digits", "digits_small", ST(), Schedule(1, batch_size=256, augment=False))
    net = load_or_train(run, device="cpu")
    checkpoint = stored(run_key(run)[:8])
    assert checkpoint.model == "digits_small:digits" and checkpoint.sha256
    again = load_or_train(checkpoint, device="cpu")
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in again.state_dict().items())
    assert measure(checkpoint, TestAccuracy(None, 20)) | {"seconds": 0} == measure(run, TestAccuracy(None, 20)) | {
        "seconds": 0
    }
    # What is measured on a checkpoint has a place of its own, which is no run.
    assert [entry["key"] for entry in list_store()] == [run_key(run)]


@pytest.mark.parametrize(("key", "says"), [("ffff", "no finished run"), ("", "2 runs")])
def test_a_key_must_mean_one_run(key: str, says: str):
    for seed in (0, 1):
        load_or_train(Run("digits", "digits_small", ST(), Schedule(1, batch_size=512, augment=False), seed))
    with pytest.raises(StoreError, match=says):
        stored(key)
