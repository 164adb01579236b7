"""Indexes of packs: written whole, made from a shard's bytes where one was lost, merged so that few are searched."""

from __future__ import annotations

import hashlib
import sqlite3
import tarfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from dataflow import atomic, packs
from dataflow.errors import InputError
from dataflow.packs import Packed, Packs, Span

FAN = 8
"""So many indexes of one size become one of the next."""

_TABLE = (
    "CREATE TABLE images (key BLOB PRIMARY KEY, shard INTEGER NOT NULL, offset INTEGER NOT NULL, size INTEGER NOT NULL,"
    " sha256 BLOB NOT NULL, modified INTEGER NOT NULL) WITHOUT ROWID"
)


def listed(shard: Path) -> dict[str, Packed]:
    """What is in a shard, by its own bytes.

    Raises:
        InputError: it is no whole tar file.
    """
    entries: dict[str, Packed] = {}
    modified = shard.stat().st_mtime_ns
    try:
        with tarfile.open(shard, "r:") as file:
            for member in file:
                data = file.extractfile(member) if packs.NAME.fullmatch(member.name) else None
                if data is not None:
                    sha256 = hashlib.file_digest(data, "sha256").digest()  # pyright: ignore[reportArgumentType]
                    entries[member.name] = Packed(shard.name, member.offset_data, member.size, sha256, modified)
                file.members = []  # pyright: ignore[reportAttributeAccessIssue] - else it holds all of them
    except tarfile.TarError as error:
        raise InputError(
            f"is no whole pack ({error}): move it away, and its images are made again", path=shard
        ) from error
    return entries


def write(folder: Path, span: Span, entries: dict[str, Packed]) -> None:
    """Write the index of one shard or several; durable when it returns.

    Args:
        folder: in which shards and indexes lie.
        span: the shards.
        entries: their images, by name.
    """
    rows = sorted(
        (packs.key_of(name), span.last, entry.offset, entry.size, entry.sha256, entry.modified)
        for name, entry in entries.items()
    )

    def fill(connection: sqlite3.Connection) -> None:
        connection.executemany("INSERT INTO images VALUES (?, ?, ?, ?, ?, ?)", rows)

    _publish_index(folder, span, fill)


def _publish_index(folder: Path, span: Span, fill: Callable[[sqlite3.Connection], None]) -> None:
    """Write an index that appears under its name whole or not at all."""
    target = folder / span.file
    temporary = atomic.temporary_for(target)
    try:
        with closing(sqlite3.connect(temporary, isolation_level=None)) as connection:
            # Nobody sees the file before it is whole, and a broken one is written again.
            connection.execute("PRAGMA journal_mode = OFF")
            connection.execute("PRAGMA synchronous = OFF")
            connection.execute(_TABLE)
            connection.execute("BEGIN")
            fill(connection)
            connection.execute("COMMIT")
        atomic.sync(temporary)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    atomic.sync(folder)


def merge(folder: Path, store: Packs, token: str, number: int) -> None:
    """Make one index of many where a round number of shards is reached, so that few are to be searched."""
    width = FAN
    while (number + 1) % width == 0:
        whole = Span(number, number + 1 - width, token)
        parts = sorted(span for span in store.spans() if span != whole and whole.covers(span))
        while len(parts) > 1:
            some, parts = parts[:FAN], parts[FAN:]
            merged = Span(some[-1].last, some[0].first, token)
            _merge_few(folder, merged, some)
            parts.insert(0, merged)
        store.refresh()
        width *= FAN


def _merge_few(folder: Path, merged: Span, parts: list[Span]) -> None:
    columns = "key, shard, offset, size, sha256, modified"

    def fill(connection: sqlite3.Connection) -> None:
        # In the order of the keys, for a compact file; of two of one image the newer shard's comes last and stays.
        each = [f"SELECT {columns} FROM part{number}.images" for number in range(len(parts))]  # noqa: S608 - our own names
        together = " UNION ALL ".join(each)
        connection.execute(f"INSERT OR REPLACE INTO images SELECT {columns} FROM ({together}) ORDER BY key, shard")  # noqa: S608

    def attached(connection: sqlite3.Connection) -> None:
        connection.execute("COMMIT")  # nothing can be attached within a transaction
        for number, part in enumerate(parts):
            connection.execute("ATTACH ? AS part" + str(number), (str(folder / part.file),))
        connection.execute("BEGIN")
        fill(connection)

    _publish_index(folder, merged, attached)
    for part in parts:
        (folder / part.file).unlink()
