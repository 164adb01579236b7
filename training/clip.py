"""The tiny CLIP that scores the built-in model's pictures: ``python -m training.clip --minutes 40``.

Learns on freshly drawn scenes. Every picture meets its caption, captions of the same scene with one thing changed, and
the captions of all other pictures; some pictures are spoiled (:func:`spoiled`), and then their own caption is wrong
too. Besides the contrast, small heads read from both vectors what stands in each of the nine cells, and from a middle
layer of the image tower what each token shows: that says what to look at far louder than the contrast does. The heads
are thrown away. ``--test`` measures an exported folder on scenes that training never showed.
"""

from __future__ import annotations

import argparse
import datetime
import random
import shutil
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import avg_pool2d, binary_cross_entropy_with_logits, cross_entropy, normalize
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from training.scenes import (
    BACKGROUNDS,
    CELLS,
    COLOURS,
    SHAPES,
    SIZE,
    Prompt,
    Scene,
    Thing,
    caption,
    is_held_out,
    random_prompt,
    render,
)
from training.text import CLIP_LENGTH
from training.transformer import Muon

PATCH = 8
GRID = SIZE // PATCH
MIDDLE = 3
"""The layer of the image tower after which the token heads look."""
CONFIG: dict[str, Any] = {
    "projection_dim": 192,
    "vision_config": {
        "image_size": SIZE,
        "patch_size": PATCH,
        "hidden_size": 160,
        "intermediate_size": 480,
        "num_hidden_layers": 5,
        "num_attention_heads": 5,
        "projection_dim": 192,
    },
}
MEAN = STD = (0.5, 0.5, 0.5)
WRONG = 4
"""Changed captions beside each right one."""

_COLOURS, _SHAPES, _GROUNDS = tuple(COLOURS), tuple(SHAPES), tuple(BACKGROUNDS)
KINDS = 1 + len(_COLOURS) * len(_SHAPES)
CELL_READ = 2 + len(_COLOURS) + len(_SHAPES)
"""Of each cell the heads read colour and shape apart: read together, what is held out would be learnt as never
there."""


# ---------------------------------------------------------------------------------------------------------------------
# Captions that are wrong in one thing
# ---------------------------------------------------------------------------------------------------------------------

Key = tuple[str, frozenset[tuple[str, str]]]


def key(scene: Scene) -> Key:
    """What a caption can say of a scene: two scenes with one key have the same captions."""
    return scene.background, frozenset((thing.name, thing.cell) for thing in scene.things)


CHANGES = ("colour", "shape", "place", "background", "swap colours", "swap shapes", "swap places", "missing", "extra")


def changed(rng: random.Random, scene: Scene, kind: str) -> Scene | None:
    """The scene with one thing changed; None where this kind of change is none."""
    things = list(scene.things)
    index = rng.randrange(len(things))
    thing = things[index]
    if kind == "background":
        return replace(scene, background=rng.choice([name for name in _GROUNDS if name != scene.background]))
    if kind == "colour":
        things[index] = replace(thing, colour=rng.choice([name for name in _COLOURS if name != thing.colour]))
    elif kind == "shape":
        things[index] = replace(thing, shape=rng.choice([name for name in _SHAPES if name != thing.shape]))
    elif kind == "place":
        taken = {other.cell for other in things}
        things[index] = replace(thing, cell=rng.choice([cell for cell in CELLS if cell not in taken]))
    elif kind == "extra" and len(things) == 1:
        free = rng.choice([cell for cell in CELLS if cell != thing.cell])
        things.append(replace(thing, colour=rng.choice(_COLOURS), shape=rng.choice(_SHAPES), cell=free))
    elif len(things) == 2:
        a, b = things
        if kind == "missing":
            things = [thing]
        elif kind == "swap places":
            things = [replace(a, cell=b.cell), replace(b, cell=a.cell)]
        elif kind == "swap colours":
            things = [replace(a, colour=b.colour), replace(b, colour=a.colour)]
        elif kind == "swap shapes":
            things = [replace(a, shape=b.shape), replace(b, shape=a.shape)]
    new = replace(scene, things=tuple(things))
    return None if key(new) == key(scene) or len({other.name for other in things}) < len(things) else new


def wrong_caption(rng: random.Random, prompt: Prompt, style: int, kind: str, *, held_out: bool | None) -> Prompt | None:
    """A caption that is wrong in one thing, in the words of the right one as far as they go (``style`` seeds both).

    Captions of held-out scenes are never used as wrong ones in training: they would be wrong every time.
    """
    scene = changed(rng, prompt.scene, kind)
    if scene is None:
        return None
    other = caption(random.Random(style), scene)
    if key(other.scene) == key(prompt.scene) or other.text == prompt.text:
        return None
    return None if held_out is False and is_held_out(other.scene) else other


def right_caption(rng: random.Random, *, held_out: bool) -> tuple[Prompt, int]:
    """A scene with a caption, and the seed of its words."""
    while True:
        drawn = random_prompt(rng, held_out=held_out)
        style = rng.getrandbits(32)
        prompt = caption(random.Random(style), drawn.scene)
        if is_held_out(prompt.scene) == held_out:
            return prompt, style


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def loosened(rng: random.Random, scene: Scene) -> Scene:
    """The scene as a model would draw it: things somewhat smaller or larger, and a little beside their place."""
    return replace(
        scene,
        things=tuple(
            replace(
                thing,
                radius=rng.uniform(6.8, 11.0),
                x=thing.x + rng.uniform(-1.5, 1.5),
                y=thing.y + rng.uniform(-1.5, 1.5),
            )
            for thing in scene.things
        ),
    )


def roughened(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures as a model would make them: a little soft, noisy and off in colour; (N, 3, 64, 64) in 0..1."""
    count = len(pictures)
    soft = avg_pool2d(pictures, 3, 1, 1, count_include_pad=False)
    softer = avg_pool2d(soft, 3, 1, 1, count_include_pad=False)
    soft = torch.where(torch.rand(count, 1, 1, 1) < 0.4, softer, soft)
    result = torch.lerp(pictures, soft, torch.rand(count, 1, 1, 1) * (torch.rand(count, 1, 1, 1) < 0.7))
    result = result + torch.randn_like(result) * (torch.rand(count, 1, 1, 1) * 0.04)
    result = result + (torch.rand(count, 3, 1, 1) - 0.5) * 0.06
    return result.clamp(0, 1)


def spoiled(rng: random.Random, scenes: list[Scene]) -> torch.Tensor:
    """Pictures that almost show their scenes: a thing half faded, half another, cut through, doubled, or with dirt."""
    return spoiled_things(rng, scenes)[0]


def spoiled_things(rng: random.Random, scenes: list[Scene]) -> tuple[torch.Tensor, list[int | None]]:
    """The same, with which thing of each scene was spoiled; None where something was added."""
    pictures, _ = render(scenes)
    which: list[int | None] = []
    for row, scene in enumerate(scenes):
        index = rng.randrange(len(scene.things))
        thing = scene.things[index]
        others = tuple(other for k, other in enumerate(scene.things) if k != index)
        kind = rng.randrange(6)
        which.append(index if kind < 4 else None)
        if kind == 0:  # faded
            without, _ = render([replace(scene, things=others)])
            pictures[row] = torch.lerp(pictures[row], without[0], rng.uniform(0.45, 0.9))
        elif kind == 1:  # between two shapes
            shape = rng.choice([name for name in _SHAPES if name != thing.shape])
            other, _ = render([replace(scene, things=(*others, replace(thing, shape=shape)))])
            pictures[row] = torch.lerp(pictures[row], other[0], rng.uniform(0.4, 0.6))
        elif kind == 2:  # half painted, or all painted in between
            colour = rng.choice([name for name in _COLOURS if name != thing.colour])
            other, _ = render([replace(scene, things=(*others, replace(thing, colour=colour)))])
            if rng.random() < 0.5:
                pictures[row] = torch.lerp(pictures[row], other[0], rng.uniform(0.4, 0.6))
            elif rng.random() < 0.5:
                pictures[row, :, : round(thing.y)] = other[0, :, : round(thing.y)]
            else:
                pictures[row, :, :, : round(thing.x)] = other[0, :, :, : round(thing.x)]
        elif kind == 3:  # half of it missing
            without, _ = render([replace(scene, things=others)])
            y, x = round(thing.y), round(thing.x)
            if rng.random() < 0.5:
                part = (slice(None), slice(0, y) if rng.random() < 0.5 else slice(y, SIZE), slice(None))
            else:
                part = (slice(None), slice(None), slice(0, x) if rng.random() < 0.5 else slice(x, SIZE))
            pictures[row][part] = without[0][part]
        elif kind == 4:  # one more thing than was asked for
            taken = {other.cell for other in scene.things}
            more = _thing_at(rng, rng.choice([cell for cell in CELLS if cell not in taken]))
            canvas, masks = render([Scene((more,), scene.background)])
            pictures[row] = torch.where(masks[0, :1] > 0.5, canvas[0], pictures[row])
        else:  # a patch of another colour
            colour = torch.tensor(COLOURS[rng.choice(_COLOURS)]) / 255
            side, y, x = rng.randrange(6, 14), rng.randrange(SIZE - 14), rng.randrange(SIZE - 14)
            pictures[row, :, y : y + side, x : x + side] = colour[:, None, None]
    return pictures, which


def _thing_at(rng: random.Random, cell: str) -> Thing:
    row, column = divmod(CELLS.index(cell), 3)
    return Thing(
        rng.choice(_COLOURS), rng.choice(_SHAPES), cell, 13.0 + 19 * column, 13.0 + 19 * row, rng.uniform(7.0, 10.5)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Batch:
    """``right`` pictures with ``1 + WRONG`` captions each, and ``spoiled`` ones with their own."""

    pictures: torch.Tensor
    spoiled: torch.Tensor
    ids: torch.Tensor
    spoiled_ids: torch.Tensor
    same: torch.Tensor
    cells: torch.Tensor
    grounds: torch.Tensor
    tokens: torch.Tensor


def cell_labels(scene: Scene) -> list[tuple[int, int]]:
    """Colour and shape of what stands in each of the nine cells, 0 for nothing."""
    labels = [(0, 0)] * len(CELLS)
    for thing in scene.things:
        labels[CELLS.index(thing.cell)] = 1 + _COLOURS.index(thing.colour), 1 + _SHAPES.index(thing.shape)
    return labels


def draw(rng: random.Random, tokenizer: CLIPTokenizer, size: int) -> Batch:
    """One batch of new scenes."""
    prompts = [right_caption(rng, held_out=False) for _ in range(size)]
    texts: list[str] = []
    keys: list[Key] = []
    for prompt, style in prompts:
        rows = [prompt]
        while len(rows) < 1 + WRONG:
            other = wrong_caption(rng, prompt, style, rng.choice(CHANGES), held_out=False)
            if other is not None:
                rows.append(other)
        texts += [row.text for row in rows]
        keys += [key(row.scene) for row in rows]
    scenes = [loosened(rng, prompt.scene) for prompt, _ in prompts]
    pictures, masks = render(scenes)
    bad = [right_caption(rng, held_out=False)[0] for _ in range(size // 4)]
    number: dict[Key, int] = {}
    of_text = torch.tensor([number.setdefault(each, len(number)) for each in keys])
    of_picture = torch.tensor([number[key(scene)] for scene in scenes])
    best, slot = avg_pool2d(masks, PATCH).flatten(2).max(1)
    kinds = torch.zeros(size, 2, dtype=torch.long)
    for row, scene in enumerate(scenes):
        for column, thing in enumerate(scene.things):
            kinds[row, column] = 1 + _COLOURS.index(thing.colour) * len(_SHAPES) + _SHAPES.index(thing.shape)
    return Batch(
        pictures=roughened(pictures),
        spoiled=roughened(spoiled(rng, [prompt.scene for prompt in bad])),
        ids=token_ids(tokenizer, texts),
        spoiled_ids=token_ids(tokenizer, [prompt.text for prompt in bad]),
        same=of_picture[:, None] == of_text[None],
        cells=torch.tensor([cell_labels(scene) for scene in scenes]),
        grounds=torch.tensor([_GROUNDS.index(scene.background) for scene in scenes]),
        tokens=torch.where(best > 0.03, kinds.gather(1, slot), 0),
    )


def token_ids(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    return tokenizer(texts, padding=True, truncation=True, max_length=CLIP_LENGTH, return_tensors="pt")["input_ids"]


class Model(torch.nn.Module):
    """CLIP with the heads that are thrown away."""

    def __init__(self, init: Path, text: Path) -> None:
        super().__init__()
        if init.exists():
            self.clip = CLIPModel.from_pretrained(init, dtype=torch.float32)
            scale = self.clip.logit_scale.detach().clone()
        else:
            scale = torch.tensor(2.7)
            tower = CLIPTextModel.from_pretrained(text, dtype=torch.float32)
            self.clip = CLIPModel(CLIPConfig(text_config=tower.config.to_dict(), **CONFIG))
            self.clip.text_model.load_state_dict(
                {name.removeprefix("text_model."): value for name, value in tower.state_dict().items()}
            )
            for name, parameter in self.clip.vision_model.named_parameters():
                if parameter.dim() > 1:
                    torch.nn.init.normal_(parameter, std=0.02 if "embedding" in name else parameter.shape[1] ** -0.5)
        width = CONFIG["projection_dim"]
        self.read = torch.nn.Linear(width, len(CELLS) * CELL_READ + len(_GROUNDS))
        self.token_read = torch.nn.Linear(CONFIG["vision_config"]["hidden_size"], KINDS)
        self.bias = torch.nn.Parameter(torch.tensor(-5.0))
        self.scale = torch.nn.Parameter(scale)

    def images(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors (N, 192) of unit length, and what each token shows."""
        output = self.clip.vision_model(pixel_values=(pictures - 0.5) / 0.5, output_hidden_states=True)
        middle = output.hidden_states[MIDDLE][:, 1:]
        return normalize(self.clip.visual_projection(output.pooler_output), dim=-1), self.token_read(middle)

    def texts(self, ids: torch.Tensor) -> torch.Tensor:
        return normalize(self.clip.text_projection(self.clip.text_model(input_ids=ids).pooler_output), dim=-1)

    def loss(self, batch: Batch, auxiliary: float) -> tuple[torch.Tensor, dict[str, float]]:
        size = len(batch.pictures)
        vectors, tokens = self.images(torch.cat([batch.pictures, batch.spoiled]))
        good, bad = vectors[:size], vectors[size:]
        texts = self.texts(batch.ids)
        own = texts.view(size, 1 + WRONG, -1)
        cosines = good @ texts.T
        scale = self.scale.exp()
        rows = torch.arange(size)
        target = rows * (1 + WRONG)
        # Another caption of the same scene is neither right nor wrong to the contrast.
        others = batch.same.clone()
        others[rows, target] = False
        logits = (cosines * scale).masked_fill(others, -1e4)
        to_text = cross_entropy(logits, target)
        to_image = cross_entropy(logits[:, target].T, rows)
        # One scale and one bias for all pictures: that is what makes scores comparable between pictures.
        paired = torch.einsum("nd,nkd->nk", good, own) * scale + self.bias
        labels = torch.zeros_like(paired)
        labels[:, 0] = 1
        of_bad = (bad * self.texts(batch.spoiled_ids)).sum(-1) * scale + self.bias
        weights = torch.ones_like(paired)
        weights[:, 0] = WRONG
        pair = binary_cross_entropy_with_logits(paired, labels, weights) + 0.5 * binary_cross_entropy_with_logits(
            of_bad, torch.zeros_like(of_bad)
        )
        seen, said = self._read(good, batch), self._read(own[:, 0], batch)
        shown = cross_entropy(tokens[:size].flatten(0, 1), batch.tokens.flatten())
        total = 0.5 * (to_text + to_image) + 2 * pair + auxiliary * (seen + said + shown)
        right = (paired[:, :1] > paired[:, 1:]).float().mean().item()
        parts = {
            "contrast": to_text.item(),
            "pair": pair.item(),
            "seen": seen.item(),
            "said": said.item(),
            "tokens": shown.item(),
            "right": right,
            "rejected": (of_bad < 0).float().mean().item(),
        }
        return total, parts

    def _read(self, vectors: torch.Tensor, batch: Batch) -> torch.Tensor:
        cells, ground = self.read(vectors * 8).split([len(CELLS) * CELL_READ, len(_GROUNDS)], -1)
        loss = cross_entropy(ground, batch.grounds)
        parts = cells.reshape(-1, CELL_READ).split([1 + len(_COLOURS), 1 + len(_SHAPES)], -1)
        for part, labels in zip(parts, batch.cells.flatten(0, 1).unbind(1), strict=True):
            # Most cells are empty: the two that are not must not drown.
            weight = torch.full((part.shape[1],), 4.0)
            weight[0] = 1.0
            loss = loss + cross_entropy(part, labels, weight)
        return loss


def train(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    rng = random.Random(f"clip {options.seed}")
    tokenizer = CLIPTokenizer.from_pretrained(options.pipeline / "tokenizer")
    model = Model(options.folder if options.go_on else Path("none"), options.pipeline / "text_encoder")
    model.clip.set_attn_implementation("eager")  # on a CPU, in half precision and for sequences this short, the fastest
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and ".layers." in name else rest).append(parameter)
    muon = Muon(matrices)
    adam = torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0)
    average: dict[str, torch.Tensor] = {}
    shown: dict[str, float] = {}
    started, limit, step, saved = time.time(), options.minutes * 60, 0, time.time()
    while (elapsed := time.time() - started) < limit:
        share = elapsed / limit
        rate = options.rate * min(1, (step + 1) / 150) * (1 - share)
        batch = draw(rng, tokenizer, options.batch)
        with torch.autocast("cpu", torch.bfloat16, enabled=not options.fp32):
            total, parts = model.loss(batch, auxiliary=0.5 if share < 0.7 else 0.1)
        model.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step(rate)
        adam.param_groups[0]["lr"] = rate
        adam.step()
        with torch.no_grad():
            model.scale.clamp_(max=3.7)
            for name, value in model.clip.state_dict().items():
                if value.is_floating_point():
                    average[name] = torch.lerp(average.get(name, value), value, 0.005) if step > 200 else value.clone()
        step += 1
        for name, value in parts.items():
            shown[name] = 0.97 * shown.get(name, value) + 0.03 * value
        if step % 50 == 0:
            figures = ", ".join(f"{name} {value:.3f}" for name, value in shown.items())
            print(f"{step} steps, {step * options.batch / elapsed:.0f} pictures/s: {figures}", flush=True)
        if time.time() - saved > 300:
            save(model, average, tokenizer, options.folder)
            saved = time.time()
    save(model, average, tokenizer, options.folder)


def save(model: Model, average: dict[str, torch.Tensor], tokenizer: CLIPTokenizer, folder: Path) -> None:
    """The averaged weights in half precision, with all that transformers needs to load them."""
    model.clip.logit_scale.data.copy_(model.scale.data)
    average["logit_scale"] = model.clip.logit_scale.data.clone()
    shutil.rmtree(folder, ignore_errors=True)
    half = {name: value.half() if value.is_floating_point() else value for name, value in average.items()}
    CLIPModel(model.clip.config).half().save_pretrained(folder, state_dict=half)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}, image_mean=MEAN, image_std=STD
    ).save_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Test
# ---------------------------------------------------------------------------------------------------------------------


def auc(right: torch.Tensor, wrong: torch.Tensor) -> float:
    """The chance that a right pair scores above a wrong one; ties count half."""
    return float(((right[:, None] > wrong).double() + 0.5 * (right[:, None] == wrong).double()).mean())


def test(folder: Path, count: int, seed: int) -> dict[str, tuple[float, int]]:
    """ROC-AUC of right captions against captions with one thing changed, on held-out scenes, by kind and in all."""
    rng = random.Random(f"clip test {seed}")
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    prompts = [right_caption(rng, held_out=True) for _ in range(count)]
    wrong: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for row, (prompt, style) in enumerate(prompts):
        for kind in CHANGES:
            other = wrong_caption(rng, prompt, style, kind, held_out=None)
            if other is not None:
                wrong[kind].append((row, other.text))
    with torch.no_grad():
        pictures = (render([prompt.scene for prompt, _ in prompts])[0] * 255).round() / 255
        images = [model.vision_model(pixel_values=(part - 0.5) / 0.5).pooler_output for part in pictures.split(256)]
        vectors = normalize(model.visual_projection(torch.cat(images)), dim=-1)

        def said(texts: list[str]) -> torch.Tensor:
            parts = [
                model.text_model(input_ids=token_ids(tokenizer, texts[first : first + 512])).pooler_output
                for first in range(0, len(texts), 512)
            ]
            return normalize(model.text_projection(torch.cat(parts)), dim=-1)

        right = (vectors * said([prompt.text for prompt, _ in prompts])).sum(-1)
        scores = {
            kind: (vectors[[row for row, _ in pairs]] * said([text for _, text in pairs])).sum(-1)
            for kind, pairs in wrong.items()
        }
    result = {kind: (auc(right, values), len(values)) for kind, values in scores.items()}
    everything = torch.cat(list(scores.values()))
    result["all"] = auc(right, everything), len(everything)
    result["in its own row"] = (
        sum(float((right[[row for row, _ in wrong[kind]]] > scores[kind]).sum()) for kind in scores) / len(everything),
        len(everything),
    )
    return result


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: zero-shot-image-classification
---

# tiny-clip

A CLIP of {parameters:.1f} million parameters that says how well a picture of tiny-flux's world shows its caption. It
exists to try scoring and filtering out, and to test them, without a network or a GPU.
`CLIPModel.from_pretrained(folder)` loads it.

It knows what [tiny-flux](../tiny-flux/README.md) knows: one or two things of six colours and four shapes, nine
places, four backgrounds; what a caption does not say has tiny-flux's one meaning. Of anything else its scores mean
nothing. A thing that is half faded, cut, between two shapes or two colours counts as wrong.

## How well

ROC-AUC of right captions against captions with one thing changed, over {count} drawn scenes that training never showed,
{date}:

| changed | ROC-AUC | wrong captions |
| --- | --- | --- |
{rows}

"In its own row" is the share of wrong captions that score below the right caption of the same picture.

## How it was made

From scratch, on a CPU, on pictures drawn by a program (`training/clip.py`): {history} There are no photographs, no
scraped data and no other model in it but tiny-flux's text encoder, where its own began. Licence: Apache-2.0.
"""


def write_card(folder: Path, result: dict[str, tuple[float, int]], count: int, history: str) -> None:
    """The model card beside the weights."""
    rows = [f"| {kind} | {value:.4f} | {number} |" for kind, (value, number) in result.items()]
    parameters = sum(p.numel() for p in CLIPModel.from_pretrained(folder).parameters()) / 1e6
    card = CARD.format(
        parameters=parameters,
        count=count,
        date=datetime.datetime.now(datetime.UTC).date(),
        rows="\n".join(rows),
        history=history or "see `training/README.md`.",
    )
    (folder / "README.md").write_text(card)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/tiny-clip"))
    parser.add_argument("--pipeline", type=Path, default=Path("src/dataflow/builtin/tiny-flux"))
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fp32", action="store_true", help="for a CPU without bfloat16 instructions")
    parser.add_argument("--go-on", action="store_true", help="from the folder as it is")
    parser.add_argument("--test", action="store_true", help="only measure the folder")
    parser.add_argument("--history", default="", help="one sentence for the card: how long it was trained")
    options = parser.parse_args()
    transformers_logging.disable_progress_bar()
    if not options.test:
        train(options)
    result = test(options.folder, 1000, 2026)
    for kind, (value, number) in result.items():
        print(f"| {kind} | {value:.4f} | {number} |")
    write_card(options.folder, result, 1000, options.history)


if __name__ == "__main__":
    main()
