"""Does a picture show a scene? Decided by rules, not by a model.

Every pixel gets the nearest colour of the palette; what is not background falls into connected pieces; a piece is a
thing of the shape whose template, drawn at the piece's own centre, overlaps it best. A picture is right if it has the
right background and exactly the right things, each in its place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from training.scenes import BACKGROUNDS, CELL_CENTRES, CELLS, COLOURS, SHAPES, SIZE, Scene, Thing, coverage

LEAST_PIXELS = 40
"""Smaller pieces are specks, not things; the smallest thing covers about 120 pixels."""
MOST_SPECKS = 24
"""More pixels than this in specks are dirt: the picture is not right."""
LEAST_OVERLAP = 0.60
"""Intersection over union with the best template, below which a piece is no shape at all."""
CELL_TOLERANCE = 7.0
"""How far, in pixels and along either axis, a thing may be from the middle of its cell (they are 19 apart)."""
KEPT_TOLERANCE = 3.5
"""How far a thing that an edit does not name may move."""

_NAMES = (*BACKGROUNDS, *COLOURS)
_TABLE = np.array([*BACKGROUNDS.values(), *COLOURS.values()], dtype=np.float32)
_RADII = torch.arange(6.5, 13.01, 0.5)


@dataclass(frozen=True, slots=True)
class Found:
    """A thing seen in a picture; centre in pixels."""

    colour: str
    shape: str
    x: float
    y: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True, slots=True)
class Seen:
    """What a picture shows; ``clean`` is False where there is more than specks that is no thing."""

    background: str
    things: tuple[Found, ...]
    clean: bool


def look(picture: np.ndarray) -> Seen:
    """What is in a picture, (64, 64, 3) uint8."""
    distance = ((picture.astype(np.float32)[:, :, None, :] - _TABLE) ** 2).sum(-1)
    nearest = distance.argmin(-1)
    border = np.concatenate([nearest[0], nearest[-1], nearest[:, 0], nearest[:, -1]])
    grounds = np.bincount(border, minlength=len(_NAMES))[: len(BACKGROUNDS)]
    ground = int(grounds.argmax())
    # Along the edge of a thing pixels are mixed: what is between two colours belongs to neither of a third.
    things: list[Found] = []
    dirt = 0
    objects = nearest >= len(BACKGROUNDS)
    for piece in _pieces(objects):
        rows, columns = np.nonzero(piece)
        if len(rows) < LEAST_PIXELS:
            dirt += len(rows)
            continue
        colour = int(np.bincount(nearest[piece], minlength=len(_NAMES))[len(BACKGROUNDS) :].argmax())
        own = piece & (nearest == colour + len(BACKGROUNDS))
        shape, overlap = _shape(piece)
        if overlap < LEAST_OVERLAP or own.sum() < 0.6 * piece.sum():
            dirt += len(rows)
            continue
        things.append(Found(tuple(COLOURS)[colour], shape, columns.mean() + 0.5, rows.mean() + 0.5))
    return Seen(tuple(BACKGROUNDS)[ground], tuple(things), dirt <= MOST_SPECKS)


def shows(picture: np.ndarray, scene: Scene, *, places: bool = True) -> bool:
    """Whether a picture shows a scene: background, things, and (with ``places``) the cell each stands in."""
    seen = look(picture)
    if not seen.clean or seen.background != scene.background or len(seen.things) != len(scene.things):
        return False
    return _matched(seen.things, scene.things, CELL_TOLERANCE if places else math.inf, exact=False)


def edited(picture: np.ndarray, before: Scene, after: Scene) -> bool:
    """Whether a picture shows ``after``, with everything that the edit does not name where it was."""
    seen = look(picture)
    if not seen.clean or seen.background != after.background or len(seen.things) != len(after.things):
        return False
    kept = [thing for thing in after.things if any((thing.x, thing.y) == (old.x, old.y) for old in before.things)]
    new = [thing for thing in after.things if thing not in kept]
    left = list(seen.things)
    for things, tolerance, exact in ((kept, KEPT_TOLERANCE, True), (new, CELL_TOLERANCE, False)):
        for thing in things:
            match = next((found for found in left if _is(found, thing, tolerance, exact=exact)), None)
            if match is None:
                return False
            left.remove(match)
    return True


def _matched(seen: Sequence[Found], wanted: Sequence[Thing], tolerance: float, *, exact: bool) -> bool:
    left = list(seen)
    for thing in wanted:
        match = next((found for found in left if _is(found, thing, tolerance, exact=exact)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _is(found: Found, thing: Thing, tolerance: float, *, exact: bool) -> bool:
    if found.name != thing.name:
        return False
    row, column = divmod(CELLS.index(thing.cell), 3)
    x, y = (thing.x, thing.y) if exact else (CELL_CENTRES[column], CELL_CENTRES[row])
    return abs(found.x - x) <= tolerance and abs(found.y - y) <= tolerance


def _pieces(mask: np.ndarray) -> list[np.ndarray]:
    """The connected pieces of a mask (four neighbours)."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        padded = np.pad(labels, 1)
        grown = (
            np.max([labels, padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]], axis=0) * mask
        )
        if (grown == labels).all():
            break
        labels = grown
    return [labels == label for label in np.unique(labels) if label]


def _shape(piece: np.ndarray) -> tuple[str, float]:
    """The shape whose template overlaps a piece best, over radii and small shifts, and how well."""
    rows, columns = np.nonzero(piece)
    middle_x, middle_y = (columns.min() + columns.max() + 1) / 2, (rows.min() + rows.max() + 1) / 2
    area = torch.from_numpy(piece.astype(np.float32))
    best, overlap = SHAPES[0], 0.0
    shifts = [(dx, dy) for dx in (-1.0, 0.0, 1.0) for dy in (-1.0, 0.0, 1.0)]
    x = torch.tensor([middle_x + dx for dx, _ in shifts]).repeat_interleave(len(_RADII))
    y = torch.tensor([middle_y + dy for _, dy in shifts]).repeat_interleave(len(_RADII))
    radius = _RADII.repeat(len(shifts))
    for shape in SHAPES:
        template = coverage(shape, x.float(), y.float(), radius, SIZE)
        both = torch.minimum(template, area).sum((1, 2))
        either = torch.maximum(template, area).sum((1, 2))
        score = float((both / either).max())
        if score > overlap:
            best, overlap = shape, score
    return best, overlap
