"""The tiny OWL-ViT that finds the built-in model's things by name: ``python -m training.detector --minutes 30``.

Every picture is asked for all things of the world, by colour and shape ("a red circle") and by shape alone ("a
circle"). The token in which a thing has its centre answers for it, and says where its box is. Of a spoiled thing
(:func:`training.clip.spoiled`) nothing may be found. ``--test`` measures an exported folder on held-out scenes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import shutil
import time
from pathlib import Path

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, l1_loss
from transformers import CLIPTokenizer, OwlViTConfig, OwlViTForObjectDetection, OwlViTImageProcessorPil, OwlViTProcessor
from transformers.utils import logging as transformers_logging

from dataflow.metrics.objects import iou
from training.clip import right_caption, roughened, spoiled_things
from training.scenes import COLOURS, SHAPES, SIZE, Scene, render
from training.transformer import Muon

PATCH = 8
GRID = SIZE // PATCH
WORDS = 12
NAMES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
QUERIES = (*NAMES, *SHAPES)
TEMPLATES = ("{}", "{a}", "a photo of {a}", "a picture of {a}")
THRESHOLD = 0.3
TEXT = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}


def tokenizer_from(clip: CLIPTokenizer) -> CLIPTokenizer:
    """The same words in another order: OWL-ViT takes the highest id for the end of a text, and id 0 for no text."""
    old = clip.get_vocab()
    ends = ("<|startoftext|>", "<|endoftext|>")
    words = [word for word, _ in sorted(old.items(), key=lambda item: item[1]) if word not in ends]
    vocabulary = {word: number for number, word in enumerate(["<|pad|>", ends[0], *words, ends[1]])}
    merges = [tuple(merge) for merge in _merges(clip)]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=WORDS, pad_token="<|pad|>")


def _merges(clip: CLIPTokenizer) -> list[list[str]]:
    return json.loads(clip.backend_tokenizer.to_str())["model"]["merges"]


def query(rng: random.Random, name: str) -> str:
    article = f"an {name}" if name[0] in "aeiou" else f"a {name}"
    return rng.choice(TEMPLATES).format(name, a=article)


def ids_of(tokenizer: CLIPTokenizer, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    given = tokenizer(texts, padding="max_length", truncation=True, max_length=WORDS, return_tensors="pt")
    return given["input_ids"], given["attention_mask"]


def boxes_of(masks: torch.Tensor) -> torch.Tensor:
    """The box of each mask, (N, 4) as centre, width and height in shares of the side; (N, 64, 64) in 0..1."""
    solid = masks > 0.5
    rows, columns = solid.any(2), solid.any(1)
    first = lambda line: line.float().argmax(1)  # noqa: E731
    last = lambda line: SIZE - line.flip(1).float().argmax(1)  # noqa: E731
    x0, x1, y0, y1 = first(columns), last(columns), first(rows), last(rows)
    return torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], 1).float() / SIZE


def draw(rng: random.Random, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pictures, what each token answers to each query, how much that counts, and (row, token, box) of each thing."""
    scenes = [_scene(rng) for _ in range(size)]
    pictures, masks = render(scenes)
    bad = [right_caption(rng, held_out=False)[0].scene for _ in range(size // 3)]
    bad_pictures, which = spoiled_things(rng, bad)
    # What was added to a picture is a thing, or half hides one: only pictures with a spoiled thing of their own are
    # used.
    kept = [row for row, slot in enumerate(which) if slot is not None]
    bad, bad_pictures, which = [bad[row] for row in kept], bad_pictures[kept], [which[row] for row in kept]
    _, bad_masks = render(bad)
    pictures, masks = torch.cat([pictures, bad_pictures]), torch.cat([masks, bad_masks])
    gone = {(size + row, slot) for row, slot in enumerate(which)}
    answers = torch.zeros(len(pictures), GRID * GRID, len(QUERIES))
    counts = torch.ones(len(pictures), GRID * GRID, 1)
    places, boxes = [], []
    for row, scene in enumerate([*scenes, *bad]):
        for slot, thing in enumerate(scene.things):
            token = int(thing.y // PATCH) * GRID + int(thing.x // PATCH)
            for dy in (-1.2, 0, 1.2):  # just over the edge of a token, its neighbour is not wrong
                for dx in (-1.2, 0, 1.2):
                    counts[row, int((thing.y + dy) // PATCH) * GRID + int((thing.x + dx) // PATCH)] = 0
            counts[row, token] = 1
            if (row, slot) in gone:
                continue
            answers[row, token, QUERIES.index(thing.name)] = 1
            answers[row, token, QUERIES.index(thing.shape)] = 1
            places.append((row, token))
            boxes.append(masks[row, slot])
    return roughened(pictures), answers, counts, torch.tensor(places), boxes_of(torch.stack(boxes))


def _scene(rng: random.Random) -> Scene:
    return right_caption(rng, held_out=False)[0].scene


def train(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    rng = random.Random(f"detector {options.seed}")
    tokenizer = tokenizer_from(CLIPTokenizer.from_pretrained(options.pipeline / "tokenizer"))
    if options.go_on:
        model = OwlViTForObjectDetection.from_pretrained(options.folder, dtype=torch.float32)
    else:
        ends = {"bos_token_id": 1, "eos_token_id": len(tokenizer) - 1, "pad_token_id": 0}
        text = {**TEXT, "vocab_size": len(tokenizer), "max_position_embeddings": WORDS, **ends}
        vision = {**VISION, "image_size": SIZE, "patch_size": PATCH}
        model = OwlViTForObjectDetection(
            OwlViTConfig(text_config=text, vision_config=vision, projection_dim=TEXT["hidden_size"])
        )
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embedding" not in name:
                torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        torch.nn.init.constant_(model.class_head.logit_shift.bias, -0.6)
        torch.nn.init.constant_(model.class_head.logit_scale.bias, 8.0)
        torch.nn.init.zeros_(model.box_head.dense2.weight)
    model.set_attn_implementation("eager")
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and ".layers." in name else rest).append(parameter)
    muon = Muon(matrices)
    adam = torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0)
    average: dict[str, torch.Tensor] = {}
    shown: dict[str, float] = {}
    started, limit, step, saved = time.time(), options.minutes * 60, 0, time.time()
    while (elapsed := time.time() - started) < limit:
        rate = options.rate * min(1, (step + 1) / 150) * (1 - elapsed / limit)
        pictures, answers, counts, places, boxes = draw(rng, options.batch)
        ids, mask = ids_of(tokenizer, [query(rng, name) for name in QUERIES])
        with torch.autocast("cpu", torch.bfloat16, enabled=not options.fp32):
            features, _ = model.image_embedder(pixel_values=(pictures - 0.5) / 0.5)
            features = features.flatten(1, 2)
            said = model.owlvit.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
            logits, _ = model.class_predictor(features, said[None].expand(len(pictures), -1, -1))
            found = model.box_predictor(features, features.view(len(pictures), GRID, GRID, -1))
        logits = logits.float()
        shares = torch.sigmoid(logits)
        # Nearly all answers are no, and easy: focal weights keep them from drowning the others.
        weights = counts * torch.where(answers > 0, (1 - shares) ** 2, shares**2).detach()
        named = binary_cross_entropy_with_logits(logits, answers, weights, reduction="sum") / len(boxes)
        placed = l1_loss(found.float()[places[:, 0], places[:, 1]], boxes, reduction="sum") / len(boxes)
        model.zero_grad()
        (named + 5 * placed).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step(rate)
        adam.param_groups[0]["lr"] = rate
        adam.step()
        step += 1
        with torch.no_grad():
            for name, value in model.state_dict().items():
                if value.is_floating_point():
                    average[name] = torch.lerp(average.get(name, value), value, 0.005) if step > 200 else value.clone()
            sure = shares * counts > THRESHOLD
            parts = {
                "named": named.item(),
                "placed": placed.item(),
                "recall": (sure & (answers > 0)).sum().item() / answers.sum().item(),
                "precision": (sure & (answers > 0)).sum().item() / max(1, sure.sum().item()),
            }
        for name, value in parts.items():
            shown[name] = 0.97 * shown.get(name, value) + 0.03 * value
        if step % 50 == 0:
            figures = ", ".join(f"{name} {value:.3f}" for name, value in shown.items())
            print(f"{step} steps, {step * options.batch / elapsed:.0f} pictures/s: {figures}", flush=True)
        if time.time() - saved > 300:
            save(model, average, tokenizer, options.folder)
            saved = time.time()
    save(model, average, tokenizer, options.folder)


def save(
    model: OwlViTForObjectDetection, average: dict[str, torch.Tensor], tokenizer: CLIPTokenizer, folder: Path
) -> None:
    """The averaged weights in half precision, with all that transformers needs to load them."""
    shutil.rmtree(folder, ignore_errors=True)
    half = {name: value.half() if value.is_floating_point() else value for name, value in average.items()}
    OwlViTForObjectDetection(model.config).half().save_pretrained(folder, state_dict=half)
    processor = OwlViTImageProcessorPil(
        size={"height": SIZE, "width": SIZE}, do_center_crop=False, image_mean=(0.5,) * 3, image_std=(0.5,) * 3
    )
    OwlViTProcessor(processor, tokenizer).save_pretrained(folder)


def test(folder: Path, count: int, seed: int) -> dict[str, float]:
    """Of held-out scenes: things found with their name and box, and pictures whose things are found and nothing
    else."""
    rng = random.Random(f"detector test {seed}")
    model = OwlViTForObjectDetection.from_pretrained(folder, dtype=torch.float32).eval()
    processor = OwlViTProcessor.from_pretrained(folder)
    names = [f"a {name}" for name in NAMES]
    scenes = [right_caption(rng, held_out=True)[0].scene for _ in range(count)]
    pictures, masks = render(scenes)
    found = things = false = exact = 0
    for row, scene in enumerate(scenes):
        picture = (pictures[row] * 255).round().byte()
        given = processor(text=[names], images=picture.permute(1, 2, 0).numpy(), return_tensors="pt")
        with torch.no_grad():
            output = model(**given)
        sizes = torch.tensor([[SIZE, SIZE]])
        answer = processor.post_process_grounded_object_detection(output, THRESHOLD, sizes)[0]
        order = answer["scores"].argsort(descending=True)
        seen: list[tuple[str, torch.Tensor]] = []
        for label, box in zip(answer["labels"][order].tolist(), answer["boxes"][order], strict=True):
            # A thing with its centre on the edge of a token is found by both: the surer one counts.
            if not any(name == NAMES[label] and iou(box.tolist(), other.tolist()) > 0.5 for name, other in seen):
                seen.append((NAMES[label], box))
        right = 0
        for slot, thing in enumerate(scene.things):
            x, y, width, height = (boxes_of(masks[row, slot : slot + 1])[0] * SIZE).tolist()
            wanted = torch.tensor([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
            near = [box for name, box in seen if name == thing.name and (box - wanted).abs().max() < 3]
            right += bool(near)
        things += len(scene.things)
        found += right
        false += len(seen) - right
        exact += right == len(scene.things) == len(seen)
    return {"recall": found / things, "false per picture": false / count, "exact": exact / count}


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: zero-shot-object-detection
---

# tiny-owl

An OWL-ViT of {parameters:.1f} million parameters that finds the things of tiny-flux's world by name: "a red circle",
"a star". It exists to try object rules out, and to test them, without a network or a GPU.
`OwlViTForObjectDetection.from_pretrained(folder)` loads it.

It knows the six colours and four shapes of [tiny-flux](../tiny-flux/README.md), with or without an article or "a
photo of" before them. A thing that is half faded, cut, or between two shapes or colours is not found.

## How well

Asked for all 24 things, with a threshold of {threshold}, of overlapping ones of one name only the surer counting,
over {count} drawn scenes that training never showed, {date}:

| | |
| --- | --- |
| things found, with their name and their box within 3 pixels | {recall:.2%} |
| other things found, per picture | {false:.4f} |
| pictures whose things are found and nothing else | {exact:.1%} |

## How it was made

From scratch, on a CPU, on pictures drawn by a program (`training/detector.py`): {history} There are no photographs,
no scraped data and no other model in it. Licence: Apache-2.0.
"""


def write_card(folder: Path, result: dict[str, float], count: int, history: str) -> None:
    """The model card beside the weights."""
    card = CARD.format(
        parameters=sum(p.numel() for p in OwlViTForObjectDetection.from_pretrained(folder).parameters()) / 1e6,
        threshold=THRESHOLD,
        count=count,
        date=datetime.datetime.now(datetime.UTC).date(),
        recall=result["recall"],
        false=result["false per picture"],
        exact=result["exact"],
        history=history or "see `training/README.md`.",
    )
    (folder / "README.md").write_text(card)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/tiny-owl"))
    parser.add_argument("--pipeline", type=Path, default=Path("src/dataflow/builtin/tiny-flux"))
    parser.add_argument("--minutes", type=float, default=30)
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
    result = test(options.folder, 500, 2026)
    for name, value in result.items():
        print(f"| {name} | {value:.4f} |")
    write_card(options.folder, result, 500, options.history)


if __name__ == "__main__":
    main()
