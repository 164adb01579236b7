"""What operators that score share: which pictures a row has, how scores stand in it, and what a missing score means.

Scores have the shape of the image column: a path gives one value, a list of paths a list of values in the same order.
Beside ``{output_key}`` stand ``{output_key}_status``, one word for each picture, ``{output_key}_error`` where something
is not ``ok``, and ``{output_key}_by``, who scored. A score that could not be had is null, never a number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import orjson

from dataflow.errors import InputError
from dataflow.types import Outcome, Row

Status = Literal[
    "ok",
    "missing_image",
    "decode_error",
    "generation_failed",
    "refused",
    "parse_error",
    "timeout",
    "not_applicable",
    "failed",
]
"""Why a score is there or not. ``failed`` is whatever the others do not name; the error says what."""

_OF_REASON: Mapping[str, Status] = {
    "image_missing": "missing_image",
    "timeout": "timeout",
    "refused": "refused",
    "parse_error": "parse_error",
    "no_text": "parse_error",
    "not_applicable": "not_applicable",
}


def pictures(row: Row, column: str) -> list[str]:
    """Paths of a row's pictures; none where it is a placeholder.

    Raises:
        InputError: there is no such column, or it holds something else.
    """
    if column not in row:
        raise InputError("the row has no such column", field=column)
    value = row[column]
    paths = value if isinstance(value, list) else [value]
    for path in paths:
        if path is not None and not isinstance(path, str):
            raise InputError(f"expected an image path, found {type(path).__name__}", field=column)
    return [path for path in paths if path]


def pictures_left(row: Row, column: str) -> list[str]:
    """As :func:`pictures`; none where the column holds something else, which its evaluator has said already."""
    try:
        return pictures(row, column)
    except InputError:
        return []


def without_pictures(row: Row, column: str) -> Status:
    """Why a row has no picture to score."""
    error = row.get(f"{column}_error")
    if not isinstance(error, Mapping):
        return "missing_image"
    return "refused" if error.get("status") == "refused" else "generation_failed"


def with_scores(
    row: Row, image_key: str, output_key: str, outcomes: Sequence[Outcome], by: str, per_picture: bool = True
) -> Row:
    """The row with what came of its scoring.

    Args:
        row: as it was read.
        image_key: column with the pictures.
        output_key: column that gets the scores.
        outcomes: one for each picture, or one for a row that could not be used; their text is JSON: the value, or an
            object of values.
        by: who scored.
        per_picture: the scores have the shape of the image column; False for one score of the row.
    """
    try:
        paths = pictures(row, image_key) if per_picture else [""]
    except InputError:  # what else the column holds: then there is the one outcome that says so
        paths = [""]
    found = [_score(outcome) for outcome in outcomes]
    if not paths or not found:
        status = without_pictures(row, image_key)
        # What the picture's maker said stands in a column of its own; an error here would be the judge's.
        found = [(None, status, "the row names no picture" if status == "missing_image" else "")]
    elif len(found) < len(paths):
        found = found[:1] * len(paths)  # the row could not be used as a whole
    result = dict(row)
    alone = not per_picture or not isinstance(row.get(image_key), list)
    # A picture that was never made counts as one that was expected.
    columns = [list(column) for column in zip(*found, strict=True)]
    values, statuses, errors = (column[0] for column in columns) if alone else columns
    result[output_key], result[f"{output_key}_status"], result[f"{output_key}_by"] = values, statuses, by
    result.pop(f"{output_key}_error", None)
    if any(error for _, _, error in found):
        result[f"{output_key}_error"] = errors
    return result


def _score(outcome: Outcome) -> tuple[Any, Status, str]:
    if outcome.status != "done":
        reason = outcome.reason
        status = _OF_REASON.get(reason, "decode_error" if reason.startswith("image_") else "failed")
        return None, status, f"{reason}: {outcome.message}"
    try:
        value = _finite(orjson.loads(outcome.text or ""))
    except ValueError:
        return None, "parse_error", "the answer is no JSON"
    if value is None:
        return None, "failed", "the score is no finite number"
    return value, "ok", ""


def _finite(value: Any) -> Any:
    """Null for what is not finite, at any depth of an object."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def score_at(row: Row, key: str) -> list[float | None]:
    """The scores of a row under a key, one for each picture; ``probe.sharpness`` is a field of an object.

    Raises:
        InputError: there is no such column, or it holds no scores.
    """
    column, *fields = key.split(".")
    if column not in row:
        raise InputError("the row has no such column: has the evaluator run?", field=column)
    value = row[column]
    found = []
    for each in value if isinstance(value, list) else [value]:
        for field in fields:
            each = each.get(field) if isinstance(each, Mapping) else None
        if each is not None and (isinstance(each, bool) or not isinstance(each, int | float)):
            raise InputError(f"expected a number under {key!r}, found {type(each).__name__}", field=column)
        found.append(None if each is None or not math.isfinite(each) else float(each))
    return found
