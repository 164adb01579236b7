"""Every error this package raises on purpose.

DataflowError
├── ConfigError                 an argument, a model name or a pipeline file cannot be used
│   └── MissingExtraError       an optional library is not installed
├── InputError                  a table, a row or a file of the user's cannot be used
│   └── ImageError              bytes that are not one whole, harmless picture
├── StoreError                  an object store cannot be used now, or not at all; also an OSError
├── CacheBusyError              another process writes to this cache folder
├── StepError                   a step's table is missing or changed under the run
├── ServingError                one batch failed; the class says what the engine should do
│   ├── RetryError              worth trying again as it is
│   │   └── WorkerDiedError     the process that held the batch is gone
│   ├── RateLimitError          the service asks to slow down, perhaps for a stated time
│   ├── OutOfMemoryError        the batch did not fit
│   ├── RefusedError            the model or its service declines: final
│   ├── BadRequestError         this request can never work on this serving
│   ├── BadOutputError          the model answered with something that is not an image
│   └── FatalServingError       nothing can work any more (wrong key, broken model): stop the run
└── RunStoppedError             the run ended before its last row; everything finished is kept
    ├── BudgetSpentError
    ├── TooManyFailuresError
    └── RunInterruptedError     Ctrl-C; also a KeyboardInterrupt
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from os import PathLike
from types import MappingProxyType
from typing import Any, ClassVar

_UNSHOWN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""What drives a terminal or turns the order of letters around; words of services and names of files may hold it."""


def harmless(text: str) -> str:
    """The text with what would drive a terminal replaced, on one line."""
    return _UNSHOWN.sub("\ufffd", text).replace("\n", " ")


class DataflowError(Exception):
    """Root of all errors raised on purpose; the text is meant for the user."""


class ConfigError(DataflowError):
    """An argument, a model name or a pipeline file cannot be used."""


class MissingExtraError(ConfigError):
    """An optional library is not installed."""

    def __init__(self, library: str, extra: str, purpose: str) -> None:
        self.library, self.extra, self.purpose = library, extra, purpose
        super().__init__(f"{purpose} needs {library}: pip install 'open-dataflow[{extra}]'")

    def __reduce__(self):
        return type(self), (self.library, self.extra, self.purpose)


class InputError(DataflowError):
    """Something of the user's cannot be used.

    Args:
        message: what is wrong and what to do about it.
        path: the file it is about.
        row: the row in that file, counted from 1.
        field: the column.
    """

    def __init__(
        self,
        message: str,
        *,
        path: str | PathLike[str] | None = None,
        row: int | None = None,
        field: str | None = None,
    ) -> None:
        self.message = message
        self.path = None if path is None else str(path)
        self.row = row
        self.field = field
        super().__init__(message)

    def __str__(self) -> str:
        where = [self.path] if self.path else []
        if self.row is not None:
            where.append(f"row {self.row}")
        if self.field is not None:
            where.append(f"column {self.field!r}")
        text = f"{', '.join(where)}: {self.message}" if where else self.message
        return harmless(text)

    def __reduce__(self):
        return _rebuild_input_error, (type(self), self.message, self.path, self.row, self.field, self.__dict__)


def _rebuild_input_error(cls, message, path, row, field, state):
    error = cls.__new__(cls)
    InputError.__init__(error, message, path=path, row=row, field=field)
    error.__dict__.update(state)
    return error


class ImageError(InputError):
    """Bytes that are not one whole, harmless picture.

    Args:
        message: what is wrong, for people.
        reason: one word for counting: ``missing``, ``unreadable``, ``empty``, ``too_large``, ``not_an_image``,
            ``truncated``, ``animated`` or ``unsupported``.
    """

    def __init__(self, message: str, *, reason: str, path: str | PathLike[str] | None = None) -> None:
        super().__init__(message, path=path)
        self.reason = reason


class StoreError(DataflowError, OSError):
    """An object store cannot be used.

    Args:
        errno: EIO where it may be another time, another number where something has to be set right first.
        message: what is wrong and what to do about it.
        url: the object or the store.
    """

    def __init__(self, errno: int, message: str, url: str) -> None:
        super().__init__(errno, message, url)

    def __str__(self) -> str:
        return harmless(f"{self.filename}: {self.strerror}")


class CacheBusyError(DataflowError):
    """Another process writes to this cache folder."""


class StepError(DataflowError):
    """A step's table is missing, or changed while it was being read."""


class ServingError(DataflowError):
    """One batch, or one request of it, failed.

    Args:
        message: for people.
        reason: one word for counting failures; the class has one of its own.
        usage: what the service counted for the call all the same, as in :class:`dataflow.types.GenerationResult`.
    """

    reason: str = "error"
    usage: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, message: str = "", *, reason: str | None = None, usage: Mapping[str, Any] | None = None) -> None:
        super().__init__(_UNSHOWN.sub("\ufffd", str(message)) or self.reason)
        if reason is not None:
            self.reason = reason
        if usage:
            self.usage = dict(usage)


class RetryError(ServingError):
    """Worth trying again as it is (a connection lost, a 5xx)."""

    reason = "transient"


class WorkerDiedError(RetryError):
    """The process that held the batch is gone (killed, crashed, out of host memory)."""

    reason = "worker_died"


class RateLimitError(ServingError):
    """The service asks to slow down. ``retry_after``: seconds it wants us to wait, if it said so."""

    reason = "rate_limit"

    def __init__(
        self, message: str = "", *, retry_after: float | None = None, usage: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(message, usage=usage)
        self.retry_after = retry_after


class OutOfMemoryError(ServingError):
    """The batch did not fit into the device's memory."""

    reason = "out_of_memory"


class RefusedError(ServingError):
    """The model or its service declines to make this image. Final: it is not asked again."""

    reason = "refused"


class BadRequestError(ServingError):
    """This request can never work on this serving (a parameter it does not take, an unreadable input)."""

    reason = "bad_request"


class BadOutputError(ServingError):
    """The model answered with something that is not an image (NaN, all black, broken bytes)."""

    reason = "bad_output"


class FatalServingError(ServingError):
    """Nothing can work any more (wrong key, quota spent, model does not load). The run stops, all finished kept."""

    reason = "fatal"


class RunStoppedError(DataflowError):
    """The run ended before its last row. Everything finished is kept; running again goes on from there.

    ``summary`` is the :class:`dataflow.types.Summary` of what was done.
    """

    exit_code: ClassVar[int] = 3

    def __init__(self, message: str, summary=None) -> None:
        super().__init__(message)
        self.summary = summary


class BudgetSpentError(RunStoppedError):
    """The budget does not hold another call."""


class TooManyFailuresError(RunStoppedError):
    """More than the allowed fraction of rows failed."""


class RunInterruptedError(RunStoppedError, KeyboardInterrupt):
    """Ctrl-C."""

    exit_code: ClassVar[int] = 130
