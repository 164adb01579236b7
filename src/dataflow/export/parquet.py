"""Hugging Face parquet: pictures embedded, read back as images by ``datasets``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dataflow.export.arrow import arrow_type, card_feature, cell, feature, table
from dataflow.export.files import Layout, publish, sync
from dataflow.export.kinds import Kind
from dataflow.export.samples import Picture, Ready
from dataflow.export.webdataset import member_names
from dataflow.utils.parquet import libraries


class ParquetWriter:
    """Writes ``data/{split}-{shard:05d}-of-{shards:05d}.parquet``.

    How many shards there are is known at the end: until then they wait beside the journal.

    Args:
        layout: folders and columns.
        row_group_bytes: what is collected before it is written: the memory that a split takes.

    Raises:
        MissingExtraError: pyarrow is not installed.
    """

    shard_bytes = 512 << 20

    def __init__(self, layout: Layout, row_group_bytes: int) -> None:
        libraries()
        self._layout = layout
        self._row_group_bytes = row_group_bytes
        self.entries = tuple(f"data/{split}-*-of-*.parquet" for split in layout.splits)

    def begin(self, split: str, number: int) -> _Shard:
        """Start a shard."""
        return _Shard(self._layout, f"{split}-{number:05d}.parquet", self._row_group_bytes)

    def has(self, record: Mapping[str, Any]) -> bool:
        """Whether the shard's file is there, where it waits or, after a crash at the end, in its place."""
        (file,) = record["files"]
        if self._layout.has(record):
            return True
        found = list((self._layout.output / "data").glob(f"{Path(file['name']).stem}-of-*.parquet"))
        return len(found) == 1 and found[0].stat().st_size == file["bytes"]

    def sums(self, shards: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterable[bytes]:  # noqa: ARG002 - a protocol's
        """No file but the shards."""
        return ()

    def finish(self, shards: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
        """Put the shards in their places; a dataset without samples has one that holds its columns."""
        told = []
        if not any(shards.values()):
            empty = self.begin(self._layout.splits[0], 0).close()
            shards = {self._layout.splits[0]: [empty]}
        for split, records in shards.items():
            for number, record in enumerate(records):
                (file,) = record["files"]
                staged = self._layout.output / file["name"]
                target = self._layout.output / "data" / f"{split}-{number:05d}-of-{len(records):05d}.parquet"
                if staged.exists():
                    publish(staged, target)
                told.append({**file, "name": target.relative_to(self._layout.output).as_posix()})
        return told

    def card(self) -> dict[str, Any]:
        """Where the files are and what they hold."""
        kinds = self._layout.kinds
        return {
            "pattern": "data/{split}-*",
            "features": [card_feature(name, kind) for name, kind in kinds.items()],
        }


def schema_of(kinds: Mapping[str, Kind]) -> Any:
    """The Arrow schema, with what ``datasets`` reads in its metadata."""
    pa, _ = libraries()
    info = {"info": {"features": {name: feature(kind) for name, kind in kinds.items()}}}
    fields = [pa.field(name, arrow_type(kind)) for name, kind in kinds.items()]
    return pa.schema(fields, metadata={b"huggingface": json.dumps(info).encode()})


def leaf_paths(kinds: Mapping[str, Kind], *, pictures: bool) -> list[str]:
    """The columns of the file that hold the bytes of pictures, or all others, as parquet names them."""
    found: list[str] = []

    def walk(path: str, kind: Kind) -> None:
        if kind.name == "picture":
            found.extend([f"{path}.bytes"] if pictures else [f"{path}.path"])
        elif kind.name == "list":
            assert kind.item is not None
            walk(f"{path}.list.element", kind.item)
        elif kind.name == "object":
            for name, each in kind.fields.items():
                walk(f"{path}.{name}", each)
        elif not pictures:
            found.append(path)

    for name, kind in kinds.items():
        walk(name, kind)
    return found


class _Shard:
    def __init__(self, layout: Layout, name: str, row_group_bytes: int) -> None:
        _, pq = libraries()
        self._layout = layout
        self._staged = layout.stage / name
        self._row_group_bytes = row_group_bytes
        self._rows: list[dict[str, Any]] = []
        self._size = 0
        self._staged.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._staged.open("wb")
        self._schema = schema_of(layout.kinds)
        embedded, others = (leaf_paths(layout.kinds, pictures=each) for each in (True, False))
        try:
            self._writer = pq.ParquetWriter(
                self._file,
                self._schema,
                # Pictures are compressed already, and no two are the same.
                compression={**dict.fromkeys(embedded, "none"), **dict.fromkeys(others, "zstd")},
                use_dictionary=others or False,
                write_statistics=others or False,
            )
        except BaseException:
            self._file.close()
            raise

    def add(self, ready: Ready) -> None:
        names = member_names(ready)

        def show(picture: Picture) -> dict[str, Any]:
            return {"bytes": picture.data, "path": names[id(picture)]}

        self._rows.append({name: cell(ready.record.get(name), kind, show) for name, kind in self._layout.kinds.items()})
        self._size += ready.size
        if self._size >= self._row_group_bytes:
            self._write()

    def close(self) -> dict[str, Any]:
        self._write()
        self._writer.close()
        sync(self._file)
        self._file.close()
        return {"files": [self._layout.told(self._staged)]}

    def discard(self) -> None:
        self._rows.clear()
        try:
            self._writer.close()
        finally:
            self._file.close()

    def _write(self) -> None:
        if self._rows:
            self._writer.write_table(table(self._schema, self._rows))
        self._rows, self._size = [], 0
