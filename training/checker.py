"""Does a picture show what a caption says? Decided by rules, not by a model.

Every pixel gets the nearest colour of the palette; what is not background falls into connected pieces; a piece is a
thing of the shape whose template, drawn at the piece's own centre, overlaps it best. A picture is right if it has the
right background and exactly the right things, each in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from training.scenes import BACKGROUNDS, CELL_CENTRES, CELLS, COLOURS, SHAPES, SIZE, Meaning, Scene, coverage

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
APART = 19.0
"""How far, at least, one thing is left of or above another that it is said to be (opposite cells are 38 apart). It may
be off their common row or column by half of that."""

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
        things.append(Found(tuple(COLOURS)[colour], shape, float(columns.mean()) + 0.5, float(rows.mean()) + 0.5))
    return Seen(tuple(BACKGROUNDS)[ground], tuple(things), dirt <= MOST_SPECKS)


def shows(picture: np.ndarray, meaning: Meaning) -> bool:
    """Whether a picture shows what a caption says: the background, and exactly the things, each where it is said to be.

    Where the caption leaves a place open, any will do. A thing is left of another if it is well to its left
    and nearer to its row than to the next one.
    """
    named = [thing for thing in (meaning.a, meaning.b) if thing[1] is not None]
    wanted = [(f"{colour} {shape}", _centre(cell) if cell else None, CELL_TOLERANCE) for colour, shape, cell in named]
    things = _matched(look(picture), meaning.background, wanted)
    return things is not None and (meaning.relation is None or _stands(*things, meaning.relation))


def edited(picture: np.ndarray, before: Scene, after: Scene) -> bool:
    """Whether a picture shows ``after``, with everything that the edit does not name where it was."""
    old = {(thing.x, thing.y) for thing in before.things}
    wanted = [
        (thing.name, (thing.x, thing.y), KEPT_TOLERANCE)
        if (thing.x, thing.y) in old
        else (thing.name, _centre(thing.cell), CELL_TOLERANCE)
        for thing in after.things
    ]
    return _matched(look(picture), after.background, wanted) is not None


def _centre(cell: str) -> tuple[float, float]:
    row, column = divmod(CELLS.index(cell), 3)
    return CELL_CENTRES[column], CELL_CENTRES[row]


def _matched(
    seen: Seen, background: str | None, wanted: Sequence[tuple[str, tuple[float, float] | None, float]]
) -> list[Found] | None:
    """The thing seen for each one wanted (name, centre or None for anywhere, tolerance); None unless all agrees."""
    if not seen.clean or seen.background != background or len(seen.things) != len(wanted):
        return None
    left, found = list(seen.things), []
    for name, place, tolerance in wanted:
        for thing in left:
            near = place is None or max(abs(thing.x - place[0]), abs(thing.y - place[1])) <= tolerance
            if thing.name == name and near:
                found.append(thing)
                left.remove(thing)
                break
        else:
            return None
    return found


def _stands(a: Found, b: Found, relation: str) -> bool:
    right, down = b.x - a.x, b.y - a.y
    along, across = (right, down) if relation in ("left", "right") else (down, right)
    if relation in ("right", "below"):
        along = -along
    return along >= APART and abs(across) <= APART / 2


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
