"""Types of columns as Arrow and as Hugging Face have them, and rows as Arrow tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dataflow.export.kinds import Kind, fitted
from dataflow.export.samples import Picture, rendered
from dataflow.utils.parquet import libraries

_SCALARS = {"bool": "bool", "int": "int64", "float": "float64", "text": "string", "json": "string"}


def arrow_type(kind: Kind) -> Any:
    """The type as Arrow has it; a picture is a struct of bytes and path."""
    pa, _ = libraries()
    if kind.name == "picture":
        return pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])
    if kind.name == "list":
        assert kind.item is not None
        return pa.list_(arrow_type(kind.item))
    if kind.name == "object":
        return pa.struct([pa.field(name, arrow_type(each)) for name, each in kind.fields.items()])
    return getattr(pa, {"bool": "bool_"}.get(kind.name, _SCALARS[kind.name]))()


def feature(kind: Kind) -> Any:
    """The type as ``datasets`` writes it into a file's schema."""
    if kind.name == "picture":
        return {"_type": "Image"}
    if kind.name == "list":
        assert kind.item is not None
        return [feature(kind.item)]
    if kind.name == "object":
        return {name: feature(each) for name, each in kind.fields.items()}
    return {"dtype": _SCALARS[kind.name], "_type": "Value"}


def card_feature(name: str, kind: Kind) -> dict[str, Any]:
    """The type as dataset cards have it."""
    if kind.name == "list":
        assert kind.item is not None
        inner = card_feature("", kind.item)
        inner.pop("name")
        return {"name": name, "list": inner.pop("dtype") if set(inner) == {"dtype"} else inner.get("struct", inner)}
    if kind.name == "object":
        return {"name": name, "struct": [card_feature(each, one) for each, one in kind.fields.items()]}
    return {"name": name, "dtype": "image" if kind.name == "picture" else _SCALARS[kind.name]}


def cell(value: Any, kind: Kind, show: Callable[[Picture], Any]) -> Any:
    """A value as its column's type has it, with something else in the place of every picture."""
    return rendered(fitted(value, kind), show)


def table(schema: Any, rows: Sequence[Mapping[str, Any]]) -> Any:
    """Rows of cells as an Arrow table."""
    pa, _ = libraries()
    columns = [pa.array([row[field.name] for row in rows], field.type) for field in schema]
    return pa.Table.from_arrays(columns, schema=schema)
