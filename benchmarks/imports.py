"""How long do imports take?"""

from __future__ import annotations

import subprocess
import sys
import time

from benchmarks.measure import Result, spread


def _seconds(code: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - started


def run(repeats: int = 5) -> Result:
    rows = [
        [f"`{code}`", spread([_seconds(code) for _ in range(repeats)], " s")]
        for code in ("pass", "import dataflow.operators", "import dataflow.cli")
    ]
    return Result(
        question="How long do imports take?",
        aim="well under half a second",
        columns=["interpreter start and", "median (range)"],
        rows=rows,
    )


if __name__ == "__main__":
    print(run().markdown())
