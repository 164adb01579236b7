"""How long does a table of a million rows take, of which 999,000 are done already?"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import orjson

from benchmarks.measure import Result, run_python
from dataflow.io import ImageIO
from dataflow.operators import Text2ImageGenerator
from dataflow.runtime.identity import Identifier
from dataflow.runtime.journal import done_record, pack_line
from dataflow.serving.fake_serving import FakeServing, paint
from dataflow.types import GenerationRequest, SavedImage
from dataflow.utils.storage import FileStorage

BATCH = 16

RESUME = """
import json, sys, time
from pathlib import Path
started = time.perf_counter()
from dataflow.io import ImageIO
from dataflow.operators import Text2ImageGenerator
from dataflow.runtime.engine import RunOptions
from dataflow.serving.fake_serving import FakeServing
from dataflow.utils.storage import FileStorage
folder = Path(sys.argv[1])

class Timed(FakeServing):
    first = None
    async def generate(self, requests):
        if Timed.first is None:
            Timed.first = time.perf_counter() - started
        return await super().generate(requests)

serving = Timed(ImageIO(folder / "cache" / "images"), batch_size=int(sys.argv[2]), size=(8, 8))
storage = FileStorage(str(folder / "prompts.jsonl"), cache_path=str(folder / "cache"))
summary = Text2ImageGenerator(serving, options=RunOptions(quiet=True)).run(storage.step())
print(json.dumps({"first": Timed.first, "total": time.perf_counter() - started, "made": summary.made}))
"""


def prepare(folder: Path, rows: int, done: int) -> None:
    """A table, and the journal and images of its first ``done`` rows."""
    table = folder / "prompts.jsonl"
    with table.open("wb") as file:
        for row in range(rows):
            prompt = f"a picture of thing number {row} on a table beside a window, late afternoon light"
            file.write(
                orjson.dumps({"id": row, "conversations": [{"content": prompt, "role": "user"}], "images": [""]})
                + b"\n"
            )
    store = ImageIO(folder / "cache" / "images")
    serving = FakeServing(store, size=(8, 8))
    storage = FileStorage(str(table), cache_path=str(folder / "cache")).step()
    plan = Text2ImageGenerator(serving).plan()
    identifier = Identifier(serving, 0, resolve=storage.resolve, digest=str)
    picture = paint(GenerationRequest(request_id="0" * 32, prompt="", seed=0), (8, 8))
    sample = store.save(picture, "0" * 32, {})
    data = (store.save_path / sample.name).read_bytes()
    (store.save_path / sample.name).unlink()
    for number in range(256):
        (store.save_path / f"{number:02x}").mkdir(exist_ok=True)
    journal = folder / "cache" / "journal" / storage.step_name
    journal.mkdir(parents=True)
    batch: list[str] = []
    lines: list[bytes] = []
    with (journal / "main.jsonl").open("wb") as records:
        for number, row in enumerate(storage.iter_rows()):
            if number >= done:
                break
            [identity] = identifier.identify(plan.requests(row))
            name = identity.key.hex()
            image = SavedImage(name=f"{name[:2]}/{name}.png", sha256=sample.sha256, bytes=len(data), width=8, height=8)
            (store.save_path / image.name).write_bytes(data)
            batch.append(name)
            lines.append(pack_line(done_record(name, [image], ms=1.0)))
            if len(batch) == BATCH:
                records.write(pack_line({"s": "start", "ks": batch}) + b"".join(lines))
                batch, lines = [], []
        records.write(b"".join(lines))


def run(rows: int = 1_000_000, done: int = 999_000) -> Result:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, rows, done)
        resumed = run_python(RESUME, str(folder), str(BATCH))
        again = run_python(RESUME, str(folder), str(BATCH))
    assert resumed["made"] == rows - done
    assert again["made"] == 0
    return Result(
        question=f"How soon does a run of {rows:,} rows go on when {done:,} are done?",
        aim="first new image after 15 s at most, under 500 MB",
        columns=["run", "first new image asked for", "whole run", "peak memory"],
        rows=[
            [
                f"{rows - done:,} rows left, all at the end of the table",
                f"{resumed['first']:.1f} s",
                f"{resumed['total']:.1f} s",
                f"{resumed['peak_mb']:.0f} MB",
            ],
            ["nothing left", "-", f"{again['total']:.1f} s", f"{again['peak_mb']:.0f} MB"],
        ],
        notes=["The whole run includes writing the table of all rows and, for the rows left, making the images."],
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--left", type=int, default=1_000)
    options = parser.parse_args()
    print(run(options.rows, options.rows - options.left).markdown())
