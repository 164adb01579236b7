"""Whether a picture shows the objects it was asked to show, given what a detector found: GenEval and T2I-CompBench.

The rules only: boxes, scores and colours come from any detector and any classifier. Boxes are (left, top, right,
bottom) in pixels, y downwards.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Box = tuple[float, float, float, float]

GENEVAL_TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
GENEVAL_COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
GENEVAL_COLOUR_TEMPLATES = (
    "a photo of a {colour} {label}",
    "a photo of a {colour}-colored {label}",
    "a photo of a {colour} object",
)
GENEVAL_RELATIONS = ("left of", "right of", "above", "below")

_THRESHOLD, _COUNTING_THRESHOLD = 0.3, 0.9
_MOST_PER_CLASS = 16
_POSITION_MARGIN, _POSITION_COMPONENT = 0.1, 0.5

_SPATIAL_WORDS = (
    "on side of",
    "next to",
    "near",
    "on the left of",
    "on the right of",
    "on the bottom of",
    "on the top of",
    "on top of",
)
_NEAR_WORDS = ("on side of", "next to", "near")
_NEAR_PIXELS, _LOOSE_IOU = 150.0, 0.1


@dataclass(frozen=True, slots=True)
class Detection:
    """One object found in a picture.

    Args:
        label: the class, in the words of the prompt set.
        score: the detector's confidence, 0..1.
        box: left, top, right, bottom in pixels.
        colour: the name of its colour, where one was told.
    """

    label: str
    score: float
    box: Box
    colour: str | None = None


@dataclass(frozen=True, slots=True)
class Requirement:
    """One clause of a GenEval prompt: at least ``count`` of ``label``, of a colour, in a relation to an earlier clause.

    Args:
        label: the class.
        count: how many.
        colour: one of the ten colours, or none.
        position: the relation and the number of the ``include`` clause it is relative to.
    """

    label: str
    count: int
    colour: str | None = None
    position: tuple[str, int] | None = None


@dataclass(frozen=True, slots=True)
class GenEvalPrompt:
    """One line of ``evaluation_metadata.jsonl``: everything in ``include`` must be there, nothing in ``exclude``."""

    tag: str
    prompt: str
    include: tuple[Requirement, ...]
    exclude: tuple[Requirement, ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a picture is right, and if not, why."""

    correct: bool
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GenEvalSummary:
    """Accuracies of 0..1, higher is better. ``overall`` is None where one of the six tasks has no picture."""

    by_task: dict[str, float]
    overall: float | None
    pictures: int


def parse_geneval(line: str | bytes) -> GenEvalPrompt:
    """One line of GenEval's ``evaluation_metadata.jsonl``.

    Raises:
        ValueError: not JSON, or not such a line; the text says what is wrong.

    Source: Ghosh et al. 2023, arXiv:2310.11513; ``djghosh13/geneval`` (MIT).
    """
    row = json.loads(line)
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise ValueError("expected an object with a prompt")
    if row.get("tag") not in GENEVAL_TASKS:
        raise ValueError(f"tag: expected one of {', '.join(GENEVAL_TASKS)}, not {row.get('tag')!r}")
    include = tuple(_requirement(clause, number) for number, clause in enumerate(_clauses(row, "include")))
    exclude = tuple(_requirement(clause, 0) for clause in _clauses(row, "exclude"))
    if not include and not exclude:
        raise ValueError("nothing is asked for")
    return GenEvalPrompt(row["tag"], row["prompt"], include, exclude)


def load_geneval(path: str | Path) -> list[GenEvalPrompt]:
    """All prompts of an ``evaluation_metadata.jsonl``; empty lines are left out.

    Raises:
        ValueError: a line cannot be used; the text has its number.
        OSError: the file cannot be read.
    """
    prompts: list[GenEvalPrompt] = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        if line.strip():
            try:
                prompts.append(parse_geneval(line))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
    return prompts


def geneval_kept(detections: Iterable[Detection], tag: str) -> dict[str, list[Detection]]:
    """The detections that count, by label, the surest first.

    Kept are scores over .3, over .9 for the task ``counting``, and 16 of a label at most. There is no suppression of
    overlaps, as in the published runs.

    Raises:
        ValueError: a score or a box that is not a finite number, or a box whose corners are the wrong way round.
    """
    threshold = _COUNTING_THRESHOLD if tag == "counting" else _THRESHOLD
    kept: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=_checked_score, reverse=True):
        if detection.score > threshold:
            of_label = kept.setdefault(detection.label, [])
            if len(of_label) < _MOST_PER_CLASS:
                of_label.append(detection)
    return kept


def relative_position(subject: Box, target: Box) -> frozenset[str]:
    """Where ``subject`` lies seen from ``target``.

    The offset of the centres is shortened on either axis by a tenth of the two boxes' sizes added up; a relation holds
    where the component left, over the length of the whole offset, is more than .5.

    Args:
        subject: left, top, right, bottom.
        target: the same.

    Returns:
        None, one or two of ``left of``, ``right of``, ``above``, ``below``.

    Source: Ghosh et al. 2023, arXiv:2310.11513; ``djghosh13/geneval`` (MIT).
    """
    offsets, left_over = [], []
    for axis in (0, 1):
        offset = (subject[axis] + subject[axis + 2] - target[axis] - target[axis + 2]) / 2
        sizes = abs(subject[axis + 2] - subject[axis]) + abs(target[axis + 2] - target[axis])
        offsets.append(offset)
        left_over.append(math.copysign(max(abs(offset) - _POSITION_MARGIN * sizes, 0.0), offset))
    if max(map(abs, left_over)) < 1e-3:
        return frozenset()
    across, down = (value / math.hypot(*offsets) for value in left_over)
    relations = set()
    if abs(across) > _POSITION_COMPONENT:
        relations.add("left of" if across < 0 else "right of")
    if abs(down) > _POSITION_COMPONENT:
        relations.add("above" if down < 0 else "below")
    return frozenset(relations)


def geneval_verdict(prompt: GenEvalPrompt, detections: Iterable[Detection]) -> Verdict:
    """Whether a picture is right by GenEval's rules: every ``include`` clause AND no ``exclude`` clause.

    A clause looks at its ``count`` surest objects only: all of them must have the colour, and each must have the
    relation to each object of the clause it names.

    Args:
        prompt: what was asked for.
        detections: everything found, in any order; objects of clauses with a colour must have theirs.

    Raises:
        ValueError: a colour is asked for and a detection that matters has none, or a detection that is no number.

    Source: Ghosh et al. 2023, arXiv:2310.11513; ``djghosh13/geneval`` (MIT).
    """
    kept = geneval_kept(detections, prompt.tag)
    reasons: list[str] = []
    matched: list[list[Detection] | None] = []
    for clause in prompt.include:
        objects = kept.get(clause.label, [])[: clause.count]
        reason = _missing(clause, objects) or _misplaced(clause, objects, matched)
        matched.append(None if reason else objects)
        if reason:
            reasons.append(reason)
    for clause in prompt.exclude:
        found = len(kept.get(clause.label, []))
        if found >= clause.count:
            reasons.append(f"expected fewer than {clause.count} {clause.label}, found {found}")
    return Verdict(not reasons, tuple(reasons))


def geneval_summary(results: Iterable[tuple[str, bool]]) -> GenEvalSummary:
    """GenEval's scores: the accuracy of each task over its pictures, and the mean of the six.

    Args:
        results: a tag and whether the picture is right, for every picture.

    Raises:
        ValueError: a tag that is none of the six, or no results.

    Source: ``summary_scores.py`` of ``djghosh13/geneval`` (MIT), which averages whatever tasks it finds.
    """
    right: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    for tag, correct in results:
        if tag not in GENEVAL_TASKS:
            raise ValueError(f"tag: expected one of {', '.join(GENEVAL_TASKS)}, not {tag!r}")
        seen[tag] += 1
        right[tag] += bool(correct)
    if not seen:
        raise ValueError("no results")
    by_task = {tag: right[tag] / seen[tag] for tag in GENEVAL_TASKS if tag in seen}
    overall = math.fsum(by_task.values()) / len(by_task) if len(by_task) == len(GENEVAL_TASKS) else None
    return GenEvalSummary(by_task, overall, seen.total())


def geneval_colour_prompts(label: str) -> list[list[str]]:
    """The texts that a CLIP model embeds to tell the colour of a ``label``: for each of the ten colours three."""
    return [
        [template.format(colour=colour, label=label) for template in GENEVAL_COLOUR_TEMPLATES]
        for colour in GENEVAL_COLOURS
    ]


def zero_shot_scores(crops: npt.ArrayLike, texts: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Cosine of each crop with each class; a class is the mean of its texts' unit embeddings, scaled to length one.

    GenEval's crops show the object by its mask over a plain #999 and are cut to its box; the model is CLIP ViT-L/14.

    Args:
        crops: image embeddings, shape (n, d).
        texts: text embeddings, shape (classes, templates, d), in the order of :func:`geneval_colour_prompts`.

    Returns:
        Shape (n, classes), float64, -1..1; higher is likelier.

    Raises:
        ValueError: shapes that do not fit, or rows without a direction.

    Source: Radford et al. 2021; ``LAION-AI/CLIP_benchmark`` (MIT).
    """
    from dataflow.metrics.alignment import unit_rows

    table = np.asarray(texts, dtype=np.float64)
    if table.ndim != 3:
        raise ValueError(f"texts: expected shape (classes, templates, d), not {table.shape}")
    rows = unit_rows(crops, "crops")
    if rows.shape[1] != table.shape[2]:
        raise ValueError(f"crops of {rows.shape[1]} and texts of {table.shape[2]} numbers cannot be compared")
    classes = unit_rows(table.reshape(-1, table.shape[2]), "texts").reshape(table.shape).mean(axis=1)
    return rows @ unit_rows(classes, "classes").T


def colours_of(scores: npt.ArrayLike, colours: tuple[str, ...] = GENEVAL_COLOURS) -> list[str]:
    """The likeliest colour of each object; of equal scores the first in the list.

    Args:
        scores: shape (n, colours), higher is likelier, from any classifier.
        colours: their names.

    Raises:
        ValueError: another shape, or a score that is NaN.
    """
    table = np.asarray(scores, dtype=np.float64)
    if table.ndim != 2 or table.shape[1] != len(colours):
        raise ValueError(f"scores: expected shape (n, {len(colours)}), not {table.shape}")
    if np.isnan(table).any():
        raise ValueError("scores: NaN")
    return [colours[index] for index in table.argmax(axis=1)]


def spatial_relation(prompt: str) -> str | None:
    """The relation of T2I-CompBench that a prompt asks for; of several the first in the benchmark's list."""
    return next((words for words in _SPATIAL_WORDS if words in prompt), None)


def compbench_spatial(detections: Iterable[Detection], first: str, second: str, relation: str) -> float:
    """T2I-CompBench's score of "``first`` ``relation`` ``second``" in two dimensions.

    ``.25 conf1 + .25 conf2 + .5 rule`` over the surest object of either label, .25 of the one there is, and 0 for all
    that stays under .5. The rule for a side is 1 where the offset of the centres is longer on that axis and points
    that way, times ``.1 / IoU`` for an IoU of .1 and more; near is 1 within 150 pixels on either axis, else 150 over
    the longer one.

    Args:
        detections: everything found, scores and boxes as they are.
        first: the label of the object that lies there.
        second: the label of the object it is relative to. The benchmark calls every girl, boy, man and woman a person.
        relation: "on the left of", "on the right of", "on the top of", "on top of", "on the bottom of", "next to",
            "on side of" or "near". The reference gives 0 for each "on top of", by oversight.

    Returns:
        0..1; higher is better.

    Raises:
        ValueError: another relation, or a detection that is no number.

    Source: Huang et al. 2023, arXiv:2307.06350; ``Karine-Huang/T2I-CompBench`` (MIT).
    """
    if relation not in _SPATIAL_WORDS:
        raise ValueError(f"relation: expected one of {', '.join(_SPATIAL_WORDS)}, not {relation!r}")
    surest: dict[str, Detection] = {}
    for detection in sorted(detections, key=_checked_score, reverse=True):
        surest.setdefault(detection.label, detection)
    one, other = surest.get(first), surest.get(second)
    score = 0.25 * sum(found.score for found in (one, other) if found)
    if one and other:
        score += 0.5 * _spatial_rule(one.box, other.box, relation)
    return score if score >= 0.5 else 0.0


def _spatial_rule(one: Box, other: Box, relation: str) -> float:
    across = (other[0] + other[2] - one[0] - one[2]) / 2
    down = (other[1] + other[3] - one[1] - one[3]) / 2
    if relation in _NEAR_WORDS:
        closest, farthest = sorted((abs(across), abs(down)))
        return 1.0 if closest < _NEAR_PIXELS else _NEAR_PIXELS / farthest
    along, aside = (across, down) if relation in ("on the left of", "on the right of") else (down, across)
    if relation in ("on the right of", "on the bottom of"):
        along = -along
    if along <= abs(aside):
        return 0.0
    overlap = iou(one, other)
    return 1.0 if overlap < _LOOSE_IOU else _LOOSE_IOU / overlap


def iou(one: Box, other: Box) -> float:
    """Intersection over union of two boxes, 0 to 1; 0 for boxes without an area."""
    width = max(0.0, min(one[2], other[2]) - max(one[0], other[0]))
    height = max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
    shared = width * height
    whole = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)) - shared
    return shared / whole if whole else 0.0


def _missing(clause: Requirement, objects: list[Detection]) -> str | None:
    if len(objects) < clause.count:
        return f"expected {clause.count} {clause.label}, found {len(objects)}"
    if clause.colour is None:
        return None
    if any(found.colour is None for found in objects):
        raise ValueError(f"a {clause.colour} {clause.label} is asked for, and a {clause.label} came without a colour")
    fitting = sum(found.colour == clause.colour for found in objects)
    if fitting < clause.count:
        told = ", ".join(f"{count} {colour}" for colour, count in Counter(found.colour for found in objects).items())
        return f"expected {clause.count} {clause.colour} {clause.label}, found {told}"
    return None


def _misplaced(clause: Requirement, objects: list[Detection], matched: list[list[Detection] | None]) -> str | None:
    if clause.position is None:
        return None
    relation, index = clause.position
    targets = matched[index]
    if targets is None:
        return f"nothing for {clause.label} to be {relation}"
    for found in objects:
        for target in targets:
            relations = relative_position(found.box, target.box)
            if relation not in relations:
                seen = " and ".join(sorted(relations)) or "no clear side of"
                return f"expected {clause.label} {relation} {target.label}, found {seen} it"
    return None


def _checked_score(detection: Detection) -> float:
    left, top, right, bottom = detection.box
    if not all(map(math.isfinite, (detection.score, *detection.box))) or left > right or top > bottom:
        raise ValueError(f"{detection.label}: score {detection.score} with box {detection.box} is no detection")
    return detection.score


def _clauses(row: Mapping[str, Any], name: str) -> list[Any]:
    clauses = row.get(name, [])
    if not isinstance(clauses, list):
        raise ValueError(f"{name}: expected a list")
    return clauses


def _requirement(clause: Any, number: int) -> Requirement:
    if not isinstance(clause, dict) or not isinstance(clause.get("class"), str):
        raise ValueError("expected a clause with a class")
    label, count = clause["class"], clause.get("count")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"{label}: expected a count of 1 or more, not {count!r}")
    colour, position = clause.get("color"), clause.get("position")
    if colour is not None and colour not in GENEVAL_COLOURS:
        raise ValueError(f"{label}: no such colour {colour!r}")
    if position is None:
        return Requirement(label, count, colour)
    if not isinstance(position, list) or len(position) != 2 or position[0] not in GENEVAL_RELATIONS:
        raise ValueError(f"{label}: expected a relation and the number of a clause, not {position!r}")
    if not isinstance(position[1], int) or not 0 <= position[1] < number:
        raise ValueError(f"{label}: clause {position[1]!r} is not one before this")
    return Requirement(label, count, colour, (position[0], position[1]))
