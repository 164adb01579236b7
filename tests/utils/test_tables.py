import builtins
import csv
import datetime
import decimal
import json
import math
import pickle
import random
import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataflow.errors import InputError, MissingExtraError
from dataflow.types import BadRow
from dataflow.utils.storage import FileStorage, TableWriter
from dataflow.utils.tables import count_table, decode_cell, encode_cell, read_table

FORMATS = ["jsonl", "json", "csv", "parquet", "pickle"]


def read(path, data=None):
    """Rows of a user's own file, its format told by its suffix."""
    if data is not None:
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return list(FileStorage(str(path), allow_pickle=True).step().iter_rows())


def round_trip(path, kind, rows):
    with TableWriter(path, kind) as writer:
        for row in rows:
            writer.write(row)
    back = list(read_table(path, kind))
    assert count_table(path, kind) in (None, len(back))
    return back


def identical(one, other):
    """Equal in value and in type, all the way down; 1, 1.0 and True differ, 0.0 and -0.0 as well."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(identical(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(identical, one, other))
    if isinstance(one, float):
        return one == other and math.copysign(1, one) == math.copysign(1, other)
    return one == other


# Round trips of any rows --------------------------------------------------------------------------------------------

TEXTS = [
    "",
    " ",
    "a fox",
    "0001",
    "1984",
    "-5",
    "1e5",
    "0.10",
    "null",
    "true",
    "NaN",
    "None",
    "-Infinity",
    '"quoted"',
    '"',
    "[1, 2]",
    "[",
    '{"a": 1}',
    "{x}",
    "[\ud800",
    "a,b;c\td",
    "line\nbreak",
    "carriage\rreturn\r\n",
    "\n",
    "nul\x00byte",
    "中文",
    "🦊",
    "\ufeffbom",
    "\u2028",
    "\ud800 lone",
    "=1+1",
    "__dataflow__",
    "x" * 200_000,
]
NAMES = ["prompt", "images", "a.b", "", " ", "中文", "1", "null", "[x]", "with,comma", "line\nbreak", '"q"', "nul\x00"]


def random_scalar(rng):
    return rng.choice(
        [
            lambda: None,
            lambda: rng.random() < 0.5,
            lambda: rng.randrange(-10, 10),
            lambda: rng.choice([2**53 + 1, 2**63 - 1, -(2**63), 2**63, 2**64 - 1, 2**64, -(2**63) - 1, 10**30]),
            lambda: rng.choice([0.0, -0.0, 1.0, 0.1, 1e300, 5e-324, 1e22]),
            rng.random,
            lambda: rng.choice(TEXTS),
            lambda: rng.choice(TEXTS),
        ]
    )()


def random_value(rng, depth=0):
    choice = rng.random()
    if depth > 2 or choice < 0.6:
        return random_scalar(rng)
    if choice < 0.7:
        return [rng.choice(TEXTS) for _ in range(rng.randrange(3))]
    if choice < 0.85:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(NAMES): random_value(rng, depth + 1) for _ in range(rng.randrange(4))}


def random_table(rng):
    """Columns of one type, of one type and null, of one type or missing, and of anything; some begin late."""
    size = rng.choice([0, 1, 2, 5, 30])
    makers = [
        lambda: rng.choice(TEXTS),
        lambda: rng.randrange(-(2**63), 2**63),
        lambda: rng.choice([0.0, -0.0, 1.5, 0.1, 1e300]),
        lambda: rng.random() < 0.5,
        lambda: [rng.choice(TEXTS[:10]) for _ in range(rng.randrange(3))],
        lambda: None,
        lambda: random_value(rng),
    ]
    columns = [
        (name, rng.choice(makers), rng.choice([0, 0, 0.3]), rng.choice([0, 0, 0.3]), rng.choice([0, 0, size // 2]))
        for name in rng.sample(NAMES, rng.randrange(len(NAMES)))
    ]
    return [
        {
            name: None if rng.random() < null else make()
            for name, make, null, missing, start in columns
            if row >= start and rng.random() >= missing
        }
        for row in range(size)
    ]


@pytest.mark.parametrize("seed", range(60))
def test_any_rows_come_back_the_same_from_every_format(tmp_path, seed):
    rng = random.Random(seed)
    for attempt in range(3):
        rows = random_table(rng)
        for kind in FORMATS:
            back = round_trip(tmp_path / f"{attempt}.{kind}", kind, rows)
            assert identical(back, rows), kind


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{}],
        [{}, {}, {}],
        [{}, {"late": [1]}],
        [{"a": None}, {}],
        [{"a": None}, {"a": None}],
        [{"a": 1}, {"a": None}, {}],
        [{"a": "x"}, {"a": ["x"]}],
        [{"a": []}, {"a": []}],
        [{"a": [None]}, {"a": ["x"]}],
        [{"a": [["x"]]}, {"a": [[]]}],
        [{"a": True}, {"a": 1}, {"a": 1.0}],
        [{"a": ""}, {"a": None}, {}],
        [{"a": "\ud800"}, {"a": "x"}],
        [{"a": ["\ud800"]}, {"a": ["x"]}],
        [{"images": ["a.png"], "conversations": [{"role": "user", "content": "a fox"}]}],
    ],
)
def test_nothing_null_missing_and_mixed_stay_apart(tmp_path, kind, rows):
    assert identical(round_trip(tmp_path / "t", kind, rows), rows)


@pytest.mark.parametrize("kind", FORMATS)
def test_tables_of_several_blocks_and_row_groups_come_back_whole(tmp_path, kind):
    rows = [{"id": row, "text": f"{row} " * 500, "sha": "0123456789" * (row % 3)} for row in range(6000)]
    assert round_trip(tmp_path / "t", kind, rows) == rows
    if kind == "parquet":
        assert pq.ParquetFile(tmp_path / "t").num_row_groups > 1


def test_columns_of_one_type_are_typed_in_parquet(tmp_path):
    rows = [{"text": "a", "int": 1, "float": 0.5, "bool": True, "list": ["x"], "mixed": 1}, {"mixed": "x", "text": "b"}]
    round_trip(tmp_path / "t", "parquet", rows)
    schema = pq.read_schema(tmp_path / "t")
    types = {name: str(schema.field(name).type).replace("element", "item") for name in rows[0]}
    assert types["text"] == types["mixed"] == "string"
    assert (types["int"], types["float"], types["bool"]) == ("int64", "double", "bool")
    assert types["list"].startswith("list<")


def test_a_parquet_step_that_another_program_narrowed_is_still_understood(tmp_path):
    path = tmp_path / "t"
    round_trip(path, "parquet", [{"a": [1], "b": {"x": 1}, "c": 1}, {"a": [2], "c": 2}])
    pq.write_table(pq.read_table(path).select(["a", "c"]), path)
    assert list(read_table(path, "parquet")) == [{"a": [1], "c": 1}, {"a": [2], "c": 2}]


def test_a_damaged_cell_of_a_parquet_step_is_a_bad_row(tmp_path):
    path = tmp_path / "t"
    round_trip(path, "parquet", [{"a": [1]}, {"a": {}}])
    table = pq.read_table(path)
    pq.write_table(table.set_column(0, "a", pa.array(["[1", None])), path)
    bad, good = read_table(path, "parquet")
    assert isinstance(bad, BadRow)
    assert good == {"a": None}


@pytest.mark.parametrize("text", TEXTS)
def test_a_csv_cell_reads_back_as_itself(text):
    assert decode_cell(encode_cell(text)) == text


@pytest.mark.parametrize("text", ["a fox", "[fox", "3 cats", "null and void", "{x}", "中文"])
def test_ordinary_text_stands_in_a_csv_step_as_it_is(text):
    assert encode_cell(text) == text


def test_a_column_added_to_a_csv_step_by_hand_is_read_by_its_name(tmp_path):
    path = tmp_path / "t.csv"
    with TableWriter(path, "csv") as writer:
        writer.write({"a": 1})
    path.write_text("5,a,__dataflow__\nx,1,\n")
    assert list(read_table(path, "csv")) == [{"5": "x", "a": 1}]


def test_parquet_refuses_a_column_name_that_it_cannot_hold(tmp_path):
    with pytest.raises(InputError, match=r"parquet cannot hold") as caught, TableWriter(tmp_path / "t", "parquet") as w:
        w.write({"\ud800": 1})
    assert caught.value.path == str(tmp_path / "t")
    assert list(tmp_path.iterdir()) == []


# JSON Lines ---------------------------------------------------------------------------------------------------------


def test_json_lines_skip_blank_lines_and_read_the_last_line_without_newline(tmp_path):
    assert read(tmp_path / "t.jsonl", '\ufeff{"a": 1}\r\n\n \t\r\n{"a": 2}\n\n{"a": 3}') == [
        {"a": 1},
        {"a": 2},
        {"a": 3},
    ]


def test_json_lines_of_concatenated_files_with_marks_are_read(tmp_path):
    assert read(tmp_path / "t.jsonl", '\ufeff{"a": 1}\n\ufeff{"a": 2}\n') == [{"a": 1}, {"a": 2}]


def test_json_lines_keep_long_integers_beside_ordinary_lines(tmp_path):
    rows = read(tmp_path / "t.jsonl", f'{{"a": 1}}\n{{"a": {2**80}}}\n{{"a": "{"f" * 8}{"1" * 56}"}}\n')
    assert rows == [{"a": 1}, {"a": 2**80}, {"a": "f" * 8 + "1" * 56}]


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b'{"a": 1,}', "line 3, column 9: "),
        (b'{"a": ', "line 3, column 7: "),
        (b'{"a": 1} {"a": 2}', "line 3, column 10: Extra data"),
        (b'{"a": "\xff"}', "line 3, byte 8: not UTF-8"),
        (b"[1, 2]", "line 3: expected a JSON object, found a list; a file that is one JSON array must be named .json"),
        (b'"text"', "line 3: expected a JSON object, found a string"),
        (b"null", "line 3: expected a JSON object, found null"),
        (b"true", "line 3: expected a JSON object, found true or false"),
        (b"12", "line 3: expected a JSON object, found a number"),
        (b"NaN", "line 3: expected a JSON object, found null"),
        (b"[" * 5000, "line 3: nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "line 3: Exceeds the limit"),
    ],
)
def test_a_line_that_is_no_row_is_a_bad_row_and_the_others_are_read(tmp_path, line, error):
    first, bad, last = read(tmp_path / "t.jsonl", b'{"a": 1}\n\n' + line + b'\n{"a": 2}\n')
    assert (first, last) == ({"a": 1}, {"a": 2})
    assert isinstance(bad, BadRow)
    assert bad.error.startswith(error)
    assert bad.raw.encode()[:6] == line[:6]


def test_the_text_of_a_bad_row_is_cut(tmp_path):
    (bad,) = read(tmp_path / "t.jsonl", "é" * 50_000)
    assert bad.raw == "é" * 10_000


@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.csv"])
@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"\x1f\x8b\x08\x00", "gzip"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"PK\x03\x04", "zip"),
        (b"PAR1....PAR1", "Parquet"),
        ('{"a": 1}'.encode("utf-16"), "UTF-16"),
    ],
)
def test_a_file_that_is_no_text_is_refused_by_what_it_is(tmp_path, name, data, what):
    with pytest.raises(InputError, match=what):
        read(tmp_path / name, data)


def test_utf_16_without_a_mark_gives_bad_rows(tmp_path):
    assert all(isinstance(row, BadRow) for row in read(tmp_path / "t.jsonl", '{"a": 1}\n{"a": 2}'.encode("utf-16-le")))


@pytest.mark.parametrize(
    "data",
    [
        "",
        "\n",
        " \n\t\r\n",
        "{}",
        "{}\n",
        "\n\n{}\n\n\n{}\n\n",
        "{}\nbroken\n[]\n",
        "{}\n" * 3 + " " * 3_000_000,
        "{}\n" * 800_000,
        "\n" * 800_000 + "{}",
        ("{" + " " * 400_000 + "}\n") * 20,
        ("\n" * 1_048_576 + "{}") * 2,
    ],
)
def test_counting_json_lines_agrees_with_reading_them(tmp_path, data):
    items = read(tmp_path / "t.jsonl", data)
    assert count_table(tmp_path / "t.jsonl", "jsonl") == len(items)


def test_reading_and_writing_json_lines_takes_constant_memory(tmp_path):
    program = """
import resource, sys
from dataflow.utils.storage import FileStorage
source, cache = sys.argv[1:]
storage = FileStorage(source, cache)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with storage.step().open_writer() as writer:
    for number, row in enumerate(storage.iter_rows()):
        writer.write(row)
        if number == 1000:
            before = peak()
print((peak() - before) // 1024)
"""
    source = tmp_path / "t.jsonl"
    source.write_text('{"conversations": [{"role": "user", "content": "a fox"}], "images": [""]}\n' * 300_000)
    command = [sys.executable, "-c", program, str(source), str(tmp_path / "cache")]
    grown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert int(grown) < 5
    assert (tmp_path / "cache/dataflow_cache_step_step1.jsonl").stat().st_size > 10_000_000


# JSON ---------------------------------------------------------------------------------------------------------------


def test_a_json_array_gives_its_objects_and_bad_rows_for_the_rest(tmp_path):
    first, bad, last = read(tmp_path / "t.json", '\ufeff[{"a": 1}, 5, {"a": 2}]')
    assert (first, last) == ({"a": 1}, {"a": 2})
    assert bad == BadRow(raw="5", error="element 2: expected an object")


def test_a_json_object_is_one_row(tmp_path):
    assert read(tmp_path / "t.json", '{\n "a": 1\n}\n') == [{"a": 1}]


def test_json_lines_named_json_are_read_as_what_they_are(tmp_path):
    first, bad, last = read(tmp_path / "t.json", '\n{"a": 1}\n{"a": 2,}\n{"a": 3}\n')
    assert (first, last) == ({"a": 1}, {"a": 3})
    assert bad.error.startswith("line 3, column 9")


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b'[\n  {"a": 1},\n  {"a" 2}\n]', "not valid JSON: line 3, column 8: "),
        (b'[{"a": 1},\n{"a": 2}', "not valid JSON: line 2, column 9: "),
        (b'[\n"\xff"]', "not valid JSON: line 2, byte 2: not UTF-8"),
        (b"", "the file is empty"),
        (b" \n", "the file is empty"),
        (b"5", "expected a JSON array"),
    ],
)
def test_a_broken_json_file_is_refused_with_the_place(tmp_path, data, error):
    with pytest.raises(InputError) as caught:
        read(tmp_path / "t.json", data)
    assert error in str(caught.value)
    assert caught.value.path == str(tmp_path / "t.json")


def test_a_json_step_is_json_for_everybody(tmp_path):
    for rows in ([], [{"a": 1}], [{"a": "é"}, {"b": "\ud800"}]):
        round_trip(tmp_path / "t.json", "json", rows)
        assert json.loads((tmp_path / "t.json").read_text(encoding="utf-8")) == rows


# CSV ----------------------------------------------------------------------------------------------------------------


def test_cells_of_a_users_csv_stay_text_except_json_lists_and_objects(tmp_path):
    data = (
        "\ufeffid,prompt,conversations,images,empty\r\n"
        '0001,1984,"[{""role"": ""user"", ""content"": ""a fox""}]","[""a.png""]",\r\n'
        "null,true,[not json,{not json,NaN\r\n"
    )
    assert read(tmp_path / "t.csv", data) == [
        {
            "id": "0001",
            "prompt": "1984",
            "conversations": [{"role": "user", "content": "a fox"}],
            "images": ["a.png"],
            "empty": "",
        },
        {"id": "null", "prompt": "true", "conversations": "[not json", "images": "{not json", "empty": "NaN"},
    ]


def test_csv_takes_quoted_newlines_huge_cells_blank_lines_and_a_missing_last_newline(tmp_path):
    huge = "x" * 300_000
    data = f'\n"a","b"\n"one\ntwo ""quoted""",{huge}\n\n1,2'
    assert read(tmp_path / "t.csv", data) == [{"a": 'one\ntwo "quoted"', "b": huge}, {"a": "1", "b": "2"}]


@pytest.mark.parametrize(
    ("record", "error"),
    [
        (b"1,2,3", "line 3: 3 cells under a header of 2 columns"),
        (b"1", "line 3: 1 cells under a header of 2 columns"),
        (b"1,\xff", "line 3, byte 3: not UTF-8"),
        (b'"1"x,2', "line 3: "),
        (b"1,a\rb", "line 3: new-line character"),
    ],
)
def test_a_broken_csv_record_is_a_bad_row_and_the_others_are_read(tmp_path, record, error):
    first, bad, last = read(tmp_path / "t.csv", b"a,b\n1,2\n" + record + b"\n3,4\n")
    assert (first, last) == ({"a": "1", "b": "2"}, {"a": "3", "b": "4"})
    assert isinstance(bad, BadRow)
    assert bad.error.startswith(error)
    assert count_table(tmp_path / "t.csv", "csv") == 3


def test_a_quote_never_closed_does_not_swallow_rows_without_a_word(tmp_path):
    first, bad = read(tmp_path / "t.csv", 'a,b\n1,2\n3,"4\n5,6\n7,8\n')
    assert first == {"a": "1", "b": "2"}
    assert bad.error.startswith("line 3: ")
    assert "never closed" in bad.error
    assert bad.raw == '3,"4\n5,6\n7,8\n'


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", "the file is empty"),
        (b"\n\n", "the file is empty"),
        (b"a,b,a\n1,2,3\n", "names this column more than once"),
        (b"a,\xff\n1,2\n", "the header cannot be read: line 1"),
        (b"a,b\r1,2\r", "the header cannot be read: line 1"),
    ],
)
def test_a_csv_without_a_usable_header_is_refused(tmp_path, data, error):
    with pytest.raises(InputError, match=error):
        read(tmp_path / "t.csv", data)


def test_a_csv_with_a_header_only_has_no_rows(tmp_path):
    assert read(tmp_path / "t.csv", "a,b\n") == []


def test_a_csv_step_is_csv_for_everybody(tmp_path):
    rows = [{"prompt": 'a "red", fox\n', "images": ["a.png"]}, {"prompt": "b"}]
    round_trip(tmp_path / "t.csv", "csv", rows)
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.reader(file))
    assert table == [["prompt", "images", "__dataflow__"], ['a "red", fox\n', '["a.png"]', ""], ["b", "", ""]]


# Parquet ------------------------------------------------------------------------------------------------------------


def write_parquet(path, columns):
    pq.write_table(pa.table(columns), path)


def test_a_users_parquet_is_read_by_its_own_types_as_plain_values(tmp_path):
    path = tmp_path / "t.parquet"
    instant = datetime.datetime(2026, 11, 22, 1, 2, 3)
    write_parquet(
        path,
        {
            "conversations": [[{"role": "user", "content": "a fox"}], []],
            "text": ["0001", "[1]"],
            "float32": pa.array([0.5, math.nan], pa.float32()),
            "large": pa.array([2**64 - 1, None], pa.uint64()),
            "when": pa.array([instant, None], pa.timestamp("ns")),
            "day": [instant.date(), None],
            "bytes": [b"\x00\xff", b""],
            "decimal": [decimal.Decimal("1.10"), None],
            "lapse": [datetime.timedelta(seconds=1), None],
            "word": pa.array(["x", "y"]).dictionary_encode(),
            "map": pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int64())),
        },
    )
    first, second = read(path)
    assert first == {
        "conversations": [{"role": "user", "content": "a fox"}],
        "text": "0001",
        "float32": 0.5,
        "large": 2**64 - 1,
        "when": "2026-11-22T01:02:03",
        "day": "2026-11-22",
        "bytes": "AP8=",
        "decimal": "1.10",
        "lapse": "0:00:01",
        "word": "x",
        "map": [["k", 1]],
    }
    assert second["text"] == "[1]"
    assert second["float32"] is None
    assert count_table(path, "parquet") == 2


def test_a_parquet_file_that_is_none_is_refused(tmp_path):
    path = tmp_path / "t.parquet"
    with pytest.raises(InputError, match="parquet"):
        read(path, b"not parquet at all")
    with pytest.raises(InputError, match="parquet"):
        count_table(path, "parquet")
    with pytest.raises(InputError):
        read(path, b"")


def test_a_parquet_file_damaged_in_the_middle_is_refused(tmp_path):
    path = tmp_path / "t.parquet"
    write_parquet(path, {"a": [f"row {number}" for number in range(10_000)]})
    data = bytearray(path.read_bytes())
    data[4:2000] = bytes(1996)
    with pytest.raises(InputError):
        read(path, bytes(data))


def test_a_parquet_value_beyond_python_is_refused(tmp_path):
    path = tmp_path / "t.parquet"
    write_parquet(path, {"a": pa.array([2**62], pa.timestamp("us"))})
    with pytest.raises(InputError, match="parquet"):
        read(path)


def test_a_parquet_file_with_two_columns_of_one_name_is_refused(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"]), path)
    with pytest.raises(InputError, match="same name"):
        read(path)


def test_parquet_without_pyarrow_says_what_to_install_before_any_work(tmp_path, monkeypatch):
    real_import = builtins.__import__

    def no_pyarrow(name, *args, **kwargs):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    (tmp_path / "t.parquet").touch()
    monkeypatch.setattr(builtins, "__import__", no_pyarrow)
    with pytest.raises(MissingExtraError, match=r"open-dataflow\[parquet\]"):
        FileStorage(str(tmp_path / "t.parquet")).step().iter_rows()
    with pytest.raises(MissingExtraError), TableWriter(tmp_path / "u.parquet", "parquet"):
        pytest.fail("the block must not begin")


# Pickle and DataFrames ----------------------------------------------------------------------------------------------


def test_a_pickle_of_dicts_or_of_a_dataframe_gives_plain_rows(tmp_path):
    rows = [{"a": np.int64(1), "b": np.array([1.5]), "c": pd.NaT}, {1: 2}, 5]
    first, key, number = read(tmp_path / "t.pkl", pickle.dumps(rows))
    assert first == {"a": 1, "b": [1.5], "c": None}
    assert "keys must be text" in key.error
    assert number == BadRow(raw="5", error="element 3: expected a dict, found int")
    frame = pd.DataFrame({"a": [1, 2], "b": [0.5, None], "c": [["x"], None]})
    assert read(tmp_path / "t.pickle", pickle.dumps(frame)) == [
        {"a": 1, "b": 0.5, "c": ["x"]},
        {"a": 2, "b": None, "c": None},
    ]


@pytest.mark.parametrize("data", [b"", b"garbage", b"cnowhere\nNothing\n.", pickle.dumps(5)])
def test_a_pickle_that_holds_no_table_is_refused(tmp_path, data):
    with pytest.raises(InputError, match=r"pickle|expected a list"):
        read(tmp_path / "t.pkl", data)
