"""Step files: where an operator's rows come from and where they go.

A storage walks through a folder of tables. The operator at step 0 reads the user's file and writes ``…_step1``, the
next one reads that and writes ``…_step2``, and so on. Rows stream both ways; a table appears whole or not at all. No
format changes the rows; :mod:`dataflow.utils.tables` says how each manages that.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import uuid
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args, overload

from dataflow.errors import ConfigError, InputError, StepError
from dataflow.types import BadRow, Row
from dataflow.utils.exact_json import dumps_row
from dataflow.utils.tables import (
    MARK,
    Piece,
    TableFormat,
    convert_rows,
    count_table,
    cut_lines,
    frame_rows,
    is_frame,
    read_table,
    require,
    unreadable,
)

if TYPE_CHECKING:
    import pandas

_SUFFIXES: dict[str, TableFormat] = {
    ".jsonl": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".pkl": "pickle",
    ".pickle": "pickle",
}
_PICKLE_RUNS_CODE = "unpickling runs whatever code the file holds, so it must be asked for: allow_pickle=True"
_MANY_ROWS = 200_000
_WRITE_BUFFER_BYTES = 1 << 20


class FileStorage:
    """The tables of one pipeline, in one folder.

    The constructor only stores; a storage pickles. All paths are used as given, so relative ones follow the working
    directory.

    Args:
        first_entry_file_name: the user's table: ``.jsonl``, ``.json``, ``.csv``, ``.parquet``, ``.pkl`` or ``.pickle``.
        cache_path: folder of the step files; made when the first one is written.
        file_name_prefix: step files are ``{file_name_prefix}_step{N}.{cache_type}``.
        cache_type: format of the step files: ``jsonl``, ``json``, ``csv``, ``parquet`` or ``pickle``.
        allow_pickle: read and write pickles. Reading a pickle runs whatever code it holds.

    Attributes:
        operator_step: number of the step under way, counted from 0; -1 before the first.

    Raises:
        ConfigError: no such ``cache_type``, or ``pickle`` without ``allow_pickle``.
    """

    def __init__(
        self,
        first_entry_file_name: str,
        cache_path: str = "./cache",
        file_name_prefix: str = "dataflow_cache_step",
        cache_type: TableFormat = "jsonl",
        allow_pickle: bool = False,
    ) -> None:
        if cache_type not in get_args(TableFormat):
            raise ConfigError(f"cache_type is {cache_type!r}; choose one of {', '.join(get_args(TableFormat))}")
        if cache_type == "pickle" and not allow_pickle:
            raise ConfigError(f"cache_type is 'pickle'; {_PICKLE_RUNS_CODE}")
        self.first_entry_file_name = os.fspath(first_entry_file_name)
        self.cache_path = os.fspath(cache_path)
        self.file_name_prefix = file_name_prefix
        self.cache_type: TableFormat = cache_type
        self.allow_pickle = allow_pickle
        self.operator_step = -1

    def __repr__(self) -> str:
        return (
            f"FileStorage({self.first_entry_file_name!r}, cache_path={self.cache_path!r}, "
            f"file_name_prefix={self.file_name_prefix!r}, cache_type={self.cache_type!r}, step={self.operator_step})"
        )

    # Steps

    def step(self) -> FileStorage:
        """Go on to the next operator's step; returns this storage."""
        self.operator_step += 1
        return self

    def reset(self) -> FileStorage:
        """Go back to before the first step; returns this storage."""
        self.operator_step = -1
        return self

    @property
    def input_path(self) -> Path:
        """The table this step reads. Raises :class:`StepError` before the first step."""
        if self._current_step == 0:
            return Path(self.first_entry_file_name).expanduser()
        return self._step_path(self._current_step)

    @property
    def output_path(self) -> Path:
        """The table this step writes. Raises :class:`StepError` before the first step."""
        return self._step_path(self._current_step + 1)

    @property
    def step_name(self) -> str:
        """Name of the table this step writes, without suffix. Raises :class:`StepError` before the first step."""
        return f"{self.file_name_prefix}_step{self._current_step + 1}"

    @property
    def dropped_path(self) -> Path:
        """JSON Lines beside the step's table, for rows that it takes out. See :attr:`step_name`."""
        return Path(self.cache_path, f"{self.step_name}.dropped.jsonl")

    @property
    def _current_step(self) -> int:
        if self.operator_step < 0:
            raise StepError("no step is under way: call storage.step() first, as in run(storage=storage.step(), …)")
        return self.operator_step

    def _step_path(self, number: int) -> Path:
        return Path(self.cache_path, f"{self.file_name_prefix}_step{number}.{self.cache_type}")

    # Reading

    def iter_rows(self) -> Iterator[Row | BadRow]:
        """The rows of this step's input, in order, with a :class:`~dataflow.types.BadRow` for each piece that is none.

        JSON Lines, CSV and Parquet are read in constant memory; blank lines do not count.

        Raises:
            StepError: before the first step.
            ConfigError: a pickle without ``allow_pickle``, or Parquet without pyarrow.
            InputError: the file is missing, not readable, of an unknown format, or broken as a whole. What can be
                seen without reading rows is raised by the call itself, the rest while iterating.
        """
        return read_table(self.input_path, self._checked_input_format())

    def count_rows(self) -> int | None:
        """How many items :meth:`iter_rows` gives, or None where counting costs as much as reading (json, pickle).

        Raises:
            StepError, ConfigError, InputError: as :meth:`iter_rows`.
        """
        return count_table(self.input_path, self._checked_input_format())

    def pieces(self, lines: int) -> list[Piece]:
        """This step's input as pieces of so many lines; none where it is not JSON Lines, which alone can be cut.

        Raises:
            StepError, ConfigError, InputError: as :meth:`iter_rows`.
        """
        return cut_lines(self.input_path, lines) if self._checked_input_format() == "jsonl" else []

    @property
    def rows_before(self) -> int:
        """Rows of the table before the first that :meth:`iter_rows` gives."""
        return 0

    def input_signature(self) -> dict[str, int]:
        """``size`` and ``mtime_ns`` of this step's input; they differ if the file was changed.

        Raises:
            StepError: before the first step.
            InputError: the file is missing, not a file, or not accessible.
        """
        path = self.input_path
        try:
            status = path.stat()
        except FileNotFoundError as error:
            advice = "the step before has not finished; run it first" if self.operator_step else "no such file"
            raise InputError(advice, path=path) from error
        except OSError as error:
            raise unreadable(path, error) from error
        except ValueError as error:
            raise InputError(f"not a file name: {error}", path=repr(str(path))) from error
        if not stat.S_ISREG(status.st_mode):
            raise InputError("is a folder or a device; expected a file", path=path)
        return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}

    def content_signature(self) -> object:
        """JSON that differs if the rows that :meth:`iter_rows` gives were changed.

        Raises:
            StepError, InputError: as :meth:`input_signature`.
        """
        return self.input_signature()

    def _checked_input_format(self) -> TableFormat:
        kind = self.cache_type if self._current_step else self._first_entry_format()
        require(kind)
        self.input_signature()
        return kind

    def _first_entry_format(self) -> TableFormat:
        path = self.input_path
        kind = _SUFFIXES.get(path.suffix.lower())
        if kind is None:
            raise InputError(f"unknown table format {path.suffix!r}; expected one of {', '.join(_SUFFIXES)}", path=path)
        if kind == "pickle" and not self.allow_pickle:
            raise ConfigError(f"{path} is a pickle; {_PICKLE_RUNS_CODE}")
        return kind

    @overload
    def read(self, output_type: Literal["dataframe"] = "dataframe") -> pandas.DataFrame: ...

    @overload
    def read(self, output_type: Literal["dict"]) -> list[Row]: ...

    def read(self, output_type: Literal["dataframe", "dict"] = "dataframe") -> pandas.DataFrame | list[Row]:
        """This step's whole input in memory, as a DataFrame or a list of dicts; :meth:`iter_rows` streams it.

        A DataFrame's columns hold the values as they are: a column of nothing but int, float or bool has that type,
        all others are of type ``object``. Missing keys are NaN.

        Raises:
            StepError, ConfigError, InputError: as :meth:`iter_rows`; also an InputError for a row that is broken, and
                a ConfigError for another ``output_type``.
        """
        if output_type not in ("dataframe", "dict"):
            raise ConfigError(f"output_type is {output_type!r}; choose 'dataframe' or 'dict'")
        rows: list[Row] = []
        for number, row in enumerate(self.iter_rows(), 1):
            if isinstance(row, BadRow):
                raise InputError(row.error, path=self.input_path, row=number)
            rows.append(row)
            if number == _MANY_ROWS + 1 and output_type == "dataframe":
                warnings.warn(
                    f"{self.input_path} has more than {_MANY_ROWS:,} rows; a DataFrame takes about eleven times the "
                    "memory of the file. storage.iter_rows() and storage.open_writer() stream it",
                    stacklevel=2,
                )
        return rows if output_type == "dict" else _frame(rows)

    def resolve(self, path: str) -> Path:
        """The absolute path of a file that a row names: tried from the working directory, then from the user's table.

        Returns:
            The first that exists; the one in the working directory if none does.
        """
        here = Path.cwd() / path
        if _exists(here):
            return here
        beside = Path(self.first_entry_file_name).expanduser().absolute().parent / path
        return beside if _exists(beside) else here

    # Writing

    def open_writer(self) -> TableWriter:
        """A context manager that writes this step's table row by row.

        Raises:
            StepError: before the first step.
            ConfigError: the step's table is the user's own file.
        """
        path = self.output_path
        if path.absolute() == Path(self.first_entry_file_name).expanduser().absolute():
            raise ConfigError(f"this step would overwrite {path}, its own input; choose another cache_path")
        return TableWriter(path, self.cache_type)

    def write(self, data: Iterable[Row] | pandas.DataFrame) -> str:
        """Write this step's table at once; returns its path.

        Args:
            data: dicts, or a DataFrame, whose missing values (NaN, NaT, NA) become null.

        Raises:
            StepError, ConfigError: as :meth:`open_writer`; also a StepError if the file cannot be written.
            InputError: something in ``data`` is not a dict, or has no place in JSON.
        """
        if isinstance(data, str | bytes | dict) or not isinstance(data, Iterable):
            raise InputError(f"write() takes a list of dicts or a DataFrame, not {type(data).__name__}")
        with self.open_writer() as writer:
            for row in frame_rows(data) if is_frame(data) else data:
                writer.write(row)
        return str(self.output_path)


class TableWriter:
    """Writes one table, row by row, in constant memory (``pickle`` apart); the file appears whole at the end, or not.

    A context manager. Rows go to a temporary file beside ``path``; when the block ends well it is made durable and
    takes the name, and whatever stood there before is whole until then. When the block raises, it is removed. What a
    killed run left behind is swept when the next writer of the same table opens: a table has one writer at a time.

    Args:
        path: the file to write; its folder is made if need be.
        kind: its format.

    Attributes:
        rows: rows written so far.
    """

    def __init__(self, path: Path, kind: TableFormat) -> None:
        self.path = path
        self.kind: TableFormat = kind
        self.rows = 0
        self._error: OSError | None = None
        temporary = f".{path.name}.{uuid.uuid4().hex[:12]}"
        self._rows_path = path.with_name(f"{temporary}.rows.tmp")
        self._table_path = path.with_name(f"{temporary}.table.tmp")

    def __enter__(self) -> TableWriter:
        """Raise :class:`StepError` if the folder cannot be written, :class:`MissingExtraError` without pyarrow."""
        require(self.kind)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _sweep(self.path)
            self._file = self._rows_path.open("x+b", buffering=_WRITE_BUFFER_BYTES)
        except OSError as error:
            raise _unwritable(self.path, error) from error
        return self

    def write(self, row: Row) -> None:
        """Add one row.

        Raises:
            InputError: it is not a dict, or something in it has no place in JSON. The table can go on without it.
            StepError: the disk is full or failing. The table cannot be finished.
        """
        if not isinstance(row, dict):
            raise self._refusal(f"expected a dict, found {type(row).__name__}")
        if MARK in row:
            raise self._refusal("this column name is reserved", MARK)
        try:
            line = dumps_row(row)
        except TypeError as error:
            raise self._refusal(*error.args) from error
        try:
            self._file.write(line)
        except OSError as error:
            self._error = error
            raise _unwritable(self.path, error) from error
        self.rows += 1

    def append(self, path: Path) -> None:
        """Add the lines of a file that another writer of JSON Lines wrote.

        Raises:
            StepError: the file cannot be read, or the disk is full or failing. The table cannot be finished.
        """
        try:
            with path.open("rb") as file:
                shutil.copyfileobj(file, self._file, _WRITE_BUFFER_BYTES)
        except OSError as error:
            self._error = error
            raise _unwritable(self.path, error) from error

    def _refusal(self, message: str, column: object = None) -> InputError:
        field = column if isinstance(column, str) else None
        return InputError(message, path=self.path, row=self.rows + 1, field=field)

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        """Raise :class:`StepError` if the table cannot be finished."""
        try:
            if exc_type is None:
                self._publish()
        except OSError as error:
            raise _unwritable(self.path, error) from error
        finally:
            self._discard()

    def _publish(self) -> None:
        if self._error is not None:
            raise self._error
        if self.kind == "jsonl":
            self._file.flush()
            os.fsync(self._file.fileno())
            ready = self._rows_path
        else:
            self._convert()
            ready = self._table_path
        self._file.close()
        ready.replace(self.path)
        _sync_folder(self.path.parent)

    def _convert(self) -> None:
        self._file.seek(0)
        with self._table_path.open("xb") as table:
            try:
                convert_rows(self._file, self.kind, table)
            except InputError as error:
                raise InputError(error.message, path=self.path, field=error.field) from error
            table.flush()
            os.fsync(table.fileno())

    def _discard(self) -> None:
        # Closing writes what is still buffered, which fails again on a full disk.
        with contextlib.suppress(OSError):
            self._file.close()
        for leftover in (self._rows_path, self._table_path):
            with contextlib.suppress(OSError):
                leftover.unlink()


def _frame(rows: list[Row]) -> pandas.DataFrame:
    import pandas

    # pandas would guess otherwise: 1 and None together become 1.0 and NaN, None among texts becomes NaN.
    frame = pandas.DataFrame(rows, dtype=object)
    for name in frame.columns:
        if set(map(type, frame[name])) in ({int}, {float}, {bool}):
            frame[name] = frame[name].infer_objects()
    return frame


def _exists(path: Path) -> bool:
    """Unlike Path.exists, False for names that no file system takes (too long, NUL)."""
    try:
        path.stat()
    except (OSError, ValueError):
        return False
    return True


def _sweep(path: Path) -> None:
    with os.scandir(path.parent) as entries:
        for entry in entries:
            if entry.name.startswith(f".{path.name}.") and entry.name.endswith(".tmp"):
                Path(entry.path).unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable, where folders can be opened at all (not on Windows)."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _unwritable(path: Path, error: OSError) -> StepError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    what = "the disk is full; free some space and run again" if full else error.strerror or str(error)
    return StepError(f"{path} cannot be written: {what}. What stood there before is unchanged")
