"""JSON that changes nothing: as fast as orjson, and exact where orjson is not.

Integers of any size stay whole and lone surrogates in text survive. JSON has no NaN and no infinity: both are read and
written as null. What JSON does not have is written as the nearest thing it has: numpy and pandas values as plain ones,
dates and times in ISO form, bytes in base64, paths, decimals and durations as text.
"""

from __future__ import annotations

import base64
import datetime
import json
from decimal import Decimal
from pathlib import PurePath
from typing import Any

import orjson

_DIGITS_AS_ZEROS = bytes.maketrans(b"123456789", b"000000000")
_LONG_INTEGER = b"0" * 19
_OPTIONS = orjson.OPT_SERIALIZE_NUMPY


def may_hold_long_integers(data: bytes) -> bool:
    """Whether ``data`` has a run of digits long enough that orjson might turn an integer into a float."""
    return _LONG_INTEGER in data.translate(_DIGITS_AS_ZEROS)


def loads(data: bytes) -> Any:
    """The JSON value in ``data``.

    Raises:
        ValueError: not JSON, not UTF-8, or nested too deeply.
    """
    if not may_hold_long_integers(data):
        try:
            return orjson.loads(data)
        except orjson.JSONDecodeError:
            pass
    return loads_leniently(data)


def loads_leniently(data: bytes) -> Any:
    """The same, slower, with what orjson refuses or rounds: NaN, lone surrogates, a byte order mark, huge numbers.

    Raises:
        ValueError: not JSON, not UTF-8, or nested too deeply.
    """
    try:
        return json.loads(data.decode("utf-8-sig"), parse_constant=lambda _: None, parse_float=_finite_or_none)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _finite_or_none(text: str) -> float | None:
    value = float(text)
    return value if value - value == 0 else None


def dumps(value: Any) -> bytes:
    """``value`` as JSON on one line, without a newline.

    Raises:
        TypeError: something in it has no place in JSON, with a message for people.
    """
    try:
        return orjson.dumps(value, replace, _OPTIONS)
    except TypeError:
        pass
    try:
        return json.dumps(_plain(value), ensure_ascii=True, separators=(",", ":")).encode()
    except RecursionError:
        raise TypeError("the value is nested too deeply or contains itself") from None


def dumps_row(row: dict[str, Any]) -> bytes:
    """``row`` as one line of JSON Lines, with its newline.

    Raises:
        TypeError: as :func:`dumps`; its ``args`` are the message and the column.
    """
    try:
        return orjson.dumps(row, replace, _OPTIONS | orjson.OPT_APPEND_NEWLINE)
    except TypeError:
        pass
    cells = []
    for name, value in row.items():
        try:
            cells.append(dumps(_plain_key(name)) + b":" + dumps(value))
        except TypeError as error:
            raise TypeError(str(error), name) from error
    return b"{" + b",".join(cells) + b"}\n"


def replace(value: Any) -> Any:
    """The nearest thing that JSON has, for types that orjson does not know.

    Raises:
        TypeError: there is none.
    """
    match value:
        case PurePath() | Decimal() | datetime.timedelta():
            return str(value)
        case bytes() | bytearray() | memoryview():
            return base64.b64encode(value).decode()
        case datetime.date() | datetime.time():
            # pandas.NaT calls itself a datetime and, like NaN, is not equal to itself.
            return value.isoformat() if value == value else None
    if callable(to_list := getattr(value, "tolist", None)):
        return to_list()
    raise TypeError(f"a value of type {type(value).__name__} has no place in JSON")


def _plain(value: Any) -> Any:
    """The same value built of dict, list, str, int, float, bool and None only."""
    match value:
        case None | bool():
            return value
        case str():
            return str.__str__(value)
        case int():
            return int(value)
        case float():
            return _finite_or_none(repr(float(value)))
        case dict():
            return {_plain_key(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
    try:
        return orjson.loads(orjson.dumps(value, option=_OPTIONS))
    except TypeError:
        return _plain(replace(value))


def _plain_key(key: Any) -> str:
    if not isinstance(key, str):
        raise TypeError(f"the key {key!r} is of type {type(key).__name__}; keys must be text")
    return str.__str__(key)


def describe(error: ValueError, line: int = 1) -> str:
    """Where and what, for an error that :func:`loads` raised about text that begins on ``line``."""
    match error:
        case json.JSONDecodeError():
            return f"line {line + error.lineno - 1}, column {error.colno}: {error.msg}"
        case UnicodeDecodeError():
            *lines, start = error.object[: error.start].split(b"\n")
            return f"line {line + len(lines)}, byte {len(start) + 1}: not UTF-8 text"
    return f"line {line}: {error}"


def is_utf8(text: str) -> bool:
    """False for text with lone surrogates, which no file but ASCII JSON can hold."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def plain_row(row: dict[str, Any]) -> dict[str, Any]:
    """Dates, decimals, bytes and NaN as JSON has them."""
    return loads(dumps(row))
