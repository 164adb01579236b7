"""Whose score is it: columns of scores, one for each picture, taken apart so that each picture keeps its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dataflow.errors import InputError
from dataflow.types import Row

MISALIGNED = "misaligned"
"""Status of a score that cannot be given to one picture: there are more or fewer scores than pictures."""


@dataclass(frozen=True, slots=True)
class ScoreColumn:
    """A score with its status and error, as evaluators write them.

    Attributes:
        name: the column.
        owner: the column of the pictures it is about; None where it is about the row.
        parts: the columns that go with it, each with a value for every picture or for the row.
        aligned: whether there is one value for each picture of the owner.
    """

    name: str
    owner: str | None
    parts: Mapping[str, Any]
    aligned: bool

    def of(self, number: int, prefix: str = "") -> dict[str, Any]:
        """The columns of one picture of the owner.

        Args:
            number: its place among the owner's pictures.
            prefix: of the columns' names.
        """
        if not self.aligned:
            by = {f"{prefix}{self.name}_by": self.parts[f"{self.name}_by"]} if f"{self.name}_by" in self.parts else {}
            return {prefix + self.name: None, f"{prefix}{self.name}_status": MISALIGNED} | by
        return {
            prefix + name: value[number] if isinstance(value, list) else value for name, value in self.parts.items()
        }


def score_columns_of(row: Row, pictures: Mapping[str, int], known: Mapping[str, str]) -> list[ScoreColumn]:
    """The scores of a row with the picture column that each belongs to.

    Args:
        row: of a scored table.
        pictures: how many pictures each picture column has; the first is the one that a score of a single picture
            belongs to where nothing else tells.
        known: picture column by score column, where that is known.

    Raises:
        InputError: a score could belong to two columns of as many pictures.
    """
    found = []
    for status_key in [name for name in row if name.endswith("_status")]:
        name = status_key.removesuffix("_status")
        if name not in row:
            continue
        parts = {part: row[part] for part in (name, status_key, f"{name}_error", f"{name}_by") if part in row}
        statuses = row[status_key]
        if not isinstance(statuses, list):
            # One status: of the only picture where the picture column is a path, else of the row (a pair's verdict).
            owner = known.get(name)
            lone = pictures.get(owner or "") == 1
            found.append(ScoreColumn(name, None if owner in pictures and not lone else owner, parts, lone))
            continue
        count = len(statuses)
        owner = known.get(name) or _owner(name, count, pictures)
        lists = [value for value in parts.values() if isinstance(value, list)]
        aligned = isinstance(row[name], list) and all(len(value) == count for value in lists)
        aligned = aligned and owner in pictures and pictures[owner] == count
        found.append(ScoreColumn(name, owner, parts, aligned))
    return found


def _owner(name: str, count: int, pictures: Mapping[str, int]) -> str:
    fitting = [column for column, number in pictures.items() if number == count]
    if len(fitting) > 1 and count > 1:
        columns = " and ".join(map(repr, fitting))
        raise InputError(
            f"holds {count} scores, and {columns} hold as many pictures: say whose they are with "
            f"--scores-of {name}={fitting[0]}",
            field=name,
        )
    return fitting[0] if fitting else next(iter(pictures))
