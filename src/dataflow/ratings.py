"""What people said of pictures, and the scores of the same pictures in a table."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataflow.errors import InputError
from dataflow.operators.evaluation import pictures
from dataflow.scores import Score, as_number, holds_text_only, read_rows, scores_at
from dataflow.types import BadRow, Row

FIRST, SECOND, TIE = 1.0, -1.0, 0.0
_CHOICES = {
    **dict.fromkeys(("first", "1", "a", "left"), FIRST),
    **dict.fromkeys(("second", "2", "b", "right"), SECOND),
    **dict.fromkeys(("tie", "0", "equal", "same", "both", "neither"), TIE),
}


@dataclass(slots=True)
class Ratings:
    """What people said.

    Attributes:
        items: per item, or per pair of items with the smaller key first, one number by rater; of a pair
            :data:`FIRST`, :data:`SECOND` or :data:`TIE`.
        raters: how many; 0 where nobody is named.
        unreadable: rows without a key or a rating.
        replaced: ratings that the same rater gave again later; the last one counts.
    """

    items: dict[Any, dict[str, float]] = field(default_factory=dict)
    raters: int = 0
    unreadable: int = 0
    replaced: int = 0

    def add(self, item: Any, rater: str | None, value: float) -> None:
        """One rating more; without a rater's name it counts as another person's."""
        given = self.items.setdefault(item, {})
        if rater is None:
            rater = f"#{len(given)}"
        elif rater in given:
            self.replaced += 1
        given[rater] = value


def read_ratings(table: str | Path, key: str, rating: str, rater: str | None = None) -> Ratings:
    """Ratings from a table of any format, one a row; numbers may stand as text.

    Args:
        table: the file.
        key: column with what was rated: a picture's path or a row's id.
        rating: column with a number.
        rater: column with who gave it; None where nobody is named.

    Raises:
        InputError: the file or a column is not there.
    """
    ratings = Ratings()
    for row in _rows_with(table, [key, rating, *([rater] if rater else [])], ratings):
        value = as_number(row[rating], from_text=True)
        if value is None or row[key] in (None, ""):
            ratings.unreadable += 1
        else:
            ratings.add(_item(row[key]), str(row[rater]) if rater else None, value)
    return _counted(ratings, rater)


def read_choices(table: str | Path, first: str, second: str, choice: str, rater: str | None = None) -> Ratings:
    """Choices between two pictures or rows, one a row.

    Args:
        table: the file.
        first: column with the key of one.
        second: column with that of the other.
        choice: column with ``first``, ``second`` or ``tie`` (or 1, 2, 0; a, b; left, right), or the key of the chosen.
        rater: column with who chose; None where nobody is named.

    Raises:
        InputError: the file or a column is not there.
    """
    ratings = Ratings()
    for row in _rows_with(table, [first, second, choice, *([rater] if rater else [])], ratings):
        one, other = _item(row[first]), _item(row[second])
        said = _item(row[choice])
        value = FIRST if said == one else SECOND if said == other else _CHOICES.get(said.strip().casefold())
        if value is None or one == other or not one or not other:
            ratings.unreadable += 1
            continue
        # The same two pictures the other way round are the same question.
        pair, value = ((one, other), value) if one < other else ((other, one), -value)
        ratings.add(pair, str(row[rater]) if rater else None, value)
    return _counted(ratings, rater)


def read_scores(
    table: str | Path,
    items: Sequence[str],
    metrics: Sequence[str],
    *,
    key: str,
    image_column: str = "images",
    within: str | None = None,
) -> tuple[dict[str, dict[str, Score]], dict[str, str]]:
    """The scores of the items that were rated.

    Args:
        table: a scored table.
        items: their keys. Where none is equal to a picture's path, the file's name alone decides, if it is unique.
        metrics: keys of scores.
        key: column that holds the items; with ``image_column`` an item is a picture, else a row, whose pictures' scores
            are averaged.
        image_column: column with the pictures that the scores are of.
        within: column that says which items belong together.

    Returns:
        By item the score of each metric, and by item its group.

    Raises:
        InputError: the table or a column is not there.
    """
    from_text = holds_text_only(table)
    known, names = set(items), _unique_names(items)
    scores: dict[str, dict[str, Score]] = {}
    groups: dict[str, str] = {}
    columns = [key, *(metric.split(".")[0] for metric in metrics), *([within] if within else [])]
    for row in _rows_with(table, columns):
        found = pictures(row, key) if key == image_column else [_item(row[key])]
        of_row = {metric: scores_at(row, metric, from_text=from_text) for metric in metrics}
        for place, value in enumerate(found):
            item = value if value in known else names.get(Path(value).name) if key == image_column else None
            if item is None or item in scores:
                continue
            if key == image_column:
                scores[item] = {name: each[min(place, len(each) - 1)] for name, each in of_row.items()}
            else:
                scores[item] = {name: _row_mean(each) for name, each in of_row.items()}
            if within:
                groups[item] = _item(row[within])
    return scores, groups


def _rows_with(table: str | Path, columns: Sequence[str], ratings: Ratings | None = None) -> Iterator[Row]:
    for number, row in enumerate(read_rows(table), 1):
        if isinstance(row, BadRow):
            if ratings is not None:
                ratings.unreadable += 1
            continue
        _check_columns(row, columns, table, number)
        yield row


def _check_columns(row: Row, columns: Sequence[str], table: str | Path, number: int) -> None:
    for column in columns:
        if column not in row:
            raise InputError(
                f"the row has no such column; it has {', '.join(row)}", path=table, row=number, field=column
            )


def _counted(ratings: Ratings, rater: str | None) -> Ratings:
    if rater:
        ratings.raters = len({name for given in ratings.items.values() for name in given})
    return ratings


def _item(value: Any) -> str:
    """Ids may be numbers in one file and text in the other."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "" if value is None else str(value)


def _unique_names(items: Sequence[str]) -> dict[str, str]:
    counts = Counter(Path(item).name for item in items)
    return {Path(item).name: item for item in items if counts[Path(item).name] == 1}


def _row_mean(scores: Sequence[Score]) -> Score:
    values = [score.value for score in scores if score.value is not None]
    return Score(math.fsum(values) / len(values), "ok") if values else scores[0]
