"""Scored tables as arrays, row by row, and which rows of several runs belong together."""

from __future__ import annotations

import json
import math
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from hashlib import blake2b
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dataflow.errors import InputError
from dataflow.scores import Score, generation_failure, holds_text_only, plain_prompt, read_rows, scores_at
from dataflow.types import BadRow, Row

FloatArray = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int32]
Indices = npt.NDArray[np.intp]

ID_COLUMN = "prompt_id"
PROMPT_COLUMNS = ("conversations", "prompt")

_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class Column:
    """One metric of one run, by row.

    Attributes:
        total: shape (rows,), float64, the sum of the row's scores.
        scored: shape (rows,), how many scores that is.
        missing: shape (statuses, rows), how many pictures have no score for each of ``statuses``.
        statuses: why.
        lowest: of all single scores; infinity where there is none.
        highest: likewise.
    """

    total: FloatArray
    scored: Counts
    missing: Counts
    statuses: tuple[str, ...]
    lowest: float
    highest: float


@dataclass(frozen=True, slots=True)
class Run:
    """A table's numbers.

    Attributes:
        name: what to call it.
        source: the table.
        rows: rows that can be matched.
        unmatchable: rows that are none, or lack what they are matched by.
        keys: shape (rows,), digests.
        columns: by metric.
    """

    name: str
    source: str
    rows: int
    unmatchable: int
    keys: npt.NDArray[np.bytes_]
    columns: Mapping[str, Column]


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Rows of a run that are not compared: ``not_in_all`` runs, ``ambiguous`` (as many as another run has not, under
    one prompt), or ``unmatchable``."""

    not_in_all: int
    ambiguous: int
    unmatchable: int

    def __str__(self) -> str:
        """For people; nothing where nothing is left out."""
        parts = [
            (self.not_in_all, "not in every run"),
            (self.ambiguous, "under a prompt that another run has more or less often"),
            (self.unmatchable, "without what rows are matched by"),
        ]
        return ", ".join(f"{count:,} {why}" for count, why in parts if count)


def read_run(name: str, table: str | Path, metrics: Sequence[str], match: Sequence[str]) -> Run:
    """One pass over a table; memory grows by some bytes per row and metric.

    Raises:
        InputError: the table cannot be read.
    """
    from_text = holds_text_only(table)
    keys = bytearray()
    readers = [_ColumnReader() for _ in metrics]
    short: list[tuple[int, str]] = []
    rows = unmatchable = 0
    for row in read_rows(table):
        key = None if isinstance(row, BadRow) else _key(row, match)
        if key is None or isinstance(row, BadRow):
            unmatchable += 1
            continue
        keys += key
        for reader, metric in zip(readers, metrics, strict=True):
            reader.add(rows, scores_at(row, metric, from_text=from_text))
        failure = generation_failure(row)
        if failure:
            short.append((rows, failure))
        rows += 1
    digests = np.array([], dtype=f"S{_DIGEST_BYTES}")
    if rows:
        digests = np.frombuffer(bytes(keys), dtype=digests.dtype)
    columns = {metric: reader.column(rows, short) for metric, reader in zip(metrics, readers, strict=True)}
    return Run(name, str(table), rows, unmatchable, digests, columns)


class _ColumnReader:
    """Numbers of one metric as they come; most rows have a score, so that those without are kept apart."""

    def __init__(self) -> None:
        self._total = array("d")
        self._scored = array("i")
        self._missing: dict[str, Counter[int]] = {}
        self._lowest, self._highest = math.inf, -math.inf

    def add(self, row: int, scores: Sequence[Score]) -> None:
        values = [score.value for score in scores if score.value is not None]
        self._total.append(math.fsum(values))
        self._scored.append(len(values))
        for value in values:
            self._lowest, self._highest = min(self._lowest, value), max(self._highest, value)
        for score in scores:
            if score.value is None:
                self._missing.setdefault(score.status, Counter())[row] += 1

    def column(self, rows: int, short: Sequence[tuple[int, str]]) -> Column:
        scored = np.frombuffer(self._scored, dtype=np.int32) if rows else np.zeros(0, dtype=np.int32)
        counts = {status: _dense(found, rows) for status, found in self._missing.items()}
        pictures = sum(counts.values(), start=scored)
        for row, status in short:
            # A row names only the pictures that were made; how many were asked for, the run's other rows tell.
            lacking = int(pictures.max()) - int(pictures[row])
            if lacking:
                counts.setdefault(status, np.zeros(rows, dtype=np.int32))[row] += lacking
        return Column(
            total=np.frombuffer(self._total, dtype=np.float64) if rows else np.zeros(0),
            scored=scored,
            missing=np.stack(list(counts.values())) if counts else np.zeros((0, rows), dtype=np.int32),
            statuses=tuple(counts),
            lowest=self._lowest,
            highest=self._highest,
        )


def _dense(found: Counter[int], rows: int) -> Counts:
    counts = np.zeros(rows, dtype=np.int32)
    counts[list(found)] = list(found.values())
    return counts


def _key(row: Row, match: Sequence[str]) -> bytes | None:
    """A digest of what a row is matched by; None where it lacks that."""
    parts = []
    for column in match:
        value = row.get(column)
        prompt = plain_prompt(row, column) if isinstance(value, list | dict) else None
        if value is None or value in ("", [], {}):
            return None
        parts.append(value if prompt is None else prompt if len(prompt) > 1 else prompt[0])
    return blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=_DIGEST_BYTES).digest()


def first_row(table: str | Path) -> Row:
    """A table's first row.

    Raises:
        InputError: it has none, or cannot be read.
    """
    for row in read_rows(table):
        if not isinstance(row, BadRow):
            return row
    raise InputError("the table has no rows", path=table)


def match_columns(tables: Mapping[str, str | Path]) -> tuple[str, ...]:
    """What rows are matched by where nobody says it.

    Raises:
        InputError: the tables share no such column.
    """
    first = [first_row(table) for table in tables.values()]
    for column in (ID_COLUMN, *PROMPT_COLUMNS):
        if all(row.get(column) not in (None, "") for row in first):
            return (column,)
    raise InputError(
        f"rows are matched by {ID_COLUMN}, {' or '.join(PROMPT_COLUMNS)}, and no such column is in all tables:"
        " name one that is"
    )


# Matching ----------------------------------------------------------------------------------------------------------


def matched(runs: Sequence[Run]) -> tuple[list[Indices], dict[str, LeftOut], int]:
    """The rows that are compared.

    Returns:
        For each run the numbers of its rows, aligned with each other, in the order of the first run; what is left out;
        how many of them share their key with another.

    Raises:
        InputError: the runs have nothing in common.
    """
    orders = [np.argsort(run.keys, kind="stable") for run in runs]
    uniques = [np.unique(run.keys, return_counts=True) for run in runs]
    common = reduce(np.intersect1d, [keys for keys, _ in uniques])
    counts = np.stack([found[np.searchsorted(keys, common)] for keys, found in uniques])
    alike = (counts == counts[0]).all(axis=0)
    places: list[Indices] = []
    left_out: dict[str, LeftOut] = {}
    for run, order, (keys, found), of_run in zip(runs, orders, uniques, counts, strict=True):
        chosen = np.isin(keys, common[alike], assume_unique=True)
        rows = order[np.repeat(chosen, found)]
        places.append(rows)
        ambiguous = int(of_run[~alike].sum())
        left_out[run.name] = LeftOut(run.rows - len(rows) - ambiguous, ambiguous, run.unmatchable)
    if not len(places[0]):
        raise InputError(
            "the runs have no prompt in common: "
            + "; ".join(f"of {name} {parts or 'no row'} is left out" for name, parts in left_out.items())
            + ". Are they matched by the right column?"
        )
    in_order = np.argsort(places[0], kind="stable")
    repeated = int(counts[0][alike & (counts[0] > 1)].sum())
    return [rows[in_order] for rows in places], left_out, repeated
