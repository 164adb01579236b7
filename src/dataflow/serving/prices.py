"""What a call cost, from what the service counted and a table of prices that is configuration, not code."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

from dataflow.errors import ConfigError

MILLION = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What one model costs: US dollars per million tokens of each kind, and per image; None is unknown.

    Attributes:
        text_input: tokens of the prompt.
        image_input: tokens of input images.
        text_output: tokens of text and thoughts in the answer.
        image_output: tokens of images in the answer.
        image: one image, where tokens are not counted or not priced.
        batch: what a batch job costs of all that: 0.5 for half price.
    """

    text_input: float | None = None
    image_input: float | None = None
    text_output: float | None = None
    image_output: float | None = None
    image: float | None = None
    batch: float = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """What a service counted, by kind."""

    text_input: int = 0
    image_input: int = 0
    text_output: int = 0
    image_output: int = 0


def rates_of(model: str, table: str | Path | Mapping[str, Any] | None = None) -> Rates | None:
    """The rates of a model, or None if nobody stated them.

    Args:
        model: as the service is asked for it; ``google/gemini-3-pro-image:free`` is found as ``gemini-3-pro-image`` too
            unless the table has the longer name.
        table: a TOML file, or what stands in one: model → rates, laid over the package's own table.

    Raises:
        ConfigError: the table cannot be read, or holds something that is not a price.
    """
    known = shipped()
    if isinstance(table, Mapping):
        _read(table, "prices", known)
    elif table is not None:
        try:
            _read(tomllib.loads(Path(table).read_text(encoding="utf-8")), str(table), known)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{table}: the price table cannot be read: {error}") from error
    short = model.rpartition("/")[2]
    return next((known[name] for name in (model, short, short.partition(":")[0]) if name in known), None)


def shipped() -> dict[str, Rates]:
    """The package's own table: model → rates."""
    known: dict[str, Rates] = {}
    _read(tomllib.loads(resources.files("dataflow").joinpath("prices.toml").read_text()), "prices.toml", known)
    return known


def _read(table: Mapping[str, Any], where: str, known: dict[str, Rates]) -> None:
    names = {field.name for field in fields(Rates)}
    for model, entry in table.items():
        if not isinstance(entry, Mapping):
            raise ConfigError(f"{where}: expected a table of prices under [{model!r}], found {entry!r}")
        prices = {name: value for name, value in entry.items() if name != "also"}
        for name, value in prices.items():
            if name not in names:
                raise ConfigError(f"{where}, [{model!r}]: no price is called {name!r}; there are {', '.join(names)}")
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 <= value < math.inf:
                raise ConfigError(f"{where}, [{model!r}]: {name} must be dollars, 0 or more, got {value!r}")
        for name in (model, *entry.get("also", ())):
            known[name] = Rates(**prices)


def dollars(rates: Rates | None, usage: Mapping[str, Any], images: int, *, discount: float = 1.0) -> float | None:
    """What a call cost in US dollars, or None where that is not known.

    The service's own figure (``usage.cost``) goes first; then counted tokens, if all the kinds that were counted have a
    rate; then the price per image.

    Args:
        rates: of the model.
        usage: as the service gave it: Images API, chat completions or Gemini.
        images: how many it answered with.
        discount: what a batch API takes off is multiplied in: 0.5 for half price.
    """
    own = usage.get("cost")
    if isinstance(own, int | float) and not isinstance(own, bool) and 0 <= own < math.inf:
        return float(own)
    if rates is None:
        return None
    counted = tokens(usage, images)
    if counted is not None:
        total = 0.0
        for field in fields(Tokens):
            number, rate = getattr(counted, field.name), getattr(rates, field.name)
            if number and rate is None:
                break
            total += number * (rate or 0.0) / MILLION
        else:
            return total * discount
    return None if rates.image is None else rates.image * images * discount


def tokens(usage: Mapping[str, Any], images: int = 1) -> Tokens | None:
    """The tokens of a reply by kind; None if the service counted none.

    Where a service does not split its answer's tokens they count as image tokens, the dearer kind, unless the answer
    has no image.
    """
    if "promptTokenCount" in usage or "candidatesTokenCount" in usage:
        return _gemini(usage)
    for given, answered in (("input_tokens", "output_tokens"), ("prompt_tokens", "completion_tokens")):
        if given in usage or answered in usage:
            image_input = _count(usage, f"{given}_details", "image_tokens")
            image_output = _count(usage, f"{answered}_details", "image_tokens")
            output = _count(usage, answered)
            details = usage.get(f"{answered}_details")
            split = (isinstance(details, Mapping) and "image_tokens" in details) or not images
            return Tokens(
                text_input=max(0, _count(usage, given) - image_input),
                image_input=image_input,
                text_output=max(0, output - image_output) if split else 0,
                image_output=min(image_output, output) if split else output,
            )
    return None


def _gemini(usage: Mapping[str, Any]) -> Tokens:
    def of(details: str, modality: str) -> int:
        entries = usage.get(details)
        if not isinstance(entries, list):
            return 0
        return sum(
            _count(entry, "tokenCount")
            for entry in entries
            if isinstance(entry, Mapping) and entry.get("modality") == modality
        )

    image_input, text = of("promptTokensDetails", "IMAGE"), of("candidatesTokensDetails", "TEXT")
    return Tokens(
        text_input=max(0, _count(usage, "promptTokenCount") - image_input),
        image_input=image_input,
        text_output=text + _count(usage, "thoughtsTokenCount"),
        image_output=max(0, _count(usage, "candidatesTokenCount") - text),
    )


def _count(usage: Mapping[str, Any], *path: str) -> int:
    value: Any = usage
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
