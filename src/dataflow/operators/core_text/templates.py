"""Templates with attributes: ``"a {colour} {animal}"``, what they can become, and drawing from that by weights.

Draws are without replacement and exact however many combinations there are: combinations are opened from the top like a
tree, each choice with a Gumbel number of its own (top-down sampling, Maddison et al. 2014, Kool et al. 2019), so that
the first draw has the weights' probabilities, and each further one those that are left. The numbers are hashes of the
seed and of the choices themselves: an attribute value more changes only the draws it wins.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import math
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dataflow.errors import ConfigError
from dataflow.metrics.near_text import scrambled

Choices = tuple[tuple[str, str], ...]
"""Placeholder → the value it got, in the order of the choices."""
Values = Sequence[str | int | float] | Mapping[str, float]
"""The values of an attribute as users write them: a list, or value → weight."""

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_NAME = re.compile(r"[^\s{}#](?:[^{}#]*[^\s{}#])?(?:#[1-9]\d*)?")


class TemplateError(ValueError):
    """A template that cannot be used; the text says why."""


@lru_cache(maxsize=4096)
def pieces(template: str) -> tuple[tuple[str, str | None], ...]:
    """A template as pairs of text and the placeholder that follows it, None after the last text.

    ``{{`` and ``}}`` are braces of the text itself.

    Raises:
        TemplateError: a brace without its partner, or a placeholder without a name.
    """
    found: list[tuple[str, str | None]] = []
    text, end = "", 0
    for match in _PIECE.finditer(template):
        text += template[end : match.start()]
        end = match.end()
        name = match.group(1)
        if match.group() in ("{{", "}}"):
            text += match.group()[0]
        elif name is None:
            raise TemplateError(
                f"a brace without its partner at character {match.start() + 1} of {_shown(template)}: write {{{{ or"
                " }} for a brace of the text"
            )
        elif not _NAME.fullmatch(name.strip()):
            raise TemplateError(f"{match.group()!r} in {_shown(template)} names no attribute")
        else:
            found.append((text, name.strip()))
            text = ""
    return (*found, (text + template[end:], None))


def names_in(template: str) -> list[str]:
    """The attributes that a template names itself.

    Raises:
        TemplateError: as :func:`pieces`.
    """
    return list(dict.fromkeys(attribute_of(name) for _, name in pieces(template) if name is not None))


def attribute_of(placeholder: str) -> str:
    """``colour#2`` draws from ``colour`` once more."""
    return placeholder.partition("#")[0]


@dataclass(frozen=True)
class Attribute:
    """What may stand for a placeholder.

    Attributes:
        values: texts, which may be templates themselves.
        weights: of the values, above 0, with a sum of 1.
    """

    values: tuple[str, ...]
    weights: tuple[float, ...]

    @cached_property
    def logarithms(self) -> npt.NDArray[np.float64]:
        """Of the weights."""
        return np.log(np.array(self.weights))

    @cached_property
    def marks(self) -> npt.NDArray[np.uint64]:
        """A number for each value, by what it is and not by its place."""
        digests = (hashlib.sha256(value.encode(errors="surrogatepass")).digest()[:8] for value in self.values)
        return np.frombuffer(b"".join(digests), dtype=np.uint64)


@dataclass(frozen=True)
class Attributes:
    """Attributes by name; they may name each other, but not in a circle.

    Raises:
        ConfigError: an attribute has no values, a value twice, a weight that is none, or names one that is not there.
    """

    table: Mapping[str, Attribute]

    @classmethod
    def of(cls, written: Mapping[str, Values], source: str = "attributes") -> Attributes:
        """From what a user wrote.

        Args:
            written: name → a list of values, or a mapping of values to weights.
            source: what to call it in messages.

        Raises:
            ConfigError: as the class.
        """
        try:
            found = cls({name: _attribute(name, values) for name, values in written.items()})
            found.check()
        except (ConfigError, TemplateError) as error:
            raise ConfigError(f"{source}: {error}") from None
        return found

    @classmethod
    def read(cls, path: str | Path) -> Attributes:
        """From a TOML file: ``colour = ["red", "green"]``, or a table ``[animal]`` with ``fox = 3``.

        Raises:
            ConfigError: it cannot be read, or as the class.
        """
        try:
            written = tomllib.loads(Path(path).read_text("utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"{path}: no attributes can be read: {error}") from error
        return cls.of(written, str(path))

    def check(self) -> None:
        """Look for names that are not there, and for circles.

        Raises:
            ConfigError: there is one.
        """
        for name in self.table:
            self.reach(names_in_all(self.table[name].values), f"attribute {name!r}", (name,))

    def reach(self, names: Sequence[str], where: str, path: tuple[str, ...] = ()) -> set[str]:
        """The attributes that these names lead to, themselves included.

        Raises:
            ConfigError: one of them is not there, or leads back to itself.
        """
        found: set[str] = set()
        for name in names:
            if name in path:
                circle = " → ".join((*path[path.index(name) :], name))
                raise ConfigError(f"{where} names itself in a circle: {circle}")
            if name not in self.table:
                raise ConfigError(f"{where} names {name!r}, which is no attribute; there are {_listed(self.table)}")
            found |= {name} | self.reach(self._inner[name], f"attribute {name!r}", (*path, name))
        return found

    @cached_property
    def _inner(self) -> Mapping[str, list[str]]:
        return {name: names_in_all(attribute.values) for name, attribute in self.table.items()}


def names_in_all(templates: Sequence[str]) -> list[str]:
    """The attributes that any of them names."""
    return list(dict.fromkeys(name for template in templates for name in names_in(template)))


@dataclass(frozen=True)
class Template:
    """A template with all that may stand in it.

    Args:
        text: with placeholders.
        attributes: to draw from.
        fixed: placeholder → text that stands for it as it is; it is no template.

    Raises:
        TemplateError: it names an attribute that is not there, or cannot be read.
    """

    text: str
    attributes: Attributes
    fixed: Mapping[str, str]

    def __post_init__(self) -> None:
        unknown = [name for name in names_in(self.text) if name not in self.fixed and name not in self.attributes.table]
        if unknown:
            have = _listed({**self.fixed, **self.attributes.table})
            raise TemplateError(f"{_shown(self.text)} names {unknown[0]!r}, which is no attribute; there are {have}")

    def used(self) -> set[str]:
        """The attributes that may come to stand in it."""
        return self.attributes.reach([name for name in names_in(self.text) if name not in self.fixed], "the template")

    def most(self) -> float:
        """No more combinations than this."""
        return math.prod(self._most(name) for name in self._placeholders(self.text))

    def all(self) -> Iterator[tuple[str, Choices]]:
        """Every text with its choices, each text once, in the order of the values."""
        seen: set[str] = set()
        waiting: list[Choices] = [()]
        while waiting:
            choices = waiting.pop()
            name = self._open(self.text, dict(choices))
            if name is None:
                text = self._filled(self.text, dict(choices))
                if text not in seen:
                    seen.add(text)
                    yield text, choices
                continue
            values = self.attributes.table[attribute_of(name)].values
            waiting += [(*choices, (name, value)) for value in reversed(values)]

    def draws(self, key: bytes) -> Iterator[tuple[str, Choices]]:
        """Texts with their choices by the attributes' weights, without end: each text once before any comes again.

        Args:
            key: equal keys draw equally.
        """
        number = 0
        while True:
            yield from self._round(hashlib.sha256(b"%b/%d" % (key, number)).digest())
            number += 1

    def _round(self, digest: bytes) -> Iterator[tuple[str, Choices]]:
        seen: set[str] = set()
        heap: list[tuple[float, int, _Branch, int]] = []
        choices: Choices = ()
        logarithm = number = 0.0
        for count in itertools.count():
            chosen = dict(choices)
            name = self._open(self.text, chosen)
            if name is None:
                text = self._filled(self.text, chosen)
                if text not in seen:
                    seen.add(text)
                    yield text, choices
            else:
                attribute = self.attributes.table[attribute_of(name)]
                branch = _Branch.of(attribute, name, choices, digest, logarithm, number)
                heapq.heappush(heap, (-branch.numbers[0], 2 * count, branch, 0))
            if not heap:
                return
            # The greatest number that is left; its next sibling comes to wait in its place.
            negative, _, branch, at = heapq.heappop(heap)
            if at + 1 < len(branch.numbers):
                heapq.heappush(heap, (-branch.numbers[at + 1], 2 * count + 1, branch, at + 1))
            value = branch.values[at]
            choices, number, logarithm = (*branch.choices, (branch.name, value)), -negative, branch.logarithms[at]
            digest = hashlib.sha256(branch.digest + value.encode(errors="surrogatepass")).digest()

    def _placeholders(self, template: str) -> list[str]:
        names = (name for _, name in pieces(template) if name is not None and name not in self.fixed)
        return list(dict.fromkeys(names))

    def _most(self, placeholder: str) -> float:
        values = self.attributes.table[attribute_of(placeholder)].values
        return sum(math.prod(self._most(name) for name in self._placeholders(value)) for value in values)

    def _open(self, template: str, chosen: Mapping[str, str]) -> str | None:
        """The first placeholder that has no value yet."""
        for name in self._placeholders(template):
            if name not in chosen:
                return name
            if inner := self._open(chosen[name], chosen):
                return inner
        return None

    def _filled(self, template: str, chosen: Mapping[str, str]) -> str:
        parts: list[str] = []
        for text, name in pieces(template):
            parts.append(text)
            if name is not None:
                parts.append(self.fixed[name] if name in self.fixed else self._filled(chosen[name], chosen))
        return "".join(parts)


@dataclass(frozen=True, slots=True)
class _Branch:
    """The values that a placeholder may get after some choices, the one drawn first at the front.

    Attributes:
        name: the placeholder.
        choices: before it.
        digest: of these and the name.
        values: in the order of their numbers.
        numbers: Gumbel numbers of the best that each value leads to, greatest first.
        logarithms: of the probability of the choices with each value.
    """

    name: str
    choices: Choices
    digest: bytes
    values: list[str]
    numbers: list[float]
    logarithms: list[float]

    @classmethod
    def of(
        cls, attribute: Attribute, name: str, choices: Choices, digest: bytes, logarithm: float, greatest: float
    ) -> _Branch:
        """The branch after choices of this digest and probability, of which the greatest number is known."""
        digest = hashlib.sha256(digest + b"\0" + name.encode(errors="surrogatepass")).digest()
        logarithms = logarithm + attribute.logarithms
        place = np.frombuffer(digest[:8], dtype=np.uint64)
        # 52 bits and a half: above 0 and below 1 exactly.
        uniform = ((scrambled(attribute.marks ^ place) >> np.uint64(12)).astype(np.float64) + 0.5) / 2**52
        numbers = logarithms - np.log(-np.log(uniform))
        # Moved so that the greatest of them is the one that is known (Kool et al. 2019, appendix B.3).
        with np.errstate(divide="ignore"):
            gap = greatest - numbers + np.log1p(-np.exp(numbers - numbers.max()))
        numbers = greatest - np.maximum(gap, 0.0) - np.log1p(np.exp(-np.abs(gap)))
        order = np.argsort(-numbers, kind="stable").tolist()
        values = [attribute.values[at] for at in order]
        return cls(name, choices, digest, values, numbers[order].tolist(), logarithms[order].tolist())


def _attribute(name: str, written: object) -> Attribute:
    if not _NAME.fullmatch(name) or "#" in name:
        raise ConfigError(f"{name!r} is no name of an attribute")
    weighted = isinstance(written, Mapping)
    if not weighted and (isinstance(written, str) or not isinstance(written, Sequence)):
        raise ConfigError(f"{name!r} must be a list of values, or a table of values with weights, got {written!r}")
    values = [_value(name, value) for value in written]
    weights = list(written.values()) if weighted else [1.0] * len(values)
    if not values:
        raise ConfigError(f"{name!r} has no values")
    if twice := [value for at, value in enumerate(values) if value in values[:at]]:
        raise ConfigError(f"{name!r} has {twice[0]!r} twice: to have it drawn more often, give weights")
    for value, weight in zip(values, weights, strict=True):
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not 0 < weight < math.inf:
            raise ConfigError(f"{name!r}: the weight of {value!r} must be a number above 0, got {weight!r}")
    greatest = max(weights)
    scaled = [weight / greatest for weight in weights]
    shares = [weight / math.fsum(scaled) for weight in scaled]
    if not min(shares):
        raise ConfigError(f"{name!r}: a weight is too small beside {greatest!r} to be told from 0")
    return Attribute(tuple(values), tuple(shares))


def _value(name: str, value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ConfigError(f"{name!r}: a value must be text or a number, got {value!r}")
    return str(value)


def _listed(names: Mapping[str, object]) -> str:
    return ", ".join(map(repr, names)) or "none"


def _shown(template: str) -> str:
    return repr(template if len(template) <= 80 else f"{template[:79]}…")
