"""A table of paths beside picture files: folders, tar files, or the pictures where they are."""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from dataflow.errors import ConfigError
from dataflow.export.arrow import arrow_type, cell, table
from dataflow.export.files import Layout, chunks, publish, sync, sync_file, write_whole
from dataflow.export.kinds import TEXT, Kind
from dataflow.export.samples import Picture, Ready, rendered
from dataflow.export.webdataset import member_names
from dataflow.picture_files import is_loose
from dataflow.remote_files import is_url
from dataflow.tar import TarFile
from dataflow.utils.exact_json import dumps, loads
from dataflow.utils.parquet import libraries

_BATCH = 1000
_PART = {"prompt": "p", "seed": "se", "cfg": "c", "step": "st", "sampler": "sa"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How pictures and their table lie beside each other.

    Attributes:
        manifest: name of the table, ``{split}`` in it being the split; its suffix says its format.
        pictures: in ``folder``s, in ``tar`` files, or where they ``stay``.
        folder: that they are written to, ``{split}``, ``{number}`` and ``{part}`` in it being those of the shard.
        entry: pattern of what is written for the pictures of a ``{split}``.
        captions: a text file beside each picture.
        picture_columns: as image folders are read: ``file_name``, or ``{column}_file_name`` where there are several.
        part: a JSON of the shard's pictures in each folder, and pictures by their bare names, as DiffusionDB has it.
        address: what stands for a picture that stays where it is.
    """

    manifest: str
    pictures: Literal["folder", "tar", "stay"]
    folder: str = ""
    entry: str = ""
    captions: bool = False
    picture_columns: bool = False
    part: bool = False
    address: Callable[[Picture], str] | None = None


def addresses(output: Path, base_url: str | None, root: Path) -> Callable[[Picture], str]:
    """What stands for a picture that stays where it is: its address, or its path as seen from the output folder.

    Args:
        output: the dataset's folder.
        base_url: address of ``root``, or None for paths.
        root: folder that the address stands for.
    """

    def of(picture: Picture) -> str:
        if is_url(picture.path):
            return picture.path
        if not is_loose(picture.path):
            raise ConfigError(
                f"export: {picture.path} is in a pack, so that no path leads to it: give copy_images, or put the "
                "images back first with `dataflow unpack`"
            )
        if base_url is None:
            return Path(os.path.relpath(picture.path, output)).as_posix()
        below = Path(os.path.relpath(picture.path, root)).as_posix()
        if below.startswith("../"):
            raise ConfigError(f"export: {picture.path} is not below {root}, which base_url stands for: give image_root")
        return f"{base_url.rstrip('/')}/{urllib.parse.quote(below)}"

    return of


class ManifestWriter:
    """Writes pictures shard by shard, and their table once all shards are there.

    Args:
        layout: folders and columns.
        packing: where everything goes.

    Raises:
        MissingExtraError: the table is parquet, and pyarrow is not installed.
    """

    shard_bytes = 1 << 30

    def __init__(self, layout: Layout, packing: Packing) -> None:
        if packing.manifest.endswith(".parquet"):
            libraries()
        self._layout = layout
        self._packing = packing
        self._names = _column_names(layout.kinds) if packing.picture_columns else {}
        tables = [self._manifest(split) for split in layout.splits]
        pictures = [packing.entry.format(split=split) for split in layout.splits]
        self.entries = tuple(dict.fromkeys(each for each in (*tables, *pictures) if each))

    def begin(self, split: str, number: int) -> _Shard:
        """Start a shard."""
        return _Shard(self._layout, self._packing, self._names, split, number, PurePosixPath(self._manifest(split)))

    def has(self, record: Mapping[str, Any]) -> bool:
        """Whether the shard's lines and pictures are there."""
        folder = record.get("folder")
        if folder is not None:
            try:
                if len(os.listdir(self._layout.output / folder)) != record["members"]:
                    return False
            except OSError:
                return False
        return self._layout.has(record)

    def finish(self, shards: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
        """Write the table of each split."""
        told = []
        splits = [split for split in self._layout.splits if shards.get(split)] or [self._layout.splits[0]]
        for split in splits:
            records = shards.get(split, ())
            lines = [self._layout.output / record["files"][0]["name"] for record in records]
            told += [file for record in records for file in record["files"][2:]]
            path = self._layout.output / self._manifest(split)
            if path.suffix == ".parquet":
                self._write_parquet(path, lines)
            else:
                write_whole(path, _as_array(lines) if path.suffix == ".json" else _joined(lines))
            told.append(self._layout.told(path))
        return told

    def sums(self, shards: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterable[bytes]:
        """A line for each picture in a folder."""
        if self._packing.pictures == "folder":
            for records in shards.values():
                for record in records:
                    yield from chunks(self._layout.output / record["files"][1]["name"])

    def card(self) -> dict[str, Any]:
        """The tables; image folders are found by their folder."""
        if self._packing.picture_columns:
            return {"pattern": "{split}/**"}
        return {"pattern": self._manifest("{split}")}

    def _manifest(self, split: str) -> str:
        name = self._packing.manifest
        if "{split}" in name or len(self._layout.splits) == 1:
            return name.replace("{split}", split)
        path = PurePosixPath(name)
        return str(path.with_stem(f"{path.stem}_{split}"))

    def _write_parquet(self, path: Path, parts: Sequence[Path]) -> None:
        pa, pq = libraries()
        kinds = {name: _as_text(kind) for name, kind in self._layout.kinds.items()}
        schema = pa.schema([pa.field(name, arrow_type(kind)) for name, kind in kinds.items()])
        temporary = path.with_name(f".{path.name}.tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            with pq.ParquetWriter(file, schema, compression="zstd") as writer:
                lines = _lines(parts)
                while rows := [loads(line) for line in islice(lines, _BATCH)]:
                    cells = [{name: cell(row.get(name), kind, str) for name, kind in kinds.items()} for row in rows]
                    writer.write_table(table(schema, cells))
            sync(file)
        publish(temporary, path)


class _Shard:
    def __init__(
        self,
        layout: Layout,
        packing: Packing,
        names: Mapping[str, str],
        split: str,
        number: int,
        manifest: PurePosixPath,
    ) -> None:
        self._layout, self._packing, self._names, self._number = layout, packing, names, number
        place = packing.folder.format(split=split, number=f"{number:06d}", part=f"{number + 1:06d}")
        self._place = PurePosixPath(place)
        self._from_manifest = PurePosixPath(os.path.relpath(place, manifest.parent)) if place else self._place
        stem = f"{split}-{number:06d}"
        self._lines_path, self._sums_path = layout.stage / f"{stem}.jsonl", layout.stage / f"{stem}.sums"
        self._lines = self._lines_path.open("wb", buffering=1 << 20)
        self._sums = self._sums_path.open("wb", buffering=1 << 20)
        self._members = 0
        self._part: dict[str, Any] = {}
        self._tar = self._tar_target = self._folder = None
        if packing.pictures == "tar":
            self._tar = TarFile(layout.stage / f"{stem}.tar")
            self._tar_target = layout.output / self._place.parts[0] / f"{stem}.tar"
        elif packing.pictures == "folder":
            self._folder = layout.stage / stem
            self._folder.mkdir()

    def add(self, ready: Ready) -> None:
        shown = {}
        names = {key: _file_name(name) for key, name in member_names(ready).items()}
        for _, _, picture in ready.pictures:
            shown[id(picture)] = self._put(picture, names[id(picture)])
        if self._packing.captions and self._folder is not None:
            self._write(f"{ready.sample.key}.txt", ready.sample.prompt.encode(errors="replace"), None)
        record = dict(ready.record)
        if self._packing.part:
            record["part_id"] = self._number + 1
            name = names[id(ready.pictures[0][2])]
            self._part[name] = {short: record.get(column) for column, short in _PART.items()}
        line = {
            self._names.get(name, name): rendered(record.get(name), lambda each: shown[id(each)])
            for name in self._layout.kinds
        }
        self._lines.write(dumps(line) + b"\n")

    def close(self) -> dict[str, Any]:
        if self._part:
            self._write(f"{self._place.name}.json", dumps(self._part), None)
        for file in (self._lines, self._sums):
            sync(file)
            file.close()
        told = [self._layout.told(self._lines_path), self._layout.told(self._sums_path)]
        found: dict[str, Any] = {"files": told}
        if self._folder is not None:
            for name in os.listdir(self._folder):
                sync_file(self._folder / name)  # all at the end: most are on the disk by then
            target = self._layout.output / self._place
            publish(self._folder, target)
            found |= {"folder": str(self._place), "members": self._members}
        if self._tar is not None and self._tar_target is not None:
            self._tar.close()
            publish(self._layout.stage / self._tar_target.name, self._tar_target)
            told.append(self._layout.told(self._tar_target))
        return found

    def discard(self) -> None:
        with ExitStack() as all_of_them:  # each is closed, though one may fail on a full disk
            for file in (self._lines, self._sums):
                all_of_them.callback(file.close)
            if self._tar is not None:
                all_of_them.callback(self._tar.discard)

    def _put(self, picture: Picture, name: str) -> str:
        if self._tar is not None:
            self._tar.add(str(self._place / name), picture.data)
        elif self._folder is not None:
            self._write(name, picture.data, picture.sha256)
        else:
            assert self._packing.address is not None
            return self._packing.address(picture)
        return name if self._packing.part else str(self._from_manifest / name)

    def _write(self, name: str, data: bytes, sha256: str | None) -> None:
        assert self._folder is not None
        with (self._folder / name).open("wb") as file:
            file.write(data)
        self._members += 1
        if sha256 is not None:
            self._sums.write(f"{sha256}  {self._place / name}\n".encode())


def _file_name(member: str) -> str:
    """A member's name as a file's: one dot, so that nobody takes a column for a suffix."""
    *stem, suffix = member.split(".")
    return "_".join(stem) + f".{suffix}"


def _column_names(kinds: Mapping[str, Kind]) -> dict[str, str]:
    """Names of the columns of pictures as image folders are read."""
    pictures = [name for name, kind in kinds.items() if kind.name == "picture"]
    lists = [name for name, kind in kinds.items() if kind.name == "list" and kind.item and kind.item.name == "picture"]
    if len(pictures) == 1 and not lists:
        return {pictures[0]: "file_name"}
    return {name: f"{name}_file_name" for name in pictures} | {name: f"{name}_file_names" for name in lists}


def _as_text(kind: Kind) -> Kind:
    """A type with the path in the place of every picture."""
    if kind.name == "list" and kind.item is not None:
        return Kind("list", _as_text(kind.item))
    if kind.name == "object":
        return Kind("object", fields={name: _as_text(each) for name, each in kind.fields.items()})
    return TEXT if kind.name == "picture" else kind


def _joined(parts: Sequence[Path]) -> Iterator[bytes]:
    for part in parts:
        yield from chunks(part)


def _lines(parts: Sequence[Path]) -> Iterator[bytes]:
    for part in parts:
        with part.open("rb") as file:
            yield from file


def _as_array(parts: Sequence[Path]) -> Iterator[bytes]:
    yield b"["
    for number, line in enumerate(_lines(parts)):
        yield (b",\n" if number else b"\n") + line.rstrip(b"\n")
    yield b"\n]\n"
