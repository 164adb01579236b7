"""A store of images in a place of an object store."""

from __future__ import annotations

import errno
import re
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from itertools import islice
from typing import Any

import numpy as np

from dataflow.errors import ConfigError, StoreError
from dataflow.packs import NAME
from dataflow.remote_files import READ_PATIENCE, allow, ask_store, checked, lacks_bucket

WRITE_PATIENCE = 120.0
"""Seconds for which a store that fails for the moment is asked again to take an image: another would be paid for."""

_LISTERS = 8
_FEW = 256


class RemoteFiles:
    """The images under one URL.

    Pickles; methods may be called from several threads.

    Args:
        url: of the store, without a slash at its end.

    Raises:
        ConfigError: it is none that images can be written to.
    """

    def __init__(self, url: str) -> None:
        self.url = checked(url)
        if self.url.endswith("://"):
            raise ConfigError(f"{url!r} names no bucket: write {url}BUCKET/PREFIX")
        allow(self.url)
        self._known: _Known | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["url"])

    def path(self, name: str) -> str:
        """What stands in a row for an image."""
        return f"{self.url}/{name}"

    def put(self, name: str, data: bytes) -> None:
        """Write an image. What fails for the moment is tried again for :data:`WRITE_PATIENCE` seconds.

        Raises:
            StoreError: it cannot be written.
        """
        ask_store(self.path(name), WRITE_PATIENCE, lambda system, path: system.pipe_file(path, data))

    def get(self, name: str) -> bytes | None:
        """The bytes of an image that was there when the store was last listed; None if it was not, or is gone.

        Raises:
            StoreError: the store cannot be read.
        """
        if self._listed().size_of(name) is None:
            return None
        try:
            return ask_store(self.path(name), READ_PATIENCE, lambda system, path: system.cat_file(path))
        except StoreError as error:
            if error.errno == errno.ENOENT:
                return None
            raise

    def existing(self) -> Iterator[tuple[str, int]]:
        """Name and size in bytes of every image, in no particular order.

        Raises:
            StoreError: the store cannot be read.
        """
        known = _Known()
        for name, size in self._list():
            known.add(name, size)
            yield name, size
        self._known = known

    def sizes(self, names: Iterable[str]) -> Iterator[tuple[str, int]]:
        """Those of the images that exist: each is asked for, or, where there are many, the store is listed once.

        Raises:
            StoreError: the store cannot be read.
        """
        names = iter(names)
        first = list(islice(names, _FEW + 1))
        if len(first) <= _FEW:
            with ThreadPoolExecutor(_LISTERS) as threads:
                found = threads.map(self._size, first)
                yield from ((name, size) for name, size in zip(first, found, strict=True) if size is not None)
            return
        known = self._listed()
        for some in (first, names):
            for name in some:
                if (size := known.size_of(name)) is not None:
                    yield name, size

    def sweep(self) -> int:
        """Forget what was listed: a step has ended. A PUT that broke off leaves nothing to remove."""
        self._known = None
        return 0

    def _listed(self) -> _Known:
        """What was there when the step began: asking for every name would take one request each."""
        if self._known is None:
            for _ in self.existing():
                pass
        assert self._known is not None
        return self._known

    def _size(self, name: str) -> int | None:
        try:
            return int(ask_store(self.path(name), READ_PATIENCE, lambda system, path: system.info(path))["size"])
        except StoreError as error:
            if error.errno == errno.ENOENT:
                return None
            raise

    def _list(self) -> Iterator[tuple[str, int]]:
        folders = [name for name in self._names("") if re.fullmatch("[0-9a-f]{2}", name)]
        with ThreadPoolExecutor(_LISTERS) as threads:
            # A few at a time: a folder is a 256th of millions.
            for start in range(0, len(folders), _LISTERS):
                some = folders[start : start + _LISTERS]
                for folder, found in zip(some, threads.map(self._names, some), strict=True):
                    for name, size in found.items():
                        if NAME.fullmatch(whole := f"{folder}/{name}") and size is not None:
                            yield whole, size

    def _names(self, folder: str) -> dict[str, int | None]:
        """The names in a folder, with the sizes of objects."""
        url = f"{self.url}/{folder}" if folder else self.url
        try:
            entries = ask_store(url, READ_PATIENCE, lambda system, path: system.ls(path, detail=True))
        except StoreError as error:
            if error.errno == errno.ENOENT and not lacks_bucket(error):
                return {}  # nothing was written yet
            raise
        return {
            entry["name"].rstrip("/").rpartition("/")[2]: int(entry["size"]) if entry["type"] == "file" else None
            for entry in entries
        }


class _Known:
    """Names and sizes of objects, in sixteen bytes each."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._new: list[tuple[int, int]] = []
        self._blocks: list[np.ndarray] = []
        self._sorted: np.ndarray | None = None

    def add(self, name: str, size: int) -> None:
        """Take one in."""
        self._new.append((_short(name), size))
        if len(self._new) >= 1 << 16:
            self._pack()

    def size_of(self, name: str) -> int | None:
        """Bytes of one; None if it is not among them."""
        with self._lock:
            if self._sorted is None:
                self._pack()
                table = np.concatenate(self._blocks) if self._blocks else np.empty((0, 2), np.uint64)
                self._sorted = table[np.argsort(table[:, 0])]
                self._blocks = []
        short = np.uint64(_short(name))
        at = int(np.searchsorted(self._sorted[:, 0], short))
        if at == len(self._sorted) or self._sorted[at, 0] != short:
            return None
        return int(self._sorted[at, 1])

    def _pack(self) -> None:
        if self._new:
            self._blocks.append(np.array(self._new, np.uint64))
            self._new = []


def _short(name: str) -> int:
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest())
