"""Lance: one dataset for each split, pictures as blobs that are read lazily."""

from __future__ import annotations

import json
import queue
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from dataflow.errors import MissingExtraError
from dataflow.export.arrow import arrow_type, cell
from dataflow.export.files import Layout, sync_file
from dataflow.export.kinds import Kind
from dataflow.export.samples import Picture, Ready
from dataflow.utils.parquet import libraries

_VERSION = "2.2"
"""Of the file format: the first that keeps blobs beside the columns."""

_WAIT = 0.1


def _lance() -> Any:
    try:
        import lance
        import lance.fragment
    except ImportError as error:
        raise MissingExtraError("pylance", "lance", "a Lance dataset") from error
    return lance


class LanceWriter:
    """Writes ``{split}.lance``.

    Shards become fragments; the dataset appears when all are there and committed at once. The library gives data files
    random names: a resumed export has the same rows in the same order, not the same bytes.

    Args:
        layout: folders and columns.
        row_group_bytes: what is collected before it is handed on.

    Raises:
        MissingExtraError: pylance or pyarrow is not installed.
    """

    shard_bytes = 1 << 30

    def __init__(self, layout: Layout, row_group_bytes: int) -> None:
        libraries()
        self._lance = _lance()
        self._layout = layout
        self._row_group_bytes = row_group_bytes
        self._schema = _schema(self._lance, layout.kinds)
        self.entries = tuple(f"{split}.lance" for split in layout.splits)

    def begin(self, split: str, number: int) -> _Shard:  # noqa: ARG002 - fragments have no numbers
        """Start a shard."""
        return _Shard(self._lance, self._layout, self._schema, split, self._row_group_bytes)

    def has(self, record: Mapping[str, Any]) -> bool:
        """Whether the shard's data files are there."""
        return self._layout.has(record)

    def sums(self, shards: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterable[bytes]:  # noqa: ARG002 - a protocol's
        """No file but the shards'."""
        return ()

    def finish(self, shards: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
        """Remove what killed runs left of unfinished shards, and commit the others."""
        told = []
        for split in [split for split in self._layout.splits if shards.get(split)] or [self._layout.splits[0]]:
            records = shards.get(split, ())
            files = [file for record in records for file in record["files"]]
            self._sweep(split, {file["name"] for file in files})
            fragments = [
                self._lance.fragment.FragmentMetadata.from_json(json.dumps(each))
                for record in records
                for each in record["fragments"]
            ]
            operation = self._lance.LanceOperation.Overwrite(self._schema, fragments)
            self._lance.LanceDataset.commit(str(self._layout.output / f"{split}.lance"), operation)
            told += files
        return told

    def card(self) -> dict[str, Any]:
        """The Hub has no pattern for it."""
        return {}

    def _sweep(self, split: str, known: set[str]) -> None:
        data = self._layout.output / f"{split}.lance" / "data"
        if data.is_dir():
            stems = {name.removesuffix(".lance") for name in known}
            for each in list(data.iterdir()):
                name = each.relative_to(self._layout.output).as_posix()
                if name.removesuffix(".lance") not in stems:
                    shutil.rmtree(each) if each.is_dir() else each.unlink()


class _Shard:
    """Hands batches to the library, which pulls them, in a thread of its own."""

    def __init__(self, lance: Any, layout: Layout, schema: Any, split: str, row_group_bytes: int) -> None:
        self._lance, self._layout, self._schema = lance, layout, schema
        self._uri = layout.output / f"{split}.lance"
        self._row_group_bytes = row_group_bytes
        self._rows: list[dict[str, Any]] = []
        self._size = 0
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=1)
        self._fragments: list[Any] = []
        self._error: BaseException | None = None
        self._given_up = False
        self._thread = threading.Thread(target=self._run, name="lance", daemon=True)
        self._thread.start()

    def add(self, ready: Ready) -> None:
        def show(picture: Picture) -> bytes:
            return picture.data

        self._rows.append({name: cell(ready.record.get(name), kind, show) for name, kind in self._layout.kinds.items()})
        self._size += ready.size
        if self._size >= self._row_group_bytes:
            self._hand_on()

    def close(self) -> dict[str, Any]:
        self._hand_on()
        self._put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error
        files = []
        for fragment in self._fragments:
            for file in fragment["files"]:
                path = self._uri / "data" / file["path"]
                for each in (path, *sorted(path.with_suffix("").glob("*"))):
                    sync_file(each)
                    files.append(self._layout.told(each))
        return {"files": files, "fragments": self._fragments}

    def discard(self) -> None:
        self._given_up = True
        self._thread.join()

    def _hand_on(self) -> None:
        if self._rows:
            self._put(_batch(self._lance, self._schema, self._rows))
        self._rows, self._size = [], 0

    def _put(self, item: Any) -> None:
        while self._thread.is_alive():
            try:
                return self._queue.put(item, timeout=_WAIT)
            except queue.Full:
                continue
        if self._error is not None:
            raise self._error
        return None

    def _batches(self) -> Iterator[Any]:
        while not self._given_up:
            try:
                item = self._queue.get(timeout=_WAIT)
            except queue.Empty:
                continue
            if item is None:
                return
            yield item
        raise InterruptedError("the shard was given up")

    def _run(self) -> None:
        pa, _ = libraries()
        try:
            reader = pa.RecordBatchReader.from_batches(self._schema, self._batches())
            found = self._lance.fragment.write_fragments(
                reader, str(self._uri), schema=self._schema, mode="create", data_storage_version=_VERSION
            )
            self._fragments = [each.to_json() for each in found]
        except BaseException as error:  # noqa: BLE001 - raised where the shard is used
            self._error = error


def _schema(lance: Any, kinds: Mapping[str, Kind]) -> Any:
    pa, _ = libraries()
    fields = [
        lance.blob_field(name) if kind.name == "picture" else pa.field(name, _plain(kind))
        for name, kind in kinds.items()
    ]
    return pa.schema(fields)


def _plain(kind: Kind) -> Any:
    """The Arrow type, with bytes for pictures inside lists and objects."""
    pa, _ = libraries()
    if kind.name == "picture":
        return pa.large_binary()
    if kind.name == "list" and kind.item is not None:
        return pa.list_(_plain(kind.item))
    if kind.name == "object":
        return pa.struct([pa.field(name, _plain(each)) for name, each in kind.fields.items()])
    return arrow_type(kind)


def _batch(lance: Any, schema: Any, rows: Sequence[Mapping[str, Any]]) -> Any:
    pa, _ = libraries()
    columns = [
        lance.blob_array([row[field.name] for row in rows])
        if isinstance(field.type, pa.ExtensionType)
        else pa.array([row[field.name] for row in rows], field.type)
        for field in schema
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)
