"""What another process writes into a step's journal, while it writes it: read on from where the last look ended."""

from __future__ import annotations

import contextlib
import os
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataflow.runtime.budget import dollars_of
from dataflow.runtime.journal import journal_files, unpack_line

TAIL_BYTES = 1 << 20
"""How much of a journal that is there already is read at the first look."""


@dataclass(slots=True)
class Follower:
    """The records of a step's journal as they come.

    The first look reads the end of the journal only, so that it takes no longer for ten million records than for ten
    thousand; what came before that is for :func:`dataflow.runtime.survey.survey` to count.

    Args:
        folder: of the step's journal; it need not be there yet.
        shown: how many of the last images are kept.
        whole: the first look, too, reads and counts everything: for a journal that began after the watch did.

    Attributes:
        images: images whose records came since the first look.
        ended: requests that ended since the first look, in whatever way.
        usd: US dollars that calls cost since the first look.
        failures: requests that ended without an image since the first look, by reason.
        last: names of the last images, newest first, those of the first look included.
        in_hand: requests that were begun and have not ended, as far as the part of the journal that was read tells.
        in_jobs: those of them that wait in batch jobs.
    """

    folder: Path
    shown: int = 5
    whole: bool = False
    images: int = 0
    ended: int = 0
    usd: float = 0.0
    failures: Counter[str] = field(default_factory=Counter)
    last: deque[str] = field(default_factory=deque)
    in_hand: set[str] = field(default_factory=set)
    in_jobs: set[str] = field(default_factory=set)
    _offsets: dict[Path, int] = field(default_factory=dict)
    _files: dict[Path, int] = field(default_factory=dict)
    _counts: bool = False

    def __post_init__(self) -> None:
        self.last = deque(self.last, maxlen=self.shown)
        self._counts = self.whole

    def look(self) -> int:
        """Read what came since the last look; how many records that were.

        A last line without its end is left for the next look. A journal that was replaced is read from its beginning.
        """
        count = 0
        files = journal_files(self.folder)
        for path in files:
            for record in self._new(path, TAIL_BYTES if path is files[-1] else 0):
                self._take(record)
                count += 1
        self._counts = True
        return count

    def written_at(self) -> float | None:
        """When a record was last written, in seconds since 1970 by the file system's clock; None without a journal."""
        times = []
        for path in journal_files(self.folder):
            with contextlib.suppress(FileNotFoundError):  # replaced just now
                times.append(path.stat().st_mtime)
        return max(times, default=None)

    def _new(self, path: Path, tail: int) -> Iterator[dict[str, Any]]:
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return
        with file:
            status = os.fstat(file.fileno())
            if self._files.get(path) not in (None, status.st_ino) or self._offsets.get(path, 0) > status.st_size:
                self._offsets[path] = 0
            self._files[path] = status.st_ino
            offset = self._offsets.setdefault(path, 0 if self._counts else max(0, status.st_size - tail))
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offsets[path] += len(line)
                record = unpack_line(line)  # the first one of a tail is a piece of a line
                if record is not None:
                    yield record

    def _take(self, record: dict[str, Any]) -> None:
        status = record.get("s")
        if status == "start":
            self.in_hand.update(record["ks"])
        elif status == "job":
            self.in_jobs.update(record["ks"])
        elif status == "paid":
            self.in_jobs.discard(record["k"])  # the job has answered, though without a result
        elif status == "forget":
            self.in_hand.difference_update(record["ks"])
        elif status in ("done", "refused", "failed"):
            self._end(record, status)
        if self._counts and (usage := record.get("usage")):
            self.usd += dollars_of(usage) or 0.0

    def _end(self, record: dict[str, Any], status: str) -> None:
        for waiting in (self.in_hand, self.in_jobs):
            waiting.discard(record["k"])
        names = [image["name"] for image in record.get("img", ())]
        self.last.extendleft(names)
        if self._counts:
            self.ended += 1
            self.images += len(names)
            if status != "done":
                self.failures[record["reason"]] += 1
