"""Table formats: JSON Lines, JSON, CSV, Parquet and pickle, each giving back exactly the rows that were written.

Rows are JSON values under column names (:data:`dataflow.types.Row`), as :mod:`dataflow.utils.exact_json` reads them,
and are never typed by guessing: "0001" stays text, integers and floats keep every digit, a missing key is not null.

CSV and Parquet are narrower than JSON, so tables written here carry a mark that says how to undo what had to be done:

* CSV ends with an empty column ``__dataflow__``. In a file that has it a cell holds text as it is, or JSON where text
  would not read back as itself; an empty cell is a missing key. In a file without it all cells are text, except those
  that begin with ``[`` or ``{`` and are valid JSON.
* Parquet has the key ``dataflow`` in its schema's metadata. Columns whose values all have one plain type have that
  type; the others hold JSON text and are listed there. A file without it is read as its own types say.
"""

from __future__ import annotations

import csv
import hashlib
import io
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import orjson

from dataflow.errors import InputError
from dataflow.types import RAW_LIMIT, BadRow, Row
from dataflow.utils import parquet
from dataflow.utils.exact_json import (
    describe,
    dumps,
    is_utf8,
    loads,
    loads_leniently,
    may_hold_long_integers,
    plain_row,
)
from dataflow.utils.parquet import MARK

TableFormat = Literal["jsonl", "json", "csv", "parquet", "pickle"]

_BLOCK_BYTES = 1 << 16
_COUNT_BLOCK_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"
_JSON_BLANKS = b" \t\r"

_FOREIGN = {
    b"\x1f\x8b": "compressed with gzip; unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it first",
    b"PK\x03\x04": "a zip archive or an Excel workbook; unpack or export it first",
    b"PAR1": "a Parquet table; name it .parquet",
    b"\xff\xfe": "UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "UTF-16 text; save it as UTF-8",
}


class Piece(NamedTuple):
    """Whole lines of a JSON Lines file.

    Attributes:
        start: offset of the first byte.
        end: offset behind the last one.
        first_line: lines before it.
        first_row: rows before it.
        rows: in it; blank lines are none.
        digest: sha256 of its bytes, in hex.
    """

    start: int
    end: int
    first_line: int
    first_row: int
    rows: int
    digest: str


def read_table(path: Path, kind: TableFormat) -> Iterator[Row | BadRow]:
    """The rows of a file in order; constant memory for ``jsonl``, ``csv`` and ``parquet``.

    Pieces that are not rows come as :class:`BadRow`, in their place. Unpickling runs code: the caller must have asked.

    Raises:
        InputError: the file as a whole cannot be read.
        MissingExtraError: ``parquet`` without pyarrow.
    """
    try:
        yield from _READERS[kind](path)
    except OSError as error:
        raise unreadable(path, error) from error


def count_table(path: Path, kind: TableFormat) -> int | None:
    """How many items :func:`read_table` will give, or None where finding out costs as much as reading.

    Raises:
        InputError: the file as a whole cannot be read.
        MissingExtraError: ``parquet`` without pyarrow.
    """
    try:
        return _COUNTERS[kind](path) if kind in _COUNTERS else None
    except OSError as error:
        raise unreadable(path, error) from error


def convert_rows(rows: BinaryIO, kind: TableFormat, target: BinaryIO) -> None:
    """Turn a file of JSON Lines, open for reading, into a table of another format.

    Raises:
        InputError: Parquet cannot hold a column's name.
        MissingExtraError: ``parquet`` without pyarrow.
    """
    _CONVERTERS[kind](rows, target)


def require(kind: TableFormat) -> None:
    """Raise :class:`MissingExtraError` now rather than after hours of work, if ``kind`` needs what is not installed."""
    if kind == "parquet":
        parquet.libraries()


def unreadable(path: Path, error: OSError) -> InputError:
    """The error to raise when the operating system will not let ``path`` be read."""
    return InputError(f"cannot be read: {error.strerror or error}", path=path)


def _refuse_foreign(path: Path, head: bytes) -> None:
    for signature, what in _FOREIGN.items():
        if head.startswith(signature):
            raise InputError(f"this file is {what}", path=path)


def _show(raw: bytes) -> str:
    return raw[: 4 * RAW_LIMIT].decode("utf-8", "replace")[:RAW_LIMIT]


# JSON Lines ----------------------------------------------------------------------------------------------------------


def read_lines(path: Path, piece: Piece) -> Iterator[Row | BadRow]:
    """The rows of a piece of a JSON Lines file, as :func:`read_table` gives those of all of it.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        yield from _read_jsonl(path, piece)
    except OSError as error:
        raise unreadable(path, error) from error


def cut_lines(path: Path, lines: int) -> list[Piece]:
    """A JSON Lines file as pieces of ``lines`` lines; the last one may have fewer. An empty file has none.

    Raises:
        InputError: the file cannot be read.
    """
    pieces: list[Piece] = []
    start = offset = first_row = 0
    left, rows, digest = lines, _LineCounter(), hashlib.sha256()

    def end_piece() -> None:
        nonlocal start, first_row, left, rows, digest
        number = len(pieces)
        pieces.append(Piece(start, offset, number * lines, first_row, rows.count, digest.hexdigest()))
        start, first_row = offset, first_row + rows.count
        left, rows, digest = lines, _LineCounter(), hashlib.sha256()

    try:
        with path.open("rb") as file:
            _refuse_foreign(path, file.peek(4))
            while block := file.read(_COUNT_BLOCK_BYTES):
                while block:
                    ends = block.count(b"\n")
                    size = len(block) if ends < left else len(b"\n".join(block.split(b"\n", left)[:left])) + 1
                    chunk, block = block[:size], block[size:]
                    rows.feed(chunk)
                    digest.update(chunk)
                    offset += size
                    left -= min(ends, left)
                    if not left:
                        end_piece()
            if offset > start:
                end_piece()
    except OSError as error:
        raise unreadable(path, error) from error
    return pieces


def _read_jsonl(path: Path, piece: Piece | None = None) -> Iterator[Row | BadRow]:
    with path.open("rb") as file:
        _refuse_foreign(path, file.peek(4))
        number = 0
        left = sys.maxsize
        if piece is not None:
            file.seek(piece.start)
            number, left = piece.first_line, piece.end - piece.start
        while left > 0 and (block := file.read(min(left, _BLOCK_BYTES))):
            if len(block) < left:
                block += file.readline()
            left -= len(block)
            # Looking for long integers once per block instead of once per line keeps this near the speed of orjson.
            parse = loads if may_hold_long_integers(block) else orjson.loads
            lines = block.split(b"\n")
            if not lines[-1]:
                lines.pop()
            for line in lines:
                number += 1
                try:
                    row = parse(line)
                except ValueError:
                    if not line.translate(None, _JSON_BLANKS):
                        continue
                    row = _parse_odd_line(line, number)
                if type(row) is dict or type(row) is BadRow:
                    yield row
                else:
                    yield BadRow(raw=_show(line), error=f"line {number}: {_not_an_object(row)}")


def _parse_odd_line(line: bytes, number: int) -> Any:
    try:
        return loads_leniently(line)
    except ValueError as error:
        return BadRow(raw=_show(line), error=describe(error, number))


def _not_an_object(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    hint = "; a file that is one JSON array must be named .json" if isinstance(value, list) else ""
    return f"expected a JSON object, found {names.get(type(value), 'a number')}{hint}"


class _LineCounter:
    """Counts lines that hold more than blanks, as :func:`_read_jsonl` counts them."""

    def __init__(self) -> None:
        self._ended, self._open = 0, False

    def feed(self, block: bytes) -> None:
        text = block.translate(None, _JSON_BLANKS)
        while b"\n\n" in text:
            text = text.replace(b"\n\n", b"\n")
        if text:
            self._ended += text.count(b"\n") - (text.startswith(b"\n") and not self._open)
            self._open = not text.endswith(b"\n")

    @property
    def count(self) -> int:
        return self._ended + self._open


def _count_jsonl(path: Path) -> int:
    counter = _LineCounter()
    with path.open("rb") as file:
        _refuse_foreign(path, file.peek(4))
        for block in iter(lambda: file.read(_COUNT_BLOCK_BYTES), b""):
            counter.feed(block)
    return counter.count


# JSON ----------------------------------------------------------------------------------------------------------------


def _read_json(path: Path) -> Iterator[Row | BadRow]:
    """An array of objects, one object, or JSON Lines under the wrong name. Held in memory as a whole."""
    data = path.read_bytes()
    _refuse_foreign(path, data[:4])
    data = data.removeprefix(_BOM)
    if not data.strip():
        raise InputError("the file is empty; expected a JSON array of objects", path=path)
    try:
        table = loads(data)
    except ValueError as error:
        if _begins_like_json_lines(data):
            yield from _read_jsonl(path)
            return
        raise InputError(f"not valid JSON: {describe(error)}", path=path) from error
    if isinstance(table, dict):
        table = [table]
    if not isinstance(table, list):
        raise InputError("expected a JSON array of objects", path=path)
    for number, row in enumerate(table, 1):
        if isinstance(row, dict):
            yield row
        else:
            yield BadRow(raw=_show(dumps(row)), error=f"element {number}: expected an object")


def _begins_like_json_lines(data: bytes) -> bool:
    try:
        return isinstance(loads(data.lstrip().partition(b"\n")[0]), dict)
    except ValueError:
        return False


def _convert_to_json(spool: BinaryIO, target: BinaryIO) -> None:
    separator = b"[\n"
    for line in spool:
        target.write(separator)
        target.write(line.rstrip(b"\n"))
        separator = b",\n"
    target.write(b"[]\n" if separator == b"[\n" else b"\n]\n")


# CSV -----------------------------------------------------------------------------------------------------------------

_MISSING = object()
_JSON_WORDS = {"null": None, "true": True, "false": False}


class _CsvLines:
    """Decoded lines of a file for :mod:`csv`, and what the record under way was made of."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.number = 0
        self.begin_record()

    def begin_record(self) -> None:
        self.first = self.number + 1
        self.lines: list[bytes] = []
        self.decode_error: UnicodeDecodeError | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._file.readline()
        if not line:
            raise StopIteration
        self.lines.append(line)
        self.number += 1
        try:
            return line.decode("utf-8-sig" if self.number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            self.decode_error = error
            return line.decode("utf-8", "replace")

    def bad(self, reason: str) -> BadRow:
        return BadRow(raw=_show(b"".join(self.lines)), error=reason)


def _csv_records(path: Path) -> Iterator[tuple[list[str], _CsvLines] | BadRow]:
    """Cells of every record that is not blank, the header included, with the lines they came from."""
    csv.field_size_limit(max(csv.field_size_limit(), 2**31 - 1))
    with path.open("rb") as file:
        _refuse_foreign(path, file.peek(4))
        lines = _CsvLines(file)
        # Not strict, a quote that is never closed swallows the rest of the table without a word.
        reader = csv.reader(lines, strict=True)
        while True:
            lines.begin_record()
            try:
                record = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                hint = " (a quote is never closed)" if "unexpected end" in str(error) else ""
                yield lines.bad(f"line {lines.first}: {error}{hint}")
                continue
            if lines.decode_error:
                yield lines.bad(describe(lines.decode_error, lines.number))
            elif record:
                yield record, lines


def _csv_header(path: Path, records: Iterator[tuple[list[str], _CsvLines] | BadRow]) -> list[str]:
    header = next(records, None)
    if header is None:
        raise InputError("the file is empty; its first line must name the columns", path=path)
    if isinstance(header, BadRow):
        raise InputError(f"the header cannot be read: {header.error}", path=path)
    names = header[0]
    for name in names:
        if names.count(name) > 1:
            raise InputError("the header names this column more than once", path=path, field=name)
    return names


def _read_csv(path: Path) -> Iterator[Row | BadRow]:
    records = _csv_records(path)
    names = _csv_header(path, records)
    ours = MARK in names
    decode = decode_cell if ours else _decode_foreign_cell
    if ours:
        names = [_decode_name(name) for name in names]
    for record in records:
        if isinstance(record, BadRow):
            yield record
            continue
        cells, lines = record
        if len(cells) != len(names):
            yield lines.bad(f"line {lines.first}: {len(cells)} cells under a header of {len(names)} columns")
            continue
        row = {name: decode(cell) for name, cell in zip(names, cells, strict=True) if name != MARK}
        yield {name: value for name, value in row.items() if value is not _MISSING} if ours else row


def _decode_name(cell: str) -> str:
    name = decode_cell(cell)
    return name if isinstance(name, str) else cell


def _count_csv(path: Path) -> int:
    records = _csv_records(path)
    _csv_header(path, records)
    return sum(1 for _ in records)


def _decode_foreign_cell(cell: str) -> Any:
    if cell[:1] not in ("[", "{"):
        return cell
    try:
        return loads(cell.encode())
    except ValueError:
        return cell


def decode_cell(cell: str) -> Any:
    """The value in a cell that :func:`encode_cell` made; ``cell`` itself where it is text that stands for itself."""
    if not cell:
        return _MISSING
    if cell in _JSON_WORDS:
        return _JSON_WORDS[cell]
    if cell[0] not in '"[{-0123456789':
        return cell
    try:
        return loads(cell.encode())
    except ValueError:
        return cell


def encode_cell(value: Any) -> str:
    """A cell that :func:`decode_cell` turns into ``value``: text as it is if it reads back as itself, else JSON."""
    if isinstance(value, str) and decode_cell(value) is value and is_utf8(value):
        return value
    return dumps(value).decode()


def _convert_to_csv(spool: BinaryIO, target: BinaryIO) -> None:
    names = list(dict.fromkeys(name for line in spool for name in loads(line)))
    spool.seek(0)
    text = io.TextIOWrapper(target, encoding="utf-8", newline="")
    try:
        writer = csv.writer(text)
        writer.writerow([*map(encode_cell, names), MARK])
        for line in spool:
            row = loads(line)
            writer.writerow([*(encode_cell(row[name]) if name in row else "" for name in names), ""])
    finally:
        text.detach()


# Pickle --------------------------------------------------------------------------------------------------------------

_UNPICKLING_ERRORS = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    TypeError,
    ValueError,
)


def _read_pickle(path: Path) -> Iterator[Row | BadRow]:
    """A list of dicts or a DataFrame. Held in memory as a whole."""
    with path.open("rb") as file:
        try:
            table = pickle.load(file)  # noqa: S301 - the user allowed it by name
        except _UNPICKLING_ERRORS as error:
            raise InputError(f"not a readable pickle: {type(error).__name__}: {error}", path=path) from error
    rows = frame_rows(table) if is_frame(table) else table
    if not isinstance(rows, Iterable):
        raise InputError(f"expected a list of dicts or a DataFrame, found {type(table).__name__}", path=path)
    for number, row in enumerate(rows, 1):
        try:
            if not isinstance(row, dict):
                raise TypeError(f"expected a dict, found {type(row).__name__}")
            yield plain_row(row)
        except TypeError as error:
            yield BadRow(raw=repr(row)[:RAW_LIMIT], error=f"element {number}: {error}")


def _convert_to_pickle(spool: BinaryIO, target: BinaryIO) -> None:
    pickle.dump([loads(line) for line in spool], target, protocol=pickle.HIGHEST_PROTOCOL)


# DataFrames ----------------------------------------------------------------------------------------------------------


def is_frame(table: object) -> bool:
    """Whether this is a pandas DataFrame, found out without importing pandas."""
    return any(base.__name__ == "DataFrame" and base.__module__.startswith("pandas") for base in type(table).__mro__)


def frame_rows(frame: Any) -> Iterator[Row]:
    """The rows of a DataFrame; what pandas calls missing (NaN, NaT, NA) is None.

    Raises:
        InputError: two columns have the same name.
    """
    if not frame.columns.is_unique:
        raise InputError(f"the DataFrame has several columns named {frame.columns[frame.columns.duplicated()][0]!r}")
    for start in range(0, len(frame), 10_000):
        part = frame.iloc[start : start + 10_000].astype(object)
        yield from part.where(part.notna(), None).to_dict("records")


_READERS: dict[TableFormat, Callable[[Path], Iterator[Row | BadRow]]] = {
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": _read_csv,
    "parquet": parquet.read,
    "pickle": _read_pickle,
}
_COUNTERS: dict[TableFormat, Callable[[Path], int]] = {
    "jsonl": _count_jsonl,
    "csv": _count_csv,
    "parquet": parquet.count,
}
_CONVERTERS: dict[TableFormat, Callable[[BinaryIO, BinaryIO], None]] = {
    "json": _convert_to_json,
    "csv": _convert_to_csv,
    "parquet": parquet.convert,
    "pickle": _convert_to_pickle,
}
