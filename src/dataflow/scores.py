"""The scores of finished tables, read for those who look at whole tables: comparisons, calibrations, benchmarks.

:mod:`dataflow.operators.evaluation` says how scores stand in a row. Nothing is filled in here: a score that is null, of
another status than ``ok``, text or no finite number has no value, and its status says why.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dataflow.errors import InputError
from dataflow.operators.rows import user_turns
from dataflow.types import BadRow, Row
from dataflow.utils.storage import FileStorage

FLOOR = 0.99
"""The share of expected scores below which no figure is given unless the caller insists."""

NEVER_MADE = frozenset({"generation_failed", "refused"})
"""Statuses of pictures that their model did not make. A judge's own refusal is ``judge_refused`` here."""

_LOOK_AT_LEAST = 1000
_COUNTS = frozenset({"passes", "answered"})
"""Fields of evaluators' scores that count what a score rests on."""


class Score(NamedTuple):
    """One picture's score. ``value`` is None unless ``status`` is ``ok``."""

    value: float | None
    status: str

    @property
    def made(self) -> bool:
        """Whether there is a picture, as far as the status tells."""
        return self.status not in NEVER_MADE


def read_rows(table: str | Path) -> Iterator[Row | BadRow]:
    """The rows of a table of any format.

    Raises:
        InputError: the file cannot be read; some of it shows while iterating.
    """
    return FileStorage(str(table)).step().iter_rows()


def holds_text_only(table: str | Path) -> bool:
    """Whether numbers of this table may stand as text: a CSV that another program wrote has nothing else."""
    return Path(table).suffix.lower() == ".csv"


def scores_at(row: Row, key: str, *, from_text: bool = False) -> list[Score]:
    """The scores of a row under a key, one for each picture, with why one is missing.

    Args:
        row: of a scored table.
        key: a score column; ``judge.value`` is a field of an object. True and false count as 1 and 0.
        from_text: whether text may stand for a number.

    Returns:
        At least one score. Beside the statuses of evaluators: ``not_scored`` (no such column), ``no_value`` (null
        although the status is ``ok``), ``not_a_number``.
    """
    found = []
    for value, status in values_at(row, key):
        if status != "ok":
            found.append(Score(None, status))
            continue
        number = as_number(value, from_text=from_text)
        if number is None:
            empty = value is None or (from_text and value == "") or (isinstance(value, float) and math.isnan(value))
            found.append(Score(None, "no_value" if empty else "not_a_number"))
        else:
            found.append(Score(number, "ok"))
    return found


def values_at(row: Row, key: str) -> list[tuple[Any, str]]:
    """What stands under a key for each picture of a row, of whatever type, and its status; null unless that is ``ok``.

    Args:
        row: of a scored table.
        key: as for :func:`scores_at`.
    """
    column, *fields = key.split(".")
    if column not in row:
        return [(None, "not_scored")]
    value = row[column]
    values = value if isinstance(value, list) else [value]
    statuses = _per_picture(row.get(f"{column}_status"), len(values), "no_value")
    errors = _per_picture(row.get(f"{column}_error"), len(values), None)
    found = []
    for each, status, error in zip(values or [None], statuses or ["missing_image"], errors or [None], strict=True):
        for field in fields:
            each = each.get(field) if isinstance(each, Mapping) else None
        if status == "refused" and error:
            status = "judge_refused"
        status = "ok" if status is None else str(status)
        found.append((each if status == "ok" else None, status))
    return found


def as_number(value: Any, *, from_text: bool = False) -> float | None:
    """A finite number, or None. True and false are 1 and 0.

    Args:
        value: anything.
        from_text: whether text may stand for a number.
    """
    if isinstance(value, str) and from_text:
        try:
            value = float(value)
        except ValueError:
            return None
    if not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def metrics_in(table: str | Path) -> list[str]:
    """The keys of all scores of a table: columns that have a status beside them, or the number fields of their objects.

    Reads a thousand rows, and on until every such column has shown a value.

    Raises:
        InputError: as :func:`read_rows`.
    """
    from_text = holds_text_only(table)
    found: dict[str, None] = {}
    columns: dict[str, bool] = {}
    for number, row in enumerate(read_rows(table), 1):
        if isinstance(row, BadRow):
            continue
        for column in score_columns(row):
            columns.setdefault(column, False)
            for value, _ in values_at(row, column):
                columns[column] = columns[column] or value is not None
                for key, item in _numbers(column, value):
                    if as_number(item, from_text=from_text) is not None:
                        found.setdefault(key)
        if number >= _LOOK_AT_LEAST and all(columns.values()):
            break
    return sorted(found)


def score_columns(row: Row) -> list[str]:
    """The columns of a row that have a status beside them."""
    return [name.removesuffix("_status") for name in row if name.endswith("_status") and name[:-7] in row]


def generation_failure(row: Row) -> str | None:
    """The status of pictures that a row asked for in vain, as generators leave it in ``{column}_error``."""
    for name, value in row.items():
        if name.endswith("_error") and isinstance(value, dict) and value.get("status") in ("refused", "failed"):
            return "refused" if value["status"] == "refused" else "generation_failed"
    return None


def plain_prompt(row: Row, column: str) -> list[str] | None:
    """The user's turns of a row, or None where there are none."""
    try:
        return user_turns(row, column)
    except InputError:
        return None


def by_status(counts: Mapping[str, int]) -> str:
    """Counts for people, the most frequent first: ``parse_error 12, timeout 3``."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{name} {count:,}" for name, count in ordered)


def _numbers(column: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for field, item in value.items():
            if isinstance(item, int | float) and "." not in field and field not in _COUNTS:
                yield f"{column}.{field}", item
    else:
        yield column, value


def _per_picture(value: Any, count: int, untold: Any) -> Sequence[Any]:
    """A list of that length; one that is too short does not tell about the last pictures."""
    if not isinstance(value, list):
        return [value] * count
    return [*value[:count], *[untold] * (count - len(value))]
