"""All benchmarks, one after the other, each in a process of its own: ``make bench``.

Prints what each one prints and saves it as ``benchmarks/results/<name>.txt``.
"""

import subprocess
import sys
from pathlib import Path

HOME = Path(__file__).parent
BENCHMARKS = {
    "steps": ["steps.py", "--scaling"],
    **{
        f"memory_{kind}": ["step_memory.py", "--teacher", "mobilenet_v2", "--method", kind]
        for kind in ("st", "kdiga", "textbook")
    },
    "finite_differences": ["finite_differences.py"],
    "attacks": ["attacks.py"],
    "explorer": ["explorer.py"],
    "reproduce": ["reproduce.py", "--scale", "smoke"],
}


def main() -> None:
    """Run those that are named on the command line, or all."""
    names = sys.argv[1:] or list(BENCHMARKS)
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        sys.exit(f"error: benchmarks are {', '.join(BENCHMARKS)}, got {unknown[0]!r}")
    (HOME / "results").mkdir(exist_ok=True)
    for name in names:
        script, *options = BENCHMARKS[name]
        done = subprocess.run([sys.executable, str(HOME / script), *options], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"error: {script} ended with status {done.returncode}")
        (HOME / "results" / f"{name}.txt").write_text(done.stdout)
        print(f"{name}: {done.stdout}", flush=True)


if __name__ == "__main__":
    main()
