"""Loose images of finished steps into packs, and back. Both may be killed at any moment and done again.

The order is law here, too: a shard is durable under its name, then its index is, and only then are the loose files
deleted that it holds. What was killed in between leaves images twice, never nowhere; the next run deletes the loose
ones. A shard without an index gets one from its own bytes, so that losing all indexes loses nothing.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from dataflow import atomic, pack_indexes, packs, remote_files
from dataflow.errors import ConfigError, InputError
from dataflow.local_files import LocalFiles
from dataflow.packs import Packed, Packs, Span
from dataflow.runtime import sharing
from dataflow.runtime.journal import Journal
from dataflow.runtime.lock import cache_lock
from dataflow.runtime.table import load_summary
from dataflow.tar import TarFile

logger = logging.getLogger(__name__)

SHARD_BYTES = 500_000_000
MOST_IMAGES = 100_000
"""In one shard: what is held of each until the shard has its index."""
_READERS = 4
_AHEAD = 16
_SHOWN = 10


@dataclass(slots=True, kw_only=True)
class PackSummary:
    """What became of the images of finished steps. ``images == packed + before + differing + missing``, always.

    Attributes:
        images: that the journals of finished steps name.
        packed: now.
        before: were in a pack already; also what is named a second time.
        differing: their files are not what the journal says; they stay as they are.
        missing: there is neither a file nor a packed one; the next run of the step makes them again.
        removed: loose files that were in a pack already, left by a run that was killed.
        bytes: of the images packed now.
        shards: written now.
        unfinished: steps of which not all was packed, because they have not ended.
        examples: names of some that differ.
    """

    images: int = 0
    packed: int = 0
    before: int = 0
    differing: int = 0
    missing: int = 0
    removed: int = 0
    bytes: int = 0
    shards: int = 0
    unfinished: tuple[str, ...] = ()
    examples: list[str] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class UnpackSummary:
    """What became of packed images. ``images == unpacked + loose + replaced + damaged``, always.

    Attributes:
        images: in all packs.
        unpacked: are files now.
        loose: were files already.
        replaced: older ones, of which a newer pack has another.
        damaged: are not what they were when they were packed; they stay, with their pack.
        bytes: of the images unpacked now.
        shards: that are gone now.
        examples: names of some that are damaged.
    """

    images: int = 0
    unpacked: int = 0
    loose: int = 0
    replaced: int = 0
    damaged: int = 0
    bytes: int = 0
    shards: int = 0
    examples: list[str] = field(default_factory=list)


class _File(NamedTuple):
    """A loose image, read."""

    data: bytes
    sha256: bytes
    status: os.stat_result


def pack(
    cache: str | os.PathLike[str],
    *,
    images: str | os.PathLike[str] | None = None,
    shard_bytes: int = SHARD_BYTES,
    tell: Callable[[str], None] = logger.info,
) -> PackSummary:
    """Move the loose images of a cache folder's finished steps, and of finished parts of others, into tar shards.

    Rows keep their paths; everything in this package that reads pictures finds them in the packs. Readers may be at
    work meanwhile, writers of the cache folder may not.

    Args:
        cache: the cache folder.
        images: the folder of its images; ``images`` in the cache folder where nothing is said.
        shard_bytes: size from which on a shard is closed.
        tell: is told of every shard.

    Raises:
        ConfigError: the images are in an object store, or the size of shards is out of its range.
        InputError: there is no such folder, or nothing was run in it.
        CacheBusyError: another process writes to the cache folder or packs the same images.
        OSError: the disk is full or failing. Nothing is lost: the same call goes on.
    """
    if shard_bytes < 1:
        raise ConfigError(f"the size of a shard must be positive, got {shard_bytes}")
    folder = Path(cache)
    finished, unfinished = _steps(folder)
    with _alone(folder, images) as root:
        packer = _Packer(root, shard_bytes, tell)
        with closing(packer):
            for journal in finished:
                packer.take(_images_of(journal))
        packer.summary.unfinished = tuple(unfinished)
    return packer.summary


def unpack(
    cache: str | os.PathLike[str],
    *,
    images: str | os.PathLike[str] | None = None,
    tell: Callable[[str], None] = logger.info,
) -> UnpackSummary:
    """Put all packed images of a cache folder back as files, one shard after the other.

    Args:
        cache: the cache folder.
        images: as for :func:`pack`.
        tell: is told of every shard.

    Raises:
        ConfigError, CacheBusyError, OSError: as :func:`pack`.
        InputError: there is no such folder.
    """
    folder = Path(cache)
    if not folder.is_dir():
        raise InputError("no such folder", path=folder)
    summary = UnpackSummary()
    with _alone(folder, images) as root:
        store = _recovered(root, tell)
        if store is not None:
            for shard in store.shards():
                _unpack_shard(root, store, shard, summary)
                tell(f"{shard}: {summary.unpacked:,} images are files again")
            _remove_if_empty(root, store)
    return summary


# Which images


def _steps(folder: Path) -> tuple[list[Path], list[str]]:
    """Journals of finished steps and parts, and the names of steps that have not ended.

    Raises:
        InputError: there is none at all.
    """
    if not folder.is_dir():
        raise InputError("no such folder", path=folder)
    finished, unfinished = [], []
    journals = sorted(path for path in (folder / "journal").glob("*") if path.is_dir())
    if not journals:
        raise InputError("holds no step that was run: name the folder that a job or a script wrote to", path=folder)
    for journal in journals:
        if _has_ended(journal):
            finished.append(journal)
        else:
            finished += sorted(part for part in journal.glob("part-*") if _has_ended(part))
            unfinished.append(journal.name)
    return finished, unfinished


def _has_ended(journal: Path) -> bool:
    known = load_summary(journal)
    return bool(known and known.get("output") and not known.get("pending"))


def _images_of(journal: Path) -> Iterator[tuple[str, bytes]]:
    """Name and SHA-256 of every image that a journal says is done."""
    for record in Journal(journal).records():
        if record is not None and record.get("s") == "done":
            for image in record.get("img", ()):
                # A journal from elsewhere must not name other files than images: they are deleted in the end.
                if packs.NAME.fullmatch(image["name"]):
                    yield image["name"], bytes.fromhex(image["sha256"])


@contextmanager
def _alone(folder: Path, images: str | os.PathLike[str] | None) -> Iterator[Path]:
    """The folder of the images, with its cache folder to ourselves."""
    given = folder / "images" if images is None else images
    if remote_files.is_url(given):
        raise ConfigError(f"{given}: packs are for images in a folder; objects in a store stay as they are")
    root = Path(given)
    with ExitStack() as locks:
        locks.enter_context(sharing.alone(folder))
        if root.is_dir() and root.resolve() != folder.resolve():
            locks.enter_context(cache_lock(root))  # caches may share a folder of images
        yield root


# Packing


class _Packer:
    """Writes shards, one at a time."""

    def __init__(self, root: Path, shard_bytes: int, tell: Callable[[str], None]) -> None:
        self.root, self.shard_bytes, self.tell = root, shard_bytes, tell
        self.folder = root / packs.FOLDER
        self.summary = PackSummary()
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="read")
        self._store = _recovered(root, tell)
        self._token, self._number = _next_shard(self._store)
        self._tar: TarFile | None = None
        self._temporary = self.folder / "none"
        self._entries: dict[str, Packed] = {}
        self._statuses: dict[str, os.stat_result] = {}
        self._differing: dict[str, bytes] = {}

    def take(self, images: Iterable[tuple[str, bytes]]) -> None:
        """Pack those that are loose, as they should be, and in no pack yet."""
        waiting: deque[tuple[str, bytes, Future[_File | None]]] = deque()
        for name, sha256 in images:
            waiting.append((name, sha256, self._readers.submit(self._read, name)))
            if len(waiting) >= _AHEAD:
                self._take_one(*waiting.popleft())
        while waiting:
            self._take_one(*waiting.popleft())
        self._finish_shard()
        self.summary.examples = sorted(self._differing)[:_SHOWN]

    def close(self) -> None:
        """Give up a shard that was not finished; its images are loose still."""
        self._readers.shutdown(cancel_futures=True)
        if self._tar is not None:
            self._tar.discard()
            self._temporary.unlink(missing_ok=True)

    def _read(self, name: str) -> _File | None:
        path = self.root / name
        try:
            status = path.stat()
            data = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return _File(data, hashlib.sha256(data).digest(), status)

    def _take_one(self, name: str, sha256: bytes, reading: Future[_File | None]) -> None:
        summary = self.summary
        summary.images += 1
        if name in self._entries:
            summary.before += 1
            return
        loose = reading.result()
        packed = self._store.find(name) if self._store else None
        if loose is None:
            summary.before += packed is not None
            summary.missing += packed is None
        elif loose.sha256 != sha256:
            summary.differing += 1
            self._differing[name] = sha256
        elif packed is not None and packed.sha256 == sha256:
            summary.before += 1
            summary.removed += self._remove(name, loose.status)
        else:
            if self._differing.pop(name, None) is not None:  # as an earlier record has it, which no longer counts
                summary.differing -= 1
                summary.before += 1
            self._add(name, loose)

    def _add(self, name: str, loose: _File) -> None:
        if self._tar is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            target = self.folder / packs.shard_name(self._token, self._number)
            self._temporary = atomic.temporary_for(target)
            self._tar = TarFile(self._temporary)
        offset = self._tar.add(name, loose.data)
        shard = packs.shard_name(self._token, self._number)
        self._entries[name] = Packed(shard, offset, len(loose.data), loose.sha256, loose.status.st_mtime_ns)
        self._statuses[name] = loose.status
        if self._tar.size >= self.shard_bytes or len(self._entries) >= MOST_IMAGES:
            self._finish_shard()

    def _finish_shard(self) -> None:
        if self._tar is None:
            return
        target = self.folder / packs.shard_name(self._token, self._number)
        self._tar.close()
        self._temporary.replace(target)
        self._tar = None
        atomic.sync(self.folder)
        pack_indexes.write(self.folder, Span(self._number, self._number, self._token), self._entries)
        self._store = packs.packs_of(self.root)
        for name, status in self._statuses.items():
            self._remove(name, status)
        size = sum(entry.size for entry in self._entries.values())
        self.summary.packed += len(self._entries)
        self.summary.bytes += size
        self.summary.shards += 1
        self.tell(f"{target.name}: {len(self._entries):,} images, {size / 1e6:,.0f} MB")
        if self._store is not None:
            pack_indexes.merge(self.folder, self._store, self._token, self._number)
        self._entries, self._statuses = {}, {}
        self._number += 1

    def _remove(self, name: str, status: os.stat_result) -> bool:
        """Delete a loose file, unless it was changed since it was read."""
        path = self.root / name
        try:
            now = path.stat()
        except FileNotFoundError:
            return False
        if (now.st_ino, now.st_size, now.st_mtime_ns) != (status.st_ino, status.st_size, status.st_mtime_ns):
            return False
        path.unlink()
        return True


def _next_shard(store: Packs | None) -> tuple[str, int]:
    """Token and number of the next shard. A number is never used twice, though its shard be gone."""
    used = [(span.last, span.token) for span in store.spans()] if store else []
    if not used:
        return secrets.token_hex(4), 0
    last, token = max(used)
    return token, last + 1


# Indexes


def _recovered(root: Path, tell: Callable[[str], None]) -> Packs | None:
    """The packs as they are, after what a killed run left half done was set right; None if there are none."""
    folder = root / packs.FOLDER
    if not folder.is_dir():
        return None
    LocalFiles(root, str(root)).sweep()
    store = packs.packs_of(root)
    if store is None:
        return None
    spans = store.spans()
    for path in folder.iterdir():
        found = packs.INDEX.fullmatch(path.name)
        if found and Span(int(found[3]), int(found[2]), found[1]) not in spans:
            path.unlink()  # it became part of a larger one
    for shard in store.shards():
        found = packs.SHARD.fullmatch(shard)
        assert found is not None
        span = Span(int(found[2]), int(found[2]), found[1])
        if not any(each.covers(span) for each in spans):
            tell(f"{shard}: has no index and gets one")
            pack_indexes.write(folder, span, pack_indexes.listed(folder / shard))
    return packs.packs_of(root)


# Unpacking


def _unpack_shard(root: Path, store: Packs, shard: str, summary: UnpackSummary) -> None:
    """Put a shard's images back, and remove the shard once all of them are durable as files."""
    files = LocalFiles(root, str(root))
    damaged = 0
    for name, packed in store.members(shard):
        summary.images += 1
        newest = store.find(name)
        if newest is not None and newest.shard != shard:
            summary.replaced += 1
            continue
        if (root / name).is_file():
            summary.loose += 1
            continue
        data = _checked(store, name, packed)
        if data is None:
            damaged += 1
            if len(summary.examples) < _SHOWN:
                summary.examples.append(name)
            continue
        files.put(name, data)
        os.utime(root / name, ns=(packed.modified, packed.modified))
        summary.unpacked += 1
        summary.bytes += len(data)
    summary.damaged += damaged
    if not damaged:
        (root / packs.FOLDER / shard).unlink()
        summary.shards += 1


def _checked(store: Packs, name: str, packed: Packed) -> bytes | None:
    """The bytes of a packed image; None if they are not what they were."""
    try:
        with store.open(name, packed) as file:
            data = file.read()
    except (InputError, OSError) as error:
        logger.warning("%s", error)
        return None
    return data if hashlib.sha256(data).digest() == packed.sha256 else None


def _remove_if_empty(root: Path, store: Packs) -> None:
    """Once no shard is left, the indexes go, and the folder with them."""
    store.refresh()
    if store.shards():
        return
    folder = root / packs.FOLDER
    for span in store.spans():
        (folder / span.file).unlink()
    store.refresh()
    try:
        folder.rmdir()
    except OSError as error:
        logger.info("%s stays: %s", folder, error)
