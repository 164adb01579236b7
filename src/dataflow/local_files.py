"""Images as files in a folder, loose or packed; a loose file wins over a packed one."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from dataflow import atomic, listing, packs

_STEM = re.compile(r"[0-9a-f]{32}(_[0-9]+)?|(pack|index)-[0-9a-f-]+")


class LocalFiles:
    """The images in one folder. Pickles; methods may be called from several threads.

    Args:
        root: the folder.
        shown: the same as it stands in rows.
        durable: make what is written survive a power cut before :meth:`put` returns.
    """

    def __init__(self, root: Path, shown: str, *, durable: bool = True) -> None:
        self.root = root
        self.shown = shown
        self.durable = durable

    def path(self, name: str) -> str:
        """What stands in a row for an image."""
        return os.path.join(self.shown, name)  # noqa: PTH118 - keeps "./" as the user wrote it

    def put(self, name: str, data: bytes) -> None:
        """Write an image; it appears under its name whole or not at all.

        Raises:
            OSError: it cannot be written; nothing is left behind.
        """
        target = self.root / name
        folder = target.parent
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            if self.durable:
                atomic.sync(self.root)
        atomic.write_whole(target, data, durable=self.durable)

    def get(self, name: str) -> bytes | None:
        """The bytes of an image, which are then durable; None if there is none or it cannot be read.

        Raises:
            ImageError: there is a pack that cannot be read.
        """
        file = self.root / name
        try:
            data = file.read_bytes()
            if self.durable:
                atomic.sync(file)
                atomic.sync(file.parent)
        except OSError:
            return self._packed(name)
        return data

    def _packed(self, name: str) -> bytes | None:
        store = packs.packs_of(self.root)
        packed = store.find(name) if store else None
        if store is None or packed is None:
            return None
        try:
            with store.open(name, packed) as file:
                return file.read()
        except OSError:
            return None

    def existing(self) -> Iterator[tuple[str, int]]:
        """Name and size in bytes of every image, in no particular order. The work starts with the call.

        Raises:
            OSError: a folder cannot be read.
            ImageError: a pack cannot be.
        """
        store = packs.packs_of(self.root)
        return listing.images(str(self.root)) if store is None else self._with_packed(store)

    def _with_packed(self, store: packs.Packs) -> Iterator[tuple[str, int]]:
        folders = set(listing.folders(str(self.root)))
        for number in range(256):
            folder = f"{number:02x}"
            loose = dict(listing.images_in(str(self.root), folder)) if folder in folders else {}
            yield from loose.items()
            yield from ((name, size) for name, size in store.below(folder) if name not in loose)

    def sizes(self, names: Iterable[str]) -> Iterator[tuple[str, int]]:
        """Those of the images that exist, as :meth:`existing` gives them.

        Raises:
            OSError, ImageError: the packs cannot be read.
        """
        store = packs.packs_of(self.root)
        for name in names:
            try:
                size = os.stat(os.path.join(self.root, name)).st_size  # noqa: PTH116, PTH118 - called for millions
            except OSError:
                packed = store.find(name) if store and packs.NAME.fullmatch(name) else None
                if packed is None:
                    continue
                size = packed.size
            yield name, size

    def sweep(self) -> int:
        """Remove what killed runs left half-written; returns how many files.

        What a living process is writing stays, on this machine or another: caches may share a folder of images.
        """
        root = str(self.root)
        names = [*listing.folders(root), *([packs.FOLDER] if (self.root / packs.FOLDER).is_dir() else [])]
        return sum(atomic.sweep(self.root / name, _STEM.fullmatch) for name in names)
