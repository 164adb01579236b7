"""Column types, and values that no single type holds."""

from __future__ import annotations

import json
import math

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.export.making import made, pixels

from dataflow.export.arrow import arrow_type, cell
from dataflow.export.kinds import NULL, Kind, fitted, kind_of, merged, settled

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(JSON_VALUES, max_size=6))
@settings(max_examples=300, deadline=None)
def test_a_column_of_anything_is_an_arrow_column(values):
    kind = NULL
    for value in values:
        kind = merged(kind, kind_of(value))
    kind = settled(kind)
    cells = [cell(value, kind, str) for value in values]
    found = pa.array(cells, arrow_type(kind)).to_pylist()
    for value, each in zip(values, found, strict=True):
        assert same(value, each, kind), (value, each, kind)


def same(value, found, kind) -> bool:
    """Whether nothing was lost: JSON is told as text, a field that was missing is null."""
    if value is None:
        return found is None
    match kind.name:
        case "json":
            return json.loads(found) == json.loads(json.dumps(value))
        case "float":
            return math.isclose(found, value, rel_tol=0)
        case "list":
            return all(same(one, other, kind.item) for one, other in zip(value, found, strict=True))
        case "object":
            return all(same(value.get(name), found[name], each) for name, each in kind.fields.items())
        case "text":
            return found == value.encode(errors="replace").decode()
    return found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ([1, 2.5], "float"),
        ([1, 2**60, 2.5], "json"),
        ([2**70], "json"),
        ([1, "a"], "json"),
        ([True, 1], "json"),
        ([{}], "json"),
        ([None], "text"),
        ([{str(n): 1 for n in range(100)}], "json"),
        ([{f"a{n}": 1} for n in range(100)], "json"),
        ([[1], "a"], "json"),
    ],
)
def test_types(values, name):
    kind = NULL
    for value in values:
        kind = merged(kind, kind_of(value))
    assert settled(kind).name == name


def test_missing_fields_are_null():
    kind = merged(kind_of({"a": 1}), kind_of({"b": [None, "x"]}))
    assert fitted({"a": 1}, kind) == {"a": 1, "b": None}
    assert settled(Kind("list", NULL)).item == Kind("text")


def test_nested_columns_come_back_from_parquet_and_datasets(shop):
    nested = {"boxes": [{"label": "a", "box": [1.5, 2.0]}, {"label": "b", "box": []}], "n": 1, "deep": {"x": [[1], []]}}
    rows = [
        shop.row(0, 1, detections=nested, mixed=1, tags=["a"]),
        shop.row(1, 1, detections=None, mixed="one", tags=[]),
        shop.row(2, 1, detections={"boxes": None, "extra": True}, mixed=[1, {"a": None}]),
    ]
    summary = shop.export(shop.table(rows), format="parquet")
    assert summary.json_columns == ("mixed",)
    found = datasets.load_dataset(str(shop.out), cache_dir=str(shop.folder / "hf"), split="train")
    assert found[0]["detections"] == {**nested, "extra": None}
    assert found[1]["detections"] is None or set(found[1]["detections"].values()) == {None}
    assert [json.loads(each) for each in found["mixed"]] == [1, "one", [1, {"a": None}]]
    assert found["tags"][:2] == [["a"], []]
    assert "`mixed`" in (shop.out / "README.md").read_text()


HOSTILE = [
    "一只红色的狐狸，在雪地里 🦊",
    "<script>alert(1)</script> & \"quotes\" 'too'",
    "line one\nline two\r\n\ttab",
    "| table | breaker | `code` **bold** [link](x)",
    "---\nlicense: mit\n---",
    "../../etc/passwd\x00\x1b[31m",
    "\u202ereversed\u2028separated\ufeff",
    "x" * 20_000,
    "{{ jinja }} ${HOME} %s %(x)s",
]


@pytest.mark.parametrize("kind", ["webdataset", "parquet", "folder", "jsonl"])
def test_hostile_and_chinese_prompts_come_back_as_they_were(shop, kind):
    rows = [
        {"prompt": prompt, "image": shop.picture(number, prompt), "topic": prompt, "license": prompt}
        for number, prompt in enumerate(HOSTILE)
    ]
    shop.export(shop.table(rows), format=kind, name=HOSTILE[1], license=HOSTILE[4])
    cache = {"cache_dir": str(shop.folder / "hf"), "split": "train"}
    match kind:
        case "parquet":
            found = list(datasets.load_dataset(str(shop.out), **cache))
        case "folder":
            found = list(datasets.load_dataset("imagefolder", data_dir=str(shop.out / "train"), **cache))
        case "jsonl":
            found = [json.loads(line) for line in (shop.out / "train.jsonl").read_bytes().splitlines()]
        case _:
            from tests.export.making import members

            tar = members(shop.out / "train-000000.tar")
            found = [json.loads(data) for name, data in tar.items() if name.endswith(".json")]
            texts = [data.decode() for name, data in tar.items() if name.endswith(".txt")]
            assert texts == HOSTILE
    column = "text" if kind == "folder" else "prompt"
    assert [each[column] for each in sorted(found, key=lambda each: each["id"])] == HOSTILE
    for number, each in enumerate(sorted(found, key=lambda each: each["id"])):
        if kind in ("parquet", "folder"):
            assert np.array_equal(np.asarray(each["image"]), made(number))
        elif kind == "jsonl":
            assert np.array_equal(pixels(shop.out / each["image"]), made(number))


def test_half_an_emoji_is_written_as_a_question_mark(shop):
    line = json.dumps({"prompt": "a \ud83d fox", "image": shop.picture(1, "x")})
    shop.export(shop.table([line]), format="parquet")
    assert pq.read_table(shop.out / "data")["prompt"].to_pylist() == ["a ? fox"]


@pytest.mark.parametrize("kind", ["webdataset", "parquet", "folder", "jsonl"])
def test_hostile_names_of_columns(shop, kind):
    names = ["a|b", "`x`", "with space", "列", 'quo"te', "new\nline", "dot.ted", "a/b", ": yaml"]
    rows = [shop.row(number, 1, **dict.fromkeys(names, number)) for number in range(2)]
    shop.export(shop.table(rows), format=kind)
    if kind == "parquet":
        found = datasets.load_dataset(str(shop.out), cache_dir=str(shop.folder / "hf"), split="train")
        assert [found[1][name] for name in names] == [1] * len(names)
    card = (shop.out / "README.md").read_text()
    front = card.split("---\n")[1]
    import yaml

    assert yaml.safe_load(front)["pretty_name"]
