"""Names and arguments in a pipeline file, checked against the signatures of the classes themselves."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from dataflow.annotations import choices, converted, described, fits, hints_of
from dataflow.errors import ConfigError
from dataflow.pipeline import did_you_mean, listed
from dataflow.places import Place
from dataflow.remote_files import is_url

_PATHS = frozenset({"first_entry_file_name", "cache_path", "save_path", "hf_cache_dir", "hf_local_dir", "log"}) | {
    "price_table",
    "model_table",
    "output",
    "image_root",
    "vectors",
    "attribute_file",
    "tokenizer",
    "head",
    "checkpoint",
    "lpips_weights",
    "lpips_heads",
    "dists_weights",
    "dists_mixing",
}
_NAMES_OR_PATHS = frozenset({"hf_model_name_or_path", "lora", "rubric"})
SERVICE = "service"
"""The argument of a serving that names another one."""


def class_of(place: Place, key: str, name: Any, table: Mapping[str, str]) -> Any:
    """The class of that name: in the table, or ``module:Class``."""
    if not isinstance(name, str) or (name not in table and ":" not in name):
        place.fail(
            f'there is no {name!r}{did_you_mean(str(name), table)}; choose {listed(table)} or "package.module:Class"',
            key,
        )
    module_name, _, class_name = table.get(name, name).partition(":")
    if name not in table and str(place.folder) not in sys.path:
        sys.path.append(str(place.folder))  # a user's own module lies beside the pipeline file
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        beside = "" if name in table else "; a module of your own lies beside the pipeline file or is installed"
        place.fail(f"{module_name!r} cannot be imported: {error}{beside}", key)
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        classes = [each for each, value in vars(module).items() if isinstance(value, type)]
        place.fail(f"{module_name} has no class {class_name!r}{did_you_mean(class_name, classes)}", key)
    return found


def construct(place: Place, kind: Any, given: Mapping[str, Any]) -> Any:
    """An object of the class.

    Raises:
        ConfigError: its constructor refuses a value.
    """
    try:
        return kind(**given)
    except ConfigError as error:
        raise ConfigError(f"{place.label()}: {error}") from error
    except (TypeError, ValueError) as error:
        # A class of the user's own, or a type the annotation does not tell.
        raise ConfigError(f"{place.label()}: {kind.__name__} does not take this: {error}") from error


def _callables(function: Callable[..., Any]) -> list[Callable[..., Any]]:
    """A class's constructors, from its own to that of the base its ``**options`` go to; any other function alone."""
    if not isinstance(function, type):
        return [function]
    found = []
    for kind in function.__mro__[:-1]:
        if "__init__" in vars(kind):
            found.append(vars(kind)["__init__"])
            if not _takes_any(found[-1]):
                break
    return found or [function]


def _takes_any(function: Callable[..., Any]) -> bool:
    return any(each.kind is each.VAR_KEYWORD for each in inspect.signature(function).parameters.values())


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """What may be given by name."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found: dict[str, inspect.Parameter] = {}
    for each in _callables(function):
        for name, parameter in inspect.signature(each).parameters.items():
            if name != "self" and parameter.kind in named:
                found.setdefault(name, parameter)
    return found


def arguments(
    place: Place, given: Mapping[str, Any], function: Callable[..., Any], skip: Collection[str] = ()
) -> dict[str, Any]:
    """Keyword arguments for a function, checked against its signature, with absolute paths.

    Raises:
        ConfigError: an unknown key, a value of another type, or a key that is missing.
    """
    takes = parameters(function)
    if not _takes_any(_callables(function)[-1]):
        known(place, given, [name for name in takes if name not in skip], "key")
    # A serving that asks another one names it.
    hints = {
        name: str if name in (SERVICE, "rubric") else hint
        for each in reversed(_callables(function))
        for name, hint in hints_of(each).items()
    }
    for name, value in given.items():
        hint = hints.get(name, Any)
        if not fits(value, hint):
            near = did_you_mean(value, choices(hint)) if isinstance(value, str) else ""
            place.fail(f"expected {described(hint)}, found {shown(value)}{near}", name)
    for name, each in takes.items():
        if each.default is each.empty and name not in skip and name not in given:
            kind = described(hints.get(name, Any))
            place.fail(f"the key {name!r} is missing" + (f": it takes {kind}" if kind else ""))
    return {name: _located(name, converted(value, hints.get(name, Any)), place) for name, value in given.items()}


def known(place: Place, given: Iterable[str], allowed: Collection[str], what: str, also: Collection[str] = ()) -> None:
    """Every name in ``given`` must be ``allowed``."""
    names = [*also, *allowed]
    for name in given:
        if name not in names:
            place.fail(f"there is no such {what}{did_you_mean(name, names)}; the {what}s are {listed(names)}", name)


def _located(name: str, value: Any, place: Place) -> Any:
    """The value with absolute paths."""
    if name in _NAMES_OR_PATHS and isinstance(value, list):
        return [_located(name, entry, place) for entry in value]
    if not isinstance(value, str) or not value or (name == "save_path" and is_url(value)):
        return value
    if name in _NAMES_OR_PATHS:
        beside = any((place.folder / text).exists() for text in (value, value.rpartition("@")[0]) if text)
        if not beside and not value.startswith(("./", "../", "~")):
            return value
    elif name not in _PATHS:
        return value
    # Not resolve(): a link in the path is the user's choice.
    return os.path.abspath(place.folder / Path(value).expanduser())  # noqa: PTH100


def shown(value: Any) -> str:
    """A value for an error's text."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
