"""WebDataset: tar files in which the files of a sample stand together under one key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dataflow.export.files import Layout, publish
from dataflow.export.samples import Ready, rendered
from dataflow.tar import TarFile
from dataflow.utils.exact_json import dumps


class WebDatasetWriter:
    """Writes ``{split}-{shard:06d}.tar``.

    A sample with one picture has ``key.png``, one with several ``key.{column}.png`` and ``key.{column}.{n}.png``; then
    ``key.json`` with all other columns, and ``key.txt`` with the caption.

    Args:
        layout: folders and columns.
    """

    shard_bytes = 1 << 30

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self.entries = tuple(f"{split}-*.tar" for split in layout.splits)

    def begin(self, split: str, number: int) -> _Shard:
        """Start a shard."""
        return _Shard(self._layout, f"{split}-{number:06d}.tar")

    def has(self, record: Mapping[str, Any]) -> bool:
        """Whether the shard's file is there."""
        return self._layout.has(record)

    def sums(self, shards: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterable[bytes]:  # noqa: ARG002 - a protocol's
        """No file but the shards."""
        return ()

    def finish(self, shards: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
        """Every shard is in its place."""
        return [file for records in shards.values() for record in records for file in record["files"]]

    def card(self) -> dict[str, Any]:
        """One pattern for each split."""
        return {"pattern": "{split}-*.tar"}


class _Shard:
    def __init__(self, layout: Layout, name: str) -> None:
        self._layout = layout
        self._staged: Path = layout.stage / name
        self._target = layout.output / name
        self._tar = TarFile(self._staged)

    def add(self, ready: Ready) -> None:
        key = ready.sample.key
        names = member_names(ready)
        for _, _, picture in ready.pictures:
            self._tar.add(names[id(picture)], picture.data)
        record = dict(ready.record)
        for column in {column for column, _, _ in ready.pictures}:
            record[column] = rendered(record[column], lambda each: names[id(each)])
        self._tar.add(f"{key}.json", dumps(record))
        self._tar.add(f"{key}.txt", ready.sample.prompt.encode(errors="replace"))

    def close(self) -> dict[str, Any]:
        self._tar.close()
        publish(self._staged, self._target)
        return {"files": [self._layout.told(self._target)]}

    def discard(self) -> None:
        self._tar.discard()


def member_names(ready: Ready) -> dict[int, str]:
    """A name for each picture of a sample, by its identity: the key, and the column where there are several."""
    key = ready.sample.key
    if len(ready.pictures) == 1 and ready.pictures[0][1] is None:
        picture = ready.pictures[0][2]
        return {id(picture): f"{key}.{picture.suffix}"}
    return {
        id(picture): f"{key}.{column}{'' if number is None else f'.{number}'}.{picture.suffix}"
        for column, number, picture in ready.pictures
    }
