"""The journal of a step: append-only JSON Lines, one writer per file, a checksum on every record.

A record is one JSON object per line whose last field is the CRC-32 of all bytes before it::

    {"s":"start","ks":["<request id>", …],"crc":"89abcdef"}    "alone":true for a suspect tried by itself
    {"s":"done","k":"<request id>","img":[{"name":…,"sha256":…,"bytes":…,"w":…,"h":…}],…,"crc":"…"}
    {"s":"refused"|"failed","k":"<request id>","reason":…,"msg":…,"crc":"…"}
    {"s":"paid","k":"<request id>","usage":{…},"crc":"…"}      a call without a result that was counted
    {"s":"job","name":"…","ks":[…],"crc":"…"}  these requests go into the batch job of that name
    {"s":"forget","ks":[…],"crc":"…"}          these requests count as never tried
    {"s":"seal","crc":"…"}                     the line before was torn by a crash

The order is law: the image is durable before its record is written, and the step's table is written after all records.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import logging
import os
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from dataflow.runtime.budget import dollars_of
from dataflow.types import SavedImage

logger = logging.getLogger(__name__)

SYNC_RECORDS = 100
SYNC_SECONDS = 1.0

_datasync = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync

_SUFFIXES = (".png", ".webp", ".jpg")
_SEEN = 1
_ONE_IMAGE = 2
_FLAG_BITS = 8
_OWN_NAME = {suffix: code << 2 | _ONE_IMAGE for code, suffix in enumerate(_SUFFIXES)}
_STEM = slice(3, 35)


def pack_line(record: Mapping[str, Any]) -> bytes:
    """The line of a record, checksum and newline included."""
    try:
        body = orjson.dumps(record)[:-1]
    except TypeError:
        # What a service counts or writes may be no JSON (a Decimal, half an emoji): no reason to lose the image.
        text = json.dumps(record, default=str, ensure_ascii=False, separators=(",", ":"))
        body = text.encode(errors="replace")[:-1]
    return b'%b,"crc":"%08x"}\n' % (body, zlib.crc32(body))


def unpack_line(line: bytes) -> dict[str, Any] | None:
    """The record of a line, or None if the line is not one whole record."""
    line = line.rstrip(b"\n")
    body = line[:-18]
    try:
        if line[-18:-10] != b',"crc":"' or int(line[-10:-2], 16) != zlib.crc32(body):
            return None
        return orjson.loads(line)
    except ValueError:
        return None


@dataclass(frozen=True, slots=True)
class Ending:
    """How a request ended that has no image: status ``refused`` or ``failed``, and why."""

    status: str
    reason: str
    message: str


@dataclass(slots=True)
class Index:
    """What the journal says of every request, small enough for a million of them.

    Request ids are held as their 16 bytes. A request with exactly one image under its own name (nearly all) is one
    integer; an answer of words alone is its bytes; the few others keep their record.

    Attributes:
        endings: requests that ended without an image.
        starts: unfinished starts of requests that never ended: how often a process died with them in hand.
        alone: those of the starts in which the request ran by itself because it was suspected.
        jobs: names of the batch jobs in which requests without an end are.
        torn: torn or damaged records skipped while reading.
        usd: US dollars spent, in all runs.
        unpriced: calls of which nobody knows what they cost.
        risk: US dollars that those of them that broke off may have cost at most, as expected.
    """

    packed: dict[bytes, int] = field(default_factory=dict)
    records: dict[bytes, dict[str, Any]] = field(default_factory=dict)
    texts: dict[bytes, bytes] = field(default_factory=dict)
    endings: dict[bytes, Ending] = field(default_factory=dict)
    starts: dict[bytes, int] = field(default_factory=dict)
    alone: dict[bytes, int] = field(default_factory=dict)
    jobs: dict[bytes, str] = field(default_factory=dict)
    torn: int = 0
    usd: float = 0.0
    unpriced: int = 0
    risk: float = 0.0
    _counting: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def bill(self, usage: Mapping[str, Any]) -> float:
        """Count what a call cost; returns it, 0.0 where nobody knows. May be called from any thread."""
        usd = dollars_of(usage)
        with self._counting:
            if usd is None:
                self.unpriced += 1
                self.risk += usage.get("up_to") or 0.0
                return 0.0
            self.usd += usd
        return usd

    def add_done(self, key: bytes, record: dict[str, Any]) -> None:
        images = record.get("img", ())
        for table in (self.endings, self.records, self.texts):
            table.pop(key, None)
        if not images:
            self.packed[key] = 0
            self.texts[key] = record.get("text", "").encode()
            return
        if len(images) == 1 and "text" not in record:
            image = images[0]
            name = image["name"]
            flags = _OWN_NAME.get(name[_STEM.stop :])
            if flags is not None and name[_STEM] == record["k"]:
                self.packed[key] = image["bytes"] << _FLAG_BITS | flags
                return
        self.packed[key] = sum(image["bytes"] for image in images) << _FLAG_BITS
        self.records[key] = {"img": images, "text": record.get("text")}

    def is_done(self, key: bytes) -> bool:
        """Whether the request has its result, and every file of it was seen on disk with the right size."""
        value = self.packed.get(key)
        return value is not None and bool(value & _SEEN)

    def sums(self, key: bytes) -> tuple[int, int]:
        """Number of a request's images and their bytes together."""
        value = self.packed[key]
        return 1 if value & _ONE_IMAGE else len(self._images(key)), value >> _FLAG_BITS

    def names(self, key: bytes) -> list[str]:
        """File names of a done request's images, relative to their store."""
        value = self.packed[key]
        if value & _ONE_IMAGE:
            stem = key.hex()
            return [f"{stem[:2]}/{stem}{_SUFFIXES[value >> 2 & 3]}"]
        return [image["name"] for image in self._images(key)]

    def _images(self, key: bytes) -> Sequence[Mapping[str, Any]]:
        return () if key in self.texts else self.records[key]["img"]

    def files(self) -> Iterator[str]:
        """File names of all images of all requests that have their result, relative to their store."""
        for key in self.packed:
            yield from self.names(key)

    def sample(self, number: int) -> list[tuple[str, int]]:
        """Some files with their sizes in bytes, drawn evenly from the requests that have one image each."""
        keys = itertools.islice(self.packed, 0, None, max(1, len(self.packed) // number))
        return [(self.names(key)[0], self.sums(key)[1]) for key in keys if self.packed[key] & _ONE_IMAGE]

    def text(self, key: bytes) -> str | None:
        """The words of a done request's answer, None where it has none."""
        if key in self.texts:
            return self.texts[key].decode()
        record = self.records.get(key)
        return record["text"] if record else None

    def mark_seen(self, key: bytes) -> None:
        self.packed[key] |= _SEEN

    def verify(self, existing: Iterable[tuple[str, int]]) -> int:
        """Mark requests as done whose files exist with the size the journal states.

        Args:
            existing: relative name and size in bytes of every file there is.

        Returns:
            Number of requests whose image is missing or has another size: they will be made again.
        """
        packed, own_name = self.packed, _OWN_NAME
        others = {image["name"]: -1 for record in self.records.values() for image in record["img"]}
        for name, size in existing:
            if name[_STEM.stop :] in own_name:
                key = bytes.fromhex(name[_STEM])
                value = packed.get(key)
                if value is not None and value & _ONE_IMAGE and value >> _FLAG_BITS == size:
                    packed[key] = value | _SEEN
                    continue
            if name in others:
                others[name] = size
        for key in self.texts:
            packed[key] |= _SEEN
        for key, record in self.records.items():
            if all(others[image["name"]] == image["bytes"] for image in record["img"]):
                packed[key] |= _SEEN
        return sum(not value & _SEEN for value in packed.values())

    def apply(self, record: dict[str, Any]) -> None:
        """Take one record in."""
        status = record.get("s")
        if status == "done":
            key = bytes.fromhex(record["k"])
            self.add_done(key, record)
            for table in (self.starts, self.alone, self.jobs):
                table.pop(key, None)
            if usage := record.get("usage"):
                self.bill(usage)
        elif status == "paid":
            self.bill(record["usage"])
            # The job has answered: asked again, the answer would be counted again.
            self.jobs.pop(bytes.fromhex(record["k"]), None)
        elif status == "job":
            for text in record["ks"]:
                self.jobs[bytes.fromhex(text)] = record["name"]
        elif status == "start":
            keys = record["ks"]
            for text in keys:
                key = bytes.fromhex(text)
                self.starts[key] = self.starts.get(key, 0) + 1
                if record.get("alone"):
                    self.alone[key] = self.alone.get(key, 0) + 1
        elif status in ("refused", "failed"):
            key = bytes.fromhex(record["k"])
            self.endings[key] = Ending(status, record["reason"], record["msg"])
            for table in (self.packed, self.records, self.texts, self.starts, self.alone, self.jobs):
                table.pop(key, None)
        elif status == "forget":
            for text in record["ks"]:
                key = bytes.fromhex(text)
                for table in (self.packed, self.records, self.texts, self.endings, self.starts, self.alone):
                    table.pop(key, None)


def journal_files(folder: Path) -> list[Path]:
    """The files of a step's journal, those of the parts of its table included, the one last written to last."""
    found = []
    for path in (*folder.glob("*.jsonl"), *folder.glob("part-*/*.jsonl")):
        with contextlib.suppress(FileNotFoundError):  # replaced just now
            found.append((path.stat().st_mtime_ns, path))
    return [path for _, path in sorted(found)]


class Journal:
    """The records of one step, in a folder of their own.

    Args:
        folder: where the files lie; every ``*.jsonl`` in it is read, one of them is written.
        writer: stem of the file this process writes. Two processes must not share one.
    """

    def __init__(self, folder: Path, writer: str = "main") -> None:
        self.folder = folder
        self.path = folder / f"{writer}.jsonl"
        self._fd: int | None = None
        self._lock = threading.Lock()
        self._unsynced = 0
        self._synced_at = 0.0

    def records(self) -> Iterator[dict[str, Any] | None]:
        """Every record of every file in writing order; None for each torn or damaged one, which is reported."""
        for path in journal_files(self.folder):
            offset = 0
            damaged: int | None = None
            with path.open("rb", buffering=1 << 20) as file:
                for line in file:
                    record = unpack_line(line)
                    if record is None:
                        if damaged is not None:
                            _report_damage(path, damaged)
                        damaged = offset
                        yield None
                    else:
                        if damaged is not None and record.get("s") != "seal":
                            _report_damage(path, damaged)
                        damaged = None
                        yield record
                    offset += len(line)

    def load(self) -> Index:
        """Read everything."""
        index = Index()
        apply = index.apply
        for record in self.records():
            if record is None:
                index.torn += 1
            else:
                apply(record)
        return index

    def open(self) -> None:
        """Open for writing; a torn last record of a killed process is sealed off first."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        size = os.fstat(self._fd).st_size
        tail = os.pread(self._fd, min(size, 1 << 16), max(0, size - (1 << 16)))
        last = tail[tail.rfind(b"\n", 0, len(tail) - 1) + 1 :]
        newline = b"" if last.endswith(b"\n") else b"\n"
        if tail and (newline or unpack_line(last) is None):
            self._write(newline + pack_line({"s": "seal"}))
        self._synced_at = time.monotonic()

    def append(self, *records: Mapping[str, Any]) -> None:
        """Write records, durable within a second (at once against a killed process, later against lost power).

        Raises:
            OSError: the disk is full or gone; the file then still ends with a whole record.
        """
        data = b"".join(map(pack_line, records))
        with self._lock:
            self._write(data)
            self._unsynced += len(records)
            now = time.monotonic()
            if self._unsynced >= SYNC_RECORDS or now - self._synced_at >= SYNC_SECONDS:
                self._sync(now)

    def close(self) -> None:
        if self._fd is not None:
            with self._lock:
                self._sync(time.monotonic())
                os.close(self._fd)
                self._fd = None

    def _write(self, data: bytes) -> None:
        assert self._fd is not None, "the journal is not open"
        size = os.fstat(self._fd).st_size
        try:
            written = os.write(self._fd, data)
            if written != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        except OSError as error:
            # A full disk takes part of a line without complaint: take the part back.
            os.ftruncate(self._fd, size)
            error.filename = error.filename or str(self.path)
            raise

    def _sync(self, now: float) -> None:
        assert self._fd is not None
        if self._unsynced:
            _datasync(self._fd)
        self._unsynced = 0
        self._synced_at = now


def done_record(
    request_id: str, images: Iterable[SavedImage], *, text: str | None = None, **facts: object
) -> dict[str, Any]:
    """The record of a request that has its result. ``facts``: further JSON values worth keeping."""
    record: dict[str, Any] = {
        "s": "done",
        "k": request_id,
        "img": [
            {"name": image.name, "sha256": image.sha256, "bytes": image.bytes, "w": image.width, "h": image.height}
            for image in images
        ],
    }
    if text is not None:
        record["text"] = text
    record.update(facts)
    return record


def ending_record(request_id: str, status: str, reason: str, message: str, **facts: object) -> dict[str, Any]:
    """The record of a request that ended without a result; ``status`` is ``refused`` or ``failed``."""
    return {"s": status, "k": request_id, "reason": reason, "msg": message[:2000], **facts}


def _report_damage(path: Path, offset: int) -> None:
    logger.warning(
        "%s: damaged record at byte %d skipped; its request is taken up again (an image already there is adopted)",
        path,
        offset,
    )
