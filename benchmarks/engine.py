"""What does the engine cost per request, when the serving costs nothing?"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure import Result, spread
from dataflow.io import ImageIO
from dataflow.operators import Text2ImageGenerator
from dataflow.runtime.engine import RunOptions
from dataflow.serving.fake_serving import FakeServing
from dataflow.types import GenerationRequest, GenerationResult, Serving
from dataflow.utils.storage import FileStorage


class NullServing(Serving):
    """Answers at once, with a word."""

    def __init__(self, batch_size: int, concurrency: int) -> None:
        self.batch_size, self.concurrency = batch_size, concurrency

    def fingerprint(self) -> dict[str, str]:
        return {"model": "null"}

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        return [GenerationResult(text="x") for _ in requests]


def _table(folder: Path, rows: int) -> str:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"conversations": f"prompt {n}", "images": [""]}) + "\n" for n in range(rows)))
    return str(path)


def _milliseconds(serving: Serving, table: str, folder: Path, rows: int) -> float:
    storage = FileStorage(table, cache_path=str(folder))
    started = time.perf_counter()
    summary = Text2ImageGenerator(serving, options=RunOptions(quiet=True)).run(storage.step())
    seconds = time.perf_counter() - started
    assert summary.done == rows
    return seconds * 1000 / rows


def run(rows: int = 20_000, repeats: int = 3) -> Result:
    cases = {
        "text, batches of 1, 1 at once": lambda _: NullServing(1, 1),
        "text, batches of 1, 64 at once": lambda _: NullServing(1, 64),
        "text, batches of 16, 1 at once": lambda _: NullServing(16, 1),
        "64 × 64 PNG drawn and written, batches of 16": lambda folder: FakeServing(
            ImageIO(folder / "images"), batch_size=16
        ),
    }
    table_rows = []
    for name, make in cases.items():
        costs = []
        for _ in range(repeats):
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary)
                count = rows if "text" in name else rows // 10
                costs.append(_milliseconds(make(folder), _table(folder, count), folder / "cache", count))
        table_rows.append([name, spread(costs, " ms")])
    return Result(
        question="What does the engine cost per request?",
        aim="0.3 ms at most with a serving that does nothing",
        columns=["case", "per request: median (range)"],
        rows=table_rows,
        notes=["Everything from reading the table to writing the step file, journal included."],
    )


if __name__ == "__main__":
    print(run().markdown())
