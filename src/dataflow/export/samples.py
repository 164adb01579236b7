"""What one example of a dataset is, before and after its pictures have been read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


class LeftOutError(Exception):
    """A row from which no sample can be made.

    Args:
        reason: one word, for counting.
        message: what is wrong, for people.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason, self.message = reason, message


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One picture of a sample, by name.

    Attributes:
        column: the column that it goes to.
        path: as it stands in the row.
        number: its place in a column of several pictures, else None.
        prefix: of the columns that say what it is (``source_sha256``); None for a picture whose facts are not told.
        full: whether its provenance is told, too, beside its checksum and size.
    """

    column: str
    path: str
    number: int | None = None
    prefix: str | None = ""
    full: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One example: its pictures by path, its other columns as they will be written.

    Attributes:
        row: of the table, from 1.
        number: among the samples of the row, from 0.
        prompt: caption or instruction; several turns on a line each.
        slots: the pictures; the first decides about the bucket of all.
        values: the columns before the pictures' own facts, in order. Pictures stand there as None.
        source: path of the picture that was edited, or None.
    """

    row: int
    number: int
    prompt: str
    slots: tuple[Slot, ...]
    values: Mapping[str, Any]
    source: str | None = None

    @property
    def key(self) -> str:
        """The sample's name, in order and unique within an export."""
        return f"{self.row:09d}-{self.number:03d}"


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture ready to be written.

    Attributes:
        data: the file's bytes.
        suffix: of its format, without a dot.
        sha256: of ``data``, 64 hex digits.
        width: of the upright picture, in pixels.
        height: likewise.
        facts: what the original file says of its making.
        bucket: ``1024x768`` where pictures go into buckets.
        path: of the original file, absolute.
    """

    data: bytes = field(repr=False)
    suffix: str
    sha256: str
    width: int
    height: int
    facts: Mapping[str, Any]
    bucket: str | None
    path: str


@dataclass(frozen=True, slots=True)
class Ready:
    """A sample with everything that goes into a file.

    Attributes:
        sample: what it was made from.
        record: columns in order; pictures stand there as :class:`Picture`, also inside lists and objects.
        pictures: every picture with the name of its column and its place there.
        other_prompt: a picture's own file says that it was made from another prompt.
    """

    sample: Sample
    record: Mapping[str, Any]
    pictures: tuple[tuple[str, int | None, Picture], ...]
    other_prompt: bool = False

    @property
    def size(self) -> int:
        """Bytes of the pictures, and some for the rest."""
        return 512 + sum(len(picture.data) for _, _, picture in self.pictures)


def rendered(value: Any, show: Callable[[Picture], Any]) -> Any:
    """A value with something else in the place of every picture."""
    if isinstance(value, Picture):
        return show(value)
    if isinstance(value, dict):
        return {name: rendered(each, show) for name, each in value.items()}
    return [rendered(each, show) for each in value] if isinstance(value, list) else value
