"""How often the built-in model is entirely right on combinations it never saw: ``python -m training.evaluate``.

Runs the exported folder through diffusers' own pipelines, judges every picture by the rules of
:mod:`training.checker` and writes the model card beside the weights.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxKontextPipeline, FluxPipeline
from PIL import Image

from training.checker import edited, shows
from training.scenes import BACKGROUNDS, COLOURS, OPERATIONS, SHAPES, random_edit, random_prompt, render

Score = dict[str, tuple[int, int]]
"""Right and asked, by group."""

CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# tiny-flux

A FLUX pipeline of {parameters:.1f} million parameters that draws simple scenes at 64 x 64 pixels and follows
instructions to change them. It exists to try dataflow out, and to test it, without a network or a GPU.

It is loaded like any other: `FluxPipeline.from_pretrained(folder)` for text to image,
`FluxKontextPipeline.from_pretrained(folder)` for edits, with the call arguments of `dataflow.json` (dataflow uses them
by itself).

## What it knows

- shapes: {shapes}
- colours: {colours}
- backgrounds: {backgrounds} (white if none is named)
- places: "at the top", "in the bottom left", "in the center", ...
- two objects: "to the left of", "right of", "above", "below", or a place for each
- what is not said: one object stands in the center, two stand left and right; related ones in the middle row or column
- edits: "make the red circle blue", "turn the square into a star", "remove the green triangle",
  "add a yellow star at the top", "change the background to black"

Anything else is a riddle to it.

## How well

Measured {date} by rules (`training/checker.py`: background, number, colour, shape and place of every object, as far as
the prompt says it; for edits, everything else where it was) on combinations that training never showed, {steps} steps,
seed {seed}:

| task | entirely right | of |
| --- | --- | --- |
{rows}

{speed}

## How it was made

From scratch, on a CPU, on pictures drawn by a program (`training/`): {history} There are no photographs, no scraped
data and no other model in it. Licence: Apache-2.0.
"""


def judge_prompts(pipeline: Any, call: dict[str, Any], count: int, seed: int, batch: int) -> tuple[Score, float]:
    """Held-out prompts; also images per second."""
    rng = random.Random(seed)
    score: dict[str, list[bool]] = defaultdict(list)
    seconds = 0.0
    for number in (1, 2):
        prompts = [random_prompt(rng, held_out=True, count=number) for _ in range(count)]
        for first in range(0, count, batch):
            chunk = prompts[first : first + batch]
            generators = [torch.Generator("cpu").manual_seed(seed + first + k) for k in range(len(chunk))]
            started = time.perf_counter()
            images = pipeline([p.text for p in chunk], generator=generators, output_type="np", **call).images
            seconds += time.perf_counter() - started
            for prompt, image in zip(chunk, images, strict=True):
                name = "one object" if number == 1 else "two objects"
                score[name].append(shows((image * 255).round().astype(np.uint8), prompt.meaning))
    return _sums(score), 2 * count / seconds


def judge_edits(pipeline: Any, call: dict[str, Any], count: int, seed: int, batch: int) -> tuple[Score, float]:
    """Held-out edits of drawn pictures; also images per second."""
    rng = random.Random(seed)
    score: dict[str, list[bool]] = defaultdict(list)
    seconds = 0.0
    operations = OPERATIONS[1:]
    edits = [(random_edit(rng, held_out=True, operation=operations[k % len(operations)])) for k in range(count)]
    for first in range(0, count, batch):
        chunk = edits[first : first + batch]
        before = (render([edit.before for edit in chunk])[0] * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        pictures = [Image.fromarray(picture.numpy()) for picture in before]
        generators = [torch.Generator("cpu").manual_seed(seed + first + k) for k in range(len(chunk))]
        started = time.perf_counter()
        images = pipeline(
            image=pictures,
            prompt=[edit.text for edit in chunk],
            generator=generators,
            output_type="np",
            **call,
        ).images
        seconds += time.perf_counter() - started
        for edit, image in zip(chunk, images, strict=True):
            picture = (image * 255).round().astype(np.uint8)
            score[edit.meaning.operation].append(edited(picture, edit.before, edit.after))
    return _sums(score), count / seconds


def _sums(score: dict[str, list[bool]]) -> Score:
    return {name: (sum(values), len(values)) for name, values in score.items()}


def _row(name: str, right: int, asked: int) -> str:
    return f"| {name} | {right / asked:.1%} | {asked} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("src/dataflow/builtin/tiny-flux"))
    parser.add_argument("--count", type=int, default=200, help="prompts of each kind, and edits in all")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--history", default="", help="one sentence for the card: how long it was trained")
    parser.add_argument("--no-card", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    call = json.loads((options.folder / "dataflow.json").read_text())
    pipeline = FluxPipeline.from_pretrained(str(options.folder), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    prompts, prompt_speed = judge_prompts(pipeline, call["text2image"], options.count, options.seed, options.batch)
    kontext = FluxKontextPipeline(**pipeline.components)
    kontext.set_progress_bar_config(disable=True)
    edit_call = {name: value for name, value in call["imageedit"].items() if name != "pipeline_class"}
    edits, edit_speed = judge_edits(kontext, edit_call, options.count, options.seed, options.batch)
    groups = [("text to image", prompts), ("edits", edits)]
    rows = []
    for title, score in groups:
        rows.append(_row(f"**{title}**", sum(r for r, _ in score.values()), sum(n for _, n in score.values())))
        rows += [_row(name, *values) for name, values in sorted(score.items())]
    speed = (
        f"Speed on {options.threads} CPU threads, batches of {options.batch}, fp32: {prompt_speed:.1f} images/s from "
        f"text, {edit_speed:.1f} edits/s."
    )
    print("\n".join([*rows, speed]))
    if options.no_card:
        return
    modules = (part for part in pipeline.components.values() if isinstance(part, torch.nn.Module))
    card = CARD.format(
        parameters=sum(p.numel() for module in modules for p in module.parameters()) / 1e6,
        shapes=", ".join(SHAPES),
        colours=", ".join(COLOURS),
        backgrounds=", ".join(BACKGROUNDS),
        date=datetime.datetime.now(datetime.UTC).date(),
        steps=call["text2image"]["num_inference_steps"],
        seed=options.seed,
        rows="\n".join(rows),
        speed=speed,
        history=options.history or "see `training/README.md`.",
    )
    (options.folder / "README.md").write_text(card)


if __name__ == "__main__":
    main()
