"""Thumbnails as scripts of sixteen, made once: what an earlier report has of the same file is taken over.

A page from disk can load scripts, a few at a time. Beside them lies an index (``thumbnails.sqlite``): which picture is
where, and what its file said of itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

from dataflow.errors import ImageError
from dataflow.picture_files import status
from dataflow.report.entries import picture_key
from dataflow.report.scripts import call, payload
from dataflow.report.thumbnails import Look, Makers, Thumbnail

PER_SCRIPT = 16
INDEX = "thumbnails.sqlite"
FOLDER = "thumbs"
_VERSION = 1
_FEW = 200
_MOST_PROCESSES = 8

_Made = Callable[[], list[Thumbnail | None]]


class Workshop:
    """Makes thumbnails for entries as they come, a few scripts ahead, in several processes where there are many.

    A context manager.

    Args:
        folder: of the report that is being written.
        earlier: folders of reports whose thumbnails may be taken over.
        look: how they are made.
        workers: processes; 0 for one per core.
        expected: how many pictures there will be, about.
    """

    def __init__(self, folder: Path, earlier: Sequence[Path], look: Look, workers: int, expected: int) -> None:
        self.look = look
        self._folder = folder
        processes = workers or min(_MOST_PROCESSES, os.cpu_count() or 1)
        self._makers = Makers(look, processes if expected > _FEW else 0)
        self._ahead = 2 * processes
        self._earlier = [shelf for place in earlier if (shelf := Shelf.open(place)) is not None]
        self._shelf = Shelf.create(folder)

    def __enter__(self) -> Workshop:
        return self

    def __exit__(self, *_: object) -> None:
        self._makers.close()
        for shelf in (*self._earlier, self._shelf):
            shelf.close()

    def made(self, paths: Iterable[str | None]) -> Iterator[Thumbnail | None]:
        """The thumbnails of files, in order; None for None. Writes a script for each sixteen of them."""
        waiting: deque[tuple[Sequence[bytes | None], _Made]] = deque()
        number = 0
        for group in _groups(paths, PER_SCRIPT):
            keys = [None if path is None else file_key(path, self.look) for path in group]
            waiting.append((keys, self._order(group, keys)))
            if len(waiting) > self._ahead:
                yield from self._finish(number, *waiting.popleft())
                number += 1
        while waiting:
            yield from self._finish(number, *waiting.popleft())
            number += 1

    def _order(self, group: Sequence[str | None], keys: Sequence[bytes | None]) -> _Made:
        found: list[Thumbnail | None] = [None if key is None else self._take_over(key) for key in keys]
        missing = [at for at, path in enumerate(group) if path is not None and found[at] is None]
        task: Future[list[Thumbnail]] | None = None
        if missing:
            task = self._makers.submit([path for at in missing if (path := group[at])])

        def finished() -> list[Thumbnail | None]:
            if task is not None:
                for at, made in zip(missing, task.result(), strict=True):
                    found[at] = made
            return found

        return finished

    def _take_over(self, key: bytes) -> Thumbnail | None:
        return next((made for shelf in self._earlier if (made := shelf.get(key)) is not None), None)

    def _finish(self, number: int, keys: Sequence[bytes | None], finished: _Made) -> list[Thumbnail | None]:
        found = finished()
        texts = [made.webp if made else "" for made in found]
        if any(texts):
            (self._folder / FOLDER / f"{number}.js").write_text(call(f"thumbs/{number}", texts), encoding="ascii")
        self._shelf.put(number, [(key, made) for key, made in zip(keys, found, strict=True)])
        return found


class Shelf:
    """The index of a report's thumbnails.

    Args:
        folder: of the report.
        connection: to its index.
    """

    def __init__(self, folder: Path, connection: sqlite3.Connection) -> None:
        self._folder = folder
        self._connection = connection
        self._script: tuple[int, list[str]] = (-1, [])

    @classmethod
    def create(cls, folder: Path) -> Shelf:
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(folder / INDEX)
        connection.execute("PRAGMA synchronous=OFF")  # an index that a power cut tears is made anew
        connection.execute("CREATE TABLE made (key BLOB PRIMARY KEY, script INT, place INT, facts TEXT) WITHOUT ROWID")
        return cls(folder, connection)

    @classmethod
    def open(cls, folder: Path) -> Shelf | None:
        """The index of an earlier report, or None where there is none."""
        if not (folder / INDEX).is_file():
            return None
        connection = sqlite3.connect(f"file:{folder.joinpath(INDEX).as_posix()}?mode=ro", uri=True)
        try:
            connection.execute("SELECT key FROM made LIMIT 1").fetchall()
        except sqlite3.Error:
            connection.close()
            return None
        return cls(folder, connection)

    def get(self, key: bytes) -> Thumbnail | None:
        """The thumbnail of a file that has not changed since."""
        with contextlib.suppress(sqlite3.Error, OSError, ValueError, LookupError):
            found = self._connection.execute("SELECT script, place, facts FROM made WHERE key = ?", (key,)).fetchone()
            if found is None:
                return None
            script, place, facts = found
            if self._script[0] != script:
                text = (self._folder / FOLDER / f"{script}.js").read_text(encoding="ascii")
                self._script = script, payload(text)
            width, height, size, record = json.loads(facts)
            webp = self._script[1][place]
            if webp:
                return Thumbnail(webp=webp, width=width, height=height, bytes=size, facts=record, reused=True)
        return None

    def put(self, script: int, made: Sequence[tuple[bytes | None, Thumbnail | None]]) -> None:
        """Say where the thumbnails of a script are, once it is written."""
        lines = [
            (key, script, place, json.dumps([each.width, each.height, each.bytes, each.facts], default=str))
            for place, (key, each) in enumerate(made)
            if key is not None and each is not None and each.problem is None
        ]
        with self._connection:
            self._connection.executemany("INSERT OR REPLACE INTO made VALUES (?, ?, ?, ?)", lines)

    def close(self) -> None:
        self._connection.close()


def file_key(path: str, look: Look) -> bytes | None:
    """What changes when the picture or the look of thumbnails does; None where there is no picture."""
    try:
        found = status(path)
    except ImageError:
        return None
    if found is None:
        return None
    facts = f"{_VERSION}\0{picture_key(path)}\0{found.size}\0{found.version}\0{look.size}\0{look.quality}"
    return hashlib.blake2b(facts.encode(errors="surrogatepass"), digest_size=16).digest()


def _groups(items: Iterable[str | None], size: int) -> Iterator[list[str | None]]:
    group: list[str | None] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
