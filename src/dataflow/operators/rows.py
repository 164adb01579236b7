"""How a row says what it wants, and how it is told what came of it: shared by the operators that make images."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from dataflow.errors import InputError
from dataflow.remote_files import names_store
from dataflow.types import Outcome, Row

USER_ROLES = frozenset({"user", "human"})
INTEGER_PARAMS = ("num_inference_steps", "max_sequence_length")
NUMBER_PARAMS = ("guidance_scale", "true_cfg_scale", "image_guidance_scale", "strength")

OVERRIDE_COLUMNS = ("negative_prompt", "height", "width", "seed", *INTEGER_PARAMS, *NUMBER_PARAMS)
"""Columns in which a row overrides the serving's defaults; an empty cell overrides nothing."""

_OVERRIDES = frozenset(OVERRIDE_COLUMNS)
_MOST = 2**31 - 1
_URL = re.compile(r"(?:[a-z][a-z0-9+]+://|data:)", re.IGNORECASE)


def user_turns(row: Row, column: str) -> list[str]:
    """The prompts of a conversation: the content of its user turns, in order.

    The column may hold a plain string, one message, or a list of messages with ``role`` and ``content`` (or ``from``
    and ``value``). System and assistant turns are never prompts. A content may be a list of text parts.

    Raises:
        InputError: there is no prompt, or the column holds something else.
    """
    if column not in row:
        raise InputError("the row has no such column", field=column)
    value = row[column]
    if isinstance(value, str):
        prompts = [value]
    else:
        messages = [value] if isinstance(value, dict) else value
        if not isinstance(messages, list):
            raise InputError(f"expected a string or a list of messages, found {_kind(value)}", field=column)
        prompts = [_content(message, column) for message in messages if _role(message, column).lower() in USER_ROLES]
    if not prompts:
        raise InputError("the conversation has no user turn", field=column)
    for prompt in prompts:
        if not prompt or prompt.isspace():
            raise InputError("the prompt is empty", field=column)
    return prompts


def image_paths(row: Row, column: str) -> tuple[str, ...]:
    """The input images of a row: one path or a list of paths.

    Raises:
        InputError: there is none (a placeholder such as ``[""]`` is none), or the column holds something else.
    """
    if column not in row:
        raise InputError("the row has no such column", field=column)
    value = row[column]
    paths = [value] if isinstance(value, str) or value is None else value
    if not isinstance(paths, list):
        raise InputError(f"expected an image path or a list of them, found {_kind(value)}", field=column)
    for path in paths:
        if path is not None and not isinstance(path, str):
            raise InputError(f"expected an image path, found {_kind(path)}", field=column)
        if path and "\0" in path:
            raise InputError("the image path holds a NUL character", field=column)
        if path and _URL.match(path) and not names_store(path):
            shown = path if len(path) <= 60 else path[:57] + "..."
            raise InputError(f"{shown} is a URL, not a file: download it and give the path", field=column)
    found = tuple(path for path in paths if path)
    if not found:
        raise InputError("the row names no input image", field=column)
    return found


def mask_path(row: Row, column: str) -> str | None:
    """The mask of a row's first input image, or None where the cell is empty.

    Raises:
        InputError: the column holds several, or something else.
    """
    value = row.get(column)
    if _is_empty(value) or value in ([], [""]):
        return None
    mask, *more = image_paths(row, column)
    if more:
        raise InputError(f"expected one mask, found {len(more) + 1}", field=column)
    return mask


def sample_count(row: Row, column: str | None, default: int) -> int:
    """How many images a row asks for: what its column says, or the default where there is no such column.

    Raises:
        InputError: the cell holds no whole number from 0.
    """
    if column is None:
        return default
    number = _integer(row, column, least=0)
    return default if number is None else number


def overrides(row: Row) -> dict[str, Any]:
    """The keyword arguments of a :class:`~dataflow.types.Draft` that the row's own columns set.

    Raises:
        InputError: a value has the wrong type or range.
    """
    if _OVERRIDES.isdisjoint(row):
        return {}
    found: dict[str, Any] = {}
    negative = row.get("negative_prompt")
    if not _is_empty(negative):
        if not isinstance(negative, str):
            raise InputError(f"expected text, found {_kind(negative)}", field="negative_prompt")
        found["negative_prompt"] = negative
    seed = _integer(row, "seed", least=0, most=2**63 - 1)
    if seed is not None:
        found["seed"] = seed
    width, height = _integer(row, "width", least=1), _integer(row, "height", least=1)
    if (width is None) != (height is None):
        missing = "width" if width is None else "height"
        raise InputError("height and width must be given together", field=missing)
    if width is not None:
        found["size"] = (width, height)
    params = {name: value for name in INTEGER_PARAMS if (value := _integer(row, name, least=1)) is not None} | {
        name: value for name in NUMBER_PARAMS if (value := _number(row, name)) is not None
    }
    if params:
        found["params"] = params
    return found


def with_images(row: Row, column: str, samples: Sequence[Sequence[Outcome]]) -> Row:
    """The row with the images that were made for it.

    Args:
        row: as it was read.
        column: where the images go.
        samples: for each image asked for, the outcomes of its turns, oldest first.

    Returns:
        A row whose ``column`` lists the last turn's image of every sample that has one. With several turns,
        ``{column}_turns`` lists the images of all turns of each sample. Where something was not made,
        ``{column}_error`` says so: status, reason, message.
    """
    result = dict(row)
    result[column] = [path for turns in samples for path in turns[-1].images]
    if any(len(turns) > 1 for turns in samples):
        result[f"{column}_turns"] = [[path for turn in turns for path in turn.images] for turns in samples]
    else:
        result.pop(f"{column}_turns", None)
    bad = [turn for turns in samples for turn in turns if turn.status != "done"]
    if bad:
        first = next((turn for turn in bad if turn.status == "failed"), bad[0])
        result[f"{column}_error"] = {"status": first.status, "reason": first.reason, "message": first.message}
    else:
        result.pop(f"{column}_error", None)
    return result


def _role(message: object, column: str) -> str:
    if not isinstance(message, dict):
        raise InputError(f"expected a message with role and content, found {_kind(message)}", field=column)
    role = message.get("role", message.get("from", "user"))
    if not isinstance(role, str):
        raise InputError(f"a message's role must be text, found {_kind(role)}", field=column)
    return role


def _content(message: dict[str, Any], column: str) -> str:
    content = message.get("content", message.get("value"))
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        texts = []
        for part in content:
            if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                raise InputError(
                    "a message may hold text parts only; input images go into a column of their own", field=column
                )
            texts.append(part["text"])
        return "\n".join(texts)
    raise InputError(f"a message's content must be text, found {_kind(content)}", field=column)


def _is_empty(value: object) -> bool:
    # A table that went through pandas has NaN where a cell is empty.
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _number(row: Row, column: str) -> float | None:
    value = row.get(column)
    if _is_empty(value):
        return None
    try:
        if isinstance(value, bool):
            raise TypeError
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"expected a number, found {_kind(value)}", field=column) from None
    if not math.isfinite(number):
        raise InputError(f"expected a finite number, found {value!r}", field=column)
    return number


def _integer(row: Row, column: str, *, least: int, most: int = _MOST) -> int | None:
    value = row.get(column)
    if _is_empty(value):
        return None
    if isinstance(value, str):
        try:
            value = int(value)
        except ValueError:
            value = _number(row, column)
    if isinstance(value, bool) or not (isinstance(value, int) or (isinstance(value, float) and value.is_integer())):
        raise InputError(f"expected a whole number, found {_kind(row[column])}", field=column)
    number = int(value)
    if not least <= number <= most:
        raise InputError(f"must be from {least} to {most}, found {_kind(row[column])}", field=column)
    return number


def _kind(value: object) -> str:
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '...'}"
