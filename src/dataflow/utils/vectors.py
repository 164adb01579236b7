"""Vectors kept beside a table, each under the sha256 of the picture it was made from: computed once, read by many.

A store is a folder for one model: ``store.json`` says how long its vectors are, and each process that adds some
appends to a ``.vectors`` file of its own. A record is the 32 bytes of the key, the vector as little-endian float32,
and a checksum over both. A record that was cut off or spoiled counts as missing.
"""

from __future__ import annotations

import json
import os
import uuid
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from dataflow.errors import InputError

FACTS = "store.json"
_SUFFIX = ".vectors"
_KEY = 32
_REST_AT = 100_000

FloatArray = npt.NDArray[np.float32]


class VectorStore:
    """The vectors of one model. Several threads and processes may read and add at the same time, each by its own
    object.

    Args:
        folder: of the store; made when the first vector is added.
        size: numbers in a vector; None to take what the store says.

    Raises:
        InputError: the folder holds vectors of another length, or there is no store and no size.
    """

    def __init__(self, folder: str | os.PathLike[str], size: int | None = None) -> None:
        self.folder = Path(folder)
        facts = self.folder / FACTS
        if facts.is_file():
            stored = _stored_size(facts)
            if size is not None and stored != size:
                raise InputError(
                    f"holds vectors of {stored} numbers, not {size}: name another folder", path=self.folder
                )
            size = stored
        if size is None:
            raise InputError("there are no vectors here: has the embedder run?", path=self.folder)
        self.size = size
        self._record = np.dtype([("key", f"V{_KEY}"), ("vector", "<f4", (size,)), ("checksum", "<u4")])
        self._files: list[Path] = []
        self._maps: list[npt.NDArray[np.void]] = []
        self._heads: npt.NDArray[np.uint64] = np.empty(0, np.uint64)
        self._places: npt.NDArray[np.int64] = np.empty((0, 2), np.int64)
        self._added: dict[bytes, FloatArray] = {}
        self._file: BinaryIO | None = None
        self.refresh()

    def __len__(self) -> int:
        """Vectors that can be found, one for each key."""
        return len(np.unique(self._heads)) + len(self._added)

    def refresh(self) -> None:
        """Take in what others added since."""
        self._files = sorted(self.folder.glob(f"*{_SUFFIX}"))
        self._maps = [self._mapped(file) for file in self._files]
        heads = [_heads(records["key"]) for records in self._maps]
        self._heads = np.concatenate([np.empty(0, np.uint64), *heads])
        places = [np.stack([np.full(len(each), n), np.arange(len(each))], 1) for n, each in enumerate(heads)]
        self._places = np.concatenate([np.empty((0, 2), np.int64), *places])
        order = np.argsort(self._heads, kind="stable")
        self._heads, self._places = self._heads[order], self._places[order]
        self._added = {}

    def find(self, keys: Sequence[str]) -> list[FloatArray | None]:
        """The vector of each key (64 hex digits), shape (size,) float32; None where there is none."""
        raw = [bytes.fromhex(key) for key in keys]
        heads = _heads(np.frombuffer(b"".join(raw), dtype=f"V{_KEY}"))
        first = np.searchsorted(self._heads, heads)
        found: list[FloatArray | None] = []
        for key, head, at in zip(raw, heads, first, strict=True):
            vector = self._added.get(key)
            while vector is None and at < len(self._heads) and self._heads[at] == head:
                vector, at = self._read(at, key), at + 1
            found.append(vector)
        return found

    def add(self, keys: Sequence[str], vectors: npt.ArrayLike) -> None:
        """Keep vectors, shape (len(keys), size); they are durable when this returns.

        Raises:
            ValueError: another shape, or a number that is not finite.
            OSError: they cannot be written.
        """
        rows = np.asarray(vectors, dtype="<f4")
        if rows.shape != (len(keys), self.size):
            raise ValueError(f"expected shape {(len(keys), self.size)}, found {rows.shape}")
        if not np.isfinite(rows).all():
            raise ValueError("a vector holds a number that is not finite")
        raw = [bytes.fromhex(key) for key in keys]
        file = self._file = self._file or self._open()
        for key, row in zip(raw, rows, strict=True):
            body = key + row.tobytes()
            file.write(body + zlib.crc32(body).to_bytes(4, "little"))
        file.flush()
        os.fdatasync(file.fileno())
        self._added.update(zip(raw, rows.astype(np.float32), strict=True))
        if len(self._added) >= _REST_AT:
            self.refresh()

    def items(self) -> Iterator[tuple[str, FloatArray]]:
        """Every key with its vector, in the order of the keys."""
        self.refresh()
        last = b""
        for at in range(len(self._heads)):
            number, row = self._places[at]
            key = self._maps[number][row]["key"].tobytes()
            vector = None if key == last else self._read(at, key)
            if vector is not None:
                last = key
                yield key.hex(), vector

    def close(self) -> None:
        """Close the file that was added to."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> BinaryIO:
        self.folder.mkdir(parents=True, exist_ok=True)
        facts = self.folder / FACTS
        if not facts.is_file():
            draft = self.folder / f".{uuid.uuid4().hex}"
            draft.write_text(json.dumps({"size": self.size}) + "\n")
            draft.replace(facts)
        return (self.folder / f"{uuid.uuid4().hex}{_SUFFIX}").open("xb")

    def _mapped(self, file: Path) -> npt.NDArray[np.void]:
        whole = file.stat().st_size // self._record.itemsize
        if not whole:
            return np.empty(0, self._record)
        return np.memmap(file, dtype=self._record, mode="r", shape=(whole,))

    def _read(self, at: int, key: bytes) -> FloatArray | None:
        number, row = self._places[at]
        record = self._maps[number][row]
        body = record["key"].tobytes() + record["vector"].tobytes()
        if not body.startswith(key) or zlib.crc32(body) != record["checksum"]:
            return None
        return record["vector"].astype(np.float32)


def _heads(keys: npt.NDArray[np.void]) -> npt.NDArray[np.uint64]:
    """The first eight bytes of each key: among ten million keys hardly two share them, and a key is compared whole."""
    return np.ascontiguousarray(keys).view(">u8").reshape(-1, _KEY // 8)[:, 0].astype(np.uint64)


def _stored_size(facts: Path) -> int:
    try:
        return int(json.loads(facts.read_bytes())["size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"says nothing of the vectors beside it: {error}", path=facts) from error
