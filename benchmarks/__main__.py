"""Run every benchmark in its own process: ``make bench``.

    python benchmarks [NAME …]

The JSON of each benchmark is printed and saved as ``benchmarks/results/<name>.json``, with the command, the seconds and
the peak memory of the process.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HOME = Path(__file__).parent
BF16_MODELS = ("mobilenet_v2", "preact_resnet18")
ATTACKED = ("st", "kd", "kdiga", "trades_teacher", "isd_wot_1", "isd_wot_3", "isd_wot_6", "isd_wit_1", "penalty",
            "trades_student")  # fmt: skip
BENCHMARKS = {
    "steps": ["steps.py", "--scaling"],
    **{
        f"memory_{kind}": ["step_memory.py", "--teacher", "mobilenet_v2", "--method", kind]
        for kind in ("st", "kdiga", "textbook", "igdm")
    },
    **{f"bfloat16_{model}": ["steps.py", "--precision", "bfloat16", "--model", model] for model in BF16_MODELS},
    "distillations": ["distillations.py"],
    **{
        f"compiled_{name}": ["compiled_step.py", "--model", name, "--precision", precision]
        for name, precision in (("mobilenet_v2", "float32"), ("cifar_cnn", "bfloat16"))
    },
    "finite_differences": ["finite_differences.py"],
    "attacks": ["attacks.py"],
    "autoattack_verdicts": ["attacks.py", "--seeds", "3", "--images", "100", *(f"--row={row}" for row in ATTACKED)],
    "autoattack_cifar10": ["attacks.py", "--scale=cifar10_cpu", "--row=st", "--row=kdiga", "--images=8", "--rounds=1"],
    "autoattack_all_images": ["all_images.py"],
    "explorer": ["explorer.py"],
    "start": ["start.py"],
    "reproduce_smoke": ["reproduce.py", "--scale", "smoke"],
    "reproduce": ["reproduce.py", "--studies", "published"],
    "reproduce_studies": ["reproduce.py"],
}


def run(script: str, *options: str) -> dict[str, Any]:
    """The JSON of one benchmark, with the seconds and the peak memory of its process."""
    with tempfile.TemporaryFile("w+") as out:
        started = time.perf_counter()
        process = subprocess.Popen([sys.executable, str(HOME / script), *options], stdout=out)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"error: {script} ended with status {process.returncode}")
        out.seek(0)
        result = json.load(out)
    return {
        "command": " ".join(["python", f"benchmarks/{script}", *options]),
        "seconds": round(time.perf_counter() - started, 1),
        "peak_mib": usage.ru_maxrss // 1024,
        "result": result,
    }


def main() -> None:
    """Run the benchmarks named on the command line; without names, all of them."""
    names = sys.argv[1:] or list(BENCHMARKS)
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        sys.exit(f"error: benchmarks are {', '.join(BENCHMARKS)}, got {unknown[0]!r}")
    (HOME / "results").mkdir(exist_ok=True)
    for name in names:
        text = json.dumps(run(*BENCHMARKS[name]), indent=1)
        (HOME / "results" / f"{name}.json").write_text(text + "\n")
        print(f"{name}: {text}", flush=True)


if __name__ == "__main__":
    main()
