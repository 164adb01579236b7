"""Tables and pictures of known content, and exports of them."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from PIL import Image

from dataflow.export import ExportOptions, ExportSummary, export
from dataflow.io import ImageIO


class Workshop:
    """A folder with pictures, a table and room for exports."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.io = ImageIO(folder / "images", durable=False)
        self.out = folder / "out"

    def picture(self, seed: int, prompt: str, size: tuple[int, int] = (16, 12), **facts: Any) -> str:
        """A picture made by the store, of pixels that only this seed has."""
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        name = hashlib.md5(f"{seed}".encode()).hexdigest()
        metadata = {
            "request_id": name,
            "prompt": prompt,
            "seed": seed,
            "model": "some/model",
            "revision": "abc123",
            "params": {"num_inference_steps": 12, "guidance_scale": 3.5},
            **facts,
        }
        return self.io.path(self.io.save(Image.fromarray(pixels), name, metadata).name)

    def file(self, name: str, seed: int, size: tuple[int, int] = (16, 12), **options: Any) -> str:
        """A picture of the user's own, in any format."""
        path = self.folder / "own" / name
        path.parent.mkdir(exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, **options)
        return str(path)

    def table(self, rows: list[dict[str, Any] | str], name: str = "table.jsonl") -> Path:
        path = self.folder / name
        lines = [row.encode() if isinstance(row, str) else orjson.dumps(row) for row in rows]
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return path

    def scored(self, rows: int = 4, samples: int = 2, **more: Any) -> Path:
        """A table with several pictures and scores in each row; score ``k`` of row ``n`` is ``n + k / 10``."""
        return self.table([self.row(number, samples, **more) for number in range(rows)])

    def row(self, number: int, samples: int = 2, **more: Any) -> dict[str, Any]:
        prompt = f"a red circle number {number}"
        return {
            "conversations": [{"role": "user", "content": prompt}],
            "images": [self.picture(100 * number + k, prompt) for k in range(samples)],
            "judge": [{"value": number + k / 10, "reason": f"row {number}, picture {k}"} for k in range(samples)],
            "judge_status": ["ok"] * samples,
            "judge_by": "a judge",
            "topic": f"topic {number % 2}",
            **more,
        }

    def edits(self, rows: int = 3, samples: int = 1) -> Path:
        found = []
        for number in range(rows):
            instruction = f"make circle {number} green"
            found.append(
                {
                    "conversations": instruction,
                    "images": [self.file(f"source{number}.png", 5000 + number)],
                    "edited_images": [self.picture(6000 + 100 * number + k, instruction) for k in range(samples)],
                    "preserved": [number + k / 10 for k in range(samples)],
                    "preserved_status": ["ok"] * samples,
                    "license": "cc-by-4.0",
                }
            )
        return self.table(found)

    def export(self, table: Path, **options: Any) -> ExportSummary:
        summary = export(table, self.out, ExportOptions(**options))
        assert summary.balanced
        return summary

    def left_out(self) -> list[dict[str, Any]]:
        return [orjson.loads(line) for line in (self.out / "left_out.jsonl").read_bytes().splitlines()]

    def index(self) -> dict[str, Any]:
        return orjson.loads((self.out / "index.json").read_bytes())


def members(path: Path) -> dict[str, bytes]:
    """The files of a tar file, in order."""
    with tarfile.open(path) as file:
        return {each.name: file.extractfile(each).read() for each in file}  # type: ignore[union-attr]


def pixels(data: bytes | str | Path) -> np.ndarray:
    with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
        return np.asarray(image.convert("RGB"))


def made(seed: int, size: tuple[int, int] = (16, 12)) -> np.ndarray:
    """The pixels that :meth:`Workshop.picture` painted."""
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
