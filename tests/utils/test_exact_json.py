import datetime
import enum
import json
import math
import random
from decimal import Decimal
from pathlib import Path

import numpy as np
import orjson
import pandas as pd
import pytest

from dataflow.utils.exact_json import describe, dumps, dumps_row, loads


@pytest.mark.parametrize(
    "value",
    [
        0,
        -1,
        2**63 - 1,
        2**63,
        2**64 - 1,
        2**64,
        -(2**63),
        -(2**63) - 1,
        10**40,
        0.1,
        1.0,
        1e22,
        5e-324,
        1.7976931348623157e308,
        True,
        None,
        "",
        "0001",
        "1984",
        "\x00\n\r\u2028",
        "🦊é中",
        "\ud800 lone",
        [],
        {},
        {"": [[], {"a": None}]},
        {"big": 2**70, "text": "\udfff", "nested": [{"x": -0.5}]},
    ],
)
def test_a_value_comes_back_exactly(value):
    back = loads(dumps(value))
    assert back == value
    assert type(back) is type(value)
    assert b"\n" not in dumps(value)


def test_negative_zero_keeps_its_sign():
    assert math.copysign(1, loads(dumps(-0.0))) == -1
    assert math.copysign(1, loads(dumps([-0.0, 2**70]))[0]) == -1


@pytest.mark.parametrize("digits", range(18, 25))
@pytest.mark.parametrize("sign", [1, -1])
def test_no_length_of_integer_becomes_a_float(digits, sign):
    rng = random.Random(digits)
    for _ in range(100):
        value = sign * rng.randrange(10 ** (digits - 1), 10**digits)
        assert loads(f'{{"a": {value}}}'.encode()) == {"a": value}
        assert loads(dumps(value)) == value


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e400", "-1e400"])
def test_nan_and_infinity_are_read_as_null(text):
    assert loads(f'{{"a": {text}, "b": 1.5}}'.encode()) == {"a": None, "b": 1.5}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan"), [math.nan, 2**70]])
def test_nan_and_infinity_are_written_as_null(value):
    expected = [None, 2**70] if isinstance(value, list) else None
    assert json.loads(dumps(value)) == expected


def test_the_last_of_two_equal_keys_wins():
    assert loads(b'{"a": 1, "a": 2}') == {"a": 2}


class Colour(enum.Enum):
    RED = "red"


class Name(enum.StrEnum):
    FOX = "fox"


class Number(enum.IntEnum):
    ONE = 1


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Path("a/b.png"), "a/b.png"),
        (Decimal("1.10"), "1.10"),
        (b"\x00\xff", "AP8="),
        (bytearray(b"a"), "YQ=="),
        (memoryview(b"a"), "YQ=="),
        (datetime.date(2026, 11, 22), "2026-11-22"),
        (datetime.datetime(2026, 11, 22, 1, 2, 3, 4), "2026-11-22T01:02:03.000004"),
        (datetime.time(1, 2), "01:02:00"),
        (datetime.timedelta(hours=1), "1:00:00"),
        (pd.Timestamp("2026-11-22T00:00:00.123456789"), "2026-11-22T00:00:00.123456789"),
        (pd.NaT, None),
        ((1, 2), [1, 2]),
        (Colour.RED, "red"),
        (Name.FOX, "fox"),
        (Number.ONE, 1),
        (np.int64(3), 3),
        (np.float64(0.1), 0.1),
        (np.bool_(True), True),
        (np.str_("x"), "x"),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (np.arange(6).reshape(2, 3).T, [[0, 3], [1, 4], [2, 5]]),
        (np.array(["a", "b"]), ["a", "b"]),
        (np.array([{"a": 1}, None], dtype=object), [{"a": 1}, None]),
    ],
)
def test_foreign_values_become_plain_ones_alike_beside_ordinary_and_odd_neighbours(value, expected):
    assert loads(dumps(value)) == expected
    assert loads(dumps([value, "\ud800"])) == [expected, "\ud800"]
    assert loads(dumps({"k": value, "big": 2**70})) == {"k": expected, "big": 2**70}


@pytest.mark.parametrize("value", [{1, 2}, object(), 1j, {1: 2}, {None: 2}, [{(1,): 2}]])
def test_what_json_has_no_place_for_is_refused(value):
    with pytest.raises(TypeError, match=r"no place in JSON|keys must be text"):
        dumps(value)


def test_a_value_that_contains_itself_is_refused():
    value = []
    value.append(value)
    with pytest.raises(TypeError, match="contains itself"):
        dumps(value)


def test_keys_of_a_str_subclass_are_text():
    assert dumps_row({np.str_("a"): 1, Name.FOX: "\ud800"}) == b'{"a":1,"fox":"\\ud800"}\n'


def test_a_row_is_one_line_and_only_odd_cells_are_escaped():
    assert dumps_row({"a": "é"}) == '{"a":"é"}\n'.encode()
    assert dumps_row({"a": "é", "b": "\ud800"}) == '{"a":"é","b":"\\ud800"}\n'.encode()
    assert dumps_row({}) == b"{}\n"


def test_a_row_that_cannot_be_written_names_its_column():
    with pytest.raises(TypeError) as caught:
        dumps_row({"good": 1, "bad": {1}})
    assert caught.value.args == ("a value of type set has no place in JSON", "bad")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'{"a": 1,}', "line 7, column 9: Expecting property name"),
        (b'{"a":\n  x}', "line 8, column 3: Expecting value"),
        (b'{"a": "\xff"}', "line 7, byte 8: not UTF-8 text"),
        (b'{\n"a": "\xff"}', "line 8, byte 7: not UTF-8 text"),
        (b"[" * 100_000, "line 7: nested too deeply"),
        (b"1" * 5000, "line 7: Exceeds the limit"),
    ],
)
def test_an_error_says_where_and_what(data, expected):
    with pytest.raises(ValueError) as caught:
        loads(data)
    assert describe(caught.value, 7).startswith(expected)


def test_ordinary_rows_are_what_orjson_writes():
    row = {"id": 1, "conversations": [{"role": "user", "content": "a fox"}], "images": [""], "score": 0.1}
    assert dumps_row(row) == orjson.dumps(row) + b"\n"
