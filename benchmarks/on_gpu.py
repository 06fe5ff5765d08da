"""The kit on a GPU: is it right there, how fast is it, and the trainings of CIFAR-10 in the order of their worth.

    python benchmarks/on_gpu.py check [--seconds 5]      gradients against CPU float64, waits, shared GPU
    python benchmarks/on_gpu.py speed                    ms, kernels, memory and share of the ceiling of ST and KDIGA
    python benchmarks/on_gpu.py learn [--minutes 8]      train and measure ``cifar10_cpu`` (``--device cpu`` rehearses)
    python benchmarks/on_gpu.py pack FOLDER              records, measures and float16 weights as few, small archives

``learn`` keeps several processes on one GPU, because one process cannot launch kernels fast enough to fill the GPU. It
may be killed at any moment: finished nets are in the store ($KDIGA_RUNS), and the next start continues. It needs torch,
torchvision, timm, scikit-learn, pydantic and pyautoattack, CIFAR-10 in $KDIGA_DATA, and no network.
"""

import argparse
import math
import multiprocessing
import os
import tarfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from steps import Flops, Where, ceiling
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kdiga_nb import paths
from kdiga_nb.artifacts.recipes import standard_training, table1_runs
from kdiga_nb.attacks.autoattack import AutoAttack
from kdiga_nb.attacks.gradient import PGD, evaluation_pgd
from kdiga_nb.measures import Measure, TestAccuracy, ValidationAccuracy
from kdiga_nb.methods import ARD, AT, KD, KDIGA, KDIGA_ARD_A, KDIGA_ARD_C, ST, TRADES, GradientPenalty, Method
from kdiga_nb.models import build_model
from kdiga_nb.numerics.scopes import Autocast, computing, placed
from kdiga_nb.params import Table1Params, at_scale, parse_override
from kdiga_nb.runs import Run
from kdiga_nb.runs.graph import Job, do, title
from kdiga_nb.runs.run import run_key
from kdiga_nb.runs.store import halve_weights, measured

SHAPE = (3, 32, 32)
ATTACK = PGD(8 / 255, 2 / 255, 2)
METHODS: dict[str, Method] = {
    "ST": ST(),
    "KD": KD(),
    "KDIGA": KDIGA(),
    "KDIGA, zero": KDIGA(target_gradient="zero"),
    "KDIGA, shuffled": KDIGA(target_gradient="shuffled"),
    "KDIGA, logits": KDIGA(align="logits"),
    "gradient penalty": GradientPenalty(),
    "ARD": ARD(ATTACK),
    "KDIGA-ARD_C": KDIGA_ARD_C(ATTACK),
    "KDIGA-ARD_A": KDIGA_ARD_A(ATTACK),
    "AT": AT(ATTACK),
    "TRADES": TRADES(ATTACK),
}


def say(*words: object) -> None:
    print(time.strftime("%H:%M:%S"), *words, flush=True)


# ---- check ----


def net(name: str, seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(name, num_classes=10, image_shape=SHAPE, head_dropout=0.0).to(dtype).train()


def batch(n: int, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, *SHAPE, generator=generator, dtype=torch.float64)
    return x.to(device, dtype), torch.randint(10, (n,), generator=generator).to(device)


def gradient(name: str, device: str, dtype: torch.dtype, layout: torch.memory_format, bf16: bool) -> Tensor:
    """KDIGA's gradient with respect to all parameters of a student of this kind, as one float64 vector on the CPU."""
    student, teacher = (net(name, seed, dtype).to(device) for seed in (0, 1))
    for one in (student, teacher):
        one.to(memory_format=layout)  # pyright: ignore[reportCallIssue] (missing in the stubs)
    teacher.eval().requires_grad_(False)
    models = [Autocast(one, torch.device(device)) if bf16 else one for one in (student, teacher)]
    terms = KDIGA()(models[0], models[1], *batch(16, device, dtype))
    grads = torch.autograd.grad(torch.stack(list(terms.values())).sum(), list(student.parameters()))
    return torch.cat([one.flatten().double().cpu() for one in grads])


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True


def check_gradients(device: str) -> None:
    say("KDIGA's parameter gradient against CPU float64: relative error, cosine")
    for name in ("cifar_cnn", "mobilenet_v2", "preact_resnet18", "digits_vit"):
        true = gradient(name, "cpu", torch.float64, torch.contiguous_format, False)
        for layout in (torch.contiguous_format, torch.channels_last):
            for words, allowed, bf16 in (("float32", False, False), ("TF32", True, False), ("bf16", False, True)):
                with tf32(allowed):
                    got = gradient(name, device, torch.float32, layout, bf16)
                error = (got - true).norm() / true.norm()
                cosine = torch.dot(got, true) / got.norm() / true.norm()
                say(f"  {name}, {str(layout)[6:]}, {words}: {error:.2e}, {cosine:.5f}")


def stepper(
    name: str, method: Method, n: int, device: str, bf16: bool = True, layout: torch.memory_format | None = None
) -> Callable[[], Any]:
    """A training step on the device, ready to be repeated; student and teacher are of the same kind."""
    where = torch.device(device)
    student, other = placed(net(name, 0), where), placed(net(name, 1), where).eval().requires_grad_(False)
    if layout is not None:
        for one in (student, other):
            one.to(memory_format=layout)  # pyright: ignore[reportCallIssue] (missing in the stubs)
    optimizer = torch.optim.SGD(student.parameters(), 0.01, momentum=0.9, fused=where.type == "cuda")
    x, y = batch(n, device)
    models = [Autocast(one, where) if bf16 else one for one in (student, other)]

    def step() -> None:
        terms = method(models[0], models[1], x, y)
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward(inputs=list(student.parameters()))
        optimizer.step()

    return step


def milliseconds(step: Callable[[], Any], device: str, rounds: int) -> float:
    def finish() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        step()
    finish()
    started = time.perf_counter()
    for _ in range(rounds):
        step()
    finish()
    return 1000 * (time.perf_counter() - started) / rounds


def check_waits(device: str) -> None:
    """Every method's step must run without waiting for the GPU."""
    for words, method in METHODS.items():
        step = stepper("cifar_cnn", method, 8, device)
        step()
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            step()
            say(f"  {words}: no wait")
        except RuntimeError as error:
            say(f"  {words}: {str(error).splitlines()[0]}")
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")


def _count_steps(arguments: tuple[str, float]) -> int:
    device, seconds = arguments
    step, done = stepper("cifar_cnn", KDIGA(), 256 if device == "cuda" else 4, device), 0
    for _ in range(3):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        done += 1
    return done


def check_sharing(device: str, seconds: float, processes: int) -> None:
    """Steps per second of one process and of several that share the GPU."""
    context = multiprocessing.get_context("spawn")
    for number in (1, processes):
        with context.Pool(number) as pool:
            done = sum(pool.map(_count_steps, [(device, seconds)] * number, chunksize=1))
        say(f"  {number} processes: {done / seconds:.0f} KDIGA steps per second in all")


def check(arguments: argparse.Namespace) -> None:
    device = arguments.device
    say(torch.__version__, torch.cuda.get_device_name() if device == "cuda" else "CPU", os.cpu_count(), "cores")
    parts: dict[str, Callable[[], None]] = {
        "waits": lambda: check_waits(device),
        "sharing": lambda: check_sharing(device, arguments.seconds, arguments.workers),
        "gradients": lambda: check_gradients(device),
    }
    for part in arguments.only or parts:
        say(part)
        parts[part]()


# ---- speed ----


class Calls(TorchDispatchMode):
    """Counts operators and the floating-point operations of convolutions and matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.operators, self.flops = 0, Flops()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += 1
        with self.flops:
            return func(*args, **(kwargs or {}))


def kernels(step: Callable[[], Any]) -> int:
    """GPU kernels that a step launches."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA)


def speed(arguments: argparse.Namespace) -> None:
    """One line per net, layout, precision and batch; a combination that does not fit says so."""
    device, on_gpu = arguments.device, arguments.device == "cuda"
    where, rounds = torch.device(device), 20 if on_gpu else 1
    layouts = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
    top = {precision: ceiling(Where(where, precision)) for precision in ("float32", "bfloat16")}
    say({precision: f"{value / 1e12:.1f} TFLOP/s" for precision, value in top.items()}, "one large matrix product")
    sizes = [size if on_gpu else size // 64 for size in arguments.batch]
    nets = ("cifar_cnn", "mobilenet_v2", "preact_resnet18")
    for name, size, layout, precision in product(nets, sizes, layouts, top):
        found: dict[str, float] = {}
        for words in ("ST", "KDIGA"):
            with computing(where):
                try:
                    step = stepper(name, METHODS[words], size, device, precision == "bfloat16", layouts[layout])
                    found[words] = milliseconds(step, device, rounds)
                except torch.OutOfMemoryError:
                    say(f"  {name}, batch {size}, {layout}, {precision}, {words}: out of memory")
                    break
                with Calls() as calls:
                    step()
                if on_gpu:
                    torch.cuda.reset_peak_memory_stats()
                    step()
                launched = f"{kernels(step)} kernels" if on_gpu else f"{calls.operators} operators"
                peak = f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB, " if on_gpu else ""
                share = calls.flops.total / found[words] * 1000 / top[precision]
                say(
                    f"  {name}, batch {size}, {layout}, {precision}, {words}: {found[words]:.2f} ms, {launched}, "
                    f"{peak}{100 * share:.1f} % of the ceiling"
                )
        if len(found) == 2:
            say(f"    KDIGA ÷ ST {found['KDIGA'] / found['ST']:.2f}")


# ---- learn ----


def _work(job: Job, device: str) -> None:
    do(job, device)
    if job.measure is None and isinstance(job.run, Run):
        halve_weights(job.run)


def _begin(threads: int) -> None:
    torch.set_num_threads(threads)


@dataclass
class Plan:
    """Jobs by priority (the smallest first), and what to plan as soon as a group of them is done."""

    waiting: list[tuple[int, Job]] = field(default_factory=list)
    later: list[tuple[list[Job], Callable[[], None]]] = field(default_factory=list)
    seen: set[Job] = field(default_factory=set)

    def add(self, priority: int, run: Run, *measures: Measure) -> list[Job]:
        """A training, what the training needs, and measurements of the net."""
        for source in (run.teacher, run.init):
            if isinstance(source, Run):
                self.add(priority, source)
        jobs = [Job(run), *(Job(run, measure) for measure in measures)]
        for job in jobs:
            if job not in self.seen:
                self.seen.add(job)
                self.waiting.append((priority, job))
        return jobs

    def next(self, running: set[Job]) -> Job | None:
        """The most important job whose needs are met; jobs that are already done are dropped."""
        for priority, job in sorted(self.waiting, key=lambda entry: entry[0]):
            if job.is_done():
                self.waiting.remove((priority, job))
            elif all(Job(run).is_done() and Job(run) not in running for run in job.needs()):
                self.waiting.remove((priority, job))
                return job
        return None

    def follow_up(self) -> None:
        for group, then in list(self.later):
            if all(job.is_done() for job in group):
                self.later.remove((group, then))
                then()


def plan_of(params: Table1Params, extra: list[Run]) -> Plan:
    """The rows of Table 1; weights λ are chosen on held-out training images as soon as a grid is trained."""
    plan = Plan()
    attack = evaluation_pgd(params.epsilon, params.pgd_steps, params.pgd_restarts)
    images = params.test_images or None
    test = (TestAccuracy(None, images), TestAccuracy(attack, images))
    held_out = (ValidationAccuracy(None), ValidationAccuracy(attack))
    strong = TestAccuracy(AutoAttack(params.epsilon), params.autoattack_images)

    chosen: dict[str, float] = {}

    def rows_of(**weights: float) -> dict[str, tuple[str, Any]]:
        return table1_runs(params.model_copy(update=chosen | weights))

    def row(priority: int, name: str, autoattack: int, rows: dict[str, tuple[str, Any]]) -> None:
        for index, run in enumerate(rows[name][1]):
            if isinstance(run, Run):
                plan.add(priority if not index else max(priority, 5) + index, run, *test)
                plan.add(autoattack + 2 * index, run, strong)

    def score(run: Run) -> float:
        """Mean of clean and PGD-20 accuracy on the held-out training images."""
        values = [measured(run, one) for one in held_out]
        return sum(value["percent"] for value in values if value is not None) / len(values)

    def grid(priority: int, name: str, weight: str, values: tuple[float, ...], rows: tuple[str, ...]) -> list[Job]:
        runs = {value: rows_of(**{weight: value})[name][1][0] for value in values}
        group = [job for run in runs.values() for job in plan.add(priority, run, *held_out)]

        def choose() -> None:
            scores = {value: score(run) for value, run in runs.items()}
            best = max(scores, key=lambda value: scores[value])
            chosen[weight] = best
            say("chosen", weight, best, {value: round(one, 2) for value, one in scores.items()})
            for run in runs.values():
                plan.add(4, run, *test)
            for one in rows:
                row(priority, one, 8, rows_of())

        plan.later.append((group, choose))
        return group

    rows = rows_of()
    for name in ("trades_teacher", "st"):
        row(0, name, 7, rows)
    for run in extra:
        plan.add(1, run, *test)
    loops = tuple(f"isd_wot_{loop}" for loop in range(1, params.loops + 1))
    isd = grid(1, "isd_wot_1", "lambda_isd", (1.0, 10.0, 100.0), (*loops, "isd_wot_1_zero"))
    aligned = ("kdiga", "kdiga_shuffled", "kdiga_ard_a", "kdiga_ard_c")
    kdiga = grid(2, "kdiga", "lambda_iga", (0.3, 1.0, 3.0, 10.0), aligned)
    grid(2, "kdiga_zero", "lambda_zero", (0.3, 1.0, 3.0, 10.0), ("kdiga_zero",))
    grid(2, "penalty", "lambda_penalty", (0.1, 0.3, 1.0, 3.0), ("penalty",))

    def with_teacher() -> None:
        for loop in range(1, params.wit_loops + 1):
            row(3, f"isd_wit_{loop}", 8, rows_of())

    plan.later.append((isd + kdiga, with_teacher))
    for name in ("kd", "ard", "trades_student", "pgd_student"):
        row(3, name, 8, rows)
    row(6, "pgd_teacher", 10, rows)
    return plan


def paper_net(epochs: int, loops: int) -> list[Run]:
    """ST and ISD-WoT of MobileNetV2, the paper's student, on a short schedule."""
    short = {"epochs": epochs, "isd_epochs": max(1, epochs // 2), "policy": "one_cycle", "milestones": []}
    rest = {"selection": "last", "batch_size": 256, "weight_decay": 5e-4, "learning_rate": 0.2, "clip_norm": 1.0}
    more = {"loops": max(1, loops), "learning_rate_decay": 1.0}
    params = at_scale(Table1Params, "cifar10", short | rest | more)
    rows = table1_runs(params)
    loop_runs = [run for loop in range(1, loops + 1) for run in rows[f"isd_wot_{loop}"][1] if isinstance(run, Run)]
    return [standard_training(params)[0], *loop_runs]


def learn(arguments: argparse.Namespace) -> None:
    params = at_scale(Table1Params, "cifar10_cpu", dict(parse_override(text) for text in arguments.set))
    plan = plan_of(params, paper_net(arguments.paper_epochs, arguments.paper_loops) if arguments.paper_epochs else [])
    end = time.monotonic() + 60 * arguments.minutes
    running: dict[Future[None], tuple[Job, float]] = {}
    threads = max(1, (os.cpu_count() or 1) // arguments.workers)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.workers, context, _begin, (threads,)) as pool:
        while time.monotonic() < end:
            plan.follow_up()
            while len(running) < arguments.workers:
                job = plan.next({job for job, _ in running.values()})
                if job is None:
                    break
                running[pool.submit(_work, job, arguments.device)] = job, time.monotonic()
            if not running:
                break
            for future in wait(running, timeout=1, return_when=FIRST_COMPLETED).done:
                job, started = running.pop(future)
                say(describe(job, future.exception(), time.monotonic() - started))
        say("over;", len(running), "jobs running,", len(plan.waiting), "waiting")
        for process in (pool._processes or {}).values():
            process.kill()


def describe(job: Job, error: BaseException | None, seconds: float) -> str:
    """A finished job in one line."""
    words = f"{title(job)} {run_key(job.run)[:6]} {seconds:.0f} s"
    if error is not None:
        return f"FAILED {words}: {error}"
    if job.measure is None:
        return words
    result = measured(job.run, job.measure) or {}
    attack = getattr(job.measure, "attack", None)
    return f"{words} {type(job.measure).__name__} {type(attack).__name__}: {result.get('percent', math.nan):.2f}"


# ---- pack ----


def pack(arguments: argparse.Namespace) -> None:
    """``records.tar.gz`` with everything but the weights, and the weights in order of priority in tars of 15 MB."""
    out, limit = Path(arguments.folder), 15 * 2**20
    homes = sorted(path.parent for path in paths.runs().glob("*/run.json"))
    with tarfile.open(out / "records.tar.gz", "w:gz") as archive:
        for home in homes:
            for name in ("run.json", "history.csv", "measures.json"):
                if (home / name).exists():
                    archive.add(home / name, f"{home.name}/{name}")
    order = {run_key(run): index for index, run in enumerate(first_rows())}
    files = sorted((home / "model.safetensors" for home in homes), key=lambda path: order.get(path.parent.name, 999))
    parts: list[list[Path]] = [[]]
    for path in files:
        if sum(one.stat().st_size for one in [*parts[-1], path]) > limit:
            parts.append([])
        parts[-1].append(path)
    for index, part in enumerate(parts[: arguments.parts]):
        with tarfile.open(out / f"weights_{index}.tar", "w") as archive:
            for path in part:
                archive.add(path, f"{path.parent.name}/{path.name}")
    say(len(homes), "runs packed,", sum(len(part) for part in parts[: arguments.parts]), "with weights")


def first_rows() -> list[Run]:
    """The runs of Table 1 at the file's settings, first seeds first."""
    rows = [runs for _, runs in table1_runs(at_scale(Table1Params, "cifar10_cpu")).values() if runs]
    longest = max(len(runs) for runs in rows)
    picked = [runs[index] for index in range(longest) for runs in rows if index < len(runs)]
    return [run for run in picked if isinstance(run, Run)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("check")
    one.add_argument("--seconds", type=float, default=5, help="how long ``sharing`` counts steps")
    one.add_argument("--only", nargs="*", choices=["waits", "sharing", "gradients"])
    four = commands.add_parser("speed")
    four.add_argument("--batch", type=int, nargs="*", default=[128, 512])
    two = commands.add_parser("learn")
    two.add_argument("--minutes", type=float, default=8)
    two.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    two.add_argument("--paper-epochs", type=int, default=0, help="also MobileNetV2's ST for so many epochs; 0: not")
    two.add_argument("--paper-loops", type=int, default=1)
    for parser_ in (one, two, four):
        parser_.add_argument("--device", default="cuda")
        parser_.add_argument("--workers", type=int, default=12)
    three = commands.add_parser("pack")
    three.add_argument("folder")
    three.add_argument("--parts", type=int, default=4)
    arguments = parser.parse_args()
    {"check": check, "speed": speed, "learn": learn, "pack": pack}[arguments.command](arguments)


if __name__ == "__main__":
    main()
