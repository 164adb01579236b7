"""Types of columns, found by looking at every value: one that holds all of them, or JSON text where none does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dataflow.export.samples import Picture
from dataflow.utils.exact_json import dumps, is_utf8

Name = Literal["null", "bool", "int", "float", "text", "json", "picture", "list", "object"]

_MOST_FIELDS = 64
_EXACT = 2**53


@dataclass(frozen=True, slots=True)
class Kind:
    """A type.

    Attributes:
        name: which.
        item: of a list's items.
        fields: of an object, by name.
        wide: of an int: some value has no exact float.
    """

    name: Name
    item: Kind | None = None
    fields: Mapping[str, Kind] = field(default_factory=dict)
    wide: bool = False


NULL, JSON, PICTURE, TEXT = Kind("null"), Kind("json"), Kind("picture"), Kind("text")


def kind_of(value: Any) -> Kind:
    """The type of one value."""
    match value:
        case None:
            return NULL
        case bool():
            return Kind("bool")
        case int():
            return Kind("int", wide=abs(value) > _EXACT) if -(2**63) <= value < 2**63 else JSON
        case float():
            return Kind("float")
        case str():
            return TEXT
        case Picture():
            return PICTURE
        case list():
            item = NULL
            for each in value:
                item = merged(item, kind_of(each))
            return Kind("list", item)
        case dict() if 0 < len(value) <= _MOST_FIELDS and all(isinstance(key, str) and key for key in value):
            return Kind("object", fields={key: kind_of(each) for key, each in value.items()})
    return JSON


def merged(first: Kind, second: Kind) -> Kind:
    """The type that holds the values of both."""
    if first == second or second.name == "null":
        return first
    if first.name == "null":
        return second
    names = {first.name, second.name}
    if names == {"int"}:
        return Kind("int", wide=True)
    if names == {"int", "float"}:
        return JSON if first.wide or second.wide else Kind("float")
    if names == {"list"}:
        return Kind("list", merged(first.item or NULL, second.item or NULL))
    if names == {"object"}:
        keys = dict.fromkeys((*first.fields, *second.fields))
        if len(keys) > _MOST_FIELDS:
            return JSON
        return Kind(
            "object", fields={key: merged(first.fields.get(key, NULL), second.fields.get(key, NULL)) for key in keys}
        )
    return JSON


def settled(kind: Kind) -> Kind:
    """The type as it is written: what never had a value is text; a list or an object with JSON within stays one."""
    if kind.name == "null":
        return TEXT
    if kind.name == "list":
        return Kind("list", settled(kind.item or NULL))
    if kind.name == "object":
        return Kind("object", fields={key: settled(each) for key, each in kind.fields.items()})
    return kind


def fitted(value: Any, kind: Kind) -> Any:
    """A value as its column's type has it: JSON as text, missing fields as null, half a surrogate pair as ``?``."""
    if value is None:
        return None
    match kind.name:
        case "json":
            return dumps(value).decode()
        case "float":
            return float(value)
        case "text":
            return value if is_utf8(value) else value.encode(errors="replace").decode()
        case "list":
            return [fitted(each, kind.item or NULL) for each in value]
        case "object":
            return {key: fitted(value.get(key), each) for key, each in kind.fields.items()}
    return value


def json_columns(kinds: Mapping[str, Kind]) -> list[str]:
    """The columns with values of several types, which typed formats hold as JSON text."""
    return [name for name, kind in kinds.items() if kind.name == "json"]
