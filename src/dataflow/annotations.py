"""Whether a value from a configuration file may be given for a parameter, judged by its annotation."""

from __future__ import annotations

import math
import os
import types
import typing
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

_SCALARS = {str: "text", bool: "true or false", int: "a whole number", float: "a number", type(None): "nothing"}

_MANY = {str: "texts", int: "whole numbers", float: "numbers"}


def fits(value: Any, hint: Any) -> bool:
    """Whether a value from a TOML file may be given for a parameter with this annotation."""
    origin, inner = get_origin(hint) or hint, get_args(hint)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in inner)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, each) for each in inner)
    if origin is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if origin in _SCALARS:
        return type(value) is origin
    if origin is os.PathLike or origin is Path:
        return isinstance(value, str)
    if not isinstance(origin, type):
        return True
    if issubclass(origin, tuple) and inner and inner[-1] is not ...:
        return isinstance(value, list) and len(value) == len(inner) and all(map(fits, value, inner))
    if issubclass(origin, Mapping):
        return isinstance(value, dict) and all(fits(item, inner[1]) for item in value.values() if inner)
    if issubclass(origin, Collection):
        return isinstance(value, list) and all(fits(item, inner[0]) for item in value if inner)
    return True


def described(hint: Any) -> str:
    """What a parameter with this annotation takes, for people."""
    origin, inner = get_origin(hint) or hint, get_args(hint)
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(described(each) for each in inner if each is not type(None)))
    if origin in _SCALARS:
        return _SCALARS[origin]
    if origin is os.PathLike or origin is Path:
        return "text"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "a table"
    many = _MANY.get(inner[0], "") if inner else ""
    if origin is tuple and inner and inner[-1] is not ...:
        return f"a list of {len(inner)} {many if len(set(inner)) == 1 else ''}".rstrip()
    return f"a list of {many}" if many else "a list"


def choices(hint: Any) -> list[str]:
    """The words an annotation allows."""
    inner = get_args(hint)
    if get_origin(hint) is Literal:
        return [choice for choice in inner if isinstance(choice, str)]
    return [choice for each in inner for choice in choices(each)]


def converted(value: Any, hint: Any) -> Any:
    """A list as the tuple or frozen set that the annotation asks for."""
    if not isinstance(value, list):
        return value
    for each in (hint, *get_args(hint)):
        if get_origin(each) in (tuple, frozenset) and fits(value, each):
            return get_origin(each)(value)
    return value


def hints_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of a function, or of a class's constructor, by parameter."""
    try:
        return typing.get_type_hints(function.__init__ if isinstance(function, type) else function)
    except NameError:
        return {}  # a class of the user's own whose annotations are for type checkers only
