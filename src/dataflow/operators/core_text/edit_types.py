"""Kinds of edits of a picture, by category, and drawing from them by shares."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dataflow.errors import ConfigError

EDIT_TYPES: Mapping[str, Mapping[str, str]] = {
    "object": {
        "add_object": "put a new object where it makes sense",
        "remove_object": "take one object away and show what is behind it",
        "replace_object": "put another kind of object in the place of one",
        "move_object": "bring an object to another place in the picture",
        "resize_object": "make one object larger or smaller",
        "change_count": "have more or fewer of objects of one kind",
    },
    "attribute": {
        "change_colour": "give one object another colour",
        "change_material": "have one object made of another material",
        "change_texture": "give one surface another texture or pattern",
        "change_state": "change the state of a thing: open, broken, lit, wet, full",
        "change_age": "have a thing or living being look older or younger",
    },
    "scene": {
        "replace_background": "put the subject before another background",
        "change_season": "show the scene in another season",
        "change_weather": "show the scene in other weather",
        "change_time_of_day": "show the scene at another time of the day",
        "change_place": "move the whole scene to another kind of place",
    },
    "person": {
        "change_clothing": "dress a person differently",
        "change_hair": "give a person another haircut or hair colour",
        "change_expression": "give a face another expression",
        "change_pose": "have a person or animal take another pose",
        "add_accessory": "have a person wear or hold something more",
        "change_action": "have a person or animal do something else",
    },
    "style": {
        "art_style": "show the whole picture in the style of an art movement or technique",
        "medium": "show the whole picture as made in another medium, such as pencil, clay or mosaic",
        "illustration": "turn a photograph into an illustration, comic or cartoon, or the other way round",
        "era": "have the whole picture look as if made in another time",
    },
    "light_and_colour": {
        "relight": "change direction, strength or colour of the light",
        "colour_grade": "give the whole picture other tones or another mood of colour",
        "black_and_white": "take colour out of the picture, or out of all but one thing",
    },
    "composition": {
        "change_viewpoint": "show the same scene from another side, height or distance",
        "extend_frame": "show more of the scene beyond the picture's edges",
        "crop_closer": "show one part of the picture closer up",
        "change_focus": "make the background blurred or sharp",
    },
    "text_and_symbols": {
        "add_text": "write a short text onto something, given in double quotation marks",
        "replace_text": "change what a text in the picture says, both given in double quotation marks",
    },
}
"""Category → type → what such an edit does."""


@dataclass(frozen=True, slots=True)
class EditType:
    """One kind of edit.

    Attributes:
        name: in the table.
        category: likewise.
        description: for the model.
        share: of all edits, above 0; all shares together are 1.
    """

    name: str
    category: str
    description: str
    share: float


def edit_types(types: Mapping[str, Mapping[str, str]], shares: Mapping[str, float] | None = None) -> list[EditType]:
    """The types with their shares.

    Args:
        types: category → type → description.
        shares: type or category → target share, in any unit; a category's is divided evenly among its types. What is
            not named is left out. None gives all types the same.

    Raises:
        ConfigError: no types, a type twice, a share of something else or that is no number above 0, or a type that is
            named itself and by its category.
    """
    table = {name: (category, text) for category, inner in types.items() for name, text in inner.items()}
    if not table or len(table) < sum(len(inner) for inner in types.values()):
        raise ConfigError("edit_types must have at least one type, and each type in one category only")
    weights: dict[str, float] = dict.fromkeys(table, 1.0) if shares is None else {}
    for name, share in (shares or {}).items():
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < math.inf:
            raise ConfigError(f"shares: {name!r} must have a number above 0, got {share!r}")
        members = [name] if name in table else list(types.get(name, ()))
        if not members:
            raise ConfigError(f"shares: {name!r} is neither a type nor a category; there are {', '.join(types)}")
        for member in members:
            if member in weights:
                raise ConfigError(f"shares: {member!r} has a share itself and by its category")
            weights[member] = share / len(members)
    total = math.fsum(weights.values())
    if not total:
        raise ConfigError("shares must name at least one type or category")
    return [EditType(name, *table[name], weight / total) for name, weight in weights.items()]


def drawn(types: Sequence[EditType], number: int, key: str) -> list[EditType]:
    """Different types by their shares, without replacement; equal keys draw equally.

    The first is each type with the probability of its share; a type more changes only the draws it wins.
    """
    return sorted(types, key=lambda each: (_arrival(each, key), each.name))[:number]


def _arrival(each: EditType, key: str) -> float:
    """When a type comes, if types come as often as their shares say (Efraimidis and Spirakis 2006)."""
    digest = hashlib.sha256(f"{key}\n{each.name}".encode(errors="surrogatepass")).digest()
    return -math.log(((int.from_bytes(digest[:8]) >> 12) + 0.5) / 2**52) / each.share
