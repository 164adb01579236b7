"""Finished images in tar files of some hundred megabytes, each found again by the path it had as a file of its own.

In the folder ``packs`` of a store of images lie shards (``pack-<token>-<number>.tar``) and indexes
(``index-<token>-<first>-<last>.sqlite``), each of which says where in the shards of its numbers every image begins. All
of them are written under another name and never changed once they have theirs, so that readers need no locks, on no
kind of disk; several small indexes become a larger one in time, and what an older one says counts only where no newer
one knows better. This module reads; :mod:`dataflow.packing` writes.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sqlite3
import threading
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dataflow import tar
from dataflow.errors import ImageError

FOLDER = "packs"
SHARD = re.compile(r"pack-([0-9a-f]{8})-([0-9]{5,})\.tar")
INDEX = re.compile(r"index-([0-9a-f]{8})-([0-9]{5,})-([0-9]{5,})\.sqlite")
NAME = re.compile(r"([0-9a-f]{2})/\1[0-9a-f]{30}(?:_[0-9]+)?\.(?:png|webp|jpg)")

_ID = slice(3, 35)
_FIND = "SELECT shard, offset, size, sha256, modified FROM images WHERE key = ?"
_BELOW = "SELECT key, shard, offset, size FROM images WHERE key >= ? AND key < ?"
_ALL = "SELECT key, shard, offset, size, sha256, modified FROM images WHERE shard = ? ORDER BY offset"
_DOUBTFUL_NS = 2_000_000_000
"""A folder that was changed so short a time before it was listed may have been changed again without another date."""


class Packed(NamedTuple):
    """Where an image is.

    Attributes:
        shard: file name.
        offset: of its first byte.
        size: in bytes.
        sha256: of its bytes, 32 bytes.
        modified: when its own file was written, in nanoseconds since 1970.
    """

    shard: str
    offset: int
    size: int
    sha256: bytes
    modified: int


class Span(NamedTuple):
    """The shards that an index is about."""

    last: int
    first: int
    token: str

    def covers(self, other: Span) -> bool:
        """Whether it is about all of another one's."""
        return self.token == other.token and self.first <= other.first and other.last <= self.last

    @property
    def file(self) -> str:
        """Name of the index."""
        return f"index-{self.token}-{self.first:05d}-{self.last:05d}.sqlite"


def shard_name(token: str, number: int) -> str:
    """File name of a shard."""
    return f"pack-{token}-{number:05d}.tar"


def key_of(name: str) -> bytes:
    """What an image is found by: the bytes of its id, and the rest of its name (``ab/abcd….png``)."""
    return bytes.fromhex(name[_ID]) + name[_ID.stop :].encode("ascii")


def name_of(key: bytes) -> str:
    """The name of an image, from what it is found by."""
    stem = key[:16].hex()
    return f"{stem[:2]}/{stem}{key[16:].decode('ascii')}"


def split(path: str) -> tuple[str, str] | None:
    """A path as the folder of a store and a name in it; None if it is no path of a store's image."""
    parts = path.replace(os.sep, "/").rsplit("/", 2)
    name = "/".join(parts[-2:])
    if not NAME.fullmatch(name):
        return None
    return (parts[0] or "/") if len(parts) == 3 else os.curdir, name


class Packs:
    """The packs of one store. Its methods may be called from several threads.

    Args:
        folder: in which shards and indexes lie; absolute.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._dated = 0
        self._settled = False
        self._open: dict[Span, sqlite3.Connection] = {}
        self._spans: list[Span] = []
        self._shards: dict[str, int] = {}

    def refresh(self) -> bool:
        """Take notice of what was written since; False if there is no such folder.

        Raises:
            OSError: it cannot be read.
            ImageError: an index cannot be.
        """
        try:
            dated = os.stat(self._folder).st_mtime_ns  # noqa: PTH116 - called for millions
        except (FileNotFoundError, NotADirectoryError):
            return False
        with self._lock:
            if not (self._settled and dated == self._dated):
                now = time.time_ns()
                self._list()
                self._dated, self._settled = dated, now - dated > _DOUBTFUL_NS
        return True

    def find(self, name: str) -> Packed | None:
        """Where an image is, as far as was known at the last look."""
        key = key_of(name)
        with self._lock:
            for span in self._spans:
                found = self._open[span].execute(_FIND, (key,)).fetchone()
                if found is not None:
                    packed = Packed(shard_name(span.token, found[0]), *found[1:])
                    return packed if self._holds(packed.shard, packed.offset + packed.size) else None
        return None

    def below(self, folder: str) -> Iterator[tuple[str, int]]:
        """Name and size in bytes of every image whose name begins with these two digits."""
        low = bytes.fromhex(folder)
        high = bytes([low[0] + 1]) if low[0] < 255 else b"\xff" * 40
        with self._lock:
            # The newest last, so that what it says stays.
            found = {
                key: (shard_name(span.token, shard), offset, size)
                for span in reversed(self._spans)
                for key, shard, offset, size in self._open[span].execute(_BELOW, (low, high))
            }
            held = [(key, size) for key, (shard, at, size) in found.items() if self._holds(shard, at + size)]
        return ((name_of(key), size) for key, size in held)

    def shards(self) -> list[str]:
        """File names of the shards there are, in the order in which they were written."""
        with self._lock:
            return sorted(self._shards, key=lambda name: (int(name[14:-4]), name))

    def spans(self) -> list[Span]:
        """The indexes that count, the newest first."""
        with self._lock:
            return list(self._spans)

    def members(self, shard: str) -> Iterator[tuple[str, Packed]]:
        """What the indexes say of a shard, in the order of its bytes; an image may since have gone to another one."""
        found = SHARD.fullmatch(shard)
        assert found is not None
        token, number = found[1], int(found[2])
        with self._lock:
            span = next((each for each in self._spans if each.covers(Span(number, number, token))), None)
            rows = [] if span is None else self._open[span].execute(_ALL, (number,)).fetchall()
        for key, _, *rest in rows:
            yield name_of(key), Packed(shard, *rest)

    def open(self, name: str, packed: Packed) -> io.BufferedReader:
        """The bytes of an image as a file for reading.

        Raises:
            FileNotFoundError: the shard is gone.
            ImageError: what stands there is not that image.
        """
        path = Path(self._folder, packed.shard)
        file = path.open("rb", buffering=0)
        try:
            file.seek(packed.offset - tar.BLOCK)
            if not tar.describes(file.read(tar.BLOCK), name, packed.size):
                raise ImageError(
                    f"the pack {path} is damaged: {name} is not where the index says", reason="unreadable", path=name
                )
            return io.BufferedReader(_Member(file, packed.offset, packed.size))
        except BaseException:
            file.close()
            raise

    def _holds(self, shard: str, end: int) -> bool:
        return self._shards.get(shard, 0) >= end

    def _list(self) -> None:
        while True:
            spans, shards = self._names()
            try:
                for span in self._open.keys() - set(spans):
                    self._open.pop(span).close()
                for span in spans:
                    if span not in self._open:
                        self._open[span] = _connected(os.path.join(self._folder, span.file))  # noqa: PTH118
            except FileNotFoundError:
                continue  # it became part of a larger one just now
            self._spans, self._shards = sorted(spans, reverse=True), shards
            return

    def _names(self) -> tuple[list[Span], dict[str, int]]:
        """The indexes that count, and the shards with their sizes."""
        spans, shards = [], {}
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if SHARD.fullmatch(entry.name):
                    with contextlib.suppress(FileNotFoundError):  # unpacked just now
                        shards[entry.name] = entry.stat().st_size
                elif found := INDEX.fullmatch(entry.name):
                    spans.append(Span(int(found[3]), int(found[2]), found[1]))
        # Of an index that became part of a larger one, a killed process may have left both.
        return [span for span in spans if not any(other != span and other.covers(span) for other in spans)], shards


class _Member(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, file: io.FileIO, start: int, size: int) -> None:
        self._file, self._start, self._size = file, start, size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer) -> int:
        count = max(0, min(len(buffer), self._size - self._at))
        self._file.seek(self._start + self._at)
        read = self._file.readinto(memoryview(buffer)[:count])
        if count and not read:
            raise OSError(f"{self._file.name} is shorter than its index says")
        self._at += read
        return read

    def close(self) -> None:
        self._file.close()
        super().close()


def _connected(path: str) -> sqlite3.Connection:
    # Immutable: SQLite neither locks the file nor looks for the traces of a writer.
    place = f"file:{urllib.parse.quote(path)}?mode=ro&immutable=1"
    try:
        connection = sqlite3.connect(place, uri=True, check_same_thread=False, isolation_level=None)
        connection.execute("SELECT key FROM images LIMIT 1").fetchone()
    except sqlite3.Error as error:
        os.stat(path)  # noqa: PTH116 - raises FileNotFoundError
        raise ImageError(
            f"is no index that can be read ({error}): remove it, and `dataflow pack` makes it anew from the packs",
            reason="unreadable",
            path=path,
        ) from error
    return connection


_known: dict[str, Packs] = {}
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_known.clear)  # connections must not be used on both sides


def packs_of(root: str | os.PathLike[str]) -> Packs | None:
    """The packs of a store, as they are now; None, for the price of one look, if it has none.

    Raises:
        OSError: they cannot be read.
        ImageError: likewise.
    """
    folder = os.path.abspath(os.path.join(root, FOLDER))  # noqa: PTH100, PTH118 - called for millions
    packs = _known.get(folder)
    if packs is None:
        packs = Packs(folder)
        if not packs.refresh():
            return None
        return _known.setdefault(folder, packs)
    if not packs.refresh():
        _known.pop(folder, None)
        return None
    return packs


def find_packed(path: str) -> tuple[Packs, str, Packed] | None:
    """The pack that holds what was a file of this path: the packs of the store, its name there, where it is.

    Raises:
        OSError, ImageError: as :func:`packs_of`.
    """
    found = split(path)
    packs = packs_of(found[0]) if found else None
    packed = packs.find(found[1]) if packs and found else None
    return (packs, found[1], packed) if packs and found and packed else None
