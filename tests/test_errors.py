"""Errors are for people and travel between processes."""

from __future__ import annotations

import inspect
import pickle

import pytest

from dataflow import errors
from dataflow.errors import (
    DataflowError,
    ImageError,
    InputError,
    MissingExtraError,
    RateLimitError,
    RefusedError,
    RunInterruptedError,
    RunStoppedError,
    ServingError,
    TooManyFailuresError,
)
from dataflow.types import Summary

ALL = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, Exception)]
EXAMPLES = [
    InputError("is odd", path="t.jsonl", row=3, field="prompt"),
    ImageError("is cut", reason="truncated", path="a.png"),
    MissingExtraError("pyarrow", "parquet", "Parquet"),
    RateLimitError("slower", retry_after=2.5),
    ServingError("odd", reason="crash"),
    RunStoppedError("stopped", Summary(rows=3, done=1, pending=2)),
    RunInterruptedError("interrupted"),
]


def back(error):
    return pickle.loads(pickle.dumps(error))


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_they_come_back_from_another_process_whole(error):
    again = back(error)
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert again.__dict__ == error.__dict__
    assert back(again).__dict__ == error.__dict__


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_the_tree_at_the_top_of_the_file_is_the_tree_there_is(kind):
    assert issubclass(kind, DataflowError)
    assert kind.__name__ in errors.__doc__
    assert kind.__doc__


def test_where_it_is_comes_first():
    assert str(InputError("is odd")) == "is odd"
    assert str(InputError("is odd", path="t.jsonl", row=3, field="prompt")) == "t.jsonl, row 3, column 'prompt': is odd"
    assert str(InputError("is odd", row=0)) == "row 0: is odd"


def test_a_serving_error_without_words_says_its_reason():
    assert (str(RefusedError()), RefusedError().reason) == ("refused", "refused")
    assert ServingError("x", reason="crash").reason == "crash"
    assert ServingError.reason == "error"


def test_a_missing_library_says_how_to_get_it():
    assert str(EXAMPLES[2]) == "Parquet needs pyarrow: pip install 'open-dataflow[parquet]'"


def test_stops_have_exit_codes_for_scripts():
    assert (TooManyFailuresError("x").exit_code, RunInterruptedError("x").exit_code) == (3, 130)
    assert issubclass(RunInterruptedError, KeyboardInterrupt)
