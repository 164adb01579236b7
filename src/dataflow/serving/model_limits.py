"""What an image model takes, from a table that is configuration, not code; pure."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

from dataflow.errors import ConfigError

Size = tuple[int, int]
"""(width, height) in pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLimits:
    """What one model takes; None or empty is unknown, and not checked.

    Attributes:
        sizes: the only sizes there are.
        size_multiple: both sides are multiples of it.
        max_side: pixels of the longer side.
        min_pixels: width times height, at least.
        max_pixels: width times height, at most.
        max_ratio: the longer side is at most this many times the shorter.
        image_sizes: the service's words for sizes, smallest first (``1K``, ``2K``).
        pixels: aspect ratio → size for each of ``image_sizes``; just one where the service takes no such word.
        max_images: input images of one request.
        mask: whether an edit may have one.
        max_prompt: characters.
    """

    sizes: tuple[Size, ...] = ()
    size_multiple: int | None = None
    max_side: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    max_ratio: float | None = None
    image_sizes: tuple[str, ...] = ()
    pixels: Mapping[str, tuple[Size, ...]] = field(default_factory=dict)
    max_images: int | None = None
    mask: bool | None = None
    max_prompt: int | None = None

    @property
    def aspect_ratios(self) -> tuple[str, ...]:
        """The service's words for aspect ratios."""
        return tuple(self.pixels)

    def size_problem(self, size: Size) -> str | None:
        """Why the model makes no image of that size, with what it does make; None if it does."""
        width, height = size
        shown = f"{width}×{height} cannot be made"
        if self.sizes and size not in self.sizes:
            return f"{shown}: there are {join(self.sizes)}"
        if self.size_multiple and (width % self.size_multiple or height % self.size_multiple):
            return f"{shown}: both sides must be multiples of {self.size_multiple}"
        if self.max_side and max(size) > self.max_side:
            return f"{shown}: no side may have more than {self.max_side} pixels"
        if self.max_ratio and max(size) > self.max_ratio * min(size):
            return f"{shown}: the longer side may be at most {self.max_ratio:g} times the shorter"
        if self.max_pixels and width * height > self.max_pixels:
            return f"{shown}: an image may have at most {self.max_pixels:,} pixels"
        if self.min_pixels and width * height < self.min_pixels:
            return f"{shown}: an image must have at least {self.min_pixels:,} pixels"
        if self.pixels and self.words(size) is None:
            return f"{shown}: there are {join(made for sizes in self.pixels.values() for made in sizes)}"
        return None

    def words(self, size: Size) -> tuple[str, str | None] | None:
        """Aspect ratio and image size (None where the service takes no such word) that give exactly that size."""
        for ratio, made in self.pixels.items():
            if size in made:
                return ratio, self.image_sizes[made.index(size)] if self.image_sizes else None
        return None


def join(sizes: Any) -> str:
    """Sizes as a sentence names them."""
    *most, last = dict.fromkeys(f"{width}×{height}" for width, height in sizes)
    return f"{', '.join(most)} and {last}" if most else last


def limits_of(model: str, table: str | Path | Mapping[str, Any] | None = None) -> ModelLimits:
    """The limits of a model; of one that is in no table, none are known.

    Args:
        model: as the service is asked for it; ``google/gemini-3-pro-image:free`` is found as ``gemini-3-pro-image`` too
            unless the table has the longer name.
        table: a TOML file, or what stands in one: model → limits, laid over the package's own table.

    Raises:
        ConfigError: the table cannot be read, or holds something that is not a limit.
    """
    known: dict[str, ModelLimits] = {}
    own = resources.files("dataflow").joinpath("image_models.toml").read_text(encoding="utf-8")
    _read(tomllib.loads(own), "image_models.toml", known)
    if isinstance(table, Mapping):
        _read(table, "model_table", known)
    elif table is not None:
        try:
            _read(tomllib.loads(Path(table).read_text(encoding="utf-8")), str(table), known)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{table}: the table of models cannot be read: {error}") from error
    short = model.rpartition("/")[2]
    names = (model, short, short.partition(":")[0])
    return next((known[name] for name in names if name in known), ModelLimits())


def _read(table: Mapping[str, Any], where: str, known: dict[str, ModelLimits]) -> None:
    names = [field.name for field in fields(ModelLimits)]
    for model, entry in table.items():
        if not isinstance(entry, Mapping):
            raise ConfigError(f"{where}: expected a table of limits under [{model!r}], found {entry!r}")
        found: dict[str, Any] = {}
        for name, value in entry.items():
            if name == "also":
                continue
            if name not in names:
                raise ConfigError(f"{where}, [{model!r}]: no limit is called {name!r}; there are {', '.join(names)}")
            try:
                found[name] = _LIMITS[name](value)
            except (TypeError, ValueError) as error:
                raise ConfigError(f"{where}, [{model!r}]: {name} must be {error}, got {value!r}") from None
        limits = ModelLimits(**found)
        number = len(limits.image_sizes) or 1
        if any(len(sizes) != number for sizes in limits.pixels.values()):
            raise ConfigError(f"{where}, [{model!r}]: pixels must have {number} of each aspect ratio")
        also = entry.get("also", [])
        if not isinstance(also, list) or not all(isinstance(name, str) for name in also):
            raise ConfigError(f"{where}, [{model!r}]: also must be a list of names, got {also!r}")
        for name in (model, *also):
            known[name] = limits


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError("a whole number from 1")
    return value


def _ratio(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 1:
        raise ValueError("a number from 1")
    return float(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _words(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(word, str) and word for word in value):
        raise ValueError("a list of words")
    return tuple(value)


def _sizes(value: Any) -> tuple[Size, ...]:
    wanted = "a list of [width, height] in pixels"
    if not isinstance(value, list) or not value:
        raise ValueError(wanted)
    found = []
    for size in value:
        if not isinstance(size, list) or len(size) != 2:
            raise ValueError(wanted)
        found.append((_whole(size[0]), _whole(size[1])))
    return tuple(found)


def _pixels(value: Any) -> Mapping[str, tuple[Size, ...]]:
    if not isinstance(value, Mapping):
        raise ValueError("a table of aspect ratios")
    return {ratio: _sizes(sizes) for ratio, sizes in value.items()}


_LIMITS = {
    "sizes": _sizes,
    "size_multiple": _whole,
    "max_side": _whole,
    "min_pixels": _whole,
    "max_pixels": _whole,
    "max_ratio": _ratio,
    "image_sizes": _words,
    "pixels": _pixels,
    "max_images": _whole,
    "mask": _flag,
    "max_prompt": _whole,
}
