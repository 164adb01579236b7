"""Parquet tables that give back exactly the rows that were written; :mod:`dataflow.utils.tables` says how."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from dataflow.errors import InputError, MissingExtraError
from dataflow.types import RAW_LIMIT, BadRow, Row
from dataflow.utils.exact_json import dumps, is_utf8, loads, plain_row

MARK = "__dataflow__"
"""Name of the column that CSV and Parquet tables written here may have and that no row may use."""

_METADATA_KEY = b"dataflow"
_ROW_GROUP_BYTES = 8 << 20
_BATCH_ROWS = 512


def libraries() -> tuple[Any, Any]:
    """``pyarrow`` and ``pyarrow.parquet``; raises :class:`MissingExtraError` where they are not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "parquet", "a parquet table") from error
    return pyarrow, pyarrow.parquet


@dataclass(slots=True)
class _Column:
    """What is known of a column: the one type of its values (None: no value yet), and how often it is there."""

    kind: str | None = None
    present: int = 0
    nulls: int = 0

    def add(self, value: Any) -> None:
        self.present += 1
        if value is None:
            self.nulls += 1
        elif self.kind != "json":
            kind = _kind(value)
            self.kind = kind if self.kind in (None, kind) else "json"

    def finish(self, rows: int) -> None:
        # Parquet has one kind of nothing. As JSON text, null is a value and the other kind is free for "missing".
        if self.nulls and self.present < rows:
            self.kind = "json"


def _kind(value: Any) -> str:
    match value:
        case bool():
            return "bool"
        case int() if -(2**63) <= value < 2**63:
            return "int"
        case float():
            return "float"
        case str() if is_utf8(value):
            return "text"
        case list() if all(isinstance(item, str) and is_utf8(item) for item in value):
            return "texts"
    return "json"


def _infer_columns(rows: Iterable[Row]) -> tuple[dict[str, _Column], int]:
    columns: dict[str, _Column] = {}
    count = 0
    for row in rows:
        count += 1
        for name, value in row.items():
            columns.setdefault(name, _Column()).add(value)
    for column in columns.values():
        column.finish(count)
    return columns, count


def convert(spool: BinaryIO, target: BinaryIO) -> None:
    """Turn a file of JSON Lines, read twice, into a table."""
    pa, pq = libraries()
    columns, count = _infer_columns(map(loads, spool))
    for name in columns:
        if not is_utf8(name):
            raise InputError("parquet cannot hold a column of this name", field=name)
    types = {
        "bool": pa.bool_(),
        "int": pa.int64(),
        "float": pa.float64(),
        "text": pa.string(),
        "texts": pa.list_(pa.string()),
        "json": pa.string(),
        None: pa.string(),
    }
    fields = [pa.field(name, types[column.kind]) for name, column in columns.items()]
    if not fields:
        # Without a column a Parquet file cannot say how many rows it has.
        fields = [pa.field(MARK, pa.null())]
    notes = {
        "json": [name for name, column in columns.items() if column.kind == "json"],
        "missing": [name for name, column in columns.items() if column.present < count],
    }
    schema = pa.schema(fields, metadata={_METADATA_KEY: orjson.dumps(notes)})
    spool.seek(0)
    with pq.ParquetWriter(target, schema) as writer:
        for rows in _row_groups(spool):
            arrays = [
                pa.array(_json_cells(name, rows) if column.kind == "json" else _cells(name, rows), types[column.kind])
                for name, column in columns.items()
            ]
            writer.write_table(pa.Table.from_arrays(arrays or [pa.nulls(len(rows))], schema=schema))


def _row_groups(spool: BinaryIO) -> Iterator[list[Row]]:
    rows, size = [], 0
    for line in spool:
        rows.append(loads(line))
        size += len(line)
        if size >= _ROW_GROUP_BYTES:
            yield rows
            rows, size = [], 0
    if rows:
        yield rows


def _cells(name: str, rows: list[Row]) -> list[Any]:
    return [row.get(name) for row in rows]


def _json_cells(name: str, rows: list[Row]) -> list[str | None]:
    return [dumps(row[name]).decode() if name in row else None for row in rows]


def read(path: Path) -> Iterator[Row | BadRow]:
    """The rows of a file, a batch at a time."""
    pa, pq = libraries()
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            if len(set(schema.names)) < len(schema.names):
                raise InputError("two columns have the same name", path=path)
            notes = (schema.metadata or {}).get(_METADATA_KEY)
            restore = plain_row if notes is None else _restorer(orjson.loads(notes), schema)
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                for row in batch.to_pylist():
                    try:
                        yield restore(row)
                    except (TypeError, ValueError) as error:
                        yield BadRow(raw=repr(row)[:RAW_LIMIT], error=str(error))
    except (pa.ArrowException, OverflowError, ValueError) as error:
        raise InputError(f"not a readable parquet table: {error}", path=path) from error


def _restorer(notes: dict[str, list[str]], schema: Any) -> Callable[[Row], Row]:
    """Undo what :func:`convert` did, for the columns that are still as it wrote them."""
    encoded = [name for name in notes["json"] if name in schema.names and str(schema.field(name).type) == "string"]
    missing = [MARK, *notes["missing"]]

    def restore(row: Row) -> Row:
        for name in missing:
            if row.get(name) is None:
                row.pop(name, None)
        for name in encoded:
            if row.get(name) is not None:
                row[name] = loads(row[name].encode())
        return row

    return restore


def count(path: Path) -> int:
    """How many rows a file has, from its footer."""
    pa, pq = libraries()
    try:
        with pq.ParquetFile(path) as file:
            return file.metadata.num_rows
    except pa.ArrowException as error:
        raise InputError(f"not a readable parquet table: {error}", path=path) from error
