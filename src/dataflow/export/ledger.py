"""The export's own journal: which shards are finished, so that a killed export goes on behind the last of them.

A shard's record is written when its file is whole, durable and in its place; a picture that cannot be used is recorded
before the shard that it would have stood in. What was recorded behind a split's last finished shard is found again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dataflow.export.tally import Tally
from dataflow.runtime.journal import pack_line, unpack_line

Place = tuple[int, int]
"""Row and number of a sample; samples of a split are written in this order."""


class Ledger:
    """What an export has done so far.

    Args:
        path: the file.
        plan: what is being exported, and how: the file begins with it.
    """

    def __init__(self, path: Path, plan: Mapping[str, Any]) -> None:
        self._path = path
        self._plan = plan
        self.shards: dict[str, list[dict[str, Any]]] = {}
        self._file: Any = None

    def open(self, whole: Callable[[Mapping[str, Any]], bool]) -> None:
        """Read what is there, forget what is not whole any more, and be ready for more.

        Args:
            whole: whether a finished shard's files are still there.
        """
        self.shards = {}
        lost: set[str] = set()
        for record in self._records():
            if record.get("s") == "shard" and record["split"] not in lost:
                split = record["split"]
                if record["number"] == len(self.shards.get(split, ())) and whole(record):
                    self.shards.setdefault(split, []).append(record)
                else:
                    lost.add(split)
        kept = [pack_line({"s": "plan", "plan": self._plan})]
        temporary = self._path.with_name(f"{self._path.name}.tmp")
        with temporary.open("wb") as file:
            file.writelines(kept)
            for record in self._records():
                if self._is_kept(record):
                    record.pop("crc", None)
                    file.write(pack_line(record))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)
        self._file = self._path.open("ab")

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def covers(self, split: str, place: Place) -> bool:
        """Whether a finished shard has dealt with a sample."""
        shards = self.shards.get(split)
        return bool(shards) and place <= tuple(shards[-1]["last"])

    def add_shard(self, record: Mapping[str, Any]) -> None:
        """Record a finished shard: ``split``, ``number``, ``last``, ``tally``, ``files``."""
        full = {"s": "shard", **record}
        self._file.write(pack_line(full))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.shards.setdefault(record["split"], []).append(full)

    def add_problem(self, split: str, place: Place, facts: Mapping[str, Any]) -> None:
        """Record a sample that cannot be written."""
        self._file.write(pack_line({"s": "problem", "split": split, "at": list(place), **facts}))

    def problems(self, split: str) -> Iterator[dict[str, Any]]:
        """The samples of a split that cannot be written, in order."""
        self._file.flush()
        for record in self._records():
            if record.get("s") == "problem" and record["split"] == split:
                yield record

    def tally(self, split: str) -> Tally:
        """Everything counted in the finished shards of a split."""
        found = Tally()
        for record in self.shards.get(split, ()):
            found.merge(Tally.from_json(record["tally"]))
        return found

    def _is_kept(self, record: Mapping[str, Any]) -> bool:
        if record.get("s") == "shard":
            return record["number"] < len(self.shards.get(record["split"], ()))
        return record.get("s") == "problem" and self.covers(record["split"], (record["at"][0], record["at"][1]))

    def _records(self) -> Iterator[dict[str, Any]]:
        if not self._path.is_file():
            return
        with self._path.open("rb") as file:
            for line in file:
                record = unpack_line(line)
                if record is None:
                    return  # torn by a crash: nothing behind it was finished
                yield record


def planned(path: Path) -> dict[str, Any] | None:
    """What an unfinished export in a folder was told to do, or None."""
    try:
        with path.open("rb") as file:
            record = unpack_line(file.readline())
    except OSError:
        return None
    return record["plan"] if record and record.get("s") == "plan" else None


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two plans, for people."""
    told: list[str] = []
    for name in dict.fromkeys((*old, *new)):
        before, after = old.get(name), new.get(name)
        if before == after:
            continue
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            differing = [each for each in after if before.get(each) != after.get(each)]
            told += [f"{each} was {before.get(each)!r}, now {after[each]!r}" for each in differing]
        elif name == "table":
            told.append("the table has changed")
        else:
            told.append(f"{name} was {before!r}, now {after!r}")
    return told
