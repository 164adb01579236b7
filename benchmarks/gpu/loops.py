"""The same pictures by a plain loop, by the loop of the reference system, and by this project."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.gpu.models import CLASSES, Preset
from dataflow.io import ImageIO
from dataflow.operators import PromptedImageEditGenerator, Text2ImageGenerator
from dataflow.runtime.engine import RunOptions
from dataflow.serving import speed
from dataflow.serving.diffusers_options import FASTEST_FP8
from dataflow.serving.local_image_gen_serving import LocalImageGenServing
from dataflow.utils.storage import FileStorage

OURS: Mapping[str, Mapping[str, Any]] = {
    "defaults": {},
    "compiled": {"compile": "regional", "attention_backend": "auto"},
    "fp8": {"compile": "regional", "attention_backend": "auto", "quantization": FASTEST_FP8},
}
"""Settings of this project's serving, by the name of their stage."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every loop has to do.

    Attributes:
        task: ``text2image`` or ``imageedit``.
        model: folder of the pipeline.
        preset: sizes and steps.
        images: pictures, after the first call.
        batch: pictures of a call.
        device: on which.
    """

    task: str
    model: Path
    preset: Preset
    images: int
    batch: int
    device: str

    def prompts(self) -> list[str]:
        """A prompt for each picture, those of the first call included."""
        return [f"{speed.PROMPTS[n % len(speed.PROMPTS)]}, number {n}" for n in range(self.images + self.batch)]

    def source(self) -> Image.Image:
        """What is edited."""
        side = self.preset.side
        bands = [Image.linear_gradient("L").rotate(turn).resize((side, side)) for turn in (0, 90, 180)]
        return Image.merge("RGB", bands)

    def arguments(self) -> dict[str, Any]:
        """Of a call of the pipeline, beside prompts and pictures."""
        more = self.preset.edit if self.task == "imageedit" else {}
        side, steps = self.preset.side, self.preset.steps
        return {"height": side, "width": side, "num_inference_steps": steps, **self.preset.call, **more}


def plain(work: Work) -> dict[str, Any]:
    """A loop over the prompts that keeps nothing; bf16 on a GPU."""
    return _loop(work, half="bfloat16", batch=1, folder=None)


def reference(work: Work) -> dict[str, Any]:
    """One call for each batch, fp16 on a GPU, every picture saved before the next call begins."""
    with tempfile.TemporaryDirectory() as folder:
        return _loop(work, half="float16", batch=work.batch, folder=Path(folder))


def _loop(work: Work, *, half: str, batch: int, folder: Path | None) -> dict[str, Any]:
    import diffusers
    import torch

    on_gpu = work.device.startswith("cuda")
    dtype = getattr(torch, half) if on_gpu else torch.float32
    pipe = getattr(diffusers, CLASSES[work.task]).from_pretrained(work.model, dtype=dtype).to(work.device)
    pipe.set_progress_bar_config(disable=True)
    prompts, shown = work.prompts(), {"image": work.source()} if work.task == "imageedit" else {}
    first = made = 0
    ended_first = begun = time.perf_counter()
    for start in range(0, len(prompts) - batch + 1, batch):
        some = prompts[start : start + batch]
        generator = torch.Generator(work.device).manual_seed(start)
        pictures = pipe(prompt=some, generator=generator, **shown, **work.arguments()).images
        for number, picture in enumerate(pictures):
            if folder is not None:
                picture.save(folder / f"{start + number}.png")
        if start == 0:
            ended_first = time.perf_counter()
            first = ended_first - begun
        else:
            made += len(pictures)
    took = time.perf_counter() - ended_first
    del pipe
    if on_gpu:
        torch.cuda.empty_cache()
    return {"images": made, "seconds": took, "first": first, "dtype": str(dtype).partition(".")[2], "batch": batch}


class Clocked(LocalImageGenServing):
    """Notes when calls end."""

    ends: list[float]

    async def generate(self, requests):
        results = await super().generate(requests)
        self.ends.append(time.perf_counter())
        return results


def ours(work: Work, settings: Mapping[str, Any]) -> dict[str, Any]:
    """This project: once from the table to the finished table, saved and recorded, and once the calls alone."""
    arguments = {
        "hf_model_name_or_path": str(work.model),
        "Image_gen_task": work.task,
        "batch_size": work.batch,
        "diffuser_image_height": work.preset.side,
        "diffuser_image_width": work.preset.side,
        "diffuser_num_inference_steps": work.preset.steps,
        "pipeline_kwargs": {**work.preset.call, **(work.preset.edit if work.task == "imageedit" else {})},
        "device": work.device,
        **settings,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = _end_to_end(work, arguments, folder)
        bare = speed.measure(
            arguments,
            seconds=max(whole["seconds"], 0.1),
            count=not settings.get("quantization"),
            folder=folder,
        )
    return {
        **whole,
        "dtype": bare.provenance.get("dtype"),
        "batch": bare.batch,
        "attention": bare.provenance.get("attention_backend", "native"),
        "quantization": bare.provenance.get("quantization"),
        "bare": bare.images_per_second,
        "bare_images": bare.images,
        "load": bare.load_seconds,
        "warm_up": bare.warm_up_seconds,
        "peak_gb": bare.peak_bytes / 1e9,
        "flops": bare.flops,
        "peak_teraflops": bare.peak_teraflops,
        "device": bare.device,
    }


def _end_to_end(work: Work, arguments: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """From the end of the first call to the finished table."""
    rows = [{"prompt": prompt} for prompt in work.prompts()]
    if work.task == "imageedit":
        work.source().save(folder / "source.png")
        rows = [{**row, "image": str(folder / "source.png")} for row in rows]
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    serving = Clocked(ImageIO(folder / "images"), **arguments)
    serving.ends = []
    storage = FileStorage(str(folder / "in.jsonl"), cache_path=str(folder / "cache")).step()
    options, begun = RunOptions(quiet=True, progress=False), time.perf_counter()
    if work.task == "imageedit":
        summary = PromptedImageEditGenerator(serving, options=options).run(storage, "image", "prompt", "edited")
    else:
        summary = Text2ImageGenerator(serving, options=options).run(storage, "prompt", "images")
    ended = time.perf_counter()
    if summary.done != len(rows):
        raise RuntimeError(f"{summary.done} of {len(rows)} rows are done: {summary.reasons}")
    first = min(serving.ends)
    return {"images": work.images, "seconds": ended - first, "first": first - begun}
