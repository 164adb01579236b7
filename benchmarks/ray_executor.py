"""How close does a Ray cluster come to the time that its work takes?"""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.measure import Result, run_python

SECONDS = 0.02
RUN = """
import json, sys, time
from pathlib import Path
from dataflow.io import ImageIO
from dataflow.operators import Text2ImageGenerator
from dataflow.runtime.engine import RunOptions
from dataflow.serving.fake_serving import FakeServing
from dataflow.utils.storage import FileStorage

folder, workers, rows, seconds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
folder.mkdir()
(folder / "in.jsonl").write_text("".join(f'{{"prompt": "thing {number}"}}\\n' for number in range(rows)))

class Clocked(FakeServing):
    async def generate(self, requests):
        began = time.time()
        results = await super().generate(requests)
        with (folder / "times").open("a") as file:
            file.write(f"{began} {time.time()}\\n")
        return results

many = {"executor": "ray", "workers": workers} if workers else {}
serving = Clocked(ImageIO(folder / "images"), seconds=seconds, size=(64, 64))
started = time.time()
storage = FileStorage(str(folder / "in.jsonl"), cache_path=str(folder / "cache"))
summary = Text2ImageGenerator(serving, options=RunOptions(quiet=True, **many)).run(storage.step(), "prompt", "images")
ended = time.time()
times = [tuple(map(float, line.split())) for line in (folder / "times").read_text().splitlines()]
first, last = min(began for began, _ in times), max(end for _, end in times)
print(json.dumps({"start": first - started, "work": last - first, "end": ended - last, "made": summary.made}))
"""


def run(rows: int = 10_000) -> Result:
    table = []
    with tempfile.TemporaryDirectory() as temporary:
        for workers in (0, 1, 2, 4):
            amount = rows if workers == 2 else rows // 5
            found = run_python(RUN, str(Path(temporary) / f"{workers}"), str(workers), str(amount), str(SECONDS))
            assert found["made"] == amount
            ideal = amount * SECONDS / max(1, workers)
            name = f"Ray, {workers} worker{'s' * (workers > 1)}" if workers else "in this process"
            table.append(
                [
                    f"{name}, {amount:,} rows",
                    f"{found['start']:.1f} s",
                    f"{found['work']:.1f} s",
                    f"{ideal:.1f} s",
                    f"{ideal / found['work']:.2f}",
                    f"{found['end']:.1f} s",
                ]
            )
    return Result(
        question="How close does a Ray cluster come to the time that its work takes?",
        aim="at least 0.9 of the ideal after start-up, with two workers",
        columns=["", "until the first request", "first to last request", "ideal", "share of it", "after the last"],
        rows=table,
        notes=[
            f"A serving that takes {SECONDS * 1000:.0f} ms for one picture of 64 × 64; the worker writes it.",
            "A cluster on this machine, begun for the run. Workers wait rather than compute: four fit on two cores.",
        ],
    )


if __name__ == "__main__":
    import sys

    print(run(*map(int, sys.argv[1:2])).markdown())
