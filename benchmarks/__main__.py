"""All benchmarks, one after the other, each in a process of its own: ``make bench``.

    python benchmarks [NAME …]

Prints each one's JSON and saves it as ``benchmarks/results/<name>.json``, with the command, its seconds and the peak
memory of its process.
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
BENCHMARKS = {
    "steps": ["steps.py", "--scaling"],
    **{
        f"memory_{kind}": ["step_memory.py", "--teacher", "mobilenet_v2", "--method", kind]
        for kind in ("st", "kdiga", "textbook")
    },
    **{f"bfloat16_{model}": ["steps.py", "--precision", "bfloat16", "--model", model] for model in BF16_MODELS},
    "finite_differences": ["finite_differences.py"],
    "attacks": ["attacks.py"],
    "explorer": ["explorer.py"],
    "reproduce_smoke": ["reproduce.py", "--scale", "smoke"],
    "reproduce": ["reproduce.py"],
}


def run(script: str, *options: str) -> dict[str, Any]:
    """One benchmark's JSON, and what its process took."""
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
    """Run those that are named on the command line, or all."""
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
