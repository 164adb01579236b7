"""What does it cost to pack pictures, and to read packed ones?"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import Result, run_python

# A picture of noise does not get smaller when it is written as PNG, as photographs hardly do.
MAKE = """
import json, sys, time
from io import BytesIO
import numpy as np
from PIL import Image
from dataflow.io import ImageIO
from dataflow.operators import Text2ImageGenerator
from dataflow.runtime.engine import RunOptions
from dataflow.types import GenerationResult, Serving
from dataflow.utils.storage import FileStorage

def noise(number):
    buffer = BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()

class Noise(Serving):
    batch_size = 16
    pictures = [noise(number) for number in range(64)]

    def fingerprint(self):
        return {"model": "noise"}

    async def generate(self, requests):
        return [GenerationResult(images=(self.pictures[request.seed % 64],)) for request in requests]

folder, rows = sys.argv[1], int(sys.argv[2])
with open(folder + "/in.jsonl", "w") as table:
    table.writelines(f'{{"prompt": "thing {number}"}}\\n' for number in range(rows))
serving = Noise()
serving.image_io = ImageIO(folder + "/cache/images", durable=False)
storage = FileStorage(folder + "/in.jsonl", cache_path=folder + "/cache").step()
summary = Text2ImageGenerator(serving, options=RunOptions(quiet=True)).run(storage, "prompt", "images")
print(json.dumps({"made": summary.made, "bytes": summary.bytes}))
"""
PACK = """
import json, sys, time
from dataflow import packing
started = time.perf_counter()
summary = getattr(packing, sys.argv[2])(sys.argv[1] + "/cache", tell=lambda line: None)
print(json.dumps({"seconds": time.perf_counter() - started, "images": summary.images}))
"""
READ = """
import json, random, sys, time
from dataflow.picture_files import read_bytes
rows = [json.loads(line)["images"][0] for line in open(sys.argv[1] + "/cache/dataflow_cache_step_step1.jsonl")]
some = random.Random(1).sample(rows, int(sys.argv[2]))
started = time.perf_counter()
size = sum(len(read_bytes(path)) for path in some)
print(json.dumps({"seconds": time.perf_counter() - started, "bytes": size}))
"""


def run(count: int = 20_000) -> Result:
    reads = count // 4
    with tempfile.TemporaryDirectory() as temporary:
        made = run_python(MAKE, temporary, str(count))
        assert made["made"] == count
        folder, size = Path(temporary), made["bytes"]
        plain = _tar(folder)
        loose = run_python(READ, temporary, str(reads))
        packed = run_python(PACK, temporary, "pack")
        inside = run_python(READ, temporary, str(reads))
        unpacked = run_python(PACK, temporary, "unpack")
        assert packed["images"] == unpacked["images"] == count

    def told(
        name: str, amount: int, bytes_: float, seconds: float, other: float, peak: float | None = None
    ) -> list[str]:
        rate = bytes_ / seconds / 1e6
        memory = f"{peak:.0f} MB" if peak else "–"
        return [name, f"{rate:.0f}", f"{rate / other:.2f}", f"{amount:,}", f"{seconds / amount * 1e6:.0f} µs", memory]

    tar_rate, loose_rate = size / plain / 1e6, loose["bytes"] / loose["seconds"] / 1e6
    return Result(
        question="How fast are packs?",
        columns=["", "MB/s", "of the line it is held against", "pictures", "a picture", "peak memory"],
        rows=[
            told("plain tar, synced", count, size, plain, tar_rate),
            told("dataflow pack, against tar", count, size, packed["seconds"], tar_rate, packed["peak_mb"]),
            told("dataflow unpack, against tar", count, size, unpacked["seconds"], tar_rate, unpacked["peak_mb"]),
            told("reading files at random", reads, loose["bytes"], loose["seconds"], loose_rate),
            told("reading packed ones, against files", reads, inside["bytes"], inside["seconds"], loose_rate),
        ],
        notes=[
            f"{count:,} PNG files of {size / count / 1000:.0f} kB. All of it is in the page cache.",
            "Pack compares every file with its SHA-256, syncs shards and indexes, and deletes the files.",
            "Unpack checks and syncs every file that it writes.",
        ],
    )


def _tar(folder: Path) -> float:
    target = folder / "plain.tar"
    os.sync()
    started = time.perf_counter()
    subprocess.run(["tar", "-cf", str(target), "-C", str(folder / "cache"), "images"], check=True)
    subprocess.run(["sync", str(target)], check=True)
    seconds = time.perf_counter() - started
    target.unlink()
    return seconds


if __name__ == "__main__":
    print(run(*map(int, sys.argv[1:2])).markdown())
