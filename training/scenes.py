"""The world the built-in model knows: scenes, their captions, their edits and the renderer.

A scene is one or two large objects on a plain background, 64 x 64 pixels. An object has a colour, a shape and one
of nine cells; its exact centre and radius are random within the cell, so that two seeds give two pictures. Two
objects always stand in opposite rows or columns, so that they never touch.

Some scenes are *held out*: no training picture, source or target of an edit, ever shows them (:func:`is_held_out`).
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch

SIZE: Final = 64
"""Side of a picture in pixels."""

COLOURS: Final[dict[str, tuple[int, int, int]]] = {
    "red": (220, 30, 30),
    "green": (30, 160, 50),
    "blue": (40, 70, 230),
    "yellow": (250, 220, 40),
    "purple": (140, 40, 170),
    "orange": (250, 130, 20),
}
SHAPES: Final = ("circle", "square", "triangle", "star")
BACKGROUNDS: Final[dict[str, tuple[int, int, int]]] = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "pink": (255, 190, 205),
}
CELLS: Final = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
RELATIONS: Final = ("left", "right", "above", "below")
OPERATIONS: Final = ("draw", "recolour", "reshape", "remove", "add", "background")

DEFAULT_BACKGROUND: Final = "white"
CELL_CENTRES: Final = (13.0, 32.0, 51.0)
JITTER: Final = 2.0
RADIUS: Final = (8.5, 10.5)
HELD_OUT_SHARE: Final = 12
"""One in this many objects-in-a-cell, and one in this many pairs of objects, is held out."""

_POSITION: Final = {
    "top left": "in the top left",
    "top": "at the top",
    "top right": "in the top right",
    "left": "on the left",
    "center": "in the center",
    "right": "on the right",
    "bottom left": "in the bottom left",
    "bottom": "at the bottom",
    "bottom right": "in the bottom right",
}
_RELATION: Final = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above",),
    "below": ("below",),
}
_ONLY_RELATED: Final = {
    "left": ("left", "right"),
    "right": ("right", "left"),
    "above": ("top", "bottom"),
    "below": ("bottom", "top"),
}
_PREFIXES: Final = ("a photo of", "a picture of", "an image of", "draw")
_RECOLOUR: Final = ("make the {x} {c}", "change the {x} to {c}", "turn the {x} {c}", "paint the {x} {c}")
_RESHAPE: Final = (
    "turn the {x} into {s}",
    "change the {x} into {s}",
    "replace the {x} with {s}",
    "make the {x} {s}",
)
_REMOVE: Final = ("remove the {x}", "delete the {x}", "erase the {x}", "take away the {x}")
_ADD: Final = ("add {o} {where}", "put {o} {where}", "draw {o} {where}", "place {o} {where}")
_BACKGROUND: Final = (
    "change the background to {b}",
    "make the background {b}",
    "turn the background {b}",
    "set the background to {b}",
)


@dataclass(frozen=True, slots=True)
class Thing:
    """One object: what it is, the cell it stands in, and its exact centre and radius in pixels."""

    colour: str
    shape: str
    cell: str
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True, slots=True)
class Scene:
    """One or two things on a background."""

    things: tuple[Thing, ...]
    background: str


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a sentence says, as the labels the text encoders learn to read out of it. ``None`` is "not said".

    For a prompt, ``a`` and ``b`` are the things in the order they are named. For an edit, ``a`` is the thing that is
    changed, removed or added, and ``b`` what it becomes, or the thing it is placed beside.
    """

    operation: str
    a: tuple[str | None, str | None, str | None] = (None, None, None)
    b: tuple[str | None, str | None, str | None] = (None, None, None)
    relation: str | None = None
    background: str | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """A caption and a scene that it describes."""

    text: str
    meaning: Meaning
    scene: Scene


@dataclass(frozen=True, slots=True)
class Edit:
    """An instruction, the scene before and the scene after it."""

    text: str
    meaning: Meaning
    before: Scene
    after: Scene


# ---------------------------------------------------------------------------------------------------------------------
# Held-out combinations
# ---------------------------------------------------------------------------------------------------------------------


def _one_in(text: str, share: int) -> bool:
    return zlib.crc32(text.encode()) % share == 0


def is_held_out(scene: Scene) -> bool:
    """Whether a scene holds an object-in-a-cell, or a pair of objects, that training never shows."""
    if any(_one_in(f"{thing.name} {thing.cell}", HELD_OUT_SHARE) for thing in scene.things):
        return True
    pair = " ".join(sorted(thing.name for thing in scene.things))
    return len(scene.things) == 2 and _one_in(pair, HELD_OUT_SHARE)


# ---------------------------------------------------------------------------------------------------------------------
# Scenes
# ---------------------------------------------------------------------------------------------------------------------


def _row_column(cell: str) -> tuple[int, int]:
    return divmod(CELLS.index(cell), 3)


def _opposite(cell: str) -> list[str]:
    """The cells two rows or two columns away: where a second object may stand."""
    row, column = _row_column(cell)
    return [other for other in CELLS if 2 in (abs(_row_column(other)[0] - row), abs(_row_column(other)[1] - column))]


_OPPOSITE: Final = {cell: _opposite(cell) for cell in CELLS}


def relation_between(a: Thing, b: Thing) -> str | None:
    """How ``a`` stands to ``b`` if they share a row or a column, else ``None``."""
    (row_a, column_a), (row_b, column_b) = _row_column(a.cell), _row_column(b.cell)
    if row_a == row_b:
        return "left" if column_a < column_b else "right"
    if column_a == column_b:
        return "above" if row_a < row_b else "below"
    return None


def _thing(rng: random.Random, colour: str, shape: str, cell: str) -> Thing:
    row, column = _row_column(cell)
    return Thing(
        colour,
        shape,
        cell,
        CELL_CENTRES[column] + rng.uniform(-JITTER, JITTER),
        CELL_CENTRES[row] + rng.uniform(-JITTER, JITTER),
        rng.uniform(*RADIUS),
    )


_COLOUR_NAMES: Final = tuple(COLOURS)
_BACKGROUND_NAMES: Final = tuple(BACKGROUNDS)
_OUTER: Final = tuple(cell for cell in CELLS if cell != "center")


def _second(rng: random.Random, first: Thing) -> Thing:
    """Another object, of another kind, where it does not touch the first; half of them in the same row or column."""
    while True:
        thing = _thing(rng, rng.choice(_COLOUR_NAMES), rng.choice(SHAPES), rng.choice(_OPPOSITE[first.cell]))
        if thing.name != first.name and (relation_between(thing, first) or rng.random() < 0.5):
            return thing


def random_scene(rng: random.Random, count: int) -> Scene:
    """A random scene of one or two objects, held out or not."""
    cell = rng.choice(CELLS if count == 1 else _OUTER)
    first = _thing(rng, rng.choice(_COLOUR_NAMES), rng.choice(SHAPES), cell)
    things = (first,) if count == 1 else (first, _second(rng, first))
    return Scene(things, rng.choice(_BACKGROUND_NAMES))


# ---------------------------------------------------------------------------------------------------------------------
# Captions
# ---------------------------------------------------------------------------------------------------------------------


def _article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _said(thing: Thing, cell: bool) -> tuple[str, str, str | None]:
    return thing.colour, thing.shape, thing.cell if cell else None


def caption(rng: random.Random, scene: Scene, *, place: bool | None = None) -> Prompt:
    """A caption for a scene, and the scene as the caption has it.

    What is not said has one meaning: the background is white; one thing stands in the center, two stand left and
    right; things that are only said to be beside, or above, one another stand in the middle row, or column.

    Args:
        rng: the source of chance.
        scene: what to describe; its things are moved to where the caption has them.
        place: say where things are (``True``), leave it open (``False``), or mostly say it (``None``).
    """
    place = rng.random() < 0.85 if place is None else place
    prefix = rng.choice(_PREFIXES) + " " if rng.random() < 0.25 else ""
    a = scene.things[0]
    if len(scene.things) == 1:
        text = _article(a.name) + (f" {_POSITION[a.cell]}" if place else "")
        meaning = Meaning("draw", _said(a, place))
        if not place:
            scene = _moved(scene, "center")
    else:
        b = scene.things[1]
        relation = relation_between(a, b)
        if not place:
            text, meaning = (
                f"{_article(a.name)} and {_article(b.name)}",
                Meaning("draw", _said(a, False), _said(b, False)),
            )
            scene = _moved(scene, "left", "right")
        elif relation and rng.random() < 0.7:
            text = f"{_article(a.name)} {rng.choice(_RELATION[relation])} {_article(b.name)}"
            meaning = Meaning("draw", _said(a, False), _said(b, False), relation)
            scene = _moved(scene, *_ONLY_RELATED[relation])
        else:
            prefix = ""  # the longest caption must stay within the text length
            text = f"{_article(a.name)} {_POSITION[a.cell]} and {_article(b.name)} {_POSITION[b.cell]}"
            meaning = Meaning("draw", _said(a, True), _said(b, True))
    if scene.background != DEFAULT_BACKGROUND or rng.random() < 0.3:
        text += f" on a {scene.background} background"
    return Prompt(prefix + text, replace(meaning, background=scene.background), scene)


def _moved(scene: Scene, *cells: str) -> Scene:
    """The scene with its things in other cells, each as far off the middle of its cell as before."""

    def moved(thing: Thing, cell: str) -> Thing:
        (old_row, old_column), (row, column) = _row_column(thing.cell), _row_column(cell)
        x = thing.x + CELL_CENTRES[column] - CELL_CENTRES[old_column]
        return replace(thing, cell=cell, x=x, y=thing.y + CELL_CENTRES[row] - CELL_CENTRES[old_row])

    return replace(scene, things=tuple(map(moved, scene.things, cells)))


def random_prompt(rng: random.Random, *, held_out: bool = False, count: int | None = None) -> Prompt:
    """A random caption with a scene that it describes.

    Args:
        rng: the source of chance.
        held_out: ``True`` for a combination that training never shows, ``False`` for any other.
        count: one or two objects; ``None`` draws it.
    """
    while True:
        number = count or (1 if rng.random() < 0.4 else 2)
        scene = random_scene(rng, number)
        if rng.random() < 0.35:
            scene = replace(scene, background=DEFAULT_BACKGROUND)
        prompt = caption(rng, scene)
        if is_held_out(prompt.scene) == held_out:
            return prompt


# ---------------------------------------------------------------------------------------------------------------------
# Edits
# ---------------------------------------------------------------------------------------------------------------------


def _refer(rng: random.Random, scene: Scene, thing: Thing) -> tuple[str, tuple[str | None, str, None]]:
    """Words for one thing of the scene: "red circle", or "circle" where there is only one."""
    alone = sum(other.shape == thing.shape for other in scene.things) == 1
    if alone and rng.random() < 0.2:
        return thing.shape, (None, thing.shape, None)
    return thing.name, (thing.colour, thing.shape, None)


def _other(rng: random.Random, values: Sequence[str], than: str) -> str:
    return rng.choice([value for value in values if value != than])


def edit_scene(rng: random.Random, scene: Scene, operation: str) -> Edit | None:
    """An instruction of this kind for the scene and what it leads to, or ``None`` where there is none.

    Everything that the instruction does not name stays exactly as it is; an added object's exact centre and radius
    are random within its cell.
    """
    if operation == "background":
        colour = _other(rng, _BACKGROUND_NAMES, scene.background)
        text = rng.choice(_BACKGROUND).format(b=colour)
        return Edit(text, Meaning(operation, background=colour), scene, replace(scene, background=colour))
    if operation == "add":
        return _add(rng, scene)
    index = rng.randrange(len(scene.things))
    thing = scene.things[index]
    words, said = _refer(rng, scene, thing)
    if operation == "remove":
        if len(scene.things) == 1:
            return None
        text = rng.choice(_REMOVE).format(x=words)
        return Edit(text, Meaning(operation, said), scene, replace(scene, things=(scene.things[1 - index],)))
    if operation == "recolour":
        colour = _other(rng, _COLOUR_NAMES, thing.colour)
        new = replace(thing, colour=colour)
        text = rng.choice(_RECOLOUR).format(x=words, c=colour)
        meaning = Meaning(operation, said, (colour, None, None))
    else:
        shape = _other(rng, SHAPES, thing.shape)
        new = replace(thing, shape=shape)
        text = rng.choice(_RESHAPE).format(x=words, s=_article(shape))
        meaning = Meaning(operation, said, (None, shape, None))
    things = tuple(new if i == index else other for i, other in enumerate(scene.things))
    if len({other.name for other in things}) < len(things):
        return None
    return Edit(text, meaning, scene, replace(scene, things=things))


def _add(rng: random.Random, scene: Scene) -> Edit | None:
    first = scene.things[0]
    if len(scene.things) == 2 or first.cell == "center":
        return None
    new = _second(rng, first)
    relation = relation_between(new, first)
    if relation and rng.random() < 0.4:
        words, said = _refer(rng, scene, first)
        where = f"{rng.choice(_RELATION[relation])} the {words}"
        meaning = Meaning("add", _said(new, False), said, relation)
    else:
        where = _POSITION[new.cell]
        meaning = Meaning("add", _said(new, True))
    text = rng.choice(_ADD).format(o=_article(new.name), where=where)
    return Edit(text, meaning, scene, replace(scene, things=(first, new)))


_EDIT_OPERATIONS: Final = OPERATIONS[1:]


def random_edit(rng: random.Random, *, held_out: bool = False, operation: str | None = None) -> Edit:
    """A random edit. In training neither side is a held-out scene; held-out edits end in one."""
    while True:
        kind = operation or rng.choice(_EDIT_OPERATIONS)
        count = {"add": 1, "remove": 2}.get(kind) or rng.choice((1, 2))
        edit = edit_scene(rng, random_scene(rng, count), kind)
        if edit is None or is_held_out(edit.after) != held_out:
            continue
        if held_out or not is_held_out(edit.before):
            return edit


# ---------------------------------------------------------------------------------------------------------------------
# Renderer
# ---------------------------------------------------------------------------------------------------------------------

_STAR_INNER: Final = 0.45
_STAR_ANGLE: Final = torch.pi / 5


def _distance(shape: str, x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Signed distance (negative inside, near the edge in pixels) to a shape around the origin, y pointing down."""
    if shape == "circle":
        return torch.hypot(x, y) - radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.86 * radius
    if shape == "triangle":  # three half planes around an upright equilateral triangle
        y = y - 0.15 * radius
        return torch.maximum(y - 0.65 * radius, 0.8660 * x.abs() - 0.5 * y - 0.65 * radius)
    # A five-pointed star: fold into one tenth, then the distance to the line from a tip to a notch.
    angle = torch.atan2(x, -y)
    angle = (torch.remainder(angle + _STAR_ANGLE, 2 * _STAR_ANGLE) - _STAR_ANGLE).abs()
    length = torch.hypot(x, y)
    px, py = length * torch.sin(angle), length * torch.cos(angle)
    outer = 1.12 * radius
    notch_x = outer * _STAR_INNER * torch.sin(torch.tensor(_STAR_ANGLE))
    notch_y = outer * _STAR_INNER * torch.cos(torch.tensor(_STAR_ANGLE))
    normal_x, normal_y = outer - notch_y, notch_x
    return (px * normal_x + (py - outer) * normal_y) / torch.hypot(normal_x, normal_y)


def coverage(shape: str, x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor, size: int = SIZE) -> torch.Tensor:
    """How much of every pixel a shape covers, (N, size, size) in 0..1, for N centres and radii given in pixels."""
    grid = torch.arange(size, dtype=torch.float32) + 0.5
    dx = grid[None, None, :] - x[:, None, None]
    dy = grid[None, :, None] - y[:, None, None]
    dx, dy = torch.broadcast_tensors(dx, dy)
    return (0.5 - _distance(shape, dx, dy, radius[:, None, None])).clamp_(0, 1)


_PALETTE: Final = torch.tensor(list(COLOURS.values()), dtype=torch.float32) / 255
_GROUNDS: Final = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32) / 255


def render(scenes: Sequence[Scene]) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw scenes, antialiased.

    Returns:
        The pictures, (N, 3, 64, 64) in 0..1, and how much of every pixel each of two things covers, (N, 2, 64, 64).
    """
    ground = _GROUNDS[[_BACKGROUND_NAMES.index(scene.background) for scene in scenes]]
    masks = torch.zeros(len(scenes), 2, SIZE, SIZE)
    colours = torch.zeros(len(scenes), 2, dtype=torch.long)
    for shape in SHAPES:
        found = [(i, j, t) for i, scene in enumerate(scenes) for j, t in enumerate(scene.things) if t.shape == shape]
        if not found:
            continue
        rows, slots = torch.tensor([i for i, _, _ in found]), torch.tensor([j for _, j, _ in found])
        x, y, radius = torch.tensor([(t.x, t.y, t.radius) for _, _, t in found]).unbind(1)
        masks[rows, slots] = coverage(shape, x, y, radius)
        colours[rows, slots] = torch.tensor([_COLOUR_NAMES.index(t.colour) for _, _, t in found])
    pictures = ground[:, :, None, None].expand(-1, -1, SIZE, SIZE)
    for slot in range(2):
        mask = masks[:, slot, None]
        pictures = torch.lerp(pictures, _PALETTE[colours[:, slot]][:, :, None, None], mask)
    return pictures, masks
