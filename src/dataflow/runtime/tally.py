"""The conservation sum: every row of the table is in exactly one place, at any moment."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from dataflow.types import Outcome, Status, Summary

SETTLED = ("done", "refused", "failed", "dropped")
SUMS = (*SETTLED, "pending", "images", "bytes", "usd", "unpriced", "written")
"""Figures of a summary that say how a table stands, whichever run made it so."""

_RANK: dict[Status, int] = {"done": 0, "refused": 1, "failed": 2}


@dataclass(slots=True)
class _OpenRow:
    left: int
    status: Status = "done"
    reason: str = ""


@dataclass(slots=True)
class Tally:
    """Counts rows as they are planned (in one thread) and as their requests end (in another).

    A row is ``failed`` if any of its requests failed, else ``refused`` if any was refused, else ``done``.

    Attributes:
        before: rows of the table before the part of it that is counted.
        planned: rows seen so far.
        counts: settled rows by status.
        reasons: rows that are not done, by reason.
        images: images that exist for the rows.
        bytes: their size.
        made: images made in this run.
        adopted: images found whole on disk without a record.
        usd: US dollars spent in all runs.
        unpriced: calls of which nobody knows what they cost.
        in_jobs: requests that wait in batch jobs.
        written: rows of the step's table so far.
    """

    before: int = 0
    planned: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    images: int = 0
    bytes: int = 0
    made: int = 0
    adopted: int = 0
    usd: float = 0.0
    unpriced: int = 0
    in_jobs: int = 0
    written: int = 0
    _open: dict[int, _OpenRow] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _row_of: dict[bytes, int] = field(default_factory=dict)

    def add_row(self, pending: list[bytes], status: Status, reason: str) -> None:
        """A row was planned; ``status`` and ``reason`` are the worst of its requests that have ended already."""
        with self._lock:
            row = self.planned
            self.planned += 1
            if not pending:
                self._close(status, reason)
                return
            self._open[row] = _OpenRow(len(pending), status, reason)
            for key in pending:
                self._row_of[key] = row

    @property
    def next_row(self) -> int:
        """Number in the table, from 1, of the row that is seen next."""
        return self.before + self.planned + 1

    def row(self, key: bytes) -> int:
        """Number in the table, from 1, of the row that waits for a request."""
        return self.before + self._row_of[key] + 1

    def add_done_row(self, images: int, size: int) -> None:
        """A row was planned of which everything was done before."""
        with self._lock:
            self.planned += 1
            self.counts["done"] += 1
            self.images += images
            self.bytes += size

    def skip(self) -> None:
        """A row was planned that this run leaves pending."""
        with self._lock:
            self.planned += 1

    def settle(self, key: bytes, status: Status, reason: str = "") -> None:
        """A request ended."""
        with self._lock:
            row = self._row_of.pop(key)
            state = self._open[row]
            if worse(state.status, status):
                state.status, state.reason = status, reason
            state.left -= 1
            if not state.left:
                del self._open[row]
                self._close(state.status, state.reason)

    def add_images(self, count: int, size: int, *, made: bool = False) -> None:
        """``count`` images of ``size`` bytes together exist for the rows; ``made``: since this run began."""
        with self._lock:
            self.images += count
            self.bytes += size
            if made:
                self.made += count

    @property
    def settled(self) -> int:
        return self.counts.total()

    def recount(self) -> None:
        """All rows are counted again, with :meth:`count`, as they are folded into the table."""
        with self._lock:
            self.planned = self.written = 0
            self.counts.clear()
            self.reasons.clear()

    def count(self, status: Status | Literal["dropped"], reason: str) -> None:
        """A row went into the table, or was dropped from it."""
        self.planned += 1
        self._close(status, reason)

    def summary(self, step: str, rows: int, seconds: float) -> Summary:
        """The sum, for a table of ``rows`` rows."""
        with self._lock:  # rows may settle still, after a second Ctrl-C
            return Summary(
                step=step,
                rows=rows,
                done=self.counts["done"],
                refused=self.counts["refused"],
                failed=self.counts["failed"],
                dropped=self.counts["dropped"],
                pending=rows - self.settled,
                reasons=dict(self.reasons.most_common()),
                images=self.images,
                bytes=self.bytes,
                made=self.made,
                adopted=self.adopted,
                seconds=seconds,
                usd=self.usd,
                unpriced=self.unpriced,
                written=self.written,
            )

    def _close(self, status: Status | Literal["dropped"], reason: str) -> None:
        self.counts[status] += 1
        if status != "done":
            self.reasons[reason] += 1


def add_up(step: str, sums: Iterable[Summary], seconds: float) -> Summary:
    """The sum of several that are about different rows."""
    found = Summary(step=step, seconds=seconds)
    reasons: Counter[str] = Counter()
    for each in sums:
        for name in ("rows", *SUMS, "made", "adopted"):
            setattr(found, name, getattr(found, name) + getattr(each, name))
        reasons.update(each.reasons)
    found.reasons = dict(reasons.most_common())
    return found


def worst(outcomes: Iterable[Outcome]) -> tuple[Status, str]:
    """Status and reason of a row whose requests ended like this."""
    status: Status = "done"
    reason = ""
    for outcome in outcomes:
        if worse(status, outcome.status):
            status, reason = outcome.status, outcome.reason
    return status, reason


def worse(first: Status, second: Status) -> bool:
    """Whether ``second`` is worse than ``first``."""
    return _RANK[second] > _RANK[first]
