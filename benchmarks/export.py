"""What does an export cost beside a plain tar of the same files: megabytes a second, and memory?"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import tempfile
import time
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.measure import Result, run_python

EXPORT = """
import json, sys, time
from dataflow.export import ExportOptions, export
started = time.perf_counter()
summary = export(sys.argv[1], sys.argv[2], ExportOptions(**json.loads(sys.argv[3])))
assert summary.balanced and not summary.problems, summary
print(json.dumps({"seconds": time.perf_counter() - started, "written": summary.written, "shards": summary.shards}))
"""
_SIDE = 128
_DIFFERENT = 64


def export(count: int = 100_000) -> Result:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        table, names, size = _table(folder, count)
        part = folder / "part.jsonl"
        with table.open() as file:
            part.write_text("".join(line for _, line in zip(range(count // 10), file, strict=False)))
        plain = _tar(folder, names)
        rows = [_told("plain tar, synced", count, size, plain, plain / size, None, None)]
        for name, options, source, images in (
            ("WebDataset", {}, table, count),
            ("Hugging Face parquet", {"format": "parquet"}, table, count),
            ("WebDataset, a tenth of it", {}, part, count // 10),
            ("WebDataset as JPEG, a tenth of it", {"encode": "jpeg"}, part, count // 10),
        ):
            os.sync()  # nobody waits for what another left to be written
            found = run_python(EXPORT, str(source), str(folder / "out"), json.dumps(options))
            shutil.rmtree(folder / "out")
            share = size * images / count
            rows.append(
                _told(name, images, share, found["seconds"], plain / size, found["peak_mb"], int(found["shards"]))
            )
    return Result(
        question="How fast is an export beside a plain tar of the same files?",
        aim="at least half a plain tar's throughput, in memory that does not grow with the table",
        columns=["", "pictures", "seconds", "MB/s", "of a plain tar", "peak memory, MB", "shards"],
        rows=rows,
        notes=[
            f"PNG files of {_SIDE} × {_SIDE} noise, {size / count / 1000:.0f} kB each, with provenance; two scores.",
            "The files are in the page cache for all. Peak memory is that of the whole process, libraries included.",
            "An export also reads the table twice, checks every PNG's checksums, hashes pictures and shards, syncs.",
            "The work for a sample hardly depends on its size: smaller pictures are the harder case.",
            "JPEG decodes and encodes every picture; its MB/s are of the PNG files read.",
        ],
    )


def _told(
    name: str, images: int, size: float, seconds: float, plain: float, memory: float | None, shards: int | None
) -> list[str]:
    return [
        name,
        f"{images:,}",
        f"{seconds:.1f}",
        f"{size / seconds / 1e6:.0f}",
        f"{plain * size / seconds:.2f}",
        "–" if memory is None else f"{memory:.0f}",
        "–" if shards is None else f"{shards}",
    ]


def _table(folder: Path, count: int) -> tuple[Path, Path, int]:
    """A table of pictures with scores, a list of their names, and their bytes together."""
    random = np.random.default_rng(0)
    heads, tails = [], []
    for _ in range(_DIFFERENT):
        buffer = BytesIO()
        Image.fromarray(random.integers(0, 256, (_SIDE, _SIDE, 3), dtype=np.uint8)).save(
            buffer, "PNG", compress_level=1
        )
        data = buffer.getvalue()
        heads.append(data[:33])  # the signature and the header block
        tails.append(data[33:])
    table, names, size = folder / "table.jsonl", folder / "names.txt", 0
    with table.open("w") as rows, names.open("w") as listed:
        for number in range(count):
            name = f"{number * 2654435761 % 2**128:032x}"
            prompt = f"a picture of thing number {number} on a table beside a window"
            facts = {
                "request_id": name,
                "prompt": prompt,
                "seed": number,
                "model": "some/model",
                "revision": "0123456789abcdef",
                "params": {"num_inference_steps": 28, "guidance_scale": 3.5},
            }
            data = heads[number % _DIFFERENT] + _text(facts) + tails[number % _DIFFERENT]
            path = folder / "images" / name[-2:] / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            size += len(data)
            row = {
                "conversations": [{"role": "user", "content": prompt}],
                "images": [str(path)],
                "clip": [{"alignment": round(float(random.random()), 6), "tokens": 12, "truncated": False}],
                "clip_status": ["ok"],
                "clip_by": "some-model#0123456789ab",
                "judge": [{"value": int(random.integers(10)), "reason": "it shows what it should"}],
                "judge_status": ["ok"],
                "judge_by": "a-judge#0123456789ab",
            }
            rows.write(json.dumps(row) + "\n")
            listed.write(f"{path}\n")
    return table, names, size


def _text(facts: dict[str, object]) -> bytes:
    body = b"tEXtdataflow\0" + json.dumps(facts).encode()
    return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))


def _tar(folder: Path, names: Path) -> float:
    target = folder / "plain.tar"
    os.sync()
    started = time.perf_counter()
    subprocess.run(["tar", "-cPf", str(target), "-T", str(names)], check=True)
    subprocess.run(["sync", str(target)], check=True)
    seconds = time.perf_counter() - started
    target.unlink()
    return seconds


def run() -> list[Result]:
    return [export()]


if __name__ == "__main__":
    for result in run():
        print(result.markdown())
