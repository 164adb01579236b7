"""Training samples, drawn ahead of time into shards: ``python -m training.data --kind t2i --shards 24``.

A shard is a dict of ``text`` (list of str), ``labels`` (N, 9), ``image`` (N, 3, 64, 64) uint8, for edits ``before``
alike, and what the auxiliary head of the transformer learns to predict for each of its 16 image tokens: ``sub``
(N, 16, 16), the colour of each 4 x 4 pixel square in the token; ``shape`` (N, 16); and ``ground`` (N,).
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import avg_pool2d

from training.scenes import (
    BACKGROUNDS,
    CELLS,
    COLOURS,
    OPERATIONS,
    RELATIONS,
    SHAPES,
    Meaning,
    Scene,
    random_edit,
    random_prompt,
    render,
)

SHARD = 10_000
CHUNK = 1_000

_COLOUR = {name: number for number, name in enumerate(COLOURS)}
_SHAPE = {name: number for number, name in enumerate(SHAPES)}
_GROUND = {name: number for number, name in enumerate(BACKGROUNDS)}
_CELL = {name: number for number, name in enumerate(CELLS)}
_RELATION = {name: number for number, name in enumerate(RELATIONS)}
_OPERATION = {name: number for number, name in enumerate(OPERATIONS)}

_THING = (_COLOUR, _SHAPE, _CELL)
LABEL_SIZES = (len(_OPERATION), *(len(kind) for kind in (*_THING, *_THING)), len(_RELATION), len(_GROUND))
"""Values of each column of ``labels``; one more stands for "not said"."""

SUB_CLASSES = 1 + len(COLOURS)
SHAPE_CLASSES = 1 + len(SHAPES)
GROUND_CLASSES = len(BACKGROUNDS)


def meaning_labels(meaning: Meaning) -> list[int]:
    """One number for each thing a sentence may say."""

    def number(of: Mapping[str, int], value: str | None) -> int:
        return len(of) if value is None else of[value]

    things = [number(of, value) for thing in (meaning.a, meaning.b) for of, value in zip(_THING, thing, strict=True)]
    return [
        _OPERATION[meaning.operation],
        *things,
        number(_RELATION, meaning.relation),
        number(_GROUND, meaning.background),
    ]


def token_labels(scenes: Sequence[Scene], masks: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each image token shows. ``masks``: (N, 2, 64, 64), how much of each pixel each thing covers."""
    count = len(scenes)
    colour = torch.zeros(count, 2, dtype=torch.long)
    shape = torch.zeros(count, 2, dtype=torch.long)
    for row, scene in enumerate(scenes):
        for slot, thing in enumerate(scene.things):
            colour[row, slot] = _COLOUR[thing.colour] + 1
            shape[row, slot] = _SHAPE[thing.shape] + 1
    best, slot = avg_pool2d(masks, 4).max(1)
    sub = torch.where(best > 0.5, colour.gather(1, slot.view(count, -1)).view_as(slot), 0)
    sub = sub.reshape(count, 4, 4, 4, 4).permute(0, 1, 3, 2, 4).reshape(count, 16, 16)
    best, slot = avg_pool2d(masks, 16).max(1)
    kind = torch.where(best > 0.03, shape.gather(1, slot.view(count, -1)).view_as(slot), 0).reshape(count, 16)
    ground = torch.tensor([_GROUND[scene.background] for scene in scenes])
    return {"sub": sub.to(torch.uint8), "shape": kind.to(torch.uint8), "ground": ground.to(torch.uint8)}


def draw(rng: random.Random, kind: str, count: int) -> dict[str, Any]:
    """``count`` samples of kind ``t2i`` or ``edit``."""
    if kind == "t2i":
        prompts = [random_prompt(rng) for _ in range(count)]
        texts, meanings, scenes, before = (
            [prompt.text for prompt in prompts],
            [prompt.meaning for prompt in prompts],
            [prompt.scene for prompt in prompts],
            None,
        )
    else:
        edits = [random_edit(rng) for _ in range(count)]
        texts, meanings, scenes, before = (
            [edit.text for edit in edits],
            [edit.meaning for edit in edits],
            [edit.after for edit in edits],
            [edit.before for edit in edits],
        )
    picture, masks = render(scenes)
    sample: dict[str, Any] = {
        "text": texts,
        "labels": torch.tensor([meaning_labels(meaning) for meaning in meanings], dtype=torch.uint8),
        "image": to_bytes(picture),
        **token_labels(scenes, masks),
    }
    if before is not None:
        sample["before"] = to_bytes(render(before)[0])
    return sample


def to_bytes(pictures: torch.Tensor) -> torch.Tensor:
    """0..1 as 0..255, uint8."""
    return (pictures * 255).round().to(torch.uint8)


def shards(folder: Path, kind: str) -> list[Path]:
    """The finished shards of a kind, in order."""
    return sorted(folder.glob(f"{kind}_*.pt"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/tiny-flux"))
    parser.add_argument("--kind", choices=("t2i", "edit"), required=True)
    parser.add_argument("--shards", type=int, default=24)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    rng = random.Random(f"{options.kind} {options.seed}")
    for number in range(options.shards):
        parts = [draw(rng, options.kind, CHUNK) for _ in range(SHARD // CHUNK)]
        shard = {
            name: [text for part in parts for text in part["text"]]
            if name == "text"
            else torch.cat([part[name] for part in parts])
            for name in parts[0]
        }
        path = options.work / f"{options.kind}_{options.seed}_{number:03d}.pt"
        torch.save(shard, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
        print(path, flush=True)


if __name__ == "__main__":
    main()
