"""How much slower is a run than a bare diffusers loop with the same batches, pictures saved in both?"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import Result, spread
from dataflow.io import ImageIO
from dataflow.operators import Text2ImageGenerator
from dataflow.runtime.engine import RunOptions
from dataflow.serving.local_image_gen_serving import LocalImageGenServing
from dataflow.serving.model_files import BUILTIN_FOLDER
from dataflow.utils.storage import FileStorage

WORDS = ("red", "green", "blue", "yellow", "orange", "purple"), ("circle", "square", "triangle", "star")


def _prompts(count: int) -> list[str]:
    colours, shapes = WORDS
    return [f"a {colours[n % 6]} {shapes[n // 6 % 4]} on a white background" for n in range(count)]


def _bare(pipe: Any, prompts: list[str], batch: int, folder: Path, params: dict[str, Any]) -> float:
    import torch

    started = time.perf_counter()
    for first in range(0, len(prompts), batch):
        chunk = prompts[first : first + batch]
        generators = [torch.Generator("cpu").manual_seed(first + number) for number in range(len(chunk))]
        for number, image in enumerate(pipe(chunk, generator=generators, **params).images):
            image.save(folder / f"{first + number}.png")
    return time.perf_counter() - started


class _Loaded(LocalImageGenServing):
    """Stays loaded between runs, so that only the work is compared."""

    def setup(self) -> None:
        if not getattr(self, "_ready", False):
            super().setup()
            self._ready = True

    def cleanup(self) -> None:
        pass


def run(count: int = 128, batch: int = 8, repeats: int = 5) -> Result:
    import torch
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(str(BUILTIN_FOLDER), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    params = json.loads((BUILTIN_FOLDER / "dataflow.json").read_text())["text2image"]
    prompts = _prompts(count)
    bare, ours = [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        table = folder / "prompts.jsonl"
        table.write_text("".join(json.dumps({"conversations": prompt}) + "\n" for prompt in prompts))
        serving = _Loaded(hf_model_name_or_path="builtin:tiny-flux", batch_size=batch, device="cpu")
        serving.setup()
        _bare(pipe, prompts[:batch], batch, folder, params)
        for number in range(repeats):
            bare.append(_bare(pipe, prompts, batch, folder, params))
            cache = folder / f"cache{number}"
            serving.image_io = ImageIO(cache / "images")
            storage = FileStorage(str(table), cache_path=str(cache))
            started = time.perf_counter()
            summary = Text2ImageGenerator(serving, options=RunOptions(quiet=True)).run(storage.step())
            ours.append(time.perf_counter() - started)
            assert summary.made == count
    ratios = [mine / theirs for mine, theirs in zip(ours, bare, strict=True)]
    return Result(
        question="How much slower is a run than a bare diffusers loop?",
        aim="at most 1.03 times",
        columns=["", "median (range)"],
        rows=[
            [f"bare loop, {count} images", spread(bare, " s")],
            ["this project", spread(ours, " s")],
            ["ratio, pair by pair", spread(ratios)],
            ["images per second", spread([count / seconds for seconds in ours], digits=1)],
        ],
        notes=[
            f"Built-in model, 64 × 64, batches of {batch}, float32, loaded beforehand, taking turns in one process.",
            "The bare loop saves as Pillow does by default; ours writes durably, with metadata and a journal.",
        ],
    )


if __name__ == "__main__":
    print(run().markdown())
