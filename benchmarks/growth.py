"""How do time and memory grow with the rows of a table, up to millions?"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import orjson

from benchmarks.measure import Result, run_python

BASE = """
import json, sys, time
import orjson
started = time.perf_counter()
with open(sys.argv[1] + "/in.jsonl", "rb") as source, open(sys.argv[1] + "/copy.jsonl", "wb") as target:
    for line in source:
        target.write(orjson.dumps(orjson.loads(line)) + b"\\n")
print(json.dumps({"seconds": time.perf_counter() - started}))
"""
RUN = """
import json, sys, time
from dataflow.runtime.engine import RunOptions, execute
from dataflow.types import Draft, Drop, GenerationResult, Plan, Serving
from dataflow.utils.storage import FileStorage

class Null(Serving):
    batch_size = 256

    def fingerprint(self):
        return {"model": "null"}

    async def generate(self, requests):
        return [GenerationResult(text="yes") for _ in requests]

def asks(row):
    return [Draft(prompt=row["conversations"][0]["content"])]

def folded(row, outcomes):
    return {**row, "answer": outcomes[0].text}

def kept(row, outcomes):
    return Drop("every_tenth") if row["id"] % 10 == 0 else row

plans = [
    Plan(name="Null", inputs=("conversations",), outputs=("answer",), requests=asks, fold=folded, serving=Null()),
    Plan(name="Tenth", inputs=("answer",), outputs=(), requests=lambda row: (), fold=kept),
]
storage = FileStorage(sys.argv[1] + "/in.jsonl", cache_path=sys.argv[1] + "/cache")
found = {}
for plan, name in zip(plans, ("null", "filter"), strict=True):
    started = time.perf_counter()
    summary = execute(plan, storage.step(), RunOptions(quiet=True, progress=False))
    found[name] = time.perf_counter() - started
found["written"] = summary.written
print(json.dumps(found))
"""


def _table(folder: Path, rows: int) -> None:
    with (folder / "in.jsonl").open("wb") as file:
        for row in range(rows):
            prompt = f"a picture of thing number {row} on a table beside a window, late afternoon light"
            talk = [{"content": prompt, "role": "user"}]
            file.write(orjson.dumps({"id": row, "conversations": talk, "images": [""]}) + b"\n")


def measured(rows: int) -> dict[str, float]:
    """Seconds and memory for a table of so many rows."""
    with tempfile.TemporaryDirectory() as temporary:
        _table(Path(temporary), rows)
        base = run_python(BASE, temporary)
        first = run_python(RUN, temporary)
        again = run_python(RUN, temporary)
    assert first["written"] == again["written"] == rows - -(-rows // 10)
    return {
        "rows": rows,
        "base": base["seconds"],
        "null": first["null"],
        "filter": first["filter"],
        "again": again["null"],
        "peak_mb": max(first["peak_mb"], again["peak_mb"]),
    }


def run(most: int = 10_000_000) -> Result:
    found = [measured(10**power) for power in range(3, len(str(most)))]
    return Result(
        question="How do time and memory grow with the rows?",
        aim="memory that does not grow with the table, under 500 MB; going on over ten million rows in under 60 s",
        columns=["rows", "orjson alone", "null serving", "a row", "filter", "run again", "peak memory"],
        rows=[
            [
                f"{each['rows']:,}",
                f"{each['base']:.2f} s",
                f"{each['null']:.1f} s ({each['null'] / each['base']:.0f} ×)",
                f"{each['null'] / each['rows'] * 1e6:.0f} µs",
                f"{each['filter']:.1f} s ({each['filter'] / each['base']:.1f} ×)",
                f"{each['again']:.1f} s",
                f"{each['peak_mb']:.0f} MB",
            ]
            for each in found
        ],
        notes=[
            "Orjson alone reads and writes every line of the same table, and does nothing else.",
            "The null serving answers with a word, in batches of 256: ids, journal, order and table are what is left.",
            "Run again: nothing is left to make. Above 100,000 rows finished parts are taken as they are.",
        ],
    )


if __name__ == "__main__":
    print(run(*map(int, sys.argv[1:2])).markdown())
