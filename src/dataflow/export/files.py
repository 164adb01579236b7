"""What all writers share: where shards are put together, how they are published, what is told of their files."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from dataflow.errors import StepError
from dataflow.export.kinds import Kind
from dataflow.export.samples import Ready

STAGE = ".export"
"""Folder of what is not finished, inside the output."""

_CHUNK = 1 << 20


class Shard(Protocol):
    """A part of the dataset that is being written."""

    def add(self, ready: Ready) -> None:
        """Write one sample."""
        ...

    def close(self) -> dict[str, Any]:
        """Make it durable and put it in its place; what is to be remembered of it: at least ``files``."""
        ...

    def discard(self) -> None:
        """Give it up."""
        ...


class Writer(Protocol):
    """Writes one format.

    Attributes:
        entries: patterns of everything it may leave in the output folder.
        shard_bytes: most bytes of a shard where nothing else is said.
    """

    entries: tuple[str, ...]
    shard_bytes: int

    def begin(self, split: str, number: int) -> Shard:
        """Start a shard."""
        ...

    def has(self, record: Mapping[str, Any]) -> bool:
        """Whether the files of a finished shard are there."""
        ...

    def finish(self, shards: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
        """Write what goes over all shards, and tell of all files. May be called again after a crash."""
        ...

    def sums(self, shards: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterable[bytes]:
        """Lines of checksums of files that :meth:`finish` does not tell of."""
        ...

    def card(self) -> dict[str, Any]:
        """What the dataset card's front matter says of the files: their ``pattern``, perhaps their ``features``."""
        ...


class Layout:
    """The folders of an export, its splits and its columns.

    Args:
        output: the dataset's folder.
        splits: that may get samples.
        kinds: columns with their types.
    """

    def __init__(self, output: Path, splits: Sequence[str], kinds: Mapping[str, Kind]) -> None:
        self.output = output
        self.stage = output / STAGE
        self.splits = tuple(splits)
        self.kinds = kinds

    def told(self, path: Path) -> dict[str, Any]:
        """Name, size and SHA-256 of a file."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"name": path.relative_to(self.output).as_posix(), "bytes": path.stat().st_size, "sha256": digest}

    def has(self, record: Mapping[str, Any]) -> bool:
        """Whether the files of a record are there in their size."""
        return all(_size(self.output / each["name"]) == each["bytes"] for each in record["files"])


def sync(file: IO[bytes]) -> None:
    """Make a file durable."""
    file.flush()
    os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    """Make a file durable that is closed already."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def publish(staged: Path, target: Path) -> None:
    """Give a whole file or folder its name, in the place of an older one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        shutil.rmtree(target)
    staged.replace(target)
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename durable, where folders can be opened at all."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_whole(path: Path, parts: Iterable[bytes]) -> None:
    """Write a file that appears under its name whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        for part in parts:
            file.write(part)
        sync(file)
    publish(temporary, path)


def chunks(path: Path) -> Iterable[bytes]:
    """The bytes of a file, a piece at a time."""
    with path.open("rb") as file:
        while part := file.read(_CHUNK):
            yield part


def unwritable(output: Path, error: OSError) -> StepError:
    """What to tell of an error while writing."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    what = "the disk is full; free some space" if full else error.strerror or str(error)
    return StepError(
        f"{output} cannot be written: {what}. Finished shards are kept: the same export again goes on there"
    )


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
